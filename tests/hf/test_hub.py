"""What goes to the hub: files, model card, licence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

pytest.importorskip("transformers", minversion="5.13")

from amradio import __version__
from amradio.hf import AmradioModel
from amradio.hf import card as card_module
from amradio.models.radio import RadioModel
from amradio.weights.catalog import NVIDIA_OPEN_MODEL
from amradio.weights.checkpoint import Identity


class FakeHub:
    """Stands for ``HfApi``, and keeps what it is given."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, **options: Any) -> FakeHub:
        self.calls.append(("api", options))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create_repo", options))
        return SimpleNamespace(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id, **options}))

    def file_exists(self, repo_id: str, filename: str, **_: Any) -> bool:
        return filename in self.files

    def upload_folder(self, *, repo_id: str, folder_path: Path, ignore_patterns: list[str], **options: Any) -> str:
        self.calls.append(("upload_folder", {"repo_id": repo_id, **options}))
        self.files |= {p.name: p.read_bytes() for p in folder_path.iterdir() if p.name not in ignore_patterns}
        return "commit"


@pytest.fixture
def hub_api(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(card_module, "HfApi", fake)
    return fake


@pytest.fixture
def model(make_radio: Callable[[str], RadioModel]) -> AmradioModel:
    radio = make_radio("adaptors")
    radio.identity = Identity(
        source="nvidia/C-RADIOv3-B", layout="huggingface", version="c-radio_v3-b", license=NVIDIA_OPEN_MODEL.name
    )
    return AmradioModel.from_radio(radio)


def test_pushed_files_and_card(model: AmradioModel, hub_api: FakeHub) -> None:
    assert (
        model.push_to_hub("me/mine", private=True, token="hf_x", tags=["flowers"], commit_message="First") == "commit"
    )
    assert sorted(hub_api.files) == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert hub_api.calls[0] == ("api", {"token": "hf_x", "library_name": "amradio", "library_version": __version__})
    assert ("create_repo", {"private": True, "exist_ok": True}) in hub_api.calls
    assert hub_api.calls[-1][1]["commit_message"] == "First"
    card = ModelCard(hub_api.files["README.md"].decode())
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["amradio", "flowers"],
        "license": "other",
        "license_name": "nvidia-oml",
        "license_link": NVIDIA_OPEN_MODEL.url,
    }
    assert 'AutoModel.from_pretrained("me/mine")' in card.text
    assert "with the adaptors clip, sam" in card.text
    assert f"`c-radio_v3-b`, whose licence is: {NVIDIA_OPEN_MODEL.name}." in card.text
    assert "outputs.summary   # [1, 32]" in card.text


def test_a_card_that_is_there_is_kept(model: AmradioModel, hub_api: FakeHub, tmp_path: Path) -> None:
    hub_api.files["README.md"] = b"ours"
    model.push_to_hub("mine")
    assert hub_api.files["README.md"] == b"ours"
    assert hub_api.calls[-1][1]["repo_id"] == "me/mine"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("local")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, tags=["x"], private=False, max_shard_size="40KB")
    assert (tmp_path / "mine" / "README.md").read_text() == "local"
    assert "model.safetensors.index.json" in hub_api.files


def test_a_branch_is_made(model: AmradioModel, hub_api: FakeHub) -> None:
    model.push_to_hub("mine", revision="new")
    names = [name for name, _ in hub_api.calls]
    assert names == ["api", "create_repo", "create_branch", "upload_folder"]
    assert hub_api.calls[2][1] == {"repo_id": "me/mine", "branch": "new", "exist_ok": True}
    assert hub_api.calls[3][1]["revision"] == "new"


@pytest.mark.parametrize("options", [{}, {"revision": "refs/pr/1"}, {"revision": "dev", "create_pr": True}])
def test_no_branch_is_made(model: AmradioModel, hub_api: FakeHub, options: dict[str, Any]) -> None:
    model.push_to_hub("me/mine", **options)
    assert "create_branch" not in [name for name, _ in hub_api.calls]


@pytest.mark.parametrize(("identity", "license_"), [(None, None), (("mine", "Apache-2.0"), "apache-2.0")])
def test_licences(make_radio: Callable[[str], RadioModel], tmp_path: Path, identity: Any, license_: str | None) -> None:
    radio = make_radio("eradio")
    if identity is not None:
        radio.identity = Identity(source="x", layout="native", version=identity[0], license=identity[1])
    AmradioModel.from_radio(radio).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == license_
    assert "E-RADIO" in card.text
    assert "multiples of 32 pixels" in card.text
