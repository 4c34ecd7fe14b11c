"""How one setting is written: text (or a TOML or JSON value) in, a checked value out, and back again for people to read.

    kind      written as                                              held as
    duration  "250ms", "1s", "5m", "1h", or a bare number of seconds  float, seconds
    size      "64KiB", "4MiB", "1GiB", "1TiB", or a bare number       int, bytes
    count     a whole number                                          int
    switch    true/false, yes/no, on/off, 1/0                         bool
    choice    one of a few words                                      str
    text      anything that its pattern allows                        str

The bounds sit in the annotation of each setting, so that this module and msgspec's own decoder enforce the same ones.
"""

import re
from decimal import Decimal
from typing import Any, Literal, NamedTuple, get_args, get_origin

from msgspec import Meta

MAX_INT = 2**63 - 1

# Each unit as a ratio, so that "100ms" is exactly the float 0.1 and never 0.1000…1.
DURATION_UNITS = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600)}
SIZE_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
SWITCH_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}

_NUMBER_UNIT = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)([A-Za-z]*)")
_WHOLE = re.compile(r"[+-]?[0-9]{1,19}")


def seconds(least: float, most: float) -> Meta:
    """A duration from `least` to `most` seconds."""
    return Meta(ge=least, le=most, extra={"kind": "duration"})


def size(least: int, most: int) -> Meta:
    """A number of bytes from `least` to `most`."""
    return Meta(ge=least, le=most, extra={"kind": "size"})


def count(least: int, most: int) -> Meta:
    """A whole number from `least` to `most`."""
    return Meta(ge=least, le=most, extra={"kind": "count"})


def text(expected: str, pattern: str = r"^[^\x00-\x1f]+\Z") -> Meta:
    """Text that `pattern` matches; `expected` says the same in words, for the error."""
    return Meta(pattern=pattern, extra={"kind": "text", "expected": expected})


class Kind(NamedTuple):
    """What a setting's annotation says, in the terms of this module."""

    name: Literal["duration", "size", "count", "switch", "choice", "text"]
    least: float = 0
    most: float = 0
    choices: tuple[str, ...] = ()
    pattern: str = ""
    words: str = ""

    @property
    def expected(self) -> str:
        """The end of the sentence "expected …"."""
        match self.name:
            case "duration":
                low, high = format_duration(self.least), format_duration(self.most)
                return f'a duration from {low} to {high}, such as "250ms", "1s", "5m", "1h" or a bare number of seconds'
            case "size":
                high = "" if self.most >= MAX_INT else f" to {format_size(int(self.most))}"
                low = format_size(int(self.least))
                return f'a size from {low}{high or " up"}, such as "64KiB", "4MiB", "1GiB" or a bare number of bytes'
            case "count":
                return f"a whole number from {self.least}" + (" up" if self.most >= MAX_INT else f" to {self.most}")
            case "switch":
                return "true or false (also yes/no, on/off, 1/0)"
            case "choice":
                return "one of " + ", ".join(self.choices)
            case "text":
                return self.words


def kind_of(annotation: Any) -> Kind:
    """The kind of a setting, from its annotation as typing.get_type_hints(…, include_extras=True) gives it."""
    if annotation is bool:
        return Kind("switch")
    if get_origin(annotation) is Literal:
        return Kind("choice", choices=get_args(annotation))
    meta: Meta = annotation.__metadata__[0]
    extra: dict[str, Any] = meta.extra or {}
    if extra["kind"] == "text":
        return Kind("text", pattern=meta.pattern or "", words=extra["expected"])
    return Kind(extra["kind"], least=meta.ge or 0, most=meta.le or 0)


def parse_duration(written: str) -> float:
    """Seconds. Raises ValueError for anything but the forms in the table above."""
    found = _NUMBER_UNIT.fullmatch(written.strip())
    if not found or (found[2] or "s") not in DURATION_UNITS:
        raise ValueError(f"{written!r} is no duration")
    return float(Decimal(found[1]) * DURATION_UNITS[found[2] or "s"])


