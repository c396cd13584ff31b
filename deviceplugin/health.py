"""When a GPU is unhealthy, and healthy again. Pure: what happened and the time in, `Health` out.

All slots of a GPU share one `GpuHealth`, so an XID can never take one of them only. What makes it unhealthy:

    what happened                      until                                        reason meanwhile
    a critical XID                     probes answered for `recover_after_s`        Xid, then Recovering
    a probe failed                     probes answered for `recover_after_s`        ProbeFailed, then Recovering
      too late, or the GPU is gone                                                  ProbeTimeout, Lost
    its MPS daemon failed              the daemon runs, or is not wanted any more   MpsFailed

Invariant: from a critical XID on, it is not healthy before `recover_after_s` have passed since the first good probe
after it. Trouble after which a probe has answered is over: newer trouble takes its place, and the wait begins anew.

An MPS daemon that starts again has not recovered yet: one that dies at every start would make a healthy GPU for a
moment each time. Nobody is told a time here: the condition on the GPU object says since when.

Rejected: to count good probes (how long that takes would depend on how often somebody asks), and to take a GPU whose
probes are good for healthy at once (one with a broken memory row answers every probe).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from deviceplugin.ports import GpuLostError, GpuTimeoutError
from meshctl.sharing import Health, HealthRules, MpsPhase, MpsStatus


class Reason(StrEnum):
    """Of `Health.reason`."""

    HEALTHY = "Healthy"
    XID = "Xid"
    PROBE_FAILED = "ProbeFailed"
    PROBE_TIMEOUT = "ProbeTimeout"
    LOST = "Lost"
    MPS_FAILED = "MpsFailed"
    RECOVERING = "Recovering"


# https://docs.nvidia.com/deploy/xid-errors/: those that are met in practice.
XIDS = {
    13: "graphics engine exception, mostly of the application",
    31: "memory page fault, mostly of the application",
    43: "an application's work was stopped",
    45: "an application's work was cleaned up",
    48: "memory error that ECC could not correct",
    61: "internal microcontroller stopped",
    62: "internal microcontroller halted",
    63: "a memory row was retired or remapped",
    64: "a memory row could not be retired or remapped",
    68: "video decoder exception",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    92: "many memory errors that ECC corrected",
    94: "memory error, contained to an application",
    95: "memory error, not contained",
    109: "context switch timed out",
    119: "the GPU's system processor does not answer",
    120: "the GPU's system processor failed",
    140: "memory error that ECC could not correct",
}


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """What is known of one GPU's troubles; times are seconds of the caller's clock, which only runs forward."""

    xids: tuple[int, ...] = ()
    """Critical ones, ascending, of which it has not recovered."""
    failure: Reason | None = None
    """ProbeFailed, ProbeTimeout or Lost, of which it has not recovered."""
    words: str = ""
    """Of the failure."""
    answers_since_s: float | None = None
    """First good probe after the trouble; None: there was none yet, or no trouble."""
    mps_words: str | None = None
    """Why its MPS daemon failed; None when it did not."""

    def xid(self, code: int, now_s: float, rules: HealthRules) -> GpuHealth:
        """The driver reported `code` for this GPU, or did not say for which."""
        if rules.ignores(code):
            return self
        known = self._unanswered()
        return replace(known, xids=tuple(sorted({*known.xids, code})))

    def probed(self, error: Exception | None, now_s: float) -> GpuHealth:
        """A probe ended, with NVML's error if it has one."""
        if error is not None:
            return replace(self._unanswered(), failure=_failure(error), words=str(error))
        if not self._troubled or self.answers_since_s is not None:
            return self
        return replace(self, answers_since_s=now_s)

    def mps(self, status: MpsStatus, now_s: float) -> GpuHealth:
        """Its MPS daemon is in another phase."""
        match status.phase:
            case MpsPhase.FAILED:
                return replace(self, mps_words=status.message)
            case MpsPhase.RUNNING | MpsPhase.OFF:
                return replace(self, mps_words=None)
            case MpsPhase.STARTING:
                return self

    def health(self, now_s: float, rules: HealthRules) -> Health:
        """As of now: somebody probes every few seconds, and a probe that does not end in time is a failed one."""
        if self._troubled and self.answers_since_s is None:
            return Health(False, self.failure or Reason.XID, self._trouble())
        if self.mps_words is not None:
            return Health(False, Reason.MPS_FAILED, self.mps_words or "its MPS control daemon failed")
        if self.answers_since_s is not None and now_s - self.answers_since_s < rules.recover_after_s:
            wait = f"it answers again, and is given out after {rules.recover_after_s:g} s of that"
            return Health(False, Reason.RECOVERING, f"{self._trouble()}; {wait}")
        return Health()

    def settled(self, now_s: float, rules: HealthRules) -> GpuHealth:
        """What it has recovered from is over: later rules that ask for more patience are for later troubles."""
        return GpuHealth() if self.health(now_s, rules).healthy else self

    def shifted(self, by_s: float) -> GpuHealth:
        """As it is written down for the next run, and read by it: nobody watched the GPU in between, so its wait begins
        anew; of the MPS daemon the next run finds out by itself."""
        return replace(self, answers_since_s=None, mps_words=None)

    @property
    def _troubled(self) -> bool:
        return bool(self.xids) or self.failure is not None

    def _unanswered(self) -> GpuHealth:
        """Without the trouble that is over."""
        return self if self.answers_since_s is None else GpuHealth(mps_words=self.mps_words)

    def _trouble(self) -> str:
        xids = [f"XID {code} ({XIDS[code]})" if code in XIDS else f"XID {code}" for code in self.xids]
        return "; ".join(filter(None, (self.words, *xids)))


def _failure(error: Exception) -> Reason:
    match error:
        case GpuLostError():
            return Reason.LOST
        case GpuTimeoutError():
            return Reason.PROBE_TIMEOUT
        case _:
            return Reason.PROBE_FAILED
