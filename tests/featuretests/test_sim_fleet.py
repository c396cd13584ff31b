"""The simulated fleet over real sockets: it speaks Triton, and fails on command."""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import pairwise

import aiohttp
import orjson
import pytest

from meshctl.errors import InputError
from meshctl.sim.faults import Faults
from tests.harness import fleet as harness
from tests.harness.fleet import MODEL, Client
from tests.harness.tools import until

PER_ITEM = {"gpu": "V100", "service": {"base": "0s", "perItem": "100us"}}
HEALTHY = Faults()


async def refused(client: Client) -> bool:
    """Whether the server has no process behind its port."""
    try:
        await client.get("/v2/health/live")
    except aiohttp.ClientConnectionError:
        return True
    return False


async def pending(client: Client) -> float:
    return (await client.metrics())["nv_inference_pending_request_count"]


async def test_it_answers_tritons_paths() -> None:
    """Health, server and model metadata, statistics; also with the version in the path."""
    async with harness.running(harness.config()) as (_, [client]):
        for path in ("/v2/health/live", "/v2/health/ready", f"/v2/models/{MODEL}/ready"):
            assert await client.get(path) == (200, b"")
        assert (await client.get(f"/v2/models/{MODEL}/versions/1/ready"))[0] == 200
        assert orjson.loads((await client.get("/v2"))[1])["extensions"] == ["statistics"]
        assert orjson.loads((await client.get(f"/v2/models/{MODEL}"))[1])["versions"] == ["1"]
        assert (await client.post(f"/v2/models/{MODEL}/versions/1/infer"))[0] == 200
        stats = orjson.loads((await client.get(f"/v2/models/{MODEL}/stats"))[1])
        assert stats["model_stats"][0]["execution_count"] == 1


async def test_what_it_does_not_know_is_an_error_in_tritons_form() -> None:
    """{"error": ...} with 4xx, and nothing is counted as inferred."""
    async with harness.running(harness.config()) as (_, [client]):
        for path in ("/v2/models/other/infer", f"/v2/models/{MODEL}/versions/2/infer", "/elsewhere", "/sim/x"):
            status, body = await client.post(path)
            assert (status, list(body)) == (404, ["error"])
        assert (await client.get(f"/v2/models/{MODEL}/infer"))[0] == 405
        assert (await client.metrics())["nv_inference_request_success"] == 0


@pytest.mark.parametrize(
    ("headers", "batch"),
    [
        pytest.param({}, 1, id="none"),
        pytest.param({"x-batch-size": "8"}, 8, id="x-batch-size"),
        pytest.param({"batch_size": "7"}, 7, id="batch_size"),
        pytest.param({"x-batch-size": "8", "batch_size": "7"}, 8, id="first-wins"),
        pytest.param({"NV-InferRequest": 'batch_size: 16 input { name: "x" }'}, 16, id="legacy"),
        pytest.param({"NV-InferRequest": "id: 16"}, 1, id="legacy-without-a-batch"),
        pytest.param({"x-batch-size": "-1"}, 1, id="negative"),
        pytest.param({"x-batch-size": "0"}, 1, id="zero"),
        pytest.param({"x-batch-size": "129"}, 1, id="beyond-the-largest"),
        pytest.param({"x-batch-size": "1e9"}, 1, id="exponent"),
        pytest.param({"x-batch-size": "1000000000"}, 1, id="huge"),
        pytest.param({"x-batch-size": "abc"}, 1, id="word"),
        pytest.param({"x-batch-size": ""}, 1, id="empty"),
        pytest.param({"x-batch-size": "9" * 10_000}, 1, id="10-kB"),
    ],
)
async def test_without_a_body_the_batch_is_the_headers(headers: dict[str, str], batch: int) -> None:
    """Nonsense counts as 1 and is served: headers come from anywhere."""
    async with harness.running(harness.config(PER_ITEM)) as (_, [client]):
        status, body = await client.infer(headers=headers)

        assert status == 200
        assert body["outputs"][0]["shape"] == [batch, 1]
        assert (await client.metrics())["nv_inference_count"] == batch


async def test_the_body_says_the_batch_whatever_the_headers_claim() -> None:
    """The first dimension of the first input."""
    body = orjson.dumps({"inputs": [{"name": "INPUT0", "shape": [5, 3], "datatype": "FP32", "data": []}]})
    async with harness.running(harness.config(PER_ITEM)) as (_, [client]):
        status, answer = await client.infer(body, {"x-batch-size": "64"})

        assert (status, answer["outputs"][0]["shape"]) == (200, [5, 1])
        assert (await client.metrics())["nv_inference_compute_infer_duration_us"] == pytest.approx(495, rel=0.01)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"inputs": []}',
        *(b'{"inputs": [{"shape": [%s]}]}' % batch for batch in (b"", b"0", b"129", b'"1"', b"true")),
    ],
)
async def test_a_body_without_a_batch_is_refused(body: bytes) -> None:
    """400 in Triton's form; the queue is not touched."""
    async with harness.running(harness.config()) as (_, [client]):
        status, answer = await client.infer(body)

        assert (status, list(answer)) == (400, ["error"])
        assert (await client.metrics())["nv_inference_request_success"] == 0


