"""AdvancedMemoryConfig: the settings of a memory manager and its parts, flat or nested."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Final, Self

from omnimem._settings import DEFAULT, Found, Settings, build, from_environment, nearest, read_toml
from omnimem.config import CacheConfig, MonitorConfig, OffloadConfig, _flag, parse_size
from omnimem.pools import MemoryConfig

__all__ = ["AdvancedMemoryConfig"]

_LEAST_BUDGET = 1 << 20

PARTS: Final[Mapping[str, type[Settings]]] = {
    "memory": MemoryConfig,
    "cache": CacheConfig,
    "offload": OffloadConfig,
    "monitor": MonitorConfig,
}
MIRRORS: Final[Mapping[str, tuple[str, str]]] = {
    "enable_memory_pools": ("memory", "enable_memory_pools"),
    "pool_sizes": ("memory", "pool_sizes"),
    "cache_size_gb": ("cache", "max_size_gb"),
    "cache_compression": ("cache", "enable_compression"),
    "enable_auto_offload": ("offload", "enable_auto_offload"),
    "offload_threshold": ("offload", "offload_threshold"),
    "restore_threshold": ("offload", "restore_threshold"),
    "enable_monitoring": ("monitor", "enable_monitoring"),
    "monitoring_interval": ("monitor", "monitoring_interval"),
    "alert_thresholds": ("monitor", "alert_thresholds"),
}
"""Flat fields, and the part and field that each of them shows."""


class _OfItsPart:
    """What a flat field is until the parts are made."""

    def __repr__(self) -> str:
        return "<that of its part>"


_PART: Any = _OfItsPart()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvancedMemoryConfig(Settings):
    """What an `AdvancedMemoryManager` and its parts may do.

    Settings may be given flat, or a part whole; a flat field given besides its part must say the
    same. Every flat field can be read, however it was given.
    """

    enable_memory_pools: bool = _PART
    """`MemoryConfig.enable_memory_pools`, True by default."""

    pool_sizes: Mapping[str, int | str] = _PART
    """`MemoryConfig.pool_sizes`: 8 GiB of "cpu" and 16 GiB of "cuda" by default, as limits."""

    enable_weight_cache: bool = True
    """False: there is no `weight_cache`."""

    cache_size_gb: float = _PART
    """`CacheConfig.max_size_gb`, 4.0 by default."""

    cache_compression: bool = _PART
    """`CacheConfig.enable_compression`, False by default."""

    enable_auto_offload: bool = _PART
    """`OffloadConfig.enable_auto_offload`, True by default."""

    offload_threshold: float = _PART
    """`OffloadConfig.offload_threshold`, 0.8 by default."""

    restore_threshold: float = _PART
    """`OffloadConfig.restore_threshold`, 0.6 by default."""

    enable_monitoring: bool = _PART
    """`MonitorConfig.enable_monitoring`, True by default."""

    monitoring_interval: float = _PART
    """`MonitorConfig.monitoring_interval`, 1.0 seconds by default."""

    alert_thresholds: Mapping[str, float] = _PART
    """`MonitorConfig.alert_thresholds`: "warning" from 0.75, "critical" from 0.9 by default."""

    memory: MemoryConfig = _PART
    """The pools."""

    cache: CacheConfig = _PART
    """The weight cache."""

    offload: OffloadConfig = _PART
    """The offloader."""

    monitor: MonitorConfig = _PART
    """The monitor."""

    budget: int | str | None = None
    """Bytes of RAM for all models and cached weights together; None: what the machine or its
    cgroup leaves."""

    def __post_init__(self) -> None:
        _flag("enable_weight_cache", self.enable_weight_cache)
        if self.budget is not None:
            budget = parse_size(self.budget, "budget")
            if budget < _LEAST_BUDGET:
                raise ValueError(f"budget={budget} is below the least, {_LEAST_BUDGET} (1 MiB)")
            object.__setattr__(self, "budget", budget)
        for name, cls in PARTS.items():
            object.__setattr__(self, name, self._part(name, cls))
        for flat, (name, field) in MIRRORS.items():
            object.__setattr__(self, flat, getattr(getattr(self, name), field))

    def _part(self, name: str, cls: type[Settings]) -> Settings:
        """A part as given, compared with the flat fields; or made of these."""
        flat = {
            field: (given, getattr(self, given))
            for given, (part, field) in MIRRORS.items()
            if part == name and getattr(self, given) is not _PART
        }
        part = getattr(self, name)
        if part is _PART:
            found = {field: value for field, (_, value) in flat.items()}
            return _made(cls, found, {field: given for field, (given, _) in flat.items()})
        if not isinstance(part, cls):
            raise TypeError(f"{name} must be a {cls.__name__}, not {type(part).__name__}")
        for field, (given, value) in flat.items():
            theirs = getattr(part, field)
            if value != theirs and _normal(cls, field, value) != theirs:
                raise ValueError(
                    f"{given}={value!r} differs from {name}.{field}={theirs!r}: give it once"
                )
        return part

    def __reduce__(self) -> tuple[Any, ...]:
        own = ("enable_weight_cache", "budget", *PARTS)
        return _restore, ({name: getattr(self, name) for name in own},)

    # -- from elsewhere

    @classmethod
    def from_env(cls, **overrides: Any) -> Self:
        """Settings from the environment; `overrides`, flat fields or whole parts, win.

        A setting of a part has the same variable as with the part's own `from_env`.

        Raises
        ------
        ValueError
            A variable holds what its field refuses; the message names the variable.
        """
        return cls._collected(None, overrides)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **overrides: Any) -> Self:
        """Settings from a TOML file; the environment wins over it, `overrides` over both.

        Parameters
        ----------
        path : path
            Flat fields at the top, the parts' own in the tables [memory], [cache], [offload] and
            [monitor].

        Raises
        ------
        OSError
            The file cannot be read.
        ValueError
            It is no TOML, has a key that is none, or a value that its field refuses; the message
            names the file and the key.
        """
        return cls._collected(path, overrides)

    @classmethod
    def _collected(cls, path: str | os.PathLike[str] | None, overrides: dict[str, Any]) -> Self:
        made: Self = assemble(collect(path, overrides), cls)
        return made


def _restore(values: dict[str, Any]) -> AdvancedMemoryConfig:
    return AdvancedMemoryConfig(**values)


def _made(cls: type[Settings], values: dict[str, Any], given: dict[str, str]) -> Settings:
    """A part of flat fields; an error speaks of them by their flat names."""
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        text = str(error)
        for field, flat in given.items():
            text = text.replace(f"{field}=", f"{flat}=") if field not in flat else text
        raise type(error)(text) from None


def _normal(cls: type[Settings], field: str, value: Any) -> Any:
    """A value as its part keeps it."""
    try:
        return getattr(cls(**{field: value}), field)
    except (ValueError, TypeError):
        return value


# -- where each setting comes from -----------------------------------------------------------------


def collect(
    path: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None
) -> dict[str, Found]:
    """What a file, the environment and the caller say, by "budget" or "PART.FIELD"."""
    found = {} if path is None else _from_file(os.fspath(path), read_toml(path))
    found |= from_environment(AdvancedMemoryConfig, {*MIRRORS, *PARTS})
    for name, part in PARTS.items():
        found |= {f"{name}.{field}": each for field, each in from_environment(part).items()}
    for key, value in (overrides or {}).items():
        if key in PARTS:
            found = {name: each for name, each in found.items() if not name.startswith(f"{key}.")}
        found[key] = Found(value, "argument")
    return found


def assemble(found: Mapping[str, Found], cls: type[AdvancedMemoryConfig]) -> Any:
    """Make the configuration of what was collected."""
    whole: dict[str, Found] = {key: each for key, each in found.items() if "." not in key}
    for name, part in PARTS.items():
        fields = {
            key.removeprefix(f"{name}."): each
            for key, each in found.items()
            if key.startswith(f"{name}.")
        }
        for flat, (owner, field) in MIRRORS.items():
            if owner == name and flat in whole and name not in whole:
                fields[field] = whole.pop(flat)
        if name not in whole and fields:
            whole[name] = Found(build(part, fields), DEFAULT)
    return build(cls, whole)


def _from_file(path: str, content: Mapping[str, Any]) -> dict[str, Found]:
    found: dict[str, Found] = {}
    own = {f.name for f in dataclasses.fields(AdvancedMemoryConfig)} - {*MIRRORS, *PARTS}

    def put(key: str, name: str, value: Any) -> None:
        shown = f"{path}: {name}={value!r}"
        if key in found and found[key].value != value:
            raise ValueError(f"{shown} differs from {found[key].shown.partition(': ')[2]}")
        found[key] = Found(value, f"file {path}", shown)

    for name, value in content.items():
        if name in PARTS:
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {name}={value!r} must be a table, [{name}]")
            known = [f.name for f in dataclasses.fields(PARTS[name])]  # type: ignore[arg-type]
            for field, inner in value.items():
                if field not in known:
                    raise ValueError(
                        f"{path}: [{name}] has no key {field!r}; {nearest(field, known)}"
                    )
                put(f"{name}.{field}", f"{name}.{field}", inner)
        elif name in MIRRORS:
            put(".".join(MIRRORS[name]), name, value)
        elif name in own:
            put(name, name, value)
        else:
            raise ValueError(f"{path}: no key {name!r}; {nearest(name, {*own, *MIRRORS, *PARTS})}")
    return found
