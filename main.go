// Chatd is a small team-chat daemon: one binary, one data directory.
package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	headerWait       = 10 * time.Second
	bodyWait         = 30 * time.Second
	keepAlive        = 2 * time.Minute
	maxHeader        = 16 << 10
	readWait         = 50 * time.Millisecond // for requests on connections just accepted, at the end
	pagesWait        = time.Second           // for pages under way
	spareDescriptors = 200
	burstSeconds     = 4 // of -rate may be used at once
)

const usage = `chatd is a team-chat daemon: one binary, one data directory.

  chatd [flags]                      serve
  chatd user add NAME [-admin]       make an account
  chatd user passwd NAME             give an account a new password
  chatd invite [-admin]              print a link that makes an account
  chatd invite -reset NAME           … that lets the user choose a new password
  chatd invite -guest ROOM           … that lets a guest into one room
  chatd token add -user NAME         print a token, by which a script comes in as NAME
  chatd token add -bot NAME          … as a bot, which is made if it is not there
  chatd token list
  chatd token revoke ID
  chatd tail ROOM [-n 10]            print what was and is said in a room
  chatd say ROOM [TEXT...]           say it, or each line of standard input
  chatd chat ROOM                    both
  chatd backup FILE [-f]             keep all that there is in one file; -f: replace it
  chatd restore FILE                 make a data directory of it
  chatd export FILE.jsonl            write everything down, to be read by programs or by import
  chatd export -html DIR             … as pages to read; -user NAME: what NAME may see, either way
  chatd import FILE.jsonl            make a data directory of an export
  chatd rollback [-yes]              say what undoing the last upgrade's migration loses; -yes: do it
  chatd import-django db.sqlite3     take users and messages over from a tutorial's chat
  chatd nginx -url URL [-addr ADDR]  print the configuration of an nginx in front of it
  chatd doctor -url URL              find what is wrong with the set-up, on the server itself
  chatd version
  chatd help

The user commands take the password from standard input, or make one up and print
it if that is a terminal. A link is good for -days 7 and -uses 1, and begins with
-url http://localhost:8080. A token is for all rooms or one -room, has a -scope of
read, post or both, may have a -label, and works for ever or so many -days. All
find the data with -data, and work while chatd runs, but for restore, import and rollback.

doctor calls the public URL, through the proxy, and says which line of whose
configuration is wrong. It has to see the data: -data, and -addr as chatd has it. With
-insecure it takes any certificate; -idle 0 does without the 70s of silence.

tail, say and chat work from anywhere: -url, or CHATD_URL, says where chatd is. They
come in by the token in CHATD_TOKEN, or in the file that -token-file names.

import-django also works while chatd runs. All its rooms are public here; what it
says in none goes into lobby. With -admins its superusers and staff are
administrators here. Its times are in UTC, or in the zone -tz, such as
Asia/Shanghai, if it had USE_TZ = False.

Flags:
`

func main() {
	syscall.Umask(0o077) // what we keep is for nobody else
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills
	if err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "chatd:", err)
		os.Exit(1)
	}
}

// run is chatd with its arguments, until it is done or ctx is.
func run(ctx context.Context, args []string, stdin *os.File, stdout, stderr io.Writer) error {
	command := ""
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		command, args = args[0], args[1:]
	}
	switch command {
	case "":
		return serve(ctx, args, stdout, stderr)
	case "user":
		return user(args, stdin, stdout)
	case "invite":
		return invite(args, stdout)
	case "token":
		return token(args, stdout)
	case "import-django":
		return importDjango(ctx, args, stdout, stderr)
	case "backup":
		return backup(ctx, args, stdout, stderr)
	case "restore":
		return restore(ctx, args, stdout)
	case "export":
		return export(ctx, args, stdout, stderr)
	case "import":
		return importLines(ctx, args, stdout, stderr)
	case "rollback":
		return rollback(ctx, args, stdout)
	case "tail", "say", "chat":
		return runClient(ctx, command, args, stdin, stdout, stderr)
	case "doctor":
		return visit(ctx, args, stdout)
	case "nginx":
		return nginx(args, stdout)
	case "version":
		fmt.Fprintln(stdout, version())
		return nil
	case "help":
		printUsage(stdout, serveFlags(new(config)))
		return nil
	}
	return fmt.Errorf("%q is not a command; see chatd help", command)
}

func printUsage(w io.Writer, flags *flag.FlagSet) {
	fmt.Fprint(w, usage)
	flags.SetOutput(w)
	flags.PrintDefaults()
}

