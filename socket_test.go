package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"
)

// frames makes a script of frames, each as the first byte and the payload.
func clientFrames(parts ...any) []byte {
	var b []byte
	for i := 0; i < len(parts); i += 2 {
		b = append(b, maskedFrame(byte(parts[i].(int)), []byte(parts[i+1].(string)))...)
	}
	return b
}

// frameCase is one conversation with an echo server.
type frameCase struct {
	name string
	send []byte
	want []string // "opcode payload"; a Close as "8 code"
}

const echoLimit = 70_000

// frameCases covers RFC 6455 by section. After each, the client says goodbye.
func frameCases() []frameCase {
	const fin, text, bin, end, ping, pong, cont = 0x80, opText, opBinary, opClose, opPing, opPong, opContinuation
	code := func(code uint16, reason string) string {
		return string(binary.BigEndian.AppendUint16(nil, code)) + reason
	}
	long := strings.Repeat("é", echoLimit/2)
	cases := []frameCase{
		{"§5.6 text", clientFrames(fin|text, "hello 你好"), []string{"1 hello 你好", "8 1000"}},
		{"§5.6 binary", clientFrames(fin|bin, "\x00\xff"), []string{"2 \x00\xff", "8 1000"}},
		{"§5.6 empty", clientFrames(fin|text, ""), []string{"1 ", "8 1000"}},
		{"§5.4 fragments", clientFrames(text, "a", cont, "b", fin|cont, "c"), []string{"1 abc", "8 1000"}},
		{"§5.4 empty fragments", clientFrames(text, "", cont, "", fin|cont, ""), []string{"1 ", "8 1000"}},
		{"§5.4 fragments of binary", clientFrames(bin, "\xff", fin|cont, "\xfe"), []string{"2 \xff\xfe", "8 1000"}},
		{"§5.4 ping between fragments", clientFrames(text, "a", fin|ping, "p", fin|cont, "b"), []string{"10 p", "1 ab", "8 1000"}},
		{"§5.4 empty pong between fragments", clientFrames(text, "a", fin|pong, "", fin|cont, "b"), []string{"1 ab", "8 1000"}},
		{"§5.4 close between fragments", clientFrames(text, "a", fin|end, code(1000, "")), []string{"8 1000"}},
		{"§5.4 character cut by a fragment", clientFrames(text, "\xe4\xbd", fin|cont, "\xa0"), []string{"1 你", "8 1000"}},
		{"§5.4 continuation of nothing", clientFrames(fin|cont, "a"), []string{"8 1002"}},
		{"§5.4 continuation after the end", clientFrames(fin|text, "a", cont, "b"), []string{"1 a", "8 1002"}},
		{"§5.4 message within a message", clientFrames(text, "a", fin|text, "b"), []string{"8 1002"}},
		{"§5.4 binary within a text", clientFrames(text, "a", bin, "b"), []string{"8 1002"}},
		{"§5.5.3 pong unasked", clientFrames(fin|pong, "x", fin|text, "a"), []string{"1 a", "8 1000"}},
		{"§5.5.3 empty pongs", clientFrames(fin|pong, "", fin|pong, "", fin|text, "a"), []string{"1 a", "8 1000"}},
		{"§5.5.2 ten pings", bytes.Repeat(clientFrames(fin|ping, "x"), 10), append(slices.Repeat([]string{"10 x"}, 10), "8 1000")},
		{"§5.1 not masked", appendFrame(nil, text, []byte("a")), []string{"8 1002"}},
		{"§5.1 empty and not masked", appendFrame(nil, text, nil), []string{"8 1002"}},
		{"§5.1 ping not masked", appendFrame(nil, ping, []byte("a")), []string{"8 1002"}},
		{"§5.1 empty pong not masked", appendFrame(nil, pong, nil), []string{"8 1002"}},
		{"§5.2 16 bits for 1", []byte{fin | text, 0x80 | 126, 0, 1, 0, 0, 0, 0, 'a'}, []string{"8 1002"}},
		{"§5.2 16 bits for 125", append([]byte{fin | text, 0x80 | 126, 0, 125, 0, 0, 0, 0}, long[:125]...), []string{"8 1002"}},
		{"§5.2 64 bits for 65535", append([]byte{fin | bin, 0x80 | 127, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0}, long[:65535]...), []string{"8 1002"}},
		{"§5.2 64 bits of which the first is set", append([]byte{fin | text, 0x80 | 127, 0x80, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0}, strings.Repeat("x", 1<<16)...), []string{"8 1002"}},
		{"§5.5.2 ping of 125 bytes", clientFrames(fin|ping, long[:125]), []string{"10 " + long[:125], "8 1000"}},
		{"§7.4.1 too big", clientFrames(fin|text, long+"x"), []string{"8 1009"}},
		{"§7.4.1 too big in fragments", clientFrames(text, long, fin|cont, "xx"), []string{"8 1009"}},
		{"§7.4.1 too big by claim", []byte{fin | text, 0x80 | 127, 0, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, []string{"8 1009"}},
		{"§5.5.1 empty close", clientFrames(fin|end, ""), []string{"8 "}},
		{"§5.5.1 close of one byte", clientFrames(fin|end, "x"), []string{"8 1002"}},
		{"§5.5.1 close of 125 bytes", clientFrames(fin|end, code(1000, long[:122])), []string{"8 1000"}},
		{"§5.5.1 close of 126 bytes", clientFrames(fin|end, code(1000, long[:124])), []string{"8 1002"}},
		{"§5.5.1 fragmented close", clientFrames(end, code(1000, "")), []string{"8 1002"}},
		{"§5.5.1 reason not UTF-8", clientFrames(fin|end, code(1000, "\xff")), []string{"8 1007"}},
		{"§5.5.1 text after close", clientFrames(fin|end, code(3000, ""), fin|text, "a"), []string{"8 3000"}},
		{"§5.5.1 ping after close", clientFrames(fin|end, code(3000, ""), fin|ping, "a"), []string{"8 3000"}},
		{"§5.5.1 two closes", clientFrames(fin|end, code(3000, ""), fin|end, code(3001, "")), []string{"8 3000"}},
	}
	for _, n := range []int{1, 124, 125, 126, 127, 128, 255, 256, 257, 65534, 65535, 65536, 65537, echoLimit} {
		payload := strings.Repeat("x", n)
		cases = append(cases,
			frameCase{fmt.Sprint("§5.2 text of ", n), clientFrames(fin|text, payload), []string{"1 " + payload, "8 1000"}},
			frameCase{fmt.Sprint("§5.4 halves of ", n), clientFrames(text, payload[:n/2], fin|cont, payload[n/2:]), []string{"1 " + payload, "8 1000"}})
	}
	for op := range 16 {
		name := fmt.Sprint("§5.2 opcode ", op)
		switch {
		case op > bin && op < end, op > pong:
			cases = append(cases, frameCase{name, clientFrames(fin|op, ""), []string{"8 1002"}},
				frameCase{name + " with a payload", clientFrames(fin|op, "abc"), []string{"8 1002"}},
				frameCase{name + " between fragments", clientFrames(text, "a", fin|op, "", fin|cont, "b"), []string{"8 1002"}})
		case op >= end:
			cases = append(cases, frameCase{name + " fragmented", clientFrames(op, ""), []string{"8 1002"}},
				frameCase{name + " of 126 bytes", clientFrames(fin|op, long[:126]), []string{"8 1002"}})
		}
	}
	for rsv := 0x10; rsv <= 0x70; rsv += 0x10 {
		for _, op := range []int{text, bin, ping, end} {
			cases = append(cases, frameCase{fmt.Sprintf("§5.2 reserved bits %x of opcode %d", rsv, op), clientFrames(fin|rsv|op, ""), []string{"8 1002"}})
		}
	}
	for _, c := range []uint16{1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999} {
		cases = append(cases, frameCase{fmt.Sprint("§7.4 code ", c), clientFrames(fin|end, code(c, "bye")), []string{fmt.Sprint("8 ", c)}})
	}
	for _, c := range []uint16{0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535} {
		cases = append(cases, frameCase{fmt.Sprint("§7.4 code ", c), clientFrames(fin|end, code(c, "")), []string{"8 1002"}})
	}
	for _, s := range []string{
		"κόσμε", "\x00", "\u007f", "\u0080", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\ufffd", "\ufffe", "\uffff", "\U00010000", "\U0001fffe", "\U0010ffff", "👍🏽 中文",
	} {
		cases = append(cases, frameCase{fmt.Sprintf("§8.1 %+q", s), clientFrames(fin|text, s), []string{"1 " + s, "8 1000"}},
			frameCase{fmt.Sprintf("§8.1 %+q byte by byte", s), byteByByte(s), []string{"1 " + s, "8 1000"}})
	}
	for _, s := range []string{
		"\x80", "\xbf", "\x80\xbf", "\xc0", "\xc1 ", "\xc2", "\xe0\xa0", "\xf0\x90\x80", "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xf8\x88\x80\x80\x80", "\xfe", "\xff",
		"\xc0\xaf", "\xe0\x80\xaf", "\xf0\x80\x80\xaf", "\xc1\xbf", "\xe0\x9f\xbf", "\xf0\x8f\xbf\xbf", "\xed\xa0\x80", "\xed\xbf\xbf", "\xed\xa0\x80\xed\xb0\x80", "κό\xffσμε",
	} {
		cases = append(cases, frameCase{fmt.Sprintf("§8.1 not UTF-8 %+q", s), clientFrames(fin|text, s), []string{"8 1007"}},
			frameCase{fmt.Sprintf("§8.1 not UTF-8 %+q byte by byte", s), byteByByte(s), []string{"8 1007"}})
	}
	// What no further byte can save is refused at once, not at the end.
	cases = append(cases, frameCase{"§8.1 before the end", clientFrames(text, "κό\xff"), []string{"8 1007"}})
	return cases
}

// byteByByte is a text in fragments of a byte each.
func byteByByte(s string) []byte {
	b := maskedFrame(opText, nil)
	for i := range len(s) {
		b = append(b, maskedFrame(opContinuation, []byte{s[i]})...)
	}
	return append(b, maskedFrame(0x80|opContinuation, nil)...)
}

// TestFrames has all these conversations over TCP, and looks at every byte that
// comes back: at once, and with the client's bytes one by one.
func TestFrames(t *testing.T) {
	addr := serveConn(t, echoLimit, echo)
	goodbye := maskedFrame(0x80|opClose, binary.BigEndian.AppendUint16(nil, 1000))
	for _, test := range frameCases() {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			for _, piece := range []int{1 << 20, 1} {
				if len(test.send) > 1000 && piece == 1 {
					continue
				}
				p := dialTCP(t, addr, "/")
				for chunk := range slices.Chunk(append(bytes.Clone(test.send), goodbye...), piece) {
					if _, err := p.conn.Write(chunk); err != nil {
						break // refused already
					}
				}
				if got := p.everything(); strings.Join(got, "|") != strings.Join(test.want, "|") {
					t.Errorf("in pieces of %d: got %.200q, want %.200q", piece, got, test.want)
				}
			}
		})
	}
}

