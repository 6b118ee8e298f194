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
			if _, payload, err := slow.next(); err != nil || strings.Contains(string(payload), "caught_up") {
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
		go o.feed([]byte("older"))
		synctest.Wait()
		o.push([]byte("newer"))
		o.close(closeRestart, "")
		o.push([]byte("newest")) // nothing follows a Close frame
		p := make([]byte, 100)
		n, err := client.Read(p)
		if err != nil || string(p[:n]) != "older" {
			t.Errorf("got %q, %v", p[:n], err)
		}
		n, err = client.Read(p)
		if want := closeFrame(closeRestart, ""); err != nil || string(p[:n]) != string(want) {
			t.Errorf("got %q, want %q; %v", p[:n], want, err)
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
