package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
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
// later.
//
//  1. With bot, a user of that name who is a bot, or nobody yet, gets it: ErrTaken if
//     that is somebody else, or if creator has made none of the bot's tokens and is
//     no administrator. The bot becomes a member of the room if that is private.
//  2. ErrNotFound is for a user, room or creator who is not there or not active, and
//     for a room that the user does not see; ErrForbidden for a bot in direct messages.
func (s *Store) CreateToken(t Token) (secret string, err error) {
	switch {
	case t.Scope != scopeRead && t.Scope != scopePost && t.Scope != scopeBoth,
		!t.Expires.IsZero() && (!t.Expires.After(time.Now()) || time.Until(t.Expires) > maxTokenLife),
		len([]rune(t.Label)) > maxLabel, strings.ContainsFunc(t.Label, func(r rune) bool { return !unicode.IsGraphic(r) }):
		return "", refuse(http.StatusBadRequest, "bad_token_form", maxLabel, int(maxTokenLife.Hours()/24))
	}
	secret = rand.Text() // 130 bits
	return secret, s.update(func(w *writer) error { return w.createToken(t, secret) })
}

func (w *writer) createToken(t Token, secret string) (err error) {
	var creator User
	if t.Creator != "" {
		if creator, err = w.userByName(t.Creator); err == nil && creator.gone() {
			err = ErrNotFound
		}
		if err != nil {
			return err
		}
	}
	u, err := w.tokenUser(t, creator)
	if err != nil {
		return err
	}
	room, err := w.tokenRoom(t, u)
	if err != nil {
		return err
	}
	var many int
	if err := w.queryRow("SELECT count(*) FROM tokens t JOIN users u ON u.id = t.user LEFT JOIN users c ON c.id = t.creator WHERE t.user = ?2 AND "+tokenWorks,
		w.now.UnixMilli(), u.ID).Scan(&many); err != nil {
		return err
	}
	if many >= maxTokens {
		return refuse(http.StatusConflict, "many_tokens", maxTokens)
	}
	err = w.exec("INSERT INTO tokens (hash, user, room, scope, label, creator, created, expires) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
		hashToken(secret), u.ID, orNull(room.ID), t.Scope, t.Label, orNull(creator.ID), w.now.UnixMilli(), timeOrNull(t.Expires))
	if err == nil {
		err = w.auditToken(creator, u, "token.create", room.Name)
	}
	return err
}

func (w *writer) userByName(name string) (u User, err error) {
	err = w.queryRow("SELECT "+userColumns+" FROM users u WHERE u.key = ?", foldName(name)).Scan(u.columns()...)
	return u, err
}

// tokenUser returns whose token t is to be, and makes the bot if need be.
func (w *writer) tokenUser(t Token, creator User) (u User, err error) {
	u, err = w.userByName(t.User)
	switch {
	case t.Bot && errors.Is(err, ErrNotFound):
		return w.createBot(t.User)
	case err != nil:
	case !t.Bot && (u.Bot || u.Role == RoleGuest || u.gone()):
		return u, ErrNotFound
	case t.Bot && (!u.Bot || u.gone()):
		return u, ErrTaken
	case t.Bot && creator.ID != 0 && creator.Role != RoleAdmin:
		err = w.queryRow("SELECT 1 FROM tokens WHERE user = ? AND creator = ?", u.ID, creator.ID).Scan(new(int))
		err = instead(err, ErrNotFound, ErrTaken)
	}
	return u, err
}

// tokenRoom returns the only room that t is to be for, if any, where u may speak.
func (w *writer) tokenRoom(t Token, u User) (room Room, err error) {
	if t.Room == "" {
		return room, nil
	}
	if room, err = w.roomByName(t.Room); err != nil {
		return room, err
	}
	switch {
	case u.Bot && room.direct():
		err = ErrForbidden
	case u.Bot && room.Private:
		err = w.changeMember(KindJoin, room, u)
	}
	return room, cmp.Or(err, w.checkRoom(&Event{Room: room, Author: u}))
}

// auditToken writes down what administrators do with bots, and the command line with anybody.
func (w *writer) auditToken(by, u User, action, detail string) error {
	if by.ID != 0 && (by.Role != RoleAdmin || !u.Bot) {
		return nil
	}
	return w.audit(by, action, u.Name, detail)
}

// createBot makes a user who has no password and comes in by tokens only.
func (w *writer) createBot(name string) (User, error) {
	u := User{Name: name, Role: RoleMember, Bot: true}
	err := w.createUser(&u, "")
	return u, err
}

// tokenWorks has the time as ?1. A token works no longer than whoever made it may
// come in: who has been shown out keeps no way back.
const tokenWorks = `(t.revoked IS NULL AND coalesce(t.expires > ?1, 1) AND c.deactivated IS NULL
	AND u.deactivated IS NULL AND coalesce(u.expires > ?1, 1))`

