"""deploy/ on the real API server: it applies, the controller's pods pass the strictest pod security, and the accounts
of the controller, the agent and the extender may do what these do and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
import typer
from ruamel.yaml import YAML

from meshctl.adapters.kubernetes.kinds import GPUS, ISTIO, KINDS, MANDATORY, OPTIONAL
from meshctl.api.gpuresources import NAME
from meshctl.cli.app import app
from meshctl.extender.announce import LABEL
from meshctl.sharing import RESOURCE
from tests.cluster.cluster import Cluster, KubectlError
from tests.harness.tools import until

pytestmark = pytest.mark.cluster
DEPLOY = Path(__file__).parents[2] / "deploy"
NAMESPACE, ACCOUNT = "meshctl-system", "meshctl-system/meshctl"

WATCH = {"list", "watch"}
WRITE = {"get", "create", "patch", "delete"}
NEEDED: dict[str, set[str]] = {
    "modelroutes.meshctl.io": WATCH,
    "modelprofiles.meshctl.io": WATCH,
    "modelroutes/status.meshctl.io": {"patch"},
    "modelprofiles/status.meshctl.io": {"patch"},
    "gpusharingpolicies.meshctl.io": WATCH,
    "gpusharingpolicies/status.meshctl.io": {"patch"},
    "gpus.meshctl.io": WATCH,
    "services": WATCH,
    "pods": WATCH,
    "nodes": WATCH,
    "endpointslices.discovery.k8s.io": WATCH,
    "events.events.k8s.io": {"create"},
    "gateways.networking.istio.io": WATCH,
    "virtualservices.networking.istio.io": WATCH | WRITE,
    "destinationrules.networking.istio.io": WATCH | WRITE,
    "serviceentries.networking.istio.io": WATCH | WRITE,
}
"""RESOURCE.GROUP -> verbs, in every namespace."""
AGENT = "meshctl-agent"
"""The agent's namespace, its account and its DaemonSet."""
AGENT_NEEDED: dict[str, set[str]] = {
    "gpusharingpolicies.meshctl.io": WATCH,
    "gpus.meshctl.io": WATCH | WRITE,
    "gpus/status.meshctl.io": {"patch"},
    "pods": WATCH,
    "nodes": WATCH,
    "events.events.k8s.io": {"create"},
}
EXTENDER, SCHEDULER = "meshctl-system/meshctl-extender", "meshctl-system/meshctl-scheduler"
EXTENDER_NEEDED: dict[str, set[str]] = {
    "pods": WATCH | {"get"},
    "nodes": WATCH,
    "services": WATCH,
    "gpus.meshctl.io": WATCH,
    "modelroutes.meshctl.io": WATCH,
    "modelprofiles.meshctl.io": WATCH,
    "pods/binding": {"create"},
    "pods/status": {"patch"},
}
LEASE = {"leases.coordination.k8s.io": {"create", "get", "update"}}
OWN = {**LEASE, "configmaps": {"get", "create", "patch"}}
"""In its own namespace, on top; but for the Lease's create only on those of one name."""
EXTENDER_OWN = {**EXTENDER_NEEDED, **LEASE, "pods": EXTENDER_NEEDED["pods"] | {"patch"}}
"""There it labels its own pod."""


@pytest.fixture(scope="module")
def deployed(cluster: Cluster) -> Iterator[str]:
    """What kubectl said when deploy/ was applied, errors and warnings too. Its admission policies are for every
    namespace, so they go again."""
    yield _applied(cluster, DEPLOY)
    cluster.kubectl_now("delete", f"--filename={DEPLOY / 'admission.yaml'}", "--ignore-not-found")


@pytest.fixture(scope="module")
def agents(deployed: str, cluster: Cluster) -> str:
    """Likewise of deploy/agent/, which comes after it."""
    return _applied(cluster, DEPLOY / "agent")


@pytest.fixture(scope="module")
def placement(deployed: str, cluster: Cluster) -> str:
    """Likewise of deploy/extender/."""
    return _applied(cluster, DEPLOY / "extender")


