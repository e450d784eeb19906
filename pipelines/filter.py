"""`k2 filter`: a policy over the annotations of a run: selection and funnel."""

import json
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from curation.policy import Policy, explain, made_by, select
from curation.shards import write_json, write_table
from pipelines.cli import call

POLICIES = Path(__file__).parent / "policies"


def filter(run: str, policy: str, explain: str | None = None) -> int:
    """Choose images with a policy. Writes RUN/selection/POLICY.parquet (uid, bucket, crop) and POLICY.funnel.json.

    It takes seconds and is always done anew. The funnel goes to stderr as a table.

    Args:
        run: Run folder with annotations.
        policy: pretrain_256, pretrain_512, pretrain_1024, or a .sql file of yours.
        explain: A uid: say what every rule thinks of this image, and write nothing.
    """
    chosen = find(policy)
    if explain is not None:
        return _explain(run, chosen, explain)
    selection, funnel = select(run, chosen)
    write_table(selection, f"{run}/selection/{chosen.name}.parquet", made_by(run, chosen), row_group_size=100_000)
    write_json(funnel, f"{run}/selection/{chosen.name}.funnel.json")
    print(table(funnel), file=sys.stderr)
    print(json.dumps({name: funnel[name] for name in ("policy", "resolution", "num_images", "num_errors", "num_kept")}))
    return 0


def find(name_or_file: str) -> Policy:
    """A policy of ours by name, or a user's file, which is then called by its stem.

    Raises:
        ValueError: there is no such policy; the text lists the names.
    """
    ours = sorted((path.stem for path in POLICIES.glob("*.sql")), key=lambda name: (len(name), name))
    if name_or_file in ours:
        return Policy(name_or_file, (POLICIES / f"{name_or_file}.sql").read_text())
    path = Path(name_or_file)
    if path.suffix == ".sql" and path.is_file():
        if path.stem in ours and path.resolve().parent != POLICIES.resolve():
            raise ValueError(f"{path} has the name of the policy {path.stem!r} that comes with k2; rename your file")
        return Policy(path.stem, path.read_text())
    if path.suffix == ".sql":
        raise ValueError(f"--policy {name_or_file!r}: there is no such file")
    near = get_close_matches(name_or_file, ours, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"there is no policy {name_or_file!r}; {hint}choose from {', '.join(ours)}, or give a .sql file")


def table(funnel: dict[str, Any]) -> str:
    """The funnel as lines of text."""
    width = max(len(rule["name"]) for rule in funnel["rules"])
    lines = [
        f"{funnel['policy']}: {funnel['num_images']:,} images, {funnel['num_errors']:,} broken, {funnel['num_kept']:,} kept",
        f"{'rule':<{width}}  {'failed':>9} {'alone':>9} {'unknown':>9} {'kept so far':>12}  reason",
    ]
    for rule in funnel["rules"]:
        counts = f"{rule['failed']:>9,} {rule['failed_alone']:>9,} {rule['unknown']:>9,} {rule['kept_so_far']:>12,}"
        lines.append(f"{rule['name']:<{width}}  {counts}  {rule['comment']}")
    # A broken image has no facts; an image that decodes has them all, unless a stage or dedup has not seen it.
    behind = [rule["name"] for rule in funnel["rules"] if rule["unknown"] > funnel["num_errors"]]
    if behind:
        lines.append(f"unknown for images that decode: {', '.join(behind)}; are `k2 annotate` and `k2 dedup` complete?")
    return "\n".join(lines)


def _explain(run: str, policy: Policy, uid: str) -> int:
    """Print what every rule thinks of one image: text on stderr, a JSON line on stdout."""
    found = explain(run, policy, uid)
    words = {True: "true", False: "FALSE", None: "unknown"}
    for rule in found:
        values = ", ".join(f"{name} = {value if value is None else format(value, '.4g')}" for name, value in rule["values"].items())
        print(f"{words[rule['verdict']]:<8} {rule['rule']}: {rule['expression']}{f'  [{values}]' if values else ''}", file=sys.stderr)
    print(json.dumps({"uid": uid, "policy": policy.name, "rules": found}))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return call(filter, argv, "k2 filter")


if __name__ == "__main__":
    sys.exit(main())
