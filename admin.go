package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	accountsPage = 100     // accounts on a page
	maxSearch    = 200     // bytes of a text to look for
	searchMost   = 500_000 // rows of the log that one search looks at, in a tenth of a second
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

func (s *server) handleAdmin(w http.ResponseWriter, r *http.Request, v visitor) error {
	lines, err := s.store.figures(r.Context())
	if err != nil {
		return err
	}
	up := time.Duration(ticks())
	lines = append(lines,
		figure{"admin.sockets", s.hub.Sockets()},
		figure{"admin.online", len(s.hub.Online())},
		figure{"admin.uptime", s.words[v.language(r)].text("admin.duration", int(up.Hours())/24, int(up.Hours())%24, int(up.Minutes())%60)},
		figure{"admin.version", version()})
	return s.render(w, r, v, http.StatusOK, "admin.html", page{Admin: &adminPage{Figures: lines}})
}

func (s *Store) figures(ctx context.Context) ([]figure, error) {
	var path string
	var admins, members, guests, deactivated, rooms, events int64
	err := s.queryRow(ctx, `
		SELECT (SELECT file FROM pragma_database_list WHERE name = 'main'),
			count(*) FILTER (WHERE role = 'admin' AND deactivated IS NULL),
			count(*) FILTER (WHERE role = 'member' AND deactivated IS NULL),
			count(*) FILTER (WHERE role = 'guest' AND deactivated IS NULL),
			count(deactivated), (SELECT count(*) FROM rooms), (SELECT count(*) FROM log)
		FROM users`).Scan(&path, &admins, &members, &guests, &deactivated, &rooms, &events)
	if err != nil {
		return nil, err
	}
	file, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	wal, err := os.Stat(path + "-wal") // is there while the database is open
	if err != nil {
		return nil, err
	}
	return []figure{
		{"admin.admins", admins}, {"admin.members", members}, {"admin.guests", guests}, {"admin.deactivated_users", deactivated},
		{"admin.rooms", rooms}, {"admin.events", events}, {"admin.database", megabytes(file)}, {"admin.wal", megabytes(wal)},
	}, nil
}

func megabytes(file os.FileInfo) string { return fmt.Sprintf("%.1f MB", float64(file.Size())/1e6) }

// account is a user as administrators see it.
type account struct {
	User
	Joined time.Time
	Seen   time.Time // of the newest session, to within a day; zero without one
}

func (s *server) handleUsers(w http.ResponseWriter, r *http.Request, v visitor) error {
	return s.showUsers(w, r, v, page{Form: make(map[string]string)}, nil)
}

