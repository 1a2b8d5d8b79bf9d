"""EVA initialisation for LoRA in PyTorch Lightning."""
