"""Modules at home on another device: out to the store and back, on a GPU where there is one.

Elsewhere the same code runs with the CPU for the device.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import omnimem  # noqa: E402
from omnimem import _torch_managed  # noqa: E402
from omnimem._torch_managed import ManagedModule  # noqa: E402
from omnimem._torch_managed_units import DeviceUnits  # noqa: E402
from omnimem._torch_parts import parts_of_memory  # noqa: E402

from .offloading import restore  # noqa: E402


@pytest.fixture(params=["cuda", "cpu"])
def device(request: pytest.FixtureRequest) -> Any:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return torch.device(request.param)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[omnimem.Store]:
    config = omnimem.StoreConfig(host_limit="256MiB", disk_limit="256MiB", directory=tmp_path)
    with omnimem.Store(config) as one:
        yield one
        one.check()


class Net(torch.nn.Module):
    def __init__(self, width: int = 256, count: int = 6) -> None:
        super().__init__()
        self.first = torch.nn.Linear(width, width)
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, width))
            for _ in range(count)
        )
        self.last = torch.nn.Linear(width, width)
        self.last.weight = self.first.weight
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x: Any) -> Any:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x) + self.shift


def managed(model: Any, store: omnimem.Store, device: Any) -> Any:
    if device.type == "cuda":
        return _torch_managed.manage_module(model, store, "net", None, 30.0, True)
    units = DeviceUnits(
        parts_of_memory(model, dict(model.named_parameters())), "model:net", store, 30.0, device
    )
    return ManagedModule(model, dict(model.named_parameters()), units, store, "net", True)


@pytest.fixture
def trio(device: Any, store: omnimem.Store) -> Any:
    torch.manual_seed(4)
    model = Net().to(device)
    twin = copy.deepcopy(model)
    return model, twin, managed(model, store, device), torch.randn(3, 256, device=device)


def right(model: Any, twin: Any, x: Any) -> None:
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))


def test_out_and_back(trio: Any, store: omnimem.Store, device: Any) -> None:
    model, twin, handle, x = trio
    identity = [id(p) for p in model.parameters()]
    right(model, twin, x)
    assert (handle.state, handle.host_bytes(), store.names()) == ("resident", 0, [])
    for target, state in (("cpu", "evictable"), ("disk", "disk")):
        assert handle.offload(target).held == ()
        assert handle.state == state
        assert all(p.untyped_storage().nbytes() == 4 for p in model.parameters())
        assert all(p.device == model.shift.device for p in model.parameters())
        assert (handle.host_bytes() == 0) == (target == "disk")
        for _ in range(2):
            right(model, twin, x)
            store.check()
        assert all(p.untyped_storage().nbytes() == 4 for p in model.parameters())
        assert restore(handle).streams is False
        assert (handle.state, handle.host_bytes(), store.names()) == ("resident", 0, [])
        right(model, twin, x)
    assert identity == [id(p) for p in model.parameters()]
    assert model.last.weight is model.first.weight
    handle.offload("cpu")
    handle.release()
    assert store.names() == []
    right(model, twin, x)


def test_memory_of_the_device_goes(trio: Any, device: Any) -> None:
    if device.type != "cuda":
        pytest.skip("no GPU here")
    _, _, handle, _ = trio
    gc.collect()
    before = torch.cuda.memory_allocated()
    handle.offload("cpu")
    assert before - torch.cuda.memory_allocated() > 0.9 * handle.nbytes
    restore(handle)


def test_what_training_changed_stays(trio: Any) -> None:
    model, twin, handle, x = trio
    mine = torch.optim.SGD(model.parameters(), lr=0.01)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.01)
    for away in (False, True, False, True):
        for one, optimizer in ((model, mine), (twin, theirs)):
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()
        handle.offload("disk" if away else "cpu")
        right(model, twin, x)
        restore(handle)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b)


def test_no_room_leaves_it_at_home(device: Any, tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = Net().to(device)
    twin, x = copy.deepcopy(model), torch.randn(3, 256, device=device)
    config = omnimem.StoreConfig(host_limit="1MiB", disk_limit=0, directory=tmp_path)
    with omnimem.Store(config) as store:
        handle = managed(model, store, device)
        with pytest.raises(omnimem.Error):
            handle.offload("cpu")
        assert handle.state == "resident"
        assert store.names() == []
        right(model, twin, x)
        store.check()
        handle.close()
