"""The README's picture from a run's releasable images: `python docs/picture.py RUN_DIR docs/demo.png`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from e2h.data.exports import read_hf_parquet
from e2h.data.images import grid, upscale

ROWS = 3
SIDE = 56  # pixels of an image in the picture, at least
LABEL_HEIGHT = 30


def strip(title: str, files: list[Path]) -> Image.Image:
    """The first images of each class in columns, below a title."""
    images, labels = read_hf_parquet(files)
    classes = np.unique(labels)
    rows = [np.flatnonzero(labels == label)[:ROWS] for label in classes]
    picked = np.stack([images[places] for places in rows], axis=1).reshape(-1, *images.shape[1:])
    sheet = grid(np.stack([upscale(image, SIDE) for image in picked]), len(classes), padding=4)
    picture = Image.new(
        "L" if images.shape[-1] == 1 else "RGB", (sheet.shape[1], sheet.shape[0] + LABEL_HEIGHT), "white"
    )
    picture.paste(Image.fromarray(sheet.squeeze()), (0, LABEL_HEIGHT))
    ImageDraw.Draw(picture).text((4, 6), title, "black", ImageFont.load_default(17))
    return picture


def main(run_dir: str, target: str) -> None:
    run = Path(run_dir)
    strips = [
        strip("Central images: noisy averages, released first", [run / "central" / "images.parquet"]),
        strip("Synthetic images: from the model after DP-SGD", sorted((run / "release" / "data").glob("*.parquet"))),
    ]
    picture = Image.new(strips[0].mode, (strips[0].width, sum(one.height for one in strips)), "white")
    for index, one in enumerate(strips):
        picture.paste(one, (0, index * strips[0].height))
    picture.save(target, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
