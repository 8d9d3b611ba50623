"""Going through data that wrappers are fitted on: sets of pictures, data loaders, lists."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.errors import ImageError, OptionError
from amradio.fungi.hashing import image_keys, uniform

if TYPE_CHECKING:
    from amradio.backbones.protocol import Backbone
    from amradio.features.runner import ExtractOptions
    from amradio.images.resize import ResizePolicy


def support_rows(
    backbone: Backbone,
    data: Any,
    patches_per_image: int | None,
    seed: int,
    policy: ResizePolicy | None = None,
    options: ExtractOptions | None = None,
) -> Tensor:
    """Unit patch features of pictures; see `amradio.fungi.dense.DenseFungiBackbone.fit`.

    Returns:
        float32 [M, D] on the CPU.

    Raises:
        OptionError: There are none, or some are NaN or infinite.
    """
    from amradio.images.dataset import ImageSet

    if patches_per_image is not None and patches_per_image < 1:
        raise OptionError(f"patches_per_image must be at least 1, got {patches_per_image}.")
    found = _of_set(backbone, data, policy, options) if isinstance(data, ImageSet) else _of_batches(backbone, data)
    rows = []
    for images, features in found:  # [B, 3, H, W], [B, L, D]
        features = F.normalize(features.float(), dim=-1)
        if patches_per_image is not None and patches_per_image < features.shape[1]:
            order = uniform(image_keys(images, seed), features.shape[1]).argsort(dim=1)  # [B, L]
            chosen = order[:, :patches_per_image, None].to(features.device)
            features = features.gather(1, chosen.expand(-1, -1, features.shape[2]))
        rows.append(features.flatten(0, 1).cpu())
    if not rows:
        raise OptionError("There are no pictures to fit on.")
    result: Tensor = torch.cat(rows)
    if not bool(torch.isfinite(result).all()):
        raise OptionError("Some patch features are NaN or infinite; half precision overflows in some models.")
    return result


def image_batches(batches: Iterable[Any]) -> Iterator[Tensor]:
    """The images [B, 3, H, W] of batches that may be tuples with labels and the like.

    Raises:
        OptionError: A batch is something else.
    """
    for batch in batches:
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            found = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise OptionError(f"Batches are images [B, 3, H, W] in [0, 1], got {found}.")
        yield images


def pictures(data: Any, count: int | None = None) -> Iterator[Tensor]:
    """Single pictures from whatever holds them.

    Args:
        data: An iterable of pictures, such as a set of pictures: `amradio.images.ImageSource`, PIL images, tensors
            [3, H, W] (uint8, or in [0, 1]), batches of such tensors, or tuples whose first member is one of these.
        count: At most so many; None: all.

    Yields:
        uint8 [3, H, W] on the CPU. Sources that cannot be decoded are left out.

    Raises:
        OptionError: A picture is something else.
    """
    yield from itertools.islice(itertools.chain.from_iterable(map(_singles, data)), count)


def as_picture(item: Any) -> Tensor:
    """One picture as uint8 [3, H, W] on the CPU.

    Raises:
        OptionError: It is neither a PIL image nor such a tensor.
    """
    from PIL.Image import Image

    from amradio.images.decode import to_uint8_tensor

    if isinstance(item, Image):
        return to_uint8_tensor(item.convert("RGB"))
    if isinstance(item, Tensor) and item.ndim == 3 and item.shape[0] == 3:
        levels: Tensor = (
            item.detach() if item.dtype == torch.uint8 else (item.detach().float() * 255).round().clamp(0, 255)
        )
        return levels.to("cpu", torch.uint8)
    found = f"a tensor {item.dtype} {list(item.shape)}" if isinstance(item, Tensor) else type(item).__name__
    raise OptionError(f"A picture is a PIL image or a tensor [3, H, W], got {found}.")


def _singles(item: Any) -> Iterator[Tensor]:
    from amradio.images.decode import MAX_PIXELS, WHITE

    if isinstance(item, (tuple, list)) and item:
        item = item[0]
    if isinstance(item, Tensor) and item.ndim == 4:
        yield from map(as_picture, item)
    elif hasattr(item, "decode") and hasattr(item, "location"):
        try:
            yield as_picture(item.decode(max_pixels=MAX_PIXELS, background=WHITE))
        except ImageError:  # as everywhere, one broken picture stops nothing; the evaluation itself reports it
            return
    else:
        yield as_picture(item)


def _of_set(
    backbone: Any, images: Any, policy: ResizePolicy | None, options: ExtractOptions | None
) -> Iterator[tuple[Tensor, Tensor]]:
    from amradio.features.extract import extract
    from amradio.features.runner import ExtractOptions
    from amradio.images.resize import ResizePolicy

    policy = policy or ResizePolicy.parse(backbone.preferred_resolution, multiple=backbone.min_resolution_step)
    options = options or ExtractOptions(device=next(backbone.parameters()).device)
    for record in extract(images, backbone, policy, options):
        if record.ok and record.image is not None:
            features = record.outputs["backbone"].features.flatten(1).T[None]  # [1, L, D]
            yield record.image[None].float() / 255, features


def _of_batches(backbone: Any, data: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(backbone.parameters()).device
    for images in image_batches(data):
        with torch.inference_mode():
            yield images, backbone(images.to(device)).features
