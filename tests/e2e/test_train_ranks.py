"""One run on two processes, then four, then one, with killed ranks and a SIGTERM: the losses of the run that was never stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from e2e.test_train_phases import image_losses, recipe, rows, trained
from packed_world import landscapes, make_packed

from k2model import checkpoint
from pipelines import train as verb
from pipelines import train_recipes
from pipelines.report_step import report_step
from pipelines.survival import AGAIN, Signals

TESTS = Path(__file__).parents[1]

# A user's recipe file; the environment says what happens to which rank in which step. A step that sends a signal waits until it is there.
RECIPE = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
from e2e.test_train_ranks import plan
from pipelines import train_loop

whole = train_loop.train_step

def train_step(parts, plan, phase, batches, num_images, step, lr, stop=False):
    for event in filter(None, os.environ.get("EVENTS", "").split(",")):
        what, at, rank, attempt = event.split(":")
        here = (str(step), str(parts.world.rank), os.environ["TORCHELASTIC_RESTART_COUNT"])
        if (at, rank, attempt) == here and what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if (at, rank, attempt) == here and what == "term":
            os.kill(os.getppid(), signal.SIGTERM)  # torchrun, which tells all its processes
            while not stop:
                time.sleep(0.01)
                stop = train_loop.asked.by is not None
    return whole(parts, plan, phase, batches, num_images, step, lr, stop)

class Signals(train_loop.Signals):
    def __enter__(self):
        train_loop.asked = self
        return super().__enter__()

train_loop.train_step, train_loop.Signals = train_step, Signals
"""


