package main

import (
	"compress/gzip"
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
)

// Who takes gzip gets it, where that helps and harms nobody, and what it unpacks is what others get.
func TestGzip(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		ann, room := s.session("ann"), s.room("lobby")
		s.room("empty")
		s.say(room, "ann", strings.Repeat("long ", 500))
		transport := &http.Transport{DisableCompression: true, DialContext: func(context.Context, string, string) (net.Conn, error) { return s.listener.dial(), nil }}
		defer transport.CloseIdleConnections()
		ask := func(method, path string, headers ...string) (*http.Response, string) {
			r, err := http.NewRequestWithContext(t.Context(), method, "http://chat.test"+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Cookie", ann)
			for _, h := range headers {
				name, value, _ := strings.Cut(h, ": ")
				r.Header.Add(name, value)
			}
			res, err := transport.RoundTrip(r)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			var body io.Reader = res.Body
			if res.Header.Get("Content-Encoding") == "gzip" && method != "HEAD" && res.StatusCode == 200 {
				if body, err = gzip.NewReader(res.Body); err != nil {
					t.Fatal(err)
				}
			}
			text, err := io.ReadAll(body)
			if err != nil {
				t.Fatal(err)
			}
			return res, string(text)
		}
		for _, test := range []struct {
			path, header string
			zipped       bool
		}{
			{"/chat/lobby/", "Accept-Encoding: gzip, deflate, br", true},
			{"/chat/lobby/", "Accept-Encoding: GZIP;q=0.5", true},
			{"/chat/lobby/", "Accept-Encoding: gzip; q=0.0, *", false},
			{"/chat/lobby/", "Accept-Encoding: br", false},
			{"/chat/lobby/", "Accept-Encoding: ", false},
			{"/static/chatd.js", "Accept-Encoding: gzip", true},
			{"/static/chatd.js", "Accept-Encoding: identity", false},
		} {
			res, text := ask("GET", test.path, test.header)
			_, plain := ask("GET", test.path)
			if zipped := res.Header.Get("Content-Encoding") == "gzip"; zipped != test.zipped || !strings.Contains(res.Header.Get("Vary"), "Accept-Encoding") {
				t.Errorf("%s with %s: %v", test.path, test.header, res.Header)
			}
			if len(text) < 1000 || strings.HasPrefix(test.path, "/static/") && text != plain {
				t.Errorf("%s with %s: %d bytes", test.path, test.header, len(text))
			}
		}
		const gz = "Accept-Encoding: gzip"
		encoding := func(method, path string, headers ...string) string {
			res, _ := ask(method, path, append(headers, gz)...)
			return res.Header.Get("Content-Encoding")
		}
		for what, got := range map[string][2]string{
			"JSON":                 {encoding("GET", "/chat/lobby/", "Accept: application/json"), "gzip"},
			"short JSON":           {encoding("GET", "/chat/empty/", "Accept: application/json"), ""},
			"from another site":    {encoding("GET", "/chat/lobby/", "Sec-Fetch-Site: cross-site"), ""},
			"from this site":       {encoding("GET", "/chat/lobby/", "Sec-Fetch-Site: same-origin"), "gzip"},
			"a range":              {encoding("GET", "/static/chatd.js", "Range: bytes=0-9"), ""},
			"only the head":        {encoding("HEAD", "/chat/lobby/"), "gzip"},
			"only an asset's head": {encoding("HEAD", "/static/chatd.js"), "gzip"},
		} {
			if got[0] != got[1] {
				t.Errorf("%s: %q, want %q", what, got[0], got[1])
			}
		}
		zipped, _ := ask("GET", "/static/chatd.css", gz)
		plain, _ := ask("GET", "/static/chatd.css")
		tag := zipped.Header.Get("ETag")
		if tag == "" || tag == plain.Header.Get("ETag") {
			t.Errorf("ETag %s for both", tag)
		}
		if res, _ := ask("GET", "/static/chatd.css", gz, "If-None-Match: "+tag); res.StatusCode != 304 {
			t.Errorf("what is there already: %s", res.Status)
		}
		if res, _ := ask("GET", "/static/chatd.css", "If-None-Match: "+tag); res.StatusCode != 200 {
			t.Errorf("what is there compressed: %s", res.Status)
		}
	})
}
