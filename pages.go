package main

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"html/template"
	"io/fs"
	"maps"
	"mime"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	languageCookie = "lang"
	fallback       = "en"
)

// page is what the templates get.
type page struct {
	Lang    string
	Theme   string // light, dark, or "" as the system says
	Me      *User  // nil: nobody is signed in
	Guests  bool   // visitors without an account may come in
	Error   string
	Notice  string            // what was done, or its key in the catalogues
	Next    string            // where to go after signing in
	Path    string            // this page
	Form    map[string]string // what was typed
	Status  int
	Version string // of the assets

	Proxied  bool // a proxy says who it is
	Sessions []Session
	Session  string // the id of this one
	Tokens   []Token
	Made     *madeToken

	Rooms  []RoomState
	Online []string

	Register bool    // visitors may make themselves an account
	Invite   *Invite // that of the link

	About    *aboutRoom
	Room     string
	Topic    string
	Messages []messageRow // oldest first
	Older    int64        // 0, or the before= of the next page
	Newer    int64        // 0, if the page ends with the newest message, or the after= of the next page
	CID      string
	Message  int64  // whose Edits these are
	Edits    []Edit // oldest first
	Pushes   bool   // there is a button for another push
	Client   *clientData

	Found *foundPage

	Admin *adminPage
	Hooks *hooksPage
}

// Shown is what a room is called for whoever looks: direct messages have the name
// of the other one.
func (p page) Shown(room string) string {
	one, other, direct := strings.Cut(room, "+")
	switch {
	case !direct || p.Me == nil:
		return room
	case one == p.Me.Name:
		return "@" + other
	}
	return "@" + one
}

// roomGroup is a list of rooms in base.html.
type roomGroup struct {
	ID, Title string // of the element, and the key of its heading
	Rooms     []RoomState
}

// Groups returns the rooms, and apart from them the direct messages.
func (p page) Groups() []roomGroup {
	groups := []roomGroup{{ID: "rooms"}, {ID: "directs", Title: "room.directs"}}
	for _, r := range p.Rooms {
		g := &groups[0]
		if r.direct() {
			g = &groups[1]
		}
		g.Rooms = append(g.Rooms, r)
	}
	return groups
}

// messageRow is a message in room.html.
type messageRow struct {
	Event
	Tag       string // what stands beside the name: guest, bot, pushed or nothing
	Own       bool
	Text      template.HTML
	Reactions []reactionRow
}

// reactionRow is an emoji under a message.
type reactionRow struct {
	Emoji string
	Names []string // of those who react with it
	Mine  bool
}

func reactionRows(names map[string][]string, me string) (rows []reactionRow) {
	for _, emoji := range slices.Sorted(maps.Keys(names)) {
		rows = append(rows, reactionRow{emoji, names[emoji], slices.Contains(names[emoji], me)})
	}
	return rows
}

func tagOf(e Event) string {
	switch {
	case e.Author.Role == RoleGuest:
		return "guest"
	case e.Author.Bot:
		return "bot"
	case e.Pushed:
		return "pushed"
	}
	return ""
}

// clientData is what chatd.js begins with.
type clientData struct {
	Base     string            `json:"base"`
	Username string            `json:"username"`
	Guest    bool              `json:"guest"`
	Room     string            `json:"room"`
	Cursor   int64             `json:"cursor"`
	Older    int64             `json:"older"`
	Newer    int64             `json:"newer"`
	LastRead int64             `json:"lastRead"`
	Unread   int               `json:"unread"` // in this room
	Archived bool              `json:"archived"`
	Admin    bool              `json:"admin"`
	People   []string          `json:"people"` // whom the visitor may mention
	Limit    int               `json:"limit"`  // bytes of a message
	Words    map[string]string `json:"words"`
}

// fillClient gives the script what it begins with. Everything up to cursor is in the page.
func (s *server) fillClient(r *http.Request, v visitor, room Room, cursor int64, p *page) (err error) {
	if p.Rooms, err = s.store.RoomStates(r.Context(), v.User); err != nil {
		return err
	}
	people, err := s.store.People(r.Context(), v.User, room)
	if err != nil {
		return err
	}
	p.Client = &clientData{
		Base: s.base, Username: v.Name, Guest: v.Role == RoleGuest, Admin: v.Role == RoleAdmin,
		Room: room.Name, Archived: room.Archived, Cursor: cursor, Older: p.Older, Newer: p.Newer,
		People: append([]string{}, people...), Limit: maxMessage, Words: s.words[v.language(r)].client(),
	}
	if i := slices.IndexFunc(p.Rooms, func(o RoomState) bool { return o.ID == room.ID }); i >= 0 {
		p.Client.LastRead, p.Client.Unread = p.Rooms[i].LastRead, p.Rooms[i].Unread
	}
	return nil
}

// render fills in what every page has. The page is complete before the first
// byte is sent, so that an error can still become a 500.
func (s *server) render(w http.ResponseWriter, r *http.Request, v visitor, status int, file string, p page) error {
	p.Lang, p.Guests, p.Path, p.Status, p.Proxied = v.language(r), s.guests, r.URL.RequestURI(), status, v.proxied
	p.Theme, p.Version, p.Register = chosen(r, themeCookie, "light", "dark"), s.version, s.register
	if r.Method != http.MethodGet {
		p.Path = "/chat/"
	}
	if v.ID != 0 {
		p.Me, p.Online = &v.User, s.hub.Online()
		if p.Rooms == nil {
			rooms, err := s.store.RoomStates(r.Context(), v.User)
			if err != nil && file != "error.html" {
				return err
			}
			p.Rooms = rooms
		}
	}
	var b bytes.Buffer
	if err := s.pages[p.Lang][file]().Execute(&b, p); err != nil {
		s.log.ErrorContext(r.Context(), "render", "file", file, "err", err)
		http.Error(w, s.words[p.Lang].text("error.internal"), http.StatusInternalServerError)
		return nil
	}
	s.send(w, r, status, "text/html; charset=utf-8", b.Bytes())
	return nil
}

