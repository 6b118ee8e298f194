package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	searchWait   = 2 * time.Second // for what is not indexed yet
	searchTime   = 5 * time.Second // that a search may take in all
	maxQuery     = 300             // bytes, more are not looked at
	minPrefix    = 3               // characters of a word's beginning that finds the word
	snippetLead  = 80              // bytes before the first hit
	snippetBytes = 300

	searchBurst, searchesPerSecond = 30, 5 // of a user
)

// wanted is what somebody looks for. What is zero does not matter.
type wanted struct {
	phrases  [][]word // all must occur
	prefix   bool     // the very last word may be the beginning of one
	from, in string   // names
	since    time.Time
	until    time.Time // the first that is too late
	link     bool
}

var (
	term = regexp.MustCompile(`(?i)(?:(from|in|before|after|has):)?(?:"([^"]*)"?|([^\s"]+))`)
	// What a Chinese keyboard has in the place of what means something here.
	keyboard = strings.NewReplacer("：", ":", "“", `"`, "”", `"`, "＂", `"`, "　", " ")
)

// parseWanted understands anything: what looks like an operator and is none is text.
func parseWanted(text string) (q wanted) {
	text = keyboard.Replace(strings.ToValidUTF8(text[:min(len(text), maxQuery)], ""))
	for _, m := range term.FindAllStringSubmatch(text, -1) {
		value := m[2] + m[3]
		if q.operator(strings.ToLower(m[1]), value) {
			continue
		}
		if phrase := words(m[0]); len(phrase) > 0 {
			last := phrase[len(phrase)-1]
			q.prefix = m[3] != "" && !last.alone && utf8.RuneCountInString(last.text) >= minPrefix
			q.phrases = append(q.phrases, phrase)
		}
	}
	return q
}

// operator takes one in, if it is one.
func (q *wanted) operator(name, value string) bool {
	switch name {
	case "from":
		q.from = strings.TrimPrefix(value, "@")
		return q.from != ""
	case "in":
		q.in = strings.TrimPrefix(value, "#")
		return q.in != ""
	case "has":
		link := strings.EqualFold(value, "link")
		q.link = q.link || link
		return link
	case "before", "after":
		t, ok := parseTime(value)
		if ok && name == "before" {
			q.until = t
		} else if ok {
			q.since = t
		}
		return ok
	}
	return false
}

// parseTime returns when a time, day or month begins. A request does not tell the
// reader's time zone; without one it is ours.
func parseTime(text string) (t time.Time, ok bool) {
	for _, layout := range []string{time.RFC3339, "2006-1-2T15:04:05", "2006-1-2T15:04", "2006-1-2", "2006-1"} {
		if t, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			return t, true
		}
	}
	return t, false
}

// empty reports whether nothing is asked for.
func (q wanted) empty() bool {
	return len(q.phrases) == 0 && q.from == "" && q.in == "" && !q.link && q.since.IsZero() && q.until.IsZero()
}

// expression says to FTS5 what q wants of what u sees, but for the exact times. All the
// words in it are made of letters and digits, so nothing that was typed means anything
// there. It fails with ErrNotFound for a name that is nobody's, or of a room that u does not see.
func (s *Store) expression(ctx context.Context, u User, q wanted) (string, error) {
	places, err := s.places(ctx, u, q.in)
	if err != nil {
		return "", err
	}
	var anywhere []string
	for _, p := range places {
		terms := q.terms(p.mark)
		if len(terms) == 0 || p.mark == "" && p.tag != "public" {
			terms = append(terms, "tags:"+p.tag)
		}
		anywhere = append(anywhere, strings.Join(terms, " AND "))
	}
	all := []string{"((" + strings.Join(anywhere, ") OR (") + "))"}
	if q.from != "" {
		author, _, err := s.UserByName(ctx, q.from)
		if err != nil {
			return "", err
		}
		all = append(all, fmt.Sprintf("tags:u%d", author.ID))
	}
	if q.link {
		all = append(all, "tags:link")
	}
	if !q.since.IsZero() || !q.until.IsZero() {
		all = append(all, "tags:("+strings.Join(append(dateTags(q.since, q.until), "none"), " OR ")+")")
	}
	return strings.Join(all, " AND "), nil
}

// terms are the phrases for FTS5, in public rooms or in the private one of the mark.
func (q wanted) terms(mark string) (all []string) {
	for _, phrase := range q.phrases {
		column, text := "text", spaced(phrase, mark)
		if len(phrase) > 1 && !slices.ContainsFunc(phrase, func(w word) bool { return !w.alone }) {
			column, text = "pairs", pairs(phrase, mark)
		}
		all = append(all, column+`:"`+text+`"`)
	}
	if q.prefix {
		all[len(all)-1] += "*"
	}
	return all
}

