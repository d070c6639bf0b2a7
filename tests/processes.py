"""A pool of processes, each a rank of process groups in which checks run."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

TIMEOUT = 120  # seconds for a check; collectives time out after half of it


class Processes:
    """Processes that start when the first check runs, and again after a check has failed.

    ``run(2, check, *arguments)`` calls ``check(*arguments)`` in two processes, in a new process
    group of their own: gloo on CPUs, NCCL on GPUs. ``check`` has to be a function of a module.
    """

    def __init__(self, device_type="cpu"):
        self._device_type = device_type
        self._workers = []

    def run(self, world_size, check, *arguments):
        """Fails with the traceback of each process in which ``check`` raises."""
        while len(self._workers) < world_size:
            self._workers.append(_start(self._device_type))
        workers = dict(self._workers[:world_size])
        with tempfile.TemporaryDirectory() as directory:
            store = Path(directory, "store").as_uri()
            for rank, connection in enumerate(workers):
                connection.send((rank, world_size, store, check, arguments))
            failures = _failures(list(workers))
        if failures:
            self.stop()
            pytest.fail("\n".join(failures), pytrace=False)

    def stop(self):
        for connection, process in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []


def _start(device_type):
    context = multiprocessing.get_context("spawn")
    connection, far_end = context.Pipe()
    process = context.Process(target=_work, args=(far_end, device_type), daemon=True)
    process.start()
    far_end.close()
    return connection, process


def _failures(connections):
    failures = []
    waiting, deadline = {c: rank for rank, c in enumerate(connections)}, time.monotonic() + TIMEOUT
    while waiting:
        ready = wait(list(waiting), timeout=max(0, deadline - time.monotonic()))
        if not ready:
            failures += [f"rank {rank}: no answer" for rank in waiting.values()]
            break
        for connection in ready:
            rank = waiting.pop(connection)
            try:
                problem = connection.recv()
            except EOFError:
                problem = "the process ended"
            if problem:
                failures.append(f"rank {rank}: {problem}")
                # The other processes can wait for this one forever: give them two seconds to fail.
                deadline = min(deadline, time.monotonic() + 2)
    return failures


def _work(connection, device_type):
    if device_type == "cpu":
        # All traffic stays on this machine, whose name no resolver may know.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
    else:
        torch.set_default_device(device_type)
    while True:
        try:
            rank, world_size, store, check, arguments = connection.recv()
        except EOFError:
            return
        connection.send(_problem(device_type, rank, world_size, store, check, arguments))


def _problem(device_type, rank, world_size, store, check, arguments):
    torch.manual_seed(0)
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        init_method=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    try:
        # A process that leaves before the others are connected breaks their connections.
        torch.distributed.barrier()
        check(*arguments)
    except Exception:
        return traceback.format_exc()
    finally:
        torch.distributed.destroy_process_group()
    return ""


# --- Parts of checks ---

# To start a process takes seconds. All tests share the two that the quick ones need.
WORLD_SIZES = [2, pytest.param(4, marks=pytest.mark.slow)]


def assert_same_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def mesh():
    """All processes of the current check."""
    device_type = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    return init_device_mesh(device_type, (torch.distributed.get_world_size(),))


def attention(q, k, v, width=4):
    """Attention with one head per ``width`` columns of ``q``, ``k`` and ``v``.

    Each head is computed alone, on separate tensors. Its bits then depend neither on the number of
    heads in a process nor on the positions of its values in a vector register.
    """
    heads = zip(*(x.split(width, dim=-1) for x in (q, k, v)))
    outputs = [
        F.scaled_dot_product_attention(*(x.contiguous() for x in operands)) for operands in heads
    ]
    return torch.cat(outputs, dim=-1)


# Every CPU computes it to the same bits, because it only compares and halves. torch computes GELU
# with one function in full vector registers and with another in the tail, so that the last bit of a
# value depends on the number of values in a process.
EXACT_ACTIVATION = nn.LeakyReLU(0.5)


class Block(nn.Module):
    """A block of a transformer. The width of its projections gives the number of heads."""

    def __init__(self, width, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.o(attention(self.q(h), self.k(h), self.v(h)))
        return x + self.down(EXACT_ACTIVATION(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """From ``(batch, length, width)`` to ``(batch, classes)``."""

    def __init__(self, width=32, hidden=64, classes=3):
        super().__init__()
        self.blocks = nn.Sequential(Block(width, hidden), Block(width, hidden))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.norm(self.blocks(x).mean(dim=1)))
