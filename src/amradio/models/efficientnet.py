"""EfficientNet-Lite0: inverted residual blocks without squeeze-and-excitation, ReLU6, TensorFlow's "same" padding.

Paper: arXiv 1905.11946; the Lite variants are described in the tensorflow/tpu repository (efficientnet/lite).
"""

from __future__ import annotations

from typing import NamedTuple

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
    """A convolution without bias, padded so that ``ceil(size / stride)`` positions remain, the odd one at the end."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve maps [B, C, h, w]."""
        top, bottom = self._padding(x.shape[-2])
        left, right = self._padding(x.shape[-1])
        return super().forward(F.pad(x, (left, right, top, bottom)) if top + bottom + left + right else x)

    def _padding(self, size: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


class ConvNorm(nn.Module):
    """Convolution, batch norm, and ReLU6 if `act`."""

    def __init__(self, conv: SameConv2d, act: bool = True) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels, eps=NORM_EPS)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Apply to maps [B, C, h, w]."""
        y = self.norm(self.conv(x))
        return F.relu6(y) if self.act else y


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, project; added to the input where shapes allow."""

    def __init__(self, width_in: int, width: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = width_in * expansion
        self.expand = ConvNorm(SameConv2d(width_in, hidden, 1)) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(SameConv2d(hidden, hidden, kernel, stride, groups=hidden))
        self.project = ConvNorm(SameConv2d(hidden, width, 1), act=False)
        self.residual = stride == 1 and width_in == width

    def forward(self, x: Tensor) -> Tensor:
        """Apply to maps [B, C, h, w]."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 without its classifier.

    Args:
        stride: Of the feature map: 32 (the last stage, 320 channels) or 16 (the last stage at that stride, 112).

    Attributes:
        width: Channels of the feature map.

    Raises:
        OptionError: There is no map of this stride.
    """

    def __init__(self, stride: int = 32) -> None:
        super().__init__()
        if stride not in STAGE_OF_STRIDE:
            raise OptionError(f"stride must be one of {list(STAGE_OF_STRIDE)}, got {stride}.")
        self.stride = stride
        self.width = LITE0[STAGE_OF_STRIDE[stride]].width
        self._tap = sum(stage.repeats for stage in LITE0[: STAGE_OF_STRIDE[stride] + 1]) - 1
        self.stem = ConvNorm(SameConv2d(3, STEM_WIDTH, 3, 2))
        self.blocks = nn.ModuleList()
        width = STEM_WIDTH
        for stage in LITE0:
            for i in range(stage.repeats):
                expansion = EXPANSION if len(self.blocks) else 1
                stride_i = stage.stride if i == 0 else 1
                self.blocks.append(InvertedResidual(width, stage.width, stage.kernel, stride_i, expansion))
                width = stage.width
        self.head = ConvNorm(SameConv2d(width, HEAD_WIDTH, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network.

        Args:
            images: [B, 3, H, W] in [-1, 1]; H and W are multiples of 32.

        Returns:
            The pooled vector [B, 1280], which the classifier would get, and the map [B, width, H/stride, W/stride].
        """
        x: Tensor = self.stem(images)
        features = x
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == self._tap:
                features = x
        return self.head(x).mean(dim=(2, 3)), features
