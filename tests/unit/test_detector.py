"""The detector: evidence that may be missing, given scores, calibration out of fold, and files that belong together."""

import numpy as np
import pytest
from scipy.special import logit

from curation import detector, evaluation
from curation.declared import LOG_ODDS, declared
from curation.detector import PIXELS, SEMANTICS, VIEWS, Rows
from curation.labelled import FACTS, JUDGED, Images
from curation.probe import Head, Labels

DIM = 16
TOWERS = {PIXELS: "compact/test/1", SEMANTICS: "effnet/test/1"}


def labelled(num_groups: int = 6, per_group: int = 24) -> Labels:
    """As many real as synthetic images; the sources 0, 2, 4 hold photographs and the others drawings."""
    number = np.tile(np.repeat(np.arange(num_groups), per_group), 2)
    synthetic = np.repeat([False, True], num_groups * per_group)
    group = np.array([f"{'generator' if s else 'source'} {n}" for s, n in zip(synthetic, number, strict=True)])
    return Labels(synthetic, group, np.where(number % 2, "drawing", "photo"))


def vectors(labels: Labels, shared: float, own: float, seed: int) -> np.ndarray:
    """(N, V, DIM): `shared` separates the classes everywhere, `own` moves every group its own way; kinds differ in the last entry."""
    rng = np.random.default_rng(seed)
    centre = {name: own * rng.normal(size=DIM) for name in np.unique(labels.group)}
    direction = np.r_[np.ones(DIM - 1), 0] / np.sqrt(DIM)
    truth = np.where(labels.synthetic, shared, -shared)[:, None] * direction + np.stack([centre[name] for name in labels.group])
    truth[:, -1] += np.where(labels.kind == "photo", 3, -3)
    return (truth[:, None] + rng.normal(size=(len(truth), len(JUDGED), DIM)) * 1.5).astype(np.float32)


def rows(pixels: float = 1.5, semantics: float = 1.0, own: float = 0.3) -> Rows:
    labels = labelled()
    return Rows(labels, {PIXELS: vectors(labels, pixels, own, 1), SEMANTICS: vectors(labels, semantics, own, 2)}, {}, {})


@pytest.fixture(scope="module")
def fitted():
    return detector.fit(rows(), TOWERS)


def first(data: Rows) -> dict[str, np.ndarray]:
    return {name: values[:, 0] for name, values in data.vectors.items()}


def scored(found, data: Rows, words=None, branches=(PIXELS, SEMANTICS)):
    vectors = {name: values for name, values in first(data).items() if name in branches}
    return detector.score(found, vectors, TOWERS, words or [None] * len(data.labels.group))


def test_two_branches_together_are_better_than_either_alone(fitted):
    found, raw = fitted
    data = rows()
    both = detector.cross_calibrated(raw, data.labels)[:, 0]
    alone = [detector.cross_calibrated({name: scores}, data.labels)[:, 0] for name, scores in raw.items()]
    loss = [np.logaddexp(0, np.where(data.labels.synthetic, -1, 1) * odds).mean() for odds in (both, *alone)]
    assert loss[0] < min(loss[1:]) * 0.95
    assert set(found.info["fusion"]["weights"]) == {PIXELS, SEMANTICS} and min(found.info["fusion"]["weights"].values()) > 0.2


@pytest.mark.parametrize("branch", [PIXELS, SEMANTICS])
def test_a_missing_branch_leaves_the_other_one_calibrated_alone(fitted, branch):
    found, _ = fitted
    scores = scored(found, rows(), branches=(branch,))
    mine, other = (scores.p_pixels, scores.p_semantics) if branch == PIXELS else (scores.p_semantics, scores.p_pixels)
    assert other is None
    np.testing.assert_allclose(scores.p_synthetic, mine, atol=1e-6)
    assert (scores.kind is None) == (branch == PIXELS)


def test_a_crop_that_an_image_does_not_have_is_neither_fitted_on_nor_scored():
    data = rows()
    small = data.labels.group == "source 1"
    for values in data.vectors.values():
        values[small, 1:] = np.nan
    found, raw = detector.fit(data, TOWERS)
    odds = found.calibration.fused(raw)
    assert np.isnan(odds[small, 1:]).all() and np.isfinite(odds[small, 0]).all() and np.isfinite(odds[~small]).all()


def test_what_a_file_declares_is_added_and_a_camera_moves_little(fitted):
    found, _ = fitted
    data = rows()
    odds = {word: logit(scored(found, data, [word] * len(data.labels.group)).p_synthetic.astype(float)) for word in LOG_ODDS}
    inner = np.abs(odds[None]) < 4  # float32 keeps the difference there
    np.testing.assert_allclose(odds["plain"][inner] - odds[None][inner], LOG_ODDS["plain"], atol=0.05)
    np.testing.assert_allclose(odds["camera"][inner] - odds[None][inner], -0.5, atol=0.01)
    surest_real = np.full(len(data.labels.group), "signed")
    assert scored(found, data, surest_real.tolist()).p_synthetic.min() > 0.95


