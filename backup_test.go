package main

import (
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

var (
	backupSize = flag.Int("backup", 2000, "how many messages TestBackupUnderLoad backs up")
	killRounds = flag.Int("kills", 3, "how often TestBackupKill kills each command")
)

// inFile runs a query in a database and returns its number.
func inFile(t *testing.T, path, query string) (n int) {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	if err == nil {
		if err = db.QueryRow(query).Scan(&n); errors.Is(err, sql.ErrNoRows) {
			err = nil
		}
		err = errors.Join(err, db.Close())
	}
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return n
}

// fill adds n messages to the newest room of a database.
func fill(t *testing.T, path string, n int) {
	t.Helper()
	inFile(t, path, fmt.Sprintf(`
		WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < %d)
		INSERT INTO log (kind, room, author, cid, time, body)
		SELECT 'message', r.id, r.creator, 'f' || i, 1700000000000 + i, i || hex(randomblob(50)) FROM n, (SELECT * FROM rooms ORDER BY id DESC LIMIT 1) r`, n))
}

// sameLog fails unless two databases have the same log up to the newest id of the copy.
func sameLog(t *testing.T, path, copied string) {
	t.Helper()
	const columns = "id, kind, room, author, cid, time, target, body, edited, former"
	if n := inFile(t, path, fmt.Sprintf(`ATTACH '%s' AS c; CREATE TEMP VIEW l AS SELECT %[2]s FROM main.log WHERE id <= (SELECT max(id) FROM c.log);
		SELECT (SELECT count(*) FROM (SELECT * FROM l EXCEPT SELECT %[2]s FROM c.log)) + (SELECT count(*) FROM (SELECT %[2]s FROM c.log EXCEPT SELECT * FROM l))`, copied, columns)); n != 0 {
		t.Errorf("%d rows of the log are not the same in %s", n, copied)
	}
}

// chatdSays runs chatd, which has to fail with what is wanted or to end well.
func chatdSays(t *testing.T, fails bool, want string, args ...string) string {
	t.Helper()
	out, err := chatdCommand(args...).CombinedOutput()
	if said := string(out); (err != nil) != fails || !strings.Contains(said, want) || strings.Contains(said, "goroutine") {
		t.Errorf("chatd %s: %v, want failure %v and %q in\n%s", args, err, fails, want, said)
	}
	return string(out)
}

func copyFile(to, from string) error {
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(to), 0o700)
	}
	return errors.Join(err, os.WriteFile(to, b, 0o600))
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// A backup of a chatd that runs, restored elsewhere, is the same chatd.
func TestBackup(t *testing.T) {
	dir, to := t.TempDir(), t.TempDir()
	newPeople(t, dir, []string{"lobby"}, "ann")
	d := startDaemon(t, dir)
	ann := &sender{t: t, d: d, name: "ann", size: 10}
	ann.connect()
	ann.say()
	file, data := filepath.Join(to, "100% b?.db"), filepath.Join(to, "new")
	began := time.Now().Truncate(time.Second)
	said := chatdSays(t, false, "1 messages, 1 users, 1 rooms", "backup", "-data", dir, file)
	if last, err := lastBackup(dir); err != nil || last.Before(began) {
		t.Errorf("the last backup was at %v, %v", last, err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 || exists(file+".part") {
		t.Error(info, err)
	}
	chatdSays(t, true, "is there already", "backup", "-data", dir, file)
	chatdSays(t, true, "is there already", "backup", "-data", dir, "-f", filepath.Join(dir, "chatd.db"))
	chatdSays(t, true, "no such", "backup", "-data", data, "-f", file)
	lock, err := os.Open(dir)
	if err == nil {
		err = syscall.Flock(int(lock.Fd()), syscall.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	chatdSays(t, true, "another backup", "backup", "-data", dir, "-f", file)
	lock.Close()
	chatdSays(t, true, "another chatd", "restore", "-data", dir, file)

	_, here, _ := strings.Cut(said, ": ")
	here, _, _ = strings.Cut(here, "\nIt took")
	chatdSays(t, false, here, "restore", "-data", data, file)
	chatdSays(t, true, "has to be empty", "restore", "-data", data, file)
	ann.say()
	chatdSays(t, false, "2 messages", "backup", "-data", dir, "-f", file)
	d.stop()
	sameLog(t, filepath.Join(dir, "chatd.db"), filepath.Join(data, "chatd.db"))
	ann.d, ann.cursor = startDaemon(t, data), 0
	ann.connect() // by the session of before
	if len(ann.seen) != 3 {
		t.Errorf("ann has seen %v", ann.seen)
	}
}

// What is no sound backup is not restored.
func TestRestoreRefuses(t *testing.T) {
	for name, test := range map[string]struct{ harm, want string }{
		"newer":   {"PRAGMA user_version = 99", "version 99, this chatd knows versions 1 to"},
		"orphan":  {"INSERT INTO reads VALUES (77, 77, 0)", "2 references lead nowhere"},
		"corrupt": {"PRAGMA writable_schema = 1; UPDATE sqlite_schema SET rootpage = 3 WHERE name = 'log_by_room'", "damaged"},
		"open":    {"", "is not all"},
		"text":    {"", "no database"},
	} {
		dir := t.TempDir()
		file, data := filepath.Join(dir, "file"), filepath.Join(dir, "data")
		from := "testdata/v2.db"
		if name == "text" {
			from = "schema.sql"
		}
		err := copyFile(file, from)
		if name == "open" {
			err = errors.Join(err, copyFile(file+"-wal", from))
		} else if test.harm != "" {
			inFile(t, file, test.harm)
		}
		if said := chatdSays(t, true, test.want, "restore", "-data", data, file); err != nil || exists(filepath.Join(data, "chatd.db")) || exists(filepath.Join(data, "chatd.db.part")) {
			t.Errorf("%s: %v, %s", name, err, said)
		}
	}
}

const countMessages = "SELECT count(*) FROM log WHERE kind = 'message'"

// migrated makes a data directory that has gone from version 2 to the newest, where
// something was said since. It returns the path of its database.
func migrated(t *testing.T, n int) (path string) {
	path = filepath.Join(t.TempDir(), "chatd.db")
	if err := copyFile(path, "testdata/v2.db"); err != nil {
		t.Fatal(err)
	}
	fill(t, path, n)
	chatdSays(t, false, "", "token", "list", "-data", filepath.Dir(path))
	inFile(t, path, "INSERT INTO log (kind, room, author, cid, time, body) SELECT 'message', room, author, 'new', time, 'new' FROM log LIMIT 1")
	return path
}

func TestRollback(t *testing.T) {
	path := migrated(t, 10)
	dir, before, now := filepath.Dir(path), inFile(t, path+".v2", countMessages), len(migrations)+1
	d := startDaemon(t, dir)
	chatdSays(t, true, "another chatd", "rollback", "-yes", "-data", dir)
	d.stop()
	chatdSays(t, true, "1 messages are lost", "rollback", "-data", dir)
	if v, n := inFile(t, path, "PRAGMA user_version"), inFile(t, path, countMessages); v != now || n != before+1 {
		t.Errorf("version %d, %d messages without a yes", v, n)
	}
	chatdSays(t, false, "Done", "rollback", "-yes", "-data", dir)
	if v := inFile(t, path, "PRAGMA user_version"); v != 2 {
		t.Errorf("version %d", v)
	}
	sameLog(t, path+".v2", path)
	if n := inFile(t, fmt.Sprintf("%s.v%d.undone", path, now), countMessages); n != before+1 {
		t.Errorf("%d messages are undone", n)
	}
	chatdSays(t, true, "no migration has kept a copy", "rollback", "-yes", "-data", dir)
	chatdSays(t, false, "", "token", "list", "-data", dir) // and up again
	sameLog(t, path+".v2", path)
}

// interrupt runs chatd, sends it a signal after a while, and reports whether it ended well.
func interrupt(t *testing.T, after time.Duration, signal os.Signal, args ...string) bool {
	t.Helper()
	cmd := chatdCommand(args...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(after, func() { cmd.Process.Signal(signal) })
	defer timer.Stop()
	return cmd.Wait() == nil
}

// Wherever backup, restore, a migration and a rollback are killed, there is what was
// before or what was to be, and they can be run again.
func TestBackupKill(t *testing.T) {
	const n = 8000
	template := migrated(t, n)
	old := template + ".v2"
	total := inFile(t, old, countMessages)
	file := filepath.Join(t.TempDir(), "file")
	chatdSays(t, false, "", "backup", "-data", filepath.Dir(template), file)
	for name, test := range map[string]struct {
		prepare func(dir string) error
		args    []string
		check   func(dir, path string, interrupted bool)
	}{
		"backup": {func(dir string) error { return os.CopyFS(dir, os.DirFS(filepath.Dir(template))) }, []string{"backup", "-f", file}, func(dir, path string, interrupted bool) {
			if _, err := examine(t.Context(), file); err != nil || interrupted && exists(file+".part") {
				t.Errorf("backup: %v", err)
			}
			sameLog(t, path, file)
			chatdSays(t, false, "", "backup", "-f", file, "-data", dir)
		}},
		"restore": {func(string) error { return nil }, []string{"restore", old}, func(dir, path string, interrupted bool) {
			if interrupted && exists(path+".part") {
				t.Error("restore leaves a part")
			}
			if !exists(path) {
				chatdSays(t, false, "", "restore", old, "-data", dir)
			}
			sameLog(t, old, path)
			chatdSays(t, false, "", "token", "list", "-data", dir)
			sameLog(t, old, path)
		}},
		"migration": {func(dir string) error { return copyFile(filepath.Join(dir, "chatd.db"), old) }, []string{"token", "list"}, func(dir, path string, _ bool) {
			sameLog(t, old, path)
			chatdSays(t, false, "", "token", "list", "-data", dir)
			sameLog(t, path, path+".v2")
			sameLog(t, old, path+".v2")
		}},
		"rollback": {func(dir string) error { return os.CopyFS(dir, os.DirFS(filepath.Dir(template))) }, []string{"rollback", "-yes"}, func(dir, path string, _ bool) {
			version, has := inFile(t, path, "PRAGMA user_version"), inFile(t, path, countMessages)
			if version == 2 && has != total || version > 2 && has != total+1 {
				t.Errorf("rollback: version %d has %d messages, the old one %d", version, has, total)
			}
			chatdSays(t, version == 2, "version 2", "rollback", "-yes", "-data", dir)
			sameLog(t, path+".v2", path)
			sameLog(t, template, fmt.Sprintf("%s.v%d.undone", path, len(migrations)+1))
		}},
	} {
		ended := 0
		whole := time.Duration(0) // that it takes when nobody interrupts it
		for round := range *killRounds + 1 {
			dir := filepath.Join(t.TempDir(), "data")
			if err := test.prepare(dir); err != nil {
				t.Fatal(err)
			}
			after, signal := time.Minute, os.Kill
			if round > 0 {
				after = rand.N(whole)
			}
			if round%2 == 0 {
				signal = os.Interrupt
			}
			began := time.Now()
			if interrupt(t, after, signal, append(test.args, "-data", dir)...) {
				ended++
			}
			if round == 0 {
				whole = time.Since(began)
			}
			test.check(dir, filepath.Join(dir, "chatd.db"), signal == os.Interrupt)
		}
		t.Logf("%s: %v, %d of %d were interrupted", name, whole, *killRounds+1-ended, *killRounds)
	}
}

// TestBackupUnderLoad measures what a backup does to those who write 1,000 messages
// a second meanwhile, kills some, and restores the last.
func TestBackupUnderLoad(t *testing.T) {
	calm := min(5*time.Second, time.Duration(*backupSize)*100*time.Microsecond)
	dir := t.TempDir()
	path, file, data := filepath.Join(dir, "chatd.db"), filepath.Join(t.TempDir(), "file"), filepath.Join(t.TempDir(), "data")
	newPeople(t, dir, []string{"lobby"}, "ann")
	fill(t, path, *backupSize)
	d := startDaemon(t, dir, "-rate", "0")
	p := dialTCP(t, d.addr, "/ws/chat/lobby/", "Cookie: "+cookieOf("ann"))
	var longest, heard atomic.Int64
	stop := make(chan struct{})
	var all sync.WaitGroup
	all.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case now := <-tick.C:
				for range 10 {
					p.send(opText, fmt.Appendf(nil, `{"message":"%d %0100d"}`, now.UnixNano(), 0))
				}
			case <-stop:
				p.send(opText, []byte(`{"message":"0"}`))
				return
			}
		}
	})
	all.Go(func() {
		for {
			p.conn.SetDeadline(time.Now().Add(tooLong))
			f, err := p.nextChat()
			var sent int64
			if fmt.Sscan(f.Message, &sent); err != nil || sent == 0 {
				return
			}
			heard.Add(1)
			longest.Store(max(longest.Load(), time.Now().UnixNano()-sent))
		}
	})
	measure := func(during func()) string {
		longest.Store(0)
		n, began := heard.Load(), time.Now()
		during()
		return fmt.Sprintf("%d messages in %.1f s, the longest took %.1f ms", heard.Load()-n, time.Since(began).Seconds(), float64(longest.Load())/1e6)
	}
	time.Sleep(calm)
	t.Log("before: ", measure(func() { time.Sleep(calm) }))
	var said string
	began := time.Now()
	t.Log("backup: ", measure(func() { said = chatdSays(t, false, "SHA-256", "backup", "-data", dir, file) }))
	took := time.Since(began)
	t.Log("after: ", measure(func() { time.Sleep(calm) }))
	for range *killRounds {
		interrupt(t, rand.N(took), os.Kill, "backup", "-data", dir, "-f", file)
		if _, err := examine(t.Context(), file); err != nil {
			t.Error(err)
		}
	}
	said = chatdSays(t, false, "SHA-256", "backup", "-data", dir, "-f", file)
	close(stop)
	all.Wait()
	d.stop()
	began = time.Now()
	chatdSays(t, false, "SHA-256", "restore", "-data", data, file)
	t.Logf("%srestored in %.1f s", said, time.Since(began).Seconds())
	sameLog(t, path, filepath.Join(data, "chatd.db"))
}
