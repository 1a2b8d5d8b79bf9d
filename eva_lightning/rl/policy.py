"""A Decision Transformer as a policy: N environments in lock-step, batched calls at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eva_lightning.errors import InputError, check_choice, check_number
from eva_lightning.rl.decision_transformer import ACTING_TOKEN, TOKENS_PER_STEP, KeyValueCache
from eva_lightning.rl.module import DecisionTransformerModule
from eva_lightning.rl.tasks import MODES

Mode = Literal["exact", "streaming"]

#: Tokens of a step that are known when its action is wanted: return-to-go and state.
_KNOWN = ACTING_TOKEN + 1
#: Tokens that a CPU computes at a time: what passes between layers stays in its cache, which saves a tenth.
_TOKENS_PER_CALL = 768


class DecisionTransformerPolicy:
    """Acts on what the module predicts from the last steps, given the return that is still to be had.

    While the context fills, keys and values of earlier tokens are cached; that is the same function as the full
    forward pass. Once the window slides it no longer is: what a token holds in a deep layer depends on tokens that have
    left the window.

    - ``"exact"``: the window of the last `context` steps is recomputed at each step. Equal to the module's forward
      on that window. Embedded tokens are kept, and behind the last attention only one token is computed.
    - ``"streaming"``: a full cache is started over with the last half of the context, then grows again. Each action is
      the module's forward on the last ``context // 2 + 1`` to `context` steps: shorter windows than exact ones, but
      never keys that a shorter past or another place has made stale. About a quarter of the work.

    The module is used in evaluation mode, which is restored after each call; the return-to-go given at a step is the
    target minus the rewards so far.

    Example::

        policy = DecisionTransformerPolicy(module, n_environments=20, target_return=1585.0)
        actions = policy.act(observations)  # (20, 39) -> (20, 4)
        actions = policy.act(observations, rewards)

    Args:
        module: The module, with or without adapters.
        n_environments: Environments in lock-step.
        target_return: Return to ask for, one for all or one each.
        mode: ``"exact"`` or ``"streaming"``.
        context: Steps of the window; the module's for None.

    Raises:
        InputError: A value is out of range.
    """

    def __init__(
        self,
        module: DecisionTransformerModule,
        n_environments: int,
        target_return: float | Sequence[float] | npt.NDArray[np.float64],
        mode: Mode = "exact",
        context: int | None = None,
    ) -> None:
        context = module.context if context is None else context
        check_number("n_environments", n_environments, at_least=1, whole=True)
        check_choice("mode", mode, MODES)
        check_number("context", context, at_least=1, at_most=module.context, whole=True)  # the steps of training
        target = np.asarray(target_return, dtype=np.float64)
        if target.shape not in ((), (n_environments,)) or not np.isfinite(target).all():
            raise InputError(f"target_return must be one finite number or {n_environments}, got {target_return}")
        self.module = module
        self.n_environments = n_environments
        self.context = context
        self.mode = mode
        self._target = np.broadcast_to(target, (n_environments,))
        self._cache: KeyValueCache | None = None
        self._tokens = torch.empty(0)
        self.reset()

    def reset(self) -> None:
        """Forget the episodes: the next step is the first of new ones."""
        self._step = 0
        #: where the window starts, as a step of the episode
        self._start = 0
        self._returns_to_go = self._target.copy()
        self._action: Tensor | None = None

    def act(
        self, observations: npt.NDArray[np.floating], rewards: npt.NDArray[np.floating] | None = None
    ) -> npt.NDArray[np.float64]:
        """Actions for the environments' current observations.

        Args:
            observations: ``(N, state_dim)``.
            rewards: ``(N,)`` rewards of the actions given last; None at the first step.

        Returns:
            ``(N, action_dim)`` within the module's bounds, [-1, 1] unless it was given others.

        Raises:
            InputError: Rewards are missing or given at the first step, or the step is beyond those of training.
        """
        if (rewards is None) != (self._step == 0):
            expected = "are needed after the first step" if rewards is None else "must be None at the first step"
            raise InputError(f"rewards {expected} of an episode, at step {self._step}")
        model = self.module.model
        if model.positions == "timestep" and self._step >= model.embed_position.num_embeddings:
            raise InputError(
                f"an episode must have at most the {self._step} steps of the module's max_timesteps: give a horizon"
            )
        training = [part for part in self.module.modules() if part.training]
        if training:
            self.module.eval()
        try:
            with torch.inference_mode():
                self._append(observations, rewards)
                self._action = self._predict().clamp(-1.0, 1.0)
                raw = self.module.normalisation.raw_actions(self._action)
        finally:
            for part in training:
                part.training = True
        self._step += 1
        actions: npt.NDArray[np.float64] = raw.double().cpu().numpy()
        return actions

    def keep(self, environments: Sequence[int]) -> None:
        """Go on with some of the environments alone, in the given order: the others' episodes are over.

        Their number is `n_environments` from now on, until :meth:`reset` and after it.
        """
        self.n_environments = len(environments)
        self._target = self._target[list(environments)]
        self._returns_to_go = self._returns_to_go[list(environments)]
        with torch.inference_mode():
            rows = torch.as_tensor(environments, device=self._tokens.device)
            self._tokens = self._tokens[rows]
            self._action = None if self._action is None else self._action[rows]
            if self._cache is not None:
                self._cache.keys = [keys[rows] for keys in self._cache.keys]
                self._cache.values = [values[rows] for values in self._cache.values]

    def _append(self, observations: npt.NDArray[np.floating], rewards: npt.NDArray[np.floating] | None) -> None:
        """Embed what is new: action and reward of the last step, return-to-go and state of this one."""
        model, normalisation = self.module.model, self.module.normalisation
        device, dtype = model.norm.weight.device, model.norm.weight.dtype
        n = self.n_environments
        if self._step == 0:
            if self._cache is None:
                self._cache = model.new_cache(n)
                shape = (n, TOKENS_PER_STEP * self.context, model.width)
                self._tokens = torch.zeros(shape, device=device, dtype=dtype)
            self._cache.clear()
        elif self._step - self._start == self.context:
            self._slide()
        last_action = self._action
        if last_action is None or rewards is None:
            last_action, last_rewards = (
                torch.zeros(n, model.action_dim, device=device, dtype=dtype),
                torch.zeros(n, device=device, dtype=dtype),
            )
        else:
            self._returns_to_go -= rewards
            last_rewards = normalisation.rewards(torch.as_tensor(rewards, device=device, dtype=dtype))
        place = TOKENS_PER_STEP * (self._step - self._start)
        states = normalisation.states(torch.as_tensor(observations, device=device, dtype=torch.float32))
        returns = normalisation.returns(torch.as_tensor(self._returns_to_go, device=device, dtype=dtype))
        # one step of tokens whose first two are of this step and whose last two are of the one before
        tokens = model.embed_steps(
            states.to(dtype)[:, None], last_action[:, None], last_rewards[:, None], returns[:, None]
        )[:, 0]
        self._tokens[:, place : place + _KNOWN] = tokens[:, :_KNOWN]
        if place:
            self._tokens[:, place - (TOKENS_PER_STEP - _KNOWN) : place] = tokens[:, _KNOWN:]

    def _slide(self) -> None:
        """Make room for a step: move what stays in the window to its front."""
        assert self._cache is not None
        kept = self.context - 1 if self.mode == "exact" else self.context // 2
        tokens = TOKENS_PER_STEP * kept
        self._tokens[:, :tokens] = self._tokens[:, self._tokens.shape[1] - tokens :].clone()
        self._start = self._step - kept
        self._cache.clear()

    def _predict(self) -> Tensor:
        model, cache = self.module.model, self._cache
        assert cache is not None
        end = TOKENS_PER_STEP * (self._step - self._start) + _KNOWN
        # an exact window is recomputed once it slides: nothing to keep
        filling = self.mode == "streaming" or self._start == 0
        begin = cache.length if filling else 0
        steps = torch.arange(self._start, self._step + 1, device=self._tokens.device)[None]
        placed = model.place(self._tokens[:, begin:end], steps[:, begin // TOKENS_PER_STEP :], begin)
        if filling:
            return model.act(placed, cache)
        parts = 1 if placed.is_cuda else -(-placed.shape[0] * placed.shape[1] // _TOKENS_PER_CALL)
        return torch.cat([model.act(part) for part in placed.chunk(parts)])
