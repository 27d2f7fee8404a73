"""Swappers in processes that fork, are killed, interrupted or just end; two in one directory."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import PACKAGE_DIR, SOAK, run_clean

MIB = 1 << 20

OPEN = """
import gc, os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork with threads
import omnimem
MIB = 1 << 20
def open_eager_swapper(**fields):
    nvme = omnimem.NVMeOptimizer("64KiB", sys.argv[1], 1, allow_ram_file_system=True)
    fields = dict(swap_threshold=0.0, host_limit="256MiB", max_swap_size="256MiB",
                  io_backend=sys.argv[2]) | fields
    return omnimem.AdvancedMemorySwapper(nvme_optimizer=nvme, **fields)
def register(swapper, count, nbytes):
    contents = {f"b{i}": os.urandom(nbytes) for i in range(count)}
    for name, content in contents.items():
        swapper.register_memory_block(name, nbytes, data=content)
    return contents
def verify(swapper, contents):
    swapper.store.check()
    for name, content in contents.items():
        assert memoryview(swapper.blocks[name]) == content, name
def until(condition, what, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
"""


def start(code: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OPEN + code, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE_DIR)},
    )


def run(code: str, tmp_path: Path, io_backend: str) -> str:
    return run_clean(OPEN + code, str(tmp_path), io_backend)


# ---- two in one directory ----

ROUNDS = """
swapper = open_eager_swapper()
contents = register(swapper, 16, MIB // 2 + 5)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    assert swapper.perform_swapping() == 16
    verify(swapper, contents)
swapper.cleanup()
"""


def test_two_in_one_directory(tmp_path: Path, io_backend: str) -> None:
    children = [start(ROUNDS, str(tmp_path), io_backend) for _ in range(2)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        assert (child.communicate(timeout=60)[1], child.returncode) == ("", 0)
    assert list(tmp_path.iterdir()) == []


# ---- fork ----

FORK = """
swapper = open_eager_swapper()
contents = register(swapper, 32, MIB)
view = memoryview(swapper.blocks["b0"])
stop = threading.Event()
failures = []
def swap():
    try:
        while not stop.is_set():
            swapper.perform_swapping()
            for name in contents:
                swapper.access_memory_block(name)
    except BaseException as error:
        failures.append(error)
thread = threading.Thread(target=swap)
thread.start()
def in_child():
    failed = []
    calls = dict(
        register=lambda: swapper.register_memory_block("new", 10, data=bytes(10)),
        blank=lambda: swapper.register_memory_block("new", 10),
        access=lambda: swapper.access_memory_block("b1"),
        view=lambda: memoryview(block),
        dlpack=lambda: block.__dlpack__(),
        perform=lambda: swapper.perform_swapping(),
        prefetch=lambda: swapper.prefetch(["b1"]),
        unregister=lambda: swapper.unregister_memory_block("b1"),
        algorithm=lambda: setattr(swapper, "swap_algorithm", omnimem.SwapAlgorithm.LRU),
        limit=lambda: setattr(swapper, "max_swap_size", MIB),
        check=lambda: swapper.store.check(),
    )
    for name, call in calls.items():
        try:
            call()
            failed.append(name)
        except omnimem.ClosedError as error:
            if "fork" not in str(error):
                failed.append((name, str(error)))
        except BaseException as error:
            failed.append((name, repr(error)))
    repr(block), repr(swapper), swapper.stats, len(swapper.blocks), list(swapper.blocks)
    try:
        swapper.cleanup()
    except omnimem.ClosedError:
        pass
    other = open_eager_swapper()  # one of its own works
    mine = register(other, 2, 100000)
    other.perform_swapping()
    verify(other, mine)
    other.cleanup()
    print(failed, flush=True)
block = swapper.blocks["b1"]
for i in range(6):
    until(lambda: swapper.store.stats().moves > 0, "nothing is swapped")
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        in_child()
        os._exit(0) if i % 2 else sys.exit(0)
    pid, status = os.waitpid(child, 0)
    assert status == 0, status
stop.set()
thread.join(60)
assert not thread.is_alive() and not failures, failures
assert view == contents["b0"]
verify(swapper, contents)
view.release()
assert swapper.perform_swapping() == 32
verify(swapper, contents)
swapper.cleanup()
print("parent")
"""


def test_fork_while_swapping(tmp_path: Path, io_backend: str) -> None:
    assert run(FORK, tmp_path, io_backend).splitlines() == ["[]"] * 6 + ["parent"]
    assert list(tmp_path.iterdir()) == []


# ---- killed ----

SWAP_ON = """
swapper = open_eager_swapper()
contents = register(swapper, 12, MIB)
assert swapper.perform_swapping() == 12
print("ready", flush=True)
while True:
    for name in contents:
        with memoryview(swapper.access_memory_block(name)) as view:
            view[0] ^= 1
    swapper.perform_swapping()
"""


@pytest.fixture
def own_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that nobody else uses, so that its free space can be compared; where none can
    be mounted, a directory."""
    image, point = tmp_path / "image", tmp_path / "disk"
    point.mkdir()
    with open(image, "wb") as file:
        file.truncate(128 * MIB)
    made = os.geteuid() == 0 and all(
        subprocess.run(["sh", "-c", command], capture_output=True, check=False).returncode == 0
        for command in (f"mkfs.ext4 -q -F '{image}'", f"mount -o loop '{image}' '{point}'")
    )
    yield point
    if made:
        subprocess.run(["umount", "-l", str(point)], check=True)


def held_bytes(directory: Path) -> int:
    state = os.statvfs(directory)
    return (state.f_blocks - state.f_bfree) * state.f_frsize


@pytest.mark.soak
def test_killed_again_and_again(own_disk: Path, io_backend: str) -> None:
    """Wherever it is killed: no name and, on a disk of its own, no space is left."""
    rng = random.Random(9)
    where = own_disk / "swap"
    where.mkdir()
    before = held_bytes(own_disk) if os.path.ismount(own_disk) else None
    for _ in range(200 if SOAK else 10):
        child = start(SWAP_ON, str(where), io_backend)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n", child.communicate()
        time.sleep(rng.random() * 0.05)
        child.kill()
        _, err = child.communicate(timeout=30)
        assert (child.returncode, err) == (-signal.SIGKILL, "")
        assert list(where.iterdir()) == []
    if before is None:
        return
    end = time.monotonic() + 30
    while held_bytes(own_disk) > before:  # requests in flight end before the file goes
        assert time.monotonic() < end, held_bytes(own_disk) - before
        time.sleep(0.01)


# ---- the end of an interpreter ----

EXITS = {
    "live views": """
swapper = open_eager_swapper()
contents = register(swapper, 8, MIB)
swapper.perform_swapping()
views = [memoryview(swapper.blocks[name]) for name in list(contents)[:4]]
capsule = swapper.blocks["b5"].__dlpack__()
""",
    "in a cycle": """
swapper = open_eager_swapper()
contents = register(swapper, 2, MIB)
class Node: pass
node = Node()
node.self, node.swapper, node.block = node, swapper, swapper.blocks["b0"]
node.view = memoryview(node.block)
del swapper
""",
    "swapping in a daemon thread": """
swapper = open_eager_swapper()
contents = register(swapper, 16, MIB)
def work():
    try:
        while True:
            swapper.perform_swapping()
            for name in contents:
                memoryview(swapper.blocks[name])
    except (omnimem.ClosedError, KeyError):
        pass
threading.Thread(target=work, daemon=True).start()
until(lambda: swapper.store.stats().moves > 0, "nothing is swapped")
""",
    "encoding in a daemon thread": """
import zlib
class Zlib:
    def compress(self, data): return zlib.compress(data, 1)
    def decompress(self, data): return zlib.decompress(data)
swapper = open_eager_swapper()
for i in range(16):
    swapper.register_memory_block(f"b{i}", MIB)
swapper.integrate_with_compression(Zlib())
def work():
    try:
        while True:
            for i in range(16):
                memoryview(swapper.blocks[f"b{i}"])
            swapper.perform_swapping()
    except (omnimem.ClosedError, KeyError):
        pass
threading.Thread(target=work, daemon=True).start()
until(lambda: swapper.store.group_stats("swap").outs > 16, "nothing is swapped")
""",
    "prefetches in flight": """
swapper = open_eager_swapper()
contents = register(swapper, 16, MIB)
swapper.perform_swapping()
tickets = [swapper.prefetch([name]) for name in contents]
""",
    "memory that was given": """
swapper = open_eager_swapper()
given = bytearray(MIB)
swapper.register_memory_block("a", MIB, data=given, take=True)
swapper.register_memory_block("b", MIB, data=bytearray(MIB), take=True)
view = memoryview(swapper.blocks["a"])
swapper.perform_swapping()
""",
}


@pytest.mark.parametrize("how", EXITS)
def test_exit(tmp_path: Path, io_backend: str, how: str) -> None:
    for _ in range(3 if "thread" in how else 1):
        assert run(EXITS[how], tmp_path, io_backend) == ""
    assert list(tmp_path.iterdir()) == []


# ---- Ctrl-C ----

INTERRUPTED = """
from omnimem import _core
swapper = open_eager_swapper()
contents = register(swapper, 128, MIB)
midway = 0
for _ in range(3):
    until(lambda: swapper.store.stats().moves == 0, "something is on its way still")
    _core._fault_arm("short", 1, True)  # many small transfers: it takes long enough
    def interrupt():
        until(lambda: swapper.store.stats().moves > 0, "nothing is swapped")
        os.kill(os.getpid(), signal.SIGINT)
    until(lambda: swapper.store.stats().moves == 0, "the last round does not end")
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        try:
            swapper.perform_swapping()
        finally:
            midway += any(block.ptr for block in swapper.blocks.values())
            thread.join()
    except KeyboardInterrupt:
        pass
    else:
        print("not interrupted")
    swapper.store.check()
    assert swapper.get_status()["swap_trouble"] is None
    _core._fault_reset()
    for name in list(contents)[:: 3]:
        with memoryview(swapper.blocks[name]) as view:
            view[3] ^= 1
            contents[name] = bytes(view)
    verify(swapper, contents)
assert midway
assert swapper.perform_swapping() == 128
verify(swapper, contents)
swapper.cleanup()
print("usable")
"""


def test_ctrl_c(tmp_path: Path, io_backend: str) -> None:
    assert run(INTERRUPTED, tmp_path, io_backend) == "usable\n"
    assert list(tmp_path.iterdir()) == []
