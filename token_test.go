package main

import (
	"bufio"
	"errors"
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

var madeSecret = regexp.MustCompile(`id="secret" value="(\w+)"`)

// makeToken sends the form of a page for tokens, and returns status, page, and the
// secret as "Bearer …".
func (s *testServer) makeToken(as, path string, form ...string) (status int, text, secret string) {
	s.t.Helper()
	values := url.Values{"scope": {scopeBoth}}
	for i := 0; i < len(form); i += 2 {
		values.Set(form[i], form[i+1])
	}
	status, _, text = s.browse("POST", path, s.session(as), values.Encode())
	if m := madeSecret.FindStringSubmatch(text); m != nil {
		secret = "Bearer " + m[1]
	}
	return status, text, secret
}

// tap opens a stream and writes down its lines, and its end.
func (s *testServer) tap(path, secret string) *peer {
	p := &peer{t: s.t, conn: s.listener.dial()}
	s.t.Cleanup(func() { p.conn.Close() })
	go func() {
		fmt.Fprintf(p.conn, "GET %s HTTP/1.1\r\nHost: chat.test\r\nAuthorization: %s\r\n\r\n", path, secret)
		for lines := bufio.NewScanner(p.conn); lines.Scan(); {
			p.note("%s", lines.Text())
		}
		p.note("hung up")
	}()
	synctest.Wait()
	return p
}

// hungUp reports whether a stream is over.
func (p *peer) hungUp() bool {
	time.Sleep(2 * lingerWait)
	return slices.Contains(p.takeHeard(), "hung up")
}

func TestTokenPages(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		s.room("lobby")
		if _, err := s.store.CreatePrivateRoom("secret", s.user("bob")); err != nil {
			t.Fatal(err)
		}
		s.store.CreateUser("guest", RoleGuest, "")
		for _, test := range []struct {
			who    string
			form   []string
			status int
		}{
			{"ann", []string{"room", "secret"}, 404},
			{"ann", []string{"room", "nowhere"}, 404},
			{"ann", []string{"scope", "all"}, 400},
			{"ann", []string{"days", "0"}, 400},
			{"ann", []string{"days", "soon"}, 400},
			{"ann", []string{"days", "99999999999"}, 400},
			{"ann", []string{"label", strings.Repeat("字", 65)}, 400},
			{"ann", []string{"label", "a\tb"}, 400},
			{"guest", nil, 403},
		} {
			if status, text, secret := s.makeToken(test.who, "/account/tokens", test.form...); status != test.status || secret != "" ||
				test.who == "ann" && !strings.Contains(text, fmt.Sprintf(`value="%s"`, test.form[1])) && test.form[0] != "scope" {
				t.Errorf("%s with %q: %d, want %d\n%s", test.who, test.form, status, test.status, text)
			}
		}
		if _, _, text := s.browse("GET", "/account/", s.session("guest"), ""); strings.Contains(text, "/account/tokens") {
			t.Error("a guest is offered tokens")
		}
		time.Sleep(time.Minute) // for the throttle
		status, text, secret := s.makeToken("ann", "/account/tokens", "label", "nightly <build>", "room", "LOBBY", "days", "2")
		if status != 200 || !strings.Contains(text, "-d hello http://chat.test/chat/lobby/</code>") || !strings.Contains(text, "nightly &lt;build&gt;") {
			t.Fatalf("%d\n%s", status, text)
		}
		if status, _, text := s.browse("POST", "/chat/lobby/", secret, "message=by+token"); status != 200 || !strings.Contains(text, `"username":"ann"`) {
			t.Errorf("the token: %d %s", status, text)
		}
		if _, _, text := s.browse("GET", "/account/", s.session("ann"), ""); strings.Contains(text, "Bearer") || strings.Contains(text, "never used") {
			t.Errorf("later the page says\n%s", text)
		}
		_, _, other := s.makeToken("ann", "/account/tokens")
		stream, socket, untouched := s.tap("/chat/lobby/", secret), s.dial("/ws/lobby/", secret), s.tap("/chat/lobby/", other)
		go socket.listen()
		revoke := func(as string) int {
			status, _, _ := s.makeToken(as, "/account/tokens", "action", "revoke", "id", "1")
			return status
		}
		if status := revoke("bob"); status != 404 || stream.hungUp() {
			t.Errorf("revoked by somebody else: %d", status)
		}
		if status := revoke("ann"); status != 200 || !socket.ended() || !stream.hungUp() || untouched.hungUp() {
			t.Errorf("revoked: %d; or the socket, or the stream, is not the only one that is over", status)
		}
		if status, _, _ := s.browse("GET", "/chat/lobby/", secret, ""); status != 401 {
			t.Errorf("the revoked token: %d, want 401", status)
		}
	})
}

