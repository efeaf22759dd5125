// The edges of a prompt as a picture: lines between tokens, layers from below to above.
import { all, short, svg, visible, walk } from "./dom.js";
import { label, length, longest, number, picture } from "./figures.js";

const PATHS = ["main", "conv", "erase"];
const AXIS = 46, SIDE = 16, KEY = 165, LINE = 20; // pixels: layers' numbers, the right side, an entry of the legend
const WIDEST = 7, THINNEST = 1.2; // and edges

/** The marker in an edge's middle, which says its path without colour. */
function pathMark(path, x, y, r, theme) {
  const look = { fill: theme.paths[path], stroke: theme.paper, "stroke-width": 1 };
  if (path === "conv") return svg("rect", { x: number(x - r), y: number(y - r), width: 2 * r, height: 2 * r, ...look });
  if (path === "erase") return svg("polygon", { points: [[x, y - 1.3 * r], [x + 1.2 * r, y + r], [x - 1.2 * r, y + r]].map((at) => at.map(number)).join(" "), ...look });
  return svg("circle", { cx: number(x), cy: number(y), r: number(1.1 * r), ...look });
}

/** An arrowhead where the edge helps the answer, a bar where it works against it. */
function head(effect, x, y, angle, width, colour) {
  const size = number(4 + 1.1 * width), turn = { transform: `translate(${number(x)} ${number(y)}) rotate(${number(angle)})` };
  return effect > 0
    ? svg("line", { x1: 0, x2: 0, y1: -size, y2: size, stroke: colour, "stroke-width": 2.5, ...turn })
    : svg("polygon", { points: `1,0 ${number(-1.5 * size)},${number(-0.8 * size)} ${number(-1.5 * size)},${number(0.8 * size)}`, fill: colour, ...turn });
}

/** Ends of edges from above to below; the first is where the answer is read. */
export function nodesOf(edges, tokens, layers) {
  const ends = edges.flatMap((edge) => [{ position: edge.source, row: edge.begin }, { position: edge.target, row: edge.end }]);
  const nodes = new Map([{ position: tokens.length - 1, row: layers }, ...ends].map((node) => [`${node.position} ${node.row}`, node]));
  return [...nodes.values()].toSorted((a, b) => b.row - a.row || b.position - a.position);
}

/** The node that is nearest in the direction of a key, by its place in the list. */
function neighbour(nodes, i, key) {
  const { position, row } = nodes[i];
  const ahead = ({ position: p, row: r }) => ({ ArrowLeft: [position - p, r - row], ArrowRight: [p - position, r - row], ArrowUp: [r - row, p - position], ArrowDown: [row - r, p - position] })[key];
  const far = (node) => ahead(node)[0] + 3 * Math.abs(ahead(node)[1]);
  const found = nodes.filter((node) => ahead(node)[0] > 0).toSorted((a, b) => far(a) - far(b));
  return nodes.indexOf(found[0]);
}

/** Where a marked route goes on along a token: the ends of its hops that meet there, and from which row to which. */
function relays(edges) {
  const marked = edges.filter((edge) => (edge.hop ?? null) !== null), found = [];
  for (const position of new Set(marked.map((edge) => edge.target)))
    for (const hop of new Set(marked.map((edge) => edge.hop))) {
      const from = Math.min(...marked.filter((edge) => edge.hop === hop && edge.target === position).map((edge) => edge.end));
      const to = Math.max(...marked.filter((edge) => edge.hop === hop + 1 && edge.source === position).map((edge) => edge.begin));
      if (from < to) found.push({ position, from, to });
    }
  return { marked, joints: found };
}

/**
 * Draw edges between tokens.
 *
 * edges: { layer, path, source, target, effect, exact, begin, end, says, click, hop, id }, the strongest first. They run from
 * row `begin` to row `end`, where row l is what enters layer l; `exact` is null where the effect is attributed only; `hop` is
 * the place in a marked route, if any; `id` names the mark. most: the effect of the widest line.
 * nodes: { position, row, says, click }, that can be chosen, as `nodesOf` orders them; without, ends are not drawn.
 * choosing: to walk to a mark is to press it.
 */
