package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// dialUnix is what a proxy does.
func dialUnix(t *testing.T, path string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(tooLong))
	return conn
}

// askUnix sends a request over a Unix socket.
func askUnix(t *testing.T, path, method, target, form string, headers ...string) (res *http.Response, text string) {
	t.Helper()
	c := http.Client{
		Transport:     &http.Transport{Dial: func(string, string) (net.Conn, error) { return net.Dial("unix", path) }, DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	r, err := http.NewRequest(method, "http://inner"+target, strings.NewReader(form))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Set(name, value)
	}
	if res, err = c.Do(r); err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(body)
}

// Behind a Unix socket is a proxy, whoever it is: what it says of visitors counts.
func TestUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	d := &daemon{t: t, dir: t.TempDir(), addr: "unix:" + path, args: []string{"-guests", "-rate", "1", "-auth-header", "Remote-User", "-auth-create"}}
	d.start()
	defer func() { d.kill() }()
	d.await(setUpLink)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o660 || !strings.Contains(d.log.String(), "    http://localhost/setup?") {
		t.Errorf("%v, %v, %s", info, err, d.log)
	}

	const forwarded = "X-Forwarded-For: 203.0.113.9"
	https := []string{"X-Forwarded-Proto: https", "X-Forwarded-Host: chat.test", "Accept: application/json", "Remote-User: ann"}
	res, _ := askUnix(t, path, "POST", "/guest", "username=eve", forwarded, https[0])
	cookies := res.Cookies()
	if len(cookies) != 1 || !cookies[0].Secure {
		t.Fatalf("a visitor by https gets %s %v", res.Status, cookies)
	}
	if _, text := askUnix(t, path, "GET", "/account/", "", "Cookie: "+cookies[0].Name+"="+cookies[0].Value); !strings.Contains(text, "203.0.113.9") {
		t.Error("the session is not from the visitor's address:", text)
	}
	if _, text := askUnix(t, path, "POST", "/chat/lobby/", "message=x", https...); !strings.Contains(text, `"url":"https://chat.test/chat/lobby/?at=1#m1"`) || !strings.Contains(text, `"username":"ann"`) {
		t.Error("the proxy is not believed:", text)
	}

	dial := func(headers ...string) *peer {
		p := &peer{t: t, conn: dialUnix(t, path)}
		p.handshake("/ws/lobby/", headers...)
		return p
	}
	one, other := dial(), dial() // visitors without a name, who have nothing to tell them apart
	for range 5 {
		one.send(opText, []byte("flood")) // is one too many
	}
	for range 5 {
		one.nextText()
	}
	other.send(opText, []byte("hi"))
	var heard []string
	for range 5 {
		text, err := other.nextText()
		if err != nil {
			t.Fatal(err)
		}
		heard = append(heard, string(text))
	}
	if heard[4] != "hi" {
		t.Errorf("after the flood of one the other heard %q", heard)
	}
	opened := 0
	for ; opened < 2*connectBurst && dial(forwarded).res.StatusCode == http.StatusSwitchingProtocols; opened++ {
	}
	if opened == 2*connectBurst || dial("X-Forwarded-For: 203.0.113.10").res.StatusCode != http.StatusSwitchingProtocols {
		t.Errorf("%d sockets from one address", opened)
	}
}

// What a killed chatd leaves behind is no obstacle; a living one is, and so is a file.
func TestStaleSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	open := func() net.Listener {
		listeners, err := listen("unix:" + path)
		if err != nil {
			t.Fatal(err)
		}
		return listeners[0]
	}
	stale := open().(*net.UnixListener)
	stale.SetUnlinkOnClose(false)
	stale.Close()
	alive := open()
	if _, err := listen("unix:" + path); err == nil {
		t.Error("a second one took the socket")
	}
	dialUnix(t, path).Close()
	alive.Close()
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen("unix:" + path); err == nil {
		t.Error("it took the place of a file")
	}
}

// activated is chatd as systemd starts it, with sockets that are open already.
func activated(d *daemon, sockets []*os.File, env ...string) *exec.Cmd {
	cmd := chatdCommand()
	cmd.Path, cmd.Args = "/bin/sh", append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, os.Args[0], "-addr", "-", "-data", d.dir}, d.args...)
	cmd.ExtraFiles = sockets
	cmd.Env = append(append(cmd.Env, fmt.Sprint("LISTEN_FDS=", len(sockets))), env...)
	return cmd
}

