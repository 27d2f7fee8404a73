"""Random operations on a swapper against a dict that holds the same bytes, checked each time."""

from __future__ import annotations

import contextlib
import gc
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

import omnimem
from omnimem import AdvancedMemorySwapper, NVMeOptimizer, SwapAlgorithm

from .conftest import SOAK, data
from .swappers import KIB, MIB, Zlib, settle, swap_all

pytestmark = pytest.mark.soak
HOST, DISK = 8 * MIB, 10 * MIB
VIEWS = 2
"""With one pinned block they hold three segments of 2 MiB at most: what is wanted has room."""

IDS = st.sampled_from([f"n{i}" for i in range(6)])
SIZES = st.one_of(
    st.sampled_from([1, 4095, 4096, 4097, 64 * KIB, MIB - 1, MIB, 2 * MIB, HOST + 1]),
    st.integers(1, 2000 * KIB),
)


class Backwards(Zlib):
    """What it makes is nothing to the other one."""

    def compress(self, plain: Any, /) -> bytes:
        return super().compress(plain)[::-1]

    def decompress(self, packed: Any, /) -> Any:
        return super().decompress(bytes(packed)[::-1])


CODECS = st.sampled_from([0, 1, 2, None])


class Model(RuleBasedStateMachine):
    """What is registered and written must read back the same, wherever it lies."""

    io_backend = "auto"
    views = Bundle("views")

    @initialize(algorithm=st.sampled_from(SwapAlgorithm), codec=CODECS)
    def open(self, algorithm: SwapAlgorithm, codec: int | None) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.swapper = AdvancedMemorySwapper(
            algorithm,
            max_swap_size=DISK,
            host_limit=HOST,
            nvme_optimizer=NVMeOptimizer("64KiB", self.directory),
            io_backend=self.io_backend,
        )
        self.codecs: list[Any] = [Zlib(), Backwards(), None]  # None: omnimem's own
        self.model: dict[str, bytearray] = {}
        self.pinned: set[str] = set()
        self.held: dict[str, int] = {}
        self.live = self.seed = 0
        self.compression(codec)
        for i in range(3):
            self.register(f"n{i}", 100 * KIB * i + 33, "copy", i > 0, False)

    def fresh(self, size: int, soft: bool) -> bytes:
        self.seed += 1
        return (data(97, self.seed) * (size // 97 + 1))[:size] if soft else data(size, self.seed)

    @rule(
        name=IDS,
        size=SIZES,
        how=st.sampled_from(["zeros", "copy", "take"]),
        soft=st.booleans(),
        pinned=st.sampled_from([False, False, False, True]),
    )
    def register(self, name: str, size: int, how: str, soft: bool, pinned: bool) -> None:
        known = self.swapper.blocks.get(name)
        content = bytes(size) if how == "zeros" else self.fresh(size, soft)
        fields: dict[str, Any] = {}
        if how != "zeros":
            fields = {"data": bytearray(content), "take": how == "take"}
        pinned = pinned and not self.pinned
        try:
            block = self.swapper.register_memory_block(name, size, pinned=pinned, **fields)
        except (omnimem.LimitError, omnimem.DiskFullError):
            assert known is None
            assert name not in self.swapper.blocks
            return
        if known is not None:
            assert block is known
            return
        self.model[name] = bytearray(content)
        self.held[name] = 0
        if pinned:
            self.pinned.add(name)

    @rule(name=IDS)
    def access(self, name: str) -> None:
        before = self.swapper.stats
        block = self.swapper.access_memory_block(name)
        after = self.swapper.stats
        more = (after.cache_hits + after.cache_misses) - (before.cache_hits + before.cache_misses)
        assert (block is not None) == (name in self.model) == (more == 1)

    @rule(name=IDS)
    def read(self, name: str) -> None:
        if name in self.model:
            assert memoryview(self.swapper.blocks[name]) == self.model[name]

    @rule(name=IDS, at=st.floats(0, 1), whole=st.booleans())
    def write(self, name: str, at: float, whole: bool) -> None:
        if not self.model.get(name):
            return
        content = self.model[name]
        array = np.asarray(self.swapper.blocks[name])
        if whole:
            content[:] = self.fresh(len(content), True)
            array[:] = np.frombuffer(content, np.uint8)
        else:
            place = int(at * (len(content) - 1))
            content[place] ^= 255
            array[place] = content[place]

    @rule(target=views, name=IDS)
    def keep(self, name: str) -> object:
        """A view that lives on while everything else happens."""
        if name not in self.model or self.live == VIEWS:
            return multiple()
        view = memoryview(self.swapper.blocks[name])
        self.live += 1
        self.held[name] += 1
        return (name, view, self.model[name])

    @rule(kept=consumes(views), write=st.booleans())
    def look_and_drop(self, kept: tuple[str, memoryview, bytearray], write: bool) -> None:
        name, view, content = kept
        assert view == content
        if write and content:
            view[-1] = content[-1] = content[-1] ^ 1
        view.release()
        self.live -= 1
        if self.model.get(name) is content:
            self.held[name] -= 1

    @rule(name=IDS, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        if name not in self.model:
            return
        if pinned and self.pinned:
            return
        self.swapper.blocks[name].pinned = pinned
        (self.pinned.add if pinned else self.pinned.discard)(name)

    @rule()
    def perform_now(self) -> None:
        self.perform()

    @rule()
    def perform(self) -> None:
        settle(self.swapper)
        inside = {
            name
            for name, block in self.swapper.blocks.items()
            if block.ptr and not block.pinned and not block.ref_count
        }
        count = swap_all(self.swapper)
        out = {name for name in inside if not self.swapper.blocks[name].ptr}
        assert count == len(out)
        assert out == inside or self.swapper.get_status()["swap_trouble"]

    @rule(name=IDS)
    def unregister(self, name: str) -> None:
        assert self.swapper.unregister_memory_block(name) == (name in self.model)
        self.model.pop(name, None)
        self.held.pop(name, None)
        self.pinned.discard(name)

    @rule(which=CODECS)
    def compression(self, which: int | None) -> None:
        if which is None:
            self.swapper._codec = None
        else:
            self.swapper.integrate_with_compression(self.codecs[which])

    @rule(algorithm=st.sampled_from(SwapAlgorithm))
    def algorithm(self, algorithm: SwapAlgorithm) -> None:
        self.swapper.swap_algorithm = algorithm

    @rule(names=st.lists(IDS, max_size=4))
    def prefetch(self, names: list[str]) -> None:
        with contextlib.suppress(KeyError):
            ticket = self.swapper.prefetch(names)
            with contextlib.suppress(omnimem.Error):
                ticket.wait(0.1)

    @invariant()
    def is_sound(self) -> None:
        if not hasattr(self, "swapper"):
            return
        self.swapper.store.check()
        assert sorted(self.swapper.blocks) == sorted(self.model)
        stats = self.swapper.store.stats()
        assert stats.host.mapped_bytes <= HOST
        assert stats.disk.used_bytes <= DISK
        if self.live == sum(self.held.values()):  # no view of what was unregistered
            status = self.swapper.get_status()
            assert status["pinned_blocks"] == len(self.pinned)
            assert status["total_registered_blocks"] == len(self.model)
        for name, content in self.model.items():
            block = self.swapper.blocks[name]
            assert block.size == len(content)
            assert block.pinned == (name in self.pinned)
            assert block.ref_count == self.held[name]
            assert not (block.is_swapped and block.ptr)

    def teardown(self) -> None:
        if hasattr(self, "swapper"):
            for name, content in self.model.items():
                assert memoryview(self.swapper.blocks[name]) == content
            self.swapper.store.check()
            self.swapper.cleanup()
            gc.collect()
            shutil.rmtree(self.directory)


def test_random_operations(io_backend: str) -> None:
    class Machine(Model):
        pass

    Machine.io_backend = io_backend
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=400 if SOAK else 20,
            stateful_step_count=60 if SOAK else 40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=not SOAK,
            database=None,
        ),
    )