export function graph({ tokens, subject, layers, edges, answer, words, unit, name, most = edges[0]?.effect, nodes = [], choosing = false }, theme, room) {
  const n = tokens.length, labels = tokens.map((token) => short(visible(token), 16));
  const fitting = (left) => Math.min(Math.max((room - left - SIDE) / n, 24), 110);
  const turned = longest(labels) + 8 > fitting(AXIS);
  const left = turned ? Math.max(AXIS, ...labels.map((text, i) => 0.72 * length(text) + 10 - (i + 0.5) * fitting(AXIS))) : AXIS;
  const column = fitting(left), row = Math.min(Math.max(560 / (layers + 1), 26), 46), width = Math.max(left + n * column + SIDE, 320);
  const { marked, joints } = relays(edges), strongest = Math.abs(most || 1);
  const key = [
    ...PATHS.filter((path) => edges.some((edge) => edge.path === path)).map((path) => ({ path, word: words[path] })),
    { word: "cut: exact" }, { word: "attributed", dash: "6 4" }, { word: "helps the answer", effect: -1 }, { word: "works against it", effect: 1 },
    ...(edges.length ? [{ word: `${Number(strongest.toPrecision(2))}${unit && ` ${unit}`}`, thick: WIDEST }] : []),
    ...(marked.length ? [{ word: "the marked route", route: true }] : []),
  ];
  const perLine = Math.max(1, Math.floor(Math.min(width, room) / KEY)), top = 30, legend = Math.ceil(key.length / perLine) * LINE;
  const height = top + layers * row + (turned ? 24 + longest(labels) * 0.72 : 30) + legend + 6;
  const X = (i) => left + (i + 0.5) * column, Y = (level) => top + (layers - level) * row;
  const made = picture(width, height, theme, name);

  const places = nodesOf(edges, tokens, layers);
  tokens.forEach((token, i) => {
    const own = places.filter((node) => node.position === i).map((node) => node.row), x = number(X(i));
    made.append(svg("line", { x1: x, x2: x, y1: number(Y(layers)), y2: number(Y(0) + 8), stroke: theme.line }));
    if (own.length > 1) made.append(svg("line", { x1: x, x2: x, y1: number(Y(own[0])), y2: number(Y(own.at(-1))), stroke: theme.soft, "stroke-opacity": 0.4, "stroke-width": 2 }));
    made.append(label(x, Y(0) + 24, labels[i], theme, { "text-anchor": turned ? "end" : "middle", turned, title: `${i}: ${visible(token)}`, ...(subject.includes(i) ? { "font-weight": 700 } : {}) }));
  });
  made.append(label(X(n - 1) + 8, 16, `→ ${short(visible(answer), 24)}`, theme, { "text-anchor": "end", "font-weight": 700 }));

  // Paths between the same two tokens lie beside each other.
  const beside = (edge) => edges.some((other) => other !== edge && ["layer", "source", "target"].every((what) => other[what] === edge[what]));
  const drawn = edges.map((edge) => {
    const [x, y] = [X(edge.source), Y(edge.begin)], [dx, dy] = [X(edge.target) - x, Y(edge.end) - y], far = Math.hypot(dx, dy), [ux, uy] = [dx / far, dy / far];
    const aside = beside(edge) ? 6 * (PATHS.indexOf(edge.path) - 1) : 0;
    const [x1, y1, x2, y2] = [x + 4 * ux - aside * uy, y + 4 * uy + aside * ux, x + dx - 7 * ux - aside * uy, y + dy - 7 * uy + aside * ux].map(number);
    return { edge, ends: { x1, y1, x2, y2 }, w: number(Math.max((WIDEST * Math.abs(edge.effect)) / strongest, THINNEST)), angle: (180 * Math.atan2(dy, dx)) / Math.PI };
  });
  for (const { position, from, to } of joints)
    made.append(svg("line", { x1: number(X(position)), x2: number(X(position)), y1: number(Y(from)), y2: number(Y(to)), stroke: theme.route[1], "stroke-width": 12, "stroke-opacity": 0.8 }));
  for (const { edge, ends, w } of drawn.filter((one) => marked.includes(one.edge)))
    theme.route.forEach((stroke, i) => made.append(svg("line", { ...ends, stroke, "stroke-width": w + 9 - 2 * i, "stroke-linecap": "round", class: "halo", "data-of": edge.id })));

  const marks = drawn.map(({ edge, ends, w, angle }, i) => {
    const { x1, y1, x2, y2 } = ends, colour = theme.paths[edge.path], dashes = edge.exact === null ? { "stroke-dasharray": `${number(4 + w)} ${number(2.5 + 0.5 * w)}` } : {};
    const mark = svg("g", { class: "mark edge", role: "button", "data-edge": edge.id ?? i, "aria-label": edge.says },
      svg("line", { ...ends, stroke: theme.ink, "stroke-opacity": 0, "stroke-width": w + 4, class: "outline" }),
      svg("line", { ...ends, stroke: colour, "stroke-width": w, class: "shaft", ...dashes }),
      pathMark(edge.path, (x1 + x2) / 2, (y1 + y2) / 2, number(2.4 + 0.5 * w), theme), head(edge.effect, x2, y2, angle, w, colour),
      svg("line", { ...ends, stroke: "#000", "stroke-opacity": 0, "stroke-width": Math.max(w, 13), class: "hit" }), svg("title", {}, edge.says));
    if (edge.click) mark.addEventListener("click", edge.click);
    return mark;
  });
  // The strongest lie on top, and come first by keyboard.
  made.append(...marks.toReversed());
  walk(marks, 1, choosing);

  const dots = nodes.map(({ position, row: level, says, click }) => {
    const at = { cx: number(X(position)), cy: number(Y(level)) };
    const dot = svg("g", { class: "mark node", role: "button", "data-position": position, "data-row": level, "aria-label": says },
      svg("circle", { ...at, r: 9, fill: "#000", "fill-opacity": 0, class: "hit" }), svg("circle", { ...at, r: 4, fill: theme.soft, stroke: theme.paper, "stroke-width": 1, class: "dot" }));
    dot.addEventListener("click", click);
    return dot;
  });
  made.append(...dots);
  walk(dots, (i, arrow) => neighbour(nodes, i, arrow), choosing);

  const step = layers > 32 ? 4 : layers > 16 ? 2 : 1, named = all(layers).filter((layer) => layer % step === 0);
  const soft = { fill: theme.soft, "font-size": 12 };
  made.append(svg("g", { class: "pinned" },
    svg("rect", { x: 0, y: 0, width: 40, height: number(Y(0) + 8), fill: theme.paper }), label(6, 14, "layer", theme, soft),
    ...[...named, layers].map((layer) => label(34, Y(layer) + 4, layer === layers ? "end" : String(layer), theme, { "text-anchor": "end", ...soft })),
    svg("g", { class: "legend" }, ...key.flatMap((one, i) => keyed(one, 8 + (i % perLine) * KEY, height - legend + Math.floor(i / perLine) * LINE + 6, theme)))));
  return made;
}

