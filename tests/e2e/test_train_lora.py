"""A LoRA on a frozen k2-nano: its loss falls, a resumed run is the run that was never stopped, and its files give its outputs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from e2e.test_train import tiny_recipe
from e2e.test_train_ranks import torchrun
from packed_world import landscapes, make_packed
from safetensors.torch import load_file

from k2model import flow, layouts, lora
from k2model.data import Packed, to_pixels
from k2model.lora import Lora
from k2model.vae import load_pca
from pipelines import train as verb
from pipelines import train_recipes

STEPS = 60


def base_recipe():
    """The tiny k2-nano of test_train, one phase."""
    whole = tiny_recipe()
    return replace(whole, phases=(replace(whole.phases[0], steps=24),), checkpoint_every=24)


def lora_recipe():
    """A LoRA on it."""
    whole = base_recipe()
    phase = replace(whole.phases[0], steps=STEPS, lr=1e-2, data="style")
    return replace(whole, name="lora-tiny", phases=(phase,), lora=Lora(rank=4, alpha=8), checkpoint_every=20, caption_dropout=0.0)


@pytest.fixture(autouse=True)
def known_recipes(monkeypatch):
    monkeypatch.setitem(train_recipes.TRAIN, "tiny-base", base_recipe)
    monkeypatch.setitem(train_recipes.TRAIN, "lora-tiny", lora_recipe)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Landscapes for the base; for the LoRA one style: all of one colour."""
    run = tmp_path_factory.mktemp("run")
    make_packed(run / "packed" / "p32", landscapes(9, [(32, 32)], seed=1), 32, 2)
    red = [
        (uid, caption, np.clip(pixels * [1.5, 0.2, 0.2], 0, 255).astype(np.uint8)) for uid, caption, pixels in landscapes(6, [(32, 32)], 2)
    ]
    make_packed(run / "packed" / "style", red, 32, 2)
    return run


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> Path:
    train_recipes.TRAIN["tiny-base"] = base_recipe
    out = tmp_path_factory.mktemp("base")
    assert verb.train(str(data), "tiny-base", str(out), device="cpu", threads=1) == 0
    return out / "checkpoints" / "000024"


@pytest.fixture(scope="module")
def straight(data, base, tmp_path_factory) -> Path:
    train_recipes.TRAIN["lora-tiny"] = lora_recipe
    out = tmp_path_factory.mktemp("lora")
    assert verb.train(str(data), "lora-tiny", str(out), device="cpu", base=str(base), threads=1) == 0
    return out


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def without(out: Path, straight: Path, step: int) -> Path:
    """A copy of the finished run that has lost all after `step`."""
    shutil.copytree(straight, out)
    for place in (out / "checkpoints").iterdir():
        if int(place.name) > step:
            shutil.rmtree(place)
    for style in ("diffusers", "comfyui"):
        (out / f"lora-{style}.safetensors").unlink()
    return out


