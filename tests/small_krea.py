"""Small random parts of a released K2: tokenizer, Qwen3-VL, Qwen-Image VAE, transformer, and diffusers' pipeline of them."""

from pathlib import Path
from typing import Any

import torch

from k2model.dit import Config, DiT
from k2model.layouts import diffusers_config
from k2model.text import PREFIX, SUFFIX, Qwen3VLText

SHARED_TOKENIZER = Path("/work/shared/models/tokenizers/qwen25")  # real one, where this machine has it
TAPS = (1, 3)
TEXT_DIM = 32
# How Qwen's tokenizer cuts a text before its merges; what matters here: a run of newlines is one piece.
PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CONFIG = Config(
    width=128,
    num_blocks=2,
    num_heads=4,
    num_kv_heads=2,
    text_dim=TEXT_DIM,
    text_taps=len(TAPS),
    text_heads=2,
    num_fusion_blocks=2,
    time_dim=32,
)


def tokenizer() -> Any:
    """A byte-level BPE with Qwen's pieces and marks, learnt on a few lines."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    whole = Tokenizer(models.BPE())
    whole.normalizer = normalizers.NFC()
    whole.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    whole.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    lines = [PREFIX, SUFFIX, "a red fox in deep snow at dusk, film grain", "un renard\n\nune forêt\n\n", "user\n\nuser\n\n"]
    whole.train_from_iterator(lines * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def qwen(words: Any, num_layers: int = 4) -> Any:
    """A random Qwen3VLModel of width 32 for a tokenizer."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = {"vocab_size": len(words), "hidden_size": TEXT_DIM, "intermediate_size": 64, "num_hidden_layers": num_layers, "head_dim": 16}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": TEXT_DIM}
    torch.manual_seed(0)
    model = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]})).eval()
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():  # the default is so small that attention hardly matters
            if "proj" in name or "embed" in name:
                parameter.mul_(8)
    return model


def saved_qwen(folder: Path, words: Any | None = None) -> Qwen3VLText:
    """Random weights and a tokenizer in a folder, as the hub has them."""
    words = words or tokenizer()
    qwen(words).save_pretrained(folder)
    words.save_pretrained(folder)
    return Qwen3VLText(str(folder), taps=TAPS, dim=TEXT_DIM, dtype="float32")


def vae(attention_scales: tuple[float, ...] = ()) -> Any:
    """A random AutoencoderKLQwenImage, 8 channels wide, with the released normalisation."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(1)
    return AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, attn_scales=list(attention_scales)).eval()


def dit(config: Config = CONFIG) -> DiT:
    """A random transformer, none of whose tensors is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)  # layers draw their first weights from the global generator
        model = DiT(config).eval()
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def diffusers_transformer(model: DiT) -> Any:
    """diffusers' class with the weights of ours, by diffusers' own converter."""
    from diffusers import Krea2Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers

    theirs = Krea2Transformer2DModel.from_config(diffusers_config(model.config))
    theirs.load_state_dict(convert_krea2_transformer_checkpoint_to_diffusers(dict(model.state_dict())), strict=True)
    return theirs.eval()


def pipeline(model: DiT, words: Any, encoder: Any, autoencoder: Any, distilled: bool) -> Any:
    """diffusers' Krea2Pipeline of these parts, with the scheduler settings of the released one."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline

    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=6400,
        time_shift_type="exponential",
    )
    whole = Krea2Pipeline(
        scheduler, autoencoder, encoder, words, diffusers_transformer(model), text_encoder_select_layers=TAPS, is_distilled=distilled
    )
    # These are 34 and 5 with the real tokenizer.
    whole.prompt_template_encode_start_idx = len(words(PREFIX).input_ids)
    whole.prompt_template_encode_num_suffix_tokens = len(words(SUFFIX).input_ids)
    whole.set_progress_bar_config(disable=True)
    return whole
