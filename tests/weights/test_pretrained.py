"""The layout of `AmradioModel.save_pretrained`, without transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from amradio.errors import CheckpointKeyError, ConfigError, LayoutError
from amradio.weights import official, pretrained
from amradio.weights.checkpoint import Identity, build_model
from amradio.weights.layouts import detect

MODELS = Path(__file__).parents[1] / "goldens" / "radio" / "models"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A golden model with adaptors, normalizers and unread tensors, in this layout."""
    return pretrained.write(official.read(MODELS / "v3_small.pth.tar"), tmp_path / "m")


def edit(path: Path, **changes: object) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_everything_comes_back(written: Path) -> None:
    before, after = official.read(MODELS / "v3_small.pth.tar"), pretrained.read(written)
    assert detect(written).NAME == "pretrained"
    assert after.config == before.config
    assert after.tensors.keys() == before.tensors.keys()
    assert after.unused.keys() == before.unused.keys()
    assert all(torch.equal(v, after.tensors[k]) for k, v in before.tensors.items())
    assert after.identity.layout == "pretrained"
    assert after.identity.source == str(written)
    assert all(k.startswith(("radio.", "unused.")) for k in load_file(written / "model.safetensors"))


def test_where_it_came_from_is_kept(tmp_path: Path) -> None:
    checkpoint = official.read(MODELS / "p14_single.pth.tar")
    checkpoint.identity = Identity(source="there", layout="official", version="radio_v1", sha256="ab", license="NSCLv1")
    path = pretrained.write(checkpoint, tmp_path / "m", backbone_only=True)
    found = pretrained.read(path).identity
    assert (found.version, found.sha256, found.license) == ("radio_v1", "ab", "NSCLv1")


def test_backbone_only(tmp_path: Path) -> None:
    path = pretrained.write(official.read(MODELS / "v3_small.pth.tar"), tmp_path / "m", backbone_only=True)
    after = pretrained.read(path)
    assert not after.config.adaptors
    assert not any("adaptors." in k or "normalizer" in k for k in after.tensors)


def test_adaptors_that_were_left_out(written: Path) -> None:
    edit(written, adaptor_names=["clip"])
    checkpoint = pretrained.read(written)
    assert list(checkpoint.config.adaptors) == ["clip"]
    with pytest.raises(CheckpointKeyError, match=r"Unexpected .*adaptors\.sam"):
        build_model(checkpoint)


def test_what_cannot_be_read(written: Path, tmp_path: Path) -> None:
    edit(written, quantization_config={"quant_method": "torchao"})
    with pytest.raises(LayoutError, match=r"are quantised, .* use amradio\.hf\.AmradioModel\.from_pretrained"):
        pretrained.read(written)
    edit(written, quantization_config=None, radio=None)
    with pytest.raises(ConfigError, match=r"config\.json has no description of a model under 'radio'"):
        pretrained.read(written)
    edit(written, model_type="vit")
    with pytest.raises(LayoutError, match=r"no config\.json with model_type 'amradio'"):
        pretrained.read(written)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(LayoutError, match="is a file, but the pretrained layout is a directory"):
        pretrained.write(official.read(MODELS / "p14_single.pth.tar"), file)
