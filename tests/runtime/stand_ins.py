"""Small libraries in the place of the real kernels, a driver, and compilers that misbehave.

The real compiler, ninja and child process build them, in a tenth of the time of the real kernels.
The table of a stand-in kernel is one number. The stand-in operator returns the number it was given.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import bitlinear
from bitlinear import runtime
from bitlinear.kernels import CudaLibrary, Library, Variant
from bitlinear.runtime import cpu
from bitlinear.runtime.system import ProbeError

# What a self-test does, by name.
SELF_TESTS = {
    "good": "return 0;",
    "mismatch": 'snprintf(message, size, "row 3 differs"); return 1;',
    "illegal": "__builtin_trap();",  # ud2 on x86: SIGILL
    "crash": "raise(SIGSEGV); return 0;",
    "broken": "this does not compile",
}

_KERNEL = """
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include "shared.h"
static const int table = {number};
extern "C" EXPORT const void* bitlinear_kernels() {{ return &table; }}
extern "C" EXPORT int bitlinear_selftest(char* message, int64_t size) {{ {self_test} }}
"""

_OPERATOR = """
#include "shared.h"
static int given = 0;
extern "C" EXPORT int bitlinear_use_kernels(const void* table) {{
  given = *static_cast<const int*>(table);
  return 0;
}}
extern "C" EXPORT int bitlinear_parallel_threads() {{ return {threads}; }}
extern "C" EXPORT int stand_in_given() {{ return given; }}
{extra}
"""


# Without a .cu file, which only a CUDA build of torch would compile.
_CUDA = """
#include <stdint.h>
#include <stdio.h>
#include "kernels.h"
extern "C" EXPORT int bitlinear_cuda_selftest(int device, char* message, int64_t size) {{
  snprintf(message, size, "stand-in");
  {self_test}
}}
"""


@dataclass(frozen=True)
class StandIns:
    """The sources of an operator and of variants, best first: the arguments of `runtime.load`."""

    directory: Path
    variants: tuple[Variant, ...]
    operator: Library
    cuda: CudaLibrary

    def load(self) -> runtime.Runtime:
        return runtime.load(self.variants, self.operator, self.directory, self.cuda)

    def write(self, target: Path) -> Path:
        """Describe the libraries in a file, for `start`."""
        rows = [{**asdict(v), "requires": sorted(v.requires)} for v in self.variants]
        data = {
            "directory": str(self.directory),
            "variants": rows,
            "operator": asdict(self.operator),
        }
        target.write_text(json.dumps(data), encoding="utf-8")
        return target


def stand_ins(
    directory: Path,
    self_tests: tuple[str, ...] = ("good",),
    cflags: tuple[str, ...] = (),
    threads: int = 2,
    operator: str = "",
    cuda: str = "return 0;",
) -> StandIns:
    """Write the sources of kernel0, kernel1, ..., each with a self-test of that name.

    `cflags` go to kernel0; `operator` is appended to the operator's source; `cuda` is the body of
    the self-test of the library for GPUs.
    """
    directory.mkdir(parents=True, exist_ok=True)
    export = '#define EXPORT __attribute__((visibility("default")))\n'
    (directory / "shared.h").write_text(export)
    (directory / "operator.cpp").write_text(_OPERATOR.format(threads=threads, extra=operator))
    variants = []
    for number, self_test in enumerate(self_tests):
        name = f"kernel{number}"
        source = _KERNEL.format(number=number, self_test=SELF_TESTS[self_test])
        (directory / f"{name}.cpp").write_text(source)
        flags = ("-O0", *(cflags if number == 0 else ()))
        variants.append(Variant(name, (f"{name}.cpp",), flags, priority=100 - number))
    (directory / "cuda").mkdir(exist_ok=True)
    (directory / "cuda" / "kernels.h").write_text('#include "../shared.h"\n')
    (directory / "cuda" / "ops.cpp").write_text(_CUDA.format(self_test=cuda))
    return StandIns(
        directory,
        tuple(variants),
        Library("operator", ("operator.cpp",), ("-O0",)),
        CudaLibrary("cuda", ("cuda/ops.cpp",), ("-O0",)),
    )


def given(loaded: runtime.Runtime) -> int:
    """Which kernel the loaded stand-in operator has been given."""
    return int(ctypes.CDLL(str(loaded.artifacts["operator"].path)).stand_in_given())


# --- A driver ------------------------------------------------------------------------------------

_LIBCUDA = r"""
#include <cstddef>
#include <cstdio>
#include <cstdlib>
static int init = 0, count = 0, major[9], minor[9];
static char name[9][99];
__attribute__((constructor)) static void read_environment() {
  const char* gpus = getenv("STAND_IN_GPUS");
  init = gpus ? atoi(getenv("STAND_IN_INIT")) : 100;
  for (int used; gpus && *gpus; gpus += used, ++count)
    sscanf(gpus, "%98[^:]:%d.%d;%n", name[count], &major[count], &minor[count], &used);
}
extern "C" {
int cuDriverGetVersion(int* version) { *version = 13020; return 0; }
int cuInit(unsigned) { if (init < 0) abort(); return init; }
int cuDeviceGetCount(int* n) { *n = count; return 0; }
int cuDeviceGet(int* device, int i) { *device = i + 70; return 0; }
int cuDeviceGetName(char* text, int size, int i) {
  snprintf(text, size, "%s", name[i - 70]);
  return 0;
}
int cuDeviceTotalMem_v2(size_t* memory, int) { *memory = 1ull << 36; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int i) {
  *value = (attribute == 75 ? major : minor)[i - 70];
  return 0;
}
int cuGetErrorString(int, const char** text) { *text = "unknown error"; return 0; }
}
"""


def libcuda(directory: Path) -> Path:
    """A driver in a directory for LD_LIBRARY_PATH; it knows CUDA 13.2.

    $STAND_IN_GPUS lists its GPUs, such as "NVIDIA H100:9.0;". cuInit returns
    $STAND_IN_INIT, or aborts if that is negative.
    """
    (directory / "libcuda.cpp").write_text(_LIBCUDA, encoding="utf-8")
    library = directory / "libcuda.so.1"
    command = ["c++", "-shared", "-fPIC", "-o", str(library), str(directory / "libcuda.cpp")]
    subprocess.run(command, check=True)
    return library


# --- Compilers that misbehave --------------------------------------------------------------------


def compiler(directory: Path, body: str = "", name: str = "g++") -> Path:
    """A compiler that notes each compilation in `<directory>/compilations`, then does `body`."""
    directory.mkdir(parents=True, exist_ok=True)
    real = shutil.which(os.environ.get("CXX", "c++").split()[-1])
    assert real is not None
    script = directory / name
    script.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        case " $* " in *" -c "*)
          for last; do :; done
          echo "$*" >> "{directory}/compilations"
          {body}
        esac
        exec "{real}" "$@"
        """)
    )
    script.chmod(0o755)
    return script


