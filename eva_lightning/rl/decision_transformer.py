"""The Decision Transformer: trajectories as sequences of returns, states, actions and rewards, actions predicted.

Pure torch, without Lightning, adapters or environments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eva_lightning.errors import InputError, check_choice, check_number
from eva_lightning.rl.tasks import POSITIONS

#: Tokens of one step of a trajectory, in this order, or with the first two the other way round.
MODALITIES = ("return", "state", "action", "reward")
TOKENS_PER_STEP = len(MODALITIES)
#: The token at which the action is predicted: it has seen its step's return-to-go and state, in either order.
ACTING_TOKEN = 1

#: A dimension of the state that varies less than this is divided by this: goals and gripper fingers of a task may be
#: nearly constant, and dividing by their standard deviation would blow up noise.
MINIMUM_STD = 0.02
#: Normalised states are clipped to this: an unseen task may leave the range of the training tasks.
CLIP = 10.0


class Normalisation(nn.Module):
    """From raw units to what the network sees: standardised states, scaled returns and rewards, actions in [-1, 1].

    States become ``clip((s - mean) / max(std, 0.02), -10, 10)``. The statistics are not in the ``state_dict``: they are
    hyper-parameters of the module that owns this one.

    Args:
        state_mean: Mean of each dimension of the state, over the pre-training data.
        state_std: Standard deviation of each dimension.
        return_scale: Returns-to-go are divided by this.
        reward_scale: Rewards are divided by this.
        action_low, action_high: Bounds of each dimension of the action, which become -1 and 1; None where they are.

    Raises:
        InputError: The statistics or bounds differ in length, a scale is not above 0, or a bound is above its other.
    """

    state_mean: Tensor
    state_std: Tensor
    action_middle: Tensor | None
    action_half: Tensor | None

    def __init__(
        self,
        state_mean: Sequence[float],
        state_std: Sequence[float],
        return_scale: float = 1000.0,
        reward_scale: float = 10.0,
        action_low: Sequence[float] | None = None,
        action_high: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if len(state_mean) != len(state_std):
            raise InputError(
                f"state_mean and state_std must be of one length, got {len(state_mean)} and {len(state_std)}"
            )
        check_number("return_scale", return_scale, above=0)
        check_number("reward_scale", reward_scale, above=0)
        std = torch.tensor(list(state_std), dtype=torch.float32).clamp(min=MINIMUM_STD)
        self.register_buffer("state_mean", torch.tensor(list(state_mean), dtype=torch.float32), persistent=False)
        self.register_buffer("state_std", std, persistent=False)
        middle, half = _middle_and_half(action_low, action_high)
        self.register_buffer("action_middle", middle, persistent=False)
        self.register_buffer("action_half", half, persistent=False)
        self.return_scale = return_scale
        self.reward_scale = reward_scale

    def states(self, states: Tensor) -> Tensor:
        """Raw states ``(..., state_dim)``, standardised and clipped."""
        return ((states - self.state_mean) / self.state_std).clamp(-CLIP, CLIP)

    def returns(self, returns_to_go: Tensor) -> Tensor:
        """Raw returns-to-go, of any shape, scaled."""
        return returns_to_go / self.return_scale

    def rewards(self, rewards: Tensor) -> Tensor:
        """Raw rewards, of any shape, scaled."""
        return rewards / self.reward_scale

    def actions(self, actions: Tensor) -> Tensor:
        """Raw actions ``(..., action_dim)``, in [-1, 1] where they are within the bounds."""
        if self.action_middle is None or self.action_half is None:
            return actions
        return (actions - self.action_middle) / self.action_half

    def raw_actions(self, actions: Tensor) -> Tensor:
        """The inverse of :meth:`actions`."""
        if self.action_middle is None or self.action_half is None:
            return actions
        return actions * self.action_half + self.action_middle


def _middle_and_half(
    low: Sequence[float] | None, high: Sequence[float] | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Middle and half width of each interval; None for both where all are [-1, 1], which then costs nothing."""
    if low is None and high is None:
        return None, None
    if low is None or high is None or len(low) != len(high):
        raise InputError(f"action_low and action_high must be given together, of one length, got {low} and {high}")
    bounds = torch.tensor([list(low), list(high)], dtype=torch.float64)  # (2, action_dim)
    if not bounds.isfinite().all() or (bounds[0] > bounds[1]).any():
        raise InputError(f"action_low must be finite and at most action_high, got {list(low)} and {list(high)}")
    if (bounds[0] == -1).all() and (bounds[1] == 1).all():
        return None, None
    half = (bounds[1] - bounds[0]) / 2
    # a dimension that cannot move has any width
    return bounds.mean(dim=0).float(), half.masked_fill(half == 0, 1.0).float()


