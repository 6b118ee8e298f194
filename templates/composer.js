// Where messages are written: a draft for each room, answers to one message, changes of one's own.

import { byId, client, coarse, make, makeButton, say, shelf, t } from "./page.js";
import { net, notice, paintStatus, post } from "./net.js";
import { flush, maxOutbox, outbox } from "./outbox.js";
import { lastOwn, rowOf, setDivider, showNewest, showPending } from "./log.js";
import { quoteOf, rank, sourceOf } from "./rows.js";
import { closeList, onListKey, suggest } from "./complete.js";

const draftDelay = 300, typingEvery = 3e3;

const text = byId("text");
let composing = false; // an input method is at work, or was until this very key
let draftTimer = 0, typed = 0;
let about = null; // {kind: "edit" or "reply", id, quote}: what is written is about a message

export const isComposing = e => e.isComposing || e.keyCode === 229 || composing;

function onKey(e) {
  if (isComposing(e) || onListKey(e)) return;
  if (e.key === "ArrowUp" && !text.value && !about && lastOwn()) {
    e.preventDefault();
    startEdit(lastOwn());
  }
  if (e.key !== "Enter" || e.shiftKey || e.altKey) return;
  const newline = coarse.matches || shelf.get(shelf.key("newline")) === "on";
  if (newline && !e.ctrlKey && !e.metaKey) return;
  e.preventDefault();
  send();
}

// ---- about a message ----

function setAbout(next) {
  const box = byId("about");
  about = next;
  box.hidden = !about;
  box.replaceChildren(...about ? [
    make("span", "", about.kind === "edit" ? t("editing") : t("replying", about.quote.username)), " ",
    make("span", "gist", about.kind === "edit" ? "" : about.quote.message),
    makeButton("✕", cancelAbout),
  ] : []);
  box.querySelector("button")?.setAttribute("aria-label", t("cancel"));
}

export function startReply(li) {
  cancelAbout();
  setAbout({ kind: "reply", id: rank(li), quote: quoteOf(li) });
  saveDraft();
  text.focus();
}

export function startEdit(li) {
  if (about?.kind !== "edit") saveDraft();
  setAbout({ kind: "edit", id: rank(li) });
  setText(sourceOf(li));
}

// Reports whether there was anything to cancel. What was written before an edit comes back.
export function cancelAbout() {
  const was = about?.kind;
  setAbout(null);
  if (was === "edit") setText(draft());
  if (was) saveDraft();
  if (was) text.focus();
  return Boolean(was);
}

function setText(value) {
  text.value = value;
  text.focus();
  text.setSelectionRange(value.length, value.length);
  onInput();
}

// Puts what was chosen elsewhere where the caret is.
export function insertText(words) {
  text.focus();
  document.execCommand("insertText", false, words); // the only way that can be undone
}

// ---- sending ----

function send() {
  const message = text.value.replace(/^\s*\n|\s+$/g, ""), { room } = client;
  if (!message || !countBytes(message)) return;
  if (outbox.all().length >= maxOutbox) return say(t("outbox_full"));
  if (about?.kind === "edit") return sendEdit(message);
  const entry = outbox.add({ type: "message", room, message, ...about && { reply_to: about.id, quote: about.quote } });
  setAbout(null);
  setText("");
  typed = 0;
  say("");
  saveDraft();
  setDivider(null);
  showPending(entry);
  showNewest();
  flush();
  paintStatus();
}

function sendEdit(message) {
  const { id } = about, li = rowOf(id), former = li && { message: sourceOf(li), edited: li.querySelector(".mark a") !== null };
  cancelAbout();
  if (former?.message === message) return;
  const entry = outbox.add({ type: "edit", room: client.room, id, message, former });
  say("");
  showPending(entry);
  flush();
  paintStatus();
}

// Reports whether the server would take it.
function countBytes(message) {
  const bytes = new TextEncoder().encode(message).length, counter = byId("bytes"), over = bytes > client.limit;
  counter.hidden = bytes < client.limit * 0.9;
  counter.classList.toggle("over", over);
  counter.setAttribute("role", over ? "alert" : "note");
  if (!counter.hidden) counter.textContent = over ? t("too_long", bytes, client.limit) : t("bytes", bytes, client.limit);
  return !over;
}

// ---- what is typed ----

function onInput() {
  const list = byId("messages"), { scrollTop } = list;
  text.style.height = "auto"; // or it would never shrink
  text.style.height = `${text.scrollHeight + text.offsetHeight - text.clientHeight}px`;
  list.scrollTop = scrollTop; // the log was higher for a moment, which moves a reader who is near its end
  countBytes(text.value);
  if (!composing) suggest(); // not about half a syllable
  clearTimeout(draftTimer);
  draftTimer = setTimeout(saveDraft, draftDelay);
  if (!text.value || !net.live || about?.kind === "edit" || Date.now() - typed < typingEvery) return;
  typed = Date.now();
  post({ type: "typing", room: client.room });
}

const draft = () => shelf.get(shelf.key("draft", client.room));

function saveDraft() {
  clearTimeout(draftTimer);
  draftTimer = 0;
  const edit = about?.kind === "edit";
  if (!edit) shelf.set(shelf.key("draft", client.room), text.value);
  shelf.set(shelf.key("about", client.room), about ? JSON.stringify({ ...about, ...edit && { text: text.value } }) : "");
}

// Files that are text are put into the message. chatd carries no others.
async function take(e) {
  const { files } = e.dataTransfer ?? e.clipboardData;
  if (!files.length || e.clipboardData?.getData("text")) return; // spreadsheets add a picture of the text
  e.preventDefault();
  for (const file of files) {
    const words = file.size <= client.limit ? await file.text() : "";
    if (words && !/[\0\ufffd]/.test(words)) insertText(words);
    else notice(t("no_file", file.name));
  }
}

export function startComposer() {
  const { text: edited, ...former } = JSON.parse(shelf.get(shelf.key("about", client.room)) || "{}");
  if (former.kind) setAbout(former);
  text.value ||= edited ?? draft(); // what the server refused comes before a draft
  text.addEventListener("keydown", onKey);
  text.addEventListener("input", onInput);
  text.addEventListener("blur", closeList);
  text.addEventListener("click", closeList);
  text.addEventListener("compositionstart", () => { composing = true; closeList(); });
  // Safari ends the composition before it reports the Enter that ended it.
  text.addEventListener("compositionend", () => setTimeout(() => { composing = false; suggest(); }));
  byId("composer").addEventListener("submit", e => { e.preventDefault(); send(); });
  addEventListener("paste", take);
  addEventListener("drop", take);
  addEventListener("dragover", e => { if (e.dataTransfer.types.includes("Files")) e.preventDefault(); });
  addEventListener("pagehide", () => { if (draftTimer) saveDraft(); }); // another tab may have a newer one
  onInput();
  if (!coarse.matches) text.focus();
}
