package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"maps"
	"math"
	"net"
	"net/http"
	_ "net/http/pprof"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// What we know of how chatd does: /healthz for whoever restarts or warns, /metrics
// for who draws curves. Store, Hub, hooks and server count what they do in fields of
// their own; here it is put together.

const (
	healthEvery = time.Second     // between two checks
	healthWait  = 2 * time.Second // a commit that takes longer is none
)

// counters are numbers that only grow, by labels as Prometheus writes them.
type counters struct {
	mu sync.Mutex // guards by
	by map[string]int64
}

func (c *counters) add(format string, values ...any) {
	labels := fmt.Sprintf(format, values...)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.by == nil {
		c.by = make(map[string]int64)
	}
	c.by[labels]++
}

// Bounds of histograms.
var (
	secondsBounds = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, math.Inf(1)}
	batchBounds   = []float64{1, 2, 4, 8, 16, 32, 64, 128, 256, maxBatch, math.Inf(1)}
)

// histogram counts values by the first of its bounds, in rising order, that they do
// not exceed.
type histogram struct {
	bounds []float64  // 16 at most
	mu     sync.Mutex // guards the rest
	counts [16]int64
	sum    float64
}

func (h *histogram) observe(v float64) {
	i, _ := slices.BinarySearch(h.bounds, v)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.counts[i]++
	h.sum += v
}

// exposition is a text in Prometheus' format.
type exposition struct{ bytes.Buffer }

func (x *exposition) head(name, kind, help string) {
	fmt.Fprintf(x, "# HELP chatd_%s %s\n# TYPE chatd_%[1]s %[3]s\n", name, help, kind)
}

func (x *exposition) number(name, help string, v any) {
	kind := "gauge"
	if strings.HasSuffix(name, "_total") {
		kind = "counter"
	}
	x.head(name, kind, help)
	fmt.Fprintf(x, "chatd_%s %v\n", name, v)
}

func (x *exposition) counters(name, help string, c *counters) {
	x.head(name, "counter", help)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, labels := range slices.Sorted(maps.Keys(c.by)) {
		fmt.Fprintf(x, "chatd_%s{%s} %d\n", name, labels, c.by[labels])
	}
}

func (x *exposition) histogram(name, help string, h *histogram) {
	x.head(name, "histogram", help)
	h.mu.Lock()
	defer h.mu.Unlock()
	total := int64(0)
	for i, bound := range h.bounds {
		total += h.counts[i]
		fmt.Fprintf(x, "chatd_%s_bucket{le=\"%g\"} %d\n", name, bound, total)
	}
	fmt.Fprintf(x, "chatd_%s_sum %g\nchatd_%[1]s_count %[3]d\n", name, h.sum, total)
}

// handleMetrics is for administrators' programs. To all others nothing is there.
func (s *server) handleMetrics(w http.ResponseWriter, r *http.Request, v visitor) error {
	if v.Role != RoleAdmin || v.token == 0 || v.Only != 0 || !v.may(scopeRead) {
		return ErrNotFound
	}
	return s.sendMetrics(w, r, v)
}

func (s *server) sendMetrics(w http.ResponseWriter, r *http.Request, _ visitor) error {
	sockets, streams := s.hub.connections()
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	var x exposition
	x.counters("events_stored_total", "Events that were added to the log.", &s.store.stored)
	x.counters("commits_total", "Transactions, by what came of them.", &s.store.commits)
	x.histogram("commit_batch_size", "Writes in a transaction.", &s.store.batchSize)
	x.histogram("commit_duration_seconds", "Time of a transaction, up to its fsync.", &s.store.commitTime)
	x.number("deliveries_total", "Events, as frames, that were put into outboxes when they happened.", s.hub.deliveries.Load())
	x.number("sent_bytes_total", "Bytes written to sockets and streams.", s.hub.traffic.sent.Load())
	x.number("outbox_drops_total", "Sockets and streams that read too slowly and were told to come back (1013).", s.hub.traffic.drops.Load())
	x.number("sockets", "WebSockets that are open.", sockets)
	x.number("streams", "HTTP streams that are open.", streams)
	x.number("joins_total", "Sockets and streams that entered a room, or all.", s.hub.joins.Load())
	x.number("replays_total", "Of those, how many said what they had seen before.", s.replays.Load())
	x.number("replayed_events_total", "Events that they were sent from the log.", s.replayed.Load())
	x.counters("refused_total", "Requests and frames that were refused, by the error's code.", &s.refused)
	x.counters("webhook_deliveries_total", "Tries to tell webhooks.", &s.hooks.outcomes)
	x.counters("http_requests_total", "Requests, by route and class of status.", &s.requests)
	x.histogram("http_request_duration_seconds", "Time until a request was answered, or became a socket or stream.", &s.requestTime)
	x.number("goroutines", "Goroutines.", runtime.NumGoroutine())
	x.number("memory_bytes", "Memory that the Go runtime has from the system.", memory.Sys-memory.HeapReleased)
	x.number("start_time_seconds", "When the process started, in Unix time.", float64(start.UnixMilli())/1000)
	x.number("database_bytes", "Size of the database without its write-ahead log.", fileSize(s.store.dir, "chatd.db"))
	x.number("wal_bytes", "Size of the write-ahead log.", fileSize(s.store.dir, "chatd.db-wal"))
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	w.Write(x.Bytes())
	return nil
}

