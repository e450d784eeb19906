"""Policies: what the SQL says, what it decides, and what its errors say."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlglot import exp

from curation.buckets import crop_box, nearest_bucket
from curation.policy import WEIGHTS, Policy, Term, active_tags, decide, read_tags, rules, silent_tags
from curation.policy import select as write_selection
from curation.rules import functions, parse
from curation.schema import ARTIFACTS, BASICS, DEFECTS, DUPLICATES, PROVENANCE, SELECTION, SYNTHETIC, TEXT_DENSITY
from curation.shards import write_json, write_table
from pipelines import cli
from pipelines.filter import POLICIES, find, ours

GOOD = {
    "shard": "s",
    "width": 1400,
    "height": 1200,
    "rgb_entropy": 7.0,
    "laplacian_var": 800.0,
    "white_ratio": 0.0,
    "black_ratio": 0.0,
    "border_top": 0.0,
    "border_bottom": 0.0,
    "border_left": 0.0,
    "border_right": 0.0,
    "complexity": 0.15,
    "jpeg_quality": 90,
}
HEADER = "-- resolution: 256\n"
STAGES = ("duplicates", "synthetic", "artifacts", "provenance", "defects", "text_density")
CONCEPTS = pa.schema({"uid": pa.string(), "leaf": pa.int64(), "weight": pa.float64(), "draw": pa.float64(), "error": pa.string()})


def write_run(run: Path, images: dict[str, dict], stages: tuple[str, ...] = STAGES) -> Path:
    """Annotations of made-up images: good ones, but for the values given. A value of another annotation is named as there."""
    rows = [{"uid": f"s/{key}", "key": key} | ({} if "error" in image else GOOD) | image for key, image in images.items()]
    rows = [row | {"shard": "s"} for row in rows]
    one_each = {
        "basics": (BASICS, {}),
        "duplicates": (DUPLICATES, {"representative": True}),
        "synthetic": (SYNTHETIC, {"p_synthetic": 0.1, "real_share": 0.6}),
        "artifacts": (ARTIFACTS, {"codes": []}),
        "provenance": (PROVENANCE, {"declared_ai": False}),
        "text_density": (TEXT_DENSITY, {"boxes": []}),
        "defects": (
            DEFECTS,
            dict.fromkeys(DEFECTS.names, 0.0) | {"luma_high": 250, "grid_x": 0, "grid_y": 0, "luma_low": 0, "error": None},
        ),
        "concepts": (CONCEPTS, {"leaf": 1, "weight": 0.5, "draw": 0.25}),
    }
    for stage in ("basics", *stages):
        schema, usual = one_each[stage]
        table = [{name: row.get(name, None if "error" in row else usual.get(name)) for name in schema.names} for row in rows]
        write_table(pa.Table.from_pylist(table, schema), run / f"annotations/{stage}/s.parquet", "made by a test")
    return run


def text(area: float, height: float) -> dict[str, float]:
    """A box of text: its share of the image, and the height of its letters as a part of the short side."""
    return {"x": 0.0, "y": 0.0, "width": 1.0, "height": area, "text_height": height, "area": area, "score": 0.9}


def select(run: Path, policy: Policy, tags_dir: Path = WEIGHTS) -> tuple[pa.Table, dict]:
    """The selection that is written, and the funnel."""
    funnel = write_selection(run, policy, run / "selection.parquet", tags_dir)
    return pq.read_table(run / "selection.parquet"), funnel


def annotated_by(run: Path, tower: str, weights: str) -> None:
    """Say in run.json with which encoder and SAE the annotation artifacts was made, as `k2 annotate` does."""
    description = {"class": "Artifacts", "weights": weights, "tower": {"class": "EffNet", "identity": tower}, "k": 32}
    write_json({"description": {"stages": {"artifacts": {"description": description}}}}, run / "run.json")


def tags_in(folder: Path, *lines: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "sae-compact.tags.csv").write_text(
        "\n".join(["model,feature,tag,verdict,threshold,reviewers,tower,weights,note", *lines]) + "\n"
    )
    return folder


# --- what the text says ---


def test_rules_carry_their_reason_and_their_thresholds():
    found = rules(
        HEADER + "-- about the policy\nSELECT uid, -- the sample\n"
        "  error IS NULL AS decoded, -- 2: broken, as they say\n"
        "  laplacian_var < 12e3 AND -0.5 <= rgb_entropy AS not_noise, -- 3: noise\n"
        "  (width / height) BETWEEN 0.5 AND 2 AS aspect_ok, -- 2: crop\n"
        "  white_ratio > 0.5 OR black_ratio > 0.5 AS mixed,\n"
        "  tag <> 'a' AND NOT flat AND a < b AS others -- 3: the last\n"
        "FROM basics -- not a reason\n"
    )
    assert [(rule.name, rule.comment) for rule in found] == [
        ("decoded", "2: broken, as they say"),
        ("not_noise", "3: noise"),
        ("aspect_ok", "2: crop"),
        ("mixed", ""),
        ("others", "3: the last"),
    ]
    assert [rule.terms for rule in found] == [
        (),
        (Term("laplacian_var", "<", 12000.0), Term("rgb_entropy", ">=", -0.5)),
        (Term("(width / height)", ">=", 0.5), Term("(width / height)", "<=", 2.0)),
        (),
        (),
    ]
    assert found[0].expression == "error IS NULL"


@pytest.mark.parametrize("sql", ["SELECT uid FROM basics; SELECT 1", "DROP VIEW basics", "", "-- only a comment", "SELEC uid"])
def test_a_policy_is_one_select(sql, tmp_path):
    with pytest.raises(ValueError, match=r"a policy is one SELECT|is not SQL"):
        rules(sql)
    with pytest.raises(ValueError, match=r"a policy is one SELECT|is not SQL"):
        decide(write_run(tmp_path, {"a": {}}), Policy("p", HEADER + sql))


@pytest.mark.parametrize("head", ["", "-- resolution 256\n", "SELECT '-- resolution: 256';\n"])
def test_a_policy_names_its_resolution(head):
    with pytest.raises(ValueError, match="does not name its resolution; add a line such as `-- resolution: 256`"):
        _ = Policy("p", head).resolution
    assert Policy("p", "-- mine\n-- resolution: 768\nSELECT").resolution == 768
    with pytest.raises(ValueError, match="resolution 250 must be"):
        _ = Policy("p", "-- resolution: 250").resolution


# --- our policies ---


@pytest.mark.parametrize("name", ["pretrain_256", "pretrain_512", "pretrain_1024"])
def test_each_rule_of_ours_removes_what_it_is_for_and_nothing_else_does(name, tmp_path):
    resolution = find(name).resolution
    faults = {
        "decoded": {"error": "broken"},
        "not_duplicate": {"representative": False},
        "not_synthetic": {"real_share": 0.02},
        "not_declared_ai": {"declared_ai": True},
        "large_enough": {"width": resolution - 1, "height": resolution - 1},
        "aspect_ok": {"width": 8000, "height": 3000},
        "not_noise": {"laplacian_var": 30_000.0},
        "not_flat": {"rgb_entropy": 0.5, "white_ratio": 0.5},
        "not_white": {"white_ratio": 0.9},
        "not_black": {"black_ratio": 0.9},
        "not_banded": {"rgb_entropy": 1.8},
        "no_border": {"border_left": 0.1, "border_right": 0.12},
        "not_crushed": {"jpeg_quality": 5},
        "not_too_complex": {"complexity": 0.6},
        "not_blocky": {"blockiness": 2.0},
        "not_posterised": {"level_gaps": 0.9},
        "not_interlaced": {"combing": 0.1},
        "no_inset": {"inset_x": 0.3},
        "not_oversaturated": {"clipped_both": 0.2},
        "not_overexposed": {"clipped_high": 0.6, "clipped_partly": 0.2},
        "not_dark": {"luma_high": 20},
        "text_readable": {"boxes": [text(0.4, 0.005)]},
        "no_artifact_tag": {"codes": [{"feature": 8, "value": 9.0}, {"feature": 7, "value": 2.0}]},
    }
    if resolution > 256:
        faults["not_enlarged"] = {"resampling": 0.5}
    style = {
        "high_key": {"clipped_high": 0.6},
        "motion_blur": {"laplacian_var": 3.0, "complexity": 0.02},
        "grain": {"laplacian_var": 4000.0, "complexity": 0.28},
        "sky": {"border_top": 0.4},
        "png": {"jpeg_quality": None},
        "other_tag": {"codes": [{"feature": 8, "value": 9.0}]},
        "weak_tag": {"codes": [{"feature": 7, "value": 0.5}]},
        "poster": {"boxes": [text(0.5, 0.1)]},
        "small_print": {"boxes": [text(0.09, 0.005), text(0.5, 0.1)]},
        "white_product": {"white_ratio": 0.6, "rgb_entropy": 2.0},
        "edge": {"width": resolution, "height": resolution},
    }
    tags = tags_in(
        tmp_path / "tags",
        "sae-compact,7,jpeg blocks,artifact,1.5,Ada,effnet/1,abc,seen",
        "sae-compact,8,snow,style,0,Ada,effnet/1,abc,",
        "sae-siglip,8,x,artifact,0,Ada,siglip/1,def,",
    )
    run = write_run(tmp_path / "run", faults | style)
    annotated_by(run, "effnet/1", "abc")
    selection, funnel = select(run, find(name), tags)
    assert selection["key"].to_pylist() == sorted(style)
    assert {rule["name"]: rule["failed_alone"] for rule in funnel["rules"]} == dict.fromkeys(faults, 1)
    assert (funnel["num_images"], funnel["num_kept"], funnel["num_errors"]) == (len(faults) + len(style), len(style), 1)
    assert all(rule["comment"].startswith(("1: ", "2: ", "3: ", "4: ", "5: ")) for rule in funnel["rules"])


def test_only_what_a_resolution_shows_or_hides_moves_with_it():
    policies = {r: find(f"pretrain_{r}") for r in (256, 512, 1024)}
    texts = [{rule.name: rule.expression for rule in rules(policy.sql)} for policy in policies.values()]
    # An enlargement by two is gone again at 256 pixels, and most of the web is large enough for that.
    assert [text.pop("not_enlarged", None) is None for text in texts] == [True, False, False]
    assert [list(text) for text in texts] == [list(texts[0])] * 3
    moved = [name for name in texts[0] if len({text[name] for text in texts}) > 1]
    assert moved == ["not_crushed", "not_too_complex", "text_readable"]
    heads = [policy.sql[policy.sql.index("WITH ") : policy.sql.index("SELECT\n")] for policy in policies.values()]
    tails = [policy.sql[policy.sql.index("FROM basics") :] for policy in policies.values()]
    assert len(set(heads)) == len(set(tails)) == 1
    for name in ("not_crushed", "not_too_complex"):  # the reason moves with the threshold, and the expression is otherwise the same
        terms = [{rule.name: rule for rule in rules(policy.sql)}[name].terms for policy in policies.values()]
        assert all(len(term) == 1 for term in terms) and len({(term[0].column, term[0].operator) for term in terms}) == 1
        thresholds = [term[0].threshold for term in terms]
        assert thresholds == sorted(set(thresholds))


@pytest.mark.parametrize("name", ours())
def test_a_score_may_drop_the_extremely_poor_and_never_ranks(name):
    """K2 report, "Data Curation Principles": a good mix does not consist of high quality images alone."""
    query = parse(find(name).sql)
    ranking = (exp.Order, exp.Limit, exp.Window, exp.Qualify, exp.Fetch, exp.TableSample, exp.ArgMax, exp.ArgMin)
    assert not [node.sql() for node in query.find_all(*ranking)]
    assert not functions(find(name).sql) & {"quantile", "quantile_cont", "percentile_cont", "median", "max_by", "min_by", "top_k"}


def test_our_policies_look_at_no_sharpness_from_below_and_at_no_tower(tmp_path):
    for path in POLICIES.glob("*.sql"):
        policy = find(path.stem)
        for rule in rules(policy.sql):
            assert not any(term.column == "laplacian_var" and term.operator in (">", ">=") for term in rule.terms)
        run = write_run(tmp_path / path.stem, {"a": {}}, (*STAGES, "concepts"))
        assert len(decide(run, policy)) == 1  # with no tower's annotation there


# --- what it decides ---


def test_unknown_is_not_kept_and_is_counted_apart(tmp_path):
    run = write_run(tmp_path, {"a": {}, "b": {"p_synthetic": None}, "c": {"p_synthetic": 0.9}})
    policy = Policy("p", HEADER + "SELECT uid, p_synthetic < 0.5 AS real FROM basics LEFT JOIN synthetic USING (uid)")
    decided = decide(run, policy, tmp_path)
    assert decided.to_pydict() == {"uid": ["s/a", "s/b", "s/c"], "real": [True, None, False], "kept": [True, False, False]}
    _, funnel = select(run, policy, tmp_path)
    assert funnel["rules"] == [
        {"name": "real", "comment": "", "expression": "p_synthetic < 0.5", "failed": 1, "unknown": 1, "failed_alone": 1, "kept_so_far": 1}
    ]


def test_a_broken_image_is_never_kept(tmp_path):
    run = write_run(tmp_path, {"a": {}, "b": {"error": "truncated"}})
    selection, funnel = select(run, Policy("all", HEADER + "SELECT uid, true AS everything FROM basics"), tmp_path)
    assert selection["uid"].to_pylist() == ["s/a"] and funnel["num_errors"] == 1 and funnel["rules"][0]["failed"] == 0


def test_the_selection_has_the_bucket_and_crop_of_every_kept_image(tmp_path):
    run = write_run(tmp_path, {"b": {"width": 700, "height": 1000}, "a": {"width": 301, "height": 257}})
    selection, _ = select(run, Policy("all", "-- resolution: 512\nSELECT uid, width > 0 AS ok FROM basics"), tmp_path)
    assert selection.schema == SELECTION and selection["uid"].to_pylist() == ["s/a", "s/b"]
    for row, (height, width) in zip(selection.to_pylist(), [(257, 301), (1000, 700)], strict=True):
        bucket = nearest_bucket(height, width, 512)
        assert list(row.values())[3:] == [*bucket, *crop_box(height, width, *bucket)]


def test_columns_that_are_not_boolean_are_no_rules_but_may_be_used_by_them(tmp_path):
    sql = HEADER + "SELECT uid, width / height AS aspect, aspect < 1.5 AND width > 20 AS ok FROM basics; -- the end"
    run = write_run(tmp_path, {"a": {"width": 300, "height": 300}, "b": {"width": 600, "height": 300}})
    assert decide(run, Policy("p", sql), tmp_path).to_pydict() == {"uid": ["s/a", "s/b"], "ok": [True, False], "kept": [True, False]}
    values = decide(run, Policy("p", sql), tmp_path, ["aspect", "width"]).select(["uid", "aspect", "width"])
    assert values.to_pydict() == {"uid": ["s/a", "s/b"], "aspect": [1.0, 2.0], "width": [300, 600]}


# --- errors ---


@pytest.mark.parametrize(
    ("select_list", "message"),
    [
        ("uid, width FROM basics", "has no BOOLEAN column, so it has no rule; it returns uid VARCHAR, width INTEGER"),
        ("width > 3 AS wide FROM basics", "does not return uid"),
        ("uid, widht > 3 AS wide FROM basics", "(?s)widht.*Candidate bindings.*width.*The views and their columns are.*basics: uid, shard"),
        (
            "uid, width > 3 AS wide FROM basic",
            "(?s)Table with name basic does not exist.*buckets: uid, bucket_height.*tags: model, feature",
        ),
        ("uid, width > 3 AS wide FROM basics WHERE width > 3", "drops 1 of 3 images without a rule; .* write a WHERE as a BOOLEAN column"),
        ("uid, true AS yes FROM basics CROSS JOIN range(2)", "returns 3 more rows than images"),
        ("uid, CAST(key AS INTEGER) > 3 AS number FROM basics", "(?s)failed while it ran: .*Could not convert string"),
    ],
)
def test_a_mistake_in_the_sql_is_a_setting_and_the_text_helps(select_list, message, tmp_path):
    run = write_run(tmp_path, {"a": {}, "b": {}, "c": {"width": 3}})
    with pytest.raises(ValueError, match=message):
        decide(run, Policy("mine", f"{HEADER}SELECT {select_list}"), tmp_path)


def test_the_line_of_a_syntax_error_is_the_line_of_the_file(tmp_path):
    with pytest.raises(ValueError, match="LINE 3"):
        decide(write_run(tmp_path, {"a": {}}), Policy("mine", HEADER + "SELECT uid,\n nonsense > 3 AS x\nFROM basics"), tmp_path)


@pytest.mark.parametrize(
    ("stage", "command"), [("duplicates", "k2 dedup --run {run}"), ("synthetic", "k2 annotate --source ... --out {run}")]
)
def test_a_missing_annotation_names_the_command_that_makes_it(stage, command, tmp_path):
    run = write_run(tmp_path, {"a": {}}, tuple(s for s in STAGES if s != stage))
    with pytest.raises(FileNotFoundError, match=f"needs the annotation {stage}.*run `{command.format(run=run)}` first"):
        decide(run, find("pretrain_256"))
    with pytest.raises(FileNotFoundError, match="has no annotation basics; run `k2 annotate"):
        decide(tmp_path / "empty", find("pretrain_256"))


def test_what_a_policy_can_do_without_is_said_and_only_where_it_is_missing(tmp_path, capsys):
    lacking = write_run(tmp_path / "lacking", {"a": {}}, ("duplicates", "synthetic", "artifacts"))
    assert cli.main(["filter", "--run", str(lacking), "--policy", "pretrain_256"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["num_kept"] == 1
    assert "no such annotation: not_declared_ai (provenance), not_blocky (defects)" in shown.err
    # Where the annotation is there, what it does not know is unknown, and not kept.
    unknown = write_run(tmp_path / "unknown", {"a": {"declared_ai": None}, "b": {}})
    selection, funnel = select(unknown, find("pretrain_256"))
    assert selection["uid"].to_pylist() == ["s/b"]
    assert {rule["name"]: rule["unknown"] for rule in funnel["rules"]}["not_declared_ai"] == 1
    assert not [rule for rule in funnel["rules"] if "without" in rule]


def test_a_rule_that_asks_what_is_missing_keeps_its_threshold():
    (rule,) = rules("SELECT uid, text_area <= 0.15 OR missing('text_density') AS plain FROM basics")
    assert rule.terms == (Term("text_area", "<=", 0.15),) and rule.asks_missing == ("text_density",)


def test_missing_takes_the_names_of_annotations(tmp_path):
    run = write_run(tmp_path, {"a": {}})
    with pytest.raises(ValueError, match=r"asks missing\('text_densty'\); did you mean 'text_density'\?"):
        decide(run, Policy("p", HEADER + "SELECT uid, missing('text_densty') AS x FROM basics"), tmp_path)


@pytest.mark.parametrize(
    "reviewers, tower, weights, removes",
    [("Ada;Grace", "effnet/1", "abc", True), ("", "effnet/1", "abc", False), (" ; ", "effnet/1", "abc", False)]
    + [("Ada", "effnet/2", "abc", False), ("Ada", "effnet/1", "abd", False)],
)
def test_a_tag_removes_only_when_signed_and_of_the_encoder_and_sae_of_the_run(tmp_path, reviewers, tower, weights, removes):
    tags = tags_in(tmp_path / "tags", f"sae-compact,7,jpeg blocks,artifact,1.5,{reviewers},{tower},{weights},")
    run = write_run(tmp_path / "run", {"a": {"codes": [{"feature": 7, "value": 2.0}]}, "b": {}})
    annotated_by(run, "effnet/1", "abc")
    selection, _ = select(run, find("pretrain_256"), tags)
    assert selection["key"].to_pylist() == (["b"] if removes else ["a", "b"])
    said = silent_tags(run, tags)
    assert said is None if removes else "1 artifact tags are inactive" in said
    if not removes:
        assert ("nobody signed" in said and "1 of its SAE" in said) == (tower == "effnet/1" and weights == "abc")


def test_without_a_word_on_the_sae_of_a_run_no_tag_is_active(tmp_path):
    tags = tags_in(tmp_path / "tags", "sae-compact,7,jpeg blocks,artifact,1.5,Ada,effnet/1,abc,")
    run = write_run(tmp_path / "run", {"a": {"codes": [{"feature": 7, "value": 2.0}]}})
    assert active_tags(run, tags)["active"].to_pylist() == [False] and silent_tags(run, tags) is None
    assert len(select(run, find("pretrain_256"), tags)[0]) == 1


def test_tags_may_be_missing_or_only_a_header_and_a_wrong_file_is_named(tmp_path):
    assert len(read_tags(tmp_path / "nowhere")) == 0
    assert len(read_tags(tags_in(tmp_path / "a"))) == 0
    assert read_tags(tags_in(tmp_path / "a", 'm,3,"two\nlines",artifact,0.5,Ada,t,w,x')).to_pylist()[0]["feature"] == 3
    (tmp_path / "a" / "wrong.tags.csv").write_text("model,tag\nm,t\n")
    with pytest.raises(ValueError, match=r"wrong\.tags\.csv is not a table of tags"):
        read_tags(tmp_path / "a")


# --- the command ---


def test_the_command_writes_the_same_selection_and_funnel_every_time(tmp_path, capsys):
    run = write_run(tmp_path, {"a": {}, "b": {"complexity": 0.6}, "c": {"error": "broken"}})
    written = []
    for _ in range(2):
        assert cli.main(["filter", "--run", str(run), "--policy", "pretrain_256"]) == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out) == {"policy": "pretrain_256", "resolution": 256, "num_images": 3, "num_errors": 1, "num_kept": 1}
        assert "not_too_complex" in shown.err and "are `k2 annotate` and `k2 dedup` complete?" not in shown.err
        written.append({path.name: path.read_bytes() for path in (run / "selection").iterdir()})
    assert written[0] == written[1] and sorted(written[0]) == ["pretrain_256.funnel.json", "pretrain_256.parquet"]
    assert json.loads(written[0]["pretrain_256.funnel.json"])["sql"] == find("pretrain_256").sql
    assert cli.main(["filter", "--run", str(run), "--policy", "pretrain_256", "--explain", "s/b"]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "not_too_complex FALSE complexity = 0.6 <= 0.3 -0.3 4: bytes per pixel as JPEG" in shown


def test_the_command_says_when_a_stage_has_not_seen_every_image(tmp_path, capsys):
    run = write_run(tmp_path, {"a": {}, "b": {}})
    write_table(DUPLICATES.empty_table(), run / "annotations/duplicates/s.parquet", "x")
    assert cli.main(["filter", "--run", str(run), "--policy", "pretrain_256"]) == 0
    assert "unknown for images that decode: not_duplicate; are `k2 annotate` and `k2 dedup` complete?" in capsys.readouterr().err


def test_a_policy_is_a_name_of_ours_or_a_file(tmp_path, capsys):
    mine = tmp_path / "mine.sql"
    mine.write_text(HEADER + "SELECT uid, true AS yes FROM basics")
    assert find(str(mine)).name == "mine"
    assert cli.main(["filter", "--run", str(tmp_path), "--policy", "pretrain_265"]) == 2
    assert "did you mean 'pretrain_256'? choose from pretrain_256, pretrain_512, pretrain_1024, audit, " in capsys.readouterr().err
    with pytest.raises(ValueError, match="there is no such file"):
        find("none.sql")
    (tmp_path / "pretrain_256.sql").write_text(mine.read_text())
    with pytest.raises(ValueError, match="rename your file"):
        find(str(tmp_path / "pretrain_256.sql"))


# --- generated images ---


def verdicts(run: Path, policy: Policy, rule: str) -> dict[str, bool | None]:
    table = decide(run, policy)
    return dict(zip((uid.partition("/")[2] for uid in table["uid"].to_pylist()), table[rule].to_pylist(), strict=True))


def test_the_review_policy_takes_what_pretraining_keeps_and_midtraining_does_not(tmp_path):
    run = write_run(
        tmp_path, {"out": {"real_share": 0.05}, "doubt": {"real_share": 0.1}, "end": {"real_share": 0.15}, "in": {"real_share": 0.2}}
    )
    assert [uid for uid, kept in verdicts(run, find("review"), "kept").items() if kept] == ["doubt", "end"]
    pretrain = verdicts(run, find("pretrain_256"), "not_synthetic")
    assert pretrain == {"out": False, "doubt": True, "end": True, "in": True}


def test_a_source_with_many_generated_images_goes_whole_and_a_few_do_not_condemn_one(tmp_path):
    images = {f"a{i}": {"shard": "art-01", "real_share": 0.01 if i < 20 else 0.5} for i in range(40)}
    images |= {f"b{i}": {"shard": "few-02", "real_share": 0.01 if i < 3 else 0.5} for i in range(10)}
    images |= {f"c{i}": {"shard": "web-03", "real_share": 0.01 if i < 2 else 0.5} for i in range(40)}
    run = write_run(tmp_path, images)
    table = pq.read_table(run / "annotations/basics/s.parquet")
    shards = pa.array([images[key]["shard"] for key in table["key"].to_pylist()])
    write_table(
        table.set_column(table.column_names.index("shard"), table.schema.field("shard"), shards), run / "annotations/basics/s.parquet", "x"
    )
    found = verdicts(run, find("by_source"), "source_not_synthetic")
    assert {kept for key, kept in found.items() if key[0] == "a"} == {False}
    assert {kept for key, kept in found.items() if key[0] in "bc"} == {True}


def test_the_priors_of_the_manual_move_the_log_odds(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    expression, example = re.findall(r"```sql\n(.*?)```", text, re.S)[:2]
    run = write_run(tmp_path, {"a": {"p_synthetic": 0.9}, "b": {"p_synthetic": 0.2}, "zero": {"p_synthetic": 0.0}})
    sql = HEADER + f"SELECT uid, {expression.strip().replace('AS p_here', '< 0.51')} AS low FROM basics LEFT JOIN synthetic USING (uid)"
    assert verdicts(run, Policy("p", sql), "low") == {"a": True, "b": True, "zero": True}  # 0.9 at a prior of a tenth is one half
    assert verdicts(run, Policy("p", sql.replace("0.51", "0.49")), "low") == {"a": False, "b": True, "zero": True}
    listed = example.replace("'archive_2015'", "'s'")
    assert verdicts(run, Policy("p", HEADER + listed), "not_synthetic") == {"a": True, "b": True, "zero": True}
    assert verdicts(run, Policy("p", HEADER + example), "not_synthetic") == {"a": False, "b": True, "zero": True}
