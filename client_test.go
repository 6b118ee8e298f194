package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/websocket"
)

// newRoom is a chatd with ann and a room in which she has said something.
func newRoom(t *testing.T, args ...string) (d *daemon, ann *http.Client) {
	t.Helper()
	d = startDaemon(t, t.TempDir(), args...)
	ann = d.setUp("ann")
	d.say(ann, "ops", "begin")
	return d, ann
}

func (d *daemon) say(c *http.Client, room, text string) {
	d.t.Helper()
	d.post(c, "/chat/"+room+"/", map[string][]string{"message": {text}})
}

// frame posts a frame of chatd.v1.
func (d *daemon) frame(c *http.Client, room, frame string) {
	d.t.Helper()
	r, err := c.Post(d.url("/chat/"+room+"/"), "application/json", strings.NewReader(frame))
	if err != nil || r.StatusCode != http.StatusOK {
		d.t.Fatalf("%s: %v, %v", frame, r, err)
	}
	r.Body.Close()
}

// token makes one for ann.
func (d *daemon) token(scope string) string {
	d.t.Helper()
	store, err := OpenStore(d.dir, nil)
	if err != nil {
		d.t.Fatal(err)
	}
	defer store.Close()
	secret, err := store.CreateToken(Token{User: "ann", Scope: scope})
	if err != nil {
		d.t.Fatal(err)
	}
	return secret
}

// terminal starts the client in a process of its own. What it prints is its log.
func (d *daemon) terminal(token string, stdin io.Reader, args ...string) *daemon {
	d.t.Helper()
	c := &daemon{t: d.t, dir: d.dir, cmd: chatdCommand(args...), log: &lockedBuffer{grown: make(chan struct{}, 1)}}
	c.cmd.Env = append(c.cmd.Env, "CHATD_URL="+d.url(""), "CHATD_TOKEN="+token)
	c.cmd.Stdin, c.cmd.Stdout, c.cmd.Stderr = stdin, c.log, c.log
	if err := c.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() {
		if c.cmd.ProcessState == nil {
			c.kill()
		}
	})
	return c
}

// said is what is in the log, line by line, and in how many messages.
func (d *daemon) said() (lines []string, messages int) {
	log := readLog(d.t, d.dir)
	for _, e := range log[1:] {
		lines = append(lines, strings.Split(e.Body, "\n")...)
	}
	return lines, len(log) - 1
}

func (d *daemon) saw(text string) {
	d.t.Helper()
	d.await(regexp.MustCompile("(" + regexp.QuoteMeta(text) + ")"))
}

var clock = regexp.MustCompile(`\[[-: 0-9]{19}\]`)

func TestTail(t *testing.T) {
	d, ann := newRoom(t, "-rate", "0")
	for i := range 60 {
		d.say(ann, "ops", fmt.Sprint("old ", i))
	}
	tail := d.terminal(d.token(scopeRead), nil, "tail", "-n", "58", "OPS")
	tail.saw("old 59\n")
	d.say(ann, "elsewhere", "not here")
	d.say(ann, "ops", "\x1b[2J\nwiped")
	last := readLog(t, d.dir)[62].ID
	d.frame(ann, "ops", fmt.Sprintf(`{"type":"react","id":%d,"emoji":"👍"}`, last))
	d.frame(ann, "ops", fmt.Sprintf(`{"type":"edit","id":%d,"message":"clean"}`, last))
	d.frame(ann, "ops", fmt.Sprintf(`{"type":"delete","id":%d}`, last))
	d.post(ann, "/chat/ops/about/", map[string][]string{"action": {"rename"}, "name": {"Betrieb"}})
	d.say(ann, "Betrieb", "end")
	var want strings.Builder
	for i := range 58 {
		fmt.Fprintf(&want, "[] ann: old %d\n", i+2)
	}
	fmt.Fprintf(&want, "[] ann: \uFFFD[2J\n    wiped\n[] ann reacts to #%d with 👍\n[] ann edited #%[1]d: clean\n[] ann deleted #%[1]d\n[] ann: end\n", last)
	tail.saw("ann: end\n")
	if got := clock.ReplaceAllString(tail.log.String(), "[]"); got != want.String() {
		t.Errorf("tail printed\n%s\nwant\n%s", got, &want)
	}
	if err := tail.cmd.Process.Signal(os.Interrupt); err != nil || wait(tail.cmd) != nil {
		t.Errorf("interrupted: %v, %v", err, tail.cmd.ProcessState)
	}
}

