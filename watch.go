package main

import (
	"context"
	"time"
)

const watchEvery = 5 * time.Second

// grant is what lets a socket in.
type grant struct {
	user    int64  // 0: a visitor without a name
	session string // hash, or ""
	token   int64  // id, or 0
}

func (m *member) grant() grant {
	return grant{m.User.ID, string(m.session), m.token}
}

// watchOthers does what has to follow when another process, such as `chatd token`,
// has written to the database, until ctx is done.
func (s *server) watchOthers(ctx context.Context) {
	for seen := int64(0); pause(ctx, watchEvery) == nil; {
		version, err := s.followOthers(seen)
		if err == nil && version != seen {
			err = s.dropEnded(0)
		}
		if err != nil {
			s.complain(ctx, problemOf(err), "watch", "err", err)
			continue // and look again
		}
		seen = version
	}
}

// followOthers returns a number that changes when another process writes. If it is
// not the one seen, all members that the hub does not know of are announced: in the
// writer's transaction, so that nobody is who ceases to be one meanwhile.
func (s *server) followOthers(seen int64) (version int64, err error) {
	err = s.store.update(func(w *writer) error {
		if err := w.queryRow("PRAGMA data_version").Scan(&version); err != nil || version == seen {
			return err
		}
		members, err := s.store.Memberships(context.Background())
		for _, e := range members {
			if !s.hub.Sees(User{ID: e.Author.ID, Confined: true}, e.Room) {
				w.tell(e)
			}
		}
		return err
	})
	return version, err
}

// dropEnded closes the sockets of a user, or with 0 of all, that may not come in any more.
func (s *server) dropEnded(user int64) error {
	ended := make(map[grant]bool)
	for c := range s.hub.Grants() {
		if user != 0 && c.user != user {
			continue
		}
		works, err := s.store.works(c)
		if err != nil {
			return err
		}
		ended[c] = !works
	}
	s.hub.Drop(func(m *member) bool { return ended[m.grant()] })
	return nil
}

// works reports whether c would still let a socket in.
func (s *Store) works(c grant) (yes bool, err error) {
	if c.user == 0 {
		return true, nil
	}
	err = s.queryRow(context.Background(), `
		SELECT EXISTS (SELECT 1 FROM users u WHERE u.id = ?2 AND u.deactivated IS NULL AND coalesce(u.expires > ?1, 1)
			AND (coalesce(length(?3), 0) = 0 OR EXISTS (SELECT 1 FROM sessions WHERE hash = ?3 AND user = u.id))
			AND (?4 = 0 OR EXISTS (SELECT 1 FROM tokens t LEFT JOIN users c ON c.id = t.creator WHERE t.id = ?4 AND t.user = u.id AND `+tokenWorks+`)))`,
		time.Now().UnixMilli(), c.user, []byte(c.session), c.token).Scan(&yes)
	return yes, err
}
