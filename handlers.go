package main

import (
	"bytes"
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

	data          string         // directory
	public        string         // URL, "" for that of the listener
	base          string         // path that everything lives under, without final slash
	secure        bool           // the public URL is https
	guests        bool           // visitors without an account may use public rooms
	register      bool           // visitors may make themselves an account
	setUpToken    string         // makes the first administrator; "" when there is one
	trusted       []netip.Prefix // proxies whose X-Forwarded-For is believed
	authHeader    string         // in which those say who the visitor is; "": in none
	authCreate    bool           // whom they name and nobody knows is made a member
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
	version string                                   // of the assets
	words   map[string]catalogue                     // by language
	pages   map[string]map[string]*template.Template // by language and file
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
	handle("GET /setup", s.handleSetUpPage)
	handle("POST /setup", form(s.handleSetUp))
	handle("GET /login/{$}", s.handleLoginPage)
	handle("POST /login/{$}", form(s.handleLogin))
	handle("POST /guest", form(s.handleGuest))
	handle("GET /register/{$}", s.handleRegisterPage)
	handle("POST /register/{$}", form(s.handleRegister))
	handle("GET /invite/{token}", s.handleInvitePage)
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

	// chatd.v1, and the formats of the tutorials' pages.
	tokened("GET /ws", "", s.handleV1)
	tokened("GET /ws/chat/{room}/{$}", "", s.roomSocket(dialectChat, decodeFrame))
	tokened("GET /ws/push/{room}", scopeRead, s.roomSocket(dialectPush, parseNothing))
	tokened("GET /ws/{room}/{$}", "", s.roomSocket(dialectPlain, parsePlain))
	tokened("GET /room/{room}/{$}", "", s.roomSocket(dialectPlain, parsePlain))

	tokened("GET /doctor/{token}", "", s.handleDoctor)
	tokened("GET /chat/doctor/{token}", "", s.handleDoctor)
	tokened("POST /chat/doctor/{token}", "", s.handleDoctor)
	tokened("GET /ws/doctor/{token}", "", s.handleDoctor)

	tokened("GET /", "", func(http.ResponseWriter, *http.Request, visitor) error { return ErrNotFound })

	protected := http.NewCrossOriginProtection()
	protected.SetDenyHandler(s.handler(func(http.ResponseWriter, *http.Request, visitor) error {
		return refuse(http.StatusForbidden, "cross_origin")
	}))
	return s.secureHeaders(http.StripPrefix(s.base, s.identified(protected.Handler(mux))))
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
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		err = refuse(http.StatusRequestEntityTooLarge, "too_large")
	}
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
		writeJSON(w, p.status, problemFrame{"error", p.code, "", sentence})
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
	s.refused.add(p.code)
	return s.words[lang].text("error."+p.code, p.args...)
}

func writeJSON(w http.ResponseWriter, status int, v any) error {
	body := encodeJSON(v)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(append(body, '\n'))
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
	u, err := url.Parse(next)
	if err != nil || u.IsAbs() || u.Host != "" || !strings.HasPrefix(next, "/") ||
		strings.HasPrefix(next, "//") || strings.ContainsAny(next, "\\\r\n\t") {
		return "/chat/"
	}
	return next
}

func (s *server) handleRoot(w http.ResponseWriter, r *http.Request, _ visitor) error {
	return s.redirect(w, r, "/chat/")
}

func (s *server) handleSetUpPage(w http.ResponseWriter, r *http.Request, v visitor) error {
	if err := s.checkSetUp(r); err != nil {
		return err
	}
	return s.render(w, r, v, http.StatusOK, "setup.html", page{Form: formOf(r, setUpKey)})
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

func (s *server) handleSetUp(w http.ResponseWriter, r *http.Request, v visitor) error {
	if err := s.checkSetUp(r); err != nil {
		return err
	}
	u, err := s.newAccount(r, func(name, encoded string) (User, error) {
		u, err := s.store.CreateFirstAdmin(name, encoded)
		return u, instead(err, ErrForbidden, refuse(http.StatusGone, "setup_used"))
	})
	if err != nil {
		return s.show(w, r, v, err, "setup.html", page{Form: formOf(r, setUpKey, "username")})
	}
	s.log.InfoContext(r.Context(), "administrator created", "user", u.Name)
	return s.enterAs(w, r, u)
}

// newAccount checks the name and the password of a form.
func (s *server) newAccount(r *http.Request, create func(name, encoded string) (User, error)) (User, error) {
	name, err := ownName(r)
	if err != nil {
		return User{}, err
	}
	password := r.PostFormValue("password")
	if err := checkPassword(password); err != nil {
		return User{}, err
	}
	encoded, err := s.hash(r.Context(), password)
	if err != nil {
		return User{}, err
	}
	return create(name, encoded)
}

// enterAs starts a session and goes to where the visitor wanted to be.
func (s *server) enterAs(w http.ResponseWriter, r *http.Request, u User) error {
	if err := s.startSession(w, r, u); err != nil {
		return err
	}
	return s.redirect(w, r, localPath(r.PostFormValue("next")))
}

// show shows a page, and what is wrong with the form that was sent from it, if anything.
func (s *server) show(w http.ResponseWriter, r *http.Request, v visitor, wrong error, file string, p page) error {
	status, err := s.blame(r, v, wrong, &p)
	if err != nil {
		return err
	}
	return s.render(w, r, v, status, file, p)
}

// blame puts into p what is wrong with a form, if anything, and returns the status to
// say so with. The error is wrong itself if it is none of the visitor's.
func (s *server) blame(r *http.Request, v visitor, wrong error, p *page) (status int, err error) {
	if wrong == nil {
		return http.StatusOK, nil
	}
	problem := problemOf(wrong)
	if problem.status >= http.StatusInternalServerError {
		return 0, wrong
	}
	p.Error = s.sentence(v.language(r), problem)
	return problem.status, nil
}

func badForm(err error) error {
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return err
	}
	return refuse(http.StatusBadRequest, "bad_request")
}

