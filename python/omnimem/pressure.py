"""Memory pressure: how much of what this process may have is in use, and where that is going."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from typing import Literal

from omnimem import _core

__all__ = ["MemoryPressureLevel", "MemoryPressureMonitor"]

_Thresholds = tuple[float, float, float]


class MemoryPressureLevel(Enum):
    """How short memory is."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"


_LEVELS = tuple(MemoryPressureLevel)
_TRENDS: dict[int, Literal["increasing", "decreasing", "stable"]] = {
    1: "increasing",
    -1: "decreasing",
    0: "stable",
}


def _gpu_usage() -> float:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0.0
    memory = [torch.cuda.mem_get_info(device) for device in range(torch.cuda.device_count())]
    return max((1.0 - free / total for free, total in memory), default=0.0)


class MemoryPressureMonitor:
    """Levels of memory pressure, each entered at a threshold and left 5 points below it.

    Parameters
    ----------
    ram_thresholds, gpu_thresholds : (float, float, float)
        Shares in use, rising from above 0 to at most 1, at which MEDIUM, HIGH and CRITICAL
        begin. Both can be set later and take effect with the next question.

    Raises
    ------
    ValueError
        Thresholds that are not three, do not rise, or lie outside 0..1. Those there were stay.

    Notes
    -----
    RAM is that of the tightest of the machine and of every memory cgroup (versions 1 and 2) that
    the process lives in, by share in use; page cache that can be dropped at once is not in use.
    Nothing runs in between: each question reads the kernel's numbers anew, and is a sample of the
    trend. Thread safe.
    """

    def __init__(
        self,
        ram_thresholds: Sequence[float] = (0.7, 0.85, 0.95),
        gpu_thresholds: Sequence[float] = (0.7, 0.85, 0.95),
    ) -> None:
        self._ram = _core.Pressure(ram_thresholds)
        self._gpu = _core.Pressure(gpu_thresholds)

    @property
    def ram_thresholds(self) -> _Thresholds:
        """Shares of RAM in use at which MEDIUM, HIGH and CRITICAL begin."""
        return self._ram.thresholds

    @ram_thresholds.setter
    def ram_thresholds(self, value: Sequence[float]) -> None:
        self._ram.thresholds = value

    @property
    def gpu_thresholds(self) -> _Thresholds:
        """The same of GPU memory."""
        return self._gpu.thresholds

    @gpu_thresholds.setter
    def gpu_thresholds(self, value: Sequence[float]) -> None:
        self._gpu.thresholds = value

    def get_ram_pressure(self) -> tuple[MemoryPressureLevel, float]:
        """Level and share in use, 0..1, of the tightest limit on RAM."""
        total, available, _ = _core.memory()
        usage = 1.0 - available / total
        return _LEVELS[self._ram.feed(usage)], usage

    def get_gpu_pressure(self) -> tuple[MemoryPressureLevel, float]:
        """Level and share in use of the fullest GPU.

        As torch's CUDA runtime tells, once a program uses it; asking never starts it. (LOW, 0.0)
        without a GPU, and before.
        """
        usage = _gpu_usage()
        return _LEVELS[self._gpu.feed(usage)], usage

    def get_overall_pressure(self) -> tuple[MemoryPressureLevel, float]:
        """The worse of RAM and GPU: the higher level, at the same level the larger share."""
        return max(
            (self.get_ram_pressure(), self.get_gpu_pressure()),
            key=lambda pressure: (_LEVELS.index(pressure[0]), pressure[1]),
        )

    def get_pressure_trend(self) -> Literal["increasing", "decreasing", "stable"]:
        """Where RAM in use is going, by the line through the last minute's samples.

        "stable" with fewer than three samples, and while the line changes by less than a point
        of the total.
        """
        return _TRENDS[self._ram.trend()]
