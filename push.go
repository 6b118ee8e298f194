package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Limits of timed pushes.
const (
	minPushEvery  = time.Second
	maxPushEvery  = 24 * time.Hour
	maxPushTimes  = 10_000
	maxPushLife   = 30 * 24 * time.Hour
	maxRoomPushes = 4   // that run in one room
	maxPushes     = 100 // that run
	pushRetry     = 5 * time.Second
)

// Push is a text that is said again and again.
type Push struct {
	ID       int64  `json:"id"`
	Room     string `json:"room"`
	Username string `json:"username"` // who started it
	Text     string `json:"text"`     // with {time} and {room} still in it
	Every    string `json:"every"`
	Times    int    `json:"times"`
	Done     int    `json:"done"`
}

// defaultPush says what the tutorials' push does, but comes to an end.
var defaultPush = Push{Text: "[{time}] 实时推送 - 房间: {room}", Every: "2s", Times: 30}

// pushText is what a push says at a time.
func pushText(text string, at time.Time, room Room) string {
	return strings.NewReplacer("{time}", at.Local().Format(time.DateTime), "{room}", room.Name).Replace(text)
}

// pusher says what is due. What that is it finds in the table, so that a restart
// changes nothing: what came due meanwhile is said once, and the rest as from then.
type pusher struct {
	store *Store
	log   *slog.Logger
	wake  chan struct{} // a push was started; nobody waits to say so
}

// run pushes until ctx is done.
func (p *pusher) run(ctx context.Context) {
	for ctx.Err() == nil {
		wait, err := p.store.pushNext()
		if err != nil {
			p.log.Error("push", "err", err)
			wait = pushRetry
		}
		select {
		case <-ctx.Done():
		case <-p.wake:
		case <-time.After(wait):
		}
	}
}

// pushNext lets the push speak whose turn it is, if it is time, and returns how long
// to wait before the next call.
func (s *Store) pushNext() (wait time.Duration, err error) {
	var id int64
	var due time.Time
	err = s.queryRow(context.Background(), "SELECT id, due FROM pushes WHERE ended IS NULL ORDER BY due LIMIT 1").Scan(&id, millis{&due})
	if err != nil {
		return maxPushEvery, instead(err, ErrNotFound, nil)
	}
	if wait = time.Until(due); wait > 0 {
		return wait, nil
	}
	err = s.update(func(w *writer) error { return w.push(id) })
	return 0, instead(err, ErrNotFound, nil) // stopped just now
}

// push says the next message of a push, and counts it in the same transaction: so a
// crash neither repeats one nor leaves one out. It ends if who started it may not speak
// in the room any more. The error is ErrNotFound if it has ended before.
func (w *writer) push(id int64) error {
	var text string
	var done int
	var room Room
	var u User
	err := w.queryRow("SELECT p.text, p.done + 1, "+roomColumns+", "+userColumns+`
		FROM pushes p JOIN users u ON u.id = p.user JOIN rooms r ON r.id = p.room WHERE p.id = ? AND p.ended IS NULL`, id).
		Scan(u.columns(room.columns(&text, &done)...)...)
	if err != nil {
		return err
	}
	if err = ErrForbidden; !u.gone() {
		err = w.say(Event{Room: room, Author: u.author(), CID: fmt.Sprintf("push-%d-%d", id, done), Body: pushText(text, w.now, room)})
	}
	switch {
	case err == nil:
		return w.exec("UPDATE pushes SET done = done + 1, due = ?1 + every, ended = CASE WHEN done + 1 >= times THEN ?1 END WHERE id = ?2",
			w.now.UnixMilli(), id)
	case isOwnFault(err):
		return w.exec("UPDATE pushes SET ended = ? WHERE id = ?", w.now.UnixMilli(), id)
	}
	return err
}

// say makes a message of a program the running job's event, which is published.
func (w *writer) say(e Event) error {
	e.Kind, e.Time, e.Pushed = KindMessage, w.now, true
	err := w.message(&e)
	if err == nil {
		w.job.event = e
	}
	return err
}

// StartPush has u say a text in a room, now and then again after every. It fails
// with a problem if too many run already.
func (s *Store) StartPush(room Room, u User, text string, every time.Duration, times int) (id int64, err error) {
	err = s.update(func(w *writer) error {
		if err := w.checkRoom(&Event{Room: room, Author: u}); err != nil {
			return err
		}
		var here, all int
		if err := w.queryRow("SELECT count(*) FILTER (WHERE room = ?), count(*) FROM pushes WHERE ended IS NULL", room.ID).Scan(&here, &all); err != nil {
			return err
		}
		if here >= maxRoomPushes || all >= maxPushes {
			return refuse(http.StatusConflict, "many_pushes", maxRoomPushes, maxPushes)
		}
		return w.queryRow("INSERT INTO pushes (room, user, text, every, times, started, due) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?6) RETURNING id",
			room.ID, u.ID, text, every.Milliseconds(), times, w.now.UnixMilli()).Scan(&id)
	})
	return id, err
}

// StopPush ends one, if it has not ended.
func (s *Store) StopPush(id int64) error {
	return s.update(func(w *writer) error {
		return w.exec("UPDATE pushes SET ended = ? WHERE id = ? AND ended IS NULL", w.now.UnixMilli(), id)
	})
}

