package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"
)

const (
	accountsPage = 100 // accounts on a page
	maxSearch    = 200 // bytes of a text to look for
)

// adminPage is what the templates of administration show.
type adminPage struct {
	Figures  []figure
	Accounts []account
	Messages []Event
	Invites  []Invite
	Link     string // of the invite that was just made; nobody sees it again
	Audit    []auditEntry
	Here     string // this page, with its filters
	Next     string // the page that goes on, or ""
}

// adminOnly lets administrators in. To all others who are signed in, nothing is there.
func (s *server) adminOnly(h handler) handler {
	return s.signedIn(func(w http.ResponseWriter, r *http.Request, v visitor) error {
		if v.Role != RoleAdmin {
			return ErrNotFound
		}
		return h(w, r, v)
	})
}

// audit writes down what admin did, in the transaction of the deed. It fails with
// ErrForbidden if that is no active administrator (any more): so it is also the
// last word on who may. The zero User stands for the command line. action
// is a key of the catalogues.
func (w *writer) audit(admin User, action, subject, detail string) error {
	var id int64
	err := w.queryRow(`
		INSERT INTO audit (time, admin, action, subject, detail) SELECT ?1, nullif(?2, 0), ?3, ?4, ?5
		WHERE ?2 = 0 OR EXISTS (SELECT 1 FROM users WHERE id = ?2 AND role = 'admin' AND deactivated IS NULL)
		RETURNING id`, w.now.UnixMilli(), admin.ID, action, subject, detail).Scan(&id)
	return instead(err, ErrNotFound, ErrForbidden)
}

// moderate allows admin, and nobody else, to delete a message of somebody else's,
// and writes it down.
func (w *writer) moderate(admin User, m Event) error {
	var author string
	if err := w.queryRow("SELECT name FROM users WHERE id = ?", m.Author.ID).Scan(&author); err != nil {
		return err
	}
	return w.audit(admin, "message.delete", author, fmt.Sprintf("%s #%d", m.Room.Name, m.ID))
}

// figure is a line of the overview.
type figure struct {
	Name  string // key of its words
	Value any
}

// counts are the figures that are numbers of rows.
var counts = []struct{ name, of string }{
	{"admin.admins", "users WHERE role = 'admin' AND deactivated IS NULL"},
	{"admin.members", "users WHERE role = 'member' AND deactivated IS NULL"},
	{"admin.guests", "users WHERE role = 'guest' AND deactivated IS NULL"},
	{"admin.deactivated_users", "users WHERE deactivated IS NOT NULL"},
	{"admin.rooms", "rooms"},
	{"admin.events", "log"},
}

func (s *server) handleAdmin(w http.ResponseWriter, r *http.Request, v visitor) error {
	var lines []figure
	for _, c := range counts {
		var n int64
		if err := s.store.queryRow(r.Context(), "SELECT count(*) FROM "+c.of).Scan(&n); err != nil {
			return err
		}
		lines = append(lines, figure{c.name, n})
	}
	up := time.Duration(ticks())
	size := func(file string) string { return fmt.Sprintf("%.1f MB", float64(fileSize(s.store.dir, file))/1e6) }
	lines = append(lines,
		figure{"admin.database", size("chatd.db")},
		figure{"admin.wal", size("chatd.db-wal")},
		figure{"admin.sockets", s.hub.Sockets()},
		figure{"admin.online", len(s.hub.Online())},
		figure{"admin.uptime", s.words[v.language(r)].text("admin.duration", int(up.Hours())/24, int(up.Hours())%24, int(up.Minutes())%60)},
		figure{"admin.version", version()})
	return s.render(w, r, v, http.StatusOK, "admin.html", page{Admin: &adminPage{Figures: lines}})
}

// account is a user as administrators see it.
type account struct {
	User
	Joined time.Time
	Seen   time.Time // of the newest session, to within a day; zero without one
}

func (s *server) handleUsers(w http.ResponseWriter, r *http.Request, v visitor) error {
	return s.showUsers(w, r, v, page{}, nil)
}

