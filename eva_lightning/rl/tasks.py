"""The 50 tasks of Meta-World by name, 40 to pre-train on (MT40) and 10 to fine-tune on (CW10), and what all share.

The split is that of Wołczyk et al., "Continual World", 2021, as section E.1 of the EVA paper uses it. The paper prints
stick-pull twice; its tables have handle-press-side. Names are those of metaworld 3 (``-v3``); the paper's end in
``-v2``. Neither NumPy nor the simulator is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable

from eva_lightning.errors import InputError, check_number, unknown

#: Steps of an episode, as in the paper.
HORIZON = 200
#: Steps after which metaworld itself stops.
MAX_HORIZON = 500
#: Seeds of goals are below this.
MAX_SEED = 2**31
#: An observation: 18 numbers of now, the same 18 of the previous frame, the goal's position.
STATE_DIM = 39
#: Movement in x, y and z, and closing of the gripper.
ACTION_DIM = 4

#: What can be asked of data, network and policy, by name: see trajectories, decision_transformer and policy.
TARGETS = ("executed", "expert")
POSITIONS = ("global", "timestep")
MODES = ("exact", "streaming")

#: Fine-tuning tasks, in the paper's order.
CW10: tuple[str, ...] = (
    "hammer-v3",
    "push-wall-v3",
    "faucet-close-v3",
    "push-back-v3",
    "stick-pull-v3",
    "handle-press-side-v3",
    "push-v3",
    "shelf-place-v3",
    "window-close-v3",
    "peg-unplug-side-v3",
)

#: Pre-training tasks: the other 40.
MT40: tuple[str, ...] = (
    "assembly-v3",
    "basketball-v3",
    "bin-picking-v3",
    "box-close-v3",
    "button-press-topdown-v3",
    "button-press-topdown-wall-v3",
    "button-press-v3",
    "button-press-wall-v3",
    "coffee-button-v3",
    "coffee-pull-v3",
    "coffee-push-v3",
    "dial-turn-v3",
    "disassemble-v3",
    "door-close-v3",
    "door-lock-v3",
    "door-open-v3",
    "door-unlock-v3",
    "drawer-close-v3",
    "drawer-open-v3",
    "faucet-open-v3",
    "hand-insert-v3",
    "handle-press-v3",
    "handle-pull-side-v3",
    "handle-pull-v3",
    "lever-pull-v3",
    "peg-insert-side-v3",
    "pick-out-of-hole-v3",
    "pick-place-v3",
    "pick-place-wall-v3",
    "plate-slide-back-side-v3",
    "plate-slide-back-v3",
    "plate-slide-side-v3",
    "plate-slide-v3",
    "reach-v3",
    "reach-wall-v3",
    "soccer-v3",
    "stick-push-v3",
    "sweep-into-v3",
    "sweep-v3",
    "window-open-v3",
)

TASKS: tuple[str, ...] = (*MT40, *CW10)

_SETS: dict[str, tuple[str, ...]] = {"mt40": MT40, "cw10": CW10}


def resolve_task(name: str, ids: Iterable[str] = ()) -> str:
    """The full name of the task `name`: ``push`` and ``push-v3`` are ``push-v3``.

    Args:
        name: The name given.
        ids: Of Gymnasium's environments, where they would have done too: nearest ones are then named as well.

    Raises:
        InputError: No such task, or its name of metaworld 2 (``push-v2``); the message names the nearest ones.
    """
    for task in (name, f"{name}-v3"):
        if task in TASKS:
            return task
    stem, _, version = name.rpartition("-v")
    if version.isdigit() and f"{stem}-v3" in TASKS:
        raise InputError(f"task {name!r} is of another version of Meta-World: did you mean {stem}-v3?")
    others = tuple(ids)
    kind = "Meta-World task or Gymnasium environment" if others else "Meta-World task"
    raise InputError(unknown(kind, name, (*TASKS, *others), list_all=False))


def parse_tasks(names: str | Iterable[str]) -> tuple[str, ...]:
    """The tasks that `names` mean: names of tasks, ``mt40`` and ``cw10``, as a sequence or as one text with commas.

    Raises:
        InputError: A name is unknown, given twice, or missing.
    """
    words = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    if not words or not all(words):
        raise InputError(f"tasks must be mt40, cw10 or task names, got {names!r}")
    tasks: list[str] = []
    for word in words:
        tasks += _SETS[word.lower()] if word.lower() in _SETS else [resolve_task(word)]
    for task in tasks:
        if tasks.count(task) > 1:
            raise InputError(f"task {task} is given {tasks.count(task)} times in {names!r}: name it once")
    return tuple(tasks)


def check_horizon(horizon: int) -> None:
    """Refuse a number of steps that an episode cannot have.

    Raises:
        InputError: `horizon` is below 1 or above metaworld's limit of 500.
    """
    check_number("horizon", horizon, at_least=1, at_most=MAX_HORIZON, whole=True)
