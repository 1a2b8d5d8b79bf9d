"""Adapters out of a module, as a folder that stock PEFT reads."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eva_lightning.adapters.adalora import is_adalora
from eva_lightning.adapters.adapter_layer import AdapterLayer
from eva_lightning.adapters.attention import AttentionOutputLayer
from eva_lightning.adapters.base_weight_init import INITIAL_A, INITIAL_B
from eva_lightning.adapters.column_dora import is_normed_by_column
from eva_lightning.adapters.export_check import ROOT, check_export, plain_name
from eva_lightning.adapters.injection import bypassed_by_fast_path
from eva_lightning.adapters.merge import check_merge, merged_copy
from eva_lightning.adapters.model_card import CARD, check_base_model, is_edited, model_card
from eva_lightning.adapters.registry import describe_layers, find_adapters, lora_layers
from eva_lightning.adapters.weight_reads import refuse_read_elsewhere
from eva_lightning.errors import InputError
from eva_lightning.files import filling

CONFIG = "adapter_config.json"
"""The file by which PEFT knows an adapter folder."""

VERIFY_UP_TO = 2**28
"""Parameters of the largest model that :func:`save_pretrained` verifies unless told: 268 million."""

_IN_THE_BASE_WEIGHT = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    verify: bool | None = None,
    example: Any = None,
    *,
    base_model: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write the adapters and all else that training changed in ``model`` as a PEFT adapter folder.

    ``PeftModel.from_pretrained(base, directory)`` on a freshly built ``model`` without adapters then computes what
    ``model`` computes. Pass the network itself (``module.net``), not the LightningModule around it, to get names that
    fit the bare network. PiSSA, MiLoRA, OLoRA, CorDA and LoRA-GA, which have taken a part of the base weight away, go
    in as plain LoRA of twice the rank: the change since their start.

    Layers that trained in full go in as ``modules_to_save``. Where PEFT could not tell such a layer from another by its
    name, and for single parameters, biases and buffers (statistics), the file holds the values themselves: PEFT writes
    them into the base model, and ``disable_adapter`` does not take them out. Adapters that stock PEFT would not run as
    they ran here go in merged, as whole layers: those that torch's fused ``nn.TransformerEncoderLayer`` reads past in
    eval mode, those of a layer that stands under several names, and DoRA with norms per input column.

    Args:
        model: a module that contains LoRA layers, with or without a PeftModel around it.
        directory: created if missing; ``adapter_config.json`` and ``adapter_model.safetensors`` are replaced.
        verify: load the folder with stock PEFT into a copy of the base model first, and compare every layer and every
            tensor with ``model``; ``None``: for models of up to 268 million parameters. The copy shares the memory of
            frozen weights.
        example: an input of ``model``, to compare whole outputs too; a tuple holds several arguments, a mapping those
            by name.
        base_model: what the adapters were trained on, by its name on the Hugging Face hub, such as
            ``"timm/vit_base_patch14_dinov2.lvd142m"``. It goes into ``adapter_config.json``, and a model card
            (``README.md``: method, rho, r, ranks, how to load it) is written; one that somebody edited stays.
        about: more rows for that card, such as ``{"data": "2,000 photographs of birds", "accuracy": "91.2%"}``.

    Returns:
        The directory; :func:`eva_lightning.hub.push_to_hub` uploads it.

    Raises:
        InputError: ``about`` without ``base_model``, there are no LoRA layers, they come from several LoraConfigs, a
            value is NaN or infinite or on the meta device, or stock PEFT cannot load what is written or computes
            something else with it; says why. Nothing is written then.
    """
    from peft import PeftModel

    if base_model is not None:
        base_model = check_base_model(base_model)
    elif about is not None:
        raise InputError("about is for the model card, which base_model asks for: give both, or neither")
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    model = getattr(model, "_orig_mod", model)
    export = _Export.of(model)
    if base_model is not None:
        export.config.base_model_name_or_path = base_model
        if not is_edited(Path(directory) / CARD):
            export.card = model_card(model, export.layers[0].config, export.layers, base_model, about)
    if verify is None:
        verify = example is not None or sum(p.numel() for p in model.parameters()) <= VERIFY_UP_TO
    if export.merged:
        warnings.warn(
            f"layers {sorted(export.merged)} are saved as whole layers with their adapters merged: stock PEFT would "
            "not run these adapters (torch's fused encoder layer, a layer under several names, or DoRA by columns)",
            stacklevel=2,
        )
    with filling(directory, last=CONFIG) as temporary:
        export.write(temporary)
        if verify:
            check_export(model, temporary, export.layers, example)
    return Path(directory)


