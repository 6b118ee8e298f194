package main

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// wrongsOf is what a doctor finds wrong.
func wrongsOf(t *testing.T, data string, args ...string) string {
	t.Helper()
	var said, wrongs strings.Builder
	err := visit(t.Context(), append(args, "-data", data), &said)
	if exists(filepath.Join(data, doctorFile)) {
		t.Error("its token was left behind")
	}
	for line := range strings.Lines(said.String()) {
		if strings.HasPrefix(line, "wrong") {
			wrongs.WriteString(line)
		}
	}
	if (err != nil) != (wrongs.Len() > 0) || said.Len() == 0 {
		t.Errorf("%v after\n%s", err, &said)
	}
	return wrongs.String()
}

// newData returns a data directory as it should be.
func newData(t *testing.T) string {
	t.Helper()
	data := filepath.Join(t.TempDir(), "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	return data
}

// Nothing is wrong with the configuration that chatd prints, and each fault in it is
// found, and the line named that is missing.
func TestDoctor(t *testing.T) {
	addr, file := inherited(t)
	file.Close()
	data := newData(t)
	const pages = "location /team/ {"
	for _, fault := range []struct{ name, old, new, want string }{
		{"none", "", "", ""},
		{"certificate", "", "", "ssl_certificate /etc/letsencrypt/live/127.0.0.1/fullchain.pem;"},
		{"no Upgrade", "proxy_set_header Upgrade ", "#", "of /team/ws: proxy_set_header Upgrade $http_upgrade;"},
		{"no Connection", "proxy_set_header Connection ", "#", "of /team/ws: proxy_set_header Connection $chatd_connection;"},
		{"buffers", "proxy_buffering off;", "proxy_buffering on; proxy_ignore_headers X-Accel-Buffering;", "of /team/chat/: proxy_buffering off;"},
		{"idle", "proxy_read_timeout 90s;", "proxy_read_timeout 1s;", "of /team/ws: proxy_read_timeout 90s;"},
		{"Host", "proxy_set_header Host ", "proxy_set_header Host chatd; #", "of /team/: proxy_set_header Host $http_host;"},
		{"no proto", "proxy_set_header X-Forwarded-Proto ", "#", "of /team/: proxy_set_header X-Forwarded-Proto $scheme;"},
		{"no address", "proxy_set_header X-Forwarded-For ", "#", "of /team/: proxy_set_header X-Forwarded-For $remote_addr;"},
		{"small bodies", "client_max_body_size 1m;", "client_max_body_size 1k;", "of /team/chat/: client_max_body_size 1m;"},
		{"path stripped", pages + "\n        proxy_pass http://chatd;", pages + " proxy_pass http://chatd/;", "/team is cut off (answered with 404 Not Found) → in nginx.conf, location of /team/: proxy_pass http://" + addr + "; with no path after it"},
		{"HTTP/1.0", "proxy_http_version 1.1;", "proxy_http_version 1.0;", "of /team/: proxy_http_version 1.1;"},
		{"no Origin", pages, `proxy_set_header Origin ""; ` + pages, "of /team/ws: proxy_set_header Origin $http_origin;"},
		{"another Origin", pages, `proxy_set_header Origin http://chatd; ` + pages, "of /team/ws: proxy_set_header Origin $http_origin;"},
		{"cookie path", pages, "proxy_cookie_path /team/ /; " + pages, "of /team/: take out proxy_cookie_path,"},
		{"gzip", "gzip off;", "gzip on; gzip_types text/event-stream;", "of /team/chat/: gzip off;"},
		{"policy", pages, "proxy_hide_header Content-Security-Policy; " + pages, "of /team/: take out proxy_hide_header and add_header of Content-Security-Policy"},
		{"two policies", pages, "add_header Content-Security-Policy x; " + pages, "of /team/: take out proxy_hide_header and add_header of Content-Security-Policy"},
		{"nowhere", "server " + addr, "server 127.0.0.1:1", "of /team/: proxy_pass http://" + addr + ";"},
		{"elsewhere", pages, "location /other/ {", "of /team/: proxy_pass http://" + addr + ";"},
	} {
		t.Run(fault.name, func(t *testing.T) {
			f := startNginx(t, "/team", addr, fault.old, fault.new)
			d := startDaemon(t, data, "-url", f.url, "-addr", addr)
			args := []string{"-url", f.url, "-addr", addr, "-idle", "0"}
			if fault.name != "certificate" {
				args = append(args, "-insecure")
			}
			if fault.name == "none" || fault.name == "idle" {
				args = append(args, "-idle", "2s")
			}
			if wrongs := wrongsOf(t, data, args...); fault.want == "" && wrongs != "" || !strings.Contains(wrongs, fault.want) {
				t.Errorf("want %q in\n%s", fault.want, wrongs)
			}
			d.stop()
		})
	}
}

// What is wrong with chatd itself and on its disk is found too.
func TestDoctorAtHome(t *testing.T) {
	data := newData(t)
	d := startDaemon(t, data, "-url", "http://other.test", "-trust", "10.0.0.0/8", "-max-conns", "10000000")
	if err := os.Chmod(filepath.Join(data, "chatd.db"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, stopped := range []struct {
		is    bool
		wants []string
	}{
		{false, []string{" 1 files open", "chmod -R go= " + data, `chatd has -url "http://other.test"`, "-url " + d.url(""), "LimitNOFILE=10000200",
			"tls: there is none", "-trust with the address in 127.0.0.1"}},
		{true, []string{"chatd: is at " + d.addr, "answer: at " + d.url("") + " (dial"}},
	} {
		if stopped.is {
			d.stop()
		}
		wrongs := wrongsOf(t, data, "-url", d.url(""), "-addr", d.addr, "-idle", "0")
		for _, want := range stopped.wants {
			if !strings.Contains(wrongs, want) {
				t.Errorf("want %q in\n%s", want, wrongs)
			}
		}
	}
}

// Only who has put the hash of a token into the data directory, and lately, is told anything.
func TestDoctorToken(t *testing.T) {
	data := newData(t)
	d := startDaemon(t, data)
	file := filepath.Join(data, doctorFile)
	ask := func(token string, want int) {
		t.Helper()
		for _, path := range []string{"/doctor/", "/chat/doctor/", "/ws/doctor/"} {
			res, err := http.Get(d.url(path + token))
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
			if res.StatusCode != want {
				t.Errorf("%s%s: %s, want %d", path, token, res.Status, want)
			}
		}
	}
	ask("x", 404)
	if err := os.WriteFile(file, hashToken("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	ask("x", 404)
	ask("secret", 200)
	if err := os.Chtimes(file, time.Time{}, time.Now().Add(-doctorLife)); err != nil {
		t.Fatal(err)
	}
	ask("secret", 404)
}
