// What a page of results carries in its own file, and what becomes of it.
import { byId, csv, download, el } from "./dom.js";
import { DARK, LIGHT, scheme } from "./figures.js";

export const data = JSON.parse(byId("data").textContent);
export const theme = () => (scheme.matches ? DARK : LIGHT);
export const narrow = () => innerWidth < 640;

/** A prompt as pieces, of which some have a role. */
export const written = (pieces) => pieces.map(([text, role]) => (role ? el("span", { text, className: role, title: role }) : text));

/** A button of the page that saves rows; rows() gives a file's name and its rows. */
export const saves = (button, rows) => byId(button).addEventListener("click", () => {
  const [name, found] = rows();
  download(name, csv(found));
});

/** The page is ready; `draw` draws it again where the colours or the width have changed. */
export function ready(draw) {
  const dress = () => document.documentElement.classList.toggle("dark", scheme.matches); // DataTables asks for this class
  let width = innerWidth;
  scheme.addEventListener("change", () => { dress(); draw(); });
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    draw();
  });
  dress();
  document.documentElement.dataset.ready = "true";
}
