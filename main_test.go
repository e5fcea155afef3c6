package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// ---- What the tests share ----

const (
	testKey = "e2e-shared-secret-0123456789abcdef0123456789" // the one that signed the captured tokens
	repoA   = "282be60e-4f81-4782-8b6a-9698382f7301"
	repoB   = "5f1c8d0e-0000-4000-8000-00000000000b"
	patient = 10 * time.Second // for what must come; a test that passes never waits so long
)

// TestMain runs the server instead of the tests where a test starts its own
// binary, with a clock that does what that test needs (see startSelf).
func TestMain(m *testing.M) {
	if fault := os.Getenv("TEST_CLOCK"); fault != "" {
		os.Exit(run(os.Args[1:], os.Getenv, os.Stdout, os.Stderr, faultyClock(fault)))
	}
	code := m.Run()
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

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
	return signToken(testKey, `{"alg":"HS256","typ":"JWT"}`, fmt.Sprintf(`{"exp":%d,"repo_id":%q,"username":%q}`, exp.Unix(), repoID, user))
}

// eventToken is seaf-server's; it expires at exp.
func eventToken(exp time.Time) string {
	return signToken(testKey, `{"alg":"HS256","typ":"JWT"}`, fmt.Sprintf(`{"exp":%d}`, exp.Unix()))
}

// later is when tokens expire that are not to expire in a test.
func later() time.Time { return time.Now().Add(72 * time.Hour) }

func update(repoID, commit string) string {
	return fmt.Sprintf(`{"type":"repo-update","content":{"repo_id":%q,"commit_id":%q}}`, repoID, commit)
}

// A fakeClock stands still until it is moved.
type fakeClock struct {
	mu     sync.Mutex
	now    time.Time
	uptime time.Duration
}

func (f *fakeClock) clock() clock {
	return clock{
		wall:   func() time.Time { f.mu.Lock(); defer f.mu.Unlock(); return f.now },
		uptime: func() time.Duration { f.mu.Lock(); defer f.mu.Unlock(); return f.uptime },
	}
}

// advance moves both times.
func (f *fakeClock) advance(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now, f.uptime = f.now.Add(d), f.uptime+d
}

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

// A testServer is a server in this process, with a clock that stands still and
// a log at debug level. Its sweep runs only when a test calls it.
type testServer struct {
	*server
	t    testing.TB
	addr string
	time *fakeClock
	out  *syncBuffer
	dir  string // where seafile.sock is looked for
}

func startServer(t testing.TB) *testServer {
	t.Helper()
	ts := &testServer{t: t, time: &fakeClock{now: time.Now(), uptime: time.Hour}, out: &syncBuffer{}, dir: t.TempDir()}
	lg := openLog("-", false, io.Discard, ts.out)
	lg.level = slog.LevelDebug
	cfg := &config{key: []byte(testKey), sockets: []string{filepath.Join(ts.dir, "seafile.sock")}}
	ts.server = newServer(cfg, lg, ts.time.clock())
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ts.addr = ln.Addr().String()
	go ts.http.Serve(ln)
	t.Cleanup(func() { ts.shutdown() })
	return ts
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

// A client is a WebSocket client that can also do what it must not.
type client struct {
	t     testing.TB
	nc    net.Conn
	br    *bufio.Reader
	reply *http.Response // to the upgrade
}

const (
	asDesktop = "Sec-WebSocket-Protocol: notification.seafile.com\r\nuser-agent: Seafile/9.0.20 (Linux)\r\n"
	asBrowser = "Origin: https://cloud.example.com\r\nSec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
)

// upgrade sends a client's upgrade with further header lines, and returns the answer.
func upgrade(t testing.TB, addr, path, lines string) *client {
	t.Helper()
	nc, err := net.DialTimeout("tcp", addr, patient)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(6 * patient))
	fmt.Fprintf(nc, "GET %s HTTP/1.1\r\nHost: %s\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: Z5CJw/U24zCyiSivhdDLtQ==\r\n%s\r\n", path, addr, lines)
	c := &client{t: t, nc: nc, br: bufio.NewReader(nc)}
	if c.reply, err = http.ReadResponse(c.br, nil); err != nil {
		t.Fatalf("no answer to the upgrade: %v", err)
	}
	return c
}

// connect is upgrade for a client that must get in.
func connect(t testing.TB, addr, lines string) *client {
	t.Helper()
	return connectTo(t, addr, "/", lines)
}

