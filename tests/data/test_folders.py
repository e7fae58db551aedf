"""Image folders and zips: what is a class, what is a split, what is refused."""

from __future__ import annotations

import errno
import os
import zipfile
from pathlib import Path

import pytest

from e2h.config import DataConfig
from e2h.data.folders import READABLE
from e2h.data.images import decode
from e2h.data.sources import is_test, open_source, read_shard
from e2h.errors import InputError

PETS = [f"{animal}/{index:03d}.png" for animal in ("cats", "dogs") for index in range(12)]


def config(path: Path, **values: object) -> DataConfig:
    return DataConfig(source="image_folder", path=str(path), **values)


def pack(folder: Path, archive: Path, prefix: str = "", method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(archive, "w", method) as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, prefix + path.relative_to(folder).as_posix())
    return archive


def names_and_labels(data: DataConfig) -> dict[str, int]:
    return {record.name: record.label for shard in open_source(data).shards for record in read_shard(shard, data)}


def test_one_folder_a_class(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, PETS)
    data = config(tmp_path, records_per_shard=10)
    source = open_source(data)
    assert source.class_names == ("cats", "dogs")
    assert [(shard.split, len(shard)) for shard in source.shards] == [("all", 10), ("all", 10), ("all", 4)]
    assert source.num_test == sum(is_test(name, data.test_fraction) for name in PETS)
    assert source.num_train + source.num_test == 24
    assert names_and_labels(data) == {name: int(name.startswith("dogs")) for name in PETS}
    assert decode(next(read_shard(source.shards[0], data)).content).shape == (8, 8, 3)


def test_suffixes_and_hidden_files(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, ["a/1.PNG", "a/deep/er/2.jpeg", "b/3.webp", "b/4.pgm", ".b/5.png", "b/.6.png"])
    (tmp_path / "a/readme.txt").write_text("no image")
    (tmp_path / "a/1.2.840").mkdir()
    (tmp_path / "a/1.2.840/IM1").write_text("DICOM, perhaps")
    data = config(tmp_path, test_fraction=0.0)
    assert names_and_labels(data) == {"a/1.PNG": 0, "a/deep/er/2.jpeg": 0, "b/3.webp": 1, "b/4.pgm": 1}
    (said,) = open_source(data).remarks
    assert said == "files left out and not counted, for their endings (.txt, none): 2, such as a/1.2.840/IM1"


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_own_split(tmp_path: Path, write_images, test: str) -> None:
    write_images(tmp_path, [f"{split}/{name}" for split in ("train", test) for name in PETS])
    source = open_source(config(tmp_path))
    assert (source.num_train, source.num_test) == (24, 24)
    assert source.class_names == ("cats", "dogs")
    assert {(shard.split, next(shard.record_names())) for shard in source.shards} == {
        ("train", "train/cats/000.png"),
        ("test", f"{test}/cats/000.png"),
    }


def test_validation_is_unused_beside_test(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, [f"{split}/{name}" for split in ("train", "val", "test") for name in PETS])
    source = open_source(config(tmp_path))
    assert (source.num_train, source.num_test) == (24, 24)
    assert source.remarks == ("24 images below val are left out: another folder is the test split",)


def test_train_alone_is_no_split_and_may_be_a_class_name(tmp_path: Path, write_images) -> None:
    write_images(tmp_path / "only", [f"train/{name}" for name in PETS])
    assert open_source(config(tmp_path / "only")).class_names == ("cats", "dogs")
    write_images(tmp_path / "vehicles", [f"{kind}/{i}.png" for kind in ("bus", "train") for i in range(12)])
    assert open_source(config(tmp_path / "vehicles")).class_names == ("bus", "train")


def test_folder_beside_the_splits_is_refused(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, [f"{split}/{name}" for split in ("train", "test", "more") for name in PETS])
    with pytest.raises(InputError, match=r"found more/cats/000.png"):
        open_source(config(tmp_path))


def test_unlabelled_is_one_class(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, ["1.png", "2.png", "x/3.png"])
    source = open_source(config(tmp_path, labelled=False, test_fraction=0.0))
    assert (source.class_names, source.num_train) == (("image",), 3)
    with pytest.raises(InputError, match=r"found 1\.png outside.*data\.labelled=false"):
        open_source(config(tmp_path))


def test_class_names_order_or_rename(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, PETS)
    swapped = config(tmp_path, class_names=["dogs", "cats"])
    assert names_and_labels(swapped)["dogs/000.png"] == 0
    assert open_source(swapped).remarks == ()
    renamed = config(tmp_path, class_names=["Katze", "Hund"])
    assert open_source(renamed).class_names == ("Katze", "Hund")
    assert names_and_labels(renamed)["dogs/000.png"] == 1
    (said,) = open_source(renamed).remarks
    assert said == "data.class_names renames folders, in their sorted order: cats is Katze, dogs is Hund"
    with pytest.raises(InputError, match=r"data.class_names.*expected 2 names.*cats, dogs"):
        open_source(config(tmp_path, class_names=["dogs"]))


