"""omnimem: large models in less memory than their weights need."""

from __future__ import annotations

from omnimem import checkpoint as checkpoint
from omnimem import metrics as metrics
from omnimem._core import Lease, Ticket, Window
from omnimem.advanced_config import AdvancedMemoryConfig
from omnimem.alerts import Alert, AlertHandle, AlertSystem
from omnimem.block import MemoryBlock, MemoryRegionType
from omnimem.cache import ModelWeightCache
from omnimem.config import (
    CacheConfig,
    MonitorConfig,
    OffloadConfig,
    StoreConfig,
    format_size,
    parse_size,
)
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
from omnimem.manager import AdvancedMemoryManager
from omnimem.monitor import MemoryMonitor, MemoryPressure, MemoryStats
from omnimem.nvme import NVMeOptimizer
from omnimem.offload import AutomaticOffloader, OffloadDecision
from omnimem.pools import BlockSnapshot, MemoryConfig, MemoryPoolManager, PoolStats
from omnimem.pressure import MemoryPressureLevel, MemoryPressureMonitor
from omnimem.simulation import SimulationResult, simulate
from omnimem.store import BlockInfo, Event, GroupStats, Store, StoreStats, TierStats
from omnimem.swap import (
    AdvancedMemorySwapper,
    Cache,
    SwapAlgorithm,
    SwapStats,
)
from omnimem.swap_algorithms import (
    AdaptiveSwapAlgorithm,
    BaseSwapAlgorithm,
    ClockSwapAlgorithm,
    LRUSwapAlgorithm,
)
from omnimem.swap_codec import CompressionManager
from omnimem.swap_setup import (
    create_advanced_memory_swapper,
    create_optimized_swapping_system,
    integrate_with_qwen3_vl,
    integrate_with_qwen3_vl_swapping,
)
from omnimem.tracking import Span, Tracked, track

__version__ = "0.1.0"

__all__ = [
    "AdaptiveSwapAlgorithm",
    "AdvancedMemoryConfig",
    "AdvancedMemoryManager",
    "AdvancedMemorySwapper",
    "Alert",
    "AlertHandle",
    "AlertSystem",
    "AutomaticOffloader",
    "BaseSwapAlgorithm",
    "BlockInfo",
    "BlockSnapshot",
    "BusyError",
    "Cache",
    "CacheConfig",
    "ClockSwapAlgorithm",
    "ClosedError",
    "CompressionManager",
    "CorruptError",
    "DeviceError",
    "DiskFullError",
    "Error",
    "Event",
    "FormatError",
    "GroupStats",
    "IOFailure",
    "LRUSwapAlgorithm",
    "Lease",
    "LimitError",
    "MemoryBlock",
    "MemoryConfig",
    "MemoryMonitor",
    "MemoryPoolManager",
    "MemoryPressure",
    "MemoryPressureLevel",
    "MemoryPressureMonitor",
    "MemoryRegionType",
    "MemoryStats",
    "ModelWeightCache",
    "MonitorConfig",
    "NVMeOptimizer",
    "OffloadConfig",
    "OffloadDecision",
    "PoolStats",
    "SimulationResult",
    "Span",
    "Store",
    "StoreConfig",
    "StoreStats",
    "SwapAlgorithm",
    "SwapStats",
    "Ticket",
    "TierStats",
    "Tracked",
    "Window",
    "create_advanced_memory_swapper",
    "create_optimized_swapping_system",
    "format_size",
    "integrate_with_qwen3_vl",
    "integrate_with_qwen3_vl_swapping",
    "parse_size",
    "simulate",
    "track",
]
