// Figures as SVG with every colour written out, so that a file of one looks like the page.
import { download, short, svg, walk } from "./dom.js";

// Okabe & Ito's palette; what colour says, numbers, marks and dashes say too.
export const LIGHT = { ink: "#1b1b1b", soft: "#565656", line: "#d0d0d0", paper: "#ffffff", loss: [213, 94, 0], gain: [0, 114, 178], none: "#ececec",
  route: ["#8a7f00", "#f0e442"], paths: { main: "#0072B2", conv: "#D55E00", erase: "#007a59" } };
export const DARK = { ink: "#ececec", soft: "#b3b3b3", line: "#484848", paper: "#161616", loss: [235, 125, 45], gain: [70, 150, 225], none: "#2b2b2b",
  route: ["#cfc23a", "#5f5900"], paths: { main: "#6db6e8", conv: "#ff9d57", erase: "#4cc9a3" } };
/** Whether who looks wants it dark. */
export const scheme = matchMedia("(prefers-color-scheme: dark)");
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif";
const WIDE = 7.3; // pixels of a letter

export const number = (value) => Number(value.toFixed(2));
export const length = (text) => [...text].length * WIDE;
export const longest = (texts) => Math.max(0, ...texts.map(length));
export const hex = (parts) => `#${parts.map((part) => Math.round(part).toString(16).padStart(2, "0")).join("")}`;
const parts = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
/** Paper where the value is 0; the colour of losses at -1, that of gains at 1. */
function mixed(value, theme) {
  const share = Math.min(1, Math.abs(value)) * 0.85, full = value < 0 ? theme.loss : theme.gain;
  return hex(parts(theme.paper).map((part, i) => part + (full[i] - part) * share));
}
function luminance(colour) {
  const [r, g, b] = parts(colour).map((part) => ((part / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
/** Black or white, whichever can be read on a colour. */
const inkOn = (colour) => (luminance(colour) > 0.22 ? "#111111" : "#ffffff");
/** A colour that was chosen for white paper, made lighter until it can be seen on dark. */
export function seen(colour, theme) {
  const [from, to] = [parts(colour), parts(theme.ink)];
  const lighter = (share) => hex(from.map((part, i) => part + (to[i] - part) * share));
  const enough = [0, 0.2, 0.4, 0.6, 0.8].find((share) => luminance(lighter(share)) > 0.13);
  return theme === DARK ? lighter(enough ?? 1) : colour;
}

export function picture(width, height, theme, name) {
  const [w, h] = [Math.ceil(width), Math.ceil(height)];
  return svg("svg", { width: w, height: h, viewBox: `0 0 ${w} ${h}`, role: "group", "aria-label": name, "font-family": FONT, "font-size": 13 },
    svg("rect", { width: w, height: h, fill: theme.paper }));
}

export function label(x, y, text, theme, more = {}) {
  const { turned, title, ...attributes } = more;
  const made = svg("text", { x: number(x), y: number(y), fill: theme.ink, ...attributes }, text);
  if (turned) made.setAttribute("transform", `rotate(-45 ${number(x)} ${number(y)})`);
  if (title) made.append(svg("title", {}, title));
  return made;
}

/**
 * A table of coloured cells.
 *
 * rows and columns: { text, bold, title }. cell(row, column): null where there is nothing, or { value (-1 to 1), text, says,
 * click }, where click is what a press does. aside: what stands above the rows' names, across: above the columns.
 */
export function grid({ rows, columns, cell, aside = "", across = "", name }, theme) {
  const cells = rows.map((_row, r) => columns.map((_column, c) => cell(r, c)));
  const named = rows.map((row) => short(row.text, 18)), headed = columns.map((column) => short(column.text, 16));
  const inside = longest(cells.flat().map((one) => one?.text ?? ""));
  const width = Math.max(26, inside + 10), height = 26;
  const turned = longest(headed) + 6 > width;
  const left = Math.max(longest([...named, aside]), 20) + 14, top = 24 + (turned ? longest(headed) * 0.72 + 14 : 20);
  const right = turned ? longest([headed.at(-1) ?? ""]) * 0.72 : 4;
  const made = picture(left + columns.length * width + right + 6, top + rows.length * height + 6, theme, name);
  made.append(label(6, top - 8, aside, theme, { fill: theme.soft, "font-size": 12 }), label(left, 14, across, theme, { fill: theme.soft, "font-size": 12 }));
  headed.forEach((text, c) => made.append(label(left + (c + 0.5) * width + (turned ? 4 : 0), top - 8, text, theme,
    { "text-anchor": turned ? "start" : "middle", turned, title: columns[c].title ?? columns[c].text, ...(columns[c].bold ? { "font-weight": 700 } : {}) })));
  const marks = [];
  rows.forEach((row, r) => {
    const y = top + r * height;
    made.append(label(left - 8, y + 17, named[r], theme, { "text-anchor": "end", title: row.title ?? row.text, ...(row.bold ? { "font-weight": 700 } : {}) }));
    columns.forEach((_, c) => {
      const one = cells[r][c];
      if (!one) return;
      const fill = one.value === null ? theme.none : mixed(one.value, theme), x = left + c * width;
      const mark = svg("g", { class: "mark", ...(one.click ? { role: "button" } : { role: "img" }), "aria-label": one.says, "data-row": r, "data-column": c },
        svg("rect", { x: number(x + 1), y: y + 1, width: number(width - 2), height: height - 2, rx: 2, fill, stroke: theme.line, "stroke-width": 0.5 }),
        label(x + width / 2, y + 17, one.text, theme, { "text-anchor": "middle", "font-size": 12, fill: inkOn(fill) }), svg("title", {}, one.says));
      if (one.click) mark.addEventListener("click", one.click);
      made.append(mark);
      marks.push(mark);
    });
  });
  // In a triangle the marks of a row are fewer: up and down go along the row's order then.
  walk(marks, cells.every((row) => row.every(Boolean)) ? columns.length : 1);
  return made;
}

const text = (figure) => new XMLSerializer().serializeToString(figure);

export function saveSvg(name, figure) {
  download(`${name}.svg`, new Blob([`<?xml version="1.0" encoding="UTF-8"?>\n${text(figure)}\n`], { type: "image/svg+xml" }));
}

export async function savePng(name, figure, scale = 2) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text(figure))}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = ["width", "height"].map((side) => Number(figure.getAttribute(side)) * scale);
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  download(`${name}.png`, await new Promise((resolve) => canvas.toBlob(resolve, "image/png")));
}
