"""Why a policy keeps or removes one image: every rule with its values, its thresholds and how far the one is from the other."""

from pathlib import Path
from typing import Any

import duckdb

from curation.policy import WEIGHTS, by_name, opened, quoted, rule_names, with_cells
from curation.rules import Policy, Term, columns_of, comparisons, expression_of

NEAR = 3  # uids named for one that is not there


def explain(run_dir: str | Path, policy: Policy, uid: str, tags_dir: Path = WEIGHTS) -> dict[str, Any]:
    """What every rule thinks of one image.

    Returns:
        uid, policy, kept, error (of decoding, or None), and rules: per rule its name, verdict (true, false or None for unknown),
        expression, comment, `values` of the columns that it reads, and `terms`: every comparison with a number in it (also inside
        OR, CASE and NOT) with column, operator, threshold, value, holds, and margin (negative on the side where it does not hold).

    Raises:
        ValueError: no such uid; the text names uids that are near. What `curation.policy.decide` raises, too.
    """
    with opened(run_dir, policy, tags_dir) as con:
        names = rule_names(con, policy)
        errors = con.execute("SELECT error FROM basics WHERE uid = $1", [uid]).fetchall()
        if not errors:
            near = "\n".join(f"  {name}" for name in near_uids(con, uid))
            raise ValueError(
                f"there is no image {uid!r} in {run_dir}; a uid is '<shard>/<key>', as in the column uid of the annotations. "
                f"The nearest are\n{near}"
            )
        asked = {name: _asked(policy, name) for name in names}
        wanted = dict.fromkeys(cell for columns, terms in asked.values() for cell in (*columns, *(term.column for term in terms)))
        cells = [cell for cell in wanted if _binds(con, policy, cell)]
        columns = [*map(quoted, names), *(f'"cell {i}"' for i in range(len(cells)))]
        found = con.execute(f"SELECT {', '.join(columns)} FROM ({with_cells(policy.sql, cells)}) WHERE uid = $1", [uid]).fetchall()
    if len(found) != 1:
        raise ValueError(f"policy {policy.name!r} returns {len(found)} rows for {uid!r} and should return one")
    verdicts, values = dict(zip(names, found[0], strict=False)), dict(zip(cells, map(_plain, found[0][len(names) :]), strict=True))
    known = by_name(policy)
    lines = [
        {
            "rule": name,
            "verdict": verdicts[name],
            "expression": known(name).expression,
            "comment": known(name).comment,
            "values": {column: values[column] for column in asked[name][0] if column in values},
            "terms": [_measured(term, values[term.column]) for term in asked[name][1] if term.column in values],
        }
        for name in names
    ]
    error = errors[0][0]
    return {"uid": uid, "policy": policy.name, "kept": error is None and all(verdicts.values()), "error": error, "rules": lines}


def near_uids(con: duckdb.DuckDBPyConnection, uid: str) -> list[str]:
    """The uids most like a text: those that contain it first."""
    order = "contains(uid, $1) DESC, jaro_winkler_similarity(uid, $1) DESC, uid"
    return [name for (name,) in con.execute(f"SELECT uid FROM basics ORDER BY {order} LIMIT {NEAR}", [uid]).fetchall()]


def _asked(policy: Policy, rule: str) -> tuple[list[str], list[Term]]:
    """The columns and the comparisons of a rule; none for a rule that comes out of a `SELECT *`."""
    if not by_name(policy)(rule).expression:
        return [], []
    expression = expression_of(policy.sql, rule)
    return columns_of(expression), [term for _, term in comparisons(expression)]


def _binds(con: duckdb.DuckDBPyConnection, policy: Policy, cell: str) -> bool:
    """False for what cannot stand beside the policy's columns, as a column inside an aggregate of a GROUP BY."""
    try:
        con.execute(f"DESCRIBE {with_cells(policy.sql, [cell])}")
    except duckdb.Error:
        return False
    return True


def _measured(term: Term, value: Any) -> dict[str, Any]:
    number = float(value) if isinstance(value, int | float) else None
    margin = term.margin(number)
    holds = None if margin is None else margin > 0 or (margin == 0 and "=" in term.operator)
    return {"column": term.column, "operator": term.operator, "threshold": term.threshold, "value": value, "holds": holds, "margin": margin}


def _plain(value: Any) -> Any:
    """A value that JSON can hold."""
    if value is None or isinstance(value, bool | int | str):
        return value
    try:
        return float(value)  # floats and decimals
    except (TypeError, ValueError):
        return str(value)
