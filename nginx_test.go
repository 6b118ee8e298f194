package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var idleTime = flag.Duration("idle", 3*time.Second, "how long TestBehindNginx keeps silent")

// front is a real nginx, with TLS and the configuration that chatd prints.
type front struct {
	t     *testing.T
	url   string // the public one of the chatd behind it
	base  string // its path
	addr  string
	plain string // where nginx answers without TLS
	cert  string // a file
	tls   *tls.Config
}

const nginxMain = `
user root;
pid nginx.pid;
error_log error.log;
events { worker_connections 4096; }
http {
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    scgi_temp_path scgi;
    uwsgi_temp_path uwsgi;
    include chatd.conf;
}
`

// startNginx starts it for a chatd that listens on addr, under the path base. It
// inherits its sockets, so that it need not have started when the first client comes.
// Edits are what is in the configuration, and what is to be there instead.
func startNginx(t *testing.T, base, addr string, edits ...string) *front {
	t.Helper()
	if _, err := exec.LookPath("nginx"); err != nil {
		need(t, "nginx is not installed")
	}
	dir := t.TempDir()
	plain, plainFile := inherited(t)
	secure, secureFile := inherited(t)
	f := &front{t, "https://" + secure + base, base, secure, "http://" + plain, filepath.Join(dir, "fullchain.pem"), newCertificate(t, dir)}
	var conf strings.Builder
	if err := nginx([]string{"-url", f.url, "-addr", addr}, &conf); err != nil {
		t.Fatal(err)
	}
	text := regexp.MustCompile(`.*listen \[::\].*\n`).ReplaceAllString(conf.String(), "")
	text = strings.Replace(text, "listen 80;", "listen "+plain+";", 1)
	text = regexp.MustCompile(`listen \d+ ssl`).ReplaceAllString(text, "listen "+secure+" ssl")
	text = regexp.MustCompile(`/etc/letsencrypt/live/[^/]*/`).ReplaceAllString(text, "")
	text = strings.NewReplacer(edits...).Replace(text)
	for name, content := range map[string]string{"nginx.conf": nginxMain, "chatd.conf": text} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	command := func(args ...string) *exec.Cmd {
		cmd := exec.Command("nginx", append([]string{"-p", dir, "-c", "nginx.conf", "-e", "error.log"}, args...)...)
		cmd.Env, cmd.ExtraFiles = append(os.Environ(), "NGINX=3;4;"), []*os.File{plainFile, secureFile}
		return cmd
	}
	if out, err := command("-t").CombinedOutput(); err != nil || strings.Contains(string(out), "[warn]") {
		t.Fatalf("nginx -t: %v\n%s", err, out)
	}
	cmd := command()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(os.Interrupt)
		wait(cmd)
		if t.Failed() {
			said, _ := os.ReadFile(filepath.Join(dir, "error.log"))
			t.Logf("nginx said:\n%s", said)
		}
	})
	return f
}

// inherited is a socket that another process can answer on.
func inherited(t *testing.T) (addr string, file *os.File) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err == nil {
		file, err = l.(*net.TCPListener).File()
		l.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return l.Addr().String(), file
}

// newCertificate makes one that signs itself, and a configuration that believes it.
func newCertificate(t *testing.T, dir string) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for name, content := range map[string][]byte{"fullchain.pem": cert, "privkey.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(cert)
	return &tls.Config{RootCAs: roots}
}

// from is how a client connects whose address is ip.
func (f *front) from(ip string) *net.Dialer {
	return &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
}

// browser is an HTTP client at an address.
func (f *front) browser(ip string) *http.Client {
	c := newBrowserlessClient()
	c.Timeout += *idleTime
	c.Transport = &http.Transport{TLSClientConfig: f.tls.Clone(), ForceAttemptHTTP2: true, DialContext: f.from(ip).DialContext}
	return c
}

// dial opens a WebSocket over TLS; res of the peer tells what came of it.
func (f *front) dial(ip, path, cookie string) (*peer, error) {
	conn, err := tls.DialWithDialer(f.from(ip), "tcp", f.addr, f.tls)
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(*idleTime + tooLong))
	p := &peer{t: f.t, conn: conn}
	return p, p.tryHandshake(f.base+path, "Cookie: "+cookie, "Origin: https://chat.test")
}