def test_numbers_are_sorted_as_numbers(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, [f"{label}/{index}.png" for label in range(11) for index in range(2)])
    assert open_source(config(tmp_path, test_fraction=0.0)).class_names == tuple(str(label) for label in range(11))


def test_empty_and_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    with pytest.raises(InputError, match=r"data.path=.*found none"):
        open_source(config(tmp_path))
    with pytest.raises(InputError, match=r"data.path=.*found nothing"):
        open_source(config(tmp_path / "none"))


@pytest.mark.parametrize("tops", [["Training", "Testing"], ["train", "valid"], ["TEST", "Train", "Validation"]])
def test_a_split_by_other_names_is_not_taken_for_classes(tmp_path: Path, write_images, tops: list[str]) -> None:
    write_images(tmp_path, [f"{top}/{name}" for top in tops for name in PETS])
    with pytest.raises(InputError, match=rf"found {', '.join(sorted(tops))}; rename them train and test"):
        open_source(config(tmp_path))
    assert open_source(config(tmp_path, labelled=False)).num_train > 0


def test_a_path_one_level_too_high_is_refused_with_the_way_down(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, [f"pets/{name}" for name in PETS])
    with pytest.raises(InputError, match="found pets alone with folders in it; add pets to the path"):
        open_source(config(tmp_path))
    assert open_source(config(tmp_path / "pets")).class_names == ("cats", "dogs")
    assert open_source(config(tmp_path, class_names=["pets"])).class_names == ("pets",)  # that one class is meant
    write_images(tmp_path / "split", [f"{split}/images/{name}" for split in ("train", "test") for name in PETS])
    with pytest.raises(InputError, match="found images alone with folders in it; move those in images up, or set"):
        open_source(config(tmp_path / "split"))


def test_folders_within_classes_belong_to_them(tmp_path: Path, write_images) -> None:
    write_images(
        tmp_path, [f"{top}/{year}/{index}.png" for top in ("cat", "dog") for year in "12" for index in range(4)]
    )
    assert open_source(config(tmp_path)).class_names == ("cat", "dog")


def test_class_with_one_training_image(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, [*PETS, "birds/1.png"])
    with pytest.raises(InputError, match="class 'birds' has 1"):
        open_source(config(tmp_path, test_fraction=0.0))
    write_images(tmp_path / "own", [f"{split}/{name}" for split in ("train", "test") for name in PETS])
    write_images(tmp_path / "own", [f"test/birds/{index}.png" for index in range(5)])
    with pytest.raises(InputError, match="class 'birds' has 0"):
        open_source(config(tmp_path / "own"))


@pytest.mark.parametrize(
    ("link", "target", "named"),
    [
        ("cats/loop", "..", "cats/loop and the folder itself"),
        ("up", "../..", "up and the folder itself"),
        ("latest", "dogs", "latest and dogs"),
        ("again", "cats/deep", "again and cats/deep"),
        ("dogs/copy.png", "../cats/000.png", "dogs/copy.png and cats/000.png"),
    ],
)
def test_a_link_that_lists_images_twice_is_refused(tmp_path: Path, write_images, link, target, named) -> None:
    folder = write_images(tmp_path / "pets", [*PETS, "cats/deep/0.png"])
    assert open_source(config(folder)).num_train > 0
    (folder / link).symlink_to(target)
    with pytest.raises(InputError, match=f"one way to every image, {named} lead to the same; remove the link {link}"):
        open_source(config(folder))


def test_two_links_to_one_place_elsewhere_are_refused(tmp_path: Path, write_images) -> None:
    write_images(tmp_path / "store", PETS)
    folder = write_images(tmp_path / "pets", ["bird/0.png", "bird/1.png"])
    (folder / "cats").symlink_to(tmp_path / "store/cats")
    assert open_source(config(folder, test_fraction=0.0)).num_train == 14
    (folder / "dogs").symlink_to(tmp_path / "store")
    with pytest.raises(InputError, match="cats and dogs/cats lead to the same; remove the link cats"):
        open_source(config(folder))


def test_images_may_be_links_to_a_store(tmp_path: Path, write_images) -> None:
    folder, store = tmp_path / "pets", write_images(tmp_path / "pets/.store", PETS)
    for name in PETS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(store / name)
    assert open_source(config(folder, test_fraction=0.0)).num_train == 24
    (folder / "dogs/more.png").symlink_to(store / PETS[0])
    with pytest.raises(InputError, match=r"dogs/more.png and cats/000.png lead to the same"):
        open_source(config(folder))


