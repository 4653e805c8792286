// Actions of the page: suspend, resume, disconnect.

import { setText } from "./dom.js";

const $ = (id) => document.getElementById(id);

let clearing; // timer that clears the announcement

/** Show a message for some seconds; screen readers speak it. */
export function announce(words) {
  setText($("said"), words);
  clearTimeout(clearing);
  clearing = setTimeout(() => setText($("said"), ""), 10_000);
}

/** Ask for a confirmation; the promise resolves to true for yes. */
function ask(title, words, yes) {
  setText($("question-title"), title);
  setText($("question-words"), words);
  setText($("question-yes"), yes);
  const dialog = $("question");
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

async function act(action, done) {
  try {
    const answer = await fetch("actions", { method: "POST", body: JSON.stringify(action) });
    const type = answer.headers.get("Content-Type");
    const result = type === "application/json" ? await answer.json() : { error: await answer.text() };
    if (!answer.ok) announce(`Failed: ${result.error}`);
    else if (result.streams_left) announce(`${done}, but ${result.streams_left} streams are still open: vsockd may not access their programs`);
    else announce(`${done}.`);
  } catch {
    announce("Failed: vsock web does not reply.");
  }
}

const streams = (number) => (number === 1 ? "Its stream is" : `Its ${number} streams are`);

/** Suspend a context, after a confirmation. */
export async function suspend(context) {
  const words = context.streams ? `${streams(context.streams)} closed, and new ones are refused until it is resumed.` : "New streams are refused until it is resumed.";
  if (await ask(`Suspend context ${context.cid} ${context.name}?`, words, "Suspend")) {
    await act({ action: "suspend", cid: context.cid }, `Context ${context.cid} is suspended`);
  }
}

/** Resume a context. */
export function resume(context) {
  return act({ action: "resume", cid: context.cid }, `Context ${context.cid} is resumed`);
}

/** Close a stream, after a confirmation. */
export async function disconnect(stream) {
  const name = `${stream.local.join(":")} to ${stream.peer.join(":")}`;
  if (await ask(`Disconnect ${name}?`, "Both programs see the end of the stream; unread data is lost.", "Disconnect")) {
    await act({ action: "disconnect", local: stream.local, peer: stream.peer }, `The stream ${name} is closed`);
  }
}
