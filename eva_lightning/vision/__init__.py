"""Image classification with EVA: timm backbones, VTAB-1K, a plain LightningModule.

Import from the submodules; this package imports none of them, so that a mistyped folder or task is reported before
timm is loaded.

- ``eva_lightning.vision.tasks``: the 19 tasks as a table
- ``eva_lightning.vision.splits``: reading and checking the folder
- ``eva_lightning.vision.archive``, ``originals``, ``status``: getting the folder, building it, what is in it
- ``eva_lightning.vision.vtab``: :class:`VTAB1K`, the LightningDataModule
- ``eva_lightning.vision.cache``: decoded images as a checksummed memory map
- ``eva_lightning.vision.backbones``, ``weights``: timm models and where their weights come from
- ``eva_lightning.vision.position_embedding``: DINOv2's for another image size, as the official code resamples it
- ``eva_lightning.vision.split_fused``, ``fused_adapter``: q, k, v and SwiGLU's halves apart, and back together
- ``eva_lightning.vision.module``: :class:`ImageClassifier`, the LightningModule
- ``eva_lightning.vision.protocol``: where the authors' code differs from the paper's text, as named fields
- ``eva_lightning.vision.method_keys``: what methods there are, their labels, and what each needs
- ``eva_lightning.vision.methods``: what each does to an ImageClassifier
"""
