package main

import (
	"bytes"
	"encoding/json"
	"image/png"
	"strings"
	"testing"
	"testing/synctest"
)

// A browser is told where chatd is and what it looks like when it is installed.
func TestManifest(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		_, _, page := s.browse("GET", "/login/", "", "")
		for _, want := range []string{`<link rel="manifest" href="/manifest.webmanifest">`, `<link rel="apple-touch-icon" href="/static/test/icon.png">`, `data-version="test"`} {
			if !strings.Contains(page, want) {
				t.Errorf("%s is not in\n%s", want, page)
			}
		}
		s.base = "/team" // what routes strip is what a proxy would have added
		_, _, text := s.browse("GET", "/manifest.webmanifest", "", "")
		var m struct {
			StartURL string `json:"start_url"`
			Scope    string
			Icons    []struct{ Src, Sizes, Type, Purpose string }
		}
		if err := json.Unmarshal([]byte(text), &m); err != nil || m.StartURL != "/team/chat/" || m.Scope != "/team/" || len(m.Icons) != 2 {
			t.Fatalf("%v\n%s", err, text)
		}
		for _, icon := range m.Icons {
			status, _, image := s.browse("GET", strings.TrimPrefix(icon.Src, "/team"), "", "")
			if status != 200 {
				t.Errorf("%s: %d", icon.Src, status)
			}
			if icon.Type != "image/png" {
				continue
			}
			if c, err := png.DecodeConfig(bytes.NewReader([]byte(image))); err != nil || c.Width != 512 || c.Height != 512 {
				t.Errorf("%s: %+v, %v", icon.Src, c, err)
			}
		}
	})
}

func TestTheme(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		ann := s.session("ann")
		for _, test := range []struct{ chosen, cookie, root, pressed, colours string }{
			{"dark", "theme=dark", `<html lang="en" data-theme="dark">`, "dark", "#1b1e21"},
			{"light", "theme=light", `<html lang="en" data-theme="light">`, "light", "#f5f6f4"},
			{"", "theme=", `<html lang="en">`, "", "#f5f6f4 #1b1e21"},
			{"loud", "theme=", `<html lang="en">`, "", "#f5f6f4 #1b1e21"},
		} {
			status, to, cookie, _ := s.submit("/theme", "theme", test.chosen, "next", "/account/")
			if status != 303 || to != "/account/" || cookie != test.cookie {
				t.Errorf("%q: %d, to %s with %s", test.chosen, status, to, cookie)
			}
			_, _, page := s.browse("GET", "/account/", ann+"; "+cookie, "")
			if !strings.Contains(page, test.root) || !strings.Contains(page, `value="`+test.pressed+`" aria-pressed="true"`) || strings.Count(page, `aria-pressed="true"`) != 1 {
				t.Errorf("%q: the page is\n%s", test.chosen, page)
			}
			for _, colour := range []string{"#f5f6f4", "#1b1e21"} {
				if strings.Contains(page, colour) != strings.Contains(test.colours, colour) {
					t.Errorf("%q: %s", test.chosen, colour)
				}
			}
		}
	})
}
