"""The wheel, built as a release is: through the sdist, and used away from the repository."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]


def build(target: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.iterdir()
    return built


def sources(folder: Path) -> set[str]:
    """The files a clone would hold in the package and in conf/, as the wheel names them."""
    files = [path.relative_to(folder) for top in ("qexp", "conf") for path in (folder / top).rglob("*.*")]
    kept = [path for path in files if path.suffix in (".py", ".yaml")]
    return {(Path("qexp") / path if path.parts[0] == "conf" else path).as_posix() for path in kept}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("qexp", "conf"):
        shutil.copytree(REPOSITORY / name, tree / name)
    for name in ("pyproject.toml", "LICENSE", "README.md", ".gitignore"):
        if (REPOSITORY / name).exists():
            shutil.copy(REPOSITORY / name, tree)
    sdist = build("sdist", tree, folder / "sdist")
    shutil.unpack_archive(sdist, folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return build("wheel", source, folder / "out")


@pytest.fixture(scope="module")
def site(wheel) -> Path:
    """The wheel as pip would unpack it."""
    folder = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_installed(site: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run python with the unpacked wheel ahead of the editable install, in a folder that is no clone."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_wheel_holds_the_package_and_its_configurations_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert "qexp/conf/config.yaml" in names
    assert sources(REPOSITORY) <= names
    assert {name.split("/")[0] for name in names} == {"qexp"}
    assert not [name for name in names if "__pycache__" in name]


def test_wheel_has_the_command_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        assert b"qexp = qexp.cli:main" in archive.read(f"{info}/entry_points.txt")
        assert b"Apache License" in archive.read(f"{info}/licenses/LICENSE")


def test_installed_package_finds_its_configurations(site, tmp_path):
    code = "import qexp, pathlib; print(pathlib.Path(qexp.__file__).resolve().parent)"
    package = Path(run_installed(site, tmp_path, "-c", code).stdout.strip())
    assert package == (site / "qexp").resolve()
    assert (package / "conf/config.yaml").is_file()


def test_the_installed_command_helps_refuses_and_runs_with_the_users_configs(site, tmp_path):
    (tmp_path / "mine" / "calibration").mkdir(parents=True)
    narrow = {"_target_": "qexp.quant.calibration.Percentile", "percentile": 99.5}
    (tmp_path / "mine" / "calibration" / "narrow.yaml").write_text(
        yaml.safe_dump({"weight": {"_target_": "qexp.quant.calibration.MinMax"}, "activation": narrow})
    )
    command = ["-m", "qexp", "--config-dir", "mine"]
    helped = run_installed(site, tmp_path, *command, "--help")
    assert helped.returncode == 0
    assert "narrow" in helped.stdout
    refused = run_installed(site, tmp_path, *command, "calibration=wide")
    assert refused.returncode == 2
    assert refused.stderr.startswith("qexp: calibration=wide: no such option; allowed are aciq, ")
    fast = ["trainer.epochs=1", "engine=onnxruntime", "engine.seconds=0.05", "logger=csv"]
    done = run_installed(site, tmp_path, *command, "calibration=narrow", *fast)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs" / "runs").iterdir()
    assert json.loads((folder / "metrics.json").read_text())["status"] == "finished"
    assert yaml.safe_load((folder / "config.yaml").read_text())["calibration"]["activation"] == narrow