func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "chatd (unknown)"
	}
	return fmt.Sprintf("chatd %s %s", info.Main.Version, info.GoVersion)
}

// config is what the flags of `chatd` say.
type config struct {
	addr, data, url, trust, origins, log string
	hookAllow, debug                     string
	guests, register                     bool
	authHeader                           string
	authCreate                           bool
	rate                                 float64
	maxConns, maxConnsPerAddr            int
}

func newFlags(name string) *flag.FlagSet {
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	f.SetOutput(io.Discard) // main prints the error
	return f
}

func serveFlags(c *config) *flag.FlagSet {
	f := newFlags("chatd")
	f.StringVar(&c.addr, "addr", "localhost:8080", "listen on `host:port`, or unix:path; on sockets of systemd if there are any")
	f.StringVar(&c.data, "data", "./data", "keep everything in `directory`")
	f.StringVar(&c.url, "url", "", "public `URL`, if it is not http://host:port; its path is where everything lives")
	f.StringVar(&c.trust, "trust", "127.0.0.0/8,::1/128", "believe X-Forwarded-For, and -auth-header, from these `networks`")
	f.StringVar(&c.hookAllow, "hook-allow", "", "let webhooks reach these `networks` too, not only public addresses")
	f.StringVar(&c.origins, "origins", "", "further `origins`, comma-separated, whose pages may open sockets")
	f.BoolVar(&c.guests, "guests", false, "let visitors without an account into public rooms")
	f.BoolVar(&c.register, "register", false, "let visitors make themselves an account")
	f.StringVar(&c.authHeader, "auth-header", "", "`name` of the header in which proxies in -trust say who the visitor is, such as Remote-User")
	f.BoolVar(&c.authCreate, "auth-create", false, "make an account for whom -auth-header names and nobody knows")
	f.Float64Var(&c.rate, "rate", 5, "messages per `second` and user, after a burst of four times that; 0: no limit")
	f.IntVar(&c.maxConns, "max-conns", socketsFor(descriptors()), "open `sockets` at most; 0: no limit")
	f.IntVar(&c.maxConnsPerAddr, "max-conns-per-addr", 0, "open `sockets` per address at most; 0: no limit")
	f.StringVar(&c.debug, "debug", "", "serve /metrics, /healthz and profiles on this loopback `host:port`")
	f.StringVar(&c.log, "log", "text", "`format` of the log, text or json")
	return f
}

// descriptors is how many files and sockets this process may have open. Go has
// raised it to the hard limit at the start.
func descriptors() int {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0
	}
	return int(min(limit.Cur, math.MaxInt32))
}

// socketsFor leaves some descriptors to the database and to pages.
func socketsFor(descriptors int) int { return max(descriptors-spareDescriptors, descriptors/2) }

// serve builds store, hub and server in this order, and takes them down in reverse:
//
//  1. No request is taken any more; those under way end within pagesWait.
//  2. The pusher says no more, the keeper and webhooks stop; what was under way is tried again
//     after the next start.
//  3. Hub.Close: each socket stops reading, waits for the answers to what it has
//     sent to the store, and says that the server restarts.
//  4. Store.Close: what is still queued is committed. Nobody is left to append.
//
// So what was taken is answered, and what was acknowledged is on disk. A kill -9
// in between only costs answers, and whoever has none sends again.
func serve(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	var c config
	flags := serveFlags(&c)
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		printUsage(stdout, flags)
		return nil
	case err != nil:
		return err
	case flags.NArg() > 0:
		return fmt.Errorf("%q is one argument too many; see chatd help", flags.Arg(0))
	}
	log, err := newLogger(c.log, stderr)
	if err != nil {
		return err
	}
	// An fsync keeps a processor of Go's scheduler: with only one, all would wait.
	runtime.GOMAXPROCS(max(2, runtime.GOMAXPROCS(0)))
	unlock, err := lockData(c.data)
	if err != nil {
		return err
	}
	defer unlock()
	var hub *Hub
	var s *server
	store, err := OpenStore(c.data, func(events []Event) {
		hub.Publish(events)
		s.hooks.nudge(events)
		s.keeper.nudge(events)
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	last, err := store.LastID(ctx)
	if err != nil {
		return err
	}
	hub = NewHub(last, c.maxConns, c.maxConnsPerAddr)
	defer hub.Close()
	s, err = newServer(c, store, hub, log)
	if err != nil {
		return err
	}
	stopDebug, err := s.startDebug(c.debug)
	if err != nil {
		return err
	}
	defer stopDebug()
	listeners, err := listen(c.addr)
	if err != nil {
		return err
	}
	defer inBackground(s.pushes.run, s.keeper.keep, s.keeper.wipeDeleted, store.keepIndexed, s.watchOthers, s.watchdog)()
	defer s.hooks.close()
	if err := s.hooks.start(s.publicURL(listeners[0].Addr())); err != nil {
		return err
	}
	return s.serve(ctx, listeners, stderr)
}

func newLogger(format string, w io.Writer) (*slog.Logger, error) {
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, nil)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, nil)), nil
	}
	return nil, fmt.Errorf("-log: %q is neither text nor json", format)
}

