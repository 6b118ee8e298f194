package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestMain lets the test binary be chatd: that is how tests get a real process
// to kill, with the race detector in it.
func TestMain(m *testing.M) {
	if os.Getenv("CHATD_TEST_AS_DAEMON") != "" {
		if len(os.Args) > 1 && !strings.HasPrefix(os.Args[1], "-") { // a command, which has to end
			time.AfterFunc(5*tooLong, func() { panic(fmt.Sprintf("%q goes on and on", os.Args[1:])) })
		}
		main()
		return
	}
	http.DefaultClient.Timeout = tooLong
	http.DefaultTransport.(*http.Transport).ResponseHeaderTimeout = tooLong
	os.Exit(m.Run())
}

// tooLong is how long a test waits for what comes at once, even where many tests run
// beside it, so that one of which nothing comes fails and says so.
const tooLong = time.Minute

// receive returns what comes from a channel.
func receive[T any](t *testing.T, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(tooLong):
		t.Fatal("nothing came")
	}
	return v
}

// wait waits until a process has ended. If it does not, it is made to say where it is.
func wait(cmd *exec.Cmd) error {
	defer time.AfterFunc(tooLong, func() { cmd.Process.Signal(syscall.SIGABRT) }).Stop()
	return cmd.Wait()
}

// need skips a test for what is not installed; in CI it fails.
func need(t *testing.T, hint string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(hint)
	}
	t.Skip(hint)
}

// daemon is chatd in a process of its own.
type daemon struct {
	t    *testing.T
	dir  string   // its data
	args []string // besides -addr and -data
	addr string
	cmd  *exec.Cmd
	log  *lockedBuffer
}

// startDaemon starts chatd on a free port and waits until it listens. It is
// killed at the end of the test if it still runs.
func startDaemon(t *testing.T, dir string, args ...string) *daemon {
	t.Helper()
	d := &daemon{t: t, dir: dir, args: args, addr: "127.0.0.1:0"}
	d.start()
	t.Cleanup(func() {
		if d.cmd.ProcessState == nil {
			d.kill()
		}
		if t.Failed() {
			t.Logf("chatd said:\n%s", d.log)
		}
	})
	return d
}

var listening = regexp.MustCompile(`msg=listening addr=(\S+)`)

// start starts it again on the same data and port.
func (d *daemon) start() {
	d.t.Helper()
	d.run(chatdCommand(append([]string{"-addr", d.addr, "-data", d.dir}, d.args...)...))
}

func (d *daemon) run(cmd *exec.Cmd) {
	d.t.Helper()
	d.log = &lockedBuffer{grown: make(chan struct{}, 1)}
	d.cmd = cmd
	d.cmd.Stderr = d.log
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	if addr := d.await(listening); addr != d.addr {
		d.addr = addr
	}
}

// chatdCommand returns a command that runs chatd. With the race detector in it, it
// ends at its first race, which the test then notices, and else without the second
// that the detector would have every process wait at its end.
func chatdCommand(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), "CHATD_TEST_AS_DAEMON=1", "GORACE=halt_on_error=1 atexit_sleep_ms=0")
	return cmd
}

// await waits until the log matches and returns the first group.
func (d *daemon) await(pattern *regexp.Regexp) string {
	d.t.Helper()
	deadline := time.After(tooLong)
	for {
		if m := pattern.FindStringSubmatch(d.log.String()); m != nil {
			return m[1]
		}
		select {
		case <-d.log.grown:
		case <-deadline:
			d.t.Fatalf("%v did not come; chatd said:\n%s", pattern, d.log)
		}
	}
}

// kill is kill -9.
func (d *daemon) kill() {
	d.t.Helper()
	if err := d.cmd.Process.Kill(); err != nil {
		d.t.Fatal(err)
	}
	d.cmd.Wait()
}

// stop is SIGTERM.
func (d *daemon) stop() {
	d.t.Helper()
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		d.t.Fatal(err)
	}
	if err := wait(d.cmd); err != nil {
		d.t.Errorf("chatd ended with %v", err)
	}
}

func (d *daemon) url(path string) string { return "http://" + d.addr + path }

// setUp makes the administrator with the link from the log, and returns a
// client that is signed in.
func (d *daemon) setUp(name string) *http.Client {
	d.t.Helper()
	token := d.await(setUpLink)
	c := newBrowserlessClient()
	d.post(c, "/setup", url.Values{"token": {token}, "username": {name}, "password": {testPassword}})
	return c
}

var setUpLink = regexp.MustCompile(`/setup\?token=(\w+)`)

const testPassword = "correct horse"

// addUser makes an account while chatd runs, and signs in.
func (d *daemon) addUser(name string) *http.Client {
	d.t.Helper()
	cmd := chatdCommand("user", "add", name, "-data", d.dir)
	cmd.Stdin = strings.NewReader(testPassword + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		d.t.Fatalf("user add %s: %v\n%s", name, err, out)
	}
	c := newBrowserlessClient()
	d.post(c, "/login/", url.Values{"username": {name}, "password": {testPassword}})
	return c
}

