"""What the bytes of a segment are, and what a reader makes of those that a crash or a bad disk left."""

import os
import zlib
from pathlib import Path

import pytest
from faults import BOOT, HOST, NOW, OTHER_BOOT, append, new_queue, new_reader, read_all

from catchall.engine import read_segment, segment
from catchall.engine.pending import Pending
from catchall.engine.segment import HEADER_SIZE, PUBLISHED, SEALED, BadSegment, Header, Mark
from catchall.storage.ledger_rows import Position

LINES = b"@1790000000\n+a.example\n-b.example 12\n+a.example\n"
# Where each of its events ends.
ENDS = [len(b"@1790000000\n+a.example\n"), len(b"@1790000000\n+a.example\n-b.example 12\n"), len(LINES)]

GOLDEN_HEADER = (
    "6361746368713031"  # magic
    "00100000"  # header size
    "03000000"  # partition
    "0010000000000000"  # payload size
    "000102030405060708090a0b0c0d0e0f"  # boot id
    "a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0"  # host id
    "0f87ca71"  # crc32 of all before
    "00000000"
    "1700000000000000"  # published: 23
    "1800000000000000"  # sealed: 23 + 1
)


def whole(cut: int) -> dict[str, tuple[int, int]]:
    a = (cut >= ENDS[0]) + (cut >= ENDS[2])
    b = 12 * (cut >= ENDS[1])
    return {name: pair for name, pair in (("a.example", (a, 0)), ("b.example", (0, b))) if any(pair)}


def segment_bytes(
    payload: bytes, *, published: int = 0, sealed: int = 0, marks: tuple[Mark, ...] = (), boot: bytes = BOOT, size: int = 4096
) -> bytearray:
    data = bytearray(HEADER_SIZE + size)
    head = segment.pack_header(Header(0, size, boot, bytes.fromhex(HOST)))
    data[: len(head)] = head
    data[HEADER_SIZE : HEADER_SIZE + len(payload)] = payload
    words = memoryview(data).cast("Q")
    words[PUBLISHED], words[SEALED] = published, sealed
    words.release()
    for turn, mark in enumerate(marks):
        segment.store_mark(data, turn, mark)  # type: ignore[arg-type]
    return data


def write(folder: Path, data: bytes) -> Path:
    path = folder / "00000000000000aa.seg"
    path.write_bytes(data)
    return path


def mark_of(payload: bytes, offset: int) -> Mark:
    return Mark(offset, zlib.crc32(payload[:offset]))


def test_a_segment_has_exactly_these_bytes(tmp_path):
    queue = new_queue(tmp_path, partition=3)
    append(queue, b"+a.example\n")
    queue.close()
    (path,) = tmp_path.glob("*.seg")
    data = path.read_bytes()
    assert data[:80].hex() == GOLDEN_HEADER
    payload = b"@%d\n+a.example\n" % NOW
    packed = (23).to_bytes(8, "little") + zlib.crc32(payload).to_bytes(4, "little")
    assert data[128:144] == packed + zlib.crc32(packed).to_bytes(4, "little")
    assert not any(data[80:128] + data[144:4096])
    assert data[4096:] == payload.ljust(4096, b"\0")


@pytest.mark.parametrize("cut", range(len(LINES) + 1))
def test_what_is_published_is_counted_up_to_the_last_whole_line(tmp_path, cut):
    write(tmp_path, segment_bytes(LINES, published=cut))
    reader = new_reader(tmp_path)
    assert read_all(reader) == whole(cut)
    reader.close()


@pytest.mark.parametrize("cut", range(len(LINES) + 1))
def test_after_a_power_cut_only_whole_lines_before_the_first_nul_count(tmp_path, cut):
    write(tmp_path, segment_bytes(LINES[:cut], published=4000, boot=OTHER_BOOT))
    reader = new_reader(tmp_path)
    assert read_all(reader) == whole(cut)
    assert reader.has_finished
    assert reader.corrupt_files == 0
    reader.close()


