package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Limits of what a client may send.
const (
	maxMessage  = 8 << 10  // bytes of a message's text
	maxFrame    = 64 << 10 // bytes of a WebSocket message
	maxCID      = 64
	maxEmoji    = 64 // bytes; families of emoji are long
	maxRoomName = 64 // characters
	maxUserName = 32
	maxTopic    = 1024 // bytes
)

// problem is an error whose reason the user is told, in words of the catalogue:
// the key is "error." and the code.
type problem struct {
	status int
	code   string
	args   []any
}

func (p *problem) Error() string { return p.code }

func refuse(status int, code string, args ...any) error { return &problem{status, code, args} }

// told says how the user is told of errors.
var told = []struct {
	err error
	problem
}{
	{ErrNotFound, problem{404, "not_found", nil}},
	{ErrForbidden, problem{403, "forbidden", nil}},
	{ErrArchived, problem{403, "archived", nil}},
	{ErrTaken, problem{409, "name_taken", nil}},
	{ErrClosed, problem{503, "busy", nil}},
	{ErrStorage, problem{503, "storage", nil}},
}

// problemOf finds what to tell the user about an error. Anything unexpected is
// "internal" here, and its text is for the log only.
func problemOf(err error) *problem {
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	for _, t := range told {
		if errors.Is(err, t.err) {
			return &t.problem
		}
	}
	return &problem{500, "internal", nil}
}

// A dialect is what one kind of socket speaks: how events look in it, and how
// it is told that something it sent was refused.
type dialect struct {
	encode   func(Event) []byte // nil: this dialect does not show the event
	refuse   func(p *problem, sentence, cid string) []byte
	caughtUp func(id int64) []byte // what says that everything up to id has been sent; nil: nothing

	stream      bool   // not of a socket: what encode returns is the body of an HTTP response
	idle        []byte // says nothing, and shows that the stream is alive
	contentType string
}

// frames returns events as they go over the wire, one after the other, and how many
// of them this dialect shows.
func (d *dialect) frames(events []Event) (frames []byte, n int) {
	for _, e := range events {
		switch payload := d.encode(e); {
		case payload == nil:
			n--
		case d.stream:
			frames = append(frames, payload...)
		default:
			frames = appendFrame(frames, opText, payload)
		}
		n++
	}
	return frames, n
}

var (
	// dialectV1 is chatd.v1, the one that shows everything.
	dialectV1 = &dialect{
		encode:   encodeV1,
		refuse:   refuseJSON,
		caughtUp: func(id int64) []byte { return textFrame(caughtUpFrame{"caught_up", id}) },
	}

	// dialectChat is the tutorials' /ws/chat/{room}/: messages and nothing else.
	dialectChat = &dialect{encode: showing(isMessage, encodeChat), refuse: refuseJSON}

	// dialectPlain is the tutorials' /ws/{group}/: the text itself.
	dialectPlain = &dialect{
		encode: showing(isMessage, func(e Event) []byte { return []byte(e.Body) }),
		refuse: func(p *problem, sentence, _ string) []byte { return []byte("[" + p.code + "] " + sentence) },
	}

	// dialectList is the tutorials' /chat/: lists of messages.
	dialectList = &dialect{encode: showing(isMessage, func(e Event) []byte { return encodeList([]Event{e}) }), refuse: refuseJSON}

	// dialectPush is the tutorials' /ws/push/{room}: only what programs say.
	dialectPush = &dialect{encode: showing(func(e Event) bool { return isMessage(e) && e.Pushed }, encodeChat), refuse: refuseJSON}
)

// showing encodes the events that shown is true of, and leaves out the others.
func showing(shown func(Event) bool, encode func(Event) []byte) func(Event) []byte {
	return func(e Event) []byte {
		if !shown(e) {
			return nil
		}
		return encode(e)
	}
}

func isMessage(e Event) bool { return e.Kind == KindMessage && !e.Deleted }

// eventFrame is an event in chatd.v1.
type eventFrame struct {
	Type     string `json:"type"`
	ID       int64  `json:"id,omitempty"` // the cursor; in "read", the newest message read
	Target   int64  `json:"target,omitempty"`
	Room     string `json:"room,omitempty"`
	Username string `json:"username,omitempty"`
	Guest    bool   `json:"guest,omitempty"`
	Bot      bool   `json:"bot,omitempty"`
	Message  string `json:"message,omitempty"`
	Emoji    string `json:"emoji,omitempty"`
	On       *bool  `json:"on,omitempty"`
	Time     string `json:"time,omitempty"`
	CID      string `json:"cid,omitempty"`
	ReplyTo  int64  `json:"reply_to,omitempty"`
	Quote    *Quote `json:"quote,omitempty"`
	Edited   bool   `json:"edited,omitempty"`
	Deleted  bool   `json:"deleted,omitempty"`
	Pushed   bool   `json:"pushed,omitempty"`
	Former   string `json:"former,omitempty"` // room: its name until now
	Private  bool   `json:"private,omitempty"`
	Topic    string `json:"topic,omitempty"`
	Archived bool   `json:"archived,omitempty"`
	Keep     int    `json:"keep,omitempty"` // days
}

