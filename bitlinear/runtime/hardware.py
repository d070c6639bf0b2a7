"""What this machine is: CPU and its flags, GPUs, compilers, torch, libc.

Every probe returns a value or a reason and none raises. The one entry point, :func:`detect`, runs
during ``import bitlinear``, so what is slow (py-cpuinfo starts processes when it is imported, a
compiler is started for its version, a child asks the driver for the GPUs) is remembered in the
cache directory that the caller passes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import reduce
from itertools import takewhile
from pathlib import Path
from typing import Any, Callable, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Probe(Generic[T]):
    """What a probe found: a value, or the reason why there is none; never both.

    Raises:
        ValueError: Both or neither were given.
    """

    value: T | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) == (not self.reason):
            raise ValueError(
                f"a probe has a value or a reason, got {self.value!r}, {self.reason!r}"
            )


@dataclass(frozen=True)
class Cpu:
    """A CPU as every one of its cores can be used.

    Attributes:
        machine: ``"x86_64"``, ``"aarch64"``, or what the system calls anything else.
        brand: For people, such as ``"AMD EPYC 9R14"``.
        vendor, family, model, stepping: As the system prints them, empty where it does not.
        flags: Features in the spelling of Linux, enabled by the operating system, that all cores
            have. None means that they could not be determined, which is not "has none".
        reason: Why ``flags`` is None.
    """

    machine: str
    brand: str
    vendor: str
    family: str
    model: str
    stepping: str
    flags: frozenset[str] | None
    reason: str = ""

    @property
    def identity(self) -> str:
        """A short string, equal on CPUs that compiled code cannot tell apart; for cache keys."""
        flags = "unknown"
        if self.flags is not None:
            flags = hashlib.sha256(" ".join(sorted(self.flags)).encode()).hexdigest()[:12]
        return "-".join((self.machine, self.vendor, self.family, self.model, self.stepping, flags))


@dataclass(frozen=True)
class Compiler:
    """A compiler driver.

    Attributes:
        path: As found; the value of ``$CXX`` with its arguments if that is set.
        realpath: The file behind it, with links resolved and ``ccache`` and the like stripped.
        version: The line of ``--version`` that holds the version.
        family: ``"gcc"``, ``"clang"``, ``"nvcc"`` or ``"unknown"``.
    """

    path: str
    realpath: str
    version: str
    family: str

    @property
    def release(self) -> str:
        """The CUDA release that nvcc is part of, such as ``"13.0"``; empty for any other."""
        found = re.search(r"release (\d+\.\d+)", self.version)
        return found.group(1) if found else ""


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU.

    Attributes:
        name: For people, such as ``"NVIDIA H100 80GB HBM3"``.
        capability: Its compute capability: (9, 0).
        memory: In bytes.
    """

    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def identity(self) -> str:
        """Equal for GPUs of one model; for cache keys."""
        return "{} {}.{}".format(self.name, *self.capability)


@dataclass(frozen=True)
class Driver:
    """What the NVIDIA driver grants this process.

    Attributes:
        cuda: The newest CUDA that it runs, such as ``"13.0"``.
        gpus: Those that it lets this process see (CUDA_VISIBLE_DEVICES has had its say), in the
            order of torch's device numbers.
    """

    cuda: str
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Torch:
    """The installed torch; ``cuda`` is None for a build without CUDA (for ROCm, too)."""

    version: str
    git_version: str
    cuda: str | None
    cxx11_abi: bool


@dataclass(frozen=True)
class Hardware:
    """Everything that selection, building and reporting know about the machine.

    Attributes:
        system: ``"linux"``, ``"darwin"`` or ``"windows"``.
        ninja: Path of the executable.
        nvcc: That of a toolkit that torch can use: its path ends in ``bin/nvcc``, and the toolkit
            is what lies above.
        driver: Of NVIDIA. It was not initialised in this process to find out.
    """

    system: str
    cpu: Cpu
    compiler: Compiler | None
    compiler_reason: str
    ninja: str | None
    ninja_reason: str
    nvcc: Compiler | None
    nvcc_reason: str
    driver: Driver | None
    driver_reason: str
    torch: Torch
    libc: str
    python: str


