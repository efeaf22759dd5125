// The page of sweeps: switches, curves of means, the facts, and the chosen fact's own curves and tokens.
import { all, byId, el, fill, visible } from "./dom.js";
import { data, ready, saves, written } from "./carried.js";
import { listFacts, markFact, promptOf } from "./facts.js";
import { band, curve, drawCurves, drawHeatmap, format, layersOf } from "./plots.js";

const form = byId("switches");
const models = Object.fromEntries(data.models.map((model, i) => [model.name, { ...model, index: i }]));
const several = data.models.length > 1;
const metrics = Object.keys(data.metrics);
const DIMENSIONS = ["model", "source", "features", "path", "ablation", "target", "window_size"];
const DEAREST = { features: "features", window_size: "window" };
let chosen = null; // { model, row }
let meansDrawn = [], ownDrawn = []; // rows of what is drawn

// --- what is switched on

const switched = (name) => form.elements[name]?.value;
const lines = () => switched("lines") ?? form.querySelector("[data-lines]")?.dataset.lines ?? "source";
const boxes = (name) => [...form.querySelectorAll(`[name="show-${name}"]`)];
const checked = (name) => boxes(name).filter((box) => box.checked).map((box) => box.value);

/** Whether a series is switched on; `by` is what lines stand for, `shown` the values that are drawn (null: all). */
function on(series, by, shown, allModels = false) {
  return DIMENSIONS.every((name) => {
    const value = String(series[name]);
    if (name === by) return shown === null || shown.includes(value);
    if (name === "model") return allModels || !boxes("model").length || checked("model").includes(value);
    return switched(name) === undefined || switched(name) === value;
  });
}

function adjustSwitches() {
  for (const label of form.querySelectorAll("[data-dimension]")) label.hidden = label.dataset.dimension === lines();
  for (const set of form.querySelectorAll("[data-lines]"))
    set.hidden = set.dataset.lines !== lines() && set.dataset.lines !== "model";
}

// --- numbers

const unpacked = new Map();
/** Numbers that the page keeps as base64 of 32-bit floats. */
function numbers(text) {
  if (!unpacked.has(text)) {
    const bytes = Uint8Array.from(atob(text), (c) => c.codePointAt(0));
    unpacked.set(text, new Float32Array(bytes.buffer));
  }
  return unpacked.get(text);
}
/** A row of a table of numbers. */
const row = (text, i, width) => [...numbers(text).subarray(i * width, (i + 1) * width)];
const across = () => (switched("x") === "depth" ? "Depth of the window's first layer (%)" : "First layer of the window");
const places = (series, model) => series.starts.map((start) => (switched("x") === "depth" ? (100 * start) / models[model].layers : start));

// --- curves of means

function note(id, text) {
  byId(id).hidden = !text;
  byId(id).textContent = text;
}

function drawMeans() {
  const by = lines(), metric = switched("metric"), subset = switched("subset") ?? "all facts";
  const shown = data.series.filter((series) => on(series, by, boxes(by).length ? checked(by) : null) && series.curves[subset]);
  const mixed = by !== "model" && new Set(shown.map((series) => series.model)).size > 1;
  const drawn = shown.map((series) => {
    const { [metric]: [mean, low, high], n } = series.curves[subset], x = places(series, series.model);
    const name = mixed ? `${series[by]}, ${series.model}` : String(series[by]), dash = mixed ? models[series.model].index : 0;
    const interval = (i) => (low[i] === null ? "" : ` [${format(low[i], metric)}, ${format(high[i], metric)}]`);
    return {
      line: curve(series, by, x, mean, (i) => `${format(mean[i], metric)}${interval(i)}<br>${n[i]} facts`, { name, dash, target: series.target }),
      band: band(series, by, x, low, high, name),
      rows: series.starts.map((start, i) =>
        [series.model, series.source, series.target, series.features, series.path, layersOf(start, series.window_size), n[i], mean[i], low[i], high[i]]),
    };
  });
  const rows = drawn.flatMap((one) => one.rows), counts = [...new Set(rows.map((one) => one[6]))].toSorted((a, b) => a - b);
  const nothing = data.series.length ? "No sweep has this combination: choose another one." : "This sweep has single tokens as sources only: choose a fact below.";
  note("curves-note", drawn.length ? "" : nothing);
  drawCurves("curves-plot", [...drawn.map((one) => one.band), ...drawn.map((one) => one.line).toReversed()], metric, across(), [470, 430]);
  byId("curves-caption").textContent = rows.length
    ? `Source → ${[...new Set(shown.map((series) => series.target))].join(", ")}. Means over ${counts.length > 1 ? `${counts[0]} to ${counts.at(-1)}` : counts[0]} facts` +
      `${subset === "all facts" ? "" : ` (${subset})`}; bands are 95 % intervals.` : "";
  const header = ["model", "source", "target", "features", "path", "layers", "facts", `mean_${metric}`, "low", "high"];
  fill(byId("curves-table"), header, rows.map((one) => [...one.slice(0, 7), ...one.slice(7).map((value) => format(value, metric))]));
  meansDrawn = [header, ...rows];
}

// --- facts

/** The window that costs a fact most: where it starts, and the change. */
function dearest(series, of) {
  const width = series.starts.length, values = row(series.values.change_pct, of, width);
  const best = values.reduce((least, value, i) => (!Number.isNaN(value) && (least < 0 || value < values[least]) ? i : least), -1);
  return best < 0 ? null : { start: series.starts[best], at: of * width + best, change: values[best] };
}
const sources = [...new Set(Object.values(data.details).flatMap((of) => of.curves.map((series) => series.source)))];
const columns = [...new Set(Object.values(data.details).flatMap((of) => of.columns))];

