"""Logs of every process: one record, one line, on stderr.

    text  2026-11-25T04:25:19Z warning shard-0 storage refused flush 812, backlog kept retry_s=2
    JSON  {"ts":"2026-11-25T04:25:19Z","level":"warning","process":"shard-0","event":"storage refused …","retry_s":2}

What a caller passes as `extra` becomes fields of its own. A record never spans lines, not even with a traceback. The whole line
goes out in one write, so that lines of processes which share stderr do not mix.
"""

import logging
import sys
import time
from typing import Any

import msgspec

from catchall.engine.settings import Log

# Logs its every command and heartbeat at debug and info, at a rate that would bury our own lines.
CHATTY = ("pymongo",)

_OWN_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def setup(process_name: str, log: Log) -> None:
    """Send everything that this process logs to stderr, under its name. Replaces what was set up before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLine(process_name) if log.format == "json" else TextLine(process_name))
    level = logging.getLevelName(log.level.upper())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in CHATTY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


class TextLine(logging.Formatter):
    """Time, level, process, message, then the extra fields as key=value."""

    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname.lower()} {self._process_name} {record.getMessage()}"
        line += "".join(f" {key}={value}" for key, value in _extra(record).items())
        if error := _error(self, record):
            line += f" | {error}"
        return _one_line(line)


class JSONLine(logging.Formatter):
    """An object with ts, level, process, event, then the extra fields; "error" is the traceback."""

    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = _extra(record)
        if error := _error(self, record):
            fields["error"] = error
        # Ours come first and cannot be replaced by an extra field of the same name.
        ours = {
            "ts": _time(record),
            "level": record.levelname.lower(),
            "process": self._process_name,
            "event": record.getMessage(),
        }
        return _json(ours | {key: value for key, value in fields.items() if key not in ours})


class BadState:
    """Reports a state that repeats: once on entering it, once a minute while it lasts, once on leaving it.

    One object for each state that one process can be in, such as "MongoDB cannot be reached". Time is an argument: any clock
    that only goes forward, in seconds, the same one in every call.
    """

    def __init__(self, logger: logging.Logger, every_s: float = 60.0) -> None:
        self._logger = logger
        self._every_s = every_s
        self._since_s: float | None = None
        self._shown_s = 0.0
        self._suppressed = 0

    @property
    def lasts(self) -> bool:
        """Whether the state was entered and not left."""
        return self._since_s is not None

    def enter(self, message: str, now_s: float, **extra: object) -> None:
        """It is bad, or still bad. Logged as a warning on entering and when the last line is `every_s` old; else counted."""
        if self._since_s is None:
            self._since_s, self._shown_s, self._suppressed = now_s, now_s, 0
            self._logger.warning("%s", message, extra=extra)
        elif now_s - self._shown_s >= self._every_s:
            lasted = {"lasted_s": round(now_s - self._since_s, 1), "suppressed": self._suppressed}
            self._shown_s, self._suppressed = now_s, 0
            self._logger.warning("still: %s", message, extra=extra | lasted)
        else:
            self._suppressed += 1

    def leave(self, message: str, now_s: float, **extra: object) -> None:
        """It is good. Logged once, with how long it was not; nothing when it was not bad."""
        if self._since_s is None:
            return
        lasted = {"lasted_s": round(now_s - self._since_s, 1), "suppressed": self._suppressed}
        self._since_s = None
        self._logger.info("%s", message, extra=extra | lasted)


def _time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _OWN_ATTRIBUTES}


def _error(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "\n".join(parts)


def _one_line(line: str) -> str:
    return " | ".join(part.rstrip() for part in line.splitlines())


def _json(fields: dict[str, Any]) -> str:
    try:
        return msgspec.json.encode(fields, enc_hook=str).decode()
    except (TypeError, ValueError, OverflowError):  # text that is no UTF-8, keys that are no text: a line all the same
        return msgspec.json.encode({str(key): ascii(value) for key, value in fields.items()}).decode()
