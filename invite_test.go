package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// invite makes an invite by the administrator "Root" and returns the path of its link.
func (s *testServer) invite(in Invite, ttl time.Duration) string {
	s.t.Helper()
	if _, _, err := s.store.UserByName(s.t.Context(), "Root"); err != nil {
		if _, err := s.store.CreateUser("Root", RoleAdmin, ""); err != nil {
			s.t.Fatal(err)
		}
	}
	in.Creator, in.Uses = "root", max(1, in.Uses)
	token, err := s.store.CreateInvite(in, ttl)
	if err != nil {
		s.t.Fatal(err)
	}
	return "/invite/" + token
}

// submit posts a form and returns where it leads, the session that it starts, and the page.
func (s *testServer) submit(path string, form ...string) (status int, location, cookie, text string) {
	values := url.Values{}
	for i := 0; i < len(form); i += 2 {
		values.Set(form[i], form[i+1])
	}
	r := httptest.NewRequestWithContext(s.t.Context(), "POST", path, strings.NewReader(values.Encode()))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	w := httptest.NewRecorder()
	s.http.Handler.ServeHTTP(w, r)
	for _, c := range w.Result().Cookies() {
		cookie = c.Name + "=" + c.Value
	}
	return w.Code, w.Header().Get("Location"), cookie, w.Body.String()
}

// exec changes the database as no method does.
func (s *testServer) exec(query string, args ...any) {
	s.t.Helper()
	if err := s.store.update(func(w *writer) error { return w.exec(query, args...) }); err != nil {
		s.t.Fatal(err)
	}
}

func TestInvites(t *testing.T) {
	s := newTestServer(t, t.TempDir(), false)
	s.room("大厅")
	for _, test := range []struct {
		invite Invite
		role   Role
		leads  string
		says   []string
	}{
		{Invite{Kind: inviteAccount, Role: RoleMember}, RoleMember, "/chat/", []string{"Root invites you to this team chat"}},
		{Invite{Kind: inviteAccount, Role: RoleAdmin}, RoleAdmin, "/chat/", []string{"administrator"}},
		{Invite{Kind: inviteGuest, Room: "大厅"}, RoleGuest, "/chat/%E5%A4%A7%E5%8E%85/", []string{"Root invites you into the room “大厅”", "You can stay until"}},
	} {
		path := s.invite(test.invite, time.Hour)
		_, _, page := s.browse("GET", path, "", "")
		for _, want := range test.says {
			if !strings.Contains(page, want) {
				t.Errorf("the page for %+v does not say %q:\n%s", test.invite, want, page)
			}
		}
		name := "new " + string(test.role)
		status, location, cookie, text := s.submit(path, "username", name, "password", testPassword)
		if status != 303 || location != test.leads {
			t.Fatalf("%+v: %d %q, want 303 %q\n%s", test.invite, status, location, test.leads, text)
		}
		if status, _, text := s.browse("GET", location, cookie, ""); status != 200 || !strings.Contains(text, name) {
			t.Errorf("%s is not in: %d\n%s", name, status, text)
		}
		all, err := s.store.Invites(t.Context())
		if err != nil || all[0].Works || all[0].Uses != 0 || all[0].Creator != "Root" || all[0].UsedBy != name {
			t.Errorf("afterwards the invite is %+v, %v", all, err)
		}
		u, encoded, err := s.store.UserByName(t.Context(), name)
		if err != nil || u.Role != test.role || passwordMatches(encoded, testPassword) != (test.role != RoleGuest) {
			t.Errorf("%s is %+v %q, %v", name, u, encoded, err)
		}
		var confined bool
		var expires int64
		var room string
		err = s.store.read.QueryRow(`SELECT confined, coalesce(expires, 0), coalesce((SELECT r.name FROM members m JOIN rooms r ON r.id = m.room WHERE m.user = u.id), '')
			FROM users u WHERE id = ?`, u.ID).Scan(&confined, &expires, &room)
		guest := test.role == RoleGuest
		if err != nil || confined != guest || room != test.invite.Room || guest && expires != all[0].Expires.UnixMilli() || !guest && expires != 0 {
			t.Errorf("%s: confined %v to %q until %d, %v", name, confined, room, expires, err)
		}
	}
}

