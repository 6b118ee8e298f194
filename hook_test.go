package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// endpoint has every hook call h, over HTTP in memory.
func (s *testServer) endpoint(h http.HandlerFunc) {
	l := &memoryListener{conns: make(chan net.Conn), done: make(chan struct{})}
	srv := &http.Server{Handler: h}
	go srv.Serve(l)
	s.t.Cleanup(func() { srv.Close() })
	s.hooked.Store(l)
}

func (l *memoryListener) dialContext(ctx context.Context) (net.Conn, error) {
	a, b := net.Pipe()
	select {
	case l.conns <- a:
		return b, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// hook makes a webhook as the administrator "Root" does, and returns its secret.
func (s *testServer) hook(form ...string) string {
	s.t.Helper()
	_, _, cookie := s.session("Root"), s.room("lobby"), s.session("Root")
	s.exec("UPDATE users SET role = 'admin' WHERE name = 'Root'")
	values := url.Values{"action": {"hook.create"}, "room": {"lobby"}, "username": {"bot"}, "url": {"http://hook.test/"}}
	for i := 0; i < len(form); i += 2 {
		values.Set(form[i], form[i+1])
	}
	status, _, text := s.browse("POST", "/admin/hooks", cookie, values.Encode())
	m := regexp.MustCompile(`value="whsec_([^"]+)"`).FindStringSubmatch(text)
	if status != 200 || m == nil {
		s.t.Fatalf("no hook: %d\n%s", status, text)
	}
	return strings.ReplaceAll(m[1], "&#43;", "+")
}

// hear returns the requests that endpoints get, as "path text", and a handler that hears them.
func hear(answer http.HandlerFunc) (heard func() []string, handler http.HandlerFunc) {
	var mu sync.Mutex
	var all []string
	return func() []string {
			mu.Lock()
			defer mu.Unlock()
			defer func() { all = nil }()
			return all
		}, func(w http.ResponseWriter, r *http.Request) {
			var f hookFrame
			if err := json.NewDecoder(r.Body).Decode(&f); err != nil {
				panic(err)
			}
			mu.Lock()
			all = append(all, r.URL.Path+" "+f.Message)
			mu.Unlock()
			answer(w, r)
		}
}

func (s *testServer) tell(who, room string, texts ...string) {
	s.t.Helper()
	r, err := s.store.Room(room)
	for _, text := range texts {
		if err == nil {
			_, err = s.store.AppendWait(Event{Kind: KindMessage, Room: r, Author: s.user(who), Body: text})
		}
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// transcript returns the messages of a room: author, text, and what it answers.
func (s *testServer) transcript(room string) (all []string) {
	s.t.Helper()
	r, err := s.store.Room(room)
	if err != nil {
		s.t.Fatal(err)
	}
	page, _, err := s.store.Page(s.t.Context(), r.ID, 1<<40, 1000)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, e := range page {
		all = append(all, strings.TrimSuffix(fmt.Sprint(e.Author.Name, ": ", e.Body, " #", e.Target), " #0"))
	}
	return all
}

// lastDelivery returns the newest line of the log of deliveries.
func (s *testServer) lastDelivery() Delivery {
	s.t.Helper()
	all, err := s.store.Deliveries(s.t.Context(), 1)
	if err != nil || len(all) == 0 {
		s.t.Fatalf("deliveries: %v, %v", all, err)
	}
	return all[0]
}

// A receiver can check who sends, and what it answers is said.
func TestHookDelivery(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		var secret string
		s.endpoint(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			key, _ := base64.StdEncoding.DecodeString(secret)
			mac := hmac.New(sha256.New, key)
			io.WriteString(mac, r.Header.Get("Webhook-Id")+"."+r.Header.Get("Webhook-Timestamp")+"."+string(body))
			if want := "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil)); len(key) != 32 || r.Header.Get("Webhook-Signature") != want {
				t.Errorf("signature %q, want %q", r.Header.Get("Webhook-Signature"), want)
			}
			if r.Header.Get("Webhook-Timestamp") != fmt.Sprint(time.Now().Unix()) || r.Method != "POST" {
				t.Errorf("%s with %v", r.Method, r.Header)
			}
			var f hookFrame
			if err := json.Unmarshal(body, &f); err != nil || f.Type != "message" || f.Username != "ann" || f.Room != "Lobby" ||
				f.URL != fmt.Sprintf("http://chat.test/chat/Lobby/?at=%d#m%d", f.ID, f.ID) || r.Header.Get("Webhook-Id") != fmt.Sprintf("msg_%d_%d", f.Hook, f.ID) {
				t.Errorf("got %s, %v", body, err)
			}
			fmt.Fprintf(w, "you said %q\n", f.Message)
		})
		s.room("Lobby")
		s.tell("ann", "lobby", "before the hook")
		secret = s.hook()
		s.tell("ann", "lobby", "one")
		synctest.Wait()
		s.tell("ann", "lobby", "two")
		synctest.Wait()
		if got, want := s.transcript("lobby"), []string{"ann: before the hook", "ann: one", `bot: you said "one" #2`, "ann: two", `bot: you said "two" #4`}; !slices.Equal(got, want) {
			t.Errorf("said: %q, want %q", got, want)
		}
		_, _, page := s.browse("GET", "/admin/hooks/", s.session("Root"), "")
		for _, want := range []string{"http://hook.test/", "0 behind", "?at=4#m4", "200 delivered", "?at=5#m5"} {
			if !strings.Contains(page, want) {
				t.Errorf("the page lacks %q:\n%s", want, page)
			}
		}
		if strings.Contains(page, "whsec_") {
			t.Error("the secret is shown again")
		}
	})
}

