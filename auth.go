package main

import (
	"context"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
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
	Bot  bool // a program

	Only int64 // the only room it may see, as its token is for no other; 0: no such limit

	// The rest is only in those whom UserByName and SessionUser return, and in no
	// author of an event.
	Language    string    // of the pages; "": as the browser says
	Notify      string    // about which messages, unless a room says otherwise: one of notifyLevels
	Expires     time.Time // when a guest of a link has to leave; zero: never
	Deactivated bool
	Confined    bool // sees only the rooms that it is a member of
}

var notifyLevels = []string{"all", "mentions", "none"}

// gone reports whether the user may not come in any more.
func (u User) gone() bool {
	return u.Deactivated || !u.Expires.IsZero() && !time.Now().Before(u.Expires)
}

// author is the user as others get it, in an event: the settings are nobody else's.
func (u User) author() User {
	return User{ID: u.ID, Name: u.Name, Role: u.Role, Bot: u.Bot, Only: u.Only, Confined: u.Confined}
}

// limited reports whether there are public rooms that the user may not see.
func (u User) limited() bool { return u.Confined || u.Only != 0 }

// hashRounds of PBKDF2-SHA-256 take about a tenth of a second. Only tests change it.
var hashRounds = 600_000

const (
	maxHashRounds   = 10_000_000 // what we are willing to verify
	minPassword     = 8          // characters
	maxPassword     = 256        // bytes
	maxBuckets      = 10_000     // addresses and names that a throttle remembers
	anonymousGuest  = "游客"       // who speaks on a guest's plain socket, as in the tutorials
	passwordHashing = "pbkdf2_sha256"

	// How often a password may be tried, at once and then per second: see signIn.
	loginBurst, loginPerSecond               = 10, 1.0 / 10 // at one name from one address
	addressLoginBurst, addressLoginPerSecond = 50, 1.0 / 2  // from one address
	nameLoginBurst, nameLoginPerSecond       = 100, 1       // at one name

	connectBurst, connectsPerSecond = 200, 50 // sockets opened from one address
)

// hashPassword encodes a password as Django does, so that accounts can move in
// and out: algorithm$iterations$salt$hash.
func hashPassword(password string) string { return encodePassword(password, rand.Text(), hashRounds) }