def velocity(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    text = torch.randn(2, 3, model.config.text_taps, model.config.text_dim, generator=generator)
    with torch.no_grad():
        return model(torch.randn(2, 16, 4, 4, generator=generator), torch.tensor([0.2, 0.7]), text)


def test_the_loss_of_the_style_falls_from_the_base_s_on_the_same_noise(straight, data, base):
    packed = Packed(data / "packed" / "style")
    model, batches = layouts.load_model(base), [packed.read(group) for group in packed.groups]
    codec, encode = load_pca(base / "vae.safetensors"), lora_recipe().text.load("cpu")

    def loss() -> float:
        found = []
        for step in range(8):
            for batch in batches:
                clean = codec.encode(to_pixels(batch.images))
                draw = flow.draw(99, step, batch.uids, tuple(clean.shape[1:]), 0.5)
                with torch.no_grad():
                    velocity = model(flow.noisy(clean, draw.noise, draw.t), draw.t, *encode(batch.captions))
                found.append(float(flow.loss(velocity, clean, draw.noise).mean()))
        return float(np.mean(found))

    before = loss()
    kept = lora.merge(model, [(straight / "lora-comfyui.safetensors", 1.0)])
    after = loss()
    assert len(losses(straight)) == STEPS and after < 0.9 * before, (before, after)  # measured: 2.167 -> 1.771
    lora.restore(model, kept)
    assert loss() == before
    lora.apply(model, straight / "lora-comfyui.safetensors", -0.1)
    assert loss() > before  # the other way it gets worse: it is the LoRA that lowers it


def test_only_the_lora_is_in_checkpoint_and_optimizer(straight):
    last = straight / "checkpoints" / f"{STEPS:06d}"
    assert {path.name for path in last.iterdir()} == {"lora.safetensors", "optimizer.safetensors", "vae.safetensors", "state.json"}
    trained = load_file(last / "lora.safetensors")
    assert len(trained) == 2 * 8 and all(name.endswith((".lora_A", ".lora_B")) for name in trained)
    assert {name.rsplit(".", 1)[0] for name in load_file(last / "optimizer.safetensors")} == set(trained)


@pytest.mark.parametrize("style", ["diffusers", "comfyui"])
def test_the_exported_file_on_the_base_gives_the_outputs_of_the_trained_model(straight, base, style):
    trained = layouts.load_model(base)
    lora.attach(trained, lora_recipe().lora)
    trained.load_state_dict(load_file(straight / "checkpoints" / f"{STEPS:06d}" / "lora.safetensors"), strict=False)
    merged = layouts.load_model(base)
    before = velocity(merged)
    assert lora.apply(merged, straight / f"lora-{style}.safetensors", 1.0) == 8
    wanted = velocity(trained)
    assert (velocity(merged) - wanted).norm() / wanted.norm() < 2e-6
    assert (before - wanted).norm() / wanted.norm() > 1e-2


@pytest.mark.parametrize("step", [20, 40])
def test_a_resumed_lora_run_has_the_same_losses_and_the_same_files(straight, data, base, tmp_path, step):
    out = without(tmp_path / "resumed", straight, step)
    moved = shutil.copytree(base, tmp_path / "the base elsewhere")
    assert verb.train(str(data), "lora-tiny", str(out), device="cpu", base=str(moved), threads=1) == 0
    assert losses(out) == losses(straight)
    names = [f"lora-{style}.safetensors" for style in ("diffusers", "comfyui")]
    for name in [*names, f"checkpoints/{STEPS:06d}/lora.safetensors", f"checkpoints/{STEPS:06d}/optimizer.safetensors"]:
        assert (out / name).read_bytes() == (straight / name).read_bytes(), name


def test_a_lora_moves_from_two_processes_to_one_and_from_one_to_two(straight, data, base, tmp_path):
    lora_file = "from e2e.test_train_lora import lora_recipe as plan\n"
    given = ("--base", str(base))
    assert torchrun(data, tmp_path / "two", 2, "kill:30:1:0", more=lora_file, options=given) != 0
    assert verb.train(str(data), "lora-tiny", str(tmp_path / "two"), device="cpu", base=str(base), threads=1) == 0
    assert torchrun(data, without(tmp_path / "one", straight, 40), 2, more=lora_file, options=given) == 0
    for out in (tmp_path / "one", tmp_path / "two"):
        assert losses(out) == pytest.approx(losses(straight), rel=1e-4)
        for name in ("lora-diffusers.safetensors", "lora-comfyui.safetensors"):
            found, expected = load_file(out / name), load_file(straight / name)
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                assert (found[key] - tensor).norm() < 1e-3 * tensor.norm(), (name, key)


def test_the_base_is_never_changed_and_must_be_the_one_that_the_run_began_with(straight, data, base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="base: "):
        verb.train(str(data), "lora-tiny", str(straight), device="cpu", base=str(other), threads=1)


def test_a_base_that_is_missing_or_does_not_fit_is_told(data, base, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="give its frozen model with --base"):
        verb.train(str(data), "lora-tiny", str(tmp_path / "a"), device="cpu")
    with pytest.raises(ValueError, match="--base is for LoRA recipes"):
        verb.train(str(data), "tiny-base", str(tmp_path / "a"), device="cpu", base=str(base))
    with pytest.raises(ValueError, match=r"has no vae\.safetensors"):
        verb.train(str(data), "lora-tiny", str(tmp_path / "a"), device="cpu", base=str(base / "model.safetensors"))
    quick = replace(lora_recipe(), phases=(replace(lora_recipe().phases[0], precision="float8_rowwise"),))
    monkeypatch.setitem(train_recipes.TRAIN, "lora-tiny", lambda: quick)
    with pytest.raises(ValueError, match="Take precision bf16"):
        verb.train(str(data), "lora-tiny", str(tmp_path / "a"), device="cpu", base=str(base))
    wide = replace(lora_recipe(), model=replace(lora_recipe().model, width=128))
    monkeypatch.setitem(train_recipes.TRAIN, "lora-tiny", lambda: wide)
    with pytest.raises(ValueError, match=r"is a model of .*width=64.* is for .*width=128"):
        verb.train(str(data), "lora-tiny", str(tmp_path / "a"), device="cpu", base=str(base))
    assert not (tmp_path / "a").exists()


def test_a_dry_run_tells_how_much_is_trained(data, capsys):
    assert verb.train(str(data), "lora-tiny", dry_run=True) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    rows, hidden = 4, 256  # rank; SwiGLU of width 64
    by_hand = rows * (3 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + hidden))
    assert (first["recipe"], first["trained"]) == ("lora-tiny", by_hand)
