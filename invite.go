package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
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
	Works   bool   // now
	UsedBy  string // names, oldest first
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
		coalesce((SELECT group_concat(p.name, ', ' ORDER BY x.rowid) FROM invite_uses x JOIN users p ON p.id = x.user WHERE x.invite = i.id), '')
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

// RevokeInvite makes a link useless in the name of admin. The guests who came in by
// it may not any more. Accounts stay.
func (s *Store) RevokeInvite(id int64, admin User) error {
	return s.update(func(w *writer) error {
		const came = "(SELECT x.user FROM invite_uses x JOIN invites i ON i.id = x.invite WHERE i.id = ?1 AND i.kind = 'guest')"
		err := w.queryRow("SELECT 1 FROM invites WHERE id = ?", id).Scan(new(int))
		if err == nil {
			err = w.exec(`
				UPDATE invites SET revoked = coalesce(revoked, ?2) WHERE id = ?1;
				UPDATE users SET deactivated = coalesce(deactivated, ?2) WHERE id IN `+came+`;
				DELETE FROM sessions WHERE user IN `+came, id, w.now.UnixMilli())
		}
		if err != nil {
			return err
		}
		return w.audit(admin, "invite.revoke", fmt.Sprint("#", id), "")
	})
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
		if in.Kind != inviteReset {
			u, err = w.admit(in, name, encoded)
		} else if u, err = w.userByName(in.User); err == nil {
			err = w.setPassword(u, encoded, nil)
		}
		if err != nil {
			return err
		}
		return w.exec(`
			UPDATE invites SET uses = uses - 1 WHERE id = ?1;
			INSERT INTO invite_uses (invite, user, time) VALUES (?1, ?2, ?3)`, in.ID, u.ID, w.now.UnixMilli())
	})
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
	return u, w.changeMember(KindJoin, room, u)
}

var errInviteUsed = refuse(http.StatusGone, "invite_used")

// invite finds the invite of a request's link; where everybody may register, and no
// link is needed, it is nil. All links that do not work are answered alike, and all
// requests counted, so that guessing leads nowhere.
func (s *server) invite(r *http.Request) (*Invite, error) {
	token := r.PathValue("token")
	switch {
	case token == "" && s.register:
		return nil, nil
	case token == "":
		return nil, ErrNotFound
	case !s.invites.allow(networkOf(s.clientAddress(r))):
		return nil, refuse(http.StatusTooManyRequests, "login_too_fast")
	}
	in, err := s.store.InviteByToken(r.Context(), token)
	return &in, instead(err, ErrNotFound, errInviteUsed)
}

func (s *server) handleInvite(w http.ResponseWriter, r *http.Request, v visitor) error {
	in, err := s.invite(r)
	if err != nil {
		return err
	}
	p := page{Invite: in, Form: formOf(r, "username")}
	if r.Method != http.MethodPost {
		return s.render(w, r, v, http.StatusOK, "invite.html", p)
	}
	u, err := s.useInvite(r, in)
	switch {
	case errors.Is(err, ErrNotFound): // somebody was faster
		return errInviteUsed
	case err != nil:
		return s.show(w, r, v, err, "invite.html", p)
	case in == nil:
		s.log.InfoContext(r.Context(), "registered", "user", u.Name)
		return s.enterAs(w, r, u, "/chat/")
	}
	s.log.InfoContext(r.Context(), "invite used", "invite", in.ID, "kind", in.Kind, "user", u.Name)
	if err := s.dropEnded(u.ID); err != nil { // a reset ends sessions
		return err
	}
	to := "/chat/"
	if in.Kind == inviteGuest {
		to = roomPath(in.Room)
	}
	return s.enterAs(w, r, u, to)
}

// useInvite checks the form that the kind of the invite has.
func (s *server) useInvite(r *http.Request, in *Invite) (User, error) {
	use := func(name, encoded string) (User, error) {
		return s.store.UseInvite(r.PathValue("token"), name, encoded)
	}
	switch {
	case in == nil:
		return s.newUser(r, RoleMember)
	case in.Kind != inviteReset:
		return s.newAccount(r, in.Role, use)
	}
	encoded, err := s.newPassword(r)
	if err != nil {
		return User{}, err
	}
	return use("", encoded)
}

// invite is `chatd invite`: it works on the database, whether or not chatd runs.
func invite(args []string, stdout io.Writer) error {
	flags := newFlags("chatd invite")
	data := flags.String("data", "./data", "")
	public := flags.String("url", "http://localhost:8080", "")
	days := flags.Int("days", 7, "")
	admin := flags.Bool("admin", false, "")
	in, kinds := Invite{Kind: inviteAccount, Role: RoleMember}, 0
	flags.IntVar(&in.Uses, "uses", 1, "")
	for kind, name := range map[string]*string{inviteReset: &in.User, inviteGuest: &in.Room} {
		flags.Func(kind, "", func(value string) error {
			in.Kind, *name = kind, value
			kinds++
			return nil
		})
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *admin {
		in.Role = RoleAdmin
		kinds++
	}
	if flags.NArg() > 0 || kinds > 1 || in.Kind == inviteReset && in.Uses != 1 {
		return errors.New("say chatd invite [-admin], chatd invite -reset NAME or chatd invite -guest ROOM")
	}
	if _, err := parsePublic(*public); err != nil {
		return err
	}
	store, err := OpenStore(*data, nil)
	if err != nil {
		return err
	}
	defer store.Close()
	token, err := store.CreateInvite(in, time.Duration(min(*days, 1000))*24*time.Hour)
	if p, ok := errors.AsType[*problem](err); ok {
		return fmt.Errorf("an invite has 1 to %d -uses and 1 to %d -days", p.args...)
	}
	if err != nil {
		return fmt.Errorf("invite %s%s: %w", in.User, in.Room, err)
	}
	_, err = fmt.Fprintln(stdout, strings.TrimSuffix(*public, "/")+"/invite/"+token)
	return err
}
