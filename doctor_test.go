package main

import (
	"context"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// wrongsOf is what a doctor finds wrong.
func wrongsOf(t *testing.T, f *front, args ...string) string {
	t.Helper()
	var said strings.Builder
	d, err := newDoctor(args, &said)
	if err != nil {
		t.Fatal(err)
	}
	dial := d.dial
	d.dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if strings.HasSuffix(addr, ":80") {
			addr = strings.TrimPrefix(f.plain, "http://")
		}
		return dial(ctx, network, addr)
	}
	err = d.visit(t.Context())
	if _, gone := os.Stat(filepath.Join(d.data, doctorFile)); !os.IsNotExist(gone) {
		t.Errorf("its token was left behind: %v", gone)
	}
	var wrongs strings.Builder
	for line := range strings.Lines(said.String()) {
		if strings.HasPrefix(line, "wrong") {
			wrongs.WriteString(line)
		}
	}
	if (err != nil) != (wrongs.Len() > 0) || d.checks == 0 {
		t.Errorf("%v after\n%s", err, &said)
	}
	return wrongs.String()
}

// newVisit returns what the doctor is told about a chatd at addr, whose data is as it should be.
func newVisit(t *testing.T, addr string) (data string, args []string) {
	t.Helper()
	data = filepath.Join(t.TempDir(), "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(data, "last-backup"), []byte(time.Now().Format(time.RFC3339)), 0o600); err != nil {
		t.Fatal(err)
	}
	return data, []string{"-insecure", "-data", data, "-addr", addr}
}

// Nothing is wrong with the configuration that chatd prints, and each fault in it is
// found, and the line named that is missing.
func TestDoctor(t *testing.T) {
	addr, file := inherited(t)
	file.Close()
	data, args := newVisit(t, addr)
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
		{"no redirect", "return 301", "return 404; #", "listen 80; return 301 https://127.0.0.1:"},
		{"cache", "upstream chatd", "proxy_cache_path cache keys_zone=c:1m; proxy_cache c; proxy_cache_valid 1m; proxy_ignore_headers Cache-Control Set-Cookie;\nupstream chatd", "of /team/: proxy_cache off;"},
		{"nowhere", "server " + addr, "server 127.0.0.1:1", "of /team/: proxy_pass http://" + addr + ";"},
		{"elsewhere", pages, "location /other/ {", "of /team/: proxy_pass http://" + addr + ";"},
	} {
		t.Run(fault.name, func(t *testing.T) {
			f := startNginx(t, "/team", addr, fault.old, fault.new)
			d := startDaemon(t, data, "-url", f.url, "-addr", addr)
			args := append(args, "-url", f.url)
			switch fault.name {
			case "none", "idle":
				args = append(args, "-idle", "2s")
			case "certificate":
				args = append(args[1:], "-quick") // not -insecure
			default:
				args = append(args, "-quick")
			}
			if wrongs := wrongsOf(t, f, args...); fault.want == "" && wrongs != "" || !strings.Contains(wrongs, fault.want) {
				t.Errorf("want %q in\n%s", fault.want, wrongs)
			}
			d.stop()
		})
	}
}

// What is wrong with chatd itself and on its disk is found too.
func TestDoctorAtHome(t *testing.T) {
	data, args := newVisit(t, "")
	d := startDaemon(t, data, "-url", "http://other.test", "-trust", "10.0.0.0/8", "-max-conns", "10000000")
	old := time.Now().Add(-backupLife).Format(time.RFC3339)
	for _, err := range []error{
		os.Chmod(filepath.Join(data, "chatd.db"), 0o644),
		os.WriteFile(filepath.Join(data, "last-backup"), []byte(old), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	wrongs := wrongsOf(t, &front{}, append(args, "-url", d.url(""), "-addr", d.addr, "-quick")...)
	for _, want := range []string{" 1 files open", "chmod -R go= " + data, "backup: the last one is of ", `chatd has -url "http://other.test"`, "-url " + d.url(""),
		"LimitNOFILE=10000200", "tls: there is none", "-trust with the address in 127.0.0.1"} {
		if !strings.Contains(wrongs, want) {
			t.Errorf("want %q in\n%s", want, wrongs)
		}
	}
	d.stop()
	wrongs = wrongsOf(t, &front{}, append(args, "-url", d.url(""), "-addr", d.addr, "-quick")...)
	for _, want := range []string{"chatd: is at " + d.addr, "connect: 127.0.0.1"} {
		if !strings.Contains(wrongs, want) {
			t.Errorf("want %q in\n%s", want, wrongs)
		}
	}
}

// Only who has put the hash of a token into the data directory, and lately, is told anything.
func TestDoctorToken(t *testing.T) {
	data, _ := newVisit(t, "")
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
