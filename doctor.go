package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"errors"
	"flag"
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
// would change that. chatd tells it what has arrived, as it shows a token whose hash
// it has left in the data directory: so the two also know that they mean the same chatd.

const (
	doctorFile    = "doctor"        // in the data directory: the hash of the doctor's token
	doctorLife    = 5 * time.Minute // of that
	promptly      = 3 * time.Second // is what nobody holds back here
	answerWait    = 5 * time.Second // with what has to answer
	forgedAddress = "192.0.2.1"     // is nobody's: RFC 5737

	leastDays   = 14      // that a certificate has to be valid
	leastDisk   = 1 << 30 // bytes
	backupLife  = 48 * time.Hour
	clockWithin = 10 * time.Second
)

// findings is what chatd has to say about a request of the doctor's.
type findings struct {
	ID          string // another one each time
	Proto, Host string
	Header      http.Header
	Body        int64  // bytes
	Peer        string // who sent it to us
	Believed    bool   // X-Forwarded-For from there counts
	Sent        http.Header

	URL                   string // as in -url
	Descriptors, MaxConns int
}

// handleDoctor tells the doctor what arrives of its requests. One for a socket that
// arrives as such becomes one, which says everything back; one for a stream gets an
// empty event at once and another after ?idle=. To all others there is nothing here.
func (s *server) handleDoctor(w http.ResponseWriter, r *http.Request, v visitor) error {
	if !s.knowsDoctor(r.PathValue("token")) {
		return ErrNotFound
	}
	switch {
	case checkHandshake(http.Header{}, r) == nil:
		return sayBack(w, r)
	case streamOf(r, v) == dialectSSE:
		return streamAfter(w, r.FormValue("idle"))
	}
	n, err := io.Copy(io.Discard, r.Body)
	if err != nil {
		return badForm(err)
	}
	s.setCookie(w, "doctor", "", time.Second)
	said := &http.Request{RemoteAddr: r.RemoteAddr, Header: http.Header{"X-Forwarded-For": {forgedAddress}}}
	writeJSON(w, http.StatusOK, findings{
		ID: rand.Text(), Proto: r.Proto, Host: r.Host, Header: r.Header, Body: n, Sent: w.Header().Clone(),
		Peer: r.RemoteAddr, Believed: s.clientAddress(said) == forgedAddress,
		URL: s.public, Descriptors: descriptors(), MaxConns: s.hub.maxSockets,
	})
	return nil
}

// knowsDoctor reports whether a doctor has left the hash of the token, and lately.
func (s *server) knowsDoctor(token string) bool {
	path := filepath.Join(s.data, doctorFile)
	info, err := os.Stat(path)
	if err != nil || time.Since(info.ModTime()) > doctorLife {
		return false
	}
	hash, err := os.ReadFile(path)
	return err == nil && subtle.ConstantTimeCompare(hash, hashToken(token)) == 1
}

func sayBack(w http.ResponseWriter, r *http.Request) error {
	c, err := hijack(w, maxControl)
	if err != nil {
		return err
	}
	defer c.finish()
	c.conn.SetDeadline(time.Now().Add(doctorLife))
	if c.handshake(r, "") != nil {
		return nil
	}
	for {
		opcode, msg, err := c.ReadMessage()
		if err != nil {
			return nil
		}
		c.push(appendFrame(nil, opcode, msg))
	}
}

func streamAfter(w http.ResponseWriter, idle string) error {
	wait, err := time.ParseDuration(idle)
	if err != nil {
		return refuse(http.StatusBadRequest, "bad_request")
	}
	c, err := hijack(w, maxControl)
	if err != nil {
		return err
	}
	defer c.conn.Close()
	c.conn.Write(append(streamHead(w.Header(), dialectSSE), dialectSSE.idle...))
	c.conn.SetReadDeadline(time.Now().Add(min(wait, doctorLife)))
	io.Copy(io.Discard, c.br) // ends sooner if the doctor leaves
	c.conn.Write(dialectSSE.idle)
	return nil
}

// doctor is one visit.
type doctor struct {
	url        *url.URL
	base       string // path of url, without final slash
	data, addr string
	insecure   bool
	idle       time.Duration
	quick      bool
	stdout     io.Writer
	dial       func(ctx context.Context, network, addr string) (net.Conn, error)

	token         string
	client        *http.Client // to the public URL
	checks, wrong int
}

