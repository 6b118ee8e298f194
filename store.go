package main

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"modernc.org/sqlite"
)

var (
	ErrClosed    = errors.New("store is closed")
	ErrNotFound  = errors.New("not found")
	ErrForbidden = errors.New("not allowed")
	ErrTaken     = errors.New("name is taken")
	ErrArchived  = errors.New("room is archived")
	ErrStorage   = errors.New("not stored") // disk full, I/O error: try again later
)

const (
	maxBatch  = 512  // events in one transaction
	queueSize = 1024 // events that wait for one; with 8 KiB messages 8 MiB
	lockWait  = 5000 // ms that we wait for another process, such as `chatd user add`
)

// Store keeps everything in one SQLite file.
//
// One goroutine writes: it takes whatever is queued into one transaction,
// commits (which ends in an fsync), publishes the events in the order of their
// ids, and only then answers the callers. So what anybody has seen is on disk,
// and all see the same order.
type Store struct {
	dir         string
	write, read *sql.DB
	publish     func([]Event)

	queue   chan *job      // closed by Close, after the last sender
	done    chan struct{}  // closed when commitLoop has returned
	mu      sync.Mutex     // guards closed
	closed  bool           // no sender begins any more
	senders sync.WaitGroup // those who put something into queue

	roomsMu sync.RWMutex
	rooms   map[string]Room // by key; rooms are never deleted

	stored, commits       counters // of events, by kind, and transactions, by result
	batchSize, commitTime histogram
}

// A job is one caller's part of a transaction.
type job struct {
	event Event
	apply func(*writer, *Event) error
	news  []Event // that came about with it, and that are not kept
	err   error
	done  func(Event, error)
}

// OpenStore opens, or creates, the database in the directory dir and starts its
// writer. It calls publish after each commit with the events that it brought,
// always from the same goroutine and in the order of their ids; nil: nobody listens.
//
// publish is the channel layer: in one process it is Hub.Publish. A second node
// would pass a func that sends to a bus, and feed its own hub from there; what a
// bus loses is still on disk, and found there by Since.
func OpenStore(dir string, publish func([]Event)) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if publish == nil {
		publish = func([]Event) {}
	}
	path := filepath.Join(dir, "chatd.db")
	dsn := fmt.Sprintf("file:%s?_pragma=busy_timeout(%d)&_pragma=journal_mode(WAL)&_pragma=foreign_keys(1)", path, lockWait)
	// With recursive triggers REPLACE does not get past those that protect audit.
	write, err := sql.Open("sqlite", dsn+"&_pragma=synchronous(FULL)&_pragma=secure_delete(1)&_pragma=recursive_triggers(1)&_txlock=immediate")
	if err != nil {
		return nil, err
	}
	write.SetMaxOpenConns(1)
	if err := migrate(write, path, migrations); err != nil {
		write.Close()
		return nil, explain(path, err)
	}
	read, err := sql.Open("sqlite", dsn+"&_pragma=query_only(1)")
	if err != nil {
		write.Close()
		return nil, err
	}
	read.SetMaxOpenConns(runtime.GOMAXPROCS(0))
	read.SetMaxIdleConns(runtime.GOMAXPROCS(0))
	s := &Store{
		dir:     dir,
		write:   write,
		read:    read,
		publish: publish,
		queue:   make(chan *job, queueSize),
		done:    make(chan struct{}),
		rooms:   make(map[string]Room),

		batchSize:  histogram{bounds: batchBounds},
		commitTime: histogram{bounds: secondsBounds},
	}
	w, err := newWriter(write)
	if err == nil {
		err = s.loadRooms()
	}
	if err != nil {
		return nil, errors.Join(explain(path, err), read.Close(), write.Close())
	}
	go s.commitLoop(w)
	return s, nil
}

// Close commits and publishes what is queued, then closes the database.
func (s *Store) Close() error {
	s.mu.Lock()
	closing := !s.closed
	s.closed = true
	s.mu.Unlock()
	if closing {
		s.senders.Wait() // the writer is still at work, so there will be room for them
		close(s.queue)
	}
	<-s.done
	return errors.Join(s.read.Close(), s.write.Close())
}

