"""The C core of omnimem, as Python sees it."""

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Protocol, Self, SupportsIndex, TypeAlias, final, type_check_only

from typing_extensions import Buffer

from omnimem.block import MemoryBlock

_Path: TypeAlias = str | bytes | PathLike[str] | PathLike[bytes]
_Shape: TypeAlias = SupportsIndex | Iterable[SupportsIndex]
_Extent: TypeAlias = tuple[_Path, int, int]

@type_check_only
class _SupportsDLPack(Protocol):
    def __dlpack__(self) -> Any: ...

_Capsule: TypeAlias = Any  # types.CapsuleType is younger than Python 3.11
_Index: TypeAlias = slice | Iterable[SupportsIndex]
_Data: TypeAlias = Buffer | _SupportsDLPack | _Capsule

class Store:
    def __init__(
        self,
        host_limit: int,
        disk_limit: int,
        directory: _Path | None = None,
        io_backend: str = "auto",
        verify: str = "always",
        io_window: int = 0,
        io_request: int = 0,
        io_threads: int = 0,
    ) -> None: ...
    def add(
        self, name: str, data: _Data, group: str | None = None, timeout: float | None = 30.0
    ) -> None:
        """Copy the bytes of `data` in; its dtype and shape are remembered.

        Raises
        ------
        ValueError
            The name exists already.
        LimitError, DiskFullError
            Not all blocks without an origin would fit into HOST and DISK with room to exchange
            the largest.
        DeviceError
            The data is not in the CPU's memory.
        BusyError
            No room before the deadline, since leases hold it.
        """

    def take(
        self, name: str, data: _Data, group: str | None = None, timeout: float | None = 30.0
    ) -> None:
        """Keep the memory of `data` as the block's bytes, without a copy.

        It counts in the limit, and goes back to its producer when the bytes are elsewhere and the
        last view is gone: at the next call of any store, at exit at the latest. Nobody may write to
        it meanwhile. What the producer calls read-only, or cannot say (a capsule from before DLPack
        1.0), is copied before it is leased for writing.
        """

    def add_file(
        self,
        name: str,
        extents: _Path | Iterable[_Extent],
        offset: int | None = None,
        nbytes: int | None = None,
        *,
        dtype: str | None = None,
        shape: _Shape | None = None,
        group: str | None = None,
        decoded_nbytes: int | None = None,
    ) -> None:
        """The block's bytes are ranges of files (or one: path, offset, nbytes), read in place.

        With `decoded_nbytes` they are encoded there, and decode to so many bytes.
        """

    def encode(self, name: str, coding: str = "fast", timeout: float | None = 30.0) -> int:
        """Keep a lossless encoding ("fast" or "balanced") of the block's bytes in memory.

        From then on it is decoded when the bytes are needed, and what is plain may go for nothing.
        Returns its length; 0 when it would hardly be smaller and the block stays as it is.
        """

    def lease(self, name: str, write: bool = False, timeout: float | None = 30.0) -> Lease:
        """Bring the bytes into memory and hold them.

        With `write`, wait until nobody else holds them; the other copies and the origin are
        dropped.

        Raises
        ------
        KeyError
            No block has that name.
        BusyError
            The deadline passed; `holders` says what is held.
        CorruptError, IOFailure
            The bytes could not be read, or differ from those stored.
        """

    def prefetch(self, names: Iterable[str]) -> Ticket:
        """Start bringing blocks into memory."""

    def evict(self, name: str, timeout: float | None = 30.0) -> bool:
        """Move a block out of memory; False when it is leased."""

    def remove(self, name: str, /) -> None:
        """Free the name now, the bytes with the last lease."""

    def names(self, group: str | None = None) -> list[str]:
        """All names, or those of one group, in the order of adding."""

    def check(self) -> None:
        """Raise CorruptError when an invariant of the store is broken."""

    def group(
        self,
        name: str,
        host_limit: int,
        policy: str | None = None,
        foresee: bool | None = None,
    ) -> None:
        """Limit a group's bytes in memory; 0: only the store's limit binds.

        Lowering the limit moves idle blocks out, as far as leases allow. `policy` says who goes
        first: "lru" (what groups begin with), "clock", "s3fifo", "sieve" or "adaptive"; another
        one begins without what the former had learned. `foresee`: learn the order of accesses, and
        fetch ahead of demand what is foretold, into free room, as long as most of it is used.
        """

    def use_begin(self, group: str, /) -> None:
        """A whole group is in use from now on (a model's pass begins).

        It is counted, and the group's blocks are the last to go meanwhile.
        """

    def use_end(self, group: str, /) -> None:
        """That use is over.

        Raises
        ------
        ValueError
            None had begun.
        """

    def trim(self, reserve: int = 0) -> None:
        """Give memory that no block uses back to the system, but for `reserve` bytes.

        With it goes what the C library keeps of memory that was freed.
        """

    def close(self) -> None:
        """Stop the threads and free what nobody sees; live views keep their bytes. Idempotent."""

    def groups(self) -> list[str]:
        """The names of its groups."""

    def _mark(self) -> Any: ...
    def _totals(self) -> tuple[dict[str, Any], dict[str, int], bool]: ...
    def _info(self, name: str, /) -> tuple[Any, ...]: ...
    def _stats(self) -> dict[str, Any]: ...
    def _block(self, name: str, /) -> MemoryBlock | None: ...
    def _access(self, group: str, name: str, /) -> MemoryBlock | None: ...
    def _add_zeros(
        self,
        name: str,
        nbytes: int,
        group: str | None = None,
        dtype: str | None = None,
        shape: _Shape | None = None,
    ) -> None: ...
    def _swap_out(
        self, group: str, nbytes: int, timeout: float | None = None, /
    ) -> tuple[int, int]: ...
    def _usage(
        self, group: str, window: float, /
    ) -> tuple[int, int, int, float, float, float, float]: ...
    def _press(
        self, level: int, nbytes: int, ceiling: float, timeout: float | None, /
    ) -> tuple[int, int, int, int, int, int]: ...
    def _victim(self, group: str, /) -> Lease | None: ...
    def _pack(self, lease: Lease, data: _Data, codec: int, /) -> bool: ...
    def _disk(self, directory: _Path | None, limit: int, /) -> None: ...
    def _group_stats(self, group: str, /) -> dict[str, Any]: ...
    def _ranked(self, group: str, most: bool, count: int, /) -> list[tuple[str, int]]: ...
    def _events(self, since: int, /) -> list[tuple[int, float, str, str, str, int, float]]: ...
    @property
    def _codecs(self) -> list[Any]: ...
    def __contains__(self, name: object, /) -> bool: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
        /,
    ) -> None: ...