// Two hooks of one room that answer everything do not answer each other.
func TestHooksDoNotLoop(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		heard, handler := hear(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, `{"text":"@bot @other what?"}`) })
		s.endpoint(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json; charset=utf-8")
			handler(w, r)
		})
		s.hook()
		s.hook("username", "other", "mention", "1", "url", "http://hook.test/mention")
		s.tell("ann", "lobby", "one", "@OTHER: two", "three")
		synctest.Wait()
		got := heard()
		slices.Sort(got)
		if want := []string{"/ @OTHER: two", "/ one", "/ three", "/mention @OTHER: two"}; !slices.Equal(got, want) || len(s.transcript("lobby")) != 7 {
			t.Errorf("heard %q, want %q; said %q", got, want, s.transcript("lobby"))
		}
		if all, err := s.store.Hooks(t.Context(), 0); err != nil || all[1].Behind != 0 {
			t.Errorf("hooks: %+v, %v", all, err)
		}
	})
}

func TestMention(t *testing.T) {
	for _, test := range []struct {
		bot, text string
		want      bool
	}{
		{"bot", "@bot", true},
		{"bot", "hello @BOT, build it", true},
		{"bot", "(@bot)", true},
		{"bot", "see @bot.", true},
		{"bot", "first\n@bot\nlast", true},
		{"bot", "@bot-", true},
		{"bot", "@robot @bot", true},
		{"bot", "@@bot", true},
		{"bot", "@bo", false},
		{"bot", "@", false},
		{"bot", "@bot@bots", true},
		{"bot", "bot", false},
		{"bot", "@bots", false},
		{"bot", "@bot2", false},
		{"bot", "@bot-two", false},
		{"bot", "@bot.v2", false},
		{"bot", "@bot_x", false},
		{"bot", "@bót", false},
		{"bot", "mail@bot.org", false},
		{"bot", "mail@bot", false},
		{"b.t", "@bot", false},
		{"build bot", "@Build Bot go", true},
		{"é", "@É!", true},
		{"机器人", "你好@机器人请帮忙", true},
		{"机器人", "@机器人2", false},
		{"bot", "@bot你好", true},
	} {
		if got := mentions(test.text, test.bot); got != test.want {
			t.Errorf("%q mentions %s: %v", test.text, test.bot, got)
		}
	}
}