@pytest.mark.parametrize(
    "facts, word",
    [
        ({"declared_ai": True, "declared_by": "c2pa", "c2pa": "valid"}, "signed"),
        ({"declared_ai": True, "declared_by": "c2pa", "c2pa": "invalid"}, "plain"),
        ({"declared_ai": True, "declared_by": "parameters", "c2pa": "valid"}, "plain"),
        ({"declared_ai": False, "c2pa": "valid"}, None),
        ({"declared_ai": False, "exif_make": "Canon", "exif_exposure": 0.01, "exif_f_number": 4.0}, "camera"),
        ({"declared_ai": False, "exif_make": "Canon"}, None),
        ({"declared_ai": True, "declared_by": "software", "exif_make": "Canon", "exif_exposure": 0.01, "exif_f_number": 4.0}, "plain"),
    ],
)
def test_a_declaration_is_decisive_only_with_a_signature_that_holds(facts, word):
    assert declared(facts) == word


def test_given_scores_take_the_place_of_folds_and_their_head_of_a_fit():
    """Vectors of a network that knows its training images by heart: the class is in them, and says nothing about new images."""
    data = rows(pixels=0.0)
    honest = rows(pixels=1.5)
    head = Head(np.r_[np.ones(DIM - 1), 0].astype(np.float32), 0.0)
    rng = np.random.default_rng(3)
    out_of_fold = np.where(data.labels.synthetic, 2.0, -2.0)[:, None] + rng.normal(size=(len(data.labels.group), len(JUDGED))) * 2
    data.vectors[PIXELS][:] += np.where(data.labels.synthetic, 40, -40)[:, None, None]
    given = Rows(data.labels, data.vectors, {PIXELS: out_of_fold}, {PIXELS: head})
    found, raw = detector.fit(given, TOWERS)
    assert raw[PIXELS] is out_of_fold and found.heads[PIXELS] is head
    slope, _ = found.calibration.platt[PIXELS]
    assert slope == pytest.approx(1.0, abs=0.25)  # log odds of normals at -2 and 2 with deviation 2
    assert "folds were left out" in found.info["heads"][PIXELS]
    assert np.isfinite(scored(found, honest).p_synthetic).all()


def test_an_image_has_the_kind_of_the_real_images_that_it_looks_like(fitted):
    found, _ = fitted
    data = rows()
    assert (scored(found, data).kind == data.labels.kind).mean() > 0.95
    assert found.info["kinds"] == ["drawing", "photo"] and {"all", "drawing", "photo"} == set(found.info["thresholds"])


def test_vectors_of_another_tower_are_refused_by_both_names(fitted):
    found, _ = fitted
    with pytest.raises(ValueError, match=r"effnet/test/1.*siglip/ViT/webli.*synthetic fit --towers siglip"):
        detector.score(found, first(rows()), TOWERS | {SEMANTICS: "siglip/ViT/webli"}, [None] * len(rows().labels.group))
    with pytest.raises(ValueError, match="looks at pixels, semantics; got vectors of nothing"):
        detector.score(found, {}, TOWERS, [])


def test_a_saved_detector_gives_the_same_bits_and_a_row_does_not_depend_on_its_batch(fitted, tmp_path):
    found, _ = fitted
    data = rows()
    expected = scored(found, data)
    detector.save(found, tmp_path / "d")
    loaded = detector.load(str(tmp_path / "d"))
    for before, after in zip(expected, scored(loaded, data), strict=True):
        np.testing.assert_array_equal(before, after)
    alone = [
        detector.score(loaded, {name: values[i : i + 1] for name, values in first(data).items()}, TOWERS, [None]).p_synthetic[0]
        for i in range(20)
    ]
    np.testing.assert_array_equal(alone, expected.p_synthetic[:20])
    (tmp_path / "d" / detector.INFO_FILE).write_text(
        (tmp_path / "d" / detector.INFO_FILE).read_text().replace('"pixels": "compact', '"x": "')
    )
    with pytest.raises(ValueError, match="do not belong together"):
        detector.load(str(tmp_path / "d"))


