"""What of a name, a text or a URI may leave the host: no secret does, and nothing else is touched."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtbus import redaction
from virtbus.errors import SourceUnavailable, VirtbusError

KEPT = [
    "",
    "/var/lib/libvirt/images/db1.qcow2",
    "/img/a,key=b:c@d.img",
    "/dev/disk/by-path/ip-192.0.2.1:3260-iscsi-iqn.2013-07.com.example:storage-lun-1",
    "relative/file.img",
    "vms/db1@snap",
    "vol/dir/a,size=10.img",
    "iqn.2013-07.com.example:storage/1",
    "0000:01:00.0",
    "unit:0:0:1",
    "база/データ.img",
    "nbd+unix:///export?socket=/run/x",
]


@pytest.mark.parametrize("name", KEPT)
def test_a_name_without_a_secret_stays_byte_for_byte(name: str) -> None:
    assert redaction.path(name) == name


@pytest.mark.parametrize("name", [*KEPT, "/img/a?b=c@d:e.img", "/img/debian.iso?download=1"])
def test_a_path_that_is_known_to_be_the_hosts_own_stays_whatever_is_in_it(name: str) -> None:
    assert redaction.path(name, local=name.startswith("/")) == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("https://user:hunter2@host/p.iso", "https://***@host/p.iso"),
        ("https://user:hun/ter2@host/p.iso", "https://***@host/p.iso"),
        ("https://user:hun?ter2@host/p.iso", "https://***@host/p.iso"),
        ("https://hunter2@host/p.iso", "https://***@host/p.iso"),
        ("https://host/p.iso?sig=hunter2#x", "https://host/p.iso"),
        ("https://host/p.iso?hunter2", "https://host/p.iso"),
        ("https://host/p.iso#hunter2", "https://host/p.iso"),
        ("https://host/p.iso?socket=/s&sig=hunter2", "https://host/p.iso"),
        ("p.iso?token=hunter2", "p.iso"),
        ("/export/p.iso?X-Sig=hunter2", "/export/p.iso"),
        ("user:hunter2@host/share", "***@host/share"),
        ("user:hun/ter@2@host/share", "***@host/share"),
        ("rbd:vms/db1:id=admin:key=hunter2==:mon_host=m", "rbd:vms/db1"),
        ("vms/db1:id=admin:key=hunter2", "vms/db1"),
        ("vol/a,size=10,password=hunter2", "vol/a,size=10"),
        ("vol/a, apikey=hunter2", "vol/a"),
        ("file.password=hunter2,file.path=/x", ""),
        ("https://host/p.iso?proxy=http://user:hunter2@h/", "https://host/p.iso"),
        ("iscsi://user%hunter2@host/iqn.x/1", "iscsi://***@host/iqn.x/1"),
        ('json:{"file.password":"hunter2"}', "json:***"),
    ],
)
def test_what_may_be_a_secret_is_cut_from_a_name(name: str, shown: str) -> None:
    assert redaction.path(name) == shown


@pytest.mark.parametrize(
    ("given_uri", "shown"),
    [
        ("amqp://user:secret@host:5672//", "amqp://user:***@host:5672//"),
        ("amqp://user:se/cr@et?@host//;amqp://u:secret@b//", "amqp://user:***@host//;amqp://u:***@b//"),
        ("amqp://user:sec;ret@host//", "amqp://user:***@host//"),
        ("kafka://host:9092/topic?password=secret", "kafka://host:9092/topic?password=***"),
        ("https://host/hook?secret", "https://host/hook?***"),
        ("qemu:///system", "qemu:///system"),
        ("qemu:///system?socket=/run/libvirt/libvirt-sock-ro", "qemu:///system?socket=/run/libvirt/libvirt-sock-ro"),
        ("qemu:///system?socket=/run/a@c", "qemu:///system?socket=/run/a@c"),
        (
            "qemu+ssh://root@host/system?keyfile=/k&no_verify=1",
            "qemu+ssh://root@host/system?keyfile=/k&no_verify=1",
        ),
        ("qemu+tcp://user:secret@host/system", "qemu+tcp://user:***@host/system"),
        ("embedded:///tmp/file?max_bytes=1", "embedded:///tmp/file?max_bytes=1"),
    ],
)  # fmt: skip
def test_a_uri_is_shown_without_its_secrets_and_with_the_rest(given_uri: str, shown: str) -> None:
    assert redaction.uri(given_uri) == shown
    assert redaction.text(shown) == shown


@pytest.mark.parametrize(
    "words",
    [
        "",
        "disk='vda', index='1', path='/img/a', timestamp='2026-01-01 00:00:00.000+0000'",
        "Failed to connect socket to '/run/libvirt/libvirt-sock-ro': No such file or directory",
        "qemu:///system?socket=/run/x: unable to connect; is libvirtd running?",
        "the routing key='io_error.a.b' is bound to no queue",
        "12 bytes free at /img?what",
        "write amqps://[user@]host[:port] (inside a user or password every / ? # @ is percent-encoded)",
        "virtbus.events[0]@12: offset out of range",
        "vms/db1@snap: Input/output error",
        "bus.password_file=/etc/virtbus/password",
        "a token has expired, and the password is wrong",
        '{"error": "no such domain", "code": 42}',
    ],
)
def test_ordinary_words_stay_as_they_are(words: str) -> None:
    assert redaction.text(words) == words


@pytest.mark.parametrize(
    "words",
    [
        "Could not open 'https://user:hunter2@host/p.iso': 404",
        "Could not open 'https://hunter2@host/p.iso': 404",
        "curl: https://host/p.iso?X-Amz-Signature=hunter2&X=hunter2: 403",
        "curl: https://host/p.iso?hunter2 gone",
        "Could not open 'iso/a.iso?X-Sig=hunter2'",
        "error opening rbd:vms/db1:id=admin:key=hunter2==:mon_host=m",
        "error opening vms/db1:id=admin:key=hunter2\\:hunter2: no such image",
        "disk='vdb', path='rbd:vms/db1:id=admin:key=hunter2'",
        "-blockdev driver=ssh,password=hunter2,path=/x",
        'Could not open \'json:{"driver":"https","file":{"url":"https://u:hunter2@h/"},"x":"hunter2"}\'',
        'json:{"truncated":"hunter2',
        '{"password": "hunter2", "file.password-secret": "hunter2"}',
        "failed to log in as admin:hunter2@host",
        "amqp://user:hunter2?hunter2@host//",
        "https://user:hunter2/hunter2@host/a",
        "user:hunter2/hunter2@host/a",
        "iscsi: failed to connect to iscsi://user%hunter2@host:3260/iqn.x/1",
        "https://host/p;jsessionid=hunter2",
        "file.pwd=hunter2,file.path=/x",
        "vol/a,sas=hunter2: gone",
        "https://host/p?proxy=http://user:hunter2@h/",
        "Authorization: Basic hunter2",
        "refused: Bearer hunter2",
        "https://user:hunter2'hunter2@host/",
    ],
)  # fmt: skip
def test_no_secret_stays_in_a_text(words: str) -> None:
    assert "hunter2" not in redaction.text(words)
    assert "hunter2" not in str(SourceUnavailable(words))
    assert "hunter2" not in repr(VirtbusError(words))


def test_a_url_in_a_text_keeps_all_but_its_secret() -> None:
    told = redaction.text("https://user:hunter2@host/a?x=hunter2: refused")
    assert told == "https://user:***@host/a?x=***: refused"


def test_who_logs_in_at_a_hypervisor_or_broker_is_no_secret() -> None:
    assert redaction.text("qemu+ssh://root@host/system: refused") == "qemu+ssh://root@host/system: refused"


SECRET = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="=&"), min_size=1).map(
    lambda text: f"s3cr{text}t"
)


@given(SECRET)
def test_no_password_however_odd_slips_through(secret: str) -> None:
    assert secret not in redaction.uri(f"amqp://user:{secret}@host//")
    assert secret not in redaction.path(f"https://user:{secret}@host/a")
    assert secret not in redaction.path(f"a.iso?{secret}")
    assert secret not in redaction.path(f'json:{{"a":"{secret}"}}')
    assert secret not in redaction.text(f'json:{{"a":"{secret}"}}')
    assert secret not in redaction.path(f"rbd:p/i:id=a:key={secret}")


@given(st.text())
def test_what_was_redacted_once_is_left_as_it_is(words: str) -> None:
    for once in (redaction.path(words), redaction.uri(words), redaction.text(words)):
        assert redaction.text(redaction.text(once)) == redaction.text(once)
    assert redaction.path(redaction.path(words)) == redaction.path(words)
    assert redaction.uri(redaction.uri(words)) == redaction.uri(words)


@given(st.text(st.characters(exclude_characters="?", exclude_categories=["Cs"])))
def test_a_file_name_stays_byte_for_byte(name: str) -> None:
    assert redaction.path(f"/{name}") == f"/{name}"