// connections returns how many sockets and streams are open.
func (h *Hub) connections() (sockets, streams int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for m := range h.members {
		if m.dialect.stream {
			streams++
		}
	}
	return len(h.members) - streams, streams
}

// fileSize is 0 if there is no such file.
func fileSize(dir, name string) int64 {
	info, err := os.Stat(filepath.Join(dir, name))
	if err != nil {
		return 0
	}
	return info.Size()
}

// health is what /healthz says. Strangers get no more than the first two.
type health struct {
	Status  string `json:"status"` // ok or failing
	Version string `json:"version"`
	*vitals
}

type vitals struct {
	Why        string     `json:"why,omitempty"`
	CommitMS   float64    `json:"commit_ms"` // of a write: queue, transaction, fsync and publish
	Lag        int64      `json:"lag"`       // how far the hub's newest id is behind the log's
	WALBytes   int64      `json:"wal_bytes"`
	DiskFree   uint64     `json:"disk_free_bytes"`
	LastBackup *time.Time `json:"last_backup"` // null: never
}

// checkup is the newest check.
type checkup struct {
	mu     sync.Mutex // guards the rest; held during a check, for whose result all others wait
	at     time.Time  // when it ended
	vitals vitals
	began  time.Time
	answer chan error // to the write that began then; nil: none is under way
}

// check looks at most once in healthEvery, and for healthWait or a little more. A
// writer that is stuck gets no second write to be stuck with.
func (c *checkup) check(store *Store, hub *Hub) vitals {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.at) < healthEvery {
		return c.vitals
	}
	select {
	case <-c.answer: // that the last check did not wait for
		c.answer = nil
	default:
	}
	if c.answer == nil {
		answer := make(chan error, 1)
		c.answer, c.began = answer, time.Now()
		go func() { answer <- store.probe() }() // ends when the store answers, and that answers before it closes
	}
	var v vitals
	select {
	case err := <-c.answer:
		c.answer = nil
		if err != nil {
			v.Why = "nothing can be written"
		}
	case <-time.After(healthWait):
		v.Why = fmt.Sprintf("no commit within %v", healthWait)
	}
	v.CommitMS = float64(time.Since(c.began).Microseconds()) / 1000
	ctx, cancel := context.WithTimeout(context.Background(), healthWait)
	defer cancel()
	last, err := store.LastID(ctx)
	if err != nil {
		v.Why = cmp.Or(v.Why, "nothing can be read")
	}
	v.Lag = max(0, last-hub.Last())
	v.WALBytes = fileSize(store.dir, "chatd.db-wal")
	if last, err := lastBackup(store.dir); err == nil {
		v.LastBackup = &last
	}
	var disk syscall.Statfs_t
	if syscall.Statfs(store.dir, &disk) == nil {
		v.DiskFree = disk.Bavail * uint64(disk.Bsize)
	}
	c.vitals, c.at = v, time.Now()
	return v
}

// probe returns when the writer has written, committed and published. Nothing is left
// of it: the row is gone in the same transaction, which makes SQLite write its page all
// the same, and the news concerns nobody.
func (s *Store) probe() error {
	return s.update(func(w *writer) error {
		w.tell(Event{Kind: KindRead})
		return w.exec("INSERT INTO sqlite_sequence VALUES ('health', 0); DELETE FROM sqlite_sequence WHERE name = 'health'")
	})
}

// handleHealth needs no visitor. Programs on this machine, that is not proxies on it, and
// administrators get more.
func (s *server) handleHealth(w http.ResponseWriter, r *http.Request) {
	peer, err := netip.ParseAddr(peerOf(r))
	more := err == nil && peer.Unmap().IsLoopback() && r.Header.Get("X-Forwarded-For") == ""
	if !more {
		v, err := s.visitor(r)
		more = err == nil && v.Role == RoleAdmin
	}
	s.sendHealth(w, r, more)
}

func (s *server) sendHealth(w http.ResponseWriter, r *http.Request, more bool) {
	v := s.health.check(s.store, s.hub)
	h, status := health{Status: "ok", Version: version()}, http.StatusOK
	if v.Why != "" {
		h.Status, status = "failing", http.StatusServiceUnavailable
	}
	if more {
		h.vitals = &v
	}
	s.writeJSON(w, r, status, h)
}

// startDebug serves figures and profiles on addr, if any, to this machine only. stop
// cuts off what is under way.
func (s *server) startDebug(addr string) (stop func(), err error) {
	if addr == "" {
		return func() {}, nil
	}
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("-debug: %w", err)
	}
	if a, ok := listener.Addr().(*net.TCPAddr); !ok || !a.IP.IsLoopback() {
		listener.Close()
		return nil, fmt.Errorf("-debug: %s is not a loopback address", addr)
	}
	srv := s.httpServer()
	srv.Handler, srv.WriteTimeout = s.debugRoutes(), 0 // profiles take as long as one asks for
	var serving sync.WaitGroup
	serving.Go(func() { srv.Serve(listener) })
	s.log.Info("debugging", "addr", listener.Addr().String())
	return func() { srv.Close(); serving.Wait() }, nil
}

func (s *server) debugRoutes() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", s.handler(s.sendMetrics))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) { s.sendHealth(w, r, true) })
	mux.Handle("GET /debug/pprof/", http.DefaultServeMux) // where package pprof puts them
	return mux
}
