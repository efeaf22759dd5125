// The page of mambalens explore in a notebook: questions go to the kernel as messages, and the state stands in the widget.
import { explore } from "./explore.js";

const SILENT = 3000; // milliseconds until a kernel that does not answer is said to be busy or gone
const BUSY = "the kernel has not answered yet. A cell may be running; if the kernel has ended, run the cell that made this again";

/** Light or dark, as the notebook is, or as the system is where the notebook does not say. */
function notebookTheme() {
  const { body, documentElement: html } = document;
  const told = body.dataset.jpThemeLight ?? html.dataset.jpThemeLight;
  if (told !== undefined) return told === "false" ? "dark" : "light";
  if (body.dataset.vscodeThemeKind) return /dark|high-contrast$/.test(body.dataset.vscodeThemeKind) ? "dark" : "light";
  if (html.getAttribute("theme") === "dark" || body.classList.contains("dark") || html.classList.contains("dark")) return "dark";
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

function render({ model, el: box }) {
  const view = crypto.randomUUID(), waiting = new Map();
  let number = 0, followed = null;

  const heard = (message) => {
    if (message?.view !== view) return;
    waiting.get(message.number)?.(message.answer);
    waiting.delete(message.number);
  };
  model.on("msg:custom", heard);

  function ask(question, signal) {
    const mine = ++number;
    return new Promise((resolve) => {
      waiting.set(mine, resolve);
      model.send({ view, number: mine, question });
      signal.addEventListener("abort", () => {
        waiting.delete(mine);
        if (question.verb === "ask") model.send({ view, number: mine, drop: true, key: `${view} ${question.reading} ${question.model}` });
        resolve({ dropped: true });
      });
      if (question.verb === "about") setTimeout(() => { if (waiting.delete(mine)) resolve({ loading: BUSY }); }, SILENT);
    });
  }

  const root = document.createElement("div");
  root.classList.add("mambalens-widget", "mambalens-theme");
  const paint = () => { root.style.colorScheme = notebookTheme(); };
  paint();
  box.append(root);
  const shown = explore(root, ask, {
    link: model.get("_link"), theme: notebookTheme,
    moved: (link) => {
      // What another view of this widget has shown already is not said again.
      if (link === followed || link === model.get("_link")) return;
      followed = null;
      model.set("_link", link);
      model.save_changes();
    },
  });
  const follow = () => {
    followed = model.get("_link");
    shown.open(followed);
  };
  model.on("change:_link", follow);
  const watcher = new MutationObserver(() => {
    paint();
    shown.repaint();
  });
  for (const one of [document.body, document.documentElement]) watcher.observe(one, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-vscode-theme-kind", "class", "theme"] });
  // Keys of the page are not the notebook's.
  root.addEventListener("keydown", (event) => event.stopPropagation());
  return () => {
    model.off("msg:custom", heard);
    model.off("change:_link", follow);
    watcher.disconnect();
    shown.close();
  };
}

export default { render };
