"""Our folders are diffusers' folders: it reads ours, we read its, and its own converter agrees with us bit for bit."""

import pytest
import torch
from safetensors.torch import load_file
from small_k2 import SMALL, small_file, small_model

from k2model import export
from k2model.layouts import load_model, open_checkpoint
from pipelines.cli import main

diffusers = pytest.importorskip("diffusers", reason="the reference implementation is in the extra [train]")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")


@pytest.fixture(autouse=True)
def no_accelerate(monkeypatch):
    """Without accelerate diffusers cannot keep some modules in float32 while it loads; here all is float32 anyway."""
    monkeypatch.setattr(diffusers.Krea2Transformer2DModel, "_keep_in_fp32_modules", None)


@pytest.mark.parametrize("shard_gb", ["10", "0.0001"])
def test_diffusers_loads_the_folder_that_we_write(tmp_path, shard_gb):
    model = small_model()
    source = small_file(tmp_path / "m.safetensors", model)
    assert main(["convert", "--from", str(source), "--to", str(tmp_path / "d"), "--layout", "diffusers", "--shard-gb", shard_gb]) == 0
    assert len(list((tmp_path / "d").glob("*.index.json"))) == (shard_gb != "10")
    theirs = diffusers.Krea2Transformer2DModel.from_pretrained(tmp_path / "d", torch_dtype=torch.float32).float()
    expected = single_file.convert_krea2_transformer_checkpoint_to_diffusers(
        {name: tensor.float() for name, tensor in load_file(source).items()}
    )
    found = theirs.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert theirs.config.rope_theta == SMALL.rope_theta and tuple(theirs.config.axes_dims_rope) == SMALL.rope_dims
    ours = load_model(tmp_path / "d", dtype=torch.float32)
    latents, text = torch.randn(1, 16, 4, 4), torch.randn(1, 3, SMALL.text_taps, SMALL.text_dim)
    tokens = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).reshape(1, 4, 64)
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    positions = torch.cat([torch.zeros(3, 3), torch.cat([torch.zeros(4, 1), grid], 1)])
    with torch.no_grad():
        wanted = theirs(tokens, text, torch.tensor([0.4]), positions, None, return_dict=False)[0]
        wanted = wanted.reshape(1, 2, 2, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)
        assert (ours(latents, torch.tensor([0.4]), text) - wanted).norm() / wanted.norm() < 2e-6


def test_we_load_the_folder_that_diffusers_writes(tmp_path):
    model = small_model()
    export.write(
        export.plan(open_checkpoint(small_file(tmp_path / "m.safetensors", model)), "diffusers", "fp32"), SMALL, "diffusers", tmp_path / "d"
    )
    theirs = diffusers.Krea2Transformer2DModel.from_pretrained(tmp_path / "d", torch_dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="100KB")
    found = open_checkpoint(tmp_path / "pipeline")  # the folder of a whole pipeline, too
    assert (found.layout, found.config) == ("diffusers", SMALL)
    assert main(["convert", "--from", str(tmp_path / "pipeline"), "--to", str(tmp_path / "back.safetensors")]) == 0
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(tensor, load_file(tmp_path / "m.safetensors")[name].float()) for name, tensor in back.items())


def test_diffusers_reads_our_official_file_with_its_own_converter(tmp_path):
    """As in from_single_file, whose configuration comes from the hub and is given here."""
    export.write(export.plan(open_checkpoint(small_file(tmp_path / "m.safetensors")), "diffusers"), SMALL, "diffusers", tmp_path / "d")
    theirs = diffusers.Krea2Transformer2DModel.from_single_file(
        str(tmp_path / "m.safetensors"), config=str(tmp_path / "d"), torch_dtype=torch.float32, local_files_only=True
    )
    ours = diffusers.Krea2Transformer2DModel.from_pretrained(tmp_path / "d", torch_dtype=torch.float32)
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in theirs.state_dict().items())
