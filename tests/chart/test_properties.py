"""What a security review asks of every render, as tests."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import yaml

from tests.chart import helm
from tests.chart.helm import CHART, CI_VALUES, Object

every_ci_file = pytest.mark.parametrize(
    "values", CI_VALUES, ids=lambda path: path.stem.removesuffix("-values")
)


def _containers(spec: Object) -> list[tuple[bool, Object]]:
    """(is it an init container, the container)."""
    return [(True, item) for item in spec.get("initContainers", [])] + [
        (False, item) for item in spec["containers"]
    ]


KUBEVIRT = CHART / "ci" / "kubevirt-values.yaml"


def _sees_pods(where: str, values: Path) -> bool:
    """Whether this pod reaches the sockets of KubeVirt's pods, which root alone may."""
    return values == KUBEVIRT and not where.startswith("Deployment/")


@every_ci_file
def test_no_container_has_a_privilege_but_the_documented_ones(values: Path) -> None:
    """The init container's CHOWN, and, to reach the sockets of KubeVirt's pods, DAC_OVERRIDE."""
    specs = helm.pod_specs(helm.render(values))
    assert specs
    for where, spec in specs:
        for initial, container in _containers(spec):
            context = container["securityContext"]
            assert context["privileged"] is False, where
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"]["drop"] == ["ALL"]
            added = context["capabilities"].get("add", [])
            if initial:
                assert container["name"] == "own-spool"
                assert container["command"][:2] == ["sh", "-euc"]
                assert added == ["CHOWN"]
                assert [mount["name"] for mount in container["volumeMounts"]] == ["spool"]
            else:
                assert added == (["DAC_OVERRIDE"] if _sees_pods(where, values) else []), where
                assert "runAsUser" not in context
                assert "runAsNonRoot" not in context


@every_ci_file
def test_no_pod_shares_the_hosts_namespaces_or_runs_as_root(values: Path) -> None:
    for where, spec in helm.pod_specs(helm.render(values)):
        assert (spec["hostNetwork"], spec["hostPID"], spec["hostIPC"]) == (False, False, False), where
        context = spec["securityContext"]
        root = _sees_pods(where, values)
        assert context["runAsNonRoot"] is not root
        assert context["runAsUser"] == 0 if root else context["runAsUser"] >= 1000
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["enableServiceLinks"] is False


@every_ci_file
def test_only_react_with_kubernetes_has_a_service_account_token(values: Path) -> None:
    found = helm.render(values)
    for where, spec in helm.pod_specs(found):
        assert spec["automountServiceAccountToken"] is where.startswith("Deployment/"), where
    for item in found:
        if item["kind"] == "ServiceAccount":
            assert item["automountServiceAccountToken"] is False


@every_ci_file
def test_no_host_path_is_writable_but_the_spool(values: Path) -> None:
    for where, spec in helm.pod_specs(helm.render(values)):
        host = {item["name"]: item["hostPath"] for item in spec.get("volumes", []) if "hostPath" in item}
        for _, container in _containers(spec):
            for mount in container.get("volumeMounts", []):
                if mount["name"] in host and not mount.get("readOnly"):
                    assert mount["name"] == "spool", where


def test_the_pods_of_a_node_are_mounted_read_only_and_follow_the_host() -> None:
    pods = [spec for where, spec in helm.pod_specs(helm.render(KUBEVIRT)) if _sees_pods(where, KUBEVIRT)]
    assert len(pods) == 2  # the agents' and the doctor's
    for spec in pods:
        volumes = {item["name"]: item["hostPath"] for item in spec["volumes"] if "hostPath" in item}
        assert volumes["pods"] == {"path": "/var/lib/kubelet/pods", "type": "Directory"}
        assert "libvirt" not in volumes
        (container,) = spec["containers"]
        (mount,) = (one for one in container["volumeMounts"] if one["name"] == "pods")
        assert (mount["readOnly"], mount["mountPropagation"]) == (True, "HostToContainer")
        assert mount["mountPath"] == "/var/lib/kubelet/pods"
        node = {
            "name": "VIRTBUS_LIBVIRT__DISCOVER__HOST",
            "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}},
        }
        assert node in container["env"]


def test_kubevirt_and_the_hosts_own_libvirt_are_both_observed_only_when_both_are_asked_for() -> None:
    for sets, expected in (
        ((), {"libvirt"}),
        (("kubevirt.enabled=true",), {"pods"}),
        (("kubevirt.enabled=true", "kubevirt.withLibvirt=true"), {"pods", "libvirt"}),
    ):
        spec = helm.one(helm.render(helm.MINIMAL, sets=sets), "DaemonSet")["spec"]["template"]["spec"]
        mounted = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounted & {"pods", "libvirt"} == expected
        assert {volume["name"] for volume in spec["volumes"]} & {"pods", "libvirt"} == expected


