package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// What an invite is for.
const (
	inviteAccount = "account" // makes an account
	inviteReset   = "reset"   // gives an account a new password
	inviteGuest   = "guest"   // makes a guest of one room
)

const (
	maxInviteUses   = 1000
	maxInviteLife   = 366 * 24 * time.Hour
	inviteBurst     = 60 // links that an address may open at once: a whole office has one
	invitePerSecond = 1
)

// Invite is a link that lets somebody in. Users and rooms are named; who made it
// on the command line has no name.
type Invite struct {
	ID      int64
	Kind    string
	Role    Role   // of who uses it
	User    string // inviteReset: whose password
	Room    string // inviteGuest: the only room
	Creator string
	Created time.Time
	Expires time.Time
	Uses    int // left
	Revoked bool
	Works   bool     // now
	UsedBy  nameList // oldest first
}

// nameList scans a text with a line for each name; none has a newline in it.
type nameList []string

func (l *nameList) Scan(value any) error {
	*l = nil
	if text, _ := value.(string); text != "" {
		*l = strings.Split(text, "\n")
	}
	return nil
}

// CreateInvite keeps an invite, of which it reads kind, role, user, room, creator
// and uses, and returns the token for its link, which nobody can find out later.
// It fails with ErrNotFound if user, who must be able to sign in, room or creator
// is not there.
func (s *Store) CreateInvite(in Invite, ttl time.Duration) (token string, err error) {
	switch {
	case in.Kind == inviteAccount && (in.Role == RoleMember || in.Role == RoleAdmin):
	case in.Kind == inviteReset:
		in.Role, in.Uses = RoleMember, 1
	case in.Kind == inviteGuest:
		in.Role = RoleGuest
	default:
		return "", refuse(http.StatusBadRequest, "bad_request")
	}
	if in.Uses < 1 || in.Uses > maxInviteUses || ttl <= 0 || ttl > maxInviteLife {
		return "", refuse(http.StatusBadRequest, "bad_invite", maxInviteUses, int(maxInviteLife.Hours()/24))
	}
	token = rand.Text() // 130 bits
	return token, s.update(func(w *writer) error {
		var found bool
		var creator User
		err := w.queryRow(`
			INSERT INTO invites (hash, kind, role, user, room, creator, created, expires, uses) VALUES (?1, ?2, ?3,
				(SELECT id FROM users WHERE key = ?4 AND ?2 = 'reset' AND role != 'guest' AND NOT bot AND deactivated IS NULL),
				(SELECT id FROM rooms WHERE key = ?5 AND ?2 = 'guest'),
				(SELECT id FROM users WHERE key = ?6), ?7, ?8, ?9)
			RETURNING (user IS NOT NULL) = (kind = 'reset') AND (room IS NOT NULL) = (kind = 'guest') AND (creator IS NOT NULL) = (?6 != ''), coalesce(creator, 0)`,
			hashToken(token), in.Kind, in.Role, foldName(in.User), foldName(in.Room), foldName(in.Creator),
			w.now.UnixMilli(), w.now.Add(ttl).UnixMilli(), in.Uses).Scan(&found, &creator.ID)
		if err == nil && !found {
			err = ErrNotFound
		}
		if err != nil {
			return err
		}
		return w.audit(creator, "invite.create", cmp.Or(in.User, in.Room, string(in.Role)), fmt.Sprint(in.Kind, " × ", in.Uses))
	})
}

// selectInvites has the time as ?1. An invite works no longer than its creator is
// administrator, or who has been shown out could come back by it.
const selectInvites = `
	SELECT i.id, i.kind, i.role, coalesce(u.name, ''), coalesce(r.name, ''), coalesce(c.name, ''), i.created, i.expires, i.uses,
		i.revoked IS NOT NULL,
		i.revoked IS NULL AND i.uses > 0 AND i.expires > ?1 AND u.deactivated IS NULL
			AND (c.id IS NULL OR c.role = 'admin' AND c.deactivated IS NULL) AS works,
		coalesce((SELECT group_concat(p.name, char(10) ORDER BY x.rowid) FROM invite_uses x JOIN users p ON p.id = x.user WHERE x.invite = i.id), '')
	FROM invites i LEFT JOIN users u ON u.id = i.user LEFT JOIN rooms r ON r.id = i.room LEFT JOIN users c ON c.id = i.creator `

func (in *Invite) columns() []any {
	return []any{&in.ID, &in.Kind, &in.Role, &in.User, &in.Room, &in.Creator, millis{&in.Created}, millis{&in.Expires}, &in.Uses, &in.Revoked, &in.Works, &in.UsedBy}
}