// Append queues e, of a kind that the log keeps, for the next commit.
//
//  1. It waits only while the queue is full. The error is ErrClosed, and then
//     done is not called, or nil, and then done is called exactly once.
//  2. done gets the event as it is in the log, after commit and publish, or the
//     reason why it is not there. It runs on the writer's goroutine and must not block.
//  3. Events of one caller keep their order.
//  4. An event whose CID its author has used before is not stored again: done
//     gets the first one, with Again set, and nothing is published.
//  5. An event that fails, or whose commit fails, is neither stored nor published,
//     and changes nothing. Those of the same batch that break no rule do not fail
//     with it, unless the disk does.
func (s *Store) Append(e Event, done func(Event, error)) error {
	apply, ok := appliers[e.Kind]
	if !ok {
		return fmt.Errorf("append: %q is not an event that is kept", e.Kind)
	}
	e.Author = e.Author.author()
	return s.enqueue(&job{event: e, apply: apply, done: done})
}

// AppendWait is Append for callers that have nothing else to do meanwhile.
func (s *Store) AppendWait(e Event) (stored Event, err error) {
	answered := make(chan struct{}) // always is: Append's promise 1
	refused := s.Append(e, func(e Event, failed error) {
		stored, err = e, failed
		close(answered)
	})
	if refused != nil {
		return Event{}, refused
	}
	<-answered
	return stored, err
}

// update runs f in the writer's next transaction and waits for the commit.
// When f fails, what it did is undone.
func (s *Store) update(f func(*writer) error) error {
	answer := make(chan error, 1)
	err := s.enqueue(&job{
		apply: func(w *writer, _ *Event) error { return f(w) },
		done:  func(_ Event, err error) { answer <- err },
	})
	if err != nil {
		return err
	}
	return <-answer
}

func (s *Store) enqueue(j *job) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	s.senders.Add(1)
	s.mu.Unlock()
	defer s.senders.Done()
	s.queue <- j
	return nil
}

// commitLoop turns whatever is queued into one transaction, again and again.
// There is no timer: a batch is what came while the last one was written.
func (s *Store) commitLoop(w *writer) {
	defer close(s.done)
	defer w.close()
	var batch []*job
	var events []Event
	for first := range s.queue {
		batch = append(batch[:0], first)
		for len(batch) < maxBatch && len(s.queue) > 0 {
			batch = append(batch, <-s.queue)
		}
		began, result := time.Now(), "ok"
		if err := s.commit(w, batch); err != nil {
			result = "failed"
		}
		s.commits.add("result=%q", result)
		s.commitTime.observe(time.Since(began).Seconds())
		s.batchSize.observe(float64(len(batch)))
		events = events[:0]
		for _, j := range batch {
			if j.err != nil {
				continue
			}
			if j.event.Kind != "" && !j.event.Again {
				events = append(events, j.event)
				if j.event.ID != 0 {
					s.stored.add("kind=%q", j.event.Kind)
				}
			}
			events = append(events, j.news...)
		}
		if len(events) > 0 {
			s.remember(events)
			s.publish(events)
		}
		if w.after != nil {
			w.after()
			w.after = nil
		}
		for _, j := range batch {
			j.done(j.event, j.err)
		}
		if len(batch) > 1 {
			runtime.Gosched() // whoever has an answer may have more to say: let it be in one batch, not in two
		}
		clear(batch) // let go of the messages
		clear(events)
	}
}

// writer is the one connection that writes. Only commitLoop uses it.
type writer struct {
	conn    *sql.Conn
	insert  *sql.Stmt // the statement of every message, worth preparing
	unread  *sql.Stmt // counts what a reader has left, after every look at a room
	words   *sql.Stmt // takes a message into the index
	version *sql.Stmt // says a number that changes when another process has written
	seen    int64     // that number, when it was looked into last
	last    int64     // id of the newest event published, or about to be
	now     time.Time // of the running transaction
	job     *job      // the running one
	after   func()    // to be done once after the commit, before the jobs are
}

