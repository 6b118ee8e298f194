// What can be done with a message: the menu of its row, its reactions, and the trail of its edits.

import { byId, client, clock, copy, fullTime, getJSON, make, makeButton, roomURL, say, t } from "./page.js";
import { net, notice } from "./net.js";
import { flush, outbox } from "./outbox.js";
import { list, markUnread, showPending } from "./log.js";
import { hasReacted, rank, sourceOf } from "./rows.js";
import { insertText, startEdit, startReply } from "./composer.js";
import { emojis, quickEmojis } from "./emoji.js";
import { arrows, openDialog, popUp } from "./menus.js";

function enqueue(frame) {
  const entry = outbox.add({ room: client.room, ...frame });
  if (!net.live) notice(t("later"));
  showPending(entry);
  flush();
}

function react(li, emoji) {
  enqueue({ type: "react", id: rank(li), emoji, on: !hasReacted(li, emoji) });
}

// ---- the menu of a row ----

function openMenu(more) {
  const li = more.closest("li"), menu = byId("actions"), own = li.matches(".own");
  const item = (label, action) => {
    const button = makeButton(label, () => { menu.hidePopover(); action(); });
    button.setAttribute("role", "menuitem");
    return button;
  };
  const emoji = make("div", "quick", ...quickEmojis.map(e => item(e, () => react(li, e))),
    item("…", () => openPicker(more, e => react(li, e))));
  emoji.lastChild.setAttribute("aria-label", t("more_emoji"));
  menu.replaceChildren(emoji,
    item(t("reply"), () => startReply(li)),
    ...own ? [item(t("edit"), () => startEdit(li))] : [],
    item(t("copy_text"), () => copied(sourceOf(li))),
    item(t("copy_link"), () => copied(new URL(li.querySelector(".at").getAttribute("href"), location.origin + roomURL(client.room)).href)),
    item(t("mark_unread"), () => markUnread(li)),
    ...own || client.admin ? [confirmed(t("delete"), item(t("delete_really"), () => enqueue({ type: "delete", id: rank(li) })))] : []);
  popUp(menu, more);
}

// A button that only leads to another one, which does what cannot be undone.
function confirmed(label, button) {
  const first = makeButton(label, () => { first.replaceWith(button); button.focus(); }, "bad");
  first.setAttribute("role", "menuitem");
  button.classList.add("bad");
  return first;
}

async function copied(words) {
  await copy(words);
  notice(t("copied"));
}

// ---- emoji ----

function openPicker(near, use) {
  const picker = byId("picker");
  picker.replaceChildren(...emojis.map(({ emoji, names }) => {
    const button = makeButton(emoji, () => { picker.hidePopover(); use(emoji); });
    button.title = `:${names[0]}:`;
    return button;
  }));
  popUp(picker, near);
}

// ---- edits ----

async function openTrail(id) {
  const { edits } = await getJSON(roomURL(client.room, `edits/${id}`)).catch(() => ({}));
  if (!edits) return say(t("older_failed"));
  openDialog(t("edits"), make("ol", "trail", ...edits.map(({ time, message }) => {
    const when = make("time", "", `${clock(new Date(time))}`), body = make("div", "body", message);
    Object.assign(when, { dateTime: time, title: fullTime(new Date(time)) });
    body.dir = "auto";
    return make("li", "", when, body);
  })));
}

function onClick(e) {
  const li = e.target.closest("li[data-id]"), chip = e.target.closest(".reaction"), more = e.target.closest(".more"), trail = e.target.closest(".mark a");
  if (chip) react(li, chip.dataset.emoji);
  else if (more) openMenu(more);
  else if (trail && !e.ctrlKey && !e.metaKey && !e.shiftKey) {
    e.preventDefault();
    openTrail(rank(li));
  }
}

export function startActions() {
  list.addEventListener("click", onClick);
  arrows(byId("actions"));
  arrows(byId("picker"));
  const emoji = byId("emoji"); // an archived room has no composer
  emoji?.addEventListener("click", () => openPicker(emoji, insertText));
  emoji?.removeAttribute("hidden");
}
