"""Kernels for other machines: compiled here, used without a compiler, by another user, on another
CPU.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bitlinear import runtime
from bitlinear.kernels import CudaLibrary
from bitlinear.runtime import artifacts, build, prebuild, self_tests
from bitlinear.runtime.artifacts import Artifact
from bitlinear.runtime.cache_directory import open_cache
from bitlinear.runtime.gpus import Driver, Gpu
from bitlinear.runtime.hardware import UNKNOWN, Hardware, detect
from bitlinear.runtime.rejection import Probe, Rejection, SettingError
from tests.runtime.machines import cpu_text, with_release
from tests.runtime.stand_ins import (
    ROOT,
    StandIns,
    compilations,
    compiler,
    forget_loaded,
    stand_ins,
    states,
)

# --- The list ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names", "architectures"),
    [
        ("avx2", "avx2", ""),
        ("avx2,amx_int8", "avx2 amx_int8", ""),
        ("avx2, scalar", "avx2 scalar", ""),
        ("avx2,avx2", "avx2", ""),
        ("cuda:8.0,9.0a", "cuda", "sm_80 sm_90a"),
        ("avx2,cuda:9.0", "avx2 cuda", "sm_90a"),
        ("scalar,cuda:8.0+PTX", "scalar cuda", "sm_80 compute_80"),
        ("all", "amx_int8 avx512_vnni avx_vnni avx2 scalar", ""),
    ],
)
def test_a_list_of_kernels(text: str, names: str, architectures: str) -> None:
    libraries = prebuild.parse(text, "x86_64")
    assert [library.name for library in libraries] == names.split()
    codes = [lib.architectures for lib in libraries if isinstance(lib, CudaLibrary)]
    assert " ".join(sum(codes, ())) == architectures


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("avx3", "'avx3' is no kernel for x86_64: choose of all, amx_int8, "),
        ("neon", "'neon' is no kernel for x86_64"),
        ("cuda:hopper", "'hopper' is no GPU architecture from 6.1 on"),
        ("cuda:5.2", "'5.2' is no GPU architecture from 6.1 on"),
        ("cuda:", "names no architecture"),
        ("", "names no kernel"),
        ("9.0", "'9.0' is no kernel"),
    ],
)
def test_a_list_that_means_nothing(text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        prebuild.parse(text, "x86_64")


# --- With small libraries ------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "tools")))
    return tmp_path / "tools"


def _prebuild(sources: StandIns, hardware: Hardware) -> prebuild.Prebuilt:
    return prebuild.prebuild(
        sources.variants, hardware, open_cache(), sources.operator, sources.directory
    )


@pytest.mark.slow
def test_what_was_prebuilt_is_found_tested_and_used(
    fresh: Path, tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = stand_ins(tmp_path / "sources", ("good", "illegal"))
    elsewhere = replace(sources.variants[0], requires=frozenset({"a_flag"}))
    sources = replace(sources, variants=(elsewhere, *sources.variants[1:]))
    here = detect()
    for _ in range(2):  # the second time, everything is there
        done = _prebuild(sources, here)
        assert done.directory == fresh
        operator, kernel0, kernel1 = (done.libraries[n] for n in ("operator", "kernel0", "kernel1"))
        assert operator.value is not None
        assert operator.value.self_test.startswith("ran on ")
        assert kernel0.value is not None
        assert kernel0.value.self_test == ""  # another machine tests it
        assert "illegal instruction" in kernel1.reason
        assert len(compilations(tools)) == 3

    # The machine that it is for: it has the flag, and neither a compiler nor ninja.
    assert here.cpu.flags.value is not None
    cpu = replace(here.cpu, flags=Probe(here.cpu.flags.value | {"a_flag"}))
    other = replace(here, cpu=cpu, compiler=UNKNOWN.compiler, ninja=UNKNOWN.ninja)
    monkeypatch.setattr(runtime, "detect", lambda _: other)
    monkeypatch.setenv("BITLINEAR_BUILD", "cached")
    for _ in range(2):
        forget_loaded(monkeypatch)
        loaded = sources.load()
        assert loaded.kernel == "kernel0"
        assert states(loaded) == {"kernel0": "cached", "operator": "cached"}
        assert loaded.artifacts["kernel0"].self_test == "bit-exact with scalar"
    assert len(compilations(tools)) == 3


@pytest.mark.slow
def test_kernels_for_gpus_are_tested_where_the_gpus_are(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One library for several architectures serves a machine with one of them."""
    tested = tmp_path / "tested"
    cuda = f'FILE* file = fopen("{tested}", "a"); fputs("x", file); fclose(file); return 0;'
    sources = stand_ins(tmp_path / "sources", cuda=cuda)
    fat = replace(sources.cuda, architectures=("sm_80", "sm_90a"))
    here = detect()
    nvcc, torch = with_release("13.0"), replace(here.torch, cuda="13.0")
    builder = replace(here, torch=torch, nvcc=Probe(nvcc), driver=UNKNOWN.driver)
    done = prebuild.prebuild([fat], builder, open_cache(), sources.operator, sources.directory)
    assert done.libraries["cuda"].value is not None
    assert done.libraries["cuda"].value.self_test == ""
    assert not tested.exists()

    _prebuild(sources, builder)  # the kernel for the CPU
    driver = Probe(Driver("13.0", (Gpu("NVIDIA H100", (9, 0), 1),)))
    other = replace(builder, driver=driver, nvcc=UNKNOWN.nvcc)
    monkeypatch.setattr(runtime, "detect", lambda _: other)
    monkeypatch.delenv("BITLINEAR_CUDA")
    monkeypatch.setenv("BITLINEAR_BUILD", "cached")
    for _ in range(2):
        forget_loaded(monkeypatch)
        loaded = sources.load()
        assert loaded.cuda.status == "chosen"
        assert loaded.artifacts["cuda"].self_test == "bit-exact with the reference on 1 GPU"
        assert tested.read_text() == "x"


