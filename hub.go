package main

import (
	"errors"
	"net"
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

// outbox holds what is still to be written to one socket. It is bounded in
// bytes; frames are shared with other outboxes and never written to. One
// goroutine writes, and only while there is something to write.
type outbox struct {
	conn    net.Conn
	most    int            // bytes that may be pending
	writers sync.WaitGroup // drain, while it runs
	writing atomic.Int64   // ticks since when a write has not returned, else 0

	mu      sync.Mutex // guards the rest
	pending net.Buffers
	size    int           // bytes in pending
	held    bool          // replay is under way: pending waits for release
	older   []byte        // the part of the replay that goes next
	taken   chan struct{} // closed when older has been taken or dropped
	active  bool          // drain runs
	closing bool          // a Close frame ends pending, or nothing may follow
}

// push queues frames, whole ones, behind what is pending. It never blocks. If
// they do not fit, what is pending is dropped and the peer is told to come back
// later (1013); its cursor says what it missed.
func (o *outbox) push(frames []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.closing || len(frames) == 0:
	case o.size+len(frames) > o.most:
		o.pending = nil
		o.end(closeTryLater, "too slow")
	default:
		o.pending = append(o.pending, frames)
		o.size += len(frames)
		o.wake()
	}
}

// close queues a Close frame as the last one. Closing twice is harmless.
func (o *outbox) close(code int, reason string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.closing {
		if o.held {
			o.pending = nil // newer than what replay still owes: the cursor must not jump
		}
		o.end(code, reason)
	}
}

// end needs o.mu.
func (o *outbox) end(code int, reason string) {
	o.pending, o.closing = append(o.pending, closeFrame(code, reason)), true
	o.wake()
}

// abandon takes no more frames, and drops what waits unless a Close frame ends it.
func (o *outbox) abandon() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.closing {
		o.pending, o.closing = nil, true
	}
	if o.older != nil {
		o.older = nil
		close(o.taken)
	}
}

// hold keeps what is pushed back until release, so that feed goes first.
func (o *outbox) hold() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.held = true
}

func (o *outbox) release() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.held = false
	o.wake()
}

// feed writes frames ahead of what is held, and waits until the writer has taken
// them: a long replay goes as fast as the peer reads. It reports false when the
// socket is closing.
func (o *outbox) feed(frames []byte) bool {
	o.mu.Lock()
	if o.closing {
		o.mu.Unlock()
		return false
	}
	taken := make(chan struct{})
	o.older, o.taken = frames, taken
	o.wake()
	o.mu.Unlock()
	<-taken
	return true
}

func (o *outbox) isClosing() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.closing
}

// wake starts drain if there is something that it may write. It needs o.mu.
func (o *outbox) wake() {
	if !o.active && (o.older != nil || len(o.pending) > 0 && (!o.held || o.closing)) {
		o.active = true
		o.writers.Add(1)
		go o.drain()
	}
}

// take returns what goes next, all that has gathered. It needs o.mu.
func (o *outbox) take() (batch net.Buffers) {
	if o.older != nil {
		batch, o.older = net.Buffers{o.older}, nil
		close(o.taken)
	}
	if !o.held || o.closing {
		batch = append(batch, o.pending...)
		o.pending, o.size = nil, 0
	}
	return batch
}

func (o *outbox) drain() {
	defer o.writers.Done()
	for {
		o.mu.Lock()
		batch, last := o.take(), o.closing
		o.active = len(batch) > 0
		o.mu.Unlock()
		if len(batch) == 0 {
			return
		}
		if o.write(batch) != nil {
			o.conn.Close() // wakes the reader, which ends the rest
			o.abandon()
			return
		}
		if last {
			o.conn.SetReadDeadline(time.Now().Add(lingerWait)) // for the peer's Close
		}
	}
}

// write puts frames on the wire. There is no deadline, which would cost a timer
// for each write: Hub.sweep cuts connections that are stuck here.
func (o *outbox) write(frames net.Buffers) (err error) {
	o.writing.Store(ticks())
	defer o.writing.Store(0)
	if len(frames) == 1 {
		_, err = o.conn.Write(frames[0])
	} else {
		_, err = frames.WriteTo(o.conn) // writev
	}
	return err
}

// member is one socket in the hub.
type member struct {
	*Conn
	user    User      // ID 0: a visitor who has not said a name
	session []byte    // hash of the session that it signed in with, if any
	expires time.Time // when the user has to leave; zero: never
	room    int64     // or followsRooms
	from    int64     // the stream of events that it gets begins after this id
	dialect *dialect

	guest    User           // the name that a visitor without a session spoke under last
	language string         // of the sentences that it is told
	address  string         // of the visitor, as Admit counts it
	peer     string         // of the connection, with its port
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
	errHubClosed     = errors.New("hub is closed")
	errFull          = errors.New("too many sockets")
	errFullAddress   = errors.New("too many sockets from one address")
	errSocketClosing = errors.New("socket is closing")
)

// Hub knows who is in which room. It is the local broadcaster: what Publish is
// given reaches every socket of the room through its outbox.
type Hub struct {
	maxSockets, maxPerAddress int // 0: no limit

	mu        sync.Mutex // guards everything below; nothing blocks under it
	closed    bool
	last      int64                    // id of the newest event published
	rooms     map[int64][]*member      // by room id, and followsRooms
	users     map[int64]*presence      // by user id
	members   map[*member]struct{}     // all of them, also those that are in no room yet
	news      map[int64]struct{}       // users whose presence may have to be announced
	insiders  map[int64]map[int64]bool // users by room, for rooms that have members
	online    []string                 // those announced, sorted
	everyone  []byte                   // the frame that says so
	sockets   sync.WaitGroup           // one for each member
	open      int                      // sockets admitted, in all and by address
	addresses map[string]int
	stop      chan struct{} // ends sweepLoop; closed by Close
	swept     chan struct{} // closed when sweepLoop has returned
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
		insiders:      make(map[int64]map[int64]bool),
		members:       make(map[*member]struct{}),
		news:          make(map[int64]struct{}),
		stop:          make(chan struct{}),
		swept:         make(chan struct{}),
	}
	h.listOnline()
	go h.sweepLoop()
	return h
}

