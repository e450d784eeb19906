"""Does the data matter? A small K2 on curated, uncurated and quality-filtered packs of one size; the curriculum against its top resolution.

    pip install --no-deps --target DIR/site brisque libsvm-official     # BRISQUE is GPL, so it is no dependency of the project
    PYTHONPATH=$PWD:DIR/site python benchmarks/bench_study.py --images DIR --run RUN [--seeds 3]

Builds a heap (benchmarks/study_heap.py), then `k2 annotate`, `k2 dedup`, `k2 filter` and `k2 pack` with the policies of the arms, and
`k2 train` for every arm and seed with one codec; judges the last checkpoints on held-out images. A finished run is a line of
benchmarks/results/study.jsonl and is not done again; `--report` only draws docs/images/study*.png and prints the tables of docs/study.md,
which says what this shows and what it cannot. DIR is a folder with a MANIFEST.tsv.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import study_plots
import torch
import tyro
from safetensors.torch import save
from study_heap import ARMS, PROMPTS, Held, arm_policy, pools, write_heap, write_quality
from torch import Tensor

from curation import diversity
from curation.decode import decode_for
from curation.shards import write_bytes
from curation.towers import EffNet, loaded
from k2model import flow
from k2model.data import Packed, to_images, to_pixels
from k2model.dit import Config, DiT
from k2model.flops import train_flops
from k2model.layouts import load_model
from k2model.text import Encode, HashText
from k2model.vae import PcaCodec, fit_pca, load_pca
from pipelines.annotate import annotate
from pipelines.dedup import dedup
from pipelines.filter import filter
from pipelines.pack import pack
from pipelines.run_folder import commit, versions
from pipelines.train import train

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "study.jsonl"
PRETRAIN = ROOT / "pipelines" / "policies" / "pretrain_256.sql"
HEAP, NUM_TRAIN = 1200, 256  # images; of a pack
SMALL = Config(  # 0.26 million parameters, a quarter of NANO: the most that so many runs leave time for
    width=64, num_blocks=3, num_heads=2, num_kv_heads=1, text_dim=16, text_taps=4, text_heads=1, num_fusion_blocks=1, time_dim=64
)
TEXT = HashText(dim=16)
STEPS, BATCH, LR = 1200, 16, 3e-3
TIMES = (0.2, 0.4, 0.6, 0.8)  # at which held-out images are denoised
TEXT_TOKENS = 5  # of the captions, about
TOP_STEPS, TOP_BATCH = 360, 8  # of the run at 256 px from scratch, which sets the FLOPs of the curriculum
LONGER = 1.6  # times the FLOPs
CURRICULUM = {64: (0.35, 32), 128: (0.30, 16), 256: (0.35, 8)}  # share of those FLOPs, images in a batch
NUM_SAMPLES = 32  # per prompt
NUM_EULER = 20
COMPONENTS = 32  # of the Frechet distance
RECIPE = """from k2model.dit import Config
from k2model.text import HashText
from k2model.vae import Pca
from pipelines.recipes import Phase, TrainRecipe

