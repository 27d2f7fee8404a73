"""Modules whose weights are moved out of memory and back while they are in use.

A unit (a decoder layer, a vision block, a top-level child) that is to stay is kept by the core's
stream as one more user (`om_stream_keep`): it goes when it is told to, and when its last user has
left. Offloaded units come back when they are used, ahead of use in the order of use. Weights that
autograd still needs stay as they are until it does not.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from omnimem import checkpoint
from omnimem._managed import Movable, Moved, check_target, group_of, swap_out
from omnimem._plan_layout import refuse_experts, repeats
from omnimem._torch_checks import fit
from omnimem._torch_guards import Guards, Uncopied
from omnimem._torch_managed_units import REMEDY, DeviceUnits, ManagedUnits
from omnimem._torch_parts import (
    parts_of_files,
    parts_of_memory,
    refuse_unmovable,
    units_of,
)
from omnimem._torch_units import materialize, restore, unset, uses_of
from omnimem.config import format_size, parse_size
from omnimem.errors import ClosedError
from omnimem.plan import make_plan
from omnimem.store import Store


@dataclass(frozen=True)
class _Wish:
    """What was asked for last."""

    kept: frozenset[int]
    """Units that are to stay."""
    limit: int = 0
    """Bytes of memory, where others pass through a ring; 0: no unit has to."""


_managed: weakref.WeakSet[ManagedModule] = weakref.WeakSet()


class ManagedModule(Uncopied):
    """A module whose weights can be moved (`omnimem._managed.Movable`); `model.omnimem`."""

    remedy = REMEDY

    def __init__(
        self,
        model: nn.Module,
        params: dict[str, nn.Parameter],
        units: ManagedUnits,
        store: Store,
        model_id: str,
        resident: bool,
    ) -> None:
        self.model_id = model_id
        self.group = units.group
        self.nbytes = sum(part.nbytes for unit in units.units for part in unit.parts)
        self.on_use: Callable[[Movable], None] | None = None
        self.on_short: Callable[[Movable], None] | None = None
        self._model = model
        self._params = params
        self._store = store
        self._units = units
        self._all = frozenset(range(len(units.units)))
        self._wish = _Wish(self._all)
        self._home = next(iter(params.values())).device.type
        self._home = "cpu" if self._home == "meta" else self._home
        self._repeats = repeats(units_of(model, params), uses_of(model, params))
        self._guards = Guards(self.remedy, self._all_there)
        self._handles: list[Any] = []
        self._ended = False
        self._begin = store.use_begin
        self._end = store.use_end
        self._storages = [
            (name, StorageWeakRef(param.untyped_storage()), param.nbytes)  # type: ignore[no-untyped-call]
            for name, param in params.items()
            if param.numel() and not param.is_meta
        ]
        """What the parameters' memory was before; somebody may still hold it."""
        self._replaced: set[int] = set()
        """Parameters that show what was read, while the model is being taken over."""
        self._start(resident)

    def _start(self, resident: bool) -> None:
        former: dict[int, torch.Tensor] = {}
        try:
            self._units.load()
            meta = any(param.is_meta for param in self._params.values())
            with torch.inference_mode(False):
                for param in self._params.values():
                    former[id(param)] = materialize(param)
            if meta or not resident:
                self._wish = _Wish(frozenset())
            self._show_all(former)
            self._hook()
        except BaseException:
            self._unhook()
            with torch.inference_mode(False):
                for param in self._params.values():
                    if id(param) in former:
                        restore(param, former[id(param)])
                    elif id(param) in self._replaced:
                        param.data = param.data.clone()
            self._units.end()
            raise
        self._replaced.clear()
        self._model.omnimem = self  # type: ignore[assignment]
        _managed.add(self)

    def _show_all(self, former: dict[int, torch.Tensor]) -> None:
        """Show each unit; where its bytes are read, what they were in memory before goes then."""
        for number, unit in enumerate(self._units.units):
            if number not in self._wish.kept:
                with torch.inference_mode(False):
                    for param in unit.params:
                        param.data = unset(param.shape, param.dtype)
                for part in unit.parts:
                    part.memory = None
                continue
            self._units.stream.keep(number, True)
            self._units.bring(number, self._units._timeout)
            for part in unit.parts:
                part.memory = None
                if part.run is not None:
                    for place in part.places:
                        self._replaced.add(id(place.param))
                        del former[id(place.param)]

    # -- hooks

    def _hook(self) -> None:
        self._units.on_alone = self._alone
        self._units.on_short = self._short
        self._units.hook(self._model, self._handles)
        # Put before the hooks of a unit that is the model itself.
        begin = self._model.register_forward_pre_hook(self._begin_pass, prepend=True)
        self._handles.append(begin)
        self._handles.append(self._model.register_forward_hook(self._end_pass, always_call=True))
        self._guards.put(self._model, {p.dtype for p in self._params.values()}, self._home)

    def _unhook(self) -> None:
        self._guards.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin_pass(self, module: nn.Module, args: Any) -> None:
        self._units.begin_pass(self._begin)
        if self.on_use is not None:
            self.on_use(self)

    def _end_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        with contextlib.suppress(ClosedError):  # of a store that is closed during the pass
            self._units.end_pass(self._end)

    def _alone(self) -> None:
        """A unit is used outside any pass: that is a use of the model, too."""
        self._begin(self.group)
        self._end(self.group)
        if self.on_use is not None:
            self.on_use(self)

    def _short(self) -> None:
        if self.on_short is not None:
            self.on_short(self)

    # -- what is where

    @property
    def state(self) -> str:
        """ "resident", "evictable" (idle in memory), "disk", or "streams"."""
        if self._wish.kept:
            return "resident" if self._wish.kept == self._all else "streams"
        if self._wish.limit:
            return "streams"
        infos = [self._store.info(n) for n in self._units.all_names() if n in self._store]
        return "evictable" if any("host" in i.tiers and not i.leases for i in infos) else "disk"

    @property
    def in_use(self) -> bool:
        """Is some thread inside a pass, or a part of one?"""
        return self._units.in_use()

    def host_bytes(self) -> int:
        """Bytes of memory that the weights take now."""
        return self._store.group_stats(self.group).host_bytes

    @property
    def home(self) -> str:
        """Where the weights are when they are used: "cpu", or a device."""
        return self._units.home

    def home_bytes(self) -> int:
        """Bytes of the memory at home that would be out of use if it were offloaded."""
        return self._units.home_bytes()

    def missing_bytes(self) -> int:
        """Bytes that would have to come home."""
        return self._units.missing_bytes()

    def _all_there(self) -> bool:
        return self._wish.kept == self._all and not self.missing_bytes()

    def _held(self, target: str) -> tuple[tuple[str, int], ...]:
        """What others hold: views of blocks, and the memory that the parameters once had."""
        held: dict[str, int] = {}
        gone: set[int] = set()
        for unit, names in zip(self._units.units, self._units.names, strict=True):
            for part, name in zip(unit.parts, names, strict=True):
                if name not in self._store:
                    continue
                info = self._store.info(name)
                if info.leases:
                    held[part.name] = part.nbytes
                elif "host" not in info.tiers:
                    gone.update(id(place.param) for place in part.places)
        self._storages = [entry for entry in self._storages if not _is_gone(entry[1])]
        for name, _, nbytes in self._storages:
            if target == "disk" and id(self._params[name]) in gone:
                held.setdefault(name, nbytes)
        return tuple(held.items())

    def __repr__(self) -> str:
        return f"<omnimem model {self.model_id!r}: {format_size(self.nbytes)}, {self.state}>"

    # -- moving

    def offload(self, target: str, timeout: float = 30.0) -> Moved:
        """Let the weights go, to "cpu" (idle in memory, until somebody needs it) or to "disk".

        A unit that is in use goes with its last user. When it fails, the model is as it was.

        Raises
        ------
        DiskFullError, IOFailure
            Weights that are nowhere else could not be written.
        BusyError
            They are not written at the deadline.
        """
        self._alive()
        check_target(target, ("cpu", "disk"))
        before, had = self._wish, self.host_bytes()
        try:
            self._apply(_Wish(frozenset()))
            self._units.sweep()
            if target == "disk":
                swap_out(self._store, self.group, self._units.all_names(), timeout)
        except BaseException:
            self._go_back(before, timeout)
            raise
        left = had - self.host_bytes() if target == "disk" else self.nbytes
        return Moved(max(left, 0), self._held(target))

    def fetch(self, target: str | None = None, timeout: float = 30.0) -> Moved:
        """Bring in what is to stay, as `resize` said; what is told to go meanwhile goes.

        Raises
        ------
        CorruptError, IOFailure
            It could not be read; the error names block and file.
        BusyError
            No memory for it at the deadline.
        """
        self._alive()
        check_target(target, (None, self._home))
        wish, missing = self._wish, self.missing_bytes()
        self._bring(wish, timeout)
        return Moved(max(missing - self.missing_bytes(), 0), (), self._wish.kept != self._all)

    def _bring(self, wish: _Wish, timeout: float) -> None:
        for bring in (lambda unit: self._units.bring(unit, timeout), self._units.settled):
            for unit in sorted(wish.kept):
                if self._wish is not wish:
                    return
                bring(unit)

    def resize(self, room: int) -> None:
        """Have at most `room` bytes of memory from now on.

        Units beyond it go when their users leave; those that are to stay come when they are used.

        Raises
        ------
        LimitError
            The room is too small to stream in.
        """
        self._alive()
        self._apply(self._wish_for(room))

    def _wish_for(self, room: int) -> _Wish:
        """What is kept in that much memory, by the rules of `make_plan`: whole units."""
        if self.home == "cpu":
            room = min(room, parse_size(self._store.config.host_limit))
        plan = make_plan(
            (
                (unit.module, [tensor for part in unit.parts for tensor in part.tensors()])
                for unit in self._units.units
            ),
            room,
            self._repeats,
        )
        kept = frozenset(
            number
            for number, unit in enumerate(plan.units)
            if all(run.resident for run in unit.runs)
        )
        return _Wish(kept, 0 if kept == self._all else max(room, plan.memory_bytes))

    def _apply(self, wish: _Wish) -> None:
        """Have units stay or go, as far as that takes no reading."""
        stream = self._units.stream
        self._wish = wish
        stream.linger(True)
        self._store.group(self.group, 0)
        for unit in self._all:
            if unit in wish.kept:
                stream.keep(unit, True)
            else:
                self._units.rest(unit)
        if wish.limit and self.home == "cpu":
            stream.linger(False)
            self._store.group(self.group, wish.limit)

    def _go_back(self, wish: _Wish, timeout: float) -> None:
        """Undo a change that failed; what cannot be read now comes when it is used."""
        self._apply(wish)
        for unit in sorted(wish.kept):
            try:
                self._units.bring(unit, timeout)
                self._units.settled(unit)
            except Exception:  # the first error is the one that counts
                return

    # -- ways out

    def release(self) -> None:
        """Make the parameters ordinary tensors in memory; hooks and blocks go.

        What is out of memory is copied first, a block at a time; then each block goes as soon as
        its copy is there. When a weight cannot be read, its error is raised and nothing changes.
        """
        if self._ended:
            return
        units = self._units
        with torch.inference_mode(False):
            units.reclaim()
            out = self._all - self._wish.kept
            copies = [pair for unit in sorted(out) for pair in units.copies(unit)]
            for unit in sorted(self._wish.kept):
                units.bring(unit, units._timeout)
            for param, tensor in copies:
                param.data = tensor
            self._unhook()
            for unit in sorted(self._wish.kept):
                for param, tensor in units.copies(unit):
                    param.data = tensor
                if units.stream.keep(unit, False):
                    units.stream.unbound(unit)
                units.remove(unit)
            self._leave_model()

    def close(self) -> None:
        """For a model that is thrown away: hooks go, parameters are unset, blocks go."""
        if self._ended:
            return
        self._unhook()
        self._units.unset_all()
        self._leave_model()

    def _leave_model(self) -> None:
        self._units.end()
        if getattr(self._model, "omnimem", None) is self:
            del self._model.omnimem
        _managed.discard(self)
        self._ended = True

    def _alive(self) -> None:
        if self._ended:
            raise ValueError(f"the model {self.model_id!r} is not managed any more")


