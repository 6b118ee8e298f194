package main

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
)

// requests has one for every route. {…} in it is filled in: the private room
// "secret" is that of the member and nobody else's.
var requests = map[string]string{
	"GET /{$}":                     "/",
	"GET /static/{file}":           "/static/chatd.css",
	"GET /static/{version}/{file}": "/static/0/chatd.css",
	"GET /manifest.webmanifest":    "/manifest.webmanifest",
	"GET /healthz":                 "/healthz",
	"GET /metrics":                 "/metrics",
	"GET /setup":                   "/setup?token=x",
	"POST /setup":                  "/setup token=x&username=x&password=long+enough",
	"GET /login/{$}":               "/login/",
	"POST /login/{$}":              "/login/ username=ann&password=wrong",
	"POST /guest":                  "/guest username=newcomer",
	"POST /logout":                 "/logout x=",
	"POST /theme":                  "/theme theme=dark",
	"POST /language":               "/language lang=zh",
	"GET /invite/{token}":          "/invite/x",
	"POST /invite/{token}":         "/invite/x username=x&password=long+enough",
	"GET /register/{$}":            "/register/",
	"POST /register/{$}":           "/register/ username=x&password=long+enough",
	"GET /account/{$}":             "/account/",
	"POST /account/sessions":       "/account/sessions id=0000000000000000",
	"POST /account/settings":       "/account/settings language=zh&notify=all",
	"POST /account/password":       "/account/password old=x&new=long+enough&again=long+enough",
	"GET /admin/{$}":               "/admin/",
	"GET /admin/users/{$}":         "/admin/users/",
	"POST /admin/users":            "/admin/users action=user.create&username=x&role=member",
	"GET /admin/messages/{$}":      "/admin/messages/",
	"POST /admin/messages":         "/admin/messages id=1",
	"GET /admin/invites/{$}":       "/admin/invites/",
	"POST /admin/invites":          "/admin/invites kind=account&days=7&uses=1",
	"GET /admin/hooks/{$}":         "/admin/hooks/",
	"POST /admin/hooks":            "/admin/hooks action=hook.create&room=lobby&username=bot&url=http://hook.test/",
	"GET /admin/rooms/{$}":         "/admin/rooms/",
	"GET /admin/audit/{$}":         "/admin/audit/",
	"GET /chat/{$}":                "/chat/",
	"POST /chat/{$}":               "/chat/ private=another",
	"GET /chat/{room}/{$}":         "/chat/secret/",
	"GET /search/{$}":              "/search/?q=plan",
	"POST /chat/{room}/{$}":        "/chat/secret/ message=hello",
	"GET /chat/{room}/about/{$}":   "/chat/secret/about/",
	"POST /chat/{room}/about/{$}":  "/chat/secret/about/ action=topic&topic=x",
	"GET /chat/{room}/edits/{id}":  "/chat/secret/edits/1",
	"GET /push":                    "/push?room=secret",
	"POST /push":                   "/push?room=secret every=2s",
	"GET /ws":                      "socket /ws",
	"GET /ws/chat/{room}/{$}":      "socket /ws/chat/secret/",
	"GET /ws/push/{room}":          "socket /ws/push/secret",
	"GET /ws/{room}/{$}":           "socket /ws/secret/",
	"GET /room/{room}/{$}":         "socket /room/secret/",
	"GET /":                        "/nothing/here",

	"GET /doctor/{token}":       "/doctor/x",
	"GET /chat/doctor/{token}":  "/chat/doctor/x",
	"POST /chat/doctor/{token}": "/chat/doctor/x x=",
	"GET /ws/doctor/{token}":    "socket /ws/doctor/x",

	"POST /account/tokens":           "/account/tokens scope=both",
	"POST /chat/{room}/about/tokens": "/chat/secret/about/tokens username=robot&scope=both",
}

// whoAsks are the columns of the matrix. The last ones are tokens of the member: one
// for everything, for reading, for posting, for another room, and one that is revoked.
var whoAsks = []string{"anonymous", "guest", "outsider", "member", "admin", "deactivated", "signedout", "token", "reading", "posting", "elsewhere", "revoked"}

// frames are what a socket may send about the private room; message 1 is in it.
var frames = []string{
	`{"type":"message","room":"secret","cid":"c","message":"x"}`,
	`{"type":"message","room":"lobby","cid":"c","message":"x","reply_to":1}`,
	`{"type":"edit","id":1,"cid":"c","message":"x"}`,
	`{"type":"delete","id":1,"cid":"c"}`,
	`{"type":"react","id":1,"cid":"c","emoji":"👍"}`,
	`{"type":"read","room":"secret","id":1}`,
	`{"type":"typing","room":"secret"}`,
	`{"type":"hello","since":0}`,
	`{"type":"dance"}`,
}

