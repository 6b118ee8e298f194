package main

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"net/http"
	"strings"
	"time"
)

// What a token is good for.
const (
	scopeRead = "read"
	scopePost = "post"
	scopeBoth = "both"
)

const (
	tokenTouch   = time.Minute // how exactly we know when a token was used last
	maxTokenLife = 10 * 366 * 24 * time.Hour
	maxTokens    = 100 // that work, of one user
	maxLabel     = 64  // characters
)

// Token lets a script in, as a person or as a bot. Users and rooms are named; who
// made it on the command line has no name.
type Token struct {
	ID      int64
	User    string
	Bot     bool
	Room    string // the only one it is for; "": all that the user sees
	Scope   string
	Label   string
	Creator string
	Created time.Time
	Expires time.Time // zero: never
	Used    time.Time // last, to within tokenTouch; zero: never
	Revoked bool
	Works   bool // now
}

// Reads and Posts say what its scope allows.
func (t Token) Reads() bool { return t.Scope != scopePost }
func (t Token) Posts() bool { return t.Scope != scopeRead }

// CreateToken keeps a token, of which it reads user, room, scope, label, creator
// and expires, and returns what its holder has to show, which nobody can find out
// later. With bot, a user of that name who is a bot, or nobody yet, gets it, and a
// bot becomes a member of the room if that is private. It fails with ErrNotFound
// if user, room or creator is not there or not active, and with ErrTaken if the bot's name is a person's.
func (s *Store) CreateToken(t Token) (secret string, err error) {
	switch {
	case t.Scope != scopeRead && t.Scope != scopePost && t.Scope != scopeBoth,
		!t.Expires.IsZero() && (!t.Expires.After(time.Now()) || time.Until(t.Expires) > maxTokenLife),
		len([]rune(t.Label)) > maxLabel:
		return "", refuse(http.StatusBadRequest, "bad_token_form", maxLabel)
	}
	secret = rand.Text() // 130 bits
	return secret, s.update(func(w *writer) error { return w.createToken(t, secret) })
}

func (w *writer) createToken(t Token, secret string) error {
	u, err := scanUser(w.queryRow("SELECT "+userColumns+" FROM users u WHERE u.key = ?", foldName(t.User)))
	if t.Bot && errors.Is(err, ErrNotFound) {
		u, err = w.createBot(t.User)
	}
	switch {
	case err != nil:
		return err
	case u.Bot != t.Bot:
		return ErrTaken
	case u.gone() || u.Role == RoleGuest:
		return ErrNotFound
	}
	var room Room
	if t.Room != "" {
		if room, err = w.roomByName(t.Room); err != nil {
			return err
		}
		if u.Bot && room.Private {
			if err := w.addMember(room, u); err != nil {
				return err
			}
		}
	}
	var many int
	if err := w.queryRow("SELECT count(*) FROM tokens t LEFT JOIN users c ON c.id = t.creator JOIN users u ON u.id = t.user WHERE t.user = ?2 AND "+tokenWorks, w.now.UnixMilli(), u.ID).Scan(&many); err != nil {
		return err
	}
	if many >= maxTokens {
		return refuse(http.StatusConflict, "many_tokens", maxTokens)
	}
	var expires any
	if !t.Expires.IsZero() {
		expires = t.Expires.UnixMilli()
	}
	var found bool
	err = w.queryRow(`
		INSERT INTO tokens (hash, user, room, scope, label, creator, created, expires)
		VALUES (?, ?, ?, ?, ?, (SELECT id FROM users WHERE key = ?6 AND deactivated IS NULL), ?, ?) RETURNING (creator IS NOT NULL) = (?6 != '')`,
		hashToken(secret), u.ID, orNull(room.ID), t.Scope, t.Label, foldName(t.Creator), w.now.UnixMilli(), expires).Scan(&found)
	if err == nil && !found {
		err = ErrNotFound
	}
	return err
}

// createBot makes a user who has no password and comes in by tokens only.
func (w *writer) createBot(name string) (User, error) {
	u := User{Name: name, Role: RoleMember, Bot: true}
	if err := w.createUser(&u, ""); err != nil {
		return u, err
	}
	return u, w.exec("UPDATE users SET bot = 1 WHERE id = ?", u.ID)
}