async def test_metrics_may_have_a_port_of_their_own() -> None:
    """Both ports serve the page, as one process."""
    async with harness.running(harness.config({**PER_ITEM, "metricsPort": 0})) as (_, [client]):
        await client.infer()

        assert client.server.metrics_port != client.server.port
        assert (await client.metrics())["nv_inference_request_success"] == 1
        assert b"nv_inference_request_success" in (await client.get("/metrics"))[1]


async def test_a_hung_server_accepts_and_looks_healthy_until_it_is_cleared() -> None:
    """Requests wait, none completes, health is good and the GPU idle; cleared, all are answered in order."""
    async with harness.running(harness.config()) as (fleet, [client]):
        await fleet.set_faults("v100-0", Faults(hang=True))
        ended: list[int] = []

        async def ask(number: int) -> None:
            assert (await client.infer())[0] == 200
            ended.append(number)

        tasks = []
        for number in range(3):
            tasks.append(asyncio.create_task(ask(number)))
            # the one in execution is not pending
            await until(partial(_equals, client, number), f"{number} pending")

        seen = await client.metrics()
        assert (await client.get("/v2/health/ready"))[0] == 200
        assert (seen["nv_inference_request_success"], seen["nv_gpu_utilization"], ended) == (0, 0, [])
        await fleet.set_faults("v100-0", HEALTHY)
        await asyncio.gather(*tasks)
        assert ended == [0, 1, 2]


async def _equals(client: Client, number: int) -> bool:
    return await pending(client) == number


async def test_errors_come_at_once_and_are_counted_as_failures() -> None:
    """500 without a stay in the queue, in the share asked for; the others are answered."""
    async with harness.running(harness.config()) as (fleet, [client]):
        await fleet.set_faults("v100-0", Faults(error_ratio=1.0))
        assert [(await client.infer())[0] for _ in range(5)] == [500] * 5
        await fleet.set_faults("v100-0", Faults(error_ratio=0.5))
        some = [(await client.infer())[0] for _ in range(100)]
        await fleet.set_faults("v100-0", HEALTHY)
        assert (await client.infer())[0] == 200

        seen = await client.metrics()
        assert 20 < some.count(500) < 80
        assert seen["nv_inference_request_failure"] == 5 + some.count(500)
        assert seen["nv_inference_request_success"] == 1 + some.count(200)


async def test_a_crash_resets_what_is_under_way_and_the_same_port_comes_back() -> None:
    """Connections end, new ones are refused, the other server is not touched; back, the counters start at 0."""
    async with harness.running(harness.config({**PER_ITEM, "count": 2, "metricsPort": 0})) as (fleet, [client, other]):
        await asyncio.gather(client.infer(), other.infer())
        await fleet.set_faults("v100-0", Faults(hang=True))
        waiting = [asyncio.create_task(client.infer(headers={"x-batch-size": "2"})) for _ in range(2)]
        await until(lambda: _equals(client, 1), "one in execution and one waiting")
        await fleet.set_faults("v100-0", Faults(crash=True))

        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(end) for end in ends] == [aiohttp.ServerDisconnectedError] * 2
        assert await refused(client)
        with pytest.raises(aiohttp.ClientConnectorError):
            await client.metrics()
        assert (await other.infer())[0] == 200
        before = fleet.info
        await fleet.set_faults("v100-0", HEALTHY)
        assert fleet.info == before
        assert (await client.metrics())["nv_inference_request_success"] == 0
        assert (await client.infer())[0] == 200
        assert (await other.metrics())["nv_inference_request_success"] == 2


async def test_a_flapping_server_goes_and_comes_until_it_is_cleared() -> None:
    """Down, up, down again; cleared, it stays."""
    async with harness.running(harness.config()) as (fleet, [client]):
        await fleet.set_faults("v100-0", Faults(flap_period_s=0.2))

        async def down() -> bool:
            return await refused(client)

        async def up() -> bool:
            return not await refused(client)

        for state in (down, up, down, up):
            await until(state, state.__name__)
        await fleet.set_faults("v100-0", HEALTHY)
        for _ in range(20):
            assert (await client.infer())[0] == 200