func TestBotPages(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, true)
		s.user("root")
		s.exec("UPDATE users SET role = 'admin' WHERE name = 'root'")
		for room, creator := range map[string]string{"anns": "ann", "bobs": "bob", "old": "ann"} {
			r, err := s.store.CreatePrivateRoom(room, s.user(creator), s.user("root"))
			if r.Archived = room == "old"; err == nil && r.Archived {
				err = s.store.ChangeRoom(r, s.user(creator))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.store.DirectRoom(s.user("ann"), s.user("root")); err != nil {
			t.Fatal(err)
		}
		secrets := make(map[string]string)
		for i, test := range []struct {
			who, room, bot string
			status         int
		}{
			{"ann", "anns", "robot", 200},
			{"ann", "anns", "ROBOT", 200},  // one of her own
			{"ann", "anns", "bob", 409},    // a person
			{"ann", "anns", "游客", 409},     // nobody's
			{"ann", "anns", "a/b", 400},    //
			{"bob", "bobs", "robot", 409},  // another's
			{"root", "bobs", "robot", 200}, // an administrator may
			{"bob", "anns", "spy", 404},    // he does not see it
			{"ann", "old", "robot", 403},   //
			{"root", "ann+root", "robot", 403},
		} {
			status, text, secret := s.makeToken(test.who, roomPath(test.room)+"about/tokens", "username", test.bot)
			if status != test.status || (secret != "") != (status == 200) {
				t.Errorf("%d: %+v: %d\n%s", i, test, status, text)
			}
			if secret != "" {
				secrets[test.room] = secret
			}
		}
		if deeds := s.deeds(); !slices.Equal(deeds, []string{"root|token.create|robot|bobs"}) {
			t.Errorf("audited: %q", deeds)
		}
		if status, _, text := s.browse("POST", "/chat/anns/", secrets["anns"], "message=beep"); status != 200 || !strings.Contains(text, `"bot":true`) {
			t.Errorf("the bot: %d %s", status, text)
		}
		if status, _, _ := s.browse("GET", "/chat/bobs/", secrets["anns"], ""); status != 404 {
			t.Errorf("the bot in its other room, by a token for one: %d", status)
		}
		if _, _, text := s.browse("GET", "/chat/anns/", s.session("ann"), ""); !strings.Contains(text, `robot</span> <span class="tag">bot</span>`) {
			t.Errorf("it is not marked:\n%s", text)
		}
		stream := s.tap("/chat/bobs/", secrets["bobs"])
		revoke := func(as, room, id string) int {
			status, _, _ := s.makeToken(as, roomPath(room)+"about/tokens", "action", "revoke", "id", id)
			return status
		}
		if status := revoke("bob", "bobs", "1"); status != 404 { // of another room
			t.Errorf("revoked from elsewhere: %d", status)
		}
		if _, err := s.store.CreateToken(Token{User: "root", Room: "bobs", Scope: scopeRead}); err != nil {
			t.Fatal(err)
		}
		if status := revoke("bob", "bobs", "4"); status != 404 { // a person's
			t.Errorf("revoked by another person: %d", status)
		}
		if status := revoke("bob", "bobs", "3"); status != 200 || !stream.hungUp() {
			t.Errorf("revoked by who manages the room: %d, or the stream goes on", status)
		}
	})
}

