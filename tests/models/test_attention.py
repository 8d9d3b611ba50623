"""Attention of prefix tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from amradio import RadioModel
from amradio.errors import CapabilityError, OptionError, ResolutionError
from amradio.models.configs import RadioConfig, ViTConfig


def radio(**options: object) -> RadioModel:
    trunk = ViTConfig(
        **{"embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_hidden_dim": 48, "patch_size": 8, "position_grid": (8, 8)}
        | {"num_cls_tokens": 2, "num_registers": 1}
        | options
    )
    model = RadioModel(RadioConfig(backbone=trunk, summary_idxs=(0,))).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    return model


def tokens_before(model: RadioModel, images: torch.Tensor, block: int) -> torch.Tensor:
    """The input of a block, by its own output hooks."""
    seen = []
    handle = model.blocks[block].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    model(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("options", [{}, {"scaled_norm": True}, {"norm": "dyt"}, {"qkv_bias": False}])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_is_the_softmax_by_hand(options: dict[str, object], layer: int) -> None:
    model, images = radio(**options), torch.rand(2, 3, 16, 32)
    index = layer % 3
    block = model.blocks[index]
    x = block.norm1(tokens_before(model, images, index))
    if options.get("scaled_norm"):
        x = x * (index + 1) ** -0.5
    weight = block.attn.qkv.weight.double().numpy()
    bias = 0 if block.attn.qkv.bias is None else block.attn.qkv.bias.double().numpy()
    qkv = x.double().numpy() @ weight.T + bias  # [B, N, 72]
    expected = np.empty((2, 3, 3, qkv.shape[1]))
    for b in range(2):
        for head in range(3):
            q, k = (qkv[b, :, part * 24 + head * 8 : part * 24 + (head + 1) * 8] for part in (0, 1))
            for token in range(3):
                logits = k @ q[token] / np.sqrt(8)
                expected[b, head, token] = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    found = model.prefix_attention(images, layer)
    assert found.shape == (2, 3, 3, 3 + 2 * 4)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, 3))


def test_is_what_the_block_computes_with() -> None:
    model, images = radio(), torch.rand(1, 3, 16, 16)
    block = model.blocks[2]
    x = block.norm1(tokens_before(model, images, 2))
    values = F.linear(x, block.attn.qkv.weight, block.attn.qkv.bias)[..., 48:].view(1, -1, 3, 8).transpose(1, 2)
    mixed = (model.prefix_attention(images) @ values).transpose(1, 2).reshape(1, 3, 24)
    torch.testing.assert_close(block.attn.proj(mixed), block.attn(x)[:, :3], rtol=1e-4, atol=1e-4)


def test_windows() -> None:
    model, images = radio(), torch.rand(1, 3, 32, 32)
    model.set_vitdet(2, num_windowed=1)
    assert model.prefix_attention(images, 1).shape == (1, 3, 3, 3 + 16)
    x = tokens_before(model, images, 1)
    torch.testing.assert_close(  # patches are in rows, whatever order the windows left behind
        model.prefix_attention(images, 1).sort(-1).values, model.blocks[1].attention(x, 3).sort(-1).values
    )
    with pytest.raises(CapabilityError, match=r"no part in block 0, .* Blocks without windows: 1"):
        model.prefix_attention(images, 0)


def test_refusals() -> None:
    model = radio()
    with pytest.raises(OptionError, match=r"Block index 3 is out of range \(0 to 2"):
        model.prefix_attention(torch.rand(1, 3, 16, 16), 3)
    with pytest.raises(ResolutionError, match="multiple"):
        model.prefix_attention(torch.rand(1, 3, 16, 15))
    without = radio(num_cls_tokens=0, num_registers=0, pool="avg")
    with pytest.raises(CapabilityError, match="neither class nor register tokens"):
        without.prefix_attention(torch.rand(1, 3, 16, 16))
