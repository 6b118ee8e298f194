package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// Room is a place with a name. Names differ in more than case. A private room of
// two whose name is both of theirs, "ann+bob", is their direct messages.
type Room struct {
	ID       int64
	Name     string
	Private  bool // only for its members; that never changes
	Topic    string
	Archived bool // can be read, and no more
	Keep     int  // days, after which messages are removed; 0: never
	Creator  int64
}

func (r Room) direct() bool { return strings.Contains(r.Name, "+") }

// managedBy reports whether u, who sees the room, made it or is an administrator.
func (r Room) managedBy(u User) bool {
	return !r.direct() && u.Role != RoleGuest && (u.Role == RoleAdmin || u.ID == r.Creator)
}

// roomColumns are those of rooms r that Room.columns scans, after others.
const roomColumns = "r.id, r.name, r.private, r.topic, r.archived IS NOT NULL, coalesce(r.keep, 0), r.creator"

func (r *Room) columns(others ...any) []any {
	return append(others, &r.ID, &r.Name, &r.Private, &r.Topic, &r.Archived, &r.Keep, &r.Creator)
}

// sees is the SQL condition for the rooms r that u may see: the public ones and
// those that it is a member of, or only the latter.
func (u User) sees() string {
	public := "r.private = 0 OR "
	if u.Confined {
		public = ""
	}
	only := ""
	if u.Only != 0 {
		only = fmt.Sprintf("r.id = %d AND ", u.Only)
	}
	return fmt.Sprintf("(%s(%sEXISTS (SELECT 1 FROM members WHERE room = r.id AND user = %d)))", only, public, u.ID)
}

// checkRoom fails unless e's author may speak in e's room. Public rooms cost no
// query: they stay public.
func (w *writer) checkRoom(e *Event) error {
	if e.Room.Private || e.Author.limited() {
		err := w.queryRow("SELECT 1 FROM rooms r WHERE r.id = ? AND "+e.Author.sees(), e.Room.ID).Scan(new(int))
		if err != nil {
			return err
		}
	}
	if e.Room.Archived {
		return ErrArchived
	}
	return nil
}

// room makes a public room, or finds the one that has, or had, the name.
func (w *writer) room(e *Event) error {
	if r, err := w.roomByName(e.Room.Name); !errors.Is(err, ErrNotFound) {
		if e.Room, e.Again = r, true; r.Private {
			return ErrTaken
		}
		return err
	}
	return w.createRoom(&e.Room, e.Author)
}

func (w *writer) createRoom(r *Room, creator User) error {
	r.Creator = creator.ID
	return w.queryRow("INSERT INTO rooms (name, key, creator, created, private) VALUES (?, ?, ?, ?, ?) RETURNING id",
		r.Name, foldName(r.Name), r.Creator, w.now.UnixMilli(), r.Private).Scan(&r.ID)
}

func (w *writer) roomByName(name string) (r Room, err error) {
	err = w.queryRow("SELECT "+roomColumns+` FROM rooms r
		WHERE r.key = ?1 OR r.id = (SELECT room FROM former_names WHERE key = ?1)`, foldName(name)).Scan(r.columns()...)
	return r, err
}

// changeMember has u join or leave a private room. It does nothing if it is so already.
func (w *writer) changeMember(kind Kind, r Room, u User) error {
	change := "INSERT INTO members (room, user) VALUES (?, ?) ON CONFLICT DO NOTHING RETURNING 1"
	if kind == KindLeave {
		change = "DELETE FROM members WHERE room = ? AND user = ? RETURNING 1"
	}
	err := w.queryRow(change, r.ID, u.ID).Scan(new(int))
	if err == nil {
		w.tell(Event{Kind: kind, Room: r, Author: u})
	}
	return instead(err, ErrNotFound, nil)
}

// Room returns the room that has, or had, that name, in any case, or ErrNotFound.
func (s *Store) Room(name string) (Room, error) {
	s.roomsMu.RLock()
	defer s.roomsMu.RUnlock()
	r, ok := s.rooms[foldName(name)]
	if !ok {
		return Room{}, ErrNotFound
	}
	return r, nil
}

