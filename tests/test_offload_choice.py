"""Which model gives, which one comes back: cases, and what holds in all of them."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimem._offload_choice import (
    HORIZON,
    Memory,
    Model,
    OffloadDecision,
    due,
    plan_offloads,
    plan_restores,
    presses,
    restore,
)
from omnimem.config import OffloadConfig

MIB = 1 << 20
TOTAL = 1000 * MIB
CONFIG = OffloadConfig()
NOW = 1000.0


def memory(usage: float, slope: float | None = None) -> Memory:
    return Memory(usage=usage, total=TOTAL, slope=slope)


def model(name: str, **fields: object) -> Model:
    return Model(**{"model_id": name, "host_bytes": 100 * MIB, "last": NOW - 50} | fields)  # type: ignore[arg-type]


def givers(*models: Model, usage: float = 0.9, pressed: bool = True) -> list[str]:
    plans = plan_offloads(memory(usage), models, CONFIG, NOW, pressed)
    return [name for name, decision in plans.items() if decision]


# ---- who gives ----


def test_nobody_gives_below_the_threshold() -> None:
    plans = plan_offloads(memory(0.5), [model("a")], CONFIG, NOW, False)
    assert not plans["a"]
    assert "50.0 %" in plans["a"].reason
    assert "below offload_threshold 80.0 %" in plans["a"].reason


def test_they_give_until_the_lower_threshold() -> None:
    models = [model(name, last=NOW - idle) for name, idle in (("a", 10), ("b", 40), ("c", 20))]
    assert givers(*models, usage=0.79) == ["b", "c"]  # 190 MiB too many
    assert givers(*models, usage=0.61) == ["b"]
    assert givers(*models, usage=0.99) == ["b", "c", "a"]


def test_a_reason_has_the_numbers() -> None:
    [decision] = plan_offloads(memory(0.85), [model("a")], CONFIG, NOW, True).values()
    assert decision == OffloadDecision(
        action="offload",
        model_id="a",
        reason=decision.reason,
        nbytes=100 * MIB,
        usage=0.85,
        at=NOW,
    )
    for number in ("85.0 % of 1000.00 MiB", "80.0 %", "250.00 MiB too many", "50.0 s ago"):
        assert number in decision.reason


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"last": None}, {"last": NOW - 900}),
        ({"last": NOW - 900}, {"last": NOW - 90}),
        ({"next": NOW + 90, "gap": 140}, {"next": NOW + 9, "gap": 59}),
        ({}, {"next": NOW + 9, "gap": 59}),
        ({"recent": 1}, {"recent": 60}),
        ({"seconds_per_byte": 1e-9}, {"seconds_per_byte": 3e-9}),
        ({}, {"writes": True}),
        ({"last": None, "host_bytes": 900 * MIB}, {"last": None, "host_bytes": 300 * MIB}),
        ({"next": NOW - 49, "gap": 1}, {"next": NOW + 10, "gap": 60}),  # a rhythm that broke
    ],
)
def test_who_goes_first(first: dict[str, object], second: dict[str, object]) -> None:
    big = {"host_bytes": 300 * MIB}  # enough by itself
    for names in ("ab", "ba"):  # names do not matter
        pair = [model(names[0], **{**big, **first}), model(names[1], **{**big, **second})]
        assert givers(*pair) == [names[0]]
        assert givers(*reversed(pair)) == [names[0]]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"busy": True}, "'a' is in use"),
        ({"moved": NOW - 4}, "last move of 'a' was 4.0 s ago, less than min_offload_interval 10 s"),
        ({"stays": "no disk"}, "no disk"),
        ({"host_bytes": 0, "missing_bytes": 5}, "nothing of 'a' is in memory"),
    ],
)
def test_who_never_gives(fields: dict[str, object], said: str) -> None:
    plans = plan_offloads(memory(0.99), [model("a", **fields)], CONFIG, NOW, True)
    assert not plans["a"]
    assert said in plans["a"].reason


def test_who_need_not_give_hears_who_does() -> None:
    models = [model("a", host_bytes=400 * MIB, last=NOW - 99), model("b")]
    plans = plan_offloads(memory(0.85), models, CONFIG, NOW, True)
    assert not plans["b"]
    assert "'a'" in plans["b"].reason


def test_switched_off() -> None:
    off = OffloadConfig(enable_auto_offload=False)
    plans = plan_offloads(memory(0.99), [model("a")], off, NOW, True)
    assert not plans["a"]
    assert "enable_auto_offload=False" in plans["a"].reason


def test_an_id_without_a_model_is_judged_by_its_use() -> None:
    known, other = model("known", last=NOW - 5), model("other", host_bytes=0)
    assert givers(known, other) == ["other", "known"]
    enough = model("known", host_bytes=900 * MIB)
    assert givers(enough, model("other", host_bytes=0, last=NOW - 5)) == ["known"]


# ---- hysteresis and trend ----


def test_hysteresis() -> None:
    pressed, said = False, []
    for usage in (0.7, 0.79, 0.8, 0.79, 0.61, 0.6, 0.61, 0.79, 0.9):
        pressed = presses(memory(usage), CONFIG, pressed)
        said.append(pressed)
    assert said == [False, False, True, True, True, False, False, False, True]


def test_the_trend_reaches_the_threshold_before_the_next_use() -> None:
    growing = memory(0.7, slope=10 * MIB)  # 100 MiB below the threshold: in 10 s
    late = model("late", next=NOW + 30, gap=80)
    soon = model("soon", next=NOW + 5, gap=55)
    plans = plan_offloads(growing, [late, soon], CONFIG, NOW, False)
    assert plans["late"]
    assert "in 10.0 s it reaches offload_threshold" in plans["late"].reason
    assert not plans["soon"]
    assert "expected to be used in 5.0 s, before memory is short in 10.0 s" in plans["soon"].reason


@pytest.mark.parametrize("slope", [None, -1.0, 0.0, 1.0 * MIB])
def test_a_trend_that_is_none_or_far_away(slope: float | None) -> None:
    assert memory(0.7, slope).seconds_until(0.8) > HORIZON
    assert not plan_offloads(memory(0.7, slope), [model("a")], CONFIG, NOW, False)["a"]


# ---- coming back ----

AWAY = {"host_bytes": 0, "missing_bytes": 100 * MIB, "seconds_per_byte": 1 / (50 * MIB)}


def test_ahead_of_the_predicted_use() -> None:
    early = model("a", next=NOW + 30, gap=80, **AWAY)
    decision = plan_restores(memory(0.3), [early], CONFIG, NOW)["a"]
    assert not decision
    assert "expected to be used in 30.0 s, and takes 2.00 s" in decision.reason
    decision = plan_restores(memory(0.3), [early], CONFIG, NOW + 27)["a"]
    assert (decision.action, decision.nbytes) == ("restore", 100 * MIB)
    assert "40.0 %" in decision.reason


@pytest.mark.parametrize(
    ("fields", "usage", "said"),
    [
        ({"next": None}, 0.3, "is not known"),
        ({"next": NOW - 90, "gap": 80}, 0.3, "is not known"),
        ({}, 0.6, "not below restore_threshold 60.0 %"),
        ({"moved": NOW - 4}, 0.3, "last move of 'a' was 4.0 s ago"),
        ({"stays": "paused"}, 0.3, "paused"),
    ],
)
def test_who_does_not_come_back(fields: dict[str, object], usage: float, said: str) -> None:
    candidate = model("a", **{"next": NOW + 1, "gap": 51, **AWAY, **fields})
    decision = plan_restores(memory(usage), [candidate], CONFIG, NOW)["a"]
    assert not decision
    assert said in decision.reason


def test_what_does_not_fit_streams() -> None:
    big = model("a", **{**AWAY, "missing_bytes": 300 * MIB})
    decision = restore(big, memory(0.55), CONFIG, NOW)
    assert (decision.action, decision.nbytes) == ("stream", 250 * MIB)
    assert decision
    assert "do not fit" in decision.reason
    assert restore(big, memory(0.9), CONFIG, NOW).nbytes == 0
    assert restore(big, memory(0.4), CONFIG, NOW).action == "restore"
    within = restore(big, memory(0.4), CONFIG, NOW, room=200 * MIB)
    assert (within.action, within.nbytes) == ("stream", 200 * MIB)
    assert "the budget" in within.reason
    assert restore(big, memory(0.4), CONFIG, NOW, room=300 * MIB).action == "restore"
    assert restore(big, memory(0.7), CONFIG, NOW, idle=201 * MIB).action == "restore"
    assert restore(big, memory(0.7), CONFIG, NOW, idle=200 * MIB).nbytes == 300 * MIB


def test_those_that_come_back_count_for_the_next() -> None:
    soon = model("soon", next=NOW + 1, gap=51, **AWAY)
    later = model("later", next=NOW + 2, gap=51, **{**AWAY, "missing_bytes": 150 * MIB})
    plans = plan_restores(memory(0.4), [later, soon], CONFIG, NOW, room=250 * MIB)
    assert [(name, plan.action) for name, plan in plans.items()] == [
        ("soon", "restore"),
        ("later", "restore"),
    ]
    plans = plan_restores(memory(0.4), [later, soon], CONFIG, NOW, room=200 * MIB)
    assert (plans["later"].action, plans["later"].nbytes) == ("stream", 100 * MIB)
    plans = plan_restores(memory(0.59), [later, soon], CONFIG, NOW)
    assert not plans["later"]
    assert "not below restore_threshold" in plans["later"].reason


# ---- what holds always ----

times = st.floats(0.0, 1000.0)
models_of = st.builds(
    Model,
    model_id=st.uuids().map(str),
    host_bytes=st.integers(0, TOTAL),
    missing_bytes=st.integers(0, TOTAL),
    seconds_per_byte=st.none() | st.floats(1e-10, 1e-8),
    writes=st.booleans(),
    last=st.none() | times,
    gap=st.none() | st.floats(0.01, 500.0),
    next=st.none() | st.floats(0.0, 2000.0),
    recent=st.integers(0, 64),
    busy=st.booleans(),
    moved=st.none() | times,
)
memories = st.builds(
    Memory,
    usage=st.floats(0.0, 1.0),
    total=st.just(TOTAL),
    slope=st.none() | st.floats(-1e9, 1e9),
)


@given(memories, st.lists(models_of, max_size=8), st.booleans())
def test_offloads_take_what_is_needed_and_no_more(
    state: Memory, models: list[Model], was: bool
) -> None:
    pressed = presses(state, CONFIG, was)
    plans = plan_offloads(state, models, CONFIG, NOW, pressed)
    assert set(plans) == {each.model_id for each in models}
    known = {each.model_id: each for each in models}
    chosen = [known[name] for name, decision in plans.items() if decision]
    for each in chosen:
        assert not each.busy
        assert each.moved is None or NOW - each.moved >= CONFIG.min_offload_interval
    if pressed:
        excess = state.used - CONFIG.restore_threshold * TOTAL
        assert sum(each.host_bytes for each in chosen[:-1]) < max(excess, 1)
    elif chosen:
        assert state.slope is not None
        assert state.seconds_until(CONFIG.offload_threshold) <= HORIZON
        for each in chosen:
            wait = due(each, NOW, CONFIG.usage_window)
            assert wait >= state.seconds_until(CONFIG.offload_threshold)
    assert all(decision.reason for decision in plans.values())


@given(memories, st.lists(models_of, max_size=8), st.none() | st.integers(0, TOTAL))
def test_restores_stay_below_the_threshold_and_within_the_room(
    state: Memory, models: list[Model], room: int | None
) -> None:
    plans = plan_restores(state, models, CONFIG, NOW, room)
    come = [decision.nbytes for decision in plans.values() if decision]
    if come:
        assert state.usage < CONFIG.restore_threshold
        assert state.used + sum(come) <= CONFIG.offload_threshold * TOTAL + 8
        assert room is None or sum(come) <= room


@given(
    st.lists(st.tuples(st.floats(0.1, 30.0), st.floats(0.0, 1.0)), min_size=1, max_size=60),
    st.lists(models_of, min_size=1, max_size=4, unique_by=lambda each: each.model_id),
)
@settings(max_examples=50)
def test_no_model_flaps(steps: list[tuple[float, float]], models: list[Model]) -> None:
    """Whatever memory does, a model's automatic moves are `min_offload_interval` apart."""
    now, pressed = NOW, False
    known = {each.model_id: dataclasses.replace(each, moved=None) for each in models}
    moves: dict[str, list[float]] = {name: [] for name in known}

    def move(name: str, away: bool) -> None:
        each = known[name]
        total = each.host_bytes + each.missing_bytes
        known[name] = dataclasses.replace(
            each, moved=now, host_bytes=0 if away else total, missing_bytes=total if away else 0
        )
        moves[name].append(now)

    for seconds, usage in steps:
        now += seconds
        state = Memory(usage=usage, total=TOTAL, slope=(usage - 0.5) * TOTAL / 10)
        pressed = presses(state, CONFIG, pressed)
        given_up = plan_offloads(state, list(known.values()), CONFIG, now, pressed)
        for name in [name for name, decision in given_up.items() if decision]:
            move(name, away=True)
        if not pressed:
            back = plan_restores(state, list(known.values()), CONFIG, now)
            for name in [name for name, decision in back.items() if decision]:
                move(name, away=False)
    for at in moves.values():
        apart = [later - earlier for earlier, later in itertools.pairwise(at)]
        assert all(gap >= CONFIG.min_offload_interval for gap in apart)


@given(models_of, st.floats(0.0, 1000.0))
def test_what_is_never_used_is_due_last(each: Model, window: float) -> None:
    wait = due(each, NOW, max(window, 1.0))
    assert wait >= 0
    assert (wait == math.inf) == (each.last is None)
