"""Imports run one way: run, eval -> dataset, model; model -> loss, utils; dataset -> utils."""

import ast

import pytest

from utils.config.loading import REPOSITORY

ALLOWED = {
    "run": {"eval", "dataset", "model", "utils"},
    "eval": {"dataset", "model", "utils"},
    "model": {"model", "loss", "utils"},
    "dataset": {"dataset", "utils"},
    "loss": {"loss", "utils"},
    "utils": {"utils"},
}
FILES = [
    path for part in ALLOWED for path in [*REPOSITORY.glob(f"{part}.py"), *REPOSITORY.glob(f"{part}/**/*.py")]
]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports__run_one_way(path):
    part = path.relative_to(REPOSITORY).parts[0].removesuffix(".py")
    if path.name == "make_demo.py":  # a program that nothing imports
        part = "run"
    ours = {name for name in imported(path) if name in ALLOWED}
    assert ours <= ALLOWED[part]
