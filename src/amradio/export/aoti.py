"""Writing packages of AOTInductor: native code for one kind of machine.

torch's C++ library runs it without Python.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from amradio.backbones.aoti import METADATA, machine
from amradio.errors import LayoutError, MissingDependencyError
from amradio.export.program import MAX_STEPS, ExportOptions, describe, export_program, quietly, step_of
from amradio.models.radio import RadioModel

PRECISIONS = ("fp32", "fp16", "bf16")

_COMPILERS = ("g++", "clang++", "c++", "cl")


def export_aoti(
    model: RadioModel,
    path: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    verify: Callable[[Path], object] | None = None,
) -> Path:
    """Compile a model with AOTInductor into a package that `load_backbone("aoti:FILE", trust_remote_code=True)` takes.

    It runs where it was compiled: on the kind of device that the model is on, with the same instructions.

    Args:
        model: The model, with the adaptors and the windows that are wanted, on the device that is wanted.
        path: The file; parents are made, an existing file is replaced once the new one is complete.
        options: Sizes, layout, precision.
        verify: Called with the complete file before it gets its name; if it raises, everything stays as it was.

    Returns:
        The path.

    Raises:
        MissingDependencyError: There is no C++ compiler.
        OptionError: An option is not valid, or does not fit the model.
        ResolutionError: The model does not take the size.
        LayoutError: The model cannot be exported or compiled.
    """
    options = options or ExportOptions()
    options.check(model, PRECISIONS)
    target = Path(path)
    if target.is_dir() or target.suffix != ".pt2":
        raise LayoutError(f"A package of AOTInductor is one file whose name ends in .pt2, got {target}.")
    _require_compiler()
    device = next(model.parameters()).device
    program = export_program(model, options)
    limit = None if options.size is not None else MAX_STEPS * step_of(model)
    info = describe(model, options, limit, {"torch": torch.__version__, **machine(device)})
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        part = Path(folder, target.name)
        try:
            with torch.no_grad(), quietly():
                torch._inductor.aoti_compile_and_package(program, package_path=str(part))
        except Exception as e:  # the compilers raise whatever they trip over
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
            raise LayoutError(f"The model cannot be compiled by torch {torch.__version__}: {reason}.") from e
        with zipfile.ZipFile(part, "a") as file:  # uncompressed, as everything in it
            root = file.namelist()[0].partition("/")[0]
            file.writestr(f"{root}/{METADATA}", json.dumps(info.to_metadata()))
        if verify is not None:
            verify(part)
        part.replace(target)
    return target


def _require_compiler() -> None:
    """A C++ compiler by the name that inductor uses, or by the environment variable that it reads."""
    candidates = (os.environ.get("CXX"), *_COMPILERS)
    if not any(shutil.which(name) for name in candidates if name):
        raise MissingDependencyError(
            f"AOTInductor needs a C++ compiler, and none of {', '.join(_COMPILERS)} is on the path. Install one "
            f"(`apt-get install g++`, or the build tools of your system), or name it in the environment variable CXX."
        )
