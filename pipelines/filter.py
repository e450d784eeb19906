"""`k2 filter`: a policy over the annotations of a run: selection and funnel; and what it thinks of one image or of other thresholds."""

import io
import json
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from curation.compare import compare as compared
from curation.explain import explain as explained
from curation.policy import select, silent_tags
from curation.printable import one_line, printable
from curation.rules import Policy
from curation.shards import write_bytes, write_json
from curation.sweep import sweep as swept
from pipelines.cli import call

POLICIES = Path(__file__).parent / "policies"


def filter(
    run: str | None = None,
    policy: str | None = None,
    explain: str | None = None,
    sweep: str | None = None,
    compare: tuple[str, str] | None = None,
    template: str | None = None,
) -> int:
    """Choose images with a policy. Writes RUN/selection/POLICY.parquet (uid, bucket, crop) and POLICY.funnel.json.

    It takes seconds and is always done anew. Tables go to stderr, JSON to stdout.

    Args:
        run: Run folder with annotations.
        policy: One of ours (k2 filter --template list) or a .sql file of yours.
        explain: A uid: say what every rule thinks of this image, and write nothing.
        sweep: A rule or a column: how many images each threshold would keep. Writes a picture, POLICY.sweep.NAME.png, and no selection.
        compare: Two policies: which images both keep, which only one, and the rules that make the difference. Writes nothing.
        template: The name of a policy of ours: print its text, to be changed in a file of yours; `list` prints the names.
    """
    if template is not None:
        print(listing() if template == "list" else find(template).sql, end="")
        return 0
    if run is None or (policy is None) == (compare is None):
        raise ValueError("give --run RUN and --policy POLICY, or --run RUN and --compare A B, or --template NAME")
    if compare is not None:
        return _compare(run, *(chosen(run, name) for name in compare))
    if explain is not None:
        return _explain(run, chosen(run, policy), explain)
    if sweep is not None:
        return _sweep(run, chosen(run, policy), sweep)
    found = find(policy)
    funnel = select(run, found, f"{run}/selection/{found.name}.parquet")
    write_json(funnel, f"{run}/selection/{found.name}.funnel.json")
    print(table(funnel), file=sys.stderr)
    if re.search(r"\btags\b", found.sql) and (silent := silent_tags(run)):
        print(printable(silent), file=sys.stderr)
    print(json.dumps({name: funnel[name] for name in ("policy", "resolution", "num_images", "num_errors", "num_kept")}))
    return 0


def ours() -> list[str]:
    """The names of the policies that come with k2, shortest first."""
    return sorted((path.stem for path in POLICIES.glob("*.sql")), key=lambda name: (not name.startswith("pretrain"), len(name), name))


def find(name_or_file: str) -> Policy:
    """A policy of ours by name, or a user's file, which is then called by its stem.

    Raises:
        ValueError: there is no such policy; the text lists the names.
    """
    names = ours()
    if name_or_file in names:
        return Policy(name_or_file, (POLICIES / f"{name_or_file}.sql").read_text())
    path = Path(name_or_file)
    if path.suffix == ".sql" and path.is_file():
        if path.stem in names and path.resolve().parent != POLICIES.resolve():
            raise ValueError(f"{path} has the name of the policy {path.stem!r} that comes with k2; rename your file")
        return Policy(path.stem, path.read_text())
    if path.suffix == ".sql":
        raise ValueError(f"--policy {name_or_file!r}: there is no such file")
    near = get_close_matches(name_or_file, names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"there is no policy {name_or_file!r}; {hint}choose from {', '.join(names)}, or give a .sql file")


def chosen(run: str, name_or_file: str) -> Policy:
    """A policy as `find` finds it, or by the name under which it has been run here, with the text that it had then."""
    kept = Path(run, "selection", f"{name_or_file}.funnel.json")
    if name_or_file not in ours() and "/" not in name_or_file and kept.is_file():
        return Policy(name_or_file, json.loads(kept.read_text())["sql"])
    return find(name_or_file)


def listing() -> str:
    """The policies of ours with the first sentence of their head."""
    lines = []
    for name in ours():
        head = [line.removeprefix("--").strip() for line in find(name).sql.splitlines() if line.startswith("--")]
        text = " ".join(line for line in head if line and not line.startswith("resolution:"))
        lines.append(f"{name:<22} {re.split(r'[.:] ', text + ' ')[0]}\n")
    return "".join(lines)


# --- tables for people ---


