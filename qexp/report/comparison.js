"use strict";
// Data become text by textContent alone, and labels of charts by `plain`: nothing of a record is ever markup.

const $ = id => document.getElementById(id);
const page = JSON.parse($("data").textContent);
const MOST_CHOSEN = 8;
const state = {
  mode: "groups",             // what a row is: groups | runs
  words: [],                  // each must occur in a row
  sort: null,                 // {column, down}
  chosen: [],                 // indices of rows; the place of one decides its colour
  cost: page.costs[0],        // the metric on the x axis of the front
  brushes: {},                // axis -> ranges kept in the parallel coordinates
};
let details = {sites: [], runs: [], groups: []};  // SQNR by tensor, curves of fine-tuning

const element = (tag, text = "", className = "") => {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
};
const collator = new Intl.Collator("en", {numeric: true});
const rows = () => page[state.mode];
const settings = () => state.mode === "runs" ? [...page.settings, "seed"] : page.settings;
const mean = (row, metric) => row.figures[metric]?.[1] ?? null;
const half = (row, metric) => row.figures[metric]?.[2] ?? 0;

// ---- rows: which are shown, in which order

// Of the parallel coordinates: what differs, and what every row has, as a line needs a point on every axis.
const axes = () => [
  ...settings().map((heading, i) => ({key: `setting ${i}`, heading, texts: categories(i), value: row => categories(i).indexOf(row.settings[i])})),
  ...page.metrics.map((metric, i) => ({key: `metric ${i}`, heading: metric.heading, shown: metric.inTable, value: row => mean(row, i)}))
    .filter(axis => axis.shown && rows().every(row => axis.value(row) !== null)),
].filter(axis => new Set(rows().map(axis.value)).size > 1);
const remembered = {};
const categories = i => remembered[`${state.mode} ${i}`] ??=
  [...new Set(rows().map(row => row.settings[i]))].sort(collator.compare);

// A word is part of a setting, a number a whole one: 4 is not in 0.4; an id is found by how it starts.
const worded = row => state.words.every(word => row.id?.startsWith(word) || row.settings.some(text =>
  isNaN(word) ? text.toLowerCase().includes(word) : text.split(/[^\d.]+/).some(part => part !== "" && Number(part) === Number(word))));
const brushed = row => axes().every(axis => {
  const ranges = state.brushes[axis.key];
  const value = axis.value(row);
  return !ranges || ranges.some(([low, high]) => low <= value && value <= high);
});
const matching = () => rows().map((row, i) => i).filter(i => worded(rows()[i]));
function shownRows() {
  const active = Object.keys(state.brushes).length > 0;
  return matching().filter(i => !active || brushed(rows()[i]));
}

function columns() {
  const of = settings().map((heading, i) => ({heading, className: "setting", value: row => row.settings[i]}));
  if (state.mode === "groups") of.push({heading: "n", className: "figure", value: row => row.n, title: "runs in the group"});
  page.metrics.forEach((metric, i) => {
    if (metric.inTable) of.push({heading: metric.heading, className: "figure", value: row => mean(row, i), figure: i,
      title: `${metric.name}: ${metric.meaning}`, down: metric.better > 0});
  });
  if (state.mode === "runs") of.push({heading: "run", className: "setting id", value: row => row.id});
  return of;
}

function sorted(indices) {
  if (!state.sort) return indices;
  const {column, down} = state.sort, value = columns()[column].value, sign = down ? -1 : 1;
  return [...indices].sort((i, j) => {
    const a = value(rows()[i]), b = value(rows()[j]);
    if (a === null || b === null) return (a === null) - (b === null);  // what has no figure comes last either way
    return sign * (typeof a === "string" ? collator.compare(a, b) : a - b);
  });
}

// ---- the table

