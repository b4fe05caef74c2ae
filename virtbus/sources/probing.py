"""What a probe of libvirt found, as checks that an operator reads: pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from virtbus.errors import ConfigError, SourceDenied, SourceUnavailable, VirtbusError
from virtbus.model import Check
from virtbus.sources.link import HostFacts


def unreachable(error: VirtbusError) -> Check:
    """No connection could be made."""
    remedy = "start libvirtd or virtqemud, and see that its socket is reachable from here"
    if isinstance(error, SourceDenied):
        remedy = "let this user open libvirt's read-only socket (unix_sock_ro_perms)"
    elif isinstance(error, ConfigError):
        remedy = "fix libvirt.uri, e.g. qemu:///system"
    return Check("libvirt", "failed", str(error), remedy, error.exit_code)


def checks_of(
    uri: str, facts: HostFacts, version: str, domains: int, events: Mapping[str, str | None]
) -> Sequence[Check]:
    """A connection was made; `events` are their names and libvirt's refusals (None: it can be registered)."""
    kind, libvirt_version = facts.hypervisor.kind, facts.hypervisor.libvirt_version
    merges = replace(facts.hypervisor, version=version).merges
    details = {
        "uri": uri,
        "hypervisor": kind,
        "hypervisor_version": version,
        "libvirt_version": libvirt_version,
        "domains": domains,
        "throttles": merges,
    }
    words = f"{facts.name}: {kind} {version} behind libvirt {libvirt_version}, {domains} domain(s) active"
    checks = [Check("libvirt", "ok", words, details=details)]
    missing = ", ".join(f"{name} ({refusal})" for name, refusal in events.items() if refusal is not None)
    if not missing:
        checks.append(Check("libvirt events", "ok", f"{len(events)} kinds of events can be registered"))
    else:
        # Without IO_ERROR_REASON there is still IO_ERROR; without LIFECYCLE nothing is.
        status, code = ("failed", SourceUnavailable.exit_code) if events.get("LIFECYCLE") else ("warning", 0)
        remedy = "what depends on them is found later, by looking; a newer libvirt offers them"
        checks.append(Check("libvirt events", status, f"not offered: {missing}", remedy, code))
    if merges:
        words = f"{kind} {version} merges a device's errors, one event a second: counts are lower bounds"
        remedy = "nothing to fix: read occurrences.lower_bound, and docs/libvirt.md"
        checks.append(Check("error counts", "warning", words, remedy))
    return checks
