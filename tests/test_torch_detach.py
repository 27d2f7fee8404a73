"""Detaching a model within the memory that it will hold, whatever stops it on the way."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from .conftest import run_python
from .torch_models import (
    LARGE,
    assert_right,
    budget,
    folder,
    forward,
    omnimem,
    plain,
    same_bits,
    torch,
    weight_bytes,
)

PEAK = """
import sys
from pathlib import Path
import torch
import omnimem, omnimem.torch

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))

folder, budget, compression = sys.argv[1], int(sys.argv[2]), sys.argv[3]
compression = None if compression == "None" else compression
model = omnimem.torch.load(folder, budget, compression=compression)
ids = torch.arange(20, 30)[None]
with torch.no_grad():
    want = model(ids, use_cache=False).logits
plan = model.omnimem.plan()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before, peak = memory("VmRSS"), memory("VmHWM")
assert peak - before < 1 << 20, (peak, before)
model.omnimem.detach()
print(memory("VmHWM") - before, memory("VmRSS") - before)
print(plan.resident_bytes, plan.packed_bytes, plan.ring_bytes)
with torch.no_grad():
    assert torch.equal(model(ids, use_cache=False).logits, want)
"""
SLACK = 6 << 20
"""What the process grows by besides: allocator, code of torch that runs the first time."""


@pytest.mark.parametrize("compression", [None, "fast", "auto"])
def test_peak_is_the_model_and_a_unit(compression: str | None) -> None:
    """What was kept, plain or encoded, and the copies of it are never there together."""
    done = run_python(PEAK, str(folder(LARGE)), str(budget(LARGE, 50)), str(compression))
    assert done.returncode == 0, done
    grown, left, resident, packed, ring = map(int, done.stdout.split())
    more = weight_bytes(LARGE) - resident - packed
    assert more > 0
    assert resident + packed > 2 * (ring + SLACK)
    assert compression != "fast" or packed > 2 * SLACK
    unit = ring // 2
    # What was there before: what is kept, and the ring, whose memory is used again.
    assert grown <= more + unit + SLACK
    assert left <= more - ring + SLACK


class Watching(omnimem.Store):
    """Notes what is in memory after each block that goes."""

    used: list[int]

    def evict(self, name: str, timeout: float | None = 30.0) -> bool:
        gone = super().evict(name, timeout)
        assert gone
        self.used.append(self.stats().host.used_bytes)
        return gone

    def remove(self, name: str, /) -> None:
        super().remove(name)
        self.used.append(self.stats().host.used_bytes)


def test_a_shared_store_gets_blocks_back_one_by_one() -> None:
    preset = "tiny"
    config = omnimem.StoreConfig(host_limit=budget(preset, 75), disk_limit=0)
    with Watching(config) as store:
        store.used = []
        model = omnimem.torch.load(folder(preset), budget(preset, 75), store)
        forward(model, preset)
        plan = model.omnimem.plan()
        streamed = sum(not run.resident for unit in plan.units for run in unit.runs)
        resident = sum(run.resident for unit in plan.units for run in unit.runs)
        model.omnimem.detach()
        read, left = store.used[:streamed], store.used[streamed:]
        assert read[-1] == plan.resident_bytes  # nothing is read ahead meanwhile
        falls = [now < then for then, now in itertools.pairwise([plan.resident_bytes, *left])]
        assert sum(falls) == resident
        assert left[-1] == 0
        assert store.names() == []
        assert_right(model, preset)


def test_no_memory_for_a_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halfway out the model has all its weights, and the next call goes on."""
    preset = "tiny"
    model = omnimem.torch.load(folder(preset), budget(preset, 75))
    stream, clone, left = model.omnimem, torch.Tensor.clone, [40]

    def failing(tensor: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("no memory")
        return clone(tensor, **options)

    failures = 0
    while not stream._ended:
        monkeypatch.setattr(torch.Tensor, "clone", failing)
        try:
            stream.detach()
        except RuntimeError:
            failures += 1
        monkeypatch.setattr(torch.Tensor, "clone", clone)
        assert_right(model, preset, 2)
        left[0] = 40 * 2**failures
    assert failures >= 2
    assert stream.detach() is model
    want = dict(plain(preset).named_parameters())
    assert all(same_bits(param, want[name]) for name, param in model.named_parameters())
