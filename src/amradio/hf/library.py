"""What this room takes from ``transformers``, with stand-ins where it is not installed.

Classes here derive from classes of an optional package. So that their modules can be imported without it, a name that
cannot be had becomes a stand-in, which complains when it is used and not before.
"""

from __future__ import annotations

import importlib
import re
from typing import Any, NoReturn, TypedDict

from amradio.errors import MissingDependencyError

_HOMES = {
    "BackboneConfigMixin": "transformers.backbone_utils",
    "BackboneMixin": "transformers.backbone_utils",
    "BackboneOutput": "transformers.modeling_outputs",
    "BaseModelOutputWithPooling": "transformers.modeling_outputs",
    "BatchFeature": "transformers",
    "ImagesKwargs": "transformers.processing_utils",
    "ModelOutput": "transformers.utils",
    "OutputRecorder": "transformers.utils.output_capturing",
    "PilBackend": "transformers.image_processing_backends",
    "PreTrainedConfig": "transformers",
    "PreTrainedModel": "transformers",
    "capture_outputs": "transformers.utils.output_capturing",
}


MINIMUM = "5.13"
"""The first version of transformers that has all of these."""


class _NoKwargs(TypedDict):
    """Stands for ``ImagesKwargs``."""


def missing(error: ImportError) -> MissingDependencyError:
    """The error for a package that is not there.

    Args:
        error: What Python says of it.

    Returns:
        An error that names the extra.
    """
    return MissingDependencyError(
        f"The Hugging Face classes need the package transformers, {MINIMUM} or newer, which cannot be imported: "
        f"{error}. Install it with `pip install -U 'amradio[hf]'`."
    )


def require() -> None:
    """Refuse to go on without transformers, or with one that is too old.

    Raises:
        MissingDependencyError: The message names the extra and the version.
    """
    try:
        _import("transformers")
    except ImportError as e:
        raise missing(e) from e


def is_available() -> bool:
    """Whether transformers can be imported, and is new enough."""
    try:
        _import("transformers")
    except ImportError:
        return False
    return True


def is_too_old() -> bool:
    """Whether there is a transformers, which is too old."""
    try:
        return _is_old(importlib.import_module("transformers"))
    except ImportError:
        return False


def _import(module: str) -> Any:
    """A module of transformers.

    Raises:
        ImportError: There is none, or not in a version that is new enough.
    """
    transformers = importlib.import_module("transformers")
    if _is_old(transformers):
        raise ImportError(f"version {transformers.__version__} is installed")
    return importlib.import_module(module)


def _is_old(transformers: Any) -> bool:
    """Whether a version is below `MINIMUM`; what comes after the first two numbers does not matter."""
    found, least = (re.findall(r"\d+", version)[:2] for version in (transformers.__version__, MINIMUM))
    return [int(number) for number in found] < [int(number) for number in least]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(_import(_HOMES[name]), name)
    except ImportError as e:
        return _stand_in(name, e)


def _stand_in(name: str, error: ImportError) -> Any:
    """Something to derive from, or to decorate with, that cannot be put to use."""
    if name == "capture_outputs":
        return lambda **_: lambda forward: forward
    if name == "OutputRecorder":  # an entry of a table that nothing reads
        return lambda *_, **__: None
    if name == "ImagesKwargs":  # only types, to derive more of them from
        return _NoKwargs

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise missing(error) from error

    return _StandIn(name, (), {"__init__": refuse, "error": error})


class _StandIn(type):
    """Kind of the classes that stand for those of transformers: their public class methods complain too."""

    error: ImportError

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")
        raise missing(cls.error) from cls.error
