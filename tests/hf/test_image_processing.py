"""The image processor gives the pixels that the rest of the package sees, and needs no torchvision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("transformers", minversion="5.13")

from transformers import AutoImageProcessor, pipeline

from amradio.errors import ImageError, OptionError
from amradio.hf import AmradioConfig, AmradioImageProcessor, AmradioModel
from amradio.images.resize import ResizePolicy
from amradio.models.radio import RadioModel


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@settings(max_examples=30)
@given(
    st.integers(20, 90), st.integers(20, 90), st.sampled_from(["crop", "exact", "shortest", "longest", "nearest", None])
)
def test_the_same_pixels_as_everywhere(height: int, width: int, mode: str | None) -> None:
    one = mode in ("shortest", "longest")
    size = {f"{mode}_edge": 48} if one else {"height": 32, "width": 48}
    processor = AmradioImageProcessor(size=size, resize_mode=mode, size_multiple=16)
    values = processor(picture(height, width), return_tensors="pt").pixel_values
    numbers = () if mode == "nearest" else (48,) if one else (32, 48)
    wanted = ResizePolicy(mode or "crop", numbers, 16).pixels(picture(height, width)).float() / 255
    assert values.dtype == torch.float32
    assert torch.equal(values[0], wanted)


def test_what_goes_in() -> None:
    processor = AmradioImageProcessor(size={"height": 32, "width": 32})
    image = picture(40, 50)
    array = np.asarray(image)
    wanted = processor(image, return_tensors="np")["pixel_values"]
    for given_ in (array, array.transpose(2, 0, 1), torch.from_numpy(array.copy()), [image]):
        assert np.array_equal(processor(given_, return_tensors="np")["pixel_values"], wanted)
    assert processor([image, picture(20, 90)], return_tensors="pt").pixel_values.shape == (2, 3, 32, 32)
    grey = processor(image.convert("L"), return_tensors="pt").pixel_values
    assert torch.equal(grey[:, 0], grey[:, 2])
    own = processor(image, do_resize=False, do_rescale=False)["pixel_values"][0]
    assert own.dtype == np.uint8
    assert np.array_equal(own, array.transpose(2, 0, 1))
    assert processor(image, size={"longest_edge": 25})["pixel_values"][0].shape == (3, 20, 25)


def test_what_is_refused() -> None:
    processor, image = AmradioImageProcessor(), picture(8, 8)
    with pytest.raises(ImageError, match=r"takes pictures as bytes \(uint8\) or PIL images, got float32"):
        processor(np.asarray(image).astype(np.float32) / 255)
    with pytest.raises(OptionError) as raised:
        processor(image, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    assert str(raised.value) == (
        "The image processor resizes with a bicubic filter (resample=3) and maps bytes to [0, 1]; the model itself "
        "standardises. Got do_normalize=True, resample=3. To cut out the centre, use resize_mode='crop'."
    )
    with pytest.raises(OptionError, match="resample=2"):
        processor(image, resample=2)
    with pytest.raises(OptionError, match=r"size must be .* got \{'longest_edge': 9, 'shortest_edge': 3\}"):
        processor(image, size={"shortest_edge": 3, "longest_edge": 9})


def test_it_suits_the_model(make_radio: Callable[[str], RadioModel], tmp_path: Path) -> None:
    config = AmradioConfig.from_radio(make_radio("vit").config, image_size=[64, 96], vitdet_window_size=2)
    processor = AmradioImageProcessor.from_config(config)
    assert dict(processor.size) | {} == {"height": 64, "width": 96}
    assert processor.size_multiple == 16
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is AmradioImageProcessor
    assert again.to_dict() == processor.to_dict()
    hybrid = AmradioConfig.from_radio(make_radio("eradio").config)
    assert AmradioImageProcessor.from_config(hybrid).size_multiple == 32


@torch.no_grad()
def test_the_pipeline(make_radio: Callable[[str], RadioModel], tmp_path: Path) -> None:
    radio = make_radio("vit")
    AmradioModel.from_radio(radio, image_size=48).save_pretrained(tmp_path)
    extract = pipeline("image-feature-extraction", model=str(tmp_path), device="cpu")
    image = picture(70, 91)
    pixels = ResizePolicy("crop", (48, 48), 8).pixels(image).float()[None] / 255
    plain = radio.forward_hidden_states(pixels)
    torch.testing.assert_close(extract(image, return_tensors=True), plain.last)
    torch.testing.assert_close(extract(image, pool=True, return_tensors=True), plain.outputs.summary)
    assert len(extract([image, image], pool=True)) == 2
