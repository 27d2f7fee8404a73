"""Store.press, use_begin, use_end and usage: what they tell, what goes, in which order."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from omnimem import ClosedError, Store, StoreConfig

MIB = 1 << 20
DATA = bytes(range(256)) * (MIB // 256)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    config = StoreConfig(host_limit="64MiB", disk_limit="128MiB", directory=str(tmp_path))
    with Store(config) as opened:
        yield opened


def fill(store: Store, group: str, count: int = 3) -> None:
    for k in range(count):
        store.add(f"{group}{k}", DATA, group=group)


def held(store: Store, group: str) -> int:
    return store.group_stats(group).host_bytes


def test_usage_of_a_group(store: Store) -> None:
    assert store.usage("g").uses == 0
    assert store.usage("g").last == store.usage("g").next == store.usage("g").gap == 0.0
    before = time.monotonic()
    for _ in range(3):
        store.use_begin("g")
        assert store.usage("g").busy == 1
        time.sleep(0.01)
        store.use_end("g")
        store.use_begin("other")  # ends the run
        store.use_end("other")
    usage = store.usage("g")
    assert (usage.uses, usage.recent, usage.busy) == (3, 3, 0)
    assert before <= usage.first < usage.last <= time.monotonic()
    assert 0.01 <= usage.gap <= usage.last - before
    assert usage.next > usage.last
    assert store.usage("g", window=0.0).recent == 0
    assert store.usage("g", window=math.inf).recent == 3


def test_usage_refuses(store: Store) -> None:
    with pytest.raises(ValueError, match="no use has begun"):
        store.use_end("g")
    with pytest.raises(ValueError, match="window"):
        store.usage("g", window=-1.0)
    with pytest.raises(ValueError, match="window"):
        store.usage("g", window=math.nan)
    with pytest.raises(TypeError):
        store.use_begin(3)  # type: ignore[arg-type]


def test_pressing(store: Store) -> None:
    fill(store, "g", 6)
    assert store.press(0).left_bytes == 6 * MIB == store.stats().idle_bytes
    with store.lease("g0"):
        assert store.group_stats("g").idle_bytes == 5 * MIB
        first = store.press(2, nbytes=2 * MIB)
        assert (first.written_blocks, first.written_bytes) == (2, 2 * MIB)
        assert (first.dropped_blocks, first.left_bytes) == (0, 3 * MIB)
        with store.lease("g1"):  # it is on disk as well from now on
            pass
        second = store.press(3, nbytes=1 << 40)
        assert (second.dropped_blocks, second.written_blocks, second.left_bytes) == (1, 3, 0)
        assert store.stats().host.mapped_bytes == MIB
    for k in range(6):
        with store.lease(f"g{k}") as lease:
            assert bytes(lease) == DATA
    store.check()


def test_pressing_takes_from_the_group_used_last(store: Store) -> None:
    """(Which group that is by its rhythm is tests/c/test_usage.c: here clocks are real.)"""
    for group in "abc":
        fill(store, group)
    store.use_begin("c")  # in use: the last one to go
    store.press(2, nbytes=6 * MIB)
    assert (held(store, "a"), held(store, "b"), held(store, "c")) == (0, 0, 3 * MIB)
    store.press(2, nbytes=MIB)
    assert held(store, "c") == 2 * MIB
    store.use_end("c")


def test_no_guesses_under_pressure(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA * 8)
    store.group("g", 0, "lru", True)
    for k in range(8):
        store.add_file(f"g{k}", str(path), k * MIB, MIB, group="g")

    def rounds(count: int) -> int:
        before = store.group_stats("g").issued
        for _ in range(count):
            for k in range(8):
                with store.lease(f"g{k}"):
                    pass
            for k in range(8):
                store.evict(f"g{k}")
        return store.group_stats("g").issued - before

    store.press(1)
    assert rounds(4) == 0
    store.press(0)
    assert rounds(4) > 0


def test_press_refuses(store: Store) -> None:
    for level in (-1, 4):
        with pytest.raises(ValueError, match="level"):
            store.press(level)
    for ceiling in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="ceiling"):
            store.press(0, ceiling=ceiling)
    with pytest.raises(ValueError, match="nbytes"):
        store.press(0, nbytes=-1)
    store.press(0, ceiling=0.5)
    store.press(0, ceiling=1.0)
    store.close()
    with pytest.raises(ClosedError):
        store.press(0)
    with pytest.raises(ClosedError):
        store.use_begin("g")


def test_pressed_while_in_use(store: Store) -> None:
    """Two threads press, two use; nothing is lost, and each use sees its bytes."""
    fill(store, "a", 8)
    fill(store, "b", 8)
    failed: list[BaseException] = []

    def use(group: str) -> None:
        try:
            for k in range(60):
                store.use_begin(group)
                with store.lease(f"{group}{k % 8}") as lease:
                    assert bytes(lease) == DATA
                store.use_end(group)
        except BaseException as error:
            failed.append(error)

    def press() -> None:
        try:
            for k in range(30):
                store.press(k % 4, nbytes=4 * MIB)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=use, args=(group,)) for group in "ab"]
    threads += [threading.Thread(target=press) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    store.check()
    assert store.usage("a").uses == 60
    assert store.usage("a").busy == store.usage("b").busy == 0
