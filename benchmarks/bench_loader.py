"""Loaders beside each other: ours, webdataset, litdata, mosaicml-streaming (and safetensors for latents), on the same samples in one run.

    python benchmarks/bench_loader.py --images DIR --peers /work/peers/loader/v/bin/python [--rounds 3]

--peers is the Python of an environment of its own with webdataset, litdata and mosaicml-streaming (which wants transformers below 5,
so it cannot be installed beside diffusers), and torch, torchvision, simplejpeg; see CONTRIBUTING.

Samples are JPEGs of 256 px made of crops of the images, or float16 latents of 32 KiB; batches of 32 with captions, an epoch shuffled
as far as each can. Rates are samples per second of processor time (threads and workers counted) and of wall time; medians of
interleaved rounds. `displacement` is the mean of |place - number| / N (1/3 is perfect), `near` the share of neighbours within 64
numbers. Appends JSON lines to benchmarks/results/loader.jsonl.
"""

import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import simplejpeg
import tyro
from loader_peers import BATCH, SHAPE
from PIL import Image, ImageOps

from curation.schema import LATENTS, PACKED
from curation.shards import fingerprint, write_json, write_row_groups
from curation.shuffle import draws
from k2model.data import decode_into
from pipelines.run_folder import commit, versions

SIDE, PER_FILE = 256, 16  # pixels; row groups of a packed file
HERE = Path(__file__).parent


def write_source(images: str, kind: str, count: int, data: Path) -> int:
    """The samples as files in the order of the source; returns their mean bytes."""
    (data / "source").mkdir(parents=True)
    rng, size = np.random.default_rng(0), 0
    paths = sorted(Path(images).rglob("*.jpg"))
    for i in range(count):
        if kind == "jpeg":
            with Image.open(paths[i % len(paths)]) as image:
                whole = image.convert("RGB")
            zoom = 1 - 0.4 * rng.random()  # so that copies of one image differ
            cut = whole.crop((0, 0, max(64, int(whole.width * zoom)), max(64, int(whole.height * zoom))))
            buffer = io.BytesIO()
            ImageOps.fit(cut, (SIDE, SIDE), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=95, subsampling=0)  # as k2 pack
            value = buffer.getvalue()
        else:
            value = rng.standard_normal(SHAPE).astype("<f2").tobytes()
        size += len(value)
        (data / "source" / f"{i:06d}.{'jpg' if kind == 'jpeg' else 'bin'}").write_bytes(value)
    (data / "captions.json").write_text(json.dumps([f"sample {i}, " + "a photograph of something " * 15 for i in range(count)]))
    return size // count


def write_packed(place: Path, samples: list[tuple[int, str, bytes]], kind: str) -> None:
    """The samples as `k2 pack` leaves them, in the order of its draws; with `latent` images stay empty and latents/ is written."""
    uids = pa.array([f"s/{number:06d}" for number, _, _ in samples])
    high, low = draws(uids, 0)
    shuffled = np.lexsort((low, high)).tolist()
    groups = [shuffled[i : i + BATCH] for i in range(0, len(shuffled), BATCH)]
    same = {"caption_source": "txt", "bucket_height": SIDE, "bucket_width": SIDE, "source_height": SIDE, "source_width": SIDE}
    same |= {"other_captions": [], "crop_top": 0, "crop_left": 0, "crop_height": SIDE, "crop_width": SIDE, "shard": "s", "padding": False}
    made_by, batches = fingerprint([kind, len(samples)]), []
    for first in range(0, len(groups), PER_FILE):
        name, tables, latents = f"{first // PER_FILE:05d}.parquet", [], []
        for i, group in enumerate(groups[first : first + PER_FILE]):
            rows = [
                same | {"uid": f"s/{n:06d}", "key": f"{n:06d}", "caption": samples[n][1], "image": samples[n][2] if kind == "jpeg" else b""}
                for n in group
            ]
            tables.append(pa.Table.from_pylist(rows, PACKED))
            latents.append(pa.table([tables[-1]["uid"], pa.array([samples[n][2] for n in group], pa.binary())], schema=LATENTS))
            batches.append({"file": name, "row_group": i, "bucket_height": SIDE, "bucket_width": SIDE, "num_rows": len(group)})
        write_row_groups(tables, place / name, PACKED, made_by)
        if kind == "latent":
            write_row_groups(latents, place / "latents" / name, LATENTS, made_by, plain=True)
    write_json([[samples[n][0] for n in group] for group in groups], place / "numbers.json")
    description = {"fingerprint": made_by, "policy": "bench", "resolution": SIDE, "batch_size": BATCH, "seed": 0}
    write_json(description | {"num_rows": len(samples), "num_batches": len(batches), "batches": batches}, place / "dataset.json")


