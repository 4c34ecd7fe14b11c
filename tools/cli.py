"""The command line: `catchall serve`, `check-config`, `check-data` and `version`; `catchall drill` is in crash_drill.py.

Exit codes  0 good   1 failed   2 wrong use: a bad flag, an unknown setting, a bad value, a file that cannot be read
            3 of check-data: damage was found
Settings    flag > environment > file > default; a flag is only a short name of a setting, and --set reaches every one
Old names   -config -mongodb -cache -cache-ttl -processor -workers: every option may be written with one dash
"""

import argparse
import difflib
import importlib.metadata
import logging
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from catchall.engine import logs
from catchall.engine.process import end_on_stop_signals
from catchall.engine.settings import Settings
from catchall.engine.settings_sources import KINDS, Given, Loaded, SettingsError, as_written, load, value_of
from catchall.engine.settings_values import mask

GOOD, FAILED, WRONG_USE = 0, 1, 2


class Flag(NamedTuple):
    """A flag that is the short name of one setting."""

    option: str
    name: str
    shown: str
    help: str
    bare: str | None = None  # what the flag means without a value, where it may stand without one


FLAGS = (
    Flag("--host", "server.host", "H", "address to listen on"),
    Flag("--port", "server.port", "P", "port to listen on"),
    Flag("--data-dir", "data.dir", "DIR", "folder of the event queues and the ledger"),
    Flag("--storage", "storage.kind", "KIND", "where totals live: sqlite, memory or mongodb"),
    Flag("--workers", "shards.workers", "N", "counting processes (shards); 0 takes half of the CPUs"),
    Flag("--http-workers", "server.http_workers", "M", "HTTP processes; 0 takes the other CPUs"),
    Flag("--threshold", "rules.threshold", "T", "a catch-all has no bounce and more deliveries than this"),
    Flag("--flush-interval", "storage.flush_interval", "TIME", "how often counts go to storage"),
    Flag("--fsync", "data.fsync", "WHEN", "when events are forced to disk: interval, always or never"),
    Flag("--cache-ttl", "cache.ttl", "TIME", "how long counts of other hosts are served from memory"),
    Flag("--cache", "cache.enabled", "BOOL", "serve from memory; alone means true", bare="true"),
    Flag("--log-format", "log.format", "FORMAT", "auto, text or json"),
)


class _SettingAction(argparse.Action):
    """Notes the value under the setting's name; the order of the command line is kept, so the last one wins."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        namespace.given.append(Given(f"flag {option_string}", self.dest, values))


class _MongoDBAction(argparse.Action):
    """Storage in MongoDB, and its URI where one follows."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        namespace.given.append(Given(f"flag {option_string}", "storage.kind", "mongodb"))
        if values is not None:
            namespace.given.append(Given(f"flag {option_string}", "mongodb.uri", values))


