"""Many threads on one swapper, each with blocks of its own that it knows the bytes of."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable

import pytest

import omnimem
from omnimem import AdvancedMemorySwapper, MemoryBlock, SwapAlgorithm

from .conftest import SOAK, data

KIB, MIB = 1 << 10, 1 << 20
SECONDS = 30.0 if SOAK else 2.0
Opener = Callable[..., AdvancedMemorySwapper]


class Strip:
    """Leaves trailing zeros out."""

    def compress(self, plain: memoryview) -> bytes:
        return len(plain).to_bytes(8, "little") + bytes(plain).rstrip(b"\0")

    def decompress(self, packed: memoryview) -> bytes:
        return bytes(packed[8:]).ljust(int.from_bytes(packed[:8], "little"), b"\0")


class Owner:
    """What one thread does, and what its blocks hold."""

    def __init__(self, swapper: AdvancedMemorySwapper, number: int) -> None:
        self.swapper = swapper
        self.number = number
        self.rng = random.Random(number)
        self.mine: dict[str, bytearray] = {}
        self.kept: list[tuple[memoryview, str]] = []
        self.serial = 0

    def register(self) -> None:
        name = f"{self.number}.{self.serial}"
        self.serial += 1
        size = self.rng.randrange(1, 200 * KIB)
        kind = self.rng.randrange(4)
        content = bytes(size) if kind == 0 else self.rng.randbytes(size // kind).ljust(size, b"\0")
        given = None if kind == 0 else bytearray(content) if kind == 1 else content
        block = self.swapper.register_memory_block(
            name, size, pinned=self.rng.random() < 0.1, data=given, take=kind == 1
        )
        assert block.size == size
        self.mine[name] = bytearray(content)

    def unregister(self, name: str) -> None:
        with memoryview(self.swapper.blocks[name]) as view:
            assert self.swapper.unregister_memory_block(name)
            assert name not in self.swapper.blocks
            assert view == self.mine.pop(name)
        self.kept = [(view, other) for view, other in self.kept if other != name]

    def access(self, name: str) -> None:
        block = self.swapper.access_memory_block(name)
        assert block is not None
        assert block.id == name
        if self.rng.random() < 0.3:
            assert memoryview(block) == self.mine[name]

    def write(self, name: str) -> None:
        content = self.mine[name]
        view = memoryview(self.swapper.blocks[name])
        assert view == content
        at = self.rng.randrange(len(content))
        change = self.rng.randbytes(min(1 + self.rng.randrange(5000), len(content) - at))
        view[at : at + len(change)] = content[at : at + len(change)] = change
        if self.rng.random() < 0.3:
            self.kept.append((view, name))

    def look(self) -> None:
        for view, name in self.kept:
            assert view == self.mine[name], name
        self.kept.clear()

    def prefetch(self) -> None:
        ticket = self.swapper.prefetch(name for name in self.mine if self.rng.random() < 0.3)
        if self.rng.random() < 0.5:
            ticket.cancel()
        else:  # what is encoded is brought in by who decodes it
            with contextlib.suppress(omnimem.BusyError, omnimem.Error):
                ticket.wait(5)

    def settings(self) -> None:
        self.swapper.swap_algorithm = self.rng.choice(list(SwapAlgorithm))
        assert self.swapper.get_status()["swap_threshold"] == 0.0
        assert self.swapper.analyze_access_patterns()
        self.swapper.store.check()

    def step(self) -> None:
        if len(self.mine) < 4:
            self.register()
            return
        name = self.rng.choice(list(self.mine))
        choice = self.rng.random()
        if choice < 0.08:
            self.register() if len(self.mine) < 12 else self.unregister(name)
        elif choice < 0.12:
            self.unregister(name)
        elif choice < 0.45:
            self.access(name)
        elif choice < 0.7:
            self.write(name)
        elif choice < 0.78:
            self.look()
        elif choice < 0.82:
            block = self.swapper.blocks[name]
            block.pinned = not block.pinned
        elif choice < 0.88:
            self.prefetch()
        elif choice < 0.9:
            self.settings()
        else:
            self.swapper.perform_swapping()

    def verify(self) -> None:
        self.look()
        for name, content in self.mine.items():
            assert memoryview(self.swapper.blocks[name]) == content, name


def run_threads(works: list[Callable[[], object]], seconds: float) -> None:
    """Runs each again and again on a thread of its own; the first error of any is raised."""
    end = time.monotonic() + seconds
    errors: list[BaseException] = []

    def body(work: Callable[[], object]) -> None:
        try:
            while time.monotonic() < end and not errors:
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.mark.soak
@pytest.mark.parametrize("encoded", [False, True])
def test_threads_against_a_model(open_eager_swapper: Opener, encoded: bool) -> None:
    swapper = open_eager_swapper(host_limit="16MiB", max_swap_size="64MiB")
    if encoded:
        swapper.integrate_with_compression(Strip())
    owners = [Owner(swapper, number) for number in range(8)]
    run_threads([owner.step for owner in owners], SECONDS)
    swapper.store.check()
    for owner in owners:
        owner.verify()
    assert sorted(swapper.blocks) == sorted(name for owner in owners for name in owner.mine)
    group = swapper.store.group_stats("swap")
    assert group.leases == 0
    assert group.outs
    assert group.ins


def test_one_id_by_all(open_eager_swapper: Opener) -> None:
    """Whoever registers first, all get a block of that name, whole or gone."""
    swapper = open_eager_swapper()
    content = data(50 * KIB)

    def work() -> None:
        with contextlib.suppress(KeyError):  # another thread has just unregistered it
            block = swapper.register_memory_block("a", len(content), data=content)
            assert isinstance(block, MemoryBlock)
            assert memoryview(block) == content
            swapper.perform_swapping()
            found = swapper.access_memory_block("a")
            if found is not None:
                assert memoryview(found) == content
            swapper.unregister_memory_block("a")

    run_threads([work] * 6, 1.0)
    swapper.store.check()
    assert swapper.store.group_stats("swap").leases == 0


def test_wanted_while_it_is_written_out(open_eager_swapper: Opener) -> None:
    """It is rescued: a hit, and nothing is read."""
    swapper = open_eager_swapper(block_size="1MiB", host_limit="256MiB", max_swap_size="256MiB")
    contents = {f"b{i}": data(4 * MIB, i) for i in range(8)}
    for name, content in contents.items():
        swapper.register_memory_block(name, len(content), data=content)
    store = swapper.store
    store.group("swap", 0, "lru", False)  # nothing is fetched that nobody asked for
    deadline = time.monotonic() + 60
    rescued = 0
    while not rescued:
        assert time.monotonic() < deadline
        for block in swapper.blocks.values():  # what is below memory is no longer true
            with memoryview(block) as view:
                view[0] ^= 1
        before, written = store.group_stats("swap"), store.stats().writes
        seen = max((e.number for e in store.events()), default=-1)
        thread = threading.Thread(target=swapper.perform_swapping)
        thread.start()
        while thread.is_alive() and not store.stats().moves:
            pass
        wanted = [block for block in swapper.blocks.values() if block.ptr]
        for block in wanted:
            swapper.access_memory_block(block.id)
        thread.join(60)
        assert not thread.is_alive()
        group = store.group_stats("swap")
        hits, misses = group.hits - before.hits, group.misses - before.misses
        assert hits + misses == len(wanted)
        assert group.ins - before.ins == misses  # those came too late
        # Written, and still in memory when that was done: it was wanted meanwhile.
        outs = [e for e in store.events(seen + 1) if e.kind == "out" and e.nbytes]
        rescued = store.stats().writes - written - len(outs)
    swapper.store.check()
    for name, content in contents.items():
        view = memoryview(swapper.blocks[name])
        assert view[1:] == content[1:]
