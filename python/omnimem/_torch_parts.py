"""What a managed module consists of: the blocks of its units, and where its parameters lie in them.

With a checkpoint a block is a run of tensors that lie end to end in a file. Without one it is the
memory of the parameters themselves: those that share memory (ties, views) share a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from omnimem import checkpoint
from omnimem._plan_units import PLAIN, Run, Tensor, runs_of
from omnimem._units import execution_order, unit_names
from omnimem.store import Store


@dataclass
class Part:
    """A block of a unit."""

    name: str
    """Its name in the store, the group left out."""
    nbytes: int
    places: list[Place]
    run: Run | None = None
    """Where it lies in a checkpoint."""
    memory: torch.Tensor | None = None
    """The bytes themselves, as uint8, until a store has them."""

    def add(self, store: Store, group: str, timeout: float) -> None:
        """Make it a block."""
        name = f"{group}/{self.name}"
        if self.run is not None:
            store.add_file(
                name,
                self.run.tensors[0].file,
                self.run.offset,
                self.run.length,
                group=group,
                decoded_nbytes=self.run.nbytes if self.run.encoded else None,
            )
        else:
            store.take(name, self.memory, group, timeout)

    def tensors(self) -> tuple[Tensor, ...]:
        """As a plan sees it."""
        return self.run.tensors if self.run else (Tensor(self.name, self.name, 0, self.nbytes),)


@dataclass
class Place:
    """Where a parameter lies in a block."""

    param: nn.Parameter
    offset: int
    dtype: str
    strides: tuple[int, ...]
    """Steps along each dimension, in elements."""

    def of(self, block: int) -> tuple[int, int, str, tuple[int, ...], tuple[int, ...]]:
        """As a stream's windows are told."""
        return block, self.offset, self.dtype, tuple(self.param.shape), self.strides


@dataclass
class UnitParts:
    """A unit: the blocks that are needed together."""

    module: str
    parts: list[Part] = field(default_factory=list)

    @property
    def params(self) -> list[nn.Parameter]:
        """In the order of its blocks."""
        return [place.param for part in self.parts for place in part.places]


def dtype_name(dtype: torch.dtype) -> str:
    """As NumPy and the store spell it."""
    return str(dtype).removeprefix("torch.")


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte, and the one behind the last, in the tensor's storage."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    last = sum((n - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def units_of(model: nn.Module, params: dict[str, nn.Parameter]) -> dict[str, str]:
    """Give each parameter the name of the module that is called for it."""
    return {name: _called(model, unit) for name, unit in unit_names(params).items()}


def _called(model: nn.Module, name: str) -> str:
    """A list of parameters is never called: whoever has it is."""
    while name and type(model.get_submodule(name)).forward is nn.Module.forward:
        name = name.rpartition(".")[0]
    return name


def parts_of_memory(model: nn.Module, params: dict[str, nn.Parameter]) -> list[UnitParts]:
    """The units of a module whose bytes are in its own memory."""
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name, param in params.items():
        if param.numel():
            spans.setdefault(param.untyped_storage().data_ptr(), []).append((*extent(param), name))
    names = units_of(model, params)
    units = {unit: UnitParts(unit) for unit in execution_order(names.values(), config_of(model))}
    made = [_join(params, group) for _, shared in spans.items() for group in _overlapping(shared)]
    places = {name: at for at, name in enumerate(params)}
    for part in sorted(made, key=lambda part: places[part.name]):
        units[names[part.name]].parts.append(part)
    return [unit for unit in units.values() if unit.parts]


def _overlapping(spans: list[tuple[int, int, str]]) -> list[list[tuple[int, int, str]]]:
    groups: list[list[tuple[int, int, str]]] = []
    end = -1
    for span in sorted(spans):
        if span[0] >= end:
            groups.append([])
        groups[-1].append(span)
        end = max(end, span[1])
    return groups


def _join(params: dict[str, nn.Parameter], spans: list[tuple[int, int, str]]) -> Part:
    """One block of parameters that share memory; it has the name of the first in the module."""
    start, end = spans[0][0], max(span[1] for span in spans)
    first = min(spans, key=lambda span: list(params).index(span[2]) if len(spans) > 1 else 0)[2]
    memory = None
    if params[first].device.type == "cpu":
        memory = bytes_at(params[first], start, end - start)
    places = [
        Place(param := params[name], at - start, dtype_name(param.dtype), param.stride())
        for at, _, name in spans
    ]
    return Part(first, end - start, places, memory=memory)


