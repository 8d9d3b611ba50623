"""Photos in memory to feature maps, each with the photo as the backbone saw it: what pictures of features start from.

For files in any number, and for what is written to disk, see `amradio.features.extract`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amradio.backbones.protocol import Backbone, HasAttention, HasIntermediates
from amradio.errors import CapabilityError, OptionError, ResolutionError
from amradio.features.bucketing import batches_by_shape, in_order
from amradio.features.runner import is_out_of_memory
from amradio.images.resize import ResizePolicy
from amradio.models.output import RadioOutput
from amradio.models.view import RadioView

if TYPE_CHECKING:
    from PIL.Image import Image

_LOOK_AHEAD = 4  # batches; photos of one shape, such as frames, never wait


@dataclass(frozen=True)
class FeatureMap:
    """A photo and what a backbone makes of it.

    Attributes:
        photo: RGB, at the size that the backbone saw, H x W pixels.
        features: float32 [h, w, D] on the CPU.
        summary: float32 [C] on the CPU; of an intermediate block, the mean of its features.
    """

    photo: Image
    features: Tensor
    summary: Tensor


@dataclass(frozen=True)
class _Ready:
    position: int
    pixels: Tensor  # uint8 [3, H, W]


def feature_map(
    backbone: Backbone, photo: Image, policy: ResizePolicy, *, layer: int | None = None, norm: bool = True
) -> FeatureMap:
    """Compute the feature map of one photo.

    Args:
        backbone: In evaluation mode; the photo goes to the device of its parameters. An adaptor's features are those of
            its view.
        photo: In RGB and upright, as `amradio.images.decode` gives it.
        policy: To which size it is brought; the result is rounded to a size that the backbone supports.
        layer: Features of this block, from 0, or from -1 backwards; None for the backbone's own output.
        norm: Whether the norm that follows the last block is applied to those of a layer.

    Returns:
        The map.

    Raises:
        ImageError: The photo is not in RGB.
        ResolutionError: It would become larger than the policy allows, or does not fit into memory.
        CapabilityError: The backbone does not give features of its blocks.
        OptionError: There is no such block, or the backbone is in training mode.
    """
    return next(feature_maps(backbone, [photo], policy, layer=layer, norm=norm, batch_size=1))


def feature_maps(
    backbone: Backbone,
    photos: Iterable[Image],
    policy: ResizePolicy,
    *,
    layer: int | None = None,
    norm: bool = True,
    batch_size: int = 8,
) -> Iterator[FeatureMap]:
    """Compute the feature maps of many photos, which are read lazily and batched by size.

    Args:
        backbone: See `feature_map`.
        photos: See `feature_map`. At most 4 batches are read ahead, and only where sizes differ.
        policy: See `feature_map`.
        layer: See `feature_map`.
        norm: See `feature_map`.
        batch_size: Most photos in one forward pass; halved by itself when memory runs out.

    Returns:
        An iterator over one map for each photo, in order.

    Raises:
        OptionError: See `feature_map`; or the batch size is below 1. Raised at once, as is `CapabilityError`; what is
            wrong with a photo is raised when it is reached.
    """
    if getattr(backbone, "training", False):
        raise OptionError("The model is in training mode, in which features are random. Call model.eval() first.")
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1, got {batch_size}.")
    call: Callable[[Tensor], RadioOutput] = _whole(backbone) if layer is None else _block(backbone, layer, norm)
    return _feature_maps(backbone, call, photos, policy, batch_size)


@dataclass(frozen=True)
class AttentionMap:
    """A photo and where the class and register tokens of a backbone look.

    Attributes:
        photo: RGB, at the size that the backbone saw, H x W pixels.
        patches: float32 [heads, P, h, w] on the CPU: attention of each prefix token to each patch.
        prefix: float32 [heads, P, P] on the CPU: to each prefix token. Both together sum to 1 for a head and token.
        num_cls_tokens: How many of the P are class tokens; they come first.
    """

    photo: Image
    patches: Tensor
    prefix: Tensor
    num_cls_tokens: int


def attention_map(backbone: Backbone, photo: Image, policy: ResizePolicy, *, layer: int = -1) -> AttentionMap:
    """Compute where the prefix tokens of a backbone look in one photo.

    Args:
        backbone: See `feature_map`; of an adaptor's view, the backbone that it shares.
        photo: See `feature_map`.
        policy: See `feature_map`.
        layer: Block, from 0, or from -1 backwards.

    Returns:
        The map.

    Raises:
        CapabilityError: The backbone does not show its attention, or not in this block.
        OptionError: There is no such block.
    """
    base: Any = backbone.radio if isinstance(backbone, RadioView) else backbone
    if not isinstance(base, HasAttention):
        raise CapabilityError(
            f"A {type(base).__name__} does not show its attention; RADIO, DINO and DINOv2 in this package's own trunk "
            "do."
        )
    ready = _ready(0, photo, backbone, policy)
    with torch.inference_mode():
        images = ready.pixels[None].to(device_of(backbone)).float().div_(255)
        found = base.prefix_attention(images, layer)[0].cpu()  # [heads, P, P + L]
    count = found.shape[1]
    grid = ready.pixels.shape[1] // base.patch_size, ready.pixels.shape[2] // base.patch_size
    patches = found[..., count:].unflatten(-1, grid)  # [heads, P, h, w]
    return AttentionMap(_photo(ready), patches.clone(), found[..., :count].clone(), base.num_cls_tokens)


def device_of(backbone: Any) -> torch.device:
    """The device of a backbone's parameters; the CPU where it has none."""
    parameters: Iterator[Tensor] = backbone.parameters() if isinstance(backbone, torch.nn.Module) else iter(())
    first = next(parameters, None)
    return torch.device("cpu") if first is None else first.device


