"""SAM's prompt encoder and mask decoder, from `transformers`, behind one protocol for SAM and SAM 3."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from amradio.errors import CapabilityError, ConfigError
from amradio.sam.frame import Placement
from amradio.sam.prompts import Prompts

Embedding = tuple[Tensor, ...]
"""What the decoder knows of pictures: feature maps [B, C, h, w], the finest first, that of the image grid last."""


class LowResMasks(NamedTuple):
    """What the decoder says to N prompts.

    Attributes:
        logits: float32 [N, M, m, m] of the whole square; above 0 is inside.
        scores: float32 [N, M]: the IoU with the true mask, as the decoder predicts it.
    """

    logits: Tensor
    scores: Tensor


class MaskDecoder(Protocol):
    """Turns the features of a picture, and prompts, into masks."""

    @property
    def name(self) -> str:
        """Whose decoder it is."""
        ...

    @property
    def adaptor(self) -> str:
        """Name of the RADIO adaptor that imitates its image encoder."""
        ...

    @property
    def grid(self) -> int:
        """Rows and columns of the feature map that it takes: 64, or 72 for SAM 3."""
        ...

    @property
    def prompt_side(self) -> int:
        """Side of the square in which prompts count: 1024, or 1008 for SAM 3."""
        ...

    @property
    def mask_side(self) -> int:
        """Side m of its masks: 256, or 288 for SAM 3."""
        ...

    @property
    def placement(self) -> Placement:
        """How pictures are put into the square."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it is."""
        ...

    def to(self, device: torch.device) -> Any:
        """Move to a device, in place; returns itself."""
        ...

    def embed(self, features: Tensor, *, through_neck: bool | None = None) -> Embedding:
        """Turn the features of an image encoder into what the decoder reads.

        Args:
            features: [B, D, grid, grid].
            through_neck: Whether SAM's own neck comes between; None decides by the width D.

        Raises:
            ConfigError: The features have another shape, or their width does not say whether the neck is needed.
        """
        ...

    def __call__(self, embedding: Embedding, prompts: Prompts, multimask: bool) -> LowResMasks:
        """Answer prompts.

        Args:
            embedding: Of one picture: each map [1, C, h, w].
            prompts: N of them, in units of `prompt_side`, on the decoder's device.
            multimask: Three masks for each prompt, as a point may mean a part or the whole; else one.
        """
        ...


