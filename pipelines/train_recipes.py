"""Training runs, described: phases, model, text encoder and codec. Yours is a file with a `TrainRecipe`: `k2 train --recipe my.py:name`.

torch is imported only when a recipe is built.
"""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Phase:
    """One step of the curriculum. A global batch is `num_groups` row groups of the packed sets, each of `k2 pack --batch-size` images."""

    name: str
    data: str | tuple[tuple[str, float], ...]  # RUN/packed/<name>, or several with their shares: (("pretrain_256", 0.9), ("art_256", 0.1))
    resolution: int
    steps: int
    lr: float
    warmup: int  # steps from 0 to lr; a new resolution is a new loss, so every phase has its own
    decay: int  # last steps, down to 0
    mu: float  # training times are logit-normal with this mean: the log of the time shift
    num_samples: int  # pictures in the sample grid
    num_groups: int = 1  # row groups in a global batch, whatever the number of ranks
    caption_mix: tuple[float, float, float] = (0.7, 0.2, 0.1)  # long, medium, short: of images that have captions of several lengths
    precision: str = "fp32"  # bf16, float8_tensorwise, float8_rowwise; weights and optimizer are float32 in all of them
    checkpointing: str = "none"  # of activations: none, selective (attention and half of the products are kept) or full
    align: Any = None  # k2model.align.Align: pull a block's tokens to those of an image encoder, in the first epochs
    merge_last: int = 0  # start from the mean of the last n checkpoints of the phase before (PMA); 0: from its last weights
    keep_optimizer: bool = True  # its moments go on from the phase before

    def __post_init__(self) -> None:
        if len(self.caption_mix) != 3 or min(self.caption_mix) < 0 or not sum(self.caption_mix):
            raise ValueError(f"phase {self.name}: caption_mix {self.caption_mix} must be three shares, of long, medium and short captions")

    @property
    def mixture(self) -> tuple[tuple[str, float], ...]:
        """Names of the packed sets with their weights."""
        return ((self.data, 1.0),) if isinstance(self.data, str) else self.data


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
    optimizer: str = "adamw"  # or muon: for the matrices of the blocks, AdamW for the rest
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest norm of the gradient
    compiled: bool = False  # torch.compile, block by block
    latents: bool = False  # read those of `k2 pack --latents`, made by this codec, instead of encoding images
    sample_every: int = 100  # steps; and at the end of every phase
    sample_steps: int = 24
    guidance: float = 2.5  # K2's convention, one less than the usual scale
    sample_prompts: tuple[str, ...] = ()  # empty: captions of the data, with their pictures beside the samples
    hold_out: int = 0  # row groups of every packed set that are not trained on (at most a tenth of it): validation
    validate_every: int = 100  # steps; and at the end of every phase
    checkpoint_every: int = 50  # steps; and at the end of every phase
    keep_last: int = 5  # checkpoints; older ones are deleted, but for ...
    keep_every: int = 0  # ... those of every so many steps, and the end of every phase
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
        hold_out=3,
        checkpoint_every=100,
    )


def k2_1b() -> TrainRecipe:
    """1.36B parameters on one GPU of 48 or 80 GB: 22 GB of weights, gradients and optimizer (16 bytes each), the rest for activations.

    The curriculum of `k2` with a smaller one's numbers, which are ours: pack with `--batch-size` 32, 16 and 8; global batches of 256,
    128 and 64 images see 51, 6 and 1 million: 63 % of the FLOPs are at 256 px. Learning rate 2e-4 (models of about 1B use 1e-4
    to 3e-4), halved per doubling of the side. The text fusion is narrowed (`k2model.dit.K2_1B`), the text encoder is K2's own.
    bf16 and selective recomputation throughout: 27 to 37 GiB by the plan of `--dry-run`, with text encoder and VAE about 10 more.
    Not run: no GPU was at hand.
    """
    from k2model.dit import K2_1B

    whole = k2()
    sizes = {
        "256": {"steps": 200_000, "lr": 2e-4, "warmup": 2_000},
        "512": {"steps": 50_000, "lr": 1e-4, "warmup": 1_000},
        "1024": {"steps": 16_000, "lr": 5e-5, "warmup": 1_000, "decay": 4_000},
    }
    phases = tuple(replace(phase, num_groups=8, precision="bf16", checkpointing="selective", **sizes[phase.name]) for phase in whole.phases)
    return replace(whole, name="k2-1b", model=K2_1B, phases=phases)


def k2() -> TrainRecipe:
    """The released 12.8B model, on at least four H200-class GPUs. The numbers that Krea has not published are ours and say so.

    * Batches: pack with `--batch-size` 32, 8 and 4; 64, 128 and 128 row groups make 2048, 1024 and 512 images. They fit 64, 128 or 256
      GPUs and their divisors.
    * FLOPs: the phases see 1.02 billion, 205 million and 38 million images: half of the FLOPs go to 256 px (Krea: the majority at
      low resolution).
    * Learning rate: 1e-4 is the middle of what published models of 6B to 20B use; half of it per doubling of the side;
      warmed up again at each resolution because the loss jumps there. Only the last phase decays, so that the stable
      part of the others can be merged (Krea merges checkpoints instead of keeping an average: `k2 train merge`).
    * Time shift: the mu of Krea's inference schedule at each resolution. Krea swept the training shift and did not publish it.
    * Captions: predominantly long ones, with short and medium ones throughout, as Krea's; it has not published the shares. 0.7, 0.2, 0.1
      are near those of LongCat (0.65 detailed, 0.20 of a composition, 0.15 shorter).
    * Caption dropout 0.1, weight decay 0.01 on matrices and norm scales, clip 1.0: the values that peers agree on.
    * Precision and checkpointing as Krea's: 8-bit products scaled by tensor at 256 px and by row at 512 px, bf16 at 1024 px;
      activations are recomputed selectively at first and in full at 1024 px.
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
            Phase(
                "256",
                "pretrain_256",
                256,
                steps=500_000,
                lr=1e-4,
                warmup=5_000,
                decay=0,
                mu=0.50,
                num_samples=16,
                num_groups=64,
                precision="float8_tensorwise",
                checkpointing="selective",
            ),
            Phase(
                "512",
                "pretrain_512",
                512,
                steps=200_000,
                lr=5e-5,
                warmup=2_500,
                decay=0,
                mu=0.58,
                num_samples=16,
                num_groups=128,
                precision="float8_rowwise",
                checkpointing="selective",
            ),
            Phase(
                "1024",
                "pretrain_1024",
                1024,
                steps=75_000,
                lr=2.5e-5,
                warmup=2_500,
                decay=15_000,
                mu=0.91,
                num_samples=8,
                num_groups=128,
                precision="bf16",
                checkpointing="full",
            ),
        ),
        compiled=True,
        sample_every=2_500,
        sample_steps=52,
        hold_out=32,
        validate_every=2_500,
        checkpoint_every=500,
        keep_last=10,
        keep_every=50_000,
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
        phases=(
            Phase("1024", "pretrain_1024", 1024, steps=2_000, lr=1e-4, warmup=100, decay=400, mu=0.91, num_samples=4, precision="bf16"),
        ),
        lora=Lora(rank=32, alpha=32),
        compiled=False,
        hold_out=0,
        sample_every=250,
        checkpoint_every=250,
    )


TRAIN = {"k2-nano": k2_nano, "k2-1b": k2_1b, "k2": k2, "lora-nano": lora_nano, "lora-k2": lora_k2}
