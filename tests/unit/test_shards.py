"""Whole-or-nothing files and fingerprints."""

from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import shards
from curation.shards import describe, fingerprint, is_done, read_fingerprint, write_bytes, write_table

TABLE = pa.table({"uid": ["a", "b"], "x": [1.0, 2.0]})


@dataclass(frozen=True)
class Thing:
    size: int = 1
    inner: tuple = (1, 2)


def test_equal_tables_are_equal_bytes_and_carry_their_fingerprint(tmp_path):
    for name in ("one", "two"):
        write_table(TABLE, tmp_path / name / "t.parquet", "abc")
    assert (tmp_path / "one/t.parquet").read_bytes() == (tmp_path / "two/t.parquet").read_bytes()
    assert read_fingerprint(tmp_path / "one/t.parquet") == "abc"
    assert pq.read_table(tmp_path / "one/t.parquet").to_pydict() == TABLE.to_pydict()


def test_done_means_there_and_made_by_this_description(tmp_path):
    path = tmp_path / "t.parquet"
    assert not is_done(path, "abc")
    write_table(TABLE, path, "abc")
    assert is_done(path, "abc")
    with pytest.raises(ValueError, match="fingerprint abc, now def"):
        is_done(path, "def")


def test_a_write_that_dies_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_bytes(b"old", tmp_path / "f")

    def die(*_):
        raise OSError("power cut")

    monkeypatch.setattr(shards.os, "replace", die)
    with pytest.raises(OSError, match="power cut"):
        write_bytes(b"new", tmp_path / "f")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_bytes() == b"old"


def test_a_fingerprint_changes_with_every_field_and_with_the_class():
    assert fingerprint(Thing()) == fingerprint(Thing())
    assert len({fingerprint(x) for x in (Thing(), Thing(2), Thing(1, (1, 3)), {"size": 1, "inner": [1, 2]})}) == 4
    assert describe(Thing()) == {"class": "Thing", "size": 1, "inner": [1, 2]}


def test_duckdb_sees_which_errors_are_null_where_all_others_are_equal(tmp_path):
    rows = pa.table({"uid": ["a", "b", "c"], "error": pa.array([None, "broken", None])})
    write_table(rows, tmp_path / "t.parquet", "abc")
    assert duckdb.sql(f"SELECT uid FROM '{tmp_path}/t.parquet' WHERE error IS NULL").fetchall() == [("a",), ("c",)]
