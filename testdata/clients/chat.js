// A chat client for Node with the ws package: CHATD_TOKEN=… node chat.js URL ROOM
// Lines typed are said; what is said is printed, once, also after a lost connection.
"use strict";
const WebSocket = require("ws");

const [url, room] = process.argv.slice(2);
let socket, cursor = null, count = 0;
const waiting = new Map(); // by cid: said, and not yet known to be on the server's disk

function connect() {
  socket = new WebSocket(url.replace(/^http/, "ws") + "/ws", "chatd.v1", { headers: { Authorization: `Bearer ${process.env.CHATD_TOKEN}` } });
  socket.on("open", () => send({ type: "hello", ...cursor !== null && { since: cursor } }));
  socket.on("message", data => hear(JSON.parse(data)));
  socket.on("error", e => console.error(e.message));
  socket.on("close", () => setTimeout(connect, 1000));
}

const send = frame => socket.readyState === WebSocket.OPEN && socket.send(JSON.stringify(frame));

function hear(frame) {
  if (["message", "edit", "delete", "react", "caught_up"].includes(frame.type)) cursor = frame.id;
  if (frame.cid) waiting.delete(frame.cid);
  if (frame.type === "message" && frame.room === room) console.log(`${frame.username}: ${frame.message}`);
  if (frame.type === "error") console.error(frame.error);
  if (frame.type !== "caught_up") return;
  console.error("connected");
  waiting.forEach(send);
}

require("readline").createInterface({ input: process.stdin }).on("line", message => {
  const frame = { type: "message", room, message, cid: `${Date.now().toString(16)}-${process.pid}-${count++}` };
  waiting.set(frame.cid, frame);
  send(frame);
});
connect();
