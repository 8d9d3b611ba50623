"""Zero-shot classification and retrieval with real text towers: an adaptor of a RADIO checkpoint, and a CLIP model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import amradio
from amradio.errors import CapabilityError
from amradio.evals.captions import load_captions
from amradio.evals.retrieval import run_retrieval
from amradio.evals.runner import Setup, policy_for
from amradio.evals.zero_shot import ZeroShotConfig, run_zero_shot
from amradio.images import open_images, to_tensor
from amradio.models.radio import RadioModel
from amradio.text import load_text_tower
from amradio.text.prompts import load_templates, prompts
from amradio.weights.checkpoint import Identity

CLASSES = ("cat", "dog", "ice cream")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture(params=["clip"])
def radio(request: pytest.FixtureRequest, goldens: Path, saved_models: dict[str, Path]) -> RadioModel:
    """A toy RADIO model whose adaptor "clip" is as wide as a saved tower, of the kind that a test asks for."""
    config = amradio.load(goldens / "models" / "v3_small.pth.tar").config
    clip = config.adaptors["clip"]
    width = 20 if request.param == "clip" else 24
    clip = dataclasses.replace(clip, summary=dataclasses.replace(clip.summary, output_dim=width))
    model = RadioModel(dataclasses.replace(config, adaptors={**config.adaptors, "clip": clip}), ["clip"]).eval()
    model.identity = Identity(source="toy", layout="official", sha256="ab" * 32)
    record = {"name": "clip", "type": "hf", "model": str(saved_models[request.param])}
    model.adaptors["clip"].attach_text(lambda device: load_text_tower(record, device=device))
    return model


def by_hand(summaries: torch.Tensor, encode, templates: tuple[str, ...]) -> np.ndarray:
    """Predicted classes, with nothing of ours but the tower."""
    rows = []
    for name in CLASSES:
        embeddings = torch.stack([encode([p])[0] for p in prompts(templates, name)])
        mean = (embeddings / embeddings.norm(dim=1, keepdim=True)).mean(0)
        rows.append(mean / mean.norm())
    unit = summaries / summaries.norm(dim=1, keepdim=True)
    return (unit @ torch.stack(rows).T).argmax(1).numpy()


@torch.no_grad()
@pytest.mark.parametrize("radio", ["clip", "siglip", "siglip2"], indirect=True)
def test_an_adaptor_of_a_checkpoint(radio: RadioModel, photos: Path, tmp_path: Path) -> None:
    view, images = radio.view("clip").eval(), open_images(str(photos))
    assert images.class_names == CLASSES
    setup = Setup(policy_for(view, (32, 32)))
    config = ZeroShotConfig(templates="simple")
    report = run_zero_shot(view, images, config, setup, cache_dir=tmp_path, text_batch_size=5)
    pixels = [to_tensor(s.decode(max_pixels=10**6, background=(255, 255, 255))) for s in images]
    summaries = radio(torch.stack(pixels))["clip"].summary
    tower = radio.adaptors["clip"]
    predicted = by_hand(summaries, lambda t: tower.encode_text(tower.tokenizer(t)), load_templates("simple"))
    pairs = {(true, guess): n for true, guess, n in report.details["confusion"]["true_predicted_count"]}
    for true in range(3):
        for guess in range(3):
            count = int(((images.labels == true) & (predicted == guess)).sum())
            assert pairs.get((true, guess), 0) == count
    assert report.details["logit_scale"] == pytest.approx(4.625)
    assert report.details["logit_bias"] == (None if tower.summary_dim == 20 else pytest.approx(-16.5))
    assert (report.model["adaptor"], report.model["sha256"]) == ("clip", "ab" * 32)
    radio.adaptors["clip"].attach_text(None)  # a kept classifier needs no text side
    again = run_zero_shot(view, images, config, setup, cache_dir=tmp_path)
    assert again.details["classifier_cached"] is True
    assert again.metrics == report.metrics
    with pytest.raises(CapabilityError, match="The teacher 'clip' has no text side"):
        run_zero_shot(view, images, config, setup, use_cache=False)


@torch.no_grad()
def test_a_model_of_transformers(saved_models: dict[str, Path], photos: Path) -> None:
    import transformers

    statistics = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    backbone = amradio.load_backbone(f"hf:{saved_models['clip']}", **statistics)
    images = open_images(str(photos))
    setup = Setup(policy_for(backbone, (16, 16)))
    report = run_zero_shot(backbone, images, ZeroShotConfig(templates="base"), setup, use_cache=False)
    model = transformers.AutoModel.from_pretrained(saved_models["clip"]).eval()
    sources = [s.decode(max_pixels=10**6, background=(255, 255, 255)) for s in images]
    pixels = torch.stack([to_tensor(setup.policy.apply(image)) for image in sources]) * 2 - 1
    ids = backbone.tokenizer([f"an image of a {name}." for name in CLASSES])
    logits = model(input_ids=ids, pixel_values=pixels).logits_per_image  # [B, 3]
    predicted = logits.argmax(1)
    assert report.metrics["top1"].value == pytest.approx(100 * float((predicted.numpy() == images.labels).mean()))
    own = logits.softmax(1).gather(1, torch.tensor(images.labels)[:, None])
    assert report.details["mean_probability_of_true_class"] == pytest.approx(float(own.mean()), rel=1e-3)


def test_retrieval(radio: RadioModel, photos: Path) -> None:
    lines = [f'{{"path": "{c}/{i}.png", "captions": ["a photo of the {c}", "{c}"]}}' for c in CLASSES for i in (0, 1)]
    (photos / "captions.jsonl").write_text("\n".join(lines))
    view = radio.view("clip").eval()
    report = run_retrieval(view, load_captions(photos / "captions.jsonl"), setup=Setup(policy_for(view, (32, 32))))
    assert report.details["captions"] == 12
    assert report.metrics["text_to_image_r10"].value == 100.0
