package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

var (
	chaosTime = flag.Duration("chaos", 8*time.Second, "how long TestChaos lasts")
	chaosSeed = flag.Uint64("seed", 0, "what TestChaos draws its accidents from; 0: something new")
	faults    = flag.Bool("faults", false, "put faults into chatd and see whether TestChaos finds them")
)

const (
	chaosRound    = 15 * time.Second // then all is compared and a new database begun
	chaosPeople   = 6
	chaosWindow   = 16               // operations that a client has under way
	chaosPatience = 2 * time.Second  // a client that hears nothing for so long connects again
	chaosEnd      = 30 * time.Second // after which what is still unanswered never will be
)

// TestChaos has people write, edit, delete and react, over sockets and HTTP, while
// chatd is killed, stopped, frozen and robbed of its disk, and their connections
// are cut in the middle of frames, stall, and read slowly. What is not answered is
// sent again; some is sent twice at once.
//
// In the end everybody's view is compared with the disk: nothing that anybody saw
// is missing, doubled, out of order or changed; nothing that was acknowledged is
// absent, nothing that was refused is there; and all have the same messages and
// reactions.
func TestChaos(t *testing.T) {
	seed := *chaosSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("-seed %d", seed)
	var total [len(chaosCounts)]int64
	began := time.Now()
	for round := uint64(0); !t.Failed() && (round == 0 || time.Since(began) < *chaosTime); round++ {
		t.Run(fmt.Sprint("round", round), func(t *testing.T) {
			c := newChaos(t, rand.New(rand.NewPCG(seed, round)))
			c.run(min(chaosRound, *chaosTime-time.Since(began)))
			for i := range total {
				total[i] += c.count[i].Load()
			}
		})
	}
	var summary []string
	for i, what := range chaosCounts {
		summary = append(summary, fmt.Sprintf("%d %s", total[i], what))
	}
	t.Logf("%.0f s: %s", time.Since(began).Seconds(), strings.Join(summary, ", "))
}

const (
	operations = iota
	messages
	sentAgain
	sentTwice
	overHTTP
	refusals
	cuts
	stalls
	kills
	terms
	powerCuts
	diskFaults
	diskRefusals
)

var chaosCounts = [...]string{"operations", "messages", "sent again", "sent twice", "over HTTP", "refused", "connections cut", "stalls",
	"kill -9", "SIGTERM", "power cuts", "disk faults", "refused because of those"}

type chaos struct {
	t       *testing.T
	d       *daemon
	random  *rand.Rand // of the goroutine that does the accidents
	people  []*chaosClient
	ending  atomic.Bool  // nothing new is begun
	stalled atomic.Bool  // somebody does not read
	volume  atomic.Int64 // bytes of text that have been acknowledged
	count   [len(chaosCounts)]atomic.Int64

	mu           sync.Mutex // guards the rest
	acknowledged []*chaosOp
}

// A chaosClient is one person with one connection at a time.
type chaosClient struct {
	*chaos
	name   string
	random *rand.Rand
	http   *http.Client

	cursor  int64
	seen    []eventFrame // the log as it came
	waiting []*chaosOp   // neither acknowledged nor refused, in the order of sending
	ops     []*chaosOp   // all
	byCID   map[string]*chaosOp
	recent  []eventFrame // newest messages
}

// A chaosOp is something that a client asks for, again and again until it has an
// answer.
type chaosOp struct {
	author       string
	frame        clientFrame
	id           int64 // in the log, once acknowledged
	acknowledged bool
	refused      string // code
	plain        bool   // sent over the socket only, and no disk failed yet: keeps its place
}

func newChaos(t *testing.T, random *rand.Rand) *chaos {
	c := &chaos{t: t, random: random}
	var names []string
	for i := range chaosPeople {
		name := fmt.Sprint("person", i)
		names = append(names, name)
		c.people = append(c.people, &chaosClient{
			chaos: c, name: name, random: rand.New(rand.NewPCG(random.Uint64(), 0)),
			http: &http.Client{Timeout: chaosPatience}, byCID: make(map[string]*chaosOp),
		})
	}
	dir := t.TempDir()
	newPeople(t, dir, chaosRooms, names...)
	c.d = startDaemon(t, dir, "-rate", "0")
	return c
}

var chaosRooms = []string{"lobby", "大厅", "ops"}

