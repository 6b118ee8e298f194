package main

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

const maxLine = 1 << 20 // bytes; an edit has two texts, and \u0000 is six bytes

// importLines is `chatd import`: it makes a data directory of what export wrote.
func importLines(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := newFlags("chatd import")
	data := flags.String("data", "./data", "")
	words, err := parseWords(flags, args)
	if err != nil {
		return err
	}
	if len(words) != 1 {
		return errors.New("say chatd import FILE.jsonl")
	}
	from, err := os.Open(words[0])
	if err != nil {
		return err
	}
	defer from.Close()
	size, err := from.Stat()
	if err != nil {
		return err
	}
	shown := newProgress(stderr, "bytes")
	defer shown.end()
	found, err := makeData(ctx, *data, words[0], func(part string) error {
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
		r, err := newLineReader(ctx, tx)
		if err == nil {
			err = r.read(ctx, from, func(done int64) { shown.show(done, size.Size()) })
		}
		if err != nil {
			return fmt.Errorf("%s: %w", words[0], err)
		}
		return tx.Commit()
	})
	if err != nil {
		return err
	}
	shown.end()
	fmt.Fprintf(stdout, "%s: %v\n", words[0], found)
	return nil
}

// lineReader puts the lines of an export into an empty database.
type lineReader struct {
	tx       *sql.Tx
	columns  map[string][]column  // by table
	inserts  map[string]*sql.Stmt // by table and the columns that a line has
	rows     int64
	complete bool // the last line was there
}

func newLineReader(ctx context.Context, tx *sql.Tx) (*lineReader, error) {
	r := &lineReader{tx: tx, columns: make(map[string][]column), inserts: make(map[string]*sql.Stmt)}
	for _, t := range exportedTables {
		columns, err := tableColumns(ctx, tx, t.name)
		if err != nil {
			return nil, err
		}
		r.columns[t.name] = columns
	}
	return r, nil
}

// read reads an export to its end. An error says which line is wrong. show is told how
// many bytes were read.
func (r *lineReader) read(ctx context.Context, from io.Reader, show func(done int64)) error {
	lines := bufio.NewScanner(from)
	lines.Buffer(nil, maxLine)
	n, done := 0, int64(0)
	for lines.Scan() {
		n++
		err := ctx.Err()
		if err == nil {
			err = r.line(lines.Bytes(), n == 1)
		}
		if err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
		done += int64(len(lines.Bytes()) + 1)
		show(done)
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("line %d: %w", n+1, err)
	}
	if !r.complete {
		return fmt.Errorf("line %d: the file ends too early", n+1)
	}
	return nil
}

func (r *lineReader) line(text []byte, first bool) error {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(text, &fields); err != nil {
		return err
	}
	var table string
	if err := json.Unmarshal(fields["table"], &table); err != nil {
		return errors.New(`no "table"`)
	}
	delete(fields, "table")
	columns, known := r.columns[table]
	switch {
	case r.complete:
		return errors.New("it comes after the end")
	case first != (table == "chatd"):
		return errors.New("not what an export begins with")
	case first:
		return checkHead(text)
	case table == "end":
		var end exportEnd
		if err := json.Unmarshal(text, &end); err != nil || end.Rows != r.rows {
			return fmt.Errorf("the file has %d rows and should have %d", r.rows, end.Rows)
		}
		r.complete = true
		return nil
	case !known:
		return fmt.Errorf("there is no table %q", table)
	}
	r.rows++
	names, values, err := decodeRow(fields, columns)
	if err != nil {
		return err
	}
	return r.insert(table, names, values)
}

func checkHead(text []byte) error {
	var head exportHead
	if err := json.Unmarshal(text, &head); err != nil {
		return err
	}
	switch newest := len(migrations) + 1; {
	case head.User != "":
		return fmt.Errorf("it has only what %s may see, which is too little to import", head.User)
	case head.Version < 1 || head.Version > newest:
		return fmt.Errorf("it has version %d, this chatd knows versions 1 to %d", head.Version, newest)
	}
	return nil
}

// decodeRow returns the names and values of a line's fields, in the order of columns.
// Values are numbers without a fraction, texts, or, where blobs are kept, bytes.
func decodeRow(fields map[string]json.RawMessage, columns []column) (names []string, values []any, err error) {
	for _, c := range columns {
		raw, ok := fields[c.name]
		if !ok {
			continue
		}
		delete(fields, c.name)
		var text string
		var value any
		if bytes.HasPrefix(raw, []byte(`"`)) {
			err = json.Unmarshal(raw, &text)
			value = text
			if c.blob && err == nil {
				value, err = hex.DecodeString(text)
			}
		} else {
			var number *int64 // nil: null
			if err = json.Unmarshal(raw, &number); err == nil && number == nil {
				err = errors.New("null is left out")
			}
			value = number
		}
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", c.name, err)
		}
		names, values = append(names, c.name), append(values, value)
	}
	for name := range fields {
		return nil, nil, fmt.Errorf("there is no column %q", name)
	}
	return names, values, nil
}

func (r *lineReader) insert(table string, names []string, values []any) error {
	name, key := slices.Index(names, "name"), slices.Index(names, "key")
	if name >= 0 && key >= 0 && fmt.Sprint(values[key]) != foldName(fmt.Sprint(values[name])) {
		return fmt.Errorf("the key of the name is %q", foldName(fmt.Sprint(values[name])))
	}
	if table == "sqlite_sequence" {
		return r.sequence(names, values)
	}
	id := table + " " + strings.Join(names, ", ")
	insert := r.inserts[id]
	if insert == nil {
		if len(names) == 0 {
			return errors.New("the row is empty")
		}
		var err error
		insert, err = r.tx.Prepare(fmt.Sprintf("INSERT INTO %s (%s) VALUES (?%s)", table, strings.Join(names, ", "), strings.Repeat(", ?", len(names)-1)))
		if err != nil {
			return err
		}
		r.inserts[id] = insert
	}
	_, err := insert.Exec(values...)
	return err
}

// sequence says which ids of a table were given, though their rows may be gone.
func (r *lineReader) sequence(names []string, values []any) error {
	if !slices.Equal(names, []string{"name", "seq"}) || r.columns[fmt.Sprint(values[0])] == nil {
		return errors.New("not a table and its newest id")
	}
	result, err := r.tx.Exec("UPDATE sqlite_sequence SET seq = max(seq, CAST(?2 AS INTEGER)) WHERE name = ?1", values...)
	if err != nil {
		return err
	}
	if n, err := result.RowsAffected(); err != nil || n > 0 {
		return err
	}
	_, err = r.tx.Exec("INSERT INTO sqlite_sequence (name, seq) VALUES (?1, CAST(?2 AS INTEGER))", values...)
	return err
}
