"""From a teacher's record to a tower: dispatch, what is not imported, and the texts of errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from amradio.errors import (
    CapabilityError,
    ConfigError,
    DownloadError,
    GatedRepoError,
    MissingDependencyError,
    OfflineError,
    UnknownModelError,
)
from amradio.hub import HubOptions
from amradio.text import has_text_side, load_text_tower, towers
from amradio.text.hub import fetch_description, fetch_first

CLIP = {"name": "clip", "type": "open_clip", "model": "ViT-H-14-378-quickgelu", "pretrained": "dfn5b"}
SIGLIP = {"name": "siglip", "type": "open_clip", "model": "ViT-SO400M-14-SigLIP-384", "pretrained": "webli"}


def test_importing_the_package_imports_no_text_library() -> None:
    heavy = {"transformers", "open_clip", "torchvision", "timm", "huggingface_hub"}
    code = f"import sys, amradio.text; print(*sorted({heavy} & set(sys.modules)))"
    source = Path(towers.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(source)},
    )
    assert run.stdout.strip() == ""


@pytest.mark.parametrize("kind", ["dino_v2", "dino_v3", "sam", "sam3", "openai_clip", "rtx_translate"])
def test_teachers_without_a_text_side(kind: str) -> None:
    teacher = {"name": "some", "type": kind, "model": "m"}
    assert not has_text_side(teacher)
    with pytest.raises(CapabilityError) as caught:
        load_text_tower(teacher)
    assert str(caught.value) == (
        f"Teacher 'some' has no text side: its type is '{kind}'. "
        "Types with one: open_clip, siglip2, siglip, hf, sentence."
    )


def test_records_that_say_too_little() -> None:
    assert has_text_side(CLIP)
    assert not has_text_side({})
    with pytest.raises(ConfigError, match="The record of teacher 'x' has no type; it has name, model"):
        load_text_tower({"name": "x", "model": "m"})
    with pytest.raises(ConfigError, match=r"The record of teacher 'x' \(type siglip2\) names no model"):
        load_text_tower({"name": "x", "type": "siglip2"})


@pytest.mark.parametrize("name", ["siglip2-g-385", "/no/such/directory", "./relative", "a/b/c"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(
        UnknownModelError, match=r"not a local directory and not a repository \(organisation/name\)"
    ) as e:
        load_text_tower({"type": "siglip2", "model": name})
    if name.startswith("siglip2"):
        assert "Nearest names: siglip2-g-384" in str(e.value)


@pytest.fixture
def no_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)


@pytest.mark.parametrize(
    ("teacher", "kind", "repo", "activation"),
    [
        (CLIP, "clip", "apple/DFN5B-CLIP-ViT-H-14-378", torch.nn.functional.silu),
        (SIGLIP, "siglip", "google/siglip-so400m-patch14-384", torch.nn.functional.gelu),
    ],
)
@pytest.mark.usefixtures("no_open_clip")
def test_released_teachers_work_without_open_clip(
    teacher: dict[str, Any],
    kind: str,
    repo: str,
    activation: Any,
    saved_models: dict[str, Path],
    hub_cache: Any,
) -> None:
    root = hub_cache(repo, saved_models[kind])
    tower: Any = load_text_tower(teacher, cache_dir=root, local_files_only=True)
    assert tower.encode_text(tower.tokenizer(["a cat"])).shape == (1, tower.embed_dim)
    # The activation is open_clip's: x * sigmoid(1.702 x) for quickgelu, the exact GELU for SigLIP.
    act = next(m for n, m in tower.named_modules() if n.endswith("activation_fn"))
    x = torch.linspace(-4, 4, 33)
    expected = activation(1.702 * x) / 1.702 if kind == "clip" else activation(x)
    torch.testing.assert_close(act(x), expected)


@pytest.mark.usefixtures("no_open_clip")
def test_open_clip_missing_and_no_other_way() -> None:
    with pytest.raises(MissingDependencyError) as caught:
        load_text_tower({**CLIP, "pretrained": "laion2b"})
    message = str(caught.value)
    assert message.startswith("The text side of ViT-H-14-378-quickgelu / laion2b needs open_clip. open_clip cannot be")
    assert "pip install 'amradio[text]'" in message
    assert "is known for ViT-H-14-378-quickgelu / dfn5b; ViT-SO400M-14-SigLIP-384 / webli only" in message
    assert "give the path of a local directory as `pretrained`" in message


@pytest.mark.usefixtures("no_open_clip")
def test_both_libraries_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        MissingDependencyError, match=r"needs open_clip or transformers\. open_clip cannot .* transformers"
    ):
        load_text_tower(CLIP)


def test_broken_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "open_clip":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(MissingDependencyError, match=r"\(RuntimeError: operator torchvision::nms does not exist\)"):
        load_text_tower({**CLIP, "pretrained": "other"})


def hub_error(name: str) -> Exception:
    from huggingface_hub import errors

    error: Exception = getattr(errors, name)("no", response=SimpleNamespace(headers={}, request=None, status_code=403))
    return error


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        ("GatedRepoError", GatedRepoError, r"a/b is gated: .* Accept it on https://huggingface.co/a/b, then log in"),
        (
            "RepositoryNotFoundError",
            DownloadError,
            r"There is no repository a/b on the Hugging Face hub, or it is private",
        ),
        ("RevisionNotFoundError", DownloadError, r"a/b has no revision 'v9'"),
        ("HfHubHTTPError", DownloadError, r"Fetching the configuration of a/b failed"),
    ],
)
def test_hub_errors(error: str, expected: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise hub_error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(DownloadError, match=text) as caught:
        load_text_tower({"type": "hf", "model": "a/b"}, revision="v9")
    assert type(caught.value) is expected


@pytest.mark.usefixtures("online")
def test_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("check your connection") from ConnectionError("name resolution failed")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(DownloadError, match=r"Fetching w of a/b failed: name resolution failed") as caught:
        fetch_first("a/b", ["w"], HubOptions())
    assert not isinstance(caught.value, OfflineError)


@pytest.mark.usefixtures("online")
def test_repository_without_the_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def absent(*_: object, **__: object) -> None:
        raise hub_error("RemoteEntryNotFoundError")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(DownloadError, match=r"a/b has none of the weight files x, y"):
        fetch_first("a/b", ["x", "y"], HubOptions())
    with pytest.raises(DownloadError, match=r"a/b has no config\.json"):
        fetch_description("a/b", HubOptions())


def test_open_clip_is_preferred_when_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("open_clip")
    monkeypatch.setitem(sys.modules, "open_clip", module)
    seen = []

    def load(open_clip: ModuleType, model: str, pretrained: str, options: HubOptions) -> torch.nn.Module:
        seen.append((open_clip, model, pretrained, options.token))
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(towers, "load_open_clip_tower", load)
    load_text_tower(CLIP, token="secret")
    assert seen == [(module, CLIP["model"], "dfn5b", "secret")]
