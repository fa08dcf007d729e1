"""The page: whole, small, inert to what records hold; and what a real browser makes of it."""

import copy
import re
from dataclasses import replace

import pytest

from qexp import papers
from qexp.compare import Beside, groups_of, paper_of, pareto_front, read
from qexp.compare.groups import metrics_of
from qexp.report.comparison_page import page

EVIL = '</script><img src=x onerror="window.hacked=1"><b>bold</b> &lt;i&gt; {{7*7}} %{x}'
EVIL_NAME = EVIL.replace("/", "\u2215")


def page_of(folder, tables=(), by=(), metrics=()):
    records = read([folder])
    groups = groups_of(records.runs, by)
    tables = [*tables, *filter(None, map(paper_of, records.sweeps))]
    return page(groups, metrics_of(records.runs, metrics), tables, records, str(folder.name))


def curve(first):
    return [{"epoch": epoch, "loss": first / (epoch + 1), "changed_codes": 0.5} for epoch in range(3)]


@pytest.fixture
def plain(make):
    """A page of four groups of three runs, and one that was fine-tuned."""
    make.grid()
    make.run(make.config(0, 4, make.MSE, finetune={"name": "ste"}), make.metrics(0.85), curve=curve(1.0))
    return page_of(make.outputs)


@pytest.fixture
def evil(make):
    """A page of records that try to be markup wherever they can be anything."""
    table = Beside(EVIL, papers.Paper(EVIL, EVIL, EVIL, EVIL, (papers.Row({EVIL: EVIL}, EVIL, 1.0),), EVIL))
    for number in range(3):
        evil = {EVIL: number, "other": f"{EVIL} {number}", "model": {"_target_": f"a.<b>x{number}</b>"}, "all": EVIL}
        make.run(
            {**make.config(), **evil, "seed": f"<u>{number}</u>"}, {**make.metrics(0.5 + 0.1 * number), EVIL: number},
            make.environment(cpu=f"{EVIL}{number}", commit=EVIL), name=f"{EVIL_NAME}{number}"[:200],
            sites=[(f"<b>{EVIL}</b>{i}", "weight") for i in range(3)],
            curve=[{"epoch": 0, EVIL: 1}, {"epoch": 1, EVIL: 2}],
        )  # fmt: skip
    (make.run(name="hurt" + EVIL_NAME) / "metrics.json").write_text("{")
    return page_of(make.outputs, [table], metrics=["acc", EVIL, "latency/int8_ms"])


def test_the_page_of_1000_runs_is_small(make):
    make.grid(1)
    one = read([make.outputs]).runs[0]
    sites = [{"site": f"layer{i}.conv.weight", "kind": "weight", "sqnr_db": str(20.123456 + i)} for i in range(40)]
    epochs = [{"epoch": str(epoch), "loss": str(1.2345678 / (epoch + 1))} for epoch in range(20)]
    runs = []
    for number in range(1000):
        config = copy.deepcopy(one.config) | {"seed": number % 2}
        config["model"]["width"] = number // 2
        runs.append(replace(one, folder=one.folder / f"{number:012x}", config=config, layers=sites, curve=epochs))
    records = replace(read([make.outputs]), runs=runs)
    groups = groups_of(runs)
    assert len(groups) == 500
    text = page(groups, metrics_of(runs), [], records, "many")
    assert len(text.encode()) < 5_000_000
    assert page(groups, metrics_of(runs), [], records, "many") == text


def test_nothing_on_the_page_refers_to_anything_else(plain):
    markup = re.sub(r"<script.*?</script>|<style>.*?</style>", "", plain, flags=re.DOTALL)
    assert not re.search(r"""\b(src|href|action|srcset)\s*=|url\(|@import|<(link|iframe|img|object)""", markup)
    assert "innerHTML" not in plain.replace("never innerHTML", "")
    assert "connect-src" not in plain  # all is refused by default-src
    assert "default-src 'none'" in plain


