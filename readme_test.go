package main

import (
	"bufio"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// readmeLines is what each line of the README's section on rooms as URLs has to print,
// or, after a #, to have said.
var readmeLines = []struct{ line, want string }{
	{"export CHATD_URL", ""},
	{"export CHATD_TOKEN", ""},
	{"room=$CHATD_URL", ""},
	{`curl -H "$auth" -d 'All tests pass'`, `"message":"All tests pass"`},
	{"date |", `"bot":true`},
	{`curl -H "$auth" --json '{"text"`, `"message":"what posts to Slack can post here"`},
	{`curl -H "$auth" --retry 9 -H 'Idem`, `"cid":"backup-2026-11-21"`},
	{`curl -N -H "$auth" $room`, "ci: just said"},
	{`curl -N -H "$auth" -H 'Accept: text/event-stream'`, `"message":"All tests pass"`},
	{`curl -N -H "$auth" -H 'Accept: application/x-ndjson'`, `"message":"All tests pass"`},
	{"chatd say builds 'Rel", "#Release 1.2 is out"},
	{"make 2>&1", "#cc -o all all.c"},
	{"chatd tail", "ci: just said"},
	{"chatd chat", "ci: just said"},
	{`curl -H "$auth" -d every=2s`, `"status":"success","id":1,"room":"builds"`},
	{`curl -H "$auth" -X POST "$CHATD_URL/push`, `实时推送`},
	{`curl -H "$auth" "$CHATD_URL/push`, `"pushes":[{"id":`},
	{`curl -H "$auth" -d stop=2`, `"status":"success","id":2`},
	{"install -m 600", ""},
	{"backup.sh || curl", `"message":"The backup failed"`},
	{"curl -fsS --retry 9 -H @", `"message":"nginx.service failed on chat"`},
	{"token=$(chatd token add", ""},
	{"secret=", ""},
	{"key=", ""},
	{"payload=", ""},
	{"signature=", ""},
	{"curl -H 'X-GitHub-Event: ping'", `"message":"[org/repo] ann connected this room. Keep it logically awesome."`},
	{`curl -fsS --retry 9 -H "Authorization`, `"message":"org/repo fails"`},
}

// TestReadme runs every line of that section, with the real curl, against the real chatd.
func TestReadme(t *testing.T) {
	for _, tool := range []string{"curl", "openssl", "bash"} {
		if _, err := exec.LookPath(tool); err != nil {
			need(t, tool+" is not installed")
		}
	}
	dir := t.TempDir()
	data := filepath.Join(dir, "data")
	newPeople(t, data, []string{"builds"}, "ann")
	d := startDaemon(t, data, "-rate", "0")
	if err := os.Symlink(os.Args[0], filepath.Join(dir, "chatd")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "make"), []byte("#!/bin/sh\necho cc -o all all.c\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	sh := startShell(t, dir)
	local := strings.NewReplacer("http://localhost:8080", d.url(""), "https://chat.example.org", d.url(""), "/etc/chatd-header", filepath.Join(dir, "header"),
		"${{ secrets.CHATD_TOKEN }}", "$CHATD_TOKEN", "%i", "nginx.service", "%H", "chat")
	lines := readmeShell(t)
	for i, line := range lines {
		if i >= len(readmeLines) || !strings.HasPrefix(line, readmeLines[i].line) {
			t.Fatalf("nothing is expected of %q", line)
		}
		want, out := readmeLines[i].want, ""
		if regexp.MustCompile(`^(curl -N|chatd tail|chatd chat)`).MatchString(line) {
			out = sh.listen(local.Replace(line), want)
		} else {
			out = sh.run(local.Replace(line))
		}
		if said, ok := strings.CutPrefix(want, "#"); ok {
			want, out = said, sh.run(`curl -H "$auth" -H 'Accept: application/json' $room`)
		}
		if !strings.Contains(out, want) || strings.Contains(out, `"type":"error"`) {
			t.Errorf("%s\n%s\nwant %s", line, out, want)
		}
	}
	if len(lines) != len(readmeLines) {
		t.Errorf("the README has %d lines, not %d", len(lines), len(readmeLines))
	}
}

// readmeShell returns the section's lines for a shell, also those within other files.
func readmeShell(t *testing.T) (lines []string) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(readme), "\n## A room is a URL\n")
	section, _, _ = strings.Cut(section, "\n## ")
	inside := map[string]*regexp.Regexp{
		"sh": regexp.MustCompile(`^(.+)$`), "crontab": regexp.MustCompile(`^(?:\S+ ){5} *(.+)$`),
		"ini": regexp.MustCompile(`^ExecStart=(.+)$`), "yaml": regexp.MustCompile(`^ *run: (.+)$`),
	}
	language, open := "", false
	for line := range strings.Lines(section) {
		line = strings.TrimSpace(line)
		if fence, ok := strings.CutPrefix(line, "```"); ok {
			language, open = fence, !open
		} else if open {
			if m := inside[language].FindStringSubmatch(line); m != nil {
				lines = append(lines, m[1])
			}
		}
	}
	return lines
}

