"""What is wrong with one Gateway beyond its single fields, and which hosts it serves. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from istio.analyze import values
from istio.analyze.finding import FieldPath
from istio.analyze.serviceentry import PROTOCOLS

Report = Callable[[str, FieldPath, str], None]
Spec = Mapping[str, Any]

_TLS = frozenset({"https", "tls"})
_WITH_CERTIFICATE = frozenset({"SIMPLE", "MUTUAL", "OPTIONAL_MUTUAL"})
_PLAIN_TLS = frozenset({"httpsRedirect"})
"""What a server without TLS may have under `tls`."""


def judge(spec: Spec, report: Report) -> None:
    """`spec` as `shape.Reader` gives it."""
    names: set[str] = set()
    for index, server in enumerate(spec.get("servers", [])):
        path: FieldPath = ("spec", "servers", index)
        port = server.get("port", {})
        if port.get("name") and port["name"] in names:
            report("GatewayServer", (*path, "port", "name"), f"two servers have a port called `{port['name'][:40]}`")
        names.add(port.get("name", ""))
        _server(server, path, report)
        for number, host in enumerate(server.get("hosts", [])):
            _host(host, (*path, "hosts", number), report)


def served(spec: Spec, gateway_namespace: str, namespace: str) -> Iterator[str]:
    """The hosts that the gateway serves for VirtualServices of `namespace`."""
    for server in spec.get("servers", []):
        for host in server.get("hosts", []):
            scope, _, name = host.rpartition("/")
            if scope in ("", "*", namespace) or (scope == "." and gateway_namespace == namespace):
                yield name


def _server(server: Spec, path: FieldPath, report: Report) -> None:
    port, tls = server.get("port", {}), server.get("tls")
    protocol = port.get("protocol", "").lower()
    unix = server.get("bind", "").startswith("unix://")
    if not port.get("number") and not unix and port:
        report("GatewayServer", (*path, "port", "number"), "the port has no number; write one from 1 to 65535")
    if port.get("targetPort"):
        report("GatewayServer", (*path, "port", "targetPort"), "targetPort does nothing here; remove it")
    if protocol and protocol not in PROTOCOLS:
        report("UnknownValue", (*path, "port", "protocol"), f"`{protocol[:40]}` is not a protocol that Istio knows")
    if protocol in _TLS and tls is None:
        report("GatewayServer", (*path, "tls"), f"{protocol.upper()} needs tls")
    if tls and protocol in PROTOCOLS - _TLS and tls.keys() - _PLAIN_TLS:
        report("GatewayServer", (*path, "tls"), f"{protocol.upper()} takes no tls but httpsRedirect")
    _certificates(tls or {}, (*path, "tls"), report)


def _certificates(tls: Spec, path: FieldPath, report: Report) -> None:
    mode = tls.get("mode", "")
    held = [name for name in ("credentialName", "credentialNames", "tlsCertificates") if tls.get(name)]
    files = [name for name in ("serverCertificate", "privateKey") if tls.get(name)]
    if mode == "ISTIO_MUTUAL" and (held or files or tls.get("caCertificates")):
        report("GatewayServer", path, "ISTIO_MUTUAL brings its own certificates; remove those named")
    if mode in _WITH_CERTIFICATE and not held and len(files) < 2:
        report("GatewayServer", path, f"{mode} needs credentialName, or serverCertificate and privateKey")
    if mode in _WITH_CERTIFICATE - {"SIMPLE"} and not {*held} - {"tlsCertificates"} and not tls.get("caCertificates"):
        report("GatewayServer", (*path, "caCertificates"), f"{mode} needs caCertificates or credentialName")


def _host(host: str, path: FieldPath, report: Report) -> None:
    """``host`` or ``namespace/host``, fully qualified."""
    scope, slash, name = host.rpartition("/")
    if slash and scope not in ("*", ".") and (not scope or values.label(scope)):
        report("InvalidName", path, f"`{scope[:80]}` is not a namespace")
    short = name != "*" and "." not in name
    partly = name.startswith("*") and name != "*" and not name.startswith("*.")
    if not values.is_ip(name) and (short or partly or values.host(name)):
        report("InvalidHost", path, f"`{name[:80]}` is not a fully qualified host name")
