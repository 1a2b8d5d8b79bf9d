"""Meta-World with EVA: scripted experts, demonstration files, a Decision Transformer, rollouts in MuJoCo.

Import from the submodules; this package imports none of them, so that a mistyped task is reported before MuJoCo is
loaded.

- ``eva_lightning.rl.tasks``: the names of the 50 tasks, split into MT40 and CW10
- ``eva_lightning.rl.environments``: :class:`MetaWorldEnvironment`, one task with its goals
- ``eva_lightning.rl.rendering``: which OpenGL draws, or why no video can be made
- ``eva_lightning.rl.demonstrations``: the files of a folder of demonstrations
- ``eva_lightning.rl.collection``, ``minari_export``: filling such a folder, and handing it to Minari
- ``eva_lightning.rl.trajectories``: windows for training, a LightningDataModule
- ``eva_lightning.rl.decision_transformer``, ``module``, ``policy``: the network, its LightningModule, and how it acts
- ``eva_lightning.rl.rollouts``, ``rollout_callback``, ``video``: success measured in the simulator
"""
