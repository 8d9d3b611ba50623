"""``amradio visualize`` on small photos and random models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import amradio
from amradio import RadioModel
from amradio.cli import main
from amradio.images import decode
from amradio.models.configs import AdaptorConfig, HeadConfig, RadioConfig, ViTConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model with an adaptor that has no text side."""
    torch.manual_seed(0)
    head = HeadConfig(input_dim=32, hidden_dim=16, output_dim=24)
    trunk = ViTConfig(
        embed_dim=32, depth=2, num_heads=2, mlp_hidden_dim=48, patch_size=16, position_grid=(4, 4), num_cls_tokens=2
    )
    config = RadioConfig(
        backbone=trunk,
        summary_idxs=(0,),
        adaptors={"sam": AdaptorConfig(head_idx=1, summary=head, features=head)},
        teachers=({"name": "sam", "type": "sam", "model": "tiny"},),
    )
    made = RadioModel(config, ["sam"])
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    return str(amradio.save(made, tmp_path_factory.mktemp("model") / "random.safetensors"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with photos of all kinds, none of them ordinary."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (48, 64, 4), dtype=np.uint8)
    Image.fromarray(pixels[..., :3]).save(folder / "a.png")
    Image.fromarray(pixels[..., 0]).save(folder / "grey.png")
    Image.fromarray(pixels).save(folder / "rgba.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(pixels[..., :3]).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(pixels[:20, :1, :3]).save(folder / "thin.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    return folder


def visualize(kind: str, photos: Sequence[Any], output: Path, model: str, *words: str) -> int:
    sizes = [] if "--resolution" in words else ["--resolution", "64"]
    return main(
        ["visualize", kind, *map(str, photos), "-o", str(output), "-m", model, *sizes, "--height", "48", *words]
    )


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_photos_of_all_kinds(photos: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert visualize("pca", [photos], tmp_path / "sheet.svg", model) == 3
    out = capsys.readouterr()
    assert "5 of 6 photos are in" in out.out
    assert "broken.jpg: Cannot decode" in out.err
    text = (tmp_path / "sheet.svg").read_text()
    for name, grid in (("a.png", "4 x 5"), ("grey.png", "4 x 5"), ("rgba.png", "4 x 5"), ("turned.jpg", "5 x 4"),
                       ("thin.png", "80 x 4")):  # fmt: skip
        assert f">{name}<" in text
        assert f">{grid} patches<" in text


@pytest.mark.parametrize("suffix", ["png", "jpg", "svg", "pdf"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pca", ["--upsample", "guided", "--foreground"]),
        ("similarity", ["--at", "10,20", "--at", "90%,50%"]),
        ("match", ["--count", "5"]),
        ("segments", ["--count", "3"]),
        ("segments", ["--count", "2", "--method", "spectral", "--upsample", "nearest"]),
        ("attention", ["--layer", "0", "--token", "1", "--head", "0", "--head", "1"]),
        ("norms", ["--style", "mask"]),
    ],
)
def test_two_runs_give_the_same_file(
    kind: str, words: list[str], suffix: str, photos: Path, model: str, tmp_path: Path
) -> None:
    given = [photos / "a.png", photos / "turned.jpg"]
    found = [tmp_path / f"{i}.{suffix}" for i in range(2)]
    assert [visualize(kind, given, path, model, *words) for path in found] == [0, 0]
    assert digest(found[0]) == digest(found[1])


def test_models_adaptors_and_resolutions_stand_side_by_side(photos: Path, model: str, tmp_path: Path) -> None:
    words = ["-m", model, "-a", "backbone", "-a", "sam", "--resolution", "32", "--resolution", "48", "64"]
    assert visualize("pca", [photos / "a.png"], tmp_path / "s.svg", model, *words) == 0
    text = (tmp_path / "s.svg").read_text()
    assert text.count("<image ") == 1 + 2 * 2 * 2
    for head in ("random.safetensors · sam", "48x64 px", "32 px"):
        assert head.split(" · ")[-1] in text
    assert text.count(">2 x 3 patches<") == 4
    assert text.count(">3 x 4 patches<") == 4
    assert visualize("pca", [photos / "a.png"], tmp_path / "l.svg", model, "--layer", "0", "--layer", "-1") == 0
    assert "layer 0" in (tmp_path / "l.svg").read_text()


def test_a_folder_gets_a_sheet_for_each_photo(
    photos: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [photos / "a.png", photos / "grey.png"]
    assert visualize("norms", given, tmp_path / "out", model, "--format", "jpg", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["photos"] == 2
    assert result["failures"] == []
    assert [Path(p).name for p in result["written"]] == ["a.png.jpg", "grey.png.jpg"]
    assert all(decode(p).height > 48 for p in result["written"])


def test_a_pair_is_one_sheet_in_a_folder(photos: Path, model: str, tmp_path: Path) -> None:
    given = [photos / "a.png", photos / "grey.png"]
    words = ["--resolution", "32", "--resolution", "64", "--format", "svg"]
    assert visualize("match", given, tmp_path / "out", model, *words) == 0
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "a.png--grey.png.svg"
    assert path.read_text().count("<image ") == 2


def test_one_basis_for_all_photos_or_one_for_each(photos: Path, model: str, tmp_path: Path) -> None:
    given = [photos / "a.png", photos / "grey.png"]
    for name, paths, words in (("both", given, []), ("each", given, ["--basis", "image"]), ("one", given[:1], [])):
        assert visualize("pca", paths, tmp_path / name, model, *words) == 0
    assert visualize("pca", given, tmp_path / "skip", model, "--basis", "image", "--skip", "1") == 0
    first = {n: np.asarray(decode(tmp_path / n / "a.png.png"))[:100] for n in ("both", "each", "one", "skip")}
    assert not np.array_equal(first["both"], first["one"])
    assert not np.array_equal(first["each"], first["skip"])
    rows = slice(20, 80)  # the pictures, without the note below
    np.testing.assert_array_equal(first["each"][rows], first["one"][rows])


@pytest.fixture(scope="module")
def cat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = pytest.importorskip("skimage.data")
    path = tmp_path_factory.mktemp("cat") / "cat.png"
    Image.fromarray(data.cat()).resize((225, 150)).save(path)
    return path


def test_text_lights_up_what_it_names(cat: Path, tmp_path: Path) -> None:
    words = ["--text", "cat", "--text", "motorcycle", "-a", "minilm", "--resolution", "112", "--style", "heat"]
    command = ["visualize", "text", str(cat), *words, "--colour-map", "grey", "--height", "112"]
    assert main([*command, "-o", str(tmp_path / "t.png")]) == 0
    page = np.asarray(decode(tmp_path / "t.png").convert("L")).astype(float)
    width = round(112 * 225 / 150)
    top = page.shape[0] // 2 - 40
    found = [page[top : top + 40, 10 + (width + 10) * i + 20 : 10 + (width + 10) * i + 100].mean() for i in (1, 2)]
    assert found[0] > found[1] + 60
    assert main([*command, "--contrast", "-o", str(tmp_path / "c.svg")]) == 0
    assert "Share of each text among those above" in (tmp_path / "c.svg").read_text()


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("pca", ["-o", "x.bmp"], "--output x.bmp is neither a folder nor does it end in one of .png"),
        ("pca", ["--height", "5"], "--height must be from 16 to 4096 pixels, got 5"),
        ("pca", ["--skip", "-1"], "--skip must be at least 0, got -1"),
        ("pca", ["--layer", "7"], "Block index 7 is out of range (0 to 1"),
        ("pca", ["--layer", "0", "-a", "sam"], "--layer chooses a block of the backbone"),
        ("pca", ["-a", "clip"], "adaptor name 'clip'. Known names: ['sam']"),
        ("pca", ["-m", "no-such-model"], "There is no backbone 'no-such-model'"),
        ("similarity", ["--at", "10"], "--at '10' is no place: write X,Y in pixels, or in percent"),
        ("similarity", ["--at", "300,4"], "--at 300,4 is not on the photo, which is 64 pixels wide and 48 high"),
        ("similarity", ["--opacity", "3"], "--opacity is from 0 to 1, got 3"),
        ("similarity", ["--colour-map", "nonsense"], "colour map 'nonsense'"),
        ("match", [], "between two photos, got 1"),
        ("match", ["--count", "0"], "--count must be at least 1"),
        ("segments", ["--count", "1"], "--count must be from 2 to 64 segments, got 1"),
        ("attention", ["-a", "sam"], "Attention is that of the trunk, which all adaptors share: leave out --adaptor"),
        ("attention", ["--token", "9"], "There is no prefix token 9; the model has 2"),
        ("attention", ["--head", "9"], "There is no head 9; the block has 2"),
        ("text", [], "Nothing is looked for; say what, with --text cat"),
        ("text", ["--text", "cat"], "A RadioModel has no text side. Choose an adaptor"),
        ("text", ["--text", "cat", "-a", "sam"], "The teacher 'sam' has no text side"),
        ("text", ["--text", "cat", "--contrast"], "--contrast shares photos among texts; give at least two"),
        ("text", ["--text", "cat", "--template", "a photo"], "has no {}, where the text would go"),
    ],
)
def test_wrong_options_are_refused_in_words(
    kind: str, words: list[str], message: str, photos: Path, model: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert visualize(kind, [photos / "a.png"], Path("x.png"), model, *words) == 1
    assert message in capsys.readouterr().err
    assert not Path("x.png").exists()


def test_photos_that_cannot_be_used(
    photos: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert visualize("pca", [photos / "broken.jpg"], tmp_path / "s.png", model) == 1
    assert "none of the photos could be drawn" in capsys.readouterr().err
    given = [photos / "broken.jpg", photos / "a.png"]
    assert visualize("similarity", given, tmp_path / "s.png", model) == 1
    assert "The first photo, in which the places are, could not be used" in capsys.readouterr().err
    Image.new("RGB", (1, 3000)).save(photos / "strip.png")
    given = [photos / "a.png", photos / "strip.png"]
    assert visualize("pca", given, tmp_path / "s.svg", model, "--resolution", "256") == 3
    err = capsys.readouterr().err
    assert "strip.png: A picture of 3000 x 1 (height x width) would become" in err
    assert "strip.png" not in (tmp_path / "s.svg").read_text()


def test_places_after_a_centre_crop(photos: Path, model: str, tmp_path: Path) -> None:
    """A pixel of the photo is the same thing whether or not its surroundings are cut off."""
    from amradio.cli.visualize_relations import Similarity

    command = Similarity(photos=("a.png",), output=Path("s.png"), resolution=((32, 32),))
    assert command._seen((50, 50), (100, 100), (32, 32)) == pytest.approx((16, 16))
    assert command._seen((150, 50), (200, 100), (32, 32)) == pytest.approx((32, 16))
    assert command._seen((100, 0), (200, 100), (32, 32)) == pytest.approx((16, 0))
    whole = Similarity(photos=("a.png",), output=Path("s.png"), resolution=((32,),))
    assert whole._seen((150, 50), (200, 100), (64, 32)) == pytest.approx((48, 16))
    assert visualize("similarity", [photos / "a.png"], tmp_path / "s.png", model, "--resolution", "32", "32") == 0
