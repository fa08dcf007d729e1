"""The pages of qexp --help, held against the files they are made of, and what completes on Tab."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qexp import cli
from qexp.completion import candidates
from qexp.composing import conf_dir
from qexp.help_page import Configs, page
from qexp.sections import ConfigError

CONF = Path(conf_dir())
FILES = sorted(CONF.rglob("*.yaml"))
GROUPS = Configs().groups
VERBS = {verb: purpose for verb, (_, purpose) in cli.VERBS.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONF).as_posix())
def test_every_file_says_what_it_is_before_anything_else(path):
    lines = [line for line in path.read_text().splitlines() if line != "# @package _global_"]
    assert lines[0].startswith("# ")


def test_every_group_has_a_purpose():
    folders = {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra"}
    assert folders | {"hydra/launcher", "hydra/sweeper"} == set(GROUPS)
    assert all(purpose for _, purpose in GROUPS.values())


@pytest.mark.parametrize("columns", [80, 120])
def test_the_first_page_names_every_verb_choice_and_key(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = page([], None, VERBS)
    words = text.replace(",", " ").split()
    for path in FILES:
        group, name = path.relative_to(CONF).parts[0], path.stem
        if path.parent.parent == CONF or group == "experiment":
            assert (path.relative_to(CONF / group).with_suffix("").as_posix()) in words
        elif group == "hydra":
            assert name in words
    for told in [*GROUPS, *VERBS, "seed=0", "paths.outputs=outputs", "--dry-run", "--config-dir", "-m"]:
        assert told in words
    assert max(map(len, text.splitlines())) <= columns


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("group", GROUPS)
def test_the_page_of_a_group_tells_each_option_with_its_keys(monkeypatch, group, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    text, configs = page([group], None, VERBS), Configs()
    told = " ".join(text.split())
    for name in configs.files(group):
        option = configs.option(group, name)
        assert f"\n  {name}\n" in text
        assert option.title and option.title in told
    assert all(len(line) <= columns or " " not in line.strip() for line in text.splitlines())


def test_keys_of_an_option_come_with_values_and_comments(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "# A net\n# of mine. It has layers.\ndefaults: [resnet8, _self_, {override /data: cifar10}]\n"
        "depth: 3 # of all, at #1\nhead: # the end\n  sizes: [1,\n    2]\nname: 'a # b'\nempty:\n"
    )
    text = " ".join(page(["model"], str(tmp_path), VERBS).split())
    assert "mine A net of mine. as resnet8 with data=cifar10 depth=3 head.sizes=[1, 2] name='a # b' empty=" in text
    assert "model.depth of all, at #1 (mine)" in text
    assert "model.head the end (mine)" in text
    assert "It has layers." in page(["model=mine"], str(tmp_path), VERBS)


def test_groups_of_the_users_own_are_there(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "big.yaml").write_text("# A big one.\nlayers: 9\n")
    assert "\n  teacher" in page([], str(tmp_path), VERBS)
    assert "A big one." in page(["teacher"], str(tmp_path), VERBS)


@pytest.mark.parametrize("text", ["- a\n", "a: [\n", "a: \xff\n"], ids=["list", "unclosed", "latin-1"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"mine\.yaml: (must hold keys|cannot be read)"):
        page(["model"], str(tmp_path), VERBS)


def test_words_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match="--help calibraton: no such group or verb; there are method, "):
        page(["calibraton"], None, VERBS)
    told = page(["bias_correction"], None, VERBS)
    assert told.startswith("  bias_correction=0  calibration samples") and "granularity" not in told
    with pytest.raises(ConfigError, match="calibration=foo: no such option; allowed are minmax, aciq"):
        page(["calibration=foo"], None, VERBS)
    with pytest.raises(ConfigError, match="--config-dir=/nowhere: no such folder"):
        page([], "/nowhere", VERBS)


def test_help_at_the_end_of_a_command_tells_what_it_chooses():
    text = page(["calibration=minmax,mse", "trainer.epochs=3", "experiment=wu2020/table3"], None, VERBS)
    for told in "The extrema: nothing is clipped.", "The range with the least squared error", "Source: Wu et al. 2020":
        assert told in text
    assert page(["trainer.epochs=3"], None, VERBS) == page([], None, VERBS)
    assert page(["quantizer.weight.bits"], None, VERBS) == page(["quantizer"], None, VERBS)


def test_help_of_a_verb(capsys):
    for words in ["--help", "levels"], ["levels", "--help"]:
        assert cli._main(words) == 0
        assert capsys.readouterr().out.startswith("qexp levels: ")


def test_help_loads_neither_torch_nor_wandb():
    code = (
        "import sys; from qexp.cli import _main; _main(['--help', 'model']); print({*sys.modules} & {'torch', 'wandb'})"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.endswith("\nset()\n")


@pytest.mark.parametrize(
    ("line", "among"),
    [
        ("qexp ", ["levels", "quantizer=", "quantizer.", "seed="]),
        ("qexp le", ["levels"]),
        ("qexp quantizer=int", ["quantizer=int4", "quantizer=int8"]),
        ("qexp -m calibration=minmax,m", ["calibration=minmax,mse", "calibration=minmax,moving_average"]),
        ("qexp experiment=wu", ["experiment=wu2020/table3"]),
        ("qexp quantizer=nf4 quantizer.weight.b", ["quantizer.weight.bits="]),
        ("qexp -m seed=0,1 hydra/la", ["hydra/launcher="]),
        ("qexp levels rounding=st", ["rounding=stochastic"]),
        ("scripts/qexp --dr", ["--dry-run"]),
        ("qexp --help gran", ["granularity"]),
        ("qexp --config-dir {folder} model=mi", ["model=mine"]),
        ("qexp paths.outputs={folder}/mo", ["paths.outputs={folder}/model"]),
    ],
)
def test_what_completes(tmp_path, line, among):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("# Mine.\n_target_: a.b\n")
    found = candidates(line.format(folder=tmp_path), list(VERBS))
    assert {text.format(folder=tmp_path) for text in among} <= set(found)
    assert all(text.startswith(line.format(folder=tmp_path).rpartition(" ")[2]) for text in found)


def test_what_does_not_complete():
    assert candidates("qexp compare out", list(VERBS)) == []
    assert candidates("qexp calibration=mse foo", list(VERBS)) == []


def test_only_what_stands_before_the_cursor_counts(monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", "qexp method=q seed=1")
    monkeypatch.setenv("COMP_POINT", "13")
    for shell in "bash", "fish":
        assert cli._main(["-sc", f"query={shell}"]) == 0
        assert capsys.readouterr().out == "method=qat\n"
    monkeypatch.setenv("COMP_LINE", "qexp seed={")
    monkeypatch.setenv("COMP_POINT", "11")
    assert cli._main(["-sc", "query=bash"]) == 0


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("command", ["qexp", "bin/qexp"])
def test_bash_completes_the_installed_command(tmp_path, command):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "qexp").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qexp "$@"\n')
    (tmp_path / "bin" / "qexp").chmod(0o755)
    line = f"{command} quantizer=int"
    script = (
        'eval "$(qexp -sc install=bash)"\ncomplete -p qexp >&2\n'
        f'COMP_LINE="{line}" COMP_POINT={len(line)} COMP_CWORD=1\n'
        'hydra_bash_completion; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=os.environ | path, cwd=tmp_path)
    assert told.stdout.split() == ["quantizer=int8", "quantizer=int16", "quantizer=int4", "quantizer=int8_pow2"]
    assert told.stderr.strip() == "complete -o default -o nospace -F hydra_bash_completion qexp"
