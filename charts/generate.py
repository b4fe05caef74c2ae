"""Makes the chart's values.schema.json and README.md; `--check` only says whether they are fresh.

What the agent can be told (`config`) comes from its own configuration model, so that there is no second
truth; what only Kubernetes knows is described here, and its defaults stand in values.yaml.

    python charts/generate.py [--check]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from virtbus import config

CHART = Path(__file__).resolve().parent / "virtbus"
DRAFT = "http://json-schema.org/draft-07/schema#"  # what Helm 3's validator reads; Helm 4's reads it too

# Settings that the chart itself writes, from other values: naming them in `config` is an error.
OWNED = {
    "Config": ("state_dir", "http", "control"),
    "Bus": ("url", "url_file", "password_file"),
    "Tls": ("ca_file", "cert_file", "key_file"),
    "React": ("state_dir", "listen"),
}
# A ConfigMap holds no secret: options with such names belong into files or a Secret's environment.
SECRETS = r"password|secret|jaas|token|\.pem$"

Schema = dict[str, Any]


def text(description: str, **more: Any) -> Schema:
    """A string."""
    return {"type": "string", "description": description, **more}


def flag(description: str) -> Schema:
    """A boolean."""
    return {"type": "boolean", "description": description}


def whole(description: str, least: int = 0, **more: Any) -> Schema:
    """An integer."""
    return {"type": "integer", "minimum": least, "description": description, **more}


def strict(description: str, **properties: Schema) -> Schema:
    """A table that knows all its keys."""
    return {
        "type": "object",
        "description": description,
        "additionalProperties": False,
        "properties": properties,
    }


def needs(*keys: str) -> Schema:
    """Keys without which a table means nothing: null, which takes a key away, is refused by name."""
    return {"required": list(keys)}


def words(description: str) -> Schema:
    """Labels or annotations: text to text."""
    return {"type": "object", "description": description, "additionalProperties": {"type": "string"}}


def kubernetes(kind: str, description: str) -> Schema:
    """A piece of Kubernetes' own API, checked by its server: "object", or "array" of objects."""
    if kind == "array":
        return {"type": "array", "description": description, "items": {"type": "object"}}
    return {"type": "object", "description": description}


def named(description: str) -> Schema:
    """A list of things that each need a name, as in `env`, `volumes` and `volumeMounts`."""
    item = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string", "minLength": 1}},
    }
    return {"type": "array", "description": description, "items": item}


def resources(whose: str) -> Schema:
    """Requests and limits."""
    amounts = {"type": "object", "additionalProperties": {"type": ["string", "number"]}}
    return strict(f"Requests and limits of {whose}", requests=amounts, limits=amounts)


def probe(description: str) -> Schema:
    """Times of a probe; what it asks for is not for choice."""
    return strict(
        description,
        initialDelaySeconds=whole("Wait before the first"),
        periodSeconds=whole("Between two", 1),
        timeoutSeconds=whole("For an answer", 1),
        failureThreshold=whole("Failures that count", 1),
    )


def scheduling(whose: str) -> Schema:
    """Where pods may run."""
    return {
        "nodeSelector": words(f"Labels of the nodes for {whose}"),
        "affinity": kubernetes("object", f"Affinity of {whose}"),
        "tolerations": kubernetes("array", f"Taints that {whose} tolerates"),
    }


# An image's reference without tag and digest. The API server takes anything; kubelet would say InvalidImageName.
_HOST = r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?)(:[0-9]{1,5})?"
_PART = r"[a-z0-9]+([._-]+[a-z0-9]+)*"
REPOSITORY = rf"^({_HOST}/)?{_PART}(/{_PART})*$"
REGISTRY = rf"^({_HOST}(/{_PART})*/?)?$"


def image(description: str) -> Schema:
    """An image by tag or digest."""
    return strict(
        description,
        repository=text("Registry and name, without tag", minLength=1, pattern=REPOSITORY),
        tag=text("Tag; default: the chart's appVersion", pattern=r"^[A-Za-z0-9_.-]*$"),
        digest=text("Digest; wins over the tag", pattern=r"^(sha256:[0-9a-f]{64})?$"),
        pullPolicy=text("When to pull", enum=["Always", "IfNotPresent", "Never"]),
    )


