package main

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

const (
	importBatch = 500                   // rows in one transaction
	importPause = 20 * time.Millisecond // after it, for a chatd that runs
)

// tutorialColumns are the id, text, author, room and time of the messages in tutorials
// 000 and 003. SQLite is to give times as they are written.
var tutorialColumns = []string{
	"id, content, username, room, CAST(create_time AS TEXT)",
	"id, content, coalesce((SELECT username FROM auth_user WHERE id = user_id), ''), '', CAST(timestamp AS TEXT)",
	"id, content, coalesce((SELECT username FROM auth_user WHERE id = author_id), ''), '', CAST(timestamp AS TEXT)",
}

// django moves a database of the tutorials' into ours.
//
//  1. It only reads there, a batch at a time, so that Django can go on writing.
//  2. A message has the cid django-TABLE-ID here. Who has said it already does not
//     matter: so it comes in once, however often it is tried and whoever was renamed.
//  3. Nobody gets what is somebody else's. Names that differ there differ here too;
//     one that is a guest's, a bot's or a private room's here is not used.
type django struct {
	from           *sql.DB
	into           *Store
	zone           *time.Location // of its times
	admins         bool           // may be administrators here
	users          map[string]User
	rooms          map[string]Room
	claimed        map[string]bool
	counts         map[string]int // by what, a tab, and how it went
	notes          []string
	progress       *progress
	messages, done int64
}

// importDjango is `chatd import-django`: it works on the database, whether or not
// chatd runs.
func importDjango(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	d := &django{
		users: make(map[string]User), rooms: make(map[string]Room), counts: make(map[string]int),
		claimed: map[string]bool{"user " + anonymousGuest: true}, progress: newProgress(stderr, "messages"),
	}
	flags := newFlags("chatd import-django")
	data, zone := flags.String("data", "./data", ""), flags.String("tz", "UTC", "")
	flags.BoolVar(&d.admins, "admins", false, "")
	words, err := parseWords(flags, args)
	if err != nil {
		return err
	}
	if len(words) != 1 {
		return errors.New("say chatd import-django db.sqlite3")
	}
	if d.zone, err = time.LoadLocation(*zone); err != nil {
		return fmt.Errorf("-tz: %w", err)
	}
	if d.from, err = openFile(words[0], "mode=ro"); err != nil {
		return err
	}
	defer d.from.Close()
	accounts, err := collect(ctx, d.from, (*djangoUser).columns,
		"SELECT username, password, CAST(date_joined AS TEXT), is_superuser OR is_staff, is_active FROM auth_user ORDER BY id")
	if err != nil {
		return fmt.Errorf("%s: %w", words[0], err)
	}
	if d.into, err = OpenStore(*data, nil); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.into.Close()) }()
	began := time.Now()
	err = d.run(ctx, accounts)
	d.progress.end()
	return errors.Join(err, d.report(stdout, time.Since(began)))
}

func (d *django) run(ctx context.Context, accounts []djangoUser) error {
	queries, err := d.tables(ctx)
	if err != nil {
		return err
	}
	if err := writeRows(ctx, d.into, accounts, d.account); err != nil {
		return fmt.Errorf("auth_user: %w", err)
	}
	for _, table := range slices.Sorted(maps.Keys(queries)) {
		if err := d.takeMessages(ctx, table, queries[table]); err != nil {
			return fmt.Errorf("%s: %w", table, err)
		}
	}
	// Who has never come in has all this behind them.
	return d.into.update(func(w *writer) error {
		return w.exec("UPDATE users SET first_id = (SELECT coalesce(max(id), 0) FROM log) WHERE id NOT IN (SELECT user FROM sessions UNION SELECT user FROM reads)")
	})
}

