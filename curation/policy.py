"""Run a policy over the annotations with DuckDB: which images are kept, and what each rule removed.

The SQL of a policy (`curation.rules`) sees one view per annotation of the run, and

    tags           curation/weights/*.tags.csv: what SAE features mean (schema.TAGS), and `active`: somebody signed the row, and it is
                   of the encoder and the SAE that the run's annotation `artifacts` was made with (`active_tags`)
    buckets        where an image would go at the policy's resolution: uid, the bucket and crop columns of schema.SELECTION, and
                   `scale`, the source pixels per trained pixel (below 1 the image would be enlarged)
    missing('x')   true when the run has no annotation x. A policy that asks this can do without x, which is then an empty view:
                   `text_share < 0.1 OR missing('text_density')` judges by x where it is there, and there unknown is not kept.

A policy may be a stranger's: DuckDB opens no file, loads nothing, and takes no settings from it.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset

from curation.buckets import buckets, place_sql
from curation.rules import Policy, Rule, Term, asks_missing, functions, parse, rules
from curation.schema import SELECTION, TABLES, TAGS
from curation.shards import file_hash, fingerprint, read_fingerprint, write_row_groups

__all__ = ["Policy", "Rule", "Term", "annotation_files", "decide", "funnel", "made_by", "opened", "read_tags", "rules", "select"]

WEIGHTS = Path(__file__).parent / "weights"
ROWS = 100_000  # of a row group of a selection


def stages() -> dict[str, tuple[pa.Schema, str]]:
    """The annotations that schema.TABLES describes: name -> (schema, command that makes it)."""
    found = {}
    for names, (schema, place) in TABLES.items():
        if place.startswith("annotations/"):
            command = "k2 dedup --run {run}" if "k2 dedup" in place else "k2 annotate --source ... --out {run}"
            found |= dict.fromkeys(names.split(", "), (schema, command))
    return found


# --- verdicts ---


def decide(run_dir: str | Path, policy: Policy, tags_dir: Path = WEIGHTS, cells: Sequence[str] = ()) -> pa.Table:
    """`uid`, the rules (bool, null when unknown) in the policy's order, `kept`, and the `cells`; one row per image, sorted by uid.

    A broken image (basics has an error) is never kept, whatever the rules say. `cells` are SQL expressions over what the policy
    selects from, as in its rules; each becomes a column with its text as name. The table is in memory: `select` is for many images.

    Raises:
        ValueError: a typo in the SQL, no BOOLEAN column, an image that the policy drops or repeats instead of judging it.
        FileNotFoundError: an annotation is missing; the text names the command that makes it.
    """
    with opened(run_dir, policy, tags_dir) as con:
        names = judge(con, policy, cells)
        added = "".join(f', "cell {i}"' for i in range(len(cells)))
        table = con.sql(f"SELECT uid, {listed(names)}, kept{added} FROM decided ORDER BY uid").to_arrow_table()
        return table.rename_columns(["uid", *names, "kept", *cells])


def judge(con: duckdb.DuckDBPyConnection, policy: Policy, cells: Sequence[str] = ()) -> list[str]:
    """Make the table `decided` of a connection from `opened`, one row per image in no order; returns the names of the rules.

    Its columns: uid, the rules, broken, kept, and "cell 0", "cell 1" ... for `cells`. Kept images also have shard, key, height
    and width. Raises as `decide` does.
    """
    names = rule_names(con, policy)
    more = "".join(f', policy."cell {i}"' for i in range(len(cells)))
    every = " AND ".join(f"policy.{quoted(name)}" for name in names)
    kept_too = ", ".join(f"CASE WHEN kept THEN basics.{name} END AS {name}" for name in ("shard", "key", "height", "width"))
    try:
        if cells:
            con.execute(f"CREATE OR REPLACE TEMP VIEW policy AS {with_cells(policy.sql, cells)}")
        con.execute(
            f"""CREATE OR REPLACE TEMP TABLE decided AS
            SELECT basics.uid, {", ".join(f"policy.{quoted(name)}" for name in names)}, policy.uid IS NULL AS "no row",
                basics.error IS NOT NULL AS broken, basics.error IS NULL AND coalesce({every}, false) AS kept, {kept_too}{more}
            FROM basics LEFT JOIN policy ON basics.uid = policy.uid"""
        )
    except duckdb.Error as error:  # what only shows while it runs: a cast that fails, a division by zero in strict mode
        raise ValueError(f"policy {policy.name!r} failed while it ran: {error}") from error
    # One row per image: an image that a WHERE or a JOIN drops would be a removal that no rule names.
    judged, dropped = con.sql('SELECT count(*), count(*) FILTER ("no row") FROM decided').fetchall()[0]
    images = con.sql("SELECT count(*) FROM basics").fetchall()[0][0]
    if dropped:
        raise ValueError(
            f"policy {policy.name!r} drops {dropped} of {images} images without a rule; start FROM basics, use LEFT JOIN, "
            "and write a WHERE as a BOOLEAN column"
        )
    if judged > images:
        raise ValueError(
            f"policy {policy.name!r} returns {judged - images} more rows than images; a JOIN repeats them (GROUP BY uid first)"
        )
    return names


def rule_names(con: duckdb.DuckDBPyConnection, policy: Policy) -> list[str]:
    """The BOOLEAN columns of a policy.

    Raises:
        ValueError: there is none, or no uid.
    """
    types = {name: kind for name, kind, *_ in con.sql("DESCRIBE policy").fetchall()}
    names = [name for name, kind in types.items() if kind == "BOOLEAN"]
    if "uid" not in types:
        raise ValueError(f"policy {policy.name!r} does not return uid; it returns {', '.join(types)}")
    if not names:
        found = ", ".join(f"{name} {kind}" for name, kind in types.items())
        raise ValueError(f"policy {policy.name!r} has no BOOLEAN column, so it has no rule; it returns {found}")
    taken = [name for name in names if name.lower() in ("broken", "kept", "shard", "key", "height", "width", "no row")]
    if taken:
        raise ValueError(f"policy {policy.name!r} calls a rule {taken[0]!r}, which the selection uses; give the rule another name")
    return names


def with_cells(sql: str, cells: Sequence[str]) -> str:
    """A policy that also returns `cells` as "cell 0", "cell 1" ... Its own columns stay, because a cell may use their names."""
    return (
        parse(sql)
        .select(*(f'{cell} AS "cell {i}"' for i, cell in enumerate(cells)), dialect="duckdb", copy=False)
        .sql(dialect="duckdb", comments=False)
    )


def quoted(name: str) -> str:
    """A name as SQL writes it, whatever stands in it."""
    return '"' + name.replace('"', '""') + '"'


def listed(names: Sequence[str]) -> str:
    """Names as a list of columns."""
    return ", ".join(quoted(name) for name in names)


# --- selection and funnel ---


def select(run_dir: str | Path, policy: Policy, path: str | Path, tags_dir: Path = WEIGHTS) -> dict[str, Any]:
    """Write the selection (schema.SELECTION, sorted by uid, with bucket and crop) to `path`; returns the funnel.

    Every annotation is read once. What does not fit into memory goes to a temporary folder (TMPDIR). Raises as `decide` does.
    """
    with opened(run_dir, policy, tags_dir) as con:
        names = judge(con, policy)
        con.execute(f"CREATE TEMP VIEW placed AS {place_sql(policy.resolution, '(SELECT * FROM decided WHERE kept)')}")
        columns = ", ".join(field.name for field in SELECTION)
        kept = con.sql(f"SELECT {columns} FROM decided JOIN placed USING (uid) WHERE kept ORDER BY uid").to_arrow_reader(ROWS)
        tables = (pa.Table.from_batches([batch]).cast(SELECTION) for batch in kept)
        write_row_groups(tables, path, SELECTION, made_by(run_dir, policy, tags_dir))
        return funnel(patterns(con, names), policy, sorted(set(asks_missing(policy.sql)) - set(annotation_files(run_dir))))


def patterns(con: duckdb.DuckDBPyConnection, names: Sequence[str]) -> pa.Table:
    """How many images (`images`) have each pattern of verdicts: the rules, `broken` and `kept`. Some hundred rows, whatever the run."""
    columns = f"{listed(names)}, broken, kept"
    return con.sql(f"SELECT {columns}, count(*) AS images FROM decided GROUP BY {columns}").to_arrow_table()


def funnel(patterns: pa.Table, policy: Policy, absent: Sequence[str] = ()) -> dict[str, Any]:
    """What each rule removed. `patterns` is what `patterns` returns; `absent` are annotations that the policy had to do without.

    Per rule: failed (false), unknown (NULL), failed_alone (false here and false nowhere else), kept_so_far (decodable images for
    which this rule and all before it are true), and `without`, the absent annotations for which it let everything pass.
    `failed_together` [i][j] counts the images for which rules i and j are both false.
    """
    names = patterns.column_names[:-3]
    known, images = by_name(policy), patterns["images"].to_numpy().astype(np.int64)
    true = np.stack([patterns[name].fill_null(False).to_numpy() for name in names])
    false = np.stack([~patterns[name].fill_null(True).to_numpy() for name in names])
    broken = patterns["broken"].to_numpy()
    left, lines = ~broken, []
    for i, name in enumerate(names):
        left = left & true[i]
        without = [stage for stage in known(name).asks_missing if stage in absent]
        lines.append(
            {
                "name": name,
                "comment": known(name).comment,
                "expression": known(name).expression,
                "failed": int(images[false[i]].sum()),
                "unknown": int(images[~true[i] & ~false[i]].sum()),
                "failed_alone": int(images[false[i] & (false.sum(0) == 1)].sum()),
                "kept_so_far": int(images[left].sum()),
            }
            | ({"without": without} if without else {})
        )
    assert (left == patterns["kept"].to_numpy()).all()
    return {
        "policy": policy.name,
        "resolution": policy.resolution,
        "num_images": int(images.sum()),
        "num_kept": int(images[left].sum()),
        "num_errors": int(images[broken].sum()),
        "rules": lines,
        "failed_together": ((false * images) @ false.T.astype(np.int64)).tolist(),
        "sql": policy.sql,
    }


def by_name(policy: Policy) -> Callable[[str], Rule]:
    """Rules by name; a rule that comes out of a `SELECT *` has no text of its own."""
    known = {rule.name: rule for rule in rules(policy.sql)}
    return lambda name: known.get(name, Rule(name, name, "", ()))


def made_by(run_dir: str | Path, policy: Policy, tags_dir: Path = WEIGHTS) -> str:
    """The fingerprint of a selection: the policy's text, its buckets, the annotations and tags that it could see."""
    files = {f"{stage}/{file.name}": read_fingerprint(file) for stage, files in annotation_files(run_dir).items() for file in files}
    tags = {file.name: file_hash(file) for file in sorted(tags_dir.glob("*.tags.csv"))}
    return fingerprint({"policy": policy, "buckets": buckets(policy.resolution), "annotations": files, "tags": tags})