function records() {
  return Object.entries(data.details).flatMap(([model, of]) => of.facts.map((fact, i) => {
    const losses = sources.map((source) => {
      const series = of.curves.find((one) => one.source === source && on(one, "source", null, true));
      return series ? dearest(series, i)?.change ?? null : null;
    });
    return { model, row: i, fact, losses, columns: columns.map((name) => fact.columns[of.columns.indexOf(name)] ?? "") };
  }));
}

const table = listFacts("facts-table", records(), { sources, columns, several, choose, drawn: () => markFact("facts-table", chosen) });

function choose(model, of) {
  chosen = { model, row: of };
  markFact("facts-table", chosen);
  byId("fact").hidden = false;
  drawFact();
  byId("fact-heading").focus({ preventScroll: true });
  byId("fact").scrollIntoView({ behavior: "smooth" });
}

// --- the chosen fact

function drawFact() {
  if (chosen === null) return;
  const of = data.details[chosen.model], fact = of.facts[chosen.row], metric = switched("metric");
  const by = lines() === "model" ? "source" : lines();
  const shown = of.curves.filter((series) => on(series, by, null, true) && dearest(series, chosen.row));
  byId("fact-heading").textContent = several ? `The fact in ${chosen.model}` : "The fact";
  byId("fact-prompt").replaceChildren(...written(fact.pieces), " → ", el("b", { text: fact.target }));
  byId("fact-base").textContent = `Without a knockout the target has probability ${format(fact.base_prob, "prob")}.`;
  const traces = shown.map((series) => {
    const y = row(series.values[metric], chosen.row, series.starts.length).map((value) => (Number.isNaN(value) ? null : value));
    return curve(series, by, places(series, chosen.model), y, (i) => format(y[i], metric));
  });
  const rows = shown.flatMap((series) => series.starts.map((start, i) => [
    chosen.model, fact.id, series.source, series.features, series.path, layersOf(start, series.window_size),
    ...metrics.map((name) => numbers(series.values[name])[chosen.row * series.starts.length + i])]));
  byId("fact-table").hidden = traces.length === 0;
  drawCurves("fact-plot", traces.toReversed(), metric, across(), [430, 390], { showlegend: true });
  fill(byId("fact-table"), [DEAREST[by] ?? by, "dearest layers", "change", "rank", "answered instead with"], shown.map((series) => {
    const worst = dearest(series, chosen.row), rank = numbers(series.values.rank)[worst.at];
    return [series[by], layersOf(worst.start, series.window_size), format(worst.change, "change_pct"), rank, rank === 1 ? "(unchanged)" : visible(series.top[chosen.row])];
  }));
  ownDrawn = [["model", "fact_id", "source", "features", "path", "layers", ...metrics], ...rows, ...drawTokens(of, fact, metric)];
}

/** The heatmap of a fact's tokens; gives its rows. */
function drawTokens(of, fact, metric) {
  const wanted = of.tokens.filter((grid) => grid.offsets[chosen.row + 1] > grid.offsets[chosen.row]);
  const grid = wanted.find((one) => ["features", "path", "ablation", "target", "window_size"].every(
    (name) => switched(name) === undefined || switched(name) === String(one[name]))) ?? wanted[0];
  byId("heatmap-plot").hidden = !grid;
  note("heatmap-note", grid ? "" : "The sweep did not knock out this fact's tokens one by one. A sweep with --source each does; give its folder beside this one.");
  if (!grid) return [];
  const [from, to] = grid.offsets.slice(chosen.row, chosen.row + 2), width = grid.starts.length;
  const tokens = all(to - from).map((i) => ({ text: visible(fact.tokens?.[i] ?? `token ${i}`), subject: fact.subject.includes(i) }));
  drawHeatmap("heatmap-plot", {
    z: tokens.map((_, i) => row(grid.values[metric], from + i, width)), tokens, starts: grid.starts, size: grid.window_size, metric,
    about: `token → ${grid.target}, ${grid.features} features, path ${grid.path}`,
  });
  return tokens.flatMap((_, i) => grid.starts.map((start, w) => [
    chosen.model, fact.id, `${data.single}${i}`, grid.features, grid.path, layersOf(start, grid.window_size),
    ...metrics.map((name) => numbers(grid.values[name])[(from + i) * width + w])]));
}

// --- wiring

function draw() {
  adjustSwitches();
  drawMeans();
  drawFact();
}
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("change", ({ target: { name } }) => {
  // One model's lines of several kinds, or every model's of one kind.
  if (name === "lines") boxes("model").forEach((box, i) => { box.checked = i === 0 || lines() === "model"; });
  draw();
  if (["features", "path", "ablation", "target", "window_size", "lines"].includes(name)) table.clear().rows.add(records()).draw(false);
});
const leftOut = Object.entries(data.details).filter(([, of]) => of.left_out);
note("facts-note", leftOut.map(([model, of]) =>
  `${of.left_out.toLocaleString("en")} further facts of ${model} are in the curves, but not in this table (--details sets how many are).`).join(" "));
saves("curves-csv", () => [`curves-${switched("metric")}.csv`, meansDrawn]);
saves("facts-csv", () => ["facts.csv", [
  ["model", "fact_id", "prompt", "target", ...columns, "base_prob", ...sources.map((source) => `change_pct_${source}`)],
  ...table.rows({ search: "applied", order: "applied" }).data().toArray().map(({ model, fact, columns: own, losses }) =>
    [model, fact.id, promptOf(fact), fact.target, ...own, fact.base_prob, ...losses])]]);
saves("fact-csv", () => [`fact-${data.details[chosen.model].facts[chosen.row].id}.csv`, ownDrawn]);
draw();
ready(draw);