@pytest.mark.parametrize("prefix", ["", "pets/"])
def test_zip_reads_like_the_folder(tmp_path: Path, write_images, prefix: str) -> None:
    folder = write_images(tmp_path / "folder", [f"{split}/{name}" for split in ("train", "test") for name in PETS])
    data = config(pack(folder, tmp_path / "pets.zip", prefix), records_per_shard=20)
    plain = config(folder, records_per_shard=20)
    source = open_source(data)
    assert (source.num_train, source.num_test, source.class_names) == (24, 24, ("cats", "dogs"))
    for shard, other in zip(source.shards, open_source(plain).shards, strict=True):
        for record, expected in zip(read_shard(shard, data), read_shard(other, plain), strict=True):
            assert (record.name, record.label) == (prefix + expected.name, expected.label)
            assert record.content == expected.content


@pytest.mark.parametrize(
    "name",
    ["../evil.png", "cats/../../evil.png", "/etc/evil.png", "a\\..\\evil.png", "C:/evil.png", "../readme.txt", "../"],
)
def test_zip_entry_that_leaves_the_folder(tmp_path: Path, write_images, name: str) -> None:
    archive = pack(write_images(tmp_path / "folder", PETS), tmp_path / "pets.zip")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(name, b"evil")
    with pytest.raises(InputError, match="leaves it"):
        open_source(config(archive))


def test_encrypted_zip(tmp_path: Path, write_images) -> None:
    archive = pack(write_images(tmp_path / "folder", PETS), tmp_path / "pets.zip")
    content = bytearray(archive.read_bytes())
    start = content.index(b"PK\x01\x02")
    content[start + 8] |= 1  # the flag of the first entry in the central directory
    archive.write_bytes(content)
    with pytest.raises(InputError, match="is encrypted"):
        open_source(config(archive))


def test_zip_entry_that_occurs_twice(tmp_path: Path, write_images) -> None:
    archive = pack(write_images(tmp_path / "folder", PETS), tmp_path / "pets.zip")
    with zipfile.ZipFile(archive, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr(PETS[0], b"again")
    with pytest.raises(InputError, match=f"{PETS[0]} occurs twice"):
        open_source(config(archive))


def test_file_that_is_no_zip(tmp_path: Path) -> None:
    (tmp_path / "pets.zip").write_bytes(b"no zip")
    with pytest.raises(InputError, match="a folder or a zip file"):
        open_source(config(tmp_path / "pets.zip"))


def test_zip_bomb_is_refused_by_its_declared_size(tmp_path: Path, write_images, monkeypatch) -> None:
    archive = pack(write_images(tmp_path / "folder", PETS), tmp_path / "pets.zip")
    monkeypatch.setattr("e2h.data.folders.MAX_FILE_BYTES", 1000)
    with zipfile.ZipFile(archive, "a", compression=zipfile.ZIP_DEFLATED) as file:
        file.writestr("cats/bomb.png", b"\0" * 1001)
    with pytest.raises(InputError, match=r"cats/bomb\.png: expected at most 1000 bytes an image, found 1001"):
        open_source(config(archive))


def test_paths_that_no_file_system_takes(tmp_path: Path, write_images, bucket: str) -> None:
    write_images(tmp_path, PETS)
    assert open_source(config(tmp_path)).num_train > 0
    (tmp_path / PETS[0]).rename(os.fsdecode(os.fsencode(tmp_path) + b"/cats/\xe9.png"))
    with pytest.raises(InputError, match=r"expected names in UTF-8, found b'.*/cats/\\xe9\.png'; rename it"):
        open_source(config(tmp_path))
    with pytest.raises(InputError, match=r"^data\.path=.*: expected names in UTF-8"):
        open_source(config(Path(os.fsdecode(b"/\xe9"))))
    with pytest.raises(InputError, match=r"^data\.path=s3://images//pets: .*Empty path component.*; correct the path"):
        open_source(DataConfig(source="image_folder", path=f"{bucket}//pets"))


@pytest.mark.parametrize("method", READABLE)
def test_damaged_zip_entry_has_no_content(tmp_path: Path, write_images, method: int) -> None:
    archive = pack(write_images(tmp_path / "folder", PETS), tmp_path / "pets.zip", method=method)
    data, content = config(archive), bytearray(archive.read_bytes())
    start = content.index(PETS[0].encode()) + len(PETS[0])
    content[start + 20 : start + 60] = bytes(40)
    archive.write_bytes(content)
    records = [record for shard in open_source(data).shards for record in read_shard(shard, data)]
    assert [record.name for record in records if not record.content] == [PETS[0]]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), OSError("AWS Error NETWORK_CONNECTION")])
def test_a_zip_that_can_t_be_read_is_no_damaged_image(tmp_path: Path, write_images, monkeypatch, error) -> None:
    """Left out as corrupt, it would change the data set for as long as a disk or a store is away."""

    def fail(*_: object) -> None:
        raise error

    data = config(pack(write_images(tmp_path / "folder", PETS), tmp_path / "pets.zip"))
    shard = open_source(data).shards[0]
    monkeypatch.setattr(zipfile.ZipFile, "read", fail)
    with pytest.raises(InputError, match=f"pets.zip is not .*{error.args[-1]}.*; fetch again"):
        list(read_shard(shard, data))
