package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

var (
	kills   = flag.Int("kills", 4, "how often TestKill kills chatd")
	perKill = flag.Int("per-kill", 300, "messages between two kills")
)

const inFlight = 16 // messages that a client sends before it has the answers

// TestKill kills chatd with -9 again and again while five clients chat. They
// come back by their cursors and send again what nobody acknowledged. In the end
// all have seen the same, which is what is on disk: nothing that anybody saw is
// gone, nothing acknowledged is absent, nothing is there twice.
func TestKill(t *testing.T) {
	const people = 5
	d := startDaemon(t, t.TempDir(), "-rate", "0")
	d.get(d.addUser("host"), "/chat/lobby/") // makes the room
	total := *perKill * (*kills + 1) / people * people
	test := &killTest{t: t, d: d, total: total, progress: make(chan struct{}, total)}
	var clients []*killClient
	for i := range people {
		c := &killClient{killTest: test, name: fmt.Sprint("sender", i), acknowledged: make(map[string]int64), quota: total / people}
		c.http = d.addUser(c.name)
		clients = append(clients, c)
	}
	var all sync.WaitGroup
	for _, c := range clients {
		all.Go(c.chat)
	}
	done := make(chan struct{})
	go func() { all.Wait(); close(done) }()
	for range *kills {
		for range *perKill {
			select {
			case <-test.progress:
			case <-done: // all are there, or one has failed
			}
		}
		d.kill()
		d.start()
	}
	<-done
	d.stop()
	if !t.Failed() {
		test.compare(clients)
	}
}

type killTest struct {
	t        *testing.T
	d        *daemon
	total    int
	progress chan struct{} // one for each message that is acknowledged
	resent   atomic.Int64
	cut      atomic.Int64 // connections that ended under a client
}

type killClient struct {
	*killTest
	name  string
	http  *http.Client
	quota int // messages to send

	cursor       int64
	seen         []eventFrame // all messages, in the order in which they came
	waiting      []string     // cids that are not acknowledged, in the order in which they were sent
	sent         int
	acknowledged map[string]int64 // id by cid
}

// chat connects until everything has been sent and seen.
func (c *killClient) chat() {
	for len(c.seen) < c.total && !c.t.Failed() {
		if err := c.connection(); err != nil {
			c.cut.Add(1)
		}
	}
}

func (c *killClient) connection() error {
	conn, err := net.Dial("tcp", c.d.addr)
	if err != nil {
		return err // there is no chatd now
	}
	defer conn.Close()
	p := &peer{t: c.t, conn: conn}
	if err := p.tryHandshake("/ws", "Cookie: "+c.d.cookies(c.http)); err != nil {
		return err
	}
	send := func(v any) error {
		_, err := conn.Write(maskedFrame(0x80|opText, encodeJSON(v)))
		return err
	}
	say := func(cid string) error {
		return send(map[string]any{"type": "message", "room": "lobby", "cid": cid, "message": "message " + cid})
	}
	if err := send(map[string]any{"type": "hello", "since": c.cursor}); err != nil {
		return err
	}
	for ready := false; len(c.seen) < c.total; {
		payload, err := p.nextText()
		if err != nil {
			return err
		}
		var f eventFrame
		if err := json.Unmarshal(payload, &f); err != nil {
			c.t.Error(err)
			return err
		}
		switch f.Type {
		case "message":
			c.saw(f)
		case "error":
			c.t.Errorf("%s was told %s", c.name, payload)
		case "caught_up":
			ready = true
			for _, cid := range c.waiting {
				c.resent.Add(1)
				if err := say(cid); err != nil {
					return err
				}
			}
		}
		for ready && c.sent < c.quota && len(c.waiting) < inFlight {
			cid := fmt.Sprintf("%s-%06d", c.name, c.sent)
			c.sent++
			c.waiting = append(c.waiting, cid)
			if err := say(cid); err != nil {
				return err
			}
		}
	}
	return nil
}