# --- what the SQL sees ---


def annotation_files(run_dir: str | Path) -> dict[str, list[Path]]:
    """The Parquet files of every annotation of a run, by stage."""
    folders = sorted(path for path in Path(run_dir, "annotations").glob("*") if path.is_dir())
    return {folder.name: files for folder in folders if (files := sorted(folder.glob("*.parquet")))}


@contextmanager
def opened(run_dir: str | Path, policy: Policy, tags_dir: Path = WEIGHTS) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that sees the views of a run and the policy as the view `policy`, and nothing else of the machine.

    Raises as `decide` does.
    """
    files = annotation_files(run_dir)
    if "basics" not in files:
        command = stages()["basics"][1].format(run=run_dir)
        raise FileNotFoundError(f"{run_dir} has no annotation basics; run `{command}` first")
    with tempfile.TemporaryDirectory(prefix="k2-filter-") as spill, _shut_in(spill) as con:
        for stage, paths in files.items():
            # Arrow reads the files, because DuckDB 2.0.0's own reader calls `error IS NULL` true for every row of a file in
            # which all errors have one text (it asks the column's statistics). It reads no files for a policy, so that this is
            # also what lets us forbid it to open any.
            con.register(stage, pyarrow.dataset.dataset(paths, format="parquet"))
        con.register("tags", active_tags(run_dir, tags_dir))
        see(con, files, policy)
        yield con


@contextmanager
def _shut_in(spill: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that touches no file but its own in `spill`, takes no extension and whose settings are fixed."""
    con = duckdb.connect(config={"autoinstall_known_extensions": False, "autoload_known_extensions": False})
    try:
        con.execute("SET temp_directory = $1", [spill])  # what does not fit into memory goes there
        con.execute("SET preserve_insertion_order = false")  # we sort by uid; keeping order costs memory
        con.execute("SET python_enable_replacements = false")  # a table name never means a variable of this program
        con.execute("SET enable_external_access = false")
        con.execute("SET lock_configuration = true")
        yield con
    finally:
        con.close()


