"""Random operations on a store against a dict that holds the same bytes, checked at every step."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from pathlib import Path

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
from omnimem import Store, StoreConfig

from .conftest import SOAK, data

KIB, MIB = 1 << 10, 1 << 20
pytestmark = pytest.mark.soak
HOST, DISK = 4 * MIB, 8 * MIB

NAMES = st.sampled_from([f"n{i}" for i in range(10)])
SIZES = st.one_of(
    st.sampled_from([0, 1, 4095, 4096, 4097, 64 * KIB, MIB - 1, MIB, 3 * MIB, HOST, HOST + 1]),
    st.integers(0, 1200 * KIB),
)
REFUSED = (omnimem.LimitError, omnimem.DiskFullError)


class Model(RuleBasedStateMachine):
    """What is added, changed, kept and removed must read back the same, wherever it lies."""

    io_backend = "auto"
    views = Bundle("views")

    @initialize()
    def open(self) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.content = random.Random(1).randbytes(6 * MIB)
        self.path = self.directory / "origin"
        self.path.write_bytes(self.content)
        self.store = Store(
            StoreConfig(
                host_limit=HOST,
                disk_limit=DISK,
                directory=self.directory,
                io_backend=self.io_backend,
            )
        )
        self.store.group("small", 2 * MIB)
        self.model: dict[str, bytes] = {}
        self.seed = 0

    def fresh(self, size: int) -> bytes:
        self.seed += 1
        return data(size, self.seed)

    @rule(name=NAMES, size=SIZES, group=st.sampled_from([None, None, "small"]), take=st.booleans())
    def add(self, name: str, size: int, group: str | None, take: bool) -> None:
        content = self.fresh(size)
        call = self.store.take if take else self.store.add
        if name in self.model:
            with pytest.raises(ValueError, match=name):
                call(name, content, group)
            return
        try:
            call(name, bytearray(content) if take else content, group, timeout=0.2)
        except (*REFUSED, omnimem.BusyError):
            assert name not in self.store
        else:
            self.model[name] = content

    @rule(
        name=NAMES,
        ranges=st.lists(
            st.tuples(st.integers(0, 5 * MIB), st.integers(0, 700 * KIB)), min_size=1, max_size=3
        ),
    )
    def add_file(self, name: str, ranges: list[tuple[int, int]]) -> None:
        extents = [(self.path, offset, nbytes) for offset, nbytes in ranges]
        if name in self.model:
            with pytest.raises(ValueError, match=name):
                self.store.add_file(name, extents)
            return
        self.store.add_file(name, extents)
        self.model[name] = b"".join(self.content[a : a + n] for a, n in ranges)

    @rule(name=NAMES)
    def read(self, name: str) -> None:
        if name not in self.model:
            with pytest.raises(KeyError, match=name):
                self.store.lease(name)
            return
        with contextlib.suppress(omnimem.BusyError), self.store.lease(name, timeout=0.2) as lease:
            assert bytes(lease) == self.model[name]

    @rule(target=views, name=NAMES)
    def keep(self, name: str) -> object:
        """A view that lives on while everything else happens."""
        try:
            lease = self.store.lease(name, timeout=0.2)
        except (omnimem.BusyError, KeyError):
            return multiple()
        return (memoryview(lease), self.model[name])

    @rule(view=consumes(views))
    def look_and_drop(self, view: tuple[memoryview, bytes]) -> None:
        assert view[0] == view[1]
        view[0].release()

    @rule(name=NAMES, at=st.floats(0, 1))
    def write(self, name: str, at: float) -> None:
        try:
            lease = self.store.lease(name, write=True, timeout=0.1)
        except (omnimem.BusyError, KeyError, *REFUSED):
            return
        content = bytearray(self.model[name])
        place = int(at * len(content))
        content[place : place + 8] = self.fresh(8)[: len(content) - place]
        with lease, memoryview(lease) as view:
            view[:] = content
        self.model[name] = bytes(content)

    @rule(name=NAMES)
    def evict(self, name: str) -> None:
        with contextlib.suppress(KeyError):
            if self.store.evict(name, timeout=5):
                assert "host" not in self.store.info(name).tiers

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if name in self.model:
            self.store.remove(name)
            del self.model[name]
        else:
            with pytest.raises(KeyError, match=name):
                self.store.remove(name)

    @rule(names=st.lists(NAMES, max_size=4), cancel=st.booleans())
    def prefetch(self, names: list[str], cancel: bool) -> None:
        with contextlib.suppress(KeyError):
            ticket = self.store.prefetch(names)
            if cancel:
                ticket.cancel()
            with contextlib.suppress(omnimem.Error):
                ticket.wait(0.1)

    @invariant()
    def is_sound(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check()
        assert sorted(self.store.names()) == sorted(self.model)
        stats = self.store.stats()
        assert stats.blocks == len(self.model)
        assert stats.host.mapped_bytes <= HOST
        assert stats.disk.used_bytes <= DISK
        missing: dict[str, int] = dict.fromkeys(self.store.groups(), 0)
        for name, content in self.model.items():
            info = self.store.info(name)
            assert info.nbytes == len(content)
            if "host" not in info.tiers:
                missing[info.group] += info.nbytes
        # A fill or a spill may end between the questions: each of them changes what is missing.
        if not stats.moves:
            counted = {name: self.store.group_stats(name).missing_bytes for name in missing}
            assert counted == missing

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for name, content in self.model.items():
                with contextlib.suppress(omnimem.BusyError):
                    assert bytes(self.store.lease(name, timeout=0.2)) == content
            self.store.close()
            shutil.rmtree(self.directory)


def test_random_operations(io_backend: str) -> None:
    class Machine(Model):
        pass

    Machine.io_backend = io_backend
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=400 if SOAK else 60,
            stateful_step_count=60 if SOAK else 40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=not SOAK,
            database=None,
        ),
    )
