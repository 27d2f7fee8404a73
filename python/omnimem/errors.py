"""The errors of omnimem: one class a kind of trouble, each also a standard class.

A message says what went wrong, with which item, the sizes and limits, and the next step.
An unknown name is a `KeyError`, a wrong value a `ValueError`, a wrong type a `TypeError`.
"""

from __future__ import annotations


class Error(Exception):
    """Base of all errors that omnimem defines."""


class LimitError(Error, MemoryError):
    """A byte limit does not allow the request.

    Attributes
    ----------
    need, used, limit : int
        Bytes asked for, in use, and allowed.
    which : str
        The limit that binds ("host", "group NAME", ...).
    """

    need: int = 0
    used: int = 0
    limit: int = 0
    which: str = ""


class DiskFullError(Error, OSError):
    """The swap area or its file system has no room; nothing was lost."""


class IOFailure(Error, OSError):  # noqa: N818 - the name is a contract
    """A read or write failed; `errno` and `filename` are set, offset and block in the text."""


class CorruptError(Error, OSError):
    """Bytes read differ from those stored, or an origin file changed since it was opened."""


class FormatError(Error, ValueError):
    """A checkpoint file breaks its format."""


class BusyError(Error, TimeoutError):
    """Something is still held when the deadline passes.

    Attributes
    ----------
    holders : tuple of str
        What holds it: names of blocks with the number of leases or exports.
    """

    holders: tuple[str, ...] = ()


class ClosedError(Error, RuntimeError):
    """The object was closed, or belongs to the process that forked this one."""


class DeviceError(Error, RuntimeError):
    """A device is not there or stopped working."""


__all__ = [
    "BusyError",
    "ClosedError",
    "CorruptError",
    "DeviceError",
    "DiskFullError",
    "Error",
    "FormatError",
    "IOFailure",
    "LimitError",
]
