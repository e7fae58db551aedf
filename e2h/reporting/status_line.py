"""One live line in a terminal or a notebook that says how far a run in this process is."""

from __future__ import annotations

import sys
import time
from types import TracebackType

EVERY_S = 0.2
WIDTH = 60  # narrower than any terminal: a line that wraps can't be written over


class StatusLine:
    """Writes over itself; silent where standard output is neither a terminal nor a notebook. A context manager.

    `line(stage, done, total)`: a total of 1 means that nothing is counted.
    """

    def __init__(self) -> None:
        out = sys.stdout
        self.live = out.isatty() or type(out).__module__.startswith("ipykernel")
        self.begun = self.stage_begun = time.monotonic()
        self.stage, self.first, self.written = "", 0, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.first, self.stage_begun, self.written = stage, done, now, 0.0
        if self.live and (now - self.written >= EVERY_S or done == total):
            self.written = now
            print(f"\r{self.text(done, total, now):<{WIDTH}}", end="", flush=True)

    def text(self, done: int, total: int, now: float) -> str:
        """`finetune   step 22/60 37% eta 12 s`"""
        if total == 1:
            return f"{self.stage:<10} {f'in {now - self.begun:.0f} s' if done else '...'}"
        rate = (done - self.first) / max(now - self.stage_begun, 1e-9)
        left = f" eta {(total - done) / rate:.0f} s" if rate else ""
        return f"{self.stage:<10} step {done}/{total} {done / total:.0%}{left}"

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live and self.written:
            print(flush=True)
