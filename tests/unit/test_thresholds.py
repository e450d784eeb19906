"""explain, sweep and compare: what they say of thresholds is what the policy does with them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_policy import HEADER, write_run

from curation import plots
from curation.compare import compare
from curation.explain import explain
from curation.policy import Policy, decide
from curation.sweep import sweep
from pipelines import cli
from pipelines.filter import find

SQL = (
    HEADER + "SELECT uid, complexity <= 0.3 AND width > 9 AS plain, -- 4: too much\n"
    "  rgb_entropy >= 2.2 OR white_ratio + black_ratio > 0.4 AS not_banded, -- 3: banding\n"
    "  CASE WHEN jpeg_quality IS NOT NULL THEN NOT (jpeg_quality < 40) ELSE true END AS not_crushed, -- 3: blocks\n"
    "  width / height BETWEEN 0.5 AND 2 AS aspect_ok, -- 2: crop\n"
    "  duplicates.representative AS not_duplicate -- 1: copies\n"
    "FROM basics LEFT JOIN duplicates USING (uid)"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """60 images with values on both sides of every threshold, some unknown, two broken."""
    rng = np.random.default_rng(5)
    images: dict[str, dict] = {"broken_a": {"error": "truncated"}, "broken_b": {"error": "empty"}}
    for i in range(60):
        images[f"{i:02d}"] = {
            "complexity": None if i % 17 == 3 else float(rng.uniform(0.1, 0.5)),
            "rgb_entropy": float(rng.uniform(1, 4)),
            "white_ratio": float(rng.uniform(0, 0.5)),
            "jpeg_quality": None if i % 5 == 0 else int(rng.integers(20, 95)),
            "width": int(rng.integers(300, 2400)),
            "representative": bool(i % 7),
        }
    return write_run(tmp_path_factory.mktemp("thresholds"), images)


def kept(run: Path, sql: str) -> set[str]:
    decided = decide(run, Policy("p", sql), run)
    return set(decided.filter(decided["kept"])["uid"].to_pylist())


# --- explain ---


def test_every_rule_is_explained_with_its_values_wherever_they_stand(tmp_path):
    one = {"complexity": 0.45, "rgb_entropy": 1.5, "white_ratio": 0.5, "jpeg_quality": 30, "width": 900, "height": 300}
    found = explain(write_run(tmp_path, {"a": one, "b": {}}), Policy("p", SQL), "s/a", tmp_path)
    lines = {rule["rule"]: rule for rule in found["rules"]}
    assert {name: line["verdict"] for name, line in lines.items()} == {
        "plain": False,
        "not_banded": True,
        "not_crushed": False,
        "aspect_ok": False,
        "not_duplicate": True,
    }
    assert found["kept"] is False and found["error"] is None and lines["plain"]["comment"] == "4: too much"
    measured = {name: [(t["operator"], t["threshold"], t["holds"]) for t in line["terms"]] for name, line in lines.items()}
    assert measured["plain"] == [("<=", 0.3, False), (">", 9.0, True)]
    assert measured["not_banded"] == [(">=", 2.2, False), (">", 0.4, True)]
    assert measured["not_crushed"] == [("<", 40.0, True)]
    assert measured["aspect_ok"] == [(">=", 0.5, True), ("<=", 2.0, False)]
    assert lines["plain"]["terms"][0]["margin"] == pytest.approx(-0.15) and lines["aspect_ok"]["terms"][1]["margin"] == pytest.approx(-1)
    assert lines["not_banded"]["values"] == {"rgb_entropy": 1.5, "white_ratio": 0.5, "black_ratio": 0.0}
    assert lines["not_duplicate"]["values"] == {"duplicates.representative": True}


def test_every_rule_of_ours_shows_the_columns_that_it_reads(tmp_path):
    for rule in explain(write_run(tmp_path, {"a": {}}), find("pretrain_256"), "s/a", tmp_path)["rules"]:
        assert rule["values"], rule["rule"]


def test_a_broken_image_is_explained_by_its_error_and_unknown_has_no_margin(run):
    found = explain(run, Policy("p", SQL), "s/broken_a", run)
    assert found["error"] == "truncated" and found["kept"] is False
    assert found["rules"][0]["verdict"] is None and found["rules"][0]["terms"][0]["margin"] is None


def test_an_unknown_uid_is_met_with_near_ones(run):
    with pytest.raises(ValueError, match=r"there is no image 's/7'[\s\S]*nearest are\n  s/\d7"):
        explain(run, Policy("p", SQL), "s/7", run)
    with pytest.raises(ValueError, match="s/broken_a"):
        explain(run, Policy("p", SQL), "broken_a", run)


def test_a_policy_that_groups_is_explained_by_verdicts(run):
    sql = HEADER + "SELECT uid, max(width) > 5 AS wide, count(*) FILTER (key > 'a') = 0 AS plain FROM basics GROUP BY uid"
    found = explain(run, Policy("p", sql), "s/01", run)
    assert [rule["verdict"] for rule in found["rules"]] == [True, True]


# --- sweep ---


@pytest.mark.parametrize(
    ("what", "written"),
    [
        ("plain", r"complexity <= 0\.3"),
        ("rgb_entropy", r"rgb_entropy >= 2\.2"),
        ("not_crushed", "jpeg_quality < 40"),
        ("white_ratio + black_ratio", r"black_ratio > 0\.4"),
    ],
)
def test_a_sweep_keeps_what_the_policy_with_that_threshold_keeps(run, what, written):
    found = next(one for one in sweep(run, Policy("p", SQL), what, run) if re.search(written.split(" ")[0], one["column"]))
    assert found["num_images"] == 60 and len(found["rows"]) > 10 and sum(row["present"] for row in found["rows"]) == 1
    for row in found["rows"][::4] + [row for row in found["rows"] if row["present"]]:
        assert len(re.findall(written, SQL)) == 1
        changed = re.sub(written, lambda old: old[0].rpartition(" ")[0] + f" {row['threshold']!r}", SQL)  # noqa: B023
        assert row["kept"] == len(kept(run, changed)), row
    assert len({row["kept"] for row in found["rows"]}) > 3


def test_both_bounds_of_a_between_are_moved_and_a_column_of_no_rule_is_cut_from_both_sides(run):
    low, high = sweep(run, Policy("p", SQL), "aspect_ok", run)
    assert (low["operator"], low["threshold"], high["operator"], high["threshold"]) == (">=", 0.5, "<=", 2.0)
    below, above = sweep(run, Policy("p", SQL), "laplacian_var", run)
    assert below["rule"] is None and below["threshold"] is None and (below["operator"], above["operator"]) == ("<=", ">=")
    assert below["rows"][-1]["kept"] == above["rows"][0]["kept"] == len(kept(run, SQL))


def test_the_present_threshold_keeps_what_the_funnel_keeps_also_on_its_very_value(tmp_path):
    """0.3 is not a float32: an image that lies on the threshold is judged as DuckDB judges it."""
    run = write_run(tmp_path, {str(i): {"complexity": 0.3 if i else 0.31} for i in range(4)})
    for operator, count in (("<=", 3), ("<", 0), (">", 1), (">=", 4)):
        sql = HEADER + f"SELECT uid, complexity {operator} 0.3 AS plain FROM basics"
        (found,) = sweep(run, Policy("p", sql), "plain", tmp_path)
        (row,) = (row for row in found["rows"] if row["present"])
        assert row["kept"] == row["alone"] == len(kept(run, sql)) == count


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("complexit", "neither a rule nor a column; did you mean 'complexity'"),
        ("not_duplicate", "compares nothing with a number"),
        ("md5", "md5 is VARCHAR and has no order of numbers"),
        ("1) FROM basics; DROP TABLE x --", "neither a rule nor a column"),
    ],
)
def test_what_cannot_be_swept_is_refused(run, what, message):
    with pytest.raises(ValueError, match=message):
        sweep(run, Policy("p", SQL), what, run)


def test_the_command_draws_the_sweep_and_writes_no_selection(run, capsys, tmp_path):
    policy = tmp_path / "mine.sql"
    policy.write_text(SQL)
    assert cli.main(["filter", "--run", str(run), "--policy", str(policy), "--sweep", "white_ratio + black_ratio"]) == 0
    shown = capsys.readouterr()
    picture = Path(json.loads(shown.out)["picture"])
    assert picture.name == "mine.sweep.white_ratio_black_ratio.png" and picture.read_bytes().startswith(b"\x89PNG")
    assert shown.err.count("<- now") == 1 and [path.name for path in (run / "selection").iterdir()] == [picture.name]


def test_a_sweep_of_hardly_any_values_can_be_drawn(tmp_path):
    run = write_run(tmp_path, {"a": {"complexity": None}})
    found = sweep(run, Policy("p", HEADER + "SELECT uid, complexity < 0.3 AS plain FROM basics"), "plain", tmp_path)
    plots.sweeps([*found, {**found[0], "rows": [], "threshold": None}]).savefig(tmp_path / "x.png")
    plots.sweeps([]).savefig(tmp_path / "y.png")


# --- compare ---


def test_a_comparison_names_the_rules_that_make_the_difference(run, capsys):
    a, b = (
        Policy("a", SQL),
        Policy("b", SQL.replace("<= 0.3", "<= 0.4").replace("< 40", "< 60").replace("resolution: 256", "resolution: 512")),
    )
    found = compare(run, a, b, 3, run)
    in_a, in_b = kept(run, a.sql), kept(run, b.sql)
    counts = {"both": len(in_a & in_b), "only_a": len(in_a - in_b), "only_b": len(in_b - in_a), "neither": 62 - len(in_a | in_b)}
    assert {name: found[name] for name in counts} == counts and counts["only_a"] and counts["only_b"]
    assert [row["rule"] for row in found["only_a_because"]] == ["not_crushed"]
    assert [row["rule"] for row in found["only_b_because"]] == ["plain"]
    assert found["only_a_because"][0]["failed"] == found["only_a_because"][0]["alone"] == counts["only_a"]
    assert set(found["only_a_uids"]) <= in_a - in_b and len(found["only_b_uids"]) == min(3, counts["only_b"])
    assert compare(run, a, a, 3, run)["only_a_because"] == []


def test_a_comparison_uses_each_policys_own_resolution(tmp_path):
    run = write_run(tmp_path, {"small": {"width": 300, "height": 300}, "large": {}})
    sql = "SELECT uid, scale >= 1 AS large_enough FROM basics LEFT JOIN buckets USING (uid)"
    found = compare(run, Policy("a", HEADER + sql), Policy("b", "-- resolution: 512\n" + sql), 8, tmp_path)
    assert (found["both"], found["only_a"], found["only_a_uids"]) == (1, 1, ["s/small"])


def test_the_command_compares_and_explains_a_policy_that_was_run_here_by_its_name(run, capsys, tmp_path):
    mine = tmp_path / "mine.sql"
    mine.write_text(SQL)
    assert cli.main(["filter", "--run", str(run), "--policy", str(mine)]) == 0
    mine.unlink()
    assert cli.main(["filter", "--run", str(run), "--compare", "mine", "captioned"]) == 0
    shown = capsys.readouterr()
    assert "only captioned" in shown.err and json.loads(shown.out.splitlines()[-1])["a"] == "mine"
    assert cli.main(["filter", "--run", str(run), "--policy", "mine", "--explain", "s/01"]) == 0
    assert cli.main(["filter", "--run", str(run)]) == 2 and "--compare A B" in capsys.readouterr().err


def test_a_template_is_the_text_of_a_policy_of_ours(capsys):
    assert cli.main(["filter", "--template", "by_source"]) == 0
    assert capsys.readouterr().out == find("by_source").sql
    assert cli.main(["filter", "--template", "list"]) == 0
    assert "midtrain" in capsys.readouterr().out
    assert cli.main(["filter", "--template", "by_sorce"]) == 2 and "did you mean 'by_source'" in capsys.readouterr().err
