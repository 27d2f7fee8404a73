"""The core's monitor from Python: what it tells, its thread, what it does to stores under pressure.

The system is a tree of files of its own, whose numbers change while the monitor runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import omnimem
from omnimem import ClosedError, _core

from .conftest import PACKAGE_DIR, run_clean

SANITIZE = os.environ.get("OMNIMEM_SANITIZE", "")
MIB = 1 << 20
TOTAL = 1024 * MIB
V2 = "sys/fs/cgroup"


class System:
    """A machine of 1 GiB, as /proc and cgroups tell it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.use(100 * MIB)

    def put(self, path: str, text: str) -> None:
        """In one step: a monitor may be reading."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        made = file.with_name("made")
        made.write_text(text)
        made.rename(file)

    def use(self, used: int) -> None:
        available = (TOTAL - used) // 1024
        self.put("proc/meminfo", f"MemTotal: {TOTAL // 1024} kB\nMemAvailable: {available} kB\n")

    def cgroup(self, limit: int, used: int) -> None:
        self.put("proc/self/mountinfo", f"29 22 0:26 / /{V2} rw - cgroup2 cgroup2 rw\n")
        self.put("proc/self/cgroup", "0::/us\n")
        self.put(f"{V2}/us/memory.max", f"{limit}\n")
        self.put(f"{V2}/us/memory.current", f"{used}\n")


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path / "a system")


@pytest.fixture
def open_monitor(system: System) -> Iterator[Callable[..., _core.Monitor]]:
    monitors = []

    def open_one(**fields: Any) -> _core.Monitor:
        monitors.append(_core.Monitor(**({"root": str(system.root), "interval": 0.02} | fields)))
        return monitors[-1]

    yield open_one
    for monitor in monitors:
        monitor.close()


KEYS = {
    "number", "time", "wall", "level", "level_since", "cause", "usage", "total", "available",
    "source", "spare", "places", "swap", "rss", "psi", "psi_seconds", "events", "gpus", "slope",
    "r2", "samples", "trend", "seconds_to_exhaustion", "interval", "lag_seconds",
    "overhead_seconds", "transitions", "peak",
}  # fmt: skip


def test_real_numbers() -> None:
    monitor = _core.Monitor(act=False)
    told = monitor.sample()
    assert set(told) == KEYS
    assert 0 < told["usage"] < 1
    assert told["available"] < told["total"]
    assert told["rss"] > 4 * MIB
    assert abs(told["time"] - time.monotonic()) < 60
    assert abs(told["wall"] - time.time()) < 60
    assert told["places"][0][0] == "system"
    assert told["number"] == 1
    assert monitor.report()["number"] == 1
    assert told["slope"] is None
    assert told["seconds_to_exhaustion"] is None
    assert told["overhead_seconds"] > 0


def test_what_is_unknown_is_none(open_monitor: Callable[..., _core.Monitor]) -> None:
    told = open_monitor().sample()
    for key in ("rss", "psi", "psi_seconds", "slope", "r2", "seconds_to_exhaustion"):
        assert told[key] is None, key
    assert told["events"] == {}
    assert told["gpus"] == []
    assert told["swap"] == (0, 0)
    assert told["usage"] == pytest.approx(100 / 1024)


def test_all_that_is_known(system: System, open_monitor: Callable[..., _core.Monitor]) -> None:
    system.cgroup(512 * MIB, 100 * MIB)
    system.put(f"{V2}/us/memory.high", f"{256 * MIB}\n")
    system.put(f"{V2}/us/memory.events", "low 9\nhigh 1\nmax 2\noom 3\noom_kill 4\n")
    system.put("proc/pressure/memory", "some total=2000000\nfull total=1000000\n")
    system.put("proc/self/statm", "1 100 1\n")
    monitor = open_monitor()
    told = monitor.sample()
    source = f"cgroup /{V2}/us"
    assert told["places"] == [
        ("system", TOTAL, None, 100 * MIB, TOTAL - 100 * MIB),
        (source, 256 * MIB, 256 * MIB, 100 * MIB, 156 * MIB),
    ]
    assert (told["source"], told["total"], told["available"]) == (source, 256 * MIB, 156 * MIB)
    assert told["events"] == {"high": 1, "max": 2, "oom": 3, "oom_kill": 4}
    assert told["psi_seconds"] == (2.0, 1.0)
    assert told["rss"] == 100 * os.sysconf("SC_PAGE_SIZE")
    assert told["psi"] is None  # nothing to compare with yet
    time.sleep(0.11)
    assert monitor.sample()["psi"] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"thresholds": (0.9, 0.5, 0.95)}, "rise"),
        ({"thresholds": (0.5, 0.9)}, "three"),
        ({"interval": 0.001}, "0.01"),
        ({"interval": -1}, "0.01"),
        ({"interval": float("nan")}, "86400"),
        ({"interval": 1e6}, "86400"),
    ],
)
def test_wrong_values(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _core.Monitor(**fields)


def test_wrong_types(open_monitor: Callable[..., _core.Monitor]) -> None:
    monitor = open_monitor()
    for call in (monitor.watch, monitor.unwatch, monitor.watch_pools, monitor.unwatch_pools):
        with pytest.raises(TypeError, match="must be a"):
            call(object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="level=7"):
        monitor.wait(0, level=7)
    with pytest.raises(TypeError):
        monitor.wait("x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1, 10 and 60"):
        monitor.history(5)
    with pytest.raises(ValueError, match="runs once"):
        monitor.__init__()  # type: ignore[misc]


def test_levels_and_causes(system: System, open_monitor: Callable[..., _core.Monitor]) -> None:
    monitor = open_monitor()
    assert monitor.sample()["cause"] == ""
    system.use(800 * MIB)
    assert [monitor.sample()["level"] for _ in range(2)] == [0, 1]
    system.use(1000 * MIB)
    told = monitor.sample()
    assert told["level"] == 3
    assert told["cause"] == "RAM 97.7 % in use of 1.0 GiB (system)"
    assert told["level_since"] == told["time"]
    assert told["transitions"] == {0: 0, 1: 1, 2: 0, 3: 1}
    assert told["peak"][0] == 1000 * MIB
    spans = monitor.history(1)
    assert spans[-1][2] == spans[-1][4] == 1000 * MIB
    assert spans[0][1] == 100 * MIB
    assert all(low <= mean <= high for _, low, high, mean, _ in spans)


def fill(store: omnimem.Store, count: int, group: str = "model:a") -> None:
    for i in range(count):
        store.add(f"{group}-{i}", bytes([i % 256]) * MIB, group=group)


def test_a_running_monitor_evicts(
    system: System,
    open_monitor: Callable[..., _core.Monitor],
    open_store: Callable[..., omnimem.Store],
) -> None:
    store = open_store(host_limit="64MiB", disk_limit="128MiB")
    fill(store, 40)
    held = store.lease("model:a-7")
    monitor = open_monitor()
    monitor.watch(store)
    monitor.start()
    assert monitor.running
    assert monitor.wait(0, timeout=30) > 0
    assert monitor.actions() == []
    assert store.stats().host.used_bytes == 40 * MIB
    system.use(1000 * MIB)
    number = monitor.wait(0, level=3, timeout=30)
    assert monitor.wait(number + 1, timeout=30) > number + 1
    assert store.stats().host.used_bytes == MIB  # what is leased stays
    kinds = {action[2] for action in monitor.actions()}
    assert {"evict", "none"} <= kinds
    first = next(action for action in monitor.actions() if action[2] == "evict")
    assert first[3] == 3
    assert "RAM 97.7 % in use of 1.0 GiB (system); 24.0 MiB left, wanted" in first[4]
    assert first[6] >= 39 * MIB
    assert first[0] not in [action[0] for action in monitor.actions(since=first[0])]
    held.release()
    for i in range(40):
        assert bytes(store.lease(f"model:a-{i}"))[:1] == bytes([i])


def test_a_lowered_limit(
    system: System,
    open_monitor: Callable[..., _core.Monitor],
    open_store: Callable[..., omnimem.Store],
) -> None:
    store = open_store(host_limit="64MiB", disk_limit="128MiB")
    fill(store, 20)
    system.cgroup(512 * MIB, 200 * MIB)
    monitor = open_monitor()
    monitor.watch(store)
    monitor.start()
    assert monitor.wait(2, timeout=30) > 2
    assert monitor.report()["level"] == 0
    system.put(f"{V2}/us/memory.max", f"{201 * MIB}\n")
    assert monitor.wait(0, level=3, timeout=30) > 0
    told = monitor.report()
    assert told["source"] == f"cgroup /{V2}/us"
    assert monitor.wait(told["number"] + 1, timeout=30) > 0
    evicted = sum(action[6] for action in monitor.actions() if action[2] == "evict")
    assert evicted >= 0.09 * 201 * MIB


def test_without_act(
    system: System,
    open_monitor: Callable[..., _core.Monitor],
    open_store: Callable[..., omnimem.Store],
) -> None:
    store = open_store()
    fill(store, 8)
    monitor = open_monitor(act=False)
    monitor.watch(store)
    system.use(1000 * MIB)
    assert monitor.sample()["level"] == 3
    assert store.stats().host.used_bytes == 8 * MIB
    assert monitor.actions() == []
    largest = monitor.report()["peak"][3]
    assert len(largest) == 8
    assert largest[0][1:] == ("model:a", MIB)


def test_pools_are_trimmed(system: System, open_monitor: Callable[..., _core.Monitor]) -> None:
    config = omnimem.MemoryConfig(pool_sizes={"cpu": 64 * MIB}, cleanup_interval=3600.0)
    with omnimem.MemoryPoolManager(config) as pools:
        pools.deallocate(pools.allocate(32 * MIB, "cpu"))
        monitor = open_monitor()
        monitor.watch_pools(pools)
        system.use(800 * MIB)
        monitor.sample()
        monitor.sample()
        assert [action[2] for action in monitor.actions()] == ["trim"]
        assert monitor.actions()[0][6] == 32 * MIB
        monitor.unwatch_pools(pools)
        pools.deallocate(pools.allocate(32 * MIB, "cpu"))
        monitor.sample()
        assert len(monitor.actions()) == 1


def test_a_store_that_is_closed(
    system: System,
    open_monitor: Callable[..., _core.Monitor],
    open_store: Callable[..., omnimem.Store],
) -> None:
    monitor = open_monitor()
    monitor.start()
    system.use(1000 * MIB)
    for _ in range(5):
        store = open_store()
        fill(store, 4)
        monitor.watch(store)
        monitor.wait(monitor.report()["number"], timeout=30)
        store.close()
        monitor.unwatch(store)
    del store
    assert monitor.wait(monitor.report()["number"], timeout=30) > 0


def test_start_and_stop(open_monitor: Callable[..., _core.Monitor]) -> None:
    monitor = open_monitor()
    for _ in range(2):
        monitor.start()
        monitor.start()
        number = monitor.report()["number"]
        assert monitor.wait(number, timeout=30) > number
        monitor.stop()
        monitor.stop()
        assert not monitor.running
    number = monitor.report()["number"]
    assert monitor.wait(number, timeout=0.1) == -1
    monitor.close()
    monitor.close()
    assert monitor.wait(0) == -1
    for call in (monitor.start, monitor.stop, monitor.sample, monitor.report, monitor.actions):
        with pytest.raises(omnimem.ClosedError):
            call()


def test_who_follows_sleeps_through_quiet_samples(
    system: System, open_monitor: Callable[..., _core.Monitor]
) -> None:
    monitor = open_monitor()
    assert monitor.follow(0) == -1
    monitor.start()
    assert monitor.wait(20, timeout=30) > 20
    monitor.stop()
    number = monitor.report()["number"]
    reports = monitor.recent(0)
    assert [report["number"] for report in reports] == list(range(number - 15, number + 1))
    assert reports[-1] == monitor.report()
    monitor.start()
    stirs = monitor.follow(0)
    assert stirs <= monitor.report()["number"] // 8
    assert monitor.follow(stirs + 1000, timeout=0.05) >= stirs  # the deadline
    monitor.stir()
    assert monitor.follow(stirs, timeout=30) > stirs
    system.use(1000 * MIB)
    stirs = monitor.follow(0)
    for _ in range(3):
        stirs = monitor.follow(stirs, None, 30.0)
    assert monitor.wait(0, level=3, timeout=30) > 0
    for wrong in (lambda: monitor.follow(-1), lambda: monitor.recent(-1)):
        with pytest.raises(ValueError, match="since"):
            wrong()
    monitor.close()
    assert monitor.follow(0) == -1
    with pytest.raises(ClosedError):
        monitor.recent(0)


def test_a_thread_that_cannot_start(open_monitor: Callable[..., _core.Monitor]) -> None:
    monitor = open_monitor()
    _core._fault_arm("thread", 1, False)
    with pytest.raises(omnimem.Error, match="omnimem-monitor"):
        monitor.start()
    assert not monitor.running
    monitor.start()
    assert monitor.wait(0, timeout=30) > 0


def test_closing_wakes_who_waits(open_monitor: Callable[..., _core.Monitor]) -> None:
    monitor = open_monitor()
    got: list[int] = []
    waiter = threading.Thread(target=lambda: got.append(monitor.wait(10**9)))
    waiter.start()
    monitor.close()
    waiter.join(30)
    assert got == [-1]


def test_many_threads(
    system: System,
    open_monitor: Callable[..., _core.Monitor],
    open_store: Callable[..., omnimem.Store],
) -> None:
    monitor, store = open_monitor(), open_store(host_limit="32MiB", disk_limit="64MiB")
    fill(store, 20)
    monitor.watch(store)
    monitor.start()
    failed: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for i in range(30):
                system_use = 1000 * MIB if i % 2 else 100 * MIB
                if index == 0:
                    system.use(system_use)
                    monitor.sample()
                elif index == 1:
                    monitor.stop()
                    monitor.start()
                elif index == 2:
                    monitor.unwatch(store)
                    monitor.watch(store)
                else:
                    name = (i * index) % 20
                    assert bytes(store.lease(f"model:a-{name}")) == bytes([name]) * MIB
                monitor.report()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed
    store.check()


FORK = """
import os, sys, threading
import omnimem
from omnimem import _core
monitor = _core.Monitor(interval=0.02)
store = omnimem.Store(omnimem.StoreConfig(host_limit="8MiB", directory=sys.argv[1]))
monitor.watch(store)
monitor.start()
monitor.wait(2)
child = os.fork()
if child == 0:
    failed = []
    calls = dict(sample=monitor.sample, report=monitor.report, start=monitor.start,
        stop=monitor.stop, close=monitor.close, actions=monitor.actions,
        watch=lambda: monitor.watch(store), history=lambda: monitor.history(1))
    for name, call in calls.items():
        try:
            call()
            failed.append(name)
        except omnimem.ClosedError as error:
            if "fork" not in str(error):
                failed.append((name, str(error)))
    if monitor.running or monitor.wait(0) != -1:
        failed.append("running")
    del monitor
    own = _core.Monitor(interval=0.02)
    own.start()
    if own.wait(2, timeout=30) < 3:
        failed.append("own")
    own.close()
    print(failed, flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert monitor.wait(monitor.report()["number"], timeout=30) > 0
names = {open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")}
assert "omnimem-monitor" in names, names
monitor.close()
print("parent")
"""


@pytest.mark.skipif("thread" in SANITIZE, reason="TSan lets no child of fork start threads")
def test_fork(tmp_path: Path) -> None:
    assert run_clean(FORK, str(tmp_path)).split("\n")[:2] == ["[]", "parent"]


EXIT = """
import sys, threading
import omnimem
from omnimem import _core
monitor = _core.Monitor((0.00001, 0.00002, 0.00003), interval=0.01)
store = omnimem.Store(omnimem.StoreConfig(host_limit="8MiB", directory=sys.argv[1]))
for i in range(4):
    store.add(str(i), bytes(1 << 20))
monitor.watch(store)
monitor.start()
threading.Thread(target=lambda: monitor.wait(10**9), daemon=True).start()
monitor.wait(3)
"""


def test_exit_while_it_runs(tmp_path: Path) -> None:
    for _ in range(5):
        run_clean(EXIT, str(tmp_path))


def test_ctrl_c() -> None:
    code = """
import os, signal, threading, time
from omnimem import _core
monitor = _core.Monitor()
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    monitor.wait(10**9)
except KeyboardInterrupt:
    print("seen")
"""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip("SIGINT is ignored here: the tests run in the background")
    assert run_clean(code).strip() == "seen"


def test_nothing_is_left() -> None:
    code = """
import os
import omnimem
from omnimem import _core
def left():
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
for i in range(200):
    if i == 20:
        before = left(), _core.Monitor(act=False).sample()["rss"]
    monitor = _core.Monitor(interval=0.01)
    monitor.start()
    monitor.wait(0)
    monitor.stop() if i % 3 else None
    monitor.close() if i % 2 else None
    del monitor
after = left(), _core.Monitor(act=False).sample()["rss"]
assert after[0] == before[0], (before, after)
assert after[1] - before[1] < 4 << 20, (before, after)
print("clean")
"""
    assert run_clean(code).strip() == "clean"


CGROUPS = Path("/sys/fs/cgroup/memory")

REAL = """
import sys
import omnimem
from omnimem import _core
MIB = 1 << 20
store = omnimem.Store(omnimem.StoreConfig(host_limit="200MiB", disk_limit="400MiB",
                                          directory=sys.argv[1]))
for i in range(150):
    store.add(str(i), bytes([i]) * MIB)
monitor = _core.Monitor(interval=0.05)
monitor.watch(store)
monitor.start()
held = []
for _ in range(20):  # with what the store has, more than the limit
    held.append(bytearray(b"x") * (8 * MIB))
    monitor.wait(monitor.report()["number"] + 2, timeout=30)
print(monitor.report()["source"])
print(sum(action[6] for action in monitor.actions() if action[2] == "evict") // MIB)
del held
assert all(bytes(store.lease(str(i))) == bytes([i]) * MIB for i in range(150))
store.check()
"""


@pytest.mark.skipif(SANITIZE != "", reason="the sanitizers need more than the cgroup has")
@pytest.mark.skipif(
    not os.access(CGROUPS / "memory.limit_in_bytes", os.W_OK), reason="no cgroup v1 to write"
)
def test_in_a_real_cgroup(tmp_path: Path) -> None:
    """What a store holds makes way for what else the process needs, before anybody is killed."""
    group = CGROUPS / f"omnimem-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(256 * MIB))
        enter = f'echo $$ > "{group}/cgroup.procs" && exec "$@"'
        done = subprocess.run(
            ["/bin/sh", "-c", enter, "sh", sys.executable, "-c", REAL, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": str(PACKAGE_DIR)},
            check=False,
        )
        assert done.returncode == 0, done
        source, evicted = done.stdout.splitlines()
        assert source == f"cgroup {group}"
        assert int(evicted) >= 50
    finally:
        group.rmdir()
