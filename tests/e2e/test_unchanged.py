"""Original bytes and captions through the whole of curation: what is packed is what the source held."""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encode, photographs, tar_of

from curation.buckets import place
from curation.schema import SELECTION
from curation.shards import write_json, write_table
from pipelines.annotate import annotate
from pipelines.pack import pack

CAPTIONS = [
    "a\ncat\n",
    "  spaces kept  ",
    "日本語 🎌 é",
    "x" * 200_000,
    "'; DROP TABLE basics; --",
    "<script>alert(1)</script>",
    "tab\t\r\nend\0zero",
]
PICTURES = [encode(picture) for picture in photographs(len(CAPTIONS), 64)]


def in_a_tar(folder):
    files = [f for i in range(len(CAPTIONS)) for f in ((f"d.e/{i}.jpg", PICTURES[i]), (f"d.e/{i}.txt", CAPTIONS[i].encode()))]
    tar_of(files, folder / "x.tar")


def in_parquet(folder):
    pq.write_table(pa.table({"image": PICTURES, "text": CAPTIONS}), folder / "x.parquet", row_group_size=3)


def in_a_folder(folder):
    for i, (picture, caption) in enumerate(zip(PICTURES, CAPTIONS, strict=True)):
        (folder / f"{i}.jpg").write_bytes(picture)
        (folder / f"{i}.txt").write_bytes(caption.encode())


@pytest.mark.parametrize("write", [in_a_tar, in_parquet, in_a_folder])
def test_what_is_packed_is_what_the_source_held(tmp_path, write):
    source, run = tmp_path / "source", tmp_path / "run"
    source.mkdir()
    write(source)
    assert annotate(str(source), str(run), "basics", "off") == 0
    (file,) = (run / "annotations" / "basics").glob("*.parquet")
    rows = pq.read_table(file).sort_by("key").to_pylist()
    assert [row["caption"] for row in rows] == CAPTIONS
    assert [row["md5"] for row in rows] == [hashlib.md5(picture).hexdigest() for picture in PICTURES]
    boxes = {name: pa.array(values, pa.int32()) for name, values in place([64] * len(rows), [64] * len(rows), 64)._asdict().items()}
    chosen = pa.table({name: [row[name] for row in rows] for name in ("uid", "shard", "key")} | boxes).select(SELECTION.names)
    write_table(chosen.cast(SELECTION), run / "selection/p.parquet", "made")
    write_json({"resolution": 64}, run / "selection/p.funnel.json")
    assert pack(str(run), "p", 4, ray="off") == 0
    packed = [row for path in sorted((run / "packed/p").glob("*.parquet")) for row in pq.read_table(path).to_pylist() if not row["padding"]]
    packed.sort(key=lambda row: row["uid"])
    assert [row["caption"] for row in packed] == CAPTIONS
    # A JPEG of just the bucket's size is packed as it is: the very bytes.
    assert [hashlib.sha256(row["image"]).digest() for row in packed] == [hashlib.sha256(picture).digest() for picture in PICTURES]