// showUsers shows a page of accounts, with what is wrong with the form that was sent, if any.
func (s *server) showUsers(w http.ResponseWriter, r *http.Request, v visitor, p page, wrong error) error {
	filter := formOf(r, "find", "after")
	list, err := s.store.accounts(r.Context(), filter["find"], filter["after"], accountsPage+1)
	if err != nil {
		return err
	}
	if p.Form == nil {
		p.Form = filter
	}
	p.Admin = &adminPage{Accounts: list, Here: withQuery("/admin/users/", filter)}
	if len(list) > accountsPage {
		p.Admin.Accounts = list[:accountsPage]
		filter["after"] = list[accountsPage-1].Name
		p.Admin.Next = withQuery("/admin/users/", filter)
	}
	return s.show(w, r, v, wrong, "admin_users.html", p)
}

// accounts returns users whose name contains find, by name, from the one that follows after.
func (s *Store) accounts(ctx context.Context, find, after string, limit int) ([]account, error) {
	return collect(ctx, s.read, func(a *account) []any {
		return []any{&a.ID, &a.Name, &a.Role, &a.Bot, millis{&a.Joined}, &a.Deactivated, millis{&a.Seen}}
	}, `
		SELECT id, name, role, bot, joined, deactivated IS NOT NULL, (SELECT max(seen) FROM sessions WHERE user = id)
		FROM users WHERE key > ? AND key LIKE ? ESCAPE '\' ORDER BY key LIMIT ?`, foldName(after), containing(foldName(find)), limit)
}