def detect(cache_dir: Path | None = None, *, everything: bool = False) -> Hardware:
    """Probe the machine.

    Args:
        cache_dir: An existing directory, safe to trust, where answers of slow probes are
            remembered. None, or one that cannot be read or written, only costs time.
        everything: Look for GPUs and nvcc even if torch cannot use them (the doctor does).
    """
    memory = _Memory(cache_dir)
    system = "windows" if sys.platform == "win32" else sys.platform
    torch = _torch()
    compiler = _compiler(memory)
    ninja = _ninja(memory)
    nvcc = Probe[Compiler](reason=_NOT_LOOKED_FOR)
    driver = Probe[Driver](reason=_NOT_LOOKED_FOR)
    if torch.cuda or everything:
        nvcc, driver = _nvcc(memory), _driver(memory)
    hardware = Hardware(
        system=system,
        cpu=_cpu(system, memory),
        compiler=compiler.value,
        compiler_reason=compiler.reason,
        ninja=ninja.value,
        ninja_reason=ninja.reason,
        nvcc=nvcc.value,
        nvcc_reason=nvcc.reason,
        driver=driver.value,
        driver_reason=driver.reason,
        torch=torch,
        libc=_libc(),
        python=platform.python_version(),
    )
    memory.save()
    return hardware


# --- CPU -----------------------------------------------------------------------------------------

_MACHINES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_PROC_CPUINFO = "/proc/cpuinfo"

# Lines of it that stay the same from one read to the next, and tell CPUs apart.
_STABLE = (
    "vendor_id", "cpu family", "model", "model name", "stepping", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features",
)  # fmt: skip

# macOS's names: CPUID features under machdep.cpu, switches under hw.optional.
_FROM_SYSCTL = {
    "avx1.0": "avx", "avx1_0": "avx", "avx2_0": "avx2", "sse3": "pni", "sse4.1": "sse4_1",
    "sse4.2": "sse4_2", "avx512vnni": "avx512_vnni", "avxvnni": "avx_vnni",
    "advsimd": "asimd", "neon": "asimd", "feat_dotprod": "asimddp", "feat_i8mm": "i8mm",
    "feat_bf16": "bf16", "feat_fp16": "asimdhp", "feat_fhm": "asimdfhm", "feat_rdm": "asimdrdm",
    "feat_lse": "atomics", "feat_crc32": "crc32", "armv8_crc32": "crc32",
    "armv8_1_atomics": "atomics", "armv8_2_fhm": "asimdfhm",
}  # fmt: skip


def _cpu(system: str, memory: _Memory) -> Cpu:
    machine = _MACHINES.get(platform.machine().lower(), platform.machine())
    if system == "linux":
        cpu = _linux_cpu(machine, memory)
    elif system == "darwin":
        # By its full path: /usr/sbin is often missing from the PATH of services.
        text = _output(["/usr/sbin/sysctl", "machdep.cpu", "hw.cpufamily", "hw.optional"])
        if text.value is None:
            return _unknown(machine, text.reason)
        cpu = parse_sysctl(text.value, machine)
    else:
        brand = os.environ.get("PROCESSOR_IDENTIFIER", "")
        cpu = _unknown(machine, f"CPU flags are not determined on {system}", brand)
    return cpu if cpu.flags is None else _as_torch_sees(cpu, cpu.flags)


def _unknown(machine: str, reason: str, brand: str = "") -> Cpu:
    return Cpu(machine, brand, "", "", "", "", None, reason)


def _linux_cpu(machine: str, memory: _Memory) -> Cpu:
    def parse() -> Probe[dict[str, Any]]:
        text = _read(_PROC_CPUINFO)
        if text.value is None:
            return Probe(reason=text.reason)
        return Probe(_to_json(parse_proc_cpuinfo(text.value, machine)))

    try:
        # One block, the boot and the cores that are switched on say which CPUs these are; reading
        # all blocks is slow on large machines.
        with open(_PROC_CPUINFO, encoding="utf-8", errors="replace") as file:
            block = list(takewhile(str.strip, file))
    except OSError as error:
        return _unknown(machine, f"{_PROC_CPUINFO} cannot be read: {error}")
    boot = _read(_BOOT_ID)
    online = _read("/sys/devices/system/cpu/online")
    stable = [line for line in block if line.partition(":")[0].strip() in _STABLE]
    key = hashlib.sha256("".join((machine, str(boot), str(online), *stable)).encode()).hexdigest()
    # Without a boot's name there is no telling for how long the answer holds.
    cpu = (memory if boot.value else _Memory(None)).recall(f"cpu {key}", parse, _from_json)
    return cpu.value or _unknown(machine, cpu.reason)


