"""What bench_step.py steps on: frozen parts of the true sizes with random weights, packed sets, and a clock for the parts of a step."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from bench_pack import corpus
from bench_text_vae import captions
from diffusers import AutoencoderKLQwenImage
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerFast, Qwen3VLConfig

from k2model import parallel
from k2model.dit import K2_1B, Config, DiT
from k2model.text import PREFIX, SUFFIX, Qwen3VLText
from k2model.vae import QwenImageCodec, QwenImageVae, still
from pipelines import pack
from pipelines.train_recipes import TrainRecipe, k2_1b
from pipelines.train_step import Parts


@dataclass(frozen=True)
class Scale:
    """What is trained, and on what."""

    model: Config
    text: dict[str, Any]  # of Qwen3-VL's language model
    taps: tuple[int, ...]
    vae: dict[str, Any]  # of AutoencoderKLQwenImage; empty: as released
    batches: dict[int, int]  # images in a row group by side in pixels, as the recipe says
    median: int  # tokens of a caption; their mean is .13 more, 160 with the template's
    groups: int  # row groups of a packed set


SCALES = {
    "k2-1b": Scale(
        K2_1B,
        {
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        },
        Qwen3VLText().taps,
        {},
        {256: 32, 512: 16, 1024: 8},
        135,
        8,
    ),
    "tiny": Scale(
        Config(width=64, num_blocks=2, num_heads=2, num_kv_heads=1, text_dim=32, text_taps=2, text_heads=2, fusion_width=16, time_dim=32),
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        (1, 3),
        {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
        {32: 4, 48: 2, 64: 2},
        8,
        4,
    ),
}


def words() -> PreTrainedTokenizerFast:
    """A word is a token; of what is in the templates and captions every word is known."""
    known = [*dict.fromkeys(word for text in (PREFIX, SUFFIX) for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text))]
    whole = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[pad]", "[unk]", *known])}, "[unk]"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="[pad]", unk_token="[unk]")


def language_model(scale: Scale, dtype: str, device: str | torch.device, attention: str) -> Any:
    """A random Qwen3VLModel with next to no eyes, made where it stays."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": scale.text["hidden_size"]}
    config = Qwen3VLConfig(text_config=scale.text, vision_config=vision | {"deepstack_visual_indexes": [0]})
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModel.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class RandomText(Qwen3VLText):
    """The text encoder as `k2 train` runs it, without weights to load."""

    scale: str = "k2-1b"

    def _load(self, device: str | torch.device, attention: str) -> tuple[Any, Any]:
        return words(), language_model(SCALES[self.scale], self.dtype, device, attention).language_model


@dataclass(frozen=True)
class RandomVae(QwenImageVae):
    """The autoencoder as `k2 train` runs it, without weights to load."""

    scale: str = "k2-1b"

    def load(self, device: str | torch.device) -> QwenImageCodec:
        return QwenImageCodec(still(video_vae(SCALES[self.scale], self.dtype, device)))


def video_vae(scale: Scale, dtype: str, device: str | torch.device) -> AutoencoderKLQwenImage:
    """diffusers' class, random."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoencoderKLQwenImage(**scale.vae)
    return model.to(getattr(torch, dtype)).eval().requires_grad_(False)


def recipe(name: str, num_groups: int) -> TrainRecipe:
    """The recipe k2-1b with the parts of a scale, and `num_groups` row groups in a global batch."""
    scale, whole = SCALES[name], k2_1b()
    text = RandomText(taps=scale.taps, dim=scale.text["hidden_size"], scale=name)
    phases = tuple(
        replace(phase, name=str(side), data="p", resolution=side, num_groups=num_groups)
        for phase, side in zip(whole.phases, scale.batches, strict=True)
    )
    return replace(whole, name=name, model=scale.model, text=text, vae=RandomVae(scale=name), phases=phases, hold_out=0)


def packed_sets(place: Path, name: str) -> None:
    """PLACE/<side>/packed/p by `k2 pack`: crops of photographs, square, with captions of caption-like lengths."""
    scale = SCALES[name]
    for side, batch in scale.batches.items():
        count = batch * scale.groups
        corpus(place / str(side), count, None, (side, side), side, captions(None, count, scale.median))
        if pack.pack(str(place / str(side)), "p", batch, ray="off"):
            raise RuntimeError(f"k2 pack failed at {side} px")


@torch.no_grad()
def random_weights(model: DiT, seed: int) -> DiT:
    """As `parallel.init`, but made by the device: that one takes ten seconds for 1.4 billion values, before the first step."""
    torch.manual_seed(seed)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                parameter.uniform_(-bound, bound)
            else:
                parameter.zero_()
    return model


@contextmanager
def quick_weights() -> Iterator[None]:
    """In it the first weights are `random_weights`."""
    with patch.object(parallel, "init", random_weights):
        yield


class Clock:
    """Seconds of the parts of a step, on the GPU's own timeline (or the CPU's): nothing is waited for in between."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.spans: dict[str, list[list[Any]]] = defaultdict(list)

    def now(self) -> Any:
        """A point in time."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self, name: str) -> None:
        self.spans[name].append([self.now()])

    def end(self, name: str) -> None:
        self.spans[name][-1].append(self.now())

    def timed(self, name: str, call: Callable) -> Callable:
        """The function, with its time under `name`."""

        def wrapped(*inputs: Any) -> Any:
            self.begin(name)
            found = call(*inputs)
            self.end(name)
            return found

        return wrapped

    def read(self) -> dict[str, float]:
        """Seconds by name since the last read; the device must be done."""
        found = {
            name: sum(start.elapsed_time(end) / 1e3 if self.cuda else end - start for start, end in spans)
            for name, spans in self.spans.items()
        }
        self.spans.clear()
        return found

    def watch(self, parts: Parts) -> Parts:
        """The parts of a step that tell this clock what they do: text, vae, forward, backward (with gradients of the model), optimizer."""
        codec = parts.codec

        def backward_begins(gradient: torch.Tensor) -> None:
            self.begin("backward")
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self.end("backward"))

        def forward_ends(_: Any, __: Any, out: torch.Tensor) -> None:
            self.end("forward")
            if out.requires_grad:
                out.register_hook(backward_begins)

        parts.model.register_forward_pre_hook(lambda *_: self.begin("forward"))
        parts.model.register_forward_hook(forward_ends)
        parts.optimizer.register_step_pre_hook(lambda *_: self.begin("optimizer"))
        parts.optimizer.register_step_post_hook(lambda *_: self.end("optimizer"))
        timed = SimpleNamespace(encode=self.timed("vae", codec.encode), decode=codec.decode, tensors=codec.tensors)
        return parts._replace(encode=self.timed("text", parts.encode), codec=timed)
