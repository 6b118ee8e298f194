package main

import (
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// newAdminServer has an administrator root, a member ann and a guest gus.
func newAdminServer(t *testing.T, dir string) *testServer {
	t.Helper()
	s := newTestServer(t, dir, true)
	for _, u := range []User{{Name: "root", Role: RoleAdmin}, {Name: "ann", Role: RoleMember}, {Name: "gus", Role: RoleGuest}} {
		if _, err := s.store.CreateUser(u.Name, u.Role, ""); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// manage posts a form to /admin/users as somebody.
func (s *testServer) manage(as, action, name string, role Role) (status int, text string) {
	s.t.Helper()
	form := url.Values{"action": {action}, "id": {fmt.Sprint(s.user(name).ID)}, "role": {string(role)}, "next": {"/admin/users/"}}
	status, _, text = s.browse("POST", "/admin/users", s.session(as), form.Encode())
	return status, text
}

// say puts a message into the log.
func (s *testServer) say(room Room, author, text string) Event {
	s.t.Helper()
	e, err := s.store.AppendWait(Event{Kind: KindMessage, Room: room, Author: s.user(author), Body: text})
	if err != nil {
		s.t.Fatal(err)
	}
	return e
}

// deeds is the audit log, oldest first.
func (s *testServer) deeds() (deeds []string) {
	s.t.Helper()
	entries, err := s.store.Audit(s.t.Context(), 1<<62, 100)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, a := range slices.Backward(entries) {
		deeds = append(deeds, strings.Join([]string{a.Admin, a.Action, a.Subject, a.Detail}, "|"))
	}
	return deeds
}

func TestAdminRoutes(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newAdminServer(t, dir)
		anonymous := map[string]int{"GET": 303, "POST": 401}
		for _, test := range []struct {
			method, path, body string
			status             int // for the administrator
			contains           string
		}{
			{"GET", "/admin/", "", 200, "Administrators</dt><dd>1<"},
			{"GET", "/admin/users/", "", 200, ">gus<"},
			{"POST", "/admin/users", "action=user.create&username=bob&role=member", 200, "The password of bob"},
			{"POST", "/admin/users", "action=user.create&username=bob&role=member", 409, `value="bob"`},
			{"POST", "/admin/users", "action=user.create&username=bea&role=guest", 400, ""},
			{"POST", "/admin/users", "action=user.role&id=2&role=king", 400, ""},
			{"POST", "/admin/users", "action=user.explode&id=2", 400, ""},
			{"POST", "/admin/users", "action=user.deactivate&id=999", 404, ""},
			{"POST", "/admin/users", "action=user.deactivate", 404, ""},
			{"GET", "/admin/messages/", "", 200, "No messages found"},
			{"GET", "/admin/messages/?from=yesterday", "", 400, ""},
			{"GET", "/admin/messages/?text=" + strings.Repeat("x", maxSearch+1), "", 400, ""},
			{"POST", "/admin/messages", "id=x", 400, ""},
			{"POST", "/admin/messages", strings.Repeat("id=1&", historyPage+1), 400, ""},
			{"POST", "/admin/messages", "id=1&next=/admin/messages/", 303, ""},
			{"GET", "/admin/audit/", "", 200, "Account made · <bdi>bob"},
		} {
			for cookie, status := range map[string]int{"": anonymous[test.method], s.session("ann"): 404, s.session("gus"): 404} {
				if got, _, text := s.browse(test.method, test.path, cookie, test.body); got != status || strings.Contains(text, `href="/admin`) {
					t.Errorf("%s %.40s %s with cookie %q: %d, want %d and nothing told\n%s", test.method, test.path, test.body, cookie, got, status, text)
				}
			}
			if got, _, text := s.browse(test.method, test.path, s.session("root"), test.body); got != test.status || !strings.Contains(text, test.contains) {
				t.Errorf("%s %.40s %s: %d, want %d with %q\n%s", test.method, test.path, test.body, got, test.status, test.contains, text)
			}
		}
	})
}

// The password that is shown once is the one that opens the account.
func TestCreateAccount(t *testing.T) {
	s := newAdminServer(t, t.TempDir())
	_, _, text := s.browse("POST", "/admin/users", s.session("root"), "action=user.create&username=Bob&role=admin")
	_, password, _ := strings.Cut(text, "The password of Bob, shown only this once: ")
	body := url.Values{"username": {"bob"}, "password": {password[:16]}}.Encode()
	if status, _, text := s.browse("POST", "/login/", "", body); status != 303 {
		t.Errorf("sign in with %q: %d\n%s", password[:16], status, text)
	}
	if status, _, _ := s.browse("GET", "/admin/", s.session("bob"), ""); status != 200 {
		t.Errorf("the new administrator: %d", status)
	}
}

// Who is deactivated is out at once, and stays out.
func TestAdminDeactivates(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newAdminServer(t, dir)
		if err := s.tryExec("UPDATE users SET password = ?", encodePassword(testPassword, "salt", 1000)); err != nil {
			t.Fatal(err)
		}
		sockets := map[string]*peer{"v1": s.dial("/ws", s.session("ann")), "chat": s.dial("/ws/chat/x/", s.session("ann")), "root": s.dial("/ws", s.session("root"))}
		for _, p := range sockets {
			go p.listen()
		}
		cookie, began := s.session("ann"), time.Now()
		if status, text := s.manage("root", "user.deactivate", "ann", ""); status != 303 {
			t.Fatalf("deactivate: %d\n%s", status, text)
		}
		synctest.Wait()
		for name, want := range map[string]string{"v1": "[closed 1008]", "chat": "[closed 1008]", "root": "[]"} {
			if got := fmt.Sprint(sockets[name].takeHeard()); got != want || time.Since(began) > time.Second {
				t.Errorf("%s: %s after %v, want %s", name, got, time.Since(began), want)
			}
		}
		login := url.Values{"username": {"ann"}, "password": {testPassword}}.Encode()
		signIn := func() int { status, _, _ := s.browse("POST", "/login/", "", login); return status }
		page := func() int { status, _, _ := s.browse("GET", "/chat/", cookie, ""); return status }
		if got := s.dial("/ws", cookie).res.StatusCode; page() != 303 || got != 401 || signIn() != 403 {
			t.Errorf("deactivated: page %d, socket %d, sign in %d", page(), got, signIn())
		}
		if err := s.store.CreateSession(s.user("ann"), hashToken("late"), "", ""); err != nil { // by who had signed in before
			t.Fatal(err)
		}
		if status, _, _ := s.browse("GET", "/chat/", "chatd=late", ""); status != 303 {
			t.Errorf("a late session: %d", status)
		}
		s.manage("root", "user.reactivate", "ann", "")
		if status, _, _ := s.browse("GET", "/chat/", "chatd=late", ""); page() != 303 || status != 303 || signIn() != 303 {
			t.Errorf("reactivated: old sessions %d %d, sign in %d", page(), status, signIn())
		}
		want := []string{"root|user.deactivate|ann|", "root|user.reactivate|ann|"}
		if got := s.deeds(); !slices.Equal(got, want) {
			t.Errorf("audit: %q, want %q", got, want)
		}
	})
}