def plan():
    """Global batches of four row groups; alignment is not in it, sharding is what is tested."""
    return recipe("ranks", both={"num_groups": 4}, hold_out=1, validate_every=4, keep_last=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    for size in (32, 48):
        make_packed(run / "packed" / f"p{size}", landscapes(30, [(size, size), (size, size - 16)], seed=size), size, 3)
    return run


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """The run of one process that was never stopped."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return trained(monkeypatch, data, tmp_path_factory.mktemp("straight"), plan())


def torchrun(data: Path, out: Path, processes: int, events: str = "", restarts: int = 0, more: str = "", options: tuple = ()) -> int:
    """The exit code of `torchrun ... -m pipelines.train`."""
    (data / "plan.py").write_text(RECIPE.format(tests=str(TESTS)) + more)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "pipelines.train"]
    command += ["--data", str(data), "--recipe", f"{data}/plan.py:plan", "--out", str(out), "--device", "cpu", "--threads", "1", *options]
    environment = os.environ | {"EVENTS": events, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(ended.stderr[-12000:])
    return ended.returncode


def shown_by(capsys, data: Path, out: Path, step: int) -> list[dict]:
    """The images that `k2 report --step` has lines of."""
    capsys.readouterr()
    assert report_step(str(data), step, str(out)) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()][:-1]


def check_losses(out: Path, straight: Path) -> None:
    """Every step of a run has the numbers of the straight one."""
    assert len(rows(out)) == len(rows(straight)) == 10
    for found, expected in zip(rows(out), rows(straight), strict=True):
        for key in ("loss", "grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5), (key, expected["step"])
        for key in ("index", "images", "tokens", "lr", "phase", "num_by_t", "num_by_bucket"):
            assert found[key] == expected[key], (key, expected["step"])
        if "validation" in expected:
            for key in ("loss", "by_t", "standard_error", "standard_error_by_t", "losses_at"):
                assert found["validation"][key] == pytest.approx(expected["validation"][key], rel=1e-5), (key, expected["step"])
        assert image_losses(out, found) == pytest.approx(image_losses(straight, expected), rel=1e-4), "each at its image's place"
    each, expected = (np.fromfile(place / "losses.f32", "<f4") for place in (out, straight))
    assert each == pytest.approx(expected, rel=1e-4), "those of the images held out too"


def test_a_run_moves_from_two_processes_to_four_to_one_and_has_the_losses_of_one_process(data, straight, tmp_path, monkeypatch, capsys):
    out = tmp_path / "moved"
    # Rank 1 dies before its fourth step; torchrun starts both again from the checkpoint of step 2, and is itself told to end.
    assert torchrun(data, out, 2, "kill:3:1:0,term:4:0:1", restarts=1) != 0
    stopped = checkpoint.latest(out / "checkpoints")
    assert stopped.step == 5, "the step in which SIGTERM came was finished, and its checkpoint written"
    assert torchrun(data, out, 4, "kill:7:3:0") != 0
    assert checkpoint.latest(out / "checkpoints").step == 6
    trained(monkeypatch, data, out, plan())
    check_losses(out, straight)
    shown = shown_by(capsys, data, out, 4)
    assert [line["uid"] for line in shown] == [line["uid"] for line in shown_by(capsys, data, straight, 4)]
    assert [line["loss"] for line in shown] == pytest.approx(list(image_losses(straight, rows(straight)[3])), rel=1e-4)
    state = json.loads((out / "checkpoints/000010/state.json").read_text())
    assert (state["cursor"], state["phase"]) == (4, "512")


def test_two_replicas_of_two_have_the_losses_of_one_process_and_go_on_in_any_layout(data, straight, tmp_path, monkeypatch):
    out, replicas = tmp_path / "replicas", ("--fsdp", "2", "--max-rows", "2")  # a row group of three in two micro-batches
    assert torchrun(data, out, 4, "kill:5:3:0", options=replicas) != 0
    assert checkpoint.latest(out / "checkpoints").step in (2, 4), "the second save waited for the first"
    assert torchrun(data, out, 2, "kill:6:1:0") != 0
    assert checkpoint.latest(out / "checkpoints").step == 6, "the end of a phase waits for its checkpoint"
    assert torchrun(data, out, 4, "kill:9:0:0", options=replicas) != 0
    assert len(rows(out)) >= 8
    trained(monkeypatch, data, out, plan())
    check_losses(out, straight)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_weights_change(data, tmp_path, monkeypatch, capsys):
    breaks = (
        "\nfrom pipelines import train_step as module\nwhole_loss = module.flow.loss\n"
        "def loss(velocity, clean, noise):\n"
        "    each = whole_loss(velocity, clean, noise)\n"
        "    loss.calls += 1\n"
        "    return each * float('nan') if loss.calls == 5 and os.environ['RANK'] == '1' else each\n"
        "loss.calls = 0\nmodule.flow.loss = loss\n"
    )
    assert torchrun(data, tmp_path, 2, more=breaks) == 1
    assert [row["step"] for row in rows(tmp_path)] == [1, 2], "two parts a step: the fifth is in step 3"
    assert checkpoint.latest(tmp_path / "checkpoints").step == 2
    monkeypatch.setitem(train_recipes.TRAIN, "ranks", plan)
    lost = [line["loss"] for line in shown_by(capsys, data, tmp_path, 3)]
    assert lost[3:6] == ["nan"] * 3 and all(loss > 0 for loss in lost[:3] + lost[6:]), "rank 1 had the second row group"


def test_more_processes_than_row_groups_that_do_not_fit_are_refused_in_one_line(data, tmp_path):
    assert torchrun(data, tmp_path, 3) != 0
    assert not (tmp_path / "run.json").exists()


def test_being_told_to_end_is_an_exit_code_of_its_own(data, tmp_path, monkeypatch):
    monkeypatch.setitem(train_recipes.TRAIN, "ranks", plan)
    whole = Signals.__enter__

    def asked(self):
        self.by = "SIGTERM"
        return whole(self)

    monkeypatch.setattr(Signals, "__enter__", asked)
    assert verb.train(str(data), "ranks", str(tmp_path), "cpu", threads=1) == AGAIN
    assert checkpoint.latest(tmp_path / "checkpoints").step == 1


@pytest.mark.ray
def test_ray_train_starts_the_same_run_on_two_workers(data, straight, tmp_path, ray_cluster):
    (data / "ray.py").write_text(f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nfrom e2e.test_train_ranks import plan\n")
    given = {"recipe": f"{data}/ray.py:plan", "out": str(tmp_path / "ray"), "device": "cpu", "threads": 1, "ray": "auto", "workers": 2}
    given |= {"fsdp": 1}  # a replica on each
    assert verb.train(str(data), **given) == 0
    for found, expected in zip(rows(tmp_path / "ray"), rows(straight), strict=True):
        assert (found["step"], found["tokens"]) == (expected["step"], expected["tokens"])
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
