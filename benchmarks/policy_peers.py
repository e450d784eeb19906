"""The rules of a policy by hand, with other libraries: `python policy_peers.py NAME RUN OUT` (run by bench_policy.py).

Joins basics, duplicates, synthetic and provenance by uid, applies the rules of their numeric columns as one mask, and writes the
uids that are kept, sorted. No funnel, no tags of features, no buckets and crops. Needs nothing of ours.
"""

import sys

BASICS = ["uid", "error", "width", "height", "laplacian_var", "rgb_entropy", "white_ratio", "black_ratio", "complexity", "jpeg_quality"]
BASICS += ["border_top", "border_bottom", "border_left", "border_right"]
OTHERS = {"duplicates": "representative", "synthetic": "real_share", "provenance": "declared_ai"}


def with_polars(run: str, out: str) -> None:
    """Lazy scans, the streaming engine."""
    import polars as pl

    frame = pl.scan_parquet(f"{run}/annotations/basics/*.parquet").select(BASICS)
    for stage, column in OTHERS.items():
        other = pl.scan_parquet(f"{run}/annotations/{stage}/*.parquet").select("uid", column)
        frame = frame.join(other, on="uid", how="left")
    aspect = pl.col("width") / pl.col("height")
    frame = frame.filter(
        pl.col("error").is_null(),
        pl.col("representative"),
        pl.col("real_share") > 0.05,
        ~pl.col("declared_ai"),
        (aspect >= 0.4) & (aspect <= 2.5),
        pl.min_horizontal("width", "height") >= 256,
        pl.col("laplacian_var") < 12000,
        pl.col("rgb_entropy") >= 1.5,
        pl.col("white_ratio") <= 0.75,
        pl.col("black_ratio") <= 0.85,
        (pl.col("rgb_entropy") >= 2.2) | (pl.col("white_ratio") + pl.col("black_ratio") > 0.4),
        pl.max_horizontal(pl.min_horizontal("border_top", "border_bottom"), pl.min_horizontal("border_left", "border_right")) <= 0.05,
        pl.col("jpeg_quality").fill_null(100) >= 10,
        pl.col("complexity") <= 0.30,
    )
    frame.select("uid").sort("uid").collect(engine="streaming").write_parquet(out)


def with_pandas(run: str, out: str) -> None:
    """Arrow strings, merges, one mask."""
    import pandas as pd

    frame = pd.read_parquet(f"{run}/annotations/basics", columns=BASICS, dtype_backend="pyarrow")
    for stage, column in OTHERS.items():
        frame = frame.merge(
            pd.read_parquet(f"{run}/annotations/{stage}", columns=["uid", column], dtype_backend="pyarrow"), on="uid", how="left"
        )
    aspect = frame.width / frame.height
    mask = frame.error.isna() & frame.representative & (frame.real_share > 0.05) & ~frame.declared_ai & aspect.between(0.4, 2.5)
    mask &= (frame[["width", "height"]].min(axis=1) >= 256) & (frame.laplacian_var < 12000) & (frame.rgb_entropy >= 1.5)
    mask &= (frame.white_ratio <= 0.75) & (frame.black_ratio <= 0.85) & (frame.complexity <= 0.30)
    mask &= (frame.rgb_entropy >= 2.2) | (frame.white_ratio + frame.black_ratio > 0.4)
    vertical, horizontal = frame[["border_top", "border_bottom"]].min(axis=1), frame[["border_left", "border_right"]].min(axis=1)
    mask &= (vertical <= 0.05) & (horizontal <= 0.05) & (frame.jpeg_quality.fillna(100) >= 10)
    frame.loc[mask.fillna(False).astype(bool), ["uid"]].sort_values("uid").to_parquet(out)


if __name__ == "__main__":
    {"polars": with_polars, "pandas": with_pandas}[sys.argv[1]](*sys.argv[2:])
