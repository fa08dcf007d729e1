"""qexp levels, as it is typed: tables, figures, refusals, and what it must not load."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml
from PIL import Image

from qexp import cli, levels_cli
from qexp.report import levels_table

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where the command is given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "unwind_on_signals", lambda: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    return tmp_path


@pytest.fixture
def qexp(capsys):
    """Gives a command; returns its exit code, stdout and stderr."""

    def give(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(list(words))
        return end.value.code, *capsys.readouterr()

    return give


def column(out: str, row: str) -> list[str]:
    """The cells of a row of the table of formats."""
    (line,) = [line for line in out.splitlines() if line.startswith(f" {row}  ")]
    return re.split(r"\s{2,}", line.strip())[1:]


def test_tables_and_two_pictures_of_a_format(qexp, folder):
    pytest.importorskip("matplotlib")
    code, out, err = qexp("levels", "quantizer=nf4")
    assert (code, err) == (0, "")
    assert column(out, "name") == ["nf4", "uint8"]
    assert column(out, "bits") == ["4", "8"]
    assert column(out, "scale S") == ["float32, per_channel", "float32, per_tensor"]
    assert column(out, "levels") == ["16, non-uniform", "256, uniform"]
    assert column(out, "smallest step") == ["0.0795803 S", "1 S"]
    assert column(out, "largest level") == ["1 S", "S (255 - Z)"]
    assert column(out, "zero exact") == ["yes", "yes"]
    why = "simulation only: nf4, whose values are no 8-bit integers times a scale"
    assert column(out, "int8 engines") == [why, "onnxruntime, openvino"]
    assert re.search(r"^ +-7 +-1 +-0\.848096 $", out, re.MULTILINE)  # the first level and the threshold above it
    assert "uint8 affine, in units" not in out  # 256 levels are not listed
    paths = [f"outputs/levels/nf4-uint8_affine{part}.png" for part in ("", "-histograms")]
    assert out.splitlines()[-1] == f"figures in {' and '.join(paths)}"
    assert all(min(Image.open(folder / path).size) > 800 for path in paths)
    assert {path.name for path in folder.iterdir()} == {"outputs"}


def test_an_svg_where_it_is_asked_for_and_the_options_of_a_run(qexp, folder):
    pytest.importorskip("matplotlib")
    words = ["quantizer=int4", "quantizer.weight.convention=full_range", "rounding=floor", "--out", "new/my.svg"]
    code, out, _ = qexp("levels", *words)
    assert code == 0
    assert column(out, "convention") == ["full_range", "affine"]
    assert column(out, "rounding") == ["floor", "half_even"]
    assert column(out, "smallest level") == ["-8 S", "S (0 - Z)"]
    assert re.search(r"^ +-8 +-8 +-7 $", out, re.MULTILINE)
    assert re.search(r"^ +4 +0 +0\.5 $", out, re.MULTILINE)  # of the activations: Z = 4
    for name in "my.svg", "my-histograms.svg":
        assert ElementTree.parse(folder / "new" / name).getroot().tag.endswith("}svg")


def test_levels_of_a_file(qexp, folder, monkeypatch):
    monkeypatch.setattr(levels_cli, "_draw", lambda *_: None)
    (folder / "my.txt").write_text("-2 -1.5\n0 0.25\n1  # the last\n")
    code, out, _ = qexp("levels", "quantizer=levels", "quantizer.weight.file=my.txt", "quantizer.weight.name=mine")
    assert code == 0
    assert column(out, "name") == ["mine", "uint8"]
    rows = re.findall(r"^ +(-?\d) +(\S+) +(\S*) *$", out[out.index("weights: mine") :], re.MULTILINE)
    assert rows == [("-1", "-2", "-1.5"), ("0", "0", "0.25"), ("1", "1", "")]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["quantizer=nf5"], "qexp: quantizer=nf5: no such option; allowed are apot4"),
        (["quantizer.weight.bits=99"], "qexp: quantizer.weight.bits=99: allowed are the integers 2 to 16"),
        (["quantizer=levels"], "qexp: quantizer.weight.file: a value must be given"),
        (["quantizer=levels", "quantizer.weight.file=no.txt"], "qexp: quantizer.weight.file=no.txt: cannot be read"),
        (["quantizer=nf4", "engine=openvino"], "qexp: engine=openvino: cannot run it, because weights are nf4"),
        (["quantizer=int8,int4"], "qexp: quantizer=int8,int4: several values, but qexp levels shows one"),
        (["experiment=granularity_w4"], "qexp: a sweep of 8 choices, but qexp levels shows one"),
        (["--out", "a.pdf"], "qexp: --out=a.pdf: must end in .png or .svg"),
        (["--out", "a"], "qexp: --out=a: must end in .png or .svg"),
        (["--out"], "qexp: argument --out: expected one argument; qexp levels --help"),
        (["-m"], "qexp: unrecognized arguments: -m; qexp levels --help shows what can be said"),
        (["--config-dir", "/nowhere"], "qexp: --config-dir=/nowhere: no such folder"),
    ],
)
def test_what_is_refused_is_one_sentence_on_stderr_and_code_2(qexp, folder, words, sentence):
    code, out, err = qexp("levels", *words)
    assert (code, out) == (2, "")
    assert err.startswith(sentence)
    assert err.count("\n") == 1
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("words", "blamed"),
    [(["paths.outputs=file"], "paths.outputs"), (["--out", "file/a.png"], "--out=file/a.png")],
)
def test_a_folder_that_cannot_be_written_is_found_first(qexp, folder, words, blamed):
    (folder / "file").touch()
    code, out, err = qexp("levels", *words)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"qexp: {blamed}: cannot write to file")


def test_without_matplotlib_the_tables_come_and_a_sentence_says_how_to_install_it(qexp, folder, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "qexp.report.figures", raising=False)
    monkeypatch.delattr("qexp.report.figures", raising=False)
    code, out, err = qexp("levels", "quantizer=nf4")
    assert code == 2
    assert column(out, "name") == ["nf4", "uint8"]
    command = f"{sys.executable} -m pip install 'matplotlib>=3.10,<4'"
    assert err == f"qexp: the figures need matplotlib, which is not installed: {command}\n"
    assert f'plots = ["{levels_cli.MATPLOTLIB}"]' in (ROOT / "pyproject.toml").read_text()


def loaded_by(*words: str) -> tuple[str, set[str]]:
    """What a command prints, and the modules it leaves loaded."""
    code = (
        "import sys; from qexp.cli import main\n"
        f"try: main({list(words)!r})\n"
        "except SystemExit: print('modules:', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    said, _, modules = done.stdout.partition("modules:")
    return said, set(modules.split())


@pytest.mark.parametrize("words", [["--help"], ["levels", "--help"], ["levels", "quantizer=nf5"]])
def test_help_and_refusals_load_neither_torch_nor_matplotlib(words):
    said, modules = loaded_by(*words)
    assert not modules & {"torch", "matplotlib"}
    if words[-1] == "--help":
        assert "qexp levels" in said


def test_the_engines_of_the_table_are_those_of_the_config():
    engines = yaml.safe_load((ROOT / "conf" / "engine" / "all.yaml").read_text())["engines"]
    assert ", ".join(engines) == levels_table.ENGINES


def test_both_together_may_be_less_than_either(qexp, monkeypatch):
    monkeypatch.setattr(levels_cli, "_draw", lambda *_: None)
    _, out, _ = qexp("levels", "quantizer=fp4_e2m1", "granularity=per_tensor")
    assert "both together are a simulation only, because of the activations" in out
    _, out, _ = qexp("levels", "quantizer=int8")
    assert "both together" not in out


def test_the_page_of_formats_names_every_quantizer_and_the_engines_that_run_it(tmp_path):
    from qexp.jobs import compose_jobs

    page = (ROOT / "docs" / "formats.md").read_text()
    formats, _, calibrations = page.partition("## Calibrations")
    listed = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", calibrations, re.MULTILINE))))
    assert {path.stem.split("_99")[0] for path in (ROOT / "conf" / "calibration").glob("*.yaml")} == listed
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", formats, re.MULTILINE))
    assert rows.keys() == {path.stem for path in (ROOT / "conf" / "quantizer").glob("*.yaml")}
    (tmp_path / "my.txt").write_text("-1\n0\n2\n")
    for name, engines in rows.items():
        file = [f"quantizer.weight.file={tmp_path / 'my.txt'}"] if name == "levels" else []
        (job,) = compose_jobs([f"quantizer={name}", *file], multirun=False)
        assert engines.startswith("simulation only" if job.settings.recipe.simulation_only else "both"), name
    for picture in re.findall(r"\]\((\S+\.svg)\)", page):
        content = (ROOT / "docs" / picture).read_bytes()
        assert len(content) < 200_000
        assert ElementTree.fromstring(content).tag.endswith("}svg")
