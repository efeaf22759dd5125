// The page: what is asked, and what it is answered with.
import * as ask from "./ask.js";
import { $, el, percent, ranges, save, visible, walk } from "./dom.js";
import * as readings from "./readings.js";

const SLOW = 500; // milliseconds until a wait is said
const TYPING = 300; // and until typing counts as done
const field = (name) => document.querySelector(`[name=${name}]`);

let models = []; // what is known of every model
let asked = { prompt: "", subject: "", target: "", models: [], cuts: [] }; // cuts are those that are kept
let open = null; // the cut that is being made: sources and targets may be empty
let past = []; // states before this one
let tokens = [], subject = []; // of the prompt, as the first model reads it
let answers = new Map(); // what each model has said
let anchor = 0; // token of the last click
let round = 0; // questions so far

const known = (name) => models.find((model) => model.name === name);
const first = () => known(asked.models[0]) ?? models[0];
const blank = () => ({ sources: [], targets: [], layers: all(first().n_layers), path: first().paths.at(-1) });
const all = (n, from = 0) => Array.from({ length: n - from }, (_, i) => i + from);
const reads = (cut) => cut.sources.length > 0 && cut.targets.length > 0;
const cuts_something = (cut) => reads(cut) && Math.min(...cut.sources) <= Math.max(...cut.targets);

// What the server is asked: with the cut that is being made, where it cuts anything.
function state() {
  return { ...asked, cuts: cuts_something(open) ? [...asked.cuts, open] : asked.cuts };
}

// --- changes

const snapshot = () => JSON.stringify({ asked, open });

function change(how) {
  const before = snapshot();
  how();
  if (snapshot() === before) return;
  past.push(before);
  refresh();
}

function undo() {
  if (!past.length) return;
  const prompt = asked.prompt;
  ({ asked, open } = JSON.parse(past.pop()));
  if (asked.prompt !== prompt) tokens = [];
  write();
  refresh();
}

function show(found) {
  change(() => {
    tokens = found.prompt === asked.prompt ? tokens : [];
    const names = found.models.filter(known);
    asked = { ...found, models: names.length ? names : asked.models, cuts: found.cuts.slice(0, -1) };
    open = found.cuts.at(-1) ?? blank();
    write();
  });
}

function cut(made) {
  change(() => {
    if (cuts_something(open)) asked.cuts = [...asked.cuts, open];
    open = made;
  });
  $("tokens-heading").scrollIntoView({ block: "start" });
  $("said").textContent = `Cut: ${words(made)}.`;
}

// --- the fields

function write() {
  for (const name of ["prompt", "subject", "target"]) field(name).value = asked[name];
  for (const box of $("models").querySelectorAll("input")) box.checked = asked.models.includes(box.value);
}

let typing = 0;
function typed() {
  clearTimeout(typing);
  typing = setTimeout(read, TYPING);
}

function read() {
  clearTimeout(typing);
  change(() => {
    const prompt = field("prompt").value;
    if (prompt !== asked.prompt) {
      asked.cuts = [];
      open = blank();
      tokens = [];
    }
    asked = { ...asked, prompt, subject: field("subject").value, target: field("target").value };
  });
}

// --- tokens and the cut that is being made

function toggle(role, position) {
  change(() => {
    const chosen = new Set(open[role]);
    if (!chosen.delete(position)) chosen.add(position);
    open = { ...open, [role]: [...chosen].sort((a, b) => a - b) };
    // The last token reads the answer: it is the target where none is chosen.
    if (role === "sources" && !open.targets.length) open.targets = [tokens.length - 1];
  });
}

function stretch(role, from, to) {
  change(() => {
    const between = all(Math.max(from, to) + 1, Math.min(from, to));
    open = { ...open, [role]: [...new Set([...open[role], ...between])].sort((a, b) => a - b) };
    if (role === "sources" && !open.targets.length) open.targets = [tokens.length - 1];
  });
}

function draw_tokens() {
  const box = $("tokens");
  if (box.childElementCount !== tokens.length || [...box.children].some((button, i) => button.dataset.token !== tokens[i])) {
    box.replaceChildren(...tokens.map((text, position) => el("button", {
      type: "button", className: "token", data: { token: text },
      on: {
        click: (event) => {
          const role = document.querySelector("[name=role]:checked").value;
          if (event.shiftKey) stretch(role, anchor, position);
          else toggle(role, position);
          anchor = position;
        },
        keydown: (event) => {
          const role = { s: "sources", t: "targets" }[event.key.toLowerCase()];
          if (!role || event.ctrlKey || event.metaKey || event.altKey) return;
          event.preventDefault();
          toggle(role, position);
          anchor = position;
        },
      },
    }, el("span", { text: visible(text) }), el("span", { className: "marks" }))));
    walk(box, 1);
  }
  [...box.children].forEach((button, position) => {
    const source = open.sources.includes(position), target = open.targets.includes(position);
    button.className = ["token", source ? "source" : "", target ? "target" : "", subject.includes(position) ? "subject" : ""].filter(Boolean).join(" ");
    button.querySelector(".marks").textContent = [source ? "source" : "", target ? "target" : ""].filter(Boolean).join(" ") || position;
    button.setAttribute("aria-pressed", source || target);
    button.setAttribute("aria-label", `${visible(tokens[position])}, token ${position}${source ? ", source" : ""}${target ? ", target" : ""}`);
  });
}

