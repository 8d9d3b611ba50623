"""Splitting the forward pass of any network at any linear layer, by a hook that is there for one pass only."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from amradio.backbones.callables import CallableBackbone
from amradio.backbones.huggingface import HFBackbone
from amradio.backbones.timm import TimmBackbone
from amradio.errors import CapabilityError
from amradio.fungi.tail import Split, check_size, outside_inference, shape_of, usual
from amradio.models.radio import RadioModel
from amradio.models.view import RadioView
from amradio.models.vit import VisionTransformer


class TapSplitter:
    """Splits any backbone at any linear layer that sees one sequence of tokens for each image.

    The network runs without gradients up to the layer. There the hook puts a leaf in the place of the layer's output
    and switches gradients on; so what is recorded is the same as if the rest were run by hand.

    Args:
        backbone: A module that is an `amradio.Backbone`.
        layer: The layer's full name.
        module: The layer.
    """

    def __init__(self, backbone: Any, layer: str, module: nn.Linear) -> None:
        self.layer = layer
        self.shape = shape_of(module)
        self._backbone = backbone
        self._module = module
        self._ends = _token_ends(backbone)
        self.num_cls_tokens = 0 if self._ends is None else self._ends.num_prefix - self._ends.num_registers
        self._lock = threading.Lock()  # hooks belong to the module, which threads may share

    def __call__(self, images: Tensor, *, summary_only: bool = False) -> Split:
        """See `Splitter`.

        Raises:
            CapabilityError: The layer is not called, more than once, or on something else than [B, T, C].
        """
        check_size(self._backbone, images)
        with self._lock, outside_inference(), torch.no_grad(), self._tapped(len(images)) as tap:
            output = self._backbone(usual(images))
            if not isinstance(output, tuple):  # a RADIO model with adaptors
                output = output["backbone"]
            summary, patches = output
            if tap.inputs is None or tap.leaf is None:
                raise CapabilityError(
                    f"The layer {self.layer} is not called in a forward pass: it is unused, or the module around it "
                    f"computes with its weights directly. Choose another layer."
                )
            return Split(tap.inputs, tap.leaf, summary, tap.prefix(patches), None if summary_only else patches)

    @contextmanager
    def _tapped(self, batch: int) -> Iterator[_Tap]:
        tap = _Tap(self.layer, batch, self._ends)
        handles = [self._module.register_forward_hook(tap.at_layer)]
        if self._ends is not None:
            handles.append(self._ends.module.register_forward_hook(tap.at_end))
        try:
            yield tap
        finally:
            for handle in handles:
                handle.remove()


class _TokenEnds:
    """Where a network's final tokens can be seen with their prefix."""

    def __init__(self, module: nn.Module, num_prefix: int, num_registers: int) -> None:
        self.module = module
        self.num_prefix = num_prefix
        self.num_registers = num_registers


class _Tap:
    """What hooks saw in one pass."""

    def __init__(self, layer: str, batch: int, ends: _TokenEnds | None) -> None:
        self.inputs: Tensor | None = None
        self.leaf: Tensor | None = None
        self._layer = layer
        self._batch = batch
        self._ends = ends
        self._tokens: Tensor | None = None

    def at_layer(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.leaf is not None:
            raise CapabilityError(f"The layer {self._layer} is called more than once in a forward pass.")
        if not args or output.ndim != 3 or len(output) != self._batch:
            raise CapabilityError(
                f"The layer {self._layer} gives the shape {list(output.shape)} for {self._batch} images, and gradients "
                f"of single images need one sequence of tokens for each, [B, T, C]. Choose another layer."
            )
        self.inputs = args[0].detach()
        self.leaf = output.detach().requires_grad_()
        torch.set_grad_enabled(True)  # until the `no_grad` around the pass ends
        return self.leaf.clone()  # the network may write to it

    def at_end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._tokens = _tokens_in(output)

    def prefix(self, patches: Tensor) -> Tensor:
        """The final prefix tokens [B, P, D]; P is 0 where they cannot be seen."""
        if self._tokens is None or self._ends is None or self._tokens.shape[-1] != patches.shape[-1]:
            return patches[:, :0]
        return self._tokens[:, : self._ends.num_prefix]


def _token_ends(backbone: Any) -> _TokenEnds | None:
    if isinstance(backbone, TimmBackbone) and isinstance(getattr(backbone.network, "norm", None), nn.Module):
        network = backbone.network
        return _TokenEnds(network.norm, _number(network, "num_prefix_tokens"), _number(network, "num_reg_tokens"))
    if isinstance(backbone, HFBackbone):
        registers = _number(backbone.network.config, "num_register_tokens")
        return _TokenEnds(backbone.network, backbone.num_prefix_tokens, registers)
    if isinstance(backbone, CallableBackbone) and isinstance(backbone.fn, nn.Module):
        registers = _number(backbone.fn, "num_register_tokens")
        return _TokenEnds(backbone.fn, backbone.num_prefix_tokens, min(registers, backbone.num_prefix_tokens))
    if isinstance(backbone, RadioView) and backbone.name == "backbone":
        backbone = backbone.radio
    if isinstance(backbone, RadioModel) and isinstance(backbone.model, VisionTransformer):
        trunk = backbone.model
        return _TokenEnds(trunk, trunk.num_prefix_tokens, trunk.num_prefix_tokens - trunk.num_cls_tokens)
    return None


def _number(owner: Any, name: str) -> int:
    value = getattr(owner, name, 0)
    return value if isinstance(value, int) else 0


def _tokens_in(output: Any) -> Tensor | None:
    """The sequence of tokens [B, T, D] in what a network returns; what is not a sequence is passed over."""
    if isinstance(output, Mapping) and "last_hidden_state" in output:
        output = output["last_hidden_state"]
    elif isinstance(output, tuple):  # prefix and patches of this package's trunk
        output = output[0]
    return output if isinstance(output, Tensor) and output.ndim == 3 else None
