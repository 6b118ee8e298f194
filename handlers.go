package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/subtle"
	"embed"
	"errors"
	"fmt"
	"html/template"
	"log/slog"
	"math"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
)

const (
	maxBody     = 64 << 10
	historyPage = 50 // messages on a page
	setUpKey    = "token"
)

//go:embed templates
var files embed.FS

// server answers HTTP. Its fields do not change once it serves, but
// for what counts.
type server struct {
	store  *Store
	hub    *Hub
	log    *slog.Logger
	pushes *pusher
	hooks  *hooks
	keeper *keeper

	config                       // what the flags say
	public        string         // URL, "" for that of the listener
	base          string         // path that everything lives under, without final slash
	secure        bool           // the public URL is https
	setUpToken    string         // makes the first administrator; "" when there is one
	trusted       []netip.Prefix // proxies whose X-Forwarded-For is believed
	socketOrigins *http.CrossOriginProtection

	hashSlots     chan struct{} // taken while a password is hashed
	logins        *throttle     // by address and name; see signIn
	addressLogins *throttle
	nameLogins    *throttle
	connects      *throttle // by address
	invites       *throttle // by address
	posts         *throttle // messages and whatever else is kept
	typing        *throttle
	searches      *throttle // by user
	complaints    *throttle // lines of the log about one kind of failure

	health            checkup
	refused, requests counters // by code, and by route and class of status
	requestTime       histogram
	replays, replayed atomic.Int64 // joins with a cursor, and events they were sent

	gzips   sync.Pool // of *gzip.Writer
	assets  map[string]asset
	version string                                          // of the assets
	words   map[string]catalogue                            // by language
	pages   map[string]map[string]func() *template.Template // by language and file
}

// handler is an http.Handler that knows who asks, and returns what went wrong.
type handler func(w http.ResponseWriter, r *http.Request, v visitor) error

func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, h handler) { mux.Handle(pattern, s.handler(noToken(h))) }
	tokened := func(pattern, scope string, h handler) { mux.Handle(pattern, s.handler(scoped(scope, h))) }
	handle("GET /{$}", s.handleRoot)
	mux.HandleFunc("GET /static/{file}", s.handleAsset)
	mux.HandleFunc("GET /static/{version}/{file}", s.handleAsset)
	mux.HandleFunc("GET /manifest.webmanifest", s.handleManifest)
	mux.HandleFunc("GET /healthz", s.handleHealth)
	tokened("GET /metrics", "", s.handleMetrics)
	handle("GET /setup", s.handleSetUp)
	handle("POST /setup", form(s.handleSetUp))
	handle("GET /login/{$}", s.handleLogin)
	handle("POST /login/{$}", form(s.handleLogin))
	handle("POST /guest", form(s.handleGuest))
	handle("GET /register/{$}", s.handleInvite)
	handle("POST /register/{$}", form(s.handleInvite))
	handle("GET /invite/{token}", s.handleInvite)
	handle("POST /invite/{token}", form(s.handleInvite))
	handle("POST /logout", s.handleLogout)
	handle("POST /language", s.handleLanguage)
	handle("POST /theme", s.handleTheme)
	handle("GET /account/{$}", s.signedIn(s.handleAccount))
	handle("POST /account/password", s.signedIn(form(s.handlePassword)))
	handle("POST /account/sessions", s.signedIn(form(s.handleSessions)))
	handle("POST /account/settings", s.signedIn(form(s.handleSettings)))
	handle("POST /account/tokens", s.signedIn(form(s.handleTokens)))
	tokened("GET /chat/{$}", "", s.handleRoomsOrSocket)
	tokened("GET /chat/{room}/{$}", scopeRead, s.signedIn(s.inRoom(s.handleRoom)))
	tokened("POST /chat/{room}/{$}", scopePost, s.signedIn(s.handlePost))
	tokened("GET /chat/{room}/edits/{id}", scopeRead, s.signedIn(s.inRoom(s.handleEdits)))
	tokened("GET /search/{$}", scopeRead, s.signedIn(s.handleSearch))
	handle("POST /chat/{$}", s.signedIn(form(s.handleCreateRoom)))
	handle("GET /chat/{room}/about/{$}", s.signedIn(s.inRoom(s.handleAbout)))
	handle("POST /chat/{room}/about/{$}", s.signedIn(form(s.inRoom(s.handleChangeRoom))))
	tokened("GET /push", scopeRead, s.signedIn(s.handlePushes))
	tokened("POST /push", scopePost, s.signedIn(s.handlePush))
	handle("POST /chat/{room}/about/tokens", s.signedIn(form(s.inRoom(s.handleBots))))

	handle("GET /admin/{$}", s.adminOnly(s.handleAdmin))
	handle("GET /admin/users/{$}", s.adminOnly(s.handleUsers))
	handle("POST /admin/users", s.adminOnly(form(s.handleChangeUsers)))
	handle("GET /admin/messages/{$}", s.adminOnly(s.handleMessages))
	handle("POST /admin/messages", s.adminOnly(form(s.handleDeleteMessages)))
	handle("GET /admin/invites/{$}", s.adminOnly(s.handleInvites))
	handle("POST /admin/invites", s.adminOnly(form(s.handleChangeInvites)))
	handle("GET /admin/hooks/{$}", s.adminOnly(s.handleHooks))
	handle("POST /admin/hooks", s.adminOnly(form(s.handleChangeHooks)))
	handle("GET /admin/rooms/{$}", s.adminOnly(s.handleAdminRooms))
	handle("GET /admin/audit/{$}", s.adminOnly(s.handleAudit))

	s.socketRoutes(tokened)
	tokened("GET /", "", func(http.ResponseWriter, *http.Request, visitor) error { return ErrNotFound })

	protected := http.NewCrossOriginProtection()
	protected.SetDenyHandler(s.handler(func(http.ResponseWriter, *http.Request, visitor) error {
		return refuse(http.StatusForbidden, "cross_origin")
	}))
	return s.secureHeaders(http.StripPrefix(s.base, s.identified(protected.Handler(mux))))
}

