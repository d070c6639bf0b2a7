"""The cache directory, keys, and what counts as a valid artifact. No compiler is needed here."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bitlinear.kernels import CudaLibrary, Library, Variant
from bitlinear.runtime import artifacts
from bitlinear.runtime.artifacts import Artifact, CacheDirectory
from bitlinear.runtime.hardware import Compiler, Driver, Gpu, Hardware, detect

HOUR = 3600.0
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    return detect()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    directory = tmp_path / "sources"
    directory.mkdir()
    (directory / "fast.cpp").write_text("int fast;")
    (directory / "shared.h").write_text("int shared;")
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    return directory


FAST = Variant("fast", ("fast.cpp",), ("-O3",), requires=frozenset({"avx2"}))


# --- The directory -------------------------------------------------------------------------------


def test_candidates_in_order(tmp_path: Path) -> None:
    environ = {
        "BITLINEAR_CACHE_DIR": str(tmp_path / "chosen"),
        "XDG_CACHE_HOME": str(tmp_path / "xdg"),
    }
    found = artifacts.open_cache(environ)
    assert (found.path, found.reason) == (tmp_path / "chosen", "")
    assert stat.S_IMODE((tmp_path / "chosen").stat().st_mode) == 0o700
    del environ["BITLINEAR_CACHE_DIR"]
    assert artifacts.open_cache(environ).path == tmp_path / "xdg" / "bitlinear"


def test_home_is_the_last_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert artifacts.open_cache({}).path == tmp_path / ".cache" / "bitlinear"
    relative = artifacts.open_cache({"XDG_CACHE_HOME": "relative/is/ignored"})
    assert relative.path == tmp_path / ".cache" / "bitlinear"


def test_a_file_in_the_way_leads_to_the_next_candidate(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = artifacts.open_cache(
        {"BITLINEAR_CACHE_DIR": str(tmp_path / "file"), "XDG_CACHE_HOME": str(tmp_path)}
    )
    assert found.path == tmp_path / "bitlinear"
    assert "file cannot be created" in found.reason
    assert not found.unsafe


def test_nowhere_to_write_gives_a_private_temporary_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/proc/nonexistent")
    none = artifacts.open_cache({})
    assert none.path is None
    assert none.reason.startswith("/proc/nonexistent/.cache/bitlinear cannot be created")
    found = artifacts.with_temporary(none)
    assert found.path is not None
    assert found.temporary
    assert found.path in found.readable
    assert stat.S_IMODE(found.path.stat().st_mode) == 0o700
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nonexistent")
    assert artifacts.with_temporary(none).path is None


def test_the_temporary_directory_ends_with_the_process_but_not_with_its_forks() -> None:
    script = """
import os, sys
sys.argv = ["-c"]
os.environ["BITLINEAR_BUILD"] = "off"
from bitlinear.runtime import artifacts
found = artifacts.with_temporary(artifacts.CacheDirectory(None, "no reason"))
if os.fork() == 0:
    sys.exit(0)  # runs the exit handlers, unlike os._exit
os.wait()
assert found.path.is_dir()
print(found.path)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not Path(run.stdout.strip()).exists()


@as_root
def test_a_home_that_belongs_to_somebody_else() -> None:
    """Root may write anywhere, so this process becomes somebody who may not."""
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o755)
        os.seteuid(NOBODY)
        try:
            found = artifacts.open_cache({"XDG_CACHE_HOME": home})
        finally:
            os.seteuid(0)
    assert f"{home}/bitlinear cannot be created (Permission denied)" in found.reason


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_others_may_write(tmp_path: Path, mode: int) -> None:
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    chosen.chmod(mode)
    found = artifacts.open_cache(
        {"BITLINEAR_CACHE_DIR": str(chosen), "XDG_CACHE_HOME": str(tmp_path)}
    )
    assert found.unsafe
    assert f"{chosen} can be written to by others (mode {mode:04o})" in found.reason
    assert found.path == tmp_path / "bitlinear"
    assert chosen not in found.readable


