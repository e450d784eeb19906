"""One loader on the benchmark's samples: `python loader_peers.py NAME KIND DATA WORKERS DECODER` (run by bench_loader.py).

Prints one JSON line: processor seconds (workers too) and wall seconds of an epoch, the order in which samples came, and the
seconds to the first batch from the middle of an epoch. `write NAME KIND DATA` writes the samples in the peer's own format.
KIND is jpeg or latent. DECODER is own (what the package decodes with by itself) or simplejpeg. Peers need nothing of ours.
"""

import io
import json
import os
import resource
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

BATCH, SEED, SHAPE = 32, 1, (16, 32, 32)
PER_SHARD = 500  # samples of a tar


def samples(kind: str, data: Path) -> Iterator[tuple[int, str, bytes]]:
    """(number, caption, bytes) of every sample in the order of the source."""
    captions = json.loads((data / "captions.json").read_text())
    for i, caption in enumerate(captions):
        yield i, caption, (data / "source" / f"{i:06d}.{'jpg' if kind == 'jpeg' else 'bin'}").read_bytes()


def pixels(decoder: str, data: bytes, own: str) -> torch.Tensor:
    """Bytes to what a batch is made of: uint8 (H, W, 3), or float16 latents."""
    if decoder == "none":
        return torch.from_numpy(np.frombuffer(data, "<f2").reshape(SHAPE).copy())
    if decoder == "simplejpeg":
        import simplejpeg

        return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB"))
    if own == "torchvision":
        from torchvision.io import decode_jpeg

        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0)
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def stack(rows: list[tuple[int, str, torch.Tensor]]) -> tuple[list[int], list[str], torch.Tensor]:
    """Rows as a batch."""
    numbers, captions, values = zip(*rows, strict=True)
    return list(map(int, numbers)), list(captions), torch.stack(values)


class Webdataset:
    """Tars of 500; shards in a random order, and a buffer of 1000 samples: what its documentation advises."""

    def __init__(self, kind: str, data: Path, workers: int, decoder: str):
        self.place, self.workers = data / "webdataset", workers
        self.decoder = "none" if kind == "latent" else decoder

    def write(self, kind: str, data: Path) -> None:
        self.place.mkdir()
        archive = None
        for i, caption, value in samples(kind, data):
            if i % PER_SHARD == 0:
                archive = tarfile.open(self.place / f"{i // PER_SHARD:05d}.tar", "w")  # noqa: SIM115
            for name, content in ((f"{i:06d}.bin", value), (f"{i:06d}.txt", caption.encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
            if i % PER_SHARD == PER_SHARD - 1:
                archive.close()
        archive.close()

    def epoch(self, skip: int = 0) -> Iterable:
        import webdataset

        urls = sorted(str(path) for path in self.place.glob("*.tar"))

        def row(sample: dict[str, Any]) -> tuple[int, str, torch.Tensor]:
            return int(sample["__key__"]), sample["txt"].decode(), pixels(self.decoder, sample["bin"], "pillow")

        found = webdataset.WebDataset(urls, shardshuffle=100, seed=SEED, empty_check=False).shuffle(1000).map(row)
        batches = found.batched(BATCH, collation_fn=stack)
        loader = webdataset.WebLoader(batches, batch_size=None, num_workers=self.workers)
        for i, batch in enumerate(loader):  # it cannot start in the middle: what comes before is read and decoded
            if i >= skip:
                yield batch


class Litdata:
    """Chunks of 64 MB, shuffled by its StreamingDataset."""

    def __init__(self, kind: str, data: Path, workers: int, decoder: str):
        import torchvision.io  # noqa: F401  before the workers fork, or each of them pays for it

        self.place, self.workers = data / "litdata", workers
        self.decoder = "none" if kind == "latent" else decoder

    def write(self, kind: str, data: Path) -> None:
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(self.place), chunk_bytes="64MB")
        for i, sample in enumerate(samples(kind, data)):
            writer[i] = sample
        writer.done()
        writer.merge()

    def epoch(self, skip: int = 0) -> Iterable:
        from litdata import StreamingDataLoader, StreamingDataset

        decoder = self.decoder

        class Rows(StreamingDataset):
            def __getitem__(self, index):
                number, caption, value = super().__getitem__(index)
                return number, caption, pixels(decoder, value, "torchvision")

        dataset = Rows(str(self.place), shuffle=True, seed=SEED, drop_last=False)
        loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=self.workers, collate_fn=stack)
        if skip:
            loader.load_state_dict(self.state)
        self.loader = loader
        yield from loader

    def stop_at(self, middle: int) -> None:
        """Read up to the middle of an epoch, and keep the state that a checkpoint would hold."""
        for i, _ in enumerate(self.epoch(), 1):
            if i == middle:
                break
        self.state = self.loader.state_dict()


