package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// follow opens a chatd.v1 socket that asks for everything since an id.
func (s *testServer) follow(name string, since int64) *peer {
	s.t.Helper()
	p := s.dial("/ws", s.session(name))
	p.send(opText, fmt.Appendf(nil, `{"type":"hello","since":%d}`, since))
	return p
}

// nextText reads the next text message, and answers pings.
func (p *peer) nextText() ([]byte, error) {
	for {
		switch opcode, payload, err := p.next(); {
		case err != nil:
			return nil, err
		case opcode == opPing:
			p.send(opPong, payload)
		case opcode == opText:
			return payload, nil
		default:
			return nil, fmt.Errorf("opcode %d %q", opcode, payload)
		}
	}
}

// nextEvent reads up to the next event that the log keeps.
func (p *peer) nextEvent() (f eventFrame, err error) {
	for {
		payload, err := p.nextText()
		if err != nil {
			return f, err
		}
		f = eventFrame{}
		if err := json.Unmarshal(payload, &f); err != nil {
			return f, err
		}
		switch f.Type {
		case "message", "edit", "delete", "react":
			return f, nil
		}
	}
}

// Whoever joins while others speak sees everything exactly once, in order.
func TestJoinWhilePublishing(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		room := s.room("lobby")
		const writers, each = 3, 3 * replayPage // so that joiners replay several pages
		var all sync.WaitGroup
		for w := range writers {
			author := s.user(fmt.Sprint("writer", w))
			all.Go(func() {
				for i := range each {
					if _, err := s.store.AppendWait(Event{Kind: KindMessage, Room: room, Author: author, Body: fmt.Sprint(i)}); err != nil {
						t.Error(err)
					}
				}
			})
		}
		for j := range 5 {
			p := s.follow(fmt.Sprint("reader", j), 0)
			all.Go(func() {
				for want := int64(1); want <= writers*each; want++ {
					if f, err := p.nextEvent(); err != nil || f.ID != want {
						t.Errorf("reader %d: got id %d, want %d; %v", j, f.ID, want, err)
						return
					}
				}
				go p.listen()
			})
		}
		all.Wait()
	})
}

// TestJoinInterleavings stops a client's replay at each point where something else
// can come in between, and lets it come in. net.Pipe makes that exact: a write
// takes as long as the client wants. The points, by what the client has read of
// welcome, two pages and caught_up:
//
//	0  nothing: the first page is on its way (join's step 1)
//	1  welcome: the second, short page has been read from the store (the end of 1)
//	2  the first page: it is in the room, and what comes is held (2 to 4)
//	3  both pages: the same, or released
//	4  all: it is live
//
// Together with what the client gets when it comes back, it has everything once
// and in order.
func TestJoinInterleavings(t *testing.T) {
	const points = 5
	var scripts [][points]string
	for mask := range 1 << points { // something is said at any of the points
		var script [points]string
		for i := range script {
			if mask>>i&1 == 1 {
				script[i] = "say"
			}
		}
		scripts = append(scripts, script)
	}
	for i := range points { // something is committed at one point, and published at another
		for j := i + 1; j < points; j++ {
			var script [points]string
			script[i], script[j] = "commit", "publish"
			scripts = append(scripts, script)
		}
		for _, end := range []string{"overflow", "stop", "cut"} {
			var script [points]string
			if script[i] = end; i > 0 {
				script[i-1] = "say"
			}
			scripts = append(scripts, script)
		}
	}
	scripts = append(scripts, [points]string{1: "say in 3"}, [points]string{1: "say much", 2: "overflow"}, [points]string{1: "say much", 2: "stop"})
	dir := t.TempDir()
	for _, script := range scripts {
		synctest.Test(t, func(t *testing.T) { joinInterleaved(t, dir, script[:]) })
	}
}

