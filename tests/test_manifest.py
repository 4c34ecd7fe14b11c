"""The manifest of a data folder: written once, and made again from the ledgers when it is lost."""

import shutil
import zlib

import pytest
from faults import HOST, Host

from catchall.engine.data_folder import FolderError, Manifest, fill_reserve, make_partitions, open_folder, read_manifest

GOOD = Manifest(HOST, 3, 1_790_000_000)


def folder_with_ledgers(root, partitions: int = 3) -> None:
    host = Host(root, partitions)
    for number in range(partitions):
        host.own(number).close()


def test_a_new_folder_gets_one_that_reads_back(tmp_path):
    made = open_folder(tmp_path, 8)
    assert made.partitions == 8
    assert read_manifest(tmp_path) == made == open_folder(tmp_path, 16)


@pytest.mark.parametrize("at", range(len(GOOD.text()) - 1))
def test_any_flipped_bit_is_noticed_and_the_ledgers_say_what_it_was(tmp_path, at):
    folder_with_ledgers(tmp_path)
    text = bytearray(GOOD.text().encode())
    text[at] ^= 1 << at % 7
    (tmp_path / "manifest").write_bytes(text)
    found = open_folder(tmp_path, 16)
    assert (found.host_id, found.partitions) == (HOST, 3)
    assert (tmp_path / "manifest.corrupt").read_bytes() == text
    assert read_manifest(tmp_path) == found


@pytest.mark.parametrize("content", [None, b"", b"\xff\0", GOOD.text().encode()[:40]])
def test_a_lost_or_cut_one_is_made_again_from_any_readable_ledger(tmp_path, content):
    folder_with_ledgers(tmp_path)
    (tmp_path / "00" / "ledger.db").write_bytes(b"")
    (tmp_path / "01" / "ledger.db").write_bytes(b"no ledger" * 1000)
    if content is not None:
        (tmp_path / "manifest").write_bytes(content)
    found = open_folder(tmp_path, 16)
    assert (found.host_id, found.partitions) == (HOST, 3)


def test_ledgers_that_disagree_are_named_and_the_folder_refused(tmp_path):
    folder_with_ledgers(tmp_path)
    folder_with_ledgers(tmp_path / "other", 1)
    (tmp_path / "other" / "00" / "ledger.db").rename(tmp_path / "02" / "ledger.db")
    with pytest.raises(FolderError, match=r"3 partitions: 00, 01.*1 partitions: 02|1 partitions: 02.*3 partitions: 00, 01"):
        open_folder(tmp_path, 16)
    assert read_manifest(tmp_path) is None, "nothing was decided"


def test_without_any_ledger_a_damaged_one_makes_a_new_folder(tmp_path):
    (tmp_path / "manifest").write_bytes(b"damaged")
    found = open_folder(tmp_path, 5)
    assert found.partitions == 5
    assert found.host_id != HOST


def test_a_folder_of_the_first_format_is_refused_and_left_as_it_is(tmp_path):
    folder_with_ledgers(tmp_path)
    text = f"format 1\nhost {HOST}\npartitions 3\nmade_at 1790000000\n"
    (tmp_path / "manifest").write_text(text)
    with pytest.raises(FolderError, match="Nothing was changed"):
        open_folder(tmp_path, 3)
    assert (tmp_path / "manifest").read_text() == text
    assert not list(tmp_path.rglob("*.corrupt"))


def test_one_of_a_later_format_is_refused_and_left_as_it_is(tmp_path):
    text = GOOD.text().replace("format 2", "format 3")
    body = text[: text.rindex("crc ")]
    (tmp_path / "manifest").write_text(body + f"crc {zlib.crc32(body.encode()):08x}\n")
    with pytest.raises(FolderError, match="says format '3'"):
        open_folder(tmp_path, 5)


def test_files_in_the_place_of_folders_are_set_aside(tmp_path):
    (tmp_path / "00").write_text("x")
    (tmp_path / "01").mkdir()
    (tmp_path / "01" / "q").write_text("x")
    make_partitions(tmp_path, 2)
    assert (tmp_path / "00" / "q").is_dir()
    assert (tmp_path / "01" / "q").is_dir()
    assert {path.name for path in tmp_path.rglob("*.corrupt")} == {"00.corrupt", "q.corrupt"}


def test_a_reserve_that_cannot_be_opened_is_only_missing(tmp_path):
    (tmp_path / "reserve").mkdir()
    assert not fill_reserve(tmp_path, 4096)


def test_a_partition_whose_folder_is_gone_does_not_begin_as_the_component_it_was(tmp_path, caplog):
    folder_with_ledgers(tmp_path)
    shutil.rmtree(tmp_path / "01")
    host = Host(tmp_path, 3)
    components = []
    for number in range(3):
        partition = host.own(number)
        components.append(partition.ledger.meta.component)
        partition.close()
    assert components[0] == components[2] == HOST
    assert components[1].startswith(f"{HOST}-")
    assert "01 is gone" in caplog.text
