package main

import (
	"encoding/json"
	"fmt"
	"html"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// history returns a page of messages as JSON has it.
func (s *testServer) history(path, cookie string) (page history, ids []int64) {
	s.t.Helper()
	_, _, text := s.browse("GET", path, cookie, "", "Accept: application/json")
	if err := json.Unmarshal([]byte(text), &page); err != nil {
		s.t.Fatalf("%v in %s", err, text)
	}
	for _, m := range page.Messages {
		ids = append(ids, m.ID)
	}
	return page, ids
}

// clientData returns what a page's script begins with, and the page.
func (s *testServer) clientData(path, cookie string) (data clientData, text string) {
	s.t.Helper()
	_, _, text = s.browse("GET", path, cookie, "")
	m := regexp.MustCompile(`data-client="([^"]*)"`).FindStringSubmatch(text)
	if m == nil {
		s.t.Fatalf("no data in\n%s", text)
	}
	if err := json.Unmarshal([]byte(html.UnescapeString(m[1])), &data); err != nil {
		s.t.Fatal(err)
	}
	return data, text
}

// Whoever pages through a room, either way, gets each message once.
func TestPagingBothWays(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		ann, room, other := s.session("ann"), s.room("lobby"), s.room("other")
		var all []int64
		for i := range 2*historyPage + 10 {
			all = append(all, s.say(room, "ann", fmt.Sprint("no. ", i)).ID)
			s.say(other, "ann", "elsewhere")
		}
		s.say(room, "ann", strings.Repeat("x", maxMessage))
		all = append(all, all[len(all)-1]+2)
		var seen []int64
		for next := int64(0); next > 0 || seen == nil; {
			page, ids := s.history(fmt.Sprint("/chat/lobby/?after=", next), ann)
			if (page.Older == 0) != (seen == nil) || page.Older != 0 && page.Older != ids[0] {
				t.Errorf("after %d: older %d", next, page.Older)
			}
			seen, next = append(seen, ids...), page.Newer
		}
		if !slices.Equal(seen, all) {
			t.Errorf("forward: %v, want %v", seen, all)
		}
		page, seen := s.history("/chat/lobby/", ann)
		if page.Newer != 0 {
			t.Errorf("the newest page has newer %d", page.Newer)
		}
		for page.Older != 0 {
			var ids []int64
			if page, ids = s.history(fmt.Sprint("/chat/lobby/?before=", page.Older), ann); page.Newer != ids[len(ids)-1] {
				t.Errorf("newer %d", page.Newer)
			}
			seen = append(ids, seen...)
		}
		if !slices.Equal(seen, all) {
			t.Errorf("backward: %v, want %v", seen, all)
		}
		last := all[len(all)-1]
		if page, ids := s.history(fmt.Sprint("/chat/lobby/?after=", last), ann); ids != nil || page.Newer != 0 || page.Older != last+1 {
			t.Errorf("after the last: %+v", page)
		}
		if data, text := s.clientData("/chat/lobby/?after=0", ann); data.Newer != all[historyPage-1] ||
			!strings.Contains(text, fmt.Sprintf(`<li class="newer-page"><a href="?after=%d">`, data.Newer)) {
			t.Errorf("the oldest page: %+v\n%s", data, text)
		}
		if data, text := s.clientData("/chat/lobby/", ann); data.Newer != 0 || strings.Contains(text, "newer-page") {
			t.Errorf("the newest page: %+v\n%s", data, text)
		}
		if status, _, _ := s.browse("GET", "/chat/lobby/?after=-1", ann, ""); status != 400 {
			t.Errorf("after=-1: %d", status)
		}
	})
}

// The script begins with what the visitor has not read, and with whom they may write to.
func TestClientData(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		room := s.room("lobby")
		s.say(room, "bob", "@all: hello")
		cat := s.session("cat")
		read := s.say(room, "eve", "hi").ID
		for _, name := range []string{"ann", "dan", "gone", "Zoë", "visitor", "former"} {
			s.session(name)
		}
		s.exec("UPDATE users SET role = 'guest' WHERE name IN ('visitor', 'former')")
		s.exec("UPDATE users SET expires = ? WHERE name = 'former'", time.Now().UnixMilli())
		s.exec("UPDATE users SET deactivated = 1 WHERE name IN ('gone', 'eve')")
		s.say(room, "visitor", "me too")
		s.say(room, "former", "me too")
		s.browse("POST", "/chat/lobby/", cat, `{"type":"read","room":"lobby","id":`+fmt.Sprint(read)+`}`, "Content-Type: application/json")
		s.browse("POST", "/chat/lobby/about/", cat, "action=notify&notify=all")
		data, text := s.clientData("/chat/lobby/", cat)
		if want := []string{"ann", "bob", "dan", "Zoë"}; !slices.Equal(data.People, want) || data.LastRead != read || data.Unread != 2 || data.Archived {
			t.Errorf("a member has %+v, want %v", data, want)
		}
		if !strings.Contains(text, `data-unread="2" data-mentions="0" data-notify="all"`) {
			t.Errorf("the list has other numbers in\n%s", text)
		}
		s.exec("WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 600) INSERT INTO users (name, key, role, joined, first_id) SELECT 'x'||i, 'x'||i, 'member', 0, 0 FROM n")
		if data, _ := s.clientData("/chat/lobby/", cat); len(data.People) != peopleMost {
			t.Errorf("%d names", len(data.People))
		}
		if data, _ := s.clientData("/chat/lobby/", s.session("visitor")); !slices.Equal(data.People, []string{"bob"}) {
			t.Errorf("a guest may write to %v", data.People)
		}
	})
}

// What the script shows of a message is in the page without it too.
func TestMessageRows(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		ann, room := s.session("ann"), s.room("lobby")
		first := s.say(room, "bob", "one <b>").ID
		event := func(e Event) {
			if _, err := s.store.AppendWait(e); err != nil {
				t.Fatal(err)
			}
		}
		event(Event{Kind: KindMessage, Room: room, Author: s.user("bob"), Target: first, Body: "a reply"})
		for _, who := range []string{"ann", "bob"} {
			event(Event{Kind: KindReact, Author: s.user(who), Target: first, Body: "👍"})
		}
		event(Event{Kind: KindReact, Author: s.user("bob"), Target: first, Body: "<"})
		event(Event{Kind: KindEdit, Author: s.user("bob"), Target: first, Body: "two <b>"})
		_, text := s.clientData("/chat/lobby/", ann)
		for _, want := range []string{
			`<a class="at" href="?at=1#m1"><time `,
			`<a class="quote" href="?at=1#m1" data-target="1"><b dir="auto">bob</b> <span dir="auto">two &lt;b&gt;</span></a>`,
			`<ul class="reactions"><li><button type="button" class="reaction" data-emoji="&lt;" aria-pressed="false" title="bob">&lt; <b>1</b></button></li>` +
				`<li><button type="button" class="reaction" data-emoji="👍" aria-pressed="true" title="ann, bob">👍 <b>2</b></button></li></ul>`,
			`<span class="mark"><a href="/chat/lobby/edits/1">edited</a></span>`,
		} {
			if strings.Count(text, want) != 1 {
				t.Errorf("%s is not there once in\n%s", want, text)
			}
		}
		if _, _, text := s.browse("GET", "/chat/lobby/edits/1", ann, ""); !strings.Contains(text, "one &lt;b&gt;") || !strings.Contains(text, `href="/chat/lobby/?at=1#m1"`) {
			t.Errorf("the edits are\n%s", text)
		}
	})
}
