"""What people say of a feature, and the tag table that follows."""

import csv
import json

import pytest

from curation import reviews

TOWER, WEIGHTS, FIRES = "effnet/x/1", "abc123", [0.1] * 10


@pytest.fixture
def folder(tmp_path):
    """An SAE's folder with two proposals."""
    place = tmp_path / "sae-here"
    place.mkdir()
    rows = [(3, "watermark", 0.4), (5, "jpeg+interlace", 0.25)]
    shared = {"model": "sae-here", "verdict": "artifact", "reviewers": "", "tower": TOWER, "weights": WEIGHTS}
    reviews.write_rows([shared | {"feature": f, "tag": tag, "threshold": cut} for f, tag, cut in rows], place)
    return place


def sign(folder, reviewer, choices, weights=WEIGHTS):
    return reviews.sign(folder, TOWER, weights, reviewer, choices, FIRES)


def row(folder, feature):
    return next(row for row in reviews.read_rows(folder) if row["feature"] == feature)


def test_a_signature_goes_onto_the_proposal_and_other_rows_stay(folder):
    untouched = row(folder, 5)
    (signed,) = sign(folder, "Ada", {"3": {"verdict": "artifact"}})
    assert signed == row(folder, 3) | {"threshold": 0.4}
    assert (signed["tag"], signed["verdict"], signed["reviewers"]) == ("watermark", "artifact", "Ada")
    assert (signed["tower"], signed["weights"]) == (TOWER, WEIGHTS) and row(folder, 5) == untouched
    with open(reviews.table_path(folder), newline="") as file:
        assert csv.DictReader(file).fieldnames == ["model", "feature", "tag", "verdict", "threshold", "reviewers", "tower", "weights"]


def test_two_who_agree_are_both_named_and_two_who_do_not_make_it_mixed(folder):
    sign(folder, "Bo", {"3": {"verdict": "artifact"}, "5": {"verdict": "artifact"}})
    sign(folder, "Ada", {"3": {"verdict": "artifact"}, "5": {"verdict": "style"}})
    assert (row(folder, 3)["verdict"], row(folder, 3)["reviewers"]) == ("artifact", "Ada;Bo")
    assert (row(folder, 5)["verdict"], row(folder, 5)["reviewers"]) == ("mixed", "Ada;Bo")


def test_who_chooses_again_replaces_the_earlier_choice(folder):
    for name, verdict in (("Ada", "artifact"), ("Bo", "style"), ("Ada", "style")):
        sign(folder, name, {"3": {"verdict": verdict}})
    assert (row(folder, 3)["verdict"], row(folder, 3)["reviewers"]) == ("style", "Ada;Bo")


def test_a_feature_that_nobody_proposed_gets_the_reviewers_name_and_its_own_threshold(folder):
    (signed,) = sign(folder, "Ada", {"7": {"verdict": "content", "tag": " night\nsky "}})
    assert (signed["tag"], signed["threshold"]) == ("night sky", 0.1)
    (unnamed,) = sign(folder, "Ada", {"8": {"verdict": "unknown"}})
    assert unnamed["tag"] == reviews.UNNAMED


def test_a_proposals_name_stays_when_reviewers_call_it_differently(folder):
    sign(folder, "Ada", {"3": {"verdict": "artifact", "tag": "stamp"}})
    assert row(folder, 3)["tag"] == "stamp"
    sign(folder, "Bo", {"3": {"verdict": "artifact", "tag": "logo"}})
    assert row(folder, 3)["tag"] == "stamp"


def test_a_review_at_another_threshold_is_refused_and_nothing_is_written(folder):
    before = reviews.table_path(folder).read_bytes()
    with pytest.raises(ValueError, match=r"feature 3 was reviewed at threshold 0.3, the tag table now has 0.4"):
        sign(folder, "Ada", {"5": {"verdict": "artifact"}, "3": {"verdict": "artifact", "threshold": 0.3}})
    assert reviews.table_path(folder).read_bytes() == before and not (folder / reviews.REVIEWS_FILE).exists()


def test_a_review_of_before_the_threshold_moved_no_longer_counts(folder):
    sign(folder, "Ada", {"3": {"verdict": "style"}})
    moved = [
        one | ({"threshold": 0.5, "reviewers": "", "verdict": "artifact"} if one["feature"] == 3 else {})
        for one in reviews.read_rows(folder)
    ]
    reviews.write_rows(moved, folder)
    sign(folder, "Bo", {"3": {"verdict": "artifact"}})
    assert (row(folder, 3)["verdict"], row(folder, 3)["reviewers"], row(folder, 3)["threshold"]) == ("artifact", "Bo", 0.5)


def test_reviews_of_other_weights_do_not_count(folder):
    sign(folder, "Ada", {"3": {"verdict": "style"}})
    sign(folder, "Bo", {"3": {"verdict": "artifact", "threshold": 0.2}}, weights="def456")
    assert [(one["feature"], one["verdict"], one["reviewers"], one["weights"]) for one in reviews.read_rows(folder)] == [
        (3, "artifact", "Bo", "def456")
    ]


@pytest.mark.parametrize(
    "reviewer, choices, message",
    [
        (" ", {"3": {"verdict": "artifact"}}, "a sign-off is somebody's"),
        ("Ada;Bo", {"3": {"verdict": "artifact"}}, "without a semicolon"),
        ("Ada", {"3": {"verdict": "damage"}}, "verdict 'damage'; choose from artifact, style"),
        ("Ada", {"10": {"verdict": "style"}}, "no feature '10': this SAE has 0 to 9"),
        ("Ada", {"x": {"verdict": "style"}}, "no feature 'x'"),
        ("Ada", {"8": {"verdict": "artifact", "threshold": 0.05}}, "lies below 0.1, where the feature starts to fire"),
    ],
)
def test_what_cannot_be_signed_is_refused(folder, reviewer, choices, message):
    with pytest.raises(ValueError, match=message):
        sign(folder, reviewer, choices)


def test_a_file_that_is_no_export_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"kind": "else"}))
    with pytest.raises(ValueError, match="export them with the button"):
        reviews.read_choices(str(path))


def test_a_table_of_before_reviews_had_columns_is_refused(tmp_path):
    (tmp_path / "old.tags.csv").write_text("model,feature,tag,verdict,threshold\nold,2,watermark,artifact,0.14\n")
    with pytest.raises(ValueError, match="make it again with `k2 sae tag`"):
        reviews.read_rows(tmp_path / "old")
