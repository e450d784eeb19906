"""Run a policy over the annotations with DuckDB: which images are kept, and what each rule removed.

A policy is one SELECT that returns `uid` and BOOLEAN columns, one row per image. Every BOOLEAN column is a rule; an image is kept
when all of its rules are true. NULL is unknown, and not kept. The SQL sees one view per annotation of the run, and

    tags      curation/weights/*.tags.csv: what SAE features mean (schema.TAGS)
    buckets   where an image would go at the policy's resolution: uid, the bucket and crop columns of schema.SELECTION, and
              `scale`, the source pixels per trained pixel (below 1 the image would be enlarged)
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset
import sqlglot
from sqlglot import exp

from curation.buckets import buckets, place
from curation.schema import SELECTION, TAGS
from curation.shards import file_hash, fingerprint, read_fingerprint

WEIGHTS = Path(__file__).parent / "weights"
MADE_BY = {"duplicates": "k2 dedup --run {run}", "basics": "k2 annotate --source ... --out {run}"}
STAGES = ("basics", "duplicates", "siglip", "effnet", "compact", "synthetic", "artifacts")
_OPERATORS = {exp.LT: "<", exp.LTE: "<=", exp.GT: ">", exp.GTE: ">="}
_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


@dataclass(frozen=True)
class Term:
    """One numeric comparison of a rule: `column` (a column, or an expression over columns) `operator` `threshold`."""

    column: str
    operator: str  # < <= > >=
    threshold: float


@dataclass(frozen=True)
class Rule:
    """A BOOLEAN column of a policy."""

    name: str
    expression: str
    comment: str  # the reason, as written beside the rule
    terms: tuple[Term, ...]  # the numeric comparisons that all have to hold; others (OR, IS NULL) are not listed


@dataclass(frozen=True)
class Policy:
    """A policy file: its name and its text."""

    name: str
    sql: str

    @property
    def resolution(self) -> int:
        """The resolution that the selection is for, from the header comment `-- resolution: 256`.

        Raises:
            ValueError: no such comment, or not a multiple of 16.
        """
        found = re.search(r"^--\s*resolution:\s*(\d+)\s*$", self.sql, re.MULTILINE)
        if not found:
            raise ValueError(f"policy {self.name!r} does not name its resolution; add a line such as `-- resolution: 256` at its head")
        buckets(int(found[1]))
        return int(found[1])


# --- what the text says ---


def rules(sql: str) -> tuple[Rule, ...]:
    """The columns that a policy returns, but for uid, in order. Which of them are BOOLEAN only DuckDB knows.

    Raises:
        ValueError: not one SELECT statement.
    """
    query = _parse(sql)
    return tuple(_rule(column) for column in query.selects if column.alias_or_name != "uid" and not column.is_star)


def _parse(sql: str) -> exp.Select:
    try:
        statements = [s for s in sqlglot.parse(sql, dialect="duckdb") if s is not None and not isinstance(s, exp.Semicolon)]
    except sqlglot.errors.SqlglotError as error:
        raise ValueError(f"the policy is not SQL: {re.sub(chr(27) + r'.*?m', '', str(error))}") from error
    if len(statements) != 1 or not isinstance(statements[0], exp.Select):
        kinds = ", ".join(type(s).__name__ for s in statements) or "nothing"
        raise ValueError(f"a policy is one SELECT; this one has {kinds}")
    return statements[0]


def _rule(column: exp.Expression) -> Rule:
    comments = [comment.strip() for node in column.walk() for comment in node.comments or ()]
    expression = column.this if isinstance(column, exp.Alias) else column
    return Rule(column.alias_or_name, _text(expression), " ".join(comments), tuple(_terms(expression)))


def _text(expression: exp.Expression) -> str:
    return expression.sql(dialect="duckdb", comments=False, normalize_functions=False)


def _terms(expression: exp.Expression) -> Iterator[Term]:
    """The comparisons with a number in a conjunction."""
    expression = expression.unnest()
    if isinstance(expression, exp.And):
        yield from _terms(expression.left)
        yield from _terms(expression.right)
    elif isinstance(expression, exp.Between):
        low, high = _number(expression.args["low"]), _number(expression.args["high"])
        if low is not None and high is not None:
            yield from (Term(_text(expression.this), ">=", low), Term(_text(expression.this), "<=", high))
    elif type(expression) in _OPERATORS:
        operator, left, right = _OPERATORS[type(expression)], _number(expression.left), _number(expression.right)
        if left is None and right is not None:
            yield Term(_text(expression.left), operator, right)
        elif left is not None and right is None:
            yield Term(_text(expression.right), _MIRRORED[operator], left)


def _number(expression: exp.Expression) -> float | None:
    """The value of a numeric literal, with or without a sign."""
    expression = expression.unnest()
    if isinstance(expression, exp.Neg):
        value = _number(expression.this)
        return None if value is None else -value
    return float(expression.this) if isinstance(expression, exp.Literal) and not expression.is_string else None


# --- what the run says ---


def decide(run_dir: str | Path, policy: Policy, tags_dir: Path = WEIGHTS) -> pa.Table:
    """`uid`, the rules (bool, null when unknown) in the policy's order, and `kept`; one row per image, sorted by uid.

    A broken image (basics has an error) is never kept, whatever the rules say.

    Raises:
        ValueError: a typo in the SQL, no BOOLEAN column, an image that the policy drops or repeats instead of judging it.
        FileNotFoundError: an annotation is missing; the text names the command that makes it.
    """
    with _opened(run_dir, policy, tags_dir) as con:
        types = {name: kind for name, kind, *_ in con.sql("DESCRIBE policy").fetchall()}
        names = [name for name, kind in types.items() if kind == "BOOLEAN"]
        if "uid" not in types:
            raise ValueError(f"policy {policy.name!r} does not return uid; it returns {', '.join(types)}")
        if not names:
            found = ", ".join(f"{name} {kind}" for name, kind in types.items())
            raise ValueError(f"policy {policy.name!r} has no BOOLEAN column, so it has no rule; it returns {found}")
        try:
            _check_rows(con, policy)
            columns = ", ".join(f'policy."{name}"' for name in names)
            every = " AND ".join(f'policy."{name}"' for name in names)
            return con.sql(
                f"SELECT uid, {columns}, basics.error IS NULL AND coalesce({every}, false) AS kept "
                "FROM basics JOIN policy USING (uid) ORDER BY uid"
            ).to_arrow_table()
        except duckdb.Error as error:  # what only shows while it runs: a cast that fails, a division by zero in strict mode
            raise ValueError(f"policy {policy.name!r} failed while it ran: {error}") from error


def _check_rows(con: duckdb.DuckDBPyConnection, policy: Policy) -> None:
    """One row per image: an image that a WHERE or a JOIN drops would be a removal that no rule names."""
    judged, images, repeated = con.sql(
        "SELECT count(DISTINCT policy.uid), (SELECT count(*) FROM basics), count(*) - count(DISTINCT policy.uid) "
        "FROM policy SEMI JOIN basics USING (uid)"
    ).fetchall()[0]
    if judged < images:
        raise ValueError(
            f"policy {policy.name!r} drops {images - judged} of {images} images without a rule; start FROM basics, use LEFT JOIN, "
            "and write a WHERE as a BOOLEAN column"
        )
    if repeated:
        raise ValueError(f"policy {policy.name!r} returns {repeated} more rows than images; a JOIN repeats them (GROUP BY uid first)")


def term_values(run_dir: str | Path, policy: Policy, tags_dir: Path = WEIGHTS) -> pa.Table:
    """`uid` and one double column per distinct `Term.column` of the policy, named by its text; sorted by uid.

    They say how near an image is to a threshold, for explanations and for the report. Raises as `decide` does.
    """
    columns = list(dict.fromkeys(term.column for rule in rules(policy.sql) for term in rule.terms))
    # The policy's own columns stay, because an expression may use their names.
    cells = [exp.cast(sqlglot.parse_one(text, dialect="duckdb"), "DOUBLE").as_(f"term {i}", quoted=True) for i, text in enumerate(columns)]
    asked = _parse(policy.sql).select(*cells, copy=False).sql(dialect="duckdb", comments=False)
    with _opened(run_dir, policy, tags_dir) as con:
        wanted = "".join(f', "term {i}"' for i in range(len(columns)))
        return con.sql(f"SELECT uid{wanted} FROM ({asked}) ORDER BY uid").to_arrow_table().rename_columns(["uid", *columns])


def explain(run_dir: str | Path, policy: Policy, uid: str, tags_dir: Path = WEIGHTS) -> list[dict[str, Any]]:
    """For one image, per rule: name, verdict (true, false or None), expression, comment and the values of its terms.

    Raises:
        ValueError: no such uid.
    """
    decided = decide(run_dir, policy, tags_dir)
    found = decided.filter(pc.field("uid") == uid).to_pylist()
    if not found:
        raise ValueError(f"there is no image {uid!r} in {run_dir}; a uid is '<shard>/<key>', as in the column uid of the annotations")
    values = term_values(run_dir, policy, tags_dir).filter(pc.field("uid") == uid).to_pylist()[0]
    known = _by_name(policy)
    return [
        {
            "rule": name,
            "verdict": found[0][name],
            "expression": known(name).expression,
            "comment": known(name).comment,
            "values": {term.column: values[term.column] for term in known(name).terms},
        }
        for name in decided.column_names[1:-1]
    ]


def _by_name(policy: Policy) -> Callable[[str], Rule]:
    """Rules by name; a rule that comes out of a `SELECT *` has no text of its own."""
    known = {rule.name: rule for rule in rules(policy.sql)}
    return lambda name: known.get(name, Rule(name, name, "", ()))


def select(run_dir: str | Path, policy: Policy, tags_dir: Path = WEIGHTS) -> tuple[pa.Table, dict[str, Any]]:
    """The selection (schema.SELECTION, sorted by uid) with bucket and crop, and the funnel (what funnel.json holds).

    Raises as `decide` does.
    """
    decided = decide(run_dir, policy, tags_dir)
    with _opened(run_dir, policy, tags_dir) as con:
        where = con.sql("SELECT uid, shard, key, buckets.* EXCLUDE (uid, scale) FROM basics LEFT JOIN buckets USING (uid) ORDER BY uid")
        placed = where.to_arrow_table()
        errors = con.sql("SELECT error IS NOT NULL AS broken FROM basics ORDER BY uid").to_arrow_table()["broken"].to_numpy()
    assert placed["uid"].equals(decided["uid"])
    selection = placed.filter(decided["kept"]).cast(SELECTION).combine_chunks()
    return selection, funnel(decided, errors, policy)


def funnel(decided: pa.Table, errors: np.ndarray, policy: Policy) -> dict[str, Any]:
    """What each rule removed. `decided` is what `decide` returns; `errors` (N,) says which images are broken.

    Per rule: failed (false), unknown (NULL), failed_alone (false here and false nowhere else), kept_so_far (decodable images for
    which this rule and all before it are true).
    """
    names = decided.column_names[1:-1]
    known = _by_name(policy)
    true = np.stack([decided[name].fill_null(False).to_numpy() for name in names])
    false = np.stack([~decided[name].fill_null(True).to_numpy() for name in names])
    left, lines = ~errors, []
    for i, name in enumerate(names):
        left = left & true[i]
        lines.append(
            {
                "name": name,
                "comment": known(name).comment,
                "expression": known(name).expression,
                "failed": int(false[i].sum()),
                "unknown": int((~true[i] & ~false[i]).sum()),
                "failed_alone": int((false[i] & (false.sum(0) == 1)).sum()),
                "kept_so_far": int(left.sum()),
            }
        )
    assert (left == decided["kept"].to_numpy()).all()
    return {
        "policy": policy.name,
        "resolution": policy.resolution,
        "num_images": len(decided),
        "num_kept": int(left.sum()),
        "num_errors": int(errors.sum()),
        "rules": lines,
        "sql": policy.sql,
    }


def made_by(run_dir: str | Path, policy: Policy, tags_dir: Path = WEIGHTS) -> str:
    """The fingerprint of a selection: the policy's text, its buckets, the annotations and tags that it could see."""
    stages = {f"{stage}/{file.name}": read_fingerprint(file) for stage, files in annotation_files(run_dir).items() for file in files}
    tags = {file.name: file_hash(file) for file in sorted(tags_dir.glob("*.tags.csv"))}
    return fingerprint({"policy": policy, "buckets": buckets(policy.resolution), "annotations": stages, "tags": tags})


