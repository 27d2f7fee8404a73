"""One budget: what each model in use gets, and who gives way."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import omnimem
from omnimem import _managed
from omnimem._budget import Budget, shares
from omnimem._offload_models import Entry, Models

from .offloading import MIB, Weights

PAGE = 4096


@given(
    st.integers(1 << 20, 1 << 40),
    st.dictionaries(st.text(max_size=3), st.integers(0, 1 << 38), max_size=6),
)
def test_shares_stay_within_the_budget(budget: int, users: dict[str, int]) -> None:
    parts = shares(budget, users)
    assert parts.keys() == users.keys()
    assert sum(parts.values()) <= budget
    assert all(parts[name] <= nbytes for name, nbytes in users.items())
    if sum(users.values()) <= budget:
        assert parts == users
    else:
        assert sum(parts.values()) > budget - PAGE * (len(users) + 1)


def test_shares_are_alike() -> None:
    assert shares(60 * MIB, {"a": 30 * MIB, "b": 90 * MIB}) == {"a": 15 * MIB, "b": 45 * MIB}


@pytest.fixture
def models(
    open_store: Callable[..., omnimem.Store], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Three models of 100 MiB."""

    def manage(model: Any, store: Any, model_id: str, **_: Any) -> Weights:
        return Weights(model_id, 100 * MIB)

    monkeypatch.setattr(_managed, "manage", manage)
    known = Models(open_store(host_limit=150 * MIB), 300.0)
    return {name: known.add({"w": name}, name, resident=False) for name in "abc"} | {  # type: ignore[return-value]
        "": known,
        "decisions": [],
    }


@pytest.fixture
def budget(models: dict[str, Any]) -> Budget:
    return Budget(models[""], lambda entry: 1 << 40, models["decisions"].append)


def calls(entry: Entry) -> list[tuple[Any, ...]]:
    """What was done since the last look."""
    done = entry.movable.calls  # type: ignore[attr-defined]
    entry.movable.calls = []  # type: ignore[attr-defined]
    return list(done)


def test_who_is_used_has_the_memory(models: dict[str, Any], budget: Budget) -> None:
    budget.used(models["a"].movable)
    assert calls(models["a"]) == [("resize", 100 * MIB)]
    budget.used(models["a"].movable)
    assert calls(models["a"]) == []
    budget.used(models["b"].movable)
    assert calls(models["a"]) == [("offload", "cpu")]
    assert calls(models["b"]) == [("resize", 100 * MIB)]
    budget.used(models["c"].movable)
    assert calls(models["a"]) == []  # rests already
    assert calls(models["b"]) == [("offload", "cpu")]
    budget.used(models["a"].movable)
    assert calls(models["a"]) == [("resize", 100 * MIB)]
    told = [(each.action, each.model_id) for each in models["decisions"]]
    assert told == [
        ("restore", "a"),
        ("offload", "a"),
        ("restore", "b"),
        ("offload", "b"),
        ("restore", "c"),
        ("offload", "c"),
        ("restore", "a"),
    ]
    assert "100.00 MiB of 150.00 MiB" in models["decisions"][0].reason


def test_two_in_use_share(models: dict[str, Any], budget: Budget) -> None:
    a, b = models["a"], models["b"]
    budget.used(a.movable)
    a.movable.in_use = True
    calls(a)
    budget.used(b.movable)
    b.movable.in_use = True
    assert calls(a) == [("resize", 73 * MIB)]
    assert calls(b) == [("resize", 73 * MIB)]
    budget.used(a.movable)
    assert calls(a) == calls(b) == []
    b.movable.in_use = False
    budget.used(a.movable)
    assert calls(a) == [("resize", 100 * MIB)]
    assert calls(b) == [("offload", "cpu")]


def test_a_room_of_its_own(models: dict[str, Any], budget: Budget) -> None:
    models["a"].cap = 40 * MIB
    budget.used(models["a"].movable)
    assert calls(models["a"]) == [("resize", 40 * MIB)]
    budget.used(models["a"].movable)
    assert calls(models["a"]) == []


def test_the_machine_may_allow_less(models: dict[str, Any]) -> None:
    tight = Budget(models[""], lambda entry: 30 * MIB, models["decisions"].append)
    tight.used(models["a"].movable)
    assert calls(models["a"]) == [("resize", 30 * MIB)]


def test_moved_by_others_it_comes_back(models: dict[str, Any], budget: Budget) -> None:
    budget.used(models["a"].movable)
    models["a"].offload("disk", 1.0)
    calls(models["a"])
    budget.used(models["a"].movable)
    assert calls(models["a"]) == [("resize", 100 * MIB)]


def test_trouble_does_not_stop_a_pass(
    models: dict[str, Any], budget: Budget, caplog: pytest.LogCaptureFixture
) -> None:
    models["a"].movable.failure = omnimem.BusyError("no room")
    with caplog.at_level(logging.WARNING, "omnimem.manager"):
        budget.used(models["a"].movable)
    assert "no room" in caplog.text
    models["a"].movable.failure = None
    budget.used(models["a"].movable)
    assert calls(models["a"]) == [("resize", 100 * MIB)]  # once, until something changes
    models[""].remove(models["a"])
    models["a"].room = None
    budget.used(models["a"].movable)
    assert calls(models["a"]) == []


def test_a_share_that_is_too_small(
    models: dict[str, Any], budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below what a plan needs, units come one by one."""

    def refuse(room: int) -> None:
        raise omnimem.LimitError("the least is 90 MiB")

    monkeypatch.setattr(models["a"].movable, "resize", refuse)
    budget.used(models["a"].movable)
    assert calls(models["a"]) == [("offload", "cpu")]
    assert "the least is 90 MiB" in models["decisions"][-1].reason
    budget.used(models["a"].movable)
    assert calls(models["a"]) == []


def test_all_give_way_to_one_that_waits(models: dict[str, Any], budget: Budget) -> None:
    known, a, b, c = (models[name] for name in ("", "a", "b", "c"))
    budget.used(a.movable)
    a.movable.in_use = True
    budget.used(b.movable)
    calls(a), calls(b)
    a.movable.failure = omnimem.BusyError("still read")
    known.give_way(b.movable)
    assert calls(b) == [("offload", "cpu")]
    assert calls(c) == []  # had nothing
    assert (a.room, b.room, c.room) == (73 * MIB, None, None)  # a failed to
    a.movable.failure = None
    known.give_way(b.movable)
    assert calls(a)[-1] == ("offload", "cpu")
    assert a.room is None
    with known.sharing:  # whoever shares out may wait for weights itself
        b.room = 1
        known.give_way(a.movable)
    assert b.room == 1


def test_what_segments_waste_is_not_given(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = models[""]
    known.store.add("large", bytes(MIB))
    known.store.add("small", bytes(4096))  # in a segment of 2 MiB
    assert known.spare() == 150 * MIB
    known.give_way(models["a"].movable)
    host = known.store.stats().host
    assert known.wasted == host.mapped_bytes - host.used_bytes == 2 * MIB - 4096
    assert known.spare() == known.room(models["a"]) == 148 * MIB + 4096
    known.remove(models["c"])
    assert known.spare() == 150 * MIB
