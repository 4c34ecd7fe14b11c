"""Where settings come from: flags over the environment over a file over the defaults, each value with the name of its source.

    source       written as                                                     shown as
    flags        whatever tools/cli.py parsed, one Given a value                "flag --port"
    environment  CATCHALL_<SECTION>_<KEY>, or an older name (OLD_NAMES)         "environment CATCHALL_SERVER_PORT"
    file         TOML or JSON, one table a section; named by --config or        the path as given
                 CATCHALL_CONFIG
    default      engine/settings.py                                             "default"

Loading is strict: an unknown key, a value of the wrong kind or out of bounds, and two settings that contradict each other are
errors, in whichever source they stand, even if a stronger source has its say on the same key.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from catchall.engine.settings import AT_MOST, SEGMENTS_A_QUEUE_MIN, Settings, backlog_least, resolve
from catchall.engine.settings_values import Kind, format_duration, format_size, kind_of, mask, read

DEFAULT = "default"
CONFIG_VARIABLE = "CATCHALL_CONFIG"
OLD_NAMES = {
    "SERVER_HOST": "server.host",
    "SERVER_PORT": "server.port",
    "MONGODB_URI": "mongodb.uri",
    "MONGODB_DATABASE": "mongodb.database",
    "DELIVERED_THRESHOLD": "rules.threshold",
}
# CATCHALL_CONFIG names the file, CATCHALL_RUN is for our own processes. The rest appear by themselves: Kubernetes puts them
# into every pod that lives beside a Service named catchall.
NOT_SETTINGS = re.compile(r"CATCHALL_(CONFIG|RUN|SERVICE_HOST|SERVICE_PORT(_.+)?|PORT|PORT_\d+_(TCP|UDP|SCTP)(_.+)?)")

_SECTIONS: dict[str, Any] = get_type_hints(Settings)
KINDS: dict[str, Kind] = {
    f"{section}.{key}": kind_of(annotation)
    for section, struct in _SECTIONS.items()
    for key, annotation in get_type_hints(struct, include_extras=True).items()
}
VARIABLES: dict[str, str] = {f"CATCHALL_{name.upper().replace('.', '_', 1)}": name for name in KINDS}


class Given(NamedTuple):
    """One value as somebody wrote it: text, or a TOML or JSON value."""

    source: str
    name: str  # "section.key"
    value: object


class SettingsError(ValueError):
    """One thing wrong in one source. Nothing was started or changed; the message says what to write instead."""

    def __init__(self, source: str, name: str, value: object, expected: str) -> None:
        self.source, self.name, self.expected = source, name, expected
        self.value = mask(repr(value))[:200]
        super().__init__(f"{source}: {name} = {self.value}, expected {expected}")


@dataclass(frozen=True, slots=True)
class Loaded:
    """Checked settings, and for each "section.key" the source that decided it."""

    settings: Settings
    sources: dict[str, str]


def load(
    flags: Iterable[Given] = (),
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
    cpus: int | None = None,
) -> Loaded:
    """Read, check and combine all sources, and replace "auto" by numbers.

    flags    in the order given; the last one of a name wins.   environ  os.environ unless told.
    file     from --config; without it, CATCHALL_CONFIG.        cpus     what this process may use, unless told.
    Raises   SettingsError for the first thing found wrong, looking at the file, the environment and the flags, in this order.
    """
    environ = os.environ if environ is None else environ
    named_by = "flag --config"
    if file is None and environ.get(CONFIG_VARIABLE):
        file, named_by = Path(environ[CONFIG_VARIABLE]), f"environment {CONFIG_VARIABLE}"
    values: dict[str, Any] = {}
    sources = dict.fromkeys(KINDS, DEFAULT)
    for layer in (from_file(file, named_by) if file else (), from_environment(environ), flags):  # the weakest first
        for given in layer:
            values[given.name] = _checked(given)
            sources[given.name] = given.source
    settings = resolve(_build(values), len(os.sched_getaffinity(0)) if cpus is None else cpus)
    for name in ("shards.workers", "server.http_workers"):
        if not values.get(name):
            sources[name] += ", from the number of CPUs"
    _check_pairs(settings, sources)
    _check_backlog(settings, sources["data.backlog_max"])
    _check_uri(settings, sources["mongodb.uri"])
    return Loaded(settings, sources)


def from_environment(environ: Mapping[str, str]) -> Iterator[Given]:
    """The older names first, so that ours win. Raises SettingsError for a CATCHALL_ variable that is no setting."""
    for variable, name in OLD_NAMES.items():
        if variable in environ:
            yield Given(f"environment {variable}", name, environ[variable])
    for variable in sorted(environ):
        if variable in VARIABLES:
            yield Given(f"environment {variable}", VARIABLES[variable], environ[variable])
        elif variable.startswith("CATCHALL_") and not NOT_SETTINGS.fullmatch(variable):
            near = difflib.get_close_matches(variable, VARIABLES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            expected = f"the name of a setting, CATCHALL_<SECTION>_<KEY>{hint}"
            raise SettingsError("environment", variable, environ[variable], expected)


def from_file(path: Path, named_by: str) -> Iterator[Given]:
    """Every value in a TOML or JSON file. Raises SettingsError when it cannot be read or is not made of sections."""
    try:
        match path.suffix.lower():
            case ".toml":
                document: object = tomllib.loads(path.read_text("utf-8"))
            case ".json":
                document = json.loads(path.read_text("utf-8"), object_pairs_hook=_no_repeats)
            case _:
                raise SettingsError(named_by, "file", str(path), "a name that ends in .toml or .json")
    except OSError as error:
        raise SettingsError(named_by, "file", str(path), f"a readable file ({error.strerror})") from None
    except SettingsError:
        raise
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, JSONDecodeError, UnicodeDecodeError
        raise SettingsError(named_by, "file", str(path), f"valid {path.suffix[1:].upper()} ({mask(str(error))})") from None
    if not isinstance(document, dict):
        raise SettingsError(str(path), "the document", document, "an object with a section for each key")
    for section, content in document.items():
        if not isinstance(content, dict):
            if section in _SECTIONS:
                raise SettingsError(str(path), section, content, f"a section: a table with keys such as {_keys_of(section)[0]}")
            raise _unknown(Given(str(path), section, content))
        if section not in _SECTIONS:
            near = difflib.get_close_matches(section, _SECTIONS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise SettingsError(str(path), section, content, f"a section out of {', '.join(_SECTIONS)}{hint}")
        for key, value in content.items():
            yield Given(str(path), f"{section}.{key}", value)


def as_written(name: str, value: object) -> str:
    """A value as one would write it in TOML, passwords masked."""
    match KINDS[name].name, value:
        case "duration", float():
            return f'"{format_duration(value)}"'
        case "size", int():
            return f'"{format_size(value)}"'
        case _:
            return mask(json.dumps(value, ensure_ascii=False))


def value_of(settings: Settings, name: str) -> Any:
    """The value of "section.key"."""
    section, key = name.split(".")
    return getattr(getattr(settings, section), key)


def _checked(given: Given) -> Any:
    if given.name not in KINDS:
        raise _unknown(given)
    kind = KINDS[given.name]
    try:
        return read(kind, given.value)
    except ValueError:
        raise SettingsError(given.source, given.name, given.value, kind.expected) from None


def _unknown(given: Given) -> SettingsError:
    section, _, key = given.name.rpartition(".")
    same_key = [name for name in KINDS if name.endswith(f".{key}")]
    near = same_key or difflib.get_close_matches(given.name, KINDS, n=1) or difflib.get_close_matches(key, _all_keys(), n=1)
    if near:
        near_name = near[0] if near[0] in KINDS else next(name for name in KINDS if name.endswith(f".{near[0]}"))
        hint = f"; did you mean {near_name}?"
    else:
        hint = f"; {section} has {', '.join(_keys_of(section))}" if section in _SECTIONS else "; check-config lists them all"
    return SettingsError(given.source, given.name, given.value, f"the name of a setting, section.key{hint}")


def _all_keys() -> list[str]:
    return [name.partition(".")[2] for name in KINDS]


def _keys_of(section: str) -> list[str]:
    return [name.partition(".")[2] for name in KINDS if name.startswith(f"{section}.")]


def _build(values: Mapping[str, Any]) -> Settings:
    sections: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    for name, value in values.items():
        section, key = name.split(".")
        sections[section][key] = value
    return Settings(**{section: _SECTIONS[section](**content) for section, content in sections.items()})


def _check_pairs(settings: Settings, sources: Mapping[str, str]) -> None:
    for low, high, why in AT_MOST:
        low_value, high_value = value_of(settings, low), value_of(settings, high)
        if low_value <= high_value:
            continue
        if sources[low] == DEFAULT:  # then whoever lowered the other one is to be told
            expected = f"at least {low}, which is {as_written(low, low_value)} ({sources[low]}): {why}"
            raise SettingsError(sources[high], high, _shown(high, high_value), expected)
        expected = f"at most {high}, which is {as_written(high, high_value)} ({sources[high]}): {why}"
        raise SettingsError(sources[low], low, _shown(low, low_value), expected)


def _check_backlog(settings: Settings, source: str) -> None:
    least = backlog_least(settings, settings.data.partitions)
    if settings.data.backlog_max < least:
        queues = f"{settings.server.http_workers} server.http_workers * {settings.data.partitions} data.partitions"
        expected = (
            f"at least {format_size(least)}: {SEGMENTS_A_QUEUE_MIN} data.segment_size for each of {queues}; with less, writes "
            f"could be refused for ever with nothing left to count"
        )
        raise SettingsError(source, "data.backlog_max", format_size(settings.data.backlog_max), expected)


def _check_uri(settings: Settings, source: str) -> None:
    """What MongoDB's own library would refuse at the first connection is refused here."""
    if source == DEFAULT:
        return
    from catchall.storage.mongodb import BadMongoURI, check_uri  # only here: that library takes a moment to load

    try:
        check_uri(settings.mongodb.uri)
    except BadMongoURI as bad:
        raise SettingsError(source, "mongodb.uri", settings.mongodb.uri, f"a URI that can work; {bad}") from None


def _shown(name: str, value: object) -> object:
    return value if isinstance(value, int) and KINDS[name].name == "count" else as_written(name, value).strip('"')


def _no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    seen: dict[str, object] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"{key!r} appears twice in one object")
        seen[key] = value
    return seen
