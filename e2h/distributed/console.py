"""The user's terminal: one line a stage, one live status line while training, plain lines in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from e2h.config import Config, warmups
from e2h.data.remote import Place
from e2h.distributed.monitor import epsilon_after
from e2h.distributed.progress import read_progress
from e2h.privacy.events import Charge, Release
from e2h.privacy.plan import PrivacyPlan

POLL_S = 0.5
LOG_LINE_EVERY_S = 15.0


def say(stage: str, text: str) -> None:
    """One line: the stage's name and what came of it."""
    print(f"{stage:<10} {text}", flush=True)


def show_plan(plan: PrivacyPlan, epsilons_alone: Sequence[float]) -> None:
    """What will be released and what it costs, before anything is spent; `epsilons_alone` of the plan's releases."""
    say(
        "plan",
        f"N {plan.num_records}, epsilon {plan.bound.epsilon:.4f} of {plan.target_epsilon:g} at delta {plan.delta:g}",
    )
    print(f"{'':<10} {'release':<10}{'q':>9}{'steps':>8}{'noise':>10}{'epsilon alone':>15}")
    for release, alone in zip(plan.releases, epsilons_alone, strict=True):
        print(f"{'':<10} {release.name:<10}{_mechanism(release)}{alone:>15.4f}")
    print(f"{'':<10} RDP, mostly a looser bound, says {plan.bound.epsilon_rdp:.4f}", flush=True)
    for warning in plan.warnings:
        say("warning", warning)


def _mechanism(release: Charge) -> str:
    if isinstance(release, Release):
        event = release.event
        return f"{event.sampling_prob:>9.4f}{event.count:>8}{event.noise_multiplier:>10.4f}"
    return f"{f'best of about {release.event.law.expected_trials:g}':>27}"


@contextmanager
def training_status(path: Place, config: Config, schedule: list[tuple[int, float]], target: float) -> Iterator[None]:
    """While the block runs, shows the progress that rank 0 writes to `path`."""
    stop = threading.Event()
    path.unlink(missing_ok=True)
    status = _Status(path, config, schedule, target)
    thread = threading.Thread(target=status.follow, args=(stop,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with suppress(OSError):  # the next call removes it
            path.unlink(missing_ok=True)


class _Status:
    def __init__(self, path: Place, config: Config, schedule: list[tuple[int, float]], target: float) -> None:
        self.path, self.schedule, self.target = path, schedule, target
        easy = {name: settings for name, (_, settings) in warmups(config).items()}
        self.totals = {name: one.num_steps for name, one in easy.items()} | {"finetune": config.finetune.num_steps}
        self.batch = {name: one.batch_size for name, one in easy.items()}
        self.batch["finetune"] = config.finetune.expected_batch_size
        self.first: dict[str, tuple[int, float]] = {}
        self.live = sys.stdout.isatty()
        self.width, self.last_log = 0, time.monotonic()

    def follow(self, stop: threading.Event) -> None:
        while not stop.wait(POLL_S):
            now = read_progress(self.path)
            if now is not None and now[0] in self.totals:
                self._show(self._line(now[0], now[1]))
        if self.live and self.width:
            print("\r" + " " * self.width + "\r", end="", flush=True)

    def _line(self, stage: str, step: int) -> str:
        total, now = self.totals[stage], time.monotonic()
        first_step, first_time = self.first.setdefault(stage, (step, now))
        rate = (step - first_step) / (now - first_time) if step > first_step else 0.0
        spent = f" eps {epsilon_after(self.schedule, step):.2f}/{self.target:.2f}" if stage == "finetune" else ""
        speed = f" {rate * self.batch[stage]:.0f} img/s eta {_duration((total - step) / rate)}" if rate else ""
        return f"{stage:<10} step {step}/{total} {step / total:.0%}{spent}{speed}"

    def _show(self, line: str) -> None:
        if self.live:
            print("\r" + line.ljust(self.width), end="", flush=True)
            self.width = max(self.width, len(line))
        elif time.monotonic() - self.last_log >= LOG_LINE_EVERY_S:
            self.last_log = time.monotonic()
            print(line, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
