"""A forward pass split at one linear layer: what comes before without gradients, the rest on record.

For FUNGI only the gradient at the layer's output is needed. With the output as the one leaf of the graph, one backward
pass through the rest gives it: nothing before the layer is recorded, no parameter is made trainable, nothing
accumulates. Behind the output projection of the last attention the rest is small and works on each token by itself.

Trunks of this package are run block by block, and for summaries only on the class tokens. Other networks run as they
are, with a temporary hook on the layer.

Legend of shape comments: B images, T tokens that go through the layer, P prefix tokens, L patches, C width, H and J the
layer's outputs and inputs, R tokens that make up the summary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.errors import CapabilityError, ResolutionError
from amradio.fungi.layers import find_layer
from amradio.fungi.projections import GradientShape
from amradio.models.radio import RadioModel
from amradio.models.view import RadioView
from amradio.models.vit import Attention, Block, VisionTransformer


@dataclass(frozen=True)
class Split:
    """One forward pass, split at a layer's output.

    Attributes:
        inputs: [B, T, inputs] what the layer took, without history.
        leaf: [B, T, H] what it gave: the leaf that everything below depends on.
        summary: [B, C] the backbone's summary.
        prefix: [B, P, D] class tokens, then registers, as they come out at the end; P may be 0.
        patches: [B, L, D] the backbone's features; None if only the summary was asked for.
    """

    inputs: Tensor
    leaf: Tensor
    summary: Tensor
    prefix: Tensor
    patches: Tensor | None

    def upstream(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Pull gradients back to the layer's output. Once for each pass, for the record is used up.

        Args:
            outputs: Some of `summary`, `prefix` and `patches`.
            gradients: For each a gradient of its shape.

        Returns:
            float32 [B, T, H].

        Raises:
            CapabilityError: The outputs do not depend on the layer.
        """
        scaled, scale = _rescaled(outputs, gradients, self.leaf.dtype)
        try:
            (found,) = torch.autograd.grad(list(outputs), self.leaf, scaled)
        except RuntimeError as e:
            if "does not require grad" not in str(e) and "not have been used in the graph" not in str(e):
                raise
            raise CapabilityError(
                "What the backbone returns does not depend on the layer through operations that torch records: the "
                "layer is in a part that is not used, or the network switches gradients off inside. Choose another "
                "layer."
            ) from e
        return found.float() / scale[:, None, None]


class Splitter(Protocol):
    """Splits forward passes of one backbone at one layer.

    Attributes:
        layer: The layer's full name.
        shape: Of the layer's gradient.
        num_cls_tokens: How many of the prefix tokens of a `Split` are class tokens.
    """

    layer: str
    shape: GradientShape
    num_cls_tokens: int

    def __call__(self, images: Tensor, *, summary_only: bool = False) -> Split:
        """Run the backbone.

        Args:
            images: [B, 3, H, W] in [0, 1], of a supported size.
            summary_only: Only the summary is of interest; tokens that it does not depend on may be left out.

        Returns:
            The pass; its tensors are usual ones even under `torch.inference_mode`.
        """
        ...


@runtime_checkable
class SplitsLastBlock(Protocol):
    """A backbone that knows by itself how to split its forward pass."""

    def split_last_block(self, layer: str | None = None) -> Splitter:
        """Make a splitter at a layer, default the output projection of the last attention."""
        ...


def make_splitter(backbone: Any, layer: str | None = None) -> Splitter:
    """Find out how to split the forward passes of a backbone.

    Args:
        backbone: An `amradio.Backbone`.
        layer: Name of a `torch.nn.Linear`, such as ``blocks.11.attn.proj``; default the output projection of the last
            attention. Names may leave out what comes first, and may begin with ``backbone.`` or ``module.``.

    Returns:
        The splitter. It keeps nothing on the backbone; any number of them may share one.

    Raises:
        CapabilityError: The backbone is no module, or it has no such layer.
    """
    if isinstance(backbone, SplitsLastBlock):
        return backbone.split_last_block(layer)
    if not isinstance(backbone, nn.Module):
        raise CapabilityError(
            f"Gradients need the layers of a torch.nn.Module, and the backbone is a {type(backbone).__name__}."
        )
    name, module = find_layer(backbone, layer)
    model = backbone.radio if isinstance(backbone, RadioView) and backbone.name == "backbone" else backbone
    if isinstance(model, RadioModel) and isinstance(model.model, VisionTransformer):
        last = model.model.blocks[-1]
        if isinstance(last, Block) and module is last.attn.proj:
            return TrunkSplitter(model, name)
    from amradio.fungi.taps import TapSplitter

    return TapSplitter(backbone, name, module)