function drawTable() {
  const shown = shownRows(), of = columns();
  $("count").textContent = `${shown.length} of ${rows().length} ${state.mode}`;
  $("unbrush").hidden = !Object.keys(state.brushes).length;
  const head = document.createElement("tr");
  head.append(element("th", "", "mark"));
  of.forEach((column, i) => {
    const cell = element("th", "", column.className), button = element("button", column.heading);
    button.type = "button";
    button.title = column.title ?? column.heading;
    cell.scope = "col";
    if (state.sort?.column === i) cell.ariaSort = state.sort.down ? "descending" : "ascending";
    button.onclick = () => {
      state.sort = {column: i, down: state.sort?.column === i ? !state.sort.down : Boolean(column.down)};
      drawTable();
    };
    cell.append(button);
    head.append(cell);
  });
  $("table").tHead.replaceChildren(head);
  $("table").tBodies[0].replaceChildren(...sorted(shown).map(i => tableRow(i, of)));
}

function tableRow(index, of) {
  const row = rows()[index], made = document.createElement("tr"), mark = element("td", "", "mark");
  const button = document.createElement("button"), place = state.chosen.indexOf(index);
  button.type = "button";
  button.ariaPressed = String(place >= 0);
  button.ariaLabel = `Choose ${row.name}`;
  button.append(dot(place));
  mark.append(button);
  made.append(mark);
  made.title = row.about;
  made.className = place >= 0 ? "chosen" : "";
  made.onclick = () => choose(index);
  for (const column of of) {
    const cell = element("td", "", column.className);
    if (column.figure === undefined) {
      cell.textContent = column.value(row);
      cell.title = column.className === "setting" ? cell.textContent : "";
    } else {
      const [value, interval] = (row.figures[column.figure]?.[0] ?? "").split(" ± ");
      cell.textContent = value;
      if (interval) cell.append(element("span", ` ± ${interval}`, "half"));
    }
    made.append(cell);
  }
  return made;
}

function dot(place) {
  const made = element("span", "", "dot");
  if (place >= 0) made.style.setProperty("--color", `var(--c${place % MOST_CHOSEN})`);
  return made;
}

function choose(index) {
  const place = state.chosen.indexOf(index);
  if (place >= 0) state.chosen[place] = null;  // the others keep their colours
  else {
    const free = state.chosen.indexOf(null);
    if (free >= 0) state.chosen[free] = index;
    else if (state.chosen.length < MOST_CHOSEN) state.chosen.push(index);
    else state.chosen[MOST_CHOSEN - 1] = index;
  }
  drawTable();
  drawChips();
  drawFront();
  drawLayers();
  drawCurves();
}
const chosen = () => state.chosen.map((index, place) => ({index, place})).filter(({index}) => index !== null);

function drawChips() {
  $("chips").replaceChildren(...chosen().map(({index, place}) => {
    const chip = element("button", "", "chip");
    chip.type = "button";
    chip.title = "Click to let go";
    chip.append(dot(place), rows()[index].name);
    chip.onclick = () => choose(index);
    return chip;
  }));
}

// Those on the front, and one that was fine-tuned, so that each chart has something to show.
function chooseSome() {
  const all = rows().map((row, i) => i), isTuned = i => runsOf(i).some(run => run.curve);
  const best = page.gain === null || state.cost === undefined ? [] : front(all
    .map(index => ({index, x: mean(rows()[index], state.cost), y: mean(rows()[index], page.gain)}))
    .filter(({x, y}) => x !== null && y !== null)).map(({index}) => index);
  state.chosen = [...new Set([...best, ...all])].slice(0, 4).sort((a, b) => a - b);
  const tuned = all.find(isTuned);
  if (tuned !== undefined && !state.chosen.some(isTuned)) state.chosen.splice(3, 1, tuned);
}

// ---- charts

const color = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const colorOf = place => color(`c${place % MOST_CHOSEN}`);
// Plotly reads some tags and entities in its labels.
const plain = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const brief = (text, most = 24) => text.length > most ? `${text.slice(0, most - 1)}…` : text;
const BUTTONS = ["zoom2d", "pan2d", "resetScale2d", "toImage"];  // none that could send anything away
const config = {displaylogo: false, responsive: true, displayModeBar: "hover", modeBarButtons: [BUTTONS]};

