"""SQLite files: batches, bounds, and disks and files that misbehave."""

from __future__ import annotations

import sqlite3
import stat
import threading

import pytest

import router

SCHEMA = "CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, n INTEGER)"
ADD = "INSERT INTO counts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET n = n + excluded.n"


@pytest.fixture
def open_database(tmp_path):
    opened = []

    def open(path=tmp_path / "data" / "usage.db"):
        database = router.Database(path, SCHEMA)
        database.start()
        opened.append(database)
        return database

    yield open
    for database in opened:
        database.close()


def test_what_was_queued_is_there_after_a_restart(open_database):
    database = open_database()
    for _ in range(10):
        database.write(ADD, "a", 1)
    assert database.read("SELECT * FROM counts") == []
    database.flush()
    assert database.read("SELECT * FROM counts") == [("a", 10)]
    database.write(ADD, "b", 2)
    database.close()
    assert open_database().read("SELECT * FROM counts ORDER BY name") == [("a", 10), ("b", 2)]


def test_the_thread_writes_by_itself(open_database):
    database = open_database()
    database.write(ADD, "a", 1)
    for _ in range(100):
        if rows := database.read("SELECT n FROM counts"):
            break
        threading.Event().wait(0.05)
    assert rows == [(1,)]


def test_only_the_owner_may_read_the_files(open_database, tmp_path):
    database = open_database()
    database.write(ADD, "a", 1)
    database.flush()
    files = list((tmp_path / "data").iterdir())
    assert len(files) > 1  # WAL beside it
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


def test_a_file_that_is_no_database_is_set_aside(open_database, tmp_path, caplog):
    path = tmp_path / "usage.db"
    path.write_text("these are not the pages you are looking for" * 100)
    database = open_database(path)
    database.write(ADD, "a", 1)
    database.flush()
    assert database.read("SELECT n FROM counts") == [(1,)]
    assert "not the pages" in (tmp_path / "usage.db.bad").read_text()
    assert "usage.db.bad" in caplog.text


def test_a_place_that_cannot_be_written_is_one_warning(open_database, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    database = open_database(tmp_path / "file" / "usage.db")
    assert not database.on
    database.write(ADD, "a", 1)
    database.flush()
    assert database.read("SELECT * FROM counts") == []
    assert len(caplog.records) == 1


def test_a_statement_that_fails_is_told_once_and_harms_no_later_one(open_database, caplog):
    database = open_database()
    for _ in range(3):
        database.write("INSERT INTO nowhere VALUES (1)")
        database.flush()
    database.write(ADD, "a", 1)
    database.flush()
    assert database.read("SELECT n FROM counts") == [(1,)]
    assert [r.levelname for r in caplog.records].count("WARNING") == 1


def test_the_queue_is_bounded(tmp_path):
    database = router.Database(tmp_path / "usage.db", SCHEMA)  # not started: nobody writes
    for n in range(database.MAX_QUEUED + 5):
        database.write(ADD, "a", n)
    database.start()
    database.close()
    found = sqlite3.connect(tmp_path / "usage.db").execute("SELECT n FROM counts").fetchone()
    assert found == (sum(range(5, database.MAX_QUEUED + 5)),)


def test_many_threads_read_and_write(open_database):
    database, wrong = open_database(), []

    def work():
        for _ in range(50):
            database.write(ADD, "a", 1)
            if len(database.read("SELECT * FROM counts")) > 1:
                wrong.append("two rows of one name")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    database.flush()
    assert database.read("SELECT n FROM counts") == [(400,)] and not wrong
