// What the scripts of all pages share: the data, words, tables and files.
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const narrow = () => window.innerWidth < 640;
const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const visible = (token) => token.replace(/\n/g, "⏎").replace(/ /g, "·");
function save(name, rows) {
  const cell = (value) => (/[",\n\r]/.test(String(value ?? "")) ? `"${String(value).replace(/"/g, '""')}"` : String(value ?? ""));
  const blob = new Blob([rows.map((row) => row.map(cell).join(",")).join("\n") + "\n"], { type: "text/csv" });
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}
function fill(table, header, rows) {
  const line = (cells, tag) => {
    const tr = document.createElement("tr");
    for (const text of cells) tr.append(Object.assign(document.createElement(tag), { textContent: text }));
    return tr;
  };
  const head = document.createElement("thead"), body = document.createElement("tbody");
  head.append(line(header, "th"));
  body.append(...rows.map((row) => line(row, "td")));
  table.replaceChildren(head, body);
}