@pytest.mark.parametrize("cut", range(1, len(LINES)))
def test_a_hole_below_published_is_waited_for_and_then_the_rest_is_set_aside(tmp_path, monkeypatch, cut):
    monkeypatch.setattr(read_segment, "UNWRITTEN_WAIT_S", 1e9)
    path = write(tmp_path, segment_bytes(LINES[:cut] + b"\0" + LINES[cut + 1 :], published=len(LINES)))
    reader, pending = new_reader(tmp_path), Pending()
    assert read_all(reader, pending) == whole(cut)
    assert reader.corrupt_files == 0
    with path.open("r+b") as file:  # the store arrives
        file.seek(HEADER_SIZE)
        file.write(LINES)
    assert read_all(reader, pending) == whole(len(LINES))
    reader.close()

    with path.open("r+b") as file:
        file.seek(HEADER_SIZE + cut)
        file.write(b"\0")
    monkeypatch.setattr(read_segment, "UNWRITTEN_WAIT_S", 0)
    reader = new_reader(tmp_path)
    assert read_all(reader) == whole(cut)
    assert reader.corrupt_files == 1
    (aside,) = tmp_path.glob("*.corrupt")
    damaged = LINES[:cut] + b"\0" + LINES[cut + 1 :]
    assert aside.read_bytes() == damaged[damaged[:cut].rfind(b"\n") + 1 :]
    reader.close()


@pytest.mark.parametrize("byte", range(60))
def test_a_header_with_any_byte_flipped_is_set_aside(tmp_path, byte):
    data = segment_bytes(LINES, published=len(LINES))
    data[byte] ^= 0xFF
    path = write(tmp_path, data)
    reader = new_reader(tmp_path)
    assert read_all(reader) == {}
    assert reader.corrupt_files == 1
    assert not path.exists()
    assert path.with_suffix(".corrupt").read_bytes() == data
    reader.close()


@pytest.mark.parametrize("byte", range(60, 208))
@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_the_rest_of_the_first_page_with_any_byte_flipped_never_counts_too_much(tmp_path, monkeypatch, byte, flip):
    monkeypatch.setattr(read_segment, "UNWRITTEN_WAIT_S", 0)
    data = segment_bytes(LINES, published=len(LINES), sealed=len(LINES) + 1, marks=(mark_of(LINES, len(LINES)),))
    data[byte] ^= flip
    write(tmp_path, data)
    reader = new_reader(tmp_path)
    assert read_all(reader) in ({}, whole(0), whole(ENDS[0]), whole(ENDS[1]), whole(ENDS[2]))
    assert read_all(reader) == {}
    reader.close()


@pytest.mark.parametrize("published", [4097, 1 << 40, (1 << 64) - 1])
def test_a_published_beyond_the_payload_is_set_aside(tmp_path, published):
    write(tmp_path, segment_bytes(LINES, published=published))
    reader = new_reader(tmp_path)
    reader.discover()
    reader.check_writers()  # its writer is dead, which must not lend it credit
    assert reader.drain(Pending(), 1 << 20) == 0
    assert reader.corrupt_files == 1
    assert reader.at_rest
    reader.close()


@pytest.mark.parametrize("size", [0, 1, 59, 60, 4095, 4096, 8191])
def test_a_file_that_is_too_short_is_set_aside(tmp_path, size):
    path = write(tmp_path, segment_bytes(LINES)[:size])
    reader = new_reader(tmp_path)
    assert read_all(reader) == {}
    assert reader.corrupt_files == 1
    assert not path.exists()
    reader.close()


@pytest.mark.parametrize("size", [4097, 5000, 65_537])
def test_a_payload_of_any_size_can_be_read(tmp_path, size):
    data = segment_bytes(LINES, published=len(LINES))
    data[:60] = segment.pack_header(Header(0, size, BOOT, bytes.fromhex(HOST)))
    write(tmp_path, (bytes(data) + bytes(size))[: HEADER_SIZE + size] + b"more")
    reader = new_reader(tmp_path)
    assert read_all(reader) == whole(len(LINES))
    reader.close()


def test_what_is_no_file_at_all_is_set_aside_and_the_rest_is_read(tmp_path):
    (tmp_path / "0000000000000001.seg").mkdir()
    write(tmp_path, segment_bytes(LINES, published=len(LINES)))
    reader = new_reader(tmp_path)
    assert read_all(reader) == whole(len(LINES))
    assert reader.corrupt_files == 1
    reader.close()


