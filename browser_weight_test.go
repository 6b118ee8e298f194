package main

import (
	"flag"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"
)

var figures = flag.Bool("figures", false, "print what the page weighs and how fast it is")

// speaker is somebody who says much in lab.
type speaker struct {
	p    *peer
	said int
}

func newSpeaker(t *testing.T, d *daemon, name string) *speaker {
	s := &speaker{p: d.socket(d.addUser(name), "/ws/chat/lab/")}
	s.p.conn.SetDeadline(time.Time{})
	var reader sync.WaitGroup
	reader.Go(func() {
		for err := error(nil); err == nil; {
			_, err = s.p.nextText()
		}
	})
	t.Cleanup(func() { s.p.conn.Close(); reader.Wait() })
	return s
}

// say says n messages, each at a tick but perTick of them.
func (s *speaker) say(n, perTick int, tick time.Duration) {
	for range time.Tick(tick) {
		for range perTick {
			s.said++
			s.p.send(opText, fmt.Appendf(nil, `{"message":"message %d: the quick brown fox jumps over the lazy dog"}`, s.said))
		}
		if n -= perTick; n <= 0 {
			return
		}
	}
}

// metrics are those of Chromium's renderer, by name.
func (b *browser) metrics() map[string]float64 {
	b.t.Helper()
	var got struct {
		Metrics []struct {
			Name  string
			Value float64
		}
	}
	b.askDevtools("Performance.getMetrics", &got)
	all := map[string]float64{}
	for _, m := range got.Metrics {
		all[m.Name] = m.Value
	}
	return all
}

// TestBrowserFigures prints figures of the page of a room, with -figures.
func TestBrowserFigures(t *testing.T) {
	if !*figures {
		t.Skip("-figures prints them")
	}
	d := startDaemon(t, t.TempDir(), "-rate", "0")
	d.setUp("alice")
	bob := newSpeaker(t, d, "bob")
	bob.say(historyPage, historyPage, time.Millisecond)
	alice := startBrowser(t, "alice", "en")
	alice.signIn(d, "lab")
	alice.waitOnline()
	alice.devtools("Performance.enable", anything{"timeDomain": "threadTicks"}) // others use the machine too
	t.Run("load", func(t *testing.T) { measureLoad(t, alice, d) })
	t.Run("message", func(t *testing.T) { measureMessages(t, alice, d, bob) })
	t.Run("flood", func(t *testing.T) { measureFlood(t, alice, d, bob) })
}

func measureLoad(t *testing.T, alice *browser, d *daemon) {
	for _, cache := range []string{"cold", "warm"} {
		runs := map[string][]float64{}
		for range 9 {
			alice.open("about:blank")
			if cache == "cold" {
				alice.devtools("Network.clearBrowserCache", anything{})
			}
			alice.open(d.url("/chat/lab/"))
			alice.waitOnline()
			alice.wait(`performance.getEntriesByName("first-contentful-paint").length`)
			for name, value := range alice.script(`
				const all = [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")].filter(e => e.transferSize > 0);
				const sum = f => all.reduce((n, e) => n + f(e), 0), [page] = performance.getEntriesByType("navigation");
				return { requests: all.length, "bytes with headers": sum(e => e.transferSize), "bytes of bodies": sum(e => e.encodedBodySize), "bytes unpacked": sum(e => e.decodedBodySize),
					"ms to the first byte": page.responseStart, "ms to the first messages": performance.getEntriesByName("first-contentful-paint")[0].startTime,
					"ms to loaded": page.loadEventEnd }`).(anything) {
				runs[name] = append(runs[name], value.(float64))
			}
		}
		for name, values := range runs {
			slices.Sort(values)
			t.Logf("%s cache: %.0f %s", cache, values[len(values)/2], name)
		}
	}
}

// measureMessages tells what a message costs the page that has had many.
func measureMessages(t *testing.T, alice *browser, d *daemon, bob *speaker) {
	const batch = 200
	alice.open(d.url("/chat/lab/"))
	alice.waitOnline()
	alice.keys(endKey)
	began := bob.said
	shows := func() {
		t.Helper()
		alice.wait(`[...document.querySelectorAll("#messages .body")].at(-1)?.textContent.startsWith(arguments[0])`, fmt.Sprintf("message %d:", bob.said))
	}
	for _, had := range []int{100, 1_000, 10_000} {
		bob.say(had-(bob.said-began), 20, 10*time.Millisecond)
		shows()
		before := alice.metrics()
		bob.say(batch, 1, 20*time.Millisecond)
		shows()
		after := alice.metrics()
		cost := func(name string) float64 { return (after[name] - before[name]) * 1e6 / batch }
		t.Logf("after %d messages one costs %.0f µs: script %.0f, style %.0f, layout %.0f; %.0f nodes, %.1f MB of JavaScript",
			had, cost("TaskDuration"), cost("ScriptDuration"), cost("RecalcStyleDuration"), cost("LayoutDuration"), after["Nodes"], after["JSHeapUsedSize"]/1e6)
	}
}

// measureFlood has 1,000 messages a second come in, for who reads the end and for who reads further up.
func measureFlood(t *testing.T, alice *browser, d *daemon, bob *speaker) {
	const seconds = 10
	for _, where := range []string{"at the end", "further up"} {
		alice.open(d.url("/chat/lab/"))
		alice.waitOnline()
		alice.keys(endKey)
		if where == "further up" {
			alice.script(`document.getElementById("messages").scrollTop = 400`)
			alice.settle()
		}
		alice.script(`
			const list = document.getElementById("messages"), row = [...list.querySelectorAll("li[data-id]")].find(li => li.getBoundingClientRect().top > list.getBoundingClientRect().top);
			const top = () => row.getBoundingClientRect().top, began = performance.now(), before = top();
			window.flood = { frames: 0, longest: 0, slow: 0, rows: 0, moved: 0 };
			new PerformanceObserver(seen => { for (const { duration } of seen.getEntries()) Object.assign(flood, { longest: Math.max(flood.longest, duration), slow: flood.slow + 1 }); })
				.observe({ type: "longtask" });
			requestAnimationFrame(function frame() {
				flood.frames++;
				flood.seconds = (performance.now() - began) / 1000;
				flood.rows = Math.max(flood.rows, document.querySelectorAll("#messages li[data-id]").length);
				flood.moved = row.isConnected ? Math.max(flood.moved, Math.abs(top() - before)) : 1e6;
				window.flooding = requestAnimationFrame(frame);
			});`)
		began := time.Now()
		bob.say(seconds*1000, 10, 10*time.Millisecond)
		took := time.Since(began)
		f := alice.script(`cancelAnimationFrame(flooding); return flood`).(anything)
		t.Logf("%.0f messages a second for %.1f s, %s: %.0f frames a second, %v tasks longer than 50 ms, the longest %.0f ms, at most %v rows",
			seconds*1000/took.Seconds(), took.Seconds(), where, f["frames"].(float64)/f["seconds"].(float64), f["slow"], f["longest"], f["rows"])
		if f["rows"].(float64) > 300 {
			t.Error("that are too many rows")
		}
		if where == "further up" && f["moved"].(float64) > 1 {
			t.Errorf("what is read moved by %v pixels", f["moved"])
		}
	}
}
