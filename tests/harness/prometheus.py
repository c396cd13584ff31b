"""A real Prometheus that scrapes given targets every second (or as asked), with its data under a test's directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp
import orjson

from tests.harness.tools import DEADLINE_S, ToolProcess, require, until


class PrometheusProcess(ToolProcess):
    """``async with PrometheusProcess(tmp_path, {"triton": ["127.0.0.1:8002"]}) as prometheus: prometheus.url``

    `jobs` are ``host:port`` targets by job name; a job named "envoy" is scraped at Envoy's path. Skips (fails in CI)
    where there is no Prometheus.
    """

    name = "prometheus"

    def __init__(self, directory: Path, jobs: Mapping[str, Sequence[str]], interval_s: float = 1.0) -> None:
        super().__init__(directory)
        self.binary = require("prometheus")
        self.interval_s = interval_s
        self._jobs = jobs

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def ready_url(self) -> str:
        return f"{self.url}/-/ready"

    def command(self) -> Sequence[str | Path]:
        config = self.directory / "prometheus.yml"
        config.write_bytes(orjson.dumps(self._config()))  # JSON is YAML
        return (
            self.binary,
            f"--config.file={config}",
            f"--storage.tsdb.path={self.directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.ports[0]}",
            "--log.level=warn",
        )

    def _config(self) -> dict[str, object]:
        interval = f"{round(self.interval_s * 1000)}ms"
        return {
            "global": {"scrape_interval": interval, "scrape_timeout": interval},
            "scrape_configs": [
                {
                    "job_name": job,
                    "metrics_path": "/stats/prometheus" if job == "envoy" else "/metrics",
                    "static_configs": [{"targets": list(targets)}],
                }
                for job, targets in sorted(self._jobs.items())
            ],
        }

    async def value(self, query: str) -> float | None:
        """The single value of `query`, None without a result."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.url}/api/v1/query", params={"query": query}) as response,
        ):
            result = orjson.loads(await response.read())["data"]["result"]
        return float(result[0]["value"][1]) if result else None

    async def until(self, query: str, deadline_s: float = DEADLINE_S) -> None:
        """Wait until `query` has a result (a comparison has one when it holds)."""

        async def holds() -> bool:
            return await self.value(query) is not None

        await until(holds, f"Prometheus: {query}", deadline_s)
