package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// Keys as WebDriver names them.
const (
	enterKey   = "\uE007"
	backspace  = "\uE003"
	escape     = "\uE00C"
	tabKey     = "\uE004"
	arrowLeft  = "\uE012"
	arrowUp    = "\uE013"
	arrowRight = "\uE014"
	arrowDown  = "\uE015"
	shiftEnter = "\uE008\uE007\uE000" // the last one lets go of Shift
	ctrlEnter  = "\uE009\uE007\uE000"
	selectAll  = "\uE009a\uE000"
	undoKeys   = "\uE009z\uE000"
	pasteKeys  = "\uE009v\uE000"
)

const patience = 40 * time.Second // how long a page may take to come to show something

// browser is a headless Chromium with one tab, driven by a chromedriver of its own.
type browser struct {
	t       *testing.T
	name    string // of who sits at it
	url     string // of its chromedriver
	session string // path
}

// needBrowser finds Chromium and chromedriver. Without them the test is skipped,
// but not in CI, where nobody would notice.
func needBrowser(t *testing.T) (chromium, driver string) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: no browser tests")
	}
	driver, missing := exec.LookPath("chromedriver")
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil && missing == nil {
			return path, driver
		}
	}
	need(t, "install chromium and chromium-driver to run the browser tests")
	return "", ""
}

// startBrowser opens a browser for somebody who reads lang. It is closed at the
// end of the test.
func startBrowser(t *testing.T, name, lang string, switches ...string) *browser {
	t.Helper()
	chromium, driver := needBrowser(t)
	switches = append(switches,
		"--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
		"--disable-background-networking", "--disable-component-update", "--window-size=1200,800",
		"--lang="+lang, "--accept-lang="+lang, "--user-data-dir="+t.TempDir())
	cmd, url := startDriver(t, driver)
	b := &browser{t: t, name: name, url: url}
	t.Cleanup(func() {
		if err := b.ask("GET", "/shutdown", nil, nil); err != nil { // kill alone would leave Chromium behind
			t.Error(err)
			cmd.Process.Kill()
		}
		wait(cmd)
	})
	var session struct{ SessionID string }
	b.do("POST", "/session", anything{"capabilities": anything{"alwaysMatch": anything{
		"goog:chromeOptions": anything{"binary": chromium, "args": switches},
		"goog:loggingPrefs":  anything{"browser": "ALL"},
		"timeouts":           anything{"implicit": patience.Milliseconds(), "script": patience.Milliseconds()},
	}}}, &session)
	b.session = "/session/" + session.SessionID
	t.Cleanup(b.inspect)
	return b
}

// startDriver starts chromedriver on a port of its choice. It chooses one for
// IPv4 and then wants the same for IPv6, where another may have been faster: it
// then ends at once, and is started again.
func startDriver(t *testing.T, driver string) (cmd *exec.Cmd, url string) {
	t.Helper()
	started := regexp.MustCompile(`started successfully on port (\d+)`)
	var said strings.Builder
	for range 5 {
		cmd := exec.Command(driver, "--port=0")
		stdout, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		hangs := time.AfterFunc(patience, func() { cmd.Process.Kill() })
		for lines := bufio.NewScanner(stdout); lines.Scan(); said.WriteString(lines.Text() + "\n") {
			if m := started.FindStringSubmatch(lines.Text()); m != nil {
				hangs.Stop()
				return cmd, "http://127.0.0.1:" + m[1]
			}
		}
		cmd.Wait()
	}
	t.Fatalf("chromedriver does not start:\n%s", &said)
	return nil, ""
}

// inspect fails the test if the page has complained on the console in a way that
// no outage explains, and takes a picture if the test has failed.
func (b *browser) inspect() {
	var complaints []struct{ Source, Message string }
	b.do("POST", b.session+"/se/log", anything{"type": "browser"}, &complaints)
	for _, c := range complaints {
		if c.Source == "javascript" || c.Source == "security" {
			b.t.Errorf("the console of %s: %s", b.name, c.Message)
		}
	}
	if !b.t.Failed() {
		return
	}
	var png []byte // comes in base64, as JSON has it
	b.do("GET", b.session+"/screenshot", nil, &png)
	path := filepath.Join(b.t.ArtifactDir(), b.name+".png")
	b.t.Logf("what %s saw, kept with -artifacts: %s %v", b.name, path, os.WriteFile(path, png, 0o600))
}

