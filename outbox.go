package main

import (
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// traffic is what many outboxes have done.
type traffic struct {
	sent  atomic.Int64 // bytes
	drops atomic.Int64 // of what did not fit
}

// outbox holds what is still to be written to one socket. It is bounded in
// bytes; frames are shared with other outboxes and never written to. One
// goroutine writes, and only while there is something to write.
type outbox struct {
	conn    net.Conn
	most    int            // bytes that may be pending
	last    []byte         // of a stream: what goes out last, as it has no Close frame
	writers sync.WaitGroup // drain, while it runs
	writing atomic.Int64   // ticks since when a write has not returned, else 0
	traffic *traffic       // counts what it does; nil: nobody does

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
		if o.traffic != nil {
			o.traffic.drops.Add(1)
		}
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
	frame := o.last
	if frame == nil {
		frame = closeFrame(code, reason)
	}
	o.pending, o.closing = append(o.pending, frame), true
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
	if !o.held || o.closing {
		batch, o.pending, o.size = o.pending, nil, 0
	}
	if o.older != nil {
		batch = slices.Insert(batch, 0, o.older)
		o.older = nil
		close(o.taken)
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
			wait := lingerWait // for the peer's Close
			if o.last != nil {
				wait = 0
			}
			o.conn.SetReadDeadline(time.Now().Add(wait))
		}
	}
}

// write puts frames on the wire. There is no deadline, which would cost a timer
// for each write: Hub.sweep cuts connections that are stuck here.
func (o *outbox) write(frames net.Buffers) (err error) {
	o.writing.Store(ticks())
	defer o.writing.Store(0)
	n := int64(0)
	if len(frames) == 1 {
		one, failed := o.conn.Write(frames[0])
		n, err = int64(one), failed
	} else {
		many := frames // a copy, as WriteTo moves it to the heap
		n, err = many.WriteTo(o.conn)
	}
	if o.traffic != nil {
		o.traffic.sent.Add(n)
	}
	return err
}
