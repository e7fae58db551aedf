"""Runs jobs in an empty folder."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import entry
import pipeline
import pytest
from job_calls import command, environment

from e2h.distributed import preflight


@pytest.fixture
def run_job(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_job("pipeline", "data=mnist", ...) in an empty folder; storage is `tmp_path / "runs"`."""

    def run(name: str, *overrides: str, **extra: str) -> subprocess.CompletedProcess[str]:
        where = [] if any(one.startswith("run.storage=") for one in overrides) else [f"run.storage={tmp_path / 'runs'}"]
        return subprocess.run(
            command(name, *where, *overrides),
            cwd=tmp_path,
            env=environment(**extra),
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    return run


@pytest.fixture
def refused_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused_here("a=b", ...) -> the one line with which the pipeline refuses, called in this process.

    What a dry run plans, which takes seconds, is left out.
    """
    monkeypatch.setattr(preflight, "make_plan", lambda *_: SimpleNamespace(to_json=dict))

    def call(*overrides: str) -> str:
        monkeypatch.setattr(sys, "argv", ["pipeline.py", *overrides])
        with pytest.raises(SystemExit) as ended:
            entry.job(pipeline.pipeline)
        line = capsys.readouterr().err
        assert (ended.value.code, line.count("\n")) == (2, 1), line
        return line

    return call


class _Denial(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("content-type", "application/xml")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_PUT = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def denying_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket that answers all requests with 403, as to wrong keys."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Denial)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "wrong")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield "s3://bucket"
    server.shutdown()
    server.server_close()
