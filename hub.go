package main

import (
	"errors"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	outboxMost   = 1 << 20          // bytes that wait for one socket; frames are shared, so many sockets can afford it
	writeWait    = 10 * time.Second // a socket that takes nothing for so long is cut
	pingEvery    = 25 * time.Second
	deadAfter    = 3 * pingEvery    // without any frame, pongs included
	helloWait    = 15 * time.Second // for the first message of a socket that begins with one
	sweepEvery   = time.Second
	leaveWait    = 5 * time.Second // a shorter absence is not announced
	goodbyeWait  = 3 * time.Second // for all sockets together, in Close
	pingSlots    = int(pingEvery / sweepEvery)
	followsRooms = 0 // the room of sockets that follow every room
)

// member is one socket in the hub, and who has it. One that may not read is in no room.
type member struct {
	*Conn
	visitor
	room    int64 // or followsRooms
	from    int64 // the stream of events that it gets begins after this id
	dialect *dialect

	guest    User           // the name that a visitor without a session spoke under last
	language string         // of the sentences that it is told
	address  string         // of the visitor, as Admit counts it
	request  string         // id of the request that it began with
	asks     sync.WaitGroup // events that it has sent to the store and has no answer for

	place int // index in its room; -1: in none
	slot  int // which of the pingSlots it is pinged in
}

// presence is a user who has a socket, or had one a moment ago.
type presence struct {
	name      string
	members   []*member
	left      time.Time // when the last one left
	announced bool
}

var (
	errHubClosed     = refuse(http.StatusServiceUnavailable, "busy")
	errSocketClosing = errors.New("socket is closing")
)

// Hub knows who is in which room. It is the local broadcaster: what Publish is
// given reaches every socket of the room through its outbox.
type Hub struct {
	maxSockets, maxPerAddress int // 0: no limit

	joins, deliveries atomic.Int64
	traffic           traffic

	mu        sync.Mutex // guards everything below; nothing blocks under it
	closed    bool
	last      int64                // id of the newest event published
	rooms     map[int64][]*member  // by room id, and followsRooms
	users     map[int64]*presence  // by user id
	members   map[*member]struct{} // all of them, also those that are in no room yet
	news      map[int64]struct{}   // users whose presence may have to be announced
	insiders  map[[2]int64]bool    // by room and user, for rooms that have members
	online    []string             // those announced, sorted
	everyone  []byte               // the frame that says so
	running   sync.WaitGroup       // one for each member, and one for sweepLoop
	open      int                  // sockets admitted, in all and by address
	addresses map[string]int
	stop      chan struct{} // ends sweepLoop; closed by Close
}

// NewHub returns a hub for a log whose newest event is last. The limits are those
// of Admit.
func NewHub(last int64, maxSockets, maxPerAddress int) *Hub {
	h := &Hub{
		maxSockets:    maxSockets,
		maxPerAddress: maxPerAddress,
		addresses:     make(map[string]int),
		last:          last,
		rooms:         make(map[int64][]*member),
		users:         make(map[int64]*presence),
		insiders:      make(map[[2]int64]bool),
		members:       make(map[*member]struct{}),
		news:          make(map[int64]struct{}),
		stop:          make(chan struct{}),
	}
	h.listOnline()
	h.running.Go(h.sweepLoop)
	return h
}

// Admit counts a socket that is about to open, if there is room for it. After it
// comes Remove.
func (h *Hub) Admit(address string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.closed:
		return errHubClosed
	case h.maxSockets > 0 && h.open >= h.maxSockets:
		return refuse(http.StatusServiceUnavailable, "full")
	case h.maxPerAddress > 0 && h.addresses[address] >= h.maxPerAddress:
		return refuse(http.StatusTooManyRequests, "full_address")
	}
	h.open++
	h.addresses[address]++
	return nil
}

// Add makes m known: from now on the sweeper looks after its connection, and
// Close waits until Remove. It fails once the hub is closed.
func (h *Hub) Add(m *member) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	m.place = -1
	if h.closed {
		return errHubClosed
	}
	m.slot = len(h.members) % pingSlots
	m.traffic = &h.traffic
	h.members[m] = struct{}{}
	h.running.Add(1)
	return nil
}

// Remove undoes Admit and, whether they succeeded or not, Add and Join.
func (h *Hub) Remove(m *member) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.open--
	if h.addresses[m.address]--; h.addresses[m.address] == 0 {
		delete(h.addresses, m.address)
	}
	if _, ok := h.members[m]; ok {
		h.leave(m)
		delete(h.members, m)
		h.running.Done()
	}
}

