package main

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"golang.org/x/net/websocket"
)

// Opcodes (RFC 6455 §5.2).
const (
	opContinuation = 0
	opText         = websocket.TextFrame
	opBinary       = websocket.BinaryFrame
	opClose        = websocket.CloseFrame
	opPing         = websocket.PingFrame
	opPong         = websocket.PongFrame
)

// Close codes (RFC 6455 §7.4.1 and the IANA registry).
const (
	closeProtocol = 1002
	closeNotText  = 1003
	closeNoStatus = 1005 // an empty Close frame; never on the wire
	closeNotUTF8  = 1007
	closePolicy   = 1008
	closeTooBig   = 1009
	closeRestart  = 1012
	closeTryLater = 1013
	maxControl    = 125 // longest payload of a control frame (§5.5)
	readBuffer    = 256 // bytes; net/http's has 4 KiB
	growBy        = 4 << 10
	lingerWait    = time.Second
	messageWait   = 30 * time.Second // from the first byte of a message to its last
)

// closeError says why a WebSocket ended.
type closeError struct {
	code   int
	reason string
}

func (e *closeError) Error() string { return fmt.Sprintf("websocket closed: %d %s", e.code, e.reason) }

func protocolError(reason string) error { return &closeError{closeProtocol, reason} }

// Conn is the server's side of one WebSocket.
//
// golang.org/x/net/websocket answers the handshake and takes frames apart. By
// itself it would hand fragments out as messages and check neither UTF-8 nor
// reserved bits nor close codes, so Conn judges the frames, one goroutine at a
// time, in ReadMessage. Everything that is written goes through the outbox.
type Conn struct {
	outbox
	br    *bufio.Reader
	ws    *websocket.Conn // shares br; set by handshake
	limit int             // bytes of the longest message

	payload io.Reader // rest of the frame that was begun

	heard atomic.Int64 // ticks of the newest frame
	began atomic.Int64 // ticks of the first frame of a message under way, else 0
}

// hijack takes the connection of a request that has passed checkHandshake over
// from net/http. Its answer comes with handshake.
func hijack(w http.ResponseWriter, limit int) (*Conn, error) {
	raw, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, err
	}
	var in io.Reader = raw
	if early, _ := rw.Reader.Peek(rw.Reader.Buffered()); len(early) > 0 { // from a client that does not wait for the answer
		in = io.MultiReader(bytes.NewReader(bytes.Clone(early)), raw)
	}
	c := &Conn{outbox: outbox{conn: raw, most: outboxMost}, br: bufio.NewReaderSize(in, readBuffer), limit: limit}
	c.heard.Store(ticks())
	return c, nil
}

// handshake answers r, and chooses protocol if the client offers it.
//
// x/net answers, and then has no more to do than to take frames apart. It thinks
// that it owns the connection, and that its handler lasts as long: it gets a
// stand-in for the connection, and a request with nothing but what it looks at.
// So the caller is free to read on a goroutine that has never been deep in
// net/http, with a stack and buffers that an idle connection can afford.
func (c *Conn) handshake(r *http.Request, protocol string) error {
	plain := &http.Request{Method: http.MethodGet, URL: new(url.URL), Host: "chatd", Header: http.Header{
		"Connection":            {"Upgrade"},
		"Upgrade":               {"websocket"},
		"Sec-Websocket-Version": {"13"},
		"Sec-Websocket-Key":     {r.Header.Get("Sec-Websocket-Key")},
	}}
	extra := http.Header{requestHeader: {requestID(r.Context())}}
	var chosen []string
	if hasToken(r.Header, "Sec-Websocket-Protocol", protocol) {
		chosen = []string{protocol}
	}
	var answer bytes.Buffer
	websocket.Server{ // which keeps these two functions, so they must not know r
		Handshake: func(config *websocket.Config, _ *http.Request) error {
			config.Protocol, config.Header = chosen, extra
			return nil
		},
		Handler: func(ws *websocket.Conn) { c.ws = ws },
	}.ServeHTTP(&hijacked{rw: bufio.NewReadWriter(c.br, bufio.NewWriterSize(&answer, 16))}, plain)
	_, err := c.conn.Write(answer.Bytes())
	if err == nil && c.ws == nil {
		err = fmt.Errorf("handshake: %q", answer.Bytes())
	}
	if c.ws != nil { // x/net keeps all this as long as the connection
		*c.ws.Config() = websocket.Config{}
	}
	answer, *plain = bytes.Buffer{}, http.Request{}
	return err
}

// wantsSocket reports whether a request asks for a WebSocket, well or badly.
func wantsSocket(r *http.Request) bool { return hasToken(r.Header, "Upgrade", "websocket") }

