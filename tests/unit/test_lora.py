"""LoRA files in every key style, merged with weights, taken out again exactly, trained beside a frozen base."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_k2 import outputs, small_model
from torch import nn

from k2model import lora
from k2model.dit import K2, DiT
from k2model.layouts import to_diffusers
from k2model.lora import Lora, Update

LAYERS = ("blocks.0.attn.wq", "blocks.1.mlp.down", "txtfusion.refiner_blocks.0.attn.gate", "last.linear", "txtmlp.3")


def made(seed: int = 3, layers=LAYERS, scale: float = 1.0) -> dict[str, Update]:
    """Random updates of rank 4 for the small model."""
    generator, model = torch.Generator().manual_seed(seed), small_model()
    found = {}
    for layer in layers:
        rows, columns = model.get_submodule(layer).weight.shape
        found[layer] = Update(torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator) / 16, scale)
    return found


def merged(updates: dict[str, Update], weight: float = 1.0) -> torch.Tensor:
    """Outputs of the small model with updates added by hand."""
    model = small_model()
    with torch.no_grad():
        for layer, (down, up, scale) in updates.items():
            model.get_submodule(layer).weight += weight * scale * up @ down
    return outputs(model)


def test_every_layer_of_k2_is_found_under_every_key_style():
    with torch.device("meta"):
        layers = [name for name, module in DiT(K2).named_modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 264
    for layer in layers:
        theirs = to_diffusers(f"{layer}.weight").removesuffix(".weight")
        flat, flat_theirs = layer.replace(".", "_"), theirs.replace(".", "_")
        keys = [layer, theirs, f"transformer.{theirs}", f"base_model.model.{theirs}", f"diffusion_model.{layer}"]
        keys += [f"base_model.model.{layer}", f"model.diffusion_model.{layer}", f"lora_unet_{flat}", f"lora_transformer_{flat_theirs}"]
        assert {lora._official_layer(key) for key in keys} == {layer}


@pytest.mark.parametrize("style", ["diffusers", "comfyui"])
def test_a_saved_lora_merges_to_the_same_outputs(tmp_path, style):
    updates = made(scale=0.5)
    lora.save(updates, tmp_path / "l.safetensors", style)
    names = load_file(tmp_path / "l.safetensors")
    first = {
        "diffusers": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "comfyui": "diffusion_model.blocks.0.attn.wq.lora_A.weight",
    }
    assert first[style] in names and len(names) == 2 * len(LAYERS)
    model = small_model()
    assert lora.apply(model, tmp_path / "l.safetensors", 0.6) == len(LAYERS)
    assert torch.allclose(outputs(model), merged(updates, 0.6), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs(model), outputs(small_model()), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="diffusers or comfyui, not 'kohya'"):
        lora.save(updates, tmp_path / "x", "kohya")


def test_kohya_s_names_and_alpha_are_read(tmp_path):
    updates, tensors = made(scale=2 / 4), {}
    for layer, (down, up, _) in updates.items():
        key = "lora_unet_" + layer.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "l.safetensors")
    model = small_model()
    lora.apply(model, tmp_path / "l.safetensors", 1.0)
    assert torch.allclose(outputs(model), merged(updates), rtol=1e-4, atol=1e-5)


def test_the_alpha_of_peft_and_of_diffusers_metadata_is_read(tmp_path):
    updates = made(layers=LAYERS[:1])
    (down, up, _) = updates[LAYERS[0]]
    peft = {
        "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight": down,
        "base_model.model.transformer_blocks.0.attn.to_q.lora_B.weight": up,
    }
    save_file(peft, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    assert lora.load(tmp_path)[LAYERS[0]].scale == 2
    note = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 1})
    save_file(peft, tmp_path / "d.safetensors", {"lora_adapter_metadata": note})
    assert lora.load(tmp_path / "d.safetensors")[LAYERS[0]].scale == 0.25
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_rslora": True}))
    with pytest.raises(ValueError, match="rsLoRA"):
        lora.load(tmp_path)


def test_several_loras_add_up_and_the_base_comes_back_bit_for_bit(tmp_path):
    first, second = made(3), made(4, LAYERS[:2])
    lora.save(first, tmp_path / "a.safetensors", "diffusers")
    lora.save(second, tmp_path / "b.safetensors", "comfyui")
    model = small_model().to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = lora.merge(model, [(tmp_path / "a.safetensors", 0.6), (tmp_path / "b.safetensors", -0.25)])
    assert base.keys() == set(LAYERS)
    wanted = before["blocks.0.attn.wq.weight"].float() + 0.6 * first[LAYERS[0]].delta() - 0.25 * second[LAYERS[0]].delta()
    assert torch.equal(model.blocks[0].attn.wq.weight, wanted.to(torch.bfloat16))
    lora.restore(model, base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_lora_that_does_not_fit_is_told_and_changes_nothing(tmp_path):
    path = tmp_path / "l.safetensors"
    fits = {
        "diffusion_model.blocks.0.attn.wq.lora_A.weight": torch.ones(4, 64),
        "diffusion_model.blocks.0.attn.wq.lora_B.weight": torch.ones(64, 4),
    }
    cases = {
        "no layer double_blocks.0.img_attn.qkv": {
            "double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(4, 8),
            "double_blocks.0.img_attn.qkv.lora_B.weight": torch.ones(8, 4),
        },
        r"update of \[64, 32\], the model's weight is \[64, 64\]": {
            "blocks.1.attn.wo.lora_A.weight": torch.ones(4, 32),
            "blocks.1.attn.wo.lora_B.weight": torch.ones(64, 4),
        },
        "blocks.1.attn.wo has no lora_up": {"blocks.1.attn.wo.lora_down.weight": torch.ones(4, 64)},
        "lokr_w1 is no part of a LoRA": {"lora_unet_blocks_0_attn_wq.lokr_w1": torch.ones(4, 4)},
        "dora_scale is no part of a LoRA": {"blocks.0.attn.wq.dora_scale": torch.ones(4)},
        "expected .rank, in. and .out, rank.": {
            "blocks.1.attn.wo.lora_A.weight": torch.ones(4, 64),
            "blocks.1.attn.wo.lora_B.weight": torch.ones(64, 3),
        },
    }
    model, before = small_model(), outputs(small_model())
    for said, tensors in cases.items():
        save_file(fits | tensors, path)
        with pytest.raises(ValueError, match=said):
            lora.apply(model, path, 1.0)
        assert torch.equal(outputs(model), before)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        lora.apply(model, tmp_path / "none.safetensors", 1.0)


def test_only_the_update_is_trained_and_it_starts_at_nothing(tmp_path):
    model, base = small_model(), outputs(small_model())
    num_layers = lora.attach(model, Lora(rank=4, alpha=8))
    lora.init(model, 5)
    assert num_layers == 2 * 8 and torch.allclose(outputs(model), base, atol=1e-6)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(lora.tensors(model)) and len(trained) == 2 * num_layers
    assert {name for name in model.state_dict() if name not in trained} == set(small_model().state_dict())
    again = small_model()
    lora.attach(again, Lora(rank=4, alpha=8))
    lora.init(again, 5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    text = torch.randn(1, 2, model.config.text_taps, model.config.text_dim)
    for _ in range(2):
        model(torch.ones(1, 16, 4, 4), torch.tensor([0.5]), text).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    lora.save(lora.updates(model), tmp_path / "l.safetensors", "comfyui")
    other = small_model()
    assert lora.apply(other, tmp_path / "l.safetensors", 1.0) == num_layers
    assert not torch.allclose(outputs(model), base) and torch.allclose(outputs(other), outputs(model), atol=1e-5, rtol=1e-4)


def test_a_description_that_trains_nothing_is_refused():
    with pytest.raises(ValueError, match="no Linear layer matches targets 'nothing'"):
        lora.attach(small_model(), Lora(targets="nothing"))
    with pytest.raises(ValueError, match="rank 0"):
        Lora(rank=0)
