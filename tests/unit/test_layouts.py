"""Layouts are found, checked and loaded; what is broken or foreign is told by its first wrong tensor."""

import json
import logging
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_k2 import SMALL, outputs, small_file, small_model

from k2model import export, layouts
from k2model.dit import K2
from k2model.layouts import load_model, open_checkpoint, to_diffusers, to_official


def test_names_go_to_diffusers_and_back_and_no_two_meet():
    names = list(layouts.expected_shapes(K2))
    theirs = [to_diffusers(name) for name in names]
    assert [to_official(name) for name in theirs] == names and len(set(theirs)) == 430
    assert to_diffusers("blocks.27.attn.gate.weight") == "transformer_blocks.27.attn.to_gate.weight"
    assert to_diffusers("txtfusion.refiner_blocks.1.mlp.gate.weight") == "text_fusion.refiner_blocks.1.ff.gate.weight"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_the_model_is_told_from_shapes_under_any_prefix(tmp_path, prefix):
    model = small_model()
    path = small_file(tmp_path / "m.safetensors", model, prefix)
    found = open_checkpoint(path)
    assert (found.config, found.layout) == (SMALL, "official")
    loaded = load_model(path, dtype=torch.float32)
    assert (outputs(loaded) - outputs(model)).norm() / outputs(model).norm() < 0.02  # bfloat16 matrices
    mixed = load_model(path)
    assert mixed.blocks[0].attn.wq.weight.dtype == torch.bfloat16 and mixed.first.weight.dtype == torch.float32


def test_a_narrowed_text_fusion_is_told_from_shapes_and_diffusers_cannot_hold_it(tmp_path):
    config = replace(SMALL, text_dim=96, fusion_width=64)
    found = open_checkpoint(small_file(tmp_path / "m.safetensors", small_model(config)))
    assert found.config == config
    with pytest.raises(ValueError, match=r"no place for txtfusion\.narrow\.weight"):
        export.plan(found, "diffusers")


def test_the_embedded_picture_of_a_turbo_repack_is_ignored_with_a_word(tmp_path, caplog):
    picture = {"last.up.weight": torch.zeros(4, 4), "last.down.weight": torch.zeros(4, 4)}
    path = small_file(tmp_path / "m.safetensors", **picture)
    with caplog.at_level(logging.INFO):
        assert len(open_checkpoint(path).tensors) == len(layouts.expected_shapes(SMALL))
    assert caplog.text.count("embedded picture") == 2


def test_a_training_checkpoint_is_a_checkpoint(tmp_path):
    from k2model import checkpoint

    model = small_model()
    place = checkpoint.save(
        tmp_path, 7, {"model": model.state_dict(), "vae": {}}, {"config": {"description": {"recipe": {"model": {"eps": 1e-6}}}}}
    )
    assert open_checkpoint(place).config.eps == 1e-6
    assert torch.equal(load_model(place).state_dict()["first.weight"], model.first.weight)
    lora = checkpoint.save(tmp_path, 8, {"lora": {"x": torch.zeros(1)}}, {})
    with pytest.raises(ValueError, match="LoRA run"):
        open_checkpoint(lora)


def change(path, **tensors):
    """Replace tensors of a file; None removes one."""
    state = load_file(path) | tensors
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)


BROKEN = {
    "blocks.1.mlp.up.weight is missing": {"blocks.1.mlp.up.weight": None},
    r"blocks.1.attn.wo.weight .* is \[64, 32\], expected \[64, 64\]": {"blocks.1.attn.wo.weight": torch.zeros(64, 32)},
    "txtfusion.projector.weight is missing, so the model cannot be told": {"txtfusion.projector.weight": None},
    r"first.weight is \[4\], expected 2 dimensions": {"first.weight": torch.zeros(4)},
    r"control.weight \[2\] is no tensor of a K2 model": {"control.weight": torch.zeros(2)},
    r"tmlp.2.bias is torch.int64": {"tmlp.2.bias": torch.zeros(64, dtype=torch.int64)},
    r"blocks.0.attn.qknorm.qnorm.scale is \[128\], expected a divisor of the width 64": {
        "blocks.0.attn.qknorm.qnorm.scale": torch.zeros(128)
    },
    "no K2 model has these shapes: .*num_kv_heads": {"blocks.0.attn.wk.weight": torch.zeros(96, 64)},
}