NAME = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$"
HOST_FOLDER = r"^/[^:]+$"
QUANTITY = r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$"


def monitor(kind: str) -> Schema:
    """A PodMonitor or ServiceMonitor."""
    return strict(
        f"A {kind} of the Prometheus operator",
        enabled=flag(f"Make a {kind}; `podMonitor` suits, `serviceMonitor` adds a headless Service"),
        interval=text("Between two scrapes", pattern=r"^[0-9]+(s|m)$"),
        labels=words("Labels by which your Prometheus finds it"),
        namespace=text("Its namespace; default: the release's", pattern=NAME),
        relabelings=kubernetes(
            "array", "Further relabelings; `instance` and `node` are the node's name already"
        ),
        metricRelabelings=kubernetes("array", "Relabelings of the samples"),
    )


def alerts() -> list[str]:
    """The names of the alerts."""
    import yaml

    groups = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    return [rule["alert"] for group in groups for rule in group["rules"]]


def chart_values() -> dict[str, Schema]:
    """Everything but `config`: what only the chart knows."""
    return {
        "enabled": flag("For `condition: virtbus.enabled` of a parent chart"),
        "global": {
            "type": "object",
            "description": "Values of a parent chart",
            "properties": {
                "imageRegistry": text("Instead of the registry of each image", pattern=REGISTRY),
                "imagePullSecrets": {
                    "type": "array",
                    "description": "Secrets to pull with, by name or as `{name: …}`; beside `imagePullSecrets`",
                    "items": {"type": ["string", "object"]},
                },
            },
        },
        "nameOverride": text("Instead of the chart's name; also the `job` label of metrics", pattern=NAME, maxLength=50),
        "fullnameOverride": text("Instead of release and chart name", pattern=NAME, maxLength=50),
        "commonLabels": words("Labels on everything"),
        "commonAnnotations": words("Annotations on everything"),
        "image": image("The image"),
        "imagePullSecrets": named("Secrets to pull with"),
        "hostAliases": kubernetes("array", "Lines for /etc/hosts of all pods, as in a pod's `hostAliases`"),
        "dnsPolicy": text("DNS policy of all pods; default: the cluster's", enum=["", "ClusterFirst", "Default", "None"]),
        "dnsConfig": kubernetes("object", "As in a pod's `dnsConfig`, for all pods"),
        "bus": needs("existingSecret")
        | strict(
            "The broker: where its secrets are",
            existingSecret=text("**Required.** Secret in the release's namespace that holds the bus URL", pattern=NAME),
            urlKey=text("Its key with the URL (`amqps://…`, `kafkas://…`)", minLength=1),
            passwordKey=text("Its key with the password, when it is not in the URL; read again at each connection"),
            tls=strict(
                "TLS files; the host name is always verified",
                existingSecret=text("Secret with them; empty: the system's CAs", pattern=NAME),
                caKey=text("Its key with the CA certificates; empty: the system's"),
                certKey=text("Its key with the client certificate; empty: none"),
                keyKey=text("Its key with the client's private key"),
            ),
        ),
        "runAsUser": whole("Uid of agents; libvirtd must know it, so it needs an account on the node", 1),
        "runAsGroup": whole("Gid of agents; libvirtd must know it too", 1),
        "libvirt": strict(
            "How the agent reaches libvirt",
            socketDir=text("The host's folder of libvirt's sockets; mounted read-only at /run/libvirt", pattern=HOST_FOLDER),
            groups={
                "type": "array",
                "description": "Numeric groups of the host that may use the socket (only where `unix_sock_ro_perms` is not 0777)",
                "items": {"type": "integer", "minimum": 1},
            },
        ),
        "kubevirt": strict(
            "Agents on KubeVirt's nodes; what that means for security: docs/kubevirt.md",
            enabled=flag("Observe the libvirt of every virt-launcher pod: agents run as root with DAC_OVERRIDE alone, and /run/libvirt is not mounted"),
            podsDir=text("kubelet's folder of pods on the host; mounted read-only at /var/lib/kubelet/pods", pattern=HOST_FOLDER),
            withLibvirt=flag("Observe the host's own libvirt as well: mount libvirt.socketDir, too"),
        ),
        "spool": strict(
            "Where unconfirmed events are kept",
            type=text("hostPath outlives the pod; emptyDir is **lost with the pod**, events included", enum=["hostPath", "emptyDir"]),
            hostPath=text("The host's folder; one for each release", pattern=HOST_FOLDER),
            initChown=flag("An init container (root, CHOWN only) gives the folder to runAsUser; false: you prepare it"),
            sizeLimit=text("Limit of the emptyDir", pattern=QUANTITY),
        ),
        "machineIdFile": text("The host's machine id, by which a cloned disk is noticed; empty: not mounted", pattern=r"^(/[^:]+)?$"),
        "http": strict(
            "/metrics, /livez and /readyz inside the pod; kubelet's probes can't reach loopback",
            host=text("Address to listen on; `[::]` for IPv6", pattern=r"^(\[[0-9a-fA-F:.]+\]|[0-9.]+)$"),
            port=whole("Port", 1024, maximum=65535),
        ),
        **scheduling("agents"),
        "priorityClassName": text("Priority class of agents, e.g. system-node-critical", pattern=NAME),
        "updateStrategy": strict(
            "How agents are replaced",
            type=text("OnDelete: by hand, node by node", enum=["RollingUpdate", "OnDelete"]),
            maxUnavailable={
                "type": ["string", "integer"],
                "description": "Agents that may be replaced at the same time",
                "pattern": "^([1-9][0-9]?|100)%$",
                "minimum": 1,
            },
        ),
        "minReadySeconds": whole("A new agent counts as available after so long"),
        "revisionHistoryLimit": whole("Old revisions that are kept for a rollback"),
        "resources": resources("an agent"),
        "terminationGracePeriodSeconds": {
            "type": ["integer", "null"],
            "minimum": 1,
            "description": "Default: config.drain_seconds + 20; never less than the drain + 10",
        },
        "seLinuxOptions": kubernetes("object", "SELinux context of agents, where the policy forbids the socket: see docs/kubernetes.md"),
        "probes": strict(
            "Times of the probes; a broker outage fails none of them",
            startup=probe("GET /livez until the agent is up"),
            liveness=probe("GET /livez: fails only for a dead thread"),
            readiness=probe("GET /readyz: libvirt observed and spool writable"),
        ),
        "daemonSetAnnotations": words("Annotations of the DaemonSet"),
        "podAnnotations": words("Annotations of agents"),
        "podLabels": words("Labels of agents"),
        "serviceAccount": strict(
            "The agents' account; it has no rights and no token",
            create=flag("Make one"),
            name=text("Its name; default: the release's", pattern=NAME),
            annotations=words("Its annotations"),
        ),
        "extraEnv": named("Environment of agents, as in a container's `env`; VIRTBUS_… overrides `config`"),
        "envFrom": kubernetes("array", "As in a container's `envFrom`"),
        "extraVolumes": named("Volumes of agents"),
        "extraVolumeMounts": named("Volume mounts of agents"),
        "extraContainers": named("Further containers of the agents' pods"),
        "extraManifests": kubernetes("array", "Further objects of the release; templates are evaluated"),
        "podMonitor": monitor("PodMonitor"),
        "serviceMonitor": monitor("ServiceMonitor"),
        "prometheusRule": strict(
            "Alerts, as a PrometheusRule of the Prometheus operator",
            enabled=flag("Make it"),
            namespace=text("Its namespace; default: the release's", pattern=NAME),
            labels=words("Labels by which your Prometheus finds it"),
            disabled={
                "type": "array",
                "description": "Names of alerts to leave out",
                "items": {"type": "string", "enum": alerts()},
            },
            extraRules=kubernetes("array", "Further rules, as in a group's `rules`"),
            runbookUrl=text("Address of the page that the alerts link into", pattern="^https?://"),
        ),
        "dashboard": strict(
            "Grafana dashboard, as a ConfigMap for Grafana's sidecar",
            enabled=flag("Make it"),
            namespace=text("Its namespace; default: the release's", pattern=NAME),
            labels=words("Labels by which the sidecar finds it"),
            annotations=words("Its annotations, e.g. `grafana_folder`"),
        ),
        "networkPolicy": strict(
            "Metrics in; DNS and broker out; nothing else",
            enabled=flag("Make it (needs a network plugin that enforces it)"),
            brokerPorts={
                "type": "array",
                "minItems": 1,
                "description": "Ports of the broker",
                "items": {"type": "integer", "minimum": 1, "maximum": 65535},
            },
            brokerPeers=kubernetes("array", "NetworkPolicy peers of the broker; empty: any address"),
            metricsFrom=kubernetes("array", "NetworkPolicy peers that may scrape; empty: any"),
            reactPorts={
                "type": "array",
                "minItems": 1,
                "description": "Ports of the control plane that `virtbus react` acts on",
                "items": {"type": "integer", "minimum": 1, "maximum": 65535},
            },
            extraEgress=kubernetes("array", "Further egress rules of all pods"),
        ),
        "tests": strict("`helm test`", enabled=flag("A pod that runs `virtbus doctor` on a node with an agent")),
        "react": strict(
            "`virtbus react` as a Deployment of one replica: acts on events, with rights of its own",
            enabled=flag("Make it"),
            **{"with": text("The integration to run, e.g. `kubernetes`", pattern="^([a-z][a-z0-9_-]*)?$")},
            group=text("Durable group to consume as; default: react-NAME"),
            image=image("Its image, with a repository of its own; else as in `image`"),
            existingClaim=text("PersistentVolumeClaim for its state; empty: an emptyDir, **lost with the pod**", pattern=NAME),
            extraArgs={"type": "array", "description": "Further arguments", "items": {"type": "string"}},
            extraEnv=named("Its environment, as in a container's `env`"),
            envFrom=kubernetes("array", "As in a container's `envFrom`"),
            extraVolumes=named("Its volumes"),
            extraVolumeMounts=named("Its volume mounts"),
            http=strict("Its /metrics, /livez and /readyz, on `http.host`", port=whole("Port", 1024, maximum=65535)),
            probes=strict(
                "Times of its probes; a broker outage fails none of them",
                startup=probe("GET /livez until it is up"),
                liveness=probe("GET /livez: fails only for a thread that has ended"),
                readiness=probe("GET /readyz: what is held was read"),
            ),
            kubernetesRbac=flag("With the kubernetes integration: rights to mark nodes, and the account's token"),
            resources=resources("it"),
            **scheduling("it"),
            podAnnotations=words("Its annotations"),
            terminationGracePeriodSeconds=whole("To end an action that has begun", 1),
        ),
    }  # fmt: skip


