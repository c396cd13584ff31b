"""The device plugins of an agent: one for each resource that has slots, as long as it has some."""

from __future__ import annotations

import asyncio
from pathlib import Path

from deviceplugin.main import Plugins
from meshctl.sharing import RESOURCE
from tests.harness.agent_world import World
from tests.harness.fake_kubelet import FakeKubelet
from tests.harness.tools import until


async def test_a_plugin_survives_what_nobody_thought_of(tmp_path: Path) -> None:
    """The plugin directory becomes a link to itself, which no call expects: when it is one again, slots are offered."""
    world = World(tmp_path)
    await world.start()
    metrics = world.agent.parts.metrics
    directory, aside = tmp_path / "plugins", tmp_path / "aside"
    directory.symlink_to(directory)
    plugins = asyncio.create_task(Plugins(directory, world.agent, metrics.called, retry_s=0.05).run())
    try:

        async def failed() -> bool:
            return 'failures_total{activity="device plugin"}' in metrics.exposition().decode()

        await until(failed, "it failed")
        async with FakeKubelet(aside) as kubelet:
            directory.unlink()
            directory.symlink_to(kubelet.plugin_dir)
            await kubelet.has(RESOURCE, 8)
            directory.unlink()
            directory.symlink_to(directory)
            seen = metrics.exposition()

            async def failed_again() -> bool:
                return metrics.exposition() != seen

            await until(failed_again, "it failed again")
            directory.unlink()
            directory.symlink_to(kubelet.plugin_dir)
            await kubelet.restart()
            await kubelet.has(RESOURCE, 8)
    finally:
        plugins.cancel()
        await asyncio.wait([plugins])
        await world.agent.stop()