// tell has news published after the commit.
func (w *writer) tell(e Event) {
	e.Time = w.now
	w.job.news = append(w.job.news, e)
}

func newWriter(db *sql.DB) (*writer, error) {
	conn, err := db.Conn(context.Background())
	prepare := func(query string) (statement *sql.Stmt) {
		if err == nil {
			statement, err = conn.PrepareContext(context.Background(), query)
		}
		return statement
	}
	w := &writer{
		conn: conn,
		insert: prepare(`
		INSERT INTO log (kind, room, author, cid, time, target, body, former, pushed) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (cid, author) WHERE cid IS NOT NULL DO NOTHING`),
		unread:  prepare("SELECT " + countColumns + "FROM rooms r JOIN users u ON u.id = ?3, (SELECT ?4 AS last) WHERE r.id = ?5"),
		words:   prepare("INSERT INTO search (rowid, text, pairs, tags) VALUES (?, ?, ?, ?)"),
		version: prepare("PRAGMA data_version"),
	}
	if err == nil {
		err = w.queryRow("SELECT data_version, ("+lastID+") FROM pragma_data_version").Scan(&w.seen, &w.last)
	}
	return w, err
}

// close must come before that of the database: with a statement open SQLite would
// leave its write-ahead log behind.
func (w *writer) close() {
	for _, statement := range []*sql.Stmt{w.insert, w.unread, w.words, w.version} {
		statement.Close()
	}
	w.conn.Close()
}

// commit applies the jobs in one transaction. A job that breaks a rule fails
// alone and has its err set; an error that is returned is everybody's, and set in all.
func (s *Store) commit(w *writer, batch []*job) (err error) {
	w.now = time.Now().UTC().Truncate(time.Millisecond)
	defer func() {
		if err != nil { // disk full, I/O error: SQLite may have rolled back already
			w.exec("ROLLBACK")
			for _, j := range batch {
				j.err = fmt.Errorf("%w: %w", ErrStorage, err)
			}
		}
	}()
	if err := w.exec("BEGIN IMMEDIATE"); err != nil {
		return err
	}
	if err := s.adopt(w); err != nil {
		return err
	}
	last := w.last
	for _, j := range batch {
		if j.err = w.run(j); j.err != nil && !isOwnFault(j.err) {
			return j.err
		}
		last = max(last, j.event.ID)
	}
	if err := w.exec("COMMIT"); err != nil {
		return err
	}
	w.last = last
	return nil
}

// adopt publishes what other processes, such as an import, have written since the
// last commit, so that everybody sees the log in its order. Nobody else writes
// during our transaction.
func (s *Store) adopt(w *writer) error {
	var version int64
	if err := w.version.QueryRow().Scan(&version); err != nil || version == w.seen {
		return err
	}
	rooms, err := collect(context.Background(), w.conn, func(e *Event) []any { return e.Room.columns() }, "SELECT "+roomColumns+" FROM rooms r")
	if err != nil {
		return err
	}
	for _, e := range rooms {
		if _, err := s.Room(e.Room.Name); err != nil {
			e.Kind = KindRoom
			s.remember([]Event{e})
			s.publish([]Event{e})
		}
	}
	for {
		page, err := collect(context.Background(), w.conn, (*Event).columns, selectEvents+"WHERE l.id > ? ORDER BY l.id LIMIT ?", w.last, replayPage)
		if err != nil {
			return err
		}
		if len(page) == 0 {
			w.seen = version
			return nil
		}
		s.publish(page)
		w.last = page[len(page)-1].ID
	}
}

