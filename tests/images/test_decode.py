import io
import os
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, TiffImagePlugin

from amradio.errors import ImageError
from amradio.images import decode, to_tensor, to_uint8_tensor, upright_size

ORIENTED = {  # what a viewer must do, in numpy, by EXIF orientation
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def noise(*shape: int, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *before: bytes, after: bytes = b"") -> bytes:
    """A PNG written by hand, so that the reader is not tested against its own writer."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + data + after + chunk(b"IEND", b"")


def pixels(data: bytes, **options: object) -> np.ndarray:
    image = decode(data, **options)
    assert image.mode == "RGB"
    assert type(image) is Image.Image
    return np.asarray(image)


def composed(rgb: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    a = alpha[..., None].astype(float) / 255
    return np.round(rgb * a + np.array(background) * (1 - a))


# ---- ordinary pictures ----


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000"])
def test_lossless_formats_return_the_pixels(kind):
    a = noise(9, 13, 3)
    options = {"WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False}}.get(kind, {})
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(a), kind, **options)), a)


@pytest.mark.parametrize("kind", ["JPEG", "AVIF", "GIF", "MPO"])
def test_lossy_formats_come_close(kind):
    a = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    options = {"save_all": True, "append_images": [Image.new("RGB", (24, 16))]} if kind == "MPO" else {}
    assert np.abs(pixels(encoded(Image.fromarray(a), kind, **options)).astype(int) - a).max() <= 8


@pytest.mark.parametrize("as_bytes", [True, False])
def test_path_and_bytes_and_wrong_extension(tmp_path, as_bytes):
    a = noise(5, 6, 3)
    path = tmp_path / "really-a-png.jpg"
    path.write_bytes(encoded(Image.fromarray(a), "PNG"))
    np.testing.assert_array_equal(decode(path.read_bytes() if as_bytes else path), a)
    np.testing.assert_array_equal(decode(str(path)), a)


def test_bilevel():
    a = noise(6, 10) > 127
    for kind in ("PNG", "TIFF", "PPM"):
        np.testing.assert_array_equal(pixels(encoded(Image.fromarray(a), kind))[..., 1], a * 255)


# ---- orientation ----


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    a = np.kron(noise(2, 3, 3), np.ones((16, 16, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98, "subsampling": 0}}.get(kind, {})
    got = pixels(encoded(Image.fromarray(a), kind, exif=exif, **options))
    expected = ORIENTED[orientation](a)
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).max() <= (12 if kind == "JPEG" else 0)


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_broken_exif_counts_as_upright(exif):
    a = np.full((8, 16, 3), 90, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_allclose(pixels(encoded(Image.fromarray(a), "JPEG", exif=exif)), a, atol=2)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_orientations_that_do_not_exist_count_as_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode(encoded(Image.new("RGB", (16, 8)), "JPEG", exif=exif)).size == (16, 8)


# ---- sample formats ----


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_gray_is_scaled_not_clipped(kind):
    a = noise(7, 9, dtype=np.uint16)
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    got = pixels(encoded(Image.fromarray(a), kind, **options))
    for c in range(3):
        np.testing.assert_array_equal(got[..., c], a >> 8)
    assert np.abs(got[..., 0] - a / 65535 * 255).max() < 1


def test_16_bit_rgb_is_scaled_like_gray():
    a = noise(4, 5, 3, dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in a)
    np.testing.assert_array_equal(pixels(png(5, 4, 16, 2, rows)), a >> 8)


def test_16_bit_with_alpha():
    a = noise(4, 5, 4, dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in a)
    expected = composed(a[..., :3] >> 8, a[..., 3] >> 8)
    np.testing.assert_allclose(pixels(png(5, 4, 16, 6, rows)), expected, atol=1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in a[..., 2:])
    expected = composed(np.repeat(a[..., 2:3] >> 8, 3, axis=-1), a[..., 3] >> 8)
    np.testing.assert_allclose(pixels(png(5, 4, 16, 4, rows)), expected, atol=1)


def test_16_bit_tiff_with_white_as_zero_and_with_12_bits():
    a = noise(4, 6, dtype=np.uint16)
    inverted = encoded(Image.fromarray(a), "TIFF", tiffinfo=TiffImagePlugin.ImageFileDirectory_v2())
    position = inverted.index(struct.pack("<HHI", 262, 3, 1)) + 8
    inverted = inverted[:position] + struct.pack("<H", 0) + inverted[position + 2 :]
    np.testing.assert_array_equal(pixels(inverted)[..., 0], 255 - (a >> 8))

    packed = bytes([0xFF, 0xF0, 0x00, 0x80, 0x04, 0x00])  # 12 bits each: 4095, 0, 2048, 1024
    entries = [(256, 3, 4), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 3, 1), (279, 4, 6)]
    tags = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    tiff = b"II*\0" + struct.pack("<I", 14) + packed + struct.pack("<H", len(entries)) + tags + bytes(4)
    assert pixels(tiff)[0, :, 0].tolist() == [255, 0, 128, 64]


@pytest.mark.parametrize(("mode", "what"), [("F", "32-bit float"), ("I", "signed or 32-bit integer")])
def test_samples_without_a_white_level_are_refused(mode, what):
    with pytest.raises(
        ImageError, match=f"its samples are {what}, which have no known white level; convert it to 8 or"
    ):
        decode(encoded(Image.new(mode, (4, 4)), "TIFF"))


def naive_rgb(cmyk: np.ndarray) -> np.ndarray:
    ink = cmyk.astype(float) / 255
    return 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk(kind):
    blocks = np.kron(noise(2, 2, 4) // 2, np.ones((16, 16, 1), np.uint8))
    options = {"quality": 98} if kind == "JPEG" else {}
    got = pixels(encoded(Image.fromarray(blocks, "CMYK"), kind, **options))
    np.testing.assert_allclose(got, naive_rgb(blocks), atol=6 if kind == "JPEG" else 2)


def test_cmyk_jpeg_without_adobe_marker_is_not_inverted():
    data = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG")
    start = data.index(b"\xff\xee")
    length = int.from_bytes(data[start + 2 : start + 4], "big")
    assert data[start + 4 : start + 9] == b"Adobe"
    plain = data[:start] + data[start + 2 + length :]
    # The stored samples are inverted ones (0, 255, 255, 255); taken plainly that is black.
    assert pixels(plain).max() <= 3
    np.testing.assert_allclose(pixels(data)[0, 0], (0, 255, 255), atol=3)


@pytest.mark.parametrize(("mode", "kind"), [("YCbCr", "TIFF"), ("LAB", "TIFF")])
def test_other_colour_spaces(mode, kind):
    source = Image.new("RGB", (4, 4), (180, 90, 40))
    # Pillow 12 cannot read the uncompressed YCbCr that it writes.
    got = pixels(encoded(source.convert(mode), kind, compression="tiff_lzw"))
    np.testing.assert_allclose(got, np.asarray(source), atol=3)


# ---- transparency ----


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 30)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_composed_over_the_background(kind, background):
    a = noise(6, 7, 4)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    got = pixels(encoded(Image.fromarray(a), kind, **options), background=background)
    np.testing.assert_allclose(got, composed(a[..., :3], a[..., 3], background), atol=1)


def test_gray_with_alpha():
    a = noise(6, 7, 2)
    got = pixels(encoded(Image.fromarray(a, "LA"), "PNG"))
    np.testing.assert_allclose(got, composed(np.repeat(a[..., :1], 3, -1), a[..., 1]), atol=1)


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128, 30])])
def test_palette_with_alpha(transparency):
    image = Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8), "P")
    palette = noise(4, 3)
    image.putpalette(palette.tobytes())
    alpha = np.array([255, 0, 255, 255] if transparency == 1 else list(transparency), np.uint8)
    got = pixels(encoded(image, "PNG", transparency=transparency))
    np.testing.assert_allclose(got[0], composed(palette, alpha), atol=1)


@pytest.mark.parametrize(("bits", "colour"), [(8, (10, 20, 30)), (16, (1000, 2000, 3000)), (16, (0, 0, 200))])
def test_one_transparent_colour(bits, colour):
    other = (200, 90, 77) if bits == 8 else (50000, 60000, 10)
    letter = "B" if bits == 8 else "H"
    row = b"\0" + struct.pack(f">6{letter}", *colour, *other)
    got = pixels(png(2, 1, bits, 2, row, chunk(b"tRNS", struct.pack(">3H", *colour))))
    assert got[0].tolist() == [[255, 255, 255], [v >> (bits - 8) for v in other]]


def test_one_transparent_gray_of_16_bits_is_exact():
    row = b"\0" + struct.pack(">3H", 1000, 1001, 60000)
    got = pixels(png(3, 1, 16, 0, row, chunk(b"tRNS", struct.pack(">H", 1001))))
    assert got[0, :, 0].tolist() == [1000 >> 8, 255, 60000 >> 8]


# ---- several frames ----


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_animations_and_pages(kind):
    frames = [Image.new("RGB", (8, 6), c) for c in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]]
    options = {"lossless": True} if kind == "WEBP" else {}
    got = pixels(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert (got == (255, 0, 0)).all()


# ---- broken and hostile files ----


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_files_are_refused_never_half_read(tmp_path, kind, share):
    data = encoded(Image.fromarray(noise(64, 64, 3)), kind)
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: int(len(data) * share)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about cut TIFF directories
        with pytest.raises(ImageError, match=r"Cannot decode .*cut\.jpg: .*broken, cut short or"):
            decode(path)


def test_truncated_progressive_jpeg():
    data = encoded(Image.fromarray(noise(64, 64, 3)), "JPEG", progressive=True)
    with pytest.raises(ImageError, match="image file is truncated"):
        decode(data[: len(data) // 2])


def test_other_code_that_allows_truncated_images_is_noticed(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="LOAD_TRUNCATED_IMAGES is switched on by other code in this process"):
        decode(encoded(Image.new("RGB", (4, 4)), "PNG"))


def test_pillow_globals_are_left_alone():
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    decode(encoded(Image.new("RGB", (4, 4)), "PNG"))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"the file is empty \(0 bytes\)\."),
        (
            b"hello, I am a text\n",
            r"it is text, not a picture \(it begins with 'hello, I am a te'\); formats read: JPEG, PNG",
        ),
        ("größer als gedacht und länger".encode(), r"it is text, not a picture \(it begins with 'größer als gedac'\)"),
        (b"%PDF-1.7 ...", r"it is a PDF document; formats read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", r"it is a PostScript file;"),
        (b"8BPS\0\1", r"it is a Photoshop file;"),
        (b"SIMPLE  =                    T", r"it is a FITS file;"),
        (b"PK\x03\x04....", r"it is a ZIP archive;"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", r"it is a HEIC picture \(convert it to JPEG first\);"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"it is a Git LFS pointer \(run `git lfs pull`\);"),
        (bytes([0, 1, 2, 255, 254]), r"it is not in a picture format \(it begins with bytes 00 01 02 ff fe\);"),
        (b"\xff\xd8\xff", r"the JPEG data is broken, cut short or"),
        (b"\x89PNG\r\n\x1a\n", r"the PNG data is broken, cut short or"),
        (b"GIF89a\0\0\0\0", r"the GIF data is broken, cut short or"),
    ],
)
def test_what_is_not_a_picture(data, reason):
    with pytest.raises(ImageError, match=rf"^Cannot decode the given bytes: {reason}"):
        decode(data)


def test_eps_is_never_run():
    data = encoded(Image.new("RGB", (4, 4)), "EPS")
    with pytest.raises(ImageError, match="it is a PostScript file"):
        decode(data)


def test_a_header_bomb_is_refused_before_decoding(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(60_000, 60_000, 8, 2, b""))
    with pytest.raises(
        ImageError,
        match=r"bomb\.png: its header says 60000 x 60000 = 3,600,000,000 pixels, more than the budget of 178,956,970 ",
    ):
        decode(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF"])
def test_the_budget_is_the_callers(kind):
    data = encoded(Image.new("RGB", (40, 50)), kind)
    assert decode(data, max_pixels=2000).size == (40, 50)
    with pytest.raises(ImageError, match=r"says 40 x 50 = 2,000 pixels, more than the budget of 1,999 "):
        decode(data, max_pixels=1999)


def test_the_budget_does_not_depend_on_pillows_global(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow would refuse above 200
    assert decode(encoded(Image.new("RGB", (40, 50)), "PNG")).size == (40, 50)


def test_png_text_bombs():
    bomb = zlib.compress(bytes(64 * 2**20), 9)
    text = chunk(b"zTXt", b"Comment\0\0" + bomb)
    row = b"\0" + bytes(3)
    for data in (png(1, 1, 8, 2, row, text), png(1, 1, 8, 2, row, after=text)):
        with pytest.raises(
            ImageError,
            match=r"the PNG data is broken, cut short or of an unsupported kind \(Decompressed data too large",
        ):
            decode(data)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(ImageError, match=r"^Cannot decode .*gone\.jpg: no such file\.$"):
        decode(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match=r": it is a folder\.$"):
        decode(tmp_path)
    with pytest.raises(ImageError, match="embedded null"):
        decode("a\0b.jpg")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX files")
def test_pipes_and_broken_links(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match=r": it is not a regular file\.$"):
        decode(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match=r": it is a link to a file that does not exist\.$"):
        decode(tmp_path / "link.jpg")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_damaged_files_give_a_picture_or_an_image_error(kind, damage):
    data = bytearray(encoded(Image.fromarray(noise(12, 10, 3)), kind))
    for share, value in damage:
        data[int(share * len(data))] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = decode(bytes(data), max_pixels=10**6)
        except ImageError:
            return
    assert image.mode == "RGB"
    assert image.width * image.height <= 10**6


# ---- decoding smaller ----


@pytest.mark.parametrize(
    ("size", "at_least", "expected"),
    [
        ((640, 480), (100, 100), (160, 120)),
        ((640, 480), (120, 160), (160, 120)),
        ((640, 480), (121, 160), (320, 240)),
        ((641, 481), (60, 80), (81, 61)),
        ((640, 480), (10, 10), (80, 60)),
        ((640, 480), (241, 1), (640, 480)),
        ((640, 480), (1000, 1000), (640, 480)),
    ],
)
def test_jpegs_are_decoded_at_the_smallest_size_that_covers_what_is_asked(size, at_least, expected):
    data = encoded(Image.new("RGB", size, (10, 200, 30)), "JPEG")
    image = decode(data, at_least=at_least)
    assert image.size == expected
    assert upright_size(image) == size[::-1]
    np.testing.assert_allclose(np.asarray(image)[5, 5], (10, 200, 30), atol=2)


def test_other_formats_and_calls_without_a_size_decode_every_pixel():
    picture = Image.new("RGB", (640, 480))
    for kind in ("PNG", "WEBP", "BMP"):
        assert decode(encoded(picture, kind), at_least=(10, 10)).size == (640, 480)
    image = decode(encoded(picture, "JPEG"))
    assert (image.size, upright_size(image)) == ((640, 480), (480, 640))


@pytest.mark.parametrize("orientation", list(ORIENTED))
def test_a_smaller_picture_is_upright_and_knows_the_size_of_its_original(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.zeros((160, 320, 3), np.uint8)
    stored[:80, :160] = (250, 120, 10)
    data = encoded(Image.fromarray(stored), "JPEG", exif=exif, quality=95)
    whole = decode(data)
    at_least = (80, 40) if orientation >= 5 else (40, 80)
    small = decode(data, at_least=at_least)
    assert (small.height, small.width) == at_least
    assert upright_size(small) == (whole.height, whole.width)
    difference = np.asarray(small, int) - np.asarray(whole.resize(small.size, Image.Resampling.BOX), int)
    assert abs(difference).mean() < 1


def test_a_smaller_picture_deviates_little_after_resizing():
    """Detail at every scale, as in photos: noise whose amplitude falls with its frequency."""
    rng = np.random.default_rng(0)
    layers = [
        Image.fromarray((rng.random((s, s)) * 255).astype(np.uint8)).resize((1024, 1024), 3) for s in (8, 64, 512)
    ]
    photo = sum(np.asarray(layer, float) * w for layer, w in zip(layers, (0.6, 0.3, 0.1), strict=True))
    data = encoded(Image.fromarray(photo.astype(np.uint8)).convert("RGB"), "JPEG", quality=92)
    goal = (128, 128)
    reference = np.asarray(decode(data).resize(goal, Image.Resampling.BICUBIC), int)
    small = decode(data, at_least=(256, 256))
    assert small.size == (256, 256)
    difference = abs(np.asarray(small.resize(goal, Image.Resampling.BICUBIC), int) - reference)
    assert difference.mean() < 1
    assert difference.max() < 16


def test_a_cut_jpeg_is_refused_at_every_scale():
    data = encoded(Image.fromarray(noise(256, 256, 3)), "JPEG")
    for at_least in (None, (128, 128), (20, 20)):
        with pytest.raises(ImageError, match=r"^Cannot decode shard\.tar/a\.jpg: the JPEG data is broken, cut short"):
            decode(data[: len(data) // 2], at_least=at_least, name="shard.tar/a.jpg")


# ---- tensors ----


def test_tensors():
    a = noise(5, 7, 3)
    as_bytes = to_uint8_tensor(Image.fromarray(a))
    assert as_bytes.dtype == torch.uint8
    assert as_bytes.is_contiguous()
    np.testing.assert_array_equal(as_bytes.numpy(), a.transpose(2, 0, 1))
    as_floats = to_tensor(Image.fromarray(a))
    assert as_floats.dtype == torch.float32
    np.testing.assert_array_equal(as_floats.numpy(), a.transpose(2, 0, 1).astype(np.float32) / np.float32(255))
    with pytest.raises(ImageError, match="Expected an RGB picture as `decode` returns it, got mode 'L'"):
        to_tensor(Image.new("L", (2, 2)))