function draw_controls() {
  const n = first().n_layers, paths = first().paths;
  $("paths").hidden = paths.length < 2;
  if ($("paths").dataset.are !== paths.join()) {
    $("paths").dataset.are = paths.join();
    $("paths").replaceChildren(el("legend", { text: "Path" }), ...paths.map((path) => el("label", {},
      el("input", { type: "radio", name: "path", value: path, on: { change: () => change(() => { open = { ...open, path }; }) } }), ` ${path}`)));
  }
  for (const box of $("paths").querySelectorAll("input")) box.checked = box.value === open.path;
  const [low, high] = [open.layers[0], open.layers.at(-1)];
  for (const [name, value] of [["first", low], ["last", high]]) {
    field(name).max = n - 1;
    field(name).value = value;
  }
  const filled = $("filled"), share = (layer) => (n > 1 ? (layer / (n - 1)) * 100 : 0);
  filled.style.left = `${share(low)}%`;
  filled.style.right = `${100 - share(high)}%`;
  $("layers-said").textContent = `${ranges(open.layers)} of 0–${n - 1}`;
  // The handle that can still move lies on top.
  field("first").style.zIndex = low > (n - 1) / 2 ? 2 : 1;
  field("last").style.zIndex = low > (n - 1) / 2 ? 1 : 2;
}

function slid(moved) {
  let low = Number(field("first").value), high = Number(field("last").value);
  if (low > high) [low, high] = moved === "first" ? [low, low] : [high, high];
  change(() => { open = { ...open, layers: all(high + 1, low) }; });
}

function words(one) {
  const named = (positions) => positions.map((i) => visible(tokens[i] ?? "")).join(" ");
  return `${named(one.sources)} (${ranges(one.sources)}) → ${named(one.targets)} (${ranges(one.targets)}), layers ${ranges(one.layers)}, path ${one.path}`;
}

function draw_cuts() {
  const button = (text, label, click) => el("button", { type: "button", text, aria: { label }, on: { click } });
  const kept = asked.cuts.map((one, i) => el("li", {}, el("span", { text: words(one) }),
    button("Change", `Change cut ${i + 1}`, () => change(() => {
      const others = asked.cuts.filter((_, j) => j !== i);
      asked.cuts = cuts_something(open) ? [...others, open] : others;
      open = one;
    })),
    button("Remove", `Remove cut ${i + 1}`, () => change(() => { asked.cuts = asked.cuts.filter((_, j) => j !== i); }))));
  const made = cuts_something(open) ? [el("li", { className: "open" }, el("span", { text: words(open) }),
    button("Remove", "Remove this cut", () => change(() => { open = blank(); })))] : [];
  const focused = $("cuts").contains(document.activeElement);
  $("cuts").replaceChildren(...kept, ...made);
  const nothing = $("nothing");
  nothing.hidden = !reads(open) || cuts_something(open);
  nothing.textContent = "Nothing is cut: no source stands before a target. Choose an earlier source.";
  $("another").disabled = !cuts_something(open);
  $("clear").disabled = !asked.cuts.length && !open.sources.length && !open.targets.length;
  $("undo").disabled = !past.length;
  // What was pressed is gone: the keyboard goes on where it can be taken back.
  if (focused) $("undo").focus();
}

// --- answers

function card(model) {
  const found = answers.get(model), box = el("article", { className: "card", data: { model } }, el("h3", { text: model }));
  if (!found) return box;
  if (found.error) {
    box.append(el("p", { className: "note", text: found.error }));
    return box;
  }
  const { base, prob, token, base_rank, rank } = found.answer, cut = state().cuts.length > 0;
  box.append(el("p", { className: "big", text: cut ? `${visible(token)}: ${percent(base)} → ${percent(prob)}` : `${visible(token)}: ${percent(base)}` }));
  box.append(el("p", { className: "caption", text: cut ? `Rank ${base_rank} → ${rank}. Answered in ${Math.round(found.took)} ms.` : `Rank ${base_rank}. Answered in ${Math.round(found.took)} ms.` }));
  const bar = (value, name) => {
    const element = el("div", { className: name });
    element.style.width = `${Math.max(value * 100, 0.5)}%`;
    return element;
  };
  const rows = found.top.map((row) => el("tr", { className: row.id === found.answer.id ? "watched" : "" },
    el("th", { text: visible(row.token), scope: "row" }), el("td", { className: "number", text: percent(row.base) }),
    ...(cut ? [el("td", { className: "number", text: percent(row.prob) })] : []),
    el("td", { className: "bars" }, bar(row.base, "bar"), ...(cut ? [bar(row.prob, "bar after")] : []))));
  const head = ["says", "before", ...(cut ? ["cut"] : []), ""].map((text) => el("th", { text, scope: "col", className: ["before", "cut"].includes(text) ? "number" : "" }));
  box.append(el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)));
  return box;
}