// Links that do not work are told apart by nothing.
func TestInviteEnds(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		s.room("x")
		ann := s.user("ann")
		guests := Invite{Kind: inviteGuest, Room: "X", Uses: 2}
		for name, end := range map[string]func(path string, in Invite){
			"used up": func(path string, _ Invite) {
				for i := range 2 {
					if status, _, _, text := s.submit(path, "username", fmt.Sprint("guest ", i)); status != 303 {
						t.Errorf("use %d: %d\n%s", i, status, text)
					}
				}
			},
			"expired":         func(string, Invite) { time.Sleep(time.Hour) },
			"revoked":         func(_ string, in Invite) { s.store.RevokeInvite(in.ID, User{}) },
			"creator demoted": func(string, Invite) { s.exec("UPDATE users SET role = 'member' WHERE name = 'Root'") },
			"creator gone":    func(string, Invite) { s.exec("UPDATE users SET deactivated = 1 WHERE name = 'Root'") },
			"never there":     func(string, Invite) { s.exec("DELETE FROM invite_uses"); s.exec("DELETE FROM invites") },
		} {
			path := s.invite(guests, time.Hour)
			in, err := s.store.InviteByToken(t.Context(), strings.TrimPrefix(path, "/invite/"))
			if err != nil || in.Uses != 2 || in.Expires.Sub(in.Created) != time.Hour {
				t.Fatalf("%+v, %v", in, err)
			}
			end(path, in)
			unknownStatus, _, _, unknown := s.submit("/invite/nonsense", "username", "late")
			status, _, _, text := s.submit(path, "username", "late")
			if page, _, _ := s.browse("GET", path, "", ""); page != 410 || status != 410 || unknownStatus != 410 || text != unknown {
				t.Errorf("%s: %d, then %d; want 410, and nothing else than for an unknown link:\n%s", name, page, status, text)
			}
			s.exec("UPDATE users SET role = 'admin', deactivated = NULL WHERE name = 'Root'")
			time.Sleep(time.Minute) // for the throttle
		}
		reset := s.invite(Invite{Kind: inviteReset, User: "ann"}, time.Hour)
		s.exec("UPDATE users SET deactivated = 1 WHERE id = ?", ann.ID)
		if status, _, _ := s.browse("GET", reset, "", ""); status != 410 {
			t.Errorf("a new password for who is deactivated: %d, want 410", status)
		}
	})
}

// What is refused costs no use and is typed only once.
func TestInviteRefused(t *testing.T) {
	s := newTestServer(t, t.TempDir(), false)
	s.room("x")
	account := s.invite(Invite{Kind: inviteAccount, Role: RoleMember}, time.Hour)
	guest := s.invite(Invite{Kind: inviteGuest, Room: "x"}, time.Hour)
	for _, test := range []struct {
		path, name, password string
		status               int
	}{
		{account, "ANN", testPassword, 409},
		{account, anonymousGuest, testPassword, 409},
		{account, "a/b", testPassword, 400},
		{account, "bob", "short", 400},
		{account, "bob", testPassword, 303},
		{account, "bert", testPassword, 410},
		{guest, "ann", "", 409},
		{guest, anonymousGuest, "", 409},
		{guest, "", "", 400},
		{guest, "游客 2", "", 303},
	} {
		status, _, cookie, text := s.submit(test.path, "username", test.name, "password", test.password)
		if status != test.status || (cookie != "") != (status == 303) || status < 410 && status != 303 && !strings.Contains(text, `value="`+test.name+`"`) {
			t.Errorf("as %q: %d %q, want %d\n%s", test.name, status, cookie, test.status, text)
		}
	}
	for _, in := range []Invite{
		{Kind: inviteReset, User: "游客 2", Uses: 1}, {Kind: inviteReset, User: "nobody"}, {Kind: inviteReset}, {Kind: inviteGuest, Room: "y", Uses: 1},
		{Kind: inviteAccount, Role: RoleMember, Creator: "nobody", Uses: 1}, {Kind: inviteAccount, Role: RoleMember}, {Kind: inviteAccount, Role: RoleGuest, Uses: 1}, {},
	} {
		if token, err := s.store.CreateInvite(in, time.Hour); err == nil || problemOf(err).status >= 500 {
			t.Errorf("%+v: %q, %v; want a refusal", in, token, err)
		}
	}
}

