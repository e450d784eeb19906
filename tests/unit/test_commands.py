"""The command line: verbs, exit codes and what an error says."""

import json
import subprocess
import sys

import pytest

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


def test_an_unreadable_tar_is_a_failed_shard_and_the_others_are_done(tmp_path, tiny_tars, capsys):
    for tar in tiny_tars.glob("*.tar"):
        (tmp_path / tar.name).write_bytes(tar.read_bytes())
    (tmp_path / "00001.tar").write_bytes(b"not a tar at all" * 100)
    assert annotate(f"{tmp_path}/*.tar", str(tmp_path / "run"), "basics", ray="off") == 1
    assert json.loads(capsys.readouterr().out)["failed"] == ["00001"]
    assert sorted(p.name for p in (tmp_path / "run/annotations/basics").iterdir()) == ["00000.parquet", "00002.parquet"]
    (tmp_path / "00001.tar").write_bytes((tiny_tars / "00001.tar").read_bytes())
    assert annotate(f"{tmp_path}/*.tar", str(tmp_path / "run"), "basics", ray="off") == 0
    assert json.loads(capsys.readouterr().out)["done_now"] == 1


def test_too_many_broken_images_end_with_1(tmp_path, tiny_folder):
    assert annotate(str(tiny_folder), str(tmp_path), "basics", ray="off", max_bad=0.05) == 1


def test_a_changed_source_is_refused_with_the_shard_that_differs(tmp_path, tiny_folder, capsys):
    assert k2("annotate", "--source", str(tiny_folder), "--out", str(tmp_path), "--recipe", "basics", "--ray", "off") == 0
    assert k2("annotate", "--source", str(tiny_folder), "--out", str(tmp_path), "--recipe", "basics", "--shard-size", "10") == 2
    assert "made by another description:\n  shards.pictures-00000" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path, tiny_folder, capsys):
    assert annotate(str(tiny_folder), str(tmp_path / "run"), "basics", dry_run=True) == 0
    assert json.loads(capsys.readouterr().out) == {"shards": 1, "missing": 1, "stages": ["basics", "provenance"]}
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
