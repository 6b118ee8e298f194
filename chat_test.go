package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var update = flag.Bool("update", false, "rewrite testdata/*.chat with what the server said")

// TestTranscripts replays the conversations in testdata/*.chat. Lines with > are
// what a client does; lines with < are all that the clients got because of it.
//
//	server> -guests          begins the file: flags
//	server> wait 1s          lets time pass
//	server> restart          stops the server and starts it on the same data
//	ann> open /ws            opens a socket, signed in as ann; names that begin with "someone" are not signed in
//	ann> binary 00ff         sends a binary message
//	ann> close               sends a Close frame and hangs up
//	ann> post /path {…}      posts JSON over HTTP
//	ann> get /path           asks for JSON
//	ann> form /path a=b&c=d  posts a form; what comes is the status and where it leads
//	ann> …                   sends a text message
func TestTranscripts(t *testing.T) {
	names, err := filepath.Glob("testdata/*.chat")
	if err != nil || len(names) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	for _, name := range names {
		t.Run(filepath.Base(name), func(t *testing.T) {
			script, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			var got string
			synctest.Test(t, func(t *testing.T) { got = perform(t, dir, string(script)) })
			if *update {
				if err := os.WriteFile(name, []byte(got), 0o666); err != nil {
					t.Fatal(err)
				}
			} else if got != string(script) {
				t.Errorf("%s went otherwise (-update accepts it). Now:\n%s", name, got)
			}
		})
	}
}

func perform(t *testing.T, dir, script string) string {
	stage := &stage{t: t, dir: dir, peers: make(map[string]*peer)}
	var out strings.Builder
	for line := range strings.Lines(script) {
		who, what, acts := strings.Cut(strings.TrimSuffix(line, "\n"), "> ")
		if strings.HasPrefix(line, "#") || line == "\n" {
			out.WriteString(line)
			continue
		}
		if !acts || strings.Contains(who, "<") {
			continue // what was expected; it is written anew below
		}
		out.WriteString(line)
		if stage.server == nil {
			stage.server = newTestServer(t, dir, strings.Contains(line, "-guests"))
			if who == "server" {
				continue
			}
		}
		stage.act(who, what)
		synctest.Wait() // all that can happen has happened
		for _, name := range stage.names {
			for _, heard := range stage.peers[name].takeHeard() {
				fmt.Fprintf(&out, "%s< %s\n", name, heard)
			}
		}
	}
	stage.server.close()
	return out.String()
}

type stage struct {
	t      *testing.T
	dir    string
	server *testServer
	peers  map[string]*peer
	names  []string // in order of appearance
}

func (s *stage) act(who, what string) {
	s.t.Helper()
	verb, arg, _ := strings.Cut(what, " ")
	p := s.peers[who]
	switch {
	case who == "server" && verb == "wait":
		d, err := time.ParseDuration(arg)
		if err != nil {
			s.t.Fatal(err)
		}
		time.Sleep(d)
	case who == "server" && verb == "restart":
		guests := s.server.guests
		s.server.close()
		s.server = newTestServer(s.t, s.dir, guests)
	case verb == "open":
		cookie := ""
		if !strings.HasPrefix(who, "someone") {
			cookie = s.server.session(who)
		}
		if p == nil {
			s.names = append(s.names, who)
		}
		p = s.server.dial(arg, cookie)
		s.peers[who] = p
		go p.listen()
	case verb == "stream":
		if p != nil {
			p.conn.Close()
			synctest.Wait()
		} else {
			s.names = append(s.names, who)
		}
		path, headers, _ := strings.Cut(arg, " ")
		p = &peer{t: s.t, conn: s.server.listener.dial()}
		s.peers[who] = p
		go p.listenToStream(path, append(strings.Split(headers, "; "), "Cookie: "+s.server.session(who))...)
	case verb == "get" || verb == "post" || verb == "form" || verb == "curl":
		if p == nil {
			p = &peer{t: s.t}
			s.peers[who], s.names = p, append(s.names, who)
		}
		path, body, _ := strings.Cut(arg, " ")
		if verb == "curl" { // what curl -d sends, or with a -H of the type
			kind, rest, given := strings.Cut(body, "; ")
			if !given {
				kind, rest = "application/x-www-form-urlencoded", body
			}
			rest = strings.ReplaceAll(rest, `\n`, "\n")
			status, _, answer := s.server.browse("POST", path, s.server.session(who), rest, "Accept: */*", "Content-Type: "+kind)
			p.note("%d %s", status, strings.TrimSpace(answer))
			return
		}
		if verb == "form" {
			status, location, _ := s.server.browse("POST", path, s.server.session(who), body)
			p.note("%d %s", status, location)
			return
		}
		status, _, answer := s.server.browse(strings.ToUpper(verb), path, s.server.session(who), body, "Accept: application/json", "Content-Type: application/json")
		p.note("%d %s", status, strings.TrimSpace(answer))
	case p == nil:
		s.t.Fatalf("%s has no socket for %q", who, what)
	case verb == "close":
		p.send(opClose, binary.BigEndian.AppendUint16(nil, 1000))
	case verb == "binary":
		p.send(opBinary, []byte(arg))
	default:
		p.send(opText, []byte(what))
	}
}

