package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"slices"
	"strings"
	"time"
)

const (
	sessionCookie = "chatd"
	sessionLife   = 60 * 24 * time.Hour // since last used
	sessionTouch  = 24 * time.Hour      // how exactly we know when that was
	cookieLife    = 400 * 24 * time.Hour
	maxAgent      = 200 // bytes of a User-Agent that are kept
)

// Session is a browser in which a user is signed in.
type Session struct {
	Hash    []byte    // of the cookie's token
	Created time.Time // zero: before we kept it
	Seen    time.Time // to within sessionTouch
	Agent   string    // its User-Agent
	Address string    // where it signed in
}

// ID is what others than the owner may know of a session.
func (s Session) ID() string { return hex.EncodeToString(s.Hash[:8]) }

// Browser and System name what is behind a User-Agent, "" if they do not know it.
func (s Session) Browser() string { return known(s.Agent, browsers) }
func (s Session) System() string  { return known(s.Agent, systems) }

// Browsers also claim to be others, which therefore stand further down.
var (
	browsers = [][2]string{{"MicroMessenger/", "WeChat"}, {"Edg", "Edge"}, {"OPR/", "Opera"}, {"SamsungBrowser/", "Samsung Internet"},
		{"Firefox/", "Firefox"}, {"FxiOS/", "Firefox"}, {"Chrome/", "Chrome"}, {"CriOS/", "Chrome"}, {"Safari/", "Safari"}}
	systems = [][2]string{{"Android", "Android"}, {"iPhone", "iPhone"}, {"iPad", "iPad"}, {"Windows", "Windows"}, {"Mac OS X", "macOS"},
		{"CrOS", "ChromeOS"}, {"Linux", "Linux"}}
)

func known(agent string, marks [][2]string) string {
	for _, m := range marks {
		if strings.Contains(agent, m[0]) {
			return m[1]
		}
	}
	return ""
}

// startSession signs the browser in. It always makes a new token, so that one
// planted before is worth nothing.
func (s *server) startSession(w http.ResponseWriter, r *http.Request, u User) error {
	token := rand.Text() // 130 bits
	if err := s.store.CreateSession(u, hashToken(token), r.UserAgent(), s.clientAddress(r)); err != nil {
		return err
	}
	s.setCookie(w, r, s.cookieName(), token, cookieLife)
	return nil
}

// cookieName is that of the session cookie. One that begins with __Host- browsers
// take only over https and from this very host: no neighbour can plant one.
func (s *server) cookieName() string {
	if s.secure && s.base == "" {
		return "__Host-" + sessionCookie
	}
	return sessionCookie
}

func (s *server) setCookie(w http.ResponseWriter, r *http.Request, name, value string, life time.Duration) {
	http.SetCookie(w, &http.Cookie{
		Name: name, Value: value, Path: s.base + "/", MaxAge: int(life.Seconds()),
		Secure: strings.HasPrefix(s.urlFor(r), "https:"), HttpOnly: true, SameSite: http.SameSiteLaxMode,
	})
}

func hashToken(token string) []byte {
	h := sha256.Sum256([]byte(token))
	return h[:]
}

// checkStill fails if v is not who sends r any more. A socket that is in the hub
// and passes cannot be missed by the Drop of a sign-out that comes later.
func (s *server) checkStill(r *http.Request, v visitor) error {
	now, err := s.visitor(r)
	if err == nil && now.ID != v.ID {
		err = refuse(http.StatusUnauthorized, "sign_in")
	}
	return err
}

// dropOthers closes the user's sockets, but not those of the visitor's own session.
func (s *server) dropOthers(v visitor) {
	s.hub.Drop(func(m *member) bool { return m.user.ID == v.ID && !bytes.Equal(m.session, v.session) })
}

// showAccount shows the account page after something was tried there: with what
// went wrong, or else with the text of the key notice, if any.
func (s *server) showAccount(w http.ResponseWriter, r *http.Request, v visitor, tried error, notice string) error {
	return s.fillAccount(w, r, v, tried, page{Notice: s.words[v.language(r)].text(notice)})
}

// fillAccount is showAccount for a page that has more to say.
func (s *server) fillAccount(w http.ResponseWriter, r *http.Request, v visitor, tried error, p page) error {
	sessions, err := s.store.Sessions(r.Context(), v.User)
	if err != nil {
		return err
	}
	p.Sessions = sessions
	if p.Tokens, err = s.store.Tokens(r.Context(), "t.user = ?2", v.ID); err != nil {
		return err
	}
	if v.session != nil {
		p.Session = Session{Hash: v.session}.ID()
	}
	if tried != nil {
		p.Notice = ""
	}
	return s.show(w, r, v, tried, "account.html", p)
}