// writeRows runs f for each row, some in one transaction, and after each leaves the writer
// to others for a moment.
func writeRows[T any](ctx context.Context, store *Store, rows []T, f func(*writer, T) error) error {
	for batch := range slices.Chunk(rows, importBatch) {
		if err := store.update(func(w *writer) error {
			for _, row := range batch {
				if err := f(w, row); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("stopped (%w); say it again, and it goes on", context.Cause(ctx))
		case <-time.After(importPause):
		}
	}
	return nil
}

func (d *django) count(what, how string) { d.counts[what+"\t"+how]++ }

// djangoUser is a row of auth_user.
type djangoUser struct {
	name, password, joined string
	admin, active          bool
}

func (u *djangoUser) columns() []any {
	return []any{&u.name, &u.password, &u.joined, &u.admin, &u.active}
}

// account makes one. Only who can sign in becomes an administrator: else nobody
// could set chatd up any more.
func (d *django) account(w *writer, a djangoUser) error {
	u, known := User{Role: RoleMember}, verifiable(a.password)
	if !known {
		a.password = ""
	}
	if known && a.active && a.admin && d.admins {
		u.Role = RoleAdmin
	}
	made, err := d.user(w, a.name, &u, a.password)
	if err != nil {
		return err
	}
	if !made {
		d.count("auth_user", "already here: keep password and role")
		return nil
	}
	d.count("auth_user", "taken")
	if !known {
		d.count("auth_user", "of these without a password, as it is not hashed with "+passwordHashing+": chatd invite -reset NAME")
	}
	if !a.active {
		d.count("auth_user", "of these deactivated, as there")
	}
	if u.Role == RoleAdmin {
		d.count("auth_user", "of these administrators")
	}
	joined, err := d.time(a.joined)
	if err != nil {
		return err
	}
	return w.exec("UPDATE users SET joined = ?, deactivated = iif(?, NULL, ?) WHERE id = ?", joined.UnixMilli(), a.active, w.now.UnixMilli(), u.ID)
}

// verifiable reports whether passwordMatches can say yes to it.
func verifiable(encoded string) bool {
	part := strings.Split(encoded, "$")
	if len(part) != 4 || part[0] != passwordHashing {
		return false
	}
	rounds, err := strconv.Atoi(part[1])
	return err == nil && rounds > 0 && rounds <= maxHashRounds
}

// time is what Django has written, in UTC or in its local time, with any fraction of a
// second.
func (d *django) time(s string) (time.Time, error) {
	t, err := time.ParseInLocation(time.DateTime, s, d.zone)
	return t.Truncate(time.Millisecond), err
}

// user makes u of that name there what it is here, and reports whether it was made.
func (d *django) user(w *writer, there string, u *User, encoded string) (made bool, err error) {
	err = d.name("user", there, maxUserName, func(name string) error {
		old, err := w.userByName(name)
		switch {
		case errors.Is(err, ErrNotFound):
			u.Name, made = name, true
			return w.createUser(u, encoded)
		case err == nil && (old.Bot || old.Role == RoleGuest):
			return ErrTaken
		}
		*u = old
		return err
	})
	d.users[there] = *u
	return made, err
}

// author returns who has that name there. Who has no account gets one that nobody
// can sign in to.
func (d *django) author(w *writer, there string) (User, error) {
	if u, ok := d.users[there]; ok {
		return u, nil
	}
	u := User{Role: RoleMember}
	made, err := d.user(w, there, &u, "")
	if made {
		d.count("authors", "made, as they have no account there: nobody can sign in as them")
	}
	return u, err
}

func (d *django) roomOf(w *writer, there string, author User) (Room, error) {
	there = cmp.Or(there, "lobby")
	if r, ok := d.rooms[there]; ok {
		return r, nil
	}
	var e Event
	err := d.name("room", there, maxRoomName, func(name string) error {
		e = Event{Room: Room{Name: name}, Author: author}
		return w.room(&e)
	})
	if d.rooms[there] = e.Room; e.Again {
		d.count("rooms", "already here")
	} else {
		d.count("rooms", "made")
	}
	return e.Room, err
}

// name calls use with names of ours for a name there, the best first, until one is
// neither used for another nor ErrTaken.
func (d *django) name(kind, there string, limit int, use func(name string) error) error {
	fit := []rune(fitName(there, limit, kind))
	for n := 1; ; n++ {
		name := string(fit)
		if n > 1 {
			suffix := fmt.Sprint("_", n)
			name = string(fit[:min(len(fit), limit-len(suffix))]) + suffix
		}
		key := kind + " " + foldName(name)
		if d.claimed[key] {
			continue
		}
		if err := use(name); !errors.Is(err, ErrTaken) {
			d.claimed[key] = true
			if name != there {
				d.notes = append(d.notes, fmt.Sprintf("%s %.*q is %s here", kind, 2*limit, there, name))
			}
			return err
		}
	}
}

// fitName makes a name that cleanName takes, otherwise if there is nothing in it.
func fitName(name string, limit int, otherwise string) string {
	fit := []rune(strings.Map(func(r rune) rune {
		if _, err := cleanName("x"+string(r), limit, ""); err != nil {
			return '_'
		}
		return r
	}, name))
	clean, err := cleanName(string(fit[:min(len(fit), limit)]), limit, "")
	if err != nil {
		return otherwise
	}
	return clean
}

// tables returns the queries for the tables with messages, and counts these. One that
// names two users may have what nobody else is to read.
func (d *django) tables(ctx context.Context) (map[string]string, error) {
	type table struct {
		name  string
		users int
	}
	tables, err := collect(ctx, d.from, func(t *table) []any { return []any{&t.name, &t.users} }, `
		SELECT name, (SELECT count(*) FROM pragma_foreign_key_list(t.name) WHERE "table" = 'auth_user')
		FROM sqlite_schema t WHERE type = 'table' AND (name GLOB '*_chatmessage' OR name GLOB '*_message')`)
	if err != nil {
		return nil, err
	}
	queries := make(map[string]string)
	for _, t := range tables {
		for _, columns := range tutorialColumns {
			query := fmt.Sprintf("SELECT %s FROM %s WHERE id > ? ORDER BY id LIMIT %d", columns, quoted(t.name), importBatch)
			if _, err := d.from.Exec("EXPLAIN "+query, 0); err == nil && t.users < 2 {
				queries[t.name] = query
			}
		}
		if queries[t.name] == "" {
			d.notes = append(d.notes, fmt.Sprintf("table %s is left out: it names two users, or has not the columns of the tutorials'", t.name))
			continue
		}
		var n int64
		if err := d.from.QueryRow("SELECT count(*) FROM " + quoted(t.name)).Scan(&n); err != nil {
			return nil, err
		}
		d.messages += n
	}
	return queries, nil
}

func quoted(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }

// said is a row of a table with messages.
type said struct {
	id                     int64
	text, author, room, at string
}

func (d *django) takeMessages(ctx context.Context, table, query string) error {
	for after := int64(0); ; {
		batch, err := collect(ctx, d.from, func(m *said) []any { return []any{&m.id, &m.text, &m.author, &m.room, &m.at} }, query, after)
		if err != nil || len(batch) == 0 {
			return err
		}
		if err := writeRows(ctx, d.into, batch, func(w *writer, m said) error { return d.message(w, table, m) }); err != nil {
			return err
		}
		after = batch[len(batch)-1].id
		d.done += int64(len(batch))
		d.progress.show(d.done, d.messages)
	}
}

// message takes one, in several parts if it is too long for us.
func (d *django) message(w *writer, table string, m said) error {
	if strings.TrimSpace(m.text) == "" {
		d.count(table, "left out: empty")
		return nil
	}
	at, err := d.time(m.at)
	if err != nil {
		d.count(table, "left out: without a time")
		return nil
	}
	// These come first, so that names are given in the same order when half is here already.
	author, err := d.author(w, m.author)
	if err != nil {
		return err
	}
	room, err := d.roomOf(w, m.room, author)
	if err != nil {
		return err
	}
	cid := fmt.Sprintf("django-%s-%d", table, m.id)
	switch err := w.queryRow("SELECT 1 FROM log WHERE cid = ?", cid).Scan(new(int)); {
	case err == nil:
		d.count(table, "already here")
		return nil
	case !errors.Is(err, ErrNotFound):
		return err
	}
	d.count(table, "taken")
	text := strings.ToValidUTF8(m.text, "\uFFFD")
	if len(text) > maxMessage {
		d.count(table, fmt.Sprintf("of these split, as longer than %d bytes", maxMessage))
	}
	for n := 2; text != ""; n++ {
		part := strings.ToValidUTF8(text[:min(len(text), maxMessage)], "") // no half character
		if err := w.append(&Event{Kind: KindMessage, Room: room, Author: author, CID: cid, Time: at, Body: part}, ""); err != nil {
			return err
		}
		text, cid = text[len(part):], fmt.Sprintf("django-%s-%d-%d", table, m.id, n)
	}
	return nil
}

// report says what was taken and what was left.
func (d *django) report(stdout io.Writer, took time.Duration) error {
	table := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	for _, line := range slices.Sorted(maps.Keys(d.counts)) {
		what, how, _ := strings.Cut(line, "\t")
		fmt.Fprintf(table, "%s\t%d\t%s\n", what, d.counts[line], how)
	}
	for _, note := range d.notes {
		fmt.Fprintln(table, note)
	}
	fmt.Fprintf(table, "%.1f seconds\n", took.Seconds())
	return table.Flush()
}
