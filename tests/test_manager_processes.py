"""Managers in processes that fork or just end, at every stage; and what a thousand leave behind."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from .conftest import SOAK, run_clean

OPEN = """
import ctypes, gc, os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork with threads
os.environ["OMNIMEM_DIRECTORY"], os.environ["OMNIMEM_IO_BACKEND"] = sys.argv[1:3]
os.environ["OMNIMEM_DISK_LIMIT"] = "64MiB"
import omnimem
MIB = 1 << 20
def open_manager(**fields):
    fields = dict(budget="16MiB", monitoring_interval=0.05) | fields
    return omnimem.AdvancedMemoryManager(omnimem.AdvancedMemoryConfig(**fields))
def held():
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda reserve: 0)(0)  # what the C library keeps
    status = open("/proc/self/status").read()
    rss = int(status.partition("VmRSS:")[2].split()[0]) * 1024
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), rss
def until(condition, what, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.001)
"""

WITH_TORCH = """
import torch
torch.set_num_threads(1)
def make_model(seed=1):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(256, 256) for _ in range(8)]
    return torch.nn.Sequential(*layers).eval().requires_grad_(False)
x = torch.ones(2, 256)
"""

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)


def run(code: str, tmp_path: Path, io_backend: str, *args: str) -> str:
    return run_clean(OPEN + code, str(tmp_path), io_backend, *args, timeout=300)


# ---- a thousand ----

MANY = """
def once(i):
    with open_manager() as manager:
        block = manager.allocate_memory(MIB)
        memoryview(block)[:4] = b"used"
        manager.cache_weights("model", "layer", bytes(MIB))
        tensors = {"a": manager.get_cached_weights("model", "layer")}
        manager.record_model_usage("model")
        manager.check_offload_needed("model")
        manager.get_memory_stats()
        manager.deallocate_memory(block)
        if i % 10 == 0:
            manager.store.evict(manager.store.names()[0])
for i in range(50):
    once(i)
before = held()
for i in range(int(sys.argv[3])):
    once(i)
threads, files, rss = held()
assert (threads, files) == before[:2], (threads, files, before)
assert rss - before[2] < 4 * MIB, (rss, before)
print("torch" in sys.modules)
"""


@pytest.mark.slow
def test_a_thousand_leave_nothing(tmp_path: Path, io_backend: str) -> None:
    assert run(MANY, tmp_path, io_backend, str(1000)) == "False\n"
    assert list(tmp_path.iterdir()) == []


MANY_MODELS = """
def once(i):
    model = make_model()
    want = model(x)
    with open_manager(budget="4MiB") as manager:
        manager.attach(model, model_id="a")
        assert torch.equal(model(x), want)
        if i % 3 == 0:
            manager.offload_model(model, "a", "disk")
            assert torch.equal(model(x), want)
        if i % 2 == 0:
            assert model.omnimem.detach() is model
    assert torch.equal(model(x), want)  # it has its own weights again
for i in range(20):
    once(i)
before = held()
for i in range(int(sys.argv[3])):
    once(i)
threads, files, rss = held()
assert (threads, files) == before[:2], (threads, files, before)
assert rss - before[2] < 4 * MIB, (rss, before)
"""


@needs_torch
@pytest.mark.slow
@pytest.mark.soak
def test_models_leave_nothing(tmp_path: Path, io_backend: str) -> None:
    count = 1000 if SOAK else 100
    assert run(WITH_TORCH + MANY_MODELS, tmp_path, io_backend, str(count)) == ""


# ---- the end of an interpreter ----

EXITS = {
    "just opened": """
manager = open_manager()
""",
    "with what is held": """
manager = open_manager()
block = manager.allocate_memory(MIB)
view = memoryview(block)
manager.cache_weights("a", "b", bytes(MIB))
held = manager.get_cached_weights("a", "b")
manager.deallocate_memory(block)
""",
    "in a cycle": """
manager = open_manager()
class Node: pass
node = Node()
node.self, node.manager = node, manager
del manager
""",
    "after cleanup": """
manager = open_manager()
manager.cleanup()
""",
    "cleaned up by another thread": """
manager = open_manager()
thread = threading.Thread(target=manager.cleanup)
thread.start()
""",
    "used by a daemon thread": """
manager = open_manager()
begun = threading.Event()
def work():
    try:
        while True:
            manager.cache_weights("a", "b", bytes(MIB))
            manager.record_model_usage("a")
            manager.check_offload_needed("a")
            manager.get_memory_stats()
            begun.set()
    except (omnimem.ClosedError, KeyError):
        pass
