// What has happened: a list for the eye, now and then a sentence for the ear.

import { make, say } from "./dom.js";

const MOST = 200;
const QUIET = 5_000; // milliseconds between two sentences
const KINDS = { denial: "✕ denied", context: "◆ context", disconnect: "⏏ disconnected", vsockd: "! vsockd", lost: "… lost" };

let last = 0; // the number of the last event
let unsaid = [];
let due = null;

const at = (time) => new Date(time * 1000).toTimeString().slice(0, 8);

function words(event) {
  if (event.topic !== "context") return event.message.replace(/^(denied|disconnected): /, "");
  const dropped = event.dropped ? `, ${event.dropped} ${event.dropped === 1 ? "stream" : "streams"} ended` : "";
  return `${event.cid} ${event.name}: ${event.change}${dropped}`;
}

/** Enter an event into the list.  `number` tells how many were lost before it. */
export function showEvent(event, number, live) {
  if (last && number > last + 1) enter({ topic: "lost", time: event.time }, `${number - last - 1} events were not read in time`);
  last = number;
  if (event.missed) enter({ topic: "lost", time: event.time }, `${event.missed} events were not read in time`);
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
  unsaid.push(sentence);
  due ??= setTimeout(() => {
    const words = unsaid.length === 1 ? unsaid[0] : `${unsaid.length} events, the last: ${unsaid.at(-1)}`;
    say(document.getElementById("heard"), words);
    unsaid = [];
    due = null;
  }, QUIET);
}
