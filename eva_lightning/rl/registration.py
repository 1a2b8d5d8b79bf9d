"""The Meta-World tasks as environments that ``gymnasium.make`` knows by name: ``eva_lightning/MetaWorld-push-v3``.

Gymnasium is not imported here: mistyped tasks and ``--help`` must not wait for it.
"""

from __future__ import annotations

from types import ModuleType

from eva_lightning import on_import
from eva_lightning.rl.tasks import HORIZON, MAX_HORIZON, TASKS, resolve_task

NAMESPACE = "eva_lightning"
#: Where :func:`gymnasium.make` finds the class; a text, so that data sets can keep it.
ENTRY_POINT = "eva_lightning.rl.environments:MetaWorldEnvironment"


def environment_id(task: str) -> str:
    """The name of a task's environment: ``eva_lightning/MetaWorld-push-v3`` for ``push`` and ``push-v3``.

    Raises:
        InputError: There is no such task.
    """
    return f"{NAMESPACE}/MetaWorld-{resolve_task(task)}"


def register_when_imported() -> None:
    """Have Gymnasium know every task as soon as it is imported, now or later."""
    on_import.after("gymnasium", _register)


def _register(_: ModuleType) -> None:
    # not by way of the package, which may be in the middle of being imported
    from gymnasium.envs.registration import register, registry

    for task in TASKS:
        name = environment_id(task)
        if name not in registry:
            # the limit is Gymnasium's, so that its max_episode_steps counts; the environment's own is metaworld's
            kwargs = {"task": task, "horizon": MAX_HORIZON}
            register(name, ENTRY_POINT, max_episode_steps=HORIZON, kwargs=kwargs)
