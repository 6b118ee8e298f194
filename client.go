package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/net/websocket"
)

// This file is the terminal's client: chatd tail, say and chat. It is also the
// example to learn chatd.v1 from. What makes a client of it that misses and doubles
// nothing, whatever happens to the connection, are two numbers:
//
//   - the cursor, the greatest id seen. Each hello but the first carries it, and the
//     server replays what is after it.
//   - the cid, our own for a message. It is on disk once it comes back. Until then it
//     is sent again on each connection, and the server knows it by its cid.

const (
	firstWait = 500 * time.Millisecond // after a connection is lost; doubled with each failure
	maxWait   = 30 * time.Second
	turnWait  = time.Second // before saying again what was refused for the moment
)

// client is somebody in a room, over as many connections as it takes. It belongs to
// one goroutine; two more only read, from the connection and from standard input.
type client struct {
	url            *url.URL
	header         http.Header // of every request
	room           string
	stdout, stderr io.Writer

	listens bool          // prints what happens in the room
	newest  uint          // messages of before to begin with
	echo    bool          // prints also what we say: no terminal shows it already
	since   *int64        // the cursor; nil until everything before it is printed
	wait    time.Duration // before the next try to connect; 0: it has never worked

	lines    <-chan string    // what is to be said; nil after the last
	inputErr error            // why it ended there; readable then
	queue    []string         // lines that are not known to be on disk
	under    int              // how many of them, from the first, are the message under way
	cid      string           // of that message
	tries    int              // how often it was sent
	awaiting bool             // the answer to it, or the welcome
	together bool             // the next message takes all lines that fit
	turn     <-chan time.Time // comes when it may be sent; nil: now
}

// refusal is an error after which trying again makes no sense.
type refusal struct{ error }

// runClient is chatd tail, say and chat.
func runClient(ctx context.Context, command string, args []string, stdin *os.File, stdout, stderr io.Writer) (err error) {
	c := &client{stdout: stdout, stderr: stderr, listens: command != "say"}
	flags := newFlags("chatd " + command)
	server := flags.String("url", cmp.Or(os.Getenv("CHATD_URL"), "http://localhost:8080"), "")
	tokenFile := flags.String("token-file", "", "") // the token itself would be seen by all who run ps
	if c.listens {
		flags.UintVar(&c.newest, "n", 10, "")
	}
	words, err := parseWords(flags, args)
	if err != nil {
		return err
	}
	if len(words) == 0 || len(words) > 1 && c.listens {
		return fmt.Errorf("chatd %s wants a room; see chatd help", command)
	}
	if c.url, err = parsePublic(*server); err != nil {
		return err
	}
	c.url.Host = strings.ToLower(c.url.Host) // as x/net has it in Origin, which has to be the same
	token := []byte(os.Getenv("CHATD_TOKEN"))
	if *tokenFile != "" {
		if token, err = os.ReadFile(*tokenFile); err != nil {
			return err
		}
	}
	if token = bytes.TrimSpace(token); len(token) == 0 {
		return errors.New("no token: put one into CHATD_TOKEN, or into a file for -token-file")
	}
	c.header = http.Header{"Authorization": {"Bearer " + string(token)}, "Accept": {"application/json"}}
	lines := make(chan string, 1)
	c.room, c.lines = words[0], lines
	switch {
	case command == "tail": // never says anything
	case len(words) > 1:
		lines <- strings.ToValidUTF8(strings.Join(words[1:], " "), "?")
		close(lines)
	default:
		info, err := stdin.Stat()
		c.echo = err != nil || info.Mode()&os.ModeCharDevice == 0
		go c.readLines(stdin, lines) // ends with stdin, or with the process
	}
	return c.run(ctx)
}

// readLines passes on each line that is not blank. While nobody takes them it reads
// no further, and whoever writes them waits.
func (c *client) readLines(stdin io.Reader, lines chan<- string) {
	defer close(lines)
	s := bufio.NewScanner(stdin)
	s.Split(splitLines)
	for s.Scan() {
		line := strings.ToValidUTF8(s.Text(), "?") // which is no longer
		if strings.TrimSpace(line) != "" {
			lines <- line
		}
	}
	c.inputErr = s.Err()
}

