package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// `chatd doctor` calls a chatd by its public URL, through the proxy in front of it,
// and says what does not arrive as it has to, and which line of whose configuration
// would change that. chatd tells it what has arrived, as it shows a token whose hash it
// has left in the data directory: so it is also sure that it speaks to that chatd.

const (
	doctorFile    = "doctor"        // in the data directory: the hash of the doctor's token
	doctorLife    = 5 * time.Minute // of that
	promptly      = 3 * time.Second // so long may take what nobody holds back
	answerWait    = 5 * time.Second
	forgedAddress = "192.0.2.1" // nobody's: RFC 5737

	leastDays   = 14      // that a certificate has to be valid
	leastDisk   = 1 << 30 // bytes
	clockWithin = 10 * time.Second
)

// doctor is one visit.
type doctor struct {
	url        *url.URL // without final slash
	data, addr string
	insecure   bool
	idle       time.Duration
	stdout     io.Writer

	token         string
	client        *http.Client // to the public URL
	checks, wrong int
}

// visit is `chatd doctor`. It makes all checks, in an order in which later ones make
// sense. The error says how many of them something is wrong with.
func visit(ctx context.Context, args []string, stdout io.Writer) error {
	d := &doctor{stdout: stdout, token: rand.Text(), client: clientTo("")}
	flags := newFlags("chatd doctor")
	public := flags.String("url", "", "")
	flags.StringVar(&d.data, "data", "./data", "")
	flags.StringVar(&d.addr, "addr", "localhost:8080", "")
	flags.BoolVar(&d.insecure, "insecure", false, "")
	flags.DurationVar(&d.idle, "idle", 70*time.Second, "")
	words, err := parseWords(flags, args)
	if err != nil {
		return err
	}
	if *public == "" || len(words) > 0 {
		return errors.New("say chatd doctor -url https://chat.example.org -data DIR")
	}
	if d.url, err = parsePublic(strings.TrimSuffix(*public, "/")); err != nil {
		return err
	}
	defer os.Remove(filepath.Join(d.data, doctorFile))
	if err := d.leaveToken(); err != nil {
		return fmt.Errorf("-data: %w; only root, and whom it belongs to, can do this", err)
	}
	d.checkData()
	d.checkProcess(ctx)
	d.checkCertificate(ctx)
	if d.checkAnswer(ctx) {
		d.checkBody(ctx)
		d.checkLong(ctx)
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case d.wrong > 0:
		return fmt.Errorf("%d of %d checks: wrong", d.wrong, d.checks)
	}
	return nil
}

// clientTo follows no redirects, and takes any certificate, as that is judged apart. It
// connects to addr, if that is not empty, wherever the URL leads.
func clientTo(addr string) *http.Client {
	dialer := net.Dialer{Timeout: answerWait}
	return &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, network, there string) (net.Conn, error) {
				if path, ok := strings.CutPrefix(addr, "unix:"); ok {
					return dialer.DialContext(ctx, "unix", path)
				}
				return dialer.DialContext(ctx, network, cmp.Or(addr, there))
			},
			TLSClientConfig:       &tls.Config{InsecureSkipVerify: true},
			ResponseHeaderTimeout: answerWait, DisableKeepAlives: true,
		},
	}
}

// leaveToken leaves the token's hash where chatd finds it, in a file of chatd's.
func (d *doctor) leaveToken() error {
	info, err := os.Stat(d.data)
	if err != nil {
		return err
	}
	path := filepath.Join(d.data, doctorFile)
	os.Remove(path)                                                       // of one who was killed
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600) // and follow no link there
	if err != nil {
		return err
	}
	owner := info.Sys().(*syscall.Stat_t)
	_, err = f.Write(hashToken(d.token))
	return errors.Join(err, f.Chown(int(owner.Uid), -1), f.Close())
}

// judge prints what was found, and, unless it is good and there is no error, the cure.
func (d *doctor) judge(what string, good bool, err error, found, cure string) bool {
	d.checks++
	if err != nil {
		found = fmt.Sprintf("%s (%v)", found, err)
	}
	if good = good && err == nil; good {
		fmt.Fprintf(d.stdout, "ok     %s: %s\n", what, found)
	} else {
		d.wrong++
		fmt.Fprintf(d.stdout, "wrong  %s: %s → %s\n", what, found, cure)
	}
	return good
}

// nginx is a cure.
func (d *doctor) nginx(path, line string) string {
	return fmt.Sprintf("in nginx.conf, location of %s%s: %s", d.url.Path, path, line)
}

