"""What tests of several parts share: a real S3 server, and the order of files: the longest first."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from urllib.request import Request, urlopen

import boto3
import pytest
from moto.server import ThreadedMotoServer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the longest tests begin, so that no process waits for one that began last."""

    def weight(item: pytest.Item) -> int:
        return 2 * any(item.iter_markers("long")) + any(item.iter_markers("ray"))

    heaviest: dict[object, int] = {}
    for item in items:
        heaviest[item.path] = max(heaviest.get(item.path, 0), weight(item))
    items.sort(key=lambda item: -heaviest[item.path])


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of a local S3 server that only the usual variables point to."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    # Servers of one process share what they keep.
    with urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")):
        pass
    boto3.client("s3").create_bucket(Bucket="images")
    yield "s3://images"
    server.stop()
