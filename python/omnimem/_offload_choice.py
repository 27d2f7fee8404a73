"""Which model gives its memory up, which one comes back, and why: pure functions of plain values.

- Models begin to give at `offload_threshold` and go on down to `restore_threshold`.
- Who gives: whose bytes cost least to bring back, for as long as they are not needed. The value of
  a byte is the time to bring it back, divided by the time until its model is expected to be used.
  What is in use never goes, nor what moved less than `min_offload_interval` ago.
- Ahead of need: where the trend reaches the threshold within `HORIZON` seconds, models give that
  are not expected to be used before.
- A model comes back ahead of its predicted use while memory in use is below `restore_threshold`,
  and as a whole only if memory in use then stays below `offload_threshold`; else it streams.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from omnimem.config import OffloadConfig, format_share, format_size

__all__ = [
    "HORIZON",
    "Memory",
    "Model",
    "OffloadDecision",
    "comes_back",
    "due",
    "plan_offloads",
    "plan_restores",
    "presses",
    "restore",
    "wanted",
]

HORIZON = 60.0
"""Seconds that a trend is believed ahead: those at which pressure turns MEDIUM by it."""
_LEAD = 2.0
"""A model begins to come back so many times the expected duration ahead of its use."""
_LEAST_LEAD = 1.0
_AWAKE = 60.0
"""A model that was used so many seconds ago at most may be expected again at any moment."""


@dataclass(frozen=True, kw_only=True)
class OffloadDecision:
    """What is to be done with a model, or was done, and why; true where it is anything."""

    action: str
    """"none", "offload", "restore" (as a whole) or "stream" (as much as there is room for)."""
    model_id: str
    reason: str
    """One sentence with the numbers."""
    nbytes: int = 0
    """Bytes of memory that it is about."""
    usage: float | None = None
    """Share of memory in use, 0..1, that it rests on; None: on the budget alone."""
    held: tuple[tuple[str, int], ...] = ()
    """Bytes that somebody else still holds, by name: they go with the last holder."""
    at: float = 0.0
    """When, in seconds of `time.monotonic`."""

    def __bool__(self) -> bool:
        return self.action != "none"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of the tightest limit."""

    usage: float
    """Share in use, 0..1."""
    total: int
    """Bytes."""
    slope: float | None = None
    """Bytes per second by which it fills; None: not known well enough."""

    @property
    def used(self) -> int:
        """Bytes in use."""
        return int(self.usage * self.total)

    def room(self, share: float) -> int:
        """Bytes that may come until a share is in use."""
        return max(int(share * self.total) - self.used, 0)

    def seconds_until(self, share: float) -> float:
        """When the trend reaches a share; infinity: it does not."""
        if self.usage >= share:
            return 0.0
        if self.slope is None or self.slope <= 0:
            return math.inf
        return (share - self.usage) * self.total / self.slope

    def __str__(self) -> str:
        return f"{format_share(self.usage)} of {format_size(self.total)} in use"


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is known of a model. Times are seconds of one clock; None: unknown, or never."""

    model_id: str
    host_bytes: int = 0
    """Of its weights in memory, those in use: what it would give."""
    missing_bytes: int = 0
    """What would have to come."""
    seconds_per_byte: float | None = None
    """To bring a byte back, and to write it where that has to be done first; None: not measured."""
    writes: bool = False
    """Has to be written before it can go."""
    last: float | None = None
    gap: float | None = None
    """Typical time from one use to the next."""
    next: float | None = None
    recent: int = 0
    """Uses within the window."""
    busy: bool = False
    """Somebody is inside a pass."""
    moved: float | None = None
    """When it last moved, or failed to."""
    stays: str = ""
    """Why it cannot move, or not now; "": it can."""

    @property
    def seconds(self) -> float:
        """To come back; 0 where no rate is known."""
        return self.missing_bytes * (self.seconds_per_byte or 0.0)

    @property
    def cost(self) -> float:
        """Relative cost of a byte: seconds, or where no rate is known, times that it moves."""
        moves = 2.0 if self.writes else 1.0
        return moves if self.seconds_per_byte is None else self.seconds_per_byte


def due(model: Model, now: float, window: float) -> float:
    """Seconds until a model is expected to be used; infinity: it never was.

    A use that is late by more than the usual time from one to the next is not expected any more.
    A model of which nothing is expected is likely to stay unused for as long as it has been, and
    for the share of `window` that its recent uses left to each.
    """
    if model.last is None:
        return math.inf
    if model.next is not None and now <= model.next + (model.gap or 0.0):
        return max(model.next - now, 0.0)
    return max(now - model.last, window / (model.recent + 1))


def _rank(model: Model, now: float, window: float) -> tuple[float, float, float, int, str]:
    """Sorts the one that is worth least first."""
    wait = due(model, now, window)
    idle = math.inf if model.last is None else now - model.last
    value = model.cost / max(wait, 1e-3)
    return (value, -idle, model.cost, -model.host_bytes, model.model_id)


def presses(memory: Memory, config: OffloadConfig, pressed: bool) -> bool:
    """Have models to give? Once it has begun, until `restore_threshold` is reached."""
    least = config.restore_threshold if pressed else config.offload_threshold
    return memory.usage > least if pressed else memory.usage >= least


def plan_offloads(
    memory: Memory, models: Sequence[Model], config: OffloadConfig, now: float, pressed: bool
) -> dict[str, OffloadDecision]:
    """Decide for each model whether it gives its memory up.

    Parameters
    ----------
    memory : Memory
    models : sequence of Model
        Of one without a size the rank alone decides.
    config : OffloadConfig
    now : float
        Of the clock of the models' times.
    pressed : bool
        What `presses` said of this memory.

    Returns
    -------
    dict
        By id: "offload" or "none", the one that is worth least first.
    """
    want, why, latest = wanted(memory, config, pressed)
    decisions: dict[str, OffloadDecision] = {}
    gone: list[str] = []
    for model in sorted(models, key=lambda model: _rank(model, now, config.usage_window)):
        against = _against(model, config, now) or _needless(model, config, now, want, latest, gone)
        if not against and want > 0:
            reason = f"{why}; {model.model_id!r} is worth least: {_told(model, now)}"
            decisions[model.model_id] = OffloadDecision(
                action="offload",
                model_id=model.model_id,
                reason=reason,
                nbytes=model.host_bytes,
                usage=memory.usage,
                at=now,
            )
            want -= model.host_bytes
            gone.append(model.model_id)
        else:
            decisions[model.model_id] = OffloadDecision(
                action="none",
                model_id=model.model_id,
                reason=f"{against or why}; {memory}" if against else why,
                usage=memory.usage,
                at=now,
            )
    return decisions


def wanted(memory: Memory, config: OffloadConfig, pressed: bool) -> tuple[int, str, float]:
    """Bytes that have to go, why, and by when."""
    begins, ends = config.offload_threshold, config.restore_threshold
    if pressed:
        want = max(memory.used - int(ends * memory.total), 1)
        edge = f"at or above offload_threshold {format_share(begins)}"
        if memory.usage < begins:
            edge = f"still above restore_threshold {format_share(ends)}"
        return want, f"{memory}, {edge}, {format_size(want)} too many", 0.0
    seconds = memory.seconds_until(begins)
    if seconds > HORIZON or memory.slope is None:
        return 0, f"{memory}, below offload_threshold {format_share(begins)}", math.inf
    want = max(int(memory.slope * (HORIZON - seconds)), 1)
    why = (
        f"{memory}, growing by {format_size(memory.slope)} a second: in {seconds:.1f} s it "
        f"reaches offload_threshold {format_share(begins)}"
    )
    return want, why, seconds


def _against(model: Model, config: OffloadConfig, now: float) -> str:
    """What speaks against moving a model at all; "": nothing."""
    if not config.enable_auto_offload:
        return "automatic offloading is off (enable_auto_offload=False)"
    if model.stays:
        return model.stays
    if model.busy:
        return f"{model.model_id!r} is in use"
    if model.moved is not None and now - model.moved < config.min_offload_interval:
        return (
            f"the last move of {model.model_id!r} was {now - model.moved:.1f} s ago, less than "
            f"min_offload_interval {config.min_offload_interval:g} s"
        )
    return ""


def _needless(
    model: Model, config: OffloadConfig, now: float, want: int, latest: float, gone: list[str]
) -> str:
    """Why a model may stay though memory has to go; "": it may not, or nothing has to."""
    if want <= 0:
        return f"{', '.join(map(repr, gone))} and no more have to give" if gone else ""
    if not model.host_bytes and model.missing_bytes:
        return f"nothing of {model.model_id!r} is in memory"
    wait = due(model, now, config.usage_window)
    if wait < latest < math.inf:
        return (
            f"{model.model_id!r} is expected to be used in {wait:.1f} s, before memory is short "
            f"in {latest:.1f} s"
        )
    return ""


def plan_restores(
    memory: Memory,
    models: Iterable[Model],
    config: OffloadConfig,
    now: float,
    room: int | None = None,
) -> dict[str, OffloadDecision]:
    """Decide for each model that is not in memory whether it comes back ahead of its use.

    Parameters
    ----------
    room : int, optional
        Bytes that another limit still allows; None: there is none.

    Returns
    -------
    dict
        By id: "none", "restore" or "stream", the one that is used next first.
    """
    decisions: dict[str, OffloadDecision] = {}
    absent = [model for model in models if model.missing_bytes]
    for model in sorted(absent, key=lambda each: math.inf if each.next is None else each.next):
        against = _against(model, config, now) or _too_early(model, memory, config, now)
        if against:
            decisions[model.model_id] = OffloadDecision(
                action="none",
                model_id=model.model_id,
                reason=f"{against}; {memory}",
                usage=memory.usage,
                at=now,
            )
            continue
        decision = restore(model, memory, config, now, room)
        decisions[model.model_id] = decision
        memory = Memory(
            usage=memory.usage + decision.nbytes / memory.total,
            total=memory.total,
            slope=memory.slope,
        )
        room = None if room is None else room - decision.nbytes
    return decisions


def _begins(model: Model, now: float) -> float | None:
    """When a model is to begin to come back; None: when it is used next is not known."""
    if model.next is None or now > model.next + (model.gap or 0.0):
        return None
    return model.next - max(_LEAD * model.seconds, _LEAST_LEAD)


def comes_back(model: Model, now: float) -> float:
    """Seconds during which a model that is not in memory need not be looked at; 0: none."""
    if not model.missing_bytes:
        return math.inf
    begins = _begins(model, now)
    if begins is not None:
        return max(begins - now, 0.0)
    if model.busy or (model.last is not None and now - model.last < _AWAKE):
        return 0.0
    return math.inf


def _too_early(model: Model, memory: Memory, config: OffloadConfig, now: float) -> str:
    if memory.usage >= config.restore_threshold:
        return f"not below restore_threshold {format_share(config.restore_threshold)}"
    begins = _begins(model, now)
    if model.next is None or begins is None:
        return f"when {model.model_id!r} is used next is not known"
    if now < begins:
        return (
            f"{model.model_id!r} is expected to be used in {model.next - now:.1f} s, and takes "
            f"{model.seconds:.2f} s to come back"
        )
    return ""


def restore(
    model: Model,
    memory: Memory,
    config: OffloadConfig,
    now: float,
    room: int | None = None,
    idle: int = 0,
) -> OffloadDecision:
    """How a model that is asked for comes back: as a whole, or streaming.

    Parameters
    ----------
    room : int, optional
        Bytes that another limit still allows; None: there is none.
    idle : int
        Bytes in memory that give way to it by themselves.
    """
    free = memory.room(config.offload_threshold) + idle
    fits = model.missing_bytes < free
    limit = f"offload_threshold {format_share(config.offload_threshold)}"
    if room is not None and room < free:
        free, limit = max(room, 0), "the budget"
        fits = model.missing_bytes <= free
    need = f"{format_size(model.missing_bytes)} of {model.model_id!r}"
    if fits and not model.missing_bytes:
        reason = f"all of {model.model_id!r} is in memory, and stays from now on"
    elif fits:
        after = (memory.used + max(model.missing_bytes - idle, 0)) / memory.total
        then = f"{format_share(after)} of memory are in use then"
        reason = f"{need} come back; {then}, within {limit}"
    else:
        reason = f"{need} do not fit: {memory}, {format_size(free)} free below {limit}; it streams"
    return OffloadDecision(
        action="restore" if fits else "stream",
        model_id=model.model_id,
        reason=reason,
        nbytes=model.missing_bytes if fits else free,
        usage=memory.usage,
        at=now,
    )


def _told(model: Model, now: float) -> str:
    """A model's numbers, for a reason."""
    parts = [format_size(model.host_bytes)] if model.host_bytes else []
    if model.last is None:
        parts.append("never used")
    else:
        parts.append(f"last used {now - model.last:.1f} s ago")
        if model.next is not None and model.next >= now:
            parts.append(f"expected again in {model.next - now:.1f} s")
    if model.seconds_per_byte is not None and model.host_bytes:
        seconds = model.seconds_per_byte * model.host_bytes
        parts.append(f"back within {seconds:.2f} s")
    return ", ".join(parts)
