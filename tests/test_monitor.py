"""The memory monitor's face: records, pressure, explanations, its life; forks, exits, leaks."""

from __future__ import annotations

import copy
import gc
import logging
import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import omnimem
from omnimem import (
    ClosedError,
    MemoryMonitor,
    MemoryPressure,
    MemoryPressureLevel,
    MemoryStats,
    ModelWeightCache,
    MonitorConfig,
    PoolStats,
    Store,
    StoreStats,
)

from .conftest import run_clean
from .monitors import StandIn, stand_in, wait_until  # noqa: F401

LOW, MEDIUM, HIGH, CRITICAL = MemoryPressureLevel
MIB = 1 << 20
NAMES = ("omnimem-alerts", "omnimem-alert", "omnimem-monitor")


def threads() -> list[str]:
    """Names of the monitor's threads in this process."""
    names = []
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm") as file:
                names.append(file.read().strip())
        except OSError:
            continue
    python = [thread.name for thread in threading.enumerate()]
    return [name for name in names + python if name in NAMES]


# -- asking --------------------------------------------------------------------------------------


def test_stats_without_parts() -> None:
    monitor = MemoryMonitor()
    stats = monitor.get_memory_stats()
    total, available = stats.system_memory
    assert 0 < available <= total
    assert stats.usage == pytest.approx(1 - available / total)
    assert stats.rss is not None
    assert 0 < stats.rss < total
    assert (stats.pool_stats, stats.cache_stats, stats.store) == ({}, {}, None)
    assert abs(stats.timestamp - time.time()) < 3600
    assert stats.source
    assert not monitor.history  # a question is no record
    assert monitor.get_memory_stats().number > stats.number
    monitor.close()


def test_stats_of_parts(store: Store) -> None:
    store.add("a", bytes(MIB))
    pools = omnimem.MemoryPoolManager(omnimem.MemoryConfig(pool_sizes={"cpu": "8MiB"}))
    cache = ModelWeightCache(0.01)
    cache.put("model", "layer", b"x" * 4096)
    with MemoryMonitor(store=store, pools=pools, cache=cache) as monitor:
        stats = monitor.get_memory_stats()
        assert isinstance(stats.store, StoreStats)
        assert stats.store.host.used_bytes == MIB
        assert stats.pool_stats == {"cpu": PoolStats(**_fields(pools.get_pool_stats("cpu")))}
        assert stats.cache_stats["item_count"] == 1
        wait_until(lambda: monitor.history)
        record = monitor.history[-1]
        assert record.cache_stats["cache_size_bytes"] == 4096
        assert "access_counts" not in record.cache_stats
        store.close()
        pools.close()
        cache.close()
        stats = monitor.get_memory_stats()
        assert (stats.pool_stats, stats.cache_stats["item_count"]) == ({}, 0)


def _fields(stats: PoolStats) -> dict[str, Any]:
    return {name: getattr(stats, name) for name in stats.__slots__}


def test_the_caches_store_is_watched_too(
    stand_in: type[StandIn],  # noqa: F811
    store: Store,
) -> None:
    cache = ModelWeightCache(0.01)
    pools = omnimem.MemoryPoolManager(omnimem.MemoryConfig(pool_sizes={"cpu": "8MiB"}))
    MemoryMonitor(store=store, cache=cache, pools=pools)
    assert stand_in.made.watched == [store, cache.store, pools]
    MemoryMonitor(store=cache.store, cache=cache)
    assert stand_in.made.watched == [cache.store]
    monitor = MemoryMonitor(cache=cache)
    assert monitor.get_memory_stats().store is not None
    cache.close()


@pytest.mark.parametrize(
    ("rank", "word"), [(0, "low"), (1, "warning"), (2, "warning"), (3, "critical")]
)
def test_pressure(stand_in: type[StandIn], rank: int, word: str) -> None:  # noqa: F811
    monitor = MemoryMonitor()
    core = stand_in.made
    core.more = {"seconds_to_exhaustion": 12.5}
    core.enter(rank, usage=0.81)
    pressure = monitor.check_memory_pressure()
    assert pressure == word
    assert isinstance(pressure, str)
    assert {word: 1}[pressure] == 1  # as a key, too
    assert pressure.level is list(MemoryPressureLevel)[rank]
    assert (pressure.usage, pressure.seconds_to_exhaustion) == (0.81, 12.5)
    assert pressure.cause == (f"level {rank}" if rank else "")
    stats = monitor.get_memory_stats()
    assert (stats.pressure, stats.pressure.cause) == (pressure, pressure.cause)
    for again in (pickle.loads(pickle.dumps(pressure)), copy.copy(pressure)):
        assert isinstance(again, MemoryPressure)
        assert (again, again.level, again.cause) == (word, pressure.level, pressure.cause)


