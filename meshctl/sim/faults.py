"""What can be wrong with a simulated GPU server, as one value.

A `Faults` is the whole state, not a change: setting it replaces what was set before, and `Faults()` is health. So a
fault script is a list of values, and clearing needs no memory of what was set. Rejected: one call per fault with its
own undo, whose combinations nobody tests.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meshctl.errors import InputError


class Faults(BaseModel):
    """Everything that is wrong with one server now; the default is nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    slow: float = Field(1.0, gt=0.0, le=1e6)
    """Service takes this many times as long (thermal throttling, lower clocks)."""
    hang: bool = False
    """Accepts requests and answers none until cleared; health stays good, the GPU looks idle: the process is stuck on
    the host, so no kernel runs. What is in service goes on where it stopped."""
    error_ratio: float = Field(0.0, ge=0.0, le=1.0)
    """Share of the requests that are answered 500 at once, without touching the GPU."""
    crash: bool = False
    """The process is gone: connections are reset, new ones refused, the queue is lost. Coming back, its counters
    start at 0, as a restarted server's do."""
    foreign_ratio: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the GPU's time that another tenant takes: utilisation rises by it at once, our service takes
    1 / (1 - foreign_ratio) times as long."""
    flap_period_s: float = Field(0.0, ge=0.0, le=3600.0)
    """Crashed for the first half of every period, back for the second; 0: does not flap."""

    @property
    def slowdown(self) -> float:
        """How many times as long our service takes, all faults together."""
        return self.slow / (1.0 - self.foreign_ratio)

    @staticmethod
    def parse(text: bytes | str) -> Faults:
        """From JSON; absent fields are healthy. Raises InputError that names each bad field."""
        try:
            return Faults.model_validate_json(text or b"{}")
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors())
            raise InputError(f"faults: {problems} (known: {', '.join(Faults.model_fields)})") from error
