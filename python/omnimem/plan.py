"""Planned streams: which bytes stay in memory, which pass through the ring.

A dense model runs through its layers in a cycle, the worst case of any cache. So a fixed set of
blocks stays resident, plain or encoded, and the rest streams through a ring. The rules:

- A unit larger than twice the median decoder layer (a tied head) always stays: the ring would need
  to hold it twice.
- Residents are chosen by expected uses per request: decoder layers run for every token, a vision
  tower once, an embedding that is the head as well twice for every token.
- Among equals, the streamed units are spread evenly by compute time, for which their bytes stand
  (decoding is bound by memory): the disk then works while the residents compute. In the time of a
  giant the ring fills and the disk waits, so that a giant counts for no more than one of them.
- At most one unit is partly resident, cut at tensor boundaries, so that the budget fills.
- Where bytes may be kept encoded, a pass takes the longer of computing and decoding, and reading:
  what is encoded and what streams is chosen by that time, from measured rates.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from omnimem._plan_choice import Choice, Rates, choose, pass_seconds, ring_bytes
from omnimem._plan_units import PAGE, PLAIN, Run, Tensor, UnitPlan, runs_of
from omnimem.config import format_share

__all__ = ["PAGE", "Plan", "Rates", "Run", "Tensor", "UnitPlan", "make_plan", "uses_of"]

CODINGS = ("fast", "balanced")
VISION = re.compile(r"(^|\.)(visual|vision\w*|image\w*|audio\w*)(\.|$)")
_WORTH = 0.9
"""Encoding has to save a tenth of the expected time: rates are never quite right."""
_USES_PER_REQUEST = 64.0
"""Tokens that a request is expected to generate: any number well above one gives the same plan."""


@dataclass(frozen=True)
class Plan:
    """What stays, what streams, and what that should cost."""

    budget_bytes: int
    weight_bytes: int
    """Bytes of all weights."""
    resident_bytes: int
    """Memory of what stays as it is."""
    ring_bytes: int
    """Memory of the ring: two of the largest streamed unit, where nothing is encoded."""
    stream_bytes: int
    """Bytes that one decode pass reads."""
    prefill_bytes: int
    """Bytes that a pass through every unit reads."""
    units: tuple[UnitPlan, ...] = field(repr=False)
    packed_bytes: int = 0
    """Memory of what stays encoded, as expected."""
    decode_bytes: int = 0
    """Plain bytes that one decode pass decodes, from memory or as they come from the disk."""
    compression: str | None = None
    """The coding of what stays encoded; None: nothing does."""
    reason: str = ""
    """What was chosen, and why."""
    seconds_per_pass: float | None = None
    """Of a decode pass, from measured rates; None before anything was measured."""

    @property
    def memory_bytes(self) -> int:
        """Memory of what stays and of the ring."""
        return self.resident_bytes + self.packed_bytes + self.ring_bytes

    @property
    def streams(self) -> bool:
        """Does anything pass through the ring?"""
        return any(run.keep != PLAIN for unit in self.units for run in unit.runs)


def uses_of(unit: str) -> float:
    """Expected uses of a unit per request, from its name."""
    return 1.0 if VISION.search(unit) else _USES_PER_REQUEST


def make_plan(
    units: Iterable[tuple[str, Sequence[Tensor]]],
    budget_bytes: int,
    repeats: Mapping[str, int] | None = None,
    compression: str | None = None,
    rates: Rates | None = None,
) -> Plan:
    """Choose what stays.

    Parameters
    ----------
    units : iterable of (str, sequence of Tensor)
        In the order of execution.
    budget_bytes : int
        Memory for weights, ring included.
    repeats : mapping of str to int, optional
        Uses in one pass, of units that are used more than once.
    compression : str, optional
        "auto": what the rates say is fastest. "fast", "balanced": whatever is encoded so reads
        less, faster or not. None: bytes are kept as they are.
    rates : Rates, optional
        What was measured; needed for any compression.

    Raises
    ------
    LimitError
        The budget is below what the always-resident units and the ring need.
    """
    repeats = repeats or {}
    plans = [
        UnitPlan(
            name,
            uses_of(name) * (times := repeats.get(name, 1)),
            runs_of(tensors, lambda _: PLAIN),
            times,
        )
        for name, tensors in units
    ]
    choice = Choice(plans, 0.0, None)
    reason = "everything fits as it is"
    if sum(unit.nbytes for unit in plans) > budget_bytes:
        choice, reason = _decide(plans, budget_bytes, compression, rates)
    return _describe(choice, reason, budget_bytes, rates)


def _decide(
    units: list[UnitPlan], budget: int, compression: str | None, rates: Rates | None
) -> tuple[Choice, str]:
    without = choose(units, budget, rates, (), force=rates is None)
    if compression is None or rates is None:
        return without, "compression is off"
    if compression != "auto":
        return choose(
            units, budget, rates, (compression,), force=True
        ), f"{compression} is asked for"
    best = choose(units, budget, rates, CODINGS, force=False)
    if best.coding is None or best.cost > _WORTH * without.cost:
        return without, f"keeping bytes encoded would hardly be faster ({_measured(rates)})"
    return best, (
        f"{best.coding}: a request is expected to take "
        f"{format_share(best.cost / without.cost, 0)} of what it takes with nothing kept "
        f"encoded ({_measured(rates)})"
    )


def _measured(rates: Rates) -> str:
    decode = ", ".join(
        f"{coding} {rate / 1e9:.1f} GB/s to {format_share(rates.share[coding], 0)}"
        for coding, rate in rates.decode.items()
    )
    computing = f"{rates.compute / 1e9:.1f} GB/s" if math.isfinite(rates.compute) else "unknown"
    return f"measured: disk {rates.read / 1e9:.2f} GB/s, computing {computing}, decoding {decode}"


def _describe(choice: Choice, reason: str, budget: int, rates: Rates | None) -> Plan:
    units = choice.units
    encoded = rates is not None and choice.coding != rates.encoded_as
    decoded = [
        run.nbytes * unit.repeats
        for unit in units
        if unit.decodes
        for run in unit.runs
        if run.keep in CODINGS or (run.keep is None and run.encoded)
    ]
    packed = sum(unit.packed_bytes for unit in units)
    plan = Plan(
        budget_bytes=budget,
        weight_bytes=sum(unit.nbytes for unit in units),
        resident_bytes=sum(unit.resident_bytes for unit in units),
        ring_bytes=ring_bytes(units, encodes=encoded),
        stream_bytes=sum(unit.pass_bytes for unit in units if unit.decodes),
        prefill_bytes=sum(unit.pass_bytes for unit in units),
        units=tuple(units),
        packed_bytes=packed,
        decode_bytes=sum(decoded),
        compression=choice.coding if packed else None,
        reason=reason,
        seconds_per_pass=pass_seconds(units, rates, decode=True) if rates else None,
    )
    return plan
