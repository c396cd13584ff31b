"""The fields of VirtualService, DestinationRule, ServiceEntry and Gateway, with what each value must be. Data only.

The names and types are those of Istio's CRDs (a test compares every one); the checks are those of istiod's validation,
which the CRDs have only in part. The API server drops unknown fields without a word (server-side apply refuses them),
so they are named here.
"""

from __future__ import annotations

from collections.abc import Mapping

from istio.analyze import values
from istio.analyze.shape import Entries, Items, Message, Scalar, Shape
from istio.names import DESTINATION_RULE, GATEWAY, SERVICE_ENTRY, VIRTUAL_SERVICE

UINT32 = 0xFFFFFFFF
INT32 = 0x7FFFFFFF

STRING, BOOL, NUMBER = Scalar("string"), Scalar("boolean"), Scalar("number")
STRINGS = Items(STRING)
WORDS = Entries(STRING)
LABELS = Entries(Scalar("string", values.label_value), values.label_key)
HOST = Scalar("string", values.host)
LABEL = Scalar("string", values.label)
DURATION = Scalar("string", values.duration)
ANY_DURATION = Scalar("string", values.any_duration)
COUNT = Scalar("integer", values.within(0, INT32))
UINT = Scalar("integer", values.within(0, UINT32))
PORT = Scalar("integer", values.within(1, 65535))
PORT_OR_0 = Scalar("integer", values.within(0, 65535))
PERCENT = Scalar("integer", values.within(0, 100))
PERCENTAGE = Message({"value": Scalar("number", values.within(0, 100))})
WEIGHT = Scalar("integer", values.weight)


def _words(*allowed: str) -> Scalar:
    return Scalar("string", values.one_of(*allowed))


_KINDS_OF_MATCH = ("exact", "prefix", "regex")
_REGEX = Scalar("string", values.regex)
MATCH = Message({"exact": STRING, "prefix": STRING, "regex": _REGEX}, one_of=(_KINDS_OF_MATCH,))
ABSENCE = Message({"exact": STRING, "prefix": STRING, "regex": STRING}, one_of=(_KINDS_OF_MATCH,))
"""Of `withoutHeaders`, where the regular expression may be ``*``; a rule checks it."""