// tokenWorks has the time as ?1. A token works no longer than whoever made it may
// come in: who has been shown out keeps no way back.
const tokenWorks = `(t.revoked IS NULL AND coalesce(t.expires > ?1, 1) AND c.deactivated IS NULL
	AND u.deactivated IS NULL AND coalesce(u.expires > ?1, 1))`

// selectTokens begins every query for tokens, with the time as ?1; scanToken reads its rows.
const selectTokens = `
	SELECT t.id, u.name, u.bot, coalesce(r.name, ''), t.scope, t.label, coalesce(c.name, ''), t.created,
		coalesce(t.expires, 0), coalesce(t.used, 0), t.revoked IS NOT NULL, ` + tokenWorks + ` AS works
	FROM tokens t JOIN users u ON u.id = t.user LEFT JOIN rooms r ON r.id = t.room LEFT JOIN users c ON c.id = t.creator `

func scanToken(scan func(...any) error) (t Token, err error) {
	var created, expires, used int64
	err = scan(&t.ID, &t.User, &t.Bot, &t.Room, &t.Scope, &t.Label, &t.Creator, &created, &expires, &used, &t.Revoked, &t.Works)
	t.Created = time.UnixMilli(created)
	if expires != 0 {
		t.Expires = time.UnixMilli(expires)
	}
	if used != 0 {
		t.Used = time.UnixMilli(used)
	}
	return t, err
}

// Tokens returns those that a condition on t, u, r and c holds for, the newest first.
// Its parameters begin with ?2.
func (s *Store) Tokens(ctx context.Context, where string, args ...any) (all []Token, err error) {
	rows, err := s.read.QueryContext(ctx, selectTokens+"WHERE "+where+" ORDER BY t.id DESC", append([]any{time.Now().UnixMilli()}, args...)...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		t, err := scanToken(rows.Scan)
		if err != nil {
			return nil, err
		}
		all = append(all, t)
	}
	return all, rows.Err()
}

// RevokeToken makes a token useless. It fails with ErrNotFound if there is none
// with that id that has not been revoked.
func (s *Store) RevokeToken(id int64) error {
	return s.update(func(w *writer) error {
		err := w.queryRow("UPDATE tokens SET revoked = ? WHERE id = ? AND revoked IS NULL RETURNING id", w.now.UnixMilli(), id).Scan(&id)
		if errors.Is(err, sql.ErrNoRows) {
			err = ErrNotFound
		}
		return err
	})
}

// bearer returns the token that a request shows (RFC 6750 §2.1), if any.
func bearer(r *http.Request) (secret string, shown bool) {
	scheme, secret, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return strings.TrimSpace(secret), strings.EqualFold(scheme, "Bearer")
}

// TokenVisitor returns who comes in by the token with that hash, or ErrNotFound.
func (s *Store) TokenVisitor(ctx context.Context, hash []byte) (v visitor, err error) {
	var only, expires, used int64
	v.User, err = scanUser(s.read.QueryRowContext(ctx, "SELECT "+userColumns+`, t.id, coalesce(t.room, 0), t.scope, coalesce(t.expires, 0), coalesce(t.used, 0)
		FROM tokens t JOIN users u ON u.id = t.user LEFT JOIN users c ON c.id = t.creator WHERE t.hash = ?2 AND `+tokenWorks,
		time.Now().UnixMilli(), hash), &v.token, &only, &v.scope, &expires, &used)
	if err != nil {
		return visitor{}, err
	}
	v.Only = only
	if end := time.UnixMilli(expires); expires != 0 && (v.Expires.IsZero() || end.Before(v.Expires)) {
		v.Expires = end
	}
	if time.Since(time.UnixMilli(used)) > tokenTouch {
		err = s.update(func(w *writer) error {
			return w.exec("UPDATE tokens SET used = ? WHERE id = ?", w.now.UnixMilli(), v.token)
		})
	}
	return v, err
}

// may reports whether v may do what a scope allows. Who has no token may.
func (v visitor) may(scope string) bool {
	return v.token == 0 || v.scope == scopeBoth || v.scope == scope
}
