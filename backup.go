package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"modernc.org/sqlite"
)

const backupStep = 256 // pages of 4 KiB that are copied at a time

// backup is `chatd backup`: it writes all that chatd keeps, as it is at one moment,
// into one file, while chatd runs. The file is there whole, and examined, or not at all.
func backup(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := newFlags("chatd backup")
	data := flags.String("data", "./data", "")
	force := flags.Bool("f", false, "")
	words, err := parseWords(flags, args)
	if err != nil {
		return err
	}
	if len(words) != 1 {
		return errors.New("say chatd backup FILE")
	}
	file, path, began := words[0], filepath.Join(*data, "chatd.db"), time.Now()
	source, err := os.Stat(path)
	if err != nil {
		return err
	}
	if old, err := os.Stat(file); err == nil && (!*force || os.SameFile(old, source)) {
		return fmt.Errorf("%s is there already; -f replaces a backup", file)
	}
	dir, err := os.Open(*data)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return fmt.Errorf("another backup of %s is under way", *data)
	}
	part := file + ".part"
	f, err := os.Create(part)
	if err != nil {
		return err
	}
	defer os.Remove(part) // whatever is left of it
	defer f.Close()
	shown := newProgress(stderr, "pages")
	// The copy is fsynced as it grows: those who write would have to wait for one big
	// fsync at the end.
	err = copyPages(ctx, path, fileURI(part, "_pragma=journal_mode(OFF)&_pragma=synchronous(OFF)"), func(done, all int) error {
		shown.show(int64(done), int64(all))
		return f.Sync()
	})
	shown.end()
	if err != nil {
		return explain(path+" to "+file, err)
	}
	found, err := examine(ctx, part)
	if err != nil {
		return explain(file, err)
	}
	if err := replace(part, file); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s: %v\nIt took %.1f s.\n", file, found, time.Since(began).Seconds())
	return os.WriteFile(filepath.Join(*data, "last-backup"), []byte(began.UTC().Format(time.RFC3339)), 0o600)
}

// lastBackup returns the time of the last good backup; os.ErrNotExist is for none.
func lastBackup(dir string) (at time.Time, err error) {
	text, err := os.ReadFile(filepath.Join(dir, "last-backup"))
	if err == nil {
		at, err = time.Parse(time.RFC3339, strings.TrimSpace(string(text)))
	}
	return at, err
}

// copyPages copies the database at path over that at the URI to, in one transaction
// there, and calls step now and then. Those who write are not held up: they go on in
// the write-ahead log.
func copyPages(ctx context.Context, path, to string, step func(done, all int) error) error {
	db, err := openFile(path, "mode=rw")
	if err != nil {
		return err
	}
	defer db.Close()
	conn, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	// A transaction that has read keeps what it reads as it was. Without one the
	// copy would begin anew whenever somebody writes.
	if _, err := conn.ExecContext(ctx, "BEGIN; SELECT 1 FROM sqlite_schema"); err != nil {
		return err
	}
	return conn.Raw(func(c any) error {
		b, err := c.(interface {
			NewBackup(string) (*sqlite.Backup, error)
		}).NewBackup(to)
		if err != nil {
			return err
		}
		for more := true; more && err == nil; {
			if more, err = b.Step(backupStep); err == nil {
				err = errors.Join(context.Cause(ctx), step(b.PageCount()-b.Remaining(), b.PageCount()))
			}
		}
		return errors.Join(err, b.Finish())
	})
}

// contents is what is in a database: backup says it, and restore, to be compared.
type contents struct {
	version                      int
	messages, users, rooms, last int64
	size                         int64
	sum                          []byte // SHA-256 of the file
}

func (c contents) String() string {
	return fmt.Sprintf("%d messages, %d users, %d rooms, newest id %d\n%d bytes, SHA-256 %x", c.messages, c.users, c.rooms, c.last, c.size, c.sum)
}

// examine returns what is in a file that nobody writes to, or what is wrong with it.
func examine(ctx context.Context, path string) (c contents, err error) {
	db, err := openFile(path, "mode=ro&immutable=1")
	if err != nil {
		return c, err
	}
	defer db.Close()
	var wrong string
	var orphans int
	err = db.QueryRowContext(ctx, `
		SELECT user_version, (SELECT integrity_check FROM pragma_integrity_check), (SELECT count(*) FROM pragma_foreign_key_check),
			(SELECT count(*) FROM log WHERE kind = 'message'), (SELECT count(*) FROM users), (SELECT count(*) FROM rooms),
			(SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'log') FROM pragma_user_version`).
		Scan(&c.version, &wrong, &orphans, &c.messages, &c.users, &c.rooms, &c.last)
	switch newest := len(migrations) + 1; {
	case err != nil:
		return c, err
	case c.version < 1 || c.version > newest:
		return c, fmt.Errorf("the database has version %d, this chatd knows versions 1 to %d", c.version, newest)
	case wrong != "ok":
		return c, fmt.Errorf("it is damaged: %s", wrong)
	case orphans > 0:
		return c, fmt.Errorf("it is damaged: %d references lead nowhere", orphans)
	}
	f, err := os.Open(path)
	if err != nil {
		return c, err
	}
	defer f.Close()
	sum := sha256.New()
	c.size, err = io.Copy(sum, f)
	c.sum = sum.Sum(nil)
	return c, err
}