func TestHookAnswers(t *testing.T) {
	const plain, jsonType = "text/plain; charset=utf-8", "application/json"
	for _, test := range []struct {
		name, contentType, body string
		status                  int
		said, wrong             string
	}{
		{"JSON text", jsonType, `{"text":"yes"}`, 200, "yes", ""},
		{"JSON message", jsonType, `{"message":"yes","id":"x"}`, 201, "yes", ""},
		{"JSON that says nothing", jsonType, `{"ok":true}`, 200, "", ""},
		{"JSON that is none", jsonType, `yes`, 200, "", "bad answer: invalid"},
		{"JSON of another kind", jsonType, `{"text":1}`, 200, "", "bad answer: json"},
		{"nothing of JSON", jsonType, "", 200, "", ""},
		{"text", plain, "two\nlines\n", 202, "two\nlines", ""},
		{"spaces", plain, " \n ", 200, "", ""},
		{"long text", plain, strings.Repeat("x", maxMessage+1), 200, "", "bad answer: too long"},
		{"endless text", plain, strings.Repeat("x", 10*maxHookAnswer), 200, "", "bad answer: too long"},
		{"long JSON", jsonType, `{"a":"` + strings.Repeat("x", maxHookAnswer) + `","text":"yes"}`, 200, "", "bad answer: too long"},
		{"bytes", plain, "\xff", 200, "", "bad answer: not UTF-8"},
		{"a page", "text/html", "<p>yes", 200, "", ""},
		{"no content", plain, "", 204, "", ""},
		{"redirect", plain, "yes", 302, "", "Found"},
		{"refusal", plain, "yes", 400, "", "Bad Request"},
		{"error", plain, "yes", 500, "", "Internal Server Error"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t, dir, false)
				s.endpoint(func(w http.ResponseWriter, r *http.Request) {
					w.Header().Set("Content-Type", test.contentType)
					w.Header().Set("Location", "http://elsewhere.test/")
					w.WriteHeader(test.status)
					io.WriteString(w, test.body)
				})
				s.hook()
				s.tell("ann", "lobby", "question")
				synctest.Wait()
				d, said := s.lastDelivery(), s.transcript("lobby")[1:]
				if d.Status != test.status || !strings.HasPrefix(d.Error, test.wrong) || (test.wrong == "") != (d.Error == "") {
					t.Errorf("delivery %+v, want %d %q", d, test.status, test.wrong)
				}
				if (test.said == "") != (len(said) == 0) || test.said != "" && said[0] != "bot: "+test.said+" #1" || (d.Reply != 0) != (test.said != "") {
					t.Errorf("said %.99q, want %q", said, test.said)
				}
				if all, err := s.store.Hooks(t.Context(), 0); err != nil || (all[0].Behind == 0) != (test.status/100 == 2) {
					t.Errorf("hooks: %+v, %v", all, err)
				}
			})
		})
	}
}

// A hook that fails rests longer and longer, also over a restart; what fails for a day is given up.
func TestHookBackOff(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		var well atomic.Bool
		heard, handler := hear(func(w http.ResponseWriter, r *http.Request) {
			if !well.Load() {
				w.WriteHeader(503)
			}
		})
		s.endpoint(handler)
		s.hook()
		began := time.Now()
		s.tell("ann", "lobby", "old")
		var last time.Time
		for n := 0; time.Since(began) <= hookPatience; n++ {
			if n == 3 { // neither a message nor a restart is a reason to hurry
				s.tell("ann", "lobby", "new")
				s.close()
				s = newTestServer(t, dir, false)
				s.endpoint(handler)
			}
			synctest.Wait()
			all, err := s.store.Hooks(t.Context(), 0)
			if d := s.lastDelivery(); err != nil || all[0].Failures != n+1 || !d.Time.After(last) || d.Event != 1 || d.Error != "Service Unavailable" {
				t.Fatalf("after try %d: %+v, %+v, %v", n, all, d, err)
			}
			if rest, most := time.Until(all[0].Due), min(time.Second<<min(n+1, 30), hookRest); n != 3 && (rest > most || rest < most*3/4-time.Millisecond) {
				t.Errorf("after try %d a rest of %v", n, rest)
			}
			last = time.Now()
			time.Sleep(time.Until(all[0].Due))
		}
		synctest.Wait()
		tries, err := s.store.Deliveries(t.Context(), 3)
		if i := slices.IndexFunc(tries, func(d Delivery) bool { return d.Event == 1 }); err != nil || i < 0 || tries[i].Error != "given up: Service Unavailable" {
			t.Errorf("after %v: %+v, %v", time.Since(began), tries, err)
		}
		heard()
		s.tell("ann", "lobby", "newer")
		synctest.Wait()
		well.Store(true)
		s.browse("POST", "/admin/hooks", s.session("Root"), "action=hook.retry&id=1")
		synctest.Wait()
		got := heard()
		if n := len(got); n == 0 || got[n-1] != "/ newer" || s.lastDelivery().Error != "" {
			t.Errorf("retried: %q, %+v", got, s.lastDelivery())
		}
		if all, err := s.store.Hooks(t.Context(), 0); err != nil || all[0].Failures != 0 || all[0].Behind != 0 {
			t.Errorf("hooks: %+v, %v", all, err)
		}
	})
}

