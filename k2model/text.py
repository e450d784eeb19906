"""Text encoders: captions to a stack of hidden states per token.

A description's `load(device)` gives a function from captions to `(states, mask)`: states (B, L, taps, dim) and mask
(B, L) bool, True for valid tokens (on the CPU, where
the model counts them). Every caption, the empty one too, has at least one valid token. L is the longest
caption of the batch: text has no positions in the model, so padding is only there to make a rectangle.
"""

import functools
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from k2model.transfer import send

Encode = Callable[[list[str]], tuple[Tensor, Tensor]]

# The chat template of Qwen-Image, as K2 uses it. The prefix is read by the encoder but its states are dropped.
PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
PACKED = "k2model_packed"  # our attention function's name in transformers


@dataclass(frozen=True)
class Qwen3VLText:
    """The language model of Qwen3-VL at the layers that K2 taps (0 would be the embeddings).

    `load` is the fast form: captions lie one after the other without padding, the template's prefix is run once and its
    keys and values are kept, and nothing above the last tap is loaded or run (no last layer, final norm or language-model
    head). `load_as_released` is K2's own layout. Both give the same states for every valid token (tested, against
    diffusers too).
    """

    path: str = "Qwen/Qwen3-VL-4B-Instruct"  # a folder, or a name in the hub cache; a folder may be a whole diffusers pipeline
    taps: tuple[int, ...] = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
    dim: int = 2560
    max_tokens: int = 512  # prompt and suffix; longer prompts are cut
    dtype: str = "bfloat16"

    @property
    def num_taps(self) -> int:
        return len(self.taps)

    def load(self, device: str | torch.device) -> Encode:
        """
        Raises:
            ValueError: the weights are not at hand, or do not have these layers and this width.
        """
        from transformers import AttentionInterface

        AttentionInterface.register(PACKED, _packed_attention)
        tokenizer, model = self._load(device, PACKED)
        model.layers = model.layers[: max(self.taps)]
        return _PackedEncoder(self, tokenizer, model)

    def load_as_released(self, device: str | torch.device) -> Encode:
        """K2's own layout, always `max_tokens` wide: `[prefix | prompt | padding | suffix]`, positions that count valid tokens only.

        Slower (546 tokens for every caption, all layers); the reference for tests and measurements. Raises as `load` does.
        """
        return functools.partial(self._encode_as_released, *self._load(device, "sdpa"))

    def _load(self, device: str | torch.device, attention: str) -> tuple[Any, Any]:
        from transformers import AutoTokenizer, Qwen3VLModel

        pipeline = Path(self.path)
        weights, words = ((pipeline / name if (pipeline / name).is_dir() else self.path) for name in ("text_encoder", "tokenizer"))
        try:
            tokenizer = AutoTokenizer.from_pretrained(words)
            model = Qwen3VLModel.from_pretrained(weights, dtype=getattr(torch, self.dtype), attn_implementation=attention).language_model
        except OSError as error:
            raise ValueError(f"cannot load the text encoder {self.path!r} ({error}). Give a folder with its weights.") from error
        width, depth = model.config.hidden_size, len(model.layers)
        if width != self.dim or depth <= max(self.taps):  # the state above the last layer is normed, so it is no tap
            raise ValueError(f"{self.path} has {depth} layers of width {width}, but the recipe taps {self.taps} at width {self.dim}")
        return tokenizer, model.eval().requires_grad_(False).to(device)

    def token_ids(self, tokenizer: Any, captions: list[str]) -> list[list[int]]:
        """Prefix and prompt of each caption, cut so that prompt and suffix fit into `max_tokens`.

        They are one string for the tokenizer, as in K2: a prompt that starts with a newline merges with the prefix's last token.
        """
        longest = len(tokenizer(PREFIX).input_ids) + self.max_tokens - len(tokenizer(SUFFIX).input_ids)
        return [tokenizer(PREFIX + caption).input_ids[:longest] for caption in captions]

    @torch.no_grad()
    def _encode_as_released(self, tokenizer: Any, model: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
        num_prefix, suffix = len(tokenizer(PREFIX).input_ids), tokenizer(SUFFIX).input_ids
        prompts = self.token_ids(tokenizer, captions)
        gaps = [num_prefix + self.max_tokens - len(suffix) - len(prompt) for prompt in prompts]
        ids = [prompt + [tokenizer.pad_token_id] * gap + suffix for prompt, gap in zip(prompts, gaps, strict=True)]
        valid = [[True] * len(prompt) + [False] * gap + [True] * len(suffix) for prompt, gap in zip(prompts, gaps, strict=True)]
        mask = torch.tensor(valid, device=model.device)
        # transformers >= 5 numbers positions by raw index when they are not given, which shifts the suffix.
        positions = (mask.cumsum(1) - 1).expand(3, *mask.shape)
        out = model(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            output_hidden_states=True,
        )
        states = torch.stack([out.hidden_states[tap] for tap in self.taps], dim=2)
        return states[:, num_prefix:], mask[:, num_prefix:]


class _PackedEncoder:
    """The captions of a batch as one sequence in which each attends to the prefix, once in memory, and to itself."""

    def __init__(self, text: Qwen3VLText, tokenizer: Any, model: Any):
        self.text, self.tokenizer, self.model = text, tokenizer, model
        self.prefix, self.suffix = tokenizer(PREFIX).input_ids, tokenizer(SUFFIX).input_ids
        self.cache: list[tuple[Tensor, Tensor]] = []  # keys and values (1, heads, prefix, head_dim) of every layer
        with torch.no_grad():
            self._run([self.prefix], 0, self.cache.append)

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        rows = [prompt + self.suffix for prompt in self.text.token_ids(self.tokenizer, captions)]
        cached = min(_common(self.prefix, row) for row in rows)  # less than the whole prefix where a prompt merged with its end
        drop = len(self.prefix) - cached
        packed = self._run([row[cached:] for row in rows], cached)
        lengths = torch.tensor([len(row) - len(self.prefix) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        states = packed.new_zeros(mask.numel(), *packed.shape[1:])
        keep = torch.cat([torch.arange(len(row) - cached) >= drop for row in rows])
        # Numbers of rows and no masks, which the GPU would have to be waited for to count.
        states[send(mask.flatten().nonzero()[:, 0], packed.device)] = packed[send(keep.nonzero()[:, 0], packed.device)]
        return states.unflatten(0, mask.shape), mask

    def _run(self, rows: list[list[int]], cached: int, keep: Callable[[tuple[Tensor, Tensor]], None] | None = None) -> Tensor:
        """States (tokens of all rows, taps, dim); `cached` tokens of the prefix come before every row, from the cache."""
        model = self.model
        x = model.embed_tokens(send(torch.tensor([[token for row in rows for token in row]]), model.device))
        positions = send(torch.cat([torch.arange(cached, cached + len(row)) for row in rows]), model.device)
        rope = model.rotary_emb(x, positions.expand(3, 1, -1))
        states = {}
        for i, layer in enumerate(model.layers, start=1):
            past = tuple(tensor[:, :, :cached] for tensor in self.cache[i - 1]) if cached else None
            x = layer(x, position_embeddings=rope, lengths=[len(row) for row in rows], past=past, keep=keep)
            if i in self.text.taps:
                states[i] = x[0]
        return torch.stack([states[tap] for tap in self.text.taps], dim=1)


def _packed_attention(module, query, key, value, attention_mask, scaling, lengths, past, keep=None, **_) -> tuple[Tensor, None]:
    """Causal attention of each segment to the cached prefix and to itself; an attention function as transformers calls it.

    Args:
        query: (1, heads, tokens, head_dim); key and value the same with fewer heads.
        lengths: Tokens of every segment.
        past: Keys and values of the prefix, or None.
        keep: Called with the keys and values.
    """
    if keep is not None:
        keep((key, value))
    skip = 0 if past is None else past[0].shape[2]
    out = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        # Empty queries for the prefix make it square: plain causal attention, which kernels do without a mask.
        attended = F.scaled_dot_product_attention(F.pad(q, (0, 0, skip, 0)), k, v, is_causal=True, scale=scaling, enable_gqa=True)
        out.append(attended[:, :, skip:])
    return torch.cat(out, dim=2).transpose(1, 2), None


def _common(a: list[int], b: list[int]) -> int:
    """How many first elements two lists share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True)
class HashText:
    """A text encoder without weights: hashed features of each word at four scales, as random sign vectors.

    Like the layers of a language model the taps go from the word to its context, and look only backwards: (0) its
    letter trigrams, so that words spelled alike are alike, (1) the word, (2) the word and the one before it, (3) all
    words so far. A closing token, the only one of an empty caption, sums up the caption at tap 3. Vectors come
    from shake_256, so they are the same on every machine and in every process.
    """

    dim: int = 64
    max_tokens: int = 48

    @property
    def num_taps(self) -> int:
        return 4

    def load(self, device: str | torch.device) -> Encode:
        return functools.partial(self._encode, torch.device(device))

    def _encode(self, device: torch.device, captions: list[str]) -> tuple[Tensor, Tensor]:
        rows = [self._states(caption) for caption in captions]
        length = max(map(len, rows))
        states = np.zeros((len(rows), length, self.num_taps, self.dim), np.float32)
        for row, values in zip(states, rows, strict=True):
            row[: len(values)] = values
        mask = torch.arange(length) < torch.tensor([len(values) for values in rows])[:, None]
        return send(torch.from_numpy(states), device), mask

    def _states(self, caption: str) -> np.ndarray:
        """(tokens, 4, dim) of one caption, each of root mean square near 1."""
        words = [*re.findall(r"\w+|[^\w\s]", caption.lower())[: self.max_tokens - 1], "</s>"]
        so_far = np.zeros(self.dim, np.float32)
        rows = []
        for i, word in enumerate(words):
            padded = f"<{word}>"
            trigrams = [sign_vector("letters", padded[j : j + 3], self.dim) for j in range(len(padded) - 2)]
            before = words[i - 1] if i else "<s>"
            so_far = so_far + sign_vector("bag", word, self.dim)
            rows.append(
                [
                    np.sum(trigrams, axis=0) / np.sqrt(len(trigrams)),
                    sign_vector("word", word, self.dim),
                    sign_vector("pair", f"{before} {word}", self.dim),
                    so_far / np.sqrt(i + 1),
                ]
            )
        return np.array(rows, np.float32)


@functools.lru_cache(maxsize=1 << 16)
def sign_vector(scale: str, feature: str, dim: int) -> np.ndarray:
    """A fixed vector of +1 and -1 (dim,) for a feature: a random projection of the one-hot space of all strings."""
    digest = hashlib.shake_256(f"{scale}\0{feature}".encode()).digest(-(-dim // 8))
    return np.unpackbits(np.frombuffer(digest, np.uint8))[:dim].astype(np.float32) * 2 - 1
