package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const (
	maxKeep     = 36500 // days
	keepEvery   = time.Hour
	keepBatch   = 100                   // messages removed in one transaction
	keepRelated = 1000                  // edits, reactions and the like removed in one
	keepPause   = 20 * time.Millisecond // after it, for those who write
	wipeAfter   = time.Second           // deletions of so long are wiped together
	wipeAgain   = 10 * time.Second
	wipeWait    = 100 // ms that writers may have to wait for those who read
)

// keeper removes messages that are older than their rooms keep them. What is so
// removed, and what people delete, it wipes out of the files: SQLite overwrites it in
// the database (secure_delete), but what the write-ahead log had of it stays there
// until that is emptied.
//
// It finds what to do in the tables and begins with all of it, so that a crash costs
// nothing but time.
type keeper struct {
	store *Store
	log   *slog.Logger
	wake  chan struct{} // a room keeps its messages for another time; nobody waits to say so
	wipe  chan struct{} // something was deleted; nor does anybody here
}

func newKeeper(store *Store, log *slog.Logger) *keeper {
	return &keeper{store, log, make(chan struct{}, 1), make(chan struct{}, 1)}
}

// nudge is told of what has been published. It never blocks.
func (k *keeper) nudge(events []Event) {
	for _, e := range events {
		if e.Kind == KindDelete {
			poke(k.wipe)
		}
	}
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// keep removes what is too old again and again, until ctx is done.
func (k *keeper) keep(ctx context.Context) {
	for ctx.Err() == nil {
		removed, err := k.round(ctx)
		if err == nil {
			err = k.store.purge(ctx)
		}
		if err != nil && ctx.Err() == nil {
			k.log.Error("remove old messages", "err", err)
		}
		if removed > 0 {
			k.log.Info("old messages removed", "messages", removed)
			poke(k.wipe)
		}
		select {
		case <-k.wake:
		case <-time.After(keepEvery):
		case <-ctx.Done():
		}
	}
}

// wipeDeleted wipes what is deleted, until ctx is done. It begins with what was before.
func (k *keeper) wipeDeleted(ctx context.Context) {
	for pause(ctx, wipeAfter) == nil {
		for k.store.wipe() != nil && pause(ctx, wipeAgain) == nil { // somebody reads something long, such as a backup
		}
		select {
		case <-k.wipe:
		case <-ctx.Done():
		}
	}
}

// round removes what is too old in all rooms.
func (k *keeper) round(ctx context.Context) (removed int, err error) {
	rooms, err := collect(ctx, k.store.read, func(r *Room) []any { return r.columns() }, "SELECT "+roomColumns+" FROM rooms r WHERE r.keep IS NOT NULL")
	for _, r := range rooms {
		n, e := k.store.expire(ctx, r)
		removed += n
		if !errors.Is(e, ErrNotFound) { // the room was changed just now, which wakes us again
			err = errors.Join(err, e)
		}
	}
	return removed, err
}

// expires is the time before which nothing is kept in a room.
func (r Room) expires(now time.Time) time.Time {
	return now.UTC().AddDate(0, 0, -r.Keep).Truncate(time.Millisecond)
}

// expire removes the messages that a room keeps no longer, and then says so there. It
// fails with ErrNotFound if the room keeps its messages for another time than r says.
func (s *Store) expire(ctx context.Context, r Room) (removed int, err error) {
	before := r.expires(time.Now())
	for last := int64(0); ; {
		old, err := collect(ctx, s.read, only[int64], "SELECT id FROM log WHERE room = ? AND id > ? AND kind = 'message' AND time < ? ORDER BY id LIMIT ?",
			r.ID, last, before.UnixMilli(), keepBatch)
		if err != nil {
			return removed, err
		}
		if len(old) == 0 {
			break
		}
		var more bool
		if err := s.update(func(w *writer) (err error) { more, err = w.remove(r, old); return err }); err != nil {
			return removed, err
		}
		if !more {
			removed, last = removed+len(old), old[len(old)-1]
		}
		if err := pause(ctx, keepPause); err != nil {
			return removed, err
		}
	}
	if removed == 0 {
		return 0, nil
	}
	return removed, s.update(func(w *writer) error {
		w.job.news = append(w.job.news, Event{Kind: KindExpire, Room: r, Time: before})
		return w.exec("DELETE FROM pushes WHERE room = ? AND ended < ?", r.ID, before.UnixMilli()) // they have texts too
	})
}

// remove removes messages of r and all that is about them, or some of that, and then
// there is more to remove.
func (w *writer) remove(r Room, messages []int64) (more bool, err error) {
	if err := w.queryRow("SELECT 1 FROM rooms WHERE id = ? AND keep = ?", r.ID, r.Keep).Scan(new(int)); err != nil {
		return false, err
	}
	const these = "IN (SELECT value FROM json_each(?1))"
	ids := string(encodeJSON(messages))
	result, err := w.conn.ExecContext(context.Background(),
		"DELETE FROM log WHERE id IN (SELECT id FROM log WHERE kind != 'message' AND target "+these+" LIMIT ?2)", ids, keepRelated)
	if err != nil {
		return false, err
	}
	if n, err := result.RowsAffected(); err != nil || n == keepRelated {
		return true, err
	}
	if err := w.unindex(messages...); err != nil {
		return false, err
	}
	return false, w.exec("DELETE FROM reactions WHERE message "+these+
		"; DELETE FROM deliveries WHERE event "+these+" OR reply "+these+"; DELETE FROM log WHERE id "+these, ids)
}

// wipe empties the write-ahead log. It fails while others read what is in it.
func (s *Store) wipe() error {
	var wiped error
	err := s.update(func(w *writer) error {
		w.after = func() { wiped = w.wipe() }
		return nil
	})
	return errors.Join(err, wiped)
}

func (w *writer) wipe() error {
	// Those who write wait meanwhile: not for long.
	err := w.exec(fmt.Sprintf("PRAGMA busy_timeout = %d", wipeWait))
	var busy, pages, moved int
	if err == nil {
		err = w.queryRow("PRAGMA wal_checkpoint(TRUNCATE)").Scan(&busy, &pages, &moved)
	}
	if err == nil && busy != 0 {
		err = errors.New("the write-ahead log is in use")
	}
	return errors.Join(err, w.exec(fmt.Sprintf("PRAGMA busy_timeout = %d", lockWait)))
}

// keepDays is what a form says of how long a room keeps messages; nothing is for ever.
func keepDays(days string) (int, error) {
	if days = strings.TrimSpace(days); days == "" {
		return 0, nil
	}
	n, err := strconv.Atoi(days)
	if err != nil || n < 1 || n > maxKeep {
		return 0, refuse(http.StatusBadRequest, "bad_keep", maxKeep)
	}
	return n, nil
}
