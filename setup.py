"""Build of the C extension ``omnimem._core``; everything static is in pyproject.toml.

Knobs, all read from the environment:

OMNIMEM_SANITIZE           ``address,undefined`` or ``thread``: build with these sanitizers
OMNIMEM_DEBUG=1            asserts, lock ranks and fault points compiled in, -O1 -g
OMNIMEM_COVERAGE=1         gcov counters
OMNIMEM_WERROR=1           warnings are errors (CI sets it)
OMNIMEM_WITHOUT_LIBURING=1 leave the io_uring back end out
PKG_CONFIG                 the pkg-config program to ask
"""

from __future__ import annotations

import glob
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# The oldest Python whose limited API has the buffer protocol; also the wheel's tag.
LIMITED_API = "0x030B0000"
WHEEL_TAG = "cp311"

# pkg-config module -> (least version, Debian package)
LIBURING = {"liburing": ("2.2", "liburing-dev")}
LIBXXHASH = {"libxxhash": ("0.8.0", "libxxhash-dev")}
LIBZSTD = {"libzstd": ("1.4.0", "libzstd-dev")}


def knob(name: str) -> bool:
    """True when the environment variable is set to anything but 0, no, false or nothing."""
    return os.environ.get(name, "").strip().lower() not in ("", "0", "no", "false")


def refuse_free_threaded() -> None:
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise SystemExit(
            "omnimem: free-threaded Python is not supported, because the extension is built for "
            "the limited API, which free-threaded interpreters do not have; "
            "install it with the ordinary build of this Python version."
        )


def pkg_config(*args: str) -> str | None:
    """Standard output of pkg-config, or None when it exits with an error."""
    command = [*shlex.split(os.environ.get("PKG_CONFIG", "pkg-config")), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def find_libraries(modules: dict[str, tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Compile and link flags of C libraries, or exit with the line that installs the missing.

    Parameters
    ----------
    modules
        pkg-config module name to (least version, Debian package).
    """
    program = shlex.split(os.environ.get("PKG_CONFIG", "pkg-config"))[0]
    missing: list[str] = []
    packages: list[str] = []
    if shutil.which(program) is None:
        # Nothing can be asked, so every library is named: installing one twice costs nothing.
        missing.append("pkg-config")
        packages.append("pkg-config")
        missing += modules
        packages += [package for _, package in modules.values()]
    else:
        for module, (version, package) in modules.items():
            if pkg_config("--exists", f"{module} >= {version}") is None:
                missing.append(f"{module} >= {version}")
                packages.append(package)
    if missing:
        message = (
            f"omnimem: cannot build, missing: {', '.join(missing)}.\n"
            f"Install with this line:\n\n    apt-get install -y {' '.join(packages)}\n"
        )
        if "liburing-dev" in packages:
            message += (
                "\nWithout liburing, set OMNIMEM_WITHOUT_LIBURING=1 to build with the thread "
                "I/O back end alone.\n"
            )
        raise SystemExit(message)
    cflags = shlex.split(pkg_config("--cflags", *modules) or "")
    libs = shlex.split(pkg_config("--libs", *modules) or "")
    return cflags, libs


def compile_flags() -> tuple[list[str], list[str]]:
    """Compile and link flags that the knobs ask for."""
    cflags = ["-std=c11", "-D_GNU_SOURCE", "-fvisibility=hidden", "-Wall", "-Wextra"]
    ldflags = ["-pthread"]
    if knob("OMNIMEM_DEBUG"):
        cflags += ["-O1", "-g", "-UNDEBUG", "-DOM_DEBUG=1"]
    else:
        cflags += ["-O3"]
    if knob("OMNIMEM_WERROR"):
        cflags += ["-Werror"]
    sanitize = os.environ.get("OMNIMEM_SANITIZE", "").strip()
    if sanitize:
        known = {"address", "undefined", "thread", "leak"}
        unknown = set(sanitize.split(",")) - known
        if unknown:
            raise SystemExit(
                f"omnimem: OMNIMEM_SANITIZE={sanitize}: unknown sanitizer "
                f"{', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}."
            )
        flags = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"]
        cflags += [*flags, "-g", "-O1", "-fno-sanitize-recover=all"]
        ldflags += flags
    if knob("OMNIMEM_COVERAGE"):
        cflags += ["--coverage", "-O0", "-g"]
        ldflags += ["--coverage"]
    return cflags, ldflags


class BuildCore(build_ext):
    """build_ext that looks for the C libraries only when something is compiled."""

    def build_extension(self, ext: Extension) -> None:
        modules = LIBXXHASH | LIBZSTD
        if knob("OMNIMEM_WITHOUT_LIBURING") or not sys.platform.startswith("linux"):
            ext.define_macros.append(("OM_WITHOUT_LIBURING", "1"))
        else:
            modules |= LIBURING
        library_cflags, library_libs = find_libraries(modules)
        cflags, ldflags = compile_flags()
        ext.extra_compile_args += [*cflags, *library_cflags]
        ext.extra_link_args += [*ldflags, *library_libs]
        super().build_extension(ext)


refuse_free_threaded()

setup(
    ext_modules=[
        Extension(
            "omnimem._core",
            sources=sorted(
                source
                for layer in ("base", "plat", "core", "bind")
                for source in glob.glob(f"csrc/{layer}/*.c")
            ),
            depends=sorted(glob.glob("csrc/**/*.h", recursive=True)),
            include_dirs=["csrc"],
            define_macros=[("Py_LIMITED_API", LIMITED_API)],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildCore},
    options={"bdist_wheel": {"py_limited_api": WHEEL_TAG}},
)
