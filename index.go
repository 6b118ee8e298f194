package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Messages are found by an index, which is brought up to date behind the log, and before
// each search: so everything that is on disk is found, however new.

const (
	indexDelay = time.Second // between two looks at the log, so that several messages are indexed at once
	indexRows  = 128         // of the log, that are indexed at once: about 2 ms
	indexBytes = 16 << 10    // of text, likewise
	indexPause = 9           // while others wait for the writer, this many times as long as it took
	mergePages = 32          // of the index, that may be merged with others at once: a few ms
	purgePages = 64          // of the index, written anew at once
)

// keepIndexed brings the index up to date again and again, until ctx is done. While
// messages come all the time it gets a tenth of the writer's.
func (s *Store) keepIndexed(ctx context.Context) {
	for pause(ctx, indexDelay) == nil {
		s.catchUp(ctx, indexPause) // it may fail, as on a full disk
	}
}

// catchUp brings the index up to date. In between it waits, while others wait for the
// writer, the given number of times as long as it took.
func (s *Store) catchUp(ctx context.Context, pauses time.Duration) error {
	var last, upTo int64
	err := s.queryRow(ctx, "SELECT (SELECT coalesce(max(id), 0) FROM log), id FROM indexed").Scan(&last, &upTo)
	for err == nil && upTo < last {
		began := time.Now()
		err = s.update(func(w *writer) (err error) { upTo, err = w.index(); return err })
		if err == nil && len(s.queue) > 0 {
			err = pause(ctx, pauses*time.Since(began))
		}
		err = cmp.Or(err, ctx.Err())
	}
	return err
}

// index takes the next rows of the log into the index, and returns the last one.
func (w *writer) index() (upTo int64, err error) {
	rows, err := collect(context.Background(), w.conn, (*indexRow).columns,
		selectIndexRows+"WHERE l.id > (SELECT id FROM indexed) ORDER BY l.id LIMIT ?", indexRows)
	if err != nil || len(rows) == 0 {
		return w.last, err
	}
	size := 0
	for i, row := range rows {
		if size += len(row.body); size > indexBytes {
			rows = rows[:i+1]
			break
		}
	}
	upTo = rows[len(rows)-1].id
	if err := w.addToIndex(rows); err != nil {
		return 0, err
	}
	// The engine would merge much at once, now and then, and somebody's message would wait for it.
	return upTo, w.exec(`
		INSERT INTO search (search, rank) VALUES ('merge', ?1);
		UPDATE indexed SET id = ?2`, mergePages, upTo)
}

// indexRow is what the index needs of a row of the log.
type indexRow struct {
	id, room, author int64
	private, message bool // message: it is one, and has its text
	time             time.Time
	body             string
}

const selectIndexRows = `
	SELECT l.id, l.room, l.author, r.private, l.kind = 'message' AND l.body IS NOT NULL, l.time, coalesce(l.body, '')
	FROM log l JOIN rooms r ON r.id = l.room `

func (i *indexRow) columns() []any {
	return []any{&i.id, &i.room, &i.author, &i.private, &i.message, millis{&i.time}, &i.body}
}

func (w *writer) addToIndex(rows []indexRow) error {
	for _, row := range rows {
		if !row.message {
			continue
		}
		text, mark := words(row.body), ""
		if row.private {
			mark = roomMark(row.room)
		}
		if _, err := w.words.Exec(row.id, spaced(text, mark), pairs(text, mark), row.tags()); err != nil {
			return err
		}
	}
	return nil
}

// unindex takes messages out of the index, if they are there. The engine only notes that:
// purge takes their words out of its pages.
func (w *writer) unindex(ids ...int64) error {
	return w.exec(`
		DELETE FROM search WHERE rowid IN (SELECT value FROM json_each(?1));
		UPDATE indexed SET stale = stale + ?2`, string(encodeJSON(ids)), len(ids))
}

// purge has the index written anew, in small steps, if there are words in it of what is
// gone: the only way of FTS5.
func (s *Store) purge(ctx context.Context) error {
	var stale int64
	if err := s.queryRow(ctx, "SELECT stale FROM indexed").Scan(&stale); err != nil || stale == 0 {
		return err
	}
	for pages, more := -purgePages, true; more; pages = purgePages { // a negative number begins it
		err := s.update(func(w *writer) error {
			var before, after int64
			err := w.queryRow("SELECT total_changes()").Scan(&before)
			if err == nil {
				err = w.exec("INSERT INTO search (search, rank) VALUES ('merge', ?)", pages)
			}
			if err == nil {
				err = w.queryRow("SELECT total_changes()").Scan(&after)
			}
			more = after-before > 1 // else there was nothing to do
			return err
		})
		if err == nil {
			err = pause(ctx, keepPause)
		}
		if err != nil {
			return err
		}
	}
	return s.update(func(w *writer) error { return w.exec("UPDATE indexed SET stale = stale - ?", stale) })
}

