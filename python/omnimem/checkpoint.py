"""Checkpoints: safetensors files and Hugging Face folders, described without reading their data.

``open`` checks every header (see ``_safetensors``) and the folder's index, and holds no file open.
Tensors are grouped into units, one for each module that is loaded as a whole: a decoder layer, a
vision block, a merger, an embedding, a head. ``read`` brings one tensor into memory through a store
of the checkpoint's own, in place, without mapping the file.

Packed files (see ``omnimem.packed``) are taken like others: types, shapes and sizes are those of
the original, and ``read`` decodes.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ._packed_header import Shard, read_shard
from ._safetensors import HEADER_CAP, FileIdentity, TensorInfo, parse_json
from ._units import Unit, unit_names
from .errors import ClosedError, CorruptError, FormatError

if TYPE_CHECKING:
    from . import Lease, Store

__all__ = ["Checkpoint", "TensorInfo", "Unit", "open", "unit_names"]

SINGLE_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_STORE_SLACK = 64 << 20


class Checkpoint:
    """The tensors of a checkpoint: names, places, units. A context manager.

    Made by :func:`open`. Any thread may use it; ``read`` serves one at a time. ``close`` may be
    called more than once; what ``read`` returned stays valid until its last view goes.
    """

    def __init__(
        self,
        path: Path,
        tensors: dict[str, TensorInfo],
        shards: dict[str, Shard],
    ) -> None:
        self.path = path
        """The file or folder that was opened."""
        self.metadata: dict[str, str] = {}
        """The headers' ``__metadata__``; a later file's value wins over an earlier one's."""
        for shard in shards.values():
            self.metadata.update(shard.metadata)
        self._tensors = tensors
        self._shards = shards
        self._store: Store | None = None
        self._closed = False
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Return all tensor names: files in the order of their names, then by offset."""
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Return type, shape and place of one tensor.

        Raises
        ------
        KeyError
            The checkpoint has no tensor of this name.
        """
        try:
            return self._tensors[name]
        except KeyError:
            raise KeyError(f"{self.path}: no tensor named {name!r}; names() lists all") from None

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """Return the tensors that `names` has, under the names that it gives them.

        What is returned reads the same files, and has a store of its own for that.
        """
        tensors = {names[old]: info for old, info in self._tensors.items() if old in names}
        return Checkpoint(self.path, tensors, self._shards)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, decoded."""
        return sum(info.nbytes for info in self._tensors.values())

    @property
    def coding(self) -> str | None:
        """How packed files are encoded ("balanced", "fast"); None: the tensors are plain."""
        packings = (shard.packing for shard in self._shards.values())
        return next((packing.coding for packing in packings if packing), None)

    @property
    def files(self) -> list[str]:
        """Paths of the files that hold the tensors, in order."""
        return list(self._shards)

    def units(self) -> list[Unit]:
        """Group the tensors by module, in file order of each unit's first tensor."""
        grouped: dict[str, list[str]] = {}
        for tensor, unit in unit_names(self._tensors).items():
            grouped.setdefault(unit, []).append(tensor)
        return [Unit(name, tuple(tensors)) for name, tensors in grouped.items()]

    def check_unchanged(self, file: str | None = None) -> None:
        """Check that the files are still those whose headers were read.

        Parameters
        ----------
        file : str, optional
            One path of ``files``; all of them by default.

        Raises
        ------
        CorruptError
            A file is another one, or has another size or time of change, or is gone.
        """
        for path in [file] if file is not None else self._shards:
            known = self._shards[path].identity
            try:
                now = FileIdentity.of(os.stat(path))
            except OSError as error:
                raise CorruptError(
                    f"{path}: cannot be found any more ({error.strerror}); open the checkpoint "
                    "again once the file is back"
                ) from error
            if now != known:
                raise CorruptError(
                    f"{path}: changed since the checkpoint was opened ({known.size} bytes then, "
                    f"{now.size} now); open it again"
                )

    def read(self, name: str) -> Lease:
        """Read one tensor into memory.

        Parameters
        ----------
        name : str
            The tensor.

        Returns
        -------
        Lease
            The bytes: buffer protocol (1-D uint8) and DLPack with type and shape. Types narrower
            than a byte come as uint8: float4 with its last dimension halved, float6 flat. The
            memory goes with the last view of it.

        Raises
        ------
        KeyError
            No such tensor.
        CorruptError
            The file changed since it was opened, or the tensor's encoded form is damaged.
        IOFailure
            The file cannot be read.
        ClosedError
            The checkpoint is closed.
        """
        info = self.info(name)
        with self._lock:
            if self._closed:
                raise ClosedError(f"{self.path}: the checkpoint is closed; open it again")
            self.check_unchanged(info.file)
            store = self._own_store()
            add_tensor(store, name, info)
            try:
                return store.lease(name)
            finally:
                store.remove(name)

    def _own_store(self) -> Store:
        if self._store is None:
            from . import Store, StoreConfig

            infos = self._tensors.values()
            largest = max((max(i.nbytes, i.encoded_nbytes or 0) for i in infos), default=0)
            limit = self.total_bytes + 2 * largest + _STORE_SLACK
            self._store = Store(StoreConfig(host_limit=limit, disk_limit=0))
        return self._store

    def close(self) -> None:
        """Give back the store that ``read`` used. Views of what was read stay valid."""
        with self._lock:
            self._closed = True
            store, self._store = self._store, None
        if store is not None:
            store.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<Checkpoint {os.fspath(self.path)!r}: {len(self._tensors)} tensors, "
            f"{self.total_bytes} bytes, {len(self._shards)} files>"
        )


