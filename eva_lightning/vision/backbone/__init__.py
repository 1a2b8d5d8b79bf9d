"""timm backbones: models, weights, position embeddings, fused projections."""
