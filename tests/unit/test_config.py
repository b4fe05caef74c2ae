"""Settings: who wins, and every problem at once with its place."""

import json

import jsonschema_rs
import pytest

from virtbus import config, loading
from virtbus.errors import ConfigError, InputMissing


@pytest.fixture
def settings_file(tmp_path):
    def write(text):
        path = tmp_path / "virtbus.toml"
        path.write_text(text)
        return path

    return write


def problems_of(**given):
    with pytest.raises(ConfigError) as caught:
        loading.load(**{"environment": {}, **given})
    return str(caught.value).splitlines()


def test_a_flag_wins_over_the_environment_that_over_the_file_and_that_over_the_default(settings_file):
    path = settings_file(
        'state_dir = "/file"\n[bus]\nwindow = 5\nexchange = "file"\n[log]\nlevel = "debug"\n'
    )
    loaded = loading.load(
        file=path,
        environment={"VIRTBUS_BUS__WINDOW": "6", "VIRTBUS_STATE_DIR": "/environment"},
        flags={"state_dir": "/flag", "bus.url": None},
    )
    assert loaded.config.state_dir == "/flag"
    assert loaded.config.bus.window == 6
    assert loaded.config.bus.exchange == "file"
    assert loaded.config.spool.max_bytes == 256 << 20
    assert loaded.origins["bus.window"] == "environment VIRTBUS_BUS__WINDOW"
    assert loaded.origins["bus.exchange"] == f"{path}:4"
    assert loaded.origins["state_dir"] == "flag --state-dir"


def test_all_problems_are_told_at_once_each_with_its_place(settings_file):
    path = settings_file('[bus]\nurll = "amqp://h"\nwindow = 0\n[htp]\nlisten = ""\n')
    problems = problems_of(
        file=path, environment={"VIRTBUS_SPOOL__MAX_BYTES": "many", "VIRTBUS_LOG__LEVEL": "loud"}
    )
    assert problems == [
        "environment VIRTBUS_SPOOL__MAX_BYTES: 'many' is not a TOML integer",
        f"{path}:2: unknown setting bus.urll; did you mean url?",
        f"{path}:3: bus.window = 0: expected a whole number at least 1 at most 65535",
        f"{path}:5: unknown setting htp; did you mean http?",
        "environment VIRTBUS_LOG__LEVEL: log.level = 'loud': "
        "expected 'debug' or 'error' or 'info' or 'warning'",
    ]


def test_settings_that_exclude_each_other_are_refused():
    flags = {"bus.url": "amqp://h", "bus.url_file": "/x", "bus.tls.cert_file": "/c", "bus.auth": "external"}
    problems = problems_of(flags=flags)
    assert any("both set" in line for line in problems)
    assert any("go together" in line for line in problems)


def test_a_value_of_a_secret_is_not_repeated_in_a_problem():
    problems = problems_of(flags={"bus.kafka.options": {"sasl.password": 7}})
    assert len(problems) == 1
    assert "7" not in problems[0]


@pytest.mark.parametrize("listen", ["9466", "host:", ":1", "1.2.3.4:99999", "[::1]", "a:b:1"])
@pytest.mark.parametrize("key", ["http.listen", "react.listen", "react.fleet_listen"])
def test_a_listen_address_that_is_none_is_refused(key, listen):
    assert key in problems_of(flags={key: listen})[0]


@pytest.mark.parametrize("listen", ["", "127.0.0.1:9466", "[::1]:9466", "localhost:1"])
def test_good_listen_addresses_are_taken(listen):
    assert loading.load(environment={}, flags={"http.listen": listen}).config.http.listen == listen


def test_a_file_that_is_named_must_exist(tmp_path):
    with pytest.raises(InputMissing, match="does not exist"):
        loading.load(file=tmp_path / "none.toml", environment={})


def test_text_that_is_not_toml_is_one_clear_line(settings_file):
    (problem,) = problems_of(file=settings_file("[bus\n"))
    assert "not valid TOML" in problem


def test_what_kubernetes_puts_into_every_pod_is_no_setting():
    environment = {
        "VIRTBUS_SERVICE_HOST": "10.0.0.1",
        "VIRTBUS_METRICS_SERVICE_PORT_HTTP": "1",
        "VIRTBUS_PORT_9466_TCP_ADDR": "x",
    }
    loading.load(environment=environment)
    assert problems_of(environment={"VIRTBUS_STATE_DRI": "/x"})


def test_without_a_bus_url_the_message_says_how_to_name_one():
    loaded = loading.load(environment={})
    with pytest.raises(ConfigError, match="--bus amqp://"):
        loading.bus_url(loaded.config)


def test_the_bus_url_can_come_from_a_mounted_secret(tmp_path):
    (tmp_path / "url").write_text("amqp://u:p@h//\n")
    loaded = loading.load(environment={"VIRTBUS_BUS__URL_FILE": str(tmp_path / "url")})
    assert loading.bus_url(loaded.config) == "amqp://u:p@h//"