// selectTokens begins every query for tokens, with the time as ?1. Token.columns scans its rows.
const selectTokens = `
	SELECT t.id, u.name, u.bot, coalesce(r.name, ''), t.scope, t.label, coalesce(c.name, ''), t.created, t.expires, t.used,
		t.revoked IS NOT NULL, ` + tokenWorks + ` AS works
	FROM tokens t JOIN users u ON u.id = t.user LEFT JOIN rooms r ON r.id = t.room LEFT JOIN users c ON c.id = t.creator `

func (t *Token) columns() []any {
	return []any{&t.ID, &t.User, &t.Bot, &t.Room, &t.Scope, &t.Label, &t.Creator, millis{&t.Created}, millis{&t.Expires}, millis{&t.Used}, &t.Revoked, &t.Works}
}

// Tokens returns those that a condition on t, u, r and c holds for, the newest first.
// Its parameters begin with ?2.
func (s *Store) Tokens(ctx context.Context, where string, args ...any) ([]Token, error) {
	return collect(ctx, s.read, (*Token).columns, selectTokens+"WHERE "+where+" ORDER BY t.id DESC", append([]any{time.Now().UnixMilli()}, args...)...)
}

// RevokeToken makes a token useless: one of by's own or of a bot for room, or any
// one if by is the zero User, the command line. It fails with ErrNotFound if there
// is none with that id that has not been revoked.
func (s *Store) RevokeToken(id int64, by User, room Room) error {
	return s.update(func(w *writer) error {
		var u User
		err := w.queryRow(`
			UPDATE tokens SET revoked = ?1
			WHERE id = ?2 AND revoked IS NULL AND (?3 = 0 OR user = ?3 OR room = ?4 AND user IN (SELECT id FROM users WHERE bot))
			RETURNING (SELECT name FROM users WHERE id = user), (SELECT bot FROM users WHERE id = user)`, w.now.UnixMilli(), id, by.ID, room.ID).Scan(&u.Name, &u.Bot)
		if err != nil {
			return err
		}
		return w.auditToken(by, u, "token.revoke", fmt.Sprint("#", id))
	})
}

// bearer returns the token that a request shows (RFC 6750 §2.1), if any.
func bearer(r *http.Request) (secret string, shown bool) {
	scheme, secret, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return strings.TrimSpace(secret), strings.EqualFold(scheme, "Bearer")
}