def test_thresholds(stand_in: type[StandIn]) -> None:  # noqa: F811
    MemoryMonitor(MonitorConfig(monitoring_interval=2.5))
    assert stand_in.made.thresholds == pytest.approx((0.75, 0.825, 0.9))
    assert stand_in.made.interval == 2.5
    MemoryMonitor(MonitorConfig(alert_thresholds={"warning": 0.5, "critical": 0.7}))
    assert stand_in.made.thresholds == pytest.approx((0.5, 0.6, 0.7))


def test_thresholds_reach_the_core() -> None:
    shares = {"warning": 1e-9, "critical": 1.0}
    monitor = MemoryMonitor(MonitorConfig(alert_thresholds=shares))
    for _ in range(3):
        pressure = monitor.check_memory_pressure()
    assert pressure == "warning"
    assert pressure.cause
    assert monitor.wait_for_level("warning", timeout=0.0)
    assert not monitor.wait_for_level("low", timeout=0.0)
    monitor.close()


def test_gpu_memory_is_the_fullest(stand_in: type[StandIn]) -> None:  # noqa: F811
    monitor = MemoryMonitor()
    stand_in.made.more = {
        "gpus": [
            (0, "u0", "one", 100, 60, 0),
            (1, "u1", "two", 200, 20, 3),
            (2, "u2", "?", 0, 0, 0),
        ]
    }
    stats = monitor.get_memory_stats()
    assert stats.gpu_memory == (200, 20)
    assert stats.gpus[0] == ("one", 100, 60)
    assert "two" in monitor.explain()


# -- records -------------------------------------------------------------------------------------


def test_history(stand_in: type[StandIn]) -> None:  # noqa: F811
    monitor = MemoryMonitor(MonitorConfig(history_size=3))
    core = stand_in.made
    assert monitor.history.maxlen == 3
    with monitor:
        for number in range(1, 7):
            core.enter(0)
            wait_until(lambda n=number: monitor.history and monitor.history[-1].number >= n)
    assert [type(record) for record in monitor.history] == [MemoryStats] * 3
    assert monitor.get_history(2) == list(monitor.history)[-2:]
    assert monitor.get_history() == list(monitor.history)
    assert monitor.get_history(0) == []
    with pytest.raises(ValueError, match="limit=-1"):
        monitor.get_history(-1)


def test_history_knows_of_quiet_samples(stand_in: type[StandIn]) -> None:  # noqa: F811
    """Nobody is woken for them: they are kept when somebody looks, and at the end."""
    with MemoryMonitor() as monitor:
        core = stand_in.made
        core.enter(0)
        wait_until(lambda: core.noticed == 1)
        history = monitor._history
        core.pass_quietly(3)
        assert len(history) <= 1
        assert [record.number for record in monitor.history] == [1, 2, 3, 4]
        assert [record.number for record in monitor.get_history()] == [1, 2, 3, 4]
        core.pass_quietly(2)
        stats = monitor.log_memory_usage("now")
        assert [record.number for record in history][:-1] == [1, 2, 3, 4, 5, 6, stats.number][
            : len(history) - 1
        ]
        core.pass_quietly(1)
    assert history[-1].number == core.number


def test_log_memory_usage(caplog: pytest.LogCaptureFixture) -> None:
    monitor = MemoryMonitor()
    with caplog.at_level(logging.INFO, "omnimem.monitor"):
        stats = monitor.log_memory_usage("after loading")
    assert list(monitor.history) == [stats]
    assert stats.stage == "after loading"
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("omnimem.monitor", logging.INFO)
    assert record.getMessage().startswith("after loading: ")
    assert "\n" not in record.getMessage()
    fields: Any = record
    assert (fields.stage, fields.pressure) == ("after loading", str(stats.pressure))
    assert (fields.total_bytes, fields.available_bytes) == stats.system_memory
    assert (fields.usage, fields.rss_bytes) == (stats.usage, stats.rss)
    monitor.close()


