package main

import (
	"bytes"
	"compress/gzip"
	"net/http"
	"strconv"
	"strings"
)

const gzipLeast = 1 << 10 // bytes of an answer; fewer go into one packet anyway

// send answers with a body that is there as a whole, compressed for who takes that.
//
// What people wrote can be told from the length of a compressed page only by who has it
// asked for again and again with guesses in it (BREACH). What never changes and would be
// worth that is in no page: cookies are not, nothing is needed against forged forms, and
// tokens, links and secrets are shown once, when they are made. For messages and names
// there is the address to put guesses into, as pages have their own in them. Other sites'
// requests have no cookie (SameSite), but for links that are followed: those are answered
// as if compression were unknown.
func (s *server) send(w http.ResponseWriter, r *http.Request, status int, contentType string, body []byte) {
	h := w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Vary", "Accept-Encoding, Sec-Fetch-Site")
	site := r.Header.Get("Sec-Fetch-Site")
	if len(body) >= gzipLeast && takesGzip(r) && (site == "" || site == "same-origin" || site == "none") {
		body = s.compress(body)
		h.Set("Content-Encoding", "gzip")
	}
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	w.Write(body)
}

// sendJSON is writeJSON for long answers.
func (s *server) sendJSON(w http.ResponseWriter, r *http.Request, v any) error {
	s.send(w, r, http.StatusOK, "application/json", append(encodeJSON(v), '\n'))
	return nil
}

func (s *server) compress(content []byte) []byte {
	var b bytes.Buffer
	z, ok := s.gzips.Get().(*gzip.Writer)
	if !ok {
		z, _ = gzip.NewWriterLevel(nil, gzip.BestSpeed) // which is a level that there is
	}
	defer s.gzips.Put(z)
	z.Reset(&b)
	z.Write(content) // a buffer takes everything
	z.Close()
	return b.Bytes()
}

// takesGzip reads Accept-Encoding (RFC 9110 §12.5.3).
func takesGzip(r *http.Request) bool {
	others := false
	for item := range strings.SplitSeq(strings.Join(r.Header.Values("Accept-Encoding"), ","), ",") {
		coding, weight, weighed := strings.Cut(item, ";")
		q, err := strconv.ParseFloat(strings.TrimPrefix(strings.ToLower(strings.TrimSpace(weight)), "q="), 64)
		takes := !weighed || err == nil && q > 0
		switch strings.ToLower(strings.TrimSpace(coding)) {
		case "gzip":
			return takes
		case "*":
			others = takes
		}
	}
	return others
}
