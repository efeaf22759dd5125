// The page of a flow: the edges of one prompt as a graph to click through, and the same edges as a table.
import { byId, el, fill, percent, short, visible } from "./dom.js";
import { LIGHT, savePng, saveSvg } from "./figures.js";
import { frame, graph, nodesOf } from "./graph.js";
import { data, ready, saves, theme, written } from "./carried.js";

const form = byId("switches");
const FIRST = 40; // edges that are shown at first
const words = Object.fromEntries(data.paths.map((path) => [path.name, path.word]));
const unit = data.measure.unit ? ` ${data.measure.unit}` : "";
let prompt = null; // the chosen fact's
let shown = []; // its edges that the switches let through, the strongest first
let chosen = null; // { edge } or { position, row }

// --- words and numbers

function signed(value) {
  if (value === null) return "–";
  return Math.abs(value) < 5e-4 ? "0" : `${value < 0 ? "−" : "+"}${Number(Math.abs(value).toPrecision(3))}`;
}
const token = (i) => short(visible(prompt.tokens[i]), 16);
const quoted = (i) => `‘${visible(prompt.tokens[i])}’ (${prompt.pieces[i]})`;
/** The effect of an edge; what is attributed only is about so much. */
const effectOf = (edge) => `${edge.exact === null ? "≈ " : ""}${signed(edge.effect)}`;
const shareOf = (effect) => percent(effect / (prompt.whole || 1));
const nameOf = (edge) => `${token(edge.source)} (${edge.source}) → ${token(edge.target)} (${edge.target})`;
const wayOf = (edge) => `layer ${edge.layer}, ${words[edge.path]}`;
const count = (n) => n.toLocaleString("en");
function rowName(row) {
  if (row === data.layers[prompt.model]) return "after the last layer";
  return Number.isInteger(row) ? `before layer ${row}` : `in layer ${Math.floor(row)}, behind its convolution`;
}

/** The edges of a prompt, one object each, in the order of strength; `effect` is the exact number where there is one. */
function edgesOf(one) {
  return one.edges.layer.map((_, id) => {
    const edge = Object.fromEntries(Object.entries(one.edges).map(([name, values]) => [name, values[id]]));
    return { ...edge, id, effect: edge.exact ?? edge.attributed, single: one.single[id] ?? null };
  });
}

// --- what is switched on

const value = (name) => form.elements[name]?.value;

function listFacts() {
  const before = prompt?.id, select = form.elements.fact;
  const found = data.prompts.map((one, i) => ({ one, i })).filter(({ one }) => ["model", "features"].every((name) => [undefined, one[name]].includes(value(name))));
  select.replaceChildren(...found.map(({ one, i }) =>
    el("option", { text: short(`${one.text.map(([text]) => text).join("")} → ${one.target.trim()}`, 90), value: String(i) })));
  const same = found.find(({ one }) => one.id === before);
  if (same) select.value = String(same.i);
}

function takeFact() {
  prompt = data.prompts[value("fact") || -1] ?? null;
  if (prompt === null) return;
  prompt.list ??= edgesOf(prompt);
  const deepest = data.layers[prompt.model] - 1, { strength } = form.elements, before = Number(strength.value);
  for (const name of ["from", "to"]) form.elements[name].max = deepest;
  if (Number(value("to")) > deepest) form.elements.to.value = deepest;
  strength.max = prompt.list.length;
  strength.value = Math.min(before, prompt.list.length);
  chosen = null;
}

function filter() {
  const on = new Set([...form.querySelectorAll('[name="path"]:checked')].map((box) => box.value));
  const [from, to] = ["from", "to"].map((name) => Number(value(name)));
  const weakest = Math.abs(prompt.list[Number(value("strength")) - 1]?.effect ?? 0);
  form.elements.least.value = `at least ${Number(weakest.toPrecision(2))}${unit}`;
  shown = prompt.list.filter((edge) => on.has(edge.path) && edge.layer >= from && edge.layer <= to &&
    (Math.abs(edge.effect) >= weakest || edge.lead) && (!form.elements.exact.checked || edge.exact !== null));
  if (chosen?.edge && !shown.includes(chosen.edge)) chosen = null;
}

// --- the graph

/** Edges into a position below a row, and out of it from the row on: among all that the page keeps. */
const reads = ({ position, row }) => prompt.list.filter((edge) => edge.target === position && edge.end <= row);
const handsOn = ({ position, row }) => prompt.list.filter((edge) => edge.source === position && edge.begin >= row);

