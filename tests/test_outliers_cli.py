"""qexp outliers, as it is typed: a table, a file, a picture, and what is refused."""

import csv
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from qexp import cli
from qexp.report.outliers import COLUMNS

FAST = ["model.width=4", "trainer.epochs=1", "data.calibration_size=32"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where the command is given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "unwind_on_signals", lambda: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


@pytest.fixture
def qexp(capsys):
    """Gives a command; returns its exit code, stdout and stderr."""

    def give(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(list(words))
        return end.value.code, *capsys.readouterr()

    return give


def test_a_table_a_file_and_a_picture(qexp, folder):
    pytest.importorskip("matplotlib")
    code, out, _ = qexp("outliers", *FAST)
    assert code == 0
    place = Path("outputs/outliers/resnet8-Digits")
    assert out.rstrip().endswith(f"all sites in {place / 'outliers.csv'}, the picture in {place / 'outliers.png'}")
    assert Image.open(place / "outliers.png").width > 500
    with (place / "outliers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert rows[0]["site"] == "stem.conv.input" and rows[0]["channels"] == "1" and rows[0]["tokens"] == "2048"
    assert (rows[1]["site"], rows[1]["also"]) == ("stage1.0.conv1.input", "stage1.0.add.b")
    assert [row["channels"] for row in rows[-2:]] == ["16", "16"]
    for row in rows:
        assert float(row["sigmas"]) == pytest.approx(float(row["largest"]) / float(row["sigma"]))
        assert re.search(rf"^ {re.escape(row['site'])}", out, re.MULTILINE)
    assert not (folder / "outputs" / "runs").exists()  # it is no run


def test_an_svg_where_it_is_wanted(qexp, folder):
    pytest.importorskip("matplotlib")
    code, out, _ = qexp("outliers", *FAST, "--output", "mine/far.svg")
    assert code == 0 and (folder / "mine" / "far.svg").stat().st_size and (folder / "mine" / "far.csv").stat().st_size


REFUSED = {
    "seed=0,1": "seed=0,1: several values, but qexp outliers looks at one choice at a time",
    "experiment=granularity_w4": "a sweep of 8 choices, but qexp outliers looks at one at a time",
    "--output=x.gif": "--output=x.gif: must end in .png or .svg",
    "--more": "unrecognized arguments: --more; qexp outliers --help shows what can be said",
    "model=foo": "model=foo: no such option",
    "smoothing=smoothquant": "smoothing=smoothquant: ResNet has no LayerNorm to smooth behind; choose none",
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence(qexp, asked):
    code, out, err = qexp("outliers", asked)
    assert code == 2 and out == ""
    assert REFUSED[asked] in err.splitlines()[-1]


def test_help_says_what_is_counted(qexp):
    for words in ("outliers", "--help"), ("--help", "outliers"):
        code, out, _ = qexp(*words)
        assert code == 0 and "exceeds 6 standard deviations" in " ".join(out.split())
