package main

import (
	"context"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"database/sql"
	"encoding/base64"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Role is what a user may do. A guest is a visitor without an account, whose
// name is marked wherever it is shown.
type Role string

const (
	RoleAdmin  Role = "admin"
	RoleMember Role = "member"
	RoleGuest  Role = "guest"
)

// User is somebody with a name. No two users, guests included, have names that
// differ only in case.
type User struct {
	ID   int64
	Name string
	Role Role
}

const (
	hashRounds      = 600_000    // of PBKDF2-SHA-256, about a tenth of a second
	maxHashRounds   = 10_000_000 // what we are willing to verify
	minPassword     = 8          // characters
	maxPassword     = 256        // bytes
	sessionCookie   = "chatd"
	sessionLife     = 60 * 24 * time.Hour // since last used
	sessionTouch    = 24 * time.Hour      // how exactly we know when that was
	cookieLife      = 400 * 24 * time.Hour
	maxBuckets      = 10_000   // addresses and names that a throttle remembers
	anonymousGuest  = "游客"     // who speaks on a guest's plain socket, as in the tutorials
	loginBurst      = 10       // wrong passwords before a name or an address must wait
	loginPerSecond  = 1.0 / 10 // and how many it may try from then on
	passwordHashing = "pbkdf2_sha256"
)

// hashPassword encodes a password as Django does, so that accounts can move in
// and out: algorithm$iterations$salt$hash.
func hashPassword(password string) string { return encodePassword(password, rand.Text(), hashRounds) }

func encodePassword(password, salt string, rounds int) string {
	key, err := pbkdf2.Key(sha256.New, password, []byte(salt), rounds, sha256.Size)
	if err != nil { // only for parameters that FIPS 140 forbids
		panic(err)
	}
	return strings.Join([]string{passwordHashing, strconv.Itoa(rounds), salt, base64.StdEncoding.EncodeToString(key)}, "$")
}

func passwordMatches(encoded, password string) bool {
	part := strings.Split(encoded, "$")
	if len(part) != 4 || part[0] != passwordHashing {
		return false
	}
	rounds, err := strconv.Atoi(part[1])
	if err != nil || rounds < 1 || rounds > maxHashRounds {
		return false
	}
	return subtle.ConstantTimeCompare([]byte(encoded), []byte(encodePassword(password, part[2], rounds))) == 1
}

// nobody is what the password of an unknown user is compared with, so that the
// answer takes as long.
var nobody = passwordHashing + "$" + strconv.Itoa(hashRounds) + "$salt$hash"

func checkPassword(password string) error {
	if len([]rune(password)) < minPassword || len(password) > maxPassword {
		return refuse(http.StatusBadRequest, "bad_password", minPassword)
	}
	return nil
}

// hashing runs f, which hashes a password, while no more of its kind run than
// there are processors.
func (s *server) hashing(ctx context.Context, f func()) error {
	select {
	case s.hashSlots <- struct{}{}:
		defer func() { <-s.hashSlots }()
		f()
		return nil
	case <-ctx.Done():
		return refuse(http.StatusServiceUnavailable, "busy")
	}
}

// signIn checks a name and a password. Names and addresses that guess have to
// wait; an unknown name is answered like a wrong password, and as late.
func (s *server) signIn(ctx context.Context, address, name, password string) (User, error) {
	if !s.logins.allow("address "+address) || !s.logins.allow("name "+foldName(name)) {
		return User{}, refuse(http.StatusTooManyRequests, "login_too_fast")
	}
	u, encoded, err := s.store.UserByName(ctx, name)
	if errors.Is(err, ErrNotFound) || err == nil && encoded == "" {
		encoded = nobody
	} else if err != nil {
		return User{}, err
	}
	var ok bool
	if err := s.hashing(ctx, func() { ok = len(password) <= maxPassword && passwordMatches(encoded, password) }); err != nil {
		return User{}, err
	}
	if !ok {
		return User{}, refuse(http.StatusForbidden, "bad_login")
	}
	s.logins.forget("name " + foldName(name))
	return u, nil
}

// startSession signs the browser in. It always makes a new token, so that one
// planted before is worth nothing.
func (s *server) startSession(w http.ResponseWriter, u User) error {
	token := rand.Text() // 130 bits
	if err := s.store.CreateSession(u, hashToken(token)); err != nil {
		return err
	}
	s.setCookie(w, sessionCookie, token, cookieLife)
	return nil
}

func (s *server) setCookie(w http.ResponseWriter, name, value string, life time.Duration) {
	http.SetCookie(w, &http.Cookie{
		Name: name, Value: value, Path: s.base + "/", MaxAge: int(life.Seconds()),
		Secure: s.secure, HttpOnly: true, SameSite: http.SameSiteLaxMode,
	})
}

// visitor is who sends a request.
type visitor struct {
	User           // ID 0: nobody is signed in
	session []byte // hash of the token
}

// visitor finds the session of a request. No session, or an old one, is no error.
func (s *server) visitor(r *http.Request) (visitor, error) {
	c, err := r.Cookie(sessionCookie)
	if err != nil {
		return visitor{}, nil
	}
	hash := hashToken(c.Value)
	u, err := s.store.SessionUser(r.Context(), hash)
	if errors.Is(err, ErrNotFound) {
		return visitor{}, nil
	}
	return visitor{u, hash}, err
}

func hashToken(token string) []byte {
	h := sha256.Sum256([]byte(token))
	return h[:]
}

// clientAddress is the address that throttles count: the peer's, or, when that
// is a trusted proxy, the last one in X-Forwarded-For that is not.
func (s *server) clientAddress(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	hops := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for s.trusts(host) && len(hops) > 0 {
		next := strings.TrimSpace(hops[len(hops)-1])
		if _, err := netip.ParseAddr(next); err != nil {
			break
		}
		host, hops = next, hops[:len(hops)-1]
	}
	return host
}

func (s *server) trusts(host string) bool {
	a, err := netip.ParseAddr(host)
	if err != nil {
		return false
	}
	for _, p := range s.trusted {
		if p.Contains(a.Unmap()) {
			return true
		}
	}
	return false
}

// throttle allows every key a burst, and then a rate.
type throttle struct {
	burst, perSecond float64 // perSecond 0: no limit

	mu      sync.Mutex // guards buckets
	buckets map[string]bucket
}

type bucket struct {
	left float64
	at   time.Time // when left was so
}

func newThrottle(burst, perSecond float64) *throttle {
	return &throttle{burst: burst, perSecond: perSecond, buckets: make(map[string]bucket)}
}

func (t *throttle) allow(key string) bool {
	if t.perSecond == 0 {
		return true
	}
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	b, known := t.buckets[key]
	if !known {
		if len(t.buckets) >= maxBuckets {
			t.shrink(now)
		}
		b = bucket{t.burst, now}
	}
	b = bucket{min(t.burst, b.left+t.perSecond*now.Sub(b.at).Seconds()), now}
	ok := b.left >= 1
	if ok {
		b.left--
	}
	t.buckets[key] = b
	return ok
}

// check is allow, as an error.
func (t *throttle) check(key string) error {
	if !t.allow(key) {
		return refuse(http.StatusTooManyRequests, "too_fast")
	}
	return nil
}

// shrink forgets the keys whose buckets are full again, or else any one.
func (t *throttle) shrink(now time.Time) {
	some := ""
	for key, b := range t.buckets {
		some = key
		if b.left+t.perSecond*now.Sub(b.at).Seconds() >= t.burst {
			delete(t.buckets, key)
		}
	}
	if len(t.buckets) >= maxBuckets {
		delete(t.buckets, some)
	}
}

func (t *throttle) forget(key string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.buckets, key)
}

