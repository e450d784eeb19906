"""Models whose text fusion is narrowed: one tensor more than the released ones, which travels with them."""

import pytest
import torch
from safetensors.torch import save_file

from k2model.dit import Config, DiT
from k2model.layouts import diffusers_config, load_model, open_checkpoint
from pipelines import train_recipes

NARROW = Config(
    width=64,
    num_blocks=1,
    num_heads=2,
    num_kv_heads=1,
    text_dim=48,
    text_taps=3,
    text_heads=2,
    num_fusion_blocks=1,
    fusion_width=32,
    time_dim=16,
)


def test_a_narrowed_model_is_told_from_its_file(tmp_path):
    model = DiT(NARROW)
    save_file(model.state_dict(), tmp_path / "narrow.safetensors")
    assert open_checkpoint(tmp_path / "narrow.safetensors").config == NARROW
    loaded = load_model(tmp_path / "narrow.safetensors").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_diffusers_cannot_have_a_narrowed_model():
    with pytest.raises(ValueError, match="narrow"):
        diffusers_config(NARROW)


def test_text_as_wide_as_the_encoder_comes_in_and_the_fusion_reads_it():
    model = DiT(NARROW)
    out = model(torch.randn(1, 16, 4, 4), torch.tensor([0.5]), torch.randn(1, 5, 3, 48))
    out.square().mean().backward()
    assert model.txtfusion.narrow.weight.grad.abs().max() > 0


def test_every_training_recipe_has_most_of_its_flops_at_256_pixels():
    from k2model.flops import train_flops

    for name in ("k2-1b", "k2"):
        recipe = train_recipes.TRAIN[name]()
        batches = {"k2-1b": (256, 128, 64), "k2": (2048, 1024, 512)}[name]  # as the recipes' texts say
        flops = [
            phase.steps * batch * train_flops(recipe.model, recipe.text_tokens, (phase.resolution // 16) ** 2)
            for phase, batch in zip(recipe.phases, batches, strict=True)
        ]
        assert flops[0] >= 0.5 * sum(flops), name