function draw_answers() {
  $("answers").replaceChildren(...asked.models.map(card));
}

function complain(text) {
  $("complaint").textContent = text;
  $("complaint").hidden = !text;
}

let waits = [];
// Say that something takes long, for as long as it does.
async function waiting(what, run) {
  const one = { what, since: performance.now() };
  waits.push(one);
  const timer = setInterval(said_waits, 100);
  try {
    return await run();
  } finally {
    waits = waits.filter((other) => other !== one);
    clearInterval(timer);
    said_waits();
  }
}

function said_waits() {
  const slow = waits.filter(({ since }) => performance.now() - since > SLOW);
  $("working").hidden = !slow.length;
  if (slow.length) {
    const seconds = Math.floor((performance.now() - Math.min(...slow.map(({ since }) => since))) / 1000);
    $("working").firstElementChild.textContent = `Working on ${[...new Set(slow.map(({ what }) => what))].join(" and ")}… ${seconds} s`;
  }
}

function refresh() {
  refreshing = answer_all();
}

let refreshing = null; // the answers and code of the newest state
async function answer_all() {
  const mine = ++round, started = performance.now(), now = state();
  draw_all();
  $("examples").hidden = asked.prompt !== "";
  document.documentElement.dataset.round = mine;
  if (!asked.prompt.trim()) {
    ask.cancel("predict");
    answers.clear();
    tokens = [];
    draw_all();
    draw_answers();
    history.replaceState(null, "", location.pathname);
    return;
  }
  complain("");
  for (const box of $("answers").children) box.setAttribute("aria-busy", "true");
  await waiting("the answer", () => Promise.all(asked.models.map(async (model) => {
    let found;
    try {
      found = await ask.reading("predict", model, now);
    } catch (error) {
      if (!(error instanceof ask.Refused)) throw error;
      found = { error: error.message };
    }
    if (found.dropped || mine !== round) return;
    found.took = performance.now() - started;
    answers.set(model, found);
    if (found.tokens && model === asked.models[0]) {
      tokens = found.tokens;
      subject = found.subject;
      draw_all();
    }
    draw_answers();
    document.documentElement.dataset.took = `${found.took}`;
  })));
  if (mine !== round) return;
  document.documentElement.dataset.answered = mine;
  const told = answers.get(asked.models[0]);
  if (told?.answer) $("said").textContent = `${visible(told.answer.token)}: ${percent(told.answer.base)} before, ${percent(told.answer.prob)} now.`;
  await copyable(now, told);
}

function draw_all() {
  draw_tokens();
  draw_controls();
  draw_cuts();
}

// --- code, link, files

let code = {};
async function copyable(now, told) {
  try {
    const found = await ask.code({ ...now, target: told?.target ?? now.target });
    if (found.dropped) return;
    code = { ...found, link: `${location.origin}${location.pathname}#${found.link}` };
    $("python").textContent = code.python;
    $("command").textContent = code.command;
    // The answer that the person named, or none, stays in the link as it is.
    history.replaceState(null, "", code.link);
  } catch (error) {
    complain(error.message);
  }
}

async function copy(what) {
  const said = $("copied");
  // What is copied is of the newest click, which may still wait for its answer.
  for (let newest = null; newest !== refreshing;) await (newest = refreshing);
  try {
    await navigator.clipboard.writeText(code[what] ?? "");
    said.textContent = "Copied.";
  } catch {
    const shown = $(what);
    if (shown) {
      shown.parentElement.open = true;
      getSelection().selectAllChildren(shown);
    }
    said.textContent = shown ? "The browser does not let pages copy: it is chosen below." : "The browser does not let pages copy: take the address above.";
  }
  setTimeout(() => { said.textContent = ""; }, 4000);
}

function answers_csv() {
  const rows = [["model", "token", "token_id", "base_prob", "prob", "watched"]];
  for (const model of asked.models) {
    const found = answers.get(model);
    for (const row of found?.top ?? []) rows.push([model, row.token, row.id, row.base, row.prob, row.id === found.answer.id]);
  }
  save("answers.csv", rows);
}

