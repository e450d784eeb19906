"""What ships in curation/weights: arrays only, of the towers that are installed, with the command and figures that made them."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from curation import detector, fitted, sae, tags
from curation.shards import file_hash

FOLDERS = sorted(path for path in fitted.WEIGHTS_DIR.iterdir() if path.is_dir() and path.name != "__pycache__")
PROBES = [path for path in FOLDERS if (path / detector.INFO_FILE).exists()]
SAES = [path for path in FOLDERS if (path / sae.INFO_FILE).exists()]


def test_both_offline_towers_have_a_probe_and_the_semantic_one_an_sae():
    assert [path.name for path in PROBES] == ["synthetic-compact", "synthetic-effnet"]
    assert [path.name for path in SAES] == ["sae-effnet"]


def test_only_arrays_and_text_ship_and_they_are_small():
    files = [path for path in fitted.WEIGHTS_DIR.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".csv"}
    assert sum(path.stat().st_size for path in files) < 8e6


@pytest.mark.parametrize("folder", PROBES + SAES, ids=lambda path: path.name)
def test_a_model_belongs_to_the_tower_that_is_installed_and_says_what_made_it(folder):
    info = json.loads((folder / (detector.INFO_FILE if folder in PROBES else sae.INFO_FILE)).read_text())
    info = info if folder in PROBES else info["metadata"]
    tower = fitted.parse_tower(info["tower_spec"])
    assert info["tower"] == tower.identity
    assert (
        info["command"].startswith(f"k2 {'synthetic' if folder in PROBES else 'sae'} fit --") and f"--out {folder.name}" in info["command"]
    )
    assert info["data"] and info["evaluation"]


@pytest.mark.parametrize("folder", PROBES, ids=lambda path: path.name)
def test_a_probe_carries_its_honest_figures_and_its_thresholds(folder):
    probe = detector.load(folder.name)
    evaluation, thresholds = probe.info["evaluation"], probe.info["thresholds"]
    assert 0.5 < thresholds["fpr_5"] < thresholds["fpr_1"] < 1
    assert {"mean", "worst", "generators"} <= set(evaluation["disjoint"])
    controls = evaluation["controls"]
    assert evaluation["disjoint"]["mean"]["auroc"] < controls["auroc_random_split"], "unseen groups are harder, or something leaks"
    assert abs(controls["auroc_permuted_labels"] - 0.5) < 0.06
    real = evaluation["leave_one_group_out"]["real"]
    assert real["flagged_at_fpr_5"] <= 0.05 and real["flagged_at_fpr_1"] <= 0.01
    assert probe.weight.dtype == np.float32 and probe.slope > 0


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
def test_every_tag_belongs_to_the_weights_beside_it_and_kept_its_budget_where_it_was_measured(folder):
    evidence = json.loads((folder / "tags.json").read_text())
    rows = tags.read_csv(folder.parent / f"{folder.name}.tags.csv")
    assert evidence["weights"] == file_hash(folder / sae.WEIGHTS_FILE)
    model = sae.load(folder.name)
    assert [(row.feature, row.tag) for row in rows] == [(tag["feature"], tag["tag"]) for tag in evidence["tags"]]
    for row in rows:
        assert row.threshold >= model.threshold[row.feature] * (1 - 1e-5), "a feature has no value between 0 and its own threshold"
    budget = evidence["rules"]["budget"]
    for tag in evidence["tags"]:
        for family in tags.harmless(tag["report"]):
            share = tag["report"][family]
            assert share["interval"][0] <= budget, f"{tag['tag']} removes {share} of {family} on pictures that had no part in its choice"