class Block:
    """A block by reference: the base of `omnimem.MemoryBlock`."""

    @property
    def _name(self) -> str | None: ...
    @property
    def _codecs(self) -> list[Any]: ...
    def _state(self) -> tuple[Any, ...] | None: ...
    def _outlook(self) -> tuple[int, int, int, int | None]: ...
    def _mark(self, pinned: bool, tag: int, /) -> None: ...
    def _lease_packed(self) -> tuple[Lease, int] | None: ...
    def _unpack(self, plain: _Data, /) -> None: ...
    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> _Capsule: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Pools:
    """One pool of memory a device: the base of `omnimem.MemoryPoolManager`."""

    @property
    def closed(self) -> bool: ...
    def allocate(
        self,
        size: SupportsIndex | str,
        device: str,
        alignment: int = 256,
        label: str | None = None,
    ) -> MemoryBlock:
        """Take a block of memory. Its content is what the last user left, or zeros.

        Parameters
        ----------
        size : int or str
            Bytes, or text such as "64MiB".
        device : str
            A key of `pool_sizes`.
        alignment : int
            The address is a multiple of it: a power of two up to 2 MiB.
        label : str, optional
            For reports: of blocks that nobody deallocated, and `snapshot`.

        Raises
        ------
        LimitError
            It does not fit: `need`, `used`, `limit`, and `which` pool; the text tells whether
            free memory is only in pieces. For "pinned" also when RLIMIT_MEMLOCK is in the way.
        DeviceError
            There is no such device, and why.
        ValueError
            A size of 0, a wrong alignment, a device without a pool.
        ClosedError
            The manager is closed, or belongs to the process that forked this one.
        """

    def deallocate(self, block: MemoryBlock) -> None:
        """Give a block back. What views see stays as it is until the last one goes.

        Raises
        ------
        ValueError
            It was deallocated before, or is no block of this manager.
        """

    def _open(
        self, device: str, limit: int, decay: float, fragmentation: float, locked: bool, /
    ) -> None: ...
    def _stats(self, device: str, /) -> tuple[Any, ...]: ...
    def _trim(self, device: str, /) -> int: ...
    def _set_limit(self, device: str, limit: int, /) -> None: ...
    def _blocks(self, device: str, /) -> list[MemoryBlock]: ...
    def _block(self, device: str, number: int, /) -> MemoryBlock | None: ...
    def _victims(
        self, size: SupportsIndex | str, device: str, alignment: int, /
    ) -> list[MemoryBlock]: ...
    def _snapshot(self, device: str, /) -> list[tuple[Any, ...]]: ...
    def _check(self, device: str, /) -> None: ...
    def _close(self) -> None: ...