// HasAdmin reports whether anybody can look after this chatd.
func (s *Store) HasAdmin(ctx context.Context) (has bool, err error) {
	err = s.read.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM users WHERE role = 'admin')").Scan(&has)
	return has, err
}

// CreateUser makes an account, or, with an empty encoded password, a guest. It
// fails with ErrTaken if anybody has the name.
func (s *Store) CreateUser(name string, role Role, encoded string) (User, error) {
	u := User{Name: name, Role: role}
	err := s.update(func(w *writer) error { return w.createUser(&u, encoded) })
	return u, err
}

// CreateFirstAdmin is CreateUser for the set-up: it fails with ErrForbidden if
// there is an admin already, however many try at once.
func (s *Store) CreateFirstAdmin(name, encoded string) (User, error) {
	u := User{Name: name, Role: RoleAdmin}
	err := s.update(func(w *writer) error {
		var late bool
		if err := w.queryRow("SELECT EXISTS (SELECT 1 FROM users WHERE role = 'admin')").Scan(&late); err != nil {
			return err
		}
		if late {
			return ErrForbidden
		}
		return w.createUser(&u, encoded)
	})
	return u, err
}

func (w *writer) createUser(u *User, encoded string) error {
	err := w.queryRow(`
		INSERT INTO users (name, key, role, password, joined, first_id)
		VALUES (?, ?, ?, ?, ?, (SELECT coalesce(max(id), 0) FROM log)) ON CONFLICT (key) DO NOTHING RETURNING id`,
		u.Name, foldName(u.Name), u.Role, orNull(encoded), w.now.UnixMilli()).Scan(&u.ID)
	if errors.Is(err, sql.ErrNoRows) {
		return ErrTaken
	}
	return err
}

