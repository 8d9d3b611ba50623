"""A tiny SAM, a tiny SAM 3, and a tiny RADIO model with adaptors that fit them, all with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from amradio.models.configs import AdaptorConfig, HeadConfig, RadioConfig, ViTConfig
from amradio.models.radio import RadioModel

TRUNK, WIDTH = 24, 16  # of SAM's transformer, and of its neck
GRID, PATCH, PATCH3 = 8, 8, 14


def _enlarged(model: Any) -> Any:
    """Random weights as large as trained ones, so that masks are neither empty nor full."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "positional_embedding" not in name and "norm" not in name:
                nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
    return model.eval().requires_grad_(False)


def make_sam() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": TRUNK,
            "output_channels": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": GRID * PATCH,
            "patch_size": PATCH,
            "window_size": 4,
            "global_attn_indexes": [1],
            "num_pos_feats": WIDTH // 2,
            "mlp_dim": 32,
        },
        prompt_encoder_config={
            "hidden_size": WIDTH,
            "image_size": GRID * PATCH,
            "patch_size": PATCH,
            "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": WIDTH,
            "mlp_dim": 16,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
            "iou_head_depth": 2,
        },
    )
    return _enlarged(transformers.SamModel(config))


def make_sam3(scales: tuple[float, ...] = (4.0, 2.0, 1.0)) -> Any:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.Sam3TrackerConfig(
        vision_config={
            "model_type": "sam3_vision_model",
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": TRUNK,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": GRID * PATCH3,
                "patch_size": PATCH3,
                "window_size": 4,
                "global_attn_indexes": [1],
                "pretrain_image_size": GRID * PATCH3 // 2,
            },
            "fpn_hidden_size": WIDTH,
            "scale_factors": list(scales),
            "backbone_feature_sizes": [[GRID * 4] * 2, [GRID * 2] * 2, [GRID] * 2],
        },
        prompt_encoder_config={
            "hidden_size": WIDTH,
            "image_size": GRID * PATCH3,
            "patch_size": PATCH3,
            "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": WIDTH,
            "mlp_dim": 16,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
            "iou_head_depth": 2,
        },
    )
    return _enlarged(transformers.Sam3TrackerModel(config))


@pytest.fixture(scope="session")
def sam_models() -> dict[str, Any]:
    """``sam`` and ``sam3`` of transformers."""
    torch.manual_seed(1)
    return {"sam": make_sam(), "sam3": make_sam3()}


@pytest.fixture(scope="session")
def make_tracker() -> Callable[..., Any]:
    """``make_tracker(scales)``: a SAM 3 whose neck makes other maps."""
    return make_sam3


@pytest.fixture(scope="session")
def folders(sam_models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both models as `save_pretrained` writes them."""
    root = tmp_path_factory.mktemp("sams")
    for name, model in sam_models.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in sam_models}


@pytest.fixture(scope="session")
def radio() -> Callable[..., RadioModel]:
    """``radio(patch, adaptors={"sam": width}, upsample)``: a random model with adaptors of these widths."""

    def make(patch: int = PATCH, widths: dict[str, int] | None = None, upsample: int = 1) -> RadioModel:
        widths = widths or {"sam": TRUNK, "sam3": TRUNK}
        heads = {
            name: AdaptorConfig(
                head_idx=0,
                summary=HeadConfig(input_dim=16, hidden_dim=8, output_dim=8),
                features=HeadConfig(
                    input_dim=16, hidden_dim=16, output_dim=width * upsample**2, upsample_factor=upsample
                ),
            )
            for name, width in widths.items()
        }
        config = RadioConfig(
            backbone=ViTConfig(
                embed_dim=16,
                depth=2,
                num_heads=2,
                mlp_hidden_dim=32,
                patch_size=patch,
                position_grid=(GRID, GRID),
                num_cls_tokens=1,
            ),
            summary_idxs=(0,),
            adaptors=heads,
        )
        torch.manual_seed(0)
        return RadioModel(config, adaptors=list(widths)).eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def pictures() -> list[torch.Tensor]:
    """uint8 [3, H, W] of several shapes: wide, high, square, large."""
    rng = np.random.default_rng(0)
    sizes = [(50, 70), (70, 41), (64, 64), (130, 97)]
    return [torch.from_numpy(rng.integers(0, 256, (3, *size), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="session")
def prompts() -> Callable[[int, int, int], SimpleNamespace]:
    """``prompts(count, height, width)``: random points, labels and boxes inside a picture."""

    def make(count: int, height: int, width: int) -> SimpleNamespace:
        rng = np.random.default_rng(count + height)
        size = np.array([width, height])
        corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1) * size
        return SimpleNamespace(
            points=rng.uniform(0, 1, (count, 3, 2)) * size,
            labels=rng.integers(0, 2, (count, 3)),
            boxes=corners.reshape(count, 4),
        )

    return make


class ColourEncoder:
    """Mean colours of patches as features: an `ImageEncoder` whose maps can be read by eye."""

    def __init__(self, decoder: ColourDecoder, patch: int = 8) -> None:
        self.decoder, self.patch = decoder, patch
        self.side = decoder.grid * patch
        self.fill = torch.tensor([0.5, 0.25, 0.75])
        self.seen: list[torch.Tensor] = []

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.seen.append(images.clone())
        return self.decoder.embed(torch.nn.functional.avg_pool2d(images, self.patch))


class ColourDecoder:
    """A `MaskDecoder` that says what it should: a point means all patches of its colour, a box means itself."""

    name = adaptor = "colours"
    grid, prompt_side, mask_side = 16, 64, 64
    device = torch.device("cpu")

    def __init__(self, placement: str = "pad", score: float = 0.95) -> None:
        self.placement, self.score = placement, score

    def to(self, device: torch.device) -> ColourDecoder:
        return self

    def embed(self, features: torch.Tensor, *, through_neck: bool | None = None) -> tuple[torch.Tensor, ...]:
        assert features.shape[1:] == (3, self.grid, self.grid)
        return (features,)

    def __call__(self, embedding: tuple[torch.Tensor, ...], prompts: Any, multimask: bool) -> Any:
        (features,) = embedding
        found = []
        for i in range(len(prompts)):
            if prompts.boxes is not None:
                at = (torch.arange(self.mask_side) + 0.5) * self.prompt_side / self.mask_side
                x0, y0, x1, y1 = prompts.boxes[i]
                inside = ((at > x0) & (at < x1))[None, :] & ((at > y0) & (at < y1))[:, None]
            else:
                x, y = ((prompts.points[i, 0] + 0.5) * self.grid / self.prompt_side).long().tolist()
                colour = features[0, :, y, x]
                near = (features[0] - colour[:, None, None]).abs().amax(0) < 0.1  # [grid, grid]
                factor = self.mask_side // self.grid
                inside = near.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
            found.append(torch.where(inside, 10.0, -10.0)[None])
        masks = torch.stack(found) if found else torch.zeros(0, 1, self.mask_side, self.mask_side)
        if multimask:
            masks = torch.cat([masks, -masks, masks.clamp(max=-1)], 1)
        from amradio.sam.decoder import LowResMasks

        scores = torch.tensor([self.score, 0.1, 0.2])[: masks.shape[1]].expand(len(masks), -1)
        return LowResMasks(masks, scores)


@pytest.fixture(scope="session")
def colours() -> SimpleNamespace:
    """``colours.Encoder``, ``colours.Decoder``."""
    return SimpleNamespace(Encoder=ColourEncoder, Decoder=ColourDecoder)
