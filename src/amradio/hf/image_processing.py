"""Pictures to tensors for transformers: the same pixels as everywhere in this package, without torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from amradio.errors import ImageError, OptionError
from amradio.hf.configuration import AmradioConfig
from amradio.hf.library import BatchFeature, ImagesKwargs, PilBackend
from amradio.images.resize import ResizePolicy

_BYTE = 255
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC
_REFUSED = ("do_normalize", "do_center_crop", "do_pad")


class AmradioImagesKwargs(ImagesKwargs, total=False):  # type: ignore[misc,call-arg]
    """The options of `AmradioImageProcessor` besides those of every image processor."""

    resize_mode: str | None
    size_multiple: int | None


class AmradioImageProcessor(PilBackend):  # type: ignore[misc]
    """Resize and scale to [0, 1]; the model itself standardises.

    Args:
        size: ``{"height": h, "width": w}``, or ``{"shortest_edge": n}`` or ``{"longest_edge": n}`` in pixels.
        resize_mode: A mode of `amradio.images.resize.ResizePolicy`; default ``crop`` for a height and width (scale to
            cover them, cut out the centre).
        size_multiple: What both sides are rounded to a multiple of: the model's resolution step.
        do_resize: Whether to resize at all.
        do_rescale: Whether to map bytes to [0, 1].
        do_convert_rgb: Whether to convert to RGB.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]
    valid_kwargs = AmradioImagesKwargs
    size: ClassVar[dict[str, int]] = {"height": 224, "width": 224}
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = False
    do_convert_rgb = True
    resample = _BICUBIC
    resize_mode: str | None = None
    size_multiple = 1

    @classmethod
    def from_config(cls, config: AmradioConfig) -> AmradioImageProcessor:
        """The processor that suits a model.

        Args:
            config: The model's config; its ``image_size`` is the size.

        Returns:
            The processor.
        """
        side = config.image_size
        height, width = [side, side] if isinstance(side, int) else list(side or ())
        step = 32 if config.is_hybrid else config.patch_size * (config.vitdet_window_size or 1)
        return cls(size={"height": int(height), "width": int(width)}, size_multiple=step)

    def policy(self, size: Any, resize_mode: str | None, size_multiple: int | None) -> ResizePolicy:
        """The rule that sizes follow.

        Args:
            size: See the class.
            resize_mode: See the class.
            size_multiple: See the class.

        Returns:
            The rule.

        Raises:
            OptionError: The size does not suit the mode.
        """
        named = {k: v for k, v in dict(size or {}).items() if v is not None}
        numbers: tuple[int, ...] = tuple(named.values())
        if set(named) == {"height", "width"}:
            numbers, default = (named["height"], named["width"]), "crop"
        elif set(named) in ({"shortest_edge"}, {"longest_edge"}):
            default = next(iter(named)).removesuffix("_edge")
        else:
            raise OptionError(
                f"size must be {{'height': h, 'width': w}}, {{'shortest_edge': n}} or {{'longest_edge': n}}, got "
                f"{named}."
            )
        mode: Any = resize_mode or default
        return ResizePolicy(mode, () if mode == "nearest" else numbers, size_multiple or 1)

    def _preprocess(
        self,
        images: Sequence[np.ndarray],
        do_resize: bool,
        do_rescale: bool,
        size: Any,
        resize_mode: str | None = None,
        size_multiple: int | None = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> Any:
        given = [name for name in _REFUSED if options.get(name)]
        if given or options.get("resample") not in (None, _BICUBIC):
            got = ", ".join([*(f"{name}=True" for name in given), f"resample={options.get('resample')}"])
            raise OptionError(
                "The image processor resizes with a bicubic filter (resample=3) and maps bytes to [0, 1]; the model "
                f"itself standardises. Got {got}. To cut out the centre, use resize_mode='crop'."
            )
        policy = self.policy(size, resize_mode, size_multiple) if do_resize else None
        values = [_pixels(image, policy, do_rescale) for image in images]
        return BatchFeature(data={"pixel_values": values}, tensor_type=return_tensors)


def _pixels(image: np.ndarray, policy: ResizePolicy | None, rescale: bool) -> np.ndarray:
    """One picture, uint8 [3, h, w], as the model takes it: float32 [3, H, W] in [0, 1], or bytes without `rescale`."""
    if image.dtype != np.uint8:
        raise ImageError(
            f"The image processor takes pictures as bytes (uint8) or PIL images, got {image.dtype}. Tensors in [0, 1] "
            f"need no processor: give them to the model as pixel_values."
        )
    if policy is not None:
        from PIL import Image

        resized = policy.apply(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))))
        image = np.asarray(resized).transpose(2, 0, 1)  # [3, H, W]
    return image.astype(np.float32) / _BYTE if rescale else np.ascontiguousarray(image)
