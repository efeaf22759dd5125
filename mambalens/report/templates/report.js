// Wires the switches, the curves (Plotly), the table of facts (DataTables) and the chosen fact to the data of the page.
const form = $("switches");
const models = Object.fromEntries(data.models.map((model, i) => [model.name, { ...model, index: i }]));
const DIMENSIONS = ["model", "source", "features", "path", "ablation", "target", "window_size"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
let chosen = null; // { model, row }

// --- what is switched on

const switched = (name) => form.elements[name]?.value;
const lines = () => switched("lines") ?? form.querySelector("[data-lines]")?.dataset.lines ?? "source";
const checked = (name) =>
  [...form.querySelectorAll(`[name="show-${name}"]`)].filter((box) => box.checked).map((box) => box.value);
const hasBoxes = (name) => form.querySelector(`[name="show-${name}"]`) !== null;

/** Whether a series is switched on; `by` is what lines stand for, `shown` the values that are drawn (null: all). */
function on(series, by, shown, allModels = false) {
  return DIMENSIONS.every((name) => {
    const value = String(series[name]);
    if (name === by) return shown === null || shown.includes(value);
    if (name === "model") return allModels || !hasBoxes("model") || checked("model").includes(value);
    return switched(name) === undefined || switched(name) === value;
  });
}

function adjustSwitches() {
  for (const label of form.querySelectorAll("[data-dimension]")) label.hidden = label.dataset.dimension === lines();
  for (const set of form.querySelectorAll("[data-lines]"))
    set.hidden = set.dataset.lines !== lines() && set.dataset.lines !== "model";
}

// --- words and numbers

const format = (value, metric) =>
  value === null || Number.isNaN(value) ? "–"
    : metric === "change_pct" ? `${Math.abs(value) < 0.05 ? "" : value > 0 ? "+" : "−"}${Math.abs(value).toFixed(1)} %`
      : metric === "prob" && value > 0.9995 ? "> 0.999" : Number(value.toPrecision(3)).toString();
const layersOf = (start, size) => (size > 1 ? `${start}–${start + size - 1}` : `${start}`);
const unpacked = new Map();
/** Numbers that the page keeps as base64 of 32-bit floats. */
function numbers(text) {
  if (!unpacked.has(text)) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    unpacked.set(text, new Float32Array(bytes.buffer));
  }
  return unpacked.get(text);
}

// --- drawing

const look = (by, series) => data.styles[`${by}=${series[by]}`];
const place = (series, model) => series.starts.map((start) => (switched("x") === "depth" ? (100 * start) / models[model].layers : start));

function layout(metric, height) {
  const size = narrow() ? 12 : 13;
  return {
    height, font: { size, family: getComputedStyle(document.body).fontFamily, color: "#1b1b1b" },
    margin: { l: narrow() ? 52 : 64, r: 12, t: narrow() ? 12 : 36, b: 48 }, hovermode: "closest", paper_bgcolor: "#fff", plot_bgcolor: "#fff",
    xaxis: {
      title: { text: switched("x") === "depth" ? "Depth of the window's first layer (%)" : "First layer of the window", standoff: 8 },
      zeroline: false, showgrid: false, showline: true, linecolor: "#888", ticks: "outside",
    },
    yaxis: {
      title: { text: data.metrics[metric], standoff: 6 }, gridcolor: "#e5e5e5", zeroline: metric === "change_pct",
      zerolinecolor: "#999", automargin: true, rangemode: metric === "change_pct" ? "normal" : "tozero",
      type: metric === "rank" ? "log" : "linear", dtick: metric === "rank" ? 1 : undefined,
    },
    legend: { orientation: "h", traceorder: "reversed", y: -0.2, yanchor: "top", x: 0, xanchor: "left" }, hoverlabel: { align: "left" },
  };
}
const config = () => ({
  responsive: true, displaylogo: false, displayModeBar: narrow() ? false : "hover",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
});

