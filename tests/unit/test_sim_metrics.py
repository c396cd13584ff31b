"""The metrics page of a simulated server, read by Prometheus' own parser."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from meshctl.sim.faults import Faults
from meshctl.sim.gpu import Gpu, Job
from meshctl.sim.metrics import Identity, exposition, statistics

WHO = Identity("v100-0", "V100", "GPU-1", 3, 'a "model" \\ of\nours', "1")


def worked() -> Gpu:
    """2 s of waiting and 5 s of service in two requests, one more failed and one pending."""
    gpu = Gpu(service_s=float)
    for batch, at_s in ((2, 0.0), (3, 0.0), (4, 5.0), (1, 5.0)):
        gpu.advance(at_s)
        gpu.submit(Job(batch, at_s, done=lambda _: None))
    gpu.counters.failed += 1
    return gpu


def test_every_series_has_tritons_name_type_and_labels() -> None:
    """Names without _total, the model's labels escaped, values in the units of the names."""
    page = exposition(WHO, worked(), 5.0)
    found = {
        sample.name.removesuffix("_total"): (family.type, sample.labels, sample.value)
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    model = {"model": WHO.model, "version": "1"}

    assert "_total" not in page  # the parser adds it to the names of counters
    assert found["nv_inference_request_success"] == ("counter", model, 2.0)
    assert found["nv_inference_count"] == ("counter", model, 5.0)
    assert found["nv_inference_exec_count"] == ("counter", model, 2.0)
    assert found["nv_inference_request_duration_us"] == ("counter", model, 7e6)
    assert found["nv_inference_queue_duration_us"] == ("counter", model, 2e6)
    assert found["nv_inference_pending_request_count"] == ("gauge", model, 1.0)
    assert found["nv_gpu_utilization"] == ("gauge", {"gpu_uuid": "GPU-1"}, 1.0)
    gpu = {"gpu": "3", "UUID": "GPU-1", "device": "nvidia3", "modelName": "V100", "Hostname": "v100-0"}
    assert found["DCGM_FI_DEV_GPU_UTIL"] == ("gauge", gpu, 100.0)
    assert found["DCGM_FI_PROF_GR_ENGINE_ACTIVE"] == ("gauge", gpu, 1.0)


def test_compute_durations_sum_to_the_service_time() -> None:
    """Input, infer and output together are what the requests were in service for, nearly all of it inference."""
    page = exposition(WHO, worked(), 5.0)
    parts = {
        sample.name.removesuffix("_total"): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name.startswith("nv_inference_compute_")
    }

    assert sum(parts.values()) == 5e6
    assert parts["nv_inference_compute_infer_duration_us"] == 4.95e6


def test_failures_are_counted_by_reason_from_the_start() -> None:
    """Each reason has its series, at 0 too, so that a rate exists before the first failure."""
    families = text_string_to_metric_families(exposition(WHO, worked(), 5.0))
    samples = next(f for f in families if f.name == "nv_inference_request_failure").samples

    assert {s.labels["reason"]: s.value for s in samples} == {"BACKEND": 1, "CANCELED": 0, "OTHER": 0, "REJECTED": 0}


def test_utilization_counts_other_tenants() -> None:
    """A GPU that only others use is as busy as they make it."""
    gpu = Gpu(service_s=float)
    gpu.set_faults(0.0, Faults(foreign_ratio=0.37))
    page = exposition(WHO, gpu, 1.0)

    assert 'nv_gpu_utilization{gpu_uuid="GPU-1"} 0.3700\n' in page
    assert "} 37\n" in page


def test_statistics_say_the_same_in_nanoseconds() -> None:
    """Triton's JSON statistics agree with the counters."""
    (stats,) = statistics(WHO, worked())["model_stats"]

    assert (stats["inference_count"], stats["execution_count"]) == (5, 2)
    assert stats["inference_stats"]["success"] == {"count": 2, "ns": 7_000_000_000}
    assert stats["inference_stats"]["queue"] == {"count": 2, "ns": 2_000_000_000}
    assert stats["inference_stats"]["fail"]["count"] == 1
