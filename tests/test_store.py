"""The store as API.md promises it: blocks in, out, around, and what it tells of them."""

from __future__ import annotations

import array
import contextlib
import os
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import omnimem
from omnimem import BlockInfo, LimitError, Store, StoreConfig

from .conftest import data, run_clean

MIB = 1 << 20
Opener = Callable[..., Store]


def read(store: Store, name: str) -> bytes:
    with store.lease(name) as lease:
        return bytes(lease)


# ---- names, info, statistics ----


def test_exports() -> None:
    for name in omnimem.__all__:
        assert getattr(omnimem, name) is not None
    for name in ("Store", "StoreConfig", "BlockInfo", "Lease", "Ticket", "Error", "LimitError"):
        assert name in omnimem.__all__


def test_import_needs_no_framework() -> None:
    code = "import sys, omnimem; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert run_clean(code).strip() == "[]"


def test_add_and_read(store: Store) -> None:
    for i, size in enumerate((0, 1, 511, 512, 4095, 4096, 4097, MIB, 3 * MIB + 17)):
        store.add(f"b{i}", data(size, i))
    for i, size in enumerate((0, 1, 511, 512, 4095, 4096, 4097, MIB, 3 * MIB + 17)):
        assert read(store, f"b{i}") == data(size, i)
        assert store.info(f"b{i}").nbytes == size
    assert store.names() == [f"b{i}" for i in range(9)]


def test_info(store: Store) -> None:
    store.add("a", array.array("f", [1.0, 2.0, 3.0]), group="mine")
    info = store.info("a")
    assert info == BlockInfo(
        nbytes=12,
        tiers=("host",),
        leases=0,
        origin=None,
        origin_offset=0,
        origin_count=0,
        dtype="float32",
        shape=(3,),
        group="mine",
    )
    with store.lease("a"), store.lease("a"):
        assert store.info("a").leases == 2
    assert store.info("a").leases == 0
    assert store.evict("a")
    assert store.info("a").tiers == ("disk",)


@pytest.mark.parametrize(
    ("typecode", "dtype"),
    [
        ("b", "int8"),
        ("B", "uint8"),
        ("h", "int16"),
        ("I", "uint32"),
        ("l", "int64"),
        ("d", "float64"),
    ],
)
def test_dtype_of_buffers(store: Store, typecode: str, dtype: str) -> None:
    view = memoryview(array.array(typecode, range(6))).cast("B").cast(typecode, (2, 3))
    store.add("a", view)
    assert (store.info("a").dtype, store.info("a").shape) == (dtype, (2, 3))
    assert read(store, "a") == view.tobytes()


def test_strided_buffer_is_made_contiguous(store: Store) -> None:
    view = memoryview(bytes(range(100)))[::3]
    store.add("a", view)
    assert read(store, "a") == view.tobytes()
    assert store.info("a").shape == (34,)


def test_contains_and_unknown_names(store: Store) -> None:
    store.add("a", b"x")
    assert "a" in store
    assert "b" not in store
    assert 3 not in store
    assert "\0" not in store
    for call in (store.lease, store.evict, store.remove, store.info):
        with pytest.raises(KeyError, match="nothing here"):
            call("nothing here")
    with pytest.raises(KeyError, match="nothing here"):
        store.prefetch(["a", "nothing here"]).wait(10)


def test_the_same_name_twice(store: Store) -> None:
    store.add("a", b"x")
    for call in (store.add, store.take):
        with pytest.raises(ValueError, match="a"):
            call("a", b"y")
    with pytest.raises(ValueError, match="a"):
        store.add_file("a", __file__, 0, 10)
    assert read(store, "a") == b"x"