function drawCurves() {
  const by = lines(), metric = switched("metric"), subset = switched("subset") ?? "all facts";
  const shown = data.series.filter((series) => on(series, by, hasBoxes(by) ? checked(by) : null));
  const several = by !== "model" && new Set(shown.map((series) => series.model)).size > 1;
  const bands = [], curves = [], rows = [];
  for (const series of shown) {
    const of = series.curves[subset];
    if (!of) continue;
    const [mean, low, high] = of[metric], x = place(series, series.model), style = look(by, series);
    const name = several ? `${series[by]}, ${series.model}` : String(series[by]);
    const banded = x.map((_, i) => i).filter((i) => low[i] !== null);
    bands.push({
      x: [...banded.map((i) => x[i]), ...banded.map((i) => x[i]).reverse()], y: [...banded.map((i) => low[i]), ...banded.map((i) => high[i]).reverse()],
      fill: "toself", fillcolor: style.color + "2e", line: { width: 0 }, mode: "lines", hoverinfo: "skip", showlegend: false, legendgroup: name,
    });
    curves.push({
      x, y: mean, name, legendgroup: name, mode: "lines+markers", line: { color: style.color, width: 2, dash: several ? DASHES[models[series.model].index % 5] : "solid" },
      marker: { symbol: style.symbol, size: 8, color: style.color, line: { color: "#fff", width: 1 } },
      text: x.map((_, i) => `<b>${escaped(name)}</b> → ${series.target}<br>layers ${layersOf(series.starts[i], series.window_size)}: ${format(mean[i], metric)}` +
        (low[i] === null ? "" : ` [${format(low[i], metric)}, ${format(high[i], metric)}]`) + `<br>${of.n[i]} facts`),
      hovertemplate: "%{text}<extra></extra>",
    });
    series.starts.forEach((start, i) => rows.push(
      [series.model, series.source, series.target, series.features, series.path, layersOf(start, series.window_size), of.n[i], mean[i], low[i], high[i]]));
  }
  $("curves-note").hidden = curves.length > 0;
  $("curves-note").textContent = data.series.length
    ? "No sweep has this combination: choose another one." : "This sweep has single tokens as sources only: choose a fact below.";
  $("curves-plot").hidden = curves.length === 0;
  if (curves.length) Plotly.react("curves-plot", [...bands, ...curves.reverse()], layout(metric, narrow() ? 430 : 470), config());
  const counts = [...new Set(rows.map((row) => row[6]))].sort((a, b) => a - b);
  const targets = [...new Set(shown.map((series) => series.target))].join(", ");
  $("curves-caption").textContent = rows.length
    ? `Source → ${targets}. Means over ${counts.length > 1 ? `${counts[0]} to ${counts.at(-1)}` : counts[0]} facts` +
      `${subset === "all facts" ? "" : ` (${subset})`}; bands are 95 % intervals.` : "";
  const header = ["model", "source", "target", "features", "path", "layers", "facts", `mean_${metric}`, "low", "high"];
  fill($("curves-table"), header, rows.map((row) => [...row.slice(0, 7), ...row.slice(7).map((value) => format(value, metric))]));
  $("curves-csv").onclick = () => save(`curves-${metric}.csv`, [header, ...rows]);
}

// --- facts

/** The window that costs a fact most: where it starts, and the change. */
function dearest(series, row) {
  const width = series.starts.length, values = numbers(series.values.change_pct).subarray(row * width, (row + 1) * width);
  let best = -1;
  values.forEach((value, i) => { if (!Number.isNaN(value) && (best < 0 || value < values[best])) best = i; });
  return best < 0 ? null : { start: series.starts[best], at: row * width + best, change: values[best] };
}
const sources = [...new Set(Object.values(data.details).flatMap((of) => of.curves.map((series) => series.source)))];
const columns = [...new Set(Object.values(data.details).flatMap((of) => of.columns))];
const promptHtml = (fact) => fact.pieces.map(([text, role]) => (role ? `<span class="${role}" title="${role}">${escaped(text)}</span>` : escaped(text))).join("");