function figure(colours) {
  const edges = shown.map((edge) => ({
    ...edge, hop: edge.step, click: () => choose({ edge }),
    says: `${nameOf(edge)}, ${wayOf(edge)}: ${signed(edge.effect)}${unit}, ${edge.exact === null ? "attributed" : "exact"}`,
  }));
  const nodes = nodesOf(shown, prompt.tokens, data.layers[prompt.model]).map((node) => (
    { ...node, says: `${token(node.position)} (${node.position}), ${rowName(node.row)}`, click: () => choose(node) }));
  return graph({
    tokens: prompt.tokens, subject: prompt.subject, layers: data.layers[prompt.model], edges, nodes, answer: prompt.target.trim(), words,
    unit: data.measure.unit, most: prompt.list[0].effect, choosing: true,
    name: `Graph of ${shown.length} edges, layers from below to above, tokens from left to right; the same edges are in the table`,
  }, colours, byId("graph").clientWidth);
}

function drawGraph() {
  frame(byId("graph"), figure(theme()));
  light();
}

/** Mark what is chosen, and leave the light on what belongs to it. */
function light() {
  const lit = new Set(chosen === null ? shown : chosen.edge ? [chosen.edge] : [...reads(chosen), ...handsOn(chosen)]);
  for (const mark of byId("graph").querySelectorAll(".mark")) {
    const { edge, position, row } = mark.dataset;
    const own = chosen !== null && (chosen.edge ? Number(edge) === chosen.edge.id : Number(position) === chosen.position && Number(row) === chosen.row);
    mark.classList.toggle("chosen", own);
    mark.classList.toggle("dim", edge !== undefined && !lit.has(prompt.list[edge]));
    mark.setAttribute("aria-pressed", own);
    if (own) mark.parentNode.querySelectorAll(edge === undefined ? ".node" : ".edge").forEach((other) => other.setAttribute("tabindex", other === mark ? 0 : -1));
  }
  for (const halo of byId("graph").querySelectorAll(".halo")) halo.classList.toggle("dim", !lit.has(prompt.list[halo.dataset.of]));
}

// --- beside the graph

const link = (edge) => el("button", {
  type: "button", className: "link", text: nameOf(edge),
  on: {
    click: (event) => {
      const inList = byId("chosen").contains(event.target); // which is about to be replaced
      choose({ edge });
      if (inList) byId("chosen").focus({ preventScroll: true });
    },
  },
});
const heading = (text) => ({ text: `${text}${unit && `,${unit}`}`, number: true });

function drawTable() {
  fill(byId("edges"), ["edge", "layer", "path", heading("effect"), { text: "share", number: true }], shown.map((edge) => [
    link(edge), edge.layer, words[edge.path], effectOf(edge), shareOf(Math.abs(edge.effect))]));
  byId("edges").querySelectorAll("tbody tr").forEach((line, i) => { line.dataset.edge = shown[i].id; });
}

function markRow() {
  const box = byId("edges-box");
  for (const line of box.querySelectorAll("tbody tr")) {
    const same = chosen?.edge?.id === Number(line.dataset.edge);
    line.classList.toggle("chosen", same);
    // Only the table's own box moves, never the page.
    if (same) box.scrollTop = line.offsetTop - box.clientHeight / 2;
  }
}

const caption = (text) => el("p", { text, className: "caption" });

function about() {
  if (chosen === null) return [caption("Choose an edge for its numbers, or a node for what it reads and hands on. With the keyboard: Tab to the graph, then arrow keys; Escape leaves nothing chosen. The table has the same edges.")];
  if (chosen.edge) return aboutEdge(chosen.edge);
  return [el("h3", { text: `${token(chosen.position)} (${chosen.position}), ${rowName(chosen.row)}` }), caption(prompt.pieces[chosen.position]),
    ...listed("Has read", "what lies below", reads(chosen)), ...listed("Hands on", "what lies above", handsOn(chosen))];
}

