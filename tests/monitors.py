"""A stand-in for the core's monitor, whose level of pressure a test sets."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from omnimem import ClosedError, _core

GIB = 1 << 30


class StandIn:
    """What `_core.Monitor` does, with samples that a test makes."""

    made: StandIn

    def __init__(self, thresholds: Any, interval: float) -> None:
        self.thresholds, self.interval = thresholds, interval
        self.changed = threading.Condition()
        self.number = self.level = self.noticed = 0
        self.usage = 0.5
        self.transitions = dict.fromkeys(range(4), 0)
        self.watched: list[Any] = []
        self.closed = self.running = False
        self.acted: list[tuple[Any, ...]] = []
        self.more: dict[str, Any] = {}
        self.quiet: list[dict[str, Any]] = []
        """Reports that nobody was told of."""
        StandIn.made = self

    def enter(self, *levels: int, usage: float = 0.5) -> None:
        """Samples of these levels, of which only the last may be seen."""
        with self.changed:
            for level in levels:
                self.transitions[level] += level != self.level
                self.level = level
                self.usage = usage
                self.number += 1
            self.changed.notify_all()

    def watch(self, store: Any) -> None:
        self.watched.append(store)

    watch_pools = watch

    def _open(self) -> None:
        if self.closed:
            raise ClosedError("the monitor is closed")

    def start(self) -> None:
        self._open()
        self.running = True

    def stop(self) -> None:
        self._open()
        with self.changed:
            self.running = False
            self.changed.notify_all()

    def sample(self) -> dict[str, Any]:
        self._open()
        with self.changed:
            self.number += 1
            self.changed.notify_all()
        return self.report()

    def report(self) -> dict[str, Any]:
        self._open()
        with self.changed:
            self.number = max(self.number, 1)
            return {
                "number": self.number,
                "time": time.monotonic(),
                "wall": time.time(),
                "level": self.level,
                "level_since": 0.0,
                "cause": f"level {self.level}" if self.level else "",
                "usage": self.usage,
                "total": 4 * GIB,
                "available": int(4 * GIB * (1 - self.usage)),
                "source": "system",
                "places": [("system", 4 * GIB, None, 2 * GIB, 2 * GIB)],
                "swap": (GIB, GIB),
                "rss": GIB,
                "psi": None,
                "psi_seconds": None,
                "events": {},
                "gpus": [],
                "slope": None,
                "r2": None,
                "samples": 0,
                "trend": "stable",
                "seconds_to_exhaustion": None,
                "interval": self.interval,
                "lag_seconds": 0.0,
                "overhead_seconds": 0.0,
                "transitions": dict(self.transitions),
                "peak": (3 * GIB, 1.0, 1.0, [("block of the peak", "its group", GIB)]),
                "spare": 0,
                **self.more,
            }

    def wait(self, since: int, level: int | None = None, timeout: float | None = None) -> int:
        with self.changed:
            done = self.changed.wait_for(
                lambda: self.closed or (self.number > since and self.level >= (level or 0)), timeout
            )
            return self.number if done and not self.closed else -1

    def follow(self, since: int, usage: float | None = None, timeout: float | None = None) -> int:
        with self.changed:
            self.noticed = since  # so far
            self.changed.wait_for(
                lambda: not self.running or self.number > max(since, self.noticed), timeout
            )
            return self.number if self.running else -1

    def stir(self) -> None:
        """All samples are stirs; nobody needs more."""

    def pass_quietly(self, count: int) -> None:
        """Samples that wake nobody who follows."""
        for _ in range(count):
            self.number += 1
            self.noticed = self.number
            self.quiet.append(self.report())

    def recent(self, since: int) -> list[dict[str, Any]]:
        reports = {report["number"]: report for report in [*self.quiet, self.report()]}
        return [report for number, report in reports.items() if number > since]

    def actions(self, since: int = 0) -> list[tuple[Any, ...]]:
        self._open()
        return self.acted

    def close(self) -> None:
        with self.changed:
            self.closed, self.running = True, False
            self.changed.notify_all()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """Monitors of this test have a `StandIn` for a core; `StandIn.made` is the last one's."""
    monkeypatch.setattr(_core, "Monitor", StandIn)
    return StandIn


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    """Wait for what must become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.001)
