"""Many events in one request: from the body to one blob of event lines for each partition. Pure, no I/O.

Format      One JSON object an event, a newline after each: {"domain": "example.com", "type": "delivered", "count": 12}. type
            is "delivered" or "bounced"; count, 1 to COUNT_MAX, may be left out and is then 1; so may id, a text of 1 to ID_MAX
            characters: an event whose id, type and domain were counted before counts nothing. No other field is known, and
            one that is not known is an error: who sends it expects something of it. Of a field given twice the last counts.
Tolerated   A UTF-8 byte order mark at the start, CRLF, blank lines, and white space wherever JSON allows it: several objects on
            one line, or one on several, are read as well. Blank lines are no events: an index counts events, from 0.
Ids         Where the request has a key, events without an id of their own get one made of key, digest and index.
Paths       Fast: the whole request is decoded, checked and split by a few C calls; no table of names, whose look-ups would miss
            the processor's cache. Middle: it does not pass as a whole, so its names are normalised one by one. Slow: something
            is wrong, or odd; every event is examined alone.
Invariants  1 the slow path decides: what the others accept, it accepts, with the same lines   2 all or nothing: with one wrong
            event, no line leaves this file   3 no body, however nested, long or malformed, ends in anything but Parsed,
            BadEvents or TooManyEvents
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal
from zlib import crc32

import msgspec
from msgspec import UNSET, UnsetType

from catchall.engine import lines
from catchall.engine.ids import event_id
from catchall.engine.rules import COUNT_MAX, LABEL_MAX, BadName, normalise, partition_of

Kind = Literal["delivered", "bounced"]
EventCode = Literal[
    "bad_json",
    "bad_event",
    "unknown_type",
    "count_out_of_range",
    "bad_id",
    "unknown_field",
    "bad_domain",
    "domain_too_long",
    "domain_literal",
]
IdOf = Callable[[int], bytes]  # the index of an event -> the hex digits of its id
Counted = tuple[Kind, str, int]  # an event that stands for more than one: what happened, to which name, how often

_Checked = tuple[Kind, bytes, int, str | None]  # what happened, to which name in normal form, how often, the id it came with
ID_MAX: Final = 255  # characters
ERRORS_MAX: Final = 20  # errors told in full; the rest are only counted
_OPENINGS_MAX = 64  # [ and { in one line; past that the line is not decoded, since the decoder recurses
_BOM = b"\xef\xbb\xbf"
_SIGNS: dict[Kind, bytes] = {"delivered": b"+", "bounced": b"-"}
_COMMON_BYTES = b"abcdefghijklmnopqrstuvwxyz_-.\n"  # what names in normal form are made of, but for digits
_FIELDS = frozenset(("domain", "type", "count", "id"))


class _PlainEvent(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """What nearly every event is: one, with a name so short that no label of it can be too long."""

    domain: Annotated[str, msgspec.Meta(max_length=LABEL_MAX)]
    type: Kind


class _Event(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    domain: str
    type: Kind
    count: Annotated[int, msgspec.Meta(ge=1, le=COUNT_MAX)] = 1
    id: Annotated[str, msgspec.Meta(min_length=1, max_length=ID_MAX)] | UnsetType = UNSET


_decode_plain = msgspec.json.Decoder(_PlainEvent).decode_lines
_decode_events = msgspec.json.Decoder(_Event).decode_lines
_decode_flat = msgspec.json.Decoder(dict[str, str | int | float | bool | None]).decode_lines  # refuses nesting where it begins
_decode_any = msgspec.json.Decoder().decode_lines
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A request of which every event is right."""

    blobs: dict[int, bytes]  # partition -> event lines (engine/lines.py)
    delivered: int  # events, counts added up
    bounced: int
    with_ids: bool = False  # some of the lines have ids


@dataclass(frozen=True, slots=True)
class EventError:
    """What is wrong with one event. index: its position among the events. code: for programs. detail: for people."""

    index: int
    code: EventCode
    detail: str


class BadEvents(ValueError):
    """Some events of a request were wrong, so that none may be recorded.

    errors    the first ERRORS_MAX of them, in order.   rejected   how many were wrong.   total   how many events there were.
    """

    def __init__(self, errors: Sequence[EventError], rejected: int, total: int) -> None:
        super().__init__(f"{rejected} of {total} events are wrong, the first at index {errors[0].index}: {errors[0].detail}")
        self.errors = list(errors)
        self.rejected = rejected
        self.total = total


