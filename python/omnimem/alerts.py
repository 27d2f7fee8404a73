"""Alerts: callbacks of a `MemoryMonitor` for when memory gets short."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omnimem.pressure import MemoryPressureLevel

if TYPE_CHECKING:
    from omnimem.monitor import MemoryPressure, MemoryStats

__all__ = ["Alert", "AlertHandle", "AlertSystem"]

log = logging.getLogger("omnimem.monitor")

LEVELS = tuple(MemoryPressureLevel)
"""By number."""
_NAMED = {"warning": MemoryPressureLevel.MEDIUM, **{level.value: level for level in LEVELS}}
_PATIENCE = 0.5
"""Seconds that stopping waits for callbacks that run."""


def level_of(level: str | MemoryPressureLevel) -> MemoryPressureLevel:
    """Take a level, its value, or "warning", which is MEDIUM.

    Raises
    ------
    ValueError
        There is no such level.
    """
    found = level if isinstance(level, MemoryPressureLevel) else _NAMED.get(level)
    if found is None:
        known = ", ".join(map(repr, _NAMED))
        raise ValueError(f"level={level!r} must be one of {known}, or a MemoryPressureLevel")
    return found


@dataclass(frozen=True, slots=True)
class Alert:
    """What a callback is told: memory pressure has risen to a level, or has reached it already."""

    level: MemoryPressureLevel
    """The level that was entered."""
    previous: MemoryPressureLevel
    """The level before; `level` itself for a callback that was added when it was reached."""
    pressure: MemoryPressure
    """The pressure when this was noticed."""
    stats: MemoryStats
    """All numbers at that moment."""
    suggestion: str
    """What would help, in a sentence."""


class AlertHandle:
    """A callback that `AlertSystem.add` was given, and what became of it."""

    __slots__ = (
        "_last",
        "_pending",
        "_token",
        "_told",
        "callback",
        "calls",
        "coalesced",
        "failures",
        "level",
        "min_interval",
        "once",
    )

    def __init__(
        self,
        callback: Callable[[Alert], object],
        level: MemoryPressureLevel,
        once: bool,
        min_interval: float,
    ) -> None:
        self.callback = callback
        """Who is called."""
        self.level = level
        """The level from which on."""
        self.once = once
        """Whether it goes after the first call."""
        self.min_interval = min_interval
        """Seconds between calls at least, unless the level is higher than what was told."""
        self.calls = 0
        """Calls so far."""
        self.failures = 0
        """Those that raised."""
        self.coalesced = 0
        """Alerts that gave way to a newer one while the callback ran."""
        self._pending: deque[Alert] = deque(maxlen=1)
        self._token = threading.Lock()  # whose thread runs the callback; nobody waits for it
        self._last = float("-inf")
        self._told = 0

    @property
    def _new(self) -> bool:
        """Was it never told anything?"""
        return self._last == float("-inf")

    def __repr__(self) -> str:
        name = getattr(self.callback, "__qualname__", repr(self.callback))
        return f"<alert {name} from {self.level.value} on, {self.calls} calls>"


class Tally:
    """Calls of all callbacks; outlives an `AlertSystem` without holding its callbacks."""

    __slots__ = ("calls", "failures")

    def __init__(self) -> None:
        self.calls = 0  # each is one step under the GIL
        self.failures = 0


class AlertSystem:
    """The callbacks of a `MemoryMonitor` (`monitor.alerts`).

    While monitoring runs, a callback is called with one `Alert` whenever the level of memory
    pressure rises to its own level or above: on a thread of its own, without any lock, so that it
    may take its time, allocate, ask the monitor, stop it, add and remove callbacks. One that is
    added while its level is reached is told so at the next sample. What happens while a callback
    runs is told afterwards, the newest alert only. One that raises is logged once, to the logger
    "omnimem.monitor", and counted. All methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._alerts: dict[AlertHandle, None] = {}
        self._workers: set[threading.Thread] = set()
        self._level = 0  # now
        self._seen: dict[int, int] = {}  # transitions by level entered
        self._tally = Tally()

    def add(
        self,
        callback: Callable[[Alert], Any],
        level: str | MemoryPressureLevel = "warning",
        once: bool = False,
        min_interval: float = 0.0,
    ) -> AlertHandle:
        """Have a callback called when the level rises, and once if it is reached already.

        Parameters
        ----------
        callback : callable
            Takes an `Alert`; what it returns is not looked at.
        level : str or MemoryPressureLevel
            From which level on: "warning" (MEDIUM), "critical", or any level.
        once : bool
            Remove it when it is called first.
        min_interval : float
            Seconds since the last alert within which another one is left out, unless it is of a
            higher level.

        Returns
        -------
        AlertHandle
            For `remove`, with its counters.

        Raises
        ------
        ValueError
            An unknown level, a negative interval.
        TypeError
            `callback` cannot be called.
        """
        if not callable(callback):
            raise TypeError(f"callback must be callable, not {callback!r}")
        if not 0 <= min_interval < float("inf"):
            raise ValueError(f"min_interval={min_interval!r} must be seconds from 0")
        handle = AlertHandle(callback, level_of(level), bool(once), float(min_interval))
        self._alerts[handle] = None
        return handle

    def remove(self, alert: AlertHandle | Callable[[Alert], Any]) -> bool:
        """Forget a callback, by its handle or itself; False: it is not there (any more).

        A call that runs goes on; what it was to be told afterwards is dropped.
        """
        found = [
            handle for handle in list(self._alerts) if handle is alert or handle.callback == alert
        ]
        removed = False
        for handle in found:
            removed |= self._alerts.pop(handle, handle) is None
            handle._pending.clear()
        return removed

    @property
    def active(self) -> list[AlertHandle]:
        """The alerts whose level is reached now."""
        return [h for h in list(self._alerts) if LEVELS.index(h.level) <= self._level]

    @property
    def calls(self) -> int:
        """Calls of callbacks so far, also of those that were removed."""
        return self._tally.calls

    @property
    def failures(self) -> int:
        """Calls that raised."""
        return self._tally.failures

    def __len__(self) -> int:
        return len(self._alerts)

    # -- the monitor's ---------------------------------------------------------------------------

    def _see(self, level: int, transitions: dict[int, int]) -> tuple[int, int] | None:
        """Take a sample's level; (former, new) when it has risen, however shortly.

        The level twice when it has not, and is one that somebody has never been told.
        """
        entered = [n for n, count in transitions.items() if count > self._seen.get(n, 0)]
        former, self._level, self._seen = self._level, level, dict(transitions)
        highest = max(entered, default=0)
        if highest and highest >= former:
            return min(former, highest - 1), highest
        return (level, level) if any(handle._new for handle in self.active) else None

    def _tell(self, alert: Alert) -> None:
        """Have all callbacks called that want to know."""
        rank, now = LEVELS.index(alert.level), time.monotonic()
        for handle in list(self._alerts):
            if rank < LEVELS.index(handle.level):
                continue
            if alert.previous is alert.level and not handle._new:
                continue
            if rank <= handle._told and now - handle._last < handle.min_interval:
                continue
            if handle.once and self._alerts.pop(handle, handle) is handle:
                continue
            handle._last, handle._told = now, rank
            handle.coalesced += len(handle._pending)
            handle._pending.append(alert)
            if handle._token.acquire(blocking=False):
                self._start(handle)

    def _start(self, handle: AlertHandle) -> None:
        worker = threading.Thread(
            target=self._run, args=(handle,), name="omnimem-alert", daemon=True
        )
        self._workers.add(worker)
        try:
            worker.start()
        except RuntimeError:  # no more threads: better late for the others than not at all
            self._workers.discard(worker)
            self._run(handle)

    def _run(self, handle: AlertHandle) -> None:
        """Call until there is nothing more to tell. The token is the caller's."""
        owned = True
        while owned:
            while handle._pending:
                self._call(handle)
            handle._token.release()
            owned = bool(handle._pending) and handle._token.acquire(blocking=False)
        self._workers.discard(threading.current_thread())

    def _call(self, handle: AlertHandle) -> None:
        try:
            alert = handle._pending.pop()
        except IndexError:  # it was removed
            return
        handle.calls += 1
        self._tally.calls += 1
        try:
            handle.callback(alert)
        except BaseException:
            handle.failures += 1
            self._tally.failures += 1
            if handle.failures == 1:
                log.exception(
                    "the alert callback %r raised; it stays, and further errors are only counted",
                    handle.callback,
                )

    def _wait(self) -> None:
        """Wait a moment for callbacks that run."""
        deadline = time.monotonic() + _PATIENCE
        for worker in list(self._workers):
            if worker is threading.current_thread():
                continue
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                log.warning(
                    "an alert callback is still running %.1f s after monitoring was stopped; "
                    "nobody waits for it, and it ends with the process at the latest",
                    _PATIENCE,
                )
