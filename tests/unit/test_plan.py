"""`k2 plan`: rates from a run or a probe, and what is said when a figure is missing."""

import json

import pytest
from conftest import encode, photographs

from pipelines import cli
from pipelines.annotate import annotate
from pipelines.cost import Cluster, Rates, cost, text

BASE = {"shard": "a", "stages": ["basics", "siglip"], "rows": 100, "bad": 0}


def k2(*argv: str) -> int:
    return cli.main(["plan", *argv])


@pytest.fixture
def recorded(tmp_path):
    """A run folder with a report of two shards, as a run on a machine with a GPU leaves it; the second shard needed only one stage."""
    run = tmp_path / "run"
    run.mkdir()
    first = BASE | {"seconds": {"read": 1.0, "decode": 2.0, "basics": 3.0, "siglip": 5.0, "write": 0.5, "wait": 9.0}}
    second = BASE | {"shard": "b", "stages": ["basics"], "rows": 300, "seconds": {"read": 1.0, "decode": 2.0, "basics": 9.0, "write": 0.5}}
    failed = {"shard": "c", "error": "OSError: gone"}
    (run / "report.jsonl").write_text("\n".join(map(json.dumps, (first, second, failed))) + "\n")
    stages = {
        "basics": {"description": {"class": "Basics"}},
        "siglip": {"description": {"class": "Embedding", "tower": {"class": "Siglip"}}},
    }
    (run / "run.json").write_text(json.dumps({"description": {"stages": stages}}))
    return run


def planned(capsys, *argv: str) -> dict:
    assert k2(*argv) == 0
    return json.loads(capsys.readouterr().out)


def test_rates_are_seconds_per_row_of_the_shards_that_ran_a_part_and_waiting_is_no_work(recorded, capsys):
    found = planned(capsys, "--images", "3_600_000", "--run", str(recorded))
    hours = {"read": 2 / 400, "decode": 4 / 400, "basics": 12 / 400, "siglip": 5 / 100, "write": 1 / 400}
    assert found["core_hours"] == pytest.approx({name: 1000 * value for name, value in hours.items()} | {"total": 97.5})
    assert found["gpu_hours"] == {"total": 0} and found["wall_hours"] is None and "wait" not in found["core_hours"]
    assert found["measured_on"] == {"images": 400, "shards": 2, "stages": ["basics", "siglip"]}


def test_a_gpu_rate_moves_a_stage_from_cores_to_gpus_and_the_bottleneck_is_named(recorded, capsys):
    machine = ["--cpus", "50", "--gpus", "1", "--nodes", "2", "--cpu-hour-price", "0.1", "--gpu-hour-price", "2"]
    found = planned(capsys, "--images", "3_600_000", "--run", str(recorded), "--gpu-rate", "siglip=100", *machine)
    assert found["gpu_hours"] == pytest.approx({"siglip": 10, "total": 10}) and "siglip" not in found["core_hours"]
    assert (found["bottleneck"], found["wall_hours"]) == ("gpu", pytest.approx(5))
    assert found["money"] == pytest.approx(5 * (100 * 0.1 + 2 * 2))
    found = planned(capsys, "--images", "3_600_000", "--run", str(recorded), "--gpu-rate", "siglip=measured", "--cpus", "1", "--gpus", "1")
    assert found["gpu_hours"]["siglip"] == pytest.approx(50) and found["wall_hours"] == pytest.approx(50) and found["bottleneck"] == "gpu"


def test_a_gpu_rate_is_never_invented(recorded, capsys):
    assert k2("--images", "1000", "--run", str(recorded), "--cpus", "8", "--gpus", "1") == 0
    out, shown = capsys.readouterr()
    found = json.loads(out)
    assert found["gpu_hours"] == {"siglip": None, "total": None} and found["wall_hours"] is found["bottleneck"] is None
    assert "--gpu-rate siglip=IMAGES_PER_S_OF_ONE_GPU" in found["missing"] and "unknown" in shown and "assumed:" in shown


