// What is looked at more closely: heatmap, flow, and the model layer by layer.
import { el, percent, save, signed, visible, walk } from "./dom.js";

const WAYS = { main: "scan or attention", conv: "convolution", erase: "erasure", both: "all paths" };

const token = (found, position) => `${visible(found.tokens[position])} (${position})`;

function headed(title, caption, name, rows) {
  return [
    el("h3", { text: title }),
    el("p", { className: "caption", text: caption }),
    el("p", {}, el("button", { type: "button", text: "Numbers as CSV", data: { csv: name }, on: { click: () => save(`${name}.csv`, rows) } })),
  ];
}

// A number between −100 and 0 is a loss, above it a gain; the number itself stands in the cell.
function shade(button, change) {
  if (change === null) return;
  const strength = Math.min(1, Math.abs(change) / 100) * 0.75;
  button.style.backgroundColor = `rgba(var(--${change < 0 ? "loss" : "gain"}), ${strength.toFixed(3)})`;
}

export function heatmap(found, cut) {
  const last = found.tokens.length - 1, ends = found.starts.map((start) => start + found.window - 1);
  const head = el("tr", {}, el("th", { text: "source" }), ...found.starts.map((start, i) => el("th", { text: start === ends[i] ? `${start}` : `${start}–${ends[i]}`, scope: "col" })));
  const rows = found.positions.map((position, row) => el("tr", {}, el("th", { text: visible(found.tokens[position]), scope: "row" }),
    ...found.starts.map((start, column) => {
      const change = found.change_pct[row][column], prob = found.prob[row][column];
      const layers = Array.from({ length: found.window }, (_, i) => start + i);
      const says = `${token(found, position)}, layers ${start} to ${ends[column]}: ${percent(prob)}; cut it`;
      const button = el("button", {
        type: "button", text: change === null ? "–" : signed(change, 0).replace(/^[+−]0$/, "0"), title: says, aria: { label: says },
        on: { click: () => cut({ sources: [position], targets: [last], layers, path: found.path }) },
      });
      shade(button, change);
      return el("td", {}, button);
    })));
  const grid = el("table", { className: "grid" }, el("thead", {}, head), el("tbody", {}, ...rows));
  walk(grid, found.starts.length);
  const csv = [["model", "path", "position", "token", "first_layer", "last_layer", "base_prob", "prob", "change_pct"]];
  found.positions.forEach((position, row) => found.starts.forEach((start, i) =>
    csv.push([found.model, found.path, position, found.tokens[position], start, ends[i], found.base_prob, found.prob[row][i], found.change_pct[row][i]])));
  return [
    ...headed(`Heatmap of ${found.model}`, `Change of the watched answer's probability, in %, when the last token gets nothing from one token in a window of layers (${WAYS[found.path]}). Without: ${percent(found.base_prob)}. Click a cell to cut it.`, "heatmap", csv),
    el("div", { className: "scroll" }, grid),
  ];
}

export function flow(found, cut) {
  const rows = found.edges.map((edge, i) => el("tr", { data: { edge: i } },
    el("td", {}, el("button", { type: "button", text: "Cut", aria: { label: `Cut ${token(found, edge.source)} to ${token(found, edge.target)} in layer ${edge.layer}` },
      on: { click: () => cut({ sources: [edge.source], targets: [edge.target], layers: [edge.layer], path: edge.path }) } })),
    el("th", { text: `${token(found, edge.source)} → ${token(found, edge.target)}`, scope: "row" }),
    el("td", { className: "number", text: edge.layer }), el("td", { text: edge.path }),
    el("td", { className: "number", text: `${edge.exact === null ? "≈ " : ""}${signed(edge.effect)}` })));
  const head = ["", "edge", "layer", "path", "change"].map((text) => el("th", { text, scope: "col", className: ["layer", "change"].includes(text) ? "number" : "" }));
  const columns = ["layer", "path", "source", "target", "attributed", "exact"];
  const csv = [["model", ...columns, "source_token", "target_token"], ...found.edges.map((edge) =>
    [found.model, ...columns.map((name) => edge[name]), found.tokens[edge.source], found.tokens[edge.target]])];
  return [
    ...headed(`Flow of ${found.model}`, `The ${found.edges.length} strongest of ${found.of.toLocaleString("en")} edges: what cutting each alone changes of the answer's log-odds, in nats. ≈ is an estimate, the others were cut.`, "flow", csv),
    el("div", { className: "scroll" }, el("table", { className: "list" }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows))),
  ];
}

export function layers(found) {
  const rows = found.layers.map((row) => {
    const bar = el("div", { className: "bar after" });
    bar.style.width = `${(row.prob ?? 0) * 100}%`;
    return el("tr", {}, el("td", { className: "number", text: row.layer }), el("th", { text: visible(row.top_token), scope: "row" }),
      el("td", { className: "number", text: percent(row.prob) }), el("td", { className: "number", text: row.rank }), el("td", { className: "bars" }, bar));
  });
  const head = ["layers behind", "says", "watched answer", "rank", ""].map((text) => el("th", { text, scope: "col", className: ["says", ""].includes(text) ? "" : "number" }));
  const csv = [["model", "layer", "prob", "rank", "top_token"], ...found.layers.map((row) => [found.model, row.layer, row.prob, row.rank, row.top_token])];
  return [
    ...headed(`${found.model}, layer by layer`, "What the model would answer if so many layers were all it had (logit lens, last token).", "layers", csv),
    el("div", { className: "scroll" }, el("table", { className: "list" }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows))),
  ];
}
