"""What is shipped, what importing it loads, and that imports point one way."""

import ast
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"inrun_kernels": ROOT / "kernels/inrun_kernels", "inrun": ROOT / "inrun"}


def run_python(script: str, *path: Path, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", [*SOURCES, "inrun.adapters"])
def test_importing_loads_nothing_optional(package, tmp_path):
    """`import torch` alone is the measure: what torch loads by itself is not ours."""
    script = f"import sys, torch; before = set(sys.modules); import {package}; print(*set(sys.modules) - before)"
    loaded = {name.split(".")[0] for name in run_python(script, ROOT, ROOT / "kernels", cwd=tmp_path).split()}
    assert package.split(".")[0] in loaded
    assert not loaded & {"transformers", "pyarrow", "matplotlib", "triton", "duckdb", "tyro", "tqdm", "sklearn"}
    assert not loaded & {"accelerate", "lightning", "trl", "datasets", "tensorboard", "wandb"}


def test_the_name_kernels_stays_free(tmp_path):
    """The PyPI package `kernels` is found from the repository root too, although a folder there has its name."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("theirs = True\n")
    script = "import kernels, inrun_kernels; print(kernels.theirs, inrun_kernels.__file__)"
    printed = run_python(script, ROOT, ROOT / "kernels", tmp_path, cwd=ROOT)
    assert printed == f"True {SOURCES['inrun_kernels'] / '__init__.py'}"


class _Runtime(ast.NodeTransformer):
    """Leaves out what only the type checker reads."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def imports() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, at its top or later."""
    modules = {}
    for package, folder in SOURCES.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            modules[".".join((package, *parts)).removesuffix(".__init__")] = file
    found: dict[str, set[str]] = {}
    for module, file in modules.items():
        here = module if file.name == "__init__.py" else module.rpartition(".")[0]
        names = set()
        for node in ast.walk(_Runtime().visit(ast.parse(file.read_text()))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), here)
                names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        found[module] = {name for name in names if name in modules and name != module}
    return found


def test_imports_point_one_way():
    graph = imports()
    # A package's __init__ gathers what lies below it, and every `from inrun import x` passes through it.
    below = {module: {name for name in needs if name not in SOURCES} for module, needs in graph.items()}
    for package in SOURCES:
        below.pop(package)
    assert len(below) > 10
    for module, needs in graph.items():
        if module.startswith("inrun_kernels"):
            assert all(name.startswith("inrun_kernels") for name in needs), (module, needs)
        assert "inrun.cli" not in needs or module == "inrun.__main__", module
    for module in ("errors", "shards", "queries", "reading", "ledger", "functional", "norm_layers", "probing"):
        allowed = {f"inrun.{name}" for name in ("errors", "shards", "queries", "reading", "norm_layers", "probing")}
        assert {name for name in below[f"inrun.{module}"] if name.startswith("inrun.")} <= allowed, module
    done: set[str] = set()
    while len(done) < len(below):
        ready = {module for module, needs in below.items() if module not in done and needs <= done}
        assert ready, f"an import cycle among {sorted(set(below) - done)}"
        done |= ready


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"inrun", "inrun_kernels", "inrun-0.1.0.dist-info"}
    for package, folder in SOURCES.items():
        sources = {
            f"{package}/{file.relative_to(folder)}" for file in (*folder.rglob("*.py"), *folder.rglob("c/*.[ch]"))
        }
        assert sources == {name for name in names if name.startswith(f"{package}/")}
    assert "inrun-0.1.0.dist-info/licenses/LICENSE" in names


def test_the_wheel_works_away_from_the_repository(wheel, tmp_path):
    pytest.importorskip("pip")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    script = "\n".join(
        [
            "import importlib.metadata, inrun, inrun_kernels, torch",
            "print(inrun.__file__, inrun_kernels.__file__)",
            "x = torch.ones(2, 3, 4)",
            "print(inrun.ghost_dot(x, x, torch.ones(4, 4)).tolist())",
            "ledger = inrun.Ledger('ledger'); ledger.append(0, [1], [0.5]); ledger.close(); print(len(ledger))",
            "print(inrun.__version__ == importlib.metadata.version('inrun'))",
        ]
    )
    files, dots, rows, version = run_python(script, site, cwd=tmp_path).splitlines()
    assert files == f"{site / 'inrun/__init__.py'} {site / 'inrun_kernels/__init__.py'}"
    assert (dots, rows, version) == ("[48.0, 48.0]", "1", "True")
