// What every module of the page uses: the data that came with it, words, times, nodes, and what the browser keeps.

export const client = JSON.parse(document.body.dataset.client || "null"); // null on pages that are not a room
export const lang = document.documentElement.lang;

// ---- words and times ----

export const t = (key, ...args) => (client.words[key] ?? key).replace(/\{(\d)\}/g, (_, i) => args[i]);

// Numbers decide between "key_one" and "key".
export const count = (key, n) => n === 1 && `${key}_one` in client.words ? t(`${key}_one`) : t(key, n);

export const clock = new Intl.DateTimeFormat(lang, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" }).format;
export const fullTime = new Intl.DateTimeFormat(lang, { dateStyle: "full", timeStyle: "long" }).format;
const longDay = new Intl.DateTimeFormat(lang, { year: "numeric", month: "long", day: "numeric", weekday: "long" }).format;
const relative = new Intl.RelativeTimeFormat(lang, { numeric: "auto", style: "narrow" });
export const inOrder = new Intl.Collator(lang).compare;

export function dayName(date) {
  const midnight = d => new Date(d.getFullYear(), d.getMonth(), d.getDate());
  const days = Math.round((midnight(date) - midnight(new Date())) / 864e5); // rounded: a day may have 23 or 25 hours
  return days === 0 || days === -1 ? relative.format(days, "day") : longDay(date);
}

export function ago(date) {
  const minutes = Math.min(0, Math.round((date - Date.now()) / 60e3));
  if (minutes === 0) return relative.format(0, "second");
  if (minutes > -60) return relative.format(minutes, "minute");
  return minutes > -1440 ? relative.format(Math.round(minutes / 60), "hour") : relative.format(Math.round(minutes / 1440), "day");
}

export function showTime(time, format) {
  const date = new Date(time.dateTime);
  setText(time, format(date));
  time.title = fullTime(date);
}

// What is said in relation to now: the times of rooms, and "Today" after midnight.
export function refreshTimes() {
  for (const time of document.querySelectorAll(".rooms time")) showTime(time, ago);
  for (const time of document.querySelectorAll(".day time")) showTime(time, dayName);
}

// ---- nodes ----

export const byId = id => document.getElementById(id);
export const narrow = matchMedia("(max-width: 899.98px)"), coarse = matchMedia("(pointer: coarse)");
export const isVisible = () => document.visibilityState === "visible";

export function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

export function makeButton(label, action, className = "") {
  const button = make("button", className, label);
  button.type = "button";
  button.addEventListener("click", () => action(button));
  return button;
}

export function makeIcon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS(svg.namespaceURI, "path"));
  svg.firstChild.setAttribute("d", path);
  return svg;
}

// A live region speaks when its text is set, even to the same words.
export function setText(node, words) { if (node.textContent !== words) node.textContent = words; }

// The server colours names by the same sum.
const hue = name => new TextEncoder().encode(name).reduce((h, byte) => (h * 31 + byte) % 4294967296, 0) % 12;

export function makeAvatar(name) {
  const avatar = make("span", `avatar hue-${hue(name)}`, [...name][0]);
  avatar.setAttribute("aria-hidden", "true");
  return avatar;
}

// Reports what was refused, beside the composer.
export const say = words => setText(byId("refusal"), words);

export async function copy(words) {
  try { await navigator.clipboard.writeText(words); } catch { // absent on plain http, where small servers live
    const area = make("textarea", "unseen", words), { activeElement } = document;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    activeElement.focus();
  }
}

// ---- rooms ----

export const roomURL = (name, rest = "") => `${client.base}/chat/${encodeURIComponent(name)}/${rest}`;
export const isDirect = name => name.includes("+");

// Direct messages are called after the other one.
export const shownRoom = name => isDirect(name) ? `@${name.split("+").find(who => who !== client.username) ?? client.username}` : name;

export async function getJSON(url) {
  const answer = await fetch(url, { headers: { Accept: "application/json" }, signal: AbortSignal.timeout(15e3) });
  if (!answer.ok) throw new Error(`${answer.status}`);
  return answer.json();
}

// ---- what the browser keeps ----

// localStorage, or this page's memory for what it will not take: it may be full or switched off.
export const shelf = {
  spare: new Map(),
  key: (...parts) => ["chatd", client.base, client.username, ...parts].join("/"),
  get(key) {
    try { return this.spare.get(key) ?? localStorage.getItem(key) ?? ""; } catch { return ""; }
  },
  set(key, value) {
    this.spare.delete(key);
    try {
      if (value) localStorage.setItem(key, value);
      else localStorage.removeItem(key);
    } catch { this.spare.set(key, value); }
  },
};
