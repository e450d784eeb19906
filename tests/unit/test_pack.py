"""Packing: what was chosen is what is packed, in an order that only the seed decides."""

import io
import json
import shutil
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encode, photographs, tar_of
from PIL import Image, ImageCms
from safetensors.torch import save_file

from curation import pieces, shards
from curation.buckets import place
from curation.schema import PACKED, SELECTION
from curation.shards import write_json, write_table
from curation.sources import list_shards, save_listing
from k2model.data import Packed, to_pixels
from k2model.vae import fit_pca
from pipelines import pack as verb


def selection_of(folder: Path, names: dict[str, tuple[int, int]], resolution: int = 32) -> pa.Table:
    """A selection of these files (name -> height, width) of a folder source."""
    owner = {member: shard.name for shard in list_shards(str(folder), 5) for member in shard.members}
    placed = place(*zip(*names.values(), strict=True), resolution)
    columns = {name: pa.array(values, pa.int32()) for name, values in placed._asdict().items()}
    facts = {"uid": [f"{owner[n]}/{n}" for n in names], "shard": [owner[n] for n in names], "key": list(names)}
    return pa.table(facts | columns).select(SELECTION.names).cast(SELECTION)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with 14 pictures in two buckets, all chosen."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = {}
    for i, picture in enumerate(photographs(14, 80)):
        picture = picture[:, :20] if i % 3 == 0 else picture
        (folder / f"{i:02d}.png").write_bytes(encode(picture, "PNG"))
        names[f"{i:02d}.png"] = picture.shape[:2]
    save_listing(list_shards(str(folder), 5), str(tmp_path))
    write_table(selection_of(folder, names), tmp_path / "selection/p.parquet", "made")
    write_json({"resolution": 32}, tmp_path / "selection/p.funnel.json")
    return tmp_path