@dataclass
class _Export:
    """What is going to be written.

    Attributes:
        config: the LoraConfig.
        layers: all LoRA layers.
        merged: plain names of those that go in as whole layers.
        tensors: by name in the file.
        card: the model card; empty for none.
    """

    config: Any
    layers: list[AdapterLayer]
    merged: set[str]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    card: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> _Export:
        layers = lora_layers(model)
        if not find_adapters(model) and not is_adalora(model):
            raise InputError(f"{type(model).__name__} has no LoRA layers to save")
        if len({id(layer.config) for layer in layers}) > 1:
            raise InputError("the LoRA layers come from several LoraConfigs; save each PeftModel on its own")
        _refuse_kinds(layers)
        export = cls(copy.deepcopy(layers[0].config), layers, set(_not_as_lora(model, layers)))
        export._add_layers(model)
        export._add_the_rest(model)
        export._refuse_values()
        return export

    def write(self, folder: Path) -> None:
        tensors = {k: t.detach().cpu().contiguous().clone() for k, t in self.tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        self.config.save_pretrained(str(folder))
        if self.card:
            (folder / CARD).write_text(self.card, encoding="utf-8")

    def _add_layers(self, model: nn.Module) -> None:
        config = self.config
        adapted = [layer for layer in self.layers if not self._is_merged(layer)]
        moved = any(hasattr(layer.module, INITIAL_A) for layer in self.layers)
        names = [plain_name(name) for name, _ in model.named_modules(remove_duplicate=False)]
        describe_layers(config, [(plain_name(layer.path), layer) for layer in adapted], names)
        if is_adalora(model):
            config.rank_pattern = None  # AdaLoRA's are masks; the ranks it gave up are zeros in E
        elif moved:
            _double(config)
        if not adapted:
            config.target_modules = "dummy-target-modules"  # PEFT's word for none
        # the file holds A and B: PEFT must not initialise them again on loading; targets are whole names
        config.init_lora_weights, config.inference_mode = True, True
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        for layer in adapted:
            weights = layer.module.state_dict()
            for name, tensor in (_as_plain_lora(weights, layer) if moved else weights).items():
                if name.startswith("lora_") and f".{layer.adapter}" in name:
                    key = name.replace(f".{layer.adapter}", "", 1)
                    self.tensors[f"{ROOT}{plain_name(layer.path)}.{key}"] = tensor

    def _add_the_rest(self, model: nn.Module) -> None:
        """Whole modules under names that PEFT finds, and single values."""
        whole: dict[str, Mapping[str, Tensor]] = {}
        for layer in self.layers:
            if self._is_merged(layer) and not isinstance(layer, AttentionOutputLayer):
                whole |= dict.fromkeys(_names_of(model, layer.module), _merged_weights(layer))
        trained, loose = _changed_outside(model, self.layers, self.merged)
        whole |= {name: m.state_dict() for name, m in trained.items()}
        self.tensors |= {f"{ROOT}{name}": tensor for name, tensor in loose.items()}
        self.tensors |= _token_deltas(model)
        names = list(_loaded_names(model, self.merged))
        targets = [plain_name(layer.path) for layer in self.layers if not self._is_merged(layer)]
        found = {name for name in whole if _is_found(name, names, targets)}
        self.config.modules_to_save = sorted(found) or None
        for name, weights in whole.items():
            self.tensors |= {f"{ROOT}{name}.{key}": tensor for key, tensor in weights.items()}

    def _is_merged(self, layer: AdapterLayer) -> bool:
        return _attention_name(layer) in self.merged

    def _refuse_values(self) -> None:
        for name, tensor in self.tensors.items():
            where = f"{name.removeprefix(ROOT)!r} cannot be saved: it"
            if tensor.device.type == "meta":
                raise InputError(f"{where} is on the meta device, without values")
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise InputError(
                    f"{where} has NaN or infinite values, as after a diverged run; go back to an earlier checkpoint"
                )


def _refuse_kinds(layers: list[AdapterLayer]) -> None:
    """What the folder of a plain LoRA cannot express."""
    config = layers[0].config
    start = config.init_lora_weights
    moved = any(hasattr(layer.module, INITIAL_A) for layer in layers)
    if isinstance(start, str) and start.startswith(_IN_THE_BASE_WEIGHT) and not moved:
        raise InputError(
            f"init_lora_weights={start!r} took a part of the base weights that is not known here; save with "
            "PeftModel.save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for name in ("layer_replication", "target_parameters"):
        if getattr(config, name, None):
            raise InputError(f"LoraConfig's {name} cannot be saved; use PeftModel.save_pretrained")


def _not_as_lora(model: nn.Module, layers: list[AdapterLayer]) -> Iterator[str]:
    """Plain names of layers whose adapter stock PEFT would not run as it runs here."""
    bypassed = bypassed_by_fast_path(model)
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    for layer in layers:
        several = places[id(layer.module)] > 1 and not isinstance(layer, AttentionOutputLayer)
        if id(layer.module) in bypassed or several or is_normed_by_column(layer):
            yield _attention_name(layer)


def _attention_name(layer: AdapterLayer) -> str:
    """The layer's name; of an attention's output projection, the attention's."""
    path = plain_name(layer.path)
    return path.removesuffix(".base_layer.out_proj") if isinstance(layer, AttentionOutputLayer) else path


def _merged_weights(layer: AdapterLayer) -> dict[str, Tensor]:
    refuse_read_elsewhere(layer, "nor can stock PEFT run it as a LoRA layer; keep a Lightning checkpoint")
    merged = merged_copy(layer)
    check_merge(layer, merged)
    held = {plain_name(name).replace("base_layer.", "") for name in layer.base.state_dict()}
    weights = merged.state_dict()
    if not held >= set(weights):
        raise InputError(
            f"layer {layer.name!r} cannot be saved: stock PEFT would not run its adapter, and its weight is computed, "
            "so that it cannot go in merged; call merge_and_unload and save the whole module"
        )
    dtypes = {name: tensor.dtype for name, tensor in layer.base.state_dict().items()}
    default = next(iter(dtypes.values()))
    return {name: tensor.to(dtypes.get(name, default)) for name, tensor in weights.items()}


def _names_of(model: nn.Module, module: nn.Module) -> list[str]:
    return [plain_name(name) for name, m in model.named_modules(remove_duplicate=False) if m is module]


def _double(config: Any) -> None:
    """Twice every rank, with the same scaling."""
    factor = 2**0.5 if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: factor * alpha for name, alpha in config.alpha_pattern.items()}


def _as_plain_lora(weights: Mapping[str, Tensor], layer: AdapterLayer) -> dict[str, Tensor]:
    """``B A - B0 A0`` as one product ``[B, -B0] [A; A0]``."""
    a, b = f"lora_A.{layer.adapter}.weight", f"lora_B.{layer.adapter}.weight"
    return {
        **weights,
        a: torch.cat([weights[a], weights[INITIAL_A]]),
        b: torch.cat([weights[b], -weights[INITIAL_B]], dim=1),
    }


def _loaded_names(model: nn.Module, merged: set[str]) -> Iterator[str]:
    """Names of the modules that PEFT walks when it looks for those to save: adapters are in already."""
    for path, _ in model.named_modules(remove_duplicate=False):
        name = plain_name(path)
        owner = next((m for m in merged if name.startswith(f"{m}.")), None)
        if owner is None:
            yield name
        elif not re.search(r"\.lora_\w+(\.|$)", inner := name.removeprefix(owner)):
            yield owner + inner.replace(".base_layer", "")


def _is_found(name: str, names: list[str], targets: list[str]) -> bool:
    """Whether PEFT takes ``name`` in ``modules_to_save`` for that module only, and still adapts all targets.

    It takes every module whose name ends so, and keeps adapters away from whatever the name matches as a regular
    expression.
    """
    try:
        pattern = re.compile(rf"(^|.*\.){name}($|\..*)")
    except re.error:
        return False
    ends_alike = [n for n in set(names) if n.endswith(name)]
    return ends_alike == [name] and not any(pattern.match(target) for target in targets)


def _changed_outside(
    model: nn.Module, layers: list[AdapterLayer], merged: set[str]
) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Modules that trained in full, and single trained parameters and buffers besides, by their plain names."""
    adapters = {id(p) for layer in layers for n, p in layer.module.named_parameters() if "base_layer" not in n}
    inside = {id(m) for layer in layers for n, m in layer.module.named_modules() if ".lora_" in f".{n}"}
    whole: dict[str, nn.Module] = {}
    loose: dict[str, Tensor] = {}
    for path, m in _own_modules(model):
        name = plain_name(path)
        own = {k: p for k, p in m.named_parameters(recurse=False) if id(p) not in adapters}
        trained = {k: p for k, p in own.items() if p.requires_grad}
        buffers = {k: b for k, b in m._buffers.items() if b is not None and k not in m._non_persistent_buffers_set}
        buffers = {k: b for k, b in buffers.items() if k not in (INITIAL_A, INITIAL_B) and id(m) not in inside}
        norm = isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None
        if name and not name.endswith("base_layer") and (norm or (trained and len(trained) == len(own) and _leaf(m))):
            whole[name] = m
        elif not any(name == x or name.startswith(f"{x}.") for x in merged):
            loose |= {f"{name}.{k}" if name else k: t for k, t in (trained | buffers).items()}
    return whole, loose


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, without the untrained originals that PEFT keeps beside those it trains, and its token deltas."""
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    hidden: list[str] = []
    for path, m in model.named_modules():
        if isinstance(m, TrainableTokensWrapper):
            hidden.append(path)
        elif isinstance(m, AuxiliaryTrainingWrapper):
            hidden.append(f"{path}.original_module")
        if not any(path == h or path.startswith(f"{h}.") for h in hidden):
            yield path, m


def _token_deltas(model: nn.Module) -> dict[str, Tensor]:
    """New values of single tokens (``trainable_token_indices``)."""
    from peft.utils.other import TrainableTokensWrapper

    return {
        f"{ROOT}{plain_name(path)}.{key}": tensor
        for path, m in model.named_modules()
        if isinstance(m, TrainableTokensWrapper)
        for key, tensor in m.adapter_state_dict(m.active_adapters[0], m.state_dict()).items()
    }


def _leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None
