"""`k2 sae tag` beside the statistics: names by looking at remade pictures, the table for people, the wrong SAE."""

from types import SimpleNamespace

import numpy as np
import pytest
from test_contrast_set import Means, folder  # noqa: F401 - a fixture

from curation import contrast_set, tag_names
from curation.tag_select import Cuts, Values
from pipelines import sae as sae_command
from pipelines import sae_tag


def test_a_model_is_shown_the_very_pictures_that_the_feature_saw(folder, monkeypatch, capsys):  # noqa: F811
    contrast = contrast_set.read(str(folder), Means())
    vectors = contrast.vectors[contrast.part == "report"]
    owner, family = np.nonzero(~np.isnan(vectors[:, :, 0]))
    report = Values(vectors[owner, family][:, :1], owner, family, contrast.families, contrast.groups[: len(owner)])
    cut = float(np.median(report.values))
    selection = SimpleNamespace(features={0: ["jpeg"]}, cuts=Cuts(np.array([cut]), np.ones(1)))
    shown = {}
    monkeypatch.setattr(tag_names, "by_looking", lambda endpoint, top, near: shown.update(top=top, near=near) or {"name": "bright"})
    found = sae_tag.names_by_looking(None, selection, contrast, report, str(folder), None)
    assert found == {0: {"name": "bright"}}
    means = {kind: [image.reshape(-1, 3).mean(0)[0] for image in images] for kind, images in shown.items()}
    order = np.sort(report.values[:, 0])[::-1]
    np.testing.assert_allclose(means["top"], order[: sae_tag.SHOWN], rtol=1e-5)
    np.testing.assert_allclose(means["near"], order[order <= cut][: sae_tag.SHOWN], rtol=1e-5)

    none = SimpleNamespace(features={0: ["jpeg"]}, cuts=Cuts(np.array([300.0]), np.ones(1)))
    assert sae_tag.names_by_looking(None, none, contrast, report, str(folder), None) == {}
    assert "feature 0 has only 0 images above its threshold" in capsys.readouterr().err


def test_an_sae_of_another_tower_is_no_witness_of_stability(capsys, tmp_path):
    arguments = ["tag", "--model", str(tmp_path), "--images", str(tmp_path)]
    assert sae_command.main(arguments) == 2
    assert "no fitted model" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"was fitted on compact/.*they have nothing in common"):
        sae_tag._other("sae-compact", "effnet/efficientnet_lite2/0")


def test_the_table_says_what_few_pictures_cannot_prove():
    row = {"num": 41, "removed": 1, "share": 0.0244, "upper": 0.11}
    written = {
        "funnel": {
            "jpeg": {"discovered": 3, "discovered_in_exchanged_pairs": 0, "chosen": [7]},
            "vhs": {"discovered": 0, "discovered_in_exchanged_pairs": 0, "chosen": []},
        },
        "report": {"damage": {"jpeg": {"auroc": [0.9, 0.8, 1], "recall": 0.4}}, "removed": {"clean": row}},
        "pictures": {"estimate": 41},
        "rules": {"budget": 0.005},
    }
    text = sae_tag.table(written)
    assert "41 pictures in `estimate` prove a budget of 7.05% per family, not 0.50%" in text
    assert "0.900   0.400" in text and "11.00%" in text
    assert "prove" not in sae_tag.table(written | {"pictures": {"estimate": 598}})
