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
	if _, err := os.Stat(filepath.Join(*data, "chatd.db")); err != nil {
		return err
	}
	store, err := OpenStore(*data, nil)
	if err != nil {
		return err
	}
	defer store.Close()
	x, err := newExporter(ctx, store, *name)
	if err != nil {
		return err
	}
	x.progress = newProgress(stderr, "rows")
	began, part, write := time.Now(), to+".part", x.writeLines
	if *html != "" {
		write = x.archive
	}
	if err := os.RemoveAll(part); err != nil {
		return err
	}
	defer os.RemoveAll(part) // whatever is left of it
	err = write(ctx, part)
	x.progress.end()
	if err == nil {
		err = replace(part, to)
	}
	if err != nil {
		return fmt.Errorf("%s to %s: %w", *data, to, err)
	}
	fmt.Fprintf(stdout, "%s: %d messages.\nIt took %.1f s.\n", to, x.messages, time.Since(began).Seconds())
	return nil
}

// exporter writes what is in a store at one moment.
type exporter struct {
	store    *Store
	db       querier
	user     *User  // whose export it is; nil: everybody's
	sees     string // SQL condition for the rooms r that are exported
	messages int64  // that there are
	done     int64  // rows written
	progress *progress
}

func newExporter(ctx context.Context, store *Store, name string) (x *exporter, err error) {
	x = &exporter{store: store, db: store.read, sees: "1"}
	// All that is read is read by one connection, in one transaction. Those who write
	// go on in the write-ahead log.
	store.read.SetMaxOpenConns(1)
	if _, err := store.read.ExecContext(ctx, "BEGIN"); err != nil {
		return nil, err
	}
	if name != "" {
		u, _, err := store.UserByName(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("user %s: %w", name, err)
		}
		x.user, x.sees = &u, u.sees()
	}
	err = store.queryRow(ctx, "SELECT count(*) FROM log l JOIN rooms r ON r.id = l.room WHERE l.kind = 'message' AND "+x.sees).Scan(&x.messages)
	return x, err
}

// writeLines writes a file with a line for each row: {"table":…} and its columns, but
// for those that are NULL. What is binary is in hexadecimal.
func (x *exporter) writeLines(ctx context.Context, path string) error {
	f, err := os.Create(path)
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
	head := map[string]any{"table": "chatd", "version": len(migrations) + 1}
	if x.user != nil {
		head["user"] = x.user.Name
	}
	fmt.Fprintf(w, "%s\n", encodeJSON(head)) // a bufio.Writer keeps its error
	for _, t := range exportedTables {
		columns, err := tableColumns(ctx, x.db, t.name)
		if err != nil {
			return err
		}
		where := "1"
		if x.user != nil {
			if t.columns == "" {
				continue
			}
			columns = slices.DeleteFunc(columns, func(c column) bool { return !slices.Contains(strings.Fields(t.columns), c.name) })
			where = strings.NewReplacer("SEEN", "(SELECT r.id FROM rooms r WHERE "+x.sees+")", "ME", fmt.Sprint(x.user.ID)).Replace(t.where)
		}
		if err := x.table(ctx, w, t.name, columns, where); err != nil {
			return fmt.Errorf("%s: %w", t.name, err)
		}
	}
	_, err := fmt.Fprintf(w, `{"table":"end","rows":%d}`+"\n", x.done)
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
	rows, err := x.db.QueryContext(ctx, query)
	if err != nil {
		return err
	}
	defer rows.Close()
	var line sql.RawBytes
	for rows.Next() {
		if err := rows.Scan(&line); err != nil {
			return err
		}
		if _, err := fmt.Fprintf(w, "%s\n", bytes.ToValidUTF8(line, []byte("\uFFFD"))); err != nil {
			return err
		}
		x.done++
		x.progress.show(x.done, max(x.messages, x.done))
	}
	return rows.Err()
}

type column struct {
	name string
	blob bool
}

func tableColumns(ctx context.Context, db querier, table string) ([]column, error) {
	return collect(ctx, db, func(c *column) []any { return []any{&c.name, &c.blob} },
		"SELECT name, type = 'BLOB' FROM pragma_table_info(?) ORDER BY cid", table)
}
