"""Units that are told to stay or to go: at home in the store's memory, or on another device."""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Callable, Iterable
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from omnimem import _core
from omnimem._torch_parts import UnitParts, bytes_of, shown
from omnimem._torch_units import Units, unset
from omnimem.errors import BusyError
from omnimem.store import Store

REMEDY = (
    "to move; call model.omnimem.release() first, which gives the model memory of its own for all "
    "of them"
)

_T = TypeVar("_T")
_FIRST = 0.01
"""Of the seconds that a unit may take to come: until memory that others keep is asked for."""


class ManagedUnits(Units):
    """Units that are told to stay or to go."""

    home = "cpu"
    """Where their weights are when they are used."""

    remedy = REMEDY
    stays = True

    def __init__(self, units: list[UnitParts], group: str, store: Store, timeout: float) -> None:
        super().__init__(group, store, timeout)
        self.units = units
        self.modules = [unit.module for unit in units]
        self.names = [[f"{group}/{part.name}" for part in unit.parts] for unit in units]
        self.params = [([], unit.params) for unit in units]
        self.on_alone: Callable[[], None] = lambda: None
        """Called when a unit is entered outside any pass."""
        self.on_short: Callable[[], None] = lambda: None
        """Called when a unit waits for memory that is leased; then it tries again."""
        self._saved: set[int] = set()
        """Units of which parameters stayed as they are, since autograd has them."""

    def load(self) -> None:
        """Add the blocks, and make the stream."""
        for unit in self.units:
            for part in unit.parts:
                part.add(self._store, self.group, self._timeout)
        self.stream = _core.Stream(
            self._store,
            self.group,
            [
                (unit.module, [(name, 0) for name in names])
                for unit, names in zip(self.units, self.names, strict=True)
            ],
        )
        for number, unit in enumerate(self.units):
            self.stream.set_windows(
                number,
                [place.of(at) for at, part in enumerate(unit.parts) for place in part.places],
            )
        self.stream.linger(True)

    def all_names(self) -> list[str]:
        """Blocks of all units."""
        return list(itertools.chain.from_iterable(self.names))

    def home_bytes(self) -> int:
        """Bytes of the memory at home that resting all units would put out of use."""
        stats = self._store.group_stats(self.group)
        return stats.host_bytes - stats.spare_bytes

    def missing_bytes(self) -> int:
        """Bytes that would have to come home."""
        return self._store.group_stats(self.group).missing_bytes

    def remove(self, unit: int) -> None:
        """Let a unit's blocks go; safe to repeat."""
        for name in self.names[unit]:
            if name in self._store:
                self._store.remove(name)

    def end(self) -> None:
        """Let all blocks go; safe to repeat."""
        self.close()
        for unit in range(len(self.names)):
            self.remove(unit)

    # -- staying and going

    def rest(self, unit: int) -> None:
        """Keep a unit no longer: it goes now, or with its last user."""
        self._settle()
        # Asked and noted in one call, inside of which no signal handler runs.
        ends = map(self.stream.keep, (unit,), (False,))
        self._mine.ended.extend(itertools.compress((unit,), ends))
        self._settle()

    def bring(self, unit: int, timeout: float) -> None:
        """Enter a unit and leave it; one that is kept stays."""
        self._settle()
        self._take(unit, timeout)
        self._let_go()

    def settled(self, unit: int) -> None:
        """A unit that is kept was brought in."""

    def sweep(self) -> None:
        """Take away what autograd had, and has no longer."""
        for unit in sorted(self._saved):
            self.bring(unit, self._timeout)

    def _unbind(self, unit: int) -> None:
        """Take a unit's windows away, but for those that autograd has.

        A leaf that autograd saved is the parameter itself, and what it is given now would be what
        backward reads.
        """
        saved = False
        with torch.inference_mode(False):
            for param in self.params[unit][1]:
                if param._use_count() > 1:  # type: ignore[attr-defined]
                    saved = True
                else:
                    param.data = unset(param.shape, param.dtype)
        (self._saved.add if saved else self._saved.discard)(unit)

    # -- use

    def enter(self, unit: int, leave: int, module: nn.Module) -> None:
        """Before a module that uses a unit: outside any pass, that is a use of the model."""
        mine = self._mine
        if not mine.passes and not mine.held:
            self.on_alone()
        super().enter(unit, leave, module)

    def _get(self, unit: int, held: list[int], timeout: float) -> bool:
        get = super()._get
        return self._in_tries(lambda left: get(unit, held, left), timeout)

    def _in_tries(self, attempt: Callable[[float], _T], timeout: float) -> _T:
        """Do what needs memory; when it is leased, who keeps it is told between two tries."""
        # Each try is twice as long: one that ends gives up what it has begun to read.
        now, tried = time.monotonic(), timeout * _FIRST
        end = now + timeout
        while now + tried < end:
            try:
                return attempt(tried)
            except BusyError as error:
                if error.holders:
                    self.on_short()
            now, tried = time.monotonic(), 2 * tried
        return attempt(max(end - now, 0.0))

    def _lease(self, name: str, write: bool = False) -> _core.Lease:
        return self._in_tries(partial(self._store.lease, name, write), self._timeout)

    def begin_pass(self, begin: Callable[[str], None]) -> None:
        """Note that a pass of this thread begins; those that an interrupt left end."""
        mine = self._mine
        self.reclaim()
        if not mine.passes:
            mine.passes.extend(zip((self.group,), map(begin, (self.group,)), strict=True))

    def end_pass(self, end: Callable[[str], None]) -> None:
        """Note that this thread's pass has ended."""
        passes = self._mine.passes
        while passes:
            ends = map(end, map(itemgetter(0), map(passes.pop, (-1,))))
            collections.deque(ends, maxlen=0)

    def copies(self, unit: int) -> Iterable[tuple[nn.Parameter, torch.Tensor]]:
        """What a unit's parameters are in memory of their own."""
        for part, name in zip(self.units[unit].parts, self.names[unit], strict=True):
            with self._lease(name) as lease:
                if part.run is None:
                    window = lease.window(0, "uint8", (part.nbytes,))
                    yield from shown(part, from_dlpack(window).clone())
                    continue
                for place in part.places:
                    yield place.param, from_dlpack(lease.window(*place.of(0)[1:])).clone()

    def in_use(self) -> bool:
        """Is a thread inside a pass or a unit?"""
        return any(
            (held or passes) and thread.is_alive()
            for thread, held, _, passes in list(self._threads)
        )