def annotation_files(run_dir: str | Path) -> dict[str, list[Path]]:
    """The Parquet files of every annotation of a run, by stage."""
    folders = sorted(path for path in Path(run_dir, "annotations").glob("*") if path.is_dir())
    return {folder.name: files for folder in folders if (files := sorted(folder.glob("*.parquet")))}


@contextmanager
def _opened(run_dir: str | Path, policy: Policy, tags_dir: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that sees the views of a run, and the policy as the view `policy`."""
    files = annotation_files(run_dir)
    if "basics" not in files:
        raise FileNotFoundError(f"{run_dir} has no annotation basics; run `{MADE_BY['basics'].format(run=run_dir)}` first")
    con = duckdb.connect(config={"autoinstall_known_extensions": False, "autoload_known_extensions": False})  # nothing is downloaded
    try:
        for stage, paths in files.items():
            # Arrow reads the files, because DuckDB 2.0.0's own reader calls `error IS NULL` true for every row of a file in
            # which all errors have one text (it asks the column's statistics).
            con.register(stage, pyarrow.dataset.dataset(paths, format="parquet"))
        con.register("tags", read_tags(tags_dir))
        sizes = con.sql("SELECT uid, height, width FROM basics WHERE error IS NULL").to_arrow_table()
        placed = place(sizes["height"].to_numpy(), sizes["width"].to_numpy(), policy.resolution)
        columns = {name: values.astype(np.int32) for name, values in placed._asdict().items()}
        con.register("buckets", pa.table({"uid": sizes["uid"]} | columns | {"scale": placed.scale}))
        _parse(policy.sql)  # one SELECT, and nothing behind it
        try:
            con.execute(f"CREATE TEMP VIEW policy AS {policy.sql}")  # on one line, so that DuckDB's line numbers are the file's
        except duckdb.Error as error:
            raise _explained(error, con, run_dir, policy) from error
        yield con
    finally:
        con.close()


def _explained(error: duckdb.Error, con: duckdb.DuckDBPyConnection, run_dir: str | Path, policy: Policy) -> Exception:
    """DuckDB's message (it names near misses), with the views and columns there are, or the command that makes the missing one."""
    missing = re.search(r"Table with name (\w+) does not exist", str(error))
    if missing and missing[1] in STAGES:
        command = MADE_BY.get(missing[1], MADE_BY["basics"]).format(run=run_dir)
        return FileNotFoundError(
            f"policy {policy.name!r} needs the annotation {missing[1]}, which {run_dir} does not have; run `{command}` first"
        )
    listing = "SELECT table_name, string_agg(column_name, ', ' ORDER BY column_index) FROM duckdb_columns() WHERE NOT internal"
    rows = con.sql(f"{listing} GROUP BY table_name ORDER BY table_name")
    views = "\n".join(f"  {name}: {columns}" for name, columns in rows.fetchall())
    return ValueError(f"policy {policy.name!r}: {error}\nThe views and their columns are\n{views}")


def read_tags(tags_dir: Path = WEIGHTS) -> pa.Table:
    """The tags of all `*.tags.csv` in a folder, schema.TAGS; more columns in a file (notes, evidence) are left out.

    Raises:
        ValueError: a column is missing, or a value has the wrong type.
    """
    found = [TAGS.empty_table()]
    for file in sorted(tags_dir.glob("*.tags.csv")):
        options = pa.csv.ConvertOptions(include_columns=TAGS.names, column_types={field.name: field.type for field in TAGS})
        try:
            found.append(
                pa.csv.read_csv(file, convert_options=options, parse_options=pa.csv.ParseOptions(newlines_in_values=True)).cast(TAGS)
            )
        except (pa.ArrowInvalid, KeyError) as error:
            raise ValueError(f"{file} is not a table of tags ({', '.join(TAGS.names)}): {error}") from error
    return pa.concat_tables(found)
