"""Stand-ins for tests of the offloader: pressure as a test wants it, models that fail when told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from omnimem import MonitorConfig
from omnimem._managed import Movable, Moved
from omnimem._offload_models import Entry

MIB = 1 << 20


def restore(movable: Movable, room: int | None = None, timeout: float = 30.0) -> Moved:
    """Give a model room, by default for all of it, and bring it back, as the offloader does."""
    entry = Entry(movable, None, has_origin=False)
    entry.give(movable.nbytes if room is None else room)
    return entry.fetch(None, timeout)


class Samples:
    """Stands for `_core.Monitor`: says what it was told last."""

    def __init__(self) -> None:
        self.running = True
        self.stirs = 0
        self.followed: list[tuple[float | None, float | None]] = []
        """What who followed asked for: usage and timeout."""
        self._changed = threading.Condition()
        self._report: dict[str, Any] = {
            "number": 1,
            "usage": 0.1,
            "total": 1000 * MIB,
            "slope": None,
            "seconds_to_exhaustion": None,
            "gpus": [],
        }

    def tell_gpu(self, uuid: str, total: int, free: int) -> None:
        """From the next sample on there is one GPU."""
        self._report = {**self._report, "gpus": [(0, uuid, "a GPU", total, free, 0)]}

    def tell(self, usage: float, slope: float | None = None, quiet: bool = False) -> None:
        """A sample: so much is in use, and grows by so many bytes a second."""
        with self._changed:
            known = None if slope is None or slope <= 0 else (1 - usage) * 1000 * MIB / slope
            self._report = {
                **self._report,
                "number": self._report["number"] + 1,
                "usage": usage,
                "slope": slope,
                "seconds_to_exhaustion": known,
            }
            self.stirs += not quiet
            self._changed.notify_all()

    def sample(self) -> dict[str, Any]:
        self.tell(self._report["usage"], self._report["slope"])
        return self._report

    def report(self) -> dict[str, Any]:
        return self._report

    def wait(self, since: int, level: int | None = None, timeout: float | None = None) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._report["number"] > since, timeout)
            return self._report["number"] if self._report["number"] > since else -1

    def follow(self, since: int, usage: float | None = None, timeout: float | None = None) -> int:
        with self._changed:
            self.followed.append((usage, timeout))
            self._changed.wait_for(lambda: self.stirs > since, timeout)
            return self.stirs

    def stir(self) -> None:
        with self._changed:
            self.stirs += 1
            self._changed.notify_all()


class Watch:
    """Stands for `MemoryMonitor`."""

    def __init__(self) -> None:
        self.config = MonitorConfig(monitoring_interval=0.05)
        self._core = Samples()

    def tell(self, usage: float, slope: float | None = None, quiet: bool = False) -> None:
        self._core.tell(usage, slope, quiet)


class Weights:
    """Stands for `Movable`: bytes that are in memory or not, and errors as ordered."""

    def __init__(self, model_id: str, nbytes: int) -> None:
        self.model_id = model_id
        self.group = f"model:{model_id}"
        self.nbytes = nbytes
        self.inside = nbytes
        self.home = "cpu"
        self.in_use = False
        self.state = "resident"
        self.failure: Exception | None = None
        self.held: tuple[tuple[str, int], ...] = ()
        self.calls: list[tuple[Any, ...]] = []
        self.on_use: Callable[[Any], None] | None = None
        self.on_short: Callable[[Any], None] | None = None

    def host_bytes(self) -> int:
        return self.inside

    def home_bytes(self) -> int:
        return self.inside

    def missing_bytes(self) -> int:
        return self.nbytes - self.inside

    def _go(self, *call: Any) -> None:
        self.calls.append(call)
        if self.failure is not None:
            raise self.failure

    def offload(self, target: str, timeout: float = 30.0) -> Moved:
        self._go("offload", target)
        gone = self.inside if target == "disk" or self.home != "cpu" else 0
        self.inside -= gone
        self.state = "disk" if target == "disk" else "evictable"
        return Moved(gone, self.held, False)

    def resize(self, room: int) -> None:
        self._go("resize", room)
        self.inside = min(self.nbytes, room)
        self.state = "streams" if room < self.nbytes else "resident"

    def fetch(self, target: str | None = None, timeout: float = 30.0) -> Moved:
        self._go("fetch")
        return Moved(self.inside, (), self.state == "streams")

    def release(self) -> None:
        self._go("release")

    def close(self) -> None:
        self._go("close")
