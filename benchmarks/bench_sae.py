"""The sparse training step beside SAELens, dictionary-learning and sparsify, on rows whose true features are known.

    python ../shared/bench/sae_bench_data.py --out DATA          # 200,000 x 768, 4,096 true features, 24 of them in a row; 60 s
    python -m venv PEERS && PEERS/bin/pip install sae-lens dictionary-learning eai-sparsify
    OMP_NUM_THREADS=1 python benchmarks/bench_sae.py --data DATA --peers-python PEERS/bin/python

Every library trains 6,144 features with k 32 on batches of 4,096 in the same order, one thread, in its own process. Compared is the
processor time of a step (elapsed time on a GPU), and beside it the time of one product rows x encoder in the same process: where other
work shares the machine, the two move together. Quality is measured after all STEPS steps of the schedule only; a library that was
run for fewer is timed and not judged. `parity` compares codes, loss and gradients with dictionary-learning's TopK on trained weights.
Appends a JSON line per library and one summary to benchmarks/results/sae.jsonl.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import tyro
from sae_peers import BATCH, DEVICE, WIDTH, K, timed

from curation import sae, sae_fit, sae_scale, sae_search, sae_step
from curation.sae_train import Trainee, Training
from pipelines.run_folder import commit

RESULTS = Path(__file__).parent / "results" / "sae.jsonl"
PEERS = ("saelens", "dictlearn", "sparsify")


def ours(data: str, steps: int, run: int, lr: float, out: str, *changes: str) -> None:
    """Our job, in a process of its own; `changes` are fields of Training as name=json, or dense (no int8 products)."""
    if "dense" in changes:
        sae_search.int8_dot = lambda: False
    settings = {name: json.loads(value) for name, value in (change.split("=") for change in changes if "=" in change)}
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    sample = np.array(np.load(f"{data}/train.npy", mmap_mode="r")[:32768])
    scale = sae_scale.measure(sample)
    training = Training(WIDTH, steps * BATCH, K, batch_size=BATCH, learning_rate=lr, **settings)
    trainee = Trainee(training, scale.normalised(sample), DEVICE)
    losses = []
    result = timed(lambda batch: losses.append(float(trainee.step(scale.normalised(batch, DEVICE)))), data, run)
    held_out = np.array(np.load(f"{data}/train.npy", mmap_mode="r")[-8192:])
    fitted = sae_fit.finish(trainee, scale, held_out, {}, torch.float32)
    tensors = {
        "encoder": fitted.w_enc.T,
        "bias": fitted.b_enc,
        "decoder": fitted.w_dec,
        "b_dec": fitted.b_dec,
        "threshold": fitted.threshold,
    }
    np.savez(out, **{name: tensor.numpy() for name, tensor in tensors.items()})
    print(json.dumps(result | {"losses": losses[:: max(1, steps // 20)], "dead_share": float(trainee.dead.float().mean())}))


def quality(data: str, weights: dict[str, np.ndarray]) -> dict[str, float]:
    """Held-out figures with the library's own rule: the k largest of a row, or the thresholds."""
    rows, truth = (torch.from_numpy(np.load(f"{data}/{name}.npy")) for name in ("eval", "dict"))
    encoder, bias, decoder, b_dec = (torch.from_numpy(weights[name]) for name in ("encoder", "bias", "decoder", "b_dec"))
    error, fired, active = 0.0, torch.zeros(len(bias), dtype=torch.bool), 0
    for part in rows.split(2048):
        pre = part @ encoder.T + bias
        if "threshold" in weights:
            values = torch.where(pre > torch.from_numpy(weights["threshold"]), pre, 0.0)
        else:
            top = pre.topk(K, dim=1)
            values = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        error += float((values @ decoder + b_dec - part).double().square().sum())
        fired |= (values > 0).any(0)
        active += int((values > 0).sum())
    spread = float((rows - rows.mean(0)).double().square().sum())
    cosine = (truth @ torch.nn.functional.normalize(decoder, dim=1).T).amax(1)
    return {
        "explained_variance": round(1 - error / spread, 4),  # about the mean of the held-out rows
        "l0": round(active / len(rows), 2),
        "never_fires": round(float((~fired).float().mean()), 4),  # on the 16,384 held-out rows
        "true_features_found": round(float((cosine > 0.9).float().mean()), 4),
        "mean_max_cosine": round(float(cosine.mean()), 4),
    }


def parity(data: str, weights: dict[str, np.ndarray], peers_python: str) -> dict[str, float]:
    """Largest differences from dictionary-learning's TopK on 512 rows; gradients as shares of their largest entry."""
    rows = np.load(f"{data}/eval.npy", mmap_mode="r")[:512]
    own = sae_step.Weights(*(torch.from_numpy(weights[name]) for name in ("encoder", "bias", "decoder", "b_dec")))
    own = own._replace(bias=own.bias + own.encoder @ own.b_dec)  # theirs subtracts b_dec first
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/parity.npz"
        np.savez(path, rows=rows, **{name: tensor.numpy() for name, tensor in zip(own._fields, own, strict=True)})
        subprocess.run([peers_python, str(Path(__file__).parent / "sae_peers.py"), "parity", path], check=True)
        theirs = dict(np.load(path))
    rows = torch.from_numpy(np.array(rows))
    codes, _ = sae_search.topk(rows - own.b_dec, own.encoder, own.bias, K, None)
    step = sae_step.reconstruction(own, rows, codes, (WIDTH,), len(rows))
    found = {
        "codes": float(np.abs(sae_search.csr(codes, WIDTH).to_dense().numpy() - theirs["codes"]).max()),
        "loss": abs(float(step.loss) - float(theirs["loss"])) / float(theirs["loss"]),
    }
    for name, gradient in zip(own._fields, step.gradients, strict=True):
        reference = theirs[f"grad_{name}"]
        found[f"gradient_{name}"] = float(np.abs(gradient.numpy() - reference).max() / np.abs(reference).max())
    return {name: float(f"{value:.1e}") for name, value in found.items()}


