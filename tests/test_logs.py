"""Logs: one record is one line, in text and in JSON, and a state that repeats does not flood them."""

import json
import logging
import sys
from typing import Any

import pytest

from catchall.engine.logs import BadState, JSONLine, TextLine


def record(message: str, *args: object, error: BaseException | None = None, **extra: object) -> logging.LogRecord:
    exc_info = (type(error), error, error.__traceback__) if error else None
    made = logging.getLogger("any").makeRecord("any", logging.WARNING, __file__, 1, message, args, exc_info, extra=extra)
    made.created = 1_764_044_719.9
    return made


def failure() -> BaseException:
    try:
        raise OSError("no\nspace")
    except OSError:
        error = sys.exc_info()[1]
        assert error is not None
        return error


class Seen(logging.Handler):
    """Keeps what was logged: level, message and the numbers that BadState adds."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[Any, ...]] = []

    def emit(self, record: logging.LogRecord) -> None:
        fields = vars(record)
        self.lines.append((record.levelname, record.getMessage(), fields.get("lasted_s"), fields.get("suppressed")))


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def state(seen: Seen) -> BadState:
    logger = logging.Logger("state")
    logger.addHandler(seen)
    return BadState(logger, every_s=60)


def test_a_text_line_has_time_level_process_message_and_extra_fields() -> None:
    line = TextLine("shard-0").format(record("flush %d refused", 812, retry_s=2))
    assert line == "2025-11-25T04:25:19Z warning shard-0 flush 812 refused retry_s=2"


def test_a_json_line_has_the_same_as_fields() -> None:
    line = JSONLine("shard-0").format(record("flush %d refused", 812, retry_s=2))
    assert json.loads(line) == {
        "ts": "2025-11-25T04:25:19Z",
        "level": "warning",
        "process": "shard-0",
        "event": "flush 812 refused",
        "retry_s": 2,
    }


@pytest.mark.parametrize("formatter", [TextLine("p"), JSONLine("p")])
def test_a_record_is_one_line_even_with_a_traceback_and_line_breaks(formatter: logging.Formatter) -> None:
    line = formatter.format(record("two\nlines\r\nand\u2028more", error=failure(), path="a\nb"))
    assert len(line.encode().split(b"\n")) == 1
    assert "OSError" in line


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, object(), "\udcff", float("nan"), 2**200, {(1, 2): 3}])
def test_a_field_that_json_cannot_hold_still_gives_a_line(value: object) -> None:
    assert json.loads(JSONLine("p").format(record("odd", value=value)))["event"].strip("'") == "odd"


def test_an_extra_field_cannot_pass_for_one_of_ours() -> None:
    assert json.loads(JSONLine("p").format(record("real", event="forged", level="debug")))["event"] == "real"


def test_a_bad_state_is_logged_on_entering_once_a_minute_and_on_leaving(state: BadState, seen: Seen) -> None:
    for now_s in range(100, 231):
        state.enter("MongoDB is away", float(now_s))
    state.leave("MongoDB is back", 240.0)
    assert seen.lines == [
        ("WARNING", "MongoDB is away", None, None),
        ("WARNING", "still: MongoDB is away", 60.0, 59),
        ("WARNING", "still: MongoDB is away", 120.0, 59),
        ("INFO", "MongoDB is back", 140.0, 10),
    ]


def test_leaving_a_state_that_was_not_entered_says_nothing(state: BadState, seen: Seen) -> None:
    state.leave("MongoDB is back", 1.0)
    state.enter("MongoDB is away", 2.0)
    state.leave("MongoDB is back", 3.0)
    state.leave("MongoDB is back", 4.0)
    assert [level for level, *_ in seen.lines] == ["WARNING", "INFO"]


def test_a_state_entered_again_is_logged_again(state: BadState, seen: Seen) -> None:
    for now_s in (1.0, 3.0):
        state.enter("away", now_s)
        assert state.lasts
        state.leave("back", now_s + 1)
        assert not state.lasts
    assert [message for _, message, *_ in seen.lines] == ["away", "back", "away", "back"]
