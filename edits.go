package main

import (
	"context"
	"net/http"
	"slices"
	"time"
)

const editsMost = 100 // texts of one message that are shown

// An Edit is a text that a message has had, and since when.
type Edit struct {
	Time    time.Time
	Message string
}

// Edits returns the texts of a message of a room, oldest first, the newest editsMost at
// most, or ErrNotFound if it is not there, or deleted.
func (s *Store) Edits(ctx context.Context, room, message int64) ([]Edit, error) {
	edits, err := collect(ctx, s.read, func(e *Edit) []any { return []any{millis{&e.Time}, &e.Message} }, `
		SELECT l.time, CASE l.kind WHEN 'edit' THEN l.body
			ELSE coalesce((SELECT former FROM log WHERE target = m.id AND kind = 'edit' ORDER BY id LIMIT 1), l.body) END
		FROM log m JOIN log l ON l.id = m.id OR l.target = m.id AND l.kind = 'edit'
		WHERE m.id = ? AND m.room = ? AND m.kind = 'message' AND m.body IS NOT NULL ORDER BY l.id DESC LIMIT ?`, message, room, editsMost)
	if err == nil && edits == nil {
		err = ErrNotFound
	}
	slices.Reverse(edits)
	return edits, err
}

type editFrame struct {
	Time    string `json:"time"`
	Message string `json:"message"`
}

// handleEdits shows what a message said before, to all who can have seen it say so.
func (s *server) handleEdits(w http.ResponseWriter, r *http.Request, v visitor, room Room) error {
	id, _, err := parseID(r.PathValue("id"))
	if err != nil {
		return err
	}
	edits, err := s.store.Edits(r.Context(), room.ID, id)
	if err != nil {
		return err
	}
	if wantsPage(r) {
		return s.render(w, r, v, http.StatusOK, "edits.html", page{Room: room.Name, Message: id, Edits: edits})
	}
	var frames []editFrame
	for _, e := range edits {
		frames = append(frames, editFrame{timestamp(e.Time), e.Message})
	}
	return s.writeJSON(w, r, http.StatusOK, map[string]any{"edits": frames})
}
