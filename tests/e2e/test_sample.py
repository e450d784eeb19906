"""`k2 sample`: the same command is the same pictures, a picture tells how it was made, and a mistake says what to do."""

import io
import json
import logging
import shlex
import shutil
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_krea
import torch
from packed_world import landscapes, make_packed
from PIL import Image
from safetensors.torch import save_file

from curation.manifest import Reader
from curation.stages.provenance import facts
from k2model import flow, lora
from pipelines import sample as verb
from pipelines import train as training
from pipelines import train_recipes
from pipelines.cli import call
from pipelines.generated import parameters_of
from pipelines.train_recipes import k2_nano

PROMPTS = ("blue sky over red ground", "", "ünïcödé 狐 <&> \x07")


def one_phase():
    """k2-nano, narrower, three steps at 32 px."""
    whole = k2_nano()
    phase = replace(whole.phases[0], resolution=32, data="p32", steps=3, warmup=1, decay=1, num_samples=1)
    model = replace(whole.model, width=64, num_blocks=1)
    return replace(whole, name="one-phase", model=model, phases=(phase,), sample_every=100, sample_steps=1, checkpoint_every=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    make_packed(run / "packed/p32", landscapes(8, [(32, 32)]), 32, 4)
    train_recipes.TRAIN["one-phase"] = one_phase
    before = torch.get_num_threads()
    assert training.train(str(run), "one-phase", device="cpu", threads=1) == 0
    torch.set_num_threads(before)
    del train_recipes.TRAIN["one-phase"]
    return run / "train/one-phase"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_every_prompt_and_seed_is_a_file_and_the_second_call_makes_nothing(trained, tmp_path, capsys):
    out = tmp_path / "out"
    settings = {"prompt": PROMPTS, "num": 2, "steps": 2, "batch_size": 4, "seed": 5, "device": "cpu"}
    assert verb.sample(str(trained), out=str(out), **settings) == 0
    assert json.loads(capsys.readouterr().out)["pictures_now"] == 6
    names = [f"{i:04d}-{seed}.png" for i in range(3) for seed in (5, 6)]
    assert sorted(path.name for path in out.iterdir()) == [*names, "contact_sheet.png"]
    assert pixels(out / names[0]).shape == (32, 32, 3)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / names[3]).unlink()  # as after a killed call
    assert verb.sample(str(trained), out=str(out), **settings) == 0
    assert json.loads(capsys.readouterr().out)["pictures_now"] == 1
    again = {path.name: path.read_bytes() for path in out.iterdir()}
    assert again.keys() == before.keys()
    assert np.abs(pixels(out / names[3]).astype(int) - np.asarray(Image.open(io.BytesIO(before[names[3]]))).astype(int)).max() <= 1
    assert all(again[name] == before[name] for name in names if name != names[3])


