package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"
)

const firefox = "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0"

// listeningPeer opens a socket and notes all that comes.
func (s *testServer) listeningPeer(path, cookie string, headers ...string) *peer {
	s.t.Helper()
	p := &peer{t: s.t, conn: s.listener.dial()}
	p.handshake(path, append(headers, "Cookie: "+cookie)...)
	go p.listen()
	return p
}

// ended reports whether the socket was told that it is signed out.
func (p *peer) ended() bool {
	synctest.Wait()
	return slices.Contains(p.takeHeard(), fmt.Sprint("closed ", closePolicy))
}

func TestSessions(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		sockets := make(map[string]*peer)
		ids := make(map[string]string)
		for _, token := range []string{"here", "there", "away", "bob's"} {
			u, agent := s.user("ann"), firefox
			if token == "bob's" {
				u, agent = s.user("bob"), "curl"
			}
			if err := s.store.CreateSession(u, hashToken(token), agent, "2001:db8::"+token[:1]); err != nil {
				t.Fatal(err)
			}
			sockets[token], ids[token] = s.listeningPeer("/ws/chat/x/", "chatd="+token), Session{Hash: hashToken(token)}.ID()
		}
		_, _, text := s.browse("GET", "/account/", "chatd=here", "")
		if strings.Count(text, "Firefox on Linux") != 3 || strings.Count(text, "this browser</span>") != 1 ||
			!strings.Contains(text, "2001:db8::t") || strings.Contains(text, `value="`+ids["here"]) || strings.Contains(text, ids["bob's"]) {
			t.Errorf("the sessions on the page are wrong:\n%s", text)
		}
		for _, step := range []struct {
			form   string
			status int
			ended  string
		}{
			{"id=" + ids["bob's"], 404, ""},
			{"id=", 404, ""},
			{"", 404, ""},
			{"id=" + ids["there"], 200, "there"},
			{"id=" + ids["there"], 404, ""},
			{"all=1", 200, "away"},
			{"id=" + ids["here"], 303, "here"},
		} {
			if status, _, _ := s.browse("POST", "/account/sessions", "chatd=here", step.form, "Content-Type: application/x-www-form-urlencoded"); status != step.status {
				t.Errorf("%q: %d, want %d", step.form, status, step.status)
			}
			for token, p := range sockets {
				if ended := p.ended(); ended != (token == step.ended) {
					t.Errorf("after %q the socket of %s has ended: %v", step.form, token, ended)
				}
			}
			if step.ended != "" {
				if _, err := s.store.SessionUser(t.Context(), hashToken(step.ended)); !errors.Is(err, ErrNotFound) {
					t.Errorf("after %q the session %s: %v", step.form, step.ended, err)
				}
			}
		}
	})
}

// A socket whose session ends while it opens does not live on.
func TestSignOutWhileOpening(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		cookie := s.session("ann")
		s.http.Handler = s.handler(func(w http.ResponseWriter, r *http.Request, v visitor) error {
			if err := s.store.DeleteSession(v.User, Session{Hash: v.session}.ID()); err != nil {
				return err
			}
			s.hub.Drop(func(*member) bool { return true })
			return s.handleV1(w, r, v)
		})
		p := &peer{t: t, conn: s.listener.dial()}
		t.Cleanup(func() { p.conn.Close() })
		if err := p.tryHandshake("/ws", "Cookie: "+cookie); err == nil {
			t.Errorf("the socket opened: %s", p.res.Status)
		}
	})
}

// A login keeps what the browser says of itself, as far as there is room.
func TestLoginKeepsAgent(t *testing.T) {
	s := newTestServer(t, t.TempDir(), false)
	u, err := s.store.CreateUser("ann", RoleMember, encodePassword(testPassword, "salt", 1000))
	if err != nil {
		t.Fatal(err)
	}
	form := url.Values{"username": {"ann"}, "password": {testPassword}}.Encode()
	s.browse("POST", "/login/", "", form, "User-Agent: x"+strings.Repeat("字", maxAgent), "X-Forwarded-For: 9.9.9.9")
	sessions, err := s.store.Sessions(t.Context(), u)
	if err != nil || len(sessions) != 1 {
		t.Fatalf("%v, %v; want one session", sessions, err)
	}
	c := sessions[0]
	if len(c.Agent) < maxAgent-utf8.UTFMax || len(c.Agent) > maxAgent || !utf8.ValidString(c.Agent) || c.Address != "9.9.9.9" ||
		time.Since(c.Created) > time.Minute || time.Since(c.Seen) > time.Minute {
		t.Errorf("kept %+v", c)
	}
}

