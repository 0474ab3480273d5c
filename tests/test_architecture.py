"""The design as tests: who imports whom, what starts without PyTorch, what files may never do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "anysite"

# Each layer may import the layers before it, and nothing after it.
LAYERS = [
    {"__init__", "errors"},
    {"atomic", "statistics", "compute", "judgement", "postprocessing", "provenance", "quality"},
    {"registry"},
    {"settings"},
    {"config"},
    {"data", "metrics", "calibration"},
    {"axes"},
    {"amplitude", "random_convolution"},
    {"augment", "corrupt", "intensities", "masking", "normalisation", "sides", "similarity"},
    {"plan"},
    {"windows", "planning"},
    {"patches"},
    {"networks"},
    {"checks", "diagnostics"},
    {"objectives"},
    {"learner", "detectors", "adapters"},
    {"judge", "observations", "rows"},
    {"guard"},
    {"runs", "scalars", "maps", "previews"},
    {"segment", "splits", "validation", "manifest"},
    {"calibrate", "references", "transfer"},
    {"loop"},
    {"assess"},
    {"train", "verdicts", "roles"},
    {"predict", "reflect"},
    {"evaluate"},
    {"experiment", "foreign", "workers"},
    {"benchmark", "report", "describe"},
    {"console"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "print", "globals"}
FORBIDDEN_ATTRIBUTES = {
    *(("torch", "load"), ("torch", "save"), ("torch.hub", "load"), ("torch.jit", "load"), ("os", "system")),
    *(("os", "popen"), ("runpy", "run_path"), ("runpy", "run_module"), ("numpy.ma", "loads")),
}
FORBIDDEN_METHODS = {"extractall", "extract", "unpack_archive", "load_module", "exec_module", "literal_eval"}
FORBIDDEN_MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "marshal", "shelve", "dill", "joblib", "torchvision"),
    *(
        "yaml",
        "hydra",
        "omegaconf",
        "runpy",
        "code",
        "codeop",
        "tarfile",
        "requests",
        "urllib",
        "http",
        "socket",
    ),
}
IMPORTERS = {"registry.py"}  # which imports the classes of its own tables and those the user trusts


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def unit_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_units(path: Path) -> set[str]:
    """Units imported anywhere in a file, except for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "anysite":
                names.update(alias.name for alias in node.names if alias.name in LEVEL)
            elif node.module.startswith("anysite."):
                names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names.update(a.name.split(".")[1] for a in node.names if a.name.startswith("anysite."))
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    unit = unit_of(path)
    if unit == "presets":
        return
    assert unit in LEVEL, f"{unit} has no layer yet: give it one"
    for other in imported_units(path) - {unit}:
        assert LEVEL[other] < LEVEL[unit], f"{unit} imports {other}"


def test_the_report_knows_neither_torch_nor_plugins() -> None:
    for path in (SOURCE / "report").glob("*.py"):
        assert imported_units(path) <= {
            *(
                "report",
                "data",
                "rows",
                "manifest",
                "statistics",
                "judgement",
                "atomic",
                "errors",
                "__init__",
            ),
        }
        assert "import torch" not in path.read_text()


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_file_can_run_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"line {node.lineno}: {node.func.id}()"
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in ("allow_pickle", "shell", "weights_only"):
                    assert isinstance(keyword.value, ast.Constant), f"line {node.lineno}"
                    unsafe = keyword.arg != "weights_only"
                    assert keyword.value.value is not unsafe, f"line {node.lineno}"
            if ast.unparse(node.func) in ("np.load", "numpy.load"):
                named = {keyword.arg for keyword in node.keywords}
                assert "allow_pickle" in named, f"line {node.lineno}: say allow_pickle=False"
        if isinstance(node, ast.Attribute):
            assert (ast.unparse(node.value), node.attr) not in FORBIDDEN_ATTRIBUTES, f"line {node.lineno}"
            assert node.attr not in FORBIDDEN_METHODS, f"line {node.lineno}: {node.attr}"
            if node.attr == "import_module":
                assert path.name in IMPORTERS, f"line {node.lineno}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert "_target_" not in node.value, f"line {node.lineno}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not FORBIDDEN_MODULES & {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    "statement", ["import anysite", "import anysite.cli", "import anysite.registry", "import anysite.config"]
)
def test_starts_without_torch(statement: str) -> None:
    command = (
        f"import sys; {statement}; print([m for m in ('torch', 'monai', 'nibabel') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_prediction_loads_nothing_that_training_alone_needs() -> None:
    slow = ("scipy.stats", "scipy.optimize", "monai", "lightning_fabric")
    command = f"import sys, anysite.predict; print([m for m in {slow} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["train", "--help"]])
def test_help_and_methods_import_no_torch(arguments: list[str]) -> None:
    command = (
        "import sys, atexit; from anysite.cli import main; "
        "atexit.register(lambda: sys.stderr.write('LOADED' if 'torch' in sys.modules else 'ABSENT')); "
        f"sys.argv = ['anysite', *{arguments!r}]; main()"
    )
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stderr.endswith("ABSENT")
    assert result.stdout.strip()


def test_every_module_says_what_it_is_for() -> None:
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