function aboutEdge(edge) {
  const rows = [
    ["Effect", `${signed(edge.effect)}${unit}, ${edge.effect < 0 ? "helps the answer" : edge.effect > 0 ? "works against it" : "none"}`],
    ["Exact", edge.exact === null ? "not cut" : `${signed(edge.exact)}${unit}`],
    ["Attributed", edge.attributed === null ? "not attributed" : `${signed(edge.attributed)}${unit}`],
    ["Share", `${shareOf(Math.abs(edge.effect))} of the absolute effect of all ${count(prompt.n)} edges`],
    ["Layer, path", `${edge.layer}, ${words[edge.path]} (${edge.mixer})`],
    ["Source", quoted(edge.source)],
    ["Target", quoted(edge.target)],
    ...(edge.step === null ? [] : [["Route", `hop ${edge.step + 1}`]]),
  ];
  const list = el("dl", {}, ...rows.map(([name, text]) => el("div", {}, el("dt", { text: name }), el("dd", { text }))));
  const unknown = data.has_features ? [caption("The features of this edge are not known.")] : [];
  const features = edge.single && [el("h4", { text: "Strongest features" }),
    caption("By the gradient of the model as it is; all features add up to what one gradient attributes to the edge."),
    fill(el("table", { className: "plain", id: "single" }), ["feature", heading("attributed")], edge.single.map(([feature, attributed]) => [feature, signed(attributed)]))];
  return [el("h3", { text: nameOf(edge) }), list, ...(features ?? unknown)];
}

function listed(verb, where, edges) {
  const total = edges.reduce((sum, edge) => sum + edge.effect, 0);
  const said = edges.length ? `${edges.length} of the edges that the page keeps, in ${where}; added up ${signed(total)}${unit}.` : `None of the edges that the page keeps is in ${where}.`;
  const list = el("ul", {}, ...edges.map((edge) => el("li", {}, link(edge), ` ${wayOf(edge)}: ${effectOf(edge)}`)));
  return [el("h4", { text: verb }), caption(said), ...(edges.length ? [list] : [])];
}

// --- wiring

function choose(what) {
  chosen = what;
  if (what?.edge && !shown.includes(what.edge)) { // named in a list, but not strong enough to be drawn
    form.elements.strength.value = Math.max(Number(value("strength")), what.edge.id + 1);
    filter();
    if (!shown.includes(what.edge)) shown = [...shown, what.edge].toSorted((a, b) => a.id - b.id);
    chosen = what;
    drawEdges();
  }
  light();
  byId("chosen").replaceChildren(...about());
  markRow();
}

function drawEdges() {
  const sum = shown.reduce((total, edge) => total + Math.abs(edge.effect), 0), exact = shown.filter((edge) => edge.exact !== null).length;
  const kept = prompt.list.length < prompt.n ? ` The page keeps the ${count(prompt.list.length)} strongest.` : "";
  byId("graph-caption").textContent = shown.length
    ? `${count(shown.length)} of ${count(prompt.n)} edges, ${shareOf(sum)} of the absolute effect; ${exact} of the ${shown.length} are exact.${kept}`
    : `None of the ${count(prompt.n)} edges is shown: choose more paths, layers or strength.${kept}`;
  drawTable();
  drawGraph();
}

function draw() {
  if (prompt === null) return;
  filter();
  byId("fact-prompt").replaceChildren(...written(prompt.text), " → ", el("b", { text: prompt.target.trim() }));
  byId("fact-base").textContent = `${prompt.model}: without a cut the target has probability ${Number(prompt.prob.toPrecision(3))}; ${data.measure.name[0].toLowerCase()}${data.measure.name.slice(1)}: ${signed(prompt.measure)}. ` +
    `${count(prompt.exact)} of ${count(prompt.n)} edges were cut.`;
  drawEdges();
  choose(chosen);
}

byId("graph").addEventListener("click", (event) => { if (!event.target.closest(".mark")) choose(null); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && chosen !== null) choose(null); });
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", ({ target: { name } }) => {
  if (["model", "features"].includes(name)) listFacts();
  if (["model", "features", "fact"].includes(name)) takeFact();
  draw();
});
saves("edges-csv", () => [`edges-${prompt.id}.csv`, [
  ["model", "fact_id", "layer", "mixer", "path", "source", "target", "source_token", "target_token", "attributed", "exact"],
  ...shown.map((edge) => [prompt.model, prompt.id, edge.layer, edge.mixer, edge.path, edge.source, edge.target, prompt.tokens[edge.source], prompt.tokens[edge.target], edge.attributed, edge.exact])]]);
byId("graph-svg").addEventListener("click", () => saveSvg(`flow-${prompt.id}`, figure(LIGHT)));
byId("graph-png").addEventListener("click", () => savePng(`flow-${prompt.id}`, figure(LIGHT)));

listFacts();
form.elements.strength.value = FIRST;
takeFact();
draw();
ready(() => { if (prompt) drawGraph(); });
