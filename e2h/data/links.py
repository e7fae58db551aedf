"""Links in a folder of records: what they lead to may be listed once, or a record would count more than once."""

from __future__ import annotations

import os
from collections.abc import Iterator

from pyarrow import fs

from e2h.config import DataConfig
from e2h.data.filesystem import is_visible, resolve
from e2h.data.records import path_error


def refuse_double_links(data: DataConfig, endings: tuple[str, ...]) -> None:
    """Looks at the names below `data.path`, if it is a local folder; call it before they are listed.

    Args:
      endings: of the files that hold records.

    Raises:
      InputError: naming a link by which a folder, or such a file, is reached a second time.
    """
    file_system, path = resolve(str(data.path))
    if not isinstance(file_system, fs.LocalFileSystem) or not os.path.isdir(path):
        return
    if found := next(_reached_twice(path, endings), None):
        link, other = (os.path.relpath(name, path) for name in found)
        other = "the folder itself" if other == "." else other
        expectation = f"one way to every image, {link} and {other} lead to the same"
        raise path_error(data, expectation, f"remove the link {link}: each record may count only once")


def _reached_twice(top: str, endings: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """What is reached through a link and in another way: the link's path and the other's."""
    real = os.path.realpath(top)
    folders, files, waiting = {real: top}, dict[str, str](), [top]
    for folder in waiting:  # grows while it is read
        for entry in _visible(folder):
            linked = entry.is_symlink()
            if os.path.isdir(entry.path) if linked else entry.is_dir():
                target = os.path.realpath(entry.path)
                # A folder above would be walked through as a whole before it came to `top` again.
                other = folders.get(target, top if _is_below(real, target) else "")
                if other:
                    yield (entry.path, other) if linked else (other, entry.path)
                folders[target] = entry.path
                waiting.append(entry.path)
            elif linked and entry.name.lower().endswith(endings) and os.path.isfile(entry.path):
                target = os.path.realpath(entry.path)
                if target in files:
                    yield entry.path, files[target]
                files[target] = entry.path
    for target, link in files.items():
        folder, name = os.path.split(target)
        if folder in folders and is_visible(name) and name.lower().endswith(endings):
            yield link, os.path.join(folders[folder], name)


def _visible(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if is_visible(entry.name)), key=lambda entry: entry.name)


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")
