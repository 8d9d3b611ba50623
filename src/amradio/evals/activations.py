"""What goes into and comes out of attention and MLP layers, and how attention is spread: for a while, leaving no trace.

Layers are told by the names of their classes, and attention is seen where it is computed: in calls of
`torch.nn.functional.scaled_dot_product_attention`. So any network can be looked at; one that computes attention in
another way gives the statistics of its layers, but not those of its attention.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Kind = Literal["attention", "mlp"]

_KINDS: Mapping[Kind, re.Pattern[str]] = {
    "attention": re.compile(r"(attention|attn)\w*$", re.IGNORECASE),
    "mlp": re.compile(r"(mlp|swiglu|feedforward|ffn)\w*$", re.IGNORECASE),
}
_NOT_LAYERS = re.compile(r"(block|layer|stage|head|pool|norm|encoder|output|bias)\w*$|MlpV\d$", re.IGNORECASE)
_LOGITS_AT_ONCE = 2**24


class Range:
    """Statistics of tensors of one kind, added up batch by batch."""

    def __init__(self) -> None:
        self.count = 0
        self._tokens = 0
        self._low, self._high = math.inf, -math.inf
        self._sum = 0.0
        self._norms = 0.0
        self._medians: list[float] = []

    def update(self, values: Tensor) -> None:
        """Add a tensor [..., C]."""
        x = values.detach().float()
        if not x.numel():
            return
        self.count += x.numel()
        self._tokens += x.numel() // x.shape[-1]
        self._low, self._high = min(self._low, float(x.min())), max(self._high, float(x.max()))
        self._sum += float(x.sum(dtype=torch.float64 if x.device.type == "cpu" else torch.float32))
        self._norms += float(x.norm(dim=-1).sum())
        self._medians.append(float(x.median()))

    def values(self) -> dict[str, float]:
        """``min``, ``max``, ``mean``, ``median`` (mean over batches of their medians), ``norm`` (mean over tokens)."""
        return {
            "min": self._low,
            "max": self._high,
            "mean": self._sum / self.count,
            "median": math.fsum(self._medians) / len(self._medians),
            "norm": self._norms / self._tokens,
        }


class Spread:
    """Logits of attention and the entropy of its softmax, added up batch by batch."""

    def __init__(self) -> None:
        self._rows = 0
        self._logits = 0
        self._low, self._high = math.inf, -math.inf
        self._sum = 0.0
        self._relative = 0.0
        self._entropies: Tensor | None = None  # [H] sums over rows

    def update(self, q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> None:
        """Add a call.

        Args:
            q: [..., H, N, d].
            k: [..., H, M, d].
            scale: Of the logits.
            mask: Added to them, or False where nothing is attended to; [..., N, M].
        """
        heads, m = q.shape[-3], k.shape[-2]
        queries = q.detach().float().reshape(-1, *q.shape[-3:])  # [B, H, N, d]
        keys = k.detach().float().reshape(-1, *k.shape[-3:])  # [B, H, M, d]
        step = max(_LOGITS_AT_ONCE // max(len(queries) * heads * m, 1), 1)
        for start in range(0, q.shape[-2], step):
            logits = (queries[:, :, start : start + step] @ keys.mT) * scale  # [B, H, n, M]
            if mask is not None:
                part = mask if mask.shape[-2] == 1 else mask[..., start : start + step, :]
                if part.ndim > 4:
                    part = part.reshape(-1, *part.shape[-3:])
                logits = logits.masked_fill(~part, -math.inf) if part.dtype == torch.bool else logits + part
            self._add(logits, heads, m)

    def _add(self, logits: Tensor, heads: int, m: int) -> None:
        seen = logits[logits.isfinite()]
        self._low, self._high = min(self._low, float(seen.min())), max(self._high, float(seen.max()))
        self._sum += float(seen.sum())
        self._logits += seen.numel()
        shares = logits.softmax(-1)
        entropies = -torch.special.xlogy(shares, shares).sum(-1)  # [B, H, n]
        by_head = entropies.sum((0, 2)).double().cpu()  # [H]
        self._entropies = by_head if self._entropies is None else self._entropies + by_head
        self._relative += float(entropies.sum()) / math.log(m) if m > 1 else 0.0
        self._rows += entropies.numel() // heads

    def values(self) -> dict[str, Any]:
        """Logits, the mean entropy in nats, its share of the largest possible one, and the mean of each head."""
        assert self._entropies is not None  # there was a call
        by_head = self._entropies / self._rows
        return {
            "logit_min": self._low,
            "logit_max": self._high,
            "logit_mean": self._sum / self._logits,
            "entropy": float(by_head.mean()),
            "relative_entropy": self._relative / (self._rows * len(by_head)),
            "entropy_of_heads": by_head.tolist(),
        }


@dataclass
class Layer:
    """A layer that was seen.

    Attributes:
        name: Of the module.
        kind: What it is.
        input: Of its first input.
        output: Of its first output.
        spread: Of its attention; None where none was seen.
    """

    name: str
    kind: Kind
    input: Range = field(default_factory=Range)
    output: Range = field(default_factory=Range)
    spread: Spread | None = None

    @property
    def was_run(self) -> bool:
        """Whether it has values."""
        return self.output.count > 0

    def values(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        found: dict[str, Any] = {"name": self.name, "kind": self.kind}
        found |= {f"input_{name}": value for name, value in self.input.values().items()}
        found |= {f"output_{name}": value for name, value in self.output.values().items()}
        return found | ({} if self.spread is None else self.spread.values())


def layers_of(module: nn.Module) -> dict[str, Kind]:
    """The attention and MLP layers of a network by name, outermost first; what is inside one of them is not one."""
    found: dict[str, Kind] = {}
    for name, part in module.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        kind = _kind(type(part).__name__)
        if kind is not None:
            found[name] = kind
    return found


@contextmanager
def observed(module: nn.Module) -> Iterator[list[Layer]]:
    """Watch a network's layers.

    Args:
        module: Is run inside the context, by this thread, not compiled.

    Yields:
        Its layers, in the order of the network; those that were never run have no values. When the context ends, also
        by an error, the network is as it was.
    """
    kinds = layers_of(module)
    layers = {name: Layer(name, kind) for name, kind in kinds.items()}
    modules = dict(module.named_modules())
    running: list[Layer] = []  # innermost last
    with ExitStack() as undo:
        for name, layer in layers.items():
            undo.callback(modules[name].register_forward_pre_hook(_enter(layer, running), with_kwargs=True).remove)
            # Always called, so that a layer that failed does not seem to run for ever.
            undo.callback(modules[name].register_forward_hook(_leave(layer, running), always_call=True).remove)
        undo.enter_context(_AttentionCalls(running))
        yield list(layers.values())


class _AttentionCalls(TorchFunctionMode):
    """Sees calls of scaled dot product attention, and passes everything on."""

    def __init__(self, running: Sequence[Layer]) -> None:
        super().__init__()
        self._running = running

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._running:
            self._see(self._running[-1], *args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _see(layer: Layer, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any,
             scale: float | None = None, is_causal: bool = False, **__: Any) -> None:  # fmt: skip
        if is_causal:
            shape = (query.shape[-2], key.shape[-2])
            attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
        if layer.spread is None:
            layer.spread = Spread()
        layer.spread.update(query, key, scale or query.shape[-1] ** -0.5, attn_mask)


def _kind(class_name: str) -> Kind | None:
    if _NOT_LAYERS.search(class_name):
        return None
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(class_name)), None)


def _enter(layer: Layer, running: list[Layer]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(layer)
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if first is not None:
            layer.input.update(first)

    return hook


def _leave(layer: Layer, running: list[Layer]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        running.remove(layer)
        first = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(first, Tensor):
            layer.output.update(first)

    return hook
