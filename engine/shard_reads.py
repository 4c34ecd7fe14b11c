"""How a shard answers: reads of counts, statistics, what became of keys and ids, and whether it is ready.

The requests of one turn are answered together: each partition they touch is listed and drained once, up to what was published
when they came, so that every one of them sees all that was acknowledged before it was sent. A request waits for a later turn
when a flush has to make room first, when the row it needs is behind a COMMIT under way, or when MongoDB was asked for what
other hosts counted. One that nobody waits for any more is dropped: on a full disk nothing can make room for hours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from zlib import crc32

from catchall.engine.others import Others
from catchall.engine.partition import Partition
from catchall.engine.queue_reader import Ends
from catchall.engine.shard_protocol import (
    COUNT_PAIR,
    COUNTS,
    KEY,
    KEY_QUESTION,
    PING,
    PLACE,
    REPEATS,
    REPEATS_ANSWER,
    STATS,
    STATS_ANSWER,
    UNKNOWN,
)
from catchall.engine.shard_sockets import Request
from catchall.storage.counts import DELIVERED_MASK
from catchall.storage.ledger_rows import Tallies

log = logging.getLogger("catchall.shard")

STATS_NAMES_MAX = 5000  # pending names of a shard that a statistics request looks at; beyond, it is as of the last cut


class _Question:
    """A request about partitions that have to be drained first: COUNTS with its names, KEY, REPEATS."""

    __slots__ = ("asked", "behind", "came", "keys", "names", "numbers", "request")

    def __init__(self, request: Request, partitions: int) -> None:
        self.request, self.came = request, time.monotonic()
        self.keys: list[bytes] = []
        self.names: list[str] = []
        if request.kind == COUNTS:
            self.keys = request.payload.split(b"\n") if request.payload else []
            self.names = [key.decode("ascii", "replace") for key in self.keys]
            self.numbers = [crc32(key) % partitions for key in self.keys]
        elif request.kind == KEY:
            self.numbers = [KEY_QUESTION.unpack(request.payload)[0]]
        else:
            self.numbers = [place[0] for place in PLACE.iter_unpack(request.payload)]
        # What it has to see drained yet, by partition: fixed when it came, shorter with every drain. None: not known yet.
        self.behind: dict[int, Ends] | None = None
        self.asked: dict[str, int] | None = None  # what MongoDB is being asked, filled when it answered


class Reads:
    """What is waiting for an answer.

    waiting     anything at all    again    something that can go on without being woken
    degraded    told to those who ask whether the shard is ready
    patience_s  who asks waits no longer for an answer
    """

    def __init__(
        self,
        partitions: Mapping[int, Partition],
        partition_count: int,
        others: Others | None,
        shared_stats: Callable[[], tuple[Tallies, int] | None],
        patience_s: float,
    ) -> None:
        self._patience_s = patience_s
        self._partitions, self._count, self._others, self._shared_stats = partitions, partition_count, others, shared_stats
        self._questions: list[_Question] = []
        self._stats: list[Request] = []
        self.degraded = False
        self.again = False

    @property
    def waiting(self) -> bool:
        return bool(self._questions or self._stats)

    def add(self, requests: list[Request]) -> None:
        for request in requests:
            if request.kind in (COUNTS, KEY, REPEATS):
                self._questions.append(_Question(request, self._count))
            elif request.kind == STATS:
                self._stats.append(request)
            elif request.kind == PING:
                request.answer(b"\2" if self.degraded else b"\1")
            else:
                log.error("a request of unknown kind %d came in on the shard's socket", request.kind)
                request.answer(b"")

    def answer(self) -> None:
        """Answer what can be answered now."""
        self.again = False
        if self._questions:
            oldest = time.monotonic() - self._patience_s
            questions, self._questions = [question for question in self._questions if question.came >= oldest], []
            self._catch_up(questions)
            for question in questions:
                if question.behind is None:
                    self._later(question, again=False)
                elif question.behind:  # where a flush has to make room first, its end wakes the loop
                    self._later(question, again=not all(self._partitions[number].full for number in question.behind))
                elif question.request.kind == COUNTS:
                    self._answer(question)
                else:
                    self._answer_about_ids(question)
        if self._stats:
            self._answer_stats()

    def _answer_about_ids(self, question: _Question) -> None:
        """What was decided about keys and ids that were recorded before they were asked about."""
        request = question.request
        if request.kind == KEY:
            number, key = KEY_QUESTION.unpack(request.payload)
            request.answer(self._partitions[number].ids.digest_of(key) or b"")
            return
        found = [
            self._partitions[number].reader.repeats(name.hex(), start, end)
            for number, name, start, end in PLACE.iter_unpack(request.payload)
        ]
        known = [repeats for repeats in found if repeats is not None]
        request.answer(REPEATS_ANSWER.pack(sum(known) if len(known) == len(found) else UNKNOWN))

    def _catch_up(self, questions: list[_Question]) -> None:
        """Note what the new questions have to see, and drain towards what all of them have to."""
        new = {number for question in questions if question.behind is None for number in question.numbers}
        arrived: dict[int, Ends] = {}  # where there is something to drain
        unknown = set()  # not all segments can be opened yet
        for number in new:
            ends = self._partitions[number].arrived() if number in self._partitions else None
            if ends is None:
                unknown.add(number)
            elif ends:
                arrived[number] = ends
        more: set[int] = set()  # where there is more to drain than is done in one turn
        for question in questions:
            if question.behind is None and unknown.isdisjoint(question.numbers):
                question.behind = {n: arrived[n] for n in question.numbers if n in arrived} if arrived else {}
            if question.behind:
                for number, ends in list(question.behind.items()):  # questions that came together share them
                    if not ends or (number not in more and self._partitions[number].catch_up(ends)):
                        del question.behind[number]
                    else:
                        more.add(number)

    def _later(self, question: _Question, *, again: bool) -> None:
        self._questions.append(question)
        self.again |= again

    def _answer(self, question: _Question) -> None:
        counts: list[int] = []
        cold: dict[int, dict[str, bytes]] = {}
        for name, key, number in zip(question.names, question.keys, question.numbers, strict=True):
            packed = self._partitions[number].known(name, key)
            if packed is None:
                cold.setdefault(number, {})[name] = key
                packed = -1
            counts.append(packed)
        if cold:
            if any(self._partitions[number].ledger.in_commit for number in cold):
                self._later(question, again=False)  # the end of the flush wakes the loop
                return
            loaded: dict[str, int] = {}
            for number, names in cold.items():
                loaded |= self._partitions[number].load(names)
            counts = [loaded[name] if packed < 0 else packed for name, packed in zip(question.names, counts, strict=True)]
        if self._others is not None and not self._add_others(question, counts):
            return
        pack = COUNT_PAIR.pack
        question.request.answer(b"".join([pack(packed & DELIVERED_MASK, packed >> 64) for packed in counts]))

    def _add_others(self, question: _Question, counts: list[int]) -> bool:
        """Add what other hosts counted. False: MongoDB has to be asked first, and the question waits."""
        assert self._others is not None
        asked = question.asked or {}
        known: dict[str, int] = {}
        unknown: dict[str, str] = {}
        for i, (name, number) in enumerate(zip(question.names, question.numbers, strict=True)):
            packed = asked.get(name)
            own = self._partitions[number].ledger.meta.component
            if packed is None:
                packed = self._others.get(name, own)
            if packed is None:
                unknown[name] = own
            else:
                known[name] = packed
                counts[i] += packed
        if unknown:
            if question.asked is None:
                question.asked = self._others.ask(unknown)
                question.asked.update(known)  # until the others come, they may be too old to be told again
            self._later(question, again=False)
        return not unknown

    def _answer_stats(self) -> None:
        """All waiting requests get the same answer: domains by status, as of the earliest instant of any partition."""
        now = time.time_ns()
        budget = max(1, STATS_NAMES_MAX // max(1, len(self._partitions)))
        total, as_of = Tallies(), now
        for partition in self._partitions.values():
            found: tuple[Tallies, int] | None = None
            if partition.catch_up():
                found = partition.tallies(budget, now)
            elif partition.cut_at_ns:
                found = partition.ledger.meta.tallies, partition.cut_at_ns
            if found is None:
                return  # behind since the start, or a small flush has just begun: a matter of milliseconds
            total += found[0]
            as_of = min(as_of, found[1])
        shared = self._shared_stats()
        own = (total.catch_all, total.not_catch_all, total.unknown, as_of)
        of_all = (0, 0, 0, 0, 0)
        if shared is not None:
            of_all = (1, shared[0].catch_all, shared[0].not_catch_all, shared[0].unknown, shared[1])
        payload = STATS_ANSWER.pack(*own, *of_all)
        stats, self._stats = self._stats, []
        for request in stats:
            request.answer(payload)
