"""S3 as boto3 sees it, for what file systems can't say: conditional writes and unfinished uploads.

Credentials, region and endpoint (AWS_ENDPOINT_URL) come from boto3's usual places.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from e2h.errors import InputError

CONFLICT_STATUS = (409, 412)  # another write to the key is under way; the condition does not hold


def client() -> Any:
    import boto3
    from botocore.config import Config

    retries = {"mode": "standard", "total_max_attempts": 5}
    # Checksums that newer boto3 adds by itself are unknown to some S3 servers.
    checksums = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    return boto3.client("s3", config=Config(retries=retries, connect_timeout=10, read_timeout=30, **checksums))


def split(url: str) -> tuple[str, str]:
    """`s3://bucket/key` -> bucket, key."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


class Bucket:
    """Whole objects of one bucket, a request each."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._process_client: tuple[int, Any] = (0, None)

    @property
    def client(self) -> Any:
        """A client of this very process: two that share a connection after a fork would read each other's answers."""
        if self._process_client[0] != os.getpid():
            self._process_client = os.getpid(), client()
        return self._process_client[1]

    def get(self, key: str) -> bytes | None:
        """An object's content; None where there is none."""
        try:
            content: bytes = self.client.get_object(Bucket=self.name, Key=key)["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return None
        return content

    def put(self, key: str, content: bytes, **condition: str) -> bool:
        """Writes an object; False if the condition did not hold (see the function `put`)."""
        return put(self.client, self.name, key, content, **condition) is not None


def put(store: Any, bucket: str, key: str, content: bytes, **condition: str) -> str | None:
    """Writes an object under a condition (IfNoneMatch="*", IfMatch=ETag); its new ETag, or None if it did not hold."""
    from botocore.exceptions import ClientError

    try:
        return store.put_object(Bucket=bucket, Key=key, Body=content, **condition).get("ETag", "")
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] in CONFLICT_STATUS:
            return None
        raise


def age(answer: dict[str, Any], written: datetime) -> float:
    """Seconds since `written`, by the clock of the store that gave the answer; this machine's does not count."""
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return max(0.0, (now - written).total_seconds())


@contextmanager
def explained(name: str, advice: str = "") -> Iterator[None]:
    """What the store says, in one line without a traceback."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        end = f"; {advice}" if advice else ""
        raise InputError(f"{name}: expected an S3 bucket that may be read and written ({error}){end}") from error
