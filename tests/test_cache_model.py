"""Random operations on a cache against a model: an OrderedDict of sizes, oldest first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from omnimem import CacheConfig, LimitError, ModelWeightCache

torch = pytest.importorskip("torch")

PAGE = 4096
GIB = 1 << 30
LIMIT = 100 * PAGE

models = st.sampled_from(["a", "b:c"])
layers = st.sampled_from(["w0", "w1", "w2", "w3"])
sizes = st.integers(0, 110 * PAGE)


def taken(nbytes: int) -> int:
    """Bytes of memory that an entry takes."""
    return max(-(-nbytes // PAGE), 1) * PAGE


class Machine(RuleBasedStateMachine):
    """What the cache has to hold, in which order, and what is held of it."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = ModelWeightCache(LIMIT / GIB, CacheConfig(eviction_batch_size=2))
        self.model: OrderedDict[tuple[str, str], tuple[int, int]] = OrderedDict()
        self.held: list[tuple[Any, int, int]] = []
        self.evictions = self.hits = self.misses = 0
        self.version = 0

    def used(self) -> int:
        return sum(taken(nbytes) for nbytes, _ in self.model.values())

    def make_room(self, most: int) -> None:
        while self.used() > most:
            self.model.popitem(last=False)
            self.evictions += 1

    @rule(model=models, layer=layers, nbytes=sizes)
    def put(self, model: str, layer: str, nbytes: int) -> None:
        self.version = (self.version + 1) % 256
        weights = torch.full((nbytes,), self.version, dtype=torch.uint8)
        if taken(nbytes) > LIMIT:
            with pytest.raises(LimitError):
                self.cache.put(model, layer, weights)
            return
        assert self.cache.put(model, layer, weights)
        self.model.pop((model, layer), None)
        self.make_room(LIMIT - taken(nbytes))
        self.model[model, layer] = (nbytes, self.version)

    @rule(model=models, layer=layers, hold=st.booleans())
    def get(self, model: str, layer: str, hold: bool) -> None:
        got = self.cache.get(model, layer)
        known = self.model.get((model, layer))
        assert (got is None) == (known is None)
        self.hits += got is not None
        self.misses += got is None
        if known is None:
            return
        self.model.move_to_end((model, layer))
        assert len(got) == known[0]
        assert got.eq(known[1]).all()
        if hold:
            self.held.append((got, *known))

    @rule(model=models, layer=layers, first=st.integers(0, 400_000), count=st.integers(0, 400_000))
    def get_rows(self, model: str, layer: str, first: int, count: int) -> None:
        got = self.cache.get(model, layer, slice(first, first + count))
        known = self.model.get((model, layer))
        assert (got is None) == (known is None)
        self.hits += got is not None
        self.misses += got is None
        if known is None:
            return
        self.model.move_to_end((model, layer))
        assert len(got) == len(range(known[0])[first : first + count])
        assert got.eq(known[1]).all()

    @rule(model=models, layer=layers)
    def remove(self, model: str, layer: str) -> None:
        assert self.cache.remove(model, layer) == ((model, layer) in self.model)
        self.model.pop((model, layer), None)

    @rule(nbytes=sizes)
    def evict(self, nbytes: int) -> None:
        before = self.used()
        self.make_room(max(before - nbytes, 0))
        assert self.cache.evict(nbytes) == before - self.used()

    @rule()
    def let_go(self) -> None:
        if self.held:
            self.held.pop(0)

    @invariant()
    def agrees(self) -> None:
        self.cache.store.check()
        stats = self.cache.get_stats()
        assert [key.replace("%3A", ":") for key in self.cache.cache] == [
            ":".join(pair) for pair in self.model
        ]
        assert stats["cache_size_bytes"] == self.used() <= LIMIT
        assert stats["peak_bytes"] <= LIMIT
        assert stats["evictions"] == self.evictions
        assert (stats["hits"], stats["misses"]) == (self.hits, self.misses)
        for tensor, nbytes, version in self.held:
            assert len(tensor) == nbytes
            assert tensor.eq(version).all()

    def teardown(self) -> None:
        self.cache.close()
        for tensor, _, version in self.held:
            assert tensor.eq(version).all()


TestCacheModel = Machine.TestCase
TestCacheModel.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
