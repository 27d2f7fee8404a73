"""The torch face: transformers models that run within a budget of bytes for their weights.

`load` builds a model whose weights are windows on a store's blocks; `attach` does so with a model
that exists. Before a unit (a decoder layer, a vision block, ...) runs, its streamed windows become
`param.data`; after it they go, and the parameter is one NaN expanded to its shape, so that nothing
reads stale bytes unseen. Parameters keep their identity, `forward` is not replaced.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from omnimem import _core, checkpoint
from omnimem._units import execution_order, unit_names
from omnimem.config import StoreConfig, format_size, parse_size
from omnimem.errors import FormatError
from omnimem.plan import Plan, Tensor, make_plan
from omnimem.store import Store

__all__ = ["Streamed", "attach", "load"]

_group_numbers = itertools.count()
_EXPERTS = re.compile(r"\.experts\.|\.block_sparse_moe\.")


def load(
    model_dir: str | os.PathLike[str],
    budget: int | str,
    store: Store | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    verify: str = "always",
    io_backend: str = "auto",
    timeout: float = 30.0,
) -> nn.Module:
    """Build a transformers model whose weights use at most `budget` bytes of memory.

    Parameters
    ----------
    model_dir : path
        A Hugging Face folder: config.json and safetensors files.
    budget : int or str
        Bytes for weights, the ring included ("2GiB"). Weights that fit are all resident.
    store : Store, optional
        Share this store; by default the model has one of its own.
    dtype : torch.dtype, optional
        Only the checkpoint's own is possible: weights are used in place, without a cast.
    verify, io_backend : str
        Of the model's own store (`StoreConfig`).
    timeout : float
        Seconds that a unit may take to arrive.

    Returns
    -------
    torch.nn.Module
        In eval mode, with `.omnimem` (`Streamed`).

    Raises
    ------
    LimitError
        The budget is below the least that this model needs; the message says how much.
    FormatError
        The checkpoint is broken, or does not hold this model.
    ValueError
        A mixture of experts, a dtype change, or a class that transformers does not have.

    Notes
    -----
    Hooks of your own see the weights of the module that they are on, but for one kind: a forward
    pre-hook that is put with `prepend=True` on a unit's module (a decoder layer, a vision block,
    ...) after `load` or `attach`, or a global one, comes before the unit's weights, which are NaN
    then. Put it on an inner module, leave out `prepend`, or register it before `attach`.
    """
    import transformers

    folder = Path(model_dir)
    nbytes = parse_size(budget, "budget")
    with checkpoint.open(folder) as files, torch.inference_mode(False):
        config = transformers.AutoConfig.from_pretrained(folder)
        _refuse_experts(files, folder)
        own = _main_dtype(files)
        _refuse_cast(dtype, own, folder)
        names = config.architectures or []
        model_class = getattr(transformers, names[0], None) if names else None
        if model_class is None:
            raise ValueError(f"{folder}/config.json: transformers has no class {names!r}")
        unset = {name: _unset(info.shape, own) for name, info in _infos(files)}
        model, found = model_class.from_pretrained(
            None,
            config=config,
            state_dict=unset,
            dtype=own,
            ignore_mismatched_sizes=True,  # told below, with those that lack
            output_loading_info=True,
        )
        lacking = sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"]))
        if lacking or found["error_msgs"]:
            raise FormatError(
                f"{folder}: the checkpoint does not hold the model {names[0]}: "
                f"{', '.join(lacking[:5]) or found['error_msgs'][0]}"
                f"{f' and {len(lacking) - 5} more' if len(lacking) > 5 else ''}"
            )
        if model.can_generate() and (folder / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        for name, buffer in model.named_buffers():
            if name in files:
                buffer.copy_(from_dlpack(files.read(name)))
        model.eval()
        _attach(model, files, folder, nbytes, store, verify, io_backend, timeout)
    built: nn.Module = model
    return built


def attach(
    model: nn.Module,
    model_dir: str | os.PathLike[str],
    budget: int | str,
    store: Store | None = None,
    *,
    verify: str = "always",
    io_backend: str = "auto",
    timeout: float = 30.0,
) -> nn.Module:
    """Serve the weights of an existing model from its checkpoint, within `budget` bytes.

    The parameters keep their identity; their former memory is let go. Nothing is changed when
    the checkpoint does not fit the model. See `load` for parameters, errors and hooks.
    """
    folder = Path(model_dir)
    with checkpoint.open(folder) as files:
        _refuse_experts(files, folder)
        _attach(
            model, files, folder, parse_size(budget, "budget"), store, verify, io_backend, timeout
        )
    return model


def _attach(
    model: nn.Module,
    files: checkpoint.Checkpoint,
    folder: Path,
    budget: int,
    store: Store | None,
    verify: str,
    io_backend: str,
    timeout: float,
) -> None:
    if getattr(model, "omnimem", None) is not None:
        raise ValueError("this model streams already; call model.omnimem.detach() first")
    params = dict(model.named_parameters())
    _check_fit(params, dict(model.named_buffers()), files, folder)
    units = unit_names(params)
    order = execution_order(units.values(), getattr(model, "config", None))
    grouped: dict[str, list[Tensor]] = {unit: [] for unit in order}
    for name, unit in units.items():
        info = files.info(name)
        grouped[unit].append(Tensor(name, info.file, info.offset, info.nbytes))
    plan = make_plan(grouped.items(), budget)
    files.check_unchanged()
    own_store = None
    if store is None:
        limit = max(budget, plan.resident_bytes + plan.ring_bytes, 1 << 20)
        store = own_store = Store(
            StoreConfig(host_limit=limit, disk_limit=0, verify=verify, io_backend=io_backend)
        )
    try:
        Streamed(model, params, files, plan, store, own_store, timeout)
    except BaseException:
        if own_store is not None:
            own_store.close()
        raise


class Streamed:
    """What `model.omnimem` is: the plan, what happened, and the ways out.

    Thread safe: threads may call the model at once; a unit's windows are made by the first and
    taken away by the last.
    """

    def __init__(
        self,
        model: nn.Module,
        params: dict[str, nn.Parameter],
        files: checkpoint.Checkpoint,
        plan: Plan,
        store: Store,
        own_store: Store | None,
        timeout: float,
    ) -> None:
        self._model = model
        self._plan = plan
        self._store = store
        self._own_store = own_store
        self._timeout = timeout
        self._threads: list[_Entered] = []
        self._mine = _Mine(self._threads)
        self._handles: list[Any] = []
        self._patched: list[nn.Module] = []
        self._ended = False
        self._group = f"model-{next(_group_numbers)}"
        self._passes = 0
        self._pass_bytes = self._seen_bytes = 0
        self._pass_started = self._pass_seconds = self._pass_stall = self._seen_stall = 0.0
        self._names: list[list[str]] = []
        before: list[tuple[nn.Parameter, torch.Tensor]] = []
        try:
            self._stream, self._params = self._make_stream(params, files)
            self._stream.load()
            with torch.inference_mode(False):
                for param in params.values():
                    before.append((param, _materialize(param)))
            self._bind(resident=True)
            self._hook()
        except BaseException:
            self._unhook()
            for param, former in before:
                _restore(param, former)
            self._release()
            raise
        model.omnimem = self  # type: ignore[assignment]

    # -- construction

    def _make_stream(
        self, params: dict[str, nn.Parameter], files: checkpoint.Checkpoint
    ) -> tuple[_core.Stream, list[tuple[list[nn.Parameter], list[nn.Parameter]]]]:
        """Blocks, units and windows; per unit its (resident, streamed) parameters."""
        limit = max(self._plan.budget_bytes, self._plan.resident_bytes + self._plan.ring_bytes)
        self._store.group(self._group, limit)
        units, windows, bound = [], [], []
        for unit in self._plan.units:
            blocks, views = [], []
            names: list[str] = []
            self._names.append(names)
            mine: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
            for index, run in enumerate(unit.runs):
                name = f"{self._group}/{unit.name}#{index}"
                self._store.add_file(
                    name, run.tensors[0].file, run.offset, run.nbytes, group=self._group
                )
                names.append(name)
                blocks.append((name, run.resident))
                for tensor in run.tensors:
                    info = files.info(tensor.name)
                    views.append((index, tensor.offset - run.offset, info.dtype, info.shape))
                    mine[not run.resident].append(params[tensor.name])
            units.append((unit.name, blocks))
            windows.append(views)
            bound.append(mine)
        stream = _core.Stream(self._store, self._group, units)
        for index, views in enumerate(windows):
            stream.set_windows(index, views)
        return stream, bound

    def _bind(self, *, resident: bool) -> None:
        with torch.inference_mode(False):
            for unit, params in enumerate(self._params):
                capsules = self._stream.windows(unit, resident)
                for param, capsule in zip(params[not resident], capsules, strict=True):
                    param.data = from_dlpack(capsule)
                for param in params[1]:
                    param.data = _unset(param.shape, param.dtype)

    def _hook(self) -> None:
        names = [unit.name for unit in self._plan.units]
        modules = _unit_modules(self._model, names, self._params)
        inside = {id(wide): set(map(id, wide.modules())) for group in modules for wide in group}
        self._outer: list[set[int]] = [set() for _ in modules]
        for unit, group in enumerate(modules):
            for other, others in enumerate(modules):
                if unit != other and any(
                    id(module) in inside[id(wide)] for module in group for wide in others
                ):
                    self._outer[unit].add(other)
        for unit, group in enumerate(modules):
            if not self._params[unit][1]:
                continue
            for module in group:
                leave = module.register_forward_hook(partial(self._leave, unit), always_call=True)
                self._handles.append(leave)
                enter = partial(self._enter, unit, leave.id)
                self._handles.append(module.register_forward_pre_hook(enter, prepend=True))
        # Put before the hooks of a unit that is the model itself: a pass begins with nothing held.
        begin = self._model.register_forward_pre_hook(self._begin_pass, prepend=True)
        end = self._model.register_forward_hook(self._end_pass, always_call=True)
        self._handles += [begin, end]
        self._guard()

    def _guard(self) -> None:
        """Whatever would read, copy or convert parameters that are not there says so."""
        if not self._plan.streams:
            return
        for module in self._model.modules():
            self._patched.append(module)
            module._apply = partial(self._convert, module._apply)  # type: ignore[method-assign]
            for register in (
                module.register_state_dict_pre_hook,
                module.register_load_state_dict_pre_hook,
            ):
                self._handles.append(register(self._refuse_state))  # type: ignore[no-untyped-call]

    # -- hooks

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
            if not self._stream.enter(unit, held, self._timeout):
                return
            with torch.inference_mode(False):
                capsules = self._stream.windows(unit, False)
                for param, capsule in zip(self._params[unit][1], capsules, strict=True):
                    param.data = from_dlpack(capsule)
            self._stream.bound(unit)
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
        left = map(self._stream.leave, map(mine.held.pop, (-1,)))
        mine.ended.extend(itertools.compress((unit,), left))
        self._settle()

    def _settle(self) -> None:
        """Take away the windows of units that nobody uses any more."""
        ended = self._mine.ended
        while ended:
            self._unset(ended[-1])
            collections.deque(map(self._stream.unbound, map(ended.pop, (-1,))), maxlen=0)

    def _unset(self, unit: int) -> None:
        with torch.inference_mode(False):
            for param in self._params[unit][1]:
                param.data = _unset(param.shape, param.dtype)

    def _begin_pass(self, module: nn.Module, args: Any) -> None:
        self._reclaim()
        self._pass_started = time.perf_counter()

    def _reclaim(self) -> None:
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

    def _end_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        seconds = time.perf_counter() - self._pass_started
        stats = self._stream.stats()
        self._pass_bytes = stats["read_bytes"] - self._seen_bytes
        self._seen_bytes = stats["read_bytes"]
        self._pass_stall = stats["stall_seconds"] - self._seen_stall
        self._seen_stall = stats["stall_seconds"]
        self._pass_seconds = seconds
        self._passes += 1

    # -- guards

    def _convert(
        self, apply: Callable[..., nn.Module], fn: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """`.to()` that changes nothing is fine, all else needs the weights."""
        if getattr(fn, "__qualname__", "") == "Module.to.<locals>.convert":
            probes = {param.dtype: param for params in self._params for param in params[1]}
            if all(
                (to := fn(torch.empty(0, dtype=dtype))).dtype == dtype and to.device.type == "cpu"
                for dtype in probes
            ):
                return getattr(apply, "__self__", None)
        self._refuse("convert or move")

    def _refuse_state(self, *args: Any) -> None:
        self._refuse("read or load the state of")

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"cannot {what} a model whose weights are omnimem's "
            f"({format_size(self._plan.prefill_bytes)} of them on disk); call "
            "model.omnimem.detach() first, which gives the model memory of its own for all of them"
        )

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse("copy")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse("pickle")

    def __repr__(self) -> str:
        plan = self._plan
        return (
            f"<omnimem.torch.Streamed: {format_size(plan.resident_bytes)} of "
            f"{format_size(plan.weight_bytes)} resident, ring {format_size(plan.ring_bytes)}>"
        )

    # -- what users ask

    def plan(self) -> Plan:
        """What stays, what streams, and the seconds that a decode pass should take.

        `seconds_per_pass` is the larger of two times: reading the bytes of a decode pass at the
        rate measured so far (loading the residents counts), and the compute time of the last pass
        (0 before the first one). None when nothing was read yet.
        """
        rate = self.stats()["read_bytes_per_second"]
        if not rate:
            return self._plan
        compute = max(self._pass_seconds - self._pass_stall, 0.0)
        reading = self._plan.stream_bytes / rate
        return dataclasses.replace(self._plan, seconds_per_pass=max(compute, reading))

    def stats(self) -> dict[str, Any]:
        """Counters since the start.

        Keys: `passes`, `bytes_read`, `bytes_last_pass`, `seconds_last_pass`, `stall_seconds`,
        `stall_last_pass`, `read_bytes_per_second` (of the device while it reads), `enters`,
        `hits` (streamed units whose bytes were there), `mispredicted`, `resident_bytes`,
        `used_bytes`, `peak_bytes`, `exported_bytes`, `io_backend`, `io_reason`.
        """
        own, store = self._stream.stats(), self._store.stats()
        busy = store.read_busy_seconds
        return {
            "passes": self._passes,
            "bytes_read": own["read_bytes"],
            "bytes_last_pass": self._pass_bytes,
            "seconds_last_pass": self._pass_seconds,
            "stall_seconds": own["stall_seconds"],
            "stall_last_pass": self._pass_stall,
            "read_bytes_per_second": store.read_bytes / busy if busy else None,
            "enters": own["enters"],
            "hits": own["hits"],
            "mispredicted": own["mispredicted"],
            "resident_bytes": self._plan.resident_bytes,
            "used_bytes": store.host.used_bytes,
            "peak_bytes": store.host.peak_bytes,
            "exported_bytes": store.exported_bytes,
            "io_backend": store.io_backend,
            "io_reason": store.io_reason,
        }

    # -- ways out

    def detach(self) -> nn.Module:
        """Make every parameter an ordinary tensor in memory; hooks go, an own store closes.

        What streams is copied first, a block at a time; then each resident block goes as soon as
        its copy is there. So the model takes no more memory than its weights and the ring at any
        moment. (A shared store keeps what it gets back for its other blocks.) When a weight cannot
        be read, its error is raised and the model streams on; when copying a resident one fails,
        the model has all its weights, and another call goes on.
        """
        if self._ended:
            return self._model
        with torch.inference_mode(False):
            if self._handles:
                self._reclaim()
                for param, tensor in list(self._copies()):
                    param.data = tensor
                self._unhook()
            # What is left of the store are the windows on resident blocks: a block's last one
            # takes its memory along.
            self._stream.close()
            if self._own_store is not None:
                self._own_store.close()
            for names, (resident, _) in zip(self._names, self._params, strict=True):
                for param in resident:
                    param.data = param.data.clone()
                self._remove(names)
        self._release()
        return self._model

    def _copies(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Copies of what streams; nothing is read ahead, since nothing is read twice."""
        for unit, names, (_, streamed) in zip(
            self._plan.units, self._names, self._params, strict=True
        ):
            params = iter(streamed)
            for run, name in zip(unit.runs, names, strict=True):
                if run.resident:
                    continue
                with self._store.lease(name, timeout=self._timeout) as lease:
                    for tensor in run.tensors:
                        param = next(params)
                        dtype = str(param.dtype).removeprefix("torch.")
                        at = tensor.offset - run.offset
                        yield param, from_dlpack(lease.window(at, dtype, param.shape)).clone()
                self._store.evict(name)

    def close(self) -> None:
        """For a model that is thrown away: hooks go, parameters are unset, an own store closes."""
        if self._ended:
            return
        self._unhook()
        self._unbind_all()
        self._release()

    def _unbind_all(self) -> None:
        with torch.inference_mode(False):
            for resident, streamed in self._params:
                for param in itertools.chain(resident, streamed):
                    param.data = _unset(param.shape, param.dtype)

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._patched:
            module.__dict__.pop("_apply", None)
        self._patched.clear()

    def _release(self) -> None:
        if hasattr(self, "_stream"):
            self._stream.close()
        if self._own_store is not None:
            self._own_store.close()
        for names in self._names:
            self._remove(names)
        if getattr(self._model, "omnimem", None) is self:
            del self._model.omnimem
        self._ended = True

    def _remove(self, names: list[str]) -> None:
        """Take blocks out of a shared store; safe to repeat."""
        if self._own_store is None:
            for name in names:
                if name in self._store:
                    self._store.remove(name)


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


