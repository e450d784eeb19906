"""RUN/run.json: what made a run folder, and the refusal of another description for it; RUN/failed_shards.parquet: what it lacks."""

import json
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.schema import FAILED_SHARDS
from curation.shards import describe, write_json, write_table

PACKAGES = (
    "k2-data-engine",
    "torch",
    "ray",
    "pyarrow",
    "duckdb",
    "pillow",
    "c2pa-python",
    "numpy",
    "open_clip_torch",
    "timm",
    "imagehash",
    "diffusers",
    "transformers",
)


def check_description(run_dir: str | Path, description: dict[str, Any], write: bool = True, may_grow: str | None = None) -> None:
    """Remember the description in run.json, or compare it with the one that is there.

    `may_grow` names a field whose entries may be added to (the stages of a run); entries that are there stay as they are.

    Raises:
        ValueError: the folder was made by another description; the text names the fields that differ.
    """
    description = json.loads(json.dumps(describe(description)))
    path = Path(run_dir) / "run.json"
    if path.exists():
        before = json.loads(path.read_text())["description"]
        if may_grow:
            description[may_grow] = before[may_grow] | description[may_grow]
            known = {name: description[may_grow][name] for name in before[may_grow]}
            if write and known == before[may_grow] and description | {may_grow: known} == before and description != before:
                _remember(path, description)
                return
        if before != description:
            found = differences(before, description)
            fields = "\n".join(f"  {name}: {old!r} -> {new!r}" for name, old, new in found[:12]) + ("\n  ..." if len(found) > 12 else "")
            raise ValueError(
                f"{run_dir} was made by another description:\n{fields}\nChoose a new --out, or delete the folder to start again."
            )
    elif write:
        _remember(path, description)


def _remember(path: Path, description: dict[str, Any]) -> None:
    write_json({"description": description, "versions": versions(), "commit": commit()}, path)


def differences(before: Any, after: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(field, old, new) of every leaf that differs between two JSON values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [d for key in keys for d in differences(before.get(key), after.get(key), f"{name}.{key}" if name else key)]
    return [] if before == after else [(name, before, after)]


class FailedShards:
    """The shards that failed all their tries, with the count over all runs and the last error: RUN/failed_shards.parquet.

    Nothing reads it to leave a shard out: the next run tries each of them again.
    """

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir) / "failed_shards.parquet"
        self.rows = {row["shard"]: row for row in pq.read_table(self.path).to_pylist()} if self.path.exists() else {}

    def __contains__(self, shard: str) -> bool:
        return shard in self.rows

    def add(self, shard: str, tries: int, error: str) -> None:
        """A shard has failed `tries` times more."""
        before = self.rows.get(shard, {"tries": 0})["tries"]
        self.rows[shard] = {"shard": shard, "tries": before + tries, "error": error}
        self._write()

    def remove(self, shard: str) -> None:
        """A shard is done after all."""
        if self.rows.pop(shard, None):
            self._write()

    def _write(self) -> None:
        rows = [self.rows[shard] for shard in sorted(self.rows)]
        write_table(pa.Table.from_pylist(rows, FAILED_SHARDS), self.path, "failed_shards")


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change values."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit of this code, with + when the tree is changed; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=here, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.strip() else "")
