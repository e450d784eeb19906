"""Speed of the CPU facts per core: `k2 annotate --recipe basics --ray off` against its own C calls and against peers that do less.

    python benchmarks/bench_basics.py --images DIR [--peers DIR] [--rounds 3]

DIR holds real photographs with a MANIFEST.tsv (columns path, label, format, width, height); two sets are made of the ones labelled real
and thrown away again, the largest first: 500x400 pixels, and 2000x1500 (most of them enlarged: 0.15 bytes per pixel, as the peers'
study had; a camera's own are denser, and then all of them are nearer to the decoder's cost).

Everything runs in a process of its own on one core. CPU seconds of the process and its children are counted on a few files and on all
files; the difference, per file, is the net cost without start-up. The parts are timed one by one on the same files and summed.
Peers come from virtual environments DIR/<name>, made like this (cleanvision, datatrove and data-juicer in the same way):

    python -m venv DIR/imagededup && DIR/imagededup/bin/pip install imagededup==0.3.3.post2

with cleanvision==0.3.7; datatrove==0.10.1 orjson imagehash; py-data-juicer==1.6.1 aiohttp imagededup torch (Data-Juicer does not declare
the last three). Appends one JSON line to benchmarks/results/basics.jsonl. Read ratios: seconds are of a machine that may be busy.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

FEW = 0.2  # share of the files that the start-up run sees
ONE_CORE = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "OPENCV_FOR")} | {
    "TOKENIZERS_PARALLELISM": "false"
}

# What people write by hand, straight from the READMEs: {facts} is what they want to know.
BY_HAND = """
import hashlib, io, sys
from pathlib import Path
import imagehash
from PIL import Image
for path in sorted(Path(sys.argv[1]).iterdir()):
    content = path.read_bytes()
    hashlib.md5(content).hexdigest()
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    imagehash.phash(picture, hash_size=12)
    {colorhash}
"""
PARTS = """
import sys
sys.path.insert(0, {root!r})
from benchmarks.bench_basics import parts
parts(sys.argv[1])
"""
PEERS = {
    "imagededup": """
import sys
from imagededup.methods import PHash
PHash(verbose=False).encode_images(image_dir=sys.argv[1], num_enc_workers=0)
""",
    "cleanvision": """
import sys
from cleanvision import Imagelab
if __name__ == "__main__":
    Imagelab(data_path=sys.argv[1]).find_issues(n_jobs=1, verbose=False)
""",
    "datatrove": """
import hashlib, io, sys, tempfile
from pathlib import Path
import imagehash
from PIL import Image
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.writers import JsonlWriter
def read(data, rank=0, world_size=1):
    for path in sorted(Path(sys.argv[1]).iterdir()):
        yield Document(text=str(path), id=path.name)
def facts(data, rank=0, world_size=1):
    for document in data:
        content = Path(document.text).read_bytes()
        picture = Image.open(io.BytesIO(content)).convert("RGB")
        document.metadata["md5"] = hashlib.md5(content).hexdigest()
        document.metadata["phash"] = str(imagehash.phash(picture, hash_size=12))
        yield document
if __name__ == "__main__":
    out = tempfile.mkdtemp()
    LocalPipelineExecutor([read, facts, JsonlWriter(out)], logging_dir=out + "/logs", tasks=1, workers=1).run()
""",
    "data-juicer": """
import json, sys, tempfile
from pathlib import Path
if __name__ == "__main__":
    out = tempfile.mkdtemp()
    with open(out + "/in.jsonl", "w") as file:
        for path in sorted(Path(sys.argv[1]).iterdir()):
            file.write(json.dumps({"images": [str(path)], "text": "x"}) + "\\n")
    recipe = {"project_name": "bench", "dataset_path": out + "/in.jsonl", "export_path": out + "/out.jsonl", "np": 1, "use_cache": False,
              "open_tracer": False, "process": [{"image_shape_filter": {"min_width": 1}}, {"image_deduplicator": {"method": "phash"}}]}
    Path(out + "/recipe.yaml").write_text(json.dumps(recipe))
    from data_juicer.config import init_configs
    from data_juicer.core import DefaultExecutor
    DefaultExecutor(init_configs(["--config", out + "/recipe.yaml"])).run()
