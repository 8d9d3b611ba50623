"""Options that several commands share, and what they become: devices, precisions, models, progress bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from amradio.errors import OptionError

if TYPE_CHECKING:
    from amradio.backbones.protocol import Backbone
    from amradio.distributed import Group
    from amradio.features import ExtractOptions

_SHOWN_FAILURES = 10
_EXPORTED = ("onnx:", "aoti:")
_OTHER_OPTIONS = {
    "adaptor": "--adaptor or --adaptors",
    "device": "--device",
    "dtype": "--dtype",
    "revision": "--revision",
    "cache_dir": "--cache-dir",
    "local_files_only": "--offline",
    "vitdet_window_size": "--vitdet-window-size",
    "position_interpolation": "--position-interpolation",
    "progress": "no option at all",
    "spec": "the model itself",
}
"""What is given otherwise than by ``--model-option``."""

DEFAULT_MODEL = "amradio-tiny"
"""What commands run where no model is named: it comes with the package, so that they work offline."""


@dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """How a backbone is loaded. A base class of commands: each field is an option."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Cast the model; auto keeps the published dtype."""
    vitdet_window_size: int | None = None
    """Side in patches of ViTDet attention windows."""
    position_interpolation: Literal["half_pixel", "align_corners", "published", "torch_hub"] | None = None
    """How the position grid is resized; default as the official code does today."""
    revision: str | None = None
    """Branch, tag or commit of a model's Hugging Face repository."""
    cache_dir: Path | None = None
    """Where downloads are kept."""
    offline: bool = False
    """Never use the network."""
    model_option: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE: what only this kind of backbone knows, such as stride=16 (efficientnet-lite0) or
    trust_remote_code=true (torchhub:). Repeat the option for several."""

    def load_backbone(self, spec: str, adaptor: str | None, device: Any, *, progress: bool) -> Backbone:
        """Load a backbone onto a device.

        Args:
            spec: See `amradio.load_backbone`.
            adaptor: Whose output is wanted; None for the backbone's.
            device: A `torch.device`.
            progress: Whether downloads show a bar.
        """
        from amradio.backbones.dispatch import load_backbone

        only_radio: dict[str, Any] = {
            "vitdet_window_size": self.vitdet_window_size,
            "position_interpolation": self.position_interpolation,
        }
        return load_backbone(
            spec,
            adaptor=adaptor,
            device=device,
            dtype=dtype_of(self.dtype),
            revision=self.revision,
            cache_dir=self.cache_dir,
            local_files_only=self.offline,
            progress=progress,
            **{name: value for name, value in only_radio.items() if value is not None},
            **self._own_options(),
        )

    def _own_options(self) -> dict[str, Any]:
        """The keywords of ``--model-option``.

        Raises:
            OptionError: One has an option of its own, or is not of the form NAME=VALUE.
        """
        found = options_of(self.model_option)
        if given := [name for name in found if name in _OTHER_OPTIONS]:
            raise OptionError(
                f"--model-option {given[0]}=... is for what only one kind of backbone knows; {given[0]} is given by "
                f"{_OTHER_OPTIONS[given[0]]}."
            )
        return found

    def load_model(self, spec: str, adaptors: Sequence[str], device: Any, *, progress: bool) -> Any:
        """Load a backbone, or a RADIO model with the outputs of several adaptors, onto a device.

        Args:
            spec: See `amradio.load_backbone`.
            adaptors: Whose outputs are wanted besides the backbone's; only RADIO, and files exported from it, have any.
            device: A `torch.device`.
            progress: Whether downloads show a bar.

        Raises:
            OptionError: The model has no adaptors, or options do not go together.
            UnknownAdaptorError: It has others.
        """
        if not adaptors:
            return self.load_backbone(spec, None, device, progress=progress)
        if spec.startswith(_EXPORTED):
            exported: Any = self.load_backbone(spec, None, device, progress=progress)
            return exported.with_adaptors(adaptors)
        from amradio.backbones.dispatch import is_radio

        if not is_radio(spec):
            raise OptionError(f"{spec} has no adaptors ({', '.join(adaptors)}); only RADIO models have.")
        if self.model_option:
            raise OptionError(f"--model-option {self.model_option[0]} does not go with adaptors of a RADIO model.")
        from amradio.backbones.load import load

        return load(
            spec.removeprefix("radio:"),
            adaptors,
            vitdet_window_size=self.vitdet_window_size,
            device=device,
            dtype=dtype_of(self.dtype),
            position_interpolation=self.position_interpolation,
            revision=self.revision,
            cache_dir=self.cache_dir,
            local_files_only=self.offline,
            progress=progress,
        )


@dataclass(frozen=True, kw_only=True)
class PictureOptions(BackboneOptions):
    """How many pictures go through a backbone. A base class of commands: each field is an option."""

    mode: Literal["auto", "shortest", "longest", "crop", "exact", "nearest"] = "auto"
    """How a resolution is meant; auto: one number is the shortest side, two numbers are a centre crop."""
    resize_multiple: int | None = None
    """What sides are rounded to multiples of, in pixels; default what the model needs."""
    autocast: Literal["off", "bfloat16", "float16"] = "off"
    """Compute in mixed precision."""
    compile: bool = False
    """Compile the model with torch.compile."""
    decode: Literal["full", "draft"] = "full"
    """draft decodes large JPEGs at a fraction of their size: faster, and not quite the same."""
    resizer: Literal["pillow", "torch"] = "pillow"
    """torch resizes faster; equal up to rounding."""
    batch_size: int = 32
    """Most pictures in one forward pass; halved by itself when memory runs out."""
    workers: int | None = None
    """Decoding threads; default one for each CPU core, up to 8."""
    max_failed: float = 0.0
    """Share of pictures that may fail, from 0 to 1, before the exit code is 3."""

    def extract_options(self, device: Any) -> ExtractOptions:
        """The options of the engine.

        Args:
            device: A `torch.device`: where the model is.
        """
        from amradio.features import ExtractOptions

        return ExtractOptions(
            batch_size=self.batch_size,
            workers=self.workers,
            device=device,
            autocast=dtype_of(self.autocast),
            compile=self.compile,
            decode=self.decode,
            resizer=self.resizer,
        )


def device_of(name: str) -> Any:
    """The `torch.device` of the option ``--device``.

    Raises:
        OptionError: There is no such device.
    """
    import torch

    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise OptionError(f"--device {name!r} is no device: {str(e).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            f"--device {name!r}: this torch ({torch.__version__}) sees no GPU. `amradio doctor` shows the devices."
        )
    return device


def dtype_of(name: str) -> Any:
    """The `torch.dtype` of an option; None for ``auto`` and ``off``."""
    import torch

    return None if name in ("auto", "off") else getattr(torch, name)


def options_of(words: Sequence[str]) -> dict[str, Any]:
    """The keywords in words NAME=VALUE; values as in YAML: numbers, true, false, null, [1, 2], or text.

    Raises:
        OptionError: A word is not of this form.
    """
    import yaml

    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        try:
            found[name.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals or not name.strip().replace("-", "_").isidentifier():
            raise OptionError(f"--model-option {word!r} must be NAME=VALUE, such as stride=16.")
    return found


def check_counts(**counts: int | None) -> None:
    """Refuse numbers of pictures below 1.

    Args:
        **counts: By the name of the option; None where it is not given.

    Raises:
        OptionError: One is below 1.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise OptionError(f"--{name.replace('_', '-')} must be at least 1, got {count}.")


