// Questions to the server. A newer question of a kind takes an older one's place, here and there.
const page = crypto.randomUUID();
const asking = new Map();

export class Refused extends Error {}

async function post(verb, told, signal) {
  let response;
  try {
    response = await fetch(verb, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(told), signal, redirect: "error",
    });
  } catch (error) {
    if (signal?.aborted) return { dropped: true };
    throw new Refused("The server does not answer. Start mambalens explore again.");
  }
  const text = await response.text().catch(() => "");
  if (signal?.aborted) return { dropped: true };
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    throw new Refused(text || "The server does not answer. Start mambalens explore again.");
  }
  if (found.error) throw new Refused(found.error);
  return found;
}

export const about = () => post("about", {});
export const search = (words) => latest("search", (signal) => post("search", { words }, signal));
export const open = (link) => post("open", { link });
export const code = (state) => latest("code", (signal) => post("code", { state }, signal));
export const reading = (name, model, state, more = {}) =>
  latest(name === "predict" ? `predict ${model}` : "reading", (signal) => post("ask", { ...more, reading: name, model, state, page }, signal));

// Cancel what runs: all of it, or what is of this kind.
export function cancel(kind = "") {
  for (const [key, controller] of asking) if (key.startsWith(kind)) controller.abort();
}

async function latest(key, run) {
  asking.get(key)?.abort();
  const controller = new AbortController();
  asking.set(key, controller);
  try {
    return await run(controller.signal);
  } finally {
    if (asking.get(key) === controller) asking.delete(key);
  }
}
