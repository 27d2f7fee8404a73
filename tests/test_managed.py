"""Modules moved out of memory and back while they are in use: same bits, same parameters."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import shutil
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from omnimem import _core
from omnimem._managed import manage

from .conftest import SOAK, run_python
from .offloading import restore
from .torch_models import (
    LARGE,
    SMALL_HEAD,
    bits,
    expected_logits,
    folder,
    forward,
    fresh,
    is_unset,
    layers,
    omnimem,
    on_meta,
    plain,
    same_bits,
    torch,
)

MIB = 1 << 20
PRESET = "tiny-qwen3"
Opener = Callable[..., omnimem.Store]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small models are not faster with more, and other tests run beside."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Opener]:
    """As in conftest, with one back end."""
    stores: list[Any] = []
    (tmp_path / "swap").mkdir()

    def open_one(**fields: Any) -> omnimem.Store:
        fields = {"host_limit": "16MiB", "disk_limit": "64MiB", "directory": tmp_path / "swap"} | (
            fields
        )
        stores.append(omnimem.Store(omnimem.StoreConfig(**fields)))
        return stores[-1]

    yield open_one
    _core._fault_reset()
    for store in stores:
        try:
            store.check()
        except omnimem.ClosedError:
            pass
        finally:
            store.close()


@pytest.fixture
def roomy(open_store: Opener) -> omnimem.Store:
    return open_store(host_limit="512MiB", disk_limit="512MiB")


def model_of(preset: str = PRESET, by: str = "memory", store: Any = None, **options: Any) -> Any:
    """A model and its handle; its weights come from its own memory, or from its checkpoint."""
    model = fresh(preset)
    if by == "files":
        options["model_dir"] = folder(preset)
    return model, manage(model, store, preset, **options)


def rss() -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def assert_right(model: Any, preset: str) -> None:
    """What plain transformers says, bit by bit."""
    assert same_bits(forward(model, preset), expected_logits(preset))


def identity(model: Any) -> list[Any]:
    return [
        (name, id(param), param.dtype, param.shape, param.requires_grad)
        for name, param in model.named_parameters(remove_duplicate=False)
    ]


BY = pytest.mark.parametrize("by", ["memory", "files"])


# -- what is promised


@BY
@pytest.mark.parametrize("preset", ["tiny", SMALL_HEAD])
def test_the_same_bits_wherever_the_weights_are(preset: str, by: str, roomy: omnimem.Store) -> None:
    model, handle = model_of(preset, by, roomy)
    before = identity(model)
    buffers = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    assert handle.state == "resident"
    assert handle.missing_bytes() == 0
    assert handle.group == f"model:{preset}"
    assert_right(model, preset)
    for target, state in (("cpu", "evictable"), ("disk", "disk"), ("cpu", "evictable")):
        moved = handle.offload(target)
        assert (handle.state, moved.held, moved.streams) == (state, (), False)
        assert handle.missing_bytes() == (0 if target == "cpu" else handle.nbytes)
        assert all(map(is_unset, (p for p in model.parameters() if p.numel() > 1)))
        assert_right(model, preset)
        assert handle.state == "evictable"  # it came back as it was used
        assert handle.missing_bytes() == 0
        roomy.check()
        assert restore(handle).streams is False
        assert (handle.state, handle.missing_bytes()) == ("resident", 0)
        assert_right(model, preset)
    assert identity(model) == before
    assert buffers == {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    assert not handle.in_use
    handle.release()
    assert not roomy.names(handle.group)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert_right(model, preset)
    assert roomy.stats().leases == 0


@BY
def test_memory_goes_back_before_the_call_returns(by: str, roomy: omnimem.Store) -> None:
    model, handle = model_of(LARGE, by, roomy)
    expected_logits(LARGE)
    forward(model, LARGE)
    gc.collect()
    before = rss()
    moved = handle.offload("disk")
    after = rss()
    assert before - after > 0.95 * handle.nbytes, (before, after, handle.nbytes)
    assert moved.nbytes >= handle.nbytes
    assert handle.host_bytes() == 0
    assert same_bits(forward(model, LARGE), expected_logits(LARGE))
    handle.offload("disk")
    assert rss() < before - 0.9 * handle.nbytes
    handle.close()


@BY
def test_room_for_a_part(by: str, roomy: omnimem.Store) -> None:
    model, handle = model_of(PRESET, by, roomy)
    handle.offload("disk")
    room = handle.nbytes * 7 // 10
    moved = restore(handle, room)
    assert moved.streams
    assert handle.state == "streams"
    assert 0 < handle.host_bytes() <= room
    for _ in range(3):
        assert_right(model, PRESET)
        roomy.check()
    deadline = time.monotonic() + 20  # what is being written out is on its way
    while handle.host_bytes() > room and time.monotonic() < deadline:
        forward(model, PRESET)
        time.sleep(0.02)
    assert handle.host_bytes() <= room
    handle.resize(handle.nbytes)
    assert handle.state == "resident"
    assert_right(model, PRESET)
    assert handle.missing_bytes() == 0
    handle.resize(room)
    assert handle.state == "streams"
    assert_right(model, PRESET)
    with pytest.raises(omnimem.LimitError, match="least"):
        restore(handle, 4096)
    assert handle.state == "streams"
    assert_right(model, PRESET)
    restore(handle)
    assert handle.state == "resident"


def test_two_models_share_what_there_is(open_store: Opener) -> None:
    """The one that is called takes the room of the one that is idle."""
    nbytes = sum(p.nbytes for p in plain(LARGE).parameters())
    store = open_store(host_limit=nbytes * 13 // 10, disk_limit="256MiB")
    one, first = model_of(LARGE, "files", store)
    first.offload("cpu")
    two = fresh(LARGE)
    second = manage(two, store, "two", model_dir=folder(LARGE))
    second.offload("cpu")
    for _ in range(2):
        for model in (one, two):
            assert_right(model, LARGE)
            store.check()
    assert store.stats().host.peak_bytes <= nbytes * 13 // 10
    assert first.host_bytes() + second.host_bytes() <= nbytes * 13 // 10
    restore(first)
    assert first.state == "resident"
    assert_right(two, LARGE)
    first.release()
    second.close()


def test_it_comes_back_ahead_of_use(roomy: omnimem.Store) -> None:
    model, handle = model_of(LARGE, "files", roomy)
    forward(model, LARGE)
    handle.offload("disk")
    before = handle._units.stream.stats()
    assert same_bits(forward(model, LARGE), expected_logits(LARGE))
    after = handle._units.stream.stats()
    entered = after["enters"] - before["enters"]
    assert after["mispredicted"] - before["mispredicted"] < entered // 4
    assert after["hits"] - before["hits"] > 0
    assert entered >= 24
    handle.close()


def test_units_are_modules_of_a_list_or_children(roomy: omnimem.Store) -> None:
    _, handle = model_of(PRESET, "memory", roomy)
    count = len(layers(plain(PRESET)))
    assert set(handle._units.modules) >= {f"model.layers.{i}" for i in range(count)}
    assert not any("mlp" in name or "self_attn" in name for name in handle._units.modules)


# -- parameters of all kinds


class Odd(torch.nn.Module):
    """Ties, views, strides, types, a scalar, nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(40, 40)
        self.two = torch.nn.Linear(40, 40)
        self.two.weight = self.one.weight
        base = torch.randn(3, 1600)
        self.views = torch.nn.ParameterList(
            torch.nn.Parameter(base[row, column:].view(-1)[:900].view(30, 30))
            for row, column in ((0, 0), (0, 100), (2, 5))
        )
        self.turned = torch.nn.Parameter(torch.randn(30, 50).t())
        self.image = torch.nn.Parameter(
            torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
        )
        self.halves = torch.nn.Parameter(torch.randn(33).half(), requires_grad=False)
        self.counts = torch.nn.Parameter(torch.arange(9), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.none = torch.nn.Parameter(torch.empty(0, 7))
        self.wave = torch.nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.register_buffer("kept", torch.randn(6))

    def forward(self, x: Any) -> Any:
        x = self.two(self.one(x))[:, :30]
        for view in self.views:
            x = x @ view
        x = x @ self.turned.t()[:30, :30] if self.turned.shape[0] == 30 else x @ self.turned[:30]
        y = torch.nn.functional.conv2d(torch.ones(1, 3, 8, 8), self.image).sum()
        return (
            x.sum() * self.scale
            + y
            + self.halves.float().sum()
            + self.counts.sum()
            + self.wave.real.sum()
            + self.kept.sum()
        )


def form(model: Any) -> list[Any]:
    return [
        (name, id(p), p.dtype, p.shape, p.stride(), p.requires_grad)
        for name, p in model.named_parameters(remove_duplicate=False)
    ]


def test_ties_views_strides_and_types(roomy: omnimem.Store) -> None:
    torch.manual_seed(3)
    model, x = Odd(), torch.randn(2, 40)
    with torch.no_grad():
        want = model(x)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = form(model)
    handle = manage(model, roomy, "odd")
    assert form(model) == before
    for move in (lambda: None, lambda: handle.offload("cpu"), lambda: handle.offload("disk")):
        move()
        with torch.no_grad():
            assert torch.equal(bits(model(x)), bits(want))
        restore(handle)
        assert form(model) == before
        for name, param in model.named_parameters():
            assert same_bits(
                torch.view_as_real(param) if param.is_complex() else param,
                torch.view_as_real(values[name]) if param.is_complex() else values[name],
            ), name
    assert model.two.weight is model.one.weight
    for release in (False, True):  # views of the same memory still are
        if release:
            handle.release()
        with torch.no_grad():
            model.views[1][0, 0] = 42.0
            assert model.views[0].flatten()[100] == 42.0
    assert form(model) == before


def test_what_cannot_be_moved_is_refused(roomy: omnimem.Store) -> None:
    def net() -> Any:
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))

    class Own(torch.nn.Parameter):
        pass

    meta = net().to("meta")
    sparse = net()
    sparse[0].weight = torch.nn.Parameter(torch.eye(4).to_sparse())
    own = net()
    own[1].bias = Own(torch.zeros(4))
    buffered = net()
    buffered[0].register_buffer("same", buffered[0].weight.data[0])
    shared = net()
    shared[0].weight.data.share_memory_()
    two = net()
    handle = manage(two, roomy, "two")
    tied = net()
    tied[0].weight = two[0].weight
    alias = net()
    alias[0].weight = torch.nn.Parameter(two[0].weight.data)
    for model, text in (
        (meta, r"0\.weight is on the meta device.*model_dir"),
        (sparse, r"0\.weight is not dense"),
        (own, r"1\.bias is a Own"),
        (buffered, r"0\.weight shares its memory with the buffer 0\.same"),
        (shared, r"0\.weight is in memory shared"),
        (two, "already"),
        (tied, r"0\.weight belongs to the model 'two'"),
        (alias, r"0\.weight belongs to the model 'two'"),
        (torch.nn.ReLU(), "no parameters"),
    ):
        before = [
            (id(p), p.is_meta or p.layout != torch.strided or p.data_ptr())
            for p in model.parameters()
        ]
        with pytest.raises(ValueError, match=text):
            manage(model, roomy, "another")
        assert before == [
            (id(p), p.is_meta or p.layout != torch.strided or p.data_ptr())
            for p in model.parameters()
        ]
        assert model is two or not any(m._forward_hooks for m in model.modules())
    assert roomy.names("model:another") == []
    with pytest.raises(ValueError, match="'two' already"):
        manage(net(), roomy, "two")
    for target in ("cuda", "", None):
        with pytest.raises(ValueError, match="'cpu' or 'disk'"):
            handle.offload(target)
    handle.release()
    with pytest.raises(ValueError, match="not managed any more"):
        handle.offload("cpu")
    with pytest.raises(TypeError, match="int"):
        manage(3, roomy, "number")


