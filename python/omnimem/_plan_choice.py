"""Which bytes a planned stream keeps, plain or encoded, so that a request takes the least time.

Without rates the best plan is the one that reads least. With them a decode pass takes the longer of
two times, since the disk works while the model does: computing and decoding, and reading.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from omnimem._plan_units import PLAIN, Tensor, UnitPlan, recut
from omnimem.config import format_size
from omnimem.errors import LimitError

_TINY = 50
"""A unit below this fraction of the largest streamed one costs more to read than to keep."""
_DISKS = (0.7, 1.0, 1.4)
"""Disks are bursty: a plan is judged by the mean time at so many times the measured rate."""
_SHARE_MARGIN = 1.01
"""What is encoded is expected to be so much longer than what a sample said."""


@dataclass(frozen=True)
class Rates:
    """What was measured at the start, in bytes per second of weights as they are."""

    read: float
    """Of the disk: bytes read, encoded or not."""
    compute: float
    """Weights that a decode pass goes through, all of them in memory."""
    decode: dict[str, float]
    """Of each coding, by the threads that a model's layer is decoded with."""
    share: dict[str, float]
    """Of each coding: the part of the size that is left."""
    proof: float = math.inf
    """Of what was read, compared with its checksum by the thread that waits for it."""
    encoded_as: str | None = None
    """The coding that the checkpoint's files have; None: they are plain."""


class Choice(NamedTuple):
    """A plan for all units, and what it costs."""

    units: list[UnitPlan]
    cost: float
    """Seconds of a request with rates, else bytes that it reads."""
    coding: str | None


def pass_seconds(units: Iterable[UnitPlan], rates: Rates, *, decode: bool) -> float:
    """Seconds of one pass through the units (`decode`: those used for every token)."""
    mine = [unit for unit in units if unit.decodes or not decode]
    busy = sum(unit.nbytes * unit.repeats for unit in mine) / rates.compute
    for unit in mine:
        for run in unit.runs:
            coding = rates.encoded_as if run.keep is None and run.encoded else run.keep
            if coding in rates.decode:
                busy += run.nbytes * unit.repeats / rates.decode[coding]
    read = sum(unit.pass_bytes for unit in mine)
    return max(busy + read / rates.proof, read / rates.read)


def ring_bytes(units: Iterable[UnitPlan], *, encodes: bool) -> int:
    """Memory for what passes through: the unit in use, and beside it what is read ahead.

    That is another unit, or two encoded forms (one that is being decoded, one on its way). With
    `encodes`, forms are made at the start, which takes as much as the largest unit beside it.
    """
    units = list(units)
    passing = max((unit.passing_bytes for unit in units), default=0)
    plain = max((unit.streamed_bytes - unit.ahead_bytes for unit in units), default=0)
    forms = max((unit.ahead_bytes for unit in units), default=0)
    packs = encodes and any(unit.packed_bytes for unit in units)
    return passing + max(plain, 2 * forms, passing if packs else 0)


def choose(
    units: list[UnitPlan], budget: int, rates: Rates | None, codings: Sequence[str], *, force: bool
) -> Choice:
    """The best plan over all sizes that the ring could have, and over the codings.

    Parameters
    ----------
    units : list of UnitPlan
        In order, nothing decided.
    budget : int
        Bytes of memory, less than all of the units take.
    rates : Rates or None
        None: codings do not matter, and reading less is better.
    codings : sequence of str
        Those that bytes may be kept in.
    force : bool
        Encode as much as helps to read less, whether that is faster or not.

    Raises
    ------
    LimitError
        No plan keeps within the budget.
    """
    giant = 2 * _median_layer(units)
    sizes = sorted({unit.host_bytes for unit in units if unit.host_bytes <= giant})
    best: Choice | None = None
    floor = math.inf
    for largest in sizes:
        forced = {u.name for u in units if u.host_bytes > largest or u.host_bytes * _TINY < largest}
        for coding in (None, *codings):
            need = _least(units, forced, rates, coding)
            floor = min(floor, need)
            if need > budget:
                continue
            room = budget - need
            made = _fill(units, forced, room, rates, coding, force=force)
            cost = _cost(made, rates, force=force)
            if best is None or cost < best.cost:
                best = Choice(made, cost, coding)
    if best is None:
        always = sum(unit.host_bytes for unit in units if unit.host_bytes > giant)
        error = LimitError(
            f"a budget of {budget} bytes ({format_size(budget)}) is below the least, {floor} bytes "
            f"({format_size(int(floor))}): units that always stay ({format_size(always)}) and a "
            "ring for the largest others; raise the budget"
        )
        error.need, error.limit, error.which = int(floor), budget, "budget"
        raise error
    return best


