// What is looked at more closely: each answer of the model as a title, a figure, a table and rows of numbers.
import { all, el, fill, percent, ranges, short, signed, visible } from "./dom.js";
import { grid, length } from "./figures.js";
import { graph } from "./graph.js";

/** What a model's paths are. */
function waysOf(kinds) {
  const main = new Set(kinds.filter((kind) => kind !== "shortconv").map((kind) => (kind === "attention" ? "attention" : "scan")));
  return { main: [...main].toSorted().toReversed().join(" or "), conv: "convolution", erase: "erasure", both: "all paths" };
}

const place = (found, position) => `${visible(found.tokens[position])} (${position})`;
const named = (found) => found.tokens.map((token, i) => ({ text: visible(token), title: place(found, i), bold: found.subject.includes(i) }));
const one = (source, target, cutLayers, path) => ({ sources: [source], targets: [target], layers: cutLayers, path, features: "all" });

const table = (head, rows) => el("div", { className: "scroll" }, fill(el("table", { className: "list" }), head, rows));

const cutButton = (says, click) => el("button", { type: "button", text: "Cut", aria: { label: `Cut ${says}` }, on: { click } });

export function heatmap(found, { cut, kinds }) {
  const last = found.tokens.length - 1, ends = found.starts.map((start) => start + found.window - 1);
  const windows = found.starts.map((start, i) => (start === ends[i] ? `${start}` : `${start}–${ends[i]}`));
  const cell = (row, column) => {
    const change = found.change_pct[row][column], position = found.positions[row];
    return {
      value: change === null ? null : change / 100, text: change === null ? "–" : signed(change, 0).replace("+", ""),
      says: `${place(found, position)}, layers ${windows[column]}: ${percent(found.prob[row][column])}. Cut it.`,
      click: () => cut(one(position, last, all(ends[column] + 1, found.starts[column]), found.path)),
    };
  };
  const numbers = found.positions.flatMap((position, row) => found.starts.map((start, i) =>
    [found.model, found.path, position, found.tokens[position], start, ends[i], found.base_prob, found.prob[row][i], found.change_pct[row][i]]));
  return {
    name: "heatmap", title: `Heatmap of ${found.model}`,
    caption: `Change of the watched answer's probability, in %, when the last token gets nothing from one token in a window of layers (${waysOf(kinds)[found.path]}). Without that it is ${percent(found.base_prob)}. Click a cell to cut it.`,
    figure: (theme) => grid({ rows: found.positions.map((position) => named(found)[position]), columns: windows.map((text) => ({ text })), cell, aside: "source", across: "layers", name: `Heatmap of ${found.model}: change in %` }, theme),
    rows: [["model", "path", "position", "token", "first_layer", "last_layer", "base_prob", "prob", "change_pct"], ...numbers],
  };
}

export function flow(found, { cut, kinds, layers: depth, room }) {
  const ways = waysOf(kinds), edges = found.edges.map((edge) => {
    const way = `layer ${edge.layer}, ${ways[edge.path]}`, change = `${edge.exact === null ? "≈ " : ""}${signed(edge.effect)} nats`;
    return { ...edge, way, change, says: `${place(found, edge.source)} → ${place(found, edge.target)}, ${way}: ${change}. Cut it.`,
      click: () => cut(one(edge.source, edge.target, [edge.layer], edge.path)) };
  });
  const columns = ["layer", "path", "source", "target", "attributed", "exact"];
  const listed = table(["", "edge", { text: "layer", number: true }, "path", { text: "change, nats", number: true }],
    edges.map((edge) => [cutButton(`${place(found, edge.source)} to ${place(found, edge.target)} in layer ${edge.layer}`, edge.click),
      `${place(found, edge.source)} → ${place(found, edge.target)}`, edge.layer, ways[edge.path], edge.change.replace(" nats", "")]));
  return {
    name: "flow", title: `Flow of ${found.model}`,
    caption: `The ${edges.length} strongest of ${found.of.toLocaleString("en")} edges: what cutting each alone changes of the answer's log-odds, in nats. Solid edges were cut; dashed ones (≈) are attributed only. Click an edge to cut it.`,
    figure: (theme) => graph({ tokens: found.tokens, subject: found.subject, layers: depth, edges, answer: found.target, words: ways, unit: "nats", name: `Flow of ${found.model}, ${edges.length} edges; the same edges are in the table` }, theme, room()),
    table: el("details", {}, el("summary", { text: "The same edges as a table" }), listed),
    rows: [["model", ...columns, "source_token", "target_token"], ...edges.map((edge) => [found.model, ...columns.map((name) => edge[name]), found.tokens[edge.source], found.tokens[edge.target]])],
  };
}