def test_events_on_vmis_take_two_rights_that_nobody_has_who_did_not_ask_for_them() -> None:
    react = ("react.enabled=true", "react.with=kubernetes")
    asked = "config.react.kubernetes.events="
    for sets, rules in (
        ((), []),
        ((*react, asked + "node"), []),
        ((*react, asked + "vmi", "react.kubernetesRbac=false"), []),
        (
            (*react, asked + "vmi"),
            [{"apiGroups": [""], "resources": ["events"], "verbs": ["create", "patch"]}],
        ),
    ):
        found = helm.render(helm.MINIMAL, sets=sets)
        roles = [item for item in found if item["kind"] == "ClusterRole"]
        assert [rule for role in roles for rule in role["rules"] if "events" in rule["resources"]] == rules


@every_ci_file
def test_libvirts_folder_is_mounted_and_never_its_socket(values: Path) -> None:
    for where, spec in helm.pod_specs(helm.render(values)):
        for volume in spec.get("volumes", []):
            if "hostPath" not in volume:
                continue
            kind = volume["hostPath"]["type"]
            assert kind in ("Directory", "DirectoryOrCreate", "File"), where
            assert kind != "File" or volume["hostPath"]["path"] == "/etc/machine-id"
        for _, container in _containers(spec):
            for mount in container.get("volumeMounts", []):
                assert "sock" not in mount["mountPath"]
                assert "subPath" not in mount  # a bind of one file: it does not follow a renewal


@every_ci_file
def test_a_config_map_holds_no_secret_and_no_address_of_a_broker(values: Path) -> None:
    for item in helm.render(values):
        if item["kind"] == "ConfigMap":
            text = json.dumps(item)
            assert "amqp://" not in text
            assert "amqps://" not in text
            assert "kafka" not in text.replace("[bus.kafka", "") or "kafkas://" not in text
            assert "password =" not in text


def test_the_chart_makes_no_secret_at_all() -> None:
    for values in CI_VALUES:
        assert not [item for item in helm.render(values) if item["kind"] == "Secret"]


@every_ci_file
def test_every_secret_in_use_is_readable_for_the_agents_group_alone(values: Path) -> None:
    for where, spec in helm.pod_specs(helm.render(values)):
        for volume in spec.get("volumes", []):
            if "secret" in volume:
                assert volume["secret"]["defaultMode"] == 0o440, where
                assert volume["secret"]["items"], "the whole secret would be mounted"


@every_ci_file
def test_selectors_and_pod_labels_hold_no_version(values: Path) -> None:
    for item in helm.render(values):
        spec = item.get("spec", {})
        selector = spec.get("selector", {})
        for labels in (
            selector.get("matchLabels", {}),
            spec.get("template", {}).get("metadata", {}).get("labels", {}),
        ):
            assert not {"app.kubernetes.io/version", "helm.sh/chart"} & set(labels)


@every_ci_file
def test_every_selector_selects_the_pods_it_means_and_no_others(values: Path) -> None:
    found = helm.render(values)
    pods = {
        item["metadata"]["name"]: item["spec"]["template"]["metadata"]["labels"]
        for item in found
        if item["kind"] in ("DaemonSet", "Deployment")
    }
    for item in found:
        if item["kind"] in ("DaemonSet", "Deployment"):
            selector = item["spec"]["selector"]["matchLabels"]
            assert [name for name, labels in pods.items() if selector.items() <= labels.items()] == [
                item["metadata"]["name"]
            ]