// TokenVisitor returns who comes in by the token with that hash, or ErrNotFound.
func (s *Store) TokenVisitor(ctx context.Context, hash []byte) (v visitor, err error) {
	var expires, used time.Time
	err = s.queryRow(ctx, "SELECT t.id, coalesce(t.room, 0), t.scope, t.expires, t.used, "+userColumns+`
		FROM tokens t JOIN users u ON u.id = t.user LEFT JOIN users c ON c.id = t.creator WHERE t.hash = ?2 AND `+tokenWorks,
		time.Now().UnixMilli(), hash).Scan(v.columns(&v.token, &v.Only, &v.scope, millis{&expires}, millis{&used})...)
	if err != nil {
		return visitor{}, err
	}
	if !expires.IsZero() && (v.Expires.IsZero() || expires.Before(v.Expires)) {
		v.Expires = expires
	}
	if time.Since(used) > tokenTouch {
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

// madeToken is what the page shows about a token that was just made.
type madeToken struct {
	Secret string   // nobody sees it again
	Lines  []string // that use it, for a shell
}

// handleTokens makes or revokes a token of the visitor's own.
func (s *server) handleTokens(w http.ResponseWriter, r *http.Request, v visitor) error {
	if v.Role == RoleGuest {
		return ErrForbidden
	}
	p, err := s.changeTokens(r, v, Token{User: v.Name, Room: strings.TrimSpace(r.PostFormValue("room"))}, Room{})
	return s.showAccount(w, r, v, err, p)
}

// handleBots makes or revokes a token of a bot for a room.
func (s *server) handleBots(w http.ResponseWriter, r *http.Request, v visitor, room Room) error {
	if !room.managedBy(v.User) {
		return ErrForbidden
	}
	p, err := s.changeTokens(r, v, Token{Bot: true, Room: room.Name}, room)
	return s.showAbout(w, r, v, room, err, p)
}

// changeTokens does what the form of a page with tokens asks: it makes t with what
// is in the form, or revokes a token, as RevokeToken does, and closes its sockets. p has
// the new token, or the form.
func (s *server) changeTokens(r *http.Request, v visitor, t Token, room Room) (p page, err error) {
	p.Form = formOf(r, "username", "label", "scope", "room", "days")
	if r.PostFormValue("action") == "revoke" {
		id, _, err := numberOf(r, "id")
		if err == nil {
			err = s.store.RevokeToken(id, v.User, room)
		}
		if err == nil {
			s.hub.Drop(func(m *member) bool { return m.token == id })
		}
		return p, err
	}
	if t.Bot {
		if t.User, err = ownName(r); err != nil {
			return p, err
		}
	}
	days, limited, err := numberOf(r, "days")
	if err != nil {
		return p, err
	}
	if limited {
		t.Expires = time.Now().AddDate(0, 0, int(min(days, 10_000)))
	}
	if room, err := s.store.Room(t.Room); err == nil { // as it is spelt, for the lines
		t.Room = room.Name
	}
	t.Scope, t.Label, t.Creator = r.PostFormValue("scope"), strings.TrimSpace(r.PostFormValue("label")), v.Name
	if err := s.posts.check("tokens of user " + v.Name); err != nil {
		return p, err
	}
	secret, err := s.store.CreateToken(t)
	if err != nil {
		return p, instead(err, ErrNotFound, refuse(http.StatusNotFound, "unknown_room"))
	}
	curl := fmt.Sprintf(`curl -H "Authorization: Bearer %s" `, secret)
	address := s.urlFor(r) + roomPath(cmp.Or(t.Room, lobby))
	made := &madeToken{Secret: secret}
	if t.Posts() {
		made.Lines = append(made.Lines, curl+"-d hello "+address)
	}
	if t.Reads() {
		made.Lines = append(made.Lines, curl+"-N "+address)
	}
	return page{Made: made}, nil
}

// token is `chatd token`: it works on the database, whether or not chatd runs.
func token(args []string, stdout io.Writer) error {
	flags := newFlags("chatd token")
	data := flags.String("data", "./data", "")
	days := flags.Int("days", 0, "")
	person, bot := flags.String("user", "", ""), flags.String("bot", "", "")
	var t Token
	flags.StringVar(&t.Room, "room", "", "")
	flags.StringVar(&t.Scope, "scope", scopeBoth, "")
	flags.StringVar(&t.Label, "label", "", "")
	words, err := parseWords(flags, args)
	if err != nil {
		return err
	}
	command := strings.Join(words, " ")
	id, isRevoke := strings.CutPrefix(command, "revoke ")
	if command != "list" && !isRevoke && (command != "add" || (*person == "") == (*bot == "")) {
		return errors.New("say chatd token add -user NAME, chatd token add -bot NAME, chatd token list or chatd token revoke ID")
	}
	store, err := OpenStore(*data, nil)
	if err != nil {
		return err
	}
	defer store.Close()
	switch {
	case command == "list":
		return listTokens(store, stdout)
	case isRevoke:
		number, err := strconv.ParseInt(id, 10, 64)
		if err == nil {
			err = store.RevokeToken(number, User{}, Room{})
		}
		if err != nil {
			err = fmt.Errorf("token %s: %w", id, err)
		}
		return err
	}
	if t.User, t.Bot = cmp.Or(*person, *bot), *bot != ""; t.Bot {
		if t.User, err = userName(*bot); err != nil {
			return fmt.Errorf("%q cannot be a user's name", *bot)
		}
	}
	if *days != 0 {
		t.Expires = time.Now().AddDate(0, 0, *days)
	}
	secret, err := store.CreateToken(t)
	if p, ok := errors.AsType[*problem](err); ok && p.code == "bad_token_form" {
		return fmt.Errorf("a token has -scope read, post or both, a -label of at most %d characters and at most %d -days", p.args...)
	}
	if errors.Is(err, ErrNotFound) && t.Room != "" {
		return fmt.Errorf("token for %s: there is no room %s that it sees; enter the room once, and it is there", t.User, t.Room)
	}
	if err != nil {
		return fmt.Errorf("token for %s: %w", t.User, err)
	}
	_, err = fmt.Fprintln(stdout, secret)
	return err
}

func listTokens(store *Store, stdout io.Writer) error {
	all, err := store.Tokens(context.Background(), "1")
	if err != nil {
		return err
	}
	date := func(t time.Time, layout string) string {
		if t.IsZero() {
			return "never"
		}
		return t.Local().Format(layout)
	}
	table := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "ID\tWHO\tROOM\tSCOPE\tLABEL\tMADE\tUSED\tEXPIRES\tSTATE")
	for _, t := range all {
		state := "works"
		switch {
		case t.Revoked:
			state = "revoked"
		case !t.Works:
			state = "ended"
		}
		who := t.User
		if t.Bot {
			who += " (bot)"
		}
		fmt.Fprintf(table, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", t.ID, who, cmp.Or(t.Room, "all"), t.Scope, cmp.Or(t.Label, "-"),
			date(t.Created, time.DateOnly), date(t.Used, "2006-01-02 15:04"), date(t.Expires, time.DateOnly), state)
	}
	return table.Flush()
}
