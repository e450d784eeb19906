"""Does the pipeline keep a real tower fed? SigLIP-2 with random weights in open_clip's format, from JPEGs in tars.

    python benchmarks/bench_feed.py [--model ViT-B-16-SigLIP2-256] [--images 96] [--rounds 3]

On CPUs: `k2 annotate --ray off` (read, decode, prepare, forward, Parquet) against the bare forward loop on the same prepared inputs, on
the same core, in interleaved rounds; the ratio is the share of the bare loop's speed that is left. On a machine with a GPU (and
--images of some ten thousands): two pools on Ray, with the share of time that the GPU is busy as nvidia-smi sees it, from its first to its
last work, and what limits it. The weights are random: speed does not depend on them.
Appends one JSON line to benchmarks/results/feed.jsonl.
"""

import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch
import tyro
from safetensors.torch import save_file
from small_photos import make_tars

from curation.decode import decode_for
from curation.sources import list_shards, read_samples
from curation.stages.embedding import Embedding
from curation.towers import Encoder, Siglip, loaded
from pipelines import recipes
from pipelines.annotate import annotate
from pipelines.progress import limit
from pipelines.run_folder import commit, versions


def random_weights(model: str, folder: Path) -> Siglip:
    """A tower whose weights are random, saved as open_clip saves a whole model (the text tower left out)."""
    torch.manual_seed(0)
    small_text = open_clip.get_model_config(model)["text_cfg"] | {"vocab_size": 64, "layers": 1}
    state = open_clip.create_model(model, text_cfg=small_text).state_dict()
    save_file({key: value.contiguous() for key, value in state.items() if key.startswith("visual.")}, folder / "weights.safetensors")
    return Siglip(model, str(folder / "weights.safetensors"))


def prepared(source: Path, tower: Siglip) -> list[np.ndarray]:
    """What the pipeline would send: the same inputs, in batches of the same size."""
    batches = []
    for shard in list_shards(str(source)):
        for samples in read_samples(shard, 128):
            batches.append(tower.prepare([decode_for(image, tower.reads).view for image in samples["image"].to_pylist()]))
    return batches


def bare(encoder: Encoder, batches: list[np.ndarray]) -> tuple[float, float]:
    """(clock, processor) seconds of the forward loop alone."""
    clock, processor = time.perf_counter(), time.process_time()
    for batch in batches:
        encoder.pooled(batch)
    return time.perf_counter() - clock, time.process_time() - processor


def pipeline(source: Path, run: str, ray: str, workers: int | None) -> tuple[float, float]:
    clock, processor = time.perf_counter(), time.process_time()
    assert annotate(str(source), run, "feed", ray, workers) == 0
    return time.perf_counter() - clock, time.process_time() - processor


def gpu_busy(samples: list[float], over: threading.Event) -> None:
    """Utilisation of the first GPU in percent, five times a second."""
    while not over.wait(0.2):
        shown = subprocess.run(
            ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-i", "0"], capture_output=True
        )
        samples.append(float(shown.stdout or 0))


def on_gpu(source: Path, folder: str, tower: Siglip, num_images: int) -> dict:
    """Two pools on Ray: rate, busy share, limit; and the bare loop's rate on the same GPU."""
    encoder, batches = loaded(tower, "cuda"), prepared(source, tower)
    bare(encoder, batches[:2])
    clock, _ = bare(encoder, batches)
    samples, over = [], threading.Event()
    threading.Thread(target=gpu_busy, args=(samples, over), daemon=True).start()
    whole, _ = pipeline(source, f"{folder}/gpu", "auto", None)
    over.set()
    at_work = [i for i, busy in enumerate(samples) if busy > 0] or [0]
    reports = [json.loads(line) for line in Path(folder, "gpu/report.jsonl").read_text().splitlines()]
    seconds: dict[str, float] = {}
    for report in reports:
        for part, spent in report["seconds"].items():
            seconds[part] = seconds.get(part, 0.0) + spent
    return {
        "gpu": torch.cuda.get_device_name(),
        "cpus": os.cpu_count(),
        "bare_images_per_s": round(num_images / clock, 1),
        "pipeline_images_per_s_with_start": round(num_images / whole, 1),
        "busy_share": round(statistics.mean(samples[at_work[0] : at_work[-1] + 1]) / 100, 3),
        "limit": limit(seconds, {"siglip"}),
    }


def main(model: str = "ViT-B-16-SigLIP2-256", images: int = 96, rounds: int = 3, width: int = 500, height: int = 400) -> None:
    """Measure and record.

    Args:
        model: A SigLIP-2 of open_clip.
        images: JPEGs, 128 in a tar (1024 on a GPU).
        rounds: How often each is run; the median counts.
        width: Of an image, pixels.
        height: Of an image, pixels.
    """
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "tars")
        make_tars(source, images, 1024 if gpu else 128, (min(width, height), max(width, height)))
        tower = random_weights(model, Path(folder))
        recipes.ANNOTATE["feed"] = lambda: (Embedding(tower),)
        line = {"model": model, "images": images, "size": [min(width, height), max(width, height)]}
        if gpu:
            line |= on_gpu(source, folder, tower, images)
        else:
            os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})  # one core for both
            torch.set_num_threads(1)
            encoder, batches, seconds = loaded(tower, "cpu"), prepared(source, tower), {"bare": [], "pipeline": []}
            bare(encoder, [batches[0][:4]])
            for i in range(rounds):
                seconds["bare"].append(bare(encoder, batches))
                seconds["pipeline"].append(pipeline(source, f"{folder}/run{i}", "off", None))
            clock, processor = ({name: statistics.median(t[k] for t in times) for name, times in seconds.items()} for k in (0, 1))
            vectors = np.frombuffer(b"".join(pq.read_table(f"{folder}/run0/annotations/siglip/00000.parquet")["vector"].to_pylist()), "<f2")
            assert np.array_equal(vectors.reshape(-1, tower.dim), encoder.pooled(batches[0]).astype("<f2"))
            line |= {
                "bare_images_per_s": round(images / clock["bare"], 2),
                "pipeline_images_per_s": round(images / clock["pipeline"], 2),
                "pipeline_over_bare": round(clock["bare"] / clock["pipeline"], 3),
                "pipeline_over_bare_by_processor_time": round(processor["bare"] / processor["pipeline"], 3),
            }
    line |= {"rounds": rounds, "commit": commit(), "versions": versions()}
    with open(Path(__file__).parent / "results" / "feed.jsonl", "a") as results:
        results.write(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    tyro.cli(main)