def test_the_deployment_of_react_is_one_and_has_no_more_rights_than_it_needs() -> None:
    found = helm.render(helm.CHART / "ci" / "everything-values.yaml")
    deployment = helm.one(found, "Deployment")
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    assert not [item for item in found if item["kind"] == "HorizontalPodAutoscaler"]
    rules = helm.one(found, "ClusterRole")["rules"]
    rights = {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    assert rights == {
        ("nodes", "get"), ("nodes", "list"), ("nodes", "patch"), ("nodes/status", "patch"),
    }  # fmt: skip
    role = helm.one(found, "Role")
    assert role["metadata"]["namespace"] == "default"
    assert role["rules"] == [{"apiGroups": [""], "resources": ["events"], "verbs": ["create"]}]
    documented = yaml.safe_load_all((CHART.parents[1] / "docs/examples/kubernetes-rbac.yaml").read_text())
    told = {one["kind"]: one for one in documented}
    assert told["ClusterRole"]["rules"] == rules
    assert (told["Role"]["rules"], told["Role"]["metadata"]["namespace"]) == (role["rules"], "default")


def test_the_rights_go_where_no_kubernetes_integration_runs() -> None:
    sets = ("react.enabled=true", "react.with=nova")
    found = helm.render(helm.MINIMAL, sets=sets)
    assert not [item for item in found if item["kind"].startswith("ClusterRole")]
    specs = dict(helm.pod_specs(found))
    assert specs["Deployment/vb-virtbus-react"]["automountServiceAccountToken"] is False


def test_termination_leaves_time_for_the_drain(tmp_path: Path) -> None:
    for drain in (0, 10, 12.5, 120):
        values = tmp_path / "values.yaml"
        values.write_text(f"config: {{drain_seconds: {drain}}}\n", encoding="utf-8")
        spec = helm.one(helm.render(helm.MINIMAL, values), "DaemonSet")
        assert spec["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= drain + 15


def test_no_probe_asks_about_the_broker() -> None:
    container = helm.one(helm.render(helm.MINIMAL), "DaemonSet")["spec"]["template"]["spec"]["containers"][0]
    paths = {
        kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")
    }
    assert paths == {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}


def test_probes_reach_the_address_the_agent_listens_on() -> None:
    found = helm.render(helm.MINIMAL, sets=("http.port=12345",))
    container = helm.one(found, "DaemonSet")["spec"]["template"]["spec"]["containers"][0]
    assert container["ports"] == [{"name": "metrics", "containerPort": 12345}]
    assert 'listen = "[::]:12345"' in helm.one(found, "ConfigMap")["data"]["virtbus.toml"]


# ------------------------------------------------------------------------------------- checksums

# Each changes what an agent reads; nothing else may restart one. (Secrets: test_apiserver.py has a server.)
SETTINGS = [
    (),
    ("config.bus.window=3",),
    ("config.log.level=debug",),
    ("http.port=9999",),
    ("bus.passwordKey=p",),
]
NOT_SETTINGS = [
    (),
    ("config.bus.window=3",),
    ("config.log.level=debug",),
    ("http.port=9999",),
    ("bus.passwordKey=p",),
]
NOT_SETTINGS = [
    (),
    ("podMonitor.enabled=true",),
    ("dashboard.enabled=true",),
    ("react.enabled=true", "react.with=nova"),
    ("prometheusRule.enabled=true",),
    ("networkPolicy.enabled=true",),
    ("tests.enabled=false",),
    ("config.react.min_guests=7",),
]


def _checksum(sets: tuple[str, ...]) -> str:
    daemonset = helm.one(helm.render(helm.MINIMAL, sets=sets), "DaemonSet")
    return str(daemonset["spec"]["template"]["metadata"]["annotations"]["checksum/config"])


def test_the_checksum_changes_when_the_settings_do() -> None:
    sums = [_checksum(sets) for sets in SETTINGS]
    assert all(one != other for one, other in itertools.combinations(sums, 2))


def test_the_checksum_stays_when_the_settings_do() -> None:
    assert len({_checksum(sets) for sets in NOT_SETTINGS}) == 1


def test_a_new_version_of_the_chart_alone_restarts_no_agent(tmp_path: Path) -> None:
    import shutil

    newer = tmp_path / "virtbus"
    shutil.copytree(helm.CHART, newer)
    text = (newer / "Chart.yaml").read_text(encoding="utf-8")
    (newer / "Chart.yaml").write_text(text.replace("\nversion: ", "\nversion: 9"), encoding="utf-8")
    old = helm.one(helm.render(helm.MINIMAL), "DaemonSet")
    new = helm.one(helm.objects(helm.template("4", helm.MINIMAL, chart=newer)), "DaemonSet")
    assert old["metadata"] != new["metadata"]
    assert old["spec"] == new["spec"]


# ----------------------------------------------------------------------------------------- notes


def _notes(*sets: str) -> str:
    arguments = ["install", "vb", str(helm.CHART), "--namespace", "virtbus", "--values", str(helm.MINIMAL)]
    for one in sets:
        arguments += ["--set", one]
    done = helm.run("4", *arguments, "--dry-run=client")
    assert done.returncode == 0, done.stderr
    return done.stdout[done.stdout.index("NOTES:") :]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("spool.type=emptyDir", "are LOST with the pod"),
        ("spool.initChown=false", "d /var/lib/virtbus 0700 65534 65534 -"),
        ("config.libvirt.uri=qemu+tls://host/system", "config.libvirt.uri is remote"),
        ("config.heartbeat.interval_seconds=0", "heartbeats are off"),
        ("networkPolicy.enabled=true", "networkPolicy.brokerPeers is empty"),
        ("prometheusRule.enabled=true", "VirtbusNoAgents will fire"),
    ],
)
def test_the_notes_tell_of_what_a_value_costs(setting: str, words: str) -> None:
    assert words not in _notes()
    assert words in _notes(setting)


