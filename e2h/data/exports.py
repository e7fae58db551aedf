"""Images in the forms that others read: Hugging Face style Parquet, an image folder, npz.

What is written here is meant for release and gets ordinary permissions: pass synthetic images only.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from e2h.data import filesystem
from e2h.data.images import decode, encode_png
from e2h.data.storage import DAMAGED_FILE, open_shard
from e2h.errors import InputError

ROW_GROUP = 1000  # images; small groups let the Hub's viewer page through
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_hf_parquet(
    path: filesystem.Location,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    extra: Mapping[str, np.ndarray] | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes one Parquet file that `datasets.load_dataset("parquet", data_files=...)` opens with its feature types.

    Args:
      path: where to; replaced atomically.
      images: uint8 [N, H, W, C], stored as PNG.
      labels: whole numbers [N] in [0, len(class_names)).
      class_names: names of the ClassLabel feature.
      extra: further columns of numbers [N], e.g. the round of a central image.
      notes: entries of the file's metadata.
    """
    extra = dict(extra or {})
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": list(class_names), "_type": "ClassLabel"},
        **{name: {"dtype": str(values.dtype), "_type": "Value"} for name, values in extra.items()},
    }
    contents = [{"bytes": encode_png(image), "path": None} for image in images]
    columns = {
        "image": pa.array(contents, IMAGE_TYPE),
        "label": pa.array(np.asarray(labels, dtype=np.int64)),
        **{name: pa.array(values) for name, values in extra.items()},
    }
    described = {"huggingface": json.dumps({"info": {"features": features}}), **(notes or {})}
    table = pa.table(columns).replace_schema_metadata(described)
    with filesystem.atomic_writer(path, filesystem.PUBLIC) as file:
        pq.write_table(table, file, row_group_size=ROW_GROUP)


def read_hf_parquet(paths: Iterable[filesystem.Location]) -> tuple[np.ndarray, np.ndarray]:
    """Reads files of `write_hf_parquet` in the given order.

    Returns:
      images uint8 [N, H, W, C] and labels int64 [N].

    Raises:
      InputError: if there is no image, a file is damaged, or not all images have one shape.
    """
    images: list[np.ndarray] = []
    labels: list[int] = []
    for path in paths:
        with open_shard(path, DAMAGED_FILE) as file:
            for batch in file.iter_batches(batch_size=ROW_GROUP, columns=["image", "label"]):
                images += [decode(content) for content in batch.column("image").field("bytes").to_pylist()]
                labels += batch.column("label").to_pylist()
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise InputError(f"paths: expected one shape, found {sorted(shapes) or 'no images'}; check the Parquet files")
    return np.stack(images), np.array(labels, dtype=np.int64)


def write_image_folder(
    folder: str | os.PathLike[str], images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> None:
    """Writes `<folder>/<class name>/<index>.png`; the folder appears only when it is complete.

    Characters of a class name that have no place in a file name become "_".

    Args:
      folder: local; must not exist.
      images: uint8 [N, H, W, C].
      labels: whole numbers [N].
      class_names: in label order.

    Raises:
      InputError: if the folder exists.
    """
    target = Path(folder).absolute()
    if target.exists():
        raise InputError(f"folder={target}: expected no such folder; choose another or remove it")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    names = folder_names(class_names)
    try:
        for name in names:
            (temporary / name).mkdir(parents=True)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            (temporary / names[label] / f"{index:06d}.png").write_bytes(encode_png(image))
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def folder_names(class_names: Sequence[str]) -> list[str]:
    """One safe and distinct folder name for each class."""
    safe = [re.sub(r"[^\w .-]", "_", name).strip(". ") for name in class_names]
    distinct = all(safe) and len({name.lower() for name in safe}) == len(safe)
    return safe if distinct else [f"{index}_{name}" for index, name in enumerate(safe)]


def write_npz(path: filesystem.Location, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes `arr_0` (images uint8 [N, H, W, C]) and `arr_1` (labels int64 [N]), the form of the FID tools."""
    with filesystem.atomic_writer(path, filesystem.PUBLIC) as file:
        np.savez(file, images, np.asarray(labels, dtype=np.int64))
