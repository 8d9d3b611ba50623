"""The command line: one dataclass a command. Commands parse, call and print; they hold no logic of their own.

Exit codes: 0 success, 1 the command failed, 2 wrong usage, 3 done, but some pictures could not be processed, 130
interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

from amradio.cli.app import App
from amradio.cli.arguments import normalise
from amradio.cli.compare import Compare
from amradio.cli.convert import Convert
from amradio.cli.data import Data
from amradio.cli.demo import Demo
from amradio.cli.distill import Distill
from amradio.cli.doctor import Doctor
from amradio.cli.embed import Embed
from amradio.cli.evaluate import Evaluate
from amradio.cli.features import Features
from amradio.cli.info import Info
from amradio.cli.models import Models
from amradio.cli.reproduce import Reproduce
from amradio.cli.visualize import Visualize
from amradio.errors import AmradioError

COMMANDS: dict[str, type[Any]] = {
    "demo": Demo,
    "app": App,
    "models": Models,
    "info": Info,
    "features": Features,
    "embed": Embed,
    "visualize": Visualize,
    "eval": Evaluate,
    "compare": Compare,
    "reproduce": Reproduce,
    "distill": Distill,
    "convert": Convert,
    "data": Data,
    "doctor": Doctor,
}

SUCCESS, FAILED, USAGE, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130


def parse(argv: Sequence[str]) -> Any:
    """Turn command line words into a command.

    Args:
        argv: Words after the program's name.

    Returns:
        An instance of one of `COMMANDS`.

    Raises:
        SystemExit: Help was asked for (0), or the usage is wrong (2).
    """
    import tyro

    kinds = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())
    union: Any = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    words = list(argv)
    if words and words[0] in COMMANDS:
        words[1:] = normalise(words[1:], COMMANDS[words[0]])
    return tyro.cli(
        union,
        prog="amradio",
        description="Features from pictures with agglomerative vision backbones (RADIO, E-RADIO, C-RADIO). "
        "`amradio COMMAND --help` explains a command, `amradio --version` prints the version.",
        args=words,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Words after the program's name; default those of the process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["--version"], ["-V"]):
        from amradio import __version__

        print(f"amradio {__version__}")
        return SUCCESS
    try:
        command = parse(words or ["--help"])
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else USAGE
    as_json = getattr(command, "json", False)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return int(command.run())
    except AmradioError as e:
        _report(e, as_json)
        return FAILED
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SUCCESS
    except OSError as e:  # a full disk, a folder that may not be written to
        _report(e, as_json)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _report(error: Exception, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))
    else:
        print(f"error: {error}", file=sys.stderr)


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"note: {message}", file=sys.stderr)
