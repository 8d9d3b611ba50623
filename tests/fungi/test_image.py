"""The per-image wrapper: what its features depend on and what not, its objectives, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import amradio
from amradio.errors import OptionError
from amradio.features import ExtractOptions, collect
from amradio.fungi import FungiWrapper, ImageConfig, Objective
from amradio.fungi.objectives import (
    OBJECTIVES,
    DeepClusterObjective,
    DinoObjective,
    FittedObjective,
    KlObjective,
    SimclrObjective,
    make_objective,
)
from amradio.fungi.projections import SignProjection
from amradio.images import ResizePolicy, open_images

SMALL = {"latent_dim": 16, "size": 16}


def objectives(width: int = 32) -> list[Any]:
    return [
        KlObjective(width, resize=20, **SMALL),
        DinoObjective(width, local_crops=3, **SMALL),
        SimclrObjective(width, stride_scale=2, support_size=3, **SMALL),
        DeepClusterObjective(width, local_crops=2, prototypes=(2, 3), support_size=4, **SMALL),
    ]


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (5, 3, 24, 16), dtype=torch.uint8)


@pytest.fixture
def fungi(tiny: Any, images: Tensor) -> FungiWrapper:
    model = tiny(num_registers=1, final_norm=True)
    return FungiWrapper(model, objectives(), ImageConfig(view_size=16, view_batch=7)).fit([images])


def slow_features(fungi: FungiWrapper, objective: Objective, picture: Tensor) -> Tensor:
    """The whole network with trainable weights of the layer, and the whole sign matrix."""
    from amradio.fungi.hashing import picture_seed

    model = fungi.base
    layer = model.model.blocks[-1].attn.proj
    views = objective.views(picture, picture_seed(picture, fungi.config.seed, objective.name))
    weight = layer.weight.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    handle = layer.register_forward_hook(lambda module, args, output: F.linear(args[0], weight, bias))
    summary = model(views).summary
    handle.remove()
    loss = objective.loss(summary[None])
    by_weight, by_bias = torch.autograd.grad(loss.sum(), [weight, bias])
    gradient = torch.cat([by_weight, by_bias[:, None]], 1)
    assert isinstance(fungi.projection, SignProjection)
    projected = fungi.projection.signs.flatten(1).double() @ gradient.flatten().double()
    return (projected / projected.norm()).float()


def test_features_equal_the_slow_route(fungi: FungiWrapper, images: Tensor) -> None:
    found = fungi.features(images)
    assert list(found) == list(OBJECTIVES)
    for name, objective in fungi.objectives.items():
        for i in range(2):
            slow = slow_features(fungi, objective, images[i])
            torch.testing.assert_close(found[name][i], slow, atol=2e-5, rtol=1e-4)


def test_average_pooling(tiny: Any, images: Tensor) -> None:
    model = tiny(pool="avg", final_norm=True)
    fungi = FungiWrapper(model, objectives()[:2], ImageConfig(view_size=16)).fit([images])
    for name, objective in fungi.objectives.items():
        slow = slow_features(fungi, objective, images[0])
        torch.testing.assert_close(fungi.features(images[:1])[name][0], slow, atol=2e-5, rtol=1e-4)


def test_it_is_a_backbone(fungi: FungiWrapper, images: Tensor) -> None:
    assert isinstance(fungi, amradio.Backbone)
    pixels = images.float() / 255
    summary, features = fungi(pixels, "NCHW")
    base = fungi.base(pixels, "NCHW")
    assert torch.equal(features, base.features)
    assert (fungi.summary_dim, fungi.embed_dim) == (32 * 5, 32)
    assert summary.shape == (5, 160)
    parts = summary.split(32, dim=1)
    torch.testing.assert_close(parts[0], F.normalize(base.summary, dim=1))
    for part, found in zip(parts[1:], fungi.features(images).values(), strict=True):
        torch.testing.assert_close(part, found)
        torch.testing.assert_close(part.norm(dim=1), torch.ones(5))
    assert fungi.identity.version.endswith("+ FUNGI (kl, dino, simclr, deepcluster; clean, sign)")
    assert fungi.layer == "model.blocks.1.attn.proj"


def test_without_the_embedding(tiny: Any, images: Tensor) -> None:
    config = ImageConfig(view_size=16, include_embedding=False, projection="rank-one-4", projection_dim=50)
    fungi = FungiWrapper(tiny(), ["kl", "dino"], config)
    assert fungi.summary_dim == 100
    assert fungi(images.float() / 255).summary.shape == (5, 100)


def test_features_depend_on_neither_batch_nor_order(fungi: FungiWrapper, images: Tensor) -> None:
    together = fungi.features(images)
    again = fungi.features(images)
    backwards = fungi.features(images.flip(0))
    for name, found in together.items():
        assert torch.equal(again[name], found)
        torch.testing.assert_close(backwards[name].flip(0), found, atol=1e-5, rtol=0)
        for i in range(5):
            torch.testing.assert_close(fungi.features(images[i : i + 1])[name][0], found[i], atol=1e-5, rtol=0)


def test_few_views_are_held_at_once(fungi: FungiWrapper, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fungi.features(images)
    seen: list[int] = []
    gradients = fungi.gradients

    def counted(objective: Objective, views: Tensor) -> Any:
        seen.append(views.shape[0] * views.shape[1])
        return gradients(objective, views)

    monkeypatch.setattr(fungi, "gradients", counted)
    found = fungi.features(images)
    assert sum(seen) == 5 * (1 + 5 + 9 + 6)
    assert max(seen) == 9  # one picture's windows; elsewhere at most view_batch = 7
    for name, features in found.items():
        torch.testing.assert_close(features, expected[name], atol=1e-5, rtol=0)
    assert fungi.features([])["kl"].shape == (0, 32)


def test_the_same_picture_in_any_form(fungi: FungiWrapper, images: Tensor) -> None:
    expected = fungi.features(images[:1])
    forms = [images[0].float() / 255, Image.fromarray(images[0].permute(1, 2, 0).numpy())]
    for form in forms:
        found = fungi.features([form])
        for name in expected:
            assert torch.equal(found[name], expected[name])


def test_under_the_engine(fungi: FungiWrapper, images: Tensor, tmp_path: Path) -> None:
    for i, picture in enumerate(images):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    policy = ResizePolicy.parse(None, multiple=8)
    tables = [
        collect(open_images(tmp_path), fungi, policy, ExtractOptions(batch_size=b, workers=w))
        for b, w in ((1, 1), (3, 2))
    ]
    first, second = (t.summaries["backbone"] for t in tables)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    torch.testing.assert_close(first, fungi(images.float() / 255).summary, atol=1e-5, rtol=0)


def test_the_model_stays_as_it_was(fungi: FungiWrapper, images: Tensor) -> None:
    other = FungiWrapper(fungi.base, ["kl"], ImageConfig(view_size=16, layer="blocks.0.attn.proj"))
    before = fungi.features(images)["kl"]
    other.features(images)
    assert torch.equal(fungi.features(images)["kl"], before)
    for module in fungi.base.modules():
        assert not module._forward_hooks
    assert all(p.grad is None and not p.requires_grad for p in fungi.base.parameters())
    assert not [p for o in fungi.objectives.values() for p in o.parameters()]  # type: ignore[attr-defined]


class Loudness:
    """An objective of one's own: two lines."""

    name = "loudness"

    def views(self, picture: Tensor, seed: int) -> Tensor:
        return picture[None, :, :16, :16].float() / 255

    def loss(self, embeddings: Tensor) -> Tensor:
        return embeddings.square().mean((1, 2))


