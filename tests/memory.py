"""Memory as short as a test wants it."""

from __future__ import annotations

from omnimem import AdvancedMemorySwapper


class Memory:
    """Stands for `_core.memory`: the blocks of one swapper and `others` bytes are in use."""

    def __init__(self) -> None:
        self.total = 1 << 30
        self.others = 0
        self.swapper: AdvancedMemorySwapper | None = None

    def __call__(self) -> tuple[int, int, str]:
        held = 0
        if self.swapper is not None:
            held = self.swapper.store.group_stats("swap").host_bytes
        return self.total, self.total - self.others - held, "system"