def _feature_maps(
    backbone: Backbone,
    call: Callable[[Tensor], RadioOutput],
    photos: Iterable[Image],
    policy: ResizePolicy,
    batch_size: int,
) -> Iterator[FeatureMap]:
    ready = (_ready(i, photo, backbone, policy) for i, photo in enumerate(photos))
    batches = batches_by_shape(ready, lambda one: tuple(one.pixels.shape), batch_size, _LOOK_AHEAD * batch_size)
    device = device_of(backbone)
    found = itertools.chain.from_iterable(_run(call, batch, device) for batch in batches)
    yield from (one for _, one in in_order(found, lambda numbered: numbered[0]))


def _ready(position: int, photo: Image, backbone: Backbone, policy: ResizePolicy) -> _Ready:
    size = backbone.get_nearest_supported_resolution(*policy.target_size(photo.height, photo.width))
    return _Ready(position, policy.pixels(photo, size))


def _photo(ready: _Ready) -> Image:
    from PIL import Image

    return Image.fromarray(ready.pixels.permute(1, 2, 0).contiguous().numpy())


def _run(
    call: Callable[[Tensor], RadioOutput], batch: Sequence[_Ready], device: torch.device
) -> Iterator[tuple[int, FeatureMap]]:
    """Maps of a batch by position; in smaller passes where memory does not suffice."""
    start, most = 0, len(batch)
    while start < len(batch):
        part = batch[start : start + most]
        output = _forward(call, torch.stack([one.pixels for one in part]), device)
        if output is None:
            if most == 1:
                height, width = part[0].pixels.shape[-2:]
                raise ResolutionError(
                    f"Out of memory for one photo alone, at {height} x {width} pixels; use a smaller resolution."
                )
            most = most // 2
            continue
        for i, one in enumerate(part):
            # Copied, so that a map that is kept does not keep its whole batch.
            yield one.position, FeatureMap(_photo(one), output.features[i].clone(), output.summary[i].clone())
        start += len(part)


def _forward(call: Callable[[Tensor], RadioOutput], pixels: Tensor, device: torch.device) -> RadioOutput | None:
    """A forward pass over uint8 [B, 3, H, W]: float32 on the CPU; None if memory ran out."""
    # The exception holds the frames, and so the tensors, of the failed pass: it must be gone before the next one.
    try:
        with torch.inference_mode():
            summary, features = call(pixels.to(device).float().div_(255))  # [B, C], [B, h, w, D]
            return RadioOutput(summary.float().cpu(), features.float().cpu())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _whole(backbone: Backbone) -> Callable[[Tensor], RadioOutput]:
    def call(images: Tensor) -> RadioOutput:
        output: Any = backbone(images, feature_fmt="NHWC")
        if not isinstance(output, tuple):
            raise OptionError(
                f"The model gives {len(output)} outputs ({', '.join(output)}); take one of them: model.view(NAME)."
            )
        return RadioOutput(*output)

    return call


def _block(backbone: Any, layer: int, norm: bool) -> Callable[[Tensor], RadioOutput]:
    if isinstance(backbone, RadioView) and backbone.name == "backbone":
        backbone = backbone.radio
    if not isinstance(backbone, HasIntermediates):
        what = f"The adaptor {backbone.name!r}" if isinstance(backbone, RadioView) else f"A {type(backbone).__name__}"
        raise CapabilityError(f"{what} does not give features of its blocks, so no layer can be chosen.")
    options: dict[str, Any] = {"norm": norm, "output_fmt": "NCHW", "intermediates_only": True}
    if "stop_early" in inspect.signature(backbone.forward_intermediates).parameters:
        options["stop_early"] = True

    def call(images: Tensor) -> RadioOutput:
        maps = backbone.forward_intermediates(images, [layer], **options)[0]  # [B, D, h, w]
        return RadioOutput(maps.mean((2, 3)), maps.permute(0, 2, 3, 1))  # [B, h, w, D]

    return call
