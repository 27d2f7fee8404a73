"""Metrics: what stores, pools and monitors count, as a dict, as text, and for prometheus_client.

Names follow Prometheus' conventions: bytes and seconds, ratios from 0 to 1, `_total` for counters.
What is unknown is absent. Counters are the whole process's: a store or monitor that is closed
leaves what it had counted. Nothing is computed before somebody asks.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import omnimem
from omnimem._totals import totals
from omnimem.alerts import LEVELS
from omnimem.errors import ClosedError
from omnimem.monitor import MemoryMonitor, _closed, _counted, _open_monitors
from omnimem.pools import MemoryPoolManager, _open_pools
from omnimem.store import Store, StoreStats, _open_stores

__all__ = ["Collector", "as_dict", "as_text"]

Labels = dict[str, str]
Samples = dict[str, list[tuple[Labels, float]]]

_BOUNDS = [repr(float(f"{8 * 4**step}e-6")) for step in range(15)]
"""Upper bounds of the core's histograms, in seconds; the last step has none."""
_REASONS = ("capacity", "pressure", "explicit")
_FAILURES = ("enospc", "eio", "short", "other")


@dataclass(slots=True)
class _Family:
    """One metric with all its label values."""

    name: str
    kind: str
    """"gauge", "counter" or "histogram"."""
    help: str
    values: list[tuple[Labels, Any]] = field(default_factory=list)
    """Numbers; of a histogram [count, sum in ns, count of each step ...]."""

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        """Each number with its name."""
        for labels, value in self.values:
            if self.kind != "histogram":
                yield self.name, labels, value
                continue
            so_far = 0
            for bound, count in zip([*_BOUNDS, "+Inf"], value[2:], strict=True):
                so_far += count
                yield f"{self.name}_bucket", {**labels, "le": bound}, so_far
            yield f"{self.name}_sum", labels, value[1] / 1e9
            yield f"{self.name}_count", labels, value[0]


def as_dict(
    stores: Iterable[Store] | None = None,
    pools: Iterable[MemoryPoolManager] | None = None,
    monitors: Iterable[MemoryMonitor] | None = None,
) -> Samples:
    """All metrics as numbers.

    Parameters
    ----------
    stores, pools, monitors
        Whose; None: all of the process.

    Returns
    -------
    dict of str to list of (dict, number)
        By name, each number with its labels. A histogram is three names, as Prometheus has them:
        `_bucket` (cumulative, by `le`), `_sum` and `_count`.
    """
    found: Samples = {}
    for family in _collect(stores, pools, monitors):
        for name, labels, value in family.samples():
            found.setdefault(name, []).append((labels, value))
    return found


