"""Groups, LAMB against a slow reference and on shards, and the schedule."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from amradio.distill.optim import Lamb, learning_rate, parameter_groups
from amradio.errors import OptionError
from amradio.models.configs import AdaptorConfig, ERadioConfig, HeadConfig, RadioConfig, ViTConfig
from amradio.models.radio import RadioModel


def vit(stem: Any = "patch", **kwargs: Any) -> RadioModel:
    backbone = ViTConfig(embed_dim=32, depth=3, num_heads=2, mlp_hidden_dim=64, stem=stem, layer_scale=0.1, **kwargs)
    head = HeadConfig(input_dim=32, hidden_dim=16, output_dim=8, num_inner=1)
    adaptor = AdaptorConfig(head_idx=0, summary=head, features=head)
    return RadioModel(RadioConfig(backbone=backbone, adaptors={"a": adaptor}), adaptors=["a"])


def facts(model: nn.Module, *args: Any) -> dict[str, tuple[float, float]]:
    """Weight decay and scale of the learning rate, by name."""
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model.named_parameters(), *args)
    return {names[id(p)]: (g["weight_decay"], g["lr_scale"]) for g in groups for p in g["params"]}


def test_norms_biases_tokens_and_positions_are_not_decayed() -> None:
    model = vit(num_registers=2, unused_reg_tokens=2)
    found = facts(model, 0.05)
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert "model.reg_token" not in found  # frozen
    free = {n for n, (decay, _) in found.items() if decay == 0}
    for name, p in model.named_parameters():
        if name in found:
            assert (name in free) == (p.ndim < 2 or name.endswith(("pos_embed", "cls_token.token"))), name
    assert "model.blocks.0.attn.qkv.weight" not in free
    assert {scale for _, scale in found.values()} == {1.0}


@pytest.mark.parametrize("stem", ["patch", "efficientnet-lite0"])
def test_layer_decay_counts_blocks_from_the_end(stem: str) -> None:
    found = {name: scale for name, (_, scale) in facts(vit(stem), 0.05, 0.5).items()}
    expected = {"model.patch_generator": 0.5**4, "model.blocks.0.": 0.5**3, "model.blocks.2.": 0.5, "adaptors.": 1.0}
    for prefix, scale in expected.items():
        of_prefix = {s for name, s in found.items() if name.startswith(prefix)}
        assert of_prefix == {scale}, prefix


def test_groups_that_cannot_be() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(OptionError, match="nothing to train"):
        parameter_groups(frozen.named_parameters(), 0.1)
    with pytest.raises(OptionError, match="got -1 and None"):
        parameter_groups(nn.Linear(2, 2).named_parameters(), -1)
    small = ERadioConfig(dim=8, in_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), full_features_head_dim=8)
    eradio = RadioModel(RadioConfig(backbone=small))
    assert len(parameter_groups(eradio.named_parameters(), 0.1)) == 2
    with pytest.raises(OptionError, match="Layer decay needs a transformer"):
        parameter_groups(eradio.named_parameters(), 0.1, 0.9)


def slow_lamb(
    w: list[float], gradients: list[list[float]], lr: float, betas: tuple[float, float], eps: float, decay: float
) -> list[float]:
    """Algorithm 2 of the paper, with numbers; without weight decay the trust ratio is left out."""
    m, v = [0.0] * len(w), [0.0] * len(w)
    for t, g in enumerate(gradients, start=1):
        m = [betas[0] * a + (1 - betas[0]) * b for a, b in zip(m, g, strict=True)]
        v = [betas[1] * a + (1 - betas[1]) * b * b for a, b in zip(v, g, strict=True)]
        r = [
            a / (1 - betas[0] ** t) / (math.sqrt(b / (1 - betas[1] ** t)) + eps) + decay * x
            for a, b, x in zip(m, v, w, strict=True)
        ]
        of_w, of_r = math.hypot(*w), math.hypot(*r)
        trust = of_w / of_r if decay and of_w > 0 and of_r > 0 else 1.0
        w = [x - lr * trust * y for x, y in zip(w, r, strict=True)]
    return w


@pytest.mark.parametrize("decay", [0.0, 0.02])
@pytest.mark.parametrize("zero", [False, True])
def test_lamb_equals_a_slow_reference(decay: float, zero: bool) -> None:
    start = torch.zeros(6, dtype=torch.float64) if zero else torch.randn(6, dtype=torch.float64)
    gradients = [torch.randn(6, dtype=torch.float64) for _ in range(9)]
    parameter = nn.Parameter(start.reshape(2, 3).clone())
    optimizer = Lamb([parameter], lr=0.1, betas=(0.8, 0.95), eps=1e-5, weight_decay=decay)
    for g in gradients:
        parameter.grad = g.reshape(2, 3)
        optimizer.step()
    expected = slow_lamb(start.tolist(), [g.tolist() for g in gradients], 0.1, (0.8, 0.95), 1e-5, decay)
    torch.testing.assert_close(parameter.detach().flatten(), torch.tensor(expected, dtype=torch.float64))


def test_lamb_leaves_alone_what_has_no_gradient_and_minds_its_groups() -> None:
    a, b, c = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    optimizer = Lamb([{"params": [a, c], "lr": 0.0}, {"params": [b]}], lr=0.5, weight_decay=0.1)
    loss = optimizer.step(lambda: _backward((a * b).sum()))
    assert loss == 4.0
    assert bool((a == 1).all())
    assert bool((b < 1).all())
    assert c not in optimizer.state


def _backward(loss: Tensor) -> float:
    loss.backward()
    return loss.item()


def test_lamb_goes_on_exactly_from_a_saved_state() -> None:
    def run(steps: range, parameter: nn.Parameter, optimizer: Lamb) -> None:
        for i in steps:
            parameter.grad = torch.randn(3, 3, generator=torch.Generator().manual_seed(i))
            optimizer.step()

    one = nn.Parameter(torch.ones(3, 3))
    first = Lamb([one], weight_decay=0.1)
    run(range(3), one, first)
    two = nn.Parameter(one.detach().clone())
    second = Lamb([two], weight_decay=0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(range(3, 6), one, first)
    run(range(3, 6), two, second)
    assert torch.equal(one, two)


def shard_worker(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole = nn.Parameter(torch.arange(12.0).reshape(4, 3))
    sharded = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
    for parameter in (whole, sharded):
        optimizer = Lamb([parameter], lr=0.1, weight_decay=0.1)
        for i in range(3):
            gradient: Tensor = torch.randn(4, 3, generator=torch.Generator().manual_seed(i))
            parameter.grad = gradient if parameter is whole else distribute_tensor(gradient, mesh, [Shard(0)])
            optimizer.step()
    torch.testing.assert_close(sharded.full_tensor(), whole.detach())  # type: ignore[attr-defined]
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_lamb_on_shards_equals_the_whole(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(shard_worker, (str(tmp_path),), nprocs=2)


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"eps": 0.0}, {"betas": (1.0, 0.9)}, {"weight_decay": -0.1}, {"lr": math.nan}]
)
def test_impossible_settings_are_refused(options: Any) -> None:
    with pytest.raises(OptionError, match="LAMB needs"):
        Lamb([nn.Parameter(torch.ones(1))], **options)


@given(total=st.integers(1, 500), data=st.data())
def test_the_schedule_rises_falls_and_ends_at_the_floor(total: int, data: Any) -> None:
    warmup = data.draw(st.integers(0, total))
    rates = [learning_rate(i, base=2.0, warmup=warmup, total=total, floor=0.1) for i in range(total)]
    assert all(0 < r <= 2.0 for r in rates)
    assert all(a < b for a, b in itertools.pairwise(rates[:warmup]))
    assert all(a >= b for a, b in itertools.pairwise(rates[warmup:]))
    if warmup:
        assert rates[0] == pytest.approx(2.0 / warmup)
        assert rates[warmup - 1] == 2.0
    if total - warmup > 1:
        assert rates[warmup] == 2.0
        assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(10 * total + 10, base=2.0, warmup=warmup, total=total, floor=0.1) == pytest.approx(0.1)


def test_the_schedule_halfway() -> None:
    assert learning_rate(60, base=1.0, warmup=10, total=111, floor=0.2) == pytest.approx(0.6)
    assert learning_rate(4, base=1.0, warmup=10, total=100) == 0.5