// An endpoint that does not answer holds up nobody else, and not the end of chatd.
func TestStuckHook(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		heard, handler := hear(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/stuck" {
				<-r.Context().Done()
			}
		})
		s.endpoint(handler)
		s.hook("url", "http://hook.test/stuck")
		s.hook()
		s.tell("ann", "lobby", "one", "two")
		synctest.Wait()
		got := heard()
		slices.Sort(got)
		if want := []string{"/ one", "/ two", "/stuck one"}; !slices.Equal(got, want) {
			t.Errorf("heard %q, want %q", got, want)
		}
		time.Sleep(hookTimeout)
		synctest.Wait()
		if d := s.lastDelivery(); d.Status != 0 || !strings.Contains(d.Error, "deadline") || d.Took != hookTimeout.Milliseconds() {
			t.Errorf("delivery: %+v", d)
		}
		time.Sleep(3 * time.Second) // a try is under way
		began := time.Now()
		if s.close(); time.Since(began) > time.Second {
			t.Errorf("the end took %v", time.Since(began))
		}
		store, err := OpenStore(dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		if all, err := store.Hooks(t.Context(), 0); err != nil || all[0].Failures != 1 {
			t.Errorf("the try that the end cut short counts: %+v, %v", all, err)
		}
	})
}

// Who may not be in the room, by bot or by endpoint, is told nothing.
func TestHookEnds(t *testing.T) {
	for name, test := range map[string]struct {
		end  string // what is done after the first message
		back string // and after the second
	}{
		"bot removed":        {"DELETE FROM members WHERE user = (SELECT id FROM users WHERE name = 'bot')", ""},
		"bot deactivated":    {"UPDATE users SET deactivated = 1 WHERE name = 'bot'", "UPDATE users SET deactivated = NULL"},
		"creator gone":       {"UPDATE users SET deactivated = 1 WHERE name = 'Root'", "UPDATE users SET deactivated = NULL"},
		"removed":            {"", ""},
		"removed meanwhile":  {"UPDATE hooks SET removed = 1", ""},
		"endpoint wants out": {"410", ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t, dir, false)
				heard, handler := hear(func(w http.ResponseWriter, r *http.Request) {
					switch {
					case test.end == "410":
						w.WriteHeader(410)
					case name == "removed meanwhile":
						s.exec(test.end)
						io.WriteString(w, "too late")
					}
				})
				s.endpoint(handler)
				if _, err := s.store.CreatePrivateRoom("secret", s.user("Root"), s.user("ann")); err != nil {
					t.Fatal(err)
				}
				s.hook("room", "secret")
				s.tell("ann", "secret", "one")
				synctest.Wait()
				if test.end == "" {
					s.browse("POST", "/admin/hooks", s.session("Root"), "action=hook.remove&id=1")
				} else if test.end != "410" {
					s.exec(test.end)
				}
				s.tell("ann", "secret", "two")
				s.tell("ann", "secret", "three")
				time.Sleep(2 * hookRest)
				if got, said := heard(), s.transcript("secret"); !slices.Equal(got, []string{"/ one"}) || len(said) != 3 {
					t.Errorf("heard %q, said %q", got, said)
				}
				if test.back != "" {
					s.exec(test.back)
					s.tell("ann", "secret", "four")
					synctest.Wait()
					if got := heard(); !slices.Equal(got, []string{"/ two", "/ three", "/ four"}) {
						t.Errorf("back again: %q", got)
					}
				}
				audit, err := s.store.Audit(t.Context(), 1<<40, 9)
				if err != nil || audit[len(audit)-1].Action != "hook.create" || (audit[0].Action == "hook.remove") != (name == "removed") {
					t.Errorf("audit: %+v, %v", audit, err)
				}
			})
		})
	}
}