// reindex takes a message out, and in again as it is now if it was reached before.
func (w *writer) reindex(id int64) error {
	if err := w.unindex(id); err != nil {
		return err
	}
	rows, err := collect(context.Background(), w.conn, (*indexRow).columns, selectIndexRows+"WHERE l.id = ? AND l.id <= (SELECT id FROM indexed)", id)
	if err != nil {
		return err
	}
	return w.addToIndex(rows)
}

// tags are further words of a message, in a column of their own. So the engine looks
// for words and, say, a room at once, and a common word is found fast in a quiet room.
// They last: a room never becomes private, or public, and its number is not its name.
func (i indexRow) tags() string {
	tags := fmt.Sprintf("r%d u%d %s", i.room, i.author, i.time.UTC().Format("2006 200601"))
	if !i.private {
		tags += " public"
	}
	if hasLink(i.body) {
		tags += " link"
	}
	return tags
}

func hasLink(text string) bool {
	return strings.Contains(text, "http://") || strings.Contains(text, "https://")
}

// roomMark begins the words of a private room. No word has it by itself. So the engine
// does not even pass over what is said in rooms that one does not see.
func roomMark(room int64) string { return fmt.Sprintf("\ue000%d\ue000", room) }

func spaced(text []word, mark string) string {
	var b strings.Builder
	for _, w := range text {
		b.WriteString(mark + w.text + " ")
	}
	return b.String()
}

// pairs are the characters that stand alone, each with the next, and an x where
// something else is between. Common ones are in so many messages that it would take
// long to see where two of them are neighbours.
func pairs(text []word, mark string) string {
	var b strings.Builder
	for i, gap := 1, false; i < len(text); i++ {
		if !text[i-1].alone || !text[i].alone {
			gap = true
			continue
		}
		if gap && b.Len() > 0 {
			b.WriteString("x ")
		}
		b.WriteString(mark + text[i-1].text + text[i].text + " ")
		gap = false
	}
	return b.String()
}

// word is what can be found of a text: letters and digits without case and accents,
// or a single character of a script that puts no space between words, or an emoji.
type word struct {
	text       string
	start, end int  // where it stands in the text, in bytes
	alone      bool // a single character
}

// words takes a text to pieces. SQLite is given the pieces with spaces between them,
// which its tokenizer "ascii" leaves as they are: what is found in the index and what
// is found by comparing words is the same.
func words(text string) (all []word) {
	var open []byte // the word that may go on
	start, end := 0, 0
	finish := func() {
		if len(open) > 0 {
			all = append(all, word{string(open), start, end, false})
			open = open[:0]
		}
	}
	for i, r := range text {
		after := i + utf8.RuneLen(r)
		switch r = fold(r); {
		case standsAlone(r):
			finish()
			all = append(all, word{string(r), i, after, true})
		case unicode.IsMark(r):
			if len(open) > 0 && r >= 0x370 { // below are accents
				open = utf8.AppendRune(open, r)
			}
			end = after
		case unicode.IsLetter(r) || unicode.IsNumber(r):
			if len(open) == 0 {
				start = i
			}
			open, end = utf8.AppendRune(open, r), after
		default:
			finish()
		}
	}
	finish()
	return all
}

func standsAlone(r rune) bool {
	return r > 0x7f && (r == 'ー' || unicode.In(r, unicode.Han, unicode.Hiragana, unicode.Katakana, unicode.Hangul, unicode.Bopomofo, unicode.So))
}

// fold makes full-width forms ASCII and takes case and accents away.
func fold(r rune) rune {
	if '！' <= r && r <= '～' {
		r -= '！' - '!'
	}
	if r < 0x2000 {
		r = unicode.ToLower(unicode.ToUpper(r)) // the way up makes one of ς and σ
	}
	if plain, ok := unaccented[r]; ok {
		return plain
	}
	return r
}

var unaccented = func() map[rune]rune {
	m := make(map[rune]rune)
	for group := range strings.FieldsSeq("aàáâãäåāăąǎ cçćĉċč dďđ eèéêëēĕėęěẽ gĝğġģ hĥħ iìíîïĩīĭįǐ jĵ kķ lĺļľł nñńņňǹ oòóôõöøōŏőǒ rŕŗř sśŝşšș tţťțŧ uùúûüũūŭůűųǔǖǘǚǜ wŵ yýÿŷ zźżž") {
		plain, _ := utf8.DecodeRuneInString(group)
		for _, r := range group {
			m[r] = plain
		}
	}
	return m
}()