// socketRoutes are chatd.v1 and the formats of the tutorials' pages, and what tells chatd
// doctor how requests arrive.
func (s *server) socketRoutes(tokened func(pattern, scope string, h handler)) {
	tokened("GET /ws", "", s.handleV1)
	tokened("GET /ws/chat/{room}/{$}", "", s.roomSocket(dialectChat, decodeFrame))
	tokened("GET /ws/push/{room}", scopeRead, s.roomSocket(dialectPush, parseNothing))
	tokened("GET /ws/{room}/{$}", "", s.roomSocket(dialectPlain, parsePlain))
	tokened("GET /room/{room}/{$}", "", s.roomSocket(dialectPlain, parsePlain))

	tokened("GET /doctor/{token}", "", s.handleDoctor)
	tokened("GET /chat/doctor/{token}", "", s.handleDoctor)
	tokened("POST /chat/doctor/{token}", "", s.handleDoctor)
	tokened("GET /ws/doctor/{token}", "", s.handleDoctor)
}

// secureHeaders also limits the body.
func (s *server) secureHeaders(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "+
			"connect-src 'self'; manifest-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		if s.secure {
			h.Set("Strict-Transport-Security", "max-age=31536000") // a year
		}
		r.Body = http.MaxBytesReader(w, r.Body, bodyLimit(r))
		next.ServeHTTP(w, r)
	})
}

func (s *server) handler(h handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v, err := s.visitor(r)
		if err == nil {
			err = h(w, r, v)
		}
		if err != nil {
			s.fail(w, r, v, err)
		}
	})
}

// noToken is for what only people may do.
func noToken(h handler) handler {
	return func(w http.ResponseWriter, r *http.Request, v visitor) error {
		if v.token != 0 {
			return refuse(http.StatusForbidden, "token_scope")
		}
		return h(w, r, v)
	}
}