func (c *chaos) run(length time.Duration) {
	var all sync.WaitGroup
	for _, p := range c.people {
		all.Go(p.live)
	}
	for end := time.Now().Add(length); time.Now().Before(end) && !c.t.Failed(); {
		time.Sleep(10 * time.Millisecond << c.random.IntN(9)) // up to 2.6 s, time enough to overflow
		switch c.random.IntN(8) {
		case 0:
			c.d.stop()
			c.d.start()
			c.count[terms].Add(1)
		case 1:
			c.powerCut()
		case 2, 3:
			c.diskFault()
		default:
			c.d.kill()
			c.d.start()
			c.count[kills].Add(1)
		}
	}
	c.ending.Store(true)
	all.Wait()
	for _, p := range c.people {
		p.catchUp()
	}
	c.d.stop()
	if !c.t.Failed() {
		c.compare()
	}
}

// powerCut freezes chatd, copies its files as they are at that moment, and looks
// whether a chatd started on them has everything that was acknowledged before.
func (c *chaos) powerCut() {
	c.count[powerCuts].Add(1)
	c.mu.Lock()
	acknowledged := slices.Clone(c.acknowledged)
	c.mu.Unlock()
	process, dir := c.d.cmd.Process, c.t.TempDir()
	if err := process.Signal(syscall.SIGSTOP); err != nil {
		c.t.Fatal(err)
	}
	for status := []byte(nil); !bytes.Contains(status, []byte("State:\tT")); {
		status, _ = os.ReadFile(fmt.Sprintf("/proc/%d/status", process.Pid))
	}
	for _, name := range []string{"chatd.db", "chatd.db-wal"} {
		b, err := os.ReadFile(filepath.Join(c.d.dir, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), b, 0o600)
		}
		if err != nil {
			c.t.Error(err)
		}
	}
	if err := process.Signal(syscall.SIGCONT); err != nil {
		c.t.Fatal(err)
	}
	stored := make(map[int64]string)
	for _, e := range readLog(c.t, dir) {
		stored[e.ID] = e.CID
	}
	for _, op := range acknowledged {
		if stored[op.id] != op.frame.CID {
			c.t.Errorf("after a power cut: %s was acknowledged as %d, where there is %q", op.frame.CID, op.id, stored[op.id])
			return
		}
	}
	os.RemoveAll(dir)
}

// diskFault lets writes to files fail beyond a size that the write-ahead log
// reaches soon: I/O errors in the middle of a batch.
func (c *chaos) diskFault() {
	c.count[diskFaults].Add(1)
	size := int64(0)
	if info, err := os.Stat(filepath.Join(c.d.dir, "chatd.db-wal")); err == nil {
		size = c.random.Int64N(info.Size() + 1)
	}
	c.d.limitFiles(fmt.Sprint(size))
	time.Sleep(time.Duration(c.random.IntN(100)) * time.Millisecond)
	c.d.limitFiles("unlimited")
}

// limitFiles lets chatd's writes beyond that many bytes of any file fail.
func (d *daemon) limitFiles(bytes string) {
	d.t.Helper()
	if out, err := exec.Command("prlimit", "--pid", fmt.Sprint(d.cmd.Process.Pid), "--fsize="+bytes+":").CombinedOutput(); err != nil {
		d.t.Fatalf("%v\n%s", err, out)
	}
}

// live connects again and again, until the end has come and all has an answer.
func (c *chaosClient) live() {
	var last time.Time
	for !c.t.Failed() && (!c.ending.Load() || len(c.waiting) > 0) {
		if c.ending.Load() && last.IsZero() {
			last = time.Now().Add(chaosEnd)
		}
		if !last.IsZero() && time.Now().After(last) {
			c.t.Errorf("%s never had an answer to %+v", c.name, c.waiting[0].frame)
			return
		}
		if c.connection(func() bool { return c.ending.Load() && len(c.waiting) == 0 }) != nil {
			c.count[cuts].Add(1)
			time.Sleep(time.Duration(c.random.IntN(20)) * time.Millisecond)
		}
	}
}

// catchUp takes in what the others did last.
func (c *chaosClient) catchUp() {
	for end := time.Now().Add(chaosEnd); !c.t.Failed() && time.Now().Before(end); {
		caughtUp := false
		err := c.connection(func() bool { caughtUp = true; return true })
		if err == nil && caughtUp {
			return
		}
	}
	c.t.Errorf("%s did not catch up", c.name)
}

