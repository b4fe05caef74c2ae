"""Settings → the parts' own options: the one place that knows both."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

from virtbus import bus, plugins
from virtbus.agent.incidents import IncidentLimits
from virtbus.bus import Bus, BusOptions
from virtbus.config import Config, bus_url
from virtbus.sources import Source, SourceFactory, SourceOptions
from virtbus.spool import SpoolLimits

_PR_SET_DUMPABLE = 4  # <linux/prctl.h>


def spool_limits(config: Config) -> SpoolLimits:
    """The spool's bounds."""
    return SpoolLimits(max_bytes=config.spool.max_bytes, max_age_seconds=config.spool.max_age_seconds)


def incident_limits(config: Config) -> IncidentLimits:
    """How errors are folded."""
    settings = config.incidents
    return IncidentLimits(
        fold=settings.fold,
        first_window_seconds=settings.first_window_seconds,
        max_window_seconds=settings.max_window_seconds,
        quiet_seconds=settings.quiet_seconds,
        max_open=settings.max_open,
        flapping_pauses=settings.flapping_pauses,
        flapping_window_seconds=settings.flapping_window_seconds,
    )


def bus_options(config: Config) -> BusOptions:
    """What every adapter may ask for. Raises ConfigError for settings that exclude each other."""
    settings, kafka = config.bus, config.bus.kafka

    def path(name: str | None) -> Path | None:
        return None if name is None else Path(name)

    topic = {}
    if kafka.topic.retention_seconds is not None:
        topic["retention.ms"] = str(kafka.topic.retention_seconds * 1000)
    if kafka.topic.min_insync_replicas is not None:
        topic["min.insync.replicas"] = str(kafka.topic.min_insync_replicas)
    return BusOptions(
        exchange=settings.exchange,
        topic=settings.topic,
        declare=settings.declare,
        window=settings.window,
        structured=settings.content_mode == "structured",
        heartbeat=settings.heartbeat_seconds,
        confirm_timeout=settings.confirm_timeout_seconds,
        connect_timeout=settings.connect_timeout_seconds,
        username=settings.username,
        password_file=path(settings.password_file),
        auth=settings.auth,
        sasl_mechanism=kafka.sasl_mechanism,
        oauth_token_file=path(kafka.oauth_token_file),
        oauth_token_command=kafka.oauth_token_command or (),
        tls_ca_file=path(settings.tls.ca_file),
        tls_cert_file=path(settings.tls.cert_file),
        tls_key_file=path(settings.tls.key_file),
        tls_server_name=settings.tls.server_name,
        topic_partitions=kafka.topic.partitions,
        topic_replication=None if kafka.topic.replication == -1 else kafka.topic.replication,
        topic_config=topic,
        extra=kafka.options,
        state_dir=Path(config.state_dir),
    )


def keep_memory_private() -> None:
    """No core dump, and no look by others of our uid into /proc: we hold the broker's password."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def open_bus(config: Config) -> Bus:
    """The bus of the settings. Raises ConfigError; connects to nothing yet."""
    return bus.open_bus(bus_url(config), bus_options(config))


def open_source(config: Config, *, since_ns: int | None = None) -> Source:
    """The source of `libvirt.uri`: a scheme that an entry point of `virtbus.sources` names, else libvirt.

    `since_ns` is the agent's last sign of life: what the hypervisor remembers from after it is told.
    """
    uri, group = config.libvirt.uri, "virtbus.sources"
    discover = config.libvirt.discover
    if discover.on:
        from virtbus.sources.many import ManySource

        return ManySource(
            discover, options=source_options(config, since_ns), uri=uri if discover.with_uri else None
        )
    point = plugins.find(group, uri.partition(":")[0]) or plugins.find(group, "libvirt")
    assert point is not None  # the package's own
    factory: SourceFactory = plugins.load(point, uri)
    return factory(uri, options=source_options(config, since_ns))


def source_options(config: Config, since_ns: int | None = None) -> SourceOptions:
    """How the hypervisor is observed."""
    settings = config.libvirt
    return SourceOptions(
        lookup_deadline_seconds=settings.lookup_deadline_seconds,
        lookups_in_flight=settings.lookups_in_flight,
        keepalive_interval_seconds=settings.keepalive_interval_seconds,
        keepalive_count=settings.keepalive_count,
        grace_seconds=settings.grace_seconds,
        owner_rules=settings.owner_rules,
        since_ns=since_ns,
    )


def react_folder(config: Config) -> Path:
    """Where the integrations keep their state."""
    return Path(config.react.state_dir or Path(config.state_dir) / "react")