// dateTags are those of the years and months that have all from since until until.
func dateTags(since, until time.Time) (tags []string) {
	if since = since.UTC(); since.Year() < 2000 { // there was no chatd
		since = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	}
	if now := time.Now(); until.IsZero() || until.After(now) {
		until = now
	}
	for at := since.AddDate(0, 0, 1-since.Day()).Truncate(24 * time.Hour); !at.After(until); {
		next, layout := at.AddDate(0, 1, 0), "200601"
		if year := at.AddDate(1, 0, 0); at.Month() == time.January && !year.After(until) {
			next, layout = year, "2006"
		}
		tags = append(tags, at.Format(layout))
		at = next
	}
	return tags
}

// marks returns where the phrases stand in a text, in order.
func (q wanted) marks(text string) (spans [][2]int) {
	have := words(text)
	for i, phrase := range q.phrases {
		for at := range have {
			if q.occurs(phrase, i == len(q.phrases)-1, have[at:]) {
				spans = append(spans, [2]int{have[at].start, have[at+len(phrase)-1].end})
			}
		}
	}
	slices.SortFunc(spans, func(a, b [2]int) int { return cmp.Compare(a[0], b[0]) })
	return spans
}

// occurs reports whether words begin with a phrase.
func (q wanted) occurs(phrase []word, last bool, have []word) bool {
	if len(have) < len(phrase) {
		return false
	}
	for i, w := range phrase {
		if w.text != have[i].text && !(q.prefix && last && i == len(phrase)-1 && strings.HasPrefix(have[i].text, w.text)) {
			return false
		}
	}
	return true
}

// Find returns the newest messages below the id before that u may see and that q
// wants, newest first, and whether there are more. All that was committed before is found.
func (s *Store) Find(ctx context.Context, u User, q wanted, before int64) (found []Event, more bool, err error) {
	if q.empty() {
		return nil, false, nil
	}
	ctx, cancel := context.WithTimeout(ctx, searchTime)
	defer cancel()
	if err := s.finishIndex(ctx); err != nil {
		return nil, false, err
	}
	where, err := s.expression(ctx, u, q)
	if err != nil {
		return nil, false, instead(err, ErrNotFound, nil)
	}
	found, err = collect(ctx, s.read, (*Event).columns, selectEvents+`
		WHERE l.id IN (SELECT s.rowid FROM search s CROSS JOIN log m ON m.id = s.rowid
			WHERE search MATCH ? AND s.rowid < ? AND m.time >= ? AND m.time < coalesce(?, 1 << 62) ORDER BY s.rowid DESC LIMIT ?) AND `+u.sees()+`
		ORDER BY l.id DESC`, where, before, q.since.UnixMilli(), timeOrNull(q.until), historyPage+1)
	if more = len(found) > historyPage; more {
		found = found[:historyPage]
	}
	return found, more, err
}

// finishIndex has the index brought up to date, and gives up when that takes long: there
// are messages from before there was an index. When nothing can be written, what is
// indexed is found all the same.
func (s *Store) finishIndex(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, searchWait)
	defer cancel()
	err := s.catchUp(ctx, 0)
	err = instead(err, context.DeadlineExceeded, refuse(http.StatusServiceUnavailable, "indexing"))
	return instead(err, ErrStorage, nil)
}

// place is how FTS5 knows the messages of a private room, or of all public ones, or of
// a public one: by a mark that their words have, and by a tag.
type place struct{ mark, tag string }

// places are where to look: the room of that name, or all that u sees. It fails with
// ErrNotFound if there are none.
func (s *Store) places(ctx context.Context, u User, in string) (places []place, err error) {
	var only Room
	if in != "" {
		if other, direct := strings.CutPrefix(in, "@"); direct {
			me, other := foldName(u.Name), foldName(other)
			in = min(me, other) + "+" + max(me, other)
		}
		if only, err = s.Room(in); err != nil {
			return nil, err
		}
	}
	all := !u.limited() && in == ""
	if all {
		places = append(places, place{"", "public"})
	}
	rooms, err := collect(ctx, s.read, func(r *Room) []any { return r.columns() },
		"SELECT "+roomColumns+" FROM rooms r WHERE (r.private OR NOT ?1) AND (?2 = 0 OR r.id = ?2) AND "+u.sees(), all, only.ID)
	for _, r := range rooms {
		p := place{tag: fmt.Sprintf("r%d", r.ID)}
		if r.Private {
			p.mark = roomMark(r.ID)
		}
		places = append(places, p)
	}
	if err == nil && len(places) == 0 {
		err = ErrNotFound
	}
	return places, err
}

