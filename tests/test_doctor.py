"""What the doctor says, how it exits, and what it does to the cache."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import bitlinear
from bitlinear import doctor, runtime
from bitlinear.kernels import VARIANTS
from bitlinear.kernels.tested import where_gpu_tested, where_tested
from bitlinear.runtime import artifacts, installation
from bitlinear.runtime.artifacts import Artifact
from bitlinear.runtime.cache_directory import CacheDirectory
from bitlinear.runtime.failures import Failure
from bitlinear.runtime.gpus import Driver, Gpu
from bitlinear.runtime.rejection import CODES, Probe, Rejection, rejected
from bitlinear.runtime.verdicts import Verdict, select
from tests.runtime.machines import with_release

ROOT = Path(bitlinear.__file__).parents[1]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bitlinear.doctor", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    """A copy of the cache that importing the package has filled."""
    loaded = runtime.current()
    if loaded.kernel is None or loaded.cache.path is None:
        pytest.skip(f"no compiled kernel: {loaded.problem}")
    target = tmp_path / "cache"
    target.mkdir(mode=0o700)
    for artifact in loaded.artifacts.values():
        if artifact.directory is not None:
            shutil.copytree(artifact.directory, target / artifact.name / artifact.key)
    return target


# --- The text ------------------------------------------------------------------------------------


def healthy() -> doctor.Report:
    """The report of a machine without problems, on any machine."""
    here = runtime.current().hardware
    cpu_build = replace(here.torch, cuda=None)
    hardware = replace(here, torch=cpu_build, driver=rejected("no-gpu", "no NVIDIA driver"))
    verdicts = [
        Verdict("avx2", "chosen", summary="the fastest that this CPU can run"),
        Verdict("scalar", "available", summary="lower priority"),
        reject("avx_vnni", "cpu-flag", "this CPU lacks avx_vnni"),
        reject("cuda", "cuda-mismatch", "torch is a CPU build", "install one"),
    ]
    libraries = {
        "avx2": cached("avx2", "3f9a2c01", "bit-exact with scalar"),
        "ops": cached("ops", "11111111", "ran on 2 of 2 threads"),
    }
    loaded = runtime.Runtime("avx2", tuple(verdicts), CacheDirectory(None), libraries, "", hardware)
    return doctor.Report(loaded, hardware, "", 2, ("/usr/lib/libgomp.so.1",))


def cached(name: str, key: str, self_test: str) -> Probe[Artifact]:
    return Probe(Artifact(name, key * 4, Path("/nowhere"), "cached", self_test))


def reject(variant: str, code: str, reason: str, fix: str = "") -> Verdict:
    return Verdict(variant, rejection=Rejection(code, reason, fix))


def test_it_says_where_the_kernels_in_use_have_been_tested() -> None:
    here = healthy()
    kernel = here.runtime.kernel
    assert kernel is not None
    (line,) = here.to_json()["tested"]
    assert line == f"{kernel}: {where_tested(kernel, 'linux')}"
    assert f"Tested    {line}" in str(here)

    elsewhere = replace(here.runtime, hardware=replace(here.runtime.hardware, system="darwin"))
    assert replace(here, runtime=elsewhere).to_json()["tested"] == [
        f"{kernel}: never on darwin: reports are welcome"
    ]


def test_every_kernel_says_where_it_has_been_tested() -> None:
    for variant in VARIANTS:
        assert "never" not in where_tested(variant.name, "linux")
    assert "H100" in where_gpu_tested((9, 0), "linux")
    assert "never on compute capability 8.0" in where_gpu_tested((8, 0), "linux")


def test_the_text() -> None:
    lines = str(healthy()).splitlines()
    assert re.match(r"bitlinear \S+   torch \S+   python 3\S+   \w+ \w+$", lines[0])
    assert lines[1].startswith("CPU       ")
    assert [re.sub(" {7,}", "     ", line) for line in lines[2:8]] == [
        "GPU     no NVIDIA driver",
        "Kernels",
        "  * avx2      chosen     cached 3f9a2c01  self-test: bit-exact with scalar",
        "  o scalar    available  lower priority",
        "  x avx_vnni  rejected   this CPU lacks avx_vnni",
        "  x cuda      rejected   torch is a CPU build     fix: install one",
    ]
    assert "Threads   OpenMP, 1 runtime, 2 threads" in lines
    assert "Operator  bit-identical to the reference implementation" in lines
    assert lines[-1] == "Verdict   avx2 runs"


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_notebook_shows_a_table_of_the_same() -> None:
    report = healthy()
    verdicts = (*report.runtime.verdicts, reject("new", "cpu-flag", "<b>&"))
    report = replace(report, runtime=replace(report.runtime, verdicts=verdicts))
    table = _Cells()
    table.feed(report._repr_html_())
    assert table.tags[0] == "table"
    assert set(table.tags) == {"table", "caption", "tr", "th", "td"}
    for _, rows in report.sections():
        for row in rows:
            for cell in filter(None, row):
                assert cell in table.text


def test_json_and_text_redact_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/änne")
    report = healthy()
    directory = CacheDirectory(
        None, "/home/änne/.cache/bitlinear cannot be created; /home/ännelise"
    )
    loaded = replace(report.runtime, cache=directory, problem="/home/änne")
    report = replace(report, runtime=loaded)
    data = json.dumps(report.to_json(), ensure_ascii=False)
    for text in (str(report), repr(report), report._repr_html_(), data):
        assert "/home/änne/" not in text
        assert "~/.cache/bitlinear cannot be created; /home/ännelise" in text


H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 85_520_809_984)
OLD = Gpu("Quadro M4000", (5, 2), 8 << 30)


def with_gpus(cuda: Verdict, *gpus: Gpu) -> doctor.Report:
    """The same with these GPUs, a CUDA build of torch and that verdict."""
    report = healthy()
    hardware = replace(
        report.hardware,
        torch=replace(report.hardware.torch, cuda="13.0"),
        driver=Probe(Driver("13.2", gpus)),
        nvcc=Probe(with_release("13.1")),
    )
    library = cached("cuda", "22222222", "bit-exact with ... on 1 GPU")
    libraries = {**report.runtime.libraries, **({"cuda": library} if cuda.ok else {})}
    loaded = replace(report.runtime, hardware=hardware, libraries=libraries).with_cuda(cuda)
    return replace(report, runtime=loaded, hardware=hardware)


CHOSEN = Verdict(
    "cuda", "chosen", summary="NVIDIA H100 80GB HBM3 (sm_90a)", advice="nvcc is of 13.1"
)


def test_gpus_are_shown() -> None:
    report = replace(with_gpus(CHOSEN, H100, OLD), devices=("cpu", "cuda:0"))
    lines = [re.sub(" {7,}", "     ", line) for line in str(report).splitlines()]
    assert lines[2:6] == [
        "GPU",
        "  NVIDIA H100 80GB HBM3, compute capability 9.0, 80 GiB",
        "  Quadro M4000, compute capability 5.2, 8 GiB",
        "  CUDA: driver 13.2, torch 13.0, nvcc 13.1",
    ]
    row = "  * cuda      chosen     cached 22222222  self-test: bit-exact with ... on 1 GPU"
    assert f"{row}  fix: nvcc is of 13.1" in lines
    assert "Operator  bit-identical to the reference implementation on cpu and cuda:0" in lines
    assert lines[-1] == "Verdict   avx2 and cuda run"
    data = report.to_json()
    assert data["gpu"]["driver"]["cuda"] == "13.2"
    assert data["gpu"]["driver"]["gpus"][1] == {
        "name": "Quadro M4000", "capability": [5, 2], "memory": 8 << 30
    }  # fmt: skip
    assert data["kernels"][-1]["artifact"]["self_test"] == "bit-exact with ... on 1 GPU"
    assert data["operator"]["devices"] == ["cpu", "cuda:0"]
    json.dumps(data)


def test_no_gpu_is_shown() -> None:
    none = with_gpus(reject("cuda", "no-gpu", "no GPU"))
    assert "  the NVIDIA driver shows this process no GPU" in str(none).splitlines()


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("no-gpu", doctor.FALLBACK),
        ("forced-off", doctor.OK),
        ("no-compiler", doctor.FALLBACK),
        ("cuda-mismatch", doctor.FALLBACK),
        ("compile-failed", doctor.FALLBACK),
        ("self-test-failed", doctor.BROKEN),
    ],
)
def test_exit_codes_beside_a_gpu(code: str, exit_code: int) -> None:
    report = with_gpus(reject("cuda", code, "the reason", "the fix"), H100)
    assert report.exit_code == exit_code
    assert report.to_json()["gpu"]["problem"] == ("the reason (the fix)" if exit_code else "")
    if exit_code == doctor.FALLBACK:
        assert str(report).endswith("avx2 runs, but see above")


def test_cuda_is_run_where_its_kernels_are_in_use() -> None:
    assert with_gpus(CHOSEN, OLD, H100).runtime.cuda_devices == (1,)
    off = reject("cuda", "forced-off", "BITLINEAR_CUDA=off")
    assert with_gpus(off, OLD, H100).runtime.cuda_devices == ()


def beside_rejected(code: str) -> doctor.Report:
    report = healthy()
    verdict = reject("avx512_vnni", code, "reason", "fix")
    verdicts = (verdict, *report.runtime.verdicts)
    return replace(report, runtime=replace(report.runtime, verdicts=verdicts))


def with_cache(**changes: bool) -> doctor.Report:
    report = healthy()
    directory = replace(report.runtime.cache, **changes)
    return replace(report, runtime=replace(report.runtime, cache=directory))


def test_exit_codes() -> None:
    report = healthy()
    assert report.exit_code == doctor.OK == 0
    assert beside_rejected("cpu-flag").exit_code == doctor.OK
    for code in ("compile-failed", "illegal-instruction", "no-compiler"):
        assert beside_rejected(code).exit_code == doctor.FALLBACK == 1
    assert with_cache(temporary=True).exit_code == doctor.FALLBACK
    slower = (*report.runtime.verdicts, reject("sse", "not-cached", "reason"))
    assert replace(report, runtime=replace(report.runtime, verdicts=slower)).exit_code == doctor.OK
    fallback = replace(report, runtime=replace(report.runtime, kernel=None, problem="no compiler"))
    assert fallback.exit_code == doctor.FALLBACK
    assert str(fallback).endswith("the slow reference implementation runs: no compiler")
    assert beside_rejected("self-test-failed").exit_code == doctor.BROKEN == 2
    assert with_cache(unsafe=True).exit_code == doctor.BROKEN
    assert replace(report, operator="1 of 111 results differ").exit_code == doctor.BROKEN


def test_the_operator_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._run_operator() == ""
    from bitlinear import ops

    correct = ops.reference_linear
    monkeypatch.setattr(ops, "reference_linear", lambda *arguments: correct(*arguments) + 1)
    assert doctor._run_operator() == "444 of 444 results differ from the reference on cpu"
    monkeypatch.setattr(ops, "reference_linear", None)
    assert doctor._run_operator().startswith("fails on cpu: TypeError")


def test_the_verdicts_are_those_of_select() -> None:
    loaded = runtime.current()
    if not loaded.kernel or loaded.cuda_problem or os.environ.get("BITLINEAR_KERNEL"):
        pytest.skip("something is in the way of the ordinary choice")
    assert list(loaded.verdicts) == bitlinear.available_kernels() == select(loaded.hardware)


# --- The command ---------------------------------------------------------------------------------


def test_a_machine_where_all_is_well(warm: Path) -> None:
    done = run("--json", BITLINEAR_CACHE_DIR=str(warm))
    data = json.loads(done.stdout)
    assert (done.returncode, data["exit_code"], done.stderr) == (0, 0, "")
    loaded = runtime.current()
    assert data["kernel"] == loaded.kernel
    assert data["versions"]["torch"] == loaded.hardware.torch.version
    assert [row["variant"] for row in data["kernels"]] == [v.variant for v in loaded.verdicts]
    for row in data["kernels"]:
        assert bool(row["code"]) == (row["status"] == "rejected")
        assert row["code"] in {"", *CODES}
        assert "\n" not in row["reason"] + row["fix"]
    chosen = next(row for row in data["kernels"] if row["status"] == "chosen")
    assert chosen["artifact"]["state"] == "cached"
    assert chosen["artifact"]["self_test"] == "bit-exact with scalar"
    assert data["operator"]["error"] == ""
    assert data["cache"]["path"] == str(warm)
    if sys.platform == "linux" and (os.cpu_count() or 1) > 1:
        assert data["threads"]["used"] > 1
        assert len(data["threads"]["openmp"]) == 1


@pytest.mark.slow
def test_verbose_json_has_what_the_verbose_text_has(warm: Path) -> None:
    done = run("--json", "--verbose", BITLINEAR_CACHE_DIR=str(warm), MAX_JOBS="7")
    data = json.loads(done.stdout)
    assert data["environment"]["MAX_JOBS"] == "7"
    assert set(data["builds"]) >= {"ops", data["kernel"]}
    assert any("-ffp-contract=off" in line for line in data["builds"]["ops"])
    assert not {"builds", "environment"} & healthy().to_json().keys()


@pytest.mark.slow
def test_a_reader_that_stops_early_is_no_error(warm: Path) -> None:
    command = f"{sys.executable} -m bitlinear.doctor; echo $? >&2"
    done = subprocess.run(
        ["bash", "-c", f"({command}) | head -c 1"],
        env={**os.environ, "BITLINEAR_CACHE_DIR": str(warm)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "0\n"


@pytest.mark.parametrize(
    "variable", ["BITLINEAR_KERNEL", pytest.param("BITLINEAR_BUILD", marks=pytest.mark.slow)]
)
def test_a_setting_that_means_nothing_is_one_line(warm: Path, variable: str) -> None:
    done = run(BITLINEAR_CACHE_DIR=str(warm), **{variable: "nonsense"})
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"bitlinear: {variable}='nonsense' ")


@pytest.mark.slow
def test_looking_does_not_compile(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    done = run("--no-build", BITLINEAR_CACHE_DIR=str(root))
    assert done.returncode == 1
    assert "compiling" not in done.stderr
    assert "Warning" not in done.stderr
    assert "not compiled yet" in done.stdout
    assert not list(root.glob("*/*/meta.json"))


@pytest.mark.slow
def test_cleaning_does_not_compile_first(warm: Path, tmp_path: Path) -> None:
    done = run("--clean", BITLINEAR_CACHE_DIR=str(tmp_path / "cold"))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"0 deleted: {tmp_path}/cold\n", "")
    count = len(list(warm.glob("*/*/meta.json")))
    done = run("--clean", "--json", BITLINEAR_CACHE_DIR=str(warm), HOME=str(tmp_path))
    assert (done.returncode, json.loads(done.stdout)["deleted"], done.stderr) == (0, count, "")
    assert not list(warm.glob("*/*/meta.json"))


@pytest.mark.slow
def test_cleaning_deletes_nothing_but_what_was_named(warm: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(warm, home / ".cache" / "bitlinear")
    (tmp_path / "file").touch()
    environment = {"HOME": str(home), "XDG_CACHE_HOME": ""}
    done = run("--clean", BITLINEAR_CACHE_DIR=str(tmp_path / "file"), **environment)
    assert done.returncode == 2
    assert f"BITLINEAR_CACHE_DIR is not used: {tmp_path}/file cannot be created" in done.stderr
    assert "nothing deleted" in done.stderr
    assert list(home.glob(".cache/bitlinear/*/*/meta.json"))


@pytest.mark.slow
def test_rebuilding_forgets_and_compiles(warm: Path) -> None:
    """A recorded failure of the operator is what a user wants to be rid of."""
    (recorded,) = (warm / "ops").glob("*/meta.json")
    meta = json.loads(recorded.read_text())
    failure = Failure.now(Rejection("compile-failed", "some header was missing"), None)
    meta["failure"] = failure.to_json()
    recorded.write_text(json.dumps(meta))
    done = run(BITLINEAR_CACHE_DIR=str(warm))
    assert done.returncode == 1
    assert "some header was missing" in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1
    done = run("--rebuild", "--verbose", BITLINEAR_CACHE_DIR=str(warm))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compiled in" in done.stderr
    assert "BITLINEAR_CACHE_DIR" in done.stdout  # the environment
    assert "-ffp-contract=off" in done.stdout  # the commands


@pytest.mark.slow
def test_an_option_that_does_not_exist_compiles_nothing(tmp_path: Path) -> None:
    """Neither an unknown one nor the beginning of one."""
    done = run("--no-b", BITLINEAR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 2
    assert "unrecognized arguments: --no-b" in done.stderr
    assert "compiling" not in done.stderr


@pytest.mark.slow
def test_kernels_that_are_required_and_missing_are_broken(tmp_path: Path) -> None:
    """The import raises then, and the doctor says so without doing it."""
    root = tmp_path / "cache"
    done = run("--json", BITLINEAR_CACHE_DIR=str(root), BITLINEAR_BUILD="cached")
    assert (done.returncode, done.stderr) == (2, "")
    done = run(BITLINEAR_CACHE_DIR=str(root), BITLINEAR_BUILD="cached")
    assert "Operator  none is compiled" in done.stdout
    assert "Verdict   import bitlinear fails: no kernel for this CPU can be used" in done.stdout


@pytest.mark.slow
def test_kernels_that_are_required_are_available_only_from_the_cache(warm: Path) -> None:
    done = run("--json", BITLINEAR_CACHE_DIR=str(warm), BITLINEAR_BUILD="cached")
    report = json.loads(done.stdout)
    if report["kernel"] == "scalar":
        pytest.skip("there is no slower kernel")
    assert done.returncode == 0
    held = {library.parent.name for library in artifacts.entries(warm)}
    others = [k for k in report["kernels"] if k["code"] != "cpu-flag" and k["variant"] != "cuda"]
    for kernel in others:
        assert (kernel["reason"] != "not in the cache") == (kernel["variant"] in held)
    assert any(kernel["code"] == "not-cached" for kernel in others)


@pytest.mark.slow
def test_nothing_is_deleted_that_cannot_be_compiled_again(warm: Path) -> None:
    done = run("--rebuild", BITLINEAR_CACHE_DIR=str(warm), PATH="/nonexistent", CXX="")
    assert done.returncode == 2
    assert "nothing deleted, as nothing can be compiled: no C++ compiler" in done.stderr
    assert artifacts.entries(warm)


@pytest.mark.slow
def test_prebuilding_nonsense_is_one_line(warm: Path) -> None:
    done = run("--prebuild", "avx3", "--prebuild", "scalar", BITLINEAR_CACHE_DIR=str(warm))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("bitlinear: 'avx3' is no kernel for ")


def test_cleaning_says_what_it_could_not_delete(
    warm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a read-only file system."""
    loaded = runtime.current()
    cache = replace(loaded.cache, path=None, readable=(warm,))
    monkeypatch.setattr(doctor, "current", lambda: replace(loaded, cache=cache))
    monkeypatch.setattr(artifacts, "remove", lambda path: None)
    count = len(artifacts.entries(warm))
    assert doctor.main(["--clean"]) == doctor.BROKEN
    out, err = capsys.readouterr()
    assert out == f"0 deleted: {warm}\n"
    assert f"{count} not deleted, for want of permission: " in err
    assert str(warm) in err


