import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from amradio.errors import OptionError
from amradio.features import ExtractOptions, FeatureRecord, FeatureWriter, WriterOptions, extract, run_job
from amradio.features import writer as writer_module
from amradio.features.writer import write_atomically
from amradio.images import ImageFile, ResizePolicy
from amradio.models.output import RadioOutput

OWN_SIZE = ResizePolicy("nearest")


def index(folder):
    return pq.read_table(folder / "index.parquet").to_pylist()


def leftovers(folder):
    return [p for p in folder.rglob("*") if ".amradio-" in p.name]


def record(position=0, name=None, features=None):
    name = name or f"{position}.png"
    output = RadioOutput(torch.ones(3), torch.ones(3, 2, 2) if features is None else features)
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    return FeatureRecord(position, ImageFile(Path(name), name), (80, 90), image, {"backbone": output})


def test_a_whole_run(tmp_path, model, photos):
    model.with_adaptor = True
    images = photos([(8, 12), (8, 8), (40, 24)], broken={1})
    out, seen = tmp_path / "out", []
    report = run_job(images, model, OWN_SIZE, out, ExtractOptions(batch_size=2), on_record=seen.append)

    assert [r.position for r in seen] == [0, 1, 2]
    assert json.loads(json.dumps(report)) == report
    assert (report["images"], report["ok"], report["failed"]) == (3, 2, 1)
    assert report["images_per_s"] == pytest.approx(2 / report["wall_s"])
    assert (
        report["bottleneck"] in report["waited_s"] == {s: report["waited_s"][s] for s in ("decode", "model", "write")}
    )
    assert report["policy"] == "own size"
    assert index(out) == [
        {"id": "0.png", "path": str(images[0].path), "status": "ok", "reason": None, "width": 12, "height": 8}
        | {
            "input_width": 12,
            "input_height": 8,
            "grid_width": 3,
            "grid_height": 2,
            "file": "features/0.png.safetensors",
        },
        {"id": "1.png", "path": str(images[1].path), "status": "failed", "reason": seen[1].reason}
        | dict.fromkeys(["width", "height", "input_width", "input_height", "grid_width", "grid_height", "file"]),
        {"id": "2.png", "path": str(images[2].path), "status": "ok", "reason": None, "width": 24, "height": 40}
        | {"input_width": 24, "input_height": 40, "grid_width": 6, "grid_height": 10}
        | {"file": "features/2.png.safetensors"},
    ]
    stored = load_file(out / "features/2.png.safetensors")
    assert {k: tuple(v.shape) for k, v in stored.items()} == {
        "backbone.summary": (3,),
        "backbone.features": (3, 10, 6),
        "clip.summary": (3,),
        "clip.features": (3, 10, 6),
    }
    for name, output in seen[2].outputs.items():
        torch.testing.assert_close(stored[f"{name}.summary"], output.summary)
        torch.testing.assert_close(stored[f"{name}.features"], output.features)
    assert not leftovers(out)