// lockData makes sure that one chatd serves a directory: another would not see
// the first one's messages come. The lock is gone with the process.
func lockData(dir string) (unlock func() error, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%s cannot be written to: %w", dir, err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another chatd serves %s", dir)
	}
	return f.Close, nil
}

func newServer(c config, store *Store, hub *Hub, log *slog.Logger) (*server, error) {
	log = slog.New(requestLog{log.Handler()})
	s := &server{
		store: store, hub: hub, log: log, config: c, public: strings.TrimSuffix(c.url, "/"),
		pushes:        &pusher{store, log, make(chan struct{}, 1)},
		keeper:        newKeeper(store, log),
		socketOrigins: http.NewCrossOriginProtection(),
		hashSlots:     make(chan struct{}, runtime.NumCPU()),
		logins:        newThrottle(loginBurst, loginPerSecond),
		addressLogins: newThrottle(addressLoginBurst, addressLoginPerSecond),
		nameLogins:    newThrottle(nameLoginBurst, nameLoginPerSecond),
		invites:       newThrottle(inviteBurst, invitePerSecond),
		connects:      newThrottle(connectBurst, connectsPerSecond),
		posts:         newThrottle(burstSeconds*c.rate, c.rate),
		typing:        newThrottle(burstSeconds, 1),
		searches:      newThrottle(searchBurst, searchesPerSecond),
		complaints:    newThrottle(10, 0.2),
		requestTime:   histogram{bounds: secondsBounds},
	}
	public, err := parsePublic(c.url)
	if err != nil {
		return nil, err
	}
	s.base, s.secure = strings.TrimSuffix(public.Path, "/"), public.Scheme == "https"
	if strings.ContainsAny(c.authHeader, " :=") {
		return nil, fmt.Errorf("-auth-header: %q is not like Remote-User", c.authHeader)
	}
	if s.trusted, err = parseNetworks(c.trust); err != nil {
		return nil, fmt.Errorf("-trust: %w", err)
	}
	allowed, err := parseNetworks(c.hookAllow)
	if err != nil {
		return nil, fmt.Errorf("-hook-allow: %w", err)
	}
	s.hooks = newHooks(store, log, allowed)
	for _, origin := range splitList(c.origins) {
		if err := s.socketOrigins.AddTrustedOrigin(origin); err != nil {
			return nil, fmt.Errorf("-origins: %w", err)
		}
	}
	members, err := store.Memberships(context.Background())
	if err != nil {
		return nil, err
	}
	hub.Publish(members)
	has, err := store.HasAdmin(context.Background())
	if err != nil {
		return nil, err
	}
	if !has {
		s.setUpToken = rand.Text()
	}
	return s, s.loadPages()
}

// parsePublic parses a public URL, which may be left out.
func parsePublic(public string) (*url.URL, error) {
	u, err := url.Parse(public)
	if err != nil || public != "" && (u.Host == "" || u.Scheme != "http" && u.Scheme != "https") {
		return nil, fmt.Errorf("-url: %q is not like https://chat.example.org/path", public)
	}
	return u, nil
}

func parseNetworks(list string) (networks []netip.Prefix, err error) {
	for _, network := range splitList(list) {
		p, wrong := netip.ParsePrefix(network)
		networks, err = append(networks, p), cmp.Or(err, wrong)
	}
	return networks, err
}

func splitList(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
}

// inBackground runs each of fs until stop is called, which ends their context and waits for them.
func inBackground(fs ...func(context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, f := range fs {
		running.Go(func() { f(ctx) })
	}
	return func() { cancel(); running.Wait() }
}

// pause waits, or fails as soon as ctx is done.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *server) httpServer() *http.Server {
	return &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: headerWait,
		ReadTimeout:       bodyWait,
		WriteTimeout:      bodyWait,
		IdleTimeout:       keepAlive,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
	}
}

