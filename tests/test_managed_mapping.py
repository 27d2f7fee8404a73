"""Mappings of names to tensors whose bytes are moved out of memory and back."""

from __future__ import annotations

import gc
import types
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import omnimem
from omnimem import Store
from omnimem._managed import manage

from .offloading import restore

np = pytest.importorskip("numpy")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    config = omnimem.StoreConfig(host_limit="64MiB", disk_limit="64MiB", directory=tmp_path)
    with Store(config) as one:
        yield one
        one.check()


def tensors(kind: str = "numpy") -> dict[str, Any]:
    arrays = {
        "a": np.arange(600_000, dtype=np.float32).reshape(600, 1000),
        "b": np.arange(7, dtype=np.int16),
        "c": np.full((3, 5), 2.5),
    }
    if kind == "torch":
        torch = pytest.importorskip("torch")
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    return arrays


def same(mapping: Any) -> None:
    want = tensors()
    assert list(mapping) == list(want)
    for name, array in want.items():
        assert np.array_equal(np.from_dlpack(mapping[name]), array), name


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_out_and_back(kind: str, store: Store) -> None:
    mapping = tensors(kind)
    types_before = [type(value) for value in mapping.values()]
    handle = manage(mapping, store, "tensors")
    assert (handle.state, handle.nbytes) == ("resident", 2_400_000 + 14 + 120)
    for target, state in (("cpu", "evictable"), ("disk", "disk"), ("disk", "disk")):
        moved = handle.offload(target)
        gc.collect()
        assert (handle.state, moved.held) == (state, ())
        assert [type(value) for value in mapping.values()] == [omnimem.MemoryBlock] * 3
        if target == "disk":
            assert handle.host_bytes() == 0
        same(mapping)  # read as they are
        assert memoryview(mapping["b"]).nbytes == 14
        assert restore(handle).streams is False
        assert handle.state == "resident"
        assert [type(value) for value in mapping.values()] == types_before
        same(mapping)
    handle.offload("disk")
    handle.release()
    assert [type(value) for value in mapping.values()] == types_before
    same(mapping)
    assert store.names() == []
    with pytest.raises(ValueError, match="not managed"):
        handle.offload("cpu")


def test_what_is_written_stays(store: Store) -> None:
    mapping = tensors()
    handle = manage(mapping, store, "tensors")
    handle.offload("disk")
    np.from_dlpack(mapping["a"])[5, 5] = -1.0
    handle.offload("disk")
    restore(handle)
    assert mapping["a"][5, 5] == -1.0
    mapping["a"][6, 6] = -2.0
    mapping["b"] = np.arange(3)  # another tensor
    handle.offload("disk")
    restore(handle)
    assert mapping["a"][5, 5] == -1.0
    assert mapping["a"][6, 6] == -2.0
    assert mapping["b"].tolist() == [0, 1, 2]
    handle.close()


def test_what_others_hold_is_named(store: Store) -> None:
    mapping = tensors()
    own, view = mapping["a"], None
    handle = manage(mapping, store, "tensors")
    assert dict(handle.offload("disk").held) == {"a": own.nbytes}
    del own
    gc.collect()
    view = np.from_dlpack(mapping["c"])
    assert dict(handle.offload("disk").held) == {"c": 120}
    assert view[0, 0] == 2.5
    del view
    assert handle.offload("disk").held == ()
    handle.close()


def test_no_room_to_restore(store: Store) -> None:
    mapping = tensors()
    handle = manage(mapping, store, "tensors")
    handle.offload("cpu")
    assert restore(handle, 1_000_000).streams
    assert handle.state == "streams"
    same(mapping)
    assert restore(handle, handle.nbytes).streams is False
    assert handle.state == "resident"
    handle.close()


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    config = omnimem.StoreConfig(host_limit="8MiB", disk_limit="64KiB", directory=tmp_path)
    with Store(config) as store:
        mapping = tensors()
        before = dict(mapping)
        handle = manage(mapping, store, "tensors")
        with pytest.raises(omnimem.DiskFullError, match="model:tensors/a"):
            handle.offload("disk")
        assert all(mapping[name] is value for name, value in before.items())
        assert store.names() == []
        assert handle.state == "resident"


def test_refused(store: Store) -> None:
    class Stubborn(UserDict):  # type: ignore[type-arg]
        def __setitem__(self, key: Any, value: Any) -> None:
            if key in self.data:
                raise TypeError("no")
            super().__setitem__(key, value)

    for what, error, text in (
        (types.MappingProxyType(tensors()), TypeError, "read-only mapping cannot be managed"),
        (Stubborn(tensors()), TypeError, "'a' replaced"),
        ([1], TypeError, "list cannot be managed"),
        ({"a": 3}, TypeError, "'a' is a int, no tensor"),
        ({1: np.zeros(3)}, TypeError, "are str"),
    ):
        with pytest.raises(error, match=text):
            manage(what, store, "tensors")
    with pytest.raises(TypeError, match="model_dir"):
        manage(tensors(), store, "tensors", model_dir="here")
    assert store.names() == []
