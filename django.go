package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"
)

const (
	importBatch = 500                   // rows in one transaction
	importPause = 20 * time.Millisecond // after it, for a chatd that runs
)

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
	room           string         // for what was said in none
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
		users: make(map[string]User), rooms: make(map[string]Room), claimed: make(map[string]bool),
		counts: make(map[string]int), progress: newProgress(stderr, "messages"),
	}
	flags := newFlags("chatd import-django")
	data := flags.String("data", "./data", "")
	room, zone := flags.String("room", "lobby", ""), flags.String("tz", "UTC", "")
	dry := flags.Bool("dry-run", false, "")
	flags.BoolVar(&d.admins, "admins", false, "")
	words, err := parseWords(flags, args)
	if err != nil {
		return err
	}
	if len(words) != 1 {
		return errors.New("say chatd import-django db.sqlite3")
	}
	if d.room, err = roomName(*room); err != nil {
		return fmt.Errorf("-room: %q cannot be a room's name", *room)
	}
	if d.zone, err = time.LoadLocation(*zone); err != nil {
		return fmt.Errorf("-tz: %w", err)
	}
	if d.from, err = openDjango(words[0]); err != nil {
		return fmt.Errorf("%s: %w", words[0], err)
	}
	defer d.from.Close()
	if *dry {
		if *data, err = copyData(*data); err != nil {
			return err
		}
		defer os.RemoveAll(*data)
		d.notes = append(d.notes, "nothing of this was written: -dry-run")
	}
	if d.into, err = OpenStore(*data, func([]Event) {}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.into.Close()) }()
	began := time.Now()
	err = d.run(ctx)
	return errors.Join(err, d.report(stdout, time.Since(began)))
}

// openDjango opens a database to read, if it is one of Django's.
func openDjango(path string) (*sql.DB, error) {
	db, err := sql.Open("sqlite", fmt.Sprintf("file:%s?mode=ro&_pragma=busy_timeout(%d)", (&url.URL{Path: path}).EscapedPath(), lockWait))
	if err != nil {
		return nil, err
	}
	err = db.QueryRow("SELECT 1 FROM sqlite_schema WHERE name = 'auth_user'").Scan(new(int))
	if errors.Is(err, sql.ErrNoRows) {
		err = errors.New("it is not Django's, as it has no table auth_user")
	}
	if err != nil {
		db.Close()
	}
	return db, err
}

// copyData copies a database, if there is one, into a directory for a while.
func copyData(dir string) (string, error) {
	path := filepath.Join(dir, "chatd.db")
	dir, err := os.MkdirTemp("", "chatd")
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return dir, nil
	}
	db, err := sql.Open("sqlite", fmt.Sprintf("file:%s?mode=ro&_pragma=busy_timeout(%d)", path, lockWait))
	if err != nil {
		return "", err
	}
	defer db.Close()
	if err := keepCopy(db, filepath.Join(dir, "chatd.db")); err != nil {
		os.RemoveAll(dir)
		return "", explain(path, err)
	}
	return dir, nil
}