def test_the_notes_say_how_guests_of_kubevirt_are_observed_and_as_which_user() -> None:
    assert "--set kubevirt.enabled=true" in _notes()
    told = _notes("kubevirt.enabled=true")
    assert "--set kubevirt.enabled=true" not in told
    assert "Nodes must run libvirt themselves" not in told
    assert "Agents run as 65534" not in told
    assert "Agents run as 0:" in told


def test_the_notes_say_what_is_lost_with_the_pod_of_react_and_what_is_not() -> None:
    sets = ("react.enabled=true", "react.with=kubernetes")
    words = "react.existingClaim is empty: actions that the control plane has not taken"
    assert words not in _notes()
    assert words in _notes(*sets)
    assert "are not: they are on the nodes" in _notes(*sets)
    assert words not in _notes(*sets, "react.existingClaim=react")


# ------------------------------------------------------------------------------------ network policy


def test_the_network_policy_lets_metrics_in_and_dns_and_the_broker_out_and_nothing_else() -> None:
    sets = ("networkPolicy.enabled=true", "networkPolicy.brokerPorts={5671}")
    found = helm.render(helm.MINIMAL, sets=sets)
    spec = helm.one(found, "NetworkPolicy", "vb-virtbus-agent")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert [rule["ports"] for rule in spec["ingress"]] == [[{"port": "metrics", "protocol": "TCP"}]]
    out = [(port["port"], port["protocol"]) for rule in spec["egress"] for port in rule["ports"]]
    assert out == [(53, "UDP"), (53, "TCP"), (5671, "TCP")]
    labels = helm.one(found, "DaemonSet")["spec"]["template"]["metadata"]["labels"]
    assert spec["podSelector"]["matchLabels"].items() <= labels.items()


def test_the_network_policy_of_react_lets_metrics_in_and_that_of_the_doctor_nothing() -> None:
    found = helm.render(helm.CHART / "ci" / "everything-values.yaml")
    spec = helm.one(found, "NetworkPolicy", "vb-ioerrors-react")["spec"]
    assert [rule["ports"] for rule in spec["ingress"]] == [[{"port": "metrics", "protocol": "TCP"}]]
    agents = helm.one(found, "NetworkPolicy", "vb-ioerrors-agent")["spec"]
    doctor = helm.one(found, "NetworkPolicy", "vb-ioerrors-doctor")["spec"]
    assert (doctor["policyTypes"], doctor["ingress"]) == (["Ingress", "Egress"], [])
    assert doctor["egress"] == agents["egress"]


class _Once(yaml.SafeLoader):
    """Refuses a key that comes twice, as many tools that read what helm rendered do."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> Object:
    keys = [loader.construct_object(key) for key, _ in node.value]
    assert len(keys) == len(set(keys)), f"twice: {sorted(key for key in keys if keys.count(key) > 1)}"
    return loader.construct_mapping(node, deep=True)


_Once.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def test_a_label_or_annotation_that_is_set_twice_stands_once_and_no_selector_loses_its_pods(
    tmp_path: Path,
) -> None:
    labels = {"app.kubernetes.io/name": "x", "app.kubernetes.io/component": "x", "helm.sh/chart": "x"}
    clash = {"team": "own", **labels}
    sums = {"checksum/config": "x", "kubectl.kubernetes.io/default-container": "mine"}
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump({
        "commonLabels": {"team": "common", **labels}, "commonAnnotations": {"team": "common", **sums},
        "podLabels": clash, "podAnnotations": {"team": "own", **sums},
        "react": {"enabled": True, "with": "kubernetes", "podAnnotations": {"team": "own", **sums}},
        "podMonitor": {"enabled": True, "labels": clash}, "serviceMonitor": {"labels": clash},
        "prometheusRule": {"enabled": True, "labels": clash}, "dashboard": {"enabled": True, "labels": clash},
    }))  # fmt: skip
    text = helm.template("4", helm.MINIMAL, values)
    found = [one for one in yaml.load_all(text, _Once) if one]
    for item in found:
        assert item["metadata"]["labels"]["app.kubernetes.io/name"] == "virtbus"
        if (template := item.get("spec", {}).get("template")) is not None:
            own = template["metadata"]
            assert item["spec"]["selector"]["matchLabels"].items() <= own["labels"].items()
            assert len(own["annotations"]["checksum/config"]) == 64
            assert own["annotations"]["team"] == "own"
    agent = helm.one(found, "DaemonSet")["spec"]["template"]["metadata"]
    assert agent["annotations"]["kubectl.kubernetes.io/default-container"] == "mine"
    assert agent["labels"]["team"] == "own"
    assert helm.one(found, "PodMonitor", "vb-virtbus")["metadata"]["labels"]["team"] == "own"
