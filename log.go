package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// Kind says what an Event is.
type Kind string

// The kinds up to KindUnreact are rows of the log. The rest is news that is not
// kept: a client that missed it learns the outcome when it next says hello.
const (
	KindMessage Kind = "message"
	KindEdit    Kind = "edit"
	KindDelete  Kind = "delete"
	KindReact   Kind = "react"
	KindUnreact Kind = "unreact"
	KindRoom    Kind = "room"   // Room was created or changed; Body is its former name, if it was renamed
	KindJoin    Kind = "join"   // Author became a member of Room
	KindLeave   Kind = "leave"  // Author ceased to be one
	KindRead    Kind = "read"   // Author has read Room up to Target
	KindTyping  Kind = "typing" // Author is typing in Room
	KindExpire  Kind = "expire" // what was said in Room before Time is gone
)

// Event is something that happened in a room.
type Event struct {
	ID     int64 // its place in the log; 0 for news
	Kind   Kind
	Room   Room
	Author User
	CID    string // the client's own id for it, unique per author; may be empty
	Time   time.Time
	Target int64  // the message edited, deleted, reacted to or replied to; KindRead: the newest one read
	Body   string // text of a message or edit, emoji of a reaction
	Quote  *Quote // message: what it replies to; nil: nothing

	Back             bool // KindRead: Target is to be an older one
	Unread, Mentions int  // KindRead: after Target, as in RoomState

	Edited  bool // message: Body is not what was first said
	Deleted bool // message or edit: Body is gone
	Pushed  bool // message: a program said it
	Again   bool // a retried send: this is the row that the first try made
}

// appliers write one event each, inside the transaction.
var appliers = map[Kind]func(*writer, *Event) error{
	KindMessage: (*writer).message,
	KindEdit:    (*writer).edit,
	KindDelete:  (*writer).delete,
	KindReact:   (*writer).react,
	KindUnreact: (*writer).react,
	KindRoom:    (*writer).room,
	KindRead:    (*writer).markRead,
}

func (w *writer) message(e *Event) error {
	if err := w.checkRoom(e); err != nil {
		return err
	}
	if e.Target != 0 {
		m, err := w.target(e)
		if err != nil {
			return err
		}
		e.Quote = m.Quote
	}
	return w.append(e, "")
}

func (w *writer) edit(e *Event) error {
	m, err := w.target(e)
	if err != nil {
		return err
	}
	if m.Author.ID != e.Author.ID {
		return ErrForbidden
	}
	if err := w.append(e, m.Body); err != nil {
		return err
	}
	if err := w.exec("UPDATE log SET body = ?, edited = ? WHERE id = ?", e.Body, w.now.UnixMilli(), e.Target); err != nil {
		return err
	}
	return w.reindex(e.Target)
}

// delete takes the text away, from the message and from its edits. Who wrote
// and when stays.
func (w *writer) delete(e *Event) error {
	m, err := w.target(e)
	if err != nil {
		return err
	}
	if m.Author.ID != e.Author.ID {
		if err := w.moderate(e.Author, m); err != nil {
			return err
		}
	}
	if err := w.append(e, ""); err != nil {
		return err
	}
	if err := w.unindex(e.Target); err != nil {
		return err
	}
	return w.exec(`
		UPDATE log SET body = NULL, former = NULL WHERE id = ?1 OR target = ?1 AND kind != 'message' AND kind = 'edit';
		DELETE FROM reactions WHERE message = ?1`, e.Target)
}

// react is logged even if it was so already: else its retry could undo what
// came in between.
func (w *writer) react(e *Event) error {
	if _, err := w.target(e); err != nil {
		return err
	}
	change := "INSERT INTO reactions (message, emoji, author) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
	if e.Kind == KindUnreact {
		change = "DELETE FROM reactions WHERE message = ? AND emoji = ? AND author = ?"
	}
	if err := w.exec(change, e.Target, e.Body, e.Author.ID); err != nil {
		return err
	}
	return w.append(e, "")
}