// A socket that was let in before, and opens after, does not stay.
func TestDeactivateDuringHandshake(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newAdminServer(t, dir)
		s.http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			v, err := s.visitor(r)
			if _, failed := s.store.ChangeUser(s.user("root"), v.ID, "user.deactivate", ""); err != nil || failed != nil {
				t.Error(err, failed)
			}
			s.handleV1(w, r, v)
		})
		p := &peer{t: t, conn: s.listener.dial()}
		if err := p.tryHandshake("/ws", "Cookie: "+s.session("ann")); err == nil {
			t.Errorf("let in: %v", p.res.Status)
		}
		p.conn.Close()
	})
}

// A guest's name is nobody's to speak under any more, also where it was said before.
func TestDeactivateGuest(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newAdminServer(t, dir)
		p := s.dial("/ws/chat/x/", "")
		go p.listen()
		say := func() []string {
			p.send(opText, []byte(`{"message":"hi","username":"gus"}`))
			synctest.Wait()
			return p.takeHeard()
		}
		if got := fmt.Sprint(say()); !strings.Contains(got, `"username":"gus"`) {
			t.Fatalf("before: %s", got)
		}
		s.manage("root", "user.deactivate", "gus", "")
		synctest.Wait()
		if got := fmt.Sprint(p.takeHeard()); got != "[closed 1008]" {
			t.Errorf("the open socket: %s", got)
		}
		p = s.dial("/ws/chat/x/", "")
		go p.listen()
		if got := fmt.Sprint(say()); !strings.Contains(got, "name_taken") {
			t.Errorf("a new socket: %s", got)
		}
	})
}

