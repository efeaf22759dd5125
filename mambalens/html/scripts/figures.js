// Figures as SVG with every colour written out, so that a file of one looks like the page.
import { download, short, svg, visible, walk } from "./dom.js";

// Okabe & Ito's palette; what colour says, numbers, marks and dashes say too.
export const LIGHT = { ink: "#1b1b1b", soft: "#565656", line: "#d0d0d0", paper: "#ffffff", loss: [213, 94, 0], gain: [0, 114, 178], none: "#ececec",
  paths: { main: "#0072B2", conv: "#D55E00", erase: "#007a59" } };
export const DARK = { ink: "#ececec", soft: "#b3b3b3", line: "#484848", paper: "#161616", loss: [235, 125, 45], gain: [70, 150, 225], none: "#2b2b2b",
  paths: { main: "#6db6e8", conv: "#ff9d57", erase: "#4cc9a3" } };
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif";
const WIDE = 7.3; // pixels of a letter

const number = (value) => Number(value.toFixed(2));
const hex = (parts) => `#${parts.map((part) => Math.round(part).toString(16).padStart(2, "0")).join("")}`;
const parts = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
/** Paper where the value is 0; the colour of losses at -1, that of gains at 1. */
function mixed(value, theme) {
  const share = Math.min(1, Math.abs(value)) * 0.85, full = value < 0 ? theme.loss : theme.gain;
  return hex(parts(theme.paper).map((part, i) => part + (full[i] - part) * share));
}
/** Black or white, whichever can be read on a colour. */
function inkOn(colour) {
  const [r, g, b] = parts(colour).map((part) => ((part / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.22 ? "#111111" : "#ffffff";
}

function picture(width, height, theme, label) {
  const [w, h] = [Math.ceil(width), Math.ceil(height)];
  return svg("svg", { width: w, height: h, viewBox: `0 0 ${w} ${h}`, role: "group", "aria-label": label, "font-family": FONT, "font-size": 13 },
    svg("rect", { width: w, height: h, fill: theme.paper }));
}

function label(x, y, text, theme, more = {}) {
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
  const cells = rows.map((_, r) => columns.map((_, c) => cell(r, c)));
  const longest = (texts) => Math.max(0, ...texts.map((text) => [...text].length)) * WIDE;
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
  walk(made, marks, cells.every((row) => row.every(Boolean)) ? columns.length : 1);
  return made;
}

/** The marker in an edge's middle, which says its path without colour. */
function pathMark(path, x, y, r, theme) {
  const look = { fill: theme.paths[path], stroke: theme.paper, "stroke-width": 1 };
  if (path === "conv") return svg("rect", { x: number(x - r), y: number(y - r), width: 2 * r, height: 2 * r, ...look });
  if (path === "erase") return svg("polygon", { points: `${x},${y - 1.3 * r} ${x + 1.2 * r},${y + r} ${x - 1.2 * r},${y + r}`, ...look });
  return svg("circle", { cx: number(x), cy: number(y), r: 1.1 * r, ...look });
}

/**
 * Edges between tokens as lines, layers from below to above.
 *
 * edges: { layer, path, source, target, effect, exact, says, click }, the strongest first.
 */
export function graph({ tokens, subject, layers, edges, answer, words, name }, theme, room) {
  const n = tokens.length, labels = tokens.map((token) => short(visible(token), 14));
  const longest = Math.max(...labels.map((text) => [...text].length)) * WIDE;
  const column = Math.min(Math.max((room - 84) / n, 30), 104), turned = longest + 8 > column;
  const left = 46 + (turned ? Math.max(0, longest * 0.72 - column / 2) : 0), row = Math.min(Math.max(460 / (layers + 1), 24), 40);
  const key = [["main", words.main], ["conv", words.conv], ["erase", words.erase]].filter(([path]) => edges.some((edge) => edge.path === path));
  const lines = [...key.map(([path, word]) => ({ path, word })), { dash: "", word: "cut: exact" }, { dash: "6 4", word: "estimated" }, { head: -1, word: "helps the answer" }, { head: 1, word: "works against it" }];
  const width = Math.max(left + n * column + 16, 320), perLine = Math.max(1, Math.floor(width / 165)), legend = Math.ceil(lines.length / perLine) * 20;
  const top = 30, below = (turned ? 24 + longest * 0.72 : 30) + legend + 6, height = top + layers * row + below;
  const X = (i) => left + (i + 0.5) * column, Y = (layer) => top + (layers - layer) * row;
  const made = picture(width, height, theme, name);
  const step = layers > 32 ? 4 : layers > 16 ? 2 : 1;
  for (let layer = 0; layer <= layers; layer += step)
    made.append(label(34, Y(layer) + 4, layer === layers ? "end" : String(layer), theme, { "text-anchor": "end", fill: theme.soft, "font-size": 12 }));
  made.append(label(6, 14, "layer", theme, { fill: theme.soft, "font-size": 12 }));
  tokens.forEach((token, i) => {
    made.append(svg("line", { x1: number(X(i)), x2: number(X(i)), y1: Y(layers), y2: Y(0), stroke: theme.line, "stroke-width": i === n - 1 ? 2 : 1 }));
    made.append(label(X(i), Y(0) + 22, labels[i], theme, { "text-anchor": turned ? "end" : "middle", turned, title: `${i}: ${visible(token)}`, ...(subject.includes(i) ? { "font-weight": 700 } : {}) }));
  });
  made.append(label(X(n - 1), 16, `→ ${short(visible(answer), 20)}`, theme, { "text-anchor": "end", "font-weight": 700 }));
  const head = (effect, x, y, angle, size, colour) => {
    const turn = { transform: `translate(${number(x)} ${number(y)}) rotate(${number(angle)})` };
    return effect > 0
      ? svg("line", { x1: 0, x2: 0, y1: -size, y2: size, stroke: colour, "stroke-width": 2.5, ...turn })
      : svg("polygon", { points: `1,0 ${-1.5 * size},${-0.8 * size} ${-1.5 * size},${0.8 * size}`, fill: colour, ...turn });
  };
  const most = Math.abs(edges[0]?.effect || 1), marks = [];
  edges.forEach((edge, i) => {
    const aside = 6 * (["main", "conv", "erase"].indexOf(edge.path) - 1), w = Math.max((7 * Math.abs(edge.effect)) / most, 1.2), colour = theme.paths[edge.path];
    const dx = X(edge.target) - X(edge.source), dy = -row, length = Math.hypot(dx, dy), [ux, uy] = [dx / length, dy / length];
    const [x1, y1, x2, y2] = [X(edge.source) - aside * uy, Y(edge.layer) + aside * ux, X(edge.target) - 5 * ux - aside * uy, Y(edge.layer + 1) - 5 * uy + aside * ux].map(number);
    const ends = { x1, y1, x2, y2, "stroke-linecap": "butt" };
    const mark = svg("g", { class: "mark edge", role: "button", "data-edge": i, "aria-label": edge.says },
      svg("line", { ...ends, stroke: colour, "stroke-width": number(w), ...(edge.exact === null ? { "stroke-dasharray": `${number(4 + w)} ${number(2.5 + 0.5 * w)}` } : {}) }),
      pathMark(edge.path, (x1 + x2) / 2, (y1 + y2) / 2, number(2.4 + 0.5 * w), theme), head(edge.effect, x2, y2, (180 * Math.atan2(dy, dx)) / Math.PI, 4 + 1.1 * w, colour),
      svg("line", { ...ends, stroke: "#000", "stroke-opacity": 0, "stroke-width": Math.max(number(w), 13), class: "hit" }), svg("title", {}, edge.says));
    if (edge.click) mark.addEventListener("click", edge.click);
    marks.push(mark);
  });
  // The strongest lie on top, and come first by keyboard.
  made.append(...[...marks].reverse());
  walk(made, marks, 1);
  lines.forEach(({ path, word, dash, head: way }, i) => {
    const x = 8 + (i % perLine) * 165, y = height - legend + Math.floor(i / perLine) * 20 + 6, stroke = path ? theme.paths[path] : theme.ink;
    made.append(svg("line", { x1: x, x2: x + (way ? 22 : 30), y1: y, y2: y, stroke, "stroke-width": 2.5, ...(dash ? { "stroke-dasharray": dash } : {}) }));
    if (path) made.append(pathMark(path, x + 15, y, 4, theme));
    if (way) made.append(head(way, x + 28, y, 0, 6, stroke));
    made.append(label(x + 38, y + 4, word, theme, { "font-size": 12 }));
  });
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
