"""`k2 convert`: arithmetic of the published files, streaming, whole or nothing."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_k2 import outputs, small_file, small_model

from k2model import export, quantize
from k2model.dit import K2
from k2model.layouts import Checkpoint, load_model, open_checkpoint
from k2model.tensor_files import New
from pipelines import convert as verb
from pipelines.cli import main


def dry_run(capsys, *arguments: str) -> tuple[list[dict], dict]:
    assert main(["convert", "--dry-run", *arguments]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return rows[:-1], rows[-1]


def numbers(summary: dict) -> tuple:
    return tuple(summary[key] for key in ("tensors", "quantized", "kept", "bytes", "GiB"))


def test_a_dry_run_counts_the_released_files_to_the_byte_without_one(capsys):
    rows, total = dry_run(capsys, "--model", "k2")
    assert numbers(total) == (430, 0, 430, 26_283_288_880, 24.4782) and total["parameters"] == 12_820_073_036
    assert sum(row["dtype"] == "BF16" for row in rows) == 256 and sum(row["bytes"] for row in rows) == total["bytes"]
    assert rows[0] == {"name": "first.weight", "dtype": "F32", "shape": [6144, 64], "bytes": 1572864}
    assert numbers(dry_run(capsys, "--model", "k2", "--dtype", "bf16")[1]) == (430, 0, 430, 25_640_146_072, 23.8792)
    assert numbers(dry_run(capsys, "--model", "k2", "--layout", "fp8")[1]) == (430, 264, 166, 12_824_553_740, 11.9438)
    rows, total = dry_run(capsys, "--model", "k2", "--layout", "comfy-fp8")
    notes = sum(row["bytes"] for row in rows if row["name"].endswith(".comfy_quant"))
    assert numbers(total) == (430 + 2 * 264, 264, 166, 12_824_553_740 + 4 * 264 + notes, 11.9438) and notes == 263 * 27 + 63
    assert dry_run(capsys, "--model", "k2", "--layout", "diffusers")[1]["bytes"] == 26_283_288_880


def test_the_432_tensor_repack_gives_the_community_s_266_and_166_and_its_sizes_are_gib():
    """The repack of Turbo carries two float32 (6144, 6144) tensors that are a picture; whoever quantizes by the rule takes them too."""
    sizes = {name: (stored.shape, stored.dtype.itemsize) for name, stored in export.on_meta(K2).tensors.items()}
    sizes |= dict.fromkeys(("last.up.weight", "last.down.weight"), ((6144, 6144), 4))
    quantized = {name for name, (shape, _) in sizes.items() if quantize.is_quantized(name, shape)}
    assert (len(sizes), len(quantized), len(sizes) - len(quantized)) == (432, 266, 166)
    before = sum(math.prod(shape) * size for shape, size in sizes.values())
    after = sum(math.prod(shape) * (1 if name in quantized else size) for name, (shape, size) in sizes.items())
    assert (before, after) == (26_585_278_768, 12_900_051_212)
    assert (round(before / 2**30, 4), round(after / 2**30, 4)) == (24.7595, 12.0141)
    assert sum(math.prod(shape) for shape, _ in sizes.values()) == 12_895_570_508  # "12.9B"


def test_fp8_files_are_read_back_and_give_nearly_the_same_pictures(tmp_path):
    model = small_model()
    source = small_file(tmp_path / "m.safetensors", model)
    for layout in ("fp8", "comfy-fp8"):
        assert main(["convert", "--from", str(source), "--to", str(tmp_path / f"{layout}.safetensors"), "--layout", layout]) == 0
        found = open_checkpoint(tmp_path / f"{layout}.safetensors")
        assert found.layout == layout and found.tensors["first.weight"].dtype == torch.float8_e4m3fn
        assert found.tensors["last.modulation.lin"].dtype == torch.float32
        loaded = load_model(found.path, dtype=torch.float32)
        assert (outputs(loaded) - outputs(model)).norm() / outputs(model).norm() < 0.15
        again = tmp_path / f"{layout} back.safetensors"
        assert main(["convert", "--from", str(found.path), "--to", str(again), "--dtype", "fp32"]) == 0
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in load_file(again).items())
        copy = tmp_path / f"{layout} copy.safetensors"
        assert main(["convert", "--from", str(found.path), "--to", str(copy), "--layout", layout]) == 0
        assert copy.read_bytes() == found.path.read_bytes()


def test_the_scaled_layout_holds_what_comfyui_reads(tmp_path):
    source = small_file(tmp_path / "m.safetensors")
    assert main(["convert", "--from", str(source), "--to", str(tmp_path / "c.safetensors"), "--layout", "comfy-fp8"]) == 0
    found, stored = load_file(tmp_path / "c.safetensors"), load_file(source)
    for layer in ("blocks.1.mlp.down", "txtfusion.projector"):
        weight, scale = stored[f"{layer}.weight"].float(), found[f"{layer}.weight_scale"]
        assert scale.shape == () and scale.dtype == torch.float32 and float(scale) == pytest.approx(float(weight.abs().max()) / 448)
        assert float(found[f"{layer}.weight"].float().abs().max()) == 448
        note = json.loads(found[f"{layer}.comfy_quant"].numpy().tobytes())
        # 1 x taps is no shape for an FP8 matrix product: ComfyUI is told to multiply it in full
        assert note == {"format": "float8_e4m3fn"} | ({"full_precision_matrix_mult": True} if "projector" in layer else {})
    assert "blocks.0.prenorm.weight_scale" not in found


def test_values_that_fp8_cannot_hold_become_its_largest_and_nan_is_an_error():
    large = torch.tensor([1000.0, -1e30, 0.3])
    assert torch.cat(list(quantize.quantized([large]))).float().tolist() == [448, -448, 0.3125]
    with pytest.raises(ValueError, match="holds nan"):
        quantize.scale_of([torch.tensor([1.0]), torch.tensor([float("nan")]), torch.tensor([2.0])])
    assert float(quantize.scale_of([torch.zeros(3)])) == 1


def test_nothing_is_overwritten_and_wrong_arguments_are_told(tmp_path, capsys):
    source = small_file(tmp_path / "m.safetensors")
    before = source.read_bytes()
    cases = {
        "is there already": ["--from", str(source), "--to", str(source)],
        "Give a folder, or --layout official": ["--from", str(source), "--to", str(tmp_path / "d.safetensors"), "--layout", "diffusers"],
        "give --to": ["--from", str(source)],
        "give --from CHECKPOINT": ["--to", str(tmp_path / "x")],
        "must be above 0": ["--from", str(source), "--to", str(tmp_path / "x"), "--shard-gb", "0"],
        "choose from k2, k2-1b, k2-nano": ["--dry-run", "--model", "k3"],
    }
    for said, arguments in cases.items():
        assert main(["convert", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert source.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_conversion_that_stops_half_way_leaves_nothing_and_what_was_killed_is_cleared(tmp_path):
    found = open_checkpoint(small_file(tmp_path / "m.safetensors"))
    tensors = export.plan(found, "official")

    def breaks():
        raise OSError("the disk is gone")

    broken = [*tensors[:-1], tensors[-1]._replace(pieces=breaks)]
    for to in (tmp_path / "one.safetensors", tmp_path / "folder"):
        with pytest.raises(OSError, match="the disk is gone"):
            export.write(broken, found.config, "official", to)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    (tmp_path / ".folder.tmp").mkdir()
    (tmp_path / ".folder.tmp" / "half.safetensors").write_bytes(b"half")
    export.write(tensors, found.config, "official", tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["model.safetensors"]
    assert not (tmp_path / ".folder.tmp").exists()


def test_a_disk_that_is_too_full_is_told_before_a_byte_is_written(tmp_path):
    huge = [New("x", torch.float32, (1 << 60,), list)]
    with pytest.raises(ValueError, match="Make room"):
        export.write(huge, K2, "official", tmp_path / "x.safetensors")


PEAK = """
import resource, sys, torch
from pipelines.convert import convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for layout in ("diffusers", "comfy-fp8", "fp8"):
    convert({source!r}, {out!r} + "/" + layout + (".safetensors" if layout != "diffusers" else ""), layout)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_conversion_needs_less_memory_than_its_largest_tensor(tmp_path):
    from dataclasses import replace

    config = replace(K2, width=1536, num_blocks=1, num_heads=12, num_kv_heads=3, text_dim=128, text_heads=1, num_fusion_blocks=1)
    model = export.on_meta(config)
    source = tmp_path / "m.safetensors"
    zeros = {name: torch.zeros(stored.shape, dtype=torch.float32) for name, stored in model.tensors.items()}
    save_file(zeros, source)
    largest = max(tensor.nbytes for tensor in zeros.values())
    del zeros
    assert largest == 6 * 1536 * 1536 * 4  # 57 MB of 200 MB
    code = PEAK.format(source=str(source), out=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < largest


def test_the_verb_counts_scales_neither_as_quantized_nor_as_kept():
    checkpoint: Checkpoint = export.on_meta(small_model().config)
    total = verb.summary(export.plan(checkpoint, "comfy-fp8"))
    assert total["tensors"] == total["kept"] + 3 * total["quantized"]
