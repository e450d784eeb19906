"""A policy from a stranger reads and writes no file; captions and uids from anywhere are text in SQL, HTML and on a terminal."""

import html
import io
import json
import re
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_policy import HEADER, write_run

from curation import explore
from curation.compare import compare
from curation.explain import explain
from curation.policy import Policy, decide, opened, select
from curation.printable import printable
from pipelines import cli
from pipelines.report import render

HOSTILE = {
    "script": "<script>document.title='owned'</script><img src=x onerror=alert(1)>",
    "quotes": "\"' onmouseover='alert(1)' \" `${7*7}` {{ 7 * 7 }} {% raw %}",
    "drop": "'; DROP TABLE basics; --",
    "terminal": "\x1b[2J\x1b]0;owned\x07\x9b31m red \r hidden",
    "direction": "\u202egnp.exe\u2066 \u200f mirrored",
    "nul": "before\x00after",
    "lines": "two\nlines\u2028three",
    "markdown": "[click](javascript:alert(1)) | ![x](http://example.org/x.png) $x^2$",
    "long": "x" * 5000,
}


@pytest.fixture
def hostile_run(tmp_path) -> Path:
    """Every text as a uid and as a caption; the second half is removed by a rule, the last one is broken by a hostile error."""
    images = {
        text: {"caption": text, "caption_source": "txt", "complexity": 0.2 if i % 2 else 0.9} for i, text in enumerate(HOSTILE.values())
    }
    images["broken " + HOSTILE["script"]] = {"error": HOSTILE["terminal"] + HOSTILE["script"]}
    return write_run(tmp_path / "run", images)


# --- a policy opens nothing ---


@pytest.mark.parametrize(
    "source",
    [
        "read_csv('{secret}')",
        "read_text('{secret}')",
        "read_blob('{secret}')",
        "read_json('{secret}')",
        "read_parquet('{secret}')",
        "parquet_metadata('{secret}')",
        "sniff_csv('{secret}')",
        "glob('{folder}/*')",
        "'{secret}'",
        "'s3://bucket/x.parquet'",
        "'https://example.org/x.csv'",
        "query('SELECT * FROM read_text(''{secret}'')')",
        "duckdb_secrets()",
        "secret_table",
        "enable_logging('QueryLog', storage='file', storage_path='{folder}/written')",
    ],
)
def test_a_policy_cannot_read_a_file(source, tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("password\nhunter2\n")
    secret_table = pa.table({"password": ["hunter2"]})  # a variable of this program is no table either
    sql = f"SELECT uid, (SELECT count(*) FROM {source.format(secret=secret, folder=tmp_path)}) > 0 AS leak FROM basics"
    with pytest.raises(ValueError) as refused:
        decide(write_run(tmp_path / "run", {"a": {}}), Policy("p", HEADER + sql), tmp_path)
    assert "hunter2" not in str(refused.value) and len(secret_table) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "secret.csv"]


@pytest.mark.parametrize(
    "sql",
    [
        "COPY basics TO '{folder}/written.csv'",
        "ATTACH '{folder}/written.db'",
        "SELECT uid, true AS yes FROM basics; COPY basics TO '{folder}/written.csv'",
        "SELECT uid, true AS yes FROM basics /* /* */ ; COPY basics TO '{folder}/written.csv'; -- */",
        "SELECT uid, true AS yes, $$ ; $$ AS x FROM basics; ATTACH '{folder}/written.db'",
        "SELECT uid, '\\'; COPY basics TO ''{folder}/written.csv''; --' = 'x' AS yes FROM basics; INSTALL httpfs",
        "INSTALL httpfs",
        "SET enable_external_access = true",
        "EXPORT DATABASE '{folder}/written'",
        "CREATE TABLE x AS SELECT 1",
    ],
)
def test_a_policy_cannot_write_a_file_or_change_a_setting(sql, tmp_path):
    run = write_run(tmp_path / "run", {"a": {}})
    with suppress(ValueError):  # what stands in a comment is no statement
        select(run, Policy("p", HEADER + sql.format(folder=tmp_path)), tmp_path / "selection.parquet")
        assert "/* /* */" in sql
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "selection.parquet"}


