"""Eight threads put and get, while a ninth looks at the limit: right bytes, and never above it."""

from __future__ import annotations

import random
import threading
import time

import pytest

from omnimem import CacheConfig, ClosedError, ModelWeightCache

from .conftest import SOAK

torch = pytest.importorskip("torch")

PAGE = 4096
GIB = 1 << 30
LIMIT = 400 * PAGE
SECONDS = 60.0 if SOAK else 1.5


@pytest.mark.parametrize("compression", ["auto", "fast"])
def test_limit_and_bytes(compression: str) -> None:
    cache = ModelWeightCache(LIMIT / GIB, CacheConfig(compression=compression))
    stop = threading.Event()
    errors: list[BaseException] = []
    done = {"put": 0, "hit": 0, "rows": 0}

    def work(seed: int) -> None:
        chance = random.Random(seed)
        held = None
        while not stop.is_set():
            number = chance.randrange(12)
            layer = f"w{number}"
            if chance.random() < 0.4:
                rows = chance.randrange(1, 120)
                weights = torch.randn(rows, 2048).mul_(0.02)
                weights[:, 0] = number
                weights[:, 1] = rows
                cache.put("m", layer, weights.to(torch.bfloat16))
                done["put"] += 1
                continue
            index = None if chance.random() < 0.7 else slice(0, None, 2)
            got = cache.get("m", layer, index)
            if got is None:
                continue
            assert got[:, 0].eq(number).all()
            whole = int(got[0, 1])
            assert len(got) == (whole if index is None else (whole + 1) // 2)
            assert got[:, 1].eq(whole).all()
            done["hit" if index is None else "rows"] += 1
            held = got  # until the next one
        del held

    def run(seed: int) -> None:
        try:
            work(seed)
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and not stop.is_set():
        stats = cache.get_stats()
        assert stats["cache_size_bytes"] <= LIMIT
        assert stats["peak_bytes"] <= LIMIT
        cache.store.check()
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    assert min(done.values()) > 10, done
    assert cache.get_stats()["evictions"] > 10
    assert cache.get_stats()["exported_bytes"] == 0
    cache.close()


def test_close_while_others_are_inside() -> None:
    weights = torch.randn(64, 2048).mul_(0.02).to(torch.bfloat16)
    for _ in range(20):
        cache = ModelWeightCache(LIMIT / GIB, CacheConfig(compression="fast"))
        errors: list[BaseException] = []

        def work(cache: ModelWeightCache = cache, errors: list[BaseException] = errors) -> None:
            try:
                while True:
                    cache.put("m", "a", weights)
                    got = cache.get("m", "a")
                    assert got is None or torch.equal(got, weights)
            except ClosedError:
                pass
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.01)
        cache.close()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not errors, errors
