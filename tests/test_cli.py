"""The command line: what each command prints, and the exit codes that scripts rely on (0 good, 1 failed, 2 wrong use)."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from catchall.engine.settings_sources import KINDS, load
from catchall.tools.cli import FLAGS, two_dashes

CONF = Path(__file__).parent.parent / "conf" / "catchall.toml"


def catchall(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CATCHALL_", "SERVER_", "MONGODB_", "DELIVERED_"))}
    command = [sys.executable, "-m", "catchall.tools.cli", *words]
    return subprocess.run(command, env=clean | environ, capture_output=True, text=True, timeout=60, check=False)


def effective(*words: str, **environ: str) -> dict[str, tuple[object, str]]:
    """What check-config says: for each setting its value, as TOML reads it, and its source."""
    done = catchall("check-config", *words, **environ)
    assert (done.returncode, done.stderr) == (0, "")
    document = tomllib.loads(done.stdout)
    sources = [line.rpartition(" # ")[2] for line in done.stdout.splitlines() if " # " in line]
    values = [(f"{section}.{key}", value) for section, content in document.items() for key, value in content.items()]
    return {name: (value, source) for (name, value), source in zip(values, sources, strict=True)}


def refused(*words: str, **environ: str) -> str:
    """What a wrong use says on stderr; exit code 2, nothing on stdout and no traceback are checked here."""
    done = catchall(*words, **environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    return done.stderr


def test_version_names_the_versions_that_matter() -> None:
    done = catchall("version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("catchall 0.1.0 (Python 3.")
    assert "granian 2." in done.stdout


def test_check_config_shows_every_setting_with_its_source() -> None:
    shown = effective("--port", "80", "--set", "storage.flush_rows=5", "--config", str(CONF), CATCHALL_LOG_LEVEL="debug")
    assert list(shown) == list(KINDS)
    assert shown["server.port"] == (80, "flag --port")
    assert shown["storage.flush_rows"] == (5, "flag --set")
    assert shown["log.level"] == ("debug", "environment CATCHALL_LOG_LEVEL")
    assert shown["data.fsync"] == ("interval", str(CONF))
    assert effective()["data.fsync"] == ("interval", "default")


def test_what_check_config_prints_is_a_file_that_gives_the_same_settings(tmp_path: Path) -> None:
    file = tmp_path / "shown.toml"
    file.write_text(catchall("check-config", "--cache-ttl", "1.5s", "--workers", "2").stdout)
    settings = load((), {}, file).settings
    assert (settings.cache.ttl, settings.shards.workers) == (1.5, 2)


def test_every_flag_sets_its_setting() -> None:
    values = {
        "--host": "::1",
        "--port": "80",
        "--data-dir": "elsewhere",
        "--storage": "memory",
        "--workers": "2",
        "--http-workers": "3",
        "--threshold": "7",
        "--flush-interval": "2s",
        "--fsync": "always",
        "--cache-ttl": "3s",
        "--cache": "false",
        "--log-format": "json",
    }
    assert list(values) == [flag.option for flag in FLAGS]
    shown = effective(*(word for pair in values.items() for word in pair))
    for flag in FLAGS:
        value, source = shown[flag.name]
        assert str(value).lower() == values[flag.option]
        assert source == f"flag {flag.option}"


def test_mongodb_alone_means_the_default_uri_and_storage_there() -> None:
    shown = effective("--mongodb")
    assert shown["storage.kind"] == ("mongodb", "flag --mongodb")
    assert shown["mongodb.uri"] == ("mongodb://127.0.0.1:27017", "default")


def test_mongodb_with_a_uri_means_that_uri() -> None:
    assert effective("--mongodb", "mongodb://db")["mongodb.uri"] == ("mongodb://db", "flag --mongodb")


def test_mongodb_alone_keeps_the_uri_of_the_environment() -> None:
    assert effective("--mongodb", MONGODB_URI="mongodb://db")["mongodb.uri"] == ("mongodb://db", "environment MONGODB_URI")


def test_the_last_of_two_flags_for_one_setting_wins() -> None:
    assert effective("--mongodb", "--storage", "sqlite")["storage.kind"] == ("sqlite", "flag --storage")
    assert effective("--port", "1", "--set", "server.port=2")["server.port"] == (2, "flag --set")


@pytest.mark.parametrize("dash", ["-", "--"])
def test_older_options_work_with_one_dash_or_two(dash: str) -> None:
    words = (f"{dash}config={CONF}", f"{dash}mongodb", f"{dash}cache", f"{dash}cache-ttl=5s", f"{dash}workers", "2")
    shown = effective(*words)
    assert shown["storage.kind"] == ("mongodb", "flag --mongodb")
    assert shown["cache.enabled"] == (True, "flag --cache")
    assert shown["cache.ttl"] == ("5s", "flag --cache-ttl")
    assert shown["shards.workers"] == (2, "flag --workers")
    assert shown["data.fsync"] == ("interval", str(CONF))


@pytest.mark.parametrize("words", [("-processor",), ("--processor", "batch"), ("-processor=batch",)])
def test_the_older_processor_option_is_ignored_with_one_line(words: tuple[str, ...]) -> None:
    done = catchall("check-config", *words)
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert "ignored" in done.stderr


def test_one_dash_becomes_two_but_for_short_options_and_numbers() -> None:
    assert two_dashes(["serve", "-workers", "-5", "-h", "--port", "-"]) == ["serve", "--workers", "-5", "-h", "--port", "-"]


def test_a_masked_password_is_all_that_check_config_shows() -> None:
    done = catchall("check-config", "--mongodb", "mongodb://me:hunter2@db")
    assert 'uri = "mongodb://me:***@db"' in done.stdout
    assert "hunter2" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_help_shows_every_option_and_every_setting_with_its_default(command: str) -> None:
    done = catchall(command, "--help")
    assert done.returncode == 0
    for option in ("--config", "--mongodb", "--set", *(flag.option for flag in FLAGS)):
        assert f"  {option} " in done.stdout
    for name in KINDS:
        assert f"  {name}=" in done.stdout
    assert "  server.port=8081\n" in done.stdout


@pytest.mark.parametrize("command", ["serve", "check-config"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--port", "0"), "flag --port: server.port = '0', expected a whole number from 1 to 65535"),
        (("--set", "server.prot=1"), "did you mean server.port?"),
        (("--set", "server.port"), "expected section.key=value"),
        (("--prot", "1"), "unknown option --prot; did you mean --port?"),
        (("--wor", "1"), "unknown option --wor"),
        (("-wrokers", "1"), "unknown option --wrokers; did you mean --workers?"),
        (("--flush-rows", "1"), "write --set storage.flush_rows=VALUE"),
        (("extra",), "unexpected argument 'extra'"),
        (("--port",), "expected one argument"),
        (("--config", "none.toml"), "expected a readable file (No such file or directory)"),
        (("--workers", "17"), "expected at most data.partitions, which is 16 (default)"),
    ],
)
def test_a_wrong_option_is_exit_code_2_with_a_message(command: str, words: tuple[str, ...], message: str) -> None:
    assert message in refused(command, *words)


def test_a_wrong_variable_is_exit_code_2_with_a_message() -> None:
    assert "did you mean CATCHALL_SERVER_PORT?" in refused("check-config", CATCHALL_SERVER_PROT="1")
    assert "environment SERVER_PORT: server.port = 'x'" in refused("check-config", SERVER_PORT="x")


@pytest.mark.parametrize("words", [(), ("swerve",), ("version", "extra"), ("version", "--port", "1")])
def test_a_wrong_command_is_exit_code_2_with_a_message(words: tuple[str, ...]) -> None:
    assert "catchall" in refused(*words)


def test_a_password_is_in_no_message_about_wrong_words() -> None:
    uri = "mongodb://me:hunter2@db"
    for words in ((uri,), ("--mongodb-uri", uri), ("--set", uri), ("--mongodb", "mongo://me:hunter2@db"), (f"--mongdb={uri}",)):
        assert "hunter2" not in refused("check-config", *words)


SERVE_WITH_ANOTHER_SUPERVISOR = """
import sys, types
supervisor = types.ModuleType("catchall.engine.supervisor")
supervisor.run = lambda settings: print(settings.server.port) or 1
sys.modules[supervisor.__name__] = supervisor
from catchall.tools.cli import main
sys.exit(main(["serve", "--port", "80", "-processor", "--log-format", "json"]))
"""


def test_serve_hands_the_settings_to_the_supervisor_and_ends_with_its_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVE_WITH_ANOTHER_SUPERVISOR], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, "80\n")
    line = json.loads(done.stderr)
    assert (line["level"], line["process"]) == ("warning", "supervisor")
    assert "--processor" in line["event"]
