// One message as a row of the log: built from a frame, or taken over from the server's page, and changed later.

import { client, clock, make, makeAvatar, makeButton, makeIcon, setText, showTime, t } from "./page.js";
import { format } from "./format.js";

const foldLines = 16, foldLength = 1600; // a text with more is shown in part

// What the nodes do not tell: {message, reactions}, the text as it was typed and who reacts how, names by emoji.
const facts = new WeakMap();

export const isOwn = m => m.username === client.username && !m.guest === !client.guest;
export const timeOf = li => new Date(li.querySelector("time").dateTime);
export const rank = li => Number(li.dataset.id ?? Infinity); // what is not yet on the server comes last
const authorOf = li => li.dataset.author;

// The text as it was typed. Of others' messages that the server drew, only what is shown is known.
export const sourceOf = li => facts.get(li).message ?? li.querySelector(".body").textContent;

const people = new Map(); // who is known, by the name in one case
export const learnName = name => people.set(name.toLowerCase(), name);
export const knownNames = () => [...people.values()];
export const formatted = message => format(message, client.username, name => people.has(name.toLowerCase()));
client?.people.forEach(learnName);

export function buildRow(m) {
  const author = make("span", "author", m.username), time = make("time"), at = make("a", "at", time);
  author.dir = "auto";
  time.dateTime = m.time;
  showTime(time, clock);
  const tag = m.guest ? "guest" : m.bot ? "bot" : m.pushed ? "pushed" : "";
  const body = make("div", "body");
  body.dir = "auto";
  const li = make("li", isOwn(m) ? "own" : "", makeAvatar(m.username),
    make("div", "head", author, " ", ...tag ? [make("span", "tag", t(tag)), " "] : [], at),
    ...m.quote ? [buildQuote(m.reply_to, m.quote)] : [], body, make("span", "mark"));
  Object.assign(li.dataset, { author: m.username, tag });
  learnName(m.username);
  facts.set(li, { reactions: new Map(Object.entries(m.reactions ?? {}).map(([emoji, names]) => [emoji, new Set(names)])) });
  if (m.deleted) showDeleted(li);
  else showText(li, m.message, m.edited);
  paintReactions(li);
  if (m.id) setId(li, m.id);
  return li;
}

// Takes over a row of the server's page.
export function adoptRow(li) {
  const reactions = new Map();
  for (const chip of li.querySelectorAll(".reaction")) reactions.set(chip.dataset.emoji, new Set(chip.title.split(", ")));
  facts.set(li, { message: li.dataset.source, reactions });
  learnName(authorOf(li));
  showTime(li.querySelector("time"), clock);
  if (!li.matches(".deleted")) {
    fold(li, sourceOf(li));
    addMore(li);
  }
}

function setId(li, id) {
  li.id = `m${id}`;
  li.dataset.id = id;
  li.querySelector(".at").href = `?at=${id}#m${id}`;
  const edited = li.querySelector(".mark a");
  if (edited) edited.href = `edits/${id}`;
  if (!li.matches(".deleted")) addMore(li);
}

function addMore(li) {
  const more = make("button", "more", makeIcon("M6 12h.01M12 12h.01M18 12h.01"));
  more.type = "button";
  more.setAttribute("aria-label", t("actions", authorOf(li)));
  more.setAttribute("aria-haspopup", "menu");
  li.append(more);
}

const gist = text => text.length > 200 ? `${text.slice(0, 200)}…` : text;

export const quoteOf = li => ({ username: authorOf(li), message: gist(sourceOf(li)) });

function buildQuote(target, { username, message, deleted }) {
  const quote = make("a", "quote", make("b", "", username), " ", make("span", "", deleted ? t("deleted") : message));
  for (const part of quote.children) part.dir = "auto";
  quote.href = `?at=${target}#m${target}`;
  quote.dataset.target = target;
  return quote;
}

// A message that was changed looks so where it is quoted too.
export function requote(list, target, message) {
  for (const quote of list.querySelectorAll(`.quote[data-target="${target}"] span`)) setText(quote, gist(message));
}

export function showText(li, message, edited) {
  if (li.matches(".deleted")) return; // while its author was changing it
  facts.get(li).message = message;
  li.querySelector(".body").replaceChildren(formatted(message));
  fold(li, message);
  const trail = make("a", "", t("edited"));
  trail.href = `edits/${li.dataset.id}`;
  li.querySelector(".mark").replaceChildren(...edited ? [trail] : []);
}

export function showDeleted(li) {
  facts.get(li).reactions.clear();
  paintReactions(li);
  fold(li, "");
  li.querySelector(".mark").replaceChildren();
  if (li.contains(document.activeElement)) li.querySelector(".at").focus();
  li.querySelector(".more")?.remove();
  setText(li.querySelector(".body"), t("deleted"));
  li.classList.add("deleted");
}

// The number of lines is judged by the text, as measuring each row would be slow.
function fold(li, message) {
  const long = message.length > foldLength || message.split("\n", foldLines + 1).length > foldLines;
  li.querySelector(".unfold")?.remove();
  li.classList.toggle("folded", long);
  if (long) li.querySelector(".body").after(makeButton(t("unfold"), button => {
    li.classList.remove("folded");
    button.remove();
    li.querySelector(".more")?.focus({ preventScroll: true });
  }, "unfold"));
}

// ---- reactions ----

export const hasReacted = (li, emoji) => facts.get(li).reactions.get(emoji)?.has(client.username) ?? false;

export function showReaction(li, { emoji, username, on }) {
  const { reactions } = facts.get(li), names = reactions.get(emoji) ?? new Set();
  if (on) names.add(username);
  else names.delete(username);
  if (names.size) reactions.set(emoji, names);
  else reactions.delete(emoji);
  paintReactions(li);
}

function paintReactions(li) {
  const { reactions } = facts.get(li);
  const chips = [...reactions].map(([emoji, names]) => {
    const chip = make("button", "reaction", emoji, " ", make("b", "", `${names.size}`));
    Object.assign(chip, { type: "button", title: [...names].join(", ") });
    chip.dataset.emoji = emoji;
    chip.setAttribute("aria-pressed", names.has(client.username));
    return make("li", "", chip);
  });
  const focused = li.querySelector(".reaction:focus")?.dataset.emoji;
  li.querySelector(".reactions")?.remove();
  if (!chips.length) return;
  li.querySelector(".mark").before(make("ul", "reactions", ...chips));
  if (focused) li.querySelector(`.reaction[data-emoji="${CSS.escape(focused)}"]`)?.focus();
}

// ---- on its way ----

export function setState(li, state, words) {
  li.classList.remove("pending", "failed", "sent");
  if (state) li.classList.add(state);
  li.querySelector(".state, .refused")?.remove();
  if (words) li.querySelector(".head").append(make("span", "state", make("span", "unseen", words)));
}

export const setPending = li => setState(li, "pending", t("sending"));

// actions are what can be done about it: [label, function] each.
export function setFailed(li, reason, actions) {
  const why = make("p", "", reason);
  why.setAttribute("role", "alert");
  setState(li, "failed");
  li.append(make("div", "refused", why, ...actions.map(([label, action]) => makeButton(label, action))));
}

// The server has it: m is what it made of it.
export function settle(li, m) {
  li.removeAttribute("data-cid");
  li.querySelector("time").dateTime = m.time;
  showTime(li.querySelector("time"), clock);
  setId(li, m.id);
  showText(li, m.message, m.edited);
  confirm(li);
}

export function confirm(li) {
  setState(li, "sent", t("sent"));
  setTimeout(() => { if (li.matches(".sent")) setState(li); }, 2000);
}
