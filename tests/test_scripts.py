"""scripts/qexp, scripts/test and .ci/run, tried in a copy with a python3 that only imitates venv and pip."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
# fmt: off
TOOLS = ["sh", "cat", "chmod", "cksum", "cp", "dirname", "find", "grep", "head", "mkdir", "readlink", "rm",
         "sed", "sleep"]
# fmt: on

# Notes each call in $CALLS; the FAKE_* variables say how to misbehave. What the scripts give to `python -c`
# runs in the real python, behind a prelude that shows it the fake version, modules and site-packages.
FAKE_PYTHON = r"""#!/bin/sh
bin=$(dirname "$0")
if [ "$1" = -c ]; then
    echo "code" >>"$CALLS"
    exec "$REAL_PYTHON" -I -S -c "
import os, sys, sysconfig
sysconfig.get_path = lambda *_: '$bin/../lib'
sys.path.append('$bin/../lib')
sys.version_info = tuple(map(int, os.environ.get('FAKE_VERSION', '3.11.0').split('.')))
if 'FAKE_NO_VENV' in os.environ:
    sys.modules['ensurepip'] = None
$2"
fi
for last; do :; done
echo "$2 begins" >>"$CALLS"
case "$2" in
    venv)
        rm -rf "$last"
        mkdir -p "$last/bin" "$last/lib/pip-1.dist-info"
        : >"$last/pyvenv.cfg"
        cp "$0" "$last/bin/python"
        if [ -n "${FAKE_STUCK:-}" ]; then echo "venv stuck" >>"$CALLS"; sleep 60; fi
        echo "Name: pip" >"$last/lib/pip-1.dist-info/METADATA"
        echo pip >"$last/lib/pip-1.dist-info/INSTALLER"
        ;;
    pip)
        [ -r pyproject.toml ] && [ -r constraints.txt ] || exit 9
        while [ -n "${FAKE_GATE:-}" ] && [ ! -e "$FAKE_GATE" ]; do sleep 0.05; done
        if [ -n "${FAKE_ERROR:-}" ]; then echo "Collecting things"; echo "$FAKE_ERROR"; exit 1; fi
        printf '#!/bin/sh\necho "qexp in $PWD, $# arguments:" "$@"\n' >"$bin/qexp"
        chmod +x "$bin/qexp"
        ;;
    pytest) echo "pytest in $PWD:" "$@"; exit "${FAKE_PYTEST:-0}" ;;
    *) exit 1 ;;
