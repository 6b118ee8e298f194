// The drawer, menus and dialogs, and the keys of the whole page.

import { byId, client, make, makeAvatar, narrow, roomURL, shownRoom, t } from "./page.js";
import { list, markRead, showNewest } from "./log.js";
import { knownNames } from "./rows.js";
import { allRooms, nextRoom } from "./rooms.js";
import { cancelAbout, isComposing } from "./composer.js";

// ---- what opens above the page ----

// Opens a popover beside a button, and puts the focus on its first item.
export function popUp(box, button) {
  const at = button.getBoundingClientRect();
  box.showPopover();
  const { offsetWidth, offsetHeight } = box, below = at.bottom + offsetHeight < innerHeight - 8;
  box.style.left = `${Math.max(8, Math.min(at.right - offsetWidth, innerWidth - offsetWidth - 8))}px`;
  box.style.top = `${below ? at.bottom : Math.max(8, at.top - offsetHeight)}px`;
  box.querySelector("button").focus();
}

// Arrows move between the buttons of a box as they lie on the screen.
export function arrows(box) {
  box.addEventListener("keydown", e => {
    const all = [...box.querySelectorAll("button")], me = document.activeElement, at = all.indexOf(me);
    const nearest = found => found.toSorted((a, b) => far(a) - far(b))[0];
    const far = b => Math.abs(b.offsetTop - me.offsetTop) * 1000 + Math.abs(b.offsetLeft - me.offsetLeft);
    const to = { Home: () => all[0], End: () => all.at(-1), ArrowRight: () => all[at + 1], ArrowLeft: () => all.at(at - 1),
      ArrowDown: () => nearest(all.filter(b => b.offsetTop > me.offsetTop)) ?? all[0],
      ArrowUp: () => nearest(all.filter(b => b.offsetTop < me.offsetTop)) ?? all.at(-1) }[e.key];
    if (!to || at < 0) return;
    e.preventDefault();
    (to() ?? all[0]).focus();
  });
}

export function openDialog(title, ...content) {
  const dialog = byId("dialog"), heading = make("h2", "", title), close = make("button", "tool", "✕");
  close.setAttribute("aria-label", t("close"));
  close.type = "button";
  close.addEventListener("click", () => dialog.close());
  dialog.setAttribute("aria-label", title);
  dialog.replaceChildren(make("header", "", heading, close), ...content);
  dialog.showModal();
  return dialog;
}

// ---- the switcher ----

// How well letters of a name, in their order, fit what was typed; less is better, Infinity: not at all.
function distance(name, typed) {
  let at = -1, sum = 0;
  for (const letter of typed) {
    const next = name.indexOf(letter, at + 1);
    if (next < 0) return Infinity;
    sum += next - at - 1;
    at = next;
  }
  return sum;
}

function places() {
  const rooms = allRooms().map(({ name, unread, mentions }) => ({ name: shownRoom(name), url: roomURL(name), unread: mentions * 1000 + unread }));
  const here = new Set(rooms.map(r => r.name));
  const people = knownNames().filter(name => name !== client.username && !here.has(`@${name}`));
  return [...rooms, ...people.map(name => ({ name: `@${name}`, url: roomURL(`@${name}`), unread: 0 }))];
}

function openSwitcher() {
  const all = places(), input = make("input"), results = make("ul", "choices");
  let found = [], chosen = 0;
  Object.assign(input, { type: "search", placeholder: t("switch_hint"), role: "combobox", autocomplete: "off" });
  Object.assign(results, { id: "places", role: "listbox", ariaLabel: t("switch") });
  for (const [name, value] of [["aria-controls", "places"], ["aria-label", t("switch")], ["aria-expanded", "true"], ["aria-autocomplete", "list"]]) input.setAttribute(name, value);
  const paint = () => {
    results.replaceChildren(...found.map(({ name, url, unread }, i) => {
      const link = make("a", "", ...name.startsWith("@") ? [makeAvatar(name.slice(1)), " "] : [], make("bdi", "", name), ...unread ? [make("span", "badge", "•")] : []);
      const li = make("li", "", link);
      Object.assign(link, { href: url, tabIndex: -1 });
      Object.assign(li, { id: `place-${i}`, role: "option", ariaSelected: `${i === chosen}` });
      return li;
    }));
    if (found.length) input.setAttribute("aria-activedescendant", `place-${chosen}`);
    else results.append(make("li", "hint", t("no_place")));
    results.children[chosen]?.scrollIntoView({ block: "nearest" });
  };
  const search = () => {
    const typed = input.value.trim().toLowerCase();
    const fit = place => Math.min(distance(place.name.toLowerCase(), typed), distance(place.name.replace("@", "").toLowerCase(), typed));
    found = all.map(place => ({ ...place, fit: fit(place) })).filter(p => p.fit < Infinity)
      .sort((a, b) => a.fit - b.fit || b.unread - a.unread).slice(0, 12);
    chosen = 0;
    paint();
  };
  input.addEventListener("input", search);
  input.addEventListener("keydown", e => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[e.key];
    if (isComposing(e) || !found.length || !step && e.key !== "Enter") return;
    e.preventDefault();
    if (!step) return location.assign(found[chosen].url);
    chosen = (chosen + step + found.length) % found.length;
    paint();
  });
  openDialog(t("switch"), input, results);
  search();
  input.focus();
}

