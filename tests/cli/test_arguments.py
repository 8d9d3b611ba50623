"""Words on the command line: no order may change their meaning."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from amradio.cli import COMMANDS, parse
from amradio.cli.features import Features
from amradio.cli.text import size_of, table

PARTS = [["--resolution", "378", "378"], ["-o", "out"], ["a.jpg"], ["--pca"], ["b.jpg"], ["-a", "clip"]]


@pytest.mark.parametrize("order", list(itertools.permutations(range(len(PARTS))))[::7])
def test_every_order_means_the_same(order: tuple[int, ...]) -> None:
    command = parse(["features", *(word for i in order for word in PARTS[i])])
    assert isinstance(command, Features)
    assert set(command.images) == {"a.jpg", "b.jpg"}
    assert command.images == (("a.jpg", "b.jpg") if order.index(2) < order.index(4) else ("b.jpg", "a.jpg"))
    assert (command.resolution, command.output, command.pca) == ((378, 378), Path("out"), True)
    assert command.adaptors == ("clip",)


@pytest.mark.parametrize(
    ("words", "resolution", "images"),
    [
        (["--resolution", "378", "x.jpg"], (378,), ("x.jpg",)),
        (["x.jpg", "--resolution", "378"], (378,), ("x.jpg",)),
        (["--resolution", "378", "512", "600"], (378, 512), ("600",)),  # the third number is a path
        (["--resolution=378x512", "x.jpg"], (378, 512), ("x.jpg",)),
        (["--resolution", "378x512", "x.jpg", "y.jpg"], (378, 512), ("x.jpg", "y.jpg")),
        (["--resolution", "378", "--", "512"], (378,), ("512",)),
        (["--", "-odd-name.jpg"], (), ("-odd-name.jpg",)),
        (["x.jpg"], (), ("x.jpg",)),
    ],
)
def test_sizes_and_paths(words: list[str], resolution: tuple[int, ...], images: tuple[str, ...]) -> None:
    command = parse(["features", "-o", "out", *words])
    assert (command.resolution, command.images) == (resolution, images)


@pytest.mark.parametrize(
    "words",
    [
        ["features", "a.jpg", "-o", "out", "--resolution", "big"],
        ["features", "a.jpg", "-o", "out", "--resolution", "0"],
        ["features", "a.jpg", "-o", "out", "--resolution"],
        ["features", "a.jpg", "-o", "out", "--reslution", "3"],
        ["features", "a.jpg"],
        ["feature", "a.jpg"],
        ["convert", "a", "b", "--to", "tensorflow"],
    ],
)
def test_wrong_usage_is_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse(words)
    assert raised.value.code == 2
    capsys.readouterr()


def test_a_wrong_option_is_answered_with_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["features", "a.jpg", "-o", "out", "--reslution", "3"])
    assert "--resolution" in capsys.readouterr().err


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name, kind in COMMANDS.items():
        with pytest.raises(SystemExit) as raised:
            parse([name, "--help"])
        assert raised.value.code == 0
        assert (kind.__doc__ or "").splitlines()[0][:40] in capsys.readouterr().out


def test_table_aligns_numbers_right_and_text_left() -> None:
    assert table(["name", "n"], [["a", "5"], ["longer", "10.5"]]) == (
        "name       n\n------  ----\na          5\nlonger  10.5"
    )


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 1024**3, "5.0 GiB")])
def test_sizes_for_people(count: int, text: str) -> None:
    assert size_of(count) == text