func TestBrowserNames(t *testing.T) {
	for agent, want := range map[string]string{
		firefox: "Firefox Linux",
		"Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36 Edg/142.0.0.0":                   "Edge Windows",
		"Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/26.0 Safari/605.1.15":                           "Safari macOS",
		"Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Mobile Safari/537.36":                                 "Chrome Android",
		"Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148 MicroMessenger/8.0.60(0x18003c2f)": "WeChat iPhone",
		"Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) CriOS/142.0 Mobile/15E148 Safari/604.1":          "Chrome iPhone",
		"curl/8.14": " ",
	} {
		c := Session{Agent: agent}
		if got := c.Browser() + " " + c.System(); got != want {
			t.Errorf("%q is %q, want %q", agent, got, want)
		}
	}
}

// The language of the account goes before that of the browser, on every page.
func TestSettings(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		ann := s.session("ann")
		in := func(what, want string) {
			t.Helper()
			if _, _, text := s.browse("GET", "/nothing", ann+"; lang=en", ""); !strings.Contains(text, s.words[want].text("error.not_found")) {
				t.Errorf("%s: the error is not in %s", what, want)
			}
			for _, path := range []string{"/account/", "/nothing", "/chat/?room=a%2Fb", "/chat/x/"} {
				if _, _, text := s.browse("GET", path, ann+"; lang=en", ""); !strings.Contains(text, `<html lang="`+want+`">`) {
					t.Errorf("%s: %s is not in %s:\n%.300s", what, path, want, text)
				}
			}
		}
		in("at first", "en")
		for _, form := range []string{"language=fr&notify=all", "language=zh&notify=some", "language=zh"} {
			if status, _, _ := s.browse("POST", "/account/settings", ann, form); status != 400 {
				t.Errorf("%s: %d, want 400", form, status)
			}
		}
		status, _, text := s.browse("POST", "/account/settings", ann, "language=zh&notify=none")
		if status != 200 || !strings.Contains(text, `<option value="none" selected>`) || !strings.Contains(text, "设置已保存") {
			t.Errorf("settings: %d\n%s", status, text)
		}
		in("set to zh", "zh")
		p := s.listeningPeer("/ws/chat/x/", ann)
		p.send(opText, []byte(`{"message":""}`))
		synctest.Wait()
		if heard := strings.Join(p.takeHeard(), "\n"); !strings.Contains(heard, "请先输入内容") {
			t.Errorf("a refusal over the socket: %s", heard)
		}
		s.browse("POST", "/language", ann, "lang=en")
		in("switched to en", "en")
		u, err := s.store.SessionUser(t.Context(), hashToken("token-of-ann"))
		if err != nil || u.Notify != "none" || u.Language != "en" {
			t.Errorf("kept %+v, %v", u, err)
		}
		if e, err := s.store.AppendWait(Event{Kind: KindMessage, Room: s.room("y"), Author: u, Body: "x"}); err != nil || e.Author != (User{ID: u.ID, Name: "ann", Role: RoleMember}) {
			t.Errorf("an event goes to others with its author's settings: %+v, %v", e.Author, err)
		}
		s.browse("POST", "/account/settings", ann, "language=&notify=all")
		s.browse("POST", "/language", ann, "lang=zh") // only this browser
		in("automatic", "en")
	})
}

