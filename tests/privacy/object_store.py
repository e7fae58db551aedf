"""A small S3 server on this machine: atomic conditional writes, and the faults of a bad day."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest


class Store:
    """Objects by `/bucket/key`, and what goes wrong with writes.

    Attributes:
      honours: whether If-None-Match is looked at.
      faults: for the next writes, in turn: an HTTP status (200: none), or `lost`: the answer never comes, whatever was
        done.
      requests: how many were made, of any kind.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.honours, self.faults, self.puts = True, list[object](), 0
        self.requests = 0
        self.lock = threading.Lock()

    def put(self, path: str, content: bytes, only_new: bool) -> int | None:
        """Status of the answer; None for none."""
        with self.lock:
            self.puts += 1
            fault = self.faults.pop(0) if self.faults else None
            if isinstance(fault, int) and fault != 200:
                return fault
            taken = only_new and self.honours and path in self.objects
            if not taken:
                self.objects[path] = content
            return None if fault == "lost" else 412 if taken else 200

    def listing(self, bucket: str, prefix: str) -> bytes:
        start = f"/{bucket}/"
        keys = sorted(path.removeprefix(start) for path in self.objects if path.startswith(start + prefix))
        entries = "".join(f"<Contents><Key>{key}</Key><Size>1</Size></Contents>" for key in keys)
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_: object) -> None:
        pass

    def do_PUT(self) -> None:
        self.store.requests += 1
        content = self.rfile.read(int(self.headers["Content-Length"]))
        status = self.store.put(unquote(self.path), content, self.headers["If-None-Match"] == "*")
        if status is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.answer(status, b"" if status == 200 else b"<Error><Code>Fault</Code></Error>")

    def do_GET(self) -> None:
        self.store.requests += 1
        parts = urlsplit(self.path)
        if "list-type" in (query := parse_qs(parts.query)):
            self.answer(200, self.store.listing(parts.path.strip("/"), query["prefix"][0]))
        elif (content := self.store.objects.get(unquote(parts.path))) is not None:
            self.answer(200, content)
        else:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serve(environment: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store that boto3 finds through the environment."""
    store = Store()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"store": store}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "key",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in found.items():
        environment.setenv(name, value)
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
