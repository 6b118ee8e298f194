package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// newToken makes a token in a directory that no chatd has to serve yet.
func newToken(t testing.TB, dir string, k Token) string {
	t.Helper()
	store, err := OpenStore(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	secret, err := store.CreateToken(k)
	if err != nil {
		t.Fatal(err)
	}
	return secret
}

// curl runs the real one.
func curl(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	if _, err := exec.LookPath("curl"); err != nil {
		need(t, "curl is not installed")
	}
	return exec.Command("curl", append([]string{"-sN", "--max-time", fmt.Sprint(tooLong.Seconds())}, args...)...)
}

// TestCurlResume cuts curl off again and again while much is said, and has it go on
// with Last-Event-ID as EventSource does.
func TestCurlResume(t *testing.T) {
	const cuts = 50
	dir := t.TempDir()
	newPeople(t, dir, []string{"busy", "other"}, "ann", "bob")
	secret := newToken(t, dir, Token{User: "ann", Scope: scopeRead})
	d := startDaemon(t, dir, "-rate", "0")

	var stop atomic.Bool
	var talkers sync.WaitGroup
	for _, room := range []string{"busy", "busy", "other"} {
		talkers.Go(func() {
			p := dialTCP(t, d.addr, "/ws/chat/"+room+"/", "Cookie: "+cookieOf("bob"))
			for n := 0; !stop.Load(); n++ {
				p.send(opText, fmt.Appendf(nil, `{"message":"%s %d"}`, room, n))
				if _, err := p.nextChat(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	var seen []int64
	last := func() int64 {
		if len(seen) == 0 {
			return 0
		}
		return seen[len(seen)-1]
	}
	listen := func(enough func() bool) {
		c := curl(t, "-H", "Authorization: Bearer "+secret, "-H", "Accept: text/event-stream", "-H", fmt.Sprint("Last-Event-ID: ", last()), d.url("/chat/busy/"))
		out, err := c.StdoutPipe()
		if err == nil {
			err = c.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		events := bufio.NewReader(out)
		for !enough() {
			f, err := nextEvent(events)
			if err != nil {
				t.Fatal(err)
			}
			if f.ID != 0 {
				seen = append(seen, f.ID)
			}
		}
		c.Process.Kill()
		io.Copy(io.Discard, out) // what was under way is lost, as on a bad line
		c.Wait()
	}
	for range cuts {
		end := len(seen) + rand.IntN(200)
		listen(func() bool { return len(seen) >= end })
	}
	stop.Store(true)
	talkers.Wait()
	var want []int64
	for _, e := range readLog(t, dir) {
		if e.Room.Name == "busy" {
			want = append(want, e.ID)
		}
	}
	listen(func() bool { return last() >= want[len(want)-1] })
	if fmt.Sprint(seen) != fmt.Sprint(want) {
		t.Errorf("of %d events curl got %d", len(want), len(seen))
	}
	t.Logf("%d cuts, %d events", cuts, len(want))
}

// nextEvent reads a whole event of a stream, which is zero if it only moves the cursor.
func nextEvent(r *bufio.Reader) (f eventFrame, err error) {
	for {
		line, err := r.ReadString('\n')
		if err != nil || line == "\n" {
			return f, err
		}
		if data, ok := strings.CutPrefix(line, "data: "); ok {
			if err := json.Unmarshal([]byte(data), &f); err != nil {
				return f, err
			}
		}
	}
}

// TestOthersClients has clients that others wrote talk with each other: the ws
// package of npm, Python's websockets, curl, and a browser's EventSource.
func TestOthersClients(t *testing.T) {
	dir := t.TempDir()
	newPeople(t, dir, []string{"大厅"}, "npm", "python", "curl", "browser")
	d := startDaemon(t, dir)
	token := func(name string) string { return newToken(t, dir, Token{User: name, Scope: scopeBoth}) }

	heard := make(map[string]*lockedBuffer)
	say := make(map[string]func(text string))
	for name, command := range map[string][]string{"npm": {"node", "testdata/clients/chat.js"}, "python": {"/usr/bin/python3", "testdata/clients/chat.py"}} {
		c := exec.Command(command[0], append(command[1:], d.url(""), "大厅")...)
		c.Env = append(os.Environ(), "CHATD_TOKEN="+token(name), "NODE_PATH=/usr/share/nodejs")
		stdin, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		heard[name] = startProgram(t, c)
		say[name] = func(text string) { fmt.Fprintln(stdin, text) }
		if !heard[name].await("connected") {
			need(t, name+" does not connect, install node-ws and python3-websockets: "+heard[name].String())
		}
	}
	room, bearer := d.url("/chat/%E5%A4%A7%E5%8E%85/"), "Authorization: Bearer "+token("curl")
	heard["curl"] = startProgram(t, curl(t, "-i", "-H", bearer, room))
	say["curl"] = func(text string) {
		if out, err := curl(t, "-H", bearer, "-d", text, room).CombinedOutput(); err != nil {
			t.Errorf("curl: %v, %s", err, out)
		}
	}
	if !heard["curl"].await("Content-Type: text/plain") {
		t.Fatal(heard["curl"])
	}
	b := startBrowser(t, "browser", "en")
	b.open(d.url("/login/"))
	b.post("/cookie", anything{"cookie": anything{"name": sessionCookie, "value": "browser"}})
	b.open(room)
	b.script(`heard = []; source = new EventSource(location.pathname);
		source.onmessage = e => { const m = JSON.parse(e.data); heard.push(m.username + ": " + m.message); }`)
	b.wait(`source.readyState === EventSource.OPEN`)
	round := func(greeting string, names ...string) {
		t.Helper()
		var lines []string
		for _, name := range names {
			line := name + ": " + greeting + name
			lines = append(lines, line)
			if f := say[name]; f != nil {
				f(greeting + name)
			} else {
				b.script(`fetch(location.pathname, { method: "POST", body: arguments[0] })`, greeting+name)
			}
		}
		for _, name := range names {
			for _, line := range lines {
				if name != "browser" && !heard[name].await(line) {
					t.Errorf("%s did not hear %q, but\n%s", name, line, heard[name])
				}
			}
		}
		b.wait(`heard.sort().join("|") === arguments[0]`, strings.Join(lines, "|"))
		for name, said := range heard {
			for _, line := range lines {
				if n := strings.Count(said.String(), line); n > 1 {
					t.Errorf("%s heard %q %d times", name, line, n)
				}
			}
		}
	}
	round("hello from ", "browser", "curl", "npm", "python")
	b.script("heard = []")
	d.kill()
	d.start()
	b.wait(`source.readyState === EventSource.OPEN`) // it comes back by itself, and with its Last-Event-ID
	round("back again from ", "browser", "npm", "python")
	for name, said := range heard {
		t.Logf("%s heard\n%s", name, said)
	}
}

// startProgram starts a program, which is killed at the end, and returns what it says.
func startProgram(t *testing.T, c *exec.Cmd) *lockedBuffer {
	t.Helper()
	said := &lockedBuffer{grown: make(chan struct{}, 1)}
	c.Stdout, c.Stderr = said, said
	if err := c.Start(); err != nil {
		need(t, err.Error())
	}
	t.Cleanup(func() {
		c.Process.Kill()
		c.Wait()
	})
	return said
}

// await waits until what was said has text in it.
func (b *lockedBuffer) await(text string) bool {
	deadline := time.After(tooLong)
	for !strings.Contains(b.String(), text) {
		select {
		case <-b.grown:
		case <-deadline:
			return false
		}
	}
	return true
}

// TestCurlRetries has curl wait for its turn: 429 says when to try again.
func TestCurlRetries(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	newPeople(t, dir, []string{"lobby"}, "ann")
	secret := newToken(t, dir, Token{User: "ann", Scope: scopePost})
	d := startDaemon(t, dir) // 20 at once, then 5 a second
	const posts = 23
	var all sync.WaitGroup
	for range posts {
		all.Go(func() {
			out, err := curl(t, "-f", "--retry", "9", "-H", "Authorization: Bearer "+secret, "-d", "hello", d.url("/chat/lobby/")).CombinedOutput()
			if err != nil {
				t.Errorf("%v, %s", err, out)
			}
		})
	}
	all.Wait()
	if n := len(readLog(t, dir)); n != posts {
		t.Errorf("%d of %d messages arrived", n, posts)
	}
	out, err := curl(t, "-i", "-H", "Authorization: Bearer "+secret, "--parallel", "-d", "hello", d.url("/chat/lobby/?[1-25]")).Output()
	if err != nil || !strings.Contains(string(out), "429 Too Many Requests") || !strings.Contains(string(out), "Retry-After: 1\r\n") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestPermalink finds a message wherever it is in the room.
func TestPermalink(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		ann, room := s.session("ann"), s.room("lobby")
		for i := range 3 * historyPage {
			if _, err := s.store.AppendWait(Event{Kind: KindMessage, Room: room, Author: s.user("ann"), Body: fmt.Sprint("no. ", i+1)}); err != nil {
				t.Fatal(err)
			}
		}
		for at, want := range map[int]string{1: "1-26", 60: "36-85", 120: "96-145", 125: "101-150", 150: "101-150", 999: "101-150"} {
			_, _, text := s.browse("GET", fmt.Sprint("/chat/lobby/?at=", at), ann, "", "Accept: application/json")
			var page history
			if err := json.Unmarshal([]byte(text), &page); err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprintf("%d-%d", page.Messages[0].ID, page.Messages[len(page.Messages)-1].ID); got != want {
				t.Errorf("around %d come %s, not %s", at, got, want)
			}
		}
		if status, _, text := s.browse("GET", "/chat/lobby/?at=60", ann, ""); status != 200 || !strings.Contains(text, `id="m60"`) || strings.Contains(text, `id="m86"`) {
			t.Errorf("the page around 60: %d\n%s", status, text)
		}
	})
}
