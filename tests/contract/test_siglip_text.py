"""Our SigLIP-2 text tower against open_clip's own model, with random weights in open_clip's format and a tokenizer made here."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from curation import towers
from curation.siglip_text import embed_texts
from curation.towers import Siglip

MODEL = "ViT-B-32-SigLIP2-256"
TEXTS = ["a photo with blocky noise", "a clean photo"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a whole model of one layer and 64 words, its tokenizer beside it; and open_clip's own model."""
    folder = tmp_path_factory.mktemp("siglip")
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", "a", "photo", "with", "blocky", "noise", "clean"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    config = open_clip.get_model_config(MODEL)
    config["text_cfg"] |= {"vocab_size": 64, "layers": 1}
    config["vision_cfg"] |= {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "timm_proj": "linear", "image_size": 224}
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**{k: v for k, v in config.items() if k in ("embed_dim", "text_cfg", "vision_cfg")}).eval()
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "weights.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(towers, "_siglip_configs", lambda: {MODEL: config})
        yield folder, model
    shutil.rmtree(folder)


def test_phrases_have_the_vectors_of_open_clip(small):
    folder, model = small
    found = embed_texts(Siglip(MODEL, str(folder / "weights.safetensors")), TEXTS)
    tokens = torch.zeros(2, 64, dtype=torch.long)
    tokens[0, :5], tokens[1, :3] = torch.tensor([2, 3, 4, 5, 6]), torch.tensor([2, 7, 3])
    with torch.inference_mode():
        expected = model.encode_text(tokens, normalize=False).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected[0] - expected[1]).max() > 1e-3


def test_what_is_missing_is_named(small, tmp_path):
    folder, _ = small
    with pytest.raises(ValueError, match="are not on this machine"):
        embed_texts(Siglip(MODEL, str(tmp_path / "no.safetensors")), TEXTS)
    save_file({"visual.x": torch.zeros(1)}, folder / "half.safetensors")
    with pytest.raises(ValueError, match="does not hold the text tower"):
        embed_texts(Siglip(MODEL, str(folder / "half.safetensors")), TEXTS)
    shutil.copy(folder / "half.safetensors", tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"put tokenizer\.json and tokenizer_config\.json beside"):
        embed_texts(Siglip(MODEL, str(tmp_path / "half.safetensors")), TEXTS)