def _is_gone(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]


def manage_module(
    model: nn.Module,
    store: Store,
    model_id: str,
    model_dir: str | os.PathLike[str] | None,
    timeout: float,
    resident: bool,
) -> ManagedModule:
    """See `omnimem._managed.manage`."""
    params = dict(model.named_parameters())
    if getattr(model, "omnimem", None) is not None:
        raise ValueError("omnimem has this model's weights already: see model.omnimem")
    if not params:
        raise ValueError("cannot move the weights of this model: it has no parameters")
    refuse_unmovable(model, params, meta=model_dir is not None)
    _refuse_shared(params)
    group = group_of(store, model_id)
    make = partial(ManagedUnits, group=group, store=store, timeout=timeout)
    units: ManagedUnits
    device = next(iter(params.values())).device
    if device.type == "cuda" and model_dir is not None:
        raise ValueError(f"model_dir is of a model on the CPU; this one is on {device}")
    if device.type == "cuda":
        at_home = partial(DeviceUnits, group=group, store=store, timeout=timeout, device=device)
        units = at_home(parts_of_memory(model, params))
        return ManagedModule(model, params, units, store, model_id, resident=True)
    if model_dir is None:
        units = make(parts_of_memory(model, params))
        return ManagedModule(model, params, units, store, model_id, resident)
    folder = Path(model_dir)
    with checkpoint.open(folder) as files:
        refuse_experts(files, folder)
        units = make(parts_of_files(model, params, fit(model, files, folder)))
        files.check_unchanged()
    return ManagedModule(model, params, units, store, model_id, resident)


def _refuse_shared(params: dict[str, nn.Parameter]) -> None:
    """A weight has one place: two models cannot move it both."""
    for other in list(_managed):
        theirs = {id(param) for param in other._params.values()}
        memory = {
            param.untyped_storage().data_ptr()
            for param in other._params.values()
            if param.numel() and param.untyped_storage().nbytes() > param.element_size()
        }
        for name, param in params.items():
            if id(param) in theirs or (
                param.numel() and not param.is_meta and param.untyped_storage().data_ptr() in memory
            ):
                raise ValueError(
                    f"cannot move the weights of this model: {name} belongs to the model "
                    f"{other.model_id!r}, too"
                )