class Streaming:
    """MDS shards of 64 MB, py1e shuffling."""

    def __init__(self, kind: str, data: Path, workers: int, decoder: str):
        self.place, self.workers = data / "streaming", workers
        self.decoder = "none" if kind == "latent" else decoder

    def write(self, kind: str, data: Path) -> None:
        from streaming import MDSWriter

        with MDSWriter(out=str(self.place), columns={"number": "int", "caption": "str", "value": "bytes"}, size_limit=1 << 26) as writer:
            for number, caption, value in samples(kind, data):
                writer.write({"number": number, "caption": caption, "value": value})

    def epoch(self, skip: int = 0) -> Iterable:
        from streaming import StreamingDataLoader, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        decoder = self.decoder

        class Rows(StreamingDataset):
            def __getitem__(self, index):
                row = super().__getitem__(index)
                return row["number"], row["caption"], pixels(decoder, row["value"], "pillow")

        dataset = Rows(local=str(self.place), shuffle=True, shuffle_seed=SEED, batch_size=BATCH, num_canonical_nodes=1)
        loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=self.workers, collate_fn=stack)
        if skip:
            loader.load_state_dict(self.state)
        self.loader = loader
        yield from loader

    stop_at = Litdata.stop_at


class Safetensors:
    """Latents of a tensor per shard, memory-mapped, taken by a permutation of all samples: the bound for formats, and no loader."""

    def __init__(self, kind: str, data: Path, workers: int, decoder: str):
        assert kind == "latent" and workers == 0, "safetensors is here for latents, in this process"
        self.place, self.data = data / "safetensors", data

    def write(self, kind: str, data: Path) -> None:
        from safetensors.torch import save_file

        self.place.mkdir()
        values = [pixels("none", value, "") for _, _, value in samples(kind, data)]
        for i in range(0, len(values), PER_SHARD):
            save_file({"latent": torch.stack(values[i : i + PER_SHARD])}, self.place / f"{i // PER_SHARD:05d}.safetensors")

    def epoch(self, skip: int = 0) -> Iterable:
        from safetensors import safe_open

        captions = json.loads((self.data / "captions.json").read_text())
        files = [safe_open(path, "pt") for path in sorted(self.place.glob("*.safetensors"))]
        shards = [file.get_tensor("latent") for file in files]
        order = np.random.default_rng(SEED).permutation(len(captions))
        for i in range(skip * BATCH, len(order), BATCH):
            chosen = order[i : i + BATCH].tolist()
            values = torch.stack([shards[number // PER_SHARD][number % PER_SHARD] for number in chosen])
            yield chosen, [captions[number] for number in chosen], values


class Ours:
    """The packed set, shuffled as `k2 pack` shuffles, through k2model.loader; `workers` are its threads."""

    def __init__(self, kind: str, data: Path, workers: int, decoder: str):
        self.place, self.kind, self.threads = data / "packed" / "bench", kind, max(1, workers)

    def write(self, kind: str, data: Path) -> None:
        from bench_loader import write_packed

        write_packed(self.place, list(samples(kind, data)), kind)

    def epoch(self, skip: int = 0) -> Iterable:
        from k2model.data import Packed
        from k2model.loader import Loader
        from k2model.order import Order

        packed = Packed(self.place)
        order, latents = Order([packed], [1], 1, SEED), self.kind == "latent"
        with Loader(order, start=skip, ahead=4, threads=self.threads, latents=latents, stop=len(packed)) as loader:
            for parts, _ in loader:
                for part in parts:
                    first = [own[0] for own in part.captions]
                    yield [int(uid.rpartition("/")[2]) for uid in part.uids], first, part.latents if latents else part.images


class Rowgroups:
    """Our latents' files as `safetensors` here reads its own: no loader around them, and captions from memory."""

    def __init__(self, kind: str, data: Path, workers: int, decoder: str):
        assert kind == "latent" and workers == 0
        self.place, self.data = data / "packed" / "bench", data

    def epoch(self, skip: int = 0) -> Iterable:
        from k2model.data import Packed
        from k2model.order import Order

        packed, captions = Packed(self.place), json.loads((self.data / "captions.json").read_text())
        order = Order([packed], [1], 1, SEED)
        groups = [order.group(i).number for i in range(len(packed))]
        numbers = json.loads((self.place / "numbers.json").read_text())
        for group in groups[skip:]:
            chosen = numbers[group]
            yield chosen, [captions[number] for number in chosen], packed.latents(packed.groups[group])


class Processes:
    """The same row groups read and decoded by our code in the processes of torch's DataLoader: what threads are weighed against."""

    def __init__(self, kind: str, data: Path, workers: int, decoder: str):
        self.place, self.workers = data / "packed" / "bench", workers

    def epoch(self, skip: int = 0) -> Iterable:
        from torch.utils.data import DataLoader

        from k2model.data import Packed
        from k2model.order import Order

        packed = Packed(self.place)
        order = Order([packed], [1], 1, SEED)
        groups = [order.describe(order.group(i)) for i in range(skip, len(packed))]

        class Groups(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return len(groups)

            def __getitem__(self, index: int) -> Any:
                return packed.read(groups[index])

        for batch in DataLoader(Groups(), batch_size=None, num_workers=self.workers, prefetch_factor=4 // self.workers):
            yield [int(uid.rpartition("/")[2]) for uid in batch.uids], batch.captions, batch.images


PEERS = {
    "row groups": Rowgroups,
    "processes": Processes,
    "ours": Ours,
    "webdataset": Webdataset,
    "litdata": Litdata,
    "streaming": Streaming,
    "safetensors": Safetensors,
}


def processor() -> float:
    """Processor seconds of this process, its threads and the workers that have ended."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def measure(name: str, kind: str, data: Path, workers: int, decoder: str) -> dict[str, Any]:
    """One epoch, then the first batch from the middle of one."""
    torch.set_num_threads(1)
    peer = PEERS[name](kind, data, workers, decoder)
    next(iter(peer.epoch()))  # imports and the page cache
    numbers, touched = [], 0
    clock, cpu = time.perf_counter(), processor()
    for chosen, captions, values in peer.epoch():
        numbers += chosen
        assert len(captions) == len(chosen) == len(values)
        touched += int(values[:, 0, 0, 0].float().sum() != 0)  # a page fault per sample, so that what is mapped is there
    clock, cpu = time.perf_counter() - clock, processor() - cpu
    middle = len(numbers) // BATCH // 2
    if hasattr(peer, "stop_at"):
        peer.stop_at(middle)
    start = time.perf_counter()
    first = next(iter(peer.epoch(middle)))[0]
    resume = time.perf_counter() - start
    exact = first == numbers[middle * BATCH : (middle + 1) * BATCH]
    found = np.array(numbers)
    return {
        "samples": len(found),
        "all_once": sorted(numbers) == list(range(len(found))),
        "cpu_s": cpu,
        "wall_s": clock,
        "displacement": float(np.abs(np.arange(len(found)) - found).mean() / len(found)),
        "near": float((np.abs(np.diff(found)) <= 64).mean()),
        "resume_s": resume,
        "resume_exact": exact,
    }


if __name__ == "__main__":
    if sys.argv[1] == "write":
        PEERS[sys.argv[2]](sys.argv[3], Path(sys.argv[4]), 0, "own").write(sys.argv[3], Path(sys.argv[4]))
        print("{}")
    else:
        name, kind, data, workers, decoder = sys.argv[1:]
        print(json.dumps(measure(name, kind, Path(data), int(workers), decoder)), flush=True)
    sys.stdout.flush()
    os._exit(0)  # some leave threads and shared memory that wait at the end
