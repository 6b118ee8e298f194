package main

import (
	"crypto/subtle"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// findings is what chatd has to say about a request of the doctor's.
type findings struct {
	Proto, Host string
	Header      http.Header
	Body        int64       // bytes
	Peer        string      // who sent it to us
	Believed    bool        // X-Forwarded-For from there counts
	Sent        http.Header // of the answer

	URL                   string // as in -url
	Descriptors, MaxConns int
}

// handleDoctor tells the doctor what arrives of its requests. One for a socket that
// arrives as such becomes one, which says everything back; one for a stream gets an
// empty event at once and another after ?idle=. To all others there is nothing here.
func (s *server) handleDoctor(w http.ResponseWriter, r *http.Request, v visitor) error {
	if !s.knowsDoctor(r.PathValue("token")) {
		return ErrNotFound
	}
	switch {
	case checkHandshake(http.Header{}, r) == nil:
		return sayBack(w, r)
	case streamOf(r, v) == dialectSSE:
		return streamAfter(w, r.FormValue("idle"))
	}
	n, err := io.Copy(io.Discard, r.Body)
	if err != nil {
		return badForm(err)
	}
	s.setCookie(w, r, "doctor", "", time.Second)
	said := &http.Request{RemoteAddr: r.RemoteAddr, Header: http.Header{"X-Forwarded-For": {forgedAddress}}}
	return s.writeJSON(w, r, http.StatusOK, findings{
		Proto: r.Proto, Host: r.Host, Header: r.Header, Body: n, Sent: w.Header().Clone(),
		Peer: r.RemoteAddr, Believed: s.clientAddress(said) == forgedAddress,
		URL: s.public, Descriptors: descriptors(), MaxConns: s.hub.maxSockets,
	})
}

// knowsDoctor reports whether a doctor has left the hash of the token, and lately.
func (s *server) knowsDoctor(token string) bool {
	path := filepath.Join(s.data, doctorFile)
	info, err := os.Stat(path)
	if err != nil || time.Since(info.ModTime()) > doctorLife {
		return false
	}
	hash, err := os.ReadFile(path)
	return err == nil && subtle.ConstantTimeCompare(hash, hashToken(token)) == 1
}

// sayBack answers each message of a socket with itself.
func sayBack(w http.ResponseWriter, r *http.Request) error {
	c, err := hijack(w, maxControl)
	if err != nil {
		return err
	}
	defer c.finish()
	c.conn.SetDeadline(time.Now().Add(doctorLife))
	if c.handshake(r, "") != nil {
		return nil
	}
	for {
		opcode, msg, err := c.ReadMessage()
		if err != nil {
			return nil
		}
		c.push(appendFrame(nil, opcode, msg))
	}
}

func streamAfter(w http.ResponseWriter, idle string) error {
	wait, err := time.ParseDuration(idle)
	if err != nil {
		return refuse(http.StatusBadRequest, "bad_request")
	}
	c, err := hijack(w, maxControl)
	if err != nil {
		return err
	}
	defer c.conn.Close()
	c.conn.Write(append(streamHead(w.Header(), dialectSSE), dialectSSE.idle...))
	c.conn.SetReadDeadline(time.Now().Add(min(wait, doctorLife)))
	io.Copy(io.Discard, c.br) // ends sooner if the doctor leaves
	c.conn.Write(dialectSSE.idle)
	return nil
}
