"""Release formats, read back by ourselves and by those they are made for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from e2h.data.exports import folder_names, read_hf_parquet, write_hf_parquet, write_image_folder, write_npz
from e2h.data.images import decode
from e2h.errors import InputError

NAMES = ["cat", "dog", "bird"]


@pytest.fixture(params=[1, 3])
def images(request: pytest.FixtureRequest, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (7, 8, 8, request.param), dtype=np.uint8)


@pytest.fixture
def labels() -> np.ndarray:
    return np.array([2, 0, 1, 0, 2, 1, 1])


def test_hf_parquet_round_trip(tmp_path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    write_hf_parquet(tmp_path / "0.parquet", images[:4], labels[:4], NAMES)
    write_hf_parquet(tmp_path / "1.parquet", images[4:], labels[4:], NAMES, {"round": np.arange(3)})
    found, found_labels = read_hf_parquet([tmp_path / "0.parquet", tmp_path / "1.parquet"])
    np.testing.assert_array_equal(found, images)
    np.testing.assert_array_equal(found_labels, labels)


def test_datasets_restores_the_features(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    write_hf_parquet(tmp_path / "a.parquet", images, labels, NAMES, {"seed": np.arange(7, dtype=np.int64)})
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "a.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(loaded.features["image"], datasets.Image)
    assert loaded.features["label"] == datasets.ClassLabel(names=NAMES)
    assert loaded.features["seed"] == datasets.Value("int64")
    assert loaded["label"][:] == labels.tolist()
    pixels = [np.asarray(row["image"]).reshape(images.shape[1:]) for row in loaded]
    np.testing.assert_array_equal(pixels, images)
    assert loaded[3]["seed"] == 3


def test_hf_parquet_is_a_source(tmp_path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    from e2h.config import DataConfig
    from e2h.data.sources import open_source

    write_hf_parquet(tmp_path / "a.parquet", images, labels, NAMES)
    source = open_source(DataConfig(source="parquet", path=str(tmp_path / "a.parquet"), channels=images.shape[3]))
    assert source.class_names == tuple(NAMES)


def test_reading_nothing_or_unequal_images(tmp_path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    with pytest.raises(InputError, match="no images"):
        read_hf_parquet([])
    write_hf_parquet(tmp_path / "a.parquet", images, labels, NAMES)
    write_hf_parquet(tmp_path / "b.parquet", images[:, :4, :4], labels, NAMES)
    with pytest.raises(InputError, match=r"\(4, 4, .*\(8, 8"):
        read_hf_parquet([tmp_path / "a.parquet", tmp_path / "b.parquet"])


@pytest.mark.parametrize("length", [0, 10, -5])
def test_a_cut_file_is_refused_by_name(tmp_path: Path, images: np.ndarray, labels: np.ndarray, length: int) -> None:
    path = tmp_path / "images.parquet"
    write_hf_parquet(path, images, labels, NAMES)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=f"file={path}: expected the bytes that were written; delete it"):
        read_hf_parquet([path])


def test_image_folder(tmp_path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    write_image_folder(tmp_path / "out", images, labels, NAMES)
    assert {path.name: len(list(path.iterdir())) for path in (tmp_path / "out").iterdir()} == {
        "cat": 2,
        "dog": 3,
        "bird": 2,
    }
    np.testing.assert_array_equal(decode((tmp_path / "out/dog/000002.png").read_bytes()), images[2])
    with pytest.raises(InputError, match="expected no such folder"):
        write_image_folder(tmp_path / "out", images, labels, NAMES)


def test_failed_image_folder_leaves_nothing(tmp_path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    with pytest.raises(IndexError):
        write_image_folder(tmp_path / "out", images, labels + 1, NAMES)
    assert list(tmp_path.iterdir()) == []


def test_folder_names_stay_inside_and_distinct() -> None:
    assert folder_names(["../../etc", "a/b", "no cancer"]) == ["_.._etc", "a_b", "no cancer"]
    assert folder_names(["a/b", "a:b"]) == ["0_a_b", "1_a_b"]
    assert folder_names(["..", "x"]) == ["0_", "1_x"]


def test_npz(tmp_path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    write_npz(tmp_path / "samples.npz", images, labels)
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(archive["arr_0"], images)
        np.testing.assert_array_equal(archive["arr_1"], labels)
