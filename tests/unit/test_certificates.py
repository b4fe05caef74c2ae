"""When certificates end is a metric: of our files as they are now."""

import math
import ssl
import subprocess
from pathlib import Path

import pytest

from virtbus.bus.certificates import ends_of, watch_files
from virtbus.telemetry import METRICS


def _certificate(folder: Path, name: str, days: int) -> Path:
    file = folder / f"{name}.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-subj", f"/CN={name}", "-days", str(days), "-keyout", "/dev/null", "-out", str(file)],
        check=True, capture_output=True,
    )  # fmt: skip
    return file


def _shown(which: str) -> float | None:
    return METRICS.registry.get_sample_value("virtbus_certificate_end_time_seconds", {"certificate": which})


def _by_openssl(file: Path) -> float:
    done = subprocess.run(
        ["openssl", "x509", "-noout", "-enddate", "-in", str(file)],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(ssl.cert_time_to_seconds(done.stdout.strip().removeprefix("notAfter=")))


@pytest.mark.parametrize("days", [10, 36500])  # a UTCTime, a GeneralizedTime
def test_the_end_is_the_one_that_openssl_reads(tmp_path, days):
    file = _certificate(tmp_path, "one", days)
    assert ends_of(str(file)) == [_by_openssl(file)]


def test_a_renewed_certificate_shows_at_the_next_scrape_and_the_last_authority_counts(tmp_path):
    own = _certificate(tmp_path, "own", 10)
    old, new = _certificate(tmp_path, "old", 1), _certificate(tmp_path, "new", 400)
    bundle = tmp_path / "ca.pem"
    bundle.write_text(new.read_text() + old.read_text())
    watch_files(str(own), str(bundle))
    assert (_shown("client"), _shown("ca")) == (_by_openssl(own), _by_openssl(new))
    renewed = _certificate(tmp_path, "own", 90)
    assert _shown("client") == _by_openssl(renewed)
    own.unlink()
    assert math.isnan(_shown("client"))