def open(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a safetensors file or a Hugging Face model folder.

    Parameters
    ----------
    path : path-like
        A ``.safetensors`` file, or a folder with ``model.safetensors`` or with
        ``model.safetensors.index.json`` and its shards; diffusers' folders, whose files are called
        ``diffusion_pytorch_model``, too. Symlinks are followed.

    Returns
    -------
    Checkpoint
        All headers are checked; no data has been read.

    Raises
    ------
    FormatError
        A header, the index or the set of shards breaks the format.
    FileNotFoundError
        The path does not exist.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(
            errno.ENOENT, "no such file or folder; give the path of a checkpoint", os.fspath(place)
        )
    if not place.is_dir():
        return _collect(place, [place])
    for single in SINGLE_NAMES:
        if (place / single).is_file():
            return _collect(place, [place / single])
        if (place / f"{single}.index.json").is_file():
            return _open_index(place / f"{single}.index.json")
    raise FormatError(
        f"{place}: holds neither {SINGLE_NAMES[0]} nor {SINGLE_NAMES[0]}.index.json; name the "
        "folder that has the weights (in a Hugging Face cache: snapshots/<revision>)"
    )


def _collect(place: Path, paths: Iterable[Path]) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    shards: dict[str, Shard] = {}
    for path in paths:
        shard = read_shard(path)
        for name in shard.tensors:
            if name in tensors:
                raise FormatError(
                    f"{path}: tensor {name!r} is in {tensors[name].file} too; one of the shards "
                    "belongs to another checkpoint"
                )
        tensors.update(shard.tensors)
        shards[os.fspath(path)] = shard
    return Checkpoint(place, tensors, shards)


def _open_index(index: Path) -> Checkpoint:
    folder = index.parent
    size = index.stat().st_size
    if size > HEADER_CAP:
        raise FormatError(f"{index}: {size} bytes, over the limit of {HEADER_CAP} for an index")
    weight_map = parse_json(index.read_bytes(), index, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: has no weight_map that names the shards; fetch it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard:
            raise FormatError(f"{index}: weight_map[{name!r}] is {shard!r}, not a file name")
        if os.path.isabs(shard) or ".." in shard.split("/") or "\0" in shard:
            raise FormatError(
                f"{index}: the shard {shard!r} of tensor {name!r} lies outside the folder; shards "
                "are named relative to it"
            )
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise FormatError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; fetch them"
        )
    checkpoint = _collect(folder, [folder / shard for shard in shards])
    for name, shard in weight_map.items():
        if name not in checkpoint:
            raise FormatError(
                f"{folder / shard}: has no tensor {name!r}, which {index.name} places there; "
                "fetch both again"
            )
        if checkpoint.info(name).file != os.fspath(folder / shard):
            raise FormatError(
                f"{checkpoint.info(name).file}: holds tensor {name!r}, which {index.name} places "
                f"in {shard}; fetch both again"
            )
    for name in checkpoint.names():
        if name not in weight_map:
            raise FormatError(
                f"{checkpoint.info(name).file}: tensor {name!r} is not in {index.name}; fetch "
                "both again"
            )
    return checkpoint


def add_tensor(store: Store, name: str, info: TensorInfo, group: str | None = None) -> None:
    """Add a tensor to a store, as a block of its name that is read in place."""
    dtype, shape = _dense_view(info)
    decoded = info.nbytes if info.encoded_nbytes else None
    nbytes = info.nbytes if info.encoded_nbytes is None else info.encoded_nbytes
    store.add_file(
        name,
        info.file,
        info.offset,
        nbytes,
        dtype=dtype,
        shape=shape,
        group=group,
        decoded_nbytes=decoded,
    )


def _dense_view(info: TensorInfo) -> tuple[str, tuple[int, ...]]:
    """Return a type of whole bytes and the shape that DLPack consumers can take."""
    if info.dtype == "float4_e2m1fn_x2":
        if info.shape and info.shape[-1] % 2 == 0:
            return "uint8", (*info.shape[:-1], info.shape[-1] // 2)
        return "uint8", (info.nbytes,)
    if info.dtype.startswith("float6_"):
        return "uint8", (info.nbytes,)
    return info.dtype, info.shape
