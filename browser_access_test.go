package main

import (
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
)

// More keys, as WebDriver names them.
const (
	shiftKey = "\uE008"
	ctrlKey  = "\uE009"
	altKey   = "\uE00A"
	pageUp   = "\uE00E"
	endKey   = "\uE010"
)

// keys presses keys where the focus is: each argument is one or some that are held together.
func (b *browser) keys(chords ...string) {
	b.t.Helper()
	var actions []anything
	for _, chord := range chords {
		keys := []rune(chord)
		for _, key := range keys {
			actions = append(actions, anything{"type": "keyDown", "value": string(key)})
		}
		for _, key := range slices.Backward(keys) {
			actions = append(actions, anything{"type": "keyUp", "value": string(key)})
		}
	}
	b.post("/actions", anything{"actions": []anything{{"type": "key", "id": "keyboard", "actions": actions}}})
}

func (b *browser) focused(css string) bool {
	b.t.Helper()
	return b.script(`return document.activeElement.matches(arguments[0])`, css) == true
}

// expectFocus waits until something has the focus.
func (b *browser) expectFocus(css string) {
	b.t.Helper()
	b.wait(`document.activeElement.matches(arguments[0])`, css)
}

// reach presses a key until the focus is on something.
func (b *browser) reach(key, css string) {
	b.t.Helper()
	for range 100 {
		if b.focused(css) {
			return
		}
		b.keys(key)
	}
	b.t.Fatalf("%s does not get to %s, but to %v", b.name, css, b.script(`return document.activeElement.outerHTML.slice(0, 500)`))
}

// resize sets the size of the page in CSS pixels, and whether a finger points.
func (b *browser) resize(width, height int, touch bool) {
	b.t.Helper()
	b.devtools("Emulation.setDeviceMetricsOverride", anything{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false})
	b.devtools("Emulation.setTouchEmulationEnabled", anything{"enabled": touch})
}

// prefer sets a feature of the media, such as prefers-color-scheme.
func (b *browser) prefer(feature, value string) {
	b.t.Helper()
	b.devtools("Emulation.setEmulatedMedia", anything{"features": []anything{{"name": feature, "value": value}}})
}

// audit has testdata/audit.js judge the page as it is.
func (b *browser) audit(where string, what ...string) {
	b.t.Helper()
	js, err := os.ReadFile("testdata/audit.js")
	if err != nil {
		b.t.Fatal(err)
	}
	for _, what := range what {
		if found := b.script(string(js), what); found != "" {
			b.t.Errorf("%s of %s:\n%s", what, where, found)
		}
	}
}

// askDevtools is devtools for an answer.
func (b *browser) askDevtools(command string, answer any) {
	b.t.Helper()
	b.do("POST", b.session+"/goog/cdp/execute", anything{"cmd": command, "params": anything{}}, answer)
}

// tree checks the names and roles that Chromium has for screen readers, and that these roles are among them.
func (b *browser) tree(where string, roles ...string) {
	b.t.Helper()
	type value struct{ Value any }
	var tree struct {
		Nodes []struct {
			Ignored    bool
			Role, Name value
			Properties []struct {
				Name  string
				Value value
			}
		}
	}
	b.askDevtools("Accessibility.getFullAXTree", &tree)
	seen := map[any]bool{}
	for _, node := range tree.Nodes {
		if node.Ignored {
			continue
		}
		role := node.Role.Value
		seen[role] = true
		needed := role == "image" || role == "dialog"
		for _, p := range node.Properties {
			needed = needed || p.Name == "focusable" && p.Value.Value == true && role != "main"
		}
		if name, _ := node.Name.Value.(string); needed && strings.TrimSpace(name) == "" {
			b.t.Errorf("%s has a %v without a name", where, role)
		}
	}
	for _, role := range roles {
		if !seen[role] {
			b.t.Errorf("%s has no %s", where, role)
		}
	}
}

// look judges a page, or a state of one, in all ways but sizes.
func (b *browser) look(where string) {
	b.t.Helper()
	b.tree(where)
	b.audit(where, "names")
	for _, scheme := range []string{"light", "dark"} {
		b.prefer("prefers-color-scheme", scheme)
		b.audit(where+", "+scheme, "contrast", "focus")
	}
}