def _read(path: str) -> Probe[str]:
    try:
        return Probe(Path(path).read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        return Probe(reason=f"{path} cannot be read: {error}")


def parse_proc_cpuinfo(text: str, machine: str) -> Cpu:
    """The CPU that the text of Linux's ``/proc/cpuinfo`` describes.

    The kernel lists a flag only if it has enabled the feature. Cores may differ (big.LITTLE, a
    hypervisor's mix of hosts), and a thread may move between them: only common flags count.
    """
    blocks = [dict(_fields(block)) for block in text.split("\n\n")]
    listed = [b.get("flags", b.get("Features")) for b in blocks]
    sets = [frozenset(flags.split()) for flags in listed if flags is not None]
    sets += _py_cpuinfo(text)
    flags = reduce(frozenset.intersection, sets) if sets else frozenset()

    first, last = blocks[0], blocks[-1]
    part, implementer = first.get("CPU part", ""), first.get("CPU implementer", "")
    cores = dict.fromkeys(
        f"{b.get('CPU implementer', '')} part {b['CPU part']}" for b in blocks if b.get("CPU part")
    )
    brands = (first.get("model name"), last.get("Model"), last.get("Hardware"))
    revision = f"r{first.get('CPU variant', '')}p{first.get('CPU revision', '')}" if part else ""
    return Cpu(
        machine=machine,
        brand=next(filter(None, brands), f"Arm {' and '.join(cores)}" if cores else "unknown"),
        vendor=first.get("vendor_id", implementer),
        family=first.get("cpu family", first.get("CPU architecture", "")),
        model=first.get("model", part),
        stepping=first.get("stepping", revision),
        flags=flags or None,
        reason="" if flags else "/proc/cpuinfo lists no flags",
    )


def parse_sysctl(text: str, machine: str) -> Cpu:
    """The CPU that macOS's ``sysctl machdep.cpu hw.cpufamily hw.optional`` describes."""
    fields = dict(_fields(text))
    names: list[str] = []
    for group in ("features", "leaf7_features", "extfeatures"):
        names += fields.get(f"machdep.cpu.{group}", "").lower().split()
    flags = {_FROM_SYSCTL.get(name, name) for name in names}
    denied = set()  # the system has not enabled it, whatever CPUID or another name of it says
    for key, value in fields.items():
        if key.startswith("hw.optional."):
            name = key.rpartition(".")[2].lower()
            if value == "0":
                denied.add(_FROM_SYSCTL.get(name, name))
            elif machine == "aarch64" and name in _FROM_SYSCTL:
                flags.add(_FROM_SYSCTL[name])
    flags -= denied
    return Cpu(
        machine=machine,
        brand=fields.get("machdep.cpu.brand_string", "unknown"),
        vendor=fields.get("machdep.cpu.vendor", "Apple" if machine == "aarch64" else ""),
        family=fields.get("machdep.cpu.family", fields.get("hw.cpufamily", "")),
        model=fields.get("machdep.cpu.model", ""),
        stepping=fields.get("machdep.cpu.stepping", ""),
        flags=frozenset(flags) or None,
        reason="" if flags else "sysctl lists no flags",
    )


def _fields(text: str) -> list[tuple[str, str]]:
    pairs = (line.partition(":") for line in text.splitlines())
    return [(key.strip(), value.strip()) for key, colon, value in pairs if colon]


def _py_cpuinfo(text: str) -> list[frozenset[str]]:
    """The flags that py-cpuinfo finds in the text of /proc/cpuinfo; none if it cannot."""
    # get_cpu_info() measures the clock for a second: call its parser of this one source instead,
    # which is private, so that any release may break it.
    try:
        from cpuinfo import cpuinfo

        source = cpuinfo.DataSource
        kept = source.has_proc_cpuinfo, source.cat_proc_cpuinfo
        if cpuinfo.g_trace is None:
            cpuinfo.g_trace = cpuinfo.Trace(False, False)
        source.has_proc_cpuinfo = staticmethod(lambda: True)
        source.cat_proc_cpuinfo = staticmethod(lambda: (0, text))
        try:
            return [frozenset(cpuinfo._get_cpu_info_from_proc_cpuinfo()["flags"])]
        finally:
            source.has_proc_cpuinfo, source.cat_proc_cpuinfo = map(staticmethod, kept)
    except Exception:
        return []


def _as_torch_sees(cpu: Cpu, flags: frozenset[str]) -> Cpu:
    """Without AVX-512 if torch found that the registers for it are not enabled (XGETBV).

    A hypervisor can announce the instructions and not enable their registers, which Linux does not
    notice. Torch's detection can fail as a whole (no /sys in a sandbox), and then denies
    everything: its "no" counts only beside a "yes" for AVX2.
    """
    from torch import cpu as torch_cpu

    def supported(*names: str) -> bool | None:  # the second name is that of torch 2.4
        functions = (getattr(torch_cpu, name, None) for name in names)
        function = next(filter(callable, functions), None)
        try:
            return bool(function()) if function is not None else None
        except Exception:
            return None

    if any(flag.startswith("avx512") for flag in flags) and (
        supported("_is_avx2_supported", "_is_cpu_support_avx2") is True
        and supported("_is_avx512_supported", "_is_cpu_support_avx512") is False
    ):
        flags = frozenset(flag for flag in flags if not flag.startswith("avx512"))
    return replace(cpu, flags=flags)


def _to_json(cpu: Cpu) -> dict[str, str | None]:
    return {**vars(cpu), "flags": None if cpu.flags is None else " ".join(sorted(cpu.flags))}


def _from_json(values: dict[str, Any]) -> Cpu:
    flags = values["flags"]
    cpu = Cpu(**{**values, "flags": None if flags is None else frozenset(_text(flags).split())})
    if (not cpu.flags) != bool(cpu.reason):
        raise ValueError(f"flags or a reason, got {values!r}")
    for name in values.keys() - {"flags"}:
        _text(values[name])
    return cpu


# --- GPUs ----------------------------------------------------------------------------------------

_NOT_LOOKED_FOR = "not looked for: torch is built without CUDA"

_NVIDIA_DRIVER = (
    "/dev/nvidiactl",
    "/dev/nvhost-gpu",  # Jetson
    "/dev/dxg",  # WSL
    r"C:\Windows\System32\nvcuda.dll",
)
_ASK_DRIVER = Path(__file__).with_name("gpu_probe.py")

# What decides, besides the machine, which GPUs a process sees and through which driver.
_VISIBILITY = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "SLURM_JOB_GPUS",
    "LD_LIBRARY_PATH",
)  # fmt: skip


