package main

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// said returns the cids of a room's messages.
func (s *testServer) said(room string) (cids []string) {
	s.t.Helper()
	synctest.Wait()
	r, err := s.store.Room(room)
	if err != nil {
		s.t.Fatal(err)
	}
	page, _, err := s.store.Since(s.t.Context(), User{Role: RoleAdmin}, 0, 0, 1000)
	if r.Private {
		page, _, err = s.store.Page(s.t.Context(), r.ID, 1<<60, 1000)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	for _, e := range page {
		if e.Room.ID == r.ID {
			cids = append(cids, e.CID)
		}
	}
	return cids
}

// pushed are the cids of a push.
func pushed(id, times int) (cids []string) {
	for i := range times {
		cids = append(cids, fmt.Sprintf("push-%d-%d", id, i+1))
	}
	return cids
}

// Without further words a push is that of the tutorials, with an end, and streams
// have it too.
func TestPushDefault(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		defer s.close()
		ann := s.session("ann")
		stream := s.listener.dial()
		defer stream.Close()
		fmt.Fprintf(stream, "GET /chat/%%E5%%A4%%A7%%E5%%8E%%85/ HTTP/1.1\r\nHost: chat.test\r\nAccept: text/event-stream\r\nCookie: %s\r\n\r\n", ann)
		heard := make(chan string)
		go func() { all, _ := io.ReadAll(stream); heard <- string(all) }()
		synctest.Wait()
		if status, to, _ := s.browse("POST", "/push?room=大厅", ann, ""); status != 303 || to != "/chat/%E5%A4%A7%E5%8E%85/" {
			t.Errorf("the button leads to %d %s", status, to)
		}
		began := time.Now()
		time.Sleep(time.Hour)
		if got := s.said("大厅"); !slices.Equal(got, pushed(1, 30)) {
			t.Errorf("said %v", got)
		}
		stream.Close()
		all := <-heard
		for i := range 30 {
			want := fmt.Sprintf(`"message":"[%s] 实时推送 - 房间: 大厅"`, began.Add(time.Duration(2*i)*time.Second).Local().Format(time.DateTime))
			if strings.Count(all, want) != 1 {
				t.Fatalf("%s is not in\n%s", want, all)
			}
		}
	})
}

// A push ends with the right of who started it to speak in its room.
func TestPushEnds(t *testing.T) {
	for what, harm := range map[string]string{
		"deactivated": "UPDATE users SET deactivated = 1 WHERE name = 'bob'",
		"expired":     "UPDATE users SET expires = 1 WHERE name = 'bob'",
		"archived":    "UPDATE rooms SET archived = 1",
		"removed":     "DELETE FROM members WHERE user = (SELECT id FROM users WHERE name = 'bob')",
		"too long":    "UPDATE pushes SET text = replace(hex(zeroblob(682)), '00', '{time}')",
		"stopped":     "UPDATE pushes SET ended = 1",
		"nothing":     "SELECT 1",
	} {
		dir := t.TempDir()
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t, dir, false)
			defer s.close()
			if _, err := s.store.CreatePrivateRoom("secret", s.user("ann"), s.user("bob")); err != nil {
				t.Fatal(err)
			}
			if status, _, text := s.browse("POST", "/push?room=secret", s.session("bob"), "every=10&times=5", "Accept: */*"); status != 200 {
				t.Fatalf("%d %s", status, text)
			}
			time.Sleep(15 * time.Second)
			if err := s.store.update(func(w *writer) error { return w.exec(harm) }); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
			want := pushed(1, 2)
			if what == "nothing" {
				want = pushed(1, 5)
			}
			if got := s.said("secret"); !slices.Equal(got, want) {
				t.Errorf("%s: said %v", what, got)
			}
			if _, _, text := s.browse("GET", "/push?room=secret", s.session("ann"), ""); text != `{"pushes":[]}`+"\n" {
				t.Errorf("%s: %s runs", what, text)
			}
		})
	}
}

