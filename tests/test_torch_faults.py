"""The torch face when things go wrong: bad checkpoints, failed reads, exceptions, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnimem import _core

from .conftest import SOAK, run_python
from .torch_models import (
    SMALL_HEAD,
    assert_idle,
    assert_right,
    budget,
    floor,
    folder,
    forward,
    fresh,
    generate,
    half,
    is_unset,
    layers,
    omnimem,
    on_meta,
    our_threads,
    plain,
    root,
    same_bits,
    streamed,
    torch,
)

load, attach = omnimem.torch.load, omnimem.torch.attach
PRESET = "tiny-qwen3"


@pytest.fixture
def own_folder(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint that a test may spoil."""

    def make(preset: str = PRESET) -> Path:
        return Path(shutil.copytree(folder(preset), tmp_path / "model"))

    return make


def state(model: Any) -> dict[str, tuple[int, int, Any]]:
    return {
        name: (id(param), param.data_ptr(), param.detach().clone())
        for name, param in model.named_parameters()
    }


def assert_untouched(model: Any, before: dict[str, tuple[int, int, Any]]) -> None:
    now = state(model)
    assert now.keys() == before.keys()
    for name, (identity, place, value) in now.items():
        assert (identity, place) == before[name][:2]
        assert same_bits(value, before[name][2])
    assert not hasattr(model, "omnimem")
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any("_apply" in module.__dict__ for module in model.modules())
    assert our_threads() == []


# -- refused before anything changes