def _driver(memory: _Memory) -> Probe[Driver]:
    if not any(os.path.exists(path) for path in _NVIDIA_DRIVER):
        return Probe(reason="no NVIDIA driver is loaded")
    if not has_interpreter():
        return Probe(reason="there is no Python interpreter to ask the driver with")
    boot = _read(_BOOT_ID)
    key = [str(boot), str(_read("/proc/driver/nvidia/version")), *_nvidia_devices()]
    key += [f"{name}={os.environ.get(name)}" for name in _VISIBILITY]
    digest = hashlib.sha256("\n".join(key).encode(errors="replace")).hexdigest()
    memory = memory if boot.value else _Memory(None)
    return memory.recall(f"driver {digest}", _ask_driver, _driver_from_json)


def _nvidia_devices() -> list[str]:
    """A container may have been given some of the GPUs only."""
    with contextlib.suppress(OSError):
        return sorted(name for name in os.listdir("/dev") if name.startswith("nvidia"))
    return []


def _ask_driver() -> Probe[dict[str, Any]]:
    # Without the user's site-packages, which could import this package again.
    output = _output([sys.executable, "-I", "-S", str(_ASK_DRIVER)])
    if output.value is None:
        return Probe(reason=output.reason)
    try:
        answer = json.loads(output.value)
    except ValueError:
        answer = {"reason": output.value.strip().splitlines()[0]}
    if "reason" in answer:
        return Probe(reason=f"the NVIDIA driver does not answer: {answer['reason']}")
    return Probe(answer)


