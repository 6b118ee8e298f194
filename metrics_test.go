package main

import (
	"bufio"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// parseFigures reads Prometheus' text format, strictly: each family has its HELP and
// TYPE once and first, and its samples together; buckets grow, and end with the count.
func parseFigures(t *testing.T, text string) map[string]float64 {
	t.Helper()
	help := regexp.MustCompile(`^# HELP (chatd_[a-z_]+) [A-Z].*\.$`)
	kind := regexp.MustCompile(`^# TYPE (chatd_[a-z_]+) (counter|gauge|histogram)$`)
	sample := regexp.MustCompile(`^(chatd_[a-z_]+?)(_bucket|_sum|_count)?(\{[a-z]+="(?:[^"\\]|\\["\\n])*"(?:,[a-z]+="(?:[^"\\]|\\["\\n])*")*\})? (\S+)$`)
	all, families := make(map[string]float64), make(map[string]bool)
	family, typed, bucket := "", "", 0.0
	for line := range strings.Lines(text) {
		line, whole := strings.CutSuffix(line, "\n")
		if m := help.FindStringSubmatch(line); m != nil && !families[m[1]] {
			family, typed = m[1], ""
			families[family] = true
			continue
		}
		if m := kind.FindStringSubmatch(line); m != nil && m[1] == family && typed == "" && (m[2] == "counter") == strings.HasSuffix(family, "_total") {
			typed, bucket = m[2], 0
			continue
		}
		m := sample.FindStringSubmatch(line)
		if m == nil || m[1] != family || typed == "" || (m[2] != "") != (typed == "histogram") || !whole {
			t.Fatalf("out of place: %q", line)
		}
		name, _ := strings.CutSuffix(line, " "+m[4])
		v, err := strconv.ParseFloat(m[4], 64)
		if _, twice := all[name]; err != nil || twice || v < 0 || m[2] == "_bucket" && v < bucket || m[2] == "_count" && v != bucket {
			t.Fatalf("%q, %v", line, err)
		}
		if m[2] == "_bucket" {
			bucket = v
		}
		all[name] = v
	}
	return all
}

// figures asks for /metrics as an administrator's token, and returns what has changed.
func (s *testServer) figures(before map[string]float64) map[string]float64 {
	s.t.Helper()
	status, _, text := s.browse("GET", "/metrics", "Bearer token-of-root", "")
	if status != 200 {
		s.t.Fatalf("GET /metrics: %d %s", status, text)
	}
	all := parseFigures(s.t, text)
	for name, v := range before {
		all[name] -= v
	}
	maps.DeleteFunc(all, func(name string, v float64) bool { return v == 0 })
	return all
}

func (s *testServer) makeRoot(scope string, only any) {
	s.t.Helper()
	s.session("root")
	s.exec("UPDATE users SET role = 'admin' WHERE name = 'root'")
	s.exec("INSERT OR REPLACE INTO tokens (id, hash, user, room, scope, label, created) SELECT 1, ?, id, ?, ?, '', 0 FROM users WHERE name = 'root'", hashToken("token-of-root"), only, scope)
}

func TestFigures(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		room := s.room("lobby")
		for _, who := range []string{"Cookie", "post", "one room"} { // who sees nothing
			s.makeRoot(map[bool]string{true: "post", false: "read"}[who == "post"], map[bool]any{true: room.ID}[who == "one room"])
			secret := map[bool]string{true: s.session("root"), false: "Bearer token-of-root"}[who == "Cookie"]
			if status, _, _ := s.browse("GET", "/metrics", secret, ""); status != 404 {
				t.Errorf("with %s: %d, want 404", who, status)
			}
		}
		s.makeRoot("read", nil)
		for _, name := range []string{"ann", "bob", "carol", "dave"} {
			s.session(name)
		}
		s.figures(nil) // it is written down when the token is used
		before := s.figures(nil)
		ann, bob, carol := s.dial("/ws", s.session("ann")), s.dial("/ws/chat/lobby/", s.session("bob")), &peer{t: t, conn: s.listener.dial()}
		go ann.listen()
		go bob.listen()
		go carol.listenToStream("/chat/lobby/", "Cookie: "+s.session("carol"), "Accept: text/event-stream")
		for _, frame := range []string{`{"type":"hello"}`, `{"type":"message","room":"lobby","cid":"1","message":"x"}`, `{"type":"react","id":1,"emoji":"!"}`, `{"type":"edit","id":9,"message":"x"}`, `{"type":"read","room":"lobby","id":1}`} {
			ann.send(opText, []byte(frame))
			synctest.Wait()
		}
		dave := s.dial("/ws/chat/lobby/?since=0", s.session("dave"))
		go dave.listen()
		s.browse("GET", "/nothing", "", "")
		synctest.Wait()
		got := s.figures(before)
		for name, want := range map[string]float64{
			`chatd_events_stored_total{kind="message"}`: 1, `chatd_events_stored_total{kind="react"}`: 1, `chatd_events_stored_total{kind="read"}`: 0,
			`chatd_commits_total{result="ok"}`: 4, `chatd_commit_batch_size_sum`: 4, `chatd_commit_duration_seconds_count`: 4,
			`chatd_deliveries_total`: 6, `chatd_sockets`: 3, `chatd_streams`: 1, // bob does not see reactions
			`chatd_joins_total`: 4, `chatd_replays_total`: 1, `chatd_replayed_events_total`: 1,
			`chatd_refused_total{code="not_found"}`:                                  2,
			`chatd_http_requests_total{route="GET /ws",class="1xx"}`:                 1,
			`chatd_http_requests_total{route="GET /ws/chat/{room}/{$}",class="1xx"}`: 2,
			`chatd_http_requests_total{route="GET /chat/{room}/{$}",class="2xx"}`:    1,
			`chatd_http_requests_total{route="GET /",class="4xx"}`:                   1,
			`chatd_http_requests_total{route="GET /metrics",class="2xx"}`:            1, // the one before
			`chatd_http_request_duration_seconds_count`:                              6,
			`chatd_outbox_drops_total`:                                               0,
		} {
			if got[name] != want {
				t.Errorf("%s is %v, want %v", name, got[name], want)
			}
		}
		if sent := got["chatd_sent_bytes_total"]; sent < 500 || sent > 5000 {
			t.Errorf("%v bytes sent", sent)
		}

		s.endpoint(func(w http.ResponseWriter, r *http.Request) {})
		s.hook()
		s.hub.Drop(func(m *member) bool { m.most = 0; return false })
		s.browse("POST", "/push?room=lobby", s.session("ann"), "every=1h&text=x")
		s.say(room, "ann", "too much")
		time.Sleep(time.Minute)
		got = s.figures(before)
		for name, want := range map[string]float64{
			`chatd_webhook_deliveries_total{outcome="delivered"}`: 2, `chatd_outbox_drops_total`: 4, `chatd_sockets`: 0, `chatd_streams`: 0,
		} {
			if got[name] != want {
				t.Errorf("in the end %s is %v, want %v", name, got[name], want)
			}
		}
	})
}