// restore is `chatd restore`: it makes a data directory of a backup.
func restore(ctx context.Context, args []string, stdout io.Writer) error {
	return makeData(ctx, "restore", args, stdout, func(part string, from *os.File) error {
		if _, err := os.Stat(from.Name() + "-wal"); err == nil {
			return errors.New("it is not all: part of it is in a -wal; say chatd backup to get one file")
		}
		to, err := os.Create(part)
		if err != nil {
			return err
		}
		_, err = io.Copy(to, from)
		return errors.Join(err, to.Close())
	})
}

// makeData is a command that makes a data directory, which has to be empty, of a file:
// fill writes the database. It is there whole, and examined, or not at all.
func makeData(ctx context.Context, command string, args []string, stdout io.Writer, fill func(part string, from *os.File) error) error {
	flags := newFlags("chatd " + command)
	data := flags.String("data", "./data", "")
	words, err := parseWords(flags, args)
	if err != nil {
		return err
	}
	if len(words) != 1 {
		return fmt.Errorf("say chatd %s FILE", command)
	}
	from, err := os.Open(words[0])
	if err != nil {
		return err
	}
	defer from.Close()
	unlock, err := lockData(*data)
	if err != nil {
		return err
	}
	defer unlock()
	entries, err := os.ReadDir(*data)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "lock") && e.Name() != "chatd.db.part" { // what one that was killed leaves
			return fmt.Errorf("%s has to be empty, and has %s in it", *data, e.Name())
		}
	}
	path := filepath.Join(*data, "chatd.db")
	part := path + ".part"
	if err := os.RemoveAll(part); err != nil {
		return err
	}
	defer os.Remove(part) // whatever is left of it
	if err := fill(part, from); err != nil {
		return fmt.Errorf("%s: %w", words[0], err)
	}
	found, err := examine(ctx, part)
	if err != nil {
		return explain(words[0], err)
	}
	if err := replace(part, path); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s: %v\n", words[0], found)
	return nil
}

// rollback is `chatd rollback`: it undoes a migration. What the database was before
// is written into it in one transaction, so that nothing can come in between.
func rollback(ctx context.Context, args []string, stdout io.Writer) error {
	flags := newFlags("chatd rollback")
	data := flags.String("data", "./data", "")
	yes := flags.Bool("yes", false, "")
	words, err := parseWords(flags, args)
	if err != nil {
		return err
	}
	if len(words) != 0 {
		return errors.New("say chatd rollback")
	}
	path := filepath.Join(*data, "chatd.db")
	db, err := openFile(path, "mode=rw")
	if err != nil {
		return err
	}
	defer db.Close()
	var version, lost int
	if err := db.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return explain(path, err)
	}
	kept, err := newestCopy(path, version)
	if err != nil {
		return err
	}
	unlock, err := lockData(*data)
	if err != nil {
		return err
	}
	defer unlock()
	found, err := examine(ctx, kept)
	if err != nil {
		return explain(kept, err)
	}
	if err := db.QueryRowContext(ctx, "SELECT count(*) FROM log WHERE kind = 'message' AND id > ?", found.last).Scan(&lost); err != nil {
		return explain(path, err)
	}
	undone := fmt.Sprintf("%s.v%d.undone", path, version)
	fmt.Fprintf(stdout, "From version %d back to %s, version %d: %d messages are lost, and whatever else has changed since.\nWhat is there now is kept in %s.\n", version, kept, found.version, lost, undone)
	if !*yes {
		return errors.New("nothing has changed; -yes does it")
	}
	if err := keepCopy(db, undone); err != nil {
		return explain(undone, err)
	}
	if err := copyPages(ctx, kept, fileURI(path, "mode=rw"), func(int, int) error { return nil }); err != nil {
		return explain(path, err)
	}
	fmt.Fprintln(stdout, "Done. Now start the chatd of before.")
	return nil
}

// newestCopy returns the newest of the files that migrations up to a version have kept.
func newestCopy(path string, version int) (string, error) {
	for v := version - 1; v > 0; v-- {
		kept := fmt.Sprintf("%s.v%d", path, v)
		if _, err := os.Stat(kept); err == nil {
			return kept, nil
		}
	}
	return "", fmt.Errorf("%s has version %d, and no migration has kept a copy of an older one", path, version)
}

// openFile opens a database as it is: it makes and migrates none.
func openFile(path, query string) (*sql.DB, error) { return sql.Open("sqlite", fileURI(path, query)) }

// fileURI is a database to SQLite. The query is one of its URIs'.
func fileURI(path, query string) string {
	query += fmt.Sprintf("&_pragma=busy_timeout(%d)", lockWait)
	return (&url.URL{Scheme: "file", Path: path, OmitHost: true, RawQuery: query}).String()
}

// replace gives a file that is finished its name. Whatever happens, the name is
// that of the old file or of the whole new one.
func replace(part, path string) error {
	if err := syncFile(part); err != nil {
		return err
	}
	if err := os.Rename(part, path); err != nil {
		return err
	}
	return syncFile(filepath.Dir(path))
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
