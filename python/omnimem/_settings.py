"""Where settings come from: defaults, a TOML file, the environment, the caller; the last one wins.

A setting is a field of a configuration class. Every one has one environment variable: `OMNIMEM_`
and the field in capitals, but for those that `VARIABLES` of its class names otherwise.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Self

__all__ = ["DEFAULT", "Found", "Settings", "build", "from_environment", "nearest", "read_toml"]

DEFAULT = "default"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_NONE = ("", "none")


@dataclass(frozen=True)
class Found:
    """The value of one setting, and who gave it."""

    value: Any
    source: str
    """"default", "file PATH", "environment variable NAME", or "argument"."""
    shown: str = ""
    """How an error names it: "OMNIMEM_VERIFY='maybe'"; "": an error speaks for itself."""


class Settings:
    """Base of the configuration classes: frozen dataclasses, checked when they are made."""

    VARIABLES: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Names of variables, by field, that are not `OMNIMEM_` and the field in capitals."""

    @classmethod
    def from_env(cls, **overrides: Any) -> Self:
        """Fields from the environment; `overrides` win.

        A variable is called `OMNIMEM_` and the field in capitals, or as `VARIABLES` says. Flags are
        1 or 0 (true, yes, on, ...), tables "cpu=8GiB,cuda=16GiB".

        Raises
        ------
        ValueError
            A variable holds what its field refuses; the message names the variable.
        """
        found = from_environment(cls, overrides)
        found |= {name: Found(value, "argument") for name, value in overrides.items()}
        made: Self = build(cls, found)
        return made

    @classmethod
    def variable(cls, field: str) -> str:
        """Name of the environment variable of a field."""
        return cls.VARIABLES.get(field, f"OMNIMEM_{field.upper()}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), _plain(self))


def _restore(cls: type[Any], values: dict[str, Any]) -> Any:
    return cls(**values)


def _plain(settings: Any) -> dict[str, Any]:
    """Fields as they can be copied and pickled: read-only tables are made dicts."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    return {
        name: dict(value) if isinstance(value, MappingProxyType) else value
        for name, value in values.items()
    }


def build(cls: type[Any], found: Mapping[str, Found]) -> Any:
    """Make a configuration from what was found; an error names whoever gave the values.

    Raises
    ------
    ValueError
        The class refuses a value from a file or the environment.
    """
    try:
        return cls(**{name: each.value for name, each in found.items()})
    except (ValueError, TypeError) as error:
        text = str(error)
        to_blame = [
            each.shown
            for name, each in found.items()
            if each.shown and re.search(rf"\b{name}\b", text)
        ]
        if not to_blame:
            raise
        raise ValueError(f"{', '.join(to_blame)}: {text}") from None


# -- the environment -------------------------------------------------------------------------------


def from_environment(cls: type[Settings], without: Iterable[str] = ()) -> dict[str, Found]:
    """What the environment says of a class's fields, but for some of them."""
    found = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # every subclass is one
        variable = cls.variable(field.name)
        text = os.environ.get(variable)
        if text is None or field.name in without or not field.init:
            continue
        shown = f"{variable}={text!r}"
        try:
            value = _parse(text, hints[field.name])
        except ValueError as error:
            raise ValueError(f"{shown}: {error}") from None
        found[field.name] = Found(value, f"environment variable {variable}", shown)
    return found


def _parse(text: str, hint: Any) -> Any:
    """A value as a field's type has it; text where the type allows text."""
    if typing.get_origin(hint) is Mapping:
        return _parse_table(text, typing.get_args(hint)[1])
    kinds = typing.get_args(hint) or (hint,)
    if type(None) in kinds and text.strip().lower() in _NONE:
        return None
    if bool in kinds:
        return _parse_flag(text)
    if str in kinds:
        return text
    kind = float if float in kinds else int
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"is no {'number' if kind is float else 'whole number'}") from None


def _parse_flag(text: str) -> bool:
    word = text.strip().lower()
    if word not in (*_TRUE, *_FALSE):
        raise ValueError(f"is neither yes ({', '.join(_TRUE)}) nor no ({', '.join(_FALSE)})")
    return word in _TRUE


def _parse_table(text: str, hint: Any) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        key, equals, value = map(str.strip, item.partition("="))
        if not equals or not key:
            raise ValueError(f"{item!r} is no KEY=VALUE; write them as KEY=VALUE,KEY=VALUE")
        if key in table:
            raise ValueError(f"{key!r} comes twice")
        table[key] = _parse(value, hint)
    return table


# -- files -----------------------------------------------------------------------------------------


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a TOML file.

    Raises
    ------
    OSError
        It cannot be read.
    ValueError
        It is no TOML; the message says where.
    """
    with open(path, "rb") as file:
        try:
            return tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{os.fspath(path)}: is no TOML: {error}") from None


def nearest(key: str, known: Iterable[str]) -> str:
    """What to tell of an unknown key: the known one that is nearest, or all."""
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"
