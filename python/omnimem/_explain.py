"""What `MemoryMonitor.explain` says: a sentence, and a table of who holds what."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from omnimem.alerts import LEVELS
from omnimem.config import format_share, format_size
from omnimem.errors import ClosedError
from omnimem.store import GroupStats, Store

if TYPE_CHECKING:
    from omnimem.monitor import MemoryStats

_GROUPS, _BLOCKS, _ACTIONS = 8, 3, 5
"""How many of each are shown."""
_BRIEF = 18
"""Characters of a name that is told elsewhere in full."""
_ACTS = {
    "trim": "giving unused memory back",
    "evict": "evicting idle blocks",
    "heap": "giving the C library's unused memory back",
    "relax": "telling that memory is not short any more",
    "none": "none, as nothing idle was left",
}
_Row = tuple[str, str, str]


def explain(
    report: dict[str, Any],
    stats: MemoryStats,
    store: Store | None,
    actions: Sequence[tuple[Any, ...]],
    thresholds: tuple[float, float, float],
) -> str:
    """Put it in words: see `MemoryMonitor.explain`."""
    width = shutil.get_terminal_size((100, 24)).columns
    console = Console(
        file=io.StringIO(),
        width=max(width, 40),
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        markup=False,
        highlight=False,
        emoji=False,
    )
    console.print(_sentence(report, actions, thresholds), soft_wrap=False)
    parts = [
        list(part)
        for part in (
            _places(report),
            _holders(report, stats),
            _groups(store),
            _blocks(report),
            _course(report, thresholds),
            _done(actions),
        )
    ]
    longest = max(len(row[0]) for part in parts for row in part)
    table = Table(box=box.ASCII2, show_edge=False)
    table.add_column("what", overflow="fold", width=min(longest, max(console.width - 40, 20)))
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("of", overflow="fold")
    for part in parts:
        for row in part:
            table.add_row(*row)
        table.add_section()
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _sentence(
    report: dict[str, Any], actions: Sequence[tuple[Any, ...]], thresholds: Sequence[float]
) -> str:
    level = LEVELS[report["level"]].value
    use = (
        f"{format_share(report['usage'])} of {format_size(report['total'])} ({report['source']}) "
        "is in use"
    )
    if report["level"] == 0:
        state = f"Pressure is {level}: {use}, and it begins at {format_share(thresholds[0])}"
    else:
        state = f"Pressure is {level}: {report['cause'] or use}"
    if not actions:
        return f"{state}; nothing was done."
    _, when, kind, _, cause, wanted, freed, *_ = actions[-1]
    ago = max(0.0, time.monotonic() - when)
    came = f": {format_size(freed)} of {format_size(wanted)} wanted came free"
    return (
        f"{state}; the last action, {ago:.0f} s ago, was {_ACTS[kind]}{came if wanted else ''}"
        f"{', since ' + cause if cause else ''}."
    )


def _places(report: dict[str, Any]) -> Iterator[_Row]:
    for source, limit, high, used, available in report["places"]:
        several = len(report["places"]) > 1
        binds = ", the tightest" if several and source == report["source"] else ""
        soft = f", slowed down from {format_size(high)} on" if high else ""
        yield (
            f"in use: {source}",
            format_size(used),
            f"{format_size(limit)}{soft}, {format_size(available)} left{binds}",
        )
    if report["spare"]:
        spare = format_size(report["spare"])
        yield "  of that idle, in files too", spare, "goes for nothing, not counted in pressure"
    for _, _, name, total, free, *_ in report["gpus"]:
        yield f"in use: {name}", format_size(total - free), format_size(total)
    if report["swap"] and report["swap"][0]:
        total, free = report["swap"]
        yield "in use: swap", format_size(total - free), format_size(total)


def _holders(report: dict[str, Any], stats: MemoryStats) -> Iterator[_Row]:
    used = report["total"] - report["available"]
    rss = report["rss"]
    if rss is not None:
        yield "this process", format_size(rss), f"{format_size(used)} in use"
        yield "others", format_size(max(used - rss, 0)), f"{format_size(used)} in use"
    if stats.store is not None:
        for name in ("host", "packed", "disk"):
            tier = getattr(stats.store, name)
            if tier.peak_bytes:
                within = f"{format_size(tier.limit_bytes)}, peak {format_size(tier.peak_bytes)}"
                yield f"store: {name}", format_size(tier.used_bytes), within
    for device, pool in stats.pool_stats.items():
        if pool.total_size:
            yield f"pool: {device}", format_size(pool.reserved_size), format_size(pool.total_size)
    if stats.cache_stats:
        yield (
            "cache",
            format_size(stats.cache_stats["cache_size_bytes"]),
            format_size(stats.cache_stats["max_size_bytes"]),
        )


def _named(group: str) -> str:
    """A group for people: that of a model is its id."""
    model = group.removeprefix("model:")
    return f"group {group}" if model == group else f"model {model}"


def _brief(name: str) -> str:
    """Both ends of a long name."""
    return name if len(name) <= _BRIEF else f"{name[: _BRIEF // 2]}…{name[-_BRIEF // 2 + 1 :]}"


def _groups(store: Store | None) -> Iterator[_Row]:
    groups: list[tuple[str, GroupStats]] = []
    with suppress(ClosedError):
        groups = [] if store is None else [(g, store.group_stats(g)) for g in store.groups()]
    groups.sort(key=lambda group: -group[1].host_bytes)
    for name, group in groups[:_GROUPS]:
        if group.host_bytes:
            limit = format_size(group.limit_bytes) if group.limit_bytes else "the store's limit"
            leases = "1 lease" if group.leases == 1 else f"{group.leases} leases"
            yield _named(name), format_size(group.host_bytes), f"{limit}, {leases}"


def _blocks(report: dict[str, Any]) -> Iterator[_Row]:
    peak, _, when, blocks = report["peak"]
    if peak:
        moment = time.strftime("%H:%M:%S", time.localtime(when))
        yield "most in use", format_size(peak), f"at {moment}"
    for block, group, nbytes in blocks[:_BLOCKS]:
        name = block.removeprefix(f"{group}/")
        yield f"  {name}", format_size(nbytes), f"of {_brief(group.removeprefix('model:'))}"


def _course(report: dict[str, Any], thresholds: Sequence[float]) -> Iterator[_Row]:
    slope = report["slope"]
    left = report["seconds_to_exhaustion"]
    yield (
        f"trend: {report['trend']}",
        "unknown" if slope is None else f"{format_size(slope)}/s",
        "" if left is None else f"all in use in {left:.0f} s if it goes on",
    )
    if report["psi"] is not None and report["psi"][0] >= 0.0005:
        some, full = report["psi"]
        time = f"some tasks {format_share(some)}, all {format_share(full)} of time"
        yield "waiting for memory", "", time
    marks = zip(("medium", "high", "critical"), thresholds, strict=True)
    yield "pressure begins", "", ", ".join(f"{name} {format_share(share)}" for name, share in marks)


def _done(actions: Sequence[tuple[Any, ...]]) -> Iterator[_Row]:
    now = time.monotonic()
    for _, when, kind, level, cause, wanted, freed, *_ in reversed(actions[-_ACTIONS:]):
        name = LEVELS[level].value if isinstance(level, int) else level
        yield (
            f"{max(0.0, now - when):.0f} s ago: {_ACTS[kind]}",
            format_size(freed),
            f"{format_size(wanted)} wanted, pressure {name}: {cause}",
        )
