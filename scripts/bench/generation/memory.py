"""The memory of a process that does nothing but generate with one contestant. Linux only.

This module does not import torch, so that the process of llama.cpp does not hold it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PROMPT = 128
# After the prompt: enough for every buffer to exist, and few for contestants that take seconds.
TOKENS = 2
STATUS = Path("/proc/self/status")


def measure(**arguments: Any) -> dict[str, int] | None:
    """Return the memory of a contestant, measured in a process of its own.

    Args:
        arguments: Those of :func:`child`.

    Returns:
        ``peak_bytes``, the most that was resident, ``before_bytes``, what Python and its modules
        took before the model, and on a GPU ``gpu_peak_bytes``, torch's allocations. None if the
        system does not tell.

    Raises:
        RuntimeError: The process failed.
    """
    if not STATUS.exists():
        return None
    code = "from scripts.bench.generation import memory; memory.main()"
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"its memory was not measured: {lines[-1]}")
    found: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the memory of this process as JSON; the arguments are JSON, too."""
    print(json.dumps(child(**json.loads(sys.argv[1]))))


def child(
    name: str, shape: str, layers: int | None, device: str, threads: int, path: str | None
) -> dict[str, int]:
    """Generate ``TOKENS`` tokens after ``PROMPT`` others in this process.

    Args:
        name: The contestant.
        shape: As for ``Materials``.
        layers: As for ``Materials``.
        device: As for ``Materials``.
        threads: Of torch and of llama.cpp.
        path: The file of a contestant of llama.cpp, or None for one of torch.
    """
    if path is not None:
        from scripts.bench.generation.llama import LlamaEngine

        before = _resident("VmRSS")
        engine: Any = LlamaEngine(Path(path), threads, on_gpu=device == "cuda")
        engine.generate(PROMPT, 1, TOKENS)
        return {"before_bytes": before, "peak_bytes": _resident("VmHWM")}

    import torch

    from scripts.bench.generation.contestants import KINDS, Materials

    torch.set_num_threads(threads)
    before = _resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        engine = KINDS[name].make(Materials(shape, layers, device, threads, Path(folder)))
        engine.generate(PROMPT, 1, TOKENS)
    found = {"before_bytes": before, "peak_bytes": _resident("VmHWM")}
    if device == "cuda":
        found["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _resident(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024
