"""What this room takes from ``transformers``, with stand-ins where it is not installed.

Classes here derive from classes of an optional package. So that their modules can be imported without it, a name that
cannot be had becomes a stand-in, which complains when it is used and not before.
"""

from __future__ import annotations

import importlib
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
        f"The Hugging Face classes need the package transformers, which cannot be imported: {error}. Install it with "
        f"`pip install 'amradio[hf]'`."
    )


def is_available() -> bool:
    """Whether transformers can be imported."""
    try:
        importlib.import_module("transformers")
    except ImportError:
        return False
    return True


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
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

    return type(name, (), {"__init__": refuse})
