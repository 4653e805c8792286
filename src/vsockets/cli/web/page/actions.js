// What one can do from here: suspend, resume, disconnect.

import { say } from "./dom.js";

const $ = (id) => document.getElementById(id);

let silence;

/** Say it for some seconds, also to who cannot see the page. */
export function announce(words) {
  say($("said"), words);
  clearTimeout(silence);
  silence = setTimeout(() => say($("said"), ""), 10_000);
}

/** Ask before something that cannot be taken back; true for yes. */
function ask(title, words, yes) {
  say($("question-title"), title);
  say($("question-words"), words);
  say($("question-yes"), yes);
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
    if (!answer.ok) announce(`It was not done: ${result.error}`);
    else if (result.streams_left) announce(`${done}, but ${result.streams_left} streams go on: vsockd may not reach into their programs`);
    else announce(`${done}.`);
  } catch {
    announce("It was not done: vsock web does not answer.");
  }
}

const streams = (number) => (number === 1 ? "Its stream is" : `Its ${number} streams are`);

/** Suspend a context, after a question. */
export async function suspend(context) {
  const words = context.streams ? `${streams(context.streams)} ended, and nothing gets in or out until it is resumed.` : "Nothing gets in or out until it is resumed.";
  if (await ask(`Suspend context ${context.cid} ${context.name}?`, words, "Suspend")) {
    await act({ action: "suspend", cid: context.cid }, `Context ${context.cid} is suspended`);
  }
}

/** Resume a context. */
export function resume(context) {
  return act({ action: "resume", cid: context.cid }, `Context ${context.cid} runs again`);
}

/** End a stream, after a question. */
export async function disconnect(stream) {
  const name = `${stream.local.join(":")} to ${stream.peer.join(":")}`;
  if (await ask(`Disconnect ${name}?`, "Both programs see the stream's end; what is unread is lost.", "Disconnect")) {
    await act({ action: "disconnect", local: stream.local, peer: stream.peer }, `The stream ${name} has ended`);
  }
}
