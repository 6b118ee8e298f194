package main

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// exportedTables are the tables that an export has, in an order in which an import can
// put their rows back: a row comes after those that it names. With columns, a user's
// export has these of the rows that where is true of, in rooms that SEEN selects, for
// the user ME.
var exportedTables = []struct{ name, columns, where string }{
	{"users", "id name role bot", "id = ME OR id IN (SELECT author FROM log WHERE room IN SEEN UNION SELECT user FROM members WHERE room IN SEEN)"},
	{"rooms", "id name created private topic archived keep", "id IN SEEN"},
	{"members", "room user", "room IN SEEN"},
	{"former_names", "", ""},
	{"invites", "", ""},
	{"invite_uses", "", ""},
	{"audit", "", ""},
	{"log", "id kind room author time target body edited pushed", "room IN SEEN"},
	{"reactions", "message emoji author", "message IN (SELECT id FROM log WHERE room IN SEEN)"},
	{"reads", "user room last_read_id", "user = ME AND room IN SEEN"},
	{"levels", "user room notify", "user = ME AND room IN SEEN"},
	{"tokens", "", ""},
	{"pushes", "", ""},
	{"hooks", "", ""},
	{"sqlite_sequence", "", ""}, // the ids that were given, so that none is given twice
}

// exportHead is the first line of an export, and exportEnd the last.
type exportHead struct {
	Table   string `json:"table"` // chatd
	Version int    `json:"version"`
	User    string `json:"user,omitempty"` // whose: it has only what that user may see
}

type exportEnd struct {
	Table string `json:"table"` // end
	Rows  int64  `json:"rows"`
}

// export is `chatd export`: it writes what there is, as it is at one moment, while
// chatd runs, as JSON Lines or as pages to read.
func export(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := newFlags("chatd export")
	data := flags.String("data", "./data", "")
	name, html := flags.String("user", "", ""), flags.String("html", "", "")
	words, err := parseWords(flags, args)
	if err != nil {
		return err
	}
	if len(words) > 1 || (len(words) == 1) == (*html != "") {
		return errors.New("say chatd export FILE.jsonl or chatd export -html DIR")
	}
	to := strings.Join(append(words, *html), "")
	if _, err := os.Stat(to); !errors.Is(err, os.ErrNotExist) {
		return errors.Join(err, fmt.Errorf("%s is there already", to))
	}
	path := filepath.Join(*data, "chatd.db")
	x, err := openExport(ctx, path, *name)
	if err != nil {
		return explain(path, err)
	}
	defer x.close()
	x.progress = newProgress(stderr, "rows")
	defer x.progress.end()
	began, part := time.Now(), to+".part"
	if err := os.RemoveAll(part); err != nil {
		return err
	}
	defer os.RemoveAll(part) // whatever is left of it
	if *html != "" {
		err = x.archive(ctx, part)
	} else {
		err = x.writeLines(ctx, part)
	}
	if err == nil {
		err = replace(part, to)
	}
	if err != nil {
		return fmt.Errorf("%s to %s: %w", path, to, err)
	}
	fmt.Fprintf(stdout, "%s: %d messages.\nIt took %.1f s.\n", to, x.messages, time.Since(began).Seconds())
	return nil
}

// exporter reads a database in one transaction: so it is of one moment, and those who
// write go on in the write-ahead log.
type exporter struct {
	db             *sql.DB
	conn           *sql.Conn
	user           *User // whose export it is; nil: everybody's
	version        int
	rows, messages int64 // that there are
	done           int64 // rows written
	progress       *progress
}

func openExport(ctx context.Context, path, name string) (x *exporter, err error) {
	if _, err := os.Stat(path); err != nil {
		return nil, err
	}
	x = &exporter{}
	if x.db, err = openFile(path, "mode=rw"); err != nil {
		return nil, err
	}
	if x.conn, err = x.db.Conn(ctx); err == nil {
		err = x.begin(ctx, name)
	}
	if err != nil {
		x.close()
	}
	return x, err
}

func (x *exporter) close() {
	if x.conn != nil {
		x.conn.Close()
	}
	x.db.Close()
}

