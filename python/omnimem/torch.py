"""The torch face: transformers models that run within a budget of bytes for their weights.

`load` builds a model whose weights are windows on a store's blocks; `attach` does so with a model
that exists. Before a unit (a decoder layer, a vision block, ...) runs, its streamed windows become
`param.data`; after it they go, and the parameter is one NaN expanded to its shape, so that nothing
reads stale bytes unseen. Parameters keep their identity, `forward` is not replaced.

`_torch_checks` says what is refused, `_torch_units` makes windows come and go, `_torch_guards`
stops who would read what is not there, and `_torch_streamed` is the handle, `model.omnimem`.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from omnimem import checkpoint
from omnimem._plan_layout import (
    Layout,
    check_folder,
    lay_out,
    library_of,
    measure_plan,
    plan_layout,
    read_config,
    refuse_experts,
)
from omnimem._torch_checks import fit, infos, main_dtype, refuse_cast
from omnimem._torch_names import parameter_names
from omnimem._torch_outline import outline
from omnimem._torch_streamed import Streamed
from omnimem._torch_units import unset, uses_of
from omnimem.config import StoreConfig, parse_size
from omnimem.errors import FormatError
from omnimem.plan import CODINGS
from omnimem.store import Store

__all__ = ["Streamed", "attach", "load"]

_PRODUCTS = 0.75
"""Of the time of a layer: the rest is attention, norms and the interpreter."""
_SOME_RATE = 10e9
"""Bytes per second, for types that torch does not multiply by a vector as they are."""


def load(
    model_dir: str | os.PathLike[str],
    budget: int | str,
    store: Store | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    compression: str | None = "auto",
    verify: str = "always",
    io_backend: str = "auto",
    timeout: float = 30.0,
) -> nn.Module:
    """Build a transformers model whose weights use at most `budget` bytes of memory.

    Parameters
    ----------
    model_dir : path
        A Hugging Face folder: config.json and safetensors files. Tensors may have the names that
        transformers renames when it loads them.
    budget : int or str
        Bytes for weights, the ring included ("2GiB"). Weights that fit are all resident.
    store : Store, optional
        Share this store; by default the model has one of its own.
    dtype : torch.dtype, optional
        Only the checkpoint's own is possible: weights are used in place, without a cast.
    compression : str, optional
        Weights that do not fit may stay in memory encoded, without loss, and are decoded when they
        are used. "auto": where that is faster than reading them, by rates that are measured first
        (less than a second; not for less than 32 MiB a token). "fast", "balanced": as much as
        saves reading, in that code, whatever it costs. None: not at all.
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
        A mixture of experts, quantised weights or others that transformers would compute when it
        loads them, a dtype change, or a class that transformers does not have.

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
        model = _build(files, folder, dtype)
        if model.can_generate() and (folder / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        model.eval()
        with fit(model, files, folder) as mine:
            for name, buffer in model.named_buffers():
                if name in mine:
                    buffer.copy_(from_dlpack(mine.read(name)))
            _attach(model, mine, nbytes, store, compression, verify, io_backend, timeout)
    built: nn.Module = model
    return built


def _build(files: checkpoint.Checkpoint, folder: Path, dtype: torch.dtype | str | None) -> Any:
    """The model, its parameters unset; no weight is read."""
    import transformers

    check_folder(files, folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except ValueError as error:
        raise ValueError(
            f"{folder}: transformers {transformers.__version__} cannot tell what model this is: "
            f"{str(error).strip().splitlines()[0]} Build it yourself, and give it to "
            "omnimem.AdvancedMemoryManager.attach"
        ) from error
    own = main_dtype(files)
    refuse_cast(dtype, own, folder)
    names = config.architectures or []
    model_class = getattr(transformers, names[0], None) if names else None
    if model_class is None:
        raise ValueError(f"{folder}/config.json: transformers has no class {names!r}")
    with torch.device("meta"):  # refuses what the next step would compute, in memory
        parameter_names(model_class(copy.deepcopy(config)), files, folder)
    weights = {name: unset(info.shape, own) for name, info in infos(files)}
    model, found = model_class.from_pretrained(
        None,
        config=config,
        state_dict=weights,
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
    return model


def layout(files: checkpoint.Checkpoint, folder: Path) -> Layout:
    """What the model in a folder uses of its checkpoint, as `load` or `attach` would.

    No weight is read. Raises as `load` does.
    """
    check_folder(files, folder)
    with torch.inference_mode(False):
        diffuses = library_of(read_config(folder)) == "diffusers"
        model = outline(files, folder) if diffuses else _build(files, folder, None)
        return _layout(model, fit(model, files, folder))


def _layout(model: nn.Module, files: checkpoint.Checkpoint) -> Layout:
    uses = uses_of(model, dict(model.named_parameters()))
    return lay_out(files, uses, getattr(model, "config", None))


def attach(
    model: nn.Module,
    model_dir: str | os.PathLike[str],
    budget: int | str,
    store: Store | None = None,
    *,
    compression: str | None = "auto",
    verify: str = "always",
    io_backend: str = "auto",
    timeout: float = 30.0,
) -> nn.Module:
    """Serve the weights of an existing model from its checkpoint, within `budget` bytes.

    The parameters keep their identity; their former memory is let go. Nothing is changed when
    the checkpoint does not fit the model. See `load` for parameters, errors and hooks.
    """
    folder = Path(model_dir)
    if getattr(model, "omnimem", None) is not None:
        raise ValueError("this model streams already; call model.omnimem.detach() first")
    with checkpoint.open(folder) as files:
        refuse_experts(files, folder)
        nbytes = parse_size(budget, "budget")
        mine = fit(model, files, folder)
        _attach(model, mine, nbytes, store, compression, verify, io_backend, timeout)
    return model


def compute_rate(store: Store, names: Sequence[str], dtype: str) -> float:
    """Bytes of weights per second that a token goes through, at best."""
    width = 1024
    kind = getattr(torch, dtype, torch.uint8)
    size = kind.itemsize
    rows = store.info(names[0]).nbytes // (width * size)
    if not rows or not kind.is_floating_point or size == 1:
        return _SOME_RATE
    with contextlib.ExitStack() as held, torch.inference_mode():
        blocks = [
            from_dlpack(held.enter_context(store.lease(name)).window(0, dtype, (rows, width)))
            for name in names
        ]
        token = torch.ones(1, width, dtype=kind)
        times = []
        for _ in range(6):
            started = time.perf_counter()
            for weights in blocks:
                nn.functional.linear(token, weights)
            times.append(time.perf_counter() - started)
    return float(_PRODUCTS * len(blocks) * rows * width * size / min(times))


def _attach(
    model: nn.Module,
    files: checkpoint.Checkpoint,
    budget: int,
    store: Store | None,
    compression: str | None,
    verify: str,
    io_backend: str,
    timeout: float,
) -> None:
    if compression not in (None, "auto", *CODINGS):
        raise ValueError(f"compression is 'auto', 'fast', 'balanced' or None, not {compression!r}")
    plan = plan_layout(
        _layout(model, files),
        budget,
        compression,
        lambda plan: measure_plan(plan, files, compression, compute_rate, io_backend),
    )
    files.check_unchanged()
    own_store = None
    if store is None:
        limit = max(budget, plan.memory_bytes, 1 << 20)
        store = own_store = Store(
            StoreConfig(host_limit=limit, disk_limit=0, verify=verify, io_backend=io_backend)
        )
    try:
        Streamed(model, dict(model.named_parameters()), files, plan, store, own_store, timeout)
    except BaseException:
        if own_store is not None:
            own_store.close()
        raise
