"""Named descriptions for the verbs. A user's own file works too: `--recipe my.py:name`.

torch is imported only when a recipe that needs it is built, so that `k2 filter` starts at once.
"""

import importlib.util
import logging
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pipelines.cluster import USER_MODULE

log = logging.getLogger(__name__)


def find(name: str, recipes: dict[str, Callable[[], Any]]) -> Any:
    """Build the recipe called `name`, or `my.py:name` from a user's file (a value, or a function without arguments).

    Raises:
        ValueError: no such recipe; the text lists the names.
    """
    if ":" in name:
        path, _, attribute = name.rpartition(":")
        if not Path(path).is_file():
            raise ValueError(f"--recipe {name!r}: there is no file {path!r}")
        spec = importlib.util.spec_from_file_location(USER_MODULE, path)
        module = sys.modules[USER_MODULE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, attribute):
            raise ValueError(f"--recipe {name!r}: {path} has no {attribute!r}")
        value = getattr(module, attribute)
        return value() if callable(value) else value
    if name not in recipes:
        near = get_close_matches(name, recipes, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no recipe {name!r}; {hint}choose from {', '.join(recipes)}, or give a file as my.py:name")
    return recipes[name]()


# --- annotation: a recipe is a tuple of stages ---


def basics_only() -> tuple:
    """Facts that need no model."""
    from curation.stages.basics import Basics
    from curation.stages.provenance import Provenance

    return (Basics(), Provenance())


def offline() -> tuple:
    """EfficientNet-Lite2 and the compact statistics: weights inside installed packages, no hub."""
    from curation.stages.artifacts import Artifacts
    from curation.stages.basics import Basics
    from curation.stages.defects import Defects
    from curation.stages.embedding import Embedding
    from curation.stages.provenance import Provenance
    from curation.stages.synthetic import Synthetic
    from curation.stages.text_density import TextDensity
    from curation.towers import Compact, EffNet

    return (Basics(), Defects(), TextDensity(), Provenance(), Embedding(EffNet()), Embedding(Compact()), Synthetic(), Artifacts())


def siglip() -> tuple:
    """SigLIP-2 and the compact tower, whose pixels and the file's own words are what the detector then sees; artifacts are those of
    compact's SAE. The semantic branch and an SAE of a SigLIP-2 tower are the user's own: `k2 synthetic fit --towers compact siglip`,
    `k2 sae fit --tower siglip`, then a recipe file that names them."""
    from curation.stages.artifacts import Artifacts
    from curation.stages.basics import Basics
    from curation.stages.embedding import Embedding
    from curation.stages.provenance import Provenance
    from curation.stages.synthetic import Synthetic
    from curation.towers import Compact, Siglip

    return (Basics(), Provenance(), Embedding(Siglip()), Embedding(Compact()), Synthetic(towers=(Compact(),)), Artifacts())


def default() -> tuple:
    """SigLIP-2 where its weights are at hand, beside the offline tower that the shipped models were fitted on."""
    from curation.stages.embedding import Embedding
    from curation.towers import Siglip, available

    stages = offline()
    if available(Siglip()):
        return (stages[0], Embedding(Siglip()), *stages[1:])
    log.info("SigLIP-2 weights are not in the hub cache: using effnet and compact instead (docs/operating.md says how to add them)")
    return stages


ANNOTATE = {"default": default, "offline": offline, "siglip": siglip, "basics": basics_only}
