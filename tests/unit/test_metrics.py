"""metrics.jsonl is cut where a run resumes, TensorBoard and wandb have every step once, and pictures are made of what rows hold."""

import importlib.util
import json

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PolyCollection
from PIL import Image

from curation import plots
from pipelines import train_plots
from pipelines.metrics import Metrics, cut, end_of, read_losses, read_rows, scalars
from pipelines.report import TRAINING_CHARTS

needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


def row(step, phase="256", **more):
    return {"step": step, "phase": phase, "loss": 2 / step, "grad_norms": {"first": 0.1, "last": 0.2}, "cursor": [0, step]} | more


def full_rows(count=240, change=160):
    """Rows of two phases with every key."""
    rng, rows = np.random.default_rng(0), []
    for i in range(1, count + 1):
        first = i <= change
        one = {
            "step": i,
            "phase": "256" if first else "512",
            "resolution": 256 if first else 512,
            "index": i,
            "loss": float(2 / i**0.2 + rng.gamma(1, 0.1)),
            "grad_norm": 1.0,
            "grad_norms": {"first": 0.3, "blocks 1-9": 0.1 + rng.random(), "last": 0.2},
            "images_per_s": 20.0,
            "images": 4,
            "data_wait": 0.01,
            "mfu": None,
            "memory_gib": 3.0,
            "align": -i / change if first else None,
            "validation": None,
        }
        if i % 10 == 0:
            one |= {
                "loss_by_t": [None, *rng.random(9)],
                "loss_by_bucket": {"256x256": 1.0, "320x208": 2.0},
                "loss_by_source": {"pretrain_256": 1.0},
                "validation": {
                    "loss": 1.0,
                    "standard_error": 0.125,
                    "by_t": list(rng.random(10)),
                    "standard_error_by_t": [0.05] * 10,
                    "images": 12,
                },
            }
        rows.append(one)
    return rows


