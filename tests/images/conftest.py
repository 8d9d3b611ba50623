import io
import tarfile

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def encoded():
    """Makes the content of a picture's file, all of one colour."""

    def make(value=0, fmt="PNG", size=(5, 4)):
        file = io.BytesIO()
        Image.new("RGB", size, (value % 256, value // 256 % 256, 7)).save(file, fmt)
        return file.getvalue()

    return make


@pytest.fixture
def colour():
    """Tells the number that `encoded` made a picture of."""

    def read(source):
        pixels = np.asarray(source.decode(max_pixels=1000, background=(0, 0, 0)))
        return int(pixels[0, 0, 0]) + 256 * int(pixels[0, 0, 1])

    return read


@pytest.fixture
def tree(tmp_path, encoded):
    """Makes a folder of pictures from their paths; returns the folder."""

    def make(paths, root="photos"):
        for i, path in enumerate(paths):
            file = tmp_path / root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(i))
        return tmp_path / root

    return make


@pytest.fixture
def write_tar(tmp_path):
    """Writes a tar file from pairs of a name and a content, with Python's own library; returns its path."""

    def write(name, files, fmt=tarfile.GNU_FORMAT):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=fmt) as archive:
            for member, content in files:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return path

    return write
