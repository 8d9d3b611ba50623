"""From a YAML file to a run: strictly, so that a misspelt setting can never be ignored."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from amradio.distill.config.run import DistillConfig
from amradio.errors import ConfigError, OptionError, nearest_names
from amradio.models.configs import from_json

SUFFIX = ".yaml"
_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")

T = TypeVar("T")


def config_names() -> list[str]:
    """The names of the configurations that the package carries, sorted."""
    folder = resources.files("amradio") / "configs"
    return sorted(f.name.removesuffix(SUFFIX) for f in folder.iterdir() if f.name.endswith(SUFFIX))


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> DistillConfig:
    """Read a configuration.

    Args:
        name_or_path: One of `config_names`, or a path that ends in ``.yaml``.
        overrides: Settings such as ``schedule.steps=100`` or ``teachers.0.weight=2``; values are YAML.

    Returns:
        The configuration.

    Raises:
        OptionError: There is no such configuration, or an override names no setting.
        ConfigError: The file is not YAML, or a setting is unknown, missing or has an impossible value.
    """
    import yaml

    text = _text_of(name_or_path)
    try:
        data = _parsed_yaml(text)
        settings = [(key, _parsed_yaml(value)) for key, value in map(_split_override, overrides)]
    except yaml.YAMLError as e:
        raise ConfigError(f"{name_or_path} is not YAML: {e}") from e
    if not isinstance(data, dict):
        raise ConfigError(f"{name_or_path} must hold settings by name, got {type(data).__name__}.")
    for key, value in settings:
        _override(data, key, value)
    return parse_config(data, name_or_path)


def parse_config(data: Mapping[str, Any], where: str = "config") -> DistillConfig:
    """Build a configuration from nested mappings, strictly.

    Args:
        data: What a YAML file holds.
        where: Name in messages.

    Raises:
        ConfigError: A setting is unknown, missing or has an impossible value.
    """
    return parse_strictly(DistillConfig, data, where)


def parse_strictly(kind: type[T], data: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from nested mappings; a misspelt key is an error that names the nearest known ones.

    Args:
        kind: The dataclass.
        data: Its fields.
        where: Name in messages.

    Raises:
        ConfigError: A setting is unknown, missing or has an impossible value.
    """
    for problem in _unknown_keys(kind, data, ""):
        raise ConfigError(f"{where}: {problem}")
    try:
        return from_json(kind, data, "")
    except ConfigError as e:
        raise ConfigError(f"{where}: {str(e).removeprefix('.').removeprefix(': ')}") from e


def _parsed_yaml(text: str) -> Any:
    """YAML in which ``1e-3`` is a number, as everybody expects; YAML 1.1 wants a dot in it."""
    import yaml

    class Loader(yaml.SafeLoader):
        """A safe loader of our own, so that no other user of the library is affected."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
    return yaml.load(text, Loader)


def _text_of(name_or_path: str) -> str:
    path = Path(name_or_path).expanduser()
    if path.suffix == SUFFIX or path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except OSError as e:
            raise OptionError(f"The configuration {path} cannot be read: {e.strerror}.") from e
    names = config_names()
    if name_or_path not in names:
        raise OptionError(
            f"There is no configuration {name_or_path!r}. {nearest_names(name_or_path, names)} A file of your own must "
            f"end in {SUFFIX}."
        )
    return (resources.files("amradio") / "configs" / f"{name_or_path}{SUFFIX}").read_text(encoding="utf-8")


def _split_override(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise OptionError(f"A setting is written KEY=VALUE, such as schedule.steps=100, got {word!r}.")
    return key, value


def _override(data: Any, key: str, value: Any) -> None:
    """Set ``a.b.0.c``; mappings on the way are made, lists must be long enough."""
    *parents, last = key.split(".")
    for part in parents:
        data = data.setdefault(part, {}) if isinstance(data, dict) else _item(data, part, key)
    if isinstance(data, list):
        _item(data, last, key)
        data[int(last)] = value
    elif isinstance(data, dict):
        data[last] = value
    else:
        raise OptionError(f"{key} cannot be set: what is before {last!r} has no settings.")


def _item(data: Any, part: str, key: str) -> Any:
    if not isinstance(data, list) or not part.isdigit() or int(part) >= len(data):
        what = f"a list of {len(data)}" if isinstance(data, list) else "no list"
        raise OptionError(f"{key} cannot be set: {part!r} is no position in {what}.")
    return data[int(part)]


def _unknown_keys(hint: Any, data: Any, where: str) -> Iterator[str]:
    """What is misspelt, at any depth."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [a for a in typing.get_args(hint) if a is not type(None)]
        hint = kinds[0] if len(kinds) == 1 else Any
    if typing.get_origin(hint) is tuple and isinstance(data, (list, tuple)):
        for i, item in enumerate(data):
            yield from _unknown_keys(typing.get_args(hint)[0], item, f"{where}.{i}" if where else str(i))
    if not dataclasses.is_dataclass(hint) or not isinstance(data, Mapping):
        return
    hints = typing.get_type_hints(hint)
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in hints:
            yield f"There is no setting {path!r}. {nearest_names(str(key), hints)}"
        else:
            yield from _unknown_keys(hints[key], value, path)
