package main

import (
	"net/http"
	"time"
)

const themeCookie = "theme"

// theme is light or dark, if this browser's user has chosen one; "" is as the system says.
func theme(r *http.Request) string {
	if c, err := r.Cookie(themeCookie); err == nil && (c.Value == "light" || c.Value == "dark") {
		return c.Value
	}
	return ""
}

func (s *server) handleTheme(w http.ResponseWriter, r *http.Request, _ visitor) error {
	chosen, life := r.PostFormValue("theme"), cookieLife
	if chosen != "light" && chosen != "dark" {
		chosen, life = "", -time.Second
	}
	s.setCookie(w, r, themeCookie, chosen, life)
	return s.redirect(w, r, localPath(r.PostFormValue("next")))
}

// handleManifest lets browsers install chatd. Like assets it needs no visitor: browsers
// ask for it without cookies.
func (s *server) handleManifest(w http.ResponseWriter, r *http.Request) {
	type icon struct {
		Src     string `json:"src"`
		Sizes   string `json:"sizes"`
		Type    string `json:"type"`
		Purpose string `json:"purpose"`
	}
	static := s.base + "/static/" + s.version + "/"
	s.send(w, r, http.StatusOK, "application/manifest+json", encodeJSON(struct {
		Name       string `json:"name"`
		StartURL   string `json:"start_url"`
		Scope      string `json:"scope"`
		Display    string `json:"display"`
		Theme      string `json:"theme_color"`
		Background string `json:"background_color"`
		Icons      []icon `json:"icons"`
	}{"chatd", s.base + "/chat/", s.base + "/", "standalone", "#f5f6f4", "#ffffff", []icon{
		{static + "icon.svg", "any", "image/svg+xml", "any"},
		{static + "icon.png", "512x512", "image/png", "any maskable"}, // nothing of it is in the corners, which masks cut off
	}}))
}