// Bots are no accounts, and whoever is shown out is out by every token.
func TestBotEnds(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		s.room("lobby")
		s.user("root")
		s.exec("UPDATE users SET role = 'admin' WHERE name = 'root'")
		streams := make(map[string]*peer)
		secrets := make(map[string]string)
		for _, bot := range []string{"one", "two"} {
			_, _, secrets[bot] = s.makeToken("ann", "/chat/lobby/about/tokens", "username", bot)
			streams[bot] = s.tap("/chat/lobby/", secrets[bot])
		}
		if status, _ := s.manage("root", "user.role", "one", RoleAdmin); status != 404 || s.user("one").Role != RoleMember {
			t.Errorf("a bot became administrator: %d", status)
		}
		if _, _, text := s.browse("GET", "/admin/users/", s.session("root"), ""); strings.Count(text, `<span class="tag">bot</span>`) != 2 {
			t.Errorf("administrators do not see what is a bot:\n%s", text)
		}
		if _, err := s.store.CreateInvite(Invite{Kind: inviteReset, User: "one", Creator: "root"}, time.Hour); !errors.Is(err, ErrNotFound) {
			t.Errorf("a link for a bot's password: %v", err)
		}
		s.exec("UPDATE users SET password = ? WHERE name = 'one'", encodePassword(testPassword, "salt", 1000))
		if status, _, _, _ := s.submit("/login/", "username", "one", "password", testPassword); status != 403 {
			t.Errorf("a bot signed in: %d", status)
		}
		if status, _ := s.manage("root", "user.deactivate", "one", ""); status != 303 || !streams["one"].hungUp() || streams["two"].hungUp() {
			t.Errorf("deactivated: %d, or not its stream alone is over", status)
		}
		if status, _ := s.manage("root", "user.reactivate", "one", ""); status != 303 {
			t.Errorf("reactivated: %d", status)
		}
		if status, _, _ := s.browse("GET", "/chat/lobby/", secrets["one"], ""); status != 401 {
			t.Errorf("its token lives on: %d", status)
		}
		if status, _ := s.manage("root", "user.deactivate", "ann", ""); status != 303 || !streams["two"].hungUp() {
			t.Errorf("who made it deactivated: %d, or its stream goes on", status)
		}
		for _, secret := range secrets {
			if status, _, _ := s.browse("GET", "/chat/lobby/", secret, ""); status != 401 {
				t.Errorf("a token that is dead: %d", status)
			}
		}
	})
}

// A token for one room sees nothing of others: no history, no replay, nothing live.
func TestOneRoomToken(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		lobby, other := s.room("lobby"), s.room("other")
		secret, err := s.store.CreateToken(Token{User: "ann", Room: "lobby", Scope: scopeBoth})
		if err != nil {
			t.Fatal(err)
		}
		bearer := "Bearer " + secret
		before := s.say(other, "ann", "elsewhere, before")
		s.say(lobby, "ann", "here, before")
		replayed, live, stream := s.dial("/ws", bearer), s.dial("/ws", bearer), s.tap("/chat/lobby/?since=0", bearer)
		go replayed.listen()
		go live.listen()
		replayed.send(opText, []byte(`{"type":"hello","since":0}`))
		live.send(opText, []byte(`{"type":"hello"}`))
		synctest.Wait()
		s.say(other, "ann", "elsewhere, later")
		s.say(lobby, "ann", "here, later")
		if _, err := s.store.CreateRoom("newest", s.user("ann")); err != nil {
			t.Fatal(err)
		}
		replayed.send(opText, fmt.Appendf(nil, `{"type":"message","room":"lobby","message":"x","reply_to":%d}`, before.ID))
		replayed.send(opText, fmt.Appendf(nil, `{"type":"react","id":%d,"emoji":"👍"}`, before.ID))
		synctest.Wait()
		for p, want := range map[*peer]int{replayed: 2, live: 1, stream: 2} {
			heard := strings.Join(p.takeHeard(), "\n")
			if strings.Contains(heard, "other") || strings.Contains(heard, "elsewhere") || strings.Contains(heard, "newest") || strings.Count(heard, "here, ") != want {
				t.Errorf("heard, not %d times from here:\n%s", want, heard)
			}
			if p == replayed && strings.Count(heard, "not_found") != 2 {
				t.Errorf("an answer to elsewhere:\n%s", heard)
			}
		}
		for _, path := range []string{"/chat/other/", "/chat/other/?since=0", "/chat/newer/", "/ws/other/", "/ws/push/other"} {
			if status, _, text := s.browse("GET", path, bearer, "", "Accept: application/json"); status != 404 && status != 426 {
				t.Errorf("%s: %d %s", path, status, text)
			}
		}
		if p := s.dial("/ws/other/", bearer); p.res.StatusCode != 404 {
			t.Errorf("a socket elsewhere: %d", p.res.StatusCode)
		}
	})
}

