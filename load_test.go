package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var stalled = flag.Int("stalled", 20, "how many clients of TestStalledCrowd stop reading")

// TestStalledCrowd has many clients stop reading in a room where much is said.
// The others go on; chatd's memory stays bounded; and each of those who come back
// gets, by its cursor, everything that it has missed.
func TestStalledCrowd(t *testing.T) {
	const messages, window = 800, 8
	d := startDaemon(t, t.TempDir(), "-guests", "-rate", "0")
	var crowd []*peer
	for range *stalled {
		p := dialTCP(t, d.addr, "/ws/chat/crowd/")
		if err := p.conn.(*net.TCPConn).SetReadBuffer(64 << 10); err != nil {
			t.Fatal(err)
		}
		crowd = append(crowd, p)
	}
	text := strings.Repeat("x", maxMessage-10)
	speaker := dialTCP(t, d.addr, "/ws/chat/crowd/")
	last := int64(0)
	before := d.memory("VmRSS")
	for sent, got := 0, 0; got < messages; got++ {
		for ; sent < messages && sent < got+window; sent++ {
			speaker.send(opText, fmt.Appendf(nil, `{"message":"%d %s"}`, sent, text))
		}
		f, err := speaker.nextChat()
		if err != nil || f.ID <= last {
			t.Fatalf("the speaker got %d after %d, %v", f.ID, last, err)
		}
		last = f.ID
	}
	t.Logf("%d messages of 8 KiB past %d stalled clients: chatd grew from %d to %d MiB", messages, len(crowd), before>>20, d.memory("VmRSS")>>20)
	var closed atomic.Int64
	var all sync.WaitGroup
	for i, p := range crowd {
		all.Go(func() {
			seen, err := p.readIDs(0, last)
			if err != nil {
				closed.Add(1)
				back := dialTCP(t, d.addr, fmt.Sprint("/ws/chat/crowd/?since=", seen))
				defer back.conn.Close()
				seen, err = back.readIDs(seen, last)
			}
			if seen != last {
				t.Errorf("client %d got up to %d of %d: %v", i, seen, last, err)
			}
		})
	}
	all.Wait()
	t.Logf("%d of %d were told to come back, and have everything", closed.Load(), len(crowd))
	if closed.Load() == 0 {
		t.Error("nobody was too slow")
	}
}

func (p *peer) nextChat() (f chatFrame, err error) {
	payload, err := p.nextText()
	if err == nil {
		err = json.Unmarshal(payload, &f)
	}
	return f, err
}

// readIDs reads messages up to the id last, which must follow each other.
func (p *peer) readIDs(seen, last int64) (int64, error) {
	for seen < last {
		f, err := p.nextChat()
		if err != nil {
			return seen, err
		}
		if f.ID != seen+1 {
			return seen, fmt.Errorf("%d came after %d", f.ID, seen)
		}
		seen = f.ID
	}
	return seen, nil
}

// memory is what chatd has resident (VmRSS), or had at most (VmHWM), in bytes; 0
// where that cannot be told.
func (d *daemon) memory(which string) int {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	var kB int
	_, after, _ := strings.Cut(string(status), which+":")
	fmt.Sscan(after, &kB)
	return kB << 10
}

var (
	crowdSize  = flag.Int("crowd", 300, "how many clients of TestReconnectStorm come back at once")
	churnTime  = flag.Duration("churn", time.Second, "how long TestChurn lasts")
	listeners  = flag.Int("listeners", 50, "how many TestListeners has of each kind")
	heldTime   = flag.Duration("held", 300*time.Millisecond, "how long TestNobodyIsHeldUp measures at a time")
	heldRounds = flag.Int("rounds", 1, "how often")
	listenTime = flag.Duration("listen", 300*time.Millisecond, "how long it speaks to each kind")
	backlog    = flag.Int("backlog", 5000, "how many events the client of TestCatchUp has missed")
)

