// Events: a list, and a summary for screen readers.

import { make, setText } from "./dom.js";

const MOST = 200;
const QUIET = 5_000; // milliseconds between two summaries
const KINDS = { denial: "✕ denied", context: "◆ context", disconnect: "⏏ disconnected", vsockd: "! vsockd", lost: "… lost" };

let last = 0; // the number of the last event
let unannounced = [];
let due = null;

const at = (time) => new Date(time * 1000).toTimeString().slice(0, 8);

function words(event) {
  if (event.topic !== "context") return event.message.replace(/^(denied|disconnected): /, "");
  const dropped = event.dropped ? `, ${event.dropped} ${event.dropped === 1 ? "stream" : "streams"} ended` : "";
  return `${event.cid} ${event.name}: ${event.change}${dropped}`;
}

/** Add an event to the list.  A gap before `number` shows how many events were lost. */
export function showEvent(event, number, live) {
  if (last && number > last + 1) enter({ topic: "lost", time: event.time }, `${number - last - 1} events were lost: this page reads too slowly`);
  last = number;
  if (event.missed) enter({ topic: "lost", time: event.time }, `${event.missed} events were lost: this page reads too slowly`);
  const text = words(event);
  enter(event, text);
  if (live) speak(`${KINDS[event.topic].slice(2)} ${text.split("; ")[0]}`);
}

function enter(event, text) {
  const list = document.getElementById("events");
  const kind = make("strong", { className: "kind", textContent: KINDS[event.topic] });
  const time = make("time", { textContent: at(event.time), dateTime: new Date(event.time * 1000).toISOString() });
  const [what, ...details] = text.split("; ");
  list.prepend(make("li", { className: event.topic }, time, kind, make("span", { textContent: what }), make("small", { textContent: details.join("; ") })));
  while (list.children.length > MOST) list.lastElementChild.remove();
  document.getElementById("no-events").hidden = true;
}

function speak(sentence) {
  unannounced.push(sentence);
  due ??= setTimeout(() => {
    const words = unannounced.length === 1 ? unannounced[0] : `${unannounced.length} events, the last: ${unannounced.at(-1)}`;
    setText(document.getElementById("heard"), words);
    unannounced = [];
    due = null;
  }, QUIET);
}