// Who may only post hears what came of that, and nothing else.
func TestPostingToken(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		s.room("lobby")
		secret, err := s.store.CreateToken(Token{User: "ann", Scope: scopePost})
		if err != nil {
			t.Fatal(err)
		}
		s.tell("bob", "lobby", "private before")
		for path, hello := range map[string]string{"/ws": `{"type":"hello"}`, "/ws/lobby/": "hello", "/ws/chat/lobby/?since=0": `{"message":"hello"}`} {
			p := s.dial(path, "Bearer "+secret)
			go p.listen()
			p.send(opText, []byte(hello))
			synctest.Wait()
			s.tell("bob", "lobby", "private now")
			synctest.Wait()
			if heard := strings.Join(p.takeHeard(), "\n"); strings.Contains(heard, "private") || !strings.Contains(heard, "hello") && !strings.Contains(heard, `"caught_up","id":0`) {
				t.Errorf("%s: heard %s", path, heard)
			}
		}
	})
}

// A token ends in the middle of a stream, and we know when it was last used.
func TestTokenLife(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		lobby := s.room("lobby")
		secret, err := s.store.CreateToken(Token{User: "ann", Scope: scopeRead, Expires: time.Now().Add(time.Hour)})
		if err != nil {
			t.Fatal(err)
		}
		stream := s.tap("/chat/lobby/", "Bearer "+secret)
		began := time.Now()
		time.Sleep(30 * time.Second)
		s.browse("GET", "/chat/lobby/", "Bearer "+secret, "", "Accept: application/json")
		if all, err := s.store.Tokens(t.Context(), "1"); err != nil || !all[0].Works || all[0].Used.Before(began.Add(-time.Second)) || all[0].Used.After(began) {
			t.Errorf("%+v, %v", all, err)
		}
		time.Sleep(59 * time.Minute)
		if stream.hungUp() {
			t.Error("the stream ended early")
		}
		time.Sleep(time.Minute)
		if s.say(lobby, "ann", "too late"); !stream.hungUp() {
			t.Error("the stream goes on without its token")
		}
		if all, err := s.store.Tokens(t.Context(), "1"); err != nil || all[0].Works {
			t.Errorf("%+v, %v", all, err)
		}
		for i := range maxTokens + 1 { // the one that ended does not count
			_, err := s.store.CreateToken(Token{User: "ann", Scope: scopeRead})
			if p, _ := errors.AsType[*problem](err); (i == maxTokens) != (p != nil) || errors.Is(err, ErrStorage) {
				t.Fatalf("token %d: %v", i, err)
			}
		}
	})
}

