package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"log/slog"
	"net/http"
	"regexp"
	"time"
)

// Each request has an id, which is in its answer and in every line of the log about
// it. What people say, their secrets and their queries are in none.

const requestHeader = "X-Request-Id"

var saneRequestID = regexp.MustCompile(`^[\w.-]{1,64}$`)

type requestKey struct{}

// requestID returns that of the request that ctx belongs to, or "".
func requestID(ctx context.Context) string {
	id, _ := ctx.Value(requestKey{}).(string)
	return id
}

// requestLog adds the request's id to what is logged with its context.
type requestLog struct{ slog.Handler }

func (l requestLog) Handle(ctx context.Context, line slog.Record) error {
	if id := requestID(ctx); id != "" {
		line.AddAttrs(slog.String("request", id))
	}
	return l.Handler.Handle(ctx, line)
}

// answer knows its status.
type answer struct {
	http.ResponseWriter
	status int // 0: net/http's default, or the connection was taken over
}

func (a *answer) WriteHeader(status int) {
	a.status = cmp.Or(a.status, status)
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// identified gives each request an id, that of a proxy in -trust if it has one, and
// counts it.
func (s *server) identified(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		began := time.Now()
		id := r.Header.Get(requestHeader)
		if !s.trusts(peerOf(r)) || !saneRequestID.MatchString(id) {
			id = rand.Text()
		}
		w.Header().Set(requestHeader, id)
		r = r.WithContext(context.WithValue(r.Context(), requestKey{}, id))
		a := &answer{ResponseWriter: w}
		next.ServeHTTP(a, r)
		status := cmp.Or(a.status, http.StatusOK)
		if a.status == 0 && wantsSocket(r) {
			status = http.StatusSwitchingProtocols
		}
		s.requests.add(`route=%q,class="%dxx"`, cmp.Or(r.Pattern, "none"), status/100)
		s.requestTime.observe(time.Since(began).Seconds())
	})
}