def test_a_stage_on_a_tower_whose_rate_is_given_needs_no_rate_of_its_own(recorded, capsys):
    description = json.loads((recorded / "run.json").read_text())
    stages = description["description"]["stages"]
    stages["artifacts"] = {"description": {"tower": {"class": "Siglip"}}}
    (recorded / "run.json").write_text(json.dumps(description))
    line = BASE | {"stages": ["artifacts"], "seconds": {"artifacts": 1.0}}
    with open(recorded / "report.jsonl", "a") as report:
        report.write(json.dumps(line) + "\n")
    found = planned(capsys, "--images", "100", "--run", str(recorded), "--gpu-rate", "siglip=10", "--cpus", "1", "--gpus", "1")
    assert found["wall_hours"] is not None and "artifacts" in found["core_hours"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "say where the rates come from"),
        (["--run", "{run}", "--source", "x", "--probe", "3"], "say where the rates come from"),
        (["--source", "{run}"], "needs --probe N"),
        (["--run", "{tmp}/none"], "has no finished shard; run `k2 annotate"),
        (["--run", "{run}", "--gpu-rate", "clip=5"], "the measured stages are basics, siglip"),
        (["--run", "{run}", "--gpu-rate", "siglip=fast"], "write STAGE=IMAGES_PER_S"),
        (["--run", "{run}", "--gpu-rate", "siglip=0"], "write STAGE=IMAGES_PER_S"),
        (["--run", "{run}", "--keep", "30"], "--keep must be a share from 0 to 1"),
        (["--run", "{run}", "--nodes", "0"], "--nodes must be 1 or more"),
        (["--run", "{run}", "--read-mb-per-s", "0"], "--read-mb-per-s must be over 0"),
        (["--run", "{run}", "--cpu-hour-price", "nan"], "--cpu-hour-price must be 0 or more"),
    ],
)
def test_a_wrong_or_missing_setting_exits_with_2_and_says_what_to_do(recorded, tmp_path, capsys, argv, message):
    argv = [word.format(run=recorded, tmp=tmp_path) for word in argv]
    assert k2("--images", "10", *argv) == 2
    assert message in capsys.readouterr().err


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="--images must be 1 or more; got 0"):
        cost(0, Rates({"read": 1.0}), Cluster())


def test_a_probe_annotates_some_images_and_leaves_nothing_behind(tmp_path, tiny_tars, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = planned(
        capsys,
        *("--images", "1000", "--source", f"{tiny_tars}/*.tar", "--probe", "12", "--recipe", "basics"),
        *("--resolutions", "64", "256", "--keep", "0.5", "--cpus", "4", "--read-mb-per-s", "100"),
    )
    assert found["measured_on"]["images"] == 12 and {"read", "decode", "write", "basics", "provenance", "total"} <= set(found["core_hours"])
    assert found["table_bytes"]["basics"] > 1000 * 60 and found["source_bytes"] > 1000 * 500
    # 80 x 80 photographs fill a bucket of 64 px, and none of 256 px.
    assert set(found["packed"]) == {"64 px"} and found["packed"]["64 px"]["bytes"] == found["packed"]["64 px"]["image_bytes"] * 500
    assert found["bottleneck"] == "cpu" and found["missing"] == [] and list(tmp_path.iterdir()) == []


def test_a_run_is_planned_from_its_own_files(tmp_path, capsys):
    folder, run = tmp_path / "pictures", tmp_path / "run"
    folder.mkdir()
    sizes = []
    for i, crop in enumerate(photographs(6)):
        (folder / f"{i}.jpg").write_bytes(encode(crop))
        sizes.append((folder / f"{i}.jpg").stat().st_size)
    assert annotate(str(folder), str(run), "basics", ray="off") == 0
    packed = run / "packed" / "mine"
    packed.mkdir(parents=True)
    (packed / "00000.parquet").write_bytes(bytes(3000))
    (packed / "dataset.json").write_text('{"num_rows": 3}')
    (run / "selection").mkdir()
    (run / "selection" / "mine.funnel.json").write_text('{"num_images": 6}')
    capsys.readouterr()
    found = planned(capsys, "--images", "6", "--run", str(run))
    assert found["source_bytes"] == pytest.approx(sum(sizes))
    assert found["packed"] == {"mine": {"image_bytes": 1000, "kept": 0.5, "bytes": 3000}}


def test_figures_for_people():
    shown = [text(None), text(0.0), text(1234567.0), text(3.14159, "h"), text(999, "B"), text(1.5e9, "B"), text(2e18, "B")]
    assert shown == ["unknown", "0", "1,234,567", "3.14 h", "999 B", "1.5 GB", "2,000 PB"]