// What another process revokes is over within ten seconds, and nothing else.
func TestTokenCommand(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, t.TempDir())
	root := d.setUp("Root")
	d.post(root, "/chat/", url.Values{"private": {"secret"}})
	bob := d.addUser("bob")
	d.get(root, "/chat/@bob/")
	d.post(bob, "/chat/lobby/", url.Values{"message": {"hello"}})
	command := func(args ...string) string {
		t.Helper()
		out, err := chatdCommand(append(append([]string{"token"}, args...), "-data", d.dir)...).Output()
		if err != nil {
			t.Fatalf("chatd token %v: %v", args, err)
		}
		return strings.TrimSpace(string(out))
	}
	listen := func(room, secret string) *bufio.Scanner {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), "GET", d.url(roomPath(room)), nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", "Bearer "+secret)
		var res *http.Response
		for range 100 { // until chatd has found out that the bot is a member
			if res, err = http.DefaultClient.Do(r); err != nil || res.StatusCode != 404 {
				break
			}
			res.Body.Close()
			time.Sleep(200 * time.Millisecond)
		}
		if err != nil || res.StatusCode != 200 {
			t.Fatalf("%s: %v, %v", room, res, err)
		}
		t.Cleanup(func() { res.Body.Close() })
		return bufio.NewScanner(res.Body)
	}
	next := func(lines *bufio.Scanner) (line string) {
		for line == "" && lines.Scan() {
			line = lines.Text()
		}
		return line
	}
	doomed, kept := command("add", "-user", "BOB", "-label", "nightly build", "-days", "3"), command("add", "-user", "bob", "-scope", "read", "-room", "lobby")
	doomedStream, keptStream, bot := listen("lobby", doomed), listen("lobby", kept), listen("secret", command("add", "-bot", "robot", "-room", "secret"))
	socket := dialTCP(t, d.addr, "/ws/lobby/", "Authorization: Bearer "+doomed)
	signedIn := d.socket(bob, "/ws/lobby/")
	began := time.Now()
	command("revoke", "1")
	if line := next(doomedStream); line != "" {
		t.Errorf("the revoked token's stream says %q", line)
	}
	if opcode, _, err := socket.said(); opcode != opClose || err != nil {
		t.Errorf("the revoked token's socket: opcode %d, %v", opcode, err)
	}
	passwd := chatdCommand("user", "passwd", "bob", "-data", d.dir)
	passwd.Stdin = strings.NewReader("another password\n")
	if out, err := passwd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if opcode, _, err := signedIn.said(); opcode != opClose || err != nil {
		t.Errorf("the session's socket: opcode %d, %v", opcode, err)
	}
	t.Logf("both took %v", time.Since(began))
	d.post(root, "/chat/lobby/", url.Values{"message": {"still here"}})
	d.post(root, "/chat/secret/", url.Values{"message": {"psst"}})
	if line := next(keptStream); !strings.HasSuffix(line, "Root: still here") {
		t.Errorf("the other token's stream says %q", line)
	}
	if line := next(bot); !strings.HasSuffix(line, "Root: psst") {
		t.Errorf("the bot's stream says %q", line)
	}
	for _, row := range []string{
		`\n1 +bob +all +both +nightly build +\S+ +\S+ \S+ +\S+ +revoked\n`, `\n2 +bob +lobby +read +- +\S+ +\S+ \S+ +never +works\n`, `\n3 +robot \(bot\) +secret +both `,
	} {
		if list := command("list"); !regexp.MustCompile(row).MatchString(list + "\n") {
			t.Errorf("no %s in\n%s", row, list)
		}
	}
	for args, want := range map[string]string{
		"":                              "say chatd token add",
		"add":                           "say chatd token add",
		"add -user bob -bot robot":      "say chatd token add",
		"list bob":                      "say chatd token add",
		"revoke one":                    "token one",
		"revoke 1":                      "token 1: not found",
		"add -user nobody":              "not found",
		"add -user robot":               "not found",
		"add -bot bob":                  "taken",
		"add -bot a/b":                  "cannot be",
		"add -user bob -room secret":    "there is no room secret",
		"add -bot robot -room bob+Root": "not allowed",
		"add -user bob -days -1":        "-days",
		"add -user bob -scope all":      "-scope",
	} {
		out, err := chatdCommand(append([]string{"token", "-data", d.dir}, strings.Fields(args)...)...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) || strings.Count(string(out), "\n") != 1 {
			t.Errorf("chatd token %s: %v, want one line with %q in\n%s", args, err, want, out)
		}
	}
	passwd = chatdCommand("user", "passwd", "robot", "-data", d.dir)
	passwd.Stdin = strings.NewReader(testPassword)
	if out, err := passwd.CombinedOutput(); err == nil || !strings.Contains(string(out), "not found") {
		t.Errorf("a bot was given a password: %s", out)
	}
	d.stop()
}