threading.Thread(target=work, daemon=True).start()
begun.wait()
""",
}

TORCH_EXITS = {
    "with a model in memory": """
manager, model = open_manager(), make_model()
manager.attach(model)
model(x)
""",
    "with a model on disk": """
manager, model = open_manager(), make_model()
manager.attach(model, model_id="a")
manager.offload_model(model, "a", "disk")
""",
    "with models called by a daemon thread": """
manager = open_manager(budget="3MiB")
models = [manager.attach(make_model(seed)) for seed in range(3)]
begun = threading.Event()
def work():
    try:
        while True:
            for model in models:
                model(x)
            begun.set()
    except (omnimem.ClosedError, KeyError, RuntimeError):
        pass
threading.Thread(target=work, daemon=True).start()
begun.wait()
""",
    "while it offloads by itself": """
manager, model = open_manager(offload_threshold=0.0002, restore_threshold=0.0001), make_model()
manager.attach(model)
until(lambda: len(manager.offloader.decisions), "nothing is offloaded")
""",
}


@pytest.mark.parametrize("how", EXITS)
def test_exit(tmp_path: Path, io_backend: str, how: str) -> None:
    for _ in range(3 if "thread" in how else 1):
        assert run(EXITS[how], tmp_path, io_backend) == ""
    assert list(tmp_path.iterdir()) == []


@needs_torch
@pytest.mark.parametrize("how", TORCH_EXITS)
def test_exit_with_models(tmp_path: Path, io_backend: str, how: str) -> None:
    for _ in range(2 if "thread" in how else 1):
        assert run(WITH_TORCH + TORCH_EXITS[how], tmp_path, io_backend) == ""
    assert list(tmp_path.iterdir()) == []


# ---- fork ----

FORK = """
def in_child(manager, calls):
    failed = []
    for name, call in calls.items():
        try:
            call()
            failed.append(name)
        except omnimem.ClosedError:
            pass
        except BaseException as error:
            failed.append((name, repr(error)))
    repr(manager), repr(manager.offloader)
    try:
        manager.cleanup()
    except omnimem.ClosedError:
        pass
    with open_manager() as mine:  # one of its own works
        mine.cache_weights("a", "b", b"of the child")
        if bytes(mine.get_cached_weights("a", "b")) != b"of the child":
            failed.append("own manager")
        mine.check_offload_needed("a")
    print(failed, flush=True)
def calls_of(manager):
    return dict(
        cache=lambda: manager.cache_weights("a", "b", b"x"),
        cached=lambda: manager.get_cached_weights("a", "b"),
        allocate=lambda: manager.allocate_memory(100),
        used=lambda: manager.record_model_usage("a"),
        needed=lambda: manager.check_offload_needed("a"),
        stats=lambda: manager.get_memory_stats(),
    )
def fork_with(manager, leave, more=()):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        in_child(manager, calls_of(manager) | dict(more))
        leave(0)
    pid, status = os.waitpid(child, 0)
    assert status == 0, status
for leave in (os._exit, sys.exit):
    with open_manager() as manager:
        fork_with(manager, leave)
        manager.cache_weights("a", "b", b"of the parent")
        fork_with(manager, leave)
        assert bytes(manager.get_cached_weights("a", "b")) == b"of the parent"
        until(lambda: manager.memory_monitor.history, "the monitor stands still")
        fork_with(manager, leave)
        manager.memory_monitor.stop_monitoring()
        fork_with(manager, leave)
    fork_with(manager, leave)
print("parent")
"""


def test_fork_at_every_stage(tmp_path: Path, io_backend: str) -> None:
    out = run(FORK, tmp_path, io_backend).splitlines()
    assert out == ["[]"] * 10 + ["parent"]
    assert list(tmp_path.iterdir()) == []


FORK_MODEL = """
model = make_model()
want = model(x)
with open_manager(budget="3MiB") as manager:
    manager.attach(model, model_id="a")
    assert torch.equal(model(x), want)
    more = dict(offload=lambda: manager.offload_model("a", None, "disk"))
    fork_with(manager, os._exit, more)
    manager.offload_model(model, "a", "disk")
    fork_with(manager, os._exit, more)
    assert torch.equal(model(x), want)
    manager.store.check()
print("parent")
"""


@needs_torch
def test_fork_with_a_model(tmp_path: Path, io_backend: str) -> None:
    code = WITH_TORCH + FORK.partition("for leave in")[0] + FORK_MODEL
    assert run(code, tmp_path, io_backend).splitlines() == ["[]"] * 2 + ["parent"]
