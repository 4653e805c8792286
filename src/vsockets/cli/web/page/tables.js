// The tables of contexts and streams, and their buttons.

import { disconnect, resume, suspend } from "./actions.js";
import { draw, reconcile, make, setAttributes, setText, showText } from "./dom.js";

const HISTORY = 60;
const history = new Map(); // by CID: connects and accepts per second in the last snapshots

/** Format a rate. */
export const rate = (number) => (number === undefined || number === null ? "–" : number < 10 ? number.toFixed(1).replace(/\.0$/, "") : number.toFixed(0));

const UNITS = ["", "k", "M", "G", "T"];

/** Format bytes per second, which may be unknown. */
export function byteRate(number) {
  if (number === null) return "–";
  let unit = 0;
  for (; number >= 999.5 && unit < UNITS.length - 1; unit++) number /= 1000;
  return number.toFixed(unit && number < 9.95 ? 1 : 0) + UNITS[unit];
}

const cell = (className = "") => make("td", { className });
const STATES = { running: "● running", suspended: "❚❚ suspended", off: "○ off" };

/** Return a context's state in words. */
export const state = (context) => (STATES[context.state] ?? context.state) + (context.ft ? ", FT" : "");

/** Draw the table of contexts.  `select` is called with the CID of a chosen context. */
export function showContexts(snapshot, selected, select) {
  remember(snapshot.contexts);
  const claimless = snapshot.contexts.every((one) => !one.tools);
  document.getElementById("tools-column").hidden = claimless;
  reconcile(document.querySelector("#contexts tbody"), snapshot.contexts, (one) => String(one.cid), () => createContext(select), (row, context) => {
    row.context = context;
    const [cid, name, status, streams, sockets, connects, accepts, refusals, perSecond, denials, bytes, tools, chart, action] = row.cells;
    const rates = context.rates ?? {};
    setText(cid, context.cid);
    setText(name.firstChild, context.name);
    name.title = context.name; // the cell may cut it
    name.firstChild.ariaPressed = String(context.cid === selected);
    row.className = context.cid === selected ? "selected" : "";
    setText(status, state(context));
    status.className = `state ${context.state}`;
    setText(streams, context.streams);
    setText(sockets, context.sockets);
    setText(connects, rate(rates.connects));
    setText(accepts, rate(rates.accepts));
    setText(refusals, rate(rates.refusals));
    setText(perSecond, rate(rates.denials));
    perSecond.classList.toggle("alarming", rates.denials > 0);
    setText(denials, context.denials);
    setText(bytes, byteRate(context.bytes));
    setText(tools, context.tools);
    tools.title = context.tools; // the cell may cut it
    tools.hidden = claimless;
    setAttributes(chart.firstChild.firstChild, { points: line(history.get(context.cid)) });
    const button = action.firstChild;
    button.hidden = !context.guest || context.state === "off";
    setText(button, context.state === "suspended" ? "Resume" : "Suspend");
    button.ariaLabel = `${button.textContent} context ${context.cid} ${context.name}`;
  });
  const more = snapshot.left_out.contexts;
  showText(document.getElementById("contexts-left-out"), more ? `${more} more, with fewer streams.` : "");
}

function createContext(select) {
  const name = make("button", { type: "button", className: "plain" });
  const action = make("button", { type: "button" });
  const chart = draw("svg", { viewBox: "0 0 120 24", class: "chart", "aria-hidden": "true" }, draw("polyline"));
  const numbers = Array.from({ length: 8 }, () => cell("number"));
  const row = make("tr", {}, cell("number"), make("td", { className: "name" }, name), cell(), ...numbers, cell("name"), make("td", {}, chart), make("td", {}, action));
  name.addEventListener("click", () => select(row.context.cid));
  action.addEventListener("click", () => (row.context.state === "suspended" ? resume : suspend)(row.context));
  return row;
}

function remember(contexts) {
  const there = new Set(contexts.map((one) => one.cid));
  for (const cid of history.keys()) if (!there.has(cid)) history.delete(cid);
  for (const { cid, rates } of contexts) {
    const past = history.get(cid) ?? [];
    if (rates) past.push(rates.connects + rates.accepts);
    history.set(cid, past.slice(-HISTORY));
  }
}

function line(past) {
  const most = Math.max(1, ...past);
  const from = HISTORY - past.length;
  return past.map((number, at) => `${((from + at) * 120) / (HISTORY - 1)},${22 - (20 * number) / most}`).join(" ");
}

/** Draw the table of streams of one context, or with null of all. */
export function showStreams(snapshot, selected) {
  const wanted = snapshot.streams.filter((one) => selected === null || one.from === selected || one.to === selected);
  const names = new Map(snapshot.contexts.map((one) => [one.cid, one.name]));
  const where = (cid, address) => `${address.join(":")} ${names.get(cid) ?? ""}`;
  reconcile(document.querySelector("#streams tbody"), wanted, (one) => `${one.local}-${one.peer}-${one.from}`, createStream, (row, stream) => {
    row.stream = stream;
    const values = [where(stream.from, stream.local), where(stream.to, stream.peer), stream.type, stream.state, stream.receive_queue ?? "–", stream.send_queue ?? "–", byteRate(stream.bytes), `${stream.pid} ${stream.command ?? ""}`.trim()];
    values.forEach((value, at) => setText(row.cells[at], value));
    for (const cell of [row.cells[0], row.cells[1]]) cell.title = cell.textContent;
    row.cells[8].firstChild.ariaLabel = `Disconnect ${stream.local.join(":")} to ${stream.peer.join(":")}`;
  });
  const title = selected === null ? "Streams" : `Streams of context ${selected} ${names.get(selected) ?? ""}`;
  setText(document.getElementById("streams-title"), title);
  document.getElementById("show-all").hidden = selected === null;
  document.getElementById("no-streams").hidden = wanted.length > 0;
  document.getElementById("streams").hidden = wanted.length === 0;
  const more = snapshot.left_out.streams;
  showText(document.getElementById("streams-left-out"), more ? `${more} more are not listed; vsock ls lists them all.` : "");
}

function createStream() {
  const button = make("button", { type: "button", textContent: "Disconnect" });
  const row = make("tr", {}, cell("address"), cell("address"), cell(), cell(), cell("number"), cell("number"), cell("number"), cell("number"), make("td", {}, button));
  button.addEventListener("click", () => disconnect(row.stream));
  return row;
}
