"""The tag table, and the parts of the pictures."""

import numpy as np
import pytest

from curation import tags
from curation.schema import TAGS
from curation.tags import Tag


def test_only_the_verdict_artifact_removes():
    matrix = np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    chosen = [Tag("m", 0, "jpeg", "artifact", 1.0), Tag("m", 1, "film grain", "style", 1.0)]
    assert tags.fires(matrix, chosen).tolist() == [True, False, False]


def test_a_tag_table_comes_back_and_unknown_verdicts_are_refused(tmp_path):
    path = tmp_path / "sae-x.tags.csv"
    chosen = [
        Tag("sae-x", 3, "jpeg+mosquito", "artifact", 0.5, "Ada;Grace", "effnet/1", "abc"),
        Tag("sae-x", 9, 'a "style", with a comma', "style", 0.25, "", "effnet/1", "abc"),
    ]
    tags.write_csv(chosen, path)
    assert path.read_text().splitlines()[0] == "model,feature,tag,verdict,threshold,reviewers,tower,weights"
    assert tags.read_csv(path) == chosen
    path.write_text(path.read_text().replace(",style,", ",ugly,"))
    with pytest.raises(ValueError, match="verdict 'ugly' of feature 9"):
        tags.read_csv(path)
    path.write_text("model,feature\n")
    with pytest.raises(ValueError, match="make it again with `k2 sae tag`"):
        tags.read_csv(path)


def test_no_tag_is_a_table_with_a_header_only(tmp_path):
    tags.write_csv([], tmp_path / "sae-x.tags.csv")
    assert (tmp_path / "sae-x.tags.csv").read_text() == ",".join(TAGS.names) + "\n"
    assert tags.read_csv(tmp_path / "sae-x.tags.csv") == []


@pytest.mark.parametrize("reviewers, signed", [("", False), (" ; ", False), ("Ada", True), ("Ada;Grace", True)])
def test_a_tag_is_signed_by_a_name(reviewers, signed):
    assert Tag("m", 0, "jpeg", "artifact", 1.0, reviewers).signed is signed


def test_a_picture_is_in_the_same_part_every_time_and_the_parts_have_their_shares():
    parts = [tags.part(str(index).encode()) for index in range(5000)]
    assert parts == [tags.part(str(index).encode()) for index in range(5000)]
    shares = [parts.count(name) / 5000 for name in ("fit", "estimate", "report")]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.02)
