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
// What is in a page can be told from its compressed length only by who has it asked for
// again and again with guesses in the address (BREACH). No page has a secret that stays,
// such as a cookie; for what people wrote, other sites' requests have no cookie (SameSite),
// but for links that are followed: those are answered as if compression were unknown.
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

// takesGzip reads Accept-Encoding (RFC 9110 §12.5.3), but for *, which nobody sends.
func takesGzip(r *http.Request) bool {
	for item := range strings.SplitSeq(strings.Join(r.Header.Values("Accept-Encoding"), ","), ",") {
		coding, weight, weighed := strings.Cut(item, ";")
		if strings.EqualFold(strings.TrimSpace(coding), "gzip") {
			return !weighed || strings.Trim(weight, " qQ=0.") != ""
		}
	}
	return false
}
