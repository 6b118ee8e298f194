package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// browse sends a request to a test server and returns status, Location and body.
func (s *testServer) browse(method, path, cookie, body string, headers ...string) (status int, location, text string) {
	s.t.Helper()
	r, err := http.NewRequestWithContext(s.t.Context(), method, "http://chat.test"+path, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	r.Header.Set(credential(cookie), cookie)
	r.Header.Set("Accept", "text/html")
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Set(name, value)
	}
	transport := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return s.listener.dial(), nil }}
	defer transport.CloseIdleConnections()
	res, err := transport.RoundTrip(r)
	if err != nil {
		s.t.Fatal(err)
	}
	defer res.Body.Close()
	all, err := io.ReadAll(res.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, h := range []string{"Content-Security-Policy", "X-Content-Type-Options", "Referrer-Policy"} {
		if res.Header.Get(h) == "" {
			s.t.Errorf("%s %s came without %s", method, path, h)
		}
	}
	for _, c := range res.Cookies() {
		if !c.HttpOnly || c.SameSite != http.SameSiteLaxMode {
			s.t.Errorf("%s %s set a cookie that scripts or other sites can use: %v", method, path, c)
		}
	}
	return res.StatusCode, res.Header.Get("Location"), string(all)
}

func TestPages(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		ann := s.session("ann")
		tests := []struct {
			name, method, path, cookie, body, header string
			status                                   int
			location, contains                       string
		}{
			{"login wall", "GET", "/chat/x/?before=5", "", "", "", 303, "/login/?next=%2Fchat%2Fx%2F%3Fbefore%3D5", ""},
			{"login wall for JSON", "GET", "/chat/x/", "", "", "Accept: application/json", 401, "", `"code":"sign_in"`},
			{"old cookie", "GET", "/chat/", "chatd=gone", "", "", 303, "/login/?next=%2Fchat%2F", ""},
			{"root", "GET", "/", "", "", "", 303, "/chat/", ""},
			{"no such page", "GET", "/nothing", "", "", "", 404, "", "There is nothing here"},
			{"Chinese", "GET", "/nothing", "", "", "Accept-Language: zh-CN,zh;q=0.9,en;q=0.8", 404, "", `lang="zh"`},
			{"picker", "GET", "/chat/", ann, "", "", 200, "", "What chat room would you like to enter?"},
			{"picked", "GET", "/chat/?room=+%E5%A4%A7%E5%8E%85++2", ann, "", "", 303, "/chat/%E5%A4%A7%E5%8E%85%202/", ""},
			{"picked what cannot be", "GET", "/chat/?room=a%2Fb", ann, "", "", 400, "", `value="a/b"`},
			{"room", "GET", "/chat/%E5%A4%A7%E5%8E%85%202/", ann, "", "", 200, "", "大厅 2"},
			{"room without slash", "GET", "/chat/%E5%A4%A7%E5%8E%85%202", ann, "", "", 307, "/chat/%E5%A4%A7%E5%8E%85%202/", ""},
			{"room in capitals", "POST", "/chat/Lobby/", ann, "message=one&cid=c1", "", 303, "/chat/Lobby/#m1", ""},
			{"sent twice", "POST", "/chat/lobby/", ann, "message=one&cid=c1", "", 303, "/chat/Lobby/#m1", ""},
			{"other case", "GET", "/chat/LOBBY/?before=9", ann, "", "", 303, "/chat/Lobby/?before=9", ""},
			{"impossible room", "GET", "/chat/a%3Fb/", ann, "", "", 400, "", "1–64"},
			{"room of dots", "GET", "/chat/%2E%2E/", ann, "", "", 400, "", "1–64"},
			{"long room", "GET", "/chat/" + strings.Repeat("x", 65) + "/", ann, "", "", 400, "", "1–64"},
			{"bad before", "GET", "/chat/lobby/?before=x", ann, "", "", 303, "/chat/Lobby/?before=x", ""},
			{"bad before", "GET", "/chat/Lobby/?before=x", ann, "", "", 400, "", ""},
			{"history", "GET", "/chat/Lobby/", ann, "", "Accept: application/json", 200, "", `"message":"one"`},
			{"markup in a message", "POST", "/chat/Lobby/", ann, "message=%3Cscript%3Ealert(1)%3C/script%3E", "", 303, "/chat/Lobby/#m3", ""},
			{"markup on the page", "GET", "/chat/Lobby/", ann, "", "", 200, "", "&lt;script&gt;alert(1)&lt;/script&gt;"},
			{"empty message", "POST", "/chat/Lobby/", ann, "message=+", "", 400, "", "Write something first"},
			{"long message is kept", "POST", "/chat/Lobby/", ann, "message=" + strings.Repeat("y", maxMessage+1), "", 413, "", strings.Repeat("y", maxMessage+1) + "</textarea>"},
			{"long cid", "POST", "/chat/Lobby/", ann, "message=x&cid=" + strings.Repeat("c", 65), "", 400, "", ""},
			{"huge body", "POST", "/chat/Lobby/", ann, "message=" + strings.Repeat("y", maxBody), "", 413, "", ""},
			{"not signed in", "POST", "/chat/Lobby/", "", "message=x", "", 401, "", ""},
			{"from another site", "POST", "/chat/Lobby/", ann, "message=x", "Origin: http://evil.test", 403, "", "another site"},
			{"from another site", "POST", "/logout", ann, "", "Sec-Fetch-Site: cross-site", 403, "", ""},
			{"no guests here", "POST", "/guest", "", "username=x", "", 403, "", ""},
			{"asset", "GET", "/static/chatd.js", "", "", "", 200, "", "The client of a chatd page"},
			{"template is no asset", "GET", "/static/base.html", "", "", "", 404, "", ""},
			{"language", "POST", "/language", "", "lang=zh&next=//evil.test/", "", 303, "/chat/", ""},
			{"language", "POST", "/language", "", "lang=zh&next=/chat/x/", "", 303, "/chat/x/", ""},
			{"socket without upgrade", "GET", "/ws", ann, "", "", 426, "", ""},
			{"socket from another site", "GET", "/ws", ann, "", "Origin: http://evil.test", 426, "", ""},
			{"wrong method", "POST", "/ws", ann, "", "", 405, "", ""},
			{"wrong method", "DELETE", "/chat/Lobby/", ann, "", "", 405, "", ""},
			{"log out", "POST", "/logout", ann, "", "", 303, "/login/", ""},
			{"logged out", "GET", "/chat/", ann, "", "", 303, "/login/?next=%2Fchat%2F", ""},
		}
		for _, test := range tests {
			headers := []string{"X-None: x"}
			if test.header != "" {
				headers = []string{test.header}
			}
			status, location, text := s.browse(test.method, test.path, test.cookie, test.body, headers...)
			if status != test.status || location != test.location || !strings.Contains(text, test.contains) {
				t.Errorf("%s: %s %.60s: %d %q, want %d %q with %.60q in\n%.3000s", test.name, test.method, test.path, status, location, test.status, test.location, test.contains, text)
			}
		}
		time.Sleep(time.Second) // net/http lingers after the huge body
	})
}