def as_text(
    stores: Iterable[Store] | None = None,
    pools: Iterable[MemoryPoolManager] | None = None,
    monitors: Iterable[MemoryMonitor] | None = None,
) -> str:
    """All metrics in Prometheus' text format 0.0.4, for an HTTP endpoint or a textfile collector.

    Parameters are those of `as_dict`.
    """
    lines = []
    for family in _collect(stores, pools, monitors):
        lines.append(f"# HELP {family.name} {_escape(family.help)}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        for name, labels, value in family.samples():
            inside = ",".join(f'{key}="{_escape(text, True)}"' for key, text in labels.items())
            lines.append(f"{name}{{{inside}}} {value!r}" if inside else f"{name} {value!r}")
    return "\n".join(lines) + "\n"


def _escape(text: str, quoted: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quoted else text


class Collector:
    """All metrics for prometheus_client: `REGISTRY.register(omnimem.metrics.Collector())`.

    Costs nothing until it is scraped. prometheus_client's multiprocess mode knows no collectors of
    this kind: there, serve `as_text` of each process.

    Parameters are those of `as_dict`.

    Raises
    ------
    ImportError
        prometheus_client is not installed: `pip install 'omnimem[prometheus]'`.
    """

    def __init__(
        self,
        stores: Iterable[Store] | None = None,
        pools: Iterable[MemoryPoolManager] | None = None,
        monitors: Iterable[MemoryMonitor] | None = None,
    ) -> None:
        try:
            self._core: Any = import_module("prometheus_client.core")
        except ImportError as error:
            raise ImportError(
                "omnimem.metrics.Collector needs prometheus_client: pip install "
                "'omnimem[prometheus]'"
            ) from error
        given = (stores, pools, monitors)
        self._given: Any = tuple(None if part is None else tuple(part) for part in given)

    def describe(self) -> Iterable[Any]:
        """Nothing: which metrics there are depends on what is open."""
        return []

    def collect(self) -> Iterator[Any]:
        """The metrics as prometheus_client has them."""
        for family in _collect(*self._given):
            metric = self._core.Metric(family.name.removesuffix("_total"), family.help, family.kind)
            for name, labels, value in family.samples():
                metric.add_sample(name, labels, value)
            yield metric


# -- collecting ----------------------------------------------------------------------------------


def _collect(
    stores: Iterable[Store] | None,
    pools: Iterable[MemoryPoolManager] | None,
    monitors: Iterable[MemoryMonitor] | None,
) -> list[_Family]:
    """All metrics that have a value now."""
    given = None if stores is None else list(stores)
    found = list(_of_stores(list(_open_stores) if given is None else given))
    counted = totals(given)
    found += (*_of_blocks(counted), *_of_faults(counted))
    found += _of_pools(list(_open_pools) if pools is None else pools)
    found += _of_monitors(None if monitors is None else list(monitors))
    return [family for family in found if family.values]


def _of_stores(stores: Iterable[Store]) -> Iterator[_Family]:
    """What stores hold now."""
    stats: list[StoreStats] = []
    gauges: Counter[str] = Counter()
    for store in stores:
        try:
            _, held, closed = store._totals()
            if not closed:
                stats.append(store.stats())
                gauges.update(held)
        except ClosedError:  # of the process that forked this one
            continue
    backends = sorted({each.io_backend for each in stats})
    info = {"version": omnimem.__version__, "checksum": "xxh3-64", "backend": ",".join(backends)}
    torch = sys.modules.get("torch")
    info["torch"] = str(getattr(torch, "__version__", ""))
    yield _Family("omnimem_info", "gauge", "What runs; always 1.", [(info, 1)])
    if not stats:
        return
    host, disk = {"tier": "host", "device": "cpu"}, {"tier": "disk", "device": "disk"}
    packed = {"tier": "packed", "device": "cpu"}

    def summed(tier: str, what: str) -> int:
        return sum(getattr(getattr(each, tier), what) for each in stats)

    yield _Family(
        "omnimem_tier_capacity_bytes",
        "gauge",
        "Limit of the tier; encoded bytes share that of host.",
        [(host, summed("host", "limit_bytes")), (disk, summed("disk", "limit_bytes"))],
    )
    plain = gauges["host_bytes"] - gauges["packed_bytes"] - gauges["entry_bytes"]
    yield _Family(
        "omnimem_tier_resident_bytes",
        "gauge",
        "Bytes held by copies of blocks.",
        [
            ({**host, "kind": "block"}, plain),
            ({**host, "kind": "cache"}, gauges["entry_bytes"]),
            ({**packed, "kind": "encoded"}, gauges["packed_bytes"]),
            ({**disk, "kind": "block"}, summed("disk", "used_bytes")),
        ],
    )
    yield _Family(
        "omnimem_tier_inflight_bytes",
        "gauge",
        "Bytes of copies on their way into and out of the tier.",
        [({**host, "direction": d}, gauges[f"moving_{d}_bytes"]) for d in ("in", "out")],
    )
    yield _Family(
        "omnimem_tier_peak_bytes",
        "gauge",
        "The most that stores that are open ever held; of several, added up.",
        [(host, summed("host", "peak_bytes")), (disk, summed("disk", "peak_bytes"))],
    )
    yield _Family(
        "omnimem_tier_locked_bytes",
        "gauge",
        "Bytes that cannot be evicted now: leased, pinned, seen by somebody, or on their way.",
        [(host, sum(each.host.used_bytes - each.idle_bytes for each in stats))],
    )
    yield _Family(
        "omnimem_tier_exported_bytes",
        "gauge",
        "Bytes of blocks that a consumer can see, which cannot move.",
        [(host, sum(each.exported_bytes for each in stats))],
    )
    yield _Family(
        "omnimem_io_queue_depth",
        "gauge",
        "Requests in flight.",
        [({}, sum(each.io_in_flight for each in stats))],
    )
    size = summed("disk", "mapped_bytes")
    yield _Family("omnimem_swap_file_bytes", "gauge", "Size of the swap files.", [({}, size)])
    yield _Family(
        "omnimem_swap_free_bytes",
        "gauge",
        "Of the swap files' size, what no block uses.",
        [({}, max(0, size - summed("disk", "used_bytes")))],
    )


def _counter(name: str, text: str, values: Iterable[tuple[Labels, float]]) -> _Family:
    return _Family(f"omnimem_{name}_total", "counter", text, list(values))


def _histogram(name: str, text: str, values: Iterable[tuple[Labels, Any]]) -> _Family:
    return _Family(f"omnimem_{name}", "histogram", text, list(values))


def _of_blocks(t: Mapping[str, Any]) -> Iterator[_Family]:
    """What stores have counted of their blocks, and of moving them."""
    yield _counter(
        "cache_requests",
        "Accesses to blocks, and entries that were asked for, by where the bytes were.",
        [
            ({"cache": cache, "result": result}, t[f"{key}_{found}"])
            for cache, key in (("blocks", "block"), ("weights", "entry"))
            for found, result in (("hits", "hit_host"), ("misses", "miss"))
        ],
    )
    yield _counter(
        "evictions",
        "Copies that left the tier.",
        [({"tier": "host", "reason": r}, n) for r, n in zip(_REASONS, t["gone"], strict=True)],
    )
    yield _counter(
        "evicted_bytes",
        "Their bytes.",
        [
            ({"tier": "host", "reason": r}, n)
            for r, n in zip(_REASONS, t["gone_bytes"], strict=True)
        ],
    )
    yield _histogram(
        "eviction_idle_seconds",
        "How long copies that left had not been used.",
        [({"tier": "host"}, t["idle"])],
    )
    yield _histogram(
        "item_lifetime_seconds",
        "From adding a name to its going.",
        [({"tier": "host"}, t["life"])],
    )
    yield _counter(
        "transfer_bytes",
        "Bytes moved; disk_to_host has checkpoints too.",
        [
            ({"direction": "disk_to_host"}, t["read_bytes"]),
            ({"direction": "host_to_disk"}, t["written_bytes"]),
            ({"direction": "packed_to_host"}, t["decoded_bytes"]),
        ],
    )
    yield _histogram(
        "transfer_seconds",
        "Per copy, from the request or decision until its bytes were proven or written.",
        [({"direction": "in"}, t["in"]), ({"direction": "out"}, t["out"])],
    )
    yield _histogram(
        "io_wait_seconds",
        "Per request, from its issue to its end.",
        [({"op": "read"}, t["read_wait"]), ({"op": "write"}, t["write_wait"])],
    )
    yield _counter("stall_seconds", "Threads waited.", [({"cause": "bytes"}, t["stall_ns"] / 1e9)])


def _of_faults(t: Mapping[str, Any]) -> Iterator[_Family]:
    """What stores have counted of failures, and of what guards against them."""
    yield _counter(
        "errors",
        "What failed for good.",
        [
            ({"op": op, "errno_class": name}, count)
            for op in ("read", "write")
            for name, count in zip(_FAILURES, t[f"{op}_failures"], strict=True)
        ]
        + [({"op": "verify", "errno_class": "checksum"}, t["corrupt"] - t["rereads"])],
    )
    yield _counter(
        "checksum_failures", "Bytes that differed from those stored.", [({}, t["corrupt"])]
    )
    yield _counter("repairs", "Of these, right when read again.", [({}, t["repaired"])])
    yield _counter("retries", "Blocks read again.", [({"what": "checksum"}, t["rereads"])])
    yield _counter(
        "fallbacks",
        "Stores that had to use a slower way.",
        [({"what": "io_uring", "to": "threads"}, t["fell_back"])],
    )
    yield _counter("swap_written_bytes", "Written to swap files.", [({}, t["written_bytes"])])
    yield _counter("verified_bytes", "Hashed on their way in.", [({}, t["verified_bytes"])])
    yield _counter(
        "prefetches",
        "Blocks fetched ahead, and what became of them.",
        [
            ({"result": "used"}, t["prefetch_hits"]),
            ({"result": "wasted"}, t["prefetch_waste"]),
        ],
    )
    yield _counter(
        "codec_seconds",
        "Time that blocks took to decode, summed over blocks.",
        [({"op": "decode"}, t["decode_ns"] / 1e9)],
    )


def _of_pools(pools: Iterable[MemoryPoolManager]) -> Iterator[_Family]:
    """What pools hold now."""
    used: Counter[str] = Counter()
    reserved: Counter[str] = Counter()
    largest: dict[str, int] = {}
    for manager in pools:
        for device in manager._open_devices:
            try:
                stats = manager.get_pool_stats(device)
            except ClosedError:
                continue
            used[device] += stats.used_size
            reserved[device] += stats.reserved_size
            largest[device] = max(largest.get(device, 0), stats.largest_free_size)
    for name, text, values in (
        ("reserved", "Held by blocks.", reserved),
        ("used", "Asked for by blocks.", used),
        ("largest_free", "The largest block that would fit.", largest),
    ):
        yield _Family(
            f"omnimem_pool_{name}_bytes",
            "gauge",
            text,
            [({"pool": device, "device": "cpu"}, n) for device, n in values.items()],
        )


def _of_monitors(monitors: list[MemoryMonitor] | None) -> Iterator[_Family]:
    """What monitors see and have counted."""
    counted: Counter[tuple[str, Any]] = Counter(_closed if monitors is None else {})
    reports = []
    for monitor in list(_open_monitors) if monitors is None else monitors:
        try:
            reports.append(monitor._report())
        except ClosedError:
            continue
        counted.update(_counted(monitor._core, monitor.alerts._tally))
    if reports:
        newest = max(reports, key=lambda report: report["time"])
        yield from _of_report(newest)
        yield _Family(
            "omnimem_monitor_lag_seconds",
            "gauge",
            "How late the last sample came.",
            [({}, max(report["lag_seconds"] for report in reports))],
        )
    if not counted:
        return
    yield _Family(
        "omnimem_pressure_transitions_total",
        "counter",
        "How often a level of pressure was entered.",
        [
            ({"resource": "all", "to": level.value}, counted["transitions", rank])
            for rank, level in enumerate(LEVELS)
        ],
    )
    for name, key, text in (
        ("monitor_overhead_seconds", "overhead", "Processor time that monitors took."),
        ("alert_callbacks", "calls", "Calls of alert callbacks."),
        ("alert_callback_failures", "failures", "Those that raised."),
    ):
        yield _Family(f"omnimem_{name}_total", "counter", text, [({}, counted[key, None])])


def _of_report(report: Mapping[str, Any]) -> Iterator[_Family]:
    """What the machine has left, by the newest sample."""
    gpus = [gpu for gpu in report["gpus"] if gpu[3]]

    def gauge(name: str, text: str, values: Iterable[tuple[Labels, float]]) -> _Family:
        return _Family(f"omnimem_{name}", "gauge", text, list(values))

    places = [("host", source, limit, left) for source, limit, _, _, left in report["places"]]
    places += [(f"gpu{gpu[0]}", "device", gpu[3], gpu[4]) for gpu in gpus]
    yield gauge(
        "memory_available_bytes",
        "What can still be had; the tightest source binds.",
        [({"resource": r, "source": source}, left) for r, source, _, left in places],
    )
    yield gauge(
        "memory_limit_bytes",
        "The most that can be in use.",
        [({"resource": r, "source": source}, limit) for r, source, limit, _ in places],
    )
    if report["rss"] is not None:
        others = max(0, report["total"] - report["available"] - report["rss"])
        yield gauge(
            "memory_other_bytes",
            "In use at the tightest source, but not by this process.",
            [({"resource": "host", "device": "cpu"}, others)],
        )
    yield gauge(
        "pressure_level",
        "0 low, 1 medium, 2 high, 3 critical.",
        [({"resource": "all"}, report["level"])]
        + [({"resource": f"gpu{gpu[0]}"}, gpu[5]) for gpu in gpus],
    )
    for name, key, kind, text in (
        ("pressure_stall_ratio", "psi", "gauge", "Share of time that tasks wait for memory."),
        ("pressure_stall_seconds_total", "psi_seconds", "counter", "Time that tasks waited."),
    ):
        waits = zip(("some", "full"), report[key] or (), strict=False)
        values = [({"resource": "memory", "kind": who}, n) for who, n in waits if n is not None]
        yield _Family(f"omnimem_{name}", kind, text, [*values])
    for name, key, text in (
        ("time_to_exhaustion_seconds", "seconds_to_exhaustion", "Until all is in use."),
        ("usage_slope_bytes_per_second", "slope", "How fast memory in use grows."),
    ):
        if report[key] is not None:
            yield gauge(name, text, [({"resource": "host"}, report[key])])
