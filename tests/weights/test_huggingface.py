"""The official Hugging Face layout: the directories that the official class wrote, and ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from amradio.errors import CheckpointError, CheckpointKeyError, CheckpointShapeError, LayoutError
from amradio.models.configs import InterNormalizerConfig, Resolution
from amradio.weights import huggingface, official
from amradio.weights.checkpoint import build_model

GOLDENS = Path(__file__).parents[1] / "goldens" / "radio"
DIRECTORIES = sorted(p.name for p in (GOLDENS / "hf").iterdir())


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A directory of the official class to change."""
    return Path(shutil.copytree(GOLDENS / "hf" / "v3_small", tmp_path / "hf"))


def edit(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(path: Path, drop: str = "", **changes: torch.Tensor) -> None:
    file = path / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if not (drop and k.startswith(drop))}
    save_file(tensors | {k.replace("__", "."): v for k, v in changes.items()}, file)


@pytest.mark.parametrize("name", DIRECTORIES)
def test_the_same_model_as_the_pickled_checkpoint(name: str) -> None:
    pickled = official.read(GOLDENS / "models" / f"{name}.pth.tar")
    directory = huggingface.read(GOLDENS / "hf" / name)
    assert directory.config.backbone == pickled.config.backbone
    assert directory.config.summary_idxs == pickled.config.summary_idxs
    # The official conversion exported only some adaptors, and by their stored records.
    for adaptor, config in directory.config.adaptors.items():
        assert config == pickled.config.adaptors[adaptor]
    model, _ = build_model(pickled, list(directory.config.adaptors))
    mine = {k: v for k, v in model.state_dict().items() if k != "summary_idxs"}
    assert mine.keys() == directory.tensors.keys()
    for key, tensor in directory.tensors.items():
        torch.testing.assert_close(mine[key], tensor.to(mine[key].dtype), rtol=1e-5, atol=1e-6)
    assert directory.unused.keys() == pickled.unused.keys()


def test_the_config_of_the_directory_is_used() -> None:
    config = huggingface.read(GOLDENS / "hf" / "v3_small").config
    assert config.version == "c-radio_v3-b"
    assert config.patch_size == 16
    assert config.max_resolution == 2048
    assert config.preferred_resolution == Resolution(512, 512)
    assert not config.supports_vitdet  # by the catalog
    assert config.feature_normalizer
    assert config.inter_normalizer == InterNormalizerConfig(num_intermediates=2, rotation_per_layer=True)
    assert config.adaptors["dino_v2"].head_idx == 2
    assert config.adaptors["sam"].features.upsample_factor == 2
    assert config.args["spectral_heads"] is False
    assert huggingface.read(GOLDENS / "hf" / "spec2").config.vitdet_num_global == 4
    assert huggingface.read(GOLDENS / "hf" / "v21_mlpnorm_bf16").config.dtype == "bfloat16"


def test_missing_fields_come_from_the_version(copy: Path) -> None:
    edit(copy, version="radio_v2.5-g", patch_size=None, max_resolution=None, preferred_resolution=None)
    config = huggingface.read(copy).config
    assert (config.patch_size, config.max_resolution) == (14, 1792)
    assert config.preferred_resolution == Resolution(896, 896)
    edit(copy, version="my-own")
    config = huggingface.read(copy).config
    assert (config.version, config.max_resolution, config.supports_vitdet) == ("my-own", None, True)


def test_stored_summary_tokens_win(copy: Path) -> None:
    edit_tensors(copy, radio_model__summary_idxs=torch.tensor([1, 3]))
    assert huggingface.read(copy).config.summary_idxs == (1, 3)


@pytest.mark.parametrize(
    ("args", "stored", "repaired"),
    [
        # one class token shared by all teachers: the official class indexes out of range
        ({"cls_token_per_teacher": False, "cpe_num_registers": 7}, [0, 1, 2], (0,)),
        # a repeated name has one class token, though the official conversion counts it twice
        ({"teachers": [{"name": n} for n in "aabcd"]}, [0, 1, 2, 3, 4], (0, 1, 2, 3)),
    ],
)
def test_impossible_summary_tokens_are_repaired(
    copy: Path, args: dict[str, Any], stored: list[int], repaired: tuple[int, ...]
) -> None:
    edit(copy, args=json.loads((copy / "config.json").read_text())["args"] | args)
    edit_tensors(copy, radio_model__summary_idxs=torch.tensor(stored))
    checkpoint = huggingface.read(copy)
    assert checkpoint.config.summary_idxs == repaired
    model, _ = build_model(checkpoint)
    assert model(torch.rand(1, 3, 32, 32)).summary.shape == (1, 32 * len(repaired))


def test_adaptors_are_read_from_their_tensors(copy: Path) -> None:
    with_records = huggingface.read(copy).config.adaptors
    edit(copy, adaptor_configs={}, adaptor_names=["clip"])
    assert huggingface.read(copy).config.adaptors == with_records  # the teachers' records say the rest


