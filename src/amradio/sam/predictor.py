"""Masks for prompts: pictures are encoded once, then asked as often as wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from amradio.backbones.protocol import Backbone
from amradio.errors import ImageError, OptionError
from amradio.images.decode import to_uint8_tensor
from amradio.sam.decoder import Embedding, LowResMasks, MaskDecoder
from amradio.sam.encoder import BackboneEncoder, ImageEncoder
from amradio.sam.frame import Frame
from amradio.sam.prompts import ArrayLike, Prompts, make_prompts

if TYPE_CHECKING:
    from PIL.Image import Image

_RESTORED_AT_ONCE = 16  # masks at the size of the encoder's input: 4 MB each at 1024 pixels


class PreparedImage(NamedTuple):
    """A picture as the encoder is to see it.

    Attributes:
        pixels: uint8 [3, h, w], of the size `Frame.inner`.
        frame: Its place in the encoder's square.
    """

    pixels: Tensor
    frame: Frame


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """A picture as the decoder sees it.

    Attributes:
        frame: Its place in the encoder's square.
        embedding: Maps [1, C, h, w].
    """

    frame: Frame
    embedding: Embedding


@dataclass(frozen=True, eq=False)
class MaskPrediction:
    """Masks for N prompts; M is 3 with ``multimask``, else 1.

    Attributes:
        masks: bool [N, M, H, W], at the size of the picture.
        scores: float32 [N, M]: the IoU with the true mask, as the decoder predicts it.
        logits: float32 [N, M, m, m] of the whole square: what another prompt can start from.
    """

    masks: Tensor
    scores: Tensor
    logits: Tensor

    def best(self) -> MaskPrediction:
        """Of each prompt's masks the one with the highest score: M becomes 1."""
        chosen = self.scores.argmax(1)[:, None]  # [N, 1]
        rows = torch.arange(len(chosen), device=chosen.device)[:, None]
        return MaskPrediction(self.masks[rows, chosen], self.scores[rows, chosen], self.logits[rows, chosen])