// everything reads to the end of the connection.
func (p *peer) everything() (got []string) {
	for {
		opcode, payload, err := p.next()
		if err != nil {
			return got
		}
		if opcode == opClose && len(payload) >= 2 {
			payload = fmt.Append(nil, binary.BigEndian.Uint16(payload))
		}
		got = append(got, fmt.Sprintf("%d %s", opcode, payload))
	}
}

// echo answers each message with itself.
func echo(c *Conn) {
	c.most = 64 << 20
	for {
		opcode, msg, err := c.ReadMessage()
		if err != nil {
			return
		}
		c.push(appendFrame(nil, opcode, msg))
	}
}

var echoAddr = flag.String("echo", "", "TestEchoServer listens on this `host:port`, for conformance suites, until it is interrupted")

func TestEchoServer(t *testing.T) {
	if *echoAddr == "" {
		t.Skip("serves only with -args -echo host:port")
	}
	interrupted, stop := signal.NotifyContext(t.Context(), os.Interrupt)
	defer stop()
	listener, err := net.Listen("tcp", *echoAddr)
	if err != nil {
		t.Fatal(err)
	}
	serveConnOn(t, listener, 32<<20, echo)
	t.Logf("echo on ws://%s/", *echoAddr)
	<-interrupted.Done()
}