def test_an_objective_of_ones_own(tiny: Any, images: Tensor) -> None:
    assert isinstance(Loudness(), Objective)
    assert not isinstance(Loudness(), FittedObjective)
    fungi = FungiWrapper(tiny(), [Loudness(), "kl"], ImageConfig(view_size=16)).fit([])
    assert list(fungi.features(images)) == ["loudness", "kl"]


def test_fitting_on_what_there_is(tiny: Any, images: Tensor, tmp_path: Path) -> None:
    for i, picture in enumerate(images):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    model = tiny(final_norm=True)

    def negatives(data: Any, count: int = 5) -> Tensor:
        objective = SimclrObjective(32, stride_scale=2, support_size=count, **SMALL)
        FungiWrapper(model, [objective], ImageConfig(view_size=16)).fit(data)
        return objective.negatives

    whole = negatives([images])
    assert whole.shape == (5 * 9, 16)
    torch.testing.assert_close(negatives([(images[:2], 0), (images[2:], 0)]), whole)
    torch.testing.assert_close(negatives(list(images)), whole)
    torch.testing.assert_close(negatives([images], 2), whole[:18])
    of_set = negatives(open_images(tmp_path)).view(5, 9, 16)
    torch.testing.assert_close(of_set.sum(0), whole.view(5, 9, 16).sum(0), atol=1e-4, rtol=1e-4)