def packed_rows(run: Path) -> list[dict]:
    """Every row that is not padding."""
    rows = [row for file in sorted((run / "packed/p").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    return [row for row in rows if not row["padding"]]


def packed_bytes(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "packed/p").glob("*") if path.is_file() and path.name != "run.json"}


def choose(run: Path, numbers: list[int]) -> None:
    """Write the selection of these pictures of the fixture."""
    names = {f"{i:02d}.png": (80, 20) if i % 3 == 0 else (80, 80) for i in numbers}
    write_table(selection_of(run / "pictures", names), run / "selection/p.parquet", "made")


def test_every_chosen_image_is_packed_once_and_a_row_group_is_a_batch_of_one_bucket(run):
    assert verb.pack(str(run), "p", 4, ray="off") == 0
    content = json.loads((run / "packed/p/dataset.json").read_text())
    file = pq.ParquetFile(run / "packed/p/00000.parquet")
    assert file.schema_arrow.equals(PACKED, check_metadata=False)
    assert file.num_row_groups == content["num_batches"] == len(content["batches"])
    for i, batch in enumerate(content["batches"]):
        rows = file.read_row_group(i).to_pylist()
        shapes = {Image.open(io.BytesIO(row["image"])).size[::-1] for row in rows}
        assert shapes == {(batch["bucket_height"], batch["bucket_width"])} and len(rows) == 4
        assert [row["padding"] for row in rows] == [j >= batch["num_rows"] for j in range(4)]
    assert sorted(row["key"] for row in packed_rows(run)) == [f"{i:02d}.png" for i in range(14)]
    assert content["num_chosen"] == content["num_rows"] == 14 and content["errors"] == content["remainder"] == []
    assert not (run / "packed/p/.pieces").exists()


def test_packing_again_does_nothing_and_another_seed_is_refused(run, capsys):
    assert verb.main(["--run", str(run), "--policy", "p", "--batch-size", "4", "--ray", "off"]) == 0
    before = (run / "packed/p/00000.parquet").read_bytes()
    assert verb.main(["--run", str(run), "--policy", "p", "--batch-size", "4", "--ray", "off"]) == 0
    assert '"images_now": 0' in capsys.readouterr().out
    assert verb.main(["--run", str(run), "--policy", "p", "--batch-size", "4", "--ray", "off", "--seed", "1"]) == 2
    assert "packing.seed: 0 -> 1" in capsys.readouterr().err
    assert (run / "packed/p/00000.parquet").read_bytes() == before


def stop_after(monkeypatch, count: int) -> None:
    """Let the verb write `count` more files of any kind, pieces and packed shards, and then be interrupted."""
    left = [count]

    @contextmanager
    def stops(path, whole_file=shards.whole_file):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        with whole_file(path) as file:
            yield file

    for module in (shards, pieces):
        monkeypatch.setattr(module, "whole_file", stops)


def test_a_packing_that_was_stopped_anywhere_does_only_what_is_missing_and_ends_in_the_same_bytes(run, monkeypatch):
    monkeypatch.setattr(verb, "Packing", partial(verb.Packing, batches_per_file=2))
    assert verb.pack(str(run), "p", 4, ray="off") == 0
    whole = packed_bytes(run)
    assert len(whole) == 4, "three packed shards and dataset.json"
    shutil.rmtree(run / "packed")
    stops, decoded = 0, []
    monkeypatch.setattr(pieces, "cut", lambda *image, cut=pieces.cut: decoded.append(image) or cut(*image))
    while not (run / "packed/p/dataset.json").exists():
        with monkeypatch.context() as context:
            stop_after(context, 3)  # a piece is two files, the second in the order of the draws
            try:
                verb.pack(str(run), "p", 4, ray="off")
            except KeyboardInterrupt:
                stops += 1
                for folder in (run / "packed/p", run / "packed/p/.pieces"):
                    (folder / ".00000.parquet.0123.tmp").write_bytes(b"what a killed process leaves")
    assert stops >= 2 and packed_bytes(run) == whole, "nor is anything else left"
    assert len(decoded) < 14 + 5 * stops, "of the images that were decoded, at most one shard was lost in each stop"


@pytest.mark.parametrize("remainder", ["pad", "short", "drop"])
def test_nothing_is_lost_silently_whatever_is_done_with_the_remainder(run, capsys, remainder):
    assert verb.pack(str(run), "p", 4, remainder=remainder, ray="off") == 0
    content = json.loads((run / "packed/p/dataset.json").read_text())
    packed = [row["uid"] for row in packed_rows(run)]
    chosen = pq.read_table(run / "selection/p.parquet")["uid"].to_pylist()
    assert sorted(packed + content["remainder"]) == sorted(chosen), "5 strips and 9 squares, in batches of 4"
    assert len(content["remainder"]) == (2 if remainder == "drop" else 0)
    file = pq.ParquetFile(run / "packed/p/00000.parquet")
    lengths = sorted(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
    assert lengths == {"pad": [4] * 5, "short": [1, 1, 4, 4, 4], "drop": [4] * 3}[remainder]
    said = json.loads(capsys.readouterr().out)
    assert said["num_chosen"] == said["num_rows"] + said["not_packed"] + said["remainder"] == 14


def test_an_unknown_remainder_is_refused(run, capsys):
    assert verb.main(["--run", str(run), "--policy", "p", "--remainder", "lose"]) == 2
    assert "--remainder 'lose': choose from pad, short, drop" in capsys.readouterr().err


def test_a_dry_run_says_what_the_run_then_does_and_writes_nothing(run, capsys):
    assert verb.pack(str(run), "p", 4, ray="off", dry_run=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert not (run / "packed").exists()
    verb.pack(str(run), "p", 4, ray="off")
    done = json.loads((run / "packed/p/dataset.json").read_text())
    assert said.pop("bytes") > 0
    assert said == {
        "num_chosen": 14,
        "num_batches": done["num_batches"],
        "batches": dict(sorted(Counter(f"{b['bucket_height']}x{b['bucket_width']}" for b in done["batches"]).items())),
        "num_padding": done["num_padding"],
        "num_remainder": 0,
    }


def test_packing_again_after_a_small_change_decodes_only_the_new_images_and_equals_packing_from_nothing(run, capsys, monkeypatch):
    decoded = []
    monkeypatch.setattr(pieces, "cut", lambda encoded, chosen, cut=pieces.cut: decoded.append(chosen["key"]) or cut(encoded, chosen))
    choose(run, [i for i in range(14) if i not in (5, 8)])
    assert verb.pack(str(run), "p", 4, ray="off", keep_pieces=True) == 0
    assert len(decoded) == 12
    decoded.clear()
    choose(run, [i for i in range(14) if i not in (2, 8)])
    with pytest.raises(ValueError, match="Or give --repack"):
        verb.pack(str(run), "p", 4, ray="off")
    assert verb.pack(str(run), "p", 4, ray="off", repack=True, keep_pieces=True) == 0
    assert decoded == ["05.png"]
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["images_now"], said["reused"]) == (1, 7), "of the two shards that changed"
    again = packed_bytes(run)
    shutil.rmtree(run / "packed")
    assert verb.pack(str(run), "p", 4, ray="off") == 0
    assert packed_bytes(run) == again


def test_another_seed_or_batch_size_decodes_nothing_again(run, monkeypatch):
    assert verb.pack(str(run), "p", 4, ray="off", keep_pieces=True) == 0
    monkeypatch.setattr(pieces, "cut", lambda *image: pytest.fail("decoded again"))
    assert verb.pack(str(run), "p", 3, seed=7, ray="off", repack=True, keep_pieces=True) == 0
    monkeypatch.undo()
    again = packed_bytes(run)
    shutil.rmtree(run / "packed")
    assert verb.pack(str(run), "p", 3, seed=7, ray="off") == 0
    assert packed_bytes(run) == again


@pytest.mark.ray
def test_the_bytes_do_not_depend_on_who_packs(run, ray_cluster):
    assert verb.pack(str(run), "p", 4, ray="off") == 0
    alone = packed_bytes(run)
    shutil.rmtree(run / "packed")
    assert verb.pack(str(run), "p", 4, workers=2) == 0
    assert packed_bytes(run) == alone


def test_training_reads_no_padding_unless_it_asks_for_equal_shapes(run, tmp_path):
    assert verb.pack(str(run), "p", 4, ray="off") == 0
    packed = Packed(run / "packed/p")
    read = [packed.read(group) for group in packed.groups]
    assert sorted(len(batch.uids) for batch in read) == [1, 1, 4, 4, 4]
    whole = [packed.read(group, padding=True) for group in packed.groups]
    assert all(batch.images.shape[0] == 4 for batch in whole)
    assert all(full.uids[: len(real.uids)] == real.uids for full, real in zip(whole, read, strict=True))
    save_file(fit_pca(to_pixels(batch.images) for batch in read).tensors(), tmp_path / "vae.safetensors")
    assert verb.pack(str(run), "p", 4, ray="off", latents=str(tmp_path / "vae.safetensors")) == 0
    assert [len(packed.latents(group)) for group in packed.groups] == [len(batch.uids) for batch in read]


def test_captions_and_images_of_the_buckets_size_come_out_byte_for_byte(tmp_path):
    """A tar with captions that are easy to spoil, JPEGs that are packed as they are, and those that may not be."""
    square = photographs(1, 32)[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    images = {
        "plain": encode(square, quality=40),
        "progressive": encode(square, quality=60, progressive=True, subsampling=2),
        "turned": encode(square, quality=90, exif=exif),
        "profile": encode(square, quality=90, icc_profile=profile),
        "grey": encode(square[..., 0], quality=90),
        "png": encode(square, "PNG"),
        "larger": encode(photographs(1, 64)[0]),
    }
    captions = [
        "tabs\tand  two spaces",
        "Привет, 世界 🎨",
        '"; DROP TABLE x; --',
        "<b>&amp;</b>\\n",
        "line\none",
        "e\u0301 is not é",
        "a\u200bb\ufeff",
    ]
    texts = dict(zip(images, captions, strict=True))
    suffix = {name: "png" if name == "png" else "jpg" for name in images}
    others = {name: [f"{text}, short", f"long {text}"] for name, text in texts.items()}
    files = [
        (f"{name}.{end}", content)
        for name in images
        for end, content in (
            (suffix[name], images[name]),
            ("txt", texts[name].encode()),
            ("json", json.dumps({"captions": others[name]}).encode()),
        )
    ]
    (tmp_path / "source").mkdir()
    tar_of(files, tmp_path / "source/a.tar")
    save_listing(list_shards(str(tmp_path / "source")), str(tmp_path))
    sizes = [64 if name == "larger" else 32 for name in images]
    columns = {name: pa.array(values, pa.int32()) for name, values in place(sizes, sizes, 32)._asdict().items()}
    facts = {"uid": [f"a/{name}" for name in images], "shard": ["a"] * len(images), "key": list(images)}
    write_table(pa.table(facts | columns).select(SELECTION.names).cast(SELECTION), tmp_path / "selection/p.parquet", "made")
    write_json({"resolution": 32}, tmp_path / "selection/p.funnel.json")
    assert verb.pack(str(tmp_path), "p", 4, ray="off") == 0
    rows = {row["key"]: row for row in packed_rows(tmp_path)}
    assert {name: row["caption"] for name, row in rows.items()} == texts
    assert {name: row["other_captions"] for name, row in rows.items()} == others
    assert {name for name, row in rows.items() if row["image"] == images[name]} == {"plain", "progressive"}
    assert all(Image.open(io.BytesIO(row["image"])).size == (32, 32) for row in rows.values())


def test_an_image_that_broke_after_it_was_chosen_is_named_and_the_others_are_packed(run, capsys):
    (run / "pictures/03.png").write_bytes(b"gone")
    save_listing(list_shards(str(run / "pictures"), 5), str(run))  # as if it had been so when the source was listed
    assert verb.pack(str(run), "p", 4, ray="off") == 1
    assert "03.png was chosen but cannot be packed: not an image" in capsys.readouterr().err
    assert len(packed_rows(run)) == 13
    assert verb.pack(str(run), "p", 4, ray="off") == 1, "the loss is not forgotten when the command runs again"


def test_an_image_that_became_smaller_after_it_was_chosen_is_named_too(run, capsys):
    (run / "pictures/04.png").write_bytes(encode(np.zeros((40, 40, 3), np.uint8), "PNG"))
    save_listing(list_shards(str(run / "pictures"), 5), str(run))
    assert verb.pack(str(run), "p", 4, ray="off") == 1
    assert "04.png was chosen but cannot be packed: the image is 40x40 now" in capsys.readouterr().err
    assert len(packed_rows(run)) == 13


def test_a_missing_selection_says_which_command_makes_it(run):
    with pytest.raises(ValueError, match="k2 filter"):
        verb.pack(str(run), "q")
