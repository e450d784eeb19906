"""Sources: what is listed, and what each sample becomes."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encode, photographs, tar_of

from curation.schema import SAMPLES
from curation.sources import Shard, fetch, list_shards, load_listing, name_in_words, read_samples, save_listing


def rows_of(shards: list[Shard]) -> list[dict]:
    return [row for shard in shards for batch in read_samples(shard, 5) for row in batch.to_pylist()]


def test_a_folder_is_cut_into_shards_and_every_image_file_is_a_sample(tiny_folder):
    shards = list_shards(str(tiny_folder), shard_size=10)
    rows = rows_of(shards)
    assert [len(shard.members) for shard in shards] == [10, 10, 3]
    assert len(rows) == len({row["uid"] for row in rows}) == 23
    assert {row["key"] for row in rows} >= {"deep.folder/with alpha.png", "broken_empty.jpg"}


def test_captions_come_from_txt_then_json_then_the_name(tiny_folder):
    rows = {row["key"]: row for row in rows_of(list_shards(str(tiny_folder)))}
    assert (rows["photo_00.jpg"]["caption"], rows["photo_00.jpg"]["caption_source"]) == ("an astronaut in an orange suit", "txt")
    assert (rows["photo_01.jpg"]["caption"], rows["photo_01.jpg"]["caption_source"]) == ("a cup of coffee", "json")
    assert (rows["deep.folder/with alpha.png"]["caption"], rows["photo_02.jpg"]["caption_source"]) == ("deep folder with alpha", "name")


def test_a_tar_groups_files_by_key_and_keeps_images_without_caption_and_captions_without_image(tiny_tars):
    rows = {row["uid"]: row for row in rows_of(list_shards(str(tiny_tars)))}
    assert len(rows) == 25  # 24 samples, one of them with two images
    assert rows["00001/a.b/010002"]["error"] == "sample has no image, only txt"
    assert rows["00000/a.b/000003"]["caption"] == rows["00000/a.b/000003.second.png"]["caption"] == "caption 0 3"
    assert rows["00002/a.b/020000"]["caption_source"] == "name"


def test_a_key_that_comes_twice_in_a_tar_loses_no_image(tmp_path):
    pictures = [encode(p) for p in photographs(3, 32)]
    path = tar_of([("a.jpg", pictures[0]), ("b.jpg", pictures[1]), ("a.jpg", pictures[2])], tmp_path / "x.tar")
    rows = rows_of(list_shards(str(path)))
    assert [row["uid"] for row in rows] == ["x/a", "x/b", "x/a~2"]
    assert [row["image"] for row in rows] == pictures


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet_gives_bytes_and_captions_of_plain_and_hugging_face_columns(tmp_path, as_struct):
    pictures = [encode(p) for p in photographs(3, 32)] + [None]
    images = [{"bytes": p, "path": None} for p in pictures] if as_struct else pictures
    pq.write_table(pa.table({"image": images, "text": ["one", "two", None, "four"]}), tmp_path / "part.parquet")
    rows = rows_of(list_shards(str(tmp_path / "*.parquet")))
    assert [row["image"] for row in rows] == pictures
    assert [row["caption"] for row in rows] == ["one", "two", "part 00000002", "four"]
    assert [row["caption_source"] for row in rows] == ["column", "column", "name", "column"]
    assert rows[3]["error"].startswith("column image is null")


def test_braces_and_stars_are_expanded_and_names_stay_unique(tiny_tars):
    assert [s.name for s in list_shards(f"{tiny_tars}/{{00000..00001}}.tar")] == ["00000", "00001"]
    assert [s.name for s in list_shards(f"{tiny_tars}/0000[02].tar")] == ["00000", "00002"]


def test_fetch_returns_just_the_wanted_samples_of_every_kind_of_source(tiny_tars, tiny_folder):
    for shards in (list_shards(str(tiny_tars)), list_shards(str(tiny_folder), 10)):
        rows = rows_of(shards)
        wanted = {row["uid"] for row in rows[::4]}
        assert {row["uid"]: row["image"] for row in fetch(shards, wanted)} == {r["uid"]: r["image"] for r in rows if r["uid"] in wanted}


def test_a_listing_is_remembered(tmp_path, tiny_folder):
    shards = list_shards(str(tiny_folder), 10)
    save_listing(shards, str(tmp_path))
    assert load_listing(str(tmp_path)) == shards
    with pytest.raises(FileNotFoundError, match="k2 annotate"):
        load_listing(str(tmp_path / "elsewhere"))


def test_an_unknown_source_an_empty_folder_and_a_stranger_are_clear_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("x")
    for source, message in (("nowhere/*.tar", "matches nothing"), ("empty", "holds no image"), ("note.txt", "neither .tar")):
        with pytest.raises(ValueError, match=message):
            list_shards(str(tmp_path / source))


def test_samples_of_a_memory_filesystem_are_read_through_fsspec():
    import fsspec

    content = io.BytesIO()
    pq.write_table(pa.table({"image": [encode(photographs(1, 32)[0])]}), content)
    with fsspec.open("memory://bucket/data/a.parquet", "wb") as file:
        file.write(content.getvalue())
    rows = rows_of(list_shards("memory://bucket/data/*.parquet"))
    assert len(rows) == 1 and pa.RecordBatch.from_pylist(rows, schema=SAMPLES).num_rows == 1


def test_names_become_words():
    assert name_in_words("snow_park/IMG-red fox.jpg") == "snow park IMG red fox"
