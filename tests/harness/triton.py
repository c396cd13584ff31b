"""A real Triton without a GPU: models that take base + per_item * batch seconds, as a Python backend."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import orjson

from tests.harness.tools import ToolProcess, page, require

_CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: {max_batch}
input [{{ name: "INPUT0" data_type: TYPE_FP32 dims: [1] }}]
output [{{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [1] }}]
instance_group [{{ kind: KIND_CPU count: {instances} }}]
parameters [
  {{ key: "base_s" value: {{ string_value: "{base_s}" }} }},
  {{ key: "per_item_s" value: {{ string_value: "{per_item_s}" }} }}
]
{dynamic}
"""

_MODEL = '''
import json
import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One execution takes base_s + per_item_s * items; a negative item makes it fail."""

    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.base_s, self.per_item_s = (float(parameters[k]["string_value"]) for k in ("base_s", "per_item_s"))

    def execute(self, requests):
        batches = [pb_utils.get_input_tensor_by_name(r, "INPUT0").as_numpy() for r in requests]
        time.sleep(self.base_s + self.per_item_s * sum(b.shape[0] for b in batches))
        # Raised, as an error answered to one request alone is counted as a success.
        if any((b < 0).any() for b in batches):
            raise ValueError("negative item")
        # By DLPack: the backend was built for NumPy 1 and misreads the size of NumPy 2's arrays.
        outputs = [pb_utils.Tensor.from_dlpack("OUTPUT0", b.copy()) for b in batches]
        return [pb_utils.InferenceResponse([output]) for output in outputs]
'''


@dataclass(frozen=True, slots=True)
class TritonModel:
    """A model of the repository."""

    name: str = "resnet50"
    base_s: float = 0.005
    per_item_s: float = 0.0005
    max_batch: int = 128
    instances: int = 1
    dynamic_batching: bool = False


class TritonProcess(ToolProcess):
    """``async with TritonProcess(tmp_path, TritonModel()) as triton: await triton.infer(batch=8)``

    Ready in a second or two. Skips (fails in CI) where there is no Triton.
    """

    name = "triton"
    port_count = 2

    def __init__(self, directory: Path, *models: TritonModel) -> None:
        super().__init__(directory)
        self.home = require("triton")
        self.models = models or (TritonModel(),)
        self._repository = directory / "models"
        for model in self.models:
            _write(model, self._repository)

    @property
    def address(self) -> str:
        """``host:port`` for inference."""
        return f"127.0.0.1:{self.ports[0]}"

    @property
    def metrics(self) -> str:
        """``host:port`` of the metrics page."""
        return f"127.0.0.1:{self.ports[1]}"

    def ready(self) -> bool:
        """It infers, and its metrics page, which begins to listen a moment later, is there too."""
        urls = (f"http://{self.address}/v2/health/ready", f"http://{self.metrics}/metrics")
        return all(page(url) is not None for url in urls)

    def command(self) -> Sequence[str | Path]:
        server = self.home / "pytriton" / "tritonserver"
        return (
            server / "bin" / "tritonserver",
            f"--model-repository={self._repository}",
            f"--backend-directory={server / 'backends'}",
            f"--http-port={self.ports[0]}",
            f"--metrics-port={self.ports[1]}",
            "--http-address=127.0.0.1",
            "--metrics-address=127.0.0.1",
            "--allow-grpc=false",
            "--disable-auto-complete-config",
            "--metrics-interval-ms=200",
            "--http-header-forward-pattern=(batch_size|x-.*)",
            "--exit-timeout-secs=2",
        )

    def environment(self) -> Mapping[str, str]:
        # The models' Python is the tests' own: found first on PATH, with the shared library that fits it.
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            "LD_LIBRARY_PATH": str(self.home / "libpython"),
        }

    async def infer(
        self, session: aiohttp.ClientSession, batch: int = 1, model: str = "", *, fail: bool = False
    ) -> int:
        """One request of `batch` items to `model` (the first one by default); its HTTP status."""
        url = f"http://{self.address}/v2/models/{model or self.models[0].name}/infer"
        async with session.post(url, data=infer_body(batch, fail=fail)) as response:
            await response.read()
            return response.status


def infer_body(batch: int, *, fail: bool = False) -> bytes:
    """The JSON of an inference request of `batch` items; with `fail`, one that the model refuses."""
    value = -1.0 if fail else 1.0
    tensor = {"name": "INPUT0", "datatype": "FP32", "shape": [batch, 1], "data": [value] * batch}
    return orjson.dumps({"inputs": [tensor]})


def _write(model: TritonModel, repository: Path) -> None:
    folder = repository / model.name / "1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(_MODEL)
    fields = {name: getattr(model, name) for name in ("name", "max_batch", "instances", "base_s", "per_item_s")}
    dynamic = "dynamic_batching { }" if model.dynamic_batching else ""
    (folder.parent / "config.pbtxt").write_text(_CONFIG.format(**fields, dynamic=dynamic))
