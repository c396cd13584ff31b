"""Leadership on the real API server, with a Lease of two seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from meshctl.adapters.kubernetes.client import connect
from meshctl.adapters.kubernetes.lease import Lease, Terms
from meshctl.ports import ObjectKey
from tests.cluster.cluster import Cluster
from tests.cluster.proxy import ApiProxy
from tests.harness.tools import DEADLINE_S

pytestmark = pytest.mark.cluster

SHORT = Terms(duration_s=2, renew_s=1.2, retry_s=0.2, request_s=0.5)


async def until(leases: tuple[Lease, ...], condition: Callable[[], bool]) -> None:
    """Waits for a change of any, and never sees two lead."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            changes = [asyncio.create_task(lease.wait_changed()) for lease in leases]
            _, pending = await asyncio.wait(changes, return_when=asyncio.FIRST_COMPLETED)
            for change in pending:
                change.cancel()
            assert sum(lease.leading for lease in leases) <= 1


async def test_one_leads_and_another_follows_it(cluster: Cluster, tmp_path: Path) -> None:
    """When the API server is away for the leader it stops before the other begins; a clean stop hands over at once."""
    namespace = await cluster.namespace()
    key = ObjectKey("Lease", namespace, "meshctl")
    async with (
        ApiProxy(cluster.kubeconfig, tmp_path) as proxy,
        connect(proxy.kubeconfig) as theirs,
        connect(cluster.kubeconfig) as client,
    ):
        first = Lease(theirs, namespace, "meshctl", identity="first", terms=SHORT)
        second = Lease(client, namespace, "meshctl", identity="second", terms=SHORT)
        both = (first, second)
        await first.start()
        await until((first,), lambda: first.leading)
        await second.start()
        assert 0 < first.left_s <= SHORT.renew_s
        await proxy.down()
        await until(both, lambda: not first.leading)
        assert first.left_s == 0
        assert "127.0.0.1" in first.problems()[0].message
        await until(both, lambda: second.leading)
        await proxy.up()
        lease = await client.get(key)
        assert lease is not None
        assert lease["spec"]["holderIdentity"] == second.identity
        assert lease["spec"]["leaseTransitions"] == 1
        await second.stop()
        assert not second.leading
        await until((first,), lambda: first.leading)
        assert first.problems() == ()
        await first.stop()
        released = await client.get(key)
        assert released is not None
        assert "holderIdentity" not in released["spec"]


async def test_a_right_that_is_missing_is_a_problem_and_no_crash(cluster: Cluster) -> None:
    """In words that say what to grant; competing begins when it is granted."""
    namespace = await cluster.namespace()
    mine = await cluster.kubeconfig_for(f"{namespace}/default")
    async with connect(mine) as client:
        lease = Lease(client, namespace, "meshctl", terms=SHORT)
        await lease.start()
        async with asyncio.timeout(DEADLINE_S):
            while not lease.problems():  # noqa: ASYNC110  # a problem is no change of leadership, which could be awaited
                await asyncio.sleep(0.01)
        assert "cannot get resource" in lease.problems()[0].message
        assert "(grant get, create and update on leases)" in lease.problems()[0].message
        assert not lease.leading
        rule = ("--verb=get,create,update", "--resource=leases.coordination.k8s.io", "-n", namespace)
        await cluster.kubectl("create", "role", "lease", *rule)
        account = f"--serviceaccount={namespace}:default"
        await cluster.kubectl("create", "rolebinding", "lease", "--role=lease", account, "-n", namespace)
        await until((lease,), lambda: lease.leading)
        await lease.stop()
