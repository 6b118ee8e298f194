// The client of a chatd page. The server sends every page complete: without this script one can read and send. With it
// a room is live, what was typed is kept until it is on the server's disk, and a lost connection says so and comes back.

import { client, refreshTimes } from "./page.js";
import { startNet, tick } from "./net.js";
import { outbox, startOutbox } from "./outbox.js";
import { fail, startLog } from "./log.js";
import { paintUnread, startRooms } from "./rooms.js";
import { hear, showTotals, startNotify } from "./notify.js";
import { startComposer } from "./composer.js";
import { startActions } from "./actions.js";
import { startMenus } from "./menus.js";

startMenus();
if (client) {
  startRooms(hear, showTotals);
  startOutbox(fail);
  startLog(paintUnread);
  startNotify();
  if (!client.archived) startComposer();
  startActions();
  startNet(() => outbox.waiting().length);
}

refreshTimes();
let minute = 0;
setInterval(() => { // the one timer
  const now = Math.floor(Date.now() / 60e3);
  if (now !== minute) refreshTimes();
  minute = now;
  if (client) tick();
}, 1000);
