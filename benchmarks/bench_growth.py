"""Does an image cost the same, and memory stay flat, when there are a hundred times as many?

    python benchmarks/bench_growth.py [--sizes 1000 10000 100000] [--per-shard 1000] [--ray off]

`k2 annotate --recipe basics` on small JPEGs (64 to 128 px) in tars; every size in a process of its own, after a first small run that pays
for imports. `off` is one process; with Ray (`--ray auto`) the workers' peaks are read from /proc. Time is processor time of the process
(off) or of the shards' reports (Ray), so that a busy machine changes it little, and the clock beside it.
Appends one JSON line to benchmarks/results/growth.jsonl and draws docs/images/growth.png.
"""

import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import tyro
from small_photos import make_tars

ROOT = Path(__file__).parents[1]


def main(sizes: tuple[int, ...] = (1_000, 10_000, 100_000), per_shard: int = 1_000, ray: str = "off", picture: bool = True) -> None:
    """Measure and record.

    Args:
        sizes: Images of each run, small first.
        per_shard: Images in a tar.
        ray: off, or auto for two Ray workers on this machine.
        picture: Draw docs/images/growth.png.
    """
    runs = []
    with tempfile.TemporaryDirectory() as name:
        warm = Path(name, "warm")
        make_tars(warm, 64, 64)
        for size in sizes:
            source = Path(name, f"tars{size}")
            make_tars(source, size, per_shard)
            command = [sys.executable, __file__, "--measure", str(warm), str(source), str(Path(name, f"run{size}")), ray]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            runs.append({"images": size} | json.loads(result.stdout.splitlines()[-1]))
            print(json.dumps(runs[-1]), file=sys.stderr)
    from pipelines.run_folder import commit, versions

    first, last = runs[0], runs[-1]
    line = {
        "ray": ray,
        "runs": runs,
        "time_per_image_last_over_first": round(last["cpu_ms_per_image"] / first["cpu_ms_per_image"], 3),
        "peak_memory_last_over_first": round(last["peak_mb"] / first["peak_mb"], 3),
        "commit": commit(),
        "versions": versions(),
    }
    with open(Path(__file__).parent / "results" / "growth.jsonl", "a") as results:
        results.write(json.dumps(line) + "\n")
    print(json.dumps(line))
    if picture:
        draw(runs, ROOT / "docs" / "images" / "growth.png")


def measure(warm: str, source: str, run: str, ray: str) -> None:
    """One run in this process; prints its figures as JSON."""
    from pipelines.annotate import annotate

    workers = None if ray == "off" else 2
    annotate(warm, f"{run}-warm", "basics", "off", max_bad=1.0)
    peaks, over = {}, threading.Event()
    watching = threading.Thread(target=watch_workers, args=(peaks, over), daemon=True)
    if ray != "off":
        watching.start()
    wall, cpu = time.perf_counter(), time.process_time()
    assert annotate(source, run, "basics", ray, workers, max_bad=1.0) == 0
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    over.set()
    reports = [json.loads(line) for line in Path(run, "report.jsonl").read_text().splitlines()]
    rows, seconds = sum(report["rows"] for report in reports), sum(sum(report["seconds"].values()) for report in reports)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {
                "cpu_ms_per_image": round(1000 * (cpu if ray == "off" else seconds) / rows, 4),
                "clock_ms_per_image": round(1000 * wall / rows, 4),
                "peak_mb": round(max([own, *peaks.values()]), 1),
                "driver_peak_mb": round(own, 1),
                "worker_peak_mb": [round(peak, 1) for peak in peaks.values()],
            }
        )
    )


def watch_workers(peaks: dict[str, float], over: threading.Event) -> None:
    """Peak resident memory (MB) of every worker process, as the kernel counts it, until `over`."""
    while not over.wait(0.5):
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if (place / "cmdline").read_bytes().startswith(b"ray::_Worker"):
                    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
                    peaks[place.name] = int(status["VmHWM"].split()[0]) / 1024
            except (OSError, KeyError):
                continue


def draw(runs: list[dict], path: Path) -> None:
    """Two panels over the number of images: time per image and peak memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, key, label in zip(figure.subplots(1, 2), ("cpu_ms_per_image", "peak_mb"), ("ms per image", "peak memory, MB"), strict=True):
        axis.plot([run["images"] for run in runs], [run[key] for run in runs], "o-", color="#2a6f97")
        axis.set(xscale="log", xlabel="images", ylabel=label, ylim=(0, 1.4 * max(run[key] for run in runs)))
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        tyro.cli(main)