def test_a_secret_file_that_is_missing_is_named_without_its_content(tmp_path):
    with pytest.raises(ConfigError, match=r"bus\.url_file: .*none can't be read"):
        config.read_secret(str(tmp_path / "none"), "bus.url_file")


def test_the_defaults_fit_their_own_schema():
    schema = config.json_schema()
    jsonschema_rs.meta.validate(schema)
    assert loading.effective(loading.load(environment={}).config)["bus"]["exchange"] == "virtbus.events"


def test_effective_settings_hide_secrets_in_free_options(tmp_path):
    options = {"sasl.password": "secret", "ssl.key.password": "secret2", "linger.ms": "5"}
    flags = {"bus.url": "kafka://h", "bus.kafka.options": options}
    shown = json.dumps(loading.effective(loading.load(environment={}, flags=flags).config))
    assert "secret" not in shown
    assert '"linger.ms": "5"' in shown


def exposed(file, mode, text):
    file.write_text(text)
    file.chmod(mode)
    return loading.exposed_secrets(loading.load(file=file, environment={}))


def test_a_secret_that_every_user_can_read_is_named_with_its_place_and_the_remedy(tmp_path):
    (tmp_path / "password").write_text("secret")
    (tmp_path / "password").chmod(0o644)
    file = tmp_path / "virtbus.toml"
    text = f'[bus]\nurl = "amqp://u:secret@h"\npassword_file = "{tmp_path}/password"\n'
    text += '[bus.kafka.options]\n"sasl.password" = "secret"\n"linger.ms" = "5"\n'
    told = exposed(file, 0o644, text)
    assert [line.partition(":")[0] for line in told] == [
        "bus.url", "bus.password_file", "bus.kafka.options.sasl.password",
    ]  # fmt: skip
    assert f"{file}:2 holds a secret" in told[0]
    assert all("chmod o-r" in line for line in told)
    assert "secret@" not in "".join(told)
    (tmp_path / "password").chmod(0o640)
    assert exposed(file, 0o640, text) == []
    assert exposed(file, 0o644, '[bus]\nurl = "amqp://u@h"\n') == []


@pytest.mark.parametrize(
    "text",
    [
        '[libvirt.discover]\nsockets = ["/run/user/*/libvirt/virtqemud-sock"]\n',
        '[[libvirt.owner_rules]]\nplatform = "lab"\nnamespace = "http://lab.org/x/1.0"\n',
        '[http]\nallowed_hosts = ["host-1"]\n',
        '[react]\npublishers = ["virtbus-{host}"]\n[react.fleet]\nlocal_paths = ["/var"]\n'
        '[react.fleet.groups]\nceph = ["rbd/*"]\n',
    ],
)
def test_a_list_in_an_open_file_is_no_secret(tmp_path, text):
    assert exposed(tmp_path / "virtbus.toml", 0o644, text) == []


def test_a_broker_that_a_flag_names_is_logged_into_as_the_flag_says(settings_file):
    """As of `virtbus consume --bus …` on a host whose agent has a login of its own."""
    mine = "amqp://me:secret@other//"
    path = settings_file('[bus]\nusername = "agent"\npassword_file = "/etc/virtbus/password"\n')
    assert loading.load(file=path, environment={}, flags={"bus.url": mine}).config.bus == config.Bus(url=mine)
    elsewhere = {"VIRTBUS_BUS__URL_FILE": "/run/url", "VIRTBUS_BUS__PASSWORD_FILE": "/run/password"}
    loaded = loading.load(file=path, environment=elsewhere, flags={"bus.url": mine})
    assert loaded.config.bus == config.Bus(url=mine)
    # Without a password in it, the one that is set belongs to it.
    bus = loading.load(file=path, environment={}, flags={"bus.url": "amqp://me@other//"}).config.bus
    assert (bus.username, bus.password_file) == ("agent", "/etc/virtbus/password")


def test_a_secret_in_a_flag_shows_in_ps_and_is_named():
    loaded = loading.load(environment={}, flags={"bus.url": "amqp://u:secret@h"})
    assert loading.exposed_secrets(loaded) == [
        "bus.url: a secret in a flag shows in ps: put it into a file (bus.url_file, say)"
    ]
    assert loading.exposed_secrets(loading.load(environment={}, flags={"bus.url": "amqp://u@h"})) == []