class TooManyEvents(ValueError):
    """More events than one request may hold. total: how many there were, or at least were seen.   events_max: the limit."""

    def __init__(self, total: int, events_max: int) -> None:
        super().__init__(f"the request holds {total} events; one request may hold {events_max}")
        self.total = total
        self.events_max = events_max


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Stands in a sequence of events for one that could not be decoded; see `examined`."""

    code: EventCode
    detail: str


def parse_ndjson(body: bytes, partitions: int, events_max: int, id_of: IdOf | None = None) -> Parsed:
    """The events of a body of newline-delimited JSON, as lines for the queues. An empty body holds no events.

    id_of   gives ids to events that have none of their own
    Raises  BadEvents, TooManyEvents.
    """
    if body.startswith(_BOM):
        body = body[len(_BOM) :]
    try:
        parsed = None if id_of else _parsed_plain(body, partitions, events_max)
        parsed = parsed or _parsed_counted(body, partitions, events_max, id_of)
    except BadName:
        parsed = None
    return parsed or examined(_values(body, events_max), partitions, events_max, id_of)


def route(
    delivered: Sequence[str],
    bounced: Sequence[str],
    partitions: int,
    *,
    counted: Iterable[Counted] = (),
    short: bool = False,
) -> dict[int, bytes]:
    """Checked, normalised, divided: partition -> event lines, for the partitions that get any.

    delivered, bounced   names as the client wrote them, one for each event.   counted   events with a count other than 1.
    short                the caller has made sure that no name is longer than LABEL_MAX characters.
    Raises  BadName for one of the wrong names. It does not say which: `examined` does.
    """
    blobs: list[list[bytes]] = [[] for _ in range(partitions)]
    for kind, name, count in counted:
        normal = normalise(name)
        blobs[partition_of(normal, partitions)].append(lines.encode(_SIGNS[kind], normal, count))
    for sign, names in ((b"+", delivered), (b"-", bounced)):
        if not names:
            continue
        normals = _normal_as_a_whole(names, short) or list(map(normalise, names))
        shares: list[list[bytes]] = [[] for _ in range(partitions)]
        for normal in normals:
            shares[crc32(normal) % partitions].append(normal)  # partition_of, without the call
        between = b"\n" + sign
        for blob, share in zip(blobs, shares, strict=True):
            if share:
                blob.append(sign + between.join(share) + b"\n")
    return {partition: b"".join(blob) for partition, blob in enumerate(blobs) if blob}


def examined(events: Iterable[object], partitions: int, events_max: int, id_of: IdOf | None = None) -> Parsed:
    """The slow path, and the one that decides: each event looked at alone, each fault told with its index.

    events  decoded values, whatever they are, or Undecodable where there is none.
    Raises  BadEvents, TooManyEvents.
    """
    errors: list[EventError] = []
    checked: list[_Checked] = []
    total = rejected = 0
    for index, event in enumerate(events):
        total += 1
        try:
            checked.append(_checked(event))
        except _Wrong as wrong:
            rejected += 1
            if len(errors) < ERRORS_MAX:
                errors.append(EventError(index, wrong.code, wrong.detail))
    if total > events_max:
        raise TooManyEvents(total, events_max)
    if errors:
        raise BadEvents(errors, rejected, total)
    return _one_by_one(checked, partitions, id_of)


def _one_by_one(events: Iterable[_Checked], partitions: int, id_of: IdOf | None) -> Parsed:
    """Events that are right, each made a line for itself."""
    blobs: dict[int, list[bytes]] = {}
    sums: dict[Kind, int] = {"delivered": 0, "bounced": 0}
    with_ids = id_of is not None
    for index, (kind, name, count, given) in enumerate(events):
        sums[kind] += count
        line = lines.encode(_SIGNS[kind], name, count)
        if given is not None:
            line = lines.with_id(line, event_id(given, _SIGNS[kind], name))
            with_ids = True
        elif id_of is not None:
            line = lines.with_id(line, id_of(index))
        blobs.setdefault(partition_of(name, partitions), []).append(line)
    joined = {partition: b"".join(blob) for partition, blob in sorted(blobs.items())}
    return Parsed(joined, sums["delivered"], sums["bounced"], with_ids)


def _parsed_plain(body: bytes, partitions: int, events_max: int) -> Parsed | None:
    try:
        events = _decode_plain(body)
    except _UNDECODABLE:
        return None
    if len(events) > events_max:
        raise TooManyEvents(len(events), events_max)
    delivered: list[str] = []
    bounced: list[str] = []
    for event in events:
        (delivered if event.type == "delivered" else bounced).append(event.domain)
    return Parsed(route(delivered, bounced, partitions, short=True), len(delivered), len(bounced))


def _parsed_counted(body: bytes, partitions: int, events_max: int, id_of: IdOf | None) -> Parsed | None:
    try:
        events = _decode_events(body)
    except _UNDECODABLE:
        return None
    if len(events) > events_max:
        raise TooManyEvents(len(events), events_max)
    if id_of is not None or any(event.id is not UNSET for event in events):
        checked = [(e.type, normalise(e.domain), e.count, None if e.id is UNSET else e.id) for e in events]
        return _one_by_one(checked, partitions, id_of)
    return Parsed(
        route(
            [event.domain for event in events if event.count == 1 and event.type == "delivered"],
            [event.domain for event in events if event.count == 1 and event.type == "bounced"],
            partitions,
            counted=[(event.type, event.domain, event.count) for event in events if event.count != 1],
        ),
        sum([event.count for event in events if event.type == "delivered"]),
        sum([event.count for event in events if event.type == "bounced"]),
    )


def _normal_as_a_whole(names: Sequence[str], short: bool) -> list[bytes] | None:
    """All the names in normal form; None if that cannot be told of them together, which says nothing against any of them.

    They are put into one text, each on a line of its own as `.name.`, so that a dot stands before and after every label:
      ..          an empty label, an empty name, a dot too many at either end
      .-  or -.   a hyphen at the end of a label
      ..\\n        after the digits were taken out: a last label that is a number
    A text that has none of these, no bytes but those of names, no newlines but ours, and no name long enough to hold too long
    a label, consists of names in normal form.
    """
    if not short and max(map(len, names)) > LABEL_MAX:
        return None
    joined = ".\n.".join(names).encode()
    text = b".%b.\n" % joined
    rest = text.translate(None, _COMMON_BYTES)
    if rest and not rest.isdigit():  # capitals, or worse
        joined, text = joined.lower(), text.lower()
        rest = text.translate(None, _COMMON_BYTES)
    if (
        (rest and (not rest.isdigit() or b"..\n" in text.translate(None, b"0123456789")))
        or text.count(b"\n") != len(names)
        or b".." in text
        or (b"-" in text and (b".-" in text or b"-." in text))
    ):
        return None
    return joined.split(b".\n.")


def _values(body: bytes, events_max: int) -> Iterator[object]:
    """The values in a body, one by one: all at once if it is made of flat objects, else line by line."""
    written = [line for line in body.split(b"\n") if line.strip(b" \t\r")]
    if len(written) > events_max:
        raise TooManyEvents(len(written), events_max)
    try:
        yield from _decode_flat(body)
    except _UNDECODABLE:
        for line in written:
            yield from _values_of_line(line)


def _values_of_line(line: bytes) -> Sequence[object]:
    if line.count(b"[") + line.count(b"{") > _OPENINGS_MAX:
        return [Undecodable("bad_event", "nested too deep; an event is a flat JSON object")]
    try:
        values: list[object] = _decode_any(line)
    except msgspec.ValidationError:  # the text is JSON, but some value of it fits no type of ours
        return [Undecodable("bad_event", "holds a number that is out of any range")]
    except UnicodeDecodeError:
        return [Undecodable("bad_json", "is not UTF-8")]
    except _UNDECODABLE as error:
        return [Undecodable("bad_json", str(error))]
    return values


class _Wrong(Exception):
    def __init__(self, code: EventCode, detail: str) -> None:
        super().__init__(detail)
        self.code: EventCode = code
        self.detail = detail


def _checked(event: object) -> _Checked:
    """Raises _Wrong."""
    if isinstance(event, Undecodable):
        raise _Wrong(event.code, event.detail)
    if not isinstance(event, dict):
        raise _Wrong("bad_event", 'is no JSON object; an event looks like {"domain": "example.com", "type": "delivered"}')
    for field in event:
        if field not in _FIELDS:
            raise _Wrong("unknown_field", f"has a field {_quote(field)}; the fields of an event are domain, type, count and id")
    for field in ("domain", "type"):
        if field not in event:
            raise _Wrong("bad_event", f"lacks the field {field!r}")
        if not isinstance(event[field], str):
            raise _Wrong("bad_event", f"{field} is {_quote(event[field])}, which is no string")
    kind, count = event["type"], event.get("count", 1)
    if kind not in _SIGNS:
        raise _Wrong("unknown_type", f"type is {_quote(kind)}; it must be 'delivered' or 'bounced'")
    if not isinstance(count, int) or isinstance(count, bool):
        raise _Wrong("bad_event", f"count is {_quote(count)}, which is no whole number")
    if not 1 <= count <= COUNT_MAX:
        raise _Wrong("count_out_of_range", f"count is {_quote(count)}; it must be 1 to {COUNT_MAX}")
    given = event.get("id")
    if "id" in event and not (isinstance(given, str) and 1 <= len(given) <= ID_MAX):
        raise _Wrong("bad_id", f"id is {_quote(given)}; it must be a text of 1 to {ID_MAX} characters")
    try:
        return kind, normalise(event["domain"]), count, given
    except BadName as bad:
        raise _Wrong(bad.code, bad.detail) from bad


def _quote(value: object) -> str:
    return repr(value[:64]) if isinstance(value, str) else repr(value)[:64]