// TestReconnectStorm restarts chatd under a crowd, which comes back all at once
// while somebody speaks. Everybody misses nothing.
func TestReconnectStorm(t *testing.T) {
	const users, before, after = 50, 20, 100
	dir := t.TempDir()
	names := []string{"speaker"}
	for i := range users {
		names = append(names, fmt.Sprint("user", i))
	}
	newPeople(t, dir, []string{"lobby"}, names...)
	d := startDaemon(t, dir, "-rate", "0")
	speaker := &sender{t: t, d: d, name: "speaker", size: 100}
	speaker.connect()
	crowd := make([]*sender, *crowdSize)
	var all sync.WaitGroup
	each := func(f func(*sender)) {
		for _, s := range crowd {
			all.Go(func() { f(s) })
		}
	}
	for i := range crowd {
		crowd[i] = &sender{t: t, d: d, name: names[1+i%users]}
	}
	slots := make(chan struct{}, 100) // the first time they come one after the other
	each(func(s *sender) {
		slots <- struct{}{}
		s.connect()
		<-slots
	})
	all.Wait()
	for range before {
		speaker.say()
	}
	each(func(s *sender) { s.readUpTo(before) })
	all.Wait()
	d.kill()
	d.start()
	began := time.Now()
	each(func(s *sender) {
		s.peer.conn.Close()
		s.connect()
	})
	speaker.connect()
	var slowest time.Duration
	for range after {
		sent := time.Now()
		if code := speaker.say(); code != "" {
			t.Errorf("the speaker was told %s", code)
		}
		slowest = max(slowest, time.Since(sent))
	}
	all.Wait()
	back := time.Since(began)
	each(func(s *sender) { s.readUpTo(before + after) })
	all.Wait()
	t.Logf("%d clients were back after %v; the slowest of %d messages meanwhile took %v; chatd has %d MiB", len(crowd), back.Round(time.Millisecond),
		after, slowest.Round(time.Millisecond), d.memory("VmHWM")>>20)
	for _, s := range crowd {
		s.conn.Close()
	}
}

// readUpTo reads until a client has seen n messages, in order.
func (s *sender) readUpTo(n int) {
	for len(s.seen) < n {
		s.await(func(f eventFrame) bool { return f.Type == "message" })
	}
	for i, cid := range s.seen {
		if want := fmt.Sprint("speaker", i+1); cid != want {
			s.t.Errorf("%s got %s, want %s", s.name, cid, want)
			return
		}
	}
}

// TestChurn has clients join and leave a room as fast as they can, while people
// chat there and in another. Nothing is lost in either.
func TestChurn(t *testing.T) {
	const people, window, churners = 10, 4, 8
	d := startDaemon(t, t.TempDir(), "-guests", "-rate", "0")
	var stop atomic.Bool
	var churned atomic.Int64
	var all sync.WaitGroup
	for range churners {
		all.Go(func() {
			for !stop.Load() {
				dialTCP(t, d.addr, "/ws/chat/busy/").conn.Close()
				churned.Add(1)
			}
		})
	}
	seen := make(map[string][][]string) // what each saw, by room
	for _, room := range []string{"busy", "quiet"} {
		peers := make([]*peer, people)
		for i := range peers {
			peers[i] = dialTCP(t, d.addr, "/ws/chat/"+room+"/")
		}
		views := make([][]string, people)
		seen[room] = views
		for i, p := range peers {
			all.Go(func() {
				var heard []string
				for sent := 0; len(heard) == 0 || heard[len(heard)-1] != "end"; {
					for ; i == 0 && sent < len(heard)+window && !stop.Load(); sent++ {
						p.send(opText, fmt.Appendf(nil, `{"message":"%d"}`, sent))
					}
					if i == 0 && stop.Load() && len(heard) == sent {
						p.send(opText, []byte(`{"message":"end"}`))
					}
					f, err := p.nextChat()
					if err != nil {
						t.Errorf("%s: client %d, after %d messages: %v", room, i, len(heard), err)
						break
					}
					heard = append(heard, f.Message)
				}
				views[i] = heard
			})
		}
	}
	time.Sleep(*churnTime)
	stop.Store(true)
	all.Wait()
	for room, views := range seen {
		n := len(views[0]) - 1
		for i, view := range views {
			if !slices.Equal(view, views[0]) || n < 1 || view[n-1] != fmt.Sprint(n-1) {
				t.Errorf("%s: client %d saw %d messages, the speaker %d", room, i, len(view), len(views[0]))
			}
		}
		t.Logf("%s: each of %d clients saw all %d messages", room, people, n)
	}
	t.Logf("%.0f joins and as many leaves a second", float64(churned.Load())/churnTime.Seconds())
}