func encodePassword(password, salt string, rounds int) string {
	key, err := pbkdf2.Key(sha256.New, password, []byte(salt), rounds, sha256.Size)
	if err != nil { // only for parameters that FIPS 140 forbids
		panic(err)
	}
	return fmt.Sprintf("%s$%d$%s$%s", passwordHashing, rounds, salt, base64.StdEncoding.EncodeToString(key))
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

// hash is hashPassword, when it is its turn.
func (s *server) hash(ctx context.Context, password string) (encoded string, err error) {
	err = s.hashing(ctx, func() { encoded = hashPassword(password) })
	return encoded, err
}

// signIn checks a name and a password. An unknown name, and that of a user who may
// not come in, is answered like a wrong password, and as late. Who guesses has to wait:
//
//  1. An address has few tries at one name. That stops who guesses from one place,
//     and costs nobody else anything: the name's owner has tries of their own.
//  2. An address has more tries in all, as a whole office may share it. So a few
//     passwords tried at every name do not get round 1.
//  3. A name has many tries from all addresses together. That slows who guesses from
//     many places, and takes many to exhaust, as 1 and 2 are counted first.
//  4. Who does exhaust it, and goes on, still does not lock the owner out: 3 is not
//     for addresses that the name is signed in from. 1 and 2 are for them too.
//
// Limits 1 to 3 are the same for names that do not exist. A right password gives
// back only the tries of 1: else the owner's visits would be gifts to who guesses
// elsewhere, and a login of one's own a way round 2.
func (s *server) signIn(ctx context.Context, address, name, password string) (User, error) {
	if len(name) > maxUserName*utf8.UTFMax {
		name = "" // is nobody's either, and takes no memory in throttles
	}
	network, key := networkOf(address), foldName(name)
	pair := network + " at " + key
	if !s.addressLogins.allow(network) || !s.logins.allow(pair) {
		return User{}, refuse(http.StatusTooManyRequests, "login_too_fast")
	}
	if !s.nameLogins.allow(key) {
		switch known, err := s.store.SignedInFrom(ctx, name, address); {
		case err != nil:
			return User{}, err
		case !known:
			return User{}, refuse(http.StatusTooManyRequests, "login_too_fast")
		}
	}
	u, encoded, err := s.store.UserByName(ctx, name)
	if errors.Is(err, ErrNotFound) || err == nil && (encoded == "" || u.Bot || u.gone()) {
		encoded = fmt.Sprintf("%s$%d$salt$hash", passwordHashing, hashRounds) // is nobody's, and takes as long
	} else if err != nil {
		return User{}, err
	}
	var ok bool
	err = s.hashing(ctx, func() { ok = len(password) <= maxPassword && passwordMatches(encoded, password) })
	if err == nil && !ok {
		err = refuse(http.StatusForbidden, "bad_login")
	}
	if err != nil {
		return User{}, err
	}
	s.logins.forget(pair)
	return u, nil
}

// visitor is who sends a request.
type visitor struct {
	User           // ID 0: nobody is signed in
	session []byte // hash of the token, if it is by a session
	proxied bool   // a proxy says who it is
	token   int64  // id of the token, if it is by one
	scope   string // what that is good for
}

// visitor finds who sends a request: whose token it shows, or signs with, or whom a
// proxy says, or else who signed in. No session, or an old one, is no error, but a bad token is.
func (s *server) visitor(r *http.Request) (visitor, error) {
	if secret, shown := bearer(r); shown {
		v, err := s.store.TokenVisitor(r.Context(), hashToken(secret))
		return v, instead(err, ErrNotFound, refuse(http.StatusUnauthorized, "bad_token"))
	}
	if signature := r.Header.Get("X-Hub-Signature-256"); signature != "" {
		return s.signer(r, signature)
	}
	if name := s.proxied(r); name != "" {
		u, err := s.proxiedUser(r.Context(), name)
		return visitor{User: u, proxied: true}, err
	}
	c, err := r.Cookie(s.cookieName())
	if err != nil {
		return visitor{}, nil
	}
	hash := hashToken(c.Value)
	u, err := s.store.SessionUser(r.Context(), hash)
	if errors.Is(err, ErrNotFound) {
		return visitor{}, nil
	}
	return visitor{User: u, session: hash}, err
}

// proxied returns what the header of -auth-header says, if its sender may say so.
func (s *server) proxied(r *http.Request) string {
	said := strings.Join(r.Header.Values(s.authHeader), ",") // two names make none
	if s.authHeader == "" || said == "" {
		return ""
	}
	if s.trusts(peerOf(r)) {
		return said
	}
	if s.complaints.allow("auth-header") {
		s.log.WarnContext(r.Context(), "-auth-header ignored: sender is not in -trust", "peer", r.RemoteAddr)
	}
	return ""
}

// proxiedUser returns the member that a proxy vouches for; with -auth-create one
// who is new is made. Guests are not meant: anybody may take a guest's name.
func (s *server) proxiedUser(ctx context.Context, said string) (u User, err error) {
	name, err := userName(said)
	switch {
	case err != nil:
		err = ErrNotFound
	case s.authCreate:
		u, err = s.store.UserOrNew(ctx, name, RoleMember)
	default:
		u, _, err = s.store.UserByName(ctx, name)
	}
	if errors.Is(err, ErrNotFound) || err == nil && (u.Role == RoleGuest || u.Bot || u.gone()) {
		err = refuse(http.StatusForbidden, "proxy_unknown")
	}
	if err != nil {
		return User{}, err
	}
	return u, nil
}

// clientAddress is the address that throttles count: the peer's, or, when that
// is a trusted proxy, the last one in X-Forwarded-For that is not.
func (s *server) clientAddress(r *http.Request) string {
	host := peerOf(r)
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
		return host == unixPeer
	}
	return within(s.trusted, a.Unmap())
}

func within(networks []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(networks, func(p netip.Prefix) bool { return p.Contains(a) })
}

// networkOf is what a throttle counts an address as: who has one of IPv6 has the
// whole /64.
func networkOf(address string) string {
	a, err := netip.ParseAddr(address)
	if err != nil || a.Unmap().Is4() {
		return address
	}
	return netip.PrefixFrom(a.WithZone(""), 64).Masked().String()
}

// throttle allows every key a burst, and then a rate.
type throttle struct {
	burst, every time.Duration // that the whole burst and each single one take to come back; 0: no limit

	mu   sync.Mutex           // guards full
	full map[string]time.Time // when the key has its whole burst again
}

func newThrottle(burst, perSecond float64) *throttle {
	t := &throttle{full: make(map[string]time.Time)}
	if perSecond != 0 {
		second := float64(time.Second)
		t.burst, t.every = time.Duration(burst*second/perSecond), time.Duration(second/perSecond)
	}
	return t
}

func (t *throttle) allow(key string) bool {
	if t.every == 0 {
		return true
	}
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	full, known := t.full[key]
	if !known && len(t.full) >= maxBuckets {
		t.shrink(now)
	}
	if full.Before(now) {
		full = now
	}
	full = full.Add(t.every)
	if full.Sub(now) > t.burst {
		return false
	}
	t.full[key] = full
	return true
}

// check is allow, as an error.
func (t *throttle) check(key string) error {
	if !t.allow(key) {
		return refuse(http.StatusTooManyRequests, "too_fast")
	}
	return nil
}