// remember keeps what Room looks up.
func (s *Store) remember(events []Event) {
	for _, e := range events {
		if e.Kind != KindRoom {
			continue
		}
		s.roomsMu.Lock()
		for key, r := range s.rooms {
			if r.ID == e.Room.ID {
				s.rooms[key] = e.Room
			}
		}
		s.rooms[foldName(e.Room.Name)] = e.Room
		s.roomsMu.Unlock()
	}
}

func (s *Store) loadRooms() error {
	type named struct {
		key string
		Room
	}
	all, err := collect(context.Background(), s.read, func(n *named) []any { return n.columns(&n.key) },
		"SELECT r.key, "+roomColumns+" FROM rooms r UNION ALL SELECT f.key, "+roomColumns+" FROM former_names f JOIN rooms r ON r.id = f.room")
	for _, n := range all {
		s.rooms[n.key] = n.Room
	}
	return err
}

// Memberships returns who is a member of which room, as the events that tell so.
func (s *Store) Memberships(ctx context.Context) ([]Event, error) {
	return collect(ctx, s.read, func(e *Event) []any {
		e.Kind = KindJoin
		return e.Room.columns(&e.Author.ID, &e.Author.Name)
	}, "SELECT u.id, u.name, "+roomColumns+" FROM members m JOIN users u ON u.id = m.User JOIN rooms r ON r.id = m.room")
}

// Members returns the names of a room's members, sorted.
func (s *Store) Members(ctx context.Context, room int64) ([]string, error) {
	return collect(ctx, s.read, only[string], "SELECT u.name FROM members m JOIN users u ON u.id = m.User WHERE m.room = ? ORDER BY u.key", room)
}

// CreateRoom makes a public room, or returns the one that has the name. If that is
// a private one the error is ErrTaken.
func (s *Store) CreateRoom(name string, creator User) (Room, error) {
	e, err := s.AppendWait(Event{Kind: KindRoom, Room: Room{Name: name}, Author: creator})
	return e.Room, err
}

// CreatePrivateRoom makes a room for its creator and others. It fails with
// ErrTaken if a room has, or had, the name.
func (s *Store) CreatePrivateRoom(name string, creator User, others ...User) (Room, error) {
	r := Room{Name: name, Private: true}
	err := s.update(func(w *writer) error {
		if _, err := w.roomByName(name); !errors.Is(err, ErrNotFound) {
			return cmp.Or(err, ErrTaken)
		}
		if err := w.createRoom(&r, creator); err != nil {
			return err
		}
		for _, u := range append(others, creator) {
			if err := w.changeMember(KindJoin, r, u); err != nil {
				return err
			}
		}
		w.tell(Event{Kind: KindRoom, Room: r, Author: creator})
		return nil
	})
	return r, err
}

// DirectRoom returns the direct messages of two users.
func (s *Store) DirectRoom(a, b User) (Room, error) {
	if foldName(b.Name) < foldName(a.Name) {
		a, b = b, a
	}
	name := a.Name + "+" + b.Name
	if r, err := s.Room(name); err == nil {
		return r, nil
	}
	r, err := s.CreatePrivateRoom(name, a, b)
	if errors.Is(err, ErrTaken) { // just now
		return s.Room(name)
	}
	return r, err
}

// ChangeRoom gives a room the name, topic, archived and keep of r. It fails with
// ErrTaken if another room has, or had, the name.
func (s *Store) ChangeRoom(r Room, by User) error {
	return s.update(func(w *writer) error {
		var old Room
		if err := w.queryRow("SELECT "+roomColumns+" FROM rooms r WHERE r.id = ?", r.ID).Scan(old.columns()...); err != nil {
			return err
		}
		e := Event{Kind: KindRoom, Room: r, Author: by}
		if foldName(r.Name) != foldName(old.Name) {
			if other, err := w.roomByName(r.Name); err == nil && other.ID != r.ID {
				return ErrTaken
			}
			err := w.exec(`
				INSERT INTO former_names (key, room) VALUES (?1, ?2);
				DELETE FROM former_names WHERE key = ?3`, foldName(old.Name), r.ID, foldName(r.Name))
			if err != nil {
				return err
			}
		}
		if r.Name != old.Name {
			e.Body = old.Name
		}
		w.tell(e)
		if err := w.auditRoom(old, r, by); err != nil {
			return err
		}
		return w.exec("UPDATE rooms SET name = ?, key = ?, topic = ?, archived = CASE WHEN ? THEN coalesce(archived, ?) END, keep = ? WHERE id = ?",
			r.Name, foldName(r.Name), r.Topic, r.Archived, w.now.UnixMilli(), orNull(r.Keep), r.ID)
	})
}

