"""How durations and sizes are written, and what is hidden of a URI."""

import pytest

from catchall.engine.settings_values import format_duration, format_size, mask, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1s", 1.0),
        ("250ms", 0.25),
        ("100ms", 0.1),
        ("5m", 300.0),
        ("1h", 3600.0),
        ("1.5s", 1.5),
        ("2", 2.0),
        ("0.5", 0.5),
        ("0", 0.0),
    ],
)
def test_a_duration_is_read_exactly_as_written(text: str, expected: float) -> None:
    assert parse_duration(text) == expected
    assert parse_duration(format_duration(expected)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4MiB", 4 << 20),
        ("64KiB", 64 << 10),
        ("1GiB", 1 << 30),
        ("1TiB", 1 << 40),
        ("1.5KiB", 1536),
        ("100", 100),
        ("7B", 7),
        ("0", 0),
    ],
)
def test_a_size_is_read_exactly_as_written(text: str, expected: int) -> None:
    assert parse_size(text) == expected
    assert parse_size(format_size(expected)) == expected


@pytest.mark.parametrize(
    "text", ["", "s", "1 s", "1sec", "1S", "-1", "+1", "1e3", "inf", "nan", "1h30m", "1.s", ".5", "١s", "1" * 40]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_duration(text)


@pytest.mark.parametrize("text", ["", "MiB", "1 MiB", "1M", "1MB", "1mib", "-1", "0.5", "1e3", "0x10", "1" * 40])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("mongodb://me:pass@db:27017/x", "mongodb://me:***@db:27017/x"),
        ("mongodb://me:p@ss:w/rd@db", "mongodb://me:***@db"),
        ("mongodb://me:a://b@db", "mongodb://me:***@db"),
        ("me:pass@db", "me:***@db"),
        ("mongodb://db/?tlsCertificateKeyFilePassword=pass&w=1", "mongodb://db/?tlsCertificateKeyFilePassword=***&w=1"),
        ("mongodb://db:27017", "mongodb://db:27017"),
        ("mongodb://me@db", "mongodb://me@db"),
    ],
)
def test_a_masked_uri_keeps_all_but_its_secrets(uri: str, shown: str) -> None:
    assert mask(uri) == shown
