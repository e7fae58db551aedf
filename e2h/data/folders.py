"""A folder or zip of image files: one sub-folder a class, optionally under train/ and test/."""

from __future__ import annotations

import lzma
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from e2h.config import DataConfig
from e2h.data import filesystem
from e2h.data.links import refuse_double_links
from e2h.data.records import (
    MAX_FILE_BYTES,
    RawRecord,
    Shard,
    Source,
    choose_class_names,
    cut,
    few,
    make_source,
    path_error,
    record_split,
)
from e2h.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TEST_NAMES = ("test", "val", "validation")  # the first that is there is the test split, the others stay unused
SPLIT_NAMES = {"train", "training", *TEST_NAMES, "testing", "valid", "dev", "eval"}  # no classes, however written
ENCRYPTED = 0x1 | 0x40  # flag bits: the old and the strong encryption
READABLE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)
BZIP2_DAMAGED = "Invalid data stream"  # all that tells bz2's OSError from one of the disk or of a store

Parts = dict[str, tuple[str, ...]]  # a record's name -> its path below the root, in parts


def open_folder(data: DataConfig) -> Source:
    """Lists the image files; hidden files are ignored, other suffixes too, with a remark.

    Raises:
      InputError: no images, images outside a class folder, a class with fewer than two training images, a link by
        which images are listed twice, a zip entry that leaves the folder, is encrypted or occurs twice.
    """
    images, others = _list_images(data)
    groups = _split_groups(images, data)
    _refuse_wrong_level(groups, data)
    labels, names = _label_folders(groups, data)
    shards: list[Shard] = []
    for split, group in groups.items():
        members = tuple((name, labels[_class_folder(parts, data)]) for name, parts in group.items())
        for start, stop in cut(len(members), data.records_per_shard):
            shards.append(Shard(split, names, str(data.path), "", start, stop, members=members[start:stop]))
    _check_classes(shards, names, data)
    remarks = [*_left_out(others), *_unused(images, groups), *_renamed(labels, names)]
    return replace(make_source(shards, names, data), remarks=tuple(remarks))


def _left_out(others: list[str]) -> Iterator[str]:
    if others:
        bases = [name.rpartition("/")[2] for name in others]
        endings = sorted({"." + base.rpartition(".")[2] if "." in base else "none" for base in bases})
        yield f"files left out and not counted, for their endings ({few(endings)}): {len(others)}, such as {others[0]}"


def _unused(images: Parts, groups: dict[str, Parts]) -> Iterator[str]:
    unused = len(images) - sum(map(len, groups.values()))
    if unused:
        tops = sorted({images[name][0] for name in set(images).difference(*groups.values())})
        yield f"{unused} images below {', '.join(tops)} are left out: another folder is the test split"


def _renamed(labels: dict[str, int], names: tuple[str, ...]) -> Iterator[str]:
    pairs = [f"{folder} is {names[label]}" for folder, label in labels.items() if folder != names[label]]
    if pairs and len(labels) > 1:
        yield f"data.class_names renames folders, in their sorted order: {few(pairs)}"


def _list_images(data: DataConfig) -> tuple[Parts, list[str]]:
    """The images, and the names of the other files."""
    path = str(data.path)
    is_zip = filesystem.kind(path) == "file"
    refuse_double_links(data, SUFFIXES)
    files = _list_zip(data) if is_zip else filesystem.list_files(path)
    images = [(name, size) for name, size in files if name.lower().endswith(SUFFIXES)]
    if not images:
        raise path_error(data, f"images ({' '.join(SUFFIXES)}), found none")
    for name, size in images:
        if size > MAX_FILE_BYTES:
            raise InputError(f"image={name}: expected at most {MAX_FILE_BYTES} bytes an image, found {size}; remove it")
    parts = {name: tuple(name.split("/")) for name, _ in images}
    others = [name for name, _ in files if name not in parts]
    return _without_wrapper(parts) if is_zip else parts, others


def _without_wrapper(parts: Parts) -> Parts:
    """Archives often hold the folder itself: drops the one top folder if every image lies at least two levels below."""
    single = len({path[0] for path in parts.values()}) == 1
    return {name: path[1:] for name, path in parts.items()} if single and min(map(len, parts.values())) > 2 else parts


def _list_zip(data: DataConfig) -> list[tuple[str, int]]:
    with _open_zip(data) as archive:
        entries = archive.infolist()
    for entry in entries:
        _check_entry(entry, data)
    entries = [entry for entry in entries if not entry.is_dir()]
    twice = [name for name, count in Counter(entry.filename for entry in entries).items() if count > 1]
    if twice:
        raise path_error(data, f"each zip entry once, {twice[0]} occurs twice", "pack it again")
    return sorted((entry.filename, entry.file_size) for entry in entries if filesystem.is_visible(entry.filename))