def test_head_versions_are_those_of_the_tensors(tmp_path: Path) -> None:
    source = official.read(GOLDENS / "models" / "v4_attn.pth.tar")
    config = huggingface.read(huggingface.write(source, tmp_path / "hf")).config
    versions = {name: (a.summary.version, a.features.version) for name, a in config.adaptors.items()}
    assert versions == {name: (a.summary.version, a.features.version) for name, a in source.config.adaptors.items()}
    assert "attn" in {v for pair in versions.values() for v in pair}


def test_sharded_weights(copy: Path) -> None:
    whole = huggingface.read(copy)
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({k: tensors[k] for k in keys}, copy / shard)
    placed = {k: shard for shard, keys in shards.items() for k in keys}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    sharded = huggingface.read(copy)
    assert sharded.config == whole.config
    assert sharded.tensors.keys() == whole.tensors.keys()
    (copy / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks b\.safetensors, which model\.safetensors\.index\.json names"):
        huggingface.read(copy)


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "..", "c:\\a"])
def test_shards_are_looked_for_in_the_directory_only(copy: Path, shard: str) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="has no 'weight_map' from tensors to files of the same directory"):
        huggingface.read(copy)


def test_pickled_weights_are_not_read(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as raised:
        huggingface.read(copy)
    assert str(raised.value) == (
        f"{copy} needs model.safetensors or model.safetensors.index.json, but has only pickled weights "
        f"['pytorch_model.bin'], which are not read from directories."
    )


def test_damaged_directories(copy: Path) -> None:
    edit(copy, adaptor_configs={"clip": {"summary": {}}})
    with pytest.raises(CheckpointError, match=r"record of adaptor 'clip' in the config\.json .*KeyError: 'head_idx'"):
        huggingface.read(copy)
    edit(copy, adaptor_configs={"clip": {"head_idx": 0, "summary": {"hidden_dim": 25}, "feature": {}}})
    with pytest.raises(CheckpointShapeError, match=r"has hidden_dim 24 by its tensors, but 25 by config\.json"):
        huggingface.read(copy)
    edit(copy, adaptor_configs={}, inter_feature_normalizer_config={"embed_dim": 32})
    with pytest.raises(CheckpointError, match=r"inter_feature_normalizer_config .*KeyError: 'num_intermediates'"):
        huggingface.read(copy)
    edit(copy, inter_feature_normalizer_config=None)
    with pytest.raises(CheckpointKeyError, match=r"Unexpected \(3\): inter_feature_normalizer\.alphas"):
        build_model(huggingface.read(copy))
    edit(copy, adaptor_configs=[1])
    with pytest.raises(CheckpointError, match=r"adaptor_configs in the config\.json of .* must be an object"):
        huggingface.read(copy)
    edit(copy, adaptor_configs={}, args={"model": "vit_base_patch16_224", "cpe_max_size": 128, "teachers": []})
    with pytest.raises(CheckpointError, match="neither 'adaptor_configs' nor the teachers"):
        huggingface.read(copy)
    edit(copy, args=None)
    with pytest.raises(LayoutError, match=r"is no RADIO directory: it needs a config\.json with 'args', but has \["):
        huggingface.read(copy)
    (copy / "config.json").write_text("{")
    assert not huggingface.matches(copy)
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        huggingface.read(copy)


def test_normalizers_that_are_promised_must_be_there(copy: Path) -> None:
    edit_tensors(copy, drop="radio_model.feature_normalizer.")
    with pytest.raises(CheckpointKeyError, match=r"Missing \(2\): feature_normalizer\.mean, feature_normalizer\.tx"):
        build_model(huggingface.read(copy))


@pytest.mark.parametrize("name", DIRECTORIES)
def test_what_we_write_is_what_the_official_class_writes(name: str, tmp_path: Path) -> None:
    source = GOLDENS / "hf" / name
    path = huggingface.write(huggingface.read(source), tmp_path / "hf")
    theirs, ours = (json.loads((p / "config.json").read_text()) for p in (source, path))
    assert "auto_map" not in ours
    for key in ("transformers_version", "adaptor_names", "args"):
        theirs.pop(key, None), ours.pop(key, None)
    assert ours == theirs
    theirs, ours = (load_file(p / "model.safetensors") for p in (source, path))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype
        assert torch.equal(tensor, ours[key]), key


def test_other_files_of_the_target_stay(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    huggingface.write(huggingface.read(GOLDENS / "hf" / "eps_dino"), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_target_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("")
    with pytest.raises(LayoutError) as raised:
        huggingface.write(huggingface.read(GOLDENS / "hf" / "eps_dino"), tmp_path / "m")
    assert str(raised.value) == f"{tmp_path / 'm'} is a file, but the huggingface layout is a directory."
