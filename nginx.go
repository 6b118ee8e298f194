package main

import (
	"cmp"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net"
	"regexp"
	"strings"
	"text/template"
)

//go:embed deploy/nginx.tmpl
var nginxText string

// nginxWord is what needs no quotes in nginx's configuration.
var nginxWord = regexp.MustCompile(`^[\w./:\[\]~-]*$`)

// nginx is `chatd nginx`: it prints what nginx needs to know, to be put in front of us.
func nginx(args []string, stdout io.Writer) error {
	flags := newFlags("chatd nginx")
	public := flags.String("url", "", "")
	addr := flags.String("addr", "localhost:8080", "")
	words, err := parseWords(flags, args)
	if err != nil {
		return err
	}
	u, err := parsePublic(*public)
	switch {
	case err != nil:
		return err
	case u.Scheme != "https" || len(words) > 0:
		return errors.New("say chatd nginx -url https://chat.example.org -addr localhost:8080")
	case !nginxWord.MatchString(u.Host + u.Path + *addr):
		return fmt.Errorf("%s and %s: only letters, digits and ._~:/- can be in what nginx is told", u, *addr)
	}
	upstream := *addr
	if !strings.HasPrefix(upstream, "unix:") {
		host, port, err := net.SplitHostPort(upstream)
		if err != nil {
			return fmt.Errorf("-addr: %w", err)
		}
		if ip := net.ParseIP(host); host == "" || host == "localhost" || ip.IsUnspecified() {
			host = "127.0.0.1" // nginx would also try ::1, where we do not listen
		}
		upstream = net.JoinHostPort(host, port)
	}
	base := strings.TrimSuffix(u.Path, "/")
	return template.Must(template.New("").Parse(nginxText)).Execute(stdout, map[string]string{
		"URL": u.String(), "Host": strings.TrimSuffix(u.Host, ":"+u.Port()), "Authority": u.Host, "Port": cmp.Or(u.Port(), "443"),
		"Base": base, "Pattern": regexp.QuoteMeta(base), "Addr": *addr, "Upstream": upstream,
	})
}
