"""Where the API server is and who we are: kubeconfig or service account, and credentials that change while we run.

Inside a pod the service account's token is rotated by the kubelet; a kubeconfig's token file and exec plugin (cloud
logins) give new ones as well. `kubernetes.aio` knows all these; here it is asked again at most once a minute.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import structlog
import yaml  # type: ignore[import-untyped]  # for the loader's errors only
from kubernetes.aio import config as kubernetes
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config import ConfigException
from kubernetes.aio.config.incluster_config import SERVICE_HOST_ENV_NAME, SERVICE_TOKEN_FILENAME

from meshctl.errors import InputError

REFRESH_S = 60.0
"""Credentials are read again when they are older than this."""
_LOAD_S = 60.0
"""An exec plugin may open a browser."""

_Loose = Any
"""What `kubernetes.aio` leaves without a type."""

log = structlog.get_logger(__name__)


async def configuration(kubeconfig: Path | None, context: str | None = None) -> Configuration:
    """What `kubernetes.aio` needs to know.

    Without `kubeconfig` (and `context`): the pod's service account where there is one, otherwise $KUBECONFIG, otherwise
    ~/.kube/config. Raises InputError when there is none, or it is not readable.
    """
    found = Configuration()
    if kubeconfig is None and context is None and _in_a_pod():
        _from_service_account(found)
        return found  # kept fresh by a hook of the package's own
    where = _file(kubeconfig)
    hook: _Loose = _Refresh(await _load(where, context, found), where)
    found.refresh_api_key_hook = hook
    return found


def _in_a_pod() -> bool:
    return bool(os.environ.get(SERVICE_HOST_ENV_NAME)) and Path(SERVICE_TOKEN_FILENAME).is_file()


def _file(kubeconfig: Path | None) -> str:
    """As kubectl finds it: $KUBECONFIG may name several files, of which some may not exist."""
    where = str(kubeconfig) if kubeconfig else os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    if not any(Path(part).expanduser().is_file() for part in where.split(os.pathsep) if part):
        raise InputError(f"{where}: no such file; name a kubeconfig (--kubeconfig or $KUBECONFIG), or run in a pod")
    return where


def _from_service_account(found: _Loose) -> None:
    load: _Loose = kubernetes.load_incluster_config
    try:
        load(found)
    except (ConfigException, OSError) as fault:
        raise InputError(f"the pod's service account cannot be used: {fault}") from fault


async def _load(where: str, context: str | None, into: _Loose) -> _Loose:
    """The loader, which can be asked to load again."""
    load: _Loose = kubernetes.load_kube_config
    try:
        async with asyncio.timeout(_LOAD_S):
            return await load(where, context, into, persist_config=False)
    except TimeoutError as late:
        raise InputError(f"{where}: its credentials plugin gave no answer within {_LOAD_S:g} s") from late
    except (ConfigException, OSError, yaml.YAMLError) as fault:
        raise InputError(f"{where}: {fault}") from fault
    except (AttributeError, KeyError, TypeError, ValueError) as odd:  # what the loader does on a file of another shape
        raise InputError(f"{where}: is not a kubeconfig ({type(odd).__name__}: {odd})") from odd


class _Refresh:
    """Called before each request: reads the credentials again when they are old. The last good ones stay in use."""

    def __init__(self, loader: _Loose, where: str) -> None:
        self._loader, self._where = loader, where
        self._due_s = time.monotonic() + REFRESH_S
        self._lock = asyncio.Lock()

    async def _refresh(self, config: Configuration) -> None:
        async with self._lock:
            if time.monotonic() < self._due_s:
                return
            self._due_s = time.monotonic() + REFRESH_S
            try:
                async with asyncio.timeout(_LOAD_S):
                    await self._loader.load_and_set(config)
            except (ConfigException, OSError, ValueError, TypeError, TimeoutError) as fault:
                log.warning("credentials not renewed, the last ones stay", kubeconfig=self._where, error=str(fault))

    def __call__(self, config: Configuration) -> object:
        """A coroutine when there is something to do (`Configuration` awaits it then), None otherwise."""
        return self._refresh(config) if time.monotonic() >= self._due_s else None
