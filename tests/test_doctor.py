"""What qexp doctor finds, and what it never tells."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qexp import doctor, doctor_cli
from qexp.doctor import NOTE, OK, PROBLEM
from qexp.sections import ConfigError

ROOT = Path(doctor.__file__).parents[1]
KEY = "0123456789abcdef" * 2 + "fedcba98"
LIBRARIES = [name for names in doctor.PROCESSES for name in names]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where the command is given, and a home to look into."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith(("WANDB", "NETRC"))]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    return tmp_path


@pytest.fixture
def all_well(monkeypatch):
    """Libraries that answer at once."""
    answers = {name: {} for name in LIBRARIES}
    answers["torch"] = {"version": "2.0", "build": "", "gpus": [], "threads": 1}
    answers["onnxruntime"] = answers["openvino"] = {"version": "1.0", "saturates": False}
    answers["wandb"] = {"version": "0.31", "mode": "", "host": "api.wandb.ai", "key": True, "online": True}
    monkeypatch.setattr(doctor, "probed", lambda names: {name: answers[name] for name in names})
    monkeypatch.setattr(doctor, "_installed", lambda package: "1.0")
    return answers


def found(check: str, outputs: str = "outputs") -> list[doctor.Finding]:
    return [finding for finding in doctor.findings(Path(outputs)) if finding.check == check]


def test_the_command_looks_at_everything_and_leaves_nothing():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_API_KEY": KEY}
    command = [sys.executable, "-m", "qexp", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stderr == ""
    for told in (
        "Python", "versions", "processor", "torch", "training", "data sets", "ONNX Runtime", "OpenVINO",
        "C++ compiler", "W&B", "qexp compare", "figures", "search", "Slurm", "Ray", "outputs", "file locks",
    ):  # fmt: skip
        assert f"\n {told} " in done.stdout
    assert done.stdout.count("runs int8") == 2
    assert "a key for" in done.stdout and "logger=wandb is online" in done.stdout
    assert done.returncode == (" problem " in done.stdout)
    assert not list(Path().glob("outputs")) and not list(Path("home").iterdir())
    assert not any(KEY[i : i + 4] in done.stdout for i in range(len(KEY) - 4))


@pytest.mark.parametrize(
    "netrc",
    [
        f"machine {{host}} login user password {KEY}\n",
        f"machine {{host}} login user passwort {KEY}\n",
        f"machine {{host}} {KEY}\n",
    ],
    ids=["whole", "misspelt", "torn"],
)
def test_no_part_of_a_key_in_a_netrc_is_told(folder, netrc):
    (answer,) = doctor.probed(["wandb"]).values()
    assert answer["key"] is False
    (folder / "home" / ".netrc").write_text(netrc.format(host=answer["host"]))
    (folder / "home" / ".netrc").chmod(0o600)
    (answer,) = doctor.probed(["wandb"]).values()
    (row,) = doctor._wandb(answer)
    assert not any(KEY[i : i + 4] in f"{row}{answer}" for i in range(len(KEY) - 4))
    if "password" in netrc:
        assert (row.state, answer["key"]) == (OK, True)


@pytest.mark.parametrize("key", [KEY[:7], f"local-{KEY}x", f"{KEY}\n{KEY}"])
def test_no_part_of_an_odd_key_is_told(monkeypatch, key):
    monkeypatch.setenv("WANDB_API_KEY", key)
    (answer,) = doctor.probed(["wandb"]).values()
    (row,) = doctor._wandb(answer)
    assert key[:4] not in f"{row}{answer}" and KEY[:4] not in f"{row}{answer}"


def test_a_host_is_told_without_what_else_is_in_its_address(monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", f"https://user:{KEY}@wandb.example.org:8080")
    (answer,) = doctor.probed(["wandb"]).values()
    assert KEY not in str(answer)


@pytest.mark.parametrize(
    ("mode", "key", "told"),
    [
        ("", True, "logger=wandb is online"),
        ("offline", True, "logger=wandb is offline (WANDB_MODE=offline)"),
        ("", False, "logger=wandb keeps its record offline"),
    ],
)
def test_what_the_logger_would_choose(monkeypatch, mode, key, told):
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    (row,) = doctor._wandb(doctor.probed(["wandb"])["wandb"])
    assert told in row.what


def test_a_broken_package_is_found_and_the_others_are_looked_at_all_the_same(folder, monkeypatch):
    broken = folder / "broken"
    broken.mkdir()
    (broken / "optuna.py").write_text("raise ImportError('libfoo.so.1: cannot open\\nshared object file')\n")
    (broken / "plotly.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)\n")
    (broken / "sklearn.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    answers = doctor.probed(["data", "page", "optuna", "wandb"])
    assert answers["data"]["error"] == "its process ended with code 3"
    assert answers["page"]["error"] == "its process was ended by SIGILL"
    assert answers["optuna"]["error"] == "ImportError: libfoo.so.1: cannot open shared object file"
    assert "error" not in answers["wandb"]
    (row,) = doctor._optional("optuna", answers["optuna"])
    assert (row.check, row.state) == ("search", PROBLEM)
    assert "pip install --force-reinstall --no-deps 'optuna<6,>=4.9'" in row.todo
    (row,) = doctor._required("data", answers["data"])
    assert row.state == PROBLEM and "scikit-learn" in row.todo


def test_a_package_that_hangs_is_found(folder, monkeypatch):
    (folder / "optuna.py").write_text("import time; time.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(doctor, "PATIENCE_S", 1)
    assert doctor.probed(["optuna"])["optuna"]["error"] == "does not answer within 1 s"


def test_a_file_of_that_name_where_the_command_is_given_is_not_the_package(folder):
    (folder / "optuna.py").write_text("raise ImportError('mine')\n")
    assert "mine" not in str(doctor.probed(["optuna"]))


def test_a_check_that_fails_is_a_finding(all_well, monkeypatch):
    monkeypatch.setattr(doctor, "processor", lambda: 1 / 0)
    (row,) = found("processor")
    assert row == ("processor", PROBLEM, "could not be checked (ZeroDivisionError: division by zero)", "")
    assert doctor_cli.main([]) == 1


def test_the_exit_code_tells_of_problems(all_well, capsys):
    notes = [finding for finding in doctor.findings(Path("outputs")) if finding.state != OK]
    assert doctor_cli.main([]) == any(finding.state == PROBLEM for finding in notes)
    all_well["torch"] = {"error": "OSError: no"}
    assert doctor_cli.main([]) == 1
    out = capsys.readouterr().out
    assert "does not work (OSError: no)" in out
    assert "-m pip install --force-reinstall --no-deps 'torch<2.14,>=2.11'" in out


def test_what_fails_for_want_of_torch_is_not_blamed(all_well):
    for name in "torch", "training", "onnxruntime":
        all_well[name] = {"error": "ImportError: no symbol"}
    rows = {finding.check: finding for finding in doctor.findings(Path("outputs"))}
    assert rows["torch"].todo
    for check in "training", "ONNX Runtime":
        assert rows[check].state == PROBLEM and not rows[check].todo and "because torch does not" in rows[check].what


@pytest.mark.parametrize("columns", [80, 120])
def test_no_row_of_the_table_is_wider_than_the_terminal(all_well, monkeypatch, capsys, columns):
    from rich.console import Console

    monkeypatch.setattr("qexp.report.terminal.output", Console(width=columns, highlight=False))
    doctor_cli.main([])
    assert max(map(len, capsys.readouterr().out.partition("What to do")[0].splitlines())) <= columns


@pytest.mark.parametrize(
    ("changed", "state", "told"),
    [
        ({"build": "CUDA 12.6", "gpus": ["H100", "H100"]}, OK, "2 GPUs: H100, for trainer=gpu"),
        ({"build": "CUDA 12.6"}, NOTE, "no GPU is visible"),
        ({}, OK, "no GPU, which nothing here needs"),
    ],
)
def test_gpus(all_well, monkeypatch, changed, state, told):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (row,) = doctor._torch(all_well["torch"] | changed)
    assert row.state == state and told in row.what


def test_an_engine_that_saturates_is_a_note(all_well):
    (row,) = doctor._engine("OpenVINO", "openvino", {"version": "1", "saturates": True})
    assert row.state == NOTE and "saturate in 16 bits" in row.what


def test_slurm_needs_its_plugin_and_sbatch(all_well, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (row,) = doctor._optional("slurm", {})
    assert row.state == NOTE and "no sbatch on PATH" in row.what
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert next(doctor._optional("slurm", {})).state == OK
    monkeypatch.setattr(doctor, "_installed", lambda package: None)
    (row,) = doctor._optional("slurm", {"error": "no module"})
    assert row.state == NOTE and "not installed (for hydra/launcher=slurm), though sbatch is here" in row.what


def test_versions_outside_of_the_declared_ranges(monkeypatch):
    there = {"torch": "2.14.0", "rich": "15.1", "optuna": "9.0"}
    wanted = ["torch>=2.11,<2.14", "rich>=15,<16", "numpy>=2", 'optuna<6; extra == "search"', 'ray>=2; extra == "ray"']
    monkeypatch.setattr(doctor, "requires", lambda _: wanted)
    monkeypatch.setattr(doctor, "_installed", there.get)
    rows = {finding.what.split()[0]: finding for finding in doctor._versions()}
    assert {name: row.state for name, row in rows.items()} == {"torch": PROBLEM, "numpy": PROBLEM, "optuna": NOTE}
    assert rows["torch"].what == "torch 2.14.0; qexp is made for <2.14,>=2.11"
    assert rows["numpy"].todo.endswith("-m pip install 'numpy>=2'")


def test_a_compiler(folder, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (row,) = doctor._compiler()
    assert row.state == NOTE and "no no-such-compiler on PATH" in row.what
    fake = folder / "c++"
    fake.write_text("#!/bin/sh\necho 'a.cpp:2:10: fatal error: omp.h: No such file' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    (row,) = doctor._compiler()
    assert row.state == NOTE and "fatal error: omp.h" in row.what


@pytest.mark.parametrize(("outputs", "named"), [("/proc/qexp/below", "/proc"), ("file/below", "file")])
def test_a_folder_that_cannot_be_written_is_named(folder, outputs, named):
    (folder / "file").touch()
    (row,) = doctor._outputs(Path(outputs))
    assert row.state == PROBLEM and f"cannot write to {folder / named}: " in row.what


def test_a_folder_that_is_not_there_yet_is_looked_at_and_not_made(folder):
    (row,) = doctor._outputs(Path("a/b"))
    assert row.state == OK and f"it is made by the first run in {folder}" in row.what
    assert not (folder / "a").exists()


def test_little_room_is_told(folder, monkeypatch):
    for free, state in (10**12, OK), (5 * 10**8, NOTE), (10**7, PROBLEM):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert next(doctor._outputs(folder)).state == state


def test_locks(folder, monkeypatch):
    (row,) = doctor._locks(folder)
    assert row.state == OK
    monkeypatch.setattr(doctor, "_file_system", lambda _: ("nfs4", ["rw", "local_lock=all"]))
    (row,) = doctor._locks(folder)
    assert row.state == NOTE and "work on this nfs4 file system, but are known to this machine alone" in row.what

    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(doctor.fcntl, "flock", refuse)
    (row,) = doctor._locks(folder)
    assert row.state == PROBLEM and "No locks available" in row.what


def test_locks_that_keep_nobody_out(folder, monkeypatch):
    monkeypatch.setattr(doctor.fcntl, "flock", lambda *_: None)
    (row,) = doctor._locks(folder)
    assert row.state == PROBLEM and "keep nobody out" in row.what


def test_runs_without_a_result_are_counted(folder):
    outputs = folder / "outputs"
    for name, text in {"a": "{}", "b": "{"}.items():
        (outputs / "runs" / name).mkdir(parents=True)
        (outputs / "runs" / name / "metrics.json").write_text(text)
    for part in "logs", "failed", ".unfinished/d.new":
        (outputs / part).mkdir(parents=True)
    for name in "abcde":
        (outputs / "logs" / f"{name}.txt").touch()
    (outputs / "failed" / "c.json").write_text(json.dumps({"sentence": "no"}))
    rows = {finding.what: finding for finding in doctor._runs(outputs)}
    assert list(rows) == [
        f"2 finished in {outputs}", "1 run failed at the last attempt",
        "2 runs began and never ended: killed, most likely", f"1 run cannot be read, such as {outputs / 'runs' / 'b'}",
        "1 folder half written, which killed runs have left",
    ]  # fmt: skip
    (outputs / ".unfinished" / "e.running").touch()
    with (outputs / ".unfinished" / "e.running").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        told = [finding.what for finding in doctor._runs(outputs)]
    assert f"2 finished in {outputs}, 1 under way" in told
    assert "1 run began and never ended: killed, most likely" in told


def test_a_large_cache_is_told(folder, monkeypatch):
    (folder / "outputs" / "cache" / "float").mkdir(parents=True)
    (folder / "outputs" / "cache" / "float" / "x").write_bytes(b"0" * 5000)
    (row,) = doctor._cache(Path("outputs"))
    assert row == ("cache", OK, "outputs/cache holds 5 KB", "")
    monkeypatch.setattr(doctor, "MUCH", 4000)
    assert next(doctor._cache(Path("outputs"))).todo.startswith("rm -r outputs/cache: ")


def test_help_and_what_is_refused(capsys):
    assert doctor_cli.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("qexp doctor: ")
    with pytest.raises(ConfigError, match="--foo; qexp doctor --help shows what can be said"):
        doctor_cli.main(["--foo"])
