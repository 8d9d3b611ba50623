"""The documentation: its Python runs, its commands parse, its tables and links are right.

Python blocks of a page run in order, in one namespace, in a folder with a few pictures. Published names give tiny
random models with the structure of the published ones. A block that cannot run anywhere says why, in a comment before
it: ``<!-- not run: needs a GPU -->``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import amradio
from amradio.backbones.locate import Located
from amradio.models.configs import AdaptorConfig, HeadConfig, RadioConfig, ViTConfig
from amradio.weights.catalog import CatalogEntry, entries

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
WIDTH, TEXT_WIDTH = 32, 24

BLOCK = re.compile(
    r"(?P<comment><!-- not run: [^>]+ -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Line number and content of the code blocks of a page that are meant to be run."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if match["language"] == language and not match["comment"]:
            yield text.count("\n", 0, match.start("code")), match["code"]


def pages_with(language: str) -> list[Any]:
    return [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES if any(blocks(p, language))]


# ---- tiny stand-ins for published models ----


class FakeText(torch.nn.Module):
    """A text tower whose embeddings depend on the text's length only."""

    tokenizer = staticmethod(lambda texts: torch.tensor([[len(t)] for t in texts]))

    def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        embeddings = torch.sin(tokens * torch.arange(1, TEXT_WIDTH + 1))
        return torch.nn.functional.normalize(embeddings, dim=-1) if normalize else embeddings


TEACHERS = {"siglip2-g": "siglip2", "clip": "open_clip", "siglip": "open_clip", "sam": "sam", "sam3": "sam3"}