// TestCatchUp has a client come back that was away for long. It gets everything,
// and chatd's memory does not grow with what it missed.
func TestCatchUp(t *testing.T) {
	dir := t.TempDir()
	newPeople(t, dir, []string{"lobby"}, "ann")
	store, err := OpenStore(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	ann, _, err := store.UserByName(t.Context(), "ann")
	if err != nil {
		t.Fatal(err)
	}
	room, err := store.Room("lobby")
	if err != nil {
		t.Fatal(err)
	}
	fail := func(_ Event, err error) {
		if err != nil {
			t.Error(err)
		}
	}
	for i := range *backlog {
		e := Event{Kind: KindMessage, Room: room, Author: ann, CID: fmt.Sprint("ann", i+1), Body: strings.Repeat("x", 100)}
		if i%10 == 9 {
			e = Event{Kind: KindEdit, Author: ann, Target: int64(i), Body: "edited"}
		}
		if err := store.Append(e, fail); err != nil {
			t.Fatal(err)
		}
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, dir)
	before := d.memory("VmHWM")
	began := time.Now()
	p := dialTCP(t, d.addr, "/ws", "Cookie: "+cookieOf("ann"))
	p.send(opText, []byte(`{"type":"hello","since":0}`))
	for want := int64(1); want <= int64(*backlog); want++ {
		if f, err := p.nextEvent(); err != nil || f.ID != want {
			t.Fatalf("got %d, want %d; %v", f.ID, want, err)
		}
	}
	took := time.Since(began)
	t.Logf("%d events in %v, %.0f a second; chatd's peak grew from %d to %d KiB", *backlog, took.Round(time.Millisecond),
		float64(*backlog)/took.Seconds(), before>>10, d.memory("VmHWM")>>10)
}

var (
	floodTime = flag.Duration("flood", 2*time.Second, "how long TestLoginFlood lasts")
	strangers = flag.Int("strangers", 8, "how many try passwords in TestLoginFlood")
)

// TestLoginFlood has strangers try passwords as fast as they can, from many
// addresses, while others chat. Those hear each other in time, and whoever knows
// the password gets in.
func TestLoginFlood(t *testing.T) {
	dir := t.TempDir()
	newPeople(t, dir, []string{"lobby"}, "ann")
	d := startDaemon(t, dir, "-rate", "0")
	owner := d.addUser("owner")
	var stop atomic.Bool
	var tries, answered atomic.Int64
	var all sync.WaitGroup
	client := &http.Client{Timeout: tooLong, Transport: &http.Transport{MaxIdleConnsPerHost: *strangers}}
	for i := range *strangers {
		all.Go(func() {
			for j := 0; !stop.Load(); j++ {
				r, err := http.NewRequest("POST", d.url("/login/"), strings.NewReader("username=owner&password=guess"))
				if err != nil {
					t.Error(err)
					return
				}
				r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
				r.Header.Set("X-Forwarded-For", fmt.Sprintf("10.%d.%d.%d", i, j>>8&255, j&255))
				tries.Add(1)
				if res, err := client.Do(r); err == nil {
					answered.Add(1)
					res.Body.Close()
				}
			}
		})
	}
	defer stop.Store(true)
	ann := &sender{t: t, d: d, name: "ann", size: 100}
	ann.connect()
	var took []time.Duration
	for end := time.Now().Add(*floodTime); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		sent := time.Now()
		if code := ann.say(); code != "" {
			t.Errorf("ann was told %s", code)
		}
		took = append(took, time.Since(sent))
	}
	began := time.Now()
	d.post(owner, "/login/", url.Values{"username": {"owner"}, "password": {testPassword}})
	login := time.Since(began)
	stop.Store(true)
	all.Wait()
	slices.Sort(took)
	t.Logf("%.0f tries a second, %d of %d answered; messages took %v (p50) and %v (p99); the owner signed in within %v", float64(tries.Load())/floodTime.Seconds(),
		answered.Load(), tries.Load(), took[len(took)/2].Round(time.Microsecond), took[len(took)*99/100].Round(time.Microsecond), login.Round(time.Millisecond))
}

