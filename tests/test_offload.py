"""The offloader: what it is asked, what it does by itself, and what it does when that fails."""

from __future__ import annotations

import gc
import logging
import math
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import omnimem
from omnimem import AutomaticOffloader, OffloadConfig, _managed, _offload_models

from .offloading import MIB, Watch, Weights

EAGER = OffloadConfig(min_offload_interval=0.0)


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.002)


def our_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name == "omnimem-offload"]


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> dict[str, Weights]:
    """Models of 100 MiB that are registered from now on, by id."""
    made: dict[str, Weights] = {}

    def manage(model: Any, store: Any, model_id: str, **_: Any) -> Weights:
        made[model_id] = Weights(model_id, 100 * MIB)
        return made[model_id]

    monkeypatch.setattr(_managed, "manage", manage)
    return made


@pytest.fixture
def open_offloader(
    open_store: Callable[..., omnimem.Store], watch: Watch, request: pytest.FixtureRequest
) -> Callable[..., AutomaticOffloader]:
    def open_one(config: OffloadConfig | None = None, **fields: Any) -> AutomaticOffloader:
        store = open_store(**{"host_limit": "1GiB"} | fields)
        offloader = AutomaticOffloader(watch, config, store=store)  # type: ignore[arg-type]
        request.addfinalizer(offloader.close)
        return offloader

    return open_one


# ---- ids ----


def test_an_id_needs_no_registration(
    open_offloader: Callable[..., AutomaticOffloader], watch: Watch
) -> None:
    offloader = open_offloader()
    decision = offloader.should_offload("a")
    assert not decision
    assert "below offload_threshold" in decision.reason
    watch.tell(0.9)
    decision = offloader.should_offload("a")
    assert decision
    assert "never used" in decision.reason
    offloader.record_usage("a")
    assert "last used" in offloader.should_offload("a").reason
    assert len(offloader.decisions) == 0


def test_only_moving_needs_the_model(open_offloader: Callable[..., AutomaticOffloader]) -> None:
    offloader = open_offloader()
    for move in (offloader.offload_model, offloader.restore_model, offloader.unregister):
        with pytest.raises(KeyError, match="'a'"):
            move("a")


def test_the_one_used_longest_ago_gives(
    open_offloader: Callable[..., AutomaticOffloader], watch: Watch
) -> None:
    offloader = open_offloader()
    for name in "abc":
        offloader.record_usage(name)
    watch.tell(0.9)
    models = {name: offloader._models.describe(name, time.monotonic()) for name in "abc"}
    assert models["a"].last < models["b"].last < models["c"].last  # type: ignore[operator]


def test_register(
    open_offloader: Callable[..., AutomaticOffloader], weights: dict[str, Weights]
) -> None:
    offloader = open_offloader()
    first, second = {"w": 1}, {"w": 1}
    assert offloader.register(first, "a") == "a"
    assert offloader.register(first) == "a"
    assert offloader.register(second) == "dict-1"
    with pytest.raises(ValueError, match="'a'"):
        offloader.register(second, "a")
    with pytest.raises(ValueError, match="'a'"):
        offloader.register({}, "a")
    offloader.unregister(first)
    assert weights["a"].calls == [("release",)]
    with pytest.raises(KeyError):
        offloader.offload_model("a")
    assert offloader.register(first, "b") == "b"


# ---- moving ----


def test_offload_and_restore(
    open_offloader: Callable[..., AutomaticOffloader], weights: dict[str, Weights], watch: Watch
) -> None:
    offloader = open_offloader()
    model = {"w": 1}
    offloader.register(model, "a")
    weights["a"].held = (("a.w", 5),)
    gone = offloader.offload_model(model, "disk")
    assert (gone.action, gone.nbytes, gone.held) == ("offload", 100 * MIB, (("a.w", 5),))
    assert "a.w (5 B)" in gone.reason
    assert weights["a"].host_bytes() == 0
    back = offloader.restore_model("a")
    assert (back.action, back.nbytes) == ("restore", 100 * MIB)
    assert weights["a"].calls == [("offload", "disk"), ("resize", 100 * MIB), ("fetch",)]
    again = offloader.restore_model(model)
    assert not again
    assert "all of 'a' is in memory" in again.reason
    assert list(offloader.decisions) == [gone, back, again]
    with pytest.raises(ValueError, match="'tape'"):
        offloader.offload_model(model, "tape")


