"""Fork, interpreter exit, Ctrl-C and a denied io_uring: each in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import PACKAGE_DIR, run_clean, run_python

OPEN = """
import gc, os, sys, time, threading
import omnimem
def open_store(**fields):
    fields = dict(host_limit="8MiB", disk_limit="32MiB", directory=sys.argv[1],
                  io_backend=sys.argv[2]) | fields
    return omnimem.Store(omnimem.StoreConfig(**fields))
MIB = 1 << 20
"""


def run(code: str, tmp_path: Path, io_backend: str) -> str:
    return run_clean(OPEN + code, str(tmp_path), io_backend)


# ---- fork ----

FORK = """
store = open_store()
content = os.urandom(MIB)
store.add("a", content)
store.add("b", content)
store.evict("b")
lease = store.lease("a")
view = memoryview(lease)
capsule = lease.__dlpack__()
ticket = store.prefetch(["b"])
child = os.fork()
if child == 0:
    failed = []
    calls = dict(
        add=lambda: store.add("c", b"x"), lease=lambda: store.lease("a"),
        evict=lambda: store.evict("a"), remove=lambda: store.remove("a"),
        prefetch=lambda: store.prefetch(["a"]), info=lambda: store.info("a"),
        stats=lambda: store.stats(), check=lambda: store.check(), names=lambda: store.names(),
        file=lambda: store.add_file("c", sys.argv[0] or "/etc/hostname", 0, 1),
    )
    for name, call in calls.items():
        try:
            call()
            failed.append(name)
        except omnimem.ClosedError as error:
            if "fork" not in str(error):
                failed.append((name, str(error)))
    try:
        store.close()
    except omnimem.ClosedError:
        pass
    lease.release()
    del view, capsule, lease, ticket, store
    gc.collect()
    other = open_store()  # a store of its own works
    other.add("a", b"of the child")
    other.evict("a")
    if bytes(other.lease("a")) != b"of the child":
        failed.append("own store")
    other.close()
    print(failed, flush=True)
    {leave}
pid, status = os.waitpid(child, 0)
assert status == 0, status
assert view == content
assert ticket.wait(30)
assert bytes(store.lease("b")) == content
lease.release()
del view, capsule
store.check()
assert store.info("a").leases == 0
store.close()
print("parent")
"""


@pytest.mark.parametrize("leave", ["os._exit(0)", "sys.exit(0)"])
def test_fork(tmp_path: Path, io_backend: str, leave: str) -> None:
    out = run(FORK.replace("{leave}", leave), tmp_path, io_backend)
    assert out.split("\n")[:2] == ["[]", "parent"]


# ---- exit ----

EXITS = {
    "live views": """
store = open_store()
store.add("a", os.urandom(MIB))
lease = store.lease("a")
view = memoryview(lease)
capsule = lease.__dlpack__()
window = lease.window(0, "float32", (4, 4))
""",
    "in a cycle": """
store = open_store()
store.add("a", os.urandom(MIB))
class Node: pass
node = Node()
node.self, node.store, node.lease = node, store, store.lease("a")
node.view = memoryview(node.lease)
""",
    "moves in flight": """
store = open_store()
for i in range(16):
    store.add(f"b{i}", os.urandom(MIB))
tickets = [store.prefetch([f"b{i}"]) for i in range(16)]
""",
    "a thread in the middle": """
store = open_store()
for i in range(16):
    store.add(f"b{i}", os.urandom(MIB))
def work():
    try:
        while True:
            for i in range(16):
                bytes(store.lease(f"b{i}"))
    except omnimem.ClosedError:
        pass
threading.Thread(target=work, daemon=True).start()
time.sleep(0.1)
""",
    "a thread that waits": """
store = open_store()
store.add("a", b"x")
held = store.lease("a")
def work():
    try:
        store.lease("a", write=True, timeout=None)
    except omnimem.ClosedError:
        pass
threading.Thread(target=work, daemon=True).start()
time.sleep(0.1)
""",
    "taken memory": """
class Late:
    def __del__(self):
        pass
store = open_store()
store.take("a", os.urandom(1000))
store.take("b", bytearray(1000))
view = memoryview(store.lease("a"))
""",
    "numpy": """
try:
    import numpy as np
except ImportError:
    sys.exit(0)
store = open_store()
store.add("a", os.urandom(MIB))
np.kept = np.from_dlpack(store.lease("a"))
array = np.frombuffer(store.lease("a"), "uint8")
store.take("b", np.arange(1000))
""",
    "a stream": """
from omnimem import _core
store = open_store()
for i in range(4):
    store.add(f"b{i}", os.urandom(MIB), group="g")
