"""Text encoders: captions to a stack of hidden states per token.

A description's `load(device)` gives a function from captions to `(states, mask)`: states (B, L, taps, dim) and mask
(B, L) bool, True for valid tokens. Every caption, the empty one too, has at least one valid token. L is the longest
caption of the batch: text has no positions in the model, so padding is only there to make a rectangle.
"""

import functools
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Encode = Callable[[list[str]], tuple[Tensor, Tensor]]

# The chat template of Qwen-Image, as K2 uses it. The prefix is read by the encoder but its states are dropped.
PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Qwen3VLText:
    """The language model of Qwen3-VL at the layers that K2 taps (0 would be the embeddings).

    K2's own code pads inside the template, `[prefix | prompt | padding | suffix]`, with positions that count real
    tokens only. Encoding `[prefix | prompt | suffix]` without that gap gives the same states (tested), so padding
    goes to the end, and only as much as the batch needs.
    """

    path: str = "Qwen/Qwen3-VL-4B-Instruct"  # a folder, or a name in the hub cache
    taps: tuple[int, ...] = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
    dim: int = 2560
    max_tokens: int = 512  # prompt and suffix
    dtype: str = "bfloat16"

    @property
    def num_taps(self) -> int:
        return len(self.taps)

    def load(self, device: str | torch.device) -> Encode:
        """
        Raises:
            ValueError: the weights are not at hand, or do not have these layers and this width.
        """
        from transformers import AutoTokenizer, Qwen3VLModel

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path)
            model = Qwen3VLModel.from_pretrained(self.path, dtype=getattr(torch, self.dtype)).language_model
        except OSError as error:
            raise ValueError(f"cannot load the text encoder {self.path!r} ({error}). Give a folder with its weights.") from error
        width, depth = model.config.hidden_size, len(model.layers)
        if width != self.dim or depth < max(self.taps):
            raise ValueError(f"{self.path} has {depth} layers of width {width}, but the recipe taps {self.taps} at width {self.dim}")
        model.layers = model.layers[: max(self.taps)]  # nothing above the last tap is read
        model.eval().requires_grad_(False).to(device)
        return functools.partial(self._encode, tokenizer, model)

    def _encode(self, tokenizer, model, captions: list[str]) -> tuple[Tensor, Tensor]:
        num_prefix = len(tokenizer(PREFIX).input_ids)
        suffix = tokenizer(SUFFIX).input_ids
        # Prefix and prompt are one string for the tokenizer, as in K2: a prompt that starts with a newline merges with the prefix.
        longest = num_prefix + self.max_tokens - len(suffix)
        rows = [tokenizer(PREFIX + caption).input_ids[:longest] + suffix for caption in captions]
        length = max(map(len, rows))
        ids = torch.tensor([row + [suffix[-1]] * (length - len(row)) for row in rows], device=model.device)
        mask = torch.arange(length, device=model.device) < torch.tensor([len(row) for row in rows], device=model.device)[:, None]

        states: dict[int, Tensor] = {}

        def keep(tap: int, output: Tensor) -> None:
            states[tap] = output

        # transformers >= 5 numbers positions by raw index when they are not given, which is wrong as soon as padding is inside.
        positions = torch.arange(length, device=model.device).expand(3, len(rows), length)
        hooks = [
            model.layers[tap - 1].register_forward_hook(lambda _module, _args, output, tap=tap: keep(tap, output)) for tap in self.taps
        ]
        try:
            with torch.no_grad():
                model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        stack = torch.stack([states[tap] for tap in self.taps], dim=2)[:, num_prefix:]
        return stack, mask[:, num_prefix:]


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
        return torch.from_numpy(states).to(device), mask.to(device)

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
