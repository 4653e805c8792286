// The page: receives snapshots and events from vsock web, and draws them.

import { setText, showText } from "./dom.js";
import { showEvent } from "./events.js";
import { showDenial, showGraph } from "./graph.js";
import { rate, showContexts, showStreams } from "./tables.js";

const $ = (id) => document.getElementById(id);
const opened = Date.now() / 1000;

let snapshot = null;
let selected = null; // CID of the context whose streams are shown; null: all

function select(cid) {
  selected = cid === selected ? null : cid;
  show();
}

function show() {
  if (!snapshot) return;
  if (!snapshot.contexts.some((one) => one.cid === selected)) selected = null;
  showGraph(snapshot, selected, select);
  showContexts(snapshot, selected, select);
  showStreams(snapshot, selected);
  const { vsockd, rates, contexts, left_out: more } = snapshot;
  setText($("vsockd"), `vsockd ${vsockd.pid} in ${vsockd.folder}, up ${age(vsockd.uptime)}`);
  setText($("total-contexts"), contexts.length + more.contexts);
  setText($("total-streams"), vsockd.streams);
  setText($("total-connects"), rate(rates?.connects));
  setText($("total-refusals"), rate(rates?.refusals));
  setText($("total-denials"), rate(rates?.denials));
  $("total-denials").classList.toggle("alarming", rates?.denials > 0);
}

function age(seconds) {
  if (seconds < 120) return `${seconds.toFixed(0)} s`;
  if (seconds < 7200) return `${(seconds / 60).toFixed(0)} min`;
  return seconds < 172_800 ? `${(seconds / 3600).toFixed(0)} h` : `${(seconds / 86_400).toFixed(0)} days`;
}

function showTrouble(words) {
  showText($("trouble"), words);
  document.body.classList.toggle("stale", words !== "");
}

const source = new EventSource("stream");
source.addEventListener("snapshot", ({ data }) => {
  const news = JSON.parse(data);
  if (news.unreachable) {
    showTrouble(`${news.unreachable}. The page shows the last known state; it updates when vsockd is back.`);
    return;
  }
  showTrouble("");
  snapshot = news;
  show();
});
source.addEventListener("event", ({ data, lastEventId }) => {
  const event = JSON.parse(data);
  if (event.topic === "denial") showDenial(event);
  showEvent(event, Number(lastEventId), event.time > opened);
  show();
});
source.addEventListener("error", () => {
  showTrouble("vsock web does not reply: it has ended, or this page's session is invalid. Open the link that it prints.");
});
$("show-all").addEventListener("click", () => select(selected));