def test_a_restore_that_would_press_streams(
    open_offloader: Callable[..., AutomaticOffloader], weights: dict[str, Weights], watch: Watch
) -> None:
    offloader = open_offloader()
    offloader.register({}, "a")
    offloader.offload_model("a", "disk")
    watch.tell(0.74)
    decision = offloader.restore_model("a")
    assert decision.action == "stream"
    assert "80.0 %" in decision.reason
    assert 59 * MIB < weights["a"].host_bytes() <= 60 * MIB


def test_a_store_that_is_too_small_has_models_stream(
    open_offloader: Callable[..., AutomaticOffloader], weights: dict[str, Weights]
) -> None:
    offloader = open_offloader(host_limit=130 * MIB)
    for name in "ab":
        offloader.register({"w": name}, name)
        offloader.offload_model(name, "disk")
    offloader.restore_model("a")
    weights["a"].in_use = True
    decision = offloader.restore_model("b")
    assert decision.action == "stream"
    assert "the budget" in decision.reason
    assert weights["b"].host_bytes() == 30 * MIB


def test_without_a_disk_nothing_goes_there(
    open_offloader: Callable[..., AutomaticOffloader], weights: dict[str, Weights], watch: Watch
) -> None:
    offloader = open_offloader(disk_limit=0)
    offloader.register({"w": 1}, "a")
    offloader.register({"w": 2}, "b", model_dir="somewhere")
    watch.tell(0.95)
    for decision in (offloader.offload_model("a", "disk"), offloader.should_offload("a")):
        assert not decision
        assert "disk_limit=0" in decision.reason
    assert weights["a"].calls == []
    assert offloader.should_offload("b")
    assert offloader.offload_model("a", "cpu")


def test_switched_off(
    open_offloader: Callable[..., AutomaticOffloader], weights: dict[str, Weights], watch: Watch
) -> None:
    offloader = open_offloader(OffloadConfig(enable_auto_offload=False))
    offloader.register({}, "a")
    offloader.start()
    assert not offloader.running
    assert our_threads() == []
    watch.tell(0.99)
    decision = offloader.should_offload("a")
    assert not decision
    assert "enable_auto_offload=False" in decision.reason
    assert offloader.offload_model("a", "disk")  # asked for, it does


# ---- failures ----


def test_a_failure_is_told_and_leaves_the_model(
    open_offloader: Callable[..., AutomaticOffloader],
    weights: dict[str, Weights],
    caplog: pytest.LogCaptureFixture,
) -> None:
    offloader = open_offloader()
    offloader.register({}, "a")
    weights["a"].failure = omnimem.DiskFullError("disk: need 5, free 3")
    with caplog.at_level(logging.WARNING, "omnimem.offload"):
        decision = offloader.offload_model("a", "disk")
    assert not decision
    assert "as it was" in decision.reason
    assert "need 5, free 3" in decision.reason
    assert weights["a"].host_bytes() == 100 * MIB
    [record] = caplog.records
    assert "need 5, free 3" in record.getMessage()
    offloader._models.find("a").movable.inside = 0  # type: ignore[attr-defined]
    weights["a"].failure = omnimem.CorruptError("model.safetensors changed")
    with pytest.raises(omnimem.CorruptError, match=r"model\.safetensors"):
        offloader.restore_model("a")
    weights["a"].failure = None
    assert offloader.restore_model("a")


