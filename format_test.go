package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"unicode/utf8"

	"golang.org/x/net/html"
)

// formatTest is what ann reads.
func formatTest(text string) string {
	return string(formatMessage(text, "ann", func(name string) bool {
		name = foldName(name)
		return name == foldName("bob") || name == foldName("b.t") || name == foldName("build bot") || name == "小明" || name == "小明明"
	}))
}

// formatCases are the lines of testdata/format.txt.
func formatCases(t testing.TB) (cases [][2]string) {
	table, err := os.ReadFile("testdata/format.txt")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(strings.ReplaceAll(string(table), `\n`, "\r")) {
		if text, html, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " → "); ok && !strings.HasPrefix(line, "# What") {
			escapes := strings.NewReplacer("\r", "\n", `\t`, "\t")
			cases = append(cases, [2]string{escapes.Replace(text), escapes.Replace(html)})
		}
	}
	return cases
}

// hostile are texts that take long when one looks ahead at each of their characters.
func hostile() (texts []string) {
	for _, part := range []string{"*", "`", "@", "_", "~", "> ", "(", "*a ", "**a ", "`a ", "@a", "@a ", "@" + strings.Repeat("a ", 16), "@ann-", "http://",
		"http://(", "http://)", "http://a ", "\n", "x\n", "```\n", "```\n```\n", "> \n", "> a\n\n", "*_~~", "*a**b_c~~d", "汉@", "h", "***a* "} {
		texts = append(texts, strings.Repeat(part, maxMessage/len(part)))
	}
	for n := 1; n < 100; n++ {
		texts[0] += " " + strings.Repeat("`", n) + "a"
	}
	return texts
}

func TestFormat(t *testing.T) {
	for _, c := range formatCases(t) {
		if got := formatTest(c[0]); got != c[1] {
			t.Errorf("%q\ngot  %q\nwant %q", c[0], got, c[1])
		}
	}
}

// The page of a room has it, and mentions are of whoever is known there.
func TestFormattedRoom(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t, dir, false)
		ann, bob := s.session("ann"), s.session("bob")
		s.browse("POST", "/chat/lobby/", bob, "message=**hi**+@Ann+@BOB+@eve+%3Cb%3E")
		s.browse("POST", "/chat/lobby/", ann, "message=ok")
		want := `<strong>hi</strong> <span class="mention me">@Ann</span> <span class="mention">@BOB</span> @eve &lt;b&gt;</div>`
		if _, _, got := s.browse("GET", "/chat/lobby/", ann, ""); !strings.Contains(got, want) {
			t.Errorf("got %s\nwant %s", got, want)
		}
	})
}

// Both make the same of everything.
func TestBrowserFormat(t *testing.T) {
	needBrowser(t)
	t.Parallel()
	d := startDaemon(t, t.TempDir())
	cases := formatCases(t)
	random := rand.New(rand.NewPCG(1, 2))
	parts := strings.Split("* * ** ** *** _ _ ~~ ~~ ` ` `` ``` ~ **** > >  @ @ann @bob @all @小明 http:// https://a.test/ ( ) [ ] , . ; ' \" < & 字 ， 。 é "+
		"\u3000 \u200b \u00a0 \u00e9 e\u0301 😀 𠀀 a b 1 - \\ ſ K go", " ")
	parts = append(parts, " ", " ", "\n", "\n", "\n```", "\n> ", "\n\n", "\r", "\t", "build bot", "\u2028")
	for range 2000 {
		var text strings.Builder
		for range 1 + random.IntN(30) {
			text.WriteString(parts[random.IntN(len(parts))])
		}
		cases = append(cases, [2]string{text.String(), formatTest(text.String())})
	}
	for _, text := range hostile() {
		cases = append(cases, [2]string{text, formatTest(text)})
	}
	b := startBrowser(t, "alice", "en")
	b.open(d.url("/login/"))
	var wrong []struct{ Text, Want, Got string }
	b.do("POST", b.session+"/execute/async", anything{"args": []any{cases, d.url("/static/format.js")}, "script": `
		const [cases, url, done] = arguments, names = ["bob", "b.t", "build bot", "小明", "小明明"];
		const known = name => names.some(other => new RegExp("^" + other.replace(".", "\\.") + "$", "iu").test(name));
		const box = document.createElement("div"), wrong = [];
		import(url).then(({ format }) => {
			for (const [text, html] of cases) {
				box.innerHTML = html.replaceAll("\r", "&#13;"); // a parser would make it a line's end
				const want = box.innerHTML;
				box.replaceChildren(format(text, "ann", known));
				if (box.innerHTML !== want) wrong.push({ text, want, got: box.innerHTML });
			}
			done(wrong.slice(0, 5));
		}, error => done([{ got: String(error) }]));`}, &wrong)
	for _, c := range wrong {
		t.Errorf("%.500q\nGo      %.500q\nbrowser %.500q", c.Text, c.Want, c.Got)
	}
}

// What comes out has the allowed elements only, and all of the text but markers, spaces and code's language.
func FuzzFormat(f *testing.F) {
	for _, c := range formatCases(f) {
		f.Add(c[0])
	}
	allowed := regexp.MustCompile(`^<(strong|em|del|code|pre|blockquote|span class="mention(?: me)?"|` +
		`a href="(?i:https?)://[^"<>\s]+" rel="noopener noreferrer nofollow" target="_blank")>$`)
	block := regexp.MustCompile("^</?(pre|blockquote)>$")
	fence := regexp.MustCompile("(?m)^(> *)*```[\\w+#.-]*[ \\t]*$")
	bare := strings.NewReplacer("*", "", "_", "", "~", "", "`", "", ">", "", " ", "", "\n", "", "\x00", "\uFFFD")
	f.Fuzz(func(t *testing.T, text string) {
		if !utf8.ValidString(text) {
			return
		}
		var got strings.Builder
		var open []string
		for z := html.NewTokenizer(strings.NewReader(formatTest(text))); z.Next() != html.ErrorToken; {
			raw := string(z.Raw())
			switch token := z.Token(); {
			case token.Type == html.TextToken:
				got.WriteString(token.Data)
				continue
			case allowed.MatchString(raw):
				open = append(open, token.Data)
			case len(open) > 0 && raw == "</"+open[len(open)-1]+">":
				open = open[:len(open)-1]
			default:
				t.Fatalf("%q becomes %q", text, formatTest(text))
			}
			if block.MatchString(raw) || slices.Contains(open, "pre") {
				got.WriteString("\n")
			} else {
				got.WriteString("*")
			}
		}
		text = strings.ReplaceAll(text, "\r", "\n") // as parsers do
		if got, want := bare.Replace(fence.ReplaceAllString(got.String(), "")), bare.Replace(fence.ReplaceAllString(text, "")); got != want || len(open) > 0 {
			t.Errorf("%q becomes %q\nthe text is %q\nwant        %q", text, formatTest(text), got, want)
		}
	})
}

func BenchmarkFormat(b *testing.B) {
	for _, text := range append(hostile(), strings.Repeat("hello 大厅 ", 10)) {
		b.Run(fmt.Sprintf("%.9q", text), func(b *testing.B) {
			for b.Loop() {
				formatTest(text)
			}
		})
	}
}