async def test_another_tenant_shows_in_the_utilization_before_anything_else() -> None:
    """Without any request of ours, the GPU is as busy as the other makes it, on every utilisation metric."""
    async with harness.running(harness.config({**PER_ITEM, "count": 2})) as (fleet, [client, other]):
        await fleet.set_faults("v100-0", Faults(foreign_ratio=0.3))
        seen, untouched = await client.metrics(), await other.metrics()

        assert seen["nv_gpu_utilization"] == seen["DCGM_FI_PROF_GR_ENGINE_ACTIVE"] == 0.3
        assert seen["DCGM_FI_DEV_GPU_UTIL"] == 30
        assert untouched["nv_gpu_utilization"] == 0
        await client.infer(headers={"x-batch-size": "70"})
        # 7 ms / (1 - 0.3)
        assert (await client.metrics())["nv_inference_compute_infer_duration_us"] == pytest.approx(9900, rel=0.01)


async def test_faults_are_set_over_http_on_the_server_and_on_the_control_port() -> None:
    """A crash too: its answer arrives; the control port brings the server back, and lists every server."""
    async with harness.running(harness.config({**PER_ITEM, "count": 2})) as (fleet, [client, _]):
        control = f"http://{fleet.info.control}/sim"
        assert (await client.post("/sim/faults", b'{"slow": 2}'))[1]["slow"] == 2.0
        assert orjson.loads((await client.get("/sim/faults"))[1])["slow"] == 2.0
        assert (await client.post("/sim/faults", b'{"crash": true}'))[1]["crash"] is True
        assert await refused(client)

        async with client.session.get(f"{control}/faults") as response:
            assert {name: faults["crash"] for name, faults in (await response.json()).items()} == {
                "v100-0": True,
                "v100-1": False,
            }
        async with client.session.post(f"{control}/faults/v100-0", data=b"{}") as response:
            assert response.status == 200
        assert (await client.infer())[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        pytest.param("faults/v100-9", b"{}", 400, "v100-9", id="no-such-server"),
        pytest.param("faults/v100-0", b'{"slo": 2}', 400, "slo", id="unknown-fault"),
        pytest.param("faults/v100-0", b'{"slow": 0}', 400, "slow", id="out-of-range"),
        pytest.param("faults/v100-0", b'{"foreign_ratio": 1}', 400, "foreign_ratio", id="whole-gpu"),
        pytest.param("faults/v100-0", b"{", 400, "JSON", id="not-json"),
        pytest.param("nothing", b"", 404, "/sim/faults", id="no-such-path"),
    ],
)
async def test_a_bad_fault_is_named_and_changes_nothing(path: str, body: bytes, status: int, said: str) -> None:
    """The answer says what is wrong; what was set before stays."""
    async with harness.running(harness.config()) as (fleet, [client]):
        await fleet.set_faults("v100-0", Faults(slow=3.0))
        async with client.session.post(f"http://{fleet.info.control}/sim/{path}", data=body) as response:
            answer = await response.json()

        assert response.status == status
        assert said in answer["error"]
        assert fleet.server("v100-0").faults == Faults(slow=3.0)


async def test_counters_can_start_anew_without_a_crash() -> None:
    """As after a restart between two scrapes: they go backwards, and count on from 0."""
    async with harness.running(harness.config()) as (fleet, [client]):
        seen = []
        for reset in (False, True, False):
            await client.infer()
            if reset:
                await fleet.reset_counters("v100-0")
            seen.append((await client.metrics())["nv_inference_request_success"])

        assert seen == [1, 0, 1]


async def test_a_port_in_use_is_the_callers_mistake_and_leaves_nothing_behind() -> None:
    """The error names the address, and the servers started before it are stopped."""
    async with harness.running(harness.config()) as (_, [client]):
        taken = {**PER_ITEM, "port": client.server.port}
        with pytest.raises(InputError, match=str(client.server.port)):
            async with harness.running(harness.config(PER_ITEM, taken)):
                pytest.fail("it started")
        assert (await client.infer())[0] == 200


async def test_requests_are_served_one_by_one_in_their_order() -> None:
    """Ten at once take ten service times, as the queue's counters tell exactly."""
    async with harness.running(harness.config({"gpu": "V100", "service": {"base": "20ms", "perItem": "0s"}})) as (
        _,
        [client],
    ):
        counts = []
        for _ in range(2):
            await asyncio.gather(*(client.infer() for _ in range(10)))
            counts.append(await client.metrics())

        assert [seen["nv_inference_request_success"] for seen in counts] == [10, 20]
        waits = [
            late - early for early, late in pairwise([0.0, *(s["nv_inference_queue_duration_us"] for s in counts)])
        ]
        # the k-th waits for k services, less the time by which it came later
        assert all(0 < wait <= 45 * 20_000 for wait in waits)