func newDoctor(args []string, stdout io.Writer) (d *doctor, err error) {
	d = &doctor{stdout: stdout, token: rand.Text(), dial: (&net.Dialer{Timeout: answerWait}).DialContext}
	flags := flag.NewFlagSet("chatd doctor", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	public := flags.String("url", "", "")
	flags.StringVar(&d.data, "data", "./data", "")
	flags.StringVar(&d.addr, "addr", "localhost:8080", "")
	flags.BoolVar(&d.insecure, "insecure", false, "")
	flags.DurationVar(&d.idle, "idle", 70*time.Second, "")
	flags.BoolVar(&d.quick, "quick", false, "")
	words, err := parseWords(flags, args)
	if err != nil {
		return nil, err
	}
	if *public == "" || len(words) > 0 {
		return nil, errors.New("say chatd doctor -url https://chat.example.org -data DIR")
	}
	d.url, err = parsePublic(strings.TrimSuffix(*public, "/"))
	if err != nil {
		return nil, err
	}
	d.base = d.url.Path
	d.client = d.clientOver(func(ctx context.Context, network, addr string) (net.Conn, error) { return d.dial(ctx, network, addr) })
	return d, nil
}

// clientOver follows no redirects. It takes any certificate, as that is judged apart.
func (d *doctor) clientOver(dial func(ctx context.Context, network, addr string) (net.Conn, error)) *http.Client {
	return &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialContext: dial, TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
			ResponseHeaderTimeout: answerWait, DisableKeepAlives: true,
		},
	}
}

// visit makes all checks, in an order in which later ones make sense. The error says
// how many of them something is wrong with.
func (d *doctor) visit(ctx context.Context) error {
	leave, err := d.enter()
	if err != nil {
		return err
	}
	defer leave()
	d.checkData()
	d.checkProcess(ctx)
	if d.checkName(ctx) && d.checkAnswer(ctx) {
		d.checkBodies(ctx)
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

// enter leaves the token's hash where chatd finds it, until leave.
func (d *doctor) enter() (leave func(), err error) {
	// systemd has a link to where it keeps the data of a user that it makes up.
	if d.data, err = filepath.EvalSymlinks(d.data); err == nil {
		d.data, err = filepath.Abs(d.data)
	}
	info, serr := os.Stat(d.data)
	if err := cmp.Or(err, serr); err != nil {
		return nil, fmt.Errorf("-data: %w", err)
	}
	path := filepath.Join(d.data, doctorFile)
	os.Remove(path) // of one who was killed
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("only root, and whom -data belongs to, can do this: %w", err)
	}
	if owner := info.Sys().(*syscall.Stat_t); os.Getuid() == 0 {
		err = f.Chown(int(owner.Uid), int(owner.Gid))
	}
	_, werr := f.Write(hashToken(d.token))
	if err := errors.Join(err, werr, f.Close()); err != nil {
		os.Remove(path)
		return nil, err
	}
	return func() { os.Remove(path) }, nil
}

// judge prints what was found, and, unless it is good, what would make it so.
func (d *doctor) judge(good bool, what, found, cure string) bool {
	d.checks++
	found = strings.TrimSpace(found)
	if good {
		fmt.Fprintf(d.stdout, "ok     %s: %s\n", what, found)
	} else {
		d.wrong++
		fmt.Fprintf(d.stdout, "wrong  %s: %s → %s\n", what, found, cure)
	}
	return good
}

// nginx is a cure.
func (d *doctor) nginx(path, line string) string {
	return fmt.Sprintf("in nginx.conf, location of %s%s: %s", d.base, path, line)
}

// origins is nginx, unless chatd has taken the request for one of another site's page.
func (d *doctor) origins(res *http.Response, path, line string) string {
	if res != nil && res.StatusCode == http.StatusForbidden {
		line = "proxy_set_header Host $http_host; and no proxy_set_header Origin"
	}
	return d.nginx(path, line)
}

func started(line string) string { return "in chatd.service, ExecStart: " + line }

// checkData looks at what is on the disk.
func (d *doctor) checkData() {
	dir, owner, open, others := d.data, -1, 0, 0
	err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) { // any more
			return nil
		}
		if err != nil {
			return err
		}
		if info.Mode().Perm()&0o077 != 0 {
			open++
		}
		uid := int(info.Sys().(*syscall.Stat_t).Uid)
		if owner < 0 {
			owner = uid
		}
		if uid != owner {
			others++
		}
		return nil
	})
	d.judge(err == nil && open == 0, "data", fmt.Sprintf("%d of the files in %s are open to others %s", open, dir, orEmpty(err)), "chmod -R go= "+dir)
	d.judge(others == 0, "owner", fmt.Sprintf("%s belongs to user %d, and %d of the files in it to others", dir, owner, others), fmt.Sprintf("chown -R %d %s", owner, dir))

	version := 0
	db, err := sql.Open("sqlite", "file:"+filepath.Join(dir, "chatd.db")+"?mode=ro")
	if err == nil {
		err = db.QueryRow("PRAGMA user_version").Scan(&version)
		db.Close()
	}
	d.judge(err == nil && version == len(migrations)+1, "database", fmt.Sprintf("it has version %d, this chatd's is %d %s", version, len(migrations)+1, orEmpty(err)),
		"systemctl restart chatd, after you have installed this chatd")

	var disk syscall.Statfs_t
	err = syscall.Statfs(dir, &disk)
	free := uint64(disk.Bavail) * uint64(disk.Bsize)
	d.judge(err == nil && free >= leastDisk, "disk", fmt.Sprintf("%d MiB free for %s %s", free>>20, dir, orEmpty(err)), fmt.Sprintf("make room: %d MiB at least", leastDisk>>20))

	text, err := os.ReadFile(filepath.Join(dir, "last-backup"))
	last, perr := time.Parse(time.RFC3339, strings.TrimSpace(string(text)))
	found := "there is none"
	if err == nil && perr == nil {
		found = fmt.Sprintf("the last one is %v old", time.Since(last).Round(time.Minute))
	}
	d.judge(time.Since(last) < backupLife, "backup", found, "in /etc/cron.d/chatd: 0 3 * * * root chatd backup -f -data "+dir+" /var/backups/chatd.db")
}

