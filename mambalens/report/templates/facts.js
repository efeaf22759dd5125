// The table of facts by DataTables, which takes texts for HTML: cells are nodes, and what else it reads is escaped.
import DataTable from "datatables";
import { byId, el } from "./dom.js";
import { written } from "./carried.js";
import { escaped, format } from "./plots.js";

export const promptOf = (fact) => fact.pieces.map(([text]) => text).join("");

// DataTables makes HTML of texts with an & when it searches them: what is escaped becomes the text again.
const text = (get, node = (record) => document.createTextNode(get(record))) => ({
  data: null, render: (record, kind) => (kind === "display" ? node(record) : kind === "filter" ? escaped(get(record)) : get(record)),
});
const number = (get, words) => ({
  data: null, className: "dt-right", type: "num",
  render: (record, kind) => { const value = get(record); return kind === "display" ? document.createTextNode(words(value)) : value ?? ""; },
});

/**
 * Fill a table with records { model, row, fact, losses, columns }.
 *
 * sources: what losses are of; columns: names; several: whether there are several models; choose(model, row): a fact was
 * chosen; drawn(): other rows are shown.
 */
export function listFacts(id, records, { sources, columns, several, choose, drawn }) {
  const button = ({ model, row, fact }) => el("button", { type: "button", className: "link", data: { model, row } }, ...written(fact.pieces));
  const own = [
    ...(several ? [{ title: "Model", ...text((record) => record.model), className: "model-cell" }] : []),
    { title: "Prompt", ...text((record) => promptOf(record.fact), button), className: "prompt-cell" },
    { title: "Target", ...text((record) => record.fact.target) },
    { title: "P(target)", ...number((record) => record.fact.base_prob, (value) => format(value, "prob")) },
    ...sources.map((source, i) => ({ title: escaped(`${source}, %`), ...number((record) => record.losses[i], (value) => format(value, "change_pct").replace(" %", "")) })),
    ...columns.map((name, i) => ({ title: escaped(name), ...text((record) => record.columns[i]) })),
  ];
  const table = new DataTable(`#${id}`, {
    data: records, columns: own, pageLength: 10, autoWidth: false, deferRender: true,
    order: sources.length ? [[own.length - sources.length - columns.length, "asc"]] : [],
    columnControl: [{ target: 0, content: ["order"] }, { target: 1, content: ["search"] }],
    ordering: { indicators: false, handler: false },
    layout: { topStart: { search: { text: "Search facts" } }, topEnd: null, bottomStart: "info", bottomEnd: "paging" },
    language: { info: "_START_ to _END_ of _TOTAL_ facts", infoFiltered: "(of _MAX_)", emptyTable: "No fact is kept in this page.", zeroRecords: "No fact has this." },
  });
  byId(id).addEventListener("click", (event) => {
    const { model, row } = event.target.closest("button[data-row]")?.dataset ?? {};
    if (model !== undefined) choose(model, Number(row));
  });
  table.on("draw", drawn);
  return table;
}

/** Mark the chosen fact { model, row } among those that a table shows. */
export function markFact(id, chosen) {
  for (const line of byId(id).querySelectorAll("tbody tr")) {
    const { model, row } = line.querySelector("button[data-row]")?.dataset ?? {};
    line.classList.toggle("chosen", chosen !== null && model === chosen.model && Number(row) === chosen.row);
  }
}
