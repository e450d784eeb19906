"""A policy against three-valued logic written out in Python."""

import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.policy import Policy, decide, select
from curation.schema import BASICS, SYNTHETIC
from curation.shards import write_table

values = st.none() | st.integers(0, 9)
image = st.fixed_dictionaries(
    {"complexity": values, "rgb_entropy": values, "p_synthetic": values, "broken": st.booleans(), "judged": st.booleans()}
)
term = st.tuples(st.sampled_from(["complexity", "rgb_entropy", "p_synthetic"]), st.sampled_from(["<", "<=", ">", ">="]), st.integers(0, 9))
rule = st.tuples(st.lists(term, min_size=1, max_size=2), st.sampled_from(["AND", "OR"]))
MEASURED = ("complexity", "rgb_entropy", "p_synthetic")
COMPARE = {"<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b}


def facts(image: dict) -> dict:
    """What the annotations hold of an image."""
    return {
        "complexity": None if image["broken"] else image["complexity"],
        "rgb_entropy": None if image["broken"] else image["rgb_entropy"],
        "p_synthetic": None if image["broken"] or not image["judged"] else image["p_synthetic"],
    }


def verdict(rule: tuple, image: dict) -> bool | None:
    """SQL's AND and OR over comparisons in which None is unknown."""
    found = [None if facts(image)[name] is None else COMPARE[op](facts(image)[name], threshold) for name, op, threshold in rule[0]]
    decisive = rule[1] == "OR"
    if decisive in found:
        return decisive
    return None if None in found else not decisive


def write_run(run: Path, images: list[dict]) -> None:
    """Two shards; an image that the synthetic stage has not seen has no row there."""
    for shard in (0, 1):
        mine = [(i, image) for i, image in enumerate(images) if i % 2 == shard]
        rows = [
            {"uid": f"{i:02d}", "shard": "s", "key": f"{i}", "error": "broken" if image["broken"] else None}
            | {"width": None if image["broken"] else 300, "height": None if image["broken"] else 200}
            | facts(image)
            for i, image in mine
        ]
        scores = [row for row, (_, image) in zip(rows, mine, strict=True) if image["judged"]]
        for name, schema, table in (("basics", BASICS, rows), ("synthetic", SYNTHETIC, scores)):
            table = pa.Table.from_pylist([{key: row.get(key) for key in schema.names} for row in table], schema)
            write_table(table, run / f"annotations/{name}/{shard}.parquet", "x")


@settings(max_examples=25, deadline=None)
@given(st.lists(image, min_size=1, max_size=8), st.lists(rule, min_size=1, max_size=4))
def test_kept_and_the_funnel_are_what_three_valued_logic_says(images, policy):
    lines = [
        f"{f' {how} '.join(f'{name} {op} {at}' for name, op, at in terms)} AS r{i}, -- 3: reason {i}\n"
        for i, (terms, how) in enumerate(policy)
    ]
    sql = f"-- resolution: 256\nSELECT uid,\n{''.join(lines)} FROM basics LEFT JOIN synthetic USING (uid)"
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        write_run(run, images)
        funnel = select(run, Policy("p", sql), run / "selection.parquet", run)
        selection = pq.read_table(run / "selection.parquet")
        measured = decide(run, Policy("p", sql), run, list(MEASURED)).select(["uid", *MEASURED]).to_pylist()
    table = [[verdict(rule, image) for rule in policy] for image in images]
    kept = [all(row) and not image["broken"] for row, image in zip(table, images, strict=True)]
    assert selection["uid"].to_pylist() == [f"{i:02d}" for i, yes in enumerate(kept) if yes]
    assert funnel["num_kept"] == sum(kept) and funnel["num_images"] == len(images)
    assert funnel["num_errors"] == sum(image["broken"] for image in images)
    for i, line in enumerate(funnel["rules"]):
        column = [row[i] for row in table]
        assert line["failed"] == sum(value is False for value in column)
        assert line["unknown"] == sum(value is None for value in column)
        assert line["failed_alone"] == sum(row[i] is False and sum(value is False for value in row) == 1 for row in table)
        assert line["kept_so_far"] == sum(all(row[: i + 1]) and not image["broken"] for row, image in zip(table, images, strict=True))
        assert line["comment"] == f"3: reason {i}"
        together = [sum(row[i] is False and row[j] is False for row in table) for j in range(len(policy))]
        assert funnel["failed_together"][i] == together
    for row, image in zip(measured, images, strict=True):
        assert {name: row[name] for name in MEASURED} == facts(image)
