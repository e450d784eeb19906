"""Checkpoints: a folder per step, whole or not at all, of safetensors and one JSON file. No pickles.

`checkpoints/<step>/model.safetensors` is in the layout of the released model, whatever number of processes wrote it.
`state.json` lists the other files with their sizes, and holds the step, the phase, the cursor and the description of the run.
Of many processes a tensor file is a folder of their shards, `optimizer/*.safetensors`; the model is put together. Any number of
processes reads both forms: `Checkpoint.like` reads of each tensor what this process holds.
"""

import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor

Files = Mapping[str, Mapping[str, Tensor]]


class Checkpoint(NamedTuple):
    step: int
    state: dict[str, Any]  # what was handed to `save`
    directory: Path

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The whole tensors of a tensor file, on the CPU."""
        path = self.directory / f"{name}.safetensors"
        return load_file(path) if path.exists() else self.like(name, {})

    def like(self, name: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a tensor file in the form of the parameters they belong to.

        Args:
            name: of the tensor file: model, optimizer.
            parameters: by name. A tensor that has the name of a sharded parameter, or that name, a dot and one word (as
                `optimizer_tensors` gives), and its shape, is sharded like it, on its device, and only this process's piece is read; no
                process waits for another. All others come whole and on the CPU.

        Returns:
            Every tensor of the file, for `load_state_dict` or `load_optimizer_tensors`.
        """
        place = self.directory / name
        reader = dcp.HuggingFaceStorageReader(str(self.directory))
        reader.fs = _Listing(sorted(place.glob("*.safetensors")) if place.is_dir() else [self.directory / f"{name}.safetensors"])
        found: dict[str, Tensor] = {}
        for key, stored in reader.read_metadata().state_dict_metadata.items():
            owner = parameters.get(key, parameters.get(key.rpartition(".")[0]))
            if isinstance(owner, DTensor) and owner.shape == stored.size:
                found[key] = torch.empty_like(owner, dtype=stored.properties.dtype, requires_grad=False)
            else:
                found[key] = torch.empty(stored.size, dtype=stored.properties.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it reads alone is what we want
            dcp.load(found, storage_reader=reader, no_dist=True)
        return {key: value.squeeze() if key in self.state.get("scalars", ()) else value for key, value in found.items()}


def save(directory: Path, step: int, files: Files, state: dict[str, Any]) -> Path:
    """Write `directory`/<step>: each of `files` as `<name>.safetensors`, and `state.json`. In one process, and at once; see `Saver`.

    It is written under a temporary name, flushed to the disk and renamed, so a killed process leaves no half of one.
    """
    temporary = _begin(directory, step)
    for name, tensors in files.items():
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, temporary / f"{name}.safetensors")
    return _finish(directory, step, state)