// hit is a message that was found.
type hit struct {
	Event
	Snippet []piece
}

// piece is a part of a text.
type piece struct {
	Text string
	Hit  bool // is what was looked for
}

// snippet is the text about the first hit, with all hits in it.
func (q wanted) snippet(text string) (pieces []piece) {
	spans := q.marks(text)
	from := 0
	if len(spans) > 0 && spans[0][0] > snippetBytes/2 {
		from = runeStart(text, spans[0][0]-snippetLead)
		pieces = append(pieces, piece{"… ", false})
	}
	to := runeStart(text, from+snippetBytes)
	for _, span := range spans {
		if start, end := max(span[0], from), min(span[1], to); start < end {
			pieces = append(pieces, piece{text[from:start], false}, piece{text[start:end], true})
			from = end
		}
	}
	pieces = append(pieces, piece{text[from:to], false})
	if to < len(text) {
		pieces = append(pieces, piece{" …", false})
	}
	return pieces
}

// runeStart is i, or where the character begins that it is in.
func runeStart(text string, i int) int {
	if i >= len(text) {
		return len(text)
	}
	for !utf8.RuneStart(text[i]) {
		i--
	}
	return i
}

// foundPage is what search.html shows.
type foundPage struct {
	Asked bool
	Hits  []hit
	Older string // where the next page is, "" if there is none
}

// foundJSON is the same for scripts.
type foundJSON struct {
	Messages []postedFrame `json:"messages"` // newest first
	Older    int64         `json:"older"`    // 0, or the before= of the next page
}

func (s *server) handleSearch(w http.ResponseWriter, r *http.Request, v visitor) error {
	text := r.FormValue("q")
	q := parseWanted(text)
	found, older, err := s.find(r, v, q)
	if !wantsPage(r) {
		if err != nil {
			return err
		}
		answer := foundJSON{[]postedFrame{}, older}
		for _, e := range found {
			answer.Messages = append(answer.Messages, postedFrame{newEventFrame(e), permalink(s.urlFor(r), e)})
		}
		return s.writeJSON(w, r, http.StatusOK, answer)
	}
	p := &foundPage{Asked: strings.TrimSpace(text) != ""}
	for _, e := range found {
		p.Hits = append(p.Hits, hit{e, q.snippet(e.Body)})
	}
	if older != 0 {
		p.Older = "?" + url.Values{"q": {text}, "before": {strconv.FormatInt(older, 10)}}.Encode()
	}
	return s.show(w, r, v, err, "search.html", page{Form: formOf(r, "q"), Found: p})
}

// find is Store.Find for a request; older is the before= of the next page, if there is one.
func (s *server) find(r *http.Request, v visitor, q wanted) (found []Event, older int64, err error) {
	before, _, err := numberOf(r, "before")
	if err != nil {
		return nil, 0, err
	}
	if err := s.searches.check("user " + v.Name); err != nil {
		return nil, 0, err
	}
	found, more, err := s.store.Find(r.Context(), v.User, q, before)
	if more {
		older = found[len(found)-1].ID
	}
	return found, older, instead(err, context.DeadlineExceeded, refuse(http.StatusServiceUnavailable, "busy"))
}

// jump leads to the first message at or after a time, or else to the newest.
func (s *server) jump(w http.ResponseWriter, r *http.Request, room Room, t time.Time) error {
	id, err := s.store.FirstSince(r.Context(), room.ID, t)
	switch {
	case errors.Is(err, ErrNotFound):
		return s.redirect(w, r, roomPath(room.Name))
	case err != nil:
		return err
	}
	return s.redirect(w, r, fmt.Sprintf("%s?at=%d#m%d", roomPath(room.Name), id, id))
}

// FirstSince returns the id of a room's first message at or after a time, or ErrNotFound.
// It relies on times that grow with ids: where older messages were imported later it
// finds a place where they pass t.
func (s *Store) FirstSince(ctx context.Context, room int64, t time.Time) (id int64, err error) {
	const next = " FROM log WHERE room = ? AND kind = 'message' AND id >= ? ORDER BY id LIMIT 1"
	last, err := s.LastID(ctx)
	from := sort.Search(int(last)+1, func(id int) bool {
		var at time.Time
		none := s.queryRow(ctx, "SELECT time"+next, room, id).Scan(millis{&at})
		err = cmp.Or(err, instead(none, ErrNotFound, nil))
		return none != nil || !at.Before(t)
	})
	if err != nil {
		return 0, err
	}
	err = s.queryRow(ctx, "SELECT id"+next, room, from).Scan(&id)
	return id, err
}
