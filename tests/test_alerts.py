"""Alerts: who is called when, once each; slow, raising, self-removing callbacks; stopping."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import omnimem
from omnimem import Alert, MemoryMonitor, MemoryPressureLevel

from .monitors import StandIn, stand_in, wait_until  # noqa: F401

LOW, MEDIUM, HIGH, CRITICAL = MemoryPressureLevel


@pytest.fixture
def monitor(stand_in: type[StandIn]) -> Iterator[MemoryMonitor]:  # noqa: F811
    with MemoryMonitor() as running:
        yield running


def enter(monitor: MemoryMonitor, *levels: int) -> None:
    """Have samples of these levels noticed, one by one."""
    core: Any = monitor._core
    for level in levels:
        core.enter(level)
        wait_until(lambda: core.noticed >= core.number)


def test_each_rise_is_told_once(monitor: MemoryMonitor) -> None:
    told: queue.Queue[Alert] = queue.Queue()
    monitor.alerts.add(told.put)
    enter(monitor, 0, 1, 1, 2, 3)
    seen = [told.get(timeout=30) for _ in range(told.qsize() or 1)]
    while seen[-1].level is not CRITICAL:
        seen.append(told.get(timeout=30))
    assert [alert.level for alert in seen] == sorted(
        {alert.level for alert in seen}, key=list(MemoryPressureLevel).index
    )
    last = seen[-1]
    assert (last.previous, last.pressure, last.pressure.cause) == (HIGH, "critical", "level 3")
    assert last.stats.level is CRITICAL
    assert last.suggestion
    enter(monitor, 3, 2, 1, 0)
    assert told.empty()
    enter(monitor, 1)
    assert told.get(timeout=30).level is MEDIUM
    wait_until(lambda: monitor.alerts.calls == len(seen) + 1)


def test_level(monitor: MemoryMonitor) -> None:
    told: queue.Queue[tuple[str, MemoryPressureLevel]] = queue.Queue()
    handles = {
        name: monitor.alerts.add(lambda alert, name=name: told.put((name, alert.level)), level)
        for name, level in (("a", "warning"), ("b", "critical"), ("c", HIGH), ("d", "high"))
    }
    assert monitor.alerts.active == []
    enter(monitor, 1)
    assert told.get(timeout=30) == ("a", MEDIUM)
    assert monitor.alerts.active == [handles["a"]]
    enter(monitor, 2)
    assert {told.get(timeout=30) for _ in range(3)} == {("a", HIGH), ("c", HIGH), ("d", HIGH)}
    assert monitor.alerts.active == [handles["a"], handles["c"], handles["d"]]
    enter(monitor, 3)
    assert {told.get(timeout=30)[0] for _ in range(4)} == set("abcd")
    enter(monitor, 0)
    assert monitor.alerts.active == []
    assert told.empty()


def test_a_rise_between_two_looks_is_told(monitor: MemoryMonitor) -> None:
    told: queue.Queue[Alert] = queue.Queue()
    monitor.alerts.add(told.put, "critical")
    core: Any = monitor._core
    core.enter(3, 0)
    alert = told.get(timeout=30)
    assert alert.level is CRITICAL
    wait_until(lambda: monitor.history[-1].level is LOW)
    assert monitor.alerts.active == []


def test_one_that_comes_late_is_told_what_is_reached(monitor: MemoryMonitor) -> None:
    """At the next sample; from then on it is one among others."""
    first: queue.Queue[Alert] = queue.Queue()
    late: queue.Queue[Alert] = queue.Queue()
    once: queue.Queue[Alert] = queue.Queue()
    monitor.alerts.add(first.put)
    enter(monitor, 2)
    assert first.get(timeout=30).level is HIGH
    handles = [
        monitor.alerts.add(late.put, min_interval=1000.0),
        monitor.alerts.add(once.put, "high", once=True),
    ]
    critical = monitor.alerts.add(late.put, "critical")
    assert monitor.alerts.active[1:] == handles
    enter(monitor, 2)
    for told in (late, once):
        alert = told.get(timeout=30)
        assert (alert.level, alert.previous, alert.stats.level) == (HIGH, HIGH, HIGH)
    assert len(monitor.alerts) == 3
    enter(monitor, 2, 1, 2)  # within the interval
    assert first.get(timeout=30).previous is MEDIUM
    wait_until(lambda: monitor.alerts.calls == 4)
    enter(monitor, 3)
    assert {late.get(timeout=30).level for _ in range(2)} == {CRITICAL}
    wait_until(lambda: monitor.alerts.calls == 7)
    assert (handles[0].calls, handles[1].calls, critical.calls) == (2, 1, 1)
    assert late.empty()
    assert once.empty()


def test_one_that_comes_as_pressure_falls(monitor: MemoryMonitor) -> None:
    told: queue.Queue[Alert] = queue.Queue()
    enter(monitor, 3)
    monitor.alerts.add(told.put, "critical")
    monitor.alerts.add(told.put, "medium")
    enter(monitor, 1)
    alert = told.get(timeout=30)
    assert (alert.level, alert.previous) == (MEDIUM, MEDIUM)
    enter(monitor, 1, 0)
    assert told.empty()
    assert monitor.alerts.calls == 1


def test_once_and_interval(monitor: MemoryMonitor) -> None:
    once: queue.Queue[Alert] = queue.Queue()
    seldom: queue.Queue[Alert] = queue.Queue()
    monitor.alerts.add(once.put, once=True)
    monitor.alerts.add(seldom.put, min_interval=1000.0)
    assert len(monitor.alerts) == 2
    enter(monitor, 1, 0, 1, 0, 3, 0, 3)
    assert once.get(timeout=30).level is MEDIUM
    assert len(monitor.alerts) == 1
    wait_until(lambda: monitor.alerts.calls == 3 or seldom.qsize() == 2)
    got = [seldom.get(timeout=30).level for _ in range(seldom.qsize())]
    assert got in ([MEDIUM, CRITICAL], [CRITICAL])  # the first may have given way
    assert once.empty()


def test_remove(monitor: MemoryMonitor) -> None:
    def callback(alert: Alert) -> None:
        raise AssertionError

    alerts = monitor.alerts
    handle = alerts.add(callback)
    alerts.add(callback, "critical")
    other = alerts.add(lambda alert: None)
    assert alerts.remove(handle)
    assert not alerts.remove(handle)
    assert alerts.remove(callback)
    assert not alerts.remove(callback)
    assert len(alerts) == 1
    enter(monitor, 3)
    wait_until(lambda: other.calls == 1)
    assert (alerts.calls, alerts.failures, handle.calls) == (1, 0, 0)


def test_one_that_raises_is_logged_once(
    monitor: MemoryMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(alert: Alert) -> None:
        raise RuntimeError("of the callback")

    handle = monitor.alerts.add(broken)
    other = monitor.alerts.add(lambda alert: None)
    for _ in range(3):
        before = handle.calls
        enter(monitor, 1, 0)
        wait_until(lambda before=before: handle.calls == other.calls == before + 1)
    wait_until(lambda: handle.failures == 3)
    records = [r for r in caplog.records if r.name == "omnimem.monitor"]
    assert len(records) == 1
    assert "of the callback" in caplog.text
    assert "Traceback" in caplog.text
    assert (monitor.alerts.calls, monitor.alerts.failures, other.failures) == (6, 3, 0)


def test_slow_one_delays_nobody_and_hears_the_newest(monitor: MemoryMonitor) -> None:
    go, began = threading.Event(), threading.Event()
    told: list[MemoryPressureLevel] = []
    other: queue.Queue[MemoryPressureLevel] = queue.Queue()

    def slow(alert: Alert) -> None:
        told.append(alert.level)
        began.set()
        assert go.wait(60)

    handle = monitor.alerts.add(slow)
    monitor.alerts.add(lambda alert: other.put(alert.level))
    enter(monitor, 1)
    assert began.wait(30)
    for level in (2, 3, 0, 1, 0, 2):
        enter(monitor, level)  # the history goes on
        if level and level != 1:
            assert other.get(timeout=30) is not None
    assert told == [MEDIUM]
    go.set()
    wait_until(lambda: handle.calls == 2)
    wait_until(lambda: len(told) == 2)
    assert told == [MEDIUM, HIGH]
    assert handle.coalesced == 3


def test_stop_leaves_a_sleeping_callback(
    monitor: MemoryMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    go, began = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def sleep(alert: Alert) -> None:
        threads.append(threading.current_thread())
        began.set()
        go.wait(60)

    monitor.alerts.add(sleep)
    enter(monitor, 1)
    assert began.wait(30)
    monitor.stop_monitoring()
    assert "still running" in caplog.text
    assert threads[0].is_alive()
    assert threads[0].daemon
    go.set()
    threads[0].join(30)
    caplog.clear()
    monitor.stop_monitoring()
    assert not caplog.records


def test_callbacks_may_do_anything(monitor: MemoryMonitor) -> None:
    done: queue.Queue[str] = queue.Queue()
    alerts = monitor.alerts

    def leave(alert: Alert) -> None:
        assert alerts.remove(leave)
        bytearray(8 << 20)
        alerts.add(lambda alert: done.put("added"))
        monitor.check_memory_pressure()
        monitor.get_memory_stats()
        monitor.log_memory_usage("in a callback")
        assert "Pressure is medium" in monitor.explain()
        done.put("left")

    def stop(alert: Alert) -> None:
        monitor.stop_monitoring()
        done.put("stopped")

    alerts.add(leave)
    enter(monitor, 1)
    assert {done.get(timeout=30), done.get(timeout=30)} == {"left", "added"}  # by its sample
    enter(monitor, 0, 1)
    assert done.get(timeout=30) == "added"
    alerts.add(stop, "critical")
    core: Any = monitor._core
    core.enter(3)
    assert {done.get(timeout=30), done.get(timeout=30)} == {"added", "stopped"}
    assert not monitor.running


def test_without_threads_a_callback_runs_all_the_same(
    monitor: MemoryMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: queue.Queue[str] = queue.Queue()
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "omnimem-alert":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monitor.alerts.add(lambda alert: told.put(threading.current_thread().name))
    enter(monitor, 1)
    assert told.get(timeout=30) == "omnimem-alerts"
    enter(monitor, 0, 1)
    assert told.get(timeout=30) == "omnimem-alerts"


def test_alerts_wait_for_monitoring(stand_in: type[StandIn]) -> None:  # noqa: F811
    told: queue.Queue[Alert] = queue.Queue()
    monitor = MemoryMonitor()
    monitor.alerts.add(told.put)
    stand_in.made.enter(2)
    assert monitor.check_memory_pressure() == "warning"
    assert told.empty()
    monitor.start_monitoring()  # it is short, and nobody was told
    assert told.get(timeout=30).level is HIGH
    monitor.close()


def test_wrong_arguments() -> None:
    alerts = omnimem.AlertSystem()
    with pytest.raises(TypeError, match="callable"):
        alerts.add("callback")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'warning'"):
        alerts.add(print, "severe")
    with pytest.raises(ValueError, match="min_interval=-1"):
        alerts.add(print, min_interval=-1)
    assert len(alerts) == 0


def test_suggestions(stand_in: type[StandIn]) -> None:  # noqa: F811
    told: queue.Queue[Alert] = queue.Queue()
    with MemoryMonitor() as monitor:
        monitor.alerts.add(told.put)
        core = stand_in.made
        core.more = {"rss": 1 << 20}
        core.enter(1)
        assert "other processes" in told.get(timeout=30).suggestion
        core.enter(0)
        core.more = {"rss": 2 << 30}
        core.enter(1)
        assert "outside" in told.get(timeout=30).suggestion
    logging.getLogger("omnimem.monitor")


def test_nothing_is_lost_when_a_callback_is_about_to_end() -> None:
    told: queue.Queue[Alert] = queue.Queue()
    alerts = omnimem.AlertSystem()
    handle = alerts.add(told.put)
    stats = omnimem.MemoryStats(system_memory=(2, 1), level=MEDIUM)
    first, late = (Alert(MEDIUM, LOW, stats.pressure, stats, text) for text in ("first", "late"))
    lock = handle._token

    class Token:
        """Has an alert come in just when the callback's thread lets go."""

        acquire = lock.acquire

        def release(self) -> None:
            lock.release()
            if handle.calls == 1:
                handle._pending.append(late)

    handle._token = Token()  # type: ignore[assignment]
    alerts._tell(first)
    assert told.get(timeout=30) is first
    assert told.get(timeout=30) is late
