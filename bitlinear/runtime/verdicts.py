"""Which kernel this machine runs, and why not the others.

Pure: no files, no environment, no torch. The doctor prints the very verdicts that the runtime acted
on. Whether something can be built is not judged here: what the builder learns comes back through
``rejected``, and an artifact in the cache needs no compiler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..kernels import VARIANTS, Variant
from .cuda_arch import Target, targets, toolkit, version

if TYPE_CHECKING:
    from .cpu import Cpu
    from .hardware import Hardware


@dataclass(frozen=True)
class Verdict:
    """The judgement on one kernel variant.

    Attributes:
        variant: Its name in ``VARIANTS``, or ``"cuda"``.
        ok: This machine can run it.
        reason: One line: why it was chosen, passed over or rejected.
        fix: One line on how to mend a rejection, empty where nothing can be done. A choice has one
            where it is not as it should be.
        code: What kind of rejection, for programs: ``cpu-flag``, ``no-compiler``,
            ``compile-failed``, ``self-test-failed``, ``illegal-instruction``, ``cuda-mismatch``,
            ``no-gpu``, ``forced-off``. Empty unless rejected.
        status: ``"chosen"``, ``"available"`` or ``"rejected"``.
    """

    variant: str
    ok: bool
    reason: str
    fix: str = ""
    code: str = ""
    status: str = "rejected"


def select(
    hardware: Hardware,
    variants: Sequence[Variant] = VARIANTS,
    *,
    forced: str | None = None,
    rejected: Mapping[str, Verdict] = MappingProxyType({}),
    arch_list: str = "",
) -> list[Verdict]:
    """Judge every variant; at most one is chosen, and CUDA's kernels beside it where they can run.

    Args:
        hardware: The machine.
        variants: The candidates.
        forced: ``BITLINEAR_KERNEL``: the only variant that may be chosen. None or empty: the one
            with the highest priority among those that can run.
        rejected: Verdicts on variants that turned out not to work here, by name: did not compile,
            failed the self-test. They are passed on. If the forced variant is among them then
            nothing is chosen.
        arch_list: ``TORCH_CUDA_ARCH_LIST``.

    Returns:
        One verdict per variant, highest priority first and of equals by name, then one on
        ``"cuda"``.

    Raises:
        ValueError: ``forced`` is not a variant, or not one for this CPU.
    """
    ranked = sorted(variants, key=lambda variant: (-variant.priority, variant.name))
    judged = [_judge(variant, hardware.cpu) for variant in ranked]
    if forced:
        _check_forced(forced, judged)
    verdicts = [rejected.get(v.variant, v) if v.ok else v for v in judged]
    usable = [v.variant for v in verdicts if v.ok]
    chosen = (forced if forced in usable else None) if forced else next(iter(usable), None)
    return [
        *(_with_status(verdict, chosen, forced) for verdict in verdicts),
        rejected.get("cuda", _judge_cuda(hardware, arch_list)),
    ]


def _judge(variant: Variant, cpu: Cpu) -> Verdict:
    reason = ""
    if variant.arch not in ("any", cpu.machine):
        reason = f"it is for {variant.arch}, this machine is {cpu.machine}"
    elif variant.requires and cpu.flags is None:
        reason = f"the flags of this CPU are unknown: {cpu.reason}"
    elif cpu.flags is not None and not variant.requires <= cpu.flags:
        reason = f"this CPU lacks {_some(sorted(variant.requires - cpu.flags))}"
    return Verdict(variant.name, ok=not reason, reason=reason, code="cpu-flag" if reason else "")


def _some(names: list[str]) -> str:
    shown, rest = names[:4], len(names) - 4
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def _judge_cuda(hardware: Hardware, arch_list: str) -> Verdict:
    torch, driver = hardware.torch.cuda, hardware.driver
    if torch is None:
        fix = "install a CUDA build of torch"
        return _no_cuda("cuda-mismatch", "torch is built without CUDA", fix)
    if driver is None:
        return _no_cuda("no-gpu", hardware.driver_reason)
    if not driver.gpus:
        return _no_cuda("no-gpu", "the NVIDIA driver shows this process no GPU")
    if version(driver.cuda)[0] < version(torch)[0]:
        reason = f"the NVIDIA driver runs CUDA {driver.cuda} at most, torch is built for {torch}"
        fix = f"update the driver, or install a torch for CUDA {version(driver.cuda)[0]}"
        return _no_cuda("cuda-mismatch", reason, fix)
    judged = targets(hardware, arch_list)
    reason = ", ".join(_counted(judged))
    if not any(target.architecture for target in judged):
        fix = next((target.fix for target in judged if target.fix), "")
        return _no_cuda("cuda-mismatch" if fix else "no-gpu", reason, fix)
    fix = ""
    if toolkit(hardware) != torch:
        fix = f"nvcc is of CUDA {toolkit(hardware)}: install {torch}, which torch is built for"
    return Verdict("cuda", ok=True, reason=reason, fix=fix, status="chosen")


def _no_cuda(code: str, reason: str, fix: str = "") -> Verdict:
    return Verdict("cuda", ok=False, reason=reason, fix=fix, code=code)


def _counted(judged: list[Target]) -> list[str]:
    """Each model of GPU once, with what is compiled for it."""
    models = Counter((t.gpu.name, t.architecture or t.reason) for t in judged)
    return [
        f"{f'{count} x ' if count > 1 else ''}{name} ({what})"
        for (name, what), count in models.items()
    ]


def _check_forced(forced: str, judged: list[Verdict]) -> None:
    valid = ", ".join(v.variant for v in judged if v.ok) or "none"
    verdict = next((v for v in judged if v.variant == forced), None)
    if verdict is None:
        names = ", ".join(v.variant for v in judged)
        problem = f"names no CPU kernel (there are {names})"
    elif not verdict.ok:
        problem = f"cannot be used: {verdict.reason}"
    else:
        return
    raise ValueError(
        f"BITLINEAR_KERNEL={forced!r} {problem}. Valid on this machine: {valid}. "
        "Set it to one of those, or unset it."
    )


def _with_status(verdict: Verdict, chosen: str | None, forced: str | None) -> Verdict:
    name = verdict.variant
    if not verdict.ok:
        return replace(verdict, status="rejected")
    if name == chosen:
        reason = "forced by BITLINEAR_KERNEL" if forced else "the fastest that this CPU can run"
        return replace(verdict, reason=reason, status="chosen")
    if forced:
        reason = f"BITLINEAR_KERNEL={forced} rules it out"
    else:
        reason = f"lower priority (BITLINEAR_KERNEL={name} to force)"
    return replace(verdict, reason=reason, status="available")
