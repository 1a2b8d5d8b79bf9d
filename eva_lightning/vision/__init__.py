"""Image classification with EVA: timm backbones, VTAB-1K, a plain LightningModule.

Import from the submodules; this package imports none of them, so that a mistyped folder or task is reported before
timm is loaded.

- ``eva_lightning.vision.data.tasks``: the 19 tasks as a table
- ``eva_lightning.vision.data.splits``: reading and checking the folder
- ``tools.vtab.archive``, ``originals``, ``dataset_check``: getting the folder, building it, checking it
- ``eva_lightning.vision.data.datamodule``: :class:`VTAB1K`, the LightningDataModule
- ``eva_lightning.vision.data.image_cache``: decoded images as a checksummed memory map
- ``eva_lightning.vision.backbone.timm_models``, ``weights``: timm models and where their weights come from
- ``eva_lightning.vision.backbone.position_embedding``: DINOv2's, resampled as the official code does
- ``eva_lightning.vision.backbone.split_fused``, ``fused_adapter``: q, k, v and SwiGLU's halves apart, and back together
- ``eva_lightning.vision.module``: :class:`ImageClassifier`, the LightningModule
- ``eva_lightning.vision.protocol``: where the authors' code differs from the paper's text, as named fields
- ``eva_lightning.methods``: the methods, and what each does to an ImageClassifier
"""
