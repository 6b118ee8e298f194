// The list that opens above the composer: people after an @, emoji after a colon.

import { byId, client, inOrder, make, makeAvatar } from "./page.js";
import { knownNames } from "./rows.js";
import { emojis } from "./emoji.js";

const most = 8;
const text = byId("text"), box = byId("choices");
let choices = [], chosen = 0, token = null; // token: {sign, typed, start} before the caret

export const isOpen = () => !box.hidden;

// An @ counts at the start and after whatever is no ASCII letter or digit, so that addresses open nothing.
function tokenAt(before) {
  const found = /(?:^|[^A-Za-z0-9])([@:])([\p{L}\p{M}\p{N}_.+-]*)$/u.exec(before);
  if (!found) return null;
  const [, sign, typed] = found, enough = sign === "@" || typed.length > 1 || /[^\x00-\x7f]/.test(typed);
  return enough ? { sign, typed: typed.toLowerCase(), start: before.length - typed.length - 1 } : null;
}

// Names that begin with what was typed come before those that have it inside.
function find({ sign, typed }) {
  const place = name => name.toLowerCase().indexOf(typed);
  const found = sign === "@" ? [...knownNames().filter(name => name !== client.username).sort(inOrder), ...typed ? ["all", "所有人"] : []]
    .map(name => ({ name, at: place(name), put: `@${name} `, label: [makeAvatar(name), " ", name] })) :
    emojis.map(({ emoji, names }) => {
      const name = names.find(n => n.startsWith(typed)) ?? names.find(n => n.includes(typed)) ?? "";
      return { name, at: name ? place(name) : -1, put: emoji, label: [make("span", "glyph", emoji), ` :${name}:`] };
    });
  return found.filter(({ at }) => at >= 0).sort((a, b) => Math.sign(a.at) - Math.sign(b.at)).slice(0, most);
}

// Follows what is typed. A name typed whole, like :tada:, needs no choice.
export function suggest() {
  const { selectionStart, selectionEnd, value } = text, before = value.slice(0, selectionStart);
  const whole = /(?:^|[^A-Za-z0-9`])(:([\p{L}\p{N}_]+):)$/u.exec(before), known = whole && emojis.find(e => e.names.includes(whole[2].toLowerCase()));
  if (known) text.setRangeText(known.emoji, selectionStart - whole[1].length, selectionStart, "end");
  token = selectionStart === selectionEnd && !known ? tokenAt(before) : null;
  choices = token ? find(token) : [];
  chosen = 0;
  paint();
}

export function closeList() {
  choices = [];
  paint();
}

function paint() {
  box.hidden = !choices.length;
  box.replaceChildren(...choices.map(({ label }, i) => {
    const li = make("li", "", ...label);
    Object.assign(li, { id: `choice-${i}`, role: "option" });
    li.setAttribute("aria-selected", i === chosen);
    li.addEventListener("mousedown", e => { e.preventDefault(); chosen = i; choose(); }); // the caret stays
    return li;
  }));
  text.setAttribute("aria-expanded", isOpen());
  if (isOpen()) text.setAttribute("aria-activedescendant", `choice-${chosen}`);
  else text.removeAttribute("aria-activedescendant");
}

function choose() {
  const { put } = choices[chosen];
  text.setSelectionRange(token.start, text.selectionStart);
  closeList();
  document.execCommand("insertText", false, put); // the only way that can be undone
}

// Reports whether the key was for the list.
export function onListKey(e) {
  if (!isOpen() || e.shiftKey || e.altKey || e.ctrlKey || e.metaKey) return false;
  const step = { ArrowDown: 1, ArrowUp: -1 }[e.key];
  if (step) {
    chosen = (chosen + step + choices.length) % choices.length;
    paint();
  } else if (e.key === "Enter" || e.key === "Tab") choose();
  else if (e.key === "Escape") closeList();
  else {
    if (e.key.length > 1) closeList(); // the caret moves away; what changes the text opens the list anew
    return false;
  }
  e.preventDefault();
  e.stopPropagation();
  return true;
}