// orEmpty is what follows what was found, if that is an error.
func orEmpty(err error) string {
	if err == nil {
		return ""
	}
	return "(" + err.Error() + ")"
}

// checkProcess asks chatd itself, past the proxy.
func (d *doctor) checkProcess(ctx context.Context) {
	network, addr := "tcp", d.addr
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		network, addr = "unix", path
	}
	c := d.clientOver(func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{Timeout: answerWait}).DialContext(ctx, network, addr)
	})
	_, seen, err := d.see(ctx, c, http.MethodGet, "http://"+d.url.Host+d.base+"/doctor/"+d.token, nil, 0)
	if !d.judge(err == nil, "chatd", fmt.Sprintf("asked at %s %s", d.addr, orEmpty(err)), started(fmt.Sprintf("-addr %s -data %s -url %s, as the user whom that belongs to", d.addr, d.data, d.url))) {
		return
	}
	d.judge(seen.URL == d.url.String(), "url", fmt.Sprintf("-url is %q", seen.URL), started("-url "+d.url.String()))
	d.judge(seen.MaxConns <= socketsFor(seen.Descriptors), "descriptors", fmt.Sprintf("%d for -max-conns %d", seen.Descriptors, seen.MaxConns),
		fmt.Sprintf("in chatd.service: LimitNOFILE=%d", seen.MaxConns+spareDescriptors))
}

// checkName follows the URL's name to a server, and reports whether one answers.
func (d *doctor) checkName(ctx context.Context) bool {
	host, port := d.url.Hostname(), d.url.Port()
	if port == "" {
		port = d.url.Scheme // its name is as good
	}
	addresses, err := net.DefaultResolver.LookupHost(ctx, host)
	if !d.judge(err == nil, "dns", fmt.Sprintf("%s is %s %s", host, strings.Join(addresses, ", "), orEmpty(err)), "at whom you rent the name from: "+host+" A, and the address of this server") {
		return false
	}
	reached := false
	for _, a := range addresses {
		conn, err := d.dial(ctx, "tcp", net.JoinHostPort(a, port))
		if d.judge(err == nil, "connect", fmt.Sprintf("to %s, port %s %s", a, port, orEmpty(err)), fmt.Sprintf("in nginx.conf, server %s: listen, for IPv4 and IPv6; and let port %s through the firewall", host, port)) {
			reached = true
			conn.Close()
		}
	}
	if d.url.Scheme != "https" {
		d.judge(false, "tls", "there is none", "chatd nginx -url https://"+d.url.Host+d.base)
		return reached
	}
	if reached = reached && d.checkCertificate(ctx, net.JoinHostPort(host, port)); reached {
		d.checkRedirect(ctx)
	}
	return reached
}

