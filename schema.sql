-- The newest schema. A new database gets this file; an older one gets the steps
-- in migrations (migrate.go), and ends with the same schema.
-- Times are Unix milliseconds. Names are compared by their key, which has no case.

CREATE TABLE users (
  id       INTEGER PRIMARY KEY,
  name     TEXT NOT NULL,        -- as it is shown
  key      TEXT NOT NULL UNIQUE,
  role     TEXT NOT NULL CHECK (role IN ('admin', 'member', 'guest')),
  password TEXT,                 -- Django's encoding, algorithm$iterations$salt$hash; guests have none
  joined   INTEGER NOT NULL,
  first_id INTEGER NOT NULL,     -- newest log id at that time; what is older never counts as unread
  deactivated INTEGER,           -- when; may not come in any more
  confined INTEGER NOT NULL DEFAULT 0, -- 1: sees only the rooms that it is a member of, not the public ones
  expires  INTEGER,              -- when a guest of a link has to leave
  language TEXT,                 -- of the pages; NULL: as the browser says
  notify   TEXT NOT NULL DEFAULT 'mentions' CHECK (notify IN ('all', 'mentions', 'none')),
  bot      INTEGER NOT NULL DEFAULT 0 -- 1: a program, which comes in by its tokens only
) STRICT;

CREATE TABLE sessions (
  hash BLOB PRIMARY KEY,         -- SHA-256 of the cookie's token; the token itself is kept nowhere
  user INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
  seen INTEGER NOT NULL,         -- last used, to within a day
  created INTEGER NOT NULL DEFAULT 0,
  agent   TEXT NOT NULL DEFAULT '', -- the browser's User-Agent
  address TEXT NOT NULL DEFAULT ''  -- where it signed in
) STRICT, WITHOUT ROWID;
CREATE INDEX sessions_by_user ON sessions (user);

CREATE TABLE rooms (
  id      INTEGER PRIMARY KEY,
  name    TEXT NOT NULL,
  key     TEXT NOT NULL UNIQUE,
  creator INTEGER NOT NULL REFERENCES users,
  created INTEGER NOT NULL,
  private INTEGER NOT NULL DEFAULT 0, -- 1: only for its members
  topic   TEXT NOT NULL DEFAULT '' CHECK (octet_length(topic) <= 1024),
  archived INTEGER,                   -- when; can be read and no more
  keep    INTEGER CHECK (keep > 0)    -- days, after which messages are removed; NULL: never
) STRICT;

-- Who is in a private room. Public rooms have no members. A room of two with
-- both names, "ann+bob", is their direct messages.
CREATE TABLE members (
  room INTEGER NOT NULL REFERENCES rooms,
  user INTEGER NOT NULL REFERENCES users,
  PRIMARY KEY (room, user)
) STRICT, WITHOUT ROWID;
CREATE INDEX members_by_user ON members (user);

-- Names that rooms had before, so that old links lead to them.
CREATE TABLE former_names (
  key  TEXT PRIMARY KEY,
  room INTEGER NOT NULL REFERENCES rooms
) STRICT, WITHOUT ROWID;

-- Links that let somebody in.
CREATE TABLE invites (
  id      INTEGER PRIMARY KEY,
  hash    BLOB NOT NULL UNIQUE,  -- SHA-256 of the link's token
  kind    TEXT NOT NULL CHECK (kind IN ('account', 'reset', 'guest')),
  role    TEXT NOT NULL CHECK (role IN ('admin', 'member', 'guest')), -- of those who use it
  user    INTEGER REFERENCES users, -- reset: whose password
  room    INTEGER REFERENCES rooms, -- guest: the only room
  creator INTEGER REFERENCES users, -- NULL: from the command line
  created INTEGER NOT NULL,
  expires INTEGER NOT NULL,
  uses    INTEGER NOT NULL CHECK (uses >= 0), -- left
  revoked INTEGER                -- when
) STRICT;