function layout(more) {
  const axis = {gridcolor: color("line"), linecolor: color("line"), zeroline: false, ticks: "", automargin: true,
    title: {standoff: 12}};
  return {
    paper_bgcolor: color("card"), plot_bgcolor: color("card"), showlegend: false, hovermode: "closest", height: 380,
    font: {family: getComputedStyle(document.body).fontFamily, size: 12, color: color("muted")},
    margin: {l: 56, r: 16, t: 12, b: 48}, modebar: {bgcolor: "transparent", color: color("muted"), activecolor: color("accent")},
    hoverlabel: {bgcolor: color("card"), bordercolor: color("line"), font: {color: color("text"), size: 12}, align: "left"},
    ...more, xaxis: {...axis, ...more?.xaxis}, yaxis: {...axis, ...more?.yaxis},
  };
}

function draw(id, traces, options, empty = "") {
  if (!$(id) || !window.Plotly) return;
  const nothing = {height: 120, xaxis: {visible: false}, yaxis: {visible: false},
    annotations: [{text: empty, showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5}]};
  const bare = traces[0]?.type === "parcoords" || !traces.length;
  Plotly.react($(id), traces, layout(traces.length ? options : nothing), {...config, ...(bare && {displayModeBar: false})});
}

// Indices of the points that no other beats: those of less cost all bring less.
function front(points) {
  const order = [...points].sort((a, b) => a.x - b.x || b.y - a.y), kept = [];
  for (const point of order) {
    const last = kept.at(-1);
    if (!last || point.y > last.y || (point.x === last.x && point.y === last.y)) kept.push(point);
  }
  return kept;
}

function drawFront() {
  if (state.cost === undefined || page.gain === null) {
    $("front-section").hidden = true;
    return;
  }
  const cost = page.metrics[state.cost], gain = page.metrics[page.gain];
  const points = shownRows().map(index => {
    const row = rows()[index];
    const text = [row.name, `${gain.heading}  ${row.figures[page.gain]?.[0]}`, `${cost.heading}  ${row.figures[state.cost]?.[0]}`, row.about];
    return {index, x: mean(row, state.cost), y: mean(row, page.gain), dx: half(row, state.cost), dy: half(row, page.gain),
      name: row.name, text: text.map(plain).join("<br>"), place: state.chosen.indexOf(index)};
  }).filter(point => point.x !== null && point.y !== null);
  const best = front(points), isBest = new Set(best.map(point => point.index));
  const trace = (of, style) => ({
    type: "scatter", mode: "markers", x: of.map(p => p.x), y: of.map(p => p.y), customdata: of.map(p => p.index),
    hovertext: of.map(p => p.text), hoverinfo: "text", cliponaxis: false,
    error_x: {type: "data", array: of.map(p => p.dx), thickness: 1, width: 0, color: style.bars},
    error_y: {type: "data", array: of.map(p => p.dy), thickness: 1, width: 0, color: style.bars}, ...style,
  });
  const others = points.filter(p => p.place < 0 && !isBest.has(p.index));
  const free = points.filter(p => p.place < 0 && isBest.has(p.index));
  const traces = points.length ? [
    {type: "scatter", mode: "lines", x: best.map(p => p.x), y: best.map(p => p.y), hoverinfo: "skip",
      line: {shape: "hv", width: 1.5, color: color("muted"), dash: "dot"}},
    trace(others, {marker: {size: 7, color: color("point")}, bars: color("line")}),
    trace(free, {marker: {size: 8, color: color("text")}, bars: color("point")}),
    ...points.filter(p => p.place >= 0).map(p => trace([p], {bars: colorOf(p.place),
      marker: {size: 11, color: colorOf(p.place), line: {width: 2, color: color("card")}}})),
  ].map(({bars, ...kept}) => kept) : [];
  draw("front", traces, {
    xaxis: {title: {text: plain(cost.axis), standoff: 12}}, yaxis: {title: {text: plain(gain.axis), standoff: 12}},
  }, "No row has both figures.");
  const place = $("front");
  if (place.on && !place.listens) {
    place.on("plotly_click", event => event.points[0].customdata !== undefined && choose(event.points[0].customdata));
    place.listens = true;
  }
}

