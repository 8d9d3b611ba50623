"""The head and its training against torch's own layers, and against formulas written out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amradio.errors import OptionError
from amradio.evals.linear_seg import PROTOCOLS, BatchNormLinear, LinearSegConfig, get_protocol
from amradio.evals.linear_seg.train import Batch, batches_of, learning_rate, train_head

STEPS = 7
PROTOCOL = dataclasses.replace(PROTOCOLS["dinov2"], iterations=STEPS, warmup=2, batch_size=2)


class Reference(nn.Module):
    """mmsegmentation's head: batch norm, then a 1x1 convolution."""

    def __init__(self, head: BatchNormLinear) -> None:
        super().__init__()
        classes, dim = head.weight.shape
        self.norm = nn.BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, classes, 1)
        with torch.no_grad():
            self.conv.weight.copy_(head.weight[..., None, None])
            self.conv.bias.copy_(head.bias)

    def forward(self, maps: Tensor) -> Tensor:
        return self.conv(self.norm(maps))


def test_training_is_that_of_torchs_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(STEPS, 2, 5, 3, 4, generator=generator) * 3 + 1  # [steps, B, D, h, w]
    masks = torch.randint(0, 4, (STEPS, 2, 12, 16), generator=generator).to(torch.uint8)
    masks[:, :, :, :5] = 255
    head = BatchNormLinear(5, 4, seed=1)
    reference = Reference(head).train()
    batches = [
        Batch(m.permute(0, 2, 3, 1).flatten(0, 2), masks=t, grid=(3, 4)) for m, t in zip(maps, masks, strict=True)
    ]
    found: list[float] = []
    train_head(head, lambda _: iter(batches), PROTOCOL, on_step=lambda _, loss: found.append(loss))

    optimizer = torch.optim.AdamW(reference.parameters(), lr=PROTOCOL.lr, weight_decay=PROTOCOL.weight_decay)
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = learning_rate(step, PROTOCOL)
        scores = F.interpolate(reference(maps[step]), (12, 16), mode="bilinear", align_corners=False)
        loss = F.cross_entropy(scores, masks[step].long(), ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert found == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(head.weight, reference.conv.weight[..., 0, 0], atol=1e-5, rtol=1e-4)
    fresh = torch.randn(1, 5, 3, 4, generator=generator)
    with torch.no_grad():
        wanted = reference.eval()(fresh)
    torch.testing.assert_close(
        head.folded()(fresh.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), wanted, atol=1e-4, rtol=1e-4
    )


def test_the_loss_at_patches_is_the_cross_entropy_of_every_labelled_pixel() -> None:
    counts = torch.tensor([[3, 0, 1], [0, 0, 0], [0, 16, 0]], dtype=torch.int32)
    features = torch.randn(3, 4)
    head = BatchNormLinear(4, 3, seed=0)
    mean, variance = head.observe(features)
    with torch.no_grad():
        logs = head(features, mean, variance).log_softmax(1)
    wanted = -sum(float(counts[i, c] * logs[i, c]) for i in range(3) for c in range(3)) / 20
    found: list[float] = []
    batches = [Batch(features, counts)]
    train_head(BatchNormLinear(4, 3, seed=0), lambda _: iter(batches), PROTOCOL, on_step=lambda _, x: found.append(x))
    assert found[0] == pytest.approx(wanted, rel=1e-5)


def test_two_processes_train_the_head_of_one() -> None:
    """With sums that come from elsewhere: what the other process would have added."""

    class Half:
        """Takes part in sums with what the other half, run before, put in."""

        def __init__(self, others: list[Tensor]) -> None:
            self.mine: list[Tensor] = []
            self.others = others

        def all_reduce_sum(self, values: Tensor) -> Tensor:
            self.mine.append(values.clone())
            return values + self.others[len(self.mine) - 1]

    features, counts = torch.randn(6, 4), torch.randint(0, 5, (6, 3), dtype=torch.int32)
    protocol = dataclasses.replace(PROTOCOL, iterations=1, warmup=0)
    whole = BatchNormLinear(4, 3)
    train_head(whole, lambda _: iter([Batch(features, counts)]), protocol)
    # One step: statistics of a half do not depend on the other half, its gradient does, through the statistics.
    halves = [Batch(features[:2], counts[:2]), Batch(features[2:], counts[2:])]
    statistics: list[Tensor] = []
    for half in halves:
        probe = Half([torch.zeros(9, dtype=torch.float64)])
        BatchNormLinear(4, 3).observe(half.features, probe)  # type: ignore[arg-type]
        statistics.append(probe.mine[0])
    zeros = torch.zeros(sum(p.numel() for p in whole.parameters()) + 2)
    gradients = []
    for i, half in enumerate(halves):
        probe = Half([statistics[1 - i], zeros])
        train_head(BatchNormLinear(4, 3), lambda _, half=half: iter([half]), protocol, probe)  # type: ignore[arg-type]
        gradients.append(probe.mine[1])
    head = BatchNormLinear(4, 3)
    train_head(head, lambda _: iter([halves[0]]), protocol, Half([statistics[1], gradients[1]]))  # type: ignore[arg-type]
    for a, b in zip(head.state_dict().values(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_the_published_learning_rates() -> None:
    radio = get_protocol("radio")
    assert learning_rate(0, radio) == pytest.approx(1e-9)
    assert learning_rate(750, radio) == pytest.approx(5e-4, rel=1e-5)
    assert learning_rate(1500, radio) == pytest.approx(1e-3)
    assert learning_rate(1500 + 78_500 // 2, radio) == pytest.approx(5e-4)
    assert learning_rate(79_999, radio) == pytest.approx(1e-3 / 78_500)
    dinov2 = get_protocol("dinov2")
    assert (dinov2.iterations, dinov2.weight_decay, learning_rate(0, dinov2)) == (40_000, 1e-4, pytest.approx(1e-9))


def test_every_picture_comes_once_in_an_epoch() -> None:
    protocol = dataclasses.replace(PROTOCOL, iterations=9, batch_size=4)
    batches = list(batches_of(6, protocol, seed=3))
    order = [i for batch in batches for i in batch]
    assert [len(b) for b in batches] == [4] * 9
    assert all(sorted(order[e : e + 6]) == list(range(6)) for e in range(0, 36, 6))
    assert order != [i for b in batches_of(6, protocol, seed=4) for i in b]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scales": ()}, "scales must be one or several numbers"),
        ({"ridge": (0.0,)}, "ridge must be one or several numbers above 0"),
        ({"score_at": "both"}, "score_at must be one of"),
        ({"iterations": 0}, "iterations and batch_size must be at least 1"),
        ({"lr": -1.0}, "lr and window must be above 0"),
    ],
)
def test_impossible_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        LinearSegConfig(**options)
    with pytest.raises(OptionError, match=r"no protocol 'dino2'.*dinov2"):
        get_protocol("dino2")
