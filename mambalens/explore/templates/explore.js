// A prompt to play with: what is asked, and what the models answer. It knows no server, no address and no file of its own:
// `ask(question, signal)` brings it an answer, so that a page and a notebook can carry it alike.
import { all, csv, download, el, percent, ranges, visible, walk } from "./dom.js";
import { DARK, LIGHT, savePng, saveSvg, scheme } from "./figures.js";
import { frame } from "./graph.js";
import * as readings from "./readings.js";

const SLOW = 500; // milliseconds until a wait is said
const TYPING = 300; // and until typing counts as done
const STEPS = 200; // that can be taken back
const GROUPS = ["all", "slow", "middle", "fast", "context-dependent", "context-independent"];
const LOOKS = { heatmap: "Heatmap", flow: "Flow", routes: "Routes", contributions: "Contributions", layers: "Layer by layer", attention: "Attention" };
const MEANS = { heatmap: "every token cut, in windows of layers", flow: "which edges the answer runs along", routes: "chains of tokens",
  contributions: "what adds up to the answer", layers: "what each layer would say", attention: "what one layer reads" };
const ABLATIONS = { zero: "nothing", mean: "its mean over facts", resample: "another prompt's value" };
const TEXTS = ["prompt", "subject", "target", "other", "other_subject"];
let instances = 0;

/** What was asked cannot be answered; the message is a sentence. */
class Refused extends Error {}

/**
 * Fill an element with the page.
 *
 * ask(question, signal): a promise of the answer; { error }, { dropped } or { loading } where there is none.
 * options: link (of the state to begin with), keys (who hears Ctrl+Z and Escape; the element itself by default),
 * moved(link, state): the state has changed, address(link): where it can be opened; none: it cannot.
 */
