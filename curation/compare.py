"""Two policies over one run: which images both keep, which only one, and which rules make the difference."""

from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from curation.policy import WEIGHTS, annotation_files, by_name, judge, opened, quoted, see
from curation.rules import Policy


def compare(run_dir: str | Path, a: Policy, b: Policy, num_uids: int = 8, tags_dir: Path = WEIGHTS) -> dict[str, Any]:
    """What two policies of a run keep.

    Returns:
        a and b (their names), counts both, only_a, only_b, neither; only_a_because: the rules of b that the images only in a do not
        pass, most first: rule, comment, failed, unknown, alone (no other rule of b stops them); only_b_because: the same the other
        way round; only_a_uids, only_b_uids: up to `num_uids` of them, spread over the run, by name.

    Raises as `curation.policy.decide` does.
    """
    with opened(run_dir, a, tags_dir) as con:
        names_a = judge(con, a)
        con.execute("ALTER TABLE decided RENAME TO first")
        see(con, annotation_files(run_dir), b)
        names_b = judge(con, b)
        rows = con.sql("SELECT first.kept, decided.kept, count(*) FROM first JOIN decided USING (uid) GROUP BY ALL").fetchall()
        counts = {(kept_a, kept_b): count for kept_a, kept_b, count in rows}
        return {
            "a": a.name,
            "b": b.name,
            "both": counts.get((True, True), 0),
            "only_a": counts.get((True, False), 0),
            "only_b": counts.get((False, True), 0),
            "neither": counts.get((False, False), 0),
            "only_a_because": _because(con, "decided", "first", names_b, b),
            "only_b_because": _because(con, "first", "decided", names_a, a),
            "only_a_uids": _sample(con, "first", "decided", num_uids),
            "only_b_uids": _sample(con, "decided", "first", num_uids),
        }


def _because(con: duckdb.DuckDBPyConnection, refusing: str, keeping: str, names: list[str], policy: Policy) -> list[dict[str, Any]]:
    """The rules of the refusing table, for the images that the keeping one keeps."""
    columns = ", ".join(f"refusing.{quoted(name)}" for name in names)
    patterns = con.sql(
        f"""SELECT {columns}, count(*) AS images FROM {refusing} AS refusing JOIN {keeping} AS keeping USING (uid)
        WHERE keeping.kept AND NOT refusing.kept GROUP BY {columns}"""
    ).to_arrow_table()
    images = patterns["images"].to_numpy()
    true = np.stack([patterns[name].fill_null(False).to_numpy() for name in names])
    false = np.stack([~patterns[name].fill_null(True).to_numpy() for name in names])
    found = [
        {
            "rule": name,
            "comment": by_name(policy)(name).comment,
            "failed": int(images[false[i]].sum()),
            "unknown": int(images[~true[i] & ~false[i]].sum()),
            "alone": int(images[~true[i] & ((~true).sum(0) == 1)].sum()),
        }
        for i, name in enumerate(names)
    ]
    return sorted((row for row in found if row["failed"] or row["unknown"]), key=lambda row: -row["failed"] - row["unknown"])


def _sample(con: duckdb.DuckDBPyConnection, keeping: str, refusing: str, count: int) -> list[str]:
    rows = con.sql(
        f"""SELECT uid FROM {keeping} AS keeping JOIN {refusing} AS refusing USING (uid)
        WHERE keeping.kept AND NOT refusing.kept ORDER BY md5(uid) LIMIT {int(count)}"""
    )
    return sorted(uid for (uid,) in rows.fetchall())
