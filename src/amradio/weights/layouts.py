"""The file layouts, and which one a path is in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from amradio.errors import LayoutError, OptionError, nearest_names
from amradio.weights import huggingface, native, official, pretrained, timm, transformers_native
from amradio.weights.checkpoint import Checkpoint
from amradio.weights.tensorfiles import CONFIG, config_of, is_safetensors, read_header

_SHOWN = 6


class Layout(Protocol):
    """What every layout module has."""

    NAME: str

    def matches(self, path: Path) -> bool:
        """Whether a path is in this layout, by names and headers; nothing is unpickled."""
        ...

    def read(self, path: Path) -> Checkpoint:
        """Read a checkpoint."""
        ...

    def write(self, checkpoint: Checkpoint, path: Path, *, backbone_only: bool = False) -> Path:
        """Write a checkpoint; returns the path."""
        ...


LAYOUTS: Mapping[str, Layout] = {
    module.NAME: module for module in (native, official, huggingface, transformers_native, timm, pretrained)
}
"""Every layout by name."""

UNDERSTOOD = """\
  native: a .safetensors file written by amradio
  official: a .pth.tar file with 'state_dict' and 'args'
  huggingface: a directory with a config.json that has 'args', and model.safetensors
  transformers: a directory saved by transformers' RadioModel, with model_type 'radio' in its config.json
  timm: a .safetensors file, or a directory with it, of a C-RADIO model of timm
  pretrained: a directory saved by AmradioModel.save_pretrained, with model_type 'amradio' in its config.json"""


def layout_of(name: str) -> Layout:
    """A layout by its name.

    Args:
        name: ``native``, ``official``, ``huggingface``, ``transformers``, ``timm`` or ``pretrained``.

    Returns:
        The layout.

    Raises:
        OptionError: There is no such layout.
    """
    if name not in LAYOUTS:
        raise OptionError(f"Unknown layout {name!r}. {nearest_names(name, LAYOUTS)} Choose from: {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]


def detect(path: Path) -> Layout:
    """Find out which layout a path is in, without unpickling anything.

    Args:
        path: A file or directory.

    Returns:
        Its layout.

    Raises:
        LayoutError: There is nothing there, or it is in no layout that amradio reads.
        CheckpointError: It is a safetensors file that is truncated or damaged.
    """
    if not path.exists():
        raise LayoutError(f"{path} does not exist.")
    for layout in LAYOUTS.values():
        if layout.matches(path):
            return layout
    raise LayoutError(
        f"{path} is in no layout that amradio reads: it is {_found(path)}.\nUnderstood are:\n{UNDERSTOOD}"
    )


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint in whatever layout it is.

    Args:
        path: A file or directory.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: It is in no known layout, unsafe, damaged or inconsistent.
        ConfigError: It describes a model that amradio does not have.
    """
    return detect(path).read(path)


def _found(path: Path) -> str:
    if path.is_dir():
        config = config_of(path)
        if config:
            facts = {k: config[k] for k in ("architectures", "model_type", "architecture") if k in config}
            return f"a directory whose {CONFIG} has {facts or sorted(config)[:_SHOWN]}"
        names = sorted(p.name for p in path.iterdir())
        return f"a directory without a readable {CONFIG}, with {names[:_SHOWN] or 'no files'}"
    if not is_safetensors(path) and path.suffix != ".safetensors":
        return f"a file of {path.stat().st_size:,} bytes that is neither safetensors nor a torch.save file"
    names = sorted(read_header(path).shapes)
    if any(name.startswith("radio_model.") for name in names) and (path.parent / CONFIG).is_file():
        return f"the weights of a Hugging Face directory, without its {CONFIG}: pass the directory {path.parent}"
    return f"a safetensors file with tensors {names[:_SHOWN]}"
