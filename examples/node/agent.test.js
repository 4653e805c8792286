// The suite of the agent: it plays the host, and the agent runs in guest 3.
const assert = require("node:assert");
const { spawn } = require("node:child_process");
const fs = require("node:fs");
const os = require("node:os");
const path = require("node:path");
const { after, before, test } = require("node:test");

const folder = fs.mkdtempSync(path.join(os.tmpdir(), "agent-"));
const socket = path.join(folder, "socket");
const running = [];

function start(...words) {
  const options = { stdio: ["ignore", "ignore", "inherit"] };
  running.push(spawn(words[0], words.slice(1), options));
}

// Send lines to the agent, and resolve to its replies.
function ask(...requests) {
  const client = spawn("vsock", ["connect", "--wait", "20", "3", "5000"]);
  client.stdin.end(requests.map((request) => `${request}\n`).join(""));
  let replies = "";
  client.stdout.on("data", (data) => (replies += data));
  return new Promise((resolve) => {
    client.on("close", () => resolve(replies.split("\n").slice(0, -1)));
  });
}

before(() => {
  start("vsock", "run", "--cid", "3", "--", process.execPath, path.join(__dirname, "agent.js"), socket);
  const forward = ["forward", "--wait", "20", "--allow", "2", "vsock::5000", `unix:${socket}`];
  start("vsock", "run", "--cid", "3", "--", "vsock", ...forward);
});

after(() => {
  for (const one of running) one.kill();
  fs.rmSync(folder, { recursive: true });
});

test("it replies", async () => {
  assert.deepStrictEqual(await ask("ping", "add 1 2 3", "dance"), ["pong", "6", "unknown request"]);
});

test("it serves two clients at once", async () => {
  assert.deepStrictEqual(await Promise.all([ask("add 1"), ask("add 2")]), [["1"], ["2"]]);
});