def test_a_sample_that_fails_is_not_the_last(
    stand_in: type[StandIn],  # noqa: F811
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with MemoryMonitor() as monitor:
        with monkeypatch.context() as broken:
            broken.setattr(monitor, "_record", lambda report: 1 // 0)
            stand_in.made.enter(0)
            wait_until(lambda: "could not keep" in caplog.text)
        stand_in.made.enter(0)
        wait_until(lambda: monitor.history)


# -- explain -------------------------------------------------------------------------------------


def test_explain_with_nothing_watched() -> None:
    monitor = MemoryMonitor()
    text = monitor.explain()
    assert "nothing was done" in text
    assert "this process" in text
    assert "others" in text
    assert "\x1b" not in text
    monitor.close()


def test_explain_says_who_holds_what(
    stand_in: type[StandIn],  # noqa: F811
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store.add("a", bytes(3 * MIB), "[bold]big")
    store.add("b", bytes(MIB), "small")
    pools = omnimem.MemoryPoolManager(omnimem.MemoryConfig(pool_sizes={"cpu": "8MiB"}))
    monitor = MemoryMonitor(store=store, pools=pools)
    core = stand_in.made
    core.more = {"psi": (0.25, 0.125), "slope": float(MIB), "seconds_to_exhaustion": 9.0}
    core.more["spare"] = 7 * MIB
    core.acted = [(1, time.monotonic(), "evict", 2, "93 % in use", 2 * MIB, 3 * MIB, 0.0)]
    core.enter(2, usage=0.9)
    for width in ("60", "100", "200"):
        monkeypatch.setenv("COLUMNS", width)
        text = monitor.explain()
        assert max(map(len, text.splitlines())) <= int(width)
        assert "\x1b" not in text
        words = " ".join(text.replace("|", " ").split())
        assert words.startswith("Pressure is high: level 2; the last action, 0 s ago, was evicting")
        for part in ("3.00 MiB of 2.00 MiB wanted", "93 % in use", "[bold]big", "small", "cpu"):
            assert part in words, part
        assert "medium 75.0 %" in words
    assert text.index("[bold]big") < text.index("small")
    told = ("in use: system", "block of the peak", "7.00 MiB", "some tasks 25.0 %", "in 9 s")
    for part in told:
        assert part in text, part
    store.close()
    assert "Pressure is high" in monitor.explain()


# -- life ----------------------------------------------------------------------------------------


def test_start_and_stop_are_idempotent() -> None:
    monitor = MemoryMonitor(MonitorConfig(monitoring_interval=0.05))
    for _ in range(2):
        monitor.stop_monitoring()
        monitor.start_monitoring()
        monitor.start_monitoring()
        assert monitor.running
        assert threads().count("omnimem-alerts") >= 1
        wait_until(lambda: len(monitor.history) >= 2)
        monitor.stop_monitoring()
        assert not monitor.running
        assert not threads()
        monitor.history.clear()
    assert "stopped" in repr(monitor)
    monitor.close()
    monitor.close()
    assert "closed" in repr(monitor)
    for question in (
        monitor.get_memory_stats,
        monitor.check_memory_pressure,
        monitor.start_monitoring,
        monitor.explain,
        lambda: monitor.log_memory_usage("late"),
        lambda: monitor.wait_for_level("critical", timeout=1),
    ):
        with pytest.raises(ClosedError):
            question()
    assert not threads()


def test_starting_and_stopping_on_many_threads() -> None:
    with MemoryMonitor(MonitorConfig(monitoring_interval=0.05)) as monitor:

        def turn() -> None:
            for _ in range(20):
                monitor.start_monitoring()
                monitor.check_memory_pressure()
                monitor.stop_monitoring()

        workers = [threading.Thread(target=turn) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
            assert not worker.is_alive()
    wait_until(lambda: not threads())


def test_disabled(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.DEBUG, "omnimem.monitor"),
        MemoryMonitor(MonitorConfig(enable_monitoring=False)) as monitor,
    ):
        assert not monitor.running
        assert not threads()
        assert "enable_monitoring" in caplog.text
        assert monitor.get_memory_stats().system_memory[0] > 0
        assert monitor.check_memory_pressure() in ("low", "warning", "critical")
        assert monitor.explain()
        monitor.log_memory_usage("still")
        assert len(monitor.history) == 1


def test_dropped_while_running() -> None:
    monitor = MemoryMonitor(MonitorConfig(monitoring_interval=0.05))
    monitor.alerts.add(monitor.log_memory_usage)  # type: ignore[arg-type]
    monitor.start_monitoring()
    history = monitor.history
    wait_until(lambda: history)
    gone = weakref.ref(monitor)
    del monitor
    wait_until(lambda: gc.collect() is None or gone() is None)
    wait_until(lambda: not threads())


def test_wait_for_level(stand_in: type[StandIn]) -> None:  # noqa: F811
    monitor = MemoryMonitor(MonitorConfig(monitoring_interval=0.05))
    core = stand_in.made
    assert monitor.wait_for_level("low")
    assert not monitor.wait_for_level("warning", timeout=0.01)
    for running in (False, True):
        if running:
            monitor.start_monitoring()
        core.enter(0)
        reached: list[bool] = []
        waiter = threading.Thread(target=lambda r=reached: r.append(monitor.wait_for_level(HIGH)))
        waiter.start()
        core.enter(1)
        assert not reached
        core.enter(3)
        waiter.join(30)
        assert reached == [True]
    waiter = threading.Thread(target=lambda: reached.append(monitor.wait_for_level("low")))
    waiter.start()
    core.enter(0)
    waiter.join(30)
    assert reached == [True, True]
    errors: list[type] = []

    def wait() -> None:
        try:
            monitor.wait_for_level("critical")
        except ClosedError as error:
            errors.append(type(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    monitor.close()
    waiter.join(30)
    assert errors == [ClosedError]
    with pytest.raises(ValueError, match="severe"):
        monitor.wait_for_level("severe")


def test_store_gives_way(open_store: Callable[..., Store]) -> None:
    """The real core has what the monitor watches pressed, and the monitor tells of it."""
    store = open_store()
    for number in range(8):
        store.add(str(number), bytes(MIB))
    shares = {"warning": 1e-9, "critical": 2e-9}
    config = MonitorConfig(monitoring_interval=0.05, alert_thresholds=shares)
    with MemoryMonitor(config, store=store) as monitor:
        assert monitor.wait_for_level("critical", timeout=60)
        wait_until(lambda: monitor._core.actions())
        text = monitor.explain()
    assert "Pressure is critical" in text
    assert "the last action" in text
    store.check()


# -- processes -----------------------------------------------------------------------------------

OPEN = """
import gc, os, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork with threads
import omnimem
config = omnimem.MonitorConfig(monitoring_interval=0.05)
store = omnimem.Store(omnimem.StoreConfig(host_limit="8MiB", directory=sys.argv[1]))
monitor = omnimem.MemoryMonitor(config, store=store)
def wait():
    try:
        monitor.wait_for_level("critical")
    except omnimem.ClosedError:
        pass
"""


@pytest.mark.parametrize("leave", ["sys.exit(0)", "os._exit(0)"])
@pytest.mark.parametrize("start", ["", "monitor.start_monitoring()"])
def test_fork(tmp_path: Any, start: str, leave: str) -> None:
    code = f"""
{start}
monitor.get_memory_stats()
child = os.fork()
if child == 0:
    failed = []
    for name in ("get_memory_stats", "check_memory_pressure", "explain", "start_monitoring"):
        try:
            getattr(monitor, name)()
            failed.append(name)
        except omnimem.ClosedError:
            pass
    monitor.stop_monitoring()
    monitor.close()
    other = omnimem.MemoryMonitor(config)
    with other:
        deadline = time.monotonic() + 30
        while not other.history and time.monotonic() < deadline:
            time.sleep(0.001)
        failed += [] if other.history else ["own"]
    omnimem.metrics.as_text()
    print(failed, flush=True)
    del monitor
    gc.collect()
    {leave}
pid, status = os.waitpid(child, 0)
assert status == 0, status
assert monitor.get_memory_stats().number > 1
monitor.close()
"""
    assert run_clean(OPEN + code, str(tmp_path)) == "[]\n"


@pytest.mark.parametrize(
    "stage",
    [
        "",
        "monitor.start_monitoring()",
        "monitor.start_monitoring(); time.sleep(0.1)",
        "monitor.start_monitoring(); monitor.stop_monitoring()",
        "monitor.start_monitoring(); del monitor",
        "monitor.start_monitoring(); store.close()",
        "monitor.alerts.add(lambda alert: time.sleep(60)); monitor.start_monitoring()",
        "threading.Thread(target=wait, daemon=True).start()",
        "monitor.start_monitoring(); store.add('a', bytes(1 << 20)); tracked = omnimem.track()"
        "; tracked.__enter__()",
    ],
)
def test_exit(tmp_path: Any, stage: str) -> None:
    assert run_clean(f"{OPEN}\n{stage}\nprint('end')", str(tmp_path)) == "end\n"


def test_exit_while_a_callback_sleeps(tmp_path: Any) -> None:
    code = """
began = threading.Event()
def sleep(alert):
    began.set()
    time.sleep(600)
shares = {"warning": 1e-9, "critical": 2e-9}
config = omnimem.MonitorConfig(monitoring_interval=0.05, alert_thresholds=shares)
monitor = omnimem.MemoryMonitor(config)
monitor.alerts.add(sleep)
monitor.start_monitoring()
assert began.wait(60)
print("end")
"""
    assert run_clean(OPEN + code, str(tmp_path)) == "end\n"


@pytest.mark.slow
def test_a_thousand_leave_nothing(tmp_path: Any) -> None:
    code = """
def held():
    gc.collect()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return (len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")),
            pages * os.sysconf("SC_PAGE_SIZE"))
def turn():
    with omnimem.MemoryMonitor(config, store=store) as each:
        each.alerts.add(print)
        each.check_memory_pressure()
for _ in range(200):
    turn()
before = held()
for _ in range(1000):
    turn()
after = held()
assert after[:2] == before[:2], (before, after)
assert after[2] - before[2] < 1 << 20, (before, after)  # a byte each would be a kilobyte
assert not [t for t in threading.enumerate() if t.name.startswith("omnimem")]
print("end")
"""
    assert run_clean(OPEN + code, str(tmp_path), timeout=300) == "end\n"