function drawParallel() {
  const of = matching().map(i => rows()[i]), place = $("parallel"), dimensions = axes().map(axis => {
    const all = rows().map(axis.value), known = [Math.min(...all), Math.max(...all)];
    const pad = axis.texts ? 0.3 : (known[1] - known[0]) * 0.03;
    const every = axis.texts ? Math.ceil(axis.texts.length / 20) : 1;
    const ticks = axis.texts?.map((text, i) => i).filter(i => i % every === 0);
    return {
      name: axis.key, label: plain(brief(axis.heading, 18)), range: [known[0] - pad, known[1] + pad],
      values: of.map(axis.value), constraintrange: state.brushes[axis.key],
      ...(axis.texts && {tickvals: ticks, ticktext: ticks.map(i => brief(axis.texts[i], 14))}),
    };
  });
  place.style.minWidth = `${Math.max(dimensions.length, 2) * 96}px`;
  const gain = page.gain === null ? null : of.map(row => mean(row, page.gain));
  const able = document.createElement("canvas").getContext("webgl");
  draw("parallel", able && of.length && dimensions.length > 1 ? [{
    type: "parcoords", dimensions, labelfont: {size: 12, color: color("text")}, tickfont: {size: 11, color: color("muted")},
    rangefont: {size: 1, color: "rgba(0,0,0,0)"}, labelangle: dimensions.length > 8 ? -18 : 0,
    unselected: {line: {color: color("line"), opacity: 0.5}},
    line: gain ? {color: gain, colorscale: [[0, color("c1")], [0.5, color("point")], [1, color("c0")]]} : {color: color("c0")},
  }] : [], {margin: {l: 76, r: 40, t: dimensions.length > 8 ? 76 : 52, b: 20}, height: 360}, able ? "Too few rows that differ." : "This chart needs WebGL, which this browser does not have or does not allow.");
  if (place.on && !place.listens) {
    place.on("plotly_restyle", () => {
      state.brushes = {};
      for (const {name, constraintrange} of place.data[0]?.dimensions ?? []) {
        if (constraintrange?.length) state.brushes[name] = Array.isArray(constraintrange[0]) ? constraintrange : [constraintrange];
      }
      drawTable();
      drawFront();
    });
    place.listens = true;
  }
}

const runsOf = index => state.mode === "runs" ? [details.runs[index] ?? {}]
  : page.runs.map((run, i) => run.group === index ? details.runs[i] : null).filter(Boolean);
const layersOf = index => (state.mode === "runs" ? details.runs : details.groups)[index];

// All names of several lists, each behind the one that it follows in its own: tensors keep the order of the network.
function merged(lists) {
  const order = [];
  for (const list of lists) {
    let place = 0;
    for (const name of list) {
      const known = order.indexOf(name);
      if (known < 0) order.splice(place, 0, name);
      place = (known < 0 ? place : known) + 1;
    }
  }
  return order;
}

function drawLayers() {
  if (!$("layers")) return;
  const kind = $("kind").value, lists = [];
  const traces = chosen().map(({index, place}) => {
    const found = layersOf(index);
    if (found?.sites === undefined) return null;
    const kept = details.sites[found.sites].map(([site, of], i) => ({site, of, i})).filter(({of}) => !kind || of === kind);
    lists.push(kept.map(({site}) => plain(site)));
    const y = kept.map(({i}) => found.sqnr[i]), bars = kept.map(({i}) => found.half?.[i] ?? 0);
    const label = plain(rows()[index].name);
    return {
      type: "scatter", mode: "lines+markers", x: kept.map(({site}) => plain(site)), y, hoverinfo: "text",
      hovertext: kept.map(({site}, i) => `${plain(site)}<br>${label}<br>${y[i]?.toFixed(1)} dB${bars[i] ? ` ± ${bars[i]}` : ""}`),
      line: {color: colorOf(place), width: 1.5}, marker: {color: colorOf(place), size: 5},
      error_y: {type: "data", array: bars, thickness: 1, width: 0, color: colorOf(place)},
    };
  }).filter(Boolean);
  const order = merged(lists);
  $("layers").style.minWidth = `${order.length * 22}px`;
  draw("layers", traces, {
    xaxis: {categoryorder: "array", categoryarray: order, tickangle: -45, tickfont: {size: 10}, dtick: 1, showgrid: false}, yaxis: {title: {text: "SQNR, dB", standoff: 12}}, height: 440,
  }, "No chosen row has one list of tensors; choose rows in the table, or switch to runs.");
}