func TestSay(t *testing.T) {
	d, _ := newRoom(t)
	long := strings.Repeat("长", maxMessage/2)
	post := d.token(scopePost)
	to, err := url.Parse(d.url(""))
	if err != nil {
		t.Fatal(err)
	}
	proxy := httptest.NewServer(http.StripPrefix("/team", httputil.NewSingleHostReverseProxy(to)))
	defer proxy.Close()
	for _, test := range []struct{ args, stdin string }{
		{"say ops -- -1 and -n", ""},
		{"say ops", "\n one\r\n\t\nbroken \xff\xfe\nlast"},
		{"say -url " + proxy.URL + "/team/ ops", long + "\n"},
		{"chat -url " + proxy.URL + "/team ops", "aloud\n"},
	} {
		token := post
		if strings.HasPrefix(test.args, "chat") {
			token = d.token(scopeBoth)
		}
		c := d.terminal(token, strings.NewReader(test.stdin), strings.Fields(test.args)...)
		if err := wait(c.cmd); err != nil {
			t.Errorf("%s: %v\n%s", test.args, err, c.log)
		}
		if strings.HasPrefix(test.args, "chat") && strings.Count(c.log.String(), "ann: aloud\n") != 1 {
			t.Errorf("chat without a terminal printed %s", c.log)
		}
	}
	got, _ := d.said()
	if len(got) > 4 {
		got = slices.Concat(got[:4], []string{strings.Join(got[4:len(got)-1], "")}, got[len(got)-1:])
	}
	if want := []string{"-1 and -n", " one", "broken ?", "last", long, "aloud"}; !slices.Equal(got, want) {
		t.Errorf("said %.40q, want %.40q", got, want)
	}
}

