"""Which weights are updated how fast: groups, LAMB, and the learning rate over time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

from amradio.errors import OptionError

_BLOCK = re.compile(r"(?:^|[a-z_]\.)blocks\.(\d+)\.")  # of a transformer, not of a stage among several
_EMBEDDING = re.compile(r"(?:^|\.)patch_generator\.")  # whose network may have blocks of its own
_HEAD = re.compile(r"(?:^|\.)adaptors\.")
_TOKENS_AND_POSITIONS = ("token", "pos_embed")


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Group parameters for an optimiser.

    Norms, biases, scales (everything with fewer than two axes), tokens and position embeddings are not decayed.

    Args:
        named_parameters: Of the student; frozen ones are left out.
        weight_decay: Of all other parameters.
        layer_decay: Factor of the learning rate from one block to the one before it; the embedding counts as one more
            block below the first, and what follows the last block, heads included, learns at the full rate. None: no
            difference.

    Returns:
        Groups with ``params``, ``weight_decay`` and ``lr_scale``, the factor of the learning rate, in the order in
        which their first parameters come.

    Raises:
        OptionError: There is nothing to train, a number is out of range, or there are no blocks to tell apart.
    """
    if not weight_decay >= 0 or not (layer_decay is None or 0 < layer_decay <= 1):
        raise OptionError(
            f"Weight decay must be at least 0 and layer decay in (0, 1], got {weight_decay} and {layer_decay}."
        )
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    if not named:
        raise OptionError("There is nothing to train: no parameter requires a gradient.")
    depth = 1 + max((block for name, _ in named if (block := _block(name)) is not None), default=-1)
    if layer_decay is not None and not depth:
        raise OptionError("Layer decay needs a transformer with blocks; this student has none that can be trained.")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named:
        decay = 0.0 if _is_free(name, parameter) else weight_decay
        scale = 1.0 if layer_decay is None else layer_decay ** (depth - _layer(name, depth))
        group = groups.setdefault((decay, scale), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


def learning_rate(step: int, *, base: float, warmup: int, total: int, floor: float = 0.0) -> float:
    """The learning rate of a step: a linear warm-up, then half a cosine.

    Args:
        step: From 0.
        base: Peak, reached in step ``warmup - 1``.
        warmup: Steps of the warm-up.
        total: Steps in all.
        floor: Rate of the last step, and of any later one.

    Returns:
        The rate.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    progress = min((step - warmup) / max(total - 1 - warmup, 1), 1.0)
    return floor + (base - floor) * (1 + math.cos(math.pi * progress)) / 2


class Lamb(torch.optim.Optimizer):
    """LAMB: Adam whose updates are scaled to the norm of the weights, for large batches.

    You et al. 2020 (arXiv 1904.00962), algorithm 2, with bias correction and φ the identity. As is common practice,
    parameters without weight decay (norms, biases, tokens) take plain Adam steps. Works on sharded parameters (DTensor)
    too: norms are those of the whole weights.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay of the running mean of gradients and of their squares.
        eps: Added to the root of the latter.
        weight_decay: Of groups that do not have their own.

    Raises:
        OptionError: A number is out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        if not (lr >= 0 and eps > 0 and weight_decay >= 0 and all(0 <= b < 1 for b in betas)):
            raise OptionError(
                f"LAMB needs lr and weight_decay of at least 0, eps above 0 and betas in [0, 1), got lr={lr}, "
                f"weight_decay={weight_decay}, eps={eps}, betas={betas}."
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: Computes the loss anew.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None  # the caller has checked
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        n, (beta1, beta2) = state["step"].item(), group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square / (1 - beta2**n)).sqrt_().add_(group["eps"])
        update = (mean / (1 - beta1**n)).div_(root)
        if group["weight_decay"]:
            update.add_(parameter, alpha=group["weight_decay"])
            update.mul_(_trust(_norm(parameter), _norm(update)))
        parameter.add_(update, alpha=-group["lr"])


def _norm(x: Tensor) -> Tensor:
    """L2 norm of a whole tensor, sharded or not."""
    norm: Any = torch.linalg.vector_norm(x)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[no-any-return]


def _trust(weight: Tensor, update: Tensor) -> Tensor:
    """The ratio of the norms; 1 where one of them is 0."""
    return torch.where((weight > 0) & (update > 0), weight / update, torch.ones_like(weight))


def _is_free(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is not decayed."""
    last = name.rsplit(".", 1)[-1]
    return parameter.ndim < 2 or any(word in last for word in _TOKENS_AND_POSITIONS)


def _block(name: str) -> int | None:
    """The number of the block that a parameter is in; None outside of the trunk's blocks."""
    if _EMBEDDING.search(name) or _HEAD.search(name):
        return None
    found = _BLOCK.search(name)
    return None if found is None else int(found.group(1))


def _layer(name: str, depth: int) -> int:
    """Where a parameter is: -1 for the embedding, the block's number, `depth` for what follows."""
    if _EMBEDDING.search(name):
        return -1
    block = _block(name)
    return depth if block is None else block
