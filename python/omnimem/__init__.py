"""omnimem: large models in less memory than their weights need."""

from __future__ import annotations

from omnimem import checkpoint as checkpoint
from omnimem._core import Lease, Ticket, Window
from omnimem.config import StoreConfig, format_size, parse_size
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
from omnimem.pressure import MemoryPressureLevel, MemoryPressureMonitor
from omnimem.simulation import SimulationResult, simulate
from omnimem.store import BlockInfo, Store, StoreStats, TierStats
from omnimem.swap_algorithms import (
    AdaptiveSwapAlgorithm,
    BaseSwapAlgorithm,
    ClockSwapAlgorithm,
    LRUSwapAlgorithm,
)

__version__ = "0.1.0"

__all__ = [
    "AdaptiveSwapAlgorithm",
    "BaseSwapAlgorithm",
    "BlockInfo",
    "BusyError",
    "ClockSwapAlgorithm",
    "ClosedError",
    "CorruptError",
    "DeviceError",
    "DiskFullError",
    "Error",
    "FormatError",
    "IOFailure",
    "LRUSwapAlgorithm",
    "Lease",
    "LimitError",
    "MemoryPressureLevel",
    "MemoryPressureMonitor",
    "SimulationResult",
    "Store",
    "StoreConfig",
    "StoreStats",
    "Ticket",
    "TierStats",
    "Window",
    "format_size",
    "parse_size",
    "simulate",
]