// --- readings

async function look(name) {
  const model = field("model").value, box = $("reading");
  complain("");
  const more = name === "heatmap" ? { window: Number(field("window").value), path: known(model).paths.includes(open.path) ? open.path : known(model).paths.at(-1) } : {};
  // What stands in the cut that is being made is cut too.
  const told = answers.get(asked.models[0]), now = { ...state(), target: told?.target ?? asked.target };
  box.setAttribute("aria-busy", "true");
  try {
    const found = await waiting({ heatmap: "the heatmap", flow: "the flow", layers: "the layers" }[name], () => ask.reading(name, model, now, more));
    if (found.dropped) return;
    const cuts = now.cuts.length;
    box.replaceChildren(...readings[name](found, cut), ...(cuts ? [el("p", { className: "caption", text: `With ${cuts === 1 ? "the cut" : `the ${cuts} cuts`} above.` })] : []));
    box.dataset.shows = name;
    box.dataset.of = model;
  } catch (error) {
    if (!(error instanceof ask.Refused)) throw error;
    box.replaceChildren(el("p", { className: "note", text: error.message }));
  } finally {
    box.removeAttribute("aria-busy");
  }
}

// --- facts

async function find() {
  const found = await ask.search(field("words").value);
  if (found.dropped) return;
  $("facts").replaceChildren(...found.facts.map((fact) => el("li", {}, el("button", {
    type: "button", text: `${fact.prompt} → ${fact.target.trim()}`,
    on: { click: () => show({ ...fact, models: asked.models, cuts: [] }) },
  }))), ...(found.facts.length ? [] : [el("li", { text: "No fact has these words." })]));
}

// --- begin

async function from_link() {
  if (location.hash.length < 2 || location.href === code.link) return;
  const found = await ask.open(location.hash);
  show(found.state);
}

function guarded(run) {
  return async (...given) => {
    try {
      await run(...given);
    } catch (error) {
      if (!(error instanceof ask.Refused)) throw error;
      complain(error.message);
    }
  };
}

async function begin() {
  const told = await ask.about();
  models = told.models;
  asked.models = models.map((model) => model.name);
  open = blank();
  $("models").append(...models.map((model) => el("label", {}, el("input", {
    type: "checkbox", name: "chosen", value: model.name, checked: true,
    on: { change: () => change(() => {
      const chosen = [...$("models").querySelectorAll("input:checked")].map((box) => box.value);
      asked.models = chosen.length ? chosen : asked.models;
      if (!first().paths.includes(open.path)) open = { ...open, path: first().paths.at(-1) };
      write();
    }) },
  }), ` ${model.name}: ${model.n_layers} layers, ${model.kinds.join(", ")}`)));
  field("model").append(...models.map((model) => el("option", { text: model.name, value: model.name })));
  $("of-model").hidden = models.length < 2;
  field("window").max = Math.max(...models.map((model) => model.n_layers));
  field("window").value = Math.ceil(first().n_layers / 2);
  $("examples").append(...told.examples.map((example) => el("button", { type: "button", on: { click: () => show({ ...example.state, models: asked.models }) } },
    el("strong", { text: example.title }), el("span", { text: example.says }))));
  for (const name of ["prompt", "subject", "target"]) {
    field(name).maxLength = told.most_characters;
    field(name).addEventListener("input", typed);
    field(name).addEventListener("change", read);
  }
  field("words").addEventListener("input", guarded(find));
  $("finding").addEventListener("toggle", guarded(find));
  for (const name of ["first", "last"]) field(name).addEventListener("input", () => slid(name));
  $("another").addEventListener("click", () => change(() => {
    asked.cuts = [...asked.cuts, open];
    open = { ...blank(), layers: open.layers, path: open.path };
  }));
  $("undo").addEventListener("click", undo);
  $("clear").addEventListener("click", () => change(() => {
    asked.cuts = [];
    open = { ...open, sources: [], targets: [] };
  }));
  $("cancel").addEventListener("click", () => ask.cancel());
  $("csv").addEventListener("click", answers_csv);
  for (const button of document.querySelectorAll("[data-reading]")) button.addEventListener("click", guarded(() => look(button.dataset.reading)));
  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button.dataset.copy));
  document.addEventListener("keydown", (event) => {
    const writes = event.target.matches("textarea, input:not([type=radio], [type=checkbox], [type=range])");
    if (event.key === "z" && (event.ctrlKey || event.metaKey) && !event.shiftKey && !writes) {
      event.preventDefault();
      undo();
    }
    if (event.key === "Escape") ask.cancel();
  });
  addEventListener("hashchange", guarded(from_link));
  draw_all();
  await from_link();
  past = [];
  draw_cuts();
  document.documentElement.dataset.ready = "";
}

guarded(begin)();
