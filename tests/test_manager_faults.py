"""What can go wrong around a manager: limits that fall, full disks, files that are replaced, forks.

On real memory and real models; tests of each part have its own faults with stand-ins.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import omnimem
from omnimem import AdvancedMemoryConfig, AdvancedMemoryManager, _core

from .conftest import PACKAGE_DIR, run_clean
from .test_manager_processes import OPEN, WITH_TORCH, needs_torch
from .test_monitor_core import SANITIZE, V2, System
from .test_oom import Cgroup, cgroup  # noqa: F401  (a fixture)

MIB = 1 << 20


def until(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


@pytest.fixture
def small_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Opens managers with 64 MiB of memory and of disk."""
    (tmp_path / "swap").mkdir()
    monkeypatch.setenv("OMNIMEM_DIRECTORY", str(tmp_path / "swap"))
    monkeypatch.setenv("OMNIMEM_DISK_LIMIT", "64MiB")

    def open_one(**fields: Any) -> AdvancedMemoryManager:
        fields = {"budget": "64MiB", "monitoring_interval": 0.02} | fields
        return AdvancedMemoryManager(AdvancedMemoryConfig(**fields))

    return open_one


# ---- a limit that falls ----


def test_a_limit_that_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_manager: Callable[..., Any]
) -> None:
    """Idle blocks give way, and `explain` says for whom; there is no PSI on this system."""
    system = System(tmp_path / "a system")
    system.cgroup(512 * MIB, 200 * MIB)
    at_root = functools.partial(_core.Monitor, root=str(system.root))
    monkeypatch.setattr(_core, "Monitor", at_root)
    monkeypatch.setenv("COLUMNS", "400")
    with small_manager() as manager:
        for i in range(30):
            manager.store.add(str(i), bytes([i]) * MIB)
        monitor = manager.memory_monitor
        assert monitor.check_memory_pressure() == "low"
        before = manager.store.stats().host.used_bytes
        system.put(f"{V2}/us/memory.max", f"{201 * MIB}\n")
        assert monitor.wait_for_level("critical", timeout=30)
        until(lambda: manager.store.stats().host.used_bytes < before - 20 * MIB, "nothing goes")
        text = monitor.explain()
        assert f"(cgroup /{V2}/us)" in text.partition("\n")[0]
        assert "Pressure is critical" in text
        stats = manager.get_memory_stats()
        assert stats.psi is None
        assert stats.source == f"cgroup /{V2}/us"
        for i in range(30):
            assert bytes(manager.store.lease(str(i))) == bytes([i]) * MIB
        manager.store.check()


SHRINKS = """
MIB = 1 << 20
import os, sys, time
import omnimem
os.environ["OMNIMEM_DIRECTORY"] = sys.argv[1]
os.environ["OMNIMEM_DISK_LIMIT"] = "400MiB"
config = omnimem.AdvancedMemoryConfig(budget="200MiB", monitoring_interval=0.05)
manager = omnimem.AdvancedMemoryManager(config)
for i in range(120):
    manager.store.add(str(i), bytes([i]) * MIB)
def host():
    return manager.store.stats().host.used_bytes
print(host(), flush=True)
for line in sys.stdin:
    had, end = int(line), time.monotonic() + 60
    while host() > had and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)
    print(host(), flush=True)
print(manager.memory_monitor.explain())
for i in range(120):
    assert bytes(manager.store.lease(str(i))) == bytes([i]) * MIB
manager.store.check()
manager.cleanup()
"""


@pytest.mark.skipif(SANITIZE != "", reason="the sanitizers need more than the cgroup has")
def test_a_real_limit_that_falls(cgroup: Cgroup, tmp_path: Path) -> None:  # noqa: F811
    """Lowered to what is in use and a little, three times: the store gives way each time."""
    entered = f'echo $$ > "{cgroup.path}/cgroup.procs" && exec "$@"'
    child = subprocess.Popen(
        ["/bin/sh", "-c", entered, "sh", sys.executable, "-c", SHRINKS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE_DIR), "COLUMNS": "400"},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    used, limit = (
        ("memory.current", "memory.max")
        if cgroup.v2
        else ("memory.usage_in_bytes", "memory.limit_in_bytes")
    )
    try:
        held = [int(child.stdout.readline() or -1)]
        assert held[0] >= 120 * MIB, child.communicate(timeout=60)
        for _ in range(3):
            stat = dict(map(str.split, cgroup.describe().splitlines()))
            files = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            most = int((cgroup.path / used).read_text()) - files + 8 * MIB
            (cgroup.path / limit).write_text(str(most))
            print(held[-1] - 2 * MIB, file=child.stdin, flush=True)
            held.append(int(child.stdout.readline() or -1))
            assert held[-1] <= held[-2] - 2 * MIB, (held, child.communicate(timeout=60))
        out, errors = child.communicate(timeout=120)
    finally:
        child.kill()
        child.wait()
    assert (child.returncode, errors) == (0, "")
    assert cgroup.kills() == 0
    assert f"(cgroup {cgroup.path})" in out.partition("\n")[0], out