def test_no_room_changes_nothing(open_store: Opener) -> None:
    store = open_store(host_limit="1MiB", disk_limit="1MiB")
    model = fresh(PRESET)
    places = [(id(p), p.data_ptr()) for p in model.parameters()]
    with pytest.raises((omnimem.LimitError, omnimem.DiskFullError)):
        manage(model, store, "big")
    assert places == [(id(p), p.data_ptr()) for p in model.parameters()]
    assert not hasattr(model, "omnimem")
    assert store.names() == []
    assert_right(model, PRESET)


def test_a_model_without_memory(roomy: omnimem.Store) -> None:
    """Built on the meta device, it comes from its checkpoint as it is used."""
    model = on_meta(PRESET)
    handle = manage(model, roomy, "meta", model_dir=folder(PRESET))
    assert handle.state == "disk"
    assert handle.host_bytes() == 0
    assert_right(model, PRESET)
    restore(handle)
    assert handle.state == "resident"
    assert_right(model, PRESET)
    handle.release()
    assert_right(model, PRESET)


def test_guards(roomy: omnimem.Store) -> None:
    model, handle = model_of(PRESET, "memory", roomy)
    assert len(model.state_dict()) == len(plain(PRESET).state_dict())
    for target in ("cpu", "disk"):
        handle.offload(target)
        for refused in (
            model.state_dict,
            model.float,
            lambda: model.load_state_dict(plain(PRESET).state_dict()),
            lambda: copy.deepcopy(model),
            lambda: pickle.dumps(model),
        ):
            with pytest.raises(RuntimeError, match=r"model\.omnimem\.release\(\)"):
                refused()
        assert model.to("cpu") is model
        assert_right(model, PRESET)
    restore(handle)
    state = model.state_dict()
    assert all(same_bits(value, state[name]) for name, value in plain(PRESET).state_dict().items())
    with pytest.raises(RuntimeError, match="convert"):
        model.half()
    del state
    handle.release()
    copy.deepcopy(model)