// Last returns the id of the newest event published. The store has it and all
// before; what it has after that is about to be published.
func (h *Hub) Last() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.last
}

// Join puts m into its room, unless it may not read, and returns what Last does: m gets every
// later event, and no other.
func (h *Hub) Join(m *member) (last int64, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.closed:
		return 0, errHubClosed
	case !m.may(scopeRead):
		return m.from, nil
	}
	h.joins.Add(1)
	m.place = len(h.rooms[m.room])
	h.rooms[m.room] = append(h.rooms[m.room], m)
	if m.User.ID != 0 {
		p := h.users[m.User.ID]
		if p == nil {
			p = &presence{name: m.User.Name}
			h.users[m.User.ID] = p
		}
		p.members = append(p.members, m)
		h.news[m.User.ID] = struct{}{}
	}
	if m.room == followsRooms && m.Only == 0 {
		m.push(h.everyone)
	}
	return h.last, nil
}

// leave takes m out of its room. Leaving twice is harmless. The caller holds h.mu.
func (h *Hub) leave(m *member) {
	if m.place < 0 {
		return
	}
	room := h.rooms[m.room]
	last := len(room) - 1
	room[m.place] = room[last]
	room[m.place].place = m.place
	room[last] = nil
	m.place = -1
	if h.rooms[m.room] = room[:last]; last == 0 {
		delete(h.rooms, m.room)
	}
	if p := h.users[m.User.ID]; p != nil {
		p.members = slices.DeleteFunc(p.members, func(o *member) bool { return o == m })
		p.left = time.Now()
		h.news[m.User.ID] = struct{}{}
	}
}

// Publish hands events to everyone who is to see them.
//
//  1. The store has them, and they come in the order of their ids, from one goroutine
//     (news has no id and may come from any).
//  2. It never blocks: a socket whose outbox is full is told to come back, and finds
//     what it missed in the store.
//  3. Between Join and the end of its outbox a member gets every event that is for
//     it, once and in order.
func (h *Hub) Publish(events []Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	byRoom := make(map[int64][]Event)
	begun := 0 // where the run of events begins that are public, or of one private room
	flush := func(end int) {
		h.deliver(h.rooms[followsRooms], events[begun:end])
		begun = end
	}
	for i := range events {
		e := &events[i]
		h.last = max(h.last, e.ID)
		if begun < i && privacy(&events[begun]) != privacy(e) {
			flush(i)
		}
		switch e.Kind {
		case KindRead: // concerns nobody else
			flush(i)
			begun++
			if p := h.users[e.Author.ID]; p != nil {
				h.deliver(p.members, events[i:i+1])
			}
			continue
		case KindJoin:
			h.insiders[[2]int64{e.Room.ID, e.Author.ID}] = true
		case KindLeave:
			flush(i + 1) // those who leave hear it too
			h.expel(e)
			continue
		}
		if len(h.rooms[e.Room.ID]) > 0 {
			byRoom[e.Room.ID] = append(byRoom[e.Room.ID], *e)
		}
	}
	flush(len(events))
	for id, events := range byRoom {
		h.deliver(h.rooms[id], events)
	}
}

// privacy is the private room that an event is in, or 0.
func privacy(e *Event) int64 {
	if e.Room.Private {
		return e.Room.ID
	}
	return 0
}

// expel needs h.mu.
func (h *Hub) expel(e *Event) {
	delete(h.insiders, [2]int64{e.Room.ID, e.Author.ID})
	for _, m := range slices.Clone(h.rooms[e.Room.ID]) {
		if m.User.ID == e.Author.ID {
			h.leave(m)
			m.close(closePolicy, "no longer a member")
		}
	}
}

// Sees reports whether u may see a room at this moment.
func (h *Hub) Sees(u User, r Room) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.sees(u, r)
}

func (h *Hub) sees(u User, r Room) bool {
	return (u.Only == 0 || u.Only == r.ID) && (!r.Private && !u.Confined || h.insiders[[2]int64{r.ID, u.ID}])
}

