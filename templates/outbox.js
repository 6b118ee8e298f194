// What was sent and is not known to be on the server's disk. It survives reloads and closed tabs.

import { client, say, shelf } from "./page.js";
import { lose, net, on, post } from "./net.js";

const ackWait = 8e3;
const firstPause = 1e3, lastPause = 15e3; // after the server said "later"
export const maxOutbox = 200;

// Entries are {cid, room, time, type, …, reason?}, oldest first: frames of chatd.v1, and why one was refused. All tabs of
// one user share them, so they are read anew each time; two tabs may send the same cid, and the server keeps one row.
export const outbox = {
  key: () => shelf.key("outbox"),
  all() { return JSON.parse(shelf.get(this.key()) || "[]").map(e => ({ type: "message", ...e })); }, // as the first chatd had no other
  save(entries) { shelf.set(this.key(), JSON.stringify(entries)); },
  add(frame) {
    const entry = { cid: newCid(), time: Date.now(), ...frame };
    this.save([...this.all(), entry]);
    return entry;
  },
  setReason(cid, reason) { this.save(this.all().map(e => e.cid === cid ? { ...e, reason } : e)); },
  remove(cid) { this.save(this.all().filter(e => e.cid !== cid)); },
  waiting() { return this.all().filter(e => !e.reason); },
};

// 128 bits, the time first: the server's index of cids then grows at its end.
function newCid() {
  const random = crypto.getRandomValues(new Uint8Array(10));
  return Date.now().toString(16).padStart(12, "0") + Array.from(random, b => b.toString(16).padStart(2, "0")).join("");
}

let inFlight = null; // {cid, again, timer}: one at a time, or a refused message would arrive after its successors
let pause = 0, pauseTimer = 0;

export function flush() {
  const next = outbox.waiting()[0];
  if (!net.live || inFlight || pauseTimer || !next) return;
  inFlight = { cid: next.cid, again: false, timer: 0 };
  transmit(next);
}

function transmit(entry) {
  const { time, reason, former, quote, ...frame } = entry;
  post(frame);
  inFlight.timer = setTimeout(() => {
    if (inFlight.again) return lose();
    inFlight.again = true;
    transmit(entry);
  }, ackWait);
}

function landed(cid) {
  if (inFlight?.cid !== cid) return;
  clearTimeout(inFlight.timer);
  inFlight = null;
  flush();
}

// Whatever comes back under one's own cid is on disk.
function acknowledge({ cid, username }) {
  if (!cid || username !== client.username) return;
  outbox.remove(cid);
  if (pause) say("");
  pause = 0;
  landed(cid);
}

// "Later" keeps what was sent pending; any other refusal is for its author to decide.
function refuse({ code, cid, error }, onRefused) {
  if (!cid) return say(error);
  if (["too_fast", "busy", "storage"].includes(code)) {
    say(error);
    pause = Math.min(lastPause, pause * 2 || firstPause);
    clearTimeout(pauseTimer);
    pauseTimer = setTimeout(() => { pauseTimer = 0; flush(); }, pause);
  } else {
    outbox.setReason(cid, error);
    const entry = outbox.all().find(e => e.cid === cid);
    if (entry) onRefused(entry); // or another tab has discarded it
  }
  landed(cid);
}

// onRefused gets the entry that the server does not want.
export function startOutbox(onRefused) {
  for (const type of ["message", "edit", "delete", "react"]) on(type, acknowledge);
  on("error", f => refuse(f, onRefused));
  on("live", flush);
  on("lost", () => {
    clearTimeout(inFlight?.timer);
    inFlight = null;
  });
}
