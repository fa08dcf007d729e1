"""Every kind of folder, and that whatever cannot be read is named."""

import shutil

import pytest

from qexp import papers
from qexp.compare import Beside, groups_of, paper_of, read
from qexp.compare.records import outputs_of
from qexp.report.comparison import paper_columns
from qexp.sections import ConfigError


def test_an_outputs_folder_its_runs_and_a_run(make):
    one, two = make.run(), make.run(make.config(1))
    (make.outputs / "runs" / ".hidden").mkdir()
    for folder, expected in (make.outputs, [one, two]), (make.outputs / "runs", [one, two]), (two, [two]):
        assert [run.folder for run in read([folder]).runs] == expected
        assert outputs_of(folder).resolve() == make.outputs.resolve()
    assert len(read([make.outputs, one]).runs) == 2


def test_what_holds_no_runs_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing: is no folder; give an outputs folder, its runs, a run or a sweep"):
        read([tmp_path / "nothing"])
    with pytest.raises(ConfigError, match="holds no runs"):
        read([tmp_path])


def test_the_same_run_elsewhere_counts_once(make, tmp_path):
    one = make.run()
    shutil.copytree(make.outputs, tmp_path / "copy")
    records = read([make.outputs, tmp_path / "copy"])
    assert [run.folder for run in records.runs] == [one]
    assert "the same run as" in records.repeated[0]


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("metrics.json", "{", "metrics.json is damaged"),
        ("metrics.json", "[]", "it holds no mapping"),
        ("metrics.json", '{"status": "running"}', "its status is 'running', not finished"),
        ("metrics.json", None, "metrics.json is not there"),
        ("config.yaml", "a: [", "config.yaml is damaged"),
        ("config.yaml", None, "config.yaml is not there"),
        ("config.yaml", "a: 2020-01-01", "config.yaml is damaged"),
        ("environment.json", "\0", "environment.json is damaged"),
        ("environment.json", '{"versions": 1}', "environment.json is damaged"),
        ("layers.csv", "site,kind,sqnr_db\na,b\n", "layers.csv is damaged"),
        ("layers.csv", "a,b\n1,2\n", "layers.csv is damaged"),
        ("finetune.csv", "epoch,loss\n1,2,3\n", "finetune.csv is damaged"),
    ],
)
def test_a_damaged_record_is_named_and_the_others_are_read(make, file, content, why):
    whole, hurt = make.run(), make.run(make.config(1))
    if content is None:
        (hurt / file).unlink()
    else:
        (hurt / file).write_text(content)
    records = read([make.outputs])
    assert [run.folder for run in records.runs] == [whole]
    (said,) = records.damaged
    assert said.startswith(f"{hurt}: ")
    assert why in said


def test_a_sweep_lists_what_is_missing(make):
    there = make.run()
    sweep = make.sweep([
        {"run_id": there.name, "label": "one", "choice": {"seed": "0"}},
        {"run_id": "ffffffffffff", "label": "another", "choice": {"seed": "1"}},
    ])  # fmt: skip
    records = read([sweep])
    assert [run.choice for run in records.runs] == [{"seed": "0"}]
    (said,) = records.missing
    assert said.startswith("ffffffffffff (another): sweep sweep lists it")
    assert outputs_of(sweep).resolve() == make.outputs.resolve()
    (sweep / "results.json").write_text('[{"run_id": "ffffffffffff", "failed": "it ran out of memory"}]')
    assert read([sweep]).missing == ["ffffffffffff (another): sweep sweep lists it, it ran out of memory"]


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": 1, "sweep_id": "a"}', '{"runs": [{}], "sweep_id": "a"}'])
def test_a_damaged_sweep_is_refused(make, content):
    folder = make.sweep([])
    (folder / "sweep.json").write_text(content)
    with pytest.raises(ConfigError, match=r"sweep\.json: "):
        read([folder])


PAPER = """
source: Somebody et al. 2020, Table 5
trend: no calibration wins everywhere
metric: acc/engine
unit: top-1 %
note: on ImageNet
rows:
  - {choice: {calibration: minmax, quantizer.weight.bits: 8}, network: ResNet-50, value: 75.0, fp32: 76.2}
  - {choice: {calibration: percentile_99.9, quantizer.weight.bits: 8}, network: ResNet-50, value: 75.9}
  - {choice: {calibration: minmax, quantizer.weight.bits: 8}, network: MobileNet, value: 69.5, fp32: 71.9}
  - {choice: {calibration: minmax, quantizer.weight.bits: 4}, network: MobileNet, value: 60}
"""


@pytest.fixture
def papers_folder(tmp_path, monkeypatch):
    load = papers.load
    monkeypatch.setattr(papers, "load", lambda experiment: load(experiment, tmp_path / "papers"))
    (tmp_path / "papers" / "some2020").mkdir(parents=True)
    return tmp_path / "papers"


@pytest.fixture
def swept(make):
    entries = []
    for word, calibration in ("minmax", make.MINMAX), ("mse", make.MSE):
        for model in "resnet8", "mobilenet":
            of_config = make.config(0, 8, calibration, model={"_target_": f"a.{model}"})
            folder = make.run(of_config, make.metrics(0.9 if model == "resnet8" else 0.8))
            entries.append({"run_id": folder.name, "choice": {"calibration": word, "model": model}})
    return read([make.sweep(entries, "some2020/table5")])


def test_a_papers_rows_stand_beside_ours_and_none_is_left_out(swept, papers_folder, monkeypatch):
    (papers_folder / "some2020" / "table5.yaml").write_text(PAPER)
    heading, rows = paper_columns(paper_of(swept.sweeps[0]), groups_of(swept.runs))
    assert heading == ["", "fp32", "minmax bits 8", "percentile_99.9 bits 8", "minmax bits 4"]
    assert rows == [
        ["ours, resnet8", "95.00", "90.00", "", ""],
        ["ours, mobilenet", "95.00", "80.00", "", ""],
        ["ResNet-50", "76.2", "75", "75.9", ""],
        ["MobileNet", "71.9", "69.5", "", "60"],
    ]
    monkeypatch.setattr("qexp.compare.papers.MOST_COLUMNS", 2)
    turned, lines = paper_columns(paper_of(swept.sweeps[0]), groups_of(swept.runs))
    assert [list(line) for line in zip(turned, *lines, strict=True)] == [heading, *rows]


def test_an_experiment_without_a_paper_has_none_and_a_damaged_one_is_named(swept, papers_folder):
    assert paper_of(swept.sweeps[0]) is None
    (papers_folder / "some2020" / "table5.yaml").write_text("rows: [{choice: 1}]")
    with pytest.raises(ValueError, match=r"table5\.yaml: "):
        paper_of(swept.sweeps[0])


@pytest.mark.parametrize("path", sorted(papers.FOLDER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_paper_has_a_table_with_each_of_its_figures(path, swept):
    experiment = path.relative_to(papers.FOLDER).with_suffix("").as_posix()
    beside = Beside(experiment, papers.load(experiment))
    _, rows = paper_columns(beside, groups_of(swept.runs))
    shown = [text for row in rows for text in row]
    for row in beside.paper.rows:
        assert f"{row.value:g}" in shown
