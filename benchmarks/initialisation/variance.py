"""The reference for accuracy: plain hooks, full covariances, dense eigenvalues. Nothing of our engines."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.initialisation.runner import Batch, Outcome, Runner, autocast

TOP = 32


class Covariances:
    """Covariance of every token that reaches each layer, accumulated in fp64.

    Products of one minibatch are formed in fp64 up to width `double_dim` and in full-precision fp32 above, about the
    first minibatch's mean, where fp64 products would take minutes; sums over minibatches are fp64 always.
    """

    def __init__(self, layers: Mapping[str, nn.Module], double_dim: int = 512) -> None:
        self._layers = layers
        self._double_dim = double_dim
        self._shift: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}
        self._n: dict[str, int] = {}

    @torch.no_grad()
    def add(self, forward: Callable[[], Any]) -> None:
        """Run one minibatch with hooks on."""
        handles = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in self._layers.items()]
        try:
            forward()
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            with torch.autocast(args[0].device.type, enabled=False):
                self._update(name, args[0].detach().flatten(0, -2).double())

        return observe

    def _update(self, name: str, x: Tensor) -> None:
        if name not in self._n:
            self._n[name] = 0
            self._shift[name] = x.mean(dim=0)
            self._sum[name] = torch.zeros_like(self._shift[name])
            self._second[name] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        y = x - self._shift[name]
        self._n[name] += len(y)
        self._sum[name] += y.sum(dim=0)
        if x.shape[1] > self._double_dim:
            y = y.float()
        self._second[name] += y.T @ y

    def covariance(self, name: str) -> Tensor:
        """``Xc^T Xc`` of everything seen by layer `name`, fp64."""
        total = self._sum[name]
        return self._second[name] - torch.outer(total, total) / self._n[name]

    def captured(self, methods: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, dict[str, float]], float]:
        """Captured variance per method and layer, and the share of the variance in the top 32, median over layers.

        Captured: the variance in the span of a method's k components over that of the best k directions.
        """
        values: dict[str, dict[str, float]] = {method: {} for method in methods}
        shares = []
        for name in self._layers:
            if name not in self._n:
                continue
            covariance = self.covariance(name)
            spectrum = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
            shares.append(float(spectrum[:TOP].sum() / spectrum.sum().clamp_min(1e-300)))
            for method, components in methods.items():
                if name in components:
                    values[method][name] = captured_variance(covariance, spectrum, components[name])
        return values, statistics.median(shares)


def captured_variance(covariance: Tensor, spectrum: Tensor, components: Tensor) -> float:
    """``tr(V C V^T)`` for an orthonormal basis V of the rows of `components`, over the k largest eigenvalues' sum."""
    v = torch.linalg.qr(components.to(covariance).T).Q
    optimum = float(spectrum[: len(components)].sum())
    return float((v * (covariance @ v)).sum()) / optimum if optimum > 0 else 1.0


def add_captured_variance(
    rows: Sequence[dict[str, Any]],
    runner: Runner,
    targets: Sequence[str],
    outcomes: Mapping[str, Outcome],
    heldout: Sequence[Batch],
) -> float:
    """Add to the row of each method how much variance its components capture.

    Args:
        rows: One per method; get ``captured`` (of the minibatches the method streamed), ``heldout`` and both per layer.
        runner: Model and minibatches.
        targets: Names of the adapted layers.
        outcomes: Method -> its first run.
        heldout: Minibatches that no method streamed.

    Returns:
        The share of the streamed variance in the top 32 directions, median over layers.
    """
    layers, add = _measuring(runner, targets)

    def note(covariances: Covariances, names: Sequence[str], key: str) -> float:
        values, share = covariances.captured({name: outcomes[name].components for name in names})
        for row in rows:
            if row["name"] in values:
                per_layer = values[row["name"]]
                row[key] = {
                    "median": statistics.median(per_layer.values()),
                    "min": min(per_layer.values()),
                    "weakest_layer": min(per_layer, key=per_layer.__getitem__),
                }
                row[f"{key}_per_layer"] = per_layer
        return share

    covariances, share = Covariances(layers), 0.0
    due: dict[int, list[str]] = {}
    for name, outcome in outcomes.items():
        due.setdefault(outcome.n_batches, []).append(name)
    for n in range(1, max(due) + 1):
        add(covariances, runner.batches[(n - 1) % len(runner.batches)])
        if n in due:
            share = note(covariances, due[n], "captured")
    del covariances
    if heldout:
        unseen = Covariances(layers)
        for batch in heldout:
            add(unseen, batch)
        note(unseen, list(outcomes), "heldout")
    return share


def heldout_variance(
    runner: Runner,
    targets: Sequence[str],
    components: Mapping[str, Mapping[str, Tensor]],
    heldout: Sequence[Batch],
) -> dict[str, dict[str, float]]:
    """Captured variance of minibatches that no method saw: method -> layer -> share of the best as many directions.

    Args:
        runner: Model and device.
        targets: Names of the adapted layers.
        components: Method -> layer -> rows.
        heldout: Those minibatches.
    """
    layers, add = _measuring(runner, targets)
    unseen = Covariances(layers)
    for batch in heldout:
        add(unseen, batch)
    return unseen.captured(components)[0]


def _measuring(
    runner: Runner, targets: Sequence[str]
) -> tuple[dict[str, nn.Module], Callable[[Covariances, Batch], None]]:
    """The layers of a copy of the model, and what adds a minibatch to their covariances."""
    classifier, dtype = runner.bare_copy()
    classifier.eval()

    def add(covariances: Covariances, batch: Batch) -> None:
        with autocast(runner.device, runner.precision):
            covariances.add(lambda: classifier(batch[0].to(runner.device, dtype)))

    return {name: classifier.get_submodule(name) for name in targets}, add