class SamPredictor:
    """SAM with any image encoder.

    Args:
        encoder: A backbone with the features that the decoder expects, such as the view of a ``sam`` adaptor, or an
            `ImageEncoder`.
        decoder: See `amradio.sam.load_sam`. It must be on the encoder's device.
        autocast: Mixed precision for the encoder; the decoder computes in its own dtype.
        chunk: Most prompts that are decoded together.

    Raises:
        ResolutionError: The backbone does not take images of the size that the decoder asks for.
    """

    def __init__(
        self,
        encoder: Backbone | ImageEncoder,
        decoder: MaskDecoder,
        *,
        autocast: torch.dtype | None = None,
        chunk: int = 64,
    ) -> None:
        if chunk < 1:
            raise OptionError(f"chunk must be at least 1, got {chunk}.")
        self.encoder: ImageEncoder = BackboneEncoder(encoder, decoder) if isinstance(encoder, Backbone) else encoder
        self.decoder = decoder
        self._autocast, self._chunk = autocast, chunk

    def prepare(self, picture: Image | Tensor) -> PreparedImage:
        """Resize a picture; apart from `encode` so that threads can do it.

        Args:
            picture: In RGB, as `amradio.images.decode` gives it, or uint8 [3, H, W].

        Returns:
            Its pixels, resized with Pillow's antialiased bilinear filter as SAM's are, and its place.

        Raises:
            ImageError: The picture is neither.
        """
        from PIL.Image import Resampling

        image = _as_picture(picture)
        frame = Frame.of(image.height, image.width, self.encoder.side, self.decoder.placement)
        height, width = frame.inner
        if (image.height, image.width) != frame.inner:
            image = image.resize((width, height), Resampling.BILINEAR)
        return PreparedImage(to_uint8_tensor(image), frame)

    def encode(self, picture: Image | Tensor) -> EncodedImage:
        """Encode one picture; see `encode_batch`."""
        return self.encode_batch([self.prepare(picture)])[0]

    @torch.inference_mode()
    def encode_batch(self, pictures: Sequence[PreparedImage]) -> list[EncodedImage]:
        """Encode pictures in one forward pass.

        Args:
            pictures: From `prepare`; their sizes may differ, as each fills the same square.

        Returns:
            One for each. Padding is 0 after the encoder's own normalisation.
        """
        device, side = self.decoder.device, self.encoder.side
        canvas = self.encoder.fill.to(device).view(1, 3, 1, 1).repeat(len(pictures), 1, side, side)  # [B, 3, S, S]
        for i, (pixels, frame) in enumerate(pictures):
            canvas[i, :, : frame.inner[0], : frame.inner[1]] = pixels.to(device).float() / 255
        with torch.autocast(device.type, self._autocast, enabled=self._autocast is not None):
            maps = self.encoder(canvas)
        return [EncodedImage(p.frame, tuple(m[i : i + 1] for m in maps)) for i, p in enumerate(pictures)]

    def prompts(
        self,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        boxes: ArrayLike | None = None,
        masks: ArrayLike | None = None,
    ) -> Prompts:
        """Check prompts; see `predict`."""
        return make_prompts(points, labels, boxes, masks, self.decoder.mask_side)

    @torch.inference_mode()
    def decode(self, image: EncodedImage, prompts: Prompts, multimask: bool = True) -> LowResMasks:
        """Answer prompts with masks of the whole square.

        Args:
            image: From `encode`.
            prompts: In pixels of the picture; all of them are decoded together.
            multimask: See `predict`.
        """
        side, frame = self.decoder.prompt_side, image.frame
        points, boxes = prompts.points, prompts.boxes
        placed = Prompts(
            points=None if points is None else frame.to_square(points, side),
            labels=prompts.labels,
            boxes=None if boxes is None else frame.to_square(boxes.view(-1, 2, 2), side).view(-1, 4),
            masks=prompts.masks,
        )
        return self.decoder(image.embedding, placed.to(self.decoder.device), multimask)

    @torch.inference_mode()
    def predict(
        self,
        image: EncodedImage | Image | Tensor,
        *,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        boxes: ArrayLike | None = None,
        masks: ArrayLike | None = None,
        multimask: bool = True,
    ) -> MaskPrediction:
        """Segment what prompts point at. Prompts of several kinds go together one by one: point i with box i.

        Args:
            image: From `encode`, or a picture.
            points: [N, K, 2] x and y in pixels of the picture: K points for each of N objects.
            labels: [N, K] 1 for a point on the object, 0 for one beside it, -1 for none, to fill up; default all 1.
            boxes: [N, 4] x0, y0, x1, y1 in pixels of the picture.
            masks: [N, m, m] logits of an earlier prediction, such as ``found.best().logits[:, 0]``.
            multimask: Three masks for each prompt, which suits a single point, that may mean a part or the whole; False
                gives one, which suits boxes and several points.

        Returns:
            Masks at the size of the picture, on the decoder's device.

        Raises:
            OptionError: The prompts are not of these shapes, or there are none.
        """
        prompts = self.prompts(points, labels, boxes, masks)
        encoded = image if isinstance(image, EncodedImage) else self.encode(image)
        parts = []
        for start in range(0, len(prompts), self._chunk):
            low = self.decode(encoded, prompts[start : start + self._chunk], multimask)
            parts.append((threshold(encoded.frame, low.logits), low.scores, low.logits))
        found, scores, logits = (torch.cat(values) for values in zip(*parts, strict=True))
        return MaskPrediction(found, scores, logits)


def threshold(frame: Frame, logits: Tensor) -> Tensor:
    """Turn logits of the square [N, M, m, m] into masks of the picture, bool [N, M, H, W], a few at a time."""
    flat = logits.flatten(0, 1)  # [N*M, m, m]
    masks = torch.cat([frame.restore(part) > 0 for part in flat.split(_RESTORED_AT_ONCE)])
    return masks.view(*logits.shape[:2], *frame.size)


def _as_picture(picture: Any) -> Image:
    from PIL import Image as ImageModule

    if isinstance(picture, ImageModule.Image):
        if picture.mode != "RGB":
            raise ImageError(f"Expected an RGB picture as `amradio.images.decode` gives it, got mode {picture.mode!r}.")
        return picture
    if isinstance(picture, Tensor) and picture.dtype == torch.uint8 and picture.ndim == 3 and len(picture) == 3:
        return ImageModule.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
    what = f"{picture.dtype} {list(picture.shape)}" if isinstance(picture, Tensor) else type(picture).__name__
    raise ImageError(f"Expected an RGB picture or uint8 [3, H, W], got {what}.")