// auditRoom writes down what administrators do, and who has messages removed of a
// public room. Private ones are none of the administrators' business.
func (w *writer) auditRoom(old, r Room, by User) error {
	detail := fmt.Sprintf("%s; %s; archived: %t; days: %d", r.Name, r.Topic, r.Archived, r.Keep)
	switch {
	case by.Role == RoleAdmin:
		return w.audit(by, "room.change", old.Name, detail)
	case r.Keep != old.Keep && !r.Private:
		return w.exec("INSERT INTO audit (time, admin, action, subject, detail) VALUES (?, ?, 'room.change', ?, ?)", w.now.UnixMilli(), by.ID, old.Name, detail)
	}
	return nil
}

// ChangeMember has u join (KindJoin) or leave (KindLeave) a private room. It does
// nothing if it is so already.
func (s *Store) ChangeMember(kind Kind, r Room, u User) error {
	return s.update(func(w *writer) error { return w.changeMember(kind, r, u) })
}

// enter returns the room of that name, if v may see it. Who enters a public room
// that is not there makes it, and so with direct messages, which are called @name
// or by both names.
func (s *server) enter(r *http.Request, v visitor, name string) (Room, error) {
	if strings.HasPrefix(name, "@") || strings.Contains(name, "+") {
		return s.enterDirect(r, v, name)
	}
	name, err := roomName(name)
	if err != nil {
		return Room{}, err
	}
	room, err := s.store.Room(name)
	switch {
	case err == nil && !s.hub.Sees(v.User, room), err != nil && (v.limited() || !v.may(scopePost)):
		return Room{}, ErrNotFound
	case err == nil:
		return room, nil
	}
	key, creator := "rooms of user "+v.Name, v.User
	if v.ID == 0 {
		key = "rooms of address " + s.clientAddress(r)
		if creator, err = s.store.SpeakingGuest(r.Context(), anonymousGuest); err != nil {
			return Room{}, err
		}
	}
	if err := s.posts.check(key); err != nil {
		return Room{}, err
	}
	return s.store.CreateRoom(name, creator)
}

// inRoom is a handler for the room in the path, if the visitor may see it.
func (s *server) inRoom(h func(w http.ResponseWriter, r *http.Request, v visitor, room Room) error) handler {
	return func(w http.ResponseWriter, r *http.Request, v visitor) error {
		room, err := s.enter(r, v, r.PathValue("room"))
		if err != nil {
			return err
		}
		return h(w, r, v, room)
	}
}

func (s *server) enterDirect(r *http.Request, v visitor, name string) (Room, error) {
	names := strings.Split(name, "+")
	if other, found := strings.CutPrefix(name, "@"); found {
		names = []string{v.Name, other}
	}
	i := slices.IndexFunc(names, func(n string) bool { return foldName(n) == foldName(v.Name) })
	if i < 0 || len(names) != 2 || v.ID == 0 || v.Role == RoleGuest {
		return Room{}, ErrNotFound
	}
	other, _, err := s.store.UserByName(r.Context(), names[1-i])
	if err == nil && (other.ID == v.ID || other.Role == RoleGuest) {
		err = ErrNotFound
	}
	if err != nil {
		return Room{}, err
	}
	return s.store.DirectRoom(v.User, other)
}

// handleCreateRoom makes a private room. Public ones are made by entering them.
func (s *server) handleCreateRoom(w http.ResponseWriter, r *http.Request, v visitor) error {
	room, err := s.createPrivate(r, v)
	if err != nil {
		return s.show(w, r, v, err, "rooms.html", page{Form: formOf(r, "private")})
	}
	return s.redirect(w, r, roomPath(room.Name))
}