func TestClientRefused(t *testing.T) {
	d, _ := newRoom(t)
	read, post := d.token(scopeRead), d.token(scopePost)
	elsewhere := httptest.NewServer(http.NotFoundHandler())
	defer elsewhere.Close()
	directory, err := os.Open(d.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer directory.Close()
	for _, test := range []struct{ token, args, want string }{
		{"wrong", "tail ops", "/ws: 401 Unauthorized\n"},
		{"wrong", "say ops hello", "401"},
		{"", "say ops hello", "no token"},
		{read, "say ops hello", "(token_scope)\n"},
		{post, "say ops", "is a directory\n"},
		{post, "tail ops", `no room "ops"`},
		{read, "tail nowhere", `no room "nowhere"`},
		{post, "say nowhere hello", "(unknown_room)\n"},
		{read, "tail", "wants a room"},
		{read, "tail ops lobby", "wants a room"},
		{read, "tail ops -url ftp://x", "ftp"},
		{read, "tail nowhere -url " + strings.Replace(d.url(""), "127.0.0.1", "LocalHost", 1), "no room"},
		{read, "tail ops -url " + elsewhere.URL + "/not/here", "/not/here/ws: 404 Not Found\n"},
		{read, "tail ops -url http://127.0.0.1:1", "refused"},
		{read, "tail ops -url https" + strings.TrimPrefix(d.url(""), "http"), "tls"},
		{read, "tail ops -token-file " + d.dir + "/none", "none"},
		{post, "say ops " + strings.Repeat("x", maxMessage+1), "(too_long)\n"},
	} {
		c := d.terminal(test.token, directory, strings.Fields(test.args)...)
		err := wait(c.cmd)
		if out := c.log.String(); err == nil || strings.Count(out, "\n") != 1 || !strings.HasPrefix(out, "chatd: ") || !strings.Contains(out, test.want) {
			t.Errorf("%.40s: %v, want a line with %q in\n%s", test.args, err, test.want, out)
		}
	}
}

// What is said faster than allowed arrives all the same, complete and in order.
func TestSayManyLines(t *testing.T) {
	t.Parallel()
	for rate, most := range map[string]int{"0": 1000, "5": 40} {
		d, _ := newRoom(t, "-rate", rate)
		var lines bytes.Buffer
		for i := range 1000 {
			fmt.Fprintln(&lines, i)
		}
		c := d.terminal(d.token(scopePost), &lines, "say", "ops")
		if err := wait(c.cmd); err != nil {
			t.Errorf("rate %s: %v\n%s", rate, err, c.log)
		}
		got, messages := d.said()
		isCount(t, "rate "+rate, got, 1000)
		if messages > most || rate == "0" && messages < most {
			t.Errorf("rate %s: %d messages, want %d", rate, messages, most)
		}
	}
}

func isCount(t *testing.T, what string, got []string, n int) {
	t.Helper()
	for i := range max(n, len(got)) {
		if i >= len(got) || got[i] != fmt.Sprint(i) {
			t.Errorf("%s: %d lines, wrong from line %d on: %q", what, len(got), i, got[min(i, len(got)):min(i+3, len(got))])
			return
		}
	}
}

// chatd is killed and stopped in the middle: nothing is missing, nothing comes twice.
func TestClientOutage(t *testing.T) {
	t.Parallel()
	const lines = 4000
	d, ann := newRoom(t, "-rate", "300")
	tail := d.terminal(d.token(scopeRead), nil, "tail", "ops")
	tail.saw("begin")
	in, out := io.Pipe()
	say := d.terminal(d.token(scopePost), in, "say", "ops")
	go func() {
		defer out.Close()
		for i := range lines {
			fmt.Fprintln(out, i)
		}
	}()
	for i, seen := range []string{" 300\n", " 900\n", " 1300\n"} {
		tail.saw(seen)
		if i == 1 {
			d.stop()
		} else {
			d.kill()
		}
		d.start()
		d.say(ann, "ops", fmt.Sprint("away ", i))
		tail.saw(fmt.Sprintf("away %d\n", i))
	}
	if err := wait(say.cmd); err != nil {
		t.Errorf("say: %v\n%s", err, say.log)
	}
	tail.saw(fmt.Sprintln("", lines-1))
	var printed []string
	for _, m := range regexp.MustCompile(`(?m)^(?:\[.*\] ann: |    )(\d+)$`).FindAllStringSubmatch(tail.log.String(), -1) {
		printed = append(printed, m[1])
	}
	isCount(t, "tail", printed, lines)
	said, _ := d.said()
	said = slices.DeleteFunc(said, func(line string) bool { return strings.HasPrefix(line, "away") })
	isCount(t, "log", said, lines)
	lost, away := strings.Count(tail.log.String(), "connection lost"), strings.Count(tail.log.String(), "ann: away")
	if lost != 3 || away != 3 {
		t.Errorf("tail lost the connection %d times, and saw %d messages of then", lost, away)
	}
	d.kill()
	execSQL(t, d.dir, "UPDATE tokens SET revoked = 1").Close()
	d.start()
	if err := wait(tail.cmd); err == nil || !strings.HasSuffix(tail.log.String(), "/ws: 401 Unauthorized\n") {
		t.Errorf("without its token tail goes on: %v\n%.300s", err, tail.log)
	}
}

// A message that may be on disk is sent again as it was, even if it is told to wait.
// The next one takes the lines along that came meanwhile.
func TestClientRetries(t *testing.T) {
	var mu sync.Mutex
	var sent []clientFrame
	fake := httptest.NewServer(websocket.Handler(func(ws *websocket.Conn) {
		websocket.Message.Send(ws, `{"type":"welcome"}`)
		for {
			var f clientFrame
			if websocket.JSON.Receive(ws, &f) != nil {
				return
			}
			if f.Type == "hello" {
				continue
			}
			mu.Lock()
			sent = append(sent, f)
			n := len(sent)
			mu.Unlock()
			switch n {
			case 1: // no answer
				return
			case 2, 4:
				code := map[int]string{2: "too_fast", 4: "storage"}[n]
				websocket.Message.Send(ws, `{"type":"error","code":"`+code+`","cid":"`+f.CID+`"}`)
			default:
				websocket.Message.Send(ws, `{"type":"message","id":1,"cid":"`+f.CID+`"}`)
			}
		}
	}))
	defer fake.Close()
	t.Setenv("CHATD_TOKEN", "any")
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(out, "1\n2\n3\n4\n")
	out.Close()
	soon, cancel := context.WithTimeout(t.Context(), tooLong)
	defer cancel()
	if err := runClient(soon, "say", []string{"ops", "-url", fake.URL}, in, io.Discard, t.Output()); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	var got []string
	for i, f := range sent {
		got = append(got, f.Message)
		if again := i != 3; i > 0 && again != (f.CID == sent[i-1].CID) {
			t.Errorf("message %d has cid %s, the one before %s", i, f.CID, sent[i-1].CID)
		}
	}
	if want := []string{"1", "1", "1", "2\n3\n4", "2\n3\n4"}; !slices.Equal(got, want) {
		t.Errorf("sent %q, want %q", got, want)
	}
}

func TestLively(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		go theirs.Write([]byte("ping"))
		l := &lively{Conn: ours}
		if n, err := l.Read(make([]byte, 9)); n != 4 || err != nil {
			t.Error(n, err)
		}
		began := time.Now()
		if n, err := l.Read(make([]byte, 9)); n != 0 || err == nil || time.Since(began) != deadAfter {
			t.Errorf("silence ended after %v: %d, %v", time.Since(began), n, err)
		}
	})
}