// A page of another site must not open a socket with the visitor's cookie.
func TestSocketOrigin(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		for origin, want := range map[string]int{
			"Origin: http://chat.test":   101,
			"X-No-Origin: x":             101,
			"Origin: http://evil.test":   403,
			"Origin: null":               403,
			"Sec-Fetch-Site: cross-site": 403,
			"Sec-Fetch-Site: same-site":  403,
		} {
			p := &peer{t: t, conn: s.listener.dial()}
			p.handshake("/ws", "Cookie: "+s.session("ann"), origin)
			if p.res.StatusCode != want {
				t.Errorf("%s: %d, want %d", origin, p.res.StatusCode, want)
			}
			p.conn.Close()
		}
	})
}

func TestSubprotocol(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		for offer, want := range map[string]string{
			"chatd.v1":             "chatd.v1",
			"chatd.v9, chatd.v1":   "chatd.v1",
			"soap":                 "",
			"soap, mqtt":           "",
			"chatd.v10, xchatd.v1": "",
		} {
			p := &peer{t: t, conn: s.listener.dial()}
			p.handshake("/ws", "Cookie: "+s.session("ann"), "Sec-WebSocket-Protocol: "+offer)
			if got := p.res.Header.Get("Sec-WebSocket-Protocol"); p.res.StatusCode != 101 || got != want {
				t.Errorf("offered %s: %d %q, want %q", offer, p.res.StatusCode, got, want)
			}
			p.conn.Close()
		}
	})
}