def see(con: duckdb.DuckDBPyConnection, files: dict[str, list[Path]], policy: Policy) -> None:
    """Make the views that depend on the policy: buckets, annotations that it can do without, `policy` itself."""
    known, run_dir = stages(), Path(*next(iter(files.values()))[0].parts[:-3])
    for stage in asks_missing(policy.sql):
        if stage not in known and stage not in files:
            near = get_close_matches(stage, known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"policy {policy.name!r} asks missing({stage!r}); {hint}annotations are {', '.join(known)}")
        if stage not in files:
            con.register(stage, known[stage][0].empty_table())
    present = ", ".join(f"'{stage.replace(chr(39), chr(39) * 2)}'" for stage in files)
    con.execute(f"CREATE OR REPLACE TEMP MACRO missing(stage) AS stage NOT IN ({present})")
    con.execute(f"CREATE OR REPLACE TEMP VIEW buckets AS {place_sql(policy.resolution, '(SELECT * FROM basics WHERE error IS NULL)')}")
    unsteady = "SELECT DISTINCT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT'"
    moving = functions(policy.sql) & {"tablesample", *(name for (name,) in con.sql(unsteady).fetchall())}
    if moving:
        raise ValueError(
            f"policy {policy.name!r} calls {', '.join(sorted(moving))}, so that it would choose otherwise every time; "
            "for a random choice compare md5_number(uid)"
        )
    try:
        kinds = [statement.type for statement in con.extract_statements(policy.sql)]
        if kinds != [duckdb.StatementType.SELECT]:  # DuckDB's own word, should its parser and sqlglot's differ
            raise ValueError(f"policy {policy.name!r} is not one SELECT for DuckDB but {', '.join(map(str, kinds)) or 'nothing'}")
        con.execute(f"CREATE OR REPLACE TEMP VIEW policy AS {policy.sql}")  # on one line, so that DuckDB's line numbers are the file's
    except duckdb.Error as error:
        raise _explained(error, con, run_dir, policy) from error