func (d *doctor) server(line string) string {
	return fmt.Sprintf("in nginx.conf, server %s: %s", d.url.Hostname(), line)
}

func started(line string) string { return "in chatd.service, ExecStart: " + line }

// checkData looks at what is on the disk.
func (d *doctor) checkData() {
	open := 0
	err := filepath.WalkDir(d.data+"/", func(_ string, e fs.DirEntry, err error) error { // systemd has a link there
		if err != nil {
			return err
		}
		if info, err := e.Info(); err == nil && info.Mode().Perm()&0o077 != 0 { // else it is not there any more
			open++
		}
		return nil
	})
	d.judge("data", open == 0, err, fmt.Sprintf("%s has %d files open to other users", d.data, open), "chmod -R go= "+d.data)

	var disk syscall.Statfs_t
	err = syscall.Statfs(d.data, &disk)
	free := uint64(disk.Bavail) * uint64(disk.Bsize)
	d.judge("disk", free >= leastDisk, err, fmt.Sprintf("%d MiB are free", free>>20), fmt.Sprintf("make room for %d MiB at least", leastDisk>>20))
}

// checkProcess asks chatd itself, past the proxy.
func (d *doctor) checkProcess(ctx context.Context) {
	_, seen, err := d.see(ctx, clientTo(d.addr), "http://"+d.url.Host+d.url.Path+"/doctor/"+d.token, nil, 0)
	if d.judge("chatd", true, err, "is at "+d.addr, started(fmt.Sprintf("-addr %s -data %s -url %s, as the user whom that belongs to", d.addr, d.data, d.url))) {
		d.judge("url", seen.URL == d.url.String(), nil, fmt.Sprintf("chatd has -url %q", seen.URL), started("-url "+d.url.String()))
		d.judge("descriptors", seen.MaxConns <= socketsFor(seen.Descriptors), nil, fmt.Sprintf("%d for -max-conns %d", seen.Descriptors, seen.MaxConns),
			fmt.Sprintf("in chatd.service: LimitNOFILE=%d", seen.MaxConns+spareDescriptors))
	}
}

// checkCertificate also finds out whether the name leads anywhere.
func (d *doctor) checkCertificate(ctx context.Context) {
	if d.url.Scheme != "https" {
		d.judge("tls", false, nil, "there is none", "chatd nginx -url https://"+d.url.Host+d.url.Path)
		return
	}
	host, days := d.url.Hostname(), 0
	found := "at " + d.url.Host
	dialer := tls.Dialer{NetDialer: &net.Dialer{Timeout: answerWait}, Config: &tls.Config{InsecureSkipVerify: d.insecure}}
	conn, err := dialer.DialContext(ctx, "tcp", net.JoinHostPort(host, cmp.Or(d.url.Port(), "443")))
	if err == nil {
		defer conn.Close()
		days = int(time.Until(conn.(*tls.Conn).ConnectionState().PeerCertificates[0].NotAfter).Hours() / 24)
		found = fmt.Sprintf("the certificate is good for %d days", days)
	}
	d.judge("tls", d.insecure || days >= leastDays, err, found,
		"certbot certonly --nginx -d "+host+"; "+d.server("listen 443 ssl; ssl_certificate /etc/letsencrypt/live/"+host+"/fullchain.pem;"))
}

// ask sends what visitors could forge, and header, and posts so many bytes, if any.
func (d *doctor) ask(ctx context.Context, c *http.Client, address string, header http.Header, size int) (*http.Response, error) {
	method := http.MethodGet
	if size > 0 {
		method = http.MethodPost
	}
	r, err := http.NewRequestWithContext(ctx, method, address, strings.NewReader(strings.Repeat("x", size)))
	if err != nil {
		return nil, err
	}
	r.Header = http.Header{"Accept": {"application/json"}, "X-Forwarded-For": {forgedAddress}, "X-Forwarded-Proto": {"forged"}}
	maps.Copy(r.Header, header)
	res, err := c.Do(r)
	if e, ok := errors.AsType[*url.Error](err); ok { // which has the token in it
		err = e.Err
	}
	return res, err
}

// see is ask, and what chatd has seen of it. The error says what else was answered;
// then there may be a response, without its body.
func (d *doctor) see(ctx context.Context, c *http.Client, address string, header http.Header, size int) (res *http.Response, seen findings, err error) {
	if res, err = d.ask(ctx, c, address, header, size); err != nil {
		return nil, seen, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return res, seen, fmt.Errorf("answered with %s", res.Status)
	}
	if err = json.NewDecoder(res.Body).Decode(&seen); err == nil && seen.Proto == "" {
		err = errors.New("not answered by chatd")
	}
	return res, seen, err
}

