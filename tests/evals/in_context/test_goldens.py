"""Values of the published code, from stored inputs to stored outputs, through our functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from amradio.evals.in_context import InContextConfig, get_protocol
from amradio.evals.in_context.build import unit_rows
from amradio.evals.in_context.memory import MemoryBank, patch_counts, sampling_scores
from amradio.evals.in_context.metrics import Confusion, iou, match, mean_iou, renamed
from amradio.evals.in_context.propagate import label_map
from amradio.evals.in_context.score import Memory
from amradio.evals.in_context.transforms import Change, apply_jitter, resize_exactly, resize_mask, resize_picture

UNLIMITED = ["A_voc_p16", "A_ade_p8", "A_cityscapes_p8"]
LIMITED = ["A_voc_p16_mem100_hb2", "A_voc_p16_mem100_fhb", "A_voc_p16_mem130_hb2", "A_voc_p16_mem130_fhb"]
IMAGENET_MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
HBIRD_STD = torch.tensor((0.229, 0.224, 0.255)).view(3, 1, 1)


def tokens(model: Any, images: Tensor) -> Tensor:
    return model(images).features  # [B, P, D]


def bank(case: Any, model: Any, unconditioned: Callable[[Tensor], Tensor]) -> MemoryBank:
    """The memory of a case: from its augmented pictures, masks and noise."""
    settings, inputs = case.settings, case.inputs
    pixels, masks = inputs["train_x"].flatten(0, 1), inputs["train_y"].flatten(0, 1)
    features, finite = unit_rows(tokens(model, unconditioned(pixels)), normalise=True)
    assert finite.all()
    counts = patch_counts(masks, settings["patch"], settings["C"], "class-0")  # [B, P, C]
    if settings["memory_size"] is None:
        chosen = torch.arange(counts.shape[1]).expand(len(counts), -1)
    else:
        order = sampling_scores(counts, case["noise"].flatten(0, 1)).argsort(dim=1, stable=True)
        chosen = order[:, : settings["k_img"]]
        case.check("sampled_patches", chosen)
    spread = chosen[..., None]
    found = MemoryBank(
        features=features.gather(1, spread.expand(-1, -1, features.shape[2])).flatten(0, 1),
        counts=counts.gather(1, spread.expand(-1, -1, counts.shape[2])).flatten(0, 1),
        item=torch.arange(len(counts), dtype=torch.int32).repeat_interleave(chosen.shape[1]),
        patch=chosen.flatten().int(),
        rank=torch.arange(chosen.shape[1], dtype=torch.int32).repeat(len(counts)),
        pictures=torch.zeros(len(counts), 8, dtype=torch.int32),
        jitter=torch.zeros(len(counts), 4),
    )
    return found.padded(settings.get("rows", 0))


def check_segmentation(case: Any, memory: MemoryBank, queries: Tensor, prefix: str, k: int, temperature: float) -> None:
    """Search, attention, labels, label maps and scores of a case."""
    inputs, classes = case.inputs, case.settings["C"]
    searched = Memory(None, memory, InContextConfig(k=k, temperature=temperature), None, torch.device("cpu"))
    flat = queries.flatten(0, 1)  # [Q, D]
    found = searched.find(flat)
    case.check(f"{prefix}topk_scores", found.scores)
    spare = bool((memory.item < 0).any())  # all-zero rows tie, and are interchangeable
    if not spare:
        assert torch.equal(found.indices.sort(1).values, case[f"{prefix}topk_idx"].long().sort(1).values)
    weights, labels = searched.vote(flat, found)
    case.check(f"{prefix}attention", weights)
    case.check(f"{prefix}label_hat", labels.view(len(queries), -1, classes))
    side = int(queries.shape[1] ** 0.5)
    size = tuple(inputs["val_y"].shape[1:])
    maps = torch.stack(
        [label_map(own.view(side, side, classes), size) for own in labels.view(len(queries), -1, classes)]
    )
    safe = case[f"{prefix}pred_safe"].bool()
    assert torch.equal(maps[safe], case[f"{prefix}pred"][safe])

    atol = case.value(f"{prefix}miou_atol_end_to_end")
    confusion = Confusion(classes, case.settings.get("ignore_index", 255))
    for truth, predicted in zip(inputs["val_y"], maps, strict=True):
        confusion.update(truth, predicted)
    case.check_value(f"{prefix}miou_hungarian", mean_iou(confusion.counts, "hungarian"), max(atol, 1e-6))
    case.check_value(f"{prefix}miou_plain_all", mean_iou(confusion.counts, "all"), max(atol, 1e-6))

    stored = Confusion(classes, case.settings.get("ignore_index", 255))
    stored.update(inputs["val_y"], case[f"{prefix}pred"])
    check_scores(case, stored, prefix)


def check_scores(case: Any, confusion: Confusion, prefix: str) -> None:
    counts = confusion.counts
    for kind, name in (("hungarian", "miou_hungarian"), ("all", "miou_plain_all"), ("present", "miou_plain_present")):
        if f"{prefix}{name}" in case.case["values"]:
            case.check_value(f"{prefix}{name}", mean_iou(counts, kind))
    if "pixels_scored" in case.case["values"]:
        case.check_value("pixels_scored", int(counts.sum()))
    if "pixels_pred_class0_scored" in case.case["values"]:
        case.check_value("pixels_pred_class0_scored", int(counts[:, 0].sum()))
    if "confusion" in case:
        case.check("confusion", counts)
    if "confusion_sparse" in case:
        pairs = counts.nonzero()
        case.check("confusion_sparse", torch.cat([pairs, counts[tuple(pairs.T)][:, None]], 1))
    if "iou_per_class" in case:
        case.check("iou_per_class", iou(counts).float())
        matched = match(counts, "hungarian")
        pair_iou = counts / (counts.sum(1, keepdim=True) + counts.sum(0) - counts).clamp(min=1)  # [true, predicted]
        useful = pair_iou[matched, torch.arange(len(counts))] > 0
        assert torch.equal(matched[useful].int(), case["hungarian_map"][useful])


@pytest.mark.parametrize("name", UNLIMITED)
def test_all_patches(name: str, hbird_golden: Any, hbird_model: Any, unconditioned: Any) -> None:
    case = hbird_golden(name)
    model, settings = hbird_model(case.settings["model"], HBIRD_STD), case.settings
    queries = tokens(model, unconditioned(case["val_x"]))
    if "val_tokens" in case:
        described = case.case["tensors"]["val_tokens"]
        torch.testing.assert_close(queries, case["val_tokens"][:, 1:], atol=described["atol"], rtol=described["rtol"])
    memory = bank(case, model, unconditioned)
    case.check("memory_features", memory.features)
    case.check("memory_labels", memory.labels)
    check_segmentation(case, memory, queries, "", settings["K"], settings["tau"])


@pytest.mark.parametrize("name", ["A_voc_p16", "A_cityscapes_p8"])
def test_upsampled_labels(name: str, hbird_golden: Any) -> None:
    case = hbird_golden(name)
    side = int(case["label_hat"].shape[1] ** 0.5)
    labels = case["label_hat"][0].view(side, side, -1)
    classes, upsampled = case["upsampled_0_classes"].long(), case["upsampled_0"]
    assert torch.equal(labels.flatten(0, 1).amax(0).nonzero()[:, 0], classes)
    expected = classes[upsampled.argmax(0)].to(torch.uint8)
    safe = case["pred_safe"][0].bool()
    assert torch.equal(label_map(labels, tuple(upsampled.shape[1:]))[safe], expected[safe])


@pytest.mark.parametrize("name", LIMITED)
def test_limited_memories(name: str, hbird_golden: Any, hbird_model: Any, unconditioned: Any) -> None:
    case = hbird_golden(name)
    model, settings = hbird_model(case.settings["model"], HBIRD_STD), case.settings
    memory = bank(case, model, unconditioned)
    assert len(memory) == settings["rows"]
    case.check("memory_features", memory.features)
    case.check("memory_labels", memory.labels)
    queries = tokens(model, unconditioned(case.inputs["val_x"]))
    check_segmentation(case, memory, queries, "", settings["K"], settings["tau"])


@pytest.mark.parametrize("variant", ["k_default.", "data_efficient."])
def test_temperatures_and_numbers_of_neighbours(
    variant: str, hbird_golden: Any, hbird_model: Any, unconditioned: Any
) -> None:
    case = hbird_golden("A_voc_p16_fhb")
    model = hbird_model(case.settings["model"], HBIRD_STD)
    queries = tokens(model, unconditioned(case.inputs["val_x"]))
    options = case.settings["variants"][variant]
    check_segmentation(case, bank(case, model, unconditioned), queries, variant, options["K"], options["tau"])


@pytest.mark.parametrize("name", ["c6", "c21", "c9_ign0"])
def test_metrics(name: str, hbird_golden: Any) -> None:
    case = hbird_golden("A_metric_only")
    confusion = Confusion(case.value(f"{name}.num_classes"), case.value(f"{name}.ignore_index"))
    for truth, predicted in zip(case[f"{name}.gt"], case[f"{name}.pred"], strict=True):
        confusion.update(truth, predicted)
    counts = confusion.counts
    case.check(f"{name}.confusion", counts)
    case.check(f"{name}.hungarian_map", match(counts, "hungarian"))
    kinds = {"hungarian": "hungarian", "many_to_one_iou": "many-to-one-iou", "plain": "all"}
    for key, kind in {**kinds, "many_to_one_precision": "many-to-one-precision"}.items():
        case.check_value(f"{name}.{key}", mean_iou(counts, kind))
        merged = renamed(counts, match(counts, kind)) if kind != "all" else counts
        hits = merged.diagonal()
        case.check(f"{name}.{key}.tp_fp_fn", torch.stack([hits, merged.sum(0) - hits, merged.sum(1) - hits]))


def pictures(case: Any, kind: str) -> list[tuple[Image.Image, np.ndarray]]:
    names = [
        name[: -len(".image")] for name in case.tensors if name.startswith(f"raw.{kind}") and name.endswith(".image")
    ]
    names = sorted(names, reverse=case.case["name"] == "A_cityscapes_p8")
    return [(Image.fromarray(case[f"{n}.image"].numpy()), case[f"{n}.mask"].numpy()) for n in names]


def as_classes(case: Any, mask: np.ndarray) -> np.ndarray:
    if "labelid_to_trainid" not in case:
        return mask
    table = np.full(256, 255, np.uint8)
    table[:34] = case["labelid_to_trainid"].numpy()
    return table[mask]


@pytest.mark.parametrize("name", ["A_voc_p16", "A_cityscapes_p8"])
def test_pictures_to_segment_are_resized_as_published(name: str, hbird_golden: Any) -> None:
    case = hbird_golden(name)
    size = tuple(case["val_x"].shape[-2:])
    found = pictures(case, "val")
    assert len(found) == len(case["val_x"])
    resized = torch.stack([resize_picture(picture, size) for picture, _ in found])
    case.check("val_x", (resized / 255 - IMAGENET_MEAN) / HBIRD_STD)
    masks = [resize_mask(as_classes(case, mask), size, None, get_protocol("hbird-2.0").nearest) for _, mask in found]
    case.check("val_y", torch.from_numpy(np.stack(masks)))


@pytest.mark.parametrize("name", ["A_voc_p16", "A_cityscapes_p8"])
def test_pictures_of_the_memory_are_changed_as_published(name: str, hbird_golden: Any) -> None:
    case = hbird_golden(name)
    size = tuple(case["train_x"].shape[-2:])
    found = pictures(case, "train")
    assert found
    for i, (picture, mask) in enumerate(found):
        for epoch in range(len(case["train_x"])):
            factors = [None if np.isnan(f) else f for f in case["train_jitter"][epoch, i].tolist()]
            change = Change(tuple(factors), tuple(case["train_crop"][epoch, i].tolist()))
            pixels = resize_exactly(apply_jitter(picture, change), size, change.crop)
            torch.testing.assert_close(
                (pixels - IMAGENET_MEAN) / HBIRD_STD, case["train_x"][epoch, i], atol=2e-5, rtol=0
            )
            resized = resize_mask(as_classes(case, mask), size, change.crop, "corner")
            assert np.array_equal(resized, case["train_y"][epoch, i].numpy())


def test_the_slip_in_the_standard_deviation_reaches_the_network(
    hbird_golden: Any, hbird_model: Any, unconditioned: Any
) -> None:
    from amradio.evals.in_context.forward import Forward
    from amradio.evals.in_context.loader import ReadyPair
    from amradio.features import ExtractOptions

    case = hbird_golden("A_voc_p16")
    model = hbird_model(case.settings["model"], (0.229, 0.224, 0.225))  # as every DINO is loaded
    forward = Forward(model, ExtractOptions(), get_protocol("hbird-2.0"))
    pixels = unconditioned(case["val_x"])
    pairs = [ReadyPair(i, None, pixels=p) for i, p in enumerate(pixels)]  # type: ignore[arg-type]
    (found,) = forward.batches(pairs)
    described = case.case["tensors"]["val_tokens"]
    assert found.features is not None
    torch.testing.assert_close(found.features, case["val_tokens"][:, 1:], atol=described["atol"], rtol=1e-4)


def test_the_stream_of_random_numbers_is_the_published_one(hbird_golden: Any) -> None:
    from amradio.evals.in_context.draws import StreamDraws
    from amradio.evals.in_context.loader import ReadPair

    case = hbird_golden("A_cityscapes_p8")  # whose training pictures are all of one size
    jitter, crops = case["train_jitter"][0], case["train_crop"][0]
    target = tuple(case["train_x"].shape[-2:])
    draws = StreamDraws(range(len(jitter)), InContextConfig(protocol=get_protocol("hbird-2.0"), seed=1021))  # type: ignore[arg-type]
    pairs = [ReadPair(i, None, (60, 120), target, 36) for i in draws.order(0)]  # type: ignore[arg-type]
    for i, drawn in enumerate(draws.draw(0, pairs)):
        factors = [float("nan") if factor is None else factor for factor in drawn.change.jitter]
        torch.testing.assert_close(torch.tensor(factors), jitter[i], rtol=0, atol=0, equal_nan=True)
        assert drawn.change.crop == tuple(crops[i].tolist())
