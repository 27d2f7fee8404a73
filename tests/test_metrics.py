"""Metrics: names, units, labels and values, by a strict parser of the text, and Prometheus' own."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

import omnimem
from omnimem import MemoryMonitor, ModelWeightCache, Store, metrics

from .conftest import data
from .monitors import StandIn, stand_in  # noqa: F401

MIB = 1 << 20
UNITS = ("bytes", "seconds", "ratio", "level", "info", "depth", "bytes_per_second")
COUNTED = ("requests", "evictions", "errors", "failures", "repairs", "retries", "fallbacks")
COUNTED += ("prefetches", "transitions", "callbacks")
LABELS = {
    "backend", "cache", "cause", "checksum", "device", "direction", "errno_class", "kind", "le",
    "op", "pool", "reason", "resource", "result", "source", "tier", "to", "torch", "version",
    "what",
}  # fmt: skip
SAMPLE = re.compile(r"([a-z][a-z0-9_]*)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'([a-z_]+)="((?:[^"\\\n]|\\[\\"n])*)"(?:,|$)')

Key = tuple[str, frozenset[tuple[str, str]]]


def unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), text)


def parse(text: str) -> dict[Key, float]:
    """Read the text format, refusing whatever is doubtful; samples by name and labels."""
    assert text.endswith("\n")
    found: dict[Key, float] = {}
    families: dict[str, str] = {}
    name = kind = ""
    helped = ""
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            helped, words = line[7:].split(" ", 1)
            assert words.strip()
            continue
        if line.startswith("# TYPE "):
            name, kind = line[7:].split(" ")
            assert name == helped, "HELP comes right before TYPE"
            assert name not in families, "a family comes in one piece"
            assert kind in ("gauge", "counter", "histogram")
            families[name] = kind
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        labels: dict[str, str] = {}
        at = 0
        while match[2] and at < len(match[2]):
            label = LABEL.match(match[2], at)
            assert label, line
            assert label[1] not in labels
            labels[label[1]] = unescape(label[2])
            at = label.end()
        suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        assert match[1] in [name + suffix for suffix in suffixes], line
        key = (match[1], frozenset(labels.items()))
        assert key not in found, line
        found[key] = float(match[3])
    check_names(families)
    check_values(families, found)
    return found


def check_names(families: dict[str, str]) -> None:
    for name, kind in families.items():
        assert re.fullmatch(r"omnimem(_[a-z0-9]+)+", name), name
        assert name.endswith("_total") == (kind == "counter"), name
        base = name.removesuffix("_total")
        assert base.endswith(UNITS + (COUNTED if kind == "counter" else ())), name
        if kind == "histogram":
            assert base.endswith("_seconds"), name


def check_values(families: dict[str, str], found: dict[Key, float]) -> None:
    for (name, labels), value in found.items():
        assert value == value, name
        assert abs(value) != float("inf"), name
        assert {key for key, _ in labels} <= LABELS, (name, labels)
        if name.endswith("_ratio"):
            assert 0 <= value <= 1, name
        if name != "omnimem_usage_slope_bytes_per_second":
            assert value >= 0, name
    for name in (name for name, kind in families.items() if kind == "histogram"):
        series = {
            frozenset(pair for pair in labels if pair[0] != "le")
            for sample, labels in found
            if sample == f"{name}_bucket"
        }
        assert series, name
        for labels in series:
            steps = sorted(
                (float(dict(key)["le"]), value)
                for (sample, key), value in found.items()
                if sample == f"{name}_bucket" and labels <= key
            )
            values = [value for _, value in steps]
            assert values == sorted(values), name
            assert steps[-1] == (float("inf"), found[f"{name}_count", labels]), name
            assert f"{name}_sum" in [sample for sample, key in found if key == labels]


def get(found: dict[Key, float], name: str, **labels: str) -> float:
    return found[f"omnimem_{name}", frozenset(labels.items())]


def names(found: dict[Key, float]) -> set[str]:
    return {name for name, _ in found}


def test_text_is_strict(open_store: Callable[..., Store]) -> None:
    store = open_store()
    store.add("a", bytes(MIB))
    pools = omnimem.MemoryPoolManager(omnimem.MemoryConfig(pool_sizes={"cpu": "8MiB"}))
    pools.allocate(1000, "cpu")
    with MemoryMonitor(store=store) as monitor:
        monitor.get_memory_stats()
        everything = parse(metrics.as_text())
        parse(metrics.as_text([store], [pools], [monitor]))
        parse(metrics.as_text([], [], []))
    parse(metrics.as_text())
    assert get(everything, "memory_limit_bytes", resource="host", source="system") > 0
    assert get(everything, "pressure_level", resource="all") in range(4)
    assert get(everything, "pool_used_bytes", pool="cpu", device="cpu") >= 1000
    pools.deallocate(next(iter(pools.pools["cpu"].values())))
    pools.close()


def test_values_of_a_store(open_store: Callable[..., Store], io_backend: str) -> None:
    store = open_store()
    cache = ModelWeightCache(0.01)
    cache.put("model", "layer", data(MIB))
    for number in range(6):
        store.add(f"{number}", data(4 * MIB, number))  # 16 MiB fit
    assert store.evict("5")
    store.lease("5").release()
    store.lease("5").release()
    cache.get("model", "layer")
    cache.get("model", "nothing")
    store.remove("5")
    view = memoryview(store.lease("4"))
    found = parse(metrics.as_text([store, cache.store], [], []))
    stats = store.stats()
    host, disk = {"tier": "host", "device": "cpu"}, {"tier": "disk", "device": "disk"}
    limit = cache.store.stats().host.limit_bytes
    assert get(found, "tier_capacity_bytes", **host) == 16 * MIB + limit
    resident = get(found, "tier_resident_bytes", **host, kind="block")
    assert resident == stats.host.used_bytes
    assert get(found, "tier_resident_bytes", **host, kind="cache") == MIB
    assert get(found, "tier_resident_bytes", **disk, kind="block") == stats.disk.used_bytes
    assert get(found, "tier_inflight_bytes", **host, direction="in") == 0
    assert get(found, "tier_exported_bytes", **host) == 4 * MIB
    assert get(found, "tier_locked_bytes", **host) >= 4 * MIB
    assert get(found, "swap_file_bytes") == stats.disk.mapped_bytes
    assert get(found, "swap_free_bytes") == stats.disk.mapped_bytes - stats.disk.used_bytes
    assert get(found, "cache_requests_total", cache="blocks", result="miss") == stats.misses
    assert get(found, "cache_requests_total", cache="blocks", result="hit_host") >= 1
    assert get(found, "cache_requests_total", cache="weights", result="hit_host") == 1
    assert get(found, "cache_requests_total", cache="weights", result="miss") == 1
    explicit = {"tier": "host", "reason": "explicit"}
    assert get(found, "evictions_total", **explicit) == 1
    assert get(found, "evicted_bytes_total", **explicit) == 4 * MIB
    capacity = {"tier": "host", "reason": "capacity"}
    evicted = get(found, "evictions_total", **capacity)
    assert evicted >= 2
    assert get(found, "evicted_bytes_total", **capacity) == evicted * 4 * MIB
    assert get(found, "eviction_idle_seconds_count", tier="host") == evicted + 1
    assert get(found, "item_lifetime_seconds_count", tier="host") == 1
    read, written = stats.read_bytes, stats.written_bytes
    assert get(found, "transfer_bytes_total", direction="disk_to_host") == read > 0
    assert get(found, "transfer_bytes_total", direction="host_to_disk") == written > 0
    assert get(found, "swap_written_bytes_total") == written
    assert get(found, "transfer_seconds_count", direction="out") == stats.writes
    assert get(found, "transfer_seconds_sum", direction="in") > 0
    assert get(found, "io_wait_seconds_count", op="read") == read / MIB
    assert get(found, "stall_seconds_total", cause="bytes") == stats.stall_seconds > 0
    info = [dict(labels) for name, labels in found if name == "omnimem_info"]
    assert [each["backend"] for each in info] in ([io_backend], ["threads,uring"])
    view.release()
    cache.close()


def test_faults_are_counted(open_store: Callable[..., Store], file_of: Callable[..., Any]) -> None:
    store = open_store()
    path = file_of(data(MIB))
    store.add_file("a", path, 0, MIB)
    store.lease("a").release()
    store.evict("a")
    with open(path, "r+b") as file:
        file.write(b"other")
    with pytest.raises(omnimem.CorruptError):
        store.lease("a")
    found = parse(metrics.as_text([store], [], []))
    stats = store.stats()
    assert get(found, "checksum_failures_total") == stats.corrupt
    assert get(found, "retries_total", what="checksum") == stats.rereads
    wrong = get(found, "errors_total", op="verify", errno_class="checksum")
    assert wrong == stats.corrupt - stats.rereads


def test_what_is_closed_stays_counted(open_store: Callable[..., Store]) -> None:
    gc.collect()
    before = parse(metrics.as_text())
    store = open_store()
    store.add("a", data(MIB))
    store.evict("a")
    during = parse(metrics.as_text())
    store.close()
    after = parse(metrics.as_text())
    for key, value in after.items():
        if key[0].endswith(("_total", "_count", "_sum", "_bucket")):
            assert value >= during.get(key, 0) >= before.get(key, 0), key
    written = [get(found, "swap_written_bytes_total") for found in (before, during, after)]
    assert written == [written[0], written[0] + MIB, written[0] + MIB]
    assert "omnimem_tier_capacity_bytes" not in names(parse(metrics.as_text([store], [], [])))


def test_values_of_a_monitor(stand_in: type[StandIn]) -> None:  # noqa: F811
    gib = 1 << 30
    monitor = MemoryMonitor()
    core = stand_in.made
    core.enter(1, 2, usage=0.75)
    found = parse(metrics.as_text([], [], [monitor]))
    for unknown in ("pressure_stall_ratio", "time_to_exhaustion_seconds"):
        assert f"omnimem_{unknown}" not in names(found)
    assert "omnimem_usage_slope_bytes_per_second" not in names(found)
    assert get(found, "memory_other_bytes", resource="host", device="cpu") == 2 * gib
    assert get(found, "pressure_level", resource="all") == 2
    assert get(found, "pressure_transitions_total", resource="all", to="high") == 1
    core.more = {
        "psi": (0.25, 0.5),
        "psi_seconds": (10.0, 5.0),
        "slope": -2.5,
        "seconds_to_exhaustion": 7.0,
        "rss": None,
        "gpus": [(0, "uuid", "name", 8 * gib, gib, 3)],
        "places": [
            ("system", 4 * gib, None, gib, 3 * gib),
            ('cgroup /a"b\\c\nd', gib, None, gib, 0),
        ],
        "lag_seconds": 0.125,
        "overhead_seconds": 2.5,
    }
    core.enter(3)
    found = parse(metrics.as_text([], [], [monitor]))
    assert get(found, "pressure_stall_ratio", resource="memory", kind="full") == 0.5
    assert get(found, "pressure_stall_seconds_total", resource="memory", kind="some") == 10
    assert get(found, "usage_slope_bytes_per_second", resource="host") == -2.5
    assert get(found, "time_to_exhaustion_seconds", resource="host") == 7
    assert get(found, "memory_available_bytes", resource="gpu0", source="device") == gib
    odd = {"resource": "host", "source": 'cgroup /a"b\\c\nd'}
    assert get(found, "memory_limit_bytes", **odd) == gib
    assert get(found, "pressure_level", resource="gpu0") == 3
    assert get(found, "monitor_lag_seconds") == 0.125
    assert get(found, "monitor_overhead_seconds_total") == 2.5
    assert "omnimem_memory_other_bytes" not in names(found)
    before = get(parse(metrics.as_text()), "pressure_transitions_total", resource="all", to="high")
    monitor.close()
    after = parse(metrics.as_text())
    assert get(after, "pressure_transitions_total", resource="all", to="high") == before
    assert not names(parse(metrics.as_text([], [], [monitor]))) & {
        "omnimem_pressure_transitions_total"
    }


def test_dict_and_text_say_the_same(store: Store) -> None:
    store.add("a", bytes(MIB))
    values = metrics.as_dict([store], [], [])
    found = {
        (name, frozenset(labels.items())): float(value)
        for name, samples in values.items()
        for labels, value in samples
    }
    assert found == parse(metrics.as_text([store], [], []))


def test_prometheus_client_reads_the_text(store: Store) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    store.add("a", bytes(MIB))
    store.evict("a")
    monitor = MemoryMonitor()
    text = metrics.as_text([store], [], [monitor])
    monitor.close()
    theirs = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert theirs == parse(text)


def test_collector(store: Store) -> None:
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    store.add("a", bytes(MIB))
    store.evict("a")
    collector = metrics.Collector([store], [], [])
    registry.register(collector)
    theirs = parse(client.generate_latest(registry).decode())
    ours = parse(metrics.as_text([store], [], []))
    assert theirs == ours
    registry.unregister(collector)
    registry.register(metrics.Collector())
    parse(client.generate_latest(registry).decode())


def test_collector_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
    with pytest.raises(ImportError, match=r"omnimem\[prometheus\]"):
        metrics.Collector()


def test_the_parser_is_strict() -> None:
    good = '# HELP omnimem_a_bytes A.\n# TYPE omnimem_a_bytes gauge\nomnimem_a_bytes{tier="x"} 1\n'
    assert parse(good)
    for bad in (
        good[:-1],
        good.replace("# HELP omnimem_a_bytes A.\n", ""),
        good.replace("gauge", "counter"),
        good.replace("omnimem_a_bytes", "omnimem_a"),
        good.replace('"x"', '"x""'),
        good.replace('tier="x"', 'tier="x",tier="y"'),
        good.replace("tier", "block"),
        good + 'omnimem_a_bytes{tier="x"} 2\n',
        good + "omnimem_b_bytes 2\n",
        good + good.replace("x", "y"),
        good.replace(" 1\n", " NaN\n"),
        good.replace(" 1\n", " -1\n"),
        good.replace("a_bytes", "a_ratio").replace(" 1\n", " 1.5\n"),
    ):
        with pytest.raises(AssertionError):
            parse(bad)


def test_what_goes_under_pressure_is_told_apart(store: Store) -> None:
    store.add("a", bytes(MIB))
    store.press(2, nbytes=MIB)
    found = parse(metrics.as_text([store], [], []))
    assert get(found, "evictions_total", tier="host", reason="pressure") == 1
    assert get(found, "evicted_bytes_total", tier="host", reason="pressure") == MIB
    assert get(found, "evictions_total", tier="host", reason="explicit") == 0
