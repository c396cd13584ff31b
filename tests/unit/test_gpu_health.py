"""When a GPU is unhealthy, and healthy again: each row of the table, and what must not change it."""

from __future__ import annotations

import pytest

from deviceplugin.health import GpuHealth
from deviceplugin.ports import GpuError, GpuLostError, GpuTimeoutError
from meshctl.sharing import DEFAULT_IGNORED_XIDS, Health, HealthRules, MpsPhase, MpsStatus

RULES = HealthRules(recover_after_s=60.0)
WELL = GpuHealth()


def reason(health: GpuHealth, now_s: float = 1000.0, rules: HealthRules = RULES) -> str:
    found = health.health(now_s, rules)
    assert found.healthy == (found.reason == "Healthy")
    return found.reason


def test_a_gpu_of_which_nothing_bad_is_known_is_healthy() -> None:
    """Good probes change nothing, so that nothing is written for them."""
    assert WELL.probed(None, 1.0) is WELL
    assert Health() == WELL.health(1.0, RULES)


def test_a_critical_xid_makes_it_unhealthy_and_says_what_it_is() -> None:
    """The message names code and meaning."""
    ill = WELL.xid(79, 10.0, RULES)
    assert ill.health(10.0, RULES) == Health(False, "Xid", "XID 79 (the GPU has fallen off the bus)")
    assert WELL.xid(999, 10.0, RULES).health(10.0, RULES).message == "XID 999"


@pytest.mark.parametrize("code", sorted(DEFAULT_IGNORED_XIDS))
def test_an_xid_of_an_application_changes_nothing(code: int) -> None:
    """13, 31, 43, 45, 68 and 109 are the application's fault."""
    assert WELL.xid(code, 10.0, RULES) is WELL


def test_14_an_xid_listed_as_critical_wins_over_ignored() -> None:
    """Listed as both, or critical against the default: critical."""
    both = HealthRules(ignored_xids=frozenset({31, 48}), critical_xids=frozenset({31, 48}))
    assert reason(WELL.xid(48, 10.0, both)) == "Xid"
    assert reason(WELL.xid(31, 10.0, both)) == "Xid"
    assert WELL.xid(48, 10.0, HealthRules(ignored_xids=frozenset({48}))) is WELL


def test_it_recovers_when_probes_answered_for_long_enough_after_the_xid() -> None:
    """The wait is counted from the first good probe, whatever other good ones follow."""
    ill = WELL.xid(48, 10.0, RULES).probed(None, 15.0)
    assert reason(ill, 15.0) == "Recovering"
    assert ill.probed(None, 20.0) == ill
    assert reason(ill, 74.9) == "Recovering"
    assert reason(ill, 75.0) == "Healthy"


def test_without_a_good_probe_it_never_recovers() -> None:
    """Time alone heals nothing."""
    assert reason(WELL.xid(48, 10.0, RULES), 1e9) == "Xid"


def test_a_further_xid_begins_the_wait_anew() -> None:
    """And what is told is the newer one."""
    again = WELL.xid(48, 10.0, RULES).probed(None, 15.0).xid(79, 70.0, RULES)
    assert "48" not in again.health(80.0, RULES).message
    assert reason(again.probed(None, 80.0), 139.9) == "Recovering"
    assert reason(again.probed(None, 80.0), 140.0) == "Healthy"


def test_an_ignored_xid_does_not_prolong_the_wait() -> None:
    """An application that fails on a recovering GPU is no news."""
    ill = WELL.xid(48, 10.0, RULES).probed(None, 15.0)
    assert ill.xid(31, 70.0, RULES) is ill


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (GpuError("NVML says no"), "ProbeFailed"),
        (GpuTimeoutError("NVML says nothing"), "ProbeTimeout"),
        (GpuLostError("gone"), "Lost"),
    ],
)
def test_a_failed_probe_makes_it_unhealthy_in_its_words(error: GpuError, expected: str) -> None:
    """Each kind has its reason, and recovers alike."""
    ill = WELL.probed(error, 10.0)
    assert ill.health(10.0, RULES) == Health(False, expected, str(error))
    assert reason(ill.probed(None, 20.0), 79.0) == "Recovering"
    assert reason(ill.probed(None, 20.0), 80.0) == "Healthy"


def test_an_xid_and_the_loss_that_follows_are_both_told() -> None:
    """XID 79, then the probe finds the GPU gone: the cause stays readable, also while it recovers."""
    ill = WELL.xid(79, 10.0, RULES).probed(GpuLostError("GPU-1: lost"), 12.0)
    assert ill.health(12.0, RULES) == Health(False, "Lost", "GPU-1: lost; XID 79 (the GPU has fallen off the bus)")
    assert "XID 79" in ill.probed(None, 20.0).health(20.0, RULES).message


def test_a_failed_mps_daemon_makes_it_unhealthy_until_one_runs() -> None:
    """One that starts may fail again, so that is no recovery; one that is not wanted any more is none either way."""
    ill = WELL.mps(MpsStatus(MpsPhase.FAILED, message="the daemon ended with 1"), 10.0)
    assert ill.health(1e9, RULES) == Health(False, "MpsFailed", "the daemon ended with 1")
    assert reason(ill.mps(MpsStatus(MpsPhase.STARTING), 11.0)) == "MpsFailed"
    assert ill.mps(MpsStatus(MpsPhase.RUNNING), 12.0) == WELL
    assert ill.mps(MpsStatus(MpsPhase.OFF), 12.0) == WELL
    assert reason(WELL.mps(MpsStatus(MpsPhase.STARTING), 1.0)) == "Healthy"


def test_an_xid_does_not_hide_the_failed_daemon_nor_the_reverse() -> None:
    """Each has to recover on its own."""
    ill = WELL.mps(MpsStatus(MpsPhase.FAILED), 10.0).xid(48, 11.0, RULES)
    assert reason(ill, 12.0) == "Xid"
    assert reason(ill.probed(None, 13.0), 14.0) == "MpsFailed"
    assert reason(ill.probed(None, 13.0).mps(MpsStatus(MpsPhase.RUNNING), 14.0), 15.0) == "Recovering"


def test_what_the_next_run_reads_is_ill_still_and_waits_anew() -> None:
    """Nobody watched the GPU between the runs; of its MPS daemon the next run learns by itself."""
    ill = WELL.xid(48, 10.0, RULES).probed(None, 15.0).mps(MpsStatus(MpsPhase.FAILED, message="it ended"), 16.0)
    saved = ill.shifted(5000.0)
    assert saved.health(1e9, RULES) == Health(False, "Xid", "XID 48 (memory error that ECC could not correct)")
    assert reason(saved.probed(None, 20.0), 79.0) == "Recovering"
    assert reason(saved.probed(None, 20.0), 80.0) == "Healthy"
    assert WELL.shifted(5000.0) == WELL
