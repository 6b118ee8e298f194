package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"
)

// protocolV1 is chatd's own subprotocol.
const protocolV1 = "chatd.v1"

const (
	replayPage = 200     // events read and written at a time
	listLength = 10      // messages that the tutorials' /chat/ begins with
	lobby      = "lobby" // the room of sockets that name none
)

// checkSocket decides about a handshake while it can still be refused over HTTP.
// nameless: it is for visitors without a session too, if any are let in.
func (s *server) checkSocket(w http.ResponseWriter, r *http.Request, v visitor, nameless bool) error {
	if err := checkHandshake(w.Header(), r); err != nil {
		return err
	}
	// An upgrade is a GET, which CrossOriginProtection lets through, but it acts
	// with the visitor's cookie as a POST does.
	post := *r
	post.Method = http.MethodPost
	switch {
	case s.socketOrigins.Check(&post) != nil:
		return refuse(http.StatusForbidden, "cross_origin")
	case v.ID == 0 && !(nameless && s.guests):
		return refuse(http.StatusUnauthorized, "sign_in")
	}
	return nil
}

// socket upgrades a request that checkSocket has passed, and runs talk with the
// member that it becomes. Its outbox is held.
func (s *server) socket(w http.ResponseWriter, r *http.Request, v visitor, m *member, talk func(*member)) error {
	m.address = s.clientAddress(r)
	if !s.trusts(m.address) { // a proxy that does not say for whom it asks would be one for all
		if err := s.connects.check(networkOf(m.address)); err != nil {
			return err
		}
	}
	if err := s.hub.Admit(m.address); err != nil {
		return err
	}
	conn, err := hijack(w, maxFrame)
	if err != nil {
		s.hub.Remove(m)
		return err
	}
	m.Conn, m.visitor, m.language, m.request = conn, v, v.language(r), requestID(r.Context())
	if m.dialect.stream {
		conn.heard.Store(0) // it will say nothing
		conn.last = m.dialect.idle
	}
	m.hold()
	if err = s.hub.Add(m); err == nil {
		err = s.checkStill(r, v)
	}
	switch {
	case err != nil:
	case m.dialect.stream:
		_, err = conn.conn.Write(streamHead(w.Header(), m.dialect))
	default:
		err = conn.handshake(r, protocolV1)
	}
	if err != nil { // it is too late for an answer
		conn.abandon()
		conn.conn.Close()
		s.hub.Remove(m)
		return nil
	}
	go func() { // ends before Hub.Close does
		defer s.hub.Remove(m)
		talk(m)
		m.asks.Wait() // so that what it sent comes back to it, while the store is there
		if s.hub.ending() {
			m.close(closeRestart, "")
		}
		conn.finish()
	}()
	return nil
}

// listen passes what arrives to receive until the socket ends, and tells the
// peer what was refused. receive returns the cid, if it got so far.
func (s *server) listen(m *member, receive func(text []byte) (cid string, err error)) {
	for {
		opcode, msg, err := m.ReadMessage()
		if err != nil {
			return
		}
		if opcode == opBinary {
			s.refuse(m, refuse(http.StatusUnsupportedMediaType, "binary"), "")
			m.close(closeNotText, "text only")
			continue // until the peer's Close
		}
		if cid, err := receive(msg); err != nil {
			s.refuse(m, err, cid)
		}
	}
}

// refuse tells the peer, in its language, why something was not done.
func (s *server) refuse(m *member, err error, cid string) {
	p := problemOf(err)
	s.complain(context.Background(), p, "socket", "request", m.request, "user", m.User.Name, "err", err)
	m.push(appendFrame(nil, opText, m.dialect.refuse(p, s.sentence(m.language, p), cid)))
}

// join puts m, which has seen everything up to m.from, into its room. It gets
// every later event, once each and in order:
//
//  1. What has been published is fed to it from the store, which has it.
//  2. Hub.Join returns last. What is published later waits in the outbox, which is held.
//  3. What was published between 1 and 2 is fed now, up to last.
//  4. The outbox is released.
//
// So 1 and 3 bring what is up to last, and 2 what is after it. What the store has
// and Publish has not yet had comes by 2 alone. However long 1 takes, only what is
// said between 2 and 4 has to wait in memory; if it is too much, the socket is
// closed, and the client's cursor is where 3 got to.
func (s *server) join(m *member) error {
	defer m.release()
	cursor, err := s.replay(m, m.from, s.hub.Last())
	if err != nil {
		return err
	}
	last, err := s.hub.Join(m)
	if err != nil {
		return err
	}
	if _, err = s.replay(m, cursor, last); err == nil && m.dialect.caughtUp != nil {
		m.feed(m.dialect.caughtUp(last))
	}
	return err
}

