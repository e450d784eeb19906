"""What ships in curation/weights: arrays only, of the towers that are installed, with the command and figures that made them."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from scipy.stats import binomtest

from curation import detector, fitted, sae, tags
from curation.shards import file_hash

FOLDERS = sorted(path for path in fitted.WEIGHTS_DIR.iterdir() if path.is_dir() and path.name != "__pycache__")
DETECTORS = [path for path in FOLDERS if (path / detector.INFO_FILE).exists()]
SAES = [path for path in FOLDERS if (path / sae.INFO_FILE).exists()]


def test_there_is_one_detector_and_one_sae():
    assert [path.name for path in DETECTORS] == ["synthetic"]
    assert [path.name for path in SAES] == ["sae-compact"]


def test_only_arrays_and_text_ship_and_they_are_small():
    files = [path for path in fitted.WEIGHTS_DIR.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".csv"}
    assert sum(path.stat().st_size for path in files) < 12e6


def test_the_sae_belongs_to_the_tower_that_is_installed_and_says_what_made_it():
    metadata = sae.load("sae-compact").metadata
    assert metadata["tower"] == fitted.parse_tower(metadata["tower_spec"]).identity
    assert metadata["command"].startswith("k2 sae fit --tower compact ")
    assert metadata["data"] and metadata["evaluation"]


def test_the_detector_belongs_to_the_towers_that_are_installed_and_says_what_made_it():
    info = detector.load("synthetic").info
    assert list(info["tower_specs"]) == ["pixels", "semantics"]
    for branch, spec in info["tower_specs"].items():
        assert info["towers"][branch] == fitted.parse_tower(spec).identity
    assert info["command"].startswith("k2 synthetic fit --") and "--out synthetic" in info["command"]
    assert info["data"]["real"] > 500 and info["data"]["synthetic"] > 400 and info["data"]["images"]


def test_the_detector_carries_its_honest_figures_and_its_thresholds():
    found = detector.load("synthetic")
    card, thresholds = found.info["evaluation"], found.info["thresholds"]
    crop, controls = card["views"]["crop"], card["controls"]
    assert {"mean", "worst", "generators"} <= set(crop)
    assert abs(controls["permuted_labels"] - 0.5) < 0.06
    assert crop["mean"]["auroc"] > 0.85 and controls["format_only"] is not None and controls["real_against_real_score"] < 0.6
    assert all(card["views"][view]["mean"]["auroc"] > crop["mean"]["auroc"] - 0.05 for view in ("jpeg 75", "half size"))
    assert max(part["ece"] for part in card["reliability"].values()) < 0.05
    assert {"all", "photo", "illustration", "render"} <= set(thresholds), "every kind with 40 images has thresholds of its own"
    for entry in thresholds.values():
        cuts = [entry[share]["p_synthetic"] for share in ("0.15", "0.05", "0.01") if entry[share]]
        assert cuts == sorted(cuts) and len(cuts) >= 2
        assert entry["0.05"]["loss"][0] < 0.05 < entry["0.05"]["loss"][1]
    assert all(slope > 0 for slope, _ in found.calibration.platt.values()) and (found.calibration.weights >= 0).all()
    assert all(head.weight.dtype == np.float32 for head in found.heads.values())


@pytest.mark.parametrize("folder", SAES, ids=lambda path: path.name)
def test_an_sae_has_the_files_of_saelens(folder):
    config = json.loads((folder / "cfg.json").read_text())
    with safe_open(folder / "sae_weights.safetensors", "np") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    d, m = config["d_in"], config["d_sae"]
    assert shapes == {"W_enc": (d, m), "b_enc": (m,), "W_dec": (m, d), "b_dec": (d,), "threshold": (m,)}
    assert (config["architecture"], config["apply_b_dec_to_input"], config["normalize_activations"]) == ("jumprelu", False, "none")
    evaluation = config["metadata"]["evaluation"]
    assert 0 < evaluation["explained_variance"] < 1 and 0 < evaluation["l0"] <= 32


@pytest.mark.parametrize("folder", SAES, ids=lambda path: path.name)
def test_every_tag_belongs_to_the_weights_beside_it_and_to_the_evidence(folder):
    told = json.loads((folder / "tags.json").read_text())
    rows = tags.read_csv(folder.parent / f"{folder.name}.tags.csv")
    model, weights = sae.load(folder.name), file_hash(folder / sae.WEIGHTS_FILE)
    assert (told["weights"], told["tower"]) == (weights, model.metadata["tower"])
    for row in rows:
        assert (row.model, row.weights, row.tower) == (folder.name, weights, model.metadata["tower"])
        assert row.threshold >= model.threshold[row.feature] * (1 - 1e-5), "a feature has no value between 0 and its own threshold"
        if row.verdict == "artifact":
            evidence = told["features"][str(row.feature)]
            assert row.threshold == pytest.approx(evidence["threshold"], rel=1e-4) and row.tag == evidence["tag"]


@pytest.mark.parametrize("folder", SAES, ids=lambda path: path.name)
def test_no_style_family_refutes_the_budget_on_pictures_that_had_no_part_in_the_choice(folder):
    told = json.loads((folder / "tags.json").read_text())
    for feature, evidence in told["features"].items():
        for family, (share, _) in evidence["removed"].items():
            row = told["report"]["removed"][family]
            low = binomtest(round(share * row["num"]), row["num"]).proportion_ci(0.95, "exact").low
            assert low <= max(told["rules"]["budget"], row["provable"]), f"feature {feature} removes {share:.1%} of {family}"