def _materialize(param: nn.Parameter) -> torch.Tensor:
    """Return what `_restore` needs; a parameter of the meta device gets a place in memory."""
    if not param.is_meta:
        return param.data
    former = nn.Parameter(_unset(param.shape, param.dtype), requires_grad=param.requires_grad)
    torch.utils.swap_tensors(param, former)  # type: ignore[no-untyped-call]
    return former


def _restore(param: nn.Parameter, former: torch.Tensor) -> None:
    if former.is_meta:
        torch.utils.swap_tensors(param, former)  # type: ignore[no-untyped-call]
    else:
        param.data = former


# -- checks


def _infos(files: checkpoint.Checkpoint) -> Iterator[tuple[str, checkpoint.TensorInfo]]:
    return ((name, files.info(name)) for name in files.names())


def _unset(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """One NaN (the least value where there is none) expanded to a shape."""
    least = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full((), least, dtype=dtype).expand(shape)


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch has no dtype {name}")
    return dtype


def _main_dtype(files: checkpoint.Checkpoint) -> torch.dtype:
    held: dict[str, int] = {}
    for _, info in _infos(files):
        held[info.dtype] = held.get(info.dtype, 0) + info.nbytes
    return _torch_dtype(max(held, key=lambda name: held[name]))


def _refuse_cast(dtype: torch.dtype | str | None, own: torch.dtype, folder: Path) -> None:
    wanted = _torch_dtype(dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    if wanted not in (None, "auto", own):
        raise ValueError(
            f"{folder}: dtype={wanted} would need a cast of every weight each time that it is "
            f"read; the checkpoint's own is {own}. Leave dtype out, or convert the checkpoint"
        )


def _refuse_experts(files: checkpoint.Checkpoint, folder: Path) -> None:
    expert = next((name for name in files.names() if _EXPERTS.search(name)), None)
    if expert is not None:
        raise ValueError(
            f"{folder}: a mixture of experts ({expert}) is not supported; only dense models are"
        )


def _check_fit(
    params: dict[str, nn.Parameter],
    buffers: dict[str, torch.Tensor],
    files: checkpoint.Checkpoint,
    folder: Path,
) -> None:
    lacking = [name for name in params if name not in files]
    if lacking:
        raise FormatError(
            f"{folder}: the checkpoint lacks {len(lacking)} parameters of the model: "
            f"{', '.join(lacking[:5])}"
        )
    for name, param in params.items():
        info = files.info(name)
        if tuple(info.shape) != tuple(param.shape):
            raise FormatError(
                f"{folder}: {name} has shape {tuple(info.shape)} in the checkpoint and "
                f"{tuple(param.shape)} in the model"
            )
        if _torch_dtype(info.dtype) != param.dtype:
            raise ValueError(
                f"{folder}: {name} is {info.dtype} in the checkpoint and {param.dtype} in the "
                "model; weights are used in place, without a cast: build the model in the "
                "checkpoint's dtype"
            )
        if param.device.type not in ("cpu", "meta"):
            raise ValueError(f"{name} is on {param.device}; only models on the CPU can stream")
    for name, buffer in buffers.items():
        if buffer.device.type != "cpu":
            raise ValueError(
                f"{folder}: the buffer {name} is on {buffer.device}; buffers are the model's own: "
                "fill it on the CPU, or let omnimem.torch.load build the model"
            )


def _unit_modules(
    model: nn.Module,
    units: list[str],
    params: list[tuple[list[nn.Parameter], list[nn.Parameter]]],
) -> list[list[nn.Module]]:
    """The modules that use each unit: its own, and those that share a tied parameter of it."""
    owner = {id(p): unit for unit, pair in enumerate(params) for part in pair for p in part}
    modules = [[model.get_submodule(name)] for name in units]
    known = [set(map(id, group[0].modules())) for group in modules]
    for module in model.modules():
        for param in module.parameters(recurse=False):
            unit = owner.get(id(param))
            if unit is not None and id(module) not in known[unit]:
                modules[unit].append(module)
                known[unit].add(id(module))
    return modules
