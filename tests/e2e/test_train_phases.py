"""What a recipe can ask of the loop: mixtures, global batches in parts, alignment, merging between phases, Muon, packed latents."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_krea
import torch
from e2e.test_train import losses, tiny_recipe
from packed_world import landscapes, make_packed
from safetensors.torch import load_file, save_file

from curation.towers import Compact
from k2model.align import Irepa
from k2model.vae import QwenImageVae
from pipelines import train as verb
from pipelines import train_recipes
from pipelines.latents import write_latents
from pipelines.metrics import read_losses
from pipelines.teachers import TowerTeacher


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    for size in (32, 48):
        make_packed(run / "packed" / f"p{size}", landscapes(30, [(size, size), (size, size - 16)], seed=size), size, 3)
    make_packed(run / "packed" / "art", landscapes(6, [(32, 32)], seed=7), 32, 3)
    return run


def recipe(name: str, **changes):
    """Two phases, 6 steps at 32 px and 4 at 48 px."""
    whole = tiny_recipe()
    both = changes.pop("both", {})
    first, second = (replace(phase, **both) for phase in whole.phases[:2])
    first, second = replace(first, steps=6, **changes.pop("first", {})), replace(second, steps=4, **changes.pop("second", {}))
    return replace(whole, name=name, phases=(first, second), **changes)


def trained(monkeypatch, data, out, plan, **options) -> Path:
    monkeypatch.setitem(train_recipes.TRAIN, plan.name, lambda: plan)
    before = torch.get_num_threads()
    try:
        assert verb.train(str(data), plan.name, str(out), "cpu", threads=1, **options) == 0
    finally:
        torch.set_num_threads(before)
    return out


def resumed(monkeypatch, data, out, plan, straight: Path, step: int) -> Path:
    """A copy of a finished run that has lost all after `step`, run again."""
    shutil.copytree(straight, out)
    for place in (out / "checkpoints").iterdir():
        if int(place.name) > step:
            shutil.rmtree(place)
    return trained(monkeypatch, data, out, plan)


def model(out: Path, step: int = 10) -> dict[str, torch.Tensor]:
    return load_file(out / f"checkpoints/{step:06d}/model.safetensors")


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def image_losses(out: Path, row: dict) -> np.ndarray:
    """Of the images of a step, in the order of its global batch."""
    return read_losses(out, row["losses_at"], row["images"])


def test_a_global_batch_of_several_row_groups_is_the_same_in_parts_of_any_size(data, tmp_path, monkeypatch):
    plan = recipe("parts", both={"num_groups": 4})
    whole = trained(monkeypatch, data, tmp_path / "whole", plan)
    parts = trained(monkeypatch, data, tmp_path / "parts", plan, max_rows=2)
    assert [row["images"] for row in rows(whole)] == [12] * 10
    assert [row["tokens"] for row in rows(whole)] == [row["tokens"] for row in rows(parts)]
    for a, b in zip(rows(whole), rows(parts), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-4)
        assert image_losses(parts, b) == pytest.approx(image_losses(whole, a), rel=1e-4), "in the order of the batch, not of the parts"
        assert image_losses(whole, a).mean() == pytest.approx(a["loss"], rel=1e-5)
    assert len(set(image_losses(whole, rows(whole)[0]))) == 12


def test_a_mixture_reads_both_sets_and_says_the_loss_of_each(data, tmp_path, monkeypatch):
    plan = recipe("mixed", first={"data": (("p32", 2.0), ("art", 1.0)), "num_groups": 3})
    found = rows(trained(monkeypatch, data, tmp_path, plan))
    by_source = [row["num_by_source"] for row in found[:6]]
    assert sum(count.get("art", 0) for count in by_source) > 0 and sum(count.get("p32", 0) for count in by_source) > 0
    assert all(sum(count.values()) == 9 == sum(row["num_by_t"]) for count, row in zip(by_source, found, strict=False))
    row = next(row for row in found if len(row["num_by_source"]) == 2)
    mean = sum(row["loss_by_source"][name] * count for name, count in row["num_by_source"].items()) / 9
    assert mean == pytest.approx(row["loss"], rel=1e-5) and mean == pytest.approx(image_losses(tmp_path, row).mean(), rel=1e-5)


def test_validation_asks_the_held_out_images_at_fixed_times(data, tmp_path, monkeypatch):
    plan = recipe("validated", hold_out=1, validate_every=3)
    out = trained(monkeypatch, data, tmp_path / "a", plan)
    found = {row["step"]: row["validation"] for row in rows(out) if "validation" in row}
    assert sorted(found) == [3, 6, 9, 10] and all(len(one["by_t"]) == 8 for one in found.values())
    again = resumed(monkeypatch, data, tmp_path / "b", plan, out, 6)
    assert {row["step"]: row["validation"] for row in rows(again) if "validation" in row} == found
    assert (again / "losses.f32").read_bytes() == (out / "losses.f32").read_bytes()
    for one in found.values():
        each = read_losses(out, one["losses_at"], 8 * one["images"]).reshape(-1, 8)
        assert one["images"] == 3 and one["by_t"] == pytest.approx(each.mean(0), rel=1e-5)
        assert one["standard_error"] == pytest.approx(each.mean(1).std(ddof=1) / 3**0.5, rel=1e-4)


def test_two_runs_on_the_same_held_out_images_are_told_apart_by_their_differences(data, tmp_path, monkeypatch):
    """The lines of docs/training.md, on two runs."""
    manual = (Path(__file__).parents[2] / "docs/training.md").read_text()
    (code,) = [block for block in re.findall("```python\n(.*?)```", manual, re.S) if "read_losses" in block]
    for name, lr in (("a", 1e-3), ("b", 2e-3)):
        trained(monkeypatch, data, tmp_path / "RUN/train" / name, recipe(name, first={"lr": lr}, hold_out=2, validate_every=3))
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code.replace("100_000", "6"), found)
    for name, each in (("a", found["a"]), ("b", found["b"])):
        assert each.shape[1] == 8 and each.mean() == pytest.approx(rows(tmp_path / "RUN/train" / name)[5]["validation"]["loss"], rel=1e-5)
    bar = rows(tmp_path / "RUN/train/b")[5]["validation"]["standard_error"]
    assert found["difference"] == pytest.approx(found["b"].mean() - found["a"].mean(), rel=1e-4)
    assert 0 < found["error"] < 0.5 * bar, "what the images have in common is gone"


def test_alignment_lasts_one_epoch_and_a_run_resumed_in_it_is_the_one_that_was_not_stopped(data, tmp_path, monkeypatch):
    align = Irepa(TowerTeacher(Compact()), block=1)
    plan = recipe("aligned", first={"align": align, "num_groups": 2})  # 10 row groups: 5 of the 6 steps
    plain = trained(monkeypatch, data, tmp_path / "plain", recipe("plain", first={"num_groups": 2}))
    out = trained(monkeypatch, data, tmp_path / "aligned", plan)
    assert ["align" in row for row in rows(out)] == [True] * 5 + [False] * 5
    assert rows(out)[0]["loss"] == rows(plain)[0]["loss"] and rows(out)[3]["loss"] != rows(plain)[3]["loss"]
    assert model(out).keys() == model(plain).keys()
    for step in (2, 4, 6):
        again = resumed(monkeypatch, data, tmp_path / f"again{step}", plan, out, step)
        assert losses(again) == losses(out) and all(torch.equal(a, model(out)[name]) for name, a in model(again).items())


def test_a_phase_can_start_from_the_mean_of_the_checkpoints_before_it_and_with_new_moments(data, tmp_path, monkeypatch):
    plan = recipe("merging", second={"merge_last": 3, "keep_optimizer": False, "lr": 0.0})
    out = trained(monkeypatch, data, tmp_path / "a", plan)
    expected = {name: sum(model(out, step)[name].double() for step in (2, 4, 6)) / 3 for name in model(out)}
    for name, tensor in model(out).items():  # at lr 0 the mean stays as it is
        torch.testing.assert_close(tensor, expected[name].float(), rtol=1e-6, atol=1e-8)
    again = resumed(monkeypatch, data, tmp_path / "b", plan, out, 6)
    assert losses(again) == losses(out)


@pytest.mark.parametrize("step", [4, 8])
def test_muon_resumes_like_adamw(data, tmp_path, monkeypatch, step):
    plan = recipe("muon", optimizer="muon")
    out = trained(monkeypatch, data, tmp_path / "a", plan)
    again = resumed(monkeypatch, data, tmp_path / "b", plan, out, step)
    assert losses(again) == losses(out) and all(torch.equal(a, model(out)[name]) for name, a in model(again).items())


def test_packed_latents_give_the_losses_of_the_images_they_were_made_from(data, tmp_path, monkeypatch):
    images = trained(monkeypatch, data, tmp_path / "images", recipe("images"))
    run = tmp_path / "run"
    shutil.copytree(data / "packed", run / "packed")
    (run / "train/latents").mkdir(parents=True)
    shutil.copy(images / "vae.safetensors", run / "train/latents/vae.safetensors")
    plan = recipe("latents", latents=True)
    with pytest.raises(ValueError, match="k2 pack --latents"):
        trained(monkeypatch, run, run / "train/latents", plan)
    for name in ("p32", "p48"):
        assert write_latents(run / "packed" / name, str(images / "vae.safetensors"), "off", None) == []
    found = trained(monkeypatch, run, run / "train/latents", plan)
    for a, b in zip(rows(images), rows(found), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)  # float16
    other = {name: tensor + 0.1 for name, tensor in load_file(images / "vae.safetensors").items()}
    (run / "train/other").mkdir()
    save_file(other, run / "train/other/vae.safetensors")
    with pytest.raises(ValueError, match="was made by another description"):
        trained(monkeypatch, run, run / "train/other", replace(plan, name="other"))


def test_tensorboard_has_every_step_once_after_a_resume(data, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan = recipe("board")
    out = trained(monkeypatch, data, tmp_path / "a", plan, tensorboard=True)
    again = tmp_path / "b"
    shutil.copytree(out, again)
    for place in (again / "checkpoints").iterdir():
        if int(place.name) > 4:
            shutil.rmtree(place)
    trained(monkeypatch, data, again, plan, tensorboard=True)
    events = EventAccumulator(str(again / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 11))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_the_kinds_of_text_encoder_and_autoencoder_of_the_release_train_with_recomputation(data, tmp_path, monkeypatch, precision, dtype):
    text = replace(small_krea.saved_qwen(tmp_path / "qwen"), dtype=dtype)
    small_krea.vae().save_pretrained(tmp_path / "vae")
    changes = {"model": small_krea.CONFIG, "text": text, "vae": QwenImageVae(str(tmp_path), dtype=dtype)}
    out = {}
    for mode in ("none", "selective", "full"):
        both = {"precision": precision, "checkpointing": mode}
        out[mode] = trained(monkeypatch, data, tmp_path / mode, recipe(f"release-{mode}", both=both, **changes))
    assert losses(out["none"])[-1]["loss"] < 3
    for mode in ("selective", "full"):
        assert losses(out[mode]) == losses(out["none"]), "what is computed twice is computed alike"


def test_latents_with_a_teacher_are_refused_before_anything_starts(data, tmp_path, monkeypatch):
    plan = recipe("both", latents=True, first={"align": Irepa(TowerTeacher(Compact()), block=1)})
    with pytest.raises(ValueError, match="Leave out latents or align"):
        trained(monkeypatch, data, tmp_path, plan)
    assert not list(tmp_path.iterdir())