def _least(units: list[UnitPlan], forced: set[str], rates: Rates | None, coding: str | None) -> int:
    """Memory of what always stays and of the ring, with nothing else kept."""
    stay = [unit for unit in units if unit.name in forced]
    others = [recut(unit, None) for unit in units if unit.name not in forced]
    ring = ring_bytes(others, encodes=False)
    if coding is not None and (rates is None or coding != rates.encoded_as):
        ring = max(ring, 2 * max((unit.passing_bytes for unit in others), default=0))
    form = max((run.file_bytes for unit in stay for run in unit.runs if run.encoded), default=0)
    return sum(unit.host_bytes for unit in stay) + max(ring, form)


def _cost(units: list[UnitPlan], rates: Rates | None, *, force: bool) -> float:
    read = sum(unit.streamed_bytes * unit.uses for unit in units)
    if rates is None or force:
        return read
    tokens = max(unit.uses / unit.repeats for unit in units)
    return _mean_seconds(units, rates, decode=True) * (tokens - 1) + _mean_seconds(
        units, rates, decode=False
    )


def _mean_seconds(units: list[UnitPlan], rates: Rates, *, decode: bool) -> float:
    return statistics.fmean(
        pass_seconds(units, replace(rates, read=rates.read * times), decode=decode)
        for times in _DISKS
    )


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


# -- one ring size, one coding -------------------------------------------------------------------


class _Sizes(NamedTuple):
    """How much of a unit is left in memory, by what is kept of it."""

    shares: dict[str, float]
    coding: str | None

    def form(self, unit: UnitPlan) -> int:
        """Bytes of the unit's form, rounded as its blocks are."""
        return recut(unit, self.coding, self.shares).packed_bytes


def _fill(
    units: list[UnitPlan],
    forced: set[str],
    room: int,
    rates: Rates | None,
    coding: str | None,
    *,
    force: bool,
) -> list[UnitPlan]:
    """What is kept beside the forced ones, the most used first, within `room` bytes."""
    shares = {c: share * _SHARE_MARGIN for c, share in rates.share.items()} if rates else {}
    sizes = _Sizes(shares, coding)
    keep: dict[str, str | None] = {u.name: PLAIN if u.name in forced else None for u in units}
    partial: UnitPlan | None = None
    for uses in sorted({unit.uses for unit in units}, reverse=True):
        group = [u for u in units if u.uses == uses and keep[u.name] is None]
        total = sum(unit.host_bytes for unit in group)
        if total <= room:
            room -= total
            keep.update((unit.name, PLAIN) for unit in group)
            continue
        cycle = [unit for unit in units if unit.uses == uses]
        streamed, packed = _split(cycle, group, room, rates, sizes, force=force)
        room -= sum(u.host_bytes for u in group if u.name not in streamed | packed)
        room -= sum(sizes.form(u) for u in group if u.name in packed)
        keep.update((u.name, PLAIN) for u in group if u.name not in streamed | packed)
        keep.update(dict.fromkeys(packed, coding))
        last = next(unit for unit in reversed(group) if unit.name in (streamed or packed))
        partial = _partly(last, room, keep[last.name], shares)
        if partial.resident_bytes:
            break
    return [
        partial if partial and unit.name == partial.name else recut(unit, keep[unit.name], shares)
        for unit in units
    ]