func (d *daemon) post(c *http.Client, path string, form url.Values) {
	d.t.Helper()
	r, err := c.PostForm(d.url(path), form)
	if err != nil {
		d.t.Fatal(err)
	}
	body, err := io.ReadAll(r.Body)
	r.Body.Close()
	if err != nil || r.StatusCode != http.StatusOK {
		d.t.Fatalf("POST %s: %s %v\n%s", path, r.Status, err, body)
	}
}

func (d *daemon) get(c *http.Client, path string) {
	d.t.Helper()
	r, err := c.Get(d.url(path))
	if err != nil {
		d.t.Fatal(err)
	}
	r.Body.Close()
	if r.StatusCode != http.StatusOK {
		d.t.Fatalf("GET %s: %s", path, r.Status)
	}
}

func newBrowserlessClient() *http.Client {
	jar, err := cookiejar.New(nil)
	if err != nil {
		panic(err)
	}
	return &http.Client{Jar: jar, Timeout: tooLong}
}

// lockedBuffer collects what a process says.
type lockedBuffer struct {
	mu    sync.Mutex
	b     bytes.Buffer
	grown chan struct{}
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case l.grown <- struct{}{}:
	default:
	}
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// The whole life of a chatd, over TCP: set-up, chat, and an end on SIGTERM that
// tells the clients and leaves nothing behind.
func TestRun(t *testing.T) {
	d := startDaemon(t, t.TempDir())
	ann := d.setUp("Ann")
	bob := d.addUser("bob")
	p := d.socket(ann, "/ws")
	p.send(opText, []byte(`{"type":"hello","since":0}`))
	d.post(bob, "/chat/大厅/", url.Values{"message": {"你好"}, "cid": {"b1"}})
	if f, err := p.nextEvent(); err != nil || f.Message != "你好" || f.Username != "bob" {
		t.Errorf("got %+v, %v", f, err)
	}
	p.send(opText, []byte(`{"type":"message","room":"大厅","cid":"a1","message":"last words"}`))
	d.stop()
	var heard []string
	for {
		opcode, payload, err := p.next()
		if err != nil {
			break
		}
		heard = append(heard, fmt.Sprintf("%d %q", opcode, payload))
	}
	if n := len(heard); n == 0 || heard[n-1] != fmt.Sprintf("%d %q", opClose, closeFrame(closeRestart, "")[2:]) {
		t.Errorf("the socket ended with %v, want a Close frame", heard)
	}
	if left, err := filepath.Glob(filepath.Join(d.dir, "*-wal")); err != nil || left != nil {
		t.Errorf("left behind: %v, %v", left, err)
	}

	d.start()
	if d.await(regexp.MustCompile(`(?s)(.*)`)); strings.Contains(d.log.String(), "setup") {
		t.Error("a second set-up link was printed")
	}
	p = d.socket(ann, "/ws")
	p.send(opText, []byte(`{"type":"hello","since":0}`))
	if f, err := p.nextEvent(); err != nil || f.Message != "你好" {
		t.Errorf("after the restart: %+v, %v", f, err)
	}
	p.conn.Close()
	other := chatdCommand("-addr", "127.0.0.1:0", "-data", d.dir)
	if out, err := other.CombinedOutput(); err == nil || !strings.Contains(string(out), "another chatd") {
		t.Errorf("a second chatd on the same data: %v\n%s", err, out)
	}
	d.stop()
}

// socket opens a WebSocket with the cookies of a client.
func (d *daemon) socket(c *http.Client, path string) *peer {
	d.t.Helper()
	return dialTCP(d.t, d.addr, path, "Cookie: "+d.cookies(c))
}

func (d *daemon) cookies(c *http.Client) string {
	var pairs []string
	for _, cookie := range c.Jar.Cookies(&url.URL{Scheme: "http", Host: d.addr}) {
		pairs = append(pairs, cookie.String())
	}
	return strings.Join(pairs, "; ")
}

