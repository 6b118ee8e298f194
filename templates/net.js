// One socket for all rooms: it is opened, found dead, opened again, and says so in a bar under the header.

import { byId, client, clock, count, isVisible, make, makeButton, setText, t } from "./page.js";

const maxMissed = 2000; // with more to catch up on, the newest page is quicker
const welcomeWait = 10e3;
const firstRetry = 500, lastRetry = 30e3;
const grace = 2e3, noticeTime = 3e3; // no bar before, no notice after
const stale = 60e3, sleepGap = 30e3; // a socket that heard nothing for so long is not trusted

export const net = {
  socket: null, opened: false, live: false, // live: welcomed and caught up
  byHand: false, plugged: false, ended: false, old: false, // closed and opened with the button; signed out; the server is newer
  tries: 0, timer: 0, retryAt: 0,
  downSince: Date.now(), contact: 0, wasLive: false,
  welcomeId: 0, missed: 0, notice: "", noticeTill: 0,
};
let cursor = client?.cursor; // everything up to this id has been taken in

// ---- frames ----

const handlers = new Map();

// Calls handler with every frame of a type, and of "live" and "lost": this page has caught up, or lost its socket.
export function on(type, handler) { handlers.set(type, [...handlers.get(type) ?? [], handler]); }
const emit = (type, frame) => { for (const handler of handlers.get(type) ?? []) handler(frame); };

export const post = frame => net.socket.send(JSON.stringify(frame));

function onFrame(f) {
  net.contact = Date.now();
  if (f.type === "behind") return location.reload();
  if (f.type === "welcome" && !welcome(f)) return;
  emit(f.type, f);
  if (["message", "edit", "delete", "react", "caught_up"].includes(f.type)) cursor = Math.max(cursor, f.id);
  if (f.type === "caught_up") caughtUp();
}

function welcome(f) {
  // Another database or another user: what the page shows is not theirs. A page that was just reloaded is.
  const reloaded = !net.wasLive && performance.getEntriesByType("navigation")[0]?.type === "reload";
  if ((f.id < cursor || f.username !== client.username) && !reloaded) {
    location.reload();
    return false;
  }
  cursor = Math.min(cursor, f.id);
  Object.assign(net, { tries: 0, ended: false, welcomeId: f.id, old: f.version !== document.body.dataset.version });
  return true;
}

function caughtUp() {
  const { wasLive, plugged, missed } = net, longDown = Date.now() - net.downSince > grace;
  clearTimeout(net.timer);
  if (plugged) notice(t("connected"));
  else if (wasLive && longDown) notice(missed ? count("back_missed", missed) : t("back"));
  Object.assign(net, { live: true, wasLive: true, plugged: false, downSince: 0 });
  emit("live");
  setState("online");
}

// ---- connection ----

function connect() {
  clearTimeout(net.timer);
  if (net.socket) return;
  const socket = new WebSocket(`${location.protocol.replace("http", "ws")}//${location.host}${client.base}/ws`, "chatd.v1");
  const ifCurrent = handle => event => { if (socket === net.socket) handle(event); };
  Object.assign(net, { socket, opened: false, byHand: false, missed: 0, timer: setTimeout(lose, welcomeWait) });
  socket.onopen = ifCurrent(() => { net.opened = true; post({ type: "hello", since: cursor, most: maxMissed }); });
  socket.onmessage = ifCurrent(event => onFrame(JSON.parse(event.data)));
  socket.onclose = ifCurrent(event => lose(event.code));
  setState("connecting");
}

// Gives the socket up without waiting for its closing handshake, which a dead network would hold for long.
export function lose(code) {
  const { socket } = net;
  clearTimeout(net.timer);
  Object.assign(net, { socket: null, live: false, downSince: net.downSince || Date.now() });
  socket?.close();
  if (!net.byHand) {
    retryLater();
    if (code === 1008 || !net.opened) checkSession();
  }
  emit("lost");
  setState("offline");
  setTimeout(paintStatus, grace);
}