def test_random_views_differ_between_objectives_and_seeds(images: Tensor) -> None:
    objective = DinoObjective(8, **SMALL)
    assert torch.equal(objective.views(images[0], 1), objective.views(images[0], 1))
    assert not torch.equal(objective.views(images[0], 1), objective.views(images[0], 2))
    clusters = DeepClusterObjective(8, **SMALL)
    assert torch.equal(clusters.views(images[0], 4)[:2], clusters.support_views(images[0], 4))
    assert not torch.equal(clusters.views(images[0], 4)[2:4], clusters.support_views(images[0], 4))


def test_presets() -> None:
    assert make_objective("kl", 8).temperature == 15
    assert make_objective("kl", 8, preset="fungivision").temperature == 1
    assert make_objective("simclr", 8, preset="fungivision").denominator == "raw"
    paper = make_objective("simclr", 8, preset="fungi-paper")
    assert (paper.denominator, paper.loss_dtype, paper.support_size) == ("tempered", "float16", 256)
    assert make_objective("deepcluster", 8, preset="fungi-paper").mistyped_std
    views = [make_objective(n, 8).views(torch.zeros(3, 30, 30, dtype=torch.uint8), 0) for n in OBJECTIVES]
    assert [tuple(v.shape) for v in views] == [(count, 3, 224, 224) for count in (1, 12, 49, 10)]


# ---- what is refused ----


def test_objectives_that_are_not_fitted(tiny: Any, images: Tensor) -> None:
    for name, message in (("simclr", "needs pictures to take negatives from"), ("deepcluster", "to find clusters in")):
        fungi = FungiWrapper(tiny(), [name], ImageConfig(view_size=16))
        with pytest.raises(OptionError, match=message):
            fungi.features(images[:1])
        with pytest.raises(OptionError, match=f"The objective '{name}' needs pictures to fit on, and there are none"):
            fungi.fit([])
    with pytest.raises(OptionError, match="has 3000 clusters, and was given 5 pictures"):
        fungi.fit([images])


def test_what_is_no_objective(tiny: Any) -> None:
    with pytest.raises(OptionError, match=r"Unknown objective 'klo'. Known: kl, dino, simclr, deepcluster"):
        FungiWrapper(tiny(), ["klo"])
    with pytest.raises(OptionError, match=r"object is no objective: it needs name, views\(\) and loss\(\)"):
        FungiWrapper(tiny(), [object()])  # type: ignore[list-item]
    with pytest.raises(OptionError, match="Two objectives are called 'kl'"):
        FungiWrapper(tiny(), ["kl", "kl"])
    with pytest.raises(OptionError, match="needs at least one objective"):
        FungiWrapper(tiny(), [])
    with pytest.raises(OptionError, match=r"Unknown preset 'x'. Known: clean, fungivision, fungi-paper"):
        FungiWrapper(tiny(), ["kl"], ImageConfig(preset="x"))  # type: ignore[arg-type]


def test_settings_are_checked(tiny: Any) -> None:
    with pytest.raises(OptionError, match="view_batch must be at least 1, got 0"):
        ImageConfig(view_batch=0)
    with pytest.raises(OptionError, match="view_size must be at least 1, got 0"):
        ImageConfig(view_size=0)
    with pytest.raises(OptionError, match="does not take views of 20x20; the nearest size is"):
        FungiWrapper(tiny(), ["kl"], ImageConfig(view_size=20))
    with pytest.raises(OptionError, match="exact-kernel is for dense features"):
        FungiWrapper(tiny(), ["kl"], ImageConfig(projection="exact-kernel"))


def test_nan_embeddings(tiny: Any, images: Tensor) -> None:
    fungi = FungiWrapper(tiny(), ["kl"], ImageConfig(view_size=16))
    with torch.no_grad():
        fungi.base.model.blocks[0].mlp.fc2.bias[0] = torch.nan
    with pytest.raises(OptionError, match="Summaries of the views of image 0 of the batch are NaN or infinite"):
        fungi.features(images)


def test_what_is_no_picture(fungi: FungiWrapper) -> None:
    for item in (torch.zeros(1, 4, 4), "picture.jpg"):
        with pytest.raises(OptionError, match="A picture is a PIL image or a tensor"):
            fungi.features([item])
