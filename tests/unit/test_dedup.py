"""Duplicate groups, on pictures hashed by the stage `basics` itself."""

import io
import json

import numpy as np
import pyarrow as pa
import pytest
from ordered_world import find_duplicates
from PIL import Image
from skimage import data

from curation.dedup import Dedup
from curation.schema import BASICS, DUPLICATES
from curation.shards import write_table
from curation.stages.basics import facts
from pipelines import cli


def photo(seed: int, side: int = 240) -> np.ndarray:
    """A window of a photograph; two seeds share no pixel."""
    source = data.astronaut() if seed % 2 else data.coffee()[:, 40:]
    row, column = divmod(seed // 2, 2)
    return np.ascontiguousarray(source[row * 140 : row * 140 + side, column * 250 : column * 250 + side])


def basics_of(pictures: dict[str, np.ndarray | None], **more: dict[str, object]) -> pa.Table:
    """Annotation rows of uncompressed pictures (None: a broken image); `more` sets single values, column -> uid -> value."""
    rows = []
    for uid, picture in pictures.items():
        row = {"uid": uid, "shard": "s", "key": uid, "md5": uid, "bytes": 1000, "format": "JPEG", "jpeg_quality": 90}
        row |= facts(picture) if picture is not None else {"error": "broken", "format": None, "jpeg_quality": None}
        rows.append(row | {column: values[uid] for column, values in more.items() if uid in values})
    return pa.Table.from_pylist(rows, schema=BASICS)


def groups(table: pa.Table) -> list[list[str]]:
    """Uids of every group, the representative first."""
    rows = [row for row in table.to_pylist() if row["group"] is not None]
    return [
        [row["uid"] for row in sorted(rows, key=lambda row: not row["representative"]) if row["group"] == group]
        for group in sorted({row["group"] for row in rows})
    ]


def resized(picture: np.ndarray, scale: float, quality: int) -> np.ndarray:
    small = Image.fromarray(picture).resize((round(picture.shape[1] * scale), round(picture.shape[0] * scale)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(io.BytesIO(buffer.getvalue())))


def test_small_recompressed_and_mirrored_copies_join_their_original_and_nothing_else_does():
    pictures = {f"photo{i}": photo(i) for i in range(4)}
    pictures["small0"] = resized(photo(0), 0.6, 60)
    pictures["mirror1"] = np.ascontiguousarray(photo(1)[:, ::-1])
    pictures["both2"] = resized(np.ascontiguousarray(photo(2)[:, ::-1]), 0.6, 60)
    table = find_duplicates(basics_of(pictures))
    assert table.schema == DUPLICATES and table["uid"].to_pylist() == sorted(pictures)
    assert [sorted(group) for group in groups(table)] == [["both2", "photo2"], ["mirror1", "photo1"], ["photo0", "small0"]]
    rows = {row["uid"]: row for row in table.to_pylist()}
    assert rows["photo3"] | {"uid": ""} == {
        "uid": "",
        "group": None,
        "group_size": 1,
        "kind": "unique",
        "representative": True,
        "distance": None,
        "mirrored": None,
        "error": None,
    }
    assert rows["photo0"]["representative"] and not rows["small0"]["representative"] and rows["small0"]["distance"] <= 12
    assert rows["both2"]["mirrored"] and not rows["small0"]["mirrored"]
    assert rows["mirror1"]["representative"] and rows["photo1"]["mirrored"] and rows["photo1"]["kind"] == "perceptual"


def test_the_same_drawing_in_another_colour_is_not_a_duplicate():
    drawing = np.full((240, 240, 3), 255, np.uint8)
    drawing[40:200, 60:120] = (200, 20, 20)
    drawing[90:130, 120:220] = (90, 10, 10)
    blue = np.ascontiguousarray(drawing[..., ::-1])
    blue[(drawing == 255).all(-1)] = 255
    luma = [np.asarray(Image.fromarray(picture).convert("L"), int) for picture in (drawing, blue)]
    scaled = np.clip(blue.astype(float) * luma[0].mean() / luma[1].mean(), 0, 255).astype(np.uint8)
    basics = basics_of({"red": drawing, "blue": scaled})
    assert hamming_of(basics, 0, 1) <= Dedup().phash_bits, "the phash alone would join them"
    assert groups(find_duplicates(basics)) == []
    assert len(groups(find_duplicates(basics, Dedup(color_steps=98)))) == 1


def hamming_of(basics: pa.Table, i: int, j: int) -> int:
    a, b = (np.frombuffer(basics["phash"][k].as_py(), np.uint8) for k in (i, j))
    return int(np.unpackbits(a ^ b).sum())


def test_flat_pictures_are_not_copies_of_each_other_unless_their_bytes_are_equal():
    flat = {name: np.full((64, 64, 3), grey, np.uint8) for name, grey in (("a", 90), ("b", 100), ("c", 110))}
    basics = basics_of(flat)
    assert len(set(basics["phash"].to_pylist())) == 1 and len(set(basics["colorhash"].to_pylist())) == 1
    assert groups(find_duplicates(basics)) == []
    table = find_duplicates(basics_of(flat, md5={"b": "same", "c": "same"}))
    assert groups(table) == [["b", "c"]] and table["kind"].to_pylist() == ["unique", "exact", "exact"]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("jpeg_quality", {"a": 60, "b": 95, "c": 80}),
        ("format", {"b": "PNG"}),
        ("bytes", {"b": 2000}),
        ("md5", {"a": "x", "b": "x", "c": "x"}),
    ],
)
def test_the_representative_is_the_largest_then_the_best_then_the_first(column, values):
    pictures = {uid: photo(0) for uid in "abc"}
    values = {column: values}
    if column == "format":
        values["jpeg_quality"] = {"a": 100, "b": None, "c": 100}
    expected = "a" if column == "md5" else "b"
    assert groups(find_duplicates(basics_of(pictures, **values)))[0][0] == expected
    larger = pictures | {"c": np.kron(photo(0), np.ones((2, 2, 1), np.uint8))}
    assert groups(find_duplicates(basics_of(larger, **values)))[0][0] == "c"


