"""The verbs of the `k2` command: arguments, Ray or torch.distributed, progress, exit codes."""

import os

# OpenMP threads spin while they wait. Where other work shares the cores that turns a training step of 0.2 s into seconds.
# It is read when torch is loaded, so it stands here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
