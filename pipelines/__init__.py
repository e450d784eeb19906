"""The verbs of the `k2` command: arguments, Ray or torch.distributed, progress, exit codes."""