func TestDeactivate(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, true)
		ann, err := s.store.CreateUser("ann", RoleMember, encodePassword(testPassword, "salt", 1000))
		if err != nil {
			t.Fatal(err)
		}
		cookie := s.session("ann")
		login := func(password string) (int, string) {
			status, _, text := s.browse("POST", "/login/", "", url.Values{"username": {"ann"}, "password": {password}}.Encode())
			return status, text
		}
		guest, err := s.store.CreateUser("guest", RoleGuest, "")
		if err != nil {
			t.Fatal(err)
		}
		for _, u := range []User{ann, guest} {
			if _, err := s.store.ChangeUser(User{}, u.ID, "user.deactivate", ""); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.store.SpeakingGuest(t.Context(), "guest"); !errors.Is(err, ErrTaken) {
			t.Errorf("somebody else may speak as a deactivated guest: %v", err)
		}
		_, wrong := login("wrong")
		if status, right := login(testPassword); status != 403 || right != wrong {
			t.Errorf("the right password of a deactivated user is answered %d\n%s\na wrong one\n%s", status, right, wrong)
		}
		// A login that was under way may bring a session after all.
		if err := s.store.CreateSession(ann, hashToken("late"), "", ""); err != nil {
			t.Fatal(err)
		}
		for _, cookie := range []string{cookie, "chatd=late"} {
			if status, _, _ := s.browse("GET", "/chat/", cookie, ""); status != 303 {
				t.Errorf("the session %s of a deactivated user: %d, want 303 to the login", cookie, status)
			}
		}
		if _, err := s.store.ChangeUser(User{}, ann.ID, "user.reactivate", ""); err != nil {
			t.Fatal(err)
		}
		if status, _, _ := s.browse("GET", "/chat/", cookie, ""); status != 303 {
			t.Errorf("the old session of an activated user: %d, want 303 to the login", status)
		}
		if status, _ := login(testPassword); status != 303 {
			t.Errorf("login after activation: %d, want 303", status)
		}
	})
}

// A guest's time ends for pages and for sockets that are open.
func TestGuestExpires(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		s.exec("UPDATE users SET expires = ? WHERE id = ?", time.Now().Add(time.Hour).UnixMilli(), s.user("eve").ID)
		eve, bob := s.listeningPeer("/ws/chat/x/", s.session("eve")), s.listeningPeer("/ws/chat/x/", s.session("bob"))
		time.Sleep(time.Hour - time.Second)
		if eve.ended() {
			t.Error("the socket ended too early")
		}
		time.Sleep(3 * time.Second)
		if !eve.ended() || bob.ended() {
			t.Error("not the guest's socket, and no other, ended in time")
		}
		if status, _, _ := s.browse("GET", "/chat/", "chatd=token-of-eve", ""); status != 303 {
			t.Errorf("the guest's session: %d, want 303 to the login", status)
		}
	})
}

