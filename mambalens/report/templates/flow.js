// Draws the edges of one prompt as a graph to click through, and the same edges as a table.
const form = $("switches");
const FIRST = 40; // edges that are shown at first
const WIDEST = 7, THINNEST = 1.2; // pixels
const HALO = "#F0E442";
const paths = Object.fromEntries(data.paths.map((path) => [path.name, path]));
const unit = data.measure.unit ? ` ${data.measure.unit}` : "";
let prompt = null; // the chosen fact's
let shown = []; // its edges that the switches let through, the strongest first
let chosen = null; // { edge } or { position, row }

// --- words and numbers

const signed = (value) => (value === null ? "–" : `${Math.abs(value) < 5e-4 ? "" : value > 0 ? "+" : "−"}${Math.abs(value) < 5e-4 ? "0" : Number(Math.abs(value).toPrecision(3))}`);
const percent = (share) => `${share < 0.0995 ? (100 * share).toFixed(1) : (100 * share).toFixed(0)} %`;
const short = (text, most) => ([...text].length > most ? `${[...text].slice(0, most - 1).join("")}…` : text);
const token = (i) => short(visible(prompt.tokens[i]), 16);
const quoted = (i) => `‘${visible(prompt.tokens[i])}’ (${prompt.pieces[i]})`;
/** The effect of an edge; what is attributed only is about so much. */
const effectOf = (edge) => `${edge.exact === null ? "≈ " : ""}${signed(edge.effect)}`;
const nameOf = (edge) => `${token(edge.source)} (${edge.source}) → ${token(edge.target)} (${edge.target})`;
const wayOf = (edge) => `layer ${edge.layer}, ${paths[edge.path].word}`;
const count = (n) => n.toLocaleString("en");
const element = (tag, text = "", more = {}) => Object.assign(document.createElement(tag), { textContent: text, ...more });

/** The edges of a prompt, one object each, in the order of strength; `effect` is the exact number where there is one. */
function edgesOf(one) {
  return one.edges.layer.map((_, i) => {
    const edge = Object.fromEntries(Object.entries(one.edges).map(([name, values]) => [name, values[i]]));
    return { ...edge, i, effect: edge.exact ?? edge.attributed, single: one.single[i] ?? null };
  });
}

// --- what is switched on

const value = (name) => form.elements[name]?.value;
const candidates = () => data.prompts.map((one, i) => ({ one, i })).filter(({ one }) =>
  ["model", "features"].every((name) => form.elements[name] === undefined || value(name) === one[name]));

function listFacts() {
  const before = prompt?.id, select = form.elements.fact;
  const found = candidates();
  select.replaceChildren(...found.map(({ one, i }) =>
    element("option", short(`${one.text.map((piece) => piece[0]).join("")} → ${one.target.trim()}`, 90), { value: String(i) })));
  const same = found.find(({ one }) => one.id === before);
  if (same) select.value = String(same.i);
}

function takeFact() {
  const i = value("fact");
  prompt = i === "" || i === undefined ? null : data.prompts[Number(i)];
  if (prompt === null) return;
  prompt.list ??= edgesOf(prompt);
  const deepest = data.layers[prompt.model] - 1;
  for (const name of ["from", "to"]) form.elements[name].max = deepest;
  if (Number(value("to")) > deepest) form.elements.to.value = deepest;
  const strength = form.elements.strength, before = Number(strength.value);
  strength.max = prompt.list.length;
  strength.value = Math.min(before, prompt.list.length);
  chosen = null;
}

function filter() {
  const on = new Set([...form.querySelectorAll('[name="path"]')].filter((box) => box.checked).map((box) => box.value));
  const [from, to] = ["from", "to"].map((name) => Number(value(name)));
  const weakest = Math.abs(prompt.list[Number(value("strength")) - 1]?.effect ?? 0);
  form.elements.least.value = `at least ${Number(weakest.toPrecision(2))}${unit}`;
  shown = prompt.list.filter((edge) => on.has(edge.path) && edge.layer >= from && edge.layer <= to &&
    (Math.abs(edge.effect) >= weakest || edge.lead) && (!form.elements.exact.checked || edge.exact !== null));
  if (chosen?.edge && !shown.includes(chosen.edge)) chosen = null;
}