def test_records_are_no_markup(evil):
    assert "<img" not in evil
    assert evil.count("</script>") == 4
    assert "window.hacked=1&#34;" in evil


SORT = """
const head = text => all("#table th button").find(one => one.textContent === text);
const column = n => texts(`#table tbody td:nth-child(${n})`);
const found = {rows: texts("#table tbody tr").length, count: texts("#count")[0], heads: texts("#table th button")};
const accuracy = 2 + found.heads.indexOf("acc %");
head("acc %").click();
found.down = column(accuracy);
head("acc %").click();
found.up = column(accuracy);
found.sorted = all("#table th")[accuracy - 1].ariaSort;
head("calibration").click();
found.words = column(2);
"""


def test_the_table_sorts_filters_and_switches_to_runs(browser, plain):
    told = browser.ask(plain, SORT + """
    const input = document.getElementById("filter");
    input.value = "MSE 8";
    input.dispatchEvent(new Event("input"));
    await pause(400);
    found.filtered = [texts("#count")[0], column(2), column(3)];
    found.front = document.getElementById("front").data.slice(1).flatMap(trace => [...trace.x]).length;
    document.getElementById("runs").click();
    found.runs = texts("#count")[0];
    found.ids = column(texts("#table th button").length + 1);
    return found;
    """)  # fmt: skip
    assert told["seen"] == []
    assert told["ready"] == "true"
    found = told["answer"]
    assert (found["rows"], found["count"]) == (5, "5 of 5 groups")
    assert found["heads"][:4] == ["calibration", "quantizer.bits", "finetune", "n"]
    values = [float(text.split()[0]) for text in found["down"]]
    assert values == sorted(values, reverse=True)
    assert found["up"] == found["down"][::-1]
    assert found["sorted"] == "ascending"
    assert found["words"] == ["MinMax", "MinMax", "MSE", "MSE", "MSE"]
    assert found["filtered"] == ["1 of 5 groups", ["MSE"], ["8"]]
    assert found["front"] == 1
    assert found["runs"] == "3 of 13 runs"
    assert len(set(found["ids"])) == 3


def test_the_front_is_that_of_the_library_and_charts_show_what_is_chosen(browser, make, plain):
    told = browser.ask(plain, """
    const data = id => document.getElementById(id).data ?? [];
    const best = () => [...data("front")[0].x];
    const first = data("front").find(trace => trace.customdata?.includes(0));
    const found = {latency: best(), bars: [...first.error_y.array]};
    const select = (id, value) => {
      document.getElementById(id).value = value;
      document.getElementById(id).dispatchEvent(new Event("change"));
    };
    select("cost", document.getElementById("cost").options[1].value);
    found.size = best();
    found.chips = texts(".chip");
    found.layers = data("layers").map(trace => [...trace.y]);
    select("kind", "weight");
    found.weights = data("layers").map(trace => [...trace.x]);
    found.merged = merged([["b", "d"], ["a", "b", "c", "d", "e"], ["d", "f"], ["x"]]);
    found.curves = data("curves").map(trace => [...trace.y]);
    for (const chip of all(".chip")) chip.click();
    await pause();
    found.none = [texts(".chip"), texts("#layers .annotation-text")];
    document.querySelector("#table tbody td.mark button").click();
    found.one = [texts(".chip").length, data("layers").length, all("#table tr.chosen").length];
    const place = document.getElementById("parallel");
    found.axes = data("parallel")[0].dimensions.map(axis => axis.label);
    await Plotly.restyle(place, {"dimensions[1].constraintrange": [[0.9, 1.1]]}, [0]);
    await pause();
    found.brushed = texts("#count")[0];
    document.getElementById("unbrush").click();
    found.unbrushed = texts("#count")[0];
    return found;
    """)  # fmt: skip
    assert told["seen"] == []
    found, groups = told["answer"], groups_of(read([make.outputs]).runs)
    for key, cost, factor in ("latency", "latency/int8_ms", 1), ("size", "size/packed_bytes", 1 / 1024):
        points = [(group.mean(cost).mean, group.mean("acc").mean) for group in groups]
        expected = [factor * points[i][0] for i in pareto_front(points)]
        assert found[key] == pytest.approx(expected)
    assert found["bars"] == pytest.approx([100 * groups[0].mean("acc").half])
    assert len(found["chips"]) == len(found["layers"]) == 4
    # Every list keeps its order in the one that all share.
    assert found["merged"] == ["x", "a", "b", "c", "d", "f", "e"]
    assert found["layers"][0] == [20.0, 21.0, 22.0]
    assert found["weights"][0] == ["stem.conv.weight", "head.fc.weight"]
    assert found["curves"] == [pytest.approx([1.0, 0.5, 0.3333])]
    assert found["none"][0] == []
    assert found["none"][1][0].startswith("No chosen row")
    assert found["one"] == [1, 1, 1]
    assert found["axes"][:3] == ["calibration", "quantizer.bits", "finetune"]
    assert (found["brushed"], found["unbrushed"]) == ("2 of 5 groups", "5 of 5 groups")