// testServer is chatd behind a listener in memory, so that it runs in a synctest
// bubble: real HTTP, real WebSocket frames, real SQLite, and time for free.
type testServer struct {
	*server
	t        *testing.T
	http     *http.Server
	listener *memoryListener
	closed   bool
	stop     func()                         // ends what is in the background
	gate     atomic.Pointer[chan struct{}]  // what is committed is not published before it is closed
	hooked   atomic.Pointer[memoryListener] // what webhooks call
}

func newTestServer(t *testing.T, dir string, guests bool) *testServer {
	t.Helper()
	var hub *Hub
	ts := &testServer{t: t, listener: &memoryListener{conns: make(chan net.Conn), done: make(chan struct{})}}
	store, err := OpenStore(dir, func(events []Event) {
		if gate := ts.gate.Load(); gate != nil {
			<-*gate
		}
		hub.Publish(events)
		ts.hooks.nudge(events)
		ts.keeper.nudge(events)
	})
	if err != nil {
		t.Fatal(err)
	}
	last, err := store.LastID(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	hub = NewHub(last, 0, 0)
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	ts.server, err = newServer(config{guests: guests, rate: 5, trust: "127.0.0.0/8", hookAllow: "127.0.0.0/8"}, store, hub, log)
	if err != nil {
		t.Fatal(err)
	}
	ts.version = "test" // transcripts tell it
	ts.http = ts.httpServer()
	go ts.http.Serve(ts.listener)
	ts.stop = inBackground(ts.pushes.run, ts.keeper.keep, ts.keeper.wipeDeleted, store.keepIndexed)
	t.Cleanup(ts.close)
	real := ts.hooks.client.Transport.(*http.Transport)
	ts.hooks.client.Transport = &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		if l := ts.hooked.Load(); l != nil {
			return l.dialContext(ctx)
		}
		return real.DialContext(ctx, network, addr)
	}}
	if err := ts.hooks.start("http://chat.test"); err != nil {
		t.Fatal(err)
	}
	return ts
}

// close takes everything down in the order of serve.
func (s *testServer) close() {
	if s.closed {
		return
	}
	s.closed = true
	s.http.Close()
	s.stop()
	s.hooks.close()
	s.hub.Close()
	if err := s.store.Close(); err != nil {
		s.t.Error(err)
	}
}

// user returns the member of that name, who is made if need be.
func (s *testServer) user(name string) User {
	s.t.Helper()
	u, _, err := s.store.UserByName(s.t.Context(), name)
	if err != nil {
		u, err = s.store.CreateUser(name, RoleMember, "")
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return u
}

// room makes a room.
func (s *testServer) room(name string) Room {
	s.t.Helper()
	r, err := s.store.CreateRoom(name, s.user("ann"))
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

// session signs a member in and returns the cookie.
func (s *testServer) session(name string) string {
	s.t.Helper()
	token := "token-of-" + name
	hash := hashToken(token)
	if _, err := s.store.SessionUser(s.t.Context(), hash); err != nil {
		if err := s.store.CreateSession(s.user(name), hash, "", ""); err != nil {
			s.t.Fatal(err)
		}
	}
	return sessionCookie + "=" + token
}

func (s *testServer) dial(path, cookie string) *peer {
	s.t.Helper()
	p := &peer{t: s.t, conn: s.listener.dial()}
	p.handshake(path, credential(cookie)+": "+cookie)
	return p
}

// credential is the header for a cookie, or a token with Bearer before it.
func credential(secret string) string {
	if strings.HasPrefix(secret, "Bearer ") {
		return "Authorization"
	}
	return "Cookie"
}

type memoryListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (l *memoryListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *memoryListener) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *memoryListener) Addr() net.Addr { return &net.TCPAddr{} }

// dial opens a connection that cannot be waited on without an end.
func (l *memoryListener) dial() net.Conn {
	a, b := net.Pipe()
	if b.SetDeadline(time.Now().Add(tooLong)); time.Now().Year() < 2020 { // a bubble, where the years begin with 2000 and are free
		b.SetDeadline(time.Now().AddDate(0, 0, 60))
	}
	select {
	case l.conns <- localConn{a}:
	case <-l.done:
		a.Close()
	}
	return b
}

// localConn says that it comes from this machine, which proxies do.
type localConn struct{ net.Conn }

func (localConn) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }

