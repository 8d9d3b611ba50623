"""Results of a size that are worth keeping between calls: resized position embeddings, position biases."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_optimizer_steps = itertools.count()
_generation = 0
_hook: Any = None


def _watch_optimizers() -> None:
    """Count the steps of all optimizers: fused ones, and those of sharded parameters, raise no version counter."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_on_step)


def _on_step(*_: Any) -> None:
    global _generation
    _generation = next(_optimizer_steps) + 1


class TensorCache:
    """Results, kept for one state of the tensors that they are computed from.

    Nothing here is part of the state dict. The cache holds aliases of its sources: as long as it does, no other tensor
    can get their addresses, so equal addresses and versions mean equal values, as long as no optimizer has stepped:
    fused and sharded ones write without raising a version, so every step in the process empties the cache. (Writing
    through ``parameter.data`` is counted nowhere; `clear` after it.) Threads may share it.
    """

    def __init__(self, capacity: int = 32) -> None:
        self.capacity = capacity
        self._sources: tuple[Tensor, ...] = ()
        self._versions: tuple[int, ...] = ()
        self._generation = 0
        self._entries: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, sources: Sequence[Tensor], key: tuple[object, ...], compute: Callable[[], Tensor]) -> Tensor:
        """Return the entry of `key` for the present values of `sources`, computing it if needed.

        Args:
            sources: Everything with values that the result depends on.
            key: What else it depends on.
            compute: Computes the result.

        Returns:
            The cached or computed tensor. Not to be written to.
        """
        if any(s.is_inference() for s in sources):  # without a version counter, a change could not be noticed
            return compute()
        with self._lock:
            _watch_optimizers()
            if not self._is_current(sources):
                self._sources = tuple(s.detach() for s in sources)
                self._versions = tuple(s._version for s in sources)
                self._generation = _generation
                self._entries.clear()
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
            with torch.inference_mode(False), torch.no_grad():  # so that the value is of use outside inference mode
                value = self._entries[key] = compute()
            if len(self._entries) > self.capacity:
                self._entries.popitem(last=False)
            return value

    def _is_current(self, sources: Sequence[Tensor]) -> bool:
        return (
            self._generation == _generation
            and len(self._sources) == len(sources)
            and all(
                held.data_ptr() == s.data_ptr() and held.device == s.device and version == s._version
                for held, version, s in zip(self._sources, self._versions, sources, strict=True)
            )
        )

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._sources, self._versions = (), ()
            self._entries.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorCache:
        return TensorCache(self.capacity)

    def __reduce__(self) -> tuple[type[TensorCache], tuple[int]]:
        return TensorCache, (self.capacity,)


def caching_is_safe() -> bool:
    """Whether results may be kept between calls: not while gradients are on, nor while compiling or exporting."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())
