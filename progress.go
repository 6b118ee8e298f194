package main

import (
	"fmt"
	"io"
	"os"
	"time"
)

// progress is a line on a terminal that says how far something long has got. On
// anything else than a terminal it says nothing.
type progress struct {
	terminal *os.File // nil: none
	what     string
	shown    time.Time
}

func newProgress(w io.Writer, what string) *progress {
	p := &progress{what: what}
	if f, ok := w.(*os.File); ok {
		if info, err := f.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			p.terminal = f
		}
	}
	return p
}

// show says that done of total is done, ten times a second at most.
func (p *progress) show(done, total int64) {
	if p.terminal != nil && time.Since(p.shown) > 100*time.Millisecond {
		p.shown = time.Now()
		fmt.Fprintf(p.terminal, "\r%s %d of %d (%d %%)\x1b[K", p.what, done, total, 100*done/max(total, 1))
	}
}

// end takes the line away.
func (p *progress) end() {
	if p.terminal != nil {
		fmt.Fprint(p.terminal, "\r\x1b[K")
	}
}
