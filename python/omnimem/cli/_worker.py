"""One measured run in a process of its own: ``python -m omnimem.cli._worker JOB.json``.

The job names the contender ("plain": transformers alone, "omnimem"), the model folder, the picture,
the prompt, the number of tokens, the budget and the file names of the result (JSON) and of the
logits of all steps (.npy, raw bytes as uint8). Ends with 1 and one line on stderr when it fails.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from omnimem.cli._common import process_memory, quiet_libraries


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Load, generate, measure; write the logits; return the result."""
    quiet_libraries()
    import numpy as np
    import torch
    import transformers

    from omnimem.cli._generate import generate
    from omnimem.processor import prepare

    inputs = prepare(job["model_dir"], job["prompt"], job["image"])
    idle_bytes = process_memory("VmRSS")
    started = time.perf_counter()
    if job["contender"] == "plain":
        config = transformers.AutoConfig.from_pretrained(job["model_dir"])
        model_class = getattr(transformers, config.architectures[0])
        model = model_class.from_pretrained(job["model_dir"], dtype="auto").eval()
    else:
        import omnimem.torch as omnimem_torch

        model = omnimem_torch.load(job["model_dir"], job["budget"])
    load_seconds = time.perf_counter() - started
    made = generate(model, inputs, job["tokens"], exactly=True, keep_logits=True)
    assert made.logits is not None
    np.save(job["logits"], made.logits.contiguous().view(torch.uint8).numpy())
    result: dict[str, Any] = {
        "tokens": made.tokens,
        "logits_dtype": str(made.logits.dtype),
        "logits_shape": list(made.logits.shape),
        "idle_bytes": idle_bytes,
        "peak_bytes": process_memory("VmHWM"),
        "load_seconds": load_seconds,
        "first_seconds": made.first_seconds,
        "token_seconds": made.token_seconds,
    }
    if job["contender"] == "omnimem":
        plan, stats = model.omnimem.plan(), model.omnimem.stats()
        result |= {
            "bytes_per_pass": stats["bytes_per_pass"],
            "planned_bytes_per_pass": plan.stream_bytes,
            "io_backend": stats["io_backend"],
            "io_reason": stats["io_reason"],
        }
        model.omnimem.close()
    return result


def main() -> int:
    """Do the job that the first argument names."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result = work(job)
    Path(job["result"]).write_text(json.dumps(result, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    from omnimem.errors import Error

    try:
        sys.exit(main())
    except (Error, OSError, ValueError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
