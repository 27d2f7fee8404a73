"""Configuration: frozen dataclasses, checked at construction, and sizes as people write them."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from omnimem._settings import Settings

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
_MAX = 2**62


def parse_size(size: int | str, what: str = "size") -> int:
    """Bytes from an int or a string such as "2GiB", "512 MB" or "4096".

    Raises
    ------
    TypeError
        Neither an int nor a str.
    ValueError
        Negative, too large, or not a size.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        unit = match and _UNITS.get(match[2].lower())
        if not match or not unit:
            raise ValueError(f"{what}={size!r} is no size: write bytes or a number with KiB..TiB")
        value = int(match[1]) * unit if match[1].isdigit() else int(float(match[1]) * unit)
    elif isinstance(size, bool) or not hasattr(size, "__index__"):
        raise TypeError(f"{what} must be an int (bytes) or a str such as '2GiB', not {size!r}")
    else:
        value = size.__index__()
    if not 0 <= value <= _MAX:
        raise ValueError(f"{what}={size!r} must lie between 0 and {_MAX} bytes")
    return value


def format_size(nbytes: float) -> str:
    """Bytes for people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"


def format_share(share: float, decimals: int = 1) -> str:
    """A part of 1 for people: "3.2 %"."""
    return f"{100 * share:.{decimals}f} %"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreConfig(Settings):
    """What a `Store` may use. Sizes are bytes, or strings such as "2GiB" (kept as bytes)."""

    host_limit: int | str = "2GiB"
    """RAM for blocks: everything mapped counts. The process grows by this and its bookkeeping."""

    disk_limit: int | str = "8GiB"
    """Most bytes of the nameless swap file, grown when needed. 0: no block without an origin
    is ever moved out."""

    directory: str | os.PathLike[str] | None = None
    """Where the swap file lives; None: $XDG_CACHE_HOME/omnimem or ~/.cache/omnimem."""

    io_backend: str = "auto"
    """"auto" (io_uring if a real probe passes, else threads), "uring" or "threads"."""

    verify: str = "always"
    """"always": each later fill is compared with the checksum of the first; "first": only the
    first re-fill of a block is."""

    io_window: int | str = "16MiB"
    """Bytes in flight: what keeps a disk busy."""

    io_request: int | str = "1MiB"
    """Bytes of one request, 64 KiB to 1 MiB, a multiple of 4 KiB."""

    io_threads: int = 8
    """Threads of the thread back end."""

    def __post_init__(self) -> None:
        host = self._to_bytes("host_limit")
        self._to_bytes("disk_limit")
        window = self._to_bytes("io_window")
        request = self._to_bytes("io_request")
        if host < 1 << 20:
            raise ValueError(f"host_limit={host} is below the least, 1 MiB")
        _one_of("io_backend", self.io_backend, ("auto", "uring", "threads"))
        _one_of("verify", self.verify, ("always", "first"))
        if not (64 << 10) <= request <= (1 << 20) or request % 4096:
            raise ValueError(
                f"io_request={request} must be a multiple of 4096 from 65536 to 1048576"
            )
        if not request <= window <= (1 << 30):
            raise ValueError(f"io_window={window} must lie between io_request={request} and 1 GiB")
        if not 1 <= self.io_threads <= 64:
            raise ValueError(f"io_threads={self.io_threads} must lie between 1 and 64")
        if self.directory is not None:
            object.__setattr__(self, "directory", os.fspath(self.directory))

    def _to_bytes(self, name: str) -> int:
        """Keep a size as bytes."""
        nbytes = parse_size(getattr(self, name), name)
        object.__setattr__(self, name, nbytes)
        return nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig(Settings):
    """How a `ModelWeightCache` keeps weights."""

    VARIABLES: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "max_size_gb": "OMNIMEM_CACHE_SIZE_GB",
            "enable_compression": "OMNIMEM_CACHE_COMPRESSION",
            "compression": "OMNIMEM_CACHE_CODING",
            "compression_ratio": "OMNIMEM_CACHE_COMPRESSION_RATIO",
            "eviction_batch_size": "OMNIMEM_CACHE_EVICTION_BATCH_SIZE",
            "access_count_threshold": "OMNIMEM_CACHE_ACCESS_COUNT_THRESHOLD",
            "policy": "OMNIMEM_CACHE_POLICY",
        }
    )

    max_size_gb: float = 4.0
    """GiB of memory for entries that have a name."""

    enable_compression: bool = False
    """Keep entries losslessly encoded, where that saves at least 5 %."""

    compression: str = "auto"
    """"fast", "balanced" (denser, slower), or "auto": "fast". Another one than "auto" turns
    `enable_compression` on."""

    compression_ratio: float = 0.5
    """Share of the size that planning assumes is left of an encoded entry before any is."""

    eviction_batch_size: int = 10
    """Entries that make way in one step, until other threads get their turn. Never more go than
    are in the way."""

    access_count_threshold: int = 1
    """Weights are cached the so-manieth time that they are put."""

    policy: str = "lru"
    """Who makes way: "lru" (exact), "clock", "s3fifo", "sieve" or "adaptive"."""

    def __post_init__(self) -> None:
        _positive_gib("max_size_gb", self.max_size_gb)
        _one_of("compression", self.compression, ("auto", "fast", "balanced"))
        _one_of("policy", self.policy, ("lru", "clock", "s3fifo", "sieve", "adaptive"))
        if not 0.0 < self.compression_ratio <= 1.0:
            raise ValueError(
                f"compression_ratio={self.compression_ratio!r} must lie above 0.0 and not above 1.0"
            )
        for name in ("eviction_batch_size", "access_count_threshold"):
            if not 1 <= parse_size(getattr(self, name), name) <= 2**31:
                raise ValueError(f"{name}={getattr(self, name)!r} must lie between 1 and {2**31}")
        if self.compression != "auto":
            object.__setattr__(self, "enable_compression", True)

    @property
    def max_size(self) -> int:
        """Bytes of `max_size_gb`."""
        return int(self.max_size_gb * 2**30)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffloadConfig(Settings):
    """When an `AutomaticOffloader` moves models. Shares are of the memory in use, 0..1."""

    enable_auto_offload: bool = True
    """False: nothing moves by itself, and nothing is said to be better moved."""

    offload_threshold: float = 0.8
    """Share from which on models give way."""

    restore_threshold: float = 0.6
    """Share down to which they do, and below which one comes back ahead of its next use."""

    min_offload_interval: float = 10.0
    """Seconds from one move of a model to the next that nobody asked for."""

    usage_window: float = 300.0
    """Seconds of uses that count as recent."""

    def __post_init__(self) -> None:
        _flag("enable_auto_offload", self.enable_auto_offload)
        for name in ("offload_threshold", "restore_threshold"):
            _share(name, getattr(self, name))
        _seconds("min_offload_interval", self.min_offload_interval, least=0.0)
        _seconds("usage_window", self.usage_window)
        if self.restore_threshold >= self.offload_threshold:
            raise ValueError(
                f"restore_threshold={self.restore_threshold!r} must lie below "
                f"offload_threshold={self.offload_threshold!r}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorConfig(Settings):
    """How a `MemoryMonitor` looks at memory."""

    enable_monitoring: bool = True
    """False: nothing looks by itself, only when asked."""

    monitoring_interval: float = 1.0
    """Seconds between two looks at most; the shorter memory is, the more often."""

    history_size: int = 1000
    """Records that `history` keeps."""

    alert_thresholds: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"warning": 0.75, "critical": 0.9}
    )
    """Shares of memory in use, 0..1, from which on pressure is "warning" and "critical"."""

    def __post_init__(self) -> None:
        _flag("enable_monitoring", self.enable_monitoring)
        _seconds("monitoring_interval", self.monitoring_interval)
        if not 1 <= parse_size(self.history_size, "history_size") <= 2**31:
            raise ValueError(f"history_size={self.history_size!r} must lie between 1 and {2**31}")
        shares = dict(self.alert_thresholds)
        if set(shares) != {"warning", "critical"}:
            raise ValueError(
                f"alert_thresholds={shares!r} must have the keys 'warning' and 'critical'"
            )
        for name, value in shares.items():
            _share(f"alert_thresholds[{name!r}]", value)
        if shares["warning"] >= shares["critical"]:
            raise ValueError(
                f"alert_thresholds: warning={shares['warning']!r} must lie below "
                f"critical={shares['critical']!r}"
            )
        object.__setattr__(self, "alert_thresholds", MappingProxyType(shares))


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    return float(value)


def _share(name: str, value: object) -> None:
    if not 0.0 < _number(name, value) <= 1.0:
        raise ValueError(f"{name}={value!r} must lie above 0.0 and not above 1.0")


def _seconds(name: str, value: object, least: float = 0.001) -> None:
    if not least <= _number(name, value) < math.inf:
        raise ValueError(f"{name}={value!r} must be seconds, at least {least}")


def _positive_gib(name: str, value: float) -> None:
    """Check GiB that stand for at least one page of memory."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of GiB, not {value!r}")
    if not 4096 <= value * 2**30 <= _MAX:
        raise ValueError(f"{name}={value!r} GiB must lie between 4096 bytes and {_MAX} bytes")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