func (d *doctor) checkCertificate(ctx context.Context, addr string) bool {
	host := d.url.Hostname()
	conn, err := d.dial(ctx, "tcp", addr)
	if err == nil {
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(answerWait))
		conn = tls.Client(conn, &tls.Config{ServerName: host, InsecureSkipVerify: true}) // it is judged below
		err = conn.(*tls.Conn).HandshakeContext(ctx)
	}
	if !d.judge(err == nil, "tls", fmt.Sprintf("a handshake with %s %s", addr, orEmpty(err)), fmt.Sprintf("in nginx.conf, server %s: listen %s ssl;", host, d.url.Port())) {
		return false
	}
	chain := conn.(*tls.Conn).ConnectionState().PeerCertificates
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err = chain[0].Verify(x509.VerifyOptions{DNSName: host, Intermediates: between})
	days := int(time.Until(chain[0].NotAfter).Hours() / 24)
	cure := "certbot renew; systemctl reload nginx"
	if err != nil {
		cure = fmt.Sprintf("certbot certonly --nginx -d %s; in nginx.conf, server %s: ssl_certificate /etc/letsencrypt/live/%s/fullchain.pem;", host, host, host)
	}
	d.judge(d.insecure || err == nil && days >= leastDays, "certificate", fmt.Sprintf("valid for %d days %s", days, orEmpty(err)), cure)
	return true
}

func (d *doctor) checkRedirect(ctx context.Context) {
	res, err := d.ask(ctx, d.client, http.MethodGet, "http://"+d.url.Hostname()+d.base+"/login/", nil, 0)
	found := fmt.Sprintf("http does not lead to https %s", orEmpty(err))
	if err == nil {
		res.Body.Close()
		found = fmt.Sprintf("http is answered with %s to %q", res.Status, res.Header.Get("Location"))
	}
	d.judge(err == nil && res.StatusCode/100 == 3 && strings.HasPrefix(res.Header.Get("Location"), d.url.String()+"/login/"), "redirect", found,
		fmt.Sprintf("in nginx.conf, server %s, listen 80: return 301 https://%s$request_uri;", d.url.Hostname(), d.url.Host))
}

// ask sends a request with headers that visitors could forge, and those of header,
// and a body of so many bytes.
func (d *doctor) ask(ctx context.Context, c *http.Client, method, url string, header http.Header, size int) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(strings.Repeat("x", size)))
	if err != nil {
		return nil, err
	}
	r.Header = http.Header{"Accept": {"application/json"}, "X-Forwarded-For": {forgedAddress}, "X-Forwarded-Proto": {"forged"}}
	if size > 0 {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	maps.Copy(r.Header, header)
	return c.Do(r)
}

