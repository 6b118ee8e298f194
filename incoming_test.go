package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const pushPayload = `{"ref":"refs/heads/main","compare":"https://git.test/org/repo/compare/1...2","repository":{"full_name":"org/repo"},"sender":{"login":"ann"},
	"commits":[{"id":"0123456789abcdef","message":"fix: all\n\nat last"},{"id":"fedcba9876543210","message":"修正"}]}`

func TestForgeText(t *testing.T) {
	for _, test := range []struct{ event, payload, want string }{
		{"push", pushPayload, "[org/repo] ann pushed 2 commits to main\n0123456 fix: all\nfedcba9 修正\nhttps://git.test/org/repo/compare/1...2"},
		{"push", `{"ref":"refs/tags/v1","deleted":true,"repository":{"full_name":"org/repo"},"sender":{"login":"ann"}}`, "[org/repo] ann deleted tags/v1"},
		{"push", `{"ref":"refs/heads/x","commits":[{},{},{},{},{},{}]}`, "[?]  pushed 6 commits to x\n \n \n \n \n \n…\n"},
		{"ping", `{"zen":"Speak like a human.","sender":{"login":"ann"}}`, "[?] ann connected this room. Speak like a human."},
		{"pull_request", `{"action":"opened","repository":{"full_name":"org/repo"},"sender":{"login":"ann"},
			"pull_request":{"number":7,"title":"Faster","html_url":"https://git.test/7"}}`, "[org/repo] ann opened pull request #7: Faster\nhttps://git.test/7"},
		{"issue_comment", `{"action":"created","sender":{"login":"bob"},"issue":{"number":5,"title":"Slow","html_url":"https://git.test/5"},
			"comment":{"html_url":"https://git.test/5#c"}}`, "[?] bob created issue comment #5: Slow\nhttps://git.test/5#c"},
		{"workflow_run", `{"action":"completed","sender":{"login":"ann"},"workflow_run":{"name":"CI","conclusion":"failure","html_url":"https://git.test/r"}}`,
			"[?] ann completed workflow run: CI failure\nhttps://git.test/r"},
		{"star", `{"action":"created","sender":{"login":"eve"},"repository":{"full_name":"org/repo"}}`, "[org/repo] eve created star"},
	} {
		if got, err := forgeText(test.event, []byte(test.payload)); got != test.want || err != nil {
			t.Errorf("%s: %q, %v, want %q", test.event, got, err, test.want)
		}
	}
	if _, err := forgeText("push", []byte("{")); problemOf(err).code != "bad_json" {
		t.Errorf("half a payload: %v", err)
	}
}

// TestSignedWebhook sends what GitHub sends, with keys that are right and wrong.
func TestSignedWebhook(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		s.session("ann")
		s.room("builds")
		s.room("lobby")
		keys := make(map[string]string)
		for i, k := range []Token{
			{User: "github", Bot: true, Room: "builds", Scope: scopePost},
			{User: "other", Bot: true, Room: "builds", Scope: scopeBoth},
			{User: "third", Bot: true, Scope: scopePost},
			{User: "ann", Room: "builds", Scope: scopePost},
			{User: "revoked", Bot: true, Room: "builds", Scope: scopePost},
		} {
			secret, err := s.store.CreateToken(k)
			if err != nil {
				t.Fatal(err)
			}
			keys[k.User] = fmt.Sprint(i+1, " ", hex.EncodeToString(hashToken(secret)))
		}
		if err := s.store.RevokeToken(5, User{}, Room{}); err != nil {
			t.Fatal(err)
		}
		keys["nobody"] = "99 x"
		send := func(who, room, payload, tamper string) (int, eventFrame) {
			id, secret, _ := strings.Cut(keys[who], " ")
			mac := hmac.New(sha256.New, []byte(secret))
			mac.Write([]byte(payload))
			status, _, answer := s.browse("POST", "/chat/"+room+"/?key="+id, "", payload+tamper, "Accept: */*", "Content-Type: application/json",
				"X-GitHub-Event: push", "X-GitHub-Delivery: d1", "X-Hub-Signature-256: sha256="+hex.EncodeToString(mac.Sum(nil)))
			var f eventFrame
			json.Unmarshal([]byte(answer), &f)
			return status, f
		}
		status, f := send("github", "builds", pushPayload, "")
		if status != 200 || f.Username != "github" || !f.Bot || !f.Pushed || f.CID != "d1" || !strings.Contains(f.Message, "2 commits") {
			t.Errorf("%d %+v", status, f)
		}
		if status, again := send("github", "builds", pushPayload, ""); status != 200 || again.ID != f.ID {
			t.Errorf("sent again: %d %+v", status, again)
		}
		if status, _ := send("github", "builds", strings.Replace(pushPayload, "fix", strings.Repeat("x", maxBody), 1), ""); status != 200 {
			t.Errorf("a long payload: %d", status)
		}
		if status, _ := send("github", "builds", pushPayload, strings.Repeat(" ", maxPayload)); status != 413 {
			t.Errorf("too long a payload: %d", status)
		}
		time.Sleep(time.Second) // the server lets that connection linger
		if status, _ := send("github", "lobby", pushPayload, ""); status != 404 {
			t.Errorf("another room: %d", status)
		}
		if status, _ := send("github", "builds", pushPayload, " "); status != 401 {
			t.Errorf("tampered with: %d", status)
		}
		for _, who := range []string{"other", "third", "ann", "revoked", "nobody"} {
			if status, _ := send(who, "builds", pushPayload, ""); status != 401 {
				t.Errorf("the key of %s: %d", who, status)
			}
		}
	})
}
