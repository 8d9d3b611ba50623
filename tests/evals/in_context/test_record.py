"""A memory is used again only with the settings that it was made with, and reports say which these were."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import amradio
from amradio.errors import OptionError
from amradio.evals.in_context import InContextConfig, in_context_policy, run_in_context
from amradio.evals.report import compare
from amradio.evals.runner import Setup, built_record, model_record
from amradio.features import ExtractOptions
from amradio.fungi import DenseConfig, DenseFungiBackbone, Pca, SupportIndex
from amradio.fungi.heads import Head
from amradio.models.configs import RadioConfig, ViTConfig

PLAIN = InContextConfig(k=5, augmentation="none")
DENSE = DenseConfig(latent_dim=8, projection="tensor-sketch")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a file, so that the file's digest is its identity."""
    torch.manual_seed(0)
    trunk = ViTConfig(embed_dim=16, depth=2, num_heads=2, mlp_hidden_dim=32, patch_size=4, position_grid=(6, 6))
    config = RadioConfig(backbone=trunk, supports_vitdet=True)
    path: Path = amradio.save(amradio.RadioModel(config), tmp_path_factory.mktemp("model") / "model")
    return path


@pytest.fixture
def load(saved: Path) -> Any:
    """``load(**options)``: the model, known by the digest of a file, so that none of its weights is computed for it."""

    def loaded(**options: Any) -> Any:
        model: Any = amradio.load_backbone(str(saved), **options)
        model.identity = dataclasses.replace(model.identity, sha256="ab" * 32)
        return model

    return loaded


@pytest.fixture
def model(load: Any) -> Any:
    return load()


def rows(seed: int = 0, count: int = 40) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


def dense(model: Any, support: SupportIndex | None = None, head: Head | None = None, **changes: Any) -> Any:
    support = support or SupportIndex(rows())
    return DenseFungiBackbone(model, dataclasses.replace(DENSE, **changes), support=support, head=head)


def run(backbone: Any, sets: Any, options: dict[str, Any] | None = None, **more: Any) -> Any:
    setup = Setup(in_context_policy(backbone, (16, 24)), ExtractOptions(**{"batch_size": 2, **(options or {})}))
    return run_in_context(backbone, *sets, PLAIN, setup, **more)[0]


def with_epoch(model: Any) -> Any:
    backbone = dense(model)
    backbone.epoch = 1
    return backbone


def with_pca(model: Any, seed: int = 0) -> Any:
    backbone = dense(model)
    values = torch.randn(64, backbone.embed_dim, generator=torch.Generator().manual_seed(seed))
    backbone.pca = Pca.fit(values, 32)
    return backbone


CHANGED: dict[str, Any] = {
    "latent_dim": lambda m: dense(m, latent_dim=9),
    "negatives_per_token": lambda m: dense(m, negatives_per_token=4),
    "keep": lambda m: dense(m, keep=1.0),
    "temperature": lambda m: dense(m, temperature=0.2),
    "negatives": lambda m: dense(m, negatives="interleaved"),
    "denominator": lambda m: dense(m, denominator="raw"),
    "loss_dtype": lambda m: dense(m, loss_dtype="float16"),
    "loss_tokens": lambda m: dense(m, loss_tokens="all"),
    "projection": lambda m: dense(m, projection="rank-one-4"),
    "seed": lambda m: dense(m, seed=1),
    "layer": lambda m: dense(m, layer="blocks.0.attn.proj"),
    "epoch": with_epoch,
    "pca": lambda m: with_pca(m),
    "head": lambda m: dense(m, head=Head.random(16, 8, torch.Generator().manual_seed(1))),
    "support.sha256": lambda m: dense(m, SupportIndex(rows(1))),
    "support.rows": lambda m: dense(m, SupportIndex(rows(0, 50))),
    "support.neighbours": lambda m: dense(m, SupportIndex(rows(), neighbours=3)),
    "support.search": lambda m: dense(m, SupportIndex(rows(), search=lambda q, k: SupportIndex(rows()).find(q, k))),
}


@pytest.mark.parametrize("field", CHANGED)
def test_gradients_of_other_settings_are_not_mixed(field: str, model: Any, sets: Any, tmp_path: Path) -> None:
    path = tmp_path / "memory.safetensors"
    first = run(dense(model), sets, memory_out=path)
    if field == "latent_dim":  # once is enough
        assert run(dense(model), sets, memory_in=path).metrics["miou"] == first.metrics["miou"]
    with pytest.raises(OptionError, match=rf"was made in another way: .*fungi\.{field}[. ].* in the file and "):
        run(CHANGED[field](model), sets, memory_in=path)


def test_features_with_and_without_gradients_are_not_mixed(model: Any, sets: Any, tmp_path: Path) -> None:
    run(model, sets, memory_out=tmp_path / "memory.safetensors")
    with pytest.raises(OptionError, match=r"fungi is None in the file and \{'kind': 'dense', "):
        run(dense(model), sets, memory_in=tmp_path / "memory.safetensors")


def test_other_components_are_not_mixed(model: Any, sets: Any, tmp_path: Path) -> None:
    run(with_pca(model), sets, memory_out=tmp_path / "memory.safetensors")
    with pytest.raises(OptionError, match=r"another way: fungi\.pca\.sha256 is"):
        run(with_pca(model, 1), sets, memory_in=tmp_path / "memory.safetensors")


@pytest.mark.parametrize(
    ("field", "loading", "options"),
    [
        (r"built\.config\.position_interpolation", {"position_interpolation": "align_corners"}, {}),
        (r"built\.vitdet_window_size", {"vitdet_window_size": 2}, {}),
        (r"built\.dtype", {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16}),
        (r"options\.autocast", {}, {"autocast": torch.bfloat16}),
        (r"options\.background", {}, {"background": (0, 0, 0)}),
        (r"options\.max_pixels", {}, {"max_pixels": 10_000}),
    ],
)
def test_models_that_were_built_or_run_otherwise_are_not_mixed(
    field: str, loading: Any, options: Any, load: Any, model: Any, sets: Any, tmp_path: Path
) -> None:
    run(model, sets, memory_out=tmp_path / "memory.safetensors")
    other = load(**loading)
    assert model_record(other) == {**model_record(model), "min_resolution_step": other.min_resolution_step}
    with pytest.raises(OptionError, match=rf"was made in another way: .*{field} is .* in the file and "):
        run(other, sets, options, memory_in=tmp_path / "memory.safetensors")


def test_reports_say_with_which_gradients(model: Any, sets: Any) -> None:
    support = SupportIndex(rows())
    first, second = (run(dense(model, support, keep=keep), sets) for keep in (0.5, 1.0))
    record = first.config["fungi"]
    assert {name: record[name] for name in dataclasses.asdict(DENSE) if name != "layer"} == {
        name: value for name, value in dataclasses.asdict(DENSE).items() if name != "layer"
    }
    assert record["layer"] == "model.blocks.1.attn.proj"
    assert record["support"]["rows"] == 40
    assert record["support"]["search"] == "exact"
    assert "fungi" not in run(model, sets).config
    assert compare([first, second]).protocol_differs == ["config.fungi.keep"]


def test_how_a_model_inside_a_wrapper_was_built(model: Any) -> None:
    assert built_record(dense(model)) == built_record(model)
    assert built_record(model)["vitdet_window_size"] is None


def test_options_of_adapters_are_on_record() -> None:
    adapted = amradio.load_backbone(lambda x: (x.mean((2, 3)), x), patch_size=1, min_resolution_step=1)
    assert built_record(adapted)["options"] == {"num_prefix_tokens": 0, "map_fmt": "NCHW"}
