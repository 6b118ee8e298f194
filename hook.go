package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"
)

// A webhook is a client with a cursor: a URL that is told what people say in a room,
// and whose answers a bot says there. The log is its queue.

const (
	maxHooks       = 100
	maxHookURL     = 2000 // bytes
	maxHookAnswer  = 64 << 10
	hookTimeout    = 10 * time.Second // for one try, answer included
	hookRest       = time.Hour        // between two tries, at most
	hookPatience   = 24 * time.Hour   // a message that fails when it is older is given up
	hookKeepAlive  = 30 * time.Second
	maxHookError   = 200  // characters
	countBehind    = 1000 // counting stops here
	keptDeliveries = 1000
)

// Hook is a webhook.
type Hook struct {
	ID       int64
	Room     Room
	Bot      User // says the answers
	URL      string
	Mention  bool // it is told only what names the bot
	Cursor   int64
	Failures int       // since the last success
	Due      time.Time // no try before
	Works    bool      // its bot and its creator are active, and the bot may see the room
	Behind   int       // messages after Cursor, countBehind at most; only in lists
	Last     Delivery  // its newest; zero: none
	secret   []byte
}

// Delivery is one try to tell a hook.
type Delivery struct {
	Hook   int64
	Event  int64
	Room   string
	Time   time.Time
	Took   int64  // milliseconds
	Status int    // of HTTP; 0: no answer
	Error  string // "": delivered
	Reply  int64  // the message that the answer became, or 0
}

// hookFrame is the body of a delivery.
type hookFrame struct {
	postedFrame
	Hook int64 `json:"hook"`
}

// hooks tells webhooks what is said.
//
//  1. Each hook has a goroutine: an endpoint that is stuck holds up no other.
//  2. A hook gets its messages in order, one at a time, and each at least once:
//     the cursor moves when there was an answer.
//  3. An answer is said once: its message and the new cursor are one transaction,
//     so what a crash has repeated was not said.
//  4. What bots say is not delivered: hooks cannot answer each other.
type hooks struct {
	store  *Store
	log    *slog.Logger
	client *http.Client
	public string // URL of this chatd

	ctx     context.Context // done when close begins
	cancel  context.CancelFunc
	running sync.WaitGroup // run, of each hook

	outcomes counters // of tries

	mu    sync.Mutex              // guards wakes, and running against close
	wakes map[chan struct{}]int64 // of each hook one, which has room for one, and the hook's room
}

// newHooks returns hooks that may call public addresses and those in allowed.
func newHooks(store *Store, log *slog.Logger, allowed []netip.Prefix) *hooks {
	h := &hooks{store: store, log: log, wakes: make(map[chan struct{}]int64)}
	h.ctx, h.cancel = context.WithCancel(context.Background())
	dialer := &net.Dialer{Timeout: hookTimeout, Control: func(_, address string, _ syscall.RawConn) error {
		return checkPublic(address, allowed)
	}}
	h.client = &http.Client{
		Timeout:       hookTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{ // has no Proxy, which would look at addresses in our place
			DialContext: dialer.DialContext, TLSHandshakeTimeout: hookTimeout,
			IdleConnTimeout: hookKeepAlive, MaxResponseHeaderBytes: maxHeader,
		},
	}
	return h
}

// notPublic are the parts of IPv4, and of the IPv6 networks in use (2000::/3), that are
// for special purposes (RFC 6890 and the registries that it began).
var notPublic = func() (all []netip.Prefix) {
	for network := range strings.FieldsSeq(`0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12
		192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4
		2001::/23 2001:db8::/32 2002::/16 3fff::/20`) {
		all = append(all, netip.MustParsePrefix(network))
	}
	return all
}()

var ipv6InUse = netip.MustParsePrefix("2000::/3")

// checkPublic fails for an address, with a port, that is neither public nor allowed. It is
// asked after names are resolved, about the very address to connect to.
func checkPublic(address string, allowed []netip.Prefix) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	a := ap.Addr()
	if !within(allowed, a.Unmap().WithZone("")) && (within(notPublic, a) || !a.Is4() && !ipv6InUse.Contains(a)) {
		return errors.New("not a public address, and not in -hook-allow")
	}
	return nil
}