@dataclass
class KeyValueCache:
    """Keys and values of the tokens seen so far, for each layer.

    Attributes:
        keys, values: One tensor ``(B, heads, capacity, head_dim)`` per layer, filled from the left.
        length: Tokens filled in.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    length: int = 0

    def clear(self) -> None:
        """Forget every token; the memory stays."""
        self.length = 0


class Block(nn.Module):
    """A GPT-2 block: attention and a two-layer network, each behind a layer norm and beside a residual connection.

    Args:
        width: Features of a token.
        heads: Attention heads; divides `width`.
        dropout: Dropout on attention weights and on both residual branches.
        exact_gelu: GELU itself; GPT-2's approximation by tanh otherwise.
    """

    def __init__(self, width: int, heads: int, dropout: float, exact_gelu: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.gelu = "none" if exact_gelu else "tanh"
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, T, width)`` to tokens ``(B, T, width)``, each seeing itself and those before it."""
        q, k, v = self._heads(x)  # each (B, heads, T, head_dim)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, heads, T, head_dim)
        return self._rest(x, attended)

    def extend(self, x: Tensor, cache: KeyValueCache, layer: int, last_only: bool = False) -> Tensor:
        """:meth:`forward` of the tokens that follow those in `cache`, which takes in their keys and values.

        Args:
            x: New tokens ``(B, n, width)``.
            cache: Keys and values of the ``cache.length`` tokens before; its length is left for the caller to move on.
            layer: This block's place in the cache.
            last_only: Give the last token alone, ``(B, 1, width)``: all that is needed behind the last layer.
        """
        n, length = x.shape[1], cache.length
        q, k, v = self._last_query(x) if last_only else self._heads(x)  # (B, heads, 1 or n, head_dim)
        end = length + n
        if cache.keys:
            cache.keys[layer][:, :, length:end] = k
            cache.values[layer][:, :, length:end] = v
        if length:
            k, v = cache.keys[layer][:, :, :end], cache.values[layer][:, :, :end]  # (B, heads, length + n, head_dim)
        if last_only:
            x, attended = x[:, -1:], F.scaled_dot_product_attention(q, k, v)  # (B, heads, 1, head_dim)
        elif not length:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, n, head_dim)
        else:
            seen = torch.ones(n, end, dtype=torch.bool, device=x.device).tril(length)  # (n, length + n)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)  # (B, heads, n, head_dim)
        return self._rest(x, attended, acting=True)  # (B, 1 or n, width)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._split(self.qkv(self.norm1(x)), 3)  # each (B, heads, T, head_dim)
        return q, k, v

    def _last_query(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`_heads` with the query of the last token alone, ``(B, heads, 1, head_dim)``."""
        if type(self.qkv) is not nn.Linear:  # with an adapter around it, its weight is not all
            q, k, v = self._heads(x)
            return q[:, :, -1:], k, v
        x, (width, weight, bias) = self.norm1(x), (x.shape[-1], self.qkv.weight, self.qkv.bias)
        (q,) = self._split(F.linear(x[:, -1:], weight[:width], bias[:width]), 1)
        k, v = self._split(F.linear(x, weight[width:], bias[width:]), 2)
        return q, k, v

    def _split(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        """``(B, T, parts * width)`` to its parts by heads, each ``(B, heads, T, head_dim)``."""
        b, t, _ = projected.shape
        return projected.view(b, t, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def _rest(self, x: Tensor, attended: Tensor, acting: bool = False) -> Tensor:
        attended = attended.transpose(1, 2).reshape(x.shape)  # (B, heads, T, head_dim) -> (B, T, width)
        x = x + F.dropout(self.proj(attended), self.dropout, self.training)  # (B, T, width)
        hidden = self.fc1(self.norm2(x))  # (B, T, 4 width)
        quick = acting and self.gelu == "tanh" and not (hidden.is_cuda or torch.is_grad_enabled())
        hidden = _quick_gelu(hidden) if quick else F.gelu(hidden, approximate=self.gelu)  # (B, T, 4 width)
        return x + F.dropout(self.fc2(hidden), self.dropout, self.training)  # (B, T, width)


def _quick_gelu(x: Tensor) -> Tensor:
    """GPT-2's approximation ``x (1 + tanh(u)) / 2``, ``u = sqrt(2 / pi) (x + 0.044715 x^3)``, as ``x sigmoid(2 u)``.

    On a CPU it takes less than half the time of torch's. Without gradients.
    """
    slope = 2 * math.sqrt(2 / math.pi)
    gate = torch.addcmul(x.new_full((), slope), x, x, value=0.044715 * slope)  # 2 u / x
    return gate.mul_(x).sigmoid_().mul_(x)


class DecisionTransformer(nn.Module):
    """A GPT-2-like network that predicts a step's action from the returns-to-go, states, actions and rewards so far.

    A step is four tokens, in the order return-to-go, state, action, reward, each embedded by a linear layer of its own;
    the action is read off the second token, which has seen the whole past but not its own action. Padding follows the
    real steps, so the causal mask alone keeps it from them: no other mask is needed, and flash attention serves
    wherever torch has it. Inputs are normalised already (:class:`Normalisation`).

    Positions: the paper says "global position embedding". In the code of Schmied et al., which the paper builds on, the
    flag of that name (``global_pos_embds``) turns on GPT-2's own table, one learned vector per place of a *token* in
    the sequence, so in the context window; without it every token gets place 0. It is a flag besides the embedding of
    the episode's time step (Chen et al.), which its released configurations use, the flag being off in them.
    ``"global"`` is the former alone, the default here; ``"timestep"`` is the latter alone, one vector per step of the
    episode, shared by its four tokens. The former does not depend on the time of the episode, so every place was
    trained.

    Size: the paper's architecture has 12,741,124 parameters here: 12,609,536 of them in the four blocks, the paper's
    "12M" (Table 24). Its other figure, "16M" (section E.2), is not the size of four layers of width 512; with the
    larger tables of Schmied et al. (1,024 places, 1,000 time steps) it would be 13.7M.

    Example::

        model = DecisionTransformer(state_dim=39, action_dim=4)
        actions = model(states, actions, rewards, returns_to_go, timesteps)  # (B, K, 4)

    Args:
        state_dim: Length of a state.
        action_dim: Length of an action.
        width: Features of a token.
        layers: Number of blocks.
        heads: Attention heads; divides `width`.
        context: Longest window, in steps; a step is four tokens.
        dropout: Dropout on embeddings, attention weights and residual branches.
        positions: ``"global"`` (place of the token in the window) or ``"timestep"`` (step of the episode).
        max_timesteps: Steps of the longest episode; used by ``"timestep"``.
        action_tanh, state_first, exact_gelu: See :class:`~eva_lightning.rl.protocol.Protocol`.

    Raises:
        InputError: A size is below 1, `heads` does not divide `width`, or `dropout` is not in [0, 1).
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        width: int = 512,
        layers: int = 4,
        heads: int = 8,
        context: int = 50,
        dropout: float = 0.2,
        positions: str = "global",
        max_timesteps: int = 500,
        action_tanh: bool = False,
        state_first: bool = False,
        exact_gelu: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "state_dim": state_dim, "action_dim": action_dim, "width": width, "layers": layers, "heads": heads,
            "context": context, "max_timesteps": max_timesteps,
        }  # fmt: skip
        for name, size in sizes.items():
            check_number(name, size, at_least=1, whole=True)
        if width % heads:
            raise InputError(f"heads must divide width {width}, got {heads}")
        check_number("dropout", dropout, at_least=0, below=1)
        check_choice("positions", positions, POSITIONS)
        self.state_dim, self.action_dim = state_dim, action_dim
        self.width, self.heads, self.context, self.dropout = width, heads, context, dropout
        self.positions = positions
        self.action_tanh, self.state_first = action_tanh, state_first
        self.embed_return = nn.Linear(1, width)
        self.embed_state = nn.Linear(state_dim, width)
        self.embed_action = nn.Linear(action_dim, width)
        self.embed_reward = nn.Linear(1, width)
        self.embed_norm = nn.LayerNorm(width)
        self.embed_position = nn.Embedding(TOKENS_PER_STEP * context if positions == "global" else max_timesteps, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, exact_gelu) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.predict_action = nn.Linear(width, action_dim)
        self._initialise()

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                # GPT-2's: what adds to the residual stream starts smaller the more layers add to it
                residual = name.endswith(("proj", "fc2"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * len(self.blocks)) if residual else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        states: Tensor,
        actions: Tensor,
        rewards: Tensor,
        returns_to_go: Tensor,
        timesteps: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Predicted action of every step of windows of ``K <= context`` steps.

        Args:
            states: ``(B, K, state_dim)``, normalised.
            actions: ``(B, K, action_dim)``; a step's own action has no influence on its prediction.
            rewards: ``(B, K)``, normalised.
            returns_to_go: ``(B, K)``, normalised.
            timesteps: ``(B, K)`` step of the episode; needed for ``positions="timestep"``.
            mask: ``(B, K)``, True for the real steps, which come first. Predictions of the others are 0.

        Returns:
            ``(B, K, action_dim)``.

        Raises:
            InputError: The window is longer than the context.
        """
        x = self.embed_steps(states, actions, rewards, returns_to_go)  # (B, K, 4, width)
        x = self.place(x.flatten(1, 2), timesteps)  # (B, 4K, width)
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)  # (B, 4K, width)
        predicted = self._action(x[:, ACTING_TOKEN::TOKENS_PER_STEP])  # (B, K, action_dim)
        return predicted if mask is None else predicted * mask.unsqueeze(-1)

    def embed_steps(self, states: Tensor, actions: Tensor, rewards: Tensor, returns_to_go: Tensor) -> Tensor:
        """Tokens ``(B, K, 4, width)`` of ``K`` steps, not yet placed."""
        known = (
            self.embed_return(returns_to_go.unsqueeze(-1)),  # (B, K) -> (B, K, width)
            self.embed_state(states),  # (B, K, state_dim) -> (B, K, width)
        )
        tokens = (
            *(known[::-1] if self.state_first else known),
            self.embed_action(actions),  # (B, K, action_dim) -> (B, K, width)
            self.embed_reward(rewards.unsqueeze(-1)),  # (B, K) -> (B, K, width)
        )
        embedded: Tensor = self.embed_norm(torch.stack(tokens, dim=2))  # (B, K, 4, width)
        return embedded

    def _action(self, x: Tensor) -> Tensor:
        """From tokens ``(..., width)`` behind the last block to actions ``(..., action_dim)``."""
        predicted: Tensor = self.predict_action(self.norm(x))
        return torch.tanh(predicted) if self.action_tanh else predicted

    def place(self, tokens: Tensor, timesteps: Tensor | None = None, start: int = 0) -> Tensor:
        """Add the position embedding to `tokens` ``(B, T, width)``, the first of which is token `start` of the window.

        Raises:
            InputError: The window is longer than the context, or time steps are needed and not given.
        """
        end = start + tokens.shape[1]
        if end > TOKENS_PER_STEP * self.context:
            raise InputError(f"a window must have at most {self.context} steps, got {-(-end // TOKENS_PER_STEP)}")
        if self.positions == "global":
            return tokens + self.embed_position.weight[start:end]  # (B, T, width) + (T, width)
        if timesteps is None:
            raise InputError("a model with positions='timestep' needs the timesteps of the window")
        steps = timesteps.repeat_interleave(TOKENS_PER_STEP, dim=1)[:, start % TOKENS_PER_STEP :]  # (B, at least T)
        placed: Tensor = tokens + self.embed_position(steps[:, : tokens.shape[1]])  # (B, T, width)
        return placed

    def new_cache(self, batch_size: int) -> KeyValueCache:
        """An empty cache for `batch_size` windows, of the model's device and precision."""
        weight = self.norm.weight  # a layer that no adapter wraps
        shape = (batch_size, self.heads, TOKENS_PER_STEP * self.context, self.width // self.heads)
        make = [torch.empty(shape, device=weight.device, dtype=weight.dtype) for _ in range(2 * len(self.blocks))]
        return KeyValueCache(make[::2], make[1::2])

    def act(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Action predicted at the last of the placed `tokens` ``(B, T, width)``, a step's second: ``(B, action_dim)``.

        Equal to :meth:`forward` in evaluation mode at that token, with less work: behind the attention of the last
        layer there is only one token left.

        Args:
            tokens: What follows the tokens in `cache`, or the whole window.
            cache: Takes in the new tokens; None for none.
        """
        past = KeyValueCache() if cache is None else cache
        x = tokens
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x = block.extend(x, past, layer, last_only=layer == len(self.blocks) - 1)
        past.length += tokens.shape[1]
        return self._action(x[:, -1])  # (B, width) -> (B, action_dim)

    def training_flops(self, batch_size: int, steps: int | None = None) -> float:
        """Floating-point operations of one training step (forward and backward), as model FLOP utilisation counts them.

        Six per weight and token (embeddings and head at the tokens they see) and ``12 * T * width`` per layer and token
        for attention over ``T`` tokens, the causal half not taken off.

        Args:
            batch_size: Windows per step.
            steps: Steps of a window; the context for None.
        """
        k = self.context if steps is None else steps
        tokens = k * TOKENS_PER_STEP
        per_block = 12 * self.width**2
        ends = self.width * (self.state_dim + 2 * self.action_dim + 2)  # the four embeddings and the head
        attention = 12 * len(self.blocks) * tokens * self.width
        per_window = tokens * (6 * len(self.blocks) * per_block + attention) + k * 6 * ends
        return float(batch_size * per_window)


def token_mask(mask: Tensor) -> Tensor:
    """Mask of steps ``(B, K)`` to mask of tokens ``(B, 4K)``, as the layers of the blocks see them."""
    return mask.repeat_interleave(TOKENS_PER_STEP, dim=1)
