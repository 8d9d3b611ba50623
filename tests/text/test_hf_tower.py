"""Towers through transformers, against the whole model of transformers on tokens made without our tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from amradio.errors import (
    CapabilityError,
    CheckpointError,
    CheckpointKeyError,
    CheckpointShapeError,
    LayoutError,
    MissingDependencyError,
    OfflineError,
    OptionError,
    UnsafeCheckpointError,
)
from amradio.text import TextTower, load_text_tower

TEXTS = ["A photo of a Cat.", "ice_cream, the dog!", "cat " * 100]
CANONICAL = ["a photo of a cat", "ice cream the dog", ("cat " * 100).strip()]
KINDS = ["clip", "siglip", "siglip2"]
WIDTHS = {"clip": 20, "siglip": 24, "siglip2": 24}


def load(kind: str, place: Path, **options: Any) -> Any:
    return load_text_tower({"name": "t", "type": "hf", "model": str(place)}, **options)


def reference_ids(kind: str, place: Path) -> Tensor:
    """Ids straight from the `tokenizers` package."""
    from tokenizers import Tokenizer, normalizers

    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    length = 12 if kind == "clip" else 64
    if kind == "siglip2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=0, pad_token="<pad>", direction="right")
    return torch.tensor([e.ids for e in tokenizer.encode_batch(TEXTS if kind == "clip" else CANONICAL)])


def reference_embeddings(kind: str, place: Path) -> Tensor:
    prefix = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[kind]
    full = getattr(transformers, f"{prefix}Model").from_pretrained(place).eval()
    with torch.no_grad():
        out = full.get_text_features(input_ids=reference_ids(kind, place))
    return out if isinstance(out, Tensor) else out.pooler_output


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_equal_the_whole_model(kind: str, saved_models: dict[str, Path]) -> None:
    tower = load(kind, saved_models[kind])
    assert isinstance(tower, TextTower)
    embeddings = tower.encode_text(tower.tokenizer(TEXTS))
    expected = reference_embeddings(kind, saved_models[kind])
    assert embeddings.shape == (3, WIDTHS[kind])
    assert tower.embed_dim == WIDTHS[kind]
    torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-6)
    assert (expected[0] - expected[1]).abs().max() > 0.01  # the comparison can tell texts apart
    normalized = tower.encode_text(tower.tokenizer(TEXTS), normalize=True)
    torch.testing.assert_close(normalized, expected / expected.norm(dim=-1, keepdim=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_have_a_fixed_length_and_are_padded_on_the_right(kind: str, saved_models: dict[str, Path]) -> None:
    tower = load(kind, saved_models[kind])
    tokens = tower.tokenizer(TEXTS).to("cpu")
    ids = tokens if kind == "clip" else tokens["input_ids"]
    assert isinstance(tokens, Tensor) == (kind == "clip")
    assert kind == "clip" or set(tokens) == {"input_ids"}  # no mask: the tower attends to its padding
    assert ids.dtype == torch.int64
    assert torch.equal(ids, reference_ids(kind, saved_models[kind]))
    assert ids[0, -1] == 0  # a short text ends in padding
    assert ids[2, -1] == ids[2].max() if kind != "siglip2" else ids[2, -1] == 1  # a long one keeps its end token
    one = tower.tokenizer(TEXTS[0])
    assert torch.equal(one if kind == "clip" else one["input_ids"], ids[:1])


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_siglip_texts_are_canonicalised(kind: str, saved_models: dict[str, Path]) -> None:
    tower = load(kind, saved_models[kind])
    assert torch.equal(tower.tokenizer("ICE_cream!!")["input_ids"], tower.tokenizer(" ice  cream")["input_ids"])


def test_clip_texts_are_left_to_the_tokenizer(saved_models: dict[str, Path]) -> None:
    tower = load("clip", saved_models["clip"])
    assert not torch.equal(tower.tokenizer("a cat!"), tower.tokenizer("a cat"))


@pytest.mark.parametrize("kind", KINDS)
def test_only_text_weights_are_kept(kind: str, saved_models: dict[str, Path], capsys: Any) -> None:
    tower = load(kind, saved_models[kind])
    names = set(tower.state_dict())
    assert names
    assert not [n for n in names if "vis" in n or "logit" in n or "patch" in n]
    stored = load_file(saved_models[kind] / "model.safetensors")
    text = [t for n, t in stored.items() if n.startswith(("text_model.", "text_projection."))]
    assert sum(p.numel() for p in tower.parameters()) == sum(t.numel() for t in text)
    assert not any(p.requires_grad for p in tower.parameters())
    assert not tower.training
    assert "UNEXPECTED" not in "".join(capsys.readouterr())


def test_logit_scale_and_bias(saved_models: dict[str, Path]) -> None:
    assert (load("clip", saved_models["clip"]).logit_scale, load("clip", saved_models["clip"]).logit_bias) == (
        4.625,
        None,
    )
    for kind in ("siglip", "siglip2"):
        tower = load(kind, saved_models[kind], dtype=torch.bfloat16)
        assert (tower.logit_scale, tower.logit_bias) == (4.625, -16.5)


@pytest.mark.parametrize("kind", KINDS)
def test_text_half_saved_alone(kind: str, saved_models: dict[str, Path], tmp_path: Path) -> None:
    whole = load(kind, saved_models[kind])
    name = {"clip": "CLIPTextModelWithProjection", "siglip": "SiglipTextModel", "siglip2": "Siglip2TextModel"}[kind]
    config = transformers.AutoConfig.from_pretrained(saved_models[kind]).text_config
    if kind == "clip":
        config.projection_dim = 20
    getattr(transformers, name).from_pretrained(saved_models[kind], config=config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(saved_models[kind]).save_pretrained(tmp_path)
    alone = load(kind, tmp_path)
    ids = reference_ids(kind, saved_models[kind])
    assert torch.equal(alone.encode_text(ids), whole.encode_text(ids))
    assert (alone.logit_scale, alone.logit_bias) == (None, None)


def test_dtype_and_device(saved_models: dict[str, Path]) -> None:
    tower = load("siglip", saved_models["siglip"], dtype=torch.bfloat16, device="cpu")
    exact = load("siglip", saved_models["siglip"])
    embeddings = tower.encode_text(tower.tokenizer(TEXTS), normalize=True)
    assert embeddings.dtype == torch.bfloat16
    similarity = (embeddings.float() * exact.encode_text(exact.tokenizer(TEXTS), normalize=True)).sum(-1)
    assert similarity.min() > 0.99
    assert next(tower.to(torch.float64).parameters()).dtype == torch.float64


@pytest.mark.parametrize(
    "teacher",
    [
        {"type": "open_clip", "model": "ViT-H-14-378-quickgelu", "pretrained": "PLACE"},
        {"type": "siglip2", "model": "siglip2-g-384", "pretrained": "PLACE"},
        {"type": "siglip2", "model": "PLACE"},
        {"type": "siglip", "model": "PLACE"},
        {"type": "open_clip", "model": "PLACE", "pretrained": None},
    ],
)
def test_a_directory_is_accepted_with_every_type(teacher: dict[str, Any], saved_models: dict[str, Path]) -> None:
    place = saved_models["siglip"]
    tower = load_text_tower({k: str(place) if v == "PLACE" else v for k, v in teacher.items()})
    expected = reference_embeddings("siglip", place)
    torch.testing.assert_close(tower.encode_text(tower.tokenizer(TEXTS)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "repo"),
    [
        ("siglip2-g-384", "google/siglip2-giant-opt-patch16-384"),
        ("siglip2-so400m", "google/siglip2-so400m-patch16-naflex"),
        ("someone/a-tower", "someone/a-tower"),
    ],
)
def test_repository_in_the_hub_cache(
    model: str, repo: str, saved_models: dict[str, Path], hub_cache: Callable[..., Path]
) -> None:
    root = hub_cache(repo, saved_models["siglip2"])
    teacher = {"name": "s", "type": "siglip2", "model": model}
    tower = load_text_tower(teacher, cache_dir=root, local_files_only=True)
    expected = reference_embeddings("siglip2", saved_models["siglip2"])
    torch.testing.assert_close(tower.encode_text(tower.tokenizer(TEXTS)), expected, rtol=1e-5, atol=1e-6)


def test_sharded_weights_in_the_hub_cache(
    saved_models: dict[str, Path], hub_cache: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "sharded"
    transformers.CLIPModel.from_pretrained(saved_models["clip"]).save_pretrained(place, max_shard_size="40KB")
    assert (place / "model.safetensors.index.json").is_file()
    transformers.AutoTokenizer.from_pretrained(saved_models["clip"]).save_pretrained(place)
    monkeypatch.setenv("AMRADIO_CACHE", str(hub_cache("someone/sharded", place)))
    monkeypatch.setenv("AMRADIO_OFFLINE", "1")
    tower = load_text_tower({"type": "hf", "model": "someone/sharded"})
    expected = reference_embeddings("clip", saved_models["clip"])
    torch.testing.assert_close(tower.encode_text(tower.tokenizer(TEXTS)), expected, rtol=1e-5, atol=1e-6)


def test_repository_with_a_pickle_only(
    saved_models: dict[str, Path], hub_cache: Callable[..., Path], tmp_path: Path
) -> None:
    place = tmp_path / "pickled"
    shutil.copytree(saved_models["clip"], place)
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    root = hub_cache("someone/pickled", place, "v1")
    teacher = {"type": "hf", "model": "someone/pickled"}
    tower = load_text_tower(teacher, cache_dir=root, local_files_only=True, revision="v1")
    expected = reference_embeddings("clip", saved_models["clip"])
    torch.testing.assert_close(tower.encode_text(tower.tokenizer(TEXTS)), expected, rtol=1e-5, atol=1e-6)
    assert tower.logit_scale == 4.625


def test_offline_error_says_what_is_missing_and_what_to_do(tmp_path: Path) -> None:
    repo = "google/siglip2-giant-opt-patch16-384"
    with pytest.raises(OfflineError) as caught:
        load_text_tower(
            {"type": "siglip2", "model": "siglip2-g-384"}, cache_dir=tmp_path / "empty", local_files_only=True
        )
    assert str(caught.value) == (
        f"There is no copy of the configuration of {repo} in the cache ({tmp_path / 'empty'}), and "
        f"local_files_only=True. Fetch it once with a connection (`hf download {repo}`), or give the path of a local "
        "directory instead."
    )


def test_offline_error_when_only_the_weights_are_missing(
    saved_models: dict[str, Path], hub_cache: Callable[..., Path], tmp_path: Path
) -> None:
    place = tmp_path / "without"
    shutil.copytree(saved_models["clip"], place)
    (place / "model.safetensors").unlink()
    with pytest.raises(OfflineError, match=r"There is no copy of model\.safetensors or .* of a/b in the cache"):
        load_text_tower({"type": "hf", "model": "a/b"}, cache_dir=hub_cache("a/b", place), local_files_only=True)


@pytest.mark.parametrize("texts", [[], ["a", 3], 5])
def test_tokenizer_refuses_what_is_no_text(texts: Any, saved_models: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match="takes a str or a non-empty sequence of str, got"):
        load("siglip", saved_models["siglip"]).tokenizer(texts)


def edited(place: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(place, to)
    config = json.loads((to / "config.json").read_text())
    config.update(changes)
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_broken_directories(saved_models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"has no config\.json: a text tower is read from a directory in the layout"):
        load("clip", tmp_path)

    other = edited(saved_models["clip"], tmp_path / "bert", model_type="bert")
    with pytest.raises(
        CapabilityError, match=r"is a model of type 'bert'; text towers are read from models of type clip,"
    ):
        load("clip", other)

    image = edited(saved_models["clip"], tmp_path / "image")
    tensors = load_file(image / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.startswith("text_model.enc")}, image / "model.safetensors")
    with pytest.raises(CheckpointKeyError, match=r"lack 32 tensors of the text tower \(CLIPTextModelWithProjection\)"):
        load("clip", image)

    tensors["text_projection.weight"] = torch.zeros(21, 32)
    save_file(tensors, image / "model.safetensors")
    with pytest.raises(
        CheckpointShapeError, match=r"text_projection.weight has shape \[21, 32\], and should have \[20, 32\]"
    ):
        load("clip", image)

    (image / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load("clip", image)
    (image / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load("clip", image)
    torch.save({**tensors, "x": Path("/")}, image / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpointError, match="nothing of them was executed"):
        load("clip", image)
    (image / "pytorch_model.bin").unlink()

    save_file(tensors, image / "model.safetensors")
    (image / "tokenizer.json").write_text("{")
    with pytest.raises(LayoutError, match="transformers cannot read the tokenizer in"):
        load("clip", image)
    (image / "tokenizer.json").unlink()
    with pytest.raises(LayoutError, match=r"has no tokenizer: none of the files tokenizer\.json, vocab\.json, spiece"):
        load("clip", image)


def test_missing_sentencepiece(saved_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = edited(saved_models["siglip"], tmp_path / "pieces")
    (place / "tokenizer.json").rename(place / "spiece.model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"the package sentencepiece is not installed\. Install it with"):
        load("siglip", place)


def test_missing_transformers(saved_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"needs the package transformers.*pip install 'amradio\[text\]'"):
        load("clip", saved_models["clip"])


def test_code_of_a_repository_is_never_run(saved_models: dict[str, Path], tmp_path: Path) -> None:
    place = edited(saved_models["clip"], tmp_path / "code", model_type="own", auto_map={"AutoConfig": "evil.Config"})
    (place / "evil.py").write_text("open(__file__ + '.ran', 'w')\nclass Config: ...\n")
    with pytest.raises(CapabilityError, match="is a model of a type that transformers does not know"):
        load("clip", place)
    assert not list(tmp_path.rglob("*.ran"))