def check_share(name: str, share: float) -> None:
    """Refuse what is no share from 0 to 1.

    Args:
        name: Of the option.
        share: Its value.

    Raises:
        OptionError: It is outside.
    """
    if not 0 <= share <= 1:
        raise OptionError(f"--{name.replace('_', '-')} is a share from 0 to 1, got {share:g}.")


def split_names(words: Sequence[str]) -> list[str]:
    """The names in an option that may be repeated, and may hold several names with commas between them."""
    return [name for word in words for name in word.split(",") if name]


@contextmanager
def first_on_machine(group: Group | None) -> Iterator[None]:
    """Let the first process of each machine go first: what it downloads, the others find."""
    if group is not None and group.local_rank != 0:
        group.barrier()
    yield
    if group is not None and group.local_rank == 0:
        group.barrier()


def print_failures(failures: Sequence[Mapping[str, Any]], count: int) -> None:
    """Say on standard error which pictures failed.

    Args:
        failures: With ``path`` and ``reason``; the first ones are shown.
        count: Of all.
    """
    for failure in failures[:_SHOWN_FAILURES]:
        print(f"failed: {failure['path']}: {failure['reason']}", file=sys.stderr)
    if count > _SHOWN_FAILURES:
        print(f"failed: {count - _SHOWN_FAILURES} more, all in the index", file=sys.stderr)


def exit_code(count: int, failed: int, max_failed: float) -> int:
    """0, 1 if no picture worked, or 3 if a larger share failed than was allowed."""
    return 1 if failed == count else 3 if failed > max_failed * count else 0


@contextmanager
def progress_bar(total: int, what: str, *, enabled: bool = True) -> Iterator[Callable[[int], object]]:
    """Show a progress bar on standard error.

    Args:
        total: Pictures.
        what: Stands before the bar.
        enabled: Whether it is shown.

    Yields:
        A function that advances the bar by a number of pictures.
    """
    from tqdm import tqdm

    with tqdm(total=total, unit="image", desc=what, disable=not enabled, file=sys.stderr) as bar:
        yield bar.update