// The set-up link makes one administrator, however many try at once.
func TestSetUp(t *testing.T) {
	s := newTestServer(t, t.TempDir(), false)
	form := func(token, password string) string {
		return url.Values{"token": {token}, "username": {"Root"}, "password": {password}}.Encode()
	}
	for _, test := range []struct {
		body   string
		status int
	}{
		{form("guess", testPassword), 403},
		{form("", testPassword), 403},
		{form(s.setUpToken, "short"), 400},
	} {
		if status, _, _ := s.browse("POST", "/setup", "", test.body); status != test.status {
			t.Errorf("set-up with %s: %d, want %d", test.body, status, test.status)
		}
	}
	var all sync.WaitGroup
	var mu sync.Mutex
	statuses := make(map[int]int)
	for i := range 4 {
		all.Go(func() {
			body := url.Values{"token": {s.setUpToken}, "username": {"root" + string(rune('a'+i))}, "password": {testPassword}}.Encode()
			status, _, _ := s.browse("POST", "/setup", "", body)
			mu.Lock()
			statuses[status]++
			mu.Unlock()
		})
	}
	all.Wait()
	if statuses[303] != 1 || statuses[410] != 3 {
		t.Errorf("four at once got %v, want one 303 and three 410", statuses)
	}
	if status, _, _ := s.browse("GET", "/setup?token="+s.setUpToken, "", ""); status != 410 {
		t.Errorf("the used link: %d, want 410", status)
	}
}

func TestLogin(t *testing.T) {
	s := newTestServer(t, t.TempDir(), false)
	if _, err := s.store.CreateUser("Ann", RoleMember, encodePassword(testPassword, "salt", 1000)); err != nil {
		t.Fatal(err)
	}
	login := func(name, password, next string) (int, string, string) {
		return s.browse("POST", "/login/", "", url.Values{"username": {name}, "password": {password}, "next": {next}}.Encode())
	}
	for next, want := range map[string]string{
		"/chat/x/": "/chat/x/", "//evil.test/": "/chat/", "https://evil.test/": "/chat/", `/\evil.test`: "/chat/", "": "/chat/", "/\t/evil.test": "/chat/",
	} {
		if status, location, _ := login("ANN", testPassword, next); status != 303 || location != want {
			t.Errorf("login with next %q: %d %q, want %q", next, status, location, want)
		}
	}
	_, _, wrong := login("ann", "wrong", "")
	_, _, unknown := login("bob", "wrong", "")
	if strings.ReplaceAll(wrong, "ann", "bob") != unknown {
		t.Errorf("a wrong password and an unknown name are told apart:\n%s\n%s", wrong, unknown)
	}
	for range loginBurst {
		login("ann", "wrong", "")
	}
	if status, _, text := login("ann", testPassword, ""); status != 429 || !strings.Contains(text, `value="ann"`) {
		t.Errorf("after %d guesses: %d, want 429", loginBurst, status)
	}
}