def test_bad_arguments(store: Store) -> None:
    store.add("a", b"x")
    with pytest.raises(TypeError):
        store.add(3, b"x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="DLPack"):
        store.add("n", 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        store.add("n")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="nope"):
        store.lease("a", nope=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="twice"):
        store.lease("a", name="a")  # type: ignore[misc]
    with pytest.raises(TypeError):
        store.lease("a", False, 1.0, 2)  # type: ignore[call-arg]
    for timeout in (-1, -0.001, float("nan")):
        with pytest.raises(ValueError, match="timeout"):
            store.lease("a", timeout=timeout)
    with pytest.raises(TypeError, match="timeout"):
        store.lease("a", timeout="soon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NUL"):
        store.add("n\0", b"x")
    with pytest.raises(ValueError):
        store.add("", b"x")
    with pytest.raises(ValueError):
        store.add("n" * 5000, b"x")
    with pytest.raises(TypeError, match="str"):
        store.prefetch("a")
    assert store.names() == ["a"]
    store.lease("a", timeout=None).release()
    store.lease("a", timeout=float("inf")).release()


def test_names_of_all_kinds(store: Store) -> None:
    for i, name in enumerate(("a/b", "../up", "ü ñ 層", "x" * 1024, "model.layers.0.weight")):
        store.add(name, data(10, i))
        assert read(store, name) == data(10, i)
        assert store.info(name).nbytes == 10


def test_stats(store: Store) -> None:
    before = store.stats()
    assert before.host.limit_bytes == 16 * MIB
    assert before.disk.limit_bytes == 64 * MIB
    assert before.packed.used_bytes == 0
    assert before.packed.limit_bytes == before.host.limit_bytes
    assert dict(before.gpu) == {}
    store.add("a", data(MIB))
    store.evict("a")
    after = store.stats()
    assert after.blocks == 1
    assert after.written_bytes >= MIB
    assert after.disk.used_bytes >= MIB
    assert after.host.used_bytes == 0
    assert after.host.peak_bytes >= MIB
    assert read(store, "a") == data(MIB)
    assert store.stats().read_bytes >= MIB
    assert store.stats().fills == 1


# ---- tiers ----


def test_more_than_memory(store: Store) -> None:
    for i in range(40):
        store.add(f"b{i}", data(MIB, i))
        store.check()
    assert store.stats().host.mapped_bytes <= 16 * MIB
    for i in (*range(40), *range(39, -1, -1)):
        assert read(store, f"b{i}") == data(MIB, i)
    assert store.stats().host.mapped_bytes <= 16 * MIB
    assert store.stats().writes >= 24


def test_what_cannot_fit_is_refused(open_store: Opener) -> None:
    store = open_store(host_limit="8MiB", disk_limit="8MiB")
    added = []

    def fill() -> None:
        for i in range(40):
            store.add(f"b{i}", data(MIB, i))
            added.append(i)

    with pytest.raises((omnimem.DiskFullError, LimitError)) as caught:
        fill()
    assert "b" in str(caught.value)
    store.check()
    assert 4 <= len(added) <= 16
    for i in (*added, *reversed(added)):
        assert read(store, f"b{i}") == data(MIB, i)
    store.remove("b0")
    store.add("again", data(MIB, 99))
    assert read(store, "again") == data(MIB, 99)


def test_larger_than_memory_is_refused(open_store: Opener) -> None:
    store = open_store(host_limit="4MiB")
    with pytest.raises(LimitError) as caught:
        store.add("big", bytes(5 * MIB))
    error = caught.value
    assert isinstance(error, MemoryError)
    assert error.limit == 4 * MIB
    assert error.need >= 5 * MIB
    assert error.which
    assert "big" in str(error)
    assert store.names() == []


def test_without_disk_nothing_is_moved_out(open_store: Opener) -> None:
    store = open_store(host_limit="4MiB", disk_limit=0)
    store.add("a", data(MIB))

    def fill() -> None:
        for i in range(8):
            store.add(f"b{i}", data(MIB, i))

    with pytest.raises((omnimem.DiskFullError, LimitError)):
        fill()
    store.check()
    assert read(store, "a") == data(MIB)


def test_groups(store: Store) -> None:
    store.group("small", 2 * MIB)
    for i in range(6):
        store.add(f"s{i}", data(MIB, i), group="small")
        store.add(f"d{i}", data(MIB, i))
    in_host = [i for i in range(6) if "host" in store.info(f"s{i}").tiers]
    assert len(in_host) <= 2
    assert all("host" in store.info(f"d{i}").tiers for i in range(6))
    assert all(read(store, f"s{i}") == data(MIB, i) for i in range(6))
    with pytest.raises((LimitError, omnimem.DiskFullError)):
        store.add("large", bytes(3 * MIB), group="small")


def test_a_lowered_group_limit(store: Store) -> None:
    for i in range(4):
        store.add(f"g{i}", data(MIB, i), group="g")
    lease = store.lease("g0")
    store.group("g", MIB)
    deadline = time.monotonic() + 10
    while store.stats().host.used_bytes > MIB and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [i for i in range(4) if "host" in store.info(f"g{i}").tiers] == [0]
    store.check()
    lease.release()
    assert all(read(store, f"g{i}") == data(MIB, i) for i in range(4))


def test_evict(store: Store) -> None:
    store.add("a", data(MIB))
    with store.lease("a"):
        assert store.evict("a") is False
        assert "host" in store.info("a").tiers
    assert store.evict("a") is True
    assert store.evict("a") is True
    assert read(store, "a") == data(MIB)


def test_write_lease(store: Store) -> None:
    store.add("a", data(MIB))
    store.evict("a")
    with store.lease("a", write=True) as lease:
        assert lease.writable
        assert store.info("a").tiers == ("host",)
        memoryview(lease)[10:14] = b"1234"
    want = bytearray(data(MIB))
    want[10:14] = b"1234"
    assert read(store, "a") == want
    store.evict("a")
    assert read(store, "a") == want


def test_write_lease_waits_for_others(store: Store) -> None:
    store.add("a", b"abc")
    with store.lease("a"):
        started = time.monotonic()
        with pytest.raises(omnimem.BusyError, match="a") as caught:
            store.lease("a", write=True, timeout=0.3)
        assert 0.25 < time.monotonic() - started < 20
        assert any("a" in holder for holder in caught.value.holders)
        assert isinstance(caught.value, TimeoutError)
    store.lease("a", write=True, timeout=1).release()
    view = memoryview(store.lease("a"))
    with pytest.raises(omnimem.BusyError):
        store.lease("a", write=True, timeout=0)
    view.release()
    store.lease("a", write=True, timeout=1).release()


def test_no_room_names_the_holders(open_store: Opener) -> None:
    store = open_store(host_limit="4MiB")
    for i in range(6):
        store.add(f"b{i}", data(MIB, i))
    held = []

    def hold() -> None:
        for i in range(6):
            held.append(store.lease(f"b{i}", timeout=0.3))

    with pytest.raises(omnimem.BusyError) as caught:
        hold()
    assert any("b0" in holder for holder in caught.value.holders)
    store.check()
    for lease in held:
        lease.release()
    assert read(store, "b5") == data(MIB, 5)


def test_remove(store: Store) -> None:
    store.add("a", data(MIB))
    lease = store.lease("a")
    store.remove("a")
    assert "a" not in store
    assert store.names() == []
    store.add("a", data(10, 1))
    assert bytes(lease) == data(MIB)
    assert read(store, "a") == data(10, 1)
    store.check()
    lease.release()
    store.remove("a")
    store.check()
    assert store.stats().host.used_bytes == 0
    assert store.stats().disk.used_bytes == 0


# ---- prefetch ----


def test_prefetch(store: Store) -> None:
    names = [f"b{i}" for i in range(6)]
    for i, name in enumerate(names):
        store.add(name, data(MIB, i))
        store.evict(name)
    ticket = store.prefetch(names)
    assert ticket.wait(30) is True
    assert ticket.done
    assert ticket.wait() is True
    assert all("host" in store.info(name).tiers for name in names)
    assert store.stats().prefetches >= 6
    assert store.prefetch([]).wait(1) is True
    assert store.prefetch(iter(names)).wait(1) is True


def test_prefetch_more_than_fits(open_store: Opener) -> None:
    store = open_store(host_limit="4MiB")
    for i in range(8):
        store.add(f"b{i}", data(MIB, i))
    ticket = store.prefetch([f"b{i}" for i in range(8)])
    ticket.wait(0.2)
    ticket.cancel()
    for i in range(8):
        assert read(store, f"b{i}") == data(MIB, i)


def test_cancel(store: Store) -> None:
    for i in range(6):
        store.add(f"b{i}", data(MIB, i))
        store.evict(f"b{i}")
    ticket = store.prefetch([f"b{i}" for i in range(6)])
    ticket.cancel()
    with contextlib.suppress(omnimem.Error):
        ticket.wait(10)
    assert ticket.done
    assert all(read(store, f"b{i}") == data(MIB, i) for i in range(6))


# ---- closing, configuration ----


def test_close(store: Store) -> None:
    store.add("a", data(MIB))
    lease = store.lease("a")
    view = memoryview(lease)
    ticket = store.prefetch(["a"])
    store.close()
    store.close()
    calls = (
        lambda: store.add("b", b""),
        lambda: store.take("b", b""),
        lambda: store.add_file("b", __file__, 0, 1),
        lambda: store.lease("a"),
        lambda: store.prefetch(["a"]),
        lambda: store.evict("a"),
        lambda: store.remove("a"),
        lambda: store.info("a"),
        lambda: store.names(),
        lambda: store.check(),
    )
    for call in calls:
        with pytest.raises(omnimem.ClosedError):
            call()
    assert view == data(MIB)
    lease.release()
    ticket.cancel()
    assert view == data(MIB)


def test_context_manager(open_store: Opener) -> None:
    with open_store() as store:
        store.add("a", b"x")
    with pytest.raises(omnimem.ClosedError), store:
        store.lease("a")


def test_a_dropped_store_closes(open_store: Opener, tmp_path: Path, io_backend: str) -> None:
    before = len(os.listdir("/proc/self/task"))
    config = StoreConfig(host_limit="8MiB", directory=tmp_path, io_backend=io_backend)
    for _ in range(5):
        store = Store(config)
        store.add("a", data(MIB))
        view = memoryview(store.lease("a"))
        del store
        assert view == data(MIB)
        del view
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/task")) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/task")) <= before