func (s *server) createPrivate(r *http.Request, v visitor) (Room, error) {
	name, err := roomName(r.PostFormValue("private"))
	if err == nil && v.Role == RoleGuest {
		err = ErrForbidden
	}
	if err == nil {
		err = s.posts.check("rooms of user " + v.Name)
	}
	if err != nil {
		return Room{}, err
	}
	room, err := s.store.CreatePrivateRoom(name, v.User)
	return room, instead(err, ErrTaken, refuse(http.StatusConflict, "room_taken"))
}

// handleRoom shows the newest messages of a room, or, with ?before=ID, older ones,
// or, with ?after=ID, newer ones, or, with ?at=ID or ?at=TIME, those around one; or it
// streams what is said there.
func (s *server) handleRoom(w http.ResponseWriter, r *http.Request, v visitor, room Room) error {
	if room.Name != r.PathValue("room") {
		return s.redirect(w, r, strings.TrimSuffix(roomPath(room.Name)+"?"+r.URL.RawQuery, "?"))
	}
	if t, given := parseTime(strings.ReplaceAll(r.FormValue("at"), " ", "+")); given { // who writes a link forgets what + means
		return s.jump(w, r, room, t)
	}
	switch d := streamOf(r, v); {
	case d != nil:
		return s.stream(w, r, v, room, d)
	case wantsPage(r):
		return s.showRoom(w, r, v, room, http.StatusOK, page{})
	case r.FormValue("since") != "":
		return s.sendMissed(w, r, v, room)
	}
	return s.sendHistory(w, r, room)
}

func (s *server) showRoom(w http.ResponseWriter, r *http.Request, v visitor, room Room, status int, p page) error {
	// The cursor is read first: what comes in between is in the page and comes
	// over the socket too, where the script knows it by its id.
	cursor := s.hub.Last()
	events, older, newer, err := s.page(r, room)
	if err != nil {
		return err
	}
	reactions, err := s.store.Reactions(r.Context(), events)
	if err != nil {
		return err
	}
	if p.Pushes, err = s.store.HasPushes(r.Context(), room.ID); err != nil {
		return err
	}
	p.Room, p.Topic, p.Older, p.Newer, p.CID = room.Name, room.Topic, older, newer, newCID()
	if err := s.fillClient(r, v, room, cursor, &p); err != nil {
		return err
	}
	known := namesKnown(p.Client.People, events)
	for _, e := range events {
		row := messageRow{e, tagOf(e), e.Author.ID == v.ID, formatMessage(e.Body, v.Name, known), reactionRows(reactions[e.ID], v.Name)}
		p.Messages = append(p.Messages, row)
	}
	return s.render(w, r, v, status, "room.html", p)
}

// page returns the messages that a request asks for, the before= of the page that comes
// before them and the after= of the one that follows, 0 if there is none.
func (s *server) page(r *http.Request, room Room) (events []Event, older, newer int64, err error) {
	ctx := r.Context()
	after, follows, wrongAfter := numberOf(r, "after")
	before, _, wrongBefore := numberOf(r, "before")
	at, given, wrongAt := numberOf(r, "at")
	if err = cmp.Or(wrongAfter, wrongBefore, wrongAt); err == nil && given {
		before, err = s.store.Around(ctx, room.ID, at, historyPage/2)
	}
	switch {
	case err != nil:
	case follows:
		events, err = s.store.PageAfter(ctx, room.ID, after, historyPage)
		older, newer = after+1, after
	default:
		events, _, err = s.store.Page(ctx, room.ID, before, historyPage)
		older, newer = before, max(before-1, 0)
	}
	if err != nil {
		return nil, 0, 0, err
	}
	if len(events) > 0 {
		older, newer = events[0].ID, events[len(events)-1].ID
	}
	below, above, err := s.store.Beyond(ctx, room.ID, older, newer)
	if !below {
		older = 0
	}
	if !above || !follows && before == math.MaxInt64 { // what has just come is still on its way to sockets
		newer = 0
	}
	return events, older, newer, err
}

// aboutRoom is what about.html shows besides the page.
type aboutRoom struct {
	Room
	Direct  bool
	Members []string
	Manage  bool   // may rename, archive and remove
	Notify  string // as Store.Level has it
	Pushes  []Push
	Push    Push // what the form for another begins with
}

