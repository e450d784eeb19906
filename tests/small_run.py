"""A small run folder, made by the real verbs where no model is needed; scores and training logs are written to their contracts."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from conftest import encode
from PIL import Image
from skimage import data

from curation.faults import FAULTS
from curation.schema import ARTIFACTS, SYNTHETIC
from curation.shards import describe, write_json, write_table
from curation.sources import load_listing
from curation.stages.artifacts import Artifacts
from pipelines.annotate import annotate
from pipelines.dedup import dedup
from pipelines.filter import filter
from pipelines.pack import pack

HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
HOSTILE_NAME = "<img src=x onerror=alert(1)>&amp;.jpg"
PLANTED = ("truncated", "bordered", "noisy", "resaved", "exact_copy", "mirrored_copy", "grainy")


def crops() -> dict[str, np.ndarray]:
    """Nine windows of 300 px that look nothing like one another."""
    places = {"astronaut": (0, 80), "coffee": (60, 60), "rocket": (100, 150), "hubble": (100, 100), "retina": (500, 500)}
    pictures = {"astronaut": data.astronaut(), "coffee": data.coffee(), "rocket": data.rocket(), "hubble": data.hubble_deep_field()}
    pictures["retina"] = data.retina()
    found = {name: pictures[name][top : top + 300, left : left + 300] for name, (top, left) in places.items()}
    found |= {f"hubble_{i}": pictures["hubble"][400:700, 60 + 320 * i : 360 + 320 * i] for i in range(2)}
    return found | {"coffee_saucer": pictures["coffee"][100:400, 290:590], "retina_vessels": pictures["retina"][200:500, 600:900]}


def small_run(folder: Path) -> Path:
    """17 images, 7 of them planted: annotated, deduplicated, filtered by two policies, packed, with a made-up training log."""
    source, run = folder / "pictures", folder / "run"
    source.mkdir()
    rng = np.random.default_rng(0)
    windows = {name: encode(np.ascontiguousarray(pixels), quality=92) for name, pixels in crops().items()}
    for name, encoded in windows.items():
        (source / f"{name}.jpg").write_bytes(encoded)
    (source / HOSTILE_NAME).write_bytes(encode(data.chelsea()[:300, 100:400], quality=92))
    (source / HOSTILE_NAME).with_suffix(".txt").write_text(HOSTILE)
    moon = data.moon()[:300, :300]
    planted = {}
    for i, fault in enumerate(PLANTED):
        copy = FAULTS[fault].expect == "duplicate"
        original = windows["coffee" if fault == "exact_copy" else "rocket"] if copy else encode(np.dstack([np.roll(moon, 97 * i, 1)] * 3))
        (source / f"planted_{fault}.jpg").write_bytes(FAULTS[fault].plant(original, rng))
        planted[f"planted_{fault}.jpg"] = {
            "fault": fault,
            "original": f"{'coffee' if fault == 'exact_copy' else 'rocket'}.jpg" if copy else None,
        }
    assert annotate(str(source), str(run), recipe="basics", ray="off", shard_size=9) == 0
    assert dedup(str(run)) == 0
    uids = {member: f"{shard.name}/{member}" for shard in load_listing(str(run)) for member in shard.members}
    write_json({uids[name]: entry | {"original": uids.get(entry["original"])} for name, entry in planted.items()}, run / "faults.json")
    write_scores(run)
    for policy in ("pretrain_256", "pretrain_512"):
        assert filter(str(run), policy) == 0
    assert pack(str(run), "pretrain_256", batch_size=4, ray="off") == 0
    write_training(run / "train" / "k2-nano")
    return run


def write_scores(run: Path) -> None:
    """P(AI-generated) 0.9, real_share 0.01 for astronaut.jpg, else 0.1, 0.5; feature 7 fires everywhere, 3 on three with 1, 2, 3."""
    for shard in load_listing(str(run)):
        uids = [f"{shard.name}/{member}" for member in shard.members]
        errors = ["broken" if "truncated" in uid else None for uid in uids]
        scores = []
        for uid, error in zip(uids, errors, strict=True):
            high = uid.endswith("astronaut.jpg")
            values = {
                "p_synthetic": 0.9 if high else 0.1,
                "p_pixels": 0.8 if high else 0.1,
                "kind": "photo",
                "real_share": 0.01 if high else 0.5,
            }
            scores.append({"uid": uid, "error": error} | ({} if error else values))
        strong = {"coffee.jpg": 2.0, "retina.jpg": 3.0, "rocket.jpg": 1.0}
        codes = [[{"feature": 7, "value": 0.5}] for _ in uids]
        for uid, fired in zip(uids, codes, strict=True):
            fired[:0] = [{"feature": 3, "value": value} for name, value in strong.items() if uid.endswith("/" + name)]
        codes = [None if error else fired for fired, error in zip(codes, errors, strict=True)]
        scores = pa.Table.from_pylist(scores, SYNTHETIC)
        write_table(scores, run / f"annotations/synthetic/{shard.name}.parquet", "made up")
        write_table(pa.table([uids, codes, errors], schema=ARTIFACTS), run / f"annotations/artifacts/{shard.name}.parquet", "made up")
    made_by = json.loads((run / "run.json").read_text())
    made_by["description"]["stages"]["artifacts"] = {"description": describe(Artifacts())}
    write_json(made_by, run / "run.json")


def write_training(place: Path) -> None:
    """Forty steps of two phases, and the sample grid of the last."""
    rows = [
        {
            "step": i,
            "phase": "256" if i <= 30 else "512",
            "loss": 2.0 / i**0.3,
            "images": 4,
            "images_per_s": 2.0,
            "lr": 1e-3,
            "grad_norm": 1.0,
        }
        for i in range(1, 41)
    ]
    (place / "samples").mkdir(parents=True)
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (30, 40):
        Image.fromarray(data.coffee()).save(place / "samples" / f"{step:06d}.png")
