package main

import (
	"html/template"
	"maps"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

// What stands in messages between markers. templates/format.js is this file for browsers, function by
// function, and testdata/format.txt says what both make of a text.

// marks are the tags of each marker. A longer or shorter run of its character is text.
var marks = map[string][2]string{
	"*": {"<em>", "</em>"}, "_": {"<em>", "</em>"}, "~~": {"<del>", "</del>"},
	"**": {"<strong>", "</strong>"}, "***": {"<strong><em>", "</em></strong>"},
}

var (
	// blocks are fenced code, up to the next fence or the end, and quoted lines. The word is the code's language.
	blocks = regexp.MustCompile("(?m)^```[\\w+#.-]*[ \\t\\r]*\n((?:.*\n)*?(?:.*\\z)??)(?:```[ \\t\\r]*$|\\z)|^> .*(?:\n>(?: .*)?$)*")
	quotes = regexp.MustCompile("(?m)^> ?")
	scheme = regexp.MustCompile("^(?i:https?)://")
)

// endsLink are the characters that no link goes on after: also Chinese, which is written against
// it, and what cannot be seen.
var endsLink = []*unicode.RangeTable{
	unicode.White_Space, unicode.Cc, unicode.Cf, unicode.Han, unicode.Hiragana, unicode.Katakana, unicode.Hangul, unicode.Bopomofo,
	{R16: []unicode.Range16{{'"', '"', 1}, {'<', '<', 1}, {'>', '>', 1}, {'`', '`', 1}, {0x2014, 0x2014, 1}, {0x2018, 0x201f, 1},
		{0x2026, 0x2026, 1}, {0x3000, 0x303f, 1}, {0xfe30, 0xfe6f, 1}, {0xff00, 0xffef, 1}}},
}

// A formatter is at work on one message.
type formatter struct {
	me    string
	known func(name string) bool
	out   []string // HTML, a piece for each marker, so that it can still become a tag
}

// formatMessage returns the HTML of a message. me is who reads it; known says which other names
// are somebody's, in any case. All of the text is in it but markers and lines' ends beside blocks,
// and it takes time in proportion to the text, whatever that is.
func formatMessage(text, me string, known func(name string) bool) template.HTML {
	f := &formatter{me: me, known: known}
	end := 0 // of the last block
	for _, at := range blocks.FindAllStringSubmatchIndex(text, -1) {
		f.inline(strings.TrimRight(text[end:at[0]], "\n"))
		if at[2] >= 0 {
			f.add("<pre><code>", template.HTMLEscapeString(strings.TrimSuffix(text[at[2]:at[3]], "\n")), "</code></pre>")
		} else {
			f.add("<blockquote>")
			f.inline(quotes.ReplaceAllString(text[at[0]:at[1]], ""))
			f.add("</blockquote>")
		}
		end = len(text) - len(strings.TrimLeft(text[at[1]:], "\n"))
	}
	f.inline(text[end:])
	return template.HTML(strings.Join(f.out, ""))
}

func (f *formatter) add(html ...string) { f.out = append(f.out, html...) }

// inline adds text that has no blocks.
func (f *formatter) inline(text string) {
	s := []rune("\n" + text + "\n") // so that every character has neighbours
	open := make(map[string]int)    // where in out the markers are that nothing has closed; of each the last
	plain := 1                      // from here on nothing is in out
	flush := func(end, next int) {
		f.add(template.HTMLEscapeString(string(s[plain:end])))
		plain = next
	}
	for i := 1; i < len(s)-1; {
		html, end := "", i+1
		switch s[i] {
		case '\n':
			clear(open)
		case '`':
			html, end = code(s, i)
		case '@':
			html, end = f.mention(s, i)
		case 'h', 'H':
			html, end = link(s, i)
		case '*', '_', '~':
			end = runEnd(s, i)
			mark := string(s[i:end])
			tags, isMark := marks[mark]
			at, isOpen := open[mark]
			inWord := func(r rune) bool { return end-i == 1 && isASCIIWord(r) }
			switch {
			case isMark && isOpen && !unicode.IsSpace(s[i-1]) && !inWord(s[end]):
				flush(i, end)
				f.out[at] = tags[0]
				f.add(tags[1])
				maps.DeleteFunc(open, func(_ string, inside int) bool { return inside >= at })
			case isMark && !unicode.IsSpace(s[end]) && !inWord(s[i-1]):
				flush(i, end)
				open[mark] = len(f.out)
				f.add(mark)
			}
		}
		if html != "" {
			flush(i, end)
			f.add(html)
		}
		i = end
	}
	flush(len(s)-1, 0)
}

// runEnd returns the end of the run of one character that begins at i.
func runEnd(s []rune, i int) int {
	end := i
	for s[end] == s[i] {
		end++
	}
	return end
}

// code, link and mention return what stands at i and its end, or "" and the end of what is text.
func code(s []rune, i int) (string, int) {
	start := runEnd(s, i)
	for j, end := start, 0; s[j] != '\n'; j = end {
		end = runEnd(s, j)
		if s[j] != '`' || end-j != start-i {
			continue
		}
		if unicode.IsSpace(s[start]) || unicode.IsSpace(s[j-1]) {
			break
		}
		return "<code>" + template.HTMLEscapeString(string(s[start:j])) + "</code>", end
	}
	return "", start
}

func link(s []rune, i int) (string, int) {
	start := i + len(scheme.FindString(string(s[i:min(i+8, len(s))])))
	if start == i || isASCIIWord(s[i-1]) {
		return "", i + 1
	}
	end, open := start, make(map[rune]int) // brackets in the link, by what closes them
	for j := start; !unicode.In(s[j], endsLink...); j++ {
		if k := strings.IndexRune("([{", s[j]); k >= 0 {
			open[rune(")]}"[k])]++
		}
		if strings.ContainsRune(")]}", s[j]) && open[s[j]] > 0 {
			open[s[j]]--
			end = j + 1
		} else if !strings.ContainsRune(".,;:!?'*_~)]}", s[j]) {
			end = j + 1
		}
	}
	if end == start {
		return "", i + 1
	}
	url := template.HTMLEscapeString(string(s[i:end]))
	return `<a href="` + url + `" rel="noopener noreferrer nofollow" target="_blank">` + url + "</a>", end
}

// mention has the rule of mentionOf. Nothing that a name consists of needs to be escaped.
func (f *formatter) mention(s []rune, i int) (string, int) {
	end := i + 1
	for isNamePart(s[end]) && end <= i+maxUserName {
		end++
	}
	for ; isNameEdge(s[i-1]) && end > i+1; end-- {
		after := end
		for strings.ContainsRune("_.-", s[after]) {
			after++
		}
		name := string(s[i+1 : end])
		mine := strings.EqualFold(name, f.me) || strings.EqualFold(name, "all") || name == "所有人"
		switch {
		case !isNameEdge(s[after]):
		case mine:
			return `<span class="mention me">@` + name + "</span>", end
		case f.known(name):
			return `<span class="mention">@` + name + "</span>", end
		}
	}
	return "", i + 1
}

func isASCIIWord(r rune) bool {
	return r < utf8.RuneSelf && (unicode.IsLetter(r) || unicode.IsDigit(r))
}

// isNamePart reports whether cleanName lets r stand in a name.
func isNamePart(r rune) bool {
	return unicode.In(r, unicode.L, unicode.M, unicode.Nd) || strings.ContainsRune(" ._-", r)
}

// isNameEdge reports whether a name may end beside r.
func isNameEdge(r rune) bool {
	return unicode.Is(unicode.Han, r) || !unicode.In(r, unicode.L, unicode.M, unicode.N) && !strings.ContainsRune("._-", r)
}

// namesKnown knows the people that the visitor may mention, and the authors of messages.
func namesKnown(people []string, events []Event) func(name string) bool {
	known := make(map[string]bool)
	for _, name := range people {
		known[foldName(name)] = true
	}
	for _, e := range events {
		known[foldName(e.Author.Name)] = true
	}
	return func(name string) bool { return known[foldName(name)] }
}
