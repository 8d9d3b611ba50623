"""The text clean-up that SigLIP models were trained and evaluated with."""

from __future__ import annotations

import string

# The underscore becomes a space, not nothing: class names are often written "ice_cream".
_PUNCTUATION = str.maketrans({"_": " "} | dict.fromkeys(string.punctuation.replace("_", ""), ""))


def canonicalize(text: str) -> str:
    """Reduce a text to lower-case words with single spaces between them.

    Underscores become spaces, ASCII punctuation is removed, letters are lower-cased, white space is collapsed
    (big_vision, ``prompt_engineering.canonicalize_text``). The SigLIP2 tokenizer files on the hub do not do this, and
    without it zero-shot accuracy on ImageNet falls by about 12 points.

    Args:
        text: Any text.

    Returns:
        The canonical text; canonical texts are returned unchanged.
    """
    return " ".join(text.translate(_PUNCTUATION).lower().split())