def _check_entry(entry: zipfile.ZipInfo, data: DataConfig) -> None:
    name = entry.orig_filename  # as stored, before Python cuts or repairs it
    if re.match(r"/|[A-Za-z]:", name) or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise path_error(data, f"zip entries inside the folder, {name!r} leaves it", "pack it again")
    if entry.flag_bits & ENCRYPTED:
        raise path_error(data, f"a zip without encryption, {name} is encrypted", "unpack it yourself first")
    if entry.compress_type not in READABLE:
        raise path_error(data, f"a common zip compression, {name} has another", "pack it again")


@contextmanager
def _open_zip(data: DataConfig) -> Iterator[zipfile.ZipFile]:
    with filesystem.open_input(str(data.path)) as file:
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise path_error(data, f"a folder or a zip file ({error})") from error
        with archive:
            yield archive


def _split_groups(parts: Parts, data: DataConfig) -> dict[str, Parts]:
    """By split; the split folder is taken off the paths."""
    tops = {path[0] for path in parts.values() if len(path) > 1}
    test = next((name for name in TEST_NAMES if name in tops), None)
    if "train" not in tops or (test is None and tops != {"train"}):
        return {"all": parts}
    for name, path in parts.items():
        if path[0] not in ("train", *TEST_NAMES):
            raise path_error(data, f"images below train/ and {test or 'test'}/ only, found {name}", "move it")
    below = {top: {name: path[1:] for name, path in parts.items() if path[0] == top} for top in ("train", test)}
    return {"train": below["train"], "test": below[test]} if test else {"all": below["train"]}


def _refuse_wrong_level(groups: dict[str, Parts], data: DataConfig) -> None:
    """Folders of folders are no classes: they are a split by other names, or the path is one level too high."""
    paths = [path for group in groups.values() for path in group.values()]
    tops = sorted({path[0] for path in paths})
    if not data.labelled or min(map(len, paths)) < 3 or len(data.class_names or []) == 1:
        return
    if len(tops) > 1 and {top.lower() for top in tops} <= SPLIT_NAMES:
        raise path_error(data, f"class folders, found {', '.join(tops)}", "rename them train and test")
    if len(tops) == 1:
        advice = f"add {tops[0]} to the path" if "all" in groups else f"move those in {tops[0]} up"
        advice += ", or set data.labelled=false for one class"
        raise path_error(data, f"class folders, found {tops[0]} alone with folders in it", advice)


def _class_folder(path: tuple[str, ...], data: DataConfig) -> str:
    if not data.labelled:
        return "image"
    if len(path) < 2:
        advice = "make one folder a class, or set data.labelled=false for one class"
        raise path_error(data, f"every image in a class folder, found {path[0]} outside", advice)
    return path[0]


def _label_folders(groups: dict[str, Parts], data: DataConfig) -> tuple[dict[str, int], tuple[str, ...]]:
    """Label of each class folder, and the class names.

    Numbers are sorted as numbers. `data.class_names` that are the folders' names set the order; others rename the
    folders in sorted order.
    """
    folders = {_class_folder(path, data) for group in groups.values() for path in group.values()}
    numbers = all(folder.isdecimal() for folder in folders)
    order = sorted(folders, key=lambda folder: (int(folder) if numbers else 0, folder))
    names = choose_class_names(order, data)
    if set(names) == folders:
        order = list(names)
    return {folder: label for label, folder in enumerate(order)}, names


def _check_classes(shards: list[Shard], names: tuple[str, ...], data: DataConfig) -> None:
    counts = Counter(
        label
        for shard in shards
        for name, label in shard.members
        if record_split(name, shard, data.test_fraction) == "train"
    )
    for label, class_name in enumerate(names):
        if counts[label] < 2:
            found = f"at least 2 training images a class, class {class_name!r} has {counts[label]}"
            raise path_error(data, found, "add images, or leave the class out")


def read_folder(shard: Shard, data: DataConfig) -> Iterator[RawRecord]:
    """Yields the files' bytes; an unreadable zip entry yields none, so that it counts as corrupt."""
    if filesystem.kind(shard.file) == "file":
        with _open_zip(data) as archive:
            yield from _read_members(shard, lambda name: _read_entry(archive, name))
    else:
        yield from _read_members(shard, filesystem.reader(shard.file))


def _read_members(shard: Shard, read: Callable[[str], bytes]) -> Iterator[RawRecord]:
    for name, label in shard.members:
        yield RawRecord(name, read(name), label)


def _read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except DAMAGED:
        return b""
    except OSError as error:
        if str(error) != BZIP2_DAMAGED:
            raise
        return b""
