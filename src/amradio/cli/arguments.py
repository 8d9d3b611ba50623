"""Option types, and an order of words in which no option can swallow a path.

``--resolution 378 378 photo.jpg``, ``photo.jpg --resolution 378`` and ``--resolution 378 -o out photo.jpg`` all mean
what they look like: `normalise` knows how many values each option takes, and moves positional words to the end.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec


def _parse_size(words: Sequence[str]) -> tuple[int, ...]:
    parts = words[0].lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"expected one side, or height and width, in pixels, got {words[0]!r}")
    return tuple(int(p) for p in parts)


_SIZE = PrimitiveConstructorSpec(
    nargs=1,
    metavar="SIDE | HEIGHT WIDTH",
    instance_from_str=_parse_size,
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: ["x".join(map(str, value))],
)

Size = Annotated[tuple[int, ...], _SIZE]
"""One or two whole numbers: ``--resolution 378``, ``--resolution 378 378`` or ``--resolution 378x378``."""


def normalise(words: Sequence[str], command: type[Any]) -> list[str]:
    """Put options first and positional words last, each option with the values that belong to it.

    A command with commands of its own (``eval knn``) begins with the inner command's name; the rest is the inner one's.

    Args:
        words: The words after the command's name.
        command: The command's dataclass.

    Returns:
        The same words in an order that argparse cannot misread; the two values of a size are joined into one word.
    """
    inner = _inner_commands(command)
    if inner:
        known = bool(words) and words[0] in inner
        return [words[0], *normalise(words[1:], inner[words[0]])] if known else list(words)
    takes = _values_taken(command)
    options: list[str] = []
    positional: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            positional += rest
            break
        if not word.startswith("-") or word == "-":
            positional.append(word)
            continue
        options.append(word)
        if "=" in word:
            continue
        kind = takes.get(word.replace("_", "-"))
        if kind == "size":
            numbers = [rest.pop(0)] if rest and not rest[0].startswith("-") else []
            if numbers and numbers[0].isdigit() and rest and rest[0].isdigit():
                numbers.append(rest.pop(0))
            if numbers:
                options.append("x".join(numbers))
        elif kind == "value" and rest:
            options.append(rest.pop(0))
    return options + (["--", *positional] if any(p.startswith("-") for p in positional) else positional)


def _inner_commands(command: type[Any]) -> dict[str, type[Any]]:
    """The commands of a command by name: the members of a field whose type is a union of dataclasses."""
    hints = typing.get_type_hints(command, include_extras=True)
    found: dict[str, type[Any]] = {}
    for field in dataclasses.fields(command):
        for member in typing.get_args(hints[field.name]):
            kind = _bare(member)
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                found |= {e.name: kind for e in _extras(member) if hasattr(e, "prefix_name")}
    return found


def _values_taken(command: type[Any]) -> dict[str, str]:
    """For each option word of a command: ``flag``, ``value`` or ``size``."""
    hints = typing.get_type_hints(command, include_extras=True)
    taken: dict[str, str] = {}
    for field in dataclasses.fields(command):
        hint = hints[field.name]
        extras = _extras(hint)
        kind = "size" if _SIZE in extras else "flag" if _bare(hint) is bool else "value"
        renamed = next((e.name for e in extras if getattr(e, "name", None)), field.name)
        names = ["--" + renamed.replace("_", "-"), *(a for e in extras for a in getattr(e, "aliases", None) or ())]
        taken |= dict.fromkeys(names, kind)
    return taken


def _extras(hint: Any) -> list[Any]:
    """All annotations inside a type."""
    found = list(getattr(hint, "__metadata__", ()))
    for inner in typing.get_args(hint):
        found += _extras(inner)
    return found


def _bare(hint: Any) -> Any:
    return _bare(hint.__origin__) if hasattr(hint, "__metadata__") else hint
