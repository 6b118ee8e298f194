package main

import (
	"database/sql"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// speak says something in a room, and returns when all is on the disk.
func (d *daemon) speak(c *http.Client, room string, texts ...string) {
	d.t.Helper()
	p := d.socket(c, "/ws/chat/"+url.PathEscape(room)+"/")
	defer p.conn.Close()
	for _, text := range texts {
		p.send(opText, encodeJSON(chatFrame{Message: text}))
	}
	for range texts {
		if text, err := p.nextText(); err != nil {
			d.t.Fatalf("%s, %v", text, err)
		}
	}
}

// numbered is n texts, from "first" on.
func numbered(first, n int) (texts []string) {
	for i := range n {
		texts = append(texts, fmt.Sprint(first+i))
	}
	return texts
}

// newTab opens a tab and looks at it.
func (b *browser) newTab(url string) (handle string) {
	b.t.Helper()
	var tab struct{ Handle string }
	b.do("POST", b.session+"/window/new", anything{"type": "tab"}, &tab)
	b.lookAt(tab.Handle)
	if url != "" {
		b.open(url)
	}
	return tab.Handle
}

// lookAt turns to a tab. The others are hidden then.
func (b *browser) lookAt(tab string) {
	b.t.Helper()
	b.post("/window", anything{"handle": tab})
	b.devtools("Page.bringToFront", anything{})
	b.wait(`document.hasFocus()`)
}

// hide and show are for the window, which can be looked into while nobody sees it.
func (b *browser) hide() {
	b.t.Helper()
	b.post("/window/minimize", nil)
	b.wait(`document.hidden && !document.hasFocus()`)
}

func (b *browser) show() {
	b.t.Helper()
	b.post("/window/rect", anything{"width": 1200, "height": 800})
	b.devtools("Page.bringToFront", anything{})
	b.wait(`!document.hidden && document.hasFocus()`)
}

// aboutLog is what conditions about the log are made of.
const aboutLog = `const list = document.getElementById("messages"), pill = document.getElementById("newer"),
	rows = [...list.querySelectorAll("li[data-author]")], rowOf = text => rows.find(li => li.querySelector(".body").textContent === text),
	box = node => node.getBoundingClientRect(), top = li => (box(li.querySelector(".body")).top - box(list).top) / box(list).height,
	line = list.querySelector(".new")?.closest("li").querySelector(".body").textContent ?? "",
	badge = name => { const b = [...document.querySelectorAll("#side .rooms li")].find(li => li.querySelector(".name").textContent === name)?.querySelector(".badge");
		return b?.checkVisibility() ? (b.matches(".called") ? "@" : "") + b.querySelector("b").textContent : ""; },
	atEnd = rows.length && box(rows.at(-1)).bottom <= box(list).bottom + 1, offered = pill.checkVisibility() ? pill.innerText : "";`

func (b *browser) waitLog(condition string, args ...any) {
	b.t.Helper()
	b.wait(`(() => { `+aboutLog+` return `+condition+`; })()`, args...)
}

func (b *browser) ofLog(expression string, args ...any) any {
	b.t.Helper()
	return b.script(aboutLog+` return `+expression, args...)
}

func TestBrowserLog(t *testing.T) {
	needBrowser(t)
	t.Parallel()
	d := startDaemon(t, t.TempDir(), "-rate", "0")
	bob := d.setUp("bob")
	d.speak(bob, "lab", numbered(1, 500)...)
	d.addUser("alice") // 500 was said before her
	d.speak(bob, "lab", numbered(501, 126)...)

	// The last six are of the days around midnight where alice is, the others are older.
	const hours = 14
	now := time.Now().UTC().Add(hours * time.Hour)
	midnight := now.Truncate(24 * time.Hour).Add(-hours * time.Hour)
	d.stop()
	db, err := sql.Open("sqlite", filepath.Join(d.dir, "chatd.db"))
	if err != nil {
		t.Fatal(err)
	}
	setTime := func(where string, at time.Time) {
		t.Helper()
		if _, err := db.Exec("UPDATE log SET time = ? WHERE "+where, at.UnixMilli()); err != nil {
			t.Fatal(err)
		}
	}
	setTime("true", midnight.AddDate(0, 0, -5))
	for i, after := range []time.Duration{-30 * time.Hour, -6 * time.Minute, -2 * time.Minute, time.Second, 5*time.Minute + time.Second, 10*time.Minute + 2*time.Second} {
		setTime(fmt.Sprintf("body = '%d'", 621+i), midnight.Add(after))
	}
	db.Close()
	d.start()

	alice := startBrowser(t, "alice", "en")
	alice.devtools("Emulation.setTimezoneOverride", anything{"timezoneId": "Pacific/Kiritimati"})
	alice.signIn(d, "lab")
	alice.waitOnline()
	alice.waitLog(`atEnd && line === "" && rows.length === 50`)
	const days = `[...list.children].slice(-9).map(li => li.matches(".day") ? li.innerText : (li.querySelector(".avatar").checkVisibility() ? li.querySelector("time").textContent + " " : "") +
		li.querySelector(".body").textContent).join(", ")`
	want := now.Truncate(24*time.Hour).Add(-30*time.Hour).Format("Monday, January 2, 2006") + ", 18:00 621, Yesterday, 23:54 622, 623, Today, 00:00 624, 625, 00:10 626"
	if got := alice.ofLog(days); got != want {
		t.Errorf("the days are %v, want %s", got, want)
	}

	// More is unread than there is in the page: a link leads to the first of it.
	if got := alice.text("#unread"); got != "↑ 99+ unread messages: to the first" {
		t.Errorf("above the log stands %q", got)
	}
	alice.click("#unread")
	alice.waitOnline()
	alice.waitLog(`line === "501" && rows.length === 50 && top(rowOf("501")) >= 0 && top(rowOf("501")) < .4 && !document.getElementById("unread").checkVisibility()`)
	if got := alice.ofLog("offered"); got != "↓ To the newest messages" {
		t.Errorf("below old messages stands %q", got)
	}
	for _, last := range []string{"600", "626"} {
		alice.script(aboutLog + `list.scrollTop = 1e6`)
		alice.waitLog(`rows.at(-1) === rowOf(arguments[0]) && !list.innerText.includes("Newer messages")`, last)
	}

	// Pages of older ones, of which 300 rows are kept.
	for n := 176; n <= 276; n += 50 {
		alice.script(aboutLog + `list.scrollTop = 0`)
		alice.waitLog(`rows.length === arguments[0]`, n)
	}
	alice.script(aboutLog + `list.scrollTop = 0; window.held = rowOf("351"); window.was = top(held)`)
	alice.waitLog(`rows.length === 300 && rows[0] === rowOf("301") && Math.abs(top(held) - was) * box(list).height < 2`)
	d.speak(bob, "lab", "627")
	alice.waitLog(`offered === "↓ 1 new" && rows.length === 300 && !rowOf("627")`)
	alice.press("#messages", endKey)
	alice.waitLog(`atEnd && rowOf("627") && rows.length === 50 && !offered && document.activeElement === list`)

	// 500 come while she reads older ones: what she reads stays, and so does the page's size.
	alice.script(aboutLog + `list.scrollTop = 0`)
	alice.waitLog(`rows.length === 100`)
	alice.script(aboutLog + `list.scrollTop = 700; window.held = rows.find(li => top(li) > 0); window.was = top(held)`)
	d.speak(bob, "lab", numbered(628, 500)...)
	alice.waitLog(`offered === "↓ 500 new" && rows.length === 300 && Math.abs(top(held) - was) * box(list).height < 2`)
	alice.click("#newer")
	alice.waitLog(`atEnd && rows.at(-1) === rowOf("1127") && !offered`)
	d.speak(bob, "lab", "1128")
	alice.waitLog(`atEnd && rows.at(-1) === rowOf("1128")`)

	// A link to a message shows it in the upper third, marked. What is said does not come in there.
	alice.say("mine")
	id := alice.ofLog(`rowOf("1128").dataset.id`)
	d.speak(bob, "lab", numbered(1130, 60)...)
	alice.open(d.url(fmt.Sprintf("/chat/lab/?at=%v#m%[1]v", id)))
	alice.waitOnline()
	alice.waitLog(`rowOf("1128").matches(".target:target") && top(rowOf("1128")) > .2 && top(rowOf("1128")) < .45`)
	n := alice.ofLog(`rows.length`)
	d.speak(bob, "lab", "late")
	alice.waitLog(`offered === "↓ 1 new" && rows.length === arguments[0]`, n)
	alice.click("#newer")
	alice.waitLog(`atEnd && rowOf("late")`)

	// The arrow is for the newest message of her own, whatever was loaded since.
	alice.say("mine too")
	alice.script(aboutLog + `list.scrollTop = 0`)
	alice.waitLog(`rowOf("mine")`)
	alice.press("#text", arrowUp)
	alice.wait(`document.getElementById("text").value === "mine too"`)
}

func TestBrowserReading(t *testing.T) {
	needBrowser(t)
	t.Parallel()
	d := startDaemon(t, t.TempDir(), "-rate", "0")
	bob := d.setUp("bob")
	d.addUser("alice")
	laptop, phone := startBrowser(t, "alice", "en"), startBrowser(t, "alice", "zh-CN")
	laptop.signIn(d, "lab")
	phone.signIn(d, "side")
	laptop.waitOnline()
	phone.waitOnline()

	// What is seen is read, on all devices.
	d.speak(bob, "lab", "one")
	phone.waitLog(`document.querySelector("li[data-room=lab] time") && badge("lab") === ""`)
	laptop.waitLog(`line === "" && document.title === "lab – chatd"`)

	// What comes to a hidden window is not, and has a line above it for as long as it is being read.
	const icon = `document.querySelector("link[rel=icon]").href.startsWith("data:")`
	laptop.hide()
	d.speak(bob, "lab", "two")
	laptop.waitLog(`document.title === "• lab – chatd" && badge("lab") === "1" && ` + icon)
	d.speak(bob, "lab", "@alice three", "@all four")
	laptop.waitLog(`document.title === "(2) lab – chatd" && badge("lab") === "@2" && line === "two"`)
	phone.waitLog(`badge("lab") === "@2"`)
	laptop.show()
	phone.waitLog(`badge("lab") === ""`)
	d.speak(bob, "lab", "five")
	laptop.waitLog(`rowOf("five") && line === "two" && document.title === "lab – chatd" && badge("lab") === "" && !` + icon)
	laptop.say("six")
	laptop.waitLog(`line === ""`)
	laptop.hide()
	d.speak(bob, "lab", "seven")
	laptop.waitLog(`line === "seven"`)
	laptop.show()
	phone.waitLog(`badge("lab") === ""`)
	laptop.hide()
	d.speak(bob, "lab", "eight")
	laptop.waitLog(`line === "eight" && badge("lab") === "1"`)
	laptop.show()
	phone.waitLog(`badge("lab") === ""`)

	// What is marked unread stays so, whatever comes, until she says that it is read.
	laptop.click("#messages li:nth-last-child(2) .more")
	laptop.click("#actions > button:last-child")
	phone.waitLog(`badge("lab") === "2"`)
	laptop.waitLog(`line === "seven" && badge("lab") === "2"`)
	d.speak(bob, "lab", "nine")
	laptop.waitLog(`rowOf("nine") && atEnd && badge("lab") === "3"`)
	laptop.hide()
	laptop.show()
	d.speak(bob, "den", "ten") // after all that could have been read by now
	laptop.waitLog(`badge("den") === "1" && badge("lab") === "3"`)
	laptop.press("body", escape)
	phone.waitLog(`badge("lab") === ""`)

	// Nor is read what is below what she reads.
	laptop.hide()
	d.speak(bob, "lab", numbered(1, 40)...)
	phone.waitLog(`badge("lab") === "40"`)
	laptop.show()
	phone.waitLog(`badge("lab") === ""`)
	laptop.waitLog(`rowOf("40") && (list.scrollTop = 0) === 0`)
	d.speak(bob, "lab", "below")
	laptop.waitLog(`offered === "↓ 1 new" && badge("lab") === "1"`)
	phone.waitLog(`badge("lab") === "1"`)
	laptop.click("#newer")
	phone.waitLog(`badge("lab") === ""`)

	// Direct messages mention her, wherever she looks. The line is there when she comes.
	d.speak(bob, "@alice", "psst")
	laptop.waitLog(`badge("@bob") === "@1" && document.title === "(1) lab – chatd"`)
	phone.waitLog(`badge("@bob") === "@1"`)
	phone.click(`#directs a`)
	phone.waitLog(`line === "psst" && badge("den") === "1"`)
	laptop.waitLog(`badge("@bob") === "" && document.title === "• lab – chatd"`)
}

func TestBrowserNotify(t *testing.T) {
	needBrowser(t)
	t.Parallel()
	d := startDaemon(t, t.TempDir(), "-rate", "0")
	bob, phone := d.setUp("bob"), d.addUser("alice")
	for _, room := range []string{"lab", "side", "all", "none"} {
		d.speak(bob, room, "first")
	}
	for _, room := range []string{"all", "none"} {
		d.post(phone, "/chat/"+room+"/about/", url.Values{"action": {"notify"}, "notify": {room}})
	}
	alice := startBrowser(t, "alice", "en")
	alice.signIn(d, "lab")
	alice.devtools("Browser.grantPermissions", anything{"permissions": []string{"notifications"}})
	alice.click(".menu summary")
	alice.click("#switches button:nth-child(1)")
	alice.wait(`[...document.querySelectorAll("#switches button")].map(b => b.innerText + " " + b.ariaPressed).join() ===
		"Notify on the desktop true,Sound false,Enter makes a new line false"`)
	lab, side, elsewhere := alice.tab(), alice.newTab(""), alice.newTab(d.url("/healthz"))
	for tab, room := range map[string]string{lab: "lab", side: "side"} {
		alice.lookAt(tab)
		alice.devtools("Page.addScriptToEvaluateOnNewDocument", anything{"source": `window.Notification = class extends Notification {
			constructor(title, how) { super(title, how); localStorage["told/" + Math.random()] = title + ": " + how.body; } }`})
		alice.open(d.url(roomPath(room)))
		alice.waitOnline()
	}
	expectTold := func(want ...string) {
		t.Helper()
		alice.wait(`Object.entries(localStorage).flatMap(([key, text]) => key.startsWith("told/") ? [text] : []).sort().join() === arguments[0]`, strings.Join(want, ","))
	}

	// She looks at a page of chatd: numbers tell her enough.
	alice.lookAt(side)
	d.speak(bob, "side", "@alice seen")
	d.speak(bob, "lab", "@alice in the other tab")
	alice.waitLog(`rowOf("@alice seen") && badge("lab") === "@1"`)

	// She looks elsewhere: one tab tells her what each room's level is for, and that only.
	alice.lookAt(elsewhere)
	d.speak(bob, "lab", "not for her", "@alice for her")
	d.speak(bob, "all", "anything")
	d.speak(bob, "none", "@alice nothing")
	d.speak(bob, "@alice", "psst")
	told := []string{"bob – all: anything", "bob – lab: @alice for her", "bob: psst"}
	expectTold(told...)

	// What is said before the page is back online is told too.
	d.kill()
	d.start()
	d.speak(bob, "lab", "@alice missed")
	told = slices.Insert(told, 2, "bob – lab: @alice missed")
	expectTold(told...)
	for _, tab := range []string{lab, side} {
		alice.lookAt(tab)
		alice.waitLog(`badge("all") === "2"`)
	}
	expectTold(told...)
}

func TestBrowserRooms(t *testing.T) {
	needBrowser(t)
	t.Parallel()
	d := startDaemon(t, t.TempDir(), "-rate", "0")
	bob := d.setUp("bob")
	d.addUser("alice")
	alice := startBrowser(t, "alice", "en")
	alice.signIn(d, "lab")
	alice.waitOnline()
	change := func(room string, form ...string) {
		t.Helper()
		v := url.Values{"action": {form[0]}}
		if len(form) > 1 {
			v.Set(form[1], form[2])
		}
		d.post(bob, roomPath(room)+"about/", v)
	}
	const list = `[...document.querySelectorAll("#side .rooms li")].map(li => li.querySelector(".name").textContent +
		(li.matches(".archived") ? " archived" : "") + (badge(li.querySelector(".name").textContent) && " " + badge(li.querySelector(".name").textContent))).join()`

	// Rooms come, are called otherwise with what is unread in them, and go.
	d.speak(bob, "side", "@alice hello")
	alice.waitLog(list + ` === "lab,side @1" && !document.querySelector(".draft").checkVisibility()`)
	change("side", "rename", "name", "aside")
	alice.waitLog(list + ` === "aside @1,lab"`)
	change("aside", "archive")
	alice.waitLog(list + ` === "aside archived @1,lab"`)
	d.post(bob, "/chat/", url.Values{"private": {"den"}})
	change("den", "add", "member", "alice")
	alice.waitLog(list + ` === "aside archived @1,den,lab"`)
	change("den", "remove", "member", "alice")
	alice.waitLog(list + ` === "aside archived @1,lab"`)

	// The room that she is in is renamed, archived and restored while she writes.
	alice.press("#text", "half a thought")
	change("lab", "rename", "name", "workshop")
	alice.wait(`location.pathname === "/chat/workshop/" && document.getElementById("text").value === "half a thought" && document.body.dataset.state === "online"`)
	change("workshop", "topic", "topic", "tools")
	alice.wait(`document.querySelector(".topic").innerText === "tools"`)
	change("workshop", "archive")
	alice.wait(`!document.getElementById("composer") && /archived/.test(document.querySelector(".notice").innerText) && document.body.dataset.state === "online"`)
	change("workshop", "restore")
	alice.wait(`document.getElementById("text")?.value === "half a thought" && document.body.dataset.state === "online"`)

	// The same while she is away.
	alice.setNetwork(false)
	alice.wait(`document.body.dataset.state === "offline"`)
	change("workshop", "rename", "name", "attic")
	change("aside", "rename", "name", "beside")
	d.speak(bob, "attic", "up here")
	alice.setNetwork(true)
	alice.waitLog(`location.pathname === "/chat/attic/" && rowOf("up here") && ` + list + ` === "attic,beside archived @1"`)

	// Who is put out of a private room is not left in it.
	change("den", "add", "member", "alice")
	alice.click(`#rooms li[data-room=den] a`)
	alice.waitOnline()
	change("den", "remove", "member", "alice")
	alice.wait(`location.pathname === "/chat/" && !document.body.innerText.includes("den")`)
}

func TestBrowserConnection(t *testing.T) {
	needBrowser(t)
	t.Parallel()
	d := startDaemon(t, t.TempDir(), "-rate", "0")
	bob, elsewhere := d.setUp("bob"), d.addUser("alice")
	d.speak(bob, "lab", "old")
	alice := startBrowser(t, "alice", "zh-CN")
	alice.signIn(d, "lab")
	d.stop()
	path := filepath.Join(d.dir, "chatd.db")
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	d.start()
	alice.waitOnline()
	const bar = `(document.querySelector("#status:not([hidden])")?.innerText ?? "").replace(/\s+/g, " ")`
	status := func(pattern string) {
		t.Helper()
		alice.wait(`new RegExp(arguments[0]).test(`+bar+`)`, pattern)
	}

	// A server that is gone for long. Nobody is told of a moment.
	d.kill()
	alice.wait(`document.body.dataset.state === "offline" && ` + bar + ` === ""`)
	alice.say("one")
	status(`^连接已于 \d\d:\d\d 断开.*[3-9] 秒后重连.*立即重连.*1 条消息待发送`)
	d.start()
	alice.click("#status button:not([hidden])")
	status(`^已重新连接$`)
	alice.expect("bob: old", "alice: one")
	status(`^$`)

	// Without a network.
	alice.setNetwork(false)
	status(`^连接已于`)
	d.speak(bob, "lab", "two", "three")
	alice.setNetwork(true)
	status(`^已重新连接，补上 2 条错过的消息$`)
	alice.expect("bob: old", "alice: one", "bob: two", "bob: three")

	// By hand.
	if got := alice.text("#plug"); got != "断开连接" {
		t.Errorf("the button says %q", got)
	}
	alice.click("#plug")
	status(`^\[断开连接\]$`)
	alice.say("four")
	status(`^\[断开连接\].*1 条消息待发送$`)
	alice.script(`dispatchEvent(new Event("online"))`)
	alice.expectNow("bob: old", "alice: one", "bob: two", "bob: three", "alice: four (pending)")
	alice.click("#plug")
	status(`^\[连接成功\]$`)
	alice.expect("bob: old", "alice: one", "bob: two", "bob: three", "alice: four")

	// A page that is older than the server.
	alice.script(`document.body.dataset.version = "old"`)
	alice.setNetwork(false)
	alice.wait(`document.body.dataset.state === "offline"`)
	alice.setNetwork(true)
	status(`页面有新版本`)
	alice.click("#status button:not([hidden])")
	alice.wait(`document.body.dataset.version !== "old" && document.body.dataset.state === "online"`)
	status(`^$`)

	// A backup was restored: what the page has is not there any more.
	d.stop()
	for _, suffix := range []string{"", "-wal", "-shm"} {
		os.Remove(path + suffix)
	}
	if err := os.WriteFile(path, old, 0o600); err != nil {
		t.Fatal(err)
	}
	d.start()
	alice.expect("bob: old")

	// Signed out from another device.
	d.post(elsewhere, "/account/sessions", url.Values{"all": {"1"}})
	status(`^登录已失效，未发送的内容仍保留在这里。`)
	alice.say("five")
	alice.expectNow("bob: old", "alice: five (pending)")
	alice.click("#status a")
	alice.press("[name=username]", "alice")
	alice.press("[name=password]", testPassword+enterKey)
	alice.expect("bob: old", "alice: five")
}