def compilations(directory: Path) -> list[str]:
    """The arguments of each compilation so far."""
    log = directory / "compilations"
    return log.read_text().splitlines() if log.exists() else []


# --- Other processes -----------------------------------------------------------------------------

LOAD = """
import json, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" ignores it
build = os.environ.pop("BITLINEAR_BUILD", None)
os.environ["BITLINEAR_BUILD"] = "off"  # the import itself is not what is looked at
from bitlinear import runtime
del os.environ["BITLINEAR_BUILD"]
from bitlinear.kernels import Library, Variant
data = json.load(open(sys.argv[1]))
loaded = runtime.load(
    tuple(Variant(**{**row, "requires": frozenset(row["requires"])}) for row in data["variants"]),
    Library(**data["operator"]),
    __import__("pathlib").Path(data["directory"]),
)
print(json.dumps({"kernel": loaded.kernel, "problem": loaded.problem,
                  "states": {name: probe.value.state if probe.value else "failed"
                             for name, probe in loaded.libraries.items()}}))
"""


def start(file: Path, **environment: str) -> subprocess.Popen[str]:
    """Load the libraries that `StandIns.write` described, in a new process and session."""
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, str(file)],
        env={**os.environ, "BITLINEAR_CUDA": "off", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 120.0) -> tuple[dict[str, Any], str]:
    """Wait for such a process; its result and its stderr."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    result: dict[str, Any] = json.loads(out)
    return result, err


ROOT = Path(bitlinear.__file__).parents[1]


def _no_answer(package: str) -> str:
    raise ProbeError("not asked in this test")


def forget_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on as in a process that has loaded nothing yet."""
    monkeypatch.delattr(torch.library, "_bitlinear_libraries", raising=False)
    monkeypatch.setattr(runtime, "_process", runtime._Process())
    monkeypatch.setattr(cpu, "_ask_py_cpuinfo", _no_answer)  # it takes more than a second


def states(loaded: runtime.Runtime) -> dict[str, str]:
    """The result of each library: "cached", "built" or "failed"."""
    results = {name: probe.value for name, probe in loaded.libraries.items()}
    return {name: artifact.state if artifact else "failed" for name, artifact in results.items()}


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script that imports the real package."""
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=tempfile.gettempdir(),  # -c looks for packages there first
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