// target finds the message that e is about, which must still have a text and be
// in the room that e names, where e's author may speak. An e that names no room
// gets that of the message. The Quote of m is one of m itself.
func (w *writer) target(e *Event) (m Event, err error) {
	m.ID = e.Target
	err = w.queryRow(`
		SELECT q.author, q.body, `+quoteColumn+", "+roomColumns+` FROM log q JOIN rooms r ON r.id = q.room JOIN users a ON a.id = q.author
		WHERE q.id = ? AND q.kind = 'message' AND q.body IS NOT NULL AND `+e.Author.sees(), m.ID).Scan(m.Room.columns(&m.Author.ID, &m.Body, quotation{&m.Quote})...)
	switch {
	case err != nil:
		return m, err
	case e.Room.ID != 0 && e.Room.ID != m.Room.ID:
		return m, ErrNotFound
	case m.Room.Archived && e.Kind != KindDelete:
		return m, ErrArchived
	}
	e.Room = m.Room
	return m, nil
}

// append adds e to the log and gives it its id, or finds what an earlier try added.
func (w *writer) append(e *Event, former string) error {
	var body any
	if e.Kind != KindDelete { // else an empty text breaks the table's rule
		body = e.Body
	}
	r, err := w.insert.Exec(string(e.Kind), e.Room.ID, e.Author.ID, orNull(e.CID), e.Time.UnixMilli(), orNull(e.Target), body, orNull(former), e.Pushed)
	if err != nil {
		return err
	}
	if n, err := r.RowsAffected(); err != nil || n == 1 {
		if err == nil {
			e.ID, err = r.LastInsertId()
		}
		return err
	}
	return w.recall(e)
}

// recall makes e what its author has stored under its cid, if anything.
func (w *writer) recall(e *Event) error {
	if e.CID == "" {
		return nil
	}
	first := Event{Again: true}
	err := w.queryRow(selectEvents+"WHERE l.cid = ? AND l.author = ?", e.CID, e.Author.ID).Scan(first.columns()...)
	if err == nil {
		*e = first
	}
	return instead(err, ErrNotFound, nil)
}

// selectEvents begins every query for events, whose rows Event.columns scans.
const selectEvents = `
	SELECT l.id, l.kind, u.id, u.name, u.role, u.bot, coalesce(l.cid, ''), l.time, coalesce(l.target, 0), coalesce(l.body, ''),
		l.edited IS NOT NULL, l.body IS NULL AND l.kind != 'delete', l.pushed, ` + quoteColumn + ", " + roomColumns + `
	FROM log l JOIN rooms r ON r.id = l.room JOIN users u ON u.id = l.author
	LEFT JOIN log q ON q.id = l.target AND l.kind = 'message' LEFT JOIN users a ON a.id = q.author `

func (e *Event) columns() []any {
	return e.Room.columns(&e.ID, &e.Kind, &e.Author.ID, &e.Author.Name, &e.Author.Role, &e.Author.Bot, &e.CID, millis{&e.Time}, &e.Target, &e.Body,
		&e.Edited, &e.Deleted, &e.Pushed, quotation{&e.Quote})
}

// Quote is the beginning of a message, as it is now, under a reply to it.
type Quote struct {
	Username string `json:"username"`
	Message  string `json:"message,omitempty"` // 200 characters at most
	Deleted  bool   `json:"deleted,omitempty"`
}

// quoteColumn is the message q by a that a Quote is made of: the name, in which there
// are no line ends, one of those, and the text. A deleted one has only the name.
const quoteColumn = "a.name || coalesce(char(10) || substr(q.body, 1, 200), '')"

// quotation scans a quoteColumn. NULL is no quote.
type quotation struct{ quote **Quote }

func (q quotation) Scan(value any) error {
	if text, ok := value.(string); ok {
		name, message, there := strings.Cut(text, "\n")
		*q.quote = &Quote{name, message, !there}
	}
	return nil
}

// events returns what a query finds, limit at most. It stops early when the texts have
// more than pageBytes, and says whether there is more.
func (s *Store) events(ctx context.Context, limit int, where string, args ...any) (events []Event, more bool, err error) {
	rows, err := s.read.QueryContext(ctx, fmt.Sprint(selectEvents, where, " LIMIT ", limit+1), args...)
	if err != nil {
		return nil, false, err
	}
	defer rows.Close()
	for size := 0; rows.Next(); {
		if size > pageBytes || len(events) == limit {
			return events, true, nil
		}
		var e Event
		if err := rows.Scan(e.columns()...); err != nil {
			return nil, false, err
		}
		events = append(events, e)
		size += len(e.Body)
	}
	return events, false, rows.Err()
}

