"""The text tower of a SigLIP-2: phrases -> vectors in the space of its images, for names and prompts. Nothing is downloaded.

The vector of a phrase is open_clip's `encode_text(normalize=False)`. Tested on random weights in open_clip's format with a tokenizer made
for the test; the published weights could not be had where this was written.
"""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from safetensors import SafetensorError

from curation.checkpoints import weights_under
from curation.towers import Siglip, text_tower, weights_path


@torch.inference_mode()
def embed_texts(tower: Siglip, texts: Sequence[str], device: str = "cpu") -> np.ndarray:
    """(N, dim) float32 of N phrases.

    The weights are the file of the vision tower, which must hold the whole model; the tokenizer is the one beside that file
    (tokenizer.json, tokenizer_config.json), else the one in the Hugging Face cache.

    Raises:
        ValueError: weights or tokenizer are not on this disk, or the file holds no text tower of this model.
    """
    path = weights_path(tower)
    if path is None:
        raise ValueError(f"the weights {tower.pretrained!r} of {tower.model} are not on this machine; without them there is no text tower")
    beside = str(path.parent) if Path(path.parent, "tokenizer.json").is_file() else None
    try:
        module, tokenize = text_tower(tower.model, beside)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer of {tower.model} is not on this machine; fetch it once with `hf download timm/{tower.model}`, or put "
            f"tokenizer.json and tokenizer_config.json beside {path}"
        ) from error
    try:
        weights = {key.removeprefix("text."): value.float() for key, value in weights_under(path, "text.")}
        module.load_state_dict(weights, strict=True, assign=True)
    except (RuntimeError, UnpicklingError, SafetensorError) as error:
        raise ValueError(f"{path} does not hold the text tower of {tower.model} in open_clip's format: {str(error)[:400]}") from error
    module.eval().to(device)
    return np.concatenate([module(tokenize([text]).to(device)).float().cpu().numpy() for text in texts])
