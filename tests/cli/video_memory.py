"""Runs ``amradio visualize video`` and prints the memory of the process at two frames, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from amradio.cli import main
from amradio.viz.video_writer import VideoWriter

PAGE = 4096
AT = (50, 300)


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def peak() -> int:
    """The most that it ever was."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


found: dict[int, dict[str, int]] = {}
count = 0
write = VideoWriter.write


def watched(self: VideoWriter, *arguments: Any) -> None:
    global count
    write(self, *arguments)
    count += 1
    if count in AT:
        found[count] = {"resident": resident(), "peak": peak()}


VideoWriter.write = watched  # type: ignore[method-assign]
code = main(sys.argv[1:])
print(json.dumps({"code": code, "frames": count, "at": found}))