// The Close frame arrives although much was still to be read after the fault.
func TestCloseIsNotLost(t *testing.T) {
	addr := serveConn(t, echoLimit, echo)
	for range 20 {
		p := dialTCP(t, addr, "/")
		go p.conn.Write(append(maskedFrame(0x80|3, nil), make([]byte, 1<<20)...))
		if got := p.everything(); len(got) != 1 || got[0] != "8 1002" {
			t.Fatalf("got %.100q", got)
		}
		p.conn.Close()
	}
}

// A frame that is cut off is never taken for a message.
func TestCutFrame(t *testing.T) {
	type result struct {
		msg []byte
		err error
	}
	results := make(chan result)
	addr := serveConn(t, 100, func(c *Conn) {
		_, msg, err := c.ReadMessage()
		results <- result{msg, err}
	})
	whole := maskedFrame(0x80|opText, []byte("hello"))
	for n := range len(whole) {
		p := dialTCP(t, addr, "/")
		p.write(whole[:n])
		p.conn.Close()
		if r := receive(t, results); r.err == nil {
			t.Errorf("%d of %d bytes gave the message %q", n, len(whole), r.msg)
		}
	}
}

// Frames that came with the handshake, before its answer, are not lost.
func TestEagerClient(t *testing.T) {
	addr := serveConn(t, 100, func(c *Conn) {
		if _, msg, err := c.ReadMessage(); err == nil {
			c.push(appendFrame(nil, opText, msg))
			c.ReadMessage()
		}
	})
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	p := &peer{t: t, conn: conn}
	p.handshake("/", "X: y\r\n\r\n"+string(maskedFrame(0x80|opText, []byte("early")))) // and the empty line, which nobody reads
	if _, payload, err := p.next(); err != nil || string(payload) != "early" {
		t.Errorf("got %q, %v", payload, err)
	}
}

