"""Sheets as SVG."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amradio.viz.grid import Layout


def to_svg(layout: Layout) -> str:
    """Write a layout as one SVG document; pictures are embedded as PNG, text stays text."""
    width, height = layout.width, layout.height
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for placed in layout.pictures:
        data = io.BytesIO()
        placed.picture.save(data, "PNG", optimize=True)
        encoded = base64.b64encode(data.getvalue()).decode("ascii")
        lines.append(
            f'<image x="{placed.x}" y="{placed.y}" width="{placed.picture.width}" height="{placed.picture.height}" '
            f'href="data:image/png;base64,{encoded}"/>'
        )
    lines += [
        f'<text x="{t.x}" y="{t.y}" font-size="{t.size}" fill="#{bytes(t.colour).hex()}">{escape(t.text)}</text>'
        for t in layout.texts
    ]
    return "\n".join([*lines, "</svg>", ""])
