"""The exception tree.

Every error of amradio derives from `AmradioError` and says what happened, the evidence, and what to do.
Where Python or the official code already had a type for the situation, that type is a second base, so that
existing ``except ValueError`` code keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence


class AmradioError(Exception):
    """Base of every error that amradio raises on purpose."""


class OptionError(AmradioError, ValueError):
    """An option has a value that it cannot have."""


class ConfigError(AmradioError, ValueError):
    """A model description is inconsistent, incomplete or unknown."""


class ResolutionError(AmradioError, ValueError):
    """An image size that the model cannot process; the message names the nearest one that it can."""


class CapabilityError(AmradioError, TypeError):
    """The model is asked for something that its kind does not have."""


class UnknownModelError(AmradioError, ValueError):
    """No published model, file or directory has this name."""


class UnknownAdaptorError(AmradioError, ValueError):
    """The checkpoint has no adaptor of this name."""


class MissingDependencyError(AmradioError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""


class CheckpointError(AmradioError, ValueError):
    """A checkpoint cannot be read, understood or written."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle wants to import something that is not on the allow-list. Nothing was executed."""


class LayoutError(CheckpointError):
    """A file layout is not recognised, or cannot hold this model."""


class CheckpointKeyError(CheckpointError, KeyError):
    """Tensors are missing from a checkpoint, or it has tensors that no part of the model reads."""

    __str__ = Exception.__str__  # KeyError would print the repr of the message, on one line


class CheckpointShapeError(CheckpointError):
    """A tensor's shape contradicts the description in the same checkpoint."""


class DownloadError(AmradioError, OSError):
    """A file could not be fetched."""


class IntegrityError(DownloadError):
    """A file's content is not what its recorded digest says."""


class OfflineError(DownloadError):
    """A file is not in the cache and offline mode forbids fetching it."""


class GatedRepoError(DownloadError):
    """The repository needs an access token, or its licence must be accepted first."""


class ImageError(AmradioError, ValueError):
    """A file is not a picture that can be decoded safely and completely."""


class DatasetError(AmradioError, ValueError):
    """A set of pictures cannot be found, read or understood."""


class NonFiniteLossError(AmradioError, FloatingPointError):
    """The loss of a training step, or its gradient, is no number. The weights were not changed by the step.

    Attributes:
        step: From 0.
        ids: Of the pictures of this process, by partition.
        losses: Over all processes.
    """

    def __init__(self, message: str, step: int, ids: Mapping[str, Sequence[str]], losses: Mapping[str, float]) -> None:
        super().__init__(message)
        self.step, self.ids, self.losses = step, dict(ids), dict(losses)


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> str:
    """Say which known names are closest to a wrong one.

    Args:
        name: The unknown name.
        known: The valid names.
        count: How many suggestions at most.

    Returns:
        A sentence such as ``"Nearest names: a, b."``, or all names when nothing is close.
    """
    names = list(known)
    by_lower = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=count, cutoff=0.4)
    if close:
        return f"Nearest names: {', '.join(by_lower[c] for c in close)}."
    return f"Known names: {', '.join(names)}." if names else "There are no known names."
