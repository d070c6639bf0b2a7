"""Why not: the one type that carries a reason, from the probe that finds it to the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

CODES = frozenset(
    {
        "cpu-flag",  # this CPU cannot run it
        "no-compiler",  # a tool is missing that the build needs
        "compile-failed",  # the build failed, or its result cannot be loaded
        "self-test-failed",  # it computes wrong bits, or crashes
        "illegal-instruction",  # the CPU refuses an instruction that it claims to have
        "cuda-mismatch",  # torch, toolkit, driver and GPU do not fit together
        "no-gpu",  # there is no GPU that it can run on
        "not-cached",  # it is not compiled yet, and this process may not compile
        "forced-off",  # an environment variable or an option switches it off
    }
)


class SettingError(ValueError):
    """An environment variable has a value that cannot be followed."""


@dataclass(frozen=True)
class Rejection:
    """Why something is not used.

    Attributes:
        code: The kind of reason, for programs: one of :data:`CODES`.
        reason: One line that says what happened.
        fix: One line that says what to do; empty if nothing can be done.
        log: The compiler's output, if a build failed and its log was kept.
        momentary: Whether it may be the machine's moment: a full disk, a limit, a signal.
    """

    code: str
    reason: str
    fix: str = ""
    log: Path | None = None
    momentary: bool = False

    @property
    def line(self) -> str:
        """Reason and fix in one line."""
        return self.reason + (f" ({self.fix})" if self.fix else "")


@dataclass(frozen=True)
class Probe(Generic[T]):
    """A value, or the rejection that says why there is none; never both.

    Raises:
        ValueError: Both or neither were given.
    """

    value: T | None = None
    rejection: Rejection | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.rejection is None):
            raise ValueError(f"pass a value or a rejection, got {self.value!r}, {self.rejection!r}")

    @property
    def reason(self) -> str:
        """The rejection's reason; empty if there is a value."""
        return self.rejection.reason if self.rejection else ""


def rejected(code: str, reason: str, fix: str = "") -> Probe[T]:
    """Make a probe that found nothing."""
    return Probe(rejection=Rejection(code, reason, fix))