// --- the graph

const svg = (tag, attributes = {}, text = null) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, one] of Object.entries(attributes)) made.setAttribute(name, one);
  if (text !== null) made.textContent = text;
  return made;
};
/** What of the graph belongs to what is chosen; null: everything. */
function lit(edge) {
  if (chosen === null) return true;
  if (chosen.edge) return chosen.edge === edge;
  return reads(chosen).includes(edge) || handsOn(chosen).includes(edge);
}
/** Edges into a position below a row, and out of it from the row on: among all that the page keeps. */
const reads = ({ position, row }) => prompt.list.filter((edge) => edge.target === position && edge.end <= row);
const handsOn = ({ position, row }) => prompt.list.filter((edge) => edge.source === position && edge.begin >= row);
const widthOf = (edge) => Math.max((WIDEST * Math.abs(edge.effect)) / Math.abs(prompt.list[0].effect || 1), THINNEST);

/** The marker in an edge's middle, which says its path without colour. */
function pathMark(path, x, y, r, more = {}) {
  const look = { fill: paths[path].color, stroke: "#fff", "stroke-width": 1, ...more };
  if (path === "conv") return svg("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r, ...look });
  if (path === "erase") return svg("polygon", { points: `${x},${y - 1.3 * r} ${x + 1.2 * r},${y + r} ${x - 1.2 * r},${y + r}`, ...look });
  return svg("circle", { cx: x, cy: y, r: 1.1 * r, ...look });
}
/** An arrowhead where the edge helps the answer, a bar where it works against it. */
function head(effect, x, y, angle, width, color) {
  const size = 4 + 1.1 * width;
  const turn = { transform: `translate(${x} ${y}) rotate(${angle})` };
  return effect > 0
    ? svg("line", { x1: 0, x2: 0, y1: -size, y2: size, stroke: color, "stroke-width": 2.5, ...turn })
    : svg("polygon", { points: `1,0 ${-1.5 * size},${-0.8 * size} ${-1.5 * size},${0.8 * size}`, fill: color, ...turn });
}

function drawGraph() {
  const layers = data.layers[prompt.model], n = prompt.tokens.length;
  const room = $("graph-frame").clientWidth - 48;
  const labels = prompt.tokens.map((_, i) => token(i));
  const wide = (text) => [...text].length * 7.4;
  let column = Math.min(Math.max((room - 36) / n, 24), 110);
  const slanted = Math.max(...labels.map(wide)) + 6 > column;
  const left = slanted ? Math.max(16, ...labels.map((text, i) => 0.72 * wide(text) + 8 - (i + 0.5) * column)) : 8;
  const row = Math.min(Math.max(600 / (layers + 1), 28), 48), top = 34;
  const below = slanted ? 22 + 0.72 * Math.max(...labels.map(wide)) : 30;
  const width = Math.ceil(left + n * column + 14), height = Math.ceil(top + layers * row + below);
  const X = (i) => left + (i + 0.5) * column, Y = (layer) => top + (layers - layer) * row;

  const axis = svg("svg", { width: 44, height });
  const step = layers > 32 ? 4 : 1;
  for (let layer = 0; layer <= layers; layer++)
    if (layer % step === 0 || layer === layers)
      axis.append(svg("text", { x: 36, y: Y(layer) + 4, "text-anchor": "end", class: "axis" }, layer === layers ? "end" : String(layer)));
  axis.append(svg("text", { x: 40, y: height - 8, "text-anchor": "end", class: "axis" }, "layer"));
  $("graph-axis").replaceChildren(axis);

  const picture = svg("svg", { width, height, role: "group", "aria-label": `Graph of ${shown.length} edges, layers from below to above, tokens from left to right; the same edges are in the table` });
  const nodes = new Map();
  for (const edge of shown) {
    nodes.set(`${edge.source} ${edge.begin}`, { position: edge.source, row: edge.begin });
    nodes.set(`${edge.target} ${edge.end}`, { position: edge.target, row: edge.end });
  }
  nodes.set(`${n - 1} ${layers}`, { position: n - 1, row: layers }); // where the answer is read
  for (let i = 0; i < n; i++) {
    picture.append(svg("line", { x1: X(i), x2: X(i), y1: Y(layers) - 8, y2: Y(0) + 8, stroke: "#e4e4e4" }));
    const rows = [...nodes.values()].filter((node) => node.position === i).map((node) => node.row);
    if (rows.length > 1) picture.append(svg("line", { x1: X(i), x2: X(i), y1: Y(Math.min(...rows)), y2: Y(Math.max(...rows)), stroke: "#b5b5b5", "stroke-width": 2 }));
    const label = svg("text", { x: X(i), y: Y(0) + 24, "text-anchor": slanted ? "end" : "middle", class: prompt.subject.includes(i) ? "bold" : "" }, labels[i]);
    if (slanted) label.setAttribute("transform", `rotate(-45 ${X(i)} ${Y(0) + 24})`);
    label.append(svg("title", {}, `${i}: ${visible(prompt.tokens[i])}`));
    picture.append(label);
  }
  picture.append(svg("text", { x: X(n - 1) + 8, y: 14, "text-anchor": "end", class: "bold" }, `→ ${short(visible(prompt.target.trim()), 24)}`));

  const marked = shown.filter((edge) => edge.step !== null);
  for (const relay of new Set(marked.map((edge) => edge.target))) {
    for (const step of new Set(marked.map((edge) => edge.step))) {
      const before = marked.filter((edge) => edge.step === step && edge.target === relay).map((edge) => edge.end);
      const after = marked.filter((edge) => edge.step === step + 1 && edge.source === relay).map((edge) => edge.begin);
      if (before.length && after.length && Math.min(...before) < Math.max(...after))
        picture.append(svg("line", { x1: X(relay), x2: X(relay), y1: Y(Math.min(...before)), y2: Y(Math.max(...after)), stroke: HALO, "stroke-width": 12, "stroke-opacity": 0.8 }));
    }
  }
  const beside = new Map();
  for (const edge of shown) {
    const key = `${edge.layer} ${edge.source} ${edge.target}`;
    beside.set(key, (beside.get(key) ?? 0) + 1);
  }
  const ends = new Map(shown.map((edge) => {
    const dx = X(edge.target) - X(edge.source), dy = Y(edge.end) - Y(edge.begin), length = Math.hypot(dx, dy);
    const [ux, uy] = [dx / length, dy / length];
    // Several paths between the same two nodes lie beside each other.
    const aside = beside.get(`${edge.layer} ${edge.source} ${edge.target}`) > 1 ? 6 * (["main", "conv", "erase"].indexOf(edge.path) - 1) : 0;
    return [edge, {
      x1: X(edge.source) + 4 * ux - aside * uy, y1: Y(edge.begin) + 4 * uy + aside * ux,
      x2: X(edge.target) - 7 * ux - aside * uy, y2: Y(edge.end) - 7 * uy + aside * ux, angle: (180 * Math.atan2(dy, dx)) / Math.PI,
    }];
  }));
  const line = (edge, attributes) => { const { x1, y1, x2, y2 } = ends.get(edge); return svg("line", { x1, y1, x2, y2, ...attributes }); };
  for (const edge of shown) if (edge.step !== null)
    for (const [color, more] of [["#8a7f00", 9], [HALO, 7]])
      picture.append(line(edge, { stroke: color, "stroke-width": widthOf(edge) + more, "stroke-linecap": "round", class: lit(edge) ? "halo" : "halo faint" }));
  const tab = chosen?.edge ?? shown[0];
  for (const edge of [...shown].reverse()) {
    const { x1, y1, x2, y2, angle } = ends.get(edge), w = widthOf(edge), color = paths[edge.path].color;
    const group = svg("g", {
      class: `edge${edge === chosen?.edge ? " chosen" : ""}${lit(edge) ? "" : " dim"}`, role: "button", tabindex: edge === tab ? 0 : -1, "data-edge": edge.i,
      "aria-pressed": edge === chosen?.edge, "aria-label": `${nameOf(edge)}, ${wayOf(edge)}: ${signed(edge.effect)}${unit}, ${edge.exact === null ? "attributed" : "exact"}`,
    });
    group.append(line(edge, { class: "mark", "stroke-width": w + 4 }));
    group.append(line(edge, { class: "shaft", stroke: color, "stroke-width": w, ...(edge.exact === null ? { "stroke-dasharray": `${4 + w} ${2.5 + 0.5 * w}` } : {}) }));
    group.append(pathMark(edge.path, (x1 + x2) / 2, (y1 + y2) / 2, 2.4 + 0.5 * w), head(edge.effect, x2, y2, angle, w, color));
    group.append(line(edge, { class: "hit", "stroke-width": Math.max(w, 13) }));
    group.append(svg("title", {}, `${nameOf(edge)}\n${wayOf(edge)}: ${effectOf(edge)}${unit}`));
    picture.append(group);
  }
  const ordered = [...nodes.values()].sort((a, b) => a.row - b.row || a.position - b.position);
  const first = ordered.find((node) => isChosen(node)) ?? ordered.at(-1);
  for (const node of ordered) {
    const group = svg("g", {
      class: `node${isChosen(node) ? " chosen" : ""}`, role: "button", tabindex: node === first ? 0 : -1, "data-position": node.position, "data-row": node.row,
      "aria-pressed": isChosen(node), "aria-label": `${token(node.position)} (${node.position}), ${rowName(node.row)}`,
    });
    group.append(svg("circle", { cx: X(node.position), cy: Y(node.row), r: 9, class: "hit" }), svg("circle", { cx: X(node.position), cy: Y(node.row), r: 4, class: "dot" }));
    picture.append(group);
  }
  const at = $("graph").scrollLeft;
  $("graph").replaceChildren(picture);
  $("graph").scrollLeft = at;
}
const isChosen = (node) => chosen !== null && !chosen.edge && chosen.position === node.position && chosen.row === node.row;
const rowName = (row) => (row === data.layers[prompt.model] ? "after the last layer" : Number.isInteger(row) ? `before layer ${row}` : `in layer ${Math.floor(row)}, behind its convolution`);

function drawLegend() {
  const sample = (...parts) => { const made = svg("svg", { width: 36, height: 16, "aria-hidden": "true" }); made.append(...parts); return made; };
  const stroke = (more) => svg("line", { x1: 1, x2: 35, y1: 8, y2: 8, stroke: "#444", "stroke-width": 2.5, ...more });
  const strongest = Math.abs(prompt.list[0].effect);
  const items = [
    ...data.paths.map((path) => [path.word, stroke({ stroke: path.color }), pathMark(path.name, 18, 8, 4)]),
    ["cut: exact", stroke({})], ["attributed", stroke({ "stroke-dasharray": "6.5 4" })],
    ["helps the answer", stroke({ x2: 24 }), head(-1, 33, 8, 0, 2.5, "#444")], ["works against it", stroke({ x2: 28 }), head(1, 29, 8, 0, 2, "#444")],
    ...(prompt.list.some((edge) => edge.step !== null) ? [["the marked route", stroke({ stroke: HALO, "stroke-width": 10 })]] : []),
    [`${Number(strongest.toPrecision(2))}${unit}`, stroke({ "stroke-width": WIDEST })],
  ];
  $("legend").replaceChildren(...items.map(([text, ...parts]) => {
    const item = element("li");
    item.append(sample(...parts), text);
    return item;
  }));
}

// --- beside the graph

const link = (edge) => element("button", nameOf(edge), {
  type: "button", className: "link",
  onclick: (event) => {
    const listed = $("chosen").contains(event.target); // this list is about to be replaced
    choose({ edge });
    if (listed) $("chosen").focus({ preventScroll: true });
  },
});

function drawTable() {
  fill($("edges"), ["edge", "layer", "path", `effect${unit && `,${unit}`}`, "share"], shown.map((edge) => [
    "", edge.layer, paths[edge.path].word, effectOf(edge), percent(Math.abs(edge.effect) / (prompt.whole || 1))]));
  $("edges").querySelectorAll("tbody tr").forEach((line, i) => {
    line.firstChild.append(link(shown[i]));
    line.dataset.edge = shown[i].i;
  });
}

function markRow() {
  for (const line of $("edges").querySelectorAll("tbody tr")) {
    const same = chosen?.edge?.i === Number(line.dataset.edge);
    line.classList.toggle("chosen", same);
    // Only the table's own box moves, never the page.
    if (same) $("edges-box").scrollTop = line.offsetTop - $("edges-box").clientHeight / 2;
  }
}

function drawChosen() {
  const box = $("chosen");
  if (chosen === null) {
    return box.replaceChildren(element("p", "Choose an edge for its numbers, or a node for what it reads and hands on. With the keyboard: Tab to the graph, then arrow keys; Escape leaves nothing chosen. The table has the same edges.", { className: "caption" }));
  }
  if (chosen.edge) return box.replaceChildren(...aboutEdge(chosen.edge));
  const title = element("h3", `${token(chosen.position)} (${chosen.position}), ${rowName(chosen.row)}`);
  const piece = element("p", prompt.pieces[chosen.position], { className: "caption" });
  box.replaceChildren(title, piece, ...listed("Has read", "what lies below", reads(chosen)), ...listed("Hands on", "what lies above", handsOn(chosen)));
}

function aboutEdge(edge) {
  const list = element("dl");
  const rows = [
    ["Effect", `${signed(edge.effect)}${unit}, ${edge.effect < 0 ? "helps the answer" : edge.effect > 0 ? "works against it" : "none"}`],
    ["Exact", edge.exact === null ? "not cut" : `${signed(edge.exact)}${unit}`],
    ["Attributed", edge.attributed === null ? "not attributed" : `${signed(edge.attributed)}${unit}`],
    ["Share", `${percent(Math.abs(edge.effect) / (prompt.whole || 1))} of the absolute effect of all ${count(prompt.n)} edges`],
    ["Layer, path", `${edge.layer}, ${paths[edge.path].word} (${edge.mixer})`],
    ["Source", quoted(edge.source)],
    ["Target", quoted(edge.target)],
    ...(edge.step === null ? [] : [["Route", `hop ${edge.step + 1}`]]),
  ];
  for (const [name, text] of rows) {
    const line = element("div");
    line.append(element("dt", name), element("dd", text));
    list.append(line);
  }
  const found = [element("h3", nameOf(edge)), list];
  if (edge.single) {
    const table = element("table", "", { className: "plain", id: "single" });
    fill(table, ["feature", `attributed${unit && `,${unit}`}`], edge.single.map(([feature, attributed]) => [feature, signed(attributed)]));
    found.push(element("h4", "Strongest features"), element("p", "By the gradient of the model as it is; all features add up to what one gradient attributes to the edge.", { className: "caption" }), table);
  } else if (data.has_features) found.push(element("p", "The features of this edge are not known.", { className: "caption" }));
  return found;
}

function listed(verb, where, edges) {
  const list = element("ul");
  list.append(...edges.map((edge) => {
    const item = element("li");
    item.append(link(edge), ` ${wayOf(edge)}: ${effectOf(edge)}`);
    return item;
  }));
  const total = edges.reduce((sum, edge) => sum + edge.effect, 0);
  const said = edges.length ? `${edges.length} of the edges that the page keeps, in ${where}; added up ${signed(total)}${unit}.` : `None of the edges that the page keeps is in ${where}.`;
  return [element("h4", verb), element("p", said, { className: "caption" }), ...(edges.length ? [list] : [])];
}

// --- wiring

function choose(what, focus = null) {
  chosen = what;
  if (what?.edge && !shown.includes(what.edge)) { // named in a list, but not strong enough to be drawn
    form.elements.strength.value = Math.max(Number(value("strength")), what.edge.i + 1);
    filter();
    if (!shown.includes(what.edge)) shown = [...shown, what.edge].sort((a, b) => a.i - b.i);
    chosen = what;
    drawCaption();
    drawTable();
  }
  drawGraph();
  drawChosen();
  markRow();
  if (focus) $("graph").querySelector(focus)?.focus();
}

function drawCaption() {
  const sum = shown.reduce((total, edge) => total + Math.abs(edge.effect), 0), exact = shown.filter((edge) => edge.exact !== null).length;
  const kept = prompt.list.length < prompt.n ? ` The page keeps the ${count(prompt.list.length)} strongest.` : "";
  $("graph-caption").textContent = shown.length
    ? `${count(shown.length)} of ${count(prompt.n)} edges, ${percent(sum / (prompt.whole || 1))} of the absolute effect; ${exact} of the ${shown.length} are exact.${kept}`
    : `None of the ${count(prompt.n)} edges is shown: choose more paths, layers or strength.${kept}`;
}

function draw() {
  if (prompt === null) return;
  filter();
  $("fact-prompt").replaceChildren(...prompt.text.map(([text, role]) => element("span", text, { className: role, title: role })), " → ", element("b", prompt.target.trim()));
  $("fact-base").textContent = `${prompt.model}: without a cut the target has probability ${Number(prompt.prob.toPrecision(3))}; ${data.measure.name[0].toLowerCase()}${data.measure.name.slice(1)}: ${signed(prompt.measure)}. ` +
    `${count(prompt.exact)} of ${count(prompt.n)} edges were cut.`;
  drawCaption();
  drawLegend();
  drawTable();
  choose(chosen);
}

const selector = (edge) => `[data-edge="${edge.i}"]`;
$("graph").addEventListener("click", (event) => {
  const group = event.target.closest("[data-edge], [data-position]");
  if (group) choose(what(group), group.dataset.edge === undefined ? nodeAt(group) : `[data-edge="${group.dataset.edge}"]`);
  else choose(null);
});
const what = (group) => (group.dataset.edge === undefined
  ? { position: Number(group.dataset.position), row: Number(group.dataset.row) } : { edge: prompt.list[Number(group.dataset.edge)] });
const nodeAt = (group) => `[data-position="${group.dataset.position}"][data-row="${group.dataset.row}"]`;

$("graph").addEventListener("keydown", (event) => {
  const group = event.target.closest("[data-edge], [data-position]");
  if (!group) return;
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    group.dispatchEvent(new MouseEvent("click", { bubbles: true }));
  } else if (event.key in steps) {
    event.preventDefault();
    if (group.dataset.edge !== undefined) { // from the stronger to the weaker
      const next = shown[shown.findIndex((edge) => edge.i === Number(group.dataset.edge)) + steps[event.key]];
      if (next) choose({ edge: next }, selector(next));
    } else {
      const next = neighbour(what(group), event.key);
      if (next) choose(what(next), nodeAt(next));
    }
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && chosen !== null) choose(null); });

