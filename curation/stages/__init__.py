"""One file, one stage: a frozen dataclass with `name`, `schema` and `load(device)` (see curation.annotate)."""