// start begins to deliver. Links to messages begin with public.
func (h *hooks) start(public string) error {
	h.public = public
	all, err := h.store.Hooks(h.ctx, 0)
	for _, k := range all {
		h.add(k.Room.ID, k.ID)
	}
	return err
}

// close ends the tries under way, which happen again after a restart.
func (h *hooks) close() {
	h.mu.Lock()
	h.cancel()
	h.mu.Unlock()
	h.running.Wait()
	h.client.CloseIdleConnections()
}

func (h *hooks) add(room, id int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ctx.Err() != nil {
		return
	}
	wake := make(chan struct{}, 1)
	h.wakes[wake] = room
	h.running.Go(func() {
		h.run(id, wake)
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.wakes, wake)
	})
}

// nudge is told of what has been published. It never blocks.
func (h *hooks) nudge(events []Event) {
	for _, e := range events {
		if e.Kind == KindMessage && !e.Author.Bot {
			h.poke(e.Room.ID)
		}
	}
}

// poke lets the hooks of a room look at the store again.
func (h *hooks) poke(room int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for wake, of := range h.wakes {
		if of == room {
			poke(wake)
		}
	}
}

// run is one hook, until it is removed or close.
func (h *hooks) run(id int64, wake chan struct{}) {
	for {
		due, err := h.advance(id)
		switch {
		case h.ctx.Err() != nil, errors.Is(err, ErrNotFound):
			return
		case err != nil:
			h.log.Error("hook", "hook", id, "err", err)
			due = time.After(hookTimeout)
		}
		select {
		case <-due:
		case <-wake:
		case <-h.ctx.Done():
			return
		}
	}
}

// hookHears is what a hook h is told of events l by users u; a hook with mention not of all.
const hookHears = "l.room = h.room AND l.id > h.cursor AND l.kind = 'message' AND l.body IS NOT NULL AND NOT u.bot"

// advance tells a hook the next message, if there is one and it is time. due says when to
// look again if nobody wakes it. It fails with ErrNotFound if the hook has been removed.
func (h *hooks) advance(id int64) (due <-chan time.Time, err error) {
	all, err := h.store.Hooks(h.ctx, id)
	if err == nil && len(all) == 0 {
		err = ErrNotFound
	}
	if err != nil || !all[0].Works {
		return nil, err
	}
	k := all[0]
	if wait := time.Until(k.Due); wait > 0 {
		return time.After(wait), nil
	}
	next, limit := 0, 1
	if k.Mention {
		limit = replayPage
	}
	page, _, err := h.store.events(h.ctx, limit, "JOIN hooks h ON h.id = ? WHERE "+hookHears+" ORDER BY l.id", id)
	if err != nil || len(page) == 0 {
		return nil, err
	}
	if k.Mention {
		next = slices.IndexFunc(page, func(e Event) bool { return mentions(e.Body, k.Bot.Name) })
	}
	if next >= 0 {
		err = h.deliver(k, page[next])
	} else {
		err = h.store.update(func(w *writer) error {
			return w.exec("UPDATE hooks SET cursor = ? WHERE id = ?", page[len(page)-1].ID, id)
		})
	}
	return time.After(0), err
}

// deliver tells k of e once, and keeps what came of it.
func (h *hooks) deliver(k Hook, e Event) error {
	began := time.Now()
	status, answer, err := h.post(k, e)
	if h.ctx.Err() != nil { // we hung up
		return h.ctx.Err()
	}
	switch {
	case status == 0:
		h.outcomes.add("outcome=%q", "unanswered")
	case status/100 == 2:
		h.outcomes.add("outcome=%q", "delivered")
	default:
		h.outcomes.add("outcome=%q", "refused")
	}
	d := Delivery{Took: time.Since(began).Milliseconds(), Status: status}
	if err != nil {
		d.Error = err.Error()
	}
	return h.store.update(func(w *writer) error { return w.delivered(k, e, d, answer) })
}

