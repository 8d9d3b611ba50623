"""Matching pictures and masks by name."""

from __future__ import annotations

from typing import NamedTuple

from amradio.errors import DatasetError
from amradio.images.names import natural_key
from amradio.images.segmentation.layout import Contents
from amradio.images.segmentation.names import resolve

_SHOWN = 3


class Pairing(NamedTuple):
    """What belongs together, and what is left over.

    Attributes:
        keys: Of pictures with masks: in the order of the list, or in natural order.
        without_mask: Keys of wanted pictures.
        without_picture: Keys of masks; none if there is a list of what is wanted.
        missing: Listed names that are no picture's.
    """

    keys: list[str]
    without_mask: list[str]
    without_picture: list[str]
    missing: list[str]


def pair(contents: Contents) -> Pairing:
    """Match the pictures and masks that are wanted.

    Raises:
        DatasetError: A picture is listed twice.
    """
    masks = set(contents.masks.keys())
    extra: list[str] = []
    missing: list[str] = []
    if contents.listed is None:
        wanted = sorted(contents.pictures, key=natural_key)
        extra = sorted(masks - contents.pictures.keys(), key=natural_key)
    else:
        wanted, missing = resolve(contents.listed, contents.pictures)
    return Pairing([k for k in wanted if k in masks], [k for k in wanted if k not in masks], extra, missing)


def refuse_orphans(pairing: Pairing, contents: Contents, where: str) -> None:
    """Check that everything has found its counterpart.

    Raises:
        DatasetError: Something has not, or there is nothing at all.
    """
    problems = []
    if pairing.missing and contents.listed is not None:
        problems.append(
            f"{_count(pairing.missing, 'listed name')} in {contents.listed.location} "
            f"{_verb(pairing.missing, 'has', 'have')} no picture: {_shown(pairing.missing)}"
        )
    if pairing.without_mask:
        shown = [f"{contents.pictures[k]} (expected {contents.masks.place(k)})" for k in pairing.without_mask[:_SHOWN]]
        problems.append(
            f"{_count(pairing.without_mask, 'picture')} {_verb(pairing.without_mask, 'has', 'have')} no mask: "
            f"{_shown(shown, len(pairing.without_mask))}"
        )
    if pairing.without_picture:
        shown = [contents.masks.place(k) for k in pairing.without_picture[:_SHOWN]]
        problems.append(
            f"{_count(pairing.without_picture, 'mask')} {_verb(pairing.without_picture, 'has', 'have')} no picture: "
            f"{_shown(shown, len(pairing.without_picture))}"
        )
    if problems:
        raise DatasetError(
            f"In {where}, {'; '.join(problems)}. Pictures and masks are matched by name. `amradio data check` lists "
            "all; a list file chooses what to use."
        )
    if not pairing.keys:
        raise DatasetError(f"There are no pictures in {where}.")


def _count(items: list[str], noun: str) -> str:
    return f"{len(items):,} {noun}{'' if len(items) == 1 else 's'}"


def _verb(items: list[str], singular: str, plural: str) -> str:
    return singular if len(items) == 1 else plural


def _shown(items: list[str], count: int | None = None) -> str:
    count = len(items) if count is None else count
    more = f" and {count - _SHOWN:,} more" if count > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
