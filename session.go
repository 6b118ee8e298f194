package main

import (
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
func (s Session) ID() string { return hex.EncodeToString(s.Hash[:min(8, len(s.Hash))]) }

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
// and passes cannot be missed by the dropEnded of a sign-out that comes later.
func (s *server) checkStill(r *http.Request, v visitor) error {
	now, err := s.visitor(r)
	if err == nil && now.ID != v.ID {
		err = refuse(http.StatusUnauthorized, "sign_in")
	}
	return err
}

// showAccount shows the account page after something was tried there.
func (s *server) showAccount(w http.ResponseWriter, r *http.Request, v visitor, tried error, p page) (err error) {
	if p.Sessions, err = s.store.Sessions(r.Context(), v.User); err != nil {
		return err
	}
	if p.Tokens, err = s.store.Tokens(r.Context(), "t.user = ?2", v.ID); err != nil {
		return err
	}
	p.Session = Session{Hash: v.session}.ID()
	return s.show(w, r, v, tried, "account.html", p)
}

// handleSessions signs out the session with the id in the form, or, with all=1,
// all but this one. Their sockets go at once.
func (s *server) handleSessions(w http.ResponseWriter, r *http.Request, v visitor) error {
	id, own, notice := r.PostFormValue("id"), Session{Hash: v.session}.ID(), "session.ended"
	var err error
	if r.PostFormValue("all") == "1" {
		id, notice = "", "session.ended_others"
		err = s.store.DeleteOtherSessions(v.User, own)
	} else {
		err = s.store.DeleteSession(v.User, id)
	}
	if err == nil {
		err = s.dropEnded(v.ID)
	}
	if err == nil && id != "" && id == own {
		return s.redirect(w, r, "/login/")
	}
	return s.showAccount(w, r, v, err, page{Notice: notice})
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
	return s.showAccount(w, r, v, err, page{Notice: "settings.saved"})
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
		return w.exec(`
			DELETE FROM sessions WHERE seen < ?6;
			INSERT INTO sessions (hash, user, seen, created, agent, address) VALUES (?1, ?2, ?3, ?3, ?4, ?5)`,
			hash, u.ID, w.now.UnixMilli(), agent, address, w.now.Add(-sessionLife).UnixMilli())
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

// idColumn is Session.ID of a row of sessions.
const idColumn = "lower(hex(substr(hash, 1, 8)))"

// DeleteSession ends the session of the user with that ID. It fails with ErrNotFound
// if there is none.
func (s *Store) DeleteSession(u User, id string) error {
	return s.update(func(w *writer) error {
		return w.queryRow("DELETE FROM sessions WHERE user = ? AND "+idColumn+" = ? RETURNING 1", u.ID, id).Scan(new(int))
	})
}

// DeleteOtherSessions ends the user's sessions but the one to keep.
func (s *Store) DeleteOtherSessions(u User, keep string) error {
	return s.update(func(w *writer) error {
		return w.exec("DELETE FROM sessions WHERE user = ? AND "+idColumn+" != ?", u.ID, keep)
	})
}
