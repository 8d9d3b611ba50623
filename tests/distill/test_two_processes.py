"""Real processes, joined by gloo, are one; sharded weights are whole ones."""

import pytest
import torch
import yaml

from amradio.distill.logging import read_log
from amradio.weights.tensorfiles import read_tensors

pytestmark = pytest.mark.slow

LOSS_TOLERANCE = 2e-5
"""Of losses, relative: the order in which processes add up differs from that of one process."""


@pytest.fixture
def train(settings, amradio_command, tmp_path):
    """Train a small run in a folder."""

    def run(name, *words, processes=1, **changes):
        path = tmp_path / f"{name}.yaml"
        partitions = [
            {"name": "low", "sizes": [24, 32], "batch_size": 8},
            {"name": "high", "sizes": [48], "batch_size": 4, "teachers": ["two"]},
        ]
        data = settings(
            partitions=partitions, run__teacher_dropping=0.3, run__loss_balancing=True, run__accumulate=2, run__shift=1,
            student__spectral=True, student__damp=0.05, data__crops={"mixup": 0.5, "brightness": 0.2}, **changes,
        )  # fmt: skip
        path.write_text(yaml.safe_dump(data))
        amradio_command("distill", path, "-o", tmp_path / name, "--device", "cpu", *words, processes=processes)

    return run


def losses_and_weights(folder):
    losses = [(e["loss"], e["gradient_norm"]) for e in read_log(folder)]
    return torch.tensor(losses), read_tensors(folder / "model.safetensors")


def assert_close(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=LOSS_TOLERANCE, atol=LOSS_TOLERANCE)
    for name, tensor in a[1].items():
        torch.testing.assert_close(tensor, b[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_two_processes_are_one_shards_are_copies_and_slices_are_whole(train, tmp_path):
    train("one")
    train("ddp", processes=2)
    train("fsdp", processes=2, run__parallel="fsdp")
    one, ddp, fsdp = (losses_and_weights(tmp_path / name) for name in ("one", "ddp", "fsdp"))
    assert one[0].shape == (6, 2)
    assert_close(ddp, one)
    assert_close(fsdp, ddp)

    train("slices", "--max-minutes", "0", processes=2, run__parallel="fsdp")
    assert len(read_log(tmp_path / "slices")) == 1
    train("slices", processes=2, run__parallel="fsdp")
    slices = losses_and_weights(tmp_path / "slices")
    assert torch.equal(slices[0], fsdp[0])
    assert all(torch.equal(slices[1][k], v) for k, v in fsdp[1].items())