// at is a URL for the doctor: /doctor/, or below /chat/ or /ws/, as the proxy may
// treat those in another way.
func (d *doctor) at(prefix string) string { return d.url.String() + prefix + "/doctor/" + d.token }

// checkAnswer finds out whether it is this chatd that answers, and then what has
// arrived of the request and of the answer.
func (d *doctor) checkAnswer(ctx context.Context) bool {
	res, seen, err := d.see(ctx, d.client, d.at(""), nil, 0)
	found, line := "at "+d.url.String(), "proxy_pass http://"+d.addr+";"
	if err != nil && res != nil && res.Header.Get("Content-Security-Policy") != "" {
		found, line = "another chatd, or to another path", line+" with no path after it"
		if _, _, err := d.see(ctx, d.client, d.url.String()+d.url.Path+"/doctor/"+d.token, nil, 0); err == nil {
			found = "of the path " + d.url.Path + " is cut off"
		}
	}
	if !d.judge("answer", true, err, found, d.nginx("/", line)) {
		return false
	}
	d.checkRequest(seen)
	d.checkResponse(res, seen)
	return true
}

func (d *doctor) checkRequest(seen findings) {
	proto, forwarded := seen.Header["X-Forwarded-Proto"], seen.Header["X-Forwarded-For"]
	hops := strings.Split(strings.Join(forwarded, ","), ",")
	last := strings.TrimSpace(hops[len(hops)-1])
	set := func(line string) string { return d.nginx("/", "proxy_set_header "+line+";") }
	d.judge("http", seen.Proto == "HTTP/1.1", nil, "chatd is asked with "+seen.Proto, d.nginx("/", "proxy_http_version 1.1;"))
	d.judge("host", seen.Host == d.url.Host, nil, fmt.Sprintf("Host arrives as %q", seen.Host), set("Host $http_host"))
	d.judge("proto", slices.Equal(proto, []string{d.url.Scheme}), nil, fmt.Sprintf("X-Forwarded-Proto arrives as %q", proto), set("X-Forwarded-Proto $scheme"))
	d.judge("address", last != "" && last != forgedAddress, nil, fmt.Sprintf("X-Forwarded-For arrives as %q, where a visitor says %s", forwarded, forgedAddress), set("X-Forwarded-For $remote_addr"))
	d.judge("trust", seen.Believed, nil, fmt.Sprintf("X-Forwarded-For from %s is believed: %v", seen.Peer, seen.Believed), started("-trust with the address in "+seen.Peer))
}

func (d *doctor) checkResponse(res *http.Response, seen findings) {
	for _, name := range slices.Sorted(maps.Keys(seen.Sent)) {
		line, got, sent := "take out proxy_hide_header and add_header of "+name, res.Header[name], seen.Sent[name]
		if name == "Set-Cookie" {
			line = "take out proxy_cookie_path, proxy_cookie_domain and proxy_cookie_flags"
		}
		found := name + " arrives"
		good := slices.Equal(got, sent)
		if !good {
			found = fmt.Sprintf("%s as %q, where chatd says %q", found, got, sent)
		}
		d.judge("header", good, nil, found, d.nginx("/", line))
	}
	date, err := http.ParseTime(res.Header.Get("Date"))
	ahead := time.Until(date).Round(time.Second)
	d.judge("clock", ahead.Abs() <= clockWithin, err, fmt.Sprintf("that of %s is ahead by %v", d.url.Host, ahead), "timedatectl set-ntp true")
}

// checkBody sends as much as GitHub may.
func (d *doctor) checkBody(ctx context.Context) {
	_, seen, err := d.see(ctx, d.client, d.at("/chat"), http.Header{"X-Github-Event": {"ping"}}, maxPayload)
	d.judge("body", seen.Body == maxPayload, err, fmt.Sprintf("of %d KiB", maxPayload>>10), d.nginx("/chat/", "client_max_body_size 1m;"))
}

