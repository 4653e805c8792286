// The host in the middle, guests around it: places that stay, so that nothing jumps.

import { draw, keep, place, say } from "./dom.js";
import { state } from "./tables.js";

const WIDTH = 880;
const HEIGHT = 440;
const FEW = 10; // guests that have room for their names
const DENIED = 10_000; // how long a denial is shown, in milliseconds
const denials = new Map(); // by "from-to": { from, to, rule, until }

/** Remember a denial, to be drawn for some seconds. */
export function showDenial(event) {
  const to = event.destination?.[0];
  denials.set(`${event.context}-${to}`, { from: event.context, to, rule: event.rule, until: event.time * 1000 + DENIED });
}

/** Draw the graph.  `select` is called with the CID of a context that was chosen. */
export function showGraph(picture, selected, select) {
  const now = Date.now();
  for (const [key, denial] of denials) if (denial.until < now) denials.delete(key);
  const spots = arrange(picture.contexts);
  const byCid = new Map(picture.contexts.map((one) => [one.cid, one]));
  const denied = [...denials.values()].filter((one) => spots.has(one.from));
  const busy = ({ from, to }) => byCid.get(from)?.rates?.connects > 0 && byCid.get(to)?.rates?.accepts > 0;
  const edges = [
    ...picture.links.filter((one) => one.from !== one.to).map((one) => ({ ...one, kind: busy(one) ? "stream busy" : "stream", label: one.streams })),
    ...denied.filter((one) => spots.has(one.to) && one.to !== one.from).map((one) => ({ ...one, kind: "denial", label: `✕ ${one.rule}` })),
  ];
  keep(document.getElementById("edges"), edges, (one) => `${one.kind.split(" ")[0]}-${one.from}-${one.to}`, beginEdge, (group, edge) => {
    drawEdge(group, edge, spots.get(edge.from), spots.get(edge.to));
  });
  const troubled = new Set(denied.map((one) => one.from));
  keep(document.getElementById("nodes"), picture.contexts, (one) => String(one.cid), (one) => beginNode(one, select), (group, context) => {
    drawNode(group, context, spots.get(context.cid), context.cid === selected, troubled.has(context.cid));
  });
  say(document.getElementById("graph-words"), words(picture));
}

function words({ contexts, links }) {
  if (contexts.length === 1) return "There is the host alone. vsock context add adds a guest; vsock run --cid 3 -- PROGRAM runs a program in one.";
  const guests = contexts.filter((one) => one.guest).length;
  const streams = links.reduce((sum, one) => sum + one.streams, 0);
  return `The host and ${guests} ${guests === 1 ? "guest" : "guests"}, ${streams} ${streams === 1 ? "stream" : "streams"} between them. The tables below say the same; choose a context to see its streams alone.`;
}

/** Where each context is: the middle of its box, and the box's size. */
function arrange(contexts) {
  const guests = contexts.filter((one) => one.guest);
  const small = guests.length > FEW;
  const [w, h] = guests.length > 60 ? [30, 22] : guests.length > 24 ? [36, 26] : small ? [64, 26] : [150, 54];
  const size = { w, h, small };
  const spots = new Map();
  spots.set(2, { x: WIDTH / 2, y: HEIGHT / 2, w: 150, h: 54, small: false });
  spots.set(0, { x: 95, y: 40, w: 150, h: 54, small: false });
  const sizes = guests.length > 60 ? [1, 0.76, 0.52] : guests.length > 24 ? [1, 0.72] : [1];
  const places = spread(sizes.map(ring), guests.length);
  guests.forEach(({ cid }, at) => spots.set(cid, { ...places[at], ...size }));
  return spots;
}

/** So many places on the rings, each ring's as far from each other, also the first from the last. */
function spread(rings, number) {
  if (number === 1) return [rings[0][Math.floor(rings[0].length / 4)]];
  const all = rings.reduce((sum, ring) => sum + ring.length, 0);
  const places = [];
  let before = 0;
  for (const ring of rings) {
    const count = Math.round(((before + ring.length) * number) / all) - places.length;
    before += ring.length;
    for (let at = 0; at < count; at++) places.push(ring[Math.floor(((at + 0.5) / count) * ring.length)]);
  }
  return places;
}