plan = TrainRecipe(
    name={name!r}, model={model!r}, text={text!r}, vae=Pca(), text_tokens={text_tokens}, seed={seed}, phases=({phases}),
    sample_every=10**9, sample_steps=4, checkpoint_every={every},
)
"""


# --- data ---


def prepare(images: str, run: Path) -> dict[str, Held]:
    """The heap, its annotations and duplicates, packs of every arm; returns what is held out."""
    real, generated, held = pools(images)
    print(f"{len(real)} real and {len(generated)} generated pictures; held out {[len(f.pictures) for f in held.values()]}", file=sys.stderr)
    if not (run / "truth.json").exists():
        write_heap(run, real, generated, HEAP)
    for verb in (lambda: annotate(str(run / "source"), str(run), "offline", ray="off"), lambda: dedup(str(run))):
        if verb():
            raise SystemExit("a verb failed; see above, then start again")
    if not (run / "annotations" / "quality").exists():
        uids = sorted(json.loads((run / "truth.json").read_text()))
        judge = brisque()
        values = [judge(decode_for((run / "source" / uid.split("/", 1)[1]).read_bytes(), "pixels").pixels) for uid in uids]
        write_quality(run, uids, values)
    return held


def brisque():
    """BRISQUE (Mittal et al. 2012) of the package `brisque` 0.2.0, larger is worse."""
    from brisque import BRISQUE

    judge = BRISQUE(url=False)
    scale = judge.scale_features
    judge.scale_features = lambda features: scale([np.ravel(x)[0] for x in features])  # 0.2.0 hands arrays to float()

    def measure(pixels: np.ndarray) -> float:
        value = float(judge.score(pixels))
        return value if np.isfinite(value) else 200.0  # a flat picture has no statistics: as bad as can be

    return measure


def packed(run: Path, arm: str, seed: int, resolution: int, batch: int, number: int, least: int = 0) -> tuple[str, dict]:
    """Filter and pack an arm; the policy's name and what the heap says about its images."""
    name = f"{arm.replace('+', '_')}_{resolution}_{seed if number < HEAP else 'all'}"
    policy = run / "policies" / f"{name}.sql"
    write_bytes(arm_policy(arm, resolution, seed, number, PRETRAIN.read_text(), least).encode(), policy)
    if filter(str(run), str(policy)) or pack(str(run), name, batch, ray="off", remainder="drop"):
        raise SystemExit("a verb failed; see above, then start again")
    truth = json.loads((run / "truth.json").read_text())
    uids = pq.read_table(run / "selection" / f"{name}.parquet", columns=["uid"])["uid"].to_pylist()
    funnel = json.loads((run / "selection" / f"{name}.funnel.json").read_text())
    pool = next(row["kept_so_far"] for row in reversed(funnel["rules"]) if row["name"] != "drawn")
    return name, {"images": len(uids), "pool": pool, "kinds": dict(Counter(truth[uid]["kind"] for uid in uids))}


def shared_codec(run: Path, policies: list[str], name: str) -> Path:
    """A PCA codec fitted once on the first batches of all these packs, which every run then starts with."""
    path = run / "codecs" / f"{name}.safetensors"
    if not path.exists():
        sets = [Packed(f"{run}/packed/{policy}") for policy in policies]
        batches = (to_pixels(found.read(group).images) for found in sets for group in found.groups[:4])
        write_bytes(save(fit_pca(batches).tensors()), path)
    return path


# --- training ---