// TestListeners has many listen to one room, as sockets and as streams, and prints
// what each kind costs.
func TestListeners(t *testing.T) {
	const window = 8 // messages under way
	for _, kind := range []struct{ name, path, headers string }{
		{"sockets, chatd.v1", "/ws", "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"},
		{"server-sent events", "/chat/crowd/", "Accept: text/event-stream\r\n"},
		{"JSON lines", "/chat/crowd/", "Accept: application/x-ndjson\r\n"},
		{"text", "/chat/crowd/", "Accept: text/plain\r\n"},
	} {
		dir := t.TempDir()
		newPeople(t, dir, []string{"crowd"}, "ann")
		d := startDaemon(t, dir, "-rate", "0")
		head := fmt.Sprintf("GET %s HTTP/1.1\r\nHost: chat.test\r\nCookie: %s\r\n%s\r\n", kind.path, cookieOf("ann"), kind.headers)
		if kind.path == "/ws" {
			head += string(maskedFrame(0x80|opText, []byte(`{"type":"hello"}`)))
		}
		var heard atomic.Int64 // of what is said, once for each listener
		var ready sync.WaitGroup
		ready.Add(*listeners)
		before := d.memory("VmRSS")
		for range *listeners {
			conn, err := net.Dial("tcp", d.addr)
			if err == nil {
				_, err = io.WriteString(conn, head)
			}
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			greeted := make(chan error, 1)
			go func() {
				b := make([]byte, 64<<10)
				n, err := conn.Read(b)
				greeted <- err
				for listening := false; err == nil; n, err = conn.Read(b) {
					if !listening && bytes.IndexByte(b[:n], '~') >= 0 {
						listening = true
						ready.Done()
					}
					heard.Add(int64(bytes.Count(b[:n], []byte("^"))))
				}
			}()
			if err := receive(t, greeted); err != nil {
				t.Fatal(err)
			}
		}
		idle := d.memory("VmRSS") - before
		speaker := dialTCP(t, d.addr, "/ws/chat/crowd/", "Cookie: "+cookieOf("ann"))
		go io.Copy(io.Discard, speaker.conn)
		soon, cancel := context.WithTimeout(t.Context(), tooLong)
		defer cancel()
		allReady := make(chan struct{})
		go func() { ready.Wait(); close(allReady) }()
		for waiting := true; waiting; { // a listener is in the room some time after it has its first answer
			speaker.send(opText, []byte(`{"message":"~"}`))
			select {
			case <-allReady:
				waiting = false
			case <-soon.Done():
				t.Fatal("not all listen")
			case <-time.After(100 * time.Millisecond):
			}
		}
		cpu, began, sent := d.processorTime(), time.Now(), int64(0)
		text := fmt.Appendf(nil, `{"message":"^%s"}`, strings.Repeat("x", 99))
		for wait := int64(0); sent == 0 || wait > 0; {
			if time.Since(began) < *listenTime && heard.Load() >= (sent-window+1)*int64(*listeners) {
				speaker.send(opText, text)
				sent++
			} else if time.Since(began) > *listenTime+time.Minute {
				break
			} else {
				time.Sleep(50 * time.Microsecond)
			}
			wait = sent*int64(*listeners) - heard.Load()
		}
		took := time.Since(began)
		t.Logf("%d %s: %.0f deliveries/s, %.2f CPU s per million, idle %.1f KB each", *listeners, kind.name,
			float64(heard.Load())/took.Seconds(), (d.processorTime()-cpu).Seconds()/float64(heard.Load())*1e6, float64(idle)/float64(*listeners)/1e3)
		if heard.Load() != sent*int64(*listeners) {
			t.Errorf("%s: of %d messages %d were heard", kind.name, sent, heard.Load())
		}
		d.kill()
	}
}

