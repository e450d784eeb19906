"""Packing: what was chosen is what is packed, in an order that only the seed decides."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encode, photographs
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from curation.buckets import place
from curation.pack import Packing, crop_and_resize, plan
from curation.schema import PACKED, SELECTION
from curation.shards import write_json, write_table
from curation.sources import list_shards, save_listing
from pipelines import pack as verb

PACKING = Packing("p", "0", 32, 4, seed=0)


def selection_of(folder: Path, names: dict[str, tuple[int, int]], resolution: int = 32) -> pa.Table:
    """A selection of these files (name -> height, width) of a folder source."""
    shards = {member: shard.name for shard in list_shards(str(folder), 5) for member in shard.members}
    placed = place(*zip(*names.values(), strict=True), resolution)
    columns = {name: pa.array(values, pa.int32()) for name, values in placed._asdict().items()}
    facts = {"uid": [f"{shards[n]}/{n}" for n in names], "shard": [shards[n] for n in names], "key": list(names)}
    return pa.table(facts | columns).select(SELECTION.names).cast(SELECTION)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with 14 pictures in two buckets, all chosen."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = {}
    for i, picture in enumerate(photographs(14, 80)):
        picture = picture[:, :60] if i % 3 == 0 else picture
        (folder / f"{i:02d}.png").write_bytes(encode(picture, "PNG"))
        names[f"{i:02d}.png"] = picture.shape[:2]
    save_listing(list_shards(str(folder), 5), str(tmp_path))
    write_table(selection_of(folder, names), tmp_path / "selection/p.parquet", "made")
    write_json({"resolution": 32}, tmp_path / "selection/p.funnel.json")
    return tmp_path


def packed_rows(run: Path) -> list[dict]:
    return [row for file in sorted((run / "packed/p").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_every_chosen_image_is_packed_once_and_a_row_group_is_a_batch_of_one_bucket(run):
    assert verb.pack(str(run), "p", 4, ray="off") == 0
    content = json.loads((run / "packed/p/dataset.json").read_text())
    file = pq.ParquetFile(run / "packed/p/00000.parquet")
    assert file.schema_arrow.equals(PACKED, check_metadata=False)
    assert file.num_row_groups == content["num_batches"] == len(content["batches"])
    for i, batch in enumerate(content["batches"]):
        rows = file.read_row_group(i).to_pylist()
        shapes = {Image.open(io.BytesIO(row["image"])).size[::-1] for row in rows}
        assert shapes == {(batch["bucket_height"], batch["bucket_width"])} and len(rows) == batch["num_rows"] <= 4
    assert sorted(row["key"] for row in packed_rows(run)) == [f"{i:02d}.png" for i in range(14)]
    assert not (run / "packed/p/.pieces").exists()


def test_packing_again_does_nothing_and_another_seed_is_refused(run, capsys):
    assert verb.main(["--run", str(run), "--policy", "p", "--batch-size", "4", "--ray", "off"]) == 0
    before = (run / "packed/p/00000.parquet").read_bytes()
    assert verb.main(["--run", str(run), "--policy", "p", "--batch-size", "4", "--ray", "off"]) == 0
    assert '"images_now": 0' in capsys.readouterr().out
    assert verb.main(["--run", str(run), "--policy", "p", "--batch-size", "4", "--ray", "off", "--seed", "1"]) == 2
    assert "packing.seed: 0 -> 1" in capsys.readouterr().err
    assert (run / "packed/p/00000.parquet").read_bytes() == before


def test_a_packing_that_was_stopped_between_shards_ends_in_the_same_bytes(run, tmp_path, monkeypatch):
    assert verb.pack(str(run), "p", 4, ray="off") == 0
    whole = (run / "packed/p/00000.parquet").read_bytes()
    for path in (run / "packed/p").glob("*"):
        path.unlink()
    made = []

    def stops_after_two(shard, *rest, make_piece=verb.make_piece):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(shard.name)
        return make_piece(shard, *rest)

    monkeypatch.setattr(verb, "make_piece", stops_after_two)
    with pytest.raises(KeyboardInterrupt):
        verb.pack(str(run), "p", 4, ray="off")
    assert not (run / "packed/p/dataset.json").exists()
    monkeypatch.undo()
    assert verb.pack(str(run), "p", 4, ray="off") == 0
    assert (run / "packed/p/00000.parquet").read_bytes() == whole


def test_an_image_that_broke_after_it_was_chosen_is_named_and_the_others_are_packed(run, capsys):
    (run / "pictures/03.png").write_bytes(b"gone")
    assert verb.pack(str(run), "p", 4, ray="off") == 1
    assert "03.png was chosen but cannot be packed: not an image" in capsys.readouterr().err
    assert len(packed_rows(run)) == 13
    assert verb.pack(str(run), "p", 4, ray="off") == 1, "the loss is not forgotten when the command runs again"


def test_an_image_that_became_smaller_after_it_was_chosen_is_named_too(run, capsys):
    (run / "pictures/04.png").write_bytes(encode(np.zeros((40, 40, 3), np.uint8), "PNG"))
    assert verb.pack(str(run), "p", 4, ray="off") == 1
    assert "04.png was chosen but cannot be packed: the image is 40x40 now" in capsys.readouterr().err
    assert len(packed_rows(run)) == 13


def test_a_missing_selection_says_which_command_makes_it(run):
    with pytest.raises(ValueError, match="k2 filter"):
        verb.pack(str(run), "q")


def test_the_crop_is_what_is_resized():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[16:48, 16:48] = (200, 40, 90)
    chosen = {"uid": "x", "crop_top": 16, "crop_left": 16, "crop_height": 32, "crop_width": 32, "bucket_height": 16, "bucket_width": 16}
    assert np.abs(np.asarray(Image.open(io.BytesIO(crop_and_resize(picture, chosen)))).astype(int) - (200, 40, 90)).max() <= 3


UIDS = st.lists(st.tuples(st.integers(0, 999), st.sampled_from([(32, 32), (32, 48), (48, 32)])), unique_by=lambda x: x[0], max_size=40)


@given(UIDS, st.integers(1, 7), st.integers(0, 3), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_plan_holds_every_image_once_in_batches_of_one_bucket_whatever_the_order_of_rows(rows, batch_size, seed, random):
    packing = Packing("p", "0", 32, batch_size, seed, batches_per_file=3)
    schema = pa.schema([SELECTION.field(name) for name in ("uid", "bucket_height", "bucket_width")])
    table = pa.Table.from_pylist([{"uid": str(u), "bucket_height": b[0], "bucket_width": b[1]} for u, b in rows], schema)
    files = plan(table, packing)
    batches = [batch for file in files for batch in file]
    assert sorted(uid for batch in batches for uid in batch) == sorted(str(u) for u, _ in rows)
    bucket = {str(u): b for u, b in rows}
    assert all(len({bucket[uid] for uid in batch}) == 1 and len(batch) <= batch_size for batch in batches)
    assert all(len(file) == 3 for file in files[:-1])
    order = list(range(len(rows)))
    random.shuffle(order)
    assert plan(table.take(pa.array(order, pa.int64())), packing) == files


def test_another_seed_gives_another_order():
    table = pa.table({"uid": [str(i) for i in range(40)], "bucket_height": [32] * 40, "bucket_width": [32] * 40})
    assert plan(table, PACKING) != plan(table, Packing("p", "0", 32, 4, seed=1))
