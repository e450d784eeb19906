"""`k2 demo`: the whole way on a small set of images, offline: annotate, dedup, filter, pack, train, report.

Without a folder of the user's it builds a heap from real photographs that installed packages ship: the photographs, windows
cut out of them, and copies with known faults (curation.faults). RUN/faults.json then holds the truth about every planted
image, and the report says how many of them the rules found.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from curation import explore
from curation.faults import FAULTS, encode
from curation.shards import write_bytes, write_json
from curation.sources import list_shards
from pipelines.annotate import annotate
from pipelines.cli import call
from pipelines.dedup import dedup
from pipelines.filter import filter
from pipelines.pack import pack
from pipelines.report import report
from pipelines.train import train

BATCHES = {"pretrain_256": 4, "pretrain_512": 2, "pretrain_1024": 1}  # policy -> images in a batch, as k2-nano wants them
SHARD_SIZE = 48  # small shards, so that a set this small still keeps every worker busy
SEED = 2026
PER_FAULT = 4
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png", "an astronaut in an orange space suit smiling before a flag and a model of the shuttle"),
    "camera": ("skimage", "data/camera.png", "a black and white photograph of a man with a camera on a tripod in a park"),
    "cat": ("skimage", "data/chelsea.png", "the face of a tabby cat with green eyes"),
    "china": ("sklearn", "datasets/images/china.jpg", "a Chinese pagoda with many tiers above a misty lake"),
    "coffee": ("skimage", "data/coffee.png", "a cup of espresso on a red saucer on a wooden table"),
    "coins": ("skimage", "data/coins.png", "rows of old Greek coins on a dark board"),
    "flower": ("sklearn", "datasets/images/flower.jpg", "an orange dahlia in front of dark green leaves"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg", "thousands of galaxies in the Hubble deep field"),
    "grass": ("skimage", "data/grass.png", "a close view of dry grass, black and white"),
    "gravel": ("skimage", "data/gravel.png", "grey gravel seen from above"),
    "hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "a portrait of an admiral in uniform before a flag"),
    "moon": ("skimage", "data/moon.png", "craters on the surface of the moon"),
    "motorcycle": ("skimage", "data/motorcycle_left.png", "a red motorcycle in a cluttered garage"),
    "retina": ("skimage", "data/retina.jpg", "the retina of a human eye with its blood vessels"),
    "rocket": ("skimage", "data/rocket.jpg", "a rocket on its launch pad at dusk between steel towers"),
    "tissue": ("skimage", "data/ihc.png", "a stained section of human tissue under the microscope"),
    "walls": ("skimage", "data/brick.png", "a brick wall, black and white"),
}
PIXELS_PER_WINDOW = 16_000  # photograph area that one window costs: bigger photographs give more windows
MAX_WINDOWS = 20
ASPECTS = (1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16)
# Pixels that a window is enlarged to when it has fewer, so that all three resolutions have something to pack.
AREAS = (70_000, 70_000, 70_000, 280_000, 1_100_000)


def demo(images: str | None = None, out: str = "demo-run", ray: str = "auto", workers: int | None = None) -> int:
    """The whole way on a small set of images, offline: annotate, dedup, filter, pack, train, report. Some minutes on two cores.

    Args:
        images: Folder of images; default real photographs from installed packages, parts of them, and copies with planted faults.
        out: Run folder. The same command again goes on where it stopped.
        ray: auto (a running cluster, else this machine), off (this process) or a Ray address.
        workers: Ray workers; default one per GPU, else one per CPU.
    """
    begin = time.perf_counter()
    source = images or str(Path(out, "source"))
    if not images and not Path(out, "faults.json").exists():
        with step("build a heap of images with planted faults"):
            write_heap(out)
    shard_size = 256 if images else SHARD_SIZE
    verbs: list[tuple[str, Callable[[], int]]] = [
        ("annotate", partial(annotate, source, out, ray=ray, workers=workers, shard_size=shard_size)),
        ("dedup", partial(dedup, out)),
        *((f"filter {policy}", partial(filter, out, policy)) for policy in BATCHES),
        # To pack a small set takes less time than to start Ray.
        *((f"pack {policy}", partial(pack, out, policy, size, ray="off")) for policy, size in BATCHES.items()),
        ("train", partial(train, out, "k2-nano")),
        ("report", partial(report, out)),
    ]
    for name, verb in verbs:
        with step(name):
            code = verb()
        if code:
            print(f"k2 demo: {name} ended with exit code {code}; the same command goes on from here", file=sys.stderr)
            return code
    if Path(out, "faults.json").exists():
        print(found(out))
    print(f"k2 demo: {time.perf_counter() - begin:.0f} s; the report is at {Path(out, 'report.html').resolve()}")
    return 0


def found(run: str) -> str:
    """How many of the planted faults the rules found, and how much that is no fault they left alone, in words."""
    rows = explore.planted(run, "pretrain_256")["faults"]
    lines = []
    for what, chosen in (
        ("planted faults found", lambda expect: expect not in ("kept", "clean")),
        ("style controls kept", lambda expect: expect == "kept"),
        ("other images kept", lambda expect: expect == "clean"),
    ):
        mine = [row for row in rows if chosen(row["expect"])]
        wrong = ", ".join(f"{row['fault']} {row['right']} of {row['planted']}" for row in mine if row["right"] < row["planted"])
        right, planted = sum(row["right"] for row in mine), sum(row["planted"] for row in mine)
        detail = f" ({wrong})" if wrong and len(mine) > 1 else ""
        lines.append(f"{right} of {planted} {what}{detail}")
    return "\n".join(lines)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Say on stderr that a step starts, and how long it took."""
    print(f"== {name}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    yield
    print(f"== {name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def write_heap(out: str) -> None:
    """Write OUT/source, then OUT/faults.json: uid -> {"fault", "original"} of every planted image."""
    source = Path(out, "source")
    planted = build_heap(source)
    uids = {member: f"{shard.name}/{member}" for shard in list_shards(str(source), SHARD_SIZE) for member in shard.members}
    truth = {uids[file]: entry | {"original": uids.get(entry["original"])} for file, entry in planted.items()}
    write_json(truth, Path(out, "faults.json"))  # last, so that an interrupted heap is built again


def photographs() -> Iterator[tuple[str, str, np.ndarray]]:
    """(name, caption, uint8 (H, W, 3)) of every packaged photograph."""
    for name, (package, path, caption) in PHOTOGRAPHS.items():
        try:
            with (files(package) / path).open("rb") as file, Image.open(file) as image:
                yield name, caption, np.asarray(image.convert("RGB"))
        except (ModuleNotFoundError, FileNotFoundError) as error:
            raise ValueError(
                f"the demo's photograph {path} of the package {package} is missing ({error}); give --images DIR instead"
            ) from error


def windows(height: int, width: int, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of windows of many sizes and aspects; no two share more than half of the smaller one."""
    chosen: list[tuple[int, int, int, int]] = []
    number = min(MAX_WINDOWS, height * width // PIXELS_PER_WINDOW)
    for _ in range(200 * number):
        if len(chosen) == number:
            break
        aspect = float(rng.choice(ASPECTS))
        area = rng.uniform(25_000, max(50_000, min(0.35 * height * width, 260_000)))
        w, h = min(width, int((area * aspect) ** 0.5)), min(height, int((area / aspect) ** 0.5))
        top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        if all(_shared((top, left, h, w), other) < 0.5 for other in chosen):
            chosen.append((top, left, h, w))
    return chosen


def _shared(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Area that two boxes share, as a part of the smaller one."""
    down = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    right = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(down, 0) * max(right, 0) / min(a[2] * a[3], b[2] * b[3])


def enlarge(pixels: np.ndarray, area: int) -> np.ndarray:
    """At least `area` pixels, with Lanczos; larger images stay as they are."""
    scale = (area / (pixels.shape[0] * pixels.shape[1])) ** 0.5
    if scale <= 1:
        return pixels
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def build_heap(folder: Path) -> dict[str, dict[str, str | None]]:
    """Write the demo's images and captions into `folder`: file -> {"fault", "original"} of every planted one.

    Faults that a rule should find sit on windows that are nowhere else in the heap, so that no duplicate rule finds them first;
    copies sit beside their original.
    """
    rng = np.random.default_rng(SEED)
    heap: list[tuple[str, str, bytes]] = []
    pool: list[tuple[str, str, bytes]] = []
    for name, caption, photo in photographs():
        heap.append((f"{name}/{name}", caption, encode(enlarge(photo, AREAS[-1] if np.ptp(photo, axis=2).any() else 0))))
        for i, (top, left, height, width) in enumerate(windows(*photo.shape[:2], rng)):
            pixels = enlarge(photo[top : top + height, left : left + width], int(rng.choice(AREAS)))
            container = str(rng.choice(["JPEG", "JPEG", "JPEG", "PNG", "WEBP"]))
            pool.append((f"{name}/{name}_{i:02d}", f"a part of {caption}", encode(pixels, int(rng.integers(85, 96)), container)))
    rng.shuffle(pool)
    planted: dict[str, dict[str, str | None]] = {}
    # `found` asks the policy for 256 pixels, which has no rule on enlargements: they are gone again at that size.
    for fault in (fault for fault, how in FAULTS.items() if how.expect != "duplicate" and fault != "enlarged"):
        for i in range(PER_FAULT):
            _, caption, encoded = pool.pop()
            file = _write(folder, f"planted/{fault}_{i}", caption, FAULTS[fault].plant(encoded, rng))
            planted[file] = {"fault": fault, "original": None}
    heap += pool
    names = [_write(folder, key, caption if i % 3 else None, encoded) for i, (key, caption, encoded) in enumerate(heap)]
    copied = iter(rng.permutation(len(heap)).tolist())
    for fault in (fault for fault, how in FAULTS.items() if how.expect == "duplicate"):
        for i in range(PER_FAULT):
            original = next(copied)
            file = _write(folder, f"planted/{fault}_{i}", heap[original][1], FAULTS[fault].plant(heap[original][2], rng))
            planted[file] = {"fault": fault, "original": names[original]}
    return planted


def _write(folder: Path, key: str, caption: str | None, encoded: bytes) -> str:
    """Write an image, and its caption when it has one; returns the file's path in `folder`."""
    suffix = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}[encoded[:2]]
    write_bytes(encoded, folder / f"{key}.{suffix}")
    if caption:
        write_bytes(caption.encode(), folder / f"{key}.txt")
    return f"{key}.{suffix}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return call(demo, argv, "k2 demo")


if __name__ == "__main__":
    sys.exit(main())
