"""Measure the memory and the time of loading a deployed model, in several ways. Linux only.

    python -m scripts.bench.load_memory [--gib 1]

Each way starts from a model on the meta device, in a fresh process, with the file in the page
cache, and ends with one token through all layers. "Anonymous" memory belongs to that process alone.
The rest of the peak is pages of the file, which processes share and the system can drop.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts import tools

with tools.importing("safetensors"):
    import safetensors.torch

PROGRAM = """
import sys, time, torch, bitlinear
from safetensors.torch import load_file

def build(layers):  # deployed, on the meta device
    model, state = torch.nn.Sequential(), {}
    with torch.device("meta"):
        for i in range(layers):
            model.append(bitlinear.BitLinear(8192, 8192, bias=False))
            state[f"{i}.w_packed"] = torch.empty(8192, 2048, dtype=torch.uint8)
            state[f"{i}.w_scale"] = torch.empty(1)
    model.load_state_dict(state, assign=True)
    return model

def mib(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) // 1024

packed = torch.full((8192, 2048), 0b10010110, dtype=torch.uint8)
with torch.inference_mode():
    x, model = torch.randn(1, 8192), build(1)
    model.load_state_dict({"0.w_packed": packed, "0.w_scale": torch.ones(1)}, assign=True)
    model(x)  # code, threads and their stacks
    del model, packed
    model = build(int(sys.argv[1]))
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # resets the peak
    rss, anonymous, start = mib("VmRSS"), mib("RssAnon"), time.perf_counter()
    print(anonymous, flush=True)
    LOAD
    seconds = f"{time.perf_counter() - start:.2f}"
    assert model(x).isfinite().all()
print(mib("RssAnon") - anonymous, mib("VmHWM") - rss, seconds)
"""

COPY = "model.to_empty(device='cpu').load_state_dict"
TORCH_LOAD = "torch.load('model.pt', weights_only=True"
WAYS = {
    "`load_deployed(path, model)`": "bitlinear.load_deployed('model.safetensors', model)",
    "`load_state_dict(load_file(path))`": f"{COPY}(load_file('model.safetensors'))",
    "`load_state_dict(torch.load(path))`": f"{COPY}({TORCH_LOAD}))",
    "the same with `assign=True`": f"model.load_state_dict({TORCH_LOAD}), assign=True)",
    "and with `mmap=True`": f"model.load_state_dict({TORCH_LOAD}, mmap=True), assign=True)",
}


def measure(load: str, layers: int, folder: str) -> list[str]:
    """Return MiB of anonymous memory (peak, after the token), MiB of the peak, and seconds."""
    command = [sys.executable, "-c", PROGRAM.replace("LOAD", load), str(layers)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        kib = [int(process.stdout.readline()) * 1024]
        while process.poll() is None:  # Linux keeps no peak of anonymous memory: sample it
            status = Path(f"/proc/{process.pid}/status").read_text()
            kib += map(int, re.findall(r"RssAnon:\s+(\d+)", status))
            time.sleep(0.001)
        return [str((max(kib) - kib[0]) // 1024), *process.stdout.read().split()]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1, help="size of the model (default: 1)")
    layers = max(1, round(parser.parse_args(argv).gib * 64))
    with tempfile.TemporaryDirectory() as folder:
        state = {f"{i}.w_scale": torch.full((1,), 1 / 8192) for i in range(layers)}
        for i in range(layers):
            state[f"{i}.w_packed"] = torch.full((8192, 2048), 0b10010110, dtype=torch.uint8)
        safetensors.torch.save_file(state, f"{folder}/model.safetensors")
        torch.save(state, f"{folder}/model.pt")
        del state
        print(f"{layers * 8192**2 / 1e9:.1f}e9 weights, {layers / 64:g} GiB packed; MiB:\n")
        print("| | anonymous, peak | and after | peak in all | seconds |\n|---|---|---|---|---|")
        for name, load in WAYS.items():
            print(f"| {name} | {' | '.join(measure(load, layers, folder))} |", flush=True)


if __name__ == "__main__":
    main()