// joined ends a socket that could not join. It reports whether it could.
func (s *server) joined(m *member, err error) bool {
	if err != nil && !errors.Is(err, errHubClosed) && !errors.Is(err, errSocketClosing) {
		s.log.Error("join", "request", m.request, "user", m.User.Name, "room", m.room, "err", err)
		m.close(closeTryLater, "try again")
	}
	return err == nil
}

// replay feeds m the events after cursor, up to the id last, and returns the new
// cursor. Of them it keeps one page in memory.
func (s *server) replay(m *member, cursor, last int64) (int64, error) {
	for cursor < last && m.may(scopeRead) {
		page, more, err := s.store.Since(context.Background(), m.User, m.room, cursor, replayPage)
		if err != nil {
			return cursor, err
		}
		for len(page) > 0 && page[len(page)-1].ID > last {
			page, more = page[:len(page)-1], false
		}
		if len(page) > 0 {
			cursor = page[len(page)-1].ID
			frames, n := m.dialect.frames(page)
			if !m.feed(frames) {
				return cursor, errSocketClosing
			}
			s.replayed.Add(int64(n))
			if !m.dialect.stream {
				m.heard.Store(ticks()) // it takes what we write, so it lives
			}
		}
		if !more {
			break
		}
	}
	return cursor, nil
}

// append sends an event to the store. The answer is the event itself, which
// comes to m with all others of its room, or a refusal.
func (s *server) append(m *member, e Event) error {
	e.Pushed = m.token != 0 && e.Kind == KindMessage
	m.asks.Add(1)
	cid := e.CID
	err := s.store.Append(e, func(e Event, err error) {
		defer m.asks.Done()
		if err != nil {
			s.refuse(m, err, cid)
		} else if !m.may(scopeRead) || e.Again && e.ID <= m.from { // it is not in what m gets
			frames, _ := m.dialect.frames([]Event{e})
			m.push(frames)
		}
	})
	if err != nil {
		m.asks.Done()
	}
	return err
}

// throttleKey is the user, or the socket of a visitor whose name is only said:
// many people may share an address.
func (m *member) throttleKey() string {
	if m.User.ID == 0 {
		return fmt.Sprintf("socket %p", m)
	}
	return "user " + m.User.Name
}

// handleV1 is GET /ws: one socket for all rooms.
func (s *server) handleV1(w http.ResponseWriter, r *http.Request, v visitor) error {
	if err := s.checkSocket(w, r, v, false); err != nil {
		return err
	}
	return s.socket(w, r, v, &member{dialect: dialectV1, room: followsRooms}, s.talkV1)
}

func (s *server) talkV1(m *member) {
	m.release()
	m.conn.SetReadDeadline(time.Now().Add(helloWait))
	if s.hub.ending() { // and has set a deadline that this one replaced
		return
	}
	greeted := false
	s.listen(m, func(text []byte) (string, error) {
		in, err := decodeFrame(text)
		switch {
		case err != nil:
		case greeted == (in.Type == "hello"):
			err = refuse(http.StatusBadRequest, "hello")
		case greeted:
			err = s.onFrame(m, in)
		default:
			greeted = true
			m.conn.SetReadDeadline(time.Time{})
			s.hello(m, in)
		}
		return in.CID, err
	})
}

// hello answers with welcome, what m has missed, and caught_up.
func (s *server) hello(m *member, in clientFrame) {
	m.hold()
	f, err := s.welcome(m)
	m.from = f.ID
	if err == nil {
		m.feed(textFrame(f))
		if in.Since != nil && m.may(scopeRead) {
			err = s.goOn(m, in)
		}
	}
	if err == nil {
		err = s.join(m)
	}
	s.joined(m, err)
}

// goOn has m begin at the cursor in a hello. A client that would rather have the
// newest events than all of them is told where they begin.
func (s *server) goOn(m *member, in clientFrame) (err error) {
	s.replays.Add(1)
	m.from = *in.Since
	if in.Most != nil {
		m.from, err = s.store.Skip(context.Background(), m.from, s.hub.Last(), max(0, *in.Most))
		if missed := m.from - *in.Since; err == nil && missed > 0 {
			m.feed(textFrame(behindFrame{"behind", m.from, missed}))
		}
	}
	return err
}

func (s *server) welcome(m *member) (f welcomeFrame, err error) {
	f = welcomeFrame{Type: "welcome", Username: m.User.Name, Version: s.version, Rooms: []roomFrame{}}
	if !m.may(scopeRead) {
		return f, nil
	}
	f.ID = s.hub.Last()
	rooms, err := s.store.RoomStates(context.Background(), m.User)
	for _, r := range rooms {
		expired := ""
		if r.Keep > 0 {
			expired = timestamp(r.expires(time.Now()))
		}
		f.Rooms = append(f.Rooms, roomFrame{r.Name, r.LastRead, r.Unread, r.Mentions, r.Notify, r.Private, r.Topic, r.Archived, expired})
	}
	return f, err
}

