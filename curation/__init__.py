"""Facts about images: sources, decoding, stages, towers, duplicates, policies, packing. Never imports ray, k2model or pipelines."""