function factRows() {
  return Object.entries(data.details).flatMap(([model, of]) => of.facts.map((fact, row) => {
    const losses = sources.map((source) => {
      const series = of.curves.find((one) => one.source === source && on(one, "source", null, true));
      return series ? dearest(series, row)?.change ?? null : null;
    });
    return { model, row, fact, losses, columns: columns.map((name) => fact.columns[of.columns.indexOf(name)] ?? "") };
  }));
}
const number = (get, text) => ({
  data: null, className: "dt-right", type: "num",
  render: (record, kind) => { const value = get(record); return kind === "display" ? text(value) : value === null ? "" : value; },
});
const text = (get) => ({ data: null, render: (record, kind) => (kind === "display" ? escaped(get(record)) : get(record)) });
const severalModels = data.models.length > 1;
const factColumns = [
  ...(severalModels ? [{ title: "Model", className: "model-cell", ...text((record) => record.model) }] : []),
  {
    title: "Prompt", data: null, className: "prompt-cell",
    render: (record, kind) => kind === "display"
      ? `<button type="button" data-model="${escaped(record.model)}" data-row="${record.row}">${promptHtml(record.fact)}</button>`
      : record.fact.pieces.map((piece) => piece[0]).join(""),
  },
  { title: "Target", ...text((record) => record.fact.target) },
  { title: "P(target)", ...number((record) => record.fact.base_prob, (value) => format(value, "prob")) },
  ...sources.map((source, i) => ({
    title: `${source}, %`, ...number((record) => record.losses[i], (value) => format(value, "change_pct").replace(" %", "")),
  })),
  ...columns.map((name, i) => ({ title: name, ...text((record) => record.columns[i]) })),
];
const firstLoss = factColumns.length - sources.length - columns.length;
const table = new DataTable("#facts-table", {
  data: factRows(), columns: factColumns, pageLength: 10, autoWidth: false, deferRender: true,
  order: sources.length ? [[firstLoss, "asc"]] : [],
  columnControl: [{ target: 0, content: ["order"] }, { target: 1, content: ["search"] }],
  ordering: { indicators: false, handler: false },
  layout: {
    topStart: { search: { text: "Search facts" } }, topEnd: null, bottomStart: "info", bottomEnd: "paging",
  },
  language: { info: "_START_ to _END_ of _TOTAL_ facts", infoFiltered: "(of _MAX_)", emptyTable: "No fact is kept in this page.", zeroRecords: "No fact has this." },
});
$("facts-table").addEventListener("click", (event) => {
  const button = event.target.closest("button[data-row]");
  if (button) choose(button.dataset.model, Number(button.dataset.row), true);
});
$("facts-csv").onclick = () => save("facts.csv", [
  ["model", "fact_id", "prompt", "target", ...columns, "base_prob", ...sources.map((source) => `change_pct_${source}`)],
  ...table.rows({ search: "applied", order: "applied" }).data().toArray().map(({ model, fact, columns: own, losses }) => [
    model, fact.id, fact.pieces.map((piece) => piece[0]).join(""), fact.target, ...own, fact.base_prob, ...losses]),
]);
const leftOut = Object.entries(data.details).filter(([, of]) => of.left_out);
$("facts-note").hidden = leftOut.length === 0;
$("facts-note").textContent = leftOut.map(([model, of]) =>
  `${of.left_out.toLocaleString("en")} further facts of ${model} are in the curves, but not in this table (--details sets how many are).`).join(" ");

// --- the chosen fact

/** Mark the chosen fact among those that the table shows. */
function mark() {
  for (const line of $("facts-table").querySelectorAll("tbody tr")) {
    const button = line.querySelector("button[data-row]");
    line.classList.toggle("chosen", chosen !== null && button?.dataset.model === chosen.model && Number(button?.dataset.row) === chosen.row);
  }
}
table.on("draw", mark);

