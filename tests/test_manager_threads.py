"""Models of one budget that are called, moved and pressed at once: each answer is the plain one.

OMNIMEM_SOAK=1 makes it a minute.
"""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnimem import AdvancedMemoryConfig, AdvancedMemoryManager, _core
from omnimem.config import OffloadConfig

from .conftest import SOAK
from .test_monitor_core import TOTAL, System

torch = pytest.importorskip("torch")

MIB = 1 << 20
SECONDS = 60.0 if SOAK else 4.0


def make_model(seed: int) -> Any:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(512, 512) for _ in range(8)]
    return torch.nn.Sequential(*layers).eval().requires_grad_(False)


@pytest.mark.soak
@pytest.mark.parametrize("percent", [45, 75])
def test_called_moved_and_pressed(
    percent: int, tmp_path: Path, io_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = System(tmp_path / "a system")
    (tmp_path / "swap").mkdir()
    monkeypatch.setenv("OMNIMEM_DIRECTORY", str(tmp_path / "swap"))
    monkeypatch.setenv("OMNIMEM_DISK_LIMIT", "128MiB")
    monkeypatch.setenv("OMNIMEM_IO_BACKEND", io_backend)
    at_root = functools.partial(_core.Monitor, root=str(system.root))
    monkeypatch.setattr(_core, "Monitor", at_root)
    threads_before = threading.active_count()
    x = torch.ones(2, 512)
    models = [make_model(seed) for seed in range(3)]
    wants = [model(x) for model in models]
    size = sum(p.nbytes for p in models[0].parameters())
    config = AdvancedMemoryConfig(
        budget=3 * size * percent // 100,
        monitoring_interval=0.02,
        offload=OffloadConfig(min_offload_interval=0.0),
        enable_weight_cache=False,
    )
    wrong: list[Any] = []
    done = dict.fromkeys(("calls", "moves", "levels"), 0)
    with AdvancedMemoryManager(config) as manager:
        for i, model in enumerate(models):
            manager.attach(model, model_id=str(i))
        end = time.monotonic() + SECONDS

        def repeat(what: str, step: Callable[[random.Random], None], seed: int) -> threading.Thread:
            def run() -> None:
                rng = random.Random(seed)
                try:
                    while time.monotonic() < end and not wrong:
                        step(rng)
                        done[what] += 1
                except BaseException as error:
                    wrong.append(error)

            return threading.Thread(target=run, name=f"{what}-{seed}")

        def call(rng: random.Random) -> None:
            i = rng.randrange(3)
            if not torch.equal(models[i](x), wants[i]):
                wrong.append(f"model {i}")

        def move(rng: random.Random) -> None:
            i = str(rng.randrange(3))
            if rng.random() < 0.5:
                manager.offload_model(i, target_device=rng.choice(("cpu", "disk")))
            else:
                manager.restore_model(i)

        def press(rng: random.Random) -> None:
            system.use(int(TOTAL * rng.choice((0.1, 0.5, 0.7, 0.85, 0.97))))
            time.sleep(rng.random() * 0.1)

        threads = [repeat("calls", call, seed) for seed in range(4)]
        threads += [repeat("moves", move, 5), repeat("levels", press, 6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS + 90)
            assert not thread.is_alive(), thread.name
        assert wrong == []
        assert min(done.values()) > 10, done
        assert manager.store.stats().host.peak_bytes <= manager.store.config.host_limit
        system.use(TOTAL // 10)
        manager.store.check()
    for model, want in zip(models, wants, strict=True):
        assert torch.equal(model(x), want)
    assert threading.active_count() == threads_before
