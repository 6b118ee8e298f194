package main

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
)

// attacker sends requests to a real chatd and says what came back.
type attacker struct {
	t *testing.T
	d *daemon
}

func (a attacker) ask(method, path, cookie, body string, headers ...string) (status int, header http.Header, text string) {
	a.t.Helper()
	r, err := http.NewRequest(method, a.d.url(path), strings.NewReader(body))
	if err != nil {
		a.t.Fatal(err)
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	r.Header.Set("Cookie", cookie)
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Set(name, value)
	}
	res, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		return 0, nil, err.Error()
	}
	defer res.Body.Close()
	all, err := io.ReadAll(res.Body)
	if err != nil {
		return 0, nil, err.Error()
	}
	return res.StatusCode, res.Header, string(all)
}

func newAttacker(t *testing.T, flags ...string) attacker {
	dir := t.TempDir()
	newPeople(t, dir, []string{"lobby"}, "ann", "eve")
	return attacker{t, startDaemon(t, dir, flags...)}
}

// TestAttacks tries on the running program what strangers try.
func TestAttacks(t *testing.T) {
	a := newAttacker(t, "-guests", "-trust", "10.0.0.0/8")
	ann, eve := cookieOf("ann"), cookieOf("eve")

	t.Run("foreign pages", func(t *testing.T) {
		for pattern, request := range requests {
			method, _, _ := strings.Cut(pattern, " ")
			path, body, _ := strings.Cut(request, " ")
			if method != "POST" {
				continue
			}
			for _, header := range []string{"Sec-Fetch-Site: cross-site", "Origin: https://evil.example"} {
				if status, _, _ := a.ask(method, path, ann, body, header); status != http.StatusForbidden {
					t.Errorf("%s with %s: %d", pattern, header, status)
				}
			}
		}
		for _, path := range []string{"/ws", "/ws/chat/lobby/", "/chat/"} {
			p := dialTCP(t, a.d.addr, path, "Cookie: "+ann, "Origin: https://evil.example")
			if p.res.StatusCode != http.StatusForbidden {
				t.Errorf("a socket to %s from a foreign page: %d", path, p.res.StatusCode)
			}
		}
	})

	t.Run("script", func(t *testing.T) {
		const script = `<script>alert("1")</script><img src=x onerror=alert(1)>`
		a.ask("POST", "/chat/lobby/", eve, url.Values{"message": {script}}.Encode())
		a.ask("POST", "/chat/lobby/about/", eve, url.Values{"action": {"topic"}, "topic": {script}}.Encode())
		pages := map[string]string{
			"stored":          "/chat/lobby/",
			"stored, as JSON": "/chat/lobby/?since=0",
			"topic":           "/chat/lobby/about/",
			"room, reflected": "/chat/?room=" + url.QueryEscape(script),
			"room, in a path": "/chat/" + url.PathEscape(script) + "/",
			"next, reflected": "/login/?next=" + url.QueryEscape("/"+script),
			"user, reflected": "/login/",
			"setup":           "/setup?token=" + url.QueryEscape(script),
		}
		for name, path := range pages {
			method, body := "GET", ""
			if name == "user, reflected" {
				method, body = "POST", url.Values{"username": {script}, "password": {"x"}}.Encode()
			}
			_, header, text := a.ask(method, path, ann, body)
			if strings.Contains(header.Get("Content-Type"), "html") && (strings.Contains(text, "<script>a") || strings.Contains(text, "<img src=x")) {
				t.Errorf("%s: the script is in the page", name)
			}
			if csp := header.Get("Content-Security-Policy"); !strings.Contains(csp, "default-src 'none'") || strings.Contains(csp, "unsafe") {
				t.Errorf("%s: policy %q", name, csp)
			}
		}
	})

	t.Run("open redirect", func(t *testing.T) {
		for _, next := range []string{"//evil.example", `/\evil.example`, "https://evil.example", "/\t/evil.example", "javascript:alert(1)"} {
			_, header, _ := a.ask("POST", "/language", ann, url.Values{"lang": {"en"}, "next": {next}}.Encode())
			if to := header.Get("Location"); to != "/chat/" {
				t.Errorf("next=%q leads to %q", next, to)
			}
		}
	})

	t.Run("names", func(t *testing.T) {
		if status, _, _ := a.ask("POST", "/guest", "", "username=ANN"); status != http.StatusConflict {
			t.Errorf("a guest called ANN beside ann: %d", status)
		}
		for _, name := range []string{"a\x00b", "a\u202eb", "a\u200bb", "a/b", "<b>", "..", "", strings.Repeat("x", 100), "\xff\xfe"} {
			if status, _, _ := a.ask("POST", "/guest", "", url.Values{"username": {name}}.Encode()); status != http.StatusBadRequest && status != http.StatusTooManyRequests {
				t.Errorf("a guest called %q: %d", name, status)
			}
			if status, _, _ := a.ask("POST", "/chat/", ann, url.Values{"private": {name}}.Encode()); status != http.StatusBadRequest {
				t.Errorf("a room called %q: %d", name, status)
			}
		}
	})

	t.Run("another's cid", func(t *testing.T) {
		a.ask("POST", "/chat/lobby/", ann, "message=from+ann&cid=shared")
		_, _, text := a.ask("POST", "/chat/lobby/", eve, `{"message":"from eve","cid":"shared"}`, "Content-Type: application/json")
		if !strings.Contains(text, `"message":"from eve"`) || !strings.Contains(text, `"username":"eve"`) {
			t.Errorf("eve used ann's cid and got %s", text)
		}
	})

	t.Run("syntax", func(t *testing.T) {
		for _, evil := range []string{`' OR 1=1 --`, `"; DROP TABLE users; --`, `%_\`, `NEAR(a b)`, `a" OR "b`, "*", "-1", "9223372036854775808", "1e9", "\x00"} {
			q := url.QueryEscape(evil)
			for _, path := range []string{"/chat/?room=" + q, "/chat/lobby/?before=" + q, "/chat/lobby/?since=" + q, "/setup?token=" + q, "/login/?next=" + q, "/static/" + url.PathEscape(evil)} {
				if status, _, _ := a.ask("GET", path, ann, "", "Accept: application/json"); status >= 500 || status == 0 {
					t.Errorf("%s: %d", path, status)
				}
			}
			for pattern, request := range requests {
				path, body, _ := strings.Cut(request, " ")
				form, _ := url.ParseQuery(body)
				for key := range form {
					if strings.HasPrefix(pattern, "POST") && key != "x" {
						if status, _, _ := a.ask("POST", path, eve, key+"="+q); status >= 500 || status == 0 {
							t.Errorf("%s with %s=%s: %d", pattern, key, evil, status)
						}
						eve = cookieOf("eve")
					}
				}
			}
		}
	})

	t.Run("too much", func(t *testing.T) {
		much := strings.Repeat("x", 1<<20)
		for what, got := range map[string]int{
			"header": first(a.ask("GET", "/", "", "", "X-Much: "+much)),
			"path":   first(a.ask("GET", "/chat/"+much+"/", ann, "")),
			"form":   first(a.ask("POST", "/chat/lobby/", ann, "message="+much)),
			"JSON":   first(a.ask("POST", "/chat/lobby/", ann, `{"message":"`+much+`"}`, "Content-Type: application/json")),
		} {
			if got < 400 || got >= 500 {
				t.Errorf("a %s of 1 MiB: %d", what, got)
			}
		}
		p := dialTCP(t, a.d.addr, "/ws/chat/lobby/", "Cookie: "+ann)
		p.send(opText, []byte(much[:maxFrame+1]))
		if opcode, payload, err := p.said(); err != nil || opcode != opClose || string(payload[:2]) != "\x03\xf1" { // 1009
			t.Errorf("a frame of 64 KiB: %d %q %v", opcode, payload, err)
		}
	})

	t.Run("forged address", func(t *testing.T) {
		refused := 0
		for i := range 3 * loginBurst {
			body := url.Values{"username": {"ann"}, "password": {"guess"}}.Encode()
			if status, _, _ := a.ask("POST", "/login/", "", body, fmt.Sprintf("X-Forwarded-For: 192.0.2.%d", i)); status == http.StatusTooManyRequests {
				refused++
			}
		}
		if refused == 0 {
			t.Error("a header of one's own made every guess the first")
		}
	})
}

func first(status int, _ http.Header, _ string) int { return status }

// Who is not a trusted proxy cannot say who the visitor is, and a link that is
// used up or guessed lets nobody in.
func TestForgedHeaderAndLinks(t *testing.T) {
	a := newAttacker(t, "-auth-header", "Remote-User", "-auth-create", "-trust", "10.0.0.0/8")
	for _, name := range []string{"ann", "anybody"} {
		if status, _, _ := a.ask("GET", "/account/", "", "", "Remote-User: "+name); status != http.StatusSeeOther {
			t.Errorf("with a header that says %s: %d", name, status)
		}
		if p := dialTCP(t, a.d.addr, "/ws", "Remote-User: "+name); p.res.StatusCode != http.StatusUnauthorized {
			t.Errorf("a socket with a header that says %s: %d", name, p.res.StatusCode)
		}
	}
	out, err := chatdCommand("invite", "-data", a.d.dir).Output()
	if err != nil {
		t.Fatal(err)
	}
	link, err := url.Parse(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	form := func(name string) string { return url.Values{"username": {name}, "password": {testPassword}}.Encode() }
	for name, want := range map[string]map[string]int{link.Path: {"first": http.StatusSeeOther, "second": http.StatusGone}, "/invite/GUESSED": {"third": http.StatusGone}} {
		for _, user := range slices.Sorted(maps.Keys(want)) {
			if status, _, _ := a.ask("POST", name, "", form(user)); status != want[user] {
				t.Errorf("%s at %s: %d, want %d", user, name, status, want[user])
			}
		}
	}
}

// A token that was planted before the login is worth nothing after it.
func TestSessionFixation(t *testing.T) {
	a := newAttacker(t)
	a.d.addUser("victim")
	planted := sessionCookie + "=planted"
	status, header, _ := a.ask("POST", "/login/", planted, url.Values{"username": {"victim"}, "password": {testPassword}}.Encode())
	if cookie := header.Get("Set-Cookie"); status != http.StatusSeeOther || !strings.HasPrefix(cookie, sessionCookie+"=") || strings.Contains(cookie, "planted") {
		t.Errorf("the login set %q, %d", cookie, status)
	}
	if status, _, _ := a.ask("GET", "/account/", planted, ""); status != http.StatusSeeOther {
		t.Errorf("with the planted token: %d", status)
	}
}

// Of all who have the set-up link, one becomes administrator.
func TestSetUpRace(t *testing.T) {
	d := startDaemon(t, t.TempDir())
	token := d.await(setUpLink)
	var all sync.WaitGroup
	var mu sync.Mutex
	results := make(map[int]int)
	for i := range 8 {
		all.Go(func() {
			form := url.Values{"token": {token}, "username": {fmt.Sprint("racer", i)}, "password": {testPassword}}.Encode()
			status, _, _ := attacker{t, d}.ask("POST", "/setup", "", form)
			mu.Lock()
			defer mu.Unlock()
			results[status]++
		})
	}
	all.Wait()
	if results[http.StatusSeeOther] != 1 || results[http.StatusGone] != 7 {
		t.Errorf("answers: %v, want one 303 and seven 410", results)
	}
}