func TestCommands(t *testing.T) {
	dir := t.TempDir()
	for _, test := range []struct {
		args  string
		stdin string
		fails bool
		want  string
	}{
		{"help", "", false, "-guests"},
		{"-h", "", false, "-guests"},
		{"version", "", false, "chatd "},
		{"dance", "", true, "not a command"},
		{"-addr x extra", "", true, "extra"},
		{"-rate fast", "", true, "rate"},
		{"-log xml -data " + dir, "", true, "xml"},
		{"-url example.org -data " + dir, "", true, "-url"},
		{"-trust me -data " + dir, "", true, "-trust"},
		{"-hook-allow me -data " + dir, "", true, "-hook-allow"},
		{"-origins me -data " + dir, "", true, "-origins"},
		{"-auth-header Remote-User:x -data " + dir, "", true, "-auth-header"},
		{"user add 小红 -admin -data " + dir, testPassword, false, ""},
		{"user add 小红 -data " + dir, testPassword, true, "taken"},
		{"user add a/b -data " + dir, testPassword, true, "cannot be"},
		{"user add bob -data " + dir, "short", true, "8 characters"},
		{"user passwd 小红 -data " + dir, "another password", false, ""},
		{"user passwd nobody -data " + dir, testPassword, true, "not found"},
		{"user", "", true, "user add NAME"},
		{"doctor -data " + dir, "", true, "-url"},
		{"doctor -url http://127.0.0.1:1 -data " + dir, "", true, "checks: wrong"},
	} {
		cmd := chatdCommand(strings.Fields(test.args)...)
		cmd.Stdin = strings.NewReader(test.stdin)
		out, err := cmd.CombinedOutput()
		if (err != nil) != test.fails || !strings.Contains(string(out), test.want) || strings.Contains(string(out), "goroutine") {
			t.Errorf("chatd %s: %v, want failure %v and %q in\n%s", test.args, err, test.fails, test.want, out)
		}
	}
	store, err := OpenStore(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	u, encoded, err := store.UserByName(t.Context(), "小红")
	if err != nil || u.Role != RoleAdmin || !passwordMatches(encoded, "another password") || passwordMatches(encoded, testPassword) {
		t.Errorf("小红 is %v %q, %v", u, encoded, err)
	}
}

// A password that Django has hashed is accepted, and only that.
func TestDjangoPassword(t *testing.T) {
	const encoded = "pbkdf2_sha256$1000$seasalt$JgZryXe2Ga8ysg6XbzkLpTdyPQrHqsinbL9BnnhgX4A="
	if !passwordMatches(encoded, "lètmein") {
		t.Error("Django's hash does not match its password")
	}
	for _, bad := range []string{"", "$$$", "md5$1$a$b", strings.Replace(encoded, "1000", "1001", 1), strings.Replace(encoded, "1000", "-1", 1), strings.Replace(encoded, "1000", "99999999999", 1)} {
		if passwordMatches(bad, "lètmein") {
			t.Errorf("%q matches", bad)
		}
	}
	if !passwordMatches(hashPassword("x"), "x") {
		t.Error("our own hash does not match its password")
	}
}

// 300 people say one thing at once, and each sees all 300.
func TestBurst(t *testing.T) {
	const people = 300
	d := startDaemon(t, t.TempDir(), "-guests")
	var peers []*peer
	for range people {
		peers = append(peers, dialTCP(t, d.addr, "/ws/chat/party/"))
	}
	var all sync.WaitGroup
	for i, p := range peers {
		p.send(opText, fmt.Appendf(nil, `{"message":"I am %d","username":"guest %d"}`, i, i))
		all.Go(func() {
			seen := make(map[string]bool)
			for len(seen) < people {
				payload, err := p.nextText()
				var f chatFrame
				if err == nil {
					err = json.Unmarshal(payload, &f)
				}
				if err != nil || seen[f.Message] {
					t.Errorf("client %d, after %d messages: %q, %v", i, len(seen), payload, err)
					return
				}
				seen[f.Message] = true
			}
		})
	}
	all.Wait()
}

// Out of descriptors chatd says so, and goes on: those who are in chat, and when
// some leave, others get in.
func TestOutOfDescriptors(t *testing.T) {
	d := startDaemon(t, t.TempDir(), "-guests", "-max-conns", "0")
	d.stop()
	limited := exec.Command("prlimit", append([]string{"--nofile=64", os.Args[0], "-addr", d.addr, "-data", d.dir}, d.args...)...)
	limited.Env = chatdCommand().Env
	d.run(limited)
	first := dialTCP(t, d.addr, "/ws/chat/crowd/")
	var crowd []net.Conn
	for range 64 {
		conn, err := net.Dial("tcp", d.addr) // the kernel accepts it, chatd may not
		if err != nil {
			t.Fatal(err)
		}
		crowd = append(crowd, conn)
	}
	d.await(regexp.MustCompile(`(too many open files)`))
	first.send(opText, []byte(`{"message":"still here"}`))
	if text, err := first.nextText(); err != nil || !strings.Contains(string(text), "still here") {
		t.Errorf("out of descriptors: %s, %v", text, err)
	}
	for _, conn := range crowd {
		conn.Close()
	}
	late := dialTCP(t, d.addr, "/ws/chat/crowd/")
	first.send(opText, []byte(`{"message":"welcome"}`))
	if text, err := late.nextText(); err != nil || !strings.Contains(string(text), "welcome") {
		t.Errorf("after that: %s, %v", text, err)
	}
	first.conn.Close()
	late.conn.Close()
	d.stop()
}