func (s *server) handleAbout(w http.ResponseWriter, r *http.Request, v visitor, room Room) error {
	return s.showAbout(w, r, v, room, nil, page{})
}

func (s *server) showAbout(w http.ResponseWriter, r *http.Request, v visitor, room Room, wrong error, p page) error {
	about, ctx := aboutRoom{Room: room, Direct: room.direct(), Manage: room.managedBy(v.User), Push: defaultPush}, r.Context()
	var noMembers, noTokens, noPushes, noLevel error
	about.Members, noMembers = s.store.Members(ctx, room.ID)
	about.Pushes, noPushes = s.store.Pushes(ctx, room.ID)
	about.Notify, noLevel = s.store.Level(ctx, v.User, room)
	if about.Manage {
		p.Tokens, noTokens = s.store.Tokens(ctx, "u.bot AND r.id = ?2", room.ID)
	}
	if err := cmp.Or(noMembers, noTokens, noPushes, noLevel); err != nil {
		return err
	}
	p.About = &about
	return s.show(w, r, v, wrong, "about.html", p)
}

func (s *server) handleChangeRoom(w http.ResponseWriter, r *http.Request, v visitor, room Room) error {
	room, err := s.changeRoom(r, v, room)
	if err != nil {
		return s.showAbout(w, r, v, room, err, page{Form: formOf(r, "topic", "name", "member", "keep")})
	}
	if !s.hub.Sees(v.User, room) { // left
		return s.redirect(w, r, "/chat/")
	}
	return s.redirect(w, r, roomPath(room.Name)+"about/")
}

// changeRoom does what the form asks for and returns the room as it is then.
func (s *server) changeRoom(r *http.Request, v visitor, room Room) (_ Room, err error) {
	action, changed := r.PostFormValue("action"), room
	switch {
	case action == "notify":
		return room, s.setLevel(r, v.User, room)
	case v.Role == RoleGuest, !room.managedBy(v.User) && slices.Contains([]string{"rename", "archive", "restore", "remove", "keep"}, action), room.direct() && action != "topic":
		return room, ErrForbidden
	case action == "topic":
		changed.Topic = strings.TrimSpace(r.PostFormValue("topic"))
		if len(changed.Topic) > maxTopic {
			return room, refuse(http.StatusBadRequest, "long_topic", maxTopic)
		}
	case action == "rename":
		if changed.Name, err = roomName(r.PostFormValue("name")); err != nil {
			return room, err
		}
	case action == "archive", action == "restore":
		changed.Archived = action == "archive"
	case action == "keep":
		if changed.Keep, err = keepDays(r.PostFormValue("keep")); err != nil {
			return room, err
		}
	case action == "leave" && room.Private:
		return room, s.store.ChangeMember(KindLeave, room, v.User)
	case action == "add" && room.Private:
		return room, s.changeMember(r, KindJoin, room)
	case action == "remove" && room.Private:
		return room, s.changeMember(r, KindLeave, room)
	default:
		return room, refuse(http.StatusBadRequest, "bad_request")
	}
	if err = s.store.ChangeRoom(changed, v.User); err != nil {
		return room, instead(err, ErrTaken, refuse(http.StatusConflict, "room_taken"))
	}
	if changed.Keep != room.Keep {
		poke(s.keeper.wake)
	}
	return changed, nil
}

func (s *server) setLevel(r *http.Request, u User, room Room) error {
	level := r.PostFormValue("notify")
	if level == "default" {
		level = ""
	} else if !slices.Contains(notifyLevels, level) {
		return refuse(http.StatusBadRequest, "bad_request")
	}
	return s.store.SetLevel(u, room, level)
}

func (s *server) changeMember(r *http.Request, kind Kind, room Room) error {
	u, _, err := s.store.UserByName(r.Context(), r.PostFormValue("member"))
	if err == nil && u.Role == RoleGuest {
		err = ErrNotFound
	}
	if err != nil {
		return instead(err, ErrNotFound, refuse(http.StatusNotFound, "no_user"))
	}
	return s.store.ChangeMember(kind, room, u)
}

func roomPath(name string) string { return "/chat/" + url.PathEscape(name) + "/" }
