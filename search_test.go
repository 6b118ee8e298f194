package main

import (
	"encoding/json"
	"fmt"
	"html"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"
)

// corpus is what the queries of TestSearch look through: author, room, day, text.
var corpus = [][4]string{
	1:  {"ann", "lobby", "2026-04-30", "今天部署服务器，数据库已经上线了。"},
	2:  {"bob", "lobby", "2026-05-01", "The deploy of the database server is done"},
	3:  {"李 雷", "大厅", "2026-05-01", "這個資料庫在臺灣，傳統的漢字"},
	4:  {"ann", "大厅", "2026-05-02", "データベースをサーバーに置いた。ひらがな"},
	5:  {"bob", "大厅", "2026-05-02", "데이터베이스 서버를 배포했습니다"},
	6:  {"ann", "lobby", "2026-05-03", "mail ann.lee+chat@example.org about issue #1234, please"},
	7:  {"bob", "lobby", "2026-05-03", "see https://example.org/issues/1234?page=2#top and v1.22.3"},
	8:  {"李 雷", "lobby", "2026-05-04", "Ｆｕｌｌ　ｗｉｄｔｈ　ＡＢＣ１２３！"},
	9:  {"ann", "lobby", "2026-05-04", "Use AND, OR, NOT or NEAR(a b, 2) in FTS5: text:x* ^y -z"},
	10: {"bob", "lobby", "2026-05-05", "nice 👍🏽 thanks ❤️🎉"},
	11: {"ann", "lobby", "2026-05-05", "Café crème, naïve Ångström, ΟΔΥΣΣΕΥΣ and nǐ hǎo"},
	12: {"bob", "lobby", "2026-06-01", "用 Go 写的 chatd，用SQLite存数据"},
	13: {"ann", "lobby", "2026-06-02", "server server, the server's database_server-deploy"},
	14: {"bob", "大厅", "2026-06-02", "我们的服务很好，器材不多"},
	15: {"ann", "ann+bob", "2026-06-03", "秘密 plan for the server"},
	16: {"bob", "lobby", "2026-06-04", "привет, Мир! naive e\u0301tude don't stop"},
}

