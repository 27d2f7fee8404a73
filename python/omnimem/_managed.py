"""Models whose weights can be moved out of memory and back: modules, and mappings of tensors.

`manage` makes one of a model. Its bytes are blocks of a group of its own in a store, so that what
is not in use gives way to what is. A module's are in `_torch_managed`; a mapping's are here:
offloaded, its values are blocks, which bring their bytes in when somebody reads them.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

from omnimem.block import MemoryBlock
from omnimem.config import format_size
from omnimem.store import Store

__all__ = ["Movable", "Moved", "manage"]

_CPU = 1
"""DLPack's number of the CPU's memory."""


@dataclass(frozen=True)
class Moved:
    """What moving a model's weights came to."""

    nbytes: int
    """Bytes that left memory or may leave it from now on (`offload`), or that came (`fetch`)."""
    held: tuple[tuple[str, int], ...] = ()
    """What somebody else still holds (views, autograd's saved tensors): names and bytes."""
    streams: bool = False
    """The room was too small: what it does not hold comes when it is used."""


class Movable(Protocol):
    """A model whose weights can be moved. All methods may be called while it is in use."""

    model_id: str
    group: str
    """Its group in the store."""
    nbytes: int
    """Bytes of its weights."""
    on_use: Callable[[Movable], None] | None
    """Called when a pass begins, before any weight is needed, on the thread that begins it."""
    on_short: Callable[[Movable], None] | None
    """Called when weights wait for memory that is leased, on the thread that waits; it may have
    models that keep theirs give way."""

    @property
    def home(self) -> str:
        """Where its weights are when they are used: "cpu", or a device as torch spells it."""

    @property
    def state(self) -> str:
        """ "resident", "evictable" (idle in memory), "disk", or "streams"."""

    @property
    def in_use(self) -> bool:
        """Is some thread inside a pass, or a part of one?"""

    def host_bytes(self) -> int:
        """Bytes of memory that the weights take now."""

    def home_bytes(self) -> int:
        """Bytes of the memory at home that would be out of use if it were offloaded."""

    def missing_bytes(self) -> int:
        """Bytes that would have to come home."""

    def offload(self, target: str, timeout: float = 30.0) -> Moved:
        """Let the weights go: to "cpu" (memory, as long as nobody else needs it) or to "disk"."""

    def resize(self, room: int) -> None:
        """Have at most `room` bytes of memory from now on; what stays comes when it is used."""

    def fetch(self, target: str | None = None, timeout: float = 30.0) -> Moved:
        """Bring in what stays by the last `resize`, unless that changes meanwhile."""

    def release(self) -> None:
        """Make the weights ordinary tensors in memory again; nothing is managed any more."""

    def close(self) -> None:
        """For a model that is thrown away: its weights go."""