def test_the_same_rows_give_the_same_detector(fitted, tmp_path):
    found, _ = fitted
    again, _ = detector.fit(rows(), TOWERS)
    detector.save(found, tmp_path / "a")
    detector.save(again, tmp_path / "b")
    for name in (detector.WEIGHTS_FILE, detector.INFO_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("label, name", [(False, r"1 sources \(real\)"), (True, r"1 generators \(synthetic\)")])
def test_one_group_of_a_class_is_not_enough_to_judge_unseen_ones(label, name):
    data = rows()
    few = (data.labels.synthetic != label) | np.char.endswith(data.labels.group, " 0")
    with pytest.raises(ValueError, match=f"{name}.*at least 3"):
        detector.fit(Rows(data.labels.at(few), {k: v[few] for k, v in data.vectors.items()}, {}, {}), TOWERS)


def test_a_calibration_that_left_a_group_out_does_not_depend_on_it(fitted):
    _, raw = fitted
    labels = labelled()
    own = labels.group == "source 2"
    moved = {name: np.where(own[:, None], scores + 5, scores) for name, scores in raw.items()}
    before, after = detector.cross_calibrated(raw, labels), detector.cross_calibrated(moved, labels)
    weights = {name: slope for name, (slope, _) in detector.calibrated({k: v[~own] for k, v in raw.items()}, labels.at(~own)).platt.items()}
    fused = detector.calibrated({k: v[~own] for k, v in raw.items()}, labels.at(~own)).weights
    shift = sum(5 * slope * weight for slope, weight in zip(weights.values(), fused, strict=True))
    np.testing.assert_allclose(after[own] - before[own], shift, rtol=1e-6)


# --- the report card ---


def images(data: Rows, container: np.ndarray | None = None) -> Images:
    rng, num = np.random.default_rng(0), len(data.labels.group)
    container = rng.uniform(0, 1, (num, len(FACTS))) if container is None else container
    return Images([str(i) for i in range(num)], data.labels, rng.uniform(1e5, 1e6, num), container, data.vectors, 0)


def test_the_card_of_a_fit_is_about_unseen_groups_and_its_controls_are_at_chance(fitted):
    found, raw = fitted
    card = evaluation.of_fit(rows(), images(rows()), found, raw, 0)
    assert card["views"]["crop"]["mean"]["auroc"] > 0.86
    assert {entry["generator"] for entry in card["views"]["crop"]["generators"]} == {f"generator {i}" for i in range(6)}
    assert abs(card["controls"]["permuted_labels"] - 0.5) < 0.1 and abs(card["controls"]["format_only"] - 0.5) < 0.12
    assert card["reliability"]["whole"]["ece"] < 0.1
    assert card["losses"]["whole"]["real"]["removed"] <= 0.12
    assert set(card["alone"]) == {PIXELS, SEMANTICS}
    recall = card["curves"]["detector"]
    assert recall == sorted(recall) and len(recall) == len(card["curves"]["loss"])


def test_a_detector_that_only_knows_its_sources_has_a_card_near_chance():
    data = rows(pixels=0.0, semantics=0.0, own=3.0)
    try:
        found, raw = detector.fit(data, TOWERS)
    except ValueError as error:
        assert "cannot tell the two" in str(error)
        return
    card = evaluation.of_fit(data, images(data), found, raw, 0)
    assert card["views"]["crop"]["mean"]["auroc"] < 0.75
    assert card["controls"]["random_split"] > 0.95 and card["controls"]["real_against_real"] > 0.9


def test_a_format_that_gives_the_class_away_is_shown(fitted):
    found, raw = fitted
    data = rows()
    container = np.random.default_rng(1).uniform(0, 1, (len(data.labels.group), len(FACTS)))
    container[:, 0] = data.labels.synthetic
    assert evaluation.of_fit(data, images(data, container), found, raw, 0)["controls"]["format_only"] > 0.99


def test_new_images_are_judged_by_the_detector_as_it_is(fitted):
    found, _ = fitted
    labels = labelled(num_groups=4)
    fresh = Rows(labels, {PIXELS: vectors(labels, 1.5, 0.3, 11), SEMANTICS: vectors(labels, 1.0, 0.3, 12)}, {}, {})
    card = evaluation.of_new(found, images(fresh))
    assert card["views"]["crop"]["mean"]["auroc"] > 0.86 and card["num"]["generators"] == 4
    real = Rows(labels.at(~labels.synthetic), {k: v[~labels.synthetic] for k, v in fresh.vectors.items()}, {}, {})
    alone = evaluation.of_new(found, images(real))
    assert "views" not in alone and alone["losses"]["whole"]["synthetic"] is None
    assert alone["losses"]["crop"]["real"] == card["losses"]["crop"]["real"]


def test_views_of_a_fit_come_first_among_those_that_are_judged():
    assert JUDGED[: len(VIEWS)] == VIEWS and detector.NUM_CALIBRATED == 2
