"""What a cache would have missed: access traces through the policies that stores use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omnimem import _core
from omnimem.config import parse_size

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["SimulationResult", "simulate"]


@dataclass(frozen=True)
class SimulationResult:
    """What a trace cost."""

    requests: int
    misses: int
    """Requests whose object was not there, first ones included."""
    requested_bytes: int
    missed_bytes: int
    leaders: dict[str, float] | None = None
    """Of "adaptive": the share of re-uses for which each expert led; None of other policies."""

    @property
    def miss_ratio(self) -> float:
        """Misses / requests; 0.0 without requests."""
        return self.misses / self.requests if self.requests else 0.0

    @property
    def byte_miss_ratio(self) -> float:
        """Missed bytes / requested bytes; 0.0 without bytes."""
        return self.missed_bytes / self.requested_bytes if self.requested_bytes else 0.0


def simulate(
    ids: Buffer | Any,
    capacity: int | str,
    policy: str,
    sizes: Buffer | Any | None = None,
) -> SimulationResult:
    """Run a trace of accesses through a cache.

    The code that chooses is the code that the groups of a store run (`Store.group`), so that what
    is judged here is what ships.

    Parameters
    ----------
    ids : buffer of integers, shape (n,)
        The object of each request: a NumPy array, `array.array`, ... None may be negative.
    capacity : int or str
        Objects when `sizes` is None, else bytes ("512MiB").
    policy : {"lru", "clock", "s3fifo", "sieve", "adaptive", "belady"}
        "belady" knows the future: nobody misses fewer objects of equal size.
    sizes : buffer of integers, shape (n,), optional
        Bytes of the object of each request. An object larger than the capacity is missed each
        time and never kept.

    Returns
    -------
    SimulationResult

    Raises
    ------
    ValueError
        An unknown policy, a capacity of 0, a negative id, sizes that are not as many as the ids,
        an object with two sizes.
    TypeError
        `ids` or `sizes` are no buffer of integers in one row.

    Notes
    -----
    The GIL is released. LRU and CLOCK are those of the textbooks; S3-FIFO is that of Yang et al.
    (SOSP 2023), SIEVE that of Zhang et al. (NSDI 2024), Belady's that of 1966.
    """
    room = parse_size(capacity, "capacity")
    requests, misses, nbytes, missed, led = _core.simulate(ids, room, policy, sizes)
    total = sum(led.values())
    leaders = {name: count / total for name, count in led.items()} if total else None
    return SimulationResult(requests, misses, nbytes, missed, leaders)