def manage(
    model: Any,
    store: Store,
    model_id: str,
    *,
    model_dir: str | os.PathLike[str] | None = None,
    timeout: float = 30.0,
    resident: bool = True,
) -> Movable:
    """Make a model's weights movable.

    Parameters
    ----------
    model : torch.nn.Module or mutable mapping of str to tensors with DLPack
        A module keeps its parameters' identity, ties, strides, and hooks; its buffers stay where
        they are.
    store : Store
        Its weights count in this store's limits from now on.
    model_id : str
        Its group there is "model:" and this.
    model_dir : path, optional
        Of a module: the checkpoint that it was loaded from. Nothing of it is ever written then, but
        what was written to its weights goes when they do.
    timeout : float
        Seconds that weights may take to arrive when they are used.
    resident : bool
        Of a module: keep its weights in memory. Else they are idle, or out where they come from a
        checkpoint, until they are used: the store need not have room for all of them.

    Raises
    ------
    ValueError
        The model cannot be moved (it says which tensor, and why), or the id is in use.
    TypeError
        It is neither a module nor a mapping that can be written to.
    LimitError, DiskFullError
        The store has no room for it, in memory and on disk.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        from omnimem._torch_managed import manage_module

        return manage_module(model, store, model_id, model_dir, timeout, resident)
    if model_dir is not None:
        raise TypeError(f"model_dir is of a torch module, not of a {type(model).__name__}")
    return ManagedMapping(model, store, model_id)


def group_of(store: Store, model_id: str) -> str:
    """The group of a model that is not managed yet."""
    group = f"model:{model_id}"
    if store.names(group):
        raise ValueError(f"a model is managed as {model_id!r} already in this store")
    return group


def swap_out(store: Store, group: str, names: list[str], timeout: float) -> None:
    """Move all idle blocks of a group out of memory, and give that back to the system.

    Raises
    ------
    DiskFullError, IOFailure
        Some could not be written; they are still in memory.
    """
    store._swap_out(group, store.group_stats(group).host_bytes, timeout)
    if store.group_stats(group).host_bytes:
        for name in names:  # what is on its way in; the first that cannot be written says why
            store.evict(name, timeout)
    store.trim()


class ManagedMapping:
    """A mapping of names to tensors whose bytes can be moved.

    In memory its values are the caller's own tensors. Offloaded, they are blocks (`MemoryBlock`):
    buffers and DLPack producers that bring their bytes in when they are read; what is written to
    their views is kept. Restored, they are tensors of the library that they came from, on the
    store's memory.
    """

    def __init__(self, tensors: Any, store: Store, model_id: str) -> None:
        if not isinstance(tensors, MutableMapping):
            what = "read-only mapping" if isinstance(tensors, Mapping) else type(tensors).__name__
            raise TypeError(
                f"{what} cannot be managed: its values are to be replaced; give an nn.Module, or a "
                "mutable mapping (a dict) of names to tensors"
            )
        self.model_id = model_id
        self.home = "cpu"
        self.group = group_of(store, model_id)
        self.on_use: Callable[[Movable], None] | None = None
        self.on_short: Callable[[Movable], None] | None = None  # a mapping waits for nothing
        self._store = store
        self._tensors = tensors
        self._makers: dict[str, Callable[[Any], Any]] = {}
        self._blocks: dict[str, MemoryBlock] = {}
        self._given: dict[str, Callable[[], Any]] = {}
        """Of each name, the tensor on its block's memory that the mapping has, or had."""
        self._lost: dict[str, Callable[[], Any]] = {}
        """Of each name, the caller's own tensor that a block took the memory of."""
        self._closed = False
        for name, value in list(tensors.items()):
            self._check(name, value)
            try:
                tensors[name] = value
            except TypeError as error:
                raise TypeError(f"the mapping refuses to have {name!r} replaced: {error}") from None
        self.nbytes = sum(_nbytes(value) for value in _unique(tensors.values()))

    def _check(self, name: str, value: Any) -> None:
        if not isinstance(name, str):
            raise TypeError(f"names of tensors are str, not {name!r}")
        if not hasattr(value, "__dlpack__") or not hasattr(value, "__dlpack_device__"):
            raise TypeError(f"{name!r} is a {type(value).__name__}, no tensor with DLPack")
        if value.__dlpack_device__()[0] != _CPU:
            raise ValueError(f"{name!r} is not in the CPU's memory; only a module's tensors may be")
        if not isinstance(value, MemoryBlock):
            self._makers[name] = _maker(name, value)

    # -- what is where

    def _names(self) -> list[str]:
        return [self._name(key) for key in self._blocks]

    def _name(self, key: str) -> str:
        return f"{self.group}/{key}"

    def _is_out(self, key: str) -> bool:
        return isinstance(self._tensors.get(key), MemoryBlock)

    @property
    def state(self) -> str:
        """ "resident", "evictable", "disk", or "streams"."""
        if not any(map(self._is_out, self._blocks)):
            return "resident"
        if self._store.group_stats(self.group).limit_bytes:
            return "streams"
        return "evictable" if self.missing_bytes() < self.nbytes else "disk"

    @property
    def in_use(self) -> bool:
        """Is always false: nobody says when a mapping's tensors are used."""
        return False

    def host_bytes(self) -> int:
        """Bytes of memory that the tensors take now."""
        own = (value for key, value in self._tensors.items() if key not in self._blocks)
        return int(self._store.group_stats(self.group).host_bytes + sum(map(_nbytes, _unique(own))))

    def home_bytes(self) -> int:
        """Bytes of memory that would be out of use if it were offloaded."""
        return self.host_bytes()  # nothing of a mapping lies in a file

    def missing_bytes(self) -> int:
        """Bytes that would have to come to memory."""
        return self._store.group_stats(self.group).missing_bytes

    # -- moving

    def offload(self, target: str, timeout: float = 30.0) -> Moved:
        """Replace the tensors by blocks, whose bytes are idle in memory ("cpu") or on "disk".

        When it fails, the mapping is as it was.
        """
        self._alive()
        check_target(target, ("cpu", "disk"))
        had = self.host_bytes()
        # Tensors on blocks are let go: they would hold what is to leave.
        shown = [key for key in self._tensors if self._is_given(key)]
        before = {key: value for key, value in self._tensors.items() if key not in shown}
        taken: list[str] = []
        try:
            self._store.group(self.group, 0)
            for key in list(self._tensors):
                self._put_out(key, taken, timeout)
            if target == "disk":
                swap_out(self._store, self.group, self._names(), timeout)
        except BaseException:
            self._tensors.update(before)
            for key in shown:
                self._put_in(key)
            for key in taken:
                self._forget(key)
            raise
        left = had - self.host_bytes() if target == "disk" else self.nbytes
        del before
        return Moved(max(left, 0), self._held(target))

    def _put_out(self, key: str, taken: list[str], timeout: float) -> None:
        value = self._tensors[key]
        if isinstance(value, MemoryBlock):
            return
        known = self._blocks.get(key)
        if known is None or not self._is_given(key):
            if known is not None:
                self._forget(key)
            self._check(key, value)
            taken.append(key)
            self._store.take(self._name(key), value, self.group, timeout)
            known = self._store._block(self._name(key))
            assert known is not None
            self._blocks[key] = known
            self._lost[key] = _reference(value)
        self._tensors[key] = known

    def _is_given(self, key: str) -> bool:
        """Is the value a tensor on its block's memory, and not another one of the caller's?"""
        given = self._given.get(key, _nothing)()
        return given is not None and given is self._tensors.get(key)

    def _put_in(self, key: str) -> None:
        value = self._makers[key](self._blocks[key])
        self._given[key] = _reference(value)
        self._tensors[key] = value

    def _held(self, target: str) -> tuple[tuple[str, int], ...]:
        """What was here before and is alive: the caller's own tensors, and views of blocks."""
        held = []
        for key in self._blocks:
            info = self._store.info(self._name(key))
            alive = target == "disk" and self._lost.get(key, _nothing)() is not None
            if info.leases or (alive and "host" not in info.tiers):
                held.append((key, info.nbytes))
        return tuple(held)

    def fetch(self, target: str | None = None, timeout: float = 30.0) -> Moved:
        """Make the values tensors in memory again, unless `resize` gave less than they need."""
        self._alive()
        check_target(target, (None, "cpu"))
        if self._store.group_stats(self.group).limit_bytes:
            return Moved(0, (), streams=True)
        before, missing = dict(self._tensors), self.missing_bytes()
        try:
            self._store.prefetch(self._names()).wait(timeout)
            for key in self._blocks:
                if self._is_out(key):
                    self._put_in(key)
        except BaseException:
            self._tensors.update(before)
            raise
        return Moved(missing - self.missing_bytes())

    def resize(self, room: int) -> None:
        """At most `room` bytes of blocks are in memory from now on."""
        self._alive()
        largest = max(map(_nbytes, self._tensors.values()), default=0)
        if room < self.nbytes:
            self._store.group(self.group, max(room, largest + (1 << 16)))
        else:
            self._store.group(self.group, 0)

    # -- ways out

    def release(self) -> None:
        """Make all values tensors with memory of their own."""
        if self._closed:
            return
        fresh = {}
        for key, block in self._blocks.items():
            if self._is_out(key) or self._is_given(key):
                fresh[key] = self._makers[key](_Copied(block))
        self._tensors.update(fresh)
        self.close()

    def close(self) -> None:
        """The blocks go; values that are blocks cannot be read any more."""
        for key in list(self._blocks):
            self._forget(key)
        self._closed = True

    def _forget(self, key: str) -> None:
        self._blocks.pop(key, None)
        self._given.pop(key, None)
        if self._name(key) in self._store:
            self._store.remove(self._name(key))

    def _alive(self) -> None:
        if self._closed:
            raise ValueError(f"the model {self.model_id!r} is not managed any more")

    def __repr__(self) -> str:
        return f"<omnimem model {self.model_id!r}: {format_size(self.nbytes)} of tensors>"


