"""Results as one file, made in memory."""

from __future__ import annotations

import base64
import io
import zipfile
from typing import Any

from amradio.app.visit import Visit
from amradio.errors import OptionError

_TIME = (2000, 1, 1, 0, 0, 0)  # the same results are the same file


def download(visit: Visit, tab: str) -> dict[str, Any]:
    """The last results of a tab.

    Returns:
        ``name`` of a file, its ``type``, and its content in base64 as ``data``: the page saves it.

    Raises:
        OptionError: There are none.
    """
    results = visit.session.results.get(tab)
    if not results:
        raise OptionError("There is nothing to download yet.")
    if len(results) == 1:
        name, make = results[0]
        kind, content = ("text/csv" if name.endswith(".csv") else "image/png"), make()
    else:
        name, kind, content = f"amradio-{tab}.zip", "application/zip", _zip(results)
    return {"name": name, "type": kind, "data": base64.b64encode(content).decode("ascii")}


def _zip(results: Any) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, make in results:
            archive.writestr(zipfile.ZipInfo(name, _TIME), make())
    return data.getvalue()