// InviteByToken returns the invite of a link that works, or else ErrNotFound.
func (s *Store) InviteByToken(ctx context.Context, token string) (in Invite, err error) {
	err = s.queryRow(ctx, selectInvites+"WHERE i.hash = ?2 AND works", time.Now().UnixMilli(), hashToken(token)).Scan(in.columns()...)
	return in, err
}

// Invites returns all invites, the newest first.
func (s *Store) Invites(ctx context.Context) ([]Invite, error) {
	return collect(ctx, s.read, (*Invite).columns, selectInvites+"ORDER BY i.id DESC", time.Now().UnixMilli())
}

// RevokeInvite makes a link useless in the name of admin, and returns the guests
// who came in by it: they may not any more. Accounts stay.
func (s *Store) RevokeInvite(id int64, admin User) (guests []int64, err error) {
	err = s.update(func(w *writer) error {
		err := w.queryRow("UPDATE invites SET revoked = coalesce(revoked, ?) WHERE id = ? RETURNING id", w.now.UnixMilli(), id).Scan(&id)
		if err != nil {
			return err
		}
		const came = "(SELECT x.user FROM invite_uses x JOIN invites i ON i.id = x.invite WHERE i.id = ?1 AND i.kind = 'guest')"
		guests, err = collect(context.Background(), w.conn, only[int64],
			"UPDATE users SET deactivated = coalesce(deactivated, ?2) WHERE id IN "+came+" RETURNING id", id, w.now.UnixMilli())
		if err != nil {
			return err
		}
		if err := w.exec("DELETE FROM sessions WHERE user IN "+came, id); err != nil {
			return err
		}
		return w.audit(admin, "invite.revoke", fmt.Sprint("#", id), "")
	})
	return guests, err
}

// UseInvite makes the account or the guest of that name, or sets the password of
// the user whom it is for, and returns who that is. It fails with ErrNotFound if
// the link does not work, and with ErrTaken, which costs no use.
func (s *Store) UseInvite(token, name, encoded string) (u User, err error) {
	err = s.update(func(w *writer) error {
		var in Invite
		err := w.queryRow(selectInvites+"WHERE i.hash = ?2 AND works", w.now.UnixMilli(), hashToken(token)).Scan(in.columns()...)
		if err != nil {
			return err
		}
		if in.Kind == inviteReset {
			u, err = w.resetPassword(in, encoded)
		} else {
			u, err = w.admit(in, name, encoded)
		}
		if err != nil {
			return err
		}
		if err := w.exec("UPDATE invites SET uses = uses - 1 WHERE id = ?", in.ID); err != nil {
			return err
		}
		return w.exec("INSERT INTO invite_uses (invite, user, time) VALUES (?, ?, ?)", in.ID, u.ID, w.now.UnixMilli())
	})
	return u, err
}

func (w *writer) resetPassword(in Invite, encoded string) (u User, err error) {
	err = w.queryRow("SELECT u.id, u.name, u.role FROM invites i JOIN users u ON u.id = i.user WHERE i.id = ?", in.ID).Scan(&u.ID, &u.Name, &u.Role)
	if err == nil {
		err = w.setPassword(u, encoded, nil)
	}
	return u, err
}

func (w *writer) admit(in Invite, name, encoded string) (User, error) {
	u := User{Name: name, Role: in.Role}
	if in.Kind == inviteGuest {
		u.Confined, u.Expires = true, in.Expires
	}
	if err := w.createUser(&u, encoded); err != nil || in.Kind != inviteGuest {
		return u, err
	}
	room, err := w.roomByName(in.Room)
	if err != nil {
		return u, err
	}
	return u, w.addMember(room, u)
}

// invite finds the invite of a request's link. All links that do not work are
// answered alike, and all requests counted, so that guessing leads nowhere.
func (s *server) invite(r *http.Request) (Invite, error) {
	if !s.invites.allow(networkOf(s.clientAddress(r))) {
		return Invite{}, refuse(http.StatusTooManyRequests, "login_too_fast")
	}
	in, err := s.store.InviteByToken(r.Context(), r.PathValue("token"))
	return in, inviteError(err)
}

func inviteError(err error) error {
	return instead(err, ErrNotFound, refuse(http.StatusGone, "invite_used"))
}

func (s *server) handleInvitePage(w http.ResponseWriter, r *http.Request, v visitor) error {
	in, err := s.invite(r)
	if err != nil {
		return err
	}
	return s.render(w, r, v, http.StatusOK, "invite.html", page{Invite: &in})
}

