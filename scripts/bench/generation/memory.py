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


def measure(**arguments: Any) -> dict[str, int]:
    """Return the memory of a contestant, measured in a process of its own.

    Args:
        arguments: Those of :func:`generate`.

    Returns:
        ``peak_bytes``, the most that was resident, pages of mapped files included,
        ``before_bytes``, what Python and its modules took before the model, and on a GPU
        ``gpu_peak_bytes``, torch's allocations.

    Raises:
        RuntimeError: The process failed.
    """
    found: dict[str, int] = _run("generate", arguments)
    return found


def save(**arguments: Any) -> None:
    """Save the model of a contestant, in a process of its own.

    Args:
        arguments: Those of :func:`write`.

    Raises:
        RuntimeError: The process failed.
    """
    _run("write", arguments)


def main() -> None:
    """Run the function that is named, and print its result as JSON; its arguments are JSON, too."""
    function = {"generate": generate, "write": write}[sys.argv[1]]
    print(json.dumps(function(**json.loads(sys.argv[2]))))


def write(name: str, shape: str, layers: int | None, folder: str) -> None:
    """Make the model of a contestant in this process, and write it with ``save_pretrained``."""
    from scripts.bench.generation.contestants import KINDS, Materials

    engine = KINDS[name].make(Materials(shape, layers, "cpu", 1, Path(folder)))
    engine.model.save_pretrained(folder)


def generate(
    name: str, shape: str, layers: int | None, device: str, threads: int, path: str | None
) -> dict[str, int]:
    """Generate ``TOKENS`` tokens after ``PROMPT`` others in this process.

    Args:
        name: The contestant.
        shape: As for ``Materials``.
        layers: As for ``Materials``.
        device: As for ``Materials``.
        threads: Of torch and of llama.cpp.
        path: The file of a contestant of llama.cpp, the folder that :func:`write` has filled, or
            None for a model that this process makes.
    """
    if path is not None and not Path(path).is_dir():
        from scripts.bench.generation.llama import LlamaEngine

        before = _resident("VmRSS")
        engine: Any = LlamaEngine(Path(path), threads, on_gpu=device == "cuda")
        engine.generate(PROMPT, 1, TOKENS)
        return {"before_bytes": before, "peak_bytes": _resident("VmHWM")}

    import torch

    torch.set_num_threads(threads)
    if path is not None:
        before = _load_and_generate(path, device)
    else:
        from scripts.bench.generation.contestants import KINDS, Materials

        before = _resident("VmRSS")
        with tempfile.TemporaryDirectory() as folder:
            engine = KINDS[name].make(Materials(shape, layers, device, threads, Path(folder)))
            engine.generate(PROMPT, 1, TOKENS)
    found = {"before_bytes": before, "peak_bytes": _resident("VmHWM")}
    if device == "cuda":
        found["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _load_and_generate(folder: str, device: str) -> int:
    """Do what a user's program does, and import no more; return the memory before the model."""
    import torch
    from transformers import BitNetForCausalLM

    import bitlinear  # noqa: F401

    before = _resident("VmRSS")
    model: Any = BitNetForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT), device=device)
    mask = torch.ones_like(prompt)
    model.generate(prompt, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)
    return before


def _resident(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def _run(function: str, arguments: dict[str, Any]) -> Any:
    code = "from scripts.bench.generation import memory; memory.main()"
    result = subprocess.run(
        [sys.executable, "-c", code, function, json.dumps(arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"its memory was not measured: {lines[-1]}")
    return json.loads(result.stdout.splitlines()[-1])