// A new password ends the other sessions and their sockets at once.
func TestChangePassword(t *testing.T) {
	dir := t.TempDir()
	s := newTestServer(t, dir, false)
	u, err := s.store.CreateUser("ann", RoleMember, encodePassword("old password", "salt", 1000))
	if err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{"here", "there"} {
		if err := s.store.CreateSession(u, hashToken(token), "", ""); err != nil {
			t.Fatal(err)
		}
	}
	here, there := s.dial("/ws/chat/x/", "chatd=here"), s.dial("/ws/chat/x/", "chatd=there")
	form := func(old, first, second string) string {
		return url.Values{"old": {old}, "new": {first}, "again": {second}}.Encode()
	}
	for _, test := range []struct {
		body   string
		status int
	}{
		{form("wrong", "new password", "new password"), 403},
		{form("old password", "new password", "other"), 400},
		{form("old password", "short", "short"), 400},
		{form("old password", "new password", "new password"), 200},
	} {
		if status, _, text := s.browse("POST", "/account/password", "chatd=here", test.body); status != test.status {
			t.Errorf("%s: %d, want %d\n%s", test.body, status, test.status, text)
		}
	}
	if opcode, payload, err := there.said(); opcode != opClose || err != nil {
		t.Errorf("the other session's socket got opcode %d %q, %v; want a Close", opcode, payload, err)
	}
	here.send(opText, []byte(`{"message":"still here"}`))
	if opcode, payload, err := here.said(); opcode != opText || err != nil {
		t.Errorf("the own socket got opcode %d %q, %v", opcode, payload, err)
	}
	if status, _, _ := s.browse("GET", "/chat/", "chatd=there", ""); status != 303 {
		t.Errorf("the other session: %d, want 303 to the login", status)
	}
	there.conn.Close()
	here.conn.Close()
}

func TestGuests(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, true)
		s.user("Ann")
		for _, test := range []struct {
			name   string
			status int
		}{{"小明", 303}, {"小明", 409}, {"ANN", 409}, {"a/b", 400}, {"ㅤ", 400}, {"\u202eevil", 400}, {anonymousGuest, 409}, {strings.Repeat("x", 33), 400}} {
			if status, _, _ := s.browse("POST", "/guest", "", url.Values{"username": {test.name}}.Encode()); status != test.status {
				t.Errorf("guest %q: %d, want %d", test.name, status, test.status)
			}
			time.Sleep(time.Minute) // for the throttle
		}
		p := s.dial("/ws", "")
		if p.res.StatusCode != 401 {
			t.Errorf("chatd.v1 without a session: %d, want 401", p.res.StatusCode)
		}
		p.conn.Close()
	})
}

// Sessions that are used live on, others end.
func TestSessionLife(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := openTestStore(t, dir)
		used, unused := hashToken("used"), hashToken("unused")
		for _, hash := range [][]byte{used, unused} {
			if err := s.CreateSession(s.ann, hash, "", ""); err != nil {
				t.Fatal(err)
			}
		}
		for range 10 {
			time.Sleep(sessionLife / 4)
			if u, err := s.SessionUser(t.Context(), used); err != nil || u.Name != "ann" {
				t.Fatalf("a session in use: %v, %v", u, err)
			}
		}
		if u, err := s.SessionUser(t.Context(), unused); !errors.Is(err, ErrNotFound) {
			t.Errorf("an unused session: %v, %v", u, err)
		}
	})
}

func TestSubpath(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		s.base = "/team"
		s.http.Handler = s.routes()
		ann := s.session("ann")
		for path, want := range map[string]string{"/team/": "/team/chat/", "/team/chat/?room=x": "/team/chat/x/"} {
			if _, location, _ := s.browse("GET", path, ann, ""); location != want {
				t.Errorf("GET %s leads to %q, want %q", path, location, want)
			}
		}
		_, _, text := s.browse("GET", "/team/chat/x/", ann, "")
		for _, m := range regexp.MustCompile(`(?:href|src|action)="(/[^"]*)"`).FindAllStringSubmatch(text, -1) {
			if !strings.HasPrefix(m[1], "/team/") {
				t.Errorf("the page leads out of the subpath: %s", m[1])
			}
		}
	})
}

func TestClientAddress(t *testing.T) {
	s := newTestServer(t, t.TempDir(), false)
	for _, test := range []struct{ peer, forwarded, want string }{
		{"127.0.0.1:5", "", "127.0.0.1"},
		{"127.0.0.1:5", "9.9.9.9, 8.8.8.8", "8.8.8.8"},
		{"127.0.0.1:5", "9.9.9.9, 127.0.0.2", "9.9.9.9"},
		{"127.0.0.1:5", "nonsense", "127.0.0.1"},
		{"7.7.7.7:5", "9.9.9.9", "7.7.7.7"}, // not from a proxy of ours: forged
		{"[2001:db8::1]:5", "9.9.9.9", "2001:db8::1"},
		{"@", "9.9.9.9, 8.8.8.8", "8.8.8.8"}, // a Unix socket
		{"/run/proxy", "9.9.9.9", "9.9.9.9"},
		{"@", "", "@"},
	} {
		r := &http.Request{RemoteAddr: test.peer, Header: http.Header{"X-Forwarded-For": {test.forwarded}}}
		if got := s.clientAddress(r); got != test.want {
			t.Errorf("%s with %q: %s, want %s", test.peer, test.forwarded, got, test.want)
		}
	}
}