class SamDecoder(nn.Module):
    """The decoder of SAM (Kirillov et al., arXiv 2304.02643), without its image encoder.

    Args:
        model: A ``transformers.SamModel``; prompt encoder and mask decoder are shared and switched to evaluation mode,
            of the neck there is a copy.
    """

    name = "sam"
    adaptor = "sam"
    placement: Placement = "pad"
    positions: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.prompt_encoder: nn.Module = model.prompt_encoder
        self.mask_decoder: nn.Module = model.mask_decoder
        self.neck: nn.Module = copy.deepcopy(model.vision_encoder.neck)
        self.grid = int(config.prompt_encoder_config.image_embedding_size)
        self.prompt_side = int(config.prompt_encoder_config.image_size)
        self.mask_side = 4 * self.grid
        self.trunk_dim = int(config.vision_config.hidden_size)
        self.embed_dim = int(config.vision_config.output_channels)
        with torch.no_grad():
            positions = model.get_image_wide_positional_embeddings()
        self.register_buffer("positions", positions, persistent=False)  # [1, C, grid, grid]
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """See `MaskDecoder`."""
        return self.positions.device

    def embed(self, features: Tensor, *, through_neck: bool | None = None) -> Embedding:
        """See `MaskDecoder`.

        Features as wide as SAM's transformer go through its neck (two convolutions); features as wide as the neck's
        output are taken as they are.
        """
        check_grid(features, self.grid)
        if through_neck is None:
            through_neck = self._needs_neck(features.shape[1])
        wanted = self.trunk_dim if through_neck else self.embed_dim
        if features.shape[1] != wanted:
            raise self._wrong_width(features.shape[1])
        x = features.to(self.positions.dtype)
        return (self.neck(x.permute(0, 2, 3, 1)),) if through_neck else (x,)  # [B, C, grid, grid]

    def forward(self, embedding: Embedding, prompts: Prompts, multimask: bool) -> LowResMasks:
        """See `MaskDecoder`."""
        (image,) = embedding
        batch = _batched(prompts, self.positions.dtype)
        sparse, dense = self.prompt_encoder(**batch)
        images = batch_size(prompts)
        logits, scores = self.mask_decoder(
            image_embeddings=image.expand(images, -1, -1, -1),
            image_positional_embeddings=self.positions.expand(images, -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
        return LowResMasks(logits.flatten(0, 1).float(), scores.flatten(0, 1).float())  # [N, M, m, m], [N, M]

    def _needs_neck(self, width: int) -> bool:
        if width == self.trunk_dim == self.embed_dim:
            raise ConfigError(
                f"Features of width {width} may be those of SAM's transformer or of its neck, which are equally wide "
                f"in this model. Say which: through_neck=True or False."
            )
        if width not in (self.trunk_dim, self.embed_dim):
            raise self._wrong_width(width)
        return width == self.trunk_dim

    def _wrong_width(self, width: int) -> ConfigError:
        return ConfigError(
            f"The image encoder gives features of width {width}. This SAM decoder takes {self.trunk_dim} (those of its "
            f"transformer, which then go through its neck) or {self.embed_dim} (those of the neck). An adaptor belongs "
            f"to the SAM that it was trained to imitate: the published ones to facebook/sam-vit-huge."
        )


class Sam3Decoder(nn.Module):
    """The decoder of SAM 3 for points, boxes and masks ("tracker"), without its image encoder.

    It reads three maps, which SAM 3's neck makes of the one that the transformer gives: with a ``sam3`` adaptor in the
    transformer's place, the rest is unchanged. Prompts in words belong to SAM 3's detector, which is not here.

    Args:
        model: A ``transformers.Sam3TrackerModel``; prompt encoder and mask decoder are shared and switched to
            evaluation mode, of the neck there is a copy.
    """

    name = "sam3"
    adaptor = "sam3"
    placement: Placement = "stretch"
    positions: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.prompt_encoder: Any = model.prompt_encoder
        self.mask_decoder: Any = model.mask_decoder
        self.neck: nn.Module = copy.deepcopy(model.vision_encoder.neck)
        self.no_memory: Tensor = model.no_memory_embedding
        self._sizes = [tuple(map(int, size)) for size in model.backbone_feature_sizes]
        self.grid, columns = map(int, self.prompt_encoder.image_embedding_size)
        self.prompt_side = int(self.prompt_encoder.input_image_size)
        self.mask_side = int(self.prompt_encoder.mask_input_size[0])
        self.trunk_dim = int(model.config.vision_config.backbone_config.hidden_size)
        if len(self._sizes) != 3 or self._sizes[-1] != (self.grid, columns) or self.grid != columns:
            raise ConfigError(
                f"This SAM 3 model has image features of the sizes {self._sizes} and prompts for a grid of "
                f"{(self.grid, columns)}; there must be three, and the last must be that grid, a square."
            )
        with torch.no_grad():
            positions = model.get_image_wide_positional_embeddings()
        self.register_buffer("positions", positions, persistent=False)  # [1, C, grid, grid]
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """See `MaskDecoder`."""
        return self.positions.device

    def embed(self, features: Tensor, *, through_neck: bool | None = None) -> Embedding:
        """See `MaskDecoder`."""
        if through_neck is False:
            raise CapabilityError(
                "The decoder of SAM 3 reads several maps that only its neck makes: features always go through it."
            )
        check_grid(features, self.grid)
        if features.shape[1] != self.trunk_dim:
            raise ConfigError(
                f"The image encoder gives features of width {features.shape[1]}, and this SAM 3 takes "
                f"{self.trunk_dim}, those of its transformer. The adaptor that imitates it is called sam3."
            )
        maps = self.neck(features.to(self.positions.dtype))[0]
        # To the coarsest map that is read, as SAM 3 was trained. Where the neck makes a coarser one still,
        # transformers' `Sam3TrackerModel` adds it there, to no effect.
        image = maps[len(self._sizes) - 1] + self.no_memory.reshape(1, -1, 1, 1)  # [B, C, grid, grid]
        return self.mask_decoder.conv_s0(maps[0]), self.mask_decoder.conv_s1(maps[1]), image

    def forward(self, embedding: Embedding, prompts: Prompts, multimask: bool) -> LowResMasks:
        """See `MaskDecoder`."""
        images = batch_size(prompts)
        batch = _batched(prompts, self.positions.dtype)
        if prompts.points is None and prompts.boxes is None:  # the decoder wants a point: one that is none
            batch["input_points"] = self.positions.new_zeros(images, 1, 1, 2)
            batch["input_labels"] = torch.full((images, 1, 1), -1, device=self.device)
        sparse, dense = self.prompt_encoder(**batch)
        maps = [m.expand(images, -1, -1, -1) for m in embedding]
        logits, scores, _, _ = self.mask_decoder(
            image_embeddings=maps[-1],
            image_positional_embeddings=self.positions.expand(images, -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
            high_resolution_features=maps[:-1],
        )
        return LowResMasks(logits.flatten(0, 1).float(), scores.flatten(0, 1).float())  # [N, M, m, m], [N, M]


def check_grid(features: Tensor, grid: int) -> None:
    """Check that features are maps of the decoder's size.

    Raises:
        ConfigError: They are not.
    """
    if features.ndim != 4 or tuple(features.shape[-2:]) != (grid, grid):
        raise ConfigError(
            f"The mask decoder takes features [B, D, {grid}, {grid}], got the shape {list(features.shape)}."
        )


def batch_size(prompts: Prompts) -> int:
    """As how many pictures the prompts are processed.

    A decoder adds a mask prompt to the features of the whole picture, so each prompt with a mask needs its own copy;
    others share one.
    """
    return 1 if prompts.masks is None else len(prompts)


def _batched(prompts: Prompts, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """The arguments of the prompt encoders: [B, N, ...], with B as `batch_size` says and B * N prompts."""
    images = batch_size(prompts)

    def shaped(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(images, -1, *values.shape[1:])

    return {
        "input_points": shaped(prompts.points),  # [B, N, K, 2]
        "input_labels": shaped(prompts.labels),  # [B, N, K]
        "input_boxes": shaped(prompts.boxes),  # [B, N, 4]
        "input_masks": None if prompts.masks is None else prompts.masks[:, None].to(dtype),  # [B, 1, m, m]
    }
