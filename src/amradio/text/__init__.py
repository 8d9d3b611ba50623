"""Text towers: the language side of teachers such as CLIP, SigLIP and SigLIP2.

`load_text_tower` builds one from a teacher's record; whatever library it comes from, it is used as a `TextTower`.
Importing this package imports neither ``transformers`` nor ``open_clip``.
"""

from amradio.text.canonicalize import canonicalize
from amradio.text.protocol import TextTower
from amradio.text.towers import TEXT_TYPES, has_text_side, load_text_tower

__all__ = ["TEXT_TYPES", "TextTower", "canonicalize", "has_text_side", "load_text_tower"]
