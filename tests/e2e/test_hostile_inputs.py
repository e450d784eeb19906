"""Over four hundred broken and hostile files through the real command: every one is a row, and nothing that it says is obeyed."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.dataset as ds
import pytest
from conftest import tar_of
from hostile import CONTAINERS, SUFFIX, Hostile, clean, images

from curation.decode import decode_for

FACTS = ("--recipe", "basics", "--ray", "off", "--max-bad", "1")
MEMORY = 3 << 30  # address space beyond what an idle interpreter with our imports has; the largest allowed image has 600 MB of RGB
CAPTIONS = {
    "script": b"<script>document.title = 'owned'</script><img src=x onerror=alert(1)>",
    "sql": b"'; DROP TABLE basics; --",
    "template": b"{{ 7 * 7 }}{% for x in ().__class__.__mro__ %}{% endfor %}${7*7}",
    "terminal": b"\x1b[2J\x1b]0;owned\x07\x08\x08",
    "nul": b"before\x00after",
    "not_utf8": b"caf\xe9 \xff\xfe",
    "right_to_left": "\u202egpj.exe".encode(),
    "long": b"word " * 200_000,
    "path": b"../../../../etc/passwd",
}


@pytest.fixture(scope="module")
def corpus() -> list[Hostile]:
    found = images()
    assert len(found) >= 300
    return found


def k2(*arguments: str, home: Path) -> subprocess.CompletedProcess:
    """The command in its own process, which may not grow beyond MEMORY and may not ask the network."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))

    place = {**os.environ, "HOME": str(home), "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments], capture_output=True, text=True, preexec_fn=limited, env=place, cwd=Path.cwd()
    )


@pytest.fixture(scope="module")
def annotated(corpus, tmp_path_factory) -> Path:
    """A run over one tar of all files, each with one of the captions above beside it."""
    place = tmp_path_factory.mktemp("hostile")
    texts = list(CAPTIONS.values())
    files = []
    for i, file in enumerate(corpus):
        files += [(f"{i:04d}.{file.name.rpartition('.')[2]}", file.content), (f"{i:04d}.txt", texts[i % len(texts)])]
    (place / "source").mkdir()
    tar_of(files, place / "source" / "all.tar")
    done = k2("annotate", "--source", str(place / "source"), "--out", str(place / "run"), *FACTS, home=place)
    assert done.returncode == 0, done.stderr[-3000:]
    return place / "run"


def basics(run: Path) -> list[dict]:
    return ds.dataset(run / "annotations" / "basics").to_table().sort_by("uid").to_pylist()


def test_every_file_is_one_row_and_those_that_cannot_be_decoded_say_why(corpus, annotated):
    rows = basics(annotated)
    assert len(rows) == len(corpus)
    silent = [file.name for file, row in zip(corpus, rows, strict=True) if file.becomes == "error" and row["error"] is None]
    assert silent == []
    unclear = [row["error"] for row in rows if row["error"] is not None and not 10 <= len(row["error"]) <= 300]
    assert unclear == []


def test_what_decodes_has_the_pixels_of_the_whole_file(corpus):
    """Never other pixels without a word: a cut file is an error, or shows just what the whole file shows."""
    wanted = {container: decode_for(clean(container), "pixels").pixels for container in CONTAINERS}
    by_suffix = {SUFFIX.get(name, "jpg"): name for name in ("jpeg", "png")}
    wrong = []
    for file in corpus:
        if file.becomes != "same":
            continue
        named = [name for name in CONTAINERS if f"_{name}." in file.name]
        container = max(named, key=len) if named else by_suffix.get(file.name.rpartition(".")[2], "tiff")
        try:
            pixels = decode_for(file.content, "pixels").pixels
        except Exception as error:
            assert type(error).__name__ == "DecodeError", (file.name, error)
            continue
        if not np.array_equal(pixels, wanted[container]):
            wrong.append(file.name)
    assert wrong == []


def test_no_file_of_another_kind_is_taken_for_an_image(corpus, annotated):
    rows = basics(annotated)
    assert [row["error"] for file, row in zip(corpus, rows, strict=True) if file.name.startswith("not_") and row["error"] is None] == []
    assert not Path("/tmp/k2-was-here").exists()


def test_captions_pass_through_dedup_filter_and_report_as_text_and_nothing_else(corpus, annotated, tmp_path):
    policy = tmp_path / "everything.sql"
    policy.write_text("-- resolution: 64\nSELECT uid, error IS NULL AS decoded FROM basics")
    for command in (["dedup", "--run"], ["filter", "--policy", str(policy), "--run"], ["report", "--run"]):
        done = k2(*command, str(annotated), home=tmp_path)
        assert done.returncode == 0, (command, done.stderr[-3000:])
        assert "\x1b[2J" not in done.stdout + done.stderr
    page = (annotated / "report.html").read_text()
    assert "<script>document.title" not in page and "<img src=x" not in page
    assert duckdb.sql(f"SELECT count(*) FROM '{annotated}/annotations/basics/*.parquet'").fetchall() == [(len(corpus),)]
    texts = [text.decode("utf-8", "replace") for text in CAPTIONS.values()]
    assert [row["caption"] for row in basics(annotated)] == [texts[i % len(texts)] for i in range(len(corpus))]
    assert json.loads((annotated / "selection" / "everything.funnel.json").read_text())["num_images"] == len(corpus)
