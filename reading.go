package main

import (
	"context"
	"database/sql/driver"
	"errors"
	"strings"
	"time"
	"unicode/utf8"

	"modernc.org/sqlite"
)

const (
	unreadMost   = 100 // counting stops here
	peopleMost   = 500 // names in a page
	mentionsMost = 500 // the newest unread messages with an @, which are looked into
)

// RoomState is a room as one user sees it.
type RoomState struct {
	Room
	LastRead int64
	Unread   int       // messages by others after LastRead; unreadMost stands for more
	Mentions int       // those of them that mention the user, in direct messages all
	Notify   string    // of what the user wants to be told: one of notifyLevels
	Time     time.Time // of the newest event; zero in an empty room
}

// countColumns are Unread and Mentions of room r after the id last, for user u. ?1 is
// unreadMost and ?2 mentionsMost. log_mentions is an index of what has an @: where there
// is none, mentions cost nothing.
const (
	countColumns = unreadColumn + ", iif(instr(r.name, '+'), " + unreadColumn + `, (
		SELECT count(*) FROM (SELECT 1 FROM (
			SELECT body FROM log l WHERE l.room = r.id AND l.id > last AND l.kind = 'message' AND instr(l.body, '@') AND l.author != u.id
			ORDER BY l.id DESC LIMIT ?2
		) WHERE mentions(body, u.name) LIMIT ?1))) `
	unreadColumn = `(SELECT count(*) FROM (SELECT 1 FROM log l WHERE l.room = r.id AND l.id > last
		AND l.kind = 'message' AND l.body IS NOT NULL AND l.author != u.id LIMIT ?1))`
)

// RoomStates returns the rooms that the user may see, by name.
func (s *Store) RoomStates(ctx context.Context, u User) ([]RoomState, error) {
	return collect(ctx, s.read, func(r *RoomState) []any {
		return r.columns(&r.LastRead, &r.Unread, &r.Mentions, &r.Notify, millis{&r.Time})
	}, `
		WITH seen AS (
			SELECT r.*, coalesce(d.last_read_id, u.first_id) AS last, coalesce(v.notify, u.notify) AS level
			FROM rooms r JOIN users u ON u.id = ?3 LEFT JOIN reads d ON d.user = u.id AND d.room = r.id
				LEFT JOIN levels v ON v.user = u.id AND v.room = r.id
			WHERE `+u.sees()+`
		)
		SELECT last, `+countColumns+`, level, (SELECT time FROM log l WHERE l.room = r.id ORDER BY l.id DESC LIMIT 1), `+roomColumns+`
		FROM seen r JOIN users u ON u.id = ?3 ORDER BY r.key`, unreadMost, mentionsMost, u.ID)
}

// markRead moves the marker forward only, or, with Back, back only, and counts what is
// after it. If it was further already, that is for who asked alone.
func (w *writer) markRead(e *Event) error {
	if err := w.checkRoom(e); err != nil && !errors.Is(err, ErrArchived) {
		return err
	}
	var last, newest int64
	err := w.queryRow(`
		SELECT coalesce(d.last_read_id, u.first_id), (SELECT coalesce(max(id), 0) FROM log)
		FROM users u LEFT JOIN reads d ON d.user = u.id AND d.room = ? WHERE u.id = ?`, e.Room.ID, e.Author.ID).Scan(&last, &newest)
	if err != nil {
		return err
	}
	asked := e.Target
	if e.Back {
		e.Target = min(last, max(asked, 0))
		e.Again = e.Target < asked
	} else {
		e.Target = max(last, min(asked, newest))
		e.Again = e.Target > asked
	}
	err = w.exec(`INSERT INTO reads (user, room, last_read_id) VALUES (?, ?, ?)
		ON CONFLICT (user, room) DO UPDATE SET last_read_id = excluded.last_read_id`, e.Author.ID, e.Room.ID, e.Target)
	if err != nil {
		return err
	}
	return w.unread.QueryRow(unreadMost, mentionsMost, e.Author.ID, e.Target, e.Room.ID).Scan(&e.Unread, &e.Mentions)
}

// Level returns what a user has chosen for a room: one of notifyLevels, or "" for what
// the settings say.
func (s *Store) Level(ctx context.Context, u User, room Room) (level string, err error) {
	err = s.queryRow(ctx, "SELECT notify FROM levels WHERE user = ? AND room = ?", u.ID, room.ID).Scan(&level)
	return level, instead(err, ErrNotFound, nil)
}

// SetLevel is for what Level returns.
func (s *Store) SetLevel(u User, room Room, level string) error {
	return s.update(func(w *writer) error {
		return w.exec(`
			DELETE FROM levels WHERE user = ?1 AND room = ?2;
			INSERT INTO levels (user, room, notify) SELECT ?1, ?2, ?3 WHERE ?3 != ''`, u.ID, room.ID, level)
	})
}

// People returns the names, sorted, peopleMost at most, of the active accounts that u may
// write to. Guests, and who sees only some rooms, get those under the newest messages of
// the room they are in.
func (s *Store) People(ctx context.Context, u User, room Room) ([]string, error) {
	who := "u.role != 'guest'"
	if u.Role == RoleGuest || u.limited() {
		who = "u.id IN (SELECT author FROM (SELECT author FROM log WHERE room = ?2 AND kind = 'message' ORDER BY id DESC LIMIT ?3))"
	}
	return collect(ctx, s.read, only[string], "SELECT u.name FROM users u WHERE "+who+` AND u.id != ?1
		AND u.deactivated IS NULL AND (u.expires IS NULL OR u.expires > ?5) ORDER BY u.key LIMIT ?4`,
		u.ID, room.ID, historyPage, peopleMost, time.Now().UnixMilli())
}

// everybody is whom people, and no programs, can mention all at once.
var everybody = []string{"all", "所有人"}

// SQL's mentions(body, name) is for people. The driver offers it to connections that
// are opened from now on.
func init() {
	sqlite.MustRegisterDeterministicScalarFunction("mentions", 2, func(_ *sqlite.FunctionContext, args []driver.Value) (driver.Value, error) {
		body, _ := args[0].(string)
		name, _ := args[1].(string)
		return mentions(body, append(everybody, name)...), nil
	})
}

// mentions reports whether text has @ and one of the names, in any case, where no longer
// name stands. Han, which is written without spaces, may stand on both sides.
func mentions(text string, names ...string) bool {
	for before, after, found := strings.Cut(text, "@"); found; before, after, found = strings.Cut(after, "@") {
		for _, name := range names {
			size := 0
			for range name {
				_, n := utf8.DecodeRuneInString(after[size:])
				size += n
			}
			if !strings.EqualFold(after[:size], name) {
				continue
			}
			previous, _ := utf8.DecodeLastRuneInString(before)
			next, _ := utf8.DecodeRuneInString(strings.TrimLeft(after[size:], "_.-"))
			if isNameEdge(previous) && isNameEdge(next) { // at the text's ends they are RuneError, which is in no name
				return true
			}
		}
	}
	return false
}