// run applies one job, if it was not applied before. A plain message is a single
// statement, which finds that out and which SQLite undoes by itself; what may
// take several is wrapped.
func (w *writer) run(j *job) error {
	j.event.Time, w.job = w.now, j
	if j.event.Kind == KindMessage && j.event.Target == 0 {
		return j.apply(w, &j.event)
	}
	if err := w.recall(&j.event); err != nil || j.event.Again {
		return err
	}
	if err := w.exec("SAVEPOINT job"); err != nil {
		return err
	}
	err := j.apply(w, &j.event)
	switch {
	case err == nil:
		return w.exec("RELEASE job")
	case isOwnFault(err):
		return cmp.Or(w.exec("ROLLBACK TO job; RELEASE job"), err)
	}
	return err
}

// isOwnFault tells an error that concerns one job from one of the database.
func isOwnFault(err error) bool {
	switch sqliteCode(err) {
	case 18, 19: // SQLITE_TOOBIG, SQLITE_CONSTRAINT
		return true
	}
	_, refused := errors.AsType[*problem](err)
	return refused || errors.Is(err, ErrNotFound) || errors.Is(err, ErrForbidden) || errors.Is(err, ErrTaken) || errors.Is(err, ErrArchived)
}

// explain says what SQLite found wrong with a file in words for who starts chatd.
func explain(path string, err error) error {
	var why string
	switch code := sqliteCode(err); code {
	case 5, 6: // SQLITE_BUSY, SQLITE_LOCKED
		why = "another program keeps it locked: "
	case 3, 8, 14: // SQLITE_PERM, SQLITE_READONLY, SQLITE_CANTOPEN
		why = "it cannot be written to, look at owner and permissions: "
	case 11, 26: // SQLITE_CORRUPT, SQLITE_NOTADB
		why = "it is damaged or no database, put a backup in its place: "
	case 10, 13: // SQLITE_IOERR, SQLITE_FULL
		why = "the disk is full or broken: "
	}
	return fmt.Errorf("%s: %s%w", path, why, err)
}

// sqliteCode returns SQLite's primary result code, 0 if the error is not from there.
func sqliteCode(err error) int {
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		return e.Code() & 0xff
	}
	return 0
}

// exec and queryRow take no context: a transaction is never given up half-way,
// and a context that can end costs half as much again per row. exec takes several
// statements too, if their parameters are numbered, and stops at the first that fails.
func (w *writer) exec(query string, args ...any) error {
	_, err := w.conn.ExecContext(context.Background(), query, args...)
	return err
}

func (w *writer) queryRow(query string, args ...any) row {
	return row{w.conn.QueryRowContext(context.Background(), query, args...)}
}

func (s *Store) queryRow(ctx context.Context, query string, args ...any) row {
	return row{s.read.QueryRowContext(ctx, query, args...)}
}

// row is a sql.Row whose Scan fails with ErrNotFound if there is none.
type row struct{ *sql.Row }

func (r row) Scan(columns ...any) error {
	return instead(r.Row.Scan(columns...), sql.ErrNoRows, ErrNotFound)
}

// instead returns err, but other if err is what.
func instead(err, what, other error) error {
	if errors.Is(err, what) {
		return other
	}
	return err
}

// querier is the readers' database, or the writer's connection.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// collect returns the rows of a query, each scanned into the columns of a T.
func collect[T any](ctx context.Context, db querier, columns func(*T) []any, query string, args ...any) (list []T, err error) {
	rows, err := db.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var one T
		if err := rows.Scan(columns(&one)...); err != nil {
			return nil, err
		}
		list = append(list, one)
	}
	return list, rows.Err()
}

// only is the columns of a query that has one.
func only[T any](v *T) []any { return []any{v} }

// millis scans a time out of Unix milliseconds. NULL is the zero time, as in timeOrNull.
type millis struct{ *time.Time }

func (m millis) Scan(value any) error {
	switch v := value.(type) {
	case nil:
		*m.Time = time.Time{}
	case int64:
		*m.Time = time.UnixMilli(v).UTC()
	default:
		return fmt.Errorf("%T is no time", value)
	}
	return nil
}

func timeOrNull(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return t.UnixMilli()
}

func orNull[T comparable](v T) any {
	if v == *new(T) {
		return nil
	}
	return v
}
