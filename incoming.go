package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// Webhooks of GitHub, and of Gitea, Forgejo and Gogs, which copy its format, can be
// pointed at a room. Those that can send a header of one's choice have a token in it.
// GitHub cannot, and signs instead: its payload URL has ?key=ID of a token in it, and
// its secret is the token's SHA-256 in hexadecimal, which is what we know of it. Only
// tokens of bots that are for posting into one room can be used in this way: whoever
// reads the database could sign as well, and gets no further than that.

const (
	maxPayload   = 1 << 20 // bytes of what GitHub sends; its own limit is 25 MiB
	shownCommits = 5
)

// bodyLimit is how many bytes of a request's body are read.
func bodyLimit(r *http.Request) int64 {
	if r.Header.Get("X-GitHub-Event") != "" {
		return maxPayload
	}
	return maxBody
}

// signer finds who signed a request. It reads the body and puts it back.
func (s *server) signer(r *http.Request, signature string) (visitor, error) {
	bad := refuse(http.StatusUnauthorized, "bad_signature")
	hash, err := s.store.SigningKey(r.Context(), r.URL.Query().Get("key"))
	if err != nil {
		return visitor{}, instead(err, ErrNotFound, bad)
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return visitor{}, badForm(err)
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	mac := hmac.New(sha256.New, []byte(hex.EncodeToString(hash)))
	mac.Write(body)
	if !hmac.Equal([]byte(signature), []byte("sha256="+hex.EncodeToString(mac.Sum(nil)))) {
		return visitor{}, bad
	}
	return s.store.TokenVisitor(r.Context(), hash)
}

// SigningKey returns the hash of a token that may be used for signatures, or ErrNotFound.
func (s *Store) SigningKey(ctx context.Context, id string) (hash []byte, err error) {
	err = s.queryRow(ctx, `
		SELECT t.hash FROM tokens t JOIN users u ON u.id = t.user
		WHERE t.id = ? AND t.revoked IS NULL AND t.scope = 'post' AND t.room IS NOT NULL AND u.bot`, id).Scan(&hash)
	return hash, err
}

// forgeEvent is what we read of a payload.
type forgeEvent struct {
	Action     string
	Zen        string
	Ref        string
	Deleted    bool
	Compare    string
	CompareURL string `json:"compare_url"` // Gitea's name for it
	Commits    []struct{ ID, Message string }
	Repository struct {
		FullName string `json:"full_name"`
	}
	Sender      struct{ Login string }
	PullRequest *forgeThing `json:"pull_request"`
	Issue       *forgeThing
	Release     *forgeThing
	WorkflowRun *forgeThing `json:"workflow_run"`
	CheckRun    *forgeThing `json:"check_run"`
	Comment     *forgeThing
}

// forgeThing is what an event is about.
type forgeThing struct {
	Number     int
	Title      string
	Name       string
	TagName    string `json:"tag_name"`
	Conclusion string
	HTMLURL    string `json:"html_url"`
}

// forgeText puts a payload into words, such as "[org/repo] ann opened pull request #1: …".
func forgeText(event string, payload []byte) (string, error) {
	var e forgeEvent
	if err := json.Unmarshal(payload, &e); err != nil {
		return "", refuse(http.StatusBadRequest, "bad_json")
	}
	who := fmt.Sprintf("[%s] %s", cmp.Or(e.Repository.FullName, "?"), e.Sender.Login)
	switch {
	case event == "ping":
		return fmt.Sprintf("%s connected this room. %s", who, e.Zen), nil
	case event == "push":
		return who + " " + e.push(), nil
	}
	text := strings.TrimSpace(who + " " + e.Action + " " + strings.ReplaceAll(event, "_", " "))
	thing := cmp.Or(e.PullRequest, e.Issue, e.Release, e.WorkflowRun, e.CheckRun)
	if thing != nil {
		if thing.Number != 0 {
			text += fmt.Sprintf(" #%d", thing.Number)
		}
		text += ": " + strings.Join(strings.Fields(cmp.Or(thing.Title, thing.Name, thing.TagName)+" "+thing.Conclusion), " ")
	}
	if thing = cmp.Or(e.Comment, thing); thing != nil {
		text += "\n" + thing.HTMLURL
	}
	return text, nil
}

func (e forgeEvent) push() string {
	branch := strings.TrimPrefix(strings.TrimPrefix(e.Ref, "refs/heads/"), "refs/")
	if e.Deleted {
		return "deleted " + branch
	}
	lines := []string{fmt.Sprintf("pushed %d commits to %s", len(e.Commits), branch)}
	for i, c := range e.Commits {
		if i == shownCommits {
			lines = append(lines, "…")
			break
		}
		subject, _, _ := strings.Cut(c.Message, "\n")
		lines = append(lines, fmt.Sprintf("%.7s %.200s", c.ID, subject))
	}
	return strings.Join(append(lines, cmp.Or(e.Compare, e.CompareURL)), "\n")
}