# ---- disks and files ----


@pytest.mark.parametrize("how", ["the store's limit", "the file system"])
@needs_torch
def test_a_full_disk(
    how: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_manager: Callable[..., Any],
    request: pytest.FixtureRequest,
) -> None:
    import torch

    if how == "the store's limit":
        monkeypatch.setenv("OMNIMEM_DISK_LIMIT", "1MiB")
    else:
        place = tmp_path / "swap"
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
        if os.geteuid() or subprocess.run(command, check=False).returncode:
            pytest.skip("cannot mount a file system here")
        request.addfinalizer(lambda: subprocess.run(["umount", "-l", str(place)], check=True))
    torch.manual_seed(1)
    model, x = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(6))), torch.ones(512)
    with torch.no_grad():
        want = model(x)
    with small_manager() as manager, torch.no_grad():
        manager.attach(model, model_id="a")
        assert torch.equal(model(x), want)
        before = model.omnimem.plan()
        decision = manager.offload_model(model, "a", "disk")
        assert not decision
        assert "as it was" in decision.reason
        name = "limit" if how == "the store's limit" else str(tmp_path / "swap")
        assert name in decision.reason
        assert "model:a/" in decision.reason
        after = model.omnimem.plan()
        assert (after.state, after.host_bytes) == (before.state, before.host_bytes)
        assert torch.equal(model(x), want)
        manager.store.check()
    assert torch.equal(model(x), want)


@needs_torch
@pytest.mark.parametrize("by", ["restore", "call"])
def test_a_checkpoint_that_is_replaced_and_put_back(
    by: str, tmp_path: Path, small_manager: Callable[..., Any]
) -> None:
    pytest.importorskip("transformers")
    from .torch_models import assert_right, folder, forward, fresh

    place = tmp_path / "a model"
    shutil.copytree(folder("tiny-qwen3"), place)
    weights = min(place.glob("*.safetensors"))
    with small_manager() as manager:
        model = manager.attach(fresh("tiny-qwen3"), place, "a")
        forward(model, "tiny-qwen3")
        manager.offload_model(model, "a", "disk")
        weights.rename(tmp_path / "aside")
        weights.write_bytes(bytes((tmp_path / "aside").stat().st_size))
        use = {
            "restore": lambda: manager.restore_model(model, "a"),
            "call": lambda: forward(model, "tiny-qwen3"),
        }[by]
        for _ in range(2):
            with pytest.raises((omnimem.CorruptError, omnimem.IOFailure), match=str(weights)):
                use()
            assert model.omnimem.plan().host_bytes < model.omnimem.plan().weight_bytes
        (tmp_path / "aside").rename(weights)
        assert_right(model, "tiny-qwen3", count=2)
        manager.restore_model(model, "a")
        assert model.omnimem.plan().state == "resident"
        manager.store.check()


# ---- forks ----

LEAVES = {"_exit": "os._exit(0)", "exit": "sys.exit(0)"}

TENSE = """
def tense(manager):
    shares = {"warning": 1e-9, "critical": 2e-9}  # any memory in use is too much
    config = omnimem.MonitorConfig(monitoring_interval=0.05, alert_thresholds=shares)
    return omnimem.MemoryMonitor(config, store=manager.store)
"""

IN_CHILD = """
def refused(call):
    try:
        call()
    except omnimem.ClosedError:
        return
    os._exit(3)
def be_child(manager, leave):
    signal.alarm(60)
    refused(manager.get_memory_stats)
    refused(lambda: manager.cache_weights("a", "b", b"x"))
    repr(manager)
    try:
        manager.cleanup()
    except omnimem.ClosedError:
        pass
    with open_manager() as mine:
        mine.cache_weights("a", "b", b"x")
        mine.check_offload_needed("a")
    leave()
def wait(child):
    pid, status = os.waitpid(child, 0)
    assert status == 0, status
leave = lambda: exec(sys.argv[3])
"""

FORK_IN_CALLBACK = """
manager = open_manager()
monitor = tense(manager)
done = threading.Event()
def callback(alert):
    child = os.fork()
    if child == 0:
        be_child(manager, lambda: os._exit(0))
    wait(child)
    done.set()
monitor.alerts.add(callback, once=True)
monitor.start_monitoring()
assert done.wait(60)
child = os.fork()
if child == 0:
    be_child(manager, leave)
wait(child)
manager.get_memory_stats()
monitor.close()
manager.cleanup()
print("parent")
"""


@pytest.mark.parametrize("how", LEAVES)
@pytest.mark.skipif("thread" in SANITIZE, reason="TSan lets no child of fork start threads")
def test_fork_in_a_callback(how: str, tmp_path: Path, io_backend: str) -> None:
    code = OPEN + TENSE + IN_CHILD + FORK_IN_CALLBACK
    assert run_clean(code, str(tmp_path), io_backend, LEAVES[how]) == "parent\n"


