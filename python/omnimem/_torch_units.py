"""The units of a streaming model: their blocks, and when their windows come and go.

A unit's first user makes its windows, its last one takes them away. Parameters keep their identity;
what changes is `param.data`. Ctrl-C may strike before any bytecode: what it leaves loaded is let go
by the thread's next hook, or by the next pass of any thread.
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from omnimem import _core, checkpoint
from omnimem._torch_guards import Uncopied
from omnimem.plan import Plan
from omnimem.store import Store

_group_numbers = itertools.count()
_KEEP = {None: 0, "plain": 1, "fast": 2, "balanced": 3}
"""As the core numbers what is kept of a block (`enum om_keep`)."""


class Units(Uncopied):
    """A model's blocks in a store, the stream of them, and the parameters that show them."""

    def __init__(self, plan: Plan, store: Store, timeout: float) -> None:
        self.group = f"model-{next(_group_numbers)}"
        self.names: list[list[str]] = []
        """Blocks of each unit, in the order of its runs."""
        self.params: list[tuple[list[nn.Parameter], list[nn.Parameter]]] = []
        """Parameters of each unit, resident and streamed, in the order of its runs."""
        self.stream: _core.Stream
        self._plan = plan
        self._store = store
        self._timeout = timeout
        self._threads: list[_Entered] = []
        self._mine = _Mine(self._threads)
        self._outer: list[set[int]] = []

    # -- construction

    def load(self, params: dict[str, nn.Parameter], files: checkpoint.Checkpoint) -> None:
        """Add the blocks, make the stream, and read what is resident."""
        plan = self._plan
        self._store.group(self.group, max(plan.budget_bytes, plan.memory_bytes))
        units, windows = [], []
        for unit in plan.units:
            blocks, views = [], []
            names: list[str] = []
            mine: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
            self.names.append(names)
            for index, run in enumerate(unit.runs):
                name = f"{self.group}/{unit.name}#{index}"
                self._store.add_file(
                    name,
                    run.tensors[0].file,
                    run.offset,
                    run.length,
                    group=self.group,
                    decoded_nbytes=run.nbytes if run.encoded else None,
                )
                names.append(name)
                blocks.append((name, _KEEP[run.keep]))
                for tensor, start in zip(run.tensors, run.starts, strict=True):
                    info = files.info(tensor.name)
                    views.append((index, start, info.dtype, info.shape))
                    mine[not run.resident].append(params[tensor.name])
            units.append((unit.name, blocks))
            windows.append(views)
            self.params.append(mine)
        self.stream = _core.Stream(self._store, self.group, units)
        for number, views in enumerate(windows):
            self.stream.set_windows(number, views)
        self.stream.reserve(plan.ring_bytes)
        self.stream.load()

    def bind(self) -> None:
        """Show the residents; all other parameters are unset."""
        for unit, (resident, _) in enumerate(self.params):
            self._show(unit, resident=True, params=resident)
            self._unset(unit)

    def hook(self, model: nn.Module, handles: list[Any]) -> None:
        """Hook the modules that use a streamed unit; add to `handles` as they come."""
        modules = self._modules(model)
        inside = {id(wide): set(map(id, wide.modules())) for group in modules for wide in group}
        self._outer = [set() for _ in modules]
        for unit, group in enumerate(modules):
            for other, others in enumerate(modules):
                if unit != other and any(
                    id(module) in inside[id(wide)] for module in group for wide in others
                ):
                    self._outer[unit].add(other)
        for unit, group in enumerate(modules):
            if not self.params[unit][1]:
                continue
            for module in group:
                leave = module.register_forward_hook(partial(self._leave, unit), always_call=True)
                handles.append(leave)
                enter = partial(self._enter, unit, leave.id)
                handles.append(module.register_forward_pre_hook(enter, prepend=True))

    def _modules(self, model: nn.Module) -> list[list[nn.Module]]:
        """The modules that use each unit: its own, and those that share a tied parameter of it."""
        owner = {
            id(p): unit for unit, pair in enumerate(self.params) for part in pair for p in part
        }
        modules = [[model.get_submodule(unit.name)] for unit in self._plan.units]
        known = [set(map(id, group[0].modules())) for group in modules]
        for module in model.modules():
            for param in module.parameters(recurse=False):
                unit = owner.get(id(param))
                if unit is not None and id(module) not in known[unit]:
                    modules[unit].append(module)
                    known[unit].add(id(module))
        return modules

    # -- use

    def _enter(self, unit: int, leave: int, module: nn.Module, args: Any) -> None:
        hooks: Any = module._forward_hooks
        if next(reversed(hooks)) != leave:  # those that came after attach see the weights, too
            hooks.move_to_end(leave)
        held = self._mine.held
        while held and held[-1] not in self._outer[unit] and held[-1] != unit:
            self._let_go()  # left loaded by an interrupt
        self._settle()
        before = len(held)
        try:
            if not self.stream.enter(unit, held, self._timeout):
                return
            self._show(unit, resident=False, params=self.params[unit][1])
            self.stream.bound(unit)
        except BaseException:
            while len(held) > before:
                self._let_go()
            raise

    def _leave(self, unit: int, module: nn.Module, args: Any, output: Any) -> None:
        held = self._mine.held
        while unit in held:
            last = held[-1]
            self._let_go()
            if last == unit:
                break

    def _let_go(self) -> None:
        """Leave the unit that this thread entered last."""
        mine = self._mine
        unit = mine.held[-1]
        # Taken off, left and noted in one call, inside of which no signal handler runs.
        left = map(self.stream.leave, map(mine.held.pop, (-1,)))
        mine.ended.extend(itertools.compress((unit,), left))
        self._settle()

    def _settle(self) -> None:
        """Take away the windows of units that nobody uses any more."""
        ended = self._mine.ended
        while ended:
            self._unset(ended[-1])
            collections.deque(map(self.stream.unbound, map(ended.pop, (-1,))), maxlen=0)

    def reclaim(self) -> None:
        """Leave what an interrupt left loaded, in this thread or in one that is no more."""
        mine = self._mine
        for entered in list(self._threads):
            thread, held, ended = entered
            if not thread.is_alive() and entered in self._threads:
                self._threads.remove(entered)
                mine.held.extend(held)
                mine.ended.extend(ended)
        while mine.held:
            self._let_go()
        self._settle()

    def _show(self, unit: int, *, resident: bool, params: list[nn.Parameter]) -> None:
        with torch.inference_mode(False):
            capsules = self.stream.windows(unit, resident)
            for param, capsule in zip(params, capsules, strict=True):
                param.data = from_dlpack(capsule)

    def _unset(self, unit: int) -> None:
        with torch.inference_mode(False):
            for param in self.params[unit][1]:
                param.data = unset(param.shape, param.dtype)

    # -- ways out

    def copies(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Copies of what streams; nothing is read ahead, since nothing is read twice."""
        for number, (unit, names, (_, streamed)) in enumerate(
            zip(self._plan.units, self.names, self.params, strict=True)
        ):
            params = iter(streamed)
            for run, name in zip(unit.runs, names, strict=True):
                if run.resident:
                    continue
                with self._store.lease(name, timeout=self._timeout) as lease:
                    for start in run.starts:
                        param = next(params)
                        dtype = str(param.dtype).removeprefix("torch.")
                        yield param, from_dlpack(lease.window(start, dtype, param.shape)).clone()
                self._store.evict(name)
            self.stream.forget(number)

    def unset_all(self) -> None:
        """Unset every parameter, resident ones too."""
        with torch.inference_mode(False):
            for param in itertools.chain.from_iterable(itertools.chain(*self.params)):
                param.data = unset(param.shape, param.dtype)

    def close(self) -> None:
        """Let the blocks go; windows keep their bytes."""
        if hasattr(self, "stream"):
            self.stream.close()


_Entered = tuple[threading.Thread, list[int], list[int]]


class _Mine(threading.local):
    """What one thread entered, the innermost last, and what it has yet to take away.

    Both are right at any moment that Ctrl-C can strike: the next hook of the thread goes on there,
    or, when the thread is no more, the next pass of any other.
    """

    def __init__(self, threads: list[_Entered]) -> None:
        self.held: list[int] = []
        self.ended: list[int] = []
        threads.append((threading.current_thread(), self.held, self.ended))


def unset(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """One NaN (the least value where there is none) expanded to a shape."""
    least = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full((), least, dtype=dtype).expand(shape)


def materialize(param: nn.Parameter) -> torch.Tensor:
    """Return what `restore` needs; a parameter of the meta device gets a place in memory."""
    if not param.is_meta:
        return param.data
    former = nn.Parameter(unset(param.shape, param.dtype), requires_grad=param.requires_grad)
    torch.utils.swap_tensors(param, former)  # type: ignore[no-untyped-call]
    return former


def restore(param: nn.Parameter, former: torch.Tensor) -> None:
    """Give a parameter what it was before `materialize`."""
    if former.is_meta:
        torch.utils.swap_tensors(param, former)  # type: ignore[no-untyped-call]
    else:
        param.data = former
