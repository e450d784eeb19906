"""Sources under made-up input: rows in = rows out, and the WebDataset grouping of the reference implementation."""

import tempfile
from pathlib import Path

import webdataset
from conftest import encode, photographs, tar_of
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.annotate import annotate_shard, annotation_path
from curation.sources import list_shards, read_samples
from curation.stages.basics import Basics

PICTURE = encode(photographs(1, 16)[0])
KEYS = st.from_regex(r"[a-z0-9]{1,6}(\.x)?(/[a-z0-9]{1,5})?", fullmatch=True).map(lambda key: key.replace(".x/", "-/").removesuffix(".x"))


@given(st.lists(KEYS, min_size=1, max_size=12, unique=True))
@settings(max_examples=40, deadline=None)
def test_a_tar_gives_the_same_samples_as_the_webdataset_package(keys):
    with tempfile.TemporaryDirectory() as folder:
        files = [(f"{key}.{suffix}", content) for key in keys for suffix, content in (("jpg", PICTURE), ("txt", key.encode()))]
        path = tar_of(files, Path(folder) / "s.tar")
        ours = [
            (row["key"], row["image"], row["caption"]) for batch in read_samples(list_shards(str(path))[0]) for row in batch.to_pylist()
        ]
        theirs = webdataset.WebDataset(str(path), shardshuffle=False)
        assert ours == [(sample["__key__"], sample["jpg"], sample["txt"].decode()) for sample in theirs]


@given(st.lists(st.one_of(st.binary(max_size=200), st.just(PICTURE), st.integers(0, len(PICTURE)).map(lambda n: PICTURE[:n])), max_size=12))
@settings(max_examples=40, deadline=None)
def test_rows_in_are_rows_out_for_any_bytes(contents):
    with tempfile.TemporaryDirectory() as folder:
        path = tar_of([(f"{i}.jpg", content) for i, content in enumerate(contents)], Path(folder) / "s.tar")
        shard = list_shards(str(path))[0]
        report = annotate_shard(shard, (Basics(),), {Basics(): Basics().load("cpu")}, folder)
        assert report.rows == len(contents)
        assert Path(annotation_path(folder, "basics", "s")).exists()
