// The rooms at the side: what is unread in them, and who is online.

import { byId, client, inOrder, isDirect, make, makeAvatar, roomURL, setText, shelf, showTime, shownRoom, ago, t } from "./page.js";
import { net, on } from "./net.js";
import { isReading } from "./log.js";
import { isOwn, learnName, formatted } from "./rows.js";

// Rooms by name: {name, li, unread, mentions, notify, newest, time}; time is that of the newest message until it is shown.
const rooms = new Map();

export const allRooms = () => [...rooms.values()].sort((a, b) => inOrder(shownRoom(a.name), shownRoom(b.name)));

const numbersOf = ({ unread, mentions = 0, notify }) => ({ unread: Number(unread), mentions: Number(mentions), notify });

function roomNamed(name) {
  if (!rooms.has(name)) {
    const badge = make("span", "badge", make("b"), make("span", "unseen", t("unread"))), draft = make("span", "hint draft", t("draft"));
    const link = make("a", "", make("span", "name", shownRoom(name)), draft, badge), li = make("li", "", link);
    link.href = roomURL(name);
    link.firstChild.dir = "auto";
    badge.hidden = draft.hidden = true;
    li.dataset.room = name;
    insert(byId(isDirect(name) ? "directs" : "rooms"), li, other => inOrder(shownRoom(other.dataset.room), shownRoom(name)) > 0);
    rooms.set(name, { name, li, unread: 0, mentions: 0, notify: "mentions", newest: 0 });
  }
  return rooms.get(name);
}

function insert(ul, li, isAfter) {
  ul.insertBefore(li, [...ul.children].find(isAfter) ?? null);
  ul.hidden = false;
}

// A room is new, or its name, topic or state is.
function onRoom({ room, former, topic = "", archived = false }) {
  const here = (former ?? room) === client.room, was = rooms.get(former);
  if (former) shelf.set(shelf.key("draft", room), shelf.get(shelf.key("draft", former)));
  if (former && here) {
    client.room = room; // under which the draft is kept when this page goes
    return location.replace(roomURL(room));
  }
  if (former) dropRoom(former);
  Object.assign(roomNamed(room), was && numbersOf(was)).li.classList.toggle("archived", archived);
  paintSoon();
  if (!here) return;
  setText(document.querySelector(".topic"), topic);
  if (archived !== client.archived) location.reload();
}

function dropRoom(name) {
  if (name === client.room) return location.assign(`${client.base}/chat/`);
  rooms.get(name)?.li.remove();
  rooms.delete(name);
}

function onWelcome(f) {
  const there = new Map(f.rooms.map(r => [r.room, r]));
  if (!there.has(client.room)) return location.reload(); // renamed meanwhile, or closed to the reader
  for (const name of rooms.keys()) if (!there.has(name)) dropRoom(name);
  for (const r of f.rooms) {
    onRoom(r);
    Object.assign(roomNamed(r.room), numbersOf(r));
  }
}

// Has this message something to say to the reader? hears gets it and its room.
function onMessage(f, hears) {
  const room = roomNamed(f.room), own = isOwn(f);
  if (f.id > room.newest) Object.assign(room, { newest: f.id, time: f.time });
  paintSoon();
  if (own) return;
  if (!net.live) net.missed++;
  f.mentions = isDirect(f.room) || f.message?.includes("@") && formatted(f.message).querySelector(".me") !== null;
  if (f.id > net.welcomeId) { // the welcome counted the others
    room.unread++;
    if (f.mentions) room.mentions++;
  }
  if (room.unread) hears(f, room);
}

let painting = 0;

function paintSoon() { painting ||= setTimeout(paintUnread, 50); }

function touchRoom(room) {
  const time = room.li.querySelector("time") ?? make("time");
  time.dateTime = room.time;
  room.time = "";
  showTime(time, ago);
  room.li.querySelector(".badge").before(time);
}

// The marker moved, in this session of the user or another one.
function onRead(f) {
  Object.assign(roomNamed(f.room), { unread: f.unread ?? 0, mentions: f.mentions ?? 0 });
  paintUnread();
}

const capped = n => n > 99 ? "99+" : `${n}`;
let onTotals = () => {};