# -- training


class Net(torch.nn.Module):
    """Layers whose norms autograd saves as they are, and weights that it saves as views."""

    def __init__(self, width: int = 64, count: int = 5) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.LayerNorm(width), torch.nn.Linear(width, width), torch.nn.Tanh()
            )
            for _ in range(count)
        )
        self.scale = torch.nn.Parameter(torch.full((width,), 1.1))

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = x + layer(x)
        return x * self.scale


def pair() -> tuple[Any, Any, Any, Any, Any]:
    torch.manual_seed(7)
    model = Net()
    twin = copy.deepcopy(model)
    x = torch.randn(3, 64)
    return (
        model,
        twin,
        torch.optim.SGD(model.parameters(), lr=0.05),
        torch.optim.SGD(twin.parameters(), lr=0.05),
        x,
    )


def step(model: Any, optimizer: Any, x: Any, between: Callable[[], None] = lambda: None) -> None:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    between()
    loss.backward()
    optimizer.step()


def assert_twins(model: Any, twin: Any) -> None:
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert same_bits(a, b), name


@pytest.mark.parametrize("target", ["cpu", "disk"])
def test_what_training_changed_stays(target: str, roomy: omnimem.Store) -> None:
    model, twin, mine, theirs, x = pair()
    handle = manage(model, roomy, "net")
    for _ in range(4):
        step(model, mine, x)
        step(twin, theirs, x)
        handle.offload(target)
        assert handle.state == {"cpu": "evictable"}.get(target, target)
        restore(handle)
        assert_twins(model, twin)
        roomy.check()
    handle.release()
    assert_twins(model, twin)


