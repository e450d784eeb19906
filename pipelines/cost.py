"""What N images cost, from measured rates: arithmetic only, no files, no clock.

Work scales with the number of images. A cluster works on all of its resources at once and keeps each of them busy, so the time is
that of the resource that is used up last, and that one is the bottleneck.
"""

from dataclasses import dataclass, field
from typing import Any

HOUR = 3600.0
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Rates:
    """What one image costs, measured. None where no figure is known."""

    core_seconds: dict[str, float]  # part of the work (read, decode, write, a stage) -> seconds of one core
    gpu_seconds: dict[str, float | None] = field(default_factory=dict)  # stage of a tower -> seconds of one GPU
    table_bytes: dict[str, float] = field(default_factory=dict)  # table -> bytes in storage
    packed_bytes: dict[str, float] = field(default_factory=dict)  # packed set -> bytes of an image that is kept
    kept: dict[str, float | None] = field(default_factory=dict)  # packed set -> share of the images that it keeps, 0 to 1
    source_bytes: float | None = None  # encoded image and caption

    def __post_init__(self) -> None:
        figures = [*self.core_seconds.values(), *self.table_bytes.values(), *self.packed_bytes.values(), self.source_bytes]
        figures += [*self.gpu_seconds.values(), *self.kept.values()]
        assert all(value >= 0 for value in figures if value is not None), figures


@dataclass(frozen=True)
class Cluster:
    """What there is to work with. No CPUs: no cluster is given, and no time can be said."""

    nodes: int = 1
    cpus: int = 0  # of a node
    gpus: int = 0  # of a node
    read_mb_per_s: float | None = None  # of a node, from where the source lies, 10^6 bytes; None: reading is not looked at
    cpu_hour_price: float | None = None  # of one core
    gpu_hour_price: float | None = None  # of one GPU

    def __post_init__(self) -> None:
        """Raises ValueError: a number that no cluster has."""
        for name, least in (("nodes", 1), ("cpus", 0), ("gpus", 0), ("cpu_hour_price", 0), ("gpu_hour_price", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"--{name.replace('_', '-')} must be {least} or more; got {value}")
        if self.read_mb_per_s is not None and not self.read_mb_per_s > 0:
            raise ValueError(f"--read-mb-per-s must be over 0; got {self.read_mb_per_s}")


def cost(images: int, rates: Rates, cluster: Cluster) -> dict[str, Any]:
    """Hours, bytes, time and money of `images` images; None where a figure that it needs is not known.

    Keys: core_hours and gpu_hours (per part, with "total"), table_bytes (with "total"), packed (per set: bytes of an image, share kept,
    bytes), source_bytes, hours_of (cpu, gpu, read: hours that each alone would take), wall_hours, bottleneck, read_mb_per_s (what
    the whole cluster reads at that pace), money, missing (figures that would fill the gaps).

    Raises:
        ValueError: fewer than one image.
    """
    if images < 1:
        raise ValueError(f"--images must be 1 or more; got {images}")
    core = {name: images * seconds / HOUR for name, seconds in rates.core_seconds.items()}
    gpu = {name: None if seconds is None else images * seconds / HOUR for name, seconds in rates.gpu_seconds.items()}
    core["total"], gpu["total"] = _total(core), _total(gpu)
    tables = {name: images * size for name, size in rates.table_bytes.items()}
    tables["total"] = _total(tables)
    packed = {}
    for name, size in rates.packed_bytes.items():
        kept = rates.kept.get(name)
        packed[name] = {"image_bytes": size, "kept": kept, "bytes": None if kept is None else images * kept * size}
    source = None if rates.source_bytes is None else images * rates.source_bytes

    hours: dict[str, float | None] = {}
    if cluster.cpus:
        hours["cpu"] = core["total"] / (cluster.nodes * cluster.cpus)
        if rates.gpu_seconds:
            hours["gpu"] = gpu["total"] / (cluster.nodes * cluster.gpus) if cluster.gpus and gpu["total"] is not None else None
        if cluster.read_mb_per_s:
            hours["read"] = None if source is None else source / 1e6 / (cluster.nodes * cluster.read_mb_per_s) / HOUR
    known = bool(hours) and None not in hours.values()
    wall = max(hours.values()) if known else None
    return {
        "images": images,
        "core_hours": core,
        "gpu_hours": gpu,
        "table_bytes": tables,
        "packed": packed,
        "source_bytes": source,
        "hours_of": hours,
        "wall_hours": wall,
        "bottleneck": max(hours, key=hours.get) if known else None,
        "read_mb_per_s": source / 1e6 / (wall * HOUR) if wall and source is not None else None,
        "money": _money(core["total"], gpu["total"], wall, cluster),
        "missing": _missing(rates, cluster),
    }


def _total(parts: dict[str, float | None]) -> float | None:
    return None if None in parts.values() else sum(parts.values())


def _money(core_hours: float, gpu_hours: float | None, wall: float | None, cluster: Cluster) -> float | None:
    """A cluster is paid for from start to end, idle or not. Without one: the hours of work."""
    if cluster.cpu_hour_price is None and cluster.gpu_hour_price is None:
        return None
    if cluster.cpus:
        core_hours = None if wall is None else wall * cluster.nodes * cluster.cpus
        gpu_hours = None if wall is None else wall * cluster.nodes * cluster.gpus
    paid = [(core_hours, cluster.cpu_hour_price), (gpu_hours, cluster.gpu_hour_price)]
    if any(hours is None or (hours > 0 and price is None) for hours, price in paid):
        return None
    return sum(hours * (price or 0.0) for hours, price in paid)


def _missing(rates: Rates, cluster: Cluster) -> list[str]:
    """Figures that are needed and not there, as what to do."""
    missing = [f"--gpu-rate {name}=IMAGES_PER_S_OF_ONE_GPU" for name, seconds in rates.gpu_seconds.items() if seconds is None]
    if rates.gpu_seconds and cluster.cpus and not cluster.gpus:
        missing.append("--gpus (of a node): a stage has a GPU rate")
    if not cluster.cpus:
        missing.append("--cpus (of a node) for a time")
    if cluster.cpu_hour_price is None and cluster.gpu_hour_price is not None:
        missing.append("--cpu-hour-price (0 where cores come with the GPU)")
    if cluster.gpu_hour_price is None and cluster.cpu_hour_price is not None and (cluster.gpus or rates.gpu_seconds):
        missing.append("--gpu-hour-price (0 where GPUs come with the node)")
    if rates.source_bytes is None:
        missing.append("bytes of the source: annotate with a recipe that has the stage basics")
    missing += [f"--keep for {name}" for name in rates.packed_bytes if rates.kept.get(name) is None]
    return missing


def text(value: float | None, unit: str = "") -> str:
    """A figure for people: three significant digits, thousands marked, or `unknown`."""
    if value is None:
        return UNKNOWN
    if unit == "B":
        for name in ("B", "kB", "MB", "GB", "TB", "PB"):
            if abs(value) < 1000 or name == "PB":
                return f"{value:,.3g} {name}" if abs(value) < 1000 else f"{value:,.0f} {name}"
            value /= 1000
    shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{shown} {unit}".strip()
