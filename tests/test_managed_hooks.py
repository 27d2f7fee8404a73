"""What torch calls of a managed module: our hooks, or the short way past them."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omnimem._managed import manage

from .offloading import restore
from .torch_models import is_unset, omnimem, torch


@pytest.fixture
def store(tmp_path: Path) -> Iterator[omnimem.Store]:
    with omnimem.Store(
        omnimem.StoreConfig(host_limit="16MiB", disk_limit="16MiB", directory=tmp_path)
    ) as opened:
        yield opened
        opened.check()


class Layer(torch.nn.Module):
    """A unit with a part, which says whether its weights are there, and may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.part = torch.nn.Linear(16, 16)
        self.error: BaseException | None = None
        self.threads: list[int] = []

    def forward(self, x: Any, *, twice: bool = False) -> Any:
        assert not is_unset(self.part.weight)
        self.threads.append(threading.get_ident())
        if self.error is not None:
            raise self.error
        return self.part(x) * (2 if twice else 1)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x, twice=True)
        return x


@pytest.fixture
def x() -> Any:
    torch.manual_seed(5)
    return torch.randn(2, 16)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(4)
    return Model()


class Counted:
    """How often units are entered and left by more than counting a user."""

    def __init__(self, handle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.enters = self.leaves = 0
        enter, leave = handle._units.enter, handle._units.leave

        def entering(*args: Any) -> None:
            self.enters += 1
            enter(*args)

        def leaving(*args: Any) -> None:
            self.leaves += 1
            leave(*args)

        monkeypatch.setattr(handle._units, "enter", entering)
        monkeypatch.setattr(handle._units, "leave", leaving)

    def take(self) -> tuple[int, int]:
        """Since the last time."""
        found = self.enters, self.leaves
        self.enters = self.leaves = 0
        return found


def right(model: Any, x: Any, want: Any) -> bool:
    with torch.no_grad():
        return bool(torch.equal(model(x), want))


def users(handle: Any) -> int:
    return int(handle._units.stream.stats()["users"])


def test_what_stays_is_only_counted(
    store: omnimem.Store, model: Any, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = model(x).detach()
    handle = manage(model, store, "model")
    counted = Counted(handle, monkeypatch)
    before = handle._units.stream.stats()
    assert right(model, x, want)
    assert counted.take() == (0, 0)
    after = handle._units.stream.stats()
    assert (after["enters"] - before["enters"], after["users"]) == (3, 0)
    seen: list[int] = []
    place = model.layers[1].part.register_forward_hook(lambda *_: seen.append(users(handle)))
    assert right(model, x, want)
    assert seen == [1]
    place.remove()
    assert counted.take() == (0, 0)
    handle.offload("disk")
    assert right(model, x, want)
    assert counted.take() == (3, 3)
    restore(handle)
    assert right(model, x, want)
    assert counted.take() == (0, 0)
    handle.offload("cpu")
    handle.resize(handle.nbytes)  # they stay from their next use on
    assert right(model, x, want)
    assert counted.take()[0] == 3
    assert right(model, x, want)
    assert counted.take() == (0, 0)
    with torch.no_grad():  # outside any pass: that is a use of the model
        model.layers[0](x)
    assert counted.take() == (1, 0)
    handle.release()
    assert not any("_call_impl" in module.__dict__ for module in model.modules())
    assert right(model, x, want)


def test_hooks_of_others_are_called(store: omnimem.Store, model: Any, x: Any) -> None:
    want = model(x).detach()
    handle = manage(model, store, "model")
    layer = model.layers[1]
    seen: list[str] = []

    def note(what: str) -> Any:
        def hook(module: Any, *_: Any) -> None:
            if module is layer:
                seen.append(what)
                if not what.startswith("backward"):
                    assert not is_unset(layer.part.weight)

        return hook

    globally = torch.nn.modules.module
    registered = {
        "before": layer.register_forward_pre_hook,
        "after": layer.register_forward_hook,
        "backward before": layer.register_full_backward_pre_hook,
        "backward after": layer.register_full_backward_hook,
        "of all before": globally.register_module_forward_pre_hook,
        "of all after": globally.register_module_forward_hook,
        "backward of all before": globally.register_module_full_backward_pre_hook,
        "backward of all after": globally.register_module_full_backward_hook,
    }
    for what, register in registered.items():
        place = register(note(what))
        try:
            model(x.clone().requires_grad_()).sum().backward()
        finally:
            place.remove()
        assert seen == [what]
        seen.clear()
        assert users(handle) == 0
    model(x.clone().requires_grad_()).sum().backward()
    assert seen == []
    layer._forward_pre_hooks.clear()  # ours, too: what is there instead is called
    layer.register_forward_pre_hook(note("another"))
    assert right(model, x, want)
    assert seen == ["another"]
    handle.release()


def test_what_hooks_change_counts(store: omnimem.Store, model: Any, x: Any) -> None:
    want = model(x).detach()
    handle = manage(model, store, "model")
    place = model.layers[2].register_forward_hook(lambda _, args, out: out + args[0])
    assert not right(model, x, want)
    place.remove()
    assert right(model, x, want)
    place = model.layers[0].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    assert not right(model, x, want)
    place.remove()
    assert right(model, x, want)
    handle.release()


def test_forward_may_be_replaced(store: omnimem.Store, model: Any, x: Any) -> None:
    want = model(x).detach()
    handle = manage(model, store, "model")
    layer = model.layers[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) + 1
    assert not right(model, x, want)
    del layer.forward
    assert right(model, x, want)
    handle.release()


def test_what_stands_in_already_is_left_alone(store: omnimem.Store, model: Any, x: Any) -> None:
    want = model(x).detach()
    calls: list[int] = []
    layer = model.layers[0]
    plain = layer._call_impl

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    layer._call_impl = own
    handle = manage(model, store, "model")
    for target in ("cpu", "disk"):
        assert right(model, x, want)
        handle.offload(target)
    assert len(calls) == 2
    handle.close()
    assert layer._call_impl is own


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_unit_leaves_it(
    error: type[BaseException], store: omnimem.Store, model: Any, x: Any
) -> None:
    want = model(x).detach()
    handle = manage(model, store, "model")
    model.layers[1].error = error("here")
    for _ in range(2):
        with pytest.raises(error, match="here"):
            model(x)
        assert users(handle) == 0
    model.layers[1].error = None
    assert right(model, x, want)
    assert not handle.in_use
    handle.offload("disk")
    assert handle.host_bytes() == 0
    assert right(model, x, want)


def test_a_unit_that_goes_while_it_is_in_use(store: omnimem.Store, model: Any, x: Any) -> None:
    want = model(x).detach()
    handle = manage(model, store, "model")
    layer = model.layers[1]

    def away(*_: Any) -> None:
        handle.offload("cpu")
        assert not is_unset(layer.part.weight)  # this thread uses it
        assert is_unset(model.layers[0].part.weight)

    place = layer.part.register_forward_pre_hook(away)
    assert right(model, x, want)
    assert is_unset(layer.part.weight)
    assert users(handle) == 0
    place.remove()
    assert right(model, x, want)
    handle.release()


def test_a_unit_inside_of_itself(store: omnimem.Store, model: Any, x: Any) -> None:
    """Recursion: a user more, and one less."""
    handle = manage(model, store, "model")
    layer = model.layers[0]
    depth: list[int] = []

    def again(module: Any, args: Any) -> None:
        depth.append(users(handle))
        if len(depth) < 3:
            layer(args[0])

    layer.part.register_forward_pre_hook(again)
    model(x)
    assert depth == [1, 2, 3]
    assert users(handle) == 0
    handle.release()


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="torch.jit ends in it")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_trace_is_right(store: omnimem.Store, model: Any, x: Any) -> None:
    model.eval().requires_grad_(False)
    want = model(x)
    handle = manage(model, store, "model")
    traced = torch.jit.trace(model, x)
    assert torch.equal(traced(x), want)
    assert users(handle) == 0
    assert "layers" in str(traced.graph)  # scopes are those of modules
    handle.release()


def test_units_are_neither_copied_nor_pickled(store: omnimem.Store, model: Any) -> None:
    handle = manage(model, store, "model")
    for refused in (copy.deepcopy, pickle.dumps):
        for module in (model, model.layers[0]):
            with pytest.raises(RuntimeError, match=r"model\.omnimem\.release\(\)"):
                refused(module)
    handle.release()
    assert pickle.loads(pickle.dumps(copy.deepcopy(model))) is not None


def test_a_model_that_is_forgotten_is_collected(store: omnimem.Store) -> None:
    model = Model()
    handle = manage(model, store, "model")
    gone = weakref.ref(model.layers[0])
    del model, handle
    gc.collect()
    assert gone() is None


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
def test_compiled_models_and_units(store: omnimem.Store, model: Any, x: Any) -> None:
    """What traces hooks by itself never comes by what stands in for them."""
    model.eval().requires_grad_(False)
    want = model(x)
    model.layers[0].compile(backend="eager")  # before, and one after
    assert torch.equal(model(x), want)
    handle = manage(model, store, "model")
    model.layers[1].compile(backend="eager")
    whole = torch.compile(model, backend="eager")
    for called in (model, whole):
        for target in ("cpu", "disk"):
            assert torch.equal(called(x), want)
            handle.offload(target)
            assert torch.equal(called(x), want)
            assert users(handle) == 0
            restore(handle)
    handle.release()
    assert torch.equal(whole(x), want)
