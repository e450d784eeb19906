"""The K2 diffusion transformer and its training parts. Imports nothing of ours but curation.schema."""