// queries are what is typed, and the numbers of the messages that ann has to find, newest first.
var queries = []struct{ query, want string }{
	// Chinese, by the character
	{"服", "14 1"}, {"服务", "14 1"}, {"服务器", "1"}, {"务器", "1"}, {"数据库", "1"}, {"数据", "12 1"}, {"今天上线", ""}, {"今天 上线", "1"},
	{"线了。", "1"}, {"，数", "12 1"}, {"服务 器", "14 1"}, {`"服务 器"`, "1"}, {"的", "14 12 3"}, {"龘", ""},
	// traditional, kana, Korean
	{"資料庫", "3"}, {"傳統", "3"}, {"臺", "3"}, {"データ", "4"}, {"ース", "4"}, {"ひらがな", "4"}, {"サーバー", "4"}, {"ー", "4"}, {"데이터", "5"}, {"버를", "5"}, {"배포", "5"},
	// English, without case, and the beginning of the last word
	{"deploy", "13 2"}, {"DEPLOY", "13 2"}, {"depl", "13 2"}, {"de", ""}, {"depl server", ""}, {"server depl", "13 2"}, {"serv the", ""},
	{`"database server"`, "13 2"}, {`"server database"`, ""}, {`"the server"`, "15 13"}, {`"database serv"`, ""}, {"server's", "13"}, {"don't", "16"}, {"done", "2"},
	// mixed
	{"写的 chatd", "12"}, {"用SQLite存", "12"}, {"sqlite", "12"}, {"go 数据", "12"}, {"go数据", ""},
	// digits, addresses
	{"1234", "7 6"}, {"123", "7 6"}, {"#1234", "7 6"}, {"v1.22.3", "7"}, {"22.3", "7"}, {"22.1", ""}, {"ann.lee+chat@example.org", "6"}, {"@example.org", "7 6"},
	{"https://example.org/issues/1234", "7"}, {"example.org/issues", "7"}, {"page=2#top", "7"},
	// full-width forms, in the text or the query
	{"full width", "8"}, {"ＦＵＬＬ", "8"}, {"abc123", "8"}, {"ｓｅｒｖｅｒ　ｄｅｐｌｏｙ", "13 2"},
	// punctuation alone is nothing; emoji are found
	{"!?", ""}, {"👍", "10"}, {"👍🏽", "10"}, {"❤", "10"}, {"🎉 nice", "10"}, {"🙈", ""},
	// accents and other alphabets
	{"cafe creme", "11"}, {"CAFÉ", "11"}, {"angstrom", "11"}, {"naive", "16 11"}, {"naïve", "16 11"}, {"ni hao", "11"}, {"οδυσσευς", "11"}, {"ПРИВЕТ мир", "16"}, {"etude", "16"},
	// what means something to FTS5 means nothing here
	{"AND", "11 9 7"}, {"OR NOT", "9"}, {"NEAR(a b, 2)", "9"}, {"text:x*", "9"}, {"^y", "9"}, {"-z", "9"}, {`tags:public`, ""}, {`"`, ""}, {`"""`, ""}, {"x* OR", "9"}, {"(", ""}, {"{text} : server", ""},
	// operators
	{"from:bob server", "2"}, {"from:BOB from:@ann server", "15 13"}, {`from:"李 雷"`, "8 3"}, {"from：“李 雷”", "8 3"}, {"from:nobody", ""}, {"server in:大厅", ""}, {"in:#大厅", "14 5 4 3"},
	{"in:ann+bob", "15"}, {"in:@bob", "15"}, {"in:nowhere server", ""}, {"has:link", "7"}, {"HAS:Link v1", "7"}, {"has:nothing", ""},
	{"after:2026-05-01 before:2026-05-02", "3 2"}, {"after:2026-5 before:2026-06 server", "2"}, {"before:2026-05", "1"}, {"before:2026-05-02 database", "2"}, {"after:2026-06-02 server", "15 13"}, {"after:2026-05-02 before:2026-05-04", "7 6 5 4"},
	{"after:2026-06 in:大厅 from:bob", "14"}, {"after:2026-06 after:2026-05-05 before:2026-05-06", "11 10"}, {"before:someday", ""}, {"after:2026-13-40", ""}, {"from:", ""}, {`in:""`, "9"}, {"from: ann", ""},
}

// withSaid makes the messages of corpus. Nothing is indexed before time passes.
func (s *testServer) withSaid() *testServer {
	s.t.Helper()
	for i, m := range corpus[1:] {
		room, err := s.store.DirectRoom(s.user("ann"), s.user("bob"))
		if m[1] != room.Name {
			room, err = s.store.CreateRoom(m[1], s.user("ann"))
		}
		if err != nil {
			s.t.Fatal(err)
		}
		e, err := s.store.AppendWait(Event{Kind: KindMessage, Room: room, Author: s.user(m[0]), Body: m[3]})
		if err != nil || e.ID != int64(i+1) {
			s.t.Fatalf("%v: %d, %v", m, e.ID, err)
		}
		day, _ := time.ParseInLocation(time.DateOnly, m[2], time.Local)
		if err := s.store.update(func(w *writer) error {
			return w.exec("UPDATE log SET time = ? WHERE id = ?", day.Add(9*time.Hour).UnixMilli(), e.ID)
		}); err != nil {
			s.t.Fatal(err)
		}
	}
	return s
}

// finds is what somebody finds.
func (s *testServer) finds(who, query string) string {
	s.t.Helper()
	events, _, err := s.store.Find(s.t.Context(), s.user(who), parseWanted(query), 1<<62)
	if err != nil {
		s.t.Errorf("%q: %v", query, err)
	}
	var ids []string
	for _, e := range events {
		ids = append(ids, fmt.Sprint(e.ID))
	}
	return strings.Join(ids, " ")
}

