"""SAE libraries on the benchmark's rows: `python sae_peers.py NAME DATA STEPS RUN LR OUT` (run by bench_sae.py). Needs nothing of ours.

Trains TopK (k 32 of 6,144 features) for RUN steps of a schedule of STEPS on DATA/train.npy with the library's own trainer, prints one JSON
line with the processor time of every step, and writes the weights to OUT (.npz). SAELens and dictionary-learning are driven through
their trainers; sparsify's only trains inside a language model, so that its step is written here from its parts: encode, decode, its
relative loss, its projection, its Adam.

`parity` in place of a name reads OUT with weights and rows, and adds dictionary-learning's codes, loss and gradients to it;
`roundtrip` reads our files with SAELens.
"""

import json
import os
import resource
import sys
import time
import types
from collections.abc import Callable, Iterator

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1" if not os.environ.get("CUDA_VISIBLE_DEVICES") else "0")

import numpy as np
import torch

BATCH, WIDTH, K = 4096, 6144, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def batches(data: str) -> Iterator[torch.Tensor]:
    """Endless batches, a new order in every epoch: the same for every library."""
    rows = np.load(f"{data}/train.npy", mmap_mode="r")
    rng, rest = np.random.default_rng(0), np.zeros(0, np.int64)
    while True:
        while len(rest) < BATCH:
            rest = np.concatenate([rest, rng.permutation(len(rows))])
        yield torch.from_numpy(rows[np.sort(rest[:BATCH])]).to(DEVICE)
        rest = rest[BATCH:]