func TestNames(t *testing.T) {
	for in, want := range map[string]string{
		"lobby": "lobby", "  a   b ": "a b", "大厅　2": "大厅 2", "Ünï-_.": "Ünï-_.", "हिन्दी": "हिन्दी", strings.Repeat("字", 64): strings.Repeat("字", 64),
		"": "", " ": "", "..": "", "-": "", "a/b": "", "a?b": "", "a\x00b": "", "a\u202eb": "", "\u3164": "", "a\u200bb": "", "\xff": "", "<b>": "", strings.Repeat("字", 65): "",
	} {
		if got, err := roomName(in); got != want || (err == nil) != (want != "") {
			t.Errorf("roomName(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
	if foldName("ÄNN Straße K") != foldName("änn STRAßE \u212a") || foldName("a") == foldName("b") {
		t.Error("names are not compared without case")
	}
}

func FuzzRoomName(f *testing.F) {
	for _, s := range []string{"lobby", "大厅 2", "..", "a/b", "\u202e"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		name, err := roomName(s)
		if err != nil {
			return
		}
		if again, err := roomName(name); again != name || err != nil {
			t.Errorf("%q is a name, %q is not: %v", name, again, err)
		}
		u, err := url.Parse("http://x" + roomPath(name))
		if err != nil || u.Path != "/chat/"+name+"/" || filepath.Clean(u.Path)+"/" != u.Path {
			t.Errorf("%q does not survive a URL: %v, %v", name, u, err)
		}
	})
}

// Every text exists in both languages, and is used.
func TestCatalogues(t *testing.T) {
	var en, zh catalogue
	var used strings.Builder
	for name, into := range map[string]*catalogue{"en.json": &en, "zh.json": &zh} {
		b, err := os.ReadFile("templates/" + name)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, into); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := filepath.Glob("templates/*.html")
	if err != nil {
		t.Fatal(err)
	}
	scripts, err := filepath.Glob("templates/*.js")
	if err != nil {
		t.Fatal(err)
	}
	var inScripts strings.Builder
	for _, name := range slices.Concat(names, pages, scripts) {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		used.Write(b)
		if slices.Contains(scripts, name) {
			inScripts.Write(b)
		}
	}
	placeholder := regexp.MustCompile(`\{\d\}`)
	for key, text := range en {
		if len(placeholder.FindAllString(text, -1)) != len(placeholder.FindAllString(zh[key], -1)) {
			t.Errorf("%s has other placeholders in zh: %q", key, zh[key])
		}
		short := strings.TrimSuffix(strings.TrimPrefix(strings.TrimPrefix(key, "client."), "error."), "_one")
		if !strings.Contains(used.String(), `"`+short+`"`) && !strings.Contains(used.String(), `"`+key+`"`) {
			t.Errorf("%s is not used", key)
		}
	}
	for _, call := range regexp.MustCompile(`\b(?:t|count)\("(\w+)"`).FindAllStringSubmatch(inScripts.String(), -1) {
		if en["client."+call[1]] == "" {
			t.Errorf("client.%s is missing", call[1])
		}
	}
	for key := range zh {
		if en[key] == "" {
			t.Errorf("%s is missing in en", key)
		}
	}
	for _, m := range regexp.MustCompile(`(?:refuse\([^,"]+, |problem\{\d+, )"(\w+)"|\{\{t "([\w.]+)"`).FindAllStringSubmatch(used.String(), -1) {
		key := m[2]
		if key == "" {
			key = "error." + m[1]
		}
		if en[key] == "" || zh[key] == "" {
			t.Errorf("%s is used and has no text", key)
		}
	}
}
