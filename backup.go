package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"modernc.org/sqlite"
)

const backupStep = 256 // pages of 4 KiB between two fsyncs

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
	switch old, err := os.Stat(file); {
	case err == nil && (!*force || os.SameFile(old, source)):
		return fmt.Errorf("%s is there already; -f replaces a backup", file)
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return err
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
	defer os.Remove(part) // whatever is left of it
	if err := copyPages(ctx, path, part, stderr); err != nil {
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
	last := filepath.Join(*data, "last-backup")
	if err := os.WriteFile(last+".part", []byte(began.UTC().Format(time.RFC3339)+"\n"), 0o600); err != nil {
		return err
	}
	return replace(last+".part", last)
}

// lastBackup returns the time of the last good backup; os.ErrNotExist is for none.
func lastBackup(dir string) (time.Time, error) {
	text, err := os.ReadFile(filepath.Join(dir, "last-backup"))
	if err != nil {
		return time.Time{}, err
	}
	return time.Parse(time.RFC3339, strings.TrimSpace(string(text)))
}

// copyPages copies the database at path into the file part. Those who write are not
// held up: they go on in the write-ahead log, and the copy is fsynced as it grows,
// since one big fsync at the end would let theirs wait for it.
func copyPages(ctx context.Context, path, part string, stderr io.Writer) error {
	f, err := os.OpenFile(part, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
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
	var version int
	if _, err := conn.ExecContext(ctx, "BEGIN"); err != nil {
		return err
	}
	if err := conn.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return err
	}
	shown := newProgress(stderr, "pages")
	defer shown.end()
	return conn.Raw(func(c any) error {
		b, err := c.(interface {
			NewBackup(string) (*sqlite.Backup, error)
		}).NewBackup(fileURI(part, "_pragma=journal_mode(OFF)&_pragma=synchronous(OFF)"))
		if err != nil {
			return err
		}
		for more := true; more && err == nil; {
			if more, err = b.Step(backupStep); err == nil {
				err = errors.Join(context.Cause(ctx), f.Sync())
			}
			shown.show(int64(b.PageCount()-b.Remaining()), int64(b.PageCount()))
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
	if err := db.QueryRowContext(ctx, "PRAGMA user_version").Scan(&c.version); err != nil {
		return c, err
	}
	if newest := len(migrations) + 1; c.version < 1 || c.version > newest {
		return c, fmt.Errorf("the database has version %d, this chatd knows versions 1 to %d", c.version, newest)
	}
	var wrong string
	var orphans int
	err = db.QueryRowContext(ctx, `
		SELECT (SELECT integrity_check FROM pragma_integrity_check), (SELECT count(*) FROM pragma_foreign_key_check),
			(SELECT count(*) FROM log WHERE kind = 'message'), (SELECT count(*) FROM users), (SELECT count(*) FROM rooms),
			(SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'log')`).
		Scan(&wrong, &orphans, &c.messages, &c.users, &c.rooms, &c.last)
	switch {
	case err != nil:
		return c, err
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
	flags := newFlags("chatd restore")
	data := flags.String("data", "./data", "")
	words, err := parseWords(flags, args)
	if err != nil {
		return err
	}
	if len(words) != 1 {
		return errors.New("say chatd restore FILE")
	}
	if _, err := os.Stat(words[0] + "-wal"); err == nil {
		return fmt.Errorf("%s is not all: part of it is in %[1]s-wal; say chatd backup to get one file", words[0])
	}
	from, err := os.Open(words[0])
	if err != nil {
		return err
	}
	defer from.Close()
	found, err := makeData(ctx, *data, words[0], func(part string) error {
		to, err := os.OpenFile(part, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(to, from)
		return errors.Join(err, to.Close())
	})
	if err == nil {
		fmt.Fprintf(stdout, "%s: %v\n", words[0], found)
	}
	return err
}

// makeData makes a data directory, which has to be empty, of the database that fill
// writes into a file. It is there whole, and examined, or not at all. from is where it
// comes from.
func makeData(ctx context.Context, dir, from string, fill func(part string) error) (found contents, err error) {
	unlock, err := lockData(dir)
	if err != nil {
		return found, err
	}
	defer unlock()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return found, err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "lock.db") && e.Name() != "chatd.db.part" { // what one that was killed leaves
			return found, fmt.Errorf("%s has to be empty, and has %s in it", dir, e.Name())
		}
	}
	path := filepath.Join(dir, "chatd.db")
	part := path + ".part"
	if err := os.Remove(part); err != nil && !errors.Is(err, os.ErrNotExist) {
		return found, err
	}
	defer os.Remove(part) // whatever is left of it
	if err := fill(part); err != nil {
		return found, err
	}
	if found, err = examine(ctx, part); err != nil {
		return found, explain(from, err)
	}
	if err := replace(part, path); err != nil {
		return found, err
	}
	store, err := OpenStore(dir, func([]Event) {}) // which migrates it
	if err != nil {
		return found, err
	}
	return found, store.Close()
}

// rollback is `chatd rollback`: it undoes a migration. What the database was before
// is written into it in one transaction, so that nothing can come in between.
func rollback(ctx context.Context, args []string, stdin *os.File, stdout io.Writer) error {
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
	kept, err := newestCopy(*data)
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
	path := filepath.Join(*data, "chatd.db")
	db, err := openFile(path, "mode=rw")
	if err != nil {
		return err
	}
	defer db.Close()
	var version, lost int
	err = db.QueryRowContext(ctx, "SELECT user_version, (SELECT count(*) FROM log WHERE kind = 'message' AND id > ?) FROM pragma_user_version", found.last).Scan(&version, &lost)
	if err != nil {
		return explain(path, err)
	}
	if version <= found.version {
		return fmt.Errorf("%s has version %d, and %s is no older", path, version, kept)
	}
	undone := fmt.Sprintf("%s.v%d.undone", path, version)
	fmt.Fprintf(stdout, "From version %d back to %s, version %d: %d messages are lost, and whatever else has changed since.\nWhat is there now is kept in %s.\n", version, kept, found.version, lost, undone)
	if !*yes && !confirm(ctx, stdin, stdout) {
		return errors.New("nothing has changed")
	}
	if err := keepCopy(db, undone); err != nil {
		return explain(undone, err)
	}
	if err := overwrite(db, kept); err != nil {
		return explain(path, err)
	}
	if err := db.Close(); err != nil {
		return explain(path, err)
	}
	fmt.Fprintln(stdout, "Done. Now start the chatd of before.")
	return nil
}

// newestCopy returns the newest of the files that migrations have kept.
func newestCopy(dir string) (path string, err error) {
	entries, err := os.ReadDir(dir)
	newest := 0
	for _, e := range entries {
		number, is := strings.CutPrefix(e.Name(), "chatd.db.v")
		if version, err := strconv.Atoi(number); is && err == nil && version > newest {
			newest, path = version, filepath.Join(dir, e.Name())
		}
	}
	if err == nil && path == "" {
		err = fmt.Errorf("no migration has kept a copy in %s", dir)
	}
	return path, err
}

func confirm(ctx context.Context, stdin *os.File, stdout io.Writer) bool {
	fmt.Fprint(stdout, "Type yes: ")
	answer := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(stdin).ReadString('\n')
		answer <- strings.TrimSpace(line)
	}()
	select {
	case line := <-answer:
		return line == "yes"
	case <-ctx.Done():
		return false
	}
}

// overwrite makes db what is in the file from, in one transaction.
func overwrite(db *sql.DB, from string) error {
	conn, err := db.Conn(context.Background())
	if err != nil {
		return err
	}
	defer conn.Close()
	return conn.Raw(func(c any) error {
		b, err := c.(interface {
			NewRestore(string) (*sqlite.Backup, error)
		}).NewRestore(fileURI(from, "mode=ro&immutable=1"))
		if err != nil {
			return err
		}
		_, err = b.Step(-1)
		return errors.Join(err, b.Finish())
	})
}

// openFile opens a database as it is: it makes and migrates none.
func openFile(path, mode string) (*sql.DB, error) {
	return sql.Open("sqlite", fileURI(path, fmt.Sprintf("%s&_pragma=busy_timeout(%d)", mode, lockWait)))
}

func fileURI(path, query string) string {
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