function choose(model, row, jump) {
  chosen = { model, row };
  mark();
  $("fact").hidden = false;
  drawFact();
  if (jump) { $("fact-heading").focus({ preventScroll: true }); $("fact").scrollIntoView({ behavior: "smooth" }); }
}

function drawFact() {
  if (chosen === null) return;
  const of = data.details[chosen.model], fact = of.facts[chosen.row], metric = switched("metric");
  const by = lines() === "model" ? "source" : lines();
  const shown = of.curves.filter((series) => on(series, by, null, true) && dearest(series, chosen.row));
  $("fact-heading").textContent = severalModels ? `The fact in ${chosen.model}` : "The fact";
  $("fact-prompt").innerHTML = `${promptHtml(fact)} → <b>${escaped(fact.target)}</b>`;
  $("fact-base").textContent = `Without a knockout the target has probability ${format(fact.base_prob, "prob")}.`;
  const rows = [];
  const curves = shown.map((series) => {
    const width = series.starts.length, style = look(by, series), x = place(series, chosen.model);
    const y = [...numbers(series.values[metric]).subarray(chosen.row * width, (chosen.row + 1) * width)].map((value) => (Number.isNaN(value) ? null : value));
    series.starts.forEach((start, i) => rows.push([chosen.model, fact.id, series.source, series.features, series.path, layersOf(start, series.window_size),
      ...Object.keys(data.metrics).map((name) => numbers(series.values[name])[chosen.row * width + i])]));
    return {
      x, y, name: String(series[by]), mode: "lines+markers", line: { color: style.color, width: 2 },
      marker: { symbol: style.symbol, size: 8, color: style.color, line: { color: "#fff", width: 1 } },
      text: y.map((value, i) => `<b>${escaped(String(series[by]))}</b><br>layers ${layersOf(series.starts[i], series.window_size)}: ${format(value, metric)}`),
      hovertemplate: "%{text}<extra></extra>",
    };
  });
  $("fact-plot").hidden = $("fact-table").hidden = curves.length === 0;
  if (curves.length) {
    Plotly.react("fact-plot", curves.reverse(), { ...layout(metric, narrow() ? 390 : 430), showlegend: true }, config());
    fill($("fact-table"), [{ features: "features", window_size: "window" }[by] ?? by, "dearest layers", "change", "rank", "answered instead with"], shown.map((series) => {
      const worst = dearest(series, chosen.row), rank = numbers(series.values.rank)[worst.at];
      return [series[by], layersOf(worst.start, series.window_size), format(worst.change, "change_pct"), rank, rank === 1 ? "(unchanged)" : visible(series.top[chosen.row])];
    }));
  }
  drawTokens(of, fact, metric, rows);
  const header = ["model", "fact_id", "source", "features", "path", "layers", ...Object.keys(data.metrics)];
  $("fact-csv").onclick = () => save(`fact-${fact.id}.csv`, [header, ...rows]);
}

