"""Counted operations against the formula of a transformer, and what follows from them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amradio.distill.cost import PartitionCost, device_hours, forward_flops, radio_flops, step_cost
from amradio.errors import OptionError
from amradio.models.configs import AdaptorConfig, HeadConfig, RadioConfig, ViTConfig

TRUNK = ViTConfig(
    embed_dim=384, depth=8, num_heads=6, mlp_hidden_dim=1536, num_cls_tokens=2, num_registers=3, position_grid=(64, 64)
)


def by_hand(c: ViTConfig, height: int, width: int) -> int:
    patches = height * width // c.patch_size**2
    tokens, width_ = patches + c.num_prefix_tokens, c.embed_dim
    embed = 2 * patches * 3 * c.patch_size**2 * width_
    block = (
        2 * tokens * width_ * 4 * width_ + 2 * 2 * tokens * tokens * width_ + 2 * 2 * tokens * width_ * c.mlp_hidden_dim
    )
    return embed + c.depth * block


@pytest.mark.parametrize("size", [(224, 224), (64, 512)])
def test_a_transformer_costs_what_the_formula_says(size: tuple[int, int]) -> None:
    assert radio_flops(RadioConfig(backbone=TRUNK), *size) == by_hand(TRUNK, *size)


def test_heads_count_where_they_are_run() -> None:
    head = HeadConfig(input_dim=384, hidden_dim=100, output_dim=50)
    config = RadioConfig(backbone=TRUNK, adaptors={"a": AdaptorConfig(head_idx=0, summary=head, features=head)})
    extra = 2 * (384 * 100 + 100 * 50) * (1 + 14 * 14)
    assert radio_flops(config, 224, 224, ["a"]) - radio_flops(config, 224, 224) == extra


def test_windows_cost_less() -> None:
    config = RadioConfig(backbone=TRUNK)
    assert radio_flops(config, 512, 512, window=8) < radio_flops(config, 512, 512)


def test_a_real_module_counts_the_same_as_one_without_data() -> None:
    conv = nn.Conv2d(3, 5, 2, stride=2)
    assert forward_flops(conv, 8, 6) == 2 * 3 * 4 * 5 * 4 * 3
    assert forward_flops(conv.to("meta"), 8, 6) == 2 * 3 * 4 * 5 * 4 * 3
    assert not any(p.grad is not None for p in conv.parameters())


def test_steps_and_hours() -> None:
    low = PartitionCost(images=10, student=2.0, teachers={"a": 7.0, "b": 1.0})
    high = PartitionCost(images=3, student=20.0, teachers={"b": 5.0})
    cost = step_cost([low, high])
    assert cost.student == 3 * (10 * 2 + 3 * 20)
    assert cost.teachers == {"a": 70.0, "b": 25.0}
    assert cost.total == 240 + 95
    assert step_cost([low, high], checkpointing=True).student == 320
    assert step_cost([]).total == 0
    assert device_hours(3.6e15, peak=1e12, utilisation=0.5) == pytest.approx(2.0)
    with pytest.raises(OptionError, match=r"got 0 and 0\.4"):
        device_hours(1.0, peak=0)
    assert torch.get_default_device().type == "cpu"