// scoped lets those with a token in if it is good for scope; with "" h decides.
func scoped(scope string, h handler) handler {
	return func(w http.ResponseWriter, r *http.Request, v visitor) error {
		if scope != "" && !v.may(scope) {
			return refuse(http.StatusForbidden, "token_scope")
		}
		return h(w, r, v)
	}
}

// form parses the form that h is for.
func form(h handler) handler {
	return func(w http.ResponseWriter, r *http.Request, v visitor) error {
		if err := r.ParseForm(); err != nil {
			return badForm(err)
		}
		return h(w, r, v)
	}
}

// signedIn sends visitors without a session to the login page and back.
func (s *server) signedIn(h handler) handler {
	return func(w http.ResponseWriter, r *http.Request, v visitor) error {
		switch {
		case v.ID != 0:
			return h(w, r, v)
		case r.Method != http.MethodGet || !wantsPage(r):
			return refuse(http.StatusUnauthorized, "sign_in")
		}
		return s.redirect(w, r, "/login/?next="+url.QueryEscape(r.URL.RequestURI()))
	}
}

// fail is the one place that answers an error.
func (s *server) fail(w http.ResponseWriter, r *http.Request, v visitor, err error) {
	p := problemOf(err)
	s.complain(r.Context(), p, "request", "pattern", r.Pattern, "err", err)
	switch p.status {
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", "Bearer") // RFC 6750 §3
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", "1")
	}
	sentence := s.sentence(v.language(r), p)
	switch {
	case wantsSocket(r) || p.status == http.StatusUpgradeRequired:
		http.Error(w, sentence, p.status)
	case wantsPage(r):
		s.render(w, r, v, p.status, "error.html", page{Error: sentence})
	default:
		s.writeJSON(w, r, p.status, problemFrame{"error", p.code, "", sentence})
	}
}

// complain logs what is not the visitor's fault. On a full disk that would be a
// line for every message, so some is left out.
func (s *server) complain(ctx context.Context, p *problem, what string, args ...any) {
	if p.status >= http.StatusInternalServerError && s.complaints.allow(p.code) {
		s.log.ErrorContext(ctx, what, args...)
	}
}

// sentence puts a problem into words, and counts it: who is refused is told so.
func (s *server) sentence(lang string, p *problem) string {
	s.refused.add("code=%q", p.code)
	return s.words[lang].text("error."+p.code, p.args...)
}

// writeJSON answers with v, one of our own types. It returns nil, for handlers to return.
func (s *server) writeJSON(w http.ResponseWriter, r *http.Request, status int, v any) error {
	s.send(w, r, status, "application/json", append(encodeJSON(v), '\n'))
	return nil
}

// redirect goes to a path of ours with GET. Like writeJSON it returns nil, for handlers to return.
func (s *server) redirect(w http.ResponseWriter, r *http.Request, to string) error {
	http.Redirect(w, r, s.base+to, http.StatusSeeOther)
	return nil
}

// localPath returns a path that somebody asked to be sent to, or the rooms if it
// leads elsewhere. Browsers take // and \ for the start of a host.
func localPath(next string) string {
	strange := func(c rune) bool { return c == '\\' || unicode.IsControl(c) }
	if !strings.HasPrefix(next, "/") || strings.HasPrefix(next, "//") || strings.ContainsFunc(next, strange) {
		return "/chat/"
	}
	return next
}

func (s *server) handleRoot(w http.ResponseWriter, r *http.Request, _ visitor) error {
	return s.redirect(w, r, "/chat/")
}

// checkSetUp lets only the holder of the link in, and only while nobody is administrator.
func (s *server) checkSetUp(r *http.Request) error {
	has, err := s.store.HasAdmin(r.Context())
	switch {
	case err != nil:
		return err
	case has || s.setUpToken == "":
		return refuse(http.StatusGone, "setup_used")
	case subtle.ConstantTimeCompare([]byte(r.FormValue(setUpKey)), []byte(s.setUpToken)) != 1:
		return refuse(http.StatusForbidden, "setup_token")
	}
	return nil
}

