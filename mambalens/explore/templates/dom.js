// Elements, numbers and files. Texts from prompts only ever become text nodes.
export const $ = (id) => document.getElementById(id);

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

export const visible = (token) => token.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·");

export function percent(value) {
  if (value === null) return "–";
  const hundredfold = value * 100;
  if (hundredfold === 0) return "0 %";
  if (hundredfold < 0.001) return `${hundredfold.toExponential(0)} %`;
  return `${hundredfold >= 99.95 && hundredfold < 100 ? hundredfold.toFixed(2) : Number(hundredfold.toPrecision(3))} %`;
}

export const signed = (value, digits = 2) => (value === null ? "–" : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`);

// Numbers as '0, 2–3'.
export function ranges(numbers) {
  const runs = [];
  for (const number of [...numbers].sort((a, b) => a - b)) {
    const run = runs.at(-1);
    if (run && number === run.at(-1) + 1) run.push(number);
    else runs.push([number]);
  }
  return runs.map((run) => (run.length === 1 ? run[0] : `${run[0]}–${run.at(-1)}`)).join(", ");
}

export function save(name, rows) {
  const cell = (value) => {
    const text = String(value ?? "");
    return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  };
  const blob = new Blob([rows.map((row) => row.map(cell).join(",")).join("\n") + "\n"], { type: "text/csv" });
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

// Arrow keys walk among the buttons of a box of which one is in the order of Tab.
export function walk(box, columns) {
  const buttons = [...box.querySelectorAll("button")];
  buttons.forEach((button, i) => { button.tabIndex = i === 0 ? 0 : -1; });
  const go = (from, to) => {
    if (!buttons[to]) return;
    buttons[from].tabIndex = -1;
    buttons[to].tabIndex = 0;
    buttons[to].focus();
  };
  buttons.forEach((button, i) => button.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -i, End: buttons.length - 1 - i };
    if (!(event.key in steps)) return;
    event.preventDefault();
    go(buttons.findIndex((one) => one === document.activeElement), i + steps[event.key]);
  }));
}
