import copy

import torch
from torch import nn

from amradio.features.manifest import describe_model, differences, weights_digest
from amradio.models.configs import RadioConfig, ViTConfig
from amradio.models.radio import RadioModel


def radio():
    torch.manual_seed(0)
    vit = ViTConfig(embed_dim=16, depth=2, num_heads=2, mlp_hidden_dim=32, position_grid=(4, 4))
    return RadioModel(RadioConfig(backbone=vit)).eval()


def test_the_digest_is_of_contents_names_shapes_and_dtypes():
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.BatchNorm1d(3)})
    digest = weights_digest(model)
    assert weights_digest(copy.deepcopy(model)) == digest
    changed = []
    for change in (
        lambda m: m["a"].weight.data.view(-1)[5].add_(1e-6),
        lambda m: m["b"].running_mean[0].add_(1),
        lambda m: m["b"].num_batches_tracked.add_(1),
        lambda m: m.bfloat16(),
        lambda m: setattr(m["a"], "weight", nn.Parameter(m["a"].weight.data.reshape(2, 3))),
    ):
        other = copy.deepcopy(model)
        change(other)
        changed.append(weights_digest(other))
    assert len({digest, *changed}) == 6


def test_what_changes_outputs_changes_the_description():
    model = radio()
    described = describe_model(model)
    assert described == describe_model(radio())
    assert describe_model(model.view("backbone")) == {**described, "view": "backbone"}
    model.model.set_windows(2)
    assert describe_model(model) == {**described, "vitdet_window_size": 2}
    assert describe_model(lambda images, feature_fmt: None)["kind"].endswith("<lambda>")


def test_differences():
    old = {"a": 1, "b": {"c": [1, 2], "d": "x" * 64}, "gone": None, "same": {"e": 5}}
    new = {"a": 2, "b": {"c": [1], "d": "y" * 64}, "new": 3, "same": {"e": 5}}
    assert differences(old, new) == [
        "a was 1 and is 2 now",
        "b.c was [1, 2] and is [1] now",
        "b.d was xxxxxxxxxxxx... and is yyyyyyyyyyyy... now",
        "gone was None and is absent now",
        "new was absent and is 3 now",
    ]
    many = differences({str(i): 0 for i in range(20)}, {})
    assert len(many) == 9
    assert many[-1] == "12 more"
