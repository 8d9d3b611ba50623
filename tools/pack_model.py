"""Pack a trained student into a small file: half precision on disk, single precision when it is loaded.

python tools/pack_model.py RUN/model.safetensors amradio-tiny.safetensors --name amradio-tiny
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from amradio.weights.convert import save
from amradio.weights.layouts import read_checkpoint

LARGEST_BYTES = 20 * 10**6


def main() -> None:
    """Pack one model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("student", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--name", required=True, help="version that the file says it is")
    parser.add_argument("--licence", default="Apache-2.0")
    args = parser.parse_args()
    checkpoint = read_checkpoint(args.student)
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in checkpoint.tensors.items()}
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise SystemExit(f"{name} overflows in half precision")
    packed = dataclasses.replace(
        checkpoint,
        tensors=tensors,
        unused={},
        config=dataclasses.replace(checkpoint.config, version=args.name, dtype="float32"),
        identity=dataclasses.replace(checkpoint.identity, source=args.name, version=args.name, license=args.licence),
    )
    args.target.parent.mkdir(parents=True, exist_ok=True)
    save(packed, args.target)
    size = args.target.stat().st_size
    print(f"{size / 1e6:.1f} MB in {args.target}")
    if size > LARGEST_BYTES:
        raise SystemExit(f"that is more than {LARGEST_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