// showUsers shows a page of accounts, with what is wrong with the form that was sent, if any.
func (s *server) showUsers(w http.ResponseWriter, r *http.Request, v visitor, p page, wrong error) error {
	find, after := r.FormValue("find"), r.FormValue("after")
	list, err := s.store.accounts(r.Context(), find, after, accountsPage+1)
	if err != nil {
		return err
	}
	p.Form["find"] = find
	p.Admin = &adminPage{Accounts: list, Here: withQuery("/admin/users/", map[string]string{"find": find, "after": after})}
	if len(list) > accountsPage {
		p.Admin.Accounts = list[:accountsPage]
		p.Admin.Next = withQuery("/admin/users/", map[string]string{"find": find, "after": list[accountsPage-1].Name})
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
	if len(q) == 0 {
		return path
	}
	return path + "?" + q.Encode()
}

func (s *server) handleChangeUsers(w http.ResponseWriter, r *http.Request, v visitor) error {
	if r.PostFormValue("action") == "user.create" {
		u, password, err := s.addAccount(r, v.User)
		if err != nil {
			return s.showUsers(w, r, v, page{Form: formOf(r, "username", "role")}, err)
		}
		notice := s.words[v.language(r)].text("admin.password", u.Name, password)
		return s.showUsers(w, r, v, page{Form: make(map[string]string), Notice: notice}, nil)
	}
	if err := s.changeAccount(r, v.User); err != nil {
		return s.showUsers(w, r, v, page{Form: make(map[string]string)}, err)
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
	if !slices.Contains([]string{"user.role", "user.deactivate", "user.reactivate", "user.signout"}, action) || action == "user.role" && role != RoleAdmin && role != RoleMember {
		return refuse(http.StatusBadRequest, "bad_request")
	}
	u, err := s.store.ChangeUser(admin, id, action, role)
	if err == nil && (action == "user.deactivate" || action == "user.signout") {
		// A visitor without a session may be speaking under a guest's name.
		s.hub.Drop(func(m *member) bool { return m.user.ID == u.ID || m.user.ID == 0 && u.Role == RoleGuest })
		err = s.dropEnded() // those of bots whose tokens the user has made
	}
	return err
}

// ChangeUser changes an account in the name of admin, who must be active: its
// role, unless it is a guest or a bot, who have no password; or whether it is
// deactivated, which ends its sessions and tokens; or only those sessions. ErrNotFound: there is nothing to change.
func (s *Store) ChangeUser(admin User, id int64, action string, role Role) (u User, err error) {
	change, value, detail := "deactivated = ?1 WHERE id = ?2 AND (deactivated IS NULL) != (?1 IS NULL)", any(nil), ""
	if action == "user.role" {
		change, value, detail = "role = ?1 WHERE id = ?2 AND role NOT IN (?1, 'guest') AND NOT bot", role, string(role)
	}
	if action == "user.signout" {
		change = "role = role WHERE id = ?2 AND ?1 IS NULL"
	}
	err = s.update(func(w *writer) error {
		if action == "user.deactivate" {
			value = w.now.UnixMilli()
		}
		err := w.queryRow("UPDATE users SET "+change+" RETURNING id, name, role", value, id).Scan(&u.ID, &u.Name, &u.Role)
		if err == nil && action != "user.role" {
			err = w.exec("DELETE FROM sessions WHERE user = ?", id)
		}
		if err == nil && action == "user.deactivate" {
			err = w.exec("UPDATE tokens SET revoked = ?1 WHERE user = ?2 AND revoked IS NULL", value, id)
		}
		if err != nil {
			return err
		}
		return w.audit(admin, action, u.Name, detail)
	})
	return u, err
}

func (s *server) handleMessages(w http.ResponseWriter, r *http.Request, v visitor) error {
	q, err := searchOf(r)
	if err != nil {
		return err
	}
	found, next, err := s.store.search(r.Context(), v.User, q)
	if err != nil {
		return err
	}
	form := formOf(r, "room", "author", "from", "to", "text", "before")
	p := page{Form: form, Admin: &adminPage{Messages: found, Here: withQuery("/admin/messages/", form)}}
	if next > 0 {
		form["before"] = fmt.Sprint(next)
		p.Admin.Next = withQuery("/admin/messages/", form)
	}
	return s.render(w, r, v, http.StatusOK, "admin_messages.html", p)
}

// search says which messages are looked for. What is empty or 0 does not matter.
type search struct {
	room, author string // keys
	text         string // a pattern
	from, to     int64  // times; to is the first that is too late
	before       int64  // id
}

func searchOf(r *http.Request) (q search, err error) {
	q.room, q.author, q.to = foldName(strings.TrimSpace(r.FormValue("room"))), foldName(strings.TrimSpace(r.FormValue("author"))), math.MaxInt64
	if text := r.FormValue("text"); text != "" {
		q.text = containing(text)
	}
	if from := r.FormValue("from"); from != "" {
		day, wrong := time.ParseInLocation(time.DateOnly, from, time.Local)
		q.from, err = day.UnixMilli(), wrong
	}
	if to := r.FormValue("to"); to != "" {
		day, wrong := time.ParseInLocation(time.DateOnly, to, time.Local)
		q.to, err = day.AddDate(0, 0, 1).UnixMilli(), cmp.Or(err, wrong)
	}
	if err != nil || len(r.FormValue("text")) > maxSearch {
		return q, refuse(http.StatusBadRequest, "bad_request")
	}
	q.before, _, err = numberOf(r, "before")
	return q, err
}

// search returns the newest messages that q looks for, of rooms that admin may
// see, and where to go on: 0 if there are no more. It looks at searchMost rows,
// so a page may be short, or empty, and not the last.
func (s *Store) search(ctx context.Context, admin User, q search) (found []Event, next int64, err error) {
	last, err := s.LastID(ctx)
	if err != nil {
		return nil, 0, err
	}
	before := min(q.before, last+1)
	oldest := max(before-searchMost, 1)
	found, more, err := s.events(ctx, `
		WHERE l.id < ?1 AND l.id >= ?2 AND l.kind = 'message'
			AND (?3 = '' OR r.key = ?3) AND (?4 = '' OR u.key = ?4) AND l.time >= ?5 AND l.time < ?6
			AND (?7 = '' OR l.body LIKE ?7 ESCAPE '\') AND `+admin.sees()+`
		ORDER BY l.id DESC LIMIT ?8`, before, oldest, q.room, q.author, q.from, q.to, q.text, historyPage+1)
	if len(found) > historyPage {
		found, more = found[:historyPage], true
	}
	switch {
	case more:
		next = found[len(found)-1].ID
	case oldest > 1:
		next = oldest
	}
	return found, next, err
}

// handleDeleteMessages deletes the messages that are ticked, as many as a page has.
// One that is gone already, or was never to be seen, is left out.
func (s *server) handleDeleteMessages(w http.ResponseWriter, r *http.Request, v visitor) error {
	if len(r.PostForm["id"]) > historyPage {
		return refuse(http.StatusBadRequest, "bad_request")
	}
	var ids []int64
	for _, text := range r.PostForm["id"] {
		id, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return refuse(http.StatusBadRequest, "bad_request")
		}
		ids = append(ids, id)
	}
	answers := make(chan error, len(ids))
	for _, id := range ids {
		err := s.store.Append(Event{Kind: KindDelete, Author: v.User, Target: id}, func(_ Event, err error) { answers <- err })
		if err != nil {
			return err
		}
	}
	for range ids {
		if err := <-answers; err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
	}
	return s.redirect(w, r, localPath(r.PostFormValue("next")))
}

func (s *server) handleInvites(w http.ResponseWriter, r *http.Request, v visitor) error {
	return s.showInvites(w, r, v, page{Admin: &adminPage{}}, nil)
}

func (s *server) showInvites(w http.ResponseWriter, r *http.Request, v visitor, p page, wrong error) error {
	all, err := s.store.Invites(r.Context())
	if err != nil {
		return err
	}
	p.Admin.Invites = all
	return s.show(w, r, v, wrong, "admin_invites.html", p)
}

// handleChangeInvites makes a link or revokes one, with the guests who came by it.
func (s *server) handleChangeInvites(w http.ResponseWriter, r *http.Request, v visitor) error {
	if r.PostFormValue("action") == "invite.revoke" {
		id, _, err := numberOf(r, "id")
		if err != nil {
			return err
		}
		guests, err := s.store.RevokeInvite(id, v.User)
		if err != nil {
			return err
		}
		s.hub.Drop(func(m *member) bool { return slices.Contains(guests, m.user.ID) })
		return s.redirect(w, r, "/admin/invites/")
	}
	p := page{Admin: &adminPage{}, Form: formOf(r, "kind", "name", "days", "uses")}
	token, err := s.addInvite(r, v.User)
	if err != nil {
		return s.showInvites(w, r, v, p, err)
	}
	p.Admin.Link = s.urlFor(r) + "/invite/" + token
	return s.showInvites(w, r, v, p, nil)
}

func (s *server) addInvite(r *http.Request, admin User) (token string, err error) {
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
	days, _, err := numberOf(r, "days")
	if err != nil {
		return "", err
	}
	uses, _, err := numberOf(r, "uses")
	if err != nil {
		return "", err
	}
	in.Uses = int(min(uses, maxInviteUses+1))
	token, err = s.store.CreateInvite(in, time.Duration(min(days, 1000))*24*time.Hour)
	return token, instead(err, ErrNotFound, refuse(http.StatusNotFound, "no_user"))
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
