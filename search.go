package main

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	maxTail      = 2000            // rows of the log that a search reads through
	searchWait   = 2 * time.Second // that it waits for a longer tail to be indexed
	searchTime   = 5 * time.Second // that it may take in all
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
	term = regexp.MustCompile(`(?i)(?:(from|in|before|after|on|has):)?(?:"([^"]*)"?|([^\s"]+))`)
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
	case "before", "after", "on":
		from, to, ok := parseDate(value)
		if ok && name != "before" {
			q.since = from
		}
		if ok && name == "before" {
			q.until = from
		} else if ok && name == "on" {
			q.until = to
		}
		return ok
	}
	return false
}

// parseDate returns when a day or a month begins and ends, in our own time zone: a
// request does not tell the reader's.
func parseDate(text string) (from, to time.Time, ok bool) {
	if t, err := time.ParseInLocation("2006-1-2", text, time.Local); err == nil {
		return t, t.AddDate(0, 0, 1), true
	}
	t, err := time.ParseInLocation("2006-1", text, time.Local)
	return t, t.AddDate(0, 1, 0), err == nil
}

// empty reports whether nothing is asked for.
func (q wanted) empty() bool {
	return len(q.phrases) == 0 && q.from == "" && q.in == "" && !q.link && q.since.IsZero() && q.until.IsZero()
}

// expression says q to FTS5, but for the exact times. All the words in it are made of
// letters and digits, so nothing that was typed means anything there.
func (q wanted) expression(sc scope) string {
	var places []string
	for _, p := range sc.places {
		terms := q.terms(p.mark)
		if len(terms) == 0 || p.mark == "" && p.tag != "public" {
			terms = append(terms, "tags:"+p.tag)
		}
		places = append(places, strings.Join(terms, " AND "))
	}
	all := []string{"((" + strings.Join(places, ") OR (") + "))"}
	if sc.author != 0 {
		all = append(all, fmt.Sprintf("tags:u%d", sc.author))
	}
	if q.link {
		all = append(all, "tags:link")
	}
	if !q.since.IsZero() || !q.until.IsZero() {
		all = append(all, "tags:("+strings.Join(append(dateTags(q.since, q.until), "none"), " OR ")+")")
	}
	return strings.Join(all, " AND ")
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

// dateTags are those of the years, months and days that have all from since until until,
// and little else.
func dateTags(since, until time.Time) (tags []string) {
	const day = 24 * time.Hour
	end := time.Now().UTC().AddDate(0, 0, 1)
	if !until.IsZero() && until.Before(end) {
		end = until.UTC()
	}
	at := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC) // there was no chatd
	if since.After(at) {
		at = since.UTC().Truncate(day)
	}
	end = end.Add(day - 1).Truncate(day)
	for at.Before(end) {
		next, layout := at.AddDate(0, 0, 1), "20060102"
		if year := at.AddDate(1, 0, 0); at.YearDay() == 1 && !year.After(end) {
			next, layout = year, "2006"
		} else if month := at.AddDate(0, 1, 0); at.Day() == 1 && !month.After(end) {
			next, layout = month, "200601"
		}
		tags = append(tags, at.Format(layout))
		at = next
	}
	return tags
}

// marks returns where the phrases stand in a text, in order, or false if one does not.
func (q wanted) marks(text string) (spans [][2]int, all bool) {
	have := words(text)
	for i, phrase := range q.phrases {
		found := false
		for at := range have {
			if q.occurs(phrase, i == len(q.phrases)-1, have[at:]) {
				spans = append(spans, [2]int{have[at].start, have[at+len(phrase)-1].end})
				found = true
			}
		}
		if !found {
			return nil, false
		}
	}
	slices.SortFunc(spans, func(a, b [2]int) int { return cmp.Compare(a[0], b[0]) })
	return spans, true
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
	if err := s.shortenTail(ctx); err != nil {
		return nil, false, err
	}
	tx, err := s.read.BeginTx(ctx, nil) // index and log at one moment
	if err != nil {
		return nil, false, err
	}
	defer tx.Rollback()
	ids, err := find(ctx, tx, u, q, before)
	if err != nil {
		return nil, false, err
	}
	if more = len(ids) > historyPage; more {
		ids = ids[:historyPage]
	}
	found, err = collect(ctx, tx, (*Event).columns, selectEvents+"WHERE l.id IN (SELECT value FROM json_each(?)) AND "+u.sees()+" ORDER BY l.id DESC", string(encodeJSON(ids)))
	return found, more, err
}

// shortenTail has the index brought up to date if a search would have to read through
// too much, and gives up when that takes long: there are messages from before there was
// an index.
func (s *Store) shortenTail(ctx context.Context) error {
	for began := time.Now(); ; {
		var tail int64
		err := s.queryRow(ctx, "SELECT (SELECT coalesce(max(id), 0) FROM log) - id FROM indexed").Scan(&tail)
		if err != nil || tail <= maxTail {
			return err
		}
		if time.Since(began) > searchWait {
			return refuse(http.StatusServiceUnavailable, "indexing")
		}
		err = s.update(func(w *writer) (err error) {
			for i := 0; i < indexHelp && err == nil; i++ {
				_, err = w.index()
			}
			return err
		})
		if err != nil {
			return err
		}
	}
}

