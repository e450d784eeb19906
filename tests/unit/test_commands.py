"""The command line: verbs, exit codes and what an error says."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from curation.sources import list_shards, save_listing
from pipelines import cli, recipes, run_folder
from pipelines.annotate import annotate


def k2(*argv: str) -> int:
    return cli.main(list(argv))


def test_help_lists_every_verb_and_an_unknown_verb_is_refused(capsys):
    assert k2("--help") == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in cli.VERBS)
    assert k2("anotate") == 2 and "choose from demo, annotate" in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        k2(verb, "--help")
    assert stop.value.code == 0 and len(capsys.readouterr().out) > 200


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("{tmp}/none/*.tar", [], "matches nothing"),
        ("{tmp}", [], "holds no image"),
        ("{world}", ["--recipe", "basic"], "did you mean 'basics'"),
        ("{world}", ["--recipe", "none.py:x"], "there is no file 'none.py'"),
    ],
)
def test_a_wrong_setting_exits_with_2_and_says_what_to_do(tmp_path, tiny_folder, capsys, source, more, message):
    source = source.format(tmp=tmp_path, world=tiny_folder)
    assert k2("annotate", "--source", source, "--out", str(tmp_path / "run"), *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_shard_that_cannot_be_read_is_tried_again_listed_and_done_by_the_next_run(tmp_path, tiny_tars, capsys):
    for tar in tiny_tars.glob("*.tar"):
        (tmp_path / tar.name).write_bytes(tar.read_bytes())
    source, run = f"{tmp_path}/*.tar", tmp_path / "run"
    save_listing(list_shards(source), str(run))
    away = (tmp_path / "00001.tar").rename(tmp_path / "away")
    for tries in (3, 6):
        assert annotate(source, str(run), "basics", ray="off") == 1
        assert json.loads(capsys.readouterr().out)["failed"] == ["00001"]
        (failed,) = pq.read_table(run / "failed_shards.parquet").to_pylist()
        assert (failed["shard"], failed["tries"]) == ("00001", tries) and "SourceChangedError" in failed["error"]
    assert sorted(p.name for p in (run / "annotations/basics").iterdir()) == ["00000.parquet", "00002.parquet"]
    away.rename(tmp_path / "00001.tar")
    assert annotate(source, str(run), "basics", ray="off") == 0
    assert json.loads(capsys.readouterr().out)["done_now"] == 1
    assert len(pq.read_table(run / "failed_shards.parquet")) == 0


def test_a_dry_run_tells_rows_bytes_and_seconds_from_the_shards_that_are_done(tmp_path, tiny_tars, capsys):
    source, run = f"{tiny_tars}/*.tar", tmp_path / "run"
    annotate(source, str(run), "basics", ray="off")
    for name in ("00001", "00002"):
        (run / f"annotations/basics/{name}.parquet").unlink()
    capsys.readouterr()
    annotate(source, str(run), "basics", ray="off", dry_run=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["missing"], told["missing_by_stage"], told["files_to_write"]) == (2, {"basics": 2}, 2)
    assert 12 <= told["rows"] <= 24 and told["workers_get"]["seconds"] > 0 and told["inference_gets"] == {"stages": [], "seconds": 0.0}
    assert told["bytes_to_write"] == 2 * (run / "annotations/basics/00000.parquet").stat().st_size


def test_files_that_were_added_to_a_source_are_found_when_it_is_listed_again(tmp_path, tiny_tars, capsys):
    source, run = f"{tmp_path}/*.tar", str(tmp_path / "run")
    for tar, relist, count in (("00000.tar", False, 1), ("00001.tar", False, 0), ("00002.tar", True, 2)):
        (tmp_path / tar).write_bytes((tiny_tars / tar).read_bytes())
        annotate(source, run, "basics", ray="off", relist=relist)
        assert json.loads(capsys.readouterr().out)["done_now"] == count


def test_too_many_broken_images_end_with_1(tmp_path, tiny_folder):
    assert annotate(str(tiny_folder), str(tmp_path), "basics", ray="off", max_bad=0.05) == 1


def test_a_changed_source_is_refused_with_the_shard_that_differs(tmp_path, tiny_folder, capsys):
    assert k2("annotate", "--source", str(tiny_folder), "--out", str(tmp_path), "--recipe", "basics", "--ray", "off") == 0
    assert k2("annotate", "--source", str(tiny_folder), "--out", str(tmp_path), "--recipe", "basics", "--shard-size", "10") == 2
    assert "made by another description:\n  shard_size: 256 -> 10" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path, tiny_folder, capsys):
    assert annotate(str(tiny_folder), str(tmp_path / "run"), "basics", dry_run=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["shards"], told["missing"], told["stages"], told["files_to_write"]) == (1, 1, ["basics", "provenance"], 2)
    assert told["bytes_to_read"] == sum(file.stat().st_size for file in tiny_folder.rglob("*") if file.suffix in (".jpg", ".png"))
    assert told["workers_get"]["stages"] == ["basics", "provenance"] and told["workers_get"]["seconds"] is None
    assert not (tmp_path / "run").exists()


def test_stages_may_be_added_to_a_run_and_may_not_change(tmp_path):
    run_folder.check_description(tmp_path, {"source": "s", "stages": {"a": 1}}, may_grow="stages")
    run_folder.check_description(tmp_path, {"source": "s", "stages": {"b": 2}}, may_grow="stages")
    assert json.loads((tmp_path / "run.json").read_text())["description"]["stages"] == {"a": 1, "b": 2}
    for changed in ({"source": "s", "stages": {"a": 9}}, {"source": "t", "stages": {"c": 3}}):
        with pytest.raises(ValueError, match="another description"):
            run_folder.check_description(tmp_path, changed, may_grow="stages")


def test_a_recipe_in_a_users_file_is_found(tmp_path):
    (tmp_path / "mine.py").write_text("from curation.stages.basics import Basics\nfast = (Basics(),)\n")
    assert [stage.name for stage in recipes.find(f"{tmp_path}/mine.py:fast", recipes.ANNOTATE)] == ["basics"]
    with pytest.raises(ValueError, match="has no 'slow'"):
        recipes.find(f"{tmp_path}/mine.py:slow", recipes.ANNOTATE)


def test_choosing_needs_no_torch():
    code = "import sys, pipelines.filter, pipelines.dedup, pipelines.pack; print('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
