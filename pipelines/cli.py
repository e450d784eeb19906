"""The console script `k2`: finds the verb, and turns errors into exit codes.

Exit codes: 0 done, 1 some items failed (run the same command again), 2 wrong arguments or settings.
"""

import importlib
import logging
import sys
from collections.abc import Callable, Sequence

import tyro

from curation.printable import printable

VERBS = {
    "demo": "the whole way on a small set of images, then report.html; works offline",
    "annotate": "stages over shards: facts about every image, as Parquet",
    "dedup": "duplicate groups (exact, perceptual, semantic) and concepts, as annotations",
    "filter": "a policy over the annotations: selection and funnel",
    "pack": "a selection as training shards: crop, resize, bucket, shuffle",
    "train": "the curriculum on packed shards; again to resume",
    "sample": "pictures of prompts from a checkpoint, with a contact sheet",
    "convert": "a checkpoint to the official, diffusers or ComfyUI FP8 layout, streamed",
    "sae": "fit, evaluate and tag the sparse autoencoder of the artifacts stage; its atlas and sign-off",
    "synthetic": "fit, evaluate and ask the detector of AI-generated images; audit what it leaves",
    "plan": "what N images cost: hours, storage, time, money, from measured rates",
    "report": "one HTML page of a run folder",
}


def call(function: Callable[..., int | None] | dict[str, Callable[..., int | None]], argv: Sequence[str] | None, prog: str) -> int:
    """Parse `argv` for `function` (or for the subcommands of a dict) with tyro, run it, and return the exit code.

    A ValueError or FileNotFoundError is the user's setting: its text goes to stderr and the code is 2.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if isinstance(function, dict):
            code = tyro.extras.subcommand_cli_from_dict(function, args=argv, prog=prog)
        else:
            code = tyro.cli(function, args=argv, prog=prog)
    except (ValueError, FileNotFoundError) as error:
        print(printable(f"{prog}: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return int(code or 0)


def main(argv: Sequence[str] | None = None) -> int:
    """`k2 VERB ...`: hand the rest of the arguments to pipelines.VERB."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: k2 VERB [arguments]      (k2 VERB --help for the arguments)\n")
        print("\n".join(f"  {verb:<10} {what}" for verb, what in VERBS.items()))
        return 0 if argv else 2
    if argv[0] not in VERBS:
        print(f"k2: there is no verb {argv[0]!r}; choose from {', '.join(VERBS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"pipelines.{argv[0]}")  # only the verb's own imports: `k2 filter` never loads torch
    return module.main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