// Pushes returns those that run in a room.
func (s *Store) Pushes(ctx context.Context, room int64) ([]Push, error) {
	type running struct {
		Push
		every int64
	}
	all, err := collect(ctx, s.read, func(p *running) []any {
		return []any{&p.ID, &p.Room, &p.Username, &p.Text, &p.every, &p.Times, &p.Done}
	}, `
		SELECT p.id, r.name, u.name, p.text, p.every, p.times, p.done
		FROM pushes p JOIN rooms r ON r.id = p.room JOIN users u ON u.id = p.user WHERE p.room = ? AND p.ended IS NULL ORDER BY p.id`, room)
	pushes := []Push{}
	for _, p := range all {
		p.Every = (time.Duration(p.every) * time.Millisecond).String()
		pushes = append(pushes, p.Push)
	}
	return pushes, err
}

// HasPushes reports whether there was ever one in a room.
func (s *Store) HasPushes(ctx context.Context, room int64) (has bool, err error) {
	err = s.queryRow(ctx, "SELECT EXISTS (SELECT 1 FROM pushes WHERE room = ?)", room).Scan(&has)
	return has, err
}

// handlePushes lists those that run. Unlike the tutorials' GET it starts none: any
// web site could have had a visitor do so.
func (s *server) handlePushes(w http.ResponseWriter, r *http.Request, v visitor) error {
	room, err := s.enter(r, v, r.FormValue("room"))
	if err != nil {
		return err
	}
	pushes, err := s.store.Pushes(r.Context(), room.ID)
	if err != nil {
		return err
	}
	return s.writeJSON(w, r, http.StatusOK, map[string][]Push{"pushes": pushes})
}

// handlePush starts a push, or ends the one whose id is in stop.
func (s *server) handlePush(w http.ResponseWriter, r *http.Request, v visitor) error {
	if err := parsePush(r); err != nil {
		return err
	}
	room, err := s.enter(r, v, r.FormValue("room"))
	if err != nil {
		return err
	}
	var p Push
	switch {
	case v.Role == RoleGuest:
		err = ErrForbidden
	case r.FormValue("stop") != "":
		p, err = s.stopPush(r, v, room)
	default:
		p, err = s.startPush(r, v, room)
	}
	switch {
	case err != nil && wantsPage(r):
		return s.showAbout(w, r, v, room, err, page{Form: formOf(r, "text", "every", "times")})
	case err != nil:
		return err
	case !wantsPage(r):
		return s.writeJSON(w, r, http.StatusOK, struct {
			Status string `json:"status"`
			Push
		}{"success", p})
	case r.FormValue("from") == "about":
		return s.redirect(w, r, roomPath(room.Name)+"about/")
	}
	return s.redirect(w, r, roomPath(room.Name))
}

// parsePush has r.FormValue find the fields of a form, a query and of JSON.
func parsePush(r *http.Request) error {
	if err := r.ParseMultipartForm(maxBody); err != nil && err != http.ErrNotMultipart {
		return badForm(err)
	}
	if !sendsJSON(r) {
		return nil
	}
	var fields map[string]any
	d := json.NewDecoder(r.Body)
	d.UseNumber()
	if err := d.Decode(&fields); err != nil {
		return refuse(http.StatusBadRequest, "bad_json")
	}
	for name, value := range fields {
		switch value.(type) {
		case string, json.Number:
			r.Form.Set(name, fmt.Sprint(value))
		default:
			return refuse(http.StatusBadRequest, "bad_frame")
		}
	}
	return nil
}

func (s *server) startPush(r *http.Request, v visitor, room Room) (p Push, err error) {
	p = Push{
		Room: room.Name, Username: v.Name, Text: cmp.Or(r.FormValue("text"), r.FormValue("message"), defaultPush.Text),
		Every: cmp.Or(r.FormValue("every"), defaultPush.Every), Times: defaultPush.Times,
	}
	if _, err := strconv.ParseFloat(p.Every, 64); err == nil {
		p.Every += "s"
	}
	every, err := time.ParseDuration(p.Every)
	if times := r.FormValue("times"); err == nil && times != "" {
		p.Times, err = strconv.Atoi(times)
	}
	if err != nil || every < minPushEvery || every > maxPushEvery || p.Times < 1 || p.Times > maxPushTimes || every*time.Duration(p.Times) > maxPushLife {
		return p, refuse(http.StatusBadRequest, "bad_push", minPushEvery.Seconds(), maxPushEvery.Hours(), maxPushTimes, maxPushLife.Hours()/24)
	}
	if !utf8.ValidString(p.Text) {
		return p, refuse(http.StatusBadRequest, "not_utf8")
	}
	if err := cmp.Or(checkMessage(p.Text), checkMessage(pushText(p.Text, time.Now(), room)), s.posts.check("user "+v.Name)); err != nil {
		return p, err
	}
	p.Every = every.String()
	if p.ID, err = s.store.StartPush(room, v.User, p.Text, every, p.Times); err != nil {
		return p, err
	}
	poke(s.pushes.wake)
	return p, nil
}

// stopPush is for who started it and who may manage the room; of direct messages
// both may.
func (s *server) stopPush(r *http.Request, v visitor, room Room) (Push, error) {
	id, _, err := numberOf(r, "stop")
	if err != nil {
		return Push{}, err
	}
	pushes, err := s.store.Pushes(r.Context(), room.ID)
	if err != nil {
		return Push{}, err
	}
	i := slices.IndexFunc(pushes, func(p Push) bool { return p.ID == id })
	switch {
	case i < 0:
		return Push{}, ErrNotFound
	case !room.managedBy(v.User) && !room.direct() && pushes[i].Username != v.Name:
		return Push{}, ErrForbidden
	}
	return pushes[i], s.store.StopPush(id)
}
