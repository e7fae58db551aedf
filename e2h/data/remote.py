"""Paths in an S3 bucket, with those methods of `pathlib.Path` that a run needs.

Nothing is kept on this machine: what one process wrote, another reads. A write replaces a whole object, so nobody sees
half of one; there are no folders, and no renames.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import posixpath
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from e2h import s3
from e2h.data import filesystem
from e2h.errors import InputError

SCHEME = "s3://"


class S3Path(PurePosixPath):
    """`s3://bucket/key`, made from `bucket/key`; `os.fspath` gives the URL back."""

    def __str__(self) -> str:
        return SCHEME + super().__str__()

    def __fspath__(self) -> str:
        return str(self)

    @property
    def bucket(self) -> str:
        return self.parts[0]

    @property
    def key(self) -> str:
        return posixpath.join(*self.parts[1:]) if len(self.parts) > 1 else ""

    def exists(self) -> bool:
        return filesystem.kind(self) != "missing"

    def is_file(self) -> bool:
        return filesystem.kind(self) == "file"

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: an object needs no folder."""

    def read_bytes(self) -> bytes:
        return filesystem.read_bytes(self)

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        filesystem.write_bytes(self, content)

    def unlink(self, missing_ok: bool = False) -> None:
        if not filesystem.remove(self) and not missing_ok:
            raise FileNotFoundError(str(self))

    def glob(self, pattern: str) -> Iterator[S3Path]:
        """The objects right below, by name."""
        names = [name for name, _ in filesystem.list_files(self) if "/" not in name] if self.exists() else []
        return (self / name for name in names if fnmatch.fnmatchcase(name, pattern))


Place = Path | S3Path


def place(location: str | os.PathLike[str]) -> Place:
    """The path object of a local path or an s3:// URL.

    Raises:
      InputError: for another scheme, or a URL without a bucket.
    """
    url = os.fspath(location)
    if url.startswith(SCHEME):
        path = S3Path(url.removeprefix(SCHEME).strip("/"))
        if not path.parts:
            raise InputError(f"path={url}: expected s3://bucket/prefix")
        return path
    if "://" in url:
        raise InputError(f"path={url}: expected a local path or s3://bucket/prefix")
    return Path(os.path.expanduser(url)).resolve()


def escaped(location: Place) -> str:
    """For those who read a location by the rules of URLs, as Ray does; ours may hold spaces, '#', '%' or any letter."""
    return quote(str(location), safe=":/") if isinstance(location, S3Path) else str(location)


def scratch_folder(location: S3Path) -> Path:
    """A folder of this machine that belongs to a remote one, owner-only, below the system's temporary folder (TMPDIR).

    Raises:
      InputError: if it is somebody else's: temporary folders are everybody's.
    """
    own = Path(tempfile.gettempdir()) / f"e2h-{os.getuid()}"
    folder = own / hashlib.sha256(str(location).encode()).hexdigest()[:16]
    own.mkdir(exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True, mode=0o700)
    if own.is_symlink() or own.stat().st_uid != os.getuid() or own.stat().st_mode & 0o077:
        raise InputError(f"{own}: expected a folder that only you may enter; remove it, or set TMPDIR to another")
    return folder


def abort_uploads(folder: S3Path) -> int:
    """Ends the uploads below a folder that a killed process left unfinished, which are paid for; returns their number.

    Call it only while nobody else writes there.
    """
    with s3.explained(str(folder)):
        store, count = s3.client(), 0
        pages = store.get_paginator("list_multipart_uploads").paginate(Bucket=folder.bucket, Prefix=f"{folder.key}/")
        for upload in (one for page in pages for one in page.get("Uploads", [])):
            store.abort_multipart_upload(Bucket=folder.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            count += 1
    return count