class _SetAction(argparse.Action):
    """section.key=value"""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        name, equals, value = values.partition("=")
        if not equals:
            parser.error(f"{option_string} {mask(values)}: expected section.key=value, such as --set data.segment_size=8MiB")
        namespace.given.append(Given(f"flag {option_string}", name.strip(), value.strip()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Wrong options end in SystemExit(2), as argparse does it."""
    words = two_dashes(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["drill"]:
        from catchall.tools import crash_drill  # only here: the others need none of it, and it has exit codes of its own

        return crash_drill.main(words[1:])
    parser, commands = _parsers()
    args, unknown = parser.parse_known_args(words)
    if unknown:
        commands[args.command].error(_unknown(unknown, commands[args.command]))
    try:
        match args.command:
            case "serve":
                return serve(args)
            case "check-config":
                return check_config(args)
            case "check-data":
                from catchall.tools.check_data import check_data  # only here, as with `serve`

                return check_data(args.folder, args.json)
            case _:
                return version()
    except SettingsError as error:
        print(f"catchall: {error}", file=sys.stderr)
        return WRONG_USE


def serve(args: argparse.Namespace) -> int:
    """Start the service and stay until it ends."""
    end_on_stop_signals()
    settings = _load(args).settings
    logs.setup("supervisor", settings.log)
    if args.processor is not None:
        logging.getLogger(__name__).warning("flag --processor has no meaning any more and is ignored")
    from catchall.engine.supervisor import run  # only here: the other commands need none of the service

    return run(settings)


def check_config(args: argparse.Namespace) -> int:
    """Print what would be in force, as TOML, with the source of each value."""
    loaded = _load(args)
    if args.processor is not None:
        print("catchall: flag --processor has no meaning any more and is ignored", file=sys.stderr)
    print("\n".join(_effective(loaded)))
    return GOOD


def version() -> int:
    """Print the versions that matter in a report of a problem."""
    ours, granian = importlib.metadata.version("catchall"), importlib.metadata.version("granian")
    print(f"catchall {ours} (Python {platform.python_version()}, granian {granian})")
    return GOOD


def two_dashes(argv: Sequence[str]) -> list[str]:
    """The same words with -workers as --workers; -h and negative numbers stay as they are."""
    return [f"-{word}" if re.match(r"-[A-Za-z][A-Za-z-]", word) else word for word in argv]


def _load(args: argparse.Namespace) -> Loaded:
    return load(args.given, file=args.config)


def _effective(loaded: Loaded) -> list[str]:
    lines: list[str] = []
    for name in KINDS:
        section, _, key = name.partition(".")
        if f"[{section}]" not in lines:
            lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        lines.append(f"{key + ' = ' + as_written(name, value_of(loaded.settings, name)):44} # {loaded.sources[name]}")
    return lines


def _unknown(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """What to say about words that no option took."""
    option = next((word.partition("=")[0] for word in words if word.startswith("--")), None)
    if option is None:
        return f"unexpected argument {mask(words[0])!r}"
    key = option.lstrip("-").replace("-", "_")
    for name in KINDS:
        if name.partition(".")[2] == key:
            return f"unknown option {option}; write --set {name}=VALUE"
    near = difflib.get_close_matches(option, [o for action in parser._actions for o in action.option_strings], n=1)
    return f"unknown option {option}" + (f"; did you mean {near[0]}?" if near else "; see --help")


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="catchall",
        description="Learns from deliveries and bounces which recipient domains accept every address.",
        epilog="Exit codes: 0 good, 1 failed, 2 wrong use.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands: dict[str, argparse.ArgumentParser] = {}
    for command, help_text in (
        ("serve", "run the service"),
        ("check-config", "check all settings and print those in force, each with its source"),
    ):
        commands[command] = subparsers.add_parser(
            command,
            help=help_text,
            description=f"{help_text[0].upper()}{help_text[1:]}.",
            usage=f"catchall {command} [options]",
            epilog=_epilog(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        _add_settings(commands[command])
    subparsers.add_parser("drill", help="hurt a service of its own under load and compare every count")
    commands["check-data"] = check_data = subparsers.add_parser(
        "check-data",
        help="examine a data folder that no service uses; changes nothing",
        epilog="Exit codes: 0 good, 1 could not examine it, 2 wrong use, 3 damage was found.",
        allow_abbrev=False,
    )
    check_data.add_argument("folder", metavar="DIR", type=Path, help="the data folder")
    check_data.add_argument("--json", action="store_true", help="print the report as JSON")
    commands["version"] = subparsers.add_parser("version", help="print the version", allow_abbrev=False)
    return parser, commands


def _add_settings(parser: argparse.ArgumentParser) -> None:
    defaults = Settings()
    parser.set_defaults(given=[])
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML or JSON file (default: CATCHALL_CONFIG, or none)")
    for flag in FLAGS:
        default = as_written(flag.name, value_of(defaults, flag.name)).strip('"')
        parser.add_argument(
            flag.option,
            action=_SettingAction,
            dest=flag.name,
            metavar=flag.shown,
            nargs="?" if flag.bare else None,
            const=flag.bare,
            default=argparse.SUPPRESS,
            help=f"{flag.help} (default: {default})",
        )
    parser.add_argument(
        "--mongodb",
        action=_MongoDBAction,
        metavar="URI",
        nargs="?",
        default=argparse.SUPPRESS,
        help=f"storage in MongoDB; alone, with the URI of the environment or file (default: {defaults.mongodb.uri})",
    )
    parser.add_argument(
        "--set",
        action=_SetAction,
        metavar="SECTION.KEY=VALUE",
        default=argparse.SUPPRESS,
        help="any setting by its name; may be repeated",
    )
    parser.add_argument("--processor", metavar="NAME", nargs="?", const="", help="of an older version; accepted and ignored")


def _epilog() -> str:
    """Every setting with its default, for --help."""
    defaults = Settings()
    lines = [f"  {name + '=' + as_written(name, value_of(defaults, name)).strip(chr(34))}" for name in KINDS]
    return "\n".join(
        (
            'Times are written as "250ms", "1s", "5m", "1h", sizes as "64KiB", "4MiB", "1GiB". A setting comes from its',
            "flag, or else from the environment (server.port is CATCHALL_SERVER_PORT), or else from the file, or else it has",
            "its default. Options may be written with one dash. conf/catchall.toml explains every setting.",
            "",
            "settings for --set, with their defaults (0 processes: as many as the CPUs suggest):",
            *lines,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
