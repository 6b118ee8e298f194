package main

import (
	"bytes"
	"database/sql"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// newPeople makes a database with members who are signed in: the cookie of a name
// is cookieOf(name).
func newPeople(t testing.TB, dir string, rooms []string, names ...string) {
	t.Helper()
	store, err := OpenStore(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	var u User
	for _, name := range names {
		if u, err = store.CreateUser(name, RoleMember, ""); err != nil {
			t.Fatal(err)
		}
		if err := store.CreateSession(u, hashToken(name), "", ""); err != nil {
			t.Fatal(err)
		}
	}
	for _, room := range rooms {
		if _, err := store.CreateRoom(room, u); err != nil {
			t.Fatal(err)
		}
	}
}

func cookieOf(name string) string { return sessionCookie + "=" + name }

// What chatd cannot start with it says in one line, and ends.
func TestStartRefuses(t *testing.T) {
	t.Parallel()
	database := func(dir string) *os.File {
		f, err := os.OpenFile(filepath.Join(dir, "chatd.db"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	for _, test := range []struct {
		name string
		harm func(t *testing.T, dir string)
		want string
	}{
		{"newer", func(t *testing.T, dir string) { execSQL(t, dir, "PRAGMA user_version = 99") }, "version 99"},
		{"locked", func(t *testing.T, dir string) { execSQL(t, dir, "PRAGMA locking_mode = EXCLUSIVE; CREATE TABLE x (y)") }, "another program keeps it locked"},
		{"no database", func(t *testing.T, dir string) {
			f := database(dir)
			defer f.Close()
			if _, err := f.WriteString("This was chatd.db once."); err != nil {
				t.Fatal(err)
			}
		}, "damaged"},
		{"cut short", func(t *testing.T, dir string) {
			f := database(dir)
			defer f.Close()
			if err := f.Truncate(3 * 4096); err != nil {
				t.Fatal(err)
			}
		}, "damaged"},
		{"garbage", func(t *testing.T, dir string) {
			f := database(dir)
			defer f.Close()
			if _, err := f.WriteAt([]byte(strings.Repeat("garbage!", 1000)), 100); err != nil {
				t.Fatal(err)
			}
		}, "damaged"},
		{"another's database", func(t *testing.T, dir string) {
			execSQL(t, dir, "PRAGMA user_version = 0; DROP TABLE reads")
		}, "migrate"},
		{"a file", func(t *testing.T, dir string) {
			os.RemoveAll(dir)
			if err := os.WriteFile(dir, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "not a directory"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "data")
			newPeople(t, dir, []string{"lobby"}, "ann")
			test.harm(t, dir)
			refusesToStart(t, chatdCommand("-addr", "127.0.0.1:0", "-data", dir), test.want)
		})
	}
}

// refusesToStart runs chatd, which has to end with one line and a failure.
func refusesToStart(t *testing.T, cmd *exec.Cmd, want string) {
	t.Helper()
	out, err := cmd.CombinedOutput()
	said := string(out)
	if err == nil || !strings.HasPrefix(said, "chatd: ") || strings.Count(said, "\n") != 1 || !strings.Contains(said, want) {
		t.Errorf("%v, want a failure and one line with %q:\n%s", err, want, said)
	}
	t.Logf("%s", said)
}

// execSQL does something to a database, and keeps it open until the test ends.
func execSQL(t *testing.T, dir, query string) *sql.Conn {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(dir, "chatd.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	conn, err := db.Conn(t.Context())
	if err == nil {
		_, err = conn.ExecContext(t.Context(), query)
	}
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// A directory that chatd may not write to is refused at the start.
func TestReadOnlyDirectory(t *testing.T) {
	const nobody = 65534
	outer, err := os.MkdirTemp("", "chatd") // not t.TempDir, which others may not enter
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(outer)
	dir := filepath.Join(outer, "data")
	newPeople(t, dir, nil, "ann")
	for path, mode := range map[string]os.FileMode{outer: 0o755, dir: 0o555, filepath.Join(dir, "chatd.db"): 0o444} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	cmd := chatdCommand("-addr", "127.0.0.1:0", "-data", dir)
	if os.Getuid() == 0 { // root may write anywhere
		program := filepath.Join(outer, "chatd")
		b, err := os.ReadFile(os.Args[0])
		if err == nil {
			err = os.WriteFile(program, b, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
		cmd.Path, cmd.Dir = program, "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	refusesToStart(t, cmd, "cannot be written to")
}

// TestSmallDisk fills a real disk.
func TestSmallDisk(t *testing.T) {
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=2m", "none", dir).CombinedOutput(); err != nil {
		t.Skipf("only root can mount a small disk: %v %s", err, out)
	}
	t.Cleanup(func() { exec.Command("umount", "-l", dir).Run() })
	newPeople(t, dir, []string{"lobby"}, "ann", "bob")
	d := startDaemon(t, dir, "-rate", "0")
	ail(t, d, func() {}, func() {
		if out, err := exec.Command("mount", "-o", "remount,size=20m", dir).CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, out)
		}
	})
}

// TestWriteError lets writes fail in the middle of a batch.
func TestWriteError(t *testing.T) {
	dir := t.TempDir()
	newPeople(t, dir, []string{"lobby"}, "ann", "bob")
	d := startDaemon(t, dir, "-rate", "0")
	ail(t, d, func() { d.limitFiles("200000") }, func() { d.limitFiles("unlimited") })
}

// TestSyncError lets fsync fail, of which SQLite cannot know what is on disk.
func TestSyncError(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		need(t, "install strace to let fsync fail")
	}
	dir := t.TempDir()
	newPeople(t, dir, []string{"lobby"}, "ann", "bob")
	d := startDaemon(t, dir, "-rate", "0")
	var tracer *exec.Cmd
	ail(t, d, func() {
		tracer = exec.Command("strace", "-f", "-p", fmt.Sprint(d.cmd.Process.Pid), "-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO")
		said, err := tracer.StderrPipe()
		if err == nil {
			err = tracer.Start()
		}
		if err == nil {
			_, err = io.ReadFull(said, make([]byte, len("strace: Process"))) // it is attached
		}
		if err != nil {
			t.Fatal(err)
		}
		go io.Copy(io.Discard, said) // ends with strace
	}, func() {
		tracer.Process.Signal(syscall.SIGINT)
		wait(tracer)
	})
}

// TestLocked lets another program keep the database locked.
func TestLocked(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	newPeople(t, dir, []string{"lobby"}, "ann", "bob")
	d := startDaemon(t, dir, "-rate", "0")
	var other *sql.Conn
	ail(t, d, func() { other = execSQL(t, dir, "BEGIN IMMEDIATE") }, func() {
		if _, err := other.ExecContext(t.Context(), "ROLLBACK"); err != nil {
			t.Fatal(err)
		}
	})
}

// ail does harm to chatd while people chat: senders are told in words, readers go
// on, and when it is over all is well by itself, and everything is there once.
func ail(t *testing.T, d *daemon, harm, heal func()) {
	ann := &sender{t: t, d: d, name: "ann", size: 4000}
	ann.connect()
	if code := ann.say(); code != "" {
		t.Fatalf("before: %s", code)
	}
	harm()
	began := time.Now()
	code := ""
	for code == "" && time.Since(began) < tooLong {
		code = ann.say()
	}
	if code != "storage" {
		t.Fatalf("the sender was told %q", code)
	}
	told := time.Since(began)
	bob := &sender{t: t, d: d, name: "bob", size: 4000}
	if bob.connect(); len(bob.seen) != len(ann.seen) {
		t.Errorf("a reader who comes now sees %d of %d messages", len(bob.seen), len(ann.seen))
	}
	r, err := http.NewRequest("GET", d.url("/chat/lobby/"), nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Cookie", cookieOf("bob"))
	if res, err := http.DefaultClient.Do(r); err != nil || res.StatusCode != http.StatusOK {
		t.Errorf("the page: %v, %v", res, err)
	} else {
		res.Body.Close()
	}
	if code := bob.say(); code != "storage" {
		t.Errorf("another sender was told %q", code)
	}
	heal()
	began = time.Now()
	for ann.again() != "" && time.Since(began) < tooLong {
	}
	t.Logf("%d messages, then told after %v: %s; well again after %v", len(ann.seen)-1, told.Round(time.Millisecond), ann.words, time.Since(began).Round(time.Millisecond))
	if code := bob.again(); code != "" {
		t.Errorf("afterwards the other sender is told %q", code)
	}
	if code := ann.say(); code != "" {
		t.Errorf("afterwards: %s", code)
	}
	ann.conn.Close()
	bob.conn.Close()
	d.stop()
	cids := make(map[string]int)
	for _, e := range readLog(t, d.dir) {
		cids[e.CID]++
	}
	if want := ann.sent + bob.sent; len(cids) != want {
		t.Errorf("%d messages on disk, %d were sent", len(cids), want)
	}
	for _, cid := range append(ann.seen, bob.seen...) {
		if cids[cid] != 1 {
			t.Errorf("%s is on disk %d times", cid, cids[cid])
		}
	}
}

// A sender says one thing after the other.
type sender struct {
	*peer
	t      *testing.T
	d      *daemon
	name   string
	size   int // of a message
	sent   int
	seen   []string // cids
	cursor int64
	words  string // what it was told last
}

func (s *sender) connect() {
	s.t.Helper()
	s.peer = dialTCP(s.t, s.d.addr, "/ws", "Cookie: "+cookieOf(s.name))
	s.send(opText, fmt.Appendf(nil, `{"type":"hello","since":%d}`, s.cursor))
	s.await(func(f eventFrame) bool { return f.Type == "caught_up" })
}

// say says something new, again what was said last. They return "" when it is
// acknowledged, else the code of the refusal.
func (s *sender) say() string { s.sent++; return s.again() }

func (s *sender) again() (code string) {
	s.t.Helper()
	cid := fmt.Sprint(s.name, s.sent)
	s.send(opText, encodeJSON(clientFrame{Type: "message", Room: "lobby", CID: cid, Message: strings.Repeat("x", s.size)}))
	return s.await(func(f eventFrame) bool { return f.CID == cid })
}

func (s *sender) await(end func(eventFrame) bool) (code string) {
	s.t.Helper()
	for {
		s.conn.SetReadDeadline(time.Now().Add(tooLong))
		payload, err := s.nextText()
		var f struct {
			eventFrame
			Code, Error string
		}
		if err == nil {
			err = json.Unmarshal(payload, &f)
		}
		if err != nil {
			s.t.Fatalf("%s: %v", s.name, err)
		}
		if f.Type == "message" {
			s.seen, s.cursor = append(s.seen, f.CID), f.ID
		}
		if f.Error != "" {
			s.words = f.Error
		}
		if end(f.eventFrame) {
			return f.Code
		}
	}
}

var commitsCut = flag.Int("cuts", 500, "how many messages TestPowerCut commits")

// TestPowerCut copies the files after a commit, with the write-ahead log cut or
// overwritten at any point, as when power fails in the middle of the next one. The
// copy opens cleanly and has exactly the messages whose commit was on disk whole.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	dir, copies := t.TempDir(), t.TempDir()
	wal := filepath.Join(dir, "chatd.db-wal")
	ends := []walEnd{{}} // of this write-ahead log
	var salt []byte      // that it has as long as it is the same
	tried, cut, logs := 0, 0, 0
	random := rand.New(rand.NewPCG(1, 2))
	store, err := OpenStore(dir, func(events []Event) {
		b, err := os.ReadFile(wal)
		if err != nil {
			t.Error(err)
			return
		}
		end := walEnd{lastCommit(b), events[len(events)-1].ID}
		if newest := ends[len(ends)-1]; !bytes.Equal(salt, b[16:24]) { // it was begun anew
			salt, ends = b[16:24], []walEnd{{0, newest.last}} // what was before is in the database
			logs++
		}
		ends = append(ends, end)
		if random.IntN(4) > 0 || end.offset > 3<<20 { // with 1000 pages of 4 KiB it moves to the database
			return
		}
		db, err := os.ReadFile(filepath.Join(dir, "chatd.db"))
		if err != nil {
			t.Error(err)
		}
		at, want := random.IntN(end.offset+1), int64(0)
		torn := b[:at:at]
		if random.IntN(2) == 0 { // sectors that were never written
			torn = append(torn, make([]byte, len(b)-at)...)
			for ; at < end.offset && b[at] == 0; at++ { // nor would it show
			}
		}
		for _, e := range ends {
			if e.offset <= at {
				want = e.last
			}
		}
		tried++
		if at < end.offset {
			cut++
		}
		if got := lastIn(t, copies, db, torn); got != want {
			t.Errorf("cut at %d of %d: the last message is %d, want %d", at, end.offset, got, want)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	ann, err := store.CreateUser("ann", RoleMember, "")
	if err != nil {
		t.Fatal(err)
	}
	room, err := store.CreateRoom("lobby", ann)
	if err != nil {
		t.Fatal(err)
	}
	for range *commitsCut {
		size := 1 + random.IntN(maxMessage)
		if _, err := store.AppendWait(Event{Kind: KindMessage, Room: room, Author: ann, Body: strings.Repeat("x", size)}); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d copies, %d of them cut short, over %d write-ahead logs", tried, cut, logs)
}

// A walEnd is where a commit ends in the write-ahead log.
type walEnd struct {
	offset int
	last   int64 // id that it brought
}

// lastCommit returns where the last commit in a write-ahead log ends
// (https://sqlite.org/fileformat2.html#walformat).
func lastCommit(wal []byte) (end int) {
	const header, frameHeader = 32, 24
	if len(wal) < header {
		return 0
	}
	frame := frameHeader + int(binary.BigEndian.Uint32(wal[8:]))
	salts := string(wal[16:24])
	for at := header; at+frame <= len(wal) && string(wal[at+8:at+16]) == salts; at += frame {
		if binary.BigEndian.Uint32(wal[at+4:]) != 0 {
			end = at + frame
		}
	}
	return end
}

// lastIn opens a copy, which must be sound, and returns its newest id.
func lastIn(t *testing.T, dir string, db, wal []byte) (last int64) {
	os.Remove(filepath.Join(dir, "chatd.db-shm"))
	err := os.WriteFile(filepath.Join(dir, "chatd.db"), db, 0o600)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "chatd.db-wal"), wal, 0o600)
	}
	if err != nil {
		t.Error(err)
		return 0
	}
	store, err := OpenStore(dir, nil)
	if err != nil {
		t.Error(err)
		return 0
	}
	defer store.Close()
	var check string
	if err := store.read.QueryRow("PRAGMA integrity_check").Scan(&check); err != nil || check != "ok" {
		t.Errorf("integrity: %s, %v", check, err)
	}
	if last, err = store.LastID(t.Context()); err != nil {
		t.Error(err)
	}
	return last
}
