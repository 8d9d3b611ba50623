from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from amradio.evals.model_cost import measure_cost
from amradio.evals.spectral_norms import spectral_norm, spectral_norms
from amradio.models.configs import RadioConfig, ViTConfig
from amradio.models.radio import RadioModel


@pytest.mark.parametrize("shape", [(5, 5), (3, 11), (11, 3), (1, 4)])
def test_the_largest_singular_value(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    assert spectral_norm(matrix) == pytest.approx(float(np.linalg.norm(matrix.double().numpy(), 2)), rel=1e-9)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.conv = nn.Conv2d(3, 5, 2)
        self.norm = nn.LayerNorm(4)
        self.cls_token = nn.Parameter(torch.ones(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.ones(1, 9, 4))
        self.relative_position_bias_table = nn.Parameter(torch.ones(9, 4))


def test_which_weights_count_and_how() -> None:
    network = Network()
    found = spectral_norms(network)
    assert list(found) == ["qkv.weight.q", "qkv.weight.k", "qkv.weight.v", "conv.weight"]
    weight = network.qkv.weight.detach().double().numpy()
    assert [found[f"qkv.weight.{n}"] for n in "qkv"] == pytest.approx(
        [np.linalg.norm(weight[i : i + 4], 2) for i in (0, 4, 8)]
    )
    assert found["conv.weight"] == pytest.approx(
        np.linalg.norm(network.conv.weight.detach().double().numpy().reshape(5, -1), 2)
    )


def test_cost_of_a_transformer_is_what_arithmetic_says() -> None:
    c, hidden, depth, patch, prefix = 32, 64, 3, 8, 1
    trunk = ViTConfig(
        embed_dim=c,
        depth=depth,
        num_heads=2,
        mlp_hidden_dim=hidden,
        patch_size=patch,
        position_grid=(8, 8),
        num_cls_tokens=prefix,
        num_registers=0,
    )
    model = RadioModel(RadioConfig(backbone=trunk, summary_idxs=(0,))).eval()
    cost = measure_cost(model, 32, 48, batch_size=2, batches=1)
    patches = 4 * 6
    n = patches + prefix
    block = 2 * n * c * 3 * c + 2 * 2 * n * n * c + 2 * n * c * c + 2 * 2 * n * c * hidden
    assert cost.flops == depth * block + 2 * patches * 3 * patch * patch * c
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.images_per_s > 0
    assert (cost.height, cost.width, cost.batch_size) == (32, 48, 2)