func (s *server) onFrame(m *member, in clientFrame) error {
	if !m.may(scopePost) {
		return refuse(http.StatusForbidden, "token_scope")
	}
	room, err := s.store.Room(in.Room)
	needed := in.Room != "" || slices.Contains([]Kind{KindMessage, KindRead, KindTyping}, Kind(in.Type)) // the rest names a message
	if needed && (err != nil || !s.hub.Sees(m.User, room)) {
		return refuse(http.StatusNotFound, "unknown_room")
	}
	e, err := in.event(m.User, room)
	switch {
	case err != nil:
		return err
	case e.Kind == KindTyping:
		if s.typing.allow(m.throttleKey()) {
			s.hub.Publish([]Event{e})
		}
		return nil
	}
	if err := s.throttlePost(m.throttleKey(), e); err != nil {
		return err
	}
	return s.append(m, e)
}

// throttlePost counts an event against its author. Reading is counted apart, or it
// would leave less for speaking.
func (s *server) throttlePost(author string, e Event) error {
	if e.Kind == KindRead {
		author = "reads of " + author
	}
	return s.posts.check(author)
}

// roomSocket is the tutorials' kind of socket: one room, messages only. parse
// returns what was said, and the name it was said under, which counts only for
// visitors who are not signed in.
func (s *server) roomSocket(d *dialect, parse func([]byte) (clientFrame, error)) handler {
	return func(w http.ResponseWriter, r *http.Request, v visitor) error {
		if err := s.checkSocket(w, r, v, true); err != nil {
			return err
		}
		since, replay, err := numberOf(r, "since")
		if err != nil {
			return err
		}
		room, err := s.enter(r, v, r.PathValue("room"))
		if err != nil {
			return err
		}
		m := &member{dialect: d, room: room.ID, from: since}
		return s.attend(w, r, v, m, replay, func(m *member) { s.hear(m, room, parse) })
	}
}

// attend is socket for a member of one room, which gets what comes after m.from with
// replay, and else what comes from now on: a client that has our answer misses nothing.
func (s *server) attend(w http.ResponseWriter, r *http.Request, v visitor, m *member, replay bool, talk func(*member)) error {
	if replay {
		s.replays.Add(1)
	} else {
		m.from = s.hub.Last()
	}
	return s.socket(w, r, v, m, func(m *member) {
		if s.joined(m, s.join(m)) {
			talk(m)
		}
	})
}

func parsePlain(text []byte) (clientFrame, error) { return clientFrame{Message: string(text)}, nil }

func parseNothing([]byte) (clientFrame, error) {
	return clientFrame{}, refuse(http.StatusForbidden, "read_only")
}

// hear says in the room what m sends, until its socket ends.
func (s *server) hear(m *member, room Room, parse func([]byte) (clientFrame, error)) {
	s.listen(m, func(text []byte) (string, error) {
		in, err := parse(text)
		if err == nil {
			err = s.say(m, room, in)
		}
		return in.CID, err
	})
}

// say appends a message of m, or of the guest that m says it is.
func (s *server) say(m *member, room Room, in clientFrame) error {
	if !m.may(scopePost) {
		return refuse(http.StatusForbidden, "token_scope")
	}
	in.Type = string(KindMessage)
	e, err := in.event(m.User, room)
	if err == nil {
		err = s.posts.check(m.throttleKey())
	}
	if err == nil && m.User.ID == 0 {
		e.Author, err = s.speakingGuest(m, in.Username)
	}
	if err != nil {
		return err
	}
	return s.append(m, e)
}

// speakingGuest finds the user for a name that is only said. The last one is
// kept with the socket.
func (s *server) speakingGuest(m *member, said string) (User, error) {
	name, err := userName(cmp.Or(said, anonymousGuest))
	if err != nil {
		return User{}, err
	}
	if m.guest.Name != name {
		if m.guest, err = s.store.SpeakingGuest(context.Background(), name); err != nil {
			return User{}, err
		}
	}
	return m.guest, nil
}

// handleList is the tutorials' socket at /chat/: for members only, in the lobby.
func (s *server) handleList(w http.ResponseWriter, r *http.Request, v visitor) error {
	if err := s.checkSocket(w, r, v, false); err != nil {
		return err
	}
	room, err := s.enter(r, v, lobby)
	if err != nil {
		return err
	}
	m := &member{dialect: dialectList, room: room.ID, from: s.hub.Last()}
	return s.socket(w, r, v, m, func(m *member) {
		if s.joined(m, s.beginList(m)) {
			s.hear(m, room, decodeFrame)
		}
	})
}

// beginList is join after the newest messages instead of a replay.
func (s *server) beginList(m *member) error {
	if m.may(scopeRead) {
		page, _, err := s.store.Page(context.Background(), m.room, m.from+1, listLength)
		if err != nil {
			return err
		}
		m.feed(appendFrame(nil, opText, encodeList(page)))
	}
	return s.join(m)
}
