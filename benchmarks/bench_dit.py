"""A training step of the DiT beside diffusers' class: time and memory on the scaled-down K2 (CPU) or the 1B model (CUDA).

    python benchmarks/bench_dit.py [--rounds 3] [--dtype float32|bfloat16] [--compiled] [--device cpu|cuda]

Both have the same weights' shapes, the same inputs and a key mask where captions are padded; a step is forward, mean squared error and
backward. Cases: all captions full, lengths varied under a cap of 64, and the released proportions (cap 512, 40 to 200 valid tokens).
`floor` is the packed step's FLOPs (the last block's text counted, which ours leaves out) at the rate of one large product of the dtype.
Rounds are interleaved in one process; peak memory is of one step in a process of its own. Read ratios, not seconds.
On CUDA the image tokens are 256, 1,024 and 4,096 and MFU is over the measured rate of a product; that path has not been run by its authors.
Appends one JSON line to benchmarks/results/dit.jsonl.
"""

import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import diffusers
import torch
import tyro

from k2model.attention import by_segment, variable_length
from k2model.dit import K2_1B, Config, DiT
from k2model.flops import train_flops
from k2model.layouts import diffusers_config

SMALL = Config(width=512, num_blocks=8, num_heads=8, num_kv_heads=2, text_dim=256, text_taps=12, text_heads=4)
CASES = {"full": (64, 64, 64), "varied": (64, 10, 64), "released": (512, 40, 200)}  # cap, fewest and most valid tokens
BATCH = 8


def theirs(config: Config) -> torch.nn.Module:
    """diffusers' class with the sizes of `config`; text width is the fusion's, as it has no narrowing."""
    wide = dataclasses.replace(config, text_dim=config.fusion_dim, fusion_width=None)
    return diffusers.Krea2Transformer2DModel.from_config(diffusers_config(wide))


def captions(case: str) -> list[int]:
    """Valid tokens of each sample; the first has the most allowed, as a padded batch is as long as its cap anyway."""
    _, low, high = CASES[case]
    return torch.linspace(high, low, BATCH).int().tolist()


def step(who: str, case: str, config: Config, side: int, device: str, dtype: torch.dtype, compiled: bool) -> Callable[[], None]:
    """One training step of ours or theirs on latents of `side` x `side` tokens."""
    torch.manual_seed(0)
    cap = CASES[case][0]
    lengths = captions(case)
    model = (DiT(config) if who == "ours" else theirs(config)).to(device, dtype)
    mask = torch.arange(cap, device=device) < torch.tensor(lengths, device=device)[:, None]
    given = mask if min(lengths) < cap else None
    width = config.text_dim if who == "ours" else config.fusion_dim
    text = torch.randn(BATCH, cap, config.text_taps, width, device=device, dtype=dtype)
    t = torch.rand(BATCH, device=device, dtype=dtype)
    call = torch.compile(model, dynamic=False) if compiled else model
    if who == "ours":
        latents = torch.randn(BATCH, config.channels, 2 * side, 2 * side, device=device, dtype=dtype)
        kernel = variable_length if device == "cuda" and dtype == torch.bfloat16 else by_segment
        forward = lambda: call(latents, t, text, given, kernel)  # noqa: E731
    else:
        tokens = torch.randn(BATCH, side * side, config.token_dim, device=device, dtype=dtype)
        grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        positions = torch.cat([torch.zeros(cap, 3), torch.cat([torch.zeros(side * side, 1), grid], 1)]).to(device)
        forward = lambda: call(tokens, text, t, positions, given, return_dict=False)[0]  # noqa: E731

    def run() -> None:
        model.zero_grad()
        forward().float().square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product, the best of five."""
    size = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def highest_rss() -> int:
    """Bytes; of this process alone, where getrusage would begin at its parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak(arguments: list[str]) -> float:
    """MiB that a step adds, from a process of its own."""
    return float(subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True).stdout.split()[-1])


def main(
    rounds: int = 3,
    dtype: Literal["float32", "bfloat16"] = "float32",
    compiled: bool = False,
    device: Literal["cpu", "cuda"] = "cpu",
    only: str = "",
) -> None:
    """Measure and record.

    Args:
        rounds: Steps of each that are timed, interleaved; the median counts.
        dtype: Of weights and activations.
        compiled: Both under torch.compile.
        device: cuda takes the 1B model.
        only: For the process that measures memory, `ours:varied:16`: prints the peak of one step in MiB.
    """
    config, sides = (K2_1B, (16, 32, 64)) if device == "cuda" else (SMALL, (16,))
    precision = getattr(torch, dtype)
    if only:
        who, case, side = only.split(":")
        run = step(who, case, config, int(side), device, precision, compiled)
        before = torch.cuda.memory_allocated() if device == "cuda" else highest_rss()
        run()
        after = torch.cuda.max_memory_allocated() if device == "cuda" else highest_rss()
        print((after - before) / 2**20)
        return
    rows = []
    for side in sides:
        for case in CASES:
            runs = {who: step(who, case, config, side, device, precision, compiled) for who in ("ours", "diffusers")}
            for run in runs.values():
                run()
            wall, cpu = {who: [] for who in runs}, {who: [] for who in runs}
            for _ in range(rounds):
                for who, run in runs.items():
                    start, spent = time.perf_counter(), time.process_time()
                    run()
                    wall[who].append(time.perf_counter() - start)
                    cpu[who].append(time.process_time() - spent)
            del runs
            flops = sum(train_flops(config, length, side * side) for length in captions(case))
            row = {"case": case, "image_tokens": side * side, "floor_s": flops / rate(device, precision)}
            for who in wall:
                row |= {f"{who}_wall_s": statistics.median(wall[who]), f"{who}_cpu_s": statistics.median(cpu[who])}
                flags = ["--dtype", dtype, "--device", device, "--only", f"{who}:{case}:{side}"] + ["--compiled"] * compiled
                row[f"{who}_peak_mib"] = peak(flags)
            row["faster"] = row["diffusers_wall_s"] / row["ours_wall_s"]
            row["faster_cpu"] = row["diffusers_cpu_s"] / row["ours_cpu_s"]
            row["of_floor"] = row["floor_s"] / row["ours_wall_s"]  # on CUDA: the MFU
            print(
                "  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()), flush=True
            )
            rows.append(row)
    line = {
        "dtype": dtype,
        "compiled": compiled,
        "device": device,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "rows": rows,
    }
    with (Path(__file__).parent / "results" / "dit.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
