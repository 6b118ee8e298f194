package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var keepSize = flag.Int("keep", 2000, "how many messages TestKeepUnderLoad removes")

// age lets the lobby keep messages for a day, and makes what is about those up to an
// id, and they themselves, two days older.
func (s *testStore) age(last int64) {
	s.t.Helper()
	s.room.Keep = 1
	err := s.ChangeRoom(s.room, s.ann)
	if err == nil {
		err = s.update(func(w *writer) error { return w.exec("UPDATE log SET time = time - 2 * 86400000 WHERE id <= ?", last) })
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// inFiles counts how often the files of a database have a text.
func inFiles(t *testing.T, dir, text string) (n int) {
	t.Helper()
	for _, name := range []string{"chatd.db", "chatd.db-wal"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		n += bytes.Count(b, []byte(text))
	}
	return n
}

// What was deleted, or removed, is nowhere in the files, as long as no row has grown:
// of those that do SQLite may leave copies in unused parts of pages.
func TestRemovedIsGone(t *testing.T) {
	s := openTestStore(t, t.TempDir())
	path := filepath.Join(s.dir, "chatd.db")
	const deletedText, removedText = "secret of the deleted", "secret of the removed"
	var deleted []Event
	var last int64
	for i := range 400 {
		text := removedText
		if i%5 == 0 {
			text = deletedText
		}
		old := s.must(s.message(s.bob, "", fmt.Sprintf("%s %0*d", text, 100+i*91%6000, i)))
		if i%3 == 0 {
			s.must(Event{Kind: KindEdit, Author: s.bob, Target: old.ID, Body: text})
		}
		s.must(Event{Kind: KindReact, Author: s.ann, Target: old.ID, Body: "👍"})
		s.must(s.message(s.ann, "", fmt.Sprintf("%0*d", 1+i*37%1500, i)))
		if i%5 == 0 {
			deleted = append(deleted, old)
		}
		if i == 200 {
			last = old.ID
		}
	}
	for _, e := range deleted {
		s.must(Event{Kind: KindDelete, Author: s.bob, Target: e.ID})
	}
	s.age(last)
	if _, err := newKeeper(s.Store, slog.New(slog.NewTextHandler(t.Output(), nil))).round(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := inFile(t, path, fmt.Sprintf("SELECT count(*) FROM log WHERE id <= %d OR target <= %[1]d AND kind != 'message'", last)); n != 0 {
		t.Errorf("%d rows of what was removed are left", n)
	}
	if err := s.wipe(); err != nil {
		t.Fatal(err)
	}
	if n := inFiles(t, s.dir, deletedText); n != 0 {
		t.Errorf("the files have what was deleted %d times", n)
	}
	left := inFile(t, path, fmt.Sprintf("SELECT count(*) FILTER (WHERE body LIKE '%s%%') + count(*) FILTER (WHERE former LIKE '%[1]s%%') FROM log", removedText))
	if n := inFiles(t, s.dir, removedText); n != left || n == 0 {
		t.Errorf("the files have the text %d times, and the tables %d times", n, left)
	}
	if _, err := examine(t.Context(), path); err != nil {
		t.Error(err)
	}
}

// What was deleted is in no page of the index either, once that was written anew.
func TestPurge(t *testing.T) {
	s := openTestStore(t, t.TempDir())
	for i := range 100 {
		s.must(s.message(s.ann, "", fmt.Sprint("message ", i)))
	}
	const word = "xylophone"
	e := s.must(s.message(s.bob, "", word))
	if err := s.update(func(w *writer) (err error) {
		for upTo := int64(0); upTo < e.ID && err == nil; {
			upTo, err = w.index()
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	s.must(Event{Kind: KindDelete, Author: s.bob, Target: e.ID})
	if err := s.wipe(); err != nil {
		t.Fatal(err)
	}
	if n := inFiles(t, s.dir, word); n == 0 {
		t.Error("the index does not have the word at all")
	}
	if err := errors.Join(s.purge(t.Context()), s.wipe()); err != nil {
		t.Fatal(err)
	}
	if n := inFiles(t, s.dir, word); n != 0 {
		t.Errorf("the files have the word %d times", n)
	}
	if n := inFile(t, filepath.Join(s.dir, "chatd.db"), "SELECT stale FROM indexed"); n != 0 {
		t.Errorf("%d are said to be stale", n)
	}
}

// Wherever chatd is killed while it removes messages, what is left is sound and newer
// ones are all there, and the next start goes on.
func TestKeepKill(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "chatd.db")
	newPeople(t, dir, []string{"lobby"}, "ann")
	fill(t, path, 3000)
	inFile(t, path, "UPDATE log SET time = unixepoch() * 1000 WHERE id % 10 = 0")
	inFile(t, path, "INSERT INTO log (kind, room, author, time, target, body) SELECT 'react', room, author, time, id, '👍' FROM log")
	inFile(t, path, "INSERT INTO reactions SELECT target, body, author FROM log WHERE kind = 'react'")
	inFile(t, path, "UPDATE rooms SET keep = 30")
	d := startDaemon(t, dir)
	for rounds := 0; ; rounds++ {
		<-time.After(rand.N(50 * time.Millisecond)) // something of its work
		d.kill()
		old := inFile(t, path, "SELECT count(*) FROM log WHERE kind = 'message' AND id % 10 != 0")
		if _, err := examine(t.Context(), path); err != nil { // looks at references too
			t.Fatal(err)
		}
		if n := inFile(t, path, "SELECT count(*) FROM log WHERE id % 10 = 0 AND kind = 'message'"); n != 300 {
			t.Fatalf("%d of 300 messages that are kept are there", n)
		}
		if old == 0 {
			t.Logf("killed %d times", rounds)
			break
		}
		d.start()
	}
	if n := inFile(t, path, "SELECT count(*) FROM log WHERE kind = 'react'"); n != 300 {
		t.Errorf("%d of 300 reactions are there", n)
	}
}

// A message may be removed while a webhook is told of it. The webhook goes on.
func TestKeepHook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, t.TempDir(), false)
		s.hook()
		lobby, err := s.store.Room("lobby")
		if err != nil {
			t.Fatal(err)
		}
		lobby.Keep = 1
		if err := s.store.ChangeRoom(lobby, s.user("ann")); err != nil {
			t.Fatal(err)
		}
		heard, handler := hear(func(w http.ResponseWriter, _ *http.Request) {
			if err := s.store.update(func(w *writer) error { _, err := w.remove(lobby, []int64{1}); return err }); err != nil {
				t.Error(err)
			}
			w.Header().Set("Content-Type", "text/plain")
			fmt.Fprint(w, "an answer")
		})
		s.endpoint(handler)
		s.tell("ann", "lobby", "first")
		synctest.Wait()
		if all, err := s.store.Hooks(t.Context(), 0); err != nil || all[0].Cursor != 1 {
			t.Errorf("the hook is at %d, %v", all[0].Cursor, err)
		}
		s.tell("ann", "lobby", "second")
		synctest.Wait()
		if got := heard(); !slices.Equal(got, []string{"/ first", "/ second"}) {
			t.Errorf("the hook heard %q", got)
		}
		if got := s.transcript("lobby"); !slices.Equal(got, []string{"ann: second", "bot: an answer #2"}) {
			t.Errorf("in the room is %q", got)
		}
		entries, err := s.store.Audit(t.Context(), 1<<40, 10)
		if err != nil || !slices.ContainsFunc(entries, func(a auditEntry) bool { return a.Admin == "ann" && strings.Contains(a.Detail, "days: 1") }) {
			t.Errorf("written down is %v, %v", entries, err)
		}
	})
}

// TestKeepUnderLoad prints how long somebody who speaks waits while old messages are
// removed, and otherwise.
func TestKeepUnderLoad(t *testing.T) {
	s := openTestStore(t, t.TempDir())
	fill(t, filepath.Join(s.dir, "chatd.db"), *keepSize)
	s.age(0)
	measure := func(during func()) {
		var waits []time.Duration
		done := make(chan struct{})
		go func() { during(); close(done) }()
		for more := true; more; {
			began := time.Now()
			s.must(s.message(s.ann, "", "meanwhile"))
			waits = append(waits, time.Since(began))
			select {
			case <-done:
				more = false
			default:
			}
		}
		slices.Sort(waits)
		t.Logf("%d messages one after the other: p50 %v, p99 %v, the longest %v", len(waits), waits[len(waits)/2], waits[len(waits)*99/100], waits[len(waits)-1])
	}
	k := newKeeper(s.Store, slog.New(slog.NewTextHandler(t.Output(), nil)))
	measure(func() {
		for range 200 {
			s.must(s.message(s.bob, "", "too"))
		}
	})
	began := time.Now()
	measure(func() {
		if n, err := k.round(t.Context()); err != nil || n != *keepSize {
			t.Errorf("%d removed, %v", n, err)
		}
	})
	t.Logf("%d removed in %v", *keepSize, time.Since(began))
	measure(func() {
		if err := s.wipe(); err != nil {
			t.Error(err)
		}
	})
	began = time.Now()
	if n, err := k.round(t.Context()); err != nil || n != 0 {
		t.Error(n, err)
	}
	t.Logf("a round that finds nothing: %v", time.Since(began))
}

// Rows that are too old leave the pages that show them.
func TestBrowserKeep(t *testing.T) {
	needBrowser(t)
	t.Parallel()
	d := startDaemon(t, t.TempDir())
	c := d.setUp("alice")
	d.get(c, "/chat/lobby/")
	fill(t, filepath.Join(d.dir, "chatd.db"), 3)
	alice := startBrowser(t, "alice", "en")
	alice.signIn(d, "lobby")
	alice.say("new")
	alice.wait(`document.querySelectorAll("#messages li[data-id]").length === 4`)
	d.post(c, "/chat/lobby/about/", url.Values{"action": {"keep"}, "keep": {"30"}})
	alice.expect("alice: new")
	if days := alice.script(`return document.querySelectorAll(".day").length`); days != 1.0 {
		t.Errorf("%v days are shown", days)
	}
}
