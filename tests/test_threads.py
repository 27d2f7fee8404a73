"""Many threads on one store: every read is whole and right, nothing hangs, nothing is left."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import omnimem
from omnimem import Store

from .conftest import SOAK, data

MIB = 1 << 20
KIB = 1 << 10
Opener = Callable[..., Store]
SECONDS = 20.0 if SOAK else 1.5
pytestmark = pytest.mark.soak


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run_threads(work: Callable[[int, Callable[[], bool]], None], count: int = 8) -> None:
    """Runs `work(number, more)` on threads for a while; the first error of any is raised."""
    end = time.monotonic() + SECONDS
    errors: list[BaseException] = []

    def body(number: int) -> None:
        try:
            work(number, lambda: time.monotonic() < end and not errors)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + 60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def test_random_operations(open_store: Opener, tmp_path: Path) -> None:
    store = open_store(host_limit="4MiB", disk_limit="32MiB")
    contents = {f"b{i}": data(1 + i * 37 * KIB, i) for i in range(16)}
    path = tmp_path / "origin"
    path.write_bytes(b"".join(contents.values()))
    offset = 0
    for i, (name, content) in enumerate(contents.items()):
        if i % 3 == 0:
            store.add_file(name, path, offset, len(content))
        else:
            store.add(name, content)
        offset += len(content)

    def work(number: int, more: Callable[[], bool]) -> None:
        rng = random.Random(number)
        kept: list[tuple[memoryview, bytes]] = []
        while more():
            name = rng.choice(list(contents))
            choice = rng.random()
            with contextlib.suppress(omnimem.BusyError):
                if choice < 0.6:
                    with store.lease(name, timeout=5) as lease:
                        assert bytes(lease) == contents[name]
                        if rng.random() < 0.2:
                            kept.append((memoryview(lease), contents[name]))
                elif choice < 0.8:
                    store.evict(name, timeout=5)
                elif choice < 0.9:
                    ticket = store.prefetch(rng.sample(list(contents), 3))
                    if rng.random() < 0.5:
                        ticket.cancel()
                    else:
                        with contextlib.suppress(omnimem.Error):
                            ticket.wait(1)
                else:
                    store.info(name)
                    store.stats()
                    store.check()
            if len(kept) > 2 or rng.random() < 0.2:
                for view, want in kept:
                    assert view == want
                kept.clear()

    run_threads(work)
    store.check()
    for name, content in contents.items():
        assert bytes(store.lease(name)) == content


def test_each_thread_its_own_blocks(open_store: Opener) -> None:
    store = open_store(host_limit="8MiB", disk_limit="64MiB")

    def work(number: int, more: Callable[[], bool]) -> None:
        rng = random.Random(number)
        mine: dict[str, bytes] = {}
        serial = 0
        while more():
            choice = rng.random()
            if choice < 0.4 and len(mine) < 8:
                name, content = f"{number}.{serial}", data(rng.randrange(300 * KIB), serial)
                serial += 1
                (store.take if rng.random() < 0.3 else store.add)(name, content)
                mine[name] = content
            elif choice < 0.5 and mine:
                name = rng.choice(list(mine))
                with store.lease(name, timeout=20) as lease:
                    view = memoryview(lease)
                    store.remove(name)
                    assert view == mine.pop(name)
                assert name not in store
            elif choice < 0.65 and mine:
                name = rng.choice(list(mine))
                with store.lease(name, write=True, timeout=20) as lease, memoryview(lease) as view:
                    fresh = rng.randbytes(len(view))
                    view[:] = fresh
                mine[name] = fresh
            elif choice < 0.8 and mine:
                store.evict(rng.choice(list(mine)))
            elif mine:
                name = rng.choice(list(mine))
                assert bytes(store.lease(name, timeout=20)) == mine[name]

    run_threads(work)
    store.check()
    assert store.stats().leases == 0


def test_one_block_by_all(open_store: Opener, tmp_path: Path) -> None:
    """A second request joins the first's fill; writers and readers never see half a write."""
    store = open_store()
    store.add("a", bytes(64 * KIB))

    def work(number: int, more: Callable[[], bool]) -> None:
        while more():
            if number == 0:
                with store.lease("a", write=True, timeout=30) as lease, memoryview(lease) as view:
                    view[:] = bytes([random.randrange(256)]) * len(view)
            elif number == 1:
                store.evict("a")
                time.sleep(0.001)
            else:
                with store.lease("a", timeout=30) as lease:
                    content = bytes(lease)
                    assert content == content[:1] * len(content)
                time.sleep(0.001)

    run_threads(work, 5)
    store.check()


def test_close_while_others_work(open_store: Opener) -> None:
    for _ in range(3):
        store = open_store(host_limit="2MiB", disk_limit="16MiB")
        for i in range(8):
            store.add(f"b{i}", data(400 * KIB, i))

        def work(number: int, more: Callable[[], bool], store: Store = store) -> None:
            rng = random.Random(number)
            with contextlib.suppress(omnimem.ClosedError):
                while True:
                    i = rng.randrange(8)
                    with contextlib.suppress(omnimem.BusyError), store.lease(f"b{i}") as lease:
                        assert bytes(lease) == data(400 * KIB, i)

        threads = [threading.Thread(target=work, args=(i, bool), daemon=True) for i in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        store.close()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()


def test_others_run_while_one_waits(store: Store) -> None:
    store.add("a", b"x")
    lease = store.lease("a")
    ticks = 0
    done = threading.Event()

    def waiting() -> None:
        with pytest.raises(omnimem.BusyError):
            store.lease("a", write=True, timeout=0.5)
        done.set()

    thread = threading.Thread(target=waiting)
    thread.start()
    while not done.is_set():
        ticks += 1
        time.sleep(0.001)
    thread.join()
    lease.release()
    assert ticks > 20


def test_deleters_on_any_thread(store: Store) -> None:
    store.add("a", data(10 * KIB))
    views = [memoryview(store.lease("a")) for _ in range(200)]
    capsules = [store.lease("a").__dlpack__() for _ in range(200)]

    def drop(things: list[object]) -> None:
        with contextlib.suppress(IndexError):
            while True:
                things.pop()

    threads = [
        threading.Thread(target=drop, args=(things,)) for things in (views, capsules) for _ in "abc"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.info("a").leases == 0
    assert store.stats().exported_bytes == 0
