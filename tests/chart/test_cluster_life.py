"""What a cluster does to a release: taints, another uid, nodes without libvirt, nulls, parents."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart import helm
from tests.chart.helm import CHART, CI_VALUES, Object
from tests.chart.tools import HELMS
from tests.conftest import need

EVERYTHING = CHART / "ci" / "everything-values.yaml"
RELEASED = sorted((Path(__file__).parent / "released").glob("*.yaml"))
every_helm = pytest.mark.parametrize("major", HELMS, ids=lambda major: f"helm{major}")


def _pod(*values: Path, sets: tuple[str, ...] = ()) -> Object:
    spec: Object = helm.one(helm.render(*values, sets=sets), "DaemonSet")["spec"]["template"]["spec"]
    return spec


# ---------------------------------------------------------------------------- sick nodes


def test_an_agent_stays_on_a_node_that_react_has_marked() -> None:
    for sets in ((), ("tolerations[0].key=site-only",), ("config.react.kubernetes.taint=example.org/sick",)):
        keys = [one.get("key") for one in _pod(helm.MINIMAL, sets=sets)["tolerations"]]
        assert ("example.org/sick" if "config" in "".join(sets) else "virtbus.io/storage-unhealthy") in keys


def test_an_agent_stays_on_a_sick_node_by_default_and_the_doctor_may_follow() -> None:
    found = helm.render(helm.MINIMAL)
    specs = dict(helm.pod_specs(found))
    for name in ("DaemonSet/vb-virtbus", "Pod/vb-virtbus-doctor"):
        assert {"operator": "Exists", "effect": "NoSchedule"} in specs[name]["tolerations"]


# ---------------------------------------------------------------------------- another uid


def _hand_over(folder: Path, uid: int) -> subprocess.CompletedProcess[str]:
    """The init container's own command on this folder, as root with the capability CHOWN alone."""
    (init,) = _pod(helm.MINIMAL, sets=(f"runAsUser={uid}", f"runAsGroup={uid}"))["initContainers"]
    command = [word.replace("/var/lib/virtbus", str(folder)) for word in init["command"]]
    assert init["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
    return subprocess.run(
        ["setpriv", "--bounding-set=-all,+chown", "--inh-caps=-all", *command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def _old_spool(folder: Path, uid: int) -> None:
    folder.mkdir()
    for name in ("agent-id", "spool.db", "spool.db-wal", ".lock"):
        (folder / name).write_text("x")
        (folder / name).chmod(0o600)
        os.chown(folder / name, uid, uid)
    folder.chmod(0o700)
    os.chown(folder, uid, uid)


def test_a_change_of_uid_hands_over_the_folder_and_its_files(tmp_path: Path) -> None:
    need([] if os.geteuid() == 0 else ["root, to change owners"])
    spool = tmp_path / "spool"
    _old_spool(spool, 65534)
    for _ in range(2):  # the second start finds its own files
        done = _hand_over(spool, 65532)
        assert (done.returncode, done.stderr) == (0, "")
        owners = {path.name: path.stat().st_uid for path in (spool, *spool.iterdir())}
        assert set(owners.values()) == {65532}, owners
    os.chown(spool, 65534, 65534)  # an older chart's init container changed the folder alone
    assert _hand_over(spool, 65534).returncode == 0
    assert {path.stat().st_uid for path in spool.iterdir()} == {65534}


def test_no_link_that_the_old_user_left_gives_away_a_file_of_the_host(tmp_path: Path) -> None:
    need([] if os.geteuid() == 0 else ["root, to change owners"])
    spool, shadow, passwd = tmp_path / "spool", tmp_path / "shadow", tmp_path / "passwd"
    _old_spool(spool, 65534)
    for file in (shadow, passwd):
        file.write_text("the host's")
    (spool / "soft").symlink_to(shadow)
    (spool / "hard").hardlink_to(passwd)
    assert _hand_over(spool, 65532).returncode == 0
    assert (shadow.stat().st_uid, passwd.stat().st_uid) == (0, 0)


# ---------------------------------------------------------------------------- mixed clusters


@pytest.mark.parametrize("values", CI_VALUES, ids=lambda path: path.stem.removesuffix("-values"))
def test_every_pod_goes_to_linux_nodes_and_none_waits_for_a_folder_of_libvirt(values: Path) -> None:
    for where, spec in helm.pod_specs(helm.render(values)):
        assert spec["nodeSelector"]["kubernetes.io/os"] == "linux", where
        for volume in spec["volumes"]:
            if volume["name"] == "libvirt":
                assert volume["hostPath"]["type"] == "DirectoryOrCreate"


@pytest.mark.parametrize(
    ("sets", "optional"),
    [
        ((), True),
        (("nodeSelector.kvm=yes",), False),
        (("nodeSelector.kvm=yes", "config.libvirt.optional=true"), True),
        (("config.libvirt.optional=false",), False),
    ],
)
def test_libvirt_is_expected_where_nodes_were_chosen(sets: tuple[str, ...], optional: bool) -> None:
    text = helm.one(helm.render(helm.MINIMAL, sets=sets), "ConfigMap")["data"]["virtbus.toml"]
    assert ("optional = true" in text) is optional


def test_the_doctor_runs_where_an_agent_runs_also_beside_an_affinity_of_the_site() -> None:
    for values in (helm.MINIMAL, EVERYTHING):
        found = helm.render(values)
        doctor = next(spec for where, spec in helm.pod_specs(found) if where.startswith("Pod/"))
        agent = helm.one(found, "DaemonSet")["spec"]["template"]
        (near,) = doctor["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert near["topologyKey"] == "kubernetes.io/hostname"
        assert near["labelSelector"]["matchLabels"].items() <= agent["metadata"]["labels"].items()
        assert doctor["securityContext"] == agent["spec"]["securityContext"]
        assert doctor["tolerations"] == agent["spec"]["tolerations"]
        assert ("nodeAffinity" in doctor["affinity"]) is (values == EVERYTHING)


# ---------------------------------------------------------------------------- nulls and old values


def _paths(tree: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        name = f"{path}{key.replace('.', chr(92) + '.')}"
        found += [name, *(_paths(value, f"{name}.") if isinstance(value, dict) else [])]
    return found


def test_null_means_the_default_or_is_refused_by_name() -> None:
    paths = _paths(yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")))
    assert len(paths) > 100
    default = helm.template("4", helm.MINIMAL)

    def wrong(path: str) -> str | None:
        # In a file, as GitOps tools write it; the Secret's name stays unless it is the one in question.
        done = helm.run(
            "4", "template", helm.RELEASE, str(CHART), "--namespace", helm.NAMESPACE,
            "--set", "bus.existingSecret=virtbus-bus", "--set", f"{path}=null",
        )  # fmt: skip
        if done.returncode:
            named = path.rpartition(".")[2] in done.stderr
            return None if named and "nil pointer" not in done.stderr else f"{path}: {done.stderr[-300:]}"
        return None if done.stdout == default else f"{path}: another render"

    with ThreadPoolExecutor(2) as pool:
        assert [one for one in pool.map(wrong, paths) if one] == []


@every_helm
@pytest.mark.parametrize("values", CI_VALUES, ids=lambda path: path.stem.removesuffix("-values"))
@pytest.mark.parametrize("released", RELEASED, ids=lambda path: path.stem)
def test_values_of_an_older_release_render_what_the_defaults_add(
    released: Path, values: Path, major: str, tmp_path: Path
) -> None:
    """`helm upgrade --reuse-values`: the older release's defaults stand in place of this chart's."""
    chart = tmp_path / "virtbus"
    shutil.copytree(CHART, chart)
    shutil.copyfile(released, chart / "values.yaml")
    old = yaml.safe_load(released.read_text(encoding="utf-8"))
    now = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    changed = {"http.host": old["http"]["host"], "tolerations": old["tolerations"]}
    same = tmp_path / "same.yaml"  # what both know and the older release set otherwise
    same.write_text(
        yaml.safe_dump({"http": {"host": changed["http.host"]}, "tolerations": changed["tolerations"]})
    )
    assert now["http"]["host"] != changed["http.host"]
    reused = helm.objects(helm.template(major, values, chart=chart))
    assert reused == helm.objects(helm.template(major, same, values))


def test_the_values_of_every_release_are_kept() -> None:
    assert [path.stem for path in RELEASED][:1] == ["0.1.0"]


# ---------------------------------------------------------------------------- a parent chart


def _parent(folder: Path, dependency: Object, values: Object) -> Path:
    chart = folder / "parent"
    shutil.copytree(CHART, chart / "charts" / "virtbus")
    content = {"apiVersion": "v2", "name": "parent", "version": "0.1.0", "dependencies": [dependency]}
    (chart / "Chart.yaml").write_text(yaml.safe_dump(content))
    (chart / "values.yaml").write_text(yaml.safe_dump(values))
    return chart


@every_helm
@pytest.mark.parametrize("enabled", [True, False])
def test_a_parents_condition_turns_the_chart_on_and_off(enabled: bool, major: str, tmp_path: Path) -> None:
    dependency = {"name": "virtbus", "version": "0.1.0", "condition": "virtbus.enabled"}
    values = {"virtbus": {"enabled": enabled, "bus": {"existingSecret": "s"}}}
    found = helm.objects(helm.template(major, chart=_parent(tmp_path, dependency, values)))
    assert ("DaemonSet" in {one["kind"] for one in found}) is enabled


@every_helm
def test_a_parents_global_values_name_registry_and_pull_secrets(major: str, tmp_path: Path) -> None:
    values = {
        "global": {"imageRegistry": "mirror.example:5000/", "imagePullSecrets": ["one", {"name": "two"}]},
        "virtbus": {"bus": {"existingSecret": "s"}, "imagePullSecrets": [{"name": "two"}]},
    }
    chart = _parent(tmp_path, {"name": "virtbus", "version": "0.1.0"}, values)
    for _, spec in helm.pod_specs(helm.objects(helm.template(major, chart=chart))):
        assert spec["imagePullSecrets"] == [{"name": "two"}, {"name": "one"}]
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert container["image"] == "mirror.example:5000/virtbus:0.1.0"


# ---------------------------------------------------------------------------- names and paths


@pytest.mark.parametrize("release", ["a.b.c", "123", "1e3", "true", "x" * 53, "x" * 52 + "y"])
def test_any_name_that_helm_takes_makes_names_that_kubernetes_takes(release: str) -> None:
    done = helm.run("4", "template", release, str(CHART), "--namespace", "n", "--values", str(EVERYTHING))
    assert done.returncode == 0, done.stderr
    for item in helm.objects(done.stdout):
        name = item["metadata"]["name"]
        assert isinstance(name, str)
        assert len(name) <= 63
        assert item["kind"].startswith(("Role", "ClusterRole")) or re.fullmatch(
            r"[a-z][a-z0-9-]*[a-z0-9]", name
        )
        labels = item["metadata"].get("labels", {})
        assert all(isinstance(value, str) for value in labels.values()), labels


def test_long_names_that_differ_at_their_end_stay_different() -> None:
    names = set()
    for end in "ab":
        done = helm.run("4", "template", "x" * 52 + end, str(CHART), "--values", str(helm.MINIMAL))
        names.add(helm.one(helm.objects(done.stdout), "DaemonSet")["metadata"]["name"])
    assert len(names) == 2


def test_a_folder_whose_name_only_begins_like_libvirts_is_another_folder() -> None:
    _pod(helm.MINIMAL, sets=("spool.hostPath=/run/libvirt-virtbus",))
    done = helm.run(
        "4", "template", "vb", str(CHART), "--values", str(helm.MINIMAL),
        "--set", "spool.hostPath=/run//libvirt/./spool",
    )  # fmt: skip
    assert "lies in libvirt.socketDir" in done.stderr


# ---------------------------------------------------------------------------- react and its metrics


def test_react_has_resources_probes_and_metrics_under_a_job_of_its_own() -> None:
    sets = ("react.enabled=true", "react.with=nova", "podMonitor.enabled=true")
    found = helm.render(helm.MINIMAL, sets=sets)
    (container,) = helm.one(found, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["memory"]
    assert container["ports"] == [{"name": "metrics", "containerPort": 9467}]
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "metrics"}
    text = helm.one(found, "ConfigMap", "vb-virtbus-react")["data"]["virtbus.toml"]
    assert 'listen = "[::]:9467"' in text
    (endpoint,) = helm.one(found, "PodMonitor", "vb-virtbus-react")["spec"]["podMetricsEndpoints"]
    assert {"targetLabel": "job", "replacement": "virtbus-react"} in endpoint["relabelings"]


@pytest.mark.parametrize("kind", ["podMonitor", "serviceMonitor"])
def test_an_alerts_instance_is_the_node_and_never_a_pods_address(kind: str) -> None:
    found = helm.render(helm.MINIMAL, sets=(f"{kind}.enabled=true",))
    spec = helm.one(found, kind[0].upper() + kind[1:])["spec"]
    (endpoint,) = spec["podMetricsEndpoints" if kind == "podMonitor" else "endpoints"]
    node = ["__meta_kubernetes_pod_node_name"]
    assert {"sourceLabels": node, "targetLabel": "instance"} in endpoint["relabelings"]
    assert {"sourceLabels": node, "targetLabel": "node"} in endpoint["relabelings"]


def test_what_platform_teams_set_arrives() -> None:
    found = helm.render(EVERYTHING)
    daemonset = helm.one(found, "DaemonSet")
    assert daemonset["spec"]["updateStrategy"] == {"type": "OnDelete"}
    assert (daemonset["spec"]["minReadySeconds"], daemonset["spec"]["revisionHistoryLimit"]) == (10, 3)
    assert daemonset["metadata"]["annotations"]["example.org/rollout"] == "by-hand"
    assert [one["name"] for one in daemonset["spec"]["template"]["spec"]["containers"]] == [
        "agent",
        "sidecar",
    ]
    for where, spec in helm.pod_specs(found):
        assert spec["dnsPolicy"] == "None", where
        assert spec["dnsConfig"] == {"nameservers": ["192.0.2.53"]}
        assert spec["hostAliases"] == [{"ip": "192.0.2.7", "hostnames": ["rabbitmq.example"]}]
    for item in found:
        if item["metadata"]["name"].endswith("-note"):
            continue  # an extra manifest is the site's own
        assert item["metadata"]["annotations"]["example.org/contact"] == "compute", item["kind"]
    monitor = helm.one(found, "ServiceMonitor", "vb-ioerrors")
    assert monitor["metadata"]["namespace"] == "monitoring"
    assert monitor["spec"]["namespaceSelector"] == {"matchNames": ["virtbus"]}
    (endpoint,) = monitor["spec"]["endpoints"]
    assert {"targetLabel": "cluster", "replacement": "one"} in endpoint["relabelings"]
    assert endpoint["metricRelabelings"][0]["action"] == "drop"
    board = helm.one(found, "ConfigMap", "vb-ioerrors-dashboard")
    assert board["metadata"]["annotations"]["grafana_folder"] == "Compute"
    for policy in (one for one in found if one["kind"] == "NetworkPolicy"):
        assert {"ports": [{"port": 16514, "protocol": "TCP"}]} in policy["spec"]["egress"]