func TestHookRefused(t *testing.T) {
	s := newTestServer(t, t.TempDir(), false)
	s.hook()
	if _, err := s.store.CreatePrivateRoom("secret", s.user("ann")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.store.DirectRoom(s.user("Root"), s.user("ann")); err != nil {
		t.Fatal(err)
	}
	const url = "&url=https://hook.test/"
	for body, want := range map[string]int{
		"room=nowhere&username=b" + url:                                      404,
		"room=secret&username=b" + url:                                       404,
		"room=ann%2BRoot&username=b" + url:                                   404,
		"room=lobby&username=ann" + url:                                      409,
		"room=lobby&username=a/b" + url:                                      400,
		"room=lobby&username=b&url=ftp://hook.test/":                         400,
		"room=lobby&username=b&url=https://":                                 400,
		"room=lobby&username=b&url=hook.test":                                400,
		"room=lobby&username=b&url=https://me:pass@hook.test/":               400,
		"room=lobby&username=b" + url + strings.Repeat("x", maxHookURL):      400,
		"room=lobby&username=b" + strings.Replace(url, "hook.", "%25zz.", 1): 400,
	} {
		if status, _, text := s.browse("POST", "/admin/hooks", s.session("Root"), "action=hook.create&"+body); status != want || !strings.Contains(text, "lobby") && want == 400 {
			t.Errorf("%.90s: %d, want %d", body, status, want)
		}
	}
	for _, body := range []string{"action=hook.remove&id=9", "action=hook.retry&id=9", "action=dance"} {
		if status, _, _ := s.browse("POST", "/admin/hooks", s.session("Root"), body); status != 404 && status != 400 {
			t.Errorf("%s: %d", body, status)
		}
	}
	s.exec("INSERT INTO hooks (room, bot, url, secret, mention, created, cursor) SELECT room, bot, url, secret, 0, 0, 0 FROM hooks, json_each('[" + strings.Repeat("1,", maxHooks-2) + "1]')")
	if status, _, _ := s.browse("POST", "/admin/hooks", s.session("Root"), "action=hook.create&room=lobby&username=late"+url); status != 409 {
		t.Errorf("hook %d: %d", maxHooks+1, status)
	}
	if _, _, err := s.store.UserByName(t.Context(), "late"); !errors.Is(err, ErrNotFound) {
		t.Errorf("a bot without a hook: %v", err)
	}
}

func TestHookAddresses(t *testing.T) {
	allowed := []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00:1::/32")}
	for address, public := range map[string]bool{
		"8.8.8.8": true, "1.1.1.1": true, "172.32.0.1": true, "100.128.0.1": true, "192.0.1.1": true, "198.20.0.1": true,
		"2606:4700::1111": true, "2001:4860:4860::8888": true, "2a00:1450::1": true,
		"10.1.2.3": true, "::ffff:10.1.2.3": true, "fd00:1::1": true, // allowed
		"0.0.0.0": false, "0.1.2.3": false, "10.0.0.1": false, "100.64.0.1": false, "100.127.255.255": false, "127.0.0.1": false, "127.9.9.9": false,
		"169.254.169.254": false, "172.16.0.1": false, "172.31.255.255": false, "192.0.0.1": false, "192.0.2.1": false, "192.88.99.1": false,
		"192.168.1.1": false, "198.18.0.1": false, "198.19.255.255": false, "198.51.100.1": false, "203.0.113.1": false, "224.0.0.1": false,
		"239.255.255.255": false, "240.0.0.1": false, "255.255.255.255": false,
		"::": false, "::1": false, "::127.0.0.1": false, "::ffff:127.0.0.1": false, "::ffff:8.8.8.8": false, "64:ff9b::8.8.8.8": false, "64:ff9b:1::1": false,
		"100::1": false, "2001::1": false, "2001:db8::1": false, "2002:7f00:1::": false, "3fff::1": false, "5f00::1": false,
		"fc00::1": false, "fd00:2::1": false, "fe80::1%lo": false, "fec0::1": false, "ff02::1": false,
	} {
		if err := checkPublic(net.JoinHostPort(address, "80"), allowed); (err == nil) != public {
			t.Errorf("%s: %v", address, err)
		}
	}
}

// Names that lead to private addresses, and redirects, lead nowhere: over TCP.
func TestHookReachesNothingPrivate(t *testing.T) {
	s := newTestServer(t, t.TempDir(), false)
	called := make(chan string, 9)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		called <- r.URL.Path
		http.Redirect(w, r, "/redirected", http.StatusTemporaryRedirect)
	}))
	defer server.Close()
	_, port, _ := net.SplitHostPort(server.Listener.Addr().String())
	strict := newHooks(s.store, s.log, nil)
	for _, host := range []string{"127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"} {
		if status, _, err := strict.post(Hook{URL: "http://" + host + ":" + port + "/"}, Event{}); status != 0 || err == nil {
			t.Errorf("%s: %d, %v", host, status, err)
		} else if host == "localhost" && !strings.Contains(err.Error(), "not a public address") {
			t.Errorf("localhost: %v", err)
		}
	}
	if len(called) > 0 {
		t.Errorf("called: %s", <-called)
	}
	if status, _, err := s.hooks.post(Hook{URL: server.URL + "/"}, Event{}); status != 307 || err == nil || <-called != "/" || len(called) > 0 {
		t.Errorf("redirect: %d, %v, and %d calls more", status, err, len(called))
	}
}