type anything = map[string]any

// ask sends a WebDriver command.
func (b *browser) ask(method, path string, in anything, out any) error {
	if in == nil {
		in = anything{}
	}
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	r, err := http.NewRequest(method, b.url+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Timeout: 3 * patience}).Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var answer struct{ Value json.RawMessage }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		var problem struct{ Message string }
		json.Unmarshal(answer.Value, &problem) // the rest is addresses within chromedriver
		return fmt.Errorf("%s %s: %s", b.name, path, problem.Message)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(answer.Value, out)
}

// do is ask for what has to work.
func (b *browser) do(method, path string, in anything, out any) {
	b.t.Helper()
	if err := b.ask(method, path, in, out); err != nil {
		b.t.Fatal(err)
	}
}

// post sends a command to the session.
func (b *browser) post(path string, in anything) {
	b.t.Helper()
	b.do("POST", b.session+path, in, nil)
}

// devtools sends a command of the Chrome DevTools Protocol, for what WebDriver lacks.
func (b *browser) devtools(command string, params anything) {
	b.t.Helper()
	b.post("/goog/cdp/execute", anything{"cmd": command, "params": params})
}

func (b *browser) open(url string)  { b.t.Helper(); b.post("/url", anything{"url": url}) }
func (b *browser) reload()          { b.t.Helper(); b.post("/refresh", nil) }
func (b *browser) click(css string) { b.t.Helper(); b.post(b.find(css)+"/click", nil) }
func (b *browser) press(css, keys string) {
	b.t.Helper()
	b.post(b.find(css)+"/value", anything{"text": keys})
}

// paste puts text in where the cursor is. Typing 8 KiB would take long.
func (b *browser) paste(text string) {
	b.t.Helper()
	b.devtools("Input.insertText", anything{"text": text})
}

// setNetwork pulls the browser's plug, or puts it back.
func (b *browser) setNetwork(on bool) {
	b.t.Helper()
	b.post("/chromium/network_conditions", anything{"network_conditions": anything{"offline": !on, "latency": 0, "throughput": -1}})
}

// tab returns the handle of the tab that is driven.
func (b *browser) tab() (handle string) {
	b.t.Helper()
	b.do("GET", b.session+"/window", nil, &handle)
	return handle
}

// find returns the path of the first element that matches, once there is one.
func (b *browser) find(css string) string {
	b.t.Helper()
	var element struct {
		ID string `json:"element-6066-11e4-a52e-4f735466cecf"` // this name is the standard's
	}
	using := "css selector"
	if strings.HasPrefix(css, "//") {
		using = "xpath" // finds by the words shown
	}
	b.do("POST", b.session+"/element", anything{"using": using, "value": css}, &element)
	return "/element/" + element.ID
}

// text returns what an element shows.
func (b *browser) text(css string) (text string) {
	b.t.Helper()
	b.do("GET", b.session+b.find(css)+"/text", nil, &text)
	return text
}

// value returns what stands in a field.
func (b *browser) value(css string) (value string) {
	b.t.Helper()
	b.do("GET", b.session+b.find(css)+"/property/value", nil, &value)
	return value
}

// script runs the body of a function in the page and returns its result.
func (b *browser) script(js string, args ...any) (result any) {
	b.t.Helper()
	b.do("POST", b.session+"/execute/sync", anything{"script": js, "args": append([]any{}, args...)}, &result)
	return result
}

// settle lets the page do what it has put off.
func (b *browser) settle() {
	b.t.Helper()
	b.script(`return new Promise(done => setTimeout(() => requestAnimationFrame(() => setTimeout(done)), 10))`)
}