def test_another_cpu_tests_the_same_library_again(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once; its result lies beside that of the first CPU."""
    sources = stand_ins(tmp_path / "sources")
    results = ready / self_tests.FOLDER
    before = set(results.iterdir())
    here = detect()
    other = replace(here, cpu=replace(here.cpu, stepping="another"))
    monkeypatch.setattr(runtime, "detect", lambda _: other)
    started = []
    command = build.python_command
    monkeypatch.setattr(
        build, "python_command", lambda *a, **k: started.append(a) or command(*a, **k)
    )
    for _ in range(2):
        forget_loaded(monkeypatch)
        assert states(sources.load()) == {"kernel0": "cached", "operator": "cached"}
    assert len(started) == 1
    assert len(set(results.iterdir()) - before) == 1


def test_a_library_that_fails_on_another_cpu_is_passed_over_there(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = stand_ins(tmp_path / "sources")
    here = detect()
    other = replace(here, cpu=replace(here.cpu, stepping="another"))
    monkeypatch.setattr(runtime, "detect", lambda _: other)
    wrong = Probe[Artifact](rejection=Rejection("self-test-failed", "row 3 differs"))
    monkeypatch.setattr(build, "test", lambda *_: wrong)
    with pytest.warns(RuntimeWarning, match="row 3 differs"):
        assert sources.load().kernel is None


def test_another_directory_than_was_asked_for_is_no_place(
    fresh: Path, tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SettingError, match=f"no directory to compile into: {fresh} cannot be"):
        _prebuild(stand_ins(tmp_path / "sources"), detect())
    assert not compilations(tools)


def test_nothing_but_the_cache_is_opened_to_readers(ready: Path, tmp_path: Path) -> None:
    """BITLINEAR_CACHE_DIR may be somebody's home directory."""
    secret = ready / ".ssh" / "id"
    secret.parent.mkdir(mode=0o700)
    secret.touch(mode=0o600)
    outside = tmp_path / "outside"
    outside.touch(mode=0o600)
    entry = next(ready.glob("kernel0/*"))
    (entry / "link").symlink_to(outside)
    (entry / "dangling").symlink_to(tmp_path / "nowhere")
    shutil.rmtree(ready / "operator")
    (ready / "operator").symlink_to(secret.parent)
    prebuild._open_to_readers(ready)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(secret.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(outside.stat().st_mode) == 0o600
    for path in (ready, entry.parent, entry):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755
    for path in (entry / artifacts.META, next((ready / self_tests.FOLDER).iterdir())):
        assert path.stat().st_mode & 0o044 == 0o044


# --- BITLINEAR_BUILD=cached ----------------------------------------------------------------------


@pytest.fixture
def cached_only(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITLINEAR_BUILD", "cached")


@pytest.mark.usefixtures("cached_only")
def test_an_empty_cache_is_an_error(fresh: Path, tmp_path: Path, tools: Path) -> None:
    message = (
        "BITLINEAR_BUILD=cached, but no kernel for this CPU can be used: not in the cache. "
        f"{fresh} holds no library. Set BITLINEAR_CACHE_DIR to .*--prebuild"
    )
    with pytest.raises(ImportError, match=message):
        stand_ins(tmp_path / "sources").load()
    assert not compilations(tools)


@pytest.mark.usefixtures("cached_only")
def test_a_worse_kernel_in_the_cache_serves(ready: Path, tmp_path: Path, tools: Path) -> None:
    sources = stand_ins(tmp_path / "sources")
    better = replace(sources.variants[0], name="better", priority=200)
    loaded = replace(sources, variants=(better, *sources.variants)).load()
    assert loaded.kernel == "kernel0"
    assert loaded.verdicts[0].code == "not-cached"
    assert not compilations(tools)


@pytest.mark.usefixtures("cached_only")
def test_a_cache_for_something_else_is_named(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = detect()
    newer = replace(here, torch=replace(here.torch, version="99.0"))
    monkeypatch.setattr(runtime, "detect", lambda _: newer)
    with pytest.raises(ImportError, match=r"the cache has kernel0 for torch 2.* not 99\.0"):
        stand_ins(tmp_path / "sources").load()


@pytest.mark.usefixtures("cached_only")
def test_a_directory_open_to_others_is_named(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in images that give a group the rights of root: the kernels there do not serve."""
    ready.chmod(0o775)
    message = r"can be written to by others \(mode 0775\), so only user-\d+ in it is used"
    with pytest.raises(ImportError, match=message):
        stand_ins(tmp_path / "sources").load()
    with pytest.raises(SettingError, match=f"{message}, where other users do not look"):
        _prebuild(stand_ins(tmp_path / "sources"), detect())


@pytest.mark.usefixtures("cached_only")
def test_missing_kernels_for_a_gpu_are_an_error(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BITLINEAR_CUDA")
    here = detect()
    torch = replace(here.torch, cuda="13.0")
    driver = Probe(Driver("13.0", (Gpu("NVIDIA H100", (9, 0), 1),)))
    with_gpu = replace(here, torch=torch, driver=driver)
    rename = f"{here.torch.version} {here.torch.git_version} cuda="
    for meta in ready.glob(f"*/*/{artifacts.META}"):
        meta.write_text(meta.read_text().replace(f"{rename}None", f"{rename}13.0"))
    monkeypatch.setattr(runtime, "detect", lambda _: with_gpu)
    with pytest.raises(
        ImportError,
        match=r"for this machine's GPUs can be used: not in the cache.*holds kernel0, operator",
    ):
        stand_ins(tmp_path / "sources").load()


# --- The image of README.md, played --------------------------------------------------------------


@pytest.fixture
def image() -> Iterator[Path]:
    """A directory that every user can read, with this package in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        shutil.copytree(ROOT / "bitlinear", directory / "app" / "bitlinear")
        subprocess.run(["chmod", "-R", "go+rX", str(directory / "app")], check=True)
        yield directory


_USE = """
import os, shutil, sys
import torch
import bitlinear
assert os.getuid() == 65534
assert shutil.which("c++") is None
loaded = bitlinear.runtime.current()
assert {a.state for a in loaded.artifacts.values()} == {"cached"}
layer = bitlinear.BitLinear(261, 37).deploy()
x = torch.randn(3, 261)
expected = bitlinear.ops.reference_linear(x, layer.w_packed, layer.w_scale, layer.bias, 261)
assert torch.equal(layer(x), expected)
print(loaded.kernel, loaded.artifacts[loaded.kernel].self_test)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root and Linux")
def test_built_in_one_stage_and_used_in_another(image: Path) -> None:
    """No compiler, no home, another user, another CPU, a cache that can only be read."""
    if detect().cpu.machine != "x86_64":
        pytest.skip("the other CPU is an Intel Haswell")
    kernels = image / "kernels"
    environment = {**os.environ, "PYTHONPATH": str(image / "app"), "HOME": "/nonexistent"}
    environment.update(BITLINEAR_CACHE_DIR=str(kernels), BITLINEAR_CUDA="off")
    for name in ("XDG_CACHE_HOME", "BITLINEAR_KERNEL"):
        environment.pop(name, None)
    built = subprocess.run(
        [sys.executable, "-m", "bitlinear.doctor", "--prebuild", "avx2,scalar"],
        env=environment,
        cwd=image,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert f"3 of 3 in {kernels}" in built.stdout

    (image / "cpuinfo").write_text(cpu_text("haswell"))
    script = f'mount --bind {image / "cpuinfo"} /proc/cpuinfo && exec setpriv --reuid=65534 "$@"'
    stranger = ["unshare", "--mount", "sh", "-c", script, "sh", "--regid=65534", "--clear-groups"]
    environment.update(BITLINEAR_BUILD="cached", CXX="")
    possible = subprocess.run(
        [*stranger, sys.executable, "-c", "import torch"],
        env=environment,
        cwd=image,
        capture_output=True,
        text=True,
        check=False,
    )
    if possible.returncode != 0:
        pytest.skip(f"another user cannot run this Python: {possible.stderr}")
    run = subprocess.run(
        [*stranger, sys.executable, "-c", f"import os; os.environ['PATH'] = ''\n{_USE}"],
        env=environment,
        cwd=image,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout, run.stderr) == ("avx2 bit-exact with scalar\n", "")