func newEventFrame(e Event) eventFrame {
	f := eventFrame{
		Type: string(e.Kind), ID: e.ID, Target: e.Target, Room: e.Room.Name, Username: e.Author.Name,
		Guest: e.Author.Role == RoleGuest, Bot: e.Author.Bot, Time: timestamp(e.Time), CID: e.CID,
	}
	switch e.Kind {
	case KindMessage:
		f.Message, f.Edited, f.Deleted, f.Pushed = e.Body, e.Edited, e.Deleted, e.Pushed
		f.Target, f.ReplyTo, f.Quote = 0, e.Target, e.Quote
	case KindEdit:
		f.Message, f.Deleted = e.Body, e.Deleted
	case KindReact, KindUnreact:
		on := e.Kind == KindReact
		f.Type, f.Emoji, f.On = "react", e.Body, &on
	case KindRead:
		f = eventFrame{Type: f.Type, ID: e.Target, Room: f.Room}
	case KindRoom:
		f = eventFrame{Type: f.Type, Room: f.Room, Username: f.Username, Former: e.Body,
			Private: e.Room.Private, Topic: e.Room.Topic, Archived: e.Room.Archived, Keep: e.Room.Keep}
	case KindTyping, KindJoin, KindLeave:
		f = eventFrame{Type: f.Type, Room: f.Room, Username: f.Username}
	}
	return f
}

// timestamp is how times go over the wire: UTC, always with milliseconds.
func timestamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }

func encodeV1(e Event) []byte {
	if e.Kind == KindRead {
		return encodeJSON(markerFrame{"read", e.Target, e.Room.Name, e.Unread, e.Mentions})
	}
	return encodeJSON(newEventFrame(e))
}

type markerFrame struct {
	Type     string `json:"type"` // read
	ID       int64  `json:"id"`   // the newest message read
	Room     string `json:"room"`
	Unread   int    `json:"unread"` // what is after it, as in roomFrame
	Mentions int    `json:"mentions"`
}

type welcomeFrame struct {
	Type     string      `json:"type"` // welcome
	Username string      `json:"username"`
	ID       int64       `json:"id"`      // newest event there is
	Version  string      `json:"version"` // of the page's assets
	Rooms    []roomFrame `json:"rooms"`
}

type roomFrame struct {
	Room     string `json:"room"`
	LastRead int64  `json:"last_read_id"`
	Unread   int    `json:"unread"`
	Mentions int    `json:"mentions"`
	Notify   string `json:"notify"`
	Private  bool   `json:"private,omitempty"`
	Topic    string `json:"topic,omitempty"`
	Archived bool   `json:"archived,omitempty"`
	Expired  string `json:"expired,omitempty"` // what was said before is gone, or about to be
}

type caughtUpFrame struct {
	Type string `json:"type"` // caught_up
	ID   int64  `json:"id"`   // everything up to here has been sent
}

type behindFrame struct {
	Type   string `json:"type"`   // behind
	ID     int64  `json:"id"`     // nothing up to here will be sent
	Missed int64  `json:"missed"` // events between the client's cursor and id, or fewer
}

type presenceFrame struct {
	Type    string   `json:"type"`             // presence
	All     []string `json:"all,omitzero"`     // after caught_up: who is online
	Online  []string `json:"online,omitempty"` // who came since
	Offline []string `json:"offline,omitempty"`
}

type problemFrame struct {
	Type  string `json:"type"` // error
	Code  string `json:"code"`
	CID   string `json:"cid,omitempty"`
	Error string `json:"error"`
}

func refuseJSON(p *problem, sentence, cid string) []byte {
	return encodeJSON(problemFrame{"error", p.code, cid, sentence})
}

type chatFrame struct {
	Message  string `json:"message"`
	Username string `json:"username"`
	ID       int64  `json:"id"`
	Room     string `json:"room"`
	Time     string `json:"time"`
}

func encodeChat(e Event) []byte {
	return encodeJSON(chatFrame{e.Body, e.Author.Name, e.ID, e.Room.Name, timestamp(e.Time)})
}

