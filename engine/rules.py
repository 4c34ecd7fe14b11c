"""The rules of the domain: what a name is, which partition owns it, when a domain is a catch-all. Pure, no I/O.

Name        Compared in one normal form: ASCII bytes in lower case, no trailing dot, labels of 1 to 63 of a-z 0-9 - _ that
            neither begin nor end with a hyphen, at most 253 bytes in all, and a last label that is not a number (that would be
            an address). A single label is a name. No name is folded into a shorter one: each is counted for itself.
Other       Upper case is lowered and one trailing dot dropped. A name outside ASCII is mapped by UTS 46, non-transitional (ß
spellings   stays ß), and each label outside ASCII gets its xn-- form. A label that is ASCII is never decoded: an xn-- label is
            kept as it is, whether it means anything or not.
Invariants  1 is_normal(n) holds exactly for the bytes that normalise can return   2 normalising twice is normalising once
            3 a name's partition is a function of its bytes and of the number of partitions alone, on every machine
"""

import re
from typing import Final, Literal
from zlib import crc32

import idna

NAME_MAX: Final = 253
LABEL_MAX: Final = 63
SPELLING_MAX: Final = 1024  # characters; longer input is refused before any work is done on it
COUNT_MAX: Final = 1_000_000  # events that one line of a queue, or one event of a request, may stand for

Status = Literal["not-catch-all", "catch-all", "unknown"]
BadNameCode = Literal["bad_domain", "domain_too_long", "domain_literal"]

# One label, entered at its first character: no hyphen at either end; and when it is the last one, no number.
_LABEL = r"(?!-|[0-9]+\Z)[a-z0-9_-]{1,63}+(?<!-)"
_NORMAL = rf"{_LABEL}(?:\.{_LABEL})*+"
_normal_text = re.compile(_NORMAL).fullmatch
_normal_bytes = re.compile(_NORMAL.encode()).fullmatch
_NAME_RULE = f"a domain name has at most {NAME_MAX}"
_LABEL_RULE = f"a label has at most {LABEL_MAX}"
_LITERAL_RULE = "only domain names have a status"
_foreign_character = re.compile(r"[^a-z0-9_-]").search


class BadName(ValueError):
    """The input is no domain name.

    code    bad_domain, domain_too_long or domain_literal: stable, for programs.
    detail  for people: quotes the label at fault (its first 64 characters) and gives the rule that it breaks.
    """

    def __init__(self, code: BadNameCode, detail: str) -> None:
        super().__init__(detail)
        self.code: BadNameCode = code
        self.detail = detail


def normalise(name: str) -> bytes:
    """The normal form of a domain name (see the top of this file).

    name    as a client wrote it, decoded; any string at all may be given.
    Raises  BadName.
    Source  UTS 46 with Transitional_Processing, UseSTD3ASCIIRules and VerifyDnsLength off; the lengths are checked here.
    """
    if len(name) <= NAME_MAX and _normal_text(name):
        return name.encode()
    if len(name) > SPELLING_MAX:
        raise BadName("domain_too_long", f"{_quote(name)} begins a name of {len(name)} characters; {_NAME_RULE}")
    if name.startswith("["):
        raise BadName("domain_literal", f"{_quote(name)} is an address; {_LITERAL_RULE}")
    spelled = (name.lower() if name.isascii() else _mapped(name)).removesuffix(".")
    if len(spelled) <= NAME_MAX and _normal_text(spelled):
        return spelled.encode()
    if len(spelled) > NAME_MAX:  # no label's ASCII form is shorter than the label
        raise BadName("domain_too_long", f"{_quote(spelled)} begins a name of {len(spelled)} characters; {_NAME_RULE}")
    labels = [_normal_label(label, spelled) for label in spelled.split(".")]
    if labels[-1].isdigit():
        raise BadName("domain_literal", f"{_quote(labels[-1])} ends the name and makes it an address; {_LITERAL_RULE}")
    normal = ".".join(labels)
    if len(normal) > NAME_MAX:
        raise BadName("domain_too_long", f"{_quote(normal)} begins a name of {len(normal)} bytes; {_NAME_RULE}")
    return normal.encode()


def is_normal(name: bytes) -> bool:
    """Whether normalise could have returned exactly these bytes."""
    return len(name) <= NAME_MAX and _normal_bytes(name) is not None


def partition_of(name: bytes, partitions: int) -> int:
    """The partition, 0 to partitions - 1, that counts this name. name is in normal form."""
    return crc32(name) % partitions


def shard_of(partition: int, shards: int) -> int:
    """The shard process, 0 to shards - 1, that owns this partition."""
    return partition % shards


def status(delivered: int, bounced: int, threshold: int) -> Status:
    """What the counts of one domain say about it.

    One bounce is proof that not every address is accepted; no number of deliveries is proof of the opposite, only evidence,
    and it takes more than threshold of them: exactly threshold is still unknown.
    """
    if bounced > 0:
        return "not-catch-all"
    return "catch-all" if delivered > threshold else "unknown"


def _mapped(name: str) -> str:
    """The name after the mapping of UTS 46: lower case, composed, every kind of dot a full stop, ignored characters gone."""
    try:
        return idna.uts46_remap(name, std3_rules=False, transitional=False)
    except UnicodeError as error:
        raise BadName("bad_domain", f"{_quote(name)} holds a character that no domain name may hold (UTS 46)") from error


def _normal_label(label: str, name: str) -> str:
    """One label of a name that is mapped and in lower case: checked, in its ASCII form."""
    if not label:
        raise BadName("bad_domain", f"{_quote(name)} has an empty label; labels have 1 to {LABEL_MAX} characters")
    if label.startswith("-") or label.endswith("-"):
        raise BadName("bad_domain", f"{_quote(label)} begins or ends with a hyphen; a label may hold one only inside")
    ascii_label = label if label.isascii() else _a_label(label)
    if _foreign_character(ascii_label):
        raise BadName("bad_domain", f"{_quote(label)} holds a character other than letters, digits, '-' and '_'")
    if len(ascii_label) > LABEL_MAX:
        raise BadName("domain_too_long", f"{_quote(label)} is a label of {len(ascii_label)} bytes; {_LABEL_RULE}")
    return ascii_label


def _a_label(label: str) -> str:
    """The xn-- form of a mapped label that holds more than ASCII.

    The checks are those of UTS 46, section 4.1, and not IDNA 2008's narrower list of characters: labels with an emoji or an
    underscore are in use, and both their spellings must be one name.
    """
    if len(label) > LABEL_MAX:  # its xn-- form is longer still, and making that takes quadratic time
        raise BadName("domain_too_long", f"{_quote(label)} is a label of {len(label)} characters; {_LABEL_RULE}")
    try:
        if label.startswith("xn--"):
            raise idna.IDNAError("an xn-- label holds nothing but ASCII")
        idna.check_initial_combiner(label)
        idna.check_bidi(label)
        for at, character in enumerate(label):
            if character in "\u200c\u200d" and not idna.valid_contextj(label, at):
                raise idna.IDNAError("a joiner stands where there is nothing to join")
    except ValueError as error:  # IDNAError is one; valid_contextj raises a plain one beside a character it knows nothing of
        raise BadName("bad_domain", f"{_quote(label)} is no label of an internationalised name: {error}") from error
    return "xn--" + label.encode("punycode").decode()


def _quote(text: str) -> str:
    return repr(text[:64])