FORK_IN_PASS = """
model = make_model()
want = model(x)
manager = open_manager(budget="2MiB")
manager.attach(model, model_id="a")
forks = 0
def fork(module, args):
    global forks
    if forks == 2:
        return
    forks += 1
    child = os.fork()
    if child == 0:
        be_child(manager, leave)
    wait(child)
model[3].register_forward_pre_hook(fork)
for _ in range(3):
    assert torch.equal(model(x), want)
assert forks == 2
manager.store.check()
manager.cleanup()
assert torch.equal(model(x), want)
print("parent")
"""


@needs_torch
@pytest.mark.parametrize("how", LEAVES)
@pytest.mark.skipif("thread" in SANITIZE, reason="TSan lets no child of fork start threads")
def test_fork_in_a_pass(how: str, tmp_path: Path, io_backend: str) -> None:
    code = OPEN + WITH_TORCH + IN_CHILD + FORK_IN_PASS
    assert run_clean(code, str(tmp_path), io_backend, LEAVES[how]) == "parent\n"


FORK_AMID_THREADS = """
models = [make_model(seed) for seed in range(3)]  # of 2 MiB
wants = [model(x) for model in models]
manager = open_manager(budget="8MiB")  # by their bytes they fit, by their segments they do not
for i, model in enumerate(models):
    manager.attach(model, model_id=str(i))
stop, wrong, calls = threading.Event(), [], [0, 0, 0]
def call(i):
    try:
        while not stop.is_set():
            if not torch.equal(models[i](x), wants[i]):
                wrong.append(i)
            calls[i] += 1
    except BaseException as error:
        wrong.append(error)
def move():
    try:
        while not stop.is_set():
            for i in range(3):
                manager.offload_model(str(i), None, "disk")
                manager.restore_model(str(i))
    except BaseException as error:
        wrong.append(error)
threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
threads.append(threading.Thread(target=move))
for thread in threads:
    thread.start()
for _ in range(10):
    before = list(calls)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        for model in models:
            refused(lambda: model(x))
        refused(lambda: manager.offload_model("0", None, "disk"))
        be_child(manager, leave)
    wait(child)
    until(lambda: calls != before or wrong, "nothing goes on")
stop.set()
for thread in threads:
    thread.join(60)
    assert not thread.is_alive()
assert wrong == [], wrong
manager.store.check()
manager.cleanup()
print("parent")
"""


@needs_torch
@pytest.mark.slow
@pytest.mark.parametrize("how", LEAVES)
@pytest.mark.skipif("thread" in SANITIZE, reason="TSan lets no child of fork start threads")
def test_fork_amid_threads(how: str, tmp_path: Path, io_backend: str) -> None:
    """While models are called and moved by others, whatever they hold at that moment."""
    code = OPEN + WITH_TORCH + IN_CHILD + FORK_AMID_THREADS
    assert run_clean(code, str(tmp_path), io_backend, LEAVES[how]) == "parent\n"


# ---- the end of an interpreter ----

EXITS = {
    "while a callback sleeps": """
manager = open_manager()
monitor = tense(manager)
manager.cache_weights("a", "b", bytes(MIB))
begun = threading.Event()
def sleep(alert):
    begun.set()
    time.sleep(600)
monitor.alerts.add(sleep)
monitor.start_monitoring()
assert begun.wait(60)
""",
    "in a pass": """
manager, model = open_manager(budget="2MiB"), make_model()
manager.attach(model)
model[3].register_forward_pre_hook(lambda module, args: sys.exit(0))
model(x)
""",
    "while another thread is in a pass": """
manager, model = open_manager(budget="2MiB"), make_model()
manager.attach(model)
begun = threading.Event()
def sleep(module, args):
    begun.set()
    time.sleep(600)
model[3].register_forward_pre_hook(sleep)
threading.Thread(target=model, args=(x,), daemon=True).start()
assert begun.wait(60)
""",
    "while another thread moves": """
manager, model = open_manager(budget="4MiB"), make_model()
manager.attach(model, model_id="a")
begun = threading.Event()
def move():
    try:
        while True:
            manager.offload_model("a", None, "disk")
            manager.restore_model("a")
            begun.set()
    except (omnimem.ClosedError, RuntimeError):
        pass
threading.Thread(target=move, daemon=True).start()
assert begun.wait(60)
""",
}


@needs_torch
@pytest.mark.parametrize("how", EXITS)
def test_exit(how: str, tmp_path: Path, io_backend: str) -> None:
    code = OPEN + WITH_TORCH + TENSE + EXITS[how]
    for _ in range(3 if "moves" in how else 1):
        assert run_clean(code, str(tmp_path), io_backend) == ""
    assert list(tmp_path.iterdir()) == []
