"""Decode ahead of the step: the rows that one rank reads of each global batch, in order, from a pool of threads.

`order.share` says which rows make global batch i, so the loader has no position but i: it starts at any i, and nothing before i
is read. Threads and not processes, for libjpeg-turbo and Arrow work without Python's lock, and pixels need not be copied from
one process to another (benchmarks/results/loader.jsonl).
"""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from k2model.order import Group, Order, Part

READERS = 4  # threads that wait for disk or network, beside those that decode
TASK_PIXELS = 2**19  # of one task of a decoder: 8 images of 256 px, some milliseconds


class Loaded(NamedTuple):
    """A part (order.Part) with its data: rows of one row group, so images of one size.

    Rows from `num_valid` on repeat others, so that every rank has the same shapes; they must not count.
    """

    images: Tensor | None  # uint8 (b, 3, H, W); None where latents are read
    latents: Tensor | None  # float16 (b, 16, H/8, W/8)
    captions: list[list[str]]  # all captions of each image, that of schema.PACKED's `caption` first: captions.choose takes one
    uids: list[str]
    num_valid: int
    bucket: tuple[int, int]  # height and width of the images in pixels
    group: Group  # source: which packed set; epoch and number of the row group there
    places: list[int]  # of the valid rows among the images of the global batch (order.Part)


class Loader:
    """An iterator of (parts, i): what a rank reads of global batch i, for i = start, start + 1, ...; endless without `stop`.

    At most `ahead` global batches beyond the one that was handed out are held or being made. An error (an image that does not
    decode, a file that is gone) is raised where its global batch would have come, with file, row group and row in the text; the
    loader is closed then. `waited` is the seconds that the consumer has waited for data so far.

    Use it in a `with` statement, or call `close`, which stops the threads; what is in their hands is finished first.

    Args:
        order: of the phase.
        rank: from 0.
        world: number of data-parallel ranks.
        start: the first global batch: the cursor of a checkpoint.
        ahead: global batches to work ahead, 1 or more.
        threads: that decode, 1 or more. What is read does not depend on it.
        latents: read latents in place of images; no image is decoded.
        max_rows: most images in a part, as in `order.share`.
        stop: the global batch before which it ends, where the phase does: nothing is decoded for nothing.

    Raises:
        ValueError: a number is out of range, or `world` does not fit the order.
    """

    def __init__(
        self,
        order: Order,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        ahead: int = 2,
        threads: int = 4,
        latents: bool = False,
        max_rows: int | None = None,
        stop: int | None = None,
    ):
        if start < 0 or ahead < 1 or threads < 1 or not 0 <= rank < world:
            raise ValueError(
                f"start must be 0 or more, ahead and threads 1 or more, rank below world; got start {start}, ahead {ahead}, "
                f"threads {threads}, rank {rank}, world {world}"
            )
        self.waited = 0.0
        self._order, self._rank, self._world, self._ahead = order, rank, world, ahead
        self._latents, self._max_rows = latents, max_rows
        self._next, self._stop = start, stop  # the next global batch to begin with, and where to end
        self._begun: deque[tuple[int, list[Future[list[_Making]]]]] = deque()
        self._readers = ThreadPoolExecutor(READERS, "k2-read")
        self._decoders = ThreadPoolExecutor(threads, "k2-decode")
        try:
            self._begin()  # a world size that does not fit is refused here, and the first batch is under way
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[list[Loaded], int]:
        if not self._begun:
            self.close()
            raise StopIteration
        clock = time.perf_counter()
        try:
            i, reads = self._begun.popleft()
            for _ in range(self._ahead - len(self._begun)):
                self._begin()
            made = [making.finish() for read in reads for making in read.result()]
            self.waited += time.perf_counter() - clock
            return made, i
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the threads. Iterating ends."""
        self._begun.clear()
        for pool in (self._readers, self._decoders):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (self._readers, self._decoders):
            pool.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _begin(self) -> None:
        if self._stop is not None and self._next >= self._stop:
            return
        parts = self._order.share(self._next, self._rank, self._world, self._max_rows)
        # Parts of one row group follow each other: it is read once. Pixels are allocated here and not in the threads: memory that the
        # consumer gave back is used again, where a thread's own heap would ask the kernel for fresh pages.
        reads = [
            self._readers.submit(self._read, mine, [self._pixels(part) for part in mine])
            for mine in (list(same) for _, same in groupby(parts, lambda part: part.group))
        ]
        self._begun.append((self._next, reads))
        self._next += 1

    def _pixels(self, part: Part) -> np.ndarray | None:
        group = self._order.describe(part.group)
        return None if self._latents else np.empty((len(part.rows), group["bucket_height"], group["bucket_width"], 3), np.uint8)

    def _read(self, parts: list[Part], pixels_of: list[np.ndarray | None]) -> list["_Making"]:
        """Read the rows of one row group and give its images to the decoders."""
        packed, group = self._order.sets[parts[0].group.source], self._order.describe(parts[0].group)
        try:
            names = ["uid", "caption", "other_captions"]
            table = packed.table(group, names if self._latents else [*names, "image"])
            latents = packed.latents(group) if self._latents else None
        except Exception as error:
            raise ValueError(f"{packed.place(group)} cannot be read: {type(error).__name__}: {error}") from error
        uids, first, others = (table[name].to_pylist() for name in names)
        texts = [[[caption, *more] for caption, more in zip(first, others, strict=True)], uids]
        found = []
        for part, pixels in zip(parts, pixels_of, strict=True):
            columns = [[values[row] for row in part.rows] for values in texts]
            bucket = (group["bucket_height"], group["bucket_width"])
            loaded = Loaded(None, None, *columns, part.num_valid, bucket, part.group, part.places)
            if latents is not None:
                whole = part.rows == list(range(len(latents)))  # then nothing need be copied
                mine = latents if whole else latents[part.rows]
                found.append(_Making(loaded._replace(latents=mine), None, part, []))
                continue
            count = max(1, part.num_valid)  # the rest are repeats
            size = max(1, TASK_PIXELS // (bucket[0] * bucket[1]))
            slices = [slice(first, min(first + size, count)) for first in range(0, count, size)]
            tasks = [self._decoders.submit(packed.decode, group, table, part.rows[some], pixels[some]) for some in slices]
            found.append(_Making(loaded, pixels, part, tasks))
        return found


class _Making(NamedTuple):
    """A part whose images are being decoded."""

    loaded: Loaded
    pixels: np.ndarray | None  # uint8 (b, H, W, 3)
    part: Part
    tasks: list[Future[None]]

    def finish(self) -> Loaded:
        """The part when its images are there."""
        for task in self.tasks:
            task.result()
        if self.pixels is None:
            return self.loaded
        for place in range(max(1, self.part.num_valid), len(self.part.rows)):
            self.pixels[place] = self.pixels[self.part.rows.index(self.part.rows[place])]
        return self.loaded._replace(images=torch.from_numpy(self.pixels).permute(0, 3, 1, 2))
