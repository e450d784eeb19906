"""The same LoRA file gives the same outputs here, in peft and in diffusers; and theirs is read here."""

import pytest
import torch
from safetensors.torch import load_file
from small_k2 import SMALL, outputs, small_model
from torch import nn

from k2model import layouts, lora
from k2model.lora import Lora

peft = pytest.importorskip("peft", reason="peft is the other implementation; pip install peft accelerate")
diffusers = pytest.importorskip("diffusers")


def trained(seed: int = 2) -> nn.Module:
    """A small model with an update that is not zero."""
    model = small_model()
    lora.attach(model, Lora(rank=4, alpha=2))
    lora.init(model, seed)
    with torch.no_grad():
        for name, tensor in lora.tensors(model).items():
            if name.endswith("lora_B"):
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) / 8)
    return model


def test_peft_s_own_layer_and_file_give_our_outputs(tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=r".*blocks\.\d+\.(attn\.(wq|wk|wv|wo|gate)|mlp\.(gate|up|down))", init_lora_weights=False
    )
    theirs = peft.get_peft_model(small_model(), config)
    theirs.save_pretrained(tmp_path)
    model = small_model()
    assert lora.apply(model, tmp_path, 1.0) == 8 * 4
    wanted = outputs(theirs.base_model.model)
    assert (outputs(model) - wanted).norm() / wanted.norm() < 2e-6
    assert not torch.allclose(wanted, outputs(small_model()), atol=1e-2)


def theirs_with(path, weight: float, tmp_path) -> torch.Tensor:
    """Outputs of diffusers' transformer with a LoRA file loaded by diffusers."""
    model = diffusers.Krea2Transformer2DModel.from_config(layouts.diffusers_config(SMALL))
    model.load_state_dict(
        {layouts.to_diffusers(n): t.view(layouts.diffusers_shape(n, t.shape)) for n, t in small_model().state_dict().items()}
    )
    state = diffusers.loaders.Krea2LoraLoaderMixin.lora_state_dict(str(path))
    model.load_lora_adapter(state, prefix="transformer", adapter_name="k2")
    model.set_adapters(["k2"], [weight])
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 4, 6, generator=generator)
    text = torch.randn(2, 3, SMALL.text_taps, SMALL.text_dim, generator=generator)
    tokens = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 64)
    positions = torch.cat([torch.zeros(3, 3), torch.cat([torch.zeros(6, 1), torch.cartesian_prod(torch.arange(2), torch.arange(3))], 1)])
    with torch.no_grad():
        out = model(tokens, text, torch.tensor([0.3, 0.8]), positions, None, return_dict=False)[0]
    return out.reshape(2, 2, 3, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)


@pytest.mark.parametrize("style", ["diffusers", "comfyui"])
def test_diffusers_loads_both_styles_that_we_save(tmp_path, style):
    model = trained()
    lora.save(lora.updates(model), tmp_path / "l.safetensors", style)
    wanted = theirs_with(tmp_path / "l.safetensors", 1.0, tmp_path)
    assert (outputs(model) - wanted).norm() / wanted.norm() < 2e-6
    half = small_model()
    lora.apply(half, tmp_path / "l.safetensors", 0.6)
    wanted = theirs_with(tmp_path / "l.safetensors", 0.6, tmp_path)
    assert (outputs(half) - wanted).norm() / wanted.norm() < 2e-6


def test_we_load_what_diffusers_saves(tmp_path):
    model = diffusers.Krea2Transformer2DModel.from_config(layouts.diffusers_config(SMALL))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "ff.down"], init_lora_weights=False)
    model.add_adapter(config, "k2")
    model.save_lora_adapter(tmp_path, adapter_name="k2", weight_name="l.safetensors")
    found = lora.load(tmp_path / "l.safetensors")
    theirs = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {layouts.to_diffusers(f"{layer}.weight").removesuffix(".weight") for layer in found} == set(theirs)
    assert len(load_file(tmp_path / "l.safetensors")) == 2 * len(found)
    for layer, update in found.items():
        module = theirs[layouts.to_diffusers(f"{layer}.weight").removesuffix(".weight")]
        assert torch.allclose(update.delta(), module.get_delta_weight("k2"), atol=1e-6), layer
