"""What the documentation shows is what the code does: commands compose, blocks run, tables agree."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from qexp.jobs import compose_jobs
from qexp.quant.grid import CONVENTIONS
from qexp.sections import ConfigError
from qexp.tracking import METRICS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Placeholders of the pages, and what stands for them here.
STAND_INS = {"data.root=DIR": "data.root=/tmp", "paths.outputs=DIR": "paths.outputs=/tmp"}


def commands() -> list[list[str]]:
    lines = [line for page in PAGES for line in page.read_text().splitlines()]
    found = [line.split("#")[0] for line in lines if re.match(r"    scripts/qexp\b", line)]
    return [[STAND_INS.get(word, word) for word in shlex.split(line)[1:]] for line in found]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_of_the_docs_composes(words, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "mine.yaml").write_text("_target_: mine.Net\n")
    config_dir = str(tmp_path) if "--config-dir" in words else None
    overrides = [w for w in words if "=" in w]
    try:
        jobs = compose_jobs(overrides, "-m" in words, config_dir)
    except ConfigError as error:
        if "pip install" in str(error):
            pytest.skip(str(error))
        raise
    assert jobs
    assert all(job.settings.method in ("fp32", "ptq", "qat", "dynamic") for job in jobs)


def test_the_table_of_metrics_is_that_of_the_code():
    rows = re.findall(r"^\| `([a-z0-9_/]+)` \| (.+) \|$", (ROOT / "docs" / "results.md").read_text(), re.MULTILINE)
    written = {name: meaning for name, meaning in rows if name in METRICS}
    assert written == METRICS


def test_the_table_of_conventions_names_each_symmetric_one():
    rows = re.findall(
        r"^\| `(\w+)` \| .*max.* \| \[.*\] \| (.+) \|$", (ROOT / "docs" / "results.md").read_text(), re.MULTILINE
    )
    assert dict(rows).keys() == {name for name in CONVENTIONS if name != "affine"}
    for name, who in rows:
        assert CONVENTIONS[name].who.replace(";", ",") == who


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_network_and_data_of_the_docs_run(tmp_path, monkeypatch):
    from qexp.run import run

    (tmp_path / "mine.py").write_text(blocks("extend.md")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (job,) = compose_jobs(
        ["model=custom", "model._target_=mine.Net", "+model.width=8", "data=custom", "data._target_=mine.Data",
         "trainer.epochs=1", "engine.seconds=0.05", "logger=none"], multirun=False,
    )  # fmt: skip
    done = run(job.settings)
    assert done.metrics["status"] == "finished"
    assert {row["layer"] for row in done.rows} == {"conv", "head", "add_0"}


def test_the_core_alone_runs_as_the_docs_say(capsys):
    exec(blocks("extend.md")[1], {})
    assert "Quantizer(int4 restricted, per_channel, minmax, quantize)" in capsys.readouterr().out
