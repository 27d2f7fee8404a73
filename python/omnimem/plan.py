"""Planned streams: which bytes stay in memory, which pass through the ring.

A dense model runs through its layers in a cycle, the worst case of any cache. So a fixed set of
blocks stays resident and the rest streams through a ring of two units. The rules:

- A unit larger than twice the median decoder layer (a tied head) always stays: the ring would need
  to hold it twice.
- Residents are chosen by expected uses per request: decoder layers run for every token, a vision
  tower once, an embedding that is the head as well twice for every token.
- Among equals, the streamed units are spread evenly by compute time, for which their bytes stand
  (decoding is bound by memory): the disk then works while the residents compute.
- At most one unit is partly resident, cut at tensor boundaries, so that the budget fills.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from omnimem.config import format_size
from omnimem.errors import LimitError

PAGE = 4096
ALIGN = 64
"""A block that stays begins on a cache line, where kernels are fastest (`om_block.h`)."""
_VISION = re.compile(r"(^|\.)(visual|vision\w*|image\w*|audio\w*)(\.|$)")
_USES_PER_REQUEST = 64.0
"""Tokens that a request is expected to generate: any number well above one gives the same plan."""
_TINY = 50
"""A unit below this fraction of the largest streamed one costs more to read than to keep."""


@dataclass(frozen=True)
class Tensor:
    """Where one tensor's bytes are."""

    name: str
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Run:
    """Tensors that lie end to end in a file: one block of a store."""

    tensors: tuple[Tensor, ...]
    resident: bool

    @property
    def offset(self) -> int:
        """First byte in the file."""
        return self.tensors[0].offset

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.tensors[-1].offset + self.tensors[-1].nbytes - self.offset

    @property
    def host_bytes(self) -> int:
        """Memory and I/O of the run: whole pages around it."""
        first = self.offset // PAGE * PAGE
        return max(-(-(self.offset + self.nbytes) // PAGE) * PAGE - first, PAGE)


@dataclass(frozen=True)
class UnitPlan:
    """One unit: a decoder layer, a vision block, an embedding, ..."""

    name: str
    uses: float
    """Expected uses per request."""
    runs: tuple[Run, ...]
    repeats: int = 1
    """Uses in one pass: more than one where modules share its weights (a tied head)."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(run.nbytes for run in self.runs)

    @property
    def host_bytes(self) -> int:
        """Memory of all its blocks."""
        return sum(run.host_bytes for run in self.runs)

    @property
    def resident_bytes(self) -> int:
        """Memory of its resident blocks."""
        return sum(run.host_bytes for run in self.runs if run.resident)

    @property
    def streamed_bytes(self) -> int:
        """Bytes read each time that it is used."""
        return self.host_bytes - self.resident_bytes

    @property
    def pass_bytes(self) -> int:
        """Bytes read in one pass that uses it."""
        return self.streamed_bytes * self.repeats

    @property
    def decodes(self) -> bool:
        """Is it used for every token?"""
        return self.uses > self.repeats


@dataclass(frozen=True)
class Plan:
    """What stays, what streams, and what that should cost."""

    budget_bytes: int
    weight_bytes: int
    """Bytes of all weights."""
    resident_bytes: int
    """Memory of what stays."""
    ring_bytes: int
    """Memory of the ring: two of the largest streamed unit."""
    stream_bytes: int
    """Bytes that one decode pass reads."""
    prefill_bytes: int
    """Bytes that a pass through every unit reads."""
    units: tuple[UnitPlan, ...] = field(repr=False)
    seconds_per_pass: float | None = None
    """Of a decode pass, from measured rates; None before anything was measured."""

    @property
    def streams(self) -> bool:
        """Does anything stream?"""
        return self.prefill_bytes > 0


def uses_of(unit: str) -> float:
    """Expected uses of a unit per request, from its name."""
    return 1.0 if _VISION.search(unit) else _USES_PER_REQUEST


def make_plan(
    units: Iterable[tuple[str, Sequence[Tensor]]],
    budget_bytes: int,
    repeats: Mapping[str, int] | None = None,
) -> Plan:
    """Choose the residents.

    Parameters
    ----------
    units : iterable of (str, sequence of Tensor)
        In the order of execution.
    budget_bytes : int
        Memory for weights, ring included.
    repeats : mapping of str to int, optional
        Uses in one pass, of units that are used more than once.

    Raises
    ------
    LimitError
        The budget is below what the always-resident units and the ring need.
    """
    repeats = repeats or {}
    plans = [
        UnitPlan(name, uses_of(name) * (times := repeats.get(name, 1)), _runs(tensors, None), times)
        for name, tensors in units
    ]
    if sum(unit.nbytes for unit in plans) > budget_bytes:
        plans = _choose(plans, budget_bytes)
    ring = 2 * max((unit.streamed_bytes for unit in plans), default=0)
    return Plan(
        budget_bytes=budget_bytes,
        weight_bytes=sum(unit.nbytes for unit in plans),
        resident_bytes=sum(unit.resident_bytes for unit in plans),
        ring_bytes=ring,
        stream_bytes=sum(unit.pass_bytes for unit in plans if unit.decodes),
        prefill_bytes=sum(unit.pass_bytes for unit in plans),
        units=tuple(plans),
    )


def _runs(tensors: Sequence[Tensor], resident: frozenset[str] | None) -> tuple[Run, ...]:
    """Join tensors that lie end to end and share their fate (None: all resident).

    Where one that stays would not begin on a cache line, a new run does.
    """
    runs: list[Run] = []
    for tensor in sorted(tensors, key=lambda t: (t.file, t.offset)):
        stays = resident is None or tensor.name in resident
        last = runs[-1] if runs else None
        if (
            last
            and last.resident == stays
            and last.tensors[0].file == tensor.file
            and last.offset + last.nbytes == tensor.offset
            and (tensor.offset - last.offset) % (ALIGN if stays else 1) == 0
        ):
            runs[-1] = Run((*last.tensors, tensor), stays)
        else:
            runs.append(Run((tensor,), stays))
    return tuple(runs)


def _recut(unit: UnitPlan, resident: frozenset[str] | None) -> UnitPlan:
    """The unit with other residents (None: all)."""
    return replace(unit, runs=_runs(_tensors(unit), resident))


def _tensors(unit: UnitPlan) -> tuple[Tensor, ...]:
    return tuple(itertools.chain.from_iterable(run.tensors for run in unit.runs))


def _median_layer(units: Sequence[UnitPlan]) -> float:
    """Median size in the stack of numbered units that holds the most bytes."""
    stacks: dict[str, list[int]] = {}
    for unit in units:
        stack, _, number = unit.name.rpartition(".")
        if number.isdigit():
            stacks.setdefault(stack, []).append(unit.host_bytes)
    if not stacks:
        return max(unit.host_bytes for unit in units)
    return statistics.median(max(stacks.values(), key=sum))


def _choose(units: list[UnitPlan], budget: int) -> list[UnitPlan]:
    """The plan that reads least per request, over all sizes that the ring could have."""
    giant = 2 * _median_layer(units)
    sizes = sorted({unit.host_bytes for unit in units if unit.host_bytes <= giant})
    best: tuple[float, list[UnitPlan]] | None = None
    floor = None
    for largest in sizes:
        forced = {u.name for u in units if u.host_bytes > largest or u.host_bytes * _TINY < largest}
        need = sum(u.host_bytes for u in units if u.name in forced) + 2 * largest
        floor = need if floor is None else min(floor, need)
        if need > budget:
            continue
        plans = _fill(units, forced, budget - need)
        cost = sum(unit.streamed_bytes * unit.uses for unit in plans)
        if best is None or cost < best[0]:
            best = cost, plans
    if best is None:
        assert floor is not None
        always = sum(unit.host_bytes for unit in units if unit.host_bytes > giant)
        error = LimitError(
            f"a budget of {budget} bytes ({format_size(budget)}) is below the least, {floor} bytes "
            f"({format_size(floor)}): units that always stay ({format_size(always)}) and a ring of "
            "two of the largest others; raise the budget"
        )
        error.need, error.limit, error.which = floor, budget, "budget"
        raise error
    return best[1]


def _fill(units: list[UnitPlan], forced: set[str], room: int) -> list[UnitPlan]:
    """Residents beside the forced ones, the most used first, within `room` bytes."""
    streamed: set[str] = {unit.name for unit in units} - forced
    partial: UnitPlan | None = None
    for uses in sorted({unit.uses for unit in units}, reverse=True):
        group = [u for u in units if u.uses == uses and u.name in streamed]
        total = sum(unit.host_bytes for unit in group)
        if total <= room:
            room -= total
            streamed -= {unit.name for unit in group}
            continue
        cycle = [unit for unit in units if unit.uses == uses]
        chosen = _spread(cycle, group, room)
        room -= sum(unit.host_bytes for unit in group if unit.name not in chosen)
        streamed -= {unit.name for unit in group if unit.name not in chosen}
        partial = _partly(next(unit for unit in reversed(group) if unit.name in chosen), room)
        if partial.resident_bytes:
            break
    return [
        partial
        if partial and unit.name == partial.name
        else _recut(unit, None if unit.name not in streamed else frozenset())
        for unit in units
    ]


def _spread(cycle: list[UnitPlan], group: list[UnitPlan], room: int) -> set[str]:
    """The fewest units of `group` to stream, evenly placed in the time of the cycle."""
    total = sum(unit.host_bytes for unit in group)
    span = sum(unit.host_bytes for unit in cycle)
    times = itertools.accumulate((unit.host_bytes for unit in cycle), initial=0)
    starts = {unit.name: at for unit, at in zip(cycle, times, strict=False)}
    first = starts[group[0].name]
    starts = {name: (at - first) % span for name, at in starts.items()}
    for count in range(1, len(group) + 1):
        left = list(group)
        chosen: set[str] = set()
        for turn in range(count):
            at = turn * span / count
            nearest = min(left, key=lambda unit: abs(starts[unit.name] - at))
            left.remove(nearest)
            chosen.add(nearest.name)
        if total - sum(unit.host_bytes for unit in group if unit.name in chosen) <= room:
            return chosen
    return {unit.name for unit in group}


def _partly(unit: UnitPlan, room: int) -> UnitPlan:
    """Keep as many bytes of a streamed unit as there is room for, at tensor boundaries."""
    tensors = _tensors(unit)
    best = _recut(unit, frozenset())
    stay: frozenset[str] = frozenset()
    for tensor in sorted(tensors, key=lambda t: -t.nbytes):
        trial = _recut(unit, stay | {tensor.name})
        if trial.resident_bytes <= room and trial.streamed_bytes <= best.streamed_bytes:
            stay |= {tensor.name}
            best = trial
    return best
