"""Dense FUNGI against the numbers of the original code, for every variant that was recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.fungi import DenseConfig, DenseFungiBackbone, SupportIndex
from amradio.fungi.heads import Head
from amradio.fungi.projections import SignProjection
from amradio.fungi.support import interleave

STD = (0.229, 0.224, 0.255)
CASES = (
    "B_dense_layerscale",
    "B_dense_p16_b1",
    "B_dense_p16_b2",
    "B_dense_p8_b1",
    "B_dense_registers_in",
    "B_dense_registers_out",
)


def wrapped(case: Any, model: Any, negatives: str, denominator: str, precision: str) -> DenseFungiBackbone:
    settings = case.settings
    config = DenseConfig(
        layer=settings["layer"].removeprefix("m."),
        latent_dim=settings["latent"],
        negatives_per_token=settings["negatives_per_token"],
        keep=settings["keep_probability"],
        temperature=settings["tau"],
        negatives=negatives,
        denominator=denominator,
        loss_dtype="float16" if precision == "fp16loss" else "float32",
        loss_tokens="all" if settings["loss_tokens"].startswith("all") else "no-registers",
    )
    return DenseFungiBackbone(
        model,
        config,
        support=SupportIndex(case["memory"], neighbours=settings["K_index"]),
        head=Head(case["head_weight"], case["head_bias"]),
        projection=SignProjection(case.signs(model.embed_dim)),
    )


def uniforms(case: Any, backbone: DenseFungiBackbone, images: Tensor) -> Tensor:
    if "keep_uniform" in case:
        return case["keep_uniform"]
    tokens = case["neighbour_idx"].shape[1]
    return torch.zeros(len(images), tokens * backbone.config.negatives_per_token)


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_neighbours(name: str, hbird_golden: Any, hbird_model: Any) -> None:
    case = hbird_golden(name)
    model = hbird_model(case.settings["model"], STD)
    images = case["images_u8"].float() / 255
    found = wrapped(case, model, "neighbours", "raw", "fp32")._split(images)
    tokens = torch.cat([found.prefix, found.patches], dim=1)
    case.check("tokens", tokens)
    case.check("proj_input", found.inputs)
    k, count = case.settings["K_index"], case.settings["negatives_per_token"]
    if name == "B_dense_registers_out":
        tokens = tokens[:, [0, *range(5, tokens.shape[1])]]
    support = SupportIndex(case["memory"], neighbours=k)
    neighbours = support.find(tokens.flatten(0, 1), k)
    case.check("neighbour_idx", neighbours.indices.view(*tokens.shape[:2], k))
    case.check("neighbour_scores", neighbours.scores.view(*tokens.shape[:2], k))
    first = tokens[0, case.settings["gradient_tokens"][0] - (4 if name == "B_dense_registers_out" else 0)][None]
    case.check("interleaved_first_token", support.negatives(first, count, "interleaved")[0][0])
    case.check("true_neighbours_first_token", support.negatives(first, count, "neighbours")[0][0])


@pytest.mark.parametrize(
    ("name", "negatives", "denominator", "precision"),
    [
        (name, *variant.split("/"))
        for name in CASES
        for variant in (
            "interleaved/raw/fp32",
            "interleaved/raw/fp16loss",
            "interleaved/tempered/fp32",
            "neighbours/raw/fp32",
            "neighbours/tempered/fp32",
        )
    ],
)
def test_every_variant(
    name: str, negatives: str, denominator: str, precision: str, hbird_golden: Any, hbird_model: Any
) -> None:
    case = hbird_golden(name)
    variant = f"{negatives}.{denominator}.{precision}"
    if f"{negatives}/{denominator}/{precision}" not in case.settings["variants"]:
        assert f"{variant}.b" not in case
        return
    model = hbird_model(case.settings["model"], STD)
    backbone = wrapped(case, model, negatives, denominator, precision)
    images = case["images_u8"].float() / 255
    drawn = uniforms(case, backbone, images)
    found = backbone.gradients(images, drawn)
    patches = found.patches.shape[1]
    for i in range(len(images)):
        if f"{variant}.negative_latents_{i}" in case:
            case.check(f"{variant}.negative_latents_{i}", found.negative_latents[i][found.kept[i]])
    if precision != "fp16loss":
        case.check_value(f"{variant}.loss", found.losses)
    _check_rows(case, f"{variant}.b", found.upstream)
    inputs = backbone._split.shape.augmented(found.inputs)
    chosen = [t - case.settings["prefix_tokens"] for t in case.settings["gradient_tokens"]]
    case.check(f"{variant}.grad_tokens_image0", found.upstream[0, chosen][:, :, None] * inputs[0, chosen][:, None])
    projected = backbone.project(found)
    case.check(f"{variant}.projected", projected)
    case.check(f"{variant}.projected_normalised", F.normalize(projected, dim=-1))
    output = backbone(images, uniforms=drawn)
    case.check(f"{variant}.features", output.features)
    assert output.features.shape == (len(images), patches, backbone.embed_dim)


def _check_rows(case: Any, name: str, patches: Tensor) -> None:
    """Compare the rows of patches, which are all that is returned; the others are checked by the loss and its sum."""
    prefix = case.settings["prefix_tokens"]
    whole = case[name].clone()
    whole[:, prefix:] = patches
    case.check(name, whole)


def test_the_published_index_mixes_its_neighbours() -> None:
    rows = torch.arange(2 * 3 * 4).view(2, 3, 4)
    mixed = interleave(rows)
    flat = rows.flatten(1)
    for j in range(3):
        assert torch.equal(mixed[:, j], flat[:, j::3])
    assert torch.equal(interleave(rows[:, :1]), rows[:, :1])