// TestHandshake sends requests over TCP to the whole server (RFC 6455 §4.2.1).
func TestHandshake(t *testing.T) {
	s := newTestServer(t, t.TempDir(), false)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go s.http.Serve(listener)
	cookie := "Cookie: " + s.session("ann")
	proper := []string{"GET /ws HTTP/1.1", "Host: chat.test", cookie, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="}
	tests := []struct {
		name   string
		change string // "header: value" for the line that begins so; without value it goes, with + it is added
		status int
		header string // that has to come with it
	}{
		{"proper", "", 101, "Sec-Websocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo="},
		{"list of tokens", "Connection: keep-alive, Upgrade", 101, ""},
		{"case of tokens", "Upgrade: WebSocket", 101, ""},
		{"tokens over lines", "+Connection: keep-alive", 101, ""},
		{"several upgrades", "Upgrade: h2c, websocket", 101, ""},
		{"own subprotocol", "+Sec-WebSocket-Protocol: chatd.v1", 101, "Sec-Websocket-Protocol: chatd.v1"},
		{"one of several subprotocols", "+Sec-WebSocket-Protocol: chatd.v2, chatd.v1", 101, "Sec-Websocket-Protocol: chatd.v1"},
		{"other subprotocol", "+Sec-WebSocket-Protocol: soap", 101, "Sec-Websocket-Protocol: "},
		{"extension", "+Sec-WebSocket-Extensions: permessage-deflate", 101, "Sec-Websocket-Extensions: "},
		{"own origin", "+Origin: http://chat.test", 101, ""},
		{"foreign origin", "+Origin: http://evil.test", 403, ""},
		{"foreign origin that begins like ours", "+Origin: http://chat.test.evil.test", 403, ""},
		{"opaque origin", "+Origin: null", 403, ""},
		{"POST", "GET /ws HTTP/1.1: POST /ws HTTP/1.1", 405, "Allow: GET, HEAD"},
		{"HTTP/1.0", "GET /ws HTTP/1.1: GET /ws HTTP/1.0", 400, ""},
		{"body", "+Content-Length: 1", 400, ""},
		{"chunked body", "+Transfer-Encoding: chunked", 400, ""},
		{"no Connection", "Connection", 426, "Upgrade: websocket"},
		{"Connection that contains the word", "Connection: not-upgraded", 426, "Connection: Upgrade"},
		{"no Upgrade", "Upgrade", 426, "Upgrade: websocket"},
		{"other Upgrade", "Upgrade: h2c", 426, "Upgrade: websocket"},
		{"version 12", "Sec-WebSocket-Version: 12", 426, "Sec-Websocket-Version: 13"},
		{"version 8, 13", "Sec-WebSocket-Version: 8, 13", 426, "Sec-Websocket-Version: 13"},
		{"two versions", "+Sec-WebSocket-Version: 12", 426, "Sec-Websocket-Version: 13"},
		{"no version", "Sec-WebSocket-Version", 426, "Sec-Websocket-Version: 13"},
		{"no key", "Sec-WebSocket-Key", 400, ""},
		{"two keys", "+Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", 400, ""},
		{"short key", "Sec-WebSocket-Key: AAAA", 400, ""},
		{"long key", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAAAAAAAA", 400, ""},
		{"key not base64", "Sec-WebSocket-Key: ????????????????????????", 400, ""},
		{"no session", "Cookie", 401, ""},
		{"forged session", "Cookie: chatd=AAAAAAAAAAAAAAAAAAAAAAAAAA", 401, ""},
		{"no such path", "GET /ws HTTP/1.1: GET /wsx HTTP/1.1", 404, ""},
		{"impossible room", "GET /ws HTTP/1.1: GET /ws/chat/a%3Fb/ HTTP/1.1", 400, ""},
		{"no Host", "Host", 400, ""},
	}
	for _, test := range tests {
		conn, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, strings.Join(changed(proper, test.change), "\r\n")+"\r\n\r\n")
		io.WriteString(conn, "0\r\n\r\n") // a body for those who announce one
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(test.name, err)
		}
		name, value, _ := strings.Cut(test.header, ": ")
		if res.StatusCode != test.status || name != "" && res.Header.Get(name) != value {
			t.Errorf("%s: %s with %s %q, want %d with %q", test.name, res.Status, name, res.Header.Get(name), test.status, value)
		}
		conn.Close()
	}
}

