"""A pass that needs memory which other models keep, or its own does, gets it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import omnimem
from omnimem import AdvancedMemoryConfig, AdvancedMemoryManager

torch = pytest.importorskip("torch")

MIB = 1 << 20
SECONDS = 10.0
"""For which a unit waits."""

x = torch.ones(2, 512)


def make_model(seed: int) -> Any:
    """Of 4 MiB, in segments of their own, but for the biases."""
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(512, 512) for _ in range(4)]
    return torch.nn.Sequential(*layers).eval().requires_grad_(False)


class Three:
    """A manager with three models, and what each makes of `x`."""

    def __init__(self) -> None:
        self.models = {name: make_model(seed) for seed, name in enumerate("abc")}
        self.wants = {name: model(x) for name, model in self.models.items()}
        config = AdvancedMemoryConfig(
            budget=32 * MIB, enable_weight_cache=False, enable_auto_offload=False
        )
        self.manager = AdvancedMemoryManager(config)
        for name, model in self.models.items():
            self.manager.attach(model, model_id=name)
            self.entry(name).movable._units._timeout = SECONDS  # type: ignore[attr-defined]

    def entry(self, name: str) -> Any:
        return self.manager.offloader._models.find(name)

    def hold(self, left: int) -> Any:
        """Hold all memory but so much."""
        self.manager.store.add("held", bytes(32 * MIB - left))
        return self.manager.store.lease("held")

    def check(self, *names: str) -> None:
        for name in names:
            assert torch.equal(self.models[name](x), self.wants[name]), name
        assert not any(self.entry(name).movable.in_use for name in "abc")
        self.manager.store.check()


@pytest.fixture
def three(tmp_path: Path, io_backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Three]:
    monkeypatch.setenv("OMNIMEM_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("OMNIMEM_DISK_LIMIT", "128MiB")
    monkeypatch.setenv("OMNIMEM_IO_BACKEND", io_backend)
    made = Three()
    yield made
    made.manager.cleanup()


def once(module: Any, step: Callable[[], object]) -> None:
    """Do something before a module runs next."""

    def do(*_: Any) -> None:
        handle.remove()
        step()

    handle = module.register_forward_pre_hook(do)


def test_idle_models_keep_it(three: Three) -> None:
    """Brought back during the pass of another one: by their bytes there is room for all."""
    with three.hold(left=12 * MIB):

        def restore() -> None:
            for name in "ab":
                assert three.manager.restore_model(name).action == "restore"
                assert three.entry(name).movable.state == "resident"

        once(three.models["c"][0], restore)
        three.check("c")
        assert {three.entry(name).room for name in "abc"} == {None}
        three.check(*"abc")


def test_a_model_in_use_keeps_it(three: Three) -> None:
    """It goes on with one unit at a time."""
    begun, go_on = threading.Event(), threading.Event()
    right: list[bool] = []

    def wait() -> None:
        begun.set()
        assert go_on.wait(60)

    def call() -> None:
        right.append(torch.equal(three.models["a"](x), three.wants["a"]))

    with three.hold(left=7 * MIB):
        once(three.models["a"][3], wait)
        thread = threading.Thread(target=call)
        thread.start()
        try:
            assert begun.wait(60)
            assert torch.equal(three.models["b"](x), three.wants["b"])
        finally:
            go_on.set()
            thread.join(60)
        assert right == [True]
        three.check(*"abc")


def test_it_keeps_it_itself(three: Three) -> None:
    with three.hold(left=7 * MIB // 2):
        three.check(*"ab")


def test_what_others_hold_it_does_not_get(three: Three) -> None:
    for name in "abc":
        three.entry(name).movable._units._timeout = 0.5
    with three.hold(left=MIB // 2), pytest.raises(omnimem.BusyError, match="no room for"):
        three.models["a"](x)
    three.check(*"abc")