func TestLastAdmin(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newAdminServer(t, dir)
		for _, test := range []struct {
			as, action, name string
			role             Role
			status           int
		}{
			{"root", "user.deactivate", "root", "", 409},
			{"root", "user.role", "root", RoleMember, 409},
			{"root", "user.role", "gus", RoleMember, 404}, // has no password
			{"root", "user.role", "ann", RoleAdmin, 303},
			{"root", "user.role", "root", RoleMember, 409},
			{"ann", "user.deactivate", "root", "", 303},
			{"root", "user.deactivate", "ann", "", 401},
			{"ann", "user.deactivate", "root", "", 404}, // is so already
			{"ann", "user.deactivate", "ann", "", 409},
			{"ann", "user.reactivate", "root", "", 303},
			{"root", "user.role", "ann", RoleMember, 303},
			{"ann", "user.deactivate", "root", "", 404},
		} {
			if status, text := s.manage(test.as, test.action, test.name, test.role); status != test.status {
				t.Errorf("%s: %s %s %s: %d, want %d\n%s", test.as, test.action, test.name, test.role, status, test.status, text)
			}
		}
		// Whoever was an administrator when the request came, and is none when its turn comes, may nothing.
		deeds := len(s.deeds())
		for _, change := range []string{"role = 'member'", "role = 'admin', deactivated = 1"} {
			s.exec("UPDATE users SET " + change + " WHERE name = 'ann'")
			if _, err := s.store.ChangeUser(User{ID: 2, Name: "ann", Role: RoleAdmin}, 1, "user.deactivate", ""); err != ErrForbidden {
				t.Errorf("by somebody with %s: %v", change, err)
			}
		}
		if root := s.user("root"); root.Role != RoleAdmin || deeds != 4 || len(s.deeds()) != deeds {
			t.Errorf("left: %v; audit: %q", root, s.deeds())
		}
	})
}

// Administrators delete what others said, from a page or over a socket. All who
// look on see it at once, and it is written down without the text.
func TestAdminDelete(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newAdminServer(t, dir)
		lobby := s.room("lobby")
		secret, err := s.store.CreatePrivateRoom("secret", s.user("ann"))
		if err != nil {
			t.Fatal(err)
		}
		club, err := s.store.CreatePrivateRoom("club", s.user("ann"), s.user("root"))
		if err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			s.say(lobby, "ann", fmt.Sprint("spam", i+1))
		}
		s.say(secret, "ann", "whispered")
		s.say(club, "ann", "shared")
		s.say(lobby, "root", "own")
		p, root := s.dial("/ws", s.session("ann")), s.dial("/ws", s.session("root"))
		for _, p := range []*peer{p, root} {
			go p.listen()
			p.send(opText, []byte(`{"type":"hello"}`))
		}
		_, _, text := s.browse("GET", "/admin/messages/", s.session("root"), "")
		if strings.Contains(text, "whispered") || !strings.Contains(text, "shared") {
			t.Errorf("private rooms: want shared and not whispered in\n%s", text)
		}
		synctest.Wait()
		p.takeHeard()
		if status, _, text := s.browse("POST", "/admin/messages", s.session("root"), "id=1&id=2&id=4&id=5&id=6&next=/admin/messages/"); status != 303 {
			t.Fatalf("delete: %d\n%s", status, text)
		}
		root.send(opText, []byte(`{"type":"delete","id":3}`))
		root.send(opText, []byte(`{"type":"delete","id":4}`))
		synctest.Wait()
		var deleted []string
		for _, frame := range p.takeHeard() {
			_, target, _ := strings.Cut(frame, `{"type":"delete",`)
			if _, target, ok := strings.Cut(target, `"target":`); ok {
				deleted = append(deleted, target[:1])
			}
		}
		if got := strings.Join(deleted, " "); got != "1 2 5 6 3" {
			t.Errorf("an open page was told of %s, want 1 2 5 6 3", got)
		}
		want := []string{"root|message.delete|ann|lobby #1", "root|message.delete|ann|lobby #2", "root|message.delete|ann|club #5", "root|message.delete|ann|lobby #3"}
		if got := s.deeds(); !slices.Equal(got, want) {
			t.Errorf("audit: %q, want %q", got, want)
		}
		p.send(opText, []byte(`{"type":"delete","id":6}`))
		if _, err := s.store.AppendWait(Event{Kind: KindDelete, Author: s.user("ann"), Target: s.say(lobby, "root", "x").ID}); err != ErrForbidden {
			t.Errorf("by a member: %v", err)
		}
	})
}