// processorTime is what the process has used so far.
func (d *daemon) processorTime() time.Duration {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", d.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond // a tick of Linux
}

// TestNobodyIsHeldUp measures how long messages take in one room, at 100 a second to
// 20 people, in turn while nothing else happens, and while in another room a timed push
// runs, a webhook never answers, and those who listen do not read.
func TestNobodyIsHeldUp(t *testing.T) {
	dir := t.TempDir()
	newPeople(t, dir, []string{"quiet", "noisy"}, "ann")
	d := startDaemon(t, dir, "-rate", "0", "-hook-allow", "127.0.0.0/8")
	cookie := "Cookie: " + cookieOf("ann")
	stuck, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer stuck.Close()
	called := make(chan net.Conn)
	go func() {
		conn, err := stuck.Accept()
		if err == nil {
			called <- conn // and waits for its answer
		}
		close(called)
	}()
	execSQL(t, dir, fmt.Sprintf(`
		INSERT INTO users (name, key, role, joined, first_id, bot) VALUES ('robot', 'ROBOT', 'member', 0, 0, 1);
		INSERT INTO hooks (room, bot, url, secret, mention, created, cursor) SELECT r.id, u.id, 'http://%s/', x'00', 0, 0, 0
			FROM rooms r, users u WHERE r.name = 'noisy' AND u.name = 'robot'`, stuck.Addr())).Close()
	d.kill()
	d.start()

	speaker := dialTCP(t, d.addr, "/ws/chat/quiet/", cookie)
	var others []*peer
	for range 19 {
		others = append(others, dialTCP(t, d.addr, "/ws/chat/quiet/", cookie))
	}
	measure := func() (p50, p99 time.Duration) {
		var took []time.Duration
		for range int(*heldTime / (10 * time.Millisecond)) {
			began := time.Now()
			speaker.send(opText, []byte(`{"message":"tick"}`))
			for _, p := range append(others, speaker) {
				if _, err := p.nextChat(); err != nil {
					t.Fatal(err)
				}
			}
			took = append(took, time.Since(began))
			time.Sleep(10*time.Millisecond - min(time.Since(began), 10*time.Millisecond))
		}
		slices.Sort(took)
		return took[len(took)/2], took[len(took)*99/100]
	}
	for round := range *heldRounds {
		p50, p99 := measure()
		t.Logf("alone: p50 %v, p99 %v", p50, p99)
		var open []net.Conn
		for range 20 {
			open = append(open, dialTCP(t, d.addr, "/ws/chat/noisy/", cookie).conn) // who never reads
			conn, err := net.Dial("tcp", d.addr)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(conn, "GET /chat/noisy/ HTTP/1.1\r\nHost: chat.test\r\nAccept: text/event-stream\r\n%s\r\n\r\n", cookie)
			open = append(open, conn)
		}
		if round == 0 {
			r, err := http.NewRequest("POST", d.url("/push?room=noisy&every=1s&times=1000"), nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Cookie", cookieOf("ann"))
			if res, err := http.DefaultClient.Do(r); err != nil || res.StatusCode != 200 {
				t.Fatal(res, err)
			}
		}
		noise := dialTCP(t, d.addr, "/ws/chat/noisy/", cookie)
		go io.Copy(io.Discard, noise.conn)
		stop, stopped := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(stopped)
			text := fmt.Appendf(nil, `{"message":%q}`, strings.Repeat("x", 4<<10))
			for tick := time.NewTicker(20 * time.Millisecond); ; {
				select {
				case <-tick.C:
					noise.send(opText, text)
				case <-stop:
					tick.Stop()
					return
				}
			}
		}()
		if conn := receive(t, called); conn != nil {
			defer conn.Close()
		}
		p50, p99 = measure()
		close(stop)
		<-stopped
		t.Logf("with push, stuck webhook, 40 who do not read: p50 %v, p99 %v", p50, p99)
		for _, conn := range append(open, noise.conn) {
			conn.Close()
		}
	}
}