""",
}


def make_sets(images: Path, folder: Path, small: int, large: int) -> dict[str, Path]:
    """{name of the set: folder of JPEGs at quality 90}, from the photographs that the manifest labels real."""
    from PIL import Image, ImageOps

    head, *lines = (images / "MANIFEST.tsv").read_text().splitlines()
    rows = [dict(zip(head.split("\t"), line.split("\t"), strict=False)) for line in lines]
    rows = [row for row in rows if row["label"] == "real" and row["format"] == "JPEG"]
    rows.sort(key=lambda row: -min(int(row["width"]), int(row["height"])))
    if len(rows) < max(small, large):
        raise ValueError(f"{images}/MANIFEST.tsv lists {len(rows)} real JPEGs; {max(small, large)} are wanted (--small, --large)")
    sets = {}
    for count, size in ((small, (500, 400)), (large, (2000, 1500))):
        place = sets[f"{size[0]}x{size[1]}"] = folder / f"{size[0]}x{size[1]}"
        place.mkdir()
        for i, row in enumerate(rows[:count]):
            with Image.open(images / row["path"]) as image:
                ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS).save(place / f"{i:05d}.jpg", quality=90)
    return sets


def parts(folder: str) -> None:
    """Time each C call that the facts need, one by one over the files of a folder; prints {part: CPU milliseconds per file}."""
    import hashlib
    import time

    import cv2
    import numpy as np
    import simplejpeg
    from PIL import Image

    from curation.decode import VIEW_SIDE, view_factor
    from curation.stages.basics import _BINS, _SUM, SAMPLE_SIDE

    files = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
    cost: dict[str, float] = {}

    def timed(name: str, call, *columns: list) -> list:
        start = time.process_time()
        made = [call(*row) for row in zip(*columns, strict=True)]
        cost[name] = cost.get(name, 0.0) + time.process_time() - start
        return made

    def decoded(content: bytes):
        height, width, _, _ = simplejpeg.decode_jpeg_header(content)
        factor = view_factor(width, height)
        return simplejpeg.decode_jpeg(content, "RGB", min_height=-(-height // factor), min_width=-(-width // factor))

    def shrunk(view, side: int, how: int):
        scale = side / min(view.shape[:2])
        return cv2.resize(view, (round(view.shape[1] * scale), round(view.shape[0] * scale)), interpolation=how) if scale < 1 else view

    def quartered(luma):
        half = cv2.resize(luma, (luma.shape[1] // 2, luma.shape[0] // 2), interpolation=cv2.INTER_AREA)
        return cv2.resize(half, (half.shape[1] // 2, half.shape[0] // 2), interpolation=cv2.INTER_AREA)

    def colors(sample):
        bins = cv2.transform(cv2.LUT(cv2.cvtColor(sample, cv2.COLOR_RGB2HSV_FULL), _BINS), _SUM)
        return cv2.calcHist([bins], [0], cv2.inRange(cv2.cvtColor(sample, cv2.COLOR_RGB2GRAY), 32, 255), [24], [0, 24])

    cv2.setNumThreads(1)
    batch = 16  # as many pixels at a time as `annotate` holds, so that caches are as warm
    for at in range(0, len(files), batch):
        content = files[at : at + batch]
        timed("md5", lambda c: hashlib.md5(c, usedforsecurity=False).digest(), content)
        views = timed("scaled JPEG decode", decoded, content)
        pixels = timed("resize to 512", lambda v: shrunk(v, VIEW_SIDE, cv2.INTER_LINEAR), views)
        lumas = timed("grey", lambda v: cv2.cvtColor(v, cv2.COLOR_RGB2GRAY), pixels)
        whole = timed("grey of the view", lambda v: cv2.cvtColor(v, cv2.COLOR_RGB2GRAY), views) if views[0] is not pixels[0] else lumas
        small = timed("phash: means", quartered, whole)
        timed("phash: Lanczos to 48", lambda v: Image.fromarray(v).resize((48, 48), Image.Resampling.LANCZOS), small)
        samples = timed("sample", lambda v: shrunk(v, SAMPLE_SIDE, cv2.INTER_NEAREST), views)
        timed("colorhash: bins", colors, samples)
        timed("histograms", lambda v: [cv2.calcHist([v], [c], None, [256], [0, 256]) for c in range(3)], samples)
        timed("white and black", lambda v: (white(v), black(v)), samples)
        edges = timed("Laplacian", lambda v: cv2.Laplacian(v, cv2.CV_16S, ksize=1, borderType=cv2.BORDER_REFLECT), lumas)
        timed("mean square", lambda v: cv2.norm(v, cv2.NORM_L2SQR), edges)
        timed("border: sort", lambda v: [np.sort(line) for line in (v[0], v[-1], v[:, 0], v[:, -1])], lumas)
        timed("JPEG encode", lambda v: simplejpeg.encode_jpeg(v, 75, "RGB", "420"), pixels)
    print(json.dumps({name: 1000 * seconds / len(files) for name, seconds in cost.items()}))


def white(pixels) -> int:
    import cv2

    return cv2.countNonZero(cv2.inRange(pixels, (250, 250, 250), (255, 255, 255)))


def black(pixels) -> int:
    import cv2

    return cv2.countNonZero(cv2.inRange(pixels, (0, 0, 0), (5, 5, 5)))


def run(command: list[str]) -> tuple[float, str]:
    """(CPU seconds of a command and its children, its standard output)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=os.environ | ONE_CORE, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def main(images: Path, peers: Path | None = None, small: int = 300, large: int = 70, rounds: int = 3) -> None:
    """Measure and record.

    Args:
        images: Real photographs with a MANIFEST.tsv.
        peers: Folder of the peers' virtual environments; without it only the recipe by hand is the peer.
        small: Files of about 500x400.
        large: Files of about 2000x1500.
        rounds: How often each is run, in turn; the median counts.
    """
    from pipelines.run_folder import commit, versions

    root = str(Path(__file__).parent.parent)
    missing = [name for name in PEERS if not (peers and (peers / name / "bin" / "python").exists())]
    line: dict = {"rounds": rounds, "missing_peers": missing, "sets": {}}
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        for name, folder in make_sets(images, work, small, large).items():
            files = sorted(folder.iterdir())
            few = work / f"few {name}"
            few.mkdir()
            for path in files[: max(1, int(FEW * len(files)))]:
                os.link(path, few / path.name)
            rest = len(files) - len(list(few.iterdir()))
            commands = {
                "k2": [sys.executable, "-m", "pipelines.annotate", "--recipe", "basics", "--ray", "off", "--source"],
                "by_hand": [sys.executable, "-c", BY_HAND.format(colorhash="imagehash.colorhash(picture, binbits=3)")],
                "by_hand_phash_only": [sys.executable, "-c", BY_HAND.format(colorhash="")],
            }
            for peer, script in PEERS.items():
                if peer not in missing:
                    (work / f"bench_{peer}.py").write_text(script)
                    commands[peer] = [str(peers / peer / "bin" / "python"), str(work / f"bench_{peer}.py")]
            net: dict[str, list[float]] = {contender: [] for contender in commands}
            measured: dict[str, list[float]] = {}
            for _ in range(rounds):
                for contender, command in commands.items():
                    seconds = []
                    for source in (few, folder):
                        with tempfile.TemporaryDirectory() as out:
                            more = [str(source), "--out", out] if contender == "k2" else [str(source)]
                            seconds.append(run([*command, *more])[0])
                    net[contender].append(1000 * (seconds[1] - seconds[0]) / rest)
                    print(f"{name} {contender}: {net[contender][-1]:.2f} ms per image", file=sys.stderr, flush=True)
                for part, cost in json.loads(run([sys.executable, "-c", PARTS.format(root=root), str(folder)])[1]).items():
                    measured.setdefault(part, []).append(cost)
            median = {contender: statistics.median(values) for contender, values in net.items()}
            cost = {part: statistics.median(values) for part, values in measured.items()}
            hashing = sum(cost[p] for p in cost if p == "md5" or "decode" in p or "phash" in p or "grey" in p)
            line["sets"][name] = {
                "files": len(files),
                "mean_bytes": sum(path.stat().st_size for path in files) // len(files),
                "net_ms_per_image": {contender: round(value, 3) for contender, value in median.items()},
                "spread": {contender: [round(min(v), 3), round(max(v), 3)] for contender, v in net.items()},
                "parts_ms": {part: round(value, 3) for part, value in cost.items()},
                "parts_over_k2": round(sum(cost.values()) / median["k2"], 3),
                "decode_and_hash_over_k2": round(hashing / median["k2"], 3),
                "times_faster_than": {
                    contender: round(value / median["k2"], 2) for contender, value in median.items() if contender != "k2"
                },
            }
    line |= {"machine": platform.processor() or platform.machine(), "commit": commit(), "versions": versions()}
    with open(Path(__file__).parent / "results" / "basics.jsonl", "a") as results:
        results.write(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    tyro.cli(main)