// shrink forgets the keys that have their whole burst, or else any one.
func (t *throttle) shrink(now time.Time) {
	maps.DeleteFunc(t.full, func(_ string, full time.Time) bool { return !full.After(now) })
	for key := range t.full {
		if len(t.full) < maxBuckets {
			return
		}
		delete(t.full, key)
	}
}

func (t *throttle) forget(key string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.full, key)
}

const hasAdmin = "SELECT EXISTS (SELECT 1 FROM users WHERE role = 'admin')"

// HasAdmin reports whether anybody can look after this chatd.
func (s *Store) HasAdmin(ctx context.Context) (has bool, err error) {
	err = s.queryRow(ctx, hasAdmin).Scan(&has)
	return has, err
}

// CreateUser makes a user. With an empty encoded password nobody can sign in as
// that one. It fails with ErrTaken if anybody has the name.
func (s *Store) CreateUser(name string, role Role, encoded string) (User, error) {
	u := User{Name: name, Role: role}
	err := s.update(func(w *writer) error { return w.createUser(&u, encoded) })
	return u, err
}

// CreateFirstAdmin is CreateUser for the set-up: it refuses if there is an admin
// already, however many try at once.
func (s *Store) CreateFirstAdmin(name, encoded string) (User, error) {
	u := User{Name: name, Role: RoleAdmin}
	err := s.update(func(w *writer) error {
		var late bool
		err := w.queryRow(hasAdmin).Scan(&late)
		if err == nil && late {
			err = refuse(http.StatusGone, "setup_used")
		}
		if err != nil {
			return err
		}
		return w.createUser(&u, encoded)
	})
	return u, err
}

func (w *writer) createUser(u *User, encoded string) error {
	err := w.queryRow(`
		INSERT INTO users (name, key, role, bot, confined, expires, password, joined, first_id)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, (SELECT coalesce(max(id), 0) FROM log)) ON CONFLICT (key) DO NOTHING RETURNING id`,
		u.Name, foldName(u.Name), u.Role, u.Bot, u.Confined, timeOrNull(u.Expires), orNull(encoded), w.now.UnixMilli()).Scan(&u.ID)
	return instead(err, ErrNotFound, ErrTaken)
}

// UserOrNew returns the user of that name, who is made, without a password, if need be.
func (s *Store) UserOrNew(ctx context.Context, name string, role Role) (User, error) {
	u, _, err := s.UserByName(ctx, name)
	if errors.Is(err, ErrNotFound) {
		if _, err = s.CreateUser(name, role, ""); err == nil || errors.Is(err, ErrTaken) { // taken by another request, just now
			u, _, err = s.UserByName(ctx, name)
		}
	}
	return u, err
}

// SpeakingGuest returns the guest of that name for a socket without a session,
// where anybody may use any name that is nobody's: ErrTaken is for names of
// members, of guests with a session, and of those who may not come in any more.
func (s *Store) SpeakingGuest(ctx context.Context, name string) (User, error) {
	u, err := s.UserOrNew(ctx, name, RoleGuest)
	if err != nil {
		return User{}, err
	}
	var owned bool
	err = s.queryRow(ctx, "SELECT EXISTS (SELECT 1 FROM sessions WHERE user = ?)", u.ID).Scan(&owned)
	if err == nil && (owned || u.Bot || u.Role != RoleGuest || u.gone()) {
		err = ErrTaken
	}
	return u, err
}

// UserByName returns a user and the encoded password, or ErrNotFound.
func (s *Store) UserByName(ctx context.Context, name string) (u User, encoded string, err error) {
	err = s.queryRow(ctx, "SELECT coalesce(u.password, ''), "+userColumns+" FROM users u WHERE u.key = ?", foldName(name)).Scan(u.columns(&encoded)...)
	return u, encoded, err
}

// userColumns are those of users u that User.columns scans, after others.
const userColumns = "u.id, u.name, u.role, u.bot, coalesce(u.language, ''), u.notify, u.expires, u.deactivated IS NOT NULL, u.confined"

func (u *User) columns(others ...any) []any {
	return append(others, &u.ID, &u.Name, &u.Role, &u.Bot, &u.Language, &u.Notify, millis{&u.Expires}, &u.Deactivated, &u.Confined)
}

// SetPassword changes a password and ends the user's sessions but the one to keep.
func (s *Store) SetPassword(u User, encoded string, keep []byte) error {
	return s.update(func(w *writer) error { return w.setPassword(u, encoded, keep) })
}

func (w *writer) setPassword(u User, encoded string, keep []byte) error {
	return w.exec(`
		UPDATE users SET password = ?1 WHERE id = ?2;
		DELETE FROM sessions WHERE user = ?2 AND hash IS NOT ?3`, encoded, u.ID, keep)
}
