// The same as the graph, in words and numbers; and the buttons.

import { disconnect, resume, suspend } from "./actions.js";
import { draw, keep, make, place, say, tell } from "./dom.js";

const HISTORY = 60;
const history = new Map(); // by CID: connects and accepts a second, of the last pictures

/** A rate as people read it. */
export const rate = (number) => (number === undefined || number === null ? "–" : number < 10 ? number.toFixed(1).replace(/\.0$/, "") : number.toFixed(0));

const cell = (className = "") => make("td", { className });
const STATES = { running: "● running", suspended: "❚❚ suspended", off: "○ off" };

/** A context's state in words. */
export const state = (context) => (STATES[context.state] ?? context.state) + (context.ft ? ", FT" : "");

/** Draw the table of contexts.  `select` is called with the CID of one that was chosen. */
export function showContexts(picture, selected, select) {
  remember(picture.contexts);
  keep(document.querySelector("#contexts tbody"), picture.contexts, (one) => String(one.cid), () => beginContext(select), (row, context) => {
    row.context = context;
    const [cid, name, status, streams, sockets, connects, accepts, refusals, perSecond, denials, chart, action] = row.cells;
    const rates = context.rates ?? {};
    say(cid, context.cid);
    say(name.firstChild, context.name);
    name.title = context.name; // which may be cut
    name.firstChild.ariaPressed = String(context.cid === selected);
    row.className = context.cid === selected ? "selected" : "";
    say(status, state(context));
    status.className = `state ${context.state}`;
    say(streams, context.streams);
    say(sockets, context.sockets);
    say(connects, rate(rates.connects));
    say(accepts, rate(rates.accepts));
    say(refusals, rate(rates.refusals));
    say(perSecond, rate(rates.denials));
    perSecond.classList.toggle("alarming", rates.denials > 0);
    say(denials, context.denials);
    place(chart.firstChild.firstChild, { points: line(history.get(context.cid)) });
    const button = action.firstChild;
    button.hidden = !context.guest || context.state === "off";
    say(button, context.state === "suspended" ? "Resume" : "Suspend");
    button.ariaLabel = `${button.textContent} context ${context.cid} ${context.name}`;
  });
  const more = picture.left_out.contexts;
  tell(document.getElementById("contexts-left-out"), more ? `${more} more, with fewer streams.` : "");
}

function beginContext(select) {
  const name = make("button", { type: "button", className: "plain" });
  const action = make("button", { type: "button" });
  const chart = draw("svg", { viewBox: "0 0 120 24", class: "chart", "aria-hidden": "true" }, draw("polyline"));
  const numbers = Array.from({ length: 7 }, () => cell("number"));
  const row = make("tr", {}, cell("number"), make("td", { className: "name" }, name), cell(), ...numbers, make("td", {}, chart), make("td", {}, action));
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

/** Draw the table of streams, of one context or, with null, of all. */
export function showStreams(picture, selected) {
  const wanted = picture.streams.filter((one) => selected === null || one.from === selected || one.to === selected);
  const names = new Map(picture.contexts.map((one) => [one.cid, one.name]));
  const where = (cid, address) => `${address.join(":")} ${names.get(cid) ?? ""}`;
  keep(document.querySelector("#streams tbody"), wanted, (one) => `${one.local}-${one.peer}-${one.from}`, beginStream, (row, stream) => {
    row.stream = stream;
    const values = [where(stream.from, stream.local), where(stream.to, stream.peer), stream.type, stream.state, stream.receive_queue ?? "–", stream.send_queue ?? "–", `${stream.pid} ${stream.command ?? ""}`.trim()];
    values.forEach((value, at) => say(row.cells[at], value));
    for (const cell of [row.cells[0], row.cells[1]]) cell.title = cell.textContent;
    row.cells[7].firstChild.ariaLabel = `Disconnect ${stream.local.join(":")} to ${stream.peer.join(":")}`;
  });
  const title = selected === null ? "Streams" : `Streams of context ${selected} ${names.get(selected) ?? ""}`;
  say(document.getElementById("streams-title"), title);
  document.getElementById("show-all").hidden = selected === null;
  document.getElementById("no-streams").hidden = wanted.length > 0;
  document.getElementById("streams").hidden = wanted.length === 0;
  const more = picture.left_out.streams;
  tell(document.getElementById("streams-left-out"), more ? `${more} more are not listed; vsock ls lists them all.` : "");
}

function beginStream() {
  const button = make("button", { type: "button", textContent: "Disconnect" });
  const row = make("tr", {}, cell("address"), cell("address"), cell(), cell(), cell("number"), cell("number"), cell("number"), make("td", {}, button));
  button.addEventListener("click", () => disconnect(row.stream));
  return row;
}