// shell is a bash that runs a line after the other.
type shell struct {
	t     *testing.T
	stdin *os.File
	lines *bufio.Reader
	dir   string
}

func startShell(t *testing.T, dir string) *shell {
	t.Helper()
	c := exec.Command("bash")
	c.Dir = dir
	c.Env = append(chatdCommand().Env, "PATH="+dir+":"+os.Getenv("PATH"), "GITHUB_REPOSITORY=org/repo")
	in, stdin, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out, stdout, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	c.Stdin, c.Stdout, c.Stderr = in, stdout, stdout
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		wait(c)
	})
	out.SetReadDeadline(time.Now().Add(2 * tooLong)) // for all lines together
	s := &shell{t, stdin, bufio.NewReader(out), dir}
	s.run("set -m") // so that what runs beside it can be killed with all its parts
	return s
}

// run returns what a line prints.
func (s *shell) run(line string) (out string) {
	s.t.Helper()
	const end = "\x04end of it"
	fmt.Fprintf(s.stdin, "%s\necho $'\\n%s'\n", line, end)
	for {
		text, err := s.lines.ReadString('\n')
		if err != nil {
			s.t.Fatalf("%s: %v", line, err)
		}
		if strings.TrimSpace(text) == end {
			return out
		}
		out += text
	}
}

// listen runs a line that goes on for ever until it has printed want, which is said
// meanwhile, and by those who read from the keyboard too.
func (s *shell) listen(line, want string) string {
	s.t.Helper()
	heard := filepath.Join(s.dir, "heard")
	s.run("{ " + line + "\n} > " + heard + " 2>&1 < <(echo typed; sleep 5) &")
	defer s.run("kill -- -$!; wait $!")
	for deadline := time.Now().Add(tooLong); ; {
		s.run(`curl -s -H "$auth" -d 'just said' $room`)
		out, err := os.ReadFile(heard)
		if err != nil || time.Now().After(deadline) || strings.Contains(string(out), want) {
			return string(out)
		}
	}
}

// TestHookExample tells the README's receiver of webhooks something.
func TestHookExample(t *testing.T) {
	d := startDaemon(t, t.TempDir(), "-hook-allow", "127.0.0.0/8,::1/128")
	ann := d.setUp("ann")
	d.get(ann, "/chat/games/")
	free, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(free.Addr().String())
	free.Close()
	res, err := ann.PostForm(d.url("/admin/hooks"), url.Values{"action": {"hook.create"}, "room": {"games"}, "username": {"robot"}, "url": {"http://localhost:" + port + "/"}})
	if err != nil {
		t.Fatal(err)
	}
	var page strings.Builder
	if _, err := bufio.NewReader(res.Body).WriteTo(&page); err != nil {
		t.Fatal(err)
	}
	secret := regexp.MustCompile(`whsec_[\w+/=]+`).FindString(strings.ReplaceAll(page.String(), "&#43;", "+"))
	c := exec.Command("/usr/bin/python3", "testdata/clients/hook.py", port)
	c.Env = append(os.Environ(), "WEBHOOK_SECRET="+secret)
	said := startProgram(t, c)
	p := d.socket(ann, "/ws/chat/games/")
	p.send(opText, []byte(`{"message":"ping?"}`))
	for range 2 {
		f, err := p.nextChat()
		if err != nil {
			t.Fatalf("%v; the receiver said %s", err, said)
		}
		if f.Message == "pong, ann" && f.Username == "robot" {
			return
		}
	}
	t.Errorf("no answer; the receiver said %s", said)
}
