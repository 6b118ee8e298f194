package main

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// importLines is `chatd import`: it makes a data directory of what export wrote.
func importLines(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	return makeData(ctx, "import", args, stdout, func(part string, from *os.File) error {
		size, err := from.Stat()
		if err != nil {
			return err
		}
		// Nobody sees the file before it is complete, so nothing has to be undone.
		db, err := openFile(part, "mode=rwc&_pragma=journal_mode(OFF)&_pragma=synchronous(OFF)&_pragma=foreign_keys(1)")
		if err != nil {
			return err
		}
		defer db.Close()
		if err := migrate(db, part, migrations); err != nil {
			return err
		}
		tx, err := db.Begin()
		if err != nil {
			return err
		}
		defer tx.Rollback()
		shown := newProgress(stderr, "bytes")
		defer shown.end()
		if err := readLines(ctx, tx, from, func(done int64) { shown.show(done, size.Size()) }); err != nil {
			return err
		}
		return tx.Commit()
	})
}

// readLines puts an export, to its end, into an empty database. An error says which
// line is wrong. show is told how many bytes were read.
func readLines(ctx context.Context, tx *sql.Tx, from io.Reader, show func(done int64)) (err error) {
	r := lineReader{tx: tx, columns: make(map[string][]column), inserts: make(map[string]*sql.Stmt)}
	for _, t := range exportedTables {
		if r.columns[t.name], err = tableColumns(ctx, tx, t.name); err != nil {
			return err
		}
	}
	lines := json.NewDecoder(from)
	lines.UseNumber()
	for n := 1; ; n++ {
		var fields map[string]any
		err := cmp.Or(ctx.Err(), lines.Decode(&fields))
		switch {
		case err == io.EOF && r.complete:
			return nil
		case err == io.EOF:
			err = errors.New("the file ends too early")
		case err == nil:
			err = r.line(fields, n == 1)
		}
		if err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
		show(lines.InputOffset())
	}
}

type lineReader struct {
	tx       *sql.Tx
	columns  map[string][]column  // by table
	inserts  map[string]*sql.Stmt // by their text
	rows     int64
	complete bool // the last line was there
}

func (r *lineReader) line(fields map[string]any, first bool) error {
	table, ok := fields["table"].(string)
	columns, known := r.columns[table]
	switch {
	case !ok:
		return errors.New(`no "table"`)
	case r.complete:
		return errors.New("it comes after the end")
	case first != (table == "chatd"):
		return errors.New("not what an export begins with")
	case first:
		return checkHead(fields)
	case table == "end":
		if r.complete = fmt.Sprint(fields["rows"]) == fmt.Sprint(r.rows); !r.complete {
			return fmt.Errorf("the file has %d rows and should have %v", r.rows, fields["rows"])
		}
		return nil
	case !known:
		return fmt.Errorf("there is no table %q", table)
	}
	r.rows++
	delete(fields, "table")
	return r.row(table, columns, fields)
}

func checkHead(fields map[string]any) error {
	version, err := strconv.Atoi(fmt.Sprint(fields["version"]))
	switch newest := len(migrations) + 1; {
	case fields["user"] != nil:
		return fmt.Errorf("it has only what %v may see, which is too little to import", fields["user"])
	case err != nil || version < 1 || version > newest:
		return fmt.Errorf("it has version %v, this chatd knows versions 1 to %d", fields["version"], newest)
	}
	return nil
}

// row puts a row into a table. Its values are numbers without a fraction, texts, or,
// where blobs are kept, bytes in hexadecimal.
func (r *lineReader) row(table string, columns []column, fields map[string]any) (err error) {
	var names, marks []string
	var values []any
	for _, c := range columns {
		value, ok := fields[c.name]
		if !ok {
			continue
		}
		delete(fields, c.name)
		switch v := value.(type) {
		case json.Number:
			value, err = v.Int64()
		case string:
			if c.blob {
				value, err = hex.DecodeString(v)
			}
		default:
			err = fmt.Errorf("%v is neither a number nor a text", v)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		names, marks, values = append(names, c.name), append(marks, "?"), append(values, value)
	}
	for name := range fields {
		return fmt.Errorf("there is no column %q", name)
	}
	if table == "sqlite_sequence" && len(values) > 0 { // SQLite has made a row already, of the ids that came before
		if _, err := r.tx.Exec("DELETE FROM sqlite_sequence WHERE name = ?", values[0]); err != nil {
			return err
		}
	}
	query := fmt.Sprintf("INSERT INTO %s (%s) VALUES (%s)", table, strings.Join(names, ", "), strings.Join(marks, ", "))
	if r.inserts[query] == nil {
		if r.inserts[query], err = r.tx.Prepare(query); err != nil {
			return err
		}
	}
	_, err = r.inserts[query].Exec(values...)
	return err
}
