"""Named descriptions for the verbs. A user's own file works too: `--recipe my.py:name`.

torch is imported only when a recipe that needs it is built, so that `k2 filter` starts at once.
"""

import importlib.util
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pipelines.cluster import USER_MODULE

log = logging.getLogger(__name__)


def find(name: str, recipes: dict[str, Callable[[], Any]]) -> Any:
    """Build the recipe called `name`, or `my.py:name` from a user's file (a value, or a function without arguments).

    Raises:
        ValueError: no such recipe; the text lists the names.
    """
    if ":" in name:
        path, _, attribute = name.rpartition(":")
        if not Path(path).is_file():
            raise ValueError(f"--recipe {name!r}: there is no file {path!r}")
        spec = importlib.util.spec_from_file_location(USER_MODULE, path)
        module = sys.modules[USER_MODULE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, attribute):
            raise ValueError(f"--recipe {name!r}: {path} has no {attribute!r}")
        value = getattr(module, attribute)
        return value() if callable(value) else value
    if name not in recipes:
        near = get_close_matches(name, recipes, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no recipe {name!r}; {hint}choose from {', '.join(recipes)}, or give a file as my.py:name")
    return recipes[name]()


# --- annotation: a recipe is a tuple of stages ---


def basics_only() -> tuple:
    """Facts that need no model."""
    from curation.stages.basics import Basics
    from curation.stages.provenance import Provenance

    return (Basics(), Provenance())


def offline() -> tuple:
    """EfficientNet-Lite2 and the compact statistics: weights inside installed packages, no hub."""
    from curation.stages.artifacts import Artifacts
    from curation.stages.basics import Basics
    from curation.stages.defects import Defects
    from curation.stages.embedding import Embedding
    from curation.stages.provenance import Provenance
    from curation.stages.synthetic import Synthetic
    from curation.stages.text_density import TextDensity
    from curation.towers import Compact, EffNet

    return (Basics(), Defects(), TextDensity(), Provenance(), Embedding(EffNet()), Embedding(Compact()), Synthetic(), Artifacts())


def siglip() -> tuple:
    """SigLIP-2 and the compact tower, whose pixels and the file's own words are what the detector then sees; artifacts are those of
    compact's SAE. The semantic branch and an SAE of a SigLIP-2 tower are the user's own: `k2 synthetic fit --towers compact siglip`,
    `k2 sae fit --tower siglip`, then a recipe file that names them."""
    from curation.stages.artifacts import Artifacts
    from curation.stages.basics import Basics
    from curation.stages.embedding import Embedding
    from curation.stages.provenance import Provenance
    from curation.stages.synthetic import Synthetic
    from curation.towers import Compact, Siglip

    return (Basics(), Provenance(), Embedding(Siglip()), Embedding(Compact()), Synthetic(towers=(Compact(),)), Artifacts())


def default() -> tuple:
    """SigLIP-2 where its weights are at hand, beside the offline tower that the shipped models were fitted on."""
    from curation.stages.embedding import Embedding
    from curation.towers import Siglip, available

    stages = offline()
    if available(Siglip()):
        return (stages[0], Embedding(Siglip()), *stages[1:])
    log.info("SigLIP-2 weights are not in the hub cache: using effnet and compact instead (docs/operating.md says how to add them)")
    return stages


ANNOTATE = {"default": default, "offline": offline, "siglip": siglip, "basics": basics_only}

# --- training ---


@dataclass(frozen=True)
class Phase:
    """One step of the curriculum. The batch is the row group of the packed set, so `k2 pack --batch-size` sets its size."""

    name: str
    policy: str  # trains on RUN/packed/<policy>
    resolution: int
    steps: int
    lr: float
    warmup: int  # steps from 0 to lr; a new resolution is a new loss, so every phase has its own
    decay: int  # last steps, down to 0
    mu: float  # training times are logit-normal with this mean: the log of the time shift
    num_samples: int  # pictures in the sample grid


@dataclass(frozen=True)
class TrainRecipe:
    """Everything that decides a training run, but for the data and the machine."""

    name: str
    model: Any  # k2model.dit.Config
    text: Any  # k2model.text.HashText or Qwen3VLText
    vae: Any  # k2model.vae.Pca or QwenImageVae
    phases: tuple[Phase, ...]
    text_tokens: int  # valid text tokens of a usual caption; only --dry-run uses it
    seed: int = 0
    caption_dropout: float = 0.1  # share of captions left empty, so that the model can be guided away from the empty one
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest norm of the gradient
    precision: str = "fp32"  # or bf16: autocast; weights and optimizer are float32 either way
    sample_every: int = 100  # steps; and at the end of every phase
    sample_steps: int = 24
    guidance: float = 2.5  # K2's convention, one less than the usual scale
    sample_prompts: tuple[str, ...] = ()  # empty: captions of the data, with their pictures beside the samples
    checkpoint_every: int = 50  # steps; and at the end of every phase
    lora: Any = None  # k2model.lora.Lora: only this is trained, on a frozen model that is given with --base


def k2_nano() -> TrainRecipe:
    """The whole curriculum in about two minutes on two CPU cores: the same code as the 12.8B model, small numbers.

    It shows that data, model, loss, resume and sampling fit together, and learns where colours lie and little more. The
    steps are for row groups of 4, 2 and 1 images (`k2 pack --batch-size`), which is what `k2 demo` packs: in so short a run
    many small batches learn more than few large ones. Most steps are at 256 px; an image costs 6 times as much at 512 px
    and 60 times at 1024 px, and so does a sample.
    """
    from k2model.dit import NANO
    from k2model.text import HashText
    from k2model.vae import Pca

    return TrainRecipe(
        name="k2-nano",
        model=NANO,
        text=HashText(),
        vae=Pca(),
        text_tokens=10,
        phases=(
            Phase("256", "pretrain_256", 256, steps=700, lr=3e-3, warmup=20, decay=200, mu=0.50, num_samples=6),
            Phase("512", "pretrain_512", 512, steps=24, lr=1e-3, warmup=4, decay=12, mu=0.58, num_samples=3),
            Phase("1024", "pretrain_1024", 1024, steps=4, lr=5e-4, warmup=2, decay=2, mu=0.91, num_samples=1),
        ),
        sample_every=350,
        sample_steps=12,
        checkpoint_every=100,
    )


def k2_1b() -> TrainRecipe:
    """1.36B parameters on one GPU of 80 GB: 22 GB of weights, gradients and optimizer (16 bytes each), the rest for activations.

    The curriculum of `k2` with a smaller one's numbers, which are ours: batches of 256, 128 and 64 images see 51, 6 and 1 million: 63 %
    of the FLOPs are at 256 px. Learning rate 2e-4 (models of about 1B use 1e-4 to 3e-4), halved per doubling of the side. The text
    fusion is narrowed (`k2model.dit.K2_1B`), the text encoder is K2's own. Not run: no GPU was at hand.
    """
    from k2model.dit import K2_1B

    return replace(
        k2(),
        name="k2-1b",
        model=K2_1B,
        phases=(
            Phase("256", "pretrain_256", 256, steps=200_000, lr=2e-4, warmup=2_000, decay=0, mu=0.50, num_samples=16),
            Phase("512", "pretrain_512", 512, steps=50_000, lr=1e-4, warmup=1_000, decay=0, mu=0.58, num_samples=16),
            Phase("1024", "pretrain_1024", 1024, steps=16_000, lr=5e-5, warmup=1_000, decay=4_000, mu=0.91, num_samples=8),
        ),
    )


def k2() -> TrainRecipe:
    """The released 12.8B model. It needs at least four H200-class GPUs and sharded training, so here it is a description
    for `--dry-run` and for the pieces; the numbers that Krea has not published are ours and say so.

    * FLOPs: with batches of 2048, 1024 and 512 images the phases see 1.02 billion, 205 million and 38 million images: half
      of the FLOPs go to 256 px (Krea: the majority at low resolution).
    * Learning rate: 1e-4 is the middle of what published models of 6B to 20B use; half of it per doubling of the side;
      warmed up again at each resolution because the loss jumps there. Only the last phase decays, so that the stable
      part of the others can be merged (Krea merges checkpoints instead of keeping an average).
    * Time shift: the mu of Krea's inference schedule at each resolution. Krea swept the training shift and did not publish it.
    * Caption dropout 0.1, weight decay 0.01 on matrices and norm scales, clip 1.0: the values that peers agree on.
    * bf16 throughout; Krea's 8-bit matrix products at 256 and 512 px come with the sharded trainer.
    """
    from k2model.dit import K2
    from k2model.text import Qwen3VLText
    from k2model.vae import QwenImageVae

    return TrainRecipe(
        name="k2",
        model=K2,
        text=Qwen3VLText(),
        vae=QwenImageVae(),
        text_tokens=160,
        phases=(
            Phase("256", "pretrain_256", 256, steps=500_000, lr=1e-4, warmup=5_000, decay=0, mu=0.50, num_samples=16),
            Phase("512", "pretrain_512", 512, steps=200_000, lr=5e-5, warmup=2_500, decay=0, mu=0.58, num_samples=16),
            Phase("1024", "pretrain_1024", 1024, steps=75_000, lr=2.5e-5, warmup=2_500, decay=15_000, mu=0.91, num_samples=8),
        ),
        precision="bf16",
        sample_every=2_500,
        sample_steps=52,
        checkpoint_every=500,
    )


def lora_nano() -> TrainRecipe:
    """A LoRA on a k2-nano: seconds on two CPU cores. `--base RUN/train/k2-nano/checkpoints/000728` brings weights and codec."""
    from k2model.lora import Lora

    return replace(
        k2_nano(),
        name="lora-nano",
        phases=(Phase("256", "pretrain_256", 256, steps=200, lr=3e-3, warmup=10, decay=50, mu=0.50, num_samples=6),),
        lora=Lora(rank=8, alpha=8),
        sample_every=100,
    )


def lora_k2() -> TrainRecipe:
    """A LoRA on the released Raw, to be applied to Raw or, at a weight of about 0.6, to Turbo. One GPU of 80 GB.

    * Raw and not Turbo is the base: Turbo's few steps are what a LoRA trained on it would undo.
    * Rank 32 on the attention and MLP layers of the 28 blocks, alpha = rank, learning rate 1e-4: what trainers of LoRAs
      for models of this size start from. The text fusion and the ends stay as they are.
    * The base is bfloat16 (26 GB), the LoRA and its optimizer are float32; a row group of one image at 1024 px holds
      about 34 GB of activations (no recomputation), so pack with `--batch-size 1`.
    """
    from k2model.lora import Lora

    return replace(
        k2(),
        name="lora-k2",
        phases=(Phase("1024", "pretrain_1024", 1024, steps=2_000, lr=1e-4, warmup=100, decay=400, mu=0.91, num_samples=4),),
        lora=Lora(rank=32, alpha=32),
        sample_every=250,
        checkpoint_every=250,
    )


TRAIN = {"k2-nano": k2_nano, "k2-1b": k2_1b, "k2": k2, "lora-nano": lora_nano, "lora-k2": lora_k2}