// wait returns when an expression has become true in the page, which may go and come back. Its arguments[i] are args.
func (b *browser) wait(condition string, args ...any) {
	b.t.Helper()
	in := anything{"script": "return Boolean(" + condition + ")", "args": append([]any{}, args...)}
	deadline, poll := time.After(patience), time.NewTicker(20*time.Millisecond)
	defer poll.Stop()
	for {
		var met bool
		err := b.ask("POST", b.session+"/execute/sync", in, &met)
		if err == nil && met {
			return
		}
		select {
		case <-poll.C:
		case <-deadline:
			b.t.Fatalf("%s waited for %s\nwith %.999q\nand has on the screen:\n%s\n(%v)", b.name, condition, args, b.text("body"), err)
		}
	}
}

// signIn goes to a room through the login form.
func (b *browser) signIn(d *daemon, room string) {
	b.t.Helper()
	b.open(d.url("/login/?next=" + url.QueryEscape(roomPath(room))))
	b.press("[name=username]", b.name)
	b.press("[name=password]", testPassword+enterKey)
	b.find("#composer")
}

func (b *browser) waitOnline() {
	b.t.Helper()
	b.wait(`document.body.dataset.state === "online"`)
}

func (b *browser) say(text string) {
	b.t.Helper()
	b.press("#text", text+enterKey)
}

// shown is a line for each message in the page, like "own alice: hello (pending)".
const shown = `[...document.querySelectorAll("#messages li[data-id], #messages li[data-cid]")].map(li =>
	(li.matches(".own") ? "own " : "") + li.querySelector(".author").textContent + ": " + li.querySelector(".body").textContent +
	(li.matches(".pending") ? " (pending)" : li.matches(".failed") ? " (failed)" : "")).join("\n")`

// own marks the lines of who sits at the browser.
func (b *browser) own(lines []string) string {
	all := "\n" + strings.Join(lines, "\n")
	return strings.ReplaceAll(all, "\n"+b.name+": ", "\nown "+b.name+": ")[1:]
}

// expect waits until the page shows these messages and no others.
func (b *browser) expect(lines ...string) {
	b.t.Helper()
	b.wait(shown+` === arguments[0]`, b.own(lines))
}

// expectNow is expect for what must not change, and so cannot be waited for.
func (b *browser) expectNow(lines ...string) {
	b.t.Helper()
	if got, want := b.script("return "+shown), b.own(lines); got != want {
		b.t.Fatalf("%s sees\n%s\nwant\n%s", b.name, got, want)
	}
}

func (b *browser) ids() any {
	b.t.Helper()
	return b.script(`return [...document.querySelectorAll("#messages li[data-id]")].map(li => li.dataset.id).join()`)
}

func TestBrowserChat(t *testing.T) {
	needBrowser(t)
	t.Parallel()
	d := startDaemon(t, t.TempDir())
	const room = "大厅 2"

	alice := startBrowser(t, "alice", "en")
	alice.open(d.await(regexp.MustCompile(`(http://\S+/setup\?token=\w+)`)))
	alice.press("[name=username]", "alice")
	alice.press("[name=password]", testPassword+enterKey)
	alice.press("[name=room]", room+enterKey)

	d.addUser("bob")
	bob := startBrowser(t, "bob", "zh-CN")
	bob.signIn(d, room)
	if got := bob.text("#send"); got != "发送" {
		t.Errorf("bob's button says %q, want 发送", got)
	}

	// Both see all in one order, each their own as their own, and markup as it was typed.
	const markup = `<img src=x onerror="document.title='hacked'"></script>`
	alice.say("hello 大厅")
	bob.expect("alice: hello 大厅")
	bob.say("你好")
	alice.expect("alice: hello 大厅", "bob: 你好")
	alice.say(markup)
	bob.expect("alice: hello 大厅", "bob: 你好", "alice: "+markup)
	for _, text := range []string{"1", "2", "3"} { // at once, for all that either knows
		alice.press("#text", text)
		bob.press("#text", text+enterKey)
		alice.press("#text", enterKey)
	}
	for _, b := range []*browser{alice, bob} {
		b.wait(`document.querySelectorAll("#messages li[data-id]").length === 9`)
	}
	if a, b := alice.ids(), bob.ids(); a != b {
		t.Errorf("alice sees messages %s, bob %s", a, b)
	}
	for _, b := range []*browser{alice, bob} {
		ids, before := b.ids(), b.script("return "+shown)
		b.reload()
		b.waitOnline()
		if gotIDs, got := b.ids(), b.script("return "+shown); gotIDs != ids || got != before {
			t.Errorf("after a reload %s sees %s\n%s\nwant %s\n%s", b.name, gotIDs, got, ids, before)
		}
		if b.script(`return document.title === "hacked" || document.querySelector("#messages img") !== null`) == true {
			t.Errorf("%s: what was said is part of the page", b.name)
		}
	}

	// Somebody speaks in another room.
	alice.click(`a[href="/chat/"]`)
	alice.press("[name=room]", "side"+enterKey)
	alice.say("over here")
	alice.expect("alice: over here")
	const badge = `document.querySelector('#rooms a[href="/chat/side/"] .badge:not([hidden]) b')?.textContent`
	bob.wait(badge + ` === "1"`)
	bob.click(`#rooms a[href="/chat/side/"]`)
	bob.expect("alice: over here")
	bob.waitOnline()
	bob.press("#text", escape) // all is read
	bob.click(`#rooms a:not([href="/chat/side/"])`)
	bob.wait(`document.body.dataset.state === "online" && !location.href.includes("side") && ` + badge + ` === undefined`)
}

