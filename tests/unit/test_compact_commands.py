"""`k2 synthetic autoencoders`, `pairs` and `train`, from a folder of pictures to scores that `fit` takes."""

import json

import numpy as np
import pytest
from PIL import Image

from curation import compact
from curation.labelled import JUDGED
from pipelines import synthetic
from pipelines.compact import labelled


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """real/<source> and synthetic/<generator>, two of each with two pictures; the synthetic ones are of large squares."""
    folder, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for label, resample in (("real", Image.Resampling.BICUBIC), ("synthetic", Image.Resampling.NEAREST)):
        for group in ("a", "b"):
            place = folder / label / f"{label} {group}"
            place.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((272, 272), resample).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def made(pictures, tmp_path_factory):
    """(autoencoders, pairs, networks), every step through its command."""
    work = tmp_path_factory.mktemp("work")
    real = ["--images", str(pictures / "real")]
    assert synthetic.main(["autoencoders", *real, "--out", str(work / "ae"), "--steps", "3"]) == 0
    chosen = str(work / "ae" / "transposed-vq-f4.safetensors")
    assert synthetic.main(["pairs", *real, "--out", str(work / "pairs"), "--autoencoder", chosen, "--per-image", "1"]) == 0
    train = ["train", "--images", str(pictures), "--pairs", str(work / "pairs"), "--out", str(work / "net")]
    assert synthetic.main([*train, "--steps", "2", "--folds", "2", "--fold-steps", "2"]) == 0
    return work / "ae", work / "pairs", work / "net"


def test_six_autoencoders_cover_all_upsamplings(made):
    names = " ".join(path.stem for path in made[0].glob("*.safetensors"))
    assert len(list(made[0].iterdir())) == 6 and all(word in names for word in ("nearest", "bilinear", "transposed", "shuffle", "gan"))


def test_pairs_name_their_image_and_source(made):
    (file,) = made[1].glob("*.npz")
    pairs = np.load(file)
    assert sorted(set(pairs["source"].tolist())) == ["real a", "real b"] and len(pairs["real"]) == 4
    assert not np.array_equal(pairs["real"], pairs["reconstruction"])


def test_every_image_is_scored_by_the_network_that_left_its_group_out(made, pictures):
    folder = made[2]
    card, scores = json.loads((folder / "compact.json").read_text()), np.load(folder / "scores.npz")
    assert card["data"]["num_real"] == card["data"]["num_synthetic"] == 4 and card["data"]["num_pairs"] == 4
    assert sorted(name for names in card["folds"] for name in names) == ["real a", "real b", "synthetic a", "synthetic b"]
    assert len(scores["path"]) == len(set(scores["path"].tolist())) == 8 and scores["views"].tolist() == list(JUDGED)
    assert np.isfinite(scores["pixels"]).all() and scores["weight"].shape == (compact.DIM,)


def test_networks_that_are_there_are_kept(made, pictures, capsys):
    before = {path.name: path.read_bytes() for path in made[2].glob("*.safetensors")}
    (made[2] / "fold-1.safetensors").unlink()
    train = ["train", "--images", str(pictures), "--pairs", str(made[1]), "--out", str(made[2])]
    assert synthetic.main([*train, "--steps", "2", "--folds", "2", "--fold-steps", "2"]) == 0
    assert {path.name: path.read_bytes() for path in made[2].glob("*.safetensors")} == before


def test_a_folder_of_real_images_and_pairs_is_enough(made, pictures, tmp_path):
    train = ["train", "--images", str(pictures / "real"), "--pairs", str(made[1]), "--out", str(tmp_path)]
    assert synthetic.main([*train, "--steps", "1"]) == 0
    assert json.loads((tmp_path / "compact.json").read_text())["data"]["num_synthetic"] == 0


def test_a_folder_without_folders_is_one_source(pictures):
    found = labelled(str(pictures / "real" / "real a"), None)
    assert [(entry.path, entry.synthetic, entry.group) for entry in found] == [("0.png", False, "real a"), ("1.png", False, "real a")]


def test_without_images_or_pairs_the_error_says_what_to_do(pictures, tmp_path, capsys):
    assert synthetic.main(["train", "--images", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "no images under" in capsys.readouterr().err
    assert synthetic.main(["train", "--images", str(pictures), "--pairs", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "k2 synthetic pairs" in capsys.readouterr().err
