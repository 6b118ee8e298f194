package main

import (
	"net/http"
	"slices"
	"time"
)

const themeCookie = "theme"

// chosen returns what this browser's user has chosen, "" if that is none of some.
func chosen(r *http.Request, name string, some ...string) string {
	if c, err := r.Cookie(name); err == nil && slices.Contains(some, c.Value) {
		return c.Value
	}
	return ""
}

func (s *server) handleTheme(w http.ResponseWriter, r *http.Request, _ visitor) error {
	theme, life := r.PostFormValue("theme"), cookieLife
	if theme != "light" && theme != "dark" {
		theme, life = "", -time.Second
	}
	s.setCookie(w, r, themeCookie, theme, life)
	return s.redirect(w, r, localPath(r.PostFormValue("next")))
}

// handleManifest lets browsers install chatd. Like assets it needs no visitor: browsers
// ask for it without cookies.
func (s *server) handleManifest(w http.ResponseWriter, r *http.Request) {
	static := s.base + "/static/" + s.version + "/"
	s.send(w, r, http.StatusOK, "application/manifest+json", encodeJSON(map[string]any{
		"name":             "chatd",
		"start_url":        s.base + "/chat/",
		"scope":            s.base + "/",
		"display":          "standalone",
		"theme_color":      "#f5f6f4",
		"background_color": "#ffffff",
		"icons": []map[string]string{
			{"src": static + "icon.svg", "sizes": "any", "type": "image/svg+xml", "purpose": "any"},
			// Nothing of it is in the corners, which masks cut off.
			{"src": static + "icon.png", "sizes": "512x512", "type": "image/png", "purpose": "any maskable"},
		},
	}))
}