// TestBrowserPages judges every page: what a screen reader is told, contrasts in
// light and dark, and whether it fits on small screens and below fingers.
func TestBrowserPages(t *testing.T) {
	needBrowser(t)
	t.Parallel()
	d := startDaemon(t, t.TempDir(), "-guests", "-register")
	alice := startBrowser(t, "alice", "en")
	alice.keys(tabKey) // from now on the focus is shown
	long := strings.Repeat("long", 16)
	judge := func(path string) {
		t.Helper()
		alice.open(d.url(path))
		alice.resize(1200, 800, false)
		alice.look(path)
		alice.tree(path, "banner", "main")
		alice.resize(640, 400, false)
		alice.audit(path+" at 640", "sizes")
		alice.resize(320, 640, true)
		alice.audit(path+" at 320", "sizes", "touch")
	}
	judge("/setup?token=" + d.await(setUpLink))
	admin := d.setUp("alice")
	bob := d.addUser("bob" + long[:29])
	judge("/login/?next=/chat/lab/")
	judge("/register/")
	alice.open(d.url("/login/?next=/account/"))
	alice.press("[name=username]", "alice")
	alice.press("[name=password]", testPassword+enterKey)
	alice.find(".person")

	say := func(room, text string) {
		t.Helper()
		d.post(bob, roomPath(room), url.Values{"message": {text}})
	}
	say(long, "word "+long+long)
	d.post(admin, roomPath(long)+"about/", url.Values{"action": {"topic"}, "topic": {long + long}})
	d.post(admin, "/chat/", url.Values{"private": {"plans"}})
	d.post(admin, "/push?room=plans", url.Values{"text": {long}, "every": {"1h"}, "times": {"2"}})
	d.post(admin, "/admin/hooks", url.Values{"action": {"hook.create"}, "room": {long}, "username": {"robot"}, "url": {"https://hook.test/" + long}, "mention": {"1"}})
	d.post(admin, "/account/tokens", url.Values{"scope": {"both"}, "label": {long}})
	invite := alice.script(`const html = await (await fetch("/admin/invites", { method: "POST", body: new URLSearchParams({ kind: "account", days: 7, uses: 1 }) })).text();
		return new URL(new DOMParser().parseFromString(html, "text/html").getElementById("link").value).pathname`).(string)
	alice.open(d.url(roomPath(long)))
	said := alice.script(`return document.querySelector("#messages li[data-id]").dataset.id`).(string)
	pages := []string{"/chat/", "/account/", invite, "/search/", "/search/?q=word", roomPath(long) + "edits/" + said, roomPath(long) + "about/", roomPath("plans") + "about/", "/nothing",
		"/admin/", "/admin/users/", "/admin/messages/", "/admin/rooms/", "/admin/invites/", "/admin/hooks/", "/admin/audit/"}
	for _, path := range pages {
		judge(path)
	}
	d.post(admin, "/account/settings", url.Values{"language": {"zh"}, "notify": {"mentions"}})
	for _, path := range pages {
		alice.open(d.url(path))
		alice.find("html[lang=zh]")
		alice.tree(path + " in Chinese")
	}
}