def agent_settings() -> Schema:
    """The schema of `config`: the agent's model without what the chart owns."""
    model = deepcopy(config.json_schema())
    definitions: dict[str, Schema] = model["$defs"]
    for name, owned in OWNED.items():
        for key in owned:
            del definitions[name]["properties"][key]
    for name in ("Kafka", "React"):
        definitions[name]["properties"]["options"]["patternProperties"] = {SECRETS: False}
    schema: Schema = _inlined(definitions["Config"], definitions)
    schema["description"] = "The agent's settings, as in virtbus.toml; the defaults are the agent's own"
    return schema


def _inlined(node: Any, definitions: Mapping[str, Schema]) -> Any:
    """Without references, which older validators follow badly, and without titles."""
    if isinstance(node, Mapping):
        if "$ref" in node:
            more = {key: value for key, value in node.items() if key == "description"}
            return _inlined(definitions[node["$ref"].rpartition("/")[2]], definitions) | more
        return {
            key: _inlined(value, definitions)
            for key, value in node.items()
            if not (key == "title" and isinstance(value, str))
        }
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    return node


def values_schema() -> Schema:
    """The whole schema of the chart's values."""
    return {
        "$schema": DRAFT,
        "title": "Values of the virtbus chart",
        "type": "object",
        "additionalProperties": False,
        "required": ["bus"],
        "properties": {**chart_values(), "config": agent_settings()},
    }


