"""Builders of small sources, and the whole way from settings to a prepared set in this process."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from e2h.config import DataConfig
from e2h.data.images import encode_png
from e2h.data.prepare import finish_prepared, prepare_shard
from e2h.data.sources import open_source
from e2h.data.storage import Manifest

SHARED = Path(os.environ.get("E2H_SHARED", Path(__file__).parents[3] / "shared")) / "data"


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """A folder of real data, or a skip where it is absent."""

    def find(name: str) -> Path:
        folder = SHARED / name
        if not folder.is_dir():
            pytest.skip(f"real data is absent: {folder}")
        return folder

    return find


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def prepare() -> Callable[[DataConfig, Path], Manifest]:
    """Every shard in order, then the checks: what the prepare job does, in this process."""

    def run(data: DataConfig, folder: Path) -> Manifest:
        source = open_source(data)
        stats = [prepare_shard(shard, data, folder, index) for index, shard in enumerate(source.shards)]
        return finish_prepared(folder, source, data, stats)

    return run


@pytest.fixture
def write_images(rng: np.random.Generator) -> Callable[..., Path]:
    """PNG files of random pixels: `write_images(folder, ["cats/0.png", ...], side)`."""

    def write(folder: Path, names: list[str], side: int = 8, channels: int = 3) -> Path:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(rng.integers(0, 256, (side, side, channels), dtype=np.uint8)))
        return folder

    return write


@pytest.fixture
def write_idx(rng: np.random.Generator) -> Callable[..., dict[str, np.ndarray]]:
    """The four MNIST files with random pixels and labels 0, 1, 2, ...; returns the arrays by file name."""

    def write(folder: Path, rows: dict[str, int], suffix: str = "", side: int = 8) -> dict[str, np.ndarray]:
        arrays = {}
        for split, count in rows.items():
            arrays[f"{split}-images-idx3-ubyte"] = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
            arrays[f"{split}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
        for name, array in arrays.items():
            content = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()
            (folder / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
        return arrays

    return write
