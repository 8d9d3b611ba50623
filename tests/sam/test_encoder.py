"""Other backbones in the place of SAM's image encoder: sizes, padding, necks, windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from amradio.backbones.protocol import Backbone
from amradio.errors import CapabilityError, ConfigError, ImageError, OptionError, ResolutionError
from amradio.sam import BackboneEncoder, Sam3Decoder, SamDecoder, SamPredictor, SamVision

WIDTHS = {"sam": 24, "sam3": 24}


@pytest.fixture
def decoders(sam_models: dict[str, Any]) -> dict[str, Any]:
    return {"sam": SamDecoder(sam_models["sam"]), "sam3": Sam3Decoder(sam_models["sam3"])}


@pytest.mark.parametrize("kind", ["sam", "sam3"])
@pytest.mark.parametrize(("patch", "upsample"), [(8, 1), (4, 1), (14, 1), (16, 2)])
def test_shapes_and_scale_with_a_random_adaptor(
    kind: str, patch: int, upsample: int, decoders: dict[str, Any], radio: Callable[..., Any], pictures: list[Tensor]
) -> None:
    decoder = decoders[kind]
    predictor = SamPredictor(radio(patch, upsample=upsample).view(kind), decoder)
    side = 8 * patch // upsample  # so that features fill the decoder's 8 x 8
    assert predictor.encoder.side == side
    for picture in pictures:
        height, width = picture.shape[1:]
        encoded = predictor.encode(picture)
        assert encoded.frame.inner == (
            (side, side) if kind == "sam3" else tuple(int(s * side / max(height, width) + 0.5) for s in (height, width))
        )
        found = predictor.predict(encoded, boxes=[[1.0, 2, 20, 30]] * 5)
        assert found.masks.shape == (5, 3, height, width)
        assert found.masks.dtype == torch.bool
        assert found.scores.shape == (5, 3)
        assert found.logits.shape == (5, 3, 32, 32)
        assert torch.isfinite(found.logits).all()
        best = found.best()
        assert best.masks.shape == (5, 1, height, width)
        assert torch.equal(best.scores[:, 0], found.scores.amax(1))


def test_padding_is_zero_after_the_models_own_normalisation(
    decoders: dict[str, Any], radio: Callable[..., Any], pictures: list[Tensor]
) -> None:
    model = radio(8)
    seen: list[Tensor] = []
    model.input_conditioner.register_forward_hook(lambda _, __, out: seen.append(out))
    SamPredictor(model.view("sam"), decoders["sam"]).encode(pictures[0])  # 50 x 70, in a square of 64
    (values,) = seen
    assert values.shape == (1, 3, 64, 64)
    assert (values[:, :, 46:] == 0).all()
    assert (values[:, :, :46] != 0).any(1).float().mean() > 0.99


def test_the_embedding_is_the_neck_of_the_adaptors_features(
    decoders: dict[str, Any], sam_models: dict[str, Any], radio: Callable[..., Any]
) -> None:
    view, images = radio(8).view("sam"), torch.rand(2, 3, 64, 64)
    (found,) = BackboneEncoder(view, decoders["sam"])(images)
    tokens = view(images).features  # [B, 64, 24]
    expected = sam_models["sam"].vision_encoder.neck(tokens.unflatten(1, (8, 8)))
    torch.testing.assert_close(found, expected)


def test_features_of_the_necks_width_are_taken_as_they_are(decoders: dict[str, Any], radio: Callable[..., Any]) -> None:
    view, images = radio(8, {"sam": 16}).view("sam"), torch.rand(1, 3, 64, 64)
    (found,) = BackboneEncoder(view, decoders["sam"])(images)
    assert torch.equal(found, view(images, feature_fmt="NCHW").features)


def test_vitdet_windows(decoders: dict[str, Any], radio: Callable[..., Any], pictures: list[Tensor]) -> None:
    model = radio(8)
    whole = SamPredictor(model.view("sam"), decoders["sam"]).encode(pictures[0])
    model.set_vitdet(4, num_windowed=1)
    windowed = SamPredictor(model.view("sam"), decoders["sam"]).encode(pictures[0])
    assert windowed.embedding[0].shape == whole.embedding[0].shape
    assert not torch.equal(windowed.embedding[0], whole.embedding[0])
    model.set_vitdet(3, num_windowed=1)
    with pytest.raises(
        ResolutionError,
        match=r"8 x 8 features of 8 pixels take images of 64 pixels, and this backbone takes multiples of 24 only. The "
        r"side of ViTDet windows must divide 8: 2, 4\.",
    ):  # fmt: skip
        SamPredictor(model.view("sam"), decoders["sam"])


def test_features_that_do_not_fit(decoders: dict[str, Any], radio: Callable[..., Any]) -> None:
    images = torch.rand(1, 3, 64, 64)
    view = radio(8, {"sam": 20}).view("sam")
    with pytest.raises(
        ConfigError, match=r"gives features of width 20. This SAM decoder takes 24 .* or 16 .* facebook/sam-vit-huge"
    ):
        BackboneEncoder(view, decoders["sam"])(images)
    with pytest.raises(ConfigError, match="width 20, and this SAM 3 takes 24, those of its transformer"):
        BackboneEncoder(view, decoders["sam3"])(images)
    with pytest.raises(ConfigError, match=r"width 24\. This SAM decoder takes"):
        BackboneEncoder(radio(8).view("sam"), decoders["sam"], through_neck=False)(images)
    with pytest.raises(CapabilityError, match="features always go through it"):
        decoders["sam3"].embed(torch.zeros(1, 24, 8, 8), through_neck=False)
    with pytest.raises(ConfigError, match=r"takes features \[B, D, 8, 8\], got the shape \[1, 24, 4, 4\]"):
        decoders["sam"].embed(torch.zeros(1, 24, 4, 4))
    with pytest.raises(ResolutionError, match=r"takes \[B, 3, 64, 64\], got the shape \[1, 3, 32, 32\]"):
        BackboneEncoder(view, decoders["sam"])(images[..., :32, :32])


def test_equal_widths_must_be_told_apart(decoders: dict[str, Any]) -> None:
    decoder = decoders["sam"]
    decoder.trunk_dim = 16
    with pytest.raises(ConfigError, match="Features of width 16 may be those of SAM's transformer or of its neck"):
        decoder.embed(torch.zeros(1, 16, 8, 8))
    assert decoder.embed(torch.zeros(1, 16, 8, 8), through_neck=False)[0].shape == (1, 16, 8, 8)


def test_a_model_whose_normalisation_was_taken_out(decoders: dict[str, Any], radio: Callable[..., Any]) -> None:
    model = radio(8)
    model.make_preprocessor_external()
    with pytest.raises(OptionError, match="The model's preprocessor was made external"):
        SamPredictor(model.view("sam"), decoders["sam"])


@pytest.mark.parametrize("kind", ["sam", "sam3"])
def test_sams_own_encoder_is_a_backbone(kind: str, sam_models: dict[str, Any]) -> None:
    vision = SamVision(sam_models[kind], "somewhere")
    side = vision.preferred_resolution[0]
    assert isinstance(vision, Backbone)
    assert vision.identity.source == "somewhere"
    assert vision.get_nearest_supported_resolution(5, 5) == (side, side)
    images = torch.rand(2, 3, side, side)
    maps = vision(images, feature_fmt="NCHW")
    assert maps.features.shape == (2, vision.embed_dim, 8, 8)
    assert maps.summary.shape == (2, vision.summary_dim)
    torch.testing.assert_close(vision(images).features, maps.features.flatten(2).mT)
    torch.testing.assert_close(vision(images, feature_fmt="NHWC").features, maps.features.permute(0, 2, 3, 1))
    torch.testing.assert_close(maps.summary, maps.features.mean((2, 3)))
    with pytest.raises(ResolutionError, match=f"takes {side} x {side} pixels only, got 16 x 32"):
        vision(torch.rand(1, 3, 16, 32))


def test_what_is_no_picture(decoders: dict[str, Any], radio: Callable[..., Any]) -> None:
    from PIL import Image

    predictor = SamPredictor(radio(8).view("sam"), decoders["sam"])
    with pytest.raises(
        ImageError, match=r"Expected an RGB picture or uint8 \[3, H, W\], got torch.float32 \[3, 4, 4\]"
    ):
        predictor.encode(torch.zeros(3, 4, 4))
    with pytest.raises(ImageError, match="got mode 'L'"):
        predictor.encode(Image.new("L", (4, 4)))
    with pytest.raises(OptionError, match="chunk must be at least 1, got 0"):
        SamPredictor(radio(8).view("sam"), decoders["sam"], chunk=0)


def test_mixed_precision_of_the_encoder(
    decoders: dict[str, Any], radio: Callable[..., Any], pictures: list[Tensor]
) -> None:
    exact = SamPredictor(radio(8).view("sam"), decoders["sam"]).encode(pictures[0])
    mixed = SamPredictor(radio(8).view("sam"), decoders["sam"], autocast=torch.bfloat16).encode(pictures[0])
    assert not torch.equal(exact.embedding[0], mixed.embedding[0])
    torch.testing.assert_close(mixed.embedding[0].float(), exact.embedding[0], rtol=0.2, atol=0.3)
    predictor = SamPredictor(radio(8).view("sam"), decoders["sam"], autocast=torch.bfloat16)
    assert torch.isfinite(predictor.predict(mixed, boxes=[[1.0, 2, 30, 40]]).logits).all()