def tiny_checkpoint(entry: CatalogEntry, folder: Path) -> Path:
    """A checkpoint in the official layout, with the teachers that every generation has together."""
    head = HeadConfig(input_dim=WIDTH, hidden_dim=16, output_dim=TEXT_WIDTH)
    trunk = ViTConfig(
        embed_dim=WIDTH,
        depth=12,
        num_heads=2,
        mlp_hidden_dim=64,
        patch_size=entry.patch_size,
        position_grid=(16, 16),
        num_cls_tokens=len(TEACHERS),
        num_registers=2,
    )
    config = RadioConfig(
        backbone=trunk,
        summary_idxs=(0, 1),
        adaptors={n: AdaptorConfig(head_idx=i, summary=head, features=head) for i, n in enumerate(TEACHERS)},
        teachers=tuple(
            {"name": n, "type": kind, "model": "tiny", "use_summary": i < 2}
            for i, (n, kind) in enumerate(TEACHERS.items())
        ),
    )
    model = amradio.RadioModel(config, adaptors=list(TEACHERS))
    return Path(amradio.save(model, folder / f"{entry.version}.pth.tar", layout="official"))


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Published names lead to tiny checkpoints, text towers to a toy."""
    from amradio.backbones import load as load_module
    from amradio.backbones import locate as locate_module

    folder = tmp_path_factory.mktemp("published")
    real: Callable[..., Located] = locate_module.locate

    def locate(name: str, **options: Any) -> Located:
        entry = locate_module.find_entry(name)
        if entry is None:
            return real(name, **options)
        path = folder / f"{entry.version}.pth.tar"
        return Located(path=path if path.exists() else tiny_checkpoint(entry, folder), source=name, entry=entry)

    for module in (load_module, locate_module):
        monkeypatch.setattr(module, "locate", locate)

    text_tower = load_module.load_text_tower
    monkeypatch.setattr(  # the package's own is no larger than a toy
        load_module, "load_text_tower", lambda t, **o: text_tower(t, **o) if t["type"] == "sentence" else FakeText()
    )
    monkeypatch.setattr(load_module, "_licence_said", {e.version for e in entries()})


@pytest.fixture
def folder_with_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a reader of the documentation."""
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for i, name in enumerate(["photo.jpg", "photos/cat.jpg", "photos/rocket.png"]):
        Image.effect_noise((320 + 32 * i, 288), 60).convert("RGB").save(tmp_path / name)
    (tmp_path / "hubconf.py").write_bytes((ROOT / "hubconf.py").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- the tests ----


@pytest.mark.parametrize("page", pages_with("python"))
@pytest.mark.usefixtures("published", "folder_with_pictures")
def test_python_runs(page: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "documentation"}
    for line, code in blocks(page, "python"):
        padded = "\n" * line + code  # so that a traceback shows the line of the page
        exec(compile(padded, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_parse(page: Path) -> None:
    from amradio.cli import parse

    extras = set(re.findall(r"^(\w+) = \[", _section("project.optional-dependencies"), re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for _, code in blocks(page, "bash"):
        for words in (shlex.split(line, comments=True) for line in code.splitlines()):
            if words[:1] == ["amradio"]:
                parse(words[1:])
            elif words[:1] == ["make"]:
                assert {w for w in words[1:] if "=" not in w} <= targets, words
            elif words[:2] == ["pip", "install"]:
                assert {e for w in words for e in re.findall(r"\[(\w+)\]", w)} <= extras, words


@pytest.mark.parametrize("page", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("https://", "http://")):
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation


def test_the_table_of_models_is_the_catalog() -> None:
    assert models_table() in (ROOT / "docs" / "models.md").read_text(encoding="utf-8"), models_table()


def test_the_table_of_published_results_is_the_catalog() -> None:
    assert results_table() in (ROOT / "docs" / "models.md").read_text(encoding="utf-8"), results_table()


def test_the_page_on_compatibility_says_what_the_option_does() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert 'compat="official"' in page
    assert "compat" in (amradio.load.__doc__ or "")


def test_blocks_are_found_and_comments_respected(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "a\n```python\nx = 1\n```\n<!-- not run: why -->\n```python\ny\n```\n```bash\nls\n```\n", encoding="utf-8"
    )
    assert list(blocks(page, "python")) == [(2, "x = 1\n")]
    assert list(blocks(page, "bash")) == [(9, "ls\n")]


def models_table() -> str:
    """The table in docs/models.md, from the catalog."""
    columns: dict[str, Callable[[CatalogEntry], str]] = {
        "version": lambda e: f"`{e.version}`",
        "Hugging Face": lambda e: f"`{e.hf_repo}`" if e.hf_repo else "",
        "commercial": lambda e: "yes" if e.commercial else "**no**",
        "network": lambda e: re.split(r",| \(", e.architecture)[0],
        "preferred": lambda e: (
            " x ".join(map(str, e.preferred_resolution)) if e.preferred_resolution else "in its file"
        ),
        "ViTDet": lambda e: "yes" if e.supports_vitdet else "no",
        "positions as published": lambda e: e.position_interpolation_published.replace("_", " "),
    }
    return _table(columns, entries())


def results_table() -> str:
    """The second table in docs/models.md, from the catalog."""
    metrics = {
        "zero-shot": "zero_shot_top1_percent",
        "k-NN": "knn_top1_percent",
        "ADE20k": "ade20k_miou_percent",
        "VOC": "voc_miou_percent",
        "SAM-COCO": "sam_coco_percent",
        "GQA": "gqa_percent",
        "TextVQA": "textvqa_percent",
        "VQAv2": "vqav2_percent",
    }
    columns: dict[str, Callable[[CatalogEntry], str]] = {"version": lambda e: f"`{e.version}`"}
    for title, key in metrics.items():
        columns[title] = lambda e, key=key: f"{e.metrics[key]:.2f}" if key in e.metrics else ""
    return _table(columns, [e for e in entries() if e.metrics])


def _table(columns: Mapping[str, Callable[[CatalogEntry], str]], rows: Sequence[CatalogEntry]) -> str:
    lines = [list(columns), ["---"] * len(columns), *([cell(e) for cell in columns.values()] for e in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _section(name: str) -> str:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return text.split(f"[{name}]", 1)[1].split("\n[", 1)[0]