def test_belongs_to_somebody_else(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        chosen = tmp_path / "chosen"
        chosen.mkdir(mode=0o700)
        os.chown(chosen, NOBODY, NOBODY)
        owner = NOBODY
    else:
        chosen, owner = Path("/usr"), 0
    found = artifacts.open_cache(
        {"BITLINEAR_CACHE_DIR": str(chosen), "XDG_CACHE_HOME": str(tmp_path)}
    )
    assert found.unsafe
    assert f"belongs to user {owner}, not to user {os.geteuid()}" in found.reason
    assert found.path == tmp_path / "bitlinear"


def test_symbolic_links_count_as_what_they_lead_to(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "mine").mkdir(mode=0o700)
    for name in ("open", "mine"):
        (tmp_path / f"to_{name}").symlink_to(tmp_path / name)
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    found = artifacts.open_cache({**environ, "BITLINEAR_CACHE_DIR": str(tmp_path / "to_open")})
    assert found.unsafe
    assert found.path == tmp_path / "bitlinear"
    found = artifacts.open_cache({**environ, "BITLINEAR_CACHE_DIR": str(tmp_path / "to_mine")})
    assert not found.unsafe
    assert found.path == tmp_path / "mine"


# --- Keys ----------------------------------------------------------------------------------------


def test_every_ingredient_changes_the_key(
    sources: Path, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hardware.compiler is not None
    other_cpu = replace(hardware.cpu, flags=frozenset({"avx2"}))
    changed = {
        "a compiler flag": (replace(FAST, cflags=("-O2",)), hardware),
        "a linker flag": (replace(FAST, ldflags=("-lm",)), hardware),
        "the compiler's version": (
            FAST,
            replace(hardware, compiler=replace(hardware.compiler, version="g++ 99")),
        ),
        "the compiler's file": (
            FAST,
            replace(hardware, compiler=replace(hardware.compiler, realpath="/opt/g++")),
        ),
        "torch": (FAST, replace(hardware, torch=replace(hardware.torch, version="9.9"))),
        "torch's commit": (FAST, replace(hardware, torch=replace(hardware.torch, git_version="f"))),
        "CUDA": (FAST, replace(hardware, torch=replace(hardware.torch, cuda="99.0"))),
        "the C++ ABI": (
            FAST,
            replace(
                hardware, torch=replace(hardware.torch, cxx11_abi=not hardware.torch.cxx11_abi)
            ),
        ),
        "libc": (FAST, replace(hardware, libc="glibc 9.9")),
        "the CPU": (FAST, replace(hardware, cpu=other_cpu)),
    }
    keys = {
        what: artifacts.key(artifacts.ingredients(library, sources, machine))
        for what, (library, machine) in changed.items()
    }
    keys["nothing"] = artifacts.key(artifacts.ingredients(FAST, sources, hardware))
    monkeypatch.setenv("CXX", "g++ -m32")
    keys["the compiler's arguments"] = artifacts.key(artifacts.ingredients(FAST, sources, hardware))
    monkeypatch.delenv("CXX")
    (sources / "shared.h").write_text("int shared = 1;")
    keys["a header"] = artifacts.key(artifacts.ingredients(FAST, sources, hardware))
    (sources / "fast.cpp").write_text("int fast = 1;")
    keys["the source"] = artifacts.key(artifacts.ingredients(FAST, sources, hardware))
    assert len(set(keys.values())) == len(keys), keys


@pytest.fixture
def gpu_sources(sources: Path) -> Path:
    (sources / "cuda").mkdir()
    for name in ("ops.cpp", "fast.cu", "tile.cuh", "inner.h", "notes.txt"):
        (sources / "cuda" / name).write_text(f"// {name}")
    return sources


GPU = CudaLibrary("cuda", ("cuda/ops.cpp", "cuda/fast.cu"), (), (), ("-O3",), ("sm_90a",), (0,))


def with_gpus(hardware: Hardware) -> Hardware:
    gpus = (Gpu("H100", (9, 0), 1), Gpu("A100", (8, 0), 1), Gpu("H100", (9, 0), 2))
    nvcc = Compiler("/cuda/bin/nvcc", "/cuda/bin/nvcc", "release 13.0, V13.0.88", "nvcc")
    return replace(hardware, driver=Driver("13.0", gpus), nvcc=nvcc)


def test_headers_are_those_beside_the_sources_and_of_the_package(gpu_sources: Path) -> None:
    assert artifacts.source_files(FAST, gpu_sources) == ["fast.cpp", "shared.h"]
    assert artifacts.source_files(GPU, gpu_sources) == [
        "cuda/ops.cpp", "cuda/fast.cu", "cuda/inner.h", "cuda/tile.cuh", "shared.h",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["ops.cpp", "fast.cu", "tile.cuh", "inner.h"])
def test_cudas_sources_are_cudas_alone(gpu_sources: Path, hardware: Hardware, name: str) -> None:
    machine = with_gpus(hardware)
    before = [artifacts.ingredients(library, gpu_sources, machine) for library in (FAST, GPU)]
    (gpu_sources / "cuda" / name).write_text("// changed")
    after = [artifacts.ingredients(library, gpu_sources, machine) for library in (FAST, GPU)]
    assert before[0] == after[0]
    assert before[1]["sources"] != after[1]["sources"]
    (gpu_sources / "shared.h").write_text("// changed")
    assert artifacts.ingredients(GPU, gpu_sources, machine) != after[1]


def test_every_ingredient_of_cuda_changes_the_key(
    gpu_sources: Path, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = with_gpus(hardware)
    assert machine.nvcc is not None
    assert machine.driver is not None

    def key(library: CudaLibrary = GPU, machine: Hardware = machine) -> str:
        return artifacts.key(artifacts.ingredients(library, gpu_sources, machine))

    first = key()
    assert key(replace(GPU, devices=(0, 2))) == first  # of one model
    keys = [
        first,
        key(replace(GPU, devices=(0, 1))),
        key(replace(GPU, architectures=("sm_90a", "sm_80"))),
        key(replace(GPU, cuda_cflags=("-O2",))),
        key(machine=replace(machine, nvcc=replace(machine.nvcc, version="release 13.1"))),
        key(machine=replace(machine, nvcc=replace(machine.nvcc, realpath="/other/nvcc"))),
        key(machine=replace(machine, driver=replace(machine.driver, cuda="13.1"))),
    ]
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-allow-unsupported-compiler")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_without_nvcc_what_another_built_serves(
    root: Path, gpu_sources: Path, hardware: Hardware
) -> None:
    machine, library = with_gpus(hardware), replace(GPU, name="fast")
    publish(root, artifacts.ingredients(library, gpu_sources, machine))
    without = artifacts.ingredients(library, gpu_sources, replace(machine, nvcc=None))
    assert artifacts.find(opened(root), without, any_compiler=False) is None
    assert artifacts.find(opened(root), without, any_compiler=True) is not None


def test_the_operator_serves_every_cpu_but_one_python(sources: Path, hardware: Hardware) -> None:
    operator = Library("fast", ("fast.cpp",), ())
    parts = artifacts.ingredients(operator, sources, hardware)
    other = replace(hardware, cpu=replace(hardware.cpu, model="another"))
    assert parts == artifacts.ingredients(operator, sources, other)
    assert "python" in parts
    assert "python" not in artifacts.ingredients(FAST, sources, hardware)


# --- Artifacts -----------------------------------------------------------------------------------


def publish(root: Path, parts: dict[str, str], content: bytes = b"code") -> Artifact:
    staging = artifacts.new_staging(root)
    (staging / "fast.so").write_bytes(content)
    (staging / "fast.o").write_bytes(b"left over")
    built = Artifact("fast", artifacts.key(parts), None, "built", self_test="passed", seconds=1.5)
    return artifacts.publish(root, staging, built, parts)


def opened(root: Path) -> CacheDirectory:
    return CacheDirectory(root, readable=(root,))


@pytest.fixture
def parts(sources: Path, hardware: Hardware) -> dict[str, str]:
    return artifacts.ingredients(FAST, sources, hardware)


def test_what_is_published_is_found(root: Path, parts: dict[str, str]) -> None:
    assert artifacts.find(opened(root), parts, any_compiler=False) is None
    built = publish(root, parts)
    found = artifacts.find(opened(root), parts, any_compiler=False)
    assert found == replace(built, state="cached")
    assert found is not None
    assert found.path.read_bytes() == b"code"
    assert found.directory == root / "fast" / artifacts.key(parts)
    assert sorted(file.name for file in found.directory.iterdir()) == ["fast.so", "meta.json"]
    assert not any((root / artifacts.STAGING).iterdir())
    meta = json.loads((found.directory / "meta.json").read_text())
    assert meta["ingredients"] == parts
    assert meta["size"] == 4
    assert meta["sha256"] == hashlib.sha256(b"code").hexdigest()


def test_the_second_to_publish_uses_what_the_first_published(
    root: Path, parts: dict[str, str]
) -> None:
    first = publish(root, parts, b"first")
    second = publish(root, parts, b"second")
    assert second.path == first.path
    assert second.path.read_bytes() == b"first"
    assert not any((root / artifacts.STAGING).iterdir())


def test_where_the_rename_is_impossible_the_own_copy_serves(
    root: Path, parts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError("no renames here")

    monkeypatch.setattr(os, "replace", refuse)
    built = publish(root, parts)
    assert built.path.read_bytes() == b"code"
    assert artifacts.find(opened(root), parts, any_compiler=False) is None


def damage_truncate(directory: Path) -> None:
    (directory / "fast.so").write_bytes(b"co")


def damage_flip(directory: Path) -> None:
    (directory / "fast.so").write_bytes(b"node")


def damage_remove(directory: Path) -> None:
    (directory / "fast.so").unlink()


def damage_meta(directory: Path) -> None:
    (directory / "meta.json").write_text('{"ingredients": {"cpu"')


def damage_meta_type(directory: Path) -> None:
    (directory / "meta.json").write_text("[]")


def damage_cpu(directory: Path) -> None:
    """As if the cache of another machine had been copied over this one."""
    meta = json.loads((directory / "meta.json").read_text())
    meta["ingredients"]["cpu"] = "another"
    (directory / "meta.json").write_text(json.dumps(meta))


def damage_mode(directory: Path) -> None:
    directory.chmod(0o777)


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_flip,
        damage_remove,
        damage_meta,
        damage_meta_type,
        damage_cpu,
        damage_mode,
    ],
)
def test_a_damaged_artifact_is_not_found_and_gets_replaced(
    root: Path, parts: dict[str, str], damage: object
) -> None:
    directory = publish(root, parts).path.parent
    assert callable(damage)
    damage(directory)
    assert artifacts.find(opened(root), parts, any_compiler=False) is None
    assert artifacts.find(opened(root), parts, any_compiler=True) is None
    again = publish(root, parts, b"again")
    assert again.path.parent == directory
    found = artifacts.find(opened(root), parts, any_compiler=False)
    assert found is not None
    assert found.path.read_bytes() == b"again"
    assert not any((root / artifacts.STAGING).iterdir())


def test_without_a_compiler_anothers_artifact_serves_but_not_its_failure(
    root: Path, parts: dict[str, str]
) -> None:
    other = {**parts, "compiler": "another", "compiler_arguments": "-O3"}
    staging = artifacts.new_staging(root)
    failed = Artifact(
        "fast", artifacts.key(other), None, "failed", reason="no", code="compile-failed"
    )
    artifacts.publish(root, staging, failed, other)
    none = {**parts, "compiler": ""}
    assert artifacts.find(opened(root), none, any_compiler=True) is None
    publish(root, parts)
    assert artifacts.find(opened(root), none, any_compiler=False) is None
    found = artifacts.find(opened(root), none, any_compiler=True)
    assert found is not None
    assert found.key == artifacts.key(parts)


def test_a_failure_is_remembered_and_has_no_library(root: Path, parts: dict[str, str]) -> None:
    staging = artifacts.new_staging(root)
    failed = Artifact(
        "fast", artifacts.key(parts), None, "failed", "", "g++: error", "fix", "compile-failed"
    )
    published = artifacts.publish(root, staging, failed, parts)
    found = artifacts.find(opened(root), parts, any_compiler=False)
    assert found == published
    assert found is not None
    assert (found.state, found.reason, found.fix) == ("failed", "g++: error", "fix")
    with pytest.raises(ValueError, match="fast is not available"):
        _ = found.path


def test_a_cache_that_is_only_readable_serves(root: Path, parts: dict[str, str]) -> None:
    publish(root, parts)
    found = artifacts.find(CacheDirectory(None, readable=(root,)), parts, any_compiler=False)
    assert found is not None


# --- Pruning and cleaning ------------------------------------------------------------------------


def test_pruning_keeps_the_most_recently_used(
    root: Path, parts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    directories = []
    for age in range(12):
        directory = publish(root, {**parts, "libc": str(age)}).path.parent
        os.utime(directory, (now - age * 24 * HOUR - HOUR,) * 2)
        directories.append(directory)
    artifacts.find(opened(root), {**parts, "libc": "11"}, any_compiler=False)  # used now
    artifacts.prune(root, now)
    assert [d.exists() for d in directories] == [True] * 7 + [False] * 4 + [True]


def test_pruning_spares_what_was_used_today(root: Path, parts: dict[str, str]) -> None:
    directories = [publish(root, {**parts, "libc": str(n)}).path.parent for n in range(12)]
    artifacts.prune(root)
    assert all(directory.exists() for directory in directories)


def test_pruning_removes_what_killed_builds_left(root: Path) -> None:
    old, young = artifacts.new_staging(root), artifacts.new_staging(root)
    os.utime(old, (time.time() - 2 * HOUR,) * 2)
    artifacts.prune(root)
    assert not old.exists()
    assert young.exists()


def test_cleaning_deletes_nothing_but_artifacts(root: Path, parts: dict[str, str]) -> None:
    """Somebody may set BITLINEAR_CACHE_DIR to their home directory."""
    publish(root, parts)
    publish(root, {**parts, "libc": "other"})
    artifacts.new_staging(root)
    precious = root / "fast" / "thesis" / "meta.json"
    precious.parent.mkdir()
    precious.touch()
    assert artifacts.clean(root) == 2
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == [
        "fast",
        "fast/thesis",
        "fast/thesis/meta.json",
    ]