def test_whatever_got_through_would_find_the_door_shut(tmp_path):
    """The connection itself, without the checks of the text before it."""
    run = write_run(tmp_path / "run", {"a": {}})
    with opened(run, Policy("p", HEADER + "SELECT uid, true AS yes FROM basics")) as con:
        for statement in (
            f"COPY basics TO '{tmp_path}/x.csv'",
            f"ATTACH '{tmp_path}/x.db'",
            "INSTALL httpfs",
            "LOAD httpfs",
            "SET enable_external_access = true",
            "SET lock_configuration = false",
            f"SET temp_directory = '{tmp_path}'",
            f"EXPORT DATABASE '{tmp_path}/x'",
        ):
            with pytest.raises(duckdb.Error):
                con.execute(statement)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_policy_spills_to_a_place_that_is_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = write_run(tmp_path / "run", {"a": {}})
    with opened(run, Policy("p", HEADER + "SELECT uid, true AS yes FROM basics")) as con:
        place = con.sql("SELECT current_setting('temp_directory')").fetchall()[0][0]
        assert Path(place).parent == tmp_path
    assert not Path(place).exists()


@pytest.mark.parametrize("call", ["random() < 0.5", "now() > DATE '2020-01-01'", "uuid() > 'a'", "current_date IS NULL", "today() > x"])
def test_a_policy_that_would_choose_otherwise_every_time_is_refused(call, tmp_path):
    run = write_run(tmp_path, {"a": {}})
    with pytest.raises(ValueError, match=r"would choose otherwise every time; .*md5_number\(uid\)"):
        decide(run, Policy("p", f"{HEADER}SELECT uid, {call} AS yes FROM basics"), tmp_path)
    with pytest.raises(ValueError, match="tablesample"):
        decide(run, Policy("p", f"{HEADER}SELECT uid, true AS yes FROM basics USING SAMPLE 50%"), tmp_path)


# --- names ---


@pytest.mark.parametrize(
    "name", ['a"b', "a; DROP TABLE basics", "it's", "select", "<b>bold</b>", "$x^2$ $\\frac$", "ünï", "a.b", "\x1b[2J"]
)
def test_a_rule_may_have_any_name(name, tmp_path, capsys):
    quoted = '"' + name.replace('"', '""') + '"'
    sql = f"{HEADER}SELECT uid, complexity < 0.3 AS {quoted}, width > 3 AS wide FROM basics"
    run = write_run(tmp_path / "run", {"a": {}, "b": {"complexity": 0.5}})
    (tmp_path / "mine.sql").write_text(sql)
    for more in ([], ["--explain", "s/b"], ["--sweep", name]):
        assert cli.main(["filter", "--run", str(run), "--policy", str(tmp_path / "mine.sql"), *more]) == 0
        assert "\x1b" not in capsys.readouterr().err
    assert compare(run, Policy("p", sql), Policy("q", HEADER + "SELECT uid, true AS yes FROM basics"))["only_b_because"][0]["rule"] == name
    assert explore.funnel(str(run), "mine")["rules"][0]["name"] == name
    explore.plot_funnel(str(run), "mine").savefig(io.BytesIO())
    explore.plot_overlaps(str(run), "mine").savefig(io.BytesIO())
    assert "<b>bold" not in render(str(run))


def test_a_rule_that_has_the_name_of_a_column_of_the_selection_is_refused(tmp_path):
    with pytest.raises(ValueError, match="calls a rule 'Kept', which the selection uses"):
        decide(write_run(tmp_path, {"a": {}}), Policy("p", HEADER + "SELECT uid, width > 3 AS Kept FROM basics"), tmp_path)


def test_an_annotation_and_a_run_folder_may_have_any_name(tmp_path):
    run = write_run(tmp_path / 'it\'s "a" run; --', {"a": {}})
    (run / "annotations/basics").rename(run / "annotations/x")
    (run / "annotations/x").rename(run / "annotations/basics")
    odd = run / "annotations" / "my'stage\"; DROP TABLE basics"
    odd.mkdir()
    (odd / "it's.parquet").write_bytes((run / "annotations/synthetic/s.parquet").read_bytes())
    assert len(decide(run, Policy("p", HEADER + "SELECT uid, true AS yes FROM basics"), tmp_path)) == 1
    assert {row["stage"] for row in explore.annotations(str(run))} >= {odd.name}


# --- texts ---