// serve answers on listeners until ctx is done, and then lets pages under way finish.
func (s *server) serve(ctx context.Context, listeners []net.Listener, stderr io.Writer) error {
	srv := s.httpServer()
	serving := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { serving <- srv.Serve(l) }()
		s.log.Info("listening", "addr", l.Addr().String(), "descriptors", descriptors(), "max-conns", s.hub.maxSockets)
	}
	if s.setUpToken != "" {
		fmt.Fprintf(stderr, "\nNobody looks after this chatd yet. To set it up, open\n\n    %s/setup?token=%s\n\n", s.publicURL(listeners[0].Addr()), s.setUpToken)
	}
	s.notify("READY=1")
	select {
	case err := <-serving:
		return err
	case <-ctx.Done():
		s.notify("STOPPING=1")
		s.log.Info("stopping", "cause", context.Cause(ctx))
	}
	for _, l := range listeners {
		l.Close()
	}
	for range listeners {
		<-serving
	}
	time.Sleep(readWait) // once Shutdown has begun, net/http hangs up on requests that it has accepted and not read
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), pagesWait)
	defer cancel()
	if err := srv.Shutdown(grace); err != nil {
		s.log.Warn("requests cut off", "err", err)
		srv.Close()
	}
	return nil
}

// publicURL is where people find this chatd.
func (s *server) publicURL(listening net.Addr) string {
	if s.public != "" {
		return s.public
	}
	if listening.Network() == "unix" { // as a proxy passes it on
		return "http://localhost"
	}
	host, port, err := net.SplitHostPort(listening.String())
	if ip := net.ParseIP(host); err == nil && (ip.IsUnspecified() || ip.IsLoopback()) {
		host = "localhost"
	}
	return "http://" + net.JoinHostPort(host, port)
}

// user is `chatd user`: it works on the database, whether or not chatd runs.
func user(args []string, stdin *os.File, stdout io.Writer) error {
	flags := newFlags("chatd user")
	data := flags.String("data", "./data", "")
	admin := flags.Bool("admin", false, "")
	words, err := parseWords(flags, args)
	if err != nil {
		return err
	}
	if len(words) != 2 || words[0] != "add" && words[0] != "passwd" {
		return errors.New("say chatd user add NAME or chatd user passwd NAME")
	}
	name, err := userName(words[1])
	if err != nil {
		return fmt.Errorf("%q cannot be a user's name", words[1])
	}
	password, made, err := readPassword(stdin)
	if err != nil {
		return err
	}
	store, err := OpenStore(*data, nil)
	if err != nil {
		return err
	}
	defer store.Close()
	role := RoleMember
	if *admin {
		role = RoleAdmin
	}
	u, _, err := store.UserByName(context.Background(), name)
	switch {
	case words[0] == "add":
		_, err = store.CreateUser(name, role, hashPassword(password))
	case err == nil && u.Bot:
		err = ErrNotFound
	case err == nil:
		err = store.SetPassword(u, hashPassword(password), nil)
	}
	if err != nil {
		return fmt.Errorf("user %s: %w", name, err)
	}
	if made {
		fmt.Fprintf(stdout, "The password of %s is %s\n", name, password)
	}
	return nil
}

// parseWords returns what is no flag. Flags may stand anywhere, up to a --.
func parseWords(flags *flag.FlagSet, args []string) (words []string, err error) {
	for {
		if err := flags.Parse(args); err != nil {
			return nil, err
		}
		rest := flags.Args()
		if n := len(args) - len(rest); len(rest) == 0 || n > 0 && args[n-1] == "--" {
			return append(words, rest...), nil
		}
		words, args = append(words, rest[0]), rest[1:]
	}
}

// readPassword reads a line, or makes a password up when nobody has prepared one.
func readPassword(stdin *os.File) (password string, made bool, err error) {
	info, err := stdin.Stat()
	if err != nil || info.Mode()&os.ModeCharDevice != 0 {
		return rand.Text()[:16], true, nil
	}
	password, err = bufio.NewReader(stdin).ReadString('\n')
	if err != nil && err != io.EOF {
		return "", false, err
	}
	password = strings.TrimRight(password, "\r\n")
	if checkPassword(password) != nil {
		return "", false, fmt.Errorf("a password has %d characters or more", minPassword)
	}
	return password, false, nil
}
