"""Reading index masks: modes, bit depths, and what is refused."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from amradio.errors import DatasetError
from amradio.images.segmentation import VOID, MaskError
from amradio.images.segmentation.masks import IndexMask, LabelTable, check_budget, check_size, read_ids
from amradio.images.segmentation.storage import FolderStorage


def saved(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
def test_grey_and_palette_masks_hold_the_same_ids(seed: int, height: int, width: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.uint8)
    grey = Image.fromarray(ids)
    palette = grey.copy()
    palette.putpalette(np.random.default_rng(seed).integers(0, 256, 768, dtype=np.uint8).tobytes())
    for image in (grey, palette):
        read = read_ids(saved(image), "mask")
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, ids)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_narrow_palettes_hold_indices(bits: int) -> None:
    ids = np.arange(2**bits, dtype=np.uint8).reshape(1, -1)
    image = Image.fromarray(ids)
    image.putpalette([200, 10, 30] * 2**bits)
    np.testing.assert_array_equal(read_ids(saved(image, bits=bits), "mask"), ids)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_narrow_grey_is_not_stretched(bits: int) -> None:
    """Pillow fills 0..255 with grey samples of 2 and 4 bits, as is right for photos."""
    import struct
    import zlib

    ids = np.arange(2**bits) if bits < 8 else np.arange(0, 256, 5)
    packed = np.packbits(((ids[:, None] >> np.arange(bits)[::-1]) & 1).astype(np.uint8)).tobytes()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(ids), 1, bits, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + packed))
    np.testing.assert_array_equal(read_ids(content + chunk(b"IEND", b""), "mask")[0], ids)


def test_16_bits_are_kept() -> None:
    ids = np.array([[0, 1, 300, 65535]], dtype=np.uint16)
    read = read_ids(saved(Image.fromarray(ids)), "mask")
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, ids)
    with pytest.raises(
        MaskError, match=r"ids that are no class: 300 \(1 pixels\), 65535 \(1 pixels\)\. Known are 0 to"
    ):
        LabelTable.identity(3).apply(read, "m.png")


def test_transparency_does_not_count() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8))
    image.putpalette([0] * 768)
    np.testing.assert_array_equal(read_ids(saved(image, transparency=b"\0\xff\x80"), "mask"), [[0, 1, 2]])


def test_rgb_masks_are_refused() -> None:
    colours = np.array([[[128, 0, 0], [128, 0, 0], [0, 128, 0]]], dtype=np.uint8)
    with pytest.raises(MaskError) as refused:
        read_ids(saved(Image.fromarray(colours)), "m.png")
    assert str(refused.value) == (
        "The mask m.png is no index mask: it is a picture of mode RGB, with 2 colours such as (128, 0, 0); if each "
        "colour stands for a class, replace it by the class's number and save in mode 'L' or 'P'. Masks hold one "
        "number, the class, for each pixel."
    )
    assert refused.value.problem == "not-an-index-mask"
    assert isinstance(refused.value, DatasetError)
    assert isinstance(refused.value, ValueError)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_grey_mask_saved_in_colour_says_how_to_repair_it(mode: str) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8)).convert(mode)
    with pytest.raises(MaskError, match=r"whose three channels are equal; .* Image.open\(path\).convert\('L'\)"):
        read_ids(saved(image), "m.png")


def test_grey_with_alpha_is_refused() -> None:
    with pytest.raises(MaskError, match="mode LA"):
        read_ids(saved(Image.new("LA", (3, 2))), "m.png")


def test_jpeg_is_refused(photo: Callable[..., bytes]) -> None:
    with pytest.raises(MaskError, match=r"is no PNG file .*; formats such as JPEG change the ids"):
        read_ids(photo(), "m.jpg")


def test_broken_files_are_refused() -> None:
    whole = saved(Image.fromarray(np.random.default_rng(0).integers(0, 9, (64, 64)).astype(np.uint8)))
    for content in (whole[:200], whole[:20], whole[:60] + bytes(40) + whole[100:]):
        with pytest.raises(MaskError, match="The mask m is broken or cut short") as refused:
            read_ids(content, "m")
        assert refused.value.problem == "unreadable-mask"
    with pytest.raises(MaskError, match="is no PNG file"):
        read_ids(b"", "m")


def test_files_cut_anywhere_are_refused_or_read_whole() -> None:
    ids = np.random.default_rng(0).integers(0, 9, (12, 12)).astype(np.uint8)
    whole = saved(Image.fromarray(ids))
    refused = 0
    for end in range(len(whole)):
        try:
            np.testing.assert_array_equal(read_ids(whole[:end], "m"), ids)
        except MaskError:
            refused += 1
    assert refused > len(whole) - 40  # what is left out of the others is checksums and the end mark


def test_half_read_masks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(MaskError, match="LOAD_TRUNCATED_IMAGES is switched on"):
        read_ids(saved(Image.new("L", (2, 2))), "m")


def test_sizes_are_checked() -> None:
    check_size((3, 4), (3, 4), "m")
    check_size((3, 4), None, "m")
    with pytest.raises(MaskError, match=r"m is 4 x 3 pixels \(width x height\), and its picture is 3 x 4\.") as refused:
        check_size((3, 4), (4, 3), "m")
    assert refused.value.problem == "wrong-size"
    with pytest.raises(MaskError, match="100000 x 100000 pixels; there must be 1 to"):
        check_budget(100_000, 100_000, "m")


@given(st.data())
def test_tables_map_like_a_loop(data: st.DataObject) -> None:
    labels = data.draw(st.dictionaries(st.integers(0, 400), st.integers(0, 255), min_size=1))
    ids = np.array(data.draw(st.lists(st.sampled_from(sorted(labels)), min_size=1))).reshape(1, -1)
    expected = [labels[i] for i in ids[0].tolist()]
    for kind in (np.uint8, np.uint16):
        if ids.max() <= np.iinfo(kind).max:
            mapped = LabelTable(labels, "some").apply(ids.astype(kind), "m")
            assert mapped.dtype == np.uint8
            np.testing.assert_array_equal(mapped[0], expected)


def test_unknown_ids_are_counted() -> None:
    ids = np.array([[0, 1, 2, 7, 7, 9, VOID]], dtype=np.uint8)
    with pytest.raises(MaskError) as refused:
        LabelTable.identity(3).apply(ids, "m.png")
    assert str(refused.value) == (
        "The mask m.png has ids that are no class: 7 (2 pixels), 9 (1 pixels). Known are 0 to 2 and 255 (void). Is it "
        "the mask of another data set, or the list of classes too short?"
    )
    assert refused.value.problem == "unknown-id"
    with pytest.raises(MaskError, match=r"10 \(1 pixels\) and 3 more\."):
        LabelTable.identity(3).apply(np.arange(14, dtype=np.uint8)[None], "m")


def test_a_mask_is_not_shared(tmp_path: Path) -> None:
    (tmp_path / "m.png").write_bytes(saved(Image.new("L", (2, 2))))
    source = IndexMask(FolderStorage(str(tmp_path)), "m.png", LabelTable.identity(1))
    source.read((2, 2))[:] = 7
    assert source.read().max() == 0
    (tmp_path / "m.png").unlink()
    with pytest.raises(MaskError, match=r"Cannot read .*m.png: No such file"):
        source.read()


def test_errors_survive_processes() -> None:
    error = pickle.loads(pickle.dumps(MaskError("what", "wrong-size")))
    assert (str(error), error.problem) == ("what", "wrong-size")
