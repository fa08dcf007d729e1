"""qexp compare as it is called: what it prints, writes, refuses, and with which exit code."""

import csv
import json
import subprocess
import sys

import pytest

from qexp import cli


@pytest.fixture
def compare(make, capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["compare", *map(str, arguments)])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


def test_it_shows_a_table_and_writes_a_page_and_files(compare, make, tmp_path):
    make.grid()
    files = {name: tmp_path / "deep" / f"a.{name}" for name in ("csv", "latex", "json")}
    code, out, err = compare(make.outputs, *(f"--{name}={path}" for name, path in files.items()))
    assert (code, err) == (0, "")
    assert "12 runs in 4 groups, 3 seeds; mean ± 95 % t-interval" in out
    assert f"page in {make.outputs / 'compare.html'}" in out
    assert (make.outputs / "compare.html").read_text().startswith("<!doctype html>")
    with files["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["n"] for row in rows] == ["3"] * 4
    assert len(json.loads(files["json"].read_text())["groups"]) == 4
    assert files["latex"].read_text().count(r"\\") == 5


def test_the_folder_is_outputs_where_none_is_named(compare, make, monkeypatch):
    make.grid(1)
    monkeypatch.chdir(make.outputs.parent)
    code, out, _ = compare("--no-html", "--group-by=calibration", "--metric=acc,parity/larger", "--metric=acc")
    assert code == 2  # no run has parity/larger
    code, out, _ = compare("--no-html", "--group-by=calibration", "--metric=acc", "--where", "quantizer.bits=8")
    assert code == 2
    code, out, _ = compare("--no-html", "--group-by=calibration", "--metric=acc", "--where", "quantizer.weight.bits=8")
    assert code == 0
    assert "MinMax       1  86.00" in out
    assert not (make.outputs / "compare.html").exists()


def test_a_sweep_with_a_missing_run_and_a_damaged_one_is_shown_without_them_and_fails(compare, make):
    entries = [{"run_id": "0" * 12, "label": "gone", "choice": {"seed": "9"}}]
    for seed in range(3):
        folder = make.run(make.config(seed))
        entries.append({"run_id": folder.name, "label": "", "choice": {"seed": str(seed)}})
    (folder / "metrics.json").write_text("{")
    code, out, err = compare(make.sweep(entries), "--html", make.outputs / "a.html")
    assert code == 1
    assert "2 runs in 1 group, 2 seeds" in out
    assert "000000000000 (gone): sweep sweep lists it" in err
    assert f"{folder}: metrics.json is damaged" in err
    assert "2 of 4 records are not among these figures" in err
    page = (make.outputs / "a.html").read_text()
    assert "metrics.json is damaged" in page
    assert "(gone)" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: is no folder; give an outputs folder, its runs, a run or a sweep"),
        (["OUTPUTS", "--metric=acc/top5"], "--metric acc/top5: no run has it; there are "),
        (["OUTPUTS", "--group-by=colour"], "colour: no run has such a setting; there are "),
        (["OUTPUTS", "--where=calibration=entropy"], "--where calibration=entropy: no run has this value; there are "),
        (["OUTPUTS", "--where=calibration"], "--where calibration: must be KEY=VALUE; qexp compare --help shows"),
        (["OUTPUTS", "--html=a", "--no-html"], "--html and --no-html: one of them"),
        (["OUTPUTS", "--colour"], "unrecognized arguments: --colour"),
        (["EMPTY"], "no finished run is there to compare"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(compare, make, tmp_path, arguments, said):
    make.grid(1)
    empty = tmp_path / "empty"
    (empty / "runs").mkdir(parents=True)
    places = {"OUTPUTS": make.outputs, "EMPTY": empty}
    code, out, err = compare(*(places.get(word, word) for word in arguments))
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("qexp: ")
    assert err.count("\n") == 1


def test_a_page_that_cannot_be_written_is_said(compare, make):
    make.grid(1)
    (make.outputs / "file").touch()
    code, _, err = compare(make.outputs, "--html", make.outputs / "file" / "a.html")
    assert code == 1
    assert "a.html: cannot be written (" in err


def test_different_processors_are_said(compare, make):
    make.run()
    make.run(make.config(1), of_environment=make.environment(cpu="Another CPU"))
    _, out, _ = compare(make.outputs, "--no-html")
    assert "note: runs on 2 processors (A CPU, avx2; Another CPU, avx2), so latencies do not compare" in out


def test_help_and_that_it_starts_without_torch(make):
    make.grid(1)
    code = (
        "import sys; from qexp.compare_cli import main; main(['--help']); "
        f"main([{str(make.outputs)!r}]); print('loaded', [m for m in ('torch', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: qexp compare [FOLDER ...]" in done.stdout
    assert "loaded []" in done.stdout
