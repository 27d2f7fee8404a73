"""What a part of a program does to memory: peaks, changes, bytes moved, time lost."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omnimem import _core
from omnimem._totals import totals
from omnimem.config import format_size
from omnimem.errors import ClosedError
from omnimem.store import Store, _open_stores

__all__ = ["Span", "Tracked", "track"]

log = logging.getLogger("omnimem.track")

_TIERS = ("host", "packed", "disk")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of one tier over a tracked block."""

    before: int = 0
    """When it began."""
    after: int = 0
    """When it ended."""
    peak: int = 0
    """The most in between."""
    exact: bool = True
    """False: `peak` is the least that it was; the system tells no more."""

    @property
    def change(self) -> int:
        """Bytes more than before; negative: fewer."""
        return self.after - self.before


@dataclass(slots=True)
class Tracked:
    """What happened during a tracked block (`track`); empty until the block has ended."""

    name: str
    """What `track` was told."""
    seconds: float = 0.0
    """How long the block took."""
    host: Span = Span()
    """RAM of stores."""
    packed: Span = Span()
    """Of `host`, encoded forms."""
    disk: Span = Span()
    """Swap files."""
    gpu: Mapping[str, Span] = field(default_factory=dict)
    """By device."""
    rss: Span = Span()
    """All of this process's memory. The peak is exact when it is the highest since the process
    began, or since somebody reset it."""
    moved: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Bytes by (from, to): ("disk", "host") read, checkpoints included, ("host", "disk") written,
    ("packed", "host") decoded."""
    stall_seconds: float = 0.0
    """Threads waited for bytes, summed over the threads."""

    def __str__(self) -> str:
        title = self.name or "block"
        lines = [f"{title}: {self.seconds:.3f} s, of which stalled {self.stall_seconds:.3f} s"]
        spans = {tier: getattr(self, tier) for tier in _TIERS}
        spans |= {f"gpu {device}": span for device, span in self.gpu.items()}
        for tier, span in {**spans, "rss": self.rss}.items():
            sign = "-" if span.change < 0 else "+"
            peak = format_size(span.peak) if span.exact else f"at least {format_size(span.peak)}"
            lines.append(f"  {tier:<6} {sign}{format_size(abs(span.change)):<12} peak {peak}")
        lines += [f"  {a} to {b}: {format_size(n)}" for (a, b), n in self.moved.items() if n]
        return "\n".join(lines)


@contextmanager
def track(name: str = "", *, store: Store | None = None) -> Iterator[Tracked]:
    """Measure what a block of code does to memory; a decorator, too.

    Parameters
    ----------
    name : str
        For the record.
    store : Store, optional
        Which one; None: all that are open. Of several, sums: the peak then is that of each, added
        up, and other threads' work counts.

    Yields
    ------
    Tracked
        Filled when the block ends, also by an error. It is then logged, to the logger
        "omnimem.track" as INFO.

    Notes
    -----
    Blocks nest, and may overlap on several threads. Costs some 100 us.

    Examples
    --------
    >>> with omnimem.track("step") as step:
    ...     store.lease("layer0").release()
    >>> print(step)  # doctest: +SKIP
    """
    record = Tracked(name)
    begun = _Begun(store)
    try:
        yield record
    finally:
        begun.end(record)
        log.info("%s", record)


class _Begun:
    """Where a tracked block began."""

    def __init__(self, store: Store | None) -> None:
        self._only = store
        self._known = self._stores()
        self._marks = {each: mark for each in self._known if (mark := _mark(each)) is not None}
        self._before = {each: each.stats() for each in self._marks}
        self._totals = self._count()
        self._rss = _rss()
        self._at = time.perf_counter()

    def _stores(self) -> set[Store]:
        return set(_open_stores) if self._only is None else {self._only}

    def _count(self) -> Mapping[str, Any]:
        """Counters of the one store, or of all that the process ever had."""
        return totals(None if self._only is None else [self._only])

    def end(self, record: Tracked) -> None:
        """Fill the record."""
        record.seconds = time.perf_counter() - self._at
        peaks = [_core._mark_end(mark) for mark in self._marks.values()]
        after = {each: each.stats() for each in self._known | self._stores()}
        new = [stats for each, stats in after.items() if each not in self._known]
        for at, tier in enumerate(_TIERS):
            span = Span(
                sum(getattr(stats, tier).used_bytes for stats in self._before.values()),
                sum(getattr(stats, tier).used_bytes for stats in after.values()),
                sum(peak[at] for peak in peaks)
                + sum(getattr(stats, tier).peak_bytes for stats in new),
            )
            setattr(record, tier, span)
        counted = self._count()
        record.moved = {
            pair: counted[key] - self._totals[key]
            for pair, key in (
                (("disk", "host"), "read_bytes"),
                (("host", "disk"), "written_bytes"),
                (("packed", "host"), "decoded_bytes"),
            )
        }
        record.stall_seconds = (counted["stall_ns"] - self._totals["stall_ns"]) / 1e9
        now, most = _rss()
        rose = most > self._rss[1]
        record.rss = Span(
            self._rss[0], now, most if rose else max(self._rss[0], now), rose or now == most
        )


def _mark(store: Store) -> Any:
    try:
        return store._mark()
    except ClosedError:  # meanwhile, or by a fork
        return None


def _rss() -> tuple[int, int]:
    """Memory of this process now, and the most since it began."""
    text = _STATUS.read_text()
    now, most = (
        1024 * int(re.search(rf"^{key}:\s+(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]
        for key in ("VmRSS", "VmHWM")
    )
    return now, max(now, most)
