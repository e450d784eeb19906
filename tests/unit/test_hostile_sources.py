"""Folders and names that mean harm: nothing loops, hangs, leaves the source or the run folder, and every image is a row."""

import os
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encode, photographs, tar_of

from curation.annotate import annotate_shard, annotation_path
from curation.names import safe_shard_name
from curation.sources import fetch, list_shards, load_listing, read_samples, save_listing
from curation.stages.basics import Basics

PICTURES = [encode(picture) for picture in photographs(4, 48)]


def rows_of(source) -> list[dict]:
    return [row for shard in list_shards(str(source)) for batch in read_samples(shard) for row in batch.to_pylist()]


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path):
    real = tmp_path / "in" / "real"
    real.mkdir(parents=True)
    (real / "a.jpg").write_bytes(PICTURES[0])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.jpg").write_bytes(PICTURES[1])
    for name, target in (("up", ".."), ("self", "."), ("a_twin", "../real")):
        (real / name).symlink_to(target)
    (real / "me").symlink_to("me")
    (real / "me.jpg").symlink_to("me.jpg")
    (tmp_path / "in" / "away").symlink_to(tmp_path / "out")
    for i in range(30):  # every folder links to every other: n! paths
        (tmp_path / "in" / f"f{i}").mkdir()
        for j in range(30):
            (tmp_path / "in" / f"f{i}" / f"to{j}").symlink_to(f"../f{j}")
    rows = {row["key"]: row for row in rows_of(tmp_path / "in")}
    assert {key: row["image"] for key, row in rows.items()} == {"real/a.jpg": PICTURES[0], "away/b.jpg": PICTURES[1], "real/me.jpg": None}
    assert rows["real/me.jpg"]["error"] == "cannot read the file: it is missing"


def test_no_text_is_read_through_a_link_that_leads_out(tmp_path):
    (tmp_path / "password").write_text("hunter2")
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jpg").write_bytes(PICTURES[0])
    (folder / "a.txt").symlink_to(tmp_path / "password")
    (folder / "words").write_text("inside")
    (folder / "b.txt").symlink_to("words")
    rows = {row["key"]: row for row in rows_of(folder)}
    assert "hunter2" not in str(rows["a.jpg"]["caption"]) and "leads out" in rows["a.jpg"]["error"]
    assert rows["b.jpg"]["caption"] == "inside" and rows["b.jpg"]["error"] is None


def test_odd_files_are_rows_with_an_error_and_nothing_hangs(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "broken.jpg").symlink_to("nowhere")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "in.jpg").write_bytes(PICTURES[0])
    (tmp_path / ".hidden.jpg").write_bytes(PICTURES[1])
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.jpg").write_bytes(PICTURES[1])
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(5 << 30)
    os.mkfifo(tmp_path / "good.txt")
    (tmp_path / "good.jpg").write_bytes(PICTURES[2])
    rows = {row["key"]: (row["image"], row["error"]) for row in rows_of(tmp_path)}
    assert rows == {
        "broken.jpg": (None, "cannot read the file: it is missing"),
        "empty.jpg": (b"", None),
        "folder.jpg/in.jpg": (PICTURES[0], None),
        "good.jpg": (PICTURES[2], "txt: cannot read the file: it is not a regular file"),
        "huge.jpg": (None, f"file of {5 << 30} bytes is over the limit of {256 << 20}"),
        "pipe.jpg": (None, "cannot read the file: it is not a regular file"),
        "zero.jpg": (None, "cannot read the file: it is not a regular file"),
    }


def test_names_that_are_no_utf8_or_hold_controls_are_told_apart_and_found_again(tmp_path):
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    names = [
        b"caf\xe9.jpg",
        b"caf\\xe9.jpg",
        b"caf\xc3\xa9.jpg",
        b"line\nend.jpg",
        b"\x1b[31m.jpg",
        b"<b onclick=x>.jpg",
        b"'; DROP TABLE x;--.jpg",
    ]
    for i, name in enumerate(names):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(PICTURES[0] + bytes([i]))
    shards = list_shards(str(folder), 3)
    save_listing(shards, str(tmp_path / "run"))
    assert load_listing(str(tmp_path / "run")) == shards
    rows = [row for shard in shards for batch in read_samples(shard) for row in batch.to_pylist()]
    assert len({row["uid"] for row in rows}) == len(names) == len({row["image"] for row in rows})
    assert all(row["uid"].isprintable() and row["uid"].encode() for row in rows)
    assert {"caf\\xe9.jpg", "caf\\x5cxe9.jpg", "café.jpg", "line\\x0aend.jpg"} <= {row["key"] for row in rows}
    for row in rows:
        assert list(fetch(shards, [row["uid"]])) == [row]
    for shard in shards:
        annotate_shard(shard, (Basics(),), {Basics(): Basics().load("cpu")}, str(tmp_path / "run"))
    written = [path for path in tmp_path.rglob("*.parquet") if "annotations" in str(path)]
    assert len(written) == 3 and sum(pq.read_table(path).num_rows for path in written) == len(names)


