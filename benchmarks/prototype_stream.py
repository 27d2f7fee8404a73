"""A plain Python stream of a model's weights: the baseline that the C core has to beat.

Static residents spread evenly over the decoder layers, everything else through a ring of two
preallocated buffers, O_DIRECT reads of 1 MiB by four threads, the next unit fetched in the
background. Units are whole: the budget is filled to one unit, not to one tensor. Nothing is
verified, nothing is recovered: it shows what the idea alone gives.
"""

from __future__ import annotations

import mmap
import os
import statistics
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForImageTextToText

from common import TensorAt, tensors

CHUNK = 1 << 20
POPULATE_WRITE = 23
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def unit_of(name: str, parents: set[str]) -> str:
    """Return the module that a tensor streams with: its numbered layer, or its outer module."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    parts = parts[:-1]
    while len(parts) > 1 and ".".join(parts[:-1]) not in parents:
        parts = parts[:-1]
    return ".".join(parts)


def aligned(nbytes: int) -> mmap.mmap:
    """Return anonymous memory on huge pages, populated."""
    memory = mmap.mmap(-1, -(-max(nbytes, 1) // (2 << 20)) * (2 << 20))
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.madvise(POPULATE_WRITE)
    return memory


class Unit:
    """One module: the file ranges that hold its tensors, and where they go in a buffer."""

    def __init__(self, name: str, places: dict[str, TensorAt]) -> None:
        self.name = name
        self.runs: list[tuple[Path, int, int, int]] = []  # file, aligned low, high, buffer offset
        self.at: dict[str, tuple[int, TensorAt]] = {}
        size = 0
        for key, t in sorted(places.items(), key=lambda kv: (kv[1].file, kv[1].offset)):
            last = self.runs[-1] if self.runs else None
            if last is None or last[0] != t.file or t.offset > last[2] + 4096:
                low = t.offset // 4096 * 4096
                size = -(-size // 4096) * 4096
                self.runs.append((t.file, low, t.offset + t.nbytes, size))
            else:
                self.runs[-1] = (last[0], last[1], t.offset + t.nbytes, last[3])
            _, low, high, start = self.runs[-1]
            self.at[key] = (start + t.offset - low, t)
            size = start + -(-(high - low) // 4096) * 4096
        self.nbytes = size

    def views(self, memory: mmap.mmap) -> dict[str, torch.Tensor]:
        """Typed tensors over a filled buffer."""
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        return {
            key: whole[at : at + t.nbytes].view(DTYPES[t.dtype]).view(t.shape)
            for key, (at, t) in self.at.items()
        }


class Stream:
    """Loads a model folder within `budget` bytes and streams the rest; see the module's text."""

    def __init__(self, folder: Path, budget: int) -> None:
        config = AutoConfig.from_pretrained(folder)
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForImageTextToText.from_config(config, dtype=config.dtype)
        self.model.tie_weights()
        self.model.eval()
        found = tensors(folder)
        numbered = {unit_of(n, set()) for n in found if any(p.isdigit() for p in n.split("."))}
        parents = {p.rsplit(".", i)[0] for p in numbered for i in range(1, p.count(".") + 1)}
        grouped: dict[str, dict[str, TensorAt]] = {}
        for name, place in found.items():
            grouped.setdefault(unit_of(name, parents), {})[name] = place
        self.units = {name: Unit(name, group) for name, group in grouped.items()}
        self.fds = {t.file: os.open(t.file, os.O_RDONLY | os.O_DIRECT) for t in found.values()}
        self.params = self.leave_meta()
        self.bytes_read = 0
        self.readers = ThreadPoolExecutor(4)
        self.ahead = ThreadPoolExecutor(1)
        self.after: dict[str, str] = {}
        self.last: str | None = None
        self.turn = 0
        self.pending: tuple[str, int, Future[None]] | None = None
        resident = self.choose(budget)
        for name in resident:
            memory = aligned(self.units[name].nbytes)
            self.fill(self.units[name], memory)
            self.show(self.units[name].views(memory))
        streamed = [u for n, u in self.units.items() if n not in resident]
        largest = max((u.nbytes for u in streamed), default=0)
        self.ring_bytes = 2 * largest
        self.slots = [aligned(largest) for _ in range(2)] if streamed else []
        self.slot_views = {u.name: [u.views(slot) for slot in self.slots] for u in streamed}
        for unit in streamed:
            module = self.model.get_submodule(unit.name)
            self.hide(unit)
            module.register_forward_pre_hook(lambda *_, u=unit: self.enter(u))
            module.register_forward_hook(lambda *_, u=unit: self.hide(u), always_call=True)

    def leave_meta(self) -> dict[str, torch.nn.Parameter]:
        """Put a CPU parameter in the place of each one on the meta device; ties are kept."""
        made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        named: dict[str, torch.nn.Parameter] = {}
        for name, old in list(self.model.named_parameters(remove_duplicate=False)):
            owner, leaf = name.rsplit(".", 1)
            if old not in made:
                nan = torch.full((1,), float("nan"), dtype=old.dtype).expand(old.shape)
                made[old] = torch.nn.Parameter(nan, requires_grad=False)
            named[name] = made[old]
            setattr(self.model.get_submodule(owner), leaf, named[name])
        return named

    def choose(self, budget: int) -> set[str]:
        """Units that stay: too large for a ring or tied, then what decoding uses, spread evenly."""
        if sum(u.nbytes for u in self.units.values()) <= budget * 1.001:
            return set(self.units)
        layers = [u for n, u in self.units.items() if "layers." in n and "visual" not in n]
        layers.sort(key=lambda u: int(u.name.rsplit(".", 1)[1]))
        usual = statistics.median(u.nbytes for u in layers)
        named = list(self.params.values())
        tied = {name for name, p in self.params.items() if sum(p is other for other in named) > 1}
        stay = {
            u.name for u in self.units.values() if u.nbytes > 2 * usual or not tied.isdisjoint(u.at)
        }
        others = [u for n, u in self.units.items() if n not in stay]
        left = budget - sum(self.units[n].nbytes for n in stay) - 2 * max(u.nbytes for u in others)
        if left < 0:
            raise ValueError(f"budget {budget} is below the prototype's least, {budget - left}")
        once = [u for u in others if "visual" in u.name]
        for unit in sorted((u for u in others if u not in layers and u not in once),
                           key=lambda u: u.nbytes):  # fmt: skip
            if unit.nbytes <= left:
                stay.add(unit.name)
                left -= unit.nbytes
        count = min(int(left // max(u.nbytes for u in layers)), len(layers))
        keep = [u for i, u in enumerate(layers)
                if (i + 1) * count // len(layers) > i * count // len(layers)]  # fmt: skip
        stay |= {u.name for u in keep}
        left -= sum(u.nbytes for u in keep)
        for unit in once if count == len(layers) else ():
            if unit.nbytes <= left:
                stay.add(unit.name)
                left -= unit.nbytes
        return stay

    def fill(self, unit: Unit, memory: mmap.mmap) -> None:
        """Read one unit by four threads."""
        view = memoryview(memory)

        def one(job: tuple[int, int, int, int]) -> None:
            fd, at, need, offset = job
            room = view[at : at + -(-need // 4096) * 4096]
            if os.preadv(fd, [room], offset) < need:
                raise OSError(f"short read of {unit.name}")

        jobs = [
            (self.fds[file], start + at - low, min(CHUNK, high - at), at)
            for file, low, high, start in unit.runs
            for at in range(low, high, CHUNK)
        ]
        list(self.readers.map(one, jobs))
        self.bytes_read += unit.nbytes

    def show(self, views: dict[str, torch.Tensor]) -> None:
        """Give the parameters their bytes."""
        for key, value in views.items():
            self.params[key].data = value

    def hide(self, unit: Unit) -> None:
        """Give the parameters of a streamed unit one NaN, so that nothing reads stale bytes."""
        for key, (_, t) in unit.at.items():
            nan = torch.full((1,), float("nan"), dtype=DTYPES[t.dtype])
            self.params[key].data = nan.expand(t.shape)

    def fetch(self, name: str) -> None:
        """Begin to fill the slot that is not in use."""
        self.turn ^= 1
        job = self.ahead.submit(self.fill, self.units[name], self.slots[self.turn])
        self.pending = (name, self.turn, job)

    def enter(self, unit: Unit) -> None:
        """Wait for this unit, show it, and begin the one that followed it last time."""
        if self.pending is None or self.pending[0] != unit.name:
            if self.pending is not None:
                self.pending[2].result()
                self.turn ^= 1
            self.fetch(unit.name)
        assert self.pending is not None
        _, slot, job = self.pending
        job.result()
        self.pending = None
        self.show(self.slot_views[unit.name][slot])
        if self.last is not None:
            self.after[self.last] = unit.name
        self.last = unit.name
        following = self.after.get(unit.name)
        if following is not None:
            self.fetch(following)