func (d *django) run(ctx context.Context) error {
	defer d.progress.end()
	queries, err := d.tables()
	if err != nil {
		return err
	}
	if err := d.takeAccounts(ctx); err != nil {
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

// write runs f in a transaction, and leaves the writer to others for a moment.
func (d *django) write(ctx context.Context, f func(*writer) error) error {
	if err := d.into.update(f); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return fmt.Errorf("stopped (%w); say it again, and it goes on", context.Cause(ctx))
	case <-time.After(importPause):
		return nil
	}
}

func (d *django) count(what, how string) { d.counts[what+"\t"+how]++ }

// djangoUser is a row of auth_user.
type djangoUser struct {
	name, password, joined string
	admin, active          bool
}

func (d *django) takeAccounts(ctx context.Context) error {
	all, err := collect(context.Background(), d.from, func(u *djangoUser) []any { return []any{&u.name, &u.password, &u.joined, &u.admin, &u.active} },
		"SELECT username, password, CAST(date_joined AS TEXT), is_superuser OR is_staff, is_active != 0 FROM auth_user ORDER BY id")
	if err != nil {
		return err
	}
	for batch := range slices.Chunk(all, importBatch) {
		if err := d.write(ctx, func(w *writer) error {
			for _, a := range batch {
				if err := d.account(w, a); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
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
	delete(d.users, anonymousGuest) // an account of that name is not the only one who spoke so
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
	joined, ok := d.time(a.joined)
	if !ok {
		joined = w.now
	}
	return w.exec("UPDATE users SET joined = ?, deactivated = CASE WHEN ? THEN NULL ELSE ? END WHERE id = ?", joined.UnixMilli(), a.active, w.now.UnixMilli(), u.ID)
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

// time is what Django has written, in UTC or in its local time.
func (d *django) time(s string) (t time.Time, ok bool) {
	for _, layout := range []string{time.DateTime, time.DateOnly} {
		if t, err := time.ParseInLocation(layout, s, d.zone); err == nil { // any fraction of a second may follow
			return t, true
		}
	}
	return t, false
}

// user makes u of that name there what it is here, and reports whether it was made.
func (d *django) user(w *writer, there string, u *User, encoded string) (made bool, err error) {
	err = d.name("user", there, maxUserName, func(name string) error {
		old, err := w.userByName(name)
		switch {
		case errors.Is(err, ErrNotFound) && (name != anonymousGuest || u.Role == RoleGuest):
			u.Name, made = name, true
			return w.createUser(u, encoded)
		case errors.Is(err, ErrNotFound), err == nil && (old.Bot || (old.Role == RoleGuest) != (u.Role == RoleGuest)):
			return ErrTaken
		case err == nil:
			*u = old
		}
		return err
	})
	d.users[there] = *u
	return made, err
}

// author returns who has that name there. Who has no account gets one that nobody
// can sign in to; who has no name speaks as guests without a name do.
func (d *django) author(w *writer, there string) (User, error) {
	there = cmp.Or(there, anonymousGuest)
	if u, ok := d.users[there]; ok {
		return u, nil
	}
	u := User{Role: RoleMember}
	if there == anonymousGuest {
		u.Role = RoleGuest
	}
	made, err := d.user(w, there, &u, "")
	if made {
		d.count("authors", "made, as they have no account there: nobody can sign in as them")
	}
	return u, err
}

func (d *django) roomOf(w *writer, there string, author User) (Room, error) {
	there = cmp.Or(there, d.room)
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

// tables returns the queries for the tables with messages, and counts these.
func (d *django) tables() (map[string]string, error) {
	names, err := d.column("SELECT name FROM sqlite_schema WHERE type = 'table' AND (name GLOB '*_chatmessage' OR name GLOB '*_message')")
	if err != nil {
		return nil, err
	}
	queries := make(map[string]string)
	for _, name := range names {
		query, why, err := d.query(name)
		if err != nil {
			return nil, err
		}
		if why != "" {
			d.notes = append(d.notes, fmt.Sprintf("table %s is left out: %s", name, why))
			continue
		}
		queries[name] = query
		var n int64
		if err := d.from.QueryRow("SELECT count(*) FROM " + quoted(name)).Scan(&n); err != nil {
			return nil, err
		}
		d.messages += n
	}
	return queries, nil
}

// query finds the columns of a table by what they may be called.
func (d *django) query(table string) (query, why string, err error) {
	columns, err := d.column("SELECT name FROM pragma_table_info(?)", table)
	if err != nil {
		return "", "", err
	}
	users, err := d.column(`SELECT "from" FROM pragma_foreign_key_list(?) WHERE "table" = 'auth_user'`, table)
	if err != nil {
		return "", "", err
	}
	named, err := d.column(`
		SELECT f."table" FROM pragma_foreign_key_list(?) f WHERE f."from" = 'room_id'
		AND EXISTS (SELECT 1 FROM pragma_table_info(f."table") WHERE name = 'name')`, table)
	if err != nil {
		return "", "", err
	}
	first := func(names ...string) string {
		for _, name := range names {
			if slices.Contains(columns, name) {
				return name
			}
		}
		return ""
	}
	text := first("content", "message", "text", "body")
	author := first("username", "user", "author")
	at := first("create_time", "timestamp", "created_at", "created", "date_added")
	room := cmp.Or(first("room", "room_name", "room_id"), "''")
	switch {
	case len(users) > 1:
		return "", "it names two users, so it may be between them", nil
	case text == "":
		return "", "it has no column content, message, text or body", nil
	case at == "":
		return "", "it has no column create_time, timestamp, created_at, created or date_added", nil
	case len(users) == 1:
		author = "(SELECT username FROM auth_user WHERE id = m." + quoted(users[0]) + ")"
	case author == "":
		return "", "it has neither a column of auth_user nor username, user or author", nil
	}
	if room == "room_id" && len(named) == 1 {
		room = "(SELECT name FROM " + quoted(named[0]) + " WHERE id = m.room_id)"
	}
	query = "SELECT rowid"
	for _, column := range []string{text, author, room, at} {
		query += ", coalesce(CAST(" + column + " AS TEXT), '')"
	}
	return query + fmt.Sprintf(" FROM %s m WHERE rowid > ? ORDER BY rowid LIMIT %d", quoted(table), importBatch), "", nil
}

func quoted(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }

func (d *django) column(query string, args ...any) ([]string, error) {
	return collect(context.Background(), d.from, func(v *string) []any { return []any{v} }, query, args...)
}

// said is a row of a table with messages.
type said struct {
	id                     int64
	text, author, room, at string
}

func (d *django) takeMessages(ctx context.Context, table, query string) error {
	last := time.UnixMilli(0)
	for after := int64(0); ; {
		batch, err := collect(context.Background(), d.from, func(m *said) []any { return []any{&m.id, &m.text, &m.author, &m.room, &m.at} }, query, after)
		if err != nil || len(batch) == 0 {
			return err
		}
		if err := d.write(ctx, func(w *writer) error {
			for _, m := range batch {
				if at, ok := d.time(m.at); ok {
					last = at.Truncate(time.Millisecond)
				} else {
					d.count(table, "without a time: got that of the one before")
				}
				if err := d.message(w, table, m, last); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
		after = batch[len(batch)-1].id
		d.done += int64(len(batch))
		d.progress.show(d.done, d.messages)
	}
}

// message takes one, in several parts if it is too long for us.
func (d *django) message(w *writer, table string, m said, at time.Time) error {
	if strings.TrimSpace(m.text) == "" {
		d.count(table, "left out: empty")
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
	if len(cid) > maxCID-len("-99999999") { // a part has one more number
		cid = fmt.Sprintf("django-%x", sha256.Sum256([]byte(cid)))[:maxCID/2]
	}
	var here int64
	switch err := w.queryRow("SELECT time FROM log WHERE cid = ?", cid).Scan(&here); {
	case err == nil && here == at.UnixMilli():
		d.count(table, "already here")
		return nil
	case err == nil:
		d.count(table, "left out: one with that id and another time is here: from another database, or by another -tz")
		return nil
	case !errors.Is(err, ErrNotFound):
		return err
	}
	d.count(table, "taken")
	text := strings.ToValidUTF8(m.text, "\uFFFD")
	if len(text) > maxMessage {
		d.count(table, fmt.Sprintf("of these split, as longer than %d bytes", maxMessage))
	}
	for n := 1; text != ""; n++ {
		end := min(len(text), maxMessage)
		for end < len(text) && !utf8.RuneStart(text[end]) {
			end--
		}
		e := Event{Kind: KindMessage, Room: room, Author: author, CID: cid, Time: at, Body: text[:end]}
		if n > 1 {
			e.CID = fmt.Sprintf("%s-%d", cid, n)
		}
		if err := w.append(&e, ""); err != nil {
			return err
		}
		text = text[end:]
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
