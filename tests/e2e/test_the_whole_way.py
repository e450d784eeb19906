"""From a folder of pictures to a trained nano K2 and a report, through the command line, on a heap with known troubles in it."""

import json
from pathlib import Path

import duckdb
import numpy as np
import pytest
from conftest import encode
from skimage import data

from curation.faults import FAULTS
from pipelines import cli

RECIPE = """
from dataclasses import replace
from pipelines.train_recipes import k2_nano

whole = k2_nano()
steps = {"256": 3, "512": 2, "1024": 1}
phases = tuple(replace(p, steps=steps[p.name], warmup=1, decay=0, num_samples=1) for p in whole.phases)
tiny = replace(whole, name="tiny", sample_steps=2, phases=phases)
"""


@pytest.fixture(scope="module")
def heap(tmp_path_factory) -> Path:
    """Crops of real photographs of 300 to 1200 px, and one planted fault of each kind."""
    folder = tmp_path_factory.mktemp("heap") / "pictures"
    folder.mkdir()
    crops = []
    for name, picture in (("astronaut", data.astronaut()), ("coffee", data.coffee()), ("hubble", data.hubble_deep_field())):
        for i in range(4):
            side = (300, 330, 360, 390)[i]
            top, left = (40 * i) % (picture.shape[0] - side), (60 * i) % (picture.shape[1] - side)
            crops.append((f"{name}_{i}", picture[top : top + side, left : left + side]))
    crops.append(("hubble_whole", np.repeat(np.repeat(data.hubble_deep_field(), 2, 0), 2, 1)[:1300, :1100]))
    rng = np.random.default_rng(0)
    for name, crop in crops:
        content = encode(np.ascontiguousarray(crop), quality=92)
        (folder / f"{name}.jpg").write_bytes(content)
    for fault in ("truncated", "exact_copy"):
        (folder / f"planted_{fault}.jpg").write_bytes(FAULTS[fault].plant((folder / "coffee_1.jpg").read_bytes(), rng))
    return folder


def k2(*argv: str) -> None:
    assert cli.main(list(argv)) == 0, argv


@pytest.fixture(scope="module")
def run(heap, tmp_path_factory) -> Path:
    """Every verb in turn, as a user types them."""
    run = tmp_path_factory.mktemp("whole") / "run"
    recipe = run.parent / "mine.py"
    recipe.write_text(RECIPE)
    k2("annotate", "--source", str(heap), "--out", str(run), "--recipe", "offline", "--ray", "off", "--shard-size", "6")
    k2("dedup", "--run", str(run))
    for size, batch in ((256, 4), (512, 2), (1024, 1)):
        k2("filter", "--run", str(run), "--policy", f"pretrain_{size}")
        k2("pack", "--run", str(run), "--policy", f"pretrain_{size}", "--batch-size", str(batch))
    k2("train", "--recipe", f"{recipe}:tiny", "--data", str(run))
    k2("report", "--run", str(run))
    return run


def test_every_image_is_in_every_annotation(run, heap):
    files = len(list(heap.iterdir()))
    for stage in ("basics", "effnet", "compact", "synthetic", "artifacts", "duplicates"):
        rows, uids = duckdb.sql(f"SELECT count(*), count(DISTINCT uid) FROM '{run}/annotations/{stage}/*.parquet'").fetchall()[0]
        assert rows == uids == files, stage


def test_the_funnel_accounts_for_every_image(run, heap):
    for size in (256, 512, 1024):
        funnel = json.loads((run / f"selection/pretrain_{size}.funnel.json").read_text())
        kept = duckdb.sql(f"SELECT count(*) FROM '{run}/selection/pretrain_{size}.parquet'").fetchall()[0][0]
        assert funnel["num_images"] == len(list(heap.iterdir())) and funnel["num_kept"] == kept == funnel["rules"][-1]["kept_so_far"]
        assert funnel["num_errors"] == 1


def test_the_broken_file_and_one_of_two_equal_files_are_not_kept(run):
    kept = {uid.rpartition("/")[2] for (uid,) in duckdb.sql(f"SELECT uid FROM '{run}/selection/pretrain_256.parquet'").fetchall()}
    assert "planted_truncated.jpg" not in kept
    assert not {"planted_exact_copy.jpg", "coffee_1.jpg"} <= kept


def test_what_was_selected_is_what_was_packed_and_what_was_trained_on(run):
    selected = {uid for (uid,) in duckdb.sql(f"SELECT uid FROM '{run}/selection/pretrain_256.parquet'").fetchall()}
    packed = [uid for (uid,) in duckdb.sql(f"SELECT uid FROM '{run}/packed/pretrain_256/*.parquet' WHERE NOT padding").fetchall()]
    assert sorted(packed) == sorted(selected) and len(packed) >= 4
    metrics = [json.loads(line) for line in (run / "train/tiny/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(1, len(metrics) + 1)) and metrics[0]["resolution"] == 256
    assert all(np.isfinite(row["loss"]) for row in metrics)
    assert (run / "train/tiny/loss.png").exists() and list((run / "train/tiny/samples").glob("*.png"))


def test_every_command_run_again_changes_nothing(run, heap, tmp_path):
    def state() -> dict[str, bytes]:
        places = ("annotations", "selection", "packed", "train")
        return {str(p.relative_to(run)): p.read_bytes() for place in places for p in (run / place).rglob("*") if p.is_file()}

    before = state()
    k2("annotate", "--source", str(heap), "--out", str(run), "--recipe", "offline", "--ray", "off", "--shard-size", "6")
    k2("dedup", "--run", str(run))
    k2("filter", "--run", str(run), "--policy", "pretrain_256")
    k2("pack", "--run", str(run), "--policy", "pretrain_256", "--batch-size", "4")
    k2("train", "--recipe", f"{run.parent}/mine.py:tiny", "--data", str(run))
    assert state() == before


def test_the_report_is_one_page_that_names_the_rules(run):
    page = (run / "report.html").read_text().replace("<wbr>", "")  # where long names may break
    assert "pretrain_1024" in page and "not_duplicate" in page and "planted_truncated" in page
    assert 'src="http' not in page and "<link" not in page
