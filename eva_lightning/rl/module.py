"""A Decision Transformer as a plain LightningModule: mean squared error, AdamW, warm-up and cosine decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from eva_lightning.checkpoint_io import save_sealed
from eva_lightning.errors import DamagedFileError, InputError, MissingInputError, check_number, unknown
from eva_lightning.files import replacing
from eva_lightning.optim.parameter_groups import linear_weights, parameter_groups
from eva_lightning.optim.schedules import set_per_step, warmup_cosine
from eva_lightning.reading import reading
from eva_lightning.rl.decision_transformer import DecisionTransformer, Normalisation, token_mask
from eva_lightning.sealed import damage
from eva_lightning.torch_files import load_plain

Batch = Mapping[str, Tensor]

#: Hyper-parameters that say what the weights are for; a checkpoint cannot be used with others.
ARCHITECTURE = ("state_dim", "action_dim", "width", "layers", "heads", "positions", "max_timesteps")
NORMALISATION = ("state_mean", "state_std", "return_scale", "reward_scale")
#: Hyper-parameters that change what weights mean, and that earlier checkpoints lack.
CONVENTIONS = ("action_tanh", "state_first", "exact_gelu")
#: Bounds of the actions, which earlier checkpoints lack too: all of theirs are in [-1, 1].
BOUNDS = {"action_low": -1.0, "action_high": 1.0}


class DecisionTransformerModule(L.LightningModule):
    """Predicts the action of every step of a window of a trajectory; trained on the mean squared error.

    A batch is a mapping with ``states`` ``(B, K, state_dim)``, ``actions`` ``(B, K, action_dim)``, ``rewards``,
    ``returns_to_go`` and ``timesteps`` ``(B, K)``, in raw units, ``mask`` ``(B, K)`` (True for real steps, which come
    first) and, for targets other than ``actions``, ``target_actions``. Nothing here depends on adapters. Every
    argument is a hyper-parameter, so a checkpoint is complete. The defaults are the paper's (section E.2).

    Logged: ``train_loss`` per step; ``val_loss/<task>`` (by the batch's ``task`` index) and their mean ``val_loss``.

    Example::

        data = TrajectoryDataModule("data/metaworld", MT40)
        module = DecisionTransformerModule(**data.statistics)
        L.Trainer(max_steps=1_000_000, precision="bf16-mixed").fit(module, data)

    Args:
        state_mean, state_std: Statistics of the pre-training data's states; None standardises nothing.
        state_dim, action_dim, width, layers, heads, context, dropout, positions, max_timesteps: See
            :class:`~eva_lightning.rl.decision_transformer.DecisionTransformer`.
        return_scale, reward_scale: Returns-to-go and rewards are divided by these.
        lr: Peak learning rate.
        weight_decay: AdamW's weight decay, on every trained parameter, or on weights of linear layers alone.
        warmup_steps: Steps of linear warm-up; at most a tenth of all steps, so that short runs have a decay.
        min_lr: Learning rate after the last step.
        gradient_clip: Largest norm of the gradient, where the trainer is given none; None for no clipping.
        action_tanh, state_first, exact_gelu, decay_weights_only: See :class:`~eva_lightning.rl.protocol.Protocol`.
        action_low, action_high: Bounds of the actions; None for -1 and 1. The network sees and predicts, and the loss
            compares, actions scaled to [-1, 1]; those of batches, of ``forward`` and of policies are as the bounds say.
        target_return: Return that rollouts ask for where they are given none; None for no such.

    Attributes:
        lr_multipliers: From a parameter's name in this module to a factor on its learning rate, or None. For methods to
            set before ``fit`` (LoRA+ trains B faster than A).

    Raises:
        InputError: A value is out of range.
    """

    def __init__(
        self,
        state_mean: Sequence[float] | None = None,
        state_std: Sequence[float] | None = None,
        state_dim: int = 39,
        action_dim: int = 4,
        width: int = 512,
        layers: int = 4,
        heads: int = 8,
        context: int = 50,
        dropout: float = 0.2,
        positions: str = "global",
        max_timesteps: int = 500,
        return_scale: float = 1000.0,
        reward_scale: float = 10.0,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 4000,
        min_lr: float = 1e-6,
        gradient_clip: float | None = 0.25,
        action_tanh: bool = False,
        state_first: bool = False,
        exact_gelu: bool = False,
        decay_weights_only: bool = False,
        action_low: Sequence[float] | None = None,
        action_high: Sequence[float] | None = None,
        target_return: float | None = None,
    ) -> None:
        super().__init__()
        # plain floats: checkpoints are opened with weights_only=True
        state_mean = [0.0] * state_dim if state_mean is None else [float(value) for value in state_mean]
        state_std = [1.0] * state_dim if state_std is None else [float(value) for value in state_std]
        if not len(state_mean) == len(state_std) == state_dim:
            raise InputError(
                f"state_mean and state_std must have {state_dim} values, got {len(state_mean)} and {len(state_std)}"
            )
        action_low, action_high = (_floats(bound, action_dim) for bound in (action_low, action_high))
        if target_return is not None:
            check_number("target_return", target_return)
        check_number("lr", lr, above=0)
        check_number("min_lr", min_lr, at_least=0, at_most=lr)
        check_number("weight_decay", weight_decay, at_least=0)
        check_number("warmup_steps", warmup_steps, at_least=0, whole=True)
        if gradient_clip is not None:
            check_number("gradient_clip", gradient_clip, above=0)
        self.save_hyperparameters()
        self.lr, self.weight_decay, self.min_lr = lr, weight_decay, min_lr
        self.warmup_steps, self.gradient_clip = warmup_steps, gradient_clip
        self.decay_weights_only = decay_weights_only
        self.lr_multipliers: Callable[[str], float] | None = None
        self.normalisation = Normalisation(state_mean, state_std, return_scale, reward_scale, action_low, action_high)
        self.model = DecisionTransformer(
            state_dim, action_dim, width, layers, heads, context, dropout, positions, max_timesteps,
            action_tanh, state_first, exact_gelu,
        )  # fmt: skip
        self._validation: dict[int, MeanMetric] = {}

    @property
    def context(self) -> int:
        """Longest window, in steps."""
        return self.model.context

    @property
    def head_name(self) -> str:
        """Name of the output layer within this module."""
        return "model.predict_action"

    def embedding_names(self) -> tuple[str, ...]:
        """Names of the embedding layers, which the paper leaves without adapters ("all but the embedding layer")."""
        names = ("embed_return", "embed_state", "embed_action", "embed_reward")
        return tuple(f"model.{name}" for name in names)

    @staticmethod
    def mask_fn(batch: Batch) -> Tensor:
        """Which tokens count, ``(B, 4K)`` bool: EVA's ``mask_fn``, leaving padding out of the decomposition."""
        return token_mask(batch["mask"])

    def reset_parameters(self) -> None:
        """Draw new weights; the normalisation stays."""
        self.model.load_state_dict(type(self)(**self.hparams).model.state_dict())

    def forward(self, batch: Batch) -> Tensor:
        """Predicted actions ``(B, K, action_dim)`` of a batch in raw units."""
        return self.normalisation.raw_actions(self._predicted(batch))

    def _predicted(self, batch: Batch) -> Tensor:
        predicted: Tensor = self.model(
            self.normalisation.states(batch["states"]),
            self.normalisation.actions(batch["actions"]),
            self.normalisation.rewards(batch["rewards"]),
            self.normalisation.returns(batch["returns_to_go"]),
            batch["timesteps"],
            batch["mask"],
        )
        return predicted

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error over the real steps and the dimensions of the action, which are scaled to [-1, 1]."""
        squared, count = self._squared_errors(batch)
        return squared.sum() / count.sum().clamp(min=1)

    def _squared_errors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of each window: sum of squared errors and number of values, ``(B,)`` each."""
        mask = batch["mask"]  # (B, K)
        # in fp32 also where the network computes in bf16: its 8 bits are too few for small differences
        target = self.normalisation.actions(batch.get("target_actions", batch["actions"]))
        error = self._predicted(batch).float() - target.float()  # (B, K, action_dim)
        squared = (error.square() * mask.unsqueeze(-1)).sum(dim=(1, 2))  # (B,)
        return squared, mask.sum(dim=1) * error.shape[-1]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss = self.loss(batch)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch["mask"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start the means over."""
        self._validation = {}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add to the mean of each task."""
        squared, count = self._squared_errors(batch)
        tasks = batch.get("task")
        if tasks is None:
            tasks = torch.full_like(count, dataloader_idx)
        for index in tasks.unique().tolist():
            if index not in self._validation:
                self._validation[index] = running_mean(self.device)
            chosen, values = squared[tasks == index].double(), count[tasks == index].double()
            self._validation[index].update(chosen / values.clamp(min=1), values)

    def on_validation_epoch_end(self) -> None:
        """Log the loss of each task and their mean."""
        names = getattr(getattr(self.trainer, "datamodule", None), "tasks", ())
        losses = {}
        for index, mean in sorted(self._validation.items()):
            name = names[index] if index < len(names) else str(index)
            losses[f"val_loss/{name}"] = mean.compute().float()
        if losses:
            self.log_dict(losses)
            self.log("val_loss", torch.stack(list(losses.values())).mean(), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the trainable parameters and a learning rate set per step."""
        total = int(self.trainer.estimated_stepping_batches)
        warmup = min(self.warmup_steps, total // 10)
        decays = linear_weights(self) if self.decay_weights_only else None
        groups = parameter_groups(
            self.named_parameters(), self.lr, self.weight_decay, multipliers=[self.lr_multipliers], decays=decays
        )
        optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay)
        lowest = self.min_lr / self.lr
        return set_per_step(optimizer, lambda step: warmup_cosine(step, warmup, total, lowest))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the trainer's value, else by this module's ``gradient_clip``."""
        value = self.gradient_clip if gradient_clip_val is None else gradient_clip_val
        if value is not None:
            self.clip_gradients(optimizer, value, gradient_clip_algorithm or "norm")

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, **overrides: Any) -> DecisionTransformerModule:
        """A module with the weights of `checkpoint` and, unless overridden, its hyper-parameters.

        Args:
            checkpoint: A checkpoint of a trainer or of :func:`save_weights`.
            overrides: Hyper-parameters of the training to come (``lr``, ``dropout``, ...). Architecture and
                normalisation may be named to be checked; a shorter ``context`` takes the first places of the window.

        Raises:
            MissingInputError: There is no such file.
            InputError: The file is no checkpoint of a Decision Transformer, or one of another architecture,
                normalisation or shorter context; or an override has no such name.
        """
        found = read_checkpoint(checkpoint)
        hparams, weights = dict(found["hyper_parameters"]), dict(found["state_dict"])
        _check_overrides(checkpoint, hparams, overrides)
        module = cls(**{**hparams, **overrides})
        positions = "model.embed_position.weight"
        if positions in weights:
            weights[positions] = weights[positions][: module.model.embed_position.num_embeddings]
        expected = module.state_dict()
        wrong = sorted(
            name for name in {*expected, *weights}
            if name not in expected or name not in weights or expected[name].shape != weights[name].shape
        )  # fmt: skip
        if wrong:
            raise InputError(
                f"{checkpoint} is of another architecture: {len(wrong)} of its weights are missing, unknown or of "
                f"another shape, such as {wrong[0]}"
            )
        module.load_state_dict(weights)
        return module


#: Hyper-parameters that earlier checkpoints lack, as they were then.
_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys((*CONVENTIONS, "decay_weights_only"), False),
    **dict.fromkeys((*BOUNDS, "target_return")),
}


def running_mean(device: torch.device) -> MeanMetric:
    """A weighted mean in double precision, which a NaN makes NaN: torchmetrics would leave it out by default."""
    mean = MeanMetric(nan_strategy=math.nan).to(device)
    mean.set_dtype(torch.float64)  # after moving it, which would take it back to single precision
    return mean


def _check_overrides(checkpoint: str | Path, hparams: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    known = {**_DEFAULTS, **hparams}
    for name, value in overrides.items():
        if name not in known:
            raise InputError(unknown("hyper-parameter", name, known))
        if name in (*ARCHITECTURE, *CONVENTIONS) and value != known[name]:
            raise InputError(f"{checkpoint} is of another architecture: {name} must be {known[name]}, got {value}")
        if name in NORMALISATION and not _close(value, hparams[name]):
            raise InputError(
                f"{checkpoint} is of another normalisation: its {name} must be used when fine-tuning, "
                f"expected {_short(hparams[name])}, got {_short(value)}"
            )
        if name in BOUNDS and not _close(*(_bound(name, given, known) for given in (value, known[name]))):
            raise InputError(f"{checkpoint} is of other actions: its {name} is {known[name]}, got {value}")
        if name == "context" and value > hparams[name]:
            raise InputError(
                f"context must be at most the {hparams[name]} steps of {checkpoint}'s training, got {value}"
            )


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """What a checkpoint of a :class:`DecisionTransformerModule` holds, on the CPU.

    Raises:
        MissingInputError: There is no such file.
        InputError: It is damaged, or no such checkpoint.
    """
    if not Path(file).is_file():
        raise MissingInputError(f"there is no checkpoint {file}: make one with eva-lightning metaworld pretrain")
    with reading(file):
        reason = damage(Path(file))
        if reason is not None:
            raise DamagedFileError(
                f"{file} is damaged or no checkpoint ({reason}): take another copy, or make it again"
            )
        found = load_plain(file)
    needed = {"context", *ARCHITECTURE, *NORMALISATION}
    hparams = found.get("hyper_parameters") if isinstance(found, dict) else None
    if not isinstance(hparams, dict) or not needed <= set(hparams) or "state_dict" not in found:
        raise InputError(f"{file} is no checkpoint of a Decision Transformer: its hyper-parameters are not in it")
    return found


def save_weights(
    module: DecisionTransformerModule,
    file: str | Path,
    dtype: torch.dtype = torch.float32,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint with weights and hyper-parameters alone, that ``from_pretrained`` and ``load_from_checkpoint``
    open: a third of the size of a trainer's, a sixth in float16.

    Args:
        module: The module, without adapters (merge them first).
        file: Where to write; replaced in one go.
        dtype: Precision of the weights in the file; reading gives fp32.
        about: Where the weights come from, as plain values; kept in the file under ``"about"``.

    Returns:
        The file.
    """
    content = {
        "state_dict": {name: value.detach().cpu().to(dtype) for name, value in module.state_dict().items()},
        "hyper_parameters": dict(module.hparams),
        "about": dict(about or {}),
        "pytorch-lightning_version": L.__version__,
    }
    with replacing(file) as temporary:
        save_sealed(content, temporary)
    return Path(file)


def _floats(values: Sequence[float] | None, size: int) -> list[float] | None:
    """Plain floats, `size` of them."""
    if values is not None and len(values) != size:
        raise InputError(f"action_low and action_high must have {size} values, got {len(values)}")
    return None if values is None else [float(value) for value in values]


def _bound(name: str, values: Sequence[float] | None, known: Mapping[str, Any]) -> Sequence[float]:
    return [BOUNDS[name]] * known["action_dim"] if values is None else values


def _close(first: Any, second: Any) -> bool:
    a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (first, second))
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def _short(value: Any) -> str:
    if isinstance(value, Sequence):
        return "[" + ", ".join(f"{number:.3g}" for number in value[:3]) + (", ...]" if len(value) > 3 else "]")
    return f"{value:g}"