def test_a_broken_image_keeps_its_row_and_stands_for_no_group():
    table = find_duplicates(basics_of({"a": None, "b": photo(1), "c": None}, md5={"a": "x", "b": "x", "c": "x"}))
    rows = table.to_pylist()
    assert [row["error"] for row in rows] == ["broken", None, "broken"]
    assert all(value is None for row in (rows[0], rows[2]) for name, value in row.items() if name not in ("uid", "error"))
    assert rows[1]["kind"] == "unique"


def test_no_image_and_only_broken_images_are_fine():
    assert len(find_duplicates(BASICS.empty_table())) == 0
    assert find_duplicates(basics_of({"a": None}))["representative"].to_pylist() == [None]


def test_a_chain_is_cut_where_an_image_is_not_near_the_one_that_is_kept():
    bits = np.arange(144) % 2
    steps = [np.concatenate([1 - bits[: 12 * i], bits[12 * i :]]) for i in range(3)]  # each is 12 bits from the one before
    noise = [np.random.default_rng(i).permutation(bits) for i in range(3)]
    rows = basics_of({name: photo(0) for name in "abc"}).to_pylist()
    for row, own, mirror in zip(rows, steps, noise, strict=True):
        row |= {"phash": np.packbits(own).tobytes(), "phash_mirror": np.packbits(mirror).tobytes()}
    assert find_duplicates(pa.Table.from_pylist(rows, schema=BASICS))["distance"].to_pylist() == [0, 12, None]


def test_the_command_is_done_once_and_again_when_an_annotation_changes(tmp_path, capsys):
    path = tmp_path / "annotations/duplicates/all.parquet"
    for shard, names in (("one", "ab"), ("two", "c")):
        basics = basics_of({name: photo(0) for name in names})
        write_table(basics, tmp_path / f"annotations/basics/{shard}.parquet", "stage")
    assert cli.main(["dedup", "--run", str(tmp_path)]) == 0
    line, without = (json.loads(each) for each in capsys.readouterr().out.splitlines())
    assert without["semantic"] is None and "no embeddings" in without["why"]
    assert line | {"duplicates": "", "seconds": 0} == {
        "duplicates": "",
        "seconds": 0,
        "images": 3,
        "broken": 0,
        "groups": 1,
        "exact": 0,
        "perceptual": 2,
    }
    before = path.read_bytes()
    assert cli.main(["dedup", "--run", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["done"] == "before" and path.read_bytes() == before
    write_table(basics_of({"c": photo(1)}), tmp_path / "annotations/basics/two.parquet", "stage")
    assert cli.main(["dedup", "--run", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["perceptual"] == 1


def test_a_run_without_annotations_says_which_command_makes_them(tmp_path, capsys):
    assert cli.main(["dedup", "--run", str(tmp_path)]) == 2
    assert "run `k2 annotate --source ..." in capsys.readouterr().err