// SpeakingGuest returns the guest of that name for a socket without a session,
// where anybody may use any name that is nobody's: ErrTaken is for names of
// members, of guests with a session and of those who are deactivated.
func (s *Store) SpeakingGuest(ctx context.Context, name string) (User, error) {
	u, _, err := s.UserByName(ctx, name)
	if errors.Is(err, ErrNotFound) {
		u, err = s.CreateUser(name, RoleGuest, "")
		if errors.Is(err, ErrTaken) { // by another socket, just now
			u, _, err = s.UserByName(ctx, name)
		}
	}
	if err != nil {
		return User{}, err
	}
	var owned bool
	err = s.read.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM sessions WHERE user = ?1) OR EXISTS (SELECT 1 FROM users WHERE id = ?1 AND deactivated IS NOT NULL)", u.ID).Scan(&owned)
	if err == nil && (owned || u.Role != RoleGuest) {
		err = ErrTaken
	}
	return u, err
}

// UserByName returns a user and the encoded password, or ErrNotFound. It is empty
// for guests and for users who may not come in any more.
func (s *Store) UserByName(ctx context.Context, name string) (u User, encoded string, err error) {
	err = s.read.QueryRowContext(ctx, "SELECT id, name, role, iif(deactivated IS NULL, coalesce(password, ''), '') FROM users WHERE key = ?", foldName(name)).
		Scan(&u.ID, &u.Name, &u.Role, &encoded)
	if errors.Is(err, sql.ErrNoRows) {
		err = ErrNotFound
	}
	return u, encoded, err
}

// SetPassword changes a password and ends the user's sessions but the one to keep.
func (s *Store) SetPassword(u User, encoded string, keep []byte) error {
	return s.update(func(w *writer) error {
		if err := w.exec("UPDATE users SET password = ? WHERE id = ?", encoded, u.ID); err != nil {
			return err
		}
		return w.exec("DELETE FROM sessions WHERE user = ? AND hash IS NOT ?", u.ID, keep)
	})
}

// CreateSession also forgets the sessions that have run out.
func (s *Store) CreateSession(u User, hash []byte) error {
	return s.update(func(w *writer) error {
		if err := w.exec("DELETE FROM sessions WHERE seen < ?", w.now.Add(-sessionLife).UnixMilli()); err != nil {
			return err
		}
		return w.exec("INSERT INTO sessions (hash, user, seen) VALUES (?, ?, ?)", hash, u.ID, w.now.UnixMilli())
	})
}

// SessionUser returns who signed in with a session, or ErrNotFound. It keeps
// sessions that are used alive.
func (s *Store) SessionUser(ctx context.Context, hash []byte) (u User, err error) {
	var seen int64
	err = s.read.QueryRowContext(ctx, "SELECT u.id, u.name, u.role, s.seen FROM sessions s JOIN users u ON u.id = s.user WHERE s.hash = ? AND u.deactivated IS NULL", hash).
		Scan(&u.ID, &u.Name, &u.Role, &seen)
	unused := time.Since(time.UnixMilli(seen))
	switch {
	case errors.Is(err, sql.ErrNoRows), err == nil && unused > sessionLife:
		return User{}, ErrNotFound
	case err == nil && unused > sessionTouch:
		err = s.update(func(w *writer) error {
			return w.exec("UPDATE sessions SET seen = ? WHERE hash = ?", w.now.UnixMilli(), hash)
		})
	}
	return u, err
}

func (s *Store) DeleteSession(hash []byte) error {
	return s.update(func(w *writer) error { return w.exec("DELETE FROM sessions WHERE hash = ?", hash) })
}