// checkHealth asks for /healthz and returns the status of HTTP and what is said.
func (s *testServer) checkHealth(cookie string, headers ...string) (status int, said map[string]any) {
	s.t.Helper()
	status, _, text := s.browse("GET", "/healthz", cookie, "", append(headers, "X: y")...)
	if err := json.Unmarshal([]byte(text), &said); err != nil || said["version"] != version() {
		s.t.Fatalf("%v\n%s", err, text)
	}
	return status, said
}

func TestHealth(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		s.makeRoot("read", nil)
		room, root := s.room("lobby"), s.session("root")
		written := func() int {
			wal, err := os.ReadFile(filepath.Join(dir, "chatd.db-wal"))
			if err != nil {
				t.Fatal(err)
			}
			return lastCommit(wal)
		}
		before := written()
		status, said := s.checkHealth("")
		if status != 200 || said["status"] != "ok" || said["lag"] != 0.0 || said["last_backup"] != nil || said["disk_free_bytes"].(float64) < 1e6 || written() == before {
			t.Errorf("%d %v; the log had %d and has %d bytes", status, said, before, written())
		}
		if said["wal_bytes"].(float64) < float64(written()) {
			t.Errorf("a log of %v bytes has %d", said["wal_bytes"], written())
		}
		var left int
		if err := s.store.read.QueryRow("SELECT (SELECT count(*) FROM log) + (SELECT count(*) FROM sqlite_sequence WHERE name = 'health')").Scan(&left); err != nil || left != 0 {
			t.Errorf("%d rows are left, %v", left, err)
		}
		if _, said := s.checkHealth("", "X-Forwarded-For: 192.0.2.1"); len(said) != 2 || said["status"] != "ok" {
			t.Errorf("a stranger is told %v", said)
		}
		if _, said := s.checkHealth(root, "X-Forwarded-For: 192.0.2.1"); len(said) != 7 {
			t.Errorf("an administrator is told %v", said)
		}
		if err := os.WriteFile(filepath.Join(dir, "last-backup"), []byte("2026-11-21T08:00:00Z\n"), 0o600); err != nil {
			t.Fatal(err)
		}

		time.Sleep(healthEvery + wipeAfter) // what was deleted before the start is wiped
		// A crowd is answered with one write.
		count := func() float64 {
			s.store.batchSize.mu.Lock()
			defer s.store.batchSize.mu.Unlock()
			return s.store.batchSize.sum
		}
		writes, crowd := count(), sync.WaitGroup{}
		for range 1000 {
			crowd.Go(func() {
				w := httptest.NewRecorder()
				r := httptest.NewRequest("GET", "/healthz", nil)
				r.RemoteAddr = "127.0.0.1:1"
				if s.http.Handler.ServeHTTP(w, r); w.Code != 200 || !strings.Contains(w.Body.String(), `"last_backup":"2026-11-21T08:00:00Z"`) {
					t.Errorf("%d %s", w.Code, w.Body)
				}
			})
		}
		crowd.Wait()
		if n := count() - writes; n != 1 {
			t.Errorf("1,000 askers cost %v writes", n)
		}

		gate := make(chan struct{}) // what is said is stored and not published
		s.gate.Store(&gate)
		go s.store.AppendWait(Event{Kind: KindMessage, Room: room, Author: s.user("ann"), Body: "x"})
		for range 3 {
			time.Sleep(healthEvery)
			asked := time.Now()
			status, said := s.checkHealth("")
			if took := time.Since(asked); status != 503 || said["status"] != "failing" || said["why"] != "no commit within 2s" || said["lag"] != 1.0 || took > healthWait {
				t.Errorf("stuck: %d %v after %v", status, said, took)
			}
		}
		s.gate.Store(nil)
		close(gate)
		time.Sleep(healthEvery)
		if status, said := s.checkHealth(""); status != 200 || said["lag"] != 0.0 || said["commit_ms"].(float64) > 1000 {
			t.Errorf("after that: %d %v", status, said)
		}
		if n := count() - writes; n != 5 { // the crowd's, the message, one when it was stuck, the last, the index's
			t.Errorf("%v writes, want 5", n)
		}

		time.Sleep(healthEvery)
		gate = make(chan struct{})
		s.gate.Store(&gate) // nobody says anything, and still it is found
		if status, said := s.checkHealth(""); status != 503 || said["lag"] != 0.0 {
			t.Errorf("publish is stuck: %d %v", status, said)
		}
		close(gate)
	})
}