// Guests and archived rooms have no pushes, a token is for what it is for, and a bot
// may.
func TestPushWho(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, true).withCast()
		defer s.close()
		old := s.room("old")
		old.Archived = true
		if err := s.store.ChangeRoom(old, s.user("ann")); err != nil {
			t.Fatal(err)
		}
		bot, err := s.store.CreateToken(Token{User: "robot", Bot: true, Room: "lobby", Scope: scopePost})
		if err != nil {
			t.Fatal(err)
		}
		for _, test := range []struct {
			cookie, path string
			status       int
			contains     string
		}{
			{s.cookie("guest"), "/push?room=lobby", 403, "may not"},
			{s.session("ann"), "/push?room=old", 403, "archived"},
			{s.session("ann"), "/push?room=lobby&text=" + strings.Repeat("{time}", 1000), 413, "too long"},
			{s.session("ann"), "/push?room=lobby&text=%ff", 400, "UTF-8"},
			{s.cookie("reading"), "/push?room=lobby", 403, "token_scope"},
			{s.cookie("elsewhere"), "/push?room=old", 404, "not_found"},
			{"Bearer " + bot, "/push?room=lobby&times=1", 200, `"username":"robot"`},
			{"", "/push?room=lobby", 401, "sign in"},
		} {
			if status, _, text := s.browse("POST", test.path, test.cookie, ""); status != test.status || !strings.Contains(text, test.contains) {
				t.Errorf("%s: %d, want %d with %q in\n%s", test.path, status, test.status, test.contains, text)
			}
		}
		if got := s.said("lobby"); !slices.Equal(got, pushed(1, 1)) {
			t.Errorf("said %v", got)
		}
	})
}

// There is a limit for all rooms together, and 100 at once do not hold each other up.
func TestPushMany(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		defer s.close()
		ann := s.user("ann")
		for i := range maxPushes {
			if _, err := s.store.StartPush(s.room(fmt.Sprint("room", i)), ann, "x", time.Second, 3); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.store.StartPush(s.room("last"), ann, "x", time.Second, 3); problemOf(err).code != "many_pushes" {
			t.Errorf("one more: %v", err)
		}
		s.pushes.wake <- struct{}{}
		time.Sleep(2 * time.Second)
		for i := range maxPushes {
			if got := s.said(fmt.Sprint("room", i)); !slices.Equal(got, pushed(i+1, 3)) {
				t.Fatalf("room %d: said %v", i, got)
			}
		}
	})
}

// What came due while chatd was away, or had no disk, is said once and not made up for.
func TestPushAway(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		s.browse("POST", "/push?room=lobby", s.session("ann"), "every=10s&times=6")
		time.Sleep(11 * time.Second)
		s.close()
		time.Sleep(time.Hour)
		s = newTestServer(t, dir, false)
		defer s.close()
		if got := s.said("lobby"); !slices.Equal(got, pushed(1, 3)) {
			t.Errorf("after an hour away: said %v", got)
		}
		for _, broken := range []string{"ALTER TABLE pushes RENAME TO gone", "CREATE TRIGGER broken BEFORE UPDATE ON pushes BEGIN SELECT unheard_of(); END"} {
			before := s.said("lobby")
			if err := s.store.update(func(w *writer) error { return w.exec(broken) }); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
			if got := s.said("lobby"); !slices.Equal(got, before) {
				t.Errorf("%s: said %v", broken, got)
			}
			if err := s.store.update(func(w *writer) error {
				w.exec("ALTER TABLE gone RENAME TO pushes")
				w.exec("DROP TRIGGER IF EXISTS broken")
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(pushRetry)
			if got := s.said("lobby"); len(got) != len(before)+1 {
				t.Errorf("%s, and repaired: said %v", broken, got)
			}
		}
		time.Sleep(time.Minute)
		if got := s.said("lobby"); !slices.Equal(got, pushed(1, 6)) {
			t.Errorf("in the end: said %v", got)
		}
	})
}

