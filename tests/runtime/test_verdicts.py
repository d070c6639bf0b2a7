"""Selection: the expected kernel of every recorded CPU, forcing and rejections."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bitlinear.runtime.cuda_arch
import bitlinear.runtime.verdicts
from bitlinear.kernels import VARIANTS, Variant
from bitlinear.runtime.gpus import Driver, Gpu
from bitlinear.runtime.hardware import Hardware
from bitlinear.runtime.rejection import Rejection
from bitlinear.runtime.verdicts import Verdict, select
from tests.runtime.machines import CPUS, machine, read_cpu, with_flags

# The kernel that each recorded CPU must get, of the kernels that this table names. A new kernel may
# suit some of them better: the oracle below judges it, and this table can record it.
EXPECTED = {
    "haswell": "avx2",
    "skylake_x": "avx2",  # AVX-512, but not its VNNI
    "ice_lake": "avx512_vnni",
    "alder_lake": "avx_vnni",  # AVX-512 is fused off, VNNI exists in VEX encoding only
    "sapphire_rapids": "amx_int8",  # has avx512_vnni and avx_vnni as well
    "zen2": "avx2",
    "zen4": "avx512_vnni",  # has no avx_vnni
    "zen5": "avx512_vnni",
    "vm_hides_avx512": "avx2",
    "vm_hides_vnni": "avx2",
    "vm_hides_f16c": "scalar",  # AVX2 alone is not enough: fp16 input is converted with F16C
    "vm_hides_avx": "scalar",
    "empty_flags": "scalar",  # unknown is not "has none", and is not "has all" either
    "graviton2": "neon_dotprod",
    "graviton3": "neon_i8mm",
    "grace": "neon_i8mm",
    "raspberry_pi_3": "neon",
    "raspberry_pi_4": "neon",
    "raspberry_pi_5": "neon_dotprod",
    "rk3588": "neon_dotprod",
    "exynos_9810": "neon",  # its Cortex-A55 are of the revision without a dot product
    "big_little_mixed": "neon",  # a thread may move to the cores without
    "apple_m1": "neon_dotprod",
    "apple_m1_macos_11": "neon",  # which does not say whether there is a dot product
    "apple_m2": "neon_i8mm",
    "apple_no_dot_product": "neon",
    "intel_mac_haswell": "avx2",
}


# Highest priority first, and by name among equals, which are for different architectures.
RANKED = [v.name for v in sorted(VARIANTS, key=lambda v: (-v.priority, v.name))]


def chosen(verdicts: list[Verdict]) -> str | None:
    names = [v.variant for v in verdicts if v.status == "chosen"]
    assert len(names) <= 1
    return names[0] if names else None


def named(verdicts: list[Verdict], name: str) -> Verdict:
    return next(v for v in verdicts if v.variant == name)


# --- The table -----------------------------------------------------------------------------------


def test_every_recorded_cpu_has_an_expected_kernel() -> None:
    assert sorted(EXPECTED) == CPUS


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_expected_kernel(name: str) -> None:
    recorded = [variant for variant in VARIANTS if variant.name in EXPECTED.values()]
    assert chosen(select(machine(read_cpu(name)), recorded)) == EXPECTED[name]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_verdicts_are_complete_ordered_and_explained(name: str) -> None:
    verdicts = select(machine(read_cpu(name)))
    assert [v.variant for v in verdicts] == [*RANKED, "cuda"]
    for verdict in verdicts:
        assert verdict.status in ("chosen", "available", "rejected")
        assert verdict.ok == (verdict.status != "rejected")
        assert verdict.reason
        assert "\n" not in verdict.reason + verdict.fix
        assert bool(verdict.code) == (verdict.status == "rejected")
    # Variants that are merely available rank below the choice.
    statuses = [v.status for v in verdicts]
    assert "available" not in statuses[: statuses.index("chosen")]


def test_one_machine_never_has_two_kernels_of_equal_priority() -> None:
    for arch in {variant.arch for variant in VARIANTS}:
        priorities = [v.priority for v in VARIANTS if v.arch in ("any", arch)]
        assert len(set(priorities)) == len(priorities)


def test_reasons_name_what_is_missing() -> None:
    alder_lake = select(machine(read_cpu("alder_lake")))
    verdict = named(alder_lake, "avx512_vnni")
    assert verdict.reason == "this CPU lacks avx512_vnni, avx512bw, avx512dq, avx512f and 1 more"
    assert verdict.code == "cpu-flag"
    assert named(alder_lake, "avx2").reason == "lower priority (BITLINEAR_KERNEL=avx2 to force)"
    haswell = select(machine(read_cpu("haswell")))
    assert named(haswell, "avx_vnni").reason == "this CPU lacks avx_vnni"
    graviton = select(machine(read_cpu("graviton3")))
    assert named(graviton, "avx2").reason == "it is for x86_64, this machine is aarch64"
    assert named(graviton, "neon").reason == "lower priority (BITLINEAR_KERNEL=neon to force)"
    raspberry = select(machine(read_cpu("raspberry_pi_4")))
    assert named(raspberry, "neon_i8mm").reason == "this CPU lacks asimddp, asimdrdm, atomics, i8mm"
    empty = select(machine(read_cpu("empty_flags")))
    assert named(empty, "avx2").reason == (
        "the flags of this CPU are unknown: /proc/cpuinfo lists no flags"
    )


# --- Against a brute-force oracle ----------------------------------------------------------------

_ALL_FLAGS = sorted(frozenset().union(*(variant.requires for variant in VARIANTS)))


@given(
    st.none() | st.frozensets(st.sampled_from(_ALL_FLAGS)),
    st.sampled_from(["x86_64", "aarch64", "riscv64"]),
)
def test_choice_is_the_best_variant_whose_flags_are_all_there(
    flags: frozenset[str] | None, arch: str
) -> None:
    best = None
    for variant in VARIANTS:
        arch_fits = variant.arch in ("any", arch)
        flags_fit = all(flags is not None and flag in flags for flag in variant.requires)
        if arch_fits and flags_fit and (best is None or variant.priority > best.priority):
            best = variant
    assert best is not None, "scalar must always do"
    assert chosen(select(with_flags(flags, arch))) == best.name


def test_order_of_the_table_does_not_matter() -> None:
    hardware = machine(read_cpu("zen5"))
    assert select(hardware, VARIANTS[::-1]) == select(hardware, VARIANTS)


def test_nothing_is_chosen_where_nothing_runs() -> None:
    only = Variant("only", (), (), arch="x86_64", requires=frozenset({"avx2"}))
    verdicts = select(with_flags(frozenset({"sse2"})), [only])
    assert chosen(verdicts) is None
    assert named(verdicts, "only").reason == "this CPU lacks avx2"


# --- Forcing (BITLINEAR_KERNEL) ------------------------------------------------------------------


@pytest.mark.parametrize("forced", VARIANTS, ids=lambda variant: variant.name)
def test_forced_variant_is_chosen(forced: Variant) -> None:
    # A CPU of its architecture that has every flag that any kernel requires.
    arch = "x86_64" if forced.arch == "any" else forced.arch
    cpu = with_flags(frozenset(_ALL_FLAGS), arch).cpu
    verdicts = select(machine(cpu), forced=forced.name)
    assert chosen(verdicts) == forced.name
    for variant in VARIANTS:
        verdict = named(verdicts, variant.name)
        assert verdict.ok == (variant.arch in ("any", cpu.machine))
        if verdict.ok and variant != forced:
            assert verdict.status == "available"
            assert verdict.reason == f"BITLINEAR_KERNEL={forced.name} rules it out"


@pytest.mark.parametrize("unset", [None, ""])
def test_unset_forces_nothing(unset: str | None) -> None:
    hardware = machine(read_cpu("zen4"))
    assert select(hardware, forced=unset) == select(hardware)


def test_forcing_an_unknown_name_lists_the_valid_ones() -> None:
    haswell = machine(read_cpu("haswell"))
    usable = [v.variant for v in select(haswell) if v.ok]
    assert {"avx2", "scalar"} <= set(usable)
    with pytest.raises(ValueError, match="nonsense") as raised:
        select(haswell, forced="nonsense")
    assert str(raised.value) == (
        f"BITLINEAR_KERNEL='nonsense' names no CPU kernel (there are {', '.join(RANKED)}). "
        f"Valid on this machine: {', '.join(usable)}. Set it to one of those, or unset it."
    )


@pytest.mark.parametrize(
    ("cpu", "forced", "why"),
    [
        ("haswell", "avx_vnni", "this CPU lacks avx_vnni"),
        ("graviton2", "avx2", "it is for x86_64, this machine is aarch64"),
        ("haswell", "neon", "it is for aarch64, this machine is x86_64"),
        ("big_little_mixed", "neon_dotprod", "this CPU lacks asimddp"),
        ("empty_flags", "avx2", "the flags of this CPU are unknown"),
        ("zen4", "cuda", "names no CPU kernel"),
    ],
)
def test_forcing_an_unsupported_name_says_why(cpu: str, forced: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as raised:
        select(machine(read_cpu(cpu)), forced=forced)
    assert "Valid on this machine: " in str(raised.value)
    assert "scalar" in str(raised.value)


# --- Failures of a build -------------------------------------------------------------------------

FAILED = Rejection("compile-failed", "does not compile: unknown -mthat", "update")


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_of_rejected_variants_the_next_one_is_chosen(name: str) -> None:
    hardware = machine(read_cpu(name))
    usable = [v.variant for v in select(hardware) if v.ok]
    for count in range(len(usable)):
        verdicts = select(hardware, rejected=dict.fromkeys(usable[:count], FAILED))
        assert chosen(verdicts) == usable[count]
        for rejected in usable[:count]:
            assert named(verdicts, rejected) == Verdict(rejected, rejection=FAILED)


def test_nothing_is_chosen_when_everything_was_rejected() -> None:
    rejected = {variant.name: FAILED for variant in VARIANTS}
    assert chosen(select(machine(read_cpu("zen5")), rejected=rejected)) is None


def test_nothing_replaces_a_forced_variant_that_was_rejected() -> None:
    verdicts = select(machine(read_cpu("zen5")), forced="avx2", rejected={"avx2": FAILED})
    assert chosen(verdicts) is None
    assert named(verdicts, "avx2") == Verdict("avx2", rejection=FAILED)


def test_the_flags_that_the_cpu_lacks_are_named_first() -> None:
    verdicts = select(machine(read_cpu("haswell")), rejected={"avx_vnni": FAILED})
    assert named(verdicts, "avx_vnni").code == "cpu-flag"


def test_a_verdict_does_not_contradict_itself() -> None:
    with pytest.raises(ValueError, match="contradicts"):
        Verdict("avx2", "chosen", FAILED)
    with pytest.raises(ValueError, match="contradicts"):
        Verdict("avx2", "rejected")


# --- CUDA ----------------------------------------------------------------------------------------


H100, A100 = Gpu("H100", (9, 0), 1), Gpu("A100", (8, 0), 1)
MAXWELL, VOLTA = Gpu("M4000", (5, 2), 1), Gpu("V100", (7, 0), 1)


def on_cuda(*gpus: Gpu, cuda: str = "13.0", driver: str = "13.0", nvcc: str = "") -> Hardware:
    return machine(read_cpu("zen4"), cuda, Driver(driver, gpus), nvcc)


@pytest.mark.parametrize(
    ("hardware", "code", "reason", "fix"),
    [
        (
            machine(read_cpu("zen4"), None, Driver("13.0", (H100,))),
            "cuda-mismatch",
            "torch is built without CUDA",
            "install a CUDA build of torch",
        ),
        (machine(read_cpu("zen4"), "13.0"), "no-gpu", "no NVIDIA driver is loaded", ""),
        (on_cuda(), "no-gpu", "the NVIDIA driver shows this process no GPU", ""),
        (
            on_cuda(H100, driver="12.4"),
            "cuda-mismatch",
            "the NVIDIA driver runs CUDA 12.4 at most, torch is built for 13.0",
            "update the driver, or install a torch for CUDA 12",
        ),
        (
            on_cuda(MAXWELL),
            "no-gpu",
            "M4000 (requires compute capability 6.1 or newer)",
            "",
        ),
        (
            on_cuda(MAXWELL, VOLTA, VOLTA),
            "cuda-mismatch",
            "M4000 (requires compute capability 6.1 or newer), "
            "2 x V100 (CUDA 13.0 no longer compiles for compute capability 7.0)",
            "install an older CUDA toolkit, and a torch that is built for it",
        ),
    ],
)
def test_cuda_is_rejected(hardware: Hardware, code: str, reason: str, fix: str) -> None:
    verdicts = select(hardware)
    assert verdicts[-1] == Verdict("cuda", rejection=Rejection(code, reason, fix))
    assert chosen(verdicts) == "avx512_vnni"


@pytest.mark.parametrize(
    ("hardware", "reason", "fix"),
    [
        (on_cuda(H100), "H100 (sm_90a)", ""),
        (on_cuda(H100, nvcc="13.0"), "H100 (sm_90a)", ""),
        (on_cuda(H100, driver="13.9", cuda="13.1", nvcc="13.1"), "H100 (sm_90a)", ""),
        (on_cuda(H100, A100, H100), "2 x H100 (sm_90a), A100 (sm_80)", ""),
        (
            on_cuda(H100, MAXWELL),
            "H100 (sm_90a), M4000 (requires compute capability 6.1 or newer)",
            "",
        ),
        (
            on_cuda(H100, cuda="12.8", nvcc="12.4"),
            "H100 (sm_90a)",
            "nvcc is of CUDA 12.4: install 12.8, which torch is built for",
        ),
    ],
)
def test_cuda_is_chosen_beside_a_cpu_kernel(hardware: Hardware, reason: str, fix: str) -> None:
    *verdicts, cuda = select(hardware)
    assert cuda == Verdict("cuda", "chosen", summary=reason, advice=fix)
    assert (cuda.ok, cuda.reason, cuda.fix, cuda.code) == (True, reason, fix, "")
    assert chosen(verdicts) == "avx512_vnni"


def test_cuda_goes_by_the_list_of_architectures() -> None:
    assert select(on_cuda(H100), arch_list="8.0;9.0+PTX")[-1].reason == "H100 (sm_90a)"
    verdict = select(on_cuda(H100), arch_list="8.0")[-1]
    assert (verdict.status, verdict.code) == ("rejected", "cuda-mismatch")
    assert "TORCH_CUDA_ARCH_LIST='8.0' has nothing for" in verdict.reason
    assert verdict.fix == "add 9.0 to TORCH_CUDA_ARCH_LIST, or unset it"


# --- Purity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [bitlinear.runtime.verdicts, bitlinear.runtime.cuda_arch])
def test_nothing_is_imported_that_could_look_at_the_machine(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add("." * node.level + (node.module or ""))
    assert modules <= {
        "__future__", "collections", "collections.abc", "dataclasses", "re", "types", "typing",
        ".cuda_arch", "..kernels", ".rejection",
        ".cpu", ".gpus", ".hardware",  # for type checkers alone
    }  # fmt: skip
    calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and hasattr(n.func, "id")}
    assert not calls & {"open", "print", "input", "exec", "eval", "__import__"}


def test_equal_hardware_gives_equal_verdicts() -> None:
    hardware = machine(read_cpu("zen4"))
    assert select(hardware) == select(replace(hardware))