// A locked database and a full disk turn /healthz to 503, and it turns back. The
// debug listener has all that, and profiles, which do not hold up the end.
func TestHealthOfProcess(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	newPeople(t, dir, []string{"lobby"}, "ann")
	d := startDaemon(t, dir, "-debug", "localhost:0")
	debug := "http://" + d.await(regexp.MustCompile(`msg=debugging addr=(\S+)`))
	get := func(url string) (int, string) {
		t.Helper()
		res, err := http.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(body)
	}
	await := func(status int, contains string) {
		t.Helper()
		for began := time.Now(); ; time.Sleep(100 * time.Millisecond) {
			if got, text := get(d.url("/healthz")); got == status && strings.Contains(text, contains) {
				return
			} else if time.Since(began) > tooLong {
				t.Fatalf("/healthz: %d %s, want %d", got, text, status)
			}
		}
	}
	await(200, `"ok"`)
	other := execSQL(t, dir, "BEGIN IMMEDIATE")
	await(503, "no commit within 2s")
	if _, err := other.ExecContext(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	await(200, `"ok"`)
	d.limitFiles("1")
	await(503, "nothing can be written")
	d.limitFiles("unlimited")
	await(200, `"ok"`)

	_, text := get(debug + "/metrics")
	if all := parseFigures(t, text); all[`chatd_commits_total{result="failed"}`] == 0 || all["chatd_wal_bytes"] == 0 {
		t.Errorf("the figures are\n%s", text)
	}
	for url, want := range map[string]int{debug + "/healthz": 200, debug + "/debug/pprof/goroutine": 200, d.url("/debug/pprof/"): 404, d.url("/metrics"): 404} {
		if status, _ := get(url); status != want {
			t.Errorf("%s: %d, want %d", url, status, want)
		}
	}
	go http.Get(debug + "/debug/pprof/profile?seconds=60")
	d.stop()
	for _, addr := range []string{":0", "0.0.0.0:0", "[::]:0"} {
		refusesToStart(t, chatdCommand("-addr", "127.0.0.1:0", "-data", dir, "-debug", addr), "not a loopback address")
	}
}

// TestLogSecrets asks for everything, on a good day and with the store gone, and with
// "sesame" in all that is nobody's business. The log has lines in JSON with the
// request's id, and no sesame.
func TestLogSecrets(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, true)
		s.makeRoot("both", nil)
		s.room("lobby")
		s.exec("UPDATE sessions SET hash = ?", hashToken("sesame"))
		s.exec("UPDATE tokens SET hash = ?", hashToken("sesame"))
		log := &lockedBuffer{grown: make(chan struct{}, 1)}
		logger, err := newLogger("json", log)
		if err == nil {
			s.server, err = newServer(config{trust: "127.0.0.0/8", guests: true, register: true}, s.store, s.hub, logger)
		}
		if err != nil {
			t.Fatal(err)
		}
		s.complaints = newThrottle(1, 0) // all of them
		s.http.Handler = s.routes()
		ask := func() {
			for pattern, request := range requests {
				path, body, _ := strings.Cut(strings.NewReplacer("username=x", "username=y", "=x", "=sesame").Replace(request), " ")
				method, _, _ := strings.Cut(pattern, " ")
				for _, secret := range []string{"chatd=sesame", "Bearer sesame", ""} {
					if path == "socket" {
						s.dial(body+"?q=sesame", secret).conn.Close()
						continue
					}
					path, _, _ := strings.Cut(strings.Replace(path, "/x", "/sesame", 1), "?")
					s.browse(method, path+"?q=sesame&token=sesame&room=lobby", secret, body+"&message=sesame&password=open+sesame")
				}
			}
		}
		ask()
		s.session("zoe")
		zoe := s.dial("/ws", s.session("zoe"))
		go zoe.listen()
		zoe.send(opText, []byte(`{"type":"hello"}`))
		synctest.Wait()
		s.store.Close()
		zoe.send(opText, []byte(`{"type":"message","room":"lobby","cid":"1","message":"sesame"}`))
		ask()
		s.browse("GET", "/chat/", "chatd=sesame", "", "X-Request-Id: proxy-1")
		s.browse("GET", "/chat/", "chatd=sesame", "", "X-Request-Id: "+strings.Repeat("x", 65))
		s.trusted = nil
		s.browse("GET", "/chat/", "chatd=sesame", "", "X-Request-Id: from-a-stranger")

		text := log.String()
		if strings.Contains(text, "sesame") || strings.Contains(text, "stranger") || strings.Contains(text, "xxx") {
			t.Errorf("the log has what nobody should read:\n%s", text)
		}
		ids := make(map[string]int)
		for line := range strings.Lines(text) {
			var l struct{ Msg, Request string }
			if err := json.Unmarshal([]byte(line), &l); err != nil || l.Request == "" || l.Msg == "" {
				t.Errorf("%v: %s", err, line)
			}
			ids[l.Request]++
		}
		if len(ids) < 50 || ids["proxy-1"] != 1 || !strings.Contains(text, `"msg":"socket"`) {
			t.Errorf("%d ids in\n%s", len(ids), text)
		}
	})
}

// The id is in each answer, those to sockets and streams included.
func TestRequestID(t *testing.T) {
	s := newTestServer(t, t.TempDir(), false)
	for _, test := range []struct{ head, want string }{
		{"GET /chat/x/ HTTP/1.1\r\nX-Request-Id: r-1", "r-1"},
		{"GET /chat/x/ HTTP/1.1\r\nX-Request-Id: r-1\r\nAccept: text/plain", "r-1"},
		{"GET /ws HTTP/1.1\r\nX-Request-Id: r-1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "r-1"},
		{"GET /nothing HTTP/1.1", "[A-Z2-7]{26}"},
		{"GET /nothing HTTP/1.1\r\nX-Request-Id: r 1", "[A-Z2-7]{26}"},
	} {
		conn := s.listener.dial()
		io.WriteString(conn, test.head+"\r\nHost: x\r\nCookie: "+s.session("ann")+"\r\n\r\n")
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || !regexp.MustCompile("^"+test.want+"$").MatchString(res.Header.Get(requestHeader)) {
			t.Errorf("%s: %v, %v", test.head, res, err)
		}
		conn.Close()
	}
}