func (x *exporter) begin(ctx context.Context, name string) error {
	if _, err := x.conn.ExecContext(ctx, "BEGIN"); err != nil {
		return err
	}
	if err := x.conn.QueryRowContext(ctx, "PRAGMA user_version").Scan(&x.version); err != nil {
		return err
	}
	if newest := len(migrations) + 1; x.version != newest {
		return fmt.Errorf("the database has version %d, this chatd exports version %d", x.version, newest)
	}
	if name != "" {
		x.user = &User{}
		err := x.conn.QueryRowContext(ctx, "SELECT "+userColumns+" FROM users u WHERE u.key = ?", foldName(name)).Scan(x.user.columns()...)
		if err != nil {
			return fmt.Errorf("user %s: %w", name, instead(err, sql.ErrNoRows, ErrNotFound))
		}
	}
	return x.conn.QueryRowContext(ctx, "SELECT count(*), count(*) FILTER (WHERE kind = 'message') FROM log l JOIN rooms r ON r.id = l.room WHERE "+x.sees()).Scan(&x.rows, &x.messages)
}

// sees is the SQL condition for the rooms r that are exported.
func (x *exporter) sees() string {
	if x.user == nil {
		return "1"
	}
	return x.user.sees()
}

// writeLines writes a file with a line for each row: {"table":…} and its columns, but
// for those that are NULL. What is binary is in hexadecimal.
func (x *exporter) writeLines(ctx context.Context, path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<16)
	if err := x.lines(ctx, w); err != nil {
		return err
	}
	return errors.Join(w.Flush(), f.Close())
}

func (x *exporter) lines(ctx context.Context, w io.Writer) error {
	head := exportHead{Table: "chatd", Version: x.version}
	if x.user != nil {
		head.User = x.user.Name
	}
	fmt.Fprintf(w, "%s\n", encodeJSON(head)) // a bufio.Writer keeps its error
	for _, t := range exportedTables {
		columns, err := tableColumns(ctx, x.conn, t.name)
		if err != nil {
			return err
		}
		where := "1"
		if x.user != nil {
			if t.columns == "" {
				continue
			}
			columns = slices.DeleteFunc(columns, func(c column) bool { return !slices.Contains(strings.Fields(t.columns), c.name) })
			where = strings.NewReplacer("SEEN", "(SELECT r.id FROM rooms r WHERE "+x.sees()+")", "ME", fmt.Sprint(x.user.ID)).Replace(t.where)
		}
		if err := x.table(ctx, w, t.name, columns, where); err != nil {
			return fmt.Errorf("%s: %w", t.name, err)
		}
	}
	_, err := fmt.Fprintf(w, "%s\n", encodeJSON(exportEnd{"end", x.done}))
	return err
}

// table writes the rows of a table in the order of their first columns, which are the key.
func (x *exporter) table(ctx context.Context, w io.Writer, name string, columns []column, where string) error {
	object, order := fmt.Sprintf("'table', '%s'", name), []string{}
	for i, c := range columns {
		value := c.name
		if c.blob {
			value = "hex(" + value + ")"
		}
		object += fmt.Sprintf(", '%s', %s", c.name, value)
		if i < 3 {
			order = append(order, c.name)
		}
	}
	query := fmt.Sprintf("SELECT json_patch('{}', json_object(%s)) FROM %s WHERE %s ORDER BY %s", object, name, where, strings.Join(order, ", "))
	rows, err := x.conn.QueryContext(ctx, query)
	if err != nil {
		return err
	}
	defer rows.Close()
	var line sql.RawBytes
	for rows.Next() {
		if err := rows.Scan(&line); err != nil {
			return err
		}
		text := line
		if !utf8.Valid(text) {
			text = bytes.ToValidUTF8(text, []byte("\uFFFD"))
		}
		if _, err := fmt.Fprintf(w, "%s\n", text); err != nil {
			return err
		}
		x.done++
		x.progress.show(x.done, max(x.rows, x.done))
	}
	return rows.Err()
}

type column struct {
	name string
	blob bool
}

// tableColumns returns none for a table that is not there.
func tableColumns(ctx context.Context, db querier, table string) ([]column, error) {
	return collect(ctx, db, func(c *column) []any { return []any{&c.name, &c.blob} },
		"SELECT name, type = 'BLOB' FROM pragma_table_info(?) ORDER BY cid", table)
}