func TestPushPages(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, true).withCast()
		defer s.close()
		ann := s.session("ann")
		page := func(path, cookie string) string {
			_, _, text := s.browse("GET", path, cookie, "", "Accept-Language: zh")
			return text
		}
		if strings.Contains(page("/chat/lobby/", ann), "获取后端数据") || !strings.Contains(page("/chat/lobby/about/", ann), `value="[{time}] 实时推送 - 房间: {room}"`) {
			t.Error("before the first push: a button, or no form")
		}
		s.browse("POST", "/push?room=lobby", s.cookie("member"), "text=%3Cb%3E&every=1h")
		synctest.Wait()
		if !strings.Contains(page("/chat/lobby/", ann), "获取后端数据") || strings.Contains(page("/chat/lobby/", s.cookie("guest")), "获取后端数据") {
			t.Error("after it: no button, or one for guests")
		}
		for who, stops := range map[string]bool{"ann": true, "member": true, "admin": true, "outsider": false, "guest": false} {
			text := page("/chat/lobby/about/", s.cookie(who))
			if !strings.Contains(text, "&lt;b&gt;") || !strings.Contains(text, "1/30") || strings.Contains(text, `name="stop" value="1"`) != stops {
				t.Errorf("%s is shown\n%s", who, text)
			}
		}
		status, _, text := s.browse("POST", "/push?room=lobby", ann, "from=about&text=kept&every=never&times=7")
		if status != 400 || !strings.Contains(text, `value="kept"`) || !strings.Contains(text, `value="never"`) || !strings.Contains(text, `value="7"`) {
			t.Errorf("a bad form: %d\n%s", status, text)
		}
		s.browse("POST", "/push?room=lobby", s.cookie("admin"), "stop=1")
		if strings.Contains(page("/chat/lobby/about/", ann), "1/30") {
			t.Error("an administrator could not stop it")
		}
	})
}

// A kill -9 neither repeats nor skips anything.
func TestPushKill(t *testing.T) {
	d := startDaemon(t, t.TempDir())
	ann := d.setUp("Ann")
	p := d.socket(ann, "/ws/push/lobby")
	d.post(ann, "/push?room=lobby", url.Values{"every": {"1s"}, "times": {"4"}})
	for range 2 {
		if _, err := p.nextText(); err != nil {
			t.Fatal(err)
		}
	}
	d.kill()
	d.start()
	p = dialTCP(t, d.addr, "/ws/push/lobby?since=2", "Cookie: "+d.cookies(ann))
	for range 2 {
		if _, err := p.nextText(); err != nil {
			t.Fatal(err)
		}
	}
	p.conn.Close()
	d.stop()
	var cids []string
	for _, e := range readLog(t, d.dir) {
		cids = append(cids, e.CID)
	}
	if !slices.Equal(cids, pushed(1, 4)) {
		t.Errorf("said %v", cids)
	}
}

// A job that is refused in words fails alone.
func TestRefusalFailsAlone(t *testing.T) {
	s := openTestStore(t, t.TempDir())
	s.gate.Lock()
	first, refused, second := make(chan error, 1), make(chan error, 1), make(chan error, 1)
	answer := func(c chan error) func(Event, error) { return func(_ Event, err error) { c <- err } }
	s.Append(s.message(s.ann, "", "holds up the writer"), answer(first))
	s.enqueue(&job{apply: func(*writer, *Event) error { return refuse(http.StatusConflict, "many_pushes") }, done: answer(refused)})
	s.Append(s.message(s.ann, "", "is in the same batch"), answer(second))
	s.gate.Unlock()
	if err := receive(t, first); err != nil {
		t.Error(err)
	}
	if err := receive(t, refused); problemOf(err).code != "many_pushes" {
		t.Errorf("refused with %v", err)
	}
	if err := receive(t, second); err != nil {
		t.Errorf("its neighbour: %v", err)
	}
}
