"""What Lightning learns from us when it is imported, before or after ``import eva_lightning``.

Lightning offers no place to say that checkpoints with adapters need their module prepared: between building a module
from its hyper-parameters and loading its weights, ``load_from_checkpoint`` asks only the user's class. So
``LightningModule.load_from_checkpoint`` itself is wrapped, in both copies of Lightning, without importing either:
``import eva_lightning`` must not cost the seconds that Lightning takes. What Gymnasium learns from
:mod:`eva_lightning.rl`, the names of its environments, waits in the same way (:func:`after`).
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Loading:
    """``LightningModule.load_from_checkpoint`` that puts adapters in where the checkpoint says that it has some.

    Args:
        original: Lightning's, which also refuses to be called on an instance.
    """

    def __init__(self, original: Any) -> None:
        self.original = original

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        load: Callable[..., Any] = self.original.__get__(instance, owner)

        @functools.wraps(load)
        def load_from_checkpoint(*args: Any, **kwargs: Any) -> Any:
            if instance is not None:
                return load(*args, **kwargs)
            from eva_lightning.checkpoint import load_with

            return load_with(load, owner, *args, **kwargs)

        return load_from_checkpoint


def _wrap_loading(module: ModuleType) -> None:
    original = vars(module.LightningModule)["load_from_checkpoint"]
    if not isinstance(original, Loading):
        module.LightningModule.load_from_checkpoint = Loading(original)


def _join_callbacks(module: ModuleType) -> None:
    ours: Any = sys.modules.get("eva_lightning.callback_base")
    if hasattr(ours, "join"):  # not while it is being imported
        ours.join()


_ACTIONS: dict[str, Callable[[ModuleType], None]] = {
    "lightning.pytorch.core.module": _wrap_loading,
    "pytorch_lightning.core.module": _wrap_loading,
    "pytorch_lightning.callbacks.callback": _join_callbacks,
}


class _AfterImport(MetaPathFinder):
    """Finds nothing itself; has modules that others find run their action once they are imported."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in _ACTIONS:
            return None
        action = _ACTIONS.pop(fullname)  # this also keeps the search below from ending here again
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            action(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Act on what is imported, and on the rest when it is."""
    for name in [name for name in _ACTIONS if hasattr(sys.modules.get(name), "__file__")]:
        _ACTIONS.pop(name)(sys.modules[name])
    if _ACTIONS and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def after(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call `action` with the module `name` once it is imported: at once, or whenever that will be."""
    _ACTIONS[name] = action
    install()
