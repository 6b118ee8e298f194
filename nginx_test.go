package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// front is a real nginx, with TLS and the configuration that chatd prints.
type front struct {
	t     *testing.T
	url   string // the public one of the chatd behind it
	plain string // where nginx answers without TLS
	tls   *tls.Config
}

const nginxMain = `
user root;
pid nginx.pid;
error_log error.log;
events { worker_connections 4096; }
http {
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    scgi_temp_path scgi;
    uwsgi_temp_path uwsgi;
    include chatd.conf;
}
`

// startNginx starts it for a chatd that listens on addr, under the path base. It
// inherits its sockets, so that it need not have started when the first client comes.
// Edits are what is in the configuration, and what is to be there instead.
func startNginx(t *testing.T, base, addr string, edits ...string) *front {
	t.Helper()
	if _, err := exec.LookPath("nginx"); err != nil {
		need(t, "nginx is not installed")
	}
	dir := t.TempDir()
	plain, plainFile := inherited(t)
	secure, secureFile := inherited(t)
	f := &front{t, "https://" + secure + base, "http://" + plain, newCertificate(t, dir)}
	var conf strings.Builder
	if err := nginx([]string{"-url", f.url, "-addr", addr}, &conf); err != nil {
		t.Fatal(err)
	}
	text := regexp.MustCompile(`.*listen \[::\].*\n`).ReplaceAllString(conf.String(), "")
	text = strings.Replace(text, "listen 80;", "listen "+plain+";", 1)
	text = regexp.MustCompile(`listen \d+ ssl`).ReplaceAllString(text, "listen "+secure+" ssl")
	text = regexp.MustCompile(`/etc/letsencrypt/live/[^/]*/`).ReplaceAllString(text, "")
	text = strings.NewReplacer(edits...).Replace(text)
	for name, content := range map[string]string{"nginx.conf": nginxMain, "chatd.conf": text} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	command := func(args ...string) *exec.Cmd {
		cmd := exec.Command("nginx", append([]string{"-p", dir, "-c", "nginx.conf", "-e", "error.log"}, args...)...)
		cmd.Env, cmd.ExtraFiles = append(os.Environ(), "NGINX=3;4;"), []*os.File{plainFile, secureFile}
		return cmd
	}
	if out, err := command("-t").CombinedOutput(); err != nil || strings.Contains(string(out), "[warn]") {
		t.Fatalf("nginx -t: %v\n%s", err, out)
	}
	cmd := command()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(os.Interrupt)
		cmd.Wait()
		if t.Failed() {
			said, _ := os.ReadFile(filepath.Join(dir, "error.log"))
			t.Logf("nginx said:\n%s", said)
		}
	})
	return f
}

// inherited is a socket that another process can answer on.
func inherited(t *testing.T) (addr string, file *os.File) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err == nil {
		file, err = l.(*net.TCPListener).File()
		l.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return l.Addr().String(), file
}

// newCertificate makes one that signs itself, and a configuration that believes it.
func newCertificate(t *testing.T, dir string) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for name, content := range map[string][]byte{"fullchain.pem": cert, "privkey.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(cert)
	return &tls.Config{RootCAs: roots}
}

// The configuration that is shown is the one that is printed, and nothing gets into
// it that nginx would take for more than a name.
func TestNginxConfiguration(t *testing.T) {
	var conf strings.Builder
	shown, err := os.ReadFile("deploy/nginx.conf")
	if err == nil {
		err = nginx([]string{"-url", "https://chat.example.org", "-addr", "localhost:8080"}, &conf)
	}
	if err != nil || conf.String() != string(shown) {
		t.Errorf("%v; now deploy/nginx.conf has to be\n%s", err, &conf)
	}
	for _, args := range []string{"", "-url http://chat.test", "-url https://a;b", "-url https://a/b;c", "-url https://a/$b", "-url https://a/%0ab",
		"-url https://a -addr unix:/a;b", "-url https://a -addr localhost", "-url https://a word"} {
		if err := nginx(strings.Fields(args), io.Discard); err == nil {
			t.Errorf("chatd nginx %s: no error", args)
		}
	}
}

// nginx takes it, leads to https, speaks HTTP/2, leaves the path as it is, and lets
// nothing through by which visitors would pretend to be others.
func TestNginxForwards(t *testing.T) {
	for base, network := range map[string]string{"": "tcp", "/some/path.d": "unix"} {
		addr := "127.0.0.1:0"
		if network == "unix" {
			addr = filepath.Join(t.TempDir(), "sock")
		}
		l, err := net.Listen(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		behind := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h := r.Header
			fmt.Fprintln(w, r.URL, r.Host, h["X-Forwarded-For"], h["X-Forwarded-Proto"], h["X-Forwarded-Host"], h["Remote-User"])
		})}
		go behind.Serve(l)
		defer behind.Close()
		f := startNginx(t, base, strings.TrimPrefix(network+":"+l.Addr().String(), "tcp:"))
		c := &http.Client{Transport: &http.Transport{TLSClientConfig: f.tls, ForceAttemptHTTP2: true}}
		for _, path := range []string{base + "/a%20b?c", base + "/ws", base + "/chat/%E5%A4%A7/"} {
			r, err := http.NewRequest("GET", f.plain+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Header = http.Header{"X-Forwarded-For": {"9.9.9.9"}, "X-Forwarded-Host": {"x"}, "Remote-User": {"root"}}
			res, err := c.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			text, _ := io.ReadAll(res.Body)
			res.Body.Close()
			host := res.Request.URL.Host
			if want := fmt.Sprintln(path, host, "[127.0.0.1] [https]", "["+host+"]", "[]"); string(text) != want || res.ProtoMajor != 2 {
				t.Errorf("%s: %s %s, want %s", path, res.Proto, text, want)
			}
		}
	}
}
