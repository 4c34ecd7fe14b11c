"""Settings: where they come from, who wins, what is refused and in which words."""

import json
import tomllib
from pathlib import Path

import msgspec
import pytest

from catchall.engine.settings import AT_MOST, Settings, from_json, masked, resolve, to_json
from catchall.engine.settings_sources import (
    KINDS,
    OLD_NAMES,
    VARIABLES,
    Given,
    Loaded,
    SettingsError,
    as_written,
    load,
    value_of,
)

CONF = Path(__file__).parent.parent / "conf" / "catchall.toml"

# One value that is wrong for each kind of setting, and words that the error must then use.
BAD_VALUES = [
    ("server.port", "0", "a whole number from 1 to 65535"),
    ("server.port", "65536", "a whole number from 1 to 65535"),
    ("server.port", "http", "a whole number from 1 to 65535"),
    ("server.port", "80.5", "a whole number from 1 to 65535"),
    ("server.host", "", "a host name or an address"),
    ("server.idle_timeout", "61s", "a duration from 1s to 1m"),
    ("server.idle_timeout", "500ms", "a duration from 1s to 1m"),
    ("server.read_timeout", "0", "a duration from 1ms to 1h"),
    ("server.read_timeout", "nan", "a duration from 1ms to 1h"),
    ("server.read_timeout", "-1s", "a duration from 1ms to 1h"),
    ("server.access_log", "maybe", "true or false"),
    ("server.task_impl", "go", "one of asyncio, rust"),
    ("shards.workers", "-1", "a whole number from 0 to 256"),
    ("data.dir", "a\0b", "a path"),
    ("data.partitions", "257", "a whole number from 1 to 256"),
    ("data.partitions", "0", "a whole number from 1 to 256"),
    ("data.segment_size", "63KiB", "a size from 64KiB to 1GiB"),
    ("data.segment_size", "4MB", "a size from 64KiB to 1GiB"),
    ("data.segment_size", "100000.5", "a size from 64KiB to 1GiB"),
    ("data.fsync", "sometimes", "one of interval, always, never"),
    ("data.fsync_interval", "1 day", "a duration from 1ms to 1h"),
    ("storage.kind", "postgres", "one of sqlite, memory, mongodb"),
    ("mongodb.uri", "localhost:27017", "a URI that starts with mongodb:// or mongodb+srv://"),
    ("mongodb.database", "a b", "1 to 63 characters"),
    ("mongodb.collection", "system.users", "1 to 120 characters"),
    ("rules.threshold", "-1", "a whole number from 0 up"),
    ("rules.threshold", "9" * 30, "a whole number from 0 up"),
    ("log.level", "loud", "one of debug, info, warning, error"),
]


def flag(name: str, value: object) -> Given:
    return Given("flag --set", name, value)


def loaded(*flags: Given, environ: dict[str, str] | None = None, file: Path | None = None, cpus: int = 8) -> Loaded:
    return load(flags, environ or {}, file, cpus)