// However many use the last use of a link at once, one gets it.
func TestInviteOnce(t *testing.T) {
	s := newTestServer(t, t.TempDir(), false)
	path := s.invite(Invite{Kind: inviteAccount, Role: RoleMember}, time.Hour)
	var mu sync.Mutex
	statuses := make(map[int]int)
	var all sync.WaitGroup
	for i := range 6 {
		all.Go(func() {
			status, _, _, _ := s.submit(path, "username", fmt.Sprint("user ", i), "password", testPassword)
			mu.Lock()
			defer mu.Unlock()
			statuses[status]++
		})
	}
	all.Wait()
	var users int
	if err := s.store.read.QueryRow("SELECT count(*) FROM users WHERE name LIKE 'user %'").Scan(&users); err != nil {
		t.Fatal(err)
	}
	if statuses[303] != 1 || statuses[410] != 5 || users != 1 {
		t.Errorf("six at once got %v and made %d users; want one 303 and five 410", statuses, users)
	}
}

// A reset ends all sessions of the user, and their sockets at once, and nobody else's.
func TestReset(t *testing.T) {
	s := newTestServer(t, t.TempDir(), false)
	s.room("x")
	old, other := s.dial("/ws/chat/x/", s.session("ann")), s.dial("/ws/chat/x/", s.session("bob"))
	path := s.invite(Invite{Kind: inviteReset, User: "Ann", Uses: 7}, time.Hour)
	if _, _, text := s.browse("GET", path, "", ""); !strings.Contains(text, "for the account “ann”") {
		t.Errorf("the page does not say whose password it is:\n%s", text)
	}
	for _, test := range []struct {
		first, second string
		status        int
	}{{"short", "short", 400}, {testPassword, "other", 400}} {
		if status, _, _, _ := s.submit(path, "new", test.first, "again", test.second); status != test.status {
			t.Errorf("%q and %q: %d, want %d", test.first, test.second, status, test.status)
		}
	}
	status, location, cookie, text := s.submit(path, "new", testPassword, "again", testPassword)
	if status != 303 || location != "/chat/" {
		t.Fatalf("%d %q\n%s", status, location, text)
	}
	if opcode, _, err := old.said(); opcode != opClose || err != nil {
		t.Errorf("the old socket got opcode %d, %v; want a Close", opcode, err)
	}
	other.send(opText, []byte(`{"message":"still here"}`))
	if opcode, _, err := other.said(); opcode != opText || err != nil {
		t.Errorf("another user's socket got opcode %d, %v", opcode, err)
	}
	for session, want := range map[string]int{cookie: 200, sessionCookie + "=token-of-ann": 303, sessionCookie + "=token-of-bob": 200} {
		if status, _, _ := s.browse("GET", "/chat/", session, ""); status != want {
			t.Errorf("the session %s: %d, want %d", session, status, want)
		}
	}
	if status, _, _, _ := s.submit("/login/", "username", "ann", "password", testPassword); status != 303 {
		t.Errorf("with the new password: %d, want 303", status)
	}
	if status, _, _, _ := s.submit(path, "new", testPassword, "again", testPassword); status != 410 {
		t.Errorf("the link once more: %d, want 410", status)
	}
	old.conn.Close()
	other.conn.Close()
}

func TestInviteThrottle(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		right := s.invite(Invite{Kind: inviteAccount, Role: RoleMember}, time.Hour)
		open := func(path, from string, want int) {
			t.Helper()
			if status, _, _ := s.browse("GET", path, "", "", "X-Forwarded-For: "+from); status != want {
				t.Errorf("%s from %s: %d, want %d", path, from, status, want)
			}
		}
		for i := range inviteBurst {
			open(fmt.Sprint("/invite/guess", i), "9.9.9.9", 410)
		}
		open(right, "9.9.9.9", 429)
		open("/invite/guess", "9.9.9.9", 429)
		open(right, "8.8.8.8", 200)
		time.Sleep(time.Minute)
		open(right, "9.9.9.9", 200)
	})
}

