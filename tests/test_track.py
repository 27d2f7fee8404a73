"""Tracked blocks: peaks, changes, bytes moved; nested, on threads, as decorators, across closes."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable

import pytest

import omnimem
from omnimem import Span, Store, Tracked, track

from .conftest import data

MIB = 1 << 20


def test_peak_and_change(store: Store) -> None:
    store.add("before", bytes(2 * MIB))
    with track("step", store=store) as step:
        assert step == Tracked("step")
        store.add("a", data(4 * MIB))
        store.add("b", data(MIB))
        store.remove("a")
        assert store.evict("b")
    assert step.host == Span(2 * MIB, 2 * MIB, 7 * MIB)
    assert step.host.change == 0
    assert step.disk == Span(0, MIB, MIB)
    assert step.packed == Span()
    assert step.moved == {
        ("disk", "host"): 0,
        ("host", "disk"): MIB,
        ("packed", "host"): 0,
    }
    assert step.gpu == {}
    assert step.seconds > 0
    assert step.stall_seconds >= 0
    with track(store=store) as step:
        store.lease("b").release()
    assert step.moved["disk", "host"] == MIB
    assert step.host == Span(2 * MIB, 3 * MIB, 3 * MIB)
    assert step.stall_seconds > 0
    assert store.stats().host.peak_bytes == 7 * MIB  # as ever


def test_encoded_bytes(store: Store) -> None:
    store.add("a", bytes(4 * MIB))
    with track(store=store) as step:
        form = store.encode("a")
        store.evict("a")
        store.lease("a").release()
    assert 0 < form <= step.packed.peak < MIB
    assert step.packed.change == step.packed.peak
    assert step.moved["packed", "host"] == 4 * MIB
    with track(store=store) as step:
        store.remove("a")
    assert step.packed.change == -step.packed.before < 0
    assert "-" in str(step)


def test_blocks_nest(store: Store) -> None:
    with track(store=store) as outer:
        store.add("a", bytes(4 * MIB))
        with track(store=store) as first:
            store.remove("a")
        with track(store=store) as second:
            store.add("b", bytes(MIB))
            with track(store=store) as inner:
                pass
            store.remove("b")
    assert first.host == Span(4 * MIB, 0, 4 * MIB)
    assert second.host == Span(0, 0, MIB)
    assert inner.host == Span(MIB, MIB, MIB)
    assert outer.host == Span(0, 0, 4 * MIB)


def test_blocks_overlap_on_threads(store: Store) -> None:
    begun, grown, ended = threading.Event(), threading.Event(), threading.Event()
    records: list[Tracked] = []

    def other() -> None:
        with track("other", store=store) as record:
            begun.set()
            assert ended.wait(30)
        records.append(record)

    thread = threading.Thread(target=other)
    with track("one", store=store) as one:
        thread.start()
        assert begun.wait(30)
        store.add("a", bytes(2 * MIB))
        store.remove("a")
        grown.set()
    store.add("b", bytes(MIB))
    ended.set()
    thread.join(30)
    assert one.host == Span(0, 0, 2 * MIB)
    assert records[0].host == Span(0, MIB, 2 * MIB)


def test_all_open_stores(open_store: Callable[..., Store]) -> None:
    gc.collect()
    one, closing, closed = open_store(), open_store(), open_store()
    closed.add("a", bytes(MIB))
    closed.close()
    one.add("a", bytes(MIB))
    closing.add("a", data(2 * MIB))
    with track() as step:
        closing.evict("a")
        closing.close()
        opened = open_store()
        opened.add("b", data(4 * MIB))
        opened.evict("b")
        one.add("b", bytes(MIB))
    assert step.host.before - step.host.after == MIB
    assert step.host.peak - step.host.before == (2 + 2 + 4) * MIB - (1 + 2) * MIB
    assert step.moved["host", "disk"] == 6 * MIB


def test_a_store_that_is_closed_meanwhile(open_store: Callable[..., Store]) -> None:
    store = open_store()
    store.add("a", data(2 * MIB))
    with track(store=store) as step:
        store.evict("a")
        store.close()
    assert step.host == Span(2 * MIB, 0, 2 * MIB)
    assert step.moved["host", "disk"] == 2 * MIB
    with track(store=store) as step:
        pass
    assert step.host == Span()


def test_errors_pass_through(store: Store) -> None:
    records: list[Tracked] = []

    def fail() -> None:
        with track(store=store) as step:
            records.append(step)
            store.add("a", bytes(MIB))
            store.lease("nothing")

    with pytest.raises(KeyError):
        fail()
    assert records[0].host.change == MIB


def test_decorator(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    @track("grow", store=store)
    def grow(depth: int) -> int:
        """Grow."""
        store.add(f"{depth}", bytes(MIB))
        return grow(depth - 1) + 1 if depth else 0

    with caplog.at_level(logging.INFO, "omnimem.track"):
        assert grow(2) == 2
    assert (grow.__name__, grow.__doc__) == ("grow", "Grow.")
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 3
    assert ["+1.00 MiB" in texts[0], "+2.00 MiB" in texts[1], "+3.00 MiB" in texts[2]] == [True] * 3


def test_rss() -> None:
    with track() as step:
        memory = bytearray(64 * MIB)
        del memory
    if step.rss.exact:
        assert step.rss.peak >= step.rss.before + 60 * MIB
    assert step.rss.peak >= max(step.rss.before, step.rss.after) > 0
    with track() as flat:
        pass
    assert flat.rss.peak >= flat.rss.after
    assert not step.rss.exact or not flat.rss.exact
    assert "at least" in str(flat)


def test_str() -> None:
    record = Tracked(
        "step",
        1.25,
        host=Span(MIB, 3 * MIB, 5 * MIB),
        gpu={"cuda:0": Span(2 * MIB, 0, 4 * MIB)},
        moved={("disk", "host"): MIB, ("host", "disk"): 0},
        stall_seconds=0.5,
    )
    lines = str(record).splitlines()
    assert lines[0] == "step: 1.250 s, of which stalled 0.500 s"
    assert [line.split() for line in lines if line.startswith("  host ")] == [
        ["host", "+2.00", "MiB", "peak", "5.00", "MiB"]
    ]
    assert "gpu cuda:0 -2.00 MiB" in str(record)
    assert lines[-1] == "  disk to host: 1.00 MiB"


def test_marks_end_by_themselves(store: Store) -> None:
    mark = store._mark()
    del mark
    mark = store._mark()
    assert omnimem._core._mark_end(mark) == (0, 0, 0)
    with pytest.raises(ValueError, match="ended"):
        omnimem._core._mark_end(mark)
    with pytest.raises(ValueError):
        omnimem._core._mark_end(object())
    store.close()
    with pytest.raises(omnimem.ClosedError):
        store._mark()
