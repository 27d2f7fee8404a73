"""Configuration: frozen dataclasses, checked at construction, and sizes as people write them."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any, Self

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreConfig:
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

    @classmethod
    def from_env(cls, **overrides: Any) -> Self:
        """Fields from OMNIMEM_HOST_LIMIT, OMNIMEM_IO_BACKEND, ...; `overrides` win.

        Raises
        ------
        ValueError
            A variable holds what its field refuses; the message names the variable.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            text = os.environ.get(f"OMNIMEM_{field.name.upper()}")
            if text is None or field.name in overrides:
                continue
            try:
                values[field.name] = int(text) if field.name == "io_threads" else text
                cls(**{field.name: values[field.name]})
            except (ValueError, TypeError) as error:
                raise ValueError(f"OMNIMEM_{field.name.upper()}={text!r}: {error}") from None
        return cls(**values, **overrides)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How a `ModelWeightCache` keeps weights."""

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


def _positive_gib(name: str, value: float) -> None:
    """Check GiB that stand for at least one page of memory."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of GiB, not {value!r}")
    if not 4096 <= value * 2**30 <= _MAX:
        raise ValueError(f"{name}={value!r} GiB must lie between 4096 bytes and {_MAX} bytes")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