// connection chats until the connection ends, or, once caught up, done says so.
func (c *chaosClient) connection(done func() bool) error {
	conn, err := net.Dial("tcp", c.d.addr)
	if err != nil {
		return err // there is no chatd now
	}
	defer conn.Close()
	since, slow := c.cursor, c.random.IntN(2) == 0
	if slow {
		conn.(*net.TCPConn).SetReadBuffer(64 << 10) // so that a stall shows at once
	}
	p := &peer{t: c.t, conn: conn}
	if err := p.tryHandshake("/ws", "Cookie: "+cookieOf(c.name)); err != nil {
		return err
	}
	if err := c.write(conn, clientFrame{Type: "hello", Since: &since}); err != nil {
		return err
	}
	for ready := false; ; {
		conn.SetReadDeadline(time.Now().Add(chaosPatience))
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
		case "message", "edit", "delete", "react":
			c.saw(f, since)
		case "error":
			err = c.wasRefused(conn, payload)
		case "caught_up":
			ready = true
			for _, op := range slices.Clone(c.waiting) {
				c.count[sentAgain].Add(1)
				err = c.send(conn, op)
			}
		}
		if err != nil {
			return err
		}
		if !ready {
			continue
		}
		if done() {
			return nil
		}
		for !c.ending.Load() && len(c.waiting) < chaosWindow {
			if err := c.send(conn, c.begin()); err != nil {
				return err
			}
		}
		if !c.ending.Load() {
			if err := c.accident(conn, slow); err != nil {
				return err
			}
		}
	}
}

func (c *chaosClient) write(conn net.Conn, f clientFrame) error {
	_, err := conn.Write(maskedFrame(0x80|opText, encodeJSON(f)))
	return err
}

// accident is what happens to connections.
func (c *chaosClient) accident(conn net.Conn, slow bool) error {
	if slow && c.random.IntN(50) == 0 {
		time.Sleep(time.Millisecond)
	}
	switch c.random.IntN(20000) {
	case 0: // reset
		conn.(*net.TCPConn).SetLinger(0)
		return net.ErrClosed
	case 1: // cut in the middle of a frame
		frame := maskedFrame(0x80|opText, encodeJSON(clientFrame{Type: "message", Room: "lobby", CID: c.name + "-half", Message: "half a message"}))
		conn.Write(frame[:1+c.random.IntN(len(frame)-1)])
		return net.ErrClosed
	case 2, 3, 4, 5, 6, 7, 8, 9: // stall while the others say much
		if !slow || !c.stalled.CompareAndSwap(false, true) {
			break
		}
		defer c.stalled.Store(false)
		c.count[stalls].Add(1)
		end := time.Now().Add(3 * time.Second)
		for target := c.volume.Load() + 10*outboxMost; c.volume.Load() < target && time.Now().Before(end); {
			time.Sleep(5 * time.Millisecond)
		}
	}
	return nil
}

// begin thinks of something to do.
func (c *chaosClient) begin() *chaosOp {
	f := clientFrame{Type: "message", Room: chaosRooms[c.random.IntN(len(chaosRooms))], CID: fmt.Sprintf("%s-%06d", c.name, len(c.ops))}
	about := eventFrame{}
	if len(c.recent) > 0 {
		about = c.recent[c.random.IntN(len(c.recent))]
	}
	switch what := c.random.IntN(20); {
	case what < 4 && about.Username == c.name: // the others' would be refused
		f.Type, f.Room, f.ID, f.Message = "edit", about.Room, about.ID, c.text(f.CID)
	case what < 6 && about.Username == c.name:
		f.Type, f.Room, f.ID = "delete", about.Room, about.ID
	case what < 4 && about.ID != 0:
		on := c.random.IntN(3) > 0
		f.Type, f.Room, f.ID, f.Emoji, f.On = "react", about.Room, about.ID, []string{"👍", "🎉"}[c.random.IntN(2)], &on
	default:
		f.Message = c.text(f.CID)
		if c.random.IntN(10) == 0 {
			f.ReplyTo = about.ID // in this room or not
		}
		c.count[messages].Add(1)
	}
	c.count[operations].Add(1)
	op := &chaosOp{author: c.name, frame: f, plain: true}
	c.ops = append(c.ops, op)
	c.byCID[f.CID] = op
	c.waiting = append(c.waiting, op)
	return op
}

// text is different each time, and now and then as long as a text may be.
func (c *chaosClient) text(cid string) string {
	n := c.random.IntN(200)
	if c.random.IntN(4) == 0 {
		n = maxMessage - len(cid) - 1
	}
	return cid + " " + strings.Repeat("x", n)
}

// send sends an operation over the socket, or over HTTP, or both, or twice.
func (c *chaosClient) send(conn net.Conn, op *chaosOp) error {
	switch c.random.IntN(30) {
	case 0:
		op.plain = false
		c.count[overHTTP].Add(1)
		if c.post(op) {
			return nil
		}
	case 1:
		c.count[sentTwice].Add(1)
		if err := c.write(conn, op.frame); err != nil {
			return err
		}
	case 2:
		op.plain = false
		c.count[sentTwice].Add(1)
		c.count[overHTTP].Add(1)
		if err := c.write(conn, op.frame); err != nil {
			return err
		}
		c.post(op)
		return nil
	}
	return c.write(conn, op.frame)
}

