"""Put LoRA layers into any module in place, and take them out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import UninitializedParameter

from eva_lightning.adapters.adapter_layer import AdapterLayer
from eva_lightning.adapters.base_weight_init import (
    INITIALISATIONS,
    capped,
    remember_start,
    start_at,
    takes_from_base,
)
from eva_lightning.adapters.column_dora import norm_by_column
from eva_lightning.adapters.lora_options import DEFAULT_ALPHA, DEFAULT_RANK
from eva_lightning.adapters.quantised import announce_quantisation
from eva_lightning.adapters.registry import (
    CONFIG_ATTRIBUTE,
    OWN_ADAPTER,
    find_adapters,
    lora_layers,
    replace_everywhere,
    replace_stale_configs,
    sync_configs,
    unwrap_empty,
)
from eva_lightning.adapters.supported_layers import is_linear
from eva_lightning.adapters.targets import choose_layers, language_model_heads
from eva_lightning.errors import InputError, check_choice
from eva_lightning.side_effects import isolated_rng

INJECTION = "_eva_lightning_injection"
"""Where a module keeps the :class:`Injection` of adapters that nobody has initialised yet."""

Bias = Literal["none", "all", "lora_only"]


@dataclass
class Injection:
    """What :func:`inject` did, and how to take it back.

    Attributes:
        targets: names of the adapted layers.
        head: names of the output layers that train.
        frozen_head: names of output layers that are neither adapted nor trained: those that were frozen, and a language
            model's unless asked for.
        left_frozen: names of layers that got no adapter because they were frozen while others trained.
        trainable_before, trainable_after: numbers of trainable parameters.
    """

    targets: list[str]
    head: list[str]
    trainable_before: int
    trainable_after: int
    frozen_head: list[str] = field(default_factory=list)
    left_frozen: list[str] = field(default_factory=list)
    # an attention's output projection too, which PEFT adapts with it
    _bases: list[nn.Module] = field(repr=False, default_factory=list)
    _requires_grad: list[tuple[nn.Parameter, bool]] = field(repr=False, default_factory=list)
    # PEFT's MultiheadAttention replaces the weights it adapts by new parameters
    _attention_parameters: list[tuple[nn.Module, dict[str, Any]]] = field(repr=False, default_factory=list)
    _fast_paths: list[tuple[nn.Module, str, Any]] = field(repr=False, default_factory=list)
    # PiSSA, MiLoRA, OLoRA and AILoRA move a part of the base weight into the adapter
    _weights: list[tuple[nn.Parameter, Tensor]] = field(repr=False, default_factory=list)
    _stale_configs: list[tuple[Any, dict[str, Any]]] = field(repr=False, default_factory=list)

    def is_in(self, module: nn.Module) -> bool:
        """Whether the layers are still there: not merged, and not gone with the network they were in."""
        return any(hasattr(m, CONFIG_ATTRIBUTE) for m in module.modules())

    def undo(self, module: nn.Module) -> None:
        """Put the base layers and every ``requires_grad`` flag back: the module is what it was before."""
        bases = {id(base) for base in self._bases}
        # by what they hold, not by our mark: an interruption may come before they have it
        for layer in [m for m in module.modules() if hasattr(m, "lora_A")]:
            base = layer.get_base_layer()  # type: ignore[operator]
            if id(base) in bases:
                replace_everywhere(module, layer, base)
        for parameter, weight in self._weights:
            parameter.data = weight
        for owner, parameters in self._attention_parameters:
            owner._parameters.clear()
            owner._parameters.update(parameters)
        for parameter, flag in self._requires_grad:
            parameter.requires_grad_(flag)
        for layer_module, name, value in self._fast_paths:
            setattr(layer_module, name, value)
        for group, configs in self._stale_configs:
            group.clear()
            group.update(configs)


def inject(
    module: nn.Module,
    r: int = DEFAULT_RANK,
    alpha: float = DEFAULT_ALPHA,
    target_modules: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    head: str | Sequence[str] | None = "auto",
    bias: Bias = "none",
    initialisation: str = "lora",
    keep_function: bool = False,
    adalora: Mapping[str, Any] | None = None,
    adapt_frozen: bool = False,
    dora_by_column: bool = False,
    **lora_options: Any,
) -> Injection:
    """Give ``module`` LoRA layers in place (A random, B = 0), freeze the rest, leave head and biases trainable.

    The module keeps its class and its function. The random state is not touched beyond what A needs, and that is
    isolated: the global generators are as before.

    Args:
        module: any module without adapters.
        r: rank of every adapter; capped at the layer's input width.
        alpha: LoRA's alpha.
        target_modules: layers to adapt; ``None`` means every linear layer but the output head. Convolutions and
            nn.MultiheadAttention can be named; see :func:`eva_lightning.adapters.choose_layers`.
        exclude: layers, or modules with all layers in them, to leave alone; they are frozen like the rest.
        head: the output layers; see :func:`eva_lightning.adapters.find_head`. Those that are named train, those that
            "auto" finds keep their trainability; of these a language model's projection onto its vocabulary is frozen:
            it is pre-trained, and often tied.
        bias: "none", "all" (every bias in the module trains) or "lora_only" (those of adapted layers).
        initialisation: "lora" (A random, B = 0), or one that moves ``alpha/r B A`` out of the base weight, so that the
            function stays, for linear layers only: "pissa" (the top singular directions of the base weight), "milora"
            (its least ones), "olora" (its first columns after a QR decomposition), "ailora" (the top directions of an
            attention's queries, the least ones of its values). With "gaussian" A is normal of standard deviation 1/r,
            with "orthonormal" its rows are random and orthonormal; with "orthogonal" neither A nor B is zero, but
            their product is; r is even. Those from data ("corda", "lora-ga", ...) start like "lora" and wait for
            :class:`eva_lightning.methods.data_driven.DataDrivenStart`.
        keep_function: have initialisations that would move the function take B A out of the base weight too.
        adalora: AdaLoRA layers (``B diag(E) A``, E = 0), and these arguments for PEFT's AdaLoraConfig; ``r`` is the
            rank they start with.
        adapt_frozen: adapt layers that are frozen also where other layers than the head train; by default a frozen
            teacher or tower is left alone there. Where all but the head is frozen, it is adapted either way.
        dora_by_column: DoRA with a frozen magnitude and norms per input column
            (:mod:`eva_lightning.adapters.column_dora`), instead of ``use_dora``.
        **lora_options: of PEFT's LoraConfig, such as ``use_dora``, ``use_rslora``, ``lora_dropout``, ``rank_pattern``.

    Raises:
        InputError: the module has adapters already or lazy layers without shapes, a name matches nothing, there is
            nothing to adapt, or the initialisation is unknown or not possible on a layer.
    """
    check_choice("initialisation", initialisation, INITIALISATIONS)
    start, takes = INITIALISATIONS[initialisation], takes_from_base(initialisation, keep_function)
    if find_adapters(module):
        raise InputError(f"{type(module).__name__} has LoRA layers already; inject() is for modules without them")
    unwrap_empty(module)
    _refuse_lazy(module)
    choice = choose_layers(module, target_modules, exclude, head, adapt_frozen)
    targets, heads = choice.targets, choice.head
    if initialisation != "lora" or adalora is not None:
        for name in targets:
            if not is_linear(module.get_submodule(name)):
                kind = initialisation if adalora is None else "adalora"
                raise InputError(f"{kind} adapts linear layers only, but {name!r} is not one; leave it out")
    frozen = [h for h in heads if h in language_model_heads(module)] if head == "auto" else []
    heads = [h for h in heads if h not in frozen]
    requires_grad = [(p, p.requires_grad) for p in module.parameters()]
    attentions = [m for m in module.modules() if isinstance(m, nn.MultiheadAttention)]
    attention_parameters: list[tuple[nn.Module, dict[str, Any]]] = [
        (m, dict(m._parameters)) for a in attentions for m in (a, a.out_proj)
    ]
    adapted = [module.get_submodule(name) for name in targets]
    bases = [m for base in adapted for m in (base, getattr(base, "out_proj", None)) if m is not None]
    injection = Injection(
        targets, heads, count_trainable(module), 0, frozen, choice.left_frozen, bases, requires_grad,
        attention_parameters,
    )  # fmt: skip
    options = {
        name: _below_holder(value) if name.endswith("_pattern") else value for name, value in lora_options.items()
    }
    if initialisation != "lora":
        patterns = capped(module, targets, initialisation, r, alpha, bool(options.get("use_rslora")))
        options |= {"init_lora_weights": start.peft, **patterns}
        weights: list[Any] = [module.get_submodule(name).weight for name in targets]
        _refuse_weights(dict(zip(targets, weights, strict=True)), initialisation)
        if takes and not start.from_data:
            injection._weights = [(w, w.data.clone()) for w in weights]
    try:
        config = _inject(module, targets, r, alpha, options, adalora)
        injection._stale_configs = replace_stale_configs(module, config)
        layers = {layer.name: layer for layer in lora_layers(module) if hasattr(layer.module, CONFIG_ATTRIBUTE)}
        flags = dict(_named_flags(module, requires_grad))
        _set_trainable(module, layers, heads, bias, flags, named_head=head != "auto")
        for layer in layers.values():
            layer.config.bias = bias
            if start.make is not None:
                start_at(layer, *start.make(layer), takes)
            elif takes:
                remember_start(layer)
            elif adalora is None and layer.rank > layer.in_features:
                layer.resize(layer.in_features)
            if dora_by_column:
                norm_by_column(layer)
        sync_configs(module)
        injection._fast_paths = fast_paths(module)
        for owner, name, value in injection._fast_paths:
            setattr(owner, name, type(value)(0))  # 0 or False
        injection.trainable_after = count_trainable(module)
        still = [h for h in heads if not any(p.requires_grad for p in module.get_submodule(h).parameters())]
        injection.head = [h for h in heads if h not in still]
        injection.frozen_head = [*frozen, *still]
        return injection
    except BaseException:
        injection.undo(module)
        raise


def _refuse_lazy(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise InputError(
                f"parameter {name!r} of a lazy layer has no shape yet; run one batch through {type(module).__name__} "
                "before fit"
            )


def fast_paths(module: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """What lets torch's fused encoder bypass adapters in eval mode: modules, each with an attribute and its value.

    ``nn.TransformerEncoderLayer`` reads ``linear1.weight`` directly when it runs without gradients, so an adapter
    on it would train and then be ignored by validation without a word.
    """
    adapted = {id(layer.module) for layer in find_adapters(module).values()}
    found: list[tuple[nn.Module, str, Any]] = []
    for m in module.modules():
        if not any(id(x) in adapted for x in m.modules()):
            continue
        if isinstance(m, nn.TransformerEncoderLayer):
            found.append((m, "activation_relu_or_gelu", m.activation_relu_or_gelu))
        elif isinstance(m, nn.TransformerEncoder) and hasattr(m, "use_nested_tensor"):
            found.append((m, "use_nested_tensor", m.use_nested_tensor))
    return found


def bypassed_by_fast_path(module: nn.Module) -> set[int]:
    """Ids of the LoRA layers that torch's fused encoder reads past in eval mode where nothing keeps it from it."""
    return {
        id(x)
        for m in module.modules()
        if isinstance(m, nn.TransformerEncoderLayer) and _can_be_fused(m)
        for x in m.modules()
        if hasattr(x, "lora_A")
    }


def _can_be_fused(layer: nn.TransformerEncoderLayer) -> bool:
    """The conditions of its ``forward`` that do not depend on the input."""
    attention: Any = layer.self_attn
    return (
        attention.batch_first
        and attention.in_proj_bias is not None
        and attention._qkv_same_embed_dim
        and attention.num_heads % 2 == 0
        # activation_relu_or_gelu is what inject sets
        and (layer.activation in (F.relu, F.gelu) or isinstance(layer.activation, (nn.ReLU, nn.GELU)))
        and getattr(layer.norm1, "eps", None) == getattr(layer.norm2, "eps", None)
    )


class _Holder(nn.Module):
    """A parent for the module, so that PEFT meets exact names and no attributes it might misread (``config``)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def _below_holder(pattern: Mapping[str, Any]) -> dict[str, Any]:
    """A ``rank_pattern`` or ``alpha_pattern``, whose keys may be anchored at the module, for one below a holder."""
    return {f"^module\\.{key[1:]}" if key.startswith("^") else key: value for key, value in pattern.items()}


def _inject(
    module: nn.Module,
    targets: list[str],
    r: int,
    alpha: float,
    options: Mapping[str, Any],
    adalora: Mapping[str, Any] | None,
) -> Any:
    from peft import AdaLoraConfig, LoraConfig, inject_adapter_in_model

    holder = _Holder(module)
    announce_quantisation(holder)
    # alpha: annotated int, used as a number and saved as JSON
    shared: dict[str, Any] = {"lora_alpha": alpha, "target_modules": [f"module.{name}" for name in targets], **options}
    config = LoraConfig(r=r, **shared) if adalora is None else AdaLoraConfig(init_r=r, **shared, **adalora)
    modes = {id(m): m.training for m in module.modules()}
    with isolated_rng(), warnings.catch_warnings():
        # PEFT corrects this for each layer by its type, and says so
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        inject_adapter_in_model(config, holder, adapter_name=OWN_ADAPTER)
    for m in module.modules():
        if id(m) not in modes:
            m.training = module.training
    for m in module.modules():
        if hasattr(m, "lora_A"):
            m.train(modes[id(m.get_base_layer())])  # type: ignore[operator]
            setattr(m, CONFIG_ATTRIBUTE, config)
            m.register_forward_pre_hook(_accept_keyword, with_kwargs=True)
    _adapt_aliases(module)
    return config


def _refuse_weights(weights: Mapping[str, Tensor], initialisation: str) -> None:
    """A base weight that is to give up a part, or whose gradient is read, must be whole, and of one layer only."""
    owners: dict[int, str] = {}
    start = INITIALISATIONS[initialisation]
    if not start.uses:
        return
    does = f"{initialisation} {start.uses} the base weight"
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise InputError(
                f"{does}, but that of {name!r} is quantised ({weight.dtype}); use lora, or weights in full precision"
            )
        owner = owners.setdefault(id(weight), name)
        if owner != name and not start.even:
            raise InputError(f"{does}, but {owner!r} and {name!r} share theirs; leave one of them out")


def _adapt_aliases(module: nn.Module) -> None:
    """A layer that stands under several names gets its adapter under all of them; PEFT sees the first only."""
    adapted = {id(m.get_base_layer()): m for m in module.modules() if hasattr(m, "lora_A")}  # type: ignore[operator]
    for parent in module.modules():
        for name, child in list(parent._modules.items()):
            if id(child) in adapted and not hasattr(parent, "lora_A"):
                setattr(parent, name, adapted[id(child)])


def _accept_keyword(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Let callers of the layer keep saying ``layer(input=x)``: PEFT's forward calls that argument ``x``."""
    if args or "input" not in kwargs:
        return None
    return (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}


def _set_trainable(
    module: nn.Module,
    layers: dict[str, AdapterLayer],
    heads: list[str],
    bias: Bias,
    before: dict[str, bool],
    named_head: bool,
) -> None:
    """Of what was there before: biases as asked for and the head train on if they did, a head that was named does."""
    adapted = {f"{layer.path}.base_layer.bias" for layer in layers.values()}
    everything = list(module.named_parameters(remove_duplicate=False))  # a tied head is named where it is tied to
    of_heads = {id(p) for n, p in everything if any(n.startswith(f"{h}.") for h in heads)}
    for name, parameter in module.named_parameters():
        if name not in before:
            continue
        in_head = id(parameter) in of_heads
        is_bias = name == "bias" or name.endswith(".bias")
        trains = in_head or (is_bias and (bias == "all" or (bias == "lora_only" and name in adapted)))
        on_request = in_head and named_head and parameter.is_floating_point()
        parameter.requires_grad_(on_request or (trains and before[name]))


def _named_flags(module: nn.Module, flags: list[tuple[nn.Parameter, bool]]) -> Iterable[tuple[str, bool]]:
    by_id = {id(p): flag for p, flag in flags}
    return ((n, by_id[id(p)]) for n, p in module.named_parameters() if id(p) in by_id)


def count_trainable(module: nn.Module) -> int:
    """Number of parameters that train."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