@pytest.mark.parametrize("file_format", ["safetensors", "npz"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_formats_and_dtypes(tmp_path, file_format, dtype):
    features = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16().permute(2, 0, 1)
    with FeatureWriter(tmp_path, WriterOptions(dtype=dtype, file_format=file_format)) as writer:
        writer.write(record(features=features))
    path = tmp_path / index(tmp_path)[0]["file"]
    assert path.name == f"0.png.{file_format}"
    if file_format == "npz":
        with np.load(path) as data:
            stored = {k: torch.from_numpy(v) for k, v in data.items()}
    else:
        stored = load_file(path)
    assert list(stored) == ["backbone.features", "backbone.summary"] or file_format == "npz"
    assert stored["backbone.features"].dtype == dtype
    torch.testing.assert_close(stored["backbone.features"], features.to(dtype))


def test_what_float16_cannot_hold_fails_with_a_reason(tmp_path):
    with FeatureWriter(tmp_path, WriterOptions(dtype=torch.float16)) as writer:
        writer.write(record(0, features=torch.full((3, 2, 2), 7e4)))
        writer.write(record(1))
    rows = index(tmp_path)
    assert [r["status"] for r in rows] == ["failed", "ok"]
    assert rows[0]["reason"] == "backbone.features has values up to 7e+04, too large for float16; use float32."
    assert not (tmp_path / "features/0.png.safetensors").exists()


def test_features_that_are_not_numbers_fail_with_a_reason(tmp_path):
    with FeatureWriter(tmp_path) as writer:
        writer.write(record(features=torch.tensor([1.0, torch.nan, torch.inf]).reshape(3, 1, 1)))
    assert index(tmp_path)[0]["reason"] == "backbone.features has 2 values that are not finite: the model overflowed."
    assert (writer.ok, writer.failed) == (0, 1)


def test_drawings(tmp_path):
    def draw(r):
        return Image.new("RGB", (r.image.shape[2], r.image.shape[1]), (1, 2, 3))

    with FeatureWriter(tmp_path, WriterOptions(draw={"pca": draw})) as writer:
        writer.write(record())
    with Image.open(tmp_path / "pca/0.png.png") as image:
        assert image.size == (8, 8)
        assert image.getpixel((0, 0)) == (1, 2, 3)


def test_the_index_survives_an_exception_and_keeps_the_order(tmp_path, model, photos):
    images = photos([(8, 8)] * 6)

    def stop(r):
        if r.position == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(images, model, OWN_SIZE, tmp_path / "out", ExtractOptions(batch_size=2), on_record=stop)
    rows = index(tmp_path / "out")
    assert [r["id"] for r in rows] == ["0.png", "1.png", "2.png", "3.png"]
    assert all((tmp_path / "out" / r["file"]).exists() for r in rows)
    assert not leftovers(tmp_path / "out")


def test_the_index_is_written_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "INDEX_INTERVAL_S", -1.0)
    with FeatureWriter(tmp_path) as writer:
        writer.write(record(0))
        assert (tmp_path / "index.parquet").exists()


def test_a_full_disk_ends_the_run_and_keeps_what_was_done(tmp_path, monkeypatch):
    real = writer_module._save

    def save(tensors, path, file_format):
        if "2.png" in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, file_format)

    monkeypatch.setattr(writer_module, "_save", save)

    def write_all():
        with FeatureWriter(tmp_path, WriterOptions(workers=1)) as writer:
            for i in range(50):
                writer.write(record(i))

    with pytest.raises(OSError, match="No space left on device"):
        write_all()
    rows = index(tmp_path)
    assert [r["id"] for r in rows][:2] == ["0.png", "1.png"]
    assert "2.png" not in [r["id"] for r in rows]
    assert len(rows) < 20
    assert sorted(p.name for p in (tmp_path / "features").iterdir()) == sorted(f"{r['id']}.safetensors" for r in rows)


def test_write_atomically(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def killed(path):
        path.write_bytes(b"new, but only ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, killed)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    write_atomically(target, lambda path: path.write_bytes(b"new"))
    assert target.read_bytes() == b"new"


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    stale = tmp_path / "features" / ".amradio-99-1-0.png.safetensors"
    stale.parent.mkdir()
    stale.write_bytes(b"half")
    with FeatureWriter(tmp_path):
        assert not stale.exists()
    assert index(tmp_path) == []


def test_an_earlier_run_is_not_overwritten_by_accident(tmp_path):
    with FeatureWriter(tmp_path) as writer:
        writer.write(record(0))
    with pytest.raises(
        OptionError, match=r"already holds the features of an earlier run \(index\.parquet\)\. Choose anoth"
    ):
        FeatureWriter(tmp_path)
    with FeatureWriter(tmp_path, WriterOptions(overwrite=True)) as writer:
        writer.write(record(0, "other.png"))
    assert [r["id"] for r in index(tmp_path)] == ["other.png"]


def test_two_pictures_with_one_id(tmp_path):
    with FeatureWriter(tmp_path) as writer:
        writer.write(record(0, "a.png"))
        with pytest.raises(OptionError, match=r"Two pictures have the id 'a\.png'; one would overwrite the other\."):
            writer.write(record(1, "a.png"))
    assert len(index(tmp_path)) == 1


def test_output_must_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=r"The output .*file is a file; name a folder\."):
        FeatureWriter(tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.bfloat16}, r"stored in float32 or float16, got torch\.bfloat16"),
        ({"file_format": "pt"}, r"Unknown file format 'pt'\. Must be 'safetensors' or 'npz'\."),
        ({"workers": 0}, r"workers must be at least 1, got 0"),
        ({"draw": {"features": None}}, r"The folder 'features' holds the feature files"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(OptionError, match=message):
        WriterOptions(**options)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_paths_that_are_not_text(tmp_path, model):
    from amradio.images import expand

    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"")
    with FeatureWriter(tmp_path / "out") as writer:
        for r in extract(expand([folder]), model, OWN_SIZE):
            writer.write(r)
    rows = index(tmp_path / "out")
    assert rows[0]["path"].endswith("caf\\xe9/a.png")
    assert "caf\\xe9/b.png: the file is empty" in rows[1]["reason"]