// ---- help ----

const mac = /Mac|iPhone|iPad/.test(navigator.platform), command = mac ? "⌘" : "Ctrl";
const keys = [[`${command} K`, "switch"], ["Alt ↑ ↓", "key_rooms"], ["Alt Shift ↑ ↓", "key_unread"], ["/", "key_search"], ["End", "key_newest"], ["Esc", "key_escape"],
  ["Enter", "key_send"], ["Shift Enter", "key_line"], [`${command} Enter`, "key_send_always"], ["↑", "key_edit"], ["@  :", "key_complete"], ["?", "key_help"]];

function openHelp() {
  const entries = keys.flatMap(([name, what]) => [make("dt", "", ...name.split(/ +/).map(key => make("kbd", "", key))), make("dd", "", t(what))]);
  openDialog(t("keys"), make("dl", "keys", ...entries), make("p", "hint", t("format_hint")));
}

// ---- the drawer of narrow pages ----

let drawerPushed = false; // opened by a click on this page: going back closes it

const closeDrawer = () => drawerPushed ? history.back() : location.replace("#main");

function onHash() {
  const open = location.hash === "#side" && narrow.matches, was = byId("main").inert;
  for (const covered of [byId("main"), document.querySelector(".top")]) covered.inert = open;
  byId("drawer").setAttribute("aria-expanded", open);
  if (open) byId("side").querySelector("a").focus();
  else if (was) byId("drawer").focus();
  drawerPushed &&= open;
}

function startDrawer() {
  byId("drawer").addEventListener("click", () => { drawerPushed = true; });
  byId("side").addEventListener("click", e => {
    const link = e.target.closest("li a");
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

// ---- keys ----

function onEscape() {
  const menu = document.querySelector(".menu[open]");
  if (document.querySelector(":popover-open, dialog[open]")) return; // the browser closes those
  if (menu) {
    menu.open = false;
    menu.firstElementChild.focus();
  } else if (client && location.hash === "#side") closeDrawer();
  else if (client && !cancelAbout()) markRead();
}

function openSearch() {
  const field = document.querySelector(".search input");
  if (field?.checkVisibility()) field.focus();
  else location.assign(`${client.base}/search/`);
}

// Letters are commands only where nothing is typed.
function onKey(e) {
  if (client && isComposing(e)) return;
  if (e.key === "Escape") return onEscape();
  if (!client || byId("dialog").open) return;
  const typing = e.target.closest("input, textarea, select, [role=menu]"), arrow = { ArrowUp: -1, ArrowDown: 1 }[e.key];
  const bare = !typing && !e.ctrlKey && !e.metaKey && !e.altKey;
  if ((e.ctrlKey || e.metaKey) && e.key.toLowerCase() === "k") openSwitcher();
  else if (e.altKey && arrow) nextRoom(arrow, e.shiftKey);
  else if (bare && e.key === "/") openSearch();
  else if (bare && e.key === "?") openHelp();
  else if (bare && e.key === "End" || e.key === "End" && e.target === byId("text") && !e.target.value) showNewest();
  else return;
  e.preventDefault();
}

export function startMenus() {
  document.addEventListener("keydown", onKey);
  document.addEventListener("click", e => {
    const menu = document.querySelector(".menu[open]");
    if (menu && (!menu.contains(e.target) || e.target.closest(".panel button:not(.switch)"))) menu.open = false;
  });
  if (!client) return;
  startDrawer();
  byId("help").addEventListener("click", () => {
    document.querySelector(".menu summary").focus(); // where it comes back to, as the menu closes
    openHelp();
  });
  byId("help").hidden = false;
}
