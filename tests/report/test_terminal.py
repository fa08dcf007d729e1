"""What the terminal shows: tables that fit, words that survive, progress where nobody watches."""

import io

import pytest
from rich.console import Console

from qexp.report import terminal

METRICS = {
    "acc/fp32": 0.99, "acc/sim": 0.5, "acc/engine": 0.9, "acc/drop": 0.09, "sqnr/output_db": 12.34,
    "parity/identical": 0.99999, "int8/mac_coverage": 1.0, "latency/speedup": 1.5,
    "size/packed_bytes": 81920, "acc/ptq": 0.8, "acc/control": 0.98,
}  # fmt: skip
ROWS = [
    {"choice": {"model": "mobilenet", "quantizer.exclude": "[stem]"}, "metrics": METRICS, "run_id": "0123456789ab"},
    {"choice": {"model": "resnet8", "quantizer.exclude": "[]"}, "metrics": None, "run_id": "ba9876543210"},
]


def drawn(table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(console))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [70, 80, 90, 100, 120, 200])
def test_a_sweeps_table_fits_and_keeps_the_choices_the_drop_and_the_runs(width):
    text = drawn(lambda console: terminal.sweep_table(ROWS, console), width)
    assert max(len(line) for line in text.splitlines()) <= width
    for word in (
        "mobilenet",
        "resnet8",
        "[stem]",
        "[]",
        "90.00",
        "9.00",
        "1.50x",
        "failed",
        "0123456789ab",
        "ba9876543210",
    ):
        assert word in text
    missing = [heading for heading in terminal.SWEEP_COLUMNS if heading not in text]
    assert not missing
    assert ("a wider terminal also shows" in text) == (width <= 120)


def test_a_simulation_is_not_shown_as_an_engine():
    simulated = {name: value for name, value in METRICS.items() if name.startswith(("acc/fp32", "acc/sim", "acc/drop"))}
    text = drawn(lambda _: terminal.run_table(simulated, [], "a run"), 100)
    assert "accuracy, simulated" in text
    assert "int8 engine" not in text
    assert "latency" not in text


def test_the_winner_comes_first_and_float_layers_by_name():
    engine = {"acc/engine": 0.5, "latency/fp32_ms": 2.0, "latency/int8_ms": 1.0, "int8/island_names": "stem, head"}
    metrics = {f"{name}/{key}": value for name in ("a", "b") for key, value in engine.items()}
    text = drawn(lambda _: terminal.run_table(metrics | {"engine/winner": "b", **engine}, ["a", "b"], "a run"), 100)
    heading = next(line for line in text.splitlines() if "b *" in line)
    assert heading.index("b *") < heading.index(" a ")
    assert "stem, head" in text
    assert "2 -> 1 ms" in text


def test_a_log_gets_a_line_every_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, 5.0, 30.0, 31.0, 60.0, 70.0, 80.0])
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: next(clock))
    log = terminal._logging("training")
    for done in 1, 2, 3, 6:  # after 5, 30, 31 and 60 seconds
        log(done, 12)
    lines = capsys.readouterr().err.splitlines()
    assert [line.strip() for line in lines] == ["training: 2/12, 0:02:30 to go", "training: 6/12, 0:01:00 to go"]


def test_names_of_float_layers_are_whole_on_a_narrow_terminal():
    name = "blocks.0.attention.scaled_dot_product_attention"
    metrics = {f"{engine}/int8/island_names": name for engine in ("a", "b")}
    text = drawn(lambda _: terminal.run_table(metrics, ["a", "b"], "a run"), 80)
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_layers_in_float_are_told_by_reason_and_many_of_them_by_number():
    rows = [[f"layers.{i}.norm", "LayerNorm", "works element by element"] for i in range(6)]
    rows += [["embed", "Embedding", "a lookup, no matrix product"]]
    assert terminal._in_float(rows) == [
        "in float: layers.0.norm, layers.1.norm, layers.2.norm, layers.3.norm and 2 more (LayerNorm): works element by "
        "element",
        "in float: embed (Embedding): a lookup, no matrix product",
    ]
    five = [[f"norm{i}", "LayerNorm", "none"] for i in range(5)]
    assert terminal._in_float(five) == ["in float: norm0, norm1, norm2, norm3, norm4 (LayerNorm): none"]