def test_what_a_hook_inherits_is_no_setting():
    loading.load(environment={"VIRTBUS_EVENT_TYPE": "x", "VIRTBUS_EVENT_ID": "1"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[bus]\nconfirm_timeout_seconds = 1e300",
            ":2: bus.confirm_timeout_seconds = 1e+300: expected",
        ),
        ("[heartbeat]\ninterval_seconds = 86400", "heartbeat.interval_seconds = 86400: expected a number"),
        ("[incidents]\nquiet_seconds = inf", ":2: incidents.quiet_seconds"),
        ("[incidents]\nquiet_seconds = nan", ":2: incidents.quiet_seconds"),
        ("[incidents]\nquiet_seconds = 0", ":2: incidents.quiet_seconds"),
        ("[incidents]\nfirst_window_seconds = 0", ":2: incidents.first_window_seconds"),
        ("[incidents]\nmax_window_seconds = 0.5", ":2: incidents.max_window_seconds is less than"),
        ("[incidents]\nmax_open = 0", ":2: incidents.max_open"),
        ("[spool]\nmax_bytes = 1000000000000000000000000", ":2: spool.max_bytes"),
        ("[bus]\nheartbeat_seconds = 4000000000", ":2: bus.heartbeat_seconds"),
        (f"[bus]\nexchange = '{'ü' * 200}'", ":2: bus.exchange is longer than 255 bytes"),
        ('[bus]\ntopic = "a\\u0000b"', ":2: bus.topic holds a NUL character"),
    ],
)
def test_what_would_break_a_thread_later_is_refused_with_its_place(settings_file, text, said):
    path = settings_file(text)
    (problem,) = problems_of(file=path)
    assert problem.startswith(str(path))
    assert said in problem


def test_every_number_of_the_settings_has_an_upper_bound():
    def unbounded(node, path):
        for each in node.get("anyOf", [node]):
            if each.get("type") in ("number", "integer") and "maximum" not in each:
                yield path
            for name, child in each.get("properties", {}).items():
                yield from unbounded(child, f"{path}.{name}")

    definitions = config.json_schema()["$defs"]
    assert [path for name, node in definitions.items() for path in unbounded(node, name)] == []


def test_text_of_the_environment_that_is_not_utf_8_is_refused_with_its_place():
    (problem,) = problems_of(environment={"VIRTBUS_BUS__EXCHANGE": "a\udcff"})
    assert problem == "environment VIRTBUS_BUS__EXCHANGE: bus.exchange is not UTF-8 text"


def test_a_value_of_the_environment_is_one_value():
    (problem,) = problems_of(environment={"VIRTBUS_HEARTBEAT__INTERVAL_SECONDS": "12\nfoo=3"})
    assert problem.startswith("environment VIRTBUS_HEARTBEAT__INTERVAL_SECONDS: '12\\nfoo=3' is not")


@pytest.mark.parametrize("text", ["12.0", "1e3"])
def test_a_whole_number_with_a_decimal_point_is_refused_with_its_place(tmp_path, text):
    (problem,) = problems_of(environment={"VIRTBUS_BUS__WINDOW": text})
    assert problem == (
        "environment VIRTBUS_BUS__WINDOW: bus.window: expected a whole number at least 1 at most 65535, "
        "without a decimal point"
    )
    path = tmp_path / "virtbus.toml"
    path.write_text(f"[bus]\nwindow = {text}\n")
    with pytest.raises(ConfigError, match=r"virtbus.toml:2: bus.window: expected a whole number"):
        loading.load(file=path, environment={})


def test_a_preset_can_be_named_by_the_environment():
    found = loading.load(environment={"VIRTBUS_LIBVIRT__DISCOVER__PRESET": "kubevirt"}).config
    assert found.libvirt.discover.preset == "kubevirt"
    (problem,) = problems_of(environment={"VIRTBUS_LIBVIRT__DISCOVER__PRESET": "kubevirrt"})
    assert problem.endswith("libvirt.discover.preset = 'kubevirrt': expected 'kubevirt'")


@pytest.mark.parametrize(
    "uri", ["{socket}", "qemu+ssh://h/session?socket={socket}", "qemu:///session?sock={socket}", "qemu:///x"]
)
def test_a_uri_by_which_no_socket_can_be_reached_is_refused(uri):
    """Each socket that is found would be tried in vain, for ever."""
    (problem,) = problems_of(environment={"VIRTBUS_LIBVIRT__DISCOVER__URI": uri})
    assert "libvirt.discover.uri" in problem


def test_the_uri_of_a_daemon_in_system_mode_is_taken():
    uri = "qemu+unix:///system?mode=legacy&socket={socket}"
    found = loading.load(environment={"VIRTBUS_LIBVIRT__DISCOVER__URI": uri}).config
    assert found.libvirt.discover.uri == uri


def test_what_a_list_lacks_is_said_in_whole_words():
    problems = problems_of(environment={"VIRTBUS_LIBVIRT__OWNER_RULES": "[{}]"})
    assert problems[0].endswith('libvirt.owner_rules.0 = {}: "namespace" is a required property')


def test_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "virtbus.toml"
    path.write_bytes(b"\xef\xbb\xbf[bus]\nwindow = 7\n")
    assert loading.load(file=path, environment={}).config.bus.window == 7


@pytest.mark.parametrize("text", ["", "\n", " \n"])
def test_an_empty_secret_file_is_an_error(tmp_path, text):
    path = tmp_path / "secret"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is empty"):
        config.read_secret(str(path), "bus.url_file")