def _driver_from_json(answer: dict[str, Any]) -> Driver:
    gpus = []
    for gpu in answer["gpus"]:
        major, minor = map(int, gpu["capability"])
        gpus.append(Gpu(_text(gpu["name"]), (major, minor), int(gpu["memory"])))
    return Driver(_text(answer["cuda"]), tuple(gpus))


def has_interpreter() -> bool:
    """Whether this Python can be started again (not if it is part of a program)."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


# --- Toolchains ----------------------------------------------------------------------------------

_CUDA_HOME = "/usr/local/cuda"  # where NVIDIA's packages put it
_LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")


def _compiler(memory: _Memory) -> Probe[Compiler]:
    chosen = os.environ.get("CXX", "").strip()
    candidates = (chosen,) if chosen else ("c++", "g++", "clang++")
    for candidate in candidates:
        try:
            command = shlex.split(candidate)
        except ValueError as error:
            return Probe(reason=f"CXX={candidate!r} cannot be split into words: {error}")
        launched = len(command) > 1 and os.path.basename(command[0]) in _LAUNCHERS
        found = shutil.which(command[1 if launched else 0])
        if found and (not launched or shutil.which(command[0])):
            return _ask_version(chosen or found, [*command, "--version"], found, memory)
    if chosen:
        return Probe(reason=f"CXX={chosen!r} is not an executable on PATH")
    return Probe(reason=f"none of {', '.join(candidates)} is on PATH")


def _nvcc(memory: _Memory) -> Probe[Compiler]:
    """That of the first toolkit, looked for in the order of torch.utils.cpp_extension."""
    chosen = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [chosen] if chosen else [_CUDA_HOME, *_packaged_toolkits()]
    if not chosen and (on_path := shutil.which("nvcc")):
        # It may be a link into a toolkit, or a script that lies in none.
        places = (on_path, os.path.realpath(on_path))
        homes = [*(os.path.dirname(os.path.dirname(place)) for place in places), *homes]
    for home in homes:
        found = shutil.which("nvcc", path=os.path.join(home, "bin"))
        if found and os.path.isfile(os.path.join(home, "include", "cuda_runtime_api.h")):
            return _ask_version(found, [found, "--version"], found, memory)
    where = f"CUDA_HOME={chosen!r}" if chosen else " or ".join(dict.fromkeys(homes))
    return Probe(reason=f"no bin/nvcc and include/cuda_runtime_api.h in {where}")


def _packaged_toolkits() -> list[str]:
    """Where the package nvidia-cuda-nvcc puts one, beside the libraries that torch brings."""
    with contextlib.suppress(Exception):
        spec = importlib.util.find_spec("nvidia")
        places = (spec and spec.submodule_search_locations) or ()
        return [str(home) for place in places for home in Path(place).glob("cu[0-9]*")]
    return []


def _ask_version(path: str, command: list[str], found: str, memory: _Memory) -> Probe[Compiler]:
    realpath = os.path.realpath(found)
    try:
        # A launcher or a script stays the same file when the compiler behind it changes.
        with open(realpath, "rb") as file:
            if os.path.basename(realpath) in _LAUNCHERS or file.read(2) == b"#!":
                memory = _Memory(None)
        key = " ".join((*command, realpath, _version_of_file(realpath)))
    except OSError as error:
        return Probe(reason=f"{path} cannot be examined: {error}")
    output = memory.recall(key, lambda: _output(command), _text)
    if output.value is None:
        return Probe(reason=output.reason)
    lower = output.value.lower()
    lines = output.value.strip().splitlines()
    marks = (("nvcc", "nvidia"), ("clang", "clang"), ("gcc", "free software foundation"))
    family = next((family for family, mark in marks if mark in lower), "unknown")
    # nvcc's first line is its name.
    version = next((line for line in lines if "release" in line and family == "nvcc"), lines[0])
    return Probe(Compiler(path=path, realpath=realpath, version=version.strip(), family=family))


def _ninja(memory: _Memory) -> Probe[str]:
    name = "ninja.exe" if sys.platform == "win32" else "ninja"
    directories = [os.path.dirname(sys.executable)]
    on_path = shutil.which("ninja")
    if on_path:
        directories.insert(0, os.path.dirname(on_path))
    # The package on PyPI knows a directory that need not be on PATH.
    with contextlib.suppress(Exception):
        spec = importlib.util.find_spec("ninja")
        if spec is not None and spec.origin is not None:
            key = f"ninja {sys.prefix} {spec.origin} {_version_of_file(spec.origin)}"
            directories.insert(0, memory.recall(key, _ninja_package, _text).value or "")
    for directory in directories:
        path = os.path.join(directory, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return Probe(path)
    return Probe(reason="the package ninja is not installed, and ninja is not on PATH")


def _ninja_package() -> Probe[str]:
    import ninja

    return Probe(str(ninja.BIN_DIR))


def _output(command: list[str]) -> Probe[str]:
    """Standard output of a command that succeeds."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Probe(reason=f"{shlex.join(command)}: {error}")
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        return Probe(reason=f"{shlex.join(command)} failed with {done.returncode}: {lines[0]}")
    if not done.stdout.strip():
        return Probe(reason=f"{shlex.join(command)} printed nothing")
    return Probe(done.stdout.decode(errors="replace"))


