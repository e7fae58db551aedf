"""Paths in a bucket behave as a run expects of paths."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import boto3
import pytest

from e2h.data import filesystem
from e2h.data.remote import S3Path, abort_uploads, place, scratch_folder
from e2h.errors import InputError


def test_a_url_becomes_a_path_and_a_path_its_url() -> None:
    path = place("s3://bucket/runs/") / "one" / "a b#1%.json"
    assert isinstance(path, S3Path)
    assert os.fspath(path) == str(path) == "s3://bucket/runs/one/a b#1%.json"
    assert (path.bucket, path.key, path.name) == ("bucket", "runs/one/a b#1%.json", "a b#1%.json")
    assert path.parent.parent / ".secrets" == S3Path("bucket/runs/.secrets")
    assert pickle.loads(pickle.dumps(path)) == path
    assert type(pickle.loads(pickle.dumps(path))) is S3Path
    assert place("runs") == Path("runs").resolve()
    for wrong in ("s3://", "gs://bucket/x", "http://host/x"):
        with pytest.raises(InputError, match="expected"):
            place(wrong)


def test_objects_are_written_read_listed_and_removed(bucket: str) -> None:
    folder = place(bucket) / "run"
    assert not folder.exists()
    assert list(folder.glob("*")) == []
    for name in ("b-2.pt", "a-1.pt", "a-2.pt", "deeper/a-3.pt"):
        (folder / name).write_bytes(name.encode())
    assert [path.name for path in folder.glob("a-*.pt")] == ["a-1.pt", "a-2.pt"]
    assert (folder / "a-1.pt").is_file()
    assert not folder.is_file()
    assert (folder / "deeper" / "a-3.pt").read_text() == "deeper/a-3.pt"
    (folder / "a-1.pt").unlink()
    (folder / "a-1.pt").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (folder / "a-1.pt").unlink()
    assert filesystem.remove(folder)
    assert not filesystem.remove(folder)
    assert list(folder.glob("*")) == []


def test_an_upload_that_was_killed_is_not_there_and_is_cleared(bucket: str) -> None:
    store, folder = boto3.client("s3"), place(bucket) / "run"
    for key in ("run/big.pt", "other/big.pt"):
        begun = store.create_multipart_upload(Bucket=folder.bucket, Key=key)
        part = {"Bucket": folder.bucket, "Key": key, "UploadId": begun["UploadId"]}
        store.upload_part(**part, PartNumber=1, Body=b"half")
    assert not (folder / "big.pt").exists()
    assert abort_uploads(folder) == 1
    assert [one["Key"] for one in store.list_multipart_uploads(Bucket=folder.bucket)["Uploads"]] == ["other/big.pt"]


def test_scratch_is_one_s_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = scratch_folder(S3Path("bucket/one"))
    assert folder == scratch_folder(S3Path("bucket/one")) != scratch_folder(S3Path("bucket/two"))
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    folder.parent.chmod(0o755)
    with pytest.raises(InputError, match="only you may enter"):
        scratch_folder(S3Path("bucket/one"))