/** Points on an ellipse around the host, about a unit from each other, clockwise from the top. */
function ring(size) {
  const points = [];
  const [wide, high] = [WIDTH / 2 - 90, HEIGHT / 2 - 40];
  for (let angle = 0; angle < 2 * Math.PI; ) {
    points.push({ x: WIDTH / 2 + wide * size * Math.sin(angle), y: HEIGHT / 2 - high * size * Math.cos(angle) });
    angle += 1 / (size * Math.hypot(wide * Math.cos(angle), high * Math.sin(angle)));
  }
  return points;
}

function beginNode(context, select) {
  const group = draw("g", { tabindex: 0, role: "button" }, draw("rect", { rx: 10 }), draw("text", { class: "name", "text-anchor": "middle" }), draw("text", { class: "facts", "text-anchor": "middle" }));
  const choose = () => select(context.cid);
  group.addEventListener("click", choose);
  group.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      choose();
    }
  });
  return group;
}

function drawNode(group, context, { x, y, w, h, small }, selected, troubled) {
  const [rect, name, facts] = group.children;
  const kind = context.cid <= 2 ? "host" : context.state;
  const streams = `${context.streams} ${context.streams === 1 ? "stream" : "streams"}`;
  place(group, {
    transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
    class: ["node", kind, selected ? "selected" : "", troubled ? "denied" : ""].filter(Boolean).join(" "),
    "aria-pressed": selected,
    "aria-label": `context ${context.cid} ${context.name}, ${state(context).replace(/^\W+/, "")}, ${streams}${troubled ? ", denied something just now" : ""}`,
  });
  place(rect, { x: -w / 2, y: -h / 2, width: w, height: h });
  place(name, { y: small ? 5 : -4 });
  place(facts, { y: 15 });
  const digits = String(context.cid);
  say(name, small ? (digits.length > w / 8 ? `…${digits.slice(-2)}` : digits) : shorten(context.name));
  const running = digits.length > 6 ? `CID ${digits}` : `CID ${digits} · ${streams}`;
  say(facts, small ? "" : context.state === "running" ? running : state(context));
}

const shorten = (name) => (name.length > 17 ? `${name.slice(0, 16)}…` : name);

function beginEdge() {
  return draw("g", {}, draw("path", { class: "line" }), draw("rect", { rx: 8, height: 18, class: "behind" }), draw("text", { "text-anchor": "middle" }));
}

function drawEdge(group, { kind, label, streams = 1, ...ends }, from, to) {
  const [line, behind, text] = group.children;
  // To the right of the straight way, so that both directions are seen.
  const [dx, dy] = [to.x - from.x, to.y - from.y];
  const far = Math.hypot(dx, dy) || 1;
  const near = Math.hypot((from.x + to.x - WIDTH) / 2, (from.y + to.y - HEIGHT) / 2) < 70;
  const crosses = near && ends.from !== 2 && ends.to !== 2; // the host, who has nothing to do with it
  const bend = (kind === "denial" ? -36 : 18) * (crosses ? 5 : 1);
  const middle = { x: (from.x + to.x) / 2 - (dy / far) * bend, y: (from.y + to.y) / 2 + (dx / far) * bend };
  const start = border(from, middle);
  const end = border(to, middle);
  const at = { x: (start.x + end.x) / 4 + middle.x / 2, y: (start.y + end.y) / 4 + middle.y / 2 };
  place(group, { class: `edge ${kind}` });
  place(line, {
    d: `M${start.x.toFixed(1)} ${start.y.toFixed(1)}Q${middle.x.toFixed(1)} ${middle.y.toFixed(1)} ${end.x.toFixed(1)} ${end.y.toFixed(1)}`,
    "stroke-width": Math.min(6, 1.5 + Math.log2(streams) / 2).toFixed(1),
    "marker-end": kind === "denial" ? "url(#arrow-denied)" : "url(#arrow)",
  });
  const width = 12 + 7 * String(label).length;
  place(behind, { x: at.x - width / 2, y: at.y - 9, width });
  place(text, { x: at.x, y: at.y + 4 });
  say(text, label);
}

/** Where the way from the middle of a box to a point leaves it. */
function border({ x, y, w, h }, point) {
  const [dx, dy] = [point.x - x, point.y - y];
  const part = Math.min((w / 2 + 4) / Math.abs(dx || 1e-9), (h / 2 + 4) / Math.abs(dy || 1e-9));
  return { x: x + dx * part, y: y + dy * part };
}