// peer is a WebSocket client that can say anything, also what is forbidden.
type peer struct {
	t    *testing.T
	conn net.Conn
	br   *bufio.Reader
	res  *http.Response

	mu    sync.Mutex
	heard []string
}

// handshake asks for an upgrade; res tells what came of it.
func (p *peer) handshake(path string, headers ...string) {
	p.t.Helper()
	p.t.Cleanup(func() { p.conn.Close() })
	if err := p.tryHandshake(path, headers...); err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) tryHandshake(path string, headers ...string) (err error) {
	lines := append([]string{
		"GET " + strings.ReplaceAll(path, " ", "%20") + " HTTP/1.1", "Host: chat.test", "Connection: Upgrade", "Upgrade: websocket",
		"Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
	}, headers...)
	if _, err := io.WriteString(p.conn, strings.Join(lines, "\r\n")+"\r\n\r\n"); err != nil {
		return err
	}
	p.br = bufio.NewReader(p.conn)
	p.res, err = http.ReadResponse(p.br, nil)
	return err
}

func (p *peer) send(opcode byte, payload []byte) { p.write(maskedFrame(0x80|opcode, payload)) }

func (p *peer) write(b []byte) {
	p.t.Helper()
	if _, err := p.conn.Write(b); err != nil {
		p.t.Errorf("write: %v", err)
	}
}

// maskedFrame is a client's frame in its shortest form (RFC 6455 §5.2).
func maskedFrame(first byte, payload []byte) []byte {
	f := appendFrame(nil, 0, payload)
	header := f[:len(f)-len(payload)]
	header[0] = first
	header[1] |= 0x80
	mask := []byte{1, 2, 3, 4}
	f = append(bytes.Clone(header), mask...)
	for i, b := range payload {
		f = append(f, b^mask[i%4])
	}
	return f
}

// next reads one frame.
func (p *peer) next() (opcode byte, payload []byte, err error) {
	var h [2]byte
	if _, err := io.ReadFull(p.br, h[:]); err != nil {
		return 0, nil, err
	}
	size := uint64(h[1])
	switch size {
	case 126:
		var n [2]byte
		_, err = io.ReadFull(p.br, n[:])
		size = uint64(binary.BigEndian.Uint16(n[:]))
	case 127:
		var n [8]byte
		_, err = io.ReadFull(p.br, n[:])
		size = binary.BigEndian.Uint64(n[:])
	}
	if err != nil {
		return 0, nil, err
	}
	payload = make([]byte, size)
	_, err = io.ReadFull(p.br, payload)
	return h[0] & 0x0f, payload, err
}

// said is next for whom pings, which may come at any time, are nothing.
func (p *peer) said() (opcode byte, payload []byte, err error) {
	for opcode = opPing; opcode == opPing; {
		opcode, payload, err = p.next()
	}
	return opcode, payload, err
}

// listen writes down what comes, until the end.
func (p *peer) listen() {
	if p.res.StatusCode != http.StatusSwitchingProtocols {
		body, _ := io.ReadAll(p.res.Body)
		p.note("refused %d %s", p.res.StatusCode, bytes.TrimSpace(body))
		return
	}
	for {
		opcode, payload, err := p.next()
		switch {
		case err != nil:
			p.note("hung up")
			return
		case opcode == opText:
			p.note("%s", payload)
		case opcode == opClose && len(payload) >= 2:
			p.note("closed %d", binary.BigEndian.Uint16(payload))
		case opcode == opPing:
			p.send(opPong, payload)
		default:
			p.note("opcode %d %q", opcode, payload)
		}
	}
}

// listenToStream writes down the lines of a response without end, and what head it has.
func (p *peer) listenToStream(path string, headers ...string) {
	p.t.Cleanup(func() { p.conn.Close() })
	head := "GET " + path + " HTTP/1.1\r\nHost: chat.test\r\n" + strings.Join(headers, "\r\n") + "\r\n\r\n"
	if _, err := io.WriteString(p.conn, head); err != nil {
		p.t.Error(err)
		return
	}
	res, err := http.ReadResponse(bufio.NewReader(p.conn), nil)
	if err != nil {
		p.note("%v", err)
		return
	}
	p.note("%d %s", res.StatusCode, res.Header.Get("Content-Type"))
	lines := bufio.NewScanner(res.Body)
	for lines.Scan() {
		p.note("%s", lines.Text())
	}
	p.note("over")
}

func (p *peer) note(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.heard = append(p.heard, fmt.Sprintf(format, args...))
}

func (p *peer) takeHeard() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	heard := p.heard
	p.heard = nil
	return heard
}
