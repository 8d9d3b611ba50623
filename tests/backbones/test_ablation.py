"""Blocks replaced by the identity, and put back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import amradio
from amradio.backbones.ablation import skipped_blocks
from amradio.errors import CapabilityError, OptionError


@pytest.fixture
def model(goldens: Path):
    return amradio.load(goldens / "models" / "vitdet12.pth.tar").eval()


def by_hand(model, images: torch.Tensor, skipped: set[int]) -> torch.Tensor:
    trunk = model.model
    x = trunk.patch_generator(model.input_conditioner(images))
    for i, block in enumerate(trunk.blocks):
        x = x if i in skipped else block(x)
    return trunk.norm(x)[:, trunk.num_prefix_tokens :]


@pytest.mark.parametrize(
    ("span", "skipped"),
    [((), set()), ((0,), {0}), ((-1,), {11}), ((3, 5), {3, 4, 5}), ((-2, -1), {10, 11}), ((0, 11), set(range(12)))],
)
def test_blocks_are_skipped_and_put_back(model, span: tuple[int, ...], skipped: set[int]) -> None:
    images = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        before = model(images).features
        with skipped_blocks(model, span):
            found = model(images).features
        torch.testing.assert_close(found, by_hand(model, images, skipped), atol=1e-5, rtol=1e-5)
        assert torch.equal(model(images).features, before)
    assert torch.equal(found, before) == (not skipped)


def test_a_view_and_windows(goldens: Path) -> None:
    model = amradio.load(goldens / "models" / "vitdet12.pth.tar", ["clip"], vitdet_window_size=2).eval()
    images = torch.rand(1, 3, 32, 64)
    with torch.no_grad():
        with skipped_blocks(model.view("clip"), (1, 2)):
            found = model(images)["clip"].summary
        for i in (1, 2):
            model.blocks[i] = nn.Identity()
        torch.testing.assert_close(found, model(images)["clip"].summary)


def test_blocks_are_put_back_after_an_error(model) -> None:
    before = list(model.blocks)
    with pytest.raises(ZeroDivisionError), skipped_blocks(model, (2,)):
        raise ZeroDivisionError
    assert list(model.blocks) == before


@pytest.mark.parametrize("span", [(12,), (-13,), (1, 2, 3), (0, 12)])
def test_no_such_blocks(model, span: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match=r"one number, or the first and the last, each from -12 to 11, got \["):
        skipped_blocks(model, span).__enter__()


def test_a_span_that_ends_before_it_begins(model) -> None:
    with pytest.raises(OptionError, match=r"blocks \[5, -8\] ends \(at block 4\) before it begins \(at 5\)"):
        skipped_blocks(model, (5, -8)).__enter__()


def test_other_networks(goldens: Path) -> None:
    with pytest.raises(CapabilityError, match="Blocks can be skipped in RADIO models only, not in a Conv2d"):
        skipped_blocks(nn.Conv2d(3, 3, 1), (0,)).__enter__()
    eradio = amradio.load(goldens / "models" / "eradio.pth.tar")
    with pytest.raises(CapabilityError, match="ERadio has no blocks; only vision transformers have"):
        skipped_blocks(eradio, (0,)).__enter__()