// post sends e as Standard Webhooks have it (standardwebhooks.com). status is 0 if there
// was no answer. With an error and a status of 2xx e has arrived, and the answer is bad.
func (h *hooks) post(k Hook, e Event) (status int, answer string, err error) {
	body := encodeJSON(hookFrame{postedFrame{newEventFrame(e), permalink(h.public, e)}, k.ID})
	r, err := http.NewRequestWithContext(h.ctx, http.MethodPost, k.URL, bytes.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	id, at := fmt.Sprintf("msg_%d_%d", k.ID, e.ID), fmt.Sprint(time.Now().Unix())
	mac := hmac.New(sha256.New, k.secret)
	fmt.Fprintf(mac, "%s.%s.%s", id, at, body)
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("User-Agent", "chatd")
	r.Header.Set("webhook-id", id)
	r.Header.Set("webhook-timestamp", at)
	r.Header.Set("webhook-signature", "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil)))
	res, err := h.client.Do(r)
	if err != nil {
		return 0, "", errors.Unwrap(err) // without method and URL
	}
	defer res.Body.Close()
	if res.StatusCode/100 != 2 {
		return res.StatusCode, "", errors.New(cmp.Or(http.StatusText(res.StatusCode), "no success"))
	}
	answer, err = readAnswer(res)
	return res.StatusCode, answer, err
}

// readAnswer returns what the bot is to say, or "".
func readAnswer(res *http.Response) (text string, err error) {
	kind, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type"))
	if kind != "application/json" && kind != "text/plain" {
		return "", nil
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, maxHookAnswer+1))
	text = strings.TrimRight(string(body), "\r\n")
	if err == nil && kind == "application/json" && len(body) > 0 && len(body) <= maxHookAnswer {
		var in struct{ Message, Text string }
		err = json.Unmarshal(body, &in)
		text = cmp.Or(in.Message, in.Text)
	}
	switch {
	case err != nil:
		return "", fmt.Errorf("bad answer: %w", err)
	case len(text) > maxMessage:
		return "", errors.New("bad answer: too long")
	case !utf8.ValidString(text):
		return "", errors.New("bad answer: not UTF-8")
	case strings.TrimSpace(text) == "":
		return "", nil
	}
	return text, nil
}

// delivered keeps what came of telling k of e, and says the answer. A hook that has been
// removed meanwhile says nothing more.
func (w *writer) delivered(k Hook, e Event, d Delivery, answer string) error {
	cursor, failures, due, removed := e.ID, 0, int64(0), time.Time{}
	switch {
	case d.Status/100 == 2:
	case d.Status == http.StatusGone:
		cursor, removed = k.Cursor, w.now
	case w.now.Sub(e.Time) > hookPatience: // and the next one gets its try at once
		failures, d.Error = k.Failures+1, "given up: "+d.Error
	default:
		cursor, failures = k.Cursor, k.Failures+1
		rest := min(time.Second<<min(failures, 30), hookRest)
		due = w.now.Add(rest - mathrand.N(rest/4)).UnixMilli() // not all at once that failed at once
	}
	err := w.queryRow("UPDATE hooks SET cursor = ?, failures = ?, due = ?, removed = ? WHERE id = ? AND removed IS NULL RETURNING id",
		cursor, failures, due, timeOrNull(removed), k.ID).Scan(&k.ID)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err == nil && answer != "" {
		err = w.say(Event{Room: e.Room, Author: k.Bot, CID: fmt.Sprintf("hook-%d-%d", k.ID, e.ID), Target: e.ID, Body: answer})
		d.Reply = w.job.event.ID // 0 if it was not said
		if isOwnFault(err) {
			d.Error, err = "bad answer: "+err.Error(), nil
		}
	}
	if err == nil {
		err = w.exec(`INSERT INTO deliveries (hook, event, time, took, status, error, reply)
			SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7 WHERE EXISTS (SELECT 1 FROM log WHERE id = ?2)`, // or it was removed meanwhile
			k.ID, e.ID, w.now.UnixMilli(), d.Took, d.Status, fmt.Sprintf("%.*s", maxHookError, d.Error), orNull(d.Reply))
	}
	if err == nil {
		err = w.exec("DELETE FROM deliveries WHERE id <= (SELECT max(id) FROM deliveries) - ?", keptDeliveries)
	}
	return err
}

// CreateHook keeps a hook, of which it reads room, bot's name, URL and mention, and
// returns the key of its signatures, which nobody can find out later. The bot is a user of
// that name who is a bot, or nobody yet, and becomes a member of the room if that is
// private. The hook is told what is said from now on. It fails with ErrTaken if the name is
// a person's, and with ErrNotFound if the bot is not active.
func (s *Store) CreateHook(k Hook, admin User) (id int64, secret string, err error) {
	u, err := url.Parse(k.URL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.User != nil || len(k.URL) > maxHookURL {
		return 0, "", refuse(http.StatusBadRequest, "bad_hook_url", maxHookURL)
	}
	key := make([]byte, sha256.Size)
	rand.Read(key)
	err = s.update(func(w *writer) error {
		var many int
		if err := w.queryRow("SELECT count(*) FROM hooks WHERE removed IS NULL").Scan(&many); err != nil {
			return err
		}
		if many >= maxHooks {
			return refuse(http.StatusConflict, "many_hooks", maxHooks)
		}
		bot, err := w.botByName(k.Bot.Name)
		if err != nil {
			return err
		}
		if k.Room.Private {
			if err := w.changeMember(KindJoin, k.Room, bot); err != nil {
				return err
			}
		}
		err = w.queryRow(`
			INSERT INTO hooks (room, bot, url, secret, mention, creator, created, cursor)
			VALUES (?, ?, ?, ?, ?, ?, ?, (SELECT coalesce(max(id), 0) FROM log)) RETURNING id`,
			k.Room.ID, bot.ID, k.URL, key, k.Mention, admin.ID, w.now.UnixMilli()).Scan(&id)
		if err != nil {
			return err
		}
		return w.audit(admin, "hook.create", fmt.Sprint("#", id), fmt.Sprintf("%s, %s → %s", k.Room.Name, bot.Name, u.Host)) // the path may be a secret
	})
	return id, "whsec_" + base64.StdEncoding.EncodeToString(key), err
}

// botByName returns the bot of that name, who is made if nobody has it.
func (w *writer) botByName(name string) (User, error) {
	u, err := w.userByName(name)
	switch {
	case errors.Is(err, ErrNotFound):
		return w.createBot(name)
	case err != nil:
	case !u.Bot:
		err = ErrTaken
	case u.gone():
		err = ErrNotFound
	}
	return u, err
}

// ChangeHook removes a hook ("hook.remove") or lets it be tried at once ("hook.retry"), in
// the name of admin, and returns the hook's room. ErrNotFound: there is no such hook.
func (s *Store) ChangeHook(admin User, id int64, action string) (room int64, err error) {
	err = s.update(func(w *writer) error {
		removed, name := time.Time{}, ""
		if action == "hook.remove" {
			removed = w.now
		}
		err := w.queryRow(`UPDATE hooks SET due = 0, removed = ? WHERE id = ? AND removed IS NULL
			RETURNING room, (SELECT name FROM rooms WHERE id = room)`, timeOrNull(removed), id).Scan(&room, &name)
		if err != nil {
			return err
		}
		return w.audit(admin, action, fmt.Sprint("#", id), name)
	})
	return room, err
}

// Hooks returns the hook with that id, or, with 0, all, unless they have been removed.
func (s *Store) Hooks(ctx context.Context, id int64) ([]Hook, error) {
	return collect(ctx, s.read, func(k *Hook) []any {
		return k.Room.columns(&k.ID, &k.URL, &k.secret, &k.Mention, &k.Cursor, &k.Failures, millis{&k.Due}, &k.Bot.ID, &k.Bot.Name, &k.Bot.Role, &k.Bot.Bot,
			&k.Works, &k.Behind, millis{&k.Last.Time}, &k.Last.Status, &k.Last.Error)
	}, `
		SELECT h.id, h.url, h.secret, h.mention, h.cursor, h.failures, h.due, b.id, b.name, b.role, b.bot,
			b.deactivated IS NULL AND c.deactivated IS NULL AND (NOT r.private OR EXISTS (SELECT 1 FROM members WHERE room = r.id AND user = b.id)),
			CASE ?1 WHEN 0 THEN (SELECT count(*) FROM (SELECT 1 FROM log l JOIN users u ON u.id = l.author WHERE `+hookHears+` LIMIT ?2)) ELSE 0 END,
			d.time, coalesce(d.status, 0), coalesce(d.error, ''), `+roomColumns+`
		FROM hooks h JOIN rooms r ON r.id = h.room JOIN users b ON b.id = h.bot LEFT JOIN users c ON c.id = h.creator
			LEFT JOIN deliveries d ON d.id = (SELECT max(id) FROM deliveries WHERE hook = h.id)
		WHERE h.removed IS NULL AND ?1 IN (0, h.id) ORDER BY h.id`, id, countBehind)
}

// Deliveries returns the newest ones of all hooks, the last first.
func (s *Store) Deliveries(ctx context.Context, limit int) ([]Delivery, error) {
	return collect(ctx, s.read, func(d *Delivery) []any {
		return []any{&d.Hook, &d.Event, &d.Room, millis{&d.Time}, &d.Took, &d.Status, &d.Error, &d.Reply}
	}, `
		SELECT d.hook, d.event, r.name, d.time, d.took, d.status, d.error, coalesce(d.reply, 0)
		FROM deliveries d JOIN hooks h ON h.id = d.hook JOIN rooms r ON r.id = h.room ORDER BY d.id DESC LIMIT ?`, limit)
}

// hooksPage is what admin_hooks.html shows.
type hooksPage struct {
	All        []Hook
	Deliveries []Delivery
	Secret     string // of the hook that was just made; nobody sees it again
}

func (s *server) handleHooks(w http.ResponseWriter, r *http.Request, v visitor) error {
	return s.showHooks(w, r, v, page{}, "", nil)
}

func (s *server) showHooks(w http.ResponseWriter, r *http.Request, v visitor, p page, secret string, wrong error) error {
	all, err := s.store.Hooks(r.Context(), 0)
	deliveries, failed := s.store.Deliveries(r.Context(), historyPage)
	if err := cmp.Or(err, failed); err != nil {
		return err
	}
	p.Hooks = &hooksPage{all, deliveries, secret}
	return s.show(w, r, v, wrong, "admin_hooks.html", p)
}

// handleChangeHooks makes a hook, removes one, or lets it be tried now.
func (s *server) handleChangeHooks(w http.ResponseWriter, r *http.Request, v visitor) error {
	switch action := r.PostFormValue("action"); action {
	case "hook.create":
		secret, err := s.addHook(r, v.User)
		if err != nil {
			return s.showHooks(w, r, v, page{Form: formOf(r, "room", "username", "url", "mention")}, "", err)
		}
		return s.showHooks(w, r, v, page{}, secret, nil)
	case "hook.remove", "hook.retry":
		id, _, err := numberOf(r, "id")
		if err != nil {
			return err
		}
		room, err := s.store.ChangeHook(v.User, id, action)
		if err != nil {
			return err
		}
		s.hooks.poke(room)
		return s.redirect(w, r, "/admin/hooks/")
	}
	return refuse(http.StatusBadRequest, "bad_request")
}

func (s *server) addHook(r *http.Request, admin User) (secret string, err error) {
	room, err := s.store.Room(strings.TrimSpace(r.PostFormValue("room")))
	if err != nil || room.direct() || !s.hub.Sees(admin, room) {
		return "", refuse(http.StatusNotFound, "unknown_room")
	}
	bot, err := ownName(r)
	if err != nil {
		return "", err
	}
	k := Hook{Room: room, Bot: User{Name: bot}, URL: strings.TrimSpace(r.PostFormValue("url")), Mention: r.PostFormValue("mention") != ""}
	id, secret, err := s.store.CreateHook(k, admin)
	if err == nil {
		s.hooks.add(room.ID, id)
	}
	return secret, instead(err, ErrNotFound, refuse(http.StatusNotFound, "no_user"))
}
