"""Imports flow one way, the front door is pinned, and importing filigrane loads no framework."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import filigrane

SOURCE = Path(__file__).parent.parent / "src" / "filigrane"

# Low to high. A module may import from floors below its own, and from its own floor if it is listed
# later there; names are prefixes of module paths.
FLOORS = [
    ["errors", "private_files"],
    ["stats", "prf", "contexts"],
    ["kernels"],
    ["keys"],
    ["schemes"],
    ["embedding", "detection", "tracing", "localisation", "bayes"],
    ["speculative", "radioactivity", "foreign", "custody", "serving"],
    ["toy"],
    ["adapters", "kms", "store"],
    ["service", "bench", "study"],
    ["cli"],
]
ADAPTERS = next(height for height, names in enumerate(FLOORS) if "adapters" in names)
# The reference modules call their own compiled twins inside functions, and kernels know nothing of
# them in return: the one place where an arrow points up.
LAZY_UPWARD = {("contexts", "kernels"), ("stats", "kernels")}
FRONT_DOOR = {
    *("Key", "Corpus", "Sampling", "FiligraneError"),
    *("SCHEMES", "from_tag", "Gumbel", "GreenList", "Tournament", "GammaReweight", "DeltaReweight"),
    *("embed", "embed_batch", "stream", "Generated", "LanguageModel", "MarkedSampler"),
    *("detect", "DetectionResult", "trace", "TraceResult"),
}
FORBIDDEN_BELOW_ADAPTERS = {
    *("torch", "transformers", "scipy", "typer", "rich", "fastapi", "sqlite3", "sqlalchemy"),
}


def floor_of(module: str) -> tuple[int, int]:
    head = module.split(".")[0]
    for height, names in enumerate(FLOORS):
        if head in names:
            return height, names.index(head)
    raise AssertionError(f"{module} has no floor in FLOORS: decide where it stands")


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(module, line, whether at module level) of every import in a file."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by full name"
            module = node.module or ""
            if module == "filigrane":
                found += [
                    (f"filigrane.{alias.name}", node.lineno, id(node) in top)
                    for alias in node.names
                ]
            else:
                found.append((module, node.lineno, id(node) in top))
    return found


def modules() -> list[tuple[str, Path]]:
    return [
        (".".join(path.relative_to(SOURCE).with_suffix("").parts), path)
        for path in sorted(SOURCE.rglob("*.py"))
    ]


def problems(files: list[tuple[str, Path]]) -> list[str]:
    known = {name.split(".")[0] for name, _ in files}
    wrong = []
    for name, path in files:
        if name in ("__init__", "__main__"):
            continue
        here = floor_of(name)
        for target, line, top in imports(path):
            root, _, rest = target.partition(".")
            if root != "filigrane":
                low = here[0] < ADAPTERS
                if low and root in FORBIDDEN_BELOW_ADAPTERS:
                    wrong.append(f"{path.name}:{line}: {name} must not know {root}")
                if top and root == "numba" and not name.startswith("kernels"):
                    wrong.append(f"{path.name}:{line}: numba only in kernels")
                continue
            head = rest.split(".")[0]
            if head not in known or head == name.split(".")[0]:
                # A name of the front door is only for those above it.
                if head not in known and here[0] < ADAPTERS:
                    wrong.append(f"{path.name}:{line}: {name} imports the front door")
                continue
            if (name, head) in LAZY_UPWARD and not top:
                continue
            if floor_of(head) > here or (top and head == "kernels" and here[0] < 7):
                wrong.append(f"{path.name}:{line}: {name} imports {head}, which stands above it")
    return wrong


def test_imports_flow_one_way() -> None:
    assert problems(modules()) == []


def test_the_test_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "stats.py"
    bad.write_text("from filigrane.detection import detect\nimport torch\n")
    found = problems([*modules(), ("stats", bad)])
    assert len(found) == 2 and "stats imports detection" in found[0] and "torch" in found[1]


def test_front_door_is_pinned() -> None:
    public = {name for name in dir(filigrane) if not name.startswith("_")}
    submodules = {name.split(".")[0] for name, _ in modules()}
    assert public - submodules - {"TYPE_CHECKING", "importlib"} == set(filigrane.__all__)
    for name, home in filigrane._HOME.items():
        assert getattr(filigrane, name) is getattr(sys.modules[f"filigrane.{home}"], name)
    with pytest.raises(AttributeError, match="no attribute 'detct'"):
        filigrane.detct  # noqa: B018
    assert set(filigrane.__all__) == FRONT_DOOR


def test_import_is_light() -> None:
    heavy = {"torch", "transformers", "numba", "scipy", "cryptography", "typer", "rich"}
    for code, forbidden in (
        ("import filigrane", heavy | {"numpy"}),
        ("from filigrane import *", heavy),
    ):
        code += "; import sys; print(*sys.modules)"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert not forbidden & set(done.stdout.split())


def test_test_files_stand_alone() -> None:
    """What several of them need is in a kit: imported, a test file would be collected twice."""
    tests = Path(__file__).parent
    wrong = [
        f"{path.relative_to(tests)}:{line}: {target} is no kit"
        for path in sorted(tests.rglob("*.py"))
        for target, line, _ in imports(path)
        if any(part == "conftest" or part.startswith("test_") for part in target.split("."))
    ]
    assert wrong == []


def test_no_open_keywords_and_no_print() -> None:
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not name.startswith("cli"):
                assert node.args.kwarg is None, f"{path}:{node.lineno}: **kwargs in {node.name}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print" or name.startswith("cli"), f"{path}:{node.lineno}"
