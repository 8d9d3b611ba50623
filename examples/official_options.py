"""The options that the published RADIO example scripts have in common, turned into words of ``amradio eval``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amradio.evals.report import EvalReport

# How the published scripts chose where the code comes from. Here there is one place.
_WITHOUT_MEANING = ("--use-local-lib", "--force-reload", "--use-huggingface", "--use-hf")


def parser(description: str, dataset: str, batch_size: int, resolution: Sequence[int]) -> argparse.ArgumentParser:
    """Make a parser of the common options.

    Args:
        description: Of the script.
        dataset: Default data set.
        batch_size: Default.
        resolution: Default: the shortest side, or height and width of a centre crop.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument("-v", "--model-version", default="radio_v2", help="RADIO version, path, or any other backbone")
    made.add_argument("-r", "--resolution", nargs="+", type=int, default=list(resolution), metavar="PIXELS",
                      help="one number: shortest side, aspect kept; two: centre crop of height and width")  # fmt: skip
    made.add_argument("-d", "--dataset", default=dataset, help="folder, tar shards, list file, Hugging Face dataset")
    made.add_argument("--resize-multiple", type=int, help="both sides become multiples of this; default the model's")
    made.add_argument("--batch-size", type=int, default=batch_size, help="most pictures in one forward pass")
    made.add_argument("-w", "--workers", type=int, default=8, help="decoding threads of each process")
    made.add_argument("--vitdet-window-size", type=int, help="side of ViTDet windows, in patches")
    made.add_argument("--amp", action="store_true", help="bfloat16 mixed precision")
    made.add_argument("--csv-out", help="add the result to this file")
    made.add_argument("--torchhub-repo", help=argparse.SUPPRESS)
    for name in _WITHOUT_MEANING:
        made.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    return made


def words(options: argparse.Namespace, **more: object) -> list[str]:
    """Common options as words of ``amradio eval``.

    Args:
        options: As parsed.
        more: Further options by name; those that are None are left out.
    """
    if len(options.resolution) > 2:
        raise SystemExit("--resolution takes one number, or height and width")
    named = {
        "model": options.model_version,
        "dataset": options.dataset,
        "resize_multiple": options.resize_multiple,
        "batch_size": options.batch_size,
        "workers": options.workers,
        "vitdet_window_size": options.vitdet_window_size,
        "autocast": "bfloat16" if options.amp else None,
        "csv_out": options.csv_out,
        **more,
    }
    made = ["--resolution", *map(str, options.resolution)]
    for name, value in named.items():
        if value is not None:
            made += [f"--{name.replace('_', '-')}={value}"]
    return made


def evaluate(protocol: str, words: Sequence[str]) -> EvalReport | None:
    """Run one evaluation.

    Args:
        protocol: ``knn``, ``zero-shot`` or ``position``.
        words: Its options.

    Returns:
        The report; None in all processes but the first.
    """
    from amradio.cli import parse
    from amradio.errors import AmradioError

    try:
        report = parse(["eval", protocol, *words]).reports()[0]
    except AmradioError as error:
        raise SystemExit(f"error: {error}") from None
    if int(os.environ.get("RANK", "0")):
        return None
    failed = sum(part["failed"] for part in report.dataset.values())
    if failed:
        print(f"{failed} pictures could not be read and are not counted", file=sys.stderr)
    return report


def print_accuracy(report: EvalReport | None) -> None:
    """Print top-1 and top-5 as the published scripts do."""
    if report is not None:
        print("Accuracy:")
        for k in (1, 5):
            if f"top{k}" in report.metrics:
                print(f"\tTop {k}: {report.metrics[f'top{k}'].value:.3f}")