class Saver:
    """Writes the checkpoints of a run while training goes on, from one process or from many.

    At most one is being written: `save` waits for the one before. What goes wrong in the background is raised by the next `save`
    or `wait`, on every process.

    Args:
        directory: checkpoints/ of the run; the same folder for all processes.
        group: `World.writers`; None in one process.
        keep_last: so many of the newest checkpoints stay; None: all.
        keep_every: those whose step is a multiple of this stay too.
    """

    def __init__(
        self, directory: Path, group: dist.ProcessGroup | None = None, keep_last: int | None = None, keep_every: int | None = None
    ):
        if (keep_last is not None and keep_last < 1) or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep_last and keep_every must be 1 or more; got {keep_last} and {keep_every}")
        self.directory, self.group, self.keep_last, self.keep_every = directory, group, keep_last, keep_every
        # The copies stay from one save to the next: pinned memory is slow to get. (torch 2.11's DefaultStager forgets them, and can be
        # used only once.)
        self._stager = StateDictStager(pin_memory=torch.cuda.is_available())
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, step: int, files: Files, state: dict[str, Any], wait: bool = False) -> None:
        """Copy the tensors to the CPU, then write them in the background as `directory`/<step>; all processes must call it.

        Args:
            step: steps that are done.
            files: tensors by name, by name of their file; sharded ones as DTensors, others equal on all processes.
            state: for state.json; that of the first process counts.
            wait: return when the checkpoint is whole.

        Raises:
            OSError: this checkpoint could not be begun or, with `wait`, written; or the one before could not.
        """
        self.wait()
        cuda = torch.cuda.is_available()
        tensors_of = {name: {key: tensor.detach() for key, tensor in tensors.items()} for name, tensors in files.items()}
        staged = self._stager.stage(tensors_of, non_blocking=cuda)
        if cuda:
            torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._run, args=(step, staged, state), name=f"checkpoint {step}")
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            OSError: the last checkpoint could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise OSError(f"a checkpoint in {self.directory} was not written: {error}. Those before it are whole") from error

    def _run(self, step: int, files: Files, state: dict[str, Any]) -> None:
        try:
            self._write(step, files, state)
        except Exception as error:  # whatever it is, the training loop hears of it at its next save
            self._error = error

    def _write(self, step: int, files: Files, state: dict[str, Any]) -> None:
        first = self.group is None or dist.get_rank(self.group) == 0
        sharded = {name: tensors for name, tensors in files.items() if any(isinstance(value, DTensor) for value in tensors.values())}
        scalars = [key for tensors in sharded.values() for key, value in tensors.items() if not value.ndim]
        temporary = _temporary(self.directory, step)

        def begin() -> None:
            _begin(self.directory, step)
            for name in files.keys() - sharded.keys():
                save_file({key: value.contiguous() for key, value in files[name].items()}, temporary / f"{name}.safetensors")

        def end() -> None:
            for name in sharded:
                if not name.startswith("optimizer"):
                    _put_together(temporary, name, list(sharded[name]))
            _finish(self.directory, step, state | ({"scalars": scalars} if scalars else {}))
            prune(self.directory, self.keep_last, self.keep_every)

        self._together(begin if first else None)
        for name, tensors in sharded.items():
            # A slice of a number cannot be read, so numbers (AdamW's steps) are written as vectors of one.
            shaped = {key: value if value.ndim else value.reshape(1) for key, value in tensors.items()}
            writer = dcp.HuggingFaceStorageWriter(str(temporary / name), save_distributed=True)
            try:
                dcp.save(shaped, storage_writer=writer, process_group=self.group)
            except dcp.api.CheckpointException as error:  # the same on all processes, and no Exception in Python's sense
                said = "; ".join(f"process {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in error.failures.items())
                raise OSError(said) from error
        self._together(end if first else None)

    def _together(self, act: Callable[[], None] | None) -> None:
        """Act, where this process has something to do; an error of any process is raised by all."""
        error = None
        try:
            if act is not None:
                act()
        except Exception as caught:
            if self.group is None:
                raise
            error = f"{type(caught).__name__}: {caught}"
        if self.group is not None:
            errors = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(errors, error, self.group)
            if said := [f"process {rank}: {error}" for rank, error in enumerate(errors) if error]:
                raise OSError("; ".join(said))


def latest(directory: Path, group: dist.ProcessGroup | None = None) -> Checkpoint | None:
    """The whole checkpoint with the highest step; None without one. Torn ones (missing or short files) are passed over.

    With a `group` its first process looks, and all get its answer: the disks of others may lag behind.
    """
    found = next(iter(_whole(directory)), None) if group is None or dist.get_rank(group) == 0 else None
    if group is not None:
        answer = [found]
        dist.broadcast_object_list(answer, group=group, group_src=0)
        found = answer[0]
    return found


def prune(directory: Path, keep_last: int | None, keep_every: int | None = None) -> None:
    """Delete whole checkpoints but the `keep_last` newest, those at multiples of `keep_every` and those whose state says `keep`.
    None: delete nothing.

    A folder is renamed before it is emptied, so that what an interrupted deletion leaves is never taken for a checkpoint; the
    next save removes it.
    """
    for old in [] if keep_last is None else _whole(directory)[keep_last:]:
        if not old.state.get("keep") and (keep_every is None or old.step % keep_every):
            rest = _temporary(directory, old.step)
            os.replace(old.directory, rest)
            shutil.rmtree(rest)


def _whole(directory: Path) -> list[Checkpoint]:
    """The whole checkpoints, the newest first."""
    places = [place for place in directory.glob("[0-9]*") if place.name.isdigit()] if directory.is_dir() else []
    found = []
    for place in sorted(places, key=lambda place: int(place.name), reverse=True):
        try:
            state = json.loads((place / "state.json").read_text())
            whole = all((place / name).stat().st_size == size for name, size in state["files"].items())
        except (OSError, ValueError, KeyError):
            continue
        if whole:
            found.append(Checkpoint(state["step"], state, place))
    return found


def _temporary(directory: Path, step: int) -> Path:
    return directory / f".{step:06d}.tmp"


def _begin(directory: Path, step: int) -> Path:
    """An empty folder to write into; what killed processes left is removed."""
    directory.mkdir(parents=True, exist_ok=True)
    for torn in directory.glob(".*.tmp"):
        shutil.rmtree(torn)
    temporary = _temporary(directory, step)
    temporary.mkdir()
    return temporary


def _finish(directory: Path, step: int, state: dict[str, Any]) -> Path:
    """Flush what was written, describe it in state.json, and give it its name."""
    target, temporary = directory / f"{step:06d}", _temporary(directory, step)
    sizes = {}
    for path in sorted(temporary.rglob("*.safetensors")):
        flush(path)
        sizes[str(path.relative_to(temporary))] = path.stat().st_size
    path = temporary / "state.json"
    path.write_text(json.dumps({"step": step, "files": sizes, **state}, indent=1) + "\n")
    for changed in (path, *(folder for folder in temporary.iterdir() if folder.is_dir()), temporary):
        flush(changed)
    if target.exists():  # a torn one (`latest` would have found it otherwise), or one that is written again
        shutil.rmtree(target)
    os.replace(temporary, target)
    flush(directory)
    return target


def _put_together(place: Path, name: str, keys: list[str]) -> None:
    """Make `<name>.safetensors` of the shards in the folder `<name>`, which goes."""
    joined = place / f"{name}.joined"
    joined.mkdir()
    consolidate_safetensors_files(str(place / name), str(joined), dict.fromkeys(keys, 1), num_threads=4)
    (file,) = joined.glob("*.safetensors")
    os.replace(file, place / f"{name}.safetensors")
    shutil.rmtree(joined)
    shutil.rmtree(place / name)


class _Listing(FileSystem):
    """A file system in which a reader sees these files only."""

    def __init__(self, files: list[Path]):
        self.files = [str(file) for file in files]

    def ls(self, path: str | os.PathLike) -> list[str]:
        return self.files


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