def test_hostile_texts_are_values_in_sql(hostile_run, tmp_path):
    policy = Policy("p", HEADER + "SELECT uid, complexity < 0.3 AS plain, caption <> 'x' AS captioned FROM basics")
    funnel = select(hostile_run, policy, tmp_path / "selection.parquet")
    kept = pq.read_table(tmp_path / "selection.parquet")
    texts = list(HOSTILE.values())
    assert sorted(kept["key"].to_pylist()) == sorted(texts[1::2]) and funnel["num_images"] == len(texts) + 1
    for text in texts:
        found = explain(hostile_run, policy, f"s/{text}")
        assert found["uid"] == f"s/{text}" and found["rules"][1]["values"]["caption"] == text
    with pytest.raises(ValueError, match="there is no image"):
        explain(hostile_run, policy, "' OR true --")


def test_a_terminal_obeys_no_text(hostile_run, capsys, tmp_path):
    policy = tmp_path / "mine.sql"
    policy.write_text(HEADER + "SELECT uid, complexity < 0.3 AS plain, caption <> 'x' AS captioned FROM basics")
    arguments = ["filter", "--run", str(hostile_run), "--policy", str(policy)]
    assert cli.main(arguments) == 0
    for text in [*HOSTILE.values(), "broken " + HOSTILE["script"]]:
        assert cli.main([*arguments, "--explain", f"s/{text}"]) == 0
    assert cli.main([*arguments, "--explain", "\x1b[2J nothing \u202e"]) == 2  # the error names it and near uids
    assert cli.main(["filter", "--run", str(hostile_run), "--compare", "captioned", "mine"]) == 0
    shown = capsys.readouterr()
    assert not set(re.sub(r"[\n\t]", "", shown.err + shown.out)) & {
        chr(code) for code in (*range(32), *range(127, 160), 0x202E, 0x2066, 0x200F)
    }
    assert r"\x1b[2J" in shown.err and r"\u202e" in shown.err
    assert max(map(len, shown.err.splitlines())) < 6000
    assert printable("plain ünï 日本 🙂") == "plain ünï 日本 🙂"


class Tags(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_no_text_becomes_html_in_the_report(hostile_run, tmp_path):
    for text, sql in (("mine", "complexity < 0.3 AS plain"), ("other", 'caption IS NULL AS "<script>alert(2)</script>"')):
        policy = tmp_path / f"{text}.sql"
        policy.write_text(f"{HEADER}SELECT uid, {sql}, -- <script>alert(3)</script> \u202e\n width > 3 AS wide FROM basics")
        assert cli.main(["filter", "--run", str(hostile_run), "--policy", str(policy)]) == 0
    page = render(str(hostile_run))
    tags = Tags()
    tags.feed(page)
    assert [tag for tag, _ in tags.found].count("script") == 1  # ours, whose hash the page's policy names
    assert not [attrs for _, attrs in tags.found if any(name.startswith("on") for name in attrs)]
    assert not [attrs for tag, attrs in tags.found if tag == "a" and not attrs["href"].startswith("#")]
    assert html.escape("<script>alert(3)</script>") in page and "49" not in re.findall(r"\$\{.*?\}", page)
    assert "{{ 7 * 7 }}" in page  # shown, not run


def test_a_notebook_shows_no_text_as_html_or_link(hostile_run):
    rows = [{"uid": f"s/{text}", "error": text} for text in HOSTILE.values()]
    for line in explore.table(rows).splitlines()[2:]:
        assert not re.search(r"<(?!br)|(?<!\\)[\[\]`$]", line) and line.count("\n") == 0
        assert len(re.findall(r"(?<!\\)\|", line)) == 3
    assert explore.table(explore.broken(str(hostile_run)))
    assert "\u202e" not in explore.table(rows) and "\x1b" not in explore.table(rows) and "\x00" not in explore.table(rows)


def test_a_contact_sheet_takes_any_label():
    sheet = explore.contact_sheet([Image.new("RGB", (30, 30))] * len(HOSTILE), list(HOSTILE.values()), columns=3, size=60)
    assert sheet.size == (3 * 68 + 8, 3 * 86 + 8)


def test_json_of_hostile_texts_is_one_line(hostile_run, capsys):
    assert cli.main(["filter", "--run", str(hostile_run), "--policy", "captioned", "--explain", f"s/{HOSTILE['lines']}"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["uid"] == f"s/{HOSTILE['lines']}" and line.isascii()