type listFrame struct {
	Command  string      `json:"command"` // messages
	Messages []listEntry `json:"messages"`
}

type listEntry struct {
	User      string `json:"user"`
	Content   string `json:"content"`
	Timestamp string `json:"timestamp"`
}

func encodeList(events []Event) []byte {
	f := listFrame{"messages", []listEntry{}}
	for _, e := range events {
		f.Messages = append(f.Messages, listEntry{e.Author.Name, e.Body, timestamp(e.Time)})
	}
	return encodeJSON(f)
}

// encodeJSON leaves < > & as they are: frames are never part of a page. It is
// for our own types, which cannot fail.
func encodeJSON(v any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		panic(fmt.Sprintf("encode %T: %v", v, err))
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// textFrame is one of our own types on a socket.
func textFrame(v any) []byte { return appendFrame(nil, opText, encodeJSON(v)) }

// clientFrame is what clients send, in chatd.v1 and in the tutorials' formats.
type clientFrame struct {
	Type     string `json:"type"`
	Since    *int64 `json:"since"` // hello: the cursor
	Most     *int   `json:"most"`  // hello: skip older events if more than these were missed
	Room     string `json:"room"`
	CID      string `json:"cid"`
	Message  string `json:"message"`
	Text     string `json:"text"` // the same, as Slack calls it
	ReplyTo  int64  `json:"reply_to"`
	ID       int64  `json:"id"`
	Emoji    string `json:"emoji"`
	On       *bool  `json:"on"`
	Back     bool   `json:"back"` // read: mark what is after id unread
	Username string `json:"username"`
}

// decodeFrame keeps what it could read even when it fails, so that the refusal
// can name the cid.
func decodeFrame(msg []byte) (f clientFrame, err error) {
	err = json.Unmarshal(msg, &f)
	if _, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return f, refuse(400, "bad_frame")
	}
	if err != nil {
		return f, refuse(400, "bad_json")
	}
	f.Message = cmp.Or(f.Message, f.Text)
	return f, nil
}

// event makes of a frame of chatd.v1 the event that it asks for.
func (f clientFrame) event(author User, room Room) (Event, error) {
	e := Event{Kind: Kind(f.Type), Room: room, Author: author, CID: f.CID, Target: f.ID}
	if len(f.CID) > maxCID {
		return e, refuse(400, "bad_cid", maxCID)
	}
	switch e.Kind {
	case KindMessage:
		e.Target, e.Body = f.ReplyTo, f.Message
		return e, checkMessage(f.Message)
	case KindEdit:
		e.Body = f.Message
		return e, checkMessage(f.Message)
	case KindReact:
		e.Body = f.Emoji
		if f.On != nil && !*f.On {
			e.Kind = KindUnreact
		}
		if f.Emoji == "" || len(f.Emoji) > maxEmoji {
			return e, refuse(400, "bad_frame")
		}
		return e, nil
	case KindRead:
		e.Back = f.Back
		return e, nil
	case KindDelete, KindTyping:
		return e, nil
	}
	return e, refuse(400, "unknown_type")
}

// checkMessage returns the problem of a text, if it has one.
func checkMessage(text string) error {
	switch {
	case strings.TrimSpace(text) == "":
		return refuse(400, "empty")
	case len(text) > maxMessage:
		return refuse(413, "too_long", maxMessage)
	}
	return nil
}

// roomName and userName return a name in the form in which it is kept, or the
// rule that it breaks.
func roomName(s string) (string, error) { return cleanName(s, maxRoomName, "bad_room") }
func userName(s string) (string, error) { return cleanName(s, maxUserName, "bad_user") }

var nameRule = regexp.MustCompile(`^[\pL\pM\p{Nd} ._-]*[\pL\p{Nd}][\pL\pM\p{Nd} ._-]*$`)

// cleanName accepts letters, their marks and digits of any script, single
// spaces, and -_. of which a name cannot consist.
func cleanName(s string, limit int, code string) (string, error) {
	name := strings.Join(strings.Fields(s), " ")
	invisible := func(r rune) bool { return unicode.Is(unicode.Other_Default_Ignorable_Code_Point, r) } // some letters are
	if !nameRule.MatchString(name) || strings.ContainsFunc(name, invisible) || utf8.RuneCountInString(name) > limit {
		return "", refuse(400, code, limit)
	}
	return name, nil
}

// foldName is the key by which names are compared: names that differ only in
// case (Unicode's simple folding) have the same one.
func foldName(s string) string {
	return strings.Map(func(r rune) rune {
		least := r
		for o := unicode.SimpleFold(r); o != r; o = unicode.SimpleFold(o) {
			least = min(least, o)
		}
		return least
	}, s)
}
