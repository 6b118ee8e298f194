package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"html/template"
	"os"
	"path/filepath"
	"strings"
	"unicode"
)

const (
	archiveRows = 1000 // messages on a page; with the longest ones 8 MiB
	archiveName = 150  // bytes of a room's name in that of a file, which has 255 at most
)

// archivePage is what archive.html shows: the list of rooms, or messages of one.
type archivePage struct {
	Lang, Title string
	Rooms       []archiveRoom
	Messages    []archiveRow
	Older       string // file, or ""
	Newer       string
}

type archiveRoom struct {
	Room
	Pages []archiveLink
}

type archiveLink struct{ File, Name string }

type archiveRow struct {
	Event
	Tag       string
	ReplyTo   string // author of the message replied to; "": none
	Quote     string // how that begins
	Reactions string
}

// archiver writes pages to read without a server.
type archiver struct {
	*exporter
	dir, lang string
	page      *template.Template
}

// archive writes index.html and pages of each room, by month, into a new directory.
func (x *exporter) archive(ctx context.Context, dir string) error {
	a := &archiver{exporter: x, dir: dir, lang: fallback}
	if strings.HasPrefix(cmp.Or(os.Getenv("LC_ALL"), os.Getenv("LANG")), "zh") {
		a.lang = "zh"
	}
	if x.user != nil {
		a.lang = cmp.Or(x.user.Language, a.lang)
	}
	var s server
	if err := s.loadPages(); err != nil {
		return err
	}
	a.page = s.pages[a.lang]["archive.html"].Lookup("archive.html")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	rooms, err := collect(ctx, x.conn, func(r *Room) []any { return r.columns() }, "SELECT "+roomColumns+" FROM rooms r WHERE "+x.sees()+" ORDER BY r.key")
	if err != nil {
		return err
	}
	index := archivePage{Title: s.words[a.lang].text("room.rooms")}
	for _, r := range rooms {
		pages, err := a.room(ctx, r)
		if err != nil {
			return err
		}
		index.Rooms = append(index.Rooms, archiveRoom{r, pages})
	}
	return a.write("index.html", index)
}

// room writes the pages of a room, each when it is known which one follows.
func (a *archiver) room(ctx context.Context, r Room) (links []archiveLink, err error) {
	months := make(map[string]int)
	var p archivePage
	for last := int64(0); ; {
		rows, err := a.rows(ctx, r, last)
		if err != nil {
			return nil, err
		}
		var link archiveLink
		if len(rows) > 0 {
			link.Name = rows[0].Time.Local().Format("2006-01")
			if months[link.Name]++; months[link.Name] > 1 {
				link.Name += fmt.Sprintf("-%d", months[link.Name])
			}
			link.File = fileName(r, link.Name)
		}
		if len(links) > 0 {
			p.Newer = link.File
			if err := a.write(links[len(links)-1].File, p); err != nil {
				return nil, err
			}
		}
		if len(rows) == 0 {
			return links, nil
		}
		p = archivePage{Title: r.Name + " " + link.Name, Messages: rows}
		if len(links) > 0 {
			p.Older = links[len(links)-1].File
		}
		links = append(links, link)
		last = rows[len(rows)-1].ID
		a.done += int64(len(rows))
		a.progress.show(a.done, a.messages)
	}
}

// rows returns messages after an id, of one month.
func (a *archiver) rows(ctx context.Context, r Room, after int64) ([]archiveRow, error) {
	rows, err := collect(ctx, a.conn, func(m *archiveRow) []any { return m.columns() },
		selectEvents+"WHERE l.room = ? AND l.kind = 'message' AND l.id > ? ORDER BY l.id LIMIT ?", r.ID, after, archiveRows)
	if err != nil {
		return nil, err
	}
	byID, ids := make(map[int64]*archiveRow), []int64{}
	for i := range rows {
		m := &rows[i]
		if month := m.Time.Local().Format("2006-01"); month != rows[0].Time.Local().Format("2006-01") {
			rows = rows[:i]
			break
		}
		m.Tag = tagOf(m.Event)
		byID[m.ID], ids = m, append(ids, m.ID)
	}
	type about struct {
		id                       int64
		author, quote, reactions string
	}
	found, err := collect(ctx, a.conn, func(x *about) []any { return []any{&x.id, &x.author, &x.quote, &x.reactions} }, `
		SELECT l.id, coalesce(u.name, ''), coalesce(substr(t.body, 1, 80), ''), coalesce((SELECT group_concat(emoji || ' ' || n, '  ')
			FROM (SELECT emoji, count(*) AS n FROM reactions WHERE message = l.id GROUP BY emoji)), '')
		FROM log l LEFT JOIN log t ON t.id = l.target LEFT JOIN users u ON u.id = t.author
		WHERE l.id IN (SELECT value FROM json_each(?))`, string(encodeJSON(ids)))
	for _, x := range found {
		m := byID[x.id]
		m.ReplyTo, m.Quote, m.Reactions = x.author, x.quote, x.reactions
	}
	return rows, err
}

func (a *archiver) write(name string, p archivePage) error {
	p.Lang = a.lang
	var b bytes.Buffer
	if err := a.page.Execute(&b, p); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(a.dir, name), b.Bytes(), 0o600)
}

// fileName is what a page of a room is called on any system. The room's id tells
// names apart that are the same to one of them.
func fileName(r Room, month string) string {
	name := strings.Map(func(r rune) rune {
		if unicode.IsLetter(r) || unicode.IsDigit(r) || unicode.IsMark(r) || strings.ContainsRune("-_.+", r) {
			return r
		}
		return '_'
	}, r.Name)
	for len(name) > archiveName {
		short := []rune(name)
		name = string(short[:len(short)-1])
	}
	return fmt.Sprintf("%d-%s-%s.html", r.ID, name, month)
}
