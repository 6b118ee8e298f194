// The client of a chatd page. The server sends every page complete: without this script one can read and send. With it
// a room is live, what was typed is kept until it is on the server's disk, and a lost connection says so and comes back.

const client = JSON.parse(document.body.dataset.client || "null"); // null on pages that are not a room
const lang = document.documentElement.lang;

const maxRows = 300; // kept in the page while the reader is at the end
const maxOutbox = 200;
const maxMissed = 2000; // with more to catch up on, the newest page is quicker
const nearEnd = 100, nearStart = 300; // pixels
const groupSpan = 5 * 60e3; // rows of one author closer than this share a name
const ackWait = 8e3, welcomeWait = 10e3;
const firstRetry = 500, lastRetry = 30e3;
const firstPause = 1e3, lastPause = 15e3; // after the server said "later"
const grace = 2e3, noticeTime = 3e3; // no bar before, no notice after
const stale = 60e3, sleepGap = 30e3; // a socket that heard nothing for so long is not trusted
const readDelay = 1e3, draftDelay = 300;

// ---- words and times ----

const t = (key, ...args) => (client.words[key] ?? key).replace(/\{(\d)\}/g, (_, i) => args[i]);

const clockFormat = new Intl.DateTimeFormat(lang, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const fullFormat = new Intl.DateTimeFormat(lang, { dateStyle: "full", timeStyle: "long" });
const dayFormat = new Intl.DateTimeFormat(lang, { year: "numeric", month: "long", day: "numeric", weekday: "long" });
const relative = new Intl.RelativeTimeFormat(lang, { numeric: "auto", style: "narrow" });

function dayName(date) {
  const midnight = d => new Date(d.getFullYear(), d.getMonth(), d.getDate());
  const days = Math.round((midnight(date) - midnight(new Date())) / 864e5); // rounded: a day may have 23 or 25 hours
  return days === 0 || days === -1 ? relative.format(days, "day") : dayFormat.format(date);
}

function ago(date) {
  const minutes = Math.min(0, Math.round((date - Date.now()) / 60e3));
  if (minutes === 0) return relative.format(0, "second");
  if (minutes > -60) return relative.format(minutes, "minute");
  return minutes > -1440 ? relative.format(Math.round(minutes / 60), "hour") : relative.format(Math.round(minutes / 1440), "day");
}

function showTime(time, format) {
  const date = new Date(time.dateTime);
  setText(time, format(date));
  time.title = fullFormat.format(date);
}

// What is said in relation to now: the times of rooms, and "Today" after midnight.
function refreshTimes() {
  for (const time of document.querySelectorAll("#rooms time")) showTime(time, ago);
  for (const time of document.querySelectorAll(".day time")) showTime(time, dayName);
}

// ---- the page ----

const byId = id => document.getElementById(id);
const list = byId("messages"), text = byId("text"), newer = byId("newer");
const narrow = matchMedia("(max-width: 899.98px)"), coarse = matchMedia("(pointer: coarse)");
const isVisible = () => document.visibilityState === "visible";

function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

function makeButton(label, action) {
  const button = make("button", "", label);
  button.type = "button";
  button.addEventListener("click", () => action(button));
  return button;
}

// A live region speaks when its text is set, even to the same words.
function setText(node, words) { if (node.textContent !== words) node.textContent = words; }

// The server colours names by the same sum.
const hue = name => new TextEncoder().encode(name).reduce((h, byte) => (h * 31 + byte) % 4294967296, 0) % 12;

function makeAvatar(name) {
  const avatar = make("span", `avatar hue-${hue(name)}`, [...name][0]);
  avatar.setAttribute("aria-hidden", "true");
  return avatar;
}

// localStorage, or this page's memory for what it will not take: it may be full or switched off.
const shelf = {
  spare: new Map(),
  key: (...parts) => ["chatd", client.base, client.username, ...parts].join("/"),
  get(key) {
    try { return this.spare.get(key) ?? localStorage.getItem(key) ?? ""; } catch { return ""; }
  },
  set(key, value) {
    this.spare.delete(key);
    try { localStorage.setItem(key, value); } catch { this.spare.set(key, value); }
  },
};

// ---- outbox ----

// What was sent and is not known to be on the server's disk: {cid, room, message, time, reason?}, oldest first. All tabs
// of one user share it, so it is read anew each time; two tabs may send the same cid, and the server keeps one row.
const outbox = {
  all() { return JSON.parse(shelf.get(shelf.key("outbox")) || "[]"); },
  save(entries) { shelf.set(shelf.key("outbox"), JSON.stringify(entries)); },
  add(entry) { this.save([...this.all(), entry]); },
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

function flush() {
  const next = outbox.waiting()[0];
  if (!net.live || inFlight || pauseTimer || !next) return;
  inFlight = { cid: next.cid, again: false, timer: 0 };
  transmit(next);
}

function transmit(entry) {
  const { cid, room, message } = entry;
  post({ type: "message", room, cid, message });
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

function acknowledge(cid) {
  outbox.remove(cid);
  if (pause) say("");
  pause = 0;
  landed(cid);
}

// "Later" keeps the message pending; any other refusal is for its author to decide.
function refuse({ code, cid, error }) {
  if (["too_fast", "busy", "storage"].includes(code)) {
    say(error);
    pause = Math.min(lastPause, pause * 2 || firstPause);
    clearTimeout(pauseTimer);
    pauseTimer = setTimeout(() => { pauseTimer = 0; flush(); }, pause);
  } else {
    outbox.setReason(cid, error);
    if (pending.has(cid)) fail(pending.get(cid), error);
  }
  landed(cid);
}

// ---- rows ----

const rows = new Map(); // id → li
const pending = new Map(); // cid → li, refused ones too; they stand after all rows with an id
let older = client?.older, loading = false;
let stuck = true; // the reader was at the end when last seen to scroll
let shownHeight = 0, unseen = 0;

const atEnd = () => list.scrollHeight - list.scrollTop - list.clientHeight <= nearEnd;
const staying = () => net.live ? atEnd() : stuck; // measuring for each row of a replay would be slow
const isOwn = m => m.username === client.username && !m.guest === !client.guest;
const timeOf = li => new Date(li.querySelector("time").dateTime);
const rank = li => Number(li.dataset.id ?? Infinity);

function toEnd() {
  list.scrollTop = list.scrollHeight;
  stuck = true;
  if (client.newest) showUnseen(0);
}

function showUnseen(n) {
  unseen = n;
  if (client.newest) newer.hidden = n === 0;
  if (n) setText(newer, t("newer", n));
}

function buildRow(m) {
  const author = make("span", "author", m.username), time = make("time"), body = make("div", "body");
  author.dir = body.dir = "auto";
  time.dateTime = m.time;
  showTime(time, clockFormat.format);
  const tag = m.guest ? "guest" : m.bot ? "bot" : m.pushed ? "pushed" : "";
  const head = make("div", "head", author, " ", ...tag ? [make("span", "tag", t(tag)), " "] : [], time);
  const li = make("li", isOwn(m) ? "own" : "", makeAvatar(m.username), head, body, make("span", "mark"));
  li.dataset.author = m.username;
  li.dataset.tag = tag;
  if (m.id) li.dataset.id = m.id;
  if (m.deleted) showDeleted(li);
  else showText(li, m.message, m.edited);
  return li;
}

function showText(li, message, edited) {
  li.querySelector(".body").textContent = message;
  li.querySelector(".mark").textContent = edited ? t("edited") : "";
}

function showDeleted(li) {
  showText(li, t("deleted"), false);
  li.classList.add("deleted");
}

function neighbour(li, side) {
  do li = li[side]; while (li && !li.dataset.author);
  return li;
}

// Sets what depends on the row above: the line of the day, and whether name and avatar are repeated.
function arrange(li) {
  if (!li) return;
  const above = neighbour(li, "previousElementSibling"), time = timeOf(li);
  const newDay = !above || timeOf(above).toDateString() !== time.toDateString();
  if (li.previousElementSibling?.matches(".day")) li.previousElementSibling.remove();
  if (newDay) li.before(dayLine(time));
  li.classList.toggle("follows", !newDay && !li.matches(".failed") && above.dataset.author === li.dataset.author && above.dataset.tag === li.dataset.tag &&
    time - timeOf(above) <= groupSpan);
}

function dayLine(date) {
  const time = make("time");
  time.dateTime = date.toISOString();
  showTime(time, dayName);
  return make("li", "day", time);
}

// Puts a row where its id belongs. One that is there already is not moved: it would be read aloud again.
function place(li) {
  let next = null;
  list.querySelector(".empty")?.remove();
  for (let row = list.lastElementChild; row; row = row.previousElementSibling) {
    if (row === li || !row.dataset.author) continue;
    if (rank(row) <= rank(li)) break;
    next = row;
  }
  if (!li.isConnected || neighbour(li, "nextElementSibling") !== next) {
    takeOut(li);
    list.insertBefore(li, next);
  }
  arrange(li);
  arrange(next);
}

function takeOut(li) {
  const next = neighbour(li, "nextElementSibling");
  if (li.previousElementSibling?.matches(".day")) li.previousElementSibling.remove();
  li.remove();
  arrange(next);
}

function showPending({ cid, message, time, reason }) {
  const { username, guest } = client;
  const li = buildRow({ username, guest, message, time: new Date(time).toISOString() });
  li.dataset.cid = cid;
  pending.set(cid, li);
  if (reason) fail(li, reason);
  else setState(li, "pending", t("sending"));
  place(li);
}

function setState(li, state, words) {
  li.classList.remove("pending", "failed", "sent");
  if (state) li.classList.add(state);
  li.querySelector(".state, .refused")?.remove();
  if (words) li.append(make("span", "state", make("span", "unseen", words)));
}

function fail(li, reason) {
  const { cid } = li.dataset, why = make("p", "", reason), end = staying();
  why.setAttribute("role", "alert");
  setState(li, "failed");
  li.append(make("div", "refused", why,
    makeButton(t("retry"), () => { outbox.setReason(cid); setState(li, "pending", t("sending")); place(li); flush(); }),
    makeButton(t("copy"), button => copy(li.querySelector(".body").textContent, button)),
    makeButton(t("discard"), () => { outbox.remove(cid); dropPending(cid); text.focus(); })));
  if (li.isConnected) arrange(li);
  if (end) toEnd();
}

function dropPending(cid) {
  if (pending.has(cid)) takeOut(pending.get(cid));
  pending.delete(cid);
}

function settle(li, m) {
  pending.delete(m.cid);
  li.removeAttribute("data-cid");
  li.dataset.id = m.id;
  li.querySelector("time").dateTime = m.time;
  showTime(li.querySelector("time"), clockFormat.format);
  showText(li, m.message, m.edited);
  setState(li, "sent", t("sent"));
  setTimeout(setState, 2000, li);
  return li;
}

async function copy(words, button) {
  try { await navigator.clipboard.writeText(words); } catch { // absent on plain http, where small servers live
    const area = make("textarea", "unseen", words);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  setText(button, t("copied"));
}

function showMessage(m) {
  if (rows.has(m.id)) return dropPending(m.cid);
  if (!client.newest) return showUnseen(unseen + 1);
  const own = isOwn(m), sent = own && pending.get(m.cid), end = staying();
  const li = sent ? settle(sent, m) : buildRow(m);
  rows.set(m.id, li);
  place(li);
  if (end) trim();
  else if (!own) showUnseen(unseen + 1);
  if (end && net.live) toEnd();
}

function change(id, how) {
  const end = staying();
  if (rows.has(id)) how(rows.get(id));
  if (end) toEnd();
}

function trim() {
  while (rows.size > maxRows) {
    const first = list.querySelector("li[data-id]");
    rows.delete(rank(first));
    takeOut(first);
    setOlder(rank(list.querySelector("li[data-id]")));
  }
}

function setOlder(id) {
  older = id;
  list.querySelector(".older").hidden = !id;
  list.querySelector(".older a").href = `?before=${id}`;
}

async function loadOlder() {
  if (loading || !older) return;
  loading = true;
  const link = list.querySelector(".older a");
  link.textContent = t("older_loading");
  list.setAttribute("aria-live", "off"); // a page of rows is not read aloud
  try {
    const answer = await fetch(`${location.pathname}?before=${older}`, { headers: { Accept: "application/json" } });
    prepend(await answer.json());
    link.textContent = t("older");
    loading = false;
  } catch {
    link.textContent = t("older_failed"); // scrolling does not try again, a click does
  }
  speakAgain();
}

function prepend(page) {
  const first = list.querySelector("li[data-author]"), height = list.scrollHeight;
  const fresh = page.messages.filter(m => !rows.has(m.id)).map(buildRow);
  for (const li of fresh) rows.set(rank(li), li);
  list.querySelector(".older").after(...fresh);
  fresh.forEach(arrange);
  arrange(first);
  setOlder(page.older);
  list.scrollTop += list.scrollHeight - height;
}

const speakAgain = () => setTimeout(() => list.setAttribute("aria-live", "polite"), 500);

function adoptRows() {
  for (const line of list.querySelectorAll(".day")) line.remove(); // the server drew them in its own time zone
  for (const li of list.querySelectorAll("li[data-id]")) {
    rows.set(rank(li), li);
    showTime(li.querySelector("time"), clockFormat.format);
    arrange(li);
  }
  if (client.newest) outbox.all().filter(e => e.room === client.room).forEach(showPending);
}

// The composer grew, or a keyboard came up.
function onResize() {
  shownHeight = list.clientHeight;
  if (stuck) toEnd();
}

function onScroll() {
  if (list.clientHeight !== shownHeight) return; // resized, and not yet back at the end
  stuck = atEnd();
  if (stuck && client.newest) showUnseen(0);
  if (list.scrollTop < nearStart) loadOlder();
  considerRead();
}

// ---- rooms and unread ----

const rooms = new Map(); // name → {li, unread, newest}
const pageTitle = document.title;
let lastRead = 0, readTimer = 0;

// Direct messages are called after the other one.
const shownRoom = name => name.includes("+") ? `@${name.split("+").find(who => who !== client.username)}` : name;

function roomNamed(name) {
  if (!rooms.has(name)) {
    const badge = make("span", "badge", make("b"), make("span", "unseen", t("unread")));
    const link = make("a", "", make("span", "name", shownRoom(name)), badge);
    link.href = `${client.base}/chat/${encodeURIComponent(name)}/`;
    link.firstChild.dir = "auto";
    badge.hidden = true;
    const li = make("li", "", link);
    byId("rooms").append(li);
    rooms.set(name, { li, unread: 0, newest: 0 });
  }
  return rooms.get(name);
}

// A room is new, or its name or topic is.
function onRoom({ room, former, topic = "" }) {
  const here = (former ?? room) === client.room;
  if (former && here) return location.replace(`${client.base}/chat/${encodeURIComponent(room)}/`);
  if (former) dropRoom(former);
  roomNamed(room);
  if (here) setText(document.querySelector(".topic"), topic);
}

function dropRoom(name) {
  if (name === client.room) return location.assign(`${client.base}/chat/`);
  rooms.get(name)?.li.remove();
  rooms.delete(name);
}

function touchRoom({ li }, when) {
  const time = li.querySelector("time") ?? make("time");
  time.dateTime = when;
  showTime(time, ago);
  li.querySelector(".badge").before(time);
}

function paintUnread() {
  let here = 0, elsewhere = 0;
  for (const [name, { li, unread }] of rooms) {
    const shown = name === client.room && isReading() ? 0 : unread; // about to be read: a number would only flash
    if (name === client.room) here = shown;
    else elsewhere += shown;
    li.querySelector(".badge").hidden = !shown;
    setText(li.querySelector(".badge b"), shown > 99 ? "99+" : `${shown}`);
  }
  document.title = here ? `(${here > 99 ? "99+" : here}) ${pageTitle}` : elsewhere ? `• ${pageTitle}` : pageTitle;
  byId("drawer").setAttribute("aria-label", elsewhere ? t("rooms_unread", elsewhere) : t("rooms"));
}

const isReading = () => client.newest && isVisible() && document.hasFocus() && stuck;

function considerRead() {
  clearTimeout(readTimer);
  if (isReading()) readTimer = setTimeout(() => isReading() && markRead(), readDelay);
  paintUnread();
}

function markRead() {
  const room = roomNamed(client.room), id = Math.max(0, ...rows.keys());
  if (!net.live || (id <= lastRead && !room.unread)) return;
  lastRead = Math.max(lastRead, id);
  room.unread = 0;
  post({ type: "read", room: client.room, id: lastRead });
  paintUnread();
}

// The marker moved in another session of this user. How much is unread after it is known only of the room on screen.
function onRead(f) {
  const room = roomNamed(f.room), here = f.room === client.room;
  if (f.id >= room.newest) room.unread = 0;
  else if (here) room.unread = [...rows].filter(([id, li]) => id > f.id && !li.matches(".own")).length;
  if (here) lastRead = Math.max(lastRead, f.id);
  paintUnread();
}

// ---- people ----

const people = new Map(); // name → li, shown in the order of the reader's language
const inOrder = new Intl.Collator(lang).compare;

function join(name) {
  if (people.has(name)) return;
  const li = make("li", "", makeAvatar(name), " ", make("bdi", "", name));
  li.dataset.name = name;
  people.set(name, li);
  byId("people").insertBefore(li, [...byId("people").children].find(o => inOrder(o.dataset.name, name) > 0) ?? null);
}

function onPresence({ all, online = all ?? [], offline = [] }) {
  const here = all && new Set([...all, client.username]); // the server announces people with a delay
  for (const name of here ? [...people.keys()].filter(name => !here.has(name)) : offline) {
    people.get(name)?.remove();
    people.delete(name);
  }
  online.forEach(join);
  setText(byId("people-count"), `${people.size}`);
}

// ---- connection ----

const net = {
  socket: null, opened: false, live: false, // live: welcomed and caught up
  byHand: false, plugged: false, ended: false, // closed and opened with the button; signed out
  tries: 0, timer: 0, retryAt: 0,
  downSince: Date.now(), contact: 0, wasLive: false,
  welcomeId: 0, missed: 0, notice: "", noticeTill: 0,
};
let cursor = client?.cursor; // everything up to this id has been taken in

const post = frame => net.socket.send(JSON.stringify(frame));

function connect() {
  clearTimeout(net.timer);
  if (net.socket) return;
  const socket = new WebSocket(`${location.protocol.replace("http", "ws")}//${location.host}${client.base}/ws`, "chatd.v1");
  const ifCurrent = handle => event => { if (socket === net.socket) handle(event); };
  Object.assign(net, { socket, opened: false, byHand: false, missed: 0, timer: setTimeout(lose, welcomeWait) });
  socket.onopen = ifCurrent(() => { net.opened = true; post({ type: "hello", since: cursor, most: maxMissed }); });
  socket.onmessage = ifCurrent(event => onFrame(JSON.parse(event.data)));
  socket.onclose = ifCurrent(event => lose(event.code));
  setConnection("connecting");
}

// Gives the socket up without waiting for its closing handshake, which a dead network would hold for long.
function lose(code) {
  const { socket } = net;
  clearTimeout(net.timer);
  clearTimeout(inFlight?.timer);
  inFlight = null;
  Object.assign(net, { socket: null, live: false, downSince: net.downSince || Date.now() });
  socket?.close();
  if (!net.byHand) {
    retryLater();
    if (code === 1008 || !net.opened) checkSession();
  }
  setConnection("offline");
}

function retryLater() {
  const delay = Math.min(lastRetry, firstRetry * 2 ** net.tries++) * (0.7 + 0.6 * Math.random());
  net.retryAt = Date.now() + delay;
  net.timer = setTimeout(connect, delay);
}

// A refused socket does not say why. A page that sends one to the login does.
async function checkSession() {
  try {
    const answer = await fetch(`${client.base}/chat/`, { redirect: "manual", cache: "no-store" });
    net.ended = !net.live && (answer.type === "opaqueredirect" || answer.status === 401 || answer.status === 403);
  } catch { return; } // no network, so nothing learned
  if (net.ended) clearTimeout(net.timer);
  paintStatus();
}

function wake(distrust) {
  if (net.byHand) return;
  if (net.live && (distrust || Date.now() - net.contact > stale)) lose();
  connect();
}

function onFrame(f) {
  net.contact = Date.now();
  switch (f.type) {
    case "welcome": return onWelcome(f);
    case "read": return onRead(f);
    case "presence": return onPresence(f);
    case "room": return onRoom(f);
    case "join": return void (f.username === client.username && roomNamed(f.room));
    case "leave": return void (f.username === client.username && dropRoom(f.room));
    case "behind": return location.reload();
    case "error": return f.cid ? refuse(f) : say(f.error);
    case "message": onMessage(f); break;
    case "edit": if (!f.deleted) change(f.target, li => showText(li, f.message, true)); break;
    case "delete": change(f.target, showDeleted); break;
    case "caught_up": onCaughtUp(); break;
    case "react": break;
    default: return;
  }
  cursor = Math.max(cursor, f.id ?? 0);
}

function onWelcome(f) {
  // Another database or another user: what the page shows is not theirs. A page that was just reloaded is.
  const reloaded = !net.wasLive && performance.getEntriesByType("navigation")[0]?.type === "reload";
  if ((f.id < cursor || f.username !== client.username) && !reloaded) return location.reload();
  cursor = Math.min(cursor, f.id);
  Object.assign(net, { tries: 0, ended: false, welcomeId: f.id });
  list.setAttribute("aria-live", "off");
  for (const r of f.rooms) roomNamed(r.room).unread = r.unread;
  lastRead = f.rooms.find(r => r.room === client.room)?.last_read_id ?? lastRead;
}

function onMessage(f) {
  const own = isOwn(f), room = roomNamed(f.room);
  if (own && f.cid) acknowledge(f.cid);
  if (f.id > room.newest) touchRoom(room, f.time);
  room.newest = Math.max(room.newest, f.id);
  if (!own && f.id > net.welcomeId) room.unread++; // the welcome counted the others
  if (!own && !net.live) net.missed++;
  if (f.room === client.room) showMessage(f);
  if (net.live) considerRead();
}

function onCaughtUp() {
  const { wasLive, plugged, missed } = net, longDown = Date.now() - net.downSince > grace;
  clearTimeout(net.timer);
  if (plugged) notify(t("connected"));
  else if (wasLive && longDown) notify(missed === 1 ? t("back_missed_one") : missed ? t("back_missed", missed) : t("back"));
  Object.assign(net, { live: true, wasLive: true, plugged: false, downSince: 0 });
  if (stuck) toEnd();
  speakAgain();
  setConnection("online");
  flush();
  considerRead();
}

function notify(words) {
  Object.assign(net, { notice: words, noticeTill: Date.now() + noticeTime });
  setTimeout(paintStatus, noticeTime);
}

function plug() {
  const { byHand } = net;
  Object.assign(net, { plugged: byHand, byHand: !byHand });
  if (byHand) connect();
  else lose();
}

function setConnection(state) {
  document.body.dataset.state = state;
  byId("plug").textContent = net.byHand ? t("connect") : t("disconnect");
  paintStatus();
}

// The bar is built once and changed in place, so that a screen reader hears what changes, and not the seconds.
const bar = { box: byId("status"), words: make("span"), countdown: make("span"), waiting: make("span") };

function buildBar() {
  bar.retry = makeButton(t("retry_now"), () => { net.tries = 0; connect(); });
  bar.login = make("a", "", t("sign_in"));
  bar.login.href = `${client.base}/login/?next=${encodeURIComponent(location.pathname)}`;
  bar.countdown.setAttribute("aria-live", "off");
  bar.box.append(bar.words, bar.countdown, bar.retry, bar.login, bar.waiting);
}

function paintStatus() {
  const now = Date.now(), { byHand, ended, wasLive } = net;
  const down = byHand || ended || (net.downSince && now - net.downSince >= grace), noticed = !down && now < net.noticeTill;
  const retrying = down && !byHand && !ended, seconds = Math.ceil((net.retryAt - now) / 1000);
  const waiting = down ? outbox.waiting().length : 0;
  bar.box.hidden = !down && !noticed;
  bar.box.classList.toggle("good", noticed);
  setText(bar.words, noticed ? net.notice : !down ? "" : byHand ? t("disconnected") : ended ? t("signed_out") :
    wasLive ? t("lost", clockFormat.format(net.contact)) : t("connecting"));
  setText(bar.countdown, retrying && seconds > 0 ? t("retry_in", seconds) : retrying && wasLive ? t("retrying") : "");
  bar.retry.hidden = !retrying || seconds <= 0;
  bar.login.hidden = byHand || !ended;
  setText(bar.waiting, waiting === 1 ? t("waiting_one") : waiting ? t("waiting", waiting) : "");
}

// ---- composer ----

let composing = false; // an input method is at work, or was until this very key
let draftTimer = 0;

const say = words => setText(byId("refusal"), words);

function onKey(e) {
  if (e.isComposing || e.keyCode === 229 || composing) return;
  if (e.key !== "Enter" || e.shiftKey || e.altKey) return;
  if (coarse.matches && !e.ctrlKey && !e.metaKey) return;
  e.preventDefault();
  send();
}

function send() {
  const message = text.value.replace(/^\s*\n|\s+$/g, ""), { room } = client;
  if (!message || !countBytes(message)) return;
  if (outbox.all().length >= maxOutbox) return say(t("outbox_full"));
  const entry = { cid: newCid(), room, message, time: Date.now() };
  outbox.add(entry);
  text.value = "";
  say("");
  onInput();
  saveDraft();
  if (!client.newest) return location.assign(location.pathname); // the newest page shows it and sends it
  showPending(entry);
  toEnd();
  flush();
  paintStatus();
}

// Reports whether the server would take it.
function countBytes(message) {
  const bytes = new TextEncoder().encode(message).length, counter = byId("bytes"), over = bytes > client.limit;
  counter.hidden = bytes < client.limit * 0.9;
  counter.classList.toggle("over", over);
  counter.setAttribute("role", over ? "alert" : "note");
  if (!counter.hidden) setText(counter, over ? t("too_long", bytes, client.limit) : t("bytes", bytes, client.limit));
  return !over;
}

function onInput() {
  const { scrollTop } = list;
  text.style.height = "auto"; // or it would never shrink
  text.style.height = `${text.scrollHeight + text.offsetHeight - text.clientHeight}px`;
  list.scrollTop = scrollTop; // the log was higher for a moment, which moves a reader who is near its end
  countBytes(text.value);
  clearTimeout(draftTimer);
  draftTimer = setTimeout(saveDraft, draftDelay);
}

function saveDraft() {
  clearTimeout(draftTimer);
  shelf.set(shelf.key("draft", client.room), text.value);
}

function startComposer() {
  text.value ||= shelf.get(shelf.key("draft", client.room)); // what the server refused comes before a draft
  text.addEventListener("keydown", onKey);
  text.addEventListener("input", onInput);
  text.addEventListener("compositionstart", () => { composing = true; });
  // Safari ends the composition before it reports the Enter that ended it.
  text.addEventListener("compositionend", () => setTimeout(() => { composing = false; }));
  byId("composer").addEventListener("submit", e => { e.preventDefault(); send(); });
  addEventListener("pagehide", saveDraft);
  onInput();
  if (!coarse.matches) text.focus();
}

// ---- menus ----

let drawerPushed = false; // opened by a click on this page: going back closes it

const closeDrawer = () => drawerPushed ? history.back() : location.replace("#main");

function onHash() {
  const open = location.hash === "#side" && narrow.matches, was = byId("main").inert;
  byId("main").inert = open;
  byId("drawer").setAttribute("aria-expanded", open);
  if (open) byId("side").querySelector("a").focus();
  else if (was) byId("drawer").focus();
  drawerPushed &&= open;
}

function startDrawer() {
  byId("drawer").addEventListener("click", () => { drawerPushed = true; });
  byId("side").addEventListener("click", e => {
    const link = e.target.closest("#rooms a");
    if (!link || location.hash !== "#side" || e.ctrlKey || e.metaKey || e.shiftKey) return;
    e.preventDefault();
    location.replace(link.href); // or going back would find the drawer open
  });
  for (const link of document.querySelectorAll(".close, .veil")) {
    link.addEventListener("click", e => { e.preventDefault(); closeDrawer(); });
  }
  addEventListener("hashchange", onHash);
  onHash();
}

function startSide() {
  const button = byId("people-switch"), key = shelf.key("people");
  const hide = hidden => {
    document.body.classList.toggle("alone", hidden);
    button.setAttribute("aria-expanded", !hidden);
    shelf.set(key, hidden ? "hidden" : "");
  };
  button.hidden = byId("plug").hidden = false;
  button.addEventListener("click", () => hide(!document.body.classList.contains("alone")));
  byId("plug").addEventListener("click", plug);
  hide(shelf.get(key) === "hidden");
  for (const li of byId("rooms").children) rooms.set(li.dataset.room, { li, unread: Number(li.dataset.unread), newest: 0 });
  for (const li of byId("people").children) people.set(li.dataset.name, li);
}

function onEscape() {
  const menu = document.querySelector(".menu[open]");
  if (menu) {
    menu.open = false;
    menu.firstElementChild.focus();
  } else if (client && location.hash === "#side") closeDrawer();
  else if (client?.newest) markRead();
}

function startMenus() {
  document.addEventListener("keydown", e => { if (e.key === "Escape" && !e.isComposing && !composing) onEscape(); });
  document.addEventListener("click", e => {
    const menu = document.querySelector(".menu[open]");
    if (menu && !menu.contains(e.target)) menu.open = false;
  });
}

// ---- start ----

let lastTick = Date.now();

// The one timer: the countdown, the relative times each minute, and whether the machine slept.
function tick() {
  const now = Date.now(), slept = now - lastTick > sleepGap;
  if (Math.floor(now / 60e3) !== Math.floor(lastTick / 60e3)) refreshTimes();
  lastTick = now;
  if (client && slept && isVisible()) wake(true); // the timers of a hidden page are slow by themselves
  if (client && net.downSince) paintStatus();
}

function onVisible() {
  if (!isVisible()) return;
  lastTick = Date.now();
  wake(false);
  considerRead();
}

// Another tab had a message acknowledged, which comes here as a row of its own, or discarded it.
function onStorage(e) {
  if (e.key !== shelf.key("outbox")) return;
  const kept = new Set(outbox.all().map(entry => entry.cid));
  for (const cid of pending.keys()) if (!kept.has(cid)) dropPending(cid);
}

function startRoom() {
  startSide();
  startDrawer();
  startComposer();
  adoptRows();
  buildBar();
  const meant = /^#m\d+$/.test(location.hash) && byId(location.hash.slice(1));
  if (meant) meant.scrollIntoView({ block: "center" });
  else toEnd();
  list.addEventListener("scroll", onScroll, { passive: true });
  list.querySelector(".older a").addEventListener("click", e => { e.preventDefault(); loading = false; loadOlder(); });
  if (client.newest) newer.addEventListener("click", () => { trim(); toEnd(); text.focus(); });
  new ResizeObserver(onResize).observe(list);
  addEventListener("online", () => wake(true));
  addEventListener("offline", () => { if (net.socket) lose(); });
  addEventListener("pageshow", e => { if (e.persisted) wake(true); });
  addEventListener("focus", considerRead);
  addEventListener("storage", onStorage);
  document.addEventListener("visibilitychange", onVisible);
  connect();
}

startMenus();
if (client) startRoom();
refreshTimes();
setInterval(tick, 1000);