// chatd answers on all sockets that systemd has for it, and says when it is ready, when
// it stops, and that it lives, as long as it can write.
func TestSystemd(t *testing.T) {
	t.Parallel()
	for _, name := range []string{filepath.Join(t.TempDir(), "notify"), "@chatd-test-" + filepath.Base(t.TempDir()) + fmt.Sprint(os.Getpid())} {
		told, err := net.ListenPacket("unixgram", name)
		if err != nil {
			t.Fatal(err)
		}
		defer told.Close()
		next := func(wait time.Duration) string {
			b := make([]byte, 100)
			told.SetReadDeadline(time.Now().Add(wait))
			n, _, err := told.ReadFrom(b)
			if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
			return string(b[:n])
		}
		addr, tcp := inherited(t)
		path := filepath.Join(t.TempDir(), "sock")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		unix, err := l.(*net.UnixListener).File()
		if err != nil {
			t.Fatal(err)
		}
		d := &daemon{t: t, dir: t.TempDir()}
		d.run(activated(d, []*os.File{tcp, unix}, "NOTIFY_SOCKET="+name, "WATCHDOG_USEC=200000"))
		if got := next(tooLong); got != "READY=1" {
			t.Errorf("first %q", got)
		}
		d.addr = addr
		d.get(http.DefaultClient, "/login/")
		if res, _ := askUnix(t, path, "GET", "/login/", ""); res.StatusCode != http.StatusOK {
			t.Error(res.Status)
		}
		if got := next(tooLong); got != "WATCHDOG=1" {
			t.Errorf("then %q", got)
		}
		if strings.HasPrefix(name, "/") { // once is enough
			lock := execSQL(t, d.dir, "BEGIN IMMEDIATE")
			locked, said := time.Now(), 0
			for time.Since(locked) < lockWait/2*time.Millisecond && next(700*time.Millisecond) != "" { // what it had said
			}
			for ; time.Since(locked) < lockWait*time.Millisecond; said++ {
				if got := next(tooLong); got != "WATCHDOG=1" {
					t.Fatalf("the writer has given up, no restart would help, and it says %q", got)
				}
			}
			if said > 2 { // one that was on its way, and that
				t.Errorf("the writer waited, and it said so %d times", said)
			}
			if _, err := lock.ExecContext(t.Context(), "ROLLBACK"); err != nil {
				t.Fatal(err)
			}
			if got := next(tooLong); got != "WATCHDOG=1" {
				t.Errorf("it can write again, and says %q", got)
			}
		}
		d.stop()
		var last []string
		for got := next(time.Second); got != ""; got = next(time.Second) {
			last = append(last, got)
		}
		if !slices.Contains(last, "STOPPING=1") {
			t.Errorf("at the end %q", last)
		}
	}
}

// Only a trusted proxy can say how the visitor came.
func TestForwardedURL(t *testing.T) {
	s := newTestServer(t, t.TempDir(), false)
	for _, test := range []struct{ public, peer, want string }{
		{"", "127.0.0.1:5", "https://front"},
		{"", "@", "https://front"},
		{"", "7.7.7.7:5", "http://inner"},
		{"https://chat.test/a", "127.0.0.1:5", "https://chat.test/a"},
	} {
		s.public = test.public
		r := &http.Request{RemoteAddr: test.peer, Host: "inner", URL: &url.URL{}, Header: http.Header{"X-Forwarded-Proto": {"https"}, "X-Forwarded-Host": {"front"}}}
		if got := s.urlFor(r); got != test.want {
			t.Errorf("%+v: %s", test, got)
		}
	}
}

// systemd finds nothing wrong with the units, and little that chatd could do to the host.
func TestUnits(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		need(t, "systemd-analyze is not installed")
	}
	dir := t.TempDir()
	for _, name := range []string{"chatd.service", "chatd.socket"} {
		unit, err := os.ReadFile("deploy/" + name)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), bytes.ReplaceAll(unit, []byte("/usr/local/bin/chatd"), []byte(os.Args[0])), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	service := filepath.Join(dir, "chatd.service")
	for _, args := range [][]string{{"verify", service, filepath.Join(dir, "chatd.socket")}, {"security", "--offline=true", "--threshold=15", service}} {
		out, err := exec.Command("systemd-analyze", args...).CombinedOutput()
		if err != nil || args[0] == "verify" && bytes.Contains(out, []byte("chatd.")) { // not of other units
			t.Errorf("%v: %v\n%s", args, err, out)
		}
	}
}