func TestAdminSearch(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newAdminServer(t, dir)
		lobby, other := s.room("Lobby"), s.room("大厅")
		s.say(lobby, "ann", "100% sure") // 1
		s.say(lobby, "ann", "1000 sure") // 2
		s.say(lobby, "gus", `a_b \ 你好`)  // 3
		s.say(lobby, "gus", "aXb")       // 4
		day := time.Now()
		time.Sleep(48 * time.Hour)
		s.say(other, "ann", "late sure") // 5
		date := func(days int) string { return day.AddDate(0, 0, days).Format(time.DateOnly) }
		for query, want := range map[string]string{
			"":                                    "5 4 3 2 1",
			"?room=LOBBY":                         "4 3 2 1",
			"?room=%E5%A4%A7%E5%8E%85":            "5",
			"?room=none":                          "",
			"?author=+Gus":                        "4 3",
			"?text=0%25":                          "1",
			"?text=a_b":                           "3",
			`?text=%5C`:                           "3",
			"?text=SURE":                          "5 2 1",
			"?text=%E4%BD%A0":                     "3",
			"?text=sure&room=lobby":               "2 1",
			"?before=4&author=ann":                "2 1",
			"?to=" + date(0):                      "4 3 2 1",
			"?from=" + date(1):                    "5",
			"?from=" + date(0) + "&to=" + date(1): "4 3 2 1",
			"?to=" + date(-1):                     "",
		} {
			if got, _ := s.found("/admin/messages/" + query); got != want {
				t.Errorf("%s: %q, want %q", query, got, want)
			}
		}
		for i := range 2 * historyPage {
			s.say(lobby, "ann", fmt.Sprint("page ", i))
		}
		var pages []int
		for next := "/admin/messages/?text=page"; next != ""; {
			var got string
			got, next = s.found(next)
			pages = append(pages, len(strings.Fields(got)))
		}
		if fmt.Sprint(pages) != "[50 50]" {
			t.Errorf("pages of %v, want [50 50]", pages)
		}
	})
}

// found returns the ids on a page of messages, and the address of the next one.
func (s *testServer) found(path string) (ids, next string) {
	s.t.Helper()
	status, _, text := s.browse("GET", path, s.session("root"), "")
	if status != 200 {
		s.t.Fatalf("%s: %d\n%s", path, status, text)
	}
	var all []string
	for part := range strings.SplitSeq(text, `name="id" value="`) {
		if id, _, ok := strings.Cut(part, `" aria-label`); ok && !strings.HasPrefix(id, "<") {
			all = append(all, id)
		}
	}
	if _, link, ok := strings.Cut(text, `<p class="older"><a href="`); ok {
		link, _, _ = strings.Cut(link, `"`)
		next = strings.ReplaceAll(link, "&amp;", "&")
	}
	return strings.Join(all, " "), next
}

