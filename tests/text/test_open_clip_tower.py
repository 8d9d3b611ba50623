"""The open_clip route, on a stand-in for the package.

open_clip imports torchvision, of which no build fits every torch that these tests run with. The stand-in has the few
functions and classes that the route calls, with the names, signatures and parameter layout of open_clip 3.3.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from amradio.errors import CheckpointError, DownloadError, OfflineError, UnknownModelError
from amradio.text import TextTower, load_text_tower

CONFIGS: dict[str, dict[str, Any]] = {
    "Tiny": {"embed_dim": 6, "vision_cfg": {"width": 16}, "text_cfg": {"width": 8, "context_length": 5}},
    "Tiny-SigLIP": {
        "embed_dim": 6,
        "custom_text": True,
        "init_logit_bias": -10.0,
        "vision_cfg": {"timm_model_name": "vit_needs_timm", "width": 16},
        "text_cfg": {"width": 8, "context_length": 5, "hf_tokenizer_name": "timm/tok"},
    },
    "Tiny-CoCa": {
        "embed_dim": 6,
        "multimodal_cfg": {},
        "vision_cfg": {"width": 16},
        "text_cfg": {"width": 8, "context_length": 5},
    },
}
PRETRAINED: dict[str, dict[str, dict[str, str]]] = {
    "Tiny": {
        "hub": {"hf_hub": "org/tiny/"},
        "named": {"hf_hub": "org/tiny/weights.bin"},
        "web": {"url": "https://example.org/w.pt"},
        "nowhere": {"url": ""},
    }
}


class Text(nn.Module):
    def __init__(self, embed_dim: int, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(9, width)
        self.text_projection = nn.Parameter(torch.randn(width, embed_dim))

    def forward(self, text: Tensor) -> Tensor:
        return self.token_embedding(text).mean(1) @ self.text_projection


class CLIP(nn.Module):
    """Image tower at ``visual``, text tower at the top (``CLIP``) or at ``text`` (``CustomTextCLIP``)."""

    custom = False

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: dict[str, Any],
        text_cfg: dict[str, Any],
        quick_gelu: bool = False,
        init_logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        if "timm_model_name" in vision_cfg:
            raise RuntimeError("Please `pip install timm` to use timm models.")
        self.visual = nn.Linear(vision_cfg["width"], embed_dim)
        text = Text(embed_dim, text_cfg["width"])
        if self.custom:
            self.text = text
        else:
            self.token_embedding, self.text_projection = text.token_embedding, text.text_projection
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.tensor(init_logit_bias))

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        out = self.text(text) if self.custom else Text.forward(self, text)  # type: ignore[arg-type]
        return F.normalize(out, dim=-1) if normalize else out


class CustomTextCLIP(CLIP):
    custom = True


class Recorder:
    """What the route asked of the package."""

    def __init__(self) -> None:
        self.created: list[tuple[str, str | None]] = []
        self.tokenizers: list[tuple[str, dict[str, Any]]] = []
        self.downloads: list[dict[str, str]] = []
        self.web_file = ""


@pytest.fixture
def open_clip(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    module: Any = ModuleType("open_clip")
    recorder = Recorder()

    def create_model(model_name: str, pretrained: str | None = None, device: str = "cpu") -> CLIP:
        recorder.created.append((model_name, pretrained))
        config = {k: v for k, v in CONFIGS[model_name].items() if k not in ("custom_text", "multimodal_cfg")}
        cls = CustomTextCLIP if CONFIGS[model_name].get("custom_text") else CLIP
        model = cls(**config | {"vision_cfg": {"width": 16}})
        model.load_state_dict(torch.load(str(pretrained), weights_only=True))
        return model.train()

    def get_tokenizer(model_name: str = "", **kwargs: Any) -> Callable[[str | list[str]], Tensor]:
        recorder.tokenizers.append((model_name, kwargs))
        length = CONFIGS[model_name]["text_cfg"]["context_length"]
        return lambda texts: torch.tensor([[len(w) % 9 for w in (t.split() + [""] * length)[:length]] for t in texts])

    def download_pretrained(cfg: dict[str, str], cache_dir: str | None = None) -> str:
        recorder.downloads.append(cfg)
        if recorder.web_file == "cut":
            raise OSError("connection reset")
        return recorder.web_file

    module.CLIP, module.CustomTextCLIP, module.create_model = CLIP, CustomTextCLIP, create_model
    module.get_tokenizer, module.download_pretrained = get_tokenizer, download_pretrained
    module.get_model_config = lambda name: json.loads(json.dumps(CONFIGS[name])) if name in CONFIGS else None
    module.list_models = lambda: list(CONFIGS)
    module.get_pretrained_cfg = lambda model, tag: PRETRAINED.get(model, {}).get(tag, {})
    module.list_pretrained_tags_by_model = lambda model: list(PRETRAINED.get(model, {}))
    monkeypatch.setitem(sys.modules, "open_clip", module)
    return recorder


def build(name: str, vision_width: int = 16) -> CLIP:
    torch.manual_seed(1)
    config = {k: v for k, v in CONFIGS[name].items() if k not in ("custom_text", "multimodal_cfg")}
    cls = CustomTextCLIP if CONFIGS[name].get("custom_text") else CLIP
    model = cls(**config | {"vision_cfg": {"width": vision_width}})
    model.logit_scale.data.fill_(4.625)
    return model


def write(model: nn.Module, path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    elif path.name == "old.pt":
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    elif path.name == "trainer.pt":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    else:
        torch.save(model.state_dict(), path)
    return str(path)


def load(name: str, pretrained: str, **options: Any) -> Any:
    return load_text_tower({"name": "t", "type": "open_clip", "model": name, "pretrained": pretrained}, **options)


TEXTS = ["a photo of a cat", "dogs"]


@pytest.mark.parametrize("name", ["Tiny", "Tiny-SigLIP"])
@pytest.mark.parametrize("file", ["w.safetensors", "w.bin", "trainer.pt"])
def test_only_the_text_half_is_built(name: str, file: str, open_clip: Recorder, tmp_path: Path) -> None:
    whole = build(name)
    tower = load(name, write(whole, tmp_path / file))
    assert isinstance(tower, TextTower)
    tokens = tower.tokenizer(TEXTS)
    assert torch.equal(tower.encode_text(tokens), whole.encode_text(tokens))
    assert torch.equal(tower.encode_text(tokens, normalize=True), whole.encode_text(tokens, normalize=True))
    assert open_clip.created == []  # its own loader, which allocates both halves, was not needed
    assert not [n for n in tower.state_dict() if "visual" in n]
    assert (tower.embed_dim, tower.logit_scale) == (6, 4.625)
    assert tower.logit_bias == (-10.0 if name == "Tiny-SigLIP" else None)
    assert not tower.training
    assert not any(p.requires_grad for p in tower.parameters())


@pytest.mark.parametrize(("name", "file"), [("Tiny", "old.pt"), ("Tiny-CoCa", "w.bin")])
def test_special_layouts_go_through_the_whole_loader(name: str, file: str, open_clip: Recorder, tmp_path: Path) -> None:
    whole = build(name)
    path = write(whole, tmp_path / file)
    tower = load(name, path, dtype=torch.float64)
    tokens = tower.tokenizer(TEXTS)
    torch.testing.assert_close(tower.encode_text(tokens), whole.double().encode_text(tokens))
    assert open_clip.created == [(name, path)]
    assert not [n for n in tower.state_dict() if "visual" in n]
    assert not tower.training


def test_weights_of_another_model(open_clip: Recorder, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)does not hold weights of the open_clip model Tiny: .*Missing key"):
        load("Tiny", write(nn.Linear(2, 2), tmp_path / "w.bin"))


@pytest.mark.parametrize(
    ("tag", "file"),
    [("hub", "open_clip_model.safetensors"), ("hub", "open_clip_pytorch_model.bin"), ("named", "weights.bin")],
)
def test_weights_from_the_hub(tag: str, file: str, open_clip: Recorder, tmp_path: Path, hub_cache: Any) -> None:
    place = tmp_path / "files"
    place.mkdir()
    whole = build("Tiny")
    write(whole, place / file)
    tower = load("Tiny", tag, cache_dir=hub_cache("org/tiny", place), local_files_only=True)
    tokens = tower.tokenizer(TEXTS)
    assert torch.equal(tower.encode_text(tokens), whole.encode_text(tokens))
    assert open_clip.downloads == []
    assert open_clip.tokenizers == [("Tiny", {})]


def test_tokenizer_from_the_hub_gets_the_hub_options(open_clip: Recorder, tmp_path: Path) -> None:
    path = write(build("Tiny-SigLIP"), tmp_path / "w.bin")
    load("Tiny-SigLIP", path, cache_dir=tmp_path, token="secret", local_files_only=True)
    expected = {"cache_dir": str(tmp_path), "token": "secret", "local_files_only": True}
    assert open_clip.tokenizers == [("Tiny-SigLIP", expected)]


@pytest.mark.usefixtures("online")
def test_weights_from_an_address(open_clip: Recorder, tmp_path: Path) -> None:
    whole = build("Tiny")
    open_clip.web_file = write(whole, tmp_path / "w.bin")
    tower = load("Tiny", "web")
    assert torch.equal(tower.encode_text(tower.tokenizer(TEXTS)), whole.encode_text(tower.tokenizer(TEXTS)))
    assert open_clip.downloads == [PRETRAINED["Tiny"]["web"]]
    with pytest.raises(
        OfflineError, match=r"come from https://example.org/w.pt, and local_files_only=True\. Fetch the"
    ):
        load("Tiny", "web", local_files_only=True)
    open_clip.web_file = "cut"
    with pytest.raises(DownloadError, match="Fetching the weights 'web' of open_clip's Tiny failed: connection reset"):
        load("Tiny", "web")
    open_clip.web_file = ""
    with pytest.raises(DownloadError, match="open_clip knows no address for the weights 'nowhere' of Tiny"):
        load("Tiny", "nowhere")


def test_unknown_names(open_clip: Recorder) -> None:
    with pytest.raises(UnknownModelError, match=r"open_clip has no architecture 'Tinny'\. Nearest names: Tiny"):
        load("Tinny", "hub")
    with pytest.raises(
        UnknownModelError, match=r"has no weights 'hubb' for Tiny, .* no such file\. Nearest names: hub"
    ):
        load("Tiny", "hubb")
    with pytest.raises(UnknownModelError, match=r"open_clip has no weights '' for Tiny"):
        load_text_tower({"type": "open_clip", "model": "Tiny"})
