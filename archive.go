package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const archiveRows = 1000 // messages on a page, at most

// archivePage is what archive.html shows: the list of rooms, or messages of one.
type archivePage struct {
	Lang, Title  string
	Rooms        []archiveRoom
	Messages     []messageRow
	Older, Newer string // files; "": none
}

type archiveRoom struct {
	Room
	Days []string // on which its pages begin
}

// archive writes index.html and pages of each room into a new directory, in the
// language of the terminal.
func (x *exporter) archive(ctx context.Context, dir string) error {
	lang := fallback
	if strings.HasPrefix(cmp.Or(os.Getenv("LC_ALL"), os.Getenv("LANG")), "zh") {
		lang = "zh"
	}
	var s server
	if err := s.loadPages(); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	write := func(file string, p archivePage) error {
		p.Lang = lang
		var b bytes.Buffer
		if err := s.pages[lang]["archive.html"]().ExecuteTemplate(&b, "archive.html", p); err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, file), b.Bytes(), 0o600)
	}
	rooms, err := collect(ctx, x.db, func(r *Room) []any { return r.columns() },
		"SELECT "+roomColumns+" FROM rooms r WHERE "+x.sees+" ORDER BY r.key")
	if err != nil {
		return err
	}
	index := archivePage{Title: s.words[lang].text("room.rooms")}
	for _, r := range rooms {
		days, err := x.archiveRoom(ctx, r, write)
		if err != nil {
			return err
		}
		index.Rooms = append(index.Rooms, archiveRoom{r, days})
	}
	return write("index.html", index)
}

// archiveRoom writes the pages of a room, and returns the days on which they begin.
func (x *exporter) archiveRoom(ctx context.Context, r Room, write func(string, archivePage) error) (days []string, err error) {
	file := func(n int) string { return fmt.Sprintf("%d-%d.html", r.ID, n) }
	page, err := x.store.PageAfter(ctx, r.ID, 0, archiveRows)
	for n := 0; err == nil && len(page) > 0; n++ {
		days = append(days, page[0].Time.Local().Format(time.DateOnly))
		p := archivePage{Title: r.Name + " " + days[n]}
		reactions, err := x.store.Reactions(ctx, page)
		if err != nil {
			return nil, err
		}
		for _, e := range page {
			p.Messages = append(p.Messages, messageRow{Event: e, Tag: tagOf(e), Reactions: reactionRows(reactions[e.ID], "")})
		}
		x.done += int64(len(page))
		x.progress.show(x.done, x.messages)
		if page, err = x.store.PageAfter(ctx, r.ID, page[len(page)-1].ID, archiveRows); err != nil {
			return nil, err
		}
		if n > 0 {
			p.Older = file(n - 1)
		}
		if len(page) > 0 {
			p.Newer = file(n + 1)
		}
		if err := write(file(n), p); err != nil {
			return nil, err
		}
	}
	return days, err
}
