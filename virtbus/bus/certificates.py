"""When certificates end: for `virtbus doctor`, and for the metric that an alert stands on."""

from __future__ import annotations

import re
import ssl
from datetime import datetime
from pathlib import Path

from virtbus.telemetry import METRICS

# Validity (RFC 5280, 4.1.2.5) in a certificate's DER: two times, each a UTCTime or a GeneralizedTime.
_VALIDITY = re.compile(
    rb"(?:\x17\x0d[0-9]{12}Z|\x18\x0f[0-9]{14}Z)(?:\x17\x0d([0-9]{12})Z|\x18\x0f([0-9]{14})Z)"
)
_PEM = re.compile("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


def ends_of(path: str) -> list[float]:
    """When each certificate of a PEM file ends, in Unix seconds, in the file's order; [] if unreadable."""
    try:
        text = Path(path).read_text(encoding="ascii", errors="replace")
        return [end for pem in _PEM.findall(text) if (end := _end(ssl.PEM_cert_to_DER_cert(pem))) is not None]
    except (OSError, ValueError):
        return []


def _end(der: bytes) -> float | None:
    found = _VALIDITY.search(der)
    if found is None:
        return None
    digits = (found[1] or found[2]).decode()
    century = "" if found[2] else "20" if digits < "50" else "19"
    return datetime.strptime(f"{century}{digits}+0000", "%Y%m%d%H%M%S%z").timestamp()


def watch_files(cert_file: str | None, ca_file: str | None) -> None:
    """Show the ends of our certificate and of the last authority that we trust.

    The files are read at each scrape, so that a renewal shows at once. NaN: the file can't be read.
    """
    nan = float("nan")
    if cert_file:
        own = METRICS.certificate_end.labels("client")
        own.set_function(lambda: next(iter(ends_of(cert_file)), nan))
    if ca_file:
        METRICS.certificate_end.labels("ca").set_function(lambda: max(ends_of(ca_file), default=nan))


def seen_broker(sock: object) -> None:
    """Show the end of the certificate that a broker has just presented on a TLS socket."""
    if isinstance(sock, ssl.SSLSocket) and (told := (sock.getpeercert() or {}).get("notAfter")):
        METRICS.certificate_end.labels("broker").set(ssl.cert_time_to_seconds(str(told)))