// see is ask, and what chatd has seen of it. The error says what else was answered;
// then there may be a response, without its body.
func (d *doctor) see(ctx context.Context, c *http.Client, method, url string, header http.Header, size int) (res *http.Response, seen findings, err error) {
	if res, err = d.ask(ctx, c, method, url, header, size); err != nil {
		return nil, seen, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return res, seen, fmt.Errorf("answered with %s", res.Status)
	}
	if err = json.NewDecoder(res.Body).Decode(&seen); err == nil && seen.ID == "" {
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
	res, seen, err := d.see(ctx, d.client, http.MethodGet, d.at(""), nil, 0)
	found, line := fmt.Sprintf("at %s %s", d.url, orEmpty(err)), "proxy_pass http://"+d.addr+";"
	if err != nil && res != nil && res.Header.Get("Content-Security-Policy") != "" {
		line += " with no path after it"
		if found = fmt.Sprintf("a chatd answers at %s, but another one, or to another path", d.url); d.base != "" {
			if _, _, err := d.see(ctx, d.client, http.MethodGet, d.url.String()+d.base+"/doctor/"+d.token, nil, 0); err == nil {
				found = "of the path " + d.base + " is cut off"
			}
		}
	}
	if !d.judge(err == nil, "answer", found, d.nginx("/", line)) {
		return false
	}
	d.checkRequest(seen)
	d.checkResponse(res, seen)
	_, again, err := d.see(ctx, d.client, http.MethodGet, d.at(""), nil, 0)
	d.judge(err == nil && again.ID != seen.ID, "cache", fmt.Sprintf("the second answer is the first one: %v %s", again.ID == seen.ID, orEmpty(err)), d.nginx("/", "proxy_cache off;"))
	return true
}

func (d *doctor) checkRequest(seen findings) {
	forwarded := seen.Header["X-Forwarded-For"]
	hops := strings.Split(strings.Join(forwarded, ","), ",")
	set := "proxy_set_header "
	for _, c := range []struct {
		good              bool
		what, found, cure string
	}{
		{seen.Proto == "HTTP/1.1", "http version", "chatd is asked with " + seen.Proto, d.nginx("/", "proxy_http_version 1.1;")},
		{seen.Host == d.url.Host, "host", fmt.Sprintf("Host arrives as %q", seen.Host), d.nginx("/", set+"Host $http_host;")},
		{slices.Equal(seen.Header["X-Forwarded-Proto"], []string{d.url.Scheme}), "forwarded proto",
			fmt.Sprintf("X-Forwarded-Proto arrives as %q", seen.Header["X-Forwarded-Proto"]), d.nginx("/", set+"X-Forwarded-Proto $scheme;")},
		{hops[len(hops)-1] != "" && strings.TrimSpace(hops[len(hops)-1]) != forgedAddress, "forwarded for",
			fmt.Sprintf("X-Forwarded-For arrives as %q, where a visitor has said %s", forwarded, forgedAddress), d.nginx("/", set+"X-Forwarded-For $remote_addr;")},
		{seen.Believed, "trust", fmt.Sprintf("X-Forwarded-For from %s is believed: %v", seen.Peer, seen.Believed), started("-trust with the address in " + seen.Peer)},
	} {
		d.judge(c.good, c.what, c.found, c.cure)
	}
}

func (d *doctor) checkResponse(res *http.Response, seen findings) {
	for _, name := range slices.Sorted(maps.Keys(seen.Sent)) {
		line := fmt.Sprintf("take out proxy_hide_header and add_header of %s", name)
		if name == "Set-Cookie" {
			line = "take out proxy_cookie_path, proxy_cookie_domain and proxy_cookie_flags"
		}
		got := res.Header[name]
		if slices.Equal(got, seen.Sent[name]) {
			d.judge(true, "header", name+" arrives", "")
		} else {
			d.judge(false, "header", fmt.Sprintf("%s arrives as %q, chatd sends %q", name, got, seen.Sent[name]), d.nginx("/", line))
		}
	}
	date, err := http.ParseTime(res.Header.Get("Date"))
	off := time.Until(date).Round(time.Second)
	d.judge(err == nil && off.Abs() <= clockWithin, "clock", fmt.Sprintf("that of %s is ahead by %v %s", d.url.Host, off, orEmpty(err)), "timedatectl set-ntp true")
}

// checkBodies sends as much as forms and GitHub may.
func (d *doctor) checkBodies(ctx context.Context) {
	for _, body := range []struct {
		size   int
		header http.Header
	}{{maxBody, nil}, {maxPayload, http.Header{"X-Github-Event": {"ping"}}}} {
		res, seen, err := d.see(ctx, d.client, http.MethodPost, d.at("/chat"), body.header, body.size)
		d.judge(err == nil && seen.Body == int64(body.size), "body", fmt.Sprintf("of %d KiB %s", body.size>>10, orEmpty(err)), d.origins(res, "/chat/", "client_max_body_size 1m;"))
	}
}

// checkSockets opens one, and returns it if that works.
func (d *doctor) checkSockets(ctx context.Context) io.ReadWriteCloser {
	origin := d.url.Scheme + "://" + d.url.Host
	upgrade := http.Header{
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Origin": {origin},
		"Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="},
	}
	_, seen, err := d.see(ctx, d.client, http.MethodGet, d.at("/ws"), http.Header{"Origin": {origin}}, 0)
	d.judge(err == nil && slices.Equal(seen.Header["Origin"], []string{origin}), "origin",
		fmt.Sprintf("Origin arrives as %q %s", seen.Header["Origin"], orEmpty(err)), d.nginx("/ws", "proxy_set_header Origin $http_origin;"))

	res, err := d.ask(ctx, d.client, http.MethodGet, d.at("/ws"), upgrade, 0)
	if err != nil {
		d.judge(false, "sockets", err.Error(), d.nginx("/ws", "proxy_pass http://"+d.addr+";"))
		return nil
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		d.checkUpgrade(res)
		return nil
	}
	socket := res.Body.(io.ReadWriteCloser)
	d.judge(saysBack(socket), "sockets", "one says back what it is told", d.nginx("/ws", "proxy_pass http://"+d.addr+";"))
	// Those of the tutorials, for whom nobody has an account here. since=x is what is
	// wrong after all that may be wrong with a handshake.
	for _, path := range []string{"/ws", "/ws/chat/lobby/?since=x", "/room/lobby/?since=x", "/chat/"} {
		res, err := d.ask(ctx, d.client, http.MethodGet, d.url.String()+path, upgrade, 0)
		found, good := fmt.Sprintf("the upgrade at %s %s", path, orEmpty(err)), false
		if err == nil {
			res.Body.Close()
			good = res.StatusCode == http.StatusUnauthorized || res.StatusCode == http.StatusBadRequest
			found += "is answered with " + res.Status
		}
		path, _, _ = strings.Cut(path, "?")
		d.judge(good, "sockets", found, d.origins(res, path, "proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $chatd_connection;"))
	}
	return socket
}

