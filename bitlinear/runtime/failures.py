"""Failures that the cache remembers: some for good, the others for an hour."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from .rejection import Rejection

RETRY_SECONDS = 3600.0


@dataclass(frozen=True)
class Failure:
    """A failed build or self-test in the cache.

    Attributes:
        rejection: What happened.
        attempts: How many tries in a row have failed.
        time: When the last one failed, in seconds since the epoch.
    """

    rejection: Rejection
    attempts: int
    time: float

    @classmethod
    def now(cls, rejection: Rejection, earlier: Failure | None) -> Failure:
        """Date a failure, and count the earlier one of the same build or test, if there was one."""
        return cls(rejection, earlier.attempts + 1 if earlier else 1, time.time())

    def is_due(self) -> bool:
        """Tell whether to try again: once at the next import, then at most once an hour.

        A failure that is not momentary is never tried again.
        """
        age = time.time() - self.time
        return self.rejection.momentary and (self.attempts < 2 or not 0 <= age < RETRY_SECONDS)

    def described(self) -> Rejection:
        """The rejection; its fix says when the next try is."""
        if not self.rejection.momentary:
            return self.rejection
        minutes = max(1, round((self.time + RETRY_SECONDS - time.time()) / 60))
        when = f"the next try is in {minutes} minutes, or now: python -m bitlinear.doctor --rebuild"
        return replace(self.rejection, fix="; ".join(filter(None, [self.rejection.fix, when])))

    def to_json(self) -> dict[str, Any]:
        """Return the failure in types that JSON has; without the path of the log."""
        values = asdict(self)
        del values["rejection"]["log"]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Failure:
        """Return the failure that :meth:`to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: It is damaged.
        """
        rejection = Rejection(**values["rejection"])
        return cls(rejection, int(values["attempts"]), float(values["time"]))
