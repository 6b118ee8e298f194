package main

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
)

// Whoever loses membership while others speak gets what was said before, and
// nothing of what was said after, live or replayed.
func TestLeaveWhilePublishing(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		ann, bob := s.user("ann"), s.user("bob")
		for round := range 20 {
			room, err := s.store.CreatePrivateRoom(fmt.Sprint("secret", round), ann, bob)
			if err != nil {
				t.Fatal(err)
			}
			p := s.follow("bob", 0)
			go p.listen()
			var all sync.WaitGroup
			for i := range 3 {
				all.Go(func() {
					for j := range 20 {
						if _, err := s.store.AppendWait(Event{Kind: KindMessage, Room: room, Author: ann, Body: fmt.Sprint(room.Name, " ", i, " ", j)}); err != nil {
							t.Error(err)
						}
					}
				})
			}
			all.Go(func() {
				if err := s.store.ChangeMember(KindLeave, room, bob); err != nil {
					t.Error(err)
				}
				if _, err := s.store.AppendWait(Event{Kind: KindMessage, Room: room, Author: ann, Body: "without bob"}); err != nil {
					t.Error(err)
				}
			})
			all.Wait()
			synctest.Wait()
			left := false
			for _, frame := range p.takeHeard() {
				if left && strings.Contains(frame, room.Name) || strings.Contains(frame, "without bob") {
					t.Errorf("round %d: after bob left it got %s", round, frame)
				}
				left = left || strings.Contains(frame, `"leave"`) && strings.Contains(frame, room.Name)
			}
			again := s.follow("bob", 0)
			go again.listen()
			synctest.Wait()
			if heard := strings.Join(again.takeHeard(), "\n"); strings.Contains(heard, "secret") || !strings.Contains(heard, "caught_up") {
				t.Errorf("round %d: replayed to somebody who left: %s", round, heard)
			}
			p.conn.Close()
			again.conn.Close()
		}
	})
}

// A guest of one room sees that one, though it is public, and no other.
func TestConfined(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		lobby, other := s.room("lobby"), s.room("other")
		guest := s.user("guest")
		guest.Confined = true
		if err := s.store.ChangeMember(KindJoin, lobby, guest); err != nil {
			t.Fatal(err)
		}
		if !s.hub.Sees(guest, lobby) || s.hub.Sees(guest, other) {
			t.Error("the hub thinks otherwise")
		}
		for _, room := range []Room{lobby, other} {
			_, err := s.store.AppendWait(Event{Kind: KindMessage, Room: room, Author: guest, Body: "hello"})
			if (err == nil) != (room == lobby) {
				t.Errorf("speaking in %s: %v", room.Name, err)
			}
			if _, err := s.store.AppendWait(Event{Kind: KindMessage, Room: room, Author: s.user("ann"), Body: "hello"}); err != nil {
				t.Fatal(err)
			}
		}
		events, _, err := s.store.Since(t.Context(), guest, 0, 0, 10)
		if err != nil || len(events) != 2 || events[0].Room.ID != lobby.ID {
			t.Errorf("replay: %v, %v", events, err)
		}
		states, err := s.store.RoomStates(t.Context(), guest)
		if err != nil || len(states) != 1 {
			t.Errorf("rooms: %v, %v", states, err)
		}
	})
}
