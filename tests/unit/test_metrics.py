"""metrics.jsonl is cut where a run resumes, TensorBoard and wandb have every step once, and pictures are made of what rows hold."""

import importlib.util
import json

import numpy as np
import pytest
from PIL import Image

from curation import plots
from pipelines import train_plots
from pipelines.metrics import Metrics, cut, read_rows, scalars
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
                "validation": {"loss": 1.0, "by_t": list(rng.random(10))},
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
        cut(tmp_path / "metrics.jsonl", 3)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_maps_and_lists_of_a_row_become_named_numbers():
    found = dict(scalars({"loss": 1, "phase": "256", "mfu": None, "by_t": [None, 2.5], "norms": {"first": 3.0, "blocks 1-2": {"x": 4}}}))
    assert found == {"loss": 1.0, "by_t/1": 2.5, "norms/first": 3.0, "norms/blocks 1-2/x": 4.0}


@needs_tensorboard
def test_tensorboard_has_every_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.fromarray(np.full((6, 9, 3), 50, np.uint8)).save(tmp_path / "grid.png")
    with Metrics(tmp_path, 0, tensorboard=True) as metrics:
        for step in range(1, 8):
            metrics.write(row(step))
        metrics.picture("samples", 7, tmp_path / "grid.png")
    with Metrics(tmp_path, 4, tensorboard=True) as metrics:
        for step in range(5, 7):
            metrics.write(row(step, loss=float(step)))
        metrics.picture("samples", 6, tmp_path / "grid.png")
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    events = found.Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6] and [event.value for event in events[4:]] == [5, 6]
    assert {"grad_norms/first", "grad_norms/last", "loss"} == set(found.Tags()["scalars"]), "the cursor is no curve"
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
    dots = [line for line in axis.lines if line.get_marker() == "." and line.get_linestyle() == "None"]
    assert np.allclose(np.concatenate([line.get_ydata() for line in dots]), [one["loss"] for one in rows])
    assert {text.get_text() for text in axis.texts} == {"256 px", "512 px"}
    low, high = axis.get_ylim()
    assert low < min(one["loss"] for one in rows) and high < 1.1 * max(one["loss"] for one in rows)


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