export function routes(found, { cut }) {
  const share = (value) => (value === null ? "–" : `${value.toFixed(1)} %`);
  const listed = found.routes.map((route) => {
    const chain = ["subject", ...route.relay_tokens.map((tokens) => [tokens].flat().map(visible).join(" + ")), visible(found.tokens.at(-1))].join(" → ");
    const ways = new Map(); // layers of every pair of tokens and path
    for (const [layer, path, source, target] of route.edges.flat()) {
      const key = JSON.stringify([source, target, path]);
      ways.set(key, [...new Set([...(ways.get(key) ?? []), layer])].toSorted((a, b) => a - b));
    }
    const cuts = [...ways].map(([key, of]) => { const [source, target, path] = JSON.parse(key); return one(source, target, of, path); });
    return [cutButton(chain, () => cut(...cuts)), chain, share(route.carried_pct), share(route.joint_pct), `${route.edges.flat().length}`];
  });
  return {
    name: "routes", title: `Routes of ${found.model}`,
    caption: "Chains of tokens from the subject to the last one: what only this chain carries of the answer's probability, and what cutting all its hops loses. Cut takes the edges that have most of each hop.",
    table: found.routes.length ? table(["", "route", { text: "carries", number: true }, { text: "all hops", number: true }, { text: "edges", number: true }], listed)
      : el("p", { text: "No chain carries anything that can be told apart." }),
    rows: [["model", "rank", "relays", "carried_pct", "joint_pct"], ...found.routes.map((route) => [found.model, route.rank, JSON.stringify(route.relays), route.carried_pct, route.joint_pct])],
  };
}

export function layers(found, { walk, room }) {
  const order = all(found.layers.length).toReversed(), depth = found.layers.length - 1;
  // The answer is in the last column: words are shortened where all columns have room so.
  const fits = Math.floor(((room() - 70) / found.tokens.length - 10) / length("m")), letters = fits >= 4 && fits < 9 ? fits : 9;
  const cell = (r, position) => {
    const i = order[r];
    return {
      value: found.prob[i][position], text: short(visible(found.top[i][position]), letters),
      says: `Behind ${found.layers[i]} layers at ${place(found, position)}: says ${visible(found.top[i][position])}; the watched answer has ${percent(found.prob[i][position])}, rank ${found.rank[i][position]}. ${i < depth ? `Look at the attention of layer ${i}.` : ""}`,
      click: i < depth ? () => walk("attention", { layer: i }) : null,
    };
  };
  return {
    name: "layers", title: `${found.model}, layer by layer`,
    caption: `What the model would say next at every token, if so many layers were all it had (logit lens). The bluer, the more probable is the watched answer ‘${visible(found.target)}’. Click a cell to see what the next layer attends to.`,
    figure: (theme) => grid({ rows: order.map((i) => ({ text: i === depth ? "answer" : String(found.layers[i]) })), columns: named(found), cell, aside: "layers", name: `Logit lens of ${found.model}` }, theme),
    rows: [["model", "layers_behind", "position", "token", "prob", "rank", "top_token"], ...found.layers.flatMap((layer, i) => found.tokens.map((token, position) =>
      [found.model, layer, position, token, found.prob[i][position], found.rank[i][position], found.top[i][position]]))],
  };
}