def test_swap_leaves_nothing(open_store: Opener, tmp_path: Path) -> None:
    store = open_store()
    store.add("a", data(MIB))
    store.evict("a")
    assert not [p for p in (tmp_path / "swap").rglob("*") if p.is_file()]
    store.close()
    assert not list((tmp_path / "swap").iterdir())


def test_config_is_checked() -> None:
    with pytest.raises(TypeError, match="StoreConfig"):
        Store({"host_limit": 1})  # type: ignore[arg-type]
    for fields in (
        {"host_limit": 5},
        {"host_limit": "lots"},
        {"io_backend": "magic"},
        {"verify": "never"},
        {"io_request": 5000},
        {"io_window": 1},
        {"io_threads": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(fields))):
            StoreConfig(**fields)  # type: ignore[arg-type]
    assert StoreConfig(host_limit="1.5 GiB").host_limit == 3 << 29
    with pytest.raises(AttributeError):
        StoreConfig().host_limit = 1  # type: ignore[misc]


def test_config_from_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMNIMEM_HOST_LIMIT", "7MiB")
    monkeypatch.setenv("OMNIMEM_IO_BACKEND", "threads")
    monkeypatch.setenv("OMNIMEM_DIRECTORY", str(tmp_path))
    with Store() as store:
        assert store.stats().host.limit_bytes == 7 * MIB
        assert store.stats().io_backend == "threads"
    assert StoreConfig.from_env(host_limit="8MiB").host_limit == 8 * MIB
    monkeypatch.setenv("OMNIMEM_VERIFY", "maybe")
    with pytest.raises(ValueError, match="OMNIMEM_VERIFY"):
        StoreConfig.from_env()


