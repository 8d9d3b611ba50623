"""The published models at full size, on the meta device, built from what is known of their training arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amradio.models.configs import ViTConfig
from amradio.models.radio import RadioModel
from amradio.weights import official
from amradio.weights.catalog import resolve

FOUR = [{"name": "clip"}, {"name": "siglip2-g"}, {"name": "dino_v2"}, {"name": "sam", "use_summary": False}]
V4 = [{"name": "siglip2-g"}, {"name": "dino_v3_7b"}, {"name": "sam3", "use_summary": False}]

# version: (architecture, teachers, register_multiple, parameters, of which conditioner values)
PUBLISHED: dict[str, tuple[str, list[dict[str, Any]], int, int, int]] = {
    "c-radio_v3-b": ("vit_base_patch16_v2_224", FOUR, 8, 98_254_854, 6),
    "c-radio_v3-l": ("vit_large_patch16_v2_224", FOUR, 8, 319_934_470, 6),
    "c-radio_v3-h": ("vit_huge_patch16_224", FOUR, 8, 651_642_886, 6),
    "c-radio_v3-g": ("vit_giant_patch16_224", FOUR, 8, 1_159_618_566, 6),
    "c-radio_v4-h": ("vit_huge_patch16_224", V4, 10, 651_645_440, 0),
    "c-radio_v4-so400m": ("vit_so400m_patch16_224", V4, 10, 431_237_232, 0),
}


def build(version: str) -> RadioModel:
    architecture, teachers, multiple, _, _ = PUBLISHED[version]
    args = {"model": architecture, "cpe_max_size": 2048, "teachers": teachers, "register_multiple": multiple}
    with torch.device("meta"):
        return RadioModel(official.describe(args, {}))


@pytest.mark.parametrize("version", PUBLISHED)
def test_parameter_count(version: str) -> None:
    model = build(version)
    *_, count, of_conditioner = PUBLISHED[version]
    conditioner = sum(b.numel() for b in model.input_conditioner.buffers())
    assert conditioner == 6
    assert sum(p.numel() for p in model.parameters()) == count - of_conditioner
    assert resolve(version).params in (None, count)


@pytest.mark.parametrize(
    ("version", "classes", "prefix", "summary_dim"),
    [
        ("c-radio_v3-b", 4, 8, 2304),
        ("c-radio_v3-l", 4, 8, 3072),
        ("c-radio_v3-h", 4, 8, 3840),
        ("c-radio_v3-g", 4, 8, 4608),
        ("c-radio_v4-h", 3, 10, 2560),
        ("c-radio_v4-so400m", 3, 10, 2304),
    ],
)
def test_prefix_tokens_and_summary(version: str, classes: int, prefix: int, summary_dim: int) -> None:
    model = build(version)
    assert model.num_cls_tokens == classes
    assert model.num_summary_tokens == prefix
    assert model.summary_dim == summary_dim
    assert model.patch_size == 16
    assert isinstance(model.model.config, ViTConfig)
    assert model.model.config.position_grid == (128, 128)


@pytest.mark.parametrize("version", PUBLISHED)
def test_only_the_v2_architectures_store_unused_register_tokens(version: str) -> None:
    model = build(version)
    stored = dict(model.named_parameters()).get("model.reg_token")
    if version in ("c-radio_v3-b", "c-radio_v3-l"):
        assert stored is not None
        assert stored.shape == (1, 4, model.embed_dim)
        assert not stored.requires_grad
    else:
        assert stored is None


def test_an_so400m_with_rounded_mlp_is_another_model() -> None:
    args = {"cpe_max_size": 2048, "teachers": V4, "register_multiple": 10}
    widths = [
        official.describe({"model": name, **args}, {}).backbone.mlp_hidden_dim  # type: ignore[union-attr]
        for name in ("vit_so400m_patch16_224", "vit_so400m_v2_patch16_224")
    ]
    assert widths == [4304, 4320]


@pytest.mark.parametrize(
    ("args", "prefix"),
    [
        ({"register_multiple": 4}, 8),  # an exact multiple gets a whole further group
        ({"register_multiple": 8}, 8),
        ({"register_multiple": 8, "cpe_num_registers": 3}, 7),
        ({"register_multiple": 0}, 4),
        ({"register_multiple": None}, 4),
        ({"cls_token_per_teacher": False, "register_multiple": 8}, 8),
        ({"cls_token_per_teacher": False}, 1),
        ({"model_kwargs": {"class_token": False, "global_pool": "avg"}, "register_multiple": 8}, 0),
    ],
)
def test_number_of_prefix_tokens(args: dict[str, Any], prefix: int) -> None:
    config = official.describe({"model": "vit_tiny_patch16_224", "cpe_max_size": 128, "teachers": FOUR, **args}, {})
    assert isinstance(config.backbone, ViTConfig)
    assert config.backbone.num_prefix_tokens == prefix