def phase(policy: str, resolution: int, steps: int, lr: float) -> str:
    """The text of a phase of a recipe: a tenth of the steps to warm up (at most 20), the last two fifths to decay."""
    mu = flow.resolution_mu((resolution // 16) ** 2)
    numbers = f"{steps}, lr={lr}, warmup={min(20, max(1, steps // 10))}, decay={max(1, 2 * steps // 5)}, mu={mu:.4f}, num_samples=1"
    return f"Phase('{resolution}', {policy!r}, {resolution}, steps={numbers}), "


def trained(run: Path, name: str, seed: int, phases: str, codec: Path, every: int) -> Path:
    """Run `k2 train` to its end; the folder of the run."""
    recipe, place = run / "recipes" / f"{name}.py", run / "train" / name
    write_bytes(
        RECIPE.format(name=name, seed=seed, phases=phases, every=every, text_tokens=TEXT_TOKENS, model=SMALL, text=TEXT).encode(), recipe
    )
    write_bytes(codec.read_bytes(), place / "vae.safetensors")
    if train(str(run), f"{recipe}:plan", str(place), device="cpu", threads=1):
        raise SystemExit(f"{name} did not train; see above")
    return place


def curriculum_steps() -> dict[int, int]:
    """Steps per resolution of the curriculum, of the FLOPs of the run at the top resolution from scratch."""
    total = TOP_STEPS * TOP_BATCH * train_flops(SMALL, TEXT_TOKENS, 16 * 16)
    cost = {side: batch * train_flops(SMALL, TEXT_TOKENS, (side // 16) ** 2) for side, (_, batch) in CURRICULUM.items()}
    return {side: round(total * share / cost[side]) for side, (share, _) in CURRICULUM.items()}


# --- judging ---


def checkpoints(place: Path) -> Iterator[tuple[int, DiT]]:
    """Every checkpoint of a run, in order."""
    for folder in sorted((place / "checkpoints").glob("[0-9]*")):
        yield int(folder.name), load_model(folder).eval()


@torch.no_grad()
def held_out_losses(model: DiT, encode: Encode, latents: Tensor, captions: list[str]) -> Tensor:
    """(N,) velocity error of latents (N, 16, H, W), a mean over TIMES; the noise is that of time and place, for any model."""
    total = torch.zeros(len(latents))
    for time_ in TIMES:
        noise = flow.draw(0, round(time_ * 10), [str(i) for i in range(len(latents))], tuple(latents.shape[1:]), 0.5).noise
        for part in torch.arange(len(latents)).split(16):
            t = torch.full((len(part),), time_)
            text, mask = encode([captions[i] for i in part])
            velocity = model(flow.noisy(latents[part], noise[part], t), t, text, mask)
            total[part] += (velocity - (noise[part] - latents[part])).square().mean((1, 2, 3)) / len(TIMES)
    return total


@torch.no_grad()
def sampled(model: DiT, encode: Encode, codec: PcaCodec, side: int, number: int) -> np.ndarray:
    """uint8 (prompts, number, side, side, 3), without guidance: what the model holds for likely. The same noise for every model."""
    grid, mu = side // 8, flow.resolution_mu((side // 16) ** 2)
    pictures = []
    for prompt in PROMPTS:
        rows = []
        for part in torch.arange(number).split(16):
            noise = flow.SeededNoise([flow.number(prompt, i) for i in part.tolist()], (16, grid, grid))()
            text, mask = encode([prompt] * len(part))
            latents = flow.sample(lambda x, t, text=text, mask=mask: model(x, t, text, mask), None, noise, NUM_EULER, mu)
            rows.append(to_images(codec.decode(latents)))
        pictures.append(np.concatenate(rows))
    return np.stack(pictures)


def embedded(pictures: np.ndarray) -> np.ndarray:
    """(N, 1280) EfficientNet-Lite2 vectors of uint8 (N, H, W, 3)."""
    tower = EffNet()
    return loaded(tower, "cpu").pooled(tower.prepare(list(pictures)))


class Judge:
    """Held-out families at one size, through the codec of the models that it judges."""

    def __init__(self, held: dict[str, Held], codec: Path, side: int, embed: bool = True):
        self.codec, self.side, self.encode = load_pca(codec), side, TEXT.load("cpu")
        pixels = {name: to_pixels(torch.from_numpy(family.at(side)).permute(0, 3, 1, 2)) for name, family in held.items()}
        self.latents = {name: self.codec.encode(values) for name, values in pixels.items()}
        self.captions = {name: [one.caption for one in family.pictures] for name, family in held.items()}
        if not embed:
            return
        through = {name: to_images(self.codec.decode(latents)) for name, latents in self.latents.items()}
        self.vectors = {name: embedded(values) for name, values in through.items()}
        everything = np.concatenate([*self.vectors.values()])
        self.mean = everything.mean(0)
        self.basis = np.linalg.svd(everything - self.mean, full_matrices=False)[2][:COMPONENTS]

    def losses(self, model: DiT) -> dict[str, float]:
        losses = {name: held_out_losses(model, self.encode, x, self.captions[name]) for name, x in self.latents.items()}
        return {name: round(float(values.mean()), 5) for name, values in losses.items()}

    def figures(self, vectors: np.ndarray) -> dict[str, float]:
        """Of vectors (N, d) alone: distance to every family, variety."""
        found = {f"kid_{name}": diversity.kernel_distance(vectors, real) for name, real in self.vectors.items()}
        flat, real = ((x - self.mean) @ self.basis.T for x in (vectors, self.vectors["photographs"]))
        found["frechet_photographs"] = diversity.frechet_distance(flat, real)
        # EfficientNet's values are not negative, so that without the mean all cosines are high.
        found["vendi"] = diversity.vendi_score(vectors - self.mean)
        return {name: round(value, 5) for name, value in found.items()}

    def judged(self, place: Path, sheet: Path | None) -> dict:
        """Losses of every checkpoint, and figures of samples of the last one."""
        curve = {}
        for step, model in checkpoints(place):
            curve[step] = self.losses(model)
        pictures = sampled(model, self.encode, self.codec, self.side, NUM_SAMPLES)
        vectors = embedded(pictures.reshape(-1, *pictures.shape[2:]))
        by_prompt = np.split(vectors - self.mean, len(PROMPTS))
        if sheet:
            study_plots.sheet(pictures, sheet)
        return {
            "curve": curve,
            "loss": curve[step],
            **self.figures(vectors),
            "intra_prompt": round(float(np.mean([diversity.mean_cosine_distance(x) for x in by_prompt])), 5),
        }

    def yardsticks(self) -> dict[str, dict[str, float]]:
        """The same figures of held-out photographs themselves, in two halves: what no model can be asked to beat."""
        x = self.vectors["photographs"]
        order = np.random.default_rng(0).permutation(len(x))
        halves = x[order[::2]], x[order[1::2]]
        return {
            "kid_halves": round(diversity.kernel_distance(*halves), 5),
            "vendi_photographs": round(diversity.vendi_score(x - self.mean), 3),
        }


# --- the study ---


def done(results: Path = RESULTS) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def record(line: dict, results: Path = RESULTS) -> None:
    with open(results, "a") as file:
        file.write(json.dumps(line | {"commit": commit(), "versions": versions()}) + "\n")


def has(**keys: object) -> bool:
    return any(all(line.get(name) == value for name, value in keys.items()) for line in done())


def data_arms(run: Path, held: dict[str, Held], seeds: int, first: int = 0) -> None:
    """Every arm and seed at 64 px."""
    packs = {(arm, seed): packed(run, arm, seed, 64, BATCH, NUM_TRAIN) for seed in range(seeds) for arm in ARMS}
    short = {key: facts["images"] for key, (_, facts) in packs.items() if facts["images"] != NUM_TRAIN}
    if short:
        raise ValueError(f"these packs do not have {NUM_TRAIN} images: {short}; lower NUM_TRAIN")
    codec = shared_codec(run, [packs[arm, 0][0] for arm in ARMS], "64")
    judge = Judge(held, codec, 64)
    if not has(experiment="yardsticks"):
        sizes = {name: len(family.pictures) for name, family in held.items()}
        record({"experiment": "yardsticks", "side": 64, "held_out": sizes, "heap": heap_facts(run)} | judge.yardsticks())
    for (arm, seed), (policy, facts) in packs.items():
        if seed < first or has(experiment="data", arm=arm, seed=seed):
            continue
        clock = time.process_time()
        place = trained(run, f"data-{policy}", seed, phase(policy, 64, STEPS, LR), codec, STEPS // 4)
        spent = time.process_time() - clock
        sheet = ROOT / "docs" / "images" / f"study_samples_{arm.replace('+', '_')}.png" if seed == 0 else None
        found = judge.judged(place, sheet)
        record({"experiment": "data", "arm": arm, "seed": seed, "steps": STEPS, **facts, **found, "cpu_seconds": round(spent, 1)})


def heap_facts(run: Path) -> dict:
    """Images of each kind in the heap, and of those how many pass the rules of the curated arm, and the quality filter."""
    truth = json.loads((run / "truth.json").read_text())
    found = {"images": dict(Counter(entry["kind"] for entry in truth.values()))}
    for arm in ("curated", "quality"):
        name = f"all_{arm}"
        policy = run / "policies" / f"{name}.sql"
        write_bytes(arm_policy(arm, 64, 0, HEAP, PRETRAIN.read_text()).encode(), policy)
        filter(str(run), str(policy))
        uids = pq.read_table(run / "selection" / f"{name}.parquet", columns=["uid"])["uid"].to_pylist()
        found[arm] = dict(Counter(truth[uid]["kind"] for uid in uids))
        found[f"{arm}_styles"] = dict(Counter(truth[uid]["detail"] for uid in uids if truth[uid]["kind"] == "styled"))
    found["styles"] = dict(Counter(entry["detail"] for entry in truth.values() if entry["kind"] == "styled"))
    return found


def curriculum_arms(run: Path, held: dict[str, Held], seeds: int) -> None:
    """64, 128, 256 px against 256 px from scratch, of equal FLOPs, on what the curated arm keeps of at least 256 px; and `longer`, 256 px
    from scratch for about the curriculum's processor time, because small batches of few tokens reach fewer FLOPs per second."""
    packs = {side: packed(run, "curated", 0, side, batch, HEAP, max(CURRICULUM)) for side, (_, batch) in CURRICULUM.items()}
    codec = shared_codec(run, [policy for policy, _ in packs.values()], "curriculum")
    judge, steps = Judge(held, codec, 256), curriculum_steps()
    lr = {64: LR, 128: LR / 2, 256: LR / 2}
    longer = round(LONGER * TOP_STEPS)
    arms = {
        "scratch": ({256: TOP_STEPS}, phase(packs[256][0], 256, TOP_STEPS, LR)),
        "curriculum": (steps, "".join(phase(packs[side][0], side, steps[side], lr[side]) for side in CURRICULUM)),
        "longer": ({256: longer}, phase(packs[256][0], 256, longer, LR)),
    }
    for seed in range(seeds):
        for arm, (numbers, phases) in arms.items():
            if has(experiment="curriculum", arm=arm, seed=seed):
                continue
            clock = time.process_time()
            place = trained(run, f"{arm}-{seed}", seed, phases, codec, 10**9)
            spent = time.process_time() - clock
            found = judge.judged(place, ROOT / "docs" / "images" / f"study_samples_{arm}.png" if seed == 0 and arm != "longer" else None)
            facts = {"steps": numbers, "images_seen": sum(number * CURRICULUM[side][1] for side, number in numbers.items())}
            facts["packs"] = {side: facts_["images"] for side, (_, facts_) in packs.items()}
            record({"experiment": "curriculum", "arm": arm, "seed": seed, **facts, **found, "cpu_seconds": round(spent, 1)})


def main(
    images: str = "", run: str = "", seeds: int = 3, first: int = 0, parts: tuple[str, ...] = ("data", "curriculum"), report: bool = False
) -> None:
    """Measure what is not yet in the results, draw, and print the tables.

    Args:
        images: A folder with a MANIFEST.tsv.
        run: A run folder for heap, packs and checkpoints.
        seeds: Of the draw from each arm's pool, of weights, order and noise.
        first: The data arms start with this seed, so that two processes can share them.
        parts: data, curriculum.
        report: Only draw and print.
    """
    torch.set_num_threads(1)
    if not report:
        held = prepare(images, Path(run))
        if "data" in parts:
            data_arms(Path(run), held, seeds, first)
        if "curriculum" in parts:
            curriculum_arms(Path(run), held, seeds)
    lines = done()
    study_plots.draw(lines, ROOT / "docs" / "images")
    print(study_plots.tables(lines))


if __name__ == "__main__":
    assert os.environ.get("OMP_NUM_THREADS") == "1", "set OMP_NUM_THREADS=1: losses are equal only for an equal number of threads"
    tyro.cli(main)