@pytest.mark.parametrize("target", ["cpu", "disk"])
def test_what_autograd_holds_stays_right_and_is_named(target: str, roomy: omnimem.Store) -> None:
    """Offloaded between forward and backward: the gradients are the same."""
    model, twin, mine, theirs, x = pair()
    handle = manage(model, roomy, "net")
    seen: list[Any] = []

    def away() -> None:
        seen.append(handle.offload(target).held)
        assert handle.state == ("disk" if target == "disk" else handle.state)

    for _ in range(3):
        step(model, mine, x, away)
        step(twin, theirs, x)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert same_bits(a.grad, b.grad)
        held = dict(seen[-1])
        assert held["layers.0.0.weight"] == 64 * 4  # a leaf that is saved as it is
        assert held["layers.0.1.weight"] == 64 * 64 * 4
        restore(handle)
        assert_twins(model, twin)
    assert handle.offload(target).held == ()
    assert all(map(is_unset, model.parameters()))
    assert_right_twin(model, twin, x)


def assert_right_twin(model: Any, twin: Any, x: Any) -> None:
    with torch.no_grad():
        assert torch.equal(bits(model(x)), bits(twin(x)))


def test_forward_backward_and_step_while_offloaded(roomy: omnimem.Store) -> None:
    model, twin, mine, theirs, x = pair()
    handle = manage(model, roomy, "net")
    for _ in range(3):
        handle.offload("disk")
        step(model, mine, x)
        step(twin, theirs, x)
        roomy.check()
    handle.offload("disk")
    assert_right_twin(model, twin, x)
    restore(handle)
    assert_twins(model, twin)