def table(funnel: dict[str, Any]) -> str:
    """The funnel as lines of text."""
    head = f"{funnel['policy']}: {funnel['num_images']:,} images, {funnel['num_errors']:,} broken, "
    rows = [["rule", "failed", "alone", "unknown", "kept so far", "reason"]]
    for rule in funnel["rules"]:
        counts = [f"{rule[name]:,}" for name in ("failed", "failed_alone", "unknown", "kept_so_far")]
        rows.append([rule["name"], *counts, rule["comment"]])
    lines = [head + f"{funnel['num_kept']:,} kept", lined(rows, right=(1, 2, 3, 4))]
    without = {rule["name"]: rule["without"] for rule in funnel["rules"] if rule.get("without")}
    if without:
        words = ", ".join(f"{name} ({', '.join(stages)})" for name, stages in without.items())
        lines.append(f"not applied, because the run has no such annotation: {words}")
    # A broken image has no facts; an image that decodes has them all, unless a stage or dedup has not seen it.
    behind = [rule["name"] for rule in funnel["rules"] if rule["unknown"] > funnel["num_errors"]]
    if behind:
        lines.append(f"unknown for images that decode: {', '.join(behind)}; are `k2 annotate` and `k2 dedup` complete?")
    return printable("\n".join(lines))


def lined(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows as columns of text; the columns in `right` end at one edge."""
    rows = [[one_line(str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(f"{cell:>{width}}" if i in right else f"{cell:<{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _explain(run: str, policy: Policy, uid: str) -> int:
    """Print what every rule thinks of one image: a table on stderr, a JSON line on stdout."""
    found = explained(run, policy, uid)
    words = {True: "true", False: "FALSE", None: "unknown"}
    rows = [["rule", "verdict", "value", "threshold", "margin", "reason"]]
    for rule in found["rules"]:
        compared = {term["column"] for term in rule["terms"]}
        lines = [
            [_short(term["column"], term["value"]), f"{term['operator']} {term['threshold']:g}", _margin(term)] for term in rule["terms"]
        ]
        # A column that stands alone in a comparison is named there.
        lines += [[_short(column, value), "", ""] for column, value in rule["values"].items() if column not in compared]
        for i, line in enumerate(lines or [["", "", ""]]):
            rows.append([rule["rule"], words[rule["verdict"]], *line, rule["comment"]] if i == 0 else ["", "", *line, ""])
    word = "kept" if found["kept"] else f"not kept{': ' + found['error'] if found['error'] else ''}"
    print(printable(f"{uid} by {policy.name}: {word}") + "\n" + lined(rows, right=(4,)), file=sys.stderr)
    print(json.dumps(found))
    return 0


def _short(column: str, value: Any) -> str:
    shown = format(value, ".4g") if isinstance(value, float) else "unknown" if value is None else str(value)
    return f"{column} = {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _margin(term: dict[str, Any]) -> str:
    return "" if term["margin"] is None else f"{term['margin']:+.3g}"


def _sweep(run: str, policy: Policy, what: str) -> int:
    """Print how many images each threshold keeps: a table on stderr, a JSON line with the picture's path on stdout."""
    from curation import plots  # matplotlib takes a second to load

    found = swept(run, policy, what)
    for one in found:
        rows = [[f"{one['column']} {one['operator']}", "alone", "kept", ""]]
        rows += [
            [f"{row['threshold']:g}", f"{row['alone']:,}", f"{row['kept']:,}", "<- now" if row["present"] else ""] for row in one["rows"]
        ]
        head = f"{one['rule'] or 'no rule'}: {one['num_images']:,} images decode, {one['unknown']:,} without a value"
        print(printable(head) + "\n" + lined(rows, right=(0, 1, 2)) + "\n", file=sys.stderr)
    path = f"{run}/selection/{policy.name}.sweep.{re.sub(r'[^A-Za-z0-9_.]+', '_', what).strip('._')}.png"
    buffer = io.BytesIO()
    plots.sweeps(found).savefig(buffer, format="png", dpi=120)
    write_bytes(buffer.getvalue(), path)
    print(json.dumps({"policy": policy.name, "sweep": what, "picture": path, "thresholds": found}))
    return 0


def _compare(run: str, a: Policy, b: Policy) -> int:
    """Print what two policies keep: tables on stderr, a JSON line on stdout."""
    found = compared(run, a, b)
    words = f"both keep {found['both']:,}, only {a.name} {found['only_a']:,}, only {b.name} {found['only_b']:,}"
    print(printable(f"{words}, neither {found['neither']:,}"), file=sys.stderr)
    for side, keeps, refuses in (("only_a", a.name, b.name), ("only_b", b.name, a.name)):
        if found[side]:
            rows = [[f"stopped by {refuses}", "failed", "alone", "unknown", "reason"]]
            rows += [
                [row["rule"], *(f"{row[name]:,}" for name in ("failed", "alone", "unknown")), row["comment"]]
                for row in found[f"{side}_because"]
            ]
            uids = "\n".join(f"  {printable(uid)}" for uid in found[f"{side}_uids"])
            print(f"\nonly {printable(keeps)} keeps {found[side]:,}\n{lined(rows, right=(1, 2, 3))}\nsuch as\n{uids}", file=sys.stderr)
    print(json.dumps(found))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return call(filter, argv, "k2 filter")


if __name__ == "__main__":
    sys.exit(main())
