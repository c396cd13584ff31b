"""What the xDS server's metrics say after what happened."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from meshctl.controller.metrics import Metrics
from xds.metrics import REJECTIONS, XdsMetrics
from xds.wire import TypeUrl


def exported(metrics: Metrics) -> dict[str, float]:
    """Each series of the xDS server, as "name label-value ...", with its value."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        " ".join((sample.name.removeprefix("meshctl_xds_"), *sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("meshctl_xds_") and not sample.name.endswith("_created")
    }


def test_every_type_is_there_from_the_start_as_zero() -> None:
    """rate() needs a first sample; only the queues, which nobody tells of yet, have no series."""
    metrics = Metrics()
    XdsMetrics(metrics.registry)
    said = exported(metrics)
    for name in ("requests_total", "pushes_total", "sent_bytes_total", "nacks_total", "ack_seconds_count"):
        assert {key: value for key, value in said.items() if key.startswith(f"{name} ")} == dict.fromkeys(
            (f"{name} {kind}" for kind in ("CDS", "EDS", "LDS", "RDS")), 0.0
        )
    assert said["streams sotw"] == said["streams delta"] == 0.0
    assert {said[f"rejected_streams_total {reason}"] for reason in REJECTIONS} == {0.0}
    assert not [key for key in said if key.startswith(("responses_due", "streams_waiting"))]


def test_what_happens_is_counted_where_it_belongs() -> None:
    """Each call moves its own series of its own type, and nothing else."""
    metrics = Metrics()
    xds = XdsMetrics(metrics.registry)
    before = exported(metrics)
    xds.stream_opened("delta")
    xds.stream_opened("sotw")
    xds.stream_closed("sotw")
    xds.requested(TypeUrl.CLUSTER)
    xds.pushed(TypeUrl.ENDPOINT, 1000)
    xds.pushed(TypeUrl.ENDPOINT, 24)
    xds.acknowledged(TypeUrl.ENDPOINT, 0.003)
    xds.refused(TypeUrl.ROUTE)
    xds.rejected("streams")
    after = exported(metrics)
    moved = {key: value for key, value in after.items() if value != before.get(key) and "bucket" not in key}
    assert moved == {
        "streams delta": 1.0,
        "requests_total CDS": 1.0,
        "pushes_total EDS": 2.0,
        "sent_bytes_total EDS": 1024.0,
        "ack_seconds_count EDS": 1.0,
        "ack_seconds_sum EDS": 0.003,
        "nacks_total RDS": 1.0,
        "rejected_streams_total streams": 1.0,
    }
    assert (after["ack_seconds_bucket 0.0025 EDS"], after["ack_seconds_bucket 0.005 EDS"]) == (0.0, 1.0)


def test_queues_are_read_at_each_scrape() -> None:
    """They are what they are at that moment."""
    metrics = Metrics()
    depth = {"due": 3, "waiting": 7}
    XdsMetrics(metrics.registry).observe(lambda: depth["due"], lambda: depth["waiting"])
    assert (exported(metrics)["responses_due"], exported(metrics)["streams_waiting"]) == (3.0, 7.0)
    depth["due"] = 0
    assert exported(metrics)["responses_due"] == 0.0
