package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"html/template"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/net/websocket"
)

// ---- Helpers of the tests ----
//
// A test of a room runs a server in this process, with a clock that stands still until
// the test moves it (startServer). A test of the whole runs the real binary (startBinary).
// Both are driven over real sockets by a testClient, which can also do what it must not.

const (
	testKey = "e2e-shared-secret-0123456789abcdef0123456789" // signed the captured tokens
	repoA   = "282be60e-4f81-4782-8b6a-9698382f7301"
	repoB   = "5f1c8d0e-0000-4000-8000-00000000000b"
	mebi    = 1 << 20
	patient = 20 * time.Second // for what must come; a test that passes rarely waits so long
)

// TestMain runs the server instead of the tests where a test starts its own binary,
// with a clock that does what that test needs (see startSelf).
func TestMain(m *testing.M) {
	if fault := os.Getenv("TEST_CLOCK"); fault != "" {
		os.Exit(run(os.Args[1:], os.Getenv, os.Stdout, os.Stderr, faultyClock(fault)))
	}
	flag.Set("test.parallel", "12")          // most tests wait more than they work
	os.Setenv("GORACE", "atexit_sleep_ms=0") // for the binaries that tests start
	code := m.Run()
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// need skips a test whose program is not installed, and fails it in CI.
func need(t testing.TB, programs ...string) {
	t.Helper()
	for _, program := range programs {
		if _, err := exec.LookPath(program); err == nil {
			continue
		}
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed", program)
		}
		t.Skipf("%s is not installed", program)
	}
}

// slow skips a test that takes so long, unless all are asked for.
func slow(t testing.TB, takes string) {
	t.Helper()
	if testing.Short() && os.Getenv("CI") != "true" {
		t.Skip("takes " + takes)
	}
}

// waitFor waits until the condition holds.
func waitFor(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(patient); !condition(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v in vain: %s", patient, what)
		}
	}
}

// withinOnce demands that f takes less than limit at least once in five times: others
// use this machine, too.
func withinOnce(t testing.TB, limit time.Duration, f func()) {
	t.Helper()
	var took time.Duration
	for range 5 {
		start := time.Now()
		f()
		if took = time.Since(start); took < limit {
			return
		}
	}
	t.Errorf("took %v, which must be less than %v", took, limit)
}

// underRace tells that this binary was built with -race, which takes ten times the CPU:
// the big tests then do less.
var underRace = sync.OnceValue(func() bool {
	info, _ := debug.ReadBuildInfo()
	for _, s := range info.Settings {
		if s.Key == "-race" {
			return s.Value == "true"
		}
	}
	return false
})

// howMany is n, or few under -race, or what TEST_FLOOD says, for a trial by hand.
func howMany(n, few int) int {
	if byHand, err := strconv.Atoi(os.Getenv("TEST_FLOOD")); err == nil {
		return byHand
	}
	if underRace() {
		return few
	}
	return n
}

// raceFactor multiplies what may take long or much.
func raceFactor() float64 {
	if underRace() {
		return 10
	}
	return 1
}

// ---- Tokens and events ----

const tokenHead = `{"alg":"HS256","typ":"JWT"}`

// signToken makes a token independently of the server's code.
func signToken(key, header, claims string) string {
	enc := base64.RawURLEncoding.EncodeToString
	text := enc([]byte(header)) + "." + enc([]byte(claims))
	mac := hmac.New(sha256.New, []byte(key))
	mac.Write([]byte(text))
	return text + "." + enc(mac.Sum(nil))
}

// clientToken is a library token as a client has it; it expires at exp.
func clientToken(repoID, user string, exp time.Time) string {
	claims := fmt.Sprintf(`{"exp":%d,"repo_id":%q,"username":%q}`, exp.Unix(), repoID, user)
	return signToken(testKey, tokenHead, claims)
}

// eventToken is seaf-server's; it expires at exp.
func eventToken(exp time.Time) string {
	return signToken(testKey, tokenHead, fmt.Sprintf(`{"exp":%d}`, exp.Unix()))
}

// tokenLine is the header line by which a token is sent with an event.
func tokenLine(token string) string { return "Authorization: Token " + token }

// later is when tokens expire that are not to expire in a test. An event's may not live
// longer than an hour.
func later() time.Time { return time.Now().Add(30 * time.Minute) }

func update(repoID, commit string) string {
	return fmt.Sprintf(`{"type":"repo-update","content":{"repo_id":%q,"commit_id":%q}}`, repoID, commit)
}

// lockPosted is an event that no newer one replaces.
func lockPosted(repoID, path string) string {
	return fmt.Sprintf(`{"type":"file-lock-changed","content":{"repo_id":%q,"path":%q,`+
		`"change_event":"locked","lock_user":"bob@example.com"}}`, repoID, path)
}

func lockEvent(repoID string, n int) string { return lockPosted(repoID, fmt.Sprintf("/%d", n)) }

// permEvent is about the folder /a of repoA; kind is user or group.
func permEvent(kind, user, group string) string {
	return permChange(repoA, "add", kind, user, group)
}

func permChange(repoID, change, kind, user, group string) string {
	return fmt.Sprintf(`{"type":"folder-perm-changed","content":{"repo_id":%q,"path":"/a","type":%q,`+
		`"change_event":%q,"user":%q,"group":%s,"perm":"rw"}}`, repoID, kind, change, user, group)
}

func commentEvent(repoID string) string {
	return fmt.Sprintf(`{"type":"comment-update","content":{"repo_id":%q,"type":"comment_updated",`+
		`"file_uuid":"u","file_path":"/a.md"}}`, repoID)
}

// numbered is an event of at least size bytes that no other takes the place of.
func numbered(repoID string, n, size int) string {
	text := fmt.Sprintf(`{"type":"file-lock-changed","content":{"repo_id":%q,"path":"/%06d",`+
		`"change_event":"locked","lock_user":""}}`, repoID, n)
	return text[:len(text)-3] + strings.Repeat("u", max(size-len(text), 0)) + text[len(text)-3:]
}

// numberOf tells which of the numbered events this is, or -1.
func numberOf(text []byte) int {
	_, after, _ := bytes.Cut(text, []byte(`"path":"/`))
	n, err := strconv.Atoi(string(after[:min(6, len(after))]))
	if err != nil {
		return -1
	}
	return n
}

func subscribeText(repoID, token string) string {
	return fmt.Sprintf(`{"type":"subscribe","content":{"repos":[{"id":%q,"jwt_token":%q}]}}`, repoID, token)
}

func unsubscribeText(repoID string) string {
	return fmt.Sprintf(`{"type":"unsubscribe","content":{"repos":[{"id":%q}]}}`, repoID)
}

// expiredText is what a client gets whose token does not hold.
func expiredText(repoID string) string {
	return fmt.Sprintf(`{"type":"jwt-expired","content":{"repo_id":%q}}`, repoID)
}

// ---- The clock ----

// A fakeClock stands still until it is moved.
type fakeClock struct {
	mu     sync.Mutex
	now    time.Time
	uptime time.Duration
	looks  int // at the time of day, until one panics; 0: never
}

func (f *fakeClock) clock() clock {
	return clock{
		wall: func() time.Time {
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.looks > 0 {
				if f.looks--; f.looks == 0 {
					panic("the clock is broken")
				}
			}
			return f.now
		},
		uptime: func() time.Duration {
			f.mu.Lock()
			defer f.mu.Unlock()
			return f.uptime
		},
	}
}

// move moves each time on its own.
func (f *fakeClock) move(wall, uptime time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now = f.now.Add(wall)
	f.uptime += uptime
}

// breakAt lets the nth look at the time of day from now on panic; 0 lets none.
func (f *fakeClock) breakAt(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.looks = n
}

// setWall sets the time of day by which tokens run out, in Unix seconds.
func (f *fakeClock) setWall(unix float64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now = time.UnixMicro(int64(unix * 1e6))
}

// faultyClock is the clock of a server that a test started with startSelf. The file named
// fault tells what ails it: a duration by which the time of day is off; "panic", upon which
// the next look at the clock panics, once, unless it is the main loop that looks; "ticks", upon
// which each sweep panics; or "hang", upon which the hub, publishing an event, does not get an
// answer.
func faultyClock(fault string) clock {
	start := time.Now()
	wall := func() time.Time {
		text, _ := os.ReadFile(fault)
		stack := string(debug.Stack())
		if string(text) == "panic" && !strings.Contains(stack, ".run(") && os.Remove(fault) == nil {
			panic("the clock is broken")
		}
		if string(text) == "ticks" && strings.Contains(stack, "(*hub).tick(") {
			panic("the clock is broken")
		}
		for string(text) == "hang" && strings.Contains(stack, "(*hub).publish(") {
			time.Sleep(10 * time.Millisecond)
			text, _ = os.ReadFile(fault)
		}
		offset, _ := time.ParseDuration(string(text))
		return time.Now().Add(offset)
	}
	return clock{wall: wall, uptime: func() time.Duration { return time.Since(start) }}
}

// setFault writes the file of a faultyClock, which must never be seen half written.
func setFault(t testing.TB, fault, text string) {
	t.Helper()
	if err := os.WriteFile(fault+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(fault+".new", fault); err != nil {
		t.Fatal(err)
	}
}

// ---- A server in this process ----

// A syncBuffer is a log or an output that is written and read at the same time.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func (b *syncBuffer) reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf.Reset()
}

// A testServer is a server in this process, with a clock that stands still and a log at
// level debug. What the main loop does by time happens only when a test calls for it.
type testServer struct {
	*server
	t       testing.TB
	addr    string
	time    *fakeClock
	out     *syncBuffer // the log
	dir     string      // where seafile.sock is looked for
	flushed atomic.Int64
}

func startServer(t testing.TB) *testServer {
	t.Helper()
	ts := &testServer{
		t:    t,
		time: &fakeClock{now: time.Now().Truncate(time.Second), uptime: time.Hour},
		out:  &syncBuffer{},
		dir:  t.TempDir(),
	}
	lg := openLog("-", false, io.Discard, ts.out, ts.time.clock().uptime)
	lg.setLevel(slog.LevelDebug)
	cfg := &config{key: []byte(testKey), sockets: []string{filepath.Join(ts.dir, "seafile.sock")}}
	ts.server = newServer(cfg, lg, ts.time.clock())
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ts.addr = ln.Addr().String()
	go ts.http.Serve(ln)
	t.Cleanup(func() {
		ts.shutdown()
		lg.close()
	})
	return ts
}

// shutdown does what server.stop does, but for the listeners.
func (s *testServer) shutdown() {
	ctx, cancel := context.WithTimeout(context.Background(), requestsWait)
	defer cancel()
	s.http.Shutdown(ctx)
	s.hub.closeAll()
}

// loggedServer is startServer for a test at the end of which the log must be well-formed
// and without a secret.
func loggedServer(t testing.TB) *testServer {
	t.Helper()
	s := startServer(t)
	t.Cleanup(func() { checkLog(t, s.out.String(), "") })
	return s
}

// tick does once what the main loop does all the time.
func (ts *testServer) tick() {
	ts.hub.tick()
	ts.hub.sweep()
}

// settle waits until nothing is being written: a write that waits while the clock is
// moved looks like a client that is stuck.
func (ts *testServer) settle() {
	ts.t.Helper()
	waitFor(ts.t, "all is written", func() bool {
		ts.hub.mu.Lock()
		defer ts.hub.mu.Unlock()
		for _, c := range ts.hub.clients {
			c.mu.Lock()
			writing := c.writingSince != 0
			c.mu.Unlock()
			if writing {
				return false
			}
		}
		return true
	})
}

// advance lets time pass in steps of at most a second, as in a process that runs.
func (ts *testServer) advance(d time.Duration) {
	ts.t.Helper()
	for d > 0 {
		step := min(d, time.Second)
		ts.settle()
		ts.time.move(step, step)
		ts.tick()
		d -= step
	}
}

// jump lets time pass in one step, as in a process that was stopped meanwhile. wall and
// uptime differ where the time of day was set.
func (ts *testServer) jump(wall, uptime time.Duration) {
	ts.t.Helper()
	ts.settle()
	ts.time.move(wall, uptime)
	ts.tick()
}

// queued tells how many messages wait in all outboxes, the ones being written included.
func (ts *testServer) queued() (n int) {
	ts.hub.mu.Lock()
	defer ts.hub.mu.Unlock()
	for _, c := range ts.hub.clients {
		c.mu.Lock()
		n += len(c.outbox)
		c.mu.Unlock()
	}
	return n
}

// now is the time of day of the server.
func (ts *testServer) now() time.Time { return ts.clock.wall() }

// token is an event's token that is good now.
func (ts *testServer) token() string { return eventToken(ts.now().Add(5 * time.Minute)) }

// clientToken is a library token that is good for d from now on.
func (ts *testServer) clientToken(repoID, user string, d time.Duration) string {
	return clientToken(repoID, user, ts.now().Add(d))
}

// accept posts an event, which must be accepted.
func (ts *testServer) accept(body string) {
	ts.t.Helper()
	postWith(ts.t, ts.addr, body, ts.token())
}

// post posts an event, which must be accepted for so many subscribers.
func (ts *testServer) post(body string, subscribers int) {
	ts.t.Helper()
	if n := postWith(ts.t, ts.addr, body, ts.token()); n != subscribers {
		ts.t.Fatalf("%.200q was accepted for %d subscribers, want %d", body, n, subscribers)
	}
}

// handle posts an event, which must be accepted, without a connection: that is faster.
func (ts *testServer) handle(body string) {
	ts.t.Helper()
	r := httptest.NewRequest("POST", "/events", strings.NewReader(body))
	r.Header.Set("Authorization", "Token "+ts.token())
	w := httptest.NewRecorder()
	if ts.http.Handler.ServeHTTP(w, r); w.Code != http.StatusOK {
		ts.t.Fatalf("%.200q is answered %d %s", body, w.Code, w.Body)
	}
}

// figures returns the metrics by name and labels, without the prefix of ours.
func (ts *testServer) figures() map[string]float64 {
	ts.t.Helper()
	var text strings.Builder
	ts.writeMetrics(&text)
	return parseMetrics(ts.t, text.String())
}

// waitFigure waits until a metric has this value.
func (ts *testServer) waitFigure(name string, value float64) {
	ts.t.Helper()
	waitFor(ts.t, fmt.Sprintf("%s becomes %v; it was %v", name, value, ts.figures()[name]), func() bool {
		got, known := ts.figures()[name]
		return got == value && (known || value == 0)
	})
}

// logged waits until the log matches a pattern.
func (ts *testServer) logged(pattern string) {
	ts.t.Helper()
	re := regexp.MustCompile(pattern)
	waitFor(ts.t, "the log says "+pattern, func() bool { return re.MatchString(ts.out.String()) })
}

// fullLog returns the log when all is in it that was logged before.
func (ts *testServer) fullLog() string {
	ts.t.Helper()
	mark := fmt.Sprintf("the log is full to here: %d", ts.flushed.Add(1))
	ts.log.errorf("%s", mark)
	waitFor(ts.t, mark, func() bool { return strings.Contains(ts.out.String(), mark) })
	return ts.out.String()
}

// ---- A client ----

// A testClient is a WebSocket client that can also do what it must not.
type testClient struct {
	t     testing.TB
	nc    net.Conn
	br    *bufio.Reader
	reply *http.Response // to the upgrade
}

const (
	asDesktop = "Sec-WebSocket-Protocol: notification.seafile.com\r\n" +
		"user-agent: Seafile/9.0.20 (Linux)\r\n"
	asBrowser = "Origin: https://cloud.example.com\r\n" +
		"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
)

const (
	upgradeKey    = "Z5CJw/U24zCyiSivhdDLtQ=="
	upgradeAccept = "eC4Me9XdMtQl+H6OvANcgSxr5bI=" // is the answer to upgradeKey
	upgradeLines  = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n" +
		"Sec-WebSocket-Key: " + upgradeKey + "\r\n"
)

// rawConn is a connection on which nothing was sent yet.
func rawConn(t testing.TB, addr string) *testClient {
	t.Helper()
	nc, err := net.DialTimeout("tcp", addr, patient)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(6 * patient))
	return &testClient{t: t, nc: nc, br: bufio.NewReader(nc)}
}

// rawUpgrade sends a request, and what follows it, as it is given, and reads the answer.
func rawUpgrade(t testing.TB, addr, text string) *testClient {
	t.Helper()
	c := rawConn(t, addr)
	io.WriteString(c.nc, text)
	var err error
	if c.reply, err = http.ReadResponse(c.br, nil); err != nil {
		t.Fatalf("no answer to %.100q: %v", text, err)
	}
	return c
}

// upgrade sends a client's upgrade with further header lines, and returns the answer.
func upgrade(t testing.TB, addr, path, lines string) *testClient {
	t.Helper()
	return rawUpgrade(t, addr, fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %s\r\n%s%s\r\n", path, addr, upgradeLines, lines))
}

// connect is upgrade for a client that must get in.
func connect(t testing.TB, addr, lines string) *testClient {
	t.Helper()
	return connectTo(t, addr, "/", lines)
}

func connectTo(t testing.TB, addr, path, lines string) *testClient {
	t.Helper()
	c := upgrade(t, addr, path, lines)
	accept := c.reply.Header.Get("Sec-WebSocket-Accept")
	if c.reply.StatusCode != http.StatusSwitchingProtocols || accept != upgradeAccept {
		body, _ := io.ReadAll(c.reply.Body)
		t.Fatalf("upgrade of %s%s answered %s: %s", addr, path, c.reply.Status, body)
	}
	return c
}

// maskedFrame is a client's frame: first holds FIN, reserved bits and opcode.
func maskedFrame(first byte, payload []byte) []byte {
	f := []byte{first}
	switch n := len(payload); {
	case n < 126:
		f = append(f, 0x80|byte(n))
	case n < 1<<16:
		f = binary.BigEndian.AppendUint16(append(f, 0x80|126), uint16(n))
	default:
		f = binary.BigEndian.AppendUint64(append(f, 0x80|127), uint64(n))
	}
	var key [4]byte
	rand.Read(key[:])
	f = append(f, key[:]...)
	for i, b := range payload {
		f = append(f, b^key[i%4])
	}
	return f
}

// write sends bytes as they are. An error shows in what is read next.
func (c *testClient) write(p []byte) { c.nc.Write(p) }

func (c *testClient) text(s string) { c.write(maskedFrame(0x80|opText, []byte(s))) }

func (c *testClient) ping(payload string) { c.write(maskedFrame(0x80|opPing, []byte(payload))) }

// pong is sent by a client that was pinged, or that only wants to be heard.
func (c *testClient) pong() { c.write(maskedFrame(0x80|opPong, nil)) }

// read returns the next frame; a server's is whole and unmasked.
func (c *testClient) read() (opcode byte, payload []byte, err error) {
	var h [10]byte
	if _, err := io.ReadFull(c.br, h[:2]); err != nil {
		return 0, nil, err
	}
	if h[0]&0xf0 != 0x80 || h[1]&0x80 != 0 {
		return 0, nil, fmt.Errorf("a frame of the server begins with % x", h[:2])
	}
	size := uint64(h[1])
	switch size {
	case 126:
		_, err = io.ReadFull(c.br, h[2:4])
		size = uint64(binary.BigEndian.Uint16(h[2:]))
	case 127:
		_, err = io.ReadFull(c.br, h[2:10])
		size = binary.BigEndian.Uint64(h[2:])
	}
	if err == nil {
		payload = make([]byte, size)
		_, err = io.ReadFull(c.br, payload)
	}
	return h[0] & 0x0f, payload, err
}

// next is read with a deadline.
func (c *testClient) next() (opcode byte, payload []byte, err error) {
	c.nc.SetReadDeadline(time.Now().Add(patient))
	return c.read()
}

// expect reads the next frame, which must be this one.
func (c *testClient) expect(opcode byte, payload string) {
	c.t.Helper()
	got, text, err := c.next()
	if err != nil || got != opcode || string(text) != payload {
		c.t.Fatalf("got frame %d %.300q (%v), want %d %.300q", got, text, err, opcode, payload)
	}
}

// expectTexts reads so many text frames, which must be these in this order.
func (c *testClient) expectTexts(texts ...string) {
	c.t.Helper()
	for _, text := range texts {
		c.expect(opText, text)
	}
}

// untilPong returns the text frames that the server had queued before it read a ping of
// ours. Its own pings are answered.
func (c *testClient) untilPong() (texts []string) {
	c.t.Helper()
	mark := fmt.Sprintf("mark %d", marks.Add(1))
	c.ping(mark)
	for {
		opcode, payload, err := c.next()
		switch {
		case err != nil || opcode == opClose:
			c.t.Fatalf("got frame %d %q, %v", opcode, payload, err)
		case opcode == opText:
			texts = append(texts, string(payload))
		case opcode == opPing:
			c.pong()
		case opcode == opPong && string(payload) == mark:
			return texts
		}
	}
}

var marks atomic.Int64

// closedWith reads until the close frame, which must have this status, and returns its
// payload.
func (c *testClient) closedWith(status int) []byte {
	c.t.Helper()
	for {
		opcode, payload, err := c.next()
		if err != nil {
			c.t.Fatalf("the connection ended without a close frame: %v", err)
		}
		if opcode != opClose {
			continue
		}
		if got := closeStatus(payload); got != status {
			c.t.Fatalf("closed with %d %q, want %d", got, payload, status)
		}
		return payload
	}
}

func closeStatus(payload []byte) int {
	if len(payload) < 2 {
		return statusNone
	}
	return int(binary.BigEndian.Uint16(payload))
}

// expectClose reads until the close frame, which must have this status; it answers it,
// and then the connection must end. It returns the reason.
func (c *testClient) expectClose(status int) string {
	c.t.Helper()
	payload := c.closedWith(status)
	c.write(maskedFrame(0x80|opClose, payload))
	c.expectEnd()
	return string(payload[min(2, len(payload)):])
}

// expectEnd demands that nothing comes any more, and that the connection ends.
func (c *testClient) expectEnd() {
	c.t.Helper()
	c.nc.SetReadDeadline(time.Now().Add(patient))
	if _, err := c.br.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Fatalf("the connection does not end: %v", err)
	}
}

// sync returns when the server has handled all that was sent before. Nothing but the
// answer may come.
func (c *testClient) sync() {
	c.t.Helper()
	c.ping("sync")
	c.expect(opPong, "sync")
}

func (c *testClient) subscribe(repoID, token string) {
	c.t.Helper()
	c.text(subscribeText(repoID, token))
}

// subscribed subscribes as user and waits until that holds.
func (c *testClient) subscribed(repoID, user string) *testClient {
	c.t.Helper()
	c.subscribe(repoID, clientToken(repoID, user, time.Now().Add(72*time.Hour)))
	c.sync()
	return c
}

func (c *testClient) unsubscribe(repoID string) {
	c.t.Helper()
	c.text(unsubscribeText(repoID))
}

// readNumbered reads numbered events, which must come without a gap from the first on,
// until something else comes. It returns how many came, and that.
func (c *testClient) readNumbered() (n int, opcode byte, payload []byte, err error) {
	c.t.Helper()
	for ; ; n++ {
		if opcode, payload, err = c.next(); err != nil || opcode != opText {
			return n, opcode, payload, err
		}
		if got := numberOf(payload); got != n {
			c.t.Fatalf("event %d came where %d was due", got, n)
		}
	}
}

// ---- Requests ----

// request sends a request with header lines "Name: value", and returns the answer and
// its body.
func request(t testing.TB, method, url, body string, lines ...string) (*http.Response, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patient)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range lines {
		name, value, _ := strings.Cut(line, ": ")
		r.Header.Set(name, value)
	}
	answer, err := http.DefaultTransport.RoundTrip(r) // redirects are not followed
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	return answer, string(text)
}

// rawRequest sends bytes as they are, in so many segments, and returns the answer.
func rawRequest(t testing.TB, addr string, segments ...string) (*http.Response, string) {
	t.Helper()
	c := rawConn(t, addr)
	defer c.nc.Close()
	for _, s := range segments {
		io.WriteString(c.nc, s)
	}
	method, _, _ := strings.Cut(segments[0], " ") // a HEAD's answer has no body
	answer, err := http.ReadResponse(c.br, &http.Request{Method: method})
	if err != nil {
		t.Fatalf("no answer to %.80q: %v", segments, err)
	}
	defer answer.Body.Close()
	if answer.StatusCode == http.StatusSwitchingProtocols {
		return answer, ""
	}
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer, string(body)
}

// rawEvent is a whole request that posts an event.
func rawEvent(token, body string) string {
	return fmt.Sprintf("POST /events HTTP/1.1\r\nHost: x\r\nAuthorization: Token %s\r\nContent-Length: %d\r\n\r\n%s",
		token, len(body), body)
}

// post posts an event as seaf-server does; it must be accepted for so many subscribers.
func post(t testing.TB, addr, body string, want int) {
	t.Helper()
	if n := subscribers(t, addr, body); n != want {
		t.Fatalf("%.200q was accepted for %d subscribers, want %d", body, n, want)
	}
}

// subscribers posts an event, which must be accepted, and returns for how many.
func subscribers(t testing.TB, addr, body string) int {
	t.Helper()
	return postWith(t, addr, body, eventToken(later()))
}

func postWith(t testing.TB, addr, body, token string) (subscribers int) {
	t.Helper()
	answer, text := request(t, "POST", "http://"+addr+"/events", body, tokenLine(token))
	_, err := fmt.Sscanf(text, `{"subscribers":%d}`, &subscribers)
	if err != nil || answer.StatusCode != http.StatusOK {
		t.Fatalf("event answered %d %q, want 200 and subscribers", answer.StatusCode, text)
	}
	return subscribers
}

func pings(addr string) bool {
	c := http.Client{Timeout: time.Second}
	answer, err := c.Get("http://" + addr + "/ping")
	if err != nil {
		return false
	}
	answer.Body.Close()
	return answer.StatusCode == http.StatusOK
}

// parseMetrics reads Prometheus' text format; the prefix of our names is dropped.
func parseMetrics(t testing.TB, text string) map[string]float64 {
	t.Helper()
	values := map[string]float64{}
	for line := range strings.Lines(text) {
		if name, value, found := strings.Cut(strings.TrimSpace(line), " "); found && name != "#" {
			number, err := strconv.ParseFloat(value, 64)
			if err != nil {
				t.Fatalf("a metric without a number: %q", line)
			}
			values[strings.TrimPrefix(name, "seafile_notification_")] = number
		}
	}
	return values
}

// scrape returns the metrics by name and labels.
func scrape(t testing.TB, addr string) map[string]float64 {
	t.Helper()
	answer, text := request(t, "GET", "http://"+addr+"/metrics", "")
	if answer.StatusCode != http.StatusOK {
		t.Fatalf("/metrics answers %s", answer.Status)
	}
	return parseMetrics(t, text)
}

// ---- Programs ----

// built is the real binary, made once.
var built struct {
	once sync.Once
	dir  string
	err  error
}

func buildBinary(t testing.TB) string {
	t.Helper()
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "notification-server-test"); built.err != nil {
			return
		}
		args := []string{"build", "-o", built.dir + "/"}
		if underRace() {
			args = append(args, "-race")
		}
		if out, err := exec.Command("go", append(args, ".")...).CombinedOutput(); err != nil {
			built.err = fmt.Errorf("go build: %w: %s", err, out)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return filepath.Join(built.dir, "notification-server")
}

var portsGiven atomic.Int64

// freePort returns a port of 127.0.0.1 that nobody listens on and that no outgoing
// connection is given, so that a server can take it, and take it again, however many
// clients come and go meanwhile.
func freePort(t testing.TB) string {
	t.Helper()
	for range 1000 {
		port := fmt.Sprint(12000 + (int64(os.Getpid())*101+portsGiven.Add(1))%20000)
		if ln, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			ln.Close()
			return port
		}
	}
	t.Fatal("no port is free")
	return ""
}

// writeConfig makes a directory with a seafile.conf for the given port, the key of the
// tests, and further lines of the section.
func writeConfig(t testing.TB, port string, lines ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "conf") // seafile.sock is looked for beside it
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("[notification]\nenabled = true\nhost = 127.0.0.1\nport = %s\njwt_private_key = %s\n%s\n",
		port, testKey, strings.Join(lines, "\n"))
	if err := os.WriteFile(filepath.Join(dir, "seafile.conf"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// socketBeside makes the place of seafile.sock in an installation whose configuration is
// in dir.
func socketBeside(t testing.TB, dir string) string {
	t.Helper()
	socket := filepath.Join(dir, "../seafile-data/seafile.sock")
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		t.Fatal(err)
	}
	return socket
}

// A process is a started program; its output goes to out.
type process struct {
	*exec.Cmd
	t    testing.TB
	out  *syncBuffer
	done chan error // receives what Wait returns
}

// start starts a program that is killed at the end of the test. env is in addition to ours.
func start(t testing.TB, env []string, name string, args ...string) *process {
	t.Helper()
	return launch(t, env, exec.Command(name, args...))
}

func launch(t testing.TB, env []string, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{Cmd: cmd, t: t, out: &syncBuffer{}, done: make(chan error, 1)}
	p.Env = append(os.Environ(), env...)
	if p.Stdout == nil {
		p.Stdout = p.out
	}
	if p.Stderr == nil {
		p.Stderr = p.out
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.done <- p.Wait() }()
	t.Cleanup(func() {
		p.Process.Kill()
		if t.Failed() {
			t.Logf("output of %s: %s", p, p.out)
		}
	})
	return p
}

// says waits until the process has said text: its output comes by way of a pipe.
func (p *process) says(text string) {
	p.t.Helper()
	waitFor(p.t, "the process says: "+text, func() bool { return strings.Contains(p.out.String(), text) })
}

// wait waits for the end of the process and returns its exit status.
func (p *process) wait() int {
	p.t.Helper()
	select {
	case <-p.done:
		return p.ProcessState.ExitCode()
	case <-time.After(patient):
		p.t.Fatalf("%s does not end; its output: %s", p, p.out)
		return -1
	}
}

// terminate sends SIGTERM and returns the exit status.
func (p *process) terminate() int {
	p.t.Helper()
	p.Process.Signal(syscall.SIGTERM)
	return p.wait()
}

func (p *process) waitPing(addr string) {
	p.t.Helper()
	waitFor(p.t, "the server answers on "+addr+"; output: "+p.out.String(), func() bool { return pings(addr) })
}

// startBinary starts the real binary and waits until it answers /ping on 127.0.0.1:port.
func startBinary(t testing.TB, port string, env []string, args ...string) *process {
	t.Helper()
	p := start(t, env, buildBinary(t), args...)
	p.waitPing("127.0.0.1:" + port)
	return p
}

// startSelf starts this test binary as a server on port with a faultyClock, and waits
// until it answers.
func startSelf(t testing.TB, fault, port string, args ...string) *process {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := start(t, []string{"TEST_CLOCK=" + fault}, self, args...)
	p.waitPing("127.0.0.1:" + port)
	return p
}

// runOnce runs the real binary until it ends by itself.
func runOnce(t testing.TB, env []string, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs syncBuffer
	cmd := exec.Command(buildBinary(t), args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	p := launch(t, env, cmd)
	status = p.wait()
	return status, out.String(), errs.String()
}

// A metered is the real binary, with metrics.
type metered struct {
	*process
	addr, dir string
	metrics   string // its address
}

// startMetered starts the real binary with metrics, and with a limit of open files where
// one is given.
func startMetered(t testing.TB, files int, args ...string) *metered {
	t.Helper()
	port, metrics := freePort(t), "127.0.0.1:"+freePort(t)
	m := &metered{addr: "127.0.0.1:" + port, metrics: metrics, dir: writeConfig(t, port, "metrics = "+metrics)}
	args = append([]string{"-c", m.dir}, args...)
	t.Cleanup(func() { // the detector of races in the server can only write
		if m.process != nil && strings.Contains(m.out.String(), "DATA RACE") {
			t.Error("the server has a data race")
		}
	})
	if files == 0 {
		m.process = startBinary(t, port, nil, args...)
		return m
	}
	limited := fmt.Sprintf(`ulimit -n %d; exec "$0" "$@"`, files)
	m.process = start(t, nil, "sh", append([]string{"-c", limited, buildBinary(t)}, args...)...)
	m.waitPing(m.addr)
	return m
}

// waitFigure waits until a metric has this value.
func (m *metered) waitFigure(name string, value float64) {
	m.t.Helper()
	waitFor(m.t, fmt.Sprintf("%s is %v", name, value), func() bool { return scrape(m.t, m.metrics)[name] == value })
}

// A footprint is what a server takes of its machine.
type footprint struct{ goroutines, files, connections, subscriptions, mib float64 }

func (m *metered) footprint() footprint {
	m.t.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", m.Process.Pid))
	if err != nil {
		m.t.Fatal(err)
	}
	v := scrape(m.t, m.metrics)
	return footprint{
		goroutines:    v["go_goroutines"],
		files:         float64(len(files)),
		connections:   v["connections"],
		subscriptions: v["subscriptions"],
		mib:           v["process_resident_memory_bytes"] / mebi,
	}
}

func (f footprint) String() string {
	return fmt.Sprintf("%.0f goroutines, %.0f files, %.0f connections, %.1f MiB", f.goroutines, f.files, f.connections, f.mib)
}

// highest returns the larger of each figure.
func (f footprint) highest(other footprint) footprint {
	return footprint{
		goroutines:    max(f.goroutines, other.goroutines),
		files:         max(f.files, other.files),
		connections:   max(f.connections, other.connections),
		subscriptions: max(f.subscriptions, other.subscriptions),
		mib:           max(f.mib, other.mib),
	}
}

// watch looks at the footprint ten times a second until the returned function is called,
// which returns the highest figures.
func (m *metered) watch() (stop func() footprint) {
	end, highest := make(chan bool), make(chan footprint)
	go func() {
		var most footprint
		for {
			select {
			case <-end:
				highest <- most
				return
			case <-time.After(100 * time.Millisecond):
				most = most.highest(m.footprint())
			}
		}
	}()
	return func() footprint {
		close(end)
		return <-highest
	}
}

// returnsTo waits until the server takes no more than it did before, but for a few pooled
// connections, and for the given MiB, which are the runtime's slack.
func (m *metered) returnsTo(before footprint, slack float64) {
	m.t.Helper()
	now := before
	for end := time.Now().Add(2 * patient); ; time.Sleep(50 * time.Millisecond) {
		now = m.footprint()
		if now.goroutines <= before.goroutines+4 && now.files <= before.files+4 &&
			now.connections <= before.connections && now.subscriptions <= before.subscriptions &&
			now.mib <= before.mib+slack*raceFactor() {
			return
		}
		if time.Now().After(end) {
			m.t.Fatalf("after the flood there are %v; before it %v", now, before)
		}
	}
}

// nextTo runs flood, and posts events as long as it lasts, all of which a healthy client
// next to it must get. It returns how long the slowest took.
func nextTo(t testing.TB, addr string, flood func()) (slowest time.Duration) {
	t.Helper()
	healthy := connect(t, addr, asBrowser).subscribed(repoA, "healthy@example.com")
	done := make(chan bool)
	go func() { defer close(done); flood() }()
	for n, going := 0, true; going; n++ {
		select {
		case <-done:
			going = false // and one event more
		case <-time.After(20 * time.Millisecond):
		}
		event, posted := numbered(repoA, n, 0), time.Now()
		healthy.nc.SetDeadline(posted.Add(2 * patient))
		post(t, addr, event, 1)
		for {
			opcode, payload, err := healthy.read()
			if opcode == opPing && err == nil {
				healthy.pong()
				continue
			}
			if opcode != opText || string(payload) != event {
				t.Fatalf("next to the flood came frame %d %.200q, %v", opcode, payload, err)
			}
			break
		}
		slowest = max(slowest, time.Since(posted))
	}
	healthy.write(maskedFrame(0x80|opClose, nil))
	healthy.expectClose(statusNone)
	return slowest
}

// ---- seaf-server ----

// A seafServer answers on a Unix socket as seaf-server's RPC does.
type seafServer struct {
	ln       net.Listener
	requests chan string
}

// startSeafServer listens on path and answers each request with what reply writes.
func startSeafServer(t testing.TB, path string, reply func(net.Conn)) *seafServer {
	t.Helper()
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return serveSeaf(t, ln, reply)
}

func serveSeaf(t testing.TB, ln net.Listener, reply func(net.Conn)) *seafServer {
	t.Cleanup(func() { ln.Close() })
	ss := &seafServer{ln: ln, requests: make(chan string, 10000)}
	go func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer nc.Close()
				ss.serve(nc, reply)
			}()
		}
	}()
	return ss
}

// serve answers the one request of a connection.
func (ss *seafServer) serve(nc net.Conn, reply func(net.Conn)) {
	var size uint32
	if binary.Read(nc, binary.LittleEndian, &size) != nil || size > 1<<20 {
		return
	}
	request := make([]byte, size)
	if _, err := io.ReadFull(nc, request); err != nil {
		return
	}
	ss.requests <- string(request)
	reply(nc)
}

// asked tells how many requests came so far.
func (ss *seafServer) asked() int { return len(ss.requests) }

// rpcReply is the reply that carries a JSON text.
func rpcReply(text string) func(net.Conn) {
	return func(nc net.Conn) {
		nc.Write(append(binary.LittleEndian.AppendUint32(nil, uint32(len(text))), text...))
	}
}

// membersReply is the reply that names the members of a group.
func membersReply(users ...string) func(net.Conn) {
	var all []string
	for _, user := range users {
		all = append(all, fmt.Sprintf(`{"group-id":1,"user-name":%q,"is-staff":0}`, user))
	}
	return rpcReply(`{"ret":[` + strings.Join(all, ",") + `]}`)
}

// ---- The log ----

var logLine = regexp.MustCompile(`^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] \[(DEBUG|INFO|WARNING|ERROR)\] \S.*$`)

// checkLog checks the form of each line of a log, and that neither a token nor a key is
// in it.
func checkLog(t testing.TB, log, prefix string) {
	t.Helper()
	for line := range strings.Lines(log) {
		text, ok := strings.CutPrefix(line, prefix)
		if !ok || !logLine.MatchString(strings.TrimSuffix(text, "\n")) {
			t.Errorf("a line of the log is not as Seafile's tools read it: %q", line)
		}
		for _, secret := range []string{testKey, "M@O8VWUb81", "eyJ"} { // each token begins with {" in base64
			if strings.Contains(line, secret) {
				t.Errorf("the log shows a token or a key: %q", line)
			}
		}
	}
}

// ---- What was captured ----

const (
	capturedC       = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJleHAiOjE3OTU0MjM5Mjl9.cNL-Di-jPh4-Y3CCrLiqde3WZQvi66bIoNSVsUvsH1U"
	capturedGo      = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJleHAiOjE3OTU0MjQyMjMsInJlcG9faWQiOiIyODJiZTYwZS00ZjgxLTQ3ODItOGI2YS05Njk4MzgyZjczMDEiLCJ1c2VybmFtZSI6IiJ9.bmupKpp_bqJIlGcoQMZx1T7juVpz7E3MMnEADZZ2VAM"
	capturedClient  = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJleHAiOjE3OTU2ODI4MTcsInJlcG9faWQiOiIyODJiZTYwZS00ZjgxLTQ3ODItOGI2YS05Njk4MzgyZjczMDEiLCJ1c2VybmFtZSI6ImFsaWNlQGV4YW1wbGUuY29tIn0.VjgaGEcvCiOw7ni9X0MUtyrOztK67RNHHB1mFRy4obU"
	capturedSeahub  = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJleHAiOjQxMDI0NDQ4MDB9.es3brF86Lpbs27DlfgxRem199Xe_rK5RftObnm-kLx4"
	capturedLibrary = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJyZXBvX2lkIjoiMjgyYmU2MGUtNGY4MS00NzgyLThiNmEtOTY5ODM4MmY3MzAxIiwidXNlcm5hbWUiOiJhbGljZUBleGFtcGxlLmNvbSIsImV4cCI6NDEwMjQ0NDgwMH0.LmoZMZVSWHjQiiZKsSRtCc9v9-W34wMLwqZFbnIE57Q"
	capturedHS512   = "eyJhbGciOiJIUzUxMiIsInR5cCI6IkpXVCJ9.eyJleHAiOjQxMDI0NDQ4MDB9.RcB2r_srli8iJs-sM9GoECow2FNWElIjbLiBI21FS8TRAlzvvEj4H4V-CoWdC5D2FQXVt3XI8zPqFc_drg-BrA"

	capturedEnd = 1795423929 // when the first of these runs out, in Unix time

	capturedUpdate  = `{"type":"repo-update","content":{"repo_id":"282be60e-4f81-4782-8b6a-9698382f7301","commit_id":"7920509ee42fa792aec26c44588b6f65371084fa"}}`
	capturedMessage = `{"type":"subscribe","content":{"repos":[{"id":"282be60e-4f81-4782-8b6a-9698382f7301","jwt_token":"` + capturedClient + `"}]}}`

	capturedMembers    = "\x7f\x00\x00\x00" + `{"ret":[{"group-id":1,"user-name":"carol@example.com","is-staff":0},{"group-id":1,"user-name":"bob@example.com","is-staff":1}]}`
	capturedNull       = "\x0c\x00\x00\x00" + `{"ret":null}`
	capturedNoFunction = "\x3d\x00\x00\x00" + `{"err_code":500,"err_msg":"cannot find function no_such_fn."}`
	capturedNoService  = "\x40\x00\x00\x00" + `{"err_code":501,"err_msg":"cannot find service nosuch-service."}`

	upgradeBehindNginx = `GET / HTTP/1.1
Upgrade: websocket
Connection: upgrade
Host: 127.0.0.1:8083
Pragma: no-cache
Cache-Control: no-cache
Origin: http://127.0.0.1
Sec-WebSocket-Key: Z5CJw/U24zCyiSivhdDLtQ==
Sec-WebSocket-Protocol: notification.seafile.com
Sec-WebSocket-Version: 13
user-agent: Seafile/9.0.20 (Linux)

`
	upgradeDirect = `GET / HTTP/1.1
Pragma: no-cache
Cache-Control: no-cache
Host: 127.0.0.1
Origin: http://127.0.0.1
Upgrade: websocket
Connection: Upgrade
Sec-WebSocket-Key: vQe3/0+b/Tg2Z+S5/iFvOw==
Sec-WebSocket-Protocol: notification.seafile.com
Sec-WebSocket-Version: 13
user-agent: Seafile/9.0.20 (Linux)

`
	eventFromC = `POST /events HTTP/1.1
Host: 127.0.0.1:8083
Accept: */*
Authorization: Token ` + capturedC + `
User-Agent: Seafile Server
Content-Type: application/json
Content-Length: 138

` + capturedUpdate
	eventFromGo = `POST /events HTTP/1.1
Host: 127.0.0.1:8083
User-Agent: Seafile Server
Content-Length: 138
Authorization: Token ` + capturedGo + `
Content-Type: application/json
Accept-Encoding: gzip

{"type":"repo-update","content":{"repo_id":"282be60e-4f81-4782-8b6a-9698382f7301","commit_id":"b5d7f26b73d3f21a9cd99d478b99ff4b35689d59"}}`
)

// capturedSegment is one TCP segment of the desktop client: an empty ping, then
// its subscribe, with the masks that it used.
func capturedSegment(t testing.TB) []byte {
	t.Helper()
	segment := []byte("\x89\x80\xee\xc0\xa4\x08\x81\xfe\x01\x3b\xb5\xc8\xc8\xc0")
	for i, b := range []byte(capturedMessage) {
		segment = append(segment, b^segment[10+i%4])
	}
	if !bytes.HasPrefix(segment[14:], []byte("\xce\xea\xbc\xb9\xc5\xad\xea\xfa\x97")) || len(segment) != 14+315 {
		t.Fatal("the segment is not the one that was captured")
	}
	return segment
}

// crlf gives a captured text the line ends that it has on the wire.
func crlf(s string) string {
	head, body, _ := strings.Cut(s, "\n\n")
	return strings.ReplaceAll(head, "\n", "\r\n") + "\r\n\r\n" + body
}

// ---- The test that waits for a minute begins first ----

// Once with nginx's real 60 s and the real binary: the browser, which never
// pings, stays. Behind a server that does not ping it would be cut.
func TestProxyIdleMinute(t *testing.T) {
	slow(t, "more than a minute")
	t.Parallel()
	port := freePort(t)
	need(t, "nginx")
	startBinary(t, port, nil, "-c", writeConfig(t, port, "log_level = debug"))
	px := startProxy(t, nginxManual, "127.0.0.1:"+port, "")
	mute := startProxy(t, nginxManual, startServer(t).addr, "") // nobody calls this server's sweep

	cut := make(chan time.Duration, 1)
	idle := func(px *runningProxy) *testClient {
		c := connectTo(t, px.addr, "/notification", asBrowser).subscribed(repoA, "alice@example.com")
		c.nc.SetDeadline(time.Now().Add(2 * time.Minute))
		return c
	}
	silent, browser, start := idle(mute), idle(px), time.Now()
	go func() {
		silent.read()
		cut <- time.Since(start)
	}()
	pings := 0
	for time.Since(start) < 64*time.Second {
		browser.nc.SetReadDeadline(start.Add(65 * time.Second))
		opcode, _, err := browser.read()
		if os.IsTimeout(err) {
			break
		}
		if err != nil || opcode != opPing {
			t.Fatalf("after %v came frame %d (%v)", time.Since(start), opcode, err)
		}
		pings++
		browser.write(maskedFrame(0x80|opPong, nil))
	}
	if pings < 2 || pings > 3 {
		t.Errorf("%d pings in 65 s", pings)
	}
	if d := <-cut; d < 59*time.Second || d > 64*time.Second {
		t.Errorf("without pings nginx cut after %v, not after its 60 s", d)
	}
	post(t, "127.0.0.1:"+port, update(repoA, "1"), 1)
	browser.expect(opText, update(repoA, "1"))
}

// ---- Tests of start and stop ----

// Each way to call the program has its exit status and says what it is to say, and where.
func TestCommandLine(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name           string
		args           string
		status         int
		stdout, stderr string // patterns
	}{
		{"version", "-version", 0, `^notification-server \S+ go1\.\d+\S*\n$`, `^$`},
		{"help", "-h", 0, `(?s)Usage:.*notification-server -c DIR \[-l FILE\].*-version.*seafile\.conf.*NOTIFICATION_SERVER_HOST.*jwt_private_key`, `^$`},
		{"unknown flag", "-c x -pidfile y", 2, `^$`, `(?s)-pidfile.*Usage:.*-l FILE`},
		{"argument", "-c x extra", 2, `^$`, `(?s)"extra".*Usage:.*-l FILE`},
		{"argument of another flag", "-version extra", 2, `^$`, `(?s)"extra".*Usage:.*-l FILE`},
		{"no flags", "", 2, `^$`, `(?s)-c DIR is missing.*Usage:.*-l FILE`},
		{"flag without its value", "-c x -l", 2, `^$`, `(?s)-l.*Usage:.*-l FILE`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			status, stdout, stderr := runOnce(t, nil, strings.Fields(c.args)...)
			matches := func(pattern, text string) bool { return regexp.MustCompile(pattern).MatchString(text) }
			if status != c.status || !matches(c.stdout, stdout) || !matches(c.stderr, stderr) {
				t.Errorf("%q: exit %d, standard output %q, standard error %q; want %d, %s, %s",
					c.args, status, stdout, stderr, c.status, c.stdout, c.stderr)
			}
		})
	}
}

// With enabled = false the program ends with 0 and says which file says so; it needs no key.
func TestDisabled(t *testing.T) {
	t.Parallel()
	dir := confDir(t, "[notification]\nenabled = false\n")
	status, _, stderr := runOnce(t, nil, "-c", dir)
	if status != 0 || !strings.Contains(stderr, "disabled in "+filepath.Join(dir, "seafile.conf:2")) {
		t.Errorf("exit %d, %q", status, stderr)
	}
}

// Where the soft limit of open files is lower than the hard one, the hard one counts.
func TestSoftLimitIsRaised(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	p := start(t, nil, "sh", "-c", `ulimit -n 1000; ulimit -S -n 256; exec "$0" "$@"`, buildBinary(t), "-c", writeConfig(t, port))
	p.waitPing("127.0.0.1:" + port)
	p.says("clients, by the limit of open files")
	clients := 0
	_, after, _ := strings.Cut(p.out.String(), "at most ")
	fmt.Sscan(after, &clients)
	if clients < 999-64 || clients > 1000-64 { // Go raises it to one less
		t.Errorf("with a soft limit of 256 and a hard one of 1000, %d clients are allowed: %s", clients, p.out)
	}
}

// ---- Tests of a stop ----

// A stop delivers what was accepted, closes each client with 1001 and a reason, waits for
// nobody who does not answer, and leaves the port free.
func TestStop(t *testing.T) {
	t.Parallel()
	stops := []syscall.Signal{syscall.SIGTERM, syscall.SIGINT}
	if !signal.Ignored(syscall.SIGHUP) { // nohup runs the tests
		stops = append(stops, syscall.SIGHUP)
	}
	for _, sig := range stops {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			port := freePort(t)
			dir := writeConfig(t, port)
			p := startBinary(t, port, nil, "-c", dir, "-l", "-")
			addr := "127.0.0.1:" + port
			cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.Process.Pid))
			if err == nil && !strings.Contains(strings.ReplaceAll(string(cmdline), "\x00", " "), "notification-server -c "+dir) {
				t.Errorf("seafile.sh does not find %q", cmdline) // by pkill -f
			}
			var all []*testClient
			for _, lines := range []string{asDesktop, asBrowser, asDesktop} {
				all = append(all, connect(t, addr, lines).subscribed(repoA, "alice@example.com"))
			}
			post(t, addr, lockEvent(repoA, 1), len(all))
			connect(t, addr, asDesktop).sync() // never answers the close
			rawConn(t, addr)                   // nor does this say anything
			begin := time.Now()
			p.Process.Signal(sig)
			for _, c := range all {
				c.expectTexts(lockEvent(repoA, 1))
				if reason := c.expectClose(statusGoingAway); reason == "" {
					t.Error("closed without a reason")
				}
			}
			if nc, err := net.Dial("tcp", addr); err == nil {
				nc.Close()
				t.Error("the port still accepts connections")
			}
			if status, took := p.wait(), time.Since(begin); status != 0 || took > patient {
				t.Errorf("exit %d after %v", status, took)
			}
			log := p.out.String()
			checkLog(t, log, "")
			for _, want := range []string{
				`\[INFO\] notification server started.* 127\.0\.0\.1:` + port + `; .*` +
					filepath.Join(dir, "seafile.conf") + `.*; .*seafile\.sock`,
				`\[INFO\] stopping.*\n.*\[INFO\] stopped`,
			} {
				if !regexp.MustCompile(want).MatchString(log) {
					t.Errorf("the log lacks %s: %s", want, log)
				}
			}
			startBinary(t, port, nil, "-c", dir).terminate() // the port is free at once
		})
	}
}

// A post that is coming in while the server is stopped is still answered 200, and delivered.
func TestStopAnswersPostsInFlight(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	p := startBinary(t, port, nil, "-c", writeConfig(t, port, "log_level = debug"))
	addr := "127.0.0.1:" + port
	c := connect(t, addr, asDesktop).subscribed(repoA, "alice@example.com")
	sender := rawConn(t, addr)
	text := rawEvent(eventToken(later()), lockEvent(repoA, 1))
	io.WriteString(sender.nc, text[:len(text)-20])
	request(t, "GET", "http://"+addr+"/ping", "") // what came before is being handled
	p.Process.Signal(syscall.SIGTERM)
	waitFor(t, "the port is free", func() bool { return !pings(addr) })
	io.WriteString(sender.nc, text[len(text)-20:])
	answer, err := http.ReadResponse(sender.br, nil)
	if err != nil || answer.StatusCode != http.StatusOK {
		t.Fatalf("answered %v, %v", answer, err)
	}
	c.expectTexts(lockEvent(repoA, 1))
	c.expectClose(statusGoingAway)
	if code := p.wait(); code != 0 {
		t.Errorf("exit status %d; output: %s", code, p.out)
	}
}

// A stop frees the port before the clients are closed, so that the next server can start
// meanwhile; and closes them one after the other, since all come back at the same distance.
func TestStopFreesThePortFirst(t *testing.T) {
	t.Parallel()
	const clients = 1000
	port := freePort(t)
	addr, dir := "127.0.0.1:"+port, writeConfig(t, port, "metrics = 127.0.0.1:"+freePort(t)) // which is free, too
	first := startBinary(t, port, nil, "-c", dir)
	var mu sync.Mutex
	var closed []time.Time
	var all sync.WaitGroup
	for range clients {
		c := connect(t, addr, asDesktop)
		c.nc.SetDeadline(time.Now().Add(6 * patient)) // on a busy machine it takes long until all are there
		all.Go(func() {
			opcode, payload, err := c.next()
			for err == nil && opcode == opPing {
				opcode, payload, err = c.next()
			}
			if err != nil || opcode != opClose || closeStatus(payload) != statusGoingAway {
				t.Errorf("not closed with 1001 but frame %d %q (%v)", opcode, payload, err)
				return
			}
			mu.Lock()
			closed = append(closed, time.Now())
			mu.Unlock()
			c.write(maskedFrame(0x80|opClose, payload))
			c.nc.Close()
		})
	}
	stopped := time.Now()
	first.Process.Signal(syscall.SIGTERM)
	waitFor(t, "the port is free", func() bool {
		nc, err := net.Dial("tcp", addr)
		if err == nil {
			nc.Close()
		}
		return err != nil
	})
	startBinary(t, port, nil, "-c", dir)
	mu.Lock()
	gone := len(closed)
	mu.Unlock()
	blind := time.Since(stopped)
	if gone == clients {
		t.Errorf("all clients were closed before the next server answered, after %v", blind)
	}
	if code := first.wait(); code != 0 {
		t.Errorf("exit status %d; output: %s", code, first.out)
	}
	all.Wait()
	slices.SortFunc(closed, time.Time.Compare)
	if len(closed) > 0 {
		if spread := closed[len(closed)-1].Sub(closed[0]); spread < 700*time.Millisecond {
			t.Errorf("%d clients were closed within %v, want about 1 s", len(closed), spread)
		}
	}
	t.Logf("the next server answered %v after SIGTERM, when %d of %d clients were closed", blind, gone, clients)
}

// A second server on the same port ends with 1 and says what to do; the first is not
// disturbed.
func TestSecondServerOnThePort(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	dir := writeConfig(t, port)
	first := startBinary(t, port, nil, "-c", dir)
	second := start(t, nil, buildBinary(t), "-c", dir)
	if code := second.wait(); code != 1 {
		t.Errorf("the second server ended with %d", code)
	}
	for _, want := range []string{
		port + ": bind: address already in use: another server, an earlier start of this one, or systemd holds the port",
		"change port in " + dir + "/seafile.conf:",
	} {
		if !strings.Contains(second.out.String(), want) {
			t.Errorf("the second server did not say %q: %s", want, second.out)
		}
	}
	if !pings("127.0.0.1:" + port) {
		t.Error("the first server does not answer any more")
	}
	if code := first.terminate(); code != 0 {
		t.Errorf("exit status of the first: %d", code)
	}
}

// After a kill the clients see the end, and find a server again that knows nothing of them.
func TestKillAndRestart(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	addr, dir := "127.0.0.1:"+port, writeConfig(t, port)
	s := startBinary(t, port, nil, "-c", dir)
	clients := make([]*testClient, howMany(1000, 300))
	token := clientToken(repoA, "alice@example.com", later()) // their old token, as they keep it
	join := func() {
		for i := range clients {
			clients[i] = connect(t, addr, asDesktop)
			clients[i].subscribe(repoA, token)
		}
		for _, c := range clients {
			c.sync()
		}
	}
	deliver := func(n int) {
		t.Helper()
		post(t, addr, lockEvent(repoA, n), len(clients))
		for _, c := range clients {
			c.expectTexts(lockEvent(repoA, n))
		}
	}
	join()
	deliver(1)
	killed := time.Now()
	s.Process.Signal(syscall.SIGKILL)
	s.wait()
	for _, c := range clients {
		if opcode, _, err := c.next(); err == nil || os.IsTimeout(err) {
			t.Fatalf("a client of the killed server got frame %d, %v", opcode, err)
		}
	}
	noticed := time.Since(killed)
	startBinary(t, port, nil, "-c", dir)
	up := time.Since(killed)
	join()
	deliver(2)
	t.Logf("%d clients: they noticed within %v; the server answered again after %v, and all had the next event after %v",
		len(clients), noticed, up, time.Since(killed))
}

// ---- Tests with a socket of systemd ----

// startHanded starts the real binary with a listening socket handed over as systemd does:
// descriptor 3, and LISTEN_PID is the server's own.
func startHanded(t testing.TB, ln *net.TCPListener, env []string, args ...string) *process {
	t.Helper()
	socket, err := ln.File()
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	cmd := exec.Command("sh", append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`, buildBinary(t)}, args...)...)
	cmd.ExtraFiles = []*os.File{socket}
	return launch(t, append([]string{"LISTEN_FDS=1"}, env...), cmd)
}

// listenTCP opens a socket as systemd's .socket unit does.
func listenTCP(t testing.TB) (*net.TCPListener, string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln.(*net.TCPListener), ln.Addr().String()
}

// A restartLoad asks for /ping and posts events without pause, over a fresh connection each,
// and counts what came of it.
type restartLoad struct {
	good, refused, cut, wrong atomic.Int64
	mu                        sync.Mutex
	others                    []string // a text for each that was cut or wrong
	longest                   time.Duration
	stop                      func()
}

func startRestartLoad(addr string, senders int) *restartLoad {
	l, done := &restartLoad{}, make(chan bool)
	var all sync.WaitGroup
	hc := &http.Client{Timeout: patient, Transport: &http.Transport{DisableKeepAlives: true}}
	for i := range senders {
		all.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-done:
					return
				case <-time.After(time.Millisecond):
				}
				r, _ := http.NewRequest("GET", "http://"+addr+"/ping", nil)
				if i%2 == 1 {
					r, _ = http.NewRequest("POST", "http://"+addr+"/events", strings.NewReader(lockEvent(repoA, n)))
					r.Header.Set("Authorization", "Token "+eventToken(later()))
				}
				l.request(hc, r)
			}
		})
	}
	l.stop = sync.OnceFunc(func() { close(done); all.Wait() })
	return l
}

// request sends a request and counts what came of it.
func (l *restartLoad) request(hc *http.Client, r *http.Request) {
	start := time.Now()
	answer, err := hc.Do(r)
	text := ""
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		l.refused.Add(1)
	case err != nil:
		l.cut.Add(1)
		text = err.Error()
	default:
		body, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		if answer.StatusCode == http.StatusOK && err == nil {
			l.good.Add(1)
		} else {
			l.wrong.Add(1)
			text = fmt.Sprintf("%s %q %v", answer.Status, body, err)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.longest = max(l.longest, time.Since(start))
	if text != "" {
		l.others = append(l.others, text)
	}
}

// With systemd's socket a stop loses nothing and a crash refuses nothing: what comes while
// no process serves waits for the next one.
func TestRestartIsNotNoticed(t *testing.T) {
	t.Parallel()
	const restarts, senders, waiting = 4, 4, 20
	for _, tc := range []struct {
		name   string
		signal syscall.Signal
		exit   int
		cut    int64 // at most: what had been accepted when the process was killed
	}{
		{"a stop loses nothing", syscall.SIGTERM, 0, 0},
		{"a crash refuses nothing", syscall.SIGKILL, -1, restarts * senders},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			ln, addr := listenTCP(t)
			dir := writeConfig(t, freePort(t)) // not this port is served, but the one of the socket
			p := startHanded(t, ln, nil, "-c", dir)
			p.waitPing(addr)
			load := startRestartLoad(addr, senders)
			defer load.stop()
			for range restarts {
				before := load.good.Load()
				waitFor(t, "requests are answered", func() bool { return load.good.Load() > before+100 })
				p.Process.Signal(tc.signal)
				if code := p.wait(); code != tc.exit {
					t.Fatalf("exit status %d, want %d; output: %s", code, tc.exit, p.out)
				}
				// Nobody serves now: what comes waits in the socket for the next process.
				var conns []*testClient
				for i := range waiting {
					c := rawConn(t, addr)
					io.WriteString(c.nc, rawEvent(eventToken(later()), lockEvent(repoA, i)))
					conns = append(conns, c)
				}
				p = startHanded(t, ln, nil, "-c", dir)
				for i, c := range conns {
					answer, err := http.ReadResponse(c.br, nil)
					if err != nil || answer.StatusCode != http.StatusOK {
						t.Fatalf("event %d, posted while no process served, is answered %v (%v)", i, answer, err)
					}
				}
			}
			load.stop()
			if load.refused.Load() != 0 || load.wrong.Load() != 0 || load.cut.Load() > tc.cut {
				t.Errorf("of %d requests %d were refused, %d answered wrongly, %d cut (want 0, 0, at most %d): %q",
					load.good.Load(), load.refused.Load(), load.wrong.Load(), load.cut.Load(), tc.cut, load.others)
			}
			if code := p.terminate(); code != 0 {
				t.Errorf("exit status %d; output: %s", code, p.out)
			}
		})
	}
}

// ---- Tests of sd_notify ----

// listenNotify opens a socket as systemd does for sd_notify(3).
func listenNotify(t *testing.T, path string) <-chan string {
	t.Helper()
	nc, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	states := make(chan string, 1000)
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := nc.Read(buf)
			if err != nil {
				return
			}
			states <- string(buf[:n])
		}
	}()
	return states
}

func nextState(t *testing.T, states <-chan string, within time.Duration) string {
	t.Helper()
	select {
	case state := <-states:
		return state
	case <-time.After(within):
		return "nothing"
	}
}

// systemd is told when the server is ready and when it stops, and, if it asks for it, that
// it lives.
func TestSystemdIsTold(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ name, socket, watchdog string }{
		{"socket with a path", filepath.Join(t.TempDir(), "notify"), "2000000"},
		{"abstract socket", fmt.Sprintf("@notification-server-test-%d", os.Getpid()), "2000000"},
		{"no watchdog", filepath.Join(t.TempDir(), "notify"), ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			states := listenNotify(t, tc.socket)
			port := freePort(t)
			env := []string{"NOTIFY_SOCKET=" + tc.socket, "WATCHDOG_USEC=" + tc.watchdog}
			p := start(t, env, buildBinary(t), "-c", writeConfig(t, port))
			if state := nextState(t, states, patient); state != "READY=1" {
				t.Fatalf("told %q, want READY=1; output: %s", state, p.out)
			}
			if !pings("127.0.0.1:" + port) {
				t.Error("told ready, but it does not answer")
			}
			if tc.watchdog == "" {
				if state := nextState(t, states, 1500*time.Millisecond); state != "nothing" {
					t.Errorf("told %q without being asked", state)
				}
			}
			for range len(tc.watchdog) / 3 { // twice
				if state := nextState(t, states, patient); state != "WATCHDOG=1" {
					t.Errorf("told %q, want WATCHDOG=1", state)
				}
			}
			if code := p.terminate(); code != 0 {
				t.Errorf("exit status %d", code)
			}
			state := nextState(t, states, patient)
			for state == "WATCHDOG=1" { // one may have come between
				state = nextState(t, states, patient)
			}
			if state != "STOPPING=1" {
				t.Errorf("told %q, want STOPPING=1", state)
			}
		})
	}
}

// A socket of systemd that nobody reads holds up neither the start nor what the server does
// by time, nor the stop.
func TestNotifySocketThatNobodyReads(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "notify")
	unread, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer unread.Close()
	full, err := net.Dial("unixgram", path)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	for err == nil {
		full.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		_, err = io.WriteString(full, "full")
	}
	port := freePort(t)
	p := startBinary(t, port, []string{"NOTIFY_SOCKET=" + path, "WATCHDOG_USEC=1000000"}, "-c", writeConfig(t, port))
	c := connect(t, "127.0.0.1:"+port, asDesktop)
	c.subscribe(repoA, clientToken(repoA, "alice@example.com", time.Now().Add(2*time.Second)))
	c.expectTexts(expiredText(repoA)) // by itself
	c.subscribed(repoB, "alice@example.com")
	post(t, "127.0.0.1:"+port, update(repoB, "1"), 1)
	c.expectTexts(update(repoB, "1"), update(repoB, "1"))
	p.Process.Signal(syscall.SIGTERM)
	c.expectClose(statusGoingAway)
	if code := p.wait(); code != 0 {
		t.Errorf("exit status %d; output: %s", code, p.out)
	}
}

// A server that is stuck in the middle of an event, with the hub's lock held, does not tell
// systemd that it lives; when it goes on, it does.
func TestWatchdogOfAStuckServer(t *testing.T) {
	t.Parallel()
	socket, fault := filepath.Join(t.TempDir(), "notify"), filepath.Join(t.TempDir(), "clock")
	states := listenNotify(t, socket)
	setFault(t, fault, "0s")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	port := freePort(t)
	addr := "127.0.0.1:" + port
	start(t, []string{"TEST_CLOCK=" + fault, "NOTIFY_SOCKET=" + socket, "WATCHDOG_USEC=500000"}, self, "-c", writeConfig(t, port))
	for _, want := range []string{"READY=1", "WATCHDOG=1"} {
		if state := nextState(t, states, patient); state != want {
			t.Fatalf("told %q, want %s", state, want)
		}
	}
	c := connect(t, addr, asBrowser).subscribed(repoA, "alice@example.com")
	setFault(t, fault, "hang")
	sender := rawConn(t, addr)
	io.WriteString(sender.nc, rawEvent(eventToken(later()), update(repoA, "1")))
	waitFor(t, "systemd is not told any more", func() bool { return nextState(t, states, 2*time.Second) == "nothing" })
	if state := nextState(t, states, time.Second); state != "nothing" {
		t.Errorf("a stuck server told %q", state)
	}
	setFault(t, fault, "0s")
	c.expectTexts(update(repoA, "1"))
	if state := nextState(t, states, patient); state != "WATCHDOG=1" {
		t.Errorf("told %q, want WATCHDOG=1", state)
	}
}

// A server whose ticks panic does not tell systemd that it lives, and logs the bug once a minute.
func TestWatchdogOfATickThatPanics(t *testing.T) {
	t.Parallel()
	socket, fault := filepath.Join(t.TempDir(), "notify"), filepath.Join(t.TempDir(), "clock")
	states := listenNotify(t, socket)
	port := freePort(t)
	setFault(t, fault, "ticks")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	const half = 2 * sweepInterval
	p := start(t, []string{"TEST_CLOCK=" + fault, "NOTIFY_SOCKET=" + socket,
		fmt.Sprintf("WATCHDOG_USEC=%d", (2 * half).Microseconds())}, self, "-c", writeConfig(t, port))
	if state := nextState(t, states, patient); state != "READY=1" {
		t.Fatalf("told %q, want READY=1", state)
	}
	if state := nextState(t, states, 2*half+sweepInterval); state != "nothing" {
		t.Errorf("told %q", state)
	}
	post(t, "127.0.0.1:"+port, lockEvent(repoA, 1), 0)
	if n := strings.Count(p.out.String(), "please report this"); n != 1 {
		t.Errorf("the bug is logged %d times: %s", n, p.out)
	}
	setFault(t, fault, "0s")
	if state := nextState(t, states, patient); state != "WATCHDOG=1" {
		t.Errorf("told %q, want WATCHDOG=1", state)
	}
}

// ---- Configuration ----

// manualSection is the section as Seafile's manual prints it.
const manualSection = `# jwt_private_key are required.You should generate it manually.
[notification]
enabled = true
# the ip of notification server. (Do not modify the host when using Nginx or Apache, as Nginx or Apache will proxy the requests to this address)
host = 127.0.0.1
# the port of notification server
port = 8083
# the log level of notification server
# You can set log_level to debug to print messages sent to clients.
log_level = info
# jwt_private_key is used to generate jwt token and authenticate seafile server
jwt_private_key = M@O8VWUb81YvmtWLHGB2I_V7di5-@0p(MF*GrE!sIws23F
`

// goodSection is a section without a fault or a warning. Its lines are 1 to 5.
const goodSection = "[notification]\nenabled = true\nhost = 127.0.0.1\nport = 8083\n" +
	"jwt_private_key = " + testKey + "\n"

// confDir makes a directory with this seafile.conf.
func confDir(t testing.TB, text string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "conf")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "seafile.conf"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// environment returns a getenv that knows these variables alone, given as NAME=VALUE.
func environment(variables ...string) func(string) string {
	return func(name string) string {
		for _, variable := range variables {
			if value, found := strings.CutPrefix(variable, name+"="); found {
				return value
			}
		}
		return ""
	}
}

// loaded is what loadConfig makes of a file and an environment, without this machine's /run.
func loaded(t testing.TB, text string, variables ...string) (*config, error) {
	t.Helper()
	return loadConfig(confDir(t, text), environment(variables...), t.TempDir())
}

// expectTexts demands that there are as many texts as patterns, each with its pattern.
func expectTexts(t *testing.T, what string, texts, patterns []string) {
	t.Helper()
	ok := len(texts) == len(patterns)
	for i := 0; ok && i < len(texts); i++ {
		ok = regexp.MustCompile(patterns[i]).MatchString(texts[i])
	}
	if !ok {
		t.Errorf("%s:\n%q\nwant\n%q", what, texts, patterns)
	}
}

// A value in seafile.conf means here what it means to seaf-server, and a file without a
// fault gives no warning.
func TestConfigValues(t *testing.T) {
	t.Parallel()
	const key = "\njwt_private_key = k"
	for _, c := range []struct{ name, text, want string }{
		{"plain", "[notification]\njwt_private_key = k\n", "k"},
		{"no space", "[notification]\njwt_private_key=k", "k"},
		{"white space before it", "[notification]\n\t jwt_private_key \t=\t k\n", "k"},
		{"white space behind it", "[notification]\njwt_private_key = k \t\n", "k \t"},
		{"number sign", "[notification]\njwt_private_key = a#b #c\n", "a#b #c"},
		{"begins with a number sign", "[notification]\njwt_private_key = #a\n", "#a"},
		{"semicolon", "[notification]\njwt_private_key = a;b ;c\n", "a;b ;c"},
		{"equals", "[notification]\njwt_private_key = =a=b==\n", "=a=b=="},
		{"quotes", "[notification]\njwt_private_key = \"a'b\"\n", `"a'b"`},
		{"inner spaces", "[notification]\njwt_private_key = a  b\tc\n", "a  b\tc"},
		{"brackets", "[notification]\njwt_private_key = [a]\n", "[a]"},
		{"percent, dollar", "[notification]\njwt_private_key = %(a)s$b\n", `%(a)s$b`},
		{"escapes", "[notification]\njwt_private_key = a\\sb\\tc\\nd\\re\\\\f\n", "a b\tc\nd\re\\f"},
		{"unknown escape", "[notification]\njwt_private_key = a\\b\n", `a\b`},
		{"not ASCII", "[notification]\njwt_private_key = schlüssel\n", "schlüssel"},
		{"not UTF-8", "[notification]\njwt_private_key = schl\xfcssel \n", "schl\xfcssel"},
		{"CRLF", "[notification]\r\n# c\r\n\r\njwt_private_key = k\r\n", "k"},
		{"byte order mark", "\ufeff[notification]" + key, "k"},
		{"comments", "[notification]\n# jwt_private_key = a\n; jwt_private_key = b\n  # c" + key + "\n #jwt_private_key = d", "k"},
		{"semicolon comment", "[notification]\n; comment" + key, "k"},
		{"the last counts", "[notification]\njwt_private_key = a" + key + "\n", "k"},
		{"the last section counts", "[notification]\njwt_private_key = a\n[x]\njwt_private_key = b\n[notification]" + key, "k"},
		{"unknown key", "[notification]\nnew_in_14 = x" + key, "k"},
		{"other sections", "nonsense before\n[database]\njwt_private_key = b\nno key at all\n=\n[fileserver\n[notification]" + key + "\n[zz]\nnonsense\n[broken", "k"},
		{"spaces in the header", "[ notification ]" + key, "k"},
		{"spaced header and ours", "[notification]" + key + "\n[ notification ]\njwt_private_key = other\n", "k"},
		{"comment behind the header", "[notification] # ours" + key, "k"},
		{"language of a key", "[notification]\njwt_private_key[de] = x" + key, "k"},
	} {
		cfg, err := loaded(t, c.text)
		if err != nil || string(cfg.key) != c.want {
			t.Errorf("%s: %q gives %+v, %v; want the key %q", c.name, c.text, cfg, err, c.want)
		}
	}
	cfg, err := loaded(t, goodSection)
	if err != nil || !cfg.enabled || cfg.host != "127.0.0.1" || cfg.port != "8083" || cfg.logLevel != slog.LevelInfo ||
		string(cfg.key) != testKey || len(cfg.warnings)+len(cfg.faults) != 0 || cfg.metrics != "" {
		t.Errorf("a good section: %+v, %v", cfg, err)
	}
	cfg, err = loaded(t, "[notification]\njwt_private_key = "+testKey+"\n")
	if err != nil || !cfg.enabled || cfg.host != "0.0.0.0" || cfg.port != "8083" || cfg.logLevel != slog.LevelInfo || len(cfg.warnings) != 0 {
		t.Errorf("the defaults: %+v, %v", cfg, err)
	}
	for _, c := range []struct{ line, want string }{
		{"host = [::1]", "::1"}, {"host = ::1", "::1"}, {"host = [::]", "::"}, {"host = 10.0.0.1 ", "10.0.0.1"},
		{"host = notification-server", "notification-server"}, {"host = a_b.example.com", "a_b.example.com"},
		{"host = fe80::1%eth0", "fe80::1%eth0"}, {"host =", "0.0.0.0"},
	} {
		cfg, err := loaded(t, goodSection+c.line)
		if err != nil || cfg.host != c.want {
			t.Errorf("%s: %+v, %v; want %s", c.line, cfg, err, c.want)
		}
	}
	for _, c := range []struct{ line, want string }{
		{"port = 1", "1"}, {"port = 65535", "65535"}, {"port = +80", "80"}, {"port = 0080", "80"},
		{"port = 80 # comment", "80"}, {"port = 80\tx", "80"}, {"port =", "8083"}, {"port = 80 ", "80"},
	} {
		cfg, err := loaded(t, goodSection+c.line)
		if err != nil || cfg.port != c.want || c.want != "8083" && !strings.HasSuffix(cfg.portFrom, "seafile.conf:6") {
			t.Errorf("%s: %+v, %v; want %s", c.line, cfg, err, c.want)
		}
	}
	for _, c := range []struct {
		value string
		want  slog.Level
	}{
		{"debug", slog.LevelDebug}, {"Info", slog.LevelInfo}, {"WARNING", slog.LevelWarn}, {"warn ", slog.LevelWarn},
		{"error", slog.LevelError}, {"", slog.LevelInfo},
	} {
		cfg, err := loaded(t, goodSection+"log_level = "+c.value)
		if err != nil || cfg.logLevel != c.want || len(cfg.warnings) != 0 {
			t.Errorf("log_level %q: %+v, %v; want %v", c.value, cfg, err, c.want)
		}
	}
}

// What makes seaf-server refuse a file, or take notifications for switched off, is told
// with its line and the remedy, and the server starts all the same.
func TestConfigFaults(t *testing.T) {
	t.Parallel()
	key := "\njwt_private_key = " + testKey + "\n"
	refused := func(line int, reason string) string {
		return fmt.Sprintf(`seafile\.conf:%d: seaf-server 10 to 12 refuses the whole file.*%s`, line, reason)
	}
	for _, c := range []struct {
		name, text       string
		faults, warnings []string
	}{
		{"good", goodSection, nil, nil},
		{"byte order mark", "\ufeff" + goodSection, []string{refused(1, "byte order mark.*UTF-8")}, nil},
		{"byte order mark before a comment", "\ufeff# c\n" + goodSection, []string{refused(1, "byte order mark")}, nil},
		{"semicolon", goodSection + "\n; c\n", []string{refused(7, "begins with ;.*with #")}, nil},
		{"semicolon in another section", goodSection + "[x]\n;c\n; d\n", []string{refused(7, "begins with ;.*1 more.*line 8")}, nil},
		{"semicolon with an equals sign", goodSection + "; c = d\n", nil, nil},
		{"line before the first section", "x = y\n" + goodSection, []string{refused(1, "before the first section")}, nil},
		{"bad line in another section", goodSection + "[x]\nbad\n", []string{refused(7, `neither "key = value".*comment`)}, nil},
		{"empty key in another section", goodSection + "[x]\n = y\n", []string{refused(7, "no key.*before the =")}, nil},
		{"open header elsewhere", "[x\n" + goodSection, []string{refused(1, "header must end with its bracket")}, nil},
		{"comment behind a header", "# c\n[x] # y\n" + goodSection, []string{refused(2, "behind a section header")}, nil},
		{"empty header", goodSection + "[]\n", []string{refused(6, "name of a section is empty")}, nil},
		{"bracket in a header", goodSection + "[a[b]\n", []string{refused(6, "name of a section")}, nil},
		{"bracket in a key", goodSection + "a]b = c\n", []string{refused(6, "name of a key")}, nil},
		{"encoding", goodSection + "Encoding = latin1\n", []string{refused(6, "Encoding")}, nil},
		{"enabled = True", strings.Replace(goodSection, "true", "True", 1), []string{`seafile\.conf:2: .*takes this value of enabled for off.*enabled = true`}, nil},
		{"enabled with a comment", strings.Replace(goodSection, "true", "yes # please", 1), []string{`seafile\.conf:2: .*for off`}, nil},
		{"enabled empty", strings.Replace(goodSection, "true", "", 1), []string{`seafile\.conf:2: .*for off`}, nil},
		{"enabled with white space behind it", strings.Replace(goodSection, "true", "true \t", 1), nil, nil},
		{"all missing", "# c\n[notification]" + key, []string{`seafile\.conf:2: enabled is missing.*enabled = true`,
			`seafile\.conf:2: host is missing.*host = `, `seafile\.conf:2: port is missing.*port = 8083`}, nil},
		{"all missing in a refused file", "# c\n[notification]" + key + "[x]\nbad\n", []string{refused(5, ""), `enabled is missing`, `host is missing`, `port is missing`}, nil},
		{"spaced header", strings.Replace(goodSection, "[notification]", "[ notification ]", 1), []string{`seafile\.conf:1: .*another section.*write \[notification\]`}, nil},
		{"white space behind host", goodSection + "host = 127.0.0.1 \n", []string{`seafile\.conf:6: white space stands behind host`}, nil},
		{"empty host", goodSection + "host = \n", []string{`seafile\.conf:6: host is empty`}, nil},
		{"bare IPv6", goodSection + "host = ::1\n", []string{`seafile\.conf:6: .*IPv6.*host = \[::1\]`}, nil},
		{"IPv6 in brackets", goodSection + "host = [::1]\n", nil, nil},
		{"comment behind port", goodSection + "port = 8083 # c\n", nil, nil},
		{"key with white space behind it", goodSection + key[1:len(key)-1] + " \t\n", nil, []string{`seafile\.conf:6: .*ends in white space.*remove it`}},
		{"key with an escape", goodSection + key[1:len(key)-1] + "\\s\n", nil, []string{`seafile\.conf:6: .*backslash`}},
		{"key with a bad escape", goodSection + key[1:len(key)-1] + "\\x\n", []string{`seafile\.conf:6: .*cannot read jwt_private_key`}, nil},
		{"key with a backslash at its end", goodSection + key[1:len(key)-1] + "\\\n", []string{`seafile\.conf:6: .*cannot read jwt_private_key`}, nil},
		{"key that is not UTF-8", goodSection + key[1:len(key)-1] + "\xff\n", []string{`seafile\.conf:6: .*cannot read jwt_private_key`}, nil},
		{"unknown log level", goodSection + "log_level = verbose\n", nil, []string{`seafile\.conf:6: log_level "verbose".*debug, info, warning or error`}},
		{"log level that cannot be read", goodSection + "log_level = \\x\n", nil, []string{`seafile\.conf:6: log_level "\\\\x" is not known`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			cfg, err := loaded(t, c.text)
			if err != nil || !strings.HasPrefix(string(cfg.key), testKey) || cfg.port != "8083" {
				t.Fatalf("%q gives %+v, %v", c.text, cfg, err)
			}
			expectTexts(t, "faults", cfg.faults, c.faults)
			expectTexts(t, "warnings", cfg.warnings, c.warnings)
			for _, text := range append(cfg.faults, cfg.warnings...) {
				if strings.Contains(text, testKey) {
					t.Errorf("shows the key: %s", text)
				}
			}
		})
	}
}

// The senders need host and port of the file, also where the environment sets those to
// listen on.
func TestFaultsBehindVariables(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, line, fault string }{
		{"port is a word", "port = http", `seafile\.conf:6: port is no number`},
		{"port is 0", "port = 0", `seafile\.conf:6: port is no number`},
		{"host has a backslash", "host = a\\b", `seafile\.conf:6: .*cannot read host`},
		{"host is bare IPv6", "host = ::1", `seafile\.conf:6: .*IPv6`},
	} {
		cfg, err := loaded(t, goodSection+c.line, "NOTIFICATION_SERVER_HOST=127.0.0.1", "NOTIFICATION_SERVER_PORT=8084")
		if err != nil || cfg.host != "127.0.0.1" || cfg.port != "8084" {
			t.Errorf("%s: %+v, %v", c.name, cfg, err)
			continue
		}
		expectTexts(t, c.name, cfg.faults, []string{c.fault})
	}
}

// What is wrong is said with its place and its remedy, at once, without a stack
// trace and without the text of the line.
func TestConfigErrors(t *testing.T) {
	t.Parallel()
	const ok, secret = "[notification]\njwt_private_key = " + testKey + "\n", "Sesame-0pen-y0urself"
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { taken.Close() }) // after the parallel subtests
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	noKey := `(?i)seafile\.conf.*no jwt_private_key.*openssl rand -base64 32`
	for _, c := range []struct {
		name, text string
		env        []string
		want       string
	}{
		{"neither key nor comment", ok + secret + "\n", nil, `seafile\.conf:3: seaf-server 10 to 12 refuses the whole file.*cannot be understood.*comment.*#.*(correct|remove)`},
		{"no key before the =", ok + "\n= " + secret, nil, `seafile\.conf:4: .*no key.*(correct|remove)`},
		{"CRLF counts lines alike", strings.ReplaceAll(ok, "\n", "\r\n") + "\r\n" + secret, nil, `seafile\.conf:4: `},
		{"our header without bracket", "# c\n[notification\njwt_private_key = " + secret + "\n", nil, `seafile\.conf:2: .*bracket.*\[notification\]`},
		{"our header with a space and without bracket", "[ notification\njwt_private_key = " + secret + "\n", nil, `seafile\.conf:1: .*bracket.*\[notification\]`},
		{"next header without bracket", ok + "[" + secret + "\n", nil, `seafile\.conf:3: .*bracket`},
		{"no section", "[database]\nx = y\n", nil, noKey},
		{"not our section", "[notification2]\njwt_private_key = " + secret + "\n", nil, noKey},
		{"upper case", "\n[Notification]\njwt_private_key = " + secret + "\n", nil, `no jwt_private_key \(line 2 says \[Notification\]`},
		{"UTF-16", "\xff\xfe[\x00n\x00", nil, `no jwt_private_key \(and in line 1, `},
		{"no key", "[notification]\nenabled = true\n", nil, noKey},
		{"key without value", "[notification]\njwt_private_key =\n", nil, `seafile\.conf:2: .*no jwt_private_key`},
		{"key of white space", "[notification]\njwt_private_key = \\s\\t\n", nil, noKey},
		{"file of Seafile 12", "[notification]\nenabled = true\nhost = notification-server\nport = 8083\n", nil, `seafile\.conf:1: .*no jwt_private_key.*Seafile 12.*JWT_PRIVATE_KEY`},
		{"empty variable", "[notification]\n", []string{"JWT_PRIVATE_KEY="}, noKey},
		{"port 0", ok + "port = 0\n", nil, `seafile\.conf:3: port .*1 to 65535.*"0"`},
		{"port 65536", ok + "port = 65536\n", nil, `seafile\.conf:3: port .*1 to 65535`},
		{"port negative", ok + "port = -1\n", nil, `seafile\.conf:3: port .*1 to 65535`},
		{"port word", ok + "port = http\n", nil, `seafile\.conf:3: port .*1 to 65535`},
		{"port with comment", ok + "port = 8083# the port\n", nil, `seafile\.conf:3: port .*1 to 65535.*line of its own.*#`},
		{"port of the environment", ok, []string{"NOTIFICATION_SERVER_PORT=x"}, `NOTIFICATION_SERVER_PORT: port .*1 to 65535`},
		{"port of the environment is a URL", ok, []string{"NOTIFICATION_SERVER_PORT=http://127.0.0.1:8083"}, `NOTIFICATION_SERVER_PORT: port .*1 to 65535`},
		{"port of the environment with a comment", ok, []string{"NOTIFICATION_SERVER_PORT=80 # x"}, `NOTIFICATION_SERVER_PORT: port .*1 to 65535`},
		{"enabled", ok + "enabled = maybe\n", nil, `seafile\.conf:3: enabled must be true or false`},
		{"host with a port", ok + "host = 127.0.0.1:8083\n", nil, `seafile\.conf:3: host must be .*without a port`},
		{"host as a URL", ok + "host = http://127.0.0.1\n", nil, `seafile\.conf:3: host must be .*without http://`},
		{"host with half a pair of brackets", ok + "host = [::1\n", nil, `seafile\.conf:3: host must be `},
		{"IPv4 in brackets", ok + "host = [127.0.0.1]\n", nil, `seafile\.conf:3: host must be `},
		{"host with comment", ok + "host = 127.0.0.1 # c\n", nil, `seafile\.conf:3: host must be .*line of its own`},
		{"host with a backslash", ok + "host = a\\b\n", nil, `seafile\.conf:3: host must be an address or a name`},
		{"metrics", ok + "metrics = 9083\n", nil, `seafile\.conf:3: metrics must be HOST:PORT.*"9083"`},
		{"metrics of the environment", ok, []string{"NOTIFICATION_SERVER_METRICS=9083"}, `NOTIFICATION_SERVER_METRICS: metrics must be HOST:PORT`},
		{"both variables with a key", ok, []string{"JWT_PRIVATE_KEY=" + secret, "JWT_PRIVATE_KEY_FILE=/x"}, `JWT_PRIVATE_KEY and JWT_PRIVATE_KEY_FILE are both set`},
		{"key in the place of its file", ok, []string{"JWT_PRIVATE_KEY_FILE=" + secret}, `JWT_PRIVATE_KEY_FILE: its value is not an absolute path.*JWT_PRIVATE_KEY`},
		{"key that begins like a path in the place of its file", ok, []string{"JWT_PRIVATE_KEY_FILE=/" + secret}, `JWT_PRIVATE_KEY_FILE: cannot read the key: the file that it names is not there`},
		{"key in a file that is not there", ok, []string{"JWT_PRIVATE_KEY_FILE=/nowhere/key"}, `environment variable JWT_PRIVATE_KEY_FILE: cannot read the key: the file that it names is not there`},
		{"key in a directory", ok, []string{"JWT_PRIVATE_KEY_FILE=/"}, `JWT_PRIVATE_KEY_FILE\): cannot read the key`},
		{"key in an empty file", ok, []string{"JWT_PRIVATE_KEY_FILE=/dev/null"}, `JWT_PRIVATE_KEY_FILE\): the file is empty`},
		{"key in an endless file", ok, []string{"JWT_PRIVATE_KEY_FILE=/dev/zero"}, `JWT_PRIVATE_KEY_FILE\): cannot read the key: /dev/zero has more than`},
		{"key of white space in the environment", ok, []string{"JWT_PRIVATE_KEY= \t"}, `JWT_PRIVATE_KEY: the key is only white space`},
		{"port in use", ok + "host = 127.0.0.1\nport = " + port + "\n", nil, port + `.*(stop it|change port in .*seafile\.conf:4)`},
		{"host without an address", ok + "host = no-such-host.invalid\nport = " + port + "\n", nil, `host no-such-host\.invalid \(.*seafile\.conf:3\) has no address here.*JWT_PRIVATE_KEY`},
		{"no such address", ok + "host = 192.0.2.1\nport = " + port + "\n", nil, `192\.0\.2\.1.*host \(.*seafile\.conf:3\)`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if _, err := loaded(t, c.text, c.env...); err == nil && !strings.Contains(c.text, port) ||
				err != nil && !regexp.MustCompile(c.want).MatchString(err.Error()) {
				t.Errorf("loadConfig returns %v; want %s", err, c.want)
			}
			dir := confDir(t, c.text)
			log := filepath.Join(dir, "log")
			var status int
			var stderr string
			withinOnce(t, time.Second, func() { status, _, stderr = runOnce(t, c.env, "-c", dir) })
			want := regexp.MustCompile(`\[ERROR\] .*` + strings.TrimPrefix(c.want, "(?i)"))
			if status != 1 || !want.MatchString(stderr) {
				t.Errorf("exit %d, %q; want 1, %s", status, stderr, c.want)
			}
			if strings.Contains(stderr, "goroutine") || strings.Contains(stderr, secret) || strings.Count(stderr, "[ERROR]") != 1 {
				t.Errorf("more than one sentence, or the key: %q", stderr)
			}
			checkLog(t, stderr, "")
			// Started by seafile.sh, it says so in the log and where it was started.
			_, _, stderr = runOnce(t, c.env, "-c", dir, "-l", log)
			text, _ := os.ReadFile(log)
			if re := regexp.MustCompile(c.want); !re.Match(text) || !re.MatchString(stderr) {
				t.Errorf("log %q, standard error %q; want %s in both", text, stderr, c.want)
			}
		})
	}
	absent := filepath.Join(t.TempDir(), "absent")
	for _, c := range []struct {
		name, path string
		env        []string
		want       string
	}{
		{"no such directory", absent, nil, absent + `.*directory.*-c`},
		{"no such directory of a file", filepath.Join(absent, "seafile.conf"), nil, absent + `: .*directory.*-c`},
		{"no such directory, key in the environment", absent, []string{"JWT_PRIVATE_KEY=" + testKey}, absent + `.*directory.*-c`},
		{"no file", t.TempDir(), nil, `seafile\.conf.*JWT_PRIVATE_KEY or JWT_PRIVATE_KEY_FILE`},
	} {
		cfg, err := loadConfig(c.path, environment(c.env...), t.TempDir())
		if err == nil || !regexp.MustCompile(c.want).MatchString(err.Error()) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %+v, %v; want %s", c.name, cfg, err, c.want)
		}
	}
}

// With a key in the environment the environment alone configures. Otherwise it comes
// before the file. What white space, quotes and Kubernetes add is told, and no secret is.
func TestEnvironmentRules(t *testing.T) {
	t.Parallel()
	keyFile := filepath.Join(t.TempDir(), "key")
	write := func(path, text string) string {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	named := func(name, text string) string { return "JWT_PRIVATE_KEY_FILE=" + write(keyFile+name, text) }
	const unreadable = "[notification\nport = 1\nhost = 1.2.3.4\n"
	around := `^environment variable %s: white space or quotes`
	aroundKey := `white space, a line end or quotes stand around the key`
	for _, c := range []struct {
		name, file string
		env        []string
		want       string // host, port, key and metrics
		warnings   []string
	}{
		{"key", unreadable, []string{"JWT_PRIVATE_KEY=" + testKey}, "0.0.0.0 8083 " + testKey, nil},
		{"all", unreadable, []string{"JWT_PRIVATE_KEY=" + testKey, "NOTIFICATION_SERVER_HOST=::1", "NOTIFICATION_SERVER_PORT=99",
			"NOTIFICATION_SERVER_METRICS=[::1]:9"}, "::1 99 " + testKey + " [::1]:9", nil},
		{"host in brackets", unreadable, []string{"JWT_PRIVATE_KEY=" + testKey, "NOTIFICATION_SERVER_HOST=[::]"}, ":: 8083 " + testKey, nil},
		{"key in a file", unreadable, []string{named("1", testKey)}, "0.0.0.0 8083 " + testKey, nil},
		{"key in a file with a line end", unreadable, []string{named("2", testKey+"\n")}, "0.0.0.0 8083 " + testKey, nil},
		{"key in a file with CRLF", unreadable, []string{named("3", testKey+"\r\n")}, "0.0.0.0 8083 " + testKey, nil},
		{"key in a file with two line ends", unreadable, []string{named("4", testKey+"\n\n")}, "0.0.0.0 8083 " + testKey + "\n", []string{aroundKey}},
		{"key in a file with a blank", unreadable, []string{named("5", testKey+" \n")}, "0.0.0.0 8083 " + testKey + " ", []string{aroundKey}},
		{"key in a file, in quotes", unreadable, []string{named("6", "'"+testKey+"'\n")}, "0.0.0.0 8083 '" + testKey + "'", []string{aroundKey}},
		{"file of the key in quotes", unreadable, []string{`JWT_PRIVATE_KEY_FILE="` + write(keyFile+"7", testKey) + `"`}, "0.0.0.0 8083 " + testKey,
			[]string{fmt.Sprintf(around, "JWT_PRIVATE_KEY_FILE")}},
		{"key in quotes", unreadable, []string{`JWT_PRIVATE_KEY="` + testKey + `"`}, `0.0.0.0 8083 "` + testKey + `"`, []string{"^environment variable JWT_PRIVATE_KEY: " + aroundKey}},
		{"key with a line end", unreadable, []string{"JWT_PRIVATE_KEY=" + testKey + "\n"}, "0.0.0.0 8083 " + testKey + "\n", []string{aroundKey}},
		{"quotes and white space", unreadable, []string{"JWT_PRIVATE_KEY=" + testKey, `NOTIFICATION_SERVER_HOST="127.0.0.1"`, "NOTIFICATION_SERVER_PORT='99' ",
			"NOTIFICATION_SERVER_METRICS=\t[::1]:9", `SEAFILE_LOG_TO_STDOUT="true"`, `NOTIFICATION_SERVER_LOG_LEVEL="info"`}, "127.0.0.1 99 " + testKey + " [::1]:9",
			[]string{fmt.Sprintf(around, "SEAFILE_LOG_TO_STDOUT"), fmt.Sprintf(around, "NOTIFICATION_SERVER_HOST"), fmt.Sprintf(around, "NOTIFICATION_SERVER_PORT"),
				fmt.Sprintf(around, "NOTIFICATION_SERVER_METRICS"), fmt.Sprintf(around, "NOTIFICATION_SERVER_LOG_LEVEL")}},
		{"only quotes", unreadable, []string{"JWT_PRIVATE_KEY=" + testKey, `NOTIFICATION_SERVER_PORT=""`}, "0.0.0.0 8083 " + testKey, []string{fmt.Sprintf(around, "NOTIFICATION_SERVER_PORT")}},
		{"Kubernetes", unreadable, []string{"JWT_PRIVATE_KEY=" + testKey, "NOTIFICATION_SERVER_PORT=tcp://10.43.7.9:8083"}, "0.0.0.0 8083 " + testKey,
			[]string{`NOTIFICATION_SERVER_PORT: a tcp:// address is what Kubernetes sets.*ignored`}},
		{"Kubernetes and a file", goodSection + "port = 77\n", []string{"NOTIFICATION_SERVER_PORT=tcp://10.43.7.9:8083"}, "127.0.0.1 77 " + testKey,
			[]string{`NOTIFICATION_SERVER_PORT: a tcp:// address is what Kubernetes sets.*ignored`}},
		{"before the file", goodSection, []string{"NOTIFICATION_SERVER_HOST=::1", "NOTIFICATION_SERVER_PORT=99", "NOTIFICATION_SERVER_METRICS=[::1]:9", "JWT_PRIVATE_KEY="},
			"::1 99 " + testKey + " [::1]:9", nil},
		{"Kubernetes and UDP", unreadable, []string{"JWT_PRIVATE_KEY=" + testKey, "NOTIFICATION_SERVER_PORT=udp://10.43.7.9:8083"}, "0.0.0.0 8083 " + testKey,
			[]string{`NOTIFICATION_SERVER_PORT: a udp:// address`}},
		{"unknown log level", goodSection, []string{"NOTIFICATION_SERVER_LOG_LEVEL=loud"}, "127.0.0.1 8083 " + testKey, []string{`NOTIFICATION_SERVER_LOG_LEVEL: log_level "loud"`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg, err := loaded(t, c.file, c.env...)
			if err != nil {
				t.Fatal(err)
			}
			got := strings.TrimSuffix(fmt.Sprintf("%s %s %s %s", cfg.host, cfg.port, cfg.key, cfg.metrics), " ")
			if got != c.want || len(cfg.faults) != 0 {
				t.Errorf("got %q, faults %q; want %q", got, cfg.faults, c.want)
			}
			expectTexts(t, "warnings", cfg.warnings, c.warnings)
			if all := cfg.source + strings.Join(cfg.warnings, ""); strings.Contains(all, testKey) {
				t.Errorf("shows the key: %s", all)
			}
			alone := strings.Contains(cfg.source, "the environment alone")
			if alone != (c.file == unreadable) || alone != cfg.senders.environmentAlone {
				t.Errorf("the environment alone: %v; %s", alone, cfg.source)
			}
		})
	}
	run := t.TempDir()
	secret := write(filepath.Join(run, "secrets/JWT_PRIVATE_KEY"), testKey+"\n")
	cfg, err := loadConfig(t.TempDir(), environment(), run)
	if err != nil || string(cfg.key) != testKey || !cfg.senders.environmentAlone || !strings.Contains(cfg.source, secret) {
		t.Errorf("a secret and no file: %+v, %v", cfg, err)
	}
	cfg, err = loadConfig(confDir(t, "[notification]\njwt_private_key = of the file\n"), environment(), run)
	if err != nil || string(cfg.key) != "of the file" {
		t.Errorf("a secret and a file: %+v, %v", cfg, err)
	}
	if !logToStdout(environment(`SEAFILE_LOG_TO_STDOUT="true"`)) || logToStdout(environment("SEAFILE_LOG_TO_STDOUT=1")) || logToStdout(environment()) {
		t.Error("SEAFILE_LOG_TO_STDOUT counts if it is true, also in quotes, and only then")
	}
}

// A key in a pipe works, as in JWT_PRIVATE_KEY_FILE=<(cmd), and a FIFO that nobody
// writes does not hang the start.
func TestKeyInPipe(t *testing.T) {
	t.Parallel()
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	withinOnce(t, time.Second, func() {
		if _, err := loaded(t, "", "JWT_PRIVATE_KEY_FILE="+fifo); err == nil || !strings.Contains(err.Error(), "is empty") {
			t.Errorf("a FIFO without a writer: %v", err)
		}
	})
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	io.WriteString(w, testKey)
	w.Close()
	cfg, err := loaded(t, "", fmt.Sprintf("JWT_PRIVATE_KEY_FILE=/proc/self/fd/%d", r.Fd()))
	if err != nil || string(cfg.key) != testKey {
		t.Errorf("a key in a pipe: %+v, %v", cfg, err)
	}
}

// The line at the start says of each setting where it stands, and -check learns what the
// senders have.
func TestConfigSources(t *testing.T) {
	t.Parallel()
	dir := confDir(t, goodSection+"metrics = 127.0.0.1:9\nhost = [::1]\n")
	file := filepath.Join(dir, "seafile.conf")
	env := environment("NOTIFICATION_SERVER_PORT=99", "ENABLE_NOTIFICATION_SERVER=true", "INNER_NOTIFICATION_SERVER_URL=http://x:1")
	cfg, err := loadConfig(dir, env, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("host from %s:7, port from environment variable NOTIFICATION_SERVER_PORT, log_level by default, "+
		"jwt_private_key from %s:5, metrics from %s:6", file, file, file)
	if cfg.source != want || cfg.portFrom != "environment variable NOTIFICATION_SERVER_PORT" {
		t.Errorf("source %q, port from %q; want %q", cfg.source, cfg.portFrom, want)
	}
	wantSenders := senders{host: "[::1]", port: 8083,
		enableVariable: "true", innerURL: "http://x:1"}
	if cfg.senders != wantSenders {
		t.Errorf("senders: %+v, want %+v", cfg.senders, wantSenders)
	}
	for _, c := range []struct {
		name, text string
		want       senders
	}{
		{"missing", "\n[notification]\njwt_private_key = k\n", senders{}},
		{"no section of this name", "[ notification]\njwt_private_key = k\n", senders{}},
		{"refused", goodSection + "[x]\nbad\n", senders{host: "127.0.0.1", port: 8083}},
		{"unreadable", "[notification]\nenabled = True\nhost = a \njwt_private_key = k\n", senders{}},
	} {
		cfg, err := loaded(t, c.text)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if cfg.senders != c.want {
			t.Errorf("%s: senders %+v, want %+v", c.name, cfg.senders, c.want)
		}
	}
	cfg, err = loaded(t, "", "JWT_PRIVATE_KEY="+testKey)
	if err != nil || cfg.source != "host by default, port by default, log_level by default, "+
		"jwt_private_key from environment variable JWT_PRIVATE_KEY (the environment alone; seafile.conf is not read)" ||
		cfg.portFrom != "environment variable NOTIFICATION_SERVER_PORT" {
		t.Errorf("the environment alone: %+v, %v", cfg, err)
	}
	cfg, err = loaded(t, "[notification]\njwt_private_key = k\n")
	if err != nil || cfg.portFrom != cfg.file {
		t.Errorf("the default port is to be changed in %s, want the file; %v", cfg.portFrom, err)
	}
	for _, value := range []string{"false", "False", "0", "off", "no # longer"} {
		cfg, err := loaded(t, "[notification]\nenabled = "+value+"\nport = nonsense\n")
		if err != nil || cfg.enabled || len(cfg.warnings)+len(cfg.faults) != 0 {
			t.Errorf("enabled = %s: %+v, %v; want disabled, and no more said", value, cfg, err)
		}
	}
}

// signedPost posts an event with a token of this key and returns the status.
func signedPost(t *testing.T, port, key string) int {
	t.Helper()
	claims := fmt.Sprintf(`{"exp":%d}`, time.Now().Add(5*time.Minute).Unix())
	token := signToken(key, `{"alg":"HS256","typ":"JWT"}`, claims)
	answer, _ := request(t, "POST", "http://127.0.0.1:"+port+"/events", update(repoA, "1"), "Authorization: Token "+token)
	return answer.StatusCode
}

// The running server uses what loadConfig reads: the key that the environment names,
// without the file; and the file where the variables are empty.
func TestEnvironment(t *testing.T) {
	t.Parallel()
	const envKey = "another key, of the environment, # with all; \"sorts\" = of characters"
	t.Run("set", func(t *testing.T) {
		t.Parallel()
		filePort, port := freePort(t), freePort(t)
		dir := confDir(t, fmt.Sprintf("[notification]\nhost = 192.0.2.1\nport = %s\nlog_level = error\njwt_private_key = %s\n", filePort, testKey))
		p := startBinary(t, port, []string{"NOTIFICATION_SERVER_HOST=127.0.0.1", "NOTIFICATION_SERVER_PORT=" + port, "NOTIFICATION_SERVER_LOG_LEVEL=debug", "JWT_PRIVATE_KEY=" + envKey}, "-c", dir)
		if got := signedPost(t, port, envKey); got != 200 {
			t.Errorf("an event with the key of the environment is answered %d", got)
		}
		if got := signedPost(t, port, testKey); got != 401 {
			t.Errorf("an event with the key of the file is answered %d", got)
		}
		connect(t, "127.0.0.1:"+port, asDesktop).sync()
		p.terminate()
		if log := p.out.String(); !strings.Contains(log, "[DEBUG] ") || !strings.Contains(log, "started on 127.0.0.1:"+port) || strings.Contains(log, envKey) ||
			!strings.Contains(log, "JWT_PRIVATE_KEY") || !strings.Contains(log, "NOTIFICATION_SERVER_PORT") {
			t.Errorf("log: %s", log)
		}
	})
	t.Run("empty", func(t *testing.T) {
		t.Parallel()
		port := freePort(t)
		p := startBinary(t, port, []string{"NOTIFICATION_SERVER_HOST=", "NOTIFICATION_SERVER_PORT=", "NOTIFICATION_SERVER_LOG_LEVEL=", "JWT_PRIVATE_KEY=", "JWT_PRIVATE_KEY_FILE=",
			"SEAFILE_RPC_PIPE_PATH=", "SEAFILE_LOG_TO_STDOUT="}, "-c", writeConfig(t, port))
		if got := signedPost(t, port, testKey); got != 200 {
			t.Errorf("an event with the key of the file is answered %d", got)
		}
		p.terminate()
	})
	t.Run("no file", func(t *testing.T) { // as in Seafile 12 and later
		t.Parallel()
		port := freePort(t)
		dir := t.TempDir()
		key := filepath.Join(dir, "key")
		if err := os.WriteFile(key, []byte(testKey+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		p := startBinary(t, port, []string{"NOTIFICATION_SERVER_HOST=127.0.0.1", "NOTIFICATION_SERVER_PORT=" + port, "JWT_PRIVATE_KEY_FILE=" + key, "SEAFILE_LOG_TO_STDOUT=true"}, "-c", dir)
		if got := signedPost(t, port, testKey); got != 200 {
			t.Errorf("an event is answered %d", got)
		}
		if status := p.terminate(); status != 0 {
			t.Errorf("exit %d", status)
		}
		checkLog(t, p.out.String(), "[notification-server] ")
		if log := p.out.String(); !strings.Contains(log, "the environment alone") || !strings.Contains(log, "JWT_PRIVATE_KEY_FILE") {
			t.Errorf("the log does not say where the configuration came from: %s", log)
		}
	})
}

// The section as the manual prints it runs, and warns of the published key; so
// does seafile.conf.example, with which README.md begins.
func TestManualConfiguration(t *testing.T) {
	t.Parallel()
	example, err := os.ReadFile("seafile.conf.example")
	if err != nil {
		t.Error(err)
	}
	from := 0
	for line := range strings.Lines(manualSection) {
		i := strings.Index(string(example[from:]), strings.TrimSpace(line))
		if i < 0 {
			t.Errorf("seafile.conf.example lacks, or has out of order: %s", line)
			break
		}
		from += i
	}
	for _, c := range []struct{ name, path string }{
		{"manual", confDir(t, manualSection)},
		{"cluster", confDir(t, strings.Replace(manualSection, "127.0.0.1", "192.168.1.134", 1))},
		{"example", "seafile.conf.example"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			port := freePort(t) // all else is as printed
			p := startBinary(t, port, []string{"NOTIFICATION_SERVER_HOST=127.0.0.1", "NOTIFICATION_SERVER_PORT=" + port}, "-c", c.path)
			if got := signedPost(t, port, "M@O8VWUb81YvmtWLHGB2I_V7di5-@0p(MF*GrE!sIws23F"); got != 200 {
				t.Errorf("an event is answered %d", got)
			}
			if status := p.terminate(); status != 0 {
				t.Errorf("exit %d", status)
			}
			log := p.out.String()
			checkLog(t, log, "")
			if strings.Count(log, "[WARNING]") != 1 || !regexp.MustCompile(`\[WARNING\].*manual.*openssl rand -base64 32`).MatchString(log) {
				t.Errorf("want one warning, of the published key: %s", log)
			}
		})
	}
}

// A key that can be guessed is warned of at each start, whatever the log level allows
// later, and is not shown.
func TestKeyWarnings(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, key, want string }{
		{"short", "0123456789abcdef0123456789abcde", `seafile\.conf:5: .*shorter than 32 bytes.*openssl`},
		{"long enough", "0123456789abcdef0123456789abcdef", ""},
		{"the manual's", "M@O8VWUb81YvmtWLHGB2I_V7di5-@0p(MF*GrE!sIws23F", `seafile\.conf:5: .*manual.*forge.*openssl`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			port := freePort(t)
			text := strings.NewReplacer("8083", port, testKey, c.key).Replace(goodSection)
			p := startBinary(t, port, nil, "-c", confDir(t, text+"log_level = warning\n"))
			p.terminate()
			log := p.out.String()
			if strings.Contains(log, "WARNING") != (c.want != "") || !regexp.MustCompile(c.want).MatchString(log) || strings.Contains(log, c.key) {
				t.Errorf("log %q, want %q", log, c.want)
			}
		})
	}
}

// seafile.sock is looked for in five places, each time anew.
func TestSocketPlaces(t *testing.T) {
	t.Parallel()
	dir := confDir(t, goodSection)
	base, run := filepath.Dir(dir), t.TempDir()
	places := []string{
		filepath.Join(base, "rpc"),
		filepath.Join(dir, "seafile-server-latest/runtime"),
		filepath.Join(base, "seafile-server-latest/runtime"),
		filepath.Join(base, "seafile-data"),
		filepath.Join(run, "seafile"),
	}
	for _, path := range []string{dir, filepath.Join(dir, "seafile.conf")} {
		cfg, err := loadConfig(path, environment("SEAFILE_RPC_PIPE_PATH="+places[0]), run)
		if err != nil {
			t.Fatal(err)
		}
		if got := cfg.seafileSocket(); got != "" {
			t.Errorf("found %s, where there is none", got)
		}
		for _, place := range slices.Backward(places) { // the last that comes is asked first
			want := filepath.Join(place, "seafile.sock")
			if err := os.MkdirAll(place, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(want, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if got := cfg.seafileSocket(); got != want {
				t.Errorf("found %q, want %s", got, want)
			}
		}
		for i, place := range places {
			os.Remove(filepath.Join(place, "seafile.sock"))
			want := ""
			if i+1 < len(places) {
				want = filepath.Join(places[i+1], "seafile.sock")
			}
			if got := cfg.seafileSocket(); got != want {
				t.Errorf("without %s: found %q, want %q", place, got, want)
			}
		}
	}
}

// A socket that comes to exist after the start is asked.
func TestSocketComesLater(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	dir := writeConfig(t, port)
	rpc := filepath.Join(filepath.Dir(dir), "rpc")
	p := startBinary(t, port, []string{"SEAFILE_RPC_PIPE_PATH=" + rpc}, "-c", filepath.Join(dir, "seafile.conf"))
	addr := "127.0.0.1:" + port
	if err := os.MkdirAll(rpc, 0o755); err != nil {
		t.Fatal(err)
	}
	startSeafServer(t, filepath.Join(rpc, "seafile.sock"), rpcReply(`{"ret":[{"group-id":1,"user-name":"alice","is-staff":0}]}`))
	alice := connect(t, addr, asDesktop).subscribed(repoA, "alice")
	event := permEvent("group", "", "1")
	if answer, _ := request(t, "POST", "http://"+addr+"/events", event, "Authorization: Token "+eventToken(time.Now().Add(5*time.Minute))); answer.StatusCode != 200 {
		t.Fatalf("answered %s", answer.Status)
	}
	alice.expect(opText, event)
	p.terminate()
	if log := p.out.String(); !strings.Contains(log, filepath.Join(rpc, "seafile.sock")) {
		t.Errorf("the log does not say at the start where group members will be asked: %s", log)
	}
}

// keyFileProgram is a process that reads files as seaf-server does. It takes files from
// its standard input and answers on its standard output. A number has 4 bytes, big-endian;
// a text is a number and as many bytes. A file is a text. The answer is the number of texts
// that follow, the first of which is the line at which GKeyFile refuses the file, or 0. Then
// come, for each key of each group: group, key, value, string, boolean, integer, the last
// three with a first character that is + if GKeyFile reads it, or - if it does not.
const keyFileProgram = `
#define _GNU_SOURCE
#include <glib.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static GString *answer;
static guint32 texts;

static void put_number(GString *to, guint32 n) {
	n = GUINT32_TO_BE(n);
	g_string_append_len(to, (char *)&n, 4);
}

static void put(const char *mark, const char *text) {
	put_number(answer, strlen(mark) + strlen(text));
	g_string_append(answer, mark);
	g_string_append(answer, text);
	texts++;
}

static int loads(const char *data, size_t size) {
	GKeyFile *file = g_key_file_new();
	int ok = g_key_file_load_from_data(file, data, size, G_KEY_FILE_NONE, NULL);
	g_key_file_free(file);
	return ok;
}

/* The first line such that the file up to it is refused. */
static int refused_line(const char *data, size_t size) {
	int line = 1;
	for (size_t i = 0; i < size; i++)
		if (data[i] == '\n') {
			if (!loads(data, i + 1))
				return line;
			line++;
		}
	return line;
}

static void put_key(GKeyFile *file, const char *group, const char *key) {
	GError *error = NULL;
	char *raw = g_key_file_get_value(file, group, key, NULL), number[20];
	put("", group);
	put("", key);
	put("", raw);
	char *text = g_key_file_get_string(file, group, key, &error);
	put(error ? "-" : "+", error ? "" : text);
	g_clear_error(&error);
	int on = g_key_file_get_boolean(file, group, key, &error);
	put(error ? "-" : "+", on ? "true" : "false");
	g_clear_error(&error);
	snprintf(number, sizeof number, "%d", g_key_file_get_integer(file, group, key, &error));
	put(error ? "-" : "+", number);
	g_clear_error(&error);
	g_free(raw);
	g_free(text);
}

static void put_file(GKeyFile *file) {
	char **groups = g_key_file_get_groups(file, NULL);
	for (int i = 0; groups[i]; i++) {
		char **keys = g_key_file_get_keys(file, groups[i], NULL, NULL);
		for (int k = 0; keys[k]; k++)
			put_key(file, groups[i], keys[k]);
		g_strfreev(keys);
	}
	g_strfreev(groups);
}

int main(void) {
	char path[40], number[20];
	int fd = memfd_create("seafile.conf", 0);
	guint32 size;
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	while (fread(&size, 4, 1, stdin) == 1) {
		size = GUINT32_FROM_BE(size);
		char *data = malloc(size + 1);
		if (fread(data, 1, size, stdin) != size || ftruncate(fd, 0) || pwrite(fd, data, size, 0) != (ssize_t)size)
			return 1;
		answer = g_string_new("");
		texts = 0;
		GKeyFile *file = g_key_file_new();
		if (g_key_file_load_from_file(file, path, G_KEY_FILE_NONE, NULL)) {
			put("", "0");
			put_file(file);
		} else {
			snprintf(number, sizeof number, "%d", refused_line(data, size));
			put("", number);
		}
		GString *head = g_string_new("");
		put_number(head, texts);
		fwrite(head->str, 1, head->len, stdout);
		fwrite(answer->str, 1, answer->len, stdout);
		fflush(stdout);
		g_string_free(head, TRUE);
		g_string_free(answer, TRUE);
		g_key_file_free(file);
		free(data);
	}
	return 0;
}
`

// A gKeyFile is a running keyFileProgram.
type gKeyFile struct {
	in  io.Writer
	out *bufio.Reader
}

// startGKeyFile compiles and starts the program. It ends with the test, or when its
// standard input does.
func startGKeyFile(t testing.TB) *gKeyFile {
	t.Helper()
	need(t, "gcc", "pkg-config")
	flags, err := exec.Command("pkg-config", "--cflags", "--libs", "glib-2.0").Output()
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("GLib's headers are not installed (libglib2.0-dev): %v", err)
		}
		t.Skipf("GLib's headers are not installed (libglib2.0-dev): %v", err)
	}
	dir := t.TempDir()
	source, program := filepath.Join(dir, "keyfile.c"), filepath.Join(dir, "keyfile")
	if err := os.WriteFile(source, []byte(keyFileProgram), 0o600); err != nil {
		t.Fatal(err)
	}
	args := append([]string{"-o", program, source}, strings.Fields(string(flags))...)
	if out, err := exec.Command("gcc", args...).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v: %s", err, out)
	}
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(), "LANGUAGE=C")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	return &gKeyFile{in, bufio.NewReader(out)}
}

// A reading is what a reader makes of a file: the line at which it refuses it, or 0, and
// the values by "group", "key".
type reading struct {
	refused int
	values  map[[2]string]readValue
}

// A readValue is a value as it stands, and as a string, a boolean and an integer, with a +
// or, where it cannot be read as such, a - in front.
type readValue struct {
	raw, text, boolean, integer string
}

// read returns GLib's reading of data.
func (g *gKeyFile) read(t testing.TB, data string) reading {
	t.Helper()
	if _, err := g.in.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(data))), data...)); err != nil {
		t.Fatalf("%q: %v", data, err)
	}
	number := func() int {
		var n [4]byte
		if _, err := io.ReadFull(g.out, n[:]); err != nil {
			t.Fatalf("%q: no answer: %v", data, err)
		}
		return int(binary.BigEndian.Uint32(n[:]))
	}
	texts := make([]string, number())
	for i := range texts {
		text := make([]byte, number())
		if _, err := io.ReadFull(g.out, text); err != nil {
			t.Fatalf("%q: half an answer: %v", data, err)
		}
		texts[i] = string(text)
	}
	refused, err := strconv.Atoi(texts[0])
	if err != nil || len(texts)%6 != 1 {
		t.Fatalf("%q: the answer is %q", data, texts)
	}
	r := reading{refused, map[[2]string]readValue{}}
	for k := range slices.Chunk(texts[1:], 6) {
		if !strings.Contains(k[1], "[") { // GLib keeps those of the environment's language
			r.values[[2]string{k[0], k[1]}] = readValue{k[2], k[3], k[4], k[5]}
		}
	}
	return r
}

// ourReading is that of parseKeyFile.
func ourReading(data string) reading {
	mark := func(ok bool) string {
		if ok {
			return "+"
		}
		return "-"
	}
	file := parseKeyFile(data)
	r := reading{0, map[[2]string]readValue{}}
	if len(file.bad) > 0 {
		r.refused = file.bad[0].line
		return r
	}
	for group, g := range file.groups {
		for key, v := range g.keys {
			if strings.Contains(key, "[") {
				continue
			}
			text, readable := v.text()
			if !readable {
				text = ""
			}
			on, isBool := v.boolean()
			number, isNumber := v.integer()
			r.values[[2]string{group, key}] = readValue{v.raw, mark(readable) + text,
				mark(isBool) + strconv.FormatBool(on), mark(isNumber) + strconv.Itoa(number)}
		}
	}
	return r
}

// compareReadings reports where the two differ.
func compareReadings(t *testing.T, g *gKeyFile, data string) {
	t.Helper()
	theirs, ours := g.read(t, data), ourReading(data)
	if theirs.refused != ours.refused || !maps.Equal(theirs.values, ours.values) {
		t.Errorf("%q:\nGLib reads %+v\nwe read    %+v", data, theirs, ours)
	}
}

// oddFiles are files that readers of such files disagree about, each in a few lines.
func oddFiles() []string {
	files := []string{
		"", "\n", "\r\n", "\r", " ", "\t\n", "\v\n", "\f\n", "\x00", "#", "# c", " # c\n", ";", "; c\n", ";=", "; a = b\n", "x", "=", "a=b", " a = b \n",
		manualSection, goodSection, strings.ReplaceAll(manualSection, "\n", "\r\n"), strings.ReplaceAll(manualSection, "\n", "\r"), "\ufeff" + manualSection,
		"\ufeff", "\ufeff\n[n]\n", "\ufeff#c\n[n]\na=b\n", "\ufeffa=b\n", " \ufeff[n]\n", "[n]\n\ufeff\n", "[n]\n\ufeffa=b\n", "\xff\xfe[\x00n\x00]\x00",
		"[n]", "[n]\r", "[n]\r\n", "[n] \t\n", "[n]\v", "[n]\f", "[n]#", "[n] # c\n", "[n] ; c\n", "[n]]", "[n]x", "[n]\xc3\xa9", "[n]\x80", "[n] \x80 \x80", "[n]\xc3",
		" [n]\na=b", "\t[n]\na=b", "\v[n]\na=b", "\f[n]\na=b", "\r[n]\na=b", "[ n ]\na=b", "[n\n", "[n\na=b\n", "[", "[]", "[]\na=b", "[ ]\na=b", "[[n]]", "[[n]", "[a[b]",
		"[a]b]", "[a\tb]", "[a\x01]", "[a\x7f]", "[a\xff]\na=b", "[a\x80]\na=b", "[\x80]\na=b", "[\xc3\xa9]\na=b", "[a\x00b]", "[a]\x00", "[a]\x00]", "[a\x00]", "[n=x\n", "[n]=x\n", "[a=b]\nc=d",
	}
	for _, body := range []string{
		"x", "x y", "=", "=b", " =b", "==b", "a", "a=", "a =", "a= ", "a=\t", "a=b ", "a=b\t\v", "a = b = c", "a==b", "a b = c", "a\tb=c", "a\v=b", "a\f=\fb", "a=\vb", "\va=b",
		"a=b\r\nc=d\r\n", "a=b\r", "a=b\r\r\n", "\r\r\na=b", "a=b\rc=d", "a=1\na=2", "a=1\n[x]\na=2\n[n]\nc=3\n[n]\na=4", "A=1\na=2", "[N]\na=2",
		"a[de]=b", "a[de]=b\na=c", "a[]=b", "a[=b", "a]=b", "a[d e]=b", "a [de]=b", "a\t[de]=b", "a[de]x=b", "a[de_DE.UTF-8@euro]=b", "a[d/e]=b", "a[de][en]=b", "[de]=b", "[=b", "a[b=c]=d",
		"a[\xc3\xa9]=b", "a[\xff]=b", "a[\xc2\xb2]=b", "a[d\x80]=b", "a[\xcc\x81]=b", "a[\xef\xbf\xbd]=b", "\xff=b", "\xc3\xa9=b", "a\x80=b", "a=\xff", "a=\xed\xa0\x80", "a=\xc0\x80", "a=\xf4\x90\x80\x80", "a=\xef\xbf\xbf",
		"a\x00=b", "a=b\x00c", "a=\x00", "\x00x", "# \x00\nx", "#\xff", ";a=b", ";", "; c", " ; c", "//c", "! c",
		"Encoding=UTF-8", "Encoding=utf-8", "Encoding=UTF-8 ", "Encoding=UTF-8\x00", "Encoding=latin1", "Encoding=", "encoding=x", "[x]\nEncoding=y", "[x]\nb=c\n[n]\nEncoding=y", "Encoding[de]=x",
		"a=\\s\\t\\n\\r\\\\", "a=\\", "a=b\\", "a=\\x", "a=\\;", "a=\\S", "a=\\\\s", "a=\\\\\\", "a=\\\xc3\xa9", "a=\\\x00", "a=\\ ",
		"a=true", "a=True", "a=TRUE", "a=t", "a=truee", "a=true ", "a=true\t\f", "a=true\v", "a=true#", "a=true # c", "a=yes", "a=on", "a=1", "a=1 ", "a=10", "a=0", "a=00", "a=false", "a=False ", "a=fals", "a=\\strue",
		"a=8083", "a=8083 ", "a=8083 # c", "a=8083#c", "a=8083 x", "a=8083\tx", "a=8083\vx", "a=+8083", "a=-1", "a=- 1", "a=+", "a=-", "a=+-1", "a=0x10", "a=010", "a=1e3", "a=1_000", "a=1,000", "a=\v1", "a=\v 1", "a=\v", "a=1\\s",
		"a=2147483647", "a=2147483648", "a=-2147483648", "a=-2147483649", "a=99999999999999999999 x", "a=\xd9\xa1", "a=1\xff", "a=1 \xff", "a=\"1\"", "a='1'",
	} {
		files = append(files, "[n]\n"+body+"\n")
	}
	for _, size := range []int{4088, 4089, 4090, 4091, 4092, 4093, 4094, 4095, 4096, 4097} { // GLib reads 4096 bytes at a time
		files = append(files, "[n]\na="+strings.Repeat("x", size)+"\r\nb=\xc3\xa9 c\r\n", "[n]\n#"+strings.Repeat("x", size)+"\nx\n")
	}
	return files
}

// Each odd file reads as GLib reads it: refusal and its line, or all values as strings,
// booleans and integers. And the line of a value is where GLib begins to know it.
func TestKeyFileAsGLib(t *testing.T) {
	t.Parallel()
	g := startGKeyFile(t)
	files := oddFiles()
	if len(files) < 130 {
		t.Errorf("only %d files", len(files))
	}
	for _, data := range files {
		compareReadings(t, g, data)
		for group, keys := range parseKeyFile(data).groups {
			for key, v := range keys.keys {
				upTo := strings.Join(strings.SplitAfter(data, "\n")[:v.line], "")
				if got := g.read(t, upTo); got.refused == 0 && !strings.Contains(key, "[") && got.values[[2]string{group, key}].raw != v.raw {
					t.Errorf("%q: we have [%s] %s from line %d, but GLib does not know it there", data, group, key, v.line)
				}
			}
		}
	}
	t.Logf("%d files", len(files))
}

// pieces are what files are generated from: what either reader looks at, and its neighbours.
var pieces = []string{
	"[n]\n", "[n]", "[", "]", "n", "[x]\n", "a", "b=", "a = ", "=", "\n", "\n", "\r\n", "\r", " ", "\t", "\v", "\f", "\x00", "#", ";", "\\", "s", "\\s", "\\x",
	"true", "false", "True", "1", "0", "8083", "-", "+", "2147483647", "2147483648", "Encoding", "Encoding=UTF-8\n", "[de]", "_", ".", "@", "/",
	"\ufeff", "\xc3\xa9", "\xc3", "\x80", "\xff", "\xed\xa0\x80", "\xef\xbf\xbd", "\x7f", "\x01", "\xc2\xb2", "\u00a0", "\u2028", "\"", "'",
}

// generated makes a file of pieces, one for each byte.
func generated(choices string) string {
	var file strings.Builder
	for _, choice := range []byte(choices) {
		file.WriteString(pieces[int(choice)%len(pieces)])
	}
	return file.String()
}

// FuzzKeyFile is TestKeyFileAsGLib for generated files. Each process that fuzzes has a
// reader of its own.
func FuzzKeyFile(f *testing.F) {
	g := startGKeyFile(f)
	for _, data := range oddFiles() {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data string) {
		compareReadings(t, g, data)
		file := generated(data)
		compareReadings(t, g, file)
		compareReadings(t, g, "[n]\n"+file)
	})
}

// FuzzConfig: whatever the file and the environment hold, there is an error or a
// configuration with which a server can start; a configuration without faults is one with
// which seaf-server sends; no text shows the key.
func FuzzConfig(f *testing.F) {
	f.Add(manualSection, "M@O8VWUb81YvmtWLHGB2I_V7di5-@0p(MF*GrE!sIws23F", "")
	f.Add("\ufeff[database]\r\nx\r\n[notification]\r\nport=1\r\n", " a#b;c=\"d\" ", "tcp://1.2.3.4:5")
	f.Add("[notification]\nport", "=", "'1'")
	f.Add("[notification\nx=y", "[x]", "x")
	f.Add(goodSection, "\\s", "[::1]")
	f.Add("[ notification ]\nenabled = yes\n;\nhost=::1\n", "\\", "\"\"")
	const secret = "Sesame-0pen-y0urself"
	dir := filepath.Join(f.TempDir(), "conf")
	if err := os.Mkdir(dir, 0o755); err != nil {
		f.Fatal(err)
	}
	file := filepath.Join(dir, "seafile.conf")
	places := regexp.MustCompile(`^(` + regexp.QuoteMeta(file) + `(:\d+)?|environment variable [A-Z_]+): [^\n]+`)
	f.Fuzz(func(t *testing.T, text, value, variable string) {
		text += "\n[notification]\njwt_private_key = " + secret + value + "\n"
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		getenv := environment("NOTIFICATION_SERVER_PORT="+variable, "NOTIFICATION_SERVER_HOST="+variable, "NOTIFICATION_SERVER_LOG_LEVEL="+variable)
		cfg, err := loadConfig(dir, getenv, dir)
		var texts []string
		if err != nil {
			texts = []string{err.Error()}
		} else {
			texts = append(cfg.warnings, cfg.faults...)
		}
		for _, said := range texts {
			if !places.MatchString(said) || strings.Contains(said, secret) && !strings.Contains(variable+value, secret) {
				t.Fatalf("%q, %q: no place, or the key: %q", text, variable, said)
			}
		}
		if err != nil || !cfg.enabled {
			return
		}
		port, err := strconv.Atoi(cfg.port)
		if err != nil || port < 1 || port > 65535 || cfg.host == "" || len(cfg.key) == 0 || strings.Contains(cfg.source, "\n") {
			t.Fatalf("%q, %q: %+v", text, variable, cfg)
		}
		if len(cfg.faults) > 0 {
			return
		}
		on, _ := parseKeyFile(text).groups[section].keys["enabled"].boolean()
		if s := cfg.senders; !on || s.host == "" || s.port < 1 {
			t.Fatalf("%q: no fault, but the senders have %v, %+v", text, on, s)
		}
	})
}

// ---- Tests of the tokens ----

// testVerifier checks tokens by the clock of a testServer.
func testVerifier(s *testServer) *verifier {
	return &verifier{[]byte(testKey), clock{wall: s.now}}
}

// Each token that Seafile's programs made is good until its end and not longer; the one
// signed with another algorithm never is.
func TestCapturedTokens(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	for _, c := range []struct {
		name, token  string
		end          float64
		repoID, user string
		good         bool
	}{
		{"libjwt", capturedC, capturedEnd, "", "", true},
		{"golang-jwt", capturedGo, 1795424223, repoA, "", true},
		{"desktop client", capturedClient, 1795682817, repoA, "alice@example.com", true},
		{"PyJWT", capturedSeahub, 4102444800, "", "", true},
		{"PyJWT, library", capturedLibrary, 4102444800, repoA, "alice@example.com", true},
		{"PyJWT, HS512", capturedHS512, 4102444800, "", "", false},
	} {
		for _, at := range []struct {
			time float64
			live bool
		}{
			{c.end - 86400, true},
			{c.end - 0.5, true},
			{c.end, false},
			{c.end + 0.5, false},
			{c.end + 1e7, false},
		} {
			s.time.setWall(at.time)
			cl, err := testVerifier(s).verify(c.token)
			if want := c.good && at.live; (err == nil) != want {
				t.Errorf("%s, %v s from its end: %v, want good: %v", c.name, at.time-c.end, err, want)
			} else if want && (cl.repoID != c.repoID || cl.username != c.user) {
				t.Errorf("%s: claims %+v", c.name, cl)
			}
		}
	}
}

// signText signs two parts of a token that need not be base64.
func signText(headAndClaims string) string {
	mac := hmac.New(sha256.New, []byte(testKey))
	mac.Write([]byte(headAndClaims))
	return headAndClaims + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// A token is refused for its form, its algorithm, its signature, its claims or its time,
// in this order, and told apart in the metrics.
func TestTokens(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	s.time.setWall(1795423000)
	const claims = `{"exp":4102444800}`
	enc := base64.RawURLEncoding.EncodeToString
	with := func(claims string) string { return signToken(testKey, tokenHead, claims) }
	head := func(header string) string { return signToken(testKey, header, claims) }
	h, c := enc([]byte(tokenHead)), enc([]byte(claims))
	valid := signText(h + "." + c)
	parts := strings.Split(valid, ".")
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := strings.IndexByte(alphabet, valid[len(valid)-1])
	hs384, hs512 := hmac.New(sha512.New384, []byte(testKey)), hmac.New(sha512.New, []byte(testKey))
	h384, h512 := enc([]byte(`{"alg":"HS384"}`))+"."+c, enc([]byte(`{"alg":"HS512"}`))+"."+c
	hs384.Write([]byte(h384))
	hs512.Write([]byte(h512))
	for _, c := range []struct {
		name, token string
		reason      string // "" for a good one
	}{
		{"good", valid, ""},
		{"no typ", head(`{"alg":"HS256"}`), ""},
		{"further names in the header", head(`{"kid":"1","alg":"HS256","typ":"x"}`), ""},
		{"fraction later", with(`{"exp":1795423000.5}`), ""},
		{"exponent", with(`{"exp":4.1e9}`), ""},
		{"nbf past", with(`{"exp":4102444800,"nbf":1795422999}`), ""},
		{"nbf now", with(`{"exp":4102444800,"nbf":1795423000}`), ""},

		{"empty", "", "malformed"},
		{"dots", "..", "algorithm"},
		{"one part", h, "malformed"},
		{"two parts", h + "." + enc([]byte(claims)), "malformed"},
		{"four parts", valid + "." + h, "malformed"},
		{"a dot behind", valid + ".", "malformed"},
		{"padding", valid + "=", "malformed"},
		{"padded and signed", signText(base64.URLEncoding.EncodeToString([]byte(tokenHead+" ")) + "." + parts[1]), "malformed"},
		{"base64, not base64url", signText(h + "." + base64.RawStdEncoding.EncodeToString([]byte(`{"exp":4102444800,"a":"???>>>~~~"}`))), "malformed"},
		{"newline", valid + "\n", "malformed"},
		{"newline inside, signed", signText(h[:8] + "\n" + h[8:] + "." + parts[1]), "malformed"},
		{"carriage return inside, signed", signText(h + "." + parts[1][:8] + "\r" + parts[1][8:]), "malformed"},
		{"space", " " + valid, "malformed"},
		{"another writing of the same signature", valid[:len(valid)-1] + alphabet[last^1:][:1], "malformed"},

		{"alg none, unsigned", enc([]byte(`{"alg":"none"}`)) + "." + parts[1] + ".", "algorithm"},
		{"alg none, signed", head(`{"alg":"none"}`), "algorithm"},
		{"HS384", h384 + "." + enc(hs384.Sum(nil)), "algorithm"},
		{"HS512", h512 + "." + enc(hs512.Sum(nil)), "algorithm"},
		{"HS512 in name only", head(`{"alg":"HS512"}`), "algorithm"},
		{"RS256", head(`{"alg":"RS256"}`), "algorithm"},
		{"lower case", head(`{"alg":"hs256"}`), "algorithm"},
		{"no alg", head(`{"typ":"JWT"}`), "algorithm"},
		{"alg null", head(`{"alg":null}`), "algorithm"},
		{"alg list", head(`{"alg":["HS256"]}`), "algorithm"},
		{"ALG", head(`{"ALG":"HS256"}`), "algorithm"},
		{"alg none and Alg HS256", head(`{"alg":"none","Alg":"HS256"}`), "algorithm"},
		{"alg given twice", head(`{"alg":"none","alg":"HS256"}`), "algorithm"},
		{"crit (RFC 7515, section 4.1.11)", head(`{"alg":"HS256","crit":["b64"],"b64":false}`), "algorithm"},
		{"crit, empty", head(`{"alg":"HS256","crit":[]}`), "algorithm"},
		{"header is no object", head(`"HS256"`), "algorithm"},
		{"header is a list", head(`[{"alg":"HS256"}]`), "algorithm"},
		{"header is not JSON", head(`{"alg":"HS256"`), "algorithm"},
		{"bytes behind the header", head(`{"alg":"HS256"}x`), "algorithm"},

		{"no signature", parts[0] + "." + parts[1] + ".", "signature"},
		{"short signature", parts[0] + "." + parts[1] + "." + parts[2][:40], "signature"}, // 30 whole bytes
		{"long signature", valid + "AAAA", "signature"},
		{"other key", signToken("other", tokenHead, claims), "signature"},
		{"empty key", signToken("", tokenHead, claims), "signature"},
		{"other claims", parts[0] + "." + enc([]byte(`{"exp":4102444801}`)) + "." + parts[2], "signature"},
		{"other header", enc([]byte(`{"alg":"HS256"}`)) + "." + parts[1] + "." + parts[2], "signature"},
		{"signature before claims", signToken("other", tokenHead, `{"exp":1}`), "signature"},
		{"signature before JSON", signToken("other", tokenHead, `{`), "signature"},

		{"no exp", with(`{}`), "malformed"},
		{"exp in another case", with(`{"Exp":4102444800}`), "malformed"},
		{"exp given twice", with(`{"exp":1,"exp":4102444800}`), "malformed"},
		{"exp given twice, once by escapes", with(`{"exp":1,"\u0065xp":4102444800}`), "malformed"},
		{"username given twice", with(`{"exp":4102444800,"username":"bob@example.com","username":""}`), "malformed"},
		{"an unknown name given twice", with(`{"exp":4102444800,"x":1,"x":1}`), "malformed"},
		{"exp null", with(`{"exp":null}`), "malformed"},
		{"exp string", with(`{"exp":"4102444800"}`), "malformed"},
		{"exp true", with(`{"exp":true}`), "malformed"},
		{"exp list", with(`{"exp":[4102444800]}`), "malformed"},
		{"exp beyond numbers", with(`{"exp":1e400}`), "malformed"},
		{"claims null", with(`null`), "malformed"},
		{"claims list", with(`[{"exp":4102444800}]`), "malformed"},
		{"claims number", with(`4102444800`), "malformed"},
		{"claims empty", with(``), "malformed"},
		{"claims cut off", with(`{"exp":4102444800`), "malformed"},
		{"claims not UTF-8", with("{\"exp\":4102444800,\"username\":\"\xff\"}"), "malformed"},
		{"bytes behind the claims", with(`{"exp":4102444800}{}`), "malformed"},
		{"repo_id number", with(`{"exp":4102444800,"repo_id":7}`), "malformed"},
		{"nbf string", with(`{"exp":4102444800,"nbf":"1"}`), "malformed"},
		{"exp now", with(`{"exp":1795423000}`), "expired"},
		{"fraction before", with(`{"exp":1795422999.5}`), "expired"},
		{"exp 0", with(`{"exp":0}`), "long-expired"},
		{"exp negative", with(`{"exp":-4102444800}`), "long-expired"},
		{"exp in milliseconds would be far", with(`{"exp":1.795}`), "long-expired"},
		{"nbf to come", with(`{"exp":4102444800,"nbf":1795423001}`), "not-yet"},
	} {
		_, err := testVerifier(s).verify(c.token)
		var r *refusal
		got := ""
		if errors.As(err, &r) {
			got = r.reason
		}
		if got != c.reason {
			t.Errorf("%s: refused for %q (%v), want %q", c.name, got, err, c.reason)
		}
	}
}

// Only a token that one of Seafile's programs makes for events posts one: the key signs
// tokens for visitors without an account, too (DEPLOYMENTS.md).
func TestEventTokens(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	in := func(d time.Duration) int64 { return s.now().Add(d).Unix() }
	for _, c := range []struct {
		name   string
		claims string // E is replaced by a time 300 s from now
		status int
		reason string // in the metrics, and a word in the log's line
		says   string
	}{
		{"seaf-server", `{"exp":E}`, 200, "", ""},
		{"Go file server", `{"exp":E,"repo_id":"` + repoA + `","username":""}`, 200, "", ""},
		{"made at, and good since", `{"exp":E,"iat":1795423000,"nbf":1795423000}`, 200, "", ""},
		{"Seahub, 500 s", fmt.Sprintf(`{"exp":%d}`, in(500*time.Second)), 200, "", ""},
		{"an hour", fmt.Sprintf(`{"exp":%d}`, in(time.Hour)), 200, "", ""},

		{"more than an hour", fmt.Sprintf(`{"exp":%d}`, in(time.Hour+time.Second)), 403, "lifetime", "hour"},
		{"three days", fmt.Sprintf(`{"exp":%d,"repo_id":%q,"username":""}`, in(72*time.Hour), repoA), 403, "lifetime", "hour"},
		{"document, of a visitor without an account",
			fmt.Sprintf(`{"file_uuid":"u","filename":"a.md","username":"","name":"","avatar_url":"","permission":"r","default_title":"","exp":%d}`, in(72*time.Hour)),
			403, "claims", "(file_uuid|filename|name|avatar_url|permission|default_title)"},
		{"document, soon at its end", `{"file_uuid":"u","filename":"a.md","username":"","name":"","avatar_url":"","permission":"r","default_title":"","exp":E}`,
			403, "claims", "(file_uuid|filename|name|avatar_url|permission|default_title)"},
		{"document, of a user", `{"file_uuid":"u","filename":"a.md","username":"alice@example.com","name":"Alice","avatar_url":"","permission":"rw","default_title":"","exp":E}`,
			403, "", ""},
		{"thumbnail", `{"file_uuid":"u","exp":E}`, 403, "claims", "file_uuid"},
		{"internal", `{"is_internal":true,"exp":E}`, 403, "claims", "is_internal"},
		{"a claim of RFC 7519", `{"exp":E,"aud":["notification"]}`, 403, "claims", "aud"},
		{"an empty name", `{"exp":E,"":1}`, 403, "claims", "claim"},
		{"a name with a line end", `{"exp":E,"a\nb":1}`, 403, "claims", `a\\\\?nb`},
		{"exp in another case, too", `{"exp":E,"EXP":E}`, 403, "claims", "EXP"},
		{"username null", `{"exp":E,"username":null}`, 403, "claims", "username"},
		{"username number", `{"exp":E,"username":0}`, 403, "claims", "username"},
		{"username list", `{"exp":E,"username":[]}`, 403, "claims", "username"},
		{"username in another case", `{"exp":E,"Username":""}`, 403, "claims", "Username"},
		{"repo_id in another case", `{"exp":E,"Repo_ID":"` + repoA + `"}`, 403, "claims", "Repo_ID"},
		{"a client's", `{"exp":E,"repo_id":"` + repoA + `","username":"alice@example.com"}`, 403, "client-token", "client"},
		{"a client's, by escapes", `{"exp":E,"\u0075sername":"alice@example.com"}`, 403, "client-token", "client"},
		{"username twice", `{"exp":E,"username":"alice@example.com","username":""}`, 401, "malformed", "twice"},
		{"username twice, once by escapes", `{"exp":E,"\u0075sername":"alice@example.com","username":""}`, 401, "malformed", "twice"},
		{"another library's", `{"exp":E,"repo_id":"` + repoB + `","username":""}`, 403, "other-library", "another library"},
	} {
		claims := strings.ReplaceAll(c.claims, "E}", fmt.Sprint(in(5*time.Minute), "}"))
		claims = strings.ReplaceAll(claims, "E,", fmt.Sprint(in(5*time.Minute), ","))
		token := signToken(testKey, tokenHead, claims)
		before := s.figures()[fmt.Sprintf("refused_total{reason=%q}", c.reason)]
		for _, line := range []string{tokenLine(token), "Seafile-Repo-Token: " + token} {
			answer, text := request(t, "POST", "http://"+s.addr+"/events", update(repoA, "1"), line)
			if answer.StatusCode != c.status {
				t.Errorf("%s: answered %s %q, want %d", c.name, answer.Status, text, c.status)
			}
		}
		if c.reason != "" {
			if got := s.figures()[fmt.Sprintf("refused_total{reason=%q}", c.reason)] - before; got != 2 {
				t.Errorf("%s: counted %v times as %q, want 2", c.name, got, c.reason)
			}
			s.logged(`\[WARNING\] .* refused: .*` + c.says)
		}
		s.out.reset()
		s.time.move(0, 2*time.Minute) // or the log would keep silent of the next with the same reason
	}
}

// The scheme of Authorization is read in any case of letters (RFC 9110, section 11.1).
func TestTokenScheme(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	for scheme, status := range map[string]int{
		"Token ": 200, "token ": 200, "TOKEN ": 200, "tOkEn ": 200, "Token   ": 200,
		"Bearer ": 401, "Tokens ": 401, "Token": 401, "": 401,
	} {
		answer, text := request(t, "POST", "http://"+s.addr+"/events", update(repoA, "1"), "Authorization: "+scheme+s.token())
		if answer.StatusCode != status {
			t.Errorf("scheme %q: answered %s %q, want %d", scheme, answer.Status, text, status)
		}
	}
}

// A subscription needs a token of that library with a client's claims and no others; any
// other is answered jwt-expired.
func TestSubscriptionTokens(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	cl := connect(t, s.addr, asDesktop)
	exp := fmt.Sprintf(`"exp":%d`, s.now().Add(72*time.Hour).Unix())
	const repo, user = `"repo_id":"` + repoA + `"`, `"username":"alice@example.com"`
	for _, c := range []struct {
		name, claims string
		reason       string // "" for a good one
		says         string // in the log
	}{
		{"a client's", exp + "," + repo + "," + user, "", ""},
		{"made at, and good since", exp + "," + repo + "," + user + `,"iat":1795423000,"nbf":1795423000`, "", ""},

		{"no repo_id", exp + "," + user, "other-library", "another library"},
		{"empty repo_id", exp + `,"repo_id":"",` + user, "other-library", "another library"},
		{"another repo_id", exp + `,"repo_id":"` + repoB + `",` + user, "other-library", "another library"},
		{"longer repo_id", exp + `,"repo_id":"` + repoA + `/",` + user, "other-library", "another library"},
		{"repo_id in upper case", exp + `,"repo_id":"` + strings.ToUpper(repoA) + `",` + user, "other-library", "another library"},
		{"a further claim", exp + "," + repo + "," + user + `,"file_uuid":"u"`, "claims", "file_uuid"},
		{"internal", exp + "," + repo + "," + user + `,"is_internal":true`, "claims", "is_internal"},
		{"an empty name", exp + "," + repo + "," + user + `,"":1`, "claims", "claim"},
		{"username null", exp + "," + repo + `,"username":null`, "claims", "username"},
		{"username number", exp + "," + repo + `,"username":7`, "claims", "username"},
		{"username in another case", exp + "," + repo + `,"UserName":"alice@example.com"`, "claims", "UserName"},
		{"repo_id in another case, too", exp + "," + repo + `,"REPO_ID":"` + repoB + `",` + user, "claims", "REPO_ID"},
		{"repo_id twice", exp + `,"repo_id":"` + repoB + `",` + repo + "," + user, "malformed", "twice"},
		{"username twice", exp + "," + repo + "," + user + `,"username":"bob@example.com"`, "malformed", "twice"},
	} {
		before := s.figures()[fmt.Sprintf("refused_total{reason=%q}", c.reason)]
		cl.t = t
		cl.subscribe(repoA, signToken(testKey, tokenHead, "{"+c.claims+"}"))
		if c.reason == "" {
			cl.sync()
			s.post(permEvent("user", "alice@example.com", "-1"), 1)
			cl.expect(opText, permEvent("user", "alice@example.com", "-1"))
			cl.unsubscribe(repoA)
			continue
		}
		cl.expect(opText, expiredText(repoA))
		cl.sync()
		if got := s.figures()[fmt.Sprintf("refused_total{reason=%q}", c.reason)] - before; got != 1 {
			t.Errorf("%s: counted %v times as %q, want once", c.name, got, c.reason)
		}
		s.logged(`\[WARNING\] .* refused: .*` + c.says)
		s.out.reset()
		s.settle()
		s.time.move(0, 2*time.Minute) // or the log would keep silent of the next with the same reason
		cl.sync()
	}
}

// A member is a name and a value of a JSON object, as they are given.
type jsonMember struct {
	name  string
	value json.RawMessage
}

// members returns what a JSON object holds, in order, duplicates included; nil for what is
// no object.
func jsonMembers(text []byte) (all []jsonMember) {
	dec := json.NewDecoder(bytes.NewReader(text))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') || !json.Valid(text) {
		return nil
	}
	for dec.More() {
		name, err := dec.Token()
		var value json.RawMessage
		if err != nil || dec.Decode(&value) != nil {
			return nil
		}
		all = append(all, jsonMember{name.(string), value})
	}
	return all
}

// onlyMember returns the value of the one member of this name, nil if there is none, or
// if there are several.
func onlyMember(text []byte, name string) (value json.RawMessage) {
	for _, m := range jsonMembers(text) {
		switch {
		case m.name != name:
		case value != nil:
			return nil
		default:
			value = m.value
		}
	}
	return value
}

// fuzzTime is when the tokens of FuzzToken are checked.
const fuzzTime = capturedEnd - 1

// checkAccepted demands of an accepted token what RFC 7515 and RFC 7519 do, by a check
// written on its own, and returns its claims.
func checkAccepted(t *testing.T, token string) (claims []byte) {
	t.Helper()
	if !regexp.MustCompile(`^[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{43}\z`).MatchString(token) {
		t.Fatalf("%q: accepted in this form", token)
	}
	i := strings.LastIndexByte(token, '.')
	head, body, _ := strings.Cut(token[:i], ".")
	if token != signText(token[:i]) {
		t.Fatalf("%q: accepted without our signature", token)
	}
	header, err := base64.RawURLEncoding.DecodeString(head)
	if err != nil || string(onlyMember(header, "alg")) != `"HS256"` {
		var alg string
		if json.Unmarshal(onlyMember(header, "alg"), &alg) != nil || alg != "HS256" {
			t.Fatalf("%q: accepted without alg HS256: %s", token, header)
		}
	}
	for _, m := range jsonMembers(header) {
		if m.name == "crit" {
			t.Fatalf("%q: accepted with crit: %s", token, header)
		}
	}
	claims, err = base64.RawURLEncoding.DecodeString(body)
	if err != nil {
		t.Fatalf("%q: accepted though its claims are %v", token, err)
	}
	seen := map[string]bool{}
	for _, m := range jsonMembers(claims) {
		if seen[m.name] {
			t.Fatalf("%q: accepted with %q given twice: %s", token, m.name, claims)
		}
		seen[m.name] = true
	}
	var exp, nbf float64
	if json.Unmarshal(onlyMember(claims, "exp"), &exp) != nil || exp <= fuzzTime {
		t.Fatalf("%q: accepted though expired: %s", token, claims)
	}
	if value := onlyMember(claims, "nbf"); value != nil && (json.Unmarshal(value, &nbf) != nil || nbf > fuzzTime) {
		t.Fatalf("%q: accepted too early: %s", token, claims)
	}
	return claims
}

// checkPosted demands of an accepted token what an event's may say, and nothing else.
func checkPosted(t *testing.T, token string) {
	t.Helper()
	claims := checkAccepted(t, token)
	for _, m := range jsonMembers(claims) {
		var text string
		var number float64
		switch m.name {
		case "exp":
			if json.Unmarshal(m.value, &number) != nil || number > fuzzTime+3600 {
				t.Fatalf("%s: posted with a token that is good for more than an hour", claims)
			}
		case "iat", "nbf":
		case "repo_id":
			if json.Unmarshal(m.value, &text) != nil || text != "" && text != repoA {
				t.Fatalf("%s: posted for another library", claims)
			}
		case "username":
			if m.value[0] != '"' || json.Unmarshal(m.value, &text) != nil || text != "" {
				t.Fatalf("%s: posted with the token of a user", claims)
			}
		default:
			t.Fatalf("%s: posted with the claim %q", claims, m.name)
		}
	}
}

// FuzzToken: a token is accepted, for an event or at all, only if a check written on its
// own accepts it.
func FuzzToken(f *testing.F) {
	for _, token := range []string{capturedC, capturedGo, capturedClient, capturedSeahub, capturedLibrary, capturedHS512} {
		parts := strings.Split(token, ".")
		header, _ := base64.RawURLEncoding.DecodeString(parts[0])
		claims, _ := base64.RawURLEncoding.DecodeString(parts[1])
		f.Add(string(header), string(claims), token)
	}
	f.Add(`{"alg":"none"}`, `{"exp":4102444800,"nbf":1}`, "..")
	f.Add(`{"ALG":"HS256","alg":null}`, `{"exp":"1","EXP":4e9}`, "a.b.c=\n")
	f.Add(`{"alg":"HS256","crit":["exp"]}`, `{"exp":1795423930,"username":""}`, "x")
	f.Add(`{"alg":"HS256","alg":"HS256"}`, `{"exp":1795423930,"\u0075sername":null}`, "x")
	f.Add(tokenHead, `{"exp":1795427528,"iat":1,"nbf":1,"repo_id":"","username":""}`, "x")
	f.Add(tokenHead, `{"exp":1795423930,"file_uuid":"u","username":""}`, "x")
	f.Add(tokenHead, `{"is_internal":true,"exp":1795423930,"exp":1795423930}`, "x")
	s := startServer(f)
	s.time.setWall(fuzzTime)
	check := func(t *testing.T, token string) {
		cl, err := testVerifier(s).verify(token)
		if err != nil {
			if cl != (claims{}) || err.Error() == "" {
				t.Fatalf("%q: refused with claims %+v, text %q", token, cl, err)
			}
		} else {
			text := checkAccepted(t, token)
			var repoID, user string
			json.Unmarshal(onlyMember(text, "repo_id"), &repoID)
			json.Unmarshal(onlyMember(text, "username"), &user)
			if cl.repoID != repoID || cl.username != user {
				t.Fatalf("%s: claims %+v", text, cl)
			}
		}
		r := httptest.NewRequest("POST", "/events", strings.NewReader(update(repoA, "1")))
		r.Header["Authorization"] = []string{"Token " + token}
		w := httptest.NewRecorder()
		s.http.Handler.ServeHTTP(w, r)
		s.out.reset() // it would grow all the time
		switch w.Code {
		case http.StatusOK:
			checkPosted(t, strings.TrimSpace(token))
		case http.StatusUnauthorized, http.StatusForbidden:
		default:
			t.Fatalf("%q: answered %d", token, w.Code)
		}
	}
	f.Fuzz(func(t *testing.T, header, claims, token string) {
		check(t, token)
		check(t, signToken(testKey, header, claims))
		check(t, signToken(token, header, claims)) // with another key, unless it is ours
		good := signToken(testKey, header, `{"exp":1795423930}`)
		if i := len(token) % len(good); len(token) > 0 && good[i] != token[0] { // a byte changed
			check(t, good[:i]+token[:1]+good[i+1:])
		}
	})
}

// ---- Tests of the hub ----

// Events of one sender come in its order, all clients get all events in the same order,
// and each once, however often a client has subscribed.
func TestOrder(t *testing.T) {
	t.Parallel()
	const senders, events = 4, 40
	s := loggedServer(t)
	var all []*testClient
	for i, lines := range []string{asDesktop, asBrowser, asDesktop} {
		c := connect(t, s.addr, lines)
		c.nc.(*net.TCPConn).SetReadBuffer(64 << 10) // so that most events wait in the server
		for range i + 1 {
			c.subscribed(repoA, "alice@example.com")
		}
		all = append(all, c)
	}
	var wg sync.WaitGroup
	for i := range senders {
		wg.Go(func() {
			for n := range events {
				path := fmt.Sprintf("/%d/%d/%s", i, n, strings.Repeat("x", 3800))
				s.post(lockPosted(repoA, path), len(all))
			}
		})
	}
	wg.Wait()
	var first []string
	for i, c := range all {
		var got []string
		next := [senders]int{}
		for range senders * events {
			opcode, text, err := c.next()
			var m struct{ Content struct{ Path string } }
			var sender, n int
			if err != nil || opcode != opText || json.Unmarshal(text, &m) != nil {
				t.Fatalf("client %d: frame %d %.100q, %v", i, opcode, text, err)
			}
			fmt.Sscanf(m.Content.Path, "/%d/%d", &sender, &n)
			if next[sender] != n {
				t.Fatalf("client %d: event %d of sender %d came in place of %d", i, n, sender, next[sender])
			}
			next[sender]++
			got = append(got, m.Content.Path)
		}
		c.sync()
		if first == nil {
			first = got
		}
		if !slices.Equal(got, first) {
			t.Errorf("client %d got another order than the first", i)
		}
	}
}

// Each client gets the events of the libraries that it has subscribed to, as the user of
// that subscription, and no others.
func TestSubscriptions(t *testing.T) {
	t.Parallel()
	perm := permEvent("user", "alice@example.com", "-1")
	for _, c := range []struct {
		name string
		do   func(t *testing.T, s *testServer, c *testClient)
	}{
		{"one library is not another", func(t *testing.T, s *testServer, c *testClient) {
			c.subscribed(repoA, "alice@example.com")
			s.post(update(repoB, "1"), 0)
			s.post(update(repoA, "2"), 1)
			c.expectTexts(update(repoA, "2"))
		}},
		{"several in one message", func(t *testing.T, s *testServer, c *testClient) {
			c.text(fmt.Sprintf(`{"type":"subscribe","content":{"repos":[{"id":%q,"jwt_token":%q},{"id":%q,"jwt_token":%q}]}}`,
				repoA, s.clientToken(repoA, "alice@example.com", time.Hour), repoB, s.clientToken(repoB, "alice@example.com", time.Hour)))
			c.sync()
			s.post(update(repoB, "1"), 1)
			s.post(update(repoA, "2"), 1)
			c.expectTexts(update(repoB, "1"), update(repoA, "2"))
		}},
		{"a bad token among good ones", func(t *testing.T, s *testServer, c *testClient) {
			bad := "bad \"library\"\n<é>"
			c.text(fmt.Sprintf(`{"type":"subscribe","content":{"repos":[{"id":%q,"jwt_token":%q},{"id":%q,"jwt_token":"x"},{"id":"no-token"},{"id":%q,"jwt_token":%q}]}}`,
				repoA, s.clientToken(repoA, "alice@example.com", time.Hour), bad, repoB, s.clientToken(repoB, "alice@example.com", time.Hour)))
			_, text, err := c.next()
			var m struct {
				Type    string            `json:"type"`
				Content map[string]string `json:"content"`
			}
			if err != nil || json.Unmarshal(text, &m) != nil || m.Type != "jwt-expired" ||
				!reflect.DeepEqual(m.Content, map[string]string{"repo_id": bad}) {
				t.Errorf("got %q, %v", text, err)
			}
			c.expectTexts(expiredText("no-token"))
			c.sync()
			s.post(update(repoA, "1"), 1)
			s.post(update(repoB, "2"), 1)
			c.expectTexts(update(repoA, "1"), update(repoB, "2"))
		}},
		{"a bad token does not end what is", func(t *testing.T, s *testServer, c *testClient) {
			c.subscribed(repoA, "alice@example.com")
			c.subscribe(repoA, "x.y.z")
			c.expectTexts(expiredText(repoA))
			s.post(update(repoA, "1"), 1)
			c.expectTexts(update(repoA, "1"))
		}},
		{"unsubscribe", func(t *testing.T, s *testServer, c *testClient) {
			c.subscribed(repoA, "alice@example.com").subscribed(repoB, "alice@example.com")
			c.text(`{"type":"unsubscribe","content":{"repos":[{"id":"` + repoA + `"},{"id":"never subscribed"}]}}`)
			c.unsubscribe("never subscribed")
			c.text(`{"type":"unsubscribe","content":{"repos":[]}}`)
			c.sync()
			s.post(lockEvent(repoA, 1), 0)
			s.post(lockEvent(repoB, 2), 1)
			c.expectTexts(lockEvent(repoB, 2))
			c.unsubscribe(repoA) // twice
			c.subscribed(repoA, "alice@example.com")
			s.post(lockEvent(repoA, 3), 1)
			c.expectTexts(lockEvent(repoA, 3))
		}},
		{"a client that left", func(t *testing.T, s *testServer, c *testClient) {
			c.subscribed(repoA, "alice@example.com")
			connect(t, s.addr, asDesktop).subscribed(repoA, "bob@example.com").nc.Close()
			s.waitFigure("subscriptions", 1)
			s.post(update(repoA, "1"), 1)
			c.expectTexts(update(repoA, "1"))
		}},
		{"subscribing again replaces the user", func(t *testing.T, s *testServer, c *testClient) {
			c.subscribed(repoA, "bob@example.com")
			s.post(perm, 0)
			c.subscribed(repoA, "alice@example.com")
			s.post(perm, 1)
			c.expectTexts(perm)
			c.subscribed(repoA, "bob@example.com")
			s.post(perm, 0)
		}},
		{"two accounts on one connection", func(t *testing.T, s *testServer, c *testClient) {
			c.subscribed(repoA, "alice@example.com").subscribed(repoB, "bob@example.com")
			s.post(perm, 1)
			c.expectTexts(perm)
			s.post(permChange(repoB, "add", "user", "alice@example.com", "-1"), 0)
			s.post(permChange(repoB, "add", "user", "bob@example.com", "-1"), 1)
			c.expectTexts(permChange(repoB, "add", "user", "bob@example.com", "-1"))
		}},
		{"a permission of a user is for that user", func(t *testing.T, s *testServer, c *testClient) {
			c.subscribed(repoA, "alice@example.com")
			bob := connect(t, s.addr, asBrowser).subscribed(repoA, "bob@example.com")
			nearly := connect(t, s.addr, asBrowser).subscribed(repoA, "Alice@example.com")
			s.post(perm, 1)
			c.expectTexts(perm)
			s.post(update(repoA, "1"), 3)
			for _, c := range []*testClient{c, bob, nearly} {
				c.expectTexts(update(repoA, "1"))
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := loggedServer(t)
			cl := connect(t, s.addr, asDesktop)
			c.do(t, s, cl)
			cl.sync() // nothing else came
		})
	}
}

// A library without subscribers leaves nothing, whatever ended the subscriptions.
func TestNothingKept(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	has := func(libraries, subscriptions float64) {
		t.Helper()
		s.waitFigure("subscriptions", subscriptions)
		s.waitFigure("libraries", libraries)
	}
	a, b := connect(t, s.addr, asDesktop), connect(t, s.addr, asBrowser)
	a.subscribed(repoA, "alice@example.com").subscribed(repoB, "alice@example.com").subscribed(repoB, "bob@example.com")
	b.subscribed(repoB, "bob@example.com")
	has(2, 3)
	a.unsubscribe(repoA)
	has(1, 2)
	a.nc.Close()
	has(1, 1)
	s.post(update(repoA, "1"), 0) // nor does an event leave one
	has(1, 1)
	b.subscribe(repoA, "x.y.z")
	b.expectTexts(expiredText(repoA))
	has(1, 1)
	b.text(`{"type":"unsubscribe","content":{"repos":[{"id":"` + repoB + `"},{"id":"x"}]}}`)
	has(0, 0)
	b.subscribe(repoA, s.clientToken(repoA, "bob@example.com", 2*time.Second))
	b.sync()
	s.advance(2 * time.Second)
	b.expectTexts(expiredText(repoA))
	has(1, 1) // for a renewal
	for range 17 {
		s.advance(10 * time.Second)
		b.untilPong()
	}
	has(1, 1) // for a late one
	s.advance(11 * time.Second)
	if reason := b.expectClose(statusPolicy); !strings.Contains(reason, "no subscription") {
		t.Errorf("closed with the reason %q", reason)
	}
	has(0, 0)
}

// A client that reads late, but reads, gets the newest update of each library, and all
// that does not go out of date, and is not dropped.
func TestNewestUpdateReplacesTheWaiting(t *testing.T) {
	t.Parallel()
	for _, lines := range []string{asDesktop, asBrowser} {
		t.Run(lines[:15], func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			late := connect(t, s.addr, lines).subscribed(repoA, "late@example.com").subscribed(repoB, "late@example.com")
			const updates, locks = 1000, 20 // more than 1,024 messages and 1 MiB, if all were kept
			padding := strings.Repeat("c", 900)
			for n := range updates {
				s.post(update(repoA, fmt.Sprintf("%06d%s", n, padding)), 1)
				s.post(update(repoB, fmt.Sprintf("%06d%s", n, padding)), 1)
				if n%(updates/locks) == 0 {
					s.post(numbered(repoA, n/(updates/locks), 2000), 1)
				}
			}
			newest, lock, frames := map[string]int{repoA: -1, repoB: -1}, 0, 0
			for ; newest[repoA] < updates-1 || newest[repoB] < updates-1 || lock < locks; frames++ {
				opcode, payload, err := late.next()
				var m struct {
					Content struct{ Repo_ID, Commit_ID string }
				}
				if err != nil || opcode != opText || json.Unmarshal(payload, &m) != nil {
					t.Fatalf("after %d frames: frame %d %.200q, %v; so far %v, %d locks", frames, opcode, payload, err, newest, lock)
				}
				if got := numberOf(payload); got >= 0 {
					if got != lock {
						t.Fatalf("lock %d came where %d was due", got, lock)
					}
					lock++
					continue
				}
				n, err := strconv.Atoi(m.Content.Commit_ID[:6])
				if err != nil || n <= newest[m.Content.Repo_ID] {
					t.Fatalf("update %d came after %d", n, newest[m.Content.Repo_ID])
				}
				newest[m.Content.Repo_ID] = n
			}
			if frames > updates {
				t.Errorf("%d of %d updates came, so none was replaced", frames, 2*updates)
			}
			s.post(update(repoA, "last"), 1)
			late.expectTexts(update(repoA, "last"))
		})
	}
}

// ---- Tests of second tellings ----

// A watcher looks at what a client got, at each step of run.
type watcher interface{ look(uptime time.Duration) }

// run lets time pass in steps of 100 ms, as the main loop does. After each step the
// watchers look. Actions are done at their time from the beginning.
func (ts *testServer) run(d time.Duration, actions []action, watchers ...watcher) {
	ts.t.Helper()
	begin := ts.clock.uptime()
	for after := time.Duration(0); ; after += 100 * time.Millisecond {
		for len(actions) > 0 && actions[0].at <= after {
			actions[0].do()
			actions = actions[1:]
		}
		for _, w := range watchers {
			w.look(begin + after)
		}
		if after >= d {
			return
		}
		ts.advance(100 * time.Millisecond)
	}
}

type action struct {
	at time.Duration
	do func()
}

// A recorder is a client that notes what it gets, and when.
type recorder struct {
	*testClient
	begin time.Duration
	got   []string // "seconds text"
}

func record(s *testServer, c *testClient) *recorder {
	return &recorder{testClient: c, begin: s.clock.uptime()}
}

func (r *recorder) look(uptime time.Duration) {
	r.t.Helper()
	for _, text := range r.untilPong() {
		r.got = append(r.got, told(uptime-r.begin, text))
	}
}

// told is how a recorder notes a text.
func told(after time.Duration, text string) string {
	return fmt.Sprintf("%.1f %s", after.Seconds(), text)
}

// Each update is told to desktop clients a second time after 2.5 s, unless a newer one
// came; to browsers, and every other event to all, once.
func TestUpdatesAreToldTwice(t *testing.T) {
	t.Parallel()
	type posted struct {
		at   float64 // seconds
		text string
	}
	u := func(commit string) string { return update(repoA, commit) }
	lock, comment := lockEvent(repoA, 1), commentEvent(repoA)
	perm := permEvent("user", "alice@example.com", "-1")
	for _, tc := range []struct {
		name   string
		posted []posted
		again  []posted // to the desktop client, besides what is posted
	}{
		{"a lone one", []posted{{0, u("1")}}, []posted{{2.5, u("1")}}},
		{"a newer one comes before that", []posted{{0, u("1")}, {2.4, u("2")}}, []posted{{4.9, u("2")}}},
		{"a newer one comes after that", []posted{{0, u("1")}, {2.6, u("2")}}, []posted{{2.5, u("1")}, {5.1, u("2")}}},
		{"one after the other", []posted{{0, u("1")}, {1, u("2")}, {2, u("3")}, {3, u("4")}}, []posted{{5.5, u("4")}}},
		{"the same commit anew", []posted{{0, u("1")}, {10, u("1")}}, []posted{{2.5, u("1")}, {12.5, u("1")}}},
		{"two libraries", []posted{{0, u("1")}, {1, update(repoB, "2")}}, []posted{{2.5, u("1")}, {3.5, update(repoB, "2")}}},
		{"other events are told once, and change nothing",
			[]posted{{0, u("1")}, {0.5, lock}, {1, comment}, {1.5, perm}}, []posted{{2.5, u("1")}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			subscribed := func(lines string) *recorder {
				c := connect(t, s.addr, lines).subscribed(repoA, "alice@example.com").subscribed(repoB, "alice@example.com")
				return record(s, c)
			}
			desktop, browser := subscribed(asDesktop), subscribed(asBrowser)
			seconds := func(p posted) time.Duration { return time.Duration(p.at*10) * 100 * time.Millisecond }
			var actions []action
			var once, twice []string
			for _, p := range tc.posted {
				actions = append(actions, action{seconds(p), func() { s.post(p.text, 2) }})
				once = append(once, told(seconds(p), p.text))
			}
			twice = slices.Clone(once)
			for _, p := range tc.again {
				twice = append(twice, told(seconds(p), p.text))
			}
			s.run(30*time.Second, actions, desktop, browser)
			slices.SortStableFunc(twice, func(a, b string) int {
				var x, y float64
				fmt.Sscan(a, &x)
				fmt.Sscan(b, &y)
				return int(10 * (x - y))
			})
			if !slices.Equal(desktop.got, twice) {
				t.Errorf("the desktop client got %q, want %q", desktop.got, twice)
			}
			if !slices.Equal(browser.got, once) {
				t.Errorf("the browser got %q, want %q", browser.got, once)
			}
		})
	}
}

// The newest update of a library is remembered for 90 s, whether anybody was there or not,
// and told to a new desktop subscription, and again 2.5 s later.
func TestNewestUpdateIsRemembered(t *testing.T) {
	t.Parallel()
	const sec = time.Second
	u := func(commit string) string { return update(repoA, commit) }
	for _, tc := range []struct {
		name string
		do   func(s *testServer, c *recorder)
		want []string // what the client gets
	}{
		{"at once", func(s *testServer, c *recorder) {
			s.accept(u("1"))
			c.subscribe(repoA, s.clientToken(repoA, "a", time.Hour))
			s.run(10*sec, nil, c)
		}, []string{told(0, u("1")), told(2500*time.Millisecond, u("1"))}},
		{"after the 60 s that a client is away", func(s *testServer, c *recorder) {
			s.run(60*sec, []action{{0, func() { s.accept(u("1")) }}}, c)
			c.subscribe(repoA, s.clientToken(repoA, "a", time.Hour))
			s.run(10*sec, nil, c)
		}, []string{told(60*sec, u("1")), told(62500*time.Millisecond, u("1"))}},
		{"just before 90 s", func(s *testServer, c *recorder) {
			s.run(89*sec, []action{{0, func() { s.accept(u("1")) }}}, c)
			c.subscribe(repoA, s.clientToken(repoA, "a", time.Hour))
			s.run(10*sec, nil, c)
		}, []string{told(89*sec, u("1")), told(91500*time.Millisecond, u("1"))}},
		{"not after 90 s", func(s *testServer, c *recorder) {
			s.run(91*sec, []action{{0, func() { s.accept(u("1")) }}}, c)
			c.subscribe(repoA, s.clientToken(repoA, "a", time.Hour))
			s.run(10*sec, nil, c)
		}, nil},
		{"the newest alone, and no other event", func(s *testServer, c *recorder) {
			s.accept(u("1"))
			s.accept(u("2"))
			s.accept(update(repoB, "3"))
			s.accept(lockEvent(repoA, 1))
			c.subscribe(repoA, s.clientToken(repoA, "a", time.Hour))
			s.run(10*sec, nil, c)
		}, []string{told(0, u("2")), told(2500*time.Millisecond, u("2"))}},
		{"a newer one comes before the second time", func(s *testServer, c *recorder) {
			s.accept(u("1"))
			s.run(5*sec, nil, c)
			c.subscribe(repoA, s.clientToken(repoA, "a", time.Hour))
			s.run(10*sec, []action{{sec, func() { s.accept(u("2")) }}}, c)
		}, []string{told(5*sec, u("1")), told(6*sec, u("2")), told(8500*time.Millisecond, u("2"))}},
		{"not with a token that does not hold", func(s *testServer, c *recorder) {
			s.accept(u("1"))
			c.subscribe(repoA, s.clientToken(repoB, "a", time.Hour))
			s.run(10*sec, nil, c)
		}, []string{told(0, expiredText(repoA))}},
		{"not again to who subscribes again", func(s *testServer, c *recorder) {
			s.accept(u("1"))
			c.subscribe(repoA, s.clientToken(repoA, "a", time.Hour))
			c.subscribe(repoA, s.clientToken(repoA, "a", time.Hour))
			s.run(5*sec, nil, c)
			c.subscribe(repoA, s.clientToken(repoA, "a", time.Hour))
			s.run(5*sec, nil, c)
		}, []string{told(0, u("1")), told(2500*time.Millisecond, u("1"))}},
		{"to who unsubscribed meanwhile", func(s *testServer, c *recorder) {
			s.accept(u("1"))
			c.subscribe(repoA, s.clientToken(repoA, "a", time.Hour))
			c.unsubscribe(repoA)
			s.run(5*sec, nil, c)
			c.subscribe(repoA, s.clientToken(repoA, "a", time.Hour))
			s.run(5*sec, nil, c)
		}, []string{told(0, u("1")), told(5*sec, u("1")), told(7500*time.Millisecond, u("1"))}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			c := record(s, connect(t, s.addr, asDesktop))
			tc.do(s, c)
			c.got = slices.Compact(c.got) // twice at the same time does no harm
			if !slices.Equal(c.got, tc.want) {
				t.Errorf("the client got %q, want %q", c.got, tc.want)
			}
		})
	}
	t.Run("not to browsers", func(t *testing.T) {
		t.Parallel()
		s := startServer(t)
		s.accept(u("1"))
		c := record(s, connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com"))
		s.run(5*sec, nil, c)
		if len(c.got) > 0 {
			t.Errorf("the browser got %q", c.got)
		}
	})
	t.Run("not one that no desktop client reads", func(t *testing.T) {
		t.Parallel()
		s := startServer(t)
		ofSize := func(size int) string { return update(repoA, strings.Repeat("c", size-len(update(repoA, "")))) }
		s.accept(u("1"))
		s.accept(ofSize(4097)) // nor what is older than it
		if n := s.figures()["remembered_updates"]; n != 0 {
			t.Errorf("%v updates are remembered", n)
		}
		s.hub.mu.Lock()
		if n := len(s.hub.libraries); n != 0 {
			t.Errorf("%d libraries are kept, of which nobody needs one", n)
		}
		s.hub.mu.Unlock()
		c := record(s, connect(t, s.addr, asDesktop))
		c.subscribe(repoA, s.clientToken(repoA, "a", time.Hour))
		s.run(5*sec, nil, c)
		c.unsubscribe(repoA)
		c.sync()
		s.accept(ofSize(4096))
		c.subscribe(repoA, s.clientToken(repoA, "a", time.Hour))
		c.expectTexts(ofSize(4096))
		if len(c.got) > 0 {
			t.Errorf("an update of 4,097 bytes was remembered: the client got %.200q", c.got)
		}
	})
	t.Run("to one who was there, and left, and to one who was not", func(t *testing.T) {
		t.Parallel()
		s := startServer(t)
		first := connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com")
		s.post(u("1"), 1)
		first.expectTexts(u("1"))
		first.nc.Close()
		s.waitFigure("connections", 0)
		for _, user := range []string{"alice@example.com", "bob@example.com"} {
			c := connect(t, s.addr, asDesktop)
			c.subscribe(repoA, s.clientToken(repoA, user, time.Hour))
			c.expectTexts(u("1"))
			c.sync()
		}
	})
}

// At most 100,000 updates are remembered; the oldest go first.
func TestRememberedUpdatesAreBounded(t *testing.T) {
	t.Parallel()
	const most = 100_000
	s := startServer(t)
	s.log.setLevel(8) // errors alone
	repo := func(i int) string { return fmt.Sprintf("5f1c8d0e-0000-4000-8000-%012d", i) }
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	for i := range most + 1 {
		s.handle(update(repo(i), "7920509ee42fa792aec26c44588b6f65371084fa"))
	}
	t.Logf("%d remembered updates take about %d MiB", most, (heap()-before)>>20)
	c := connect(t, s.addr, asDesktop)
	for _, i := range []int{0, 1, 2, most / 2, most} {
		c.subscribe(repo(i), s.clientToken(repo(i), "alice@example.com", time.Hour))
		if i > 0 {
			c.expectTexts(update(repo(i), "7920509ee42fa792aec26c44588b6f65371084fa"))
		}
		c.sync()
	}
}

// For 200 libraries with an update to be told again, the real binary holds not one
// goroutine more; and it tells them by itself.
func TestSecondTellingHoldsNoGoroutine(t *testing.T) {
	t.Parallel()
	s := startMetered(t, 0)
	const libraries = 200
	clients := make([]*testClient, libraries)
	repo := func(i int) string { return fmt.Sprintf("5f1c8d0e-0000-4000-8000-%012d", i) }
	for i := range clients {
		clients[i] = connect(t, s.addr, asDesktop).subscribed(repo(i), "alice@example.com")
	}
	var before float64
	waitFor(t, "the goroutines that upgraded the clients end", func() bool {
		before = s.footprint().goroutines
		return before < libraries+20
	})
	for i, c := range clients {
		post(t, s.addr, update(repo(i), "1"), 1)
		c.expectTexts(update(repo(i), "1"))
	}
	posted := time.Now()
	if during := s.footprint().goroutines; during > before+10 {
		t.Errorf("%.0f goroutines before %d updates are to be told again, %.0f while they are", before, libraries, during)
	}
	for i, c := range clients {
		c.expectTexts(update(repo(i), "1"))
	}
	if took := time.Since(posted); took < 2400*time.Millisecond {
		t.Errorf("the last one was told again %v after it was posted, want 2.5 s", took)
	}
}

// ---- Tests of a token's end ----

// A client is told jwt-expired 10 s before its token runs out, and once more 20 s later if it
// has not renewed it; from the token's end on it gets nothing.
func TestTokenEnds(t *testing.T) {
	t.Parallel()
	const sec = time.Second
	e := func(n int) string { return lockEvent(repoA, n) }
	for _, tc := range []struct {
		name    string
		tokens  []time.Duration // that it subscribes with, at the beginning
		actions func(s *testServer, c *recorder) []action
		want    []string
	}{
		{"told early, and once more", []time.Duration{100 * sec},
			func(s *testServer, c *recorder) []action {
				return []action{
					{89 * sec, func() { s.post(e(1), 1) }},
					{99 * sec, func() { s.post(e(2), 1) }},
					{100 * sec, func() { s.post(e(3), 0) }},
				}
			},
			[]string{told(89*sec, e(1)), told(90*sec, expiredText(repoA)), told(99*sec, e(2)), told(110*sec, expiredText(repoA))}},
		{"a token that lives for less than a minute is told at the end", []time.Duration{10 * sec},
			func(s *testServer, c *recorder) []action {
				return []action{{9 * sec, func() { s.post(e(1), 1) }}}
			},
			[]string{told(9*sec, e(1)), told(10*sec, expiredText(repoA)), told(30*sec, expiredText(repoA))}},
		{"a later one replaces it", []time.Duration{10 * sec, 300 * sec},
			func(s *testServer, c *recorder) []action {
				return []action{{20 * sec, func() { s.post(e(1), 1) }}}
			},
			[]string{told(20*sec, e(1))}},
		{"so does an earlier one", []time.Duration{300 * sec, 10 * sec},
			func(s *testServer, c *recorder) []action {
				return []action{{9 * sec, func() { s.post(e(1), 1) }}, {10 * sec, func() { s.post(e(2), 0) }}}
			},
			[]string{told(9*sec, e(1)), told(10*sec, expiredText(repoA)), told(30*sec, expiredText(repoA))}},
		{"renewed in time, it is told when that one ends", []time.Duration{100 * sec},
			func(s *testServer, c *recorder) []action {
				renew := func() { c.subscribe(repoA, s.clientToken(repoA, "alice@example.com", 100*sec)) }
				return []action{{92 * sec, renew}, {110 * sec, func() { s.post(e(1), 1) }}}
			},
			[]string{told(90*sec, expiredText(repoA)), told(110*sec, e(1)), told(182*sec, expiredText(repoA))}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := loggedServer(t)
			c := record(s, connect(t, s.addr, asDesktop).subscribed(repoB, "alice@example.com"))
			for _, d := range tc.tokens {
				c.subscribe(repoA, s.clientToken(repoA, "alice@example.com", d))
			}
			c.sync()
			s.run(200*sec, tc.actions(s, c), c)
			if !slices.Equal(c.got, tc.want) {
				t.Errorf("the client got %q, want %q", c.got, tc.want)
			}
			s.post(lockEvent(repoB, 1), 1) // another subscription goes on
			c.expectTexts(lockEvent(repoB, 1))
		})
	}
	t.Run("no event after the end, before any tick", func(t *testing.T) {
		t.Parallel()
		s := loggedServer(t)
		c := connect(t, s.addr, asDesktop)
		c.subscribe(repoA, s.clientToken(repoA, "alice@example.com", 10*sec))
		c.sync()
		s.time.move(9999*time.Millisecond, 9999*time.Millisecond)
		s.post(e(1), 1)
		c.expectTexts(e(1))
		s.time.move(time.Millisecond, time.Millisecond)
		s.post(e(2), 0)
		c.sync()
	})
}

// When more tokens end at once than an outbox holds, all are told, some at a time.
func TestManyTokensEndAtOnce(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	c := connect(t, s.addr, asDesktop)
	const n = 1124
	var repos []string
	for i := range n {
		id := fmt.Sprint("library", i)
		repos = append(repos, fmt.Sprintf(`{"id":%q,"jwt_token":%q}`, id, s.clientToken(id, "a", 30*time.Second)))
	}
	c.subscribed(repoA, "alice@example.com") // before that a message is short
	c.text(`{"type":"subscribe","content":{"repos":[` + strings.Join(repos, ",") + `]}}`)
	c.sync()
	s.waitFigure("subscriptions", n+1)
	told := map[string]bool{}
	s.jump(30*time.Second, 0)
	for rounds := 0; len(told) < n; rounds++ {
		if rounds == 30 {
			t.Fatalf("%d of %d were told within 30 s", len(told), n)
		}
		for _, text := range c.untilPong() {
			if told[text] {
				t.Fatalf("%q came twice", text)
			}
			told[text] = true
		}
		s.advance(time.Second)
	}
}

// Between jwt-expired and its new subscription a desktop client ignores all events of that
// library, so they are told again when it subscribes anew on the same connection.
func TestRenewalMissesNothing(t *testing.T) {
	t.Parallel()
	const sec = time.Second
	// The token ends at 100 s, and jwt-expired is told at 90 s.
	e := func(n int) string { return lockEvent(repoA, n) }
	expired := []string{told(90*sec, expiredText(repoA)), told(110*sec, expiredText(repoA))}
	perm, group := permEvent("user", "alice@example.com", "-1"), permEvent("group", "", "1")
	renew := func(s *testServer, c *recorder) func() {
		return func() { c.subscribe(repoA, s.clientToken(repoA, "alice@example.com", time.Hour)) }
	}
	for _, tc := range []struct {
		name    string
		actions func(s *testServer, c *recorder) []action
		want    []string
	}{
		{"events of every type", func(s *testServer, c *recorder) []action {
			return []action{
				{89 * sec, func() { s.post(e(0), 1) }},
				{90500 * time.Millisecond, func() { s.post(e(1), 1) }},
				{90600 * time.Millisecond, func() { s.post(update(repoA, "1"), 1) }},
				{90700 * time.Millisecond, func() { s.post(perm, 1) }},
				{90800 * time.Millisecond, func() { s.post(permEvent("user", "bob@example.com", "-1"), 0) }},
				{90900 * time.Millisecond, func() { s.post(commentEvent(repoA), 1) }},
				{91 * sec, func() { s.accept(group); s.waitFigure(`group_lookups_total{result="ok"}`, 1) }},
				{92 * sec, renew(s, c)},
				{98 * sec, func() { s.post(e(2), 1) }},
			}
		}, []string{
			told(89*sec, e(0)), expired[0],
			told(90500*time.Millisecond, e(1)), told(90600*time.Millisecond, update(repoA, "1")),
			told(90700*time.Millisecond, perm), told(90900*time.Millisecond, commentEvent(repoA)), told(91*sec, group),
			told(92*sec, e(1)), told(92*sec, update(repoA, "1")), told(92*sec, perm), told(92*sec, commentEvent(repoA)), told(92*sec, group),
			told(93100*time.Millisecond, update(repoA, "1")), // 2.5 s after it was accepted
			told(94500*time.Millisecond, update(repoA, "1")), // 2.5 s after the subscription
			told(98*sec, e(2)),
		}},
		{"what came after the end is not sent until then", func(s *testServer, c *recorder) []action {
			return []action{
				{95 * sec, func() { s.post(e(1), 1) }},
				{101 * sec, func() { s.post(e(2), 0) }},
				{110 * sec, func() { s.post(e(3), 0) }},
				{159 * sec, renew(s, c)},
				{160 * sec, func() { s.post(e(4), 1) }},
			}
		}, []string{expired[0], told(95*sec, e(1)), expired[1], told(159*sec, e(1)), told(159*sec, e(2)), told(159*sec, e(3)), told(160*sec, e(4))}},
		{"60 s after the end the subscription is forgotten", func(s *testServer, c *recorder) []action {
			return []action{
				{99 * sec, func() { s.post(e(1), 1) }},
				{162 * sec, func() { s.post(e(2), 0) }},
			}
		}, []string{told(90*sec, expiredText(repoA)), told(99*sec, e(1)), expired[1]}},
		{"who missed nothing may renew at any time", func(s *testServer, c *recorder) []action {
			return []action{
				{162 * sec, renew(s, c)},
				{163 * sec, func() { s.post(e(2), 1) }},
			}
		}, []string{expired[0], expired[1], told(163*sec, e(2))}},
		{"a token that does not outlive is answered at once, and loses nothing", func(s *testServer, c *recorder) []action {
			same, earlier := s.clientToken(repoA, "alice@example.com", 100*sec), s.clientToken(repoA, "alice@example.com", 99*sec)
			return []action{
				{91 * sec, func() { s.post(e(1), 1) }},
				{92 * sec, func() { c.subscribe(repoA, same) }},
				{93 * sec, func() { c.subscribe(repoA, earlier) }},
				{94 * sec, renew(s, c)},
			}
		}, []string{expired[0], told(91*sec, e(1)), told(92*sec, expiredText(repoA)), told(93*sec, expiredText(repoA)), told(94*sec, e(1))}},
		{"a refused token, too, makes the client ignore what comes until it subscribes anew", func(s *testServer, c *recorder) []action {
			old := s.clientToken(repoA, "alice@example.com", -time.Hour)
			earlier := func() { c.subscribe(repoA, s.clientToken(repoA, "alice@example.com", 80*sec)) }
			return []action{
				{10 * sec, func() { c.subscribe(repoA, old) }},
				{11 * sec, func() { s.post(e(1), 1) }},
				{12 * sec, func() { c.subscribe(repoA, "x.y.z") }},
				{13 * sec, func() { s.post(e(2), 1) }},
				{14 * sec, earlier}, // it ends at 94 s
				{15 * sec, func() { s.post(e(3), 1) }},
				{86 * sec, renew(s, c)},
			}
		}, []string{
			told(10*sec, expiredText(repoA)), told(11*sec, e(1)), told(12*sec, expiredText(repoA)), told(13*sec, e(2)),
			told(14*sec, e(1)), told(14*sec, e(2)), told(15*sec, e(3)), told(84*sec, expiredText(repoA)),
		}},
		{"who unsubscribed is told nothing", func(s *testServer, c *recorder) []action {
			return []action{
				{91 * sec, func() { s.post(e(1), 1) }},
				{92 * sec, func() { c.unsubscribe(repoA) }},
				{93 * sec, renew(s, c)},
			}
		}, []string{expired[0], told(91*sec, e(1))}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := loggedServer(t)
			startSeafServer(t, filepath.Join(s.dir, "seafile.sock"), membersReply("alice@example.com"))
			c := record(s, connect(t, s.addr, asDesktop))
			c.subscribe(repoA, s.clientToken(repoA, "alice@example.com", 100*sec))
			c.sync()
			s.run(170*sec, tc.actions(s, c), c)
			if !slices.Equal(c.got, tc.want) {
				t.Errorf("the client got\n%s\nwant\n%s", strings.Join(c.got, "\n"), strings.Join(tc.want, "\n"))
			}
		})
	}
	for _, tc := range []struct {
		name string
		at   time.Duration // of the event; the subscription is given up at 160 s
	}{
		{"told and ignored", 95 * sec}, {"kept", 101 * sec}, {"not kept", 165 * sec},
	} {
		t.Run("who missed something is closed at a late renewal: "+tc.name, func(t *testing.T) {
			t.Parallel()
			s := loggedServer(t)
			c := record(s, connect(t, s.addr, asDesktop))
			c.subscribe(repoA, s.clientToken(repoA, "alice@example.com", 100*sec))
			c.sync()
			s.run(170*sec, []action{{tc.at, func() { s.accept(e(1)) }}}, c)
			renew(s, c)()
			if reason := c.expectClose(statusRestart); !strings.Contains(reason, "too late") {
				t.Errorf("closed with the reason %q", reason)
			}
		})
	}
	t.Run("a library that was given up closes nobody", func(t *testing.T) {
		t.Parallel()
		s := loggedServer(t) // without a seafile.sock
		c := record(s, connect(t, s.addr, asDesktop).subscribed(repoB, "alice@example.com"))
		c.subscribe(repoA, s.clientToken(repoA, "alice@example.com", 100*sec))
		c.sync()
		s.run(165*sec, nil, c)
		s.accept(group)
		s.waitFigure(`group_lookups_total{result="failed"}`, 1)
		s.post(lockEvent(repoB, 1), 1)
		c.expectTexts(lockEvent(repoB, 1))
		renew(s, c)()
		c.expectClose(statusRestart)
	})
	t.Run("the clock jumps over the end", func(t *testing.T) {
		t.Parallel()
		for _, lines := range []string{asDesktop, asBrowser} {
			s := loggedServer(t)
			c := connect(t, s.addr, lines)
			c.subscribe(repoA, s.clientToken(repoA, "alice@example.com", 30*time.Minute))
			c.sync()
			s.time.move(time.Hour, 0)
			s.post(e(1), 0) // before the server has noticed
			s.tick()
			c.expectTexts(expiredText(repoA))
			s.post(e(2), 0)
			c.sync()
			c.subscribe(repoA, s.clientToken(repoA, "alice@example.com", time.Hour))
			c.expectTexts(e(1), e(2))
			s.post(e(3), 1)
			c.expectTexts(e(3))
			c.sync()
		}
	})
}

// What is kept for a renewal is bounded like an outbox; if more came, the connection is
// closed with 1012 at the renewal, and not before.
func TestRenewalOverflow(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name         string
		events, size int
		overflows    bool
	}{
		{"1,000 messages", 1000, 0, false},
		{"1,100 messages", 1100, 0, true},
		{"nearly 1 MiB", 255, 4096, false},
		{"more than 1 MiB", 300, 4096, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			c := connect(t, s.addr, asDesktop)
			c.subscribe(repoA, s.clientToken(repoA, "alice@example.com", 30*time.Second))
			c.subscribed(repoB, "alice@example.com")
			s.jump(30*time.Second, 0)
			c.expectTexts(expiredText(repoA))
			for n := range tc.events {
				s.post(numbered(repoA, n, tc.size), 0)
			}
			s.post(lockEvent(repoB, 1), 1)
			c.expectTexts(lockEvent(repoB, 1))
			c.sync()
			c.subscribe(repoA, s.clientToken(repoA, "alice@example.com", time.Hour))
			if tc.overflows {
				c.expectClose(statusRestart)
				return
			}
			c.ping("end")
			if n, opcode, payload, err := c.readNumbered(); n != tc.events || opcode != opPong {
				t.Errorf("%d of %d events were told, then came frame %d %q, %v", n, tc.events, opcode, payload, err)
			}
		})
	}
}

// ---- A client with the habits of the desktop client ----

// A desktop is a client with the habits of the real one (PROTOCOL.md, section 3). It lives
// in the time of a testServer.
type desktop struct {
	*testClient
	s         *testServer
	user      string
	lifetime  time.Duration            // of its tokens
	download  time.Duration            // how long one takes
	renewal   map[string]time.Duration // uptime at which it subscribes to a library anew
	begun     map[string]time.Duration // uptime at which the last download of a library began
	has       map[string]string        // the newest commit of each library that it heeds
	seen      map[string]bool          // all other events that it heeded
	forgotten int                      // updates
}

func startDesktop(s *testServer, lifetime, download time.Duration) *desktop {
	return &desktop{
		s: s, user: "alice@example.com", lifetime: lifetime, download: download,
		renewal: map[string]time.Duration{}, begun: map[string]time.Duration{},
		has: map[string]string{}, seen: map[string]bool{},
	}
}

// come connects and subscribes.
func (d *desktop) come(repos ...string) {
	d.s.t.Helper()
	d.testClient = connect(d.s.t, d.s.addr, asDesktop)
	clear(d.renewal)
	for _, repoID := range repos {
		d.subscribe(repoID, d.s.clientToken(repoID, d.user, d.lifetime))
	}
	d.heedAll()
}

// heedAll waits until the server has handled all, and heeds what comes meanwhile.
func (d *desktop) heedAll() { d.look(d.s.clock.uptime()) }

// look heeds what came, at this uptime.
func (d *desktop) look(uptime time.Duration) {
	if d.testClient == nil {
		return // it is away
	}
	for repoID, at := range d.renewal {
		if uptime >= at {
			delete(d.renewal, repoID)
			d.subscribe(repoID, d.s.clientToken(repoID, d.user, d.lifetime))
		}
	}
	for _, text := range d.untilPong() {
		d.heed(text, uptime)
	}
}

func (d *desktop) heed(text string, uptime time.Duration) {
	var m struct {
		Type    string
		Content struct {
			RepoID string `json:"repo_id"`
			Commit string `json:"commit_id"`
		}
	}
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		d.t.Fatalf("%q: %v", text, err)
	}
	repoID := m.Content.RepoID
	_, deaf := d.renewal[repoID]
	switch {
	case m.Type == "jwt-expired":
		if !deaf {
			d.renewal[repoID] = uptime + 1500*time.Millisecond
		}
	case deaf: // it ignores every event of a library that it renews
	case m.Type != "repo-update":
		d.seen[text] = true
	case m.Content.Commit == d.has[repoID]: // a repeat does no harm
	default:
		ended := d.begun[repoID] + d.download
		if since := uptime - ended; d.begun[repoID] > 0 && since >= time.Second && since < 1600*time.Millisecond {
			d.forgotten++ // it commits what it wrote itself
			return
		}
		d.has[repoID] = m.Content.Commit
		d.begun[repoID] = uptime
	}
}

// arrives posts an update and demands that the desktop client heeds it within 4 s.
func (d *desktop) arrives(repoID, commit string) {
	d.s.t.Helper()
	d.s.accept(update(repoID, commit))
	d.arrivesWithin(repoID, commit, 4*time.Second)
}

func (d *desktop) arrivesWithin(repoID, commit string, limit time.Duration) {
	d.s.t.Helper()
	for after := time.Duration(0); d.has[repoID] != commit; after += 100 * time.Millisecond {
		if after > limit {
			d.s.t.Fatalf("update %s is not heeded within %v", commit, limit)
		}
		d.s.run(100*time.Millisecond, nil, d)
	}
}

// An update is on a desktop client within 4 s, and no other event is missed, whatever the
// client's habits.
func TestDesktopHabits(t *testing.T) {
	t.Parallel()
	const sec = time.Second
	for _, download := range []time.Duration{100 * time.Millisecond, 2 * sec, 35 * sec} {
		t.Run(fmt.Sprintf("an update after a download of %v", download), func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			d := startDesktop(s, time.Hour, download)
			d.come(repoA)
			for after := download; after < download+3*sec; after += 200 * time.Millisecond {
				d.arrives(repoA, fmt.Sprintf("first %v", after))
				s.run(after, nil, d)
				d.arrives(repoA, fmt.Sprintf("second %v", after))
				s.run(download+5*sec, nil, d)
			}
			if d.forgotten == 0 {
				t.Error("the client has forgotten nothing: this test tests nothing")
			}
		})
	}
	t.Run("an update while the client is away for 60 s", func(t *testing.T) {
		t.Parallel()
		s := startServer(t)
		for away := time.Duration(0); away <= 60*sec; away += 5 * sec {
			d := startDesktop(s, time.Hour, sec)
			d.come(repoA)
			d.arrives(repoA, fmt.Sprint("before ", away))
			d.nc.Close()
			d.testClient = nil
			commit := fmt.Sprint("meanwhile ", away)
			s.run(60*sec, []action{{away, func() { s.accept(update(repoA, commit)) }}}, d)
			d.come(repoA)
			d.arrivesWithin(repoA, commit, 4*sec)
			d.nc.Close()
		}
	})
	t.Run("an update between the first sync and the subscription", func(t *testing.T) {
		t.Parallel()
		s := startServer(t)
		for gap := 1600 * time.Millisecond; gap <= 2600*time.Millisecond; gap += 100 * time.Millisecond {
			for after := time.Duration(0); after < gap; after += 400 * time.Millisecond {
				repoID := fmt.Sprint("library ", gap, after)
				d := startDesktop(s, time.Hour, sec)
				d.has[repoID], d.begun[repoID] = "first", s.clock.uptime()-sec // the sync has just ended
				s.run(gap, []action{{after, func() { s.accept(update(repoID, "second")) }}}, d)
				d.come(repoID)
				d.arrivesWithin(repoID, "second", 4*sec)
				d.nc.Close()
			}
		}
	})
	t.Run("events of every type around renewals", func(t *testing.T) {
		t.Parallel()
		s := startServer(t)
		d := startDesktop(s, 100*sec, 300*time.Millisecond)
		d.come(repoA, repoB)
		var posted []string
		for n := range 300 {
			for _, text := range []string{lockEvent(repoA, n), lockEvent(repoB, n)} {
				posted = append(posted, text)
				s.accept(text)
			}
			commit := fmt.Sprint(n)
			if n%9 == 0 {
				s.accept(update(repoA, commit))
			}
			s.run(700*time.Millisecond, nil, d)
			if n%9 == 6 && d.has[repoA] != fmt.Sprint(n-6) { // 4.9 s later
				t.Fatalf("the client has %s, not %d", d.has[repoA], n-6)
			}
		}
		s.run(5*sec, nil, d)
		for _, text := range posted {
			if !d.seen[text] {
				t.Errorf("the client missed %s", text)
			}
		}
	})
}

// ---- Tests of silence ----

// A silent client is pinged after 20 s and 40 s, and closed after 60 s.
func TestSilentClientIsPingedThenClosed(t *testing.T) {
	t.Parallel()
	for _, lines := range []string{asDesktop, asBrowser} {
		t.Run(lines[:15], func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			silent := connect(t, s.addr, lines).subscribed(repoA, "silent@example.com")
			for second := 1; second <= 60; second++ {
				s.advance(time.Second)
				switch second {
				case 20, 40:
					silent.expect(opPing, "")
				case 59:
					s.post(lockEvent(repoA, 1), 1)
					silent.expectTexts(lockEvent(repoA, 1)) // and no ping before it
				}
			}
			if reason := silent.expectClose(statusPolicy); reason != "no frame for 60 s" {
				t.Errorf("closed with the reason %q", reason)
			}
			s.waitFigure("connections", 0)
			s.waitFigure("subscriptions", 0)
			s.waitFigure(`closed_total{reason="silent"}`, 1)
		})
	}
}

// A client that is gone without a word does not even answer the close frame, and is let go.
func TestDeadClientIsLetGo(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	connect(t, s.addr, asDesktop).subscribed(repoA, "dead@example.com")
	s.advance(60 * time.Second)
	s.waitFigure("connections", 0)
	s.post(update(repoA, "1"), 0)
}

// Who sends any frame is not pinged; who answers pings stays for hours.
func TestTalkingClientIsNotPinged(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		every int // seconds
		frame []byte
		reply byte // opcode, or 0
	}{
		{"the desktop client's ping", 1, maskedFrame(0x80|opPing, nil), opPong},
		{"a ping with a payload, just in time", 19, maskedFrame(0x80|opPing, []byte("p")), opPong},
		{"a pong", 19, maskedFrame(0x80|opPong, nil), 0},
		{"a subscribe", 10, maskedFrame(0x80|opText, []byte(subscribeText(repoA, clientToken(repoA, "u", later())))), 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			c := connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com")
			for second := 1; second <= 200; second++ {
				s.advance(time.Second)
				if second%tc.every != 0 {
					continue
				}
				c.write(tc.frame)
				if tc.reply == 0 {
					c.sync()
				} else if opcode, payload, err := c.next(); opcode != tc.reply {
					t.Fatalf("second %d: frame %d %q, %v", second, opcode, payload, err)
				}
			}
			c.sync()
		})
	}
	t.Run("an answered ping keeps a browser for hours", func(t *testing.T) {
		t.Parallel()
		s := startServer(t)
		c := connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com")
		for range 2 * 180 {
			s.advance(20 * time.Second)
			c.expect(opPing, "")
			c.pong()
			c.sync()
		}
		s.post(update(repoA, "1"), 1)
		c.expectTexts(update(repoA, "1"))
	})
}

// After the process itself was away, nobody is closed for it: pings go out first.
func TestProcessWasAway(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name         string
		before, away time.Duration
		pings        int // unanswered before
	}{
		{"63 s", 5 * time.Second, 63 * time.Second, 0},
		{"10 minutes", 5 * time.Second, 10 * time.Minute, 0},
		{"63 s, and one ping was unanswered", 25 * time.Second, 63 * time.Second, 1},
		{"10 minutes, and two pings were unanswered", 45 * time.Second, 10 * time.Minute, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			answers := connect(t, s.addr, asDesktop).subscribed(repoA, "answers@example.com")
			silent := connect(t, s.addr, asBrowser).subscribed(repoA, "silent@example.com")
			bare := connect(t, s.addr, asBrowser)
			bare.sync()
			s.advance(tc.before)
			for range tc.pings {
				for _, c := range []*testClient{answers, silent, bare} {
					c.expect(opPing, "")
				}
			}
			s.jump(tc.away, tc.away)
			for _, c := range []*testClient{answers, silent, bare} {
				c.expect(opPing, "")
			}
			answers.pong()
			bare.pong()
			answers.sync()
			bare.sync()
			s.post(lockEvent(repoA, 1), 2)
			answers.expectTexts(lockEvent(repoA, 1))
			silent.expectTexts(lockEvent(repoA, 1))
			s.advance(20 * time.Second)
			answers.expect(opPing, "")
			answers.pong()
			answers.sync()
			silent.expect(opPing, "")
			s.advance(20 * time.Second)
			silent.expectClose(statusPolicy) // 40 s after the first ping that it could have answered
			answers.expect(opPing, "")
			answers.sync()
		})
	}
	t.Run("for real", func(t *testing.T) {
		t.Parallel()
		slow(t, "65 s")
		s := startMetered(t, 0)
		var clients []*testClient
		for _, lines := range []string{asDesktop, asBrowser, asBrowser} {
			c := connect(t, s.addr, lines).subscribed(repoA, "alice@example.com")
			c.nc.SetDeadline(time.Now().Add(2 * time.Minute))
			clients = append(clients, c)
		}
		s.Process.Signal(syscall.SIGSTOP)
		time.Sleep(63 * time.Second) // what is waited for is time itself
		s.Process.Signal(syscall.SIGCONT)
		for _, c := range clients {
			c.expect(opPing, "")
			c.pong()
			c.sync()
		}
		post(t, s.addr, update(repoA, "1"), len(clients))
		for _, c := range clients {
			c.expectTexts(update(repoA, "1"))
		}
	})
}

// A client without a subscription for two minutes is closed; what it unsubscribes from
// without having it does not count.
func TestNoSubscriptionForTwoMinutes(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	never := connect(t, s.addr, asBrowser)
	never.sync()
	hoards := connect(t, s.addr, asBrowser)
	left := connect(t, s.addr, asDesktop).subscribed(repoA, "left@example.com")
	stays := connect(t, s.addr, asDesktop).subscribed(repoA, "stays@example.com")
	talk := func(d time.Duration, clients ...*testClient) { // or silence would close them
		t.Helper()
		for ; d > 0; d -= 10 * time.Second {
			s.advance(10 * time.Second)
			for _, c := range clients {
				c.sync()
			}
		}
	}
	talk(60*time.Second, never, hoards, left, stays)
	left.unsubscribe(repoA)
	left.sync()
	hoards.unsubscribe("never")
	talk(50*time.Second, never, hoards, left, stays)
	s.advance(10 * time.Second)
	left.sync()
	stays.sync()
	hoards.expectClose(statusPolicy)
	if reason := never.expectClose(statusPolicy); !strings.HasPrefix(reason, "no subscription for 2") {
		t.Errorf("closed with the reason %q", reason)
	}
	s.waitFigure(`closed_total{reason="idle"}`, 2)
	talk(50*time.Second, left, stays)
	s.advance(10 * time.Second)
	left.expectClose(statusPolicy)
	stays.sync()
	talk(5*time.Minute, stays)
}

// So many clients without a subscription are closed in one sweep that events do not wait for it.
func TestIdleClientsAreClosedInPortions(t *testing.T) {
	t.Parallel()
	uptime := time.Duration(0)
	clk := clock{time.Now, func() time.Duration { return uptime }}
	lg := openLog("-", false, io.Discard, io.Discard, clk.uptime)
	defer lg.close()
	h := newHub(clk, lg, newMetrics(time.Now()), 2*maxIdleClosed)
	for range 2*maxIdleClosed + 100 {
		h.add(&client{hub: h, conn: &net.TCPConn{}, raw: deafConn{}})
	}
	for ; uptime < idleLimitFull; uptime += sweepInterval {
		h.sweep()
	}
	for sweep, want := range []int{maxIdleClosed, 2 * maxIdleClosed, 2*maxIdleClosed + 100} {
		h.sweep()
		uptime += sweepInterval
		closed := 0
		for _, c := range h.clients {
			if c.isClosing() {
				closed++
			}
		}
		if closed != want {
			t.Errorf("after sweep %d, %d clients are being closed, not %d", sweep, closed, want)
		}
	}
}

// A deafConn takes nothing.
type deafConn struct{ syscall.RawConn }

func (deafConn) Write(func(uintptr) bool) error { return nil }

// Once for real: the binary, not asked to, pings a silent client, but not one that talks.
func TestPingForReal(t *testing.T) {
	t.Parallel()
	slow(t, "20 s")
	s := startMetered(t, 0)
	silent := connect(t, s.addr, asBrowser).subscribed(repoA, "silent@example.com")
	since := time.Now()
	talking := connect(t, s.addr, asDesktop).subscribed(repoA, "talking@example.com")
	stop, talked := make(chan bool), make(chan error, 1)
	go func() { // as the desktop client: an empty ping each second
		for {
			talking.ping("")
			if opcode, payload, err := talking.next(); opcode != opPong || len(payload) > 0 {
				talked <- fmt.Errorf("frame %d %q came for a ping, %v", opcode, payload, err)
				return
			}
			select {
			case <-stop:
				talked <- nil
				return
			case <-time.After(time.Second):
			}
		}
	}()
	silent.nc.SetDeadline(time.Now().Add(2 * time.Minute))
	opcode, payload, err := silent.read()
	if took := time.Since(since); opcode != opPing || len(payload) > 0 || took < 19*time.Second {
		t.Errorf("after %v came frame %d %q, %v", took, opcode, payload, err)
	}
	close(stop)
	if err := <-talked; err != nil {
		t.Error(err)
	}
}

// The time of day jumps an hour forth, and an hour back: connections stay, tokens hold by
// the time of day, and no renewal misses anything.
func TestClockJumps(t *testing.T) {
	t.Parallel()
	port, fault := freePort(t), filepath.Join(t.TempDir(), "clock")
	setFault(t, fault, "0s")
	startSelf(t, fault, port, "-c", writeConfig(t, port))
	addr, start := "127.0.0.1:"+port, time.Now()
	short := connect(t, addr, asDesktop)
	soon := clientToken(repoA, "soon@example.com", start.Add(30*time.Minute))
	short.subscribe(repoA, soon)
	short.sync()
	long := connect(t, addr, asBrowser).subscribed(repoA, "long@example.com")
	token := func(offset time.Duration) string { return eventToken(start.Add(offset + 30*time.Minute)) }
	deliver := func(n int, offset time.Duration, to ...*testClient) {
		t.Helper()
		if got := postWith(t, addr, lockEvent(repoA, n), token(offset)); got != len(to) {
			t.Fatalf("event %d was accepted for %d, want %d", n, got, len(to))
		}
		for _, c := range to {
			c.expectTexts(lockEvent(repoA, n))
		}
	}
	deliver(1, 0, short, long)

	setFault(t, fault, "1h")
	short.expectTexts(expiredText(repoA)) // within a second or so, not in an hour
	deliver(2, time.Hour, long)
	short.subscribe(repoA, soon)
	short.expectTexts(expiredText(repoA))

	setFault(t, fault, "-1h")
	short.subscribe(repoA, clientToken(repoA, "soon@example.com", start.Add(40*time.Minute)))
	short.expectTexts(lockEvent(repoA, 2))
	deliver(3, -time.Hour, short, long)

	setFault(t, fault, "1h")
	short.expectTexts(expiredText(repoA))
	deliver(4, time.Hour, long)
	long.sync()
	short.sync()
}

// ---- Tests of a client's connection ----

// An event comes as one text frame, compacted and otherwise as it was posted.
func TestFrameText(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	c := connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com")
	long := func(n int) string { return lockPosted(repoA, "/"+strings.Repeat("x", n)) }
	content := func(fields string) string {
		return `{"type":"repo-update","content":{"repo_id":"` + repoA + `",` + fields + `}}`
	}
	for _, e := range []struct{ name, body, want string }{
		{"as it is", update(repoA, "1"), update(repoA, "1")},
		{"compacted", "{ \"type\" :\t\"repo-update\",\r\n \"content\": { \"repo_id\" : \"" + repoA + "\", \"commit_id\": \"a  b\" } } ", update(repoA, "a  b")},
		{"content first", `{"content":{"repo_id":"` + repoA + `"},"type":"repo-update"}`, `{"type":"repo-update","content":{"repo_id":"` + repoA + `"}}`},
		{"unknown fields kept, outside ones dropped", `{"x":1,"type":"repo-update","content":{"b":[1.0, 1e2, -0],"repo_id":"` + repoA + `","a":{"z":null,"y":true}},"y":2}`,
			`{"type":"repo-update","content":{"b":[1.0,1e2,-0],"repo_id":"` + repoA + `","a":{"z":null,"y":true}}}`},
		{"escapes kept", content(`"path":"/\u00e9\/é<>&\u2028 😀\ud83d\ude00\ud800 \"\\\n"`), content(`"path":"/\u00e9\/é<>&\u2028 😀\ud83d\ude00\ud800 \"\\\n"`)},
		{"large numbers kept", content(`"n":123456789012345678901234567890.10`), content(`"n":123456789012345678901234567890.10`)},
		{"repo_id by escapes", `{"type":"repo-update","content":{"repo_id":"\u0032` + repoA[1:] + `"}}`, `{"type":"repo-update","content":{"repo_id":"\u0032` + repoA[1:] + `"}}`},
		{"names by escapes", `{"\u0074ype":"repo-update","conten\u0074":{"repo\u005fid":"` + repoA + `"}}`, `{"type":"repo-update","content":{"repo\u005fid":"` + repoA + `"}}`},
		{"short frame", lockPosted(repoA, "/"), lockPosted(repoA, "/")},
		{"16-bit length", long(60000), long(60000)},
		{"64-bit length", long(mebi - 300), long(mebi - 300)},
	} {
		s.post(e.body, 1)
		c.expectTexts(e.want)
	}
	c.sync()
}

// Another implementation of the protocol understands the server, too.
func TestOtherClient(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	ws, err := websocket.Dial("ws://"+s.addr+"/notification", "notification.seafile.com", "http://localhost/")
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	ws.SetDeadline(time.Now().Add(patient))
	subscribe := fmt.Sprintf(`{"type":"subscribe","content":{"repos":[{"id":%q,"jwt_token":%q},{"id":"x"}]}}`,
		repoA, s.clientToken(repoA, "alice@example.com", time.Hour))
	if err := websocket.Message.Send(ws, subscribe); err != nil {
		t.Fatal(err)
	}
	var got string
	if err := websocket.Message.Receive(ws, &got); err != nil || got != expiredText("x") {
		t.Fatalf("got %q, %v", got, err)
	}
	s.post(update(repoA, "1"), 1)
	if err := websocket.Message.Receive(ws, &got); err != nil || got != update(repoA, "1") {
		t.Fatalf("got %q, %v", got, err)
	}
}

// ---- Tests of what a client sends ----

// fragments cuts a message into frames of these sizes; the last takes the rest.
func fragments(opcode byte, message string, sizes ...int) (frames [][]byte) {
	for _, n := range sizes {
		frames = append(frames, maskedFrame(opcode, []byte(message[:n])))
		message, opcode = message[n:], opContinuation
	}
	return append(frames, maskedFrame(0x80|opcode, []byte(message)))
}

func join(frames ...[]byte) []byte { return bytes.Join(frames, nil) }

// However a subscribe comes, it is understood.
func TestWaysToSend(t *testing.T) {
	t.Parallel()
	const id = "bibliothèque-é😀"
	message := subscribeText(id, clientToken(id, "alice@example.com", later()))
	padded := func(size int) string { return message + strings.Repeat(" ", size-len(message)) }
	rune2 := strings.Index(message, "è") + 1 // inside of a character
	ping := maskedFrame(0x80|opPing, []byte("between"))
	single := make([]int, len(message)-1)
	for i := range single {
		single[i] = 1
	}
	byBytes := func(frames ...[]byte) (chunks [][]byte) {
		for _, b := range join(frames...) {
			chunks = append(chunks, []byte{b})
		}
		return chunks
	}
	for _, c := range []struct {
		name   string
		writes [][]byte
		pongs  []string // that come
	}{
		{"text", fragments(opText, message), nil},
		{"binary", fragments(opBinary, message), nil},
		{"two fragments", fragments(opText, message, 20), nil},
		{"binary fragments", fragments(opBinary, message, 20, 30), nil},
		{"a character in two fragments", fragments(opText, message, rune2), nil},
		{"empty fragments", fragments(opText, message, 0, 0, 20, 0, len(message)-20), nil},
		{"fragments of one byte", [][]byte{join(fragments(opText, message, single...)...)}, nil},
		{"byte by byte", byBytes(fragments(opText, message)...), nil},
		{"fragments byte by byte, pings between them", byBytes(fragments(opText, message, 50)[0], ping, fragments(opText, message, 50)[1]), []string{"between"}},
		{"pings between fragments", [][]byte{fragments(opText, message, 50)[0], ping, fragments(opContinuation, message[50:], 10)[0], maskedFrame(0x80|opPong, nil), ping, maskedFrame(0x80|opContinuation, []byte(message[60:]))},
			[]string{"between", "between"}},
		{"all in one segment", [][]byte{join(maskedFrame(0x80|opPing, nil), maskedFrame(0x80|opPong, []byte("unsolicited")), join(fragments(opText, message, 7)...))}, []string{""}},
		{"unsolicited pongs", [][]byte{maskedFrame(0x80|opPong, nil), maskedFrame(0x80|opPong, bytes.Repeat([]byte("x"), 125)), maskedFrame(0x80|opText, []byte(message))}, nil},
		{"64 KiB", fragments(opText, padded(64<<10)), nil},
		{"64 KiB in fragments", fragments(opText, padded(64<<10), 1, 1<<15, 0, 1<<10), nil},
		{"1 MiB, after a good subscription", append(fragments(opText, message), fragments(opText, padded(mebi))...), nil},
		{"1 MiB in fragments, after a good subscription", append(fragments(opText, message), fragments(opText, padded(mebi), 1, 1<<19, 0, 1<<10)...), nil},
		{"1 MiB, binary, after a good subscription", append(fragments(opText, message), fragments(opBinary, padded(mebi), mebi)...), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := loggedServer(t)
			cl := connect(t, s.addr, asBrowser)
			for _, w := range c.writes {
				cl.write(w)
			}
			for _, payload := range c.pongs {
				cl.expect(opPong, payload)
			}
			cl.sync()
			s.post(update(id, "1"), 1)
			cl.expectTexts(update(id, "1"))
		})
	}
}

// Each ping is answered with its payload.
func TestPings(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	c := connect(t, s.addr, asDesktop)
	for _, payload := range []string{"", "a", "\x00\xff\xfe", strings.Repeat("x", 125), "", ""} {
		c.ping(payload)
		c.expect(opPong, payload)
	}
}

// A violation is what the protocol, or this server, forbids a client to send.
type violation struct {
	name   string
	bytes  []byte
	status int
}

// closeFrameOf is a client's close frame.
func closeFrameOf(status int, reason string) []byte {
	payload := binary.BigEndian.AppendUint16(nil, uint16(status))
	return maskedFrame(0x80|opClose, append(payload, reason...))
}

// frameViolations are frames that RFC 6455 forbids.
func frameViolations() (rows []violation) {
	f := func(first byte, payload string) []byte { return maskedFrame(first, []byte(payload)) }
	message := unsubscribeText("x")
	const mask = "\x00\x00\x00\x00"
	rows = []violation{
		{"unmasked text", []byte("\x81\x02{}"), 1002},
		{"unmasked ping", []byte("\x89\x00"), 1002},
		{"unmasked close", []byte("\x88\x02\x03\xe8"), 1002},
		{"unmasked, too long", []byte("\x81\x7f\x00\x00\x00\x01\x00\x00\x00\x00"), 1002},
		{"reserved bit on a continuation", join(f(opText, message), f(0xc0, "")), 1002},
		{"ping of 126 bytes", f(0x89, strings.Repeat("x", 126)), 1002},
		{"pong of 126 bytes", f(0x8a, strings.Repeat("x", 126)), 1002},
		{"close of 126 bytes", closeFrameOf(1000, strings.Repeat("x", 124)), 1002},
		{"ping that announces 2^63 bytes", []byte("\x89\xff\x80\x00\x00\x00\x00\x00\x00\x00" + mask), 1002},
		{"fragmented ping", f(opPing, "x"), 1002},
		{"fragmented pong", f(opPong, ""), 1002},
		{"fragmented close", f(opClose, "\x03\xe8"), 1002},
		{"continuation of nothing", f(0x80, message), 1002},
		{"first fragment of nothing", f(0x00, message), 1002},
		{"continuation behind the end", join(f(0x01, message), f(0x80, ""), f(0x80, "")), 1002},
		{"text within a message", join(f(0x01, message), f(0x81, message)), 1002},
		{"binary within a message", join(f(0x01, message), f(0x02, message)), 1002},
		{"text within, after a ping", join(f(0x01, message), f(0x8a, ""), f(0x01, message)), 1002},
		{"close of one byte", f(0x88, "\x03"), 1002},
		// A length has its shortest form (RFC 6455, section 5.2).
		{"2 bytes by 16 bits", []byte("\x81\xfe\x00\x02" + mask + "{}"), 1002},
		{"125 bytes by 16 bits", []byte("\x81\xfe\x00\x7d" + mask + strings.Repeat(" ", 125)), 1002},
		{"no bytes by 16 bits", []byte("\x81\xfe\x00\x00" + mask), 1002},
		{"2 bytes by 64 bits", []byte("\x81\xff\x00\x00\x00\x00\x00\x00\x00\x02" + mask + "{}"), 1002},
		{"65,535 bytes by 64 bits", []byte("\x82\xff\x00\x00\x00\x00\x00\x00\xff\xff" + mask + strings.Repeat(" ", 65535)), 1002},
		{"ping with no bytes by 16 bits", []byte("\x89\xfe\x00\x00" + mask), 1002},
		{"ping with one byte by 64 bits", []byte("\x89\xff\x00\x00\x00\x00\x00\x00\x00\x01" + mask + "x"), 1002},
		{"fragment with one byte by 16 bits", join(f(0x01, "{"), []byte("\x80\xfe\x00\x01"+mask+"}")), 1002},
		{"2^63 announced, its first bit set", []byte("\x81\xff\x80\x00\x00\x00\x00\x00\x00\x00" + mask), 1002},
		{"2^63+2 announced", []byte("\x81\xff\x80\x00\x00\x00\x00\x00\x00\x02" + mask + "{}"), 1002},
		{"2^64-1 announced", []byte("\x81\xff\xff\xff\xff\xff\xff\xff\xff\xff" + mask), 1002},
	}
	for bit := byte(0x10); bit <= 0x40; bit <<= 1 {
		for _, opcode := range []byte{opText, opBinary, opPing, opPong, opClose} {
			rows = append(rows, violation{fmt.Sprintf("reserved bit %#x, opcode %d", bit, opcode), f(0x80|bit|opcode, "\x03\xe8"), 1002})
		}
	}
	for _, opcode := range []byte{3, 4, 5, 6, 7, 11, 12, 13, 14, 15} {
		rows = append(rows, violation{fmt.Sprintf("opcode %d", opcode), f(0x80|opcode, "x"), 1002})
	}
	for _, status := range []int{0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1999, 2000, 2999, 5000, 65535} {
		rows = append(rows, violation{fmt.Sprintf("close status %d", status), closeFrameOf(status, "x"), 1002})
	}
	return rows
}

// messageViolations are messages that are not what they have to be.
func messageViolations() (rows []violation) {
	f := func(first byte, payload string) []byte { return maskedFrame(first, []byte(payload)) }
	message := `{"type":"unsubscribe","content":{"repos":[]}}`
	rows = []violation{
		{"close with a reason that is not UTF-8", closeFrameOf(1000, "\xff"), 1007},
		{"close with half a character", closeFrameOf(1000, "abc\xc3"), 1007},
		{"not UTF-8", f(0x81, "\"\xff\""), 1007},
		{"overlong", f(0x81, "\"\xc0\x80\""), 1007},
		{"surrogate", f(0x81, "\"\xed\xa0\x80\""), 1007},
		{"beyond Unicode", f(0x81, "\"\xf4\x90\x80\x80\""), 1007},
		{"half a character at the end", f(0x81, "\xc3"), 1007},
		{"not UTF-8 in a fragment", join(f(0x01, "\""), f(0x00, "\xff"), f(0x80, "\"")), 1007},
		{"message in binary", f(0x82, "x"), 1008},
	}
	for _, text := range []string{
		"", " ", "x", "{", message + "x", message + message, "[]", "null", "7", `"subscribe"`, `[` + message + `]`, `{}`,
		`{"type":"ping","content":{"repos":[]}}`, `{"type":"repo-update","content":{"repo_id":"x"}}`, `{"type":"","content":{"repos":[]}}`,
		`{"type":7,"content":{"repos":[]}}`, `{"type":null,"content":{"repos":[]}}`, `{"content":{"repos":[]}}`,
		`{"type":"subscribe"}`, `{"type":"subscribe","content":null}`, `{"type":"subscribe","content":"x"}`, `{"type":"subscribe","content":[]}`,
		`{"type":"subscribe","content":{}}`, `{"type":"subscribe","content":{"repos":null}}`, `{"type":"subscribe","content":{"repos":{}}}`,
		`{"type":"subscribe","content":{"repos":"x"}}`, `{"type":"subscribe","content":{"repos":["x"]}}`, `{"type":"subscribe","content":{"repos":[7]}}`,
		`{"type":"subscribe","content":{"repos":[null]}}`, `{"type":"subscribe","content":{"repos":[{}]}}`, `{"type":"subscribe","content":{"repos":[{"id":""}]}}`,
		`{"type":"subscribe","content":{"repos":[{"id":7,"jwt_token":"x"}]}}`, `{"type":"subscribe","content":{"repos":[{"id":"x","jwt_token":7}]}}`,
		`{"type":"unsubscribe","content":{}}`, `{"type":"unsubscribe","content":{"repos":[{"jwt_token":"x"}]}}`,
		strings.Repeat("[", 60000), `{"type":"` + strings.Repeat("é", 200) + `","content":{"repos":[]}}`,
	} {
		rows = append(rows, violation{fmt.Sprintf("message %.60q", text), f(0x81, text), 1008})
	}
	return rows
}

// sizeViolations are messages of more than limit bytes.
func sizeViolations(limit int) []violation {
	f := func(first byte, payload string) []byte { return maskedFrame(first, []byte(payload)) }
	message := `{"type":"unsubscribe","content":{"repos":[]}}`
	big := strings.Repeat(" ", limit-len(message)) + message
	announced := func(opcode byte, size uint64) []byte {
		return append(binary.BigEndian.AppendUint64([]byte{opcode, 0xff}, size), 0, 0, 0, 0)
	}
	return []violation{
		{"one byte more", f(0x81, big+" "), 1009},
		{"one byte more, binary", f(0x82, big+" "), 1009},
		{"one byte more in fragments", join(f(0x01, big), f(0x00, ""), f(0x80, " ")), 1009},
		{"one byte more in equal fragments", join(f(0x02, big[:limit/2]), f(0x00, big[:limit/2]), f(0x00, "x")), 1009},
		{"one byte more, announced only", announced(0x81, uint64(limit)+1), 1009},
		{"2^40 announced", announced(0x81, 1<<40), 1009},
		{"2^63-1 announced", announced(0x82, 1<<63-1), 1009},
		{"2^63-1 announced for a second fragment", join(f(0x01, "{"), announced(0x80, 1<<63-1)), 1009},
	}
}

// What is forbidden ends the connection, with the status for it and a reason.
func TestViolations(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	test := func(rows []violation, subscribed bool) func(*testing.T) {
		return func(t *testing.T) {
			for _, row := range rows {
				t.Run(row.name, func(t *testing.T) {
					t.Parallel()
					c := connect(t, s.addr, asBrowser)
					if subscribed {
						c.subscribed(repoA, "alice@example.com")
					}
					c.write(row.bytes)
					if reason := c.expectClose(row.status); reason == "" || len(reason) > 123 || !utf8.ValidString(reason) {
						t.Errorf("the reason is %q", reason)
					}
				})
			}
		}
	}
	t.Run("frames", test(frameViolations(), false))
	t.Run("messages", test(messageViolations(), false))
	t.Run("more than 64 KiB before the first subscription", test(sizeViolations(64<<10), false))
	t.Run("more than 1 MiB", test(sizeViolations(mebi), true))
}

// A subscription that was refused does not lift the limit of 64 KiB.
func TestRefusedSubscriptionLiftsNoLimit(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	ranOut := s.now().Add(-time.Minute).Unix()
	sign := func(claims string) string { return signToken(testKey, tokenHead, claims) }
	for _, token := range []string{
		s.clientToken(repoB, "alice@example.com", time.Hour),
		s.clientToken(repoB, "alice@example.com", -time.Minute),
		sign(fmt.Sprintf(`{"exp":%d}`, ranOut)),
		sign(fmt.Sprintf(`{"exp":%d,"file_uuid":"u","filename":"x.sdoc","username":""}`, ranOut)),
		sign(fmt.Sprintf(`{"exp":%d,"repo_id":%q,"username":"","permission":"r"}`, ranOut, repoA)),
	} {
		c := connect(t, s.addr, asDesktop)
		c.subscribe(repoA, token)
		c.expectTexts(expiredText(repoA))
		c.unsubscribe(repoA)
		c.text(strings.Repeat(" ", 64<<10) + unsubscribeText("x"))
		c.expectClose(statusTooBig)
	}
}

// Of what a client only announces, nothing is held.
func TestAnnouncedBytes(t *testing.T) {
	t.Parallel()
	s := startMetered(t, 0)
	const clients = 200
	before := s.footprint().mib
	for range clients {
		c := connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com")
		c.write([]byte("\x81\xff\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00{")) // 1 MiB, of which one byte comes
	}
	connect(t, s.addr, asBrowser).sync()
	if grown := s.footprint().mib - before; grown > clients/4*raceFactor() {
		t.Errorf("%d clients that announced 1 MiB each take %.1f MiB", clients, grown)
	}
}

// A message in fragments has 20 s to come whole, however much the client says meanwhile.
func TestFragmentsComeSoon(t *testing.T) {
	t.Parallel()
	slow(t, "20 s")
	s := startServer(t)
	late := connect(t, s.addr, asDesktop).subscribed(repoA, "late@example.com")
	swift := connect(t, s.addr, asDesktop).subscribed(repoA, "swift@example.com")
	late.write(maskedFrame(opText, []byte("{")))
	swift.write(maskedFrame(opText, []byte(`{"type":"unsubscribe",`)))
	swift.write(maskedFrame(0x80|opContinuation, []byte(`"content":{"repos":[]}}`)))
	begin := time.Now()
	late.ping("still here")
	opcode, payload, err := late.next()
	for ; err == nil && opcode != opClose; opcode, payload, err = late.next() {
		time.Sleep(100 * time.Millisecond)
		late.ping("still here")
	}
	if err != nil || binary.BigEndian.Uint16(payload) != statusPolicy || !strings.Contains(string(payload), "soon enough") {
		t.Errorf("it ends with %d %q, %v", opcode, payload, err)
	}
	if took := time.Since(begin); took < messageTime-2*time.Second || took > messageTime+5*time.Second {
		t.Errorf("fragments were endured for %v", took)
	}
	swift.sync()
}

// ---- Tests of the closing handshake ----

// A client's close is answered with its own status, and nothing behind it counts.
func TestCloseAnswered(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	for _, status := range []int{0, 1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999} {
		t.Run(strconv.Itoa(status), func(t *testing.T) {
			t.Parallel()
			c := connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com")
			frame := maskedFrame(0x80|opClose, nil)
			if status != 0 {
				frame = closeFrameOf(status, "bye é")
			}
			c.write(append(frame, maskedFrame(0x80|opPing, []byte("behind"))...))
			opcode, answer, err := c.next()
			if err != nil || opcode != opClose || closeStatus(answer) != status || len(answer) > 2 {
				t.Errorf("answered with frame %d % x, %v", opcode, answer, err)
			}
			c.expectEnd()
		})
	}
}

// After the server's close frame the stream stays open both ways until the client's close
// frame comes, and then ends without a reset; nothing else is answered meanwhile.
func TestClosingHandshake(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		cause  func(s *testServer, c *testClient)
		status int
	}{
		{"a violation", func(s *testServer, c *testClient) { c.write(maskedFrame(0x83, nil)) }, statusProtocol},
		{"a bad message", func(s *testServer, c *testClient) { c.text("x") }, statusPolicy},
		{"silence", func(s *testServer, c *testClient) { s.advance(60 * time.Second) }, statusPolicy},
		{"a resync", func(s *testServer, c *testClient) { s.accept(groupEvent(repoA, "add", 1)) }, statusRestart},
		{"an event that is too long", func(s *testServer, c *testClient) { s.post(numbered(repoA, 1, 5000), 0) }, statusRestart},
		{"a stop", func(s *testServer, c *testClient) { go s.shutdown() }, statusGoingAway},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := loggedServer(t)
			c := connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com")
			tc.cause(s, c)
			c.closedWith(tc.status)
			for range 3 { // frames that were on their way
				c.ping("late")
				c.subscribe(repoB, s.clientToken(repoB, "alice@example.com", time.Hour))
				time.Sleep(10 * time.Millisecond) // the stream has to be open meanwhile
			}
			c.write(closeFrameOf(tc.status, ""))
			c.nc.SetReadDeadline(time.Now().Add(patient))
			if rest, err := io.ReadAll(c.br); err != nil || len(rest) > 0 {
				t.Errorf("behind the close frame came % x, %v", rest, err)
			}
		})
	}
	t.Run("a client that does not answer is let go after 1 s", func(t *testing.T) {
		t.Parallel()
		s := loggedServer(t)
		open := false
		for range 5 { // others use this machine, too
			c := connect(t, s.addr, asDesktop)
			c.write(maskedFrame(0x83, nil))
			c.closedWith(statusProtocol)
			c.nc.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			_, err := c.br.ReadByte()
			open = open || errors.Is(err, os.ErrDeadlineExceeded)
			c.expectEnd()
		}
		if !open {
			t.Error("the stream did not stay open for 200 ms")
		}
		s.waitFigure("connections", 0)
	})
	t.Run("a client that goes on sending for ever is let go", func(t *testing.T) {
		t.Parallel()
		s := loggedServer(t)
		c := connect(t, s.addr, asDesktop)
		c.write(maskedFrame(0x83, nil))
		c.closedWith(statusProtocol)
		waitFor(t, "it is let go", func() bool {
			c.ping("on and on")
			return s.figures()["connections"] == 0
		})
	})
}

// ---- Tests of clients that are slow ----

// Who does not read keeps neither the sender nor the others.
func TestStuckClient(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	connect(t, s.addr, asBrowser).subscribed(repoA, "stuck@example.com")
	c := connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com")
	for n := range 200 { // 6 MiB, more than the stuck one's socket and outbox hold
		s.accept(numbered(repoA, n, 30000))
		c.expectTexts(numbered(repoA, n, 30000))
	}
	c.sync()
}

// An outbox holds 1,024 messages, and 1 MiB and a little more. Whose outbox is full is told
// that it is too slow, and what was queued for it is dropped.
func TestOutboxIsBounded(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name        string
		size        int // of each event
		least, most int // that wait when it is full, besides the one being written
		reads       bool
	}{
		{"1,024 messages", 200, 1023, 1023, true},
		{"1 MiB", 16 << 10, 62, 70, true},
		{"a client that does not even read that it is closed", 16 << 10, 62, 1 << 20, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			slow := connect(t, s.addr, asBrowser).subscribed(repoA, "slow@example.com")
			swift := connect(t, s.addr, asBrowser).subscribed(repoA, "swift@example.com")
			accepted := 0
			for ; accepted < 10000; accepted++ {
				event := numbered(repoA, accepted, tc.size)
				n := postWith(t, s.addr, event, s.token())
				swift.expectTexts(event)
				if n == 1 {
					break
				}
			}
			if !tc.reads {
				s.waitFigure("connections", 1)
			}
			got, opcode, payload, err := slow.readNumbered()
			switch {
			case !tc.reads && (err == nil && opcode != opClose || got == 0):
				t.Errorf("of %d events the client got %d and then frame %d %q, %v", accepted, got, opcode, payload, err)
			case tc.reads && (opcode != opClose || closeStatus(payload) != statusTryLater || string(payload[2:]) != "too slow"):
				t.Errorf("after %d events came frame %d %q, %v", got, opcode, payload, err)
			}
			if lacks := accepted - got; lacks < tc.least || lacks > tc.most {
				t.Errorf("%d events were accepted, and %d delivered; want %d to %d less", accepted, got, tc.least, tc.most)
			}
			if tc.reads {
				slow.write(closeFrameOf(statusTryLater, ""))
			}
			s.logged(slow.nc.LocalAddr().String() + ": closed, since its outbox is full: the client, or the network to it, is too slow")
			s.waitFigure(`closed_total{reason="outbox-full"}`, 1)
			s.waitFigure("connections", 1)
			s.post(numbered(repoA, 0, 0), 1)
			swift.expectTexts(numbered(repoA, 0, 0))
		})
	}
}

// handled waits until the server has read all that was sent before, also when it cannot
// answer. It needs a log at level debug.
func (c *testClient) handled(s *testServer) {
	c.t.Helper()
	mark := fmt.Sprintf("mark %d", marks.Add(1))
	c.unsubscribe(mark)
	s.logged(`unsubscribed from "?` + mark + `\b`)
}

// fill sends pings whose pongs the client does not read, until some wait in the server.
func (c *testClient) fill(s *testServer) (pings int) {
	c.t.Helper()
	batch := bytes.Repeat(maskedFrame(0x80|opPing, bytes.Repeat([]byte("x"), 125)), 100)
	for ; s.queued() == 0; pings += 100 {
		if pings > 1_000_000 {
			c.t.Fatal("the kernel takes all")
		}
		s.out.reset()
		c.write(batch)
		c.handled(s)
	}
	return pings
}

// An event of the full 1 MiB that has to wait behind a few pongs or a ping is delivered.
func TestLongestEventBehindPongs(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	c := connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com")
	pings := c.fill(s)
	t.Logf("%d pings", pings)
	longest := numbered(repoA, 1, mebi)
	s.post(longest, 1)
	for {
		opcode, payload, err := c.next()
		switch {
		case err != nil || opcode == opClose:
			t.Fatalf("behind %d pings came frame %d %q, %v", pings, opcode, payload, err)
		case opcode == opText && string(payload) == longest:
			return
		}
	}
}

// A client that reads slowly is seen to read: of a buffer of some MiB, the kernel would
// say only late that there is room.
func TestSlowReaderIsSeenToRead(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	slow := connect(t, s.addr, asBrowser)
	slow.nc.(*net.TCPConn).SetReadBuffer(8 << 10)
	slow.subscribed(repoA, "slow@example.com")
	events := 0
	for ; s.queued() < 48; events++ {
		if events > 1000 {
			t.Fatal("the kernel takes all")
		}
		s.post(numbered(repoA, events, 16<<10), 1)
	}
	before := s.queued()
	for n := range 20 { // 320 KiB
		slow.expectTexts(numbered(repoA, n, 16<<10))
	}
	waitFor(t, "more is written", func() bool { return s.queued() < before })
}

// A client to which nothing could be written for 20 s is closed; one to which something
// could be written stays.
func TestStuckClientIsClosed(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	stuck := connect(t, s.addr, asBrowser).subscribed(repoA, "stuck@example.com")
	slow := connect(t, s.addr, asBrowser).subscribed(repoA, "slow@example.com")
	const events = 60 // of 16 KiB: less than the outbox holds, more than the kernel does
	for n := range events {
		s.post(numbered(repoA, n, 16<<10), 2)
	}
	last, since := s.queued(), time.Now()
	waitFor(t, "the kernel takes no more", func() bool { // it can acknowledge, and so make room, 200 ms late
		if n := s.queued(); n != last {
			last, since = n, time.Now()
		}
		return time.Since(since) > time.Second
	})
	pass := func(seconds int) { // while something is being written
		for range seconds {
			s.time.move(time.Second, time.Second)
			s.tick()
		}
	}
	pass(19)
	s.post(numbered(repoA, events, 0), 2)
	for n := range events / 2 { // more than the kernel holds: so something was written now
		slow.expectTexts(numbered(repoA, n, 16<<10))
	}
	pass(1)
	s.waitFigure("connections", 1)
	s.post(numbered(repoA, events+1, 0), 1)
	s.logged(stuck.nc.LocalAddr().String() + ": closed, since nothing could be written for 20s: the client, or the network to it, is too slow")
	if strings.Contains(s.fullLog(), slow.nc.LocalAddr().String()+": closed") {
		t.Errorf("the log must say nothing like it of the slow client")
	}
	s.waitFigure(`closed_total{reason="stalled"}`, 1)
	if n, opcode, _, err := stuck.readNumbered(); err == nil || n == 0 || n > events {
		t.Errorf("the stuck client got %d events, then frame %d, %v", n, opcode, err)
	}
	for n := events / 2; n < events; n++ {
		slow.expectTexts(numbered(repoA, n, 16<<10))
	}
	slow.expectTexts(numbered(repoA, events, 0))
	slow.expect(opPing, "") // it was silent, and is not dead
	slow.expectTexts(numbered(repoA, events+1, 0))
}

// The same after the process itself was away: only the time since then counts.
func TestStuckClientAfterTheProcessWasAway(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	c := connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com")
	const events = 60
	for n := range events {
		s.post(numbered(repoA, n, 16<<10), 1)
	}
	if s.queued() == 0 {
		t.Fatal("the kernel takes all")
	}
	s.time.move(10*time.Minute, 10*time.Minute)
	s.tick()
	for n := range events {
		c.expectTexts(numbered(repoA, n, 16<<10))
	}
	c.expect(opPing, "")
	s.post(numbered(repoA, events, 0), 1)
	c.expectTexts(numbered(repoA, events, 0))
}

// One client that does not read, among many, under 3,000 events of 16 KiB: the others get
// all of them in order and no later than before, and the memory of the server stays where
// it was.
func TestOneStuckAmongMany(t *testing.T) {
	t.Parallel()
	s := startMetered(t, 0)
	const size, alone = 16 << 10, 300         // the first 300 events come without the stuck client
	clients, events := howMany(100, 10), 1200 // more than an outbox holds
	if os.Getenv("TEST_FLOOD") != "" {
		events = 3000
	}
	got := make(chan error, clients)
	for range clients {
		c := connect(t, s.addr, asBrowser).subscribed(repoA, "healthy@example.com")
		c.nc.SetDeadline(time.Now().Add(10 * time.Minute))
		go func() { got <- readAll(c, events, size, got) }()
	}
	var stuck *testClient
	var latency [2]time.Duration // the sum alone, and beside the stuck client
	var memory [2]float64        // the peak of each
	for n := range events {
		if n == alone {
			stuck = connect(t, s.addr, asBrowser).subscribed(repoA, "stuck@example.com")
		}
		phase := min(n/alone, 1)
		posted := time.Now()
		subscribers(t, s.addr, numbered(repoA, n, size))
		for range clients {
			if err := <-got; err != nil {
				t.Fatal(err)
			}
		}
		latency[phase] += time.Since(posted)
		if n%20 == 19 {
			memory[phase] = max(memory[phase], s.footprint().mib)
		}
	}
	latency[0] /= alone
	latency[1] /= time.Duration(events - alone)
	t.Logf("%d clients: an event took %v on average, %v with one client stuck; memory %.1f MiB, %.1f MiB",
		clients, latency[0], latency[1], memory[0], memory[1])
	if latency[1] > 10*latency[0]+100*time.Millisecond { // had its writes been waited for, seconds
		t.Errorf("an event took %v with a stuck client, %v without", latency[1], latency[0])
	}
	if memory[1] > memory[0]+20*raceFactor() { // 47 MiB are posted in all; the outbox holds 1
		t.Errorf("memory grew from %.1f MiB to %.1f MiB", memory[0], memory[1])
	}
	waitFor(t, "one client is closed, being too slow", func() bool {
		v := scrape(t, s.metrics)
		return v["outbox_full_total"] == 1 && v[`closed_total{reason="outbox-full"}`] == 1 && v["connections"] == float64(clients)
	})
	s.says("outbox is full")
	if n := strings.Count(s.out.String(), "outbox is full"); n != 1 {
		t.Errorf("the log says %d times that an outbox is full", n)
	}
	// It got what came before it was closed, from the first on.
	for n := alone; ; n++ {
		opcode, payload, err := stuck.next()
		if err != nil || opcode == opClose {
			break
		}
		if numberOf(payload) != n {
			t.Fatalf("the stuck client got %d where %d was due", numberOf(payload), n)
		}
	}
}

// readAll reads numbered events of size bytes, and reports each but the last to got; the
// last it returns.
func readAll(c *testClient, events, size int, got chan<- error) error {
	r, buf := bufio.NewReaderSize(c.nc, 64<<10), make([]byte, 4+size) // such frames have a header of 4 bytes
	for n := range events {
		if n%20 == 0 { // who is not silent is not pinged
			c.pong()
		}
		if _, err := io.ReadFull(r, buf); err != nil {
			return err
		}
		if buf[0] != 0x80|opText || numberOf(buf[4:200]) != n || buf[len(buf)-1] != '}' {
			return fmt.Errorf("%.100q came where event %d was due", buf, n)
		}
		if n < events-1 {
			got <- nil
		}
	}
	return nil
}

// The desktop client parses 4,096 bytes of a message: a longer event closes it, so that it
// asks anew, and nobody else.
func TestDesktopGets4096Bytes(t *testing.T) {
	t.Parallel()
	spaced := func(event string) string { return strings.ReplaceAll(event, ":", " :\n\t ") }
	long := update(repoA, strings.Repeat("c", 4097-len(update(repoA, ""))))
	for _, tc := range []struct {
		name, posted, event string
		fits                bool
	}{
		{"4,096 bytes", numbered(repoA, 1, 4096), numbered(repoA, 1, 4096), true},
		{"4,096 bytes when compact", spaced(numbered(repoA, 1, 4096)), numbered(repoA, 1, 4096), true},
		{"4,097 bytes", numbered(repoA, 1, 4097), numbered(repoA, 1, 4097), false},
		{"update of 4,097 bytes", long, long, false},
		{"1 MB", numbered(repoA, 1, 1e6), numbered(repoA, 1, 1e6), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			desktop := connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com")
			browser := connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com")
			other := connect(t, s.addr, asDesktop).subscribed(repoB, "alice@example.com")
			s.accept(tc.posted)
			browser.expectTexts(tc.event)
			if tc.fits {
				desktop.expectTexts(tc.event)
				desktop.sync()
			} else if reason := desktop.expectClose(statusRestart); reason != "an event is too long for this client" {
				t.Errorf("closed with the reason %q", reason)
			} else {
				s.waitFigure(`closed_total{reason="too-long"}`, 1)
			}
			browser.sync()
			other.sync()
		})
	}
}

// ---- Tests of refused subscriptions ----

// After 1,000 refused subscriptions in a row a client is closed, in one message or in many.
func TestRefusedSubscriptions(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	c := connect(t, s.addr, asDesktop)
	bad := signToken("another key", tokenHead, fmt.Sprintf(`{"exp":%d,"repo_id":%q,"username":"u"}`, later().Unix(), repoA))
	refused := func(n int) {
		t.Helper()
		for range n { // one a message, as the desktop client does
			c.subscribe(repoA, bad)
			c.expectTexts(expiredText(repoA))
		}
	}
	refused(999)
	c.subscribed(repoA, "alice@example.com") // one that holds: the count begins anew
	refused(999)
	c.sync()
	c.subscribe(repoA, bad)
	if reason := c.expectClose(statusPolicy); reason != "too many refused subscriptions" {
		t.Errorf("closed with the reason %q", reason)
	}
	s.logged("closed after 1000 refused subscriptions in a row; the last one: the token's signature does not match: " +
		"jwt_private_key differs between here and seaf-server or Seahub, or one of them was not restarted since it changed")
	if n := strings.Count(s.fullLog(), "refused: "); n != 1 {
		t.Errorf("the log names a refused subscription %d times in a minute", n)
	}
	s.post(update(repoA, "1"), 0)

	c = connect(t, s.addr, asBrowser).subscribed(repoB, "alice@example.com")
	repo := fmt.Sprintf(`{"id":%q,"jwt_token":"x"},`, repoA)
	c.text(`{"type":"subscribe","content":{"repos":[` + strings.TrimSuffix(strings.Repeat(repo, 3000), ",") + `]}}`)
	c.expectClose(statusPolicy)
	s.waitFigure(`closed_total{reason="refused"}`, 2)
	if n := strings.Count(s.fullLog(), "refused subscriptions in a row"); n != 1 {
		t.Errorf("the log tells of two such clients %d times in a minute", n)
	}
}

// A client whose 2,000 libraries' tokens all ran out while it slept is not closed for it, nor
// for reading late: a token that was good once is not a stranger's.
func TestTokensThatRanOutDoNotCount(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	c := connect(t, s.addr, asDesktop)
	repo := func(i int) string { return fmt.Sprintf("%0256d", i) }
	read, most := 0, 0 // replies, and messages that waited
	for sent := range 2000 {
		ago := time.Minute
		if sent%2 == 0 {
			ago = 30 * time.Hour
		}
		c.subscribe(repo(sent), s.clientToken(repo(sent), "alice@example.com", -ago))
		if sent%50 != 49 {
			continue
		}
		s.out.reset()
		c.handled(s)
		most = max(most, s.queued())
		for ; (s.queued() > 100 || sent == 1999) && read <= sent; read++ {
			c.expectTexts(expiredText(repo(read)))
		}
	}
	if most <= 100 {
		t.Errorf("at most %d messages waited for the client", most)
	}
	c.subscribed(repoA, "alice@example.com")
	s.post(lockEvent(repoA, 1), 1)
	c.expectTexts(lockEvent(repoA, 1))
}

// At most 8 messages wait for a stranger, one that has shown no token of ours; beyond that it
// is closed with 1013.
func TestOutboxOfAStranger(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	c := connect(t, s.addr, asBrowser)
	c.sync() // now the hub knows it
	batch := bytes.Repeat(maskedFrame(0x80|opPing, bytes.Repeat([]byte("x"), 125)), 1000)
	most := 0
	closing := func() bool {
		s.hub.mu.Lock()
		defer s.hub.mu.Unlock()
		return len(s.hub.clients) == 0 || s.hub.clients[0].isClosing()
	}
	for n := 0; !closing(); n++ {
		if n > 10_000 {
			t.Fatal("the kernel takes all")
		}
		c.write(batch)
		most = max(most, s.queued())
	}
	if most > 8 {
		t.Errorf("%d messages waited", most)
	}
	for {
		opcode, payload, err := c.next()
		if err != nil {
			break // a busy machine reads too late
		}
		if opcode == opClose {
			if got := closeStatus(payload); got != statusTryLater {
				t.Errorf("closed with %d %q", got, payload)
			}
			c.write(closeFrameOf(statusTryLater, ""))
			break
		}
	}
	s.waitFigure(`closed_total{reason="outbox-full"}`, 1)
}

// A refused token on a live subscription begins a renewal, of which the client is reminded.
func TestReminderAfterRefusedToken(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	c := connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com")
	c.subscribe(repoA, "x.y.z")
	c.expectTexts(expiredText(repoA))
	for range 19 {
		s.advance(time.Second)
		c.sync()
	}
	for range 4 {
		s.advance(time.Second)
	}
	c.expectTexts(expiredText(repoA))
	for range 60 {
		s.advance(time.Second)
		c.sync()
	}
	c.subscribed(repoA, "alice@example.com")
	s.post(lockEvent(repoA, 1), 1)
	c.expectTexts(lockEvent(repoA, 1))
}

// ---- Tests of bugs and of noise ----

// A bug that shows with one client or request ends that one alone, and the log says so.
func TestPanicInOneHandler(t *testing.T) {
	t.Parallel()
	port, fault := freePort(t), filepath.Join(t.TempDir(), "clock")
	p := startSelf(t, fault, port, "-c", writeConfig(t, port))
	addr := "127.0.0.1:" + port
	neighbour := connect(t, addr, asDesktop).subscribed(repoA, "alice@example.com")
	unlucky := connect(t, addr, asDesktop).subscribed(repoA, "mallory@example.com")
	setFault(t, fault, "panic")
	unlucky.subscribe(repoB, clientToken(repoB, "mallory@example.com", later()))
	if reason := unlucky.expectClose(statusInternal); reason != "internal error" {
		t.Errorf("closed with the reason %q", reason)
	}
	p.says("the clock is broken")
	waitFor(t, "the log says whose handler it was", func() bool {
		for line := range strings.Lines(p.out.String()) {
			if strings.Contains(line, "[ERROR] ") && strings.Contains(line, unlucky.nc.LocalAddr().String()) &&
				strings.Contains(line, "the clock is broken") && strings.Contains(line, "please report this") {
				return true
			}
		}
		return false
	})
	waitFor(t, "its subscription is gone", func() bool { return subscribers(t, addr, numbered(repoB, 1, 0)) == 0 })
	post(t, addr, lockEvent(repoA, 1), 1)
	neighbour.expectTexts(lockEvent(repoA, 1))
	connect(t, addr, asDesktop).subscribed(repoB, "mallory@example.com")
	post(t, addr, lockEvent(repoB, 2), 1)

	// The same for a request.
	setFault(t, fault, "panic")
	c := http.Client{Transport: &http.Transport{}}
	r, _ := http.NewRequest("POST", "http://"+addr+"/events", strings.NewReader(lockEvent(repoA, 3)))
	r.Header.Set("Authorization", "Token "+eventToken(later()))
	if answer, err := c.Do(r); err == nil && answer.StatusCode != http.StatusInternalServerError {
		t.Errorf("a request that panicked is answered %s", answer.Status)
	}
	post(t, addr, lockEvent(repoA, 4), 1)
	neighbour.expectTexts(lockEvent(repoA, 4))
	if status := p.terminate(); status != 0 {
		t.Errorf("exit status %d", status)
	}
}

// A bug in the middle of what the hub does leaves no lock behind.
func TestPanicLeavesNoLock(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name string
		do   func(s *testServer, c *testClient, token string)
	}{
		{"a tick", func(s *testServer, c *testClient, token string) { s.hub.tick() }},
		{"an event", func(s *testServer, c *testClient, token string) {
			r, _ := http.NewRequest("POST", "http://"+s.addr+"/events", strings.NewReader(update(repoA, "0")))
			r.Header.Set("Authorization", "Token "+token)
			if answer, err := http.DefaultClient.Do(r); err == nil {
				answer.Body.Close()
			}
		}},
		{"a subscription", func(s *testServer, c *testClient, token string) {
			c.subscribe(repoB, clientToken(repoB, "mallory@example.com", later()))
			c.ping("end")
			for opcode := byte(0); opcode != opPong && opcode != opClose; {
				opcode, _, _ = c.next()
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			for look := 1; look <= 4; look++ {
				s := startServer(t)
				healthy := connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com")
				unlucky := connect(t, s.addr, asDesktop).subscribed(repoA, "mallory@example.com")
				token := s.token()
				s.settle()
				s.time.move(time.Second, time.Second)
				s.time.breakAt(look)
				tc.do(s, unlucky, token)
				s.time.breakAt(0)
				s.accept(lockEvent(repoA, look))
				for {
					opcode, payload, err := healthy.next()
					if err != nil || opcode == opClose {
						t.Fatalf("the other client got frame %d %q, %v", opcode, payload, err)
					}
					if string(payload) == lockEvent(repoA, look) {
						break
					}
				}
				connect(t, s.addr, asDesktop).subscribed(repoB, "bob@example.com")
				s.hub.tick()
				healthy.nc.Close()
			}
		})
	}
}

// A fuzzedServer has a healthy client beside the fuzzed ones.
type fuzzedServer struct {
	*testServer
	neighbour *testClient
	events    int
}

func startFuzzedServer(f *testing.F) *fuzzedServer {
	s := &fuzzedServer{testServer: startServer(f)}
	s.neighbour = connect(f, s.addr, asBrowser).subscribed(repoB, "healthy@example.com")
	return s
}

// healthy checks that the neighbour still gets events, and nothing else.
func (s *fuzzedServer) healthy(t *testing.T) {
	t.Helper()
	s.out.reset() // it would grow all the time
	s.events++
	s.t, s.neighbour.t = t, t
	s.post(lockEvent(repoB, s.events), 1)
	s.neighbour.expectTexts(lockEvent(repoB, s.events))
	s.neighbour.sync()
}

// isMessage reports whether a client may send this: it is a message with a type and the
// libraries that it is about, by names in their exact case, none of them given twice.
func isMessage(text []byte) bool {
	var kind string
	var repos []json.RawMessage
	if json.Unmarshal(onlyMember(text, "type"), &kind) != nil || kind != "subscribe" && kind != "unsubscribe" {
		return false
	}
	for _, m := range jsonMembers(onlyMember(text, "content")) {
		if m.name == "repos" && (json.Unmarshal(m.value, &repos) != nil || repos == nil) {
			return false
		}
	}
	for _, repo := range repos {
		named := false
		for _, m := range jsonMembers(repo) {
			var id string
			named = named || m.name == "id" && json.Unmarshal(m.value, &id) == nil && id != ""
		}
		if !named {
			return false
		}
	}
	return repos != nil && utf8.Valid(text)
}

// FuzzClientMessage: a message is either carried out, each refused library being told, or
// it ends that connection with 1007, 1008 or 1009 and a reason.
func FuzzClientMessage(f *testing.F) {
	f.Add([]byte(capturedMessage))
	f.Add([]byte(`{"type":"subscribe","content":{"repos":[{"id":"` + repoA + `","jwt_token":"` + capturedLibrary + `"},{"id":"x\n","jwt_token":"x"}]}}`))
	f.Add([]byte(unsubscribeText(repoA)))
	f.Add([]byte(`{"type":"subscribe","content":{"repos":null}}`))
	f.Add([]byte(`{"Type":"subscribe","type":"unsubscribe","content":{"Repos":[],"repos":[{"ID":"x","id":"y"}]}}`))
	f.Add([]byte(`{"type":"subscribe","type":"unsubscribe","content":{"repos":[]}}`))
	f.Add([]byte("{\"type\":\"\xff\"}"))
	s := startFuzzedServer(f)
	f.Fuzz(func(t *testing.T, message []byte) {
		c := connect(t, s.addr, asBrowser)
		defer c.nc.Close()
		c.text(string(message))
		c.ping("done")
		told := 0
		for done := false; !done; {
			opcode, payload, err := c.next()
			if err != nil {
				t.Fatalf("%q: %v", message, err)
			}
			switch opcode {
			case opText:
				told++
				var id string
				json.Unmarshal(onlyMember(onlyMember(payload, "content"), "repo_id"), &id)
				if string(onlyMember(payload, "type")) != `"jwt-expired"` || id == "" {
					t.Fatalf("%q: answered %q", message, payload)
				}
			case opPong:
				if done = true; !isMessage(message) || told > bytes.Count(message, []byte("{")) {
					t.Fatalf("%q: accepted, with %d answers", message, told)
				}
			case opClose:
				want := statusPolicy
				switch {
				case len(message) > 64<<10:
					want = statusTooBig
				case !utf8.Valid(message):
					want = statusInvalid
				}
				if closeStatus(payload) != want || len(payload) < 3 {
					t.Fatalf("%q: closed with % x, want %d", message, payload, want)
				}
				done = true
			default:
				t.Fatalf("%q: frame %d %q", message, opcode, payload)
			}
		}
		s.healthy(t)
	})
}

// FuzzFrames: whatever a client sends, before or after the upgrade, its connection ends when
// it has sent all, each answer is well-formed, and its neighbour notices nothing.
func FuzzFrames(f *testing.F) {
	segment := capturedSegment(f)
	f.Add(true, segment)
	f.Add(true, segment[:100])
	f.Add(true, []byte("\x81\xff\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Add(true, []byte("\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00"))
	f.Add(true, []byte("\x01\x81\x00\x00\x00\x00{\x89\x80\x00\x00\x00\x00\x80\x81\x00\x00\x00\x00}"))
	f.Add(true, []byte("\x81\xfe\x00\x02\x00\x00\x00\x00{}"))
	f.Add(true, []byte("\x88\x82\x00\x00\x00\x00\x03\xe8\x89\x00"))
	f.Add(true, []byte("\xff\x7f"))
	f.Add(true, []byte{})
	f.Add(false, []byte(crlf(upgradeBehindNginx)+string(segment)))
	f.Add(false, []byte(crlf(upgradeDirect)))
	f.Add(false, []byte(crlf(eventFromC)))
	f.Add(false, []byte("GET /ping HTTP/1.0\r\n\r\n"))
	f.Add(false, []byte("\x16\x03\x01\x02\x00\x01"))
	s := startFuzzedServer(f)
	f.Fuzz(func(t *testing.T, upgraded bool, data []byte) {
		var c *testClient
		if upgraded {
			c = connect(t, s.addr, asBrowser)
		} else {
			c = rawConn(t, s.addr)
		}
		defer c.nc.Close()
		c.write(data)
		c.nc.(*net.TCPConn).CloseWrite()
		c.nc.SetReadDeadline(time.Now().Add(patient))
		for end := false; !end; {
			var opcode byte
			var payload []byte
			var err error
			if upgraded {
				opcode, payload, err = c.read()
			} else {
				_, err = io.Copy(io.Discard, c.br)
			}
			switch {
			case errors.Is(err, os.ErrDeadlineExceeded):
				t.Fatalf("%q: the connection does not end", data)
			case !upgraded || err == io.EOF || errors.Is(err, syscall.ECONNRESET): // what was sent behind an error is not read
				end = true
			case err != nil || opcode != opText && opcode != opPong && opcode != opClose:
				t.Fatalf("%q: answered with frame %d %q, %v", data, opcode, payload, err)
			}
		}
		s.healthy(t)
	})
}

// ---- Tests of the HTTP handlers ----

// The main job on what was captured: upgrade, subscribe and event lead to the delivery,
// and nothing else comes.
func TestCapturedTraffic(t *testing.T) {
	t.Parallel()
	for _, u := range []struct{ name, text, accept string }{
		{"behind nginx", upgradeBehindNginx, upgradeAccept},
		{"direct", upgradeDirect, acceptValue("vQe3/0+b/Tg2Z+S5/iFvOw==")},
	} {
		for _, e := range []struct{ name, text string }{
			{"C", eventFromC},
			{"Go", eventFromGo},
			{"10.x", strings.Replace(eventFromC, "Authorization: Token ", "Seafile-Repo-Token: ", 1)},
		} {
			t.Run(u.name+", "+e.name, func(t *testing.T) {
				t.Parallel()
				s := loggedServer(t)
				s.time.setWall(capturedEnd - 60)
				c := rawUpgrade(t, s.addr, crlf(u.text)+string(capturedSegment(t))) // right behind the handshake
				h := c.reply.Header
				if c.reply.StatusCode != 101 || h.Get("Sec-WebSocket-Accept") != u.accept || h.Get("Sec-WebSocket-Protocol") != subprotocol {
					t.Fatalf("upgrade answered %s %v", c.reply.Status, h)
				}
				c.expect(opPong, "")
				c.sync()
				head, body, _ := strings.Cut(crlf(e.text), "\r\n\r\n")
				answer, text := rawRequest(t, s.addr, head+"\r\n\r\n", body)
				if answer.StatusCode != 200 || strings.TrimSpace(text) != `{"subscribers":1}` ||
					answer.Header.Get("Content-Type") != "application/json" {
					t.Errorf("event answered %s %q %v", answer.Status, text, answer.Header)
				}
				c.expectTexts(body)
				c.sync()
			})
		}
	}
}

// acceptValue is what answers a Sec-WebSocket-Key (RFC 6455, section 4.2.2).
func acceptValue(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// ---- Tests of paths and methods ----

// Whatever a proxy makes of the path (PROTOCOL.md, section 4), /ping is answered.
func TestPingPaths(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	const host = "Host: 127.0.0.1:8083\r\n"
	for _, c := range []struct{ name, request string }{
		{"direct", "/ping HTTP/1.1\r\n" + host},
		{"nginx as in the manual", "/ping HTTP/1.0\r\n" + host + "Connection: close\r\n"},
		{"HTTP/1.0 without any header", "/ping HTTP/1.0\r\n"},
		{"nginx as in the current manual", "/notification/ping HTTP/1.1\r\n" + host + "Connection: upgrade\r\n"},
		{"nginx, empty Upgrade", "/notification/ping HTTP/1.1\r\n" + host + "Connection: upgrade\r\nUpgrade: \r\n"},
		{"Apache", "/ping/ HTTP/1.1\r\n" + host},
		{"HAProxy", "/notification/ping HTTP/1.1\r\n" + host + "X-Forwarded-For: 10.0.0.1\r\n"},
		{"slashes", "//notification//ping// HTTP/1.1\r\n" + host},
		{"two slashes", "//ping HTTP/1.1\r\n" + host},
		{"query", "/ping?a=b HTTP/1.1\r\n" + host},
	} {
		for method, want := range map[string]string{"GET": `{"ret": "pong"}`, "HEAD": ""} {
			answer, body := rawRequest(t, s.addr, method+" "+c.request+"\r\n")
			if answer.StatusCode != 200 || strings.TrimSpace(body) != want || answer.Header.Get("Content-Type") != "application/json" {
				t.Errorf("%s: %s answered %s %q", c.name, method, answer.Status, body)
			}
		}
	}
}

// The same holds for upgrades and events; other paths are not found.
func TestPaths(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	for _, path := range []string{"/", "//", "/notification", "/notification/", "//notification//", "/?x=y"} {
		connectTo(t, s.addr, path, asDesktop).sync()
	}
	for _, path := range []string{"/events", "//events", "/notification/events", "/events/", "//notification//events"} {
		for _, version := range []string{"HTTP/1.0", "HTTP/1.1"} {
			text := strings.Replace(rawEvent(s.token(), update(repoA, "1")), "/events HTTP/1.1", path+" "+version, 1)
			if answer, body := rawRequest(t, s.addr, text); answer.StatusCode != 200 {
				t.Errorf("event by %s at %s answered %s %q", version, path, answer.Status, body)
			}
		}
	}
	for _, path := range []string{
		"/x", "/pings", "/ping/x", "/x/ping", "/Ping", "/events/x", "/favicon.ico", "/metrics",
		"/notifications", "/notification/x", "/notification/notification/ping",
	} {
		if answer, _ := request(t, "GET", "http://"+s.addr+path, ""); answer.StatusCode != 404 {
			t.Errorf("%s answered %s", path, answer.Status)
		}
	}
	if answer, _ := rawRequest(t, s.addr, "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n"); answer.StatusCode != 404 {
		t.Errorf("OPTIONS * is answered %s", answer.Status)
	}
}

// A method that a path does not have is answered 405, and OPTIONS, which HAProxy's health
// check sends, 204; both name those that it has.
func TestMethods(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	for path, allow := range map[string][]string{"/": {"GET", "HEAD"}, "/ping": {"GET", "HEAD"}, "/events": {"POST"}} {
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE"} {
			if slices.Contains(allow, method) {
				continue
			}
			want := 405
			if method == "OPTIONS" && path != "/events" {
				want = 204
			}
			answer, _ := request(t, method, "http://"+s.addr+path, "")
			status := answer.StatusCode
			if method == "OPTIONS" && path == "/events" && status == 204 {
				status = 405 // either will do
			}
			named := strings.Split(answer.Header.Get("Allow"), ", ")
			for _, method := range allow {
				if status != want || !slices.Contains(named, method) {
					t.Errorf("%s %s answered %s, Allow %q", method, path, answer.Status, named)
				}
			}
		}
	}
	// HAProxy's "option httpchk", without more.
	if answer, _ := rawRequest(t, s.addr, "OPTIONS / HTTP/1.0\r\n\r\n"); answer.StatusCode != 204 {
		t.Errorf("HAProxy's health check is answered %s", answer.Status)
	}
}

// ---- Tests of the upgrade ----

// A WebSocket comes about whatever else is in the upgrade; of subprotocols ours alone is
// agreed on, and no extension.
func TestHandshake(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	const ours = "notification.seafile.com"
	for _, c := range []struct{ name, lines, protocol string }{
		{"no header but those needed", "", ""},
		{"Origin of the desktop client", "Origin: http://127.0.0.1\r\n", ""},
		{"Origin of Seahub", "Origin: https://cloud.example.com:8443\r\n", ""},
		{"Origin null", "Origin: null\r\n", ""},
		{"Origin a bare host name", "Origin: cloud.example.com\r\n", ""},
		{"Origin empty", "Origin: \r\n", ""},
		{"Origin no URL", "Origin: http://[::1%zz\r\n", ""},
		{"Sec-WebSocket-Origin", "Sec-WebSocket-Origin: %zz\r\n", ""},
		{"ours", "Sec-WebSocket-Protocol: notification.seafile.com\r\n", ours},
		{"ours first", "Sec-WebSocket-Protocol: notification.seafile.com, chat\r\n", ours},
		{"ours last", "Sec-WebSocket-Protocol: chat,notification.seafile.com\r\n", ours},
		{"ours in a second line", "Sec-WebSocket-Protocol: chat, superchat\r\nSec-WebSocket-Protocol: x , notification.seafile.com\r\n", ours},
		{"another", "Sec-WebSocket-Protocol: chat\r\n", ""},
		{"others", "Sec-WebSocket-Protocol: chat, superchat\r\n", ""},
		{"nearly ours", "Sec-WebSocket-Protocol: notification.seafile.com2, xnotification.seafile.com\r\n", ""},
		{"extensions", asBrowser, ""},
		{"extensions and subprotocol", asBrowser + asDesktop + "Sec-WebSocket-Extensions: x-webkit-deflate-frame\r\n", ours},
		{"no body, and it says so", "Content-Length: 0\r\n", ""},
		{"another version, too, in a second line", "Sec-WebSocket-Version: 8\r\n", ""},
	} {
		cl := connect(t, s.addr, c.lines)
		got, offered := cl.reply.Header["Sec-Websocket-Protocol"]
		if strings.Join(got, "|") != c.protocol || offered != (c.protocol != "") {
			t.Errorf("%s: subprotocol %q, want %q", c.name, got, c.protocol)
		}
		if e := cl.reply.Header["Sec-Websocket-Extensions"]; e != nil {
			t.Errorf("%s: extensions %q agreed on", c.name, e)
		}
		cl.sync()
	}
}

// Without an upgrade that can be made, a sentence says what this is, or what is missing.
func TestUpgradeRequired(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	const (
		upgrade = "Connection: upgrade\r\nUpgrade: websocket\r\n"
		key     = "Sec-WebSocket-Key: " + upgradeKey + "\r\n"
		version = "Sec-WebSocket-Version: 13\r\n"
	)
	for _, c := range []struct {
		name, first, lines string
		status             int
		want               string
	}{
		{"browser", "GET / HTTP/1.1", "Accept: text/html\r\n", 426, "Seafile's notification server.*(?s)/ping"},
		{"below /notification", "GET /notification/ HTTP/1.1", "", 426, "notification server"},
		{"Connection without Upgrade", "GET / HTTP/1.1", "Connection: upgrade\r\n" + key + version, 426, "notification server"},
		{"another upgrade", "GET / HTTP/1.1", "Connection: upgrade\r\nUpgrade: h2c\r\n" + key + version, 426, "notification server"},
		{"Upgrade without Connection", "GET / HTTP/1.1", "Connection: keep-alive\r\nUpgrade: websocket\r\n" + key + version, 426, "notification server"},
		{"old version", "GET / HTTP/1.1", upgrade + key + "Sec-WebSocket-Version: 8\r\n", 426, "13"},
		{"no version", "GET / HTTP/1.1", upgrade + key, 426, "13"},
		{"no key", "GET / HTTP/1.1", upgrade + version, 400, "Sec-WebSocket-Key"},
		{"short key", "GET / HTTP/1.1", upgrade + version + "Sec-WebSocket-Key: aaaa\r\n", 400, "Sec-WebSocket-Key"},
		{"a body", "GET / HTTP/1.1", upgrade + version + key + "Content-Length: 5\r\n\r\nhello", 400, "body"},
		{"a body in chunks", "GET / HTTP/1.1", upgrade + version + key + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n", 400, "body"},
		{"HTTP/1.0, as nginx without proxy_http_version", "GET / HTTP/1.0", upgrade + version + key, 101, ""},
		{"two lines, other case", "GET / HTTP/1.1", "Connection: keep-alive\r\nConnection: foo, UPGRADE\r\nUpgrade: WebSocket\r\n" + key + version, 101, ""},
		{"versions in one line", "GET / HTTP/1.1", upgrade + key + "Sec-WebSocket-Version: 13, 8\r\n", 101, ""},
		{"versions in the other order", "GET / HTTP/1.1", upgrade + key + "Sec-WebSocket-Version: 8,13\r\n", 101, ""},
	} {
		answer, body := rawRequest(t, s.addr, c.first+"\r\nHost: x\r\n"+c.lines+"\r\n")
		if answer.StatusCode != c.status || !regexp.MustCompile(c.want).MatchString(body) {
			t.Errorf("%s: answered %s %q, want %d %s", c.name, answer.Status, body, c.status, c.want)
		}
		if c.status == 426 && (answer.Header.Get("Upgrade") != "websocket" || answer.Header.Get("Sec-WebSocket-Version") != "13") {
			t.Errorf("%s: a 426 must name the upgrade (RFC 9110, section 15.5.22): %v", c.name, answer.Header)
		}
	}
}

// A connection that was upgraded by HTTP/1.0 works like any other.
func TestUpgradeByHTTP10(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	c := rawUpgrade(t, s.addr, "GET / HTTP/1.0\r\nHost: x\r\n"+upgradeLines+asDesktop+"\r\n")
	if c.reply.StatusCode != 101 || c.reply.Header.Get("Sec-WebSocket-Accept") != upgradeAccept {
		t.Fatalf("answered %s %v", c.reply.Status, c.reply.Header)
	}
	c.subscribed(repoA, "alice@example.com")
	s.post(lockEvent(repoA, 1), 1)
	c.expectTexts(lockEvent(repoA, 1))
	s.advance(20 * time.Second)
	c.expect(opPing, "")
}

// The User-Agent is in the debug line of a connection, and in those of refusals, quoted
// and of at most 100 bytes.
func TestUserAgentInTheLog(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	connect(t, s.addr, asDesktop).subscribe(repoA, "x.y.z")
	s.logged(`\[DEBUG\] 127\.0\.0\.1:\d+.*"Seafile/9\.0\.20 \(Linux\)".*: connected`)
	s.logged(`\[WARNING\] .*127\.0\.0\.1:\d+.*"Seafile/9\.0\.20 \(Linux\)".* refused: `)
	request(t, "POST", "http://"+s.addr+"/events", "", "User-Agent: Seafile Server")
	s.logged(`\[WARNING\] .*127\.0\.0\.1:\d+.*"Seafile Server".* refused: `)
	request(t, "GET", "http://"+s.addr+"/nothing", "", "User-Agent: "+strings.Repeat("x", 99)+"\"\x80yz")
	s.logged(`"x{99}\\"" ?.* refused: `)
	connect(t, s.addr, "User-Agent: "+strings.Repeat("é", 5000)+"\r\n")
	s.logged(`"é{50}" ?.*: connected`)
	for line := range strings.Lines(s.fullLog()) {
		if len(line) > 600 || strings.Contains(line, "yz") {
			t.Errorf("a line of the log is too long: %q", line)
		}
	}
}

// ---- Tests of events ----

// Each event is answered with the status that its sender understands, and with a sentence
// on what is wrong.
func TestEventAnswers(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	good := tokenLine(s.token())
	ok := update(repoA, "1")
	perm := func(fields string) string {
		return fmt.Sprintf(`{"type":"folder-perm-changed","content":{"repo_id":%q%s}}`, repoA, fields)
	}
	content := func(c string) string { return `{"type":"repo-update","content":` + c + `}` }
	for _, c := range []struct {
		name, header, body string
		status             int
		want               string // in the body
	}{
		{"good", good, ok, 200, `{"subscribers":0}`},
		{"good, 10.x", "Seafile-Repo-Token: " + s.token(), ok, 200, `{"subscribers":0}`},
		{"good, comment", good, commentEvent("x"), 200, "subscribers"},
		{"good, lock", good, lockPosted(repoA, "/f"), 200, "subscribers"},
		{"good, white space around", good, "\r\n " + ok + "\n", 200, "subscribers"},
		{"good, 1 MiB", good, ok + strings.Repeat(" ", mebi-len(ok)), 200, "subscribers"},
		{"good, names in another case besides", good, `{"Type":"x","type":"repo-update","CONTENT":[],"content":{"Repo_ID":7,"repo_id":"x"}}`, 200, "subscribers"},

		{"no token", "", ok, 401, "no token"},
		{"empty token", "Authorization: Token ", ok, 401, "no token"},
		{"malformed", "Authorization: Token x.y", ok, 401, "base64url"},
		{"wrong key", tokenLine(signToken("x", tokenHead, `{"exp":4102444800}`)), ok, 401, "signature"},
		{"expired", tokenLine(eventToken(s.now().Add(-time.Minute))), ok, 401, "expired"},
		{"no exp", tokenLine(signToken(testKey, tokenHead, `{}`)), ok, 401, "exp"},
		{"alg none", "Authorization: Token eyJhbGciOiJub25lIn0.eyJleHAiOjQxMDI0NDQ4MDB9.", ok, 401, "HS256"},
		{"HS512", tokenLine(capturedHS512), ok, 401, "HS256"},
		{"token before body", "", "x", 401, "no token"},
		{"a client's", tokenLine(s.clientToken(repoA, "alice@example.com", time.Minute)), ok, 403, "client"},

		{"over 1 MiB", good, ok + strings.Repeat(" ", mebi-len(ok)+1), 413, "1 MiB"},

		{"empty", good, "", 400, "JSON"},
		{"not JSON", good, "repo-update", 400, "JSON"},
		{"cut off", good, ok[:len(ok)-1], 400, "JSON"},
		{"trailing bytes", good, ok + "x", 400, "JSON"},
		{"two objects", good, ok + ok, 400, "JSON"},
		{"a NUL behind", good, ok + "\x00", 400, "JSON"},
		{"array", good, "[" + ok + "]", 400, "JSON object"},
		{"string", good, `"repo-update"`, 400, "JSON object"},
		{"null", good, "null", 400, "JSON object"},
		{"no type", good, `{"content":{"repo_id":"x"}}`, 400, "type"},
		{"type in another case", good, `{"Type":"repo-update","content":{"repo_id":"x"}}`, 400, "type"},
		{"unknown type", good, `{"type":"repo-deleted\n","content":{"repo_id":"x"}}`, 400, `"repo-deleted\n"`},
		{"jwt-expired is ours", good, `{"type":"jwt-expired","content":{"repo_id":"x"}}`, 400, `"jwt-expired"`},
		{"type is a number", good, `{"type":1,"content":{"repo_id":"x"}}`, 400, "type"},
		{"type given twice", good, `{"type":"repo-update","type":"comment-update","content":{"repo_id":"x"}}`, 400, "twice"},
		{"no content", good, `{"type":"repo-update"}`, 400, "content"},
		{"content in another case", good, `{"type":"repo-update","Content":{"repo_id":"x"}}`, 400, "content"},
		{"content given twice", good, `{"type":"repo-update","content":{"repo_id":"x"},"content":{"repo_id":"y"}}`, 400, "twice"},
		{"content null", good, content(`null`), 400, "content"},
		{"content string", good, content(`"x"`), 400, "content"},
		{"content array", good, content(`[{"repo_id":"x"}]`), 400, "content"},
		{"content number", good, content(`7`), 400, "content"},
		{"no repo_id", good, content(`{"commit_id":"x"}`), 400, "repo_id"},
		{"repo_id in another case", good, content(`{"Repo_ID":"x"}`), 400, "repo_id"},
		{"empty repo_id", good, content(`{"repo_id":""}`), 400, "repo_id"},
		{"repo_id null", good, content(`{"repo_id":null}`), 400, "repo_id"},
		{"repo_id number", good, content(`{"repo_id":7}`), 400, "repo_id"},
		{"repo_id given twice", good, content(`{"repo_id":"x","repo_id":"y"}`), 400, "repo_id"},
		{"repo_id given twice, the same", good, content(`{"repo_id":"x","repo_id":"x"}`), 400, "repo_id"},
		{"repo_id given twice, once by escapes", good, content(`{"repo_id":"x","repo\u005fid":"y"}`), 400, "repo_id"},
		{"repo_id given twice, the first a number", good, content(`{"repo_id":7,"repo_id":"y"}`), 400, "repo_id"},
		{"repo_id given twice, the first empty", good, content(`{"repo_id":"","repo_id":"y"}`), 400, "repo_id"},
		{"repo_id given twice, the second null", good, content(`{"repo_id":"x","repo_id":null}`), 400, "repo_id"},
		{"not UTF-8", good, content("{\"repo_id\":\"x\",\"path\":\"\xff\"}"), 400, "UTF-8"}, // a text frame could not carry it
		{"perm without user and group", good, perm(""), 400, "user"},
		{"perm of user, without user", good, permEvent("user", "", "-1"), 400, "user"},
		{"perm of user, but a group", good, permEvent("user", "", "1"), 400, "user"},
		{"perm of user, in another case", good, perm(`,"type":"user","User":"bob@example.com"`), 400, "user"},
		{"perm of group, without group", good, permEvent("group", "", "-1"), 400, "group"},
		{"perm of group, but a user", good, permEvent("group", "bob@example.com", "-1"), 400, "group"},
		{"perm of group, no number", good, perm(`,"type":"group"`), 400, "group"},
		{"perm of group, string", good, permEvent("group", "", `"1"`), 400, "group"},
		{"perm of group, fraction", good, permEvent("group", "", "1.5"), 400, "group"},
		{"perm of neither", good, permEvent("everyone", "bob@example.com", "1"), 400, "type"},
		{"perm, user is a number", good, perm(`,"type":"user","user":5`), 400, "user"},
	} {
		var lines []string
		if c.header != "" {
			lines = append(lines, c.header)
		}
		answer, body := request(t, "POST", "http://"+s.addr+"/events", c.body, lines...)
		if answer.StatusCode != c.status || !strings.Contains(body, c.want) {
			t.Errorf("%s: answered %s %q, want %d %s", c.name, answer.Status, body, c.status, c.want)
		}
		if strings.Contains(body, "eyJ") {
			t.Errorf("%s: the answer shows the token: %q", c.name, body)
		}
	}
	// A basic Authorization that a proxy adds does not hide the token of 10.x.
	answer, _ := request(t, "POST", "http://"+s.addr+"/events", ok, "Authorization: Basic eDp5", "Seafile-Repo-Token: "+s.token())
	if answer.StatusCode != 200 {
		t.Errorf("two headers: %s", answer.Status)
	}
	// A length that is not announced is limited, too.
	long := ok + strings.Repeat(" ", mebi-len(ok)+1)
	answer, _ = rawRequest(t, s.addr, "POST /events HTTP/1.1\r\nHost: x\r\n"+good+"\r\nTransfer-Encoding: chunked\r\n\r\n",
		fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(long), long))
	if answer.StatusCode != 413 {
		t.Errorf("chunked over 1 MiB: %s", answer.Status)
	}
}

// An event is routed by the names that a client reads, in their exact case.
func TestEventsAreRoutedByExactNames(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	a := connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com")
	b := connect(t, s.addr, asBrowser).subscribed(repoB, "bob@example.com")
	for _, text := range []string{
		`{"type":"repo-update","content":{"repo_id":"` + repoB + `","Repo_ID":"` + repoA + `"}}`,
		`{"type":"repo-update","content":{"Repo_ID":"` + repoA + `","repo_id":"` + repoB + `","REPO_ID":"` + repoA + `"}}`,
		`{"type":"folder-perm-changed","content":{"repo_id":"` + repoB + `","type":"user","user":"bob@example.com",` +
			`"USER":"alice@example.com","Type":"group","Group":1}}`,
	} {
		s.post(text, 1)
		b.expectTexts(text)
	}
	a.sync()
	b.sync()
}

// Several events come over one connection, as from the pools of seaf-server.
func TestKeepAlive(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	s.time.setWall(capturedEnd - 60)
	c := rawConn(t, s.addr)
	for _, text := range []string{eventFromC, eventFromGo, eventFromC} {
		io.WriteString(c.nc, crlf(text))
		answer, err := http.ReadResponse(c.br, nil)
		if err != nil || answer.StatusCode != 200 || answer.Close {
			t.Fatalf("answered %v, %v", answer, err)
		}
		io.Copy(io.Discard, answer.Body)
	}
	if d := s.http.IdleTimeout; d < 2*time.Minute || d > time.Hour { // libcurl keeps a connection for 118 s
		t.Errorf("an idle connection is kept for %v", d)
	}
}

// ---- Tests of limits ----

// A head may have 64 KiB; a longer one is answered 431 and counted.
func TestLongHead(t *testing.T) {
	t.Parallel()
	s := startMetered(t, 0)
	refused := func() (n float64) {
		for name, value := range scrape(t, s.metrics) {
			if strings.HasPrefix(name, "refused_total") {
				n += value
			}
		}
		return n
	}
	for _, size := range []int{30 << 10, 60 << 10, 64<<10 - 100} {
		answer, _ := rawRequest(t, s.addr, "GET /ping HTTP/1.1\r\nHost: x\r\nX: "+strings.Repeat("x", size)+"\r\n\r\n")
		if answer.StatusCode != 200 {
			t.Errorf("a header of %d bytes is answered %s", size, answer.Status)
		}
	}
	c := rawUpgrade(t, s.addr, "GET / HTTP/1.1\r\nHost: x\r\n"+upgradeLines+"X: "+strings.Repeat("x", 32<<10)+"\r\n\r\n")
	if c.reply.StatusCode != 101 {
		t.Errorf("an upgrade with a header of 32 KiB is answered %s", c.reply.Status)
	}
	c.subscribed(repoA, "alice@example.com")
	for n := range 2 {
		answer, _ := rawRequest(t, s.addr, "GET /ping HTTP/1.1\r\nHost: x\r\nX: "+strings.Repeat("x", 80<<10))
		if answer.StatusCode != 431 {
			t.Errorf("a header of 80 KiB is answered %s", answer.Status)
		}
		waitFor(t, "it is counted", func() bool { return refused() == float64(n+1) })
	}
}

// Who sends a head slowly is cut off.
func TestSlowHead(t *testing.T) {
	t.Parallel()
	slow(t, "10 s")
	s := loggedServer(t)
	c := rawConn(t, s.addr)
	io.WriteString(c.nc, "GET /ping HTTP/1.1\r\nHost: x\r\nX: ")
	drip := time.NewTicker(200 * time.Millisecond) // never idle
	defer drip.Stop()
	go func() {
		for range drip.C {
			if _, err := io.WriteString(c.nc, "x"); err != nil {
				return
			}
		}
	}()
	c.nc.SetReadDeadline(time.Now().Add(2 * patient))
	if _, err := io.Copy(io.Discard, c.nc); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a slow head is not cut off")
	}
}

// With all places taken, another client is refused, and events and /ping go on as before;
// the places come back.
func TestAllPlacesTaken(t *testing.T) {
	t.Parallel()
	const reserve = 64
	const places = 256 - reserve
	s := startMetered(t, 256)
	s.says(fmt.Sprintf("at most %d clients, by the limit of open files", places))
	clients := make([]*testClient, places)
	for i := range clients {
		clients[i] = connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com")
	}
	for range 2 * reserve { // their connections are not closed from this side, and must not take the reserve
		c := upgrade(t, s.addr, "/", asDesktop)
		if c.reply.StatusCode != http.StatusServiceUnavailable || c.reply.Header.Get("Retry-After") == "" {
			t.Fatalf("with %d clients there, another is answered %s %v", places, c.reply.Status, c.reply.Header)
		}
	}
	n := 0
	withinOnce(t, time.Second, func() {
		n++
		post(t, s.addr, numbered(repoA, n, 0), places)
		for _, c := range clients {
			c.expectTexts(numbered(repoA, n, 0))
		}
	})
	if !pings(s.addr) {
		t.Error("with all places taken, /ping does not answer")
	}
	if v := scrape(t, s.metrics); v["connections"] != places || v[`refused_total{reason="full"}`] != 2*reserve {
		t.Errorf("the metrics are %v", v)
	}
	want := fmt.Sprintf("refused: %d clients are connected; the limit of open files allows no more: "+
		"raise it (ulimit -n, LimitNOFILE=)", places)
	s.says(want)
	if n := strings.Count(s.out.String(), want); n != 1 {
		t.Errorf("the log says %d times %q", n, want)
	}
	for _, c := range clients[:reserve] {
		c.nc.Close()
	}
	s.waitFigure("connections", places-reserve)
	for range reserve {
		connect(t, s.addr, asDesktop).subscribed(repoA, "bob@example.com")
	}
	post(t, s.addr, update(repoB, "2"), 0)
	if c := upgrade(t, s.addr, "/", asDesktop); c.reply.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("with all places taken again, a client is answered %s", c.reply.Status)
	}
}

// While more than half of the places are taken, a client without its first subscription is
// closed after 10 s; one that had a subscription is not.
func TestStrangersWhilePlacesAreScarce(t *testing.T) {
	t.Parallel()
	slow(t, "10 s")
	const places = 256 - 64
	s := startMetered(t, 256)
	var known []*testClient
	for range places/2 + 1 {
		known = append(known, connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com"))
	}
	left := connect(t, s.addr, asDesktop).subscribed(repoA, "left@example.com")
	left.unsubscribe(repoA)
	refused := connect(t, s.addr, asDesktop)
	refused.subscribe(repoA, "x.y.z")
	refused.expectTexts(expiredText(repoA))
	stranger := connect(t, s.addr, asBrowser)
	begin := time.Now()
	for _, c := range []*testClient{stranger, refused} {
		if reason := c.expectClose(statusPolicy); !strings.Contains(reason, "10") {
			t.Errorf("closed with the reason %q", reason)
		}
	}
	if took := time.Since(begin); took < 9*time.Second {
		t.Errorf("closed after %v", took)
	}
	left.sync()
	post(t, s.addr, lockEvent(repoA, 1), len(known))
	for _, c := range known {
		c.expectTexts(lockEvent(repoA, 1))
	}
}

// ---- Fuzzing of events ----

// sameJSON reports whether two texts mean the same, numbers by their digits.
func sameJSON(a, b []byte) bool {
	decode := func(text []byte) (v any) {
		dec := json.NewDecoder(bytes.NewReader(text))
		dec.UseNumber()
		if dec.Decode(&v) != nil {
			return errors.New("not JSON")
		}
		return v
	}
	return reflect.DeepEqual(decode(a), decode(b))
}

// FuzzEvent: what is accepted goes out as compact JSON that means what was posted, and is
// about what a client reads in it.
func FuzzEvent(f *testing.F) {
	f.Add([]byte(capturedUpdate))
	f.Add([]byte(lockPosted(repoA, "/a")))
	f.Add([]byte(permEvent("user", "bob@example.com", "-1")))
	f.Add([]byte(permEvent("group", "", "1")))
	f.Add([]byte(`{"type":"comment-update","content":{"repo_id":"x","type":"comment_updated","file_uuid":"u","file_path":"/<é\u2028"}}`))
	f.Add([]byte(` {"content":null,"CONTENT" : {"repo_id":"x", "n":1.0e0} ,"Type":"repo-update"} `))
	f.Add([]byte(`{"type":"repo-update","content":{"repo_id":"B","Repo_ID":"A"}}`))
	f.Add([]byte(`{"type":"repo-update","content":{"repo_id":7,"repo\u005fid":"A"}}`))
	f.Add([]byte(`{"type":"folder-perm-changed","content":{"repo_id":"x","type":"user","user":"a","User":"b","group":-1}}`))
	known := []string{"repo-update", "file-lock-changed", "folder-perm-changed", "comment-update"}
	f.Fuzz(func(t *testing.T, body []byte) {
		ev, err := parseEvent(body)
		if err != nil {
			if err.Error() == "" || strings.Contains(err.Error(), "\n") {
				t.Fatalf("%q: %+v, %q", body, ev, err)
			}
			return
		}
		text := ev.message.payload()
		var compact bytes.Buffer
		if err := json.Compact(&compact, text); err != nil || !bytes.Equal(compact.Bytes(), text) || !utf8.Valid(text) {
			t.Fatalf("%q: the frame is %q, %v", body, text, err)
		}
		if all := jsonMembers(text); len(all) != 2 || all[0].name != "type" || all[1].name != "content" {
			t.Fatalf("%q: the frame is %q", body, text)
		}
		content := onlyMember(text, "content")
		if !sameJSON(content, onlyMember(body, "content")) || !slices.Contains(known, ev.kind) {
			t.Fatalf("%q: the content is %q, the type %q", body, content, ev.kind)
		}
		read := func(object []byte, name string) (value string) {
			json.Unmarshal(onlyMember(object, name), &value)
			return value
		}
		if read(text, "type") != ev.kind || read(body, "type") != ev.kind || ev.repoID == "" || read(content, "repo_id") != ev.repoID {
			t.Fatalf("%q: accepted as %+v", body, ev)
		}
		isPerm := ev.kind == "folder-perm-changed"
		if isPerm != (ev.user != "" || ev.forGroup) || ev.user != "" && ev.forGroup {
			t.Fatalf("%q: accepted as %+v", body, ev)
		}
		var last string // the last value of user counts, for a client as for us
		for _, m := range jsonMembers(content) {
			if m.name == "user" {
				last = ""
				json.Unmarshal(m.value, &last)
			}
		}
		if ev.user != "" && ev.user != last {
			t.Fatalf("%q: accepted for %q", body, ev.user)
		}
	})
}

// ---- Tests of the group members ----

// rawReply is the reply that consists of these bytes.
func rawReply(text string) func(net.Conn) {
	return func(nc net.Conn) { io.WriteString(nc, text) }
}

// noReply is given by a seaf-server that hangs.
func noReply(nc net.Conn) { io.Copy(io.Discard, nc) }

// socket is where a testServer looks for seafile.sock.
func (ts *testServer) socket() string { return filepath.Join(ts.dir, "seafile.sock") }

// groupEvent is about a folder of a library, for a group.
func groupEvent(repoID, change string, group int) string {
	return permChange(repoID, change, "group", "", fmt.Sprint(group))
}

// groupOf returns which group a captured or made request asks about.
func groupOf(request string) (group int) {
	var r struct{ Request string }
	json.Unmarshal([]byte(request), &r)
	fmt.Sscanf(r.Request, `["get_group_members", %d`, &group)
	return group
}

// seaf-server is asked as was captured, and the members that it names get the event; it
// is not asked about an event for a user.
func TestGroupMembers(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	ss := startSeafServer(t, s.socket(), rawReply(capturedMembers))
	carol := connect(t, s.addr, asDesktop).subscribed(repoA, "carol@example.com")
	bob := connect(t, s.addr, asBrowser).subscribed(repoA, "bob@example.com")
	dave := connect(t, s.addr, asDesktop).subscribed(repoA, "dave@example.com")
	s.accept(groupEvent(repoA, "add", 1))
	carol.expectTexts(groupEvent(repoA, "add", 1))
	bob.expectTexts(groupEvent(repoA, "add", 1))
	var got, want any
	json.Unmarshal([]byte(<-ss.requests), &got)
	json.Unmarshal([]byte(`{"service": "seafserv-threaded-rpcserver", "request": "[\"get_group_members\", 1, -1, -1]"}`), &want)
	if !reflect.DeepEqual(got, want) {
		t.Errorf("asked %v, want %v", got, want)
	}
	s.post(permEvent("user", "dave@example.com", "-1"), 1)
	dave.expectTexts(permEvent("user", "dave@example.com", "-1"))
	for _, c := range []*testClient{carol, bob, dave} {
		c.sync()
	}
	if n := ss.asked(); n != 0 {
		t.Errorf("for a user seaf-server was asked %d times", n)
	}
	s.waitFigure(`group_lookups_total{result="ok"}`, 1)
}

// Where the members cannot be learned, nobody gets the event, the sender is answered all
// the same, the log says why, and the library's clients are closed so that they resync.
func TestGroupMembersUnknown(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		reply func(net.Conn) // nil: no socket
		want  string         // in the log
	}{
		{"no socket", nil, `there is no .*seafile\.sock.*SEAFILE_RPC_PIPE_PATH`},
		{"database down, unknown or empty group", rawReply(capturedNull), "seaf-server does not know them.*database"},
		{"error of the function", rawReply(capturedNoFunction), `error 500, "cannot find function no_such_fn\."`},
		{"error of the service", rawReply(capturedNoService), `error 501`},
		{"hangs", noReply, "seaf-server does not answer.*timeout"},
		{"half a length, then hangs", func(nc net.Conn) { io.WriteString(nc, "\x7f\x00"); noReply(nc) }, "timeout"},
		{"half a length, then closes", rawReply("\x40\x00"), "EOF"},
		{"half an answer, then hangs", func(nc net.Conn) { io.WriteString(nc, capturedMembers[:40]); noReply(nc) }, "timeout"},
		{"half an answer, then closes", rawReply(capturedMembers[:40]), "EOF"},
		{"an answer that lacks but white space, then closes", rawReply("\x80\x00\x00\x00" + capturedMembers[4:]), "EOF"},
		{"byte by byte, too slowly", func(nc net.Conn) {
			for i := 0; ; i++ {
				if _, err := nc.Write([]byte(capturedMembers + strings.Repeat(" ", 1000))[i : i+1]); err != nil {
					return
				}
				time.Sleep(50 * time.Millisecond) // it is slow on purpose
			}
		}, "timeout"},
		{"closes at once", rawReply(""), "EOF"},
		{"another protocol", rawReply("HTTP/1.1 400 Bad Request\r\n\r\n"), "bytes"},
		{"garbage", rpcReply("\x00\xff garbage"), "invalid character"},
		{"bytes behind", rpcReply(`{"ret":[]}x`), "invalid character"},
		{"empty", rpcReply(""), "JSON"},
		{"huge length", rawReply("\xff\xff\xff\xff{}"), "4294967295"},
		{"big-endian length", rawReply("\x00\x00\x00\x7f" + capturedMembers[4:]), "bytes"},
		{"9 MiB", rpcReply(`{"ret":[{"group-id":1,"user-name":"bob@example.com"}]` + strings.Repeat(" ", 9<<20) + "}"), "bytes"},
		{"wrong shape", rpcReply(`{"ret":{"user-name":"bob@example.com"}}`), "cannot unmarshal"},
		{"list of names", rpcReply(`{"ret":["bob@example.com"]}`), "cannot unmarshal"},
		{"list of numbers", rpcReply(`{"ret":[1,2]}`), "cannot unmarshal"},
		{"a member without a name", rpcReply(`{"ret":[{"group-id":1,"user-name":"bob@example.com"},{"group-id":1,"user_name":"x"}]}`), "user-name"},
		{"no ret", rpcReply(`{}`), "does not know them"},
		{"an error and members", rpcReply(`{"ret":[{"user-name":"bob@example.com"}],"err_code":512,"err_msg":"x"}`), "error 512"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := loggedServer(t)
			if c.reply != nil {
				startSeafServer(t, s.socket(), c.reply)
			}
			bob := connect(t, s.addr, asDesktop).subscribed(repoA, "bob@example.com")
			dave := connect(t, s.addr, asBrowser).subscribed(repoA, "dave@example.com").subscribed(repoB, "dave@example.com")
			other := connect(t, s.addr, asBrowser).subscribed(repoB, "bob@example.com")
			s.accept(groupEvent(repoA, "add", 1))
			for _, cl := range []*testClient{bob, dave} { // nothing comes before the close frame
				opcode, payload, err := cl.next()
				if err != nil || opcode != opClose || closeStatus(payload) != statusRestart || len(payload) < 10 {
					t.Errorf("got frame %d %q, %v; want to be closed with 1012 and a reason", opcode, payload, err)
				}
			}
			other.sync()
			s.logged(`\[WARNING\] .*group 1 .*library "?` + repoA + `.*` + c.want)
			s.waitFigure(`group_lookups_total{result="failed"}`, 1)
			s.waitFigure(`closed_total{reason="resync"}`, 2)
		})
	}
}

// The socket is opened anew for each question: seaf-server may come, go, and leave a
// socket behind on which nobody listens.
func TestSeafServerComesAndGoes(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	works := func(change string) {
		t.Helper()
		ss := startSeafServer(t, s.socket(), membersReply("alice@example.com"))
		c := connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com")
		s.accept(groupEvent(repoA, change, 1))
		c.expectTexts(groupEvent(repoA, change, 1))
		c.nc.Close()
		ss.ln.Close() // which also removes the socket
		s.waitFigure("connections", 0)
	}
	fails := func(want string) {
		t.Helper()
		c := connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com")
		s.accept(groupEvent(repoA, "add", 1))
		c.expectClose(statusRestart)
		s.logged(want)
		s.time.move(0, 2*time.Minute) // or the log would keep silent of the next
	}
	fails("there is no ")
	works("add")
	fails("there is no ")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.socket(), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close() // as when seaf-server was killed
	fails("refused")
	os.Remove(s.socket())
	full := listenBacklog(t, s.socket(), 0) // it accepts nothing
	for range 10 {
		if nc, err := net.DialTimeout("unix", s.socket(), 100*time.Millisecond); err == nil {
			defer nc.Close()
		}
	}
	fails("in time|timeout|unavailable")
	full.Close()
	os.Remove(s.socket())
	works("del")
}

// A heldSeafServer answers the question about a group when the test lets it.
type heldSeafServer struct {
	*seafServer
	mu     sync.Mutex
	groups map[int]chan bool // closed when the answer may go
}

func holdSeafServer(t *testing.T, s *testServer, users ...string) *heldSeafServer {
	t.Helper()
	held := &heldSeafServer{groups: map[int]chan bool{}}
	ln, err := net.Listen("unix", s.socket())
	if err != nil {
		t.Fatal(err)
	}
	held.seafServer = &seafServer{ln: ln, requests: make(chan string, 10000)}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer nc.Close()
				request := readQuestion(nc)
				held.requests <- request
				<-held.gate(groupOf(request))
				membersReply(users...)(nc)
			}()
		}
	}()
	return held
}

func readQuestion(nc net.Conn) string {
	var size uint32
	if binary.Read(nc, binary.LittleEndian, &size) != nil || size > 1<<20 {
		return ""
	}
	request := make([]byte, size)
	io.ReadFull(nc, request)
	return string(request)
}

func (h *heldSeafServer) gate(group int) chan bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.groups[group] == nil {
		h.groups[group] = make(chan bool)
	}
	return h.groups[group]
}

func (h *heldSeafServer) release(groups ...int) {
	for _, group := range groups {
		close(h.gate(group))
	}
}

// waitAsked waits until so many questions were asked.
func (h *heldSeafServer) waitAsked(t *testing.T, n int) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%d questions are asked", n), func() bool { return h.asked() >= n })
}

// The sender is answered before seaf-server has answered the question. Meanwhile the
// events of that library wait, in their order, and those of other libraries do not.
func TestGroupEventsKeepTheOrder(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	seaf := holdSeafServer(t, s, "alice@example.com")
	var members []*testClient
	for _, lines := range []string{asDesktop, asBrowser} {
		c := connect(t, s.addr, lines).subscribed(repoA, "alice@example.com").subscribed(repoB, "alice@example.com")
		members = append(members, c)
	}
	bob := connect(t, s.addr, asBrowser).subscribed(repoA, "bob@example.com")
	queue := []string{
		lockEvent(repoA, 0), // before the first question
		groupEvent(repoA, "add", 1),
		groupEvent(repoA, "del", 1),
		lockEvent(repoA, 1),
		groupEvent(repoA, "add", 2), // whose question is answered first
		permEvent("user", "alice@example.com", "-1"),
		update(repoA, "1"),
		commentEvent(repoA),
	}
	for _, text := range queue {
		s.accept(text)
	}
	seaf.waitAsked(t, 2)
	s.post(lockEvent(repoB, 1), 2)
	for _, c := range members {
		c.expectTexts(queue[0], lockEvent(repoB, 1))
		c.sync()
	}
	seaf.release(2)
	s.waitFigure(`group_lookups_total{result="ok"}`, 1)
	for _, c := range members {
		c.sync() // the first still waits
	}
	seaf.release(1)
	for _, c := range members {
		c.expectTexts(queue[1:]...)
		c.sync()
	}
	bob.expectTexts(queue[0], queue[3], queue[6], queue[7])
	bob.sync()
}

// A change of a group that seaf-server cannot tell of costs that library's clients the
// connection, but not the update that waited behind it.
func TestUpdateBehindAFailedQuestion(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	release := make(chan bool)
	startSeafServer(t, s.socket(), func(nc net.Conn) { <-release; rawReply(capturedNull)(nc) })
	c := connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com")
	s.accept(groupEvent(repoA, "add", 1))
	s.accept(update(repoA, "1"))
	close(release)
	c.expectClose(statusRestart)
	c = connect(t, s.addr, asDesktop)
	c.subscribe(repoA, s.clientToken(repoA, "alice@example.com", time.Hour))
	c.expectTexts(update(repoA, "1"))
}

// seaf-server is asked at most 4 questions at a time, and not a second time about a group
// that it is being asked about; the rest wait for their turn.
func TestSeafServerIsNotPressed(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	seaf := holdSeafServer(t, s, "alice@example.com")
	const libraries = 24
	repo := func(i int) string { return fmt.Sprint("library ", i) }
	c := connect(t, s.addr, asBrowser)
	for i := range libraries {
		c.subscribed(repo(i), "alice@example.com")
	}
	for i := range libraries {
		s.accept(groupEvent(repo(i), "add", i%8)) // 8 groups
	}
	seaf.waitAsked(t, 4)
	time.Sleep(200 * time.Millisecond) // what must not come
	if n := seaf.asked(); n != 4 {
		t.Errorf("%d questions were asked at a time, want 4", n)
	}
	asked := map[int]int{}
	for len(asked) < 8 {
		waitFor(t, "the next question is asked", func() bool { return seaf.asked() > 0 })
		group := groupOf(<-seaf.requests)
		if asked[group]++; asked[group] == 1 {
			seaf.release(group)
		}
	}
	var got []string
	for range libraries {
		_, text, err := c.next()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, string(text))
	}
	c.sync()
	for i := range libraries {
		if !slices.Contains(got, groupEvent(repo(i), "add", i%8)) {
			t.Errorf("the event of library %d did not come", i)
		}
	}
	for group, n := range asked {
		if n > 2 { // an event that came when the first question was on its way needs a second one
			t.Errorf("seaf-server was asked %d times about group %d", n, group)
		}
	}
}

// listenBacklog listens on a Unix socket with a backlog, as seaf-server 10 and 11 do.
func listenBacklog(t *testing.T, path string, backlog int) net.Listener {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err == nil {
		err = errors.Join(syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}), syscall.Listen(fd, backlog))
	}
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), path)
	defer file.Close()
	ln, err := net.FileListener(file)
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// 400 group events, posted 100 at a time, with a seaf-server that has a backlog of 10 and
// answers after 2 ms: all arrive, in order, and nobody is closed.
func TestBurstOfGroupEvents(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	s.log.setLevel(0) // info
	answer := membersReply("alice@example.com")
	serveSeaf(t, listenBacklog(t, s.socket(), 10), func(nc net.Conn) {
		time.Sleep(2 * time.Millisecond) // it is slow on purpose
		answer(nc)
	})
	const senders, events, libraries = 100, 4, 10
	repo := func(i int) string { return fmt.Sprint("library ", i%libraries) }
	event := func(sender, n int) string {
		return groupEvent(repo(sender), fmt.Sprintf("%d/%d", sender, n), sender*events+n)
	}
	var clients [2]*testClient
	for i, lines := range []string{asDesktop, asBrowser} {
		clients[i] = connect(t, s.addr, lines)
		for n := range libraries {
			clients[i].subscribed(repo(n), "alice@example.com")
		}
	}
	var wg sync.WaitGroup
	for i := range senders {
		wg.Go(func() {
			for n := range events {
				s.accept(event(i, n))
			}
		})
	}
	wg.Wait()                                // each of them was answered at once
	orders := [2]map[string][]string{{}, {}} // by client and library
	for i, c := range clients {
		next := map[int]int{}
		for range senders * events {
			opcode, payload, err := c.next()
			var m struct {
				Content struct {
					RepoID string `json:"repo_id"`
					Change string `json:"change_event"`
				}
			}
			var sender, n int
			if err != nil || opcode != opText || json.Unmarshal(payload, &m) != nil {
				t.Fatalf("client %d: frame %d %q, %v", i, opcode, payload, err)
			}
			fmt.Sscanf(m.Content.Change, "%d/%d", &sender, &n)
			if next[sender] != n {
				t.Errorf("client %d: event %d of sender %d came in place of %d", i, n, sender, next[sender])
			}
			next[sender]++
			orders[i][m.Content.RepoID] = append(orders[i][m.Content.RepoID], m.Content.Change)
		}
		c.sync()
	}
	if !reflect.DeepEqual(orders[0], orders[1]) {
		t.Error("two clients got the events of a library in different orders")
	}
}

// No question is asked for a library that nobody has subscribed to, and nothing is logged
// of it; the sender is answered as always.
func TestNoQuestionWithoutSubscribers(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	ss := startSeafServer(t, s.socket(), rawReply(capturedNull))
	left := connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com")
	left.unsubscribe(repoA)
	left.sync()
	before := s.fullLog()
	s.post(groupEvent(repoA, "add", 1), 0)
	s.post(groupEvent(repoB, "add", 1), 0)
	last := connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com")
	s.accept(groupEvent(repoA, "del", 2)) // questions are asked in order
	last.expectClose(statusRestart)
	if got := groupOf(<-ss.requests); got != 2 || ss.asked() > 0 {
		t.Errorf("asked about group %d, and %d times more; want group 2 alone", got, ss.asked())
	}
	log := strings.TrimPrefix(s.fullLog(), before)
	if regexp.MustCompile(`group 1\b`).MatchString(log) {
		t.Errorf("the log says: %s", log)
	}
}

// When the last subscriber leaves while an event waits for its group, all that waits is
// dropped: nobody is closed for it later, nothing is asked for what comes, and the log says
// nothing. Only an update among it is still remembered.
func TestLastSubscriberLeavesWhileEventsWait(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, result string
		reply        func(net.Conn)
	}{
		{"the members are known later", "ok", membersReply("alice@example.com")},
		{"the members stay unknown", "failed", rawReply(capturedNull)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := loggedServer(t)
			release := make(chan bool)
			ss := startSeafServer(t, s.socket(), func(nc net.Conn) { <-release; tc.reply(nc) })
			left := connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com")
			s.post(groupEvent(repoA, "add", 1), 1)
			if group := groupOf(<-ss.requests); group != 1 {
				t.Errorf("asked about group %d", group)
			}
			s.post(update(repoA, "1"), 1)
			s.post(lockEvent(repoA, 1), 1)
			left.nc.Close()
			s.waitFigure("subscriptions", 0)
			before := s.fullLog()
			s.post(groupEvent(repoA, "add", 2), 0)
			s.post(lockEvent(repoA, 2), 0)
			c := connect(t, s.addr, asDesktop)
			c.subscribe(repoA, s.clientToken(repoA, "alice@example.com", time.Hour))
			c.expectTexts(update(repoA, "1"))
			s.post(lockEvent(repoA, 3), 1)
			c.expectTexts(lockEvent(repoA, 3)) // it waits for nothing
			close(release)
			s.waitFigure(fmt.Sprintf("group_lookups_total{result=%q}", tc.result), 1)
			c.sync() // nothing else came, and it is not closed
			if n := ss.asked(); n > 0 {
				t.Errorf("%d more questions were asked", n)
			}
			if log := strings.TrimPrefix(s.fullLog(), before); strings.Contains(log, "WARNING") {
				t.Errorf("the log says: %s", log)
			}
		})
	}
}

// While the process is stopped, the time of a question does not run: the event arrives, and
// nobody is closed.
func TestProcessWasAwayDuringAQuestion(t *testing.T) {
	t.Parallel()
	slow(t, "6 s")
	port := freePort(t)
	dir := writeConfig(t, port)
	answer := membersReply("alice@example.com")
	ss := startSeafServer(t, socketBeside(t, dir), func(nc net.Conn) {
		time.Sleep(300 * time.Millisecond) // it is slow on purpose
		answer(nc)
	})
	p := startBinary(t, port, nil, "-c", dir)
	addr := "127.0.0.1:" + port
	c := connect(t, addr, asDesktop).subscribed(repoA, "alice@example.com")
	post(t, addr, groupEvent(repoA, "add", 1), 1)
	<-ss.requests
	p.Process.Signal(syscall.SIGSTOP)
	time.Sleep(6 * time.Second) // longer than a question may take
	p.Process.Signal(syscall.SIGCONT)
	for {
		opcode, payload, err := c.next()
		if opcode == opPing && err == nil {
			c.pong()
			continue
		}
		if opcode != opText || string(payload) != groupEvent(repoA, "add", 1) {
			t.Fatalf("got frame %d %q, %v", opcode, payload, err)
		}
		break
	}
	c.untilPong() // it is not closed
	if log := p.out.String(); strings.Contains(log, "not known") {
		t.Errorf("the log says: %s", log)
	}
}

// Of the same cause the log has one line a minute, however many libraries it concerns; the
// metrics count them all.
func TestFailedQuestionsInTheLog(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	startSeafServer(t, s.socket(), rawReply(capturedNull))
	fail := func(n int) {
		t.Helper()
		for i := range n {
			repoID := fmt.Sprint("library ", i)
			c := connect(t, s.addr, asDesktop).subscribed(repoID, "alice@example.com")
			s.accept(groupEvent(repoID, "add", i))
			c.expectClose(statusRestart)
		}
	}
	lines := func() int { return strings.Count(s.fullLog(), "are not known") }
	fail(5)
	s.waitFigure(`group_lookups_total{result="failed"}`, 5)
	if n := lines(); n != 1 {
		t.Errorf("5 failures made %d lines", n)
	}
	s.time.move(0, 61*time.Second)
	fail(2)
	if n := lines(); n != 2 {
		t.Errorf("a minute later there are %d lines, want 2", n)
	}
}

// Only so many events wait for one library, and so many in all; beyond that the library's
// clients are closed, and no others.
func TestWaitingEventsAreBounded(t *testing.T) {
	t.Parallel()
	t.Run("of one library", func(t *testing.T) {
		t.Parallel()
		s := startServer(t)
		s.log.setLevel(0) // info
		seaf := holdSeafServer(t, s, "alice@example.com")
		c := connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com")
		other := connect(t, s.addr, asBrowser).subscribed(repoB, "alice@example.com")
		s.accept(groupEvent(repoA, "add", 1))
		s.accept(groupEvent(repoB, "add", 2))
		seaf.waitAsked(t, 2)
		for n := 0; s.figures()[`subscriptions`] == 2; n++ {
			if n > 20000 {
				t.Fatalf("%d events wait", n)
			}
			s.handle(numbered(repoA, n, 0))
		}
		c.closedWith(statusRestart)
		if n := s.figures()[`group_lookups_total{result="failed"}`]; n != 0 {
			t.Error("closed for another reason: a question has failed")
		}
		seaf.release(1, 2)
		other.expectTexts(groupEvent(repoB, "add", 2))
		other.sync()
	})
	t.Run("of all libraries", func(t *testing.T) {
		t.Parallel()
		s := startServer(t)
		s.log.setLevel(0) // info
		seaf := holdSeafServer(t, s, "alice@example.com")
		const libraries, each = 40, 500
		repo := func(i int) string { return fmt.Sprint("library ", i) }
		for i := range libraries {
			c := connect(t, s.addr, asBrowser).subscribed(repo(i), "alice@example.com")
			go io.Copy(io.Discard, c.br)
			s.handle(groupEvent(repo(i), "add", 1))
		}
		closed := func() float64 { return s.figures()[`closed_total{reason="resync"}`] }
		for n := 0; n < each && closed() == 0; n++ {
			for i := range libraries {
				s.handle(numbered(repo(i), n, 0))
			}
		}
		if n := s.figures()[`group_lookups_total{result="failed"}`]; n > 0 {
			t.Errorf("closed for another reason: %v questions have failed", n)
		}
		waitFor(t, "some of the libraries' clients are closed", func() bool { return closed() > 0 })
		seaf.release(1)
		if left := s.figures()["connections"]; left < libraries/2 {
			t.Errorf("%v of %d clients are left", left, libraries)
		}
	})
}

// A stop does not wait for seaf-server's answers: the clients are closed like all others.
func TestStopDoesNotWaitForQuestions(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	dir := writeConfig(t, port)
	ss := startSeafServer(t, socketBeside(t, dir), noReply)
	p := startBinary(t, port, nil, "-c", dir)
	addr := "127.0.0.1:" + port
	c := connect(t, addr, asDesktop).subscribed(repoA, "alice@example.com")
	subscribers(t, addr, groupEvent(repoA, "add", 1))
	<-ss.requests
	p.Process.Signal(syscall.SIGTERM)
	c.expectClose(statusGoingAway) // not 1012, after the 5 s of a question
	if code := p.wait(); code != 0 {
		t.Errorf("exit status %d; output: %s", code, p.out)
	}
}

// FuzzReply: members are those that a whole reply without an error names.
func FuzzReply(f *testing.F) {
	for _, reply := range []string{
		capturedMembers, capturedNull, capturedNoFunction, capturedNoService, capturedMembers[:40],
		"\xff\xff\xff\xff{}", "\x02\x00\x00\x00{}", "\x0b\x00\x00\x00{\"ret\":[]}",
	} {
		f.Add([]byte(reply))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		members, err := readMembers(bytes.NewReader(data))
		if err != nil {
			if members != nil {
				t.Fatalf("%q: members %v with error %v", data, members, err)
			}
			return
		}
		size := int(binary.LittleEndian.Uint32(data))
		text := data[4 : 4+size]
		named := slices.ContainsFunc(jsonMembers(text), func(m jsonMember) bool { return strings.EqualFold(m.name, "ret") })
		if members == nil || !named || !json.Valid(text) {
			t.Fatalf("%q: members %v", data, members)
		}
		plain := utf8.Valid(text) && !bytes.ContainsAny(text, "\\<>&\x7f\u2028\u2029\ufffd")
		for name := range members {
			if quoted, _ := json.Marshal(name); name == "" || plain && !bytes.Contains(text, quoted) {
				t.Fatalf("%q: who is %q?", data, name)
			}
		}
	})
}

// Who asks for group members hears why there is no answer, also while others are asked.
func TestQuestionReason(t *testing.T) {
	t.Parallel()
	heard := 0
	for range 20 {
		g := newGroups(func() string { return "/nowhere" }, nil)
		for range maxQuestions {
			g.questions <- struct{}{}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*reasonWait)
		_, err := g.members(ctx, 1)
		cancel()
		if err == nil {
			t.Fatal("somebody answered")
		}
		if strings.Contains(err.Error(), "too many questions wait for seaf-server") {
			heard++
		}
	}
	if heard < 10 { // not 20: the machine may be busy for longer than reasonWait
		t.Errorf("the reason was heard %d times of 20", heard)
	}
}

// ---- Self-check ----

// A checkRun is what a run of -check said.
type checkRun struct {
	t      testing.TB
	text   string
	status int
	took   time.Duration
}

var checkSteps = []string{
	"configuration", "senders", "ping", "upgrade", "subscription", "event", "forgery",
	"group members", "connection",
}

// selfCheck does what -check does, in this process. Of each run: the steps in their order,
// notes below them, a last line that fits the exit status, and the key nowhere.
func selfCheck(t testing.TB, env []string, dir string, urls ...string) *checkRun {
	t.Helper()
	getenv := func(variable string) string {
		for _, line := range env {
			if value, found := strings.CutPrefix(line, variable+"="); found {
				return value
			}
		}
		return ""
	}
	var out bytes.Buffer
	begin := time.Now()
	status := runCheck(dir, urls, getenv, &out)
	run := &checkRun{t, out.String(), status, time.Since(begin)}
	run.checkForm()
	return run
}

// selfCheckBinary is selfCheck by the real binary. What certificates it trusts, its
// environment tells: that of this process is read but once.
func selfCheckBinary(t testing.TB, env []string, dir string, urls ...string) *checkRun {
	t.Helper()
	begin := time.Now()
	p := start(t, env, buildBinary(t), append([]string{"-c", dir, "-check"}, urls...)...)
	status := p.wait()
	run := &checkRun{t, p.out.String(), status, time.Since(begin)}
	run.checkForm()
	return run
}

// checkForm checks what holds of each run.
func (run *checkRun) checkForm() {
	run.t.Helper()
	for _, key := range []string{testKey, strings.Repeat("k", 40)} {
		if strings.Contains(run.text, key) {
			run.t.Errorf("-check printed the key: %s", run.text)
		}
	}
	crosses := strings.Count(run.text, "✗ ")
	var steps []string
	lines := strings.Split(strings.TrimSuffix(run.text, "\n"), "\n")
	for i, line := range lines[:len(lines)-1] {
		mark, rest, _ := strings.Cut(line, " ")
		name, text, found := strings.Cut(rest, ": ")
		switch {
		case strings.HasPrefix(line, "  ") && i > 0: // a note of the step above
		case !slices.Contains([]string{"✓", "✗", "-"}, mark) || !found || text == "":
			run.t.Errorf("line %d is of no step: %q", i+1, line)
		case mark == "-" && (crosses == 0 || !strings.Contains(text, "not tried")):
			run.t.Errorf("%q does not say that it was not tried, or nothing failed before", line)
		default:
			steps = append(steps, name)
		}
	}
	if !slices.Equal(slices.Compact(steps), checkSteps) {
		run.t.Errorf("the steps are %q, want %q: %s", steps, checkSteps, run.text)
	}
	status, last := 0, "It works: "
	if strings.Contains(run.text, "\n  WARNING: ") {
		last = "It works, with warnings: "
	}
	if crosses > 0 {
		status, last = 1, "It does not work: "
	}
	if run.status != status || !strings.HasPrefix(lines[len(lines)-1], last) {
		run.t.Errorf("exit status %d with %d crosses: %s", run.status, crosses, run.text)
	}
}

// says checks that a line of the step has this mark, and holds the phrases itself or in the
// notes below it.
func (run *checkRun) says(mark, step string, phrases ...string) {
	run.t.Helper()
	begin := mark + " " + step + ": "
	var text strings.Builder
	ours := false
	for line := range strings.Lines(run.text) {
		if !strings.HasPrefix(line, "  ") {
			ours = strings.HasPrefix(line, begin)
		}
		if ours {
			text.WriteString(line)
		}
	}
	if text.Len() == 0 {
		run.t.Errorf("no line %q for the step %s: %s", mark, step, run.text)
		return
	}
	for _, phrase := range phrases {
		if !strings.Contains(text.String(), phrase) {
			run.t.Errorf("the step %s does not say %q: %s", step, phrase, text.String())
		}
	}
}

// good checks that all steps work, and that the end says how long a notification takes.
func (run *checkRun) good() {
	run.t.Helper()
	if run.status != 0 || strings.Count(run.text, "✓ ") != len(checkSteps) {
		run.t.Errorf("not all is good: %s", run.text)
	}
	lines := strings.Split(strings.TrimSpace(run.text), "\n")
	words := strings.Fields(strings.TrimSuffix(lines[len(lines)-1], "."))
	if d, err := time.ParseDuration(words[len(words)-1]); err != nil || d <= 0 || d > patient {
		run.t.Errorf("the last line does not end in a time: %q", lines[len(lines)-1])
	}
}

// A checked is the real binary with a seaf-server beside it, to be checked.
type checked struct {
	*process
	dir string // of its configuration
	url string
}

func startChecked(t testing.TB) checked {
	t.Helper()
	port := freePort(t)
	dir := writeConfig(t, port)
	data := filepath.Join(dir, "../seafile-data")
	if err := os.Mkdir(data, 0o755); err != nil {
		t.Fatal(err)
	}
	unknown := rpcReply(`{"ret":null}`) // as for a group that seaf-server does not know
	startSeafServer(t, filepath.Join(data, "seafile.sock"), unknown)
	return checked{startBinary(t, port, nil, "-c", dir), dir, "http://127.0.0.1:" + port}
}

// addr is host and port.
func (c checked) addr() string { return strings.TrimPrefix(c.url, "http://") }

// front is a proxy of this process before the server at address. instead may answer a
// request in its place: then it returns true.
func front(t testing.TB, address string, instead replacement) *httptest.Server {
	t.Helper()
	to, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(to)
	f := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if instead == nil || !instead(w, r) {
			proxy.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(f.Close)
	return f
}

type replacement func(http.ResponseWriter, *http.Request) bool

// answers replaces the answer to one path, or to each for "", by this one.
func answers(path string, status int, text string, lines ...string) replacement {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if path != "" && r.URL.Path != path {
			return false
		}
		for _, line := range lines {
			name, value, _ := strings.Cut(line, ": ")
			w.Header().Set(name, value)
		}
		w.WriteHeader(status)
		io.WriteString(w, text)
		return true
	}
}

// readToken returns the claims of the token of an event.
func readToken(r *http.Request) string {
	parts := strings.Split(r.Header.Get("Authorization"), ".")
	if len(parts) != 3 {
		return ""
	}
	claims, _ := base64.RawURLEncoding.DecodeString(parts[1])
	return string(claims)
}

// Where all is well, -check says so: directly, by the environment, through each proxy with
// README's rule, and with TLS.
func TestCheckGood(t *testing.T) {
	t.Parallel()
	server := startChecked(t)
	t.Run("direct", func(t *testing.T) {
		t.Parallel()
		run := selfCheckBinary(t, nil, server.dir)
		run.good()
		run.says("✓", "configuration", filepath.Join(server.dir, "seafile.conf"))
		run.says("✓", "group members", "seafile.sock")
	})
	t.Run("environment", func(t *testing.T) {
		t.Parallel()
		_, port, _ := net.SplitHostPort(server.addr())
		run := selfCheck(t, []string{
			"JWT_PRIVATE_KEY=" + testKey,
			"NOTIFICATION_SERVER_HOST=0.0.0.0",
			"NOTIFICATION_SERVER_PORT=" + port,
		}, server.dir)
		run.good()
		run.says("✓", "configuration", "JWT_PRIVATE_KEY", "NOTIFICATION_SERVER_HOST")
		run = selfCheck(t, []string{
			"JWT_PRIVATE_KEY=" + testKey, "NOTIFICATION_SERVER_PORT='" + port + "'",
		}, server.dir)
		run.good()
		run.says("✓", "configuration", "WARNING: ", "quotes stand around")
	})
	for _, p := range realProxies {
		t.Run(p.rule, func(t *testing.T) {
			t.Parallel()
			px := startProxy(t, p, server.addr(), p.usual)
			for _, end := range []string{"", "/", "/ping"} {
				selfCheck(t, nil, server.dir, "http://"+px.addr+"/notification"+end).good()
			}
		})
	}
	t.Run("tls", func(t *testing.T) { // nginx with a certificate that is trusted
		t.Parallel()
		cert := makeCertificate(t, "127.0.0.1", time.Now().Add(time.Hour))
		port := freePort(t)
		p := nginxCurrent
		p.config = strings.Replace(p.config, "RULE", fmt.Sprintf(
			"ssl_certificate %[1]s;\nssl_certificate_key %[1]s;\nlisten 127.0.0.1:%[2]s ssl;\nRULE", cert.file, port), 1)
		startProxy(t, p, server.addr(), p.usual)
		env := []string{"SSL_CERT_FILE=" + cert.file}
		selfCheckBinary(t, env, server.dir, "https://127.0.0.1:"+port+"/notification").good()
	})
}

// -check serves for monitoring: each request says who asks, the server logs no warning for
// it, and on the same machine it takes well under a second.
func TestCheckForMonitoring(t *testing.T) {
	t.Parallel()
	server := startChecked(t)
	var mu sync.Mutex
	agents := map[string]int{}
	f := front(t, server.url, func(_ http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		agents[r.UserAgent()]++
		return false
	})
	f.Start()
	selfCheck(t, []string{"INNER_NOTIFICATION_SERVER_URL=" + f.URL}, server.dir, f.URL).good()
	mu.Lock()
	defer mu.Unlock()
	// ping, two upgrades, the WebSocket, the event and two forged ones
	if len(agents) != 1 || agents[checkAgent] != 7 {
		t.Errorf("the requests have the User-Agents %v, want 7 of %q", agents, checkAgent)
	}
	withinOnce(t, time.Second, func() { selfCheckBinary(t, nil, server.dir).good() })
	log := server.out.String()
	if strings.Contains(log, "[WARNING]") || strings.Contains(log, "[ERROR]") {
		t.Errorf("-check left warnings in the server's log: %s", log)
	}
	if !strings.Contains(log, checkAgent) {
		t.Errorf("the server's log does not say that -check was there: %s", log)
	}
}

// The tokens that -check posts with are those of Seafile's programs: an event's, a client's
// and a document's, each short-lived.
func TestCheckTokens(t *testing.T) {
	t.Parallel()
	server := startChecked(t)
	var mu sync.Mutex
	var tokens []string
	f := front(t, server.url, func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == "POST" {
			mu.Lock()
			defer mu.Unlock()
			tokens = append(tokens, readToken(r))
		}
		return false
	})
	f.Start()
	selfCheck(t, []string{"INNER_NOTIFICATION_SERVER_URL=" + f.URL}, server.dir).good()
	mu.Lock()
	defer mu.Unlock()
	for i, want := range []string{
		"exp",
		"exp repo_id username",
		"avatar_url default_title exp file_uuid filename name permission username",
	} {
		var claims map[string]any
		if i >= len(tokens) || json.Unmarshal([]byte(tokens[i]), &claims) != nil {
			t.Fatalf("the tokens say %q, want three objects", tokens)
		}
		var names []string
		for name := range claims {
			names = append(names, name)
		}
		slices.Sort(names)
		exp, _ := claims["exp"].(float64)
		left := time.Until(time.Unix(int64(exp), 0))
		if got := strings.Join(names, " "); got != want || left <= 0 || left > time.Hour {
			t.Errorf("token %d has %s and is valid for %v, want %s and at most an hour", i, got, left, want)
		}
	}
}

// A testCertificate is self-signed; file holds it and its private key.
type testCertificate struct {
	tls.Certificate
	file string
}

func makeCertificate(t testing.TB, host string, expires time.Time) testCertificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: host},
		NotBefore:             time.Now().Add(-48 * time.Hour),
		NotAfter:              expires,
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	if ip := net.ParseIP(host); ip != nil {
		c.IPAddresses = []net.IP{ip}
	} else {
		c.DNSNames = []string{host}
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	both := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	both = append(both, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})...)
	file := filepath.Join(t.TempDir(), "certificate.pem")
	if err := os.WriteFile(file, both, 0o600); err != nil {
		t.Fatal(err)
	}
	return testCertificate{tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, file}
}

// explains checks that README.md explains what an administrator sees.
func explains(t testing.TB, phrase string) {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(readme), "`"+phrase+"`") {
		t.Errorf("README.md does not explain %q", phrase)
	}
}

// Each cause that shows in an answer has a message of its own, and is the only cross.
func TestCheckCauses(t *testing.T) {
	t.Parallel()
	server := startChecked(t)
	const page = "<!DOCTYPE html>\n<html lang=\"en\"><title>Log In - Private Seafile</title></html>\n"
	const pong = `{"ret": "pong"}`
	const ping, root = "/notification/ping", "/notification"
	dated := func(ago time.Duration) string {
		return "Date: " + time.Now().Add(-ago).UTC().Format(http.TimeFormat)
	}
	withoutUpgrade := func(_ http.ResponseWriter, r *http.Request) bool {
		r.Header.Del("Upgrade")
		r.Header.Del("Connection")
		return false
	}
	greets := func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != root {
			return false
		}
		websocket.Server{Handler: func(ws *websocket.Conn) {
			io.WriteString(ws, "welcome")
			io.Copy(io.Discard, ws)
		}}.ServeHTTP(w, r)
		return true
	}
	for _, row := range []struct {
		name    string
		instead replacement // of the proxy
		step    string      // that gets the cross
		explain string      // is in README.md, too
		phrase  string
	}{
		{"404", answers("", 404, "404 page not found"), "ping", "answers 404", "rule"},
		{"404-page", answers("", 404, page), "ping", "answers 404", "rule"},
		{"502", answers("", 502, "bad gateway"), "ping", "cannot reach the notification server", "502"},
		{"503", answers("", 503, "unavailable"), "ping", "cannot reach the notification server", "503"},
		{"504", answers("", 504, "time-out"), "ping", "cannot reach the notification server", server.url},
		{"web-page", answers("", 200, page), "ping", "web page", "Seahub"},
		{"login", answers("", 302, "", "Location: /accounts/login/?next=/notification/ping"),
			"ping", "web page", "Seahub"},
		{"https", answers("", 301, "", "Location: https://cloud.example.com/notification/ping"),
			"ping", "redirects to", "give https://cloud.example.com/notification here"},
		{"password", answers("", 401, page), "ping", "asks for a password", "answers 401"},
		{"blocked", answers("", 403, page), "ping", "asks for a password", "answers 403"},
		{"another-service", answers("", 200, `{"status":"ok"}`), "ping", "another service listens there:", "port"},
		{"clock-behind", answers(ping, 200, pong, dated(4*time.Hour)), "ping", "clock differs", "4h"},
		{"clock-ahead", answers(ping, 200, pong, dated(-3*time.Hour)), "ping", "clock differs", "NTP"},

		{"200-upgrade", answers(root, 200, "ok"), "upgrade", "only what is below /notification", "answers 200"},
		{"200-empty", answers(root, 200, ""), "upgrade", "only what is below /notification", "Caddy"},
		{"400-upgrade", answers(root, 400, "bad request"),
			"upgrade", "headers Upgrade and Connection", "answers 400"},
		{"500-upgrade", answers(root, 500, page), "upgrade", "headers Upgrade and Connection", "answers 500"},
		{"headers-lost", withoutUpgrade, "upgrade", "headers Upgrade and Connection", "answers 426"},
		{"502-upgrade", answers(root, 502, "bad gateway"),
			"upgrade", "cannot reach the notification server", server.url},
		{"slash", answers(root, 301, "", "Location: /notification/"),
			"upgrade", "redirects to", "without a slash"},
		{"only-ping-404", answers(root, 404, page), "upgrade", "only what is below /notification", "Caddy"},
		{"only-ping-page", answers(root, 200, page), "upgrade", "only what is below /notification", "Caddy"},
		{"only-ping-login", answers(root, 302, "", "Location: /accounts/login/?next=/notification"),
			"upgrade", "only what is below /notification", "Caddy"},

		{"another-websocket", greets, "subscription", "another service listens there:", "welcome"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			f := front(t, server.url, row.instead)
			f.Start()
			run := selfCheck(t, nil, server.dir, f.URL+"/notification")
			run.says("✓", "configuration")
			run.says("✗", row.step, row.phrase, row.explain)
			run.says("✓", "group members") // does not need the URL
			run.says("-", "connection", "not tried")
			if strings.Count(run.text, "✗") != 1 {
				t.Errorf("more than the one cause: %s", run.text)
			}
			explains(t, row.explain)
		})
	}
}

// Each cause why there is no answer at all has a message of its own.
func TestCheckNoAnswer(t *testing.T) {
	t.Parallel()
	server := startChecked(t)
	overTLS := func(cert testCertificate) string {
		f := front(t, server.url, nil)
		f.TLS = &tls.Config{Certificates: []tls.Certificate{cert.Certificate}}
		f.StartTLS()
		return f.URL
	}
	expired := makeCertificate(t, "127.0.0.1", time.Now().Add(-time.Hour))
	unknown := makeCertificate(t, "127.0.0.1", later())
	other := makeCertificate(t, "other.example.com", later())
	none := t.TempDir()
	// Trusted certificates: expired alone, which is none of the proxy's.
	trustsAnother := []string{"SSL_CERT_FILE=" + expired.file}
	for _, row := range []struct {
		name, url       string
		env             []string
		explain, phrase string
	}{
		{"refused", "http://127.0.0.1:" + freePort(t), nil, "connection refused", "start"},
		{"dns", "http://no-such-host.invalid", nil, "DNS", "spelling"},
		{"untrusted", overTLS(unknown), trustsAnother, "certificate is not trusted", "chain"},
		{"wrong-name", overTLS(other), []string{"SSL_CERT_FILE=" + other.file},
			"certificate is not trusted", "name"},
		{"expired", overTLS(expired), trustsAnother, "renew the proxy's certificate", "clock"},
		{"no-authorities", overTLS(unknown), // as in a container FROM scratch
			[]string{"SSL_CERT_FILE=" + none + "/none", "SSL_CERT_DIR=" + none},
			"no CA certificates found here", "SSL_CERT_FILE"},
		{"ssh", "http://" + startGreeter(t, "SSH-2.0-OpenSSH_9.2\r\n"), nil, "no way leads there", "http://127.0.0.1"},
		{"https-as-http", strings.Replace(overTLS(unknown), "https", "http", 1), nil, "speaks TLS", "https://"},
		{"http-as-https", "https://" + server.addr(), nil, "no way leads there", "reverse"},
		{"no-url", "cloud.example.com", nil, "is no URL", "https://cloud.example.com/notification"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			check := selfCheck
			if row.env != nil {
				check = selfCheckBinary
			}
			run := check(t, row.env, server.dir, row.url+"/notification")
			run.says("✗", "ping", row.explain, row.phrase)
			for _, step := range []string{"upgrade", "subscription", "event", "forgery", "connection"} {
				run.says("-", step, "not tried")
			}
			run.says("✓", "group members")
			explains(t, row.explain)
		})
	}
}

// Without a URL no proxy is asked: what answers at the port is another program.
func TestCheckAnotherService(t *testing.T) {
	t.Parallel()
	const found = "another service listens there"
	for _, row := range []struct {
		name, address string
		phrases       []string
	}{
		{"404", "", []string{"✗ ping: " + found + ": ", "answers 404", "seafile.conf:"}},
		{"ssh", startGreeter(t, "SSH-2.0-OpenSSH_9.2\r\n"), []string{found}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			if row.address == "" {
				f := httptest.NewServer(http.NotFoundHandler())
				t.Cleanup(f.Close)
				row.address = f.Listener.Addr().String()
			}
			_, port, _ := net.SplitHostPort(row.address)
			run := selfCheck(t, nil, writeConfig(t, port))
			run.says("✗", "ping")
			for _, phrase := range row.phrases {
				if !strings.Contains(run.text, phrase) {
					t.Errorf("does not say %q: %s", phrase, run.text)
				}
			}
			if strings.Contains(run.text, "proxy") {
				t.Errorf("blames a proxy: %s", run.text)
			}
		})
	}
}

// startGreeter starts a service that greets, and knows no HTTP.
func startGreeter(t testing.TB, greeting string) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { nc.Close() })
			io.WriteString(nc, greeting)
		}
	}()
	return ln.Addr().String()
}

// What is wrong in a real proxy's rule shows, and what is not wrong does not.
func TestCheckProxyRules(t *testing.T) {
	t.Parallel()
	server := startChecked(t)
	caddy := realProxies[slices.IndexFunc(realProxies, func(p realProxy) bool { return p.rule == "caddy" })]
	for _, row := range []struct {
		name     string
		proxy    realProxy
		from, to string   // what is changed in the rule
		phrases  []string // of the step upgrade; nil: all is good
	}{
		{"no-upgrade", nginxCurrent, "proxy_set_header", "#", []string{"Upgrade", "426"}},
		{"http-1.0", nginxCurrent, "proxy_http_version", "#", nil},
		{"only-ping", caddy, "handle_path /notification*", "handle_path /notification/*",
			[]string{"/notification/ping goes through", "handle_path /notification* instead"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			need(t, row.proxy.program)
			row.proxy.edit = func(rule string) string {
				if !strings.Contains(rule, row.from) {
					t.Fatalf("no %q in the rule: %s", row.from, rule)
				}
				return strings.ReplaceAll(rule, row.from, row.to)
			}
			px := startProxy(t, row.proxy, server.addr(), row.proxy.usual)
			run := selfCheck(t, nil, server.dir, "http://"+px.addr+"/notification")
			if row.phrases == nil {
				run.good()
				return
			}
			run.says("✗", "upgrade", row.phrases...)
		})
	}
}

// What is wrong with events, seen from where seaf-server posts them, has messages of its own.
func TestCheckEvents(t *testing.T) {
	t.Parallel()
	server := startChecked(t)
	accepts := func(claim string) replacement {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(readToken(r), claim) {
				return false
			}
			return answers("", 200, `{"subscribers":0}`)(w, r)
		}
	}
	twice := func(_ http.ResponseWriter, r *http.Request) bool {
		body, _ := io.ReadAll(r.Body)
		request(t, "POST", server.url+"/events", string(body), "Authorization: "+r.Header.Get("Authorization"))
		r.Body = io.NopCloser(bytes.NewReader(body))
		return false
	}
	for _, row := range []struct {
		name    string
		instead replacement
		step    string
		phrases []string
	}{
		{"client's token accepted", accepts(`"username":"check@example.com"`),
			"forgery", []string{"answers 200", "with a client's token", "forged", "Seafile ships"}},
		{"document's token accepted", accepts(`"file_uuid"`),
			"forgery", []string{"answers 200", "with a document's token", "forged", "Seafile ships"}},
		{"first of cluster down", func(w http.ResponseWriter, r *http.Request) bool {
			event := readToken(r)
			if !strings.Contains(event, "username") {
				return false
			}
			return answers("", 200, `{"ret": "pong"}`)(w, r)
		}, "forgery", []string{"first server of the cluster"}},
		{"event refused", answers("", 403, "no events here"), "event", []string{"answers 403", "no events here"}},
		{"no such path", answers("", 404, "not found"), "event", []string{"/events answers 404"}},
		{"event twice", twice, "connection", []string{"came twice"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			f := front(t, server.url, row.instead)
			f.Start()
			run := selfCheck(t, []string{"INNER_NOTIFICATION_SERVER_URL=" + f.URL + "/"}, server.dir)
			run.says("✗", row.step, row.phrases...)
		})
	}
}

// A proxy that ends connections as soon as it has passed something on shows at the end.
func TestCheckClosedEarly(t *testing.T) {
	t.Parallel()
	server := startChecked(t)
	closes := front(t, server.url, func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Upgrade") == "" {
			return false
		}
		websocket.Server{Handler: func(ws *websocket.Conn) {
			var subscribe string
			if websocket.Message.Receive(ws, &subscribe) != nil {
				return
			}
			websocket.Message.Send(ws, expiredText("broken"))
			_, rest, _ := strings.Cut(subscribe, `"id":"`)
			repoID, _, _ := strings.Cut(rest, `"`)
			websocket.Message.Send(ws, update(repoID, "check"))
		}}.ServeHTTP(w, r)
		return true
	})
	closes.Start()
	run := selfCheck(t, nil, server.dir, closes.URL)
	run.says("✓", "event")
	run.says("✗", "connection", "no answer after a ping", closes.URL)
}

// What the senders need is named, in the way of configuration that was found, and what can be
// seen of it and is wrong gets a cross or a note. Faults of the file end no step but their own.
func TestCheckSenders(t *testing.T) {
	t.Parallel()
	server := startChecked(t)
	_, port, _ := net.SplitHostPort(server.addr())
	other := freePort(t)
	key := "jwt_private_key = " + testKey + "\n"
	fileWith := func(host, port string) string {
		return "[notification]\nenabled = true\nhost = " + host + "\nport = " + port + "\n" + key
	}
	const listen = "NOTIFICATION_SERVER_PORT="
	byEnvironment := func(more ...string) []string {
		return append([]string{"JWT_PRIVATE_KEY=" + testKey, listen + port}, more...)
	}
	for _, row := range []struct {
		name    string
		file    string
		env     []string
		crosses string // how many lines of each step are crosses
		phrases []string
	}{
		{"file", fileWith("0.0.0.0", port), nil, "",
			[]string{"Seafile 10 to 12", "enabled = true, host and port", "posts to http://0.0.0.0:" + port}},
		{"file for a port that is not ours", fileWith("127.0.0.1", other),
			[]string{listen + port}, "event",
			[]string{"note: senders post to http://127.0.0.1:" + other,
				"the server listens on 127.0.0.1:" + port}},
		{"faults", "[notification]\nenabled = True\nport = " + port + "\n" + key, nil, "senders senders",
			[]string{"seafile.conf:2: ", "enabled", "host"}},
		{"host with a fault", fileWith("::1", port), []string{"NOTIFICATION_SERVER_HOST=127.0.0.1"},
			"senders", []string{"seafile.conf:3: ", "[::1]"}},
		{"environment", "", byEnvironment(), "",
			[]string{"Seafile 12 to 14", "ENABLE_NOTIFICATION_SERVER=true (here: not set)",
				"INNER_NOTIFICATION_SERVER_URL=http://HOST:" + port + " (here: not set)",
				"in 12 it needs enabled = true, host and port"}},
		{"environment of the senders", "",
			byEnvironment("ENABLE_NOTIFICATION_SERVER=true", "INNER_NOTIFICATION_SERVER_URL="+server.url), "",
			[]string{"(here: true)", "(here: " + server.url + ")"}},
		{"off", "", byEnvironment("ENABLE_NOTIFICATION_SERVER=True"), "senders",
			[]string{"ENABLE_NOTIFICATION_SERVER", `"True"`, "no events"}},
		{"no URL", "", byEnvironment("INNER_NOTIFICATION_SERVER_URL=127.0.0.1:" + port), "senders event",
			[]string{"INNER_NOTIFICATION_SERVER_URL", "no URL"}},
		{"URL of a port that is not ours", "",
			byEnvironment("INNER_NOTIFICATION_SERVER_URL=http://127.0.0.1:" + other), "event",
			[]string{"note: senders post to http://127.0.0.1:" + other}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "seafile.conf"), []byte(row.file), 0o600); err != nil {
				t.Fatal(err)
			}
			run := selfCheck(t, row.env, dir)
			var crosses []string
			for line := range strings.Lines(run.text) {
				if rest, found := strings.CutPrefix(line, "✗ "); found {
					step, _, _ := strings.Cut(rest, ": ")
					crosses = append(crosses, step)
				}
			}
			if got := strings.Join(crosses, " "); got != row.crosses {
				t.Errorf("crosses for %q, want %q: %s", got, row.crosses, run.text)
			}
			mark := "✓"
			if strings.HasPrefix(row.crosses, "senders") {
				mark = "✗"
			}
			run.says(mark, "senders", row.phrases...)
		})
	}
}

// A URL of the senders is compared with the address to listen on as far as that needs no DNS.
func TestCheckListenedAt(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		host, url string
		want      bool
	}{
		{"0.0.0.0", "http://192.0.2.1:8083", true},
		{"0.0.0.0", "http://notification-server:8083/", true},
		{"::", "http://[2001:db8::1]:8083", true},
		{"127.0.0.1", "http://127.0.0.1:8083", true},
		{"127.0.0.1", "http://localhost:8083", true},
		{"127.0.0.1", "http://0.0.0.0:8083", true}, // which Linux takes for 127.0.0.1
		{"192.0.2.1", "http://seafile.example.com:8083", true},
		{"seafile.example.com", "http://192.0.2.1:8083", true},
		{"127.0.0.1", "https://cloud.example.com", true}, // by way of a proxy
		{"127.0.0.1", "http://cloud.example.com/notification", true},
		{"127.0.0.1", "http://192.0.2.1:8083", false},
		{"192.0.2.1", "http://localhost:8083", false},
		{"0.0.0.0", "http://192.0.2.1:8084", false},
		{"0.0.0.0", "http://notification-server", false},
		{"0.0.0.0", "http://::1:8083", false},
	} {
		c := &checker{cfg: &config{host: row.host, port: "8083"}}
		if got := c.isListenedAt(row.url); got != row.want {
			t.Errorf("%s leads to a server that listens on %s, port 8083: %v, want %v",
				row.url, row.host, got, row.want)
		}
	}
}

// Another key than the running server's shows where tokens are looked at.
func TestCheckKey(t *testing.T) {
	t.Parallel()
	server := startChecked(t)
	_, port, _ := net.SplitHostPort(server.addr())
	run := selfCheck(t, []string{
		"JWT_PRIVATE_KEY=" + strings.Repeat("k", 40), "NOTIFICATION_SERVER_PORT=" + port,
	}, server.dir)
	run.says("✗", "subscription", "another jwt_private_key", "restart")
	run.says("-", "event", "not tried")
	run.says("✗", "forgery", "jwt_private_key")
}

// A proxy answers with its own Date, as nginx does: then a clock that is ahead shows in what
// the server refuses.
func TestCheckClockBehindProxy(t *testing.T) {
	t.Parallel()
	port, fault := freePort(t), filepath.Join(t.TempDir(), "clock")
	setFault(t, fault, "10m")
	dir := writeConfig(t, port)
	startSelf(t, fault, port, "-c", dir)
	run := selfCheck(t, nil, dir)
	run.says("✗", "subscription", "clock is ahead")
	run.says("✗", "forgery", "expired", "the clocks of this machine and of seaf-server's differ")
}

// Without seafile.sock notifications work, and a note says what does not.
func TestCheckNoGroups(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	dir := writeConfig(t, port)
	startBinary(t, port, nil, "-c", dir)
	run := selfCheck(t, nil, dir)
	run.good()
	run.says("✓", "group members", "not needed in the Community Edition; Pro: ", "SEAFILE_RPC_PIPE_PATH", "reconnect")
	if n := strings.Count(run.text, "seafile.sock"); n != 2 { // the path, and the words behind it
		t.Errorf("%d paths are named, want the first one: %s", n, run.text)
	}
}

// What the log says of the configuration at a start, -check says, too.
func TestCheckConfiguration(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, text, mark string
		phrases          []string
	}{
		{"no-key", "[notification]\nport = 8083\n", "✗", []string{"jwt_private_key", "openssl"}},
		{"bad-port", "[notification]\nport = x\njwt_private_key = " + testKey, "✗",
			[]string{"seafile.conf:2", "port"}},
		{"disabled", "[notification]\nenabled = false\njwt_private_key = " + testKey, "✗",
			[]string{"seafile.conf:2 says enabled = false"}},
		{"short-key", "[notification]\nenabled = true\nhost = 127.0.0.1\nport = 1\njwt_private_key = short",
			"✓", []string{"WARNING: ", "32 bytes"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "seafile.conf"), []byte(row.text), 0o600); err != nil {
				t.Fatal(err)
			}
			run := selfCheck(t, nil, dir)
			run.says(row.mark, "configuration", row.phrases...)
			if row.mark == "✗" {
				for _, step := range checkSteps[1:] {
					run.says("-", step, "not tried")
				}
			}
		})
	}
}

// README.md shows what a good run looks like, with its steps, and a bad one.
func TestCheckShown(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range checkSteps {
		if !strings.Contains(string(readme), "✓ "+step+": ") {
			t.Errorf("README.md does not show the step %q", step)
		}
	}
	for _, line := range []string{"✗ ping: ", "- upgrade: not tried", "It works: ", "It does not work: "} {
		if !strings.Contains(string(readme), "\n"+line) {
			t.Errorf("README.md shows no line that begins with %q", line)
		}
	}
}

// In a cluster an event posted once must reach every server.
func TestCheckSeveral(t *testing.T) {
	t.Parallel()
	first, second := startChecked(t), startChecked(t)
	mirror := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		for _, server := range []checked{second, first} {
			answer, text := request(t, r.Method, server.url+r.URL.Path, string(body),
				"Authorization: "+r.Header.Get("Authorization"))
			if server == first {
				w.WriteHeader(answer.StatusCode)
				io.WriteString(w, text)
			}
		}
	}))
	t.Cleanup(mirror.Close)

	env := []string{"INNER_NOTIFICATION_SERVER_URL=" + mirror.URL}
	run := selfCheck(t, env, first.dir, first.url, second.url)
	run.good()
	run.says("✓", "ping", first.url, second.url)
	run.says("✓", "event", mirror.URL)

	run = selfCheck(t, nil, first.dir, first.url, second.url)
	run.says("✗", "event", second.url, "different servers")
	run.says("-", "connection", "not tried") // an event that came late would look like one that came twice
}

// However slow the answers are, 15 s are enough for all steps.
func TestCheckTime(t *testing.T) {
	t.Parallel()
	server := startChecked(t)
	slow := front(t, server.url, func(w http.ResponseWriter, r *http.Request) bool {
		time.Sleep(3400 * time.Millisecond) // the time is the point
		if r.Header.Get("Upgrade") == "" {
			return false
		}
		websocket.Server{Handler: func(ws *websocket.Conn) { io.Copy(io.Discard, ws) }}.ServeHTTP(w, r)
		return true
	})
	slow.Start()
	for _, row := range []struct{ name, url, step, phrase string }{
		{"no answer", "http://" + startGreeter(t, ""), "ping", "no answer in"},
		{"slow answers, then none", slow.URL, "subscription", "the steps together"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			run := selfCheck(t, nil, server.dir, row.url+"/notification")
			run.says("✗", row.step, row.phrase)
			if run.took > 15*time.Second {
				t.Errorf("took %v: %s", run.took, run.text)
			}
		})
	}
}

// ---- Metrics ----

// Names, types, help and form are a promise to those who have alerts and graphs of them.
// Samples are sorted, a delivery counts for the bucket whose bound it does not exceed, and
// what has a counter shows it.
func TestMetricsText(t *testing.T) {
	t.Parallel()
	m := newMetrics(time.Unix(1700000000, 5))
	for _, kind := range []string{"repo-update", "file-lock-changed", "repo-update"} {
		m.events.add(kind)
	}
	m.refused.add("signature")
	m.closed.add(outboxFull)
	m.closed.add("client")
	m.lookups.add("ok")
	for _, d := range []time.Duration{time.Millisecond, time.Millisecond + 1, 30 * time.Second, 31 * time.Second} {
		m.delivered(d)
	}
	var text strings.Builder
	m.write(&text, gauges{connections: 1, subscriptions: 2, libraries: 3, waiting: 4, remembered: 5, logLinesDropped: 6})
	got, machine, _ := strings.Cut(text.String(), "# HELP process_resident_memory_bytes")
	want := `# HELP seafile_notification_connections Clients connected by WebSocket.
# TYPE seafile_notification_connections gauge
seafile_notification_connections 1
# HELP seafile_notification_subscriptions Subscriptions of clients to libraries.
# TYPE seafile_notification_subscriptions gauge
seafile_notification_subscriptions 2
# HELP seafile_notification_libraries Libraries with at least one subscription.
# TYPE seafile_notification_libraries gauge
seafile_notification_libraries 3
# HELP seafile_notification_waiting_events Events that wait for group members.
# TYPE seafile_notification_waiting_events gauge
seafile_notification_waiting_events 4
# HELP seafile_notification_remembered_updates Updates that new subscriptions are told.
# TYPE seafile_notification_remembered_updates gauge
seafile_notification_remembered_updates 5
# HELP seafile_notification_events_total Events accepted.
# TYPE seafile_notification_events_total counter
seafile_notification_events_total{type="file-lock-changed"} 1
seafile_notification_events_total{type="repo-update"} 2
# HELP seafile_notification_refused_total Events, subscriptions and clients refused.
# TYPE seafile_notification_refused_total counter
seafile_notification_refused_total{reason="signature"} 1
# HELP seafile_notification_closed_total Connections ended.
# TYPE seafile_notification_closed_total counter
seafile_notification_closed_total{reason="client"} 1
seafile_notification_closed_total{reason="outbox-full"} 1
# HELP seafile_notification_group_lookups_total Questions for the members of a group.
# TYPE seafile_notification_group_lookups_total counter
seafile_notification_group_lookups_total{result="ok"} 1
# HELP seafile_notification_delivery_seconds Time from accepting or repeating an event to having written it to a client.
# TYPE seafile_notification_delivery_seconds histogram
seafile_notification_delivery_seconds_bucket{le="0.001"} 1
seafile_notification_delivery_seconds_bucket{le="0.005"} 2
seafile_notification_delivery_seconds_bucket{le="0.01"} 2
seafile_notification_delivery_seconds_bucket{le="0.05"} 2
seafile_notification_delivery_seconds_bucket{le="0.1"} 2
seafile_notification_delivery_seconds_bucket{le="0.5"} 2
seafile_notification_delivery_seconds_bucket{le="1"} 2
seafile_notification_delivery_seconds_bucket{le="5"} 2
seafile_notification_delivery_seconds_bucket{le="30"} 3
seafile_notification_delivery_seconds_bucket{le="+Inf"} 4
seafile_notification_delivery_seconds_sum 61.002000001
seafile_notification_delivery_seconds_count 4
# HELP seafile_notification_deliveries_total Events written to clients.
# TYPE seafile_notification_deliveries_total counter
seafile_notification_deliveries_total 4
# HELP seafile_notification_outbox_full_total Clients closed since they were too slow.
# TYPE seafile_notification_outbox_full_total counter
seafile_notification_outbox_full_total 1
# HELP seafile_notification_log_lines_dropped_total Lines of the log that were dropped.
# TYPE seafile_notification_log_lines_dropped_total counter
seafile_notification_log_lines_dropped_total 6
# HELP process_start_time_seconds Start of the process, in Unix time.
# TYPE process_start_time_seconds gauge
process_start_time_seconds 1700000000
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	for _, line := range []string{
		"# TYPE process_resident_memory_bytes gauge\n",
		"# HELP go_goroutines Goroutines.\n# TYPE go_goroutines gauge\n",
	} {
		if !strings.Contains(machine, line) {
			t.Errorf("the end lacks %q: %q", line, machine)
		}
	}
	lintMetrics(t, text.String())
}

// lintMetrics has Prometheus' own tool check the metrics.
func lintMetrics(t *testing.T, text string) {
	t.Helper()
	need(t, "promtool")
	promtool := exec.Command("promtool", "check", "metrics")
	promtool.Stdin = strings.NewReader(text)
	if out, err := promtool.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics: %v: %s", err, out)
	}
}

// wantFigures waits until each of these metrics has its value, and holds the sums of all
// deliveries to what is possible.
func wantFigures(t *testing.T, m *metered, want map[string]float64) {
	t.Helper()
	for name, value := range want {
		m.waitFigure(name, value)
	}
	have := scrape(t, m.metrics)
	if have["delivery_seconds_sum"] <= 0 || have["delivery_seconds_sum"] > 60 {
		t.Errorf("%v seconds for all deliveries", have["delivery_seconds_sum"])
	}
	last := 0.0
	for _, bound := range []string{"0.001", "0.005", "0.01", "0.05", "0.1", "0.5", "1", "5", "30", "+Inf"} {
		count, known := have[`delivery_seconds_bucket{le="`+bound+`"}`]
		if !known || count < last {
			t.Errorf("bucket %s has %v (there: %v), the one before %v", bound, count, known, last)
		}
		last = count
	}
}

// All that happens to events, clients and questions is counted; SIGUSR2 writes the same
// figures to the log, in one line; and they are on their own address alone.
func TestMetrics(t *testing.T) {
	t.Parallel()
	s := startMetered(t, 0)
	seaf := startSeafServer(t, socketBeside(t, s.dir), membersReply("alice@example.com"))
	checkFirstFigures(t, s)

	desktop := connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com").subscribed(repoB, "alice@example.com")
	browser := connect(t, s.addr, asBrowser).subscribed(repoA, "bob@example.com")
	post(t, s.addr, numbered(repoB, 1, 0), 1) // a lock
	post(t, s.addr, commentEvent(repoA), 2)
	group := permEvent("group", "", "7")
	postWith(t, s.addr, group, eventToken(later()))
	post(t, s.addr, update(repoA, "1"), 2)
	desktop.expectTexts(numbered(repoB, 1, 0), commentEvent(repoA), group, update(repoA, "1"))
	browser.expectTexts(commentEvent(repoA), update(repoA, "1"))
	desktop.expectTexts(update(repoA, "1")) // the desktop client is told an update twice
	desktop.subscribe(repoA, "x.y.z")
	desktop.expect(opText, expiredText(repoA))
	events, ofClient := "http://"+s.addr+"/events", clientToken(repoA, "alice@example.com", later())
	request(t, "POST", events, update(repoA, "2"), tokenLine(ofClient))
	request(t, "POST", events, `{}`, tokenLine(eventToken(later())))
	request(t, "POST", events, update(repoA, "2"))
	want := map[string]float64{
		"connections":                              2,
		"subscriptions":                            3,
		"libraries":                                2,
		"waiting_events":                           0,
		"remembered_updates":                       1,
		"deliveries_total":                         7,
		"delivery_seconds_count":                   7,
		`delivery_seconds_bucket{le="+Inf"}`:       7,
		`events_total{type="repo-update"}`:         1,
		`events_total{type="file-lock-changed"}`:   1,
		`events_total{type="comment-update"}`:      1,
		`events_total{type="folder-perm-changed"}`: 1,
		`refused_total{reason="malformed"}`:        1,
		`refused_total{reason="client-token"}`:     1,
		`refused_total{reason="bad-event"}`:        1,
		`refused_total{reason="no-token"}`:         1,
		`group_lookups_total{result="ok"}`:         1,
	}
	wantFigures(t, s, want)

	seaf.ln.Close() // from now on seaf-server does not answer
	postWith(t, s.addr, group, eventToken(later()))
	desktop.expectClose(statusRestart)
	browser.expectClose(statusRestart)
	leaves := connect(t, s.addr, asBrowser).subscribed(repoB, "bob@example.com")
	leaves.write(maskedFrame(0x80|opClose, nil))
	leaves.expectClose(statusNone)
	vanishes := connect(t, s.addr, asBrowser)
	vanishes.nc.Close()
	for name, value := range map[string]float64{
		"connections":                              0,
		"subscriptions":                            0,
		"libraries":                                0,
		"waiting_events":                           0,
		"outbox_full_total":                        0,
		"log_lines_dropped_total":                  0,
		`group_lookups_total{result="failed"}`:     1,
		`events_total{type="folder-perm-changed"}`: 2,
		`closed_total{reason="resync"}`:            2,
		`closed_total{reason="client"}`:            1,
		`closed_total{reason="gone"}`:              1,
	} {
		want[name] = value
	}
	wantFigures(t, s, want)
	checkLoggedFigures(t, s, want)
	for url, status := range map[string]int{
		"http://" + s.addr + "/metrics":              http.StatusNotFound, // never on the public port
		"http://" + s.addr + "/notification/metrics": http.StatusNotFound,
		"http://" + s.metrics + "/":                  http.StatusNotFound, // and nothing else on its own
		"http://" + s.metrics + "/ping":              http.StatusNotFound,
		"http://" + s.metrics + "/events":            http.StatusNotFound,
	} {
		if answer, _ := request(t, "GET", url, ""); answer.StatusCode != status {
			t.Errorf("%s answers %s, want %d", url, answer.Status, status)
		}
	}
}

// checkFirstFigures checks what a server shows that nobody has used yet.
func checkFirstFigures(t *testing.T, s *metered) {
	t.Helper()
	first := scrape(t, s.metrics)
	for name, most := range map[string]float64{
		"connections":                        0,
		"subscriptions":                      0,
		"libraries":                          0,
		"waiting_events":                     0,
		"remembered_updates":                 0,
		"deliveries_total":                   0,
		"outbox_full_total":                  0,
		"log_lines_dropped_total":            0,
		"delivery_seconds_count":             0,
		"delivery_seconds_sum":               0,
		`delivery_seconds_bucket{le="+Inf"}`: 0,
		"go_goroutines":                      30,
		"process_resident_memory_bytes":      100 << 20,
		"process_start_time_seconds":         1e12,
	} {
		if value, known := first[name]; !known || value > most {
			t.Errorf("at the start, %s is %v (there: %v)", name, value, known)
		}
	}
	started := time.Unix(int64(first["process_start_time_seconds"]), 0)
	if time.Since(started).Abs() > time.Minute ||
		first["go_goroutines"] < 1 || first["process_resident_memory_bytes"] < 1<<20 {
		t.Errorf("at the start: %v", first)
	}
}

// checkLoggedFigures checks the line that SIGUSR2 writes to the log.
func checkLoggedFigures(t *testing.T, s *metered, want map[string]float64) {
	t.Helper()
	s.Process.Signal(syscall.SIGUSR2)
	line := ""
	waitFor(t, "the line in the log", func() bool {
		_, after, _ := strings.Cut(s.out.String(), "[INFO] metrics: ")
		var whole bool
		line, _, whole = strings.Cut(after, "\n")
		return whole
	})
	words := strings.Fields(line)
	logged := map[string]string{}
	for i := 0; i+1 < len(words); i += 2 {
		logged[strings.TrimPrefix(words[i], "seafile_notification_")] = words[i+1]
	}
	for name := range scrape(t, s.metrics) {
		if logged[name] == "" {
			t.Errorf("the line lacks %s: %s", name, line)
		}
	}
	for name, value := range want {
		if number, err := strconv.ParseFloat(logged[name], 64); err != nil || number != value {
			t.Errorf("the line says %s %q, want %v: %s", name, logged[name], value, line)
		}
	}
}

// The metrics are served on the address that is configured, and nowhere without one.
func TestMetricsAddress(t *testing.T) {
	t.Parallel()
	t.Run("off by default", func(t *testing.T) {
		t.Parallel()
		port := freePort(t)
		p := startBinary(t, port, nil, "-c", writeConfig(t, port))
		if n := listeningSockets(t, p.Process.Pid); n != 1 {
			t.Errorf("it listens on %d addresses, want the public one only", n)
		}
		if answer, _ := request(t, "GET", "http://127.0.0.1:"+port+"/metrics", ""); answer.StatusCode != 404 {
			t.Errorf("/metrics on the public port answers %s", answer.Status)
		}
	})
	t.Run("the environment comes first", func(t *testing.T) {
		t.Parallel()
		port, file, env := freePort(t), "127.0.0.1:"+freePort(t), "127.0.0.1:"+freePort(t)
		startBinary(t, port, []string{"NOTIFICATION_SERVER_METRICS=" + env}, "-c", writeConfig(t, port, "metrics = "+file))
		if _, known := scrape(t, env)["connections"]; !known {
			t.Error("the metrics are not where NOTIFICATION_SERVER_METRICS says")
		}
		if nc, err := net.DialTimeout("tcp", file, patient); err == nil {
			nc.Close()
			t.Error("the metrics are also where the file says")
		}
	})
	for _, tc := range []struct{ name, metrics, says string }{
		{"not an address", "9083", "metrics must be HOST:PORT, as in 127.0.0.1:9083, not \"9083\""},
		{"the public port", "", "address already in use: set metrics to an address of this machine with a port that is free"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			port := freePort(t)
			if tc.metrics == "" {
				tc.metrics = "127.0.0.1:" + port
			}
			status, _, says := runOnce(t, nil, "-c", writeConfig(t, port, "metrics = "+tc.metrics))
			if status != 1 || !strings.Contains(says, tc.says) {
				t.Errorf("exit status %d, and it says %q; want 1 and %q", status, says, tc.says)
			}
		})
	}
}

// listeningSockets tells on how many TCP addresses a process listens.
func listeningSockets(t *testing.T, pid int) (n int) {
	t.Helper()
	tcp, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp", pid))
	if err != nil {
		t.Fatal(err)
	}
	listening := map[string]bool{} // by inode
	for line := range strings.Lines(string(tcp)) {
		if f := strings.Fields(line); len(f) > 9 && f[3] == "0A" {
			listening["socket:["+f[9]+"]"] = true
		}
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if target, _ := os.Readlink(dir + "/" + file.Name()); listening[target] {
			n++
		}
	}
	return n
}

// ---- Log ----
//
// First the logger alone, then what a whole server logs, and that no log holds it up.

// What the log says on standard error begins so.
const (
	notWritten = "notification-server: cannot write the log: "
	notOpened  = "notification-server: cannot open the log: "
)

// testLog is a logger that writes to out, at level debug, until the test ends.
func testLog(t testing.TB, out io.Writer) *logger {
	t.Helper()
	start := time.Now()
	lg := openLog("-", false, io.Discard, out, func() time.Duration { return time.Since(start) })
	lg.setLevel(slog.LevelDebug)
	t.Cleanup(lg.close)
	return lg
}

// fileLog is a logger that writes to the file at path; stderr is its standard error.
func fileLog(t testing.TB, path string, stderr io.Writer) *logger {
	t.Helper()
	start := time.Now()
	lg := openLog(path, false, io.Discard, stderr, func() time.Duration { return time.Since(start) })
	t.Cleanup(lg.close)
	return lg
}

// texts returns the lines of a log without time and level.
func texts(log string) (all []string) {
	for line := range strings.Lines(log) {
		line = strings.TrimPrefix(line, "[notification-server] ")
		_, text, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "] [")
		_, text, _ = strings.Cut(text, "] ")
		all = append(all, text)
	}
	return all
}

// missingText is the text of the line that says that n lines are missing.
func missingText(n int) string {
	return fmt.Sprintf("lines are missing here: %d: the log could not be written, or not fast enough", n)
}

// A gate is an output that takes nothing until it is opened.
type gate struct {
	syncBuffer
	opened chan struct{}
}

func newGate() *gate { return &gate{opened: make(chan struct{})} }

func (g *gate) open() { close(g.opened) }

func (g *gate) Write(p []byte) (int, error) {
	<-g.opened
	return g.syncBuffer.Write(p)
}

// No text, wherever it comes from, breaks a line or a terminal, and what can be read stays
// as it is.
func TestLogEscapes(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ name, text, want string }{
		{"plain", `a "quoted" \n \ ~`, `a "quoted" \n \ ~`},
		{"printable", "é ß 漢字 😀 ‰", "é ß 漢字 😀 ‰"},
		{"line ends", "a\r\nb\n[2026-01-01 00:00:00] [ERROR] x", `a\r\nb\n[2026-01-01 00:00:00] [ERROR] x`},
		{"control characters", "\x00\t\x07\x1b[2J\x1f", `\x00\t\a\x1b[2J\x1f`},
		{"DEL", "\x7f", `\x7f`},
		{"C1 control characters", "\u0080\u0085\u009b31m\u009f", `\u0080\u0085\u009b31m\u009f`},
		{"separators of lines", "\u2028\u2029", `\u2028\u2029`},
		{"direction marks", "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c",
			`\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c`},
		{"invisible", "\u200b\ufeff\U000e0041", `\u200b\ufeff\U000e0041`},
		{"no UTF-8", "a\x80\xff\xc3(\xed\xa0\x80", `a\x80\xff\xc3(\xed\xa0\x80`},
		{"the replacement character itself", "\ufffd", "\ufffd"},
		{"cut in the middle of a character", "é"[:1], `\xc3`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			var out syncBuffer
			lg := testLog(t, &out)
			lg.warnf("<%s>", tc.text)
			lg.Write([]byte("<" + tc.text + "> \n")) // as net/http does
			lg.close()
			if got, want := out.String(), "<"+tc.want+">"; strings.Join(texts(got), "") != want+want {
				t.Errorf("%q is logged as %q, want %q", tc.text, got, want)
			}
			checkLog(t, out.String(), "")
		})
	}
}

// Each level logs itself and what is worse; a level that changes holds from then on.
func TestLogLevel(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		level slog.Level
		want  string
	}{
		{slog.LevelDebug, "DEBUG INFO WARNING ERROR"},
		{slog.LevelInfo, "INFO WARNING ERROR"},
		{slog.LevelWarn, "WARNING ERROR"},
		{slog.LevelError, "ERROR"},
	} {
		t.Run(tc.level.String(), func(t *testing.T) {
			t.Parallel()
			var out syncBuffer
			lg := testLog(t, &out)
			lg.setLevel(tc.level)
			lg.debugf("x")
			lg.infof("x")
			lg.warnf("x")
			lg.errorf("x")
			lg.close()
			var got []string
			for line := range strings.Lines(out.String()) {
				got = append(got, strings.Trim(strings.Fields(line)[2], "[]"))
			}
			if strings.Join(got, " ") != tc.want || lg.debugEnabled() != (tc.level == slog.LevelDebug) {
				t.Errorf("logged %q, want %s; debug enabled: %v", got, tc.want, lg.debugEnabled())
			}
		})
	}
}

// What repeats is logged once a minute for each key, by the uptime, and the keys that are
// remembered are bounded.
func TestLogOnce(t *testing.T) {
	t.Parallel()
	var out syncBuffer
	clk := &fakeClock{}
	lg := openLog("", false, io.Discard, &out, clk.clock().uptime)
	for _, step := range []time.Duration{0, 59 * time.Second, time.Second, time.Second, 59 * time.Second} {
		clk.move(-time.Hour, step)
		lg.warnOnce("a", "a at %v", clk.uptime)
		if lg.takeMinute("b") {
			lg.infof("b at %v", clk.uptime)
		}
	}
	for n := range 3 * maxLogKeys {
		lg.warnOnce(fmt.Sprint(n), "key")
	}
	if len(lg.quiet) > maxLogKeys {
		t.Errorf("%d keys are remembered", len(lg.quiet))
	}
	lg.close()
	got, _, _ := strings.Cut(strings.Join(texts(out.String()), ", "), ", key")
	if want := "a at 0s, b at 0s, a at 1m0s, b at 1m0s, a at 2m0s, b at 2m0s"; got != want {
		t.Errorf("logged %s, want %s", got, want)
	}
}

// A log that keeps up loses no line, and the lines of a goroutine keep their order, also
// while the file is renamed again and again.
func TestLogKeepsUp(t *testing.T) {
	t.Parallel()
	const writers, each, renames = 8, 2000, 20
	path := filepath.Join(t.TempDir(), "log")
	var stderr syncBuffer
	lg := fileLog(t, path, &stderr)
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for n := range each {
				lg.infof("%d %d %s", w, n, strings.Repeat("x", n%200))
			}
		})
	}
	files := 0
	for range renames {
		waitFor(t, "the log file", func() bool { _, err := os.Stat(path); return err == nil })
		os.Rename(path, fmt.Sprintf("%s.%d", path, files))
		files++
		lg.wake()
	}
	waitFor(t, "the log file", func() bool { _, err := os.Stat(path); return err == nil })
	wg.Wait()
	lg.close()
	os.Rename(path, fmt.Sprintf("%s.%d", path, files))
	next := map[int]int{}
	for i := range files + 1 {
		text, err := os.ReadFile(fmt.Sprintf("%s.%d", path, i))
		if err != nil {
			t.Fatal(err)
		}
		checkLog(t, string(text), "")
		for _, line := range texts(string(text)) {
			var w, n int
			if fmt.Sscan(line, &w, &n); n != next[w] {
				t.Fatalf("line %q of file %d, want number %d", line, i, next[w])
			}
			next[w]++
		}
	}
	for w := range writers {
		if next[w] != each {
			t.Errorf("%d of %d lines of writer %d", next[w], each, w)
		}
	}
	if n := lg.linesDropped(); n > 0 || stderr.String() != "" {
		t.Errorf("%d lines lost; standard error: %q", n, stderr.String())
	}
}

// Nobody waits for an output that takes nothing. Its queue is bounded; what is dropped is
// counted, and said in one line in its place, once the output takes lines again.
func TestLogDropsLines(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		out := newGate()
		lg := testLog(t, out)
		lg.infof("first")
		synctest.Wait() // it is being written now
		text := strings.Repeat("x", 1000)
		start := time.Now()
		const logged = 3 * maxLogQueue / 1000
		for range logged {
			lg.debugf("%s", text)
		}
		if took := time.Since(start); took > 0 {
			t.Errorf("waited %v", took)
		}
		lost := lg.linesDropped()
		if size := len(lg.queue); size > maxLogQueue+1100 || size < maxLogQueue-1100 {
			t.Errorf("%d bytes wait", size)
		}
		out.open()
		synctest.Wait()
		lg.infof("after")
		synctest.Wait()
		got := texts(out.String())
		missing := missingText(lost)
		n := len(got)
		if lost == 0 || n != logged+3-lost { // the line that tells it is one more
			t.Errorf("%d lines of %d are written, and %d are counted as lost", n, logged+2, lost)
		}
		if got[0] != "first" || got[n-3] != text || got[n-2] != missing || got[n-1] != "after" {
			t.Errorf("written: %.100q ... %.100q", got[0], got[n-3:])
		}
		checkLog(t, out.String(), "")
	})
}

// A line has the time at which it was logged, not written.
func TestLogTimeOfLine(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		out := newGate()
		lg := testLog(t, out)
		at := time.Now()
		lg.infof("first")
		time.Sleep(time.Hour)
		lg.infof("second")
		out.open()
		synctest.Wait()
		want := at.Format("[2006-01-02 15:04:05] [INFO] first\n") +
			at.Add(time.Hour).Format("[2006-01-02 15:04:05] [INFO] second\n")
		if out.String() != want {
			t.Errorf("logged %q, want %q", out.String(), want)
		}
	})
}

// At the end the log has 100 ms to write what is left, and takes no longer than it needs.
func TestLogEnd(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		opens   time.Duration // when the output takes lines
		takes   time.Duration
		written int
	}{
		{"at once", 0, 0, 1000},
		{"soon", 99 * time.Millisecond, 99 * time.Millisecond, 1000},
		{"never", time.Hour, 100 * time.Millisecond, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				out := newGate()
				lg := openLog("-", false, io.Discard, out, func() time.Duration { return 0 })
				for n := range 1000 {
					lg.infof("%d", n)
				}
				if tc.opens == 0 {
					out.open()
				} else {
					time.AfterFunc(tc.opens, out.open)
				}
				start := time.Now()
				lg.close()
				if took, n := time.Since(start), strings.Count(out.String(), "\n"); took != tc.takes || n != tc.written {
					t.Errorf("took %v and wrote %d lines, want %v and %d", took, n, tc.takes, tc.written)
				}
				lg.infof("after the end: nobody waits for it")
				time.Sleep(2 * time.Hour) // until it is open
			})
		})
	}
}

// A fullDisk has room for so many bytes.
type fullDisk struct {
	syncBuffer
	room int
}

func (d *fullDisk) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := min(len(p), d.room)
	d.room -= n
	d.buf.Write(p[:n])
	if n < len(p) {
		return n, syscall.ENOSPC
	}
	return n, nil
}

func (d *fullDisk) makeRoom(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.room = n
}

// A piecesOutput remembers what it was given in one piece.
type piecesOutput struct{ pieces []string }

func (o *piecesOutput) Write(p []byte) (int, error) {
	o.pieces = append(o.pieces, string(p))
	return len(p), nil
}

// Each line is written in one piece, with which a pipe does not mix what another process
// writes.
func TestLogPieces(t *testing.T) {
	t.Parallel()
	out := &piecesOutput{}
	lg := testLog(t, out)
	sizes := []int{1, 1000, 5000, 1}
	for _, size := range sizes {
		lg.infof("%s", strings.Repeat("x", size))
	}
	lg.close()
	if len(out.pieces) != len(sizes) {
		t.Errorf("%d lines are written in %d pieces", len(sizes), len(out.pieces))
	}
	for _, piece := range out.pieces {
		if strings.Index(piece, "\n") != len(piece)-1 {
			t.Errorf("a piece is %.100q", piece)
		}
	}
}

// That the log cannot be written is said once on standard error. Its lines wait, and are
// written once there is room; one that was cut off goes on where it was cut.
func TestLogOnFullDisk(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const line = len("[notification-server] [2006-01-02 15:04:05] [INFO] 0\n")
		disk, stderr := &fullDisk{room: line + 25}, &syncBuffer{}
		lg := openLog("", true, disk, stderr, nil)
		for n := range 5 { // the second is cut off
			lg.infof("%d", n)
			synctest.Wait()
		}
		if n := len(disk.String()); n != line+25 {
			t.Fatalf("%d bytes are written", n)
		}
		disk.makeRoom(1000)
		time.Sleep(logLookPeriod) // then it is tried again, also without a new line
		synctest.Wait()
		if got := strings.Join(texts(disk.String()), ", "); got != "0, 1, 2, 3, 4" {
			t.Errorf("written: %s", got)
		}
		checkLog(t, disk.String(), "[notification-server] ")
		if lg.linesDropped() != 0 {
			t.Errorf("%d lines lost, want none", lg.linesDropped())
		}
		fault := notWritten + "no space left on device: serving goes on; " +
			"make room, or correct it: then the log goes on\n"
		if stderr.String() != fault {
			t.Errorf("standard error: %q, want %q", stderr.String(), fault)
		}
		disk.makeRoom(0) // another time is another fault
		lg.infof("7")
		synctest.Wait()
		lg.close()
		if stderr.String() != fault+fault {
			t.Errorf("standard error: %q", stderr.String())
		}
	})
}

// A log file that was renamed or removed, also with its directory, is noticed within 10 s,
// without a signal and without a line that is logged. The new file has mode 0640.
func TestLogFileIsGone(t *testing.T) {
	t.Parallel()
	slow(t, "5 s")
	for _, tc := range []struct {
		name  string
		gone  func(t *testing.T, path string, lg *logger)
		old   string // where the first line is now
		fault bool   // is said on standard error
	}{
		{"renamed", func(t *testing.T, path string, lg *logger) { os.Rename(path, path+".1") }, "log.1", false},
		{"removed", func(t *testing.T, path string, lg *logger) { os.Remove(path) }, "", false},
		{"another took its place", func(t *testing.T, path string, lg *logger) {
			os.Rename(path, path+".1")
			if err := os.WriteFile(path, nil, 0o640); err != nil {
				t.Fatal(err)
			}
		}, "log.1", false},
		{"the directory was removed", func(t *testing.T, path string, lg *logger) {
			os.RemoveAll(filepath.Dir(path))
			lg.wake() // fails, and is tried again, which is not said again
			time.Sleep(logLookPeriod + time.Second)
			if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
		}, "", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "logs")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "log")
			var stderr syncBuffer
			lg := fileLog(t, path, &stderr)
			lg.infof("before")
			waitFor(t, "the line", func() bool { text, _ := os.ReadFile(path); return len(text) > 0 })
			first, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			tc.gone(t, path, lg)
			start := time.Now()
			waitFor(t, "the log is opened anew", func() bool {
				now, err := os.Stat(path)
				return err == nil && !os.SameFile(now, first) && filesOpen(t, path) == 1
			})
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("noticed after %v", took)
			}
			if now, _ := os.Stat(path); now.Mode() != 0o640 || first.Mode() != 0o640 {
				t.Errorf("modes %v and %v, want 0640", first.Mode(), now.Mode())
			}
			lg.infof("after")
			lg.close()
			text, _ := os.ReadFile(path)
			if got := texts(string(text)); len(got) != 1 || got[0] != "after" {
				t.Errorf("the new file: %q", text)
			}
			if tc.old != "" {
				old, _ := os.ReadFile(filepath.Join(dir, tc.old))
				if got := texts(string(old)); len(got) != 1 || got[0] != "before" {
					t.Errorf("the old file: %q", old)
				}
			}
			said := strings.Count(stderr.String(), notOpened+"open "+path+": no such file or directory")
			if (said == 1) != tc.fault || said > 1 || !tc.fault && stderr.String() != "" {
				t.Errorf("standard error: %q", stderr.String())
			}
			if n := filesOpen(t, dir); n > 0 {
				t.Errorf("%d files are still open", n)
			}
		})
	}
}

// filesOpen tells how many open files of this process have this path, or are in this
// directory.
func filesOpen(t *testing.T, path string) (n int) {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if target, _ := os.Readlink("/proc/self/fd/" + file.Name()); strings.HasPrefix(target+"/", path+"/") {
			n++
		}
	}
	return n
}

func makeFIFO(t testing.TB, path string) {
	t.Helper()
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
}

// A FIFO without a reader cannot be opened, so the log goes to standard error until there
// is one.
func TestLogToFIFOWithoutReader(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "log")
	makeFIFO(t, path)
	var stderr syncBuffer
	lg := fileLog(t, path, &stderr)
	lg.infof("first")
	waitFor(t, "the line on standard error", func() bool {
		return strings.Contains(stderr.String(), "[INFO] first\n") && strings.Contains(stderr.String(),
			"notification-server: cannot open the log: open "+path+": no such device or address: serving goes on, and "+
				"the log goes where it went before, at the start to standard error; correct it: it is tried again every 5s\n")
	})
	reader, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	lg.wake()
	waitFor(t, "it is opened", func() bool { return filesOpen(t, path) == 2 })
	lg.infof("second")
	text := make([]byte, 100)
	reader.SetReadDeadline(time.Now().Add(patient))
	n, err := reader.Read(text)
	if got := texts(string(text[:n])); err != nil || len(got) != 1 || got[0] != "second" {
		t.Errorf("read %q, %v", text[:n], err)
	}
}

// A FIFO that nobody reads holds nothing up: the write that hangs is given up, and a file
// that takes its place gets all lines.
func TestLogToFIFOThatNobodyReads(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "log")
	makeFIFO(t, path)
	reader, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	fillPipe(t, path)
	var stderr syncBuffer
	lg := fileLog(t, path, &stderr)
	lg.infof("first") // hangs
	waitFor(t, "the line is being written", func() bool {
		lg.mu.Lock()
		defer lg.mu.Unlock()
		return len(lg.queue) == 0
	})
	lg.infof("second")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	lg.wake()
	lg.infof("third")
	const want = "first, second, third"
	waitFor(t, "the file has "+want, func() bool {
		text, _ := os.ReadFile(path)
		return strings.Join(texts(string(text)), ", ") == want
	})
	fault := notWritten + "write " + path + ": i/o timeout: "
	if said := stderr.String(); strings.Count(said, "\n") != 1 || !strings.HasPrefix(said, fault) {
		t.Errorf("standard error: %q, want %q once", said, fault)
	}
}

// fillPipe fills the pipe or FIFO at path, so that whoever writes to it hangs.
func fillPipe(t testing.TB, path string) {
	t.Helper()
	fd, err := syscall.Open(path, syscall.O_WRONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	for size := 4096; size > 0; size /= 4096 { // by pages, then the rest
		for err = nil; err == nil; {
			_, err = syscall.Write(fd, make([]byte, size))
		}
	}
}

// Where the log goes. A server that is disabled logs that and ends.
func TestLogTarget(t *testing.T) {
	t.Parallel()
	dir := confDir(t, "[notification]\nenabled = false\n")
	file := filepath.Join(dir, "notification-server.log")
	if err := os.WriteFile(file, []byte("[2026-01-02 03:04:05] [INFO] before\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "seafile.conf")
	const prefix = "[notification-server] "
	for _, c := range []struct {
		name   string
		env    []string
		args   []string
		where  string // stdout, stderr or file
		prefix string
	}{
		{"none", nil, []string{"-c", dir}, "stderr", ""},
		{"empty", nil, []string{"-c", dir, "-l", ""}, "stderr", ""},
		{"dash", nil, []string{"-c", dir, "-l", "-"}, "stderr", ""},
		{"file", nil, []string{"-c", dir, "-l", file}, "file", ""},
		{"stdout", []string{"SEAFILE_LOG_TO_STDOUT=true"}, []string{"-c", dir, "-l", file}, "stdout", prefix},
		{"stdout is not asked for", []string{"SEAFILE_LOG_TO_STDOUT="}, []string{"-c", dir}, "stderr", ""},
		{"-c names the file itself", nil, []string{"-c", conf}, "stderr", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			old, _ := os.ReadFile(file)
			status, stdout, stderr := runOnce(t, c.env, c.args...)
			now, err := os.ReadFile(file)
			if err != nil || !bytes.HasPrefix(now, old) {
				t.Fatalf("the log file was not appended to: %v, %q", err, now)
			}
			got := map[string]string{"stdout": stdout, "stderr": stderr, "file": string(now[len(old):])}
			for where, text := range got {
				if want := where == c.where; want != strings.Contains(text, "disabled in "+conf) || !want && text != "" {
					t.Errorf("%s: %q", where, text)
				}
			}
			checkLog(t, got[c.where], c.prefix)
			if status != 0 {
				t.Errorf("exit %d", status)
			}
		})
	}
}

func TestLogLevels(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ level, want string }{
		{"debug", "DEBUG INFO WARNING"},
		{"info", "INFO WARNING"},
		{"Info", "INFO WARNING"},
		{"warning", "WARNING"},
		{"warn", "WARNING"},
		{"error", ""},
		{"loud", "INFO WARNING"}, // unknown means info, and warns
	} {
		t.Run(c.level, func(t *testing.T) {
			t.Parallel()
			port := freePort(t)
			p := startBinary(t, port, nil, "-c", writeConfig(t, port, "log_level = "+c.level))
			cl := connect(t, "127.0.0.1:"+port, asDesktop)
			cl.subscribe(repoA, "x.y.z")
			cl.expect(opText, expiredText(repoA))
			p.terminate()
			log := p.out.String()
			var got []string
			for _, l := range []string{"DEBUG", "INFO", "WARNING", "ERROR"} {
				if strings.Contains(log, "["+l+"] ") {
					got = append(got, l)
				}
			}
			unknown := regexp.MustCompile(`\[WARNING\] .*seafile\.conf:6: log_level "loud".*info`).MatchString(log)
			if strings.Join(got, " ") != c.want || unknown != (c.level == "loud") {
				t.Errorf("log_level %s: %s", c.level, log)
			}
			checkLog(t, log, "")
		})
	}
}

// A refused token is logged with its cause, the remedy and who sent it, once a minute for
// each cause and kind of sender; another cause is said at once.
func TestRefusalsInLog(t *testing.T) {
	t.Parallel()
	token := func(key string, exp time.Duration) string {
		claims := fmt.Sprintf(`{"exp":%d,"repo_id":%q,"username":"alice@example.com"}`, time.Now().Add(exp).Unix(), repoA)
		return signToken(key, `{"alg":"HS256"}`, claims)
	}
	for _, tc := range []struct{ name, token, want string }{
		{"signature", token("another key", time.Hour), "signature does not match.*jwt_private_key differs between here and seaf-server"},
		{"just expired", token(testKey, -10*time.Minute), "expired 6.. s ago.*clocks.*differ"},
		{"long expired", token(testKey, -2*time.Hour), "expired more than an hour ago"},
		{"malformed", "x", "not three parts"},
		{"algorithm", capturedHS512, "does not name HS256"},
		{"not yet", signToken(testKey, `{"alg":"HS256"}`, fmt.Sprintf(`{"exp":4102444800,"nbf":4102444000,"repo_id":%q}`, repoA)), "valid only in.*clocks.*differ"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := loggedServer(t)
			forwarded := "X-Forwarded-For: 203.0.113.7"
			c := connect(t, s.addr, asDesktop+forwarded+"\r\n")
			refuse := func() {
				t.Helper()
				for range 3 {
					c.subscribe(repoA, tc.token)
					c.expect(opText, expiredText(repoA))
					answer, _ := request(t, "POST", "http://"+s.addr+"/events", update(repoA, "1"), tokenLine(tc.token), forwarded)
					if answer.StatusCode != 401 {
						t.Fatal(answer.Status)
					}
				}
			}
			warnings := func(n int, kind string) {
				t.Helper()
				pattern := `(?m)^.*\[WARNING\] ` + kind + ` from 127\.0\.0\.1:\d+ for "203\.0\.113\.7".* refused: .*` + tc.want
				got := regexp.MustCompile(pattern).FindAllString(s.fullLog(), -1)
				if all := strings.Count(s.out.String(), "[WARNING] "+kind); len(got) != n || all != n {
					t.Errorf("%d warnings of %s, %d of them as %s; want %d: %s", all, kind, len(got), pattern, n, s.out)
				}
			}
			refuse()
			warnings(1, "a subscription")
			warnings(1, "an event")
			s.time.move(0, 59*time.Second)
			refuse()
			warnings(1, "a subscription")
			warnings(1, "an event")
			s.time.move(0, time.Second)
			refuse()
			warnings(2, "a subscription")
			warnings(2, "an event")
			if tc.name != "signature" {
				c.subscribe(repoA, token("third key", time.Hour))
				c.expect(opText, expiredText(repoA))
				if !strings.Contains(s.fullLog(), "signature does not match") {
					t.Error("another cause is not logged")
				}
			}
		})
	}
}

// SIGUSR1 opens the log anew, as log rotation needs it.
func TestReopenLog(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	dir := writeConfig(t, port, "log_level = debug")
	file := filepath.Join(dir, "notification-server.log")
	p := startBinary(t, port, nil, "-c", dir, "-l", file)
	if err := os.Rename(file, file+".1"); err != nil {
		t.Fatal(err)
	}
	p.Process.Signal(syscall.SIGUSR1)
	waitFor(t, "the log is opened anew", func() bool { _, err := os.Stat(file); return err == nil })
	connect(t, "127.0.0.1:"+port, asDesktop).sync()
	p.terminate()
	old, err1 := os.ReadFile(file + ".1")
	text, err2 := os.ReadFile(file)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(old), "started on") || strings.Contains(string(old), "stopped") ||
		!strings.Contains(string(text), ": connected") || !strings.Contains(string(text), "] stopped") {
		t.Errorf("before: %q, after: %q", old, text)
	}
	if out := p.out.String(); out != "" {
		t.Errorf("standard error: %q", out)
	}
	checkLog(t, string(old)+string(text), "")
}

// The log has the local time of the machine.
func TestLogTime(t *testing.T) {
	t.Parallel()
	// A time zone of its own, 9 h 7 min east of Greenwich (RFC 9636, version 1).
	zone := append([]byte("TZif"), make([]byte, 40)...)
	zone[39], zone[43] = 1, 4 // one type of local time, 4 characters
	zone = append(binary.BigEndian.AppendUint32(zone, 9*3600+7*60), "\x00\x00TST\x00"...)
	dir := confDir(t, "[notification]\nenabled = false\n")
	file := filepath.Join(dir, "zone")
	if err := os.WriteFile(file, zone, 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, log := runOnce(t, []string{"TZ=:" + file}, "-c", dir)
	got, err := time.ParseInLocation("[2006-01-02 15:04:05]", log[:min(21, len(log))], time.FixedZone("", 9*3600+7*60))
	if d := time.Since(got); err != nil || d < -2*time.Second || d > time.Minute {
		t.Errorf("log %q is off by %v, %v", log, d, err)
	}
}

// At debug level the log has connections, subscriptions and messages, with user, address,
// program and content, and what comes from outside cannot forge a line.
func TestDebugLog(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	c := connect(t, s.addr, asDesktop+"X-Forwarded-For: 203.0.113.7, \"10.0.0.1\x80\r\n")
	const forged = "x\n[2026-01-01 00:00:00] [ERROR] forged"
	escaped := strings.ReplaceAll(forged, "\n", `\n`)
	c.subscribed(repoA, "alice@example.com\n"+forged)
	c.subscribed(forged, "bob@example.com")
	s.post(update(repoA, "a1"), 1)
	c.expect(opText, update(repoA, "a1"))
	const odd, oddEscaped = "/é\u009b31m\x7f\u2028", `/é\u009b31m\x7f\u2028` // JSON leaves these as they are
	named := strings.Replace(lockPosted(repoA, "/a"), "/a", odd, 1)
	s.post(named, 1)
	c.expect(opText, named)
	c.subscribe(forged, "x.y."+forged)
	c.read()
	c.text(unsubscribeText(repoA))
	jsonForged, _ := json.Marshal(forged)
	jsonCleared, _ := json.Marshal(forged + "\x1b[2J")
	unknown := fmt.Sprintf(`{"type":%s,"content":{"repo_id":"x"}}`, jsonCleared)
	request(t, "POST", "http://"+s.addr+"/events", unknown, tokenLine(s.token()))
	s.accept(fmt.Sprintf(`{"type":"folder-perm-changed","content":{"repo_id":%s,"type":"group","group":1}}`, jsonForged))
	c.expectClose(statusRestart)
	direct := connect(t, s.addr, "")
	direct.nc.Close()
	waitFor(t, "both left", func() bool { return strings.Count(s.out.String(), ": disconnected") == 2 })
	peer := c.nc.LocalAddr().String() + ` for "203.0.113.7, \"10.0.0.1\x80" ("Seafile/9.0.20 (Linux)")`
	user := `user "alice@example.com\n` + escaped + `"`
	log := s.fullLog()
	for _, want := range []string{
		`[DEBUG] ` + peer + ": connected\n",
		`[DEBUG] ` + peer + `: subscribed to "` + repoA + `", ` + user + "\n",
		`[DEBUG] to ` + peer + `, ` + user + `: ` + update(repoA, "a1") + "\n",
		`[DEBUG] to ` + peer + `, ` + user + `: ` + strings.Replace(named, odd, oddEscaped, 1) + "\n",
		`[DEBUG] to ` + peer + `: {"type":"jwt-expired","content":{"repo_id":"` + escaped + `"}}` + "\n",
		`[DEBUG] ` + peer + `: unsubscribed from "` + repoA + `"` + "\n",
		`[DEBUG] ` + peer + ": disconnected: resync\n",
		`[DEBUG] ` + direct.nc.LocalAddr().String() + ": connected\n",
		`refused: unknown type "` + escaped + `\x1b[2J"` + "\n",
		`library "` + escaped + `" `,
	} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %s", want)
		}
	}
	if strings.Contains(log, "\n[2026-01-01 00:00:00]") || strings.Contains(log, "10.0.0.1\x80") ||
		strings.ContainsAny(log, "\x1b\r\u009b\u007f\u2028") {
		t.Error("text from outside is not escaped")
	}
	if t.Failed() {
		t.Log(log)
	}
}

// comeAndGo has clients come, get an event and go, which the log tells at level debug.
func comeAndGo(t *testing.T, addr string) {
	t.Helper()
	for range 5 {
		c := connect(t, addr, asBrowser).subscribed(repoA, "alice@example.com")
		post(t, addr, update(repoA, "1"), 1)
		c.expect(opText, update(repoA, "1"))
		c.write(maskedFrame(0x80|opClose, nil))
		c.expectClose(statusNone)
		waitFor(t, "the client is gone", func() bool { return subscribers(t, addr, numbered(repoA, 0, 0)) == 0 })
	}
}

// saidOnce waits until the process has said text, which must be once.
func saidOnce(t *testing.T, p *process, text string) {
	t.Helper()
	p.says(text)
	if n := strings.Count(p.out.String(), text); n != 1 {
		t.Errorf("standard error says %d times %q: %s", n, text, p.out)
	}
}

// A full disk does not stop the server. Once there is room, the log goes on.
func TestServerOnFullDisk(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	addr := "127.0.0.1:" + port
	dir := writeConfig(t, port, "log_level = debug")
	path := filepath.Join(dir, "log")
	if err := os.Symlink("/dev/full", path); err != nil {
		t.Fatal(err)
	}
	p := startBinary(t, port, nil, "-c", dir, "-l", path)
	comeAndGo(t, addr)
	saidOnce(t, p, notWritten)
	p.says("no space left on device: serving goes on; make room, or correct it: then the log goes on")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	p.Process.Signal(syscall.SIGUSR1)
	waitFor(t, "the log file is there", func() bool { _, err := os.Stat(path); return err == nil })
	comeAndGo(t, addr)
	waitFor(t, "the log tells of the clients", func() bool { // perhaps also of the last one before
		text, _ := os.ReadFile(path)
		return bytes.Count(text, []byte(": disconnected: client")) >= 5
	})
	saidOnce(t, p, notWritten)
	if status := p.terminate(); status != 0 {
		t.Errorf("exit status %d", status)
	}
}

// Standard error whose reader has ended does not stop the server, whether it is the log or
// is to say that the log cannot be opened or written.
func TestServerWithoutStandardError(t *testing.T) {
	t.Parallel()
	for _, path := range []string{"-", "/dev/full", "none/log"} {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			port := freePort(t)
			dir := writeConfig(t, port, "log_level = debug")
			read, written, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			read.Close()
			cmd := exec.Command(buildBinary(t), "-c", dir, "-l", path)
			cmd.Dir = dir
			cmd.Stderr = written
			p := launch(t, nil, cmd)
			written.Close()
			p.waitPing("127.0.0.1:" + port)
			comeAndGo(t, "127.0.0.1:"+port)
		})
	}
}

// configWithLogs returns a configuration at level debug, with a directory of its own for the log
// at path.
func configWithLogs(t testing.TB) (port, dir, logs, path string) {
	t.Helper()
	port = freePort(t)
	dir = writeConfig(t, port, "log_level = debug")
	logs = filepath.Join(t.TempDir(), "logs")
	if err := os.Mkdir(logs, 0o755); err != nil {
		t.Fatal(err)
	}
	return port, dir, logs, filepath.Join(logs, "notification-server.log")
}

// When the directory of the log is removed, that is said once, and the log goes on when it
// is there again.
func TestServerWhoseLogDirectoryIsGone(t *testing.T) {
	t.Parallel()
	port, dir, logs, path := configWithLogs(t)
	addr := "127.0.0.1:" + port
	p := startBinary(t, port, nil, "-c", dir, "-l", path)
	comeAndGo(t, addr)
	if err := os.RemoveAll(logs); err != nil {
		t.Fatal(err)
	}
	comeAndGo(t, addr)
	p.Process.Signal(syscall.SIGUSR1)
	p.says(notOpened)
	comeAndGo(t, addr)
	saidOnce(t, p, notOpened)
	if err := os.Mkdir(logs, 0o755); err != nil {
		t.Fatal(err)
	}
	p.Process.Signal(syscall.SIGUSR1)
	waitFor(t, "the log goes on", func() bool {
		comeAndGo(t, addr)
		text, _ := os.ReadFile(path)
		return bytes.Contains(text, []byte("disconnected"))
	})
	saidOnce(t, p, notOpened)
}

// When nobody reads standard error either, and that cannot be said, the log goes on all the
// same in the new file.
func TestServerWhoseLogDirectoryIsGoneUnsaid(t *testing.T) {
	t.Parallel()
	port, dir, logs, path := configWithLogs(t)
	addr := "127.0.0.1:" + port
	cmd := exec.Command(buildBinary(t), "-c", dir, "-l", path)
	_, out := fullOutput(t, cmd)
	p := launch(t, nil, cmd)
	out.Close() // the server has its own
	p.waitPing(addr)
	var old *os.File
	waitFor(t, "the log file is there", func() (there bool) {
		var err error
		old, err = os.Open(path)
		return err == nil
	})
	defer old.Close()
	if err := os.RemoveAll(logs); err != nil {
		t.Fatal(err)
	}
	comeAndGo(t, addr)
	waitFor(t, "meanwhile the log goes where it went before", func() bool {
		text, _ := io.ReadAll(old)
		return bytes.Contains(text, []byte("disconnected"))
	})
	if err := os.Mkdir(logs, 0o755); err != nil {
		t.Fatal(err)
	}
	comeAndGo(t, addr)
	waitFor(t, "the log goes on", func() bool {
		text, _ := os.ReadFile(path)
		return bytes.Contains(text, []byte("disconnected"))
	})
	if code := p.terminate(); code != 0 {
		t.Errorf("exit status %d", code)
	}
}

// A log file that cannot be opened at the start does not stop the server: its lines go to
// standard error.
func TestServerWithoutLogDirectory(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	dir := writeConfig(t, port)
	p := startBinary(t, port, nil, "-c", dir, "-l", filepath.Join(dir, "none/notification-server.log"))
	comeAndGo(t, "127.0.0.1:"+port)
	saidOnce(t, p, notOpened)
	saidOnce(t, p, "[INFO] notification server started on ")
}

// A log that takes nothing holds nothing up, at any level: not the start, an event, a ping,
// a subscription, a refusal, the sweep, a signal, or the stop.
func TestLogThatNobodyReads(t *testing.T) {
	t.Parallel()
	for _, level := range []string{"info", "debug"} {
		for _, tc := range []struct {
			name string
			env  []string
			fifo string // "", or who reads the FIFO to which the log goes
		}{
			{"standard error", nil, ""},
			{"standard output", []string{"SEAFILE_LOG_TO_STDOUT=true"}, ""},
			{"FIFO without a reader", nil, "nobody"},
			{"FIFO whose reader does not read", nil, "who does not read"},
		} {
			t.Run(level+"/"+tc.name, func(t *testing.T) {
				t.Parallel()
				port, metrics := freePort(t), "127.0.0.1:"+freePort(t)
				dir := writeConfig(t, port, "metrics = "+metrics, "log_level = "+level)
				cmd := exec.Command(buildBinary(t), "-c", dir)
				unread, out := fullOutput(t, cmd)
				if tc.fifo != "" {
					path := filepath.Join(dir, "log")
					makeFIFO(t, path)
					cmd.Args = append(cmd.Args, "-l", path)
				}
				if tc.fifo == "who does not read" {
					reader, err := os.OpenFile(filepath.Join(dir, "log"), os.O_RDWR, 0)
					if err != nil {
						t.Fatal(err)
					}
					defer reader.Close()
					fillPipe(t, reader.Name())
				}
				p := launch(t, tc.env, cmd)
				out.Close() // the server has its own
				p.waitPing("127.0.0.1:" + port)
				serveWithStuckLog(t, p, "127.0.0.1:"+port, metrics)
				text, err := io.ReadAll(unread)
				if text = bytes.Trim(text, "\x00"); err != nil || len(text) > 0 {
					t.Errorf("the pipe was not full: it took %q, %v", text, err)
				}
			})
		}
	}
}

// fullOutput gives cmd a full pipe as output and as standard error. It returns both ends:
// nobody reads it.
func fullOutput(t *testing.T, cmd *exec.Cmd) (unread, out *os.File) {
	t.Helper()
	unread, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	fillPipe(t, fmt.Sprintf("/proc/self/fd/%d", out.Fd()))
	cmd.Stdout, cmd.Stderr = out, out
	t.Cleanup(func() {
		unread.Close()
		out.Close()
	})
	return unread, out
}

// serveWithStuckLog has a server do all that it logs, and stops it.
func serveWithStuckLog(t *testing.T, p *process, addr, metrics string) {
	t.Helper()
	c := connect(t, addr, asBrowser).subscribed(repoA, "alice@example.com")
	event := func(n int) {
		t.Helper()
		post(t, addr, lockEvent(repoA, n), 1)
		c.expect(opText, lockEvent(repoA, n))
	}
	for n := range 100 {
		event(n)
	}
	c.ping("a")
	c.expect(opPong, "a")
	c.subscribe(repoB, "x.y.z")
	c.expect(opText, expiredText(repoB))
	if answer, _ := request(t, "GET", "http://"+addr+"/nothing", ""); answer.StatusCode != 404 {
		t.Errorf("a wrong path is answered %s", answer.Status)
	}
	answer, _ := request(t, "POST", "http://"+addr+"/events", update(repoA, "1"), tokenLine("x"))
	if answer.StatusCode != 401 {
		t.Errorf("a wrong event is answered %s", answer.Status)
	}
	slow := connect(t, addr, asBrowser)
	go slow.write(bytes.Repeat(maskedFrame(0x80|opPing, bytes.Repeat([]byte("x"), 125)), 200000))
	waitFor(t, "the slow client is closed", func() bool {
		return scrape(t, metrics)[`closed_total{reason="outbox-full"}`] == 1
	})
	p.Process.Signal(syscall.SIGUSR1)
	p.Process.Signal(syscall.SIGUSR2)
	c.subscribe(repoB, clientToken(repoB, "alice@example.com", time.Now().Add(2*time.Second)))
	c.expect(opText, expiredText(repoB)) // sent by the sweep
	event(101)
	start := time.Now()
	p.Process.Signal(syscall.SIGTERM)
	c.expectClose(statusGoingAway)
	if status := p.wait(); status != 0 || time.Since(start) > 5*time.Second {
		t.Errorf("stopped with exit status %d after %v", status, time.Since(start))
	}
}

// BenchmarkLog measures what a line costs who logs it: one that is written, one that is
// dropped since nobody reads, one that the level leaves out, and the same asked first.
func BenchmarkLog(b *testing.B) {
	file, err := os.CreateTemp(b.TempDir(), "log")
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	stuck := newGate()
	defer stuck.open()
	peer, user, text := `127.0.0.1:39298 ("Seafile/9.0.20 (Linux)")`, "alice@example.com", update(repoA, "1")
	for _, bc := range []struct {
		name  string
		out   io.Writer
		level slog.Level
		ask   bool
	}{
		{"written", file, slog.LevelDebug, false},
		{"dropped", stuck, slog.LevelDebug, false},
		{"below the level", file, slog.LevelInfo, false},
		{"below the level, asked first", file, slog.LevelInfo, true},
	} {
		b.Run(bc.name, func(b *testing.B) {
			lg := testLog(b, bc.out)
			lg.setLevel(bc.level)
			for bc.out == stuck && lg.linesDropped() == 0 {
				lg.debugf("%s", text) // until the queue is full
			}
			b.ReportAllocs()
			for b.Loop() {
				if !bc.ask || lg.debugEnabled() {
					lg.debugf("to %s, user %q: %s", peer, user, text)
				}
			}
			b.ReportMetric(float64(lg.linesDropped()), "lost")
		})
	}
}

// ---- Tests of floods ----

// crowd runs f n times, at most width at a time, each with a connection to addr. Those come
// from other addresses than all else here, so that no port of 127.0.0.1 runs out, and end
// with f at the latest.
func crowd(addr string, n, width int, f func(i int, nc net.Conn)) {
	var wg sync.WaitGroup
	slots := make(chan bool, width)
	for i := range n {
		slots <- true
		wg.Go(func() {
			defer func() { <-slots }()
			d := net.Dialer{LocalAddr: local(i), Timeout: patient}
			if nc, err := d.Dial("tcp", addr); err == nil {
				nc.SetDeadline(time.Now().Add(3 * patient))
				f(i, nc)
				nc.Close()
			}
		})
	}
	wg.Wait()
}

// local is an address of a crowd.
func local(i int) *net.TCPAddr { return &net.TCPAddr{IP: net.IPv4(127, 0, byte(1+i/10%100), 1)} }

const upgradeText = "GET / HTTP/1.1\r\nHost: x\r\n" + upgradeLines + "\r\n"

// upgraded upgrades a connection of a crowd and reports whether that worked.
func upgraded(nc net.Conn) bool {
	io.WriteString(nc, upgradeText)
	answer := make([]byte, 1024)
	n, err := nc.Read(answer)
	return err == nil && bytes.HasPrefix(answer[:n], []byte("HTTP/1.1 101 "))
}

// subscribeFrame is a good subscription of a crowd.
func subscribeFrame() []byte {
	return maskedFrame(0x80|opText, []byte(subscribeText(repoB, clientToken(repoB, "u", later()))))
}

// trickle writes text byte by byte, slowly, until the other side ends it, and returns after
// how long that was.
func trickle(nc net.Conn, text string) time.Duration {
	start := time.Now()
	ended := make(chan bool)
	go func() { io.Copy(io.Discard, nc); close(ended) }()
	for i := 0; ; i++ {
		select {
		case <-ended:
			return time.Since(start)
		case <-time.After(200 * time.Millisecond):
			nc.Write([]byte{text[i%len(text)]})
		}
	}
}

// randomBytes is a different stream for each i, and the same in each run.
func randomBytes(i, n int) []byte {
	p := make([]byte, n)
	mathrand.NewChaCha8([32]byte{byte(i), byte(i >> 8)}).Read(p)
	return p
}

// A barrier lets all of a crowd go on when all have come to it, or after a while.
type barrier struct {
	left atomic.Int64
	all  chan bool
}

func newBarrier(n int) *barrier {
	b := &barrier{all: make(chan bool)}
	b.left.Store(int64(n))
	return b
}

func (b *barrier) wait() {
	if b.left.Add(-1) == 0 {
		close(b.all)
	}
	select {
	case <-b.all:
	case <-time.After(2 * patient):
	}
}

func slowHeads(t *testing.T, addr string) {
	crowd(addr, 300, 300, func(i int, nc net.Conn) {
		if took := trickle(nc, upgradeText[:len(upgradeText)-2]+"X: "); took > 25*time.Second {
			t.Errorf("a slow head was endured for %v", took)
		}
	})
}

func slowBodies(t *testing.T, addr string) {
	token := tokenLine(eventToken(later())) + "\r\n"
	crowd(addr, 300, 300, func(i int, nc net.Conn) {
		length := []string{"1000", "1048576", "1099511627776"}[i%3]
		fmt.Fprintf(nc, "POST /events HTTP/1.1\r\nHost: x\r\n%sContent-Length: %s\r\n\r\n", []string{"", token}[i%2], length)
		if took := trickle(nc, `{"type":"repo-update"`+strings.Repeat(" ", 1000)); took > 35*time.Second {
			t.Errorf("a slow body was endured for %v", took)
		}
	})
}

// endlessFragments come from strangers, and from clients with a subscription.
func endlessFragments(t *testing.T, addr string) {
	empty, more := maskedFrame(opContinuation, nil), maskedFrame(opContinuation, bytes.Repeat([]byte("x"), 16<<10))
	var told atomic.Int64
	crowd(addr, howMany(200, 20), howMany(20, 5), func(i int, nc net.Conn) {
		if t.Failed() {
			return // one complaint is enough
		}
		if !upgraded(nc) {
			t.Error("no upgrade")
			return
		}
		if i%3 > 0 {
			nc.Write(subscribeFrame())
		}
		nc.Write(maskedFrame(opText, nil))
		for range 66 { // 1 MiB and 32 KiB
			nc.Write(bytes.Repeat(empty, i%2*100))
			nc.Write(more)
		}
		nc.Write(maskedFrame(0x80|opClose, nil))
		switch answer, err := io.ReadAll(nc); {
		case len(answer) >= 4 && answer[0] == 0x80|opClose && closeStatus(answer[2:]) == statusTooBig:
			told.Add(1)
		case len(answer) > 0 || os.IsTimeout(err): // who sends on for a second is cut off
			t.Errorf("endless fragments were answered %q, %v", answer, err)
		}
	})
	if told.Load() == 0 {
		t.Error("endless fragments were never answered with a close frame")
	}
}

// longMessages come to their end all at once. They are of 1 MiB and of no use.
func longMessages(t *testing.T, addr string) {
	long := maskedFrame(0x80|opText, []byte(`{"type":"subscribe","content":{"repos":[`+strings.Repeat(`{},`, 340000)+`{}]}}`))
	n := howMany(60, 20)
	all := newBarrier(n)
	crowd(addr, n, n, func(i int, nc net.Conn) {
		good := upgraded(nc)
		nc.Write(subscribeFrame())
		nc.Write(long[:len(long)-1])
		all.wait()
		nc.Write(long[len(long)-1:])
		nc.Write(maskedFrame(0x80|opClose, nil))
		if answer, err := io.ReadAll(nc); !good || len(answer) < 4 || closeStatus(answer[2:]) != statusPolicy {
			t.Errorf("answered %q, %v", answer, err)
		}
	})
}

func endlessFrames(t *testing.T, addr string) {
	crowd(addr, 600, 50, func(i int, nc net.Conn) {
		if t.Failed() {
			return // one complaint is enough
		}
		if nc.SetDeadline(time.Now().Add(patient)); !upgraded(nc) {
			t.Error("no upgrade")
			return
		}
		size := []uint64{1 << 63, 1<<63 - 1, 1<<64 - 1, 1 << 62, 1 << 31, 1<<20 + 1}[i%6]
		want := statusTooBig
		if size >= 1<<63 {
			want = statusProtocol
		}
		opcode := []byte{0x80 | opText, opText, 0x80 | opBinary}[i%3]
		nc.Write(append(binary.BigEndian.AppendUint64([]byte{opcode, 0x80 | 127}, size), randomBytes(i, 100)...))
		answer := make([]byte, 200)
		if n, _ := nc.Read(answer); n < 4 || answer[0] != 0x80|opClose || closeStatus(answer[2:]) != want {
			t.Errorf("a frame of %d bytes was answered %q", size, answer[:n])
		}
	})
}

func comeAndLeave(t *testing.T, addr string) {
	subscribe := subscribeFrame()
	crowd(addr, howMany(5000, 1000), 50, func(i int, nc net.Conn) {
		switch i % 6 {
		case 0: // not a byte
		case 1:
			io.WriteString(nc, "GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
		case 2:
			upgraded(nc)
		case 3:
			upgraded(nc)
			nc.Write(subscribe)
		case 4: // all at once, and a closing handshake
			nc.Write(join([]byte(upgradeText), subscribe, maskedFrame(0x80|opClose, nil)))
			io.Copy(io.Discard, nc)
		case 5: // in the midst of a frame
			upgraded(nc)
			nc.Write(subscribe[:len(subscribe)/2])
		}
		if i%2 == 0 {
			nc.(*net.TCPConn).SetLinger(0) // a reset, not an end
		}
	})
}

func noise(t *testing.T, addr string) {
	subscribe := subscribeText(repoB, clientToken(repoB, "u", later()))
	crowd(addr, howMany(2000, 500), 50, func(i int, nc net.Conn) {
		noise := randomBytes(i, 1+i%3000)
		switch i % 8 {
		case 0:
			nc.Write(noise)
		case 1:
			fmt.Fprintf(nc, "GET /%s HTTP/1.1\r\n", noise)
		case 2:
			fmt.Fprintf(nc, "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n%s\r\n\r\n", noise)
		case 3:
			io.WriteString(nc, rawEvent(eventToken(later()), string(noise)))
		case 4:
			upgraded(nc)
			nc.Write(noise)
		case 5:
			upgraded(nc)
			nc.Write(maskedFrame(0x80|opText, noise))
		case 6:
			upgraded(nc)
			nc.Write(join(maskedFrame(0x80|opText, []byte(subscribe)), noise))
		case 7: // one byte of a good message is another
			text := []byte(subscribe)
			text[int(noise[0])*len(text)/256] ^= noise[len(noise)-1]
			upgraded(nc)
			nc.Write(maskedFrame(0x80|opText, text))
		}
		nc.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, nc)
	})
}

// strangers have no token. Each sends as much as it may, all but the last byte, and stays
// until all have done so; some send the last byte then.
func strangers(t *testing.T, addr string) {
	long := maskedFrame(0x80|opText, []byte(`{"type":"subscribe","content":{"repos":[`+strings.Repeat(`{},`, 21000)+`{}]}}`))
	short := maskedFrame(0x80|opText, bytes.Repeat([]byte("["), 4<<10))
	fragments := bytes.Repeat(maskedFrame(opContinuation, bytes.Repeat([]byte("x"), 1000)), 65)
	n := strangersInAll()
	all := newBarrier(n)
	var came atomic.Int64
	crowd(addr, n, n, func(i int, nc net.Conn) {
		if upgraded(nc) {
			came.Add(1)
		}
		nc.SetWriteDeadline(time.Now().Add(2 * time.Second)) // the server does not take all of it
		switch i % 5 {
		case 0, 1:
			nc.Write(long[:len(long)-1])
		case 2:
			nc.Write(short[:len(short)-1])
		case 3:
			nc.Write(join(maskedFrame(opText, nil), fragments))
		case 4:
			nc.Write(bytes.Repeat(maskedFrame(0x80|opPing, bytes.Repeat([]byte("x"), 125)), 500))
		}
		all.wait()
		nc.SetWriteDeadline(time.Now().Add(patient))
		if i%5 == 0 {
			nc.Write(long[len(long)-1:])
		}
		time.Sleep(time.Second) // they stay for a while
	})
	if came.Load() < int64(n)*9/10 {
		t.Errorf("of %d strangers only %d came in", n, came.Load())
	}
}

// deafStrangers read nothing. Each sends long pings until the kernel's buffers are about full,
// and then many of one byte.
func deafStrangers(t *testing.T, addr string) {
	long := maskedFrame(0x80|opPing, bytes.Repeat([]byte("x"), 125))
	short := bytes.Repeat(maskedFrame(0x80|opPing, []byte("y")), 1000)
	n := strangersInAll()
	all := newBarrier(n)
	crowd(addr, n, n, func(i int, other net.Conn) {
		other.Close()
		smallBuffer := func(_, _ string, raw syscall.RawConn) error {
			return raw.Control(func(fd uintptr) {
				syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 2304)
			})
		}
		d := net.Dialer{LocalAddr: local(i), Control: smallBuffer, Timeout: patient}
		nc, err := d.Dial("tcp", addr)
		if err != nil {
			t.Error(err)
			return
		}
		defer nc.Close()
		upgraded(nc)
		nc.SetWriteDeadline(time.Now().Add(5 * time.Second)) // the server does not take all of it
		nc.Write(join(bytes.Repeat(long, 500+i%50*10), short))
		all.wait()
		time.Sleep(time.Second) // they stay for a while
	})
}

func strangersInAll() int { return min(howMany(2000, 300), openFiles()/2-200) }

// openFiles is the limit of open files of this process, and of those that it starts.
func openFiles() int {
	var limit syscall.Rlimit
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit)
	return int(min(limit.Cur, 1<<20))
}

// Whatever strangers and clients do, events for others go on, memory stays bounded, and
// when they are gone the server takes no more than before.
func TestFloods(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		flood func(t *testing.T, addr string)
		mib   float64 // at most, meanwhile
	}{
		{"slow heads", slowHeads, 400},
		{"slow bodies", slowBodies, 400},
		{"endless fragments", endlessFragments, 400},
		{"long messages at once", longMessages, 400},
		{"frames of 2^63 bytes", endlessFrames, 400},
		{"come and go", comeAndLeave, 400},
		{"random bytes", noise, 400},
		// 20,000 take less than 400 MiB.
		{"strangers that send as much as they may", strangers, 60 + float64(strangersInAll())*340/20000},
		{"strangers that read nothing", deafStrangers, 60 + float64(strangersInAll())*340/20000},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := startMetered(t, 0)
			nextTo(t, s.addr, func() {}) // what is made once, and kept
			var before footprint
			waitFor(t, "all is as it was", func() bool { before = s.footprint(); return before.connections == 0 })
			begin := time.Now()
			stop := s.watch()
			slowest := nextTo(t, s.addr, func() { tc.flood(t, s.addr) })
			during, took := stop(), time.Since(begin)
			s.returnsTo(before, 30)
			t.Logf("%v, an event took %v at most: before %v; during %v; after %v",
				took.Round(time.Millisecond), slowest.Round(time.Millisecond), before, during, s.footprint())
			if limit := tc.mib * raceFactor(); during.mib > limit {
				t.Errorf("it took %.0f MiB meanwhile, more than %.0f", during.mib, limit)
			}
			if log := s.out.String(); strings.Contains(log, "ERROR") || strings.Contains(log, "panic") {
				t.Errorf("the log has an error: %s", log)
			}
		})
	}
}

// A fullServer is the real binary with all places taken by clients that have subscribed to
// repoA.
type fullServer struct {
	*metered
	clients []*testClient
	seaf    *seafServer
	fresh   *http.Client // takes a new connection for each request
}

func startFullServer(t *testing.T) *fullServer {
	t.Helper()
	const places = 256 - 64
	s := &fullServer{
		metered: startMetered(t, 256),
		fresh:   &http.Client{Timeout: patient, Transport: &http.Transport{DisableKeepAlives: true}},
	}
	s.seaf = startSeafServer(t, socketBeside(t, s.dir), membersReply("alice@example.com"))
	for range places {
		s.clients = append(s.clients, connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com"))
	}
	return s
}

// ask sends a request over a fresh connection, which must be answered.
func (s *fullServer) ask(method, path, body string) {
	s.t.Helper()
	r, _ := http.NewRequest(method, "http://"+s.addr+path, strings.NewReader(body))
	r.Header.Set("Authorization", "Token "+eventToken(later()))
	answer, err := s.fresh.Do(r)
	if err != nil {
		s.t.Fatalf("with all places taken: %v", err)
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		s.t.Fatalf("with all places taken, %s is answered %s", path, answer.Status)
	}
}

// got demands that all clients got so many numbered events.
func (s *fullServer) got(events int) {
	s.t.Helper()
	for _, c := range s.clients {
		for n := range events {
			c.expectTexts(numbered(repoA, n, 0))
		}
	}
}

// With all places taken and 5,000 connections more that never upgrade, on the ports of clients
// and of metrics, an event over a fresh connection is answered, and so are /ping and the
// question to seaf-server.
func TestPlainConnections(t *testing.T) {
	t.Parallel()
	s := startFullServer(t)
	n := min(howMany(5000, 1000), openFiles()-1000) / 2
	come, leave := newBarrier(2*n+1), make(chan bool)
	var gone sync.WaitGroup
	stop := sync.OnceFunc(func() { close(leave); gone.Wait() })
	defer stop()
	for _, addr := range []string{s.addr, s.metrics} {
		gone.Go(func() {
			crowd(addr, n, n, func(i int, nc net.Conn) {
				switch i % 3 {
				case 1: // idle, as a pooled one
					io.WriteString(nc, "GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
				case 2:
					io.WriteString(nc, "GET /ping HTTP/1.1\r\n")
				}
				come.wait()
				<-leave
			})
		})
	}
	come.wait()
	events := 0
	withinOnce(t, time.Second, func() {
		s.ask("POST", "/events", numbered(repoA, events, 0))
		events++
	})
	withinOnce(t, time.Second, func() { s.ask("GET", "/ping", "") })
	s.ask("POST", "/events", groupEvent(repoA, "add", 1))
	<-s.seaf.requests
	s.got(events)
	for _, c := range s.clients {
		c.expectTexts(groupEvent(repoA, "add", 1))
	}
	stop()
	if v := scrape(t, s.metrics); v["connections"] != float64(len(s.clients)) || v[`group_lookups_total{result="ok"}`] != 1 {
		t.Errorf("the metrics are %v", v)
	}
}

// Requests that are cut since too many are open show in the log and in the metrics.
func TestNoRoomForRequests(t *testing.T) {
	t.Parallel()
	s := startFullServer(t)
	half := strings.TrimSuffix(rawEvent(eventToken(later()), update(repoA, "1")), "}")
	var cut atomic.Int64
	const senders = usualPlain + 8
	var all []*testClient
	for range senders {
		c := rawConn(t, s.addr)
		all = append(all, c)
		io.WriteString(c.nc, half)
		go func() {
			io.Copy(io.Discard, c.nc)
			cut.Add(1)
		}()
	}
	waitFor(t, "some are cut", func() bool { return cut.Load() > 0 })
	s.says("connections are closed, since too many are open")
	for _, c := range all {
		c.nc.Close()
	}
	waitFor(t, "the others are gone", func() bool { return cut.Load() == senders })
	s.ask("GET", "/ping", "")
	if scrape(t, s.metrics)[`refused_total{reason="no-room"}`] == 0 {
		t.Error("the metrics do not count what was cut")
	}
	if n := scrape(t, s.metrics)["connections"]; n != float64(len(s.clients)) {
		t.Errorf("%v clients are left", n)
	}
}

// With all places taken, and strangers that come, 60 each second, and announce a body that they
// never send, each event and each /ping over a fresh connection is answered.
func TestPostsWithoutBody(t *testing.T) {
	t.Parallel()
	s := startFullServer(t)
	var came atomic.Int64
	done, ended := make(chan bool), make(chan bool)
	go func() {
		defer close(ended)
		for n := 0; ; n++ {
			select {
			case <-done:
				return
			case <-time.After(time.Duration(n%60/59) * time.Second): // 60 at once
			}
			nc, err := net.DialTimeout("tcp", s.addr, time.Second)
			if err != nil {
				continue
			}
			request := []string{"POST /x", "POST /events", "GET /ping", "OPTIONS /"}[n%4]
			fmt.Fprintf(nc, "%s HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", request)
			time.AfterFunc(1500*time.Millisecond, func() { nc.Close() })
			came.Add(1)
		}
	}()
	events := 0
	for ; events < 30 || came.Load() < 300; events++ {
		time.Sleep(50 * time.Millisecond) // else the events are too many for a slow machine
		s.ask("POST", "/events", numbered(repoA, events, 0))
		s.ask("GET", "/ping", "")
	}
	close(done)
	<-ended
	s.got(events)
	t.Logf("%d events next to %d strangers", events, came.Load())
}

// ---- Tests with proxies ----

// A realProxy is a proxy with a rule of README.md, in a configuration that can
// run beside others. In it, RULE, LISTEN, SEAHUB and DIR are filled in, and IDLE
// by how long it keeps a silent connection: usual, or short for a second.
type realProxy struct {
	rule         string // its name in README.md
	program      string
	args         []string
	config       string
	usual, short string
	cuts         bool   // a connection that is silent for so long
	events       bool   // lets Seahub's events pass
	forwarded    string // the X-Forwarded-For that we get when the client sent 203.0.113.9
	edit         func(rule string) string
}

const nginxConfig = `daemon off;
user root;
pid DIR/pid;
events { worker_connections 4000; }
http {
	access_log off;
	client_body_temp_path DIR/body;
	proxy_temp_path DIR/proxy;
	fastcgi_temp_path DIR/fastcgi;
	uwsgi_temp_path DIR/uwsgi;
	scgi_temp_path DIR/scgi;
	IDLE
	RULE
}
`

var (
	// nginx adds no X-Forwarded-For, but lets the client's pass.
	nginxManual = realProxy{rule: "nginx-manual", program: "nginx", args: []string{"-e", "stderr", "-c", "FILE"}, config: nginxConfig,
		short: "proxy_read_timeout 2s;", cuts: true, events: true, forwarded: "203.0.113.9"}
	nginxCurrent = realProxy{rule: "nginx-current", program: "nginx", args: []string{"-e", "stderr", "-c", "FILE"},
		config: strings.Replace(nginxConfig, "RULE", "server {\nRULE\n}", 1),
		short:  "proxy_read_timeout 2s;", cuts: true, events: true, forwarded: "203.0.113.9"}
	realProxies = []realProxy{
		nginxManual,
		nginxCurrent,
		{rule: "apache", program: "apache2", args: []string{"-DFOREGROUND", "-f", "FILE"}, config: `
ServerName localhost
Listen LISTEN
PidFile DIR/pid
DefaultRuntimeDir DIR
ErrorLog /dev/stderr
User www-data
Group www-data
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule proxy_module /usr/lib/apache2/modules/mod_proxy.so
LoadModule proxy_http_module /usr/lib/apache2/modules/mod_proxy_http.so
LoadModule proxy_wstunnel_module /usr/lib/apache2/modules/mod_proxy_wstunnel.so
IDLE
RULE
ProxyPass / http://SEAHUB/
`, usual: "Timeout 300", short: "Timeout 2", cuts: true, events: true, forwarded: "203.0.113.9, 127.0.0.1"},
		{rule: "haproxy", program: "haproxy", args: []string{"-db", "-f", "FILE"}, config: `
defaults
    mode http
    timeout connect 5s
    IDLE
RULE
`, usual: "timeout client 50s\n    timeout server 50s", short: "timeout client 2s\n    timeout server 2s", cuts: true,
			forwarded: "203.0.113.9, 127.0.0.1"}, // in a line of its own behind the client's
		{rule: "caddy", program: "caddy", args: []string{"run", "--adapter", "caddyfile", "--config", "FILE"}, config: `{
	admin off
	auto_https off
	IDLE
}
RULE`, short: "servers {\ntimeouts {\nread_body 2s\nread_header 2s\nwrite 2s\nidle 2s\n}\n}", events: true, forwarded: "127.0.0.1"},
	}
)

// A runningProxy is a started realProxy.
type runningProxy struct {
	*process
	realProxy
	addr      string
	env, argv []string
}

// startProxy starts the proxy in front of a server, with Seahub behind all other
// paths, as it is in each installation.
func startProxy(t testing.TB, p realProxy, server, idle string) *runningProxy {
	t.Helper()
	need(t, p.program)
	dir := t.TempDir()
	px := &runningProxy{realProxy: p, addr: "127.0.0.1:" + freePort(t),
		env: []string{"HOME=" + dir, "XDG_CONFIG_HOME=" + dir, "XDG_DATA_HOME=" + dir}}
	seahub := startSeahub(t)
	rule := readmeRule(t, p.rule)
	if p.edit != nil {
		rule = p.edit(rule)
	}
	if !strings.Contains(rule, ":8083") {
		t.Fatalf("the rule %s does not lead to port 8083: %s", p.rule, rule)
	}
	config := strings.NewReplacer("RULE", rule, "IDLE", idle).Replace(p.config)
	config = strings.NewReplacer( // nothing but addresses, and what Seahub's own rule would be
		"127.0.0.1:8083", server, "192.168.0.137:8083", server, "192.168.0.137:80", seahub, "0.0.0.0:80", px.addr,
		"server {\n", "server {\nlisten "+px.addr+";\nlocation / { proxy_pass http://"+seahub+"; }\n",
		"http://localhost {\n", "http://"+px.addr+" {\nbind 127.0.0.1\nhandle {\nreverse_proxy "+seahub+"\n}\n",
		"LISTEN", px.addr, "SEAHUB", seahub, "DIR", dir).Replace(config)
	file := filepath.Join(dir, "proxy.conf")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, arg := range p.args {
		px.argv = append(px.argv, strings.Replace(arg, "FILE", file, 1))
	}
	px.start(t)
	return px
}

// start starts the proxy and waits until it serves.
func (px *runningProxy) start(t testing.TB) {
	t.Helper()
	px.process = start(t, px.env, px.program, px.argv...)
	t.Cleanup(px.stop)
	px.waitPing(px.addr + "/notification")
}

// stop ends the proxy at once, if it still runs.
func (px *runningProxy) stop() { stopWhole(px.process) }

// stopWhole ends a program and its children, which start's own clean-up, by
// SIGKILL, would leave behind.
func stopWhole(p *process) {
	p.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-p.done:
		p.done <- err // for the next to ask
	case <-time.After(2 * patient): // Apache gives connections 10 s
		p.t.Errorf("%s does not end", p)
	}
}

// startSeahub stands for Seafile's web pages and returns its address.
func startSeahub(t testing.TB) string {
	t.Helper()
	hub := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "<!DOCTYPE html>\n<html lang=\"en\"><title>Log In - Private Seafile</title></html>\n")
	}))
	t.Cleanup(hub.Close)
	return hub.Listener.Addr().String()
}

// eachProxy runs a test with each of the rules, all at the same time.
func eachProxy(t *testing.T, test func(*testing.T, realProxy)) {
	t.Parallel()
	for _, p := range realProxies {
		t.Run(p.rule, func(t *testing.T) {
			t.Parallel()
			test(t, p)
		})
	}
}

// Behind each of the rules, /ping, the clients of both kinds, and the senders work, and a
// client cannot post.
func TestProxySession(t *testing.T) {
	eachProxy(t, func(t *testing.T, p realProxy) {
		s := startServer(t)
		px := startProxy(t, p, s.addr, p.usual)
		base := "http://" + px.addr + "/notification"

		answer, text := request(t, "GET", base+"/ping", "")
		if answer.StatusCode != 200 || strings.TrimSpace(text) != `{"ret": "pong"}` {
			t.Errorf("ping answered %s %q", answer.Status, text)
		}
		for _, path := range []string{"", "/", "/ping", "/ping/", "/events"} {
			if answer, _ := request(t, "GET", base+path, ""); answer.StatusCode >= 300 && answer.StatusCode < 400 {
				t.Errorf("GET /notification%s is redirected to %s", path, answer.Header.Get("Location"))
			}
		}

		var clients []*testClient
		for _, path := range []string{"/notification", "/notification/"} {
			for _, lines := range []string{asDesktop + "Origin: http://127.0.0.1\r\n", asBrowser} {
				c := connectTo(t, px.addr, path, lines+"X-Forwarded-For: 203.0.113.9\r\n")
				clients = append(clients, c.subscribed(repoA, "alice@example.com"))
			}
		}
		if got := clients[0].reply.Header.Get("Sec-WebSocket-Protocol"); got != subprotocol {
			t.Errorf("the desktop client's subprotocol is answered by %q", got)
		}
		all := func(text string) {
			t.Helper()
			for _, c := range clients {
				c.expect(opText, text)
			}
		}
		post(t, s.addr, update(repoA, "direct"), len(clients))
		all(update(repoA, "direct"))

		comment := commentEvent(repoA)
		answer, text = request(t, "POST", base+"/events", comment, tokenLine(eventToken(later())))
		switch {
		case p.events && answer.StatusCode == 200 && strings.Contains(text, "subscribers"):
			all(comment)
			answer, _ = request(t, "POST", base+"/events", comment, tokenLine(clientToken(repoA, "alice@example.com", later())))
			if answer.StatusCode != http.StatusForbidden {
				t.Errorf("an event posted with a client's token answered %s", answer.Status)
			}
		case p.events || !strings.Contains(text, "Private Seafile"):
			t.Errorf("Seahub's event answered %s %q", answer.Status, text)
		}
		for _, c := range clients {
			c.sync() // nothing else came: not the forged event
		}

		s.logged(`for "` + regexp.QuoteMeta(p.forwarded) + `".*: connected`)
	})
}

// nginx without proxy_http_version upgrades by HTTP/1.0, and HAProxy without an own health
// check asks by OPTIONS: both work.
func TestProxyHabits(t *testing.T) {
	t.Parallel()
	t.Run("nginx without proxy_http_version", func(t *testing.T) {
		t.Parallel()
		s := startServer(t)
		p := nginxManual
		p.edit = func(rule string) string {
			return strings.ReplaceAll(rule, "proxy_http_version 1.1;", "proxy_http_version 1.0;")
		}
		px := startProxy(t, p, s.addr, p.usual)
		c := connectTo(t, px.addr, "/notification", asDesktop).subscribed(repoA, "alice@example.com")
		s.post(update(repoA, "1"), 1)
		c.expectTexts(update(repoA, "1"))
	})
	t.Run("HAProxy's option httpchk", func(t *testing.T) {
		t.Parallel()
		s := startServer(t)
		p := realProxies[slices.IndexFunc(realProxies, func(p realProxy) bool { return p.rule == "haproxy" })]
		p.edit = func(rule string) string {
			const server = "    server ws 192.168.0.137:8083"
			rule = strings.ReplaceAll(rule, server, "    option httpchk\n"+server+" check inter 100")
			if !strings.Contains(rule, "httpchk") {
				t.Error("the rule is another one")
			}
			return rule
		}
		px := startProxy(t, p, s.addr, p.usual)
		time.Sleep(time.Second) // what must not happen: 3 checks that fail take the server down
		connectTo(t, px.addr, "/notification", asDesktop).sync()
	})
}

// Each proxy cuts a connection that is silent for 2 s, here. Our pings keep it open; without them it
// is cut, which shows that the 2 s are in force.
func TestProxyIdle(t *testing.T) {
	eachProxy(t, func(t *testing.T, p realProxy) {
		s := startServer(t)
		px := startProxy(t, p, s.addr, p.short)
		if p.cuts {
			c := connectTo(t, px.addr, "/notification", asBrowser).subscribed(repoA, "alice@example.com")
			start := time.Now()
			c.nc.SetReadDeadline(start.Add(patient))
			if _, _, err := c.read(); err == nil || os.IsTimeout(err) {
				t.Fatalf("without pings the proxy does not cut: %v", err)
			}
			if d := time.Since(start); d < 1900*time.Millisecond {
				t.Fatalf("cut after %v already", d)
			}
			s.waitFigure("subscriptions", 0)
		}
		for {
			browser := connectTo(t, px.addr, "/notification", asBrowser).subscribed(repoA, "bob@example.com")
			last, late := time.Now(), false
			for end := last.Add(4500 * time.Millisecond); time.Now().Before(end); {
				time.Sleep(300 * time.Millisecond) // the proxy's time-out runs in real time
				if late = time.Since(last) > 1500*time.Millisecond; late {
					break
				}
				last = time.Now()
				s.advance(20 * time.Second)
				browser.expect(opPing, "")
				browser.pong()
				browser.sync() // it has come, however busy the machine is
			}
			if late || time.Since(last) > 1500*time.Millisecond {
				browser.nc.Close() // the machine is too busy: once more
				s.waitFigure("subscriptions", 0)
				continue
			}
			post(t, s.addr, update(repoA, "1"), 1)
			browser.expect(opText, update(repoA, "1"))
			return
		}
	})
}

// The proxy is restarted under live clients: they all see the end, so that they
// know to come back, and each that does gets the next event.
func TestProxyRestart(t *testing.T) {
	eachProxy(t, func(t *testing.T, p realProxy) {
		s := startServer(t)
		px := startProxy(t, p, s.addr, p.usual)
		var clients []*testClient
		come := func() {
			clients = nil
			for range 5 {
				for _, lines := range []string{asDesktop, asBrowser} {
					clients = append(clients, connectTo(t, px.addr, "/notification", lines).subscribed(repoA, "alice@example.com"))
				}
			}
		}
		come()
		px.stop()
		for _, c := range clients {
			c.nc.SetReadDeadline(time.Now().Add(patient))
			for {
				if _, _, err := c.read(); os.IsTimeout(err) {
					t.Fatal("a client was left with a connection to nobody")
				} else if err != nil {
					break
				}
			}
		}
		s.waitFigure("subscriptions", 0)
		px.start(t)
		come()
		post(t, s.addr, update(repoA, "after"), len(clients))
		for _, c := range clients {
			c.expect(opText, update(repoA, "after"))
		}
	})
}

// When the server closes its clients, a proxy lets each of them finish the closing
// handshake: none of 300 is cut off before its own close frame.
func TestProxyClosesCleanly(t *testing.T) {
	eachProxy(t, func(t *testing.T, p realProxy) {
		s := startServer(t)
		s.log.setLevel(0) // info
		px := startProxy(t, p, s.addr, p.usual)
		var unclean atomic.Int64
		var all sync.WaitGroup
		for i := range 300 {
			c := connectTo(t, px.addr, "/notification", asBrowser)
			c.sync()
			all.Go(func() {
				opcode, payload, err := c.next()
				if err != nil || opcode != opClose || closeStatus(payload) != statusGoingAway {
					t.Errorf("got frame %d %q, %v", opcode, payload, err)
					return
				}
				// A browser is not always quick.
				c.nc.SetReadDeadline(time.Now().Add(time.Duration(i%20) * time.Millisecond))
				if _, err := c.br.ReadByte(); !os.IsTimeout(err) {
					unclean.Add(1)
					return
				}
				c.write(maskedFrame(0x80|opClose, payload))
				c.nc.SetReadDeadline(time.Now().Add(patient))
				if _, err := c.br.ReadByte(); err != io.EOF {
					unclean.Add(1)
				}
			})
		}
		s.shutdown()
		all.Wait()
		if n := unclean.Load(); n > 0 {
			t.Errorf("%d of 300 closed uncleanly", n)
		}
	})
}

// A reload, unlike a restart, keeps the connections that there are, and the
// others come in as before: README.md advises it.
func TestProxyReload(t *testing.T) {
	t.Parallel()
	for _, p := range realProxies {
		reload := map[string]syscall.Signal{"nginx": syscall.SIGHUP, "apache2": syscall.SIGUSR1}[p.program]
		if reload == 0 {
			continue // by means other than a signal
		}
		t.Run(p.rule, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			px := startProxy(t, p, s.addr, p.usual)
			before := connectTo(t, px.addr, "/notification", asBrowser).subscribed(repoA, "alice@example.com")
			workers := func() string {
				children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", px.Process.Pid, px.Process.Pid))
				if err != nil {
					t.Fatal(err)
				}
				return string(children)
			}
			had := workers()
			px.Process.Signal(reload)
			waitFor(t, "new workers", func() bool { return len(workers()) > 0 && workers() != had })
			px.waitPing(px.addr + "/notification")
			after := connectTo(t, px.addr, "/notification", asBrowser).subscribed(repoA, "alice@example.com")
			post(t, s.addr, update(repoA, "1"), 2)
			before.expect(opText, update(repoA, "1"))
			after.expect(opText, update(repoA, "1"))
		})
	}
}

// ---- Tests with a browser ----

// browserPage does what Seahub's page does, with a shorter back-off. What it shows it
// also reports, one report after the other.
var browserPage = template.Must(template.New("").Parse(`<!DOCTYPE html><meta charset="utf-8"><title>Library</title><body><script>
const repo = {{.}};
let ws, opened = 0, tries = 0, left = false, report = Promise.resolve();
function show(line) {
	const p = document.createElement('p');
	p.textContent = line;
	document.body.append(p);
	const text = document.body.innerText;
	report = report.then(() => fetch('/report', {method: 'POST', body: text}));
}
async function subscribe() {
	const token = await (await fetch('/token')).text();
	ws.send(JSON.stringify({type: 'subscribe', content: {repos: [{id: repo, jwt_token: token}]}}));
}
function open() {
	ws = new WebSocket('ws://' + location.host + '/notification');
	ws.onopen = () => { show('opened ' + ++opened); subscribe(); };
	ws.onmessage = e => {
		const m = JSON.parse(e.data);
		show(m.type + ' ' + (m.content.commit_id || m.content.path || m.content.file_path || m.content.repo_id));
		if (m.type === 'jwt-expired') subscribe();
	};
	ws.onclose = e => {
		show('closed ' + e.code);
		if (!left && tries < 5) setTimeout(open, 250 * 2 ** tries++);
	};
}
open();
fetch('/leave').then(() => { // answered when the test wants it
	left = true;
	ws.send(JSON.stringify({type: 'unsubscribe', content: {repos: [{id: repo}]}}));
	ws.close();
});
</script>`))

// startChromium opens a page in a browser.
func startChromium(t *testing.T, url string) {
	t.Helper()
	dir := t.TempDir()
	chromium := start(t, []string{"HOME=" + dir, "TMPDIR=" + dir}, "chromium", "--headless", "--no-sandbox",
		"--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
		"--user-data-dir="+dir, "--remote-debugging-port=0", url)
	t.Cleanup(func() { stopWhole(chromium) })
}

// closingPage opens 300 connections to each URL, each of which the server closes, and reports
// how many closed uncleanly; where some did, it tries again, three times in all. Of more than
// some 8 at a time Chromium delays each for seconds.
var closingPage = template.Must(template.New("").Parse(`<!DOCTYPE html><meta charset="utf-8"><title>Close</title><body><script>
const one = url => new Promise(done => {
	const ws = new WebSocket(url);
	ws.onopen = () => ws.send('x');
	ws.onclose = e => done(e.wasClean && e.code === 1008);
});
(async () => {
	for (const url of {{.}}) {
		const unclean = [];
		do {
			let n = 0;
			for (let i = 0; i < 50; i++) {
				const clean = await Promise.all(Array.from({length: 6}, () => one(url)));
				n += clean.filter(c => !c).length;
			}
			unclean.push(n);
		} while (unclean.at(-1) > 0 && unclean.length < 3);
		await fetch('/report', {method: 'POST', body: unclean.join(', ')});
	}
})();
</script>`))

// A browser sees a clean close of each connection that the server closes, directly and
// through each proxy. On a very busy machine one of 300 may be late.
func TestBrowserClosesCleanly(t *testing.T) {
	t.Parallel()
	need(t, "chromium")
	s := startServer(t)
	s.log.setLevel(0) // info
	names, urls := []string{"direct"}, []string{"ws://" + s.addr + "/"}
	for _, p := range realProxies {
		names = append(names, p.rule)
		urls = append(urls, "ws://"+startProxy(t, p, s.addr, p.usual).addr+"/notification")
	}
	reports := make(chan string, len(urls))
	pages := http.NewServeMux()
	pages.HandleFunc("/close", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		closingPage.Execute(w, urls)
	})
	pages.HandleFunc("/report", func(_ http.ResponseWriter, r *http.Request) {
		text, _ := io.ReadAll(r.Body)
		reports <- string(text)
	})
	hub := httptest.NewServer(pages)
	t.Cleanup(hub.Close)
	startChromium(t, hub.URL+"/close")
	for _, name := range names {
		select {
		case report := <-reports:
			if t.Logf("%s: of 300 closed uncleanly: %s", name, report); report != "0" && !strings.HasSuffix(report, ", 0") {
				t.Errorf("%s: some closed uncleanly each time", name)
			}
		case <-time.After(3 * patient):
			t.Fatalf("%s: the browser does not come to an end", name)
		}
	}
}

// The page of a library gets events, renews its token, idles behind a proxy, survives a
// restart of the server, and leaves.
func TestBrowser(t *testing.T) {
	t.Parallel()
	need(t, "chromium", "nginx")
	s := startServer(t)

	var mu sync.Mutex
	var dom string
	expires := s.now().Add(25 * time.Second) // of the first token
	leave := make(chan bool)
	pages := http.NewServeMux()
	pages.HandleFunc("/library", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		browserPage.Execute(w, repoA)
	})
	pages.HandleFunc("/token", func(w http.ResponseWriter, _ *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		io.WriteString(w, clientToken(repoA, "alice@example.com", expires))
		expires = later()
	})
	pages.HandleFunc("/report", func(_ http.ResponseWriter, r *http.Request) {
		text, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		dom = string(text)
	})
	pages.HandleFunc("/leave", func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-leave:
		case <-r.Context().Done():
		}
	})
	hub := httptest.NewServer(pages)
	t.Cleanup(hub.Close)
	p := nginxCurrent
	own := "location ~ ^/(library|token|report|leave)$ { proxy_pass http://" + hub.Listener.Addr().String() +
		"; proxy_read_timeout 60s; }\n"
	p.config = strings.Replace(p.config, "server {\n", "server {\n"+own, 1)
	px := startProxy(t, p, s.addr, "proxy_read_timeout 3s;")

	lines := func() []string {
		mu.Lock()
		defer mu.Unlock()
		return strings.Fields(strings.ReplaceAll(strings.ReplaceAll(dom, " ", "_"), "\n", " "))
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the page shows %q", lines())
		}
	})
	shows := func(want ...string) {
		t.Helper()
		waitFor(t, fmt.Sprintf("the page shows %q", want), func() bool { return slices.Equal(lines(), want) })
	}
	startChromium(t, "http://"+px.addr+"/library")
	s.waitFigure("subscriptions", 1)

	want := []string{"opened_1"}
	for _, ev := range [][2]string{
		{update(repoA, "c1"), "repo-update_c1"},
		{lockPosted(repoA, "/Grüße/日本語-😀.txt"), "file-lock-changed_/Grüße/日本語-😀.txt"},
		{commentEvent(repoA), "comment-update_/a.md"},
	} {
		post(t, s.addr, ev[0], 1)
		want = append(want, ev[1])
		shows(want...)
	}

	// The token runs out; the page gets a new one, over the same connection.
	s.advance(25 * time.Second)
	want = append(want, "jwt-expired_"+repoA)
	shows(want...)
	s.logged("(?s): subscribed to .*: subscribed to ")
	post(t, s.addr, update(repoA, "c2"), 1)
	want = append(want, "repo-update_c2")
	shows(want...)

	// The page idles for longer than nginx bears without our pings.
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Second) {
		s.advance(20 * time.Second)
	}
	post(t, s.addr, update(repoA, "c3"), 1)
	want = append(want, "repo-update_c3")
	shows(want...)

	// The server is restarted; the page comes back by itself.
	s.shutdown()
	want = append(want, "closed_1001")
	waitFor(t, "the page sees the end", func() bool { return slices.Contains(lines(), "closed_1001") })
	ln, err := net.Listen("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	s.server = newServer(s.cfg, s.log, s.time.clock())
	go s.http.Serve(ln)
	s.waitFigure("subscriptions", 1)
	post(t, s.addr, update(repoA, "c4"), 1)
	waitFor(t, "the page gets events again", func() bool { return slices.Contains(lines(), "repo-update_c4") })
	got := lines()
	if !slices.Equal(got[:len(want)], want) || !slices.Contains(got, "opened_2") || slices.Contains(got, "opened_3") {
		t.Errorf("the page shows %q, want %q and opened_2", got, want)
	}

	// The page goes.
	close(leave)
	s.waitFigure("subscriptions", 0)
	waitFor(t, "the page's own close is answered", func() bool { return lines()[len(lines())-1] == "closed_1005" })
	s.logged("unsubscribed")
}

// ---- Tests of a cluster ----

// A cluster is three real servers behind the proxies of README.md.
type cluster struct {
	t       testing.TB
	nodes   [3]*process
	ports   [3]string
	metrics [3]string
	dirs    [3]string
	events  string // nginx, where seaf-server posts
	public  string // nginx, where clients come
}

func startCluster(t testing.TB) *cluster {
	t.Helper()
	cl := &cluster{t: t}
	for i := range cl.nodes {
		cl.ports[i] = freePort(t)
		cl.metrics[i] = "127.0.0.1:" + freePort(t)
		cl.dirs[i] = writeConfig(t, cl.ports[i], "metrics = "+cl.metrics[i])
		cl.startNode(i)
	}
	return cl
}

func (cl *cluster) startNode(i int) {
	cl.t.Helper()
	cl.nodes[i] = startBinary(cl.t, cl.ports[i], nil, "-c", cl.dirs[i])
}

// connections tells how many clients each server has.
func (cl *cluster) connections() (n [3]int) {
	cl.t.Helper()
	for i, addr := range cl.metrics {
		if cl.nodes[i].ProcessState == nil {
			_, text := request(cl.t, "GET", "http://"+addr+"/metrics", "")
			_, text, _ = strings.Cut(text, "\nseafile_notification_connections ")
			fmt.Sscan(text, &n[i])
		}
	}
	return n
}

// place replaces in a block of README.md the addresses of the three machines.
func (cl *cluster) place(text string) string {
	for i, port := range cl.ports {
		text = strings.ReplaceAll(text, fmt.Sprintf("192.168.1.1%d:8083", i+1), "127.0.0.1:"+port)
	}
	return text
}

// startNginx starts nginx with the rules of README.md, without those that match without.
func (cl *cluster) startNginx(without string) {
	t := cl.t
	t.Helper()
	need(t, "nginx")
	dir := t.TempDir()
	os.Chmod(dir, 0o755)
	events, public := freePort(t), freePort(t)
	cl.events, cl.public = "127.0.0.1:"+events, "127.0.0.1:"+public
	user := ""
	if os.Getuid() == 0 {
		user = "user root;"
	}
	rules := readmeBlock(t, "nginx: notification.conf")
	if without != "" {
		rules = regexp.MustCompile(`(?m)^.*(`+without+`).*$`).ReplaceAllString(rules, "")
	}
	text := cl.place(fmt.Sprintf(`%s
daemon off; pid %[2]s/pid; worker_processes 2; error_log %[2]s/error.log;
events { worker_connections 4000; }
http {
access_log off; sendfile on; tcp_nopush on;
client_body_temp_path %[2]s/b; proxy_temp_path %[2]s/p; fastcgi_temp_path %[2]s/f; uwsgi_temp_path %[2]s/u; scgi_temp_path %[2]s/s;
%s
server {
listen 127.0.0.1:%s;
%s}
}
`, user, dir, rules, public, readmeBlock(t, "nginx: locations")))
	text = strings.ReplaceAll(text, "127.0.0.1:8084", cl.events)
	if err := os.WriteFile(filepath.Join(dir, "nginx.conf"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	p := start(t, nil, "nginx", "-e", filepath.Join(dir, "error.log"), "-p", dir, "-c", filepath.Join(dir, "nginx.conf"))
	t.Cleanup(func() { p.terminate() }) // its worker processes, too
	p.waitPing(cl.events)
	p.waitPing(cl.public + "/notification")
}

// A member is a web page's client of one library, that comes back when its
// connection ends, and notes which events it gets.
type member struct {
	repoID string
	synced chan bool
	mu     sync.Mutex
	conn   *testClient
	got    []int
	since  int // all events begun from this one on must come
	joined int // how often
}

// join lets n members connect to addr, the first with library number first.
func (cl *cluster) join(addr string, first, n int, begun *atomic.Int64) (members []*member) {
	cl.t.Helper()
	for i := range n {
		m := &member{repoID: clusterRepo(first + i), synced: make(chan bool, 1)}
		m.connect(cl.t, addr)
		go m.read(cl.t, addr, begun)
		members = append(members, m)
	}
	waitFor(cl.t, "all have subscribed", func() bool { return joined(members) == n })
	return members
}

// joined tells how often members have joined.
func joined(members []*member) (n int) {
	for _, m := range members {
		m.mu.Lock()
		n += m.joined
		m.mu.Unlock()
	}
	return n
}

func (m *member) connect(t testing.TB, addr string) {
	c := connectTo(t, addr, "/notification", asBrowser)
	c.subscribe(m.repoID, clientToken(m.repoID, "alice@example.com", later()))
	c.write(maskedFrame(0x80|opPing, []byte("joined")))
	m.mu.Lock()
	m.conn, m.got = c, nil
	m.mu.Unlock()
}

const clusterRepos = 50

func clusterRepo(n int) string { return fmt.Sprintf("library-%d", n%clusterRepos) }

func (m *member) read(t testing.TB, addr string, begun *atomic.Int64) {
	for {
		opcode, payload, err := m.conn.read()
		switch {
		case err != nil && t.Context().Err() != nil:
			return
		case err != nil:
			m.connect(t, addr)
		case opcode == opPong && string(payload) == "joined": // the subscription holds
			m.mu.Lock()
			m.since = int(begun.Load())
			m.joined++
			m.mu.Unlock()
		case opcode == opPong:
			m.synced <- true
		case opcode == opText:
			var ev struct{ Content struct{ Path string } }
			n := -1
			json.Unmarshal(payload, &ev)
			fmt.Sscanf(ev.Content.Path, "/%d", &n)
			m.mu.Lock()
			m.got = append(m.got, n)
			m.mu.Unlock()
		}
	}
}

// check compares what a member got with what it had to, of end events. What was
// posted while it was coming back may have come or not.
func (m *member) check(t testing.TB, end int) {
	t.Helper()
	m.mu.Lock()
	since, conn := m.since, m.conn
	m.mu.Unlock()
	var want []int
	for n := since; n < end; n++ {
		if clusterRepo(n) == m.repoID {
			want = append(want, n)
		}
	}
	got := func() (got []int) {
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, n := range m.got {
			if n >= since || slices.Contains(got, n) {
				got = append(got, n)
			}
		}
		return got
	}
	all := func() bool { return len(got()) >= len(want) }
	waitFor(t, fmt.Sprintf("a member of %s gets %v; it got %v", m.repoID, want, got()), all)
	conn.write(maskedFrame(0x80|opPing, []byte("sync"))) // what else would come is here before the pong
	<-m.synced
	if got := got(); !slices.Equal(got, want) {
		t.Errorf("a member of %s got %v, want %v", m.repoID, got, want)
	}
}

// A sender posts events, one after the other, as seaf-server does. It waits for
// 1 s, and on a quiet machine no post takes so long; the tests next to this one
// can make it slower, but a rule that lacks its time-out takes longer than 4 s.
type clusterSender struct {
	t     testing.TB
	addr  string
	begun atomic.Int64
	took  []time.Duration
}

func (s *clusterSender) post(n int) {
	s.t.Helper()
	for range n {
		k := int(s.begun.Add(1)) - 1
		start := time.Now()
		event := lockEvent(clusterRepo(k), k)
		answer, text := request(s.t, "POST", "http://"+s.addr+"/events", event, tokenLine(eventToken(later())))
		took := time.Since(start)
		s.took = append(s.took, took)
		if answer.StatusCode != http.StatusOK || took > 4*time.Second {
			s.t.Errorf("event %d is answered %s %q after %v", k, answer.Status, text, took)
		}
	}
}

// pingAlways asks for /ping until the returned function is called, which tells
// how often it was answered and how often not.
func pingAlways(url string) func() (good, bad int) {
	done, ended := make(chan bool), make(chan bool)
	good, bad := 0, 0
	go func() {
		defer close(ended)
		for {
			select {
			case <-done:
				return
			case <-time.After(3 * time.Millisecond):
			}
			if pings(url) {
				good++
			} else {
				bad++
			}
		}
	}()
	return func() (int, int) { close(done); <-ended; return good, bad }
}

// evenly tells whether each of the servers has about its share.
func evenly(n [3]int) bool {
	return slices.Max(n[:])-slices.Min(n[:]) <= 2+(n[0]+n[1]+n[2])/10
}

// Behind nginx a cluster that loses a server and gets it back loses no event, and only the
// clients of that server lose their connection.
func TestClusterBehindNginx(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		victim int
	}{
		{"the server that answers the sender dies", 0},
		{"a server that gets events by mirror dies", 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			cl := startCluster(t)
			cl.startNginx("")
			s := &clusterSender{t: t, addr: cl.events}
			members := cl.join(cl.public, 0, 300, &s.begun)
			if n := cl.connections(); !evenly(n) {
				t.Errorf("the servers have %d clients", n)
			}
			pinged := pingAlways(cl.public + "/notification")
			lost := cl.connections()[tc.victim]

			s.post(400)
			killed := make(chan bool)
			go func() { // while events are posted
				defer close(killed)
				time.Sleep(20 * time.Millisecond)
				cl.nodes[tc.victim].Process.Kill()
				cl.nodes[tc.victim].wait()
			}()
			s.post(300)
			<-killed
			waitFor(t, "the clients of the dead server are back", func() bool { return joined(members) == len(members)+lost })
			s.post(100)
			for _, m := range members {
				m.check(t, 800)
			}

			if good, bad := pinged(); bad != 0 || good < 10 {
				t.Errorf("/ping was answered %d times, and %d times not", good, bad)
			}

			// The server returns and takes its share: the next clients, until all have
			// as many. No /ping helps, only events: a web page that reconnects asks for none.
			cl.startNode(tc.victim)
			waitFor(t, "clients come to the server that returned", func() bool {
				s.post(1)
				members = append(members, cl.join(cl.public, len(members), 1, &s.begun)...)
				time.Sleep(50 * time.Millisecond)
				return cl.connections()[tc.victim] >= 3
			})
			before := cl.connections()[tc.victim]
			members = append(members, cl.join(cl.public, len(members), 40, &s.begun)...)
			if n := cl.connections(); n[tc.victim] < before+40 {
				t.Errorf("of the last 40 clients not all went to the server that has the fewest: %d", n)
			}
			s.post(1000 - int(s.begun.Load()))
			for _, m := range members {
				m.check(t, 1000)
			}
			if again := joined(members) - len(members); again != lost {
				t.Errorf("%d clients lost their connection, though the dead server had %d", again, lost)
			}
			t.Logf("the slowest of %d posts took %v", len(s.took), slices.Max(s.took))
		})
	}
}

// A server that hangs, or a machine without power, takes little of a sender's
// time for an event, and costs the clients of the others nothing.
func TestClusterWithAServerThatDoesNotAnswer(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		victim int
		off    bool // the machine, so that not even a connection comes about
	}{
		{"the first hangs", 0, false}, {"the first is off", 0, true},
		{"the third hangs", 2, false}, {"the third is off", 2, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			cl := startCluster(t)
			cl.startNginx("")
			s := &clusterSender{t: t, addr: cl.events}
			var members []*member
			for i, port := range cl.ports {
				if i != tc.victim {
					members = append(members, cl.join("127.0.0.1:"+port, 0, 3, &s.begun)...)
				}
			}
			s.post(3)
			if victim := cl.nodes[tc.victim]; tc.off {
				victim.Process.Kill()
				victim.wait()
				listenDeaf(t, cl.ports[tc.victim])
			} else {
				victim.Process.Signal(syscall.SIGSTOP)
			}
			s.post(4)
			for _, m := range members {
				m.check(t, 7)
			}
			if answer, text := request(t, "GET", "http://"+cl.public+"/notification/ping", ""); answer.StatusCode != http.StatusOK {
				t.Errorf("/ping is answered %s %q", answer.Status, text)
			}
			t.Logf("posts took %v", s.took)
		})
	}
}

// listenDeaf makes a port of 127.0.0.1 that answers no connection at all: its queue is full.
func listenDeaf(t *testing.T, port string) {
	t.Helper()
	addr := &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	fmt.Sscan(port, &addr.Port)
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err == nil {
		t.Cleanup(func() { syscall.Close(fd) })
		syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
		err = errors.Join(syscall.Bind(fd, addr), syscall.Listen(fd, 0))
	}
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the queue of a deaf port is full", func() bool {
		nc, err := net.DialTimeout("tcp", "127.0.0.1:"+port, 100*time.Millisecond)
		if err == nil {
			t.Cleanup(func() { nc.Close() })
		}
		return err != nil
	})
}

// The sender is told what one server would tell it, and nobody outside posts past the rules.
func TestClusterAnswers(t *testing.T) {
	t.Parallel()
	cl := startCluster(t)
	cl.startNginx("")
	good := "Authorization: Token " + eventToken(later())
	var members []*testClient
	for _, port := range cl.ports {
		members = append(members, connect(t, "127.0.0.1:"+port, asBrowser).subscribed(repoA, "alice@example.com"))
	}
	comment := commentEvent(repoA)
	long := lockEvent(strings.Repeat("x", mebi-200), 1)
	for _, tc := range []struct {
		name, url, body, token string
		want                   int
	}{
		{"an event of seaf-server", cl.events + "/events", update(repoA, "1"), good, 200},
		{"with a slash too many", cl.events + "//events", update(repoA, "2"), good, 200},
		{"a comment, which Seahub posts to its public URL", cl.public + "/notification/events", comment, good, 200},
		{"the longest", cl.events + "/events", long, good, 200},
		{"the longest, in public", cl.public + "/notification/events", long, good, 200},
		{"too long", cl.events + "/events", lockEvent(strings.Repeat("x", mebi), 1), good, 413},
		{"a bad token", cl.events + "/events", update(repoA, "1"), "Authorization: Token x.y.z", 401},
		{"a client's token", cl.public + "/notification/events", update(repoA, "1"), "Authorization: Token " + clientToken(repoA, "alice@example.com", later()), 403},
		{"no event", cl.events + "/events", "{}", good, 400},
		{"one server's own rule", cl.events + "/node2", update(repoA, "1"), good, 404},
	} {
		answer, text := request(t, "POST", "http://"+tc.url, tc.body, tc.token)
		for range 4 { // on a busy machine nginx may have taken another server for the first
			if tc.want == 200 || answer.StatusCode == tc.want {
				break
			}
			answer, text = request(t, "POST", "http://"+tc.url, tc.body, tc.token)
		}
		if answer.StatusCode != tc.want {
			t.Errorf("%s: answered %s %.200q, want %d", tc.name, answer.Status, text, tc.want)
		}
		if tc.want == 200 && tc.body != long {
			for _, c := range members {
				c.expect(opText, tc.body)
			}
		}
	}
	for _, c := range members {
		c.sync() // nothing else came
	}
	for _, dead := range []int{0, 1} {
		cl.nodes[dead].Process.Kill()
		cl.nodes[dead].wait()
		answer, _ := request(t, "POST", "http://"+cl.events+"/events", update(repoA, "3"), good)
		for tries := 1; answer.StatusCode != 200 && tries < 5; tries++ {
			time.Sleep(2100 * time.Millisecond) // a busy server is left out for 2 s, like a dead one
			answer, _ = request(t, "POST", "http://"+cl.events+"/events", update(repoA, "3"), good)
		}
		if answer.StatusCode != 200 {
			t.Errorf("with %d servers dead, an event is answered %s", dead+1, answer.Status)
		}
		members[2].expect(opText, update(repoA, "3"))
	}
	cl.nodes[2].Process.Kill()
	cl.nodes[2].wait()
	if answer, _ := request(t, "POST", "http://"+cl.events+"/events", update(repoA, "4"), good); answer.StatusCode != 502 {
		t.Errorf("with all servers dead, an event is answered %s, want 502", answer.Status)
	}
}

// -check tells whether an event that is posted once reaches all servers.
func TestCheckOfACluster(t *testing.T) {
	t.Parallel()
	cl := startCluster(t)
	cl.startNginx("")
	var urls []string
	for _, port := range cl.ports {
		urls = append(urls, "http://127.0.0.1:"+port)
	}
	check := func(t *testing.T, events string, urls ...string) *process {
		args := append([]string{"-c", cl.dirs[0], "-check"}, urls...)
		return start(t, []string{"INNER_NOTIFICATION_SERVER_URL=" + events}, buildBinary(t), args...)
	}
	t.Cleanup(func() { // behind the others
		cl.nodes[0].Process.Kill()
		cl.nodes[0].wait()
		p := check(t, "http://"+cl.events, "http://"+cl.public+"/notification")
		code, out := p.wait(), p.out.String()
		if code != 1 || strings.Count(out, "✗") != 1 || !strings.Contains(out, "first server of the cluster") {
			t.Errorf("exit status %d with the first server down: %s", code, out)
		}
	})
	for _, tc := range []struct {
		name, events, want string
		urls               []string
		exit               int
	}{
		{"through nginx to all", "http://" + cl.events, "It works", urls, 0},
		{"by the URL of clients", "http://" + cl.events, "It works", []string{"http://" + cl.public + "/notification"}, 0},
		{"posted to one server alone", "", "did not come back over " + urls[1], urls, 1}, // host and port of the first
		{"posted to another server", urls[1], "did not come back over " + urls[0], urls, 1},
		{"a server that is not there", "http://" + cl.events, "nothing listens there", append(urls, "http://127.0.0.1:"+freePort(t)), 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			p := check(t, tc.events, tc.urls...)
			if code := p.wait(); code != tc.exit || !strings.Contains(p.out.String(), tc.want) {
				t.Errorf("exit status %d, want %d and %q; output: %s", code, tc.exit, tc.want, p.out)
			}
		})
	}
}

// startHAProxy starts HAProxy with the rules of README.md and returns where clients come.
func (cl *cluster) startHAProxy() string {
	t := cl.t
	t.Helper()
	need(t, "haproxy")
	public := "127.0.0.1:" + freePort(t)
	text := `global
	maxconn 4000
defaults
	log stdout format raw daemon
	timeout connect 5s
	timeout client 60s
	timeout server 60s
` + readmeBlock(t, "haproxy: haproxy.cfg")
	for from, to := range map[string]string{
		"0.0.0.0:80":       public,
		"192.168.0.137:80": "127.0.0.1:" + freePort(t),
		"127.0.0.1:8084":   cl.events,
	} {
		text = regexp.MustCompile(regexp.QuoteMeta(from)+`\b`).ReplaceAllString(text, to)
	}
	path := filepath.Join(t.TempDir(), "haproxy.cfg")
	if err := os.WriteFile(path, []byte(cl.place(text)), 0o644); err != nil {
		t.Fatal(err)
	}
	p := start(t, nil, "haproxy", "-db", "-q", "-f", path)
	p.waitPing(public + "/notification")
	return public
}

// Behind HAProxy, too, a cluster loses no event when a server dies or hangs.
func TestClusterBehindHAProxy(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		signal syscall.Signal
	}{
		{"a server dies", syscall.SIGKILL},
		{"a server hangs", syscall.SIGSTOP}, // HAProxy sees it, and closes its clients
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			cl := startCluster(t)
			cl.startNginx("")
			public := cl.startHAProxy()
			s := &clusterSender{t: t, addr: public + "/notification"} // as Seahub posts; HAProxy leaves it to nginx
			members := cl.join(public, 0, 90, &s.begun)
			n := cl.connections()
			if !evenly(n) {
				t.Errorf("the servers have %d clients", n)
			}
			s.post(100)
			for _, m := range members {
				m.check(t, 100)
			}
			pinged := pingAlways(public + "/notification")
			victim := cl.nodes[1]
			victim.Process.Signal(tc.signal)
			waitFor(t, "the clients of the dead server are back", func() bool { return joined(members) == len(members)+n[1] })
			victim.Process.Kill()
			victim.wait()
			s.post(100)
			for _, m := range members {
				m.check(t, 200)
			}
			cl.startNode(1)
			waitFor(t, "clients come to the server that returned", func() bool {
				members = append(members, cl.join(public, len(members), 1, &s.begun)...)
				time.Sleep(50 * time.Millisecond)
				return cl.connections()[1] > 0
			})
			members = append(members, cl.join(public, len(members), 20, &s.begun)...)
			if n := cl.connections(); n[1] < 20 {
				t.Errorf("of the last 20 clients not all went to the server that has the fewest: %d", n)
			}
			s.post(100)
			for _, m := range members {
				m.check(t, 300)
			}
			if good, bad := pinged(); tc.signal == syscall.SIGKILL && bad != 0 || good < 10 {
				t.Errorf("/ping was answered %d times, and %d times not", good, bad)
			}
		})
	}
}

// ---- README.md ----
//
// What README.md prints is used here as it is printed there, so that what is tested and
// what administrators copy are the same. The line before a block ends with a marker that
// says what it is, <!-- kind: name -->, which readers do not see.

// readme returns the text of README.md.
func readme(t testing.TB) string {
	t.Helper()
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// readmeBlock returns the fenced block that follows the line that ends with the marker
// <!-- name -->, without the blanks by which all of it is indented.
func readmeBlock(t testing.TB, name string) string {
	t.Helper()
	_, rest, found := strings.Cut(readme(t), "<!-- "+name+" -->\n")
	fence, rest, _ := strings.Cut(rest, "\n")
	indent, _, fenced := strings.Cut(fence, "```")
	block, _, ended := strings.Cut(rest, "\n"+indent+"```\n")
	if !found || !fenced || !ended || strings.TrimSpace(indent) != "" {
		t.Fatalf("README.md has no fenced block right behind <!-- %s -->", name)
	}
	block = strings.TrimPrefix(strings.ReplaceAll("\n"+block, "\n"+indent, "\n"), "\n")
	return block + "\n"
}

// readmeRows returns the cells of the table below a line that begins with header.
func readmeRows(t testing.TB, header string) (rows [][]string) {
	t.Helper()
	_, rest, found := strings.Cut(readme(t), "\n"+header)
	lines := strings.Split(rest, "\n")
	if !found || len(lines) < 3 || !strings.HasPrefix(lines[1], "|---") {
		t.Fatalf("README.md has no table that begins with %q", header)
	}
	for _, line := range lines[2:] {
		if !strings.HasPrefix(line, "|") {
			break
		}
		cells := strings.Split(strings.Trim(line, " "), "|")
		cells = cells[1 : len(cells)-1]
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		rows = append(rows, cells)
	}
	return rows
}

// inBackticks returns what stands in backticks in a text of Markdown.
func inBackticks(text string) (phrases []string) {
	for i, part := range strings.Split(text, "`") {
		if i%2 == 1 {
			phrases = append(phrases, part)
		}
	}
	return phrases
}

// allMatches returns what the first group of a regular expression matches in text, each time.
func allMatches(pattern, text string) (found []string) {
	for _, match := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
		found = append(found, match[1])
	}
	return found
}

// manualRules are the rules that Seafile's manual prints, and README.md does not repeat:
// it says that they work as they are.
var manualRules = map[string]string{
	"nginx-manual": `map $http_upgrade $connection_upgrade {
    default upgrade;
    ''      close;
}
server {
    location /notification/ping {
        proxy_pass http://127.0.0.1:8083/ping;
    }
    location /notification {
        proxy_pass http://127.0.0.1:8083/;
        proxy_http_version 1.1;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection $connection_upgrade;
    }
}
`,
	"nginx-current": `location /notification {
    proxy_pass http://127.0.0.1:8083;
    proxy_http_version 1.1;
    proxy_set_header Upgrade $http_upgrade;
    proxy_set_header Connection "upgrade";
}
`,
	"haproxy": `frontend seafile
    bind 0.0.0.0:80
    mode http
    option httplog
    option dontlognull
    option forwardfor
    acl notif_ping_request url_sub -i /notification/ping
    acl ws_requests url -i /notification
    acl hdr_connection_upgrade hdr(Connection) -i upgrade
    acl hdr_upgrade_websocket hdr(Upgrade) -i websocket
    use_backend ws_backend if hdr_connection_upgrade hdr_upgrade_websocket
    use_backend notif_ping_backend if notif_ping_request
    use_backend ws_backend if ws_requests
    default_backend backup_nodes

backend backup_nodes
    cookie SERVERID insert indirect nocache
    server seafileserver01 192.168.0.137:80

backend notif_ping_backend
    option forwardfor
    server ws 192.168.0.137:8083

backend ws_backend
    option forwardfor
    server ws 192.168.0.137:8083
`,
}

// readmeRule returns a rule for a proxy, of README.md or of Seafile's manual.
func readmeRule(t testing.TB, name string) string {
	t.Helper()
	if rule, found := manualRules[name]; found {
		return rule
	}
	return readmeBlock(t, "rule: "+name)
}

// The units are good for systemd, with each of the drop-ins.
func TestReadmeUnits(t *testing.T) {
	t.Parallel()
	need(t, "systemd-analyze")
	for _, dropIn := range []string{"", "user.conf", "key.conf"} {
		t.Run(cmp.Or(dropIn, "alone"), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			names := []string{"notification-server.socket", "notification-server.service"}
			if dropIn != "" {
				names = append(names, "notification-server.service.d/"+dropIn)
			}
			for _, name := range names {
				text := readmeBlock(t, "unit: "+name)
				text = strings.ReplaceAll(text, "/usr/local/bin/notification-server", buildBinary(t))
				text = strings.ReplaceAll(text, "User=seafile", "User=root") // there is no such user here
				writeFile(t, filepath.Join(dir, name), text, 0o644)
			}
			p := start(t, []string{"SYSTEMD_UNIT_PATH=" + dir + ":"}, "systemd-analyze", "verify",
				filepath.Join(dir, names[0]), filepath.Join(dir, names[1]))
			if code := p.wait(); code != 0 || strings.Contains(p.out.String(), "notification-server.") {
				t.Errorf("systemd-analyze verify ends with %d: %s", code, p.out)
			}
		})
	}
}

// writeFile writes a file, and makes its directory.
func writeFile(t testing.TB, path, text string, mode os.FileMode) {
	t.Helper()
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = os.WriteFile(path, []byte(text), mode)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// The rules that are not in Seafile's manual carry all that a client and Seahub do.
func TestReadmeProxies(t *testing.T) {
	t.Parallel()
	haproxy := realProxies[slices.IndexFunc(realProxies, func(p realProxy) bool {
		return p.program == "haproxy"
	})]
	haproxy.rule = "haproxy-short"
	haproxy.config = strings.Replace(haproxy.config, "RULE",
		"frontend seafile\n    bind LISTEN\n    default_backend seahub\nRULE\n"+
			"backend seahub\n    server seahub SEAHUB\n", 1)
	nginx := nginxCurrent
	nginx.rule = "nginx"
	for _, p := range []realProxy{haproxy, nginx} {
		t.Run(p.rule, func(t *testing.T) {
			t.Parallel()
			port := freePort(t)
			dir := writeConfig(t, port, "log_level = debug")
			s := startBinary(t, port, nil, "-c", dir)
			px := startProxy(t, p, "127.0.0.1:"+port, p.usual)
			public := "http://" + px.addr + "/notification"
			env := []string{"INNER_NOTIFICATION_SERVER_URL=" + public} // as Seahub posts
			status, stdout, _ := runOnce(t, env, "-c", dir, "-check", public)
			if status != 0 || strings.Contains(stdout, "✗") {
				t.Errorf("-check ends with %d: %s", status, stdout)
			}
			if p.program == "nginx" {
				s.says(`for "127.0.0.1"`)
			}
		})
	}
}

// README.md says how -check shows a rule of Caddy that lets only /notification/ping through.
func TestReadmeCaddy(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	dir := writeConfig(t, port)
	startBinary(t, port, nil, "-c", dir)
	p := realProxies[slices.IndexFunc(realProxies, func(p realProxy) bool { return p.program == "caddy" })]
	p.edit = func(rule string) string {
		return strings.Replace(rule, "handle_path /notification* {", "handle_path /notification/* {", 1)
	}
	px := startProxy(t, p, "127.0.0.1:"+port, p.usual)
	status, stdout, _ := runOnce(t, nil, "-c", dir, "-check", "http://"+px.addr+"/notification")
	if status != 1 || !strings.Contains(stdout, "✓ ping:") || !strings.Contains(stdout, "✗ upgrade:") {
		t.Errorf("-check ends with %d: %s", status, stdout)
	}
}

// A sourceText is a string in the program, with … for what differs.
type sourceText struct {
	text   string
	place  string // FILE:LINE
	caller string // what it is an argument of, "" for none
	closes bool   // it is told with a close frame, and not logged but at level debug
}

// A sourceReader collects the strings of the program. Those that are put together of
// several literals or constants are one.
type sourceReader struct {
	files     *token.FileSet
	constants map[string]ast.Expr
	texts     []sourceText
}

var verbs = regexp.MustCompile(`%[-+# 0-9.]*[a-zA-Z]`)

// readSource returns the strings of the program.
func readSource(t testing.TB) []sourceText {
	t.Helper()
	r := &sourceReader{files: token.NewFileSet(), constants: map[string]ast.Expr{}}
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	var files []*ast.File
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(r.files, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
		ast.Inspect(file, r.findConstants)
	}
	for _, file := range files {
		ast.Inspect(file, r.findTexts)
	}
	return r.texts
}

func (r *sourceReader) findConstants(n ast.Node) bool {
	if spec, ok := n.(*ast.ValueSpec); ok && len(spec.Values) == len(spec.Names) {
		for i, name := range spec.Names {
			r.constants[name.Name] = spec.Values[i]
		}
	}
	return true
}

func (r *sourceReader) findTexts(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.CallExpr:
		caller := ""
		switch f := n.Fun.(type) {
		case *ast.Ident:
			caller = f.Name
		case *ast.SelectorExpr:
			caller = f.Sel.Name
			if of, ok := f.X.(*ast.SelectorExpr); ok && caller == "add" {
				caller = of.Sel.Name + ".add" // of a counter
			}
		}
		closes := caller == "closeFrame"
		if status, ok := first(n.Args).(*ast.Ident); ok && caller == "refuse" {
			closes = strings.HasPrefix(status.Name, "status")
		}
		r.add(n.Args, caller, closes)
	case *ast.AssignStmt:
		r.add(n.Rhs, "", false)
	case *ast.ValueSpec:
		r.add(n.Values, "", false)
	case *ast.ReturnStmt:
		r.add(n.Results, "", false)
	case *ast.CompositeLit:
		r.add(n.Elts, "", false)
	case *ast.CaseClause:
		r.add(n.List, "", false)
	case *ast.BinaryExpr:
		if n.Op == token.EQL || n.Op == token.NEQ {
			r.add([]ast.Expr{n.X, n.Y}, "", false)
		}
	}
	return true
}

func first(exprs []ast.Expr) ast.Expr {
	if len(exprs) == 0 {
		return nil
	}
	return exprs[0]
}

func (r *sourceReader) add(exprs []ast.Expr, caller string, closes bool) {
	for _, e := range exprs {
		if text, ok := r.text(e); ok {
			at := r.files.Position(e.Pos())
			place := fmt.Sprintf("%s:%d", at.Filename, at.Line)
			r.texts = append(r.texts, sourceText{verbs.ReplaceAllString(text, "…"), place, caller, closes})
		}
	}
}

// text returns the string that e is, if it is one at least in part.
func (r *sourceReader) text(e ast.Expr) (string, bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		text, err := strconv.Unquote(e.Value)
		return text, err == nil && e.Kind == token.STRING
	case *ast.Ident:
		value, known := r.constants[e.Name]
		if !known {
			return "", false
		}
		return r.text(value)
	case *ast.BinaryExpr:
		left, ok := r.text(e.X)
		right, alsoOK := r.text(e.Y)
		if e.Op != token.ADD || !ok && !alsoOK {
			return "", false
		}
		if !ok {
			left = "…"
		}
		if !alsoOK {
			right = "…"
		}
		return left + right, true
	}
	return "", false
}

// says reports whether a text of the program says a phrase of README.md, in which …
// stands for what differs.
func (st sourceText) says(phrase string) bool {
	rest := st.text
	for part := range strings.SplitSeq(phrase, "…") {
		_, behind, found := strings.Cut(rest, part)
		if !found {
			return false
		}
		rest = behind
	}
	return true
}

// isMessage reports whether an administrator can see the text alone: in the log above level
// debug, in the output of -check, or in the answer to a request.
func (st sourceText) isMessage() bool {
	words := strings.Fields(alphabetical(st.text))
	if st.closes || len(words) < 5 || strings.HasPrefix(st.text, "{") {
		return false
	}
	switch st.caller {
	case "refuse", "Errorf", "New", "warnf", "errorf", "infof", "warnOnce", "warn",
		"fault", "reportFault", "Sprintf":
		return true
	}
	return false
}

// insideOthers are texts that are seen only behind another message, which README.md has, or
// that say that all is well.
var insideOthers = []string{
	"is not a number of seconds", "repo_id is not a string", `"content" must be`,
	"the event is not one", "the content of the event", "a folder-perm-changed needs", "the group is not a number", "repo_id must be given once",
	"a repo without an id", "names in one object", // of what is no token, event or message
	"seaf-server answers with error", "seaf-server does not answer", "seaf-server's answer",
	"seaf-server names a member without",                                                              // of a question to seaf-server
	"such lines follow, the next is", "says […], but the name must be", "host …, port …, log_level …", // of the configuration
	"make one with ",
	"by file: seaf-server needs", "by environment: in 13 and 14", "posted to …, it arrived after",
}

// Each message that README.md explains is in the program, and each that the program can show
// is explained, in one table in alphabetical order.
func TestReadmeMessages(t *testing.T) {
	t.Parallel()
	texts := readSource(t)
	var phrases []string
	last := ""
	for _, row := range readmeRows(t, "| it says |") {
		inRow := inBackticks(row[0])
		if len(inRow) == 0 || len(row) != 2 || row[1] == "" {
			t.Errorf("the row %q has no message, or no remedy", row)
			continue
		}
		for _, phrase := range inRow {
			if slices.Contains(phrases, phrase) {
				t.Errorf("%q is explained twice", phrase)
			}
			phrases = append(phrases, phrase)
			known := slices.ContainsFunc(texts, func(st sourceText) bool { return st.says(phrase) })
			// net/http and the system have words of their own.
			if !known && !strings.HasPrefix(phrase, "http: ") && phrase != "connection refused" {
				t.Errorf("the program does not say %q", phrase)
			}
		}
		if order := alphabetical(inRow[0]); order < last {
			t.Errorf("%q stands behind %q", inRow[0], last)
		} else {
			last = order
		}
	}
	used := make([]bool, len(insideOthers))
	for _, st := range texts {
		if !st.isMessage() || slices.ContainsFunc(phrases, st.says) {
			continue
		}
		if st.caller == "refuse" { // a row of its own is about all of these
			continue
		}
		i := slices.IndexFunc(insideOthers, st.says)
		if i < 0 {
			t.Errorf("%s: README.md does not explain %q", st.place, st.text)
			continue
		}
		used[i] = true
	}
	for i, text := range insideOthers {
		if !used[i] {
			t.Errorf("the exception for %q is not needed", text)
		}
	}
}

// alphabetical returns text as it is sorted: letters and digits count.
func alphabetical(text string) string {
	return strings.Join(strings.FieldsFunc(strings.ToLower(text), func(r rune) bool {
		return !unicode.IsLetter(r) && !unicode.IsDigit(r)
	}), " ")
}

// Each environment variable and key that README.md and -h list is one that the program
// reads, and there is no other.
func TestReadmeSettings(t *testing.T) {
	t.Parallel()
	name := regexp.MustCompile(`^(ENABLE|INNER|JWT|NOTIFICATION|SEAFILE)_[A-Z_]+$`)
	inProgram, inReadme := map[string]bool{}, map[string]bool{}
	for _, st := range readSource(t) {
		if name.MatchString(st.text) {
			inProgram[st.text] = true
		}
	}
	settings := manual
	for _, row := range readmeRows(t, "| key | environment |") {
		for _, variable := range inBackticks(row[1]) {
			inReadme[variable] = true
			if !strings.Contains(settings, variable) && !strings.HasPrefix(variable, "ENABLE_") {
				t.Errorf("-h does not list %s", variable)
			}
		}
		for _, key := range inBackticks(row[0]) {
			if !regexp.MustCompile(`(?m)^  ` + key + `\b`).MatchString(settings) {
				t.Errorf("-h does not list %s", key)
			}
		}
	}
	if !maps.Equal(inProgram, inReadme) {
		t.Errorf("the program reads %v, README.md lists %v", inProgram, inReadme)
	}
}

// The metrics in README.md are those that the server writes, with their labels, and so are
// the reasons for which something is refused or closed.
func TestReadmeMetrics(t *testing.T) {
	t.Parallel()
	written := metricsWritten()
	listed := map[string]bool{}
	rows := readmeRows(t, "| name | what it tells |")
	reasons := map[string][]string{}
	for i, row := range rows {
		for _, name := range inBackticks(row[0]) {
			name, label, _ := strings.Cut(strings.TrimSuffix(name, "}"), "{")
			if i < len(rows)-1 { // the last row has the names of any process
				name = "seafile_notification_" + name
			}
			listed[name] = true
			if written[name] != label {
				t.Errorf("README.md says %s has the label %q, it has %q", name, label, written[name])
			}
			reasons[name] = inBackticks(row[1])
		}
	}
	for name := range written {
		if !listed[name] {
			t.Errorf("README.md does not list %s", name)
		}
	}
	_, ends, _ := strings.Cut(readme(t), "Why connections end. ")
	ends, _, _ = strings.Cut(ends, "\n\n")
	refused, closed := reasonsOfSource(t)
	for _, tc := range []struct {
		name           string
		readme, source []string
	}{
		{"refused", reasons["seafile_notification_refused_total"], refused},
		{"closed", inBackticks(ends), closed},
	} {
		slices.Sort(tc.readme)
		slices.Sort(tc.source)
		tc.source = slices.Compact(tc.source)
		if !slices.Equal(tc.readme, tc.source) {
			t.Errorf("%s: README.md has the reasons %q, the program %q", tc.name, tc.readme, tc.source)
		}
	}
}

// metricsWritten returns the names of the metrics that a server writes, with their labels.
func metricsWritten() map[string]string {
	m := newMetrics(time.Now())
	counters := []*labelCounter{m.events, m.refused, m.closed, m.lookups}
	for _, c := range counters {
		c.add("x")
	}
	var text bytes.Buffer
	m.write(&text, gauges{})
	written := map[string]string{}
	for _, name := range allMatches(`(?m)^# TYPE (\w+) `, text.String()) {
		written[name] = ""
	}
	for _, c := range counters {
		written[c.name] = c.label
	}
	return written
}

// reasonsOfSource returns the words that stand for a reason in the calls of the program.
func reasonsOfSource(t testing.TB) (refused, closed []string) {
	t.Helper()
	word := regexp.MustCompile(`^[a-z]+(-[a-z]+)*$`)
	for _, st := range readSource(t) {
		switch {
		case !word.MatchString(st.text):
		case st.closes || st.caller == "abort" || st.caller == "closed.add":
			closed = append(closed, st.text)
		case st.caller == "refuse" || st.caller == "refused.add":
			refused = append(refused, st.text)
		}
	}
	return refused, closed
}

// The alerts are good for Prometheus, and ask for metrics that there are.
func TestReadmeAlerts(t *testing.T) {
	t.Parallel()
	rules := readmeBlock(t, "alerts: notification.rules.yml")
	written := metricsWritten()
	for _, name := range allMatches(`\b((?:seafile_notification|process|go)_\w+)`, rules) {
		if _, found := written[strings.TrimSuffix(name, "_bucket")]; !found {
			t.Errorf("an alert asks for %s, which is not written", name)
		}
	}
	need(t, "promtool")
	path := filepath.Join(t.TempDir(), "notification.rules.yml")
	writeFile(t, path, rules, 0o644)
	if out, err := exec.Command("promtool", "check", "rules", path).CombinedOutput(); err != nil {
		t.Errorf("promtool: %v: %s", err, out)
	}
}

// What README.md shows of -check are lines that it can say.
func TestReadmeCheckOutput(t *testing.T) {
	t.Parallel()
	texts := readSource(t)
	for line := range strings.Lines(readmeBlock(t, "output: check")) {
		line = strings.TrimSpace(line)
		_, text, found := strings.Cut(line, ": ")
		if !found || strings.HasPrefix(line, "It") {
			text = line
		}
		known := slices.ContainsFunc(texts, func(st sourceText) bool {
			pattern := strings.ReplaceAll(regexp.QuoteMeta(st.text), "…", ".*")
			says := regexp.MustCompile("^" + pattern + "$")
			return len(st.text) > 10 && (says.MatchString(text) || says.MatchString(line))
		})
		if line != "" && !known {
			t.Errorf("-check never says %q", text)
		}
	}
}

// README.md leaves no figure open.
func TestReadmeIsComplete(t *testing.T) {
	t.Parallel()
	for _, open := range allMatches(`(\bTBD[-A-Z]*)`, readme(t)) {
		t.Errorf("README.md still says %s", open)
	}
}

// Links lead to headings, commands are good for a shell, and what README.md says of the
// binary is so.
func TestReadmeLinksAndCommands(t *testing.T) {
	t.Parallel()
	text := readme(t)
	anchors := map[string]bool{}
	for _, heading := range allMatches(`(?m)^##+ (.*)$`, text) {
		anchor := regexp.MustCompile(`[^a-z0-9 -]`).ReplaceAllString(strings.ToLower(heading), "")
		anchors[strings.ReplaceAll(anchor, " ", "-")] = true
	}
	for _, link := range allMatches(`\]\(#([^)]*)\)`, text) {
		if !anchors[link] {
			t.Errorf("the link to #%s leads nowhere", link)
		}
	}
	for _, fence := range regexp.MustCompile("(?m)^(.*)\n *```([a-z]+)$").FindAllStringSubmatch(text, -1) {
		if language := fence[2]; language != "sh" && !strings.Contains(fence[1], "<!-- ") {
			t.Errorf("a block of %s has no marker, so no test reads it", language)
		}
	}
	for _, block := range allMatches("(?ms)^ *```sh\n(.*?)^ *```$", text) {
		cmd := exec.Command("sh", "-n")
		cmd.Stdin = strings.NewReader(block)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("sh: %v: %s in %s", err, out, block)
		}
	}
	status, stdout, _ := runOnce(t, nil, "-version")
	if status != 0 || !strings.Contains(stdout, "go1.") {
		t.Errorf("-version ends with %d and says %q", status, stdout)
	}
	out, err := exec.Command("go", "version", "-m", buildBinary(t)).CombinedOutput()
	if err != nil || !regexp.MustCompile(`(?s)golang.org/x/net.*GOARCH`).Match(out) {
		t.Errorf("go version -m: %v: %s", err, out)
	}
}

// goTool builds a program from the Go modules that it needs. It downloads modules in CI
// only; elsewhere the test is skipped if Go's cache does not have them.
func goTool(t testing.TB, source string, modules ...string) string {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "main.go"), source, 0o644)
	mod := "module helper\n\ngo 1.26\n\nrequire (\n" + strings.Join(modules, "\n") + "\n)\n"
	writeFile(t, filepath.Join(dir, "go.mod"), mod, 0o644)
	cmd := exec.Command("go", "build", "-mod=mod", "-o", "tool", ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK=off")
	if os.Getenv("CI") != "true" {
		cmd.Env = append(cmd.Env, "GOPROXY=off")
	}
	out, err := cmd.CombinedOutput()
	// Of modules in the cache, the sums can be missing and out of reach; a wrong sum is not skipped.
	offline := regexp.MustCompile(`GOPROXY=off|verifying [^\n]*: (Get|dial|lookup)`).Match(out)
	switch {
	case err != nil && os.Getenv("CI") != "true" && offline:
		t.Skipf("needs modules that Go's cache does not have: %s", modules)
	case err != nil:
		t.Fatalf("%v: %s", err, out)
	}
	return filepath.Join(dir, "tool")
}

// runTool runs a program of goTool in dir, and decodes the JSON that it writes.
func runTool(t testing.TB, tool, dir, stdin string, into any) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(tool)
	cmd.Dir = dir
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v: %s", cmd, err, stderr.String())
	}
	if err := json.Unmarshal(stdout.Bytes(), into); err != nil {
		t.Fatalf("%s: %v: %s", cmd, err, stdout.String())
	}
}

// composeTool loads a project as docker compose does, and prints it as JSON.
const composeTool = `package main

import (
	"context"
	"fmt"
	"os"

	"github.com/compose-spec/compose-go/v2/cli"
)

func main() {
	options, err := cli.NewProjectOptions(nil, cli.WithOsEnv, cli.WithEnvFiles(), cli.WithDotEnv,
		cli.WithConfigFileEnv, cli.WithDefaultConfigPath)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	project, err := options.LoadProject(context.Background())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	text, err := project.MarshalJSON()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Stdout.Write(text)
}
`

// A composeProject is what composeTool prints, as far as the tests look at it.
type composeProject struct {
	Services map[string]composeService
	Volumes  map[string]any
}

type composeService struct {
	Image           string
	Command         []string
	Environment     map[string]string
	Labels          map[string]string
	Restart         string
	StopGracePeriod string `json:"stop_grace_period"`
	HealthCheck     struct {
		Test []string
	}
	Volumes []struct {
		Type, Source, Target string
		ReadOnly             bool `json:"read_only"`
		Bind                 *struct {
			CreateHostPath *bool `json:"create_host_path"`
		}
	}
}

// source returns what a service has mounted at a path.
func (s *composeService) source(target string) string {
	for _, volume := range s.Volumes {
		if volume.Target == target {
			return volume.Source
		}
	}
	return ""
}

// officialCompose are files of the shape of Seafile's, for one of its versions.
func officialCompose(version string) map[string]string {
	senders := "      - NOTIFICATION_SERVER_URL=${NOTIFICATION_SERVER_URL:-}\n"
	logs := "${NOTIFICATION_SERVER_VOLUME:-/opt/notification-data}:/shared"
	if version != "12.0" {
		senders += "      - ENABLE_NOTIFICATION_SERVER=${ENABLE_NOTIFICATION_SERVER:-false}\n" +
			"      - INNER_NOTIFICATION_SERVER_URL=${INNER_NOTIFICATION_SERVER_URL:-}\n"
		logs = "${SEAFILE_VOLUME:-/opt/seafile-data}/seafile/logs:/shared/seafile/logs"
	}
	return map[string]string{
		"seafile-server.yml": `services:
  db:
    image: mariadb
    networks: [seafile-net]
  seafile:
    image: ${SEAFILE_IMAGE:-seafileltd/seafile-mc:` + version + `-latest}
    volumes:
      - ${SEAFILE_VOLUME:-/opt/seafile-data}:/shared
    environment:
      - JWT_PRIVATE_KEY=${JWT_PRIVATE_KEY:?Variable is not set or empty}
` + senders + `    labels:
      caddy: http://${SEAFILE_SERVER_HOSTNAME:-localhost}
      caddy.reverse_proxy: "{{upstreams 80}}"
    depends_on: [db]
    networks: [seafile-net]
networks:
  seafile-net:
    name: seafile-net
`,
		"caddy.yml": `services:
  caddy:
    image: lucaslorentz/caddy-docker-proxy
    networks: [seafile-net]
networks:
  seafile-net:
    name: seafile-net
`,
		"notification-server.yml": `services:
  notification-server:
    image: ${NOTIFICATION_SERVER_IMAGE:-seafileltd/notification-server:` + version + `-latest}
    container_name: notification-server
    restart: always
    volumes:
      - ` + logs + `
    environment:
      - JWT_PRIVATE_KEY=${JWT_PRIVATE_KEY:?Variable is not set or empty}
      - SEAFILE_LOG_TO_STDOUT=${SEAFILE_LOG_TO_STDOUT:-false}
      - NOTIFICATION_SERVER_LOG_LEVEL=${NOTIFICATION_SERVER_LOG_LEVEL:-info}
    labels:
      caddy: http://${SEAFILE_SERVER_HOSTNAME:-localhost}
      caddy.1_handle_path: "/notification*"
      caddy.1_handle_path.0_rewrite: "* {uri}"
      caddy.1_handle_path.1_reverse_proxy: "{{upstreams 8083}}"
    depends_on: [db]
    networks: [seafile-net]
networks:
  seafile-net:
    name: seafile-net
`,
	}
}

// mergeCompose loads Seafile's files of a version with README.md's, by what it writes into
// .env, and with further lines of .env. It returns the project and its directory.
func mergeCompose(
	t *testing.T, tool, version string, more []string, env ...string,
) (composeProject, string) {
	t.Helper()
	dir := t.TempDir()
	for name, text := range officialCompose(version) {
		writeFile(t, filepath.Join(dir, name), text, 0o644)
	}
	names := append([]string{"own-notification-server.yml"}, more...)
	for _, name := range names {
		writeFile(t, filepath.Join(dir, name), readmeBlock(t, "compose: "+name), 0o644)
	}
	lines := strings.Replace(readmeBlock(t, "env: compose"), names[0], strings.Join(names, ","), 1)
	lines += "JWT_PRIVATE_KEY=" + testKey + "\n" + strings.Join(env, "\n")
	writeFile(t, filepath.Join(dir, ".env"), lines, 0o600)
	var project composeProject
	runTool(t, tool, dir, "", &project)
	return project, dir
}

// The compose files merge with Seafile's, and change what they must and nothing else.
func TestReadmeCompose(t *testing.T) {
	t.Parallel()
	tool := goTool(t, composeTool, "github.com/compose-spec/compose-go/v2 v2.16.2")
	for _, version := range []string{"12.0", "13.0", "14.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			project, dir := mergeCompose(t, tool, version, nil)
			if n := len(project.Services); n != 4 {
				t.Errorf("the project has %d services, want Seafile's 4", n)
			}
			ours := project.Services["notification-server"]
			checkMounted(t, ours, filepath.Join(dir, "notification-server"))
			checkService(t, ours, version)
			seafile := project.Services["seafile"].Environment
			if seafile["NOTIFICATION_SERVER_URL"] != "https://seafile.example.com/notification" {
				t.Errorf("Seahub has %v", seafile)
			}
			if version != "12.0" && (seafile["ENABLE_NOTIFICATION_SERVER"] != "true" ||
				seafile["INNER_NOTIFICATION_SERVER_URL"] != "http://notification-server:8083") {
				t.Errorf("the senders have %v", seafile)
			}
		})
	}
	t.Run("image", func(t *testing.T) {
		t.Parallel()
		const line = "NOTIFICATION_SERVER_IMAGE=own-notification-server"
		if !strings.Contains(readme(t), "\n"+line+"\n") {
			t.Errorf("README.md does not say %s", line)
		}
		project, _ := mergeCompose(t, tool, "13.0", nil, line)
		if got := project.Services["notification-server"].Image; got != "own-notification-server" {
			t.Errorf("the image is %q", got)
		}
	})
	t.Run("seafile.sock", func(t *testing.T) {
		t.Parallel()
		project, _ := mergeCompose(t, tool, "13.0", []string{"seafile-socket.yml"})
		ours, seafile := project.Services["notification-server"], project.Services["seafile"]
		const shared = "seafile-runtime"
		if seafile.source("/opt/seafile/seafile-pro-server-13.0.15/runtime") != shared ||
			ours.source(ours.Environment["SEAFILE_RPC_PIPE_PATH"]) != shared ||
			len(seafile.Volumes) != 2 || len(ours.Volumes) != 3 || len(project.Volumes) != 1 {
			t.Errorf("the services are %+v and %+v, the volumes %v", seafile, ours, project.Volumes)
		}
	})
	t.Run("Traefik", func(t *testing.T) {
		t.Parallel()
		project, _ := mergeCompose(t, tool, "13.0", []string{"traefik.yml"})
		labels := project.Services["notification-server"].Labels
		rule := labels["traefik.http.routers.notification.rule"]
		port := labels["traefik.http.services.notification.loadbalancer.server.port"]
		if rule != "Host(`seafile.example.com`) && PathPrefix(`/notification`)" || port != "8083" {
			t.Errorf("the labels are %v", labels)
		}
	})
}

// checkMounted checks that the binary at source is mounted over the image's, and only if it
// is there.
func checkMounted(t *testing.T, ours composeService, source string) {
	t.Helper()
	const target = "/opt/seafile/notification-server"
	if got := ours.source(target); got != source {
		t.Errorf("the binary is mounted from %q, want %q", got, source)
	}
	for _, volume := range ours.Volumes {
		if volume.Target != target {
			continue
		}
		bind := volume.Bind
		creates := bind == nil || bind.CreateHostPath == nil || *bind.CreateHostPath
		if volume.Type != "bind" || !volume.ReadOnly || creates {
			t.Errorf("the binary is mounted as %+v", volume)
		}
	}
}

// checkService checks what else became of the service, of Seafile's file and of ours.
func checkService(t *testing.T, ours composeService, version string) {
	t.Helper()
	if len(ours.Volumes) != 2 || ours.Image != "seafileltd/notification-server:"+version+"-latest" ||
		ours.Command != nil || ours.Restart != "always" || len(ours.Labels) != 4 ||
		ours.Environment["JWT_PRIVATE_KEY"] != testKey ||
		ours.Environment["NOTIFICATION_SERVER_LOG_LEVEL"] != "info" {
		t.Errorf("what Seafile's file says of the service is gone: %+v", ours)
	}
	if ours.StopGracePeriod != "10s" || ours.Environment["SEAFILE_LOG_TO_STDOUT"] != "true" {
		t.Errorf("the service is %+v", ours)
	}
	test := strings.Join(ours.HealthCheck.Test, " ")
	if test != "CMD /opt/seafile/notification-server -c /opt/seafile -check" {
		t.Errorf("the health check is %q", test)
	}
}

// A builtImage is an image and its root file system.
type builtImage struct {
	command     []string
	healthCheck []string
	root        string
}

// buildImage builds the Dockerfile of README.md by its command, with a static binary and
// with these CA certificates.
func buildImage(t *testing.T, authorities string) builtImage {
	t.Helper()
	dir, store := t.TempDir(), t.TempDir()
	build := exec.Command("go", "build", "-o", dir+"/", ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	writeFile(t, filepath.Join(dir, "ca-certificates.crt"), authorities, 0o644)
	writeFile(t, filepath.Join(dir, "Dockerfile"), readmeBlock(t, "dockerfile: Dockerfile"), 0o644)
	podman := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("podman", append([]string{"--storage-driver", "vfs",
			"--root", store + "/root", "--runroot", store + "/run"}, args...)...)
		cmd.Dir = dir
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v: %s", cmd, err, stderr.String())
		}
		return string(out)
	}
	const command = "podman build --format docker -t own-notification-server ."
	if !strings.Contains(readme(t), "\n"+command+"\n") {
		t.Errorf("README.md does not say %s", command)
	}
	podman(append(strings.Fields(command)[1:], "--isolation", "chroot")...)
	var images []struct {
		Config      struct{ Cmd []string }
		HealthCheck struct{ Test []string }
	}
	about := podman("image", "inspect", "own-notification-server")
	if err := json.Unmarshal([]byte(about), &images); err != nil {
		t.Fatal(err)
	}
	return builtImage{
		command:     images[0].Config.Cmd,
		healthCheck: images[0].HealthCheck.Test,
		root:        strings.TrimSpace(podman("image", "mount", "own-notification-server")),
	}
}

// start starts a command in the image's root file system, as Seafile's compose file does.
func (image builtImage) start(t *testing.T, port string, command ...string) *process {
	t.Helper()
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: image.root}
	return launch(t, []string{"JWT_PRIVATE_KEY=" + testKey, "NOTIFICATION_SERVER_PORT=" + port}, cmd)
}

// The image has the path and the command of Seafile's. In its root file system, which has
// nothing else, it serves, and its health check sees that, and when it does not.
func TestReadmeImage(t *testing.T) {
	t.Parallel()
	need(t, "podman")
	if os.Getuid() != 0 && os.Getenv("CI") != "true" {
		t.Skip("only root can change the root directory")
	}
	cert := makeCertificate(t, "127.0.0.1", time.Now().Add(time.Hour))
	authority, err := os.ReadFile(cert.file)
	if err != nil {
		t.Fatal(err)
	}
	image := buildImage(t, string(authority))
	const official = "/opt/seafile/notification-server -c /opt/seafile"
	const logFile = "/shared/seafile/logs/notification-server.log"
	if command := strings.Join(image.command, " "); command != official+" -l "+logFile {
		t.Errorf("the command is %s, not that of Seafile's image", command)
	}
	if test := strings.Join(image.healthCheck, " "); test != "CMD "+official+" -check" {
		t.Errorf("the health check is %s", test)
	}
	writeFile(t, filepath.Join(image.root, logFile), "", 0o644) // compose mounts a volume there

	port := freePort(t)
	server := image.start(t, port, image.command...)
	server.waitPing("127.0.0.1:" + port)
	tlsFront := front(t, "http://127.0.0.1:"+port, nil)
	tlsFront.TLS = &tls.Config{Certificates: []tls.Certificate{cert.Certificate}}
	tlsFront.StartTLS()
	check := func(want int, urls ...string) {
		t.Helper()
		p := image.start(t, port, append(image.healthCheck[1:], urls...)...)
		if status := p.wait(); status != want {
			t.Errorf("the health check of %s ends with %d, want %d: %s", urls, status, want, p.out)
		}
	}
	check(0)
	check(0, tlsFront.URL+"/notification")
	if status := server.terminate(); status != 0 {
		t.Errorf("the server ends with %d: %s", status, server.out)
	}
	check(1)
	log, err := os.ReadFile(filepath.Join(image.root, logFile))
	greps := regexp.MustCompile(`grep '(notification server started [^']*)'`).FindStringSubmatch(readme(t))
	if err != nil || greps == nil || !regexp.MustCompile(greps[1]).Match(log) {
		t.Errorf("%q is not in the log %q, %v", greps, log, err)
	}
}

// kubernetesTool decodes objects by Kubernetes' own types, which must know each field, and
// prints them as JSON.
const kubernetesTool = `package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"
)

func main() {
	data, err := io.ReadAll(os.Stdin)
	if err != nil {
		panic(err)
	}
	var objects []any
	for _, text := range bytes.Split(data, []byte("\n---\n")) {
		var meta struct{ APIVersion, Kind string }
		if err := yaml.Unmarshal(text, &meta); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		object, known := map[string]any{
			"apps/v1 Deployment":           &appsv1.Deployment{},
			"v1 Service":                   &corev1.Service{},
			"networking.k8s.io/v1 Ingress": &networkingv1.Ingress{},
		}[meta.APIVersion+" "+meta.Kind]
		if !known {
			fmt.Fprintf(os.Stderr, "no type for %+v\n", meta)
			os.Exit(1)
		}
		if err := yaml.UnmarshalStrict(text, object); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", meta.Kind, err)
			os.Exit(1)
		}
		objects = append(objects, object)
	}
	json.NewEncoder(os.Stdout).Encode(objects)
}
`

// inside returns what stands in a value of JSON at a path of names and indices, or nil.
func inside(value any, path ...any) any {
	for _, step := range path {
		switch v := value.(type) {
		case map[string]any:
			name, _ := step.(string)
			value = v[name]
		case []any:
			i, _ := step.(int)
			if i >= len(v) {
				return nil
			}
			value = v[i]
		default:
			return nil
		}
	}
	return value
}

// The manifests have only fields that Kubernetes knows, and their names lead from one to
// the other: Ingress to Service, Service to pods, probes to the port.
func TestReadmeKubernetes(t *testing.T) {
	t.Parallel()
	tool := goTool(t, kubernetesTool, "k8s.io/api v0.36.5", "sigs.k8s.io/yaml v1.6.0")
	var objects []map[string]any
	runTool(t, tool, ".", readmeBlock(t, "kubernetes: notification.yml"), &objects)
	if len(objects) != 3 {
		t.Fatalf("there are %d objects, want a Deployment, a Service and an Ingress", len(objects))
	}
	field := func(object int, path ...any) any { return inside(objects[object], path...) }
	pod := func(path ...any) any {
		return field(0, append([]any{"spec", "template", "spec"}, path...)...)
	}
	container := func(path ...any) any { return pod(append([]any{"containers", 0}, path...)...) }
	backend := func(path ...any) any {
		return field(2, append([]any{"spec", "rules", 0, "http", "paths", 0}, path...)...)
	}
	port := container("ports", 0, "name")
	labels := field(0, "spec", "selector", "matchLabels")
	for _, tc := range []struct {
		name      string
		got, want any
	}{
		{"replicas", field(0, "spec", "replicas"), 1.0},
		{"labels of the pods", field(0, "spec", "template", "metadata", "labels"), labels},
		{"selector of the Service", field(1, "spec", "selector"), labels},
		{"port of the container", container("ports", 0, "containerPort"), 8083.0},
		{"port of the Service", field(1, "spec", "ports", 0, "port"), 8083.0},
		{"target of the Service", field(1, "spec", "ports", 0, "targetPort"), port},
		{"port of the readiness probe", container("readinessProbe", "httpGet", "port"), port},
		{"port of the liveness probe", container("livenessProbe", "httpGet", "port"), port},
		{"path of the probes", container("readinessProbe", "httpGet", "path"), "/ping"},
		{"path of the Ingress", backend("path"), "/notification"},
		{"kind of path", backend("pathType"), "Prefix"},
		{"Service of the Ingress", backend("backend", "service", "name"), field(1, "metadata", "name")},
		{"port of the Ingress", backend("backend", "service", "port", "name"),
			field(1, "spec", "ports", 0, "name")},
		{"command", container("command"), nil}, // the image's
		{"key", container("env", 1, "name"), "JWT_PRIVATE_KEY"},
	} {
		if !reflect.DeepEqual(tc.got, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, tc.got, tc.want)
		}
	}
	if field(1, "metadata", "name") == "notification-server" {
		t.Error("the Service's name sets NOTIFICATION_SERVER_PORT in other pods")
	}
	grace, _ := pod("terminationGracePeriodSeconds").(float64)
	sleep, _ := container("lifecycle", "preStop", "sleep", "seconds").(float64)
	if grace < sleep+10 {
		t.Errorf("after %v s of preStop, %v s leave no 10 s to stop in", sleep, grace)
	}
	command := fmt.Sprintf("kubectl exec deploy/%s -- ", field(0, "metadata", "name"))
	if !strings.Contains(readme(t), command) {
		t.Errorf("README.md does not say %s", command)
	}
}

// ---- Benchmarks and the soak ----
//
// First what needs a server in this process, or few clients; then load on the real
// binary in a process of its own: growth, and the soak. No benchmark asserts a speed: the
// figures are metrics of the result. The soak asserts what a client must get, and when.

// soon is when an event's token expires: an hour ahead at most is allowed.
func soon() time.Time { return time.Now().Add(5 * time.Minute) }

// BenchmarkMirror measures what a sender waits for: one event after the other,
// over a connection that is kept alive, as seaf-server posts.
func BenchmarkMirror(b *testing.B) {
	for _, bc := range []struct{ name, without string }{
		{"direct", ""}, {"to1", `node[23]|1\.1[23]:`}, {"to2", `node3|1\.13:`}, {"to3", ""},
	} {
		b.Run(bc.name, func(b *testing.B) {
			cl := startCluster(b)
			addr := "127.0.0.1:" + cl.ports[0]
			if bc.name != "direct" {
				cl.startNginx(bc.without)
				addr = cl.events
			}
			var took []time.Duration
			for b.Loop() {
				start := time.Now()
				request(b, "POST", "http://"+addr+"/events", lockEvent(repoA, 1), tokenLine(eventToken(soon())))
				took = append(took, time.Since(start))
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds()), "median-µs")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
		})
	}
}

// BenchmarkRestart measures a restart with 1,000 clients, as systemd does it:
// the next process starts when the first has ended.
func BenchmarkRestart(b *testing.B) {
	for _, bc := range []struct {
		name   string
		handed bool
		signal syscall.Signal
	}{
		{"socket/SIGTERM", true, syscall.SIGTERM}, {"socket/SIGKILL", true, syscall.SIGKILL},
		{"port/SIGTERM", false, syscall.SIGTERM}, {"port/SIGKILL", false, syscall.SIGKILL},
	} {
		b.Run(bc.name, func(b *testing.B) {
			ln, addr := listenTCP(b)
			_, port, _ := net.SplitHostPort(addr)
			dir := writeConfig(b, port)
			run := func() *process { return startHanded(b, ln, nil, "-c", dir) }
			if !bc.handed {
				ln.Close()
				run = func() *process { return start(b, nil, buildBinary(b), "-c", dir) }
			}
			p := run()
			p.waitPing(addr)
			var refused, cut, requests int64
			var blind time.Duration
			for b.Loop() {
				for range 1000 {
					go readUntilClosed(connect(b, addr, asDesktop))
				}
				load := startRestartLoad(addr, 4)
				waitFor(b, "requests are answered", func() bool { return load.good.Load() > 50 })
				struck := time.Now()
				p.Process.Signal(bc.signal)
				p.wait()
				p = run()
				waitFor(b, "requests are answered again", func() bool { return pings(addr) })
				blind += time.Since(struck)
				load.stop()
				refused += load.refused.Load()
				cut += load.cut.Load()
				requests += load.good.Load()
			}
			b.ReportMetric(float64(refused)/float64(b.N), "refused/restart")
			b.ReportMetric(float64(cut)/float64(b.N), "cut/restart")
			b.ReportMetric(blind.Seconds()/float64(b.N), "blind-s")
		})
	}
}

// readUntilClosed reads until the server closes the connection, and answers that.
func readUntilClosed(c *testClient) {
	defer c.nc.Close()
	for {
		opcode, payload, err := c.read()
		if err != nil {
			return
		}
		if opcode == opClose {
			c.write(maskedFrame(0x80|opClose, payload))
			return
		}
	}
}

// countedSubscribers connects n browsers to a server, each subscribed to repoA, whose
// frames are read and counted without allocation: got receives each total of n.
func countedSubscribers(b *testing.B, addr string, n, frameBytes int) (got chan struct{}) {
	b.Helper()
	got = make(chan struct{}, 1)
	var received atomic.Int64
	for range n {
		c := connect(b, addr, asBrowser).subscribed(repoA, "alice@example.com")
		c.nc.SetDeadline(time.Time{})
		go func() {
			buf := make([]byte, frameBytes)
			for {
				if _, err := io.ReadFull(c.br, buf); err != nil {
					return
				}
				if received.Add(1)%int64(n) == 0 {
					got <- struct{}{}
				}
			}
		}()
	}
	return got
}

// startQuiet is startServer without a log and with a running clock, as in production.
func startQuiet(b *testing.B) *testServer {
	s := startServer(b)
	s.log.setLevel(slog.LevelError)
	start := time.Now()
	uptime := func() time.Duration { return time.Since(start) + time.Hour }
	s.hub.clock.uptime = uptime
	return s
}

func parsedUpdate(b *testing.B) *event {
	b.Helper()
	ev, err := parseEvent([]byte(update(repoA, "7920509ee42fa792aec26c44588b6f65371084fa")))
	if err != nil {
		b.Fatal(err)
	}
	return ev
}

// BenchmarkFanout is one event to n subscribers: from publishing it to the last one's having it.
func BenchmarkFanout(b *testing.B) {
	for _, n := range []int{1, 100, 1000, 5000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := startQuiet(b)
			ev := parsedUpdate(b)
			got := countedSubscribers(b, s.addr, n, len(ev.message.frame))
			b.ReportAllocs()
			for b.Loop() {
				again, m := *ev, *ev.message
				again.message = &m
				s.hub.publish(&again)
				<-got
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/delivery")
		})
	}
}

// BenchmarkEvent is one event end to end: posted by HTTP, checked, and at its subscriber.
func BenchmarkEvent(b *testing.B) {
	s := startQuiet(b)
	ev := parsedUpdate(b)
	body := ev.message.payload()
	got := countedSubscribers(b, s.addr, 1, len(ev.message.frame))
	nc, err := net.Dial("tcp", s.addr)
	if err != nil {
		b.Fatal(err)
	}
	defer nc.Close()
	br := bufio.NewReader(nc)
	post := fmt.Appendf(nil, "POST /events HTTP/1.1\r\nHost: x\r\nAuthorization: Token %s\r\n"+
		"Content-Length: %d\r\n\r\n%s", eventToken(soon()), len(body), body)
	b.ReportAllocs()
	for b.Loop() {
		nc.Write(post)
		answer, err := http.ReadResponse(br, nil)
		if err != nil || answer.StatusCode != http.StatusOK {
			b.Fatal(answer, err)
		}
		io.Copy(io.Discard, answer.Body)
		<-got
	}
}

// BenchmarkSubscribe is a subscribe message with its token, and the pong behind it.
func BenchmarkSubscribe(b *testing.B) {
	s := startQuiet(b)
	c := connect(b, s.addr, asDesktop)
	token := clientToken(repoA, "alice@example.com", later())
	message := maskedFrame(0x80|opText, []byte(subscribeText(repoA, token)))
	message = append(message, maskedFrame(0x80|opPing, nil)...)
	pong := make([]byte, 2)
	b.ReportAllocs()
	for b.Loop() {
		c.write(message)
		if _, err := io.ReadFull(c.br, pong); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPing is a desktop client's empty ping and its pong.
func BenchmarkPing(b *testing.B) {
	s := startQuiet(b)
	c := connect(b, s.addr, asDesktop)
	ping, pong := maskedFrame(0x80|opPing, nil), make([]byte, 2)
	b.ReportAllocs()
	for b.Loop() {
		c.write(ping)
		if _, err := io.ReadFull(c.br, pong); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkToken(b *testing.B) {
	s := startQuiet(b)
	token := clientToken(repoA, "alice@example.com", later())
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.handler.verifier.verify(token); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkIdleMemory is the resident memory of the real binary for each of 5,000 idle clients.
func BenchmarkIdleMemory(b *testing.B) {
	const n = 5000
	port := freePort(b)
	p := startBinary(b, port, nil, "-c", writeConfig(b, port))
	for b.Loop() {
		before := residentMemory(b, p.Process.Pid)
		clients := make([]*testClient, n)
		for i := range clients {
			repoID := fmt.Sprintf("%08x-0000-4000-8000-000000000000", i)
			clients[i] = connect(b, "127.0.0.1:"+port, asDesktop).subscribed(repoID, "alice@example.com")
		}
		time.Sleep(13 * time.Second) // after 10 s the server gives back what the rush has taken
		b.ReportMetric(float64(residentMemory(b, p.Process.Pid)-before)/n, "bytes/conn")
		for _, c := range clients {
			c.nc.Close()
		}
	}
}

// residentMemory returns the bytes of a process that are in memory.
func residentMemory(t testing.TB, pid int) int {
	t.Helper()
	var size, pages int
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err == nil {
		_, err = fmt.Sscan(string(text), &size, &pages)
	}
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}

// loadClients are many WebSocket clients of one server. They weigh less than the server
// that they load: one goroutine reads for all of them by epoll(7), so a client takes
// neither a goroutine nor a buffer. That goroutine calls the functions below, and ends
// with the test.
type loadClients struct {
	t       testing.TB
	server  syscall.SockaddrInet4
	host    string // host and port of the server
	epoll   int
	all     []*loadClient // fixed; an epoll event carries the index
	onFrame func(c *loadClient, opcode byte, payload []byte)
	onEnd   func(c *loadClient)
	onTick  func() // every 10 to 30 ms
	here    atomic.Int64
	texts   atomic.Int64 // text frames
	ended   atomic.Int64 // connections that ended other than by cut
	running atomic.Bool
	done    chan struct{}
}

// A loadClient is a place for a connection, which may be made anew after its end.
type loadClient struct {
	of      *loadClients
	id      int
	desktop bool
	buffer  int    // for receiving, in bytes; 0 is the system's own size
	first   []byte // is sent when the upgrade was answered
	// The fields down to upgraded belong to the goroutine that reads.
	rest     []byte // the beginning of a frame
	upgraded bool
	status   int    // of the server's close frame, 0 without one
	reason   string // of that frame, or why the connection failed
	mu       sync.Mutex
	fd       int    // -1 without a connection; guarded by mu, like all below
	unsent   []byte // what the system had no room for
	paused   bool   // reads nothing
}

// hereAgain is the payload of the ping by which a client learns that the server
// has handled all that it sent before.
const hereAgain = "here"

// newLoadClients makes places for n clients, all of which are desktop clients.
func newLoadClients(t testing.TB, addr string, n int) *loadClients {
	t.Helper()
	host, err := net.ResolveTCPAddr("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	lc := &loadClients{t: t, host: addr, done: make(chan struct{})}
	// With more threads than CPUs the system shares the CPUs out among them: who measures
	// an answer does not wait until Go's scheduler has time for it.
	before := runtime.GOMAXPROCS(8)
	t.Cleanup(func() { runtime.GOMAXPROCS(before) })
	lc.server = syscall.SockaddrInet4{Port: host.Port, Addr: [4]byte(host.IP.To4())}
	if lc.epoll, err = syscall.EpollCreate1(syscall.EPOLL_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		lc.all = append(lc.all, &loadClient{of: lc, id: i, desktop: true, fd: -1})
	}
	return lc
}

// start starts the goroutine that reads; the functions of lc must be set before.
func (lc *loadClients) start() *loadClients {
	lc.running.Store(true)
	go lc.read()
	lc.t.Cleanup(lc.stop)
	return lc
}

// stop ends the goroutine that reads, and all connections.
func (lc *loadClients) stop() {
	if !lc.running.Swap(false) {
		return
	}
	<-lc.done
	for _, c := range lc.all {
		c.cut()
	}
	syscall.Close(lc.epoll)
}

func (lc *loadClients) read() {
	defer close(lc.done)
	events := make([]syscall.EpollEvent, 256)
	buf := make([]byte, 64<<10)
	for tick := time.Now(); lc.running.Load(); {
		n, err := syscall.EpollWait(lc.epoll, events, 20)
		if err != nil && err != syscall.EINTR {
			lc.t.Errorf("epoll_wait: %v", err)
			return
		}
		for _, ev := range events[:max(n, 0)] {
			c := lc.all[ev.Fd]
			if ev.Events&syscall.EPOLLOUT != 0 {
				c.sendRest()
			}
			if ev.Events&^syscall.EPOLLOUT != 0 {
				c.receive(buf)
			}
		}
		if lc.onTick != nil && time.Since(tick) >= 10*time.Millisecond {
			tick = time.Now()
			lc.onTick()
		}
	}
}

// connect opens a connection, asks for the upgrade and returns at once. What
// fails later is told by onEnd. First is sent when the upgrade was answered.
func (c *loadClient) connect(first []byte) error {
	const stream = syscall.SOCK_STREAM | syscall.SOCK_NONBLOCK | syscall.SOCK_CLOEXEC
	fd, err := syscall.Socket(syscall.AF_INET, stream, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	const bindAddressNoPort = 24 // IP_BIND_ADDRESS_NO_PORT: the port is chosen by connect
	syscall.SetsockoptInt(fd, syscall.IPPROTO_IP, bindAddressNoPort, 1)
	if c.buffer > 0 {
		syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_RCVBUF, c.buffer)
	}
	// Several addresses have more ports than one has.
	from := &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, byte(2 + c.id%16)}}
	if err := syscall.Bind(fd, from); err != nil {
		syscall.Close(fd)
		return fmt.Errorf("bind: %w", err)
	}
	if err := syscall.Connect(fd, &c.of.server); err != nil && err != syscall.EINPROGRESS {
		syscall.Close(fd)
		return fmt.Errorf("connect: %w", err)
	}
	protocol := "Origin: https://cloud.example.com\r\n"
	if c.desktop {
		protocol = "Sec-WebSocket-Protocol: notification.seafile.com\r\n"
	}
	c.first, c.rest, c.upgraded, c.status, c.reason = first, nil, false, 0, ""
	c.mu.Lock()
	c.fd, c.paused = fd, false
	c.unsent = fmt.Appendf(nil, "GET / HTTP/1.1\r\nHost: %s\r\n%s%s\r\n", c.of.host, upgradeLines, protocol)
	ev := syscall.EpollEvent{Events: syscall.EPOLLIN | syscall.EPOLLOUT, Fd: int32(c.id)}
	err = syscall.EpollCtl(c.of.epoll, syscall.EPOLL_CTL_ADD, fd, &ev)
	c.mu.Unlock()
	return err
}

// send sends p whole, later if the system has no room for it now.
func (c *loadClient) send(p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return
	}
	waits := len(c.unsent) > 0
	c.unsent = append(c.unsent, p...)
	if !waits {
		c.write()
	}
}

func (c *loadClient) sendRest() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd >= 0 {
		c.write()
	}
}

// write writes what the system has room for. An error shows in receive. c.mu must be held.
func (c *loadClient) write() {
	n, err := syscall.Write(c.fd, c.unsent)
	c.unsent = c.unsent[max(n, 0):]
	if len(c.unsent) == 0 || err != nil && err != syscall.EAGAIN {
		c.unsent = nil
	}
	c.watch()
}

// watch tells epoll what c waits for. c.mu must be held.
func (c *loadClient) watch() {
	ev := syscall.EpollEvent{Fd: int32(c.id)}
	if !c.paused {
		ev.Events |= syscall.EPOLLIN
	}
	if len(c.unsent) > 0 {
		ev.Events |= syscall.EPOLLOUT
	}
	syscall.EpollCtl(c.of.epoll, syscall.EPOLL_CTL_MOD, c.fd, &ev)
}

// pause makes c read nothing until it is called with false.
func (c *loadClient) pause(paused bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.paused = paused
	if c.fd >= 0 {
		c.watch()
	}
}

// receive reads once, at most as much as buf holds, and handles what came. Only
// the goroutine that reads may call it.
func (c *loadClient) receive(buf []byte) {
	c.mu.Lock()
	if c.fd < 0 {
		c.mu.Unlock()
		return
	}
	n, err := syscall.Read(c.fd, buf)
	c.mu.Unlock()
	if err == syscall.EAGAIN || err == syscall.EINTR {
		return
	}
	if err != nil || n == 0 {
		if c.status == 0 && c.reason == "" {
			c.reason = fmt.Sprintf("without a close frame: %v", err)
		}
		c.end()
		return
	}
	data := buf[:n]
	if len(c.rest) > 0 {
		data = append(c.rest, data...)
	}
	c.rest = slices.Clone(c.handle(data))
}

// end forgets a connection that ended, and tells so.
func (c *loadClient) end() {
	c.cut()
	c.of.ended.Add(1)
	if c.of.onEnd != nil {
		c.of.onEnd(c)
	}
}

// cut ends the connection by a reset, as of a client that vanishes, if there is one.
func (c *loadClient) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return
	}
	syscall.SetsockoptLinger(c.fd, syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1})
	syscall.Close(c.fd)
	c.fd, c.unsent = -1, nil
}

// handle handles all that is whole in data, and returns the rest.
func (c *loadClient) handle(data []byte) []byte {
	if !c.upgraded {
		head, rest, found := bytes.Cut(data, []byte("\r\n\r\n"))
		if !found {
			return data
		}
		if !bytes.HasPrefix(head, []byte("HTTP/1.1 101 ")) {
			c.reason = fmt.Sprintf("the upgrade is answered %.60q", head)
			c.end()
			return nil
		}
		c.upgraded, data = true, rest
		c.send(c.first)
		c.first = nil
	}
	for len(data) >= 2 {
		head, size := 2, int(data[1])
		if size == 126 && len(data) >= 4 {
			head, size = 4, int(binary.BigEndian.Uint16(data[2:]))
		} else if size == 127 && len(data) >= 10 {
			head, size = 10, int(binary.BigEndian.Uint32(data[6:])) // more does not come
		} else if size >= 126 {
			break
		}
		if len(data) < head+size {
			break
		}
		c.frame(data[0]&0x0f, data[head:head+size])
		data = data[head+size:]
	}
	return data
}

func (c *loadClient) frame(opcode byte, payload []byte) {
	switch opcode {
	case opText:
		c.of.texts.Add(1)
	case opPing:
		c.send(zeroMasked(opPong, payload))
	case opPong:
		if string(payload) == hereAgain {
			c.of.here.Add(1)
		}
	case opClose:
		c.status = 1005 // no status, RFC 6455, section 7.4.1
		if len(payload) >= 2 {
			c.status = int(binary.BigEndian.Uint16(payload))
			c.reason = string(payload[2:])
		}
		c.send(zeroMasked(opClose, payload))
	}
	if c.of.onFrame != nil {
		c.of.onFrame(c, opcode, payload)
	}
}

// zeroMasked is a client's frame under the mask of zeros, which leaves the
// payload as it is. The payload has less than 64 KiB.
func zeroMasked(opcode byte, payload []byte) []byte {
	f := append(make([]byte, 0, len(payload)+8), 0x80|opcode)
	if n := len(payload); n < 126 {
		f = append(f, 0x80|byte(n))
	} else {
		f = binary.BigEndian.AppendUint16(append(f, 0x80|126), uint16(n))
	}
	f = append(f, 0, 0, 0, 0)
	return append(f, payload...)
}

var emptyPing, herePing = zeroMasked(opPing, nil), zeroMasked(opPing, []byte(hereAgain))

// libraryNo is the repo ID of the n-th library.
func libraryNo(n int) string { return fmt.Sprintf("%08x-0000-4000-8000-000000000000", n) }

// subscribing is a desktop client's subscription to a library, with a token until exp.
func subscribing(library int, user string, exp time.Time) []byte {
	id := libraryNo(library)
	return zeroMasked(opText, []byte(subscribeText(id, clientToken(id, user, exp))))
}

func unsubscribing(library int) []byte {
	return zeroMasked(opText, []byte(unsubscribeText(libraryNo(library))))
}

// subscribingAll subscribes to some libraries, and asks whether that was handled.
func (c *loadClient) subscribingAll(libraries ...int) (all []byte) {
	exp := time.Now().Add(72 * time.Hour)
	for _, library := range libraries {
		all = append(all, subscribing(library, fmt.Sprintf("user%d@example.com", c.id), exp)...)
	}
	return append(all, herePing...)
}

// arrive connects clients, at most 256 at once, and waits until all are subscribed.
func (lc *loadClients) arrive(clients []*loadClient, libraries func(c *loadClient) []int) {
	lc.t.Helper()
	before := lc.here.Load()
	for i, c := range clients {
		for lc.here.Load()-before < int64(i-256) {
			time.Sleep(200 * time.Microsecond)
			lc.mustBeThere()
		}
		if err := c.connect(c.subscribingAll(libraries(c)...)); err != nil {
			lc.t.Fatal(err)
		}
	}
	lc.waitHere(before + int64(len(clients)))
}

// mustBeThere fails the test if the server ended a connection.
func (lc *loadClients) mustBeThere() {
	lc.t.Helper()
	if lc.ended.Load() == 0 {
		return
	}
	for _, c := range lc.all {
		if c.reason != "" || c.status != 0 {
			lc.t.Fatalf("client %d was closed: %d %q", c.id, c.status, c.reason)
		}
	}
}

// waitHere waits until so many pings of subscribingAll were answered.
func (lc *loadClients) waitHere(n int64) {
	lc.t.Helper()
	waitLong(lc.t, fmt.Sprintf("the server has handled what %d clients sent", n), func() bool {
		lc.mustBeThere()
		return lc.here.Load() >= n
	})
}

// waitLong is waitFor for big loads, which can take a minute, and looks more often.
func waitLong(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !condition(); time.Sleep(200 * time.Microsecond) {
		if time.Now().After(end) {
			t.Fatalf("waited 2 minutes in vain: %s", what)
		}
	}
}

// A loadSender posts events one after the other over a connection that is kept
// alive, as seaf-server does. Its token is made anew every 2 minutes.
type loadSender struct {
	nc     net.Conn
	br     *bufio.Reader
	addr   string
	token  string
	signed time.Time
	buf    []byte
}

func newLoadSender(t testing.TB, addr string) *loadSender {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	return &loadSender{nc: nc, br: bufio.NewReaderSize(nc, 1024), addr: addr}
}

// post posts an event, which must be answered 200, and returns how long the answer took.
func (s *loadSender) post(body string) (time.Duration, error) {
	if time.Since(s.signed) > 2*time.Minute {
		s.signed = time.Now()
		s.token = eventToken(soon())
	}
	s.buf = append(s.buf[:0], "POST /events HTTP/1.1\r\nHost: "...)
	s.buf = append(s.buf, s.addr...)
	s.buf = append(s.buf, "\r\nAuthorization: Token "...)
	s.buf = append(s.buf, s.token...)
	s.buf = append(s.buf, "\r\nContent-Type: application/json\r\nContent-Length: "...)
	s.buf = strconv.AppendInt(s.buf, int64(len(body)), 10)
	s.buf = append(s.buf, "\r\n\r\n"...)
	s.buf = append(s.buf, body...)
	return s.roundTrip(s.buf)
}

// ping asks for /ping, which waits for no lock of the hub.
func (s *loadSender) ping() (time.Duration, error) {
	return s.roundTrip([]byte("GET /ping HTTP/1.1\r\nHost: " + s.addr + "\r\n\r\n"))
}

func (s *loadSender) roundTrip(request []byte) (time.Duration, error) {
	s.nc.SetDeadline(time.Now().Add(time.Minute))
	start := time.Now()
	if _, err := s.nc.Write(request); err != nil {
		return 0, err
	}
	status, err := s.br.ReadString('\n')
	took := time.Since(start)
	if err != nil {
		return 0, err
	}
	length := 0
	for {
		line, err := s.br.ReadSlice('\n')
		if err != nil {
			return 0, err
		}
		if len(line) <= 2 {
			break
		}
		if value, found := bytes.CutPrefix(line, []byte("Content-Length: ")); found {
			length, _ = strconv.Atoi(string(bytes.TrimSpace(value)))
		}
	}
	if _, err := s.br.Discard(length); err != nil {
		return 0, err
	}
	if !strings.HasPrefix(status, "HTTP/1.1 200 ") {
		return 0, fmt.Errorf("answered %q", status)
	}
	return took, nil
}

// lockNo is an event of which each subscriber gets each one, and once only.
func lockNo(library, n int) string {
	return lockPosted(libraryNo(library), fmt.Sprintf("/%08d", n))
}

// answerTimes posts an event, or asks for /ping, each millisecond until the function
// that it returns is called, which gives the times that the answers took, sorted.
func answerTimes(t testing.TB, ask func() (time.Duration, error)) (stop func() []time.Duration) {
	var times []time.Duration
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			took, err := ask()
			if err != nil {
				t.Errorf("no good answer while the load goes on: %v", err)
				return
			}
			times = append(times, took)
			select {
			case <-quit:
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	return func() []time.Duration {
		close(quit)
		<-done
		slices.Sort(times)
		return times
	}
}

// slope is that of the straight line that fits best, by least squares.
func slope(xs, ys []float64) float64 {
	var meanX, meanY, above, below float64
	for i := range xs {
		meanX += xs[i] / float64(len(xs))
		meanY += ys[i] / float64(len(xs))
	}
	for i := range xs {
		above += (xs[i] - meanX) * (ys[i] - meanY)
		below += (xs[i] - meanX) * (xs[i] - meanX)
	}
	return above / below
}

// exponent is e of the curve y = c·x^e that fits best: 1 is linear, 2 quadratic.
func exponent(xs, ys []float64) float64 {
	var logX, logY []float64
	for i := range xs {
		logX = append(logX, math.Log(xs[i]))
		logY = append(logY, math.Log(ys[i]))
	}
	return slope(logX, logY)
}

// A growth is what something costs, for each size at which it was measured.
type growth struct {
	name  string
	sizes []float64
	costs []float64 // in milliseconds
}

func (g *growth) add(size int, cost time.Duration) {
	g.sizes = append(g.sizes, float64(size))
	g.costs = append(g.costs, milliseconds(cost))
}

// report reports each cost, the exponent of them all, and that of the larger
// sizes, where what each event costs anyway does not flatter the curve.
func (g *growth) report(b *testing.B) {
	for i, size := range g.sizes {
		b.ReportMetric(g.costs[i], fmt.Sprintf("%s-ms@%.0f", g.name, size))
	}
	half := len(g.sizes) / 2
	b.ReportMetric(exponent(g.sizes, g.costs), g.name+"-exponent")
	b.ReportMetric(exponent(g.sizes[half:], g.costs[half:]), g.name+"-exponent-of-large")
	b.ReportMetric(0, "ns/op") // says nothing here
}

// cpuTime is the time that a process has run on the CPUs so far. Unlike the clock, it is
// much the same when others use the machine.
func cpuTime(t testing.TB, pid int) (sum time.Duration) {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range threads {
		var ran int64
		text, err := os.ReadFile(path)
		if err == nil { // else the thread has ended
			fmt.Sscan(string(text), &ran)
		}
		sum += time.Duration(ran)
	}
	return sum
}

func milliseconds(d time.Duration) float64 { return d.Seconds() * 1000 }

// mostClients is n, or how many the limit of open files allows.
func mostClients(n int) int {
	var limit syscall.Rlimit
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit)
	return int(min(uint64(n), uint64(limit.Cur)-100)) // server and clients are in processes of their own
}

// BenchmarkGrowthFanout is one event to n subscribers of a library, until the last one
// has it: the middle of 15 events for each n. CPU is the server's for each event.
func BenchmarkGrowthFanout(b *testing.B) {
	for b.Loop() {
		m := startMetered(b, 0)
		lc := newLoadClients(b, m.addr, mostClients(19900))
		var wanted atomic.Int64
		done := make(chan time.Time, 1)
		lc.onFrame = func(_ *loadClient, opcode byte, _ []byte) {
			if opcode == opText && wanted.Add(-1) == 0 {
				done <- time.Now()
			}
		}
		lc.start()
		sender := newLoadSender(b, m.addr)
		last, cpu, there := &growth{name: "last"}, &growth{name: "CPU"}, 0
		for _, n := range []int{100, 300, 1000, 3000, 10000, len(lc.all)} {
			lc.arrive(lc.all[there:n], func(*loadClient) []int { return []int{1} })
			there = n
			var times []time.Duration
			before := cpuTime(b, m.Process.Pid)
			for i := range 15 {
				wanted.Store(int64(n))
				start := time.Now()
				if _, err := sender.post(lockNo(1, i)); err != nil {
					b.Fatal(err)
				}
				select {
				case end := <-done:
					times = append(times, end.Sub(start))
				case <-time.After(time.Minute):
					b.Fatalf("%d of %d subscribers did not get an event", wanted.Load(), n)
				}
			}
			slices.Sort(times)
			last.add(n, times[len(times)/2])
			cpu.add(n, (cpuTime(b, m.Process.Pid)-before)/time.Duration(len(times)))
		}
		last.report(b)
		cpu.report(b)
		lc.stop()
		m.terminate()
	}
}

// BenchmarkGrowthLibraries is events a second, by 8 senders, over n libraries with
// a subscription each, which are spread over at most 1,000 connections. The
// exponent is that of the time in which each of the libraries has had an event. CPU is
// the server's for that.
func BenchmarkGrowthLibraries(b *testing.B) {
	const most = 1000
	for b.Loop() {
		m := startMetered(b, 0)
		lc := newLoadClients(b, m.addr, most).start()
		all, cpu, there := &growth{name: "all-libraries"}, &growth{name: "CPU"}, 0
		for _, n := range []int{1, 10, 100, 1000, 10000, 100000} {
			lc.arrive(lc.all[min(there, most):min(n, most)], func(c *loadClient) []int { return []int{c.id} })
			if n > most {
				before := lc.here.Load()
				for _, c := range lc.all {
					var more []int
					for library := max(there, most) + c.id; library < n; library += most {
						more = append(more, library)
					}
					c.send(c.subscribingAll(more...))
				}
				lc.waitHere(before + most)
			}
			there = n
			before := cpuTime(b, m.Process.Pid)
			events, took := postToAll(b, m.addr, lc, n)
			each := time.Duration(events)
			b.ReportMetric(float64(events)/took.Seconds(), fmt.Sprintf("events/s@%d", n))
			all.add(n, took*time.Duration(n)/each)
			cpu.add(n, (cpuTime(b, m.Process.Pid)-before)*time.Duration(n)/each)
		}
		all.report(b)
		cpu.report(b)
		lc.stop()
		m.terminate()
	}
}

// postToAll posts events for n libraries for 2 s. Each must come to one client.
func postToAll(b *testing.B, addr string, lc *loadClients, n int) (events int64, took time.Duration) {
	b.Helper()
	const senders = 8
	var posted atomic.Int64
	var wg sync.WaitGroup
	before, start := lc.texts.Load(), time.Now()
	for first := range senders {
		sender := newLoadSender(b, addr)
		wg.Go(func() {
			defer sender.nc.Close()
			for i := first; time.Since(start) < 2*time.Second; i += senders {
				library := i * 7919 % n // 7919 is prime: neighbours do not follow each other
				if _, err := sender.post(lockNo(library, i)); err != nil {
					b.Error(err)
					return
				}
				posted.Add(1)
			}
		})
	}
	wg.Wait()
	waitLong(b, "each event has come", func() bool {
		lc.mustBeThere()
		return lc.texts.Load()-before >= posted.Load()
	})
	return posted.Load(), time.Since(start)
}

// BenchmarkGrowthClient is a client with n libraries that subscribes to all,
// unsubscribes from all, subscribes anew and leaves: the time of each until the
// metrics show it, a client, where several do it at once. Meanwhile events are
// posted: the longest answer to their sender is a figure, too.
func BenchmarkGrowthClient(b *testing.B) {
	for b.Loop() {
		m := startMetered(b, 0)
		sizes := []int{1, 10, 100, 1000, 5000}
		steps := []*growth{{name: "subscribe"}, {name: "unsubscribe"}, {name: "leave"}}
		for _, n := range sizes {
			lc := newLoadClients(b, m.addr, min(100, max(2, 10000/n))).start()
			before := lc.here.Load()
			for _, c := range lc.all {
				if err := c.connect(herePing); err != nil {
					b.Fatal(err)
				}
			}
			lc.waitHere(before + int64(len(lc.all)))
			stop := answerTimes(b, eventsNowhere(b, m.addr))
			for i, took := range manyLibraries(lc, m, n) {
				steps[i].add(n, took/time.Duration(len(lc.all)))
			}
			times := stop()
			b.ReportMetric(milliseconds(times[len(times)-1]), fmt.Sprintf("longest-answer-ms@%d", n))
			lc.stop()
		}
		for _, g := range steps {
			g.report(b)
		}
		m.terminate()
	}
}

// eventsNowhere posts events for a library that nobody is subscribed to.
func eventsNowhere(b *testing.B, addr string) func() (time.Duration, error) {
	sender, n := newLoadSender(b, addr), 0
	return func() (time.Duration, error) {
		n++
		return sender.post(lockNo(1<<30, n))
	}
}

// manyLibraries lets connected clients subscribe to n libraries each, unsubscribe,
// subscribe and leave, and returns the times of the first two and of the last.
func manyLibraries(lc *loadClients, m *metered, n int) (took [3]time.Duration) {
	lc.t.Helper()
	var subscribe, unsubscribe [][]byte
	for _, c := range lc.all {
		var libraries []int
		var leaving []byte
		for i := range n {
			libraries = append(libraries, c.id*n+i)
			leaving = append(leaving, unsubscribing(c.id*n+i)...)
		}
		subscribe = append(subscribe, c.subscribingAll(libraries...))
		unsubscribe = append(unsubscribe, append(leaving, herePing...))
	}
	all := float64(n * len(lc.all))
	took[0] = sendAndWait(lc, m, subscribe, all)
	took[1] = sendAndWait(lc, m, unsubscribe, 0)
	sendAndWait(lc, m, subscribe, all)
	start := time.Now()
	for _, c := range lc.all {
		c.cut()
	}
	waitLong(lc.t, "all have left", func() bool { return scrape(lc.t, m.metrics)["subscriptions"] == 0 })
	took[2] = time.Since(start)
	return took
}

// sendAndWait sends each client's messages, and waits until they are handled and
// the metrics show so many subscriptions.
func sendAndWait(lc *loadClients, m *metered, messages [][]byte, subscriptions float64) time.Duration {
	lc.t.Helper()
	before, start := lc.here.Load(), time.Now()
	for i, c := range lc.all {
		c.send(messages[i])
	}
	lc.waitHere(before + int64(len(lc.all)))
	waitLong(lc.t, "the metrics show it", func() bool {
		return scrape(lc.t, m.metrics)["subscriptions"] == subscriptions
	})
	return time.Since(start)
}

// BenchmarkLongestWait is the longest answer to an event's sender while 19,900
// clients come and subscribe, while they are there, and while they leave. The
// answer to /ping, which no lock of the hub delays, tells what the machine takes.
func BenchmarkLongestWait(b *testing.B) {
	for b.Loop() {
		m := startMetered(b, 0)
		lc := newLoadClients(b, m.addr, mostClients(19900)).start()
		sender, pinger, n := newLoadSender(b, m.addr), newLoadSender(b, m.addr), 0
		post := func() (time.Duration, error) {
			n++
			return sender.post(lockNo(0, n))
		}
		phase := func(name string, f func()) {
			stopEvents, stopPings := answerTimes(b, post), answerTimes(b, pinger.ping)
			f()
			events, pings := stopEvents(), stopPings()
			b.ReportMetric(milliseconds(events[len(events)-1]), name+"-longest-ms")
			b.ReportMetric(milliseconds(events[len(events)*99/100]), name+"-p99-ms")
			b.ReportMetric(milliseconds(pings[len(pings)-1]), name+"-ping-longest-ms")
		}
		phase("come", func() { lc.arrive(lc.all, func(c *loadClient) []int { return []int{c.id} }) })
		phase("there", func() { time.Sleep(5 * time.Second) })
		phase("leave", func() {
			for _, c := range lc.all[1:] {
				c.cut()
			}
			waitLong(b, "all have left", func() bool { return scrape(b, m.metrics)["connections"] == 1 })
		})
		b.ReportMetric(0, "ns/op")
		lc.stop()
		m.terminate()
	}
}

// BenchmarkReturn is the return of 19,000 clients with three libraries each within
// one second, while events are posted: how long until all are subscribed, the
// longest answer to the sender, and the server's memory. A connection that ends
// before it was answered is tried again at once, and counted.
func BenchmarkReturn(b *testing.B) {
	for b.Loop() {
		m := startMetered(b, 0)
		lc := newLoadClients(b, m.addr, mostClients(19000))
		var again atomic.Int64
		first := make([][]byte, len(lc.all))
		lc.onEnd = func(c *loadClient) {
			if !c.upgraded && again.Add(1) < 1000 && c.connect(first[c.id]) == nil {
				lc.ended.Add(-1)
			}
		}
		lc.start()
		for i, c := range lc.all {
			first[i] = c.subscribingAll(3*i, 3*i+1, 3*i+2)
		}
		lc.arrive(lc.all, func(c *loadClient) []int { return []int{3 * c.id, 3*c.id + 1, 3*c.id + 2} })
		time.Sleep(12 * time.Second)
		b.ReportMetric(float64(residentMemory(b, m.Process.Pid))/(1<<20), "before-MiB")
		for _, c := range lc.all {
			c.cut()
		}
		waitLong(b, "all have left", func() bool { return scrape(b, m.metrics)["connections"] == 0 })
		time.Sleep(time.Second)
		returnAtOnce(b, m, lc, first)
		b.ReportMetric(float64(again.Load()), "connected-again")
		b.ReportMetric(0, "ns/op")
		lc.stop()
		m.terminate()
	}
}

// returnAtOnce connects all clients within one second, and waits until all are
// subscribed to their three libraries, and 10 s more.
func returnAtOnce(b *testing.B, m *metered, lc *loadClients, first [][]byte) {
	b.Helper()
	sender, n, all := newLoadSender(b, m.addr), 0, len(lc.all)
	stopEvents := answerTimes(b, func() (time.Duration, error) {
		n++
		return sender.post(lockNo(n%(3*all), n))
	})
	peak, cpu := peakMemory(b, m.Process.Pid), cpuTime(b, m.Process.Pid)
	start := time.Now()
	for i, c := range lc.all {
		time.Sleep(time.Until(start.Add(time.Second * time.Duration(i) / time.Duration(all))))
		if err := c.connect(first[i]); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(time.Since(start).Seconds(), "come-s")
	waitLong(b, "all are subscribed", func() bool {
		lc.mustBeThere()
		return scrape(b, m.metrics)["subscriptions"] == float64(3*all)
	})
	b.ReportMetric(time.Since(start).Seconds(), "subscribed-s")
	cpu = cpuTime(b, m.Process.Pid) - cpu
	b.ReportMetric(milliseconds(cpu)/float64(all), "CPU-ms/client")
	times := stopEvents()
	b.ReportMetric(milliseconds(times[len(times)-1]), "longest-answer-ms")
	b.ReportMetric(milliseconds(times[len(times)*99/100]), "p99-answer-ms")
	b.ReportMetric(float64(len(times)), "events")
	time.Sleep(10 * time.Second)
	b.ReportMetric(float64(peak())/(1<<20), "peak-MiB")
	b.ReportMetric(float64(residentMemory(b, m.Process.Pid))/(1<<20), "10s-later-MiB")
}

// peakMemory looks at a process's memory every 10 ms until the function that it
// returns is called, which gives the most that it saw, in bytes.
func peakMemory(t testing.TB, pid int) (stop func() int) {
	quit, done, peak := make(chan struct{}), make(chan struct{}), 0
	go func() {
		defer close(done)
		for {
			peak = max(peak, residentMemory(t, pid))
			select {
			case <-quit:
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	}()
	return func() int {
		close(quit)
		<-done
		return peak
	}
}

// ---- The soak: a day in an hour ----

const (
	soakClients   = 5000
	soakLibraries = 10000
	soakHot       = 20  // of them, that get a tenth of all events, with long paths
	soakEach      = 50  // libraries of a client
	soakRate      = 200 // events a second
	soakSenders   = 4
	soakGrace     = time.Minute // until an event counts as lost: a busy machine takes its time
)

// A soakHabit is how some of the clients behave.
type soakHabit struct {
	name    string
	clients int
	desktop bool          // pings each second, and is told updates twice
	token   time.Duration // how long its tokens live, renewed upon jwt-expired
	hot     int           // of its libraries
	stays   time.Duration // on average, until it leaves; 0 is for ever
	away    time.Duration // until it comes back
	pauses  time.Duration // reads nothing for up to so long, and 2 s; then for as long all that comes
	crawls  bool          // reads 256 bytes a second: is closed as too slow
	deaf    bool          // vanishes: neither reads nor writes any more, but says nothing
}

const longToken = 72 * time.Hour

var soakHabits = []soakHabit{
	{name: "desktop", clients: 2000, desktop: true, token: longToken,
		stays: 4 * time.Minute, away: time.Minute},
	{name: "renewing desktop", clients: 1000, desktop: true, token: time.Minute,
		stays: 10 * time.Minute, away: time.Minute},
	{name: "browser", clients: 1000, token: longToken,
		stays: 90 * time.Second, away: 10 * time.Second},
	{name: "renewing browser", clients: 500, token: time.Minute,
		stays: 5 * time.Minute, away: 10 * time.Second},
	{name: "slow", clients: 200, desktop: true, token: longToken, hot: 10,
		away: time.Minute, pauses: 12 * time.Second},
	{name: "crawling", clients: 100, desktop: true, token: longToken, hot: 10,
		away: time.Minute, crawls: true},
	{name: "vanishing", clients: 200, desktop: true, token: longToken,
		stays: 3 * time.Minute, away: time.Minute, deaf: true},
}

// deafFor is how long a vanishing client keeps its socket open. The server must have
// given it up before.
const deafFor = 130 * time.Second

// A soakEvent is what was posted to a library. All times are since the start.
type soakEvent struct {
	update   bool
	answered time.Duration // 0 while it is not
}

// A soakLibrary has its events in the order in which they were posted: one sender
// posts them all. Event n is events[n-1].
type soakLibrary struct {
	events  []soakEvent
	newest  int // update, 0 for none
	settled int // so many events were answered more than soakGrace ago
}

// A soakSubscription knows what a client has of a library, by number of event.
type soakSubscription struct {
	library int
	expires time.Time     // of its token
	since   time.Duration // of its subscription, or the last renewal
	ignores time.Duration // since jwt-expired came, until it subscribes anew; 0 for not
	ignored time.Duration // when that last began
	crossed int           // jwt-expired came just after the renewals, so often in a row
	from    int           // the first that is due; 0 until the subscription is confirmed
	last    int           // the newest that came, or is owed
	owed    []int         // locks before last that did not come yet
	update  int           // the newest update before last that did not come yet; a newer one does instead
}

type soakState int

const (
	soakAway soakState = iota
	soakOpening
	soakHere
	soakLeaving // after its close frame
	soakDeaf
	soakWaking // reads again, and must learn that it was given up
)

// A soakClient belongs to the goroutine that reads for all clients.
type soakClient struct {
	*loadClient
	habit         *soakHabit
	state         soakState
	until         time.Duration // of its state
	pings, reads  time.Duration // next
	checks        time.Duration // next
	renews        time.Duration // next, 0 for none
	subscriptions []*soakSubscription
}

func (c *soakClient) String() string { return fmt.Sprintf("%s client %d", c.habit.name, c.id) }

// A soak is one run of BenchmarkSoak.
type soak struct {
	t        testing.TB
	m        *metered
	lc       *loadClients
	begun    time.Time
	clients  []*soakClient
	random   *mathrand.Rand // for the goroutine that reads
	draining atomic.Bool

	mu        sync.Mutex // guards all below, and the libraries
	libraries []soakLibrary
	posted    int
	longest   time.Duration // answer to a sender since the last line
	counts    map[string]int
	faults    map[string]int
}

// BenchmarkSoak: over hours no event is lost, no client is closed without cause, and
// neither memory nor goroutines grow, whatever the clients' habits are.
func BenchmarkSoak(b *testing.B) {
	length, err := time.ParseDuration(cmp.Or(os.Getenv("TEST_SOAK"), "1m"))
	if err != nil {
		b.Fatal(err)
	}
	logFile := filepath.Join(b.TempDir(), "log")
	m := startMetered(b, 0, "-l", logFile)
	before := m.footprint()
	s := newSoak(b, m)
	s.lc.start()
	var wg sync.WaitGroup
	for i := range soakSenders {
		wg.Go(func() { s.post(i, length) })
	}
	samples := s.watch(length)
	wg.Wait()
	s.draining.Store(true)
	time.Sleep(soakGrace + 10*time.Second)
	s.lc.stop()
	for _, c := range s.clients {
		if c.state == soakHere {
			s.check(c, s.now())
		}
	}
	waitLong(b, "the server has nothing left of it", func() bool {
		now := m.footprint()
		return now.connections == 0 && now.subscriptions == 0 && now.goroutines <= before.goroutines+8
	})
	s.report(samples)
	checkNoErrors(b, logFile)
}

// checkNoErrors fails the test if the server logged an error.
func checkNoErrors(t testing.TB, logFile string) {
	t.Helper()
	log, err := os.ReadFile(logFile)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, "[ERROR]") {
			t.Errorf("the server logged: %s", line)
		}
	}
}

// newSoak makes clients that are away, from where most come within 20 s.
func newSoak(t testing.TB, m *metered) *soak {
	s := &soak{
		t: t, m: m, begun: time.Now(),
		lc:        newLoadClients(t, m.addr, soakClients),
		random:    mathrand.New(mathrand.NewPCG(1, 2)),
		libraries: make([]soakLibrary, soakLibraries),
		counts:    map[string]int{},
		faults:    map[string]int{},
	}
	for i := range soakHabits {
		for range soakHabits[i].clients {
			s.addClient(&soakHabits[i])
		}
	}
	s.lc.onFrame = func(c *loadClient, opcode byte, payload []byte) {
		s.frame(s.clients[c.id], opcode, payload)
	}
	s.lc.onEnd = func(c *loadClient) { s.end(s.clients[c.id]) }
	s.lc.onTick = func() {
		now := s.now()
		for _, c := range s.clients {
			s.tick(c, now)
		}
	}
	return s
}

func (s *soak) addClient(habit *soakHabit) {
	c := &soakClient{loadClient: s.lc.all[len(s.clients)], habit: habit}
	c.desktop = habit.desktop
	c.until = time.Duration(s.random.Int64N(int64(20 * time.Second)))
	if habit.stays > 0 && s.random.Int64N(int64(habit.stays+habit.away)) < int64(habit.away) {
		c.until += time.Duration(s.random.Int64N(int64(habit.away))) // as many are away as later on
	}
	if habit.pauses > 0 || habit.crawls {
		c.buffer = 4096
	}
	chosen := map[int]bool{}
	for len(chosen) < habit.hot {
		chosen[s.random.IntN(soakHot)] = true
	}
	for len(chosen) < soakEach {
		chosen[soakHot+s.random.IntN(soakLibraries-soakHot)] = true
	}
	for _, library := range slices.Sorted(maps.Keys(chosen)) {
		c.subscriptions = append(c.subscriptions, &soakSubscription{library: library})
	}
	s.clients = append(s.clients, c)
}

func (s *soak) now() time.Duration { return time.Since(s.begun) }

// fault reports what must not be, the first five of each kind in full.
func (s *soak) fault(kind, format string, args ...any) {
	s.faults[kind]++
	if s.faults[kind] <= 5 {
		s.t.Errorf("%s: %s", kind, fmt.Sprintf(format, args...))
	}
}

// post posts events to the libraries of one sender until the end.
func (s *soak) post(first int, length time.Duration) {
	sender := newLoadSender(s.t, s.m.addr)
	random := mathrand.New(mathrand.NewPCG(3, uint64(first)))
	const gap = time.Second * soakSenders / soakRate
	for next := s.now(); next < length; next += gap {
		time.Sleep(next - s.now())
		library := random.IntN(soakLibraries-soakHot) + soakHot
		if random.IntN(10) == 0 {
			library = random.IntN(soakHot)
		}
		library += (first - library%soakSenders + soakSenders) % soakSenders
		if library < soakLibraries {
			s.postOne(sender, library, random.IntN(10) < 6)
		}
	}
}

func (s *soak) postOne(sender *loadSender, library int, update bool) {
	lib := &s.libraries[library]
	s.mu.Lock()
	lib.events = append(lib.events, soakEvent{update: update})
	n := len(lib.events)
	if update {
		lib.newest = n
	}
	s.posted++
	s.mu.Unlock()
	took, err := sender.post(soakBody(library, n, update))
	s.mu.Lock()
	defer s.mu.Unlock()
	lib.events[n-1].answered = s.now()
	s.longest = max(s.longest, took)
	if err != nil {
		s.fault("event not accepted", "event %d of library %d: %v", n, library, err)
	}
}

// soakBody is event n of a library. A desktop client takes 4,096 bytes.
func soakBody(library, n int, isUpdate bool) string {
	if isUpdate {
		return update(libraryNo(library), fmt.Sprintf("%040d", n))
	}
	path := fmt.Sprintf("/%08d", n)
	if library < soakHot {
		path += strings.Repeat("/a folder with a long name", 80)
	}
	return lockPosted(libraryNo(library), path)
}

// number returns the number behind the given text in an event.
func number(text []byte, behind string, digits, base int) (int, bool) {
	_, rest, found := bytes.Cut(text, []byte(behind))
	if !found || len(rest) < digits {
		return 0, false
	}
	n, err := strconv.ParseInt(string(rest[:digits]), base, 64)
	return int(n), err == nil
}

// tick does what time brings about for a client.
func (s *soak) tick(c *soakClient, now time.Duration) {
	switch c.state {
	case soakAway:
		if now >= c.until && !s.draining.Load() {
			s.open(c, now)
		}
	case soakHere:
		s.live(c, now)
	case soakDeaf:
		if now >= c.until || s.draining.Load() {
			c.pause(false)
			c.state, c.until = soakWaking, now+soakGrace
		}
	default: // opening, leaving, waking: all of these have an end
		if now >= c.until && !s.draining.Load() {
			s.mu.Lock()
			s.fault("no answer", "%s waits in state %d", c, c.state)
			s.mu.Unlock()
			c.cut()
			c.state, c.until = soakAway, now+c.habit.away
		}
	}
}

// open connects, and subscribes to all libraries as soon as the upgrade is answered.
func (s *soak) open(c *soakClient, now time.Duration) {
	c.state, c.until, c.renews = soakOpening, now+soakGrace, 0
	expires := time.Now().Add(c.habit.token)
	var first []byte
	s.mu.Lock()
	for _, sub := range c.subscriptions {
		*sub = soakSubscription{library: sub.library, expires: expires, since: now}
		// A new desktop subscription is told the newest update of the last 90 s.
		lib := &s.libraries[sub.library]
		if c.desktop && lib.newest > 0 {
			if answered := lib.events[lib.newest-1].answered; answered > 0 && now-answered < 75*time.Second {
				sub.update = lib.newest
			}
		}
		first = append(first, subscribing(sub.library, "alice@example.com", expires)...)
	}
	s.mu.Unlock()
	if err := c.connect(append(first, herePing...)); err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.fault("no connection", "%v", err)
		c.state, c.until = soakAway, now+c.habit.away
	}
}

// here begins what a client does while it is subscribed: from now on each event is due
// that is posted.
func (s *soak) here(c *soakClient, now time.Duration) {
	c.state = soakHere
	c.until = time.Duration(float64(c.habit.stays) * s.random.ExpFloat64())
	c.until += now + 5*time.Second
	c.pings = now + time.Duration(s.random.Int64N(int64(time.Second)))
	c.reads = now
	c.checks = now + time.Duration(s.random.Int64N(int64(5*time.Second)))
	for _, sub := range c.subscriptions {
		n := len(s.libraries[sub.library].events)
		sub.from, sub.last = n+1, n
	}
	if c.habit.crawls {
		c.pause(true)
	}
}

// live is tick for a client that is subscribed.
func (s *soak) live(c *soakClient, now time.Duration) {
	if c.desktop && now >= c.pings {
		c.pings += time.Second
		c.send(emptyPing)
	}
	if c.renews > 0 && now >= c.renews {
		s.renew(c, now)
	}
	if now >= c.checks {
		c.checks += 5 * time.Second
		s.check(c, now)
	}
	if s.draining.Load() {
		c.pause(false)
		return
	}
	if c.habit.pauses > 0 && now >= c.reads {
		c.pause(!c.paused)
		c.reads = now + 2*time.Second + time.Duration(s.random.Int64N(int64(c.habit.pauses)))
	}
	if c.habit.crawls && now >= c.reads {
		c.reads += time.Second
		c.receive(make([]byte, 256))
	}
	if c.state == soakHere && c.habit.stays > 0 && now >= c.until {
		s.leave(c, now)
	}
}

// leave ends a connection, in one of the ways in which clients do.
func (s *soak) leave(c *soakClient, now time.Duration) {
	s.check(c, now)
	switch {
	case c.habit.deaf && s.random.IntN(2) == 0:
		c.pause(true)
		c.state, c.until = soakDeaf, now+deafFor
	case c.habit.deaf || s.random.IntN(2) == 0:
		c.cut()
		c.state, c.until = soakAway, now+c.habit.away
	default:
		c.send(zeroMasked(opClose, []byte{1000 >> 8, 1000 & 0xff}))
		c.state, c.until = soakLeaving, now+soakGrace
	}
}

// renew subscribes anew where jwt-expired came 1.2 s ago or more, as the desktop client does.
func (s *soak) renew(c *soakClient, now time.Duration) {
	const takes = 1200 * time.Millisecond
	c.renews = 0
	expires := time.Now().Add(c.habit.token)
	var all []byte
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sub := range c.subscriptions {
		if sub.ignores == 0 {
			continue
		}
		if now < sub.ignores+takes {
			c.renews = now + takes/4
			continue
		}
		sub.ignores, sub.since, sub.expires = 0, now, expires
		all = append(all, subscribing(sub.library, "alice@example.com", expires)...)
		s.counts["renewals"]++
	}
	c.send(all)
}

// end is told that a connection ended.
func (s *soak) end(c *soakClient) {
	s.mu.Lock()
	defer s.mu.Unlock()
	cause := fmt.Sprintf("%s: %d %q", c.habit.name, c.status, c.reason)
	explained := false
	switch c.state {
	case soakLeaving:
		explained = true
		cause = ""
	case soakDeaf, soakWaking:
		explained = c.status == 0 || c.status == 1008 || c.status == 1013
	case soakHere:
		explained = c.habit.crawls && (c.status == 0 || c.status == 1013)
	}
	if !explained {
		s.fault("closed without cause", "%s in state %d: %d %q", c, c.state, c.status, c.reason)
	} else if cause != "" {
		s.counts["closed "+cause]++
	}
	c.state, c.until = soakAway, s.now()+c.habit.away
}

// frame is told of each frame that comes.
func (s *soak) frame(c *soakClient, opcode byte, payload []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if opcode == opPong && c.state == soakOpening && string(payload) == hereAgain {
		s.here(c, now)
	}
	if opcode != opText || c.state != soakOpening && c.state != soakHere {
		return
	}
	library, _ := number(payload, `"repo_id":"`, 8, 16)
	i, found := slices.BinarySearchFunc(c.subscriptions, library,
		func(sub *soakSubscription, library int) int { return sub.library - library })
	if !found {
		s.fault("unknown message", "%s got %.200q", c, payload)
		return
	}
	sub := c.subscriptions[i]
	if bytes.HasPrefix(payload, []byte(`{"type":"jwt-expired"`)) {
		s.expired(c, sub, now)
		return
	}
	n, isLock := number(payload, `"path":"/`, 8, 10)
	if !isLock {
		n, _ = number(payload, `"commit_id":"`, 40, 10)
	}
	lib := &s.libraries[library]
	if n < 1 || n > len(lib.events) || lib.events[n-1].update == isLock {
		s.fault("unknown message", "%s got %.200q", c, payload)
		return
	}
	s.event(c, sub, n, !isLock, now)
}

// expired begins a renewal: until the new subscription, the desktop client ignores all
// events of that library (measured). The end of the old token may be told while the new
// subscription is on its way.
func (s *soak) expired(c *soakClient, sub *soakSubscription, now time.Duration) {
	if time.Until(sub.expires) <= 15*time.Second {
		sub.crossed = 0
	} else if sub.crossed++; sub.crossed > 2 || now-sub.since > 20*time.Second {
		s.fault("good token refused", "%s, library %d, %v before its end",
			c, sub.library, time.Until(sub.expires))
	}
	if sub.ignores > 0 {
		return
	}
	sub.ignores, sub.ignored = now, now
	if c.renews == 0 {
		c.renews = now + 1200*time.Millisecond + time.Duration(s.random.Int64N(int64(700*time.Millisecond)))
	}
}

// event takes event n of a subscription, in the order in which events came.
func (s *soak) event(c *soakClient, sub *soakSubscription, n int, update bool, now time.Duration) {
	s.counts["events received"]++
	if sub.ignores > 0 {
		s.counts["events ignored during renewals"]++
		return
	}
	if update && n >= sub.update {
		sub.update = 0
	}
	renewed := sub.ignored > 0 && now-sub.since < 10*time.Second
	owed := slices.Index(sub.owed, n)
	switch {
	case sub.from == 0: // nothing is due yet
	case n > sub.last:
		s.skip(sub, n)
		if update {
			sub.update = 0
		}
		sub.last = n
	case owed >= 0:
		sub.owed = slices.Delete(sub.owed, owed, owed+1)
		if !renewed {
			s.fault("out of order", "%s got event %d of library %d after event %d",
				c, n, sub.library, sub.last)
		}
	case n < sub.from: // posted before it had subscribed
	default:
		s.counts["events repeated"]++
		if !renewed && !(c.desktop && update) {
			s.fault("told twice", "%s got event %d of library %d again, after event %d",
				c, n, sub.library, sub.last)
		}
	}
}

// skip notes the events between the last one and event n, which came or is due.
func (s *soak) skip(sub *soakSubscription, n int) {
	events := s.libraries[sub.library].events
	for k := max(sub.last+1, sub.from); k < n; k++ {
		if events[k-1].update {
			sub.update = k
		} else {
			sub.owed = append(sub.owed, k)
		}
	}
}

// check finds what is lost: posted, answered and due for soakGrace, and not received.
func (s *soak) check(c *soakClient, now time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sub := range c.subscriptions {
		lib := &s.libraries[sub.library]
		lib.settle(now)
		if c.habit.crawls && !s.draining.Load() || sub.ignores > 0 || now-sub.since < soakGrace {
			continue
		}
		if lib.settled > sub.last {
			s.skip(sub, lib.settled+1)
			sub.last = lib.settled
		}
		sub.owed = slices.DeleteFunc(sub.owed, func(n int) bool {
			if n <= lib.settled {
				s.lost(c, sub, n, now)
			}
			return n <= lib.settled
		})
		if sub.update > 0 && lib.newest <= lib.settled {
			s.lost(c, sub, sub.update, now)
			sub.update = 0
		}
	}
}

// settle counts the events that were answered more than soakGrace ago.
func (lib *soakLibrary) settle(now time.Duration) {
	for lib.settled < len(lib.events) {
		answered := lib.events[lib.settled].answered
		if answered == 0 || now-answered <= soakGrace {
			return
		}
		lib.settled++
	}
}

func (s *soak) lost(c *soakClient, sub *soakSubscription, n int, now time.Duration) {
	answered := s.libraries[sub.library].events[n-1].answered
	kind := "lost"
	if n < sub.from {
		kind = "not told to a new subscription"
	} else if sub.ignored > 0 && answered > sub.ignored-time.Second && answered < sub.since+time.Second {
		kind = "lost around a renewal"
		if sub.crossed > 0 {
			kind = "lost since a second jwt-expired crossed the renewal"
		}
	}
	s.fault(kind, "%s did not get event %d of library %d; ago are its answer: %v, "+
		"the subscription: %v, jwt-expired: %v",
		c, n, sub.library, now-answered, now-sub.since, now-sub.ignored)
}

// A soakSample is what the server took at a time.
type soakSample struct {
	at time.Duration
	footprint
}

// watch samples the server's footprint until the end, and prints a line each minute.
func (s *soak) watch(length time.Duration) (samples []soakSample) {
	line := min(time.Minute, length/6)
	s.t.Logf("%8s %8s %8s %8s %8s %8s %10s %10s %8s %8s", "time", "clients", "subscr.", "MiB",
		"gorout.", "posted", "received", "repeated", "answer", "faults")
	for next := line / 6; next < length; next += line / 6 {
		time.Sleep(next - s.now())
		samples = append(samples, soakSample{s.now(), s.m.footprint()})
		if len(samples)%6 == 0 {
			s.printLine(samples[len(samples)-1])
		}
	}
	cores := func(pid int) float64 { return cpuTime(s.t, pid).Seconds() / s.now().Seconds() }
	s.t.Logf("cores used: server %.2f, all clients and senders %.2f",
		cores(s.m.Process.Pid), cores(os.Getpid()))
	return samples
}

func (s *soak) printLine(at soakSample) {
	s.mu.Lock()
	defer s.mu.Unlock()
	faults := 0
	for _, n := range s.faults {
		faults += n
	}
	s.t.Logf("%8v %8.0f %8.0f %8.1f %8.0f %8d %10d %10d %8v %8d", at.at.Round(time.Second),
		at.connections, at.subscriptions, at.mib, at.goroutines, s.posted, s.counts["events received"],
		s.counts["events repeated"], s.longest.Round(100*time.Microsecond), faults)
	s.longest = 0
}

// report prints what happened, and fails the test if memory or goroutines have grown over
// the last two thirds of the time.
func (s *soak) report(samples []soakSample) {
	for _, name := range slices.Sorted(maps.Keys(s.counts)) {
		s.t.Logf("%10d %s", s.counts[name], name)
	}
	for _, kind := range slices.Sorted(maps.Keys(s.faults)) {
		s.t.Logf("%10d FAULTS: %s", s.faults[kind], kind)
	}
	s.flat("memory (MiB)", samples, 10, func(f soakSample) float64 { return f.mib })
	s.flat("goroutines", samples, 100, func(f soakSample) float64 { return f.goroutines })
}

// flat fits a line to the last two thirds of the samples. It may rise by a twentieth of
// their mean and by slack, since clients come and go by chance. In a run of less than 10
// minutes it is only printed.
func (s *soak) flat(what string, samples []soakSample, slack float64, value func(soakSample) float64) {
	s.t.Helper()
	samples = samples[len(samples)/3:]
	var times, values []float64
	mean := 0.0
	for _, sample := range samples {
		times = append(times, sample.at.Seconds())
		values = append(values, value(sample))
		mean += value(sample) / float64(len(samples))
	}
	growth := slope(times, values) * (times[len(times)-1] - times[0])
	s.t.Logf("%s over the last two thirds: %.1f on average, grown by %.1f", what, mean, growth)
	if growth > mean/20+slack && s.now() > 10*time.Minute { // sooner, all is still filling
		s.t.Errorf("%s: grown by %.1f over the last two thirds, %.1f on average", what, growth, mean)
	}
}