// do sends a request and returns the answer.
func (f *front) do(c *http.Client, method, url, body string, headers ...string) (res *http.Response, text string) {
	f.t.Helper()
	r, err := http.NewRequestWithContext(f.t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		f.t.Fatal(err)
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Set(name, value)
	}
	if res, err = c.Do(r); err != nil {
		f.t.Fatal(err)
	}
	defer res.Body.Close()
	all, err := io.ReadAll(res.Body)
	if err != nil {
		f.t.Fatal(err)
	}
	return res, string(all)
}

// The configuration that is shown is the one that is printed, and nothing gets into
// it that nginx would take for more than a name.
func TestNginxConfiguration(t *testing.T) {
	var conf strings.Builder
	shown, err := os.ReadFile("deploy/nginx.conf")
	if err == nil {
		err = nginx([]string{"-url", "https://chat.example.org", "-addr", "localhost:8080"}, &conf)
	}
	if err != nil || conf.String() != string(shown) {
		t.Errorf("%v; now deploy/nginx.conf has to be\n%s", err, &conf)
	}
	for _, args := range []string{"", "-url http://chat.test", "-url https://a;b", "-url https://a/b;c", "-url https://a/$b", "-url https://a/%0ab",
		"-url https://a -addr unix:/a;b", "-url https://a -addr localhost", "-url https://a word"} {
		if err := nginx(strings.Fields(args), io.Discard); err == nil {
			t.Errorf("chatd nginx %s: no error", args)
		}
	}
}

// nginx takes it, leads to https, speaks HTTP/2, leaves the path as it is, and lets
// nothing through by which visitors would pretend to be others.
func TestNginxForwards(t *testing.T) {
	for base, network := range map[string]string{"": "tcp", "/some/path.d": "unix"} {
		addr := "127.0.0.1:0"
		if network == "unix" {
			addr = filepath.Join(t.TempDir(), "sock")
		}
		l, err := net.Listen(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		behind := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h := r.Header
			fmt.Fprintln(w, r.URL, r.Host, h["X-Forwarded-For"], h["X-Forwarded-Proto"], h["X-Forwarded-Host"], h["Remote-User"])
		})}
		go behind.Serve(l)
		defer behind.Close()
		f := startNginx(t, base, strings.TrimPrefix(network+":"+l.Addr().String(), "tcp:"))
		c := &http.Client{Transport: &http.Transport{TLSClientConfig: f.tls.Clone(), ForceAttemptHTTP2: true}}
		for _, path := range []string{base + "/a%20b?c", base + "/ws", base + "/chat/%E5%A4%A7/"} {
			r, err := http.NewRequest("GET", f.plain+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Header = http.Header{"X-Forwarded-For": {"9.9.9.9"}, "X-Forwarded-Host": {"x"}, "Remote-User": {"root"}}
			res, err := c.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			text, _ := io.ReadAll(res.Body)
			res.Body.Close()
			host := res.Request.URL.Host
			if want := fmt.Sprintln(path, host, "[127.0.0.1] [https]", "["+host+"]", "[]"); string(text) != want || res.ProtoMajor != 2 {
				t.Errorf("%s: %s %s, want %s", path, res.Proto, text, want)
			}
		}
	}
}

// Everything works behind nginx, over TLS, by a port as by a Unix socket, also in a subpath.
func TestBehindNginx(t *testing.T) {
	for _, base := range []string{"", "/team/chat"} {
		t.Run(strings.ReplaceAll("root"+base, "/", "_"), func(t *testing.T) { behindNginx(t, base) })
	}
}