def refused(*flags: Given, environ: dict[str, str] | None = None, file: Path | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        loaded(*flags, environ=environ, file=file)
    return str(caught.value)


def written(tmp_path: Path, document: str, name: str = "settings.toml") -> Path:
    path = tmp_path / name
    path.write_text(document, "utf-8")
    return path


# Precedence


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(tmp_path: Path) -> None:
    file = written(tmp_path, "[server]\nport = 1\n")
    environ = {"CATCHALL_SERVER_PORT": "2"}
    for expected, source, result in (
        (8081, "default", loaded()),
        (1, str(file), loaded(file=file)),
        (2, "environment CATCHALL_SERVER_PORT", loaded(file=file, environ=environ)),
        (3, "flag --set", loaded(flag("server.port", "3"), file=file, environ=environ)),
    ):
        assert (result.settings.server.port, result.sources["server.port"]) == (expected, source)


def test_the_last_of_two_flags_wins() -> None:
    assert loaded(flag("server.port", "1"), flag("server.port", "2")).settings.server.port == 2


def test_a_value_is_checked_even_where_a_stronger_source_overrules_it(tmp_path: Path) -> None:
    file = written(tmp_path, "[server]\nport = 0\n")
    assert str(file) in refused(flag("server.port", "80"), file=file)


def test_every_setting_has_one_variable_by_one_rule() -> None:
    assert VARIABLES["CATCHALL_SERVER_PORT"] == "server.port"
    assert VARIABLES["CATCHALL_DATA_SEGMENT_SIZE"] == "data.segment_size"
    assert sorted(VARIABLES.values()) == sorted(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_every_setting_can_be_given_by_its_variable_by_a_flag_and_by_a_file(name: str, tmp_path: Path) -> None:
    value = as_written(name, value_of(Settings(), name))
    section, _, key = name.partition(".")
    variable = next(v for v, n in VARIABLES.items() if n == name)
    file = written(tmp_path, f"[{section}]\n{key} = {value}\n")
    default = loaded().settings
    for result, source in (
        (loaded(environ={variable: value.strip('"')}), f"environment {variable}"),
        (loaded(flag(name, value.strip('"'))), "flag --set"),
        (loaded(file=file), str(file)),
    ):
        assert result.settings == default
        assert result.sources[name].startswith(source)


# Older names


@pytest.mark.parametrize(("variable", "value"), [("SERVER_HOST", "::1"), ("SERVER_PORT", "80"), ("DELIVERED_THRESHOLD", "7")])
def test_an_older_name_beats_the_file_and_loses_to_ours(variable: str, value: str, tmp_path: Path) -> None:
    name = OLD_NAMES[variable]
    ours = next(v for v, n in VARIABLES.items() if n == name)
    file = written(tmp_path, '[server]\nhost = "::2"\nport = 81\n[rules]\nthreshold = 8\n')
    old = loaded(environ={variable: value}, file=file)
    assert str(value_of(old.settings, name)) == value
    assert old.sources[name] == f"environment {variable}"
    both = loaded(environ={variable: value, ours: "9"}, file=file)
    assert str(value_of(both.settings, name)) == "9"
    assert both.sources[name] == f"environment {ours}"


def test_the_older_names_of_mongodb_are_read_too() -> None:
    mongodb = loaded(environ={"MONGODB_URI": "mongodb://db", "MONGODB_DATABASE": "old"}).settings.mongodb
    assert (mongodb.uri, mongodb.database) == ("mongodb://db", "old")


def test_an_older_name_with_a_bad_value_is_an_error_that_names_it() -> None:
    message = refused(environ={"SERVER_PORT": "tcp://10.0.0.1:80"})
    assert message.startswith("environment SERVER_PORT: server.port = 'tcp://10.0.0.1:80', expected a whole number")


# Bad values


@pytest.mark.parametrize(("name", "value", "expected"), BAD_VALUES)
def test_a_bad_value_is_refused_with_source_key_value_and_what_was_expected(
    name: str, value: str, expected: str, tmp_path: Path
) -> None:
    section, _, key = name.partition(".")
    variable = next(v for v, n in VARIABLES.items() if n == name)
    json_file = written(tmp_path, json.dumps({section: {key: value}}), "settings.json")
    for source, message in (
        ("flag --set", refused(flag(name, value))),
        (f"environment {variable}", refused(environ={variable: value})),
        (str(json_file), refused(file=json_file)),
    ):
        assert message.startswith(f"{source}: {name} = {value!r}, expected {expected}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("server.port", "true"),
        ("server.port", "80.0"),
        ("server.port", "[80]"),
        ("server.host", "1"),
        ("cache.enabled", "1"),
        ("cache.ttl", "true"),
        ("cache.ttl", "inf"),
        ("cache.ttl", "nan"),
        ("cache.ttl", "1" + "0" * 400),
        ("data.segment_size", "1e6"),
        ("data.fsync", "1"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_file_is_refused(name: str, value: str, tmp_path: Path) -> None:
    section, _, key = name.partition(".")
    file = written(tmp_path, f"[{section}]\n{key} = {value}\n")
    assert refused(file=file).startswith(f"{file}: {name} = ")


def test_more_shards_than_partitions_are_refused_and_both_are_named() -> None:
    assert refused(Given("flag --workers", "shards.workers", "17")) == (
        "flag --workers: shards.workers = 17, expected at most data.partitions, which is 16 (default): "
        "a shard without a partition would have nothing to do"
    )


def test_where_the_lower_of_two_is_the_default_whoever_set_the_higher_is_told() -> None:
    message = refused(flag("data.backlog_max", "1MiB"))
    assert message.startswith(
        "flag --set: data.backlog_max = '1MiB', expected at least data.segment_size, which is \"4MiB\" (default)"
    )


def test_a_backlog_that_could_refuse_for_ever_with_nothing_to_count_is_refused() -> None:
    sizes = flag("server.http_workers", 2), flag("data.partitions", 4), flag("data.segment_size", "1MiB")
    told = refused(*sizes, flag("data.backlog_max", "15MiB"))
    assert "data.backlog_max = '15MiB', expected at least 16MiB" in told
    assert "2 server.http_workers * 4 data.partitions" in told
    loaded(*sizes, flag("data.backlog_max", "16MiB"))


@pytest.mark.parametrize(
    "uri", ["mongodb://user:hunter2@h:port/", "mongodb://user:hunter2@h/?nosuchoption=1", "mongodb://user:hun/ter2@h"]
)
def test_a_uri_that_can_never_work_is_refused_without_its_password(uri: str) -> None:
    told = refused(flag("mongodb.uri", uri))
    assert "mongodb.uri" in told
    assert "a URI that can work" in told
    assert "hun" not in told
    assert "ter2" not in told


def test_the_defaults_keep_every_rule_between_two_settings() -> None:
    settings = loaded().settings
    assert all(value_of(settings, low) <= value_of(settings, high) for low, high, _ in AT_MOST)


# Unknown names


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("server.prot", "server.port"),
        ("server.workers", "shards.workers"),
        ("partitons", "data.partitions"),
        ("port", "server.port"),
    ],
)
def test_an_unknown_name_is_refused_with_the_one_that_was_meant(given: str, meant: str) -> None:
    message = refused(flag(given, "1"))
    assert message.startswith(f"flag --set: {given} = '1', expected the name of a setting")
    assert message.endswith(f"did you mean {meant}?")


def test_an_unknown_key_in_a_file_is_refused_with_the_file_and_the_one_that_was_meant(tmp_path: Path) -> None:
    file = written(tmp_path, "[server]\nprot = 1\n")
    message = refused(file=file)
    assert message.startswith(f"{file}: server.prot = 1, ")
    assert message.endswith("did you mean server.port?")


def test_an_unknown_section_in_a_file_is_refused_with_the_one_that_was_meant(tmp_path: Path) -> None:
    assert refused(file=written(tmp_path, "[sever]\nport = 1\n")).endswith("did you mean server?")


def test_a_key_outside_of_any_section_is_refused_with_its_section(tmp_path: Path) -> None:
    assert refused(file=written(tmp_path, "port = 1\n")).endswith("did you mean server.port?")


def test_a_section_that_is_no_table_is_refused(tmp_path: Path) -> None:
    assert "expected a section" in refused(file=written(tmp_path, "server = 1\n"))


def test_an_unknown_variable_is_refused_with_the_one_that_was_meant() -> None:
    message = refused(environ={"CATCHALL_SERVER_PROT": "1"})
    assert message.startswith("environment: CATCHALL_SERVER_PROT = '1', ")
    assert message.endswith("did you mean CATCHALL_SERVER_PORT?")


@pytest.mark.parametrize(
    "variable",
    [
        "CATCHALL_RUN",
        "CATCHALL_PORT",
        "CATCHALL_PORT_8081_TCP",
        "CATCHALL_PORT_8081_TCP_ADDR",
        "CATCHALL_SERVICE_HOST",
        "CATCHALL_SERVICE_PORT",
        "CATCHALL_SERVICE_PORT_HTTP",
        "SERVER_NAME",
    ],
)
def test_variables_that_were_not_meant_for_us_are_left_alone(variable: str) -> None:
    assert loaded(environ={variable: "tcp://10.0.0.1:8081"}) == loaded()


# Files


def test_a_file_may_be_json(tmp_path: Path) -> None:
    file = written(tmp_path, '{"cache": {"enabled": false, "ttl": 1.5}}', "settings.json")
    cache = loaded(file=file).settings.cache
    assert (cache.enabled, cache.ttl) == (False, 1.5)


def test_catchall_config_names_the_file_and_a_flag_names_another(tmp_path: Path) -> None:
    one = written(tmp_path, "[server]\nport = 1\n", "one.toml")
    two = written(tmp_path, "[server]\nport = 2\n", "two.toml")
    assert loaded(environ={"CATCHALL_CONFIG": str(one)}).settings.server.port == 1
    assert loaded(environ={"CATCHALL_CONFIG": str(one)}, file=two).settings.server.port == 2


@pytest.mark.parametrize(
    ("name", "document", "expected"),
    [
        ("a.toml", "[server", "valid TOML"),
        ("a.json", "{", "valid JSON"),
        ("a.json", '{"server": {"port": 1, "port": 2}}', "'port' appears twice"),
        ("a.json", "[1]", "a section for each key"),
        ("a.json", "[" * 100_000, "valid JSON"),
        ("a.ini", "", "a name that ends in .toml or .json"),
    ],
)
def test_a_file_that_cannot_be_understood_is_refused_by_name(name: str, document: str, expected: str, tmp_path: Path) -> None:
    file = written(tmp_path, document, name)
    message = refused(file=file)
    assert str(file) in message
    assert expected in message


def test_a_file_that_is_not_there_is_refused_by_name_and_by_who_named_it(tmp_path: Path) -> None:
    file = tmp_path / "none.toml"
    assert refused(file=file).startswith(f"flag --config: file = {str(file)!r}, expected a readable file (No such file")
    assert refused(environ={"CATCHALL_CONFIG": str(file)}).startswith("environment CATCHALL_CONFIG: ")


def test_the_shipped_file_names_every_setting_and_changes_nothing() -> None:
    document = tomllib.loads(CONF.read_text("utf-8"))
    assert [f"{section}.{key}" for section, content in document.items() for key in content] == list(KINDS)
    assert loaded(file=CONF).settings == loaded().settings


# Switches


@pytest.mark.parametrize("text", ["true", "1", "yes", "on", "TRUE", "Yes"])
def test_words_for_yes_switch_on(text: str) -> None:
    assert loaded(flag("server.access_log", text)).settings.server.access_log is True


@pytest.mark.parametrize("text", ["false", "0", "no", "off", "False", "OFF"])
def test_words_for_no_switch_off(text: str) -> None:
    assert loaded(flag("cache.enabled", text)).settings.cache.enabled is False


# Sizes from the CPUs


@pytest.mark.parametrize(("cpus", "shards", "http"), [(1, 1, 1), (2, 1, 1), (3, 1, 2), (8, 4, 4), (64, 16, 48)])
def test_half_of_the_cpus_count_and_the_rest_answer(cpus: int, shards: int, http: int) -> None:
    result = loaded(cpus=cpus)
    assert (result.settings.shards.workers, result.settings.server.http_workers) == (shards, http)
    assert result.sources["shards.workers"] == "default, from the number of CPUs"


def test_a_number_of_processes_that_was_given_stays() -> None:
    settings = loaded(flag("shards.workers", "3"), flag("server.http_workers", "9"), cpus=2).settings
    assert (settings.shards.workers, settings.server.http_workers) == (3, 9)


def test_fewer_partitions_than_half_of_the_cpus_bound_the_shards() -> None:
    assert loaded(flag("data.partitions", "2"), cpus=64).settings.shards.workers == 2


# One value for all processes


def test_settings_come_back_from_json_as_they_went() -> None:
    settings = loaded(
        flag("cache.ttl", "250ms"), flag("mongodb.uri", "mongodb://me:secret@db"), flag("storage.kind", "mongodb")
    ).settings
    assert from_json(to_json(settings)) == settings
    assert from_json(to_json(Settings())) == Settings()


@pytest.mark.parametrize(
    "document", [b'{"sever": {}}', b'{"server": {"prot": 1}}', b'{"server": {"port": 0}}', b'{"data": {"fsync": "x"}}']
)
def test_json_with_an_unknown_key_or_a_value_out_of_bounds_is_refused(document: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        from_json(document)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Settings().server.port = 1  # type: ignore[misc]


def test_resolving_again_changes_nothing() -> None:
    settings = resolve(Settings(), 8)
    assert resolve(settings, 2) == settings


# Secrets


def test_a_password_is_in_no_form_that_settings_are_printed_in() -> None:
    settings = loaded(flag("mongodb.uri", "mongodb://me:hunter2@db")).settings
    assert settings.mongodb.uri == "mongodb://me:hunter2@db"
    for printed in (repr(settings), str(settings), str(masked(settings)), as_written("mongodb.uri", settings.mongodb.uri)):
        assert "hunter2" not in printed
        assert "mongodb://me:***@db" in printed


def test_a_password_is_in_no_error(tmp_path: Path) -> None:
    uri = "mongo://me:hunter2@db"
    good = "mongodb://me:hunter2@db"
    for message in (
        refused(flag("mongodb.uri", uri)),
        refused(flag("mongodb.url", good)),
        refused(flag("mongodb.uri", "me:hunter2@db")),
        refused(flag("mongodb.uri", "mongo://me:hunter2" + "x" * 500 + "@db")),
        refused(environ={"MONGODB_URI": uri}),
        refused(environ={"CATCHALL_MONGODB_URL": good}),
        refused(file=written(tmp_path, f'[mongdb]\nuri = "{good}"\n')),
        refused(file=written(tmp_path, f'uri = "{good}"\n')),
        refused(file=written(tmp_path, f'mongodb = "{good}"\n')),
    ):
        assert "hunter2" not in message