// checkHandshake judges a request by RFC 6455 §4.2.1. It sets the headers that
// belong to a refusal.
func checkHandshake(answer http.Header, r *http.Request) error {
	keys := r.Header.Values("Sec-Websocket-Key")
	switch {
	case r.Method != http.MethodGet:
		answer.Set("Allow", http.MethodGet)
		return refuse(http.StatusMethodNotAllowed, "method")
	case r.ProtoMajor != 1 || r.ProtoMinor < 1, r.ContentLength != 0:
		return refuse(http.StatusBadRequest, "bad_request")
	case !hasToken(r.Header, "Connection", "upgrade") || !wantsSocket(r),
		!slices.Equal(r.Header.Values("Sec-Websocket-Version"), []string{"13"}):
		answer.Set("Connection", "Upgrade")
		answer.Set("Upgrade", "websocket")
		answer.Set("Sec-Websocket-Version", "13")
		return refuse(http.StatusUpgradeRequired, "upgrade")
	case len(keys) != 1:
		return refuse(http.StatusBadRequest, "bad_request")
	}
	if key, err := base64.StdEncoding.Strict().DecodeString(keys[0]); err != nil || len(key) != 16 {
		return refuse(http.StatusBadRequest, "bad_request")
	}
	return nil
}

// hasToken looks for a token in a comma-separated header, over all its lines.
func hasToken(h http.Header, name, token string) bool {
	tokens := strings.Split(strings.Join(h.Values(name), ","), ",")
	return slices.ContainsFunc(tokens, func(t string) bool { return strings.EqualFold(strings.TrimSpace(t), token) })
}

// hijacked is the ResponseWriter of a connection that has been taken over.
type hijacked struct {
	http.ResponseWriter
	rw *bufio.ReadWriter
}

func (h *hijacked) Hijack() (net.Conn, *bufio.ReadWriter, error) { return notOwned{}, h.rw, nil }

// notOwned is a connection that x/net may close as it likes.
type notOwned struct{ net.Conn }

func (notOwned) Close() error { return nil }

// ReadMessage returns the next whole message. It answers control frames and ends
// the conversation properly when the peer closes or breaks the protocol; after
// an error only finish remains. A message that is cut off is never returned.
func (c *Conn) ReadMessage() (opcode byte, msg []byte, err error) {
	// An idle connection waits here, and its pongs go no further, so that its
	// goroutine keeps the smallest stack. What is wrong comes up in readMessage.
	for opcode == 0 && err == nil {
		if head, _ := c.br.Peek(2); string(head) == emptyPong {
			c.br.Discard(len(emptyPong) + 4)
			c.heard.Store(ticks())
			continue
		}
		opcode, msg, err = c.readMessage()
	}
	return opcode, msg, err
}

// emptyPong begins the answer to our pings; the mask follows.
const emptyPong = "\x8a\x80"

// readMessage is ReadMessage, but that it returns opcode 0 after a control frame
// that stands alone.
func (c *Conn) readMessage() (opcode byte, msg []byte, err error) {
	defer c.began.Store(0)
	known := 0 // bytes of a text that are whole characters
	for {
		h, err := c.nextFrame()
		if err != nil {
			return 0, nil, c.end(err)
		}
		if err := h.check(opcode != 0, c.limit-len(msg)); err != nil {
			return 0, nil, c.end(err)
		}
		if h.isControl() {
			if err := c.control(h); err != nil {
				return 0, nil, c.end(err)
			}
			if opcode == 0 {
				return 0, nil, nil
			}
			continue
		}
		if h.opcode != opContinuation {
			opcode = h.opcode
		}
		for left := int(h.size); left > 0; {
			// Grow as it arrives, not by what a header claims.
			msg = slices.Grow(msg, min(left, growBy))
			n, err := c.payload.Read(msg[len(msg):min(len(msg)+left, cap(msg))])
			msg, left = msg[:len(msg)+n], left-n
			if opcode == opText && !wholeRunes(msg, &known) {
				return 0, nil, c.end(&closeError{closeNotUTF8, "text is not UTF-8"})
			}
			if err != nil && left > 0 {
				return 0, nil, c.end(err)
			}
		}
		switch {
		case !h.fin:
		case opcode == opText && known < len(msg):
			return 0, nil, c.end(&closeError{closeNotUTF8, "text is not UTF-8"})
		case c.isClosing(): // we said that nothing more is taken
			opcode, msg, known = 0, nil, 0
		default:
			return opcode, msg, nil
		}
	}
}

// wholeRunes moves known, the number of bytes of text seen to be whole
// characters, forward, and reports false when no further byte can save it.
func wholeRunes(text []byte, known *int) bool {
	for *known < len(text) {
		r, size := utf8.DecodeRune(text[*known:])
		if r == utf8.RuneError && size == 1 {
			return !utf8.FullRune(text[*known:])
		}
		*known += size
	}
	return true
}

// frameHeader is RFC 6455 §5.2, as it came.
type frameHeader struct {
	fin, masked, shortest bool
	rsv, opcode           byte
	size                  uint64
}

func (h frameHeader) isControl() bool { return h.opcode >= opClose }