func TestBrowserOutage(t *testing.T) {
	needBrowser(t)
	t.Parallel()
	d := startDaemon(t, t.TempDir())
	d.setUp("alice")
	bobsPhone := d.addUser("bob")
	alice, bob := startBrowser(t, "alice", "en"), startBrowser(t, "bob", "zh-CN")
	for _, b := range []*browser{alice, bob} {
		b.signIn(d, "lab")
		b.waitOnline()
	}
	expectBoth := func(lines ...string) {
		t.Helper()
		alice.expect(lines...)
		bob.expect(lines...)
	}
	alice.say("before")
	expectBoth("alice: before")

	// What is typed while the server is dead waits in the page.
	d.kill()
	alice.wait(`document.body.dataset.state === "offline"`)
	alice.say("one")
	alice.expectNow("alice: before", "alice: one (pending)")
	if text, disabled := alice.value("#text"), alice.script(`return document.getElementById("text").disabled`); text != "" || disabled != false {
		t.Errorf("the composer has %q, disabled: %v", text, disabled)
	}
	alice.say("two")
	alice.expectNow("alice: before", "alice: one (pending)", "alice: two (pending)")
	alice.wait(`/2 messages waiting/.test(document.querySelector("#status:not([hidden])")?.innerText)`)

	// The server comes back before alice's network does.
	alice.setNetwork(false)
	d.start()
	d.post(bobsPhone, "/chat/lab/", url.Values{"message": {"anybody?"}, "cid": {"phone-1"}})
	bob.expect("alice: before", "bob: anybody?")
	alice.expectNow("alice: before", "alice: one (pending)", "alice: two (pending)")
	alice.setNetwork(true)
	expectBoth("alice: before", "bob: anybody?", "alice: one", "alice: two")

	// A page that goes away while the server is dead leaves the message to its successor.
	d.kill()
	alice.say("three")
	storage := alice.script(`return JSON.stringify({...localStorage})`)
	alice.reload()
	if page := alice.script(`return document.getElementById("composer")`); page != nil {
		t.Fatal("a page came from a dead server")
	}
	d.start()
	alice.open(d.url("/chat/lab/"))
	expectBoth("alice: before", "bob: anybody?", "alice: one", "alice: two", "alice: three")

	// A message whose acknowledgement was lost is sent again, and there once.
	alice.script(`Object.assign(localStorage, JSON.parse(arguments[0]))`, storage)
	alice.reload()
	alice.waitOnline()
	alice.say("four")
	expectBoth("alice: before", "bob: anybody?", "alice: one", "alice: two", "alice: three", "alice: four")
	alice.reload()
	alice.expectNow("alice: before", "bob: anybody?", "alice: one", "alice: two", "alice: three", "alice: four")
}

