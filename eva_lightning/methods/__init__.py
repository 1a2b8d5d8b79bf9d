"""Fine-tuning methods: one table (:mod:`~eva_lightning.methods.registry`), and what each does to a module.

:func:`eva_lightning.methods.apply.apply_method` prepares a module; it is not imported here, as it needs torch.
"""

from __future__ import annotations

from eva_lightning.methods.registry import METHODS, Method, MethodKey, method_names

__all__ = ["METHODS", "Method", "MethodKey", "method_names"]
