"""Does a small share of generated images move what a model makes, and are they easier to learn? K2's reason to remove them, at nano scale.

    python benchmarks/bench_contamination.py --images DIR [--model synthetic] [--seeds 3] [--steps 500]

A small K2 transformer without text is trained by rectified flow on 200 images of 64 x 64 pixels (the PCA codec's 8 x 8 x 16 latents), of
which 0, 1, 5, 20 or 100 % are generated. In the arm `other` 20 % are replaced by other *real* photographs: how far outputs move when any
images change. Arms of one seed share their first weights, noise, times, mirroring, the real images that are not replaced, and the noise
that they sample from. Shifts are shares of the way from 0 to 100 %: a model that just repeats its mix moves by the share itself. Images
are centre squares reduced by area means and passed through the codec, samples and held-out images alike, so that content and style are
judged, not traces in pixels. DIR is a folder with a MANIFEST.tsv. Appends one JSON line to benchmarks/results/contamination.jsonl and
draws docs/images/contamination.svg.
At the default --steps samples show colour, no form: about 10 CPU minutes; more wants hours or an accelerator.
"""

import itertools
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from nano_flow import sample, train
from PIL import Image
from scipy.spatial.distance import cdist
from sklearn.linear_model import LinearRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from curation import detector, labelled, plots, probe
from curation.decode import DecodeError, decode_for
from curation.detector import SEMANTICS, Detector
from curation.fitted import check_identity, find
from curation.shards import file_hash
from curation.towers import EffNet, loaded
from k2model.vae import PcaCodec, fit_pca
from pipelines.run_folder import commit, versions

ROOT = Path(__file__).parents[1]
TOWER = EffNet(depths=True)  # of the packaged detector
SIDE, NUM_TRAIN = 64, 200
ARMS = {"0 %": 0.0, "1 %": 0.01, "5 %": 0.05, "20 %": 0.2, "100 %": 1.0, "other": 0.2}  # share of the training images that is replaced
LEFT_OUT = (  # one subject, prompt or scene over and over (easy for another reason), GANs, images guided by CLIP, stars on black
    *("ALAE (StyleGAN-like)", "SD 1.5 (artist styles)", "SDXL (Fooocus)", "BigGAN+CLIP (big-sleep)", "SIREN+CLIP (deep-daze)"),
    *("VQGAN+CLIP", "Stellarium nebula photographs", "CamVid (video frames)"),
)
STRENGTH = 1e-3  # sklearn's C of the head, the middle of probe.STRENGTHS
COMPONENTS = 32
MEASURES = {  # name -> what the report calls it; each rises towards generated images
    "head": "log odds, head of this experiment",
    "packaged": "log odds, packaged semantic head",
    "frechet": "Frechet distance to real less that to generated",
    "nearest": "share whose nearest held-out image is generated",
}


class Sets(NamedTuple):
    """Latents (2, N, 16, 8, 8): as they are, and mirrored. Held-out images are equally many of both labels."""

    real: Tensor
    generated: Tensor
    other: Tensor  # real photographs for the arm `other`
    held_real: Tensor
    held_generated: Tensor


def pictures(images: str, generated: bool) -> Tensor:
    """(N, 3, SIDE, SIDE) in [-1, 1]: generated images, or real photographs; centre squares, area means, in an order of their own."""
    found = []
    for entry in labelled.entries(images, f"{images}/MANIFEST.tsv"):
        if entry.synthetic != generated or entry.group in LEFT_OUT or not (generated or entry.kind == "photo"):
            continue
        try:
            view = decode_for(Path(images, entry.path).read_bytes(), "view")[1]
        except DecodeError as error:
            print(f"left out {entry.path}: {error}", file=sys.stderr)
            continue
        side, (height, width) = min(view.shape[:2]), view.shape[:2]
        if side >= SIDE:
            box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
            found.append(np.asarray(Image.fromarray(view).resize((SIDE, SIDE), Image.Resampling.BOX, box=box)))
    order = np.random.default_rng(0).permutation(len(found))
    return torch.from_numpy(np.stack(found)[order]).permute(0, 3, 1, 2).float() / 127.5 - 1


def split(images: str) -> tuple[PcaCodec, Sets]:
    """The codec, fitted on as many real as generated images, and the sets."""
    real, generated = pictures(images, False), pictures(images, True)
    num_other = round(ARMS["other"] * NUM_TRAIN)
    num_held = min(len(real) - NUM_TRAIN - num_other, len(generated) - NUM_TRAIN)
    if num_held < COMPONENTS:
        need = NUM_TRAIN + COMPONENTS
        raise ValueError(f"{len(real)} real photographs and {len(generated)} generated images; needs {need + num_other} and {need}")
    codec = fit_pca([real[:NUM_TRAIN], generated[:NUM_TRAIN]])
    real, generated = (torch.stack([codec.encode(x), codec.encode(x.flip(3))]) for x in (real, generated))
    train, other = real[:, :NUM_TRAIN], real[:, NUM_TRAIN : NUM_TRAIN + num_other]
    held = real[:, NUM_TRAIN + num_other :][:, :num_held], generated[:, NUM_TRAIN : NUM_TRAIN + num_held]
    return codec, Sets(train, generated[:, :NUM_TRAIN], other, *held)


