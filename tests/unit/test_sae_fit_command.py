"""`k2 sae fit` through the command line: several SAEs on one pass over a run, patch tokens, and a stop in between."""

import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curation import sae, sae_fit
from curation.schema import embedding_schema
from curation.shards import describe, write_json, write_table
from curation.stages.embedding import Embedding
from curation.towers import Compact
from pipelines import sae as sae_command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 600 vectors in six row groups."""
    folder, tower, rng = tmp_path_factory.mktemp("run"), Compact(), np.random.default_rng(0)
    vectors = (rng.random((600, 5)) @ rng.normal(size=(5, tower.dim))).astype(np.float16)
    columns = {"uid": [f"a/{i}" for i in range(600)], "vector": [vector.tobytes() for vector in vectors], "error": [None] * 600}
    table = pa.table(columns, embedding_schema(tower.dim))
    write_table(table, folder / "annotations" / "compact" / "a.parquet", "x", row_group_size=100)
    stages = {"compact": {"description": describe(Embedding(tower))}}
    write_json({"description": {"stages": stages}}, folder / "run.json")
    return folder


def printed(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_several_widths_and_seeds_are_fitted_on_one_pass_into_folders_of_their_own(run, tmp_path, capsys):
    fit = ["fit", "--tower", "compact", "--run", str(run), "--k", "4", "--epochs", "10"]
    assert sae_command.main([*fit, "--out", str(tmp_path / "many"), "--features", "16", "32", "--seeds", "2"]) == 0
    lines = printed(capsys)
    assert [line["out"] for line in lines] == [str(tmp_path / f"many-{width}-{seed}") for width in (16, 32) for seed in (0, 1)]
    models = [sae.load(line["out"]) for line in lines]
    assert [(model.num_features, model.metadata["training"]["seed"]) for model in models] == [(16, 0), (16, 1), (32, 0), (32, 1)]
    assert all(line["gamma"] > 0 and line["explained_variance"] > 0.5 for line in lines)
    assert not list(tmp_path.glob("*.training")), "a finished run leaves no checkpoint"
    assert models[0].metadata["vectors"] == "pooled"


def test_a_stopped_fit_goes_on_to_the_bytes_of_one_that_was_not(run, tmp_path, capsys, monkeypatch):
    fit = ["fit", "--tower", "compact", "--run", str(run), "--features", "16", "--k", "4", "--epochs", "20", "--out"]
    assert sae_command.main([*fit, str(tmp_path / "whole" / "sae")]) == 0
    shuffled = sae_command.shuffled

    def dying(*arguments):
        for number, item in enumerate(shuffled(*arguments)):
            if number == 15:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(sae_command, "shuffled", dying)
    assert sae_command.main([*fit, str(tmp_path / "stopped" / "sae")]) == 130
    assert (tmp_path / "stopped" / "sae.training").exists()
    monkeypatch.setattr(sae_command, "shuffled", shuffled)
    resumed = []
    monkeypatch.setattr(sae_fit, "_resume", lambda *a, original=sae_fit._resume: resumed.append(original(*a)) or resumed[-1])
    assert sae_command.main([*fit, str(tmp_path / "stopped" / "sae")]) == 0
    assert resumed[0][0] > 0, "it started from the beginning"
    whole, stopped = ((tmp_path / name / "sae" / sae.WEIGHTS_FILE).read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped


def test_patch_tokens_of_images_train_the_same_way(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for index in range(24):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).resize((200, 160)).save(tmp_path / f"{index}.png")
    out = tmp_path / "fitted" / "sae"
    fit = ["fit", "--tower", "compact", "--images", str(tmp_path), "--out", str(out), "--features", "16", "--k", "4", "--views", "2"]
    assert sae_command.main([*fit, "--tokens", "3", "--epochs", "60"]) == 0
    [line] = printed(capsys)
    model = sae.load(str(out))
    assert model.metadata["vectors"] == "tokens" and model.dim == Compact.dim
    assert sum(model.metadata["data"].values()) == 24 * 2 * 3 and line["features"] == 16


def test_tokens_of_a_run_are_refused(tmp_path, capsys):
    assert sae_command.main(["fit", "--tower", "compact", "--run", str(tmp_path), "--out", str(tmp_path / "x"), "--tokens", "4"]) == 2
    assert "--tokens 4 needs --images" in capsys.readouterr().err
