"""Parquet, Arrow, img2dataset and imagefolder sources: what each row becomes, and that no path leaves the source."""

import csv
import hashlib
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encode, photographs, tar_of

from curation import columns, sources
from curation.sources import SourceChangedError, fetch, list_shards, load_listing, read_samples, save_listing, source_shards

PICTURES = [encode(picture) for picture in photographs(6, 48)]
CAPTIONS = ["a\ncat\n", "  spaces kept  ", "日本語 🎌 é", "x" * 1_000_000, "<script>alert(1)</script>", "'; DROP TABLE basics; --"]


def rows_of(source) -> list[dict]:
    return [
        row
        for shard in list_shards(source if isinstance(source, list) else str(source))
        for b in read_samples(shard, 5)
        for row in b.to_pylist()
    ]


def digests(images) -> list[str]:
    return [hashlib.sha256(image).hexdigest() for image in images]


def in_parquet(folder):
    pq.write_table(pa.table({"image": PICTURES, "caption": CAPTIONS}), folder / "x.parquet", row_group_size=4)


def in_large_types(folder):
    table = pa.table({"jpg": pa.array(PICTURES, pa.large_binary()), "TEXT": pa.array(CAPTIONS, pa.large_string())})
    pq.write_table(table, folder / "x.parquet")


def in_hugging_face_parquet(folder):
    (folder / "data").mkdir()
    features = {"info": {"features": {"pic": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}}}
    table = pa.table({"pic": [{"bytes": p, "path": "0.jpg"} for p in PICTURES], "text": CAPTIONS})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), folder / "data" / "train-00000-of-00001.parquet")