def test_a_chosen_back_end_warns_of_nothing(open_store: Opener, io_backend: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = open_store()
    assert store.stats().io_backend == io_backend
    assert store.stats().io_fell_back is False
    assert store.stats().io_reason


def test_an_unusable_directory(io_backend: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a directory")

    def use() -> None:
        store = Store(StoreConfig(directory=file, io_backend=io_backend, host_limit="2MiB"))
        store.add("a", data(MIB))
        store.evict("a")

    with pytest.raises(omnimem.IOFailure) as caught:
        use()
    assert caught.value.errno
    assert isinstance(caught.value, OSError)


def test_memory_is_given_back(open_store: Opener) -> None:
    """A store that lives on empty holds only its warm reserve; closed, nothing."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10):
        with open_store(host_limit="64MiB", disk_limit=0) as store:
            for i in range(60):
                store.add(f"b{i}", bytes(MIB // 2))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 200 * 1024


@pytest.mark.parametrize("policy", ["lru", "clock", "s3fifo", "sieve", "adaptive"])
def test_policy_of_a_group(policy: str) -> None:
    """A group does as simulate says, and keeps every byte."""
    ids = [i % 12 if i // 200 % 2 else i * i % 40 for i in range(1200)]
    with omnimem.Store(omnimem.StoreConfig(host_limit="64MiB", disk_limit="64MiB")) as store:
        store.group("g", 10 * 65536, policy=policy)
        for i in range(40):
            store.add(f"b{i}", bytes([i]) * 65536, group="g")
        for i in ids:
            with store.lease(f"b{i}") as lease:
                assert memoryview(lease)[-1] == i
        store.check()
        stats = store.stats()
        assert stats.hits + stats.misses == len(ids)
        assert stats.misses > 100


def test_unknown_policy() -> None:
    with omnimem.Store(omnimem.StoreConfig(host_limit="1MiB")) as store:
        with pytest.raises(ValueError, match="no policy is named 'mru'; there are lru"):
            store.group("g", 0, policy="mru")
        with pytest.raises(TypeError, match="policy"):
            store.group("g", 0, policy=3)  # type: ignore[arg-type]