// chatd is killed again and again when an endpoint has been told and its answer is on the
// way: nothing is missing, all is in order, and nothing is answered twice.
func TestHookKill(t *testing.T) {
	t.Parallel()
	const messages = 30
	told, all := make(chan string), make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var f hookFrame
		if err := json.NewDecoder(r.Body).Decode(&f); err != nil {
			t.Error(err)
		}
		fmt.Fprintf(w, "%s heard", f.Message) // leaves when this returns
		select {
		case told <- f.Message:
		case <-all:
		case <-r.Context().Done():
		}
	}))
	defer server.Close()
	d := startDaemon(t, t.TempDir(), "-hook-allow", "127.0.0.0/8", "-rate", "0")
	root := d.setUp("Root")
	d.get(root, "/chat/lobby/")
	d.post(root, "/admin/hooks", url.Values{"action": {"hook.create"}, "room": {"lobby"}, "username": {"bot"}, "url": {server.URL}})
	for i := range messages {
		d.post(root, "/chat/lobby/", url.Values{"message": {fmt.Sprint(i)}})
	}
	next, again := 0, 0
	for n := 0; next < messages; n++ {
		switch text := receive(t, told); text {
		case fmt.Sprint(next):
			next++
		case fmt.Sprint(next - 1):
			again++
		default:
			t.Fatalf("told %s, want %d or the one before", text, next)
		}
		if n%4 == 0 {
			d.kill()
			d.start()
		}
	}
	close(all)
	t.Logf("%d of %d told again", again, messages)
	p := d.socket(root, "/ws")
	p.send(opText, []byte(`{"type":"hello","since":0}`))
	for answers := 0; answers < messages; {
		f, err := p.nextEvent()
		if err != nil {
			t.Fatal(err)
		}
		if f.Username == "bot" {
			if f.Message != fmt.Sprint(answers, " heard") || !f.Bot || !f.Pushed || f.ReplyTo == 0 {
				t.Fatalf("answer %d is %+v", answers, f)
			}
			answers++
		}
	}
	p.conn.Close()
	d.stop()
}