// handleSessions signs out the session with the id in the form, or, with all=1,
// all but this one. Their sockets go at once.
func (s *server) handleSessions(w http.ResponseWriter, r *http.Request, v visitor) error {
	if r.PostFormValue("all") == "1" {
		err := s.store.DeleteOtherSessions(v.User, v.session)
		if err == nil {
			s.dropOthers(v)
		}
		return s.showAccount(w, r, v, err, "session.ended_others")
	}
	hash, err := s.store.DeleteSessionByID(v.User, r.PostFormValue("id"))
	if err == nil {
		s.hub.Drop(func(m *member) bool { return bytes.Equal(m.session, hash) })
	}
	if err == nil && bytes.Equal(hash, v.session) {
		return s.redirect(w, r, "/login/")
	}
	return s.showAccount(w, r, v, err, "session.ended")
}

func (s *server) handleSettings(w http.ResponseWriter, r *http.Request, v visitor) error {
	lang, notify := r.PostFormValue("language"), r.PostFormValue("notify")
	if lang != "" && s.words[lang] == nil || !slices.Contains(notifyLevels, notify) {
		return refuse(http.StatusBadRequest, "bad_request")
	}
	err := s.store.SetSettings(v.User, lang, notify)
	if err == nil {
		v.Language, v.Notify = lang, notify
	}
	return s.showAccount(w, r, v, err, "settings.saved")
}

// SetSettings sets the language, "" for that of the browser, and one of notifyLevels.
func (s *Store) SetSettings(u User, language, notify string) error {
	return s.update(func(w *writer) error {
		return w.exec("UPDATE users SET language = ?, notify = ? WHERE id = ?", orNull(language), notify, u.ID)
	})
}

// CreateSession also forgets the sessions that have run out.
func (s *Store) CreateSession(u User, hash []byte, agent, address string) error {
	agent = strings.ToValidUTF8(agent[:min(len(agent), maxAgent)], "")
	return s.update(func(w *writer) error {
		if err := w.exec("DELETE FROM sessions WHERE seen < ?", w.now.Add(-sessionLife).UnixMilli()); err != nil {
			return err
		}
		return w.exec("INSERT INTO sessions (hash, user, seen, created, agent, address) VALUES (?1, ?2, ?3, ?3, ?4, ?5)",
			hash, u.ID, w.now.UnixMilli(), agent, address)
	})
}

// SessionUser returns who signed in with a session, or ErrNotFound, also for those
// who may not come in any more. It keeps sessions that are used alive.
func (s *Store) SessionUser(ctx context.Context, hash []byte) (User, error) {
	var u User
	var seen time.Time
	err := s.queryRow(ctx, "SELECT s.seen, "+userColumns+" FROM sessions s JOIN users u ON u.id = s.user WHERE s.hash = ?", hash).Scan(u.columns(millis{&seen})...)
	if err != nil {
		return User{}, err
	}
	unused := time.Since(seen)
	if unused > sessionLife || u.gone() {
		return User{}, ErrNotFound
	}
	if unused > sessionTouch {
		err = s.update(func(w *writer) error {
			return w.exec("UPDATE sessions SET seen = ? WHERE hash = ?", w.now.UnixMilli(), hash)
		})
	}
	return u, err
}

// Sessions returns where the user is signed in, the last used first.
func (s *Store) Sessions(ctx context.Context, u User) ([]Session, error) {
	return collect(ctx, s.read, func(c *Session) []any {
		return []any{&c.Hash, millis{&c.Created}, millis{&c.Seen}, &c.Agent, &c.Address}
	}, "SELECT hash, nullif(created, 0), seen, agent, address FROM sessions WHERE user = ? AND seen >= ? ORDER BY seen DESC, hash",
		u.ID, time.Now().Add(-sessionLife).UnixMilli())
}

// SignedInFrom reports whether the user of that name, if there is one, has a
// session that began at the address.
func (s *Store) SignedInFrom(ctx context.Context, name, address string) (yes bool, err error) {
	err = s.queryRow(ctx, "SELECT EXISTS (SELECT 1 FROM sessions s JOIN users u ON u.id = s.user WHERE u.key = ? AND s.address = ?)",
		foldName(name), address).Scan(&yes)
	return yes, err
}

func (s *Store) DeleteSession(hash []byte) error {
	return s.update(func(w *writer) error { return w.exec("DELETE FROM sessions WHERE hash = ?", hash) })
}

// DeleteSessionByID returns the hash of the session of the user with that ID that
// it has ended, or ErrNotFound.
func (s *Store) DeleteSessionByID(u User, id string) (hash []byte, err error) {
	err = s.update(func(w *writer) error {
		return w.queryRow("DELETE FROM sessions WHERE user = ? AND lower(hex(substr(hash, 1, 8))) = ? RETURNING hash", u.ID, id).Scan(&hash)
	})
	return hash, err
}

// DeleteOtherSessions ends the user's sessions but the one to keep.
func (s *Store) DeleteOtherSessions(u User, keep []byte) error {
	return s.update(func(w *writer) error { return w.deleteOtherSessions(u, keep) })
}

func (w *writer) deleteOtherSessions(u User, keep []byte) error {
	return w.exec("DELETE FROM sessions WHERE user = ? AND hash IS NOT ?", u.ID, keep)
}