// handleSetUp shows the form, and takes it. So do handleLogin and handleInvite.
func (s *server) handleSetUp(w http.ResponseWriter, r *http.Request, v visitor) error {
	if err := s.checkSetUp(r); err != nil {
		return err
	}
	p := page{Form: formOf(r, setUpKey, "username")}
	if r.Method != http.MethodPost {
		return s.render(w, r, v, http.StatusOK, "setup.html", p)
	}
	u, err := s.newAccount(r, RoleAdmin, s.store.CreateFirstAdmin)
	if err != nil {
		return s.show(w, r, v, err, "setup.html", p)
	}
	s.log.InfoContext(r.Context(), "administrator created", "user", u.Name)
	return s.enterAs(w, r, u, "/chat/")
}

// newAccount checks the name in a form and, if the role has one, the password.
func (s *server) newAccount(r *http.Request, role Role, create func(name, encoded string) (User, error)) (User, error) {
	name, err := ownName(r)
	encoded := ""
	if err == nil && role != RoleGuest {
		encoded, err = s.newPassword(r)
	}
	if err != nil {
		return User{}, err
	}
	return create(name, encoded)
}

// newUser lets somebody in who has no invite. The name must be new: with that of an
// earlier guest would come the right to change what that one said.
func (s *server) newUser(r *http.Request, role Role) (User, error) {
	if !s.logins.allow("guests of " + networkOf(s.clientAddress(r))) {
		return User{}, refuse(http.StatusTooManyRequests, "login_too_fast")
	}
	return s.newAccount(r, role, func(name, encoded string) (User, error) { return s.store.CreateUser(name, role, encoded) })
}

// enterAs starts a session and goes to a path of ours.
func (s *server) enterAs(w http.ResponseWriter, r *http.Request, u User, to string) error {
	if err := s.startSession(w, r, u); err != nil {
		return err
	}
	return s.redirect(w, r, to)
}

// show shows a page, and what is wrong with the form that was sent from it, if anything.
// It returns wrong if that is none of the visitor's fault.
func (s *server) show(w http.ResponseWriter, r *http.Request, v visitor, wrong error, file string, p page) error {
	if wrong == nil {
		return s.render(w, r, v, http.StatusOK, file, p)
	}
	problem := problemOf(wrong)
	if problem.status >= http.StatusInternalServerError {
		return wrong
	}
	p.Error, p.Notice = s.sentence(v.language(r), problem), ""
	return s.render(w, r, v, problem.status, file, p)
}

func badForm(err error) error {
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return refuse(http.StatusRequestEntityTooLarge, "too_large")
	}
	return refuse(http.StatusBadRequest, "bad_request")
}

func (s *server) handleLogin(w http.ResponseWriter, r *http.Request, v visitor) error {
	p := page{Form: formOf(r, "username"), Next: localPath(r.FormValue("next"))}
	if v.proxied { // and so signed in
		return s.redirect(w, r, p.Next)
	}
	if r.Method != http.MethodPost {
		return s.render(w, r, v, http.StatusOK, "login.html", p)
	}
	u, err := s.signIn(r.Context(), s.clientAddress(r), r.PostFormValue("username"), r.PostFormValue("password"))
	if err != nil {
		return s.show(w, r, v, err, "login.html", p)
	}
	return s.enterAs(w, r, u, p.Next)
}

func (s *server) handleGuest(w http.ResponseWriter, r *http.Request, v visitor) error {
	if !s.guests {
		return ErrForbidden
	}
	next := localPath(r.PostFormValue("next"))
	u, err := s.newUser(r, RoleGuest)
	if err != nil {
		return s.show(w, r, v, err, "login.html", page{Next: next})
	}
	return s.enterAs(w, r, u, next)
}

// ownName is the name that somebody new has typed. That of all who have none
// cannot be one's own.
func ownName(r *http.Request) (string, error) {
	name, err := userName(r.PostFormValue("username"))
	if name == anonymousGuest {
		err = ErrTaken
	}
	return name, err
}