func joinInterleaved(t *testing.T, dir string, script []string) {
	const missed = replayPage + 50
	s := newTestServer(t, dir, false)
	room, ann := s.room("lobby"), s.user("ann")
	say := func(times int, text string) {
		for range times {
			if err := s.store.Append(Event{Kind: KindMessage, Room: room, Author: ann, Body: text}, func(Event, error) {}); err != nil {
				t.Error(err)
			}
		}
		synctest.Wait()
	}
	since := s.hub.Last()
	say(missed, "before")
	cursor, ended := since, false
	p := s.follow("bob", since)
	read := func(p *peer) {
		if opcode, payload, err := p.next(); err != nil || opcode == opClose {
			ended = true
		} else if f := (eventFrame{}); json.Unmarshal(payload, &f) == nil && f.Type == "message" {
			if f.ID != cursor+1 {
				t.Errorf("%q: got %d after %d", script, f.ID, cursor)
			}
			cursor = f.ID
		}
	}
	frames := 0
	for point, reads := range []int{0, 1, 1 + replayPage, 1 + missed, 3 + missed} {
		for ; frames < reads && !ended; frames++ {
			read(p)
		}
		synctest.Wait()
		switch gate := make(chan struct{}); script[point] {
		case "say":
			say(2, "meanwhile")
		case "say much": // two pages for join's step 3
			say(replayPage+1, "meanwhile")
		case "say in 3": // when it has been read from the store and not been fed
			say(2, "between")
			encode := dialectV1.encode
			defer func() { dialectV1.encode = encode }()
			dialectV1.encode = func(e Event) []byte {
				if e.Body == "between" {
					if _, err := s.store.AppendWait(Event{Kind: KindMessage, Room: room, Author: ann, Body: "meanwhile"}); err != nil {
						t.Error(err)
					}
				}
				return encode(e)
			}
		case "commit":
			s.gate.Store(&gate)
			say(1, "committed")
		case "publish":
			close(*s.gate.Swap(nil))
		case "overflow":
			say(1, "meanwhile")
			say(outboxMost/maxMessage, strings.Repeat("x", maxMessage))
		case "stop":
			go s.close()
		case "cut":
			p.conn.Close()
		}
		synctest.Wait()
	}
	if !s.closed {
		say(1, "at last") // nothing may come twice before it
	}
	for !ended && cursor < s.hub.Last() {
		read(p)
	}
	p.conn.Close()
	s.close()

	s = newTestServer(t, dir, false)
	defer s.close()
	p = s.follow("bob", cursor)
	for ended = false; !ended && cursor < s.hub.Last(); {
		read(p)
	}
	if cursor != s.hub.Last() {
		t.Errorf("%q: has everything up to %d of %d", script, cursor, s.hub.Last())
	}
	p.conn.Close()
}

// A client that does not read is told to come back; the others notice nothing,
// and its cursor brings it what it missed.
func TestSlowClient(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		room := s.room("lobby")
		slow, fast := s.follow("slow", 0), s.follow("fast", 0)
		go fast.listen()
		for { // so that slow is in the room
			if _, payload, err := slow.next(); err != nil || strings.Contains(string(payload), "presence") {
				break
			}
		}
		const n = 2 * outboxMost / maxMessage
		text := strings.Repeat("x", maxMessage)
		began := time.Now()
		for range n {
			if _, err := s.store.AppendWait(Event{Kind: KindMessage, Room: room, Author: s.user("ann"), Body: text}); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		if waited := time.Since(began); waited != 0 {
			t.Errorf("the room waited %v for the slow client", waited)
		}
		if got := strings.Count(strings.Join(fast.takeHeard(), "\n"), text); got != n {
			t.Errorf("the fast client got %d of %d", got, n)
		}
		last := int64(0)
		for {
			f, err := slow.nextEvent()
			if err != nil {
				if !strings.Contains(err.Error(), fmt.Sprintf("opcode %d", opClose)) || !strings.Contains(err.Error(), "too slow") {
					t.Errorf("the slow client ended with %v, want a Close frame", err)
				}
				break
			}
			if f.ID != last+1 {
				t.Fatalf("the slow client got %d after %d", f.ID, last)
			}
			last = f.ID
		}
		if last == 0 || last == n {
			t.Errorf("the slow client got %d of %d before it was closed", last, n)
		}
		back := s.follow("slow", last)
		for last < n {
			f, err := back.nextEvent()
			if err != nil || f.ID != last+1 {
				t.Fatalf("back again, it got %d after %d, %v", f.ID, last, err)
			}
			last = f.ID
		}
	})
}

