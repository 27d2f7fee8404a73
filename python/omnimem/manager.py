"""AdvancedMemoryManager: pools, weight cache, offloader and monitor on one store, in one budget."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

from omnimem import _core
from omnimem._budget import Budget
from omnimem._offload_choice import OffloadDecision
from omnimem._storage import open_store
from omnimem.advanced_config import AdvancedMemoryConfig
from omnimem.block import MemoryBlock
from omnimem.cache import ModelWeightCache
from omnimem.config import format_share, format_size, parse_size
from omnimem.errors import ClosedError
from omnimem.monitor import MemoryMonitor, MemoryStats
from omnimem.offload import AutomaticOffloader
from omnimem.pools import MemoryPoolManager

if TYPE_CHECKING:
    from omnimem.store import Store

__all__ = ["AdvancedMemoryManager"]

log = logging.getLogger("omnimem.manager")

_LEAST = 1 << 20


class AdvancedMemoryManager:
    """Pools, a weight cache, an offloader and a monitor, started together; a context manager.

    Models, cached weights and what is offloaded share one store, and so one budget of memory: the
    model in use has it, idle ones give way, the one that is expected to be used last first. Pools
    have limits of their own.

    A pipeline calls it at four points:

    1. It begins: `AdvancedMemoryManager(config)` makes the pools, the cache and the offloader, and
       starts the monitor.
    2. It loads its models: `attach(model, model_dir)` has a model's weights read from its
       checkpoint, within the budget; `allocate_memory` and `cache_weights` are for what a pipeline
       keeps itself.
    3. It runs: attached models tell when they are used, by themselves. For others
       `record_model_usage`, `check_offload_needed`, `offload_model` and `restore_model` do.
       `get_cached_weights` finds weights of the cache.
    4. It ends: `cleanup`, or leaving the with block, lets everything go and logs the memory's
       statistics.

    Parameters
    ----------
    config : AdvancedMemoryConfig, optional

    Attributes
    ----------
    pool_manager : MemoryPoolManager
    weight_cache : ModelWeightCache or None
        None with `enable_weight_cache=False`: then nothing is cached, and nothing found.
    offloader : AutomaticOffloader
        Moves by itself unless `enable_auto_offload=False`.
    memory_monitor : MemoryMonitor
        Looks by itself unless `enable_monitoring=False`.
    store : Store
        Of all of them.
    """

    def __init__(self, config: AdvancedMemoryConfig | None = None) -> None:
        self.config = AdvancedMemoryConfig() if config is None else config
        if not isinstance(self.config, AdvancedMemoryConfig):
            raise TypeError(f"config must be an AdvancedMemoryConfig, not {type(config).__name__}")
        with ExitStack() as stack:
            self.store: Store = open_store(self._budget_bytes())
            stack.callback(self.store.close)
            self.pool_manager = MemoryPoolManager(self.config.memory)
            stack.callback(self.pool_manager.close)
            self.weight_cache: ModelWeightCache | None = None
            if self.config.enable_weight_cache:
                self.weight_cache = ModelWeightCache(config=self.config.cache, store=self.store)
                stack.callback(self.weight_cache.close)
            self.memory_monitor = MemoryMonitor(
                self.config.monitor,
                store=self.store,
                pools=self.pool_manager,
                cache=self.weight_cache,
            )
            stack.callback(self.memory_monitor.close)
            self.offloader = AutomaticOffloader(
                self.memory_monitor, self.config.offload, store=self.store
            )
            stack.callback(self.offloader.close)
            self._budget = Budget(
                self.offloader._models, self.offloader._most, self.offloader._note_quietly
            )
            self.offloader.start()
            stack.callback(self.offloader.stop)
            self.memory_monitor.start_monitoring()
            stack.callback(self.memory_monitor.stop_monitoring)
            stack.callback(self._log_statistics)
            self._stack = stack.pop_all()

    def _budget_bytes(self) -> int:
        if self.config.budget is not None:
            return parse_size(self.config.budget)
        return max(_core.memory()[1], _LEAST)

    # -- pools and cache -------------------------------------------------------------------------

    def allocate_memory(self, size: int | str, device: str = "cpu") -> MemoryBlock:
        """Memory of a pool (`MemoryPoolManager.allocate`)."""
        return self.pool_manager.allocate(size, device)

    def deallocate_memory(self, block: MemoryBlock) -> None:
        """Give a pool's memory back (`MemoryPoolManager.deallocate`)."""
        self.pool_manager.deallocate(block)

    def cache_weights(self, model_key: str, layer_name: str, weights: Any) -> bool:
        """Keep weights in the cache (`ModelWeightCache.put`); False without one."""
        cache = self.weight_cache
        return False if cache is None else cache.put(model_key, layer_name, weights)

    def get_cached_weights(self, model_key: str, layer_name: str) -> Any:
        """Weights of the cache (`ModelWeightCache.get`), or None."""
        cache = self.weight_cache
        return None if cache is None else cache.get(model_key, layer_name)

    # -- models ----------------------------------------------------------------------------------

    def attach(
        self,
        model: Any,
        model_dir: str | os.PathLike[str] | None = None,
        model_id: str | None = None,
        room: int | str | None = None,
    ) -> Any:
        """Put a model's weights under the budget.

        Parameters
        ----------
        model : torch.nn.Module or mapping of str to DLPack tensor
            Its parameters keep their identity.
        model_dir : path, optional
            Its checkpoint: weights are read from there when they are needed, and never written.
            Tensors may have the names that transformers renames when it loads them. Without, they
            are copied in, and written to disk when they have to go.
        model_id : str, optional
            What it is called; by default its class and a number.
        room : int or str, optional
            Most bytes of memory that it may have while it is used; by default the budget's.

        Returns
        -------
        The model; a module has its handle (`Attached`) as `model.omnimem`.
        """
        cap = None if room is None else parse_size(room, "room")
        self.offloader._attach(model, model_id, model_dir, cap, self._budget.used)
        return model

    def check_offload_needed(self, model_id: str) -> OffloadDecision:
        """Should this model give its memory up (`AutomaticOffloader.should_offload`)?"""
        return self.offloader.should_offload(model_id)

    def offload_model(
        self, model: Any, model_id: str | None = None, target_device: str = "cpu"
    ) -> OffloadDecision:
        """Let a model's memory go (`AutomaticOffloader.offload_model`)."""
        return self.offloader.offload_model(self._registered(model, model_id), target_device)

    def restore_model(
        self, model: Any, model_id: str | None = None, target_device: str | None = None
    ) -> OffloadDecision:
        """Bring a model back (`AutomaticOffloader.restore_model`)."""
        return self.offloader.restore_model(self._registered(model, model_id), target_device)

    def _registered(self, model: Any, model_id: str | None) -> str:
        if isinstance(model, str):
            return model
        return self.offloader.register(model, model_id)

    def record_model_usage(self, model_id: str) -> None:
        """Say that a model is used now (`AutomaticOffloader.record_usage`)."""
        self.offloader.record_usage(model_id)

    # -- the whole -------------------------------------------------------------------------------

    def get_memory_stats(self) -> MemoryStats:
        """Memory of the machine, the pools and the cache (`MemoryMonitor.get_memory_stats`)."""
        return self.memory_monitor.get_memory_stats()

    def cleanup(self) -> None:
        """Let everything go, the last part first, and log the statistics. Idempotent.

        Models without a checkpoint get their weights back as ordinary tensors; those with one are
        left without: `model.omnimem.detach()` before keeps them. Memory that views still hold goes
        with the last of them.
        """
        self._stack.close()

    def _log_statistics(self) -> None:
        try:
            stats = self.store.stats()
            cached = self.weight_cache.get_stats() if self.weight_cache is not None else None
        except ClosedError:
            return  # of a fork
        log.info(
            "memory at the end: peak %s of a budget of %s; read %s, written %s; %d models, "
            "%d moves; cache %s, hit rate %s",
            format_size(stats.host.peak_bytes),
            format_size(stats.host.limit_bytes),
            format_size(stats.read_bytes),
            format_size(stats.written_bytes),
            len(self.offloader._models),
            len([each for each in self.offloader.decisions if each]),
            "off" if cached is None else format_size(self.weight_cache.current_size),  # type: ignore[union-attr]
            "-" if cached is None else format_share(cached["hit_rate"], 0),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cleanup()

    def __repr__(self) -> str:
        state = "closed" if self.offloader._closed else f"{len(self.offloader._models)} models"
        budget = format_size(self.offloader._models.limit)
        return f"<omnimem.AdvancedMemoryManager, budget {budget}, {state}>"
