"""schema.py is the contract: what stages write, and what the docs say."""

from pathlib import Path

import pytest

from curation import schema
from pipelines import recipes

DOCS = Path(__file__).parents[2] / "docs"


def test_the_docs_show_the_tables_as_they_are():
    assert (DOCS / "tables.md").read_text() == schema.tables_markdown() + "\n", "run: python -m curation.schema > docs/tables.md"


def test_every_column_has_a_comment():
    assert all((field.metadata or {}).get(b"comment") for table, _ in schema.TABLES.values() for field in table)


@pytest.mark.parametrize("name", recipes.ANNOTATE)
def test_every_annotation_recipe_builds_and_its_stages_have_uid_and_error(name):
    for stage in recipes.ANNOTATE[name]():
        assert stage.schema.names[0] == "uid" and stage.schema.names[-1] == "error"