// check judges a header, given whether a fragmented message is under way and how
// much longer it may grow.
func (h frameHeader) check(begun bool, room int) error {
	switch {
	case h.rsv != 0:
		return protocolError("reserved bit set")
	case h.opcode > opBinary && h.opcode < opClose, h.opcode > opPong:
		return protocolError("reserved opcode")
	case !h.masked:
		return protocolError("frame is not masked")
	case h.isControl() && (!h.fin || h.size > maxControl):
		return protocolError("control frame is fragmented or too long")
	case !h.shortest:
		return protocolError("length is not in its shortest form")
	case h.isControl():
		return nil
	case begun != (h.opcode == opContinuation):
		return protocolError("fragments out of order")
	case h.size > uint64(room):
		return &closeError{closeTooBig, "message is too big"}
	}
	return nil
}

// nextFrame skips what is left of the last frame and reads the next header.
func (c *Conn) nextFrame() (h frameHeader, err error) {
	if c.payload != nil {
		if _, err := io.Copy(io.Discard, c.payload); err != nil {
			return h, err
		}
		c.payload = nil
	}
	start, err := c.br.Peek(2)
	if err != nil {
		return h, err
	}
	now := ticks()
	c.heard.Store(now)
	c.began.CompareAndSwap(0, now)
	if start[1]&0x7f == 127 {
		// x/net clears the top bit of a 64-bit length before it shows it.
		if start, err = c.br.Peek(3); err != nil {
			return h, err
		}
		if start[2]&0x80 != 0 {
			return h, protocolError("length over 63 bits")
		}
	}
	frame, err := c.ws.NewFrameReader()
	if err != nil {
		return h, err
	}
	c.payload = frame
	var b [14]byte
	if _, err := io.ReadFull(frame.HeaderReader(), b[:]); err != io.ErrUnexpectedEOF && err != nil {
		return h, err
	}
	h = frameHeader{
		fin: b[0]&0x80 != 0, rsv: b[0] & 0x70, opcode: b[0] & 0x0f,
		masked: b[1]&0x80 != 0, shortest: true, size: uint64(b[1] & 0x7f),
	}
	switch h.size {
	case 126:
		h.size = uint64(binary.BigEndian.Uint16(b[2:]))
		h.shortest = h.size > maxControl
	case 127:
		h.size = binary.BigEndian.Uint64(b[2:])
		h.shortest = h.size > 0xffff
	}
	return h, nil
}

// control answers a ping, ignores a pong, and turns a Close into an error with
// the code that is to be sent back.
func (c *Conn) control(h frameHeader) error {
	b := make([]byte, h.size)
	if _, err := io.ReadFull(c.payload, b); err != nil {
		return err
	}
	switch {
	case h.opcode == opPong:
		return nil
	case h.opcode == opPing:
		c.push(appendFrame(nil, opPong, b))
		return nil
	case len(b) == 0:
		return &closeError{closeNoStatus, ""}
	case len(b) == 1 || !validCloseCode(binary.BigEndian.Uint16(b)):
		return protocolError("bad close code")
	case !utf8.Valid(b[2:]):
		return &closeError{closeNotUTF8, "close reason is not UTF-8"}
	}
	return &closeError{int(binary.BigEndian.Uint16(b)), ""}
}

func validCloseCode(c uint16) bool {
	return c >= 1000 && c <= 1003 || c >= 1007 && c <= 1014 || c >= 3000 && c <= 4999
}

// end says goodbye as the reason demands, and returns it.
func (c *Conn) end(err error) error {
	if e, ok := errors.AsType[*closeError](err); ok {
		c.close(e.code, e.reason)
	}
	return err
}

// finish lets the writer end, and then TCP: half-close first, and then read what
// the peer was still sending. To close with input unread would send a reset, and
// that can overtake our Close frame. A peer that left without a Close is owed nothing.
func (c *Conn) finish() {
	c.abandon()
	c.writers.Wait()
	if half, ok := c.conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		c.conn.SetReadDeadline(time.Now().Add(lingerWait))
		io.Copy(io.Discard, c.br)
	}
	c.conn.Close()
}

// appendFrame appends one unfragmented, unmasked frame to b (RFC 6455 §5.2).
func appendFrame(b []byte, opcode byte, payload []byte) []byte {
	b = append(b, 0x80|opcode)
	switch n := len(payload); {
	case n <= 125:
		b = append(b, byte(n))
	case n <= 0xffff:
		b = binary.BigEndian.AppendUint16(append(b, 126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 127), uint64(n))
	}
	return append(b, payload...)
}

func closeFrame(code int, reason string) []byte {
	if code == closeNoStatus {
		return appendFrame(nil, opClose, nil)
	}
	return appendFrame(nil, opClose, append(binary.BigEndian.AppendUint16(nil, uint16(code)), reason...))
}

var start = time.Now()

// ticks is a clock for timeouts, in nanoseconds: setting the date does not move it.
func ticks() int64 { return int64(time.Since(start)) }