func (s *server) handleLogout(w http.ResponseWriter, r *http.Request, v visitor) error {
	if v.session != nil {
		err := s.store.DeleteSession(v.User, Session{Hash: v.session}.ID())
		if err = cmp.Or(instead(err, ErrNotFound, nil), s.dropEnded(v.ID)); err != nil {
			return err
		}
	}
	s.setCookie(w, r, s.cookieName(), "", -time.Second)
	return s.redirect(w, r, "/login/")
}

func (s *server) handleLanguage(w http.ResponseWriter, r *http.Request, v visitor) error {
	if lang := r.PostFormValue("lang"); s.words[lang] != nil {
		if v.Language != "" { // which would win over the cookie
			if err := s.store.SetSettings(v.User, lang, v.Notify); err != nil {
				return err
			}
		}
		s.setCookie(w, r, languageCookie, lang, cookieLife)
	}
	return s.redirect(w, r, localPath(r.PostFormValue("next")))
}

func (s *server) handleAccount(w http.ResponseWriter, r *http.Request, v visitor) error {
	return s.showAccount(w, r, v, nil, page{})
}

func (s *server) handlePassword(w http.ResponseWriter, r *http.Request, v visitor) error {
	return s.showAccount(w, r, v, s.changePassword(r, v), page{Notice: "account.changed"})
}

// changePassword also ends the user's other sessions, and their sockets at once.
func (s *server) changePassword(r *http.Request, v visitor) error {
	if v.Role == RoleGuest {
		return ErrForbidden
	}
	if _, err := s.signIn(r.Context(), s.clientAddress(r), v.Name, r.PostFormValue("old")); err != nil {
		if problemOf(err).code == "bad_login" {
			err = refuse(http.StatusForbidden, "wrong_password")
		}
		return err
	}
	encoded, err := s.newPassword(r)
	if err == nil {
		err = s.store.SetPassword(v.User, encoded, v.session)
	}
	if err == nil {
		err = s.dropEnded(v.ID)
	}
	return err
}

// newPassword encodes the one in a form, which may have it again.
func (s *server) newPassword(r *http.Request) (encoded string, err error) {
	password := cmp.Or(r.PostFormValue("new"), r.PostFormValue("password"))
	if err := checkPassword(password); err != nil {
		return "", err
	}
	if r.PostForm.Has("again") && password != r.PostFormValue("again") {
		return "", refuse(http.StatusBadRequest, "password_mismatch")
	}
	return s.hash(r.Context(), password)
}

// handleRoomsOrSocket is the room picker, and the tutorials' socket at the same URL.
func (s *server) handleRoomsOrSocket(w http.ResponseWriter, r *http.Request, v visitor) error {
	if wantsSocket(r) {
		return s.handleList(w, r, v)
	}
	return noToken(s.signedIn(s.handleRooms))(w, r, v)
}

func (s *server) handleRooms(w http.ResponseWriter, r *http.Request, v visitor) error {
	asked := r.FormValue("room")
	bare := strings.TrimPrefix(asked, "@")
	name, err := roomName(bare)
	switch {
	case asked == "":
		err = nil
	case err == nil:
		return s.redirect(w, r, roomPath(strings.TrimSuffix(asked, bare)+name))
	}
	return s.show(w, r, v, err, "rooms.html", page{Form: formOf(r, "room")})
}

// newCID makes an id for a form: a form that is sent twice is one message.
func newCID() string { return fmt.Sprintf("%012x%s", time.Now().UnixMilli(), rand.Text()[:20]) }

// numberOf returns the id in a request's parameter, the greatest one if there is none.
func numberOf(r *http.Request, name string) (n int64, given bool, err error) {
	text := r.FormValue(name)
	if text == "" {
		return math.MaxInt64, false, nil
	}
	return parseID(text)
}

func parseID(text string) (n int64, given bool, err error) {
	n, err = strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 {
		return 0, true, refuse(http.StatusBadRequest, "bad_request")
	}
	return n, true, nil
}

func formOf(r *http.Request, names ...string) map[string]string {
	form := make(map[string]string)
	for _, name := range names {
		form[name] = r.FormValue(name)
	}
	return form
}