export function explore(root, ask, options = {}) {
  const id = `explore-${++instances}`;
  let models = []; // what is known of every model
  let asked = { prompt: "", subject: "", target: "", other: "", other_subject: "", ablation: "zero", models: [], cuts: [] };
  let open = null; // the cut that is being made, beside those that are kept; its sources and targets may be empty
  let past = []; // states before this one
  let merging = null; // changes of this kind are one step
  let tokens = [], subject = []; // of the prompt, as the first model reads it
  const answers = new Map(); // what each model has said
  let anchor = 0; // token of the last click
  let round = 0; // states so far
  let looked = null; // the reading that is shown
  let code = {}; // of the newest state
  let refreshing = null; // the answers and code of the newest state
  const asking = new Map(); // questions that wait

  // --- questions

  async function question(told, kind) {
    asking.get(kind)?.abort();
    const controller = new AbortController();
    asking.set(kind, controller);
    try {
      const found = await ask(told, controller.signal);
      if (controller.signal.aborted) return { dropped: true };
      if (found.error) throw new Refused(found.error);
      return found;
    } finally {
      if (asking.get(kind) === controller) asking.delete(kind);
    }
  }
  const cancel = (kind = "") => { for (const [key, controller] of asking) if (key.startsWith(kind)) controller.abort(); };

  // --- states

  const known = (name) => models.find((model) => model.name === name);
  const first = () => known(asked.models[0]) ?? models[0];
  const blank = () => ({ sources: [], targets: [], layers: all(first().n_layers), path: first().paths.at(-1), features: "all" });
  const chosen = (made) => made.sources.length > 0 && made.targets.length > 0;
  const cutting = (made) => chosen(made) && Math.min(...made.sources) <= Math.max(...made.targets);
  const state = () => ({ ...asked, cuts: cutting(open) ? [...asked.cuts, open] : asked.cuts });
  const snapshot = () => JSON.stringify({ asked, open });

  function change(how, kind = null) {
    const before = snapshot();
    how();
    if (snapshot() === before) return;
    if (kind === null || kind !== merging) past = [...past.slice(-STEPS), before];
    merging = kind;
    refresh();
  }

  function undo() {
    if (!past.length) return;
    const { prompt } = asked;
    ({ asked, open } = JSON.parse(past.pop()));
    merging = null;
    if (asked.prompt !== prompt) tokens = [];
    write();
    refresh();
  }

  function show(found) {
    change(() => {
      tokens = found.prompt === asked.prompt ? tokens : [];
      const names = (found.models ?? []).filter(known), cuts = found.cuts ?? [];
      asked = { ...asked, other: "", other_subject: "", ablation: "zero", ...found, models: names.length ? names : asked.models, cuts: cuts.slice(0, -1) };
      open = cuts.at(-1) ?? blank();
      write();
    });
  }

  function cut(...made) {
    change(() => {
      asked.cuts = [...asked.cuts, ...(cutting(open) ? [open] : []), ...made.slice(0, -1)];
      open = made.at(-1);
    });
    ui.stage.scrollIntoView({ block: "start" });
    ui.said.textContent = `Cut: ${readings.inWords(made.at(-1), tokens)}.`;
  }

  // --- the parts of the page

  const button = (text, click, more = {}) => el("button", { type: "button", text, on: { click }, ...more });
  const radios = (name, values, pick) => values.map(([value, text]) => el("label", {},
    el("input", { type: "radio", name: `${id}-${name}`, value, data: { name }, on: { change: () => pick(value) } }), ` ${text}`));
  const labelled = (text, field, className = "") => el("label", { className }, el("span", { text }), field);
  const input = (name, more = {}) => el("input", { autocomplete: "off", spellcheck: false, data: { name }, ...more });
  const section = (name, title, ...children) => {
    const heading = el("h2", { id: `${id}-${name}`, text: title, tabIndex: -1 });
    return el("section", { className: name, aria: { labelledby: heading.id } }, heading, ...children);
  };

  const fields = {
    prompt: el("textarea", { rows: 1, spellcheck: false, data: { name: "prompt" }, placeholder: "A text that ends right before the answer" }),
    subject: input("subject"), target: input("target"), other: input("other"), other_subject: input("other_subject"), words: input("words", { type: "search" }),
    first: input("first", { type: "range", min: 0, value: 0, ariaLabel: "First layer" }), last: input("last", { type: "range", min: 0, value: 0, ariaLabel: "Last layer" }),
    group: el("select", { data: { name: "group" } }), feature: input("feature", { type: "number", min: 0, value: 0, ariaLabel: "Number of the feature" }),
    ablation: el("select", { data: { name: "ablation" } }, ...Object.entries(ABLATIONS).map(([value, text]) => el("option", { value, text }))),
    model: el("select", { data: { name: "model" } }), window: input("window", { type: "number", min: 1, value: 1 }), layer: input("layer", { type: "number", min: 0, value: 0 }),
  };
  const ui = {
    examples: el("div", { className: "examples", role: "group", ariaLabel: "Examples" }),
    facts: el("ul", { className: "facts" }), models: el("fieldset", { className: "models" }, el("legend", { text: "Models" })),
    paths: el("fieldset", { className: "paths" }), filled: el("div", { className: "filled" }), layers: el("output"),
    tokens: el("div", { className: "tokens", role: "group", ariaLabel: "Tokens of the prompt" }),
    hint: el("p", { className: "hint" }), nothing: el("p", { className: "note", hidden: true }), cuts: el("ol", { className: "cuts" }),
    complaint: el("p", { className: "note complaint", role: "alert", hidden: true }), working: el("span"), answers: el("div", { className: "cards" }),
    said: el("p", { className: "unseen", ariaLive: "polite" }), reading: el("div", { className: "reading", ariaLive: "polite" }),
    copied: el("span", { role: "status", className: "copied" }), python: el("pre", { tabIndex: 0, className: "python" }), command: el("pre", { tabIndex: 0, className: "command" }),
    loading: el("p", { className: "loading", role: "status", text: "Loading…" }),
  };
  ui.another = button("Keep this cut, begin another", keep, { className: "another" });
  ui.undo = button("Undo", undo, { className: "undo", title: "Ctrl+Z" });
  ui.clear = button("Clear cuts", clear, { className: "clear" });
  ui.wait = el("p", { className: "working", hidden: true }, ui.working, " ", button("Cancel", () => cancel(), { className: "cancel", title: "Escape" }));
  ui.finding = el("details", {}, el("summary", { text: "Find a fact" }), labelled("Words", fields.words), ui.facts);
  ui.resample = el("div", { className: "fields", hidden: true }, labelled("Other prompt", fields.other, "wide"), labelled("Its subject, may be empty", fields.other_subject));
  ui.looks = Object.entries(LOOKS).map(([name, text]) => button(text, guarded(() => look(name)), { data: { reading: name }, title: MEANS[name] }));
  ui.of_model = labelled("Model", fields.model);
  ui.stage = el("div", { className: "stage" },
    section("making", "Tokens and cuts",
      el("div", { className: "row" },
        el("fieldset", {}, el("legend", { text: "A click chooses" }), ...radios("role", [["sources", "sources"], ["targets", "targets"]], () => {})),
        ui.paths,
        el("fieldset", { className: "layers" }, el("legend", {}, "Layers ", ui.layers),
          el("div", { className: "handles" }, el("div", { className: "track" }, ui.filled), fields.first, fields.last))),
      ui.tokens,
      ui.hint, ui.nothing, ui.cuts,
      el("div", { className: "row" }, ui.another, ui.undo, ui.clear),
      el("details", { className: "finer" }, el("summary", { text: "Which features, and what stands in their place" }),
        el("div", { className: "row" }, labelled("Features of this cut", fields.group), fields.feature, labelled("In the place of what is cut", fields.ablation)), ui.resample)),
    section("answering", "Answers", ui.complaint, ui.wait, ui.answers, ui.said),
    section("looking", "Look closer", el("div", { className: "row" }, ui.of_model, ...ui.looks),
      el("div", { className: "row" }, labelled("Heatmap: layers of a window", fields.window), labelled("Attention: layer", fields.layer)), ui.reading));
  ui.body = el("div", { hidden: true },
    section("prompting", "Prompt", ui.examples,
      el("div", { className: "fields" }, labelled("Prompt", fields.prompt, "long"), labelled("Subject, may be empty", fields.subject), labelled("Watched answer, may be empty", fields.target)),
      el("div", { className: "row" }, ui.models, ui.finding)),
    ...(ui.later = [ui.stage, section("taking", "Take it with you",
      el("div", { className: "row" }, button("Copy as Python", () => copy("python"), { data: { copy: "python" } }), button("Copy as command", () => copy("command"), { data: { copy: "command" } }),
        ...(options.address ? [button("Copy link", () => copy("link"), { data: { copy: "link" } })] : []), button("Answers as CSV", answersCsv, { className: "csv" }), ui.copied),
      el("details", {}, el("summary", { text: "Python" }), ui.python), el("details", {}, el("summary", { text: "Command" }), ui.command))]));
  root.classList.add("explore");
  root.replaceChildren(ui.loading, ui.body);

  // --- the fields

  function write() {
    for (const name of TEXTS) fields[name].value = asked[name] ?? "";
    fields.ablation.value = asked.ablation;
    for (const box of ui.models.querySelectorAll("input")) box.checked = asked.models.includes(box.value);
  }

  let typing = 0;
  function typed() {
    clearTimeout(typing);
    typing = setTimeout(read, TYPING);
  }

  function read() {
    clearTimeout(typing);
    change(() => {
      if (fields.prompt.value !== asked.prompt) {
        asked.cuts = [];
        open = { ...open, sources: [], targets: [] };
        tokens = [];
      }
      for (const name of TEXTS) asked[name] = fields[name].value;
      asked.ablation = fields.ablation.value;
      asked = { ...asked };
    }, "text");
  }

  // --- tokens, and the cut that is being made

  const role = () => root.querySelector(`[data-name=role]:checked`).value;

  function choose(which, positions, adds, kind = null) {
    change(() => {
      const now = new Set(open[which]);
      for (const position of positions) if (adds) now.add(position); else now.delete(position);
      open = { ...open, [which]: [...now].toSorted((a, b) => a - b) };
      // The last token reads the answer: it is the target where none is chosen.
      if (which === "sources" && now.size && !open.targets.length) open.targets = [tokens.length - 1];
    }, kind);
  }
  const toggle = (which, position) => choose(which, [position], !open[which].includes(position));
  const between = (a, b) => all(Math.max(a, b) + 1, Math.min(a, b));

  let drag = null;
  function drawTokens() {
    const box = ui.tokens;
    if (box.childElementCount !== tokens.length || [...box.children].some((one, i) => one.dataset.token !== tokens[i])) {
      box.replaceChildren(...tokens.map((text, position) => el("button", {
        type: "button", className: "token", data: { token: text },
        on: {
          pointerdown: (event) => {
            drag = null;
            if (event.pointerType === "mouse" && event.button === 0 && !event.shiftKey) drag = { from: position, which: role(), adds: !open[role()].includes(position), before: [...open[role()]] };
          },
          pointerenter: (event) => {
            if (!drag || !(event.buttons & 1)) return;
            drag.moved = true;
            open = { ...open, [drag.which]: drag.before };
            choose(drag.which, between(drag.from, position), drag.adds, `drag ${drag.from}`);
          },
          click: (event) => {
            const moved = drag?.moved;
            drag = null;
            if (moved) return;
            if (event.shiftKey) choose(role(), between(anchor, position), true);
            else toggle(role(), position);
            anchor = position;
          },
          keydown: (event) => {
            const which = { s: "sources", t: "targets" }[event.key.toLowerCase()];
            if (!which || event.ctrlKey || event.metaKey || event.altKey) return;
            event.preventDefault();
            toggle(which, position);
            anchor = position;
          },
        },
      }, el("span", { text: visible(text) }), el("span", { className: "marks" }))));
      walk([...box.children], 1);
    }
    [...box.children].forEach((one, position) => {
      const source = open.sources.includes(position), target = open.targets.includes(position);
      one.className = ["token", source ? "source" : "", target ? "target" : "", subject.includes(position) ? "subject" : ""].filter(Boolean).join(" ");
      one.querySelector(".marks").textContent = [source ? "source" : "", target ? "target" : ""].filter(Boolean).join(" ") || position;
      one.setAttribute("aria-pressed", source || target);
      one.setAttribute("aria-label", `${visible(tokens[position])}, token ${position}${source ? ", source" : ""}${target ? ", target" : ""}`);
    });
  }

  function drawControls() {
    const { n_layers: n, paths, decays, features } = first();
    ui.paths.hidden = paths.length < 2;
    if (ui.paths.dataset.are !== paths.join()) {
      ui.paths.dataset.are = paths.join();
      ui.paths.replaceChildren(el("legend", { text: "Path" }), ...radios("path", paths.map((path) => [path, path]), (path) => change(() => { open = { ...open, path }; })));
    }
    for (const box of ui.paths.querySelectorAll("input")) box.checked = box.value === open.path;
    const groups = decays ? GROUPS : ["all"];
    if (fields.group.dataset.are !== groups.join()) {
      fields.group.dataset.are = groups.join();
      fields.group.replaceChildren(...groups.map((value) => el("option", { value, text: value })), el("option", { value: "one", text: "a single one" }));
    }
    const alone = /^\d+$/.test(open.features);
    fields.group.value = alone ? "one" : open.features;
    fields.feature.hidden = !alone;
    fields.feature.max = features - 1;
    if (alone && document.activeElement !== fields.feature) fields.feature.value = open.features;
    ui.resample.hidden = asked.ablation !== "resample";
    const [low, high] = [open.layers[0], open.layers.at(-1)];
    for (const [name, value] of [["first", low], ["last", high]]) {
      fields[name].max = n - 1;
      fields[name].value = value;
    }
    const share = (layer) => (n > 1 ? (layer / (n - 1)) * 100 : 0);
    ui.filled.style.left = `${share(low)}%`;
    ui.filled.style.right = `${100 - share(high)}%`;
    ui.layers.textContent = `${ranges(open.layers)} of 0–${n - 1}`;
    // The handle that can still move lies on top.
    fields.first.style.zIndex = low > (n - 1) / 2 ? 2 : 1;
    fields.last.style.zIndex = low > (n - 1) / 2 ? 1 : 2;
  }

  function slid(moved) {
    let low = Number(fields.first.value), high = Number(fields.last.value);
    if (low > high) [low, high] = moved === "first" ? [low, low] : [high, high];
    change(() => { open = { ...open, layers: all(high + 1, low) }; }, `slide ${moved}`);
  }

  function keep() {
    change(() => {
      asked.cuts = [...asked.cuts, open];
      open = { ...open, sources: [], targets: [] };
    });
  }

  function clear() {
    change(() => {
      asked.cuts = [];
      open = { ...open, sources: [], targets: [] };
    });
  }

  function drawCuts() {
    const words = (made) => el("span", { text: readings.inWords(made, tokens) });
    const kept = asked.cuts.map((made, i) => el("li", {}, words(made),
      button("Change", () => change(() => {
        const others = asked.cuts.filter((_, j) => j !== i);
        asked.cuts = cutting(open) ? [...others, open] : others;
        open = made;
      }), { aria: { label: `Change cut ${i + 1}` } }),
      button("Remove", () => change(() => { asked.cuts = asked.cuts.filter((_, j) => j !== i); }), { aria: { label: `Remove cut ${i + 1}` } })));
    const made = cutting(open) ? [el("li", { className: "open" }, words(open),
      button("Remove", () => change(() => { open = { ...open, sources: [], targets: [] }; }), { aria: { label: "Remove this cut" } }))] : [];
    const focused = ui.cuts.contains(document.activeElement);
    ui.cuts.replaceChildren(...kept, ...made);
    const begins = open.sources.length || asked.cuts.length ? "" : "Click a token to cut what it hands to the last one. ";
    ui.hint.textContent = `${begins}Drag, or Shift and click: several tokens. Keys: arrows move, S source, T target.`;
    ui.nothing.hidden = !chosen(open) || cutting(open);
    ui.nothing.textContent = "Nothing is cut: no source stands before a target. Choose an earlier source.";
    ui.another.disabled = !cutting(open);
    ui.clear.disabled = !asked.cuts.length && !open.sources.length && !open.targets.length;
    ui.undo.disabled = !past.length;
    // What was pressed is gone: the keyboard goes on where it can be taken back.
    if (focused) ui.undo.focus();
  }

  // --- answers

  function card(model) {
    const found = answers.get(model), box = el("article", { className: "card", data: { model } }, el("h3", { text: model }));
    if (!found) return box;
    if (found.error) {
      box.append(el("p", { className: "note", text: found.error }));
      return box;
    }
    const { base, prob, token, base_rank, rank } = found.answer, cuts = found.cuts > 0;
    box.append(el("p", { className: "big", text: cuts ? `${visible(token)}: ${percent(base)} → ${percent(prob)}` : `${visible(token)}: ${percent(base)}` }));
    const whole = found.target.trim(), part = whole === token.trim() ? "" : `First token of ‘${whole}’. `;
    box.append(el("p", { className: "caption", text: `${part}Rank ${base_rank}${cuts ? ` → ${rank}` : ""}. Took ${Math.round(found.took)} ms.` }));
    const bar = (value, name) => el("div", { className: name, style: `width: ${Math.max(value * 100, 0.5)}%` });
    const rows = found.top.map((row) => el("tr", { className: row.id === found.answer.id ? "watched" : "" },
      el("th", { text: visible(row.token), scope: "row" }), el("td", { className: "number", text: percent(row.base) }),
      ...(cuts ? [el("td", { className: "number", text: percent(row.prob) })] : []),
      el("td", { className: "bars" }, bar(row.base, "bar"), ...(cuts ? [bar(row.prob, "bar after")] : []))));
    const head = ["says", "before", ...(cuts ? ["cut"] : []), ""].map((text) => el("th", { text, scope: "col", className: ["before", "cut"].includes(text) ? "number" : "" }));
    box.append(el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)));
    return box;
  }

  const drawAnswers = () => ui.answers.replaceChildren(...(asked.prompt.trim() ? asked.models.map(card) : [el("p", { className: "hint", text: "Type a prompt, or choose an example." })]));

  function complain(text) {
    ui.complaint.textContent = text;
    ui.complaint.hidden = !text;
  }

  let waits = [];
  /** Say that something takes long, for as long as it does. */
  async function waiting(what, run) {
    const one = { what, since: performance.now() }, timer = setInterval(sayWaits, 100);
    waits.push(one);
    try {
      return await run();
    } finally {
      waits = waits.filter((other) => other !== one);
      clearInterval(timer);
      sayWaits();
    }
  }

  function sayWaits() {
    const slow = waits.filter(({ since }) => performance.now() - since > SLOW);
    ui.wait.hidden = !slow.length;
    if (!slow.length) return;
    const seconds = Math.floor((performance.now() - Math.min(...slow.map(({ since }) => since))) / 1000);
    ui.working.textContent = `Working on ${[...new Set(slow.map(({ what }) => what))].join(" and ")}… ${seconds} s`;
  }

  function refresh() {
    refreshing = answerAll();
  }

  function drawAll() {
    drawTokens();
    drawControls();
    drawCuts();
    drawStale();
  }

  async function answerAll() {
    const mine = ++round, started = performance.now(), now = state();
    ui.examples.hidden = asked.prompt.trim() !== "";
    for (const part of ui.later) part.hidden = asked.prompt.trim() === "";
    root.dataset.round = mine;
    complain("");
    if (!asked.prompt.trim()) {
      cancel("predict");
      answers.clear();
      tokens = [];
      drawAll();
      drawAnswers();
      code = {};
      options.moved?.("", now);
      root.dataset.answered = mine;
      return;
    }
    drawAll();
    for (const box of ui.answers.children) box.setAttribute("aria-busy", "true");
    await waiting("the answer", () => Promise.all(asked.models.map(async (model) => {
      let found;
      try {
        found = await question({ verb: "ask", reading: "predict", model, state: now }, `predict ${model}`);
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        found = { error: error.message };
      }
      if (found.dropped || mine !== round) return;
      found.took = performance.now() - started;
      found.cuts = now.cuts.length;
      answers.set(model, found);
      if (found.tokens && model === now.models[0] && (tokens.join("\0") !== found.tokens.join("\0") || subject.join() !== found.subject.join())) {
        ({ tokens, subject } = found);
        drawAll();
      }
      drawAnswers();
      root.dataset.took = found.took;
    })));
    if (mine !== round) return;
    const told = answers.get(asked.models[0]);
    if (told?.answer) ui.said.textContent = `${visible(told.answer.token)}: ${percent(told.answer.base)} before, ${percent(told.answer.prob)} now.`;
    await copyable(now, told, mine);
    if (mine === round) root.dataset.answered = mine;
  }

  // --- code, link, files

  async function copyable(now, told, mine) {
    try {
      const found = await question({ verb: "code", state: now, watched: told?.target ?? "" }, "code");
      if (found.dropped || mine !== round) return;
      code = found;
      ui.python.textContent = code.python;
      ui.command.textContent = code.command;
      options.moved?.(code.link, now);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      code = {};
      // A card says it already where the prompt itself is refused.
      if (![...answers.values()].some((found) => found.error)) complain(error.message);
    }
  }

  async function copy(what) {
    // What is copied is of the newest click, which may still wait for its answer.
    for (let newest = null; newest !== refreshing;) await (newest = refreshing);
    const text = what === "link" ? options.address(code.link ?? "") : code[what] ?? "";
    try {
      if (!text) throw new Refused("There is nothing to copy yet.");
      await navigator.clipboard.writeText(text);
      ui.copied.textContent = "Copied.";
    } catch {
      const shown = ui[what];
      if (shown) {
        shown.parentElement.open = true;
        getSelection().selectAllChildren(shown);
      }
      ui.copied.textContent = !text ? "There is nothing to copy yet." : shown ? "The browser does not let pages copy: it is chosen below." : "The browser does not let pages copy: take the address above.";
    }
    setTimeout(() => { ui.copied.textContent = ""; }, 4000);
  }

  function answersCsv() {
    const rows = [["model", "token", "token_id", "base_prob", "prob", "watched"]];
    for (const model of asked.models) {
      const found = answers.get(model);
      for (const row of found?.top ?? []) rows.push([model, row.token, row.id, row.base, row.prob, row.id === found.answer.id]);
    }
    download("answers.csv", csv(rows));
  }

  // --- readings

  const theme = () => (options.theme?.() ?? (scheme.matches ? "dark" : "light")) === "dark" ? DARK : LIGHT;

  async function look(name, told = {}) {
    const model = told.model ?? fields.model.value, { n_layers: n, paths } = known(model);
    complain("");
    if (told.layer !== undefined) fields.layer.value = told.layer;
    fields.layer.value = Math.min(Number(fields.layer.value), n - 1);
    const path = paths.includes(open.path) ? open.path : paths.at(-1);
    const more = { heatmap: { window: Number(fields.window.value), path }, attention: { layer: Number(fields.layer.value), features: open.features } }[name] ?? {};
    // The answer that is watched stays so where the cuts make the model say another.
    const watched = answers.get(asked.models[0])?.target ?? asked.target, now = { ...state(), target: watched };
    for (const one of ui.looks) one.setAttribute("aria-pressed", one.dataset.reading === name);
    ui.reading.setAttribute("aria-busy", "true");
    try {
      const found = await waiting(`${LOOKS[name].toLowerCase()} of ${model}`, () => question({ verb: "ask", reading: name, model, state: now, ...more }, "reading"));
      if (found.dropped) return;
      looked = { name, model, found, cuts: now.cuts.length, of: sense(state()) };
      drawReading();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      looked = null;
      ui.reading.replaceChildren(el("p", { className: "note", text: error.message }));
      delete ui.reading.dataset.shows;
    } finally {
      if (!asking.has("reading")) ui.reading.removeAttribute("aria-busy");
    }
  }

  /** What a reading depends on. */
  const sense = (now) => JSON.stringify([now.prompt, now.subject, now.target, now.ablation, now.other, now.other_subject, now.cuts]);

  function drawReading() {
    const { name, model, found, cuts } = looked;
    const given = { cut, layers: known(model).n_layers, kinds: known(model).kinds, room: () => ui.reading.clientWidth - 8 /* the frame */, walk: (other, told) => guarded(() => look(other, { model, ...told }))() };
    const made = readings[name](found, given), named = `${made.name}-${model}`;
    const files = [
      ...(made.figure ? [button("SVG", () => saveSvg(named, made.figure(LIGHT)), { data: { save: "svg" } }), button("PNG", () => savePng(named, made.figure(LIGHT)), { data: { save: "png" } })] : []),
      button("Numbers as CSV", () => download(`${named}.csv`, csv(made.rows)), { data: { save: "csv" } }),
    ];
    ui.stale = el("p", { className: "note", hidden: true }, "This is of an earlier state. ", button("Look again", guarded(() => look(name, { model }))));
    const said = !cuts ? "" : ` With ${cuts === 1 ? "the cut" : `the ${cuts} cuts`} above.`;
    ui.reading.replaceChildren(el("h3", { text: made.title }), el("p", { className: "caption", text: made.caption + said }), ui.stale,
      ...(made.figure ? [frame(el("div", { className: "scroll figure" }), made.figure(theme()))] : []), ...(made.table ? [made.table] : []), el("p", { className: "row files" }, ...files));
    ui.reading.dataset.shows = name;
    ui.reading.dataset.of = model;
    drawStale();
  }

  function repaint() {
    if (looked) drawReading();
  }

  function drawStale() {
    if (looked && ui.stale) ui.stale.hidden = looked.of === sense(state());
  }

  // --- facts

  async function find() {
    const found = await question({ verb: "search", words: fields.words.value }, "search");
    if (found.dropped) return;
    ui.facts.replaceChildren(...found.facts.map((fact) => el("li", {}, button(`${fact.prompt} → ${fact.target.trim()}`, () => {
      ui.finding.open = false;
      show({ ...fact, models: asked.models, cuts: [] });
    }))), ...(found.facts.length ? [] : [el("li", { text: "No fact has these words." })]));
  }

  // --- begin

  function guarded(run) {
    return async (...given) => {
      try {
        await run(...given);
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        complain(error.message);
      }
    };
  }

  async function openLink(link) {
    if (!link || link === code.link) return;
    show((await question({ verb: "open", link }, "open")).state);
  }

  function group() {
    const { value } = fields.group;
    change(() => { open = { ...open, features: value === "one" ? String(Number(fields.feature.value) || 0) : value }; }, value === "one" ? "feature" : null);
  }

  function wire() {
    for (const name of TEXTS) {
      fields[name].maxLength = name === "prompt" || name === "other" ? 4000 : 400;
      fields[name].addEventListener("input", typed);
      fields[name].addEventListener("change", () => { read(); merging = null; });
    }
    fields.ablation.addEventListener("change", () => { read(); merging = null; });
    fields.group.addEventListener("change", group);
    fields.feature.addEventListener("input", group);
    fields.words.addEventListener("input", guarded(find));
    ui.finding.addEventListener("toggle", guarded(find));
    fields.layer.addEventListener("change", guarded(() => look("attention")));
    fields.window.addEventListener("change", guarded(() => look("heatmap")));
    for (const name of ["first", "last"]) {
      fields[name].addEventListener("input", () => slid(name));
      fields[name].addEventListener("change", () => { merging = null; });
    }
    root.querySelector("[data-name=role]").checked = true;
    (options.keys ?? root).addEventListener("keydown", (event) => {
      const writes = event.target.matches?.("textarea, input:not([type=radio], [type=checkbox], [type=range])");
      if (event.key === "z" && (event.ctrlKey || event.metaKey) && !event.shiftKey && !writes) {
        event.preventDefault();
        undo();
      }
      if (event.key === "Escape") cancel();
    });
    scheme.addEventListener("change", repaint);
  }

  async function loaded() {
    for (;;) {
      const told = await question({ verb: "about" }, "about");
      if (!told.loading) return told;
      ui.loading.textContent = `One moment: ${told.loading}…`;
      await new Promise((resolve) => { setTimeout(resolve, 60); });
    }
  }

  async function begin() {
    let told;
    try {
      told = await loaded();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      ui.loading.className = "note";
      ui.loading.textContent = error.message;
      return;
    }
    models = told.models;
    asked.models = models.map((model) => model.name);
    open = blank();
    ui.models.append(...models.map((model) => el("label", {}, el("input", {
      type: "checkbox", value: model.name, checked: true, data: { name: "chosen" },
      on: { change: () => change(() => {
        const names = [...ui.models.querySelectorAll("input:checked")].map((box) => box.value);
        asked.models = names.length ? names : asked.models;
        if (!first().paths.includes(open.path)) open = { ...open, path: first().paths.at(-1) };
        open = { ...open, layers: open.layers.filter((layer) => layer < first().n_layers) };
        if (!open.layers.length) open.layers = all(first().n_layers);
        write();
      }) },
    }), ` ${model.name}: ${model.n_layers} layers, ${model.kinds.join(", ")}`)));
    ui.models.hidden = models.length < 2;
    fields.model.append(...models.map((model) => el("option", { text: model.name, value: model.name })));
    ui.of_model.hidden = models.length < 2;
    fields.window.max = Math.max(...models.map((model) => model.n_layers));
    fields.window.value = Math.ceil(first().n_layers / 2);
    fields.layer.max = fields.window.max - 1;
    fields.layer.value = Math.floor(first().n_layers / 2);
    ui.examples.append(...told.examples.map((example) => button("", () => show({ ...example.state, models: asked.models }))));
    [...ui.examples.children].forEach((one, i) => one.append(el("strong", { text: told.examples[i].title }), el("span", { text: told.examples[i].says })));
    wire();
    ui.loading.hidden = true;
    ui.body.hidden = false;
    drawAll();
    drawAnswers();
    for (const part of ui.later) part.hidden = true;
    await guarded(() => openLink(options.link))();
    past = [];
    drawCuts();
    root.dataset.ready = "";
  }

  begin();
  /** Nobody looks any more: questions are dropped. */
  function close() {
    cancel();
    scheme.removeEventListener("change", repaint);
  }

  return { open: guarded(openLink), show, state, repaint, close };
}