func connectTo(t testing.TB, addr, path, lines string) *client {
	t.Helper()
	c := upgrade(t, addr, path, lines)
	if c.reply.StatusCode != http.StatusSwitchingProtocols || c.reply.Header.Get("Sec-WebSocket-Accept") != "eC4Me9XdMtQl+H6OvANcgSxr5bI=" {
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
func (c *client) write(p []byte) { c.nc.Write(p) }

func (c *client) text(s string) { c.write(maskedFrame(0x80|opText, []byte(s))) }

// read returns the next frame; a server's is whole and unmasked.
func (c *client) read() (opcode byte, payload []byte, err error) {
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

// expect reads the next frame, which must be this one.
func (c *client) expect(opcode byte, payload string) {
	c.t.Helper()
	c.nc.SetReadDeadline(time.Now().Add(patient))
	got, text, err := c.read()
	if err != nil || got != opcode || string(text) != payload {
		c.t.Fatalf("got frame %d %.300q (%v), want %d %.300q", got, text, err, opcode, payload)
	}
}

// expectClose reads until the close frame, which must have this status; it
// answers it, and then the connection must end. It returns the reason.
func (c *client) expectClose(status int) string {
	c.t.Helper()
	c.nc.SetReadDeadline(time.Now().Add(patient))
	for {
		opcode, payload, err := c.read()
		if err != nil {
			c.t.Fatalf("the connection ended without a close frame: %v", err)
		}
		if opcode != opClose {
			continue
		}
		got := statusNo
		if len(payload) >= 2 {
			got = int(binary.BigEndian.Uint16(payload))
		}
		if got != status {
			c.t.Fatalf("closed with %d %q, want %d", got, payload, status)
		}
		c.write(maskedFrame(0x80|opClose, payload))
		if _, err := c.br.ReadByte(); err == nil {
			c.t.Fatal("something came behind the close frame")
		}
		return string(payload[min(2, len(payload)):])
	}
}

// sync returns when the server has handled all that was sent before. Nothing
// but the answer may come.
func (c *client) sync() {
	c.t.Helper()
	c.write(maskedFrame(0x80|opPing, []byte("sync")))
	c.expect(opPong, "sync")
}

func (c *client) subscribe(repoID, token string) {
	c.t.Helper()
	c.text(fmt.Sprintf(`{"type":"subscribe","content":{"repos":[{"id":%q,"jwt_token":%q}]}}`, repoID, token))
}

// subscribed subscribes as user and waits until that holds.
func (c *client) subscribed(repoID, user string) *client {
	c.t.Helper()
	c.subscribe(repoID, clientToken(repoID, user, later()))
	c.sync()
	return c
}

// expired is what a client gets whose token does not hold.
func expiredText(repoID string) string {
	return fmt.Sprintf(`{"type":"jwt-expired","content":{"repo_id":%q}}`, repoID)
}

// request sends a request with header lines "Name: value", and returns status and body.
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

// post posts an event as seaf-server does; it must be accepted for so many subscribers.
func post(t testing.TB, addr, body string, subscribers int) {
	t.Helper()
	answer, text := request(t, "POST", "http://"+addr+"/events", body, "Authorization: Token "+eventToken(later()))
	if want := fmt.Sprintf(`{"subscribers":%d}`, subscribers); answer.StatusCode != 200 || strings.TrimSpace(text) != want {
		t.Fatalf("event answered %d %q, want 200 %s", answer.StatusCode, text, want)
	}
}

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
		info, _ := debug.ReadBuildInfo()
		for _, s := range info.Settings {
			if s.Key == "-race" && s.Value == "true" {
				args = append(args, "-race")
			}
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

// freePort returns a port of 127.0.0.1 that nobody listens on.
func freePort(t testing.TB) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	return port
}

// writeConfig makes a directory with a seafile.conf for the given port, the key
// of the tests, and further lines of the section.
func writeConfig(t testing.TB, port string, lines ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "conf") // seafile.sock is looked for beside it
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("[notification]\nenabled = true\nhost = 127.0.0.1\nport = %s\njwt_private_key = %s\n%s\n", port, testKey, strings.Join(lines, "\n"))
	if err := os.WriteFile(filepath.Join(dir, "seafile.conf"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
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
	p := &process{Cmd: exec.Command(name, args...), t: t, out: &syncBuffer{}, done: make(chan error, 1)}
	p.Env = append(os.Environ(), env...)
	p.Stdout, p.Stderr = p.out, p.out
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

// startBinary starts the real binary and waits until it answers /ping on 127.0.0.1:port.
func startBinary(t testing.TB, port string, env []string, args ...string) *process {
	t.Helper()
	p := start(t, env, buildBinary(t), args...)
	p.waitPing("127.0.0.1:" + port)
	return p
}

func (p *process) waitPing(addr string) {
	p.t.Helper()
	waitFor(p.t, "the server answers on "+addr+"; output: "+p.out.String(), func() bool { return pings(addr) })
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

// terminate sends SIGTERM and returns the exit status.
func (p *process) terminate() int {
	p.t.Helper()
	p.Process.Signal(syscall.SIGTERM)
	return p.wait()
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
	t.Cleanup(func() { ln.Close() })
	ss := &seafServer{ln: ln, requests: make(chan string, 100)}
	go func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer nc.Close()
				var size uint32
				if binary.Read(nc, binary.LittleEndian, &size) != nil || size > 1<<20 {
					return
				}
				request := make([]byte, size)
				if _, err := io.ReadFull(nc, request); err == nil {
					ss.requests <- string(request)
					reply(nc)
				}
			}()
		}
	}()
	return ss
}

// rpcReply is the reply that carries a JSON text.
func rpcReply(text string) func(net.Conn) {
	return func(nc net.Conn) {
		nc.Write(append(binary.LittleEndian.AppendUint32(nil, uint32(len(text))), text...))
	}
}

// faultyClock is the clock of a server that a test started as startSelf(t, fault, ...).
func faultyClock(fault string) clock {
	start := time.Now()
	clk := clock{wall: time.Now, uptime: func() time.Duration { return time.Since(start) }}
	return clk
}

var _ = errors.New
var _ = json.Valid

func TestSmoke(t *testing.T) {
	s := startServer(t)
	c := connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com")
	post(t, s.addr, update(repoA, "1"), 1)
	c.expect(opText, update(repoA, "1"))
}