func TestBrowserScroll(t *testing.T) {
	needBrowser(t)
	t.Parallel()
	d := startDaemon(t, t.TempDir(), "-rate", "0")
	d.setUp("alice")
	bob := d.addUser("bob")
	var lines []string
	post := func(n int) {
		t.Helper()
		text := fmt.Sprintf("message %d", n)
		d.post(bob, "/chat/lab/", url.Values{"message": {text}, "cid": {text[8:]}})
		lines = append(lines, "bob: "+text)
	}
	for n := range 2*historyPage + 10 {
		post(n)
	}
	alice := startBrowser(t, "alice", "en")
	alice.signIn(d, "lab")
	alice.waitOnline()
	const edges = `const list = document.getElementById("messages"), rows = [...list.querySelectorAll("li[data-id]")],
		box = node => node.getBoundingClientRect();`
	expectEnd := func() {
		t.Helper()
		alice.wait(`(() => { ` + edges + ` return box(rows.at(-1)).bottom <= box(list).bottom + 1 && document.getElementById("newer").hidden; })()`)
	}
	alice.expectNow(lines[len(lines)-historyPage:]...)
	expectEnd()

	// where does something and returns the id of a row, by default the first that the reader sees, and how far its text
	// is from the edge. The row itself may grow or shrink: it loses its head to a row above by the same author.
	where := func(do string, id any) (row any, top float64) {
		t.Helper()
		at := alice.script(edges+do+`; const row = rows.find(li => arguments[0] ? li.dataset.id === arguments[0] : box(li).bottom > box(list).top);
			return [row.dataset.id, box(row.querySelector(".body")).top - box(list).top]`, id).([]any)
		return at[0], at[1].(float64)
	}
	expectStill := func(row any, top float64) {
		t.Helper()
		if _, got := where(`await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))`, row); math.Abs(got-top) > 2 {
			t.Errorf("row %v was at %.1f and is at %.1f", row, top, got)
		}
	}

	for _, n := range []int{2 * historyPage, len(lines)} { // pages of older ones, until there are no more
		row, top := where(`list.scrollTop = 150`, nil) // at once, for scrolling makes it load
		alice.expect(lines[len(lines)-n:]...)
		expectStill(row, top)
	}

	row, top := where(``, nil)
	post(len(lines))
	post(len(lines))
	alice.expect(lines...)
	alice.wait(`document.getElementById("newer").checkVisibility() && document.getElementById("newer").innerText.includes("2")`)
	expectStill(row, top)
	alice.click("#newer")
	expectEnd()
	post(len(lines))
	alice.expect(lines...)
	expectEnd()
}

func TestBrowserNoScript(t *testing.T) {
	needBrowser(t)
	t.Parallel()
	d := startDaemon(t, t.TempDir())
	d.post(d.setUp("alice"), "/chat/lab/", url.Values{"message": {"hello 你好"}, "cid": {"1"}})
	alice := startBrowser(t, "alice", "en", "--blink-settings=scriptEnabled=false")
	alice.signIn(d, "lab")
	if got := alice.text("#messages li[data-id] .body"); got != "hello 你好" {
		t.Errorf("the message is shown as %q", got)
	}
	alice.press("#text", "by hand")
	alice.click("#send")
	if got := alice.text("#messages li[data-id] + li[data-id] .body"); got != "by hand" {
		t.Errorf("what was sent is shown as %q", got)
	}
	long := strings.Repeat("字", maxMessage/3+1)
	alice.click("#text")
	alice.paste(long)
	alice.click("#send")
	if got := alice.text("#refusal:not(:empty)"); !strings.Contains(got, "8192") {
		t.Errorf("a long message is refused with %q", got)
	}
	if got := alice.value("#text"); got != long {
		t.Errorf("of %d refused bytes %d are left", len(long), len(got))
	}
	alice.open(d.url("/chat/lab/"))
	alice.click("#send")
	if got := alice.text("#refusal:not(:empty)"); got != "Write something first." {
		t.Errorf("an empty message is refused with %q", got)
	}
}
