"""The dense backbone: what its features depend on and what not, its options, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import amradio
from amradio.backbones.callables import CallableBackbone
from amradio.errors import CapabilityError, OptionError
from amradio.features import ExtractOptions, extract
from amradio.fungi import DenseConfig, DenseFungiBackbone, SupportIndex
from amradio.fungi.heads import Head
from amradio.fungi.projections import SignProjection
from amradio.images import ResizePolicy, open_images
from amradio.search import Neighbours, top_k

CONFIG = DenseConfig(latent_dim=12)


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 24, 16), dtype=torch.uint8).float() / 255


@pytest.fixture
def support() -> SupportIndex:
    return SupportIndex(F.normalize(torch.randn(60, 32), dim=1))


@pytest.fixture
def dense(tiny: Any, support: SupportIndex) -> DenseFungiBackbone:
    return DenseFungiBackbone(tiny(num_registers=2, final_norm=True), CONFIG, support=support)


def slow_features(backbone: DenseFungiBackbone, image: Tensor) -> Tensor:
    """One image: the whole network with a weight of its own for each token, loops, and the whole sign matrix."""
    config, model = backbone.config, backbone.base
    layer = model.model.blocks[-1].attn.proj
    copies: list[Tensor] = []

    def own_weights(module: Any, args: Any, output: Any) -> Tensor:
        inputs = F.pad(args[0], (0, 1), value=1.0)
        weight = torch.cat([layer.weight, layer.bias[:, None]], 1)
        copies.append(weight.detach().expand(inputs.shape[1], -1, -1).clone().requires_grad_())
        return torch.einsum("thj,btj->bth", copies[-1], inputs)

    handle = layer.register_forward_hook(own_weights)
    prefix, patches = model.model(model.input_conditioner(image[None]))
    handle.remove()
    tokens = torch.cat([prefix[:, :1], patches], dim=1)[0]  # class token and patches
    support, n = backbone.support, config.negatives_per_token
    assert support is not None
    scores = tokens.detach() @ support.rows.T
    kept = backbone.gradients(image[None]).kept[0].view(-1, n)
    negatives = [
        support.rows[row] for t in range(len(tokens)) for j, row in enumerate(scores[t].topk(n).indices) if kept[t, j]
    ]
    z = F.normalize(backbone.head(tokens), dim=-1)
    others = F.normalize(backbone.head(torch.stack(negatives)), dim=-1)
    loss = torch.zeros(())
    for i in range(len(z)):
        own = [z[i] @ z[j] for j in range(len(z)) if j != i]
        every = torch.stack(own + [z[i] @ o for o in others]) / config.temperature
        loss = loss + (every.logsumexp(0) - sum(own) / len(own) / config.temperature) / len(z)
    (gradients,) = torch.autograd.grad(loss, copies[0])
    projection = backbone.projection
    assert isinstance(projection, SignProjection)
    matrix = projection.signs.flatten(1).float()
    count = patches.shape[1]
    projected = gradients[-count:].flatten(1) @ matrix.T
    return F.normalize(torch.cat([F.normalize(patches[0], dim=-1), F.normalize(projected, dim=-1)], -1), dim=-1)


def test_features_equal_the_slow_route(dense: DenseFungiBackbone, images: Tensor) -> None:
    found = dense(images).features
    for i in range(len(images)):
        torch.testing.assert_close(found[i], slow_features(dense, images[i]), atol=5e-6, rtol=1e-4)


def test_it_is_a_backbone(dense: DenseFungiBackbone, images: Tensor) -> None:
    assert isinstance(dense, amradio.Backbone)
    assert (dense.embed_dim, dense.summary_dim, dense.patch_size, dense.min_resolution_step) == (64, 32, 8, 8)
    assert dense.get_nearest_supported_resolution(23, 17) == (24, 16)
    assert dense.preferred_resolution is None
    assert not dense.training
    summary, features = dense(images)
    torch.testing.assert_close(summary, dense.base(images).summary)
    assert features.shape == (3, 6, 64)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3, 6))
    torch.testing.assert_close(features[..., :32] * 2**0.5, F.normalize(dense.base(images).features, dim=-1))
    assert torch.equal(dense(images, "NCHW").features, features.mT.reshape(3, 64, 3, 2))
    assert torch.equal(dense(images, "NHWC").features, features.reshape(3, 3, 2, 64))
    assert dense.layer == "model.blocks.1.attn.proj"
    assert dense.identity.version.endswith("+ dense FUNGI (sign, neighbours, tempered)")


def test_features_depend_on_neither_batch_nor_order(dense: DenseFungiBackbone, images: Tensor) -> None:
    together = dense(images).features
    for i in range(3):
        torch.testing.assert_close(dense(images[i : i + 1]).features[0], together[i], atol=1e-5, rtol=0)
    torch.testing.assert_close(dense(images.flip(0)).features.flip(0), together, atol=1e-5, rtol=0)
    assert torch.equal(dense(images).features, together)


def test_runs_are_identical_and_seeds_matter(tiny: Any, support: SupportIndex, images: Tensor) -> None:
    def features(seed: int) -> Tensor:
        model = tiny(num_registers=2, final_norm=True)
        torch.manual_seed(seed + 100)  # the state of torch's generator has no say
        return DenseFungiBackbone(model, DenseConfig(latent_dim=12, seed=seed), support=support)(images).features

    assert torch.equal(features(1), features(1))
    assert not torch.allclose(features(1), features(2), atol=1e-2)


def test_masks_belong_to_image_and_epoch(dense: DenseFungiBackbone, images: Tensor) -> None:
    kept = dense.gradients(images).kept
    assert 0.2 < kept.float().mean() < 0.8
    assert not torch.equal(kept[0], kept[1])
    again = dense.gradients(images[[1, 1, 0]]).kept
    assert torch.equal(again, kept[[1, 1, 0]])
    dense.epoch = 1
    assert not torch.equal(dense.gradients(images).kept, kept)


def test_two_wrappers_share_one_model(tiny: Any, support: SupportIndex, images: Tensor) -> None:
    model = tiny(final_norm=True)
    first, second = (
        DenseFungiBackbone(model, DenseConfig(latent_dim=12, layer=layer), support=support)
        for layer in (None, "blocks.0.mlp.fc2")
    )
    expected = first(images).features
    second(images)
    assert torch.equal(first(images).features, expected)
    assert not torch.allclose(second(images).features, expected, atol=1e-3)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_the_tap_and_the_trunk_agree(dense: DenseFungiBackbone, images: Tensor) -> None:
    from amradio.fungi.taps import TapSplitter

    expected = dense(images).features
    dense._split = TapSplitter(dense.base, dense.layer, dense.base.model.blocks[-1].attn.proj)
    torch.testing.assert_close(dense(images).features, expected, atol=5e-6, rtol=0)


def test_under_the_engine(dense: DenseFungiBackbone, tmp_path: Path) -> None:
    """`extract` runs models in inference mode, batches of any size, any number of workers."""
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (24, 16, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    policy = ResizePolicy.parse(None, multiple=8)

    def features(batch: int, workers: int) -> Tensor:
        options = ExtractOptions(batch_size=batch, workers=workers)
        records = extract(open_images(tmp_path), dense, policy, options)
        return torch.stack([r.outputs["backbone"].features for r in records])

    torch.testing.assert_close(features(1, 1), features(4, 3), atol=1e-5, rtol=0)


def test_autocast_and_half_precision_stay_close(dense: DenseFungiBackbone, images: Tensor) -> None:
    exact = dense(images).features
    with torch.autocast("cpu", torch.bfloat16):
        rough = dense(images).features
    assert rough.dtype == torch.float32
    assert F.cosine_similarity(rough, exact, dim=-1).mean() > 0.9
    half = DenseFungiBackbone(dense.base.to(torch.bfloat16), CONFIG, support=dense.support)
    assert half(images).features.dtype == torch.float32
    assert F.cosine_similarity(half(images).features, exact, dim=-1).mean() > 0.9


# ---- options ----


def test_the_papers_protocol() -> None:
    config = DenseConfig.of_protocol("fungi-paper", negatives_per_token=5)
    assert (config.negatives, config.denominator, config.loss_dtype) == ("interleaved", "raw", "float16")
    assert (config.loss_tokens, config.negatives_per_token) == ("all", 5)
    assert DenseConfig.of_protocol() == DenseConfig()
    with pytest.raises(OptionError, match=r"Unknown protocol 'hbird' of FUNGI. Known: clean, fungi-paper"):
        DenseConfig.of_protocol("hbird")  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", ["all", "no-registers", "patches"])
def test_which_tokens_are_contrasted(tokens: Any, tiny: Any, support: SupportIndex, images: Tensor) -> None:
    model = tiny(num_cls_tokens=2, num_registers=3, final_norm=True)
    backbone = DenseFungiBackbone(model, DenseConfig(latent_dim=12, loss_tokens=tokens), support=support)
    assert backbone.gradients(images).latents.shape[1] == 6 + {"all": 5, "no-registers": 2, "patches": 0}[tokens]
    assert backbone.gradients(images).upstream.shape == (3, 6, 32)


@pytest.mark.parametrize("projection", ["rank-one-4", "tensor-sketch"])
def test_cheaper_projections(projection: str, tiny: Any, support: SupportIndex, images: Tensor) -> None:
    model = tiny(final_norm=True)
    config = DenseConfig(latent_dim=12, projection=projection, projection_dim=500)
    backbone = DenseFungiBackbone(model, config, support=support)
    features = backbone(images).features[0]
    assert features.shape == (6, 532)
    exact = DenseFungiBackbone(model, DenseConfig(latent_dim=12, projection="exact-kernel"), support=support)
    rows = exact(images).features[0]
    assert rows.shape == (6, exact.embed_dim) == (6, 32 + 32 + 33)
    assert exact.similarity is not None
    assert backbone.similarity is None
    error = features @ features.T - exact.similarity(rows, rows)
    assert error.abs().max() < 0.15
    found = top_k(rows, rows, 1, similarity=exact.similarity)
    assert torch.equal(found.indices[:, 0], torch.arange(6))


def test_an_approximate_index_may_find_fewer(tiny: Any, images: Tensor) -> None:
    rows = F.normalize(torch.randn(60, 32), dim=1)

    def search(queries: Tensor, k: int) -> Neighbours:
        found = top_k(queries, rows, k)
        found.indices[:, -1] = -1
        return found

    config = DenseConfig(latent_dim=12, keep=1.0)
    model = tiny(final_norm=True)
    backbone = DenseFungiBackbone(model, config, support=SupportIndex(rows, search))
    kept = backbone.gradients(images).kept.view(3, -1, 2)
    assert kept[..., 0].all()
    assert not kept[..., 1].any()
    one = DenseConfig(latent_dim=12, keep=1.0, negatives_per_token=1)
    expected = DenseFungiBackbone(model, one, support=SupportIndex(rows))(images).features
    torch.testing.assert_close(backbone(images).features, expected, atol=1e-5, rtol=0)
    interleaved = DenseConfig(latent_dim=12, keep=1.0, negatives="interleaved")
    backbone = DenseFungiBackbone(model, interleaved, support=SupportIndex(rows, search))
    assert not backbone.gradients(images).kept.any()  # a mixture that lacks a part is none


def test_pca(dense: DenseFungiBackbone, images: Tensor) -> None:
    wide = dense(images).features.flatten(0, 1)
    dense.fit_pca([images], 5)
    narrow = dense(images).features
    assert dense.embed_dim == 5
    assert narrow.shape == (3, 6, 5)
    centred = wide - wide.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(narrow.flatten(0, 1).abs(), (u * s)[:, :5].abs(), atol=1e-5, rtol=1e-4)
    with pytest.raises(OptionError, match="PCA to 64 components needs at least 64 rows"):
        dense.fit_pca([images], 64)


# ---- fitting ----


def test_fitting_on_batches_and_on_a_set(tiny: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 16, 24, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    model = tiny(final_norm=True)
    loader = [(batch[:3], torch.zeros(3)), (batch[3:], torch.zeros(1))]
    for count, rows in ((None, 24), (2, 8), (100, 24)):
        of_batches = DenseFungiBackbone(model, CONFIG).fit(loader, patches_per_image=count)
        of_set = DenseFungiBackbone(model, CONFIG).fit(open_images(tmp_path), patches_per_image=count)
        assert of_batches.support is not None
        assert of_set.support is not None
        assert of_batches.support.rows.shape == (rows, 32)
        torch.testing.assert_close(of_set.support.rows, of_batches.support.rows)
    whole = F.normalize(model(batch).features, dim=-1)
    chosen = DenseFungiBackbone(model, CONFIG).fit([batch], patches_per_image=2).support
    assert chosen is not None
    distances = torch.cdist(chosen.rows.view(4, 2, 32), whole)
    assert (distances.amin(-1) < 1e-5).all()
    assert (distances[:, 0].argmin(-1) != distances[:, 1].argmin(-1)).all()


def test_fitting_on_nothing(tiny: Any) -> None:
    backbone = DenseFungiBackbone(tiny(), CONFIG)
    with pytest.raises(OptionError, match="There are no pictures to fit on"):
        backbone.fit([])
    with pytest.raises(OptionError, match=r"Batches are images \[B, 3, H, W\] in \[0, 1\], got torch.uint8"):
        backbone.fit([torch.zeros(1, 3, 16, 16, dtype=torch.uint8)])
    with pytest.raises(OptionError, match="patches_per_image must be at least 1, got 0"):
        backbone.fit([torch.zeros(1, 3, 16, 16)], patches_per_image=0)


# ---- what is refused ----


def test_nan_features(dense: DenseFungiBackbone, images: Tensor) -> None:
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(OptionError, match="Features of image 1 of the batch are NaN or infinite"):
        dense(images)
    with pytest.raises(OptionError, match="Some patch features are NaN or infinite"):
        dense.fit([images])


def test_no_support_index(tiny: Any, images: Tensor) -> None:
    with pytest.raises(OptionError, match=r"needs a support index to draw negatives from: call fit\(\)"):
        DenseFungiBackbone(tiny(), CONFIG)(images)


def test_widths_must_agree(tiny: Any) -> None:
    with pytest.raises(OptionError, match="rows of 31 features, and the backbone's have 32"):
        DenseFungiBackbone(tiny(), CONFIG, support=SupportIndex(torch.randn(9, 31)))
    with pytest.raises(OptionError, match="The head takes 5 features, and the backbone has 32"):
        DenseFungiBackbone(tiny(), CONFIG, head=Head(torch.zeros(4, 5), torch.zeros(4)))


def test_too_many_negatives(tiny: Any, images: Tensor) -> None:
    with pytest.raises(OptionError, match="A support index of 4 rows cannot give 5 neighbours"):
        SupportIndex(torch.randn(4, 32))
    with pytest.raises(OptionError, match=r"rows of a support index are \[M, D\], got \[4\]"):
        SupportIndex(torch.randn(4))
    few = SupportIndex(torch.randn(6, 32), neighbours=3)
    for kind, count in (("interleaved", 4), ("neighbours", 7)):
        config = DenseConfig(latent_dim=12, negatives=kind, negatives_per_token=count)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match=f"{count} negatives of each token were asked for"):
            DenseFungiBackbone(tiny(), config, support=few)(images)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("latent_dim", 0, "latent_dim must be at least 1, got 0"),
        ("keep", 0.0, "keep is a share above 0 and at most 1, got 0.0"),
        ("temperature", 0, "temperature must be above 0, got 0"),
        ("negatives", "random", r"negatives must be one of \['neighbours', 'interleaved'\], got 'random'"),
        ("loss_tokens", "cls", "loss_tokens must be one of"),
        ("projection", "none", "Unknown projection 'none'"),
    ],
)
def test_settings_are_checked(field: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DenseConfig(**{field: value})


def test_uniform_numbers_of_a_wrong_shape(dense: DenseFungiBackbone, images: Tensor) -> None:
    with pytest.raises(OptionError, match=r"uniforms must be \[3, 14\] for these images, got \[3, 2\]"):
        dense(images, uniforms=torch.rand(3, 2))


def test_only_backbones_can_be_wrapped() -> None:
    with pytest.raises(
        CapabilityError, match=r"FUNGI wraps a backbone, as amradio.load_backbone returns it, got a Lin"
    ):
        DenseFungiBackbone(torch.nn.Linear(2, 2))


def test_an_image_of_one_token_has_nothing_to_contrast(tiny: Any, support: SupportIndex) -> None:
    backbone = DenseFungiBackbone(tiny(), DenseConfig(latent_dim=12, loss_tokens="patches"), support=support)
    with pytest.raises(OptionError, match="needs at least 2 of them, got 1"):
        backbone(torch.rand(1, 3, 8, 8))


class Enlarged(torch.nn.Module):
    """Gives four features for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = torch.nn.Conv2d(3, 8, 8, 8), torch.nn.Linear(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.embed(images)
        tokens = self.layer(maps.flatten(2).mT)
        return F.interpolate(tokens.mT.view_as(maps), scale_factor=2)


def test_tokens_that_are_not_features() -> None:
    model = CallableBackbone(Enlarged(), patch_size=4, min_resolution_step=8)
    config = DenseConfig(latent_dim=12, layer="layer")
    backbone = DenseFungiBackbone(model, config, support=SupportIndex(torch.randn(9, 8)))
    with pytest.raises(
        CapabilityError, match=r"4 tokens go through the layer fn.layer, and 16 come out of the backbone"
    ):
        backbone(torch.rand(1, 3, 16, 16))


def test_pca_of_the_exact_kernel(tiny: Any, support: SupportIndex, images: Tensor) -> None:
    backbone = DenseFungiBackbone(tiny(), DenseConfig(latent_dim=12, projection="exact-kernel"), support=support)
    with pytest.raises(CapabilityError, match="PCA keeps inner products"):
        backbone.fit_pca([images], 3)