stream = _core.Stream(store, "g", [(f"u{i}", [(f"b{i}", i == 0)]) for i in range(4)])
stream.load()
held = []
stream.enter(1, held)
stream.set_windows(1, [(0, 0, "uint8", (100,))])
capsules = stream.windows(1)
""",
    "only the core": """
from omnimem import _core
store = _core.Store(8 * MIB, 8 * MIB, sys.argv[1])
store.add("a", os.urandom(MIB))
store.evict("a")
view = memoryview(store.lease("a"))
""",
}


@pytest.mark.parametrize("how", EXITS)
def test_exit(tmp_path: Path, io_backend: str, how: str) -> None:
    run(EXITS[how], tmp_path, io_backend)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_exit_with_a_tensor(tmp_path: Path, io_backend: str) -> None:
    pytest.importorskip("torch")
    code = """
import torch
store = open_store()
store.add("a", torch.arange(1000))
torch.kept = torch.from_dlpack(store.lease("a"))
assert torch.kept[7] == 7
"""
    run(code, tmp_path, io_backend)


def test_no_thread_is_left_after_close(tmp_path: Path, io_backend: str) -> None:
    code = """
tasks = lambda: len(os.listdir("/proc/self/task"))
before = tasks()
store = open_store()
store.add("a", os.urandom(MIB))
store.evict("a")
assert tasks() > before
store.close()
for _ in range(100):
    if tasks() == before: break
    time.sleep(0.02)
assert tasks() == before
assert not [fd for fd in os.listdir("/proc/self/fd")
            if "uring" in os.path.realpath(f"/proc/self/fd/{fd}")]
"""
    run(code, tmp_path, io_backend)


# ---- signals ----

BLOCKED = {
    "lease": 'store.lease("a", write=True, timeout=None)',
    "no room": '[store.lease(f"b{i}", timeout=None) for i in range(8)]',
    "long timeout": 'store.lease("a", write=True, timeout=100)',
}


@pytest.mark.parametrize("what", BLOCKED)
def test_ctrl_c(tmp_path: Path, io_backend: str, what: str) -> None:
    code = f"""
store = open_store()
for i in range(12):
    store.add(f"b{{i}}", os.urandom(MIB + 1))
store.add("a", b"abc")
held = store.lease("a")
print("ready", flush=True)
try:
    {BLOCKED[what]}
except KeyboardInterrupt:
    pass
else:
    print("not interrupted")
store.check()
held.release()
gc.collect()
assert bytes(store.lease("b0")) and bytes(store.lease("a")) == b"abc"
store.lease("a", write=True, timeout=5).release()
store.close()
print("usable")
"""
    child = subprocess.Popen(
        [sys.executable, "-c", OPEN + code, str(tmp_path), io_backend],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE_DIR)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.5)
    started = time.monotonic()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (0, "usable\n", "")
    assert time.monotonic() - started < 10


def test_sigkill_leaves_nothing(tmp_path: Path, io_backend: str) -> None:
    code = """
store = open_store()
store.add("a", os.urandom(MIB))
store.evict("a")
os.kill(os.getpid(), 9)
"""
    done = run_python(OPEN + code, str(tmp_path), io_backend)
    assert done.returncode == -9
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ---- a denied io_uring ----

DENY = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
LD, JEQ, RET = 0x20, 0x15, 0x06
program = [  # io_uring_setup (425 everywhere) fails with EPERM
    (LD, 0, 0, 0), (JEQ, 0, 1, 425), (RET, 0, 0, 0x00050000 | 1), (RET, 0, 0, 0x7FFF0000),
]
code = b"".join(struct.pack("HBBI", *line) for line in program)
buffer = ctypes.create_string_buffer(code, len(code))
header = ctypes.create_string_buffer(
    struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer)))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, header, 0, 0) == 0, ctypes.get_errno()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="seccomp is Linux's")
def test_denied_uring_warns_once(tmp_path: Path) -> None:
    code = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        with open_store() as store:
            store.add("a", b"abc")
            store.evict("a")
            assert bytes(store.lease("a")) == b"abc"
            stats = store.stats()
            assert (stats.io_backend, stats.io_fell_back) == ("threads", True), stats
            assert stats.io_reason
print(len(seen), seen[0].category.__name__, seen[0].message, seen[0].filename)
try:
    open_store(io_backend="uring")
except omnimem.IOFailure as error:
    print(error.errno, error)
"""
    lines = run_clean(DENY + OPEN + code, str(tmp_path), "auto").splitlines()
    assert lines[0].startswith("1 RuntimeWarning ")
    assert "io_uring" in lines[0]
    assert "denies" in lines[0]
    assert lines[0].endswith(" <string>")  # the caller's line, not ours
    assert lines[1].startswith("1 ")
