"""ModelWeightCache: weights of models in memory, within a limit; the oldest go first."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Self

from omnimem import _core, checkpoint
from omnimem.config import CacheConfig, StoreConfig, _positive_gib, parse_size
from omnimem.errors import ClosedError
from omnimem.store import GroupStats, Store

__all__ = ["ModelWeightCache"]

_GIB = 1 << 30
_ALL = 1 << 62
_CODINGS = {"auto": 1, "fast": 1, "balanced": 2}  # enum om_coding


class ModelWeightCache(_core.Cache):
    """Weights by model and layer, within a limit of bytes; the least recently used go first.

    Parameters
    ----------
    max_size_gb : float, optional
        GiB of memory; wins over the configuration's.
    config : CacheConfig, optional
        How weights are kept.
    store : Store, optional
        Share this store and its limits, instead of having one of its own. When others need its
        memory, entries that nobody holds make way.
    group : str
        Name of the cache among the groups of its store.

    Raises
    ------
    ValueError
        A size or name that is none, or the group has other blocks.
    TypeError
        A size that is no number, a configuration of another class.

    Notes
    -----
    A face on one group of a `Store`: every byte, limit and counter is the core's. Thread safe. A
    context manager: leaving it is `close`.

    An entry that makes way loses its name at once, also while somebody holds what `get` returned:
    those bytes stay valid, and count as `exported_bytes` until the last view goes. Entries go one
    by one, and never more than are in the way. Nothing is written to disk.

    Layers of an attached checkpoint are entries that have their bytes in its files: `get` brings
    them in, and when they make way they can be had again.

    With compression an entry is kept encoded. It is decoded for whoever asks for it, and stays
    plain besides for as long as that is held, and then until its room is needed.
    """

    def __init__(
        self,
        max_size_gb: float | None = None,
        config: CacheConfig | None = None,
        *,
        store: Store | None = None,
        group: str = "cache",
    ) -> None:
        config = CacheConfig() if config is None else config
        if not isinstance(config, CacheConfig):
            raise TypeError(f"config must be a CacheConfig, not {type(config).__name__}")
        limit = config.max_size
        if max_size_gb is not None:
            _positive_gib("max_size_gb", max_size_gb)
            limit = int(max_size_gb * _GIB)
        self._owns = store is None
        if store is None:
            host = max(_core.memory()[0], 1 << 20)
            store = Store(StoreConfig.from_env(host_limit=host, disk_limit=0))
        self._store = store
        self._group = group
        self.config = config
        """How weights are kept."""
        try:
            super().__init__(
                store,
                group,
                "" if self._owns else f"{group}/",
                limit,
                config.eviction_batch_size,
                config.access_count_threshold,
                _CODINGS[config.compression] if config.enable_compression else 0,
            )
            if config.policy != "lru":
                store.group(group, limit, config.policy)
        except BaseException:
            if self._owns:
                store.close()
            raise
        self._cache = _Entries(self)

    # -- entries ---------------------------------------------------------------------------------

    def put(self, model_key: str, layer_name: str, weights: Any) -> bool:
        """Copy weights in; those of the same name are replaced.

        Parameters
        ----------
        model_key, layer_name : str
            What they are called.
        weights : DLPack or buffer producer
            torch, NumPy, ...; in the CPU's memory. Strided ones are made contiguous; dtype and
            shape are remembered.

        Returns
        -------
        bool
            Whether they were stored: False before the `access_count_threshold`-th time.

        Raises
        ------
        LimitError
            They are larger than the cache; nothing made way for them.
        BusyError
            No room within 30 s, since other threads' weights were on their way in.
        DeviceError
            They are not in the CPU's memory.
        """
        if getattr(weights, "requires_grad", False):
            weights = weights.detach()
        return self._put(model_key, layer_name, weights)

    def attach_checkpoint(self, model_key: str, path: str | os.PathLike[str]) -> int:
        """Serve the tensors of a checkpoint as layers of a model, read on first use.

        Parameters
        ----------
        model_key : str
            What the model is called.
        path : path
            A safetensors file, or a folder as Hugging Face has them, packed or not. It must stay as
            it is. Of a packed one, a layer is read whole for some of its rows.

        Returns
        -------
        int
            Layers that were attached: those that had been put before stay as they are.

        Raises
        ------
        FormatError
            It is no valid checkpoint.
        CorruptError
            A file changed meanwhile. Nothing is attached then.
        """
        attached: list[str] = []
        with checkpoint.open(path) as files:
            try:
                for name in files.names():
                    if not self.contains(model_key, name):
                        key = self._key(model_key, name)
                        checkpoint.add_tensor(self._store, key, files.info(name), self._group)
                        attached.append(name)
                files.check_unchanged()
            except BaseException:
                for name in attached:
                    self.remove(model_key, name)
                raise
        return len(attached)

    def evict_least_recently_used(self, target_size: int | str) -> int:
        """Have entries make way, oldest first, until at least so many bytes are free.

        Returns
        -------
        int
            Bytes freed of the cache's limit; fewer than asked for: nothing is left. Those that
            somebody holds are the system's when the last view goes.
        """
        want = parse_size(target_size, "target_size")
        freed = 0
        while freed < want:
            entries, nbytes = self._shed(want - freed, self.config.eviction_batch_size)
            freed += nbytes
            if not entries and not nbytes:
                break
        return freed

    evict = evict_least_recently_used

    def clear(self) -> None:
        """Have all entries make way. Layers of attached checkpoints can be had again."""
        self.evict_least_recently_used(_ALL)

    # -- what there is ---------------------------------------------------------------------------

    @property
    def max_size(self) -> int:
        """The most bytes of memory that entries may take, in whole pages."""
        return self._stats().limit_bytes

    @property
    def current_size(self) -> int:
        """Bytes of memory that entries take, in whole pages."""
        return self._stats().host_bytes

    @property
    def store(self) -> Store:
        """The store that holds the entries."""
        return self._store

    @property
    def cache(self) -> Mapping[str, Any]:
        """The entries in memory by "model:layer", oldest first, read-only; empty after `close`.

        A colon in a model's key is written "%3A", and a percent sign "%25". Looking an entry up
        here counts as no use of it.
        """
        return self._cache

    def _stats(self) -> GroupStats:
        try:
            return self._store.group_stats(self._group)
        except ClosedError:
            return GroupStats.nothing()

    def get_stats(self) -> dict[str, Any]:
        """What the cache holds, and what came of asking it.

        Returns
        -------
        dict
            `cache_size_gb`, `max_size_gb` (GiB), `utilization` (0..1), `item_count` (entries in
            memory), `access_counts` (by "model:layer": puts and gets), `hits`, `misses`,
            `hit_rate` (0..1; 0.0 before the first `get`), `evictions` (entries that made way),
            `cache_size_bytes`, `max_size_bytes`, `peak_bytes`, `plain_bytes`, `encoded_bytes`
            (of `cache_size_bytes`), `exported_bytes` (held by somebody, of entries that are gone,
            and of rows).
        """
        entries = self._listed()
        return {
            **self._figures(),
            "item_count": len(entries),
            "access_counts": {key: accesses for key, accesses, *_ in entries},
        }

    def _figures(self) -> dict[str, Any]:
        """Those of `get_stats` that take no longer with more entries."""
        stats = self._stats()
        gets = stats.hits + stats.misses
        return {
            "cache_size_gb": stats.host_bytes / _GIB,
            "max_size_gb": stats.limit_bytes / _GIB,
            "utilization": stats.host_bytes / stats.limit_bytes if stats.limit_bytes else 0.0,
            "hits": stats.hits,
            "misses": stats.misses,
            "hit_rate": stats.hits / gets if gets else 0.0,
            "evictions": stats.evictions,
            "cache_size_bytes": stats.host_bytes,
            "max_size_bytes": stats.limit_bytes,
            "peak_bytes": stats.host_peak_bytes,
            "plain_bytes": stats.host_bytes - stats.packed_bytes,
            "encoded_bytes": stats.packed_bytes,
            "exported_bytes": stats.gone_bytes,
        }

    def _listed(self) -> list[tuple[str, int, int, int, int]]:
        """The entries in memory, oldest first, by "model:layer"."""
        skip = 0 if self._owns else len(self._group) + 1
        try:
            return [(entry[0][skip:], *entry[1:]) for entry in self._entries()]
        except ClosedError:
            return []

    # -- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Let all entries go. What `get` returned stays valid. Idempotent."""
        self._close()
        if self._owns:
            self._store.close()
            return
        try:
            names = self._store.names(self._group)
        except ClosedError:
            return
        for name in names:
            try:
                self._store.remove(name)
            except (KeyError, ClosedError):
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        stats = self._stats()
        return f"<omnimem.ModelWeightCache, {stats.host_bytes} of {stats.limit_bytes} bytes>"


class _Entries(Mapping[str, Any]):
    """The entries of a cache that are in memory, as they are now."""

    def __init__(self, cache: ModelWeightCache) -> None:
        self._cache = cache

    def _keys(self) -> list[str]:
        return [key for key, *_ in self._cache._listed()]

    def __getitem__(self, key: str) -> Any:
        found = None
        if key in self._keys():
            owner = self._cache
            found = owner._peek(key if owner._owns else f"{owner._group}/{key}")
        if found is None:
            raise KeyError(key)
        return found

    def __contains__(self, key: object) -> bool:
        return key in self._keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    def __repr__(self) -> str:
        return f"<entries {self._keys()!r}>"
