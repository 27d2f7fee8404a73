"""Synthetic checkpoints: a real architecture and real sharding with seeded random weights.

``write`` makes a folder that transformers loads as any other. Weights are normal with a deviation
of one over the root of the fan-in, which keeps activations finite and logits spread; the weights of
norms are close to one. They are drawn per tensor in pieces, by as many threads as there are CPUs,
and written as they come, so that memory stays small whatever the model's size.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from itertools import islice
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from ._synth_presets import PRESETS, Preset
from ._synth_text import special_ids, write_json, write_processor, write_tokenizer
from .errors import DiskFullError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["PRESETS", "Preset", "is_complete", "write"]

MARKER = "omnimem_synth.json"
"""Written last but one into a finished folder: what made it. ``config.json`` is the last."""

_PIECE = 1 << 22
"""Elements that one thread draws at a time; part of what a seed means."""


def is_complete(folder: str | os.PathLike[str], preset: str, seed: int = 0) -> bool:
    """Tell whether a folder holds this preset, written to the end and of the right size."""
    place = Path(folder)
    try:
        made = json.loads((place / MARKER).read_text(encoding="utf-8"))
        whole = all((place / name).stat().st_size == size for name, size in made["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    same = (made.get("preset"), made.get("seed"), made.get("format")) == (preset, seed, 1)
    return whole and same and (place / "config.json").is_file()


def write(
    preset: str,
    out_dir: str | os.PathLike[str],
    *,
    seed: int = 0,
    max_shard_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a synthetic checkpoint.

    Parameters
    ----------
    preset : str
        A name of ``PRESETS``.
    out_dir : path-like
        The folder, made when needed. What an earlier ``write`` left there is replaced.
    seed : int
        The same seed gives the same bytes.
    max_shard_bytes : int, optional
        Largest shard in bytes; the preset's own by default. A model of one shard has no index.
    progress : callable, optional
        Called with the bytes written and the bytes to write.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        Unknown preset, a limit below 1, or a folder with a model that ``write`` did not make.
    DiskFullError
        The file system lacks room for it.
    OSError
        A file cannot be written.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} must be one of {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    limit = chosen.shard_bytes if max_shard_bytes is None else max_shard_bytes
    if limit < 1:
        raise ValueError(f"max_shard_bytes={limit} must be at least 1")
    folder = Path(out_dir)
    _clear(folder)
    config, shapes = _build(chosen)
    shards = _split(shapes, limit)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise DiskFullError(
            f"{folder}: preset {preset!r} needs {total} bytes, the file system has {free} free; "
            "name a folder on another one or make room"
        )
    written = _write_shards(folder, shards, seed, total, progress)
    vocabulary = chosen.text["vocab_size"]
    write_tokenizer(folder, vocabulary)
    if chosen.vision is not None:
        write_processor(folder, 16, 2, 2)
    ids = special_ids(vocabulary)
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "do_sample": False,
    }
    write_json(folder / "generation_config.json", generation)
    write_json(folder / MARKER, {"format": 1, "preset": preset, "seed": seed, "files": written})
    config.save_pretrained(folder)
    return folder


def _clear(folder: Path) -> None:
    """Make the folder; take away what an earlier write left, never anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists() and not (folder / MARKER).exists():
        raise ValueError(f"{folder}: holds a model that was not made here; name another folder")
    (folder / "config.json").unlink(missing_ok=True)
    for pattern in ("", ".partial", ".index.json"):
        for stale in folder.glob(f"model*.safetensors{pattern}"):
            stale.unlink()
    (folder / MARKER).unlink(missing_ok=True)


def _build(preset: Preset) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Return the config and the shape of every tensor that a checkpoint of it holds."""
    import torch
    import transformers

    model_class = getattr(transformers, preset.model)
    ids = special_ids(preset.text["vocab_size"])
    common = {"dtype": "bfloat16", "tie_word_embeddings": preset.tied}
    if preset.vision is None:
        config = model_class.config_class(**preset.text, **common)
        config.eos_token_id, config.pad_token_id = ids["<|im_end|>"], ids["<|endoftext|>"]
    else:
        config = transformers.Qwen3VLConfig(
            text_config={**preset.text, **common},
            vision_config={**preset.vision, "dtype": "bfloat16"},
            tie_word_embeddings=preset.tied,
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
    config.architectures = [preset.model]
    config.dtype = "bfloat16"
    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if preset.tied:
        shapes.pop("lm_head.weight", None)
    return config, shapes


def _split(shapes: dict[str, tuple[int, ...]], limit: int) -> list[dict[str, tuple[int, ...]]]:
    """Cut the tensors into shards in the model's order; each shard is ordered by name."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if shards[-1] and used + nbytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += nbytes
    return [dict(sorted(shard.items())) for shard in shards]