_CHANGES = Message({"add": WORDS, "remove": STRINGS, "set": WORDS})
_HEADERS = Message({"request": _CHANGES, "response": _CHANGES})
_DESTINATION = Message(
    {"host": HOST, "port": Message({"number": PORT}), "subset": LABEL},
    required=("host",),
)
_L4_ROUTE = Items(Message({"destination": _DESTINATION, "weight": WEIGHT}, required=("destination",)))
_L4_MATCH: dict[str, Shape] = {
    "destinationSubnets": Items(Scalar("string", values.subnet)),
    "gateways": STRINGS,
    "port": PORT_OR_0,
    "sourceLabels": LABELS,
    "sourceNamespace": STRING,
}
_HTTP_MATCH = Message(
    {
        "authority": MATCH,
        "gateways": STRINGS,
        "headers": Entries(MATCH, values.header),
        "ignoreUriCase": BOOL,
        "method": MATCH,
        "name": STRING,
        "port": PORT_OR_0,
        "queryParams": Entries(MATCH),
        "scheme": MATCH,
        "sourceLabels": LABELS,
        "sourceNamespace": LABEL,
        "statPrefix": STRING,
        "uri": MATCH,
        "withoutHeaders": Entries(ABSENCE, values.header),
    }
)
_CORS = Message(
    {
        "allowCredentials": BOOL,
        "allowHeaders": STRINGS,
        "allowMethods": Items(
            _words("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE", "*"),
        ),
        "allowOrigin": STRINGS,
        "allowOrigins": Items(MATCH),
        "exposeHeaders": STRINGS,
        "maxAge": DURATION,
        "unmatchedPreflights": _words("UNSPECIFIED", "FORWARD", "IGNORE"),
    }
)
_FAULT = Message(
    {
        "abort": Message(
            {
                "grpcStatus": STRING,
                "http2Error": STRING,
                "httpStatus": Scalar("integer", values.within(200, 599)),
                "percentage": PERCENTAGE,
            },
            one_of=(("grpcStatus", "http2Error", "httpStatus"),),
        ),
        "delay": Message(
            {"exponentialDelay": DURATION, "fixedDelay": DURATION, "percent": PERCENT, "percentage": PERCENTAGE},
            one_of=(("exponentialDelay", "fixedDelay"),),
        ),
    }
)
_HTTP_ROUTE = Message(
    {
        "corsPolicy": _CORS,
        "delegate": Message({"name": STRING, "namespace": STRING}),
        "directResponse": Message(
            {
                "body": Message({"bytes": STRING, "string": STRING}, one_of=(("bytes", "string"),)),
                "status": Scalar("integer", values.within(200, 599)),
            },
            required=("status",),
        ),
        "fault": _FAULT,
        "headers": _HEADERS,
        "match": Items(_HTTP_MATCH),
        "mirror": _DESTINATION,
        "mirror_percent": PERCENT,
        "mirrorPercent": PERCENT,
        "mirrorPercentage": PERCENTAGE,
        "mirrors": Items(Message({"destination": _DESTINATION, "percentage": PERCENTAGE}, required=("destination",))),
        "name": STRING,
        "redirect": Message(
            {
                "authority": STRING,
                "derivePort": _words("FROM_PROTOCOL_DEFAULT", "FROM_REQUEST_PORT"),
                "port": UINT,
                "prefixRewrite": STRING,
                "redirectCode": UINT,
                "scheme": STRING,
                "uri": STRING,
            },
            one_of=(("port", "derivePort"),),
        ),
        "retries": Message(
            {
                "attempts": Scalar("integer", values.within(0, INT32)),
                "backoff": DURATION,
                "perTryTimeout": DURATION,
                "retryIgnorePreviousHosts": BOOL,
                "retryOn": STRING,
                "retryRemoteLocalities": BOOL,
            }
        ),
        "rewrite": Message(
            {
                "authority": STRING,
                "uri": STRING,
                "uriRegexRewrite": Message({"match": _REGEX, "rewrite": STRING}),
            }
        ),
        "route": Items(
            Message({"destination": _DESTINATION, "headers": _HEADERS, "weight": WEIGHT}, required=("destination",))
        ),
        "timeout": DURATION,
    }
)
_VIRTUAL_SERVICE = Message(
    {
        "exportTo": STRINGS,
        "gateways": STRINGS,
        "hosts": Items(Scalar("string", values.host_or_ip)),
        "http": Items(_HTTP_ROUTE),
        "tcp": Items(Message({"match": Items(Message({**_L4_MATCH, "sourceSubnet": STRING})), "route": _L4_ROUTE})),
        "tls": Items(
            Message(
                {
                    "match": Items(Message({**_L4_MATCH, "sniHosts": STRINGS}, required=("sniHosts",))),
                    "route": _L4_ROUTE,
                },
                required=("match",),
            )
        ),
    }
)

