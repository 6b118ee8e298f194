package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	firstInherited = 3   // descriptor, as systemd counts
	unixPeer       = "@" // the address of whoever comes by a Unix socket
)

// listen opens addr, host:port or unix:path. Sockets that systemd holds open for us
// come instead: while nobody runs, clients wait in them, and none is refused.
func listen(addr string) (listeners []net.Listener, err error) {
	if os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) {
		n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
		if err != nil || n < 1 {
			return nil, fmt.Errorf("LISTEN_FDS: %q is no number of sockets", os.Getenv("LISTEN_FDS"))
		}
		for fd := range n {
			f := os.NewFile(uintptr(firstInherited+fd), "socket")
			l, err := net.FileListener(f) // has a duplicate
			f.Close()
			if err != nil {
				return nil, fmt.Errorf("socket %d of systemd: %w", fd, err)
			}
			listeners = append(listeners, l)
		}
		return listeners, nil
	}
	path, isUnix := strings.CutPrefix(addr, "unix:")
	if !isUnix {
		l, err := net.Listen("tcp", addr)
		return []net.Listener{l}, err
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err == nil {
		err = os.Chmod(path, 0o660)
	}
	return []net.Listener{l}, err
}

// removeStale removes a socket that a process which was killed has left behind.
func removeStale(path string) error {
	info, err := os.Stat(path)
	if err != nil || info.Mode().Type() != os.ModeSocket {
		return nil // net.Listen knows what to say
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		conn.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return nil
	}
	return os.Remove(path)
}

// notify tells systemd, if it wants to know, how we are.
func (s *server) notify(state string) {
	path := os.Getenv("NOTIFY_SOCKET") // an abstract one begins with @, for net too
	if path == "" {
		return
	}
	conn, err := net.Dial("unixgram", path)
	if err == nil {
		_, err = conn.Write([]byte(state))
		conn.Close()
	}
	if err != nil {
		s.log.Warn("systemd is not told", "state", state, "err", err)
	}
}

// watchdog tells systemd that we are alive, until ctx is done: that is, as long as
// the writer answers. If it hangs we are restarted.
func (s *server) watchdog(ctx context.Context) {
	limit, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	if pid := os.Getenv("WATCHDOG_PID"); err != nil || limit < 2 || pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return
	}
	for pause(ctx, time.Duration(limit)*time.Microsecond/3) == nil {
		s.store.update(func(*writer) error { return nil }) // it may fail: on a full disk a restart is no help
		s.notify("WATCHDOG=1")
	}
}

// peerOf is the address at the other end. Of a Unix socket there is none, but only
// who may open its file can connect: it is trusted as a proxy.
func peerOf(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return unixPeer
	}
	return host
}

// urlFor is where the visitor finds us: -url, or else what a trusted proxy says, or
// the request itself.
func (s *server) urlFor(r *http.Request) string {
	if s.public != "" {
		return s.public
	}
	scheme, host := "http", r.Host
	if s.trusts(peerOf(r)) {
		host = cmp.Or(r.Header.Get("X-Forwarded-Host"), host)
		if r.Header.Get("X-Forwarded-Proto") == "https" {
			scheme = "https"
		}
	}
	return scheme + "://" + host
}
