"""omnimem: large models in less memory than their weights need."""

from __future__ import annotations

from omnimem.config import StoreConfig
from omnimem.errors import (
    BusyError,
    ClosedError,
    CorruptError,
    DeviceError,
    DiskFullError,
    Error,
    FormatError,
    IOFailure,
    LimitError,
)

__version__ = "0.1.0"