export function paintUnread() {
  clearTimeout(painting);
  painting = 0;
  const total = { unread: 0, mentions: 0 };
  let elsewhere = 0;
  for (const room of rooms.values()) {
    const { name, li, unread, mentions } = room;
    const here = name === client.room && isReading(); // about to be read: a number would only flash
    const shown = here ? 0 : unread, called = here ? 0 : mentions, badge = li.querySelector(".badge");
    total.unread += shown;
    total.mentions += called;
    if (name !== client.room) elsewhere += shown;
    if (room.time) touchRoom(room);
    badge.hidden = !shown;
    badge.classList.toggle("called", called > 0);
    setText(badge.querySelector("b"), capped(called || shown));
    setText(badge.querySelector(".unseen"), called ? t("mentions") : t("unread"));
  }
  byId("drawer").setAttribute("aria-label", elsewhere ? t("rooms_unread", elsewhere) : t("rooms"));
  onTotals(total);
}

// Drafts of other rooms are hinted at.
function paintDrafts() {
  for (const { name, li } of rooms.values()) {
    li.querySelector(".draft").hidden = name === client.room || !shelf.get(shelf.key("draft", name));
  }
}

// The next room in the list, or the next one with something unread; step is 1 or -1.
export function nextRoom(step, onlyUnread) {
  const shown = [...document.querySelectorAll("#side .rooms li")].map(li => rooms.get(li.dataset.room)).filter(Boolean);
  const at = shown.findIndex(r => r.name === client.room);
  for (let i = 1; i <= shown.length; i++) {
    const room = shown[(at + step * i + shown.length * 2) % shown.length];
    if (room.name !== client.room && (!onlyUnread || room.unread)) return location.assign(roomURL(room.name));
  }
}

// ---- people ----

const people = new Map(); // name → li, in the order of the reader's language

function join(name) {
  learnName(name);
  if (people.has(name)) return;
  const link = make("a", "", makeAvatar(name), " ", make("bdi", "", name)), li = make("li", "", link);
  link.href = roomURL(`@${name}`);
  li.dataset.name = name;
  people.set(name, li);
  insert(byId("people"), li, other => inOrder(other.dataset.name, name) > 0);
}

function onPresence({ all, online = all ?? [], offline = [] }) {
  const here = all && new Set([...all, client.username]); // the server announces people with a delay
  for (const name of here ? [...people.keys()].filter(name => !here.has(name)) : offline) {
    people.get(name)?.remove();
    people.delete(name);
  }
  if (all) join(client.username);
  online.forEach(join);
  setText(byId("people-count"), `${people.size}`);
}

// ---- who is typing ----

const typing = new Map(); // name → timer

function onTyping({ room, username }) {
  if (room === client.room && username !== client.username) setTyping(username, 5e3);
}

function setTyping(name, time) {
  clearTimeout(typing.get(name));
  if (time) typing.set(name, setTimeout(setTyping, time, name, 0));
  else typing.delete(name);
  const names = [...typing.keys()];
  setText(byId("typing"), names.length > 2 ? t("typing_many") : names.length === 2 ? t("typing_two", ...names) : names.length ? t("typing", names[0]) : "");
}

// ---- start ----

function startPeopleSwitch() {
  const button = byId("people-switch"), key = shelf.key("people");
  const hide = hidden => {
    document.body.classList.toggle("alone", hidden);
    button.setAttribute("aria-expanded", !hidden);
    shelf.set(key, hidden ? "hidden" : "");
  };
  button.hidden = false;
  button.addEventListener("click", () => hide(!document.body.classList.contains("alone")));
  hide(shelf.get(key) === "hidden");
}

// hears gets each message of others with its room, and totals {unread, mentions} of all rooms.
export function startRooms(hears, totals) {
  onTotals = totals;
  startPeopleSwitch();
  for (const li of document.querySelectorAll("#side .rooms li")) {
    rooms.set(li.dataset.room, { name: li.dataset.room, li, newest: 0, ...numbersOf(li.dataset) });
  }
  for (const li of byId("people").children) people.set(li.dataset.name, li);
  on("welcome", onWelcome);
  on("message", f => onMessage(f, hears));
  on("message", f => { if (typing.has(f.username)) setTyping(f.username, 0); });
  on("read", onRead);
  on("room", onRoom);
  on("join", f => { if (f.username === client.username) roomNamed(f.room); });
  on("leave", f => { if (f.username === client.username) dropRoom(f.room); });
  on("presence", onPresence);
  on("typing", onTyping);
  on("caught_up", paintUnread);
  addEventListener("storage", paintDrafts);
  paintDrafts();
}