// containing is the LIKE pattern, with ESCAPE '\', of what contains text itself.
func containing(text string) string {
	return "%" + strings.NewReplacer(`\`, `\\`, `%`, `\%`, `_`, `\_`).Replace(text) + "%"
}

// withQuery is a path with those fields of a form that are filled in.
func withQuery(path string, form map[string]string) string {
	q := make(url.Values)
	for name, value := range form {
		if value != "" {
			q.Set(name, value)
		}
	}
	return (&url.URL{Path: path, RawQuery: q.Encode()}).String()
}

func (s *server) handleChangeUsers(w http.ResponseWriter, r *http.Request, v visitor) error {
	if r.PostFormValue("action") == "user.create" {
		u, password, err := s.addAccount(r, v.User)
		if err != nil {
			return s.showUsers(w, r, v, page{Form: formOf(r, "username", "role")}, err)
		}
		notice := s.words[v.language(r)].text("admin.password", u.Name, password)
		return s.showUsers(w, r, v, page{Notice: notice}, nil)
	}
	if err := s.changeAccount(r, v.User); err != nil {
		return s.showUsers(w, r, v, page{}, err)
	}
	return s.redirect(w, r, localPath(r.PostFormValue("next")))
}

// addAccount makes an account with a password that nobody else will ever see.
func (s *server) addAccount(r *http.Request, admin User) (u User, password string, err error) {
	u.Role = Role(r.PostFormValue("role"))
	if u.Role != RoleAdmin && u.Role != RoleMember {
		return u, "", refuse(http.StatusBadRequest, "bad_request")
	}
	if u.Name, err = userName(r.PostFormValue("username")); err != nil {
		return u, "", err
	}
	password = rand.Text()[:16]
	encoded, err := s.hash(r.Context(), password)
	if err != nil {
		return u, "", err
	}
	err = s.store.update(func(w *writer) error {
		if err := w.createUser(&u, encoded); err != nil {
			return err
		}
		return w.audit(admin, "user.create", u.Name, string(u.Role))
	})
	return u, password, err
}

// accountChanges are what administrators do to the account ?1, at the time ?2: they
// give it the role ?3, unless it is a guest or a bot, who have no password, or so.
var accountChanges = map[string]string{
	"user.role":       "role = ?3 WHERE id = ?1 AND role NOT IN (?3, 'guest') AND NOT bot",
	"user.deactivate": "deactivated = ?2 WHERE id = ?1 AND deactivated IS NULL",
	"user.reactivate": "deactivated = NULL WHERE id = ?1 AND deactivated IS NOT NULL",
	"user.signout":    "role = role WHERE id = ?1",
}

// changeAccount does what the form of one account asks. Nobody can do it to
// themself, and only active administrators can do it at all (Store.ChangeUser):
// so one always remains.
func (s *server) changeAccount(r *http.Request, admin User) error {
	id, _, err := numberOf(r, "id")
	if err != nil {
		return err
	}
	if id == admin.ID {
		return refuse(http.StatusConflict, "last_admin")
	}
	action, role := r.PostFormValue("action"), Role(r.PostFormValue("role"))
	if accountChanges[action] == "" || action == "user.role" && role != RoleAdmin && role != RoleMember {
		return refuse(http.StatusBadRequest, "bad_request")
	}
	u, err := s.store.ChangeUser(admin, id, action, role)
	if err != nil {
		return err
	}
	if u.Role == RoleGuest && action != "user.reactivate" { // a visitor without a session may be speaking under its name
		s.hub.Drop(func(m *member) bool { return m.User.ID == 0 })
	}
	return s.dropEnded(0) // also those of bots whose tokens the user has made
}

// ChangeUser does one of accountChanges in the name of admin, who must be active.
// All but a new role end the account's sessions, and deactivating ends its tokens too.
// ErrNotFound: there is nothing to change.
func (s *Store) ChangeUser(admin User, id int64, action string, role Role) (u User, err error) {
	err = s.update(func(w *writer) error {
		now := w.now.UnixMilli()
		err := w.queryRow("UPDATE users SET "+accountChanges[action]+" RETURNING id, name, role", id, now, role).Scan(&u.ID, &u.Name, &u.Role)
		detail := string(role)
		if err == nil && action != "user.role" {
			detail, err = "", w.exec("DELETE FROM sessions WHERE user = ?", id)
		}
		if err == nil && action == "user.deactivate" {
			err = w.exec("UPDATE tokens SET revoked = ? WHERE user = ? AND revoked IS NULL", now, id)
		}
		if err != nil {
			return err
		}
		return w.audit(admin, action, u.Name, detail)
	})
	return u, err
}

// handleMessages shows the newest messages that the form asks for, of rooms that the
// administrator may see. What is empty does not matter.
func (s *server) handleMessages(w http.ResponseWriter, r *http.Request, v visitor) error {
	form := formOf(r, "room", "author", "from", "to", "text", "before")
	since, isDate := parseTime(cmp.Or(form["from"], "0001-01-01"))
	until, areDates := parseTime(cmp.Or(form["to"], "9999-12-30"))
	before, _, err := numberOf(r, "before")
	if err != nil || !isDate || !areDates || len(form["text"]) > maxSearch {
		return refuse(http.StatusBadRequest, "bad_request")
	}
	found, more, err := s.store.events(r.Context(), historyPage, `
		WHERE l.id < ?1 AND l.kind = 'message' AND (?2 = '' OR r.key = ?2) AND (?3 = '' OR u.key = ?3)
			AND l.time >= ?4 AND l.time < ?5 AND coalesce(l.body, '') LIKE ?6 ESCAPE '\' AND `+v.sees()+`
		ORDER BY l.id DESC`, before, foldName(strings.TrimSpace(form["room"])), foldName(strings.TrimSpace(form["author"])),
		since.UnixMilli(), until.AddDate(0, 0, 1).UnixMilli(), containing(form["text"]))
	if err != nil {
		return err
	}
	p := page{Form: form, Admin: &adminPage{Messages: found, Here: withQuery("/admin/messages/", form)}}
	if more {
		form["before"] = fmt.Sprint(found[len(found)-1].ID)
		p.Admin.Next = withQuery("/admin/messages/", form)
	}
	return s.render(w, r, v, http.StatusOK, "admin_messages.html", p)
}

// handleDeleteMessages deletes the messages that are ticked, as many as a page has.
// One that is gone already, or was never to be seen, is left out.
func (s *server) handleDeleteMessages(w http.ResponseWriter, r *http.Request, v visitor) error {
	if len(r.PostForm["id"]) > historyPage {
		return refuse(http.StatusBadRequest, "bad_request")
	}
	for _, text := range r.PostForm["id"] {
		id, _, err := parseID(text)
		if err == nil {
			_, err = s.store.AppendWait(Event{Kind: KindDelete, Author: v.User, Target: id})
		}
		if err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
	}
	return s.redirect(w, r, localPath(r.PostFormValue("next")))
}

func (s *server) handleInvites(w http.ResponseWriter, r *http.Request, v visitor) error {
	return s.showInvites(w, r, v, "", nil)
}

func (s *server) showInvites(w http.ResponseWriter, r *http.Request, v visitor, link string, wrong error) error {
	all, err := s.store.Invites(r.Context())
	if err != nil {
		return err
	}
	p := page{Admin: &adminPage{Invites: all, Link: link}, Form: formOf(r, "kind", "name", "days", "uses")}
	return s.show(w, r, v, wrong, "admin_invites.html", p)
}

// handleChangeInvites makes a link or revokes one, with the guests who came by it.
func (s *server) handleChangeInvites(w http.ResponseWriter, r *http.Request, v visitor) error {
	if r.PostFormValue("action") != "invite.revoke" {
		link, err := s.addInvite(r, v.User)
		return s.showInvites(w, r, v, link, err)
	}
	id, _, err := numberOf(r, "id")
	if err == nil {
		err = s.store.RevokeInvite(id, v.User)
	}
	if err == nil {
		err = s.dropEnded(0)
	}
	if err != nil {
		return err
	}
	return s.redirect(w, r, "/admin/invites/")
}

func (s *server) addInvite(r *http.Request, admin User) (link string, err error) {
	in := Invite{Kind: r.PostFormValue("kind"), Role: RoleMember, Creator: admin.Name}
	name := strings.TrimSpace(r.PostFormValue("name"))
	switch in.Kind {
	case inviteReset:
		in.User = name
	case inviteGuest:
		in.Room = name
		if room, err := s.store.Room(name); err != nil || !s.hub.Sees(admin, room) {
			return "", refuse(http.StatusNotFound, "unknown_room")
		}
	case string(RoleAdmin):
		in.Kind, in.Role = inviteAccount, RoleAdmin
	}
	days, _, wrongDays := numberOf(r, "days")
	uses, _, wrongUses := numberOf(r, "uses")
	if err := cmp.Or(wrongDays, wrongUses); err != nil {
		return "", err
	}
	in.Uses = int(min(uses, maxInviteUses+1))
	token, err := s.store.CreateInvite(in, time.Duration(min(days, 1000))*24*time.Hour)
	if err != nil {
		return "", instead(err, ErrNotFound, refuse(http.StatusNotFound, "no_user"))
	}
	return s.urlFor(r) + "/invite/" + token, nil
}

// handleAdminRooms lists the rooms; each is changed on its own page.
func (s *server) handleAdminRooms(w http.ResponseWriter, r *http.Request, v visitor) error {
	return s.render(w, r, v, http.StatusOK, "admin_rooms.html", page{})
}

// auditEntry is a line of what administrators did.
type auditEntry struct {
	ID              int64
	Time            time.Time
	Admin           string // "": from the command line
	Action          string
	Subject, Detail string
}

func (s *server) handleAudit(w http.ResponseWriter, r *http.Request, v visitor) error {
	before, _, err := numberOf(r, "before")
	if err != nil {
		return err
	}
	entries, err := s.store.Audit(r.Context(), before, historyPage+1)
	if err != nil {
		return err
	}
	p := page{Admin: &adminPage{Audit: entries}}
	if len(entries) > historyPage {
		p.Admin.Audit = entries[:historyPage]
		p.Admin.Next = fmt.Sprintf("/admin/audit/?before=%d", entries[historyPage-1].ID)
	}
	return s.render(w, r, v, http.StatusOK, "admin_audit.html", p)
}

// Audit returns what administrators did, newest first, with ids below before.
func (s *Store) Audit(ctx context.Context, before int64, limit int) ([]auditEntry, error) {
	return collect(ctx, s.read, func(a *auditEntry) []any {
		return []any{&a.ID, millis{&a.Time}, &a.Admin, &a.Action, &a.Subject, &a.Detail}
	}, `
		SELECT a.id, a.time, coalesce(u.name, ''), a.action, a.subject, a.detail
		FROM audit a LEFT JOIN users u ON u.id = a.admin WHERE a.id < ? ORDER BY a.id DESC LIMIT ?`, before, limit)
}