/** The nearest node in a direction. */
function neighbour({ position, row }, key) {
  const far = { ArrowLeft: (p, r) => [position - p, r - row], ArrowRight: (p, r) => [p - position, r - row], ArrowUp: (p, r) => [r - row, p - position], ArrowDown: (p, r) => [row - r, p - position] }[key];
  return [...$("graph").querySelectorAll("[data-position]")]
    .map((group) => ({ group, ahead: far(Number(group.dataset.position), Number(group.dataset.row)) }))
    .filter(({ ahead }) => ahead[0] > 0)
    .sort((a, b) => a.ahead[0] + 3 * Math.abs(a.ahead[1]) - b.ahead[0] - 3 * Math.abs(b.ahead[1]))[0]?.group;
}

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", (event) => {
  if (["model", "features"].includes(event.target.name)) listFacts();
  if (["model", "features", "fact"].includes(event.target.name)) takeFact();
  draw();
});
$("edges-csv").onclick = () => save(`edges-${prompt.id}.csv`, [
  ["model", "fact_id", "layer", "mixer", "path", "source", "target", "source_token", "target_token", "attributed", "exact"],
  ...shown.map((edge) => [prompt.model, prompt.id, edge.layer, edge.mixer, edge.path, edge.source, edge.target, prompt.tokens[edge.source], prompt.tokens[edge.target], edge.attributed, edge.exact])]);
let drawnAt = window.innerWidth;
window.addEventListener("resize", () => { if (window.innerWidth !== drawnAt && prompt) { drawnAt = window.innerWidth; drawGraph(); } });

listFacts();
form.elements.strength.value = FIRST;
takeFact();
draw();
document.documentElement.dataset.ready = "true";
