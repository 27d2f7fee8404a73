"""Fail the nth allocation, submit, read, write, ... of every operation until nothing fails.

After each failure the operation has either completed or changed nothing, every invariant holds,
every block reads back right, and the same operation then succeeds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import omnimem
from omnimem import Store, StoreConfig, _core

from .conftest import SOAK, data

KIB, MIB = 1 << 10, 1 << 20
POINTS = _core._fault_points()
HARMLESS = ("submit", "short")  # retried below, so that the operation just succeeds
MOST = 400 if SOAK else 60
pytestmark = pytest.mark.soak
SIZE = 300 * KIB + 5


class World:
    """A store with blocks everywhere, and what their bytes are."""

    def __init__(self, directory: Path, io_backend: str, all_hashed: bool) -> None:
        self.path = directory / "origin"
        if not self.path.exists():
            self.path.write_bytes(data(2 * MIB, 77))
        config = StoreConfig(
            host_limit="4MiB", disk_limit="8MiB", directory=directory, io_backend=io_backend
        )
        self.store = Store(config)
        self.want = {f"b{i}": data(SIZE, i) for i in range(4)}
        for name, content in self.want.items():
            self.store.add(name, content)
        self.store.evict("b1")
        for name, offset in (("f0", 10), ("f1", MIB + 3)):
            self.store.add_file(name, self.path, offset, SIZE)
            self.want[name] = data(2 * MIB, 77)[offset : offset + SIZE]
        # A flipped bit is seen from the second fill on: nothing tells what a file should hold.
        for name in ("f0", "f1") if all_hashed else ("f1",):
            self.store.lease(name).release()
            self.store.evict(name)

    def verify(self) -> None:
        self.store.check()
        assert sorted(self.store.names()) == sorted(self.want)
        assert self.store.stats().leases == 0
        for name, content in self.want.items():
            with self.store.lease(name) as lease:
                assert bytes(lease) == content, name
        self.store.check()


def add(w: World) -> None:
    w.store.add("new", data(SIZE, 9))
    w.want["new"] = data(SIZE, 9)


def add_beyond_memory(w: World) -> None:
    """Moves others out."""
    w.store.add("large", data(3 * MIB, 9))
    w.want["large"] = data(3 * MIB, 9)


def take(w: World) -> None:
    w.store.take("new", bytearray(data(SIZE, 9)))
    w.want["new"] = data(SIZE, 9)


def add_file(w: World) -> None:
    w.store.add_file("new", [(w.path, 5, 1000), (w.path, MIB, 1000)], group="other")
    w.want["new"] = data(2 * MIB, 77)[5:1005] + data(2 * MIB, 77)[MIB : MIB + 1000]


def lease(w: World) -> None:
    with w.store.lease("b0") as got:
        assert bytes(got) == w.want["b0"]


def lease_from_disk(w: World) -> None:
    with w.store.lease("b1") as got:
        assert bytes(got) == w.want["b1"]


def lease_from_file(w: World) -> None:
    with w.store.lease("f0") as got:
        assert bytes(got) == w.want["f0"]


def lease_again_from_file(w: World) -> None:
    with w.store.lease("f1") as got:
        assert bytes(got) == w.want["f1"]


def write(w: World) -> None:
    with w.store.lease("b1", write=True) as got, memoryview(got) as view:
        view[:] = data(SIZE, 55)
    w.want["b1"] = data(SIZE, 55)


def write_origin(w: World) -> None:
    with w.store.lease("f1", write=True) as got, memoryview(got) as view:
        view[:] = data(SIZE, 56)
    w.want["f1"] = data(SIZE, 56)


def evict(w: World) -> None:
    assert w.store.evict("b0") is True


def remove(w: World) -> None:
    w.store.remove("b1")
    del w.want["b1"]


def prefetch(w: World) -> None:
    ticket = w.store.prefetch(["b1", "f0", "f1"])
    assert ticket.wait(30)


def names_and_stats(w: World) -> None:
    assert w.store.names()
    assert w.store.stats()
    assert w.store.info("b0")
    w.store.check()


def group(w: World) -> None:
    w.store.group("fresh", 2 * MIB)


def stream(w: World) -> None:
    units = [
        ("u0", [("b0", True)]),
        ("u1", [("b1", False), ("b2", False)]),
        ("u2", [("b3", False)]),
    ]
    with contextlib.closing(_core.Stream(w.store, "default", units)) as st:
        st.load()
        held: list[int] = []
        try:
            for unit in (0, 1, 2, 0, 1, 2):
                if st.enter(unit, held):
                    st.bound(unit)
                assert held == [unit]
                if st.leave(held.pop()):
                    st.unbound(unit)
        finally:
            for unit in held:
                if st.leave(unit):
                    st.unbound(unit)


OPERATIONS = (
    *(add, add_beyond_memory, take, add_file, lease, lease_from_disk, lease_from_file),
    *(lease_again_from_file, write, write_origin, evict, remove, prefetch, names_and_stats),
    *(group, stream),
)
ALLOWED = (omnimem.Error, MemoryError)


def attempt(operation: Callable[[World], None], world: World) -> str:
    """The error's text, "" when there was none."""
    try:
        operation(world)
    except ALLOWED as error:
        return str(error) or "an error without a text"
    return ""


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("point", POINTS)
def test_nth_failure(
    tmp_path: Path, io_backend: str, point: str, operation: Callable[[World], None]
) -> None:
    for nth in range(1, MOST):
        world = World(tmp_path, io_backend, point == "flip")
        with contextlib.closing(world.store):
            _core._fault_arm(point, nth)
            failed = attempt(operation, world)
            fired = _core._fault_fired(point)
            _core._fault_reset()
            if failed and not fired:
                raise AssertionError("it failed, but not through the fault")
            assert not (failed and point in HARMLESS), "it should have been tried again"
            assert failed != "an error without a text"
            world.verify()
            if failed:
                operation(world)
                world.verify()
        if not fired:
            return


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("point", POINTS)
def test_lasting_failure(
    tmp_path: Path, io_backend: str, point: str, operation: Callable[[World], None]
) -> None:
    world = World(tmp_path, io_backend, point == "flip")
    with contextlib.closing(world.store):
        _core._fault_arm(point, 1, True)
        failed = attempt(operation, world)
        _core._fault_reset()
        world.verify()
        if failed:
            operation(world)
            world.verify()


@pytest.mark.parametrize("point", ["alloc", "map", "thread", "submit", "read", "write", "nospc"])
def test_opening(tmp_path: Path, io_backend: str, point: str) -> None:
    config = StoreConfig(host_limit="4MiB", directory=tmp_path, io_backend=io_backend)
    threads = len(os.listdir("/proc/self/task"))
    for nth in range(1, MOST):
        _core._fault_arm(point, nth)
        try:
            store = Store(config)
        except ALLOWED:
            store = None
        fired = _core._fault_fired(point)
        _core._fault_reset()
        if store is not None:
            store.add("a", b"abc")
            store.evict("a")
            assert bytes(store.lease("a")) == b"abc"
            store.close()
        if not fired:
            break
    else:
        pytest.fail("it never stopped failing")
    assert len(os.listdir("/proc/self/task")) <= threads + 1
    assert list(tmp_path.iterdir()) == []


def test_unknown_points() -> None:
    with pytest.raises(ValueError, match="nope"):
        _core._fault_arm("nope", 1)
    with pytest.raises(ValueError, match="nope"):
        _core._fault_fired("nope")
