package main

import (
	"database/sql"
	_ "embed"
	"fmt"
	"os"
)

//go:embed schema.sql
var schema string

// migrations[i] takes a database from user_version i+1 to i+2. A step that has
// shipped is never edited.
var migrations = []string{`
ALTER TABLE users ADD COLUMN deactivated INTEGER;
ALTER TABLE users ADD COLUMN confined INTEGER NOT NULL DEFAULT 0;
ALTER TABLE users ADD COLUMN expires INTEGER;
ALTER TABLE users ADD COLUMN language TEXT;
ALTER TABLE users ADD COLUMN notify TEXT NOT NULL DEFAULT 'mentions' CHECK (notify IN ('all', 'mentions', 'none'));
ALTER TABLE sessions ADD COLUMN created INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sessions ADD COLUMN agent TEXT NOT NULL DEFAULT '';
ALTER TABLE sessions ADD COLUMN address TEXT NOT NULL DEFAULT '';
ALTER TABLE rooms ADD COLUMN private INTEGER NOT NULL DEFAULT 0;
ALTER TABLE rooms ADD COLUMN topic TEXT NOT NULL DEFAULT '' CHECK (octet_length(topic) <= 1024);
ALTER TABLE rooms ADD COLUMN archived INTEGER;
CREATE TABLE members (
  room INTEGER NOT NULL REFERENCES rooms,
  user INTEGER NOT NULL REFERENCES users,
  PRIMARY KEY (room, user)
) STRICT, WITHOUT ROWID;
CREATE INDEX members_by_user ON members (user);
CREATE TABLE former_names (
  key  TEXT PRIMARY KEY,
  room INTEGER NOT NULL REFERENCES rooms
) STRICT, WITHOUT ROWID;
CREATE TABLE invites (
  id      INTEGER PRIMARY KEY,
  hash    BLOB NOT NULL UNIQUE,
  kind    TEXT NOT NULL CHECK (kind IN ('account', 'reset', 'guest')),
  role    TEXT NOT NULL CHECK (role IN ('admin', 'member', 'guest')),
  user    INTEGER REFERENCES users,
  room    INTEGER REFERENCES rooms,
  creator INTEGER REFERENCES users,
  created INTEGER NOT NULL,
  expires INTEGER NOT NULL,
  uses    INTEGER NOT NULL CHECK (uses >= 0),
  revoked INTEGER
) STRICT;
CREATE TABLE invite_uses (
  invite INTEGER NOT NULL REFERENCES invites,
  user   INTEGER NOT NULL REFERENCES users,
  time   INTEGER NOT NULL
) STRICT;
CREATE TABLE audit (
  id      INTEGER PRIMARY KEY AUTOINCREMENT,
  time    INTEGER NOT NULL,
  admin   INTEGER REFERENCES users,
  action  TEXT NOT NULL,
  subject TEXT NOT NULL,
  detail  TEXT NOT NULL
) STRICT;
CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'append-only'); END;
`, `
ALTER TABLE users ADD COLUMN bot INTEGER NOT NULL DEFAULT 0;
ALTER TABLE log ADD COLUMN pushed INTEGER NOT NULL DEFAULT 0;
CREATE TABLE tokens (
  id      INTEGER PRIMARY KEY,
  hash    BLOB NOT NULL UNIQUE,
  user    INTEGER NOT NULL REFERENCES users,
  room    INTEGER REFERENCES rooms,
  scope   TEXT NOT NULL CHECK (scope IN ('read', 'post', 'both')),
  label   TEXT NOT NULL CHECK (octet_length(label) <= 256),
  creator INTEGER REFERENCES users,
  created INTEGER NOT NULL,
  expires INTEGER,
  used    INTEGER,
  revoked INTEGER
) STRICT;
CREATE INDEX tokens_by_user ON tokens (user);
CREATE TABLE pushes (
  id      INTEGER PRIMARY KEY AUTOINCREMENT,
  room    INTEGER NOT NULL REFERENCES rooms,
  user    INTEGER NOT NULL REFERENCES users,
  text    TEXT NOT NULL CHECK (octet_length(text) BETWEEN 1 AND 8192),
  every   INTEGER NOT NULL,
  times   INTEGER NOT NULL,
  done    INTEGER NOT NULL DEFAULT 0,
  started INTEGER NOT NULL,
  due     INTEGER NOT NULL,
  ended   INTEGER
) STRICT;
CREATE INDEX pushes_by_room ON pushes (room);
CREATE INDEX pushes_due ON pushes (due) WHERE ended IS NULL;
CREATE TABLE hooks (
  id       INTEGER PRIMARY KEY AUTOINCREMENT,
  room     INTEGER NOT NULL REFERENCES rooms,
  bot      INTEGER NOT NULL REFERENCES users,
  url      TEXT NOT NULL,
  secret   BLOB NOT NULL,
  mention  INTEGER NOT NULL,
  creator  INTEGER REFERENCES users,
  created  INTEGER NOT NULL,
  cursor   INTEGER NOT NULL,
  failures INTEGER NOT NULL DEFAULT 0,
  due      INTEGER NOT NULL DEFAULT 0,
  removed  INTEGER
) STRICT;
CREATE TABLE deliveries (
  id      INTEGER PRIMARY KEY,
  hook    INTEGER NOT NULL REFERENCES hooks,
  event   INTEGER NOT NULL REFERENCES log,
  time    INTEGER NOT NULL,
  took    INTEGER NOT NULL,
  status  INTEGER NOT NULL,
  error   TEXT NOT NULL,
  reply   INTEGER REFERENCES log
) STRICT;
CREATE INDEX deliveries_by_hook ON deliveries (hook);
`, `
CREATE TABLE levels (
  user   INTEGER NOT NULL REFERENCES users,
  room   INTEGER NOT NULL REFERENCES rooms,
  notify TEXT NOT NULL CHECK (notify IN ('all', 'mentions', 'none')),
  PRIMARY KEY (user, room)
) STRICT, WITHOUT ROWID;
CREATE INDEX log_mentions ON log (room) WHERE kind = 'message' AND instr(body, '@');
ALTER TABLE rooms ADD COLUMN keep INTEGER CHECK (keep > 0);
DROP INDEX log_edits;
CREATE INDEX log_about ON log (target) WHERE kind != 'message';
CREATE INDEX deliveries_by_event ON deliveries (event);
CREATE INDEX deliveries_by_reply ON deliveries (reply);
CREATE VIRTUAL TABLE search USING fts5 (text, pairs, tags, content='', contentless_delete=1, tokenize='ascii');
INSERT INTO search (search, rank) VALUES ('automerge', 0);
CREATE TABLE indexed (
  id INTEGER NOT NULL,
  stale INTEGER NOT NULL
) STRICT;
INSERT INTO indexed VALUES (0, 0);
`}