def in_arrow(folder):
    table = pa.table({"image": [{"bytes": p, "path": None} for p in PICTURES], "text": CAPTIONS})
    (folder / "train").mkdir()
    with pa.ipc.new_stream(str(folder / "train" / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (folder / "train" / "state.json").write_text("{}")


def in_feather(folder):
    table = pa.table({"image": PICTURES, "text": CAPTIONS})
    with pa.ipc.new_file(str(folder / "x.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def in_a_folder(folder):
    for i, (picture, caption) in enumerate(zip(PICTURES, CAPTIONS, strict=True)):
        (folder / f"{i}.jpg").write_bytes(picture)
        if i % 2:
            (folder / f"{i}.txt").write_bytes(caption.encode())
        else:
            (folder / f"{i}.json").write_text(json.dumps({"caption": caption}))


def in_imagefolder_csv(folder):
    in_split_folders(folder)
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        writer.writerows([f"train/{i}.jpg", caption] for i, caption in enumerate(CAPTIONS))


def in_imagefolder_jsonl(folder):
    in_split_folders(folder)
    lines = [json.dumps({"file_name": f"{i}.jpg", "text": caption}) for i, caption in enumerate(CAPTIONS)]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))


def in_split_folders(folder):
    (folder / "train").mkdir()
    for i, picture in enumerate(PICTURES):
        (folder / "train" / f"{i}.jpg").write_bytes(picture)


def in_a_table_of_paths(folder):
    in_split_folders(folder)
    paths = [f"train/{i}.jpg" if i % 2 else str(folder / "train" / f"{i}.jpg") for i in range(6)]
    pq.write_table(pa.table({"file_name": paths, "caption": CAPTIONS}), folder / "metadata.parquet")
    return folder / "metadata.parquet"


def in_img2dataset_tars(folder):
    files = [
        f
        for i in range(6)
        for f in ((f"{i:09d}.jpg", PICTURES[i]), (f"{i:09d}.txt", CAPTIONS[i].encode()), (f"{i:09d}.json", b'{"key": 1}'))
    ]
    tar_of(files, folder / "00000.tar")
    pq.write_table(pa.table({"url": ["http://x"] * 6, "key": ["1"] * 6, "status": ["success"] * 6}), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")


def in_img2dataset_files(folder):
    (folder / "00000").mkdir()
    in_a_folder(folder / "00000")
    pq.write_table(pa.table({"url": ["http://x"] * 6, "key": ["1"] * 6, "status": ["success"] * 6}), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")
    # No download of this shard succeeded.
    pq.write_table(pa.table({"url": ["http://x"], "key": ["1"], "status": ["failed_to_download"]}), folder / "00001.parquet")
    (folder / "00001_stats.json").write_text("{}")


def in_img2dataset_parquet(folder):
    table = {"url": ["http://x"] * 6, "caption": CAPTIONS, "key": list("012345"), "status": ["success"] * 6, "error_message": [None] * 6}
    pq.write_table(pa.table(table | {"sha256": digests(PICTURES), "jpg": PICTURES}), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")


LONG, SHORT = "a red fox runs through deep snow " * 20, "a fox"
FURTHER = {
    "short_caption": SHORT,
    "caption": "a fox in snow",
    "caption_long": LONG,
    "caption_source": "vlm",
    "captions": ["one", " ", "two"],
}


def several_in_a_tar(folder):
    tar_of([("a.jpg", PICTURES[0]), ("a.json", json.dumps(FURTHER).encode())], folder / "x.tar")


def several_beside_a_file(folder):
    (folder / "a.jpg").write_bytes(PICTURES[0])
    (folder / "a.json").write_text(json.dumps(FURTHER))


def several_in_parquet(folder):
    pq.write_table(pa.table({"image": PICTURES[:1]} | {name: [value] for name, value in FURTHER.items()}), folder / "x.parquet")


def several_in_arrow(folder):
    table = pa.table({"image": PICTURES[:1]} | {name: [value] for name, value in FURTHER.items()})
    with pa.ipc.new_file(str(folder / "x.arrow"), table.schema) as writer:
        writer.write_table(table)


def several_in_metadata_parquet(folder):
    (folder / "a.jpg").write_bytes(PICTURES[0])
    pq.write_table(pa.table({"file_name": ["a.jpg"]} | {name: [value] for name, value in FURTHER.items()}), folder / "metadata.parquet")


def several_in_metadata_jsonl(folder):
    (folder / "a.jpg").write_bytes(PICTURES[0])
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.jpg"} | FURTHER))


@pytest.mark.parametrize("write", [f for name, f in list(globals().items()) if name.startswith("several_in")])
def test_all_captions_of_an_image_are_read_and_a_saved_listing_gives_the_same(tmp_path, write):
    (tmp_path / "source").mkdir()
    write(tmp_path / "source")
    shards = list_shards(str(tmp_path / "source"))
    save_listing(shards, str(tmp_path))
    for listed in (shards, load_listing(str(tmp_path))):
        (row,) = [row for shard in listed for batch in read_samples(shard) for row in batch.to_pylist()]
        assert (row["caption"], row["other_captions"]) == ("a fox in snow", [SHORT, LONG, "one", "two"])


def test_text_files_of_a_tar_are_captions_and_json_adds_only_what_it_names_as_further_ones(tmp_path):
    def beside(name: str, **texts: str) -> list[tuple[str, bytes]]:
        return [(f"{name}.jpg", PICTURES[0]), *((f"{name}.{end.replace('_', '.')}", text.encode()) for end, text in texts.items())]

    unnamed = json.dumps({"description": "licence", "caption": "alt"})
    files = beside("a", short_txt=SHORT, long_txt=LONG) + beside("b", long_txt=LONG, txt="main", json=unnamed)
    files += beside("c", txt="main", json=json.dumps({"captions": ["main", "x"] + [f"{i}" for i in range(100)]})) + beside(
        "d", txt=" ", json=unnamed
    )
    tar_of(files, tmp_path / "x.tar")
    rows = {row["key"]: [row["caption_source"], row["caption"], *row["other_captions"]] for row in rows_of(tmp_path)}
    assert rows["a"] == ["txt", LONG, SHORT] and rows["b"] == ["txt", "main", LONG] and rows["d"] == ["json", "alt"]
    assert rows["c"] == ["txt", "main", "x", *(f"{i}" for i in range(62))], "64 captions are the most"


def test_a_caption_that_is_a_list_is_several_and_without_one_the_longest_comes_first(tmp_path):
    table = pa.table(
        {
            "image": PICTURES[:3],
            "caption": [["one", "two", "one"], [], None],
            "caption_1": ["three", "b", None],
            "long_caption": ["four", LONG, None],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    rows = [(row["caption_source"], row["caption"], row["other_captions"]) for row in rows_of(tmp_path)]
    assert rows == [("column", "one", ["two", "three", "four"]), ("column", LONG, ["b"]), ("name", "x 00000002", [])]


@pytest.mark.parametrize("write", [f for name, f in list(globals().items()) if name.startswith("in_") and name != "in_split_folders"])
def test_bytes_and_captions_come_out_as_they_went_in(tmp_path, write):
    source = write(tmp_path) or tmp_path
    shards = list_shards(str(source))
    rows = rows_of(source)
    assert digests(row["image"] for row in rows) == digests(PICTURES)
    assert [row["caption"] for row in rows] == CAPTIONS
    assert all(row["error"] is None for row in rows)
    wanted = {row["uid"] for row in rows[1::3]}
    assert list(fetch(shards, wanted)) == [row for row in rows if row["uid"] in wanted]
    save_listing(shards, str(tmp_path / "run"))
    assert load_listing(str(tmp_path / "run")) == shards


def test_several_image_columns_give_a_row_each(tmp_path):
    pq.write_table(pa.table({"n": [1, 2], "image": PICTURES[:2], "image_1": PICTURES[2:4], "text": ["a", "b"]}), tmp_path / "x.parquet")
    rows = rows_of(tmp_path)
    assert [(row["key"], row["caption"]) for row in rows] == [
        ("00000000", "a"), ("00000000.image_1", "a"), ("00000001", "b"), ("00000001.image_1", "b"),
    ]  # fmt: skip
    assert [row["image"] for row in rows] == [PICTURES[i] for i in (0, 2, 1, 3)]
    assert [row["key"] for row in fetch(list_shards(str(tmp_path)), {"x/00000001.image_1"})] == ["00000001.image_1"]


def test_a_failed_download_says_why(tmp_path):
    table = {"jpg": [PICTURES[0], None], "status": ["success", "failed_to_download"], "error_message": [None, "HTTP Error 404: Not Found"]}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    assert [row["error"] for row in rows_of(tmp_path)] == [None, "failed_to_download: HTTP Error 404: Not Found"]


def test_no_path_in_a_table_leaves_the_source(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(PICTURES[5])
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "inner.jpg").write_bytes(PICTURES[5])
    (tmp_path / "in" / "ok.jpg").write_bytes(PICTURES[0])
    (tmp_path / "in" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    os.mkfifo(tmp_path / "in" / "pipe.jpg")
    bad = [
        ("../../secret.jpg", "leads out"), (str(tmp_path / "secret.jpg"), "leads out"), ("../../inner.jpg", "leads out"),
        ("/etc/passwd", "leads out"), ("/dev/zero", "leads out"), ("../link.jpg", "link that leads out"),
        ("../pipe.jpg", "not a regular file"), ("x\0.jpg", "leads out"),
        ("https://example.com/a.jpg", "img2dataset"), ("s3://other/a.jpg", "another store"), (f"file://{tmp_path}/secret.jpg", "leads out"),
        ("gone.jpg", "missing"), ("..", "leads out"), ("", "holds no bytes"), (None, "holds no bytes"), ("~/x.jpg", "missing"),
    ]  # fmt: skip
    good = ["../ok.jpg", str(tmp_path / "in" / "ok.jpg"), f"file://{tmp_path}/in/ok.jpg", "../sub/.././ok.jpg"]
    pq.write_table(pa.table({"path": [path for path, _ in bad] + good}), tmp_path / "in" / "sub" / "x.parquet")
    rows = rows_of(f"{tmp_path}/in/**/*.parquet")
    for (path, message), row in zip(bad, rows, strict=False):
        assert row["image"] is None and message in row["error"], (path, row["error"])
    assert [row["image"] for row in rows[len(bad) :]] == [PICTURES[0]] * 4


def test_a_table_without_an_image_column_is_refused_before_the_job_starts(tmp_path):
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"no image column: looked for image.* found a, b"):
        list_shards(str(tmp_path))


@pytest.mark.parametrize("write", [in_parquet, in_arrow, in_feather])
def test_a_table_cut_or_damaged_anywhere_gives_rows_and_one_that_says_what_is_lost(tmp_path, write):
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole")
    file = next(path for path in (tmp_path / "whole").rglob("*") if path.suffix in (".parquet", ".arrow"))
    data, rng = file.read_bytes(), np.random.default_rng(0)
    pictures, target = set(PICTURES), tmp_path / f"x{file.suffix}"
    for place in [0, 1, 5, 9, *np.linspace(10, len(data) - 1, 25).astype(int)]:
        target.write_bytes(data[:place])
        rows = rows_of(target)
        assert rows[-1]["key"] == "~lost" or (len(rows) == 6 and write is in_arrow), (place, rows[-1]["error"])
        assert all(row["image"] in pictures for row in rows[:-1]) and rows == rows_of(target)
        broken = bytearray(data)
        broken[place : place + 8] = rng.bytes(min(8, len(data) - place))
        target.write_bytes(broken)
        rows = rows_of_or_refusal(target)
        assert len(rows) == 6 or rows[-1]["key"] == "~lost", (place, len(rows))


def rows_of_or_refusal(path) -> list[dict]:
    """A damaged schema may name no image column any more: that is the one refusal."""
    try:
        return rows_of(path)
    except ValueError as refusal:
        assert "no image column" in str(refusal)
        return [{"key": "~lost"}]


def test_a_large_parquet_file_is_several_shards_with_the_same_keys(tmp_path, monkeypatch):
    pq.write_table(pa.table({"image": PICTURES * 20, "text": CAPTIONS[:3] * 40}), tmp_path / "x.parquet", row_group_size=10)
    whole = rows_of(tmp_path)
    monkeypatch.setattr(sources, "SLICE_BYTES", (tmp_path / "x.parquet").stat().st_size // 2)
    shards = list_shards(str(tmp_path))
    assert [shard.name for shard in shards][:2] == ["x-rg00000", f"x-rg{shards[0].row_groups[1]:05d}"] and 3 <= len(shards) <= 6
    rows = [row for shard in shards for batch in read_samples(shard) for row in batch.to_pylist()]
    assert [(row["key"], row["image"]) for row in rows] == [(row["key"], row["image"]) for row in whole]
    assert [row["key"] for row in fetch(shards, {rows[-1]["uid"]})] == [rows[-1]["key"]]


def test_a_folder_of_tars_and_loose_images_asks_which_are_meant(tmp_path):
    tar_of([("a.jpg", PICTURES[0])], tmp_path / "x.tar")
    (tmp_path / "loose.jpg").write_bytes(PICTURES[1])
    with pytest.raises(ValueError, match=r"1 archives \(x.tar\) and 1 loose images \(loose.jpg\)"):
        list_shards(str(tmp_path))
    assert len(rows_of(f"{tmp_path}/**/*.tar")) == 1


def test_a_named_folder_and_a_named_tar_are_both_read_and_folders_between_files_are_not(tmp_path):
    in_split_folders(tmp_path)
    tar_of([("a.jpg", PICTURES[0])], tmp_path / "x.tar")
    assert [shard.name for shard in list_shards([str(tmp_path / "x.tar"), tmp_path / "train"])] == ["train-00000", "x"]
    assert [shard.name for shard in list_shards(f"{tmp_path}/*")] == ["x"]


def test_a_metadata_file_that_cannot_be_read_is_named(tmp_path):
    in_split_folders(tmp_path)
    for content in ('{"file_name": ', "[" * 100_000):
        (tmp_path / "metadata.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"metadata.jsonl cannot be read"):
            list_shards(str(tmp_path))
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "../../../etc/passwd", "text": "x"}\n{"file_name": "train/0.jpg", "text": "\\ud800"}\n'
    )
    assert {row["caption"] for row in rows_of(tmp_path) if row["caption_source"] == "metadata"} == {"?"}


def test_json_captions_that_are_hostile_fall_back_to_the_name(tmp_path):
    texts = ["[" * 200_000, "{" + '"a":' * 9, '{"caption": 5}', '{"caption": "\\ud83d"}', "9" * 10_000, "null", '{"caption": " \\n"}']
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.jpg").write_bytes(PICTURES[0])
        (tmp_path / f"{i}.json").write_text(text)
    assert [(row["caption_source"], row["error"]) for row in rows_of(tmp_path)] == [
        ("json" if i == 3 else "name", None) for i in range(len(texts))
    ]
    assert columns.captions_in({"caption": "", "text": "b"}) == ["b"]


def test_a_listing_is_not_repeated_and_a_changed_file_is_refused_by_name(tmp_path):
    source, run = tmp_path / "in", str(tmp_path / "run")
    source.mkdir()
    for name in ("a", "b"):
        tar_of([(f"{name}.jpg", PICTURES[0])], source / f"{name}.tar")
    shards = source_shards(str(source), run)
    save_listing(shards, run)
    tar_of([("c.jpg", PICTURES[1])], source / "c.tar")
    assert source_shards(str(source), run) == shards
    more = source_shards(str(source), run, relist=True)
    assert more[:2] == shards and [shard.name for shard in more] == ["a", "b", "c"]
    old = (source / "b.tar").stat()
    os.utime(source / "b.tar", (old.st_atime, old.st_mtime + 5))
    with pytest.raises(
        SourceChangedError, match=rf"b\.tar changed since it was listed: {old.st_size} bytes, mtime .* -> {old.st_size} bytes"
    ):
        list(read_samples(shards[1]))
    (source / "a.tar").unlink()
    with pytest.raises(SourceChangedError, match=r"a\.tar changed .* -> missing"):
        list(read_samples(shards[0]))
    with pytest.raises(SourceChangedError, match=r"(?s)2 files .*a\.tar: .* -> gone.*b\.tar"):
        source_shards(str(source), run, relist=True)


def test_a_folder_that_grows_keeps_its_slices_and_a_changed_image_or_caption_is_named(tmp_path):
    source, run = tmp_path / "pics", str(tmp_path / "run")
    source.mkdir()
    in_a_folder(source)
    shards = source_shards(str(source), run, 4)
    save_listing(shards, run)
    for name in ("0a", "z", "2b"):
        (source / f"{name}.jpg").write_bytes(PICTURES[0])
    more = source_shards(str(source), run, 4, relist=True)
    assert more[:2] == load_listing(run) and [(s.name, s.members) for s in more[2:]] == [("pics-00002", ("0a.jpg", "2b.jpg", "z.jpg"))]
    assert [row["caption"] for batch in read_samples(more[2]) for row in batch.to_pylist()][2] == "pics 00002 z"
    (source / "3.txt").write_text("other words")
    with pytest.raises(SourceChangedError, match=r"3\.jpg changed .*bytes"):
        list(read_samples(shards[0]))
    found = {row["key"]: (row["image"], row["error"]) for row in fetch(shards, [f"pics-00000/{i}.jpg" for i in (2, 3)])}
    assert found["2.jpg"] == (PICTURES[2], None) and found["3.jpg"][0] is None and "changed since it was listed" in found["3.jpg"][1]
    with pytest.raises(SourceChangedError, match=r"1 files .*"):
        source_shards(str(source), run, 4, relist=True)
