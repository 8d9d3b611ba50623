"""Templates and class names: the lists are those of the published protocols, files are read as they are meant."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amradio.errors import OptionError
from amradio.text.prompts import TEMPLATE_SETS, check_templates, fill, load_class_names, load_templates, prompts


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("openai", 80, "a bad photo of a {}.", "a tattoo of the {}."),
        ("simple", 7, "itap of a {}.", "a photo of the small {}."),
        ("base", 1, "an image of a {class}.", "an image of a {class}."),
    ],
)
def test_the_sets_of_templates(name: str, count: int, first: str, last: str) -> None:
    templates = load_templates(name)
    assert (len(templates), templates[0], templates[-1]) == (count, first, last)
    assert len(set(templates)) == count
    check_templates(templates)


def test_the_simple_templates_are_among_the_eighty() -> None:
    assert set(load_templates("simple")) <= set(load_templates("openai"))


def test_the_names_of_imagenet() -> None:
    names = load_class_names("imagenet")
    assert len(names) == 1000
    assert (names[0], names[1], names[134], names[517], names[999]) == (
        "tench",
        "goldfish",
        "crane bird",
        "construction crane",
        "toilet paper",
    )
    assert [i for i, n in enumerate(names) if names.count(n) > 1] == [657, 744, 836, 837]


@pytest.mark.parametrize(
    ("lines", "digest"),
    [
        (load_class_names("imagenet"), "571ae1c583b4be7da87519494c52bf405a46af05d5815627c7a0dee997068b60"),
        (load_templates("openai"), "4f976686fb651bb5803d4689dcd849f75efe0ef19a3c801355bc9a6f03c8a5af"),
    ],
)
def test_not_a_letter_changes(lines: tuple[str, ...], digest: str) -> None:
    # Of the lists of open_clip 3.3.0, joined by line breaks.
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


def test_the_lists_say_where_they_come_from() -> None:
    text = (resources.files("amradio.text") / "data" / "README.md").read_text(encoding="utf-8")
    assert "Permission is hereby granted, free of charge" in text
    assert all(f"`{name}.txt`" in text for name in (*TEMPLATE_SETS, "imagenet_classes"))


def test_filling_in() -> None:
    assert fill("a photo of a {}.", "great white shark") == "a photo of a great white shark."
    assert fill("a {class}, a {class}", "cat") == "a cat, a cat"
    assert prompts(["a {}", "the {class}"], "dog") == ["a dog", "the dog"]


@given(st.text(), st.text(), st.text())
def test_names_are_put_in_as_they_are(before: str, name: str, after: str) -> None:
    before, after = (t.replace("{", "").replace("}", "") for t in (before, after))
    assert fill(f"{before}{{}}{after}", name) == before + name + after
    assert fill(f"{before}{{class}}{after}", name) == before + name + after


def test_files(tmp_path: Path) -> None:
    templates = tmp_path / "templates.txt"
    templates.write_text("\ufeffa drawing of a {}.\n\n  my {class}\n", encoding="utf-8")
    assert load_templates(str(templates)) == ("a drawing of a {}.", "my {class}")
    (tmp_path / "names.txt").write_text("cat\nice cream \n\n", encoding="utf-8")
    assert load_class_names(str(tmp_path / "names.txt")) == ("cat", "ice cream")
    (tmp_path / "names.json").write_text('["cat", "Müller\\u2028gnat"]', encoding="utf-8")
    assert load_class_names(str(tmp_path / "names.json")) == ("cat", "Müller\u2028gnat")


def test_wrong_templates(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    with pytest.raises(OptionError, match=r"There are no templates '.*t.txt': neither a file nor .* \(openai, sim"):
        load_templates(str(path))
    path.write_text("a photo of a cat\n")
    with pytest.raises(OptionError, match=r"'a photo of a cat' of .*t.txt has no place for the name of a class: write"):
        load_templates(str(path))
    path.write_text("\n")
    with pytest.raises(OptionError, match=r"t.txt has no templates. A template is a line such as: a photo of a \{\}"):
        load_templates(str(path))
    path.write_bytes(b"caf\xe9 {}")
    with pytest.raises(OptionError, match="is not a text file in UTF-8"):
        load_templates(str(path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("n.txt", "cat\n\ndog\n", "n.txt is no list of class names: name 1, counted from 0, is empty"),
        ("n.txt", "", "name 0, counted from 0, is empty"),
        ("n.json", "[]", "n.json is no list of class names.$"),
        ("n.json", '{"0": "cat"}', "n.json must be a JSON list of texts"),
        ("n.json", "[1]", "must be a JSON list of texts"),
        ("n.json", "[", "n.json is not valid JSON"),
    ],
)
def test_wrong_class_names(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(OptionError, match=message):
        load_class_names(str(tmp_path / name))


def test_unknown_class_names() -> None:
    with pytest.raises(OptionError, match=r"There are no class names 'nothing': neither a file nor a known name"):
        load_class_names("nothing")