_FAILOVER: dict[str, Shape] = {
    "enabled": BOOL,
    "failover": Items(Message({"from": STRING, "to": STRING})),
    "failoverPriority": STRINGS,
}
_HASH = Message(
    {
        "httpCookie": Message(
            {
                "attributes": Items(Message({"name": STRING, "value": STRING}, required=("name",))),
                "name": STRING,
                "path": STRING,
                "ttl": ANY_DURATION,
            },
            required=("name",),
        ),
        "httpHeaderName": STRING,
        "httpQueryParameterName": STRING,
        "maglev": Message({"tableSize": Scalar("integer", values.within(1, 5_000_010))}, required=("tableSize",)),
        "minimumRingSize": Scalar("integer", values.at_least(0)),
        "ringHash": Message({"minimumRingSize": Scalar("integer", values.at_least(0))}),
        "useSourceIp": BOOL,
    },
    one_of=(
        ("httpCookie", "httpHeaderName", "httpQueryParameterName", "useSourceIp"),
        ("maglev", "ringHash", "minimumRingSize"),
    ),
)
_LOAD_BALANCER = Message(
    {
        "consistentHash": _HASH,
        "localityLbSetting": Message(
            {"distribute": Items(Message({"from": STRING, "to": Entries(UINT)})), **_FAILOVER},
        ),
        "simple": _words("UNSPECIFIED", "LEAST_CONN", "RANDOM", "PASSTHROUGH", "ROUND_ROBIN", "LEAST_REQUEST"),
        "warmup": Message(
            {
                "aggression": Scalar("number", values.at_least(0)),
                "duration": DURATION,
                "minimumPercent": Scalar("number", values.within(0, 100)),
            },
            required=("duration",),
        ),
        "warmupDurationSecs": DURATION,
        "zoneAwareLbSetting": Message({**_FAILOVER, "minClusterSize": Scalar("integer", values.within(1, UINT32))}),
    },
    one_of=(("simple", "consistentHash"), ("localityLbSetting", "zoneAwareLbSetting")),
)
_CONNECTION_POOL = Message(
    {
        "http": Message(
            {
                "h2UpgradePolicy": _words("DEFAULT", "DO_NOT_UPGRADE", "UPGRADE"),
                "http1MaxPendingRequests": COUNT,
                "http2KeepAlive": Message(
                    {"interval": DURATION, "timeout": DURATION}, required=("interval", "timeout")
                ),
                "http2MaxRequests": COUNT,
                "idleTimeout": DURATION,
                "maxConcurrentStreams": COUNT,
                "maxRequestsPerConnection": COUNT,
                "maxRetries": COUNT,
                "useClientProtocol": BOOL,
            }
        ),
        "tcp": Message(
            {
                "connectTimeout": DURATION,
                "idleTimeout": ANY_DURATION,
                "maxConnectionDuration": DURATION,
                "maxConnections": COUNT,
                "tcpKeepalive": Message({"interval": DURATION, "probes": UINT, "time": DURATION}),
            }
        ),
    }
)
_OUTLIERS = Message(
    {
        "baseEjectionTime": DURATION,
        "consecutive5xxErrors": UINT,
        "consecutiveErrors": Scalar("integer"),
        "consecutiveGatewayErrors": UINT,
        "consecutiveLocalOriginFailures": UINT,
        "interval": DURATION,
        "maxEjectionPercent": PERCENT,
        "minHealthPercent": PERCENT,
        "outlierDetectionHttpErrorCodes": Items(Scalar("integer", values.within(100, 599))),
        "splitExternalLocalOriginErrors": BOOL,
    }
)
_CLIENT_TLS = Message(
    {
        "caCertificates": STRING,
        "caCrl": STRING,
        "clientCertificate": STRING,
        "credentialName": STRING,
        "insecureSkipVerify": BOOL,
        "mode": _words("DISABLE", "SIMPLE", "MUTUAL", "ISTIO_MUTUAL"),
        "privateKey": STRING,
        "sni": STRING,
        "subjectAltNames": STRINGS,
    }
)
_PORT_POLICY: dict[str, Shape] = {
    "connectionPool": _CONNECTION_POOL,
    "loadBalancer": _LOAD_BALANCER,
    "outlierDetection": _OUTLIERS,
    "tls": _CLIENT_TLS,
}
_POLICY = Message(
    {
        **_PORT_POLICY,
        "portLevelSettings": Items(Message({**_PORT_POLICY, "port": Message({"number": PORT})}, required=("port",))),
        "proxyProtocol": Message({"version": _words("V1", "V2")}),
        "retryBudget": Message(
            {
                "budgetInterval": ANY_DURATION,
                "minRetryConcurrency": UINT,
                "percent": Scalar("number", values.within(0, 100)),
            }
        ),
        "tunnel": Message(
            {"protocol": _words("CONNECT", "POST"), "targetHost": STRING, "targetPort": PORT},
            required=("targetHost", "targetPort"),
        ),
    },
    one_of=(("tunnel", "proxyProtocol"),),
)
_DESTINATION_RULE = Message(
    {
        "exportTo": STRINGS,
        "host": HOST,
        "subsets": Items(Message({"labels": LABELS, "name": LABEL, "trafficPolicy": _POLICY}, required=("name",))),
        "trafficPolicy": _POLICY,
        "workloadSelector": Message({"matchLabels": LABELS}),
    },
    required=("host",),
)

