package main

import (
	"bytes"
	"database/sql"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

var djangoMessages = flag.Int("django", 3000, "how many messages TestImportLarge imports")

const tutorial = "testdata/django/tutorial.sqlite3" // made by make.py, next to it

// imported imports the tutorial's database, and returns what that says but for how
// long it took.
func imported(t *testing.T, dir string, args ...string) string {
	t.Helper()
	var said bytes.Buffer
	if err := run(t.Context(), append([]string{"import-django", "-data", dir, tutorial}, args...), nil, &said, io.Discard); err != nil {
		t.Fatal(err)
	}
	return regexp.MustCompile(`[0-9.]+ seconds\n`).ReplaceAllString(said.String(), "")
}

// TestImport keeps what came of it in testdata/django/import.txt.
func TestImport(t *testing.T) {
	dir := t.TempDir()
	newPeople(t, dir, nil, "bob")
	execSQL(t, dir, `
		INSERT INTO users (name, key, role, joined, first_id) VALUES ('visitor 7', 'VISITOR 7', 'guest', 0, 0);
		INSERT INTO rooms (name, key, creator, created, private) VALUES ('茶水间', '茶水间', 1, 0, 1)`)
	first := imported(t, dir, "-admins")
	log := readLog(t, dir)
	second := imported(t, dir)
	if again := readLog(t, dir); len(again) != len(log) {
		t.Errorf("%d messages, and %d after importing twice", len(log), len(again))
	}
	var result strings.Builder
	result.WriteString(first + "\nonce more:\n" + second + "\nmessages:\n")
	for _, e := range log {
		result.WriteString(fmt.Sprintf("%s %s %s %s %.40q %d\n", timestamp(e.Time), e.CID, e.Room.Name, e.Author.Name, e.Body, len(e.Body)))
	}
	store, err := OpenStore(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	rows, err := store.read.Query(`
		SELECT format('%s %s joined there: %d password: %d deactivated: %d unread: %d', name, role, joined = 1709222399123, password IS NOT NULL, deactivated IS NOT NULL,
			(SELECT max(id) FROM log) - first_id) FROM users ORDER BY id`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for result.WriteString("\nusers:\n"); rows.Next(); result.WriteString("\n") {
		var line string
		if err := rows.Scan(&line); err != nil {
			t.Fatal(err)
		}
		result.WriteString(line)
	}
	const file = "testdata/django/import.txt"
	if *update {
		if err := os.WriteFile(file, []byte(result.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if want, err := os.ReadFile(file); err != nil || result.String() != string(want) {
		t.Errorf("%v; not as in %s:\n%s", err, file, result.String())
	}
}

// Who had a password there comes in with it, and nobody else does.
func TestImportedPasswords(t *testing.T) {
	dir := t.TempDir()
	cmd := chatdCommand("user", "add", "Carol", "-data", dir)
	cmd.Stdin = strings.NewReader(testPassword)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	imported(t, dir)
	d := startDaemon(t, dir)
	for _, test := range []struct {
		name, password string
		want           int
	}{
		{"小红", "open sesame", http.StatusOK},
		{"小红", "open sesam", http.StatusForbidden},
		{"Carol", testPassword, http.StatusOK},
		{"Carol", "Carol's own", http.StatusForbidden},
		{"carol_2", "carol's own", http.StatusOK},
		{"游客_2", "a guest's own", http.StatusOK},
		{"bob", "bob's own", http.StatusForbidden},
		{"old", "old's own", http.StatusForbidden},
		{"old", "", http.StatusForbidden},
		{"visitor 7", "", http.StatusForbidden},
	} {
		c := newBrowserlessClient()
		r, err := c.PostForm(d.url("/login/"), url.Values{"username": {test.name}, "password": {test.password}, "next": {"/chat/大厅/"}})
		if err != nil {
			t.Fatal(err)
		}
		page, err := io.ReadAll(r.Body)
		r.Body.Close()
		in := strings.Contains(string(page), "你好，世界")
		if err != nil || r.StatusCode != test.want || in != (test.want == http.StatusOK) {
			t.Errorf("%s with %q: %s, %v, sees the room: %v", test.name, test.password, r.Status, err, in)
		}
	}
}

// TestImportLarge imports while people chat, Django writes, and the import is killed.
func TestImportLarge(t *testing.T) {
	dir, path := t.TempDir(), filepath.Join(t.TempDir(), "?large%.sqlite3")
	kept, err := os.ReadFile(tutorial)
	if err == nil {
		err = os.WriteFile(path, kept, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	there, err := sql.Open("sqlite", "file:"+url.PathEscape(path)+"?_pragma=busy_timeout(1000)")
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	if _, err := there.Exec(`
		WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
		INSERT INTO chat_chatmessage (id, username, room, content, create_time)
		SELECT 1000 + i, username, room, 'copy ' || i, create_time FROM n JOIN chat_chatmessage ON id = 1 + i % 4;
		INSERT INTO chat_chatmessage (username, room, content, create_time) VALUES ('🙁', '', 'frown', '2024-03-01 00:00:00');
		CREATE TABLE private_message (id INTEGER PRIMARY KEY, user_id REFERENCES auth_user, to_id REFERENCES auth_user, content TEXT, timestamp TEXT);
		INSERT INTO private_message VALUES (1, 1, 2, 'private', '2024-03-01 00:00:00')`, *djangoMessages); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, dir, "-rate", "0")
	ann := d.setUp("ann")
	var slowest time.Duration
	chats, stop := 0, make(chan struct{})
	var chatting sync.WaitGroup
	chatting.Go(func() {
		for ; ; chats++ {
			select {
			case <-stop:
				return
			default:
			}
			began := time.Now()
			d.post(ann, "/chat/live/", url.Values{"message": {"live"}})
			slowest = max(slowest, time.Since(began))
			if _, err := there.Exec("UPDATE auth_user SET last_login = ? WHERE id = 1", chats); err != nil {
				t.Error("Django could not write:", err)
			}
		}
	})
	// At least one batch, then kill -9.
	half := chatdCommand("import-django", "-data", dir, path)
	if err := half.Start(); err != nil {
		t.Fatal(err)
	}
	for began := time.Now(); len(copiesIn(t, dir)) == 0 && time.Since(began) < tooLong; {
	}
	half.Process.Kill()
	half.Wait()
	before := len(copiesIn(t, dir))
	began := time.Now()
	out, err := chatdCommand("import-django", "-data", dir, path).CombinedOutput()
	took := time.Since(began)
	close(stop)
	chatting.Wait()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("%s%d messages were here before, %v for the rest; meanwhile %d said by others, each in %v at most", out, before, took, chats, slowest)

	copies, authors := copiesIn(t, dir), make(map[string]string)
	for _, e := range readLog(t, dir) {
		authors[e.Body] = e.Author.Name
	}
	if authors["private"] != "" {
		t.Error("what two users said to each other can be read by all")
	}
	if authors["smile"] == authors["frown"] {
		t.Errorf("after the kill %s got what another said", authors["frown"])
	}
	for i, text := range copies {
		if want := fmt.Sprint("copy ", i+1); text != want {
			t.Fatalf("%q is where %q should be", text, want)
		}
	}
	if len(copies) != *djangoMessages || before == 0 || before == len(copies) {
		t.Errorf("%d of %d messages came, %d before the kill", len(copies), *djangoMessages, before)
	}
	d.stop()
}

func copiesIn(t *testing.T, dir string) (texts []string) {
	for _, e := range readLog(t, dir) {
		if strings.HasPrefix(e.Body, "copy ") {
			texts = append(texts, e.Body)
		}
	}
	return texts
}

func TestImportRefuses(t *testing.T) {
	dir := t.TempDir()
	other := filepath.Join(dir, "other.sqlite3")
	newPeople(t, dir, nil)
	if err := os.WriteFile(other, bytes.Repeat([]byte("no database "), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range [][]string{
		{"say chatd import-django"},
		{"unable to open", filepath.Join(dir, "missing")},
		{"not a database", other},
		{"no such table: auth_user", filepath.Join(dir, "chatd.db")},
		{"-tz", tutorial, "-tz", "Atlantis"},
	} {
		refusesToStart(t, chatdCommand(append([]string{"import-django", "-data", filepath.Join(dir, "new")}, test[1:]...)...), test[0])
	}
}