def bytes_at(tensor: torch.Tensor, start: int, nbytes: int) -> torch.Tensor:
    """Bytes of a tensor's storage, where it is."""
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        return empty.set_(tensor.untyped_storage(), start, (nbytes,), (1,))


def bytes_of(part: Part) -> torch.Tensor:
    """The bytes of a part that its parameters show."""
    place = part.places[0]
    start = int(place.param.storage_offset()) * place.param.element_size() - place.offset
    return bytes_at(place.param, start, part.nbytes)


def shown(part: Part, whole: torch.Tensor) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """What its parameters are on the bytes of a part; those that share memory share it again."""
    pairs = []
    for place in part.places:
        param = place.param
        step, rest = divmod(place.offset, param.element_size())
        if rest:  # two types on the same bytes, at odd places
            nbytes = extent(torch.empty_strided(param.shape, place.strides, device="meta"))[1]
            nbytes *= param.element_size()
            mine, step = whole[place.offset : place.offset + nbytes].clone(), 0
        else:
            mine = whole
        fresh = torch.empty(0, dtype=param.dtype, device=whole.device)
        pairs.append((param, fresh.set_(mine.untyped_storage(), step, param.shape, place.strides)))
    return pairs


def parts_of_files(
    model: nn.Module, params: dict[str, nn.Parameter], files: checkpoint.Checkpoint
) -> list[UnitParts]:
    """The units of a module whose bytes are in a checkpoint."""
    names = units_of(model, params)
    tensors: dict[str, list[Tensor]] = {
        unit: [] for unit in execution_order(names.values(), config_of(model))
    }
    for name, unit in names.items():
        info = files.info(name)
        tensors[unit].append(Tensor(name, info.file, info.offset, info.nbytes, info.encoded_nbytes))
    units = []
    for unit, mine in tensors.items():
        parts = []
        for index, run in enumerate(runs_of(mine, lambda _: PLAIN)):
            places = [
                Place(
                    param := params[tensor.name],
                    start,
                    dtype_name(param.dtype),
                    torch.empty(param.shape, device="meta").stride(),
                )
                for tensor, start in zip(run.tensors, run.starts, strict=True)
            ]
            parts.append(Part(f"{unit}#{index}", run.nbytes, places, run=run))
        units.append(UnitParts(unit, parts))
    return units


def config_of(model: nn.Module) -> object:
    """A transformers model says in it how it runs."""
    return getattr(model, "config", None)


def refuse_unmovable(model: nn.Module, params: dict[str, nn.Parameter], *, meta: bool) -> None:
    """Raise ValueError for a parameter that cannot be moved; `meta`: bytes need not be there."""
    buffers = {
        buffer.untyped_storage().data_ptr(): name
        for name, buffer in model.named_buffers()
        if buffer.layout == torch.strided and buffer.numel() and not buffer.is_meta
    }
    for name, param in params.items():
        why = _unmovable(param, meta=meta)
        if not why and param.numel() and not param.is_meta:
            place = param.untyped_storage().data_ptr()
            if place in buffers:
                why = f"shares its memory with the buffer {buffers[place]}, which stays"
        if why:
            raise ValueError(f"cannot move the weights of this model: {name} {why}")
    kinds = {param.device.type for param in params.values()} - {"meta"}
    if len(kinds) > 1:
        raise ValueError(f"cannot move a model that is on {' and '.join(sorted(kinds))} at once")


def _unmovable(param: nn.Parameter, *, meta: bool) -> str:
    if type(param) is not nn.Parameter or type(param.data) is not torch.Tensor:
        return f"is a {type(param).__name__}, whose bytes are its class's own matter"
    if param.layout != torch.strided:
        return f"is not dense ({param.layout})"
    if param.is_quantized:
        return f"is quantised ({param.dtype})"
    if param.is_meta:
        return "" if meta else "is on the meta device: it has no bytes; give model_dir"
    if param.device.type not in ("cpu", "cuda"):
        return f"is on {param.device}"
    if param.is_conj() or param.is_neg():
        return "is a lazy conjugate or negative: resolve it first"
    if param.device.type == "cpu" and param.is_shared():  # type: ignore[no-untyped-call]
        return "is in memory shared with other processes"
    return ""
