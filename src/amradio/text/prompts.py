"""Prompt templates and class names: the words of zero-shot classification."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from amradio.errors import OptionError

TEMPLATE_SETS = ("openai", "simple", "base")
"""Sets of templates that the package carries: CLIP's 80, 7 of them, and one."""

IMAGENET = "imagenet"
"""Name of the list of ImageNet-1k's classes that the package carries."""

_PLACEHOLDERS = ("{class}", "{}")


def load_templates(name_or_path: str) -> tuple[str, ...]:
    """Read a set of prompt templates.

    Args:
        name_or_path: One of `TEMPLATE_SETS`, or the path of a text file with a template a line.

    Returns:
        Texts with ``{}`` or ``{class}`` where the name of a class goes; see `fill`.

    Raises:
        OptionError: There is no such set or file, it is empty, or a template has no place for the name.
    """
    if name_or_path in TEMPLATE_SETS:
        return tuple(_packaged(f"{name_or_path}.txt"))
    lines = [line for line in _lines(_read(name_or_path, ", ".join(TEMPLATE_SETS), "templates")) if line]
    check_templates(lines, name_or_path)
    return tuple(lines)


def load_class_names(name_or_path: str) -> tuple[str, ...]:
    """Read the names of classes in the order of their labels.

    Args:
        name_or_path: ``imagenet`` for open_clip's names of the 1000 classes of ImageNet-1k, the path of a text file
            with a name a line, or of a JSON file with a list.

    Returns:
        The names.

    Raises:
        OptionError: There is no such file, it is empty, or a name is.
    """
    if name_or_path == IMAGENET:
        return tuple(_packaged("imagenet_classes.txt"))
    text = _read(name_or_path, IMAGENET, "class names")
    lines = _json_list(text, name_or_path) if name_or_path.lower().endswith(".json") else _lines(text)
    empty = next((i for i, line in enumerate(lines) if not line), None)
    if empty is not None or not lines:
        where = "" if empty is None else f": name {empty}, counted from 0, is empty, and each name stands for a label"
        raise OptionError(f"{name_or_path} is no list of class names{where}.")
    return tuple(lines)


def check_templates(templates: Sequence[str], source: str = "templates") -> None:
    """Refuse templates that cannot be filled in.

    Args:
        templates: The templates.
        source: Where they came from, for the message.

    Raises:
        OptionError: There is none, or one has no place for the name.
    """
    if not templates:
        raise OptionError(f"{source} has no templates. A template is a line such as: a photo of a {{}}.")
    for template in templates:
        if not any(p in template for p in _PLACEHOLDERS):
            raise OptionError(
                f"The template {template!r} of {source} has no place for the name of a class: write {{}} or {{class}}."
            )


def fill(template: str, name: str) -> str:
    """Put the name of a class into a template; other braces, in either of them, are left alone."""
    placeholder = next(p for p in _PLACEHOLDERS if p in template)
    return name.join(template.split(placeholder))


def prompts(templates: Iterable[str], name: str) -> list[str]:
    """All prompts of a class, in the order of the templates."""
    return [fill(template, name) for template in templates]


def _packaged(name: str) -> list[str]:
    return (resources.files("amradio.text") / "data" / name).read_text(encoding="utf-8").splitlines()


def _read(path: str, known: str, what: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise OptionError(f"There are no {what} {path!r}: neither a file nor a known name ({known}).") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not a text file in UTF-8: {error}.") from error


def _lines(text: str) -> list[str]:
    """Lines without white space at their ends, and without empty lines at the end of the text."""
    return [line.strip() for line in text.rstrip().split("\n")]


def _json_list(text: str, path: str) -> list[str]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise OptionError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise OptionError(f"{path} must be a JSON list of texts, the name of each label from 0.")
    return [v.strip() for v in values]
