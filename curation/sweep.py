"""What another threshold would keep: a threshold is moved over the values that images have, while all other rules are held."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from sqlglot import exp

from curation.policy import WEIGHTS, by_name, judge, opened, quoted
from curation.rules import Policy, Term, comparisons, expression_of, rules, text

STEPS = 24  # thresholds between the smallest and the largest value, at equal numbers of images
COMPARE = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}


def sweep(run_dir: str | Path, policy: Policy, what: str, tags_dir: Path = WEIGHTS) -> list[dict[str, Any]]:
    """Move every threshold of a rule, or every threshold on a column; a column that no rule compares is cut from both sides.

    The rule is judged anew with the comparison true, false or unknown in its place, so that OR, CASE and NOT count as they do in
    the policy.

    Args:
        what: the name of a rule, or a column as a rule writes it (`complexity`, `buckets.scale`; `scale` is enough).

    Returns:
        One entry per comparison: rule (None for a column of no rule), column, operator, threshold (the present one, or None),
        num_images (that decode), unknown (of them without a value), and rows, by threshold: threshold, alone (images for which the
        comparison holds), kept (images that the whole policy keeps), present (the row of the present threshold).

    Raises:
        ValueError: no rule or column of this name; nothing numeric. What `curation.policy.decide` raises, too.
    """
    found = _comparisons(policy, what)
    cells = [cell for rule, i, term in found for cell in (term.column, *_rule_when(policy, rule, i))]
    with opened(run_dir, policy, tags_dir) as con:
        if not found:
            _check_column(con, policy, what)
            cells = [what]
        try:
            names = judge(con, policy, cells)
        except ValueError as error:
            raise ValueError(f"--sweep {what!r}: {error}") from error
        if not found:
            found = [(None, 0, Term(what, operator, np.nan)) for operator in ("<=", ">=")]
        return [_swept(con, names, rule, term, 4 * at if rule else 0) for at, (rule, _, term) in enumerate(found)]


def _comparisons(policy: Policy, what: str) -> list[tuple[str, int, Term]]:
    """(rule, place in it, comparison) of the comparisons that are asked for."""
    every = [
        (rule.name, i, term)
        for rule in map(by_name(policy), _named(policy))
        for i, (_, term) in enumerate(comparisons(expression_of(policy.sql, rule.name)))
    ]
    of_rule = [entry for entry in every if entry[0] == what]
    if what in _named(policy) and not of_rule:
        raise ValueError(f"rule {what!r} compares nothing with a number: {by_name(policy)(what).expression}; there is no threshold to move")
    return of_rule or [entry for entry in every if what in (entry[2].column, entry[2].column.rpartition(".")[2])]


def _named(policy: Policy) -> list[str]:
    return [rule.name for rule in rules(policy.sql)]


def _rule_when(policy: Policy, rule: str, at: int) -> list[str]:
    """The rule with its comparison number `at` true, false, and unknown."""
    found = []
    for value in (exp.true(), exp.false(), exp.cast(exp.null(), "BOOLEAN")):
        whole = exp.paren(expression_of(policy.sql, rule))
        comparisons(whole)[at][0].replace(value)
        found.append(text(whole))
    return found


def _check_column(con: duckdb.DuckDBPyConnection, policy: Policy, what: str) -> None:
    """A sweep's column is a name, and not SQL."""
    columns = [name for (name,) in con.sql("SELECT DISTINCT column_name FROM duckdb_columns() WHERE NOT internal ORDER BY 1").fetchall()]
    if what.rpartition(".")[2] not in columns:
        choices = [*_named(policy), *columns]
        near = get_close_matches(what, choices, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"--sweep {what!r} is neither a rule nor a column; {hint}rules are {', '.join(_named(policy))}")


def _swept(con: duckdb.DuckDBPyConnection, names: list[str], rule: str | None, term: Term, cell: int) -> dict[str, Any]:
    others = " AND ".join(["NOT broken", *(f"coalesce({quoted(name)}, false)" for name in names if name != rule)])
    when = [f'coalesce("cell {cell + 1 + i}", false)' for i in range(3)] if rule else ["true", "false", "false"]
    cells = ", ".join(f"{value} AS {name}" for value, name in zip(when, ("holds", "fails", "unknown"), strict=True))
    kind = con.sql(f'SELECT "cell {cell}" FROM decided').types[0]
    if str(kind) not in ("FLOAT", "DOUBLE", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"):
        if not str(kind).startswith(("DECIMAL", "HUGEINT", "UBIGINT")):
            raise ValueError(f"--sweep: {term.column} is {kind} and has no order of numbers")
        kind = "DOUBLE"
    table = con.sql(f'SELECT "cell {cell}"::{kind} AS value, {others} AS others, {cells} FROM decided WHERE NOT broken').to_arrow_table()
    known = table["value"].is_valid().to_numpy()
    values = table["value"].fill_null(pa.scalar(0, table["value"].type)).to_numpy()
    kept = {name: table[name].to_numpy() & table["others"].to_numpy() for name in ("holds", "fails", "unknown")}
    rows = []
    for threshold in _thresholds(values[known], term.threshold):
        # As DuckDB does, a number is compared with a FLOAT column as a FLOAT.
        cut = np.float32(threshold) if values.dtype == np.float32 else threshold
        true = COMPARE[term.operator](values, cut)
        verdict = np.where(known, np.where(true, kept["holds"], kept["fails"]), kept["unknown"])
        rows.append(
            {
                "threshold": threshold,
                "alone": int((known & true).sum()),
                "kept": int(verdict.sum()),
                "present": threshold == term.threshold,
            }
        )
    return {
        "rule": rule,
        "column": term.column,
        "operator": term.operator,
        "threshold": None if np.isnan(term.threshold) else term.threshold,
        "num_images": len(table),
        "unknown": int((~known).sum()),
        "rows": rows,
    }


def _thresholds(values: np.ndarray, present: float) -> list[float]:
    """Thresholds at equal numbers of images, rounded to four digits, and the present one."""
    finite = values[np.isfinite(values)]
    cuts = np.quantile(finite, np.linspace(0, 1, STEPS + 1)) if len(finite) else np.zeros(0)
    found = {float(f"{cut:.4g}") for cut in cuts.tolist()} | ({present} if not np.isnan(present) else set())
    return sorted(found)