func changed(lines []string, change string) []string {
	lines = slices.Clone(lines)
	if added, ok := strings.CutPrefix(change, "+"); ok {
		return append(lines, added)
	}
	name, value, replaced := strings.Cut(change, ": ")
	for i, line := range lines {
		switch {
		case name == "" || line != name && !strings.HasPrefix(line, name+":"):
		case strings.HasPrefix(name, "GET"):
			lines[i] = value
		case replaced:
			lines[i] = name + ": " + value
		default:
			return slices.Delete(lines, i, i+1)
		}
	}
	return lines
}

// A middleware that wraps the ResponseWriter, and HTTP/2, must not break a handshake.
func TestHijackWrapped(t *testing.T) {
	if _, err := hijack(httptest.NewRecorder(), 100); err == nil {
		t.Error("a connection that cannot be hijacked was")
	}
	r := httptest.NewRequest("GET", "/ws", nil)
	r.ProtoMajor, r.ProtoMinor = 2, 0
	if err := checkHandshake(make(http.Header), r); problemOf(err).status != http.StatusBadRequest {
		t.Errorf("HTTP/2: %v", err)
	}
	type wrapper struct{ http.ResponseWriter }
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := hijack(struct {
			wrapper
			unwrapper
		}{wrapper{w}, unwrapper{w}}, 100)
		if err == nil {
			err = c.handshake(r, "")
		}
		if err != nil {
			t.Error(err)
			return
		}
		c.close(4000, "")
		c.finish()
	}))
	defer server.Close()
	p := dialTCP(t, server.Listener.Addr().String(), "/")
	if got := p.everything(); len(got) != 1 || got[0] != "8 4000" {
		t.Errorf("got %q", got)
	}
}

type unwrapper struct{ w http.ResponseWriter }

func (u unwrapper) Unwrap() http.ResponseWriter { return u.w }

// serveConn answers handshakes on a TCP port and runs talk on each connection.
func serveConn(t testing.TB, limit int, talk func(*Conn)) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveConnOn(t, listener, limit, talk)
	return listener.Addr().String()
}

func serveConnOn(t testing.TB, listener net.Listener, limit int, talk func(*Conn)) {
	var conns sync.WaitGroup
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := hijack(w, limit)
		if err == nil {
			err = c.handshake(r, "")
		}
		if err != nil {
			t.Error(err)
			return
		}
		conns.Go(func() {
			talk(c)
			c.finish()
		})
	})}
	conns.Go(func() { server.Serve(listener) })
	t.Cleanup(func() {
		server.Close()
		conns.Wait()
	})
}

func dialTCP(t *testing.T, addr, path string, headers ...string) *peer {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(tooLong))
	p := &peer{t: t, conn: conn}
	p.handshake(path, headers...)
	return p
}

// FuzzReadMessage feeds anything to the reader: it must not panic, and whatever
// it returns as text must be UTF-8 within the limit.
func FuzzReadMessage(f *testing.F) {
	f.Add(clientFrames(0x80|opText, "hello", opText, "a", 0x80|opContinuation, "b"))
	f.Add([]byte{0x81, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, data []byte) {
		const limit = 1000
		server, client := net.Pipe()
		c := &Conn{outbox: outbox{conn: server}, br: bufio.NewReader(server), limit: limit}
		go io.Copy(io.Discard, client)
		if err := c.handshake(&http.Request{Header: http.Header{"Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="}}}, ""); err != nil {
			t.Fatal(err)
		}
		go func() {
			client.Write(data)
			client.Close()
		}()
		defer c.finish()
		for read := 0; ; {
			opcode, msg, err := c.ReadMessage()
			if err != nil {
				return
			}
			if read += len(msg); len(msg) > limit || read > len(data) || opcode == opText && !utf8.Valid(msg) {
				t.Errorf("opcode %d, %d bytes: %.100q", opcode, len(msg), msg)
			}
		}
	})
}
