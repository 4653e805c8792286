// An agent in a guest: it answers each line with a line.  It listens at a unix socket, which
// `vsock forward` joins with a port of the guest: agent.js PATH
const net = require("node:net");
const readline = require("node:readline");

function answer(words) {
  if (words[0] === "ping") return "pong";
  if (words[0] === "add") return words.slice(1).reduce((sum, word) => sum + Number(word), 0);
  return "unknown request";
}

const server = net.createServer((connection) => {
  connection.on("error", () => connection.destroy());
  const lines = readline.createInterface({ input: connection });
  lines.on("line", (line) => connection.write(`${answer(line.split(" "))}\n`));
});
server.listen(process.argv[2], () => console.log("ready"));