_SERVICE_ENTRY = Message(
    {
        "addresses": Items(Scalar("string", values.subnet)),
        "endpoints": Items(
            Message(
                {
                    "address": STRING,
                    "labels": LABELS,
                    "locality": STRING,
                    "network": STRING,
                    "ports": Entries(PORT, values.label),
                    "serviceAccount": STRING,
                    "weight": UINT,
                }
            )
        ),
        "exportTo": STRINGS,
        "hosts": Items(HOST),
        "location": _words("MESH_EXTERNAL", "MESH_INTERNAL"),
        "ports": Items(
            Message(
                {"name": LABEL, "number": PORT, "protocol": STRING, "targetPort": PORT_OR_0},
                required=("number", "name"),
            )
        ),
        "resolution": _words("NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS"),
        "subjectAltNames": STRINGS,
        "workloadSelector": Message({"labels": WORDS}),
    },
    required=("hosts",),
    one_of=(("workloadSelector", "endpoints"),),
)

_TLS_VERSIONS = _words("TLS_AUTO", "TLSV1_0", "TLSV1_1", "TLSV1_2", "TLSV1_3")
_SERVER_TLS = Message(
    {
        "caCertCredentialName": STRING,
        "caCertificates": STRING,
        "caCrl": STRING,
        "cipherSuites": STRINGS,
        "credentialName": STRING,
        "credentialNames": STRINGS,
        "httpsRedirect": BOOL,
        "insecureSkipVerify": BOOL,
        "maxProtocolVersion": _TLS_VERSIONS,
        "minProtocolVersion": _TLS_VERSIONS,
        "mode": _words("PASSTHROUGH", "SIMPLE", "MUTUAL", "AUTO_PASSTHROUGH", "ISTIO_MUTUAL", "OPTIONAL_MUTUAL"),
        "privateKey": STRING,
        "serverCertificate": STRING,
        "subjectAltNames": STRINGS,
        "tlsCertificates": Items(
            Message({"caCertificates": STRING, "privateKey": STRING, "serverCertificate": STRING})
        ),
        "verifyCertificateHash": STRINGS,
        "verifyCertificateSpki": STRINGS,
    },
    one_of=(("tlsCertificates", "credentialNames", "credentialName"),),
)
_GATEWAY = Message(
    {
        "selector": WORDS,
        "servers": Items(
            Message(
                {
                    "bind": STRING,
                    "defaultEndpoint": STRING,
                    "hosts": STRINGS,
                    "name": STRING,
                    "port": Message(
                        {"name": STRING, "number": PORT_OR_0, "protocol": STRING, "targetPort": UINT},
                        required=("name", "protocol"),
                    ),
                    "tls": _SERVER_TLS,
                },
                required=("port", "hosts"),
            )
        ),
    },
    required=("servers",),
)

SHAPES: Mapping[str, Message] = {
    VIRTUAL_SERVICE: _VIRTUAL_SERVICE,
    DESTINATION_RULE: _DESTINATION_RULE,
    SERVICE_ENTRY: _SERVICE_ENTRY,
    GATEWAY: _GATEWAY,
}
"""Kind -> its `spec`."""
