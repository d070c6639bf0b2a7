"""The choice: which kernel this machine runs, and why not the others.

Pure: no files, no environment, no torch. The doctor prints the very verdicts that the runtime acted
on. This module does not judge whether a kernel can be built. The builder's failures come back
through ``rejected``, and an artifact in the cache needs no compiler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..kernels import VARIANTS, Variant
from .cuda_arch import Target, targets, toolkit, version
from .rejection import Rejection, SettingError

if TYPE_CHECKING:
    from .cpu import Cpu
    from .hardware import Hardware

_SHOWN_FLAGS = 4  # of those that a CPU lacks


@dataclass(frozen=True)
class Verdict:
    """The judgement on one kernel variant.

    Attributes:
        variant: Its name in ``VARIANTS``, or ``"cuda"``.
        status: ``"chosen"``, ``"available"`` or ``"rejected"``.
        rejection: Why it is rejected; None unless it is.
        summary: Why it is chosen or passed over, in one line.
        advice: What would improve a choice, in one line; usually empty.

    Raises:
        ValueError: The status and the rejection contradict each other.
    """

    variant: str
    status: str = "rejected"
    rejection: Rejection | None = None
    summary: str = ""
    advice: str = ""

    def __post_init__(self) -> None:
        if (self.status == "rejected") != (self.rejection is not None):
            raise ValueError(f"{self.status} contradicts {self.rejection!r}")

    @property
    def ok(self) -> bool:
        """Whether this machine can run the kernel."""
        return self.rejection is None

    @property
    def reason(self) -> str:
        """Why it is chosen, passed over or rejected, in one line."""
        return self.rejection.reason if self.rejection else self.summary

    @property
    def fix(self) -> str:
        """What to do about it, in one line; empty if nothing can be done."""
        return self.rejection.fix if self.rejection else self.advice

    @property
    def code(self) -> str:
        """The kind of rejection, one of ``rejection.CODES``; empty unless rejected."""
        return self.rejection.code if self.rejection else ""


def select(
    hardware: Hardware,
    variants: Sequence[Variant] = VARIANTS,
    *,
    forced: str | None = None,
    rejected: Mapping[str, Rejection] = MappingProxyType({}),
    arch_list: str = "",
) -> list[Verdict]:
    """Judge every variant. At most one is chosen, and the CUDA kernels beside it if they can run.

    Args:
        hardware: The machine.
        variants: The candidates.
        forced: ``BITLINEAR_KERNEL``: the only variant that may be chosen. None or empty: the usable
            one with the highest priority.
        rejected: By name, the variants that failed to compile, to load or to pass the self-test on
            this machine. If the forced variant is among them, nothing is chosen.
        arch_list: ``TORCH_CUDA_ARCH_LIST``.

    Returns:
        One verdict per variant, by falling priority and then by name, then one on ``"cuda"``.

    Raises:
        SettingError: ``forced`` is not a variant, or this CPU cannot run it.
    """
    ranked = sorted(variants, key=lambda variant: (-variant.priority, variant.name))
    by_cpu = {variant.name: _reject_for_cpu(variant, hardware.cpu) for variant in ranked}
    if forced:
        _check_forced(forced, by_cpu)
    rejections = {name: by_cpu[name] or rejected.get(name) for name in by_cpu}
    usable = [name for name, rejection in rejections.items() if rejection is None]
    chosen = (forced if forced in usable else None) if forced else next(iter(usable), None)
    verdicts = [_verdict(name, why, chosen, forced) for name, why in rejections.items()]
    return [*verdicts, _judge_cuda(hardware, arch_list)]


def _reject_for_cpu(variant: Variant, cpu: Cpu) -> Rejection | None:
    flags = cpu.flags.value
    if variant.arch not in ("any", cpu.machine):
        reason = f"it is for {variant.arch}, this machine is {cpu.machine}"
    elif variant.requires and flags is None:
        reason = f"the flags of this CPU are unknown: {cpu.flags.reason}"
    elif flags is not None and not variant.requires <= flags:
        missing = sorted(variant.requires - flags)
        rest = len(missing) - _SHOWN_FLAGS
        more = f" and {rest} more" if rest > 0 else ""
        reason = f"this CPU lacks {', '.join(missing[:_SHOWN_FLAGS])}{more}"
    else:
        return None
    return Rejection("cpu-flag", reason)


def _check_forced(forced: str, by_cpu: Mapping[str, Rejection | None]) -> None:
    if forced not in by_cpu:
        problem = f"names no CPU kernel (there are {', '.join(by_cpu)})"
    elif rejection := by_cpu[forced]:
        problem = f"cannot be used: {rejection.reason}"
    else:
        return
    valid = ", ".join(name for name, rejection in by_cpu.items() if rejection is None) or "none"
    raise SettingError(
        f"BITLINEAR_KERNEL={forced!r} {problem}. Valid on this machine: {valid}. "
        "Set it to one of those, or unset it."
    )


def _verdict(
    name: str, rejection: Rejection | None, chosen: str | None, forced: str | None
) -> Verdict:
    if rejection is not None:
        return Verdict(name, rejection=rejection)
    if name == chosen:
        summary = "forced by BITLINEAR_KERNEL" if forced else "the fastest that this CPU can run"
        return Verdict(name, "chosen", summary=summary)
    summary = f"lower priority (BITLINEAR_KERNEL={name} to force)"
    if forced:
        summary = f"BITLINEAR_KERNEL={forced} rules it out"
    return Verdict(name, "available", summary=summary)


def _judge_cuda(hardware: Hardware, arch_list: str) -> Verdict:
    rejection = _reject_for_driver(hardware)
    if rejection is not None:
        return Verdict("cuda", rejection=rejection)
    judged = targets(hardware, arch_list)
    summary = ", ".join(_count_models(judged))
    if not any(target.architecture for target in judged):
        # Of several reasons, the first one that can be mended decides.
        rejections = [target.rejection for target in judged if target.rejection]
        first = next((rejection for rejection in rejections if rejection.fix), rejections[0])
        return Verdict("cuda", rejection=Rejection(first.code, summary, first.fix))
    advice, torch = "", hardware.torch.cuda
    if toolkit(hardware) != torch:
        advice = f"nvcc is of CUDA {toolkit(hardware)}: install {torch}, which torch is built for"
    return Verdict("cuda", "chosen", summary=summary, advice=advice)


def _reject_for_driver(hardware: Hardware) -> Rejection | None:
    torch, driver = hardware.torch.cuda, hardware.driver.value
    if torch is None:
        fix = "install a CUDA build of torch"
        return Rejection("cuda-mismatch", "torch is built without CUDA", fix)
    if driver is None:
        return hardware.driver.rejection
    if not driver.gpus:
        return Rejection("no-gpu", "the NVIDIA driver shows this process no GPU")
    if version(driver.cuda)[0] < version(torch)[0]:
        reason = f"the NVIDIA driver runs CUDA {driver.cuda} at most, torch is built for {torch}"
        fix = f"update the driver, or install a torch for CUDA {version(driver.cuda)[0]}"
        return Rejection("cuda-mismatch", reason, fix)
    return None


def _count_models(judged: list[Target]) -> list[str]:
    """Each model of GPU once, with its number and what is compiled for it."""
    models = Counter(
        (target.gpu.name, target.rejection.reason if target.rejection else target.architecture)
        for target in judged
    )
    return [
        f"{f'{count} x ' if count > 1 else ''}{name} ({compiled})"
        for (name, compiled), count in models.items()
    ]