def test_a_resumed_run_cuts_what_came_after_its_checkpoint(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        for step in range(1, 8):
            metrics.write(row(step))
        metrics.sync()
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 8, "lo')
    assert [one["step"] for one in read_rows(tmp_path / "metrics.jsonl")] == list(range(1, 8))
    with Metrics(tmp_path, 5) as metrics:
        metrics.write(row(6, loss=9.0))
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [one["step"] for one in rows] == [1, 2, 3, 4, 5, 6] and rows[-1]["loss"] == 9
    assert (tmp_path / "metrics.jsonl").read_text().startswith("\n".join(text.splitlines()[:5])), "kept rows keep their bytes"
    with Metrics(tmp_path, 0) as metrics:
        assert read_rows(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("text", ["", '{"step": 1}\n{"step": 2}\n', '{"step": 1}\n{"step": 3}\n{"step": 4}\n', '{"step": 1}\n{"st\n{}\n'])
def test_metrics_that_lack_a_step_of_the_checkpoint_are_not_touched(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match="does not hold the steps 1 to 3"):
        cut(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def written(metrics, step, count, times=0, lost=False):
    """A step of `count` images whose losses tell step and place, and of a validation of two images at so many times."""
    at = metrics.keep(np.arange(count, dtype=np.float32) + 1000 * step)
    more = {}
    if times:
        own = {"losses_at": metrics.keep(np.arange(2.0 * times).reshape(2, times) - 1000 * step), "images": 2, "by_t": [1.0] * times}
        more = {"validation": own}
    if not lost:
        metrics.write(row(step, images=count, losses_at=at, **more))


def test_losses_of_images_are_cut_where_their_rows_are_and_found_again(tmp_path):
    sizes = [3, 5, 2, 4, 3, 1]
    with Metrics(tmp_path, 0) as metrics:
        for step, count in enumerate(sizes, 1):
            written(metrics, step, count, times=3 if step in (2, 4) else 0)
        written(metrics, 7, 6, lost=True)  # killed before its row
        metrics.sync()
    whole = (tmp_path / "losses.f32").read_bytes()
    (tmp_path / "losses.f32").write_bytes(whole + b"ab")  # killed in the middle of a value
    for resumed in (6, 4, 2):
        with Metrics(tmp_path, resumed) as metrics:
            rows = read_rows(tmp_path / "metrics.jsonl")
            assert (tmp_path / "losses.f32").stat().st_size == 4 * end_of(rows[-1])
            assert whole.startswith((tmp_path / "losses.f32").read_bytes()), "what is kept keeps its bytes"
    with Metrics(tmp_path, 2) as metrics:
        for step, count in enumerate(sizes[2:], 3):
            written(metrics, step, count, times=3 if step in (2, 4) else 0)
    for step, (count, found) in enumerate(zip(sizes, read_rows(tmp_path / "metrics.jsonl"), strict=True), 1):
        assert list(read_losses(tmp_path, found["losses_at"], count)) == [1000 * step + i for i in range(count)]
        if "validation" in found:
            assert list(read_losses(tmp_path, found["validation"]["losses_at"], 6)) == [i - 1000 * step for i in range(6)]
    assert whole.startswith((tmp_path / "losses.f32").read_bytes()), "a run that resumes writes the same file"
    assert read_losses(tmp_path, end_of(found), 1) is None and read_losses(tmp_path / "other", 0, 1) is None
    with Metrics(tmp_path, 0) as metrics:
        assert (tmp_path / "losses.f32").stat().st_size == 0


def test_losses_that_are_lost_are_refused_before_anything_is_cut(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        for step in (1, 2, 3):
            written(metrics, step, 4)
    rows = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "losses.f32").write_bytes((tmp_path / "losses.f32").read_bytes()[:-1])
    with pytest.raises(ValueError, match="has 47 bytes and not the 48 of the steps 1 to 3"):
        cut(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == rows and (tmp_path / "losses.f32").stat().st_size == 47
    cut(tmp_path, 2)
    assert (tmp_path / "losses.f32").stat().st_size == 32


def test_a_run_whose_first_rows_have_no_losses_goes_on_with_them(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row(step, images=2)) + "\n" for step in (1, 2)))
    with Metrics(tmp_path, 2) as metrics:
        written(metrics, 3, 2)
    assert [one.get("losses_at") for one in read_rows(tmp_path / "metrics.jsonl")] == [None, None, 0]


def test_maps_and_lists_of_a_row_become_named_numbers():
    found = dict(scalars({"loss": 1, "phase": "256", "mfu": None, "by_t": [None, 2.5], "norms": {"first": 3.0, "blocks 1-2": {"x": 4}}}))
    assert found == {"loss": 1.0, "by_t/1": 2.5, "norms/first": 3.0, "norms/blocks 1-2/x": 4.0}


@needs_tensorboard
def test_tensorboard_has_every_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.fromarray(np.full((6, 9, 3), 50, np.uint8)).save(tmp_path / "grid.png")
    with Metrics(tmp_path, 0, tensorboard=True) as metrics:
        for step in range(1, 8):
            at = metrics.keep(np.ones(3))
            metrics.write(row(step, images=2, losses_at=at, validation={"losses_at": at + 2, "by_t": [1.0], "images": 1}))
        metrics.picture("samples", 7, tmp_path / "grid.png")
    with Metrics(tmp_path, 4, tensorboard=True) as metrics:
        for step in range(5, 7):
            metrics.write(row(step, loss=float(step)))
        metrics.picture("samples", 6, tmp_path / "grid.png")
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    events = found.Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6] and [event.value for event in events[4:]] == [5, 6]
    names = {"grad_norms/first", "grad_norms/last", "loss", "images", "validation/by_t/0", "validation/images"}
    assert names == set(found.Tags()["scalars"]), "the cursor is no curve, nor where losses begin"
    (picture,) = found.Images("samples")
    assert (picture.step, picture.height, picture.width) == (6, 6, 9)


@needs_wandb
def test_wandb_keeps_one_run_per_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    Image.fromarray(np.full((6, 9, 3), 50, np.uint8)).save(tmp_path / "grid.png")
    for start in (0, 2):
        with Metrics(tmp_path, start, wandb="k2-test", config={"recipe": "tiny"}) as metrics:
            for step in range(start + 1, start + 4):
                metrics.write(row(step))
            metrics.picture("samples", start + 3, tmp_path / "grid.png")
    runs = [place.name.rsplit("-", 1)[1] for place in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and len(set(runs)) == 1, "the parts of a resumed run have one id"


def test_a_missing_package_is_named_before_anything_is_cut(tmp_path, monkeypatch):
    with Metrics(tmp_path, 0) as metrics:
        metrics.write(row(1))
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    for asked, package in (({"wandb": "k2"}, "wandb"), ({"tensorboard": True}, "tensorboard")):
        with pytest.raises(ValueError, match=f"package {package}: pip install"):
            Metrics(tmp_path, 0, **asked)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_every_picture_is_made_of_full_rows(tmp_path):
    names = train_plots.write(full_rows(), tmp_path)
    assert names == ["loss", "loss_by_t", "validation_by_t", "loss_by_bucket", "grad_norms", "align", "speed"]
    assert all(Image.open(tmp_path / f"{name}.png").size[0] > 400 for name in names)


def test_rows_of_old_runs_and_of_a_first_step_make_the_pictures_they_can():
    old = [{"step": i, "phase": "256", "loss": 1 / i, "images": 4, "images_per_s": 2.0, "grad_norm": 1.0} for i in range(1, 31)]
    assert list(train_plots.figures(old)) == ["loss", "grad_norms", "speed"]
    assert list(train_plots.figures([{"step": 1, "phase": "256", "loss": 1.0}])) == ["loss"]
    assert train_plots.figures([]) == {}
    assert list(train_plots.figures(full_rows(1))) == ["loss", "grad_norms", "align", "speed"]
    assert "loss_by_t" in train_plots.figures(full_rows(10)), "one row of a map is a map"


def test_the_loss_picture_holds_the_numbers_of_the_rows():
    rows = full_rows()
    figure = train_plots.loss(rows)
    (axis,) = figure.axes
    rings = [line for line in axis.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in rings] == [list(range(10, 161, 10)), list(range(170, 241, 10))]
    assert all(value == 1.0 for line in rings for value in line.get_ydata())
    bands = [band.get_paths()[0].vertices for band in axis.collections if isinstance(band, PolyCollection)]
    checked = [path for path in bands if set(path[:, 1]) == {0.875, 1.125}]
    assert [(path[:, 0].min(), path[:, 0].max()) for path in checked] == [(10, 160), (170, 240)], "one standard error to each side"
    (bar,) = [bars for bars in train_plots.loss(full_rows(12)).axes[0].collections if isinstance(bars, LineCollection)]
    assert bar.get_segments()[0].tolist() == [[10, 0.875], [10, 1.125]], "a single check has a bar"
    dots = [line for line in axis.lines if line.get_marker() == "." and line.get_linestyle() == "None"]
    assert np.allclose(np.concatenate([line.get_ydata() for line in dots]), [one["loss"] for one in rows])
    assert {text.get_text() for text in axis.texts} == {"256 px", "512 px"}
    low, high = axis.get_ylim()
    assert low < min(one["loss"] for one in rows) and high < 1.1 * max(one["loss"] for one in rows)


def test_the_last_validation_by_time_has_a_band_of_its_standard_error_where_it_is_known():
    rows = full_rows()
    last = rows[-1]["validation"]["by_t"]
    (band,) = train_plots.validation_by_t(rows).axes[1].collections
    edges = band.get_paths()[0].vertices
    assert {round(abs(y - last[int(x * 10)]), 6) for x, y in edges} == {0.05}
    for one in rows:
        if one["validation"]:
            one["validation"] = {"loss": 1.0, "standard_error": None, "by_t": [1.0] * 10, "standard_error_by_t": None}  # of a single image
    figure = train_plots.loss(rows)
    assert "validation" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()], "no word of an error that is not known"
    assert all(not len(band.get_paths()) for axis in train_plots.validation_by_t(rows).axes for band in axis.collections)


def test_the_map_places_each_mean_at_its_steps_and_times():
    rows = [{"step": i, "phase": "256", "loss": 1.0} | ({"loss_by_t": [None, i, 2.0]} if i % 10 == 0 else {}) for i in range(1, 31)]
    mesh = train_plots.loss_by_t(rows).axes[0].collections[0]
    edges = mesh.get_coordinates()[0, :, 0]
    assert list(edges) == [0, 10, 20, 30], "a row is of the steps since the one before it"
    values = np.ma.filled(mesh.get_array(), np.nan).reshape(3, 3)
    assert np.isnan(values[0]).all() and list(values[1]) == [10, 20, 30] and list(values[2]) == [2, 2, 2]


def test_the_page_explains_every_picture():
    assert TRAINING_CHARTS.keys() == train_plots.PICTURES.keys()


def test_a_long_run_is_drawn_in_windows():
    steps = np.arange(100_000.0)
    values = np.where(steps % 1000 == 7, np.nan, np.sin(steps / 1e4))
    middle, low, median, high = plots.windows(steps, values, 60)
    assert len(middle) == 60 and (low <= median).all() and (median <= high).all() and np.isfinite(median).all()
    assert np.allclose(median, np.sin(middle / 1e4), atol=0.02)
    assert all(len(part) == 0 for part in plots.windows(np.arange(3.0), np.full(3, np.nan), 5))


def test_rows_are_json_lines(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        metrics.write(row(1, align=None))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["align"] is None
