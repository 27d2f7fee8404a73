"""The C tests: each tests/c/test_*.c is a program that passes when it exits 0.

The core (csrc/base, plat, core) is compiled once, in debug mode so that asserts, lock ranks and
fault points are in, and every program is linked with it and run with both I/O back ends
(OMNIMEM_IO=uring|threads). Exit status 77 skips, with the reason on standard error.

OMNIMEM_SANITIZE=address,undefined|thread builds and runs all of it with sanitizers. Objects are
kept in build/ctest, one folder for each set of flags, and made anew when a source or any header
is newer.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = sorted((ROOT / "tests" / "c").glob("test_*.c"))
LAYERS = ("base", "plat", "core")
SKIP_STATUS = 77
TIMEOUT_S = 300.0


def knob(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "no", "false")


def clean_env() -> dict[str, str]:
    """The environment without a preloaded sanitizer runtime, which compilers do not survive."""
    return {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}


def call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_env())
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


@dataclass(frozen=True)
class Toolchain:
    compiler: tuple[str, ...]
    cflags: tuple[str, ...]
    libs: tuple[str, ...]
    out: Path

    @classmethod
    def find(cls) -> Toolchain:
        cflags = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-pthread", "-g", "-O1"]
        cflags += ["-DOM_DEBUG=1", "-fno-omit-frame-pointer", f"-I{ROOT / 'csrc'}"]
        cflags.append(f"-I{ROOT / 'tests' / 'c'}")
        if knob("OMNIMEM_WERROR"):
            cflags.append("-Werror")
        sanitize = os.environ.get("OMNIMEM_SANITIZE", "").strip()
        if sanitize:
            cflags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]
        if knob("OMNIMEM_COVERAGE"):
            cflags.append("--coverage")
        modules = ["libxxhash", "libzstd"]
        if knob("OMNIMEM_WITHOUT_LIBURING"):
            cflags.append("-DOM_WITHOUT_LIBURING=1")
        else:
            modules.append("liburing")
        pkg_config = shlex.split(os.environ.get("PKG_CONFIG", "pkg-config"))
        cflags += shlex.split(call([*pkg_config, "--cflags", *modules]))
        libs = [*shlex.split(call([*pkg_config, "--libs", *modules])), "-ldl", "-lm"]
        compiler = shlex.split(os.environ.get("CC", "gcc"))
        key = hashlib.sha256("\0".join([*compiler, *cflags, *libs]).encode()).hexdigest()[:12]
        out = Path(os.environ.get("OMNIMEM_CTEST_DIR", ROOT / "build" / "ctest")) / key
        return cls(tuple(compiler), tuple(cflags), tuple(libs), out)

    @property
    def command(self) -> tuple[str, ...]:
        return (*self.compiler, *self.cflags)


class Builder:
    """Compiles the core once and links every program; what failed is in `errors`, by source."""

    def __init__(self) -> None:
        self.tools = Toolchain.find()
        self.errors: dict[Path, str] = {}
        headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "tests" / "c").glob("*.h")]
        self.newest_header = max((path.stat().st_mtime for path in headers), default=0.0)
        core = sorted(path for layer in LAYERS for path in (ROOT / "csrc" / layer).glob("*.c"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = dict(zip(core, pool.map(self._object, core), strict=True))
            self.archive = self.tools.out / "libomnimem.a"
            self.archive.unlink(missing_ok=True)
            call(
                ["ar", "rcs", str(self.archive), *(str(path) for path in objects.values() if path)]
            )
            list(pool.map(self._link, PROGRAMS))

    def program(self, source: Path) -> Path:
        return self.tools.out / source.stem

    def _object(self, source: Path) -> Path | None:
        target = self.tools.out / source.relative_to(ROOT).with_suffix(".o")
        newest = max(source.stat().st_mtime, self.newest_header)
        if target.exists() and target.stat().st_mtime > newest:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            call([*self.tools.command, "-c", str(source), "-o", str(target)])
        except RuntimeError as error:
            target.unlink(missing_ok=True)
            self.errors[source] = str(error)
            return None
        return target

    def _link(self, source: Path) -> None:
        if (compiled := self._object(source)) is None:
            return
        command = [*self.tools.command, str(compiled), str(self.archive), *self.tools.libs]
        try:
            call([*command, "-o", str(self.program(source))])
        except RuntimeError as error:
            self.errors[source] = str(error)


@pytest.fixture(scope="session")
def builder() -> Builder:
    out = Toolchain.find().out
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:  # two runs in one tree take turns
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Builder()


def test_core_compiles(builder: Builder) -> None:
    """A file of the core that does not compile; programs that need it fail to link as well."""
    failed = [text for source, text in builder.errors.items() if source not in PROGRAMS]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("io", ["uring", "threads"])
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(
            path,
            id=path.stem,
            marks=[pytest.mark.soak] if "OMNIMEM_SOAK" in path.read_text() else [],
        )
        for path in PROGRAMS
    ],
)
def test_c(source: Path, io: str, builder: Builder, tmp_path: Path) -> None:
    env = clean_env() | {
        "OMNIMEM_IO": io,
        "TMPDIR": str(tmp_path),
        "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
    }
    if source in builder.errors:
        pytest.fail(builder.errors[source], pytrace=False)
    if io == "uring" and knob("OMNIMEM_WITHOUT_LIBURING"):
        pytest.skip("built without liburing")
    done = subprocess.run(
        [str(builder.program(source))],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    output = f"{done.stdout}{done.stderr}"
    if done.returncode == SKIP_STATUS:
        pytest.skip(output.strip() or "the program says that it cannot run here")
    assert done.returncode == 0, f"{source.name} exited with {done.returncode}\n{output}"
