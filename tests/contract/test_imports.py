"""The architecture: who may import whom."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = ("curation", "k2model", "pipelines")
NO_TORCH = [
    "schema",
    "sources",
    "shards",
    "decode",
    "annotate",
    "policy",
    "pack",
    "pieces",
    "shuffle",
    "explore",
    "buckets",
    "dedup",
    "faults",
]


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere in it, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


FILES = {path: imports(path) for package in OURS for path in (ROOT / package).rglob("*.py")}


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in FILES[path]}


def test_imports_go_one_way():
    for path in FILES:
        package = path.relative_to(ROOT).parts[0]
        if package == "curation":
            assert not roots(path) & {"k2model", "pipelines", "ray"}, path
        if package == "k2model":
            ours = {name for name in FILES[path] if name.split(".")[0] in OURS and not name.startswith("k2model")}
            assert all(name.startswith("curation.schema") or name == "curation" for name in ours), (path, ours)


TIMM = ["curation/compact.py", "curation/effnet.py", "pipelines/teachers.py"]


def test_each_heavy_library_has_its_own_file():
    homes = {"ray": ["pipelines/cluster.py"], "open_clip": ["curation/towers.py"], "timm": TIMM}
    for library, home in homes.items():
        assert sorted(str(path.relative_to(ROOT)) for path in FILES if library in roots(path)) == home


def test_torch_is_not_needed_to_read_choose_and_pack():
    for name in NO_TORCH:
        assert "torch" not in roots(ROOT / "curation" / f"{name}.py"), name


def test_no_module_has_the_name_of_a_standard_one():
    assert not {path.stem for path in FILES} & (sys.stdlib_module_names - {"__init__"})


def test_files_stay_small():
    assert not {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
