"""What docs/launch/ starts a training run with: the flags exist, the files are valid, and Ray Train runs it."""

import functools
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import tyro
import yaml
from torch.distributed.run import get_args_parser

from pipelines import cluster, survival
from pipelines.train import train
from pipelines.train_recipes import TRAIN

LAUNCH = Path(__file__).parents[2] / "docs" / "launch"
SCRIPTS = [LAUNCH / "torchrun.sh", LAUNCH / "train.sbatch"]
GIVEN = {"DATA": "/d", "OUT": "/o", "RECIPE": "k2"}


def filled(command: str) -> str:
    """The command with what the shell would put in."""
    command = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", command.replace("\\\n", " "))
    return re.sub(r"\$(\w+)", lambda name: GIVEN[name[1]], command)


def check_train(arguments: list[str]) -> None:
    given = tyro.cli(functools.wraps(train)(lambda **given: given), args=arguments)
    assert given["recipe"] in TRAIN and given["data"] and given["out"]


def check_torchrun(arguments: list[str]):
    """The options of torchrun as torchrun reads them."""
    parsed = get_args_parser().parse_args(arguments)
    assert parsed.module and parsed.training_script == "pipelines.train" and parsed.rdzv_backend == "c10d"
    assert parsed.max_restarts > 0 and parsed.shutdown_timeout >= 300, "the last checkpoint takes a while"
    check_train(parsed.training_script_args)
    return parsed


def test_the_elastic_line_is_one_that_torchrun_and_k2_train_read():
    text = (LAUNCH / "torchrun.sh").read_text()
    parsed = check_torchrun(shlex.split(filled(text[text.index("exec torchrun") :]))[2:])
    assert parsed.nnodes == "1:4" and {"SIGTERM", "SIGUSR1"} <= set(parsed.signals_to_handle.split(","))


def test_slurm_starts_ranks_and_queues_again_what_was_asked_to_end():
    text = (LAUNCH / "train.sbatch").read_text()
    (command,) = re.findall(r"exec k2 train (.*)'", text)
    check_train(shlex.split(filled(command)))
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", text, re.M))
    assert re.fullmatch(r"USR1@\d+", options["signal"]), "no B: the signal is for the ranks, not for the script"
    assert "requeue" in options and int(options["ntasks-per-node"]) == int(options["gpus-per-node"])
    assert {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(re.findall(r"\b([A-Z_]+)=", text))


@pytest.mark.parametrize(
    ("code", "restarts", "ends", "requeued"),
    [(0, 0, 0, 0), (2, 0, 2, 0), (survival.AGAIN, 3, 0, 1), (survival.HUNG, 0, 0, 1), (137, 0, 0, 1), (137, 50, 137, 0)],
)
def test_the_slurm_script_acts_on_the_exit_code(tmp_path, code, restarts, ends, requeued):
    """The script itself, with an srun and scontrol that only say what they were asked."""
    tools = {"srun": f"exit {code}", "scontrol": 'echo "$@" >> asked; echo node-0'}
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_RESTART_COUNT": str(restarts)}
    env = GIVEN | slurm | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", LAUNCH / "train.sbatch"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == ends, done.stderr
    assert (tmp_path / "asked").read_text().split("\n")[1:-1] == ["requeue 7"] * requeued


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_clean(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_kubernetes_gets_a_valid_job_whose_pods_find_each_other():
    service, job = yaml.safe_load_all((LAUNCH / "job.yaml").read_text())
    for part in (service, job):
        kubernetes_validate.validate(part, "1.31", strict=True)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    parsed = check_torchrun(container["args"])
    assert container["command"] == ["torchrun"], "torchrun is process 1 of its pod, so that SIGTERM comes to it"
    assert parsed.nnodes == str(spec["completions"]) == str(spec["parallelism"]) and spec["completionMode"] == "Indexed"
    assert parsed.nproc_per_node == container["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["terminationGracePeriodSeconds"] > parsed.shutdown_timeout
    assert parsed.rdzv_endpoint == f"{job['metadata']['name']}-0.{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def one_rank(folder: str) -> None:
    """What Ray Train runs: joins the others as under torchrun, and sums over them."""
    import torch

    from k2model import parallel

    world = parallel.start("cpu")
    total = parallel.reduce(torch.tensor(world.rank + 1.0), world)
    (Path(folder) / str(world.rank)).write_text(f"{world.size} {total.item()}")
    world.stop()


@pytest.mark.ray
def test_ray_train_starts_the_ranks_of_a_process_group(ray_cluster, tmp_path):
    pytest.importorskip("pandas", reason="ray[train] is not installed")
    ray_cluster.cloudpickle.register_pickle_by_value(__import__(__name__))
    cluster.ranks(one_rank, {"folder": str(tmp_path)}, 2, str(tmp_path / "ray"))
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["2 3.0", "2 3.0"]
