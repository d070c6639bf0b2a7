"""The first error of a build's log, whether it would come again, and what is said about it."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from bitlinear.runtime import diagnosis, keys
from bitlinear.runtime.diagnosis import explain_build, explain_self_test, first_error, is_repeatable
from bitlinear.runtime.rejection import CODES, Rejection

SOURCES = ("cpu/x.cpp", "cpu/w.cpp", "abi.h", "cpu/gemv.h", "cuda/x.cu", "cuda/launch.cuh")
TORCH = "/venv/lib/python3.11/site-packages/torch/include"


@pytest.fixture(autouse=True)
def _no_search_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in keys._SEARCH_PATHS:
        monkeypatch.delenv(name, raising=False)


def command(source: str = "cpu/x.cpp") -> str:
    """The line that ninja prints for a compiler."""
    compiler = "/cache/.staging/a1/bin/bitlinear-c++"
    if source.endswith(".cu"):
        compiler = f"/usr/local/cuda/bin/nvcc -ccbin {compiler}"
    return f"{compiler} -MMD -isystem {TORCH} -fPIC -std=c++17 -c {source} -o x.o"


def block(output: str, source: str = "cpu/x.cpp", step: str = "1/2") -> str:
    """What ninja prints for a command that fails."""
    return f"[{step}] {command(source)}\nFAILED: x.o \n{command(source)}\n{output}\n"


def log_of(output: str, source: str = "cpu/x.cpp") -> str:
    """The log of a build in which one command fails."""
    return (
        "Using /cache as PyTorch extensions root...\n"
        "Emitting ninja build file /cache/.staging/a1/build.ninja...\n"
        "Building extension module avx2...\n"
        "Allowing ninja to set a default number of workers... "
        "(overridable by setting the environment variable MAX_JOBS=N)\n"
        f"{block(output, source)}ninja: build stopped: subcommand failed.\n"
    )


# The output of a compiler, the line that says what failed, and whether it would fail again.
OUTPUTS = {
    "g++": (
        "cpu/x.cpp: In function 'int unused(int)':\n"
        "cpu/x.cpp:3:10: error: 'y' was not declared in this scope\n"
        "    3 |   return y;\n"
        "      |          ^\n"
        "cpu/x.cpp:2:7: warning: unused variable 'x' [-Wunused-variable]",
        "cpu/x.cpp:3:10: error: 'y' was not declared in this scope",
        True,
    ),
    "g++ in a header": (
        "In file included from cpu/x.cpp:1:\n"
        "cpu/../abi.h:1:15: error: expected primary-expression before 'return'\n"
        "    1 | int broken( { return 0; }\n"
        "      |               ^~~~~~\n"
        "cpu/../abi.h:1:15: error: expected '}' before 'return'",
        "cpu/../abi.h:1:15: error: expected primary-expression before 'return'",
        True,
    ),
    "clang++": (
        "cpu/x.cpp:3:10: error: use of undeclared identifier 'y'\n"
        "  return y;\n"
        "         ^\n"
        "1 error generated.",
        "cpu/x.cpp:3:10: error: use of undeclared identifier 'y'",
        True,
    ),
    "clang++ in a header": (
        "In file included from cpu/x.cpp:1:\n"
        "cpu/../abi.h:1:15: error: expected expression\n"
        "int broken( { return 0; }\n"
        "              ^\n"
        "2 errors generated.",
        "cpu/../abi.h:1:15: error: expected expression",
        True,
    ),
    "ptxas": (
        "ptxas /tmp/tmpxft_00007b6c-7_x.ptx, line 21; error   : Unknown modifier '.nonsense'\n"
        "ptxas /tmp/tmpxft_00007b6c-7_x.ptx, line 21; error   : Not a name of any known "
        "instruction: 'wgmma'\n"
        "ptxas fatal   : Ptx assembly aborted due to errors",
        "ptxas /tmp/tmpxft_00007b6c-7_x.ptx, line 21; error   : Unknown modifier '.nonsense'",
        True,
    ),
    "an architecture that nvcc lacks": (
        "nvcc fatal   : Unsupported gpu architecture 'compute_50'",
        "nvcc fatal   : Unsupported gpu architecture 'compute_50'",
        True,
    ),
    "an option that g++ lacks": (
        "g++: error: unrecognized command-line option '-mamx-int8'; did you mean '-mabi'?",
        "g++: error: unrecognized command-line option '-mamx-int8'; did you mean '-mabi'?",
        True,
    ),
    "an option that an older g++ lacks": (
        "g++: error: unrecognized command line option '-mamx-int8'",
        "g++: error: unrecognized command line option '-mamx-int8'",
        True,
    ),
    "an option that clang++ lacks": (
        "clang: error: unknown argument: '-mamx-int8'",
        "clang: error: unknown argument: '-mamx-int8'",
        True,
    ),
    "a value that g++ lacks": (
        "cc1plus: error: bad value 'znver9' for '-march=' switch\n"
        "cc1plus: note: valid arguments to '-march=' switch are: nocona core2 nehalem",
        "cc1plus: error: bad value 'znver9' for '-march=' switch",
        True,
    ),
    "a value that clang++ lacks": (
        "error: invalid value 'c++99' in '-std=c++99'\n"
        "note: use 'c++17' or 'c++1z' for 'ISO C++ 2017 with amendments' standard",
        "error: invalid value 'c++99' in '-std=c++99'",
        True,
    ),
    "a feature that g++ for Arm lacks": (
        "cc1plus: error: invalid feature modifier 'i8mm' in '-march=armv8.2-a+dotprod+i8mm'\n"
        "cc1plus: note: valid arguments are: fp simd crypto crc lse fp16 dotprod",
        "cc1plus: error: invalid feature modifier 'i8mm' in '-march=armv8.2-a+dotprod+i8mm'",
        True,
    ),
    "an architecture that Apple's clang++ lacks": (
        "error: invalid arch name '-march=armv8.2-a+i8mm'",
        "error: invalid arch name '-march=armv8.2-a+i8mm'",
        True,
    ),
    "an option of another architecture, clang++": (
        "clang: error: unsupported option '-mavx512vnni' for target 'aarch64-linux-gnu'",
        "clang: error: unsupported option '-mavx512vnni' for target 'aarch64-linux-gnu'",
        True,
    ),
    "in a template, g++": (
        "cpu/x.cpp: In instantiation of 'error<T>::error() [with T = int]':\n"
        "cpu/x.cpp:2:23:   required from here\n"
        "cpu/x.cpp:1:55: error: 'missing' is not a member of 'int'",
        "cpu/x.cpp:1:55: error: 'missing' is not a member of 'int'",
        True,
    ),
    "a missing header, g++": (
        "cpu/x.cpp:1:10: fatal error: missing.h: No such file or directory\n"
        '    1 | #include "missing.h"\n'
        "      |          ^~~~~~~~~~~\n"
        "compilation terminated.",
        "cpu/x.cpp:1:10: fatal error: missing.h: No such file or directory",
        False,
    ),
    "a missing header, clang++": (
        "cpu/x.cpp:1:10: fatal error: 'missing.h' file not found\n"
        '#include "missing.h"\n'
        "         ^~~~~~~~~~~\n"
        "1 error generated.",
        "cpu/x.cpp:1:10: fatal error: 'missing.h' file not found",
        False,
    ),
    "a missing header, cudafe++": (
        'cuda/x.cu(1): catastrophic error: cannot open source file "missing.h"',
        'cuda/x.cu(1): catastrophic error: cannot open source file "missing.h"',
        False,
    ),
    "in torch's header, g++": (
        "In file included from cpu/x.cpp:1:\n"
        f"{TORCH}/c10/util/Half.h: In function 'int f()':\n"
        f"{TORCH}/c10/util/Half.h:1:18: error: 'nope' was not declared in this scope\n"
        "    1 | int f() { return nope; }",
        f"{TORCH}/c10/util/Half.h:1:18: error: 'nope' was not declared in this scope",
        False,
    ),
    "in torch's header, clang++": (
        "In file included from cpu/x.cpp:1:\n"
        f"{TORCH}/c10/util/Half.h:1:18: error: use of undeclared identifier 'nope'",
        f"{TORCH}/c10/util/Half.h:1:18: error: use of undeclared identifier 'nope'",
        False,
    ),
    "in torch's header, nvcc": (
        f'{TORCH}/c10/util/Half.h(1): error: identifier "nope" is undefined',
        f'{TORCH}/c10/util/Half.h(1): error: identifier "nope" is undefined',
        False,
    ),
    "in a header of another folder with the name of ours": (
        f"{TORCH}/cpu/x.cpp:1:18: error: 'nope' was not declared in this scope",
        f"{TORCH}/cpu/x.cpp:1:18: error: 'nope' was not declared in this scope",
        False,
    ),
    "an internal error": (
        "during RTL pass: expand\n"
        "cpu/x.cpp: In function 'void gemv()':\n"
        "cpu/x.cpp:40:5: internal compiler error: in convert_move, at expr.cc:220\n"
        "0x7f1 internal_error(char const*, ...)\n"
        "Please submit a full bug report, with preprocessed source.",
        "cpu/x.cpp:40:5: internal compiler error: in convert_move, at expr.cc:220",
        True,
    ),
    "a crash at a place": (
        "cpu/x.cpp:40:5: internal compiler error: Segmentation fault\n"
        "Please submit a full bug report, with preprocessed source.",
        "cpu/x.cpp:40:5: internal compiler error: Segmentation fault",
        False,
    ),
    "a crash of cc1plus": (
        "g++: internal compiler error: Segmentation fault signal terminated program cc1plus\n"
        "Please submit a full bug report, with preprocessed source.",
        "g++: internal compiler error: Segmentation fault signal terminated program cc1plus",
        False,
    ),
    "no memory": (
        "g++: fatal error: Killed signal terminated program cc1plus\ncompilation terminated.",
        "g++: fatal error: Killed signal terminated program cc1plus",
        False,
    ),
    "no memory, in words": (
        "virtual memory exhausted: Cannot allocate memory",
        "virtual memory exhausted: Cannot allocate memory",
        False,
    ),
    "no memory, and no word for an error": (
        "\ncc1plus: out of memory allocating 65536 bytes after a total of 1056768 bytes",
        "cc1plus: out of memory allocating 65536 bytes after a total of 1056768 bytes",
        False,
    ),
    "the linker, g++": (
        "/usr/bin/ld: x.o: in function `f':\n"
        "x.cpp:(.text+0x5): undefined reference to `missing()'\n"
        "collect2: error: ld returned 1 exit status",
        "x.cpp:(.text+0x5): undefined reference to `missing()'",
        False,
    ),
    "the linker, clang++": (
        "/usr/bin/ld: cannot find -lgomp: No such file or directory\n"
        "clang: error: linker command failed with exit code 1 (use -v to see invocation)",
        "/usr/bin/ld: cannot find -lgomp: No such file or directory",
        False,
    ),
    "lld": (
        "ld.lld: error: undefined symbol: missing()\n>>> referenced by x.cpp",
        "ld.lld: error: undefined symbol: missing()",
        False,
    ),
    "warnings before the error": (
        "cpu/x.cpp: In function 'int f()':\n"
        "cpu/x.cpp:1:15: warning: unused variable 'unused_value' [-Wunused-variable]\n"
        "    1 | int f() { int unused_value; return 0; }\n"
        "      |               ^~~~~~~~~~~~\n"
        "cpu/x.cpp: In function 'int g()':\n"
        "cpu/x.cpp:2:18: error: 'z' was not declared in this scope",
        "cpu/x.cpp:2:18: error: 'z' was not declared in this scope",
        True,
    ),
    "a warning that is an error": (
        "cpu/x.cpp:1:15: error: unused variable 'x' [-Werror=unused-variable]\n"
        "cc1plus: all warnings being treated as errors",
        "cpu/x.cpp:1:15: error: unused variable 'x' [-Werror=unused-variable]",
        True,
    ),
}


@pytest.mark.parametrize(("output", "line", "repeatable"), OUTPUTS.values(), ids=OUTPUTS)
def test_the_output_of_a_compiler(output: str, line: str, repeatable: bool) -> None:
    source = "cuda/x.cu" if "cuda/" in output or "nvcc" in output else "cpu/x.cpp"
    log = log_of(output, source)
    assert first_error(log) == line
    assert is_repeatable(log, SOURCES) == repeatable


@pytest.mark.parametrize(("output", "line", "repeatable"), OUTPUTS.values(), ids=OUTPUTS)
def test_the_output_of_a_newer_ninja(output: str, line: str, repeatable: bool) -> None:
    log = log_of(output).replace("FAILED: ", "FAILED: [code=1] ")
    assert first_error(log) == line
    assert is_repeatable(log, SOURCES) == repeatable


@pytest.mark.parametrize(("output", "line", "repeatable"), OUTPUTS.values(), ids=OUTPUTS)
def test_the_compiler_lies_in_a_folder_called_error(
    output: str, line: str, repeatable: bool
) -> None:
    log = log_of(output).replace("/cache/", "/home/u/fatal error/cannot/")
    assert first_error(log) == line
    assert is_repeatable(log, SOURCES) == repeatable


@pytest.mark.parametrize("name", ["cuda/x.cu", "cuda/../cuda/launch.cuh"])
def test_the_first_error_of_nvcc(name: str) -> None:
    error = f'{name}(12): error: identifier "y" is undefined'
    summary = '1 error detected in the compilation of "cuda/x.cu".'
    log = log_of(f"{error}\n    y = 1;\n    ^\n\n{summary}", "cuda/x.cu")
    assert first_error(log) == error
    assert is_repeatable(log, SOURCES)


@pytest.mark.parametrize(
    "line",
    [
        "cpu/x.cpp:1:20: warning: unused variable 'error' [-Wunused-variable]",
        "cpu/x.cpp:1:20: note: no error was expected",
        "cpu/x.cpp: In function 'void f() [with error = int]':",
        "In file included from cpu/error.h:3,",
    ],
)
def test_a_line_before_the_error_with_the_word(line: str) -> None:
    error = "cpu/x.cpp:4:2: error: 'y' was not declared in this scope"
    log = log_of(f"{line}\n{error}", "cpu/x.cpp")
    assert first_error(log) == error
    assert is_repeatable(log, SOURCES)


def test_the_error_of_cl() -> None:
    """It is repeatable, and its command is not the error, whatever folder it names."""
    command = r"cl /nologo /c C:\error\cpu\x.cpp"
    error = r"cpu\x.cpp(3): error C2065: 'y': undeclared identifier"
    log = f"\nFAILED: x.o\n{command}\n{error}\nninja: build stopped: subcommand failed.\n"
    assert first_error(log) == error
    assert is_repeatable(log, SOURCES)


@pytest.mark.parametrize(
    ("message", "repeatable"),
    [
        ("nvcc fatal   : Unknown option '-x'", True),
        ("error: unknown target CPU 'x'", True),
        ("/usr/bin/ld: unrecognized option '--x'", False),
        ("as: unrecognized option '--gdwarf-5'", False),
    ],
)
def test_options_of_the_compiler_and_of_others(message: str, repeatable: bool) -> None:
    log = log_of(message)
    assert first_error(log) == message
    assert is_repeatable(log, SOURCES) == repeatable


@pytest.mark.parametrize(
    "message",
    [
        "/usr/bin/ld: final link failed: Disk quota exceeded",
        "fatal error: error writing to /tmp/ccA.s: File too large",
        "g++: fatal error: cannot execute cc1plus: vfork: Resource temporarily unavailable",
        "ccache: error: Failed to create temporary file for /home/u/.cache/ccache/tmp/x.stdout: "
        "Read-only file system",
        "as: cannot open /tmp/ccB.o: Too many open files",
        "Cannot create temporary file in /scratch/job.123/: No such file or directory",
        "ccache: error: Failed to create directory /nonexistent/.cache/ccache/tmp: "
        "Permission denied",
        "error: unable to open output file: Transport endpoint is not connected",
        "license checkout failed: Connection timed out",
        "collect2: error: ld terminated with signal 9 [Killed]",
        "g++: fatal error: No space left on device",
    ],
)
def test_failures_of_the_machine_are_not_repeatable(message: str) -> None:
    log = log_of(message)
    assert first_error(log) == message
    assert not is_repeatable(log, SOURCES)
    rejection = explain_build(1, {"stage": "compile", "error": "x"}, log, SOURCES, 600)
    assert (rejection.code, rejection.reason) == ("compile-failed", message)
    assert rejection.momentary


@pytest.mark.parametrize(
    "line",
    [
        "g++: Error 28 while writing",
        "nvcc fatal   : Could not set up the environment",
        "x.cpp:(.text+0x5): undefined reference to `missing()'",
        "as: unrecognized option '--gdwarf-5'",
        "sh: 1: /opt/g++: not found",
        "license checkout failed: Connection timed out",
        "as: cannot open /tmp/ccB.o: Too many open files",
        "Assembler messages: can't open /tmp/ccB.s for reading",
        "collect2: ld terminated with signal 9 [Killed]",
    ],
)
def test_the_words_of_an_error(line: str) -> None:
    assert first_error(log_of(f"the first line\n{line}\ncompilation terminated.")) == line


MACHINE = "g++: fatal error: No space left on device"
OURS = "cpu/x.cpp:3:10: error: 'y' was not declared in this scope"


@pytest.mark.parametrize(
    ("outputs", "line", "repeatable"),
    [
        ([OURS, MACHINE], OURS, True),
        ([MACHINE, OURS], MACHINE, False),
        ([OURS, "cpu/w.cpp:1:1: error: expected unqualified-id"], OURS, True),
        (["", OURS], OURS, True),  # a command that ends without a word
    ],
)
def test_the_first_of_several_failed_commands_counts(
    outputs: list[str], line: str, repeatable: bool
) -> None:
    blocks = [block(output, "cpu/w.cpp", f"{n}/3") for n, output in enumerate(outputs, 1)]
    log = f"{''.join(blocks)}ninja: build stopped: subcommand failed.\n"
    assert first_error(log) == line
    assert is_repeatable(log, SOURCES) == repeatable


def test_warnings_of_a_command_that_worked_do_not_count() -> None:
    warning = "cpu/w.cpp:1:5: warning: 'error' may be used before it failed [-Wuninitialized]"
    log = f"[1/3] {command('cpu/w.cpp')}\n{warning}\n{block(OURS, step='2/3')}"
    assert first_error(log) == OURS
    assert is_repeatable(log, SOURCES)


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("", ""),
        ("\n \n", ""),
        ("ninja: build stopped: subcommand failed.\n", ""),
        ("ninja: error: loading 'build.ninja': No such file or directory\n", ""),
        (f"[1/2] {command()}\nFAILED: [code=1] x.o \n{command()}\n", ""),
        ("Building extension module avx2...\n", "Building extension module avx2..."),
        ("Building extension module avx2...\nBus fault\n", "Bus fault"),
        ("[1/2] link /out:error.pyd error.obj\nwithout a word\n", "without a word"),
        (f"{OURS}\n", OURS),  # no ninja
        (f"{OURS}\r\n", OURS),
    ],
)
def test_a_log_without_a_failed_command(log: str, line: str) -> None:
    assert first_error(log) == line
    assert is_repeatable(log, SOURCES) == (line == OURS)


@pytest.mark.parametrize("source", [[], ["cpu/w.cpp"], ["x.cpp"]])
def test_an_error_in_a_file_that_is_not_ours_is_not_repeatable(source: list[str]) -> None:
    assert not is_repeatable(log_of(OURS), source)


@pytest.mark.parametrize("name", keys._SEARCH_PATHS)
def test_with_search_paths_nothing_is_repeatable(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "")
    assert is_repeatable(log_of(OURS), SOURCES)
    monkeypatch.setenv(name, "/opt/include")
    for output, _, _ in OUTPUTS.values():
        assert not is_repeatable(log_of(output), SOURCES)


# --- Rejections ----------------------------------------------------------------------------------

MISSING = "ImportError: No module named 'setuptools'"
UNDEFINED = "OSError: avx2.so: undefined symbol: missing"


@pytest.mark.parametrize(
    ("code", "report", "log", "reason", "momentary"),
    [
        (None, {}, "", "the compiler did not finish within 600 s", True),
        (
            None,
            {"stage": "compile"},
            log_of(OURS),
            "the compiler did not finish within 600 s",
            True,
        ),
        (-9, {"stage": "compile"}, "", "the build was killed by SIGKILL (out of memory?)", True),
        (-11, {"stage": "compile"}, log_of(OURS), "the build was killed by SIGSEGV", True),
        (-4, {"stage": "load"}, "", "the build was killed by SIGILL", True),
        (-15, {}, "", "the build was killed by SIGTERM", True),
        (-200, {}, "", "the build was killed by signal 200", True),
        (1, {"stage": "compile", "error": "RuntimeError: x"}, log_of(OURS), OURS, False),
        (1, {"stage": "compile", "error": "RuntimeError: x"}, log_of(MACHINE), MACHINE, True),
        (1, {"stage": "compile", "error": "OSError: no ninja"}, "", "OSError: no ninja", True),
        (1, {"stage": "load", "error": UNDEFINED}, "", f"cannot be loaded: {UNDEFINED}", True),
        (1, {"stage": "load"}, "x: cannot load", "cannot be loaded: x: cannot load", True),
        (
            1,
            {"stage": "set-up", "error": MISSING},
            "",
            f"the build could not start: {MISSING}",
            True,
        ),
        (1, {}, "Error: no codec", "the build could not start: Error: no codec", True),
    ],
)
def test_a_build_is_explained(
    code: int | None, report: dict[str, Any], log: str, reason: str, momentary: bool
) -> None:
    rejection = explain_build(code, report, log, SOURCES, 600.0)
    fix = "pip install setuptools" if "not start" in reason else diagnosis.REBUILD_FIX
    assert rejection == Rejection("compile-failed", reason, fix, momentary=momentary)


@pytest.mark.parametrize(
    ("code", "report", "expected", "reason", "momentary"),
    [
        (
            None,
            {},
            "compile-failed",
            "the self-test could not be run: it did not finish in time",
            True,
        ),
        (
            None,
            {"error": "no child process: [Errno 11]"},
            "compile-failed",
            "the self-test could not be run: no child process: [Errno 11]",
            True,
        ),
        (
            -9,
            {"stage": "self-test"},
            "compile-failed",
            "the self-test could not be run: it was killed by SIGKILL (out of memory?)",
            True,
        ),
        (
            -15,
            {"stage": "self-test"},
            "compile-failed",
            "the self-test could not be run: it was killed by SIGTERM",
            True,
        ),
        (
            -11,
            {"stage": "self-test"},
            "self-test-failed",
            "self-test failed: crashed with SIGSEGV",
            True,
        ),
        (-6, {}, "self-test-failed", "self-test failed: crashed with SIGABRT", True),
        (-200, {}, "self-test-failed", "self-test failed: crashed with signal 200", True),
        (
            -4,
            {"stage": "self-test"},
            "illegal-instruction",
            "illegal instruction: the CPU, or a hypervisor, lacks a feature that it reports",
            False,
        ),
        (
            1,
            {"stage": "self-test", "error": "row 3 differs"},
            "self-test-failed",
            "self-test failed: row 3 differs",
            False,
        ),
        (
            1,
            {"stage": "load", "error": UNDEFINED},
            "compile-failed",
            f"cannot be loaded: {UNDEFINED}",
            True,
        ),
        (
            1,
            {"stage": "device", "error": "GPU 0: out of memory"},
            "compile-failed",
            "the self-test could not be run: GPU 0: out of memory",
            True,
        ),
        (
            1,
            {"stage": "set-up", "error": MISSING},
            "compile-failed",
            f"the self-test could not be run: {MISSING}",
            True,
        ),
    ],
)
def test_a_self_test_is_explained(
    code: int | None, report: dict[str, Any], expected: str, reason: str, momentary: bool
) -> None:
    rejection = explain_self_test(code, report)
    assert (rejection.code, rejection.reason, rejection.momentary) == (expected, reason, momentary)
    is_device = report.get("stage") == "device"
    fix = "see whether other programs occupy the GPU" if is_device else diagnosis.REBUILD_FIX
    assert rejection.fix == fix


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGXCPU"])
def test_a_signal_from_outside_says_nothing_about_the_library(name: str) -> None:
    rejection = explain_self_test(-getattr(signal, name), {"stage": "self-test"})
    assert rejection.code == "compile-failed"
    assert rejection.momentary
    assert f"killed by {name}" in rejection.reason


STAGES = ("set-up", "compile", "load", "self-test", "device", "done", "another")


@pytest.mark.parametrize("code", [None, -200, -15, -11, -9, -6, -4, -2, 0, 1, 0xC0000005])
@pytest.mark.parametrize("report", [{}, *({"stage": stage} for stage in STAGES)], ids=str)
def test_a_child_that_reports_no_error(code: int | None, report: dict[str, Any]) -> None:
    for rejection in (
        explain_build(code, report, "", SOURCES, 600),
        explain_self_test(code, report),
    ):
        assert rejection.code in CODES
        assert rejection.reason
        assert not rejection.reason.endswith((":", ": "))
        assert rejection.fix


@pytest.mark.parametrize(
    ("code", "kind", "momentary"),
    [
        (0xC000001D, "illegal-instruction", False),
        (0xC0000005, "self-test-failed", True),  # an access violation
    ],
)
def test_a_crash_on_windows(code: int, kind: str, momentary: bool) -> None:
    rejection = explain_self_test(code, {"stage": "self-test"})
    assert (rejection.code, rejection.momentary) == (kind, momentary)
    assert "illegal instruction" in rejection.reason or "0xc0000005" in rejection.reason


@pytest.mark.parametrize("code", [0, 1, 2, 127])
@pytest.mark.parametrize("stage", STAGES)
def test_the_error_is_named_in_every_stage(code: int, stage: str) -> None:
    report = {"stage": stage, "error": "OSError: it is broken"}
    for rejection in (
        explain_build(code, report, "", SOURCES, 600),
        explain_self_test(code, report),
    ):
        assert rejection.code in CODES
        assert "OSError: it is broken" in rejection.reason
        assert rejection.fix