// index lets time pass until all is indexed.
func (s *testServer) index() {
	s.t.Helper()
	time.Sleep(2 * indexDelay)
	synctest.Wait()
	var left int
	if err := s.store.queryRow(s.t.Context(), "SELECT max(log.id) - indexed.id FROM log, indexed").Scan(&left); err != nil || left != 0 {
		s.t.Fatalf("%d rows are not indexed, %v", left, err)
	}
}

// searchTest runs f in a bubble in which it is 2026.
func searchTest(t *testing.T, f func(t *testing.T, s *testServer)) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Until(time.Date(2026, 7, 1, 0, 0, 0, 0, time.Local)))
		s := newTestServer(t, dir, false)
		defer func() { s.close() }()
		f(t, s)
	})
}

func TestSearch(t *testing.T) {
	searchTest(t, func(t *testing.T, s *testServer) {
		s.withSaid()
		for _, f := range queries {
			if got := s.finds("ann", f.query); got != f.want {
				t.Errorf("%q finds %q, not %q", f.query, got, f.want)
			}
		}
	})
}

// Edits and deletions are exact at once, and what is indexed is again after a restart.
func TestSearchChanges(t *testing.T) {
	searchTest(t, func(t *testing.T, s *testServer) {
		s.withSaid()
		expect := func(what, query, want string) {
			t.Helper()
			if got := s.finds("ann", query); got != want {
				t.Errorf("%s: %q finds %q, not %q", what, query, got, want)
			}
		}
		change := func(kind Kind, author string, id int64, text string) {
			t.Helper()
			if _, err := s.store.AppendWait(Event{Kind: kind, Author: s.user(author), Target: id, Body: text}); err != nil {
				t.Fatal(err)
			}
		}
		change(KindEdit, "ann", 1, "another 句子")
		change(KindDelete, "bob", 2, "")
		expect("edited in the tail", "部署", "")
		expect("edited in the tail", "句子", "1")
		expect("deleted in the tail", "done", "")
		s.index()
		expect("indexed since", "部署", "")
		expect("indexed since", "another 句子", "1")
		expect("indexed since", "done", "")
		change(KindEdit, "ann", 1, "the third 版本 https://example.org/")
		change(KindDelete, "bob", 7, "")
		expect("edited", "句子", "")
		expect("edited", "third 版本 from:ann in:lobby", "1")
		expect("edited", "has:link", "1")
		expect("deleted", "page=2", "")
		if _, err := s.store.AppendWait(s.message("ann", "late 消息")); err != nil {
			t.Fatal(err)
		}
		dir := s.store.dir
		s.close()
		*s = *newTestServer(t, dir, false)
		expect("restarted", "消息", "21")
		s.index()
		expect("restarted", "消息", "21")
		expect("restarted", "third", "1")
	})
}

func (s *testServer) message(author, text string) Event {
	return Event{Kind: KindMessage, Room: s.room("lobby"), Author: s.user(author), Body: text}
}