@pytest.mark.parametrize(
    "name",
    [
        "..tar",
        "...tar",
        ".hidden.tar",
        "a\nb.tar",
        "a\x1b[31mb.tar",
        "caf\udce9.tar",
        "x" * 240 + ".tar",
        "é" * 120 + ".tar",
        "~.tar",
        "$(id).tar",
    ],
)
def test_a_shard_name_stays_inside_the_run_folder(tmp_path, name):
    (tmp_path / "in").mkdir()
    tar_of([("../../../a.jpg", PICTURES[0])], tmp_path / "in" / name)
    (shard,) = list_shards(str(tmp_path / "in" / "*.tar")) if not name.startswith(".") else list_shards(str(tmp_path / "in" / name))
    assert shard.name.isprintable() and "/" not in shard.name and not shard.name.startswith(".") and len(shard.name.encode()) <= 200
    before = set(tmp_path.rglob("*"))
    annotate_shard(shard, (Basics(),), {Basics(): Basics().load("cpu")}, str(tmp_path / "run"))
    path = annotation_path(str(tmp_path / "run"), "basics", shard.name)
    assert {str(p) for p in set(tmp_path.rglob("*")) - before if p.is_file()} == {path}
    assert pq.read_table(path)["uid"].to_pylist() == [f"{shard.name}/../../../a"]


def test_names_that_had_to_be_changed_do_not_become_one(tmp_path):
    names = ["a\nb", "a\tb", "a_b", "../b", "__b", "x" * 300, "x" * 301]
    assert len({safe_shard_name(name) for name in names}) == len(names)
    for folder in ("a__b", "a/b"):
        (tmp_path / folder).mkdir(parents=True)
        tar_of([("0.jpg", PICTURES[0])], tmp_path / folder / "x.tar")
    with pytest.raises(ValueError, match="two shards are called 'a__b__x'"):
        list_shards(f"{tmp_path}/**/*.tar")


def test_a_sql_string_in_a_caption_or_key_stays_text(tmp_path):
    import duckdb

    harm = "x'); DROP TABLE basics; COPY (SELECT 1) TO 'owned"
    (tmp_path / f"{harm[:5]}.jpg").write_bytes(PICTURES[0])
    (tmp_path / f"{harm[:5]}.txt").write_text(harm)
    (shard,) = list_shards(str(tmp_path))
    save_listing([shard], str(tmp_path / "run"))
    annotate_shard(shard, (Basics(),), {Basics(): Basics().load("cpu")}, str(tmp_path / "run"))
    found = duckdb.sql(f"SELECT caption FROM '{tmp_path}/run/annotations/basics/*.parquet'").fetchall()
    assert found == [(harm,)]


def test_a_listing_of_a_hundred_thousand_shards_is_quick(tmp_path):
    from curation.readers import Shard

    shards = [
        Shard(f"{i:06d}", "tar", f"s3://bucket/data/{i:06d}.tar", (), "s3://bucket/data", 10**9, f"{10**9} bytes, ETag {i:032x}")
        for i in range(100_000)
    ]
    start = time.process_time()
    save_listing(shards, str(tmp_path))
    assert load_listing(str(tmp_path)) == shards
    assert time.process_time() - start < 30  # about 2 s alone
    assert (tmp_path / "shards.parquet").stat().st_size < 10_000_000


def test_arrow_offsets_that_point_anywhere_are_damage(tmp_path):
    batch = pa.RecordBatch.from_pydict({"image": [b"hello", b"worlds"]})
    with pa.ipc.new_stream(str(tmp_path / "x.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    data = (tmp_path / "x.arrow").read_bytes()
    offsets = [b"".join(value.to_bytes(4, "little") for value in (0, 5, end)) for end in (11, 1_000_000)]
    assert data.count(offsets[0]) == 1
    (tmp_path / "x.arrow").write_bytes(data.replace(*offsets))
    (row,) = rows_of(tmp_path)
    assert row["key"] == "~lost" and "row 0 and after cannot be read" in row["error"]
