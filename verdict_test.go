package main

import (
	"bytes"
	"cmp"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// readLog opens a database, which must be sound, and returns all of its log.
func readLog(t *testing.T, dir string) (log []Event) {
	t.Helper()
	store, err := OpenStore(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	var check string
	if err := store.read.QueryRow("PRAGMA integrity_check").Scan(&check); err != nil || check != "ok" {
		t.Errorf("integrity: %s, %v", check, err)
	}
	for more, cursor := true, int64(0); more; {
		var page []Event
		if page, more, err = store.Since(t.Context(), User{}, 0, cursor, 1000); err != nil {
			t.Fatal(err)
		}
		if len(page) > 0 {
			log, cursor = append(log, page...), page[len(page)-1].ID
		}
	}
	return log
}

// compare looks at what is on disk, and at what each client saw.
func (c *chaos) compare() {
	log := readLog(c.t, c.d.dir)
	ops := make(map[string]*chaosOp) // by cid, which has the author in it
	for _, p := range c.people {
		maps.Copy(ops, p.byCID)
	}
	stored := make([]eventFrame, len(log))
	byCID := make(map[string]int64)
	for i, e := range log {
		stored[i] = normal(newEventFrame(e))
		op := ops[e.CID]
		switch {
		case op == nil || op.author != e.Author.Name:
			c.t.Errorf("%+v is on disk, and nobody sent it", stored[i])
			continue
		case byCID[e.CID] != 0:
			c.t.Errorf("%s is on disk as %d and as %d", e.CID, byCID[e.CID], e.ID)
		case op.refused != "":
			c.t.Errorf("%s is on disk as %d and was refused: %s", e.CID, e.ID, op.refused)
		}
		byCID[e.CID] = e.ID
	}
	for _, op := range ops {
		if op.acknowledged && byCID[op.frame.CID] != op.id {
			c.t.Errorf("%s was acknowledged as %d and is on disk as %d", op.frame.CID, op.id, byCID[op.frame.CID])
		}
	}
	want := outcome(stored)
	c.compareTexts(log, ops, want)
	texts := textsOf(log, ops)
	for _, p := range c.people {
		p.compareView(stored, texts, want)
		last := int64(0)
		for _, op := range p.ops {
			if op.plain && op.frame.Type == "message" && op.id != 0 {
				if op.id < last {
					c.t.Errorf("%s overtook what was sent before it", op.frame.CID)
				}
				last = op.id
			}
		}
	}
}

// textsOf returns which texts a message ever had, by id.
func textsOf(log []Event, ops map[string]*chaosOp) map[int64][]string {
	texts := make(map[int64][]string)
	for _, e := range log {
		switch e.Kind {
		case KindMessage:
			texts[e.ID] = append(texts[e.ID], digest(ops[e.CID].frame.Message))
		case KindEdit:
			texts[e.Target] = append(texts[e.Target], digest(ops[e.CID].frame.Message))
			texts[e.ID] = append(texts[e.ID], digest(ops[e.CID].frame.Message))
		}
	}
	return texts
}

// An endState is a message as it is in the end.
type endState struct {
	text            string
	edited, deleted bool
	reactions       string
}

// outcome is what a client makes of the log.
func outcome(frames []eventFrame) map[int64]endState {
	end := make(map[int64]endState)
	reactions := make(map[int64]map[string]bool)
	for _, f := range frames {
		s := end[f.Target]
		switch f.Type {
		case "message":
			end[f.ID] = endState{text: f.Message, edited: f.Edited, deleted: f.Deleted}
		case "edit":
			if !f.Deleted && !s.deleted {
				s.text, s.edited = f.Message, true
				end[f.Target] = s
			}
		case "delete":
			end[f.Target] = endState{deleted: true}
		case "react":
			if reactions[f.Target] == nil {
				reactions[f.Target] = make(map[string]bool)
			}
			emoji, off := strings.CutPrefix(f.Emoji, "no ")
			reactions[f.Target][f.Username+emoji] = !off
		}
	}
	for id, s := range end {
		if s.deleted {
			end[id] = endState{deleted: true}
			continue
		}
		var on []string
		for who, is := range reactions[id] {
			if is {
				on = append(on, who)
			}
		}
		slices.Sort(on)
		s.reactions = strings.Join(on, " ")
		end[id] = s
	}
	return end
}

// compareTexts looks whether the tables have what the log says.
func (c *chaos) compareTexts(log []Event, ops map[string]*chaosOp, want map[int64]endState) {
	store, err := OpenStore(c.d.dir, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	defer store.Close()
	for page := range slices.Chunk(log, 500) {
		reactions, err := store.Reactions(c.t.Context(), page)
		if err != nil {
			c.t.Fatal(err)
		}
		for _, e := range page {
			if e.Kind != KindMessage {
				continue
			}
			var on []string
			for emoji, names := range reactions[e.ID] {
				for _, name := range names {
					on = append(on, name+emoji)
				}
			}
			slices.Sort(on)
			is := endState{digest(e.Body), e.Edited, e.Deleted, strings.Join(on, " ")}
			if e.Deleted {
				is.edited = false
			}
			if is != want[e.ID] {
				c.t.Errorf("message %d is %+v, the log makes it %+v", e.ID, is, want[e.ID])
			}
		}
	}
}

// compareView looks whether a client saw the whole log, once and in order, and
// nothing else.
func (c *chaosClient) compareView(stored []eventFrame, texts map[int64][]string, want map[int64]endState) {
	for i := range max(len(stored), len(c.seen)) {
		switch {
		case i >= len(c.seen), i < len(stored) && c.seen[i].ID > stored[i].ID:
			c.t.Errorf("%s never saw %+v", c.name, stored[i])
			return
		case i >= len(stored), c.seen[i].ID < stored[i].ID:
			c.t.Errorf("%s saw %+v, which is not on disk", c.name, c.seen[i])
			return
		}
		saw, is := c.seen[i], stored[i]
		if saw.Message != "" && !slices.Contains(texts[saw.ID], saw.Message) || saw.Deleted && !is.Deleted {
			c.t.Errorf("%s saw %+v, which it never was", c.name, saw)
			return
		}
		// What a message said when it was seen may have changed since.
		saw.Message, saw.Edited, saw.Deleted, saw.Quote = is.Message, is.Edited, is.Deleted, is.Quote
		if saw != is {
			c.t.Errorf("%s saw %+v, on disk is %+v", c.name, saw, is)
			return
		}
	}
	if got := outcome(c.seen); !maps.Equal(got, want) {
		c.t.Errorf("%s shows other messages than are on disk", c.name)
	}
}

// TestChaosFindsFaults proves the proof: with each of these faults put into chatd,
// TestChaos has to fail.
func TestChaosFindsFaults(t *testing.T) {
	if !*faults {
		t.Skip("it builds chatd several times: go test -run Faults -timeout 20m . -args -faults")
	}
	for _, fault := range []struct {
		name  string
		edits [][3]string // file, what is there once, what takes its place
	}{
		{"publish before commit", [][3]string{
			{"store.go", `	if err := w.exec("COMMIT")`, `	var early []Event
	for _, j := range batch {
		if j.err == nil && j.event.Kind != "" && !j.event.Again {
			early = append(early, j.event)
		}
	}
	s.publish(early)
	if err := w.exec("COMMIT")`},
			{"store.go", "			s.publish(events)\n", ""},
		}},
		{"no unique cid", [][3]string{
			{"schema.sql", "CREATE UNIQUE INDEX log_retry", "CREATE INDEX log_retry"},
			{"store.go", "		ON CONFLICT (cid, author) WHERE cid IS NOT NULL DO NOTHING`", "`"},
			{"log.go", `	if e.CID == "" {`, `	if true {`},
		}},
		{"live before replay", [][3]string{
			{"chat.go", "	cursor, err := s.replay(m, m.from, s.hub.Last())\n", "	s.hub.Join(m)\n	m.release()\n	cursor, err := s.replay(m, m.from, s.hub.Last())\n"},
			{"chat.go", "	last, err := s.hub.Join(m)\n", "	last := cursor\n"},
		}},
		{"replay of what is not published", [][3]string{
			{"chat.go", "s.replay(m, m.from, s.hub.Last())", "s.replay(m, m.from, 1<<62)"},
		}},
		{"a full outbox drops without a close", [][3]string{
			{"outbox.go", `		o.pending = nil
		o.end(closeTryLater, "too slow")
`, ""},
		}},
		{"acknowledge from memory", [][3]string{
			{"store.go", `	if err := w.exec("COMMIT")`, `	for _, j := range batch {
		j.done(j.event, j.err)
	}
	if err := w.exec("COMMIT")`},
			{"store.go", `		for _, j := range batch {
			j.done(j.event, j.err)
		}
		if`, "		if"},
		}},
	} {
		t.Run(fault.name, func(t *testing.T) {
			overlay := struct{ Replace map[string]string }{make(map[string]string)}
			for _, edit := range fault.edits {
				path, err := filepath.Abs(edit[0])
				if err != nil {
					t.Fatal(err)
				}
				changed := overlay.Replace[path]
				source, err := os.ReadFile(cmp.Or(changed, path))
				if err != nil {
					t.Fatal(err)
				}
				if n := bytes.Count(source, []byte(edit[1])); n != 1 {
					t.Fatalf("%s has %d of\n%s", edit[0], n, edit[1])
				}
				if changed == "" {
					changed = filepath.Join(t.TempDir(), edit[0])
					overlay.Replace[path] = changed
				}
				if err := os.WriteFile(changed, bytes.Replace(source, []byte(edit[1]), []byte(edit[2]), 1), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			list := filepath.Join(t.TempDir(), "overlay.json")
			if err := os.WriteFile(list, encodeJSON(overlay), 0o600); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			out, err := exec.Command("go", "test", "-overlay", list, "-count=1", "-run", "^TestChaos$", ".", "-args", "-chaos", "3m").CombinedOutput()
			if err == nil || !bytes.Contains(out, []byte("chaos_test.go")) || bytes.Contains(out, []byte("build failed")) {
				t.Fatalf("it was not found: %v\n%.4000s", err, out)
			}
			first := regexp.MustCompile(`chaos_test.go:\d+: .*`).FindAllString(string(out), 3)
			t.Logf("found after %v:\n%s", time.Since(began).Round(time.Second), strings.Join(first, "\n"))
		})
	}
}