func TestProxyHeader(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, true)
		var err error
		if s.server, err = newServer(config{trust: "127.0.0.0/8", authHeader: "Remote-User", authCreate: true}, s.store, s.hub, s.log); err != nil || !s.authCreate {
			t.Fatalf("-auth-create is %v, %v", s.authCreate, err)
		}
		s.http.Handler = s.routes()
		ann, zoe := s.user("Ann"), s.user("zoe")
		if _, err := s.store.CreateUser("guest", RoleGuest, ""); err != nil {
			t.Fatal(err)
		}
		if _, err := s.store.ChangeUser(User{}, zoe.ID, "user.deactivate", ""); err != nil {
			t.Fatal(err)
		}
		bob := s.session("bob")
		local := s.trusted
		for _, test := range []struct {
			name, path, cookie, header string
			untrusted, create          bool
			status                     int
			contains                   string
		}{
			{"known", "/chat/", "", "Remote-User: ann", false, false, 200, "<bdi>Ann</bdi>"},
			{"goes before a session", "/chat/", bob, "Remote-User: ann", false, false, 200, "<bdi>Ann</bdi>"},
			{"untrusted", "/chat/", "", "Remote-User: ann", true, false, 303, ""},
			{"untrusted with a session", "/chat/", bob, "Remote-User: ann", true, false, 200, "<bdi>bob</bdi>"},
			{"none", "/chat/", bob, "Remote-User: ", false, false, 200, "<bdi>bob</bdi>"},
			{"none", "/login/", "", "X-None: x", false, false, 200, `name="password"`},
			{"unknown", "/chat/", bob, "Remote-User: new", false, false, 403, "no active account"},
			{"unknown, as JSON", "/chat/x/", "", "Remote-User: new\r\nAccept: application/json", false, false, 403, `"code":"proxy_unknown"`},
			{"style of the refusal", "/static/chatd.css", "", "Remote-User: new", false, false, 200, ":root"},
			{"made", "/chat/", "", "Remote-User: new", false, true, 200, "<bdi>new</bdi>"},
			{"made once", "/chat/", "", "Remote-User: NEW", false, true, 200, "<bdi>new</bdi>"},
			{"deactivated", "/chat/", "", "Remote-User: zoe", false, true, 403, "no active account"},
			{"guest", "/chat/", "", "Remote-User: guest", false, true, 403, "no active account"},
			{"impossible", "/chat/", "", "Remote-User: a/b", false, true, 403, "no active account"},
			{"two", "/chat/", "", "Remote-User: ann\r\nRemote-User: bob", false, true, 403, "no active account"},
			{"no login form", "/login/?next=/chat/x/", "", "Remote-User: ann", false, false, 303, ""},
			{"account", "/account/", "", "Remote-User: ann", false, false, 200, `name="notify"`},
			{"no password to change", "/account/", "", "Remote-User: ann", false, false, 200, ""},
		} {
			s.authCreate, s.trusted = test.create, local
			if test.untrusted {
				s.trusted = nil
			}
			p := &peer{t: t, conn: s.listener.dial()} // may send a header twice
			fmt.Fprintf(p.conn, "GET %s HTTP/1.1\r\nHost: chat.test\r\nConnection: close\r\nCookie: %s\r\n%s\r\n\r\n", test.path, test.cookie, test.header)
			res, err := http.ReadResponse(bufio.NewReader(p.conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(res.Body)
			if err != nil {
				t.Fatal(err)
			}
			status, text := res.StatusCode, string(body)
			if status != test.status || !strings.Contains(text, test.contains) || strings.Contains(text, `name="password"`) && test.name != "none" ||
				strings.Contains(text, `name="old"`) {
				t.Errorf("%s: %d, want %d with %q in\n%s", test.name, status, test.status, test.contains, text)
			}
		}
		s.trusted = local
		p, other := s.listeningPeer("/ws/chat/x/", "", "Remote-User: ann"), s.listeningPeer("/ws/chat/x/", bob)
		p.send(opText, []byte(`{"message":"hi","username":"eve"}`))
		synctest.Wait()
		if heard := strings.Join(other.takeHeard(), "\n"); !strings.Contains(heard, `"username":"Ann"`) {
			t.Errorf("a socket through the proxy speaks as %s", heard)
		}
		if _, err := s.store.ChangeUser(User{}, ann.ID, "user.deactivate", ""); err != nil {
			t.Fatal(err)
		}
		s.hub.Drop(func(m *member) bool { return m.User.ID == ann.ID })
		if !p.ended() || other.ended() {
			t.Error("not the socket of the deactivated user, and no other, ended")
		}
	})
}

// Only over https, and with the host for ourselves, does the cookie have a name
// that binds it to the host.
func TestCookieAndTransport(t *testing.T) {
	s := newTestServer(t, t.TempDir(), true)
	for _, test := range []struct {
		secure     bool
		base, name string
	}{{false, "", "chatd"}, {true, "", "__Host-chatd"}, {true, "/team", "chatd"}} {
		s.secure, s.base, s.public = test.secure, test.base, map[bool]string{true: "https://chat.test" + test.base}[test.secure]
		handler := s.routes()
		r := httptest.NewRequest("POST", test.base+"/guest", strings.NewReader("username=guest"+fmt.Sprint(len(test.name+test.base))))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		cookies := w.Result().Cookies()
		if len(cookies) != 1 {
			t.Fatalf("%+v: %d, cookies %v", test, w.Code, cookies)
		}
		c := cookies[0]
		if c.Name != test.name || c.Secure != test.secure || c.Path != test.base+"/" || c.Domain != "" {
			t.Errorf("%+v: cookie %v", test, c)
		}
		if sts := w.Header().Get("Strict-Transport-Security"); (sts == "max-age=31536000") != test.secure {
			t.Errorf("%+v: Strict-Transport-Security %q", test, sts)
		}
		r = httptest.NewRequest("GET", test.base+"/chat/", nil)
		r.AddCookie(c)
		w = httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		if w.Code != 200 {
			t.Errorf("%+v: with the cookie: %d", test, w.Code)
		}
	}
}