// What is written down is shown page by page, and stays as it is.
func TestAudit(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newAdminServer(t, dir)
		s.manage("root", "user.role", "ann", RoleAdmin)
		for _, query := range []string{"UPDATE audit SET subject = 'x'", "DELETE FROM audit", "REPLACE INTO audit SELECT id, time, admin, action, 'x', detail FROM audit"} {
			if err := s.tryExec(query); err == nil {
				t.Errorf("%s succeeded", query)
			}
		}
		if got := s.deeds(); !slices.Equal(got, []string{"root|user.role|ann|admin"}) {
			t.Errorf("audit: %q", got)
		}
		err := s.store.update(func(w *writer) (err error) {
			for i := 0; i < historyPage && err == nil; i++ {
				err = w.audit(User{}, "test", fmt.Sprint("deed", i), "")
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		_, _, first := s.browse("GET", "/admin/audit/", s.session("root"), "")
		_, _, second := s.browse("GET", "/admin/audit/?before=2", s.session("root"), "")
		if strings.Index(first, "deed49") > strings.Index(first, "deed0<") || !strings.Contains(first, `href="/admin/audit/?before=2"`) ||
			!strings.Contains(first, "command line") || !strings.Contains(second, ">ann<") || strings.Contains(second, "deed") {
			t.Errorf("pages:\n%s\n%s", first, second)
		}
	})
}

// tryExec is exec for what may be refused.
func (s *testServer) tryExec(query string, args ...any) error {
	return s.store.update(func(w *writer) error { return w.exec(query, args...) })
}

// A guest link is made on a page, leads into one room, and ends with its guests.
func TestAdminInvites(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newAdminServer(t, dir)
		lobby, other := s.room("lobby"), s.room("other")
		status, _, text := s.browse("POST", "/admin/invites", s.session("root"), "kind=guest&name=lobby&days=1&uses=2")
		link := regexp.MustCompile(`http://chat.test(/invite/\w+)`).FindStringSubmatch(text)
		if status != 200 || link == nil {
			t.Fatalf("no link: %d\n%s", status, text)
		}
		_, to, cookie, _ := s.submit(link[1], "username", "visitor")
		if to != "/chat/lobby/" {
			t.Errorf("the guest is led to %q", to)
		}
		p := s.dial("/ws", cookie)
		go p.listen()
		p.send(opText, []byte(`{"type":"hello","since":0}`))
		synctest.Wait()
		s.say(lobby, "ann", "for guests too")
		s.say(other, "ann", "not for guests")
		s.hub.Publish([]Event{{Kind: KindTyping, Room: lobby}, {Kind: KindTyping, Room: other}}) // in one commit, as it were
		synctest.Wait()
		if heard := strings.Join(p.takeHeard(), "\n"); !strings.Contains(heard, "for guests too") || strings.Contains(heard, "not for guests") || strings.Contains(heard, `"room":"other"`) {
			t.Errorf("the guest heard %s", heard)
		}
		for path, want := range map[string]int{"/chat/lobby/": 200, "/chat/other/": 404, "/chat/new/": 404, "/chat/@ann/": 404} {
			if status, _, _ := s.browse("GET", path, cookie, ""); status != want {
				t.Errorf("a guest of the lobby at %s: %d, want %d", path, status, want)
			}
		}
		if status, _, _ := s.browse("POST", "/admin/invites", s.session("root"), "action=invite.revoke&id=1"); status != 303 {
			t.Errorf("revoke: %d", status)
		}
		synctest.Wait()
		if heard := p.takeHeard(); !slices.Contains(heard, fmt.Sprint("closed ", closePolicy)) {
			t.Errorf("the guest's socket heard %q", heard)
		}
		if status, _, _ := s.browse("GET", "/chat/lobby/", cookie, ""); status != 303 {
			t.Errorf("the guest's session: %d", status)
		}
		if u, _, err := s.store.UserByName(t.Context(), "visitor"); err != nil || !u.Deactivated {
			t.Errorf("the guest is %+v, %v", u, err)
		}
		want := []string{"root|invite.create|lobby|guest × 2", "root|invite.revoke|#1|"}
		if got := s.deeds(); !slices.Equal(got, want) {
			t.Errorf("audit: %q, want %q", got, want)
		}
	})
}

// Signing somebody out ends all that is open, and no more.
func TestAdminSignOut(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newAdminServer(t, dir)
		ann := s.session("ann")
		p := s.dial("/ws", ann)
		go p.listen()
		if status, text := s.manage("root", "user.signout", "ann", ""); status != 303 {
			t.Fatalf("%d\n%s", status, text)
		}
		synctest.Wait()
		if heard := p.takeHeard(); !slices.Contains(heard, fmt.Sprint("closed ", closePolicy)) {
			t.Errorf("the socket heard %q", heard)
		}
		if status, _, _ := s.browse("GET", "/chat/", ann, ""); status != 303 {
			t.Errorf("the old session: %d", status)
		}
		if status, _, _ := s.browse("GET", "/chat/", s.session("ann"), ""); status != 200 {
			t.Errorf("a new session: %d", status)
		}
		if got, want := s.deeds(), []string{"root|user.signout|ann|"}; !slices.Equal(got, want) {
			t.Errorf("audit: %q, want %q", got, want)
		}
	})
}