// checkUpgrade says what is missing in a request for a socket that chatd takes for none.
func (d *doctor) checkUpgrade(res *http.Response) {
	var seen findings
	err := json.NewDecoder(res.Body).Decode(&seen)
	res.Body.Close()
	if err != nil || seen.ID == "" {
		d.judge(false, "sockets", "answered with "+res.Status, d.nginx("/ws", "proxy_pass http://"+d.addr+";"))
		return
	}
	d.judge(seen.Proto == "HTTP/1.1", "sockets", "chatd is asked with "+seen.Proto, d.nginx("/ws", "proxy_http_version 1.1;"))
	for _, c := range []struct{ name, token, value string }{{"Upgrade", "websocket", "$http_upgrade"}, {"Connection", "upgrade", "$chatd_connection"}} {
		d.judge(hasToken(seen.Header, c.name, c.token), "sockets", fmt.Sprintf("%s arrives as %q", c.name, seen.Header[c.name]),
			d.nginx("/ws", "proxy_set_header "+c.name+" "+c.value+";"))
	}
}

// saysBack reports whether a socket says at once what it is told.
func saysBack(socket io.ReadWriteCloser) bool {
	_, err := socket.Write([]byte("\x81\x81\x00\x00\x00\x00x")) // RFC 6455 §5.2, masked with nothing
	return err == nil && arrives(socket, appendFrame(nil, opText, []byte("x")))
}

// arrives reads as many bytes as are expected, promptly, or else closes r if it can.
func arrives(r io.ReadCloser, expected []byte) bool {
	defer time.AfterFunc(promptly, func() { r.Close() }).Stop()
	got := make([]byte, len(expected))
	_, err := io.ReadFull(r, got)
	return err == nil && bytes.Equal(got, expected)
}

// checkStream opens one, and returns it if that works.
func (d *doctor) checkStream(ctx context.Context) io.ReadCloser {
	res, err := d.ask(ctx, d.client, http.MethodGet, d.at("/chat")+"?idle="+d.idle.String(),
		http.Header{"Accept": {dialectSSE.contentType}, "Accept-Encoding": {"gzip"}}, 0)
	if err != nil {
		d.judge(false, "stream", err.Error(), d.nginx("/chat/", "proxy_buffering off;"))
		return nil
	}
	encoding := res.Header.Get("Content-Encoding")
	found := fmt.Sprintf("answered with %s %s", res.Status, encoding)
	if !d.judge(res.StatusCode == http.StatusOK && encoding == "", "stream", found, d.nginx("/chat/", "gzip off;")) {
		res.Body.Close()
		return nil
	}
	prompt := arrives(res.Body, dialectSSE.idle)
	d.judge(prompt, "stream", fmt.Sprintf("what is said arrives at once: %v", prompt), d.nginx("/chat/", "proxy_buffering off;"))
	return res.Body
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
	if d.quick {
		return
	}
	fmt.Fprintf(d.stdout, "       idle for %v; -quick does without\n", d.idle)
	select {
	case <-time.After(d.idle):
	case <-ctx.Done():
		return
	}
	for _, c := range []struct {
		good       bool
		what, path string
	}{{socket == nil || saysBack(socket), "socket", "/ws"}, {stream == nil || arrives(stream, dialectSSE.idle), "stream", "/chat/"}} {
		d.judge(c.good, "idle", fmt.Sprintf("the %s still works: %v", c.what, c.good), d.nginx(c.path, "proxy_read_timeout 90s;"))
	}
}