class _Copied:
    """A block's bytes, copied for who takes them."""

    def __init__(self, block: MemoryBlock) -> None:
        self._block = block

    def __dlpack__(self, **options: Any) -> Any:
        return self._block.__dlpack__(**{**options, "copy": True})

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._block.__dlpack_device__()


def check_target(target: str | None, known: tuple[str | None, ...]) -> None:
    """Raise ValueError unless it is one of those."""
    if target not in known:
        raise ValueError(f"target={target!r}: weights go to {' or '.join(map(repr, known))}")


def _maker(name: str, value: Any) -> Callable[[Any], Any]:
    """Return what makes tensors of that kind: the `from_dlpack` of its library."""
    library = sys.modules.get(type(value).__module__.partition(".")[0])
    make = getattr(library, "from_dlpack", None)
    if make is None and hasattr(value, "__array_namespace__"):
        make = getattr(value.__array_namespace__(), "from_dlpack", None)
    if make is None:
        raise TypeError(f"{name!r} is a {type(value).__name__}, whose library has no from_dlpack")
    found: Callable[[Any], Any] = make
    return found


def _nbytes(value: Any) -> int:
    if isinstance(value, MemoryBlock):
        return int(value.size)
    return int(value.nbytes)


def _unique(values: Any) -> list[Any]:
    return list({id(value): value for value in values}.values())


def _nothing() -> None:
    return None


def _reference(value: Any) -> Callable[[], Any]:
    """Tell whether somebody holds it; never, where that cannot be known."""
    try:
        return weakref.ref(value)
    except TypeError:
        return _nothing