@pytest.mark.parametrize("partition", [1, 2])
def test_a_segment_of_another_partition_or_host_is_set_aside(tmp_path, partition):
    header = Header(partition % 2, 4096, BOOT, bytes.fromhex(HOST) if partition == 1 else bytes(16))
    data = segment_bytes(LINES, published=len(LINES))
    data[:60] = segment.pack_header(header)
    write(tmp_path, data)
    reader = new_reader(tmp_path)
    assert read_all(reader) == {}
    assert reader.corrupt_files == 1
    reader.close()


# ---- marks


def test_the_newest_whole_mark_is_taken():
    data = bytearray(HEADER_SIZE)
    assert segment.newest_mark(data) is None
    for turn, offset in enumerate((10, 20, 30)):
        segment.store_mark(data, turn, Mark(offset, offset))  # type: ignore[arg-type]
        assert segment.newest_mark(data) == Mark(offset, offset)


@pytest.mark.parametrize("byte", range(16))
def test_a_torn_mark_leaves_the_older_one(byte):
    data = bytearray(HEADER_SIZE)
    segment.store_mark(data, 0, Mark(10, 1))  # type: ignore[arg-type]
    segment.store_mark(data, 1, Mark(20, 2))  # type: ignore[arg-type]
    data[192 + byte] ^= 0x10
    assert segment.newest_mark(data) == Mark(10, 1)


def test_after_a_power_cut_what_no_mark_covers_is_counted_and_said(tmp_path):
    write(tmp_path, segment_bytes(LINES, boot=OTHER_BOOT, marks=(mark_of(LINES, ENDS[0]),)))
    reader = new_reader(tmp_path)
    assert read_all(reader) == whole(len(LINES))
    assert reader.unverified_bytes == len(LINES) - ENDS[0]
    reader.close()


@pytest.mark.parametrize("byte", range(len(LINES)))
def test_after_a_power_cut_a_changed_byte_below_a_mark_sets_the_segment_aside(tmp_path, byte):
    data = segment_bytes(LINES, boot=OTHER_BOOT, marks=(mark_of(LINES, len(LINES)),))
    data[HEADER_SIZE + byte] ^= 0x02
    write(tmp_path, data)
    reader = new_reader(tmp_path)
    if LINES[byte] == ord("\n") and byte == len(LINES) - 1:
        assert read_all(reader) == whole(ENDS[1])  # its last line is not whole: the mark is beyond the end
    else:
        assert read_all(reader) == {}
        assert reader.corrupt_files == 1
    reader.close()


def test_a_mark_that_was_stored_before_its_sync_is_no_damage_after_a_power_cut(tmp_path):
    """Everything was counted and committed; then the file's own pages were lost, but not the page of the roll's mark."""
    lost = bytes(ENDS[0]) + LINES[ENDS[0] :]
    write(tmp_path, segment_bytes(lost, boot=OTHER_BOOT, marks=(mark_of(LINES, len(LINES)),)))
    position = {"00000000000000aa": Position(ENDS[1], NOW)}
    reader = new_reader(tmp_path, positions=position)
    assert read_all(reader) == {"a.example": (1, 0)}
    assert reader.corrupt_files == 0
    assert reader.has_finished
    reader.close()


def test_parse_header_says_what_is_wrong():
    good = segment.pack_header(Header(1, 4096, BOOT, bytes(16)))
    assert segment.parse_header(good, 8192) == Header(1, 4096, BOOT, bytes(16))
    with pytest.raises(BadSegment, match="too short"):
        segment.parse_header(good[:59], 8192)
    with pytest.raises(BadSegment, match="where its header says 8192"):
        segment.parse_header(good, 8191)


def test_reading_leaves_no_descriptor_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    data = segment_bytes(LINES, published=len(LINES))
    for i in range(10):
        data[i] ^= i % 2  # half of them are set aside
        (tmp_path / f"{i:016x}.seg").write_bytes(data)
    reader = new_reader(tmp_path)
    read_all(reader)
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