def _torch() -> Torch:
    import torch

    return Torch(
        version=str(torch.__version__),
        git_version=str(getattr(torch.version, "git_version", "")),
        cuda=torch.version.cuda,
        cxx11_abi=bool(torch.compiled_with_cxx11_abi()),
    )


def _libc() -> str:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        glibc = os.confstr("CS_GNU_LIBC_VERSION")
        if glibc:
            return glibc
    name, version = platform.libc_ver()
    return f"{name or sys.platform} {version or platform.release()}"


# --- Memory --------------------------------------------------------------------------------------


class _Memory:
    """Answers of slow probes, in one JSON file that can be lost or spoilt at any time.

    Keys name everything that an answer depends on. Writers replace the file as a whole, and the
    last one wins: what that forgets is probed again.
    """

    LIMIT = 32

    def __init__(self, directory: Path | None) -> None:
        self._path = None if directory is None else Path(directory) / "hardware.json"
        self._answers: dict[str, Any] = {}
        self._changed = False
        # What another version of this module understood may be wrong.
        self._edition = _version_of_file(__file__)
        if self._path is not None:
            with contextlib.suppress(OSError, ValueError, RecursionError):
                answers = json.loads(self._path.read_bytes())
                self._answers = answers if isinstance(answers, dict) else {}

    def recall(
        self, key: str, probe: Callable[[], Probe[Any]], decode: Callable[[Any], T]
    ) -> Probe[T]:
        """What ``probe`` finds, or found when last asked under this key, decoded.

        ``decode`` raises on what it cannot use. Reasons are not remembered: they can be mended.
        """
        key = f"{self._edition} {key}"
        with contextlib.suppress(Exception):
            return Probe(decode(self._answers[key]))
        found = probe()
        if found.value is None:
            return Probe(reason=found.reason)
        self._answers.pop(key, None)
        self._answers[key] = found.value
        self._changed = True
        return Probe(decode(found.value))

    def save(self) -> None:
        if self._path is None or not self._changed:
            return
        newest = dict(list(self._answers.items())[-self.LIMIT :])
        with contextlib.suppress(OSError):
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=".hardware-")
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    json.dump(newest, file, indent=1)
                os.replace(name, self._path)
            except BaseException:
                os.unlink(name)
                raise


def _text(answer: Any) -> str:
    if not isinstance(answer, str):
        raise TypeError(f"not a text: {answer!r}")
    return answer


def _version_of_file(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:  # inside a zip
        return "unknown"
    return f"{status.st_mtime_ns}:{status.st_size}"
