// What calls a reader who looks elsewhere: the page's title and icon, the app's badge, a notification, a sound.

import { byId, client, isVisible, make, roomURL, say, shelf, shownRoom, t } from "./page.js";
import { isReading } from "./log.js";

const pageTitle = document.title;
const link = document.querySelector("link[rel=icon]");
const icon = link.href, plain = new Image();

// ---- title, icon, badge ----

export function showTotals({ unread, mentions }) {
  const title = mentions ? `(${mentions > 99 ? "99+" : mentions}) ${pageTitle}` : unread ? `• ${pageTitle}` : pageTitle;
  if (document.title !== title) document.title = title;
  paintIcon(mentions ? "#d6402f" : unread ? "#0b6f6a" : "");
  if (mentions) navigator.setAppBadge?.(mentions).catch(() => {});
  else navigator.clearAppBadge?.().catch(() => {});
}

let dot = "";

function paintIcon(colour) {
  if (colour === dot || !plain.complete) return;
  dot = colour;
  if (!colour) return void (link.href = icon);
  const canvas = make("canvas"), pen = canvas.getContext("2d");
  canvas.width = canvas.height = 64;
  pen.drawImage(plain, 0, 0, 64, 64);
  pen.fillStyle = colour;
  pen.arc(48, 16, 15, 0, 2 * Math.PI);
  pen.fill();
  link.href = canvas.toDataURL();
}

// ---- notification and sound ----

const wants = name => shelf.get(shelf.key(name)) === "on";
const allowed = () => window.Notification?.permission === "granted";

const turn = 300; // the tab that is looked at is first

// What hears of every message of others, and tells of those that the room's level is for: in one tab, and not if another
// one is looked at.
export function hear(f, room) {
  if (room.notify === "none" || room.notify === "mentions" && !f.mentions) return;
  const looking = isVisible() && document.hasFocus(), read = f.room === client.room && isReading();
  setTimeout(inOneTab, looking ? 0 : turn, f.id, () => {
    if (read) return;
    if (wants("sound")) beep();
    if (!looking && wants("desktop") && allowed()) tell(f);
  });
}

function inOneTab(id, call) {
  const key = shelf.key("told");
  if (navigator.locks) navigator.locks.request(`${key}/${id}`, { ifAvailable: true }, lock => lock && new Promise(done => { call(); setTimeout(done, 60e3); }));
  else if (Number(shelf.get(key)) < id) { // plain http has no locks, and sounds only
    shelf.set(key, `${id}`);
    call();
  }
}

function tell(f) {
  const body = f.message.slice(0, 200), title = f.room.includes("+") ? f.username : `${f.username} – ${shownRoom(f.room)}`;
  try {
    const shown = new Notification(title, { body, icon, tag: `chatd-${f.room}`, lang: document.documentElement.lang });
    shown.onclick = () => {
      window.focus();
      if (f.room !== client.room) location.assign(roomURL(f.room));
      shown.close();
    };
  } catch { } // Android has them only from service workers
}

let audio, quietTill = 0;

function beep() {
  audio ??= new AudioContext();
  if (audio.currentTime < quietTill) return; // many came at once
  quietTill = audio.currentTime + 1;
  const tone = audio.createOscillator(), volume = audio.createGain(), now = audio.currentTime;
  tone.frequency.setValueAtTime(660, now);
  tone.frequency.setValueAtTime(880, now + 0.09);
  volume.gain.setValueAtTime(0.0001, now);
  volume.gain.exponentialRampToValueAtTime(0.12, now + 0.02);
  volume.gain.exponentialRampToValueAtTime(0.0001, now + 0.3);
  tone.connect(volume).connect(audio.destination);
  tone.start(now);
  tone.stop(now + 0.3);
}

// A setting of this browser: a button in the header's menu that is pressed or not.
function makeSwitch(name, label, turnOn = () => true) {
  const button = make("button", "switch", label);
  button.type = "button";
  button.setAttribute("aria-pressed", wants(name));
  button.addEventListener("click", async () => {
    const on = !wants(name) && await turnOn();
    shelf.set(shelf.key(name), on ? "on" : "");
    button.setAttribute("aria-pressed", on);
  });
  return button;
}

async function askPermission() {
  const granted = await window.Notification?.requestPermission() === "granted";
  if (!granted) say(t("no_permission"));
  return granted;
}

export function startNotify() {
  plain.src = icon;
  byId("switches").append(
    makeSwitch("desktop", t("set_desktop"), askPermission),
    makeSwitch("sound", t("set_sound"), () => { beep(); return true; }),
    makeSwitch("newline", t("set_newline")));
}