// TestBrowserRoomLooks judges a room with all that can be in it and open above it.
func TestBrowserRoomLooks(t *testing.T) {
	needBrowser(t)
	t.Parallel()
	d := startDaemon(t, t.TempDir(), "-rate", "0")
	d.setUp("alice")
	bob := d.addUser("bob")
	long := strings.Repeat("long", 16)
	for _, text := range []string{"first", "hi @alice, **bold** `code` https://example.org/" + long, long + long,
		"```\n" + long + long + "\n```\n> said " + long, strings.Repeat("line\n", 20)} {
		d.post(bob, "/chat/lab/", url.Values{"message": {text}})
	}
	for n := range historyPage {
		d.post(bob, roomPath(long), url.Values{"message": {fmt.Sprint(n)}})
	}
	alice := startBrowser(t, "alice", "en")
	alice.signIn(d, "lab")
	alice.waitOnline()
	first := alice.script(`const post = async frame => (await (await fetch("", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(frame) })).json()).id;
		const first = Number(document.querySelector("#messages li[data-id]").dataset.id);
		const mine = await post({ message: "mine", reply_to: first });
		await post({ type: "edit", id: mine, message: "changed" });
		await post({ type: "delete", id: await post({ message: "gone" }) });
		for (const emoji of ["👍", "🎉"]) await post({ type: "react", id: first, emoji, on: true });
		localStorage.setItem("chatd//alice/outbox", JSON.stringify([{ cid: "c", time: Date.now(), room: "lab", message: "refused", reason: "No." }]));
		return first;`)
	alice.reload()
	alice.waitOnline()

	toggle := func() { alice.script(`document.getElementById("plug").click()`) }
	closeIt := func() { alice.keys(escape) }
	reply := func() {
		alice.click("#messages li[data-id] .more")
		alice.click("#actions > button")
	}
	states := []struct {
		name         string
		enter, leave func()
	}{
		{"room", func() {}, func() {}},
		{"header's menu", func() { alice.click(".menu summary") }, closeIt},
		{"row's menu", func() { alice.click("#messages li.own .more") }, closeIt},
		{"picker", func() { alice.click("#emoji") }, closeIt},
		{"switcher", func() { alice.keys(ctrlKey + "k") }, closeIt},
		{"help", func() { alice.click(".menu summary"); alice.click("#help") }, closeIt},
		{"edits", func() { alice.click("#messages .mark a"); alice.find("dialog[open]") }, closeIt},
		{"reply", reply, closeIt},
		{"completion", func() { alice.press("#text", "@b") }, func() { alice.press("#text", escape+backspace+backspace) }},
		{"disconnected", func() { toggle(); alice.say("later") }, func() { toggle(); alice.waitOnline() }},
	}
	for _, s := range states {
		s.enter()
		alice.look("the " + s.name)
		s.leave()
	}
	alice.tree("the room", "banner", "navigation", "main", "complementary", "search", "log")

	// Who wants it dark has it dark, whatever the system says.
	alice.prefer("prefers-color-scheme", "light")
	const background = `return getComputedStyle(document.body).backgroundColor`
	light := alice.script(background)
	alice.click(".menu summary")
	alice.click("[name=theme][value=dark]")
	alice.wait(`document.documentElement.dataset.theme === "dark"`)
	if alice.script(background) == light {
		t.Error("it is as light as before")
	}
	start := alice.script(`const link = document.querySelector("link[rel=manifest]").href, { start_url, icons } = await (await fetch(link)).json();
		for (const { src } of icons) await Object.assign(new Image(), { src: new URL(src, link) }).decode();
		return start_url`)
	if start != "/chat/" {
		t.Errorf("the manifest starts at %v", start)
	}

	alice.click(".menu summary")
	alice.click("[name=lang][value=zh]")
	alice.wait(`document.documentElement.lang === "zh"`)
	alice.resize(320, 640, true)
	alice.open(d.url(fmt.Sprintf("/chat/lab/?at=%v#m%v", first, first)))
	alice.waitOnline()
	if alice.focused("#text") {
		t.Error("the composer has the focus, and a keyboard covers the room")
	}
	alice.press("#text", "one"+enterKey+"two")
	if got := alice.value("#text"); got != "one\ntwo" {
		t.Errorf("Enter below a finger made %q", got)
	}
	alice.click("#send")
	states = append(states, states[0])
	states[len(states)-1].name = "drawer"
	states[len(states)-1].enter = func() { alice.click("#drawer"); alice.wait(`document.getAnimations().length === 0`) }
	states[len(states)-1].leave = func() {
		alice.keys(escape)
		alice.expectFocus("#drawer")
		alice.wait(`document.getAnimations().length === 0`)
	}
	for _, s := range states {
		s.enter()
		alice.tree("聊天室, " + s.name)
		alice.audit("the "+s.name+" at 320", "sizes", "touch")
		s.leave()
	}
	alice.resize(640, 400, false)
	alice.audit("the room at 640", "sizes")

	// The one thing that moves is the drawer, and not for who wants nothing to move.
	alice.prefer("prefers-reduced-motion", "reduce")
	alice.click("#drawer")
	if alice.script(`return document.getAnimations().length`) != 0.0 {
		t.Error("the drawer moves")
	}
}

