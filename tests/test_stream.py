"""Streams as the binding gives them: entering, windows, what is held when something fails."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

import omnimem
from omnimem import Store, _core

from .conftest import data

MIB = 1 << 20
Opener = Callable[..., Store]


@pytest.fixture
def stream(store: Store) -> _core.Stream:
    """Five units of two blocks of 1 MiB, the first of each resident; room for two units."""
    store.group("g", 7 * MIB)
    for i in range(5):
        for kind in "rs":
            store.add(f"{kind}{i}", data(MIB, ord(kind) + i), group="g")
    units = [(f"u{i}", [(f"r{i}", True), (f"s{i}", False)]) for i in range(5)]
    made = _core.Stream(store, "g", units)
    for i in range(5):
        made.set_windows(
            i, [(1, 0, "uint8", (MIB,)), (0, 8, "float32", (2, 3)), (1, 4, "int16", ())]
        )
    made.load()
    return made


def leave(stream: _core.Stream, unit: int) -> None:
    if stream.leave(unit):
        stream.unbound(unit)


def test_passes(store: Store, stream: _core.Stream) -> None:
    np = pytest.importorskip("numpy")

    class Producer:
        def __init__(self, capsule: object) -> None:
            self.capsule = capsule

        def __dlpack__(self, **_: object) -> object:
            return self.capsule

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    for _ in range(3):
        for i in range(5):
            held: list[int] = []
            assert stream.enter(i, held) is True
            assert held == [i]
            streamed, resident, scalar = (
                np.from_dlpack(Producer(capsule)) for capsule in stream.windows(i)
            )
            assert bytes(streamed) == data(MIB, ord("s") + i)
            assert resident.tobytes() == data(MIB, ord("r") + i)[8:32]
            assert scalar.tobytes() == data(MIB, ord("s") + i)[4:6]
            assert scalar.shape == ()
            stream.bound(i)
            assert stream.leave(held.pop()) is True
            del streamed, resident, scalar
            stream.unbound(i)
            store.check()
    stats = stream.stats()
    assert stats["enters"] == 15
    assert stats["read_bytes"] > 0
    assert stats["stall_seconds"] >= 0
    stream.close()
    stream.close()
    with pytest.raises(omnimem.ClosedError):
        stream.windows(0)
    store.check()
    assert store.stats().leases == 0


def test_windows_by_kind(stream: _core.Stream) -> None:
    held: list[int] = []
    stream.enter(0, held)
    assert len(stream.windows(0)) == 3
    assert len(stream.windows(0, True)) == 1
    assert len(stream.windows(0, False)) == 2
    assert len(stream.windows(0, None)) == 3
    stream.bound(0)
    leave(stream, 0)
    assert len(stream.windows(0, True)) == 1
    with pytest.raises(omnimem.ClosedError, match="enter"):
        stream.windows(0, False)


def test_a_second_thread_joins(stream: _core.Stream) -> None:
    mine: list[int] = []
    theirs: list[int] = []
    assert stream.enter(2, mine) is True
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(stream.enter(2, theirs)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()  # it waits for the windows
    stream.bound(2)
    thread.join(30)
    assert answers == [False]
    assert stream.leave(2) is False
    assert stream.leave(2) is True
    stream.unbound(2)


def test_nothing_is_held_after_an_error(store: Store, stream: _core.Stream) -> None:
    held: list[int] = []
    store.evict("s3")
    _core._fault_arm("read", 1, True)

    def use() -> None:
        for _ in range(20):  # what was fetched ahead is there without a read
            stream.enter(3, held)
            stream.bound(3)
            leave(stream, held.pop())
            store.evict("s3")

    with pytest.raises(omnimem.IOFailure, match="s3"):
        use()
    assert held == []
    _core._fault_reset()
    store.check()
    assert stream.enter(3, held) is True
    stream.bound(3, ok=False)
    assert stream.enter(3, held) is True
    stream.bound(3)
    leave(stream, 3)


def test_views_outlive_the_stream(store: Store, stream: _core.Stream) -> None:
    held: list[int] = []
    stream.enter(1, held)
    capsules = stream.windows(1)
    assert store.stats().exported_bytes == 2 * MIB
    stream.bound(1)
    leave(stream, 1)
    stream.close()
    store.close()
    del capsules


def test_bad_arguments(store: Store, stream: _core.Stream) -> None:
    for units in (3, [3], [("u",)], [("u", [("r0",)])], [("u", ["r0"])], [(3, [])]):
        with pytest.raises(TypeError):
            _core.Stream(store, "g", units)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="nothing"):
        _core.Stream(store, "g", [("u", [("nothing", True)])])
    with pytest.raises(ValueError, match="5 units"):
        stream.enter(5, [])
    with pytest.raises(ValueError, match="unit"):
        stream.enter(-1, [])
    with pytest.raises(TypeError, match="list"):
        stream.enter(0, ())  # type: ignore[arg-type]
    for window in (
        (2, 0, "uint8", (1,)),
        (0, MIB, "uint8", (1,)),
        (0, 0, "uint8", (MIB + 1,)),
        (0, 0, "float33", (1,)),
        (0, 0, "uint8", (-1,)),
    ):
        with pytest.raises(ValueError):
            stream.set_windows(0, [window])
    with pytest.raises(TypeError):
        stream.set_windows(0, [(0, 0, "uint8")])  # type: ignore[list-item]
    assert len(stream.windows(0, True)) == 1  # what was set stays