def timed(step: Callable[[torch.Tensor], object], data: str, run: int) -> dict:
    """Seconds of every step (processor time; of a GPU: elapsed), and of one encode GEMM between the steps."""
    clock, seconds, gemm, source = time.process_time if DEVICE == "cpu" else time.perf_counter, [], [], batches(data)
    matrix = torch.randn(WIDTH, np.load(f"{data}/eval.npy", mmap_mode="r").shape[1], device=DEVICE)
    product = torch.empty(BATCH, WIDTH, device=DEVICE)
    for number in range(run):
        batch = next(source)
        for function, found in ((lambda b: torch.mm(b, matrix.T, out=product), gemm), (step, seconds)):
            if function is not step and number % max(1, run // 10):
                continue
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            start = clock()
            function(batch)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            found.append(clock() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "gemm": gemm, "peak_gib": round(peak, 2), "torch": torch.__version__}


def saelens(data: str, steps: int, run: int, lr: float) -> tuple[dict, dict]:
    """SAELens' TopK trainer; features count as dead after 50 steps."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    dim = np.load(f"{data}/eval.npy", mmap_mode="r").shape[1]
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=dim, d_sae=WIDTH, k=K, device=DEVICE))
    names = {"lr": lr, "lr_end": lr / 10, "lr_warm_up_steps": steps // 10, "lr_decay_steps": steps // 5, "dead_feature_window": 50}
    config = SAETrainerConfig(steps * BATCH, BATCH, device=DEVICE, **names)
    trainer = SAETrainer(config, sae, iter(()))

    def step(batch: torch.Tensor) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(batch)
        trainer.n_training_steps += 1

    result = timed(step, data, run) | {"version": sae_lens.__version__}
    norm = sae.W_dec.norm(dim=1)
    return result, {
        "encoder": sae.W_enc.T * norm[:, None],
        "bias": sae.b_enc * norm,
        "decoder": sae.W_dec / norm[:, None],
        "b_dec": sae.b_dec,
    }


def dictlearn(data: str, steps: int, run: int, lr: float) -> tuple[dict, dict]:
    """dictionary-learning's TopKTrainer."""
    trainer = _dictlearn().trainers.top_k.TopKTrainer(
        steps=steps, activation_dim=np.load(f"{data}/eval.npy", mmap_mode="r").shape[1], dict_size=WIDTH, k=K, layer=0, lm_name="", lr=lr,
        warmup_steps=steps // 10, decay_start=steps * 4 // 5, seed=0, device=DEVICE, threshold_start_step=steps // 2,
    )  # fmt: skip
    count = iter(range(run))
    result, sae = timed(lambda batch: trainer.update(next(count), batch), data, run), trainer.ae
    shift = {"encoder": sae.encoder.weight, "bias": sae.encoder.bias - sae.encoder.weight @ sae.b_dec}
    return result | {"version": _version("dictionary-learning")}, shift | {"decoder": sae.decoder.weight.T, "b_dec": sae.b_dec}


def _dictlearn():
    """The library; its import of nnsight serves language models only."""
    sys.modules.setdefault("nnsight", types.ModuleType("nnsight")).LanguageModel = None
    import dictionary_learning
    import dictionary_learning.trainers.top_k

    return dictionary_learning


def sparsify(data: str, steps: int, run: int, lr: float) -> tuple[dict, dict]:
    """sparsify's SparseCoder."""
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    torch.manual_seed(0)
    dim = np.load(f"{data}/eval.npy", mmap_mode="r").shape[1]
    sae = SparseCoder(dim, SparseCoderConfig(num_latents=WIDTH, k=K), device=DEVICE, dtype=torch.float32)
    sae.b_dec.data = next(batches(data)).mean(0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / (steps / 10), (steps - n) / (steps / 5)))
    silent = torch.zeros(WIDTH, dtype=torch.long, device=DEVICE)

    def step(batch: torch.Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(batch, dead_mask=silent > 10_000_000)
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        silent.add_(len(batch))
        silent[out.latent_indices.flatten()] = 0

    result = timed(step, data, run) | {"version": _version("eai-sparsify")}
    shift = {"encoder": sae.encoder.weight, "bias": sae.encoder.bias - sae.encoder.weight @ sae.b_dec}
    return result, shift | {"decoder": sae.W_dec, "b_dec": sae.b_dec}


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def parity(out: str) -> None:
    """dictionary-learning's codes, loss and gradients for the weights and rows in `out`, added to the file."""
    given = dict(np.load(out))
    width, dim = given["encoder"].shape
    sae = _dictlearn().trainers.top_k.AutoEncoderTopK(dim, width, K)
    own = (sae.encoder.weight, sae.encoder.bias, sae.decoder.weight, sae.b_dec)
    for parameter, name in zip(own, ("encoder", "bias", "decoder", "b_dec"), strict=True):
        value = torch.from_numpy(given[name])
        parameter.data = value.T.contiguous() if name == "decoder" else value
    rows = torch.from_numpy(given["rows"])
    reconstructed, codes = sae(rows, output_features=True)
    loss = (rows - reconstructed).pow(2).sum(-1).mean()
    loss.backward()
    gradients = {
        f"grad_{name}": parameter.grad.numpy() for parameter, name in zip(own, ("encoder", "bias", "decoder", "b_dec"), strict=True)
    }
    gradients["grad_decoder"] = gradients["grad_decoder"].T
    np.savez(out, **given, codes=codes.detach().numpy(), loss=loss.detach().numpy(), **gradients)


def roundtrip(folder: str, out: str) -> None:
    """SAELens' codes of the rows in `out` with our SAE in `folder`, added to `out`; and the SAE saved again by SAELens to folder/again."""
    from sae_lens import SAE

    sae, given = SAE.load_from_disk(folder), dict(np.load(out))
    with torch.no_grad():
        np.savez(out, **given, codes=sae.encode(torch.from_numpy(given["rows"])).numpy())
    sae.save_model(f"{folder}/again")


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    if name == "parity":
        parity(rest[0])
    elif name == "roundtrip":
        roundtrip(*rest)
    else:
        data, steps, run, lr, out = rest
        result, weights = {"saelens": saelens, "dictlearn": dictlearn, "sparsify": sparsify}[name](data, int(steps), int(run), float(lr))
        np.savez(out, **{key: value.detach().cpu().float().numpy() for key, value in weights.items()})
        print(json.dumps(result))
