"""PMA: averages of checkpoints, bit for bit where there is nothing to average, and folders that the other commands read."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_k2 import SMALL, outputs, small_model

from curation.shards import describe
from k2model import checkpoint, tensor_files
from k2model.layouts import load_model, open_checkpoint
from k2model.merge import averaged, merge, weights_of
from k2model.vae import fit_pca
from pipelines import merge as verb
from pipelines.convert import convert
from pipelines.sample import sample
from pipelines.train_recipes import k2_nano


def run_of(place, steps, phase="256", config=SMALL, dtype=torch.float32, codec=1.0):
    """Checkpoints of random models, one per step."""
    for step in steps:
        model = small_model(config, seed=step).to(dtype)
        files = {"model": model.state_dict(), "optimizer": {"x": torch.ones(3)}, "vae": {"mean": torch.full((4,), codec)}}
        checkpoint.save(place / "checkpoints", step, files, {"phase": phase, "cursor": [0, step], "config": {"description": {"a": 1}}})
    return place


def models(place):
    return [load_file(one / "model.safetensors") for one in sorted((place / "checkpoints").iterdir())]


def test_weights_are_those_of_their_formulas():
    assert weights_of("sma", 4) == [0.25] * 4
    assert weights_of("wma", 3) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    values, average = [3.0, -1.0, 7.0, 2.0], 3.0
    for value in values[1:]:
        average = 0.8 * average + 0.2 * value
    assert np.dot(weights_of("ema", 4), values) == pytest.approx(average)
    assert all(weights_of(method, 1) == [1.0] for method in ("sma", "wma", "ema"))
    with pytest.raises(ValueError, match="choose from sma, wma, ema"):
        weights_of("median", 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_checkpoint_and_equal_ones_give_their_own_bits(tmp_path, dtype):
    place = run_of(tmp_path / "run", [5], dtype=dtype) / "checkpoints" / "000005"
    (own,) = models(tmp_path / "run")
    for num, method in ((1, "sma"), (3, "sma"), (7, "wma"), (10, "ema")):
        out = tmp_path / f"{num}-{method}"
        merge([place] * num, weights_of(method, num), out, {"method": method})
        merged = load_file(out / "model.safetensors")
        assert merged.keys() == own.keys() and all(torch.equal(merged[name], own[name]) and merged[name].dtype == dtype for name in own)


def test_the_average_is_that_of_whole_tensors_and_is_made_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "PIECE", 1000)  # most tensors come in several pieces
    run = run_of(tmp_path / "run", [5, 10, 15])
    weights = weights_of("wma", 3)
    merge(sorted((run / "checkpoints").iterdir()), weights, tmp_path / "out", {})
    merged, parts = load_file(tmp_path / "out" / "model.safetensors"), models(run)
    for name, value in merged.items():
        wanted = sum(weight * part[name].double() for weight, part in zip(weights, parts, strict=True))
        error = (value.double() - wanted).abs().numpy()
        assert (error <= 0.51 * np.spacing(np.abs(value.numpy()))).all(), name  # half a bit: the sum is rounded once
    opened = [open_checkpoint(place) for place in sorted((run / "checkpoints").iterdir())]
    assert max(len(piece) for piece in averaged([one.tensors["first.weight"] for one in opened], weights)) == 1000


def test_the_merged_folder_is_read_like_a_checkpoint_and_says_where_it_comes_from(tmp_path, capsys):
    run = run_of(tmp_path / "run", [5, 10, 15, 20, 25])
    assert verb.merge((str(run),), last=2, every=2) == 0
    line = json.loads(capsys.readouterr().out)
    out = run / "merged" / "sma-2" / "000025"
    assert line["out"] == str(out) and [one["step"] for one in line["checkpoints"]] == [15, 25]
    model = load_model(out)
    wanted = (small_model(seed=15).first.weight.double() + small_model(seed=25).first.weight.double()) / 2
    assert torch.equal(model.first.weight, wanted.float().detach()) and outputs(model).isfinite().all()
    assert load_file(out / "vae.safetensors")["mean"].tolist() == [1] * 4
    state = json.loads((out / "state.json").read_text())
    assert state["step"] == 25 and state["phase"] == "256" and state["config"] == {"description": {"a": 1}} and "cursor" not in state
    assert state["merge"]["method"] == "sma" and [one["weight"] for one in state["merge"]["checkpoints"]] == [0.5, 0.5]
    assert all((out / name).stat().st_size == size for name, size in state["files"].items())
    assert checkpoint.latest(run / "checkpoints").step == 25, "the run goes on from its own checkpoint"
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert verb.merge((str(run),), last=2, every=2) == 0 and (out / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="exists and is not this merge"):
        verb.merge((str(run),), last=3, every=1, out=str(out))


def test_pictures_are_made_of_a_merge_and_it_is_converted(tmp_path, monkeypatch):
    recipe = k2_nano()
    state = {"phase": "256", "cursor": [0, 1], "config": {"description": {"recipe": describe(replace(recipe, model=SMALL))}}}
    codec = fit_pca(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(8)).tensors()
    for step in (5, 10):
        checkpoint.save(tmp_path / "run" / "checkpoints", step, {"model": small_model(seed=step).state_dict(), "vae": codec}, state)
    assert verb.merge((str(tmp_path / "run"),), method="ema") == 0
    merged = tmp_path / "run" / "merged" / "ema-2" / "000010"
    assert sample(str(merged), ("a red square",), out=str(tmp_path / "pictures"), steps=1, size="64x64", device="cpu") == 0
    assert (tmp_path / "pictures" / "0000-0.png").is_file()
    assert convert(str(merged), str(tmp_path / "whole.safetensors"), dtype="keep") == 0
    whole, own = load_file(tmp_path / "whole.safetensors"), load_file(merged / "model.safetensors")
    assert whole.keys() == own.keys() and all(torch.equal(whole[name], own[name]) for name in own)


def test_a_run_gives_whole_checkpoints_of_its_last_phase(tmp_path):
    run = run_of(run_of(tmp_path / "run", [5, 10]), [15, 20, 25], phase="512")
    (run / "checkpoints" / "000020" / "model.safetensors").write_bytes(b"torn")
    (run / "checkpoints" / "000030").mkdir()
    assert [place.name for place in verb.choose(run, 10, 1)] == ["000015", "000025"]
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
        verb.choose(tmp_path / "empty", 10, 1)


def test_models_that_differ_are_refused_by_the_first_tensor(tmp_path):
    first = run_of(tmp_path / "a", [5]) / "checkpoints" / "000005"
    wider = run_of(tmp_path / "b", [5], config=replace(SMALL, width=128)) / "checkpoints" / "000005"
    deeper = run_of(tmp_path / "c", [5], config=replace(SMALL, num_blocks=3)) / "checkpoints" / "000005"
    half = run_of(tmp_path / "d", [5], dtype=torch.bfloat16) / "checkpoints" / "000005"
    codec = run_of(tmp_path / "e", [5], codec=2.0) / "checkpoints" / "000005"
    cases = {
        wider: r"first\.weight is \[128, 64\] .* and \[64, 64\]",
        deeper: r"000005 has blocks\.2\.",
        half: r"first\.weight is .*bfloat16",
        codec: "is another codec",
    }
    for other, message in cases.items():
        with pytest.raises(ValueError, match=message):
            merge([other, first], [0.5, 0.5], tmp_path / "out", {})
    tensors = load_file(first / "model.safetensors")
    del tensors["blocks.1.mlp.up.weight"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.up\.weight is missing"):
        merge([tmp_path / "short.safetensors", first], [0.5, 0.5], tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_wrong_settings_are_refused(tmp_path):
    run = run_of(tmp_path / "run", [5])
    with pytest.raises(ValueError, match="--last 0"):
        verb.merge((str(run),), last=0)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        verb.merge((str(tmp_path / "none"),))
    with pytest.raises(ValueError, match="give --out"):
        verb.merge((str(run / "checkpoints" / "000005"),))
    with pytest.raises(ValueError, match="would resume from it"):
        verb.merge((str(run),), out=str(run / "checkpoints" / "000099"))
