"""How well `k2 plan` foretells a run: the figures of probes of several sizes against those of annotating everything.

    python benchmarks/bench_plan.py --images DIR [--probes 64 256] [--recipe basics]

Core-seconds are of the clock, in one process, so run it on a quiet machine. Appends one JSON line to benchmarks/results/plan.jsonl.
"""

import contextlib
import io
import json
import platform
import tempfile
from pathlib import Path

import tyro

from pipelines.annotate import annotate
from pipelines.plan import plan
from pipelines.run_folder import commit, versions


def planned(images: int, **settings) -> dict[str, float]:
    """The figures of one plan that a whole run can be compared with."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert plan(images, **settings) == 0
    found = json.loads(out.getvalue().splitlines()[-1])
    return {
        "core_seconds": round(3600 * found["core_hours"]["total"], 2),
        "table_bytes": round(found["table_bytes"]["total"]),
        "source_bytes": round(found["source_bytes"]),
    }


def main(images: str, probes: tuple[int, ...] = (64, 256), recipe: str = "basics") -> None:
    """Measure and record.

    Args:
        images: A source of images.
        probes: Sizes of the probes.
        recipe: Stages to run.
    """
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            assert annotate(images, folder, recipe, ray="off", max_bad=1.0) == 0
        count = sum(json.loads(line)["rows"] for line in Path(folder, "report.jsonl").read_text().splitlines())
        actual = planned(count, run=folder)
    line = {"images": count, "actual": actual, "probes": {}}
    for probe in probes:
        found = planned(count, source=images, probe=probe, recipe=recipe)
        line["probes"][probe] = found | {f"{name}_over_actual": round(found[name] / actual[name], 3) for name in actual}
    line |= {"machine": platform.processor() or platform.machine(), "commit": commit(), "versions": versions()}
    with open(Path(__file__).parent / "results" / "plan.jsonl", "a") as results:
        results.write(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    tyro.cli(main)