/** An entry of the legend: a sample and its words. */
function keyed({ word, path, dash, effect, thick = 2.5, route }, x, y, theme) {
  const stroke = path ? theme.paths[path] : theme.ink, ends = { x1: x, x2: effect ? x + 22 : x + 30, y1: y, y2: y };
  return [
    ...(route ? theme.route.map((colour, i) => svg("line", { ...ends, stroke: colour, "stroke-width": 12 - 2 * i, "stroke-linecap": "round" })) : []),
    ...(route ? [] : [svg("line", { ...ends, stroke, "stroke-width": thick, ...(dash ? { "stroke-dasharray": dash } : {}) })]),
    ...(path ? [pathMark(path, x + 15, y, 4, theme)] : []), ...(effect ? [head(effect, x + 28, y, 0, 2, stroke)] : []),
    label(x + 38, y + 4, word, theme, { "font-size": 12 }),
  ];
}

const pin = (box) => box.querySelector(".pinned")?.setAttribute("transform", `translate(${box.scrollLeft} 0)`);
const scrolled = (event) => pin(event.currentTarget);

/** Show a figure in a box that scrolls; what says what is where stays in sight. */
export function frame(box, figure) {
  const at = box.scrollLeft;
  box.replaceChildren(figure);
  box.scrollLeft = at;
  box.addEventListener("scroll", scrolled); // the same listener is never added twice
  pin(box);
  return box;
}