def roundtrip(data: str, weights: dict[str, np.ndarray], peers_python: str) -> dict[str, float]:
    """Largest difference of the codes of 512 rows: ours on disk read by SAELens, and what SAELens then saves read by us."""
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    fitted = sae.Sae(tensors["encoder"].T, tensors["bias"], tensors["decoder"], tensors["b_dec"], tensors["threshold"], {"tower": "bench"})
    rows = np.array(np.load(f"{data}/eval.npy", mmap_mode="r")[:512])
    with tempfile.TemporaryDirectory() as folder:
        sae.save(fitted, Path(folder))
        np.savez(f"{folder}/codes.npz", rows=rows)
        script = str(Path(__file__).parent / "sae_peers.py")
        subprocess.run([peers_python, script, "roundtrip", folder, f"{folder}/codes.npz"], check=True)
        theirs = np.load(f"{folder}/codes.npz")["codes"]
        read = [sae.activations(sae.load(path), torch.from_numpy(rows)).numpy() for path in (folder, f"{folder}/again")]
    return {name: float(f"{np.abs(codes - theirs).max():.1e}") for name, codes in zip(("saelens_reads", "we_read"), read, strict=True)}


def main(
    data: str,
    peers_python: str | None = None,
    steps: int = 200,
    peer_steps: int = 30,
    judged: tuple[str, ...] = (),
    learning_rate: float = 4e-3,
    peer_learning_rate: float = 1e-3,
    only: tuple[str, ...] = (),
) -> None:
    """Run all jobs, one after the other.

    Args:
        data: What sae_bench_data.py wrote.
        peers_python: Python of an environment with the three libraries; without it only ours is run.
        steps: Of the schedule, and of the jobs that are judged.
        peer_steps: Of the peers that are only timed.
        judged: Peers that are trained in full, such as sparsify, the best of them; five more processor minutes.
        learning_rate: Of ours.
        peer_learning_rate: Of the peers.
        only: Names of the jobs to run; all when empty.
    """
    here, rows, weights = Path(__file__).parent, {}, {}
    jobs = [("ours", steps, ())]
    jobs += [(name, steps if name in judged else peer_steps, None) for name in PEERS if peers_python]
    jobs += [("ours topk", peer_steps, ("per_row=true",)), ("ours without int8", peer_steps, ("dense",))]
    jobs += [("ours matryoshka", peer_steps, ("prefixes=[0.0625,0.125,0.25,0.5625]",))]
    with tempfile.TemporaryDirectory() as folder:
        for name, run, changes in jobs:
            if only and name not in only:
                continue
            out, script = f"{folder}/{name}.npz", "bench_sae.py" if changes is not None else "sae_peers.py"
            lr = learning_rate if changes is not None else peer_learning_rate
            verb = "ours" if changes is not None else name
            python = sys.executable if changes is not None else peers_python
            command = [python, str(here / script), verb, data, str(steps), str(run), str(lr), out]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
            done = subprocess.run([*command, *(changes or ())], env=environment, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            seconds, gemm = result.pop("seconds"), float(np.median(result.pop("gemm")))
            low, middle, high = np.percentile(seconds[1:], [25, 50, 75])  # the first step makes caches and start values
            row = {"bench": "sae", "library": name, "device": DEVICE, "steps_timed": run, "steps_of_schedule": steps, "learning_rate": lr}
            row |= {"cpu_seconds_per_step": round(middle, 4), "iqr": round(high - low, 4), "encode_gemm_seconds": round(gemm, 4)}
            row |= {"encode_gemm_share": round(gemm / middle, 3), "gemms_per_step": round(middle / gemm, 2), **result}
            weights[name] = dict(np.load(out))
            if run == steps:
                row |= quality(data, weights[name])
            rows[name] = row | {"commit": commit(), "processor": platform.processor()}
            _append(rows[name])
    if "ours" not in rows:
        return
    summary = {"bench": "sae_summary", "device": DEVICE, "commit": commit(), "times_less_processor_time": {}, "times_less_in_gemms": {}}
    for name in rows:
        summary["times_less_processor_time"][name] = round(rows[name]["cpu_seconds_per_step"] / rows["ours"]["cpu_seconds_per_step"], 2)
        summary["times_less_in_gemms"][name] = round(rows[name]["gemms_per_step"] / rows["ours"]["gemms_per_step"], 2)
    if peers_python:
        summary["round_trip_with_saelens"] = roundtrip(data, weights["ours"], peers_python)
        summary["parity_with_dictionary_learning"] = parity(data, weights["ours"], peers_python)
    _append(summary)


def _append(row: dict) -> None:
    print(json.dumps(row), flush=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["ours"]:
        data, steps, run, lr, out, *changes = sys.argv[2:]
        ours(data, int(steps), int(run), float(lr), out, *changes)
    else:
        tyro.cli(main)