// TestBrowserKeys does by keys alone what a mouse can do.
func TestBrowserKeys(t *testing.T) {
	needBrowser(t)
	t.Parallel()
	d := startDaemon(t, t.TempDir(), "-rate", "0")
	d.setUp("alice")
	bob := d.addUser("bob")
	say := func(room, text string) {
		t.Helper()
		d.post(bob, roomPath(room), url.Values{"message": {text}})
	}
	for n := range historyPage {
		say("lab", fmt.Sprint("line ", n))
	}
	say("quiet", "hush")
	alice := startBrowser(t, "alice", "en")
	at := func(room string) {
		t.Helper()
		alice.wait(`decodeURI(location.pathname) === arguments[0] && document.body.dataset.state === "online"`, "/chat/"+room+"/")
	}

	// To the room.
	alice.open(d.url("/login/?next=" + url.QueryEscape("/chat/lab/")))
	alice.reach(shiftKey+tabKey, ".skip")
	alice.wait(`document.activeElement.getBoundingClientRect().top >= 0`)
	alice.keys(enterKey)
	alice.expectFocus("main")
	alice.reach(tabKey, "[name=username]")
	alice.paste("alice")
	alice.keys(tabKey)
	alice.paste(testPassword)
	alice.keys(enterKey)
	at("lab")
	alice.expectFocus("#text")
	alice.keys(escape) // all is read

	// Between rooms.
	say("lobby", "first")
	say("大厅", "@alice 你好")
	alice.wait(`document.querySelector('[data-room="大厅"] .called')`)
	if alice.script(`return [...document.querySelectorAll(".draft")].some(hint => hint.checkVisibility())`) == true {
		t.Error("a new room seems to have a draft")
	}
	alice.keys(ctrlKey + "k")
	alice.expectFocus("dialog input")
	alice.keys(escape)
	alice.expectFocus("#text")
	alice.keys(ctrlKey+"k", "q", "t")
	alice.wait(`document.querySelector("#places [aria-selected=true] bdi")?.textContent === "quiet"`)
	alice.keys(enterKey)
	at("quiet")
	alice.keys(escape, altKey+arrowUp)
	at("lobby")
	alice.keys(altKey + shiftKey + arrowDown)
	at("大厅")
	alice.keys(ctrlKey+"k", "l", "a", "b", enterKey)
	at("lab")

	// What can be done with a message. The last row's menu is the next thing before the composer.
	alice.keys("h", "i", enterKey)
	const last = "#messages li[data-id]:last-child "
	alice.find(last + ".body")
	menu := func(row, item string) {
		t.Helper()
		alice.reach(shiftKey+tabKey, row+".more")
		alice.keys(enterKey)
		alice.expectFocus("#actions button")
		for range 20 {
			if alice.script(`return document.activeElement.textContent`) == item {
				alice.keys(enterKey)
				return
			}
			alice.keys(arrowDown)
		}
		t.Fatalf("no key gets to %s", item)
	}
	alice.wait(`document.querySelector("` + last + `.more") && !document.querySelector(".pending")`)
	alice.reach(shiftKey+tabKey, last+".more")
	alice.keys(enterKey, arrowRight, arrowRight, arrowDown, arrowUp, escape)
	alice.expectFocus(last + ".more")
	alice.keys(enterKey, enterKey)
	alice.wait(`document.querySelector("` + last + `.reaction")?.textContent === "👍 1"`)
	alice.expectFocus(last + ".more")
	alice.reach(shiftKey+tabKey, last+".reaction")
	alice.keys(" ")
	alice.wait(`!document.querySelector("` + last + `.reaction")`)
	alice.reach(tabKey, "#text")
	menu(last, "Copy link")
	alice.wait(`document.querySelector("#status:not([hidden])")?.innerText === "Copied"`)
	alice.expectFocus(last + ".more")
	menu(last, "Edit")
	alice.expectFocus("#text")
	alice.keys("!", enterKey)
	alice.wait(`document.querySelector("` + last + `.body").textContent === "hi!" && document.querySelector("` + last + `.mark a")`)
	alice.reach(shiftKey+tabKey, last+".mark a")
	alice.keys(enterKey)
	alice.expectFocus("dialog *")
	alice.keys(escape)
	alice.expectFocus(last + ".mark a")
	alice.reach(tabKey, "#text")
	menu(last, "Delete")
	alice.expectFocus("#actions .bad")
	alice.keys(enterKey)
	alice.find(last + ".body:not(:empty)")
	alice.wait(`document.querySelector("` + last + `").matches(".deleted")`)
	alice.expectFocus("#messages *")
	alice.reach(tabKey, "#text")
	menu("#messages li:not(.own) ", "Reply")
	alice.expectFocus("#text")
	alice.keys("o", "k", enterKey)
	alice.wait(`document.querySelector("` + last + `.quote")?.innerText.includes("line 49")`)
	alice.reach(shiftKey+tabKey, last+".quote")
	alice.keys(enterKey)
	alice.reach(tabKey, "#back")
	alice.keys(enterKey)
	alice.expectFocus(".quote")
	menu("#messages li:not(.own) ", "Mark unread from here")
	alice.find("#messages .new")
	alice.expectFocus(".more")

	// Below the log.
	alice.reach(tabKey, "#messages + .foot #emoji")
	alice.keys(enterKey, arrowRight, arrowRight, arrowDown, enterKey)
	alice.expectFocus("#text")
	if got := alice.value("#text"); got == "" || len(got) > 8 {
		t.Errorf("the picker gave %q", got)
	}
	alice.keys(tabKey, enterKey, escape)
	alice.expectFocus("#emoji")
	alice.keys(tabKey, "?")
	alice.expectFocus("dialog *")
	alice.keys(escape)
	alice.expectFocus("#send")
	alice.keys("/")
	alice.expectFocus(".search input")

	// The header.
	alice.reach(tabKey, "#people-switch")
	alice.keys(enterKey)
	alice.wait(`!document.getElementById("crowd").checkVisibility()`)
	alice.keys(enterKey)
	alice.wait(`document.getElementById("crowd").checkVisibility()`)
	alice.keys(tabKey, enterKey)
	alice.reach(tabKey, ".switch:nth-child(3)")
	alice.keys(" ")
	alice.wait(`document.activeElement.getAttribute("aria-pressed") === "true"`)
	alice.keys(" ", escape)
	alice.expectFocus("summary")
	alice.keys(enterKey)
	alice.reach(tabKey, "#help")
	alice.keys(enterKey)
	alice.expectFocus("dialog *")
	alice.keys(escape)
	alice.expectFocus("summary")

	// Up in the log, and back to its end.
	alice.reach(tabKey, "#messages")
	alice.script(`document.getElementById("messages").addEventListener("scrollend", e => { window.rests = e.target.scrollTop; })`)
	alice.keys(pageUp)
	alice.wait(`window.rests + 200 < document.getElementById("messages").scrollHeight - document.getElementById("messages").clientHeight`)
	say("lab", "news")
	alice.wait(`document.getElementById("newer").innerText.includes("1")`)
	alice.reach(shiftKey+tabKey, "#messages")
	alice.keys(endKey)
	const ended = `(m => m.scrollHeight - m.scrollTop - m.clientHeight < 2)(document.getElementById("messages")) && document.getElementById("newer").hidden`
	alice.wait(ended)

	// A narrow page.
	alice.resize(390, 700, false)
	alice.reach(shiftKey+tabKey, "#drawer")
	alice.keys(enterKey)
	alice.expectFocus("#side *")
	alice.keys(escape)
	alice.expectFocus("#drawer")
	alice.keys(enterKey)
	alice.expectFocus("#side *")
	alice.post("/back", nil)
	alice.expectFocus("#drawer")
	alice.keys(enterKey)
	alice.reach(tabKey, "#people a")
	alice.reach(shiftKey+tabKey, "[data-room=quiet] a")
	alice.keys(enterKey)
	at("quiet")
	alice.wait(`location.hash === "" && !document.getElementById("side").checkVisibility({ visibilityProperty: true })`)
}
