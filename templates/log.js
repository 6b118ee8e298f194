// The log of a room: rows in the order of their ids, pages of older and newer ones, where the reader is, and how far
// it is read. At most maxRows are in the page; what scrolls away at one end can be loaded again.

import { byId, client, coarse, copy, count, dayName, getJSON, isVisible, make, roomURL, setText, showTime, t } from "./page.js";
import { net, on, post } from "./net.js";
import { flush, outbox } from "./outbox.js";
import * as row from "./rows.js";

const maxRows = 300;
const nearEnd = 100, nearEdge = 300; // pixels
const groupSpan = 5 * 60e3; // rows of one author closer than this share a name
const readDelay = 1e3;

export const list = byId("messages");
const rows = new Map(); // id → li
const pending = new Map(); // cid → li, refused ones too; they stand after all rows with an id
let older = client?.older, newer = client?.newer; // before= and after= of the next pages, 0: there are none
let stuck = true; // the reader was at the end when last seen to scroll
let shownHeight = 0, unseen = 0;
let divider = null; // the row with the line above what is new
let lastRead = client?.lastRead, readTimer = 0;
let held = false; // marked unread, which what comes later does not undo

export const rowOf = id => rows.get(Number(id));
export const lastOwn = () => [...list.querySelectorAll("li.own[data-id]:not(.deleted)")].at(-1);
export const isReading = () => !newer && isVisible() && document.hasFocus() && stuck && !held;

// ---- what comes over the socket ----

let queue = [], painting = false;
let journal = null; // of what came while a page is on its way: that may be older

const showers = {
  message: showMessage,
  edit(f) { if (!f.deleted) change(f, li => row.showText(li, f.message, true), f.message); },
  delete(f) { change(f, row.showDeleted, t("deleted")); },
  react(f) { change(f, li => row.showReaction(li, f)); },
};

// Rows are changed once for each picture of the screen, however much comes in between.
function enqueue(f) {
  if (f.room !== client.room) return;
  queue.push(f);
  journal?.push(f);
  if (painting) return;
  painting = true;
  if (isVisible()) requestAnimationFrame(paint);
  else setTimeout(paint, 200); // nobody sees it, and there are no pictures
}

function paint() {
  const batch = queue;
  queue = [];
  painting = false;
  if (batch.length) show(batch);
}

function show(batch) {
  const end = staying(), before = unseen;
  const skipped = end && batch.length > 2 * maxRows ? batch.length - maxRows : 0; // would be built only to be taken out
  if (skipped) clear();
  keepPlace(end, () => {
    for (const [i, f] of batch.entries()) if (i >= skipped || pending.has(f.cid)) showers[f.type](f, end);
    if (end) trimStart(skipped > 0);
  });
  if (unseen !== before) showUnseen(unseen);
  considerRead();
}

function showMessage(m, end) {
  const own = row.isOwn(m), sent = own && pending.get(m.cid);
  if (rows.has(m.id)) return own && dropPending(m.cid);
  if (newer || !end && rows.size >= maxRows) { // a gap follows what is shown
    newer ||= Math.max(0, ...rows.keys());
    unseen++;
    return own && dropPending(m.cid);
  }
  if (sent) {
    pending.delete(m.cid);
    row.settle(sent, m);
  }
  const li = sent || row.buildRow(m);
  rows.set(m.id, li);
  place(li);
  if (own) return;
  if (!end) unseen++;
  if (!isReading() && (!divider || lastRead >= row.rank(divider))) setDivider(li);
}

function change({ target, cid, username }, how, text) {
  const li = rows.get(target);
  if (text !== undefined) row.requote(list, target, text);
  if (!li) return;
  how(li);
  if (li.dataset.cid !== cid) return;
  li.removeAttribute("data-cid");
  if (username === client.username) row.confirm(li);
}

// ---- order ----

function neighbour(li, side) {
  do li = li[side]; while (li && !li.dataset.author);
  return li;
}