// migrate brings the database to version len(steps)+1, all or nothing. It keeps
// a copy of the file as it was before.
func migrate(db *sql.DB, path string, steps []string) error {
	var version int
	if err := db.QueryRow("PRAGMA user_version").Scan(&version); err != nil {
		return err
	}
	newest := len(steps) + 1
	switch {
	case version == newest:
		return nil
	case version > newest:
		return fmt.Errorf("the database has version %d, this chatd knows versions up to %d", version, newest)
	case version == 0:
		steps = []string{schema}
	default:
		if err := keepCopy(db, fmt.Sprintf("%s.v%d", path, version)); err != nil {
			return fmt.Errorf("keep a copy before migrating: %w", err)
		}
		steps = steps[version-1:]
	}
	tx, err := db.Begin()
	if err != nil {
		return err
	}
	defer tx.Rollback()
	for _, step := range append(steps, fmt.Sprintf("PRAGMA user_version = %d", newest)) {
		if _, err := tx.Exec(step); err != nil {
			return fmt.Errorf("migrate from version %d: %w", version, err)
		}
	}
	return tx.Commit()
}

// keepCopy writes the database to a file, which is there whole or not at all.
func keepCopy(db *sql.DB, path string) error {
	part := path + ".part"
	if err := os.RemoveAll(part); err != nil {
		return err
	}
	if _, err := db.Exec("VACUUM INTO ?", part); err != nil {
		return err
	}
	return replace(part, path)
}