def rewrite(where: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of the shard that holds the first layers, its data left as it is."""
    path = where / "model-00001-of-00003.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    index = where / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    held = set(header)
    listed["weight_map"] = {
        name: file
        for name, file in listed["weight_map"].items()
        if file != path.name or name in held
    } | dict.fromkeys(held - {"__metadata__"}, path.name)
    index.write_text(json.dumps(listed))


WRONG = "model.layers.0.mlp.up_proj.weight"


def _missing(header: dict[str, Any]) -> None:
    header["model.layers.0.mlp.another.weight"] = header.pop(WRONG)


def _other_shape(header: dict[str, Any]) -> None:
    header[WRONG]["shape"].reverse()


def _other_dtype(header: dict[str, Any]) -> None:
    header[WRONG]["dtype"] = "F16"


def _experts(header: dict[str, Any]) -> None:
    header["model.layers.0.mlp.experts.0.up_proj.weight"] = header.pop(WRONG)


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], None], type[Exception], str]] = {
    "missing tensor": (_missing, omnimem.FormatError, WRONG),
    "wrong shape": (_other_shape, omnimem.FormatError, WRONG),
    "another dtype": (_other_dtype, ValueError, "float16.*cast"),
    "experts": (_experts, ValueError, "mixture of experts"),
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("by", ["load", "attach"])
def test_a_checkpoint_that_does_not_fit(by: str, how: str, own_folder: Any) -> None:
    change, error, text = SPOILT[how]
    where = own_folder()
    rewrite(where, change)
    if by == "load":
        with pytest.raises(error, match=text):
            half(PRESET, where)
        assert our_threads() == []
        return
    model = fresh(PRESET)
    before = state(model)
    with pytest.raises(error, match=text):
        attach(model, where, budget(PRESET, 50))
    assert_untouched(model, before)
    assert_right(model, PRESET, 2)


@pytest.mark.parametrize("preset", ["tiny", PRESET, "tiny-llama", SMALL_HEAD])
def test_a_budget_below_the_floor(preset: str) -> None:
    least = floor(preset)
    model = fresh(preset)
    before = state(model)
    for nbytes in (1, least // 2, least - 1):
        for refused in (
            lambda nbytes=nbytes: load(folder(preset), nbytes),
            lambda nbytes=nbytes: attach(model, folder(preset), nbytes),
        ):
            with pytest.raises(omnimem.LimitError, match=f"least, {least} bytes") as caught:
                refused()
            assert (caught.value.need, caught.value.limit) == (least, nbytes)
    assert_untouched(model, before)


def test_a_missing_shard(own_folder: Any) -> None:
    where = own_folder()
    (where / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises((omnimem.FormatError, OSError), match="model-00002-of-00003"):
        half(PRESET, where)
    model = fresh(PRESET)
    before = state(model)
    with pytest.raises((omnimem.FormatError, OSError), match="model-00002-of-00003"):
        attach(model, where, budget(PRESET, 50))
    assert_untouched(model, before)


def test_a_dtype_change() -> None:
    for dtype in (torch.float16, "float32"):
        with pytest.raises(ValueError, match=r"cast.*bfloat16"):
            half(PRESET, dtype=dtype)
    for dtype in (torch.bfloat16, "bfloat16", "auto", None):
        half(PRESET, dtype=dtype).omnimem.close()
    model = fresh(PRESET).to(torch.float32)
    before = state(model)
    with pytest.raises(ValueError, match=r"float32.*cast"):
        attach(model, folder(PRESET), budget(PRESET, 50))
    assert_untouched(model, before)


def test_an_unset_buffer() -> None:
    with torch.device("meta"):
        model = type(plain(PRESET))(plain(PRESET).config).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"buffer .*inv_freq.* meta"):
        attach(model, folder(PRESET), budget(PRESET, 50))
    assert all(param.is_meta for param in model.parameters())


@pytest.mark.parametrize("point", ["read", "map", "thread"])
def test_a_failure_while_attaching(point: str, io_backend: str) -> None:
    """Whichever operation fails, the model keeps its weights."""
    model = fresh(PRESET)
    before = state(model)
    failed = 0
    for nth in (1, 2, 3, 5, 9):
        _core._fault_arm(point, nth, True)
        try:
            attach(model, folder(PRESET), budget(PRESET, 50), io_backend=io_backend)
        except (omnimem.Error, OSError, MemoryError):
            failed += 1
            _core._fault_reset()
            assert_untouched(model, before)
        else:
            _core._fault_reset()
            model.omnimem.detach()
            break
    assert failed
    assert_right(model, PRESET, 2)


def test_a_failure_while_attaching_on_meta() -> None:
    model = on_meta(PRESET)
    before = {name: id(param) for name, param in model.named_parameters()}

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no hook")

    model.register_forward_pre_hook = fail
    with pytest.raises(RuntimeError, match="no hook"):
        attach(model, folder(PRESET), budget(PRESET, 50))
    assert all(param.is_meta for param in model.parameters())
    del model.register_forward_pre_hook
    attach(model, folder(PRESET), budget(PRESET, 50))
    assert {name: id(param) for name, param in model.named_parameters()} == before
    assert_right(model, PRESET, 2)
    model.omnimem.close()


# -- a file that changes under a running model


def streamed_file(model: Any) -> Path:
    """A file that holds a streamed tensor of a layer."""
    for unit in model.omnimem.plan().units:
        for run in unit.runs:
            if not run.resident and ".layers." in unit.name:
                return Path(run.tensors[0].file)
    raise AssertionError("nothing streams")


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _overwrite(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def _replace(path: Path) -> None:
    shutil.copyfile(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def _touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [_truncate, _overwrite, _touch])
def test_a_file_that_changes(change: Any, own_folder: Any, io_backend: str) -> None:
    where = own_folder()
    model = half(PRESET, where, io_backend=io_backend)
    assert_right(model, PRESET, 2)
    path = streamed_file(model)
    change(path)
    for _ in range(2):
        with pytest.raises(omnimem.CorruptError, match=path.name):
            generate(model, PRESET, 2)
    store = model.omnimem._store
    others = {
        name
        for name in store.names()
        if store.info(name).origin and Path(store.info(name).origin) != path
    }
    assert others
    for name in others:  # the rest of the model is as good as before
        store.lease(name).release()
    with pytest.raises(omnimem.CorruptError, match=path.name):
        model.omnimem.detach()
    assert model.omnimem is not None  # it streams on
    store.check()
    model.omnimem.close()
    assert our_threads() == []


def test_a_file_that_is_replaced_or_gone_is_read_to_the_end(own_folder: Any) -> None:
    """The open file is what is read: a new one of that name is another file."""
    where = own_folder()
    model = half(PRESET, where)
    path = streamed_file(model)
    _replace(path)
    try:
        assert_right(model, PRESET, 2)
    except omnimem.CorruptError as error:
        assert path.name in str(error)  # noqa: PT017 - both answers are honest
    model.omnimem.close()


# -- failed reads


def test_a_failed_read(io_backend: str) -> None:
    model = half(PRESET, io_backend=io_backend)
    assert_right(model, PRESET, 2)
    for after in (1, 2, 7, 20):
        _core._fault_arm("read", after, True)
        with pytest.raises(omnimem.IOFailure) as caught:
            generate(model, PRESET, 6)
        _core._fault_reset()
        assert caught.value.errno == 5
        assert ".layers." in str(caught.value)
        assert "model-0000" in str(caught.value)
        assert Path(caught.value.filename).parent == folder(PRESET)
        assert_idle(model)
        assert_right(model, PRESET, 2)
    model.omnimem.close()


def test_a_single_failed_read_hurts_no_more_than_its_pass(io_backend: str) -> None:
    """What was fetched ahead and failed is fetched again when its turn comes, or told."""
    model = half(PRESET, io_backend=io_backend)
    for nth in range(1, 30, 3):
        _core._fault_arm("read", nth)
        try:
            assert_right(model, PRESET, 3)
        except omnimem.IOFailure:
            assert_idle(model)
        _core._fault_reset()
    assert_right(model, PRESET, 3)
    model.omnimem.close()


@pytest.mark.parametrize("point", ["short", "submit", "alloc", "map", "flip"])
def test_other_faults(point: str, io_backend: str) -> None:
    """An error or the right answer, never a wrong one."""
    model = half(PRESET, io_backend=io_backend)
    assert_right(model, PRESET, 2)
    for nth in (1, 2, 4, 9, 17, 40):
        _core._fault_arm(point, nth)
        with contextlib.suppress(omnimem.Error, MemoryError, OSError):
            assert_right(model, PRESET, 2)
        _core._fault_reset()
        assert_idle(model)
    assert_right(model, PRESET, 2)
    model.omnimem.close()


# -- exceptions in the middle


class Boom(Exception):
    """Raised by a hook of the user."""


def raises_once(error: BaseException) -> Callable[..., None]:
    left = [error]

    def hook(*_: Any) -> None:
        if left:
            raise left.pop()

    return hook


def places(model: Any) -> list[Any]:
    """Modules where a user's hook raises: streamed and resident layers, their parts, the head."""
    inner = layers(model)
    return [inner[0], inner[3].mlp.act_fn, inner[7].self_attn, model.model.norm, model.lm_head]


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("hook", ["before", "after"])
def test_a_hook_that_raises(hook: str, error: type[BaseException], io_backend: str) -> None:
    model = load(folder(PRESET), floor(PRESET), io_backend=io_backend, timeout=5)
    for module in places(model):
        register = {
            "before": module.register_forward_pre_hook,
            "after": module.register_forward_hook,
        }[hook]
        handle = register(raises_once(error("here")))
        with pytest.raises(error, match="here"):
            generate(model, PRESET, 2)
        if error is Boom:
            assert_idle(model)
        assert_right(model, PRESET, 2)
        assert_idle(model)
        handle.remove()
    assert_right(model, PRESET, 2)
    model.omnimem.close()


def test_an_exception_inside_forward() -> None:
    model = load(folder(PRESET), floor(PRESET), timeout=5)
    module = layers(model)[2].mlp.act_fn
    original = module.forward
    module.forward = raises_once(Boom("inside"))
    with pytest.raises(Boom):
        forward(model, PRESET)
    assert_idle(model)
    module.forward = original
    assert_right(model, PRESET)
    model.omnimem.close()


def test_detach_and_close_after_an_interrupt() -> None:
    for way in ("detach", "close"):
        model = load(folder(PRESET), floor(PRESET), timeout=5)
        handle = layers(model)[3].mlp.register_forward_hook(raises_once(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            generate(model, PRESET, 2)
        handle.remove()
        getattr(model.omnimem, way)()
        assert our_threads() == []
        if way == "detach":
            assert_right(model, PRESET, 2)
        else:
            assert all(is_unset(param) for param in model.parameters())


def test_a_signal_in_a_hook() -> None:
    model = load(folder(PRESET), floor(PRESET), timeout=5)
    for module in places(model):
        handle = module.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            generate(model, PRESET, 2)
        handle.remove()
        # Reclaimed before anything else of the next pass: the embedding itself is resident.
        first = model.model.embed_tokens.register_forward_pre_hook(lambda *_: assert_idle(model))
        forward(model, PRESET)
        first.remove()
        assert_right(model, PRESET, 2)
        assert_idle(model)
    model.omnimem.close()


FACE = {str(path) for path in Path(omnimem.torch.__file__).parent.glob("*torch*.py")}


def interrupt_at(nth: int, use: Callable[[], object]) -> bool:
    """Run with KeyboardInterrupt before the nth bytecode of the torch face; did it get there?"""
    count = 0

    def trace(frame: types.FrameType, event: str, arg: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in FACE:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == nth:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        use()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.soak
def test_ctrl_c_at_any_bytecode() -> None:
    """Wherever a signal strikes within our hooks, the next pass is right at once."""
    preset = SMALL_HEAD
    model = load(folder(preset), floor(preset), timeout=1)
    ids = torch.tensor([[1, 2, 3]])

    def use() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    with torch.no_grad():
        want = plain(preset)(input_ids=ids, use_cache=False).logits
    use()
    last, step = (100_000, 1) if SOAK else (1200, 11)
    nth = 1
    while nth < last and interrupt_at(nth, use):
        assert same_bits(use(), want), nth
        assert_idle(model)
        nth += step
    assert nth > 1000
    assert model.omnimem._store.stats().host.peak_bytes <= floor(preset)
    model.omnimem.close()


def test_ctrl_c_while_detaching() -> None:
    preset = SMALL_HEAD
    model = load(folder(preset), floor(preset), timeout=1)
    nth = 1
    while interrupt_at(nth, model.omnimem.detach):
        if not hasattr(model, "omnimem"):
            break
        nth += 997
    if hasattr(model, "omnimem"):
        model.omnimem.detach()
    assert nth > 300
    assert_right(model, preset, 2)


def test_another_thread_goes_on_after_an_interrupt() -> None:
    """The thread that was interrupted may never call again; others still get through."""
    import threading

    model = load(folder(PRESET), floor(PRESET), timeout=5)
    handle = layers(model)[3].mlp.register_forward_hook(raises_once(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        generate(model, PRESET, 2)
    handle.remove()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            assert_right(model, PRESET, 2)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert errors == []
    assert_right(model, PRESET, 2)
    assert_idle(model)
    model.omnimem.close()


def test_threads_that_die_leave_nothing_loaded() -> None:
    """SystemExit ends a thread within a layer: the next pass of any thread cleans up."""
    import threading

    model = load(folder(PRESET), floor(PRESET), timeout=1)

    def work() -> None:
        with pytest.raises(SystemExit):
            generate(model, PRESET, 2)

    for layer in (2, 5, 6):
        handle = layers(model)[layer].mlp.register_forward_hook(raises_once(SystemExit()))
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(30)
        handle.remove()
        assert_right(model, PRESET, 2)
        assert_idle(model)
    model.omnimem.close()


SLOW_DISK = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
import omnimem, omnimem.torch

where, budget, backend = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
model = omnimem.torch.load(where, budget, io_backend=backend)
ids = torch.arange(20, 30)[None]

def use():
    with torch.no_grad():
        return model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)

want = use()
stream = model.omnimem._units.stream

class Slow:
    # The units that come wait for something that never does: a thread that is binding them.
    def __getattr__(self, name):
        return getattr(stream, name)

names = [unit.name for unit in model.omnimem.plan().units]
unit = names.index("model.layers.3")
entered, go_on = threading.Event(), threading.Event()

def hold():
    held = []
    stream.enter(unit, held)
    entered.set()
    go_on.wait()
    stream.bound(unit, False)

thread = threading.Thread(target=hold)
thread.start()
entered.wait()
sent = []

def interrupt():
    time.sleep(0.4)
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
try:
    use()
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - sent[0] < 1)
go_on.set()
thread.join()
print("right", torch.equal(use(), want))
model.omnimem.close()
names = [Path(f"/proc/self/task/{t}/comm").read_text() for t in os.listdir("/proc/self/task")]
print("threads", sum(name.startswith("omnimem") for name in names))
"""


def test_ctrl_c_while_waiting(io_backend: str) -> None:
    done = run_python(SLOW_DISK, str(folder(PRESET)), str(floor(PRESET)), io_backend)
    assert done.returncode == 0, done
    assert done.stdout.split() == ["interrupted", "True", "right", "True", "threads", "0"], done


def test_streamed_parts_are_known() -> None:
    """What the tests above rely on: at the floor every layer streams."""
    assert root().is_dir()
    model = load(folder(PRESET), floor(PRESET))
    found = {name.split(".")[2] for name, _ in streamed(model) if ".layers." in name}
    assert found == set("01234567")
    model.omnimem.close()
