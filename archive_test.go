package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The archive is read without a server: every link leads to a file of its own folder.
func TestArchive(t *testing.T) {
	dir := everything(t)
	path := filepath.Join(dir, "chatd.db")
	inFile(t, path, "INSERT INTO rooms (name, key, creator, created) VALUES ('../a b/CON', 'X', 1, 1)") // from before there were rules
	fill(t, path, archiveRows+5)                                                                        // in one month
	inFile(t, path, "UPDATE log SET time = time - 86400000 * 40 WHERE cid = 'f1'")
	all, bobs, anns := filepath.Join(t.TempDir(), "all"), filepath.Join(t.TempDir(), "bob"), filepath.Join(t.TempDir(), "ann")
	chatdSays(t, false, "messages", "export", "-data", dir, "-html", all)
	chatdSays(t, false, "messages", "export", "-data", dir, "-html", anns, "-user", "ann")
	chatdSays(t, false, "messages", "export", "-data", dir, "-html", bobs, "-user", "bob")
	pages := make(map[string]string)
	files, err := filepath.Glob(all + "/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		pages[filepath.Base(file)] = string(b)
	}
	var text strings.Builder
	for _, page := range pages {
		text.WriteString(page)
		for _, link := range regexp.MustCompile(`(?:href|src)="([^"#]+)"`).FindAllStringSubmatch(page, -1) {
			if pages[link[1]] == "" {
				t.Errorf("a link to %q, where nothing is", link[1])
			}
		}
	}
	if pages["4-1.html"] == "" || pages["4-2.html"] != "" {
		t.Errorf("%v; the last room should have two pages", files)
	}
	for _, want := range []string{"你好 &lt;b&gt;再见&lt;/b&gt;", "👍 1", "a reply", "大厅", "nobody else"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("%q is not in the archive", want)
		}
	}
	for _, never := range []string{"<script", "<b>再见", "pbkdf2", "\"gone\""} {
		if strings.Contains(text.String(), never) {
			t.Errorf("%q is in the archive", never)
		}
	}
	if exists(anns+"/2-0.html") || !exists(bobs+"/2-0.html") {
		t.Error("not bob alone has the private room in his archive")
	}
}
