"""What is a name, who counts it, and when is a domain a catch-all."""

import random
import zlib

import pytest

from catchall.engine.rules import NAME_MAX, BadName, is_normal, normalise, partition_of, shard_of, status

LABEL_63 = "a" * 63
NAME_253 = ".".join([LABEL_63, LABEL_63, LABEL_63, "b" * 61])


@pytest.mark.parametrize(
    ("spelled", "normal"),
    [
        ("example.com", "example.com"),
        ("Example.COM", "example.com"),
        ("example.com.", "example.com"),
        ("localhost", "localhost"),
        ("LOCALHOST.", "localhost"),
        ("mail_1.example.com", "mail_1.example.com"),
        ("_dmarc.example.com", "_dmarc.example.com"),
        ("163.com", "163.com"),
        ("1.2.3.4.com", "1.2.3.4.com"),
        ("example.com1", "example.com1"),
        ("r3---sn.example", "r3---sn.example"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("bu\u0308cher.example", "xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("XN--BCHER-KVA.example", "xn--bcher-kva.example"),
        ("faß.de", "xn--fa-hia.de"),
        ("fass.de", "fass.de"),
        ("ｅｘａｍｐｌｅ.com", "example.com"),
        ("ｘｎ--bcher-kva.example", "xn--bcher-kva.example"),
        ("例え。テスト", "xn--r8jz45g.xn--zckzah"),
        ("bücher。example．com｡", "xn--bcher-kva.example.com"),
        ("exam\u00adple.com", "example.com"),
        ("\u212a.example", "k.example"),
        ("_dmarc.bücher.example", "_dmarc.xn--bcher-kva.example"),
        ("mail_1.bücher.example", "mail_1.xn--bcher-kva.example"),
        ("نامه\u200cای.com", "xn--mgba3gch31f060k.com"),
        ("💩.la", "xn--ls8h.la"),
        ("xn--ls8h.la", "xn--ls8h.la"),
        ("xn--zzzzzzzz.example", "xn--zzzzzzzz.example"),
        ("xn--a.example", "xn--a.example"),
        ("a." * 127, "a." * 126 + "a"),
    ],
)
def test_every_spelling_of_a_name_has_one_normal_form(spelled: str, normal: str) -> None:
    assert normalise(spelled) == normal.encode()


@pytest.mark.parametrize(
    ("spelled", "code"),
    [
        ("", "bad_domain"),
        (".", "bad_domain"),
        ("..", "bad_domain"),
        ("a..b", "bad_domain"),
        (".example.com", "bad_domain"),
        ("example.com..", "bad_domain"),
        ("。", "bad_domain"),
        ("ü..b", "bad_domain"),
        ("\u00ad", "bad_domain"),
        (" ", "bad_domain"),
        ("a b.example", "bad_domain"),
        ("example.com ", "bad_domain"),
        ("a\u00a0b.example", "bad_domain"),
        ("\x00", "bad_domain"),
        ("a\x00.example", "bad_domain"),
        ("example.com\n", "bad_domain"),
        ("exa\nmple.com", "bad_domain"),
        ("a\x7f.example", "bad_domain"),
        ("a\x85.example", "bad_domain"),
        ("a/b.example", "bad_domain"),
        ("a／b.example", "bad_domain"),
        ("a%2Fb.example", "bad_domain"),
        ("user@example.com", "bad_domain"),
        ("user＠example.com", "bad_domain"),
        ("*.example.com", "bad_domain"),
        ("example.com:25", "bad_domain"),
        ("-a.example", "bad_domain"),
        ("a-.example", "bad_domain"),
        ("-", "bad_domain"),
        ("example.com-", "bad_domain"),
        ("-ü.example", "bad_domain"),
        ("ü-.example", "bad_domain"),
        ("xn--bü.example", "bad_domain"),
        ("\ud800.example", "bad_domain"),
        ("\ue000.example", "bad_domain"),
        ("\u0301a.example", "bad_domain"),
        ("a\u200db.example", "bad_domain"),
        ("אa.example", "bad_domain"),
        (LABEL_63 + "a.example", "domain_too_long"),
        ("ü" * 64 + ".example", "domain_too_long"),
        ("ü" * 60 + ".example", "domain_too_long"),
        (NAME_253 + "b", "domain_too_long"),
        (NAME_253 + "b.", "domain_too_long"),
        ("a." * 126 + "aa", "domain_too_long"),
        ("a" * 1025, "domain_too_long"),
        ("ü" * 1_000_000, "domain_too_long"),
        ("." * 1_000_000, "domain_too_long"),
        ("[192.0.2.1]", "domain_literal"),
        ("[IPv6:2001:db8::1]", "domain_literal"),
        ("192.0.2.1", "domain_literal"),
        ("192.0.2.1.", "domain_literal"),
        ("１９２.0.2.1", "domain_literal"),
        ("example.123", "domain_literal"),
        ("bücher.123", "domain_literal"),
        ("123", "domain_literal"),
    ],
)
def test_what_is_no_name_is_refused_with_its_code(spelled: str, code: str) -> None:
    with pytest.raises(BadName) as refused:
        normalise(spelled)
    assert refused.value.code == code
    assert str(refused.value) == refused.value.detail


@pytest.mark.parametrize(
    ("spelled", "quoted"),
    [
        ("good.b@d.example", "'b@d'"),
        ("good.-bad.example", "'-bad'"),
        ("a" * 64 + "tail.example", repr("a" * 64) + " is a label of 68"),
        ("a\x00b.example", r"'a\x00b'"),
        ("x" * 5000, repr("x" * 64) + " begins a name of 5000"),
    ],
)
def test_a_refusal_quotes_the_label_at_fault_and_no_more_than_64_characters_of_it(spelled: str, quoted: str) -> None:
    with pytest.raises(BadName) as refused:
        normalise(spelled)
    assert refused.value.detail.startswith(quoted)
    assert len(refused.value.detail) < 200


def test_a_label_may_have_63_bytes_and_not_64() -> None:
    assert normalise(LABEL_63 + ".example") == LABEL_63.encode() + b".example"
    with pytest.raises(BadName):
        normalise(LABEL_63 + "a.example")


def test_a_label_outside_ascii_is_measured_in_its_encoded_form() -> None:
    longest = "ü" + "a" * 55
    assert len(normalise(longest)) == 63
    with pytest.raises(BadName) as refused:
        normalise(longest + "a")
    assert refused.value.code == "domain_too_long"


@pytest.mark.parametrize("dot", ["", "."])
def test_a_name_may_have_253_bytes_and_not_254_whether_a_dot_trails_or_not(dot: str) -> None:
    assert len(NAME_253) == NAME_MAX == 253
    assert normalise(NAME_253 + dot) == NAME_253.encode()
    assert normalise(NAME_253.upper() + dot) == NAME_253.encode()
    with pytest.raises(BadName) as refused:
        normalise(NAME_253 + "b" + dot)
    assert refused.value.code == "domain_too_long"


def random_name(rnd: random.Random) -> str:
    """Names of every kind, right and wrong, made of the pieces at which the rules look."""
    pieces = ["a", "b", "Z", "7", "0", "-", "_", ".", ".", "ü", "ß", "。", "xn--", "xn--bcher-kva", "é", "\u0301", "א", "1",
              "\u200d", "💩", " ", "\n", "a" * 60, "com", ".com", "ｅ", "İ", "\u00ad", "⒈", "ﷺ", "\u0345", "ς"]  # fmt: skip
    return "".join(rnd.choices(pieces, k=rnd.randint(0, 9)))


@pytest.mark.parametrize("seed", range(8))
def test_normalising_twice_is_normalising_once_and_its_results_are_what_is_normal(seed: int) -> None:
    rnd = random.Random(seed)
    good = 0
    for _ in range(2_000):
        name = random_name(rnd)
        try:
            normal = normalise(name)
        except BadName:
            assert not is_normal(name.encode("utf-8", "surrogatepass"))
            continue
        good += 1
        assert is_normal(normal)
        assert normalise(normal.decode("ascii")) == normal
        assert normalise(normal.decode("ascii").upper() + ".") == normal
    assert good > 200, "too few good names to mean anything"


@pytest.mark.parametrize("seed", range(4))
def test_normal_is_exactly_what_comes_out_of_normalise_unchanged(seed: int) -> None:
    rnd = random.Random(seed)
    for _ in range(5_000):
        name = "".join(rnd.choices("aZ7-_.\n é", weights=[9, 1, 5, 3, 1, 5, 1, 1, 1], k=rnd.randint(0, 8)))
        try:
            unchanged = normalise(name) == name.encode()
        except BadName:
            unchanged = False
        assert is_normal(name.encode()) == unchanged


@pytest.mark.parametrize(
    "damaged", [b"", b"\x00", b"example.com\x00", b"exam\x00ple.com", b"example.com\n", b"exa\xffmple.com", b"Example.com",
                b"example.com.", b".com", b"a..b", b"a-", b"192.0.2.1", b"a" * 64, NAME_253.encode() + b"b"]
)  # fmt: skip
def test_damaged_bytes_are_not_normal(damaged: bytes) -> None:
    assert not is_normal(damaged)


def test_the_partition_of_a_name_is_its_crc_and_never_changes() -> None:
    assert partition_of(b"example.com", 16) == zlib.crc32(b"example.com") % 16 == 9
    assert {partition_of(b"%d.example" % n, 16) for n in range(1000)} == set(range(16))
    assert partition_of(b"example.com", 1) == 0


def test_every_partition_belongs_to_one_shard_and_every_shard_owns_some() -> None:
    assert [shard_of(partition, 3) for partition in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("delivered", "bounced", "expected"),
    [
        (0, 0, "unknown"),
        (999, 0, "unknown"),
        (1000, 0, "unknown"),
        (1001, 0, "catch-all"),
        (10**18, 0, "catch-all"),
        (0, 1, "not-catch-all"),
        (1000, 1, "not-catch-all"),
        (1001, 1, "not-catch-all"),
        (10**18, 1, "not-catch-all"),
        (10**18, 10**18, "not-catch-all"),
    ],
)
def test_one_bounce_decides_and_else_more_than_the_threshold_is_needed(delivered: int, bounced: int, expected: str) -> None:
    assert status(delivered, bounced, 1000) == expected


def test_the_threshold_is_the_callers() -> None:
    assert [status(n, 0, 0) for n in (0, 1)] == ["unknown", "catch-all"]
    assert [status(n, 0, 5) for n in (5, 6)] == ["unknown", "catch-all"]