# -------------------------------------------------------------------------------------------- README

HEAD = """\
# The virtbus Helm chart

One agent on every compute host; every guest I/O error that libvirt reports becomes a CloudEvent on
RabbitMQ or Kafka. How to run it, Pod Security, SELinux and polkit: `docs/kubernetes.md`.

    kubectl create secret generic virtbus-bus --namespace virtbus \\
      --from-literal=url='amqps://virtbus:password@rabbitmq.example:5671//'
    helm install virtbus charts/virtbus --namespace virtbus --set bus.existingSecret=virtbus-bus

Nodes must run libvirt (plain KVM nodes, OpenStack-Helm), or be KubeVirt's or Harvester's (`kubevirt.enabled`, see
docs/kubevirt.md).

This page is made by `python charts/generate.py` from values.yaml and values.schema.json.
"""


def readme() -> str:
    """The chart's README: every value, its default and its meaning."""
    import yaml

    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    lines = [HEAD, "## Values\n", "| value | default | meaning |", "|---|---|---|"]
    for key, node in sorted(_leaves({"properties": chart_values()})):
        value: Any = defaults
        for part in key.split("."):
            value = value[part] if isinstance(value, Mapping) and part in value else None
        lines.append(f"| `{key}` | {_code(value)} | {_meaning(node)} |")
    lines += [
        "",
        "## Settings of the agent\n",
        "Below `config`, as in virtbus.toml. The chart writes `state_dir`, `http`, `control` and the file names of",
        "secrets itself. A setting can also be given as `VIRTBUS_…` in `extraEnv`.\n",
        "| value | default | meaning |",
        "|---|---|---|",
    ]
    for key, node in sorted(_leaves(agent_settings(), "config.")):
        lines.append(f"| `{key}` | {_code(node.get('default'))} | {_meaning(node)} |")
    return "\n".join(lines) + "\n"


