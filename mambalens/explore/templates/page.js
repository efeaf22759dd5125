// The page of mambalens explore: questions go to its server, and the state stands in the address.
import { explore } from "./explore.js";

const page = crypto.randomUUID();
const GONE = "The server does not answer. Start mambalens explore again.";

async function ask(question, signal) {
  let text;
  try {
    const response = await fetch("ask", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ ...question, page }), signal, redirect: "error",
    });
    text = await response.text();
  } catch {
    return signal.aborted ? { dropped: true } : { error: GONE };
  }
  try {
    return JSON.parse(text);
  } catch {
    return { error: text || GONE };
  }
}

const address = (link) => `${location.origin}${location.pathname}${link ? `#${link}` : ""}`;
const shown = explore(document.getElementById("explore"), ask, {
  link: location.hash.slice(1), keys: document, address,
  // Addresses of each state would make a step of Back of every click: Undo is for that.
  moved: (link) => history.replaceState(null, "", address(link)),
});
addEventListener("hashchange", () => shown.open(location.hash.slice(1)));