@final
class Lease:
    """The right to a block's bytes: a context manager, a buffer (1-D uint8), a DLPack producer.

    Views made from it (buffers, tensors, windows) keep the bytes after its release.
    """

    @property
    def name(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def writable(self) -> bool: ...
    @property
    def released(self) -> bool: ...
    def release(self) -> None:
        """Let the bytes go; idempotent. New views raise `ClosedError` from now on."""

    def window(
        self, offset: int, dtype: str, shape: _Shape, strides: _Shape | None = None
    ) -> Window:
        """A typed view from `offset` bytes on; `strides` in elements, C-contiguous by default."""

    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> _Capsule: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
        /,
    ) -> None: ...

@final
class Window:
    """A typed view on part of a block: a buffer and a DLPack producer."""

    @property
    def name(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> _Capsule: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Ticket:
    """A promise that blocks come to memory (`Store.prefetch`)."""

    @property
    def done(self) -> bool: ...
    def wait(self, timeout: float | None = None) -> bool:
        """True when all are there, False at the deadline; raises what a move raised."""

    def cancel(self) -> None:
        """Drop what is queued or in flight."""

@final
class Stream:
    """Units of blocks; of each it is kept in memory: 0 nothing, 1 its bytes, 2 or 3 a form of them.

    The form is encoded fast (2) or balanced (3), and decoded while the unit is in use. What is not
    kept plain passes through a ring.
    """

    def __new__(
        cls,
        store: Store,
        group: str,
        units: Iterable[tuple[str, Iterable[tuple[str, int]]]],
    ) -> Self: ...
    def load(self, timeout: float | None = None) -> None:
        """Read the resident blocks and keep them."""

    def enter(self, unit: int, held: list[int], timeout: float | None = 30.0) -> bool:
        """Bring the unit's streamed blocks in and append `unit` to `held`.

        True when the caller must make the windows and call `bound`. On an error nothing is
        appended and nothing is held.
        """

    def bound(self, unit: int, ok: bool = True) -> None:
        """The windows are made, or could not be (the unit is given back)."""

    def leave(self, unit: int, /) -> bool:
        """Done with a unit; True when the caller must drop the windows and call `unbound`."""

    def unbound(self, unit: int, /) -> None:
        """The windows are gone: the bytes may go."""

    def keep(self, unit: int, kept: bool) -> bool:
        """Whether a unit, once entered, stays bound when its users have left.

        True when nobody uses it: the caller must drop the windows and call `unbound`.
        """

    def linger(self, lingers: bool, /) -> None:
        """Whether what a unit lets go stays in memory until room is needed, or goes at once."""

    def reserve(self, ring: int, /) -> None:
        """Bytes that what is kept encoded leaves to the ring; before `load`."""

    def forget(self, unit: int, /) -> None:
        """Keep nothing of a unit encoded any more: its bytes come from their origin."""

    def set_windows(
        self,
        unit: int,
        windows: Sequence[tuple[int, int, str, _Shape] | tuple[int, int, str, _Shape, _Shape]],
    ) -> None:
        """What `windows` returns: (block index, offset in bytes, dtype, shape) each.

        Strides in elements may follow.
        """

    def windows(self, unit: int, resident: bool | None = None) -> list[_Capsule]:
        """DLPack capsules in the order of `set_windows`.

        Those of all blocks, or only of the resident or the streamed ones.
        """

    def stats(self) -> dict[str, Any]: ...
    def close(self) -> None:
        """Let all leases go; views keep their bytes."""

class Pressure:
    def __init__(self, thresholds: Sequence[float]) -> None: ...
    def feed(self, usage: float, /) -> int:
        """The level, 0 to 3, with a new share in use."""

    def trend(self) -> int:
        """1 rising, -1 falling, 0 neither, over the last minute."""

    @property
    def thresholds(self) -> tuple[float, float, float]:
        """Shares in use at which MEDIUM, HIGH and CRITICAL begin."""

    @thresholds.setter
    def thresholds(self, value: Sequence[float]) -> None: ...

class Hook:
    """What torch calls before and after a module that uses a unit.

    While all units of the stream are kept and bound it only counts a user; else it calls the
    methods of a subclass: `come(module)` and `go()`.
    """

    def __new__(
        cls,
        stream: Stream,
        unit: int,
        outer: Iterable[int],
        mine: object,
        module: object,
        tracing: Callable[[], object],
        others: Iterable[dict[int, Any]],
    ) -> Self:
        """`outer`: units inside of which this one may be entered.

        `mine.entered` is, of each thread: (itself, units that it has entered, units that it has yet
        to take away, its passes). `tracing()` is None unless torch traces; `others` are the hooks
        of all modules.
        """

    def enter(self, module: object, args: object, /) -> None:
        """A forward pre-hook: count a user of the unit, or call `come(module)`."""

    def leave(self, module: object, args: object, output: object, /) -> None:
        """A forward hook: count one user less, or call `go()`."""

    def call(self, /, *args: object, **kwargs: object) -> Any:
        """In place of the module's `_call_impl`: `forward` and these hooks, if there are no others.

        Else, or when more is to be done than to count, it is what it stands for.
        """

@final
class Monitor:
    """How short memory is, why, and where that is going: see `omnimem.MemoryMonitor`.

    Parameters
    ----------
    thresholds
        Shares in use at which MEDIUM, HIGH and CRITICAL begin.
    interval
        Seconds between samples at most.
    act
        Have what is watched give memory back when it is short.
    root
        Goes before every path of the system; for tests.
    """

    def __init__(
        self,
        thresholds: Sequence[float] = (0.75, 0.88, 0.95),
        interval: float = 1.0,
        *,
        act: bool = True,
        root: str | None = None,
    ) -> None: ...
    @property
    def running(self) -> bool:
        """Whether its thread takes samples."""

    def watch(self, store: Store, /) -> None:
        """Have its memory back when memory is short; as often unwatched as watched."""

    def unwatch(self, store: Store, /) -> None:
        """Leave it alone; a closed one is left by itself."""

    def watch_pools(self, pools: Pools, /) -> None:
        """Have the memory of free blocks back when memory is short."""

    def unwatch_pools(self, pools: Pools, /) -> None:
        """Leave them alone."""

    def start(self) -> None:
        """Take samples on a thread. Idempotent."""

    def stop(self) -> None:
        """End the thread; what is watched hears that memory is not short any more. Idempotent."""

    def sample(self) -> dict[str, Any]:
        """Take a sample now, on this thread, and act on it. What is unknown is None.

        number, time (monotonic), wall, level (0 to 3), level_since, cause; usage, total,
        available, source of the tightest place; places: (source, limit, high, used, available) of
        each; swap: (total, free); rss; psi: shares of time that some, that all threads waited for
        memory; psi_seconds: the same, ever; events: how often limits were met; gpus: (index, uuid,
        name, total, free, level); slope (bytes a second), r2, samples, trend ("rising", "falling",
        "stable", "oscillating"), seconds_to_exhaustion; interval (to the next one), lag_seconds,
        overhead_seconds (processor time of all samples); transitions by level entered; peak:
        (bytes, time, wall, [(block, group, bytes), ...]).
        """

    def report(self) -> dict[str, Any]:
        """The last sample; takes one if there was none."""

    def follow(self, since: int, usage: float | None = None, timeout: float | None = None) -> int:
        """How many stirs there were, once that is more than `since`, or at the timeout.

        -1: its thread is stopped. A stir is `stir`, and each sample but a quiet one: one that its
        thread takes while the level is and was LOW, no end is in sight, and less than `usage` is
        in use of RAM and of each GPU. Every eighth is a stir too.
        """

    def stir(self) -> None:
        """Wake who follows."""

    def recent(self, since: int, /) -> list[dict[str, Any]]:
        """Reports of the samples above `since` that its thread took; of the last 16 at most."""

    def wait(self, since: int, level: int | None = None, timeout: float | None = None) -> int:
        """The number of the last sample, once it is above `since` and its level at least `level`.

        -1 at the timeout, and when the monitor is closed.
        """

    def history(self, seconds: int) -> list[tuple[float, float, float, float, float]]:
        """(start, min, max, mean, last) of the bytes in use at the tightest place.

        `seconds` is 1 (for the last ten minutes), 10 (two hours) or 60 (a day); spans without a
        sample are left out.
        """

    def actions(self, since: int = 0) -> list[tuple[int, float, str, int, str, int, int, float]]:
        """(number, time, kind, level, cause, bytes wanted, bytes freed, wall) of the last 256.

        kind: "trim", "evict", "heap", "relax", or "none": bytes were wanted, nothing idle was left.
        """

    def close(self) -> None:
        """Stop, let go of what is watched, wake who waits. Idempotent."""

@final
class Ranking:
    """Who goes next among members kept elsewhere; each is known by a slot, a number from 0.

    A slot that is no member is a `KeyError`. Not thread safe.
    """

    def __new__(cls, policy: str, capacity: int = 0) -> Self: ...
    def add(self, known: int, size: int, used_at: float, /) -> int:
        """The slot of a member that comes in; `known`: its former slot, or -1.

        The slot of a removed member may be given to another.

        Raises
        ------
        ValueError
            A size of 0 bytes or too many, a time that is not finite.
        """

    def remove(self, slot: int, /) -> None:
        """Is no member any more."""

    def access(self, slot: int, used_at: float, /) -> None:
        """Is used: nobody is more recent."""

    def pass_by(self, slot: int, passed: bool, /) -> None:
        """Whether `victim` passes it by, until its next use."""

    def victim(self) -> int | None:
        """The slot of the member to give up, or None."""

class Cache:
    def __init__(
        self,
        store: Store,
        group: str,
        prefix: str,
        limit: int,
        batch: int,
        threshold: int,
        coding: int,
    ) -> None: ...
    def get(self, model_key: str, layer_name: str, index: _Index | None = None) -> Any:
        """Weights from the cache, or some rows of them; None: it has none.

        Parameters
        ----------
        model_key, layer_name : str
            What they were put as, or of an attached checkpoint, a tensor's name.
        index : slice or sequence of int, optional
            Rows along the first dimension, as NumPy takes them. Of attached weights that are not
            in memory only the bytes of these rows are read, and they do not become a part of the
            cache. A slice of step 1 of weights in memory is no copy.

        Returns
        -------
        torch.Tensor, Lease, Window or None
            A tensor where torch is loaded in this process, else an object with DLPack and the
            buffer protocol. No copy: valid as long as it is held, also when the entry goes. Do
            not write to it: torch lets you, and later callers see that for as long as this memory
            is the entry's.

        Raises
        ------
        CorruptError, IOFailure
            The file of an attached checkpoint has changed, or cannot be read.
        LimitError
            It is larger than the cache.
        IndexError
            A row outside the weights.
        ClosedError
            The cache is closed.
        """

    def contains(self, model_key: str, layer_name: str, /) -> bool:
        """Whether `get` would find it: in memory, or in an attached checkpoint."""

    def remove(self, model_key: str, layer_name: str, /) -> bool:
        """Forget weights, attached ones too; False: there were none. Who holds them keeps them."""

    def _put(self, model_key: str, layer_name: str, data: _Data, /) -> bool: ...
    def _key(self, model_key: str, layer_name: str, /) -> str: ...
    def _peek(self, key: str, /) -> Any: ...
    def _shed(self, nbytes: int, most: int, /) -> tuple[int, int]: ...
    def _entries(self) -> list[tuple[str, int, int, int, int]]: ...
    def _close(self) -> None: ...

def _same_bytes(a: _Data, b: _Data, /) -> bool: ...
def _block_setup(type: Any, unpacker: Any, /) -> None: ...
def memory(root: str | None = None) -> tuple[int, int, str]:
    """(total, available, source) of the tightest of system and cgroups, in bytes."""

def encode(data: _Data, dtype: str | None = None, coding: str = "auto") -> bytes | None:
    """The bytes of a buffer or tensor, encoded without loss; None where less than 5 % is saved.

    Parameters
    ----------
    data
        Any buffer or DLPack producer in the CPU's memory.
    dtype
        What its elements are; by default what `data` says. A hint: any bytes can be encoded.
    coding
        "fast", three tenths off bfloat16; "balanced", a third off, decoded at less than half the
        rate; or "auto", which is "fast". "none" keeps the bytes as they are, with the same
        checksum: never None.

    Raises
    ------
    ValueError
        No such coding or dtype.
    """

def encode_into(data: _Data, out: Buffer, dtype: str | None = None, coding: str = "auto") -> int:
    """As `encode`, into the first bytes of `out`; returns how many. 0: None, or it does not fit.

    Raises
    ------
    ValueError
        `out` has less than `encode_bound(nbytes)` bytes, with coding "none".
    """

def encode_bound(nbytes: int, /) -> int:
    """The bytes that `encode_into` may need room for."""

def decode(coded: Buffer, /) -> bytes:
    """The bytes that `encode` was given.

    Raises
    ------
    CorruptError
        These bytes were not made by `encode`, or are damaged.
    """

def decode_into(coded: Buffer, out: Buffer, check: bool = True) -> None:
    """As `decode`, into `out`, which has just that many bytes.

    A megabyte and more goes past the caches where `out` is aligned to 64. `check=False` does not
    compare the checksum of what was decoded.
    """

def coded_info(coded: Buffer, /) -> tuple[int, str]:
    """(plain bytes, coding) of what `encode` made; CorruptError for other bytes."""

def _coded_compare(coded: Buffer, data: _Data, /) -> None: ...
def _codec_use(path: str, /) -> bool: ...
def simulate(
    ids: Buffer, capacity: int, policy: str, sizes: Buffer | None = None
) -> tuple[int, int, int, int, dict[str, int]]:
    """Requests, misses, their bytes, and how often each expert of "adaptive" led."""

def _mark_end(mark: Any, /) -> tuple[int, int, int]: ...
def _totals_closed() -> tuple[int, dict[str, Any]]: ...
def _fault_arm(point: str, nth: int = 1, sticky: bool = False, /) -> None: ...
def _fault_reset() -> None: ...
def _fault_fired(point: str, /) -> int: ...
def _fault_points() -> tuple[str, ...]: ...
def _collect_last() -> None: ...
def _dtype_code(dtype: str, /) -> tuple[int, int, int]: ...
