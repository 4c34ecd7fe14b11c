"""The kernel tells which queue folders got a new name, so that only those are listed."""

import errno
import os
import struct

import pytest

from catchall.engine.folder_watch import FolderWatch


@pytest.fixture
def watch():
    made = FolderWatch()
    yield made
    made.close()


def put(folder, name):
    (folder / f"{name}.tmp").touch()
    os.rename(folder / f"{name}.tmp", folder / f"{name}.seg")


def test_a_folder_counts_as_changed_until_it_was_listed_once(watch, tmp_path):
    watch.add(str(tmp_path))
    assert watch.changed(str(tmp_path))
    watch.listed(str(tmp_path))
    watch.poll()
    assert not watch.changed(str(tmp_path))


def test_a_rename_that_has_returned_is_seen_by_the_next_poll_always(watch, tmp_path):
    watch.add(str(tmp_path))
    for i in range(2000):
        watch.listed(str(tmp_path))
        put(tmp_path, i)
        watch.poll()
        assert watch.changed(str(tmp_path))


def test_a_change_in_one_folder_is_told_of_that_folder_alone(watch, tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
        watch.add(str(folder))
        watch.listed(str(folder))
    put(folders[1], "x")
    watch.poll()
    assert [watch.changed(str(folder)) for folder in folders] == [False, True, False]


def test_files_that_are_made_or_unlinked_are_no_reason_to_list(watch, tmp_path):
    put(tmp_path, "x")
    watch.add(str(tmp_path))
    watch.listed(str(tmp_path))
    (tmp_path / "y.tmp").touch()
    os.unlink(tmp_path / "x.seg")
    watch.poll()
    assert not watch.changed(str(tmp_path))


def test_after_the_kernel_lost_events_every_folder_is_to_be_listed(watch, tmp_path):
    watch.add(str(tmp_path))
    watch.listed(str(tmp_path))
    watch._note(struct.pack("iIII", -1, 0x4000, 0, 0))
    assert watch.changed(str(tmp_path))


def test_without_inotify_every_folder_is_listed_every_time(watch, tmp_path):
    watch.add(str(tmp_path))
    os.close(watch._fd)
    watch._without(errno.EMFILE)
    watch.listed(str(tmp_path))
    watch.poll()
    assert watch.changed(str(tmp_path))