@pytest.mark.parametrize("said", BROKEN)
def test_a_broken_file_is_told_by_its_first_wrong_tensor(tmp_path, said):
    path = small_file(tmp_path / "m.safetensors")
    change(path, **BROKEN[said])
    with pytest.raises(ValueError, match=said):
        open_checkpoint(path)


def test_a_file_that_is_cut_off_says_where(tmp_path):
    path = small_file(tmp_path / "m.safetensors")
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    last = max((info["data_offsets"][1], name) for name, info in header.items() if name != "__metadata__")[1]
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"cut off: {last} should end at byte {len(whole)}, the file has {len(whole) - 1}"):
        open_checkpoint(path)
    path.write_bytes(whole[:100])
    with pytest.raises(ValueError, match="cut off inside its header"):
        open_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle", b"\x08" + b"\0" * 7 + b"not json", struct.pack("<Q", 2) + b"[]"])
def test_what_is_not_safetensors_is_told(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        open_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "looks like FLUX"),
        ("transformer_blocks.0.attn.to_q.weight", "Qwen-Image"),
        ("x", r"another model \(x\)"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "is a LoRA"),
        ("lora_unet_blocks_0_attn_wq.lora_down.weight", "is a LoRA"),
    ],
)
def test_a_foreign_file_is_told(tmp_path, name, said):
    save_file({name: torch.zeros(4, 4)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=said):
        open_checkpoint(tmp_path / "m.safetensors")


def test_folders_must_be_whole_and_say_which_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no \.safetensors"):
        open_checkpoint(tmp_path)
    small_file(tmp_path / "a.safetensors")
    assert open_checkpoint(tmp_path).config == SMALL
    small_file(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 \.safetensors and no index"):
        open_checkpoint(tmp_path)
    index = {"weight_map": {"first.weight": "c.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"c.safetensors is missing; .* should hold first.weight"):
        open_checkpoint(tmp_path)
    index["weight_map"] = {"first.weight": "a.safetensors", "gone": "a.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks gone"):
        open_checkpoint(tmp_path)


def test_scaled_fp8_of_comfyui_is_read_in_its_three_forms(tmp_path):
    model = small_model()
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name, scale = "blocks.0.attn.wq", torch.tensor(0.25)
    values = (wanted[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    state = wanted | {f"{name}.weight": values}
    forms = [
        ({f"{name}.weight_scale": scale, f"{name}.comfy_quant": note}, None),
        ({f"{name}.weight_scale": scale}, {"_quantization_metadata": json.dumps({"layers": {name: {"format": "float8_e4m3fn"}}})}),
        ({f"{name}.scale_weight": scale.reshape(1), f"{name}.scale_input": torch.ones(1), "scaled_fp8": torch.zeros(2)}, None),
    ]
    for extra, metadata in forms:
        save_file(state | extra, tmp_path / "m.safetensors", metadata)
        found = open_checkpoint(tmp_path / "m.safetensors")
        assert found.layout == "comfy-fp8"
        assert torch.equal(found.read(f"{name}.weight", torch.float32), values.float() * scale)
        assert found.read(f"{name}.weight").dtype == torch.bfloat16
    other = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    save_file(state | {f"{name}.comfy_quant": other}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=f"{name}.weight is quantized as nvfp4"):
        open_checkpoint(tmp_path / "m.safetensors")
    save_file(wanted | {"blocks.7.attn.wq.weight_scale": scale}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"scale of blocks.7.attn.wq.weight, which is missing"):
        open_checkpoint(tmp_path / "m.safetensors")
    save_file(state | {f"{name}.weight_scale": torch.ones(64)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="only scales per tensor"):
        open_checkpoint(tmp_path / "m.safetensors")
