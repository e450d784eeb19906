"""`k2 synthetic audit`: how many AI-generated images are left in a selection, checked by a person."""

import json
from pathlib import Path
from typing import Any

import duckdb
from PIL import Image

from curation import audit as audits
from curation import detector, explore
from curation.decode import DecodeError, decode
from curation.labelled import SUFFIXES
from curation.shards import write_bytes, write_json

PER_SHEET = 60  # pictures of a contact sheet
ALLOWED = 0.05  # loss of real images at which the detector's own estimate is made


def audit(
    run: str | None = None,
    policy: str | None = None,
    sample: int | None = None,
    known: str | None = None,
    seed: int = 0,
    out: str | None = None,
    checked: str | None = None,
    claim: float | None = None,
    model: str = "synthetic",
    confidence: float = 0.95,
) -> int:
    """Draw a sample for a person to check, or say what a checked one means.

    --run RUN --policy NAME --sample N --out FILE.csv [--known DIR]: writes the table, contact sheets beside it and FILE.key.json.
    --checked FILE.csv: the share of AI-generated images that is left, with its bounds.
    --claim 0.001: how many images must be checked, with nothing found, to claim a share below that.
    --run RUN alone: what the detector's own scores say of all images of a run, corrected by its confusion on unseen ones.

    Args:
        run: Run folder.
        policy: Whose selection is sampled.
        sample: Images to draw.
        known: Folder of known AI images to mix in, which measure the person; 100 of them show an auditor that sees 97 %.
        seed: Of the draw.
        out: Table to write.
        checked: Table that has been filled in with ai, real or unsure.
        claim: Share to claim.
        model: Detector whose confusion corrects its own scores.
        confidence: Of every bound, one-sided.
    """
    if claim is not None:
        counts = {str(found): audits.needed(claim, found, confidence) for found in range(3)}
        print(json.dumps({"claim": claim, "confidence": confidence, "images_to_check_by_found": counts}))
        return 0
    if checked is not None:
        return _checked(checked, confidence)
    if run is not None and sample is not None and policy is not None and out is not None:
        return _draw(run, policy, sample, known, seed, Path(out))
    if run is not None and sample is None and policy is None:
        return _estimate(run, model, confidence)
    raise ValueError("give --run, --policy, --sample and --out, or --checked FILE.csv, or --claim SHARE, or --run alone")


def _draw(run: str, policy: str, sample: int, known: str | None, seed: int, out: Path) -> int:
    selection = Path(run, "selection", f"{policy}.parquet")
    if not selection.exists():
        raise FileNotFoundError(f"{selection} is missing; run `k2 filter --run {run} --policy {policy}` first")
    uids = [row[0] for row in duckdb.connect().execute("SELECT uid FROM read_parquet(?) ORDER BY uid", [str(selection)]).fetchall()]
    spikes = sorted(str(path) for path in Path(known).rglob("*") if path.suffix.lower() in SUFFIXES) if known else []
    if known and not spikes:
        raise ValueError(f"--known {known} holds no images ({', '.join(SUFFIXES)})")
    chosen = audits.draw(uids, spikes, sample, seed)
    names = [audits.blind(name, seed) for name in chosen]
    write_bytes(audits.sheet(names).encode(), out)
    key = {"run": run, "policy": policy, "seed": seed, "selected": len(uids), "images": dict(zip(names, chosen, strict=True))}
    write_json(key | {"known": sorted(audits.blind(name, seed) for name in spikes)}, _key(out))
    pages = []
    for start in range(0, len(chosen), PER_SHEET):
        part = chosen[start : start + PER_SHEET]
        pictures = explore.thumbnails(run, set(part) - set(spikes), 320) | _pictures(set(part) & set(spikes))
        blank = Image.new("RGB", (320, 320), "white")
        labels = [f"{start + i + 1}" + ("" if name in pictures else ": not there") for i, name in enumerate(part)]
        page = explore.contact_sheet([pictures.get(name, blank) for name in part], labels, columns=10, size=200)
        pages.append(out.with_name(f"{out.stem}-{start // PER_SHEET + 1:03}.png"))
        page.save(pages[-1])
    print(json.dumps({"table": str(out), "key": str(_key(out)), "sheets": [str(page) for page in pages], "selected": len(uids)}))
    return 0


def _pictures(paths: set[str]) -> dict[str, Image.Image]:
    """Thumbnails of files, as `explore.thumbnails` makes them of a run's images."""
    found = {}
    for path in paths:
        try:
            picture = Image.fromarray(decode(Path(path).read_bytes())[0])
        except DecodeError as error:
            raise ValueError(f"the known image {path} cannot be shown: {error}") from error
        picture.thumbnail((320, 320), Image.Resampling.LANCZOS, reducing_gap=3.0)
        found[path] = picture
    return found


def _checked(checked: str, confidence: float) -> int:
    key_path = _key(Path(checked))
    if not key_path.exists():
        raise FileNotFoundError(f"{key_path} is missing; `k2 synthetic audit --sample` wrote it beside the table")
    key = json.loads(key_path.read_text())
    counts = audits.read_checked(Path(checked).read_text(), list(key["images"]), key["known"])
    result: dict[str, Any] = {"policy": key["policy"], "selected": key["selected"], **counts._asdict()}
    result |= {"left": _rounded(audits.left(counts, confidence))}
    if not counts.num_known:
        print("no known images in this sample: the bound holds for what this auditor can see (--known DIR measures that)")
    print(json.dumps(result))
    return 0


def _estimate(run: str, model: str, confidence: float) -> int:
    """The adjusted count over all images of a run, from the detector's own decisions and its confusion on unseen groups."""
    files = sorted(str(path) for path in Path(run, "annotations", "synthetic").glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{run} has no annotation synthetic; run `k2 annotate --source ... --out {run}` first")
    query = "SELECT count(real_share), count(*) FILTER (real_share <= ?) FROM read_parquet(?)"
    num, flagged = duckdb.connect().execute(query, [ALLOWED, files]).fetchall()[0]
    losses = detector.load(model).info["evaluation"]["losses"]["whole"]
    real, synthetic = losses["real"], losses["synthetic"]
    hits = {name: round(row["num"] * row["removed"]) for name, row in (("real", real), ("synthetic", synthetic))}
    counts = audits.Counts(num, flagged, synthetic["num"], hits["synthetic"], real["num"], hits["real"])
    print("generators that the detector has never met lower its recall: the share is more likely higher than lower")
    print(json.dumps({"run": run, **counts._asdict(), "all": _rounded(audits.left(counts, confidence))}))
    return 0


def _key(table: Path) -> Path:
    return table.with_suffix(".key.json")


def _rounded(found: audits.Left) -> dict[str, float]:
    return {name: round(value, 6) for name, value in found._asdict().items()}
