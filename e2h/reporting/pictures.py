"""Images inside the report, as data URIs: nothing is requested."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from e2h.data.images import decode, encode_png

MAX_CLASSES = 20


def data_uri(png: bytes) -> str:
    """A PNG file as the `src` of an image."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def class_strips(folder: Path, class_names: Sequence[str], what: str, per_class: int = 10) -> list[dict[str, Any]]:
    """The first images of each class, for at most 20 classes.

    Args:
      folder: holds Parquet files with columns image (struct of bytes, path) and label; may be missing.
      class_names: in label order; one name for images without label.
      what: what the images are, for the alternative text ("synthetic images").

    Returns:
      One dictionary a class that has images: "name", "sources" (data URIs of PNG files), "alt".
    """
    found: dict[int, list[str]] = {label: [] for label in range(min(len(class_names), MAX_CLASSES))}
    for given, content in _labelled(folder):
        label = max(given, 0)  # -1: of all records together
        if len(found.get(label, range(per_class))) < per_class:
            found[label].append(data_uri(encode_png(decode(content))))
            if all(len(sources) == per_class for sources in found.values()):
                break
    return [
        {"name": name, "sources": sources, "alt": f"{len(sources)} {what} of class {name}"}
        for name, sources in zip(map(str, class_names), found.values(), strict=False)
        if sources
    ]


def _labelled(folder: Path) -> Iterator[tuple[int, bytes]]:
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(256, columns=["image", "label"]):
                rows = batch.to_pylist()
                yield from ((int(row["label"]), row["image"]["bytes"]) for row in rows)