def parse_size(written: str) -> int:
    """Bytes. Raises ValueError for anything but the forms in the table above, and for a part of a byte."""
    found = _NUMBER_UNIT.fullmatch(written.strip())
    if not found or (found[2] or "B") not in SIZE_UNITS:
        raise ValueError(f"{written!r} is no size")
    exact = Decimal(found[1]) * SIZE_UNITS[found[2] or "B"]
    if exact != int(exact):
        raise ValueError(f"{written!r} is no whole number of bytes")
    return int(exact)


def format_duration(value: float) -> str:
    """The shortest exact form: 300.0 is "5m", 0.25 is "250ms"."""
    exact = Decimal(repr(value))
    for unit in ("h", "m", "s", "ms"):
        number = exact / DURATION_UNITS[unit]
        if number and number == int(number):
            return f"{int(number)}{unit}"
    return f"{exact:f}s" if exact else "0s"


def format_size(value: int) -> str:
    """The shortest exact form: 4194304 is "4MiB", 1000 is "1000"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if value and value % SIZE_UNITS[unit] == 0:
            return f"{value // SIZE_UNITS[unit]}{unit}"
    return str(value)


def read(kind: Kind, given: object) -> Any:
    """The value that `given` stands for: text from a flag, a variable or a file, or a number or boolean from a file.

    Raises ValueError when it is not what kind.expected asks for (the message is for debugging; show kind.expected to people).
    """
    value = _convert(kind, given)
    if kind.name in ("duration", "size", "count") and not kind.least <= value <= kind.most:
        raise ValueError(f"{value} is out of bounds")
    if kind.name == "choice" and value not in kind.choices:
        raise ValueError(f"{value!r} is no choice")
    if kind.name == "text" and not re.search(kind.pattern, value):
        raise ValueError(f"{value!r} does not match {kind.pattern}")
    if kind.name == "text":
        value.encode()  # what was no UTF-8 in a variable arrives here as surrogates: a UnicodeError is a ValueError
    return value


def _convert(kind: Kind, given: object) -> Any:
    if isinstance(given, str):
        return _from_text(kind, given)
    if kind.name == "switch" and isinstance(given, bool):
        return given
    if not isinstance(given, bool):
        if kind.name in ("count", "size") and isinstance(given, int):
            return given
        if kind.name == "duration" and isinstance(given, int | float):
            return float(max(-1, min(given, MAX_INT)))  # an int may be too large for any float; the bounds refuse it next
    raise ValueError(f"{type(given).__name__} cannot be a {kind.name}")


def _from_text(kind: Kind, given: str) -> Any:
    match kind.name:
        case "duration":
            return parse_duration(given)
        case "size":
            return parse_size(given)
        case "count":
            if not _WHOLE.fullmatch(given.strip()):
                raise ValueError(f"{given!r} is no whole number")
            return int(given)
        case "switch":
            if given.strip().lower() not in SWITCH_WORDS:
                raise ValueError(f"{given!r} is neither true nor false")
            return SWITCH_WORDS[given.strip().lower()]
        case "choice":
            return given.strip().lower()
        case "text":
            return given


def mask(value: str) -> str:
    """The same text without its secrets: the password of a URI, and options named like a password, a token or a secret.

    It would rather hide too much: everything between the user's name and the last @ is taken for the password.
    """
    scheme, separator, rest = value.partition("://") if "://" in value else ("", "", value)
    credentials, at, host = rest.rpartition("@")
    if ":" in credentials:
        credentials = credentials.partition(":")[0] + ":***"
    hidden = re.sub(r"(?i)((?:password|token|secret)[^=:&]*[=:])[^&,]+", r"\1***", host)
    return f"{scheme}{separator}{credentials}{at}{hidden}"
