"""EfficientNet-Lite0: inverted residual blocks without squeeze-and-excitation, ReLU6, TensorFlow's "same" padding.

Paper: arXiv 1905.11946; the Lite variants are described in the tensorflow/tpu repository (efficientnet/lite).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.errors import OptionError

NORM_EPS = 1e-3
STEM_WIDTH = 32
HEAD_WIDTH = 1280
EXPANSION = 6  # of every block but the first


class Stage(NamedTuple):
    """Blocks of one width.

    Attributes:
        repeats: Number of blocks.
        kernel: Side of the depthwise convolution.
        stride: Of the first block.
        width: Output channels.
    """

    repeats: int
    kernel: int
    stride: int
    width: int


LITE0 = (
    Stage(1, 3, 1, 16),
    Stage(2, 3, 2, 24),
    Stage(2, 5, 2, 40),
    Stage(3, 3, 2, 80),
    Stage(3, 5, 1, 112),
    Stage(4, 5, 2, 192),
    Stage(1, 3, 1, 320),
)
STAGE_OF_STRIDE = {16: 4, 32: 6}
"""The last stage at each stride, counted from 0."""


class SameConv2d(nn.Conv2d):
    """A convolution padded so that ``ceil(size / stride)`` positions remain, the odd one at the end."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve maps [B, C, h, w]."""
        top, bottom = self._padding(x.shape[-2])
        left, right = self._padding(x.shape[-1])
        return super().forward(F.pad(x, (left, right, top, bottom)) if top + bottom + left + right else x)

    def _padding(self, size: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if torch.compiler.is_exporting():  # the remainder is a number; with an expression, tracing would take an hour
            total = max(kernel - (size % stride or stride), 0)
        else:
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


class ConvNorm(nn.Module):
    """Convolution, batch norm, and ReLU6 if `act`.

    Args:
        width_in: Channels that come in.
        width: Channels that go out.
        kernel: Side of the kernel.
        stride: Of the convolution.
        groups: Of the convolution.
        act: Whether ReLU6 follows.
        folded: The norm is part of the convolution, which has a bias instead (see `folded_norms`).
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        *,
        act: bool = True,
        folded: bool = False,
    ) -> None:
        super().__init__()
        self.conv = SameConv2d(width_in, width, kernel, stride, groups=groups, bias=folded)
        self.norm = nn.Identity() if folded else nn.BatchNorm2d(width, eps=NORM_EPS)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Apply to maps [B, C, h, w]."""
        y: Tensor = self.norm(self.conv(x))
        return F.relu6(y) if self.act else y


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, project; added to the input where shapes allow."""

    def __init__(
        self, width_in: int, width: int, kernel: int, stride: int, expansion: int, folded: bool = False
    ) -> None:
        super().__init__()
        hidden = width_in * expansion
        self.expand = ConvNorm(width_in, hidden, 1, folded=folded) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, groups=hidden, folded=folded)
        self.project = ConvNorm(hidden, width, 1, act=False, folded=folded)
        self.residual = stride == 1 and width_in == width

    def forward(self, x: Tensor) -> Tensor:
        """Apply to maps [B, C, h, w]."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetTrunk(nn.Module):
    """The convolutional stages of EfficientNet-Lite0.

    Args:
        folded: Norms are part of the convolutions, so that nothing depends on the rest of a batch, and training and
            evaluation are alike.
    """

    def __init__(self, folded: bool = False) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM_WIDTH, 3, 2, folded=folded)
        self.blocks = nn.ModuleList()
        self._taps = {}
        width = STEM_WIDTH
        for index, stage in enumerate(LITE0):
            for i in range(stage.repeats):
                expansion = EXPANSION if len(self.blocks) else 1
                stride = stage.stride if i == 0 else 1
                self.blocks.append(InvertedResidual(width, stage.width, stage.kernel, stride, expansion, folded))
                width = stage.width
            for stride, last in STAGE_OF_STRIDE.items():
                if last == index:
                    self._taps[len(self.blocks) - 1] = stride

    def maps(self, images: Tensor) -> dict[int, Tensor]:
        """Run the stages.

        Args:
            images: [B, 3, H, W] in [-1, 1].

        Returns:
            By stride: the map [B, 112, ceil(H/16), ceil(W/16)], and the last one [B, 320, ceil(H/32), ceil(W/32)].
        """
        found: dict[int, Tensor] = {}
        x: Tensor = self.stem(images)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self._taps:
                found[self._taps[i]] = x
        return found


class EfficientNetLite(EfficientNetTrunk):
    """EfficientNet-Lite0 without its classifier.

    Args:
        stride: Of the feature map: 32 (the last stage, 320 channels) or 16 (the last stage at that stride, 112).
        folded: See `EfficientNetTrunk`.

    Attributes:
        width: Channels of the feature map.

    Raises:
        OptionError: There is no map of this stride.
    """

    def __init__(self, stride: int = 32, folded: bool = False) -> None:
        if stride not in STAGE_OF_STRIDE:
            raise OptionError(f"stride must be one of {list(STAGE_OF_STRIDE)}, got {stride}.")
        super().__init__(folded)
        self.stride = stride
        self.width = LITE0[STAGE_OF_STRIDE[stride]].width
        self.head = ConvNorm(LITE0[-1].width, HEAD_WIDTH, 1, folded=folded)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network.

        Args:
            images: [B, 3, H, W] in [-1, 1]; H and W are multiples of 32.

        Returns:
            The pooled vector [B, 1280], which the classifier would get, and the map [B, width, H/stride, W/stride].
        """
        maps = self.maps(images)
        return self.pooled(maps[32]), maps[self.stride]

    def pooled(self, last: Tensor) -> Tensor:
        """The pooled vector [B, 1280] of the map of stride 32 [B, 320, h, w]."""
        vector: Tensor = self.head(last).mean(dim=(2, 3))  # [B, 1280]
        return vector


def folded_norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold each batch norm into its convolution.

    Args:
        tensors: State dict of a network with norms.

    Returns:
        State dict of the same network built with ``folded=True``.
    """
    found: dict[str, Tensor] = {}
    for name, weight in tensors.items():
        if not name.endswith(".conv.weight"):
            continue
        prefix = name.removesuffix("conv.weight")
        mean, variance = tensors[f"{prefix}norm.running_mean"], tensors[f"{prefix}norm.running_var"]
        scale = tensors[f"{prefix}norm.weight"].double() / (variance.double() + NORM_EPS).sqrt()
        found[name] = (weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype)
        found[f"{prefix}conv.bias"] = (tensors[f"{prefix}norm.bias"].double() - mean.double() * scale).to(weight.dtype)
    return found
