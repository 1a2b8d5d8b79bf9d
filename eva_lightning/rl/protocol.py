"""Conventions of a Decision Transformer that its sizes do not say, as one table of named fields.

The EVA paper builds its Meta-World half on the code of Schmied et al., "Learning to Modulate pre-trained Models in RL"
(``ml-jku/L2M`` on GitHub), and does not print these conventions; file names below are of that repository. Programs read
the fields and never the name, so that a protocol of one's own is ``dataclasses.replace(L2M, ...)``. Neither torch nor
the simulator is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eva_lightning.errors import InputError, check_choice


@dataclass(frozen=True)
class Protocol:
    """How a network is built and trained beyond its sizes; the defaults are this project's.

    Attributes:
        name: What ``--protocol`` calls it.
        action_tanh: The action head ends in tanh, so that actions lie in (-1, 1). L2M: yes
            (``src/algos/models/online_decision_transformer_model.py``, ``setup_policy``, by the default of the
            ``DecisionTransformerConfig`` of transformers).
        return_scale: Returns-to-go are divided by this. L2M: 200 (``configs/env_params/mt50_pretrain.yaml``).
        reward_scale: Rewards are divided by this. L2M: the same number
            (``src/algos/decision_transformer_sb3.py``, ``sample_batch``).
        standardise: States are standardised by the pre-training data. L2M: no (``norm_obs: False``; its buffers keep
            no statistics unless asked).
        state_first: A step's tokens are state, return-to-go, action, reward. L2M: yes (``construct_inputs_and_masks``).
            The action is read from the second token, which has seen both, in either order.
        exact_gelu: GELU itself in place of its approximation by tanh. L2M: yes (``activation_function: gelu``).
        decay_weights_only: Weight decay on weights of linear layers alone: not on biases, LayerNorm, embedding tables
            and single parameters such as DoRA's magnitudes. L2M: yes (``get_optim_groups``). A and B of LoRA are
            linear layers in PEFT, and are decayed.
        differences: What L2M does otherwise than this project under this protocol, one sentence each.
    """

    name: str
    action_tanh: bool = False
    return_scale: float = 1000.0
    reward_scale: float = 10.0
    standardise: bool = True
    state_first: bool = False
    exact_gelu: bool = False
    decay_weights_only: bool = False
    differences: tuple[str, ...] = ()

    @property
    def module_options(self) -> dict[str, Any]:
        """The fields that :class:`~eva_lightning.rl.module.DecisionTransformerModule` takes."""
        names = ("action_tanh", "return_scale", "reward_scale", "state_first", "exact_gelu", "decay_weights_only")
        return {name: getattr(self, name) for name in names}

    def state_statistics(self, statistics: Mapping[str, Any]) -> dict[str, Any]:
        """``state_mean`` and ``state_std`` for the module: those of the data, or nothing."""
        return dict(statistics) if self.standardise else {}


DEFAULT = Protocol("default")

#: What ``ml-jku/L2M`` does otherwise than this project under :data:`L2M`.
_L2M_DIFFERENCES = """
positions: L2M adds an embedding of the episode's time step before the first LayerNorm, and its flag for global
positions adds the table of places to it; the EVA paper says global position embedding, and --positions global is
that table alone

windows: L2M draws the first step of a window, so that windows at an episode's end are short, and pads on the left;
here the last step is drawn, windows at the start are short, and padding is on the right

learning rate: after the warm-up L2M's cosine has the period of all steps, so that training ends before its minimum;
here min_lr is reached at the last step. L2M's own fine-tuning has no warm-up and no decay

precision: L2M trains in fp16 with a scaled loss; here it is bf16-mixed on a GPU and fp32 on a CPU, or --precision

loss: L2M's released configurations train on discretised actions by cross-entropy; the EVA paper minimises the mean
squared error, which is also L2M's loss for continuous actions, and is taken here

target return: L2M has a table of target returns by task; here it is the largest return of the training episodes at
hand, as the EVA paper says

evaluation: in L2M's code every episode after the first begins with a state of zeros in place of its first
observation, and every episode draws a goal of its own; here there are 50 numbered goals. L2M evaluates in 10
episodes: --eval-episodes 10

simulator: metaworld at commit 18118a2 with MuJoCo 2.0 there, metaworld 3 with reward version v2 here
"""

L2M = Protocol(
    name="l2m",
    action_tanh=True,
    return_scale=200.0,
    reward_scale=200.0,
    standardise=False,
    state_first=True,
    exact_gelu=True,
    decay_weights_only=True,
    differences=tuple(" ".join(each.split()) for each in _L2M_DIFFERENCES.split("\n\n")),
)

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in (DEFAULT, L2M)}


def get_protocol(name: str) -> Protocol:
    """The protocol called `name`.

    Raises:
        InputError: No such protocol; names the nearest.
    """
    check_choice("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def conventions_of(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a protocol as the hyper-parameters of a checkpoint have them.

    Hyper-parameters that a checkpoint was written without have their defaults.
    """
    found = {name: hparams.get(name, value) for name, value in DEFAULT.module_options.items()}
    means, deviations = hparams.get("state_mean") or (), hparams.get("state_std") or ()
    plain = all(value == 0 for value in means) and all(value == 1 for value in deviations)
    return {**found, "standardise": not plain}


def protocol_of(hparams: Mapping[str, Any]) -> Protocol | None:
    """The protocol that a checkpoint's hyper-parameters are of, or None for one without a name.

    Whether states are standardised is not told by data whose states need none: it does not count against a protocol
    that standardises.
    """
    for protocol in PROTOCOLS.values():
        if not _contradictions(protocol, hparams):
            return protocol
    return None


def check_protocol(protocol: Protocol, hparams: Mapping[str, Any], checkpoint: str) -> None:
    """Make sure that a checkpoint is of `protocol`.

    Raises:
        InputError: It is not; names the first field that differs.
    """
    differing = _contradictions(protocol, hparams)
    if differing:
        name, there, here = differing[0]
        of = protocol_of(hparams)
        known = "a protocol without a name" if of is None else f"protocol {of.name}"
        raise InputError(
            f"{checkpoint} was pre-trained by {known}, and protocol={protocol.name} was asked for ({name} is {there} "
            f"there and {here} here): leave the option out, or pre-train with it",
            setting="protocol",
        )


def _contradictions(protocol: Protocol, hparams: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    found = conventions_of(hparams)
    wanted = {**protocol.module_options, "standardise": protocol.standardise}
    differing = [(name, found[name], value) for name, value in wanted.items() if found[name] != value]
    return [each for each in differing if each[0] != "standardise" or not protocol.standardise]
