"""The conformance table: its command explains every difference, notices a wrong explanation, and has been run."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from qexp.quant.grid import CONVENTIONS, IntegerGrid
from qexp.quant.observers import Observer

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "conformance.md"


@pytest.fixture(scope="module")
def command():
    """scripts/conformance.py as a module; its parts are the package beside it."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import conformance

        yield conformance
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def small_run(command):
    """Cells of torch, ONNX Runtime, OpenVINO and ml_dtypes on few values."""
    tools = [*command.own.tools(), *command.ov.tools(), *command.floats.tools()]
    grids = [*(IntegerGrid(8, name) for name in CONVENTIONS), IntegerGrid(2, "affine"), *command.floats.FORMATS[::3]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "SAMPLE", 90)
        return tools, list(command.measure(tools, grids, 9000))


def test_nothing_is_unexplained(command, small_run):
    _, cells = small_run
    assert command.unexplained(cells) == 0
    assert {cell.format for cell in cells} > set(CONVENTIONS)
    assert {cell.tool for cell in cells} > {"Rational arithmetic", "torch.fake_quantize", "ml_dtypes"}


def test_verdicts_are_the_known_ones(small_run):
    _, cells = small_run
    verdicts = {}
    for cell in cells:
        verdicts.setdefault((cell.tool, cell.aspect), set()).add(cell.verdict)
    assert verdicts["ONNX Runtime QuantizeLinear, DequantizeLinear", "codes"] == {"identical"}
    assert "differs" in verdicts["torch.fake_quantize", "codes"]
    assert verdicts["torch.fake_quantize", "values"] == {"identical"}
    assert "differs" in verdicts["OpenVINO FakeQuantize", "codes"]
    assert "not offered: torch converts to no such type" in verdicts["torch float8", "values"]


def test_qexp_agrees_with_the_definition_on_every_differing_input(small_run):
    _, cells = small_run
    tallies = [cell.tally for cell in cells if cell.tally and cell.tally.checked]
    assert sum(tally.checked for tally in tallies) > 1000
    assert all(tally.right["qexp", "definition"] == tally.checked for tally in tallies)


@pytest.mark.parametrize("wrong", ["formula", "reasons"])
def test_a_wrong_explanation_is_noticed(command, capsys, monkeypatch, wrong):
    monkeypatch.setattr(command, "SAMPLE", 90)
    torch_tool = command.own.tools()[0]
    tool = replace(torch_tool, **{"formula": lambda case: command.own.definition(case) | {
        "gradient": command.own.torch_formula(case)["gradient"]
    }} if wrong == "formula" else {"reasons": ()})  # fmt: skip
    status = command.main(["--values", "4000", "--bits", "8", "--only", "torch"], [tool])
    assert status == 1
    assert "UNEXPLAINED" in capsys.readouterr().out


def test_the_values_are_those_that_could_part_quantizers(command):
    for name in CONVENTIONS:
        grid = IntegerGrid(4, name)
        parts = list(command.cases(grid, "per tensor", 20_000))
        assert sum(part.x.size for part in parts) == 20_000
        for part in parts:
            assert np.isfinite(part.x).all()
            zeros = part.x[part.x == 0]
            assert np.signbit(zeros).any() and not np.signbit(zeros).all()
            assert ((part.x != 0) & (np.abs(part.x) < 2.0**-126)).any()
            assert np.abs(part.x).max() == np.finfo(np.float32).max
        power = parts[-1]  # S = 2^-4: ties in real arithmetic
        assert power.scale.item() == 2.0**-4
        ties = power.x[np.abs(power.x) < 1].astype(np.float64) * 16
        assert {int(np.floor(tie)) % 2 for tie in ties if tie - np.floor(tie) == 0.5} == {0, 1}


def test_rational_arithmetic_judges_ties(command):
    answers = sys.modules["conformance_.exact"].answers
    grid = IntegerGrid(8, "affine")
    assert answers(grid, 0.5, 1.0, 3.0, True) == {"codes": 3.0, "values": 0.0, "gradient": 1.0}
    assert answers(grid, 1.5, 1.0, 3.0, True)["codes"] == 5.0
    # Just below a tie, which the float32 quotient is: by the definition 2, in real arithmetic 1.
    below, third = float(np.float32(1.5) * np.float32(1 / 3)), float(np.float32(1 / 3))
    assert np.float32(below) / np.float32(third) == 1.5 and below < 1.5 * third
    assert [answers(grid, below, third, 0.0, rounded)["codes"] for rounded in (True, False)] == [2.0, 1.0]


def test_an_unknown_package_is_an_error(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--only", "trch"])
    assert "--only trch: allowed are torch, onnxruntime, openvino" in capsys.readouterr().err


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_infinity_and_nan_are_refused(value):
    with pytest.raises(ValueError, match="NaN or infinite"):
        Observer().update(torch.tensor([1.0, value]))


def test_an_observer_that_takes_infinity_is_noticed(command, monkeypatch):
    assert command.refuses_what_is_not_finite() is None
    monkeypatch.setattr(sys.modules["conformance_.definition"], "Observer", Mock)
    with pytest.raises(AssertionError, match="the observer took inf"):
        command.refuses_what_is_not_finite()


def test_the_table_goes_between_the_markers(command, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{command.BEGIN}\nold\n{command.END}\nafter\n")
    command.write(page, "new")
    assert page.read_text() == f"before\n{command.BEGIN}\nnew\n{command.END}\nafter\n"


def test_the_page_has_no_unexplained_row_and_names_everything(command):
    table = PAGE.read_text().split(command.BEGIN)[1].split(command.END)[0]
    assert "UNEXPLAINED" not in table
    assert set(re.findall(r"^### (.+)$", table, re.MULTILINE)) == {
        tool.name for tool in [command.DEFINITION, *command.all_tools()]
    }
    assert all(name in PAGE.read_text() for name in CONVENTIONS)
    assert "1,000,000" in table
