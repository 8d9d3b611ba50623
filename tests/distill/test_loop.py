"""The loop: it learns, stops, goes on exactly, and says what goes wrong."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import amradio
from amradio.distill.hooks import FunctionHook, Measurement
from amradio.distill.logging import read_log
from amradio.distill.loop import NON_FINITE, STATES, distill
from amradio.distill.state import find_states
from amradio.errors import CheckpointError, ConfigError, NonFiniteLossError, OptionError
from amradio.weights.tensorfiles import read_tensors

CPU = torch.device("cpu")


class StopError(Exception):
    """What kills a run in a test."""


def killed_after(step):
    def on_progress(progress):
        if progress.step == step:
            raise StopError

    return on_progress


def run(config, folder, **options):
    return distill(config, folder, device=CPU, **options)


def weights(folder):
    return read_tensors(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_from_start_to_end(config, tmp_path):
    messages = []
    outcome = run(config(), tmp_path, on_message=messages.append)
    assert (outcome.step, outcome.reason) == (6, "finished")
    assert outcome.model == tmp_path / "model.safetensors"
    log = read_log(tmp_path)
    assert [entry["step"] for entry in log] == list(range(1, 7))
    wanted = {"loss", "lr", "gradient_norm", "images_per_s", "seconds/teachers", "main/one/summary"}
    assert wanted | {"main/two/features_cosine", "main/two/features_variance", "main/two/summary_cosine"} <= set(log[0])
    assert log[0]["lr"] == pytest.approx(0.5e-3)
    model = amradio.load(str(outcome.model), ["one", "two"])
    out = model(torch.rand(1, 3, 32, 32))
    assert out["one"].summary.shape == (1, 12)
    assert out["two"].features.shape == (1, 64, 10)  # upsampled twice
    assert out["backbone"].summary.shape == (1, 32)
    assert messages == ["estimating statistics of 2 teachers from 16 pictures"]
    card = (tmp_path / "README.md").read_text()
    assert "24 pictures" in card
    assert "6 steps, 24 pictures shown" in card


def test_ten_images_are_learned_by_heart(config, tmp_path):
    c = config(
        data__sources=[{"path": config().data.sources[0].path, "limit": 10}],
        data__fixed_views=1,
        student__model__backbone__position="fixed",
        student__model__backbone__position_grid=[4, 4],
        student__model__backbone__embed_dim=64,
        student__model__backbone__mlp_hidden_dim=256,
        student__ema=None,
        teachers__1__summary={"loss": "cosine"},
        teachers__1__features={"loss": "mse"},
        partitions__0__sizes=[32],
        partitions__0__batch_size=10,
        optimizer={"lr": 3e-3, "weight_decay": 0.0, "betas": [0.9, 0.99]},
        schedule={"steps": 150, "warmup": 10, "floor": 0.0},
        run__statistics=10,
        run__log_steps=1,
    )
    run(c, tmp_path)
    losses = [entry["loss"] for entry in read_log(tmp_path)]
    assert losses[-1] < 0.01 * losses[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "student__spectral": True,
            "student__damp": 0.05,
            "run__accumulate": 2,
            "run__teacher_dropping": 0.5,
            "run__loss_balancing": True,
            "optimizer": {"kind": "lamb"},
            "student__checkpointing": True,
        },
    ],
    ids=["plain", "everything"],
)
def test_killed_and_resumed_is_the_same_to_the_bit(config, tmp_path, changes):
    c = config(run__checkpoint_steps=2, **changes)
    run(c, tmp_path / "whole")
    for step in (3, 5):  # states are at 2 and 4: a step is done again each time
        with pytest.raises(StopError):
            run(c, tmp_path / "killed", on_progress=killed_after(step))
    run(c, tmp_path / "killed")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    logs = [read_log(tmp_path / name) for name in ("whole", "killed")]
    keys = ("step", "loss", "lr", "gradient_norm")
    assert [[e[k] for k in keys] for e in logs[0]] == [[e[k] for k in keys] for e in logs[1]]


@pytest.mark.parametrize(
    "changes",
    [
        {"teachers__0__summary": None, "teachers__1__features": None},
        {"student": {"model": {"backbone": {
            "kind": "eradio", "dim": 8, "in_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
            "window_size": [None, None, 4, 4], "sr_ratio": [1, 1, 1, 1], "full_features_head_dim": 16,
            "cpb_mlp_hidden": 8, "final_norm": True,
        }}}, "partitions__0__sizes": [32]},
    ],
    ids=["heads that nothing trains", "a norm that nothing reads"],
)  # fmt: skip
def test_what_nothing_trains_is_no_obstacle(config, tmp_path, changes):
    c = config(**changes)
    run(c, tmp_path / "whole")
    run(c, tmp_path / "slices", max_minutes=0)
    run(c, tmp_path / "slices")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "slices"))


def test_slices_of_time(config, tmp_path):
    c = config()
    run(c, tmp_path / "whole")
    outcomes = []
    while not outcomes or outcomes[-1].reason == "time":
        outcomes.append(run(c, tmp_path / "slices", max_minutes=0))
    assert [o.step for o in outcomes] == [1, 2, 3, 4, 5, 6]
    assert [o.model is None for o in outcomes] == [True] * 5 + [False]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "slices"))
    assert len(find_states(tmp_path / "slices" / STATES)) == 2
    again = run(c, tmp_path / "slices")  # nothing is left to do
    assert (again.step, again.reason) == (6, "finished")


def test_slices_that_leave_small_files_and_the_student_as_it_is(config, tmp_path):
    wide = {"student__model__backbone__embed_dim": 128, "student__model__backbone__mlp_hidden_dim": 1024}
    c = config(run__state_file_mib=1, **wide)
    run(config(**wide), tmp_path / "whole")
    outcomes = []
    while not outcomes or outcomes[-1].reason == "time":
        outcomes.append(run(c, tmp_path / "slices", max_minutes=0, export=tmp_path / f"{len(outcomes)}.safetensors"))
    files = list((tmp_path / "slices" / STATES).rglob("*.distcp"))
    assert len(files) > 8
    assert max(f.stat().st_size for f in files) <= 2**20
    assert sum(f.stat().st_size for f in files) > 8 * 2**20
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "slices"))
    tensors = [read_tensors(tmp_path / f"{i}.safetensors") for i in range(6)]
    assert all(t.dtype == torch.float16 for t in tensors[0].values() if t.is_floating_point())
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(tensors[5][k], v.half() if v.is_floating_point() else v) for k, v in whole.items())
    images, names = torch.rand(1, 3, 32, 32), ["one", "two"]
    first, last = (amradio.load(str(tmp_path / f"{i}.safetensors"), names)(images)["one"] for i in (0, 5))
    wanted = amradio.load(str(tmp_path / "whole" / "model.safetensors"), names)(images)["one"]
    assert last.features.dtype == torch.float32
    torch.testing.assert_close(last.features, wanted.features, rtol=0.01, atol=0.01)
    assert not torch.allclose(first.features, wanted.features, rtol=0.01, atol=0.01)


def test_weights_that_half_precision_cannot_hold(config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "amradio.distill.export.fold_parametrizations", lambda m: m.blocks[0].mlp.fc1.bias.data.fill_(1e5)
    )
    with pytest.raises(CheckpointError, match=r"blocks.0.mlp.fc1.bias has values that torch.float16 cannot hold"):
        run(config(), tmp_path, max_minutes=0, export=tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.slow
def test_a_process_killed_at_any_moment(settings, amradio_command, environment, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(run__checkpoint_steps=1, schedule__steps=30)))
    words = ("distill", path, "--device", "cpu", "--threads", "1")
    amradio_command(*words, "-o", tmp_path / "whole")
    command = [sys.executable, "-m", "amradio", *map(str, words), "-o", str(tmp_path / "killed")]
    for kill in range(2):  # soon after the first state, and later, while a state is being written perhaps
        before = len(read_log(tmp_path / "killed"))
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 120
        while len(read_log(tmp_path / "killed")) < before + 1 + 3 * kill and time.monotonic() < limit:
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "killed" / "model.safetensors").exists()
    done = amradio_command(*words, "-o", tmp_path / "killed", "--json")
    assert json.loads(done.stdout)["reason"] == "finished"
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert [e["loss"] for e in read_log(tmp_path / "whole")] == [e["loss"] for e in read_log(tmp_path / "killed")]


def test_a_loss_that_is_no_number(config, tmp_path):
    c = config(schedule__steps=20)
    healthy = amradio.load_backbone(c.teachers[0].backbone)
    model = SickModel(healthy, bad_call=8)  # 4 batches of statistics, then step 3
    with pytest.raises(NonFiniteLossError, match=r"Step 3: .*summary = nan.*Lower optimizer.lr") as caught:
        run(c, tmp_path, backbones={"one": model})
    assert caught.value.step == 3
    report = json.loads((tmp_path / NON_FINITE).read_text())
    assert report["step"] == 3
    assert len(report["pictures"][0]["main"]) == 4
    assert report["losses"]["main/one/summary"] == "nan"
    state = find_states(tmp_path / STATES)[-1]
    assert state.name == "step-00000003"  # the state before the step that failed
    assert run(c, tmp_path, backbones={"one": SickModel(healthy, bad_call=-1)}).reason == "finished"


class SickModel(torch.nn.Module):
    """A backbone that once says what is no number."""

    def __init__(self, healthy, bad_call):
        super().__init__()
        self.healthy, self.bad_call, self.calls = healthy, bad_call, 0

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("healthy"), name)

    def forward(self, images, feature_fmt="NLC"):
        self.calls += 1
        out = self.healthy(images, feature_fmt=feature_fmt)
        return out._replace(summary=out.summary * torch.nan) if self.calls == self.bad_call else out


def test_a_gradient_that_is_no_number_changes_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, bound: torch.tensor(torch.inf))
    with pytest.raises(NonFiniteLossError, match=r"Step 0: gradient_norm = inf"):
        run(config(), tmp_path)


def test_another_run_is_not_resumed(config, tmp_path):
    run(config(), tmp_path, max_minutes=0)
    with pytest.raises(ConfigError, match=r"saved by another run: seed, teachers changed since"):
        run(config(teachers__0__summary={"loss": "mse"}, seed=3), tmp_path)
    with pytest.raises(ConfigError, match=r"pictures changed since"):
        run(config(data__sources=[{"path": config().data.sources[0].path, "limit": 20}]), tmp_path)
    assert run(config(run__log_steps=2, schedule__steps=8), tmp_path).step == 8  # a longer schedule is no other run


@pytest.mark.parametrize(
    ("name", "value"), [("weight_decay", 5.0), ("betas", [0.5, 0.6]), ("eps", 1e-3), ("layer_decay", 0.5)]
)
def test_what_the_optimiser_was_built_under_stays(config, tmp_path, name, value):
    run(config(), tmp_path, max_minutes=0)
    with pytest.raises(ConfigError, match=rf"saved by another run: optimizer\.{name} changed since") as refusal:
        run(config(**{f"optimizer__{name}": value}), tmp_path)
    assert "Delete" not in str(refusal.value)
    assert run(config(optimizer__lr=1e-4, optimizer__clip=0.5, schedule__floor=0.1), tmp_path).step == 6


def test_a_good_state_is_not_called_damaged(config, tmp_path, monkeypatch):
    run(config(), tmp_path, max_minutes=0)
    monkeypatch.setattr("amradio.distill.loop.check_identity", lambda *state: None)  # as of a version that checks less
    with pytest.raises(CheckpointError, match=r"saved by another configuration or version: .* is not in it") as missing:
        run(config(optimizer__layer_decay=0.5), tmp_path)
    with pytest.raises(CheckpointError, match=r"has the shape \[.*\] in it, not \[") as other:
        run(config(student__model__backbone__mlp_hidden_dim=40), tmp_path)
    assert "Delete" not in f"{missing.value} {other.value}"


def test_other_weights_of_a_teacher_are_noticed(config, tmp_path, teachers):
    from amradio.models.configs import RadioConfig
    from amradio.weights.checkpoint import Identity

    a, b = (amradio.load_backbone(teachers[0]) for _ in range(2))
    a.identity, b.identity = (Identity(source="x", layout="native", sha256=s) for s in ("1", "2"))
    assert isinstance(a.config, RadioConfig)
    run(config(), tmp_path, max_minutes=0, backbones={"one": a})
    with pytest.raises(ConfigError, match="teachers' weights changed since"):
        run(config(), tmp_path, backbones={"one": b})


def test_other_weights_of_a_teacher_that_nobody_knows_are_noticed(config, tmp_path, teachers):
    a, b = (amradio.load_backbone(teachers[0]) for _ in range(2))
    a.identity = b.identity = None
    run(config(), tmp_path, max_minutes=0, backbones={"one": a})
    with torch.no_grad():
        next(b.parameters())[0] += 1e-3
    with pytest.raises(ConfigError, match="teachers' weights changed since"):
        run(config(), tmp_path, backbones={"one": b})
    run(config(), tmp_path, backbones={"one": a})


def test_a_damaged_state_is_named(config, tmp_path):
    outcome = run(config(), tmp_path, max_minutes=0)
    for file in outcome.state.glob("*.distcp"):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-00000001 cannot be read.*Delete it"):
        run(config(), tmp_path)
    (outcome.state / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="no usable state"):
        run(config(), tmp_path)


def test_hooks_see_the_exported_student(config, tmp_path):
    seen = []

    def look(moment):
        seen.append((moment.step, moment.model.training, sorted(moment.model.adaptors)))
        moment.show("some/thing", Image.new("RGB", (4, 3)))
        return {"number": Measurement(value=moment.step / 7, unit="%", data="3 pictures of x; 32x32")}

    run(config(), tmp_path, hooks=[FunctionHook("look", 4, look)])
    assert seen == [(4, False, ["one", "two"]), (6, False, ["one", "two"])]
    assert [e["look/number"] for e in read_log(tmp_path) if "look/number" in e] == [4 / 7, 6 / 7]
    assert (tmp_path / "pictures" / "step-00000004" / "some" / "thing.png").is_file()
    for _ in range(2):  # what was measured is known to a later process
        card = (tmp_path / "README.md").read_text()
        assert "| look/number | 0.8571 % | 6 | 3 pictures of x; 32x32 |" in card
        assert "| after step | look/number |\n|---|---|\n| 4 | 0.5714 |\n| 6 | 0.8571 |" in card
        run(config(), tmp_path)


def test_a_hook_that_fails_loses_no_step(config, tmp_path):
    def fail(moment):
        raise StopError

    run(config(), tmp_path / "whole")
    with pytest.raises(StopError):
        run(config(), tmp_path / "failed", hooks=[FunctionHook("fail", 3, fail)])
    assert find_states(tmp_path / "failed" / STATES)[-1].name == "step-00000003"
    run(config(), tmp_path / "failed")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "failed"))


def test_a_hook_that_did_not_end_is_done_again_and_others_are_not(config, tmp_path):
    calls = []

    def hooks(*, healthy):
        def second(moment):
            if not healthy:
                raise StopError
            calls.append(("second", moment.step))
            return {"x": Measurement(value=1.0)}

        def first(moment):
            calls.append(("first", moment.step))
            return {"x": Measurement(value=2.0)}

        return [FunctionHook("first", 3, first), FunctionHook("second", 100, second)]

    with pytest.raises(StopError):  # at the last step, when all steps are done
        run(config(), tmp_path, hooks=hooks(healthy=False))
    assert not (tmp_path / "README.md").exists()
    run(config(), tmp_path, hooks=hooks(healthy=True))
    run(config(), tmp_path, hooks=hooks(healthy=True))
    assert calls == [("first", 3), ("first", 6), ("second", 6)]
    card = (tmp_path / "README.md").read_text()
    assert "| first/x | 2 | 6 |" in card
    assert "| second/x | 1 | 6 |" in card


def test_hooks_have_names_of_their_own_and_a_time(config, tmp_path):
    def hook(every=1):
        return FunctionHook("x", every, lambda moment: {})

    with pytest.raises(ConfigError, match="There are 2 hooks named 'x'"):
        run(config(), tmp_path, hooks=[hook(), hook()])
    with pytest.raises(OptionError, match="'x' must come every 1 or more steps, got 0"):
        hook(0)


def test_a_schedule_that_is_shorter_than_its_state(config, tmp_path):
    run(config(), tmp_path)
    with pytest.raises(ConfigError, match=r"step-00000006 is 6 steps far, and schedule.steps is 5"):
        run(config(schedule__steps=5), tmp_path)


def test_numbers_and_pictures_in_tensorboard(config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def look(moment):
        moment.show("some/thing", Image.new("RGB", (4, 3)))
        return {"number": Measurement(value=moment.step / 4)}

    run(config(run__tensorboard=True), tmp_path, hooks=[FunctionHook("look", 3, look)])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("look/number")] == [(3, 0.75), (6, 1.5)]
    assert [e.step for e in events.Scalars("main/one/features_cosine")] == [1, 2, 3, 4, 5, 6]
    assert [(e.step, e.width, e.height) for e in events.Images("some/thing")] == [(3, 4, 3), (6, 4, 3)]


def test_batches_that_cannot_be_shared(config, tmp_path):
    with pytest.raises(ConfigError, match="batch_size 4, which 1 processes x 3 micro-batches"):
        run(config(run__accumulate=3), tmp_path)
    mosaic = {"teachers__0__mosaic": 2, "teachers__0__summary": None, "partitions__0__batch_size": 6}
    with pytest.raises(ConfigError, match="do not fill mosaics of 2 x 2 for the teacher 'one'"):
        run(config(**mosaic), tmp_path)
    with pytest.raises(OptionError, match="start the command with torchrun"):
        run(config(run__parallel="fsdp"), tmp_path)


def test_partitions_windows_mosaics_and_shifts(config, tmp_path):
    c = config(
        teachers__0__mosaic=2,
        teachers__0__summary=None,
        partitions=[
            {"name": "low", "sizes": [24, 32], "batch_size": 8, "windows": [0, 2]},
            {"name": "high", "sizes": [48], "batch_size": 2, "teachers": ["two"], "weight": 0.5},
        ],
        run__shift=1,
        run__precision="bfloat16",
    )
    run(c, tmp_path)
    log = read_log(tmp_path)
    assert {"low/one/features", "low/two/summary", "high/two/features"} <= set(log[0])
    assert "low/one/summary" not in log[0]
    assert "high/one/features" not in log[0]


def test_windows_change_from_step_to_step_and_not_the_result_at_the_end(config, tmp_path, monkeypatch):
    import amradio.distill.loop as loop

    windows = []

    def step(machine, number, batches, whole=loop.train_step):
        numbers = whole(machine, number, batches)
        windows.append((batches[0].plan.size, batches[0].plan.window, machine.student.radio.window_size))
        return numbers

    monkeypatch.setattr(loop, "train_step", step)
    c = config(partitions__0__windows=[0, 2], partitions__0__sizes=[24, 32], schedule__steps=12)
    outcome = run(c, tmp_path)
    assert {(size, wished) for size, wished, _ in windows} == {(24, None), (32, None), (32, 2)}
    assert all(wished == had for _, wished, had in windows)
    assert amradio.load(str(outcome.model)).window_size is None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of dynamo's tracing
def test_compiled_blocks_learn_the_same(config, tmp_path, monkeypatch):
    compiled = []

    def compile_it(module):
        compiled.append(type(module).__name__)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager", dynamic=True)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_it)
    run(config(schedule__steps=3, schedule__warmup=1), tmp_path / "plain")
    run(config(schedule__steps=3, schedule__warmup=1, student__compile=True), tmp_path / "compiled")
    assert compiled == ["Block", "Block"]
    losses = [[e["loss"] for e in read_log(tmp_path / n)] for n in ("plain", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_accumulated_batches_are_whole_batches(config, tmp_path):
    changes = {"student__model__backbone__position": "window", "partitions__0__sizes": [32]}
    run(config(**changes), tmp_path / "whole")
    run(config(run__accumulate=4, **changes), tmp_path / "parts")
    losses = [[e["loss"] for e in read_log(tmp_path / n)] for n in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_cached_targets_are_what_is_computed(config, tmp_path, monkeypatch):
    fixed = {"data__fixed_views": 2, "teachers__0__resolution": 32, "schedule__steps": 15}
    run(config(data__cache_dir=str(tmp_path / "cache"), **fixed), tmp_path / "filling")
    monkeypatch.setattr("amradio.distill.teachers.Teacher._computed", None)  # now everything must be there
    run(config(data__cache_dir=str(tmp_path / "cache"), **fixed), tmp_path / "filled")
    assert same(weights(tmp_path / "filling"), weights(tmp_path / "filled"))
    with pytest.raises(ConfigError, match=r"another teacher, other pictures or other crops. They differ in: crops"):
        run(config(data__cache_dir=str(tmp_path / "cache"), data__crops={"flip": 0.1}, **fixed), tmp_path / "other")


def test_pictures_of_the_same_names_do_not_share_cached_targets(config, tmp_path):
    fixed = {"data__fixed_views": 1, "teachers__0__resolution": 32, "schedule__steps": 2, "schedule__warmup": 1}
    for folder, shade in (("a", 0), ("b", 128)):
        (tmp_path / folder).mkdir()
        for i in range(8):
            Image.new("RGB", (40, 40), (shade, 9 * i, 0)).save(tmp_path / folder / f"{i:04d}.jpg")
    changes = {**fixed, "data__cache_dir": str(tmp_path / "cache")}
    run(config(**changes, data__sources=[{"path": str(tmp_path / "a")}]), tmp_path / "first")
    with pytest.raises(ConfigError, match=r"They differ in: pictures"):
        run(config(**changes, data__sources=[{"path": str(tmp_path / "b")}]), tmp_path / "second")


def test_with_cached_targets_a_killed_run_goes_on_to_the_same_bits(config, tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):  # large JPEGs of fine detail, which draft decoding shrinks
        small = Image.fromarray(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    changes = {"data__sources": [{"path": str(folder)}], "data__fixed_views": 4, "data__decode": "draft"}
    changes |= {"teachers__0__resolution": 96, "run__checkpoint_steps": 2, "run__keep": 9, "run__statistics": 4}
    # Two partitions share the cached targets, and ask for them in other batches and at other sizes.
    changes["partitions"] = [
        {"name": n, "sizes": [s], "batch_size": b} for n, s, b in (("low", 24, 4), ("high", 64, 3))
    ]
    whole = config(**changes, data__cache_dir=str(tmp_path / "cache"))
    run(whole, tmp_path / "whole")
    killed = config(**changes, data__cache_dir=str(tmp_path / "other"))
    run(killed, tmp_path / "killed")
    for step in (4, 6):  # the process was killed after step 6 and before its state was saved; the cache has its targets
        shutil.rmtree(tmp_path / "killed" / "states" / f"step-{step:08d}")
    (tmp_path / "killed" / "model.safetensors").unlink()
    assert run(killed, tmp_path / "killed").step == 6
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_tensorboard_is_optional(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    run(config(run__tensorboard=True, run__wandb="project"), tmp_path)
    assert len(read_log(tmp_path)) == 6
