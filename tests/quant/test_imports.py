"""Who may import whom, read from the sources, and what an import must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qexp

ROOT = Path(qexp.__file__).parent
# Nothing imports from a later row.
# fmt: off
ORDER = [
    {"quant"},
    {"models", "data", "metrics"},
    {"finetune", "tasks", "engines"},
    {"analysis"},
    {
        "store", "machine", "settings", "tracking", "record", "report", "prepare", "passes", "caches", "stopping",
        "finetuning", "sections", "schema", "plans", "flat", "smoothing", "compare", "papers", "heads",
    },
    {"run"},
    {"attempt", "composing", "jobs", "help_page", "completion", "doctor", "probes"},
    {"launch"},
    {"sweep"},
    {"search"},
    {"cli", "levels_cli", "flatness_cli", "compare_cli", "doctor_cli", "outliers_cli", "__main__"},
]
# fmt: on
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
ENGINES = {"onnx", "onnxruntime", "onnxscript", "openvino"}
SOURCES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}


def part_of(source):
    """First name below qexp: quant for quant/grid.py, run for run.py."""
    return source.removesuffix(".py").split("/")[0]


def imports(path):
    """Full dotted names of all that a file imports, inside functions too."""
    package = ("qexp", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [above, node.module]))
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_imports_from_further_right(source):
    if source == "__init__.py":
        assert not [name for name in imports(SOURCES[source]) if name.startswith("qexp")]
        return
    assert part_of(source) in RANK, f"{source}: give it a place in ORDER"
    parts = {name.split(".")[1] for name in imports(SOURCES[source]) if name.startswith("qexp.")}
    assert not {part for part in parts & RANK.keys() if RANK[part] > RANK[part_of(source)]}


@pytest.mark.parametrize("source", [s for s in SOURCES if s.startswith("quant/")])
def test_quant_imports_torch_and_the_standard_library_alone(source):
    names = set(imports(SOURCES[source]))
    assert all(name.startswith("qexp.quant") for name in names if name.split(".")[0] == "qexp")
    assert {name.split(".")[0] for name in names} <= {"torch", "qexp", *sys.stdlib_module_names}


@pytest.mark.parametrize("source", [s for s in SOURCES if not s.startswith("engines/")])
def test_engines_are_imported_by_their_own_package_alone(source):
    allowed = {"onnx"} if source == "run.py" else set()  # for the type of a graph
    assert {name.split(".")[0] for name in imports(SOURCES[source])} & ENGINES <= allowed


def loaded_by(*modules):
    """Top-level names in sys.modules after importing these in a fresh interpreter."""
    code = f"import sys, {', '.join(modules)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent).stdout.split())


def test_formats_and_settings_load_without_torch():
    light = [f"qexp.quant.{name}" for name in ("grid", "granularity", "calibration", "recipe")]
    assert "torch" not in loaded_by(*light, "qexp.settings")


def test_quantizers_load_without_lightning_hydra_wandb_or_engines():
    modules = [f"qexp.quant.{path.stem}" for path in (ROOT / "quant").glob("*.py") if path.stem != "__init__"]
    loaded = loaded_by(*modules)
    assert "torch" in loaded
    assert not loaded & {
        "pytorch_lightning",
        "lightning",
        "hydra",
        "omegaconf",
        "wandb",
        "torchmetrics",
        *ENGINES,
    }
