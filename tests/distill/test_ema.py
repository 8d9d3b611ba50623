"""The moving average of weights."""

import torch

from amradio.distill.ema import MovingAverage


def test_it_is_the_average_that_it_says():
    module = torch.nn.BatchNorm1d(2)
    average = MovingAverage(module, 0.5)
    wanted = module.weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            module.weight.copy_(torch.randn(2))
            module.running_mean.fill_(step)
        average.update(module)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * module.weight.detach()
        torch.testing.assert_close(average.tensors["weight"], wanted)
        assert average.tensors["running_mean"].tolist() == [step, step]  # buffers are copied


def test_it_goes_on_from_what_was_saved():
    module = torch.nn.Linear(2, 2)
    a, b = MovingAverage(module, 0.9), MovingAverage(module, 0.9)
    with torch.no_grad():
        module.weight.add_(1)
    a.update(module)
    b.load({k: v.clone() for k, v in a.tensors.items()}, a.steps)
    for average in (a, b):
        average.update(module)
    assert torch.equal(a.tensors["weight"], b.tensors["weight"])
    assert b.steps == 2


def test_it_shares_no_memory_with_the_weights():
    module = torch.nn.Linear(2, 2)
    average = MovingAverage(module, 0.9)
    with torch.no_grad():
        module.weight.zero_()
    assert average.tensors["weight"].abs().sum() > 0
