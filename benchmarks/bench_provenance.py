"""What the stage `provenance` finds on labelled files, and what it costs, beside sd-parsers and exiftool on the same files.

    python benchmarks/bench_provenance.py --manifests DIR/MANIFEST.tsv DIR/MANIFEST.tsv [--peer-python VENV/bin/python]

A manifest is a table with `path`, `label` (real, synthetic, mixed, unknown) and `marks` or `provenance` (what the bytes declare, read by
hand). Files whose mark is evidence of AI count as positives; a declaration on a file labelled real is a false one. sd-parsers runs in
a Python that has it (it is no dependency); exiftool where it is installed, with a search for the words over its output, as people
use it. Times are CPU seconds of this process for us and for sd-parsers, CPU seconds of the child for exiftool.
Appends one JSON line to benchmarks/results/provenance.jsonl.
"""

import csv
import json
import platform
import re
import resource
import shutil
import statistics
import subprocess
import time
from collections import Counter, defaultdict
from pathlib import Path

import tyro

from curation import metadata
from curation.manifest import Reader
from curation.stages.provenance import facts
from pipelines.run_folder import commit, versions

POSITIVE = ("a1111-parameters", "a1111-usercomment", "comfyui", "comfyui-png", "comfyui-webp", "c2pa-declared-ai")
SD_PARSERS = """
import json, sys, time, sd_parsers
manager, out = sd_parsers.ParserManager(), {}
for path in json.load(sys.stdin):
    start = time.process_time()
    try:
        found = manager.parse(path) is not None
    except Exception as error:
        found = False
    out[path] = [found, time.process_time() - start]
print(json.dumps(out))
"""
WORDS = re.compile(
    r"trainedAlgorithmicMedia|Steps: \d+, |class_type|\"nodes\"|invokeai|NovelAI|Made with Google AI|sui_image_params", re.IGNORECASE
)


def read_manifests(paths: list[Path]) -> list[tuple[str, str, str]]:
    """(path, label, mark) of every file; the mark is `none` where the bytes declare nothing."""
    rows = []
    for manifest in paths:
        with open(manifest, newline="") as table:
            for row in csv.DictReader(table, delimiter="\t"):
                marks = [part.partition("=")[0].removeprefix("meta:") for part in row["provenance"].split("; ") if part]
                rows.append((str(manifest.parent / row["path"]), row["label"], row.get("marks") or " + ".join(sorted(marks)) or "none"))
    return rows


def score(rows: list[tuple[str, str, str]], declared: dict[str, bool]) -> dict:
    """Hits per mark, recall on the positives, and false declarations on real files."""
    hits: dict[str, Counter] = defaultdict(Counter)
    for path, label, mark in rows:
        hits[f"{label}: {mark}"]["files"] += 1
        hits[f"{label}: {mark}"]["declared"] += declared[path]
    positives = [path for path, _, mark in rows if mark in POSITIVE]
    return {
        "positives": len(positives),
        "found": sum(declared[path] for path in positives),
        "real": sum(label == "real" for _, label, _ in rows),
        "false": sum(declared[path] for path, label, _ in rows if label == "real"),
        "hits": {name: [count["declared"], count["files"]] for name, count in sorted(hits.items())},
    }


def exiftool(paths: list[str]) -> tuple[dict[str, bool], float]:
    """Declared by the words in exiftool's JSON, and its CPU seconds per file."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["exiftool", "-j", "-a", "-G1", "-@", "-"]
    done = subprocess.run(command, input="\n".join(paths), capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {row["SourceFile"]: bool(WORDS.search(json.dumps(row))) for row in json.loads(done.stdout)}
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {path: found.get(path, False) for path in paths}, spent / len(paths)


def main(manifests: list[Path], peer_python: str | None = None) -> None:
    """Measure and record.

    Args:
        manifests: Tables of labelled files.
        peer_python: A Python with sd-parsers and Pillow; without it that peer is left out.
    """
    rows = read_manifests(manifests)
    reader, declared, seconds, missed = Reader(), {}, {"plain": [], "metadata": [], "c2pa": []}, []
    for path, _, _ in rows:
        content = Path(path).read_bytes()
        start = time.process_time()
        row = facts(content, reader)
        spent = time.process_time() - start
        declared[path] = row["declared_ai"]
        blocks = metadata.read(content)
        kind = "c2pa" if blocks.c2pa else "metadata" if blocks.exif or blocks.xmp or blocks.iptc or blocks.text else "plain"
        seconds[kind].append(spent)
        if not blocks.c2pa and reader(content) is not None:
            missed.append(path)
    line = {
        "ours": score(rows, declared),
        "ms_per_file": {
            kind: {"files": len(s), "median": round(1e3 * statistics.median(s), 3), "max": round(1e3 * max(s), 2)}
            for kind, s in seconds.items()
            if s
        },
        "c2pa_missed_by_the_gate": missed,
    }
    paths = [path for path, _, _ in rows]
    if peer_python:
        done = subprocess.run([peer_python, "-c", SD_PARSERS], input=json.dumps(paths), capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        line["sd_parsers"] = score(rows, {path: found[path][0] for path in paths})
        line["sd_parsers"]["ms_per_file_median"] = round(1e3 * statistics.median(value[1] for value in found.values()), 3)
    if shutil.which("exiftool"):
        found, spent = exiftool(paths)
        line["exiftool"] = score(rows, found) | {"ms_per_file_mean": round(1e3 * spent, 2)}
    line |= {"machine": platform.processor() or platform.machine(), "commit": commit(), "versions": versions()}
    with open(Path(__file__).parent / "results" / "provenance.jsonl", "a") as results:
        results.write(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    tyro.cli(main)
