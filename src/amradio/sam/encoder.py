"""Image encoders for SAM's decoder: any backbone whose feature map has the right shape, and SAM's own."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from amradio.backbones.protocol import Backbone
from amradio.errors import OptionError, ResolutionError
from amradio.models.configs import Resolution
from amradio.models.normalizers import InputConditioner
from amradio.models.output import RadioOutput, arrange, check_feature_fmt
from amradio.models.radio import RadioModel
from amradio.models.view import RadioView
from amradio.sam.decoder import Embedding, MaskDecoder
from amradio.weights.checkpoint import Identity

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageEncoder(Protocol):
    """Squares in, what the mask decoder reads out: for SAM one map [B, 256, 64, 64]."""

    @property
    def side(self) -> int:
        """Height and width of its input in pixels."""
        ...

    @property
    def fill(self) -> Tensor:
        """float32 [3]: the colour in [0, 1] that its own normalisation makes 0; padding has it."""
        ...

    def __call__(self, images: Tensor) -> Embedding:
        """Encode images [B, 3, side, side] in [0, 1]."""
        ...


class BackboneEncoder:
    """A backbone in the place of SAM's image encoder.

    Its input is as large as makes its feature map fill the decoder's grid: 64 patches of 16 pixels are SAM's 1024, of
    14 pixels 896. ViTDet windows are the backbone's own affair (``vitdet_window_size=16`` suits 64 patches).

    Args:
        backbone: Such as the view of a ``sam`` adaptor: ``amradio.load_backbone("radio_v2.5-h", adaptor="sam")``.
        decoder: Whose grid is filled.
        through_neck: See `MaskDecoder.embed`; None decides by the width of the features.

    Raises:
        ResolutionError: The backbone does not take the size that the grid asks for.
        OptionError: The backbone's normalisation was taken out of it.
    """

    def __init__(self, backbone: Backbone, decoder: MaskDecoder, through_neck: bool | None = None) -> None:
        self.backbone, self.decoder = backbone, decoder
        self.side = decoder.grid * backbone.patch_size
        if through_neck is None and isinstance(backbone, SamVision):
            through_neck = backbone.needs_neck
        self.through_neck = through_neck
        self.fill = _fill(backbone)
        if self.side % backbone.min_resolution_step:
            raise ResolutionError(
                f"{decoder.grid} x {decoder.grid} features of {backbone.patch_size} pixels take images of {self.side} "
                f"pixels, and this backbone takes multiples of {backbone.min_resolution_step} only. The side of ViTDet "
                f"windows must divide {decoder.grid}: {_divisors(decoder.grid)}."
            )

    def __call__(self, images: Tensor) -> Embedding:
        """See `ImageEncoder`."""
        if tuple(images.shape[1:]) != (3, self.side, self.side):
            raise ResolutionError(
                f"The image encoder takes [B, 3, {self.side}, {self.side}], got the shape {list(images.shape)}."
            )
        features = self.backbone(images, feature_fmt="NCHW").features
        return self.decoder.embed(features, through_neck=self.through_neck)


class SamVision(nn.Module):
    """SAM's own image encoder as a backbone, to compare with: its summary is the mean of its features.

    Args:
        model: A ``transformers.SamModel`` or ``Sam3TrackerModel``; its encoder is shared, and switched to evaluation
            mode.
        source: Where it came from, for reports.

    Attributes:
        needs_neck: Whether its features still have to go through the neck: those of SAM have, those of SAM 3 have not.
        identity: For reports.
    """

    def __init__(self, model: Any, source: str = "transformers") -> None:
        super().__init__()
        vision = model.config.vision_config
        self.identity = Identity(source=source, layout="transformers")
        self.needs_neck = hasattr(vision, "backbone_config")  # SAM 3
        trunk = vision.backbone_config if self.needs_neck else vision
        self.encoder: Any = model.vision_encoder.backbone if self.needs_neck else model.vision_encoder
        self.patch_size = self.min_resolution_step = int(trunk.patch_size)
        self.embed_dim = self.summary_dim = int(trunk.hidden_size if self.needs_neck else vision.output_channels)
        self.preferred_resolution = Resolution(int(trunk.image_size), int(trunk.image_size))
        # Of the published image processors.
        halves = (0.5, 0.5, 0.5)
        mean, std = (halves, halves) if self.needs_neck else (IMAGENET_MEAN, IMAGENET_STD)
        self.input_conditioner = InputConditioner(mean, std)
        self.eval().requires_grad_(False)

    def get_nearest_supported_resolution(self, height: int, width: int) -> Resolution:
        """The one size that it takes."""
        return self.preferred_resolution

    def forward(self, images: Tensor, feature_fmt: str = "NLC") -> RadioOutput:
        """Encode images [B, 3, S, S] in [0, 1], S its one size.

        Raises:
            ResolutionError: They have another size.
        """
        check_feature_fmt(feature_fmt)
        if tuple(images.shape[-2:]) != self.preferred_resolution:
            raise ResolutionError(
                f"SAM's own image encoder takes {self.preferred_resolution[0]} x {self.preferred_resolution[1]} pixels "
                f"only, got {images.shape[-2]} x {images.shape[-1]}."
            )
        pixels = self.input_conditioner(images).to(next(self.encoder.parameters()).dtype)
        found = self.encoder(pixels).last_hidden_state
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        if self.needs_neck:  # tokens [B, L, D]
            return RadioOutput(found.mean(1), arrange(found, grid, feature_fmt))
        summary = found.mean((2, 3))  # [B, D]
        return RadioOutput(summary, found if feature_fmt == "NCHW" else arrange(found.flatten(2).mT, grid, feature_fmt))


def _fill(backbone: Any) -> Tensor:
    """The colour that a backbone's normalisation makes 0: SAM pads after normalising, whoever's that is."""
    owner = backbone.radio if isinstance(backbone, RadioView) else backbone
    conditioner = getattr(owner, "input_conditioner", None)
    if isinstance(conditioner, InputConditioner):
        return conditioner.norm_mean.detach().reshape(3).float()
    if isinstance(owner, RadioModel):
        raise OptionError(
            "The model's preprocessor was made external, and pictures would reach it without being normalised. Load "
            "the model anew."
        )
    return torch.tensor(IMAGENET_MEAN)


def _divisors(grid: int) -> str:
    return ", ".join(str(n) for n in range(2, grid) if grid % n == 0)