// post reports whether the server gave an answer that will do.
func (c *chaosClient) post(op *chaosOp) bool {
	room := op.frame.Room
	r, err := http.NewRequest("POST", c.d.url(roomPath(room)), bytes.NewReader(encodeJSON(op.frame)))
	if err != nil {
		c.t.Error(err)
		return false
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Cookie", cookieOf(c.name))
	res, err := c.http.Do(r)
	if err != nil {
		return false
	}
	defer res.Body.Close()
	var f eventFrame
	var p problemFrame
	if res.StatusCode == http.StatusOK {
		if json.NewDecoder(res.Body).Decode(&f) == nil {
			c.gotAnswer(op, f.ID)
			return true
		}
	} else if json.NewDecoder(res.Body).Decode(&p) == nil {
		return c.gotRefusal(op, p.Code)
	}
	return false
}

// saw takes in an event of the log.
func (c *chaosClient) saw(f eventFrame, since int64) {
	op := c.byCID[f.CID]
	own := f.Username == c.name && op != nil
	switch {
	case own && f.ID <= since: // an answer to a retry
	case f.ID <= c.cursor:
		c.t.Errorf("%s got %s %d after %d", c.name, f.Type, f.ID, c.cursor)
	default:
		c.cursor = f.ID
		c.seen = append(c.seen, normal(f))
	}
	if own {
		c.gotAnswer(op, f.ID)
	}
	if f.Type == "message" && !f.Deleted {
		const kept = 100
		c.recent = append(c.recent[max(0, len(c.recent)-kept):], eventFrame{ID: f.ID, Room: f.Room, Username: f.Username})
	}
}

// normal makes frames comparable and long texts short.
func normal(f eventFrame) eventFrame {
	if f.On != nil && !*f.On {
		f.Emoji = "no " + f.Emoji
	}
	f.On = nil
	f.Message = digest(f.Message)
	return f
}

func digest(text string) string {
	if text == "" {
		return ""
	}
	h := fnv.New64a()
	h.Write([]byte(text))
	return fmt.Sprintf("%.20s %x", text, h.Sum64())
}

func (c *chaosClient) gotAnswer(op *chaosOp, id int64) {
	switch {
	case op.refused != "":
		c.t.Errorf("%s was refused (%s), then acknowledged as %d", op.frame.CID, op.refused, id)
	case op.acknowledged && op.id != id:
		c.t.Errorf("%s was acknowledged as %d, then as %d", op.frame.CID, op.id, id)
	case !op.acknowledged:
		op.id, op.acknowledged = id, true
		op.plain = op.plain && c.count[diskFaults].Load() == 0
		c.volume.Add(int64(len(op.frame.Message)))
		c.waiting = slices.DeleteFunc(c.waiting, func(o *chaosOp) bool { return o == op })
		c.mu.Lock()
		defer c.mu.Unlock()
		c.acknowledged = append(c.acknowledged, op)
	}
}

// gotRefusal reports whether it is for good.
func (c *chaosClient) gotRefusal(op *chaosOp, code string) bool {
	switch code {
	case "storage":
		c.count[diskRefusals].Add(1)
		fallthrough
	case "busy":
		op.plain = false
		return false
	case "not_found", "forbidden":
		if op.acknowledged {
			c.t.Errorf("%s was acknowledged as %d, then refused: %s", op.frame.CID, op.id, code)
		}
		if op.refused == "" {
			op.refused = code
			c.count[refusals].Add(1)
			c.waiting = slices.DeleteFunc(c.waiting, func(o *chaosOp) bool { return o == op })
		}
	default:
		c.t.Errorf("%s was refused: %s", op.frame.CID, code)
	}
	return true
}

func (c *chaosClient) wasRefused(conn net.Conn, payload []byte) error {
	var p problemFrame
	if err := json.Unmarshal(payload, &p); err != nil {
		return err
	}
	op := c.byCID[p.CID]
	if op == nil {
		c.t.Errorf("%s was told %s", c.name, payload)
		return nil
	}
	if c.gotRefusal(op, p.Code) || op.acknowledged || op.refused != "" {
		return nil
	}
	time.Sleep(time.Duration(c.random.IntN(5)) * time.Millisecond)
	c.count[sentAgain].Add(1)
	return c.write(conn, op.frame)
}
