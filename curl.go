package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// A room is a URL: GET /chat/{room}/ listens to it and POST speaks into it, with
// nothing but curl. Browsers get the page at the same place.

// wantsPage tells browsers, and whoever does not say what it takes, from scripts.
func wantsPage(r *http.Request) bool {
	accept := r.Header.Get("Accept")
	if _, token := bearer(r); token || sendsJSON(r) {
		return false
	}
	return strings.Contains(accept, "text/html") || r.Method != http.MethodPost && (accept == "" || accept == "*/*")
}

func sendsJSON(r *http.Request) bool {
	return strings.HasPrefix(r.Header.Get("Content-Type"), "application/json")
}

// The dialects of streams: what the log has of a room, as on a socket.
var (
	dialectSSE = &dialect{
		stream: true, contentType: "text/event-stream", idle: []byte(":\n\n"),
		encode: showing(isKept, func(e Event) []byte {
			f := newEventFrame(e)
			event := "event: " + f.Type + "\n"
			if e.Kind == KindMessage { // for onmessage
				event = ""
			}
			return fmt.Appendf(nil, "id: %d\n%sdata: %s\n\n", e.ID, event, encodeJSON(f))
		}),
		caughtUp: func(id int64) []byte { return fmt.Appendf(nil, "id: %d\n\n", id) }, // Last-Event-ID moves, and nothing is called
	}
	dialectLines = &dialect{
		stream: true, contentType: "application/x-ndjson", idle: []byte("\n"),
		encode:   showing(isKept, func(e Event) []byte { return append(encodeJSON(newEventFrame(e)), '\n') }),
		caughtUp: func(id int64) []byte { return append(encodeJSON(caughtUpFrame{"caught_up", id}), '\n') },
	}
	dialectText = &dialect{
		stream: true, contentType: "text/plain; charset=utf-8", idle: []byte("\n"),
		encode: showing(isKept, func(e Event) []byte { return []byte(newEventFrame(e).line()) }),
	}
)

// isKept is false of what the log does not keep.
func isKept(e Event) bool { return e.ID != 0 }

// line is an event as it is read in a terminal, with its newline, or "" if there is
// nothing to read. Only what begins a line with time and name is by that one: further
// lines of a text are set in, and characters that would move the cursor replaced.
func (f eventFrame) line() string {
	text := strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\n' && r != '\t' {
			return unicode.ReplacementChar
		}
		return r
	}, cmp.Or(f.Message, f.Emoji))
	text = strings.ReplaceAll(text, "\n", "\n    ")
	switch kind := Kind(f.Type); {
	case f.Deleted:
		return ""
	case kind == KindMessage:
		text = fmt.Sprintf("%s: %s", f.Username, text)
	case kind == KindEdit:
		text = fmt.Sprintf("%s edited #%d: %s", f.Username, f.Target, text)
	case kind == KindDelete:
		text = fmt.Sprintf("%s deleted #%d", f.Username, f.Target)
	case kind == KindReact && *f.On:
		text = fmt.Sprintf("%s reacts to #%d with %s", f.Username, f.Target, text)
	case kind == KindReact:
		text = fmt.Sprintf("%s takes %s back from #%d", f.Username, text, f.Target)
	default:
		return ""
	}
	at, _ := time.Parse(time.RFC3339, f.Time)
	return fmt.Sprintf("[%s] %s\n", at.Local().Format(time.DateTime), text)
}

// streamOf is the dialect of the stream that a request asks for, nil if it asks
// for something else.
func streamOf(r *http.Request, v visitor) *dialect {
	accept := r.Header.Get("Accept")
	switch {
	case r.Method != http.MethodGet, strings.Contains(accept, "text/html"), strings.Contains(accept, "application/json"):
		return nil
	case strings.Contains(accept, "text/event-stream"):
		return dialectSSE
	case strings.Contains(accept, "ndjson"), strings.Contains(accept, "jsonl"):
		return dialectLines
	case strings.Contains(accept, "text/plain"), v.token != 0 && (accept == "" || accept == "*/*"):
		return dialectText
	}
	return nil
}

// streamHead is the head of a response without end. Its body is over when the
// connection is, so nothing has to be wrapped into chunks.
func streamHead(h http.Header, d *dialect) []byte {
	h.Set("Content-Type", d.contentType)
	h.Set("Cache-Control", "no-store, no-transform")
	h.Set("X-Accel-Buffering", "no") // nginx passes on what comes when it comes
	h.Set("Connection", "close")
	var b bytes.Buffer
	b.WriteString("HTTP/1.1 200 OK\r\n")
	h.Write(&b)
	b.WriteString("\r\n")
	return b.Bytes()
}

// stream sends what happens in a room from now on, or after the id in Last-Event-ID
// or since=, and goes on until the client leaves. It is a socket's other half: the
// same join, and the same outbox.
func (s *server) stream(w http.ResponseWriter, r *http.Request, v visitor, room Room, d *dialect) error {
	since, replay, err := numberOf(r, "since")
	if id := r.Header.Get("Last-Event-ID"); id != "" { // from who has been here before
		since, replay, err = parseID(id)
	}
	if err != nil {
		return err
	}
	return s.attend(w, r, v, &member{dialect: d, room: room.ID, from: since}, replay, func(m *member) { io.Copy(io.Discard, m.br) })
}

