"""A bus is found by its URL, and what can't be used is named with its remedy."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

import virtbus.bus as bus_module
from virtbus import plugins
from virtbus.bus import BusOptions, bus_name, checked_group, is_loopback, open_bus
from virtbus.bus.amqp.bus import AmqpBus
from virtbus.errors import ConfigError


def test_each_built_in_scheme_opens_its_bus_without_connecting(tmp_path: Path) -> None:
    urls = {
        "amqp": "amqp://127.0.0.1:1//",
        "amqps": "amqps://broker.example//",
        "kafka": "kafka://127.0.0.1:1",
        "kafkas": "kafkas://broker.example",
        "embedded": "embedded:",
    }
    assert set(urls) <= set(plugins.names(bus_module.ENTRY_POINT_GROUP))
    for url in urls.values():
        open_bus(url, BusOptions(state_dir=tmp_path)).close()


def test_a_bus_has_one_name_with_tls_and_without_and_another_for_each_place_of_its_events() -> None:
    options = BusOptions(exchange="e", topic="t", state_dir=Path("/s"))
    names = {
        "amqps://user:password@One/vhost": "amqp://one/vhost e",
        "kafkas://two,one": "kafka://one,two t",
        "embedded:": "embedded:// /s",
        # A third party's: nobody here knows which of them its events are in, nor what its "s" means.
        "nats://one/a": "nats://one/a e t /s",
        "rediss://one": "rediss://one e t /s",
    }
    assert {url: bus_name(url, options) for url in names} == names


@pytest.mark.parametrize("separator", [";", ",", " ; "])
def test_brokers_in_a_list_have_one_name_in_any_order_and_without_their_secrets(separator: str) -> None:
    one, two = "amqp://u:s3cret@One//", "amqps://u:s3cret@two/v"
    names = {bus_name(separator.join(order), BusOptions(exchange="e")) for order in ((one, two), (two, one))}
    assert names == {"amqp://one//;amqp://two/v e"}
    rotated = bus_name(separator.join((one, two)).replace("s3cret", "other"), BusOptions(exchange="e"))
    assert names == {rotated}


def test_several_brokers_may_stand_in_one_url() -> None:
    bus = open_bus("amqp://one;amqps://two")
    assert isinstance(bus, AmqpBus)
    bus.close()


def test_an_unknown_scheme_names_the_known_ones_and_the_fix() -> None:
    with pytest.raises(ConfigError, match="redis") as caught:
        open_bus("redis://user:s3cret@host")
    assert "amqps" in str(caught.value)
    assert "embedded" in str(caught.value)
    assert "virtbus.buses" in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "host:5672/x y", "//host", "rabbit"])
def test_what_is_no_url_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(ConfigError):
        open_bus(url)


@pytest.mark.parametrize("scheme", ["amqp", "amqps", "kafka", "kafkas"])
@pytest.mark.parametrize("secret", ["12/hush@hush", "12/hush", "1/2/hush", "hush/hush", "/hush", "12/hush?1"])
def test_a_password_with_a_bare_slash_is_refused_without_being_shown(scheme: str, secret: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_bus(f"{scheme}://user:{secret}@host/vh")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("host", ["foo..bar", f"{'x' * 64}.example", ".foo", "ü" * 64])
def test_a_host_that_can_be_no_name_is_an_error_of_the_configuration(host: str) -> None:
    with pytest.raises(ConfigError, match="between dots"):
        open_bus(f"amqp://user@{host}/")


@pytest.mark.parametrize(
    "host", ["foo.bar.", f"{'x' * 63}.example", "under_score", "bücher.example", "[fe80::1]"]
)
def test_a_host_that_can_be_a_name_is_taken(host: str) -> None:
    open_bus(f"amqp://user@{host}/").close()


def test_a_third_partys_entry_point_wins_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = EntryPoint("amqp", "tests.bus.test_open_bus:FakeFactory", bus_module.ENTRY_POINT_GROUP)
    (ours,) = entry_points(group=bus_module.ENTRY_POINT_GROUP, name="amqp")
    monkeypatch.setattr(plugins, "entry_points", lambda **which: [ours, theirs])
    assert open_bus("amqp://host") == "made for amqp://host"


class FakeFactory:
    def __new__(cls, url: str, *, options: BusOptions) -> str:  # type: ignore[misc]
        return f"made for {url}"


def test_a_missing_module_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    monkeypatch.delitem(sys.modules, "virtbus.bus.kafka.bus", raising=False)
    with pytest.raises(ConfigError, match=r"needs the Python module .*pip install 'virtbus\[kafka\]'"):
        open_bus("kafka://host")


def test_every_problem_of_the_options_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        BusOptions(window=0, auth="magic", exchange="", confirm_timeout=0, tls_key_file=Path("key"))
    for word in ("bus.window", "bus.auth", "bus.exchange", "bus.confirm_timeout", "tls_cert_file"):
        assert word in str(caught.value)


def test_extra_options_that_may_hold_secrets_are_not_shown() -> None:
    assert "hunter2" not in repr(BusOptions(extra={"sasl.password": "hunter2"}))


def test_a_group_name_that_every_broker_can_carry_is_taken_as_it_is() -> None:
    assert checked_group("nova-react_1.x") == "nova-react_1.x"
    assert checked_group(None) is None


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_this_machine_is_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["127.evil.example", "127.0.0.1.nip.io", "localhost.evil.example", "10.0.0.1"]
)
def test_a_name_that_only_looks_like_loopback_is_not(host):
    assert not is_loopback(host)