def test_a_degraded_import(tmp_path: Path) -> None:
    environment = {"BITLINEAR_CACHE_DIR": str(tmp_path / "c"), "PATH": "/nonexistent", "CXX": ""}
    done = run("--json", **environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    data = json.loads(done.stdout)
    assert data["kernel"] is None
    assert data["problem"].startswith("no C++ compiler: ")
    (scalar,) = [row for row in data["kernels"] if row["variant"] == "scalar"]
    assert scalar["code"] == "no-compiler"
    assert scalar["fix"].startswith("install a C++ compiler")
    assert data["toolchain"]["compiler"]["found"] is None


@pytest.mark.slow
def test_an_unsafe_cache_is_broken(warm: Path, tmp_path: Path) -> None:
    unsafe = tmp_path / "unsafe"
    unsafe.mkdir()
    unsafe.chmod(0o777)
    (unsafe / f"user-{os.geteuid()}").symlink_to(tmp_path)  # as somebody else may have laid it
    home = tmp_path / "home"
    shutil.copytree(warm, home / ".cache" / "bitlinear")
    (home / ".cache" / "bitlinear").chmod(0o700)
    done = run(BITLINEAR_CACHE_DIR=str(unsafe), HOME=str(home), XDG_CACHE_HOME="")
    assert done.returncode == 2, done.stderr
    assert f"{unsafe} can be written to by others (mode 0777)" in done.stdout
    assert "chmod 700" in done.stdout
    count = len(list(warm.glob("*/*/meta.json")))
    assert f"~/.cache/bitlinear  0700  {count} artifacts" in done.stdout
    assert str(home) not in done.stdout


def test_report_in_a_notebook() -> None:
    """Reached as an attribute, without another import."""
    script = """
import bitlinear, sys
assert "bitlinear.doctor" not in sys.modules
report = bitlinear.doctor.report()
print(report)
assert report._repr_html_().startswith("<table>")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "BITLINEAR_BUILD": "off"},
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Kernels" in done.stdout


# --- Another project of the same name ------------------------------------------------------------


def distribution(tmp_path: Path, summary: str, *files: str) -> None:
    """Install the metadata of a distribution into a directory."""
    info = tmp_path / "bitlinear-2.4.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: bitlinear\nVersion: 2.4.5\n{summary}\n"
    )
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


OURS = f"Summary: {installation.SUMMARY}, compiled on first import"


@pytest.mark.parametrize(
    ("summary", "files", "foreign"),
    [
        ("Summary: Another library", ("bitlinear/__init__.py",), "bitlinear 2.4.5"),
        ("", (), "bitlinear 2.4.5"),
        (OURS, ("__editable__.bitlinear.pth",), ""),
        ("Summary: A fork", ("bitlinear/report.py", "{here}"), ""),
    ],
)
def test_another_projects_distribution_is_named(
    summary: str,
    files: tuple[str, ...],
    foreign: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = os.path.relpath(str(bitlinear.__file__), tmp_path)
    distribution(tmp_path, summary, *(file.format(here=here) for file in files))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installation.foreign_distribution() == foreign


def test_no_distribution_is_no_other_project(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise installation.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installation.metadata, "distribution", missing)
    assert installation.foreign_distribution() == ""


def test_the_description_of_this_project_is_known() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'description = "{installation.SUMMARY}' in pyproject


def test_another_project_is_one_line_with_a_fix() -> None:
    report = replace(healthy(), foreign="bitlinear 2.4.5")
    (line,) = [line for line in str(report).splitlines() if line.startswith("Package")]
    assert "another project, bitlinear 2.4.5, is installed under this name; fix: pip" in line
    assert report.to_json()["foreign_distribution"] == "bitlinear 2.4.5"
    assert report.exit_code == doctor.OK
    assert "Package" not in str(healthy())