def _split(
    cycle: list[UnitPlan],
    group: list[UnitPlan],
    room: int,
    rates: Rates | None,
    sizes: _Sizes,
    *,
    force: bool,
) -> tuple[set[str], set[str]]:
    """Which units of `group` to stream and which to keep encoded; the others stay plain."""
    if sizes.coding is None:
        return _fewest(cycle, group, {u.name: u.host_bytes for u in group}, room), set()
    best: tuple[float, set[str], set[str]] | None = None
    forms = {unit.name: sizes.form(unit) for unit in group}
    for count in range(len(group) + 1):
        streamed = _spread(cycle, group, count)
        rest = [unit for unit in group if unit.name not in streamed]
        if sum(forms[unit.name] for unit in rest) > room:
            continue
        over = sum(unit.host_bytes for unit in rest) - room
        saved = {unit.name: unit.host_bytes - forms[unit.name] for unit in rest}
        packed = _fewest(cycle, rest, saved, sum(saved.values()) - over) if over > 0 else set()
        if force and streamed:  # all of them: what that leaves keeps a part of another one plain
            packed = set(saved)
        made = [
            recut(u, None if u.name in streamed else sizes.coding if u.name in packed else PLAIN)
            for u in cycle
        ]
        seconds = 0.0 if force or rates is None else _mean_seconds(made, rates, decode=False)
        if best is None or seconds < best[0]:
            best = seconds, streamed, packed
        if force or not packed:
            break  # streaming more only reads more
    return best[1:] if best else ({unit.name for unit in group}, set())


def _fewest(
    cycle: list[UnitPlan], group: list[UnitPlan], weight: dict[str, int], room: int
) -> set[str]:
    """The fewest units of `group`, evenly placed, without which the others' weight is in room."""
    total = sum(weight[unit.name] for unit in group)
    for count in range(1, len(group) + 1):
        chosen = _spread(cycle, group, count)
        if total - sum(weight[name] for name in chosen) <= room:
            return chosen
    return {unit.name for unit in group}


def _spread(cycle: list[UnitPlan], group: list[UnitPlan], count: int) -> set[str]:
    """So many units of `group`, evenly placed in the time of the cycle.

    A unit counts for no more than the largest of the group: while it computes, the ring takes but
    one unit. Places in the time of a giant would only bunch the units beside it.
    """
    largest = max((unit.host_bytes for unit in group), default=0)
    sizes = [min(unit.host_bytes, largest) for unit in cycle]
    span, times = sum(sizes), itertools.accumulate(sizes, initial=0)
    starts = {unit.name: at for unit, at in zip(cycle, times, strict=False)}
    first = starts[group[0].name] if group else 0
    left = {unit.name: (starts[unit.name] - first) % span for unit in group}
    chosen: set[str] = set()
    for turn in range(count):
        at = turn * span / count
        nearest = min(left, key=lambda name: abs(left[name] - at))
        del left[nearest]
        chosen.add(nearest)
    return chosen


def _partly(unit: UnitPlan, room: int, otherwise: str | None, shares: dict[str, float]) -> UnitPlan:
    """Keep as many bytes plain of a unit as there is room for, at tensor boundaries."""
    best = recut(unit, otherwise, shares)
    base = best.packed_bytes
    stay: frozenset[str] = frozenset()
    for tensor in sorted(unit.tensors, key=lambda t: -t.nbytes):
        more = stay | {tensor.name}

        def keep(t: Tensor, more: frozenset[str] = more) -> str | None:
            return PLAIN if t.name in more else otherwise

        trial = recut(unit, keep, shares)
        taken = trial.resident_bytes + trial.packed_bytes - base
        if taken <= room and trial.streamed_bytes <= best.streamed_bytes:
            stay, best = more, trial
    return best
