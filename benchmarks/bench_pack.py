"""Packing to 256 px: images a second of one core and peak memory against the number of images, and what packing again costs.

    python benchmarks/bench_pack.py --images DIR [--sizes 1000 10000] [--peers DIR_OF_WEBDATASET DIR_OF_STREAMING]

The corpus is tars of crops of real photographs (default: those of scikit-image; enlarged where they are smaller than `--shape`), JPEG
quality 90. Every contender
runs in a process of its own, with one thread, and reads the same tars:

    parts         the work alone: our decode, crop, Lanczos, JPEG quality 95 4:4:4; nothing shuffled, nothing written
    k2            `k2 pack --ray off`: global shuffle, row groups of 32 images of one bucket
    webdataset    WebDataset -> shuffle buffer of 1,000 -> the same work in Pillow -> ShardWriter; no batches of one bucket
    streaming     the same -> MDSWriter (mosaicml-streaming); no batches of one bucket either

A peer runs where its package can be imported; `--peers` adds folders to look in (pip install --target). After that k2 packs the smallest
corpus again with 1 % of its selection changed, from pieces that it kept, and from nothing. Appends JSON lines to
benchmarks/results/pack.jsonl; CPU seconds, so that a busy machine changes little.
"""

import importlib
import io
import json
import platform
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from PIL import Image
from skimage import data

from curation.buckets import place
from curation.decode import decode
from curation.pieces import cut
from curation.schema import SELECTION
from curation.shards import write_json, write_table
from curation.sources import list_shards, load_listing, read_samples, save_listing
from pipelines.run_folder import commit, versions

RESOLUTION, PER_TAR, BUFFER = 256, 1000, 1000
CONTENDERS = ("parts", "k2", "webdataset", "streaming")


