"""Several real models under one budget: right answers, within the bytes, and who gives way."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import omnimem
from omnimem import AdvancedMemoryConfig, AdvancedMemoryManager

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from .torch_models import (  # noqa: E402
    PRESETS,
    assert_right,
    expected_logits,
    folder,
    forward,
    fresh,
    on_meta,
    same_bits,
    weight_bytes,
)

MIB = 1 << 20
ALL = sum(weight_bytes(preset) for preset in PRESETS)


@pytest.fixture
def open_manager(
    tmp_path: Path, io_backend: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., AdvancedMemoryManager]]:
    """Opens managers that may have a share of the bytes of the three models."""
    monkeypatch.setenv("OMNIMEM_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("OMNIMEM_DISK_LIMIT", "64MiB")
    monkeypatch.setenv("OMNIMEM_IO_BACKEND", io_backend)
    managers = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def open_one(percent: int, **fields: Any) -> AdvancedMemoryManager:
        fields = {"budget": ALL * percent // 100, "enable_weight_cache": False} | fields
        managers.append(AdvancedMemoryManager(AdvancedMemoryConfig(**fields)))
        return managers[-1]

    yield open_one
    torch.set_num_threads(threads)
    for manager in managers:
        try:
            manager.store.check()
        except omnimem.ClosedError:
            pass
        finally:
            manager.cleanup()


def host_bytes(model: Any) -> int:
    return model.omnimem.plan().host_bytes  # type: ignore[no-any-return]


def test_models_that_alternate(open_manager: Callable[..., AdvancedMemoryManager]) -> None:
    manager = open_manager(60)
    budget = manager.store.config.host_limit
    models = {preset: manager.attach(fresh(preset), folder(preset), preset) for preset in PRESETS}
    for _ in range(3):
        for preset, model in models.items():
            assert_right(model, preset, count=2)
            assert host_bytes(model) >= weight_bytes(preset)  # it has the memory
            assert manager.store.stats().host.used_bytes <= budget
    assert manager.store.stats().host.peak_bytes <= budget
    assert manager.store.stats().disk.used_bytes == 0  # they have their checkpoints
    told = {(each.action, each.model_id) for each in manager.offloader.decisions}
    assert {("offload", preset) for preset in PRESETS} <= told
    manager.store.check()


@pytest.mark.slow
def test_who_is_expected_last_gives(open_manager: Callable[..., AdvancedMemoryManager]) -> None:
    """Not who was used longest ago: that is the one that will be used first again."""
    user, often, seldom = PRESETS
    manager = open_manager(69, enable_auto_offload=False)
    models = {preset: manager.attach(fresh(preset), folder(preset), preset) for preset in PRESETS}
    forward(models[seldom], seldom)
    for _ in range(4):
        forward(models[often], often)
        time.sleep(0.8)
    forward(models[often], often)
    forward(models[seldom], seldom)
    use = {name: manager.store.usage(f"model:{name}") for name in (often, seldom)}
    assert use[often].last < use[seldom].last
    assert use[often].next < use[seldom].next
    before = {name: host_bytes(models[name]) for name in (often, seldom)}
    assert same_bits(forward(models[user], user), expected_logits(user))
    assert host_bytes(models[often]) == before[often]
    assert host_bytes(models[seldom]) < before[seldom]


def test_models_used_at_once_share(open_manager: Callable[..., AdvancedMemoryManager]) -> None:
    """All of them at a time, in a budget of two of three."""
    manager = open_manager(75, enable_auto_offload=False)
    models = {preset: manager.attach(fresh(preset), folder(preset), preset) for preset in PRESETS}
    for preset in PRESETS:
        expected_logits(preset)
    failures: list[BaseException] = []

    def work(preset: str) -> None:
        try:
            for _ in range(10):
                assert same_bits(forward(models[preset], preset), expected_logits(preset))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(preset,)) for preset in PRESETS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert failures == []
    assert manager.store.stats().host.peak_bytes <= manager.store.config.host_limit
    manager.store.check()


@pytest.mark.parametrize("make", [fresh, on_meta])
def test_a_model_larger_than_the_budget_streams(
    open_manager: Callable[..., AdvancedMemoryManager], make: Callable[[str], Any]
) -> None:
    budget = weight_bytes("tiny-qwen3") * 70 // 100
    manager = open_manager(0, budget=budget)
    model = manager.attach(make("tiny-qwen3"), folder("tiny-qwen3"), "large")
    assert_right(model, "tiny-qwen3", count=2)
    assert model.omnimem.plan().state == "streams"
    assert manager.store.stats().host.peak_bytes <= budget
    assert "stream" in {each.action for each in manager.offloader.decisions}


def test_a_room_of_its_own(open_manager: Callable[..., AdvancedMemoryManager]) -> None:
    manager = open_manager(100)
    room = weight_bytes("tiny-qwen3") * 70 // 100
    model = manager.attach(fresh("tiny-qwen3"), folder("tiny-qwen3"), room=room)
    assert_right(model, "tiny-qwen3", count=2)
    assert model.omnimem.plan().room_bytes == room
    assert host_bytes(model) <= room + 64 * 4096


# ---- handles ----


def test_the_handle(open_manager: Callable[..., AdvancedMemoryManager]) -> None:
    manager = open_manager(100)
    model = fresh("tiny-qwen3")
    params = dict(model.named_parameters())
    assert manager.attach(model, folder("tiny-qwen3"), "a") is model
    assert dict(model.named_parameters()).keys() == params.keys()
    assert all(param is params[name] for name, param in model.named_parameters())
    assert_right(model, "tiny-qwen3", count=2)
    plan, stats = model.omnimem.plan(), model.omnimem.stats()
    assert plan.weight_bytes == weight_bytes("tiny-qwen3")
    assert plan.state == "resident"
    assert plan.room_bytes == plan.weight_bytes
    assert stats["uses"] >= 2
    assert stats["last_use"] > 0
    assert stats["host_bytes"] == plan.host_bytes
    assert "'a'" in repr(model.omnimem)
    for refused in (copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match=r"detach|release"):
            refused(model)
    with pytest.raises(ValueError, match="'a'"):
        manager.attach(model)
    handle = model.omnimem
    assert handle.detach() is model
    assert not hasattr(model, "omnimem")
    assert handle.detach() is model
    handle.close()
    manager.cleanup()
    assert_right(model, "tiny-qwen3", count=2)
    assert all(param is params[name] for name, param in model.named_parameters())


def test_a_model_that_is_thrown_away(open_manager: Callable[..., AdvancedMemoryManager]) -> None:
    manager = open_manager(100)
    model = manager.attach(fresh("tiny-qwen3"), folder("tiny-qwen3"), "a")
    forward(model, "tiny-qwen3")
    model.omnimem.close()
    assert manager.store.names() == []
    assert manager.store.stats().host.used_bytes == 0
    with pytest.raises(KeyError):
        manager.offload_model("a")
    manager.attach(fresh("tiny-qwen3"), folder("tiny-qwen3"), "a")


# ---- offloading ----


def test_offload_and_restore(open_manager: Callable[..., AdvancedMemoryManager]) -> None:
    manager = open_manager(100)
    model = manager.attach(fresh("tiny-qwen3"), folder("tiny-qwen3"), "a")
    forward(model, "tiny-qwen3")
    gone = manager.offload_model(model, "a", "disk")
    assert gone.action == "offload"
    assert gone.nbytes >= weight_bytes("tiny-qwen3")
    assert gone.held == ()
    assert host_bytes(model) == 0
    assert manager.store.stats().written_bytes == 0
    back = manager.restore_model(model, "a")
    assert (back.action, back.nbytes) == ("restore", weight_bytes("tiny-qwen3"))
    assert not manager.restore_model("a")
    manager.offload_model("a", target_device="disk")
    assert_right(model, "tiny-qwen3", count=2)  # it comes back by itself
    assert host_bytes(model) >= weight_bytes("tiny-qwen3")


def test_weights_without_a_checkpoint(open_manager: Callable[..., AdvancedMemoryManager]) -> None:
    """They are written when they have to go, and given back at the end."""
    manager = open_manager(60)
    models = {preset: manager.attach(fresh(preset), None, preset) for preset in PRESETS[:2]}
    for _ in range(2):
        for preset, model in models.items():
            assert same_bits(forward(model, preset), expected_logits(preset))
            decision = manager.offload_model(model, preset, "disk")
            assert decision.nbytes >= weight_bytes(preset)
    assert manager.store.stats().written_bytes >= sum(map(weight_bytes, PRESETS[:2]))
    manager.cleanup()
    for preset, model in models.items():
        assert not hasattr(model, "omnimem")
        assert same_bits(forward(model, preset), expected_logits(preset))


def test_let_go_while_another_has_the_budget(
    open_manager: Callable[..., AdvancedMemoryManager],
) -> None:
    """What a model needs to be given back is made room for by the one that keeps its own."""
    x = torch.ones(1, 512)
    layers = [[torch.nn.Linear(512, 512, bias=False) for _ in range(8)] for _ in range(2)]
    models = [torch.nn.Sequential(*each).eval().requires_grad_(False) for each in layers]
    wants = [model(x) for model in models]
    manager = open_manager(0, budget=8 * MIB + MIB // 2)
    for number, model in enumerate(models):
        manager.attach(model, model_id=str(number))
    manager.offload_model("1", target_device="disk")
    assert torch.equal(models[0](x), wants[0])
    assert host_bytes(models[0]) == 8 * MIB
    manager.offloader.unregister("1")
    assert torch.equal(models[1](x), wants[1])
    assert torch.equal(models[0](x), wants[0])


def test_a_checkpoint_that_was_replaced(
    open_manager: Callable[..., AdvancedMemoryManager], tmp_path: Path
) -> None:
    place = tmp_path / "a model"
    place.mkdir()
    for file in folder("tiny-qwen3").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    manager = open_manager(100)
    model = manager.attach(fresh("tiny-qwen3"), place, "a")
    forward(model, "tiny-qwen3")
    manager.offload_model(model, "a", "disk")
    for weights in place.glob("*.safetensors"):
        weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises((omnimem.CorruptError, omnimem.IOFailure), match="safetensors"):
        manager.restore_model(model, "a")
    assert "a" in repr(model.omnimem)


def test_a_mapping(open_manager: Callable[..., AdvancedMemoryManager]) -> None:
    manager = open_manager(0, budget="16MiB")
    weights = {"w": torch.arange(MIB, dtype=torch.float32)}
    want = weights["w"].clone()
    assert manager.attach(weights, model_id="m") is weights
    gone = manager.offload_model(weights, "m", "disk")
    assert gone.action == "offload"
    assert torch.equal(torch.from_dlpack(weights["w"]), want)
    manager.restore_model(weights, "m")
    assert torch.equal(weights["w"], want)
    manager.cleanup()
    assert torch.equal(weights["w"], want)


def test_under_pressure_it_acts_by_itself(
    open_manager: Callable[..., AdvancedMemoryManager],
) -> None:
    """Any memory in use is too much here."""
    manager = open_manager(
        100, offload_threshold=2e-5, restore_threshold=1e-5, monitoring_interval=0.02
    )
    model = manager.attach(fresh("tiny-qwen3"), folder("tiny-qwen3"), "a")
    end = time.monotonic() + 30
    while not any(each.action == "offload" for each in manager.offloader.decisions):
        assert same_bits(forward(model, "tiny-qwen3"), expected_logits("tiny-qwen3"))
        assert time.monotonic() < end, list(manager.offloader.decisions)
    assert "offload_threshold" in manager.check_offload_needed("b").reason
    assert same_bits(forward(model, "tiny-qwen3"), expected_logits("tiny-qwen3"))
