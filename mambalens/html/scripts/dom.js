// Elements, numbers and files. Texts from prompts only ever become text nodes.

export const byId = (id) => document.getElementById(id);

export function el(tag, options = {}, ...children) {
  const { className, text, on = {}, data = {}, aria = {}, ...properties } = options;
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  Object.assign(element, properties);
  Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  for (const [name, listener] of Object.entries(on)) element.addEventListener(name, listener);
  element.append(...children);
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export const visible = (token) => token.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·");
export const short = (text, most) => ([...text].length > most ? `${[...text].slice(0, most - 1).join("")}…` : text);
export const all = (n, from = 0) => Array.from({ length: Math.max(n - from, 0) }, (_, i) => i + from);

export function percent(value) {
  if (value === null) return "–";
  const hundredfold = value * 100;
  if (hundredfold === 0) return "0 %";
  if (hundredfold < 0.001) return "< 0.001 %";
  return `${hundredfold >= 99.95 && hundredfold < 100 ? hundredfold.toFixed(2) : hundredfold >= 100 ? hundredfold.toFixed(0) : hundredfold.toPrecision(3)} %`;
}

export const signed = (value, digits = 2) =>
  (value === null ? "–" : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`.replace(/^[+−](0(\.0*)?)$/, "$1"));

// Numbers as '0, 2–3'.
export function ranges(numbers) {
  const runs = [];
  for (const number of [...numbers].toSorted((a, b) => a - b)) {
    const run = runs.at(-1);
    if (run && number === run.at(-1) + 1) run.push(number);
    else runs.push([number]);
  }
  return runs.map((run) => (run.length === 1 ? run[0] : `${run[0]}–${run.at(-1)}`)).join(", ");
}

export function csv(rows) {
  const cell = (value) => {
    const text = String(value ?? "");
    return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  };
  return new Blob([rows.map((row) => row.map(cell).join(",")).join("\n") + "\n"], { type: "text/csv" });
}

export function download(name, blob) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  // The browser has begun to read it by then.
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** Fill a table. head: words, or { text, number } where a column has numbers; rows: cells, each a text, a number or a node. */
export function fill(table, head, rows) {
  const heads = head.map((one) => (typeof one === "string" ? { text: one } : one));
  const cell = (tag, i, value, more = {}) => el(tag, { className: heads[i].number ? "number" : "", ...more }, value instanceof Node ? value : String(value ?? ""));
  table.replaceChildren(
    el("thead", {}, el("tr", {}, ...heads.map(({ text }, i) => cell("th", i, text, { scope: "col" })))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((value, i) => cell("td", i, value))))));
  return table;
}

/**
 * Arrow keys walk among marks, of which one is in the order of Tab; Enter and space press a mark. way: columns of the marks,
 * or a function of a mark's number and a key that gives the next one's; presses: the mark that a key comes to is pressed.
 */
export function walk(marks, way, presses = false) {
  const next = typeof way === "function" ? way : (i, key) => ({ ArrowLeft: i - 1, ArrowRight: i + 1, ArrowUp: i - way, ArrowDown: i + way })[key];
  const press = (mark) => mark.dispatchEvent(new MouseEvent("click", { bubbles: true }));
  marks.forEach((mark, i) => mark.setAttribute("tabindex", i === 0 ? 0 : -1));
  marks.forEach((mark, i) => {
    mark.addEventListener("focus", () => {
      for (const other of marks) if (other !== mark && other.getAttribute("tabindex") === "0") other.setAttribute("tabindex", -1);
      mark.setAttribute("tabindex", 0);
    });
    mark.addEventListener("keydown", (event) => {
      if (event.key.startsWith("Arrow") || event.key === "Home" || event.key === "End") {
        event.preventDefault();
        const there = marks[{ Home: 0, End: marks.length - 1 }[event.key] ?? next(i, event.key)];
        there?.focus();
        if (presses && there) press(there);
      } else if ((event.key === "Enter" || event.key === " ") && mark.tagName !== "BUTTON") {
        event.preventDefault();
        press(mark);
      }
    });
  });
}