// Admit counts a socket that is about to open, if there is room for it. Dismiss
// gives its place back.
func (h *Hub) Admit(address string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.closed:
		return errHubClosed
	case h.maxSockets > 0 && h.open >= h.maxSockets:
		return errFull
	case h.maxPerAddress > 0 && h.addresses[address] >= h.maxPerAddress:
		return errFullAddress
	}
	h.open++
	h.addresses[address]++
	return nil
}

func (h *Hub) Dismiss(address string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.open--
	if h.addresses[address]--; h.addresses[address] == 0 {
		delete(h.addresses, address)
	}
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
	h.members[m] = struct{}{}
	h.sockets.Add(1)
	return nil
}

// Remove undoes Add and Join, whether they succeeded or not.
func (h *Hub) Remove(m *member) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.members[m]; ok {
		h.leave(m)
		delete(h.members, m)
		h.sockets.Done()
	}
}

// Last returns the id of the newest event published. The store has it and all
// before; what it has after that is about to be published.
func (h *Hub) Last() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.last
}

// Join puts m into its room and returns what Last does: m gets every later event,
// and no other.
func (h *Hub) Join(m *member) (last int64, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return 0, errHubClosed
	}
	m.place = len(h.rooms[m.room])
	h.rooms[m.room] = append(h.rooms[m.room], m)
	if m.user.ID != 0 {
		p := h.users[m.user.ID]
		if p == nil {
			p = &presence{name: m.user.Name}
			h.users[m.user.ID] = p
		}
		p.members = append(p.members, m)
		h.news[m.user.ID] = struct{}{}
	}
	if m.room == followsRooms {
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
	if p := h.users[m.user.ID]; p != nil {
		p.members = slices.DeleteFunc(p.members, func(o *member) bool { return o == m })
		p.left = time.Now()
		h.news[m.user.ID] = struct{}{}
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
	var run []Event // of public rooms, or of one private one
	for _, e := range events {
		h.last = max(h.last, e.ID)
		switch e.Kind {
		case KindRead: // concerns nobody else
			if p := h.users[e.Author.ID]; p != nil {
				h.deliver(p.members, []Event{e})
			}
			continue
		case KindJoin:
			h.admit(e)
		case KindLeave:
			h.deliver(h.rooms[followsRooms], run)
			h.expel(e)
			run = nil
			continue
		}
		if len(run) > 0 && privacy(run[0]) != privacy(e) {
			h.deliver(h.rooms[followsRooms], run)
			run = nil
		}
		run = append(run, e)
		if len(h.rooms[e.Room.ID]) > 0 {
			byRoom[e.Room.ID] = append(byRoom[e.Room.ID], e)
		}
	}
	h.deliver(h.rooms[followsRooms], run)
	for id, events := range byRoom {
		h.deliver(h.rooms[id], events)
	}
}

// privacy is the private room that an event is in, or 0.
func privacy(e Event) int64 {
	if e.Room.Private {
		return e.Room.ID
	}
	return 0
}

// admit and expel need h.mu.
func (h *Hub) admit(e Event) {
	if h.insiders[e.Room.ID] == nil {
		h.insiders[e.Room.ID] = make(map[int64]bool)
	}
	h.insiders[e.Room.ID][e.Author.ID] = true
}

// expel tells everybody, who leaves too, before it takes effect.
func (h *Hub) expel(e Event) {
	h.deliver(h.rooms[followsRooms], []Event{e})
	delete(h.insiders[e.Room.ID], e.Author.ID)
	for _, m := range slices.Clone(h.rooms[e.Room.ID]) {
		if m.user.ID == e.Author.ID {
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
	return !r.Private && !u.Confined || h.insiders[r.ID][u.ID]
}

// deliver encodes events, of public rooms or of one private one, once per dialect
// in use, all of them into one slice that the members' outboxes share. Only those
// who are confined to some rooms may need another.
func (h *Hub) deliver(members []*member, events []Event) {
	if len(events) == 0 {
		return
	}
	frames := make(map[*dialect][]byte, 1)
	for _, m := range members {
		if m.user.Confined {
			m.push(m.dialect.frames(slices.DeleteFunc(slices.Clone(events), func(e Event) bool { return !h.sees(m.user, e.Room) })))
			continue
		}
		if !h.sees(m.user, events[0].Room) {
			continue
		}
		f, ok := frames[m.dialect]
		if !ok {
			f = m.dialect.frames(events)
			frames[m.dialect] = f
		}
		m.push(f)
	}
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
// the server restarts (1012), and waits for it.
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
	impatient := time.AfterFunc(goodbyeWait, h.cutAll)
	h.sockets.Wait()
	impatient.Stop()
	close(h.stop)
	<-h.swept
}

// ending reports whether Close has begun.
func (h *Hub) ending() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.closed
}

func (h *Hub) cutAll() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for m := range h.members {
		m.conn.Close()
	}
}

func (h *Hub) sweepLoop() {
	defer close(h.swept)
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
		case !m.expires.IsZero() && !clock.Before(m.expires):
			h.drop(m)
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
	frame := appendFrame(nil, opText, encodeJSON(f))
	for _, m := range h.rooms[followsRooms] {
		m.push(frame)
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
	h.everyone = appendFrame(nil, opText, encodeJSON(presenceFrame{Type: "presence", All: h.online}))
}
