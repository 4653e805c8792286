// The graph: the host in the middle and guests around it, at positions that do not change.

import { draw, reconcile, setAttributes, setText } from "./dom.js";
import { state } from "./tables.js";

const WIDTH = 880;
const HEIGHT = 440;
const FEW = 10; // most guests that are shown with their names
const DENIED = 10_000; // milliseconds that a denial is shown
const denials = new Map(); // by "from-to": { from, to, rule, until }

/** Add a denial, which is drawn for some seconds. */
export function showDenial(event) {
  const to = event.destination?.[0];
  denials.set(`${event.context}-${to}`, { from: event.context, to, rule: event.rule, until: event.time * 1000 + DENIED });
}

/** Draw the graph.  `select` is called with the CID of a chosen context. */
export function showGraph(snapshot, selected, select) {
  const now = Date.now();
  for (const [key, denial] of denials) if (denial.until < now) denials.delete(key);
  const spots = arrange(snapshot.contexts);
  const byCid = new Map(snapshot.contexts.map((one) => [one.cid, one]));
  const denied = [...denials.values()].filter((one) => spots.has(one.from));
  const busy = ({ from, to }) => byCid.get(from)?.rates?.connects > 0 && byCid.get(to)?.rates?.accepts > 0;
  const edges = [
    ...snapshot.links.filter((one) => one.from !== one.to).map((one) => ({ ...one, kind: busy(one) ? "stream busy" : "stream", label: one.streams })),
    ...denied.filter((one) => spots.has(one.to) && one.to !== one.from).map((one) => ({ ...one, kind: "denial", label: `✕ ${one.rule}` })),
  ];
  reconcile(document.getElementById("edges"), edges, (one) => `${one.kind.split(" ")[0]}-${one.from}-${one.to}`, createEdge, (group, edge) => {
    drawEdge(group, edge, spots.get(edge.from), spots.get(edge.to));
  });
  const troubled = new Set(denied.map((one) => one.from));
  reconcile(document.getElementById("nodes"), snapshot.contexts, (one) => String(one.cid), (one) => createNode(one, select), (group, context) => {
    drawNode(group, context, spots.get(context.cid), context.cid === selected, troubled.has(context.cid));
  });
  setText(document.getElementById("graph-words"), words(snapshot));
}

function words({ contexts, links }) {
  if (contexts.length === 1) return "Only the host exists. vsock context add adds a guest; vsock run --cid 3 -- PROGRAM runs a program in one.";
  const guests = contexts.filter((one) => one.guest).length;
  const streams = links.reduce((sum, one) => sum + one.streams, 0);
  return `The host and ${guests} ${guests === 1 ? "guest" : "guests"}, ${streams} ${streams === 1 ? "stream" : "streams"} between them. The tables below show the same; choose a context to see its streams only.`;
}

/** Return the position of each context: the middle and size of its box. */
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

/** Return `number` places on the rings, evenly spaced on each ring. */
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

/** Return points on an ellipse around the host, a unit apart, clockwise from the top. */
function ring(size) {
  const points = [];
  const [wide, high] = [WIDTH / 2 - 90, HEIGHT / 2 - 40];
  for (let angle = 0; angle < 2 * Math.PI; ) {
    points.push({ x: WIDTH / 2 + wide * size * Math.sin(angle), y: HEIGHT / 2 - high * size * Math.cos(angle) });
    angle += 1 / (size * Math.hypot(wide * Math.cos(angle), high * Math.sin(angle)));
  }
  return points;
}

function createNode(context, select) {
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
  setAttributes(group, {
    transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
    class: ["node", kind, selected ? "selected" : "", troubled ? "denied" : ""].filter(Boolean).join(" "),
    "aria-pressed": selected,
    "aria-label": `context ${context.cid} ${context.name}, ${state(context).replace(/^\W+/, "")}, ${streams}${troubled ? ", denied a moment ago" : ""}`,
  });
  setAttributes(rect, { x: -w / 2, y: -h / 2, width: w, height: h });
  setAttributes(name, { y: small ? 5 : -4 });
  setAttributes(facts, { y: 15 });
  const digits = String(context.cid);
  setText(name, small ? (digits.length > w / 8 ? `…${digits.slice(-2)}` : digits) : shorten(context.name));
  const running = digits.length > 6 ? `CID ${digits}` : `CID ${digits} · ${streams}`;
  setText(facts, small ? "" : context.state === "running" ? running : state(context));
}

const shorten = (name) => (name.length > 17 ? `${name.slice(0, 16)}…` : name);

function createEdge() {
  return draw("g", {}, draw("path", { class: "line" }), draw("rect", { rx: 8, height: 18, class: "behind" }), draw("text", { "text-anchor": "middle" }));
}

function drawEdge(group, { kind, label, streams = 1, ...ends }, from, to) {
  const [line, behind, text] = group.children;
  // Bent to the right of the straight line, so that both directions are visible.
  const [dx, dy] = [to.x - from.x, to.y - from.y];
  const far = Math.hypot(dx, dy) || 1;
  const near = Math.hypot((from.x + to.x - WIDTH) / 2, (from.y + to.y - HEIGHT) / 2) < 70;
  const crosses = near && ends.from !== 2 && ends.to !== 2; // the host's box, which is not an end of this edge
  const bend = (kind === "denial" ? -36 : 18) * (crosses ? 5 : 1);
  const middle = { x: (from.x + to.x) / 2 - (dy / far) * bend, y: (from.y + to.y) / 2 + (dx / far) * bend };
  const start = border(from, middle);
  const end = border(to, middle);
  const at = { x: (start.x + end.x) / 4 + middle.x / 2, y: (start.y + end.y) / 4 + middle.y / 2 };
  setAttributes(group, { class: `edge ${kind}` });
  setAttributes(line, {
    d: `M${start.x.toFixed(1)} ${start.y.toFixed(1)}Q${middle.x.toFixed(1)} ${middle.y.toFixed(1)} ${end.x.toFixed(1)} ${end.y.toFixed(1)}`,
    "stroke-width": Math.min(6, 1.5 + Math.log2(streams) / 2).toFixed(1),
    "marker-end": kind === "denial" ? "url(#arrow-denied)" : "url(#arrow)",
  });
  const width = 12 + 7 * String(label).length;
  setAttributes(behind, { x: at.x - width / 2, y: at.y - 9, width });
  setAttributes(text, { x: at.x, y: at.y + 4 });
  setText(text, label);
}

/** Return where the line from the middle of a box to a point leaves the box. */
function border({ x, y, w, h }, point) {
  const [dx, dy] = [point.x - x, point.y - y];
  const part = Math.min((w / 2 + 4) / Math.abs(dx || 1e-9), (h / 2 + 4) / Math.abs(dy || 1e-9));
  return { x: x + dx * part, y: y + dy * part };
}