func behindNginx(t *testing.T, base string) {
	const ip, form = "127.0.0.9", "Content-Type: application/x-www-form-urlencoded"
	d := &daemon{t: t, dir: t.TempDir()}
	addr, file := inherited(t)
	if base != "" {
		addr = "unix:" + filepath.Join(t.TempDir(), "sock")
	}
	f := startNginx(t, base, addr)
	d.args = []string{"-url", f.url, "-trust", "127.0.0.1/32", "-rate", "0"}
	if d.addr = addr; base == "" {
		d.run(activated(d, []*os.File{file}))
	} else {
		d.start()
	}
	defer d.kill()

	c := f.browser(ip)
	res, _ := f.do(c, "POST", f.url+"/setup", "username=ann&password=long+enough&token="+d.await(setUpLink), form)
	if res.StatusCode != 200 || res.Request.URL.String() != f.url+"/chat/" {
		t.Fatal("set up:", res.Status, res.Request.URL)
	}
	if res, _ := f.do(c, "GET", f.url, ""); res.Request.URL.String() != f.url+"/chat/" {
		t.Error("without a slash:", res.Status, res.Request.URL)
	}
	if root := *res.Request.URL; base != "" {
		if root.Path = "/"; len(c.Jar.Cookies(&root)) != 0 {
			t.Error("others on the host get our cookies")
		}
	}
	_, text := f.do(c, "GET", f.url+"/account/", "")
	if !strings.Contains(text, ip) {
		t.Error("the session is not from the client's address")
	}
	for _, m := range regexp.MustCompile(`(?:href|src|action)="(/[^"?#]*)`).FindAllStringSubmatch(text, -1) {
		if res, _ := f.do(c, "GET", strings.TrimSuffix(f.url, base)+m[1], ""); !strings.HasPrefix(m[1], base+"/") || res.StatusCode == 404 && strings.Contains(m[1], "static") {
			t.Error("a link out of the subpath:", m[1], res.Status)
		}
	}
	cookie := c.Jar.Cookies(res.Request.URL)[0].String()
	f.sizes(c)
	f.live(d, c, cookie)
}

// sizes posts as much as may be, and more.
func (f *front) sizes(c *http.Client) {
	f.do(c, "POST", f.url+"/chat/lobby/", "first", "Accept: application/json")
	for _, test := range []struct {
		size, status int
		header       string
	}{
		{maxBody, 200, "X: y"}, {maxBody + 1, 413, "X: y"}, {maxPayload, 200, "X-GitHub-Event: push"}, {maxPayload + 1, 413, "X-GitHub-Event: push"},
	} {
		body := pushPayload
		if test.size <= maxBody+1 {
			body = `{"message":"padded"}`
		}
		body += strings.Repeat(" ", test.size-len(body))
		if res, text := f.do(c, "POST", f.url+"/chat/lobby/", body, "Content-Type: application/json", test.header); res.StatusCode != test.status {
			f.t.Errorf("%d bytes: %s %s", test.size, res.Status, text)
		}
	}
}

// live listens in every way to the lobby, keeps silent for a while, and then has
// everybody hear at once what is said.
func (f *front) live(d *daemon, c *http.Client, cookie string) {
	t := f.t
	t.Setenv("SSL_CERT_FILE", f.cert)
	tail := d.terminal(d.token(scopeRead), nil, "tail", "lobby", "-url", f.url)
	tail.saw("padded")
	heard := make(chan string, 100)
	listen := func(what string, next func() (string, error)) {
		go func() {
			for {
				text, err := next()
				if err != nil || strings.Contains(text, "after all") {
					heard <- fmt.Sprint(what, " ", err)
					return
				}
			}
		}()
	}
	paths := []string{"/ws", "/ws/chat/lobby/", "/ws/lobby/", "/room/lobby/", "/chat/"}
	for _, path := range paths {
		p, err := f.dial("127.0.0.8", path, cookie)
		if err != nil || p.res.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("%s: %v, %v", path, err, p)
		}
		defer p.conn.Close()
		if path == "/ws" {
			p.send(opText, []byte(`{"type":"hello"}`))
		}
		listen(path, func() (string, error) { text, err := p.nextText(); return string(text), err })
	}
	soon, cancel := context.WithTimeout(t.Context(), *idleTime+tooLong)
	defer cancel()
	for _, accept := range []string{"text/event-stream", "application/x-ndjson", "text/plain"} {
		r, err := http.NewRequestWithContext(soon, "GET", f.url+"/chat/lobby/?since=0", nil) // over HTTP/2 nginx sends a head only with what follows
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Accept", accept)
		res, err := c.Do(r)
		if err != nil || res.StatusCode != 200 {
			t.Fatal(res, err)
		}
		defer res.Body.Close()
		lines := bufio.NewReader(res.Body)
		listen(accept, func() (string, error) { return lines.ReadString('\n') })
	}
	time.Sleep(*idleTime)
	said := time.Now()
	f.do(c, "POST", f.url+"/chat/lobby/", "after all", "Accept: application/json")
	for range len(paths) + 3 {
		select {
		case text := <-heard:
			if !strings.HasSuffix(text, "<nil>") {
				t.Error(text)
			}
		case <-time.After(tooLong):
			t.Fatal("somebody does not hear what is said")
		}
	}
	t.Logf("all heard it after %v", time.Since(said))
	tail.saw("after all")
}