def decoders(source: Path, rounds: int) -> dict[str, dict[str, int]]:
    """Images of the source per second of processor time, by decoder, and how many of them have other pixels than Pillow's."""
    import cv2
    import torch
    from torchvision.io import decode_jpeg

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    images, pixels = [path.read_bytes() for path in sorted(source.iterdir())[:500]], np.empty((SIDE, SIDE, 3), np.uint8)

    def ours(data: bytes) -> np.ndarray:
        decode_into(memoryview(data), pixels)
        return pixels

    ways = {
        "pillow": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
        "torchvision": lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0).numpy(),
        "opencv": lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB),
        "simplejpeg, fast DCT": lambda data: simplejpeg.decode_jpeg(data, "RGB", True, True),
        "ours (simplejpeg)": ours,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            clock = time.process_time()
            for image in images:
                way(image)
            rates[name].append(len(images) / (time.process_time() - clock))
    found = {name: round(statistics.median(values)) for name, values in rates.items()}
    others = {name: sum(not np.array_equal(way(image), ways["pillow"](image)) for image in images[:100]) for name, way in ways.items()}
    return {"rates": found, "other_pixels_than_pillow_of_100": others}


def run(python: str, *arguments: str) -> dict:
    """loader_peers.py in a process of its own; its JSON line."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(HERE.parent) if python == sys.executable else "",
    }
    done = subprocess.run([python, str(HERE / "loader_peers.py"), *arguments], env=environment, capture_output=True, text=True, timeout=540)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1])


def main(images: str, peers: str, rounds: int = 3, jpegs: int = 2048, latents: int = 5120, record: bool = True) -> None:
    """Measure and record.

    Args:
        images: A folder of JPEG files.
        peers: The Python of the peers' environment.
        rounds: How often each is run; medians count.
        jpegs: Samples of 256 px, a multiple of 32; 0 leaves them out.
        latents: Samples of 32 KiB, a multiple of 32; 0 leaves them out.
        record: Append to benchmarks/results/loader.jsonl.
    """
    pythons = {
        "row groups": sys.executable,
        "ours": sys.executable,
        "processes": sys.executable,
        "safetensors": sys.executable,
        "webdataset": peers,
        "litdata": peers,
        "streaming": peers,
    }
    asked = subprocess.run(
        [peers, "-c", "from importlib.metadata import version as v; print(v('webdataset'), v('litdata'), v('mosaicml-streaming'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    found_versions = dict(zip(("webdataset", "litdata", "mosaicml-streaming"), asked.stdout.split(), strict=True))
    cases = {"jpeg": [(name, workers, decoder) for workers in (0, 2) for name, decoder in JPEG_RUNS]}
    cases["jpeg"].append(("processes", 2, "simplejpeg"))
    cases["latent"] = [(name, 0, "none") for name in ("ours", "row groups", "safetensors", "litdata", "webdataset", "streaming")]
    for kind, count in ((kind, count) for kind, count in (("jpeg", jpegs), ("latent", latents)) if count):
        with tempfile.TemporaryDirectory() as place:
            data = Path(place) / kind
            mean_bytes = write_source(images, kind, count, data)
            for name in dict.fromkeys(name for name, _, _ in cases[kind] if name not in ("processes", "row groups")):
                run(pythons[name], "write", name, kind, str(data))
            decoded = decoders(data / "source", rounds) if kind == "jpeg" else None
            results: dict[tuple, list[dict]] = {case: [] for case in cases[kind]}
            for _ in range(rounds):
                for case, done in results.items():
                    name, workers, decoder = case
                    done.append(run(pythons[name], name, kind, str(data), str(workers), decoder))
        rows = []
        for (name, workers, decoder), done in results.items():
            row = {"loader": name, "workers": workers, "decoder": decoder, "all_once": all(one["all_once"] for one in done)}
            row["samples_per_cpu_s"] = round(statistics.median(one["samples"] / one["cpu_s"] for one in done))
            row["samples_per_s"] = round(statistics.median(one["samples"] / one["wall_s"] for one in done))
            row |= {key: round(statistics.median(one[key] for one in done), 3) for key in ("displacement", "near", "resume_s")}
            row["resume_exact"] = all(one["resume_exact"] for one in done)
            rows.append(row)
        line = {
            "benchmark": "loader",
            "kind": kind,
            "samples": count,
            "mean_bytes": mean_bytes,
            "batch": BATCH,
            "rounds": rounds,
            "rows": rows,
        }
        line |= {"decoded_per_cpu_s": decoded} if decoded else {}
        line |= {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "commit": commit()}
        line["versions"] = versions() | found_versions
        print(json.dumps(line))
        if record:
            with open(HERE / "results" / "loader.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")


JPEG_RUNS = (
    ("ours", "simplejpeg"),
    ("webdataset", "own"),
    ("webdataset", "simplejpeg"),
    ("litdata", "own"),
    ("litdata", "simplejpeg"),
    ("streaming", "own"),
    ("streaming", "simplejpeg"),
)


if __name__ == "__main__":
    tyro.cli(main)
