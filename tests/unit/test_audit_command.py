"""`k2 synthetic audit` on a small run: a sample, its sheet, and what a person's answers mean."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from small_run import small_run

from curation import detector, fitted
from pipelines import synthetic as command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("audit"))


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Three known AI images."""
    folder = tmp_path_factory.mktemp("known")
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 60, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def test_a_sample_is_drawn_filled_in_and_counted(run, known, tmp_path, capsys):
    table = tmp_path / "audit.csv"
    draw = ["audit", "--run", str(run), "--policy", "pretrain_256", "--sample", "6", "--out", str(table), "--known", str(known)]
    assert command.main(draw) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["selected"] == 10 and [Image.open(path).size[0] > 500 for path in result["sheets"]] == [True]
    rows = list(csv.DictReader(table.open()))
    key = json.loads((tmp_path / "audit.key.json").read_text())
    assert len(rows) == 9 and len(key["known"]) == 3 and {row["image"] for row in rows} == set(key["images"])
    assert str(known) not in table.read_text(), "the table must not give the known images away"

    assert command.main(["audit", "--checked", str(table)]) == 2
    assert "9 of 9 rows have no answer" in capsys.readouterr().err
    seen = set(key["known"][:2])
    lines = [f"{row['number']},{row['image']},{'ai' if row['image'] in seen else 'real'}" for row in rows]
    table.write_text("\n".join(["number,image,ai", *lines]) + "\n")
    assert command.main(["audit", "--checked", str(table)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num"], found["found"], found["num_known"], found["found_known"]) == (6, 0, 3, 2)
    assert found["left"]["share"] == 0 and found["left"]["high"] > 0.4, "six images by a poor auditor show nothing"

    before = (tmp_path / "audit.key.json").read_bytes()
    assert command.main(draw) == 0 and (tmp_path / "audit.key.json").read_bytes() == before


def test_a_claim_has_its_number_of_images(capsys):
    assert command.main(["audit", "--claim", "0.001"]) == 0
    assert json.loads(capsys.readouterr().out)["images_to_check_by_found"] == {"0": 2995, "1": 4742, "2": 6294}


def test_the_detectors_own_estimate_is_corrected_by_its_confusion(run, tmp_path, capsys):
    found = detector.load(next(path.parent.name for path in fitted.WEIGHTS_DIR.glob(f"*/{detector.INFO_FILE}")))
    share = {"real": {"num": 400, "removed": 0.05}, "synthetic": {"num": 200, "removed": 0.9}}
    detector.save(detector.with_info(found, evaluation={"losses": {"whole": share}}), tmp_path / "d")
    assert command.main(["audit", "--run", str(run), "--model", str(tmp_path / "d")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["num"], result["found"], result["found_known"], result["flagged_clean"]) == (16, 1, 180, 20)
    assert result["all"]["share"] == pytest.approx((1 / 16 - 0.05) / 0.85, abs=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give --run, --policy, --sample and --out"),
        (["--run", "RUN", "--policy", "pretrain_1024", "--sample", "5", "--out", "x.csv"], "run `k2 filter --run"),
        (["--run", "RUN", "--policy", "pretrain_256", "--sample", "11", "--out", "x.csv"], "a sample of 11 from 10 images"),
        (["--run", "RUN", "--policy", "pretrain_256", "--sample", "2", "--out", "x.csv", "--known", "/nowhere"], "holds no images"),
        (["--checked", "/nowhere/x.csv"], "key.json is missing"),
        (["--claim", "2"], "between 0 and 1"),
    ],
)
def test_what_cannot_be_audited_says_why(run, arguments, message, capsys):
    assert command.main(["audit", *(str(run) if text == "RUN" else text for text in arguments)]) == 2
    assert message in capsys.readouterr().err