def _explained(error: duckdb.Error, con: duckdb.DuckDBPyConnection, run_dir: Path, policy: Policy) -> Exception:
    """DuckDB's message (it names near misses), with the views and columns there are, or the command that makes the missing one."""
    missing = re.search(r"Table with name (\w+) does not exist", str(error))
    if missing and missing[1] in stages():
        command = stages()[missing[1]][1].format(run=run_dir)
        return FileNotFoundError(
            f"policy {policy.name!r} needs the annotation {missing[1]}, which {run_dir} does not have; run `{command}` first"
        )
    listing = "SELECT table_name, string_agg(column_name, ', ' ORDER BY column_index) FROM duckdb_columns() WHERE NOT internal"
    rows = con.sql(f"{listing} GROUP BY table_name ORDER BY table_name")
    views = "\n".join(f"  {name}: {columns}" for name, columns in rows.fetchall())
    return ValueError(f"policy {policy.name!r}: {error}\nThe views and their columns are\n{views}")


def active_tags(run_dir: str | Path, tags_dir: Path = WEIGHTS) -> pa.Table:
    """The tags with a column `active`: a reviewer is named, and tower and weights are those of the run's annotation `artifacts`.

    Anything else is silent: a feature's number means nothing in another SAE, and a proposal is nobody's word.
    """
    tags, (tower, weights) = read_tags(tags_dir), annotated_with(run_dir)
    names = (tags[name].to_pylist() for name in ("reviewers", "tower", "weights"))
    active = [weights is not None and bool(who.strip(" ;")) and (t, w) == (tower, weights) for who, t, w in zip(*names, strict=True)]
    return tags.append_column("active", pa.array(active, pa.bool_()))


def annotated_with(run_dir: str | Path) -> tuple[str | None, str | None]:
    """Encoder and weights of the SAE that made a run's annotation `artifacts`; (None, None) where there is none."""
    path = Path(run_dir, "run.json")
    stages = json.loads(path.read_text()).get("description", {}).get("stages", {}) if path.is_file() else {}
    made = stages.get("artifacts", {}).get("description", {})
    return made.get("tower", {}).get("identity"), made.get("weights")


def silent_tags(run_dir: str | Path, tags_dir: Path = WEIGHTS) -> str | None:
    """What to say of artifact tags that remove nothing from a run; None when all that are of its SAE are signed, or it has no SAE."""
    tower, weights = annotated_with(run_dir)
    rows = [tag for tag in active_tags(run_dir, tags_dir).to_pylist() if tag["verdict"] == "artifact" and not tag["active"]]
    ours = [tag for tag in rows if (tag["tower"], tag["weights"]) == (tower, weights)]
    if weights is None or not rows:
        return None
    text = f"{len(ours)} of its SAE that nobody signed (`k2 sae review`), {len(rows) - len(ours)} of another encoder or SAE"
    return f"{len(rows)} artifact tags are inactive for {run_dir}: {text}"


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
