// The page: it hears from vsock web, and has everything drawn anew.

import { say, tell } from "./dom.js";
import { showEvent } from "./events.js";
import { showDenial, showGraph } from "./graph.js";
import { rate, showContexts, showStreams } from "./tables.js";

const $ = (id) => document.getElementById(id);
const opened = Date.now() / 1000;

let picture = null;
let selected = null; // the CID of the context whose streams are shown; null: all

function select(cid) {
  selected = cid === selected ? null : cid;
  show();
}

function show() {
  if (!picture) return;
  if (!picture.contexts.some((one) => one.cid === selected)) selected = null;
  showGraph(picture, selected, select);
  showContexts(picture, selected, select);
  showStreams(picture, selected);
  const { vsockd, rates, contexts, left_out: more } = picture;
  say($("vsockd"), `vsockd ${vsockd.pid} in ${vsockd.folder}, up ${age(vsockd.uptime)}`);
  say($("total-contexts"), contexts.length + more.contexts);
  say($("total-streams"), vsockd.streams);
  say($("total-connects"), rate(rates?.connects));
  say($("total-refusals"), rate(rates?.refusals));
  say($("total-denials"), rate(rates?.denials));
  $("total-denials").classList.toggle("alarming", rates?.denials > 0);
}

function age(seconds) {
  if (seconds < 120) return `${seconds.toFixed(0)} s`;
  if (seconds < 7200) return `${(seconds / 60).toFixed(0)} min`;
  return seconds < 172_800 ? `${(seconds / 3600).toFixed(0)} h` : `${(seconds / 86_400).toFixed(0)} days`;
}

function trouble(words) {
  tell($("trouble"), words);
  document.body.classList.toggle("stale", words !== "");
}

const source = new EventSource("stream");
source.addEventListener("picture", ({ data }) => {
  const news = JSON.parse(data);
  if (news.gone) {
    trouble(`${news.gone}. What you see is how things were; the page goes on when it is back.`);
    return;
  }
  trouble("");
  picture = news;
  show();
});
source.addEventListener("happened", ({ data, lastEventId }) => {
  const event = JSON.parse(data);
  if (event.topic === "denial") showDenial(event);
  showEvent(event, Number(lastEventId), event.time > opened);
  show();
});
source.addEventListener("error", () => {
  trouble("vsock web does not answer: it has ended, or this page's session has. Open the link that it prints.");
});
$("show-all").addEventListener("click", () => select(selected));