def test_a_dry_run_says_what_is_missing_and_writes_nothing(trained, tmp_path, capsys):
    assert verb.sample(str(trained), PROMPTS, out=str(tmp_path / "out"), preset="turbo", device="cpu", dry_run=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["pictures"], said["missing"], said["image_tokens"], said["mu"]) == (3, 3, 4, 1.15)
    assert said["times"] == pytest.approx([1, 0.9567, 0.9045, 0.8403, 0.7595, 0.6546, 0.5128, 0.3109, 0], abs=1e-4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sampler", flow.SAMPLERS)
def test_a_picture_does_not_depend_on_what_shares_its_batch(trained, tmp_path, sampler):
    settings = {"steps": 3, "device": "cpu", "sampler": sampler, "schedule": "beta"}
    verb.sample(str(trained), PROMPTS, out=str(tmp_path / "together"), num=2, batch_size=6, **settings)
    verb.sample(str(trained), PROMPTS[:1], out=str(tmp_path / "alone"), num=2, batch_size=1, **settings)
    for name in ("0000-0.png", "0000-1.png"):
        together, alone = pixels(tmp_path / "together" / name).astype(int), pixels(tmp_path / "alone" / name).astype(int)
        assert np.abs(together - alone).max() <= 1
    assert np.abs(pixels(tmp_path / "alone/0000-0.png").astype(int) - pixels(tmp_path / "alone/0000-1.png").astype(int)).max() > 5


def test_our_own_curation_finds_that_a_model_made_the_picture(trained, tmp_path):
    verb.sample(str(trained), PROMPTS, out=str(tmp_path), steps=1, device="cpu")
    for i, prompt in enumerate(PROMPTS):
        found = facts((tmp_path / f"{i:04d}-0.png").read_bytes(), Reader())
        assert found["declared_ai"] and found["declared_source_type"] == "trainedAlgorithmicMedia"
        assert "source_type" in found["declared_by"] and found["xmp_ai_system"] == "K2 (one-phase)"
        said = parameters_of(tmp_path / f"{i:04d}-0.png")
        assert (said["prompt"], said["seed"], said["steps"], said["sampler"], said["model"]["step"]) == (prompt, 0, 1, "euler", 3)


def test_without_the_declaration_curation_would_not_know(trained, tmp_path):
    """The test above can fail: the same pixels, saved again, say nothing."""
    verb.sample(str(trained), PROMPTS[:1], out=str(tmp_path), steps=1, device="cpu")
    Image.open(tmp_path / "0000-0.png").convert("RGB").save(tmp_path / "bare.png")
    assert not facts((tmp_path / "bare.png").read_bytes(), Reader())["declared_ai"]


def test_pictures_of_other_settings_are_not_mixed_into_a_folder(trained, tmp_path):
    verb.sample(str(trained), PROMPTS[:1], out=str(tmp_path), steps=1, device="cpu")
    with pytest.raises(ValueError, match=r"made with other parameters \(guidance: 3.5 -> 0; mu: .* -> 1.15; steps: 1 -> 8\)"):
        verb.sample(str(trained), PROMPTS[:1], out=str(tmp_path), preset="turbo", guidance=0, device="cpu")
    Image.new("RGB", (8, 8)).save(tmp_path / "0001-0.png")
    with pytest.raises(ValueError, match="`k2 sample` did not make it"):
        verb.sample(str(trained), PROMPTS[:2], out=str(tmp_path), steps=1, device="cpu")


def test_sizes_are_rounded_up_and_prompts_come_from_a_file(trained, tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("a fox\n\n  two words \n", encoding="utf-8")
    with caplog.at_level(logging.INFO):
        verb.sample(str(trained / "checkpoints/000002"), ("first",), str(tmp_path / "prompts.txt"), str(tmp_path), steps=1, size="40x17")
    assert "size 40x17 is rounded up to 48x32" in caplog.text
    said = [parameters_of(tmp_path / f"{i:04d}-0.png") for i in range(3)]
    assert [row["prompt"] for row in said] == ["first", "a fox", "two words"] and said[0]["model"]["step"] == 2
    assert pixels(tmp_path / "0001-0.png").shape == (32, 48, 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt", "a", "--sampler", "heun"], "no sampler 'heun'; choose from euler, er_sde"),
        (["--prompt", "a", "--schedule", "karras"], "no schedule 'karras'; choose from linear, simple, beta"),
        (["--prompt", "a", "--preset", "fast"], "no preset 'fast'; choose from raw, turbo"),
        (["--prompt", "a", "--size", "8x64"], "each at least 16"),
        (["--prompt", "a", "--size", "64"], "WIDTHxHEIGHT"),
        (["--prompt", "a", "--steps", "0"], "number of steps is 0"),
        (["--prompt", "a", "--precision", "fp8"], "no precision 'fp8'; choose from bf16, fp32"),
        (["--prompt", "a", "--num", "0"], "must be at least 1"),
        (["--prompt", "a", "--lora", "/nowhere.safetensors:0.6"], "no file '/nowhere.safetensors'"),
        (["--prompt", "a", "--vae", "/nowhere"], "Give a folder with its weights"),
        (["--prompt", "a", "--vae", "/nowhere.safetensors"], "is not there"),
        (["--prompt", "a", "--text", "/nowhere"], "reads 4 text states of width 64 per token"),
        (["--prompts", "/nowhere.txt"], "not a file"),
        ([], "there is no prompt"),
        (["--prompt", "a", "--model", "/nowhere"], "--model '/nowhere' is not there"),
    ],
)
def test_a_mistake_is_an_exit_code_and_a_sentence(trained, tmp_path, capsys, arguments, says):
    model = [] if "--model" in arguments else ["--model", str(trained)]
    assert verb.main([*model, "--out", str(tmp_path / "out"), "--device", "cpu", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def released(tmp_path) -> tuple[Path, Any]:
    """A diffusers folder of small random parts with the text encoder, tokenizer and VAE beside the transformer; and its pipeline."""
    pytest.importorskip("diffusers")
    words = small_krea.tokenizer()
    pipe = small_krea.pipeline(small_krea.dit(), words, small_krea.qwen(words), small_krea.vae(), distilled=True)
    pipe.save_pretrained(tmp_path / "released")
    return tmp_path / "released", pipe


def test_a_diffusers_folder_gives_the_pictures_of_diffusers(released, tmp_path):
    folder, pipe = released
    settings = {"prompt": ("a red fox",), "preset": "turbo", "size": "64x48", "device": "cpu", "seed": 3}
    assert verb.sample(str(folder), out=str(tmp_path / "out"), **settings) == 0
    generator = torch.Generator().manual_seed(3)
    expected = pipe("a red fox", height=48, width=64, num_inference_steps=8, guidance_scale=0.0, generator=generator).images[0]
    assert np.abs(pixels(tmp_path / "out/0000-3.png").astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_a_file_in_the_official_layout_gives_them_too(released, tmp_path):
    folder, _ = released
    save_file(small_krea.dit().state_dict(), tmp_path / "raw.safetensors")
    settings = {"prompt": ("a red fox",), "size": "64x48", "steps": 4, "device": "cpu"}
    verb.sample(str(folder), out=str(tmp_path / "folder"), **settings)
    verb.sample(f"{tmp_path}/raw.safetensors", out=str(tmp_path / "file"), text=str(folder), vae=str(folder), **settings)
    assert np.array_equal(pixels(tmp_path / "folder/0000-0.png"), pixels(tmp_path / "file/0000-0.png"))
    verb.sample(str(folder), out=str(tmp_path / "half"), precision="bf16", **settings)
    difference = np.abs(pixels(tmp_path / "half/0000-0.png").astype(int) - pixels(tmp_path / "folder/0000-0.png").astype(int))
    assert 0 < difference.mean() < 5


def test_loras_of_both_key_styles_are_added_with_their_weights(released, tmp_path):
    folder, _ = released
    generator = torch.Generator().manual_seed(0)
    layers = {"blocks.0.attn.wq": (128, 128), "blocks.1.mlp.down": (128, 384)}
    updates = {
        name: lora.Update(torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator) / 8, 1.0)
        for name, (rows, columns) in layers.items()
    }
    lora.save(updates, tmp_path / "one.safetensors", "diffusers")
    lora.save(updates, tmp_path / "two.safetensors", "comfyui")
    model = small_krea.dit()
    save_file(model.state_dict(), tmp_path / "raw.safetensors")
    with torch.no_grad():
        for name, update in updates.items():
            model.get_submodule(name).weight.add_(1.6 * update.up @ update.down)
    save_file(model.state_dict(), tmp_path / "merged.safetensors")
    settings = {"prompt": ("a",), "size": "32x32", "steps": 3, "device": "cpu", "text": str(folder), "vae": str(folder)}
    loras = (f"{tmp_path}/one.safetensors:0.6", f"{tmp_path}/two.safetensors")
    verb.sample(f"{tmp_path}/raw.safetensors", out=str(tmp_path / "with"), lora=loras, **settings)
    verb.sample(f"{tmp_path}/raw.safetensors", out=str(tmp_path / "without"), **settings)
    verb.sample(f"{tmp_path}/merged.safetensors", out=str(tmp_path / "merged"), **settings)
    found, bare, merged = (pixels(tmp_path / name / "0000-0.png").astype(int) for name in ("with", "without", "merged"))
    assert np.abs(found - merged).max() <= 1 and np.abs(found - bare).max() > 5
    said = parameters_of(tmp_path / "with/0000-0.png")
    assert [(row["name"], row["weight"]) for row in said["loras"]] == [("one.safetensors", 0.6), ("two.safetensors", 1.0)]
    with pytest.raises(ValueError, match=r"made with other parameters \(loras"):
        verb.sample(f"{tmp_path}/raw.safetensors", out=str(tmp_path / "with"), **settings)


def test_weights_that_are_not_at_hand_are_named(released, tmp_path):
    for taps in (4, 12):
        save_file(small_krea.dit(replace(small_krea.CONFIG, text_taps=taps)).state_dict(), tmp_path / f"{taps}.safetensors")
    settings = {"prompt": ("a",), "out": str(tmp_path / "out"), "size": "32x32", "device": "cpu"}
    with pytest.raises(ValueError, match=r"cannot load the text encoder '/nowhere'"):
        verb.sample(f"{tmp_path}/12.safetensors", text="/nowhere", **settings)
    with pytest.raises(ValueError, match=r"reads 12 text states of width 32 per token, but this text encoder gives 2"):
        verb.sample(f"{tmp_path}/12.safetensors", text=str(released[0]), **settings)
    with pytest.raises(ValueError, match=r"cannot load the VAE '/nowhere'"):
        verb.sample(f"{tmp_path}/4.safetensors", text="hash", vae="/nowhere", **settings)


def test_the_checkpoint_of_a_lora_is_no_model(trained, tmp_path):
    shutil.copytree(trained / "checkpoints/000002", tmp_path / "000002")
    (tmp_path / "000002/model.safetensors").rename(tmp_path / "000002/lora.safetensors")
    with pytest.raises(ValueError, match="holds a LoRA and no model: give its base as --model"):
        verb.sample(str(tmp_path / "000002"), ("a",), out=str(tmp_path / "out"), device="cpu")


def test_the_commands_of_the_docs_are_understood():
    called = []
    understood = wraps(verb.sample)(lambda *_, **arguments: called.append(arguments))
    text = (Path(__file__).parents[2] / "docs/sampling.md").read_text()
    commands = [line.strip() for line in text.splitlines() if line.startswith("    k2 sample")]
    for command in commands:
        assert call(understood, shlex.split(command)[2:], "k2 sample") == 0, command
    assert len(called) == len(commands) >= 6 and called[-1]["lora"] == ("style.safetensors:0.6", "light.safetensors:0.4")
