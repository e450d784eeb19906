"""What docs/operating.md tells people to run: the Kubernetes manifest and the job recipe are valid."""

import functools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import tyro
import yaml

from pipelines import cli
from pipelines.annotate import annotate
from pipelines.recipes import ANNOTATE

DOCS = Path(__file__).parents[2] / "docs"

# Fields of KubeRay's Go types (ray-operator/apis/ray/v1/rayjob_types.go and raycluster_types.go); the operator refuses others.
FIELDS = {
    "RayJob": """activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector submitterConfig managedBy
        deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources entrypointNumCpus entrypointNumGpus
        ttlSecondsAfterFinished shutdownAfterJobFinishes suspend schedule""",
    "RayCluster": """headGroupSpec workerGroupSpecs rayVersion enableInTreeAutoscaling autoscalerOptions headServiceAnnotations suspend
        managedBy gcsFaultToleranceOptions""",
    "head": "serviceType headService enableIngress rayStartParams template",
    "workers": "groupName replicas minReplicas maxReplicas numOfHosts rayStartParams template scaleStrategy idleTimeoutSeconds",
}
KNOWN = {kind: set(names.split()) for kind, names in FIELDS.items()}


@pytest.fixture(scope="module")
def job() -> dict:
    return yaml.safe_load((DOCS / "kubernetes" / "rayjob.yaml").read_text())


def parsed(command: str) -> dict:
    """The arguments of a `k2 annotate ...` line as our command line reads them; nothing runs."""
    program, verb, *arguments = shlex.split(command)
    assert program == "k2" and verb in cli.VERBS and verb == "annotate", command
    return tyro.cli(functools.wraps(annotate)(lambda **given: given), args=arguments)


def test_the_ray_job_has_only_fields_that_kuberay_knows(job):
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) <= KNOWN["RayJob"] and set(spec["rayClusterSpec"]) <= KNOWN["RayCluster"]
    head, groups = spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"]
    assert set(head) <= KNOWN["head"] and {"rayStartParams", "template"} <= set(head)
    for group in groups:
        assert set(group) <= KNOWN["workers"] and {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"} <= set(group)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert all(isinstance(value, str) for part in (head, *groups) for value in part["rayStartParams"].values())
    assert len({group["groupName"] for group in groups}) == len(groups) == 2


def test_its_pods_are_valid_and_share_one_run_folder(job):
    cluster = job["spec"]["rayClusterSpec"]
    out = parsed(job["spec"]["entrypoint"])["out"]
    for number, part in enumerate((cluster["headGroupSpec"], *cluster["workerGroupSpecs"])):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"p{number}"}, "spec": part["template"]["spec"]}
        kubernetes_validate.validate(pod, "1.31", strict=True)
        (container,) = part["template"]["spec"]["containers"]
        (mount,) = container["volumeMounts"]
        assert out.startswith(mount["mountPath"]) and "persistentVolumeClaim" in part["template"]["spec"]["volumes"][0]


def test_a_field_that_does_not_exist_would_be_noticed(job):
    spec = json.loads(json.dumps(job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]))
    spec["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec}, "1.31", strict=True)


def test_every_command_of_the_manual_parses(job):
    commands = [job["spec"]["entrypoint"]]
    text = (DOCS / "operating.md").read_text()
    commands += [line.partition(" #")[0].strip() for line in re.findall(r"(?:^ {4}|-- )(k2 annotate .*)$", text, re.M)]
    assert len(commands) >= 3
    for command in commands:
        given = parsed(command.replace("...", "").replace("[", "").replace("]", ""))
        assert given["recipe"] in ANNOTATE or given["recipe"].startswith("mine.py:"), command


@pytest.mark.ray
def test_the_job_recipe_runs_on_a_cluster(ray_cluster, tiny_tars, tmp_path):
    """`ray job submit` as the manual has it, against the dashboard of the session's cluster."""
    (line,) = re.findall(r"^ {4}(ray job submit .*)$", (DOCS / "operating.md").read_text(), re.M)
    command = shlex.split(line)
    head, job = command[: command.index("--")], command[command.index("--") + 1 :]
    head[head.index("--address") + 1] = f"http://{ray_cluster._private.worker._global_node.webui_url}"
    job = [str(Path(sys.executable).with_name("k2")), "annotate", "--source", str(tiny_tars), "--out", str(tmp_path / "run")]
    job += ["--recipe", "basics", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", *head[1:], "--", *job], capture_output=True, text=True, cwd=DOCS.parent
    )
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    assert len(list((tmp_path / "run/annotations/basics").iterdir())) == 3