def test_failures_in_a_row_pause(
    open_offloader: Callable[..., AutomaticOffloader],
    weights: dict[str, Weights],
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(_offload_models, "time", clock)
    monkeypatch.setattr(omnimem.offload, "time", clock)
    offloader = open_offloader(EAGER)
    offloader.register({}, "a")
    weights["a"].failure = omnimem.DiskFullError("disk: need 5, free 3")
    watch.tell(0.9)
    for _ in range(2):
        offloader.offload_model("a", "disk")
        assert offloader.should_offload("a")
    for pause in (60, 120, 240):
        offloader.offload_model("a", "disk")
        decision = offloader.should_offload("a")
        assert not decision
        assert f"pauses for {pause} s more" in decision.reason
        assert "need 5, free 3" in decision.reason
        clock.now += pause - 1
        assert not offloader.should_offload("a")
        clock.now += 1
        assert offloader.should_offload("a")
    weights["a"].failure = None
    assert offloader.offload_model("a", "disk")
    weights["a"].failure = omnimem.DiskFullError("disk: need 5, free 3")
    offloader.offload_model("a", "cpu")
    assert "pauses" not in offloader.should_offload("a").reason
    weights["a"].failure = None


# ---- by itself ----


def test_it_acts_by_itself(
    open_offloader: Callable[..., AutomaticOffloader], weights: dict[str, Weights], watch: Watch
) -> None:
    offloader = open_offloader(EAGER)
    for name in "abc":
        offloader.register({"w": name}, name)
    for name in "bca":
        offloader.record_usage(name)
    weights["b"].in_use = True
    offloader.start()
    offloader.start()
    assert our_threads() == ["omnimem-offload"]
    watch.tell(0.65)
    watch.tell(0.65)
    assert list(offloader.decisions) == []
    watch.tell(0.65 + 0.16)
    until(lambda: len(offloader.decisions) >= 2, "nothing gave way")
    assert {each.model_id for each in offloader.decisions} == {"a", "c"}
    assert offloader.decisions[0].model_id == "c"
    assert "at or above offload_threshold" in offloader.decisions[0].reason
    assert weights["b"].calls == []
    offloader.stop()
    offloader.stop()
    assert our_threads() == []
    assert not offloader.running


def expect(offloader: AutomaticOffloader, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Have these models be used within the next second."""
    soon = time.monotonic() + 0.5

    def use(model_id: str) -> SimpleNamespace:
        due = soon if model_id in names else 0.0
        return SimpleNamespace(last=soon - 60, gap=60.0, next=due, recent=2, busy=0)

    monkeypatch.setattr(offloader._models, "use", use)


def test_it_brings_back_what_is_used_next(
    open_offloader: Callable[..., AutomaticOffloader],
    weights: dict[str, Weights],
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offloader = open_offloader(EAGER)
    for name in "abc":
        offloader.register({"w": name}, name)
        offloader.offload_model(name, "disk")
    expect(offloader, monkeypatch, "b")
    watch.tell(0.65)
    offloader._step(watch._core.report())
    assert len(offloader.decisions) == 3
    watch.tell(0.4)
    offloader._step(watch._core.report())
    [back] = list(offloader.decisions)[3:]
    assert (back.action, back.model_id) == ("restore", "b")
    assert weights["b"].host_bytes() == 100 * MIB
    assert weights["a"].host_bytes() == weights["c"].host_bytes() == 0


def test_what_is_let_go_meanwhile_stays_away(
    open_offloader: Callable[..., AutomaticOffloader],
    weights: dict[str, Weights],
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is expected, and half of it is gone: but somebody is letting it go."""
    offloader = open_offloader(EAGER)
    offloader.register({"w": 1}, "a")
    expect(offloader, monkeypatch, "a")
    watch.tell(0.1)
    steps = []

    def go(*call: Any) -> None:
        weights["a"].calls.append(call)
        if call[0] == "offload" and not steps:
            steps.append(call)
            weights["a"].inside //= 2
            offloader._step(watch._core.report())

    monkeypatch.setattr(weights["a"], "_go", go)
    offloader.offload_model("a", "disk")
    assert steps
    assert weights["a"].calls == [("offload", "disk")]
    offloader._step(watch._core.report())  # what is expected after that comes
    assert weights["a"].calls[1:] == [("resize", 100 * MIB), ("fetch",)]


def test_a_device_that_is_short_has_its_own_models_give(
    open_offloader: Callable[..., AutomaticOffloader],
    weights: dict[str, Weights],
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices = {"cuda:0": SimpleNamespace(uuid="one"), "cuda:1": SimpleNamespace(uuid="two")}
    cuda = SimpleNamespace(get_device_properties=devices.__getitem__)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    offloader = open_offloader(EAGER, disk_limit=0)
    for name, home in (("a", "cpu"), ("b", "cuda:0"), ("c", "cuda:1")):
        offloader.register({"w": name}, name)
        weights[name].home = home
    watch._core.tell_gpu("GPU-two", 1000 * MIB, 50 * MIB)
    watch.tell(0.3)
    assert not offloader.should_offload("a")
    assert not offloader.should_offload("b")  # of the first device nothing is known
    told = offloader.should_offload("c")
    assert (told.action, told.usage) == ("offload", 0.95)
    offloader._step(watch._core.report())
    assert [each.model_id for each in offloader.decisions] == ["c"]
    assert weights["c"].calls == [("offload", "cpu")]  # to RAM, that it has: no disk is needed
    back = offloader.restore_model("c")
    assert (back.action, back.nbytes) == ("stream", 0)
    watch._core.tell_gpu("GPU-two", 1000 * MIB, 600 * MIB)
    watch.tell(0.95)  # of RAM, which does not matter to it
    assert offloader.restore_model("c").action == "restore"


def test_it_brings_back_no_more_than_there_is_room_for(
    open_offloader: Callable[..., AutomaticOffloader],
    weights: dict[str, Weights],
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offloader = open_offloader(EAGER, host_limit=250 * MIB)
    for name in "abc":
        offloader.register({"w": name}, name)
        offloader.offload_model(name, "disk")
    expect(offloader, monkeypatch, "a", "b", "c")
    watch.tell(0.1)
    offloader._step(watch._core.report())
    back = [each.model_id for each in list(offloader.decisions)[3:]]
    assert len(back) == 2  # of the third only a part would fit
    offloader._step(watch._core.report())
    assert len(offloader.decisions) == 5
    [absent] = {*"abc"} - {*back}
    assert weights[absent].calls == [("offload", "disk")]

    # Another model takes the room after it was looked at.
    entry = offloader._models.find(absent)
    plan = omnimem.OffloadDecision(
        action="restore", model_id=absent, reason="planned before", at=time.monotonic()
    )
    offloader._fetch(entry, plan)
    assert entry.room is None
    assert weights[absent].calls == [("offload", "disk")]

    # Asked for, those that nobody uses make way.
    assert offloader.restore_model(absent).action == "restore"
    assert [weights[name].calls[-1] for name in back] == [("offload", "cpu")] * 2


def test_what_would_press_does_not_come_back_by_itself(
    open_offloader: Callable[..., AutomaticOffloader],
    weights: dict[str, Weights],
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offloader = open_offloader(OffloadConfig(offload_threshold=0.65, min_offload_interval=0.0))
    offloader.register({}, "a")
    offloader.offload_model("a", "disk")
    expect(offloader, monkeypatch, "a")
    watch.tell(0.59)
    offloader._step(watch._core.report())
    assert weights["a"].calls == [("offload", "disk")]
    watch.tell(0.5)
    offloader._step(watch._core.report())
    assert weights["a"].calls[1:] == [("resize", 100 * MIB), ("fetch",)]


def test_a_sample_that_asks_for_nothing_costs_little(
    open_offloader: Callable[..., AutomaticOffloader],
    weights: dict[str, Weights],
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Models are described only where one may have to go, or to come back."""
    offloader = open_offloader(EAGER)
    described: list[str] = []
    describe = offloader._models.describe

    def look(model_id: str, now: float) -> Any:
        described.append(model_id)
        return describe(model_id, now)

    monkeypatch.setattr(offloader._models, "describe", look)
    for usage, slope, away, asked in (
        (0.4, None, "", ""),
        (0.65, None, "b", ""),  # above where models come back, below where they go
        (0.4, None, "b", "b"),
        (0.65, 100.0 * MIB, "", "ab"),  # the trend has them go
        (0.95, None, "", "ab"),
    ):
        for name in "ab":
            if name not in weights:
                offloader.register({"w": name}, name)
            weights[name].inside = 0 if name == away else weights[name].nbytes
        described.clear()
        watch.tell(usage, slope)
        offloader._step(watch._core.report())
        assert "".join(described) == asked, (usage, slope)


def test_it_sleeps_while_nothing_concerns_it(
    open_offloader: Callable[..., AutomaticOffloader],
    weights: dict[str, Weights],
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offloader, core, steps = open_offloader(EAGER), watch._core, []
    step = offloader._step

    def count(report: Any) -> float:
        steps.append(report["number"])
        return step(report)

    monkeypatch.setattr(offloader, "_step", count)
    offloader.register({}, "a")
    offloader.start()
    until(lambda: bool(core.followed), "it does not sleep")
    assert core.followed[-1] == (0.8, None)  # from offload_threshold on
    seen = len(steps)
    for _ in range(20):
        watch.tell(0.4, quiet=True)
    watch.tell(0.4)  # one that is not quiet
    until(lambda: len(steps) > seen, "it was not woken")
    until(lambda: len(core.followed) > 1, "it does not sleep again")
    assert len(steps) <= seen + 2
    before = len(steps)
    offloader.offload_model("a", "disk")  # its next use is to be looked for
    watch.tell(0.4, quiet=True)
    until(lambda: len(steps) > before, "it did not look where models are")
    watch.tell(0.9)
    until(lambda: bool(steps) and offloader._pressed["cpu"], "it did not see the pressure")
    asleep = len(core.followed)
    for usage in (0.9, 0.9, 0.7):  # until restore_threshold it looks at each sample
        before = steps[-1]
        watch.tell(usage, quiet=True)
        until(lambda before=before: steps[-1] > before, "it missed a sample")  # type: ignore[misc]
    assert len(core.followed) == asleep


def test_when_it_wants_to_look_again(
    open_offloader: Callable[..., AutomaticOffloader],
    weights: dict[str, Weights],
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offloader = open_offloader(EAGER)
    offloader.register({}, "a")

    def look(usage: float, slope: float | None = None) -> float:
        watch.tell(usage, slope)
        return offloader._step(watch._core.report())

    def use(last: float, due: float, gap: float) -> None:
        now = time.monotonic()
        use = SimpleNamespace(
            last=last and now + last, next=due and now + due, gap=gap, recent=2, busy=0
        )
        monkeypatch.setattr(offloader._models, "use", lambda _: use)

    assert look(0.4) == math.inf  # it is there
    assert look(0.7, 100.0 * MIB) == 0.0  # but memory fills
    weights["a"].inside = 0
    assert look(0.4) == math.inf  # it was never used
    assert look(0.65) == 0.0  # it may come back once there is less in use
    use(-10, 20, 30)
    assert look(0.4) == pytest.approx(19, abs=1.0)  # a second ahead
    use(-10, 0, 0)
    assert look(0.4) == 0.0  # of late: it may be expected soon
    use(-100, -50, 50)
    assert look(0.4) == math.inf  # it is not expected any more


def test_stop_does_not_wait_for_a_sample(
    open_offloader: Callable[..., AutomaticOffloader], watch: Watch
) -> None:
    offloader = open_offloader()
    offloader._interval = 600.0
    offloader.start()
    offloader.stop()
    assert our_threads() == []


def test_it_takes_samples_where_the_monitor_does_not(
    open_offloader: Callable[..., AutomaticOffloader], weights: dict[str, Weights], watch: Watch
) -> None:
    offloader = open_offloader(EAGER)
    offloader.register({}, "a")
    watch.tell(0.9)
    watch._core.running = False
    offloader.start()
    until(lambda: bool(weights["a"].calls), "nothing gave way")
    before = watch._core.report()["number"]
    until(lambda: watch._core.report()["number"] > before + 2, "no more samples")


def test_it_goes_on_after_an_error(
    open_offloader: Callable[..., AutomaticOffloader],
    weights: dict[str, Weights],
    watch: Watch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    offloader = open_offloader(EAGER)
    offloader.register({}, "a")
    weights["a"].failure = ZeroDivisionError("a bug")
    offloader.start()
    watch.tell(0.9)
    until(lambda: "a bug" in caplog.text, "the error is not told")
    weights["a"].failure = None
    watch.tell(0.91)
    until(lambda: bool(offloader.decisions), "it does not go on")


def test_dropped_it_ends(
    open_store: Callable[..., omnimem.Store], watch: Watch, weights: dict[str, Weights]
) -> None:
    offloader = AutomaticOffloader(watch, store=open_store())  # type: ignore[arg-type]
    offloader.start()
    assert our_threads() == ["omnimem-offload"]
    del offloader
    gc.collect()
    until(lambda: our_threads() == [], "its thread goes on")


def test_close(
    open_store: Callable[..., omnimem.Store], watch: Watch, weights: dict[str, Weights]
) -> None:
    store = open_store()
    with AutomaticOffloader(watch, store=store) as offloader:  # type: ignore[arg-type]
        offloader.register({"w": 1}, "own")
        offloader.register({"w": 2}, "read", model_dir="somewhere")
        offloader.start()
    assert weights["own"].calls == [("release",)]
    assert weights["read"].calls == [("close",)]
    assert our_threads() == []
    offloader.close()
    for call in (
        lambda: offloader.should_offload("own"),
        lambda: offloader.record_usage("own"),
        lambda: offloader.offload_model("own"),
        lambda: offloader.register({}),
        offloader.start,
    ):
        with pytest.raises(omnimem.ClosedError):
            call()
    assert "closed" in repr(offloader)
    store.add("still open", b"x")