def _write_shards(
    folder: Path,
    shards: list[dict[str, tuple[int, ...]]],
    seed: int,
    total: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, int]:
    """Write all shards and the index; return the size of each file."""
    weight_map: dict[str, str] = {}
    files: dict[str, int] = {}
    done = 0
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        for at, shard in enumerate(shards, 1):
            name = f"model-{at:05}-of-{len(shards):05}.safetensors"
            if len(shards) == 1:
                name = "model.safetensors"
            partial = folder / f"{name}.partial"
            with partial.open("wb", buffering=0) as file:
                file.write(_header(shard))
                for piece in _ordered(pool, _pieces(shard, seed), workers + 1):
                    _write_all(file, memoryview(piece).cast("B"))
                    done += piece.nbytes
                    if progress is not None:
                        progress(done, total)
                os.fsync(file.fileno())
                files[name] = file.tell()
            partial.replace(folder / name)
            weight_map.update(dict.fromkeys(shard, name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return files


def _write_all(file: Any, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _header(shard: dict[str, tuple[int, ...]]) -> bytes:
    """Lay a shard out as the safetensors library does: padded with spaces to eight bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shard.items():
        end = position + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _pieces(
    shard: dict[str, tuple[int, ...]], seed: int
) -> Iterator[Callable[[], np.ndarray[Any, Any]]]:
    """Give the work of each piece of each tensor, in file order."""
    for name, shape in shard.items():
        mean, deviation = _spread(name, shape)
        count, key = math.prod(shape), zlib.crc32(name.encode())
        for at, start in enumerate(range(0, count, _PIECE)):
            size = min(_PIECE, count - start)
            yield partial(_draw, (seed, key, at), size, mean, deviation)


def _ordered(
    pool: ThreadPoolExecutor, work: Iterator[Callable[[], Any]], ahead: int
) -> Iterator[Any]:
    """Run work on the pool with a bounded number ahead; give the results in order."""
    waiting: list[Future[Any]] = [pool.submit(piece) for piece in islice(work, ahead)]
    while waiting:
        result = waiting.pop(0).result()
        waiting.extend(pool.submit(piece) for piece in islice(work, 1))
        yield result


def _spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return mean and deviation of a tensor's values.

    What attention adds is kept about as large as an embedding (rows of unit length): were it the
    larger, the token itself would drown in the mean of its context, and every step of a generation
    would give the same token.
    """
    if len(shape) > 1:
        gain = 0.25 if name.endswith("self_attn.o_proj.weight") else 1.0
        return 0.0, gain / math.sqrt(math.prod(shape[1:]))
    return (1.0, 0.05) if name.endswith("weight") else (0.0, 0.02)


def _draw(
    seed: tuple[int, int, int], count: int, mean: float, deviation: float
) -> np.ndarray[Any, Any]:
    """Draw `count` bfloat16 bit patterns of a normal distribution, as uint16."""
    import numpy as np

    numbers = np.random.SFC64(list(seed)).random_raw(-(-count // 4)).view(np.uint16)[:count]
    return np.take(_quantiles(mean, deviation), numbers, mode="wrap")


@cache
def _quantiles(mean: float, deviation: float) -> np.ndarray[Any, Any]:
    """Return 65536 equally likely values of a normal distribution as bfloat16 bit patterns."""
    import numpy as np

    values = (mean + deviation * _standard()).astype(np.float32).view(np.uint32)
    return ((values + 0x7FFF + ((values >> 16) & 1)) >> 16).astype(np.uint16)


@cache
def _standard() -> np.ndarray[Any, Any]:
    import numpy as np

    normal = NormalDist()
    return np.array([normal.inv_cdf((at + 0.5) / 65536) for at in range(65536)])