function drawCurves() {
  if (!$("curves")) return;
  const column = $("curve").value;
  const traces = chosen().flatMap(({index, place}) => runsOf(index).filter(run => run.curve?.[column]).map(run => ({
    type: "scatter", mode: "lines+markers", x: run.curve.epoch, y: run.curve[column], line: {color: colorOf(place), width: 1.5},
    marker: {size: 4, color: colorOf(place)}, hoverinfo: "text",
    hovertext: run.curve[column].map((value, i) => `${plain(rows()[index].name)}<br>epoch ${run.curve.epoch[i]}: ${value}`),
  })));
  draw("curves", traces, {
    xaxis: {title: {text: "epoch", standoff: 12}, dtick: Math.ceil(Math.max(1, ...traces.map(({x}) => x.length)) / 12)}, yaxis: {title: {text: plain(column), standoff: 12}}, height: 320,
  }, "No chosen row was fine-tuned; choose one in the table.");
}

function drawAll() {
  drawTable();
  drawChips();
  drawFront();
  drawParallel();
  drawLayers();
  drawCurves();
}

// ---- light and dark

const THEMES = {auto: "◐ Auto", light: "○ Light", dark: "● Dark"};
const preferred = matchMedia("(prefers-color-scheme: dark)");
let theme = "auto";
try { theme = localStorage.getItem("qexp theme") ?? "auto"; } catch { /* a page from a file may keep nothing */ }

function dress() {
  document.documentElement.dataset.theme = theme === "auto" ? (preferred.matches ? "dark" : "light") : theme;
  $("theme").textContent = THEMES[theme] ?? THEMES[theme = "auto"];
}
$("theme").onclick = () => {
  const names = Object.keys(THEMES);
  theme = names[(names.indexOf(theme) + 1) % names.length];
  try { localStorage.setItem("qexp theme", theme); } catch { /* as above */ }
  dress();
  drawAll();
};
preferred.onchange = () => { dress(); drawAll(); };

// ---- start

async function unpacked(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), sign => sign.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

async function start() {
  dress();
  drawTable();
  if (!window.DecompressionStream) throw new Error("This browser is too old to unpack the charts (it has no DecompressionStream); the table works.");
  details = JSON.parse(await unpacked("details"));
  const script = document.createElement("script");
  script.nonce = document.currentScript?.nonce ?? document.querySelector("script[nonce]").nonce;
  script.textContent = await unpacked("plotly");
  document.head.append(script);
  if (!window.Plotly) throw new Error("The charts cannot be drawn in this browser; the table works.");
  const names = new Set(details.runs.flatMap(run => Object.keys(run.curve ?? {})));
  names.delete("epoch");
  $("curve")?.append(...[...names].map(name => new Option(name)));
  chooseSome();
  drawAll();
}

let typing;
$("filter").oninput = () => {
  clearTimeout(typing);
  typing = setTimeout(() => {
    state.words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    drawTable();
    drawFront();
    drawParallel();
  }, 120);
};
for (const mode of ["groups", "runs"]) {
  $(mode).onclick = () => {
    Object.assign(state, {mode, sort: null, brushes: {}});
    for (const other of ["groups", "runs"]) $(other).ariaPressed = String(other === mode);
    chooseSome();
    drawAll();
  };
}
$("unbrush").onclick = () => {
  state.brushes = {};
  drawTable();
  drawFront();
  drawParallel();
};
page.costs.forEach(i => $("cost").append(new Option(page.metrics[i].axis, i)));
$("cost").onchange = () => { state.cost = Number($("cost").value); drawFront(); };
if ($("kind")) $("kind").onchange = drawLayers;
if ($("curve")) $("curve").onchange = drawCurves;
addEventListener("scroll", () => $("toolbar").classList.toggle("stuck", $("toolbar").getBoundingClientRect().top <= 0), {passive: true});

start().then(() => { document.documentElement.dataset.ready = "true"; }, error => {
  document.querySelectorAll(".chart").forEach(place => place.replaceChildren(element("p", error.message, "empty")));
  document.documentElement.dataset.ready = "failed";
});
