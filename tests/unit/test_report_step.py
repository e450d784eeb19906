"""From a training step back to its images: the right ones, with their source, their losses and every annotation."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packed_world import landscapes, make_packed
from PIL import Image

from curation.shards import write_json, write_table
from k2model import flow
from k2model.data import Packed
from k2model.order import Order
from pipelines import report
from pipelines.report_step import annotations_of, seen, step_images, where, write

HOSTILE = "<script>document.title=1</script> \u202e sky"
RECIPE = """
from k2model.dit import NANO
from k2model.text import HashText
from k2model.vae import Pca
from pipelines.train_recipes import Phase, TrainRecipe

phase = Phase("32", "p32", 32, steps=20, lr=1e-3, warmup=1, decay=1, mu=0.5, num_samples=1)
mine = TrainRecipe("mine", NANO, HashText(), Pca(), (phase,), 4)
"""


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run folder of 14 images in two shards, packed, with two annotations and the records of a training run."""
    run = tmp_path / "run"
    pictures = [(uid, f"{caption} {HOSTILE}" if i == 5 else caption, pixels) for i, (uid, caption, pixels) in enumerate(world())]
    make_packed(run / "packed/p32", pictures, 32, 3)
    for shard in ("s0", "s1"):
        mine = [uid for uid, _, _ in pictures if uid.startswith(shard)]
        columns = {"uid": mine, "sharpness": [float(uid[-3:]) / 8 for uid in mine], "vector": [b"abcd"] * len(mine)}
        write_table(pa.table(columns), run / f"annotations/basics/{shard}.parquet", "x")
    some = [uid for uid, _, _ in pictures][::2]
    write_table(
        pa.table({"uid": some, "group": list(range(len(some))), "odd": [float("nan")] * len(some)}),
        run / "annotations/duplicates/all.parquet",
        "x",
    )
    training = run / "train/mine"
    fingerprint = Packed(run / "packed/p32").fingerprint
    write_json({"description": {"recipe": {"name": "mine"}, "packed": {"32": [fingerprint]}}}, training / "run.json")
    order, at, losses = Order([Packed(run / "packed/p32")], [1], 1, 0), 0, []
    with open(training / "metrics.jsonl", "w") as metrics:
        for i in range(9):
            losses += [0.5 + k + 10 * i for k in range(order.num_images(i))]
            row = {"step": i + 1, "phase": "32", "index": i, "loss": 1.5, "lr": 1e-3, "images": order.num_images(i)}
            metrics.write(json.dumps(row | {"losses_at": at}) + "\n")
            at = len(losses)
        metrics.write('{"step": 10, "pha')
    np.array(losses, "<f4").tofile(training / "losses.f32")
    (tmp_path / "my.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return run


def world() -> list:
    return landscapes(14, [(32, 32), (32, 48)])


def asked(capsys, run: Path, *arguments: str) -> tuple[int, list[dict], str]:
    """`k2 report --run RUN ...`: its code, its lines and what it complained of."""
    code = report.main(["--run", str(run), *arguments])
    said = capsys.readouterr()
    return code, [json.loads(line) for line in said.out.splitlines()], said.err


def test_the_images_of_a_step_are_those_that_its_global_batch_holds(run):
    packed = Packed(run / "packed/p32")
    order = Order([packed, packed], [1, 2], 3, seed=4)
    for index in (0, 7, 400):
        rows = step_images(order, index)
        batches = [packed.read(order.describe(group)) for group in order.batch(index)]
        assert [row["uid"] for row in rows] == [uid for batch in batches for uid in batch.uids]
        assert [row["caption"] for row in rows] == [caption for batch in batches for caption in batch.captions]
        for row in rows:
            found = pq.ParquetFile(f"{row['packed']}/{row['file']}").read_row_group(row["row_group"]).to_pylist()[row["row"]]
            assert found["uid"] == row["uid"] == f"{row['shard']}/{row['key']}" and found["image"] == row["image"]
            assert (found["bucket_height"], found["bucket_width"]) == row["bucket"]


def test_k2_report_step_writes_lines_a_page_and_a_sheet(run, capsys):
    code, lines, _ = asked(capsys, run, "--step", "5", "--recipe", "my.py:mine")
    expected = Packed(run / "packed/p32")
    order = Order([expected], [1], 1, 0)
    uids = [uid for group in order.batch(4) for uid in expected.read(order.describe(group)).uids]
    images, made = lines[:-1], lines[-1]
    assert code == 0 and [line["uid"] for line in images] == uids and made["images"] == len(uids)
    assert [line["loss"] for line in images] == [40.5 + k for k in range(len(uids))]
    assert [line["t"] for line in images] == pytest.approx(flow.draw(0, 4, uids, (16, 4, 4), 0.5).t.tolist(), abs=1e-4)
    for line in images:
        assert line["step"] == 5 and line["annotations"]["basics"] == {"sharpness": int(line["uid"][-3:]) / 8, "vector": "4 bytes"}
    page = Path(made["page"]).read_text()
    assert made["page"].endswith("run/train/mine/step-5.html")
    places = [page.index(f'alt="{uid}"') for uid in uids]
    assert places == sorted(places, reverse=True), "the highest loss comes first"
    for line in images:
        assert line["key"] in page and f"{line['annotations']['basics']['sharpness']:.6g}" in page
    sheet = np.asarray(Image.open(made["sheet"]).convert("RGB"))
    worst = dict(zip((uid for uid, _, _ in world()), (pixels for _, _, pixels in world()), strict=True))[uids[-1]]
    assert np.abs(sheet[8:168, 8:168].reshape(-1, 3).mean(0) - _contained(worst)).max() < 6, "the sheet begins with the highest loss"


def _contained(pixels: np.ndarray) -> np.ndarray:
    """Mean colour of a picture that is shown whole in a white square."""
    share = pixels.shape[0] / pixels.shape[1]
    return pixels.reshape(-1, 3).mean(0) * share + 255 * (1 - share)


def test_every_step_is_found_without_losses_too(run, capsys):
    kept = run / "train/mine/losses.f32"
    kept.write_bytes(kept.read_bytes()[:-4])
    for step in range(1, 10):
        code, lines, said = asked(capsys, run, "--step", str(step), "--recipe", "my.py:mine", "--training", "mine")
        losses = [line["loss"] for line in lines[:-1]]
        assert code == 0 and losses == ([None] * len(losses) if step == 9 else [0.5 + k + 10 * (step - 1) for k in range(len(losses))])
        assert ("losses.f32 has no losses of step 9" in said) == (step == 9)


def test_rows_of_a_run_that_kept_no_losses_are_found(run, capsys):
    metrics = run / "train/mine/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("losses_at", "other"))
    for step in (1, 5, 10):
        code, lines, _ = asked(capsys, run, "--step", str(step), "--recipe", "my.py:mine")
        assert code == 0 and {line["loss"] for line in lines[:-1]} == {None}
        assert "highest loss" not in Path(lines[-1]["page"]).read_text()


def test_an_epoch_of_steps_shows_every_image_once(run):
    order = where(str(run), run / "train/mine", "my.py:mine", 1)[1].order
    uids = [row["uid"] for i in range(len(order.sets[0])) for row in step_images(order, i)]
    assert sorted(uids) == sorted(uid for uid, _, _ in world())


def test_annotations_of_one_file_per_shard_and_of_one_file_for_all(run):
    order = where(str(run), run / "train/mine", "my.py:mine", 1)[1].order
    rows = [row for i in range(len(order.sets[0])) for row in step_images(order, i)]
    found = annotations_of(str(run), rows)
    for i, (uid, _, _) in enumerate(world()):
        assert found[uid]["basics"]["sharpness"] == int(uid[-3:]) / 8
        assert found[uid].get("duplicates") == ({"group": i // 2, "odd": "nan"} if i % 2 == 0 else None)


def test_hostile_captions_are_text_on_the_page(run, capsys):
    plan, span, _ = where(str(run), run / "train/mine", "my.py:mine", 1)
    rows = [row | {"loss": None} for i in range(len(span.order.sets[0])) for row in seen(step_images(span.order, i), plan, span.phase, 1)]
    assert write(str(run), run / "train/mine", {"step": 1, "phase": "32", "index": 0, "loss": 1.0}, rows) == 0
    capsys.readouterr()
    page = (run / "train/mine/step-1.html").read_text()
    assert "&lt;script&gt;document.title" in page and "<script" not in page and "\u202e" not in page


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_is_whole_in_a_browser(run, capsys, browser, width):
    assert asked(capsys, run, "--step", "5", "--recipe", "my.py:mine")[0] == 0
    page = browser.new_page(viewport={"width": width, "height": 740})
    asked_for, logged = [], []
    page.on("request", lambda request: asked_for.append(request.url) if not request.url.startswith("data:") else None)
    page.on("console", lambda message: logged.append(message.text))
    page.goto((run / "train/mine/step-5.html").as_uri())
    assert logged == [] and len(asked_for) == 1
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)") and page.evaluate("document.images.length") == 3
    page.locator("summary").first.click()
    assert page.locator("details dd").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.close()


def test_what_cannot_be_walked_back_says_why(run, capsys):
    mine = ("--recipe", "my.py:mine")
    for arguments, words in (
        (("--step", "11", *mine), "there is no step 11"),
        (("--step", "21", *mine), "has steps 1 to 20, not 21"),
        (("--step", "5"), "there is no recipe 'mine'"),
        (("--step", "5", *mine, "--training", "other"), "'other'"),
    ):
        code, lines, said = asked(capsys, run, *arguments)
        assert (code, lines) == (2, []) and words in said
    metrics = run / "train/mine/metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole.replace('"images": 3', '"images": 2'))
    assert "losses for 2 images, and its batch is of 3" in asked(capsys, run, "--step", "5", *mine)[2]
    metrics.write_text(whole)
    make_packed(run / "packed/p32", world()[:-1], 32, 3)
    code, lines, said = asked(capsys, run, "--step", "5", *mine)
    assert (code, lines) == (2, []) and "packed anew" in said
    (run / "train/second").mkdir()
    (run / "train/second/metrics.jsonl").write_text("")
    assert "mine, second" in asked(capsys, run, "--step", "5", *mine)[2]

    described = run / "train/mine/run.json"
    described.write_text(described.read_text().replace('"32"', '"64"'))
    assert "was trained without phase '32'" in asked(capsys, run, "--step", "5", *mine, "--training", "mine")[2]


def test_the_step_that_stopped_a_run_has_no_row_and_is_found(run, capsys):
    with open(run / "train/mine/losses.f32", "ab") as kept:
        kept.write(np.array([1, np.nan, 2], "<f4").tobytes())
    code, lines, _ = asked(capsys, run, "--step", "10", "--recipe", "my.py:mine")
    packed = Packed(run / "packed/p32")
    order = Order([packed], [1], 1, 0)
    uids = [uid for group in order.batch(9) for uid in packed.read(order.describe(group)).uids]
    assert code == 0 and [line["uid"] for line in lines[:-1]] == uids
    assert [line["loss"] for line in lines[:-1]] == [1, "nan", 2]
    page = Path(lines[-1]["page"]).read_text()
    assert page.index(f'alt="{uids[1]}"') < page.index(f'alt="{uids[2]}"'), "a loss that is no number comes first"
    assert '<span class="loss">nan</span>' in page and "images whose loss is not finite</span> 1" in page


def test_a_batch_of_2048_images_has_a_line_for_each_and_a_page_of_the_highest(tmp_path, capsys, monkeypatch):
    (picture,) = landscapes(1, [(32, 32)])
    packed = make_packed(tmp_path / "run/packed/p32", [(f"s/{i:04d}", picture[1], picture[2]) for i in range(2048)], 32, 32, 16)
    training = tmp_path / "run/train/large"
    write_json({"description": {"recipe": {"name": "large"}, "packed": {"32": [Packed(packed).fingerprint]}}}, training / "run.json")
    losses = np.random.default_rng(0).permutation(2048).astype("<f4")
    (training / "metrics.jsonl").write_text(json.dumps({"step": 1, "phase": "32", "images": 2048, "loss": 1.5, "losses_at": 0}) + "\n")
    losses.tofile(training / "losses.f32")
    (tmp_path / "my.py").write_text(RECIPE.replace("num_samples=1", "num_samples=1, num_groups=64"))
    monkeypatch.chdir(tmp_path)
    code, lines, _ = asked(capsys, tmp_path / "run", "--step", "1", "--recipe", "my.py:mine")
    assert code == 0 and [line["loss"] for line in lines[:-1]] == list(losses) and lines[-1]["shown"] == 128
    page = Path(lines[-1]["page"]).read_text()
    places = {uid: page.find(f'alt="{uid}"') for uid in (line["uid"] for line in lines[:-1])}
    by_loss = sorted((line["loss"], line["uid"]) for line in lines[:-1])[::-1]
    found = [places[uid] for _, uid in by_loss[:128]]
    assert found == sorted(found) and found[0] > 0 and {places[uid] for _, uid in by_loss[128:]} == {-1}
    assert "128 of 2048 are shown" in page and len(page) < 2_000_000