func (s *server) handleLoginPage(w http.ResponseWriter, r *http.Request, v visitor) error {
	if v.proxied {
		return s.redirect(w, r, localPath(r.FormValue("next")))
	}
	return s.render(w, r, v, http.StatusOK, "login.html", page{Next: localPath(r.FormValue("next"))})
}

func (s *server) handleLogin(w http.ResponseWriter, r *http.Request, v visitor) error {
	u, err := s.signIn(r.Context(), s.clientAddress(r), r.PostFormValue("username"), r.PostFormValue("password"))
	if err != nil {
		return s.show(w, r, v, err, "login.html", page{Form: formOf(r, "username"), Next: localPath(r.PostFormValue("next"))})
	}
	return s.enterAs(w, r, u)
}

func (s *server) handleGuest(w http.ResponseWriter, r *http.Request, v visitor) error {
	if !s.guests {
		return ErrForbidden
	}
	u, err := s.newGuest(r)
	if err != nil {
		return s.show(w, r, v, err, "login.html", page{Next: localPath(r.PostFormValue("next"))})
	}
	return s.enterAs(w, r, u)
}

// newGuest makes a guest. The name must be new: with that of an earlier guest
// would come the right to change what that one said.
func (s *server) newGuest(r *http.Request) (User, error) {
	if !s.logins.allow("guests of " + networkOf(s.clientAddress(r))) {
		return User{}, refuse(http.StatusTooManyRequests, "login_too_fast")
	}
	name, err := ownName(r)
	if err != nil {
		return User{}, err
	}
	return s.store.CreateUser(name, RoleGuest, "")
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
		if err := s.store.DeleteSession(v.session); err != nil {
			return err
		}
		s.hub.Drop(func(m *member) bool { return bytes.Equal(m.session, v.session) })
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
	return s.showAccount(w, r, v, nil, "")
}

func (s *server) handlePassword(w http.ResponseWriter, r *http.Request, v visitor) error {
	return s.showAccount(w, r, v, s.changePassword(r, v), "account.changed")
}

// changePassword also ends the user's other sessions, and their sockets at once.
func (s *server) changePassword(r *http.Request, v visitor) error {
	if v.Role == RoleGuest {
		return ErrForbidden
	}
	password, err := newPassword(r)
	if err != nil {
		return err
	}
	if _, err := s.signIn(r.Context(), s.clientAddress(r), v.Name, r.PostFormValue("old")); err != nil {
		if problemOf(err).code == "bad_login" {
			err = refuse(http.StatusForbidden, "wrong_password")
		}
		return err
	}
	encoded, err := s.hash(r.Context(), password)
	if err != nil {
		return err
	}
	if err := s.store.SetPassword(v.User, encoded, v.session); err != nil {
		return err
	}
	s.dropOthers(v)
	return nil
}

// newPassword is what a form has twice.
func newPassword(r *http.Request) (string, error) {
	password := r.PostFormValue("new")
	if err := checkPassword(password); err != nil {
		return "", err
	}
	if password != r.PostFormValue("again") {
		return "", refuse(http.StatusBadRequest, "password_mismatch")
	}
	return password, nil
}

// handleRoomsOrSocket is the room picker, and the tutorials' socket at the same URL.
func (s *server) handleRoomsOrSocket(w http.ResponseWriter, r *http.Request, v visitor) error {
	if wantsSocket(r) {
		return s.handleList(w, r, v)
	}
	return noToken(s.signedIn(s.handleRooms))(w, r, v)
}

func (s *server) handleRooms(w http.ResponseWriter, r *http.Request, v visitor) error {
	p := page{Form: formOf(r, "room")}
	if asked := r.FormValue("room"); asked != "" {
		name, err := roomName(strings.TrimPrefix(asked, "@"))
		if strings.HasPrefix(asked, "@") {
			name = "@" + name
		}
		if err == nil {
			return s.redirect(w, r, "/chat/"+url.PathEscape(name)+"/")
		}
		return s.show(w, r, v, err, "rooms.html", p)
	}
	return s.render(w, r, v, http.StatusOK, "rooms.html", p)
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
