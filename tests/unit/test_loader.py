"""Decoding ahead: what it holds, where its errors come out, that it stops; and latents in place of images."""

import io
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from packed_world import landscapes, make_packed
from PIL import Image

from curation.schema import LATENTS, PACKED
from curation.shards import write_row_groups
from k2model import data
from k2model.data import Packed, decode_into
from k2model.loader import Loader
from k2model.order import Order

SIZES = [(32, 32), (32, 48)]


@pytest.fixture
def place(tmp_path) -> Path:
    return make_packed(tmp_path / "packed/p", landscapes(24, SIZES), 32, 3)


@pytest.fixture
def order(place) -> Order:
    return Order([Packed(place)], [1], 2, 0)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("k2-")]


def rewrite(path: Path, change, schema: pa.Schema = PACKED) -> None:
    """Change the rows of every row group of a file: change(row group, rows)."""
    file = pq.ParquetFile(path)
    tables = [change(i, file.read_row_group(i).to_pylist()) for i in range(file.num_row_groups)]
    with pq.ParquetWriter(path, schema) as writer:
        for rows in tables:
            writer.write_table(pa.Table.from_pylist(rows, schema))


def write_latents(place: Path, uid_of=lambda uid: uid, change=lambda latent: latent, **form) -> None:
    """Latents whose values name their image; as `k2 pack --latents` writes them, or in another form of Parquet."""
    packed = Packed(place)
    (place / "latents").mkdir()
    for name in {group["file"] for group in packed.groups}:
        tables = []
        for group in (group for group in packed.groups if group["file"] == name):
            uids = packed.table(group, ["uid"])["uid"].to_pylist()
            shape = (16, group["bucket_height"] // 8, group["bucket_width"] // 8)
            values = [change(np.full(shape, int(uid[-3:]), "<f2").tobytes()) for uid in uids]
            tables.append(pa.table([pa.array(map(uid_of, uids)), pa.array(values, pa.binary())], schema=LATENTS))
        if not form:
            write_row_groups(tables, place / "latents" / name, LATENTS, "x", plain=True)
            continue
        with pq.ParquetWriter(place / "latents" / name, LATENTS, **form) as writer:
            for table in tables:
                writer.write_table(table)


def test_a_broken_image_is_an_error_at_its_own_global_batch(order, place):
    bad = order.batch(3)[1]
    described = order.describe(bad)

    def cut(row_group, rows):
        if row_group == described["row_group"]:
            rows[1]["image"] = rows[1]["image"][:200]
        return rows

    uid = order.sets[0].read(described).uids[1]
    rewrite(place / described["file"], cut)
    order = Order([Packed(place)], [1], 2, 0)
    with Loader(order, ahead=4, threads=2) as loader:
        assert [i for _, i in islice(loader, 3)] == [0, 1, 2]
        with pytest.raises(ValueError, match=rf"{described['file']} row group {described['row_group']} row 1 \({uid}\).*Pack again"):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)


def test_an_image_of_another_size_than_its_bucket_is_refused(order, place):
    def shrink(_, rows):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16)).save(buffer, "JPEG")
        return [row | {"image": buffer.getvalue()} for row in rows]

    for name in {group["file"] for group in order.sets[0].groups}:
        rewrite(place / name, shrink)
    with (
        Loader(Order([Packed(place)], [1], 2, 0)) as loader,
        pytest.raises(ValueError, match=r"is an image of \(16, 16\), but .* says \(32"),
    ):
        next(loader)


def test_a_file_that_is_gone_is_named(order, place):
    for path in place.glob("*.parquet"):
        path.unlink()
    with Loader(order) as loader, pytest.raises(ValueError, match=r"000\d+.parquet row group \d cannot be read: FileNotFoundError"):
        next(loader)


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_is_begun_than_the_global_batches_ahead(order, ahead, monkeypatch):
    begun, read = set(), Packed.table
    lock = threading.Lock()

    def table(self, group, columns):
        with lock:
            begun.add((group["file"], group["row_group"]))
        return read(self, group, columns)

    monkeypatch.setattr(Packed, "table", table)
    order = Order(order.sets, [1], 1, 0)  # its first 8 global batches are 8 row groups
    with Loader(order, ahead=ahead, threads=1) as loader:
        next(loader)
        next(loader)
    assert len(begun) <= 2 + ahead
    monkeypatch.undo()
    assert len(order.sets[0]) >= 6, "else the bound could not be broken"


def test_nothing_before_the_start_is_read(order, monkeypatch):
    begun, read = [], Packed.table

    def table(self, group, columns):
        begun.append((group["file"], group["row_group"]))
        return read(self, group, columns)

    monkeypatch.setattr(Packed, "table", table)
    with Loader(order, start=7, ahead=1) as loader:
        next(loader)
    wanted = [order.describe(group) for i in (7, 8) for group in order.batch(i)]
    assert set(begun) <= {(group["file"], group["row_group"]) for group in wanted}


def test_a_loader_that_is_left_early_stops_its_threads(order):
    loader = Loader(order, ahead=4, threads=3)
    next(loader)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("k2-")]
    loader.close()
    assert list(loader) == []


def test_the_seconds_of_waiting_are_counted(order, monkeypatch):
    free, decode = threading.Event(), Packed.decode

    def held(self, *given):
        assert free.wait(60)
        return decode(self, *given)

    monkeypatch.setattr(Packed, "decode", held)
    with Loader(order, threads=1) as loader:
        timer = threading.Timer(0.1, free.set)
        timer.start()
        next(loader)
        timer.join()
        waited = loader.waited
        assert waited > 0.03
        next(loader)
        assert loader.waited > waited