// TestPermissions writes down who may do what, and compares it with
// testdata/permissions.txt (-update accepts it). A route without a row fails.
func TestPermissions(t *testing.T) {
	t.Parallel()
	var table strings.Builder
	line := func(cells ...string) {
		var text strings.Builder
		text.WriteString(fmt.Sprintf("%-36s", cells[0]))
		for _, cell := range cells[1:] {
			text.WriteString(fmt.Sprintf(" %-12s", cell))
		}
		table.WriteString(strings.TrimRight(text.String(), " ") + "\n")
	}
	line(append([]string{""}, whoAsks...)...)
	template := t.TempDir()
	synctest.Test(t, func(t *testing.T) { newTestServer(t, template, true).withCast().close() })
	// row fills in a line. Only what changes nothing may be asked by many of one server.
	row := func(name string, together int, ask func(s *testServer, who string) string) {
		cells := []string{name}
		for some := range slices.Chunk(whoAsks, together) {
			dir := t.TempDir()
			if err := os.CopyFS(dir, os.DirFS(template)); err != nil {
				t.Fatal(err)
			}
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t, dir, true)
				defer s.close()
				for _, who := range some {
					cells = append(cells, ask(s, who))
				}
			})
		}
		line(cells...)
	}
	for _, pattern := range routePatterns(t) {
		request, ok := requests[pattern]
		if !ok {
			t.Errorf("%s has no row", pattern)
			continue
		}
		method, _, _ := strings.Cut(pattern, " ")
		together := 1
		if method == "GET" {
			together = len(whoAsks)
		}
		row(pattern, together, func(s *testServer, who string) string {
			path, body, _ := strings.Cut(request, " ")
			if path == "socket" {
				return fmt.Sprint(s.dial(body, s.cookie(who)).res.StatusCode)
			}
			status, _, _ := s.browse(method, path, s.cookie(who), body)
			return fmt.Sprint(status)
		})
	}
	for _, frame := range frames {
		name := regexp.MustCompile(`,"(cid|message|emoji)":"[^"]*"|"`).ReplaceAllString(frame, "")
		row(name, 1, func(s *testServer, who string) string { return s.outcomeOf(who, frame) })
	}
	const golden = "testdata/permissions.txt"
	if *update {
		if err := os.WriteFile(golden, []byte(table.String()), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil || string(want) != table.String() {
		t.Errorf("%v; now it is\n%s", err, &table)
	}
}

// routePatterns are those that the source registers.
func routePatterns(t *testing.T) (patterns []string) {
	source, err := os.ReadFile("handlers.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`\t(?:handle|tokened|mux\.HandleFunc)\("([^"]+)"`).FindAllSubmatch(source, -1) {
		patterns = append(patterns, string(m[1]))
	}
	return patterns
}

// withCast makes everybody in whoAsks, and the room.
func (s *testServer) withCast() *testServer {
	s.t.Helper()
	s.room("lobby")
	for _, who := range whoAsks[1:7] {
		s.session(who)
	}
	for _, change := range []string{
		"UPDATE users SET role = who.name FROM (SELECT 'guest' AS name UNION SELECT 'admin') who WHERE users.name = who.name",
		"UPDATE users SET deactivated = 1 WHERE name = 'deactivated'",
		"DELETE FROM sessions WHERE user = (SELECT id FROM users WHERE name = 'signedout')",
	} {
		if err := s.store.update(func(w *writer) error { return w.exec(change) }); err != nil {
			s.t.Fatal(err)
		}
	}
	lobby, err := s.store.Room("lobby")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, who := range whoAsks[7:] {
		scope, room, revoked := scopeBoth, any(nil), any(nil)
		switch who {
		case "reading":
			scope = scopeRead
		case "posting":
			scope = scopePost
		case "elsewhere":
			room = lobby.ID
		case "revoked":
			revoked = 1
		}
		err := s.store.update(func(w *writer) error {
			return w.exec("INSERT INTO tokens (hash, user, room, scope, label, created, revoked) VALUES (?, (SELECT id FROM users WHERE name = 'member'), ?, ?, '', 0, ?)",
				hashToken("token-of-"+who), room, scope, revoked)
		})
		if err != nil {
			s.t.Fatal(err)
		}
	}
	secret, err := s.store.CreatePrivateRoom("secret", s.user("member"))
	if err == nil {
		_, err = s.store.AppendWait(Event{Kind: KindMessage, Room: secret, Author: s.user("member"), Body: "the plan"})
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return s
}

// cookie is that of a session, whether or not there is one, or a token.
func (s *testServer) cookie(who string) string {
	if slices.Contains(whoAsks[7:], who) {
		return "Bearer token-of-" + who
	}
	return sessionCookie + "=token-of-" + who
}

// outcomeOf sends one frame after the hello, and says what came of it.
func (s *testServer) outcomeOf(who, frame string) string {
	p := s.dial("/ws", s.cookie(who))
	if p.res.StatusCode != 101 {
		return fmt.Sprint(p.res.StatusCode)
	}
	go p.listen()
	if !strings.Contains(frame, "hello") {
		p.send(opText, []byte(`{"type":"hello"}`))
		synctest.Wait()
		p.takeHeard()
	}
	p.send(opText, []byte(frame))
	synctest.Wait()
	heard := strings.Join(p.takeHeard(), "\n")
	if m := regexp.MustCompile(`"code":"(\w+)"`).FindStringSubmatch(heard); m != nil {
		return m[1]
	}
	if strings.Contains(heard, "the plan") {
		return "sees"
	}
	return "ok"
}
