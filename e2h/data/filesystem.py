"""Local paths, s3:// and gs:// behind a few functions; every write is atomic."""

from __future__ import annotations

import io
import os
import posixpath
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from pyarrow import fs

from e2h.errors import InputError

Location = str | os.PathLike[str]

OWNER_ONLY = 0o600
STORE_ERROR = "AWS Error "  # in pyarrow's message, which is all that tells it from other errors
PUBLIC = 0o666  # narrowed by the user's umask, as for any ordinary file


def resolve(location: Location) -> tuple[Any, str]:
    """The pyarrow file system of a location and the path inside it.

    For s3:// credentials, region and endpoint come from the usual variables (AWS_ENDPOINT_URL among them).

    Raises:
      InputError: for a scheme that pyarrow does not know.
    """
    scheme, separator, rest = os.fspath(location).partition("://")
    if not separator or scheme == "file":
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(rest or scheme))
    bucket, _, key = rest.partition("/")
    try:
        # Only the bucket goes through the URI parser: a key may hold spaces, '#' or '%'.
        file_system, base = fs.FileSystem.from_uri(f"{scheme}://{bucket}")
    except ValueError as error:  # pyarrow.ArrowInvalid
        raise InputError(f"path={location}: expected a local path, s3:// or gs:// ({error})") from error
    return file_system, f"{base}/{key}".rstrip("/")


def store_refusal(error: OSError) -> str | None:
    """What an object store answered, and the way out; None for an error of anything else."""
    _, found, rest = str(error).partition(STORE_ERROR)
    if not found:
        return None
    said = rest.splitlines()[0]
    if said.startswith("NETWORK_CONNECTION"):
        return f"the store can't be reached ({said}); run the same command again when it can"
    return f"the store refuses ({said}); check your keys and rights, then run the same command again"


def join(location: Location, *parts: str) -> str:
    return posixpath.join(os.fspath(location), *parts)


def kind(location: Location) -> str:
    """`file`, `folder` or `missing`."""
    file_system, path = resolve(location)
    found = file_system.get_file_info(path).type
    return {fs.FileType.File: "file", fs.FileType.Directory: "folder"}.get(found, "missing")


def list_files(folder: Location) -> list[tuple[str, int]]:
    """All visible files below a folder: sorted (name relative to it, size in bytes)."""
    file_system, path = resolve(folder)
    found = file_system.get_file_info(fs.FileSelector(path, recursive=True))
    start = len(path) + 1
    files = [(info.path[start:], info.size) for info in found if info.type == fs.FileType.File]
    return sorted((name, size) for name, size in files if is_visible(name))


def is_visible(name: str) -> bool:
    """False for hidden files and for macOS resource forks."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def open_input(location: Location) -> Any:
    """A seekable binary file (`pyarrow.NativeFile`)."""
    file_system, path = resolve(location)
    return file_system.open_input_file(path)


def read_bytes(location: Location) -> bytes:
    with open_input(location) as file:
        return bytes(file.read())


def reader(folder: Location) -> Callable[[str], bytes]:
    """A function that reads a file below a folder, given its relative name."""
    file_system, path = resolve(folder)

    def read(name: str) -> bytes:
        with file_system.open_input_file(f"{path}/{name}") as file:
            return bytes(file.read())

    return read


def remove(location: Location) -> bool:
    """Removes a file, or a folder with all that is in it; returns whether there was one."""
    found = kind(location)
    file_system, path = resolve(location)
    if found == "file":
        file_system.delete_file(path)
    elif found == "folder":
        file_system.delete_dir(path)
    return found != "missing"


def copy_files(source: Location, target: Location, names: Iterable[str], mode: int = OWNER_ONLY) -> None:
    """Copies files below one folder to the same names below another; each appears whole, in the order given."""
    read = reader(source)
    for name in names:
        make_folder(os.path.dirname(join(target, name)))
        write_bytes(join(target, name), read(name), mode)


def make_folder(location: Location, mode: int = 0o700) -> None:
    """Creates a folder and its parents; object stores have none, so nothing happens there."""
    file_system, path = resolve(location)
    if isinstance(file_system, fs.LocalFileSystem):
        os.makedirs(path, mode=mode, exist_ok=True)


@contextmanager
def atomic_writer(location: Location, mode: int = OWNER_ONLY) -> Iterator[BinaryIO]:
    """A binary file that appears under its name only when the block ends without an exception.

    Args:
      location: local (temporary name in the same folder, fsync, rename) or remote (one upload of the whole content).
      mode: permission bits of a local file, narrowed by the umask.
    """
    file_system, path = resolve(location)
    if isinstance(file_system, fs.LocalFileSystem):
        with _atomic_local(path, mode) as file:
            yield file
        return
    buffer = io.BytesIO()
    yield buffer
    with file_system.open_output_stream(path) as stream:
        stream.write(buffer.getbuffer())


@contextmanager
def _atomic_local(path: str, mode: int) -> Iterator[BinaryIO]:
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_bytes(location: Location, content: bytes, mode: int = OWNER_ONLY) -> None:
    """Writes a whole file atomically; owner-only unless told otherwise."""
    with atomic_writer(location, mode) as file:
        file.write(content)