class TrunkSplitter:
    """Splits `RadioModel` with a vision transformer at the output projection of its last attention.

    Args:
        model: The model; its adaptors are not run.
        layer: Full name of that projection.
    """

    def __init__(self, model: RadioModel, layer: str) -> None:
        trunk = model.model
        assert isinstance(trunk, VisionTransformer)
        self.layer = layer
        self.shape = shape_of(trunk.blocks[-1].attn.proj)  # type: ignore[arg-type, union-attr]
        self.num_cls_tokens = trunk.num_cls_tokens
        self._model = model
        self._trunk = trunk
        self._pooled = trunk.config.pool == "avg"
        self._summary = model.summary_idxs.tolist()

    def __call__(self, images: Tensor, *, summary_only: bool = False) -> Split:
        """See `Splitter`."""
        check_size(self._model, images)
        with outside_inference(), torch.no_grad():
            x = self._before_last_block(usual(images))  # [B, P + L, C]
            block = self._trunk.blocks[-1]
            assert isinstance(block, Block)
            few = summary_only and not self._pooled
            rows = self._summary if few else None
            inputs = _attended(block.attn, _normed(block, block.norm1, x), rows)  # [B, T, C]
            leaf = block.attn.proj(inputs).detach().requires_grad_()
            with torch.enable_grad():
                tokens = _after_attention(block, x if rows is None else x[:, rows], leaf)
                tokens = self._trunk.norm(tokens)
                if few:
                    return Split(inputs, leaf, tokens.flatten(1), tokens, None)
                prefix, patches = tokens.split([self._prefix, x.shape[1] - self._prefix], dim=1)
                summary = patches.mean(dim=1) if self._pooled else prefix[:, self._summary].flatten(1)  # [B, R * C]
                return Split(inputs, leaf, summary, prefix, self._model.feature_normalizer(patches))

    @property
    def _prefix(self) -> int:
        return self._trunk.num_prefix_tokens

    def _before_last_block(self, images: Tensor) -> Tensor:
        x = self._model.input_conditioner(images).to(self._model.dtype)
        depth = len(self._trunk.blocks)
        if depth == 1:
            return self._trunk.patch_generator(x)  # type: ignore[no-any-return]
        ((_, tokens),) = self._trunk.run(x, (), stop=depth - 2)
        return torch.cat(tokens, dim=1)  # the last block is global under any window schedule


def shape_of(layer: nn.Linear) -> GradientShape:
    """Shape of a layer's gradient."""
    return GradientShape(layer.out_features, layer.in_features, layer.bias is not None)


def check_size(backbone: Any, images: Tensor) -> None:
    """Refuse images that a backbone cannot take.

    Raises:
        ResolutionError: They are no batch of images, or of an unsupported size; the message names the nearest one.
    """
    if images.ndim != 4:
        raise ResolutionError(f"Images must be [B, 3, H, W], got the shape {list(images.shape)}.")
    height, width = images.shape[-2:]
    h, w = backbone.get_nearest_supported_resolution(height, width)
    if (h, w) != (height, width):
        raise ResolutionError(
            f"The backbone does not take images of {height}x{width} (height x width). The nearest supported size is "
            f"{h}x{w}; `get_nearest_supported_resolution(height, width)` computes it."
        )


@contextmanager
def outside_inference() -> Iterator[None]:
    """Let tensors be made that gradients can be computed with, whatever mode the caller is in."""
    with torch.inference_mode(False):
        yield


def usual(images: Tensor) -> Tensor:
    """The same images, not as a tensor of inference mode."""
    return images.clone() if images.is_inference() else images.detach()


def _normed(block: Block, norm: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = norm(x)
    return y if block.norm_factor is None else y * block.norm_factor


def _attended(attn: Attention, x: Tensor, rows: list[int] | None) -> Tensor:
    """What goes into the output projection: [B, T, C], of all tokens or only of some; those still see all."""
    b, n, c = x.shape
    heads = (attn.num_heads, c // attn.num_heads)
    weight, bias = attn.qkv.weight, cast("Tensor | None", attn.qkv.bias)
    biases = (None, None) if bias is None else bias.split([c, 2 * c])
    few = x if rows is None else x[:, rows]
    q = F.linear(few, weight[:c], biases[0]).unflatten(2, heads)  # [B, T, heads, C/heads]
    kv = F.linear(x, weight[c:], biases[1]).view(b, n, 2, *heads)
    k, v = kv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)  # 2 x [B, heads, N, C/heads]
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v)  # [B, heads, T, C/heads]
    return y.transpose(1, 2).reshape(b, few.shape[1], c)  # [B, T, C]


def _after_attention(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    x = x + attended if block.ls1 is None else block.ls1(x, attended)
    branch: Tensor = block.mlp(_normed(block, block.norm2, x))
    result: Tensor = x + branch if block.ls2 is None else block.ls2(x, branch)
    return result


def _rescaled(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Gradients for a backward pass, scaled up for each image where they might underflow; and the scales [B].

    Gradients of these losses are tiny, and float16 has no numbers below 6e-8. Powers of two change no digit.
    """
    scale = torch.ones(len(gradients[0]), device=gradients[0].device)
    if dtype == torch.float16:
        largest = torch.stack([g.float().flatten(1).abs().amax(1) for g in gradients]).amax(0)  # [B]
        scale = torch.exp2(-torch.log2(largest.clamp(min=torch.finfo(torch.float32).tiny)).floor())
    scaled = [
        (g.float() * scale.view(-1, *[1] * (g.ndim - 1))).to(o.dtype) for o, g in zip(outputs, gradients, strict=True)
    ]
    return scaled, scale
