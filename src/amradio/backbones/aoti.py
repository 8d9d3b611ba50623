"""Packages of AOTInductor that amradio has written, as backbones.

Such a package is native code for one kind of machine. To load it is to run it, so that must be allowed explicitly; what
it says of itself is read before.
"""

from __future__ import annotations

import json
import platform
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amradio.backbones.exported import ExportedBackbone, ExportInfo, OutputInfo
from amradio.errors import CheckpointError, LayoutError, OptionError, UnknownModelError
from amradio.hub import HubOptions
from amradio.models.output import RadioOutput
from amradio.weights.checkpoint import Identity
from amradio.weights.trust import sha256_of

LAYOUT = "aoti"
METADATA = "extra/amradio.json"
"""Where the description lies in the package, below its only folder."""

_MAX_METADATA_BYTES = 1 << 22


class AotiBackbone(ExportedBackbone):
    """A package of AOTInductor as a backbone.

    Args:
        compiled: What ``torch._inductor.aoti_load_package`` gave.
        info: What the file says of itself.
        identity: Of the file.
        output: Whose summary and features are wanted; default the backbone's.
        hub: How the hub is asked for an adaptor's text side, should a text need it.

    Raises:
        UnknownAdaptorError: There is no such output.
    """

    def __init__(
        self,
        compiled: Any,
        info: ExportInfo,
        identity: Identity,
        output: str | None = None,
        hub: HubOptions | None = None,
    ) -> None:
        super().__init__(info, identity, output, hub)
        self.compiled = [compiled]  # in a list: it is callable, but no part of the module's state

    def _compute(self, images: Tensor, wanted: Sequence[OutputInfo]) -> list[RadioOutput]:
        home = images.device
        tensors = self.compiled[0](images.to(self._device))
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        by_name = {
            output.name: RadioOutput(*pair).to(home) for output, pair in zip(self.info.outputs, pairs, strict=True)
        }
        return [by_name[output.name] for output in wanted]

    @property
    def _device(self) -> torch.device:
        return torch.device(self.info.environment["device"])

    def _check_device(self, device: torch.device) -> None:
        if device.type != self._device.type:
            raise OptionError(
                f"{self.identity.source} was compiled for {self._device.type}, not for {device.type}. Export the model "
                f"again on that device, or leave device out."
            )


def load_aoti(
    name: str, *, hub: HubOptions | None = None, adaptor: str | None = None, trust_remote_code: bool = False
) -> AotiBackbone:
    """Load a package that ``amradio convert --to aoti`` has written.

    Args:
        name: The file.
        hub: How the hub is asked for an adaptor's text side, should a text need it.
        adaptor: The adaptor in the file whose summary and features are wanted instead of the backbone's.
        trust_remote_code: Whether the compiled code in the file may be executed.

    Returns:
        The backbone.

    Raises:
        UnknownModelError: There is no such file.
        LayoutError: amradio did not write the file.
        OptionError: `trust_remote_code` is not given, or the file is for another kind of machine.
        CheckpointError: The file is damaged, or torch cannot load it.
        UnknownAdaptorError: The file has no such adaptor.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise UnknownModelError(f"There is no file {path}. `amradio convert MODEL {path.name} --to aoti` writes one.")
    info = ExportInfo.from_metadata(
        _metadata(path), path, "Load it with torch._inductor.aoti_load_package, and pass a callable to load_backbone."
    )
    info.output(adaptor)
    if not trust_remote_code:
        raise OptionError(
            f"aoti:{name} is compiled code, which runs with all your rights as soon as it is loaded. Pass "
            f"trust_remote_code=True if you trust whoever made it. An ONNX file needs no such trust."
        )
    _check_machine(path, info)
    return AotiBackbone(_loaded(path, info), info, info.identity(path, LAYOUT, sha256_of(path)), adaptor, hub)


def machine(device: torch.device) -> dict[str, str]:
    """What compiled code depends on: the kind of device and what that can compute."""
    if device.type == "cuda":
        found = [".".join(map(str, torch.cuda.get_device_capability(device)))]
    else:
        found = sorted(name for name, there in torch.cpu.get_capabilities().items() if there is True)
    return {"device": device.type, "capability": " ".join([*found, platform.system(), platform.machine()])}


def _metadata(path: Path) -> dict[str, str]:
    """The description in a package; nothing in it is executed. Empty if there is none."""
    try:
        with zipfile.ZipFile(path) as file:
            found = [entry for entry in file.infolist() if entry.filename.endswith(f"/{METADATA}")]
            if not found or found[0].file_size > _MAX_METADATA_BYTES:
                return {}
            metadata = json.loads(file.read(found[0]))
    except (zipfile.BadZipFile, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is no package of AOTInductor, or damaged: {e}.") from e
    return {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}


def _check_machine(path: Path, info: ExportInfo) -> None:
    made = info.environment
    if made.get("device") not in ("cpu", "cuda"):
        raise LayoutError(f"{path} does not say which device it was compiled for. Export the model again.")
    if made["device"] == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"{path} was compiled for cuda, and torch sees no GPU. Export the model again.")
    here = machine(torch.device(made["device"]))["capability"].split()
    missing = [name for name in made.get("capability", "").split() if name not in here]
    if missing:
        raise OptionError(
            f"{path} was compiled for a {made['device']} with {', '.join(missing)}, which this machine does not have: "
            f"its code could crash here. Export the model again on this machine."
        )


def _loaded(path: Path, info: ExportInfo) -> Any:
    try:
        return torch._inductor.aoti_load_package(str(path))
    except Exception as e:  # loading fails in the dynamic linker, in C++ or in Python
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
        raise CheckpointError(
            f"{path} cannot be loaded by torch {torch.__version__}; it was made with torch "
            f"{info.environment.get('torch')}: {reason}. Export the model again with this torch."
        ) from e
