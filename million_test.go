package main

import (
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var (
	millions     = flag.Int("messages", 3000, "how many messages TestMillion searches")
	searchRounds = flag.Int("searches", 3, "how often TestMillion asks each question")
)

// babble makes messages, half Chinese and half English, always the same ones. Words are
// as often as in languages: the n-th about 1/n of the first.
type babble struct {
	*rand.Rand
	words [2][]string
	ranks [2]*rand.Zipf
}

const (
	oftenChinese = "的 是 了 我 不 在 有 你 这个 我们 就 到 说 要 可以 和 好 看 没有 人 一下 都 也 还 能 那 去 问题 测试 服务器 数据库 上线 版本 今天 明天 时间 知道 需要 已经 现在 什么 怎么 因为 所以 如果 但是 文件 代码 更新 部署 机器 网络 消息 用户 房间 开始 完成 谢谢 大家"
	oftenEnglish = "the to is i and a it you in of for that on this we not with be have can but are if so was just do at will what as they there or like get from up an my all out now me no how when which time does one see think need make work here some more would use then also about good should them new code test run fix merge deploy server build branch release error log database"
)

func newBabble() *babble {
	b := &babble{Rand: rand.New(rand.NewPCG(1, 1)), words: [2][]string{strings.Fields(oftenChinese), strings.Fields(oftenEnglish)}}
	often := []rune(strings.ReplaceAll(oftenChinese, " ", ""))
	rare := rand.NewZipf(b.Rand, 1.05, 20, 2999)
	for range 20000 {
		var zh, en strings.Builder
		for range 2 + b.IntN(3)/2 + b.IntN(4)/3 {
			r := often[b.IntN(len(often))]
			if b.IntN(2) == 0 {
				r = '一' + rune(rare.Uint64()*7)
			}
			zh.WriteRune(r)
		}
		for range 2 + b.IntN(3) {
			en.WriteByte("bcdfghjklmnprstvw"[b.IntN(17)])
			en.WriteByte("aeiou"[b.IntN(5)])
		}
		b.words[0], b.words[1] = append(b.words[0], zh.String()), append(b.words[1], en.String())
	}
	for i, words := range b.words {
		b.ranks[i] = rand.NewZipf(b.Rand, 1.1, 8, uint64(len(words)-1))
	}
	return b
}

func (b *babble) message() string {
	var text strings.Builder
	language := b.IntN(2)
	for i := range 3 + b.IntN(12) {
		switch {
		case i > 0 && language == 1:
			text.WriteByte(' ')
		case i > 0 && b.IntN(6) == 0:
			text.WriteString("，")
		}
		text.WriteString(b.words[language][b.ranks[language].Uint64()])
	}
	if b.IntN(40) == 0 {
		fmt.Fprintf(&text, " https://example.org/issues/%d", b.IntN(10000))
	}
	return text.String()
}

// fill has much said in 50 rooms, every fifth of them private, by 50 people over two years and a half.
func (b *babble) fill(s *testServer, messages int) (texts []string) {
	var rooms []Room
	var people []User
	for i := range 50 {
		people = append(people, s.user(fmt.Sprint("user", i)))
		room, err := s.store.CreateRoom(fmt.Sprint("room", i), people[0])
		if i%5 == 0 {
			room, err = s.store.CreatePrivateRoom(fmt.Sprint("private", i), people[0], s.user("ann"))
		}
		if err != nil {
			s.t.Fatal(err)
		}
		rooms = append(rooms, room)
	}
	began, crowd := time.Now().AddDate(0, -30, 0), rand.NewZipf(b.Rand, 1.1, 3, 49)
	step := time.Since(began) / time.Duration(messages)
	for len(texts) < messages {
		err := s.store.update(func(w *writer) error {
			for range min(2000, messages-len(texts)) {
				at, text := began.Add(step*time.Duration(len(texts))), b.message()
				texts = append(texts, text)
				if _, err := w.insert.Exec("message", rooms[crowd.Uint64()].ID, people[crowd.Uint64()].ID, nil, at.UnixMilli(), nil, text, nil, false); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			s.t.Fatal(err)
		}
	}
	return texts
}

// catchUp has all indexed at once.
func (s *testServer) catchUp() {
	for left := int64(1); left > 0; {
		err := s.store.update(func(w *writer) (err error) {
			if _, err = w.index(); err == nil {
				err = w.queryRow("SELECT max(log.id) - indexed.id FROM log, indexed").Scan(&left)
			}
			return err
		})
		if err != nil {
			s.t.Fatal(err)
		}
	}
}

// cpuTime is what the process has used, which others on the machine do not lengthen much.
func cpuTime() time.Duration {
	var used syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &used)
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

// measure prints what doing something takes, and what processor time.
func (s *testServer) measure(what string, rounds int, f func(i int)) (median time.Duration) {
	took, used := make([]time.Duration, rounds), make([]time.Duration, rounds)
	for i := range took {
		began, cpu := time.Now(), cpuTime()
		f(i)
		took[i], used[i] = time.Since(began), cpuTime()-cpu
	}
	slices.Sort(took)
	slices.Sort(used)
	at := func(d []time.Duration, percent int) time.Duration {
		return d[rounds*percent/100].Round(10 * time.Microsecond)
	}
	s.t.Logf("%-50s p50 %8v p99 %8v, CPU p50 %8v p99 %8v", what, at(took, 50), at(took, 99), at(used, 50), at(used, 99))
	return used[rounds/2]
}

// TestMillion says how large the index is and how long it takes to search, to post and to
// read. For the real thing: go test -run Million -v -timeout 0 . -args -messages 1000000 -searches 300
func TestMillion(t *testing.T) {
	s := newTestServer(t, t.TempDir(), false)
	b := newBabble()
	began := time.Now()
	texts := b.fill(s, *millions)
	written := time.Since(began)
	began = time.Now()
	s.catchUp()
	t.Logf("%d messages written in %v, indexed in %v more", len(texts), written, time.Since(began))
	var log, index int64
	err := s.store.queryRow(t.Context(), `
		SELECT sum(pgsize) FILTER (WHERE name LIKE 'log%'), sum(pgsize) FILTER (WHERE name LIKE 'search%') FROM dbstat`).Scan(&log, &index)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("table with its other indices %d MB, index of words %d MB", log>>20, index>>20)
	s.measureSearches(b, texts)
	s.measurePages(b)
	s.measurePosting(b)
}

func (s *testServer) measureSearches(b *babble, texts []string) {
	// sample is n characters, or words, in a row from any message that has them.
	sample := func(language, n int) string {
		for {
			parts, between := strings.Fields(texts[b.IntN(len(texts))]), " "
			if language == 0 {
				parts, between = strings.Split(parts[0], ""), ""
			}
			if chinese := parts[0] > "z"; chinese == (language == 0) && len(parts) >= n && !strings.Contains(strings.Join(parts, ""), "，") {
				at := b.IntN(len(parts) - n + 1)
				return strings.Join(parts[at:at+n], between)
			}
		}
	}
	find := func(query string) int {
		found, _, err := s.store.Find(s.t.Context(), s.user("ann"), parseWanted(query), math.MaxInt64)
		if err != nil {
			s.t.Fatalf("%s: %v", query, err)
		}
		return len(found)
	}
	rare := func(language int) string {
		for {
			if q := b.words[language][len(b.words[language])-1-b.IntN(4000)]; find(q) > 0 && (language == 1 || len(q) == 6) {
				return q
			}
		}
	}
	quiet := " in:room" + fmt.Sprint(49)
	var rares [2][]string
	for language := range rares {
		for range 20 {
			rares[language] = append(rares[language], rare(language))
		}
	}
	for _, q := range []struct {
		what  string
		query func(i int) string
	}{
		{"one character", func(int) string { return sample(0, 1) }},
		{"two characters", func(int) string { return sample(0, 2) }},
		{"four characters", func(int) string { return sample(0, 4) }},
		{"a rare word of two characters", func(i int) string { return rares[0][i%20] }},
		{"a common word", func(int) string { return "the" }},
		{"a common word, not as a beginning", func(int) string { return `"the"` }},
		{"a rare word", func(i int) string { return rares[1][i%20] }},
		{"a phrase of two words", func(int) string { return `"` + sample(1, 2) + `"` }},
		{"two words", func(int) string { return sample(1, 1) + " " + sample(1, 1) }},
		{"one character in a quiet room", func(int) string { return sample(0, 1) + quiet }},
		{"two characters in a quiet room", func(int) string { return sample(0, 2) + quiet }},
		{"a common word in a private room", func(int) string { return "the in:private45" }},
		{"one character by somebody quiet", func(int) string { return sample(0, 1) + " from:user49" }},
		{"two characters by somebody, in a room, in a month", func(int) string { return sample(0, 2) + " from:user5 in:room6 after:2026-05 before:2026-06" }},
		{"one character before a day", func(int) string { return sample(0, 1) + " before:2025-02-03" }},
		{"links", func(int) string { return "has:link" }},
	} {
		queries := make([]string, *searchRounds)
		for i := range queries {
			queries[i] = q.query(i)
		}
		s.measure(q.what, *searchRounds, func(i int) { find(queries[i]) })
	}
	fast := s.measure("a rare word of two characters", *searchRounds, func(i int) { find(rares[0][i%20]) })
	slow := s.measure("the same with LIKE", min(*searchRounds, 20), func(i int) {
		_, err := collect(s.t.Context(), s.store.read, only[int64], "SELECT id FROM log WHERE kind = 'message' AND body LIKE ? ORDER BY id DESC LIMIT ?", containing(rares[0][i%20]), historyPage)
		if err != nil {
			s.t.Fatal(err)
		}
	})
	s.t.Logf("LIKE takes %.0f times as long", float64(slow)/float64(fast))
}

func (s *testServer) measurePages(b *babble) {
	ann := s.session("ann")
	get := func(path string) {
		if status, _, _ := s.browse("GET", path, ann, ""); status != 200 {
			s.t.Fatalf("%s: %d", path, status)
		}
	}
	s.measure("page of a room", *searchRounds, func(int) { get(fmt.Sprint("/chat/room", 1+b.IntN(4), "/")) })
	s.measure("older page of a room", *searchRounds, func(int) { get(fmt.Sprint("/chat/room1/?before=", 1+b.IntN(*millions))) })
	s.measure("place in a room", *searchRounds, func(int) { get(fmt.Sprint("/chat/room1/?at=", 1+b.IntN(*millions))) })
	s.measure("time in a room", *searchRounds, func(int) {
		at := time.Now().Add(-time.Duration(b.IntN(900*24)) * time.Hour).UTC().Format(time.RFC3339)
		s.browse("GET", "/chat/room1/?at="+at, ann, "")
	})
}

// measurePosting compares posting with an index and without, in turn.
func (s *testServer) measurePosting(b *babble) {
	room, ann := s.room("room1"), s.user("ann")
	for _, senders := range []int{1, 64} {
		var took, used [2][]float64
		for round := range 2 * (2 + *searchRounds/30) {
			s.catchUp()
			off := round % 2
			if err := s.store.update(func(w *writer) error {
				return w.exec("UPDATE indexed SET id = CASE WHEN ? THEN 1 << 62 ELSE (SELECT max(id) FROM log) END", off)
			}); err != nil {
				s.t.Fatal(err)
			}
			messages := max(*millions/100, 64) * min(senders, 4)
			texts := make([]string, messages)
			for i := range texts {
				texts[i] = b.message()
			}
			began := time.Now()
			cpu := cpuTime()
			var all sync.WaitGroup
			for i := range senders {
				all.Go(func() {
					for j := i; j < messages; j += senders {
						if _, err := s.store.AppendWait(Event{Kind: KindMessage, Room: room, Author: ann, Body: texts[j]}); err != nil {
							s.t.Error(err)
						}
					}
				})
			}
			all.Wait()
			took[off] = append(took[off], float64(messages)/time.Since(began).Seconds())
			used[off] = append(used[off], (cpuTime()-cpu).Seconds()*1e6/float64(messages))
		}
		for _, figures := range append(took[:], used[:]...) {
			slices.Sort(figures)
		}
		with, without := took[0][len(took[0])/2], took[1][len(took[1])/2]
		s.t.Logf("%d senders: %.0f messages/s with the index, %.0f without: %.2f; CPU %.0f and %.0f µs a message", senders, with, without, with/without,
			used[0][len(used[0])/2], used[1][len(used[1])/2])
	}
}
