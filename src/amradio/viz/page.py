"""One HTML file with text, tables and pictures, which needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
img { max-width: 100%; height: auto; border-radius: 4px; } figure { margin: 1rem 0; }
figcaption { color: #555; font-size: 0.9rem; } table { border-collapse: collapse; }
td, th { padding: 0.3rem 0.8rem; border-bottom: 1px solid #ddd; text-align: left; }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #ddd; } figcaption { color: #aaa; } }
"""


class Page:
    """A report that grows from top to bottom.

    Args:
        title: Its heading.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def picture(self, picture: Image, caption: str, *, photo: bool = False) -> None:
        """Add a picture; the caption is also what is read aloud. Photos may lose what nobody sees, to be smaller."""
        data = io.BytesIO()
        if photo:
            picture.save(data, "JPEG", quality=88)
        else:
            picture.save(data, "PNG", optimize=True)
        encoded = base64.b64encode(data.getvalue()).decode("ascii")
        words = html.escape(caption)
        self._parts.append(
            f'<figure><img alt="{words}" src="data:image/{"jpeg" if photo else "png"};base64,{encoded}">'
            f"<figcaption>{words}</figcaption></figure>"
        )

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table."""
        lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
        lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        self._parts.append("<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")

    def save(self, path: Path) -> Path:
        """Write the page; returns the path."""
        title = html.escape(self._title)
        path.write_text(
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
            f"<body><h1>{title}</h1>{''.join(self._parts)}</body></html>\n",
            encoding="utf-8",
        )
        return path
