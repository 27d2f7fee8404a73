"""A store at default settings is never killed for its own idle blocks: 8 times a cgroup's limit.

Needs a memory cgroup that this user may make (version 1 or 2). OMNIMEM_SOAK=1 makes each run a
minute.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

LIMIT = 256 << 20
SECONDS = 60.0 if os.environ.get("OMNIMEM_SOAK") == "1" else 4.0
CHILD = Path(__file__).with_name("oom_child.py")


class Cgroup:
    """A memory cgroup of LIMIT bytes, swap included; `kills` are its OOM kills."""

    def __init__(self, path: Path, v2: bool) -> None:
        self.path, self.v2 = path, v2
        path.mkdir()
        try:
            if v2:
                (path / "memory.max").write_text(str(LIMIT))
                self._may("memory.swap.max", "0")
            else:
                (path / "memory.limit_in_bytes").write_text(str(LIMIT))
                self._may("memory.memsw.limit_in_bytes", str(LIMIT))
        except OSError:
            path.rmdir()
            raise

    def _may(self, name: str, value: str) -> None:
        if (self.path / name).exists():  # without swap there is none to forbid
            (self.path / name).write_text(value)

    def kills(self) -> int:
        text = (self.path / ("memory.events" if self.v2 else "memory.oom_control")).read_text()
        return {k: int(v) for k, v in map(str.split, text.splitlines())}.get("oom_kill", 0)

    def describe(self) -> str:
        return (self.path / "memory.stat").read_text()

    def remove(self) -> None:
        for _ in range(50):
            try:
                self.path.rmdir()
            except OSError:  # the last process is still on its way out
                time.sleep(0.1)
            else:
                return


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    name = f"omnimem-test-{os.getpid()}"
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    try:
        if (v1 / "memory.limit_in_bytes").exists():
            group = Cgroup(v1 / name, v2=False)
        elif "memory" in (v2 / "cgroup.subtree_control").read_text().split():
            group = Cgroup(v2 / name, v2=True)
        else:
            pytest.skip("no memory controller in the root cgroup's subtree_control")
    except OSError as error:
        pytest.skip(f"cannot make a memory cgroup: {error}")
    yield group
    group.remove()


@pytest.mark.soak
@pytest.mark.parametrize("who", ["store", "swapper"])
def test_no_oom_kill(who: str, cgroup: Cgroup, tmp_path: Path) -> None:
    procs = cgroup.path / "cgroup.procs"
    seed = os.environ.get("OMNIMEM_OOM_SEED", "1")
    command = [sys.executable, str(CHILD), who, str(LIMIT), str(SECONDS), str(tmp_path), seed]
    started = 'echo $$ > "$0" && exec "$@"'  # in the cgroup before Python takes any memory
    done = subprocess.run(
        ["sh", "-c", started, str(procs), *command],
        capture_output=True,
        text=True,
        timeout=SECONDS + 300,
        check=False,
    )
    output = f"{done.stdout}{done.stderr}"
    assert cgroup.kills() == 0, f"{output}\n{cgroup.describe()}"
    assert done.returncode == 0, f"exit status {done.returncode}\n{output}"
    print(output)