// returner is a client that comes back whenever it is cut off, as those of chatd do.
type returner struct {
	f     *front
	ip    string
	since int64
	seen  []string // cids of messages
	back  chan struct{}
}

// live reads until it has seen the message with the cid last. refused counts the
// connections that it did not get.
func (c *returner) live(last string, refused *atomic.Int64) {
	for began := time.Now(); time.Since(began) < 2*tooLong; {
		p, err := c.f.dial(c.ip, "/ws", "__Host-"+cookieOf("ann"))
		if err != nil || p.res.StatusCode != http.StatusSwitchingProtocols {
			refused.Add(1)
		} else {
			p.send(opText, fmt.Appendf(nil, `{"type":"hello","since":%d}`, c.since))
		}
		for err == nil {
			var text []byte
			var e eventFrame
			if text, err = p.nextText(); err == nil {
				err = json.Unmarshal(text, &e)
			}
			switch {
			case e.Type == "caught_up":
				c.back <- struct{}{}
			case e.Type == "message":
				if c.since, c.seen = e.ID, append(c.seen, e.CID); e.CID == last {
					p.conn.Close()
					return
				}
			}
		}
		if p != nil {
			p.conn.Close()
		}
		time.Sleep(250*time.Millisecond + mathrand.N(500*time.Millisecond))
	}
}

// TestRestartBehindNginx stops and kills chatd under 200 people, while the socket stays
// open as systemd keeps it: nobody is refused, and nobody misses or sees anything twice.
func TestRestartBehindNginx(t *testing.T) {
	t.Parallel()
	const people, last = 200, "last"
	d := &daemon{t: t, dir: t.TempDir()}
	newPeople(t, d.dir, []string{"lobby"}, "ann")
	addr, file := inherited(t)
	f := startNginx(t, "", addr)
	d.args = []string{"-url", f.url, "-trust", "127.0.0.1/32", "-rate", "0"}
	start := func() { d.run(activated(d, []*os.File{file})) }
	start()
	var refused atomic.Int64
	var all sync.WaitGroup
	crowd := make([]*returner, people)
	back := make(chan struct{}, people)
	returned := func() {
		for range people {
			select {
			case <-back:
			case <-time.After(tooLong):
				t.Fatal("not all are back")
			}
		}
	}
	for i := range crowd {
		crowd[i] = &returner{f: f, ip: fmt.Sprint("127.0.1.", i+1), back: back}
		all.Go(func() { crowd[i].live(last, &refused) })
	}
	returned()

	var said []string
	var again atomic.Int64
	say := func(c *http.Client, cid string) {
		for began := time.Now(); time.Since(began) < tooLong; {
			res, _ := f.do(c, "POST", f.url+"/chat/lobby/", "hello", "Idempotency-Key: "+cid, "Accept: application/json", "Cookie: __Host-"+cookieOf("ann"))
			if res.StatusCode == http.StatusOK {
				said = append(said, cid)
				return
			}
			again.Add(1)
			time.Sleep(50 * time.Millisecond)
		}
	}
	var ended atomic.Bool
	var speaker sync.WaitGroup
	speaker.Go(func() {
		c := f.browser("127.0.2.1")
		for n := 0; !ended.Load(); n++ {
			say(c, fmt.Sprint("m", n))
		}
		say(c, last)
	})
	for i, end := range []func(){d.stop, d.kill, d.stop, d.kill} {
		time.Sleep(300 * time.Millisecond) // people chat
		began, before := time.Now(), again.Load()
		end()
		time.Sleep(time.Second) // as if the upgrade took so long: those who come meanwhile wait
		start()
		returned()
		failed := again.Load() - before
		if t.Logf("%d: all %d are back after %v; %d messages had to be sent again", i, people, time.Since(began).Round(time.Millisecond), failed); i%2 == 0 && failed > 0 {
			t.Error("SIGTERM cut off requests")
		}
	}
	ended.Store(true)
	speaker.Wait()
	all.Wait()
	for _, c := range crowd {
		if strings.Join(c.seen, " ") != strings.Join(said, " ") {
			t.Fatalf("%s saw %d messages, said were %d", c.ip, len(c.seen), len(said))
		}
	}
	if n := refused.Load(); n > 0 {
		t.Errorf("%d were refused", n)
	}
	t.Logf("each saw all %d messages once", len(said))
	d.stop()
}