def corpus(
    run: Path, count: int, images: str | None, shape: tuple[int, int], resolution: int = RESOLUTION, captions: Sequence[str] = ()
) -> None:
    """RUN with tars of `count` JPEGs of (height, width) or (width, height), and a selection of them all."""
    if images:
        files = sorted(path for path in Path(images).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        pictures = [decode(path.read_bytes())[0] for path in files[:: max(1, len(files) // 60)]]
    else:
        pictures = [data.astronaut(), data.coffee(), data.rocket(), data.chelsea(), data.hubble_deep_field(), data.retina()]
    pictures = [enlarged(picture, max(shape)) for picture in pictures]
    rng = np.random.default_rng(0)
    columns: dict[str, list] = {name: [] for name in ("shard", "key", "height", "width")}
    (run / "source").mkdir(parents=True)
    for first in range(0, count, PER_TAR):
        shard = f"{first // PER_TAR:05d}"
        with tarfile.open(run / "source" / f"{shard}.tar", "w") as tar:
            for i in range(first, min(first + PER_TAR, count)):
                picture, (high, wide) = pictures[i % len(pictures)], shape if i % 3 else shape[::-1]
                top, left = rng.integers(picture.shape[0] - high + 1), rng.integers(picture.shape[1] - wide + 1)
                crop = np.ascontiguousarray(picture[top : top + high, left : left + wide])
                for suffix, content in (("jpg", jpeg(crop)), ("txt", (captions[i] if captions else f"image {i}").encode())):
                    entry = tarfile.TarInfo(f"{i:08d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
                for name, value in zip(columns, (shard, f"{i:08d}", high, wide), strict=True):
                    columns[name].append(value)
    save_listing(list_shards(str(run / "source")), str(run))
    placed = place(columns["height"], columns["width"], resolution)
    facts = {"uid": [f"{s}/{k}" for s, k in zip(columns["shard"], columns["key"], strict=True)], "shard": columns["shard"]}
    facts |= {"key": columns["key"]} | {name: pa.array(values, pa.int32()) for name, values in placed._asdict().items()}
    choose(run, pa.table(facts).select(SELECTION.names).cast(SELECTION), resolution)


def enlarged(picture: np.ndarray, side: int) -> np.ndarray:
    """The picture, with a short side of at least `side` pixels."""
    short = min(picture.shape[:2])
    size = tuple(-(-length * side // short) for length in picture.shape[1::-1])
    return picture if short >= side else np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def choose(run: Path, selection: pa.Table, resolution: int = RESOLUTION) -> None:
    write_table(selection, run / "selection/p.parquet", "bench", row_group_size=100_000)
    write_json({"resolution": resolution}, run / "selection/p.funnel.json")


def k2(run: Path, out: Path, *flags: str) -> None:
    from pipelines import pack

    out.mkdir(exist_ok=True)
    for name in ("selection", "shards.parquet"):
        if not (out / name).exists():
            (out / name).symlink_to((run / name).resolve())
    assert pack.main(["--run", str(out), "--policy", "p", "--ray", "off", *flags]) == 0


def parts(run: Path, out: Path) -> None:
    chosen = {row["uid"]: row for row in pq.read_table(run / "selection/p.parquet").to_pylist()}
    for shard in load_listing(str(run)):
        for batch in read_samples(shard):
            for uid, image in zip(batch["uid"].to_pylist(), batch["image"].to_pylist(), strict=True):
                cut(image, chosen[uid])


def by_hand(run: Path):
    """WebDataset's samples through a shuffle buffer, cropped and resized with Pillow: (key, JPEG, caption)."""
    import webdataset

    chosen = {row["key"]: row for row in pq.read_table(run / "selection/p.parquet").to_pylist()}
    tars = sorted(str(path) for path in (run / "source").glob("*.tar"))
    for sample in webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(BUFFER, rng=random.Random(0)):
        box = chosen[sample["__key__"]]
        left, top = box["crop_left"], box["crop_top"]
        image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
        image = image.crop((left, top, left + box["crop_width"], top + box["crop_height"]))
        image = image.resize((box["bucket_width"], box["bucket_height"]), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95, subsampling=0)
        yield sample["__key__"], buffer.getvalue(), sample["txt"].decode()


def webdataset(run: Path, out: Path) -> None:
    import webdataset

    out.mkdir()
    with webdataset.ShardWriter(f"{out}/%05d.tar", maxcount=2048, verbose=0) as writer:
        for key, image, caption in by_hand(run):
            writer.write({"__key__": key, "jpg": image, "txt": caption})


def streaming(run: Path, out: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(out), columns={"key": "str", "image": "bytes", "caption": "str"}, size_limit=1 << 26) as writer:
        for key, image, caption in by_hand(run):
            writer.write({"key": key, "image": image, "caption": caption})


def measure(name: str, run: Path, out: Path, peers: tuple[str, ...], *flags: str) -> dict:
    """One contender in a process of its own: CPU seconds, and peak memory beside what its imports take."""
    call = [sys.executable, __file__, "one", name, str(run), str(out), json.dumps(peers), *flags]
    return json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def one(name: str, run: str, out: str, peers: str, *flags: str) -> None:
    """What `measure` starts."""
    sys.path += json.loads(peers)
    for module in {"webdataset": ["webdataset"], "streaming": ["streaming", "webdataset"], "k2": ["pipelines.pack"]}.get(name, []):
        importlib.import_module(module)
    before, start = peak_memory(), time.process_time()
    globals()[name](Path(run), Path(out), *flags)
    print(json.dumps({"cpu_s": round(time.process_time() - start, 2), "peak_mb": peak_memory(), "imports_mb": before}))


def peak_memory() -> int:
    """Megabytes. Not getrusage: its peak is inherited from the process that started this one."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def again(run: Path, work: Path, peers: tuple[str, ...]) -> dict:
    """Packing again after 1 % of the selection is another 1 %: from kept pieces, and from nothing; the bytes must be equal."""
    selection = pq.read_table(run / "selection/p.parquet")
    rows = np.random.default_rng(1).permutation(len(selection))
    hundredth = len(selection) // 100
    choose(run, selection.take(np.sort(rows[hundredth:])))
    measure("k2", run, work / "kept", peers, "--keep-pieces")
    choose(run, selection.take(np.sort(np.concatenate([rows[:hundredth], rows[2 * hundredth :]]))))
    kept = measure("k2", run, work / "kept", peers, "--keep-pieces", "--repack")
    fresh = measure("k2", run, work / "fresh", peers)
    files = sorted(path.name for path in (work / "fresh/packed/p").glob("*.parquet"))
    equal = all((work / "kept/packed/p" / name).read_bytes() == (work / "fresh/packed/p" / name).read_bytes() for name in files)
    return {
        "what": "1 % of the selection changed",
        "images": len(selection) - hundredth,
        "decoded": hundredth,
        "same_bytes": equal,
        "cpu_s": {"from_pieces": kept["cpu_s"], "from_nothing": fresh["cpu_s"]},
        "ratio": round(kept["cpu_s"] / fresh["cpu_s"], 3),
    }


def main(
    images: str | None = None, sizes: tuple[int, ...] = (1000, 10_000), shape: tuple[int, int] = (400, 500), peers: tuple[str, ...] = ()
) -> None:
    """Measure and record.

    Args:
        images: A folder of photographs to crop from; default those of scikit-image.
        sizes: Numbers of images, the smallest first.
        shape: Height and width of the sources; a third of them lie the other way.
        peers: Folders with the packages webdataset and streaming, where they are not installed.
    """
    lines = []
    for count in sizes:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder, "run")
            corpus(run, count, images, shape)
            for name in CONTENDERS:
                try:
                    found = measure(name, run, Path(folder, name), peers)
                except subprocess.CalledProcessError:
                    print(f"{name} did not run; is its package installed?", file=sys.stderr)
                    continue
                lines.append({"what": name, "images": count, "shape": shape, "images_per_core_s": round(count / found["cpu_s"], 1)} | found)
                print(json.dumps(lines[-1]))
                shutil.rmtree(Path(folder, name), ignore_errors=True)
            if count == sizes[0]:
                lines.append(again(run, Path(folder), peers))
                print(json.dumps(lines[-1]))
    about = {"machine": platform.processor() or platform.machine(), "commit": commit(), "versions": versions()}
    with open(Path(__file__).parent / "results" / "pack.jsonl", "a") as results:
        results.writelines(json.dumps(line | about) + "\n" for line in lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(*sys.argv[2:])
    else:
        tyro.cli(main)
