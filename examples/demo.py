"""Features of a few real photos, end to end: official checkpoint format, `amradio features`, pictures of the maps.

The checkpoint is made here, with random weights: the demo shows that everything is installed and works together, not
what a trained model sees. Give `--model c-radio_v4-h` for real features; that downloads its weights.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")  # inside the scikit-image package


def write_random_checkpoint(path: Path) -> None:
    """A tiny RADIO model with one adaptor, in the layout of the published .pth.tar files."""
    import torch

    import amradio
    from amradio.models.configs import AdaptorConfig, HeadConfig, RadioConfig, ViTConfig

    torch.manual_seed(0)
    trunk = ViTConfig(
        embed_dim=64,
        depth=4,
        num_heads=4,
        mlp_hidden_dim=256,
        position_grid=(32, 32),
        num_cls_tokens=1,
        num_registers=7,
    )
    head = HeadConfig(input_dim=64, hidden_dim=64, output_dim=32)
    teacher = {"name": "clip", "type": "openai_clip"}
    config = RadioConfig(
        backbone=trunk, adaptors={"clip": AdaptorConfig(head_idx=0, summary=head, features=head)}, teachers=(teacher,)
    )
    amradio.save(amradio.RadioModel(config, adaptors=["clip"]).eval(), path, layout="official")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--model", help="a published version or a checkpoint, instead of the random one")
    options = parser.parse_args()

    from skimage import data

    from amradio.cli import main as amradio_command

    shutil.rmtree(options.output, ignore_errors=True)
    photos = options.output / "photos"
    photos.mkdir(parents=True)
    for name in PHOTOS:
        shutil.copyfile(Path(data.__file__).parent / name, photos / name)

    model = options.model
    if model is None:
        model = str(options.output / "random-weights.pth.tar")
        print("PLUMBING ONLY: this model has random weights, so its features and pictures mean nothing.")
        write_random_checkpoint(Path(model))
    features = options.output / "features"
    code = amradio_command(
        ["features", str(photos), "-o", str(features), "--model", model, "--resolution", "512", "--pca"]
    )
    if code == 0:
        print(f"\nphotos:    {photos}")
        print(f"index:     {features / 'index.parquet'}")
        print(f"features:  {features / 'features'}")
        print(f"pictures:  {features / 'pca'}  (photo | principal components of its feature map)")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
