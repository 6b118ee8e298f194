package main

import (
	"database/sql"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
)

// testStore is a store whose commits can be watched and held up.
type testStore struct {
	*Store
	t         testing.TB
	dir       string
	room      Room
	ann, bob  User
	published []Event
	gate      sync.Mutex // publish waits for it
}

func openTestStore(t testing.TB, dir string) *testStore {
	t.Helper()
	s := &testStore{t: t, dir: dir}
	var err error
	s.Store, err = OpenStore(dir, func(events []Event) {
		s.gate.Lock()
		defer s.gate.Unlock()
		s.published = append(s.published, events...)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	s.ann, s.bob = s.user("ann"), s.user("bob")
	if s.room, err = s.CreateRoom("lobby", s.ann); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *testStore) user(name string) User {
	s.t.Helper()
	u, _, err := s.UserByName(s.t.Context(), name)
	if errors.Is(err, ErrNotFound) {
		u, err = s.CreateUser(name, RoleMember, "")
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return u
}

func (s *testStore) message(u User, cid, text string) Event {
	return Event{Kind: KindMessage, Room: s.room, Author: u, CID: cid, Body: text}
}

// must appends an event that the store has to take.
func (s *testStore) must(e Event) Event {
	s.t.Helper()
	e, err := s.AppendWait(e)
	if err != nil {
		s.t.Fatal(err)
	}
	return e
}

// together puts events into one transaction and returns their errors.
func (s *testStore) together(events ...Event) []error {
	s.t.Helper()
	errs := make([]error, len(events))
	var done sync.WaitGroup
	s.gate.Lock() // the next commit's publish stops here, and the rest gathers
	done.Add(1)
	first := s.message(s.ann, "", "first")
	if err := s.Append(first, func(Event, error) { done.Done() }); err != nil {
		s.t.Fatal(err)
	}
	for len(s.queue) > 0 { // until the first is under way
		runtime.Gosched()
	}
	for i, e := range events {
		done.Add(1)
		if err := s.Append(e, func(_ Event, err error) { errs[i] = err; done.Done() }); err != nil {
			s.t.Fatal(err)
		}
	}
	s.gate.Unlock()
	done.Wait()
	return errs
}

func TestPublishedIsOnDiskInOrder(t *testing.T) {
	var s *Store
	var last int64
	s, err := OpenStore(t.TempDir(), func(events []Event) {
		for _, e := range events {
			if e.Kind != KindMessage {
				continue
			}
			if e.ID <= last {
				t.Errorf("published %d after %d", e.ID, last)
			}
			last = e.ID
			if stored, _, err := s.Since(t.Context(), User{}, 0, e.ID-1, 1); err != nil || len(stored) != 1 || stored[0] != e {
				t.Errorf("published %+v, stored %+v, %v", e, stored, err)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ann, err := s.CreateUser("ann", RoleMember, "")
	if err != nil {
		t.Fatal(err)
	}
	room, err := s.CreateRoom("lobby", ann)
	if err != nil {
		t.Fatal(err)
	}
	var senders sync.WaitGroup
	for i := range 8 {
		senders.Go(func() {
			for j := range 50 {
				if _, err := s.AppendWait(Event{Kind: KindMessage, Room: room, Author: ann, CID: fmt.Sprint(i, j), Body: "x"}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	senders.Wait()
	if last != 400 {
		t.Errorf("the last id is %d, want 400", last)
	}
}

func TestFailedRowFailsAlone(t *testing.T) {
	s := openTestStore(t, t.TempDir())
	errs := s.together(
		s.message(s.ann, "1", "good"),
		s.message(s.ann, "2", strings.Repeat("x", maxMessage+1)),
		s.message(s.ann, "", ""),
		Event{Kind: KindEdit, Author: s.ann, Target: 99, Body: "no such message"},
		s.message(s.bob, "3", "good too"),
	)
	for i, wantError := range []bool{false, true, true, true, false} {
		if (errs[i] != nil) != wantError {
			t.Errorf("event %d: error %v, want one: %v", i, errs[i], wantError)
		}
		if errors.Is(errs[i], ErrStorage) {
			t.Errorf("event %d: %v is blamed on the storage", i, errs[i])
		}
	}
	var bodies []string
	for _, e := range s.history() {
		bodies = append(bodies, e.Body)
	}
	if got := strings.Join(bodies, ", "); got != "first, good, good too" {
		t.Errorf("stored: %s", got)
	}
	if err := s.update(func(*writer) error { return refuse(409, "many_tokens") }); errors.Is(err, ErrStorage) {
		t.Errorf("%v is blamed on the storage, and on its neighbours", err)
	}
}

func (s *testStore) history() []Event {
	s.t.Helper()
	page, _, err := s.Page(s.t.Context(), s.room.ID, math.MaxInt64, 1000)
	if err != nil {
		s.t.Fatal(err)
	}
	return page
}

func TestRetryIsTheSameMessage(t *testing.T) {
	s := openTestStore(t, t.TempDir())
	first := s.must(s.message(s.ann, "c1", "once"))
	retry := s.must(s.message(s.ann, "c1", "once"))
	if !retry.Again || retry.ID != first.ID || retry.Body != "once" || retry.Time != first.Time {
		t.Errorf("the retry gave %+v, the first try %+v", retry, first)
	}
	if other := s.must(s.message(s.bob, "c1", "my own")); other.Again || other.ID == first.ID {
		t.Errorf("another author's cid gave %+v", other)
	}
	s.together(s.message(s.ann, "c2", "twice in one commit"), s.message(s.ann, "c2", "twice in one commit"))
	s.Close()

	s = openTestStore(t, s.dir)
	if after := s.must(s.message(s.ann, "c1", "once")); !after.Again || after.ID != first.ID {
		t.Errorf("after a restart the retry gave %+v", after)
	}
	if n := len(s.history()); n != 4 {
		t.Errorf("%d messages, want 4", n)
	}
	if len(s.published) != 0 {
		t.Errorf("retries were published: %v", s.published)
	}
}

func TestEditAndDelete(t *testing.T) {
	s := openTestStore(t, t.TempDir())
	m := s.must(s.message(s.ann, "", "one"))
	s.must(Event{Kind: KindEdit, Author: s.ann, Target: m.ID, Body: "two"})
	for _, e := range []Event{
		{Kind: KindEdit, Author: s.bob, Target: m.ID, Body: "not mine"},
		{Kind: KindDelete, Author: s.bob, Target: m.ID},
	} {
		if _, err := s.AppendWait(e); !errors.Is(err, ErrForbidden) {
			t.Errorf("%s by another: %v, want ErrForbidden", e.Kind, err)
		}
	}
	events, _, err := s.Since(t.Context(), User{}, 0, 0, 10)
	if err != nil || len(events) != 2 || events[0].Body != "two" || !events[0].Edited || events[1].Kind != KindEdit {
		t.Errorf("after the edit: %+v, %v", events, err)
	}
	s.must(Event{Kind: KindReact, Author: s.bob, Target: m.ID, Body: "👍"})
	s.must(Event{Kind: KindDelete, Author: s.ann, Target: m.ID})
	if _, err := s.AppendWait(Event{Kind: KindReact, Author: s.bob, Target: m.ID, Body: "👍"}); !errors.Is(err, ErrNotFound) {
		t.Errorf("reaction to what is gone: %v, want ErrNotFound", err)
	}
	var texts int
	if err := s.read.QueryRow("SELECT count(*) FROM log WHERE body IN ('one', 'two') OR former IS NOT NULL").Scan(&texts); err != nil || texts != 0 {
		t.Errorf("%d rows still have the text, %v", texts, err)
	}
	if h := s.history(); len(h) != 1 || !h[0].Deleted || h[0].Author != s.ann {
		t.Errorf("history: %+v", h)
	}
}

func TestUnread(t *testing.T) {
	s := openTestStore(t, t.TempDir())
	s.must(s.message(s.ann, "", "before cat came"))
	cat := s.user("cat")
	unread := func(u User) int {
		t.Helper()
		states, err := s.RoomStates(t.Context(), u)
		if err != nil || len(states) != 1 {
			t.Fatalf("%v, %v", states, err)
		}
		return states[0].Unread
	}
	m := s.must(s.message(s.ann, "", "after"))
	s.must(s.message(cat, "", "my own does not count"))
	if n := unread(cat); n != 1 {
		t.Errorf("%d unread, want 1", n)
	}
	s.must(Event{Kind: KindRead, Author: cat, Room: s.room, Target: m.ID})
	s.must(Event{Kind: KindRead, Author: cat, Room: s.room, Target: m.ID - 1}) // never goes back
	if n := unread(cat); n != 0 {
		t.Errorf("%d unread after reading, want 0", n)
	}
	for range unreadMost + 5 {
		s.must(s.message(s.ann, "", "more"))
	}
	if n := unread(cat); n != unreadMost {
		t.Errorf("%d unread, want the most that is counted, %d", n, unreadMost)
	}
}

func TestPaging(t *testing.T) {
	s := openTestStore(t, t.TempDir())
	for i := range 25 {
		s.must(s.message(s.ann, "", fmt.Sprint(i)))
	}
	var seen []string
	before, older := int64(math.MaxInt64), true
	for older {
		page, more, err := s.Page(t.Context(), s.room.ID, before, 10)
		if err != nil || len(page) == 0 {
			t.Fatal(page, err)
		}
		var texts []string
		for _, e := range page {
			texts = append(texts, e.Body)
		}
		seen = append(texts, seen...)
		before, older = page[0].ID, more
	}
	for i, text := range seen {
		if text != fmt.Sprint(i) {
			t.Fatalf("paging backwards gave %v", seen)
		}
	}
	if len(seen) != 25 {
		t.Errorf("%d messages, want 25", len(seen))
	}
}

// A page of long messages is shorter, and says that there is more.
func TestLongPages(t *testing.T) {
	s := openTestStore(t, t.TempDir())
	const n = 20
	for range n {
		s.must(s.message(s.ann, "", strings.Repeat("x", maxMessage)))
	}
	for cursor, more := int64(0), true; more; {
		page, m, err := s.Since(t.Context(), User{}, s.room.ID, cursor, 200)
		if err != nil || len(page) == 0 || len(page) > pageBytes/maxMessage+1 || page[0].ID != cursor+1 {
			t.Fatalf("after %d of %d: %d events, %v", cursor, n, len(page), err)
		}
		if cursor, more = page[len(page)-1].ID, m; !more && cursor != n {
			t.Errorf("the last page ended at %d of %d", cursor, n)
		}
	}
	if page, older, err := s.Page(t.Context(), s.room.ID, math.MaxInt64, 50); err != nil || !older || page[len(page)-1].ID != n {
		t.Errorf("the newest page: %d messages, older %v, %v", len(page), older, err)
	}
}

// A page must cost the same however much there is of it and of other rooms.
func TestHistoryUsesIndex(t *testing.T) {
	s := openTestStore(t, t.TempDir())
	rows, err := s.read.Query("EXPLAIN QUERY PLAN "+selectEvents+"WHERE l.room = ? AND l.kind = 'message' AND l.id < ? ORDER BY l.id DESC LIMIT ?", 1, 1, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	var plan strings.Builder
	for rows.Next() {
		var a, b, c int
		var detail string
		if err := rows.Scan(&a, &b, &c, &detail); err != nil {
			t.Fatal(err)
		}
		plan.WriteString(detail + "\n")
	}
	if !strings.Contains(plan.String(), "log_by_room (room=? AND rowid<?)") || strings.Contains(plan.String(), "TEMP B-TREE") {
		t.Errorf("plan:\n%s", &plan)
	}
}

func TestCloseCommitsTheQueue(t *testing.T) {
	s := openTestStore(t, t.TempDir())
	const n = 300
	acknowledged := 0 // counted by the writer, which Close has waited for
	for i := range n {
		if err := s.Append(s.message(s.ann, fmt.Sprint(i), "x"), func(_ Event, err error) {
			if err != nil {
				t.Error(err)
			}
			acknowledged++
		}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if acknowledged != n {
		t.Errorf("%d of %d were answered", acknowledged, n)
	}
	if err := s.Append(s.message(s.ann, "", "late"), func(Event, error) { t.Error("answered") }); !errors.Is(err, ErrClosed) {
		t.Errorf("append after close: %v", err)
	}
	s = openTestStore(t, s.dir)
	if got := len(s.history()); got != n {
		t.Errorf("%d messages after the restart, want %d", got, n)
	}
}

// Whoever appends while the store closes has the event on disk, or is told.
func TestAppendWhileClosing(t *testing.T) {
	s := openTestStore(t, t.TempDir())
	var stored sync.Map
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for j := 0; ; j++ {
				cid := fmt.Sprint(i, "-", j)
				if _, err := s.AppendWait(s.message(s.ann, cid, "x")); err != nil {
					if !errors.Is(err, ErrClosed) {
						t.Error(err)
					}
					return
				}
				stored.Store(cid, true)
			}
		})
	}
	for s.must(s.message(s.bob, "", "x")).ID < 100 {
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	all.Wait()
	n := 0
	for _, e := range readLog(t, s.dir) {
		if _, ok := stored.LoadAndDelete(e.CID); ok {
			n++
		}
	}
	stored.Range(func(cid, _ any) bool { t.Errorf("%v was acknowledged and is not there", cid); return true })
	if n == 0 {
		t.Error("nothing was stored")
	}
}

// While the queue is full, senders wait. Nobody is forgotten, and one sender's
// events keep their order.
func TestQueueFull(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		s, err := OpenStore(dir, func([]Event) { <-gate })
		if err != nil {
			t.Fatal(err)
		}
		ann, err := s.CreateUser("ann", RoleMember, "")
		if err != nil {
			t.Fatal(err)
		}
		const senders, each = 4, queueSize
		var answered, accepted [senders]int
		var all sync.WaitGroup
		go func() { gate <- struct{}{} }()
		room, err := s.CreateRoom("lobby", ann)
		if err != nil {
			t.Fatal(err)
		}
		for i := range senders {
			all.Go(func() {
				for j := range each {
					e := Event{Kind: KindMessage, Room: room, Author: ann, CID: fmt.Sprint(i, "-", j), Body: fmt.Sprint(j)}
					if err := s.Append(e, func(e Event, err error) {
						if err != nil || e.Body != fmt.Sprint(answered[i]) {
							t.Errorf("sender %d: answer %d is for %q, %v", i, answered[i], e.Body, err)
						}
						answered[i]++
					}); err != nil {
						if !errors.Is(err, ErrClosed) {
							t.Error(err)
						}
						return
					}
					accepted[i]++
				}
			})
		}
		synctest.Wait() // the writer waits in its first publish
		total := 0
		for i := range senders {
			total += accepted[i]
		}
		if total > queueSize+maxBatch || total < queueSize {
			t.Errorf("%d events are waiting, the queue has room for %d", total, queueSize)
		}
		go s.Close() // those who wait for the queue are still let in
		synctest.Wait()
		close(gate)
		all.Wait()
		synctest.Wait()
		for i := range senders {
			total -= answered[i]
		}
		if answered != accepted || total >= 0 {
			t.Errorf("accepted %v, answered %v", accepted, answered)
		}
	})
}

// When the disk is full, senders are told, readers go on, and as soon as there
// is room again so does everything.
func TestDiskFull(t *testing.T) {
	s := openTestStore(t, t.TempDir())
	s.must(s.message(s.ann, "", "before"))
	limit := func(pages string) {
		t.Helper()
		if err := s.update(func(w *writer) error { return w.exec("PRAGMA max_page_count = " + pages) }); err != nil {
			t.Fatal(err)
		}
	}
	limit("1") // SQLite takes the present size for less
	var refused error
	for i := 0; refused == nil && i < 100; i++ {
		_, refused = s.AppendWait(s.message(s.ann, fmt.Sprint("full", i), strings.Repeat("x", 8000)))
	}
	if !errors.Is(refused, ErrStorage) {
		t.Fatalf("on a full disk: %v", refused)
	}
	if h := s.history(); len(h) == 0 || h[0].Body != "before" {
		t.Errorf("history on a full disk: %v", h)
	}
	if p := problemOf(refused); p.code != "storage" {
		t.Errorf("the sender is told %q", p.code)
	}
	limit("1000000")
	s.must(s.message(s.ann, "", "after"))
}

func TestMigrate(t *testing.T) {
	dir := t.TempDir()
	openTestStore(t, dir).Close()
	path := filepath.Join(dir, "chatd.db")
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	next := append(slices.Clone(migrations), "ALTER TABLE users ADD COLUMN shoe INTEGER")
	if err := migrate(db, path, append(slices.Clone(next), "nonsense")); err == nil {
		t.Error("a step that fails went unnoticed")
	}
	if err := migrate(db, path, next); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec("UPDATE users SET shoe = 44"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(fmt.Sprintf("%s.v%d", path, len(next))); err != nil {
		t.Errorf("the copy from before: %v", err)
	}
	_, err = OpenStore(dir, nil)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("version %d", len(next)+1)) || !strings.Contains(err.Error(), fmt.Sprintf("up to %d", len(next))) {
		t.Errorf("a newer database: %v", err)
	}
}

// Databases of every old version get the schema of a new one, and keep what is in
// them.
func TestOldDatabases(t *testing.T) {
	describe := func(s *Store) string {
		rows, err := s.read.Query(`
			SELECT m.name, c.name, c.type, c."notnull", coalesce(c.dflt_value, ''), c.pk FROM sqlite_schema m, pragma_table_info(m.name) c
			UNION ALL SELECT type, name, tbl_name, 0, '', 0 FROM sqlite_schema WHERE type != 'table' ORDER BY 1, 2`)
		if err != nil {
			t.Fatal(err)
		}
		defer rows.Close()
		var all strings.Builder
		for rows.Next() {
			var a, b, c, e string
			var d, f int
			if err := rows.Scan(&a, &b, &c, &d, &e, &f); err != nil {
				t.Fatal(err)
			}
			fmt.Fprintln(&all, a, b, c, d, e, f)
		}
		return all.String()
	}
	want := describe(openTestStore(t, t.TempDir()).Store)
	for version := range len(migrations) {
		dir := t.TempDir()
		old, err := os.ReadFile(fmt.Sprintf("testdata/v%d.db", version+1))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "chatd.db"), old, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		s, err := OpenStore(dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := describe(s); got != want {
			t.Errorf("version %d becomes\n%s\na new database is\n%s", version+1, got, want)
		}
		u, encoded, err := s.UserByName(t.Context(), "ann")
		if err != nil || u.Role != RoleAdmin || !passwordMatches(encoded, "correct horse") {
			t.Errorf("version %d: %v, %v", version+1, u, err)
		}
		s.Close()
		var texts []string
		for _, e := range readLog(t, dir) {
			texts = append(texts, e.Body)
		}
		if got := strings.Join(texts, "|"); got != "hello!|你好|hello!|👍||" {
			t.Errorf("version %d has %s", version+1, got)
		}
	}
}

// TestTwoProcesses has two stores write to one database. Each publishes all that is in
// the log, in its order, and knows the other's rooms.
func TestTwoProcesses(t *testing.T) {
	dir := t.TempDir()
	one, two := openTestStore(t, dir), openTestStore(t, dir)
	say := func(s *testStore, room Room, text string) {
		t.Helper()
		if _, err := s.AppendWait(Event{Kind: KindMessage, Room: room, Author: s.ann, Body: text}); err != nil {
			t.Fatal(err)
		}
	}
	const bursts, length = 20, replayPage + 10
	for i := range bursts {
		for j := range length / bursts {
			say(two, two.room, fmt.Sprint("two ", i, j))
		}
		say(one, one.room, fmt.Sprint("one ", i))
	}
	for range length {
		say(two, two.room, "more than a page")
	}
	if _, err := two.CreateRoom("annex", two.ann); err != nil {
		t.Fatal(err)
	}
	say(one, one.room, "the end")
	if _, err := one.Room("annex"); err != nil {
		t.Errorf("the other's room: %v", err)
	}
	var got []int64
	for _, e := range one.published {
		if e.ID != 0 {
			got = append(got, e.ID)
		}
	}
	var want []int64
	for _, e := range readLog(t, dir) {
		want = append(want, e.ID)
	}
	if !slices.Equal(got, want) {
		t.Errorf("published %v\nnot %v", got, want)
	}
}