// pageBytes bounds the memory of a page of long messages. With messages that are
// as long as they may be, a page has nine.
const pageBytes = 64 << 10

// Since returns events after the cursor that u may see, in their order, of one
// room or, with room 0, of all, limit at most, and whether there are more.
// Every event of the log is there, however old; messages come with the text that
// they have now.
func (s *Store) Since(ctx context.Context, u User, room, cursor int64, limit int) (page []Event, more bool, err error) {
	where := "WHERE l.id > ?1 AND "
	if room != 0 {
		where = "WHERE l.room = ?2 AND l.id > ?1 AND "
	}
	return s.events(ctx, limit, where+u.sees()+" ORDER BY l.id", cursor, room)
}

// Page returns the newest messages of a room with ids below before, oldest first,
// limit at most, and whether there are older ones.
func (s *Store) Page(ctx context.Context, room, before int64, limit int) (page []Event, older bool, err error) {
	page, older, err = s.events(ctx, limit, "WHERE l.room = ? AND l.kind = 'message' AND l.id < ? ORDER BY l.id DESC", room, before)
	slices.Reverse(page)
	return page, older, err
}

// PageAfter returns the oldest messages of a room with ids above after, oldest first, limit
// at most.
func (s *Store) PageAfter(ctx context.Context, room, after int64, limit int) (page []Event, err error) {
	page, _, err = s.events(ctx, limit, "WHERE l.room = ? AND l.kind = 'message' AND l.id > ? ORDER BY l.id", room, after)
	return page, err
}

// Beyond reports whether a room has messages with ids below first, and above last.
func (s *Store) Beyond(ctx context.Context, room, first, last int64) (below, above bool, err error) {
	err = s.queryRow(ctx, `
		SELECT EXISTS (SELECT 1 FROM log WHERE room = ?1 AND kind = 'message' AND id < ?2),
			EXISTS (SELECT 1 FROM log WHERE room = ?1 AND kind = 'message' AND id > ?3)`, room, first, last).Scan(&below, &above)
	return below, above, err
}

// Around returns the before of the Page that ends with the given number of messages
// after id, math.MaxInt64 if there are no more than that.
func (s *Store) Around(ctx context.Context, room, id int64, after int) (before int64, err error) {
	err = s.queryRow(ctx, `
		SELECT coalesce((SELECT id FROM log WHERE room = ? AND kind = 'message' AND id > ? ORDER BY id LIMIT 1 OFFSET ?), ?)`,
		room, id, after, math.MaxInt64).Scan(&before)
	return before, err
}

// Reactions returns who reacts to the messages of a page: names by emoji by id.
func (s *Store) Reactions(ctx context.Context, page []Event) (map[int64]map[string][]string, error) {
	ids := make([]int64, len(page))
	for i, e := range page {
		ids[i] = e.ID
	}
	type reaction struct {
		message     int64
		emoji, name string
	}
	all, err := collect(ctx, s.read, func(r *reaction) []any { return []any{&r.message, &r.emoji, &r.name} }, `
		SELECT message, emoji, u.name FROM reactions JOIN users u ON u.id = author
		WHERE message IN (SELECT value FROM json_each(?))`, string(encodeJSON(ids)))
	found := make(map[int64]map[string][]string)
	for _, r := range all {
		if found[r.message] == nil {
			found[r.message] = make(map[string][]string)
		}
		found[r.message][r.emoji] = append(found[r.message][r.emoji], r.name)
	}
	return found, err
}

// Skip returns the cursor that leaves most events up to the id last to replay, or
// the given one if it leaves no more than that.
func (s *Store) Skip(ctx context.Context, cursor, last int64, most int) (int64, error) {
	err := s.queryRow(ctx, "SELECT max(?, coalesce((SELECT id FROM log WHERE id <= ? ORDER BY id DESC LIMIT 1 OFFSET ?), 0))",
		cursor, last, most).Scan(&cursor)
	return cursor, err
}

const lastID = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'log'"

// LastID returns the id of the newest event, 0 when there is none.
func (s *Store) LastID(ctx context.Context) (id int64, err error) {
	err = s.queryRow(ctx, lastID).Scan(&id)
	return id, err
}