function retryLater() {
  const delay = Math.min(lastRetry, firstRetry * 2 ** net.tries++) * (0.7 + 0.6 * Math.random());
  net.retryAt = Date.now() + delay;
  net.timer = setTimeout(connect, delay);
}

// A refused socket does not say why. A page that sends one to the login does.
async function checkSession() {
  try {
    const answer = await fetch(`${client.base}/chat/`, { redirect: "manual", cache: "no-store" });
    net.ended = !net.live && (answer.type === "opaqueredirect" || answer.status === 401 || answer.status === 403);
  } catch { return; } // no network, so nothing learned
  if (net.ended) clearTimeout(net.timer);
  paintStatus();
}

function wake(distrust) {
  if (net.byHand) return;
  if (net.live && (distrust || Date.now() - net.contact > stale)) lose();
  connect();
}

function plug() {
  const { byHand } = net;
  Object.assign(net, { plugged: byHand, byHand: !byHand });
  if (byHand) connect();
  else lose();
}

function setState(state) {
  document.body.dataset.state = state;
  byId("plug").textContent = net.byHand ? t("connect") : t("disconnect");
  paintStatus();
}

// ---- the bar ----

// It is built once and changed in place, so that a screen reader hears what changes, and not the seconds.
const bar = { box: byId("status"), words: make("span"), countdown: make("span"), waiting: make("span") };
let waiting = () => 0; // how many messages are

function buildBar() {
  bar.retry = makeButton(t("retry_now"), () => { net.tries = 0; connect(); });
  bar.reload = makeButton(t("reload"), () => location.reload());
  bar.login = make("a", "", t("sign_in"));
  bar.login.href = `${client.base}/login/?next=${encodeURIComponent(location.pathname)}`;
  bar.countdown.setAttribute("aria-live", "off");
  bar.box.append(bar.words, bar.countdown, bar.retry, bar.reload, bar.login, bar.waiting);
}

export function notice(words) {
  Object.assign(net, { notice: words, noticeTill: Date.now() + noticeTime });
  setTimeout(paintStatus, noticeTime);
  paintStatus();
}

export function paintStatus() {
  const now = Date.now(), { byHand, ended, wasLive } = net;
  const down = byHand || ended || (net.downSince && now - net.downSince >= grace), noticed = !down && now < net.noticeTill;
  const old = !down && !noticed && net.old, retrying = down && !byHand && !ended;
  const seconds = Math.ceil((net.retryAt - now) / 1000), n = down ? waiting() : 0;
  bar.box.hidden = !down && !noticed && !old;
  bar.box.classList.toggle("good", noticed || old);
  setText(bar.words, noticed ? net.notice : old ? t("old") : !down ? "" : byHand ? t("disconnected") : ended ? t("signed_out") :
    wasLive ? t("lost", clock(net.contact)) : t("connecting"));
  setText(bar.countdown, retrying && seconds > 0 ? t("retry_in", seconds) : retrying && wasLive ? t("retrying") : "");
  bar.retry.hidden = !retrying || seconds <= 0;
  bar.reload.hidden = !old;
  bar.login.hidden = byHand || !ended;
  setText(bar.waiting, n ? count("waiting", n) : "");
}

// ---- start ----

let lastTick = Date.now();

// Called each second, and when the page comes to be seen. A long pause means that the machine slept.
export function tick(justShown) {
  const now = Date.now(), slept = now - lastTick > sleepGap;
  lastTick = now;
  if (slept && !justShown && isVisible()) wake(true); // the timers of a hidden page are slow by themselves
  if (net.downSince) paintStatus();
}

export function startNet(countWaiting) {
  waiting = countWaiting;
  buildBar();
  byId("plug").hidden = false;
  byId("plug").addEventListener("click", plug);
  addEventListener("online", () => wake(true));
  addEventListener("offline", () => { if (net.socket) lose(); });
  addEventListener("pageshow", e => { if (e.persisted) wake(true); });
  document.addEventListener("visibilitychange", () => { if (isVisible()) { tick(true); wake(false); } });
  connect();
}