// loadPages reads templates, catalogues and assets out of the binary. What takes time is
// done when it is first asked for.
func (s *server) loadPages() error {
	s.words = make(map[string]catalogue)
	s.assets = make(map[string]asset)
	s.pages = make(map[string]map[string]func() *template.Template)
	names, err := fs.Glob(files, "templates/*")
	if err != nil {
		return err
	}
	hash := sha256.New()
	for _, name := range names {
		content, err := files.ReadFile(name)
		if err != nil {
			return err
		}
		base, ext := path.Base(name), path.Ext(name)
		switch ext {
		case ".css", ".js", ".svg", ".png":
			s.assets[base] = asset{content, sync.OnceValue(func() []byte { return s.compress(content) }), mime.TypeByExtension(ext)}
			hash.Write(content)
		case ".json":
			var words catalogue
			if err := json.Unmarshal(content, &words); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			s.words[strings.TrimSuffix(base, ext)] = words
		}
	}
	s.version = hex.EncodeToString(hash.Sum(nil)[:8])
	for lang, words := range s.words {
		s.pages[lang] = make(map[string]func() *template.Template)
		shared, err := template.New("base.html").Funcs(s.functions(words)).ParseFS(files, "templates/base.html", "templates/tokens.html")
		if err != nil {
			return err
		}
		for _, name := range names {
			if path.Ext(name) != ".html" {
				continue
			}
			s.pages[lang][path.Base(name)] = sync.OnceValue(func() *template.Template {
				return template.Must(template.Must(shared.Clone()).ParseFS(files, name))
			})
		}
	}
	return nil
}

// functions are what templates may call.
func (s *server) functions(words catalogue) template.FuncMap {
	return template.FuncMap{
		"t":     words.text,
		"url":   func(path string) string { return s.base + path },
		"asset": func(name string) string { return s.base + "/static/" + s.version + "/" + name },
		"modules": func() []string {
			names := slices.Sorted(maps.Keys(s.assets))
			return slices.DeleteFunc(names, func(name string) bool { return path.Ext(name) != ".js" })
		},
		"roomURL": func(name string) string { return s.base + roomPath(name) },
		"clock":   func(t time.Time) string { return t.Local().Format("15:04") },
		"stamp":   timestamp,
		"hue":     hue,
		"join":    strings.Join,
		"past":    func(id int64) int64 { return id + 1 }, // the before= of a page that ends with id
		"json": func(v any) (string, error) {
			b, err := json.Marshal(v)
			return string(b), err
		},
	}
}

// hue is the colour of a name, 0 to 11. chatd.js computes the same.
func hue(name string) int {
	var h uint32
	for _, b := range []byte(name) {
		h = h*31 + uint32(b)
	}
	return int(h % 12)
}

// catalogue holds the words of one language.
type catalogue map[string]string

// text returns the words of a key, with {0}, {1}… replaced.
func (c catalogue) text(key string, args ...any) string {
	text := cmp.Or(c[key], key)
	for i, arg := range args {
		text = strings.ReplaceAll(text, fmt.Sprintf("{%d}", i), fmt.Sprint(arg))
	}
	return text
}

// client returns the words that chatd.js needs.
func (c catalogue) client() map[string]string {
	words := make(map[string]string)
	for key, text := range c {
		if key, ok := strings.CutPrefix(key, "client."); ok {
			words[key] = text
		}
	}
	return words
}

// language is the one that the user chose, or this browser, else the first in
// Accept-Language that we have.
func (v visitor) language(r *http.Request) string {
	if v.Language != "" {
		return v.Language
	}
	if lang := chosen(r, languageCookie, "en", "zh"); lang != "" {
		return lang
	}
	for tag := range strings.SplitSeq(r.Header.Get("Accept-Language"), ",") {
		switch tag = strings.ToLower(strings.TrimSpace(tag)); {
		case strings.HasPrefix(tag, "zh"):
			return "zh"
		case strings.HasPrefix(tag, "en"):
			return "en"
		}
	}
	return fallback
}

// asset is a file that pages refer to. Its path has the version of all of them,
// so that it can be cached for ever, and what a module imports is of its version.
type asset struct {
	content     []byte
	zipped      func() []byte
	contentType string
}

// handleAsset needs no visitor: those whom we do not let in see pages too.
func (s *server) handleAsset(w http.ResponseWriter, r *http.Request) {
	a, ok := s.assets[r.PathValue("file")]
	if !ok {
		s.fail(w, r, visitor{}, ErrNotFound)
		return
	}
	h := w.Header()
	h.Set("Content-Type", a.contentType)
	h.Set("Vary", "Accept-Encoding")
	content, tag := a.content, s.version
	if takesGzip(r) && r.Header.Get("Range") == "" { // parts are of what they are parts of
		content, tag = a.zipped(), s.version+"-gzip"
		h.Set("Content-Encoding", "gzip")
	}
	h.Set("ETag", `"`+tag+`"`)
	h.Set("Cache-Control", "no-cache")
	if r.PathValue("version") == s.version {
		h.Set("Cache-Control", "public, max-age=31536000, immutable")
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
}
