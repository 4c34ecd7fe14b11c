"""Every error answer is a problem document that a program and a person can both read."""

import json
from typing import Any

import pytest

from catchall.http.bulk import ERRORS_MAX, EventError
from catchall.http.problems import DETAIL_MAX, Response, problem


def document(response: Response) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(response.body["body"])
    return found


def headers(response: Response) -> dict[bytes, bytes]:
    found = dict(response.start["headers"])
    assert len(found) == len(response.start["headers"]), "no header twice"
    return found


def test_an_answer_is_two_asgi_messages_with_type_and_length() -> None:
    response = problem(404, "no such path; nothing was recorded")
    assert response.start["type"] == "http.response.start"
    assert response.start["status"] == 404
    assert response.body["type"] == "http.response.body"
    assert headers(response) == {
        b"content-type": b"application/problem+json",
        b"content-length": b"%d" % len(response.body["body"]),
    }


def test_without_a_code_the_status_says_it_all() -> None:
    assert document(problem(404, "no such path")) == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "no such path",
    }


def test_a_code_becomes_a_type_that_does_not_change() -> None:
    assert document(problem(400, "'a b' holds a space", code="bad_domain")) == {
        "type": "urn:catchall:problem:bad_domain",
        "title": "Bad domain",
        "status": 400,
        "detail": "'a b' holds a space",
    }


def test_headers_are_sent_when_they_are_asked_for() -> None:
    assert headers(problem(503, "full", retry_after=2))[b"retry-after"] == b"2"
    assert headers(problem(405, "no", allow="GET, HEAD"))[b"allow"] == b"GET, HEAD"
    assert headers(problem(413, "too large", close=True))[b"connection"] == b"close"


@pytest.mark.parametrize(("wrong", "told", "truncated"), [(1, 1, False), (20, 20, False), (21, 20, True), (9000, 20, True)])
def test_the_first_errors_are_listed_and_the_rest_counted(wrong: int, told: int, truncated: bool) -> None:
    errors = [EventError(index, "bad_domain", "no") for index in range(min(wrong, ERRORS_MAX))]
    found = document(problem(400, "nothing was recorded", code="bad_events", errors=errors, rejected=wrong))
    assert found["errors"] == [{"index": index, "code": "bad_domain", "detail": "no"} for index in range(told)]
    assert (found["rejected"], found["errors_truncated"]) == (wrong, truncated)


def test_a_longer_list_of_errors_is_cut_here_too() -> None:
    found = document(problem(400, "no", errors=[EventError(index, "bad_event", "no") for index in range(30)]))
    assert (len(found["errors"]), found["rejected"], found["errors_truncated"]) == (ERRORS_MAX, 30, True)


def test_any_text_can_be_sent_and_a_long_one_is_cut() -> None:
    found = document(problem(400, "\ud800\x00ü\n\"" + "x" * 5000, errors=[EventError(0, "bad_event", "\udfff" * 5000)]))
    assert found["detail"].startswith("\\ud800\x00ü\n\"xxx")
    assert found["detail"].endswith("…")
    assert len(found["detail"]) <= DETAIL_MAX + 5
    assert found["errors"][0]["detail"].startswith("\\udfff")


@pytest.mark.parametrize("status", [400, 404, 405, 408, 409, 411, 413, 415, 422, 429, 431, 500, 501, 503])
def test_every_status_that_the_service_gives_has_a_title(status: int) -> None:
    assert document(problem(status, "why"))["title"]