def test_no_request_leaves_and_nothing_goes_wrong(browser, plain):
    told = browser.ask(plain, "await pause(2000); return null;")
    assert told["seen"] == []
    assert told["resources"] == []
    assert told["requests"] == []
    # That a request would be seen: the same page, were it allowed to, and told to.
    image = '<img src="http://elsewhere.example/a.png"></header>'
    loose = plain.replace("img-src data: blob:", "img-src http:").replace("</header>", image)
    assert "elsewhere.example" in "".join(browser.ask(loose, "await pause(2000);")["requests"])


def test_what_records_hold_stays_text_everywhere(browser, evil):
    told = browser.ask(evil, """
    const before = {hacked: window.hacked ?? null, images: all("img").length, rows: all("#table tbody tr").length};
    for (const button of all("#table th button")) button.click();
    document.getElementById("runs").click();
    await pause(500);
    const labels = [...texts(".chart text"), ...texts("#parallel text")];
    return {...before, images: before.images + all("img").length, hacked: window.hacked ?? before.hacked,
      bold: all("b, u, i, .chart a").length, styled: all(".chart tspan[style*=bold]").length,
      cells: texts("#table td").filter(text => text.startsWith("<\\/script><img")).length,
      labels: labels.filter(text => text.includes("<b>")).length, lost: texts(".lost li")};
    """)  # fmt: skip
    assert told["seen"] == []
    assert told["requests"] == []
    found = told["answer"]
    assert found["hacked"] is None
    assert (found["images"], found["bold"], found["styled"]) == (0, 0, 0)
    assert found["rows"] == 3
    assert found["cells"] == 3
    assert found["labels"] > 3
    assert "hurt</script>".replace("/", "\u2215") in found["lost"][0]


GROUND = "getComputedStyle(document.body).backgroundColor"


@pytest.mark.parametrize(("scheme", "is_dark"), [(0, True), (1, False)])
def test_the_page_is_dark_where_the_system_is_and_where_it_is_told(browser, plain, scheme, is_dark):
    told = browser.ask(plain, f"""
    const found = [{GROUND}];
    for (let i = 0; i < 2; i++) {{ document.getElementById("theme").click(); found.push({GROUND}); }}
    found.push(document.getElementById("front").layout.font.color);
    return found;
    """, f"--blink-settings=preferredColorScheme={scheme}")  # fmt: skip
    assert told["seen"] == []
    light, dark = "rgb(250, 250, 249)", "rgb(14, 15, 17)"
    assert told["answer"] == [dark if is_dark else light, light, dark, "#92979f"]


def test_a_browser_that_cannot_unpack_keeps_the_table_and_says_so(browser, plain):
    told = browser.ask(
        plain, 'return [texts("#front"), all("#table tbody tr").length];', before="delete window.DecompressionStream;"
    )
    assert told["ready"] == "failed"
    (text,), rows = told["answer"]
    assert "DecompressionStream" in text
    assert rows == 5
