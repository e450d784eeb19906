"""From features to proposals: no tag for what also answers to style, to one source, or to nothing."""

import numpy as np
import pytest
import torch

from curation import tag_select
from curation.contrast_set import FAMILIES, REAL_STYLES, ContrastSet, Family
from curation.sae import Sae
from curation.tag_evidence import concepts_of, evidence, random_control, random_like, stability_of, together
from curation.tag_select import Rules, Values, discover, harmless, score, select

NUM, WIDE = 120, 30
SEEN = [f for f in FAMILIES if f.name not in REAL_STYLES and (f.severity in (0, 2, 4))]
RULES = Rules(budget=0.05)


def values(seed: int, num: int = NUM) -> Values:
    """Features that say nothing in any family; 0 answers to jpeg, 1 to jpeg and film grain, 2 to the content, 3 to jpeg of one source."""
    rng = np.random.default_rng(seed)
    group = np.array([f"source{i % 4}" for i in range(num)])
    content = rng.random(num) < 0.4
    rows, owner, family = [], [], []
    for number, kind in enumerate(SEEN):
        for picture in range(num):
            if kind.role == "damage" and kind.severity != (2, 4)[picture // 4 % 2]:
                continue
            row = rng.normal(-2, 0.7, WIDE)
            row[0] += (kind.name == "jpeg") * (1.2 * kind.severity)
            row[1] += 5 * (kind.name in ("jpeg", "film_grain"))
            row[2] += 5 * content[picture]
            row[3] += 6 * (kind.name == "jpeg" and picture % 4 == 0)
            rows.append(row)
            owner.append(picture)
            family.append(number)
    order = np.lexsort((family, owner))
    return Values(np.array(rows, np.float32)[order], np.array(owner)[order], np.array(family)[order], SEEN, group[np.array(owner)[order]])


@pytest.fixture(scope="module")
def parts():
    return values(0), values(1), values(2)


@pytest.fixture(scope="module")
def selection(parts):
    return select(parts[0], parts[1], np.random.default_rng(0), RULES)


def test_a_feature_that_answers_to_damage_alone_becomes_a_tag_and_one_that_answers_to_style_does_not(parts, selection):
    found = selection.discoveries["jpeg"].found(RULES)
    assert {0, 1, 3} <= set(found.tolist()) and 2 not in found
    assert selection.sets["jpeg"] == [0] and selection.features == {0: ["jpeg"]}
    measured = together(selection, parts[2], RULES)
    assert measured["damage"]["jpeg"]["auroc"][0] > 0.95 and measured["damage"]["jpeg"]["recall"] > 0.6
    assert measured["damage"]["vhs"]["features"] == []
    assert measured["worst_family"]["share"] <= 0.05
    assert measured["removed"]["clean"]["provable"] == 0.05


def test_pairs_exchanged_at_random_discover_nothing(parts, selection):
    assert all(row["discovered_in_exchanged_pairs"] == 0 for row in selection.funnel.values())
    swapped = discover(parts[0], "jpeg", np.random.default_rng(3))
    straight = discover(parts[0], "jpeg")
    assert swapped.gained[0] + swapped.lost[0] == straight.gained[0] + straight.lost[0], "the same pairs, other sides"
    assert straight.lost[0] < 5 < swapped.lost[0]


def test_a_threshold_lies_above_zero_and_above_what_every_harmless_family_has(parts, selection):
    assert (selection.cuts.at > 0).all()
    for rows in harmless(parts[1]).values():
        assert ((rows > selection.cuts.at).mean(0) <= 0.05).all()


def test_the_score_of_a_set_is_above_zero_where_a_tag_holds(parts, selection):
    rows = parts[2].values
    np.testing.assert_array_equal(score(rows, [0, 2], selection.cuts) > 0, ((rows > selection.cuts.at)[:, [0, 2]]).any(1))
    assert np.isneginf(score(rows, [], selection.cuts)).all()


def test_the_evidence_names_what_was_measured(parts, selection):
    own = np.full(WIDE, 0.5, np.float32)
    told = evidence(selection, parts[2], {0: 0.9}, np.zeros(len(parts[2].owner), int), {}, own)["0"]
    assert told["tag"] == "jpeg" and told["threshold"] == pytest.approx(0.5 + selection.cuts.at[0], rel=1e-5)
    assert told["auroc"]["jpeg"] > 0.95 and told["auroc"]["film_grain"] < 0.7 and told["selectivity"] > 0.2
    weak, strong = told["recall"]["jpeg"][1], told["recall"]["jpeg"][3]
    assert weak < strong and told["recall"]["jpeg"][0] is None
    share, upper = told["removed"]["clean"]
    assert share < upper <= 0.1
    assert told["p"] < 0.01 and told["odds_ratio"][1] > 1 and told["cliffs_delta"][1] > 0.8
    assert told["sources"]["reached"] == 1 and told["stability"] == 0.9 and told["names"] == []


def test_no_feature_means_no_tag():
    fit, estimate = values(5), values(6)
    quiet = [part._replace(values=part.values[:, 4:]) for part in (fit, estimate)]
    found = select(*quiet, np.random.default_rng(0), RULES)
    assert found.features == {}
    assert together(found, quiet[1], RULES)["worst_family"]["share"] == 0


@pytest.fixture(scope="module")
def contrast():
    """Pictures of 12 dimensions; jpeg moves along the first axis, sensor noise along the second."""
    rng, families = np.random.default_rng(0), [f for f in FAMILIES if f.name in ("clean", "jpeg", "sensor_noise", "film_grain")]
    vectors = rng.normal(0, 1, (180, 1, 12)).repeat(len(families), 1) + rng.normal(0, 0.1, (180, len(families), 12))
    for number, family in enumerate(families):
        vectors[:, number, 0] += family.severity * (family.name == "jpeg")
        vectors[:, number, 1] += family.severity * (family.name == "sensor_noise")
    part = np.repeat(["fit", "estimate", "report"], 60)
    return ContrastSet(families, [f"s/{i}" for i in range(180)], part, vectors.astype(np.float32), "t", np.repeat("", 180), 0)


def test_values_are_above_zero_where_the_sae_fires(contrast):
    model = Sae(torch.eye(12), torch.zeros(12), torch.eye(12), torch.zeros(12), torch.full((12,), 0.5), {})
    found = tag_select.feature_values(model, contrast, "report")
    row = int(np.flatnonzero(found.named("jpeg", 5))[3])
    assert found.values.shape == (60 * len(contrast.families), 12)
    np.testing.assert_allclose(found.values[row] + 0.5, contrast.vectors[120 + found.owner[row], found.family[row]], atol=1e-6)
    assert found.families[found.family[found.originals(found.named("jpeg", 5))[3]]] == Family("clean", "clean", 0)


def test_an_sae_of_the_right_axes_is_tagged_and_matched_and_random_rows_are_the_control(contrast):
    model = Sae(torch.eye(12), torch.zeros(12), torch.eye(12), torch.zeros(12), torch.full((12,), 1.5), {})
    parts = [tag_select.feature_values(model, contrast, part) for part in ("fit", "estimate", "report")]
    found = select(parts[0], parts[1], np.random.default_rng(0), RULES)
    assert found.sets["jpeg"] == [0] and found.sets["sensor_noise"] == [1]
    turned = Sae(torch.eye(12)[:, [3, 0]], torch.zeros(2), torch.eye(12)[[3, 0]], torch.zeros(12), torch.full((2,), 1.5), {})
    stability = stability_of(model, [turned], contrast, [0, 1])
    assert stability[0] == pytest.approx(1) and stability[1] < 0.5
    assert stability_of(model, [], contrast, [0]) == {0: None}
    random = random_like(model, contrast.vectors[:60, 0], np.random.default_rng(0))
    rows = torch.from_numpy(contrast.vectors[:60, 0])
    rates = [((x.w_enc.T @ rows.T + x.b_enc[:, None]) > x.threshold[:, None]).float().mean(1) for x in (model, random)]
    assert (rates[0] - rates[1]).abs().max() < 0.05, "as often as the feature in whose place it stands"
    control = random_control(model, contrast, 0, RULES)
    assert set(control["damage"]) == {"jpeg", "sensor_noise"} and control["num_tags"] >= 0


def test_concepts_are_clusters_of_clean_pictures(contrast):
    apart = contrast.vectors.copy()
    apart[::2, :, 5] += 30
    apart[1::2, :, 5] -= 30
    found = concepts_of(contrast._replace(vectors=apart), "report", 0)
    owner = tag_select.feature_values(
        Sae(torch.eye(12), torch.zeros(12), torch.eye(12), torch.zeros(12), torch.zeros(12), {}), contrast, "report"
    ).owner
    assert len(found) == len(owner)
    assert not set(found[owner % 2 == 0]) & set(found[owner % 2 == 1])
