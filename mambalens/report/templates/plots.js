// Curves and heatmaps by Plotly, which reads a little HTML in texts: whatever a file said is escaped.
import { all, byId } from "./dom.js";
import { hex, seen } from "./figures.js";
import { data, narrow, theme } from "./carried.js";

const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];

export const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const bold = (text) => `<b>${escaped(text)}</b>`;

/** A value of a metric in words. */
export function format(value, metric) {
  if (value === null || Number.isNaN(value)) return "–";
  if (metric === "change_pct") return `${Math.abs(value) < 0.05 ? "" : value > 0 ? "+" : "−"}${Math.abs(value).toFixed(1)} %`;
  return metric === "prob" && value > 0.9995 ? "> 0.999" : Number(value.toPrecision(3)).toString();
}
export const layersOf = (start, size) => (size > 1 ? `${start}–${start + size - 1}` : `${start}`);

const look = (by, series) => {
  const { color, symbol } = data.styles[`${by}=${series[by]}`];
  return { colour: seen(color, theme()), symbol };
};

/** A line through the windows of a series; says(i): what a point says below the name. */
export function curve(series, by, x, y, says, { name = String(series[by]), dash = 0, target = "" } = {}) {
  const { colour, symbol } = look(by, series);
  return {
    x, y, name: escaped(name), legendgroup: name, mode: "lines+markers", line: { color: colour, width: 2, dash: DASHES[dash % DASHES.length] },
    marker: { symbol, size: 8, color: colour, line: { color: theme().paper, width: 1 } },
    text: x.map((_, i) => `${bold(name)}${target && ` → ${escaped(target)}`}<br>layers ${layersOf(series.starts[i], series.window_size)}: ${says(i)}`),
    hovertemplate: "%{text}<extra></extra>",
  };
}

/** The band of a curve's intervals. */
export function band(series, by, x, low, high, name) {
  const known = all(x.length).filter((i) => low[i] !== null), back = known.toReversed();
  return {
    x: [...known, ...back].map((i) => x[i]), y: [...known.map((i) => low[i]), ...back.map((i) => high[i])],
    fill: "toself", fillcolor: `${look(by, series).colour}2e`, line: { width: 0 }, mode: "lines", hoverinfo: "skip", showlegend: false, legendgroup: name,
  };
}

function layout(metric, across, height) {
  const { ink, soft, line, paper } = theme();
  const axis = { zeroline: false, color: ink, gridcolor: line, linecolor: soft };
  return {
    height, font: { size: narrow() ? 12 : 13, family: getComputedStyle(document.body).fontFamily, color: ink },
    margin: { l: narrow() ? 52 : 64, r: 12, t: narrow() ? 12 : 36, b: 48 }, hovermode: "closest", paper_bgcolor: paper, plot_bgcolor: paper,
    xaxis: { ...axis, title: { text: across, standoff: 8 }, showgrid: false, showline: true, ticks: "outside" },
    yaxis: {
      ...axis, title: { text: escaped(data.metrics[metric]), standoff: 6 }, zeroline: metric === "change_pct",
      zerolinecolor: soft, automargin: true, rangemode: metric === "change_pct" ? "normal" : "tozero",
      type: metric === "rank" ? "log" : "linear", dtick: metric === "rank" ? 1 : undefined,
    },
    legend: { orientation: "h", traceorder: "reversed", y: -0.2, yanchor: "top", x: 0, xanchor: "left" },
    hoverlabel: { align: "left" }, modebar: { bgcolor: paper, color: soft, activecolor: ink },
  };
}
const config = () => ({
  responsive: true, displaylogo: false, displayModeBar: narrow() ? false : "hover",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
});

/** Lines over layers; without any, the plot is hidden. */
export function drawCurves(id, traces, metric, across, [wide, phone], more = {}) {
  byId(id).hidden = traces.length === 0;
  if (traces.length) Plotly.react(id, traces, { ...layout(metric, across, narrow() ? phone : wide), ...more }, config());
}

/** Values of a metric by token and window; tokens: { text, subject }; about: words for the title. */
export function drawHeatmap(id, { z, tokens, starts, size, metric, about }) {
  const { paper, loss, gain, none } = theme(), signed = metric === "change_pct";
  const most = Math.max(...z.flat().filter((value) => !Number.isNaN(value)), 1e-9), high = signed ? Math.max(100, most) : most;
  const scale = signed ? [[0, hex(loss)], [100 / (100 + high), paper], [1, hex(gain)]] : [[0, paper], [1, hex(gain)]];
  const written = starts.length <= (narrow() ? 8 : 18) && metric !== "kl" && metric !== "prob", rows = all(tokens.length), step = Math.ceil(starts.length / (narrow() ? 10 : 30));
  const base = layout(metric, `First layer of the window (${size} layers)`, Math.max(260, 22 * tokens.length + 110));
  Plotly.react(id, [{
    type: "heatmap", z, x: starts, y: rows, colorscale: scale, zmin: signed ? -100 : 0, zmax: high, xgap: 1, ygap: 1,
    text: z.map((values) => values.map((value) => (written && Math.abs(value) >= 0.5 ? value.toFixed(0).replace("-", "−") : ""))),
    texttemplate: "%{text}", textfont: { size: 11 },
    hovertext: z.map((values, i) => values.map((value, w) => `${bold(tokens[i].text)} (${i})<br>layers ${layersOf(starts[w], size)}: ${format(value, metric)}`)),
    hovertemplate: "%{hovertext}<extra></extra>", colorbar: { thickness: 12, outlinewidth: 0 },
  }], {
    ...base, margin: { l: 8, r: 8, t: narrow() ? 56 : 40, b: 48 }, plot_bgcolor: none,
    title: { text: `${escaped(data.metrics[metric])}${narrow() ? "<br>" : ": "}${escaped(about)}`, font: { size: 13 }, x: 0, xanchor: "left", y: 0.99, yanchor: "top", pad: { l: 8, t: 8 } },
    xaxis: { ...base.xaxis, tickmode: "array", tickvals: starts.filter((_, i) => i % step === 0), showline: false },
    yaxis: {
      color: base.yaxis.color, autorange: "reversed", tickmode: "array", tickvals: rows, zeroline: false, showgrid: false, automargin: true,
      ticktext: tokens.map(({ text, subject }) => (subject ? bold(text) : escaped(text))),
    },
  }, config());
}
