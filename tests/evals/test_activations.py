"""Watching layers: values against NumPy, on our own, foreign and failing networks, and no trace left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.evals.activations import Range, Spread, layers_of, observed
from amradio.models.configs import ViTConfig
from amradio.models.vit import Attention, Block


def block() -> nn.Module:
    torch.manual_seed(0)
    return Block(ViTConfig(embed_dim=8, depth=1, num_heads=2, mlp_hidden_dim=16, patch_size=4, position_grid=(4, 4)))


def untouched(module: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called for m in module.modules())


def entropy(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return -(shares * np.log(np.where(shares > 0, shares, 1))).sum(-1)


def test_values_against_numpy() -> None:
    found = Range()
    batches = [torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(i)) + i for i in range(3)]
    for batch in batches:
        found.update(batch)
    x = np.concatenate([b.numpy() for b in batches])
    assert found.values() == pytest.approx(
        {
            "min": x.min(),
            "max": x.max(),
            "mean": x.mean(),
            "median": np.mean([float(b.median()) for b in batches]),
            "norm": np.linalg.norm(x, axis=-1).mean(),
        }
    )


@pytest.mark.parametrize("at_once", [1, 10**6])
def test_entropy_against_numpy(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("amradio.evals.activations._LOGITS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(3, 2, 6, 4, generator=generator), torch.randn(3, 2, 7, 4, generator=generator)
    spread = Spread()
    spread.update(q, k, 0.5)
    spread.update(2 * q, k, 0.5)
    logits = np.concatenate([(f * q @ k.mT * 0.5).numpy() for f in (1, 2)])  # [6, 2, 6, 7]
    found = spread.values()
    assert found["entropy"] == pytest.approx(entropy(logits).mean(), rel=1e-5)
    assert found["relative_entropy"] == pytest.approx(entropy(logits).mean() / np.log(7), rel=1e-5)
    assert found["entropy_of_heads"] == pytest.approx(entropy(logits).mean((0, 2)).tolist(), rel=1e-5)
    assert (found["logit_min"], found["logit_max"]) == pytest.approx((logits.min(), logits.max()))
    assert found["logit_mean"] == pytest.approx(logits.mean(), rel=1e-4)


@pytest.mark.parametrize("kind", ["bool", "float", "causal"])
def test_masks_are_respected(kind: str) -> None:
    class MaskedAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            allowed = torch.ones(5, 5, dtype=torch.bool).tril()
            if kind == "causal":
                return F.scaled_dot_product_attention(x, x, x, is_causal=True)
            mask = allowed if kind == "bool" else torch.zeros(5, 5).masked_fill(~allowed, -torch.inf)
            return F.scaled_dot_product_attention(x, x, x, mask)

    module = nn.Sequential(MaskedAttention())
    x = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    with observed(module) as (layer,):
        module(x)
    logits = (x @ x.mT / 2).numpy()
    masked = np.where(np.tril(np.ones((5, 5), bool)), logits, -np.inf)
    assert layer.values()["entropy"] == pytest.approx(entropy(masked).mean(), rel=1e-5)
    assert layer.values()["logit_min"] == pytest.approx(logits[..., np.tril(np.ones((5, 5), bool))].min())


def test_layers_of_a_transformer_and_their_attention() -> None:
    module = block().eval()
    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = module(x)
        with observed(module) as layers:
            assert torch.equal(module(x), before)
    attention, mlp = layers
    assert (attention.name, attention.kind, mlp.name, mlp.kind) == ("attn", "attention", "mlp", "mlp")
    q, k, _ = module.attn.qkv(module.norm1(x)).view(2, 7, 3, 2, 4).permute(2, 0, 3, 1, 4)
    assert attention.values()["entropy"] == pytest.approx(entropy((q @ k.mT / 2).detach().numpy()).mean(), rel=1e-5)
    assert attention.values()["input_max"] == pytest.approx(float(module.norm1(x).detach().max()))
    assert mlp.spread is None
    assert "entropy" not in mlp.values()
    assert untouched(module)


def test_nothing_is_left_behind_by_an_error() -> None:
    module = block()
    with pytest.raises(RuntimeError), observed(module) as layers:
        module(torch.zeros(1, 2, 999))
    assert untouched(module)
    assert not layers[0].was_run
    assert module(torch.zeros(1, 2, 8)).shape == (1, 2, 8)


def test_tuples_keywords_and_nested_layers() -> None:
    class SelfAttention(nn.Module):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
            heads = hidden_states[:, None]
            return F.scaled_dot_product_attention(heads, heads, heads)[:, 0], None

    class Dinov2Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = SelfAttention()

        def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
            return self.attention(hidden_states=hidden_states)

    class Dinov2Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Dinov2Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(hidden_states=x)[0]

    module = Dinov2Layer()
    assert layers_of(module) == {"attention": "attention"}
    with observed(module) as (layer,):
        out = module(torch.ones(1, 4, 3))
    assert layer.values()["output_norm"] == pytest.approx(float(out.norm(dim=-1).mean()))
    assert layer.values()["relative_entropy"] == pytest.approx(1)  # all keys are equal


def test_attention_elsewhere_is_not_counted() -> None:
    module = nn.Linear(2, 2)
    assert layers_of(module) == {}
    with observed(module) as layers:
        x = torch.ones(1, 1, 2, 2)
        F.scaled_dot_product_attention(x, x, x)
    assert layers == []
    assert layers_of(nn.ModuleDict({"a": Attention(4, 2)})) == {"a": "attention"}