func (s *server) handleInvite(w http.ResponseWriter, r *http.Request, v visitor) error {
	in, err := s.invite(r)
	if err != nil {
		return err
	}
	u, err := s.useInvite(r, in)
	switch {
	case errors.Is(err, ErrNotFound): // somebody was faster
		return inviteError(err)
	case err != nil:
		return s.show(w, r, v, err, "invite.html", page{Invite: &in, Form: formOf(r, "username")})
	}
	s.log.InfoContext(r.Context(), "invite used", "invite", in.ID, "kind", in.Kind, "user", u.Name)
	if in.Kind == inviteReset {
		s.hub.Drop(func(m *member) bool { return m.user.ID == u.ID })
	}
	if err := s.startSession(w, r, u); err != nil {
		return err
	}
	to := "/chat/"
	if in.Kind == inviteGuest {
		to = roomPath(in.Room)
	}
	return s.redirect(w, r, to)
}

// useInvite checks the form that the kind of the invite has.
func (s *server) useInvite(r *http.Request, in Invite) (User, error) {
	use := func(name, encoded string) (User, error) {
		return s.store.UseInvite(r.PathValue("token"), name, encoded)
	}
	switch in.Kind {
	case inviteGuest:
		name, err := ownName(r)
		if err != nil {
			return User{}, err
		}
		return use(name, "")
	case inviteReset:
		password, err := newPassword(r)
		if err != nil {
			return User{}, err
		}
		encoded, err := s.hash(r.Context(), password)
		if err != nil {
			return User{}, err
		}
		return use("", encoded)
	}
	return s.newAccount(r, use)
}

// handleRegisterPage is for servers that need no invite, as handleRegister is.
func (s *server) handleRegisterPage(w http.ResponseWriter, r *http.Request, v visitor) error {
	if !s.register {
		return ErrNotFound
	}
	return s.render(w, r, v, http.StatusOK, "invite.html", page{})
}

func (s *server) handleRegister(w http.ResponseWriter, r *http.Request, v visitor) error {
	if !s.register {
		return ErrNotFound
	}
	err := refuse(http.StatusTooManyRequests, "login_too_fast")
	var u User
	if s.logins.allow("guests of " + networkOf(s.clientAddress(r))) {
		u, err = s.newAccount(r, func(name, encoded string) (User, error) { return s.store.CreateUser(name, RoleMember, encoded) })
	}
	if err != nil {
		return s.show(w, r, v, err, "invite.html", page{Form: formOf(r, "username")})
	}
	s.log.InfoContext(r.Context(), "registered", "user", u.Name)
	return s.enterAs(w, r, u)
}

// invite is `chatd invite`: it works on the database, whether or not chatd runs.
func invite(args []string, stdout io.Writer) error {
	flags := newFlags("chatd invite")
	data := flags.String("data", "./data", "")
	public := flags.String("url", "http://localhost:8080", "")
	days := flags.Int("days", 7, "")
	admin := flags.Bool("admin", false, "")
	in := Invite{Kind: inviteAccount, Role: RoleMember}
	flags.IntVar(&in.Uses, "uses", 1, "")
	flags.StringVar(&in.User, "reset", "", "")
	flags.StringVar(&in.Room, "guest", "", "")
	if err := flags.Parse(args); err != nil {
		return err
	}
	kinds := 0
	flags.Visit(func(f *flag.Flag) {
		if f.Name == inviteReset || f.Name == inviteGuest {
			in.Kind = f.Name
			kinds++
		}
	})
	if *admin {
		in.Role = RoleAdmin
		kinds++
	}
	switch {
	case flags.NArg() > 0 || kinds > 1 || in.Kind == inviteReset && in.Uses != 1:
		return errors.New("say chatd invite [-admin], chatd invite -reset NAME or chatd invite -guest ROOM")
	case *days < 1 || *days > int(maxInviteLife.Hours()/24) || in.Uses < 1 || in.Uses > maxInviteUses:
		return fmt.Errorf("an invite has 1 to %d -uses and 1 to %d -days", maxInviteUses, int(maxInviteLife.Hours()/24))
	}
	if _, err := parsePublic(*public); err != nil {
		return err
	}
	store, err := OpenStore(*data, func([]Event) {})
	if err != nil {
		return err
	}
	defer store.Close()
	token, err := store.CreateInvite(in, time.Duration(*days)*24*time.Hour)
	if err != nil {
		return fmt.Errorf("invite %s%s: %w", in.User, in.Room, err)
	}
	_, err = fmt.Fprintln(stdout, strings.TrimSuffix(*public, "/")+"/invite/"+token)
	return err
}