// deliver encodes events, of public rooms or of one private one, once per dialect
// in use, all of them into one slice that the members' outboxes share. Only those
// who are limited to some rooms may need another.
func (h *Hub) deliver(members []*member, events []Event) {
	if len(events) == 0 || len(members) == 0 {
		return
	}
	type batch struct {
		frames []byte
		n      int
	}
	batches := make(map[*dialect]batch, 1)
	delivered := 0
	for _, m := range members {
		if m.limited() {
			f, n := m.dialect.frames(slices.DeleteFunc(slices.Clone(events), func(e Event) bool { return !h.sees(m.User, e.Room) }))
			m.push(f)
			delivered += n
			continue
		}
		if !h.sees(m.User, events[0].Room) {
			continue
		}
		b, ok := batches[m.dialect]
		if !ok {
			b.frames, b.n = m.dialect.frames(events)
			batches[m.dialect] = b
		}
		m.push(b.frames)
		delivered += b.n
	}
	h.deliveries.Add(int64(delivered))
}

// Online returns the names of the users whose presence has been announced, sorted.
func (h *Hub) Online() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.online // replaced, never changed
}

// Sockets returns how many are open.
func (h *Hub) Sockets() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.members)
}

// Grants returns what has let the open sockets in.
func (h *Hub) Grants() map[grant]bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := make(map[grant]bool)
	for m := range h.members {
		all[m.grant()] = true
	}
	return all
}

// Drop closes the sockets that match, for good (1008).
func (h *Hub) Drop(match func(*member) bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for m := range h.members {
		if match(m) {
			h.drop(m)
		}
	}
}

// drop needs h.mu.
func (h *Hub) drop(m *member) {
	h.leave(m)
	m.close(closePolicy, "signed out")
}

// Close lets every socket finish what it has sent to the store, tells it that
// the server restarts (1012), and waits for it. Closing twice is harmless.
func (h *Hub) Close() {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return
	}
	h.closed = true
	for m := range h.members {
		m.conn.SetReadDeadline(time.Now()) // its reader returns, sees ending and says goodbye
	}
	h.mu.Unlock()
	close(h.stop)
	impatient := time.AfterFunc(goodbyeWait, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		for m := range h.members {
			m.conn.Close()
		}
	})
	h.running.Wait()
	impatient.Stop()
}

// ending reports whether Close has begun.
func (h *Hub) ending() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.closed
}

func (h *Hub) sweepLoop() {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for slot := 0; ; slot = (slot + 1) % pingSlots {
		select {
		case <-tick.C:
			h.sweep(slot)
			h.announce()
		case <-h.stop:
			return
		}
	}
}

// sweep cuts connections that are dead or stuck, drops those whose user's time is
// over, and pings those of one slot. One pass a second over all sockets takes the
// place of timers for each.
func (h *Hub) sweep(slot int) {
	ping := appendFrame(nil, opPing, nil)
	now, clock := ticks(), time.Now()
	late := func(since int64, limit time.Duration) bool { return since != 0 && now-since > int64(limit) }
	h.mu.Lock()
	defer h.mu.Unlock()
	for m := range h.members {
		switch {
		case late(m.writing.Load(), writeWait), late(m.began.Load(), messageWait), late(m.heard.Load(), deadAfter):
			m.conn.Close()
		case !m.Expires.IsZero() && !clock.Before(m.Expires):
			h.drop(m)
		case m.slot == slot && m.dialect.stream:
			m.push(m.dialect.idle)
		case m.slot == slot:
			m.push(ping)
		}
	}
}

// announce tells those who follow all rooms who came and who left for good.
func (h *Hub) announce() {
	h.mu.Lock()
	defer h.mu.Unlock()
	var f presenceFrame
	for id := range h.news {
		p := h.users[id]
		switch {
		case len(p.members) > 0:
			if !p.announced {
				f.Online = append(f.Online, p.name)
			}
			p.announced = true
		case time.Since(p.left) < leaveWait:
			continue
		default:
			if p.announced {
				f.Offline = append(f.Offline, p.name)
			}
			delete(h.users, id)
		}
		delete(h.news, id)
	}
	if len(f.Online)+len(f.Offline) == 0 {
		return
	}
	slices.Sort(f.Online)
	slices.Sort(f.Offline)
	f.Type = "presence"
	frame := textFrame(f)
	for _, m := range h.rooms[followsRooms] {
		if m.Only == 0 { // a token for one room says nothing about others
			m.push(frame)
		}
	}
	h.listOnline()
}

// listOnline needs h.mu.
func (h *Hub) listOnline() {
	h.online = []string{}
	for _, p := range h.users {
		if p.announced {
			h.online = append(h.online, p.name)
		}
	}
	slices.Sort(h.online)
	h.everyone = textFrame(presenceFrame{Type: "presence", All: h.online})
}