// Sets what depends on the row above: the line of the day, and whether name and avatar are repeated.
function arrange(li) {
  if (!li) return;
  const above = neighbour(li, "previousElementSibling"), time = row.timeOf(li);
  const newDay = !above || row.timeOf(above).toDateString() !== time.toDateString();
  if (li.previousElementSibling?.matches(".day")) li.previousElementSibling.remove();
  if (newDay) li.before(dayLine(time));
  li.classList.toggle("follows", !newDay && li !== divider && !li.matches(".failed") && above.dataset.author === li.dataset.author &&
    above.dataset.tag === li.dataset.tag && !li.querySelector(".quote") && time - row.timeOf(above) <= groupSpan);
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
  for (let other = list.lastElementChild; other; other = other.previousElementSibling) {
    if (other === li || !other.dataset.author) continue;
    if (row.rank(other) <= row.rank(li)) break;
    next = other;
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

function removeRow(li) {
  rows.delete(row.rank(li));
  takeOut(li);
}

function clear() {
  for (const li of rows.values()) li.remove();
  for (const day of list.querySelectorAll(".day")) day.remove();
  rows.clear();
  divider = null;
}

function trimStart(trimmed) {
  for (; rows.size > maxRows; trimmed = true) removeRow(list.querySelector("li[data-id]"));
  if (trimmed) setOlder(row.rank(list.querySelector("li[data-id]")));
}

// What was said before a time is gone, and so is what older pages had.
function expire(time) {
  const gone = [...rows.values()].filter(li => row.timeOf(li) < new Date(time));
  if (gone.length) keepPlace(staying(), () => { gone.forEach(removeRow); setOlder(0); });
}

// ---- the line above what is new ----

export function setDivider(li) {
  const former = divider;
  divider?.querySelector(".new")?.remove();
  divider = li;
  li?.prepend(make("span", "new", t("new")));
  arrange(former?.isConnected ? former : null);
  arrange(li);
}

// ---- what is on its way ----

export function showPending(entry) {
  if (entry.room !== client.room) return;
  if (entry.type !== "message") return showPendingChange(entry);
  if (newer || pending.has(entry.cid)) return;
  const li = row.buildRow({ ...entry, username: client.username, guest: client.guest, time: new Date(entry.time).toISOString() });
  li.dataset.cid = entry.cid;
  pending.set(entry.cid, li);
  if (entry.reason) fail(entry);
  else row.setPending(li);
  place(li);
}

function showPendingChange(entry) {
  const li = rowOf(entry.id);
  if (!li || entry.type === "react") return;
  li.dataset.cid = entry.cid;
  if (entry.type === "edit") row.showText(li, entry.message, true);
  if (entry.reason) fail(entry);
  else row.setPending(li);
}

// An entry of the outbox was refused.
export function fail(entry) {
  const { cid, id, reason, type, message, former } = entry, li = pending.get(cid) ?? rowOf(id);
  if (!li || type === "react") { // nothing to show it at, and little to lose
    if (type !== "message") outbox.remove(cid);
    return;
  }
  const end = staying();
  row.setFailed(li, reason, [
    [t("retry"), () => { outbox.setReason(cid); row.setPending(li); if (!id) place(li); flush(); }],
    ...message ? [[t("copy"), async button => { await copy(message); setText(button, t("copied")); }]] : [],
    [t("discard"), () => {
      outbox.remove(cid);
      byId("text")?.focus();
      if (!id) return dropPending(cid);
      row.setState(li);
      if (former !== undefined) row.showText(li, former.message, former.edited);
    }],
  ]);
  if (li.isConnected) arrange(li);
  if (end) toEnd();
}

function dropPending(cid) {
  if (pending.has(cid)) takeOut(pending.get(cid));
  pending.delete(cid);
}

// Another tab had a message acknowledged, which comes here as a row of its own, or refused, or discarded it.
function onStorage(e) {
  if (e.key !== outbox.key()) return;
  const kept = new Map(outbox.all().map(entry => [entry.cid, entry]));
  for (const [cid, li] of pending) {
    if (!kept.has(cid)) dropPending(cid);
    else if (kept.get(cid).reason && li.matches(".pending")) fail(kept.get(cid));
  }
}

// ---- pages ----

const silent = () => list.setAttribute("aria-live", "off"); // a page of rows is not read aloud
const speakAgain = () => setTimeout(() => list.setAttribute("aria-live", "polite"), 500);

let loading = false, stalled = false; // the last page did not come: scrolling does not try again

// Gets a page and has use put it in. What comes meanwhile is shown as always, and once more after it.
async function load(query, use) {
  loading = true;
  journal = [];
  silent();
  const page = await getJSON(roomURL(client.room, query)).catch(() => null);
  stalled = !page;
  if (page) {
    use(page);
    if (!newer) unseen = 0;
    const before = unseen;
    for (const f of journal) showers[f.type](f, false);
    showUnseen(newer ? before : unseen);
  }
  loading = false;
  journal = null;
  speakAgain();
  return !stalled;
}

function insert(messages) {
  const fresh = messages.filter(m => !rows.has(m.id)).map(row.buildRow);
  for (const li of fresh) rows.set(row.rank(li), li);
  for (const li of fresh) place(li);
}

async function loadOlder() {
  if (!older || loading) return;
  const link = list.querySelector(".older a");
  link.textContent = t("older_loading");
  const loaded = await load(`?before=${older}`, page => keepPlace(false, () => {
    insert(page.messages);
    setOlder(page.older);
    const all = [...list.querySelectorAll("li[data-id]")];
    for (const li of all.slice(maxRows)) removeRow(li);
    if (all.length > maxRows) newer = row.rank(all[maxRows - 1]);
    if (newer) for (const cid of [...pending.keys()]) dropPending(cid); // they are in the outbox
  }));
  link.textContent = loaded ? t("older") : t("older_failed");
}

async function loadNewer() {
  if (!newer || loading) return;
  await load(`?after=${newer}`, page => keepPlace(false, () => {
    insert(page.messages);
    newer = page.newer;
    trimStart();
    if (!newer) outbox.all().forEach(showPending);
  }));
}

// Leaves what is shown for the newest page.
export async function showNewest() {
  held = false;
  if (newer && (loading || !await load("", page => {
    clear();
    insert(page.messages);
    setOlder(page.older);
    newer = 0;
    outbox.all().forEach(showPending);
  }))) return location.assign(roomURL(client.room));
  toEnd();
}

function setOlder(id) {
  older = id;
  const line = list.querySelector(".older");
  line.hidden = !id;
  line.firstElementChild.href = `?before=${id}`;
}

// ---- where the reader is ----

const atEnd = () => list.scrollHeight - list.scrollTop - list.clientHeight <= nearEnd;
const staying = () => !newer && (net.live ? atEnd() : stuck);

export function toEnd() {
  list.scrollTop = list.scrollHeight;
  stuck = !newer;
  if (stuck) showUnseen(0);
}

// Changes the log so that who is at the end stays there, and others have before them what they had.
function keepPlace(end, how) {
  const first = end ? null : [...list.querySelectorAll("li[data-author]")].find(li => topOf(li) + li.clientHeight > 0);
  const text = first?.querySelector(".body"), was = text && topOf(text); // the row may lose its head to one above
  how();
  if (end) toEnd();
  else if (text?.isConnected) list.scrollTop += topOf(text) - was;
}

function showUnseen(n) {
  const button = byId("newer");
  unseen = n;
  button.hidden = !n && !newer;
  setText(button, n ? t("newer", n) : t("to_newest"));
}

// Shows a row in the upper third, marked until the next one is.
function jumpTo(li) {
  list.querySelector(".target")?.classList.remove("target");
  li.classList.add("target");
  toThird(li);
}

const topOf = li => li.getBoundingClientRect().top - list.getBoundingClientRect().top;

function toThird(li) {
  list.scrollTop += topOf(li) - list.clientHeight / 3;
  stuck = !newer && atEnd();
}

// A quoted message that is on this page, and the way back to where it was quoted.
function followQuote(e) {
  const quote = e.target.closest(".quote"), li = quote && rowOf(quote.dataset.target);
  if (!li) return;
  e.preventDefault();
  const from = quote.closest("li"), back = byId("back");
  jumpTo(li);
  back.hidden = false;
  back.onclick = () => { back.hidden = true; jumpTo(from); quote.focus({ preventScroll: true }); };
}

// The composer grew, or a keyboard came up.
function onResize() {
  shownHeight = list.clientHeight;
  if (stuck) list.scrollTop = list.scrollHeight;
}

function onScroll() {
  if (list.clientHeight !== shownHeight) return; // resized, and not yet back at the end
  stuck = !newer && atEnd();
  if (stuck) showUnseen(0);
  if (!stalled && list.scrollTop < nearEdge) loadOlder();
  if (!stalled && list.scrollHeight - list.scrollTop - list.clientHeight < nearEdge) loadNewer();
  considerRead();
}

// ---- how far it is read ----

function considerRead() {
  clearTimeout(readTimer);
  if (isReading()) readTimer = setTimeout(() => isReading() && markRead(), readDelay);
  onReading();
}

export function markRead() {
  const id = Math.max(0, ...rows.keys());
  if (newer || !net.live || id <= lastRead) return;
  held = false;
  lastRead = id;
  post({ type: "read", room: client.room, id });
}

// This message and what follows it count as unread again.
export function markUnread(li) {
  const above = neighbour(li, "previousElementSibling");
  held = true;
  considerRead();
  post({ type: "read", room: client.room, id: above ? row.rank(above) : row.rank(li) - 1, back: true });
  setDivider(li);
}

let onReading = () => {};

// ---- start ----

function adoptRows() {
  // The server's days are those of its own time zone, and newer pages come by scrolling.
  for (const line of list.querySelectorAll(".day, .newer-page")) line.remove();
  for (const li of list.querySelectorAll("li[data-id]")) {
    rows.set(row.rank(li), li);
    row.adoptRow(li);
    arrange(li);
  }
  if (!newer) outbox.all().forEach(showPending);
}

// Begins at what the link is about, or at the first unread message, or at the end.
function begin() {
  const meant = /^#m\d+$/.test(location.hash) && rowOf(location.hash.slice(2));
  const first = client.unread && [...rows.values()].find(li => row.rank(li) > lastRead && !li.matches(".own"));
  const after = new URLSearchParams(location.search).get("after") === `${lastRead}`; // all before is read
  const certain = first && (!older || after || neighbour(first, "previousElementSibling"));
  if (certain) setDivider(first);
  toEnd();
  if (meant) jumpTo(meant);
  else if (certain && topOf(first) < list.clientHeight / 3) toThird(first);
  byId("unread").hidden = !client.unread || certain || Boolean(newer);
  setText(byId("unread"), count("unread_count", client.unread > 99 ? "99+" : client.unread));
  showUnseen(0);
}

// onRead is called when it may have become true or false that the reader reads.
export function startLog(onRead) {
  onReading = onRead;
  adoptRows();
  begin();
  for (const type of Object.keys(showers)) on(type, enqueue);
  on("expire", f => { if (f.room === client.room) expire(f.time); });
  on("welcome", f => {
    const here = f.rooms.find(r => r.room === client.room);
    silent();
    lastRead = here?.last_read_id ?? lastRead;
    if (here?.expired) expire(here.expired);
  });
  on("read", f => { if (f.room === client.room) lastRead = f.id; });
  on("live", () => { stalled = false; paint(); if (stuck) toEnd(); speakAgain(); considerRead(); });
  list.addEventListener("scroll", onScroll, { passive: true });
  list.addEventListener("click", followQuote);
  list.querySelector(".older a").addEventListener("click", e => { e.preventDefault(); loadOlder(); });
  byId("newer").addEventListener("click", e => { e.preventDefault(); showNewest(); if (!coarse.matches) byId("text")?.focus(); });
  new ResizeObserver(onResize).observe(list);
  addEventListener("focus", considerRead);
  addEventListener("blur", considerRead);
  addEventListener("storage", onStorage);
  document.addEventListener("visibilitychange", () => { if (!isVisible()) paint(); considerRead(); });
}