CREATE TABLE invite_uses (
  invite INTEGER NOT NULL REFERENCES invites,
  user   INTEGER NOT NULL REFERENCES users,
  time   INTEGER NOT NULL
) STRICT;

-- What administrators did. Nothing is ever changed or removed here.
CREATE TABLE audit (
  id      INTEGER PRIMARY KEY AUTOINCREMENT,
  time    INTEGER NOT NULL,
  admin   INTEGER REFERENCES users, -- NULL: from the command line
  action  TEXT NOT NULL,
  subject TEXT NOT NULL,         -- whom or what it concerns
  detail  TEXT NOT NULL
) STRICT;
CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'append-only'); END;

-- Everything that happens in rooms, in one order. A client's knowledge is one
-- number, the greatest id that it has seen.
CREATE TABLE log (
  id     INTEGER PRIMARY KEY AUTOINCREMENT, -- the order, and the cursor: never given twice
  kind   TEXT NOT NULL -- an IN over all five would be a third of the cost of a message
           CHECK (kind = 'message' OR kind IN ('edit', 'delete', 'react', 'unreact')),
  room   INTEGER NOT NULL REFERENCES rooms,
  author INTEGER NOT NULL REFERENCES users,
  cid    TEXT CHECK (octet_length(cid) BETWEEN 1 AND 64), -- the client's own id, so that a retry is known
  time   INTEGER NOT NULL,
  target INTEGER,                -- the message edited, deleted, reacted to; or, in a message, replied to
  body   TEXT CHECK (octet_length(body) BETWEEN 1 AND 8192), -- text or emoji; NULL once deleted
  former TEXT,                   -- edit: the text before
  edited INTEGER,                -- message: when body was last changed
  pushed INTEGER NOT NULL DEFAULT 0 -- message: 1 if a program said it, by a token or a timed push
) STRICT;
-- Clients' ids grow with time, so cid first keeps inserts at the index's end.
CREATE UNIQUE INDEX log_retry ON log (cid, author) WHERE cid IS NOT NULL;
-- Within a room the index is in id order, as every SQLite index ends in the rowid.
CREATE INDEX log_by_room ON log (room);
-- What a deletion has to blank, and a removal to remove, besides the message.
CREATE INDEX log_about ON log (target) WHERE kind != 'message';
-- What may mention somebody.
CREATE INDEX log_mentions ON log (room) WHERE kind = 'message' AND instr(body, '@');

-- What can be found: the words of each message, pairs of Chinese characters, and tags
-- (see index.go), under its id in the log. The words are cut and folded there, and the text is not kept here.
CREATE VIRTUAL TABLE search USING fts5 (text, pairs, tags, content='', contentless_delete=1, tokenize='ascii');
INSERT INTO search (search, rank) VALUES ('automerge', 0); -- index.go merges its parts, a little at a time
CREATE TABLE indexed (
  id    INTEGER NOT NULL,        -- the one row: search has the log up to here
  stale INTEGER NOT NULL         -- messages that were taken out of it, and of which its pages still have words
) STRICT;
INSERT INTO indexed VALUES (0, 0);

-- Who reacts how to which message now; the log says when it came about.
CREATE TABLE reactions (
  message INTEGER NOT NULL REFERENCES log,
  emoji   TEXT NOT NULL CHECK (octet_length(emoji) BETWEEN 1 AND 64),
  author  INTEGER NOT NULL REFERENCES users,
  PRIMARY KEY (message, emoji, author)
) STRICT, WITHOUT ROWID;

-- How far each user has read each room.
CREATE TABLE reads (
  user         INTEGER NOT NULL REFERENCES users,
  room         INTEGER NOT NULL REFERENCES rooms,
  last_read_id INTEGER NOT NULL,
  PRIMARY KEY (user, room)
) STRICT, WITHOUT ROWID;