esac
echo "$2 ends" >>"$CALLS"
"""


class Clone:
    """A copy of the scripts in a folder of its own, with a PATH that holds little but the fake python3."""

    def __init__(self, folder: Path):
        self.root = folder / "a clone"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        self.gate = folder / "gate"
        self.bin.mkdir()
        shutil.copytree(REPOSITORY / "scripts", self.root / "scripts")
        shutil.copytree(REPOSITORY / ".ci", self.root / ".ci")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(REPOSITORY / name, self.root)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.python = self.bin / "python3"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        self.started = []

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    def calls(self, what: str | None = None) -> list[str]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line for line in lines if what in (None, line)]

    def start(self, *command, cwd=None, **variables) -> subprocess.Popen:
        # No HOME and no terminal: what works here works in CI.
        environment = {"PATH": str(self.bin), "CI": "true", "REAL_PYTHON": sys.executable}
        environment |= {"CALLS": str(self.calls_file)} | {k: str(v) for k, v in variables.items()}
        process = subprocess.Popen(
            [str(part) for part in command or [self.root / "scripts/qexp"]],
            cwd=cwd or self.root, env=environment, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, *command, **options) -> subprocess.CompletedProcess:
        process = self.start(*command, **options)
        out, err = process.communicate(timeout=30)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def wait_for_call(self, call: str) -> None:
        end = time.monotonic() + 20
        while not self.calls(call):
            assert time.monotonic() < end, f"no call {call!r}"
            time.sleep(0.02)


@pytest.fixture
def clone(tmp_path):
    clone = Clone(tmp_path)
    yield clone
    for process in clone.started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def assert_fails_with_one_sentence(result, *words):
    sentences = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
    assert result.returncode != 0
    assert len(sentences) == 1 and sentences[0].startswith("qexp: "), result.stderr
    for word in words:
        assert word in sentences[0]


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_first_run_installs_and_later_runs_start_no_python(clone, shell):
    if not shutil.which(shell):
        pytest.skip(f"no {shell}")
    command = [shutil.which(shell), clone.root / "scripts/qexp", "model=mlp", "two words"]
    first = clone.run(*command)
    assert (first.returncode, first.stdout) == (
        0,
        f"qexp in {clone.root}, 2 arguments: model=mlp two words\n",
    )
    assert len(first.stderr.splitlines()) == 1 and first.stderr.startswith("qexp: Setting up")
    assert clone.calls("venv begins") == ["venv begins"] and clone.calls("pip ends") == ["pip ends"]

    before = clone.calls()
    second = clone.run(*command)
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert clone.calls() == before


def test_either_script_may_come_first(clone, tmp_path):
    result = clone.run(clone.root / "scripts/test", "-k", "x", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, f"pytest in {clone.root}: -m pytest -k x\n")
    assert clone.run().stderr == ""


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(clone, name):
    clone.run()
    with open(clone.root / name, "a") as file:
        file.write("\n# changed\n")
    assert clone.run().returncode == 0
    assert len(clone.calls("pip ends")) == 2 and len(clone.calls("venv ends")) == 1
    assert clone.run().stderr == ""


def test_moved_clone_is_installed_anew(clone):
    clone.run()
    clone.root = clone.root.rename(clone.root.with_name("moved clone"))
    assert clone.run().returncode == 0
    assert len(clone.calls("pip ends")) == 2


def test_environment_whose_python_is_gone_is_remade(clone):
    clone.run()
    (clone.venv / "bin/python").unlink()
    (clone.venv / "bin/python").symlink_to("no-such-python")
    assert clone.run().returncode == 0
    assert len(clone.calls("venv ends")) == 2


def test_set_up_killed_while_the_environment_is_made_is_taken_up_again(clone):
    first = clone.start(FAKE_STUCK=1)
    clone.wait_for_call("venv stuck")
    os.killpg(first.pid, signal.SIGKILL)
    assert clone.run().returncode == 0
    assert len(clone.calls("venv ends")) == 1


def test_set_up_killed_with_its_pip_is_taken_up_again(clone):
    first = clone.start(FAKE_GATE=clone.gate)
    clone.wait_for_call("pip begins")
    os.killpg(first.pid, signal.SIGKILL)
    # As a killed pip leaves them: a package whole, one lacking a file, one not yet signed as installed.
    packages = {"whole": ("pip", True), "lacking": ("pip", False), "unsigned": (None, True)}
    for name, (installer, has_file) in packages.items():
        info = clone.venv / "lib" / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\n")
        (info / "RECORD").write_text(f"{name}.py,,\n__pycache__/{name}.pyc,,\n")
        if installer:
            (info / "INSTALLER").write_text(installer)
        if has_file:
            (clone.venv / "lib" / f"{name}.py").touch()
    second = clone.run()
    assert second.returncode == 0 and second.stdout.startswith("qexp in")
    assert {path.name for path in (clone.venv / "lib").glob("*-1.dist-info")} == {
        "pip-1.dist-info",
        "whole-1.dist-info",
    }
    assert clone.run().stderr == ""


def test_set_up_waits_for_the_pip_of_a_killed_one(clone):
    first = clone.start(FAKE_GATE=clone.gate)
    clone.wait_for_call("pip begins")
    first.kill()
    second = clone.start()
    assert "is running; waiting for it" in second.stderr.readline()
    clone.gate.touch()
    assert second.wait(30) == 0
    assert [call for call in clone.calls() if "pip" in call] == ["pip begins", "pip ends"] * 2


def test_second_set_up_waits_for_the_first_and_installs_nothing(clone):
    first = clone.start(FAKE_GATE=clone.gate)
    clone.wait_for_call("pip begins")
    second = clone.start(clone.root / "scripts/test")
    assert "is running; waiting for it" in second.stderr.readline()
    assert second.poll() is None
    clone.gate.touch()
    assert (first.wait(30), second.wait(30)) == (0, 0)
    assert second.stdout.read().startswith("pytest in")
    assert len(clone.calls("venv begins")) == len(clone.calls("pip begins")) == 1


def test_many_first_commands_at_once_install_once(clone):
    processes = [clone.start() for _ in range(4)]
    assert [process.wait(30) for process in processes] == [0] * 4
    assert len(clone.calls("pip begins")) == 1


def test_works_from_another_folder_and_through_a_link(clone, tmp_path):
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    link = elsewhere / "link"
    link.symlink_to("../a clone/scripts/qexp")
    assert clone.run(link, "here", cwd=elsewhere).stdout == f"qexp in {elsewhere}, 1 arguments: here\n"
    assert clone.run("../a clone/scripts/qexp", cwd=elsewhere).stdout == f"qexp in {elsewhere}, 0 arguments:\n"
    assert len(clone.calls("pip begins")) == 1 and clone.venv.is_dir()


def test_environment_folder_can_be_chosen(clone, tmp_path):
    assert clone.run(cwd=tmp_path, QEXP_VENV="envs/mine/").returncode == 0
    assert (tmp_path / "envs/mine/bin/qexp").exists() and not clone.venv.exists()


def test_folder_that_is_no_environment_is_left_alone(clone, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    assert_fails_with_one_sentence(clone.run(QEXP_VENV=mine), str(mine), "not being a virtual environment")
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def test_python_that_is_missing(clone):
    clone.python.unlink()
    assert_fails_with_one_sentence(clone.run(), "3.11 or newer", "python3 was not found")


def test_python_that_is_too_old(clone):
    assert_fails_with_one_sentence(clone.run(FAKE_VERSION="3.9.2"), "3.11 or newer", "python3 is 3.9.2")
    assert not clone.venv.exists()


def test_newer_python_beside_an_old_one_is_taken(clone):
    shutil.copy(clone.python, clone.bin / "python3.12")
    clone.python.write_text(f'#!/bin/sh\nFAKE_VERSION=3.9.2 exec "{clone.bin}/python3.12" "$@"\n')
    assert clone.run().returncode == 0


def test_python_asked_for_is_the_one_taken(clone):
    assert_fails_with_one_sentence(clone.run(PYTHON="no-python"), "no-python was not found")
    clone.python.rename(clone.bin / "my python")
    assert clone.run(PYTHON=clone.bin / "my python").returncode == 0


def test_python_without_venv(clone):
    assert_fails_with_one_sentence(clone.run(FAKE_NO_VENV=1), "venv", "apt install python3-venv")


def test_folder_that_cannot_be_written(clone, tmp_path):
    (tmp_path / "file").touch()
    result = clone.run(QEXP_VENV=tmp_path / "file/env")
    assert_fails_with_one_sentence(result, "Cannot write", str(tmp_path / "file/env"))


NO_RELEASE = "ERROR: No matching distribution found for torch==2.13.0"
NO_PINNED_RELEASE = """ERROR: Cannot install qexp because these package versions have conflicting dependencies.
The conflict is caused by:
    qexp 0.1.0 depends on torch<2.14 and >=2.11
    The user requested (constraint) torch==2.13.0
ERROR: ResolutionImpossible: for help visit a page"""


@pytest.mark.parametrize("error", [NO_RELEASE, NO_PINNED_RELEASE])
def test_package_that_cannot_be_had(clone, error):
    result = clone.run(FAKE_ERROR=error)
    log = clone.root / ".venv-setup.log"
    assert_fails_with_one_sentence(result, "no release of torch==2.13.0 that fits", str(log))
    assert "Collecting things" in log.read_text()
    assert result.stdout == ""
    assert clone.run().returncode == 0  # and once it can be had, all is well


def test_pip_that_fails_otherwise(clone):
    result = clone.run(FAKE_ERROR="ERROR: [Errno 28] No space left on device")
    assert_fails_with_one_sentence(result, "No space left on device", ".venv-setup.log")


@pytest.mark.parametrize("code", [0, 3])
def test_ci_says_what_it_runs_and_returns_its_code(clone, tmp_path, code):
    result = clone.run(clone.root / ".ci/run", cwd=tmp_path, FAKE_PYTEST=code)
    assert result.returncode == code
    assert result.stdout.splitlines() == ["+ scripts/test ", f"pytest in {clone.root}: -m pytest"]