def _leaves(node: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    for name, child in node.get("properties", {}).items():
        if "properties" in child:
            yield from _leaves(child, f"{path}{name}.")
        else:
            yield f"{path}{name}", child


def _code(value: object) -> str:
    return "" if value in (None, "") else f"`{json.dumps(value)}`"


def _meaning(node: Schema) -> str:
    words = str(node.get("description", ""))
    if "enum" in node:
        words += " (" + ", ".join(f"`{value}`" for value in node["enum"]) + ")"
    return words.replace("|", "\\|")


DEFAULTS = """\
# values.yaml once more, made by charts/generate.py: templates can't read that one. They fill in what was set to
# null, and what an older release did not have, where `helm upgrade --reuse-values` brings its values along.

"""


def files() -> dict[Path, str]:
    """What is made here: path → content."""
    schema = json.dumps(values_schema(), indent=2, ensure_ascii=False) + "\n"
    defaults = DEFAULTS + (CHART / "values.yaml").read_text(encoding="utf-8").partition("\n\n")[2]
    return {
        CHART / "values.schema.json": schema,
        CHART / "README.md": readme(),
        CHART / "files" / "defaults.yaml": defaults,
    }


def stale() -> list[str]:
    """Names of the files that are not what they would be if they were made now."""
    return [
        path.name
        for path, content in files().items()
        if not path.exists() or path.read_text(encoding="utf-8") != content
    ]


def main() -> None:
    """Write the files, or with --check only tell."""
    if sys.argv[1:] == ["--check"]:
        old = stale()
        sys.exit(f"stale: {', '.join(old)}; run python charts/generate.py" if old else 0)
    for path, content in files().items():
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