def _applied(cluster: Cluster, directory: Path) -> str:
    rendered = cluster.kubectl_now("kustomize", str(directory))
    return cluster.kubectl_now("apply", "--server-side", "--force-conflicts", "--filename=-", stdin=rendered)


async def test_it_applies_and_its_pods_are_let_in(deployed: str, cluster: Cluster) -> None:
    """The namespace enforces the restricted pod security standard, which a pod of the Deployment's passes."""
    assert "deployment.apps/meshctl serverside-applied" in deployed
    deployment = await cluster.get("deployment", "meshctl", "--namespace", NAMESPACE)
    template = deployment["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {**template["metadata"], "name": "one"}}
    await _let_in(cluster, pod)
    del pod["spec"]["securityContext"]
    with pytest.raises(KubectlError, match="PodSecurity"):
        await _let_in(cluster, pod)


async def test_an_overlay_with_xds_tls_serves_who_has_a_certificate(
    deployed: str, cluster: Cluster, tmp_path: Path
) -> None:
    """The component adds what it takes, and takes plain text away; the rest is as it was."""
    rendered = await cluster.kubectl("kustomize", str(_overlay(tmp_path, "xds-tls")))
    await cluster.kubectl("apply", "--server-side", "--dry-run=server", "--filename=-", stdin=rendered)
    objects = list(YAML(typ="safe").load_all(rendered))
    (deployment,) = [o for o in objects if (o["kind"], o["metadata"]["name"]) == ("Deployment", "meshctl")]
    spec = deployment["spec"]["template"]["spec"]
    await _let_in(cluster, {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": spec})
    (container,) = spec["containers"]
    parameters, before = _parameters(container["args"]), _parameters(_container("deployment.yaml")["args"])
    changed = {name for name in parameters if parameters[name] != before[name]}
    assert changed == {"xds_insecure", "xds_tls_cert", "xds_tls_key", "xds_client_ca"}
    (mounted,) = [mount for mount in container["volumeMounts"] if mount["name"] == "xds"]
    files = [Path(parameters[name]) for name in ("xds_tls_cert", "xds_tls_key", "xds_client_ca")]
    assert files == [Path(mounted["mountPath"], name) for name in ("tls.crt", "tls.key", "ca.crt")]
    (secret,) = [volume["secret"]["secretName"] for volume in spec["volumes"] if volume["name"] == "xds"]
    made = _documents("xds-tls/cert-manager.yaml")
    certificates = {c["spec"]["secretName"]: c["spec"] for c in made if "secretName" in c["spec"]}
    (service,) = _documents("service.yaml")
    assert f"{service['metadata']['name']}.{NAMESPACE}.svc" in certificates[secret]["dnsNames"]


async def test_its_account_may_do_what_is_needed_and_nothing_else(deployed: str, cluster: Cluster) -> None:
    """Every verb of every rule, as the API server sees them for its token, beyond what every account has."""
    elsewhere = await cluster.namespace()
    every = await _allowed(cluster, await cluster.kubeconfig_for(f"{elsewhere}/default"), elsewhere)
    ours = await cluster.kubeconfig_for(ACCOUNT)
    assert not every.keys() & {*NEEDED, *OWN}
    assert await _allowed(cluster, ours, elsewhere) == {**NEEDED, **every}
    assert await _allowed(cluster, ours, NAMESPACE) == {**NEEDED, **OWN, **every}


async def test_agents_apply_and_their_pods_are_let_in(agents: str, cluster: Cluster) -> None:
    """Privileged, which the agent's namespace allows and the controller's does not."""
    assert "daemonset.apps/meshctl-agent serverside-applied" in agents
    daemons = await cluster.get("daemonset", AGENT, "--namespace", AGENT)
    template = daemons["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {**template["metadata"], "name": "one"}}
    await _let_in(cluster, pod, AGENT)
    pod["spec"]["serviceAccountName"] = "meshctl"
    with pytest.raises(KubectlError, match=r"PodSecurity.*privileged"):
        await _let_in(cluster, pod)


async def test_agents_account_may_do_what_is_needed_and_nothing_else(agents: str, cluster: Cluster) -> None:
    """It is on every GPU node: it writes GPU objects and Events, and no pod, no policy and no allocation."""
    elsewhere = await cluster.namespace()
    every = await _allowed(cluster, await cluster.kubeconfig_for(f"{elsewhere}/default"), elsewhere)
    ours = await cluster.kubeconfig_for(f"{AGENT}/{AGENT}")
    for namespace in (elsewhere, AGENT, NAMESPACE):
        assert await _allowed(cluster, ours, namespace) == {**AGENT_NEEDED, **every}


@pytest.mark.parametrize("name", [EXTENDER, SCHEDULER])
async def test_the_extender_and_the_second_scheduler_apply(name: str, placement: str, cluster: Cluster) -> None:
    """Their pods are let into the namespace of the controller: its accounts may choose GPUs for pods."""
    name = name.partition("/")[2]
    assert f"deployment.apps/{name} serverside-applied" in placement
    template = (await cluster.get("deployment", name, "--namespace", NAMESPACE))["spec"]["template"]
    await _let_in(cluster, {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": "one"}})


async def test_the_extenders_account_may_do_what_is_needed_and_nothing_else(placement: str, cluster: Cluster) -> None:
    """It binds pods and marks those that wait; it changes no pod elsewhere, no GPU and no model."""
    elsewhere = await cluster.namespace()
    every = await _allowed(cluster, await cluster.kubeconfig_for(f"{elsewhere}/default"), elsewhere)
    ours = await cluster.kubeconfig_for(EXTENDER)
    assert await _allowed(cluster, ours, elsewhere) == {**EXTENDER_NEEDED, **every}
    assert await _allowed(cluster, ours, NAMESPACE) == {**EXTENDER_OWN, **every}
    with pytest.raises(KubectlError, match="Forbidden"):
        await cluster.kubectl("get", "lease", "meshctl", f"--namespace={NAMESPACE}", kubeconfig=ours)


async def test_the_second_schedulers_account_is_as_kubernetes_own(placement: str, cluster: Cluster) -> None:
    """With a Lease of its own in its namespace, and none of that of Kubernetes' there."""
    elsewhere = await cluster.namespace()
    ours = await cluster.kubeconfig_for(SCHEDULER)
    there, here = [await _allowed(cluster, ours, where) for where in (elsewhere, NAMESPACE)]
    assert there["pods/binding"] == {"create"}
    assert there["persistentvolumes"] >= {"get", "list", "watch", "patch", "update"}
    assert {**here, **LEASE} == {**there, **LEASE}


async def test_a_labelled_namespace_goes_to_the_second_scheduler(cluster: Cluster) -> None:
    """Pods that ask for GPUs, in any container, and name no scheduler themselves; no pod elsewhere."""
    path = DEPLOY / "extender" / "namespaces.yaml"
    here, elsewhere = await cluster.namespace(), await cluster.namespace()
    await cluster.kubectl("label", "namespace", here, "meshctl.io/place-gpus=true")
    await cluster.apply(path)

    async def scheduler(namespace: str = here, gpus: str = "containers", **spec: Any) -> str:
        kinds = ("containers", "initContainers")
        made: dict[str, list[dict[str, Any]]] = {kind: [{"name": kind.lower(), "image": "i"}] for kind in kinds}
        if gpus:
            made[gpus][0]["resources"] = {"limits": {RESOURCE: "1"}}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {**made, **spec}}
        command = ("create", "--filename=-", "--dry-run=server", "--namespace", namespace, "--output=json")
        said = await cluster.kubectl(*command, stdin=orjson.dumps(pod).decode())
        return str(orjson.loads(said)["spec"]["schedulerName"])

    async def sent() -> bool:
        return await scheduler() == "meshctl-scheduler"

    try:
        await until(sent, "the policy is in force")
        assert await scheduler(gpus="initContainers") == "meshctl-scheduler"
        assert await scheduler(gpus="") == await scheduler(elsewhere) == "default-scheduler"
        assert await scheduler(schedulerName="own") == "own"
    finally:
        await cluster.kubectl("delete", f"--filename={path}")


async def test_first_policy_is_taken(deployed: str, cluster: Cluster) -> None:
    """By the API server's schema and rules; it is not part of what is applied."""
    policy = str(DEPLOY / "agent" / "gpu-policy.yaml")
    await cluster.kubectl("apply", "--server-side", "--dry-run=server", f"--filename={policy}")
    assert "default" not in await cluster.kubectl("get", "gpusharingpolicies", "--output=name")


@pytest.mark.parametrize(
    "forbidden",
    [
        ("get", "secrets", "--all-namespaces"),
        ("delete", "modelroute", "some", "--namespace=default"),
        ("annotate", "namespace", "default", "a=b"),
        ("get", "lease", "other", f"--namespace={NAMESPACE}"),
        ("get", "lease", "meshctl", "--namespace=default"),
        ("get", "configmap", "meshctl-config", f"--namespace={NAMESPACE}"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
async def test_the_rest_is_forbidden(forbidden: tuple[str, ...], deployed: str, cluster: Cluster) -> None:
    """Asked for real, not only listed."""
    kubeconfig = await cluster.kubeconfig_for(ACCOUNT)
    with pytest.raises(KubectlError, match="Forbidden"):
        await cluster.kubectl(*forbidden, kubeconfig=kubeconfig)


@pytest.mark.parametrize("account", [ACCOUNT, EXTENDER, SCHEDULER])
async def test_its_lease_may_be_read(account: str, placement: str, cluster: Cluster) -> None:
    """By its name, which is limited: kustomize must not have renamed it (it does where a ConfigMap is called so)."""
    command = ("get", "lease", account.partition("/")[2], f"--namespace={NAMESPACE}", "--ignore-not-found")
    await cluster.kubectl(*command, kubeconfig=await cluster.kubeconfig_for(account))


async def test_its_config_map_may_be_made(deployed: str, cluster: Cluster) -> None:
    """By server-side apply, which is a patch that creates: limited to the name all the same."""
    wanted = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": NAME, "namespace": NAMESPACE}}
    kubeconfig = await cluster.kubeconfig_for(ACCOUNT)
    command = ("apply", "--server-side", "--dry-run=server", "--filename=-")
    await cluster.kubectl(*command, stdin=orjson.dumps(wanted).decode(), kubeconfig=kubeconfig)
    other = {**wanted, "metadata": {"name": "other", "namespace": NAMESPACE}}
    with pytest.raises(KubectlError, match="orbidden"):
        await cluster.kubectl(*command, stdin=orjson.dumps(other).decode(), kubeconfig=kubeconfig)


def test_everything_that_is_watched_may_be_watched() -> None:
    """A new kind in the store must come into deploy/rbac.yaml (and into the table here)."""
    assert all(NEEDED[KINDS[name].resource] >= WATCH for name in (*MANDATORY, *OPTIONAL, *GPUS, *ISTIO))


def test_the_container_starts_meshctl_with_options_that_it_has() -> None:
    """And probes and Services meet the ports that it is told to listen on."""
    container = _container("deployment.yaml")
    parameters = _parameters(container["args"])
    assert (parameters["istio"], parameters["lease"]) == (True, "$(NAMESPACE)/meshctl")
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert [parameters[name] for name in ("xds", "admin")] == [f"0.0.0.0:{ports[n]}" for n in ("xds", "admin")]
    assert parameters["xds_insecure"], "it would not start: others can reach it"
    (policy,) = _documents("network.yaml")
    (xds,) = [rule["from"] for rule in policy["spec"]["ingress"] if rule["ports"] == [{"port": "xds"}]]
    assert xds == [{"namespaceSelector": {"matchLabels": {"meshctl.io/proxies": "true"}}}]
    (service,) = _documents("service.yaml")
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == ports


def test_the_agents_container_starts_meshctl_with_options_that_it_has() -> None:
    """And finds under each path of its options what is mounted there from the same path of the host."""
    (daemons,) = _documents("agent/daemonset.yaml")
    spec = daemons["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    parameters = _parameters(container["args"])
    (port,) = container["ports"]
    assert (parameters["node"], parameters["admin"]) == ("$(NODE_NAME)", f"0.0.0.0:{port['containerPort']}")
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"]}
    for option in ("plugin_dir", "pod_resources", "mps_root", "state"):
        path = Path(parameters[option])
        assert {*map(Path, mounted.values())} & {path, *path.parents}, option


def test_the_extenders_container_starts_meshctl_with_options_that_it_has() -> None:
    """And finds its certificates; its Service leads there, by the name that the schedulers' configuration has."""
    deployment, _ = _documents("extender/deployment.yaml")
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    parameters = _parameters(container["args"])
    (port,) = container["ports"]
    assert parameters["listen"] == f"0.0.0.0:{port['containerPort']}"
    assert (parameters["lease"], parameters["pod"]) == ("$(NAMESPACE)/meshctl-extender", "$(NAMESPACE)/$(POD_NAME)")
    assert [variable["name"] for variable in container["env"]] == ["NAMESPACE", "POD_NAME"]
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert all(str(Path(parameters[name]).parent) in mounted for name in ("tls_cert", "tls_key", "client_ca"))
    (service,) = _documents("extender/service.yaml")
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    every = deployment["spec"]["selector"]["matchLabels"]
    assert service["spec"]["selector"] == {**every, LABEL: "true"}
    assert LABEL not in deployment["spec"]["template"]["metadata"]["labels"]
    (config,) = _documents("extender/scheduler-config.yaml")
    host = f"{service['metadata']['name']}.{NAMESPACE}.svc"
    assert config["extenders"][0]["urlPrefix"] == f"https://{host}:{service['spec']['ports'][0]['port']}"
    assert config["extenders"][0]["tlsConfig"]["serverName"] == host


def test_the_second_schedulers_container_finds_its_files() -> None:
    """The configuration, and the certificate that it shows to the extender; pods ask for it by its profile's name."""
    (deployment,) = _documents("extender/scheduler.yaml")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (config,) = _documents("extender/scheduler-config.yaml")
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    (extender,) = config["extenders"]
    files = [path for name, path in extender["tlsConfig"].items() if name.endswith("File")]
    assert {str(Path(path).parent) for path in files} | {"/etc/meshctl-scheduler"} == mounted
    assert [profile["schedulerName"] for profile in config["profiles"]] == [deployment["metadata"]["name"]]
    assert [one["name"] for one in extender["managedResources"]] == [RESOURCE]


async def _let_in(cluster: Cluster, pod: dict[str, Any], namespace: str = NAMESPACE) -> None:
    """Raises KubectlError when the API server would not take it."""
    command = ("create", "--filename=-", "--dry-run=server", "--namespace", namespace)
    await cluster.kubectl(*command, stdin=orjson.dumps(pod).decode())


def _overlay(directory: Path, component: str) -> Path:
    """`directory`, with an overlay of deploy/ that has one of its components."""
    base = os.path.relpath(DEPLOY, directory)  # kustomize takes no other
    (directory / "kustomization.yaml").write_text(f"resources: [{base}]\ncomponents: [{base}/{component}]\n")
    return directory


def _container(name: str) -> dict[str, Any]:
    """The container of the first object of a file."""
    (container,) = _documents(name)[0]["spec"]["template"]["spec"]["containers"]
    return dict(container)


def _parameters(arguments: Sequence[str]) -> dict[str, Any]:
    """What meshctl makes of its arguments. It raises for options that it does not have."""
    command, *rest = arguments
    group: Any = typer.main.get_command(app)
    return dict(group.get_command(None, command).make_context(command, rest).params)


def _documents(name: str) -> list[Any]:
    with (DEPLOY / name).open() as stream:
        return list(YAML(typ="safe").load_all(stream))


async def _allowed(cluster: Cluster, kubeconfig: Path, namespace: str) -> dict[str, set[str]]:
    """RESOURCE.GROUP -> verbs that the holder of `kubeconfig` has in `namespace`."""
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }
    command = ("create", "--filename=-", "--output=json", "--validate=false")
    said = await cluster.kubectl(*command, stdin=orjson.dumps(review).decode(), kubeconfig=kubeconfig)
    allowed: dict[str, set[str]] = {}
    for rule in orjson.loads(said)["status"]["resourceRules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                allowed.setdefault(f"{resource}.{group}".rstrip("."), set()).update(rule["verbs"])
    return allowed
