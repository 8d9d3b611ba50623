"""E-RADIO: the convolution and windowed-attention hybrid of AM-RADIO (arXiv 2312.06709, section 5).

Four stages at strides 4, 8, 16 and 32. Two are convolutional, two attend inside windows. A neck sums projections of the
later stages into the dense output; the summary is the mean of that output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.errors import CapabilityError, ConfigError, OptionError, ResolutionError
from amradio.models.configs import ERadioConfig
from amradio.models.eradio_bias import PositionBias
from amradio.models.eradio_blocks import AttentionBlock, C2f, ConvBlock, ConvBN, MultiResolutionBlock
from amradio.models.intermediates import take_indices

NUM_STAGES = 4
FIRST_ATTENTION_STAGE = 2
STEM_STRIDE = 4
INPUT_MULTIPLE = STEM_STRIDE * 2 ** (NUM_STAGES - 1)

_LARGE = ERadioConfig()
_TINY = ERadioConfig(dim=32, in_dim=32, depths=(1, 3, 4, 5), full_features_head_dim=256)
_TINY_8X: Mapping[str, Any] = {
    "dim": 32,
    "in_dim": 32,
    "depths": (1, 3, 4, 5),
    "full_features_head_dim": 256,
    "cpb_mlp_hidden": 64,
    "conv_base": False,
    "conv_groups_ratio": 1.0,
}

ERADIO_VARIANTS: Mapping[str, ERadioConfig] = MappingProxyType(
    {
        "eradio": _LARGE,
        "eradio_large_fullres_ws16": _LARGE,
        "eradio_xxxtiny": _TINY,
        "eradio_xxxtiny_8x_ws12": ERadioConfig(**_TINY_8X, window_size=(None, None, (12, 12), 12)),
        "eradio_xxxtiny_8x_ws16": ERadioConfig(**_TINY_8X, neck_start_stage=1),
    }
)
"""Architectures by the name that checkpoints give them. Only weights of the first were ever published."""


class Stem(nn.Module):
    """Two strided 3x3 convolutions: images to maps of stride 4."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        # The middle entry stands for the activation that checkpoints count as a layer.
        self.conv_down = nn.Sequential(
            ConvBN(3, in_dim, 3, stride=2, activation="relu"),
            nn.Identity(),
            ConvBN(in_dim, dim, 3, stride=2, activation="relu"),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to [B, dim, H/4, W/4]."""
        return self.conv_down(images)  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """A strided 3x3 convolution to twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = ConvBN(dim, 2 * dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, 2C, H/2, W/2]."""
        return self.reduction(x)  # type: ignore[no-any-return]


class Stage(nn.Module):
    """The blocks of one stage, and the way to the next one.

    Args:
        config: The model's description.
        index: Which stage, from 0.
    """

    def __init__(self, config: ERadioConfig, index: int) -> None:
        super().__init__()
        dim, depth = config.dim * 2**index, config.depths[index]
        self.window_size: int | None = None
        self.subsample = 1
        if index >= FIRST_ATTENTION_STAGE:
            windows, ratios = _windows_and_ratios(config, index)
            self.window_size, self.subsample = windows[0], max(ratios)
            self.blocks: nn.Module = nn.Sequential(
                *(MultiResolutionBlock(_attention_blocks(config, index, windows, ratios)) for _ in range(depth))
            )
        elif config.yolo_arch:
            self.blocks = C2f(dim, depth)
        else:
            self.blocks = nn.Sequential(*(ConvBlock(dim) for _ in range(depth)))
        self.downsample = Downsample(dim) if index < NUM_STAGES - 1 else None

    def change_window_size(self, window: int) -> None:
        """Attend in windows of another size from now on, if this stage attends."""
        if self.window_size is None:
            return
        self.window_size = window
        for module in self.blocks.modules():
            if isinstance(module, AttentionBlock):
                module.change_window_size(window)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks to maps [B, C, H, W]; `downsample` is for the caller to apply."""
        if self.window_size is None:
            return self.blocks(x)  # type: ignore[no-any-return]
        # The map itself is resized until windows fit: the weights take that better than padding.
        step, size = self.window_size * self.subsample, x.shape[-2:]
        fitting = (-(-size[0] // step) * step, -(-size[1] // step) * step)
        # Resizing to the same size is the identity, so a compiled graph leaves the branch (and its guards) out.
        if not torch.compiler.is_compiling() and fitting == tuple(size):
            return self.blocks(x)  # type: ignore[no-any-return]
        x = F.interpolate(x, size=fitting, mode="nearest")
        return F.interpolate(self.blocks(x), size=size, mode="nearest")


def _windows_and_ratios(config: ERadioConfig, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """One window side and one sub-sampling ratio for each attention block inside a block of the stage."""
    windows, ratios = config.window_size[index], config.sr_ratio[index]
    ratios = ratios if isinstance(ratios, tuple) else (ratios,)
    windows = windows if isinstance(windows, tuple) else (windows,) if windows is not None else ()
    if not windows or min(windows) < 2:
        raise ConfigError(f"window_size of stage {index} must be at least 2, got {config.window_size[index]}.")
    if not ratios or min(ratios) < 1:
        raise ConfigError(f"sr_ratio of stage {index} must be at least 1, got {config.sr_ratio[index]}.")
    if any(max(ratios) * windows[0] % r for r in ratios):
        raise ConfigError(
            f"sr_ratio {ratios} of stage {index}: maps are multiples of {max(ratios)} x window {windows[0]}, "
            "which every ratio must divide."
        )
    return tuple(windows[j] if j < len(windows) else windows[0] for j in range(len(ratios))), ratios


def _attention_blocks(
    config: ERadioConfig, index: int, windows: Sequence[int], ratios: Sequence[int]
) -> list[AttentionBlock]:
    dim = config.dim * 2**index
    return [
        AttentionBlock(
            dim,
            config.num_heads[index],
            window,
            ratio,
            mlp_ratio=config.mlp_ratio,
            bias_hidden_dim=config.cpb_mlp_hidden,
            qkv_bias=config.qkv_bias,
            layer_scale=config.layer_scale,
            conv_base=config.conv_base,
            conv_groups=max(1, int(config.conv_groups_ratio * dim)),
        )
        for window, ratio in zip(windows, ratios, strict=True)
    ]


class Neck(nn.Module):
    """Sums projections of the later stages at the stride of the first of them.

    Args:
        config: The model's description.
    """

    def __init__(self, config: ERadioConfig) -> None:
        super().__init__()
        self.start = config.neck_start_stage
        self.neck_features_proj = nn.ModuleList(
            _neck_projection(config.dim * 2**i, config.full_features_head_dim, 2 ** (i - self.start))
            for i in range(self.start, NUM_STAGES)
        )

    def forward(self, x: Tensor, stage: int, dense: Tensor | None) -> Tensor | None:
        """Add a stage's map.

        Args:
            x: The stage's map [B, C, H, W].
            stage: Its index.
            dense: The sum so far [B, D, h, w], None before the first stage that counts.

        Returns:
            The new sum, None if the stage does not count.
        """
        if stage < self.start:
            return dense
        y: Tensor = self.neck_features_proj[stage - self.start](x)
        return y if dense is None else dense + y


def _neck_projection(dim: int, out_dim: int, upsample: int) -> nn.Sequential:
    if upsample == 1 and dim == out_dim:
        return nn.Sequential()
    projection = nn.Sequential()
    if upsample > 1:
        projection.add_module("upsample", nn.Upsample(scale_factor=upsample, mode="nearest"))
    projection.add_module("conv1", nn.Conv2d(dim, dim, 3, padding=1, groups=dim))
    projection.add_module("norm", nn.BatchNorm2d(dim))
    projection.add_module("conv2", nn.Conv2d(dim, out_dim, 1))
    return projection


class ERadio(nn.Module):
    """Conditioned images to a summary and dense features.

    Args:
        config: What to build; weights are random.

    Attributes:
        config: What was built.
        embed_dim: Width D of summary and features.
        patch_size: Stride of the features in pixels.
        input_multiple: What both image sides must be multiples of, in pixels.
        num_cls_tokens: 1, the summary; there are no tokens as in a vision transformer.
        num_prefix_tokens: 1, as `num_cls_tokens`.
        norm: The norm of ``config.final_norm``, else the identity. It feeds a classifier that RADIO does not have, so
            only ``forward_intermediates(norm=True)`` applies it.

    Raises:
        ConfigError: The description is inconsistent.
    """

    def __init__(self, config: ERadioConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.embed_dim = config.embed_dim
        self.patch_size = config.patch_size
        self.input_multiple = INPUT_MULTIPLE
        self.num_cls_tokens = 1
        self.num_prefix_tokens = 1
        self.patch_embed = Stem(config.in_dim, config.dim)
        self.levels = nn.ModuleList(Stage(config, i) for i in range(NUM_STAGES))
        self.high_res_neck = Neck(config)
        self.norm = nn.BatchNorm2d(config.dim * 2 ** (NUM_STAGES - 1)) if config.final_norm else nn.Identity()
        self.apply(_initialise)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network.

        Args:
            images: Conditioned images [B, 3, H, W]; sides are multiples of `input_multiple`.

        Returns:
            The summary [B, D], the mean of the features over positions, and the features [B, L, D] with
            L = (H / patch_size) * (W / patch_size), row-major.

        Raises:
            ResolutionError: A side is not a multiple of `input_multiple`.
        """
        _, dense = self._run(images, NUM_STAGES - 1)
        return _summarise(dense)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        output_fmt: str = "NCHW",
        stop_early: bool = False,
        intermediates_only: bool = False,
        norm: bool = False,
        return_prefix_tokens: bool = False,
    ) -> Any:
        """Return the maps of the stages, each before its down-sampling, at strides 4, 8, 16 and 32.

        Args:
            images: As for `forward`.
            indices: n for the last n stages, a sequence of stages (negative ones count from the end), or None for all.
                The order of the maps is the order asked for.
            output_fmt: ``NCHW``: [B, C, h, w]; ``NLC``: [B, h * w, C].
            stop_early: Do not run stages after the last one asked for. Only together with `intermediates_only`: the
                final output needs all stages.
            intermediates_only: Leave the final output out.
            norm: Apply the last norm to the last stage's map, the only one that it fits.
            return_prefix_tokens: Not available.

        Returns:
            ``((summary, features), maps)`` or only ``maps``.

        Raises:
            CapabilityError: Prefix tokens are asked for.
            OptionError: An option or stage is not valid.
            ResolutionError: A side is not a multiple of `input_multiple`.
        """
        if return_prefix_tokens:
            raise CapabilityError("E-RADIO has no prefix tokens: its summary is the mean of the dense features.")
        if output_fmt not in ("NCHW", "NLC"):
            raise OptionError(f"Unsupported output_fmt: {output_fmt!r}. Must be one of ['NCHW', 'NLC'].")
        if stop_early and not intermediates_only:
            raise OptionError("stop_early needs intermediates_only=True: E-RADIO's final output needs all stages.")
        wanted = _take_stages(indices)
        last = max(wanted, default=0) if stop_early else NUM_STAGES - 1
        maps, dense = self._run(images, last, features=not intermediates_only)
        if norm and last == NUM_STAGES - 1:
            maps[last] = self.norm(maps[last])
        chosen = [maps[i] if output_fmt == "NCHW" else maps[i].flatten(2).transpose(1, 2) for i in wanted]
        return chosen if intermediates_only else (_summarise(dense), chosen)

    def switch_to_deploy(self) -> None:
        """Fold the batch norms of stem and stages into their convolutions, for inference. Cannot be undone.

        The position bias is recomputed and stored in the state dict for other readers of it. Windows can still be
        changed.
        """
        for module in (*self.patch_embed.modules(), *self.levels.modules()):
            if isinstance(module, ConvBN):
                module.fuse()
            elif isinstance(module, PositionBias):
                module.store()

    def change_window_size(self, window_size: int) -> None:
        """Attend in windows of another size from now on; the state dict stays as it is.

        Maps are resized to multiples of the window (of twice the window in stage 2), so a size that divides the image's
        side over 32 is both faster and better: 7 for 224 pixels, 8 for 256, 12 for 384, 16 for 512.

        Args:
            window_size: Side of the windows of all attention blocks, at least 1.

        Raises:
            OptionError: `window_size` is below 1.
        """
        if window_size < 1:
            raise OptionError(f"window_size must be at least 1, got {window_size}.")
        for stage in self.levels:
            assert isinstance(stage, Stage)
            stage.change_window_size(window_size)

    def set_optimal_window_size(self, image_dim: int | Sequence[int], max_window: int = 16) -> int:
        """Choose the largest window that divides the last stage's map without resizing it.

        Args:
            image_dim: Side in pixels, or several, of which the smallest counts.
            max_window: Largest window to choose.

        Returns:
            The window now in use.

        Raises:
            OptionError: The image is smaller than 32 pixels, or `max_window` below 1.
        """
        side = image_dim if isinstance(image_dim, int) else min(image_dim)
        cells = side // INPUT_MULTIPLE
        if cells < 1 or max_window < 1:
            raise OptionError(
                f"No window fits image_dim={image_dim} with max_window={max_window}: the image needs at least "
                f"{INPUT_MULTIPLE} pixels a side, and the window at least 1 cell."
            )
        window = max(n for n in range(1, min(cells, max_window) + 1) if cells % n == 0)
        self.change_window_size(window)
        return window

    def _run(self, images: Tensor, last: int, features: bool = True) -> tuple[list[Tensor], Tensor | None]:
        """Run stages up to `last`: their maps before down-sampling, and the neck's sum if `features`."""
        _check_size(images)
        x = self.patch_embed(images)
        maps: list[Tensor] = []
        dense: Tensor | None = None
        for i, stage in enumerate(self.levels):
            assert isinstance(stage, Stage)
            x = stage(x)
            maps.append(x)
            if features:
                dense = self.high_res_neck(x, i, dense)
            if i == last or stage.downsample is None:
                break
            x = stage.downsample(x)
        return maps, dense


def _summarise(dense: Tensor | None) -> tuple[Tensor, Tensor]:
    assert dense is not None  # all stages were run
    features = dense.flatten(2).transpose(1, 2)  # [B, h * w, D]
    return features.mean(dim=1), features


def _take_stages(indices: int | Sequence[int] | None) -> list[int]:
    try:
        return take_indices(indices, NUM_STAGES)
    except OptionError as e:
        raise OptionError(f"{e} E-RADIO's intermediates are its {NUM_STAGES} stages.") from None


def _check_size(images: Tensor) -> None:
    height, width = images.shape[-2:]
    if height % INPUT_MULTIPLE or width % INPUT_MULTIPLE:
        near = [max(round(side / INPUT_MULTIPLE), 1) * INPUT_MULTIPLE for side in (height, width)]
        raise ResolutionError(
            f"E-RADIO requires input dimensions to be divisible by {INPUT_MULTIPLE} but got H x W: {height} x {width}. "
            f"The nearest supported size is {near[0]} x {near[1]}."
        )


def _check(config: ERadioConfig) -> None:
    for name in ("depths", "num_heads", "window_size", "sr_ratio"):
        if len(getattr(config, name)) != NUM_STAGES:
            raise ConfigError(f"{name} needs one entry a stage, {NUM_STAGES} in all, got {getattr(config, name)}.")
    if not 1 <= config.neck_start_stage < NUM_STAGES:
        raise ConfigError(f"neck_start_stage must be in 1 to {NUM_STAGES - 1}, got {config.neck_start_stage}.")
    if config.conv_groups_ratio < 0:
        raise ConfigError(f"conv_groups_ratio must be at least 0, got {config.conv_groups_ratio}.")
    for i in range(FIRST_ATTENTION_STAGE, NUM_STAGES):
        if config.dim * 2**i % config.num_heads[i]:
            raise ConfigError(
                f"Stage {i} is {config.dim * 2**i} wide, not divisible by its {config.num_heads[i]} heads."
            )


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