// A socket that answers pings lives for ever; one that does not, or that takes
// nothing, is cut.
func TestDeadPeers(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		alive := s.follow("alive", 0)
		go alive.listen()
		mute := s.follow("mute", 0) // reads, but never answers
		muteEnded := make(chan time.Duration, 1)
		began := time.Now()
		go func() {
			for {
				if _, _, err := mute.next(); err != nil {
					muteEnded <- time.Since(began)
					return
				}
			}
		}()
		stuck := s.follow("stuck", 0) // does not even read
		silent := s.dial("/ws", s.session("silent"))
		go silent.listen()
		synctest.Wait()
		time.Sleep(helloWait + time.Second)
		synctest.Wait()
		if n := s.sockets(); n != 2 {
			t.Errorf("%d sockets after %v, want those of alive and mute", n, helloWait)
		}
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		if ended := <-muteEnded; ended < deadAfter || ended > deadAfter+2*sweepEvery {
			t.Errorf("the mute peer was cut after %v, want %v", ended, deadAfter)
		}
		if _, _, err := stuck.next(); err == nil { // the welcome was cut in the middle
			t.Error("the stuck peer was not cut")
		}
		if n := s.sockets(); n != 1 {
			t.Errorf("%d sockets after a day, want that of alive", n)
		}
		if heard := alive.takeHeard(); strings.Contains(strings.Join(heard, "\n"), "hung up") {
			t.Errorf("the living peer was cut: %q", heard)
		}
	})
}

func (s *testServer) sockets() int {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	return len(s.hub.members)
}

// What was sent before the end comes back before the Close frame.
func TestHubCloseFinishesWhatWasSent(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		p := s.dial("/ws/chat/lobby/", s.session("ann"))
		for i := range 10 {
			p.send(opText, fmt.Appendf(nil, `{"message":"%d"}`, i))
		}
		go p.listen()
		s.close()
		synctest.Wait()
		heard := p.takeHeard()
		if len(heard) != 12 || !strings.HasPrefix(heard[9], `{"message":"9"`) || heard[10] != "closed 1012" {
			t.Errorf("heard %q", heard)
		}
	})
}

// A long replay goes as fast as the client reads, and the hub holds no more than
// what is said meanwhile.
func TestReplayWaitsForTheClient(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		ann := s.user("ann")
		room := s.room("lobby")
		const n = 3 * replayPage
		for range n {
			if _, err := s.store.AppendWait(Event{Kind: KindMessage, Room: room, Author: ann, Body: strings.Repeat("x", maxMessage)}); err != nil {
				t.Fatal(err)
			}
		}
		p := s.follow("bob", 0) // n messages are more than an outbox holds
		for want := int64(1); want <= n; want++ {
			if f, err := p.nextEvent(); err != nil || f.ID != want {
				t.Fatalf("got %d, want %d; %v", f.ID, want, err)
			}
		}
	})
}

// A close while replay is under way must not let newer events through: the
// client's cursor would jump over those that it has not got.
func TestCloseDuringReplay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, client := net.Pipe()
		o := &outbox{conn: server, most: outboxMost}
		o.hold()
		for _, page := range []string{"old", "less old"} { // the second waits while the first is written
			go o.feed([]byte(page))
			synctest.Wait()
		}
		o.push([]byte("newer"))
		o.close(closeRestart, "")
		o.push([]byte("newest")) // nothing follows a Close frame
		p := make([]byte, 100)
		for _, want := range []string{"old", "less old", string(closeFrame(closeRestart, ""))} {
			if n, err := client.Read(p); err != nil || string(p[:n]) != want {
				t.Errorf("got %q, want %q; %v", p[:n], want, err)
			}
		}
		o.writers.Wait()
		server.Close()
		if n, err := client.Read(p); err != io.EOF {
			t.Errorf("then got %q, %v", p[:n], err)
		}
	})
}

func TestConnectionLimits(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		s.hub.maxSockets, s.hub.maxPerAddress = 3, 2
		ann := s.session("ann")
		open := func(from string) *peer {
			p := &peer{t: t, conn: s.listener.dial()}
			p.handshake("/ws", "Cookie: "+ann, "X-Forwarded-For: "+from)
			return p
		}
		first := open("1.1.1.1")
		for i, want := range []struct {
			from   string
			status int
		}{{"1.1.1.1", 101}, {"1.1.1.1", 429}, {"2.2.2.2", 101}, {"3.3.3.3", 503}} {
			if got := open(want.from).res.StatusCode; got != want.status {
				t.Errorf("socket %d: %d, want %d", i+2, got, want.status)
			}
		}
		first.conn.Close()
		synctest.Wait()
		if got := open("1.1.1.1").res.StatusCode; got != 101 {
			t.Errorf("after one has gone: %d, want 101", got)
		}
	})
}

// Who takes too long to ask for a socket is cut off.
func TestSlowHandshake(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		conn := s.listener.dial()
		began := time.Now()
		if _, err := io.WriteString(conn, "GET /ws HTTP/1.1\r\nHost: chat"); err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, conn)
		if took := time.Since(began); took < headerWait || took > headerWait+time.Second {
			t.Errorf("cut off after %v, want %v", took, headerWait)
		}
		time.Sleep(time.Second) // net/http lingers
	})
}