// saw notes a message, and that it is acknowledged if it is an own one.
func (c *killClient) saw(f eventFrame) {
	if f.ID <= c.cursor {
		c.t.Errorf("%s got id %d after %d", c.name, f.ID, c.cursor)
	}
	c.cursor = f.ID
	c.seen = append(c.seen, f)
	if f.Username != c.name {
		return
	}
	if len(c.waiting) == 0 || c.waiting[0] != f.CID {
		c.t.Errorf("%s was acknowledged %s and waits for %v", c.name, f.CID, c.waiting)
		return
	}
	c.waiting = c.waiting[1:]
	c.acknowledged[f.CID] = f.ID
	c.progress <- struct{}{}
}

// compare looks at what the clients saw and at what is on disk.
func (test *killTest) compare(clients []*killClient) {
	t := test.t
	store, err := OpenStore(test.d.dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	var check string
	if err := store.read.QueryRow("PRAGMA integrity_check").Scan(&check); err != nil || check != "ok" {
		t.Errorf("integrity: %s, %v", check, err)
	}
	stored, _, err := store.Since(t.Context(), 0, 0, 10*test.total)
	if err != nil {
		t.Fatal(err)
	}
	onDisk := make(map[int64]eventFrame)
	cids := make(map[string]bool)
	doubled := 0
	for _, e := range stored {
		onDisk[e.ID] = newEventFrame(e)
		if cids[e.CID] {
			doubled++
		}
		cids[e.CID] = true
	}
	missing, absent := 0, 0
	for _, c := range clients {
		for _, f := range c.seen {
			if onDisk[f.ID] != f {
				missing++
			}
		}
		for cid, id := range c.acknowledged {
			if onDisk[id].CID != cid {
				absent++
			}
		}
		if len(c.seen) != len(stored) || len(c.acknowledged) != c.quota {
			t.Errorf("%s saw %d of %d and has %d of %d acknowledged", c.name, len(c.seen), len(stored), len(c.acknowledged), c.quota)
		}
	}
	t.Logf("%d kills, %d messages by %d senders, %d connections cut or refused, %d messages sent again: %d seen but missing, %d doubled, %d acknowledged but absent",
		*kills, test.total, len(clients), test.cut.Load(), test.resent.Load(), missing, doubled, absent)
	if missing+doubled+absent > 0 || len(stored) != test.total {
		t.Errorf("%d on disk, %d sent", len(stored), test.total)
	}
}

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
	before := d.memory()
	for sent, got := 0, 0; got < messages; got++ {
		for ; sent < messages && sent < got+window; sent++ {
			speaker.send(opText, fmt.Appendf(nil, `{"message":"%d %s"}`, sent, text))
		}
		id, err := speaker.nextID()
		if err != nil || id <= last {
			t.Fatalf("the speaker got %d after %d, %v", id, last, err)
		}
		last = id
	}
	t.Logf("%d messages of 8 KiB past %d stalled clients: chatd grew from %d to %d MiB", messages, len(crowd), before>>20, d.memory()>>20)
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

func (p *peer) nextID() (int64, error) {
	payload, err := p.nextText()
	var f chatFrame
	if err == nil {
		err = json.Unmarshal(payload, &f)
	}
	return f.ID, err
}

// readIDs reads messages up to the id last, which must follow each other.
func (p *peer) readIDs(seen, last int64) (int64, error) {
	for seen < last {
		id, err := p.nextID()
		if err != nil {
			return seen, err
		}
		if id != seen+1 {
			return seen, fmt.Errorf("%d came after %d", id, seen)
		}
		seen = id
	}
	return seen, nil
}

// memory is what chatd has resident, in bytes; 0 where that cannot be told.
func (d *daemon) memory() int {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	var kB int
	_, after, _ := strings.Cut(string(status), "VmRSS:")
	fmt.Sscan(after, &kB)
	return kB << 10
}
