"""Robots with EVA: a Decision Transformer for any Gymnasium environment, and Meta-World's with its scripted experts.

Import from the submodules; this package imports none of the heavy ones, so that a mistyped task is reported before
MuJoCo is loaded. Importing it is enough for ``gymnasium.make("eva_lightning/MetaWorld-push-v3")``.

- ``eva_lightning.rl.tasks``: the names of the 50 tasks, split into MT40 and CW10
- ``eva_lightning.rl.environments``, ``registration``: :class:`MetaWorldEnvironment`, one task with its goals, by name
- ``eva_lightning.rl.rendering``: which OpenGL draws, or why no video can be made
- ``eva_lightning.rl.demonstrations``: the files of a folder of demonstrations
- ``eva_lightning.rl.collection``, ``minari_export``: filling such a folder, and handing it to Minari
- ``eva_lightning.rl.trajectories``, ``minari_import``: windows for training, a LightningDataModule, also of Minari's
- ``eva_lightning.rl.decision_transformer``, ``module``, ``policy``: the network, its LightningModule, and how it acts
- ``eva_lightning.rl.rollouts``, ``rollout_callback``, ``video``: success and return measured in any environment
"""

from eva_lightning.rl.registration import register_when_imported

register_when_imported()
