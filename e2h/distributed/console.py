"""The user's terminal: one line a stage, one live line for what goes on, plain lines in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from shutil import get_terminal_size
from typing import ClassVar

from e2h.config import Config, warmups
from e2h.curriculum.central import planned_pixel_noise
from e2h.curriculum.listing import doubts
from e2h.data.remote import Place
from e2h.distributed.monitor import epsilon_after
from e2h.distributed.progress import read_progress
from e2h.privacy.events import Charge, Release
from e2h.privacy.plan import PrivacyPlan
from e2h.privacy.rounding import delta_in_words, rounded_up

POLL_S = 0.5
LOG_LINE_EVERY_S = 15.0
LOG_LINE_EVERY_SHARE = 0.05  # of the time so far: the log of a day stays short

Tell = Callable[[int, int], None]  # tell(done, total)


def say(stage: str, text: str) -> None:
    """One line: the stage's name and what came of it."""
    with _Line.lock:
        _erase_lines()
        print(f"{stage:<10} {text}", flush=True)


def warn(sentences: Iterable[str]) -> None:
    """A line each, of what is allowed and seldom meant."""
    for sentence in sentences:
        say("warning", sentence)


def show_plan(plan: PrivacyPlan, epsilons_alone: Sequence[float], config: Config | None = None) -> None:
    """What will be released and what it costs, before anything is spent.

    Args:
      epsilons_alone: of the plan's releases.
      config: of a run; none for all trials of a search together.
    """
    cost = (
        f"epsilon {rounded_up(plan.bound.epsilon):.4f} of {plan.target_epsilon:g} at delta {delta_in_words(plan.delta)}"
    )
    say("plan", f"N {plan.num_records}, {cost}")
    print(f"{'':<10} {'release':<10}{'q':>9}{'steps':>8}{'noise':>10}{'epsilon alone':>15}")
    for release, alone in zip(plan.releases, epsilons_alone, strict=True):
        print(f"{'':<10} {release.name:<10}{_mechanism(release)}{rounded_up(alone):>15.4f}")
    print(f"{'':<10} RDP, mostly a looser bound, says {rounded_up(plan.bound.epsilon_rdp):.4f}", flush=True)
    noise = planned_pixel_noise(config, plan) if config else None
    if noise is not None:
        print(f"{'':<10} noise of a pixel in the mean of a class's images: {noise:.3f}, where white is 1", flush=True)
    warn([*plan.warnings, *(doubts(config) if config else [])])


def _mechanism(release: Charge) -> str:
    if isinstance(release, Release):
        event = release.event
        return f"{event.sampling_prob:>9.4f}{event.count:>8}{event.noise_multiplier:>10.4f}"
    return f"{f'best of about {release.event.law.expected_trials:g}':>27}"


@contextmanager
def working(stage: str, doing: str = "") -> Iterator[Tell]:
    """A live line while the block runs: `sample     part 3/32 9% eta 40s`, or the time so far until a part is told."""
    begun, parts = time.monotonic(), [0, 0]

    def text() -> str:
        (done, total), seconds = parts, time.monotonic() - begun
        if not 0 < done < total:
            return f"{stage:<10} {doing}{' ' * bool(doing)}{_duration(seconds)}"
        return f"{stage:<10} part {done}/{total} {done / total:.0%} eta {_duration(seconds / done * (total - done))}"

    def tell(done: int, total: int) -> None:
        parts[:] = done, total

    with _live(text):
        yield tell


@contextmanager
def training_status(path: Place, config: Config, schedule: list[tuple[int, float]], target: float) -> Iterator[None]:
    """While the block runs, shows the progress that rank 0 writes to `path`."""
    path.unlink(missing_ok=True)
    try:
        with _live(_Training(path, config, schedule, target)):
            yield
    finally:
        with suppress(OSError):  # the next call removes it
            path.unlink(missing_ok=True)


@contextmanager
def _live(text: Callable[[], str]) -> Iterator[None]:
    """Shows what `text` says until the block ends; of a block inside it, that one's line instead."""
    stop, line = threading.Event(), _Line()

    def follow() -> None:
        while not stop.wait(POLL_S):
            with suppress(Exception):  # that nobody can watch is no reason to end a run, or to say so
                line.show(text())

    thread = threading.Thread(target=follow, daemon=True)
    _Line.shown.append(line)
    _erase_lines()
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _Line.shown.remove(line)
        line.erase()


def _erase_lines() -> None:
    for line in _Line.shown:
        line.erase()


class _Line:
    """Over itself on a terminal; in a log a plain line now and then. The last of `shown` is the one that is seen."""

    shown: ClassVar[list[_Line]] = []
    lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self) -> None:
        self.out, self.live, self.width = sys.stdout, sys.stdout.isatty(), 0
        self.begun = self.logged = time.monotonic()

    def show(self, text: str) -> None:
        with self.lock:
            if self.shown[-1] is not self:
                return
            if self.live:
                text = text[: get_terminal_size().columns - 1]  # a line that wraps can't be written over
                print("\r" + text.ljust(self.width), end="", flush=True, file=self.out)
                self.width = len(text)
            elif self._is_due():
                print(text, flush=True, file=self.out)

    def _is_due(self) -> bool:
        now = time.monotonic()
        due = now - self.logged >= max(LOG_LINE_EVERY_S, LOG_LINE_EVERY_SHARE * (now - self.begun))
        self.logged = now if due else self.logged
        return due

    def erase(self) -> None:
        with self.lock, suppress(OSError, ValueError):  # a terminal that was closed
            if self.width:
                print("\r" + " " * self.width + "\r", end="", flush=True, file=self.out)
                self.width = 0


class _Training:
    """`finetune   step 22/60 37% eps 7.19/10.00 274 img/s eta 36s`, from what rank 0 writes."""

    def __init__(self, path: Place, config: Config, schedule: list[tuple[int, float]], target: float) -> None:
        self.path, self.schedule, self.target = path, schedule, target
        easy = {name: settings for name, (_, settings) in warmups(config).items()}
        self.totals = {name: one.num_steps for name, one in easy.items()} | {"finetune": config.finetune.num_steps}
        self.batch = {name: one.batch_size for name, one in easy.items()}
        self.batch["finetune"] = config.finetune.expected_batch_size
        self.first: dict[str, tuple[int, float]] = {}
        self.workers, self.begun = config.scaling.num_workers, time.monotonic()

    def __call__(self) -> str:
        found = read_progress(self.path)
        if found is None or found[0] not in self.totals:
            plural = "s" * (self.workers > 1)
            return f"{'train':<10} starting {self.workers} worker{plural} {_duration(time.monotonic() - self.begun)}"
        return self._line(found[0], found[1])

    def _line(self, stage: str, step: int) -> str:
        total, now = self.totals[stage], time.monotonic()
        first_step, first_time = self.first.setdefault(stage, (step, now))
        rate = (step - first_step) / (now - first_time) if step > first_step else 0.0
        spent = ""
        if stage == "finetune":
            spent = f" eps {rounded_up(epsilon_after(self.schedule, step), 2):.2f}/{self.target:.2f}"
        speed = f" {rate * self.batch[stage]:.0f} img/s eta {_duration((total - step) / rate)}" if rate else ""
        return f"{stage:<10} step {step}/{total} {step / total:.0%}{spent}{speed}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