// handlePost takes what a socket takes: a frame of chatd.v1 as JSON, or a message
// in whatever form scripts send one, or the form of the composer without JavaScript.
func (s *server) handlePost(w http.ResponseWriter, r *http.Request, v visitor) error {
	in, err := readFrame(r)
	if err != nil {
		return err
	}
	room, err := s.enter(r, v, r.PathValue("room"))
	if err != nil {
		return err
	}
	e, err := s.post(v, room, in)
	switch {
	case !wantsPage(r) && err != nil:
		return err
	case !wantsPage(r):
		return s.writeJSON(w, r, http.StatusOK, postedFrame{newEventFrame(e), permalink(s.urlFor(r), e)})
	case err != nil:
		p := problemOf(err)
		return s.showRoom(w, r, v, room, p.status, page{Error: s.sentence(v.language(r), p), Form: map[string]string{"message": in.Message}})
	}
	return s.redirect(w, r, fmt.Sprintf("%s#m%d", roomPath(room.Name), e.ID))
}

// postedFrame answers whoever speaks over HTTP.
type postedFrame struct {
	eventFrame
	URL string `json:"url,omitempty"` // where people find the message
}

// permalink is where a message is found, whatever follows it.
func permalink(public string, e Event) string {
	id := e.ID
	if e.Kind != KindMessage {
		id = e.Target
	}
	return fmt.Sprintf("%s%s?at=%d#m%d", public, roomPath(e.Room.Name), id, id)
}

// readFrame reads what was sent, by its Content-Type:
//
//   - JSON is a frame; of one without a type only message, or text, as tools that
//     post to Slack have it, is needed.
//   - A form has a field message or text, or payload with JSON in it.
//   - All else is the text itself, also what curl -d takes for a form.
//
// Idempotency-Key is the cid if there is no other.
func readFrame(r *http.Request) (in clientFrame, err error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return in, badForm(err)
	}
	if event := r.Header.Get("X-GitHub-Event"); event != "" {
		in.Message, err = forgeText(event, body)
		in.Message = strings.ToValidUTF8(in.Message[:min(len(in.Message), maxMessage)], "")
		in.Type, in.CID = string(KindMessage), r.Header.Get("X-GitHub-Delivery")
		return in, err
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	if err := r.ParseMultipartForm(maxBody); err != nil && err != http.ErrNotMultipart {
		return in, refuse(http.StatusBadRequest, "bad_request")
	}
	form := r.PostForm
	switch {
	case sendsJSON(r):
		in, err = decodeFrame(body)
	case form.Has("payload"):
		in, err = decodeFrame([]byte(form.Get("payload")))
	case form.Has("message") || form.Has("text") || r.MultipartForm != nil:
		in.CID = form.Get("cid")
		in.Message = strings.ReplaceAll(cmp.Or(form.Get("message"), form.Get("text")), "\r\n", "\n") // as forms send it
	default:
		in.Message = strings.TrimRight(string(body), "\r\n")
	}
	if err == nil && !utf8.ValidString(in.Message) {
		err = refuse(http.StatusBadRequest, "not_utf8")
	}
	in.Type = cmp.Or(in.Type, string(KindMessage))
	in.CID = cmp.Or(in.CID, r.Header.Get("Idempotency-Key"))
	return in, err
}

func (s *server) post(v visitor, room Room, in clientFrame) (Event, error) {
	e, err := in.event(v.User, room)
	e.Pushed = v.token != 0 && e.Kind == KindMessage
	if err == nil && e.Kind == KindTyping { // nothing to keep
		err = refuse(http.StatusBadRequest, "unknown_type")
	}
	if err == nil {
		err = s.throttlePost("user "+v.Name, e)
	}
	if err != nil {
		return e, err
	}
	return s.store.AppendWait(e)
}

// history is a page of messages, oldest first.
type history struct {
	Messages []historyFrame `json:"messages"`
	Older    int64          `json:"older"` // 0, or the before= of the page before
	Newer    int64          `json:"newer"` // 0, or the after= of the next page
}

type historyFrame struct {
	eventFrame
	Reactions map[string][]string `json:"reactions,omitempty"` // names by emoji
}

func (s *server) sendHistory(w http.ResponseWriter, r *http.Request, room Room) error {
	events, older, newer, err := s.page(r, room)
	if err != nil {
		return err
	}
	reactions, err := s.store.Reactions(r.Context(), events)
	if err != nil {
		return err
	}
	h := history{[]historyFrame{}, older, newer}
	for _, e := range events {
		h.Messages = append(h.Messages, historyFrame{newEventFrame(e), reactions[e.ID]})
	}
	return s.writeJSON(w, r, http.StatusOK, h)
}

// missed is a page of the log, oldest first.
type missed struct {
	Events []eventFrame `json:"events"`
	ID     int64        `json:"id"`   // the since= of the next page
	More   bool         `json:"more"` // there may be one already
}

// sendMissed is what a socket replays, for those who have none.
func (s *server) sendMissed(w http.ResponseWriter, r *http.Request, v visitor, room Room) error {
	since, _, err := numberOf(r, "since")
	if err != nil {
		return err
	}
	last := s.hub.Last() // a socket that goes on from here gets what is published later
	events, more, err := s.store.Since(r.Context(), v.User, room.ID, since, replayPage)
	if err != nil {
		return err
	}
	answer := missed{Events: []eventFrame{}, ID: since, More: more}
	for _, e := range events {
		if e.ID > last {
			break
		}
		answer.Events = append(answer.Events, newEventFrame(e))
		answer.ID = e.ID
	}
	return s.writeJSON(w, r, http.StatusOK, answer)
}