// splitLines is bufio.ScanLines, but cuts lines that are too long for a message,
// between two characters.
func splitLines(data []byte, atEOF bool) (advance int, line []byte, err error) {
	advance, line, err = bufio.ScanLines(data, atEOF)
	if len(line) <= maxMessage && (advance > 0 || len(data) <= maxMessage) {
		return advance, line, err
	}
	end := maxMessage
	for end > maxMessage-utf8.UTFMax && !utf8.RuneStart(data[end]) {
		end--
	}
	return end, data[:end], nil
}

// run converses until all is said, and for ever if there is no end to that. Only
// what has worked once is tried again: else the URL or the token is likely wrong.
func (c *client) run(ctx context.Context) error {
	for {
		err := c.converse(ctx)
		_, final := errors.AsType[refusal](err)
		switch {
		case err == nil:
			return c.inputErr
		case ctx.Err() != nil && c.listens && len(c.queue) == 0:
			return nil
		case ctx.Err() != nil:
			return errors.New("interrupted before all was said")
		case final, c.wait == 0:
			return err
		case c.wait == firstWait:
			fmt.Fprintf(c.stderr, "chatd: connection lost (%v), trying again\n", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(c.wait/2 + mathrand.N(c.wait)): // not all clients at once
		}
		c.wait = min(2*c.wait, maxWait)
	}
}

// converse is one connection, until it is lost or all is said.
func (c *client) converse(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ws, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer ws.Close()
	hello := map[string]any{"type": "hello"}
	if c.since != nil {
		hello["since"] = *c.since
	}
	if err := websocket.JSON.Send(ws, hello); err != nil {
		return err
	}
	c.awaiting = true
	frames, lost := make(chan serverFrame), make(chan error, 1)
	go func() { lost <- readFrames(ctx, ws, frames) }()
	for c.lines != nil || len(c.queue) > 0 {
		lines := c.lines
		if c.fits() < len(c.queue) { // enough for now
			lines = nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-lost:
			return err
		case f := <-frames:
			if err := c.receive(ctx, f); err != nil {
				return err
			}
		case line, ok := <-lines:
			if !ok {
				c.lines = nil
			} else {
				c.queue = append(c.queue, line)
			}
		case <-c.turn:
			c.turn = nil
		}
		if err := c.send(ws); err != nil {
			return err
		}
	}
	return nil
}

// readFrames passes on what the server sends. A Close frame is an EOF to x/net, and
// needs no more: whatever its code, trying to come back shows whether we may.
func readFrames(ctx context.Context, ws *websocket.Conn, frames chan<- serverFrame) error {
	for {
		var f serverFrame
		if err := websocket.JSON.Receive(ws, &f); err != nil {
			return err
		}
		select {
		case frames <- f:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// dial opens the socket. x/net would do it alone, but shows neither the server's
// pings nor the status of a refusal.
func (c *client) dial(ctx context.Context) (*websocket.Conn, error) {
	origin := &url.URL{Scheme: c.url.Scheme, Host: c.url.Host}
	config, err := websocket.NewConfig(c.url.JoinPath("ws").String(), origin.String())
	if err != nil {
		return nil, err
	}
	config.Protocol, config.Header = []string{protocolV1}, c.header
	dial := new(net.Dialer).DialContext
	if c.url.Scheme == "https" {
		dial = new(tls.Dialer).DialContext
	}
	soon, cancel := context.WithTimeout(ctx, helloWait)
	defer cancel()
	conn, err := dial(soon, "tcp", net.JoinHostPort(c.url.Hostname(), cmp.Or(c.url.Port(), c.url.Scheme)))
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(soon, func() { conn.Close() })()
	l := &lively{Conn: conn}
	ws, err := websocket.NewClient(config, l)
	if err != nil {
		conn.Close()
	}
	if res, e := http.ReadResponse(bufio.NewReader(bytes.NewReader(l.answer)), nil); err != nil && e == nil {
		err = statusError(config.Location, res)
	}
	return ws, err
}

// lively is a connection that fails when nothing at all comes for deadAfter. The
// server pings more often, and x/net answers that without a word to its caller.
type lively struct {
	net.Conn
	answer []byte // what came first
}

func (l *lively) Read(p []byte) (int, error) {
	l.SetDeadline(time.Now().Add(deadAfter))
	n, err := l.Conn.Read(p)
	if l.answer == nil {
		l.answer = bytes.Clone(p[:n])
	}
	return n, err
}

func statusError(where *url.URL, res *http.Response) error {
	err := fmt.Errorf("%s: %s", where, res.Status)
	switch res.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound:
		return refusal{err}
	}
	return err
}

// serverFrame is a frame of any kind.
type serverFrame struct {
	eventFrame
	Rooms       []roomFrame
	Code, Error string
}

func (c *client) receive(ctx context.Context, f serverFrame) error {
	switch f.Type {
	case "welcome":
		c.wait, c.awaiting = firstWait, false
		if !c.listens {
			return nil
		}
		i := slices.IndexFunc(f.Rooms, func(r roomFrame) bool { return foldName(r.Room) == foldName(c.room) })
		if i < 0 {
			return refusal{fmt.Errorf("the token sees no room %q", c.room)}
		}
		c.room = f.Rooms[i].Room // as it is spelled
	case "caught_up":
		if !c.listens {
			return nil
		}
		if c.since == nil {
			if err := c.printNewest(ctx, f.ID); err != nil {
				return err
			}
		}
		c.since = &f.ID
	case "message", "edit", "delete", "react":
		own := c.under > 0 && f.CID == c.cid
		if own {
			c.queue, c.under, c.awaiting = c.queue[c.under:], 0, false
		}
		if c.since == nil || f.ID <= *c.since { // only an answer
			return nil
		}
		c.since = &f.ID
		if f.Room == c.room && (c.echo || !own) {
			return c.print(f.eventFrame)
		}
	case "room":
		if f.Former == c.room {
			c.room = f.Room
		}
	case "error":
		return c.refused(f.Code, f.Error)
	}
	return nil
}

// printNewest begins with the newest messages up to the id last. The socket has
// been in the room since, so what is after that comes over it: nothing is missing in
// between, and nothing comes twice.
func (c *client) printNewest(ctx context.Context, last int64) error {
	var all []eventFrame
	for before := last + 1; uint(len(all)) < c.newest && before > 0; {
		u := c.url.JoinPath("chat", c.room, "/")
		u.RawQuery = fmt.Sprint("before=", before)
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
		if err != nil {
			return err
		}
		r.Header = c.header
		res, err := (&http.Client{Timeout: bodyWait}).Do(r)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if res.StatusCode != http.StatusOK {
			return statusError(u, res)
		}
		var page struct {
			Messages []eventFrame
			Older    int64
		}
		if err := json.NewDecoder(res.Body).Decode(&page); err != nil {
			return err
		}
		all, before = append(page.Messages, all...), page.Older
	}
	for _, f := range all[max(0, len(all)-int(c.newest)):] {
		if err := c.print(f); err != nil {
			return err
		}
	}
	return nil
}

func (c *client) print(f eventFrame) error {
	if _, err := io.WriteString(c.stdout, f.line()); err != nil {
		return refusal{err}
	}
	return nil
}

// fits is how many lines of the queue a message has room for: one, at least.
func (c *client) fits() (n int) {
	size := 0
	for n < len(c.queue) && (n == 0 || size+len(c.queue[n]) <= maxMessage) {
		size += len(c.queue[n]) + 1
		n++
	}
	return n
}

// send says the next line, or again what was under way when a connection was lost.
// One message is under way at a time, so they arrive in order.
func (c *client) send(ws *websocket.Conn) error {
	if c.awaiting || c.turn != nil || len(c.queue) == 0 {
		return nil
	}
	if c.under == 0 {
		c.under, c.cid, c.tries = 1, rand.Text(), 0
		if c.together {
			c.under, c.together = c.fits(), false
		}
	}
	c.awaiting = true
	c.tries++
	return websocket.JSON.Send(ws, map[string]any{
		"type": "message", "room": c.room, "cid": c.cid, "message": strings.Join(c.queue[:c.under], "\n"),
	})
}

// refused waits for a turn, if that is all that was wrong. The lines that come
// meanwhile go along as one message, like the server's own commits: so we keep up
// with whoever writes faster than a line each is allowed.
//
// But what was sent before may be on disk, and this is only its retry that came too
// fast. With another cid it would be said twice, so it stays as it is.
func (c *client) refused(code, sentence string) error {
	switch code {
	case "too_fast":
		if c.together = true; c.tries == 1 {
			c.under = 0
		}
	case "storage", "busy":
	default:
		return refusal{fmt.Errorf("%s (%s)", sentence, code)}
	}
	c.awaiting, c.turn = false, time.After(turnWait)
	return nil
}