// Who is not in a private room finds nothing of it, whoever else is, in whatever way.
func TestSearchLeaks(t *testing.T) {
	searchTest(t, func(t *testing.T, s *testServer) {
		s.withCast()
		bob, err := s.store.CreatePrivateRoom("bobs", s.user("outsider"), s.user("member"))
		if err == nil {
			_, err = s.store.AppendWait(Event{Kind: KindMessage, Room: bob, Author: s.user("outsider"), Body: "another plan"})
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := s.store.update(func(w *writer) error { return w.exec("UPDATE users SET confined = 1 WHERE name = 'guest'") }); err != nil {
			t.Fatal(err)
		}
		if _, err := s.store.AppendWait(Event{Kind: KindMessage, Room: s.room("lobby"), Author: s.user("outsider"), Body: "no secret"}); err != nil {
			t.Fatal(err)
		}
		check := func(who, query string, want ...int64) {
			t.Helper()
			status, _, text := s.browse("GET", "/search/?q="+url.QueryEscape(query), s.cookie(who), "", "Accept: application/json")
			var answer foundJSON
			if err := json.Unmarshal([]byte(text), &answer); status != 200 || err != nil {
				t.Fatalf("%s, %s: %d %s", who, query, status, text)
			}
			var got []int64
			for _, m := range answer.Messages {
				got = append(got, m.ID)
			}
			if !slices.Equal(got, want) || answer.Older != 0 {
				t.Errorf("%s finds %v with %s, not %v", who, got, query, want)
			}
			_, _, page := s.browse("GET", "/search/?q="+url.QueryEscape(query), s.cookie(who), "")
			if n := strings.Count(page, "<mark>"); n != len(want) && who != "token" && who != "elsewhere" {
				t.Errorf("%s is shown %d hits of %s, not %d", who, n, query, len(want))
			}
		}
		for range 2 { // in the tail, in the index
			for _, query := range []string{"plan", "plan in:secret", "plan from:member", "plan after:2026-07-01", "the"} {
				check("admin", query)
				check("guest", query)
			}
			check("outsider", "plan", 2)
			check("outsider", "plan in:secret")
			check("outsider", "plan from:member")
			check("member", "plan", 2, 1)
			check("member", "plan in:secret", 1)
			check("token", "plan", 2, 1)
			check("elsewhere", "plan")
			check("elsewhere", "secret", 3)
			check("guest", "secret")
			check("admin", "secret", 3)
			s.index()
		}
		if err := s.store.ChangeMember(KindLeave, bob, s.user("member")); err != nil {
			t.Fatal(err)
		}
		check("member", "plan", 1)
	})
}

// The page marks what was found, escapes the rest, and leads to older hits and to each
// one's place in its room.
func TestSearchPage(t *testing.T) {
	searchTest(t, func(t *testing.T, s *testServer) {
		ann := s.session("ann")
		for i := range historyPage + 20 {
			text := fmt.Sprintf("<b>%d</b> %s Über 数据库 & more", i, strings.Repeat("filler ", i*8))
			if _, err := s.store.AppendWait(s.message("ann", text)); err != nil {
				t.Fatal(err)
			}
			if i == 40 {
				s.index()
			}
		}
		get := func(path string, want ...string) string {
			t.Helper()
			_, location, text := s.browse("GET", path, ann, "")
			for _, w := range want {
				if text += location; !strings.Contains(text, w) {
					t.Errorf("%s has no %q:\n%s", path, w, text)
				}
			}
			return text
		}
		get("/search/", "has:link", `<input id="q"`)
		get("/search/?q=zzz", "Nothing found", "has:link")
		get("/search/?q=%22%3E%3Cscript%3E", `value="&#34;&gt;&lt;script&gt;"`)
		page := get("/search/?q=uber+%E6%95%B0%E6%8D%AE", `<mark>Über</mark> <mark>数据</mark>库 &amp; more`, `<a href="/chat/lobby/?at=70#m70">`, "… ")
		older := regexp.MustCompile(`href="(\?before=[^"]*)"`).FindStringSubmatch(page)
		if n := strings.Count(page, "<li>"); n != historyPage || older == nil {
			t.Fatalf("%d hits, then %v", n, older)
		}
		page = get("/search/"+html.UnescapeString(older[1]), "&lt;b&gt;0&lt;/b&gt;  <mark>Über")
		if n := strings.Count(page, "<li>"); n != 20 || strings.Contains(page, `class="older"`) {
			t.Errorf("the last page has %d", n)
		}
		_, _, text := s.browse("GET", "/search/?q=0&before=70", ann, "", "Accept: application/json")
		for _, want := range []string{`{"messages":[{"type":"message","id":1,"room":"lobby","username":"ann","message":"<b>0`, `"url":"http://chat.test/chat/lobby/?at=1#m1"`, `"older":0`} {
			if !strings.Contains(text, want) {
				t.Errorf("no %s in %s", want, text)
			}
		}
		for range searchBurst {
			get("/search/?q=x")
		}
		if status, _, _ := s.browse("GET", "/search/?q=x", ann, "", "Accept: application/json"); status != 429 {
			t.Errorf("too many: %d", status)
		}
	})
}

func TestJump(t *testing.T) {
	searchTest(t, func(t *testing.T, s *testServer) {
		s.withSaid()
		ann := s.session("ann")
		zone := time.Date(2026, 5, 3, 9, 0, 0, 0, time.Local)
		for _, test := range []struct{ at, want string }{
			{"2026-05-03", "?at=6#m6"}, {"2026-05-03T09:00", "?at=6#m6"}, {"2026-05-03T09:00:01", "?at=8#m8"}, {"2026-05-06", "?at=12#m12"},
			{"2000-01-01", "?at=1#m1"}, {"2026-07-02", ""}, {zone.UTC().Format(time.RFC3339), "?at=6#m6"},
			{zone.In(time.FixedZone("", 8*3600)).Format(time.RFC3339), "?at=6#m6"}, {zone.Add(time.Second).UTC().Format(time.RFC3339), "?at=8#m8"},
		} {
			if status, location, _ := s.browse("GET", "/chat/lobby/?at="+test.at, ann, ""); status != 303 || location != "/chat/lobby/"+test.want {
				t.Errorf("%s leads to %d %s, not %s", test.at, status, location, test.want)
			}
		}
		for at, want := range map[string]int{"": 200, "7": 200, "99999": 200, "2026-05-32": 400, "x": 400} {
			if status, _, _ := s.browse("GET", "/chat/lobby/?at="+at, ann, ""); status != want {
				t.Errorf("%q: %d", at, status)
			}
		}
	})
}

// A killed chatd, and one with a database from before there was an index, finds all.
func TestSearchAfterKill(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	old, err := os.ReadFile("testdata/v1.db")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "chatd.db"), old, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	newPeople(t, dir, []string{"lobby"}, "carol")
	d := startDaemon(t, dir, "-rate", "0")
	ask := func(method, path, body string) string {
		t.Helper()
		r, err := http.NewRequest(method, d.url(path), strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header = http.Header{"Cookie": {cookieOf("carol")}, "Accept": {"application/json"}, "Content-Type": {"application/json"}}
		res, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		text, _ := io.ReadAll(res.Body)
		return string(text)
	}
	const messages = 40
	for i := range messages {
		ask("POST", "/chat/lobby/", fmt.Sprintf(`{"message":"消息 number%d"}`, i))
	}
	d.kill()
	d.start()
	for i := range messages {
		if text := ask("GET", fmt.Sprintf("/search/?q=number%d+%%E6%%81%%AF", i), ""); strings.Count(text, `"id"`) == 0 {
			if strings.Contains(text, "too_fast") {
				break
			}
			t.Errorf("number%d: %s", i, text)
		}
	}
	if text := ask("GET", "/search/?q=hello", ""); !strings.Contains(text, `"username":"ann"`) && !strings.Contains(text, "too_fast") {
		t.Errorf("of before: %s", text)
	}
}

// Anything can be typed, and finds in the index what comparing words finds.
func FuzzQuery(f *testing.F) {
	for _, q := range queries {
		f.Add(q.query, "said "+q.query)
	}
	for _, m := range corpus[1:] {
		f.Add(m[3][len(m[3])/2:], m[3])
	}
	s := openTestStore(f, f.TempDir())
	f.Fuzz(func(t *testing.T, text, body string) {
		s.t = t
		q := parseWanted(text)
		if !utf8.ValidString(body) || checkMessage(body) != nil {
			body = "nothing"
		}
		s.must(s.message(s.ann, "", body))
		id, err := s.LastID(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		found, _, err := s.Find(t.Context(), s.ann, q, 1<<62)
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		want := len(q.phrases) > 0
		for i := range q.phrases {
			one := wanted{phrases: q.phrases[i : i+1], prefix: q.prefix && i == len(q.phrases)-1}
			want = want && len(one.marks(body)) > 0
		}
		plain := q.from == "" && q.in == "" && !q.link && q.since.IsZero() && q.until.IsZero()
		if got := len(found) > 0; plain && got != want || got && !want && len(q.phrases) > 0 {
			t.Errorf("%q finds %q: %v", text, body, got)
		}
		for _, e := range found {
			q.snippet(e.Body)
		}
		s.must(Event{Kind: KindDelete, Author: s.ann, Target: id})
	})
}
