"""Promise: there is one name for each module, and the light packages stay light."""

import ast
import re
import subprocess
import sys

import pytest
from processes import ROOT

FOLDERS = ("train", "kernels", "data_tools", "evaluation", "tests", "launch", "examples")


def test_nobody_imports_a_folder_by_its_bare_name():
    # The same module loaded twice, as `train.x` and as `swim.train.x`, would register its operators twice.
    pattern = re.compile(r"^\s*(from|import) (train|kernels|data_tools|evaluation)(\.| import|$)", re.MULTILINE)
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 40
    assert [str(path) for path in files if pattern.search(path.read_text())] == []


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("swim.data_tools.cli", {"torch", "swim.train", "swim.kernels"}),
        ("swim.evaluation.report", {"torch", "swim.train", "swim.kernels", "swim.data_tools"}),
        ("swim.evaluation.explain_page", {"torch", "swim.train", "swim.kernels", "swim.data_tools"}),
        ("swim.kernels.noun_attention", {"transformers", "deepspeed", "swim.train", "swim.data_tools"}),
        ("swim.train.attention", {"deepspeed"}),
        ("swim.train.config", {"torch"}),
    ],
)
def test_imports_stay_in_their_layer(module, heavy):
    code = f"import sys, {module}; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not heavy & set(loaded.stdout.split())


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_the_kernels_and_their_tests_need_only_torch_triton_numpy_and_pytest():
    # They run on bare GPU machines.
    allowed = {"torch", "triton", "numpy", "pytest", *sys.stdlib_module_names}
    files = [
        ROOT / "tests" / "conftest.py",
        *(ROOT / "kernels").glob("*.py"),
        *(ROOT / "tests" / "kernels").glob("*.py"),
    ]
    assert len(files) > 5
    for path in files:  # which grows by the tests' own helpers
        for name in imported(path):
            helper = ROOT / "tests" / f"{name}.py"
            if helper.exists():
                files += [helper] if helper not in files else []
            else:
                assert name.split(".")[0] in allowed or name.startswith("swim.kernels"), (path, name)