def test_what_others_hold_is_named(roomy: omnimem.Store) -> None:
    model = Net()
    before = model.layers[0][1].weight.detach()  # shares the memory that it had before
    handle = manage(model, roomy, "net")
    view = model.layers[1][1].weight.detach()
    want = view.clone()
    assert dict(handle.offload("disk").held) == {
        "layers.0.1.weight": 64 * 64 * 4,
        "layers.1.1.weight": 64 * 64 * 4,
    }
    assert torch.equal(view, want)
    del before, view
    assert handle.offload("disk").held == ()
    assert handle.host_bytes() == 0
    restore(handle)
    assert torch.equal(model.layers[1][1].weight, want)


# -- while in use


def callers(model: Any, want: Any, x: Any, stop: threading.Event, wrong: list[Any]) -> Any:
    def call() -> None:
        try:
            while not stop.is_set():
                with torch.no_grad():
                    if not torch.equal(bits(model(x)), bits(want)):
                        wrong.append("bits")
        except BaseException as error:
            wrong.append(error)

    return [threading.Thread(target=call) for _ in range(8)]


@pytest.mark.soak
@pytest.mark.parametrize("by", ["memory", "limit"])
def test_eight_threads_while_one_offloads_and_restores(by: str, open_store: Opener) -> None:
    torch.manual_seed(1)
    model, x = Net(512, 8), torch.randn(2, 512)
    nbytes = sum(p.nbytes for p in model.parameters())
    store = open_store(
        host_limit="64MiB" if by == "memory" else nbytes + 3 * MIB, disk_limit="64MiB"
    )
    with torch.no_grad():
        want = model(x)
    handle = manage(model, store, "net", timeout=60.0)
    stop, wrong = threading.Event(), []
    threads = callers(model, want, x, stop, wrong)
    rng = random.Random(5)
    for thread in threads:
        thread.start()
    until = time.monotonic() + (60 if SOAK else 3)
    moves = 0
    try:
        while time.monotonic() < until and not wrong:
            match rng.randrange(5):
                case 0:
                    handle.offload("cpu")
                case 1:
                    handle.offload("disk")
                case 2:
                    restore(handle, timeout=60.0)
                case 3:
                    restore(handle, nbytes * 7 // 10, timeout=60.0)
                case _:
                    handle.resize(nbytes * rng.choice((6, 8, 10)) // 10)
            assert handle.in_use in (True, False)
            moves += 1
            store.check()
            time.sleep(rng.random() * 0.02)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert wrong == []
    assert moves > 5
    assert not handle.in_use
    handle.offload("disk")
    assert handle.host_bytes() == 0
    restore(handle)
    with torch.no_grad():
        assert torch.equal(bits(model(x)), bits(want))


def test_use_is_told(roomy: omnimem.Store) -> None:
    model, handle = model_of(PRESET, "memory", roomy)
    told: list[Any] = []
    inside: list[bool] = []
    layers(model)[0].register_forward_hook(lambda *_: inside.append(handle.in_use))

    def on_use(movable: Any) -> None:
        told.append(movable)
        assert is_unset(next(iter(layers(model)[0].parameters())))  # before any unit is entered
        restore(movable)

    handle.on_use = on_use
    handle.offload("disk")
    assert same_bits(forward(model, PRESET), expected_logits(PRESET))
    assert told == [handle]
    assert handle.state == "resident"
    assert inside == [True]
    assert not handle.in_use
    handle.on_use = told.append
    layer = layers(model)[0]
    layer.mlp(torch.zeros(1, 1, plain(PRESET).config.hidden_size, dtype=torch.bfloat16))
    assert len(told) == 1  # a part of a unit tells nobody
    model.get_input_embeddings()(torch.tensor([[1]]))
    assert len(told) == 2  # a unit outside any pass
    forward(model, PRESET)
    assert len(told) == 3


def test_hooks_of_the_user_stay(roomy: omnimem.Store) -> None:
    model = fresh(PRESET)
    seen: list[bool] = []
    layer = layers(model)[1]
    want = layers(plain(PRESET))[1].mlp.up_proj.weight

    def look(*_: Any) -> None:
        seen.append(same_bits(layer.mlp.up_proj.weight, want))

    layer.register_forward_pre_hook(look)
    layer.register_forward_hook(look)
    handle = manage(model, roomy, "hooks")
    layer.register_forward_hook(look)
    handle.offload("disk")
    forward(model, PRESET)
    assert seen == [True] * 3
    handle.release()
    forward(model, PRESET)
    assert seen == [True] * 6


# -- faults


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 3 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    place = tmp_path_factory.mktemp("small")
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_leaves_the_model_as_it_was(open_store: Opener, small_disk: Path) -> None:
    store = open_store(host_limit="64MiB", disk_limit="64MiB", directory=small_disk)
    torch.manual_seed(2)
    model, x = Net(512, 8), torch.randn(2, 512)
    with torch.no_grad():
        want = model(x)
    handle = manage(model, store, "net")
    for state in ("resident", "evictable"):
        with pytest.raises(OSError, match=r"model:net/layers") as caught:
            handle.offload("disk")
        assert caught.value.filename is None or str(small_disk) in str(caught.value.filename)
        assert handle.state == state
        store.check()
        with torch.no_grad():
            assert torch.equal(bits(model(x)), bits(want))
        handle.offload("cpu")
    restore(handle)
    assert handle.missing_bytes() == 0
    handle.close()


def test_a_checkpoint_that_was_replaced(roomy: omnimem.Store, tmp_path: Path) -> None:
    where = Path(shutil.copytree(folder(PRESET), tmp_path / "model"))
    model = fresh(PRESET)
    handle = manage(model, roomy, "replaced", model_dir=where)
    handle.offload("disk")
    shard = next(iter(sorted(where.glob("*.safetensors"))))
    aside = tmp_path / "aside"
    shard.rename(aside)
    shutil.copy(aside, shard)
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    aside_bytes = aside.read_bytes()
    with aside.open("r+b") as file:  # the file that is open, too
        file.truncate(len(aside_bytes) // 2)
    with pytest.raises(omnimem.Error, match=shard.name):
        restore(handle)
    assert handle.state == "disk"
    with pytest.raises(omnimem.Error, match=shard.name):
        forward(model, PRESET)
    assert not handle.in_use
    roomy.check()
    times = folder(PRESET).joinpath(shard.name).stat()
    aside.write_bytes(aside_bytes)
    os.utime(aside, ns=(times.st_atime_ns, times.st_mtime_ns))
    aside.rename(shard)
    assert_right(model, PRESET)
    restore(handle)
    assert handle.state == "resident"
    assert_right(model, PRESET)


@pytest.mark.parametrize("point", ["alloc", "map", "read", "write", "nospc"])
@pytest.mark.parametrize("move", ["manage", "offload", "restore", "resize"])
def test_a_failure_leaves_the_model_as_it_was(point: str, move: str, open_store: Opener) -> None:
    failed = 0
    for nth in range(1, 200 if SOAK else 12):
        store = open_store(host_limit="64MiB", disk_limit="64MiB")
        model, twin, _, _, x = pair()
        handle = None if move == "manage" else manage(model, store, "net")
        if move == "restore":
            handle.offload("disk")
        _core._fault_arm(point, nth, point in ("write", "nospc"))
        error = None
        try:
            if handle is None:
                handle = manage(model, store, "net")
            elif move == "offload":
                handle.offload("disk")
            elif move == "restore":
                restore(handle)
            else:
                handle.resize(handle.nbytes * 8 // 10)
                with torch.no_grad():
                    model(x)
        except (omnimem.Error, MemoryError, OSError) as caught:
            error = caught
            failed += 1
        fired = _core._fault_fired(point)
        _core._fault_reset()
        if handle is not None and error is not None:
            assert handle.state == {"offload": "resident", "restore": "disk"}.get(
                move, handle.state
            )
        elif error is not None:
            assert not hasattr(model, "omnimem")
            assert not any(m._forward_hooks for m in model.modules())
            assert store.names() == []
        assert_right_twin(model, twin, x)
        store.check()
        if handle is not None:
            restore(handle)
            assert_twins(model, twin)
            handle.close()
        store.close()
        if not fired:
            break
    if (point, move) in {("alloc", "manage"), ("nospc", "offload"), ("read", "restore")}:
        assert failed


STOPPED = """
import signal, sys, threading, time, torch
import omnimem
from omnimem._managed import manage
sys.path.insert(0, sys.argv[2])
torch.manual_seed(1)
model = torch.nn.Sequential(*(torch.nn.Linear(700, 700) for _ in range(8)))
x = torch.randn(2, 700)
with torch.no_grad():
    want = model(x)
store = omnimem.Store(omnimem.StoreConfig(host_limit="64MiB", disk_limit="64MiB",
                                          directory=sys.argv[1]))
handle = manage(model, store, "net")
def back():
    handle.resize(handle.nbytes)
    handle.fetch()
main = threading.main_thread().ident
done = threading.Event()
armed, hits = [False], [0]

def handler(*_):
    if armed[0]:
        armed[0] = False
        hits[0] += 1
        raise KeyboardInterrupt

def interrupt():
    while not done.wait(0.0007):
        signal.pthread_kill(main, signal.SIGINT)

signal.signal(signal.SIGINT, handler)
thread = threading.Thread(target=interrupt)
thread.start()
until = time.monotonic() + 4
moves = [lambda: handle.offload("disk"), back, lambda: handle.offload("cpu"),
         lambda: handle.resize(handle.nbytes * 7 // 10), lambda: model(x)]
i = 0
while time.monotonic() < until:
    try:
        armed[0] = True
        i += 1
        with torch.no_grad():
            moves[i % 5]()
    except KeyboardInterrupt:
        pass
    armed[0] = False
done.set()
thread.join()
store.check()
with torch.no_grad():
    assert torch.equal(model(x), want)
assert not handle.in_use
handle.offload("disk")
assert handle.host_bytes() == 0, handle.host_bytes()
back()
with torch.no_grad():
    assert torch.equal(model(x), want)
handle.release()
store.check()
assert hits[0] > 10, hits
print("right")
"""


def test_ctrl_c_at_any_moment(tmp_path: Path) -> None:
    done = run_python(STOPPED, str(tmp_path), str(Path(__file__).parent))
    assert done.stdout == "right\n", done


LEFT = """
import os, sys, torch
import omnimem
from omnimem._managed import manage
model = torch.nn.Sequential(*(torch.nn.Linear(100, 100) for _ in range(4)))
x = torch.randn(2, 100)
store = omnimem.Store(omnimem.StoreConfig(host_limit="16MiB", disk_limit="16MiB",
                                          directory=sys.argv[1]))
handle = manage(model, store, "net")
with torch.no_grad():
    want = model(x)
    handle.offload(sys.argv[2])
    pid = os.fork()
    if not pid:
        try:
            model(x)
        except omnimem.ClosedError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert torch.equal(model(x), want)
    handle.offload(sys.argv[2])
    for _ in range(2):
        if os.fork() == 0:
            sys.exit(0)  # with all that runs at exit
        os.wait()
    assert torch.equal(model(x), want)
    handle.offload(sys.argv[2])
print("right")
"""


def test_fork_and_exit_while_offloaded(tmp_path: Path) -> None:
    done = run_python(LEFT, str(tmp_path), "disk")
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")


def test_a_model_that_is_dropped_takes_everything_along(roomy: omnimem.Store) -> None:
    model = Net()
    handle = manage(model, roomy, "net")
    gone = weakref.ref(model)
    handle.close()
    assert all(map(is_unset, model.parameters()))
    handle.close()
    handle.release()
    del handle, model
    gc.collect()
    assert gone() is None
    assert roomy.names() == []
    assert roomy.stats().host.used_bytes == 0


def test_the_store_is_closed_first(open_store: Opener) -> None:
    store = open_store()
    torch.manual_seed(1)
    model, x = Net(), torch.randn(2, 64)
    with torch.no_grad():
        want = model(x)
    handle = manage(model, store, "net")
    store.close()
    with pytest.raises(omnimem.ClosedError):
        model(x)
    handle.close()
    assert want is not None


def test_imports_nothing_that_is_not_needed() -> None:
    code = "import sys, omnimem._managed; assert 'torch' not in sys.modules"
    assert run_python(code).returncode == 0