def mixed(sets: Sets, arm: str, seed: int) -> Tensor:
    """The training images of an arm. What 1 % replaces, 5 % replaces by the same images, and so on."""
    rng, num = np.random.default_rng(seed), round(ARMS[arm] * NUM_TRAIN)
    places, chosen = rng.permutation(NUM_TRAIN)[:num], rng.permutation(NUM_TRAIN)[:num]
    latents = sets.real.clone()
    latents[:, places] = sets.other if arm == "other" else sets.generated[:, chosen]
    return latents


def embedded(codec: PcaCodec, latents: Tensor) -> np.ndarray:
    """(N, d) EfficientNet-Lite2 vectors, of all depths, of decoded latents, enlarged as the tower does."""
    pixels = ((codec.decode(latents) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return loaded(TOWER, "cpu").pooled(TOWER.prepare(list(pixels)))


class Judges(NamedTuple):
    """What samples are measured with; all fitted on held-out images of both labels, or packaged."""

    heads: dict[str, tuple[probe.Head, tuple[float, float]]]  # name -> (head, Platt's slope and intercept)
    mean: np.ndarray
    basis: np.ndarray  # (COMPONENTS, d)
    real: np.ndarray  # (N, COMPONENTS)
    generated: np.ndarray
    card: dict[str, dict[str, float]]  # head -> AUROC and mean log odds of held-out images (of this experiment's head: out of fold)


def judges(real: np.ndarray, generated: np.ndarray, packaged: Detector) -> Judges:
    """Fit on vectors (N, d) of the held-out images."""
    check_identity(f"this detector ({SEMANTICS})", packaged.towers.get(SEMANTICS, "no tower"), TOWER.identity, "synthetic")
    vectors = np.concatenate([real, generated])
    synthetic = np.arange(len(vectors)) >= len(real)
    labels = probe.Labels(synthetic, synthetic.astype(str), synthetic.astype(str))
    folds = np.random.default_rng(0).permutation(len(vectors)) % probe.FOLDS
    unseen = probe.fold_scores(vectors[:, None], labels, [folds == fold for fold in range(probe.FOLDS)], 1, STRENGTH)[:, 0]
    ours = probe.fit_linear(vectors[:, None], labels, STRENGTH), probe.platt(unseen, synthetic, np.ones(len(vectors)))
    heads = {"head": ours, "packaged": (packaged.heads[SEMANTICS], packaged.calibration.platt[SEMANTICS])}
    card = {}
    for name, (head, (slope, intercept)) in heads.items():
        odds = slope * (unseen if name == "head" else probe.linear_scores(vectors, head)) + intercept
        card[name] = {"auroc": roc_auc_score(synthetic, odds)}
        card[name] |= {"real": odds[~synthetic].mean(), "generated": odds[synthetic].mean()}
    mean = vectors.mean(0)
    basis = np.linalg.svd(vectors - mean, full_matrices=False)[2][:COMPONENTS]
    return Judges(heads, mean, basis, (real - mean) @ basis.T, (generated - mean) @ basis.T, card)


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians fitted to x (N, d) and y (M, d) (Dowson and Landau 1982)."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * roots)


def judged(vectors: np.ndarray, by: Judges) -> dict[str, float]:
    """MEASURES of one model's samples (N, 1280), and their distance to real images, a measure of quality."""
    x = (vectors - by.mean) @ by.basis.T
    to_real, to_generated = frechet(x, by.real), frechet(x, by.generated)
    near = cdist(x, by.generated).min(1) < cdist(x, by.real).min(1)
    odds = {name: float((slope * probe.linear_scores(vectors, head) + bias).mean()) for name, (head, (slope, bias)) in by.heads.items()}
    return odds | {"frechet": to_real - to_generated, "nearest": float(near.mean()), "to_real": to_real}


def at_equal_contrast(losses: np.ndarray, sets: Sets) -> float:
    """The loss of generated over that of real images (2, N) of the same variance of latents: a regression of the logarithms."""
    contrast = torch.cat([sets.held_real[0], sets.held_generated[0]]).var((1, 2, 3)).log().numpy()
    label = np.repeat([0.0, 1.0], losses.shape[1])
    return float(np.exp(LinearRegression().fit(np.stack([label, contrast], 1), np.log(losses).ravel()).coef_[0]))


def summary(runs: list[dict]) -> dict[str, dict]:
    """Per arm and figure [mean, deviation] over seeds, and of MEASURES the share of the way from 0 to 100 %, paired by seed."""
    names = [*MEASURES, "to_real", "loss_real", "loss_generated", "equal_contrast"]
    value = {(arm, name): np.array([run[name] for run in runs if run["arm"] == arm]) for arm in ARMS for name in names}
    for name in MEASURES:
        start, way = value["0 %", name], (value["100 %", name] - value["0 %", name]).mean()
        value |= {(arm, f"{name}_share"): (value[arm, name] - start) / way for arm in ARMS}
    table: dict[str, dict] = {arm: {} for arm in ARMS}
    for (arm, name), values in value.items():
        table[arm][name] = [round(float(values.mean()), 4), round(float(values.std(ddof=min(1, len(values) - 1))), 4)]
    return table


def plot(table: dict[str, dict], runs: list[dict], path: Path) -> None:
    """Left: how far outputs move for each share of generated images. Right: held-out loss of real and of generated images, at home."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    shown = [arm for arm in ARMS if arm != "100 %"]
    for i, (name, words) in enumerate(MEASURES.items()):
        means, deviations = 100 * np.array([table[arm][f"{name}_share"] for arm in shown]).T
        places = np.arange(len(means)) + 0.14 * (i - 1.5)
        left.errorbar(places, means, deviations, fmt="o", color=plots.SERIES[i], markersize=4, label=words)
    ends = np.arange(len(shown) - 1)
    expected = [100 * ARMS[arm] for arm in shown[:-1]]
    left.hlines(expected, ends - 0.4, ends + 0.4, color=plots.GREY, linestyle="--", linewidth=1, label="the share itself")
    left.set_xticks(range(len(shown)), [*shown[:-1], "20 % other\nreal images"])
    left.set(xlabel="training images replaced by generated ones", ylabel="% of the way to the 100 % model")
    for label, arm, colour in (("real", "0 %", plots.BLUE), ("generated", "100 %", plots.ORANGE)):
        curves = np.array([run["curve"][label] for run in runs if run["arm"] == arm]).T
        right.plot(runs[0]["curve"]["step"], curves, color=colour, linewidth=1, alpha=0.4)
        right.plot(runs[0]["curve"]["step"], curves.mean(1), ".-", color=colour, label=f"trained on {label} images, held-out {label} ones")
    right.set(xlabel="step", ylabel="loss")
    for axis in (left, right):
        plots.style(axis)
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main(images: str, model: str = "synthetic", seeds: int = 3, steps: int = 500, num_samples: int = 96) -> None:
    """Measure and record.

    Args:
        images: A folder with a MANIFEST.tsv.
        model: The detector whose semantic head judges too: a packaged name or a folder. It must look with EfficientNet-Lite2.
        seeds: Of weights, noise, and which images are replaced.
        steps: Of training, for every model; at least 8.
        num_samples: From every model.
    """
    torch.set_num_threads(1)
    codec, sets = split(images)
    by = judges(embedded(codec, sets.held_real[0]), embedded(codec, sets.held_generated[0]), detector.load(model))
    print(json.dumps(by.card), file=sys.stderr)
    runs = []
    for seed, arm in itertools.product(range(seeds), ARMS):
        net, curve = train(mixed(sets, arm, seed), torch.stack([sets.held_real[0], sets.held_generated[0]]), seed, steps)
        real, generated = np.stack(list(curve.values())).mean(2).round(4).T.tolist()
        run = {"arm": arm, "seed": seed} | judged(embedded(codec, sample(net, num_samples, seed)), by)
        run |= {"loss_real": real[-1], "loss_generated": generated[-1]}
        run["equal_contrast"] = at_equal_contrast(curve[steps], sets)
        runs.append(run | {"curve": {"step": list(curve), "real": real, "generated": generated}})
        print(json.dumps(runs[-1] | {"cpu_seconds": round(time.process_time())}), file=sys.stderr)
    line = {"images": {name: latents.shape[1] for name, latents in sets._asdict().items()}}
    line |= {"seeds": seeds, "steps": steps, "num_samples": num_samples, "parameters": sum(p.numel() for p in net.parameters())}
    line |= {"detector": file_hash(find(model, detector.INFO_FILE) / detector.WEIGHTS_FILE), "held_out": by.card}
    table = summary(runs)
    line |= {"arms": table, "runs": runs, "cpu_seconds": round(time.process_time()), "commit": commit(), "versions": versions()}
    with open(ROOT / "benchmarks" / "results" / "contamination.jsonl", "a") as results:
        results.write(json.dumps(line) + "\n")
    print(json.dumps(line))
    plot(table, runs, ROOT / "docs" / "images" / "contamination.svg")


if __name__ == "__main__":
    tyro.cli(main)