function drawTokens(of, fact, metric, rows) {
  const wanted = of.tokens.filter((grid) => grid.offsets[chosen.row + 1] > grid.offsets[chosen.row]);
  const grid = wanted.find((one) => ["features", "path", "ablation", "target", "window_size"].every(
    (name) => switched(name) === undefined || switched(name) === String(one[name]))) ?? wanted[0];
  $("heatmap-plot").hidden = !grid;
  $("heatmap-note").hidden = Boolean(grid);
  $("heatmap-note").textContent = "The sweep did not knock out this fact's tokens one by one. A sweep with --source each does; give its folder beside this one.";
  if (!grid) return;
  const [from, to] = grid.offsets.slice(chosen.row, chosen.row + 2), width = grid.starts.length;
  const read = (name, i) => [...numbers(grid.values[name]).subarray(i * width, (i + 1) * width)];
  const tokens = Array.from({ length: to - from }, (_, i) => fact.tokens?.[i] ?? `token ${i}`);
  const z = tokens.map((_, i) => read(metric, from + i));
  tokens.forEach((_, i) => grid.starts.forEach((start, w) => rows.push([chosen.model, fact.id, `${data.single}${i}`, grid.features, grid.path,
    layersOf(start, grid.window_size), ...Object.keys(data.metrics).map((name) => numbers(grid.values[name])[(from + i) * width + w])])));
  const most = Math.max(...z.flat().filter((value) => !Number.isNaN(value)), 1e-9), signed = metric === "change_pct";
  const high = signed ? Math.max(100, most) : most, zero = 100 / (100 + high);
  const scale = signed
    ? [[0, "#67001f"], [zero * 0.5, "#d6604d"], [zero, "#ffffff"], [zero + (1 - zero) * 0.5, "#4393c3"], [1, "#053061"]]
    : [[0, "#ffffff"], [0.5, "#6baed6"], [1, "#08306b"]];
  const written = width <= (narrow() ? 8 : 18) && metric !== "kl" && metric !== "prob";
  Plotly.react("heatmap-plot", [{
    type: "heatmap", z, x: grid.starts, y: tokens.map((_, i) => i), colorscale: scale, zmin: signed ? -100 : 0, zmax: high, xgap: 1, ygap: 1,
    text: z.map((values) => values.map((value) => (written && Math.abs(value) >= 0.5 ? value.toFixed(0).replace("-", "−") : ""))),
    texttemplate: "%{text}", textfont: { size: 11 },
    hovertext: z.map((values, i) => values.map((value, w) => `<b>${escaped(visible(tokens[i]))}</b> (${i})<br>layers ${layersOf(grid.starts[w], grid.window_size)}: ${format(value, metric)}`)),
    hovertemplate: "%{hovertext}<extra></extra>",
    colorbar: { thickness: 12, outlinewidth: 0 },
  }], {
    ...layout(metric, Math.max(260, 22 * tokens.length + 110)), margin: { l: 8, r: 8, t: narrow() ? 56 : 40, b: 48 }, plot_bgcolor: "#e8e8e8",
    title: { text: escaped(data.metrics[metric]) + (narrow() ? "<br>" : ": ") + escaped(`token → ${grid.target}, ${grid.features} features, path ${grid.path}`), font: { size: 13 }, x: 0, xanchor: "left", y: 0.99, yanchor: "top", pad: { l: 8, t: 8 } },
    xaxis: { title: { text: `First layer of the window (${grid.window_size} layers)` }, tickmode: "array", tickvals: ticks(grid.starts), zeroline: false, showgrid: false },
    yaxis: {
      autorange: "reversed", tickmode: "array", tickvals: tokens.map((_, i) => i), zeroline: false, showgrid: false, automargin: true,
      ticktext: tokens.map((token, i) => (fact.subject.includes(i) ? `<b>${escaped(visible(token))}</b>` : escaped(visible(token)))),
    },
  }, config());
}
/** Every start where they fit, otherwise as many as do. */
function ticks(starts) {
  const step = Math.ceil(starts.length / (narrow() ? 10 : 30));
  return starts.filter((_, i) => i % step === 0);
}

// --- wiring

function draw() {
  adjustSwitches();
  drawCurves();
  drawFact();
}
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("change", (event) => {
  if (event.target.name === "lines" && event.target.value !== "model" && hasBoxes("model"))
    form.querySelectorAll('[name="show-model"]').forEach((box, i) => { box.checked = i === 0; });
  if (event.target.name === "lines" && event.target.value === "model")
    form.querySelectorAll('[name="show-model"]').forEach((box) => { box.checked = true; });
  draw();
  if (["features", "path", "ablation", "target", "window_size", "lines"].includes(event.target.name)) {
    table.clear().rows.add(factRows()).draw(false);
  }
});
draw();
document.documentElement.dataset.ready = "true";
