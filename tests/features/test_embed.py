import hashlib
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
from amradio.features import EmbedOptions, ExtractOptions, embed, extract, load_embeddings
from amradio.images import ResizePolicy, open_images

OWN_SIZE = ResizePolicy("nearest")
MODULE = sys.modules[embed.__module__]
SIZES = [(8, 8), (8, 12), (12, 8), (16, 8)] * 6


def run(images, model, folder, keep="summary", batch_size=4, store=torch.float32, **options):
    options = {"shard_size": 10, **options}
    extract_options = ExtractOptions(batch_size=batch_size, keep=keep)
    return embed(images, model, OWN_SIZE, folder, extract_options, EmbedOptions(store=store, **options))


def contents(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).iterdir())}


def rows(folder):
    return [row for p in sorted(Path(folder).glob("*.parquet")) for row in pq.read_table(p).to_pylist()]


def test_a_whole_run(tmp_path, model, labelled):
    model.with_adaptor = True
    images = labelled(SIZES, broken={3, 20})
    progress = []
    result = embed(
        images,
        model,
        OWN_SIZE,
        tmp_path / "out",
        ExtractOptions(batch_size=4, keep="all"),
        EmbedOptions(shard_size=10),
        on_progress=progress.append,
    )
    assert json.loads(json.dumps(result)) == result
    assert (result["images"], result["ok"], result["failed"], result["resumed"], result["shards"]) == (24, 22, 2, 0, 3)
    assert [f["id"] for f in result["failures"]] == [images[3].id, images[20].id]
    assert sum(progress) == 24
    assert sorted(contents(tmp_path / "out")) == [
        *(f"embeddings-0000{i}.{ending}" for i in range(3) for ending in ("parquet", "safetensors")),
        "manifest.json",
    ]
    found = rows(tmp_path / "out")
    assert [r["position"] for r in found] == list(range(24))
    assert found[3] == {
        "position": 3,
        "id": images[3].id,
        "path": images[3].location,
        "label": 1,
        "class": None,
        "status": "failed",
        "reason": result["failures"][0]["reason"],
    } | dict.fromkeys(("height", "width", "input_height", "input_width", "row"))
    assert found[4]["row"] == 3
    assert [r["row"] for r in found[20:]] == [None, 0, 1, 2]
    assert (found[1]["height"], found[1]["width"], found[1]["input_height"], found[1]["input_width"]) == (8, 12, 8, 12)
    tensors = load_file(tmp_path / "out" / "embeddings-00000.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        f"{name}.{part}": shape
        for name in ("backbone", "clip")
        for part, shape in {
            "summary": (9, 3),
            "features": (sum(r["height"] * r["width"] // 16 for r in found[:10] if r["status"] == "ok"), 3),
            "offsets": (10,),
            "grids": (9, 2),
        }.items()
    }

    records = [r for r in extract(images, model, OWN_SIZE, ExtractOptions()) if r.ok]
    embeddings = load_embeddings(tmp_path / "out")
    assert len(embeddings) == 22
    assert embeddings.names == ("backbone", "clip")
    for name in embeddings.names:
        expected = torch.stack([r.outputs[name].summary for r in records])
        torch.testing.assert_close(embeddings.summaries(name)[:], expected)
        for i, record in enumerate(records):
            torch.testing.assert_close(embeddings.features(i, name), record.outputs[name].features)
    torch.testing.assert_close(embeddings.features(-1), records[-1].outputs["backbone"].features)
    assert embeddings.ids == [r.source.id for r in records]
    assert embeddings.paths == [r.source.location for r in records]
    assert embeddings.labels.tolist() == [int(images.labels[r.position]) for r in records]
    assert [(f.position, f.id) for f in embeddings.failures] == [(3, images[3].id), (20, images[20].id)]
    with pytest.raises(IndexError):
        embeddings.features(22)


def test_slices_of_rows(tmp_path, model, photos):
    run(photos([(8, 8)] * 30, broken={*range(10, 20), 21}), model, tmp_path / "out")  # the middle shard has no rows
    summaries = load_embeddings(tmp_path / "out").summaries()
    whole = summaries[:]
    assert whole.shape == (19, 3)
    for start in range(-2, 21):
        for stop in range(-2, 22):
            assert torch.equal(summaries[start:stop], whole[start:stop]), (start, stop)
    assert summaries[100:].shape == (0, 3)
    with pytest.raises(OptionError, match="Rows are read in runs, with step 1, got 2"):
        summaries[::2]


def test_rows_by_number(tmp_path, model, photos):
    run(photos([(8, 8)] * 30, broken={4, 21}), model, tmp_path / "out")
    rows = load_embeddings(tmp_path / "out").summaries()
    whole = rows[:]
    assert torch.equal(rows[2], whole[2])
    assert torch.equal(rows[-1], whole[-1])
    order = [3, 0, -1, 3]
    for index in (order, torch.tensor(order), np.array(order)):
        assert torch.equal(rows[index], whole[order])
    assert rows[[]].shape == (0, whole.shape[1])
    with pytest.raises(IndexError):
        rows[len(rows)]
    with pytest.raises(OptionError, match="Rows are chosen by whole numbers or a slice"):
        rows["a"]


def test_the_search_takes_it_as_a_database(tmp_path, model, photos):
    from amradio.search import top_k

    run(photos([(8, 8)] * 25), model, tmp_path / "out")
    summaries = load_embeddings(tmp_path / "out").summaries()
    found = top_k(summaries[3:5], summaries, 4)
    expected = (summaries[3:5] @ summaries[:].T).topk(4)
    torch.testing.assert_close(found.scores, expected.values)


@pytest.mark.parametrize("store", [torch.float32, torch.float16, torch.bfloat16])
def test_number_formats_and_means(tmp_path, model, photos, store):
    images = photos([(8, 12)] * 5)
    run(images, model, tmp_path / "out", keep="pooled", store=store)
    embeddings = load_embeddings(tmp_path / "out")
    assert embeddings.summaries()[0:1].dtype == embeddings.pooled()[0:1].dtype == store
    records = extract(images, model, OWN_SIZE, ExtractOptions(batch_size=4, keep="pooled"))
    expected = torch.stack([r.outputs["backbone"].features for r in records])
    torch.testing.assert_close(embeddings.pooled()[:], expected.to(store))
    with pytest.raises(OptionError, match=r"was made with keep='pooled'; this needs keep='all'\."):
        embeddings.features(0)
    with pytest.raises(OptionError, match=r"has no output 'clip', only \['backbone'\]"):
        embeddings.summaries("clip")


def test_values_that_cannot_be_stored_fail_with_a_reason(tmp_path, photos):
    from amradio.models.output import RadioOutput

    class Large:
        def __call__(self, images, feature_fmt):
            scale = torch.tensor([1.0, 7e4, torch.nan])[: len(images), None]
            return RadioOutput(torch.ones(len(images), 3) * scale, images)

        def get_nearest_supported_resolution(self, height, width):
            return height, width

    run(photos([(8, 8)] * 3), Large(), tmp_path / "out", store=torch.float16)
    assert [r["reason"] for r in rows(tmp_path / "out")] == [
        None,
        "backbone.summary has values up to 7e+04, too large for float16; use float32.",
        "backbone.summary has 3 values that are not finite: the model overflowed.",
    ]
    assert len(load_embeddings(tmp_path / "out")) == 1


def test_nothing_worked(tmp_path, model, photos):
    result = run(photos([(8, 8)] * 3, broken={0, 1, 2}), model, tmp_path / "out")
    assert (result["ok"], result["failed"], result["batch_fill"]) == (0, 3, None)
    embeddings = load_embeddings(tmp_path / "out")
    assert (len(embeddings), embeddings.names, len(embeddings.failures)) == (0, (), 3)


def test_a_complete_run_is_not_computed_again(tmp_path, model, photos):
    images = photos(SIZES, broken={5})
    first = run(images, model, tmp_path / "out")
    before, model.batches = contents(tmp_path / "out"), []
    second = run(images, model, tmp_path / "out")
    assert model.batches == []
    assert second["resumed"] == 24
    assert {k: second[k] for k in ("ok", "failed", "failures")} == {k: first[k] for k in ("ok", "failed", "failures")}
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("damage", ["truncated", "missing", "no table", "broken table", "of another run", "swapped"])
def test_damaged_shards_are_made_again(tmp_path, model, photos, damage):
    images, out = photos(SIZES), tmp_path / "out"
    run(images, model, out)
    before, model.batches = contents(out), []
    tensors, table = out / "embeddings-00001.safetensors", out / "embeddings-00001.parquet"
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "no table":
        table.unlink()
    elif damage == "broken table":
        table.write_bytes(table.read_bytes()[:-9])
    elif damage == "of another run":
        schema = pq.read_table(table)
        metadata = json.loads(schema.schema.metadata[b"amradio"]) | {"fingerprint": "0"}
        pq.write_table(schema.replace_schema_metadata({b"amradio": json.dumps(metadata)}), table)
    else:
        table.write_bytes((out / "embeddings-00000.parquet").read_bytes())
    result = run(images, model, out)
    assert result["resumed"] == 14
    assert sum(b[0] for b in model.batches) == 10
    assert contents(out) == before


class Killed(BaseException):
    pass


def test_stopped_before_or_after_any_file(tmp_path, model, photos, monkeypatch):
    """Whatever the last file that appeared is, the next run ends with the same bytes."""
    images = photos(SIZES, broken={5})
    run(images, model, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    replace_, count = os.replace, 0

    def stopping(source, target):
        nonlocal count
        count += 1
        if count == stop:
            raise Killed
        replace_(source, target)

    monkeypatch.setattr(os, "replace", stopping)
    for stop in range(1, 9):  # the manifest, two files for each of three shards, the manifest again
        count = 0
        with pytest.raises(Killed):
            run(images, model, tmp_path / str(stop))
        count = 100
        run(images, model, tmp_path / str(stop))
        assert contents(tmp_path / str(stop)) == expected, stop


def test_other_settings_refuse_to_resume_and_say_which_differ(tmp_path, model, photos):
    images, out = photos(SIZES), tmp_path / "out"
    run(images, model, out)
    before = contents(out)
    with pytest.raises(OptionError) as error:
        run(images, model, out, keep="pooled", store=torch.float16)
    assert str(error.value) == (
        f"The folder {out} holds embeddings made with other settings: keep was summary and is pooled now; store was "
        "float32 and is float16 now. Choose another folder, use the same settings to resume, or say that it may be "
        "overwritten."
    )
    for other, what in [
        (images.head(20), "dataset.count was 24 and is 20 now"),
        (images.shuffled(0), "dataset.fingerprint was"),
    ]:
        with pytest.raises(OptionError, match=what):
            run(other, model, out)
    with pytest.raises(OptionError, match="shard_size was 10 and is 7 now"):
        run(images, model, out, shard_size=7)
    images[0].path.write_bytes(images[1].path.read_bytes() + b" ")
    with pytest.raises(OptionError, match=r"dataset\.fingerprint was"):
        run(open_images(str(images[0].path.parent)), model, out)
    assert contents(out) == before


def test_overwriting(tmp_path, model, photos):
    images, out = photos(SIZES), tmp_path / "out"
    run(images, model, out, shard_size=4)
    run(images, model, out, keep="pooled", overwrite=True)
    run(images, model, tmp_path / "fresh", keep="pooled")
    assert contents(out) == contents(tmp_path / "fresh")


def test_stopped_while_overwriting(tmp_path, model, photos, monkeypatch):
    images, out = photos(SIZES), tmp_path / "out"
    run(images, model, out, shard_size=4)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *a, **k: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(images, model, out, overwrite=True)
    run(images, model, out)
    run(images, model, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_files_of_others_are_left_alone(tmp_path, model, photos):
    images, out = photos(SIZES), tmp_path / "out"
    out.mkdir()
    (out / "embeddings-00000.parquet").write_bytes(b"precious")
    (out / "notes.txt").write_bytes(b"mine")
    for overwrite in (False, True):
        with pytest.raises(OptionError, match=r"holds embeddings-00000\.parquet but no manifest\.json"):
            run(images, model, out, overwrite=overwrite)
    (out / "embeddings-00000.parquet").rename(out / "kept.parquet")
    (out / "manifest.json").write_text('{"name": "a browser extension"}')
    for overwrite in (False, True):
        with pytest.raises(OptionError, match=r"manifest\.json is not a manifest of embeddings\."):
            run(images, model, out, overwrite=overwrite)
    (out / "manifest.json").unlink()
    run(images, model, out)
    run(images, model, out, keep="pooled", overwrite=True)
    assert (out / "notes.txt").read_bytes() == b"mine"
    assert (out / "kept.parquet").read_bytes() == b"precious"


def test_reading_what_is_not_there(tmp_path, model, photos):
    with pytest.raises(OptionError, match=r"There are no embeddings in .*: it has no manifest\.json\. `amradio embed`"):
        load_embeddings(tmp_path)
    run(photos(SIZES), model, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(OptionError, match="are not complete"):
        load_embeddings(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(OptionError, match=r"has the format version 99, and this version of amradio reads version 1\."):
        load_embeddings(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(OptionError, match="it is no JSON"):
        load_embeddings(tmp_path / "out")


def test_a_full_disk_ends_the_run_and_keeps_what_was_done(tmp_path, model, photos, monkeypatch):
    images = photos(SIZES)
    write = MODULE.ShardBuilder.write

    def full(self, folder, fingerprint):
        if self.shard == 1:
            raise OSError(28, "No space left on device")
        write(self, folder, fingerprint)

    with monkeypatch.context() as patch:
        patch.setattr(MODULE.ShardBuilder, "write", full)
        with pytest.raises(OSError, match="No space left"):
            run(images, model, tmp_path / "out")
    assert run(images, model, tmp_path / "out")["resumed"] == 10


def test_options_are_checked(tmp_path, model, photos):
    with pytest.raises(OptionError, match=r"stored in float32, float16 or bfloat16, got torch\.float64"):
        EmbedOptions(store=torch.float64)
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=r"The output .*file is a file; name a folder\."):
        run(photos(SIZES), model, tmp_path / "file")


@pytest.mark.slow
def test_a_thousand_files_of_all_kinds(tmp_path, model):
    """950 odd but valid pictures, 50 bad files: 950 rows, 50 reasons."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    bomb = (tmp_path / "bomb.png").read_bytes()
    for i in range(1000):
        pixels = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
        image, path = Image.fromarray(pixels), folder / f"{i:04d}.png"
        if i % 20 == 7:
            content = Path(path).with_suffix(".jpg")
            kind = i // 20 % 5
            if kind == 0:
                image.save(content)
                content.write_bytes(content.read_bytes()[:-40])
            elif kind == 1:
                path.write_bytes(b"")
            elif kind == 2:
                path.write_text("no picture, but a text")
            elif kind == 3:
                path.write_bytes(bomb)
            else:
                image.save(path)
                header = bytearray(path.read_bytes())
                header[16:24] = (90_000).to_bytes(4, "big") * 2  # the size it claims
                path.write_bytes(header)
        elif i % 6 == 1:
            image.convert("CMYK").save(path.with_suffix(".jpg"))
        elif i % 6 == 2:
            Image.fromarray(rng.integers(0, 65536, (8, 12), dtype=np.uint16)).save(path)
        elif i % 6 == 3:
            image.quantize(8).save(path, transparency=0)
        elif i % 6 == 4:
            exif = Image.Exif()
            exif[0x0112] = 6
            image.save(path.with_suffix(".jpg"), exif=exif)
        elif i % 6 == 5:
            image.save(path.with_suffix(".jpg"), format="PNG")
        else:
            image.save(path)
    result = run(open_images(str(folder)), model, tmp_path / "out", shard_size=128, batch_size=32)
    assert (result["ok"], result["failed"]) == (950, 50)
    found = rows(tmp_path / "out")
    assert len(found) == 1000
    assert all((r["status"] == "ok") == (r["reason"] is None) == (r["row"] is not None) for r in found)
    assert all(int(Path(r["path"]).stem) % 20 == 7 for r in found if r["status"] == "failed")
    assert len(load_embeddings(tmp_path / "out").summaries()[:]) == 950
