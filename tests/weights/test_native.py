"""Our own safetensors layout: nothing is lost, and damage is explained."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import amradio
from amradio.errors import CheckpointError, ConfigError, LayoutError
from amradio.models.configs import (
    AdaptorConfig,
    ERadioConfig,
    HeadConfig,
    InterNormalizerConfig,
    RadioConfig,
    Resolution,
    ViTConfig,
)
from amradio.weights import native, tensorfiles
from amradio.weights.checkpoint import Checkpoint, Identity

VIT = ViTConfig(embed_dim=8, depth=1, num_heads=2, mlp_hidden_dim=16, position_grid=(3, 5))
ORIGIN = Identity(source="https://example.org/m.pth.tar", layout="official", version="radio_v2.5-b", sha256="ab" * 32)

heads = st.builds(
    HeadConfig,
    version=st.sampled_from(["v1", "v2", "attn"]),
    input_dim=st.integers(1, 64),
    hidden_dim=st.integers(1, 64),
    output_dim=st.sampled_from([36, 72]),  # multiples of every factor squared
    num_inner=st.integers(0, 3),
    upsample_factor=st.integers(1, 3),
    pre_norm=st.booleans(),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
configs = st.builds(
    RadioConfig,
    backbone=st.sampled_from([VIT, ERadioConfig(), ERadioConfig(window_size=(None, None, (4, 4), 8), layer_scale=0.1)]),
    summary_idxs=st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
    adaptors=st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.builds(AdaptorConfig, head_idx=st.integers(0, 9), summary=heads, features=heads),
        max_size=2,
    ),
    teachers=st.lists(
        st.builds(
            lambda record, name: {**record, "name": name},
            st.dictionaries(st.text(max_size=8), json_values, max_size=3),
            st.text(max_size=8),
        ),
        max_size=2,
    ).map(tuple),
    feature_normalizer=st.booleans(),
    inter_normalizer=st.none()
    | st.builds(InterNormalizerConfig, num_intermediates=st.integers(1, 9), rotation_per_layer=st.booleans()),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    position_interpolation=st.sampled_from(["half_pixel", "align_corners"]),
    patch_size=st.none() | st.integers(1, 32),
    preferred_resolution=st.none() | st.builds(Resolution, st.integers(1, 999), st.integers(1, 999)),
    version=st.none() | st.text(max_size=8),
    args=st.dictionaries(st.text(max_size=8), json_values, max_size=4),
)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])


@settings(max_examples=60)
@given(config=configs, dtype=dtypes, shape=st.lists(st.integers(0, 4), max_size=3))
def test_everything_comes_back(config: RadioConfig, dtype: torch.dtype, shape: list[int]) -> None:
    tensors = {"model.a": (torch.randn(shape) * 100).to(dtype), "adaptors.x.y": torch.tensor([float("nan"), -0.0])}
    unused = {"base_model.inner.mask_token": torch.randn(1, 3).half()}
    with tempfile.TemporaryDirectory() as folder:
        path = native.write(Checkpoint(config, tensors, ORIGIN, unused), Path(folder) / "m.safetensors")
        back = native.read(path)
        assert back.config == config
        for mine, found in ((tensors, back.tensors), (unused, back.unused)):
            assert mine.keys() == found.keys()
            for key, tensor in mine.items():
                assert tensor.dtype == found[key].dtype
                assert tensor.shape == found[key].shape
                torch.testing.assert_close(tensor, found[key], rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {"model.a": torch.arange(6.0).view(2, 3), "model.b": torch.ones(4)}
    return native.write(Checkpoint(RadioConfig(backbone=VIT), tensors, ORIGIN), tmp_path / "m.safetensors")


def rewrite(path: Path, **changes: Any) -> None:
    """Change the metadata of a file."""
    with safe_open(path, "pt") as f:
        metadata, tensors = dict(f.metadata()), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    metadata |= {k: v for k, v in changes.items() if v is not None}
    save_file(tensors, path, {k: v for k, v in metadata.items() if changes.get(k, "") is not None})


def test_metadata_describes_the_file_to_anyone(path: Path) -> None:
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    assert metadata["format"] == "amradio"
    assert metadata["amradio_version"] == amradio.__version__
    assert json.loads(metadata["config"])["backbone"]["embed_dim"] == 8
    assert json.loads(metadata["identity"])["source"] == ORIGIN.source


def test_identity_names_the_file_and_keeps_what_is_known_of_its_origin(path: Path) -> None:
    assert native.read(path).identity == Identity(
        source=str(path), layout="native", version="radio_v2.5-b", sha256="ab" * 32
    )


def test_newer_format(path: Path) -> None:
    rewrite(path, format_version="2", amradio_version="9.0")
    assert native.matches(path)
    with pytest.raises(LayoutError) as raised:
        native.read(path)
    assert str(raised.value) == (
        f"{path} was written by amradio 9.0 in version 2 of the format; amradio {amradio.__version__} reads up to "
        f"version 1. Upgrade amradio."
    )


def test_unknown_field(path: Path) -> None:
    with safe_open(path, "pt") as f:
        config = json.loads(f.metadata()["config"])
    rewrite(path, amradio_version="9.0", config=json.dumps(config | {"colour": "red"}))
    with pytest.raises(ConfigError) as raised:
        native.read(path)
    assert str(raised.value) == (
        f"{path} (written by amradio 9.0, read by {amradio.__version__}): config has unknown fields ['colour']; it was "
        f"probably written by a newer amradio."
    )


@pytest.mark.parametrize(
    ("value", "problem"), [(None, "KeyError: 'config'"), ("{", "JSONDecodeError: Expecting property name")]
)
def test_lost_metadata(path: Path, value: str | None, problem: str) -> None:
    rewrite(path, config=value)
    with pytest.raises(LayoutError) as raised:
        native.read(path)
    assert str(raised.value).startswith(f"{path} has no usable 'config' in its metadata ({problem}")
    assert str(raised.value).endswith("Convert the original checkpoint again.")


def test_metadata_of_another_kind(path: Path) -> None:
    rewrite(path, identity="[]")
    with pytest.raises(LayoutError, match="has a 'identity' in its metadata that is no JSON object"):
        native.read(path)


def test_file_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"format": "pt"})
    assert not native.matches(path)
    with pytest.raises(LayoutError, match=r"its metadata has no format='amradio', but {'format': 'pt'}\.$"):
        native.read(path)


def test_truncated_tensors(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError) as raised:
        native.read(path)
    assert str(raised.value) == (
        f"{path} is truncated: it has {len(content) - 1:,} bytes and its header announces {len(content):,}. Delete it "
        f"and get it again."
    )


def test_truncated_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])
    assert not native.matches(path)
    with pytest.raises(CheckpointError, match=r"is truncated: it has 100 bytes and its header announces [\d,]+\."):
        native.read(path)


@given(cut=st.integers(0, 2000))
def test_no_cut_file_is_half_read(cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        native.write(Checkpoint(RadioConfig(backbone=VIT), {"model.a": torch.ones(9)}, ORIGIN), path)
        content = path.read_bytes()
        path.write_bytes(content[: min(cut, len(content) - 1)])
        with pytest.raises(CheckpointError):
            native.read(path)


@pytest.mark.parametrize("header", [b"{]", b'{"a": {"shape": [1]}}', b'{"a": 3}', b'{"__metadata__": 1, "a": []}'])
def test_damaged_header(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="has a damaged safetensors header"):
        native.read(path)


def test_absurd_header_length(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(CheckpointError, match=r"is no safetensors file \(10 bytes\): it does not begin like one\.$"):
        native.read(path)


def test_target_is_a_directory(tmp_path: Path) -> None:
    with pytest.raises(LayoutError) as raised:
        native.write(Checkpoint(RadioConfig(backbone=VIT), {}, ORIGIN), tmp_path)
    assert str(raised.value) == f"{tmp_path} is a directory, but the native layout is one file. Name a file in it."


def test_a_failed_write_leaves_the_old_file_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def fails(tensors: Any, target: Path, metadata: Any) -> None:
        target.write_bytes(b"half")
        raise tensorfiles.SafetensorError("No space left on device")

    monkeypatch.setattr(tensorfiles, "save_file", fails)
    with pytest.raises(CheckpointError) as raised:
        native.write(Checkpoint(RadioConfig(backbone=VIT), {}, ORIGIN), path)
    assert str(raised.value) == f"{path} cannot be written: No space left on device. Nothing is left behind."
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