func TestRegister(t *testing.T) {
	s := newTestServer(t, t.TempDir(), false)
	if status, _, _ := s.browse("GET", "/register/", "", ""); status != 404 {
		t.Errorf("the page where nobody may register: %d, want 404", status)
	}
	if status, _, _, _ := s.submit("/register/", "username", "bob", "password", testPassword); status != 404 {
		t.Errorf("where nobody may register: %d, want 404", status)
	}
	if _, _, text := s.browse("GET", "/login/", "", ""); strings.Contains(text, "/register/") {
		t.Error("the login page leads to where nobody may register")
	}
	s.register = true
	if _, _, text := s.browse("GET", "/login/", "", ""); !strings.Contains(text, `href="/register/"`) {
		t.Errorf("the login page does not lead to the registration:\n%s", text)
	}
	if status, _, text := s.browse("GET", "/register/", "", ""); status != 200 || !strings.Contains(text, "Make an account") {
		t.Errorf("the page: %d\n%s", status, text)
	}
	status, location, cookie, text := s.submit("/register/", "username", "bob", "password", testPassword)
	if status != 303 || location != "/chat/" || cookie == "" {
		t.Errorf("%d %q %q\n%s", status, location, cookie, text)
	}
	if u, _, err := s.store.UserByName(t.Context(), "bob"); err != nil || u.Role != RoleMember {
		t.Errorf("bob is %+v, %v", u, err)
	}
	for range loginBurst - 1 {
		if status, _, _, text := s.submit("/register/", "username", "bob", "password", "short"); status != 400 || !strings.Contains(text, `value="bob"`) {
			t.Errorf("with a short password: %d\n%s", status, text)
		}
	}
	if status, _, _, _ := s.submit("/register/", "username", "carl", "password", testPassword); status != 429 {
		t.Errorf("after %d accounts: %d, want 429", loginBurst, status)
	}
}

func TestInviteCommand(t *testing.T) {
	d := startDaemon(t, t.TempDir())
	root := d.setUp("Root")
	d.post(root, "/chat/大厅/", url.Values{"message": {"hello"}})
	link := func(args ...string) string {
		t.Helper()
		cmd := chatdCommand(append([]string{"invite", "-data", d.dir, "-url", d.url("")}, args...)...)
		out, err := cmd.Output()
		path, ok := strings.CutPrefix(string(out), d.url("/invite/"))
		if err != nil || !ok || strings.Count(path, "\n") != 1 {
			t.Fatalf("chatd invite %v: %v, %q", args, err, out)
		}
		return "/invite/" + strings.TrimSuffix(path, "\n")
	}
	use := func(path string, form url.Values) *http.Client {
		t.Helper()
		c := newBrowserlessClient()
		d.post(c, path, form)
		return c
	}
	member := url.Values{"username": {"ann"}, "password": {testPassword}}
	d.get(use(link(), member), "/account/")
	use(link("-guest", "大厅", "-uses", "2", "-days", "1"), url.Values{"username": {"visitor"}})
	use(link("-reset", "ANN"), url.Values{"new": {"another password"}, "again": {"another password"}})
	use("/login/", url.Values{"username": {"ann"}, "password": {"another password"}})
	use(link("-admin"), url.Values{"username": {"bert"}, "password": {testPassword}})

	for args, want := range map[string]string{
		"-reset nobody":     "invite nobody: not found",
		"-reset visitor":    "invite visitor: not found",
		"-guest nowhere":    "invite nowhere: not found",
		"-reset ann -admin": "say chatd invite",
		"-reset ann bob":    "say chatd invite",
		"-reset=":           "invite : not found",
		"ann":               "say chatd invite",
		"-uses 0":           "1 to",
		"-days 4000":        "1 to",
		"-url chat.test":    "-url",
		"-fly":              "-fly",
	} {
		out, err := chatdCommand(append([]string{"invite", "-data", d.dir}, strings.Fields(args)...)...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) || strings.Count(string(out), "\n") != 1 {
			t.Errorf("chatd invite %s: %v, want one line with %q in\n%s", args, err, want, out)
		}
	}
	d.stop()
	store, err := OpenStore(d.dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if u, _, err := store.UserByName(t.Context(), "bert"); err != nil || u.Role != RoleAdmin {
		t.Errorf("bert is %+v, %v", u, err)
	}
	all, err := store.Invites(t.Context())
	if err != nil || len(all) != 4 || all[2].Room != "大厅" || all[2].Uses != 1 || all[2].Creator != "" || all[0].Expires.Sub(all[0].Created) != 7*24*time.Hour {
		t.Errorf("the invites are %+v, %v", all, err)
	}
}
