package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

var exportSize = flag.Int("export", 2000, "how many messages TestExportLarge exports and imports")

// exported runs chatd export and returns the file.
func exported(t *testing.T, dir string, args ...string) []byte {
	t.Helper()
	file := filepath.Join(t.TempDir(), "export.jsonl")
	chatdSays(t, false, "messages", append([]string{"export", "-data", dir, file}, args...)...)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// importedFrom runs chatd import and returns the data directory.
func importedFrom(t *testing.T, lines []byte) (dir string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "import.jsonl")
	if err := os.WriteFile(file, lines, 0o600); err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(t.TempDir(), "data")
	chatdSays(t, false, "messages", "import", "-data", dir, file)
	return dir
}

// everything makes a data directory with something in each table that is exported.
func everything(t *testing.T) (dir string) {
	t.Helper()
	s := openTestStore(t, t.TempDir())
	root, err := s.CreateUser("Root", RoleAdmin, hashPassword("correct horse"))
	secret, e2 := s.CreatePrivateRoom("秘密 计划", s.bob, root)
	_, e3 := s.DirectRoom(s.ann, s.bob)
	_, e4 := s.CreateToken(Token{User: "bob", Scope: scopeRead, Label: "x", Creator: "bob"})
	_, e5 := s.StartPush(s.room, s.ann, "{time}", 1e9, 3)
	_, _, e6 := s.CreateHook(Hook{Room: s.room, Bot: User{Name: "bot"}, URL: "http://h.test/"}, root)
	e7 := s.ChangeRoom(Room{ID: s.room.ID, Name: "大厅", Topic: "a <b> & \u2028 \xff \"'\\"}, root)
	if s.room, e3 = s.Room("lobby"); err != nil || e2 != nil || e3 != nil || e4 != nil || e5 != nil || e6 != nil || e7 != nil {
		t.Fatal(err, e2, e3, e4, e5, e6, e7)
	}
	first := s.must(s.message(s.ann, "c1", "你好 <script>alert(1)</script> \x00\x01\u2028 \"\\"))
	s.must(Event{Kind: KindEdit, Author: s.ann, Target: first.ID, Body: "你好 <b>再见</b>"})
	s.must(Event{Kind: KindReact, Author: s.bob, Target: first.ID, Body: "👍"})
	s.must(Event{Kind: KindMessage, Room: s.room, Author: s.bob, Target: first.ID, Body: "a reply"})
	s.must(Event{Kind: KindMessage, Room: secret, Author: s.bob, Body: "what nobody else may see"})
	s.must(Event{Kind: KindRead, Room: s.room, Author: s.ann, Target: first.ID})
	gone := s.must(s.message(s.bob, "", "gone"))
	s.must(Event{Kind: KindDelete, Author: s.bob, Target: gone.ID})
	last := s.must(s.message(s.bob, "", "the newest, and no longer there"))
	if err := s.update(func(w *writer) error {
		for _, q := range []string{
			fmt.Sprintf("DELETE FROM log WHERE id = %d", last.ID), "INSERT INTO levels VALUES (1, 1, 'all'), (2, 1, 'none')",
			"INSERT INTO invites (hash, kind, role, created, expires, uses) VALUES (x'00ff', 'account', 'member', 1, 2, 1)", "INSERT INTO invite_uses VALUES (1, 2, 3), (1, 1, 3)",
		} {
			if err := w.exec(q); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	return s.dir
}

// What is exported and imported is the same chatd.
func TestExport(t *testing.T) {
	dir := everything(t)
	lines := exported(t, dir)
	for _, table := range exportedTables {
		if !bytes.Contains(lines, fmt.Appendf(nil, `{"table":"%s",`, table.name)) {
			t.Errorf("%s is not exported", table.name)
		}
	}
	into := importedFrom(t, lines)
	if again := exported(t, into); !bytes.Equal(again, lines) {
		t.Errorf("it was\n%s\nand became\n%s", lines, again)
	}
	s := openTestStore(t, into)
	if _, encoded, err := s.UserByName(t.Context(), "root"); err != nil || !passwordMatches(encoded, "correct horse") {
		t.Errorf("root cannot sign in any more: %v", err)
	}
	if last, next := int64(bytes.Count(lines, []byte(`{"table":"log"`)))+1, s.must(s.message(s.ann, "", "next")).ID; next != last+1 {
		t.Errorf("after %d comes %d", last, next)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, lines, 0o600); err != nil {
		t.Fatal(err)
	}
	chatdSays(t, true, "is there already", "export", "-data", dir, file)
	chatdSays(t, true, "has to be empty", "import", "-data", dir, file)
	chatdSays(t, true, "no such file", "export", "-data", file+".d", file+".jsonl")
}

// A user's export has what the user may see, and nothing that is secret.
func TestExportUser(t *testing.T) {
	dir := everything(t)
	ann, bob := string(exported(t, dir, "-user", "Ann")), string(exported(t, dir, "-user", "bob"))
	for _, text := range []string{"nobody else", "秘密", "Root"} {
		if strings.Contains(ann, text) || !strings.Contains(bob, text) {
			t.Errorf("%q: in ann's %v, in bob's %v", text, strings.Contains(ann, text), strings.Contains(bob, text))
		}
	}
	for _, secret := range []string{"pbkdf2", `"hash"`, `"secret"`, `"former"`, `"cid"`, `"password"`, `"tokens"`, `"audit"`, `"notify":"none"`} {
		if strings.Contains(ann, secret) || !strings.Contains(string(exported(t, dir)), secret) {
			t.Errorf("%s is in ann's export, or not in the whole one", secret)
		}
	}
	for _, text := range []string{"再见", "a reply", "👍", `"last_read_id":1`, "ann+bob"} {
		if !strings.Contains(ann, text) {
			t.Errorf("%q is not in ann's export:\n%s", text, ann)
		}
	}
	file := filepath.Join(t.TempDir(), "ann.jsonl")
	if err := os.WriteFile(file, []byte(ann), 0o600); err != nil {
		t.Fatal(err)
	}
	chatdSays(t, true, "line 1: it has only what ann may see", "import", "-data", t.TempDir(), file)
	chatdSays(t, true, "user eve: not found", "export", "-user", "eve", "-data", dir, file+"2")
}

// What cannot be imported is refused with the number of its line, and leaves nothing.
func TestImportLinesRefuses(t *testing.T) {
	good := strings.Split(strings.TrimSpace(string(exported(t, everything(t)))), "\n")
	for name, test := range map[string]struct {
		line  int    // that is replaced; 0: none, the text is added at the end
		with  string // %s: what was there; "": nothing, and nothing after it
		wants string
	}{
		"a truncated file": {5, "", "line 5: the file ends too early"},
		"half a line":      {len(good), `{"table":"en`, fmt.Sprintf("line %d: unexpected EOF", len(good))},
		"no JSON":          {3, "nonsense", "line 3: invalid"},
		"no object":        {3, "null", "line 3: no \"table\""},
		"no head":          {1, good[1], "line 1: not what an export begins with"},
		"two heads":        {2, good[0], "line 2: not what"},
		"a newer one":      {1, `{"table":"chatd","version":99}`, "line 1: it has version 99"},
		"another table":    {2, `{"table":"sessions"}`, `line 2: there is no table "sessions"`},
		"another column":   {2, `{"table":"users","shoe":1}`, `line 2: there is no column "shoe"`},
		"SQL":              {2, `{"table":"users","id) VALUES (1); --":1}`, "line 2: there is no column"},
		"nothing":          {2, `{"table":"users"}`, "line 2:"},
		"a fraction":       {2, `{"table":"users","id":1.5}`, "line 2: id:"},
		"null":             {2, `{"table":"users","id":null}`, "line 2: id:"},
		"twice the same":   {3, good[1], "line 3: constraint failed"},
		"nobody's room":    {5, `{"table":"rooms","id":9,"name":"R","key":"R","creator":77,"created":1}`, "line 5:"},
		"a missing row":    {3, "{}", "line 3:"},
		"a long message":   {len(good) - 1, `{"table":"log","id":99,"kind":"message","room":1,"author":1,"time":1,"body":"` + strings.Repeat("a", maxMessage+1) + `"}`, fmt.Sprintf("line %d:", len(good)-1)},
		"a bad count":      {len(good), `{"table":"end","rows":1}`, fmt.Sprintf("line %d: the file has", len(good))},
		"more":             {0, good[1], fmt.Sprintf("line %d: it comes after the end", len(good)+1)},
	} {
		lines := append([]string{}, good...)
		switch {
		case test.line == 0:
			lines = append(lines, test.with)
		case test.with == "":
			lines = lines[:test.line-1]
		default:
			lines[test.line-1] = test.with
		}
		file, dir := filepath.Join(t.TempDir(), "file"), filepath.Join(t.TempDir(), "data")
		if err := os.WriteFile(file, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := importLines(t.Context(), []string{"-data", dir, file}, &bytes.Buffer{}, &bytes.Buffer{}); err == nil || !strings.Contains(err.Error(), test.wants) {
			t.Errorf("%s: %v, want %q", name, err, test.wants)
		}
		if exists(filepath.Join(dir, "chatd.db")) || exists(filepath.Join(dir, "chatd.db.part")) {
			t.Errorf("%s: something was imported", name)
		}
	}
}

// An export while people write is of one moment: it can be imported.
func TestExportIsOfOneMoment(t *testing.T) {
	s := openTestStore(t, t.TempDir())
	fill(t, filepath.Join(s.dir, "chatd.db"), 20_000) // so that it takes a while
	ctx, stop := context.WithCancel(t.Context())
	var writing sync.WaitGroup
	writing.Go(func() {
		for ctx.Err() == nil {
			m := s.must(s.message(s.ann, "", "text"))
			s.must(Event{Kind: KindReact, Author: s.bob, Target: m.ID, Body: "👍"})
		}
	})
	for range 2 {
		lines := exported(t, s.dir)
		if again := exported(t, importedFrom(t, lines)); !bytes.Equal(again, lines) {
			t.Error("it is not the same after an import")
		}
	}
	stop()
	writing.Wait()
}

// TestExportLarge prints how long an export and an import take, and the memory they need.
func TestExportLarge(t *testing.T) {
	dir, to := t.TempDir(), t.TempDir()
	newPeople(t, dir, []string{"lobby"}, "ann")
	fill(t, filepath.Join(dir, "chatd.db"), *exportSize)
	file, again, data := filepath.Join(to, "a.jsonl"), filepath.Join(to, "b.jsonl"), filepath.Join(to, "data")
	for _, args := range [][]string{{"export", "-data", dir, file}, {"import", "-data", data, file}, {"export", "-data", data, again}, {"export", "-data", data, "-html", filepath.Join(to, "html")}} {
		cmd := chatdCommand(args...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", args, err, out)
		}
		usage := cmd.ProcessState.SysUsage().(*syscall.Rusage)
		t.Logf("%s %s: %.1f s of CPU, %d MB resident at most: %s", args[0], args[3], (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds(), usage.Maxrss>>10, out)
	}
	a, err := os.ReadFile(file)
	b, err2 := os.ReadFile(again)
	if err != nil || err2 != nil || !bytes.Equal(a, b) {
		t.Error("not the same", err, err2)
	}
}

// Whatever is in a file, reading it ends with an error or with what is exported as a
// file that is read to the same.
func FuzzImport(f *testing.F) {
	db, err := openFile(filepath.Join(f.TempDir(), "fuzz.db"), "mode=rwc&_pragma=journal_mode(MEMORY)&_pragma=synchronous(OFF)&_pragma=foreign_keys(1)")
	if err != nil {
		f.Fatal(err)
	}
	defer db.Close()
	if err := migrate(db, "", migrations); err != nil {
		f.Fatal(err)
	}
	through := func(t *testing.T, in []byte) (out []byte, err error) {
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		tx, err := conn.BeginTx(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback()
		if err := readLines(t.Context(), tx, bytes.NewReader(in), func(int64) {}); err != nil {
			return nil, err
		}
		var b bytes.Buffer
		x := &exporter{db: conn, progress: newProgress(&b, "")}
		if err := x.lines(t.Context(), &b); err != nil {
			t.Fatalf("%q was read and cannot be written: %v", in, err)
		}
		return b.Bytes(), nil
	}
	f.Add([]byte(`{"table":"chatd","version":4}
{"table":"users","id":1,"name":"ann","key":"ANN","role":"admin","joined":1,"first_id":0}
{"table":"rooms","id":1,"name":"大厅","key":"大厅","creator":1,"created":1}
{"table":"log","id":3,"kind":"message","room":1,"author":1,"time":1,"body":"\u0000<你>"}
{"table":"invites","id":1,"hash":"00FF","kind":"guest","role":"guest","created":1,"expires":2,"uses":0}
{"table":"sqlite_sequence","name":"log","seq":7}
{"table":"end","rows":5}
`))
	f.Fuzz(func(t *testing.T, in []byte) {
		out, err := through(t, in)
		if err != nil {
			return
		}
		if again, err := through(t, out); err != nil || !bytes.Equal(again, out) {
			t.Errorf("%q became %q and then %q, %v", in, out, again, err)
		}
	})
}
