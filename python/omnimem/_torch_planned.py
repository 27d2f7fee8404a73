"""The units of a model that streams by a plan, made once: what stays, what comes and goes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from omnimem import _core, checkpoint
from omnimem._torch_units import Units
from omnimem.plan import Plan
from omnimem.store import Store

_group_numbers = itertools.count()
_KEEP = {None: 0, "plain": 1, "fast": 2, "balanced": 3}
"""As the core numbers what is kept of a block (`enum om_keep`)."""


class PlannedUnits(Units):
    """A model's blocks in a store, by a plan."""

    def __init__(self, plan: Plan, store: Store, timeout: float) -> None:
        super().__init__(f"model-{next(_group_numbers)}", store, timeout)
        self.modules = [unit.name for unit in plan.units]
        self._plan = plan

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
        for unit in range(len(self.params)):
            self._show(unit, resident=True)
            self._unbind(unit)

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
