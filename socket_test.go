package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
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

// TestFrames sends raw bytes over TCP, and looks at everything that comes back
// (RFC 6455). The server answers each message with its opcode and its text.
func TestFrames(t *testing.T) {
	const limit = 70_000
	addr := serveConn(t, limit, func(c *Conn) {
		for {
			opcode, msg, err := c.ReadMessage()
			if err != nil {
				return
			}
			c.push(appendFrame(nil, opcode, msg))
		}
	})
	const fin, text, bin, end, ping, pong, cont = 0x80, opText, opBinary, opClose, opPing, opPong, opContinuation
	code := func(code uint16, reason string) string {
		return string(binary.BigEndian.AppendUint16(nil, code)) + reason
	}
	long := strings.Repeat("é", limit/2)
	goodbye := maskedFrame(fin|end, []byte(code(1000, "")))
	tests := []struct {
		name string
		send []byte
		want []string // "opcode payload"; a Close as "8 code"
	}{
		{"§5.6 text", clientFrames(fin|text, "hello 你好"), []string{"1 hello 你好", "8 1000"}},
		{"§5.6 binary", clientFrames(fin|bin, "\x00\xff"), []string{"2 \x00\xff", "8 1000"}},
		{"§5.6 empty", clientFrames(fin|text, ""), []string{"1 ", "8 1000"}},
		{"§5.2 16-bit length", clientFrames(fin|text, long[:60_000]), []string{"1 " + long[:60_000], "8 1000"}},
		{"§5.2 64-bit length", clientFrames(fin|text, long), []string{"1 " + long, "8 1000"}},
		{"§5.4 fragments", clientFrames(text, "a", cont, "b", fin|cont, "c"), []string{"1 abc", "8 1000"}},
		{"§5.4 ping between fragments", clientFrames(text, "a", fin|ping, "p", fin|cont, "b"), []string{"10 p", "1 ab", "8 1000"}},
		{"§5.4 character cut by a fragment", clientFrames(text, "\xe4\xbd", fin|cont, "\xa0"), []string{"1 你", "8 1000"}},
		{"§5.4 continuation of nothing", clientFrames(fin|cont, "a"), []string{"8 1002"}},
		{"§5.4 message within a message", clientFrames(text, "a", fin|text, "b"), []string{"8 1002"}},
		{"§5.5 fragmented ping", clientFrames(ping, ""), []string{"8 1002"}},
		{"§5.5 ping of 126 bytes", clientFrames(fin|ping, strings.Repeat("x", 126)), []string{"8 1002"}},
		{"§5.5.2 ping of 125 bytes", clientFrames(fin|ping, strings.Repeat("x", 125)), []string{"10 " + strings.Repeat("x", 125), "8 1000"}},
		{"§5.5.3 pong unasked", clientFrames(fin|pong, "x", fin|text, "a"), []string{"1 a", "8 1000"}},
		{"§5.2 reserved bit", clientFrames(fin|0x40|text, "a"), []string{"8 1002"}},
		{"§5.2 reserved opcode", clientFrames(fin|3, ""), []string{"8 1002"}},
		{"§5.2 reserved control opcode", clientFrames(fin|11, ""), []string{"8 1002"}},
		{"§5.1 not masked", appendFrame(nil, text, []byte("a")), []string{"8 1002"}},
		{"§5.2 length not in its shortest form", []byte{fin | text, 0x80 | 126, 0, 1, 0, 0, 0, 0, 'a'}, []string{"8 1002"}},
		{"§5.2 length over 63 bits", []byte{fin | text, 0x80 | 127, 0x80, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 'a'}, []string{"8 1002"}},
		{"§8.1 not UTF-8", clientFrames(fin|text, "a\xff"), []string{"8 1007"}},
		{"§8.1 not UTF-8, known before the end", clientFrames(text, "\xf5"), []string{"8 1007"}},
		{"§8.1 cut character", clientFrames(fin|text, "\xe4\xbd"), []string{"8 1007"}},
		{"§8.1 surrogate", clientFrames(fin|text, "\xed\xa0\x80"), []string{"8 1007"}},
		{"§7.4.1 too big", clientFrames(fin|text, long+"x"), []string{"8 1009"}},
		{"§7.4.1 too big in fragments", clientFrames(text, long, fin|cont, "xx"), []string{"8 1009"}},
		{"§7.4.1 too big by claim", []byte{fin | text, 0x80 | 127, 0, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, []string{"8 1009"}},
		{"§5.5.1 close", clientFrames(fin|end, code(1000, "bye")), []string{"8 1000"}},
		{"§5.5.1 empty close", clientFrames(fin|end, ""), []string{"8 "}},
		{"§5.5.1 close of one byte", clientFrames(fin|end, "x"), []string{"8 1002"}},
		{"§5.5.1 nothing after close", clientFrames(fin|end, code(3000, ""), fin|text, "a"), []string{"8 3000"}},
		{"§7.4.2 private code", clientFrames(fin|end, code(4999, "")), []string{"8 4999"}},
		{"§7.4.1 reserved code", clientFrames(fin|end, code(1005, "")), []string{"8 1002"}},
		{"§7.4.2 code out of range", clientFrames(fin|end, code(999, "")), []string{"8 1002"}},
		{"§5.5.1 reason not UTF-8", clientFrames(fin|end, code(1000, "\xff")), []string{"8 1007"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := dialTCP(t, addr, "/")
			p.write(test.send)
			p.write(goodbye)
			var got []string
			for {
				opcode, payload, err := p.next()
				if err != nil {
					break
				}
				if opcode == opClose && len(payload) >= 2 {
					payload = fmt.Append(nil, binary.BigEndian.Uint16(payload))
				}
				got = append(got, fmt.Sprintf("%d %s", opcode, payload))
			}
			if strings.Join(got, "|") != strings.Join(test.want, "|") {
				t.Errorf("got %.200q, want %.200q", got, test.want)
			}
		})
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
		if r := <-results; r.err == nil {
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

func TestHandshakeRefused(t *testing.T) {
	tests := []struct {
		name   string
		change func(*http.Request)
		want   int
	}{
		{"proper", func(r *http.Request) {}, 0},
		{"tokens over several lines", func(r *http.Request) {
			r.Header["Connection"] = []string{"keep-alive", "x, Upgrade"}
			r.Header["Upgrade"] = []string{"h2c, WebSocket"}
		}, 0},
		{"POST", func(r *http.Request) { r.Method = "POST" }, 405},
		{"HTTP/1.0", func(r *http.Request) { r.ProtoMinor = 0 }, 400},
		{"body", func(r *http.Request) { r.ContentLength = 1 }, 400},
		{"no Connection", func(r *http.Request) { r.Header.Set("Connection", "not-upgraded") }, 426},
		{"no Upgrade", func(r *http.Request) { r.Header.Del("Upgrade") }, 426},
		{"version 12", func(r *http.Request) { r.Header.Set("Sec-WebSocket-Version", "12") }, 426},
		{"no version", func(r *http.Request) { r.Header.Del("Sec-WebSocket-Version") }, 426},
		{"no key", func(r *http.Request) { r.Header.Del("Sec-WebSocket-Key") }, 400},
		{"two keys", func(r *http.Request) { r.Header.Add("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA==") }, 400},
		{"short key", func(r *http.Request) { r.Header.Set("Sec-WebSocket-Key", "AAAA") }, 400},
		{"key not base64", func(r *http.Request) { r.Header.Set("Sec-WebSocket-Key", "????????????????????????") }, 400},
	}
	for _, test := range tests {
		r, err := http.NewRequest("GET", "/", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="}}
		test.change(r)
		answer := make(http.Header)
		status := 0
		if err := checkHandshake(answer, r); err != nil {
			status = problemOf(err).status
		}
		if status != test.want {
			t.Errorf("%s: %d, want %d", test.name, status, test.want)
		}
		if status == 426 && (answer.Get("Upgrade") != "websocket" || answer.Get("Sec-WebSocket-Version") != "13") || status == 405 && answer.Get("Allow") != "GET" {
			t.Errorf("%s: %d comes with %v", test.name, status, answer)
		}
	}
}

// serveConn answers handshakes on a TCP port and runs talk on each connection.
func serveConn(t *testing.T, limit int, talk func(*Conn)) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
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
	return listener.Addr().String()
}

func dialTCP(t *testing.T, addr, path string, headers ...string) *peer {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(time.Minute))
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