// scope is where a search looks.
type scope struct {
	author, room int64 // the only ones; 0: all
	places       []place
}

// place is how FTS5 knows the messages of a private room, or of all public ones, or of
// a public one: by a mark that their words have, and by a tag.
type place struct{ mark, tag string }

// scopeOf fails with ErrNotFound for a name that is nobody's, or of a room that u does
// not see, and if u sees none.
func scopeOf(ctx context.Context, tx *sql.Tx, u User, q wanted) (sc scope, err error) {
	if q.from != "" {
		if err := (row{tx.QueryRowContext(ctx, "SELECT id FROM users WHERE key = ?", foldName(q.from))}).Scan(&sc.author); err != nil {
			return sc, err
		}
	}
	if q.in != "" {
		key := foldName(q.in)
		if other, direct := strings.CutPrefix(key, "@"); direct {
			key = min(other, foldName(u.Name)) + "+" + max(other, foldName(u.Name))
		}
		err := row{tx.QueryRowContext(ctx, `
			SELECT r.id FROM rooms r WHERE (r.key = ?1 OR r.id = (SELECT room FROM former_names WHERE key = ?1)) AND `+u.sees(), key)}.Scan(&sc.room)
		if err != nil {
			return sc, err
		}
	}
	all := !u.limited() && sc.room == 0
	if all {
		sc.places = []place{{"", "public"}}
	}
	rooms, err := collect(ctx, tx, func(r *Room) []any { return r.columns() },
		"SELECT "+roomColumns+" FROM rooms r WHERE (r.private OR NOT ?1) AND (?2 = 0 OR r.id = ?2) AND "+u.sees(), all, sc.room)
	for _, r := range rooms {
		p := place{tag: fmt.Sprintf("r%d", r.ID)}
		if r.Private {
			p.mark = roomMark(r.ID)
		}
		sc.places = append(sc.places, p)
	}
	if err == nil && len(sc.places) == 0 {
		err = ErrNotFound
	}
	return sc, err
}

// find returns the ids of what Find is to return, and one more if there is.
func find(ctx context.Context, tx *sql.Tx, u User, q wanted, before int64) (ids []int64, err error) {
	sc, err := scopeOf(ctx, tx, u, q)
	if err != nil {
		return nil, instead(err, ErrNotFound, nil)
	}
	since, until := int64(0), int64(math.MaxInt64)
	if !q.since.IsZero() {
		since = q.since.UnixMilli()
	}
	if !q.until.IsZero() {
		until = q.until.UnixMilli()
	}
	tail, err := collect(ctx, tx, (*indexRow).columns, selectIndexRows+`
		WHERE l.id > (SELECT id FROM indexed) AND l.id < ?1 AND l.kind = 'message' AND l.body IS NOT NULL
			AND l.time >= ?2 AND l.time < ?3 AND (?4 = 0 OR l.author = ?4) AND (?5 = 0 OR l.room = ?5) AND `+u.sees()+`
		ORDER BY l.id DESC`, before, since, until, sc.author, sc.room)
	if err != nil {
		return nil, err
	}
	for _, row := range tail {
		if _, ok := q.marks(row.body); ok && (!q.link || hasLink(row.body)) && len(ids) <= historyPage {
			ids = append(ids, row.id)
		}
	}
	older, err := collect(ctx, tx, only[int64], `
		SELECT s.rowid FROM search s CROSS JOIN log l ON l.id = s.rowid
		WHERE search MATCH ? AND s.rowid < ? AND l.time >= ? AND l.time < ? ORDER BY s.rowid DESC LIMIT ?`,
		q.expression(sc), before, since, until, historyPage+1-len(ids))
	return append(ids, older...), err
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
	spans, _ := q.marks(text)
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
		return writeJSON(w, http.StatusOK, answer)
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

// momentLayouts are what ?at= may have in the place of an id. A request does not tell
// the reader's time zone; without one it is ours.
var momentLayouts = []string{time.RFC3339, "2006-01-02T15:04:05", "2006-01-02T15:04", time.DateOnly}

// momentOf returns the time in ?at=, if there is one.
func momentOf(r *http.Request) (t time.Time, given bool) {
	text := strings.ReplaceAll(r.FormValue("at"), " ", "+") // who writes a link forgets what + means there
	for _, layout := range momentLayouts {
		if t, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			return t, true
		}
	}
	return t, false
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
	low, high := int64(0), int64(0)
	high, err = s.LastID(ctx)
	first := func(from int64) (id int64, at time.Time, err error) {
		err = s.queryRow(ctx, "SELECT id, time FROM log WHERE room = ? AND kind = 'message' AND id >= ? ORDER BY id LIMIT 1", room, from).Scan(&id, millis{&at})
		return id, at, err
	}
	for err == nil && low < high {
		middle := (low + high) / 2
		found, at, wrong := first(middle)
		switch {
		case errors.Is(wrong, ErrNotFound), wrong == nil && !at.Before(t):
			high = middle
		default:
			low, err = found+1, wrong
		}
	}
	if err != nil {
		return 0, err
	}
	id, at, err := first(low)
	if err == nil && at.Before(t) {
		err = ErrNotFound
	}
	return id, err
}
