"""How other systems run the parts of a call on threads, compiled and run on this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitlinear import runtime
from bitlinear.kernels import DIRECTORY, OPS, VARIANTS
from tests.kernels.native import require

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs GNU's OpenMP"),
]

# Builds the operator and a kernel in a directory of its own, and prints the threads and the bits of
# one result. A process can define the operator only once.
CHILD = """
import ctypes, json, sys, torch
from torch.utils import cpp_extension

sources, cflags, ldflags, threads, directory = json.loads(sys.argv[1])
for name in ("scalar", "ops"):
    cpp_extension.load(
        name=name,
        sources=sources[name],
        extra_cflags=cflags,
        extra_ldflags=ldflags,
        build_directory=directory,
        is_python_module=False,
    )
torch.set_num_threads(threads)
ops = ctypes.CDLL(f"{directory}/ops.so")
kernels = ctypes.CDLL(f"{directory}/scalar.so").bitlinear_kernels
kernels.restype = ctypes.c_void_p
assert ops.bitlinear_use_kernels(ctypes.c_void_p(kernels())) == 0
torch.manual_seed(0)
x, w = torch.randn(33, 1000), torch.randn(777, 1000)
packed, scale = torch.ops.bitlinear.quantize_weight(w)
y = torch.ops.bitlinear.linear(x, packed, scale, None, 1000)
print(json.dumps([ops.bitlinear_parallel_threads(), y.tolist()]))
"""


@pytest.mark.parametrize(
    ("flags", "threads", "expected"),
    [
        (["-DBITLINEAR_FIND_GOMP"], 3, 3),  # as on macOS
        (["-DBITLINEAR_USE_PARALLEL_FOR", "-fopenmp"], 2, 2),  # as on Windows
        (["-DBITLINEAR_USE_PARALLEL_FOR"], 2, 1),  # the count shows that the work is serial
    ],
    ids=["macos", "windows", "serial"],
)
def test_other_systems_give_the_same_bits(flags, threads, expected, tmp_path):
    compiler = require("g++")
    ninja = runtime.current().hardware.ninja.value
    scalar = VARIANTS[-1]
    sources = {
        library.name: [str(DIRECTORY / source) for source in library.sources]
        for library in (scalar, OPS)
    }
    threaded = [flag for flag in flags if flag == "-fopenmp"]
    request = [sources, [*OPS.cflags, *flags], threaded, threads, str(tmp_path)]
    path = os.pathsep.join([str(Path(ninja or "").parent), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PATH": path,
        "CXX": compiler,
        "BITLINEAR_BUILD": "off",
        "OMP_NUM_THREADS": "2",
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(request)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    used, y = json.loads(done.stdout.splitlines()[-1])
    assert used == expected
    torch.manual_seed(0)
    x, w = torch.randn(33, 1000), torch.randn(777, 1000)
    packed, scale = torch.ops.bitlinear.quantize_weight(w)
    assert torch.equal(torch.tensor(y), torch.ops.bitlinear.linear(x, packed, scale, None, 1000))