// checkSockets opens one, and returns it if that works.
func (d *doctor) checkSockets(ctx context.Context) io.ReadWriteCloser {
	origin := d.url.Scheme + "://" + d.url.Host
	upgrade := http.Header{
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Origin": {origin},
		"Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="},
	}
	_, seen, err := d.see(ctx, d.client, d.at("/ws"), http.Header{"Origin": {origin}}, 0)
	d.judge("origin", slices.Equal(seen.Header["Origin"], []string{origin}), err, fmt.Sprintf("Origin arrives as %q", seen.Header["Origin"]),
		d.nginx("/ws", "proxy_set_header Origin $http_origin;"))
	res, err := d.ask(ctx, d.client, d.at("/ws"), upgrade, 0)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		d.checkUpgrade(ctx, upgrade)
		return nil
	}
	socket := res.Body.(io.ReadWriteCloser)
	d.judge("sockets", saysBack(socket), nil, "one is open", d.nginx("/ws", "proxy_pass http://"+d.addr+";"))
	return socket
}

// checkUpgrade says why a request for a socket is answered with something else.
func (d *doctor) checkUpgrade(ctx context.Context, upgrade http.Header) {
	_, seen, err := d.see(ctx, d.client, d.at("/ws"), upgrade, 0)
	if !d.judge("sockets", true, err, "chatd says what is wrong with an upgrade", d.nginx("/ws", "proxy_pass http://"+d.addr+";")) {
		return
	}
	d.judge("sockets", seen.Proto == "HTTP/1.1", nil, "one is asked for with "+seen.Proto, d.nginx("/ws", "proxy_http_version 1.1;"))
	for _, c := range []struct{ name, token, value string }{{"Upgrade", "websocket", "$http_upgrade"}, {"Connection", "upgrade", "$chatd_connection"}} {
		d.judge("sockets", hasToken(seen.Header, c.name, c.token), nil, fmt.Sprintf("%s arrives as %q", c.name, seen.Header[c.name]),
			d.nginx("/ws", "proxy_set_header "+c.name+" "+c.value+";"))
	}
}

// saysBack reports whether a socket says at once what it is told.
func saysBack(socket io.ReadWriteCloser) bool {
	_, err := socket.Write([]byte("\x81\x81\x00\x00\x00\x00x")) // RFC 6455 §5.2, masked with nothing
	return err == nil && arrives(socket, appendFrame(nil, opText, []byte("x")))
}

// arrives reports whether what is expected comes promptly. If nothing does, r is closed.
func arrives(r io.ReadCloser, expected []byte) bool {
	defer time.AfterFunc(promptly, func() { r.Close() }).Stop()
	got := make([]byte, len(expected))
	_, err := io.ReadFull(r, got)
	return err == nil && bytes.Equal(got, expected)
}

// checkStream opens one, and returns it if that works.
func (d *doctor) checkStream(ctx context.Context) io.ReadCloser {
	address := d.at("/chat") + "?idle=" + cmp.Or(d.idle, doctorLife).String()
	res, err := d.ask(ctx, d.client, address, http.Header{"Accept": {dialectSSE.contentType}, "Accept-Encoding": {"gzip"}}, 0)
	if err != nil {
		d.judge("stream", false, err, "nothing arrives", d.nginx("/chat/", "proxy_buffering off;"))
		return nil
	}
	prompt, encoding := arrives(res.Body, dialectSSE.idle), res.Header.Get("Content-Encoding")
	if d.judge("stream", encoding == "", nil, fmt.Sprintf("arrives with encoding %q", encoding), d.nginx("/chat/", "gzip off;")) &&
		d.judge("stream", prompt, nil, fmt.Sprintf("what is said arrives at once: %v", prompt), d.nginx("/chat/", "proxy_buffering off;")) {
		return res.Body
	}
	res.Body.Close()
	return nil
}

// checkLong opens what stays open, and then says nothing over it for a while.
func (d *doctor) checkLong(ctx context.Context) {
	socket, stream := d.checkSockets(ctx), d.checkStream(ctx)
	if socket != nil {
		defer socket.Close()
	}
	if stream != nil {
		defer stream.Close()
	}
	if d.idle == 0 {
		return
	}
	fmt.Fprintf(d.stdout, "       idle for %v; -idle 0 does without\n", d.idle)
	select {
	case <-time.After(d.idle):
	case <-ctx.Done():
		return
	}
	for _, c := range []struct {
		good       bool
		what, path string
	}{{socket == nil || saysBack(socket), "socket", "/ws"}, {stream == nil || arrives(stream, dialectSSE.idle), "stream", "/chat/"}} {
		d.judge("idle", c.good, nil, fmt.Sprintf("the %s still works: %v", c.what, c.good), d.nginx(c.path, "proxy_read_timeout 90s;"))
	}
}