-- Of what a user wants to be told in a room; without a row, as users.notify says.
CREATE TABLE levels (
  user   INTEGER NOT NULL REFERENCES users,
  room   INTEGER NOT NULL REFERENCES rooms,
  notify TEXT NOT NULL CHECK (notify IN ('all', 'mentions', 'none')),
  PRIMARY KEY (user, room)
) STRICT, WITHOUT ROWID;

-- What lets scripts in.
CREATE TABLE tokens (
  id      INTEGER PRIMARY KEY,
  hash    BLOB NOT NULL UNIQUE,  -- SHA-256 of the token
  user    INTEGER NOT NULL REFERENCES users, -- who speaks by it: a person or a bot
  room    INTEGER REFERENCES rooms, -- the only one that it is for; NULL: all that the user sees
  scope   TEXT NOT NULL CHECK (scope IN ('read', 'post', 'both')),
  label   TEXT NOT NULL CHECK (octet_length(label) <= 256),
  creator INTEGER REFERENCES users, -- NULL: from the command line
  created INTEGER NOT NULL,
  expires INTEGER,               -- NULL: never
  used    INTEGER,               -- last, to within a minute
  revoked INTEGER                -- when
) STRICT;
CREATE INDEX tokens_by_user ON tokens (user);

-- Texts that are said again and again.
CREATE TABLE pushes (
  id      INTEGER PRIMARY KEY AUTOINCREMENT, -- is in the cids of what it said, so never given twice
  room    INTEGER NOT NULL REFERENCES rooms,
  user    INTEGER NOT NULL REFERENCES users, -- who started it, and in whose name it speaks
  text    TEXT NOT NULL CHECK (octet_length(text) BETWEEN 1 AND 8192), -- with {time} and {room} still in it
  every   INTEGER NOT NULL,      -- milliseconds
  times   INTEGER NOT NULL,      -- in all
  done    INTEGER NOT NULL DEFAULT 0,
  started INTEGER NOT NULL,
  due     INTEGER NOT NULL,      -- when it speaks next
  ended   INTEGER                -- when: it was done, or stopped
) STRICT;
CREATE INDEX pushes_by_room ON pushes (room);
CREATE INDEX pushes_due ON pushes (due) WHERE ended IS NULL;

-- Addresses that are told what is said in a room. Each is a client with a cursor.
CREATE TABLE hooks (
  id       INTEGER PRIMARY KEY AUTOINCREMENT, -- is in the cids of its answers, so never given twice
  room     INTEGER NOT NULL REFERENCES rooms,
  bot      INTEGER NOT NULL REFERENCES users, -- posts the answers
  url      TEXT NOT NULL,
  secret   BLOB NOT NULL,        -- key of the signature; who signs has to have it
  mention  INTEGER NOT NULL,     -- 1: is told only what names the bot
  creator  INTEGER REFERENCES users,
  created  INTEGER NOT NULL,
  cursor   INTEGER NOT NULL,     -- of the log: up to here all is delivered or given up
  failures INTEGER NOT NULL DEFAULT 0, -- since the last success
  due      INTEGER NOT NULL DEFAULT 0, -- no try before
  removed  INTEGER               -- when
) STRICT;

-- What came of the newest tries to tell them.
CREATE TABLE deliveries (
  id      INTEGER PRIMARY KEY,
  hook    INTEGER NOT NULL REFERENCES hooks,
  event   INTEGER NOT NULL REFERENCES log,
  time    INTEGER NOT NULL,
  took    INTEGER NOT NULL,      -- milliseconds
  status  INTEGER NOT NULL,      -- of HTTP; 0: there was no answer
  error   TEXT NOT NULL,         -- '': delivered
  reply   INTEGER REFERENCES log -- the message that the answer became
) STRICT;
CREATE INDEX deliveries_by_hook ON deliveries (hook);
-- What refers to a message that is removed.
CREATE INDEX deliveries_by_event ON deliveries (event);
CREATE INDEX deliveries_by_reply ON deliveries (reply);
