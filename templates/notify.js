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

// What hears of every message of others, and tells of those that the room's level is for. All tabs of a browser hear of
// them: the one where it is being read keeps the others silent, else the first one speaks.
export function hear(f, room) {
  if (f.room === client.room && isReading()) shelf.set(shelf.key("told"), `${f.id}`);
  else if (room.notify === "all" || room.notify === "mentions" && f.mentions) setTimeout(call, 200 + 200 * Math.random(), f);
}

function call(f) {
  if (Number(shelf.get(shelf.key("told"))) >= f.id) return;
  shelf.set(shelf.key("told"), `${f.id}`);
  if (wants("sound")) beep();
  if (wants("desktop") && allowed() && !(isVisible() && document.hasFocus())) tell(f);
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

let audio;

function beep() {
  audio ??= new AudioContext();
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
export function makeSwitch(name, label, turnOn = () => true) {
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
