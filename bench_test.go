package main

import (
	"bufio"
	"bytes"
	"database/sql"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// Compare within one run: machines differ, and so do their hours.

// BenchmarkFanout sends 32 messages to a room of 100 over TCP and waits until all
// have all of them: as chatd does it, committed first, and as the documentation of
// golang.org/x/net/websocket suggests.
func BenchmarkFanout(b *testing.B) {
	const people, window = 100, 32
	text := strings.Repeat("x", 100)
	b.Run("chatd", func(b *testing.B) { benchChatd(b, 1, people, window) })
	b.Run("naive", func(b *testing.B) {
		var mu sync.Mutex
		var room []*websocket.Conn
		addr := serveHTTP(b, websocket.Handler(func(ws *websocket.Conn) {
			mu.Lock()
			room = append(room, ws)
			mu.Unlock()
			io.Copy(io.Discard, ws)
		}))
		fanout(b, people, window, []string{"ws://" + addr + "/"}, func(string) {
			for _, ws := range room {
				if err := websocket.Message.Send(ws, text); err != nil {
					b.Fatal(err)
				}
			}
		})
	})
}

// BenchmarkFanoutRooms sends 4 messages to each of 100 rooms of 10.
func BenchmarkFanoutRooms(b *testing.B) { benchChatd(b, 100, 10, 4) }

func benchChatd(b *testing.B, rooms, people, window int) {
	s, addr := benchServer(b)
	text := strings.Repeat("x", 100)
	byURL := make(map[string]Room)
	var urls []string
	for i := range rooms {
		room, err := s.store.CreateRoom(fmt.Sprint("room", i), User{ID: 1})
		if err != nil {
			b.Fatal(err)
		}
		url := fmt.Sprintf("ws://%s/ws/chat/room%d/", addr, i)
		byURL[url] = room
		urls = append(urls, url)
	}
	fanout(b, people, window, urls, func(url string) {
		e := Event{Kind: KindMessage, Room: byURL[url], Author: User{ID: 1}, Body: text}
		if err := s.store.Append(e, func(_ Event, err error) {
			if err != nil {
				b.Error(err)
			}
		}); err != nil {
			b.Fatal(err)
		}
	})
}

// fanout puts people into the room of each URL. An iteration sends window
// messages to each room, and ends when everybody has them.
func fanout(b *testing.B, people, window int, urls []string, send func(url string)) {
	b.Helper()
	var arrived, readers sync.WaitGroup
	var conns []net.Conn
	for _, url := range urls {
		for range people {
			conn := dialRaw(b, url)
			conns = append(conns, conn)
			p := &peer{conn: conn, br: bufio.NewReaderSize(conn, 64<<10)}
			readers.Go(func() {
				for n := 1; ; n++ {
					if _, _, err := p.next(); err != nil {
						return
					}
					if n%window == 0 {
						arrived.Done()
					}
				}
			})
		}
	}
	began := time.Now()
	rounds := 0
	for b.Loop() {
		rounds++
		arrived.Add(len(conns))
		for range window {
			for _, url := range urls {
				send(url)
			}
		}
		arrived.Wait()
	}
	b.ReportMetric(float64(rounds*window*len(conns))/time.Since(began).Seconds(), "deliveries/s")
	for _, conn := range conns {
		conn.Close()
	}
	readers.Wait()
}

// BenchmarkIdle opens 1,000 connections that say nothing, and reports what each
// keeps: memory and goroutines, chatd's beside those of a plain handler.
func BenchmarkIdle(b *testing.B) {
	const conns = 1000
	run := func(b *testing.B, url string) {
		for b.Loop() {
			before := memoryInUse()
			goroutines := runtime.NumGoroutine()
			var open []net.Conn
			for range conns {
				open = append(open, dialRaw(b, url))
			}
			b.ReportMetric(float64(memoryInUse()-before)/conns, "B/conn")
			b.ReportMetric(float64(runtime.NumGoroutine()-goroutines)/conns, "goroutines/conn")
			for _, conn := range open {
				conn.Close()
			}
		}
	}
	b.Run("chatd", func(b *testing.B) {
		_, addr := benchServer(b)
		run(b, "ws://"+addr+"/ws/chat/lobby/")
	})
	b.Run("plain", func(b *testing.B) {
		run(b, "ws://"+serveHTTP(b, websocket.Handler(func(ws *websocket.Conn) { io.Copy(io.Discard, ws) }))+"/")
	})
}

// memoryInUse counts heap and stacks. The clients are in the same process, but
// have neither goroutines nor buffers.
func memoryInUse() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

func BenchmarkReadMessage(b *testing.B) {
	for _, size := range []int{16, 100, 1000, 8000} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			one := maskedFrame(0x80|opText, bytes.Repeat([]byte("é"), size/2))
			server, client := net.Pipe()
			go io.Copy(io.Discard, client)
			c := &Conn{outbox: outbox{conn: server}, br: bufio.NewReaderSize(endless{one, new(int)}, readBuffer), limit: maxFrame}
			if err := c.handshake(&http.Request{Header: http.Header{"Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="}}}, ""); err != nil {
				b.Fatal(err)
			}
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := c.ReadMessage(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// endless reads the same bytes again and again.
type endless struct {
	b  []byte
	at *int
}

func (e endless) Read(p []byte) (n int, err error) {
	n = copy(p, e.b[*e.at:])
	*e.at = (*e.at + n) % len(e.b)
	return n, nil
}

// BenchmarkAppend compares group commit with what a plain handler does: one
// INSERT, and so one transaction and one fsync, per message.
func BenchmarkAppend(b *testing.B) {
	s, _ := benchServer(b)
	room, err := s.store.CreateRoom("lobby", User{ID: 1})
	if err != nil {
		b.Fatal(err)
	}
	e := Event{Kind: KindMessage, Room: room, Author: User{ID: 1}, Body: strings.Repeat("x", 100)}
	appendOne := func() error { _, err := s.store.AppendWait(e); return err }

	dir := b.TempDir()
	newPeople(b, dir, []string{"lobby"}, "ann")
	db, err := sql.Open("sqlite", "file:"+filepath.Join(dir, "chatd.db")+"?_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=foreign_keys(1)")
	if err != nil {
		b.Fatal(err)
	}
	defer db.Close()
	db.SetMaxOpenConns(1)
	insert, err := db.Prepare("INSERT INTO log (kind, room, author, time, body) VALUES ('message', ?, ?, ?, ?)")
	if err != nil {
		b.Fatal(err)
	}
	defer insert.Close()
	insertOne := func() error { _, err := insert.Exec(room.ID, 1, time.Now().UnixMilli(), e.Body); return err }

	for _, bench := range []struct {
		name    string
		senders int
		send    func() error
	}{
		{"64-senders/group", 64, appendOne},
		{"64-senders/INSERT", 64, insertOne},
		{"lone/group", 1, appendOne},
		{"lone/INSERT", 1, insertOne},
	} {
		b.Run(bench.name, func(b *testing.B) {
			var left atomic.Int64
			left.Store(int64(b.N))
			var all sync.WaitGroup
			for range bench.senders {
				all.Go(func() {
					for left.Add(-1) >= 0 {
						if err := bench.send(); err != nil {
							b.Error(err)
						}
					}
				})
			}
			all.Wait()
		})
	}
}

func benchServer(b *testing.B) (*server, string) {
	b.Helper()
	var hub *Hub
	store, err := OpenStore(b.TempDir(), func(events []Event) { hub.Publish(events) })
	if err != nil {
		b.Fatal(err)
	}
	hub = NewHub(0, 0, 0)
	s, err := newServer(config{guests: true, trust: "127.0.0.0/8"}, store, hub, slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	if _, err := store.CreateUser("ann", RoleMember, ""); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		hub.Close()
		store.Close()
	})
	return s, serveHTTP(b, s.routes())
}

func serveHTTP(b *testing.B, handler http.Handler) string {
	b.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	server := &http.Server{Handler: handler}
	go server.Serve(listener)
	b.Cleanup(func() { server.Close() })
	return listener.Addr().String()
}

// dialRaw opens a WebSocket and reads no more than the answer.
func dialRaw(b *testing.B, url string) net.Conn {
	b.Helper()
	addr, path, _ := strings.Cut(strings.TrimPrefix(url, "ws://"), "/")
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	fmt.Fprintf(conn, "GET /%s HTTP/1.1\r\nHost: %s\r\nOrigin: http://%s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", path, addr, addr)
	answer := make([]byte, 1024)
	if n, err := conn.Read(answer); err != nil || !bytes.HasPrefix(answer[:n], []byte("HTTP/1.1 101")) {
		b.Fatalf("%s, %v", answer[:n], err)
	}
	return conn
}