class DeviceUnits(ManagedUnits):
    """Units that are at home on another device: only what is not there is in the store.

    The stream's units have no blocks; it says who may touch a unit. Blocks are made before a unit
    is told to go, while that may still fail, and removed when it is home again.
    """

    stays = False
    """`DataParallel` makes replicas, which would share what stands in for their `_call_impl`."""

    def __init__(
        self,
        units: list[UnitParts],
        group: str,
        store: Store,
        timeout: float,
        device: torch.device,
    ) -> None:
        super().__init__(units, group, store, timeout)
        self._device = device
        self.home = str(device)
        self._versions: dict[int, list[int]] = {}
        """Of each unit that has blocks: its parameters' versions when they had the same bytes."""

    def home_bytes(self) -> int:
        """Bytes on the device that resting all units would put out of use."""
        return sum(map(self._nbytes, set(range(len(self.units))) - set(self._versions)))

    def missing_bytes(self) -> int:
        """Bytes that would have to come home."""
        return sum(map(self._nbytes, list(self._versions)))

    def _nbytes(self, unit: int) -> int:
        return sum(part.nbytes for part in self.units[unit].parts)

    def load(self) -> None:
        """Make the stream; the parameters are at home."""
        units: list[Any] = [(unit.module, []) for unit in self.units]
        self.stream = _core.Stream(self._store, self.group, units)

    def rest(self, unit: int) -> None:
        """Have its bytes in the store, then let it go."""
        if unit not in self._versions:
            self._stage(unit)
        super().rest(unit)

    def _stage(self, unit: int) -> None:
        versions = self._version(unit)
        try:
            for part in self.units[unit].parts:
                part.memory = bytes_of(part).to("cpu", copy=True)
                part.add(self._store, self.group, self._timeout)
                part.memory = None
        except BaseException:
            self.remove(unit)
            raise
        self._versions[unit] = versions

    def _version(self, unit: int) -> list[int]:
        return [param._version for param in self.units[unit].params]

    def _bind(self, unit: int) -> None:
        if unit not in self._versions:
            return
        if unit + 1 in self._versions:
            self._store.prefetch(self.names[unit + 1])
        with torch.inference_mode(False):
            for param, tensor in list(self.copies(unit)):
                param.data = tensor
        self._versions[unit] = self._version(unit)

    def _unbind(self, unit: int) -> None:
        if self._versions[unit] != self._version(unit):  # written to since
            for part, name in zip(self.units[unit].parts, self.names[unit], strict=True):
                with self._lease(name, write=True) as lease:
                    from_dlpack(lease.window(0, "uint8", (part.nbytes,))).copy_(bytes_of(part))
        self._versions[unit] = self._version(unit)
        saved = False
        with torch.inference_mode(False):
            for param in self.units[unit].params:
                if param._use_count() > 1:  # type: ignore[attr-defined]
                    saved = True
                else:
                    param.data = unset(param.shape, param.dtype, self._device)
        (self._saved.add if saved else self._saved.discard)(unit)

    def copies(self, unit: int) -> Iterable[tuple[nn.Parameter, torch.Tensor]]:
        """What a unit's parameters are at home; nothing, where they are."""
        if unit not in self._versions:
            return
        for part, name in zip(self.units[unit].parts, self.names[unit], strict=True):
            with self._lease(name) as lease:
                window = from_dlpack(lease.window(0, "uint8", (part.nbytes,)))
                yield from shown(part, window.to(self._device, copy=True))

    def settled(self, unit: int) -> None:
        """A unit that is kept is home: its blocks go."""
        if self._versions.pop(unit, None) is not None:
            self.remove(unit)