export function contributions(found, { cut, walk }) {
  const n = found.tokens.length, depth = found.mixer.length, order = all(depth).toReversed();
  const most = Math.max(...found.mixer.flat().map(Math.abs), ...found.others.map(Math.abs), 1e-9);
  const total = (values) => values.reduce((sum, value) => sum + value, 0);
  const rows = [{ text: "all layers", bold: true }, ...order.map((layer) => ({ text: String(layer) }))];
  const cell = (r, column) => {
    const layer = r === 0 ? null : order[r - 1], ofToken = column < n;
    const value = layer === null ? (ofToken ? total(found.mixer.map((row) => row[column])) : total(found.others)) : ofToken ? found.mixer[layer][column] : found.others[layer];
    const what = ofToken ? `what mixers bring from ${place(found, column)}` : "MLPs and the rest";
    const where = layer === null ? "all layers" : `layer ${layer}`, cuts = ofToken && column < n - 1;
    return {
      value: Math.sign(value) * Math.min(1, Math.abs(value) / most), text: Math.abs(value) < 0.05 ? "·" : signed(value, 1),
      says: `${where}, ${what}: ${signed(value)} nats.${cuts ? " Cut it." : layer === null ? "" : ` Look at the attention of layer ${layer}.`}`,
      click: cuts ? () => cut(one(column, n - 1, layer === null ? all(depth) : [layer], "main")) : layer === null ? null : () => walk("attention", { layer }),
    };
  };
  return {
    name: "contributions", title: `What adds up to the answer of ${found.model}`,
    caption: `Parts of the log-odds of ‘${visible(found.target)}’ at the last token, in nats, by layer and by the token that mixers read. Together with ${signed(found.outside)} from embeddings and biases they add up to ${signed(found.score)}. Click a token's cell to cut it.`,
    figure: (theme) => grid({ rows, columns: [...named(found), { text: "MLPs, rest" }], cell, aside: "layer", across: "mixers, by the token that is read", name: `Contributions of ${found.model}` }, theme),
    rows: [["model", "layer", "part", "position", "token", "contribution"],
      ...found.mixer.flatMap((row, layer) => row.map((value, i) => [found.model, layer, "mixer", i, found.tokens[i], value])),
      ...found.others.map((value, layer) => [found.model, layer, "rest", "", "", value]), [found.model, "", "outside", "", "", found.outside]],
  };
}

export function attention(found, { cut }) {
  const most = Math.max(...found.alpha.flat().map(Math.abs), 1e-12), alone = /^\d+$/.test(found.features);
  const cell = (target, source) => {
    if (source > target) return null;
    const value = found.alpha[target][source], cuts = source < target;
    return {
      value: value / most, text: value === 0 ? "0" : Math.abs(value) / most < 0.01 ? "·" : signed((100 * value) / most, 0).replace("+", ""),
      says: `${place(found, source)} → ${place(found, target)}: ${value.toPrecision(3)}.${cuts ? ` Cut it in layer ${found.layer}.` : ""}`,
      click: cuts ? () => cut({ ...one(source, target, [found.layer], "main"), features: found.features }) : null,
    };
  };
  return {
    name: "attention", title: `Effective attention of ${found.model}, layer ${found.layer} (${found.kind})`,
    caption: `How much each source (column) enters each target (row): ${alone ? `feature ${found.features}` : `mean magnitude over ${found.features} features`}, in % of the largest entry, ${most.toPrecision(3)}. Click an entry to cut it.`,
    figure: (theme) => grid({ rows: named(found), columns: named(found), cell, aside: "target", across: "source", name: `Effective attention of ${found.model}, layer ${found.layer}` }, theme),
    rows: [["model", "layer", "features", "target", "source", "target_token", "source_token", "alpha"], ...found.alpha.flatMap((row, target) => row.slice(0, target + 1).map((value, source) =>
      [found.model, found.layer, found.features, target, source, found.tokens[target], found.tokens[source], value]))],
  };
}

/** A cut in words, for lists. */
export function inWords(made, tokens) {
  const words = (positions) => positions.map((i) => visible(tokens[i] ?? "")).join(" ");
  const few = made.features === "all" ? "" : `, features ${made.features}`;
  return `${words(made.sources)} (${ranges(made.sources)}) → ${words(made.targets)} (${ranges(made.targets)}), layers ${ranges(made.layers)}, path ${made.path}${few}`;
}