// Who guesses waits, from one place or from many; the owner of the name does not.
func TestLoginThrottle(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		ann, err := s.store.CreateUser("Ann", RoleMember, encodePassword(testPassword, "salt", 1000))
		if err != nil {
			t.Fatal(err)
		}
		try := func(name, password, from string) error {
			_, err := s.signIn(t.Context(), from, name, password)
			return err
		}
		wrong := strings.Repeat("x", maxPassword+1) // is not even hashed
		// guess does so times times; # in name and address is the number of the guess.
		guess := func(what, name, from, want string, times int) {
			t.Helper()
			for i := range times {
				if err := try(strings.ReplaceAll(name, "#", fmt.Sprint(i)), wrong, strings.ReplaceAll(from, "#", fmt.Sprint(i))); err == nil || err.Error() != want {
					t.Errorf("%s, %d: %v, want %s", what, i, err, want)
				}
			}
		}
		guess("one name from one address", "ann", "6.6.6.6", "bad_login", loginBurst)
		guess("one name from one address", "ANN", "6.6.6.6", "login_too_fast", 1)
		guess("another name from there", "bob", "6.6.6.6", "bad_login", 1)
		if err := try("ann", testPassword, "7.7.7.7"); err != nil {
			t.Errorf("the owner at another address: %v", err)
		}
		guess("many names from one address", "user#", "8.8.8.8", "bad_login", addressLoginBurst)
		guess("many names from one address", "bob", "8.8.8.8", "login_too_fast", 1)
		guess("one name from one network", "bob", "2001:db8::#", "bad_login", loginBurst)
		guess("one name from one network", "bob", "2001:db8::f#", "login_too_fast", 1)

		time.Sleep(time.Hour)
		for _, name := range []string{"ann", "nobody"} {
			guess(name+" from many addresses", name, "5.5.5.#", "bad_login", nameLoginBurst)
			guess(name+" from many addresses", name, "5.5.6.#", "login_too_fast", 5)
		}
		if err := s.store.CreateSession(ann, hashToken("home"), "", "7.7.7.7"); err != nil {
			t.Fatal(err)
		}
		if err := try("ann", testPassword, "7.7.7.7"); err != nil {
			t.Errorf("the owner at home, while all guess: %v", err)
		}
		guess("who is not at home there", "ann", "5.5.7.#", "login_too_fast", 1)
		guess("who is at home as another", "nobody", "7.7.7.7", "login_too_fast", 1)
		guess("a guess from the owner's home", "ann", "7.7.7.7", "bad_login", loginBurst)
		guess("a guess from the owner's home", "ann", "7.7.7.7", "login_too_fast", 1)
		time.Sleep(2 * time.Second)
		if err := try("ann", testPassword, "9.9.9.9"); err != nil {
			t.Errorf("the owner elsewhere, a moment later: %v", err)
		}
		for i := range nameLoginBurst { // long names are all one, that is nobody's
			try(strings.Repeat("x", 1000+i), wrong, fmt.Sprint("4.4.4.", i))
		}
		if err := try(strings.Repeat("y", 1000), wrong, "3.3.3.3"); err == nil || err.Error() != "login_too_fast" {
			t.Errorf("one more long name: %v", err)
		}
	})
}

// An address opens so many sockets at once; proxies of ours are not counted.
func TestConnectThrottle(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, true)
		open := func(header string) int {
			p := &peer{t: t, conn: s.listener.dial()}
			defer func() { p.conn.Close() }()
			p.handshake("/ws/chat/x/", header)
			return p.res.StatusCode
		}
		for i := range connectBurst {
			for _, header := range []string{fmt.Sprintf("X-Forwarded-For: 2001:db8::%x", i), "X-None: x"} {
				if status := open(header); status != 101 {
					t.Fatalf("socket %d, %s: %d", i, header, status)
				}
			}
		}
		for header, want := range map[string]int{"X-Forwarded-For: 2001:db8::ffff": 429, "X-Forwarded-For: 9.9.9.9": 101, "X-None: x": 101} {
			if status := open(header); status != want {
				t.Errorf("%s: %d, want %d", header, status, want)
			}
		}
	})
}