def test_latents_are_read_in_place_of_images_and_no_image_is_decoded(order, place, monkeypatch):
    write_latents(place)
    monkeypatch.setattr(Packed, "decode", None)
    with Loader(order, world=4, rank=3, latents=True) as loader:
        for parts, i in islice(loader, 6):
            (expected,) = order.share(i, 3, 4)
            (part,) = parts
            assert part.images is None and part.latents.dtype == torch.float16
            assert tuple(part.latents.shape) == (len(expected.rows), 16, part.bucket[0] // 8, part.bucket[1] // 8)
            assert [int(latent.unique()) for latent in part.latents] == [int(uid[-3:]) for uid in part.uids]
            assert part.num_valid == expected.num_valid


FORMS = {
    "plain": {},
    "zstd": {"compression": "zstd", "use_dictionary": False},
    "dictionary": {"compression": "none"},
    "a page per row": {"compression": "none", "use_dictionary": False, "write_batch_size": 1, "data_page_size": 1},
    "pages of version 2": {"compression": "none", "use_dictionary": False, "data_page_version": "2.0"},
    "delta": {"compression": "none", "use_dictionary": False, "column_encoding": {"latent": "DELTA_BYTE_ARRAY"}},
}


@pytest.mark.parametrize("form", FORMS)
def test_latents_of_every_form_of_parquet_are_read(place, form):
    write_latents(place, **FORMS[form])
    packed = Packed(place)
    for group in packed.groups:
        uids = packed.table(group, ["uid"])["uid"].to_pylist()
        latents = packed.latents(group)
        assert latents.shape == (group["num_rows"], 16, group["bucket_height"] // 8, group["bucket_width"] // 8)
        assert [latent.unique().tolist() for latent in latents] == [[int(uid[-3:])] for uid in uids[: group["num_rows"]]]


def test_what_k2_pack_writes_is_read_without_arrow(place, monkeypatch):
    write_latents(place)
    packed = Packed(place)
    group = packed.groups[0]
    packed._file(f"latents/{group['file']}", LATENTS)
    monkeypatch.setattr(Packed, "_read", None)
    assert packed.latents(group).shape[0] == group["num_rows"]


def test_latents_of_another_packing_are_refused(order, place):
    write_latents(place, lambda uid: f"old-{uid}")
    with Loader(order, latents=True) as loader, pytest.raises(ValueError, match="latents of other images than are packed"):
        next(loader)


@pytest.mark.parametrize("form", ["plain", "zstd"])
def test_latents_of_another_size_are_refused(place, form):
    write_latents(place, change=lambda latent: latent[:-2], **FORMS[form])
    packed = Packed(place)
    with pytest.raises(ValueError, match=r"has latents of \[510\] bytes, and float16 \(16, 4, 4\) has 512"):
        packed.latents(packed.groups[0])


def test_latents_that_were_not_made_say_what_to_run(order):
    with Loader(order, latents=True) as loader, pytest.raises(ValueError, match="k2 pack --latents"):
        next(loader)


def test_a_phase_ends_where_its_last_global_batch_is(order, monkeypatch):
    begun, share = [], order.share
    monkeypatch.setattr(order, "share", lambda i, *given: (begun.append(i), share(i, *given))[1])
    with Loader(order, start=3, stop=6, ahead=4) as loader:
        assert [i for _, i in loader] == [3, 4, 5] == begun


def test_wrong_numbers_are_refused_at_once(order):
    for wrong in ({"ahead": 0}, {"threads": 0}, {"start": -1}, {"rank": 2, "world": 2}):
        with pytest.raises(ValueError, match="ahead and threads 1 or more"):
            Loader(order, **wrong)
    with pytest.raises(ValueError, match="3 data-parallel ranks"):
        Loader(order, 0, 3)


@pytest.mark.parametrize("form", ["JPEG 444", "JPEG 420", "JPEG progressive", "JPEG gray", "JPEG CMYK", "PNG", "PNG alpha", "WEBP"])
def test_every_form_of_image_has_pillows_pixels(form):
    pixels = landscapes(1, [(48, 40)])[0][2]
    kind, _, variant = form.partition(" ")
    mode = {"gray": "L", "CMYK": "CMYK", "alpha": "RGBA"}.get(variant, "RGB")
    options = {"444": {"subsampling": 0}, "420": {"subsampling": 2}, "progressive": {"progressive": True}}.get(variant, {})
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    found = np.zeros((48, 40, 3), np.uint8)
    assert decode_into(memoryview(buffer.getvalue()), found) == (48, 40)
    assert np.array_equal(found, np.asarray(Image.open(buffer).convert("RGB")))


@pytest.mark.parametrize("latents", [False, True])
def test_a_packed_set_of_an_object_store_is_read_as_one_of_the_disk(order, place, latents):
    write_latents(place)
    store = fsspec.filesystem("memory")
    store.put(str(place), "/bucket/p", recursive=True)
    try:
        far = Order([Packed("memory://bucket/p")], [1], 2, 0)
        with Loader(order, latents=latents, stop=5) as near, Loader(far, latents=latents, stop=5, threads=2) as other:
            for (parts, i), (same, j) in zip(near, other, strict=True):
                assert i == j
                for one, two in zip(parts, same, strict=True):
                    assert torch.equal(one.latents if latents else one.images, two.latents if latents else two.images)
                    assert (one.uids, one.captions) == (two.uids, two.captions)
    finally:
        store.rm("/bucket", recursive=True)


def test_few_files_stay_open_and_a_closed_one_is_opened_again(place, monkeypatch):
    monkeypatch.setattr(data, "OPEN_FILES", 1)
    packed, other = Packed(place), Packed(place)
    for group in [*packed.groups, *packed.groups]:
        assert packed.read(group).uids == other.read(group).uids
        assert len(packed._files) == 1
