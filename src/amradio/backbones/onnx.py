"""ONNX files that amradio has written, run by ONNX Runtime as backbones.

The file says all that must be known of it: sizes, outputs, precision, identity. Nothing in it is executed but the
operators of ONNX.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amradio.backbones.exported import ExportedBackbone, ExportInfo, OutputInfo
from amradio.errors import CheckpointError, LayoutError, MissingDependencyError, OptionError, UnknownModelError
from amradio.hub import HubOptions
from amradio.models.output import RadioOutput
from amradio.weights.checkpoint import Identity
from amradio.weights.trust import Claim, check, sha256_of

LAYOUT = "onnx"
INPUT = "images"

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_PROVIDERS = {
    "cpu": _CPU,
    "cuda": _CUDA,
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}
_ON_CUDA = (_CUDA, _PROVIDERS["tensorrt"])  # these read and write CUDA memory


class OnnxBackbone(ExportedBackbone):
    """An ONNX file as a backbone.

    Args:
        session: An ``onnxruntime.InferenceSession``.
        info: What the file says of itself.
        identity: Of the file.
        output: Whose summary and features are wanted; default the backbone's.
        hub: How the hub is asked for an adaptor's text side, should a text need it.

    Raises:
        UnknownAdaptorError: There is no such output.
    """

    def __init__(
        self,
        session: Any,
        info: ExportInfo,
        identity: Identity,
        output: str | None = None,
        hub: HubOptions | None = None,
    ) -> None:
        super().__init__(info, identity, output, hub)
        self.session = session

    def _compute(self, images: Tensor, wanted: Sequence[OutputInfo]) -> list[RadioOutput]:
        """Run the graph on torch's memory: nothing is copied where the session is on the images' device."""
        home = images.device
        device = home if home.type == "cpu" or self._on_cuda else torch.device("cpu")
        images = images.to(device)
        binding = self.session.io_binding()
        binding.bind_input(INPUT, *_place(device), _numpy_type(images), list(images.shape), images.data_ptr())
        outputs = [self._allocated(output, images) for output in wanted]
        for info, output in zip(wanted, outputs, strict=True):
            for name, tensor in ((info.summary, output.summary), (info.features, output.features)):
                binding.bind_output(name, *_place(device), _numpy_type(tensor), list(tensor.shape), tensor.data_ptr())
        if device.type == "cuda":  # the session has a stream of its own
            torch.cuda.current_stream(device).synchronize()
        self.session.run_with_iobinding(binding)
        return [output.to(home) for output in outputs]

    @property
    def _on_cuda(self) -> bool:
        return any(name in _ON_CUDA for name in self.session.get_providers())

    def _check_device(self, device: torch.device) -> None:
        if device.type == "cpu" or (device.type == "cuda" and self._on_cuda):
            return
        raise OptionError(
            f"{self.identity.source} runs on {', '.join(self.session.get_providers())}, not on {device}. Install an "
            f"onnxruntime build for that device and choose it with providers=, or leave device at cpu."
        )


def load_onnx(
    name: str,
    *,
    hub: HubOptions | None = None,
    adaptor: str | None = None,
    providers: str | Sequence[str] | None = None,
    threads: int | None = None,
) -> OnnxBackbone:
    """Load an ONNX file that ``amradio convert --to onnx`` has written.

    Args:
        name: The file.
        hub: How the hub is asked for an adaptor's text side, should a text need it.
        adaptor: The adaptor in the file whose summary and features are wanted instead of the backbone's.
        providers: What ONNX Runtime runs the graph with, in order of preference: ``cpu``, ``cuda``, ``tensorrt``,
            ``openvino``, ``coreml``, ``directml``, ``xnnpack`` or a provider's full name; several as a list or
            separated by commas. Default CUDA where torch and ONNX Runtime both have it, else the CPU.
        threads: Threads of the CPU provider, at least 1; default as many as torch uses.

    Returns:
        The backbone.

    Raises:
        UnknownModelError: There is no such file.
        MissingDependencyError: onnxruntime is not installed.
        OptionError: This build of ONNX Runtime has no such provider, or an option is no option.
        LayoutError: amradio did not write the file.
        CheckpointError: The file, or one beside it with its weights, is damaged or missing.
        UnknownAdaptorError: The file has no such adaptor.
    """
    _check_threads(threads)
    path = Path(name).expanduser()
    if not path.is_file():
        raise UnknownModelError(f"There is no file {path}. `amradio convert MODEL {path.name} --to onnx` writes one.")
    runtime = _import_runtime()
    session = _session(runtime, path, _chosen(runtime, providers), threads)
    info = ExportInfo.from_metadata(session.get_modelmeta().custom_metadata_map, path, _foreign(session))
    _check_names(session, info, path)
    _check_data_files(path, info.data_files)
    return OnnxBackbone(session, info, info.identity(path, LAYOUT, sha256_of(path)), adaptor, hub)


def _import_runtime() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as e:
        raise MissingDependencyError(
            f"ONNX files are run by the package onnxruntime, which cannot be imported ({e}). Install it with `pip "
            f"install 'amradio[onnx]'`, or onnxruntime-gpu in its place for CUDA."
        ) from e


def _chosen(runtime: Any, providers: str | Sequence[str] | None) -> list[str]:
    """Full names of the providers, the CPU at the end to take what the others leave."""
    available: list[str] = runtime.get_available_providers()
    if providers is None:
        return [_CUDA, _CPU] if _CUDA in available and torch.cuda.is_available() else [_CPU]
    names = _names(providers)
    full = [_PROVIDERS.get(name.strip().lower(), name.strip()) for name in names]
    for name, wanted in zip(names, full, strict=True):
        if wanted not in available:
            raise OptionError(
                f"This build of onnxruntime ({runtime.__version__}) has no provider {name!r}, only "
                f"{', '.join(available)}. Other providers come with other packages, such as onnxruntime-gpu."
            )
    return full if _CPU in full else [*full, _CPU]


def _names(providers: Any) -> list[str]:
    names = providers.split(",") if isinstance(providers, str) else providers
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise OptionError(f"providers must be names of execution providers, such as 'cuda', got {providers!r}.")
    return list(names)


def _check_threads(threads: Any) -> None:
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise OptionError(f"threads must be a whole number from 1, or None, got {threads!r}.")


def _session(runtime: Any, path: Path, providers: list[str], threads: int | None) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.log_severity_level = 3  # errors; its warnings are about its own optimisations
    try:
        return runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as e:  # its exceptions have no common base but this
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
        raise CheckpointError(
            f"{path} cannot be read by ONNX Runtime {runtime.__version__}: {reason}. It is damaged, no ONNX file, "
            f"lacks the file with its weights beside it, or needs a newer ONNX Runtime."
        ) from e


def _foreign(session: Any) -> str:
    """What to say of a file that others wrote."""
    sides = {"inputs": session.get_inputs(), "outputs": session.get_outputs()}
    found = "; ".join(f"{k} {', '.join(f'{v.name} {v.shape} {v.type}' for v in vs)}" for k, vs in sides.items())
    return (
        f"It has {found}. Any network becomes a backbone through a callable: run the file yourself in a function from "
        f"images [B, 3, H, W] to (summary [B, C], features) and pass that to load_backbone, with patch_size, mean and "
        f"std."
    )


def _check_names(session: Any, info: ExportInfo, path: Path) -> None:
    have = {v.name for v in (*session.get_inputs(), *session.get_outputs())}
    wanted = {INPUT, *(name for o in info.outputs for name in (o.summary, o.features))}
    if not wanted <= have:
        raise LayoutError(
            f"{path} lacks {', '.join(sorted(wanted - have))}, which its metadata describes: it was edited after "
            f"amradio wrote it. Export the model again."
        )


def _check_data_files(path: Path, recorded: Mapping[str, str]) -> None:
    """Compare the files with weights to what they were when the graph was written.

    Raises:
        CheckpointError: One is missing or lies elsewhere.
        IntegrityError: One has other content.
    """
    for name, sha256 in recorded.items():
        beside = path.parent / name
        if Path(name).name != name or not beside.is_file():
            raise CheckpointError(f"{path} needs its weights in the file {name} beside it, which is not there.")
        claim = Claim(
            sha256=sha256, by=f"was recorded in {path.name}", advice="They are not from one export; export again."
        )
        check(sha256_of(beside), "computed", str(beside), [claim])


def _place(device: torch.device) -> tuple[str, int]:
    return device.type, device.index or 0


def _numpy_type(tensor: Tensor) -> Any:
    return torch.empty(0, dtype=tensor.dtype).numpy().dtype.type
