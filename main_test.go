package main

import (
	"bufio"
	"bytes"
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
	"html/template"
	"io"
	"log/slog"
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
	"path/filepath"
	"reflect"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/net/websocket"
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
	flag.Set("test.parallel", "8")           // most tests wait more than they work
	os.Setenv("GORACE", "atexit_sleep_ms=0") // for the binaries that tests start
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
func (f *fakeClock) advance(d time.Duration) { f.move(d, d) }

// move moves each time on its own.
func (f *fakeClock) move(wall, uptime time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now, f.uptime = f.now.Add(wall), f.uptime+uptime
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

// advance lets time pass and sweeps. It waits first until nothing is being
// written, which would look like a client that is stuck.
func (ts *testServer) advance(d time.Duration) {
	ts.t.Helper()
	waitFor(ts.t, "all is written", func() bool {
		ts.mu.Lock()
		defer ts.mu.Unlock()
		for c := range ts.conns {
			if c.writing.Load() != 0 {
				return false
			}
		}
		return true
	})
	ts.time.move(d, d)
	ts.sweep()
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
	return launch(t, env, exec.Command(name, args...))
}

func launch(t testing.TB, env []string, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{Cmd: cmd, t: t, out: &syncBuffer{}, done: make(chan error, 1)}
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

// ---- Command line, configuration, HTTP, tokens, subscriptions, WebSocket ----

// ---- Captured from Seafile's own programs ----

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

// ---- What these tests share ----

// crlf gives a captured text the line ends that it has on the wire.
func crlf(s string) string {
	head, body, _ := strings.Cut(s, "\n\n")
	return strings.ReplaceAll(head, "\n", "\r\n") + "\r\n\r\n" + body
}

// loggedServer is startServer for a test at the end of which the log must be
// well-formed and without a secret. It runs at debug level.
func loggedServer(t testing.TB) *testServer {
	t.Helper()
	s := startServer(t)
	t.Cleanup(func() { checkLog(t, s.out.String(), "") })
	return s
}

var logLine = regexp.MustCompile(`^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] \[(DEBUG|INFO|WARNING|ERROR)\] \S.*$`)

// checkLog checks the form of each line of a log, and that neither a token nor a key is in it.
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

// setWall sets the time of day by which tokens run out.
func (f *fakeClock) setWall(unix float64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now = time.UnixMicro(int64(unix * 1e6))
}

// runOnce runs the real binary until it ends by itself.
func runOnce(t testing.TB, env []string, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	cmd := exec.Command(buildBinary(t), args...)
	cmd.Env = append(append(os.Environ(), "GORACE=atexit_sleep_ms=0"), env...) // with -race it would take 1 s to end
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	stop := time.AfterFunc(patient, func() { cmd.Process.Kill() })
	defer stop.Stop()
	if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

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

// withinOnce demands that f takes less than limit at least once in five times:
// others use this machine, too.
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

// rawRequest sends bytes as they are, in so many segments, and returns the answer.
func rawRequest(t testing.TB, addr string, segments ...string) (*http.Response, string) {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(patient))
	for _, s := range segments {
		io.WriteString(nc, s)
	}
	answer, err := http.ReadResponse(bufio.NewReader(nc), nil)
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

// rawUpgrade is upgrade with a request, and what follows it, as it is given.
func rawUpgrade(t testing.TB, addr, text string) *client {
	t.Helper()
	c := rawConn(t, addr)
	c.nc.SetDeadline(time.Now().Add(6 * patient))
	io.WriteString(c.nc, text)
	var err error
	if c.reply, err = http.ReadResponse(c.br, nil); err != nil {
		t.Fatal(err)
	}
	return c
}

// lockPosted is an event that no newer one replaces.
func lockPosted(repoID, path string) string {
	return fmt.Sprintf(`{"type":"file-lock-changed","content":{"repo_id":%q,"path":%q,"change_event":"locked","lock_user":"bob@example.com"}}`, repoID, path)
}

func permEvent(kind, user, group string) string {
	return fmt.Sprintf(`{"type":"folder-perm-changed","content":{"repo_id":%q,"path":"/a","type":%q,"change_event":"add","user":%q,"group":%s,"perm":"rw"}}`, repoA, kind, user, group)
}

// ---- Command line ----

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
			if status != c.status || !regexp.MustCompile(c.stdout).MatchString(stdout) || !regexp.MustCompile(c.stderr).MatchString(stderr) {
				t.Errorf("%q: exit %d, standard output %q, standard error %q; want %d, %s, %s", c.args, status, stdout, stderr, c.status, c.stdout, c.stderr)
			}
		})
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

// ---- Configuration ----

func TestConfigValues(t *testing.T) {
	t.Parallel()
	const good = "0123456789abcdef0123456789abcdef"
	for _, c := range []struct{ name, text, want string }{
		{"plain", "[notification]\njwt_private_key = k\n", "k"},
		{"no space", "[notification]\njwt_private_key=k", "k"},
		{"white space around", "[notification]\n\t jwt_private_key \t=\t k \t\n", "k"},
		{"number sign", "[notification]\njwt_private_key = a#b #c\n", "a#b #c"},
		{"begins with a number sign", "[notification]\njwt_private_key = #a\n", "#a"},
		{"semicolon", "[notification]\njwt_private_key = a;b ;c\n", "a;b ;c"},
		{"equals", "[notification]\njwt_private_key = =a=b==\n", "=a=b=="},
		{"quotes", "[notification]\njwt_private_key = \"a'b\"\n", `"a'b"`},
		{"inner spaces", "[notification]\njwt_private_key = a  b\tc\n", "a  b\tc"},
		{"brackets", "[notification]\njwt_private_key = [a]\n", "[a]"},
		{"percent, dollar, backslash", "[notification]\njwt_private_key = %(a)s$b\\n\\\n", `%(a)s$b\n\`},
		{"not ASCII", "[notification]\njwt_private_key = schlüssel\n", "schlüssel"},
		{"CRLF", "[notification]\r\n# c\r\n\r\njwt_private_key = k\r\n", "k"},
		{"byte-order mark", "\ufeff[notification]\njwt_private_key = k\n", "k"},
		{"comments", "[notification]\n# jwt_private_key = a\n; jwt_private_key = b\n  # c\njwt_private_key = k\n #jwt_private_key = d", "k"},
		{"the last counts", "[notification]\njwt_private_key = a\njwt_private_key = k\n", "k"},
		{"the last section counts", "[notification]\njwt_private_key = a\n[x]\njwt_private_key = b\n[notification]\njwt_private_key = k\n", "k"},
		{"unknown key", "[notification]\nnew_in_14 = x\njwt_private_key = k\n", "k"},
		{"other sections", "nonsense before\n[database]\njwt_private_key = b\nno key at all\n=\n[fileserver\n[notification]\njwt_private_key = k\n[zz]\nnonsense\n[broken", "k"},
		{"spaces in the header", "[ notification ]\njwt_private_key = k\n", "k"},
		{"not ours", "[notification2]\njwt_private_key = k\n", ""},
	} {
		got, err := parsedConfig("seafile.conf", c.text)
		if err != nil || got["jwt_private_key"].value != c.want {
			t.Errorf("%s: %q gives %q, %v; want %q", c.name, c.text, got["jwt_private_key"].value, err, c.want)
		}
	}
	none := func(string) string { return "" }
	cfg := loadConfig(confDir(t, "[notification]\njwt_private_key = "+good+"\n"), none)
	if !cfg.enabled || cfg.host != "0.0.0.0" || cfg.port != "8083" || cfg.level != slog.LevelInfo || string(cfg.key) != good || len(cfg.warnings) != 0 {
		t.Errorf("defaults: %+v", cfg)
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
		{"neither key nor comment", ok + secret + "\n", nil, `seafile\.conf:3: .*comment.*(correct|remove)`},
		{"no key before the =", ok + "\n= " + secret, nil, `seafile\.conf:4: .*comment.*(correct|remove)`},
		{"CRLF counts lines alike", strings.ReplaceAll(ok, "\n", "\r\n") + "\r\n" + secret, nil, `seafile\.conf:4: `},
		{"our header without bracket", "# c\n[notification\njwt_private_key = " + secret + "\n", nil, `seafile\.conf:2: .*bracket.*\[notification\]`},
		{"our header with a space and without bracket", "[ notification\njwt_private_key = " + secret + "\n", nil, `seafile\.conf:1: .*bracket.*\[notification\]`},
		{"next header without bracket", ok + "[" + secret + "\n", nil, `seafile\.conf:3: .*bracket`},
		{"no section", "[database]\nx = y\n", nil, noKey},
		{"no key", "[notification]\nenabled = true\n", nil, noKey},
		{"key without value", "[notification]\njwt_private_key =\n", nil, noKey},
		{"empty variable", "[notification]\n", []string{"JWT_PRIVATE_KEY="}, noKey},
		{"port 0", ok + "port = 0\n", nil, `seafile\.conf:3: port .*1 to 65535.*"0"`},
		{"port 65536", ok + "port = 65536\n", nil, `seafile\.conf:3: port .*1 to 65535`},
		{"port negative", ok + "port = -1\n", nil, `seafile\.conf:3: port .*1 to 65535`},
		{"port word", ok + "port = http\n", nil, `seafile\.conf:3: port .*1 to 65535`},
		{"port with comment", ok + "port = 8083 # the port\n", nil, `seafile\.conf:3: port .*1 to 65535`},
		{"port of the environment", ok, []string{"NOTIFICATION_SERVER_PORT=x"}, `NOTIFICATION_SERVER_PORT: port .*1 to 65535`},
		{"enabled", ok + "enabled = maybe\n", nil, `seafile\.conf:3: enabled must be true or false`},
		{"port in use", ok + "host = 127.0.0.1\nport = " + port + "\n", nil, port + `.*(stop it|change port)`},
		{"no such address", ok + "host = 192.0.2.1\nport = " + port + "\n", nil, `192\.0\.2\.1.*host`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := confDir(t, c.text)
			log := filepath.Join(dir, "log")
			var status int
			var stderr string
			withinOnce(t, time.Second, func() { status, _, stderr = runOnce(t, c.env, "-c", dir) })
			if status != 1 || !regexp.MustCompile(c.want).MatchString(stderr) {
				t.Errorf("exit %d, %q; want 1, %s", status, stderr, c.want)
			}
			if strings.Contains(stderr, "goroutine") || strings.Contains(stderr, secret) || strings.Count(stderr, "\n") != 1 {
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
		{"no such directory, key in the environment", absent, []string{"JWT_PRIVATE_KEY=" + testKey}, absent + `.*directory.*-c`},
		{"no file", t.TempDir(), nil, `seafile\.conf.*JWT_PRIVATE_KEY`},
	} {
		status, _, stderr := runOnce(t, c.env, "-c", c.path)
		if status != 1 || !regexp.MustCompile(c.want).MatchString(stderr) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: exit %d, %q; want 1, %s", c.name, status, stderr, c.want)
		}
	}
}

func TestDisabled(t *testing.T) {
	t.Parallel()
	for _, value := range []string{"false", "False", "FALSE"} {
		dir := confDir(t, "[notification]\nenabled = "+value+"\n") // and no key
		status, _, stderr := runOnce(t, nil, "-c", dir)
		if status != 0 || !strings.Contains(stderr, "disabled in "+filepath.Join(dir, "seafile.conf")) {
			t.Errorf("enabled = %s: exit %d, %q", value, status, stderr)
		}
	}
}

// The environment comes before the file, and an empty variable counts as unset.
func TestEnvironment(t *testing.T) {
	t.Parallel()
	const envKey = "another key, of the environment, # with all; \"sorts\" = of characters"
	event := func(t *testing.T, port, key string) int {
		answer, _ := request(t, "POST", "http://127.0.0.1:"+port+"/events", update(repoA, "1"), "Authorization: Token "+signToken(key, `{"alg":"HS256"}`, `{"exp":4102444800}`))
		return answer.StatusCode
	}
	t.Run("set", func(t *testing.T) {
		t.Parallel()
		filePort, port := freePort(t), freePort(t)
		dir := confDir(t, fmt.Sprintf("[notification]\nhost = 192.0.2.1\nport = %s\nlog_level = error\njwt_private_key = %s\n", filePort, testKey))
		p := startBinary(t, port, []string{"NOTIFICATION_SERVER_HOST=127.0.0.1", "NOTIFICATION_SERVER_PORT=" + port, "NOTIFICATION_SERVER_LOG_LEVEL=debug", "JWT_PRIVATE_KEY=" + envKey}, "-c", dir)
		if got := event(t, port, envKey); got != 200 {
			t.Errorf("an event with the key of the environment is answered %d", got)
		}
		if got := event(t, port, testKey); got != 401 {
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
		p := startBinary(t, port, []string{"NOTIFICATION_SERVER_HOST=", "NOTIFICATION_SERVER_PORT=", "NOTIFICATION_SERVER_LOG_LEVEL=", "JWT_PRIVATE_KEY=", "SEAFILE_RPC_PIPE_PATH=", "SEAFILE_LOG_TO_STDOUT="}, "-c", writeConfig(t, port))
		if got := event(t, port, testKey); got != 200 {
			t.Errorf("an event with the key of the file is answered %d", got)
		}
		p.terminate()
	})
	t.Run("no file", func(t *testing.T) { // as in Seafile 12 and later
		t.Parallel()
		port := freePort(t)
		dir := t.TempDir()
		p := startBinary(t, port, []string{"NOTIFICATION_SERVER_HOST=127.0.0.1", "NOTIFICATION_SERVER_PORT=" + port, "JWT_PRIVATE_KEY=" + testKey, "SEAFILE_LOG_TO_STDOUT=true"}, "-c", dir)
		if got := event(t, port, testKey); got != 200 {
			t.Errorf("an event is answered %d", got)
		}
		if status := p.terminate(); status != 0 {
			t.Errorf("exit %d", status)
		}
		checkLog(t, p.out.String(), "[notification-server] ")
		if log := p.out.String(); !strings.Contains(log, "no file") || !strings.Contains(log, "JWT_PRIVATE_KEY") {
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
			answer, _ := request(t, "POST", "http://127.0.0.1:"+port+"/events", update(repoA, "1"), "Authorization: Token "+signToken("M@O8VWUb81YvmtWLHGB2I_V7di5-@0p(MF*GrE!sIws23F", `{"alg":"HS256"}`, `{"exp":4102444800}`))
			if answer.StatusCode != 200 {
				t.Errorf("an event is answered %s", answer.Status)
			}
			if status := p.terminate(); status != 0 {
				t.Errorf("exit %d", status)
			}
			checkLog(t, p.out.String(), "")
			if !regexp.MustCompile(`\[WARNING\].*manual.*openssl rand -base64 32`).MatchString(p.out.String()) {
				t.Errorf("no warning of the published key: %s", p.out)
			}
		})
	}
}

func TestKeyWarnings(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, key, want string }{
		{"short", "0123456789abcdef0123456789abcde", `\[WARNING\] .*seafile\.conf:2: .*shorter than 32 bytes.*openssl`},
		{"long enough", "0123456789abcdef0123456789abcdef", ""},
		{"the manual's", "M@O8VWUb81YvmtWLHGB2I_V7di5-@0p(MF*GrE!sIws23F", `\[WARNING\] .*seafile\.conf:2: .*manual.*forge.*openssl`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			port := freePort(t)
			p := startBinary(t, port, nil, "-c", confDir(t, "[notification]\njwt_private_key = "+c.key+"\nlog_level = error\nhost = 127.0.0.1\nport = "+port+"\n"))
			p.terminate()
			log := p.out.String()
			if strings.Contains(log, "WARNING") != (c.want != "") || !regexp.MustCompile(c.want).MatchString(log) || strings.Contains(log, c.key) {
				t.Errorf("log %q, want %q", log, c.want)
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

// ---- HTTP ----

// The main job on what was captured: upgrade, subscribe and event lead to the
// delivery, and nothing else comes.
func TestCapturedTraffic(t *testing.T) {
	t.Parallel()
	for _, u := range []struct{ name, text, accept string }{
		{"behind nginx", upgradeBehindNginx, "eC4Me9XdMtQl+H6OvANcgSxr5bI="},
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
				if h := c.reply.Header; c.reply.StatusCode != 101 || h.Get("Sec-WebSocket-Accept") != u.accept || h.Get("Sec-WebSocket-Protocol") != "notification.seafile.com" {
					t.Fatalf("upgrade answered %s %v", c.reply.Status, h)
				}
				c.expect(opPong, "")
				c.sync()
				head, body, _ := strings.Cut(crlf(e.text), "\r\n\r\n")
				answer, text := rawRequest(t, s.addr, head+"\r\n\r\n", body)
				if answer.StatusCode != 200 || strings.TrimSpace(text) != `{"subscribers":1}` || answer.Header.Get("Content-Type") != "application/json" {
					t.Errorf("event answered %s %q %v", answer.Status, text, answer.Header)
				}
				c.expect(opText, body)
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

// Each row of the table in PROTOCOL.md, section 4, and what else proxies make of the paths.
func TestPaths(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	const host = "Host: 127.0.0.1:8083\r\n"
	ping := func(first, lines string) string { return "GET " + first + "\r\n" + host + lines + "\r\n" }
	for _, c := range []struct{ name, request string }{
		{"direct", ping("/ping HTTP/1.1", "")},
		{"nginx as in the manual", ping("/ping HTTP/1.0", "Connection: close\r\n")},
		{"HTTP/1.0 without any header", "GET /ping HTTP/1.0\r\n\r\n"},
		{"nginx as in the current manual", ping("/notification/ping HTTP/1.1", "Connection: upgrade\r\n")},
		{"nginx, empty Upgrade", ping("/notification/ping HTTP/1.1", "Connection: upgrade\r\nUpgrade: \r\n")},
		{"Apache", ping("/ping/ HTTP/1.1", "")},
		{"HAProxy", ping("/notification/ping HTTP/1.1", "X-Forwarded-For: 10.0.0.1\r\n")},
		{"slashes", ping("//notification//ping// HTTP/1.1", "")},
		{"two slashes", ping("//ping HTTP/1.1", "")},
		{"query", ping("/ping?a=b HTTP/1.1", "")},
	} {
		for _, method := range []string{"GET", "HEAD"} {
			text := strings.Replace(c.request, "GET", method, 1)
			if method == "HEAD" { // a HEAD has no body, and http.ReadResponse does not know that it is one
				nc, err := net.Dial("tcp", s.addr)
				if err != nil {
					t.Fatal(err)
				}
				io.WriteString(nc, text)
				nc.SetDeadline(time.Now().Add(patient))
				answer, err := http.ReadResponse(bufio.NewReader(nc), &http.Request{Method: "HEAD"})
				nc.Close()
				if err != nil || answer.StatusCode != 200 || answer.Header.Get("Content-Type") != "application/json" {
					t.Errorf("%s: HEAD answered %v, %v", c.name, answer, err)
				}
				continue
			}
			answer, body := rawRequest(t, s.addr, text)
			if answer.StatusCode != 200 || strings.TrimSpace(body) != `{"ret": "pong"}` || answer.Header.Get("Content-Type") != "application/json" {
				t.Errorf("%s: %q answered %s %q", c.name, text, answer.Status, body)
			}
		}
	}
	for _, path := range []string{"/", "//", "/notification", "/notification/", "//notification//", "/?x=y"} {
		if c := connectTo(t, s.addr, path, asDesktop); c.reply.StatusCode != 101 {
			t.Errorf("upgrade of %s answered %s", path, c.reply.Status)
		}
	}
	for _, path := range []string{"/events", "//events", "/notification/events", "/events/", "//notification//events"} {
		answer, body := request(t, "POST", "http://"+s.addr+path, update(repoA, "1"), "Authorization: Token "+eventToken(later()))
		if answer.StatusCode != 200 {
			t.Errorf("event at %s answered %s %q", path, answer.Status, body)
		}
		answer, body = rawRequest(t, s.addr, fmt.Sprintf("POST %s HTTP/1.0\r\nConnection: close\r\nAuthorization: Token %s\r\nContent-Length: %d\r\n\r\n", path, eventToken(later()), len(update(repoA, "1"))), update(repoA, "1"))
		if answer.StatusCode != 200 {
			t.Errorf("event by HTTP/1.0 at %s answered %s %q", path, answer.Status, body)
		}
	}
	for _, path := range []string{"/x", "/pings", "/ping/x", "/x/ping", "/notifications", "/notification/x", "/notification/notification/ping", "/events/x", "/Ping", "/favicon.ico", "/metrics"} {
		if answer, _ := request(t, "GET", "http://"+s.addr+path, ""); answer.StatusCode != 404 {
			t.Errorf("%s answered %s", path, answer.Status)
		}
	}
	nc, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	io.WriteString(nc, "OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	if answer, _ := io.ReadAll(nc); !strings.HasPrefix(string(answer), "HTTP/1.1 404 ") {
		t.Errorf("OPTIONS * is answered %q", answer)
	}
	for path, allow := range map[string]string{"/ping": "GET, HEAD", "/events": "POST", "/": "GET, HEAD"} {
		for _, method := range []string{"GET", "POST", "PUT", "DELETE", "OPTIONS"} {
			if strings.Contains(allow, method) {
				continue
			}
			if answer, _ := request(t, method, "http://"+s.addr+path, "{}"); answer.StatusCode != 405 || answer.Header.Get("Allow") != allow {
				t.Errorf("%s %s answered %s, Allow %q", method, path, answer.Status, answer.Header.Get("Allow"))
			}
		}
	}
}

// Without an upgrade that can be made, a sentence says what this is.
func TestUpgradeRequired(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	const key, version = "Sec-WebSocket-Key: Z5CJw/U24zCyiSivhdDLtQ==\r\n", "Sec-WebSocket-Version: 13\r\n"
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
		{"HTTP/1.0", "GET / HTTP/1.0", "Connection: upgrade\r\nUpgrade: websocket\r\n" + key + version, 426, "HTTP/1.1"},
		{"old version", "GET / HTTP/1.1", "Connection: upgrade\r\nUpgrade: websocket\r\n" + key + "Sec-WebSocket-Version: 8\r\n", 426, "13"},
		{"no key", "GET / HTTP/1.1", "Connection: upgrade\r\nUpgrade: websocket\r\n" + version, 400, "Sec-WebSocket-Key"},
		{"short key", "GET / HTTP/1.1", "Connection: upgrade\r\nUpgrade: websocket\r\n" + version + "Sec-WebSocket-Key: aaaa\r\n", 400, "Sec-WebSocket-Key"},
		{"two lines, other case", "GET / HTTP/1.1", "Connection: keep-alive\r\nConnection: foo, UPGRADE\r\nUpgrade: WebSocket\r\n" + key + version, 101, ""},
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

func TestEventAnswers(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	good := "Authorization: Token " + eventToken(later())
	token := func(claims string) string {
		return "Authorization: Token " + signToken(testKey, `{"alg":"HS256"}`, claims)
	}
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
		{"good, 10.x", "Seafile-Repo-Token: " + eventToken(later()), ok, 200, `{"subscribers":0}`},
		{"good, of the Go file server", token(`{"exp":4102444800,"repo_id":"` + repoA + `","username":""}`), ok, 200, "subscribers"},
		{"good, comment", good, `{"type":"comment-update","content":{"repo_id":"x","type":"comment_updated","file_uuid":"u","file_path":"/f"}}`, 200, "subscribers"},
		{"good, lock", good, lockPosted(repoA, "/f"), 200, "subscribers"},
		{"good, white space around", good, "\r\n " + ok + "\n", 200, "subscribers"},
		{"good, 1 MiB", good, ok + strings.Repeat(" ", 1<<20-len(ok)), 200, "subscribers"},

		{"no token", "", ok, 401, "no token"},
		{"empty token", "Authorization: Token ", ok, 401, "no token"},
		{"other scheme", "Authorization: Bearer " + eventToken(later()), ok, 401, "no token"},
		{"malformed", "Authorization: Token x.y", ok, 401, "base64url"},
		{"wrong key", "Authorization: Token " + signToken("x", `{"alg":"HS256"}`, `{"exp":4102444800}`), ok, 401, "signature"},
		{"expired", "Authorization: Token " + eventToken(time.Now().Add(-time.Minute)), ok, 401, "expired"},
		{"no exp", token(`{}`), ok, 401, "exp"},
		{"alg none", "Authorization: Token eyJhbGciOiJub25lIn0.eyJleHAiOjQxMDI0NDQ4MDB9.", ok, 401, "HS256"},
		{"HS512", "Authorization: Token " + capturedHS512, ok, 401, "HS256"},
		{"token before body", "", "x", 401, "no token"},

		{"a client's", "Authorization: Token " + clientToken(repoA, "alice@example.com", later()), ok, 403, "client"},
		{"another library's", token(`{"exp":4102444800,"repo_id":"` + repoB + `","username":""}`), ok, 403, "another library"},

		{"over 1 MiB", good, ok + strings.Repeat(" ", 1<<20-len(ok)+1), 413, "1 MiB"},

		{"empty", good, "", 400, "JSON"},
		{"not JSON", good, "repo-update", 400, "JSON"},
		{"cut off", good, ok[:len(ok)-1], 400, "JSON"},
		{"trailing bytes", good, ok + "x", 400, "JSON"},
		{"two objects", good, ok + ok, 400, "JSON"},
		{"a NUL behind", good, ok + "\x00", 400, "JSON"},
		{"array", good, "[" + ok + "]", 400, "JSON object"},
		{"string", good, `"repo-update"`, 400, "JSON object"},
		{"null", good, "null", 400, "type"},
		{"no type", good, `{"content":{"repo_id":"x"}}`, 400, "type"},
		{"unknown type", good, `{"type":"repo-deleted\n","content":{"repo_id":"x"}}`, 400, `"repo-deleted\n"`},
		{"jwt-expired is ours", good, `{"type":"jwt-expired","content":{"repo_id":"x"}}`, 400, `"jwt-expired"`},
		{"type is a number", good, `{"type":1,"content":{"repo_id":"x"}}`, 400, "type"},
		{"no content", good, `{"type":"repo-update"}`, 400, "content"},
		{"content null", good, content(`null`), 400, "content"},
		{"content string", good, content(`"x"`), 400, "content"},
		{"content array", good, content(`[{"repo_id":"x"}]`), 400, "content"},
		{"content number", good, content(`7`), 400, "content"},
		{"no repo_id", good, content(`{"commit_id":"x"}`), 400, "repo_id"},
		{"empty repo_id", good, content(`{"repo_id":""}`), 400, "repo_id"},
		{"repo_id null", good, content(`{"repo_id":null}`), 400, "repo_id"},
		{"repo_id number", good, content(`{"repo_id":7}`), 400, "repo_id"},
		{"not UTF-8", good, content("{\"repo_id\":\"x\",\"path\":\"\xff\"}"), 400, "UTF-8"}, // a text frame could not carry it
		{"perm without user and group", good, perm(""), 400, "user"},
		{"perm of user, without user", good, permEvent("user", "", "-1"), 400, "user"},
		{"perm of user, but a group", good, permEvent("user", "", "1"), 400, "user"},
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
	if answer, _ := request(t, "POST", "http://"+s.addr+"/events", ok, "Authorization: Basic eDp5", "Seafile-Repo-Token: "+eventToken(later())); answer.StatusCode != 200 {
		t.Errorf("two headers: %s", answer.Status)
	}
	// A length that is not announced is limited, too.
	long := ok + strings.Repeat(" ", 1<<20-len(ok)+1)
	answer, _ := rawRequest(t, s.addr, fmt.Sprintf("POST /events HTTP/1.1\r\nHost: x\r\n%s\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", good, len(long), long))
	if answer.StatusCode != 413 {
		t.Errorf("chunked over 1 MiB: %s", answer.Status)
	}
}

// Two events come over one connection, as from the pools of seaf-server.
func TestKeepAlive(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	s.time.setWall(capturedEnd - 60)
	nc, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(patient))
	br := bufio.NewReader(nc)
	for _, text := range []string{eventFromC, eventFromGo, eventFromC} {
		io.WriteString(nc, crlf(text))
		answer, err := http.ReadResponse(br, nil)
		if err != nil || answer.StatusCode != 200 || answer.Close {
			t.Fatalf("answered %v, %v", answer, err)
		}
		io.Copy(io.Discard, answer.Body)
	}
	if d := s.http.IdleTimeout; d < 2*time.Minute || d > time.Hour { // libcurl keeps a connection for 118 s
		t.Errorf("an idle connection is kept for %v", d)
	}
}

// Who sends a header slowly, or a large one, is cut off.
func TestSlowHeader(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	large, _ := rawRequest(t, s.addr, "GET /ping HTTP/1.1\r\nHost: x\r\nX: "+strings.Repeat("x", 30<<10))
	if large.StatusCode != 431 {
		t.Errorf("a large header is answered %s", large.Status)
	}
	if testing.Short() && os.Getenv("CI") != "true" {
		t.Skip("takes 10 s")
	}
	nc, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	io.WriteString(nc, "GET /ping HTTP/1.1\r\nHost: x\r\nX: ")
	drip := time.NewTicker(200 * time.Millisecond) // never idle
	defer drip.Stop()
	go func() {
		for range drip.C {
			if _, err := io.WriteString(nc, "x"); err != nil {
				return
			}
		}
	}()
	nc.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.Copy(io.Discard, nc); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a slow header is not cut off within 20 s")
	}
}

// ---- Tokens ----

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
		}{{c.end - 86400, true}, {c.end - 0.5, true}, {c.end, false}, {c.end + 0.5, false}, {c.end + 1e7, false}} {
			s.time.setWall(at.time)
			cl, refused := s.verify(c.token)
			if want := c.good && at.live; (refused == nil) != want {
				t.Errorf("%s, %v s from its end: %+v, want good: %v", c.name, at.time-c.end, refused, want)
			} else if want && (cl.RepoID != c.repoID || cl.Username != c.user) {
				t.Errorf("%s: claims %+v", c.name, cl)
			}
		}
	}
}

func TestTokens(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	const now = 1795423000
	s.time.setWall(now)
	const header, claims = `{"alg":"HS256","typ":"JWT"}`, `{"exp":4102444800}`
	enc := base64.RawURLEncoding.EncodeToString
	with := func(claims string) string { return signToken(testKey, header, claims) }
	head := func(header string) string { return signToken(testKey, header, claims) }
	// text signs what need not be base64.
	text := func(headAndClaims string) string {
		mac := hmac.New(sha256.New, []byte(testKey))
		mac.Write([]byte(headAndClaims))
		return headAndClaims + "." + enc(mac.Sum(nil))
	}
	h, c := enc([]byte(header)), enc([]byte(claims))
	valid := text(h + "." + c)
	parts := strings.Split(valid, ".")
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
		{"fraction later", with(`{"exp":1795423000.5}`), ""},
		{"exponent", with(`{"exp":4.1e9}`), ""},
		{"nbf past", with(`{"exp":4102444800,"nbf":1795422999}`), ""},
		{"nbf now", with(`{"exp":4102444800,"nbf":1795423000}`), ""},
		{"unknown claims", with(`{"exp":4102444800,"iat":"x","aud":["y"]}`), ""},

		{"empty", "", "malformed"},
		{"dots", "..", "algorithm"},
		{"one part", h, "malformed"},
		{"two parts", h + "." + enc([]byte(claims)), "malformed"},
		{"four parts", valid + "." + h, "malformed"},
		{"a dot behind", valid + ".", "malformed"},
		{"padding", parts[0] + "." + parts[1] + "." + parts[2] + "=", "malformed"},
		{"padded and signed", text(base64.URLEncoding.EncodeToString([]byte(header+" ")) + "." + parts[1]), "malformed"},
		{"base64, not base64url", text(h + "." + base64.RawStdEncoding.EncodeToString([]byte(`{"exp":4102444800,"a":"???>>>~~~"}`))), "malformed"},
		{"newline", parts[0] + "." + parts[1] + "." + parts[2] + "\n", "malformed"},
		{"newline inside, signed", text(h[:8] + "\n" + h[8:] + "." + parts[1]), "malformed"},
		{"carriage return inside, signed", text(h + "." + parts[1][:8] + "\r" + parts[1][8:]), "malformed"},
		{"space", " " + valid, "malformed"},
		{"another writing of the same signature", valid[:len(valid)-1] + string("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"[strings.IndexByte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", valid[len(valid)-1])^1]), "malformed"},

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
		{"header is no object", head(`"HS256"`), "algorithm"},
		{"header is a list", head(`[{"alg":"HS256"}]`), "algorithm"},
		{"header is not JSON", head(`{"alg":"HS256"`), "algorithm"},
		{"bytes behind the header", head(`{"alg":"HS256"}x`), "algorithm"},

		{"no signature", parts[0] + "." + parts[1] + ".", "signature"},
		{"short signature", parts[0] + "." + parts[1] + "." + parts[2][:40], "signature"}, // 30 whole bytes
		{"long signature", text(h+"."+parts[1]) + "AAAA", "signature"},
		{"other key", signToken("other", header, claims), "signature"},
		{"empty key", signToken("", header, claims), "signature"},
		{"other claims", parts[0] + "." + enc([]byte(`{"exp":4102444801}`)) + "." + parts[2], "signature"},
		{"other header", enc([]byte(`{"alg":"HS256"}`)) + "." + parts[1] + "." + parts[2], "signature"},
		{"signature before claims", signToken("other", header, `{"exp":1}`), "signature"},
		{"signature before JSON", signToken("other", header, `{`), "signature"},

		{"no exp", with(`{}`), "malformed"},
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
		{"bytes behind the claims", with(`{"exp":4102444800}{}`), "malformed"},
		{"repo_id number", with(`{"exp":4102444800,"repo_id":7}`), "malformed"},
		{"username list", with(`{"exp":4102444800,"username":[]}`), "malformed"},
		{"exp now", with(`{"exp":1795423000}`), "expired"},
		{"fraction before", with(`{"exp":1795422999.5}`), "expired"},
		{"exp 0", with(`{"exp":0}`), "long-expired"},
		{"exp negative", with(`{"exp":-4102444800}`), "long-expired"},
		{"exp in milliseconds would be far", with(`{"exp":1.795}`), "long-expired"},
		{"nbf to come", with(`{"exp":4102444800,"nbf":1795423001}`), "not-yet"},
		{"nbf string", with(`{"exp":4102444800,"nbf":"1"}`), "malformed"},
	} {
		_, refused := s.verify(c.token)
		got := ""
		if refused != nil {
			got = refused.(*problem).reason
		}
		if got != c.reason {
			t.Errorf("%s: refused for %q, want %q", c.name, got, c.reason)
		}
	}
	// A subscription needs the token of that library.
	cl := connect(t, s.addr, asDesktop)
	for _, c := range []struct{ name, claims string }{
		{"none", `{"exp":4102444800,"username":"alice@example.com"}`},
		{"empty", `{"exp":4102444800,"repo_id":"","username":"alice@example.com"}`},
		{"another", `{"exp":4102444800,"repo_id":"` + repoB + `","username":"alice@example.com"}`},
		{"longer", `{"exp":4102444800,"repo_id":"` + repoA + `/","username":"alice@example.com"}`},
		{"upper case", `{"exp":4102444800,"repo_id":"` + strings.ToUpper(repoA) + `","username":"alice@example.com"}`},
	} {
		cl.subscribe(repoA, with(c.claims))
		cl.expect(opText, expiredText(repoA))
	}
	cl.sync()
}

// ---- Subscriptions and delivery ----

// An event comes as one text frame, compacted and otherwise as it was posted.
func TestFrameText(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	c := connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com")
	for _, e := range []struct{ name, body, want string }{
		{"as it is", update(repoA, "1"), update(repoA, "1")},
		{"compacted", "{ \"type\" :\t\"repo-update\",\r\n \"content\": { \"repo_id\" : \"" + repoA + "\", \"commit_id\": \"a  b\" } } ", update(repoA, "a  b")},
		{"content first", `{"content":{"repo_id":"` + repoA + `"},"type":"repo-update"}`, `{"type":"repo-update","content":{"repo_id":"` + repoA + `"}}`},
		{"unknown fields kept, outside ones dropped", `{"x":1,"type":"repo-update","content":{"b":[1.0, 1e2, -0],"repo_id":"` + repoA + `","a":{"z":null,"y":true}},"y":2}`,
			`{"type":"repo-update","content":{"b":[1.0,1e2,-0],"repo_id":"` + repoA + `","a":{"z":null,"y":true}}}`},
		{"escapes kept", `{"type":"repo-update","content":{"repo_id":"` + repoA + `","path":"/\u00e9\/é<>&\u2028 😀\ud83d\ude00\ud800 \"\\\n"}}`,
			`{"type":"repo-update","content":{"repo_id":"` + repoA + `","path":"/\u00e9\/é<>&\u2028 😀\ud83d\ude00\ud800 \"\\\n"}}`},
		{"large numbers kept", `{"type":"repo-update","content":{"repo_id":"` + repoA + `","n":123456789012345678901234567890.10}}`,
			`{"type":"repo-update","content":{"repo_id":"` + repoA + `","n":123456789012345678901234567890.10}}`},
		{"repo_id by escapes", `{"type":"repo-update","content":{"repo_id":"\u0032` + repoA[1:] + `"}}`, `{"type":"repo-update","content":{"repo_id":"\u0032` + repoA[1:] + `"}}`},
		{"short frame", lockPosted(repoA, "/"), lockPosted(repoA, "/")},
		{"16-bit length", lockPosted(repoA, "/"+strings.Repeat("x", 60000)), lockPosted(repoA, "/"+strings.Repeat("x", 60000))},
		{"64-bit length", lockPosted(repoA, "/"+strings.Repeat("x", 1<<20-300)), lockPosted(repoA, "/"+strings.Repeat("x", 1<<20-300))},
	} {
		post(t, s.addr, e.body, 1)
		c.expect(opText, e.want)
	}
	c.sync()
}

// Events of one sender come in its order, all clients get all events in the
// same order, and each once, however often a client has subscribed.
func TestOrder(t *testing.T) {
	t.Parallel()
	const senders, events, clients = 4, 40, 3
	s := loggedServer(t)
	var all []*client
	for i := range clients {
		c := connect(t, s.addr, []string{asDesktop, asBrowser}[i%2])
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
				r, _ := http.NewRequest("POST", "http://"+s.addr+"/events", strings.NewReader(lockPosted(repoA, fmt.Sprintf("/%d/%d/%s", i, n, strings.Repeat("x", 3800)))))
				r.Header.Set("Authorization", "Token "+eventToken(later()))
				answer, err := http.DefaultClient.Do(r)
				if err != nil || answer.StatusCode != 200 {
					t.Errorf("answered %v, %v", answer, err)
					return
				}
				text, _ := io.ReadAll(answer.Body)
				answer.Body.Close()
				if want := fmt.Sprintf(`{"subscribers":%d}`, clients); strings.TrimSpace(string(text)) != want {
					t.Errorf("answered %q, want %s", text, want)
				}
			}
		})
	}
	wg.Wait()
	var first []string
	for i, c := range all {
		var got []string
		next := [senders]int{}
		c.nc.SetReadDeadline(time.Now().Add(patient))
		for range senders * events {
			opcode, text, err := c.read()
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
		if !reflect.DeepEqual(got, first) {
			t.Errorf("client %d got another order than the first", i)
		}
	}
}

// Who does not read keeps neither the sender nor the others.
func TestStuckClient(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	connect(t, s.addr, asBrowser).subscribed(repoA, "stuck@example.com")
	c := connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com")
	for n := range 200 { // 6 MiB, more than the stuck one's socket and outbox hold
		e := lockPosted(repoA, fmt.Sprintf("/%d/%s", n, strings.Repeat("x", 30000)))
		answer, _ := request(t, "POST", "http://"+s.addr+"/events", e, "Authorization: Token "+eventToken(later()))
		if answer.StatusCode != 200 {
			t.Fatal(answer.Status)
		}
		c.expect(opText, e)
	}
	c.sync()
}

func TestSubscriptions(t *testing.T) {
	t.Parallel()
	far := later()
	perm := permEvent("user", "alice@example.com", "-1")
	for _, c := range []struct {
		name string
		do   func(t *testing.T, s *testServer, c *client)
	}{
		{"one library is not another", func(t *testing.T, s *testServer, c *client) {
			c.subscribed(repoA, "alice@example.com")
			post(t, s.addr, update(repoB, "1"), 0)
			post(t, s.addr, update(repoA, "2"), 1)
			c.expect(opText, update(repoA, "2"))
		}},
		{"several in one message", func(t *testing.T, s *testServer, c *client) {
			c.text(fmt.Sprintf(`{"type":"subscribe","content":{"repos":[{"id":%q,"jwt_token":%q},{"id":%q,"jwt_token":%q}]}}`,
				repoA, clientToken(repoA, "alice@example.com", far), repoB, clientToken(repoB, "alice@example.com", far)))
			c.sync()
			post(t, s.addr, update(repoB, "1"), 1)
			post(t, s.addr, update(repoA, "2"), 1)
			c.expect(opText, update(repoB, "1"))
			c.expect(opText, update(repoA, "2"))
		}},
		{"a bad token among good ones", func(t *testing.T, s *testServer, c *client) {
			bad := "bad \"library\"\n<é>"
			c.text(fmt.Sprintf(`{"type":"subscribe","content":{"repos":[{"id":%q,"jwt_token":%q},{"id":%q,"jwt_token":"x"},{"id":"no-token"},{"id":%q,"jwt_token":%q}]}}`,
				repoA, clientToken(repoA, "alice@example.com", far), bad, repoB, clientToken(repoB, "alice@example.com", far)))
			_, text, err := c.read()
			var m struct {
				Type    string            `json:"type"`
				Content map[string]string `json:"content"`
			}
			if err != nil || json.Unmarshal(text, &m) != nil || m.Type != "jwt-expired" || !reflect.DeepEqual(m.Content, map[string]string{"repo_id": bad}) {
				t.Errorf("got %q, %v", text, err)
			}
			c.expect(opText, expiredText("no-token"))
			c.sync()
			post(t, s.addr, update(repoA, "1"), 1)
			post(t, s.addr, update(repoB, "2"), 1)
			c.expect(opText, update(repoA, "1"))
			c.expect(opText, update(repoB, "2"))
		}},
		{"a bad token does not end what is", func(t *testing.T, s *testServer, c *client) {
			c.subscribed(repoA, "alice@example.com")
			c.subscribe(repoA, "x.y.z")
			c.expect(opText, expiredText(repoA))
			post(t, s.addr, update(repoA, "1"), 1)
			c.expect(opText, update(repoA, "1"))
		}},
		{"unsubscribe", func(t *testing.T, s *testServer, c *client) {
			c.subscribed(repoA, "alice@example.com").subscribed(repoB, "alice@example.com")
			c.text(`{"type":"unsubscribe","content":{"repos":[{"id":"` + repoA + `"},{"id":"never subscribed"}]}}`)
			c.text(`{"type":"unsubscribe","content":{"repos":[{"id":"never subscribed"}]}}`)
			c.text(`{"type":"unsubscribe","content":{"repos":[]}}`)
			c.sync()
			post(t, s.addr, update(repoA, "1"), 0)
			post(t, s.addr, update(repoB, "2"), 1)
			c.expect(opText, update(repoB, "2"))
			c.text(`{"type":"unsubscribe","content":{"repos":[{"id":"` + repoA + `"}]}}`) // twice
			c.subscribed(repoA, "alice@example.com")
			post(t, s.addr, update(repoA, "3"), 1)
			c.expect(opText, update(repoA, "3"))
		}},
		{"a client that left", func(t *testing.T, s *testServer, c *client) {
			c.subscribed(repoA, "alice@example.com")
			gone := connect(t, s.addr, asDesktop).subscribed(repoA, "bob@example.com")
			gone.nc.Close()
			waitFor(t, "the server knows that the client left", func() bool { return strings.Contains(s.out.String(), "disconnected") })
			post(t, s.addr, update(repoA, "1"), 1)
			c.expect(opText, update(repoA, "1"))
		}},
		{"a token runs out", func(t *testing.T, s *testServer, c *client) {
			start := float64(time.Now().Unix())
			s.time.setWall(start)
			c.subscribe(repoA, clientToken(repoA, "alice@example.com", time.Unix(int64(start)+10, 0)))
			c.subscribed(repoB, "alice@example.com")
			s.time.advance(9999 * time.Millisecond)
			s.sweep()
			post(t, s.addr, update(repoA, "1"), 1)
			c.expect(opText, update(repoA, "1"))
			s.time.advance(time.Millisecond) // the second is here: no event, before any sweep
			post(t, s.addr, update(repoA, "2"), 0)
			c.sync()
			s.sweep()
			c.expect(opText, expiredText(repoA))
			s.sweep() // it is said once
			post(t, s.addr, update(repoB, "3"), 1)
			c.expect(opText, update(repoB, "3"))
			c.subscribe(repoA, clientToken(repoA, "alice@example.com", time.Unix(int64(start)+20, 0))) // upon which the client does this
			c.sync()
			post(t, s.addr, update(repoA, "4"), 1)
			c.expect(opText, update(repoA, "4"))
		}},
		{"subscribing again replaces the expiry", func(t *testing.T, s *testServer, c *client) {
			start := time.Now()
			s.time.setWall(float64(start.Unix()))
			c.subscribe(repoA, clientToken(repoA, "alice@example.com", start.Add(10*time.Second)))
			c.subscribe(repoA, clientToken(repoA, "alice@example.com", start.Add(30*time.Second)))
			c.sync()
			s.time.advance(15 * time.Second)
			s.sweep()
			post(t, s.addr, update(repoA, "1"), 1)
			c.expect(opText, update(repoA, "1"))
			c.subscribe(repoA, clientToken(repoA, "alice@example.com", start.Add(18*time.Second))) // also by an earlier one
			c.sync()
			s.time.advance(4 * time.Second)
			post(t, s.addr, update(repoA, "2"), 0)
			s.sweep()
			c.expect(opText, expiredText(repoA))
		}},
		{"a client is told 10 s early, and misses nothing", func(t *testing.T, s *testServer, c *client) {
			start := time.Now()
			s.time.setWall(float64(start.Unix()))
			c.subscribe(repoA, clientToken(repoA, "alice@example.com", start.Add(time.Hour)))
			c.sync()
			pass := func(d time.Duration) { // while the client talks
				s.time.advance(d)
				c.sync()
				s.sweep()
			}
			pass(time.Hour - 11*time.Second)
			post(t, s.addr, lockPosted(repoA, "/1"), 1)
			c.expect(opText, lockPosted(repoA, "/1")) // and nothing before it
			pass(time.Second)
			c.expect(opText, expiredText(repoA))
			pass(time.Second)
			post(t, s.addr, lockPosted(repoA, "/2"), 1)
			c.expect(opText, lockPosted(repoA, "/2"))
			c.subscribe(repoA, clientToken(repoA, "alice@example.com", start.Add(2*time.Hour)))
			c.sync()
			pass(30 * time.Second)
			post(t, s.addr, lockPosted(repoA, "/3"), 1)
			c.expect(opText, lockPosted(repoA, "/3"))
			pass(time.Hour)
			post(t, s.addr, lockPosted(repoA, "/4"), 0) // who has not renewed it gets nothing more
			c.expect(opText, expiredText(repoA))
			c.sync()
		}},
		{"more tokens end at once than the outbox holds", func(t *testing.T, s *testServer, c *client) {
			start := time.Now()
			s.time.setWall(float64(start.Unix()))
			const n = maxOutbox + 100
			var repos []string
			for i := range n {
				id := fmt.Sprint("library", i)
				repos = append(repos, fmt.Sprintf(`{"id":%q,"jwt_token":%q}`, id, clientToken(id, "a", start.Add(30*time.Second))))
			}
			c.text(`{"type":"subscribe","content":{"repos":[` + strings.Join(repos, ",") + `]}}`)
			c.sync()
			waitSubscriptions(t, s, n)
			s.time.move(30*time.Second, 0)
			for told := map[string]bool{}; len(told) < n; {
				s.sweep()
				for range min(maxOutbox/2, n-len(told)) {
					opcode, payload, err := c.read()
					if err != nil || opcode != opText || told[string(payload)] {
						t.Fatalf("after %d: frame %d %q, %v", len(told), opcode, payload, err)
					}
					told[string(payload)] = true
				}
			}
			c.sync()
		}},
		{"subscribing again replaces the user", func(t *testing.T, s *testServer, c *client) {
			c.subscribed(repoA, "bob@example.com")
			post(t, s.addr, perm, 0)
			c.subscribed(repoA, "alice@example.com")
			post(t, s.addr, perm, 1)
			c.expect(opText, perm)
			c.subscribed(repoA, "bob@example.com")
			post(t, s.addr, perm, 0)
		}},
		{"two accounts on one connection", func(t *testing.T, s *testServer, c *client) {
			c.subscribed(repoA, "alice@example.com").subscribed(repoB, "bob@example.com")
			post(t, s.addr, perm, 1)
			c.expect(opText, perm)
			ofB := strings.Replace(perm, repoA, repoB, 1)
			post(t, s.addr, ofB, 0) // alice is not the user there
			ofB = strings.Replace(ofB, "alice", "bob", 1)
			post(t, s.addr, ofB, 1)
			c.expect(opText, ofB)
		}},
		{"a permission of a user is for that user", func(t *testing.T, s *testServer, c *client) {
			c.subscribed(repoA, "alice@example.com")
			bob := connect(t, s.addr, asBrowser).subscribed(repoA, "bob@example.com")
			nearly := connect(t, s.addr, asBrowser).subscribed(repoA, "Alice@example.com")
			post(t, s.addr, perm, 1)
			c.expect(opText, perm)
			post(t, s.addr, update(repoA, "1"), 3)
			c.expect(opText, update(repoA, "1"))
			bob.expect(opText, update(repoA, "1"))
			nearly.expect(opText, update(repoA, "1"))
		}},
		{"a lone repo-update is not repeated to others' events", func(t *testing.T, s *testServer, c *client) {
			c.subscribed(repoA, "alice@example.com")
			for _, e := range []string{update(repoA, "1"), lockPosted(repoA, "/a"), `{"type":"comment-update","content":{"repo_id":"` + repoA + `","type":"comment_updated"}}`} {
				post(t, s.addr, e, 1)
				c.expect(opText, e)
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

// A library without subscribers leaves nothing, whatever ended them; and the
// real server tells a client within 10 s that its token has run out.
func TestNothingKept(t *testing.T) {
	t.Parallel()
	port, metricsPort := freePort(t), freePort(t)
	p := startBinary(t, port, []string{"NOTIFICATION_SERVER_METRICS=127.0.0.1:" + metricsPort}, "-c", writeConfig(t, port, "log_level = debug"))
	addr := "127.0.0.1:" + port
	is := func(libraries, subscriptions int) func() bool {
		return func() bool {
			_, text := request(t, "GET", "http://127.0.0.1:"+metricsPort+"/metrics", "")
			return strings.Contains(text, fmt.Sprintf("\nseafile_notification_libraries %d\n", libraries)) &&
				strings.Contains(text, fmt.Sprintf("\nseafile_notification_subscriptions %d\n", subscriptions))
		}
	}
	a, b := connect(t, addr, asDesktop), connect(t, addr, asBrowser)
	a.subscribed(repoA, "alice@example.com").subscribed(repoB, "alice@example.com").subscribed(repoB, "bob@example.com")
	b.subscribed(repoB, "bob@example.com")
	waitFor(t, "2 libraries, 3 subscriptions", is(2, 3))
	a.text(`{"type":"unsubscribe","content":{"repos":[{"id":"` + repoA + `"}]}}`)
	waitFor(t, "unsubscribed", is(1, 2))
	a.nc.Close()
	waitFor(t, "disconnected", is(1, 1))
	post(t, addr, update(repoA, "1"), 0) // nor does an event leave a library
	b.subscribe(repoA, "x.y.z")
	b.expect(opText, expiredText(repoA))
	b.text(`{"type":"unsubscribe","content":{"repos":[{"id":"` + repoB + `"},{"id":"x"}]}}`)
	waitFor(t, "all unsubscribed", is(0, 0))
	b.subscribe(repoA, clientToken(repoA, "bob@example.com", time.Now().Add(2*time.Second)))
	b.expect(opText, expiredText(repoA))
	waitFor(t, "the token has run out", is(0, 0))
	if status := p.terminate(); status != 0 {
		t.Errorf("exit %d", status)
	}
	checkLog(t, p.out.String(), "")
}

// ---- Permissions of groups ----

// seaf-server is asked as was captured, and the members that it names get the event.
func TestGroupMembers(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	ss := startSeafServer(t, filepath.Join(s.dir, "seafile.sock"), func(nc net.Conn) { io.WriteString(nc, capturedMembers) })
	carol := connect(t, s.addr, asDesktop).subscribed(repoA, "carol@example.com")
	bob := connect(t, s.addr, asBrowser).subscribed(repoA, "bob@example.com")
	dave := connect(t, s.addr, asDesktop).subscribed(repoA, "dave@example.com")
	e := permEvent("group", "", "1")
	post(t, s.addr, e, 2)
	carol.expect(opText, e)
	bob.expect(opText, e)
	for _, c := range []*client{carol, bob, dave} {
		c.sync()
	}
	var got, want any
	json.Unmarshal([]byte(<-ss.requests), &got)
	json.Unmarshal([]byte(`{"service": "seafserv-threaded-rpcserver", "request": "[\"get_group_members\", 1, -1, -1]"}`), &want)
	if !reflect.DeepEqual(got, want) {
		t.Errorf("asked %v, want %v", got, want)
	}
	post(t, s.addr, strings.Replace(e, repoA, repoB, 1), 0) // nobody there, but no error
	<-ss.requests
	post(t, s.addr, permEvent("user", "dave@example.com", "-1"), 1)
	dave.expect(opText, permEvent("user", "dave@example.com", "-1"))
	select {
	case r := <-ss.requests:
		t.Errorf("for a user seaf-server was asked %s", r)
	default:
	}
}

// Where the members cannot be learned, nobody gets the event, the sender and
// the log learn why, and the subscribers are closed so that they resync.
func TestGroupMembersUnknown(t *testing.T) {
	t.Parallel()
	raw := func(text string) func(net.Conn) { return func(nc net.Conn) { io.WriteString(nc, text) } }
	hang := func(nc net.Conn) { nc.Read(make([]byte, 1)) }
	for _, c := range []struct {
		name  string
		reply func(net.Conn) // nil: no socket
		want  string         // in the log
	}{
		{"no socket", nil, `there is no .*seafile\.sock.*SEAFILE_RPC_PIPE_PATH`},
		{"database down, unknown or empty group", raw(capturedNull), "seaf-server does not know them.*database"},
		{"error of the function", raw(capturedNoFunction), `error 500, "cannot find function no_such_fn\."`},
		{"error of the service", raw(capturedNoService), `error 501`},
		{"hangs", hang, "seaf-server does not answer.*timeout"},
		{"half a length", func(nc net.Conn) { io.WriteString(nc, "\x7f\x00"); hang(nc) }, "timeout"},
		{"half an answer, then hangs", func(nc net.Conn) { io.WriteString(nc, capturedMembers[:40]); hang(nc) }, "timeout"},
		{"half an answer, then closes", raw(capturedMembers[:40]), "unexpected EOF"},
		{"an answer that lacks but white space, then closes", raw("\x80\x00\x00\x00" + capturedMembers[4:]), "unexpected EOF"},
		{"drips", func(nc net.Conn) {
			for i := range len(capturedMembers) {
				if _, err := nc.Write([]byte{capturedMembers[i]}); err != nil {
					return
				}
				nc.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
				hang(nc)
			}
		}, "timeout"},
		{"closes", raw(""), "EOF"},
		{"garbage", rpcReply("garbage"), "invalid character"},
		{"bytes behind", rpcReply(`{"ret":[]}x`), "invalid character"},
		{"empty", rpcReply(""), "JSON"},
		{"huge length", raw("\xff\xff\xff\xff{}"), "4294967295"},
		{"big-endian length", raw("\x00\x00\x00\x7f" + capturedMembers[4:]), "does not answer as it should|bytes"},
		{"wrong shape", rpcReply(`{"ret":{"user-name":"bob@example.com"}}`), "cannot unmarshal"},
		{"list of names", rpcReply(`{"ret":["bob@example.com"]}`), "cannot unmarshal"},
		{"a member without a name", rpcReply(`{"ret":[{"group-id":1,"user-name":"bob@example.com"},{"group-id":1,"user_name":"x"}]}`), "user-name"},
		{"no ret", rpcReply(`{}`), "does not know them"},
		{"an error and members", rpcReply(`{"ret":[{"user-name":"bob@example.com"}],"err_code":512,"err_msg":"x"}`), "error 512"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := loggedServer(t)
			if c.reply != nil {
				startSeafServer(t, filepath.Join(s.dir, "seafile.sock"), c.reply)
			}
			bob := connect(t, s.addr, asDesktop).subscribed(repoA, "bob@example.com")
			dave := connect(t, s.addr, asBrowser).subscribed(repoA, "dave@example.com").subscribed(repoB, "dave@example.com")
			other := connect(t, s.addr, asBrowser).subscribed(repoB, "bob@example.com")
			var answer *http.Response
			var body string
			withinOnce(t, time.Second, func() { // which is what seaf-server waits
				answer, body = request(t, "POST", "http://"+s.addr+"/events", permEvent("group", "", "1"), "Authorization: Token "+eventToken(later()))
			})
			if answer.StatusCode != 503 || !regexp.MustCompile(c.want).MatchString(body) {
				t.Errorf("answered %s %q, want 503 and %s", answer.Status, body, c.want)
			}
			for _, cl := range []*client{bob, dave} { // nothing came before the close frame
				opcode, payload, err := cl.read()
				if err != nil || opcode != opClose || !bytes.HasPrefix(payload, []byte("\x03\xf4")) || len(payload) < 10 {
					t.Errorf("got frame %d %q, %v; want to be closed with 1012 and a reason", opcode, payload, err)
				}
			}
			other.sync()
			if !regexp.MustCompile(`\[WARNING\] a request from .*group 1 .*library "` + repoA + `".*` + c.want).MatchString(s.out.String()) {
				t.Errorf("the log does not say %s: %s", c.want, s.out)
			}
		})
	}
	t.Run("a socket that nobody listens on", func(t *testing.T) {
		t.Parallel()
		s := loggedServer(t)
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(s.dir, "seafile.sock"), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		ln.SetUnlinkOnClose(false)
		ln.Close()
		c := connect(t, s.addr, asDesktop).subscribed(repoA, "bob@example.com")
		answer, body := request(t, "POST", "http://"+s.addr+"/events", permEvent("group", "", "1"), "Authorization: Token "+eventToken(later()))
		if answer.StatusCode != 503 || !strings.Contains(body, "refused") {
			t.Errorf("answered %s %q", answer.Status, body)
		}
		c.expectClose(1012)
	})
}

// The socket is looked for in three places, each time anew.
func TestSocketPlaces(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	dir := writeConfig(t, port)
	base := filepath.Dir(dir)
	rpc := filepath.Join(base, "rpc")
	p := startBinary(t, port, []string{"SEAFILE_RPC_PIPE_PATH=" + rpc}, "-c", filepath.Join(dir, "seafile.conf"))
	addr := "127.0.0.1:" + port
	e := permEvent("group", "", "1")
	if answer, _ := request(t, "POST", "http://"+addr+"/events", e, "Authorization: Token "+eventToken(later())); answer.StatusCode != 503 {
		t.Errorf("without a socket: %s", answer.Status)
	}
	user := map[string]*client{}
	var servers []*seafServer
	places := []string{filepath.Join(base, "seafile-data"), filepath.Join(base, "seafile-server-latest", "runtime"), rpc} // the last comes first
	is := func(want string) {
		t.Helper()
		post(t, addr, e, 1)
		user[want].expect(opText, e)
	}
	for _, place := range places {
		name := filepath.Base(place)
		user[name] = connect(t, addr, asDesktop).subscribed(repoA, name)
		if err := os.MkdirAll(place, 0o755); err != nil {
			t.Fatal(err)
		}
		servers = append(servers, startSeafServer(t, filepath.Join(place, "seafile.sock"), rpcReply(`{"ret":[{"group-id":1,"user-name":"`+name+`","is-staff":0}]}`)))
		is(name)
	}
	for i := 2; i > 0; i-- {
		servers[i].ln.Close() // removes it
		is(filepath.Base(places[i-1]))
	}
	p.terminate()
	if log := p.out.String(); !strings.Contains(log, filepath.Join(rpc, "seafile.sock")) {
		t.Errorf("the log does not say at the start where group members will be asked: %s", log)
	}
}

// ---- Refusals in the log ----

func TestRefusalsInLog(t *testing.T) {
	t.Parallel()
	token := func(key string, exp time.Duration) string {
		return signToken(key, `{"alg":"HS256"}`, fmt.Sprintf(`{"exp":%d,"repo_id":%q,"username":"alice@example.com"}`, time.Now().Add(exp).Unix(), repoA))
	}
	for _, c := range []struct{ name, token, want string }{
		{"signature", token("another key", time.Hour), "signature does not match.*jwt_private_key differs between here and seaf-server"},
		{"just expired", token(testKey, -10*time.Minute), "expired 6.. s ago.*clocks.*differ"},
		{"long expired", token(testKey, -2*time.Hour), "expired more than an hour ago"},
		{"malformed", "x", "not three parts"},
		{"algorithm", capturedHS512, "does not name HS256"},
		{"not yet", signToken(testKey, `{"alg":"HS256"}`, `{"exp":4102444800,"nbf":4102444000}`), "valid only in.*clocks.*differ"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := loggedServer(t)
			cl := connect(t, s.addr, asDesktop+"X-Forwarded-For: 203.0.113.7\r\n")
			refuse := func() {
				t.Helper()
				for range 3 {
					cl.subscribe(repoA, c.token)
					cl.expect(opText, expiredText(repoA))
					if answer, _ := request(t, "POST", "http://"+s.addr+"/events", update(repoA, "1"), "Authorization: Token "+c.token); answer.StatusCode != 401 {
						t.Fatal(answer.Status)
					}
				}
			}
			warnings := func(want int) {
				t.Helper()
				got := regexp.MustCompile(`(?m)^.*\[WARNING\] .*refused.*$`).FindAllString(s.out.String(), -1)
				if len(got) != want || !regexp.MustCompile(c.want).MatchString(got[0]) || !strings.Contains(got[0], "203.0.113.7") {
					t.Errorf("%d warnings %q, want %d with %s", len(got), got, want, c.want)
				}
			}
			refuse()
			warnings(1)
			s.time.advance(59 * time.Second)
			refuse()
			warnings(1)
			s.time.advance(time.Second)
			refuse()
			warnings(2)
			if other := token("third key", time.Hour); c.name != "signature" { // another reason is said at once
				cl.subscribe(repoA, other)
				cl.expect(opText, expiredText(repoA))
				warnings(3)
			}
		})
	}
}

// ---- WebSocket ----

func TestHandshake(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	for _, c := range []struct{ name, lines, protocol string }{
		{"no header but those needed", "", ""},
		{"Origin of the desktop client", "Origin: http://127.0.0.1\r\n", ""},
		{"Origin of Seahub", "Origin: https://cloud.example.com:8443\r\n", ""},
		{"Origin null", "Origin: null\r\n", ""},
		{"Origin a bare host name", "Origin: cloud.example.com\r\n", ""},
		{"Origin empty", "Origin: \r\n", ""},
		{"Origin no URL", "Origin: http://[::1%zz\r\n", ""},
		{"Sec-WebSocket-Origin", "Sec-WebSocket-Origin: %zz\r\n", ""},
		{"ours", "Sec-WebSocket-Protocol: notification.seafile.com\r\n", "notification.seafile.com"},
		{"ours first", "Sec-WebSocket-Protocol: notification.seafile.com, chat\r\n", "notification.seafile.com"},
		{"ours last", "Sec-WebSocket-Protocol: chat,notification.seafile.com\r\n", "notification.seafile.com"},
		{"ours in a second line", "Sec-WebSocket-Protocol: chat, superchat\r\nSec-WebSocket-Protocol: x , notification.seafile.com\r\n", "notification.seafile.com"},
		{"another", "Sec-WebSocket-Protocol: chat\r\n", ""},
		{"others", "Sec-WebSocket-Protocol: chat, superchat\r\n", ""},
		{"nearly ours", "Sec-WebSocket-Protocol: notification.seafile.com2, xnotification.seafile.com\r\n", ""},
		{"extensions", asBrowser, ""},
		{"extensions and subprotocol", asBrowser + asDesktop + "Sec-WebSocket-Extensions: x-webkit-deflate-frame\r\n", "notification.seafile.com"},
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
	if err := websocket.Message.Send(ws, fmt.Sprintf(`{"type":"subscribe","content":{"repos":[{"id":%q,"jwt_token":%q},{"id":"x"}]}}`, repoA, clientToken(repoA, "alice@example.com", later()))); err != nil {
		t.Fatal(err)
	}
	var got string
	if err := websocket.Message.Receive(ws, &got); err != nil || got != expiredText("x") {
		t.Fatalf("got %q, %v", got, err)
	}
	post(t, s.addr, update(repoA, "1"), 1)
	if err := websocket.Message.Receive(ws, &got); err != nil || got != update(repoA, "1") {
		t.Fatalf("got %q, %v", got, err)
	}
}

// fragments cuts a message into frames of these sizes; the last takes the rest.
func fragments(opcode byte, message string, sizes ...int) (frames [][]byte) {
	for _, n := range sizes {
		frames = append(frames, maskedFrame(opcode, []byte(message[:n])))
		message, opcode = message[n:], opContinuation
	}
	return append(frames, maskedFrame(0x80|opcode, []byte(message)))
}

// However a subscribe comes, it is understood.
func TestWaysToSend(t *testing.T) {
	t.Parallel()
	id := "bibliothèque-é😀"
	message := fmt.Sprintf(`{"type":"subscribe","content":{"repos":[{"id":%q,"jwt_token":%q}]}}`, id, clientToken(id, "alice@example.com", later()))
	padded := message + strings.Repeat(" ", 1<<20-len(message)) // exactly 1 MiB
	rune2 := strings.Index(message, "è") + 1                    // inside of a character
	ping := maskedFrame(0x80|opPing, []byte("between"))
	single := make([]int, len(message)-1)
	for i := range single {
		single[i] = 1
	}
	join := func(frames ...[]byte) []byte { return bytes.Join(frames, nil) }
	byBytes := func(frames ...[]byte) (chunks [][]byte) {
		for _, b := range join(frames...) {
			chunks = append(chunks, []byte{b})
		}
		return chunks
	}
	for _, c := range []struct {
		name   string
		writes [][]byte
		pings  int // answered
	}{
		{"text", fragments(opText, message), 0},
		{"binary", fragments(opBinary, message), 0},
		{"two fragments", fragments(opText, message, 20), 0},
		{"binary fragments", fragments(opBinary, message, 20, 30), 0},
		{"a character in two fragments", fragments(opText, message, rune2), 0},
		{"empty fragments", fragments(opText, message, 0, 0, 20, 0, len(message)-20), 0},
		{"fragments of one byte", [][]byte{join(fragments(opText, message, single...)...)}, 0},
		{"byte by byte", byBytes(fragments(opText, message)...), 0},
		{"fragments byte by byte, pings between them", byBytes(fragments(opText, message, 50)[0], ping, fragments(opText, message, 50)[1]), 1},
		{"pings between fragments", [][]byte{fragments(opText, message, 50)[0], ping, fragments(opContinuation, message[50:], 10)[0], maskedFrame(0x80|opPong, nil), ping, maskedFrame(0x80|opContinuation, []byte(message[60:]))}, 2},
		{"all in one segment", [][]byte{join(maskedFrame(0x80|opPing, nil), maskedFrame(0x80|opPong, []byte("unsolicited")), join(fragments(opText, message, 7)...))}, -1},
		{"unsolicited pongs", [][]byte{maskedFrame(0x80|opPong, nil), maskedFrame(0x80|opPong, bytes.Repeat([]byte("x"), 125)), maskedFrame(0x80|opText, []byte(message))}, 0},
		{"1 MiB", fragments(opText, padded), 0},
		{"1 MiB in fragments", fragments(opText, padded, 1, 1<<19, 0, 1<<10), 0},
		{"1 MiB, binary", fragments(opBinary, padded, 1<<20), 0},
		{"a length longer than needed", [][]byte{append([]byte{0x81, 0xff, 0, 0, 0, 0, 0, 0, byte(len(message) >> 8), byte(len(message)), 0, 0, 0, 0}, message...)}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := loggedServer(t)
			cl := connect(t, s.addr, asBrowser)
			for _, w := range c.writes {
				cl.write(w)
			}
			for range c.pings {
				cl.expect(opPong, "between")
			}
			if c.pings < 0 {
				cl.expect(opPong, "")
			}
			cl.sync()
			post(t, s.addr, update(id, "1"), 1)
			cl.expect(opText, update(id, "1"))
		})
	}
}

func TestPings(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	c := connect(t, s.addr, asDesktop)
	for _, payload := range []string{"", "a", "\x00\xff\xfe", strings.Repeat("x", 125), "", ""} {
		c.write(maskedFrame(0x80|opPing, []byte(payload)))
		c.expect(opPong, payload)
	}
}

// What the protocol forbids ends the connection with the status for it.
func TestViolations(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	f := func(first byte, payload string) []byte { return maskedFrame(first, []byte(payload)) }
	join := func(frames ...[]byte) []byte { return bytes.Join(frames, nil) }
	closing := func(status uint16, reason string) []byte {
		return f(0x80|opClose, string(binary.BigEndian.AppendUint16(nil, status))+reason)
	}
	message := `{"type":"unsubscribe","content":{"repos":[]}}`
	big := strings.Repeat(" ", 1<<20-len(message)) + message
	type row struct {
		name   string
		bytes  []byte
		status int
	}
	rows := []row{
		{"unmasked text", []byte("\x81\x02{}"), 1002},
		{"unmasked ping", []byte("\x89\x00"), 1002},
		{"unmasked close", []byte("\x88\x02\x03\xe8"), 1002},
		{"unmasked, too long", []byte("\x81\x7f\x00\x00\x00\x01\x00\x00\x00\x00"), 1002},
		{"reserved bit on a continuation", join(f(opText, message), f(0xc0, "")), 1002},
		{"ping of 126 bytes", f(0x89, strings.Repeat("x", 126)), 1002},
		{"pong of 126 bytes", f(0x8a, strings.Repeat("x", 126)), 1002},
		{"close of 126 bytes", closing(1000, strings.Repeat("x", 124)), 1002},
		{"ping that announces 2^63 bytes", []byte("\x89\xff\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 1002},
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
		{"close with a reason that is not UTF-8", closing(1000, "\xff"), 1007},
		{"close with half a character", closing(1000, "abc\xc3"), 1007},
		{"not UTF-8", f(0x81, "\"\xff\""), 1007},
		{"overlong", f(0x81, "\"\xc0\x80\""), 1007},
		{"surrogate", f(0x81, "\"\xed\xa0\x80\""), 1007},
		{"beyond Unicode", f(0x81, "\"\xf4\x90\x80\x80\""), 1007},
		{"half a character at the end", f(0x81, "\xc3"), 1007},
		{"not UTF-8 in a fragment", join(f(0x01, "\""), f(0x00, "\xff"), f(0x80, "\"")), 1007},
		{"over 1 MiB", f(0x81, big+" "), 1009},
		{"over 1 MiB, binary", f(0x82, big+" "), 1009},
		{"over 1 MiB in fragments", join(f(0x01, big), f(0x00, ""), f(0x80, " ")), 1009},
		{"over 1 MiB in equal fragments", join(f(0x02, big[:1<<19]), f(0x00, big[:1<<19]), f(0x00, "x")), 1009},
		{"over 1 MiB, announced only", []byte("\x81\xff\x00\x00\x00\x00\x00\x10\x00\x01\x00\x00\x00\x00"), 1009},
		{"2^40 announced", []byte("\x81\xff\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 1009},
		{"2^63-1 announced", []byte("\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00"), 1009},
		{"2^63 announced", []byte("\x81\xff\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 1009},
		{"2^63+2 announced", []byte("\x81\xff\x80\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00{}"), 1009},
		{"2^64-1 announced", []byte("\x81\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00"), 1009},
		{"2^63-1 announced for a second fragment", join(f(0x01, "{"), []byte("\x80\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00")), 1009},
	}
	for bit := byte(0x10); bit <= 0x40; bit <<= 1 {
		for _, opcode := range []byte{opText, opBinary, opPing, opPong, opClose} {
			rows = append(rows, row{fmt.Sprintf("reserved bit %#x, opcode %d", bit, opcode), f(0x80|bit|opcode, "\x03\xe8"), 1002})
		}
	}
	for _, opcode := range []byte{3, 4, 5, 6, 7, 11, 12, 13, 14, 15} {
		rows = append(rows, row{fmt.Sprintf("opcode %d", opcode), f(0x80|opcode, "x"), 1002})
	}
	for _, status := range []uint16{0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1999, 2000, 2999, 5000, 65535} {
		rows = append(rows, row{fmt.Sprintf("close status %d", status), closing(status, "x"), 1002})
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
		strings.Repeat("[", 100000), `{"type":"` + strings.Repeat("é", 200) + `","content":{"repos":[]}}`,
	} {
		rows = append(rows, row{fmt.Sprintf("message %.60q", text), f(0x81, text), 1008})
	}
	rows = append(rows, row{"message in binary", f(0x82, "x"), 1008})
	for _, c := range rows {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			cl := connect(t, s.addr, asBrowser)
			cl.t = t
			cl.write(c.bytes)
			if reason := cl.expectClose(c.status); reason == "" || len(reason) > 123 || !utf8.ValidString(reason) {
				t.Errorf("the reason is %q", reason)
			}
		})
	}
}

// A close is answered with the client's status, and nothing behind it counts.
func TestCloseAnswered(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	for _, status := range []int{0, 1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999} {
		t.Run(strconv.Itoa(status), func(t *testing.T) {
			t.Parallel()
			c := connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com")
			var payload []byte
			if status != 0 {
				payload = append(binary.BigEndian.AppendUint16(nil, uint16(status)), "bye é"...)
			}
			c.write(append(maskedFrame(0x80|opClose, payload), maskedFrame(0x80|opPing, []byte("behind"))...))
			c.nc.SetReadDeadline(time.Now().Add(patient))
			opcode, answer, err := c.read()
			if err != nil || opcode != opClose || !bytes.Equal(answer, payload[:min(2, len(payload))]) {
				t.Errorf("answered with frame %d % x, %v", opcode, answer, err)
			}
			if _, err := c.br.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("then the connection did not end: %v", err)
			}
		})
	}
}

// Of what a client only announces, nothing is held.
func TestAnnouncedBytes(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	p := startBinary(t, port, nil, "-c", writeConfig(t, port))
	resident := func() (pages int) {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Sscan(string(data), new(int), &pages)
		return pages * os.Getpagesize()
	}
	const clients = 200
	before := resident()
	for range clients {
		c := connect(t, "127.0.0.1:"+port, asBrowser)
		c.sync()
		c.write([]byte("\x81\xff\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00{")) // 1 MiB, of which one byte comes
	}
	connect(t, "127.0.0.1:"+port, asBrowser).sync()
	if grown := resident() - before; grown > clients<<18 {
		t.Errorf("%d clients that announced 1 MiB each take %d MiB", clients, grown>>20)
	}
}

// ---- Life ----

func TestStop(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			port := freePort(t)
			dir := writeConfig(t, port)
			p := startBinary(t, port, nil, "-c", dir, "-l", "-")
			addr := "127.0.0.1:" + port
			if cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.Process.Pid)); err == nil && !strings.Contains(strings.ReplaceAll(string(cmdline), "\x00", " "), "notification-server -c "+dir) {
				t.Errorf("seafile.sh does not find %q", cmdline) // by pkill -f
			}
			var all []*client
			for _, lines := range []string{asDesktop, asBrowser, asDesktop} {
				all = append(all, connect(t, addr, lines).subscribed(repoA, "alice@example.com"))
			}
			post(t, addr, update(repoA, "1"), len(all)) // what was accepted comes before the end
			connect(t, addr, asDesktop).sync()          // never answers the close
			idle, err := net.Dial("tcp", addr)          // nor does this say anything
			if err != nil {
				t.Fatal(err)
			}
			defer idle.Close()
			start := time.Now()
			p.Process.Signal(sig)
			for _, c := range all {
				c.expect(opText, update(repoA, "1"))
				if reason := c.expectClose(1001); reason == "" {
					t.Error("closed without a reason")
				}
			}
			if nc, err := net.Dial("tcp", addr); err == nil {
				nc.Close()
				t.Error("the port still accepts connections")
			}
			if status, took := p.wait(), time.Since(start); status != 0 || took > patient {
				t.Errorf("exit %d after %v", status, took)
			}
			log := p.out.String()
			checkLog(t, log, "")
			for _, want := range []string{
				`\[INFO\] started on 127\.0\.0\.1:` + port + `; .*` + filepath.Join(dir, "seafile.conf") + `; .*seafile\.sock`,
				`\[INFO\] stopping.*\n.*\[INFO\] stopped`,
			} {
				if !regexp.MustCompile(want).MatchString(log) {
					t.Errorf("the log lacks %s: %s", want, log)
				}
			}
			again := startBinary(t, port, nil, "-c", dir) // the port is free at once
			again.terminate()
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
	if !strings.Contains(string(old), "started on") || strings.Contains(string(old), "stopped") || !strings.Contains(string(text), ": connected") || !strings.Contains(string(text), "] stopped") {
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

// At debug level the log has connections, subscriptions and messages, with user,
// address and content, and what comes from outside cannot forge a line.
func TestDebugLog(t *testing.T) {
	t.Parallel()
	s := loggedServer(t)
	c := connect(t, s.addr, asDesktop+"X-Forwarded-For: 203.0.113.7, \"10.0.0.1\x80\r\n")
	addr := regexp.QuoteMeta(c.nc.LocalAddr().String()) + ` for "203\.0\.113\.7, \\"10\.0\.0\.1\\x80"`
	forged := "x\n[2026-01-01 00:00:00] [ERROR] forged"
	c.subscribed(repoA, "alice@example.com\n"+forged).subscribed(forged, "bob@example.com")
	post(t, s.addr, update(repoA, "a1"), 1)
	c.expect(opText, update(repoA, "a1"))
	named := `{"type":"file-lock-changed","content":{"repo_id":"` + repoA + `","path":"/é` + "\u009b31m\u007f\u2028" + `"}}` // JSON leaves these as they are
	post(t, s.addr, named, 1)
	c.expect(opText, named)
	c.subscribe(forged, "x.y."+forged)
	c.read()
	c.text(`{"type":"unsubscribe","content":{"repos":[{"id":"` + repoA + `"}]}}`)
	quoted, _ := json.Marshal(forged + "\x1b[2J")
	request(t, "POST", "http://"+s.addr+"/events", fmt.Sprintf(`{"type":%s,"content":{"repo_id":"x"}}`, quoted), "Authorization: Token "+eventToken(later()))
	quoted, _ = json.Marshal(forged)
	request(t, "POST", "http://"+s.addr+"/events", fmt.Sprintf(`{"type":"folder-perm-changed","content":{"repo_id":%s,"type":"group","group":1}}`, quoted), "Authorization: Token "+eventToken(later()))
	c.expectClose(1012)
	direct := connect(t, s.addr, asBrowser)
	direct.nc.Close()
	waitFor(t, "both left", func() bool { return strings.Count(s.out.String(), ": disconnected") == 2 })
	log := s.out.String()
	for _, want := range []string{
		`\[DEBUG\] ` + addr + `: connected`,
		`\[DEBUG\] ` + addr + `: subscribed to "` + repoA + `", user "alice@example\.com\\n`,
		`\[DEBUG\] to ` + addr + `, user "alice@example\.com\\n.*": ` + regexp.QuoteMeta(strconv.Quote(update(repoA, "a1"))),
		`\[DEBUG\] to ` + addr + `, user .*: ` + regexp.QuoteMeta(strconv.Quote(named)),
		`\[DEBUG\] to ` + addr + `: "{\\"type\\":\\"jwt-expired\\",\\"content\\":{\\"repo_id\\":\\"x\\\\n`,
		`\[DEBUG\] ` + addr + `: unsubscribed from "` + repoA + `"`,
		`\[DEBUG\] ` + addr + `: disconnected`,
		`\[DEBUG\] ` + regexp.QuoteMeta(direct.nc.LocalAddr().String()) + `: connected`,
		`\[WARNING\] a request from .*unknown type "x\\n`,
		`\[WARNING\] a request from .*library "x\\n`,
	} {
		if !regexp.MustCompile(want).MatchString(log) {
			t.Errorf("the log lacks %s", want)
		}
	}
	if strings.Contains(log, "\n[2026-01-01 00:00:00]") || strings.Contains(log, "\x1b") || strings.ContainsAny(log, "\r\u009b\u007f\u2028") || strings.Contains(log, "\"10.0.0.1\x80") {
		t.Error("text from outside is not quoted")
	}
	if t.Failed() {
		t.Log(log)
	}
}

// ---- Fuzzing ----

// foldedFields returns the values of an object's fields, by name in any case,
// as encoding/json matches them; where one is there twice, both.
func foldedFields(text []byte, name string) (values []json.RawMessage) {
	dec := json.NewDecoder(bytes.NewReader(text))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil
	}
	for dec.More() {
		key, err := dec.Token()
		var value json.RawMessage
		if err != nil || dec.Decode(&value) != nil {
			return nil
		}
		if s, ok := key.(string); ok && strings.EqualFold(s, name) {
			values = append(values, value)
		}
	}
	return values
}

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

// FuzzToken: a token is accepted only if a check written on its own accepts it.
func FuzzToken(f *testing.F) {
	for _, token := range []string{capturedC, capturedGo, capturedClient, capturedSeahub, capturedLibrary, capturedHS512} {
		parts := strings.Split(token, ".")
		header, _ := base64.RawURLEncoding.DecodeString(parts[0])
		claims, _ := base64.RawURLEncoding.DecodeString(parts[1])
		f.Add(string(header), string(claims), token)
	}
	f.Add(`{"alg":"none"}`, `{"exp":4102444800,"nbf":1}`, "..")
	f.Add(`{"ALG":"HS256","alg":null}`, `{"exp":"1","EXP":4e9}`, "a.b.c=\n")
	s := startServer(f)
	const now = capturedEnd - 1
	s.time.setWall(now)
	check := func(t *testing.T, token string) {
		cl, refused := s.verify(token)
		if refused != nil {
			if cl != (claims{}) || refused.Error() == "" {
				t.Fatalf("%q: refused with claims %+v, text %q", token, cl, refused.Error())
			}
			return
		}
		if !regexp.MustCompile(`^[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{43}\z`).MatchString(token) {
			t.Fatalf("%q: accepted in this form", token)
		}
		i := strings.LastIndexByte(token, '.')
		head, body, _ := strings.Cut(token[:i], ".")
		mac := hmac.New(sha256.New, []byte(testKey))
		mac.Write([]byte(token[:i]))
		if token[i+1:] != base64.RawURLEncoding.EncodeToString(mac.Sum(nil)) {
			t.Fatalf("%q: accepted without our signature", token)
		}
		some := func(part, name string, ok func(v any) bool) bool {
			text, err := base64.RawURLEncoding.DecodeString(part)
			for _, value := range foldedFields(text, name) {
				var v any
				if err == nil && json.Valid(text) && json.Unmarshal(value, &v) == nil && ok(v) {
					return true
				}
			}
			return false
		}
		if !some(head, "alg", func(v any) bool { return v == "HS256" }) {
			t.Fatalf("%q: accepted without alg HS256", token)
		}
		if !some(body, "exp", func(v any) bool { n, ok := v.(float64); return ok && n > now && !math.IsInf(n, 0) }) {
			t.Fatalf("%q: accepted though expired", token)
		}
		if cl.RepoID != "" && !some(body, "repo_id", func(v any) bool { return v == cl.RepoID }) || cl.Username != "" && !some(body, "username", func(v any) bool { return v == cl.Username }) {
			t.Fatalf("%q: claims %+v", token, cl)
		}
		if some(body, "nbf", func(any) bool { return true }) && !some(body, "nbf", func(v any) bool { n, ok := v.(float64); return v == nil || ok && n <= now }) {
			t.Fatalf("%q: accepted too early", token)
		}
	}
	f.Fuzz(func(t *testing.T, header, claims, token string) {
		check(t, token)
		check(t, signToken(testKey, header, claims))
		check(t, signToken(token, header, claims)) // with another key, unless it is ours
		good := signToken(testKey, header, `{"exp":4102444800}`)
		if i := len(token) % len(good); len(token) > 0 && good[i] != token[0] { // a byte changed
			check(t, good[:i]+token[:1]+good[i+1:])
		}
	})
}

// parsedConfig returns the problem by which parseConfig ends as an error.
func parsedConfig(file, text string) (settings map[string]setting, err error) {
	defer catch(&err)
	return parseConfig(file, text), nil
}

// FuzzConfig: a value is what stands behind the first "=", and an error names
// its line but does not show it.
func FuzzConfig(f *testing.F) {
	f.Add(manualSection, "M@O8VWUb81YvmtWLHGB2I_V7di5-@0p(MF*GrE!sIws23F")
	f.Add("\ufeff[database]\r\nx\r\n[notification]\r\nport=1\r\n", " a#b;c=\"d\" ")
	f.Add("[notification]\nport", "=")
	f.Add("[notification\nx=y", "[x]")
	f.Fuzz(func(t *testing.T, text, value string) {
		lines := strings.Split(strings.TrimPrefix(text, "\ufeff"), "\n")
		settings, err := parsedConfig("f", text)
		if err != nil {
			m := regexp.MustCompile(`^f:(\d+): (.+)$`).FindStringSubmatch(err.Error())
			n := 0
			if m != nil {
				n, _ = strconv.Atoi(m[1])
			}
			if n < 1 || n > len(lines) {
				t.Fatalf("%q: %v, %v", text, err, settings)
			}
			if line := strings.TrimSpace(lines[n-1]); len(line) > 30 && strings.Contains(err.Error(), line) {
				t.Fatalf("%q: the error shows the line: %v", text, err)
			}
			return
		}
		for key, s := range settings {
			n, err := strconv.Atoi(strings.TrimPrefix(s.where, "f:"))
			if err != nil || n < 1 || n > len(lines) {
				t.Fatalf("%q: %q is said to stand at %s", text, key, s.where)
			}
			before, behind, found := strings.Cut(lines[n-1], "=")
			if !found || strings.TrimSpace(before) != key || strings.TrimSpace(behind) != s.value {
				t.Fatalf("%q: line %d gives %q = %q", text, n, key, s.value)
			}
		}
		if strings.Contains(value, "\n") {
			return
		}
		settings, err = parsedConfig("f", text+"\n[notification]\njwt_private_key = "+value+"\n[x]\njwt_private_key = z")
		if got := settings["jwt_private_key"].value; err != nil || got != strings.TrimSpace(value) {
			t.Fatalf("%q: value %q, %v; want %q", text, got, err, value)
		}
	})
}

// parsedEvent returns the problem by which parseEvent ends as an error.
func parsedEvent(body []byte) (ev *event, err error) {
	defer catch(&err)
	return parseEvent(body), nil
}

// FuzzEvent: what is accepted goes out as compact JSON that means what was posted.
func FuzzEvent(f *testing.F) {
	f.Add([]byte(capturedUpdate))
	f.Add([]byte(lockPosted(repoA, "/a")))
	f.Add([]byte(permEvent("user", "bob@example.com", "-1")))
	f.Add([]byte(permEvent("group", "", "1")))
	f.Add([]byte(`{"type":"comment-update","content":{"repo_id":"x","type":"comment_updated","file_uuid":"u","file_path":"/<é\u2028"}}`))
	f.Add([]byte(` {"content":null,"CONTENT" : {"repo_id":"x", "n":1.0e0} ,"Type":"repo-update"} `))
	f.Fuzz(func(t *testing.T, body []byte) {
		ev, err := parsedEvent(body)
		if err != nil {
			if err.Error() == "" || strings.Contains(err.Error(), "\n") {
				t.Fatalf("%q: %+v, %q", body, ev, err)
			}
			return
		}
		var compact bytes.Buffer
		if err := json.Compact(&compact, ev.text); err != nil || !bytes.Equal(compact.Bytes(), ev.text) || !utf8.Valid(ev.text) {
			t.Fatalf("%q: the frame is %q, %v", body, ev.text, err)
		}
		var out struct {
			Type    string          `json:"type"`
			Content json.RawMessage `json:"content"`
		}
		dec := json.NewDecoder(bytes.NewReader(ev.text))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&out); err != nil || out.Type != ev.kind || !strings.HasPrefix(string(ev.text), `{"type":"`+ev.kind+`","content":{`) {
			t.Fatalf("%q: the frame is %q, %v", body, ev.text, err)
		}
		posted := foldedFields(body, "content")
		if len(posted) == 0 || !sameJSON(out.Content, posted[len(posted)-1]) {
			t.Fatalf("%q: the content is %q", body, out.Content)
		}
		known := map[string]bool{"repo-update": true, "file-lock-changed": true, "folder-perm-changed": true, "comment-update": true}
		if !json.Valid(body) || ev.repoID == "" || !known[ev.kind] || (ev.kind == "folder-perm-changed") != (ev.user != "" || ev.group != nil) || ev.user != "" && ev.group != nil {
			t.Fatalf("%q: accepted as %+v", body, ev)
		}
	})
}

// FuzzReply: members are those that a whole reply without an error names.
func FuzzReply(f *testing.F) {
	for _, reply := range []string{capturedMembers, capturedNull, capturedNoFunction, capturedNoService, capturedMembers[:40], "\xff\xff\xff\xff{}", "\x02\x00\x00\x00{}", "\x0b\x00\x00\x00{\"ret\":[]}"} {
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
		ret := foldedFields(text, "ret")
		if members == nil || len(ret) == 0 || !json.Valid(text) {
			t.Fatalf("%q: members %v", data, members)
		}
		for name := range members {
			if quoted, _ := json.Marshal(name); name == "" || !bytes.Contains(text, quoted) && !bytes.ContainsAny(text, "\\<>&\x7f\u2028\u2029\ufffd") && utf8.Valid(text) {
				t.Fatalf("%q: who is %q?", data, name)
			}
		}
	})
}

// A fuzzedServer has a healthy client beside the fuzzed ones.
type fuzzedServer struct {
	*testServer
	neighbour *client
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
	s.out.mu.Lock()
	s.out.buf.Reset() // it would grow all the time
	s.out.mu.Unlock()
	s.events++
	e := lockPosted(repoB, strconv.Itoa(s.events))
	s.neighbour.t = t
	s.neighbour.nc.SetDeadline(time.Now().Add(patient))
	post(t, s.addr, e, 1)
	s.neighbour.expect(opText, e)
	s.neighbour.sync()
}

// FuzzClientMessage: a message is either carried out, each refused library being
// told, or it ends that connection with 1007 or 1008 and a reason.
func FuzzClientMessage(f *testing.F) {
	f.Add([]byte(capturedMessage))
	f.Add([]byte(`{"type":"subscribe","content":{"repos":[{"id":"` + repoA + `","jwt_token":"` + capturedLibrary + `"},{"id":"x\n","jwt_token":"x"}]}}`))
	f.Add([]byte(`{"type":"unsubscribe","content":{"repos":[{"id":"` + repoA + `"}]}}`))
	f.Add([]byte(`{"type":"subscribe","content":{"repos":null}}`))
	f.Add([]byte("{\"type\":\"\xff\"}"))
	s := startFuzzedServer(f)
	f.Fuzz(func(t *testing.T, message []byte) {
		c := connect(t, s.addr, asBrowser)
		defer c.nc.Close()
		c.nc.SetReadDeadline(time.Now().Add(patient))
		c.text(string(message))
		c.write(maskedFrame(0x80|opPing, []byte("done")))
		told := 0
		for done := false; !done; {
			opcode, payload, err := c.read()
			if err != nil {
				t.Fatalf("%q: %v", message, err)
			}
			switch opcode {
			case opText:
				var m struct {
					Type    string `json:"type"`
					Content struct {
						RepoID string `json:"repo_id"`
					} `json:"content"`
				}
				if told++; json.Unmarshal(payload, &m) != nil || m.Type != "jwt-expired" || m.Content.RepoID == "" {
					t.Fatalf("%q: answered %q", message, payload)
				}
			case opPong:
				if done = true; !json.Valid(message) || !utf8.Valid(message) || told > bytes.Count(message, []byte("{")) {
					t.Fatalf("%q: accepted, with %d answers", message, told)
				}
			case opClose:
				status := binary.BigEndian.Uint16(payload)
				if want := uint16(1008); !utf8.Valid(message) && status != 1007 || utf8.Valid(message) && status != want || len(payload) < 3 {
					t.Fatalf("%q: closed with %d %q", message, status, payload[2:])
				}
				done = true
			default:
				t.Fatalf("%q: frame %d %q", message, opcode, payload)
			}
		}
		s.healthy(t)
	})
}

// FuzzFrames: whatever a client sends, before or after the upgrade, its
// connection ends when it has sent all, each answer is well-formed, and its
// neighbour notices nothing.
func FuzzFrames(f *testing.F) {
	segment := capturedSegment(f)
	f.Add(true, segment)
	f.Add(true, segment[:100])
	f.Add(true, []byte("\x81\xff\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Add(true, []byte("\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00"))
	f.Add(true, []byte("\x01\x81\x00\x00\x00\x00{\x89\x80\x00\x00\x00\x00\x80\x81\x00\x00\x00\x00}"))
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
		var c *client
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

// rawConn is a connection on which nothing was sent yet.
func rawConn(t testing.TB, addr string) *client {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	return &client{t: t, nc: nc, br: bufio.NewReader(nc)}
}

// ---- Slow and dead clients, floods, faults, metrics ----

// ---- A clock that fails ----

// faultyClock is the clock of a server that a test started with startSelf. The
// file named fault tells what ails it: a duration by which the time of day is
// off, or "panic", upon which the next look at the clock panics, once, unless it
// is the main loop that looks.
func faultyClock(fault string) clock {
	start := time.Now()
	wall := func() time.Time {
		text, _ := os.ReadFile(fault)
		if string(text) == "panic" && !bytes.Contains(debug.Stack(), []byte(".run(")) && os.Remove(fault) == nil {
			panic("the clock is broken")
		}
		offset, _ := time.ParseDuration(string(text))
		return time.Now().Add(offset)
	}
	return clock{wall: wall, uptime: func() time.Duration { return time.Since(start) }}
}

// startSelf starts this test binary as a server on port with a faultyClock, and
// waits until it answers.
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

// ---- What the tests of faults and floods share ----

// underRace tells that this binary was built with -race, which takes ten times
// the CPU: the big tests then do less.
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

// A metered is the real binary, with metrics.
type metered struct {
	*process
	addr, dir string
	metrics   string // its address
}

// startMetered starts the real binary with metrics, and with a limit of open
// files where one is given.
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
	m.process = start(t, nil, "sh", append([]string{"-c", fmt.Sprintf(`ulimit -n %d; exec "$0" "$@"`, files), buildBinary(t)}, args...)...)
	m.waitPing(m.addr)
	return m
}

// scrape returns the metrics by their name with its labels.
func scrape(t testing.TB, addr string) map[string]float64 {
	t.Helper()
	answer, text := request(t, "GET", "http://"+addr+"/metrics", "")
	if answer.StatusCode != http.StatusOK {
		t.Fatalf("/metrics answers %s", answer.Status)
	}
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

// A footprint is what a server takes of its machine.
type footprint struct{ goroutines, files, connections, subscriptions, mib float64 }

func (m *metered) footprint() footprint {
	m.t.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", m.Process.Pid))
	if err != nil {
		m.t.Fatal(err)
	}
	v := scrape(m.t, m.metrics)
	return footprint{v["go_goroutines"], float64(len(files)), v["connections"], v["subscriptions"], v["process_resident_memory_bytes"] / (1 << 20)}
}

func (f footprint) String() string {
	return fmt.Sprintf("%.0f goroutines, %.0f files, %.0f connections, %.1f MiB", f.goroutines, f.files, f.connections, f.mib)
}

// returnsTo waits until the server takes no more than it did before, but for a
// few pooled connections, and for the given MiB, which are the runtime's slack.
func (m *metered) returnsTo(before footprint, slack float64) {
	m.t.Helper()
	now := before
	for end := time.Now().Add(2 * patient); ; time.Sleep(50 * time.Millisecond) {
		now = m.footprint()
		if now.goroutines <= before.goroutines+4 && now.files <= before.files+4 && now.connections <= before.connections && now.subscriptions <= before.subscriptions && now.mib <= before.mib+slack*raceFactor() {
			return
		}
		if time.Now().After(end) {
			m.t.Fatalf("after the flood there are %v; before it %v", now, before)
		}
	}
}

// numbered is an event of size bytes that no other takes the place of.
func numbered(repoID string, n, size int) string {
	text := fmt.Sprintf(`{"type":"file-lock-changed","content":{"repo_id":%q,"path":"/%06d","change_event":"locked","lock_user":""}}`, repoID, n)
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

// subscribers posts an event, which must be accepted, and returns for how many.
func subscribers(t testing.TB, addr, body string) (n int) {
	t.Helper()
	answer, text := request(t, "POST", "http://"+addr+"/events", body, "Authorization: Token "+eventToken(later()))
	if _, err := fmt.Sscanf(text, `{"subscribers":%d}`, &n); err != nil || answer.StatusCode != 200 {
		t.Fatalf("event answered %d %q", answer.StatusCode, text)
	}
	return n
}

// nextTo runs flood, and posts events as long as it lasts, all of which a healthy
// client next to it must get. It returns how long the slowest took.
func nextTo(t testing.TB, addr string, flood func()) (slowest time.Duration) {
	t.Helper()
	healthy := connect(t, addr, asDesktop).subscribed(repoA, "healthy@example.com")
	done := make(chan bool)
	go func() { defer close(done); flood() }()
	for n, going := 0, true; going; n++ {
		select {
		case <-done:
			going = false // and one event more
		case <-time.After(20 * time.Millisecond):
		}
		event, posted := numbered(repoA, n, 0), time.Now()
		post(t, addr, event, 1)
		healthy.nc.SetDeadline(time.Now().Add(patient))
		healthy.expect(opText, event)
		slowest = max(slowest, time.Since(posted))
		healthy.sync()
	}
	healthy.write(maskedFrame(0x80|opClose, nil))
	healthy.expectClose(statusNo)
	return slowest
}

// ---- Slow clients ----

// readNumbered reads numbered events, which must come without a gap from the
// first on, until something else comes. It returns how many came, and that.
func (c *client) readNumbered() (n int, opcode byte, payload []byte, err error) {
	c.t.Helper()
	c.nc.SetReadDeadline(time.Now().Add(patient))
	for ; ; n++ {
		if opcode, payload, err = c.read(); err != nil || opcode != opText {
			return n, opcode, payload, err
		}
		if got := numberOf(payload); got != n {
			c.t.Fatalf("event %d came where %d was due", got, n)
		}
	}
}

func TestOutboxIsBounded(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		size    int // of each event
		waiting int // when the outbox is full, besides the one being written
		told    bool
	}{
		{"1,024 messages", 200, 1023, true},
		{"1 MiB", 16 << 10, 62, true}, // 63 frames of 16 KiB and their headers
		{"client that does not even read that it is closed", 16 << 10, 62, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			slow := connect(t, s.addr, asBrowser).subscribed(repoA, "slow@example.com")
			swift := connect(t, s.addr, asBrowser).subscribed(repoA, "swift@example.com")
			accepted := 0
			for ; accepted < 10000; accepted++ {
				event := numbered(repoA, accepted, tc.size)
				n := subscribers(t, s.addr, event)
				swift.expect(opText, event)
				if n == 1 {
					break
				}
			}
			if !tc.told {
				waitFor(t, "the slow client is let go", func() bool { return s.clients.Load() == 1 })
			}
			got, opcode, payload, err := slow.readNumbered()
			switch {
			case !tc.told && (err == nil && opcode != opClose || got == 0 || got > accepted-tc.waiting):
				t.Errorf("of %d events the client got %d and then frame %d %q, %v", accepted, got, opcode, payload, err)
			case tc.told && (opcode != opClose || len(payload) < 2 || binary.BigEndian.Uint16(payload) != statusTryLater || string(payload[2:]) != "too slow"):
				t.Errorf("after %d events came frame %d %q, %v", got, opcode, payload, err)
			case tc.told && accepted-got != tc.waiting:
				t.Errorf("%d events were accepted, and %d delivered; want %d less", accepted, got, tc.waiting)
			}
			want := slow.nc.LocalAddr().String() + ": closed, since its outbox is full: the client, or the network to it, is too slow"
			waitFor(t, "the log says "+want, func() bool { return strings.Contains(s.out.String(), want) })
			waitForFigure(t, s, "closed_total", "outbox-full")
			waitFor(t, "the slow client is let go", func() bool { return s.clients.Load() == 1 })
			last := numbered(repoA, 0, 0)
			post(t, s.addr, last, 1)
			swift.expect(opText, last)
		})
	}
}

// A client that reads late, but reads, gets the newest update of each library,
// and all that does not go out of date, and is not dropped.
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
				post(t, s.addr, update(repoA, fmt.Sprintf("%06d%s", n, padding)), 1)
				post(t, s.addr, update(repoB, fmt.Sprintf("%06d%s", n, padding)), 1)
				if n%(updates/locks) == 0 {
					post(t, s.addr, numbered(repoA, n/(updates/locks), 2000), 1)
				}
			}
			late.nc.SetReadDeadline(time.Now().Add(patient))
			newest, lock, frames := map[string]int{repoA: -1, repoB: -1}, 0, 0
			for ; newest[repoA] < updates-1 || newest[repoB] < updates-1 || lock < locks; frames++ {
				opcode, payload, err := late.read()
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
			post(t, s.addr, update(repoA, "last"), 1)
			late.expect(opText, update(repoA, "last"))
		})
	}
}

// unwritten returns how many bytes wait in all outboxes: the kernel has not taken them.
func unwritten(s *testServer) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.mu.Lock()
		n += c.bytes - c.written
		c.mu.Unlock()
	}
	return n
}

// The kernel of a server that is waiting to write says that there is room only when much is: of
// a buffer of some MiB, a client that reads slowly would seem not to read at all.
func TestSlowReaderIsSeenToRead(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	slow := connect(t, s.addr, asBrowser)
	slow.nc.(*net.TCPConn).SetReadBuffer(8 << 10)
	slow.subscribed(repoA, "slow@example.com")
	events := 0
	for ; unwritten(s) < maxOutboxBytes*3/4; events++ {
		if events > 1000 {
			t.Fatal("the kernel takes all")
		}
		post(t, s.addr, numbered(repoA, events, 16<<10), 1)
	}
	before := unwritten(s)
	for n := range 20 { // 320 KiB
		slow.expect(opText, numbered(repoA, n, 16<<10))
	}
	waitFor(t, "more is written", func() bool { return unwritten(s) < before })
}

func TestStuckClientIsClosed(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	addr := s.addr
	stuck := connect(t, addr, asBrowser).subscribed(repoA, "stuck@example.com")
	slow := connect(t, addr, asBrowser).subscribed(repoA, "slow@example.com")
	const events = 60 // of 16 KiB: less than the outbox holds, more than the kernel does
	for n := range events {
		post(t, s.addr, numbered(repoA, n, 16<<10), 2)
	}
	last, since := unwritten(s), time.Now()
	waitFor(t, "the kernel takes no more", func() bool { // it can acknowledge, and so make room, 200 ms late
		if n := unwritten(s); n != last {
			last, since = n, time.Now()
		}
		return time.Since(since) > time.Second
	})
	s.time.advance(writeWait - time.Second)
	s.sweep()
	if n := subscribers(t, s.addr, numbered(repoA, events, 0)); n != 2 {
		t.Fatalf("%d of 2 clients are left before %v", n, writeWait)
	}
	for n := range events / 2 { // more than the kernel holds: so something was written now
		slow.expect(opText, numbered(repoA, n, 16<<10))
	}
	s.time.advance(time.Second)
	s.sweep()
	waitFor(t, "the stuck client is let go", func() bool { return s.clients.Load() == 1 })
	post(t, s.addr, numbered(repoA, events+1, 0), 1)
	want := stuck.nc.LocalAddr().String() + ": closed, since nothing could be written for 20s: the client, or the network to it, is too slow"
	waitFor(t, "the log says "+want, func() bool { return strings.Contains(s.out.String(), want) })
	if strings.Contains(s.out.String(), slow.nc.LocalAddr().String()+": closed") {
		t.Errorf("the log must say nothing like it of the slow client")
	}
	waitForFigure(t, s, "closed_total", "stalled")
	if n, opcode, _, err := stuck.readNumbered(); err == nil || n == 0 || n > events {
		t.Errorf("the stuck client got %d events, then frame %d, %v", n, opcode, err)
	}
	for n := events / 2; n < events; n++ {
		slow.expect(opText, numbered(repoA, n, 16<<10))
	}
	slow.expect(opText, numbered(repoA, events, 0))
	slow.expect(opPing, "") // it was silent, and is not dead
	slow.expect(opText, numbered(repoA, events+1, 0))
}

// One client that does not read, among many, under 3,000 events of 16 KiB: the
// others get all of them in order and no later than before, and the memory of the
// server stays where it was.
func TestOneStuckAmongMany(t *testing.T) {
	t.Parallel()
	s := startMetered(t, 0)
	const size, alone = 16 << 10, 300 // the first 300 events come without the stuck client
	clients, events := howMany(100, 10), 3000
	if underRace() {
		events = 1200
	}
	connections := make([]*client, clients)
	for i := range connections {
		connections[i] = connect(t, s.addr, asBrowser).subscribed(repoA, "healthy@example.com")
	}
	got := make(chan error, clients)
	for _, c := range connections {
		go func() {
			c.nc.SetDeadline(time.Now().Add(10 * time.Minute))
			r, buf := bufio.NewReaderSize(c.nc, 64<<10), make([]byte, 4+size) // frames of this size have a header of 4 bytes
			for n := range events {
				if n%20 == 0 { // who is not silent is not pinged
					c.write(maskedFrame(0x80|opPong, nil))
				}
				_, err := io.ReadFull(r, buf)
				if err == nil && (buf[0] != 0x80|opText || numberOf(buf[4:200]) != n || buf[len(buf)-1] != '}') {
					err = fmt.Errorf("%.100q came where event %d was due", buf, n)
				}
				if got <- err; err != nil {
					return
				}
			}
		}()
	}
	var stuck *client
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
	t.Logf("%d clients: an event took %v on average, %v with one client stuck; memory %.1f MiB, %.1f MiB", clients, latency[0], latency[1], memory[0], memory[1])
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
		opcode, payload, err := stuck.read()
		if err != nil || opcode == opClose {
			break
		}
		if numberOf(payload) != n {
			t.Fatalf("the stuck client got %d where %d was due", numberOf(payload), n)
		}
	}
}

// ---- The desktop client's limits ----

func TestDesktopGets4096Bytes(t *testing.T) {
	t.Parallel()
	spaced := func(event string) string { return strings.ReplaceAll(event, ":", " :\n\t ") }
	for _, tc := range []struct {
		name, posted, event string
		fits                bool
	}{
		{"4,096 bytes", numbered(repoA, 1, 4096), numbered(repoA, 1, 4096), true},
		{"4,096 bytes when compact", spaced(numbered(repoA, 1, 4096)), numbered(repoA, 1, 4096), true},
		{"4,097 bytes", numbered(repoA, 1, 4097), numbered(repoA, 1, 4097), false},
		{"update of 4,097 bytes", update(repoA, strings.Repeat("c", 4097-len(update(repoA, "")))), update(repoA, strings.Repeat("c", 4097-len(update(repoA, "")))), false},
		{"1 MB", numbered(repoA, 1, 1e6), numbered(repoA, 1, 1e6), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			desktop := connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com")
			browser := connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com")
			other := connect(t, s.addr, asDesktop).subscribed(repoB, "alice@example.com")
			subscribers(t, s.addr, tc.posted)
			browser.expect(opText, tc.event)
			if tc.fits {
				desktop.expect(opText, tc.event)
				desktop.sync()
			} else if reason := desktop.expectClose(statusRestart); reason != "an event is too long for this client" {
				t.Errorf("closed with the reason %q", reason)
			} else {
				waitForFigure(t, s, "closed_total", "too-long")
			}
			browser.sync()
			other.sync()
		})
	}
}

func TestUpdatesAreRepeated(t *testing.T) {
	t.Parallel()
	type step struct {
		after time.Duration // since the step before; the sweep runs each second of it
		post  string        // a commit, or "" for none
		again string        // the repeated commit that the desktop client has got in that time, or ""
	}
	const s = time.Second
	for _, tc := range []struct {
		name  string
		steps []step
	}{
		{"a lone update is not repeated", []step{{0, "1", ""}, {5 * time.Minute, "", ""}}},
		{"the second within 30 s is, once, after 4 s", []step{{0, "1", ""}, {29 * s, "2", ""}, {3 * s, "", ""}, {s, "", "2"}, {5 * time.Minute, "", ""}}},
		{"the second after 30 s is not", []step{{0, "1", ""}, {30 * s, "2", ""}, {5 * time.Minute, "", ""}}},
		{"only the newest is", []step{{0, "1", ""}, {s, "2", ""}, {3 * s, "3", ""}, {3 * s, "4", ""}, {3 * s, "", ""}, {s, "", "4"}, {time.Minute, "", ""}}},
		{"the next one after a repeat is repeated again", []step{{0, "1", ""}, {s, "2", ""}, {4 * s, "", "2"}, {25 * s, "3", ""}, {4 * s, "", "3"}, {31 * s, "4", ""}, {time.Minute, "", ""}}},
		{"after a pause it begins anew", []step{{0, "1", ""}, {s, "2", ""}, {4 * s, "", "2"}, {26 * s, "3", ""}, {time.Minute, "", ""}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t)
			desktop := connect(t, srv.addr, asDesktop).subscribed(repoA, "alice@example.com")
			browser := connect(t, srv.addr, asBrowser).subscribed(repoA, "alice@example.com")
			other := connect(t, srv.addr, asDesktop).subscribed(repoB, "alice@example.com")
			for i, st := range tc.steps {
				for range st.after / time.Second {
					srv.time.advance(time.Second)
					for _, c := range []*client{desktop, browser, other} { // as clients do, and so they are not pinged
						c.write(maskedFrame(0x80|opPong, nil))
					}
					browser.sync()
					other.sync()
					if st.again == "" {
						desktop.sync()
					}
					srv.sweep()
				}
				if st.again != "" {
					desktop.nc.SetReadDeadline(time.Now().Add(patient))
					seen := 0
					for desktop.write(maskedFrame(0x80|opPing, []byte("end"))); ; {
						opcode, payload, err := desktop.read()
						if err != nil {
							t.Fatalf("step %d: %v", i+1, err)
						}
						if opcode == opPong {
							break
						}
						if string(payload) != update(repoA, st.again) {
							t.Fatalf("step %d: %q was repeated", i+1, payload)
						}
						seen++
					}
					if seen != 1 {
						t.Fatalf("step %d: update %s was repeated %d times", i+1, st.again, seen)
					}
				}
				desktop.sync() // nothing else has come
				if st.post != "" {
					post(t, srv.addr, update(repoA, st.post), 2)
					desktop.expect(opText, update(repoA, st.post))
					browser.expect(opText, update(repoA, st.post))
				}
			}
			// Other events are never repeated.
			for n := range 2 {
				post(t, srv.addr, numbered(repoB, n, 0), 1)
				other.expect(opText, numbered(repoB, n, 0))
			}
			srv.time.advance(4 * time.Second)
			srv.sweep()
			other.sync()
		})
	}
}

// For 200 libraries with an update to be repeated, the real binary holds not one
// goroutine more; and it repeats them by itself.
func TestRepeatHoldsNoGoroutine(t *testing.T) {
	t.Parallel()
	s := startMetered(t, 0)
	const libraries = 200
	clients := make([]*client, libraries)
	repo := func(i int) string { return fmt.Sprintf("5f1c8d0e-0000-4000-8000-%012d", i) }
	for i := range clients {
		clients[i] = connect(t, s.addr, asDesktop).subscribed(repo(i), "alice@example.com")
	}
	var before float64
	waitFor(t, "the goroutines that upgraded the clients end", func() bool {
		before = s.footprint().goroutines
		return before < libraries+20
	})
	for _, commit := range []string{"1", "2"} {
		for i, c := range clients {
			post(t, s.addr, update(repo(i), commit), 1)
			c.expect(opText, update(repo(i), commit))
		}
	}
	posted := time.Now()
	if during := s.footprint().goroutines; during > before+10 {
		t.Errorf("%.0f goroutines before %d repeats are due, %.0f while they are", before, libraries, during)
	}
	for i, c := range clients {
		c.expect(opText, update(repo(i), "2"))
	}
	if took := time.Since(posted); took < 3*time.Second {
		t.Errorf("the last repeat came %v after its update, want 4 to 5 s", took)
	}
}

// ---- Dead and idle clients ----

// settle returns when the server has handled all that c sent before, and has also
// done with writing its answers. The client may have read them before that, and
// then, if the clock was moved on, the server would take it for stuck.
func settle(s *testServer, c *client) {
	s.t.Helper()
	mark := fmt.Sprintf("settled-%d", marks.Add(1))
	c.text(fmt.Sprintf(`{"type":"unsubscribe","content":{"repos":[{"id":%q}]}}`, mark))
	waitFor(s.t, "the server has read "+mark, func() bool { return strings.Contains(s.out.String(), `unsubscribed from "`+mark+`"`) })
}

var marks atomic.Int64

// age lets time pass, second by second.
func age(s *testServer, d time.Duration) {
	for range d / time.Second {
		s.advance(time.Second)
	}
}

func TestSilentClientIsPingedThenClosed(t *testing.T) {
	t.Parallel()
	for _, lines := range []string{asDesktop, asBrowser} {
		t.Run(lines[:15], func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			silent := connect(t, s.addr, lines).subscribed(repoA, "silent@example.com")
			settle(s, silent)
			for second := 1; second <= 60; second++ {
				s.time.advance(time.Second)
				s.sweep()
				switch second {
				case 20, 40:
					silent.expect(opPing, "")
				case 59:
					post(t, s.addr, update(repoA, "1"), 1)
					silent.expect(opText, update(repoA, "1")) // and no ping before it
				}
			}
			if reason := silent.expectClose(statusPolicy); reason != "no frame for 60 s" {
				t.Errorf("closed with the reason %q", reason)
			}
			waitFor(t, "its subscription is gone", func() bool { return subscribers(t, s.addr, update(repoA, "2")) == 0 })
			waitFor(t, "its connection is gone", func() bool { return s.clients.Load() == 0 })
			waitForFigure(t, s, "closed_total", "silent")
		})
	}
}

// A client that is gone without a word does not even answer the close frame.
func TestDeadClientIsLetGo(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	settle(s, connect(t, s.addr, asDesktop).subscribed(repoA, "dead@example.com"))
	age(s, deadAfter)
	waitFor(t, "its connection and subscription are gone", func() bool { return s.clients.Load() == 0 })
	post(t, s.addr, update(repoA, "1"), 0)
}

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
		{"a subscribe", 10, maskedFrame(0x80|opText, fmt.Appendf(nil, `{"type":"subscribe","content":{"repos":[{"id":%q,"jwt_token":%q}]}}`, repoA, clientToken(repoA, "u", later()))), 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			c := connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com")
			for second := 1; second <= 200; second++ {
				s.time.advance(time.Second)
				if second%tc.every == 0 {
					c.write(tc.frame)
					c.nc.SetReadDeadline(time.Now().Add(patient))
					if tc.reply != 0 {
						if opcode, payload, err := c.read(); opcode != tc.reply {
							t.Fatalf("second %d: frame %d %q, %v", second, opcode, payload, err)
						}
					} else {
						c.sync()
					}
				}
				s.sweep()
			}
			c.sync()
		})
	}
	t.Run("an answered ping keeps a browser for hours", func(t *testing.T) {
		t.Parallel()
		s := startServer(t)
		c := connect(t, s.addr, asBrowser).subscribed(repoA, "alice@example.com")
		for range 3 * 180 {
			settle(s, c) // the browser's pong
			age(s, pingAfter)
			c.expect(opPing, "")
			c.write(maskedFrame(0x80|opPong, nil))
		}
		post(t, s.addr, update(repoA, "1"), 1)
		c.expect(opText, update(repoA, "1"))
	})
}

func TestNoSubscriptionForTwoMinutes(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	never := connect(t, s.addr, asBrowser)
	never.sync()
	hoards := connect(t, s.addr, asBrowser) // who unsubscribes from what it never had
	left := connect(t, s.addr, asDesktop).subscribed(repoA, "left@example.com")
	stays := connect(t, s.addr, asDesktop).subscribed(repoA, "stays@example.com")
	talk := func(d time.Duration, clients ...*client) { // they talk, so it is not silence that closes them
		t.Helper()
		for range d / (10 * time.Second) {
			s.time.advance(10 * time.Second)
			for _, c := range clients {
				c.sync()
			}
			s.sweep()
		}
	}
	talk(time.Minute, never, hoards, left, stays)
	left.text(fmt.Sprintf(`{"type":"unsubscribe","content":{"repos":[{"id":%q}]}}`, repoA))
	left.sync()
	hoards.text(`{"type":"unsubscribe","content":{"repos":[{"id":"never"}]}}`)
	talk(time.Minute, never, hoards, left, stays)
	hoards.expectClose(statusPolicy)
	waitForFigure(t, s, "closed_total", "idle")
	if reason := never.expectClose(statusPolicy); reason != "no subscription for 2 minutes" {
		t.Errorf("closed with the reason %q", reason)
	}
	talk(50*time.Second, left, stays)
	talk(10*time.Second, left, stays)
	left.expectClose(statusPolicy)
	talk(5*time.Minute, stays)
	stays.sync()
}

func TestRefusedSubscriptions(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	c := connect(t, s.addr, asDesktop)
	bad := signToken("another key", `{"alg":"HS256"}`, fmt.Sprintf(`{"exp":%d,"repo_id":%q,"username":"u"}`, later().Unix(), repoA))
	refused := func(n int) {
		t.Helper()
		for range n { // one a message, as the desktop client does
			c.subscribe(repoA, bad)
			c.expect(opText, expiredText(repoA))
		}
	}
	refused(maxRefused - 1)
	c.subscribed(repoA, "alice@example.com") // one that holds: the count begins anew
	refused(maxRefused - 1)
	if log := s.out.String(); strings.Contains(log, "refused subscriptions in a row") {
		t.Fatal("closed too early")
	}
	c.subscribe(repoA, bad)
	if reason := c.expectClose(statusPolicy); reason != "too many refused subscriptions" {
		t.Errorf("closed with the reason %q", reason)
	}
	want := "closed after 1000 refused subscriptions in a row; the last one: the token's signature does not match: jwt_private_key differs between here and seaf-server or Seahub, or one of them was not restarted since it changed"
	if log := s.out.String(); !strings.Contains(log, want) {
		t.Errorf("the log does not say %q", want)
	} else if n := strings.Count(log, "refused: "); n != 1 {
		t.Errorf("the log names a refused subscription %d times in a minute", n)
	}
	post(t, s.addr, update(repoA, "1"), 0)

	// All in one message are as many.
	c = connect(t, s.addr, asBrowser)
	repo := fmt.Sprintf(`{"id":%q,"jwt_token":"x"},`, repoA)
	c.text(`{"type":"subscribe","content":{"repos":[` + strings.TrimSuffix(strings.Repeat(repo, 3000), ",") + `]}}`)
	c.expectClose(statusPolicy)
	waitForFigure(t, s, "closed_total", "refused")
}

// Once for real: the binary, not asked to, pings a silent client, but not one that talks.
func TestPingForReal(t *testing.T) {
	t.Parallel()
	s := startMetered(t, 0)
	silent := connect(t, s.addr, asBrowser).subscribed(repoA, "silent@example.com")
	since := time.Now()
	talking := connect(t, s.addr, asDesktop).subscribed(repoA, "talking@example.com")
	stop := make(chan bool)
	talked := make(chan error, 1)
	talking.nc.SetDeadline(time.Now().Add(4 * patient))
	go func() { // as the desktop client: an empty ping each second
		for {
			talking.write(maskedFrame(0x80|opPing, nil))
			if opcode, payload, err := talking.read(); opcode != opPong || len(payload) > 0 {
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
	silent.nc.SetDeadline(time.Now().Add(3 * patient))
	opcode, payload, err := silent.read()
	if took := time.Since(since); opcode != opPing || len(payload) > 0 || took < 19*time.Second || took > 25*time.Second {
		t.Errorf("after %v came frame %d %q, %v", took, opcode, payload, err)
	}
	close(stop)
	if err := <-talked; err != nil {
		t.Error(err)
	}
}

// ---- Floods and limits ----

func TestAllClientSlotsTaken(t *testing.T) {
	t.Parallel()
	const slots = 256 - reservedFiles
	s := startMetered(t, 256)
	s.says(fmt.Sprintf("at most %d clients, by the limit of open files", slots))
	clients := make([]*client, slots)
	for i := range clients {
		clients[i] = connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com")
	}
	for range 2 * reservedFiles { // their connections are not closed from this side, and must not take the reserve
		c := upgrade(t, s.addr, "/", asDesktop)
		if c.reply.StatusCode != http.StatusServiceUnavailable || c.reply.Header.Get("Retry-After") == "" {
			t.Fatalf("with %d clients there, another is answered %s, Retry-After %q", slots, c.reply.Status, c.reply.Header.Get("Retry-After"))
		}
	}
	fastest := patient
	for n := range 3 { // the tests next to this one can make one of them slow
		event, posted := numbered(repoA, n, 0), time.Now()
		post(t, s.addr, event, slots)
		for _, c := range clients {
			c.expect(opText, event)
		}
		fastest = min(fastest, time.Since(posted))
	}
	if fastest > time.Second {
		t.Errorf("with all slots taken, an event took %v", fastest)
	}
	if !pings(s.addr) {
		t.Error("with all slots taken, /ping does not answer")
	}
	if v := scrape(t, s.metrics); v["connections"] != slots || v[`refused_total{reason="full"}`] != 2*reservedFiles {
		t.Errorf("the metrics are %v", v)
	}
	want := fmt.Sprintf("refused: %d clients are connected; the limit of open files allows no more: raise it (ulimit -n, LimitNOFILE=)", slots)
	s.says(want)
	if n := strings.Count(s.out.String(), want); n != 1 {
		t.Errorf("the log says %d times %q", n, want)
	}
	for _, c := range clients[:reservedFiles] {
		c.nc.Close()
	}
	waitFor(t, "the slots come back", func() bool { return scrape(t, s.metrics)["connections"] == slots-reservedFiles })
	for range reservedFiles {
		connect(t, s.addr, asDesktop).subscribed(repoA, "bob@example.com")
	}
	post(t, s.addr, update(repoB, "2"), 0)
	if c := upgrade(t, s.addr, "/", asDesktop); c.reply.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("with all slots taken again, a client is answered %s", c.reply.Status)
	}
}

func TestSoftLimitIsRaised(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	p := start(t, nil, "sh", "-c", `ulimit -n 1000; ulimit -S -n 256; exec "$0" "$@"`, buildBinary(t), "-c", writeConfig(t, port))
	p.waitPing("127.0.0.1:" + port)
	clients := 0
	p.says("clients, by the limit of open files")
	_, after, _ := strings.Cut(p.out.String(), "at most ")
	fmt.Sscan(after, &clients)
	if clients < 999-reservedFiles || clients > 1000-reservedFiles { // Go raises it to one less
		t.Errorf("with a soft limit of 256 and a hard one of 1000, %d clients are allowed: %s", clients, p.out)
	}
}

// crowd runs f n times, at most width at a time, each with a function that opens
// a connection to addr. Those come from other addresses than all else here, so
// that no port of 127.0.0.1 runs out, and end with f at the latest.
func crowd(addr string, n, width int, f func(i int, nc net.Conn)) {
	var wg sync.WaitGroup
	slots := make(chan bool, width)
	for i := range n {
		slots <- true
		wg.Go(func() {
			defer func() { <-slots }()
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, byte(1+i/10%100), 1)}, Timeout: patient}
			if nc, err := d.Dial("tcp", addr); err == nil {
				nc.SetDeadline(time.Now().Add(3 * patient))
				f(i, nc)
				nc.Close()
			}
		})
	}
	wg.Wait()
}

const upgradeText = "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: Z5CJw/U24zCyiSivhdDLtQ==\r\n\r\n"

// upgraded upgrades a connection of a crowd and reports whether that worked.
func upgraded(nc net.Conn) bool {
	io.WriteString(nc, upgradeText)
	answer := make([]byte, 1024)
	n, err := nc.Read(answer)
	return err == nil && bytes.HasPrefix(answer[:n], []byte("HTTP/1.1 101 "))
}

// trickle writes text byte by byte, slowly, until the other side ends it, and
// returns after how long that was.
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

func TestFloods(t *testing.T) {
	t.Parallel()
	// random is a different stream for each i, and the same in each run.
	random := func(i, n int) []byte {
		p := make([]byte, n)
		mathrand.NewChaCha8([32]byte{byte(i), byte(i >> 8)}).Read(p)
		return p
	}
	for _, tc := range []struct {
		name  string
		flood func(t *testing.T, addr string)
	}{
		{"slow headers", func(t *testing.T, addr string) {
			crowd(addr, 300, 300, func(i int, nc net.Conn) {
				if took := trickle(nc, upgradeText[:len(upgradeText)-2]+"X: "); took > 15*time.Second {
					t.Errorf("slow headers were endured for %v", took)
				}
			})
		}},
		{"slow bodies", func(t *testing.T, addr string) {
			token := "Authorization: Token " + eventToken(later()) + "\r\n"
			crowd(addr, 300, 300, func(i int, nc net.Conn) {
				length := []int{1000, 1 << 20, 1 << 40}[i%3]
				fmt.Fprintf(nc, "POST /events HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n", []string{"", token}[i%2], length)
				if took := trickle(nc, `{"type":"repo-update"`+strings.Repeat(" ", 1000)); took > 25*time.Second {
					t.Errorf("a slow body was endured for %v", took)
				}
			})
		}},
		{"endless fragments", func(t *testing.T, addr string) {
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
				nc.Write(maskedFrame(opText, nil))
				for range 66 { // 1 MiB and 32 KiB
					nc.Write(bytes.Repeat(empty, i%2*100))
					nc.Write(more)
				}
				switch answer, err := io.ReadAll(nc); {
				case len(answer) >= 4 && answer[0] == 0x80|opClose && binary.BigEndian.Uint16(answer[2:]) == statusTooBig:
					told.Add(1)
				case len(answer) > 0 || os.IsTimeout(err): // a reset can overtake the close frame while the client still sends
					t.Errorf("endless fragments were answered %q, %v", answer, err)
				}
			})
			if told.Load() == 0 {
				t.Error("endless fragments were never answered with a close frame")
			}
		}},
		{"long messages at once", func(t *testing.T, addr string) {
			long := maskedFrame(0x80|opText, []byte(`{"type":"subscribe","content":{"repos":[`+strings.Repeat(`{},`, 340000)+`{}]}}`))
			all := make(chan bool)
			var begun atomic.Int64
			n := howMany(60, 20)
			crowd(addr, n, n, func(i int, nc net.Conn) {
				good := upgraded(nc)
				nc.Write(long[:len(long)-1])
				if begun.Add(1) == int64(n) {
					close(all)
				}
				<-all
				nc.Write(long[len(long)-1:])
				if answer, err := io.ReadAll(nc); !good || len(answer) < 4 || binary.BigEndian.Uint16(answer[2:]) != statusPolicy {
					t.Errorf("answered %q, %v", answer, err)
				}
			})
		}},
		{"frames of 2^63 bytes", func(t *testing.T, addr string) {
			crowd(addr, 600, 50, func(i int, nc net.Conn) {
				if t.Failed() {
					return // one complaint is enough
				}
				if nc.SetDeadline(time.Now().Add(patient)); !upgraded(nc) {
					t.Error("no upgrade")
					return
				}
				size := []uint64{1 << 63, 1<<63 - 1, 1<<64 - 1, 1 << 62, 1 << 31, 1<<20 + 1}[i%6]
				opcode := []byte{0x80 | opText, opText, 0x80 | opBinary}[i%3]
				nc.Write(append(binary.BigEndian.AppendUint64([]byte{opcode, 0x80 | 127}, size), random(i, 100)...))
				answer, _ := io.ReadAll(nc)
				if len(answer) < 4 || answer[0] != 0x80|opClose || binary.BigEndian.Uint16(answer[2:]) != statusTooBig {
					t.Errorf("a frame of %d bytes was answered %q", size, answer)
				}
			})
		}},
		{"come and go", func(t *testing.T, addr string) {
			subscribe := maskedFrame(0x80|opText, fmt.Appendf(nil, `{"type":"subscribe","content":{"repos":[{"id":%q,"jwt_token":%q}]}}`, repoB, clientToken(repoB, "u", later())))
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
					nc.Write(append(append([]byte(upgradeText), subscribe...), maskedFrame(0x80|opClose, nil)...))
					io.Copy(io.Discard, nc)
				case 5: // in the midst of a frame
					upgraded(nc)
					nc.Write(subscribe[:len(subscribe)/2])
				}
				if i%2 == 0 {
					nc.(*net.TCPConn).SetLinger(0) // a reset, not an end
				}
			})
		}},
		{"random bytes", func(t *testing.T, addr string) {
			subscribe := fmt.Sprintf(`{"type":"subscribe","content":{"repos":[{"id":%q,"jwt_token":%q}]}}`, repoB, clientToken(repoB, "u", later()))
			crowd(addr, howMany(2000, 500), 50, func(i int, nc net.Conn) {
				noise := random(i, 1+i%3000)
				switch i % 8 {
				case 0:
					nc.Write(noise)
				case 1:
					fmt.Fprintf(nc, "GET /%s HTTP/1.1\r\n", noise)
				case 2:
					fmt.Fprintf(nc, "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n%s\r\n\r\n", noise)
				case 3:
					fmt.Fprintf(nc, "POST /events HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nAuthorization: Token %s\r\n\r\n%s", len(noise), eventToken(later()), noise)
				case 4:
					upgraded(nc)
					nc.Write(noise)
				case 5:
					upgraded(nc)
					nc.Write(maskedFrame(0x80|opText, noise))
				case 6:
					upgraded(nc)
					nc.Write(append(maskedFrame(0x80|opText, []byte(subscribe)), noise...))
				case 7: // one byte of a good message is another
					text := []byte(subscribe)
					text[int(noise[0])*len(text)/256] ^= noise[len(noise)-1]
					upgraded(nc)
					nc.Write(maskedFrame(0x80|opText, text))
				}
				nc.(*net.TCPConn).CloseWrite()
				io.Copy(io.Discard, nc)
			})
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := startMetered(t, 0)
			nextTo(t, s.addr, func() {}) // what is made once, and kept
			var before, during footprint
			waitFor(t, "all is as it was", func() bool { before = s.footprint(); return before.connections == 0 })
			begin := time.Now()
			slowest := nextTo(t, s.addr, func() {
				stop, stopped := make(chan bool), make(chan bool)
				go func() {
					defer close(stopped)
					for {
						select {
						case <-stop:
							return
						case <-time.After(100 * time.Millisecond):
							now := s.footprint()
							during = footprint{max(during.goroutines, now.goroutines), max(during.files, now.files), max(during.connections, now.connections), max(during.subscriptions, now.subscriptions), max(during.mib, now.mib)}
						}
					}
				}()
				tc.flood(t, s.addr)
				close(stop)
				<-stopped
			})
			took := time.Since(begin)
			s.returnsTo(before, 30)
			t.Logf("%v, an event took %v at most: before %v; during %v; after %v", took.Round(time.Millisecond), slowest.Round(time.Millisecond), before, during, s.footprint())
			if limit := 400 * raceFactor(); during.mib > limit {
				t.Errorf("it took %.0f MiB meanwhile, more than %.0f", during.mib, limit)
			}
			if log := s.out.String(); strings.Contains(log, "ERROR") || strings.Contains(log, "panic") {
				t.Errorf("the log has an error: %s", log)
			}
		})
	}
}

// ---- Faults ----

func TestKillAndRestart(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	addr, dir := "127.0.0.1:"+port, writeConfig(t, port)
	s := startBinary(t, port, nil, "-c", dir)
	clients := make([]*client, howMany(1000, 300))
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
	deliver := func(commit string) {
		t.Helper()
		post(t, addr, update(repoA, commit), len(clients))
		for _, c := range clients {
			c.expect(opText, update(repoA, commit))
		}
	}
	join()
	deliver("1")
	killed := time.Now()
	s.Process.Signal(syscall.SIGKILL)
	s.wait()
	for _, c := range clients {
		c.nc.SetReadDeadline(time.Now().Add(patient))
		if opcode, _, err := c.read(); err == nil || os.IsTimeout(err) {
			t.Fatalf("a client of the killed server got frame %d, %v", opcode, err)
		}
	}
	noticed := time.Since(killed)
	startBinary(t, port, nil, "-c", dir)
	up := time.Since(killed)
	join()
	deliver("2")
	t.Logf("%d clients: they noticed within %v; the server answered again after %v, and all had the next event after %v", len(clients), noticed, up, time.Since(killed))
}

func TestSeafServerFaults(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	addr, dir := "127.0.0.1:"+port, writeConfig(t, port)
	socket := filepath.Join(dir, "../seafile-data/seafile.sock")
	if err := os.Mkdir(filepath.Dir(socket), 0o755); err != nil {
		t.Fatal(err)
	}
	s := startBinary(t, port, nil, "-c", dir)
	bystander := connect(t, addr, asDesktop).subscribed(repoB, "bob@example.com")
	event := fmt.Sprintf(`{"type":"folder-perm-changed","content":{"repo_id":%q,"path":"/p","type":"group","change_event":"add","user":"","group":7,"perm":"r"}}`, repoA)
	good := rpcReply(`{"ret":[{"group-id":7,"user-name":"alice@example.com","is-staff":0}]}`)
	raw := func(text string) func(net.Conn) { return func(nc net.Conn) { io.WriteString(nc, text) } }
	hang := func(nc net.Conn) { io.Copy(io.Discard, nc) }
	ask := func() (status int, text string, took time.Duration) {
		begin := time.Now()
		answer, text := request(t, "POST", "http://"+addr+"/events", event, "Authorization: Token "+eventToken(later()))
		return answer.StatusCode, text, time.Since(begin)
	}
	for _, tc := range []struct {
		name  string
		reply func(net.Conn) // nil: nobody listens
	}{
		{"accepts and hangs", hang},
		{"garbage", raw("HTTP/1.1 400 Bad Request\r\n\r\n")},
		{"garbage of the length it says", rpcReply("\x00\xff garbage")},
		{"a huge length", raw("\xff\xff\xff\xff{}")},
		{"a reply of 9 MiB", rpcReply(`{"ret":[{"group-id":7,"user-name":"alice@example.com"}]` + strings.Repeat(" ", 9<<20) + "}")},
		{"a length that never comes", func(nc net.Conn) { io.WriteString(nc, "\x00\x00\x40\x00{}"); hang(nc) }},
		{"half an answer, and the end", raw("\x40\x00\x00\x00{\"ret\":[{\"group-id\":7,")},
		{"half a length", raw("\x40\x00")},
		{"the end at once", func(net.Conn) {}},
		{"byte by byte, for ever", func(nc net.Conn) {
			io.WriteString(nc, "\x00\x00\x10\x00")
			for _, err := nc.Write([]byte(" ")); err == nil; _, err = nc.Write([]byte(" ")) {
				time.Sleep(10 * time.Millisecond) // it is slow on purpose
			}
		}},
		{"a list of something else", rpcReply(`{"ret":[1,2]}`)},
		{"an error", rpcReply(`{"err_code":500,"err_msg":"db"}`)},
		{"gone since the question before", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			subscriber := connect(t, addr, asDesktop).subscribed(repoA, "alice@example.com")
			ss := startSeafServer(t, socket, good)
			if status, text, _ := ask(); status != 200 {
				t.Fatalf("with seaf-server there, an event for a group is answered %d %s", status, text)
			}
			subscriber.expect(opText, event)
			ss.ln.Close() // which also removes the socket
			if tc.reply != nil {
				defer startSeafServer(t, socket, tc.reply).ln.Close()
			}
			status, text, took := ask()
			for again := 0; again < 2 && took > time.Second; again++ { // the tests next to this one can make one of them slow
				_, _, took = ask()
			}
			if status != http.StatusServiceUnavailable || took > time.Second || !strings.Contains(text, "the members of group 7 are not known") {
				t.Errorf("answered %d %q after %v, want 503 within 1 s", status, text, took)
			}
			if reason := subscriber.expectClose(statusRestart); reason != "group members are not known" {
				t.Errorf("the subscriber was closed with the reason %q", reason)
			}
			t.Logf("closed to resync %v after the event was posted", took.Round(time.Millisecond))
			bystander.sync()
		})
	}
	// A socket on which nobody listens is what seaf-server leaves when it is killed.
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	ln.Close()
	if status, text, _ := ask(); status != http.StatusServiceUnavailable {
		t.Errorf("answered %d %q, want 503", status, text)
	}
	s.says("the members of group 7 are not known, so nobody gets this event, and 1 subscribers of library")
}

func TestLogThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	const notWritten, notOpened = "notification-server: cannot write the log: ", "notification-server: cannot open the log: "
	// serves has clients come and go, which the log tells at level debug.
	serves := func(t *testing.T, addr string) {
		t.Helper()
		for range 5 {
			c := connect(t, addr, asDesktop).subscribed(repoA, "alice@example.com")
			post(t, addr, update(repoA, "1"), 1)
			c.expect(opText, update(repoA, "1"))
			c.write(maskedFrame(0x80|opClose, nil))
			c.expectClose(statusNo)
			waitFor(t, "the client is gone", func() bool { return subscribers(t, addr, numbered(repoA, 0, 0)) == 0 })
		}
	}
	once := func(t *testing.T, p *process, text string) {
		t.Helper()
		p.says(text)
		if n := strings.Count(p.out.String(), text); n != 1 {
			t.Errorf("standard error says %d times %q: %s", n, text, p.out)
		}
	}
	t.Run("the disk is full", func(t *testing.T) {
		t.Parallel()
		port := freePort(t)
		dir := writeConfig(t, port, "log_level = debug")
		path := filepath.Join(dir, "log")
		if err := os.Symlink("/dev/full", path); err != nil {
			t.Fatal(err)
		}
		p := startBinary(t, port, nil, "-c", dir, "-l", path)
		serves(t, "127.0.0.1:"+port)
		once(t, p, notWritten)
		p.says("no space left on device: serving goes on; make room, or correct it and send SIGUSR1")
		// Once there is room, the log goes on.
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		p.Process.Signal(syscall.SIGUSR1)
		waitFor(t, "the log file is there", func() bool { _, err := os.Stat(path); return err == nil })
		serves(t, "127.0.0.1:"+port)
		waitFor(t, "the log tells of the clients", func() bool { // perhaps also of the last one before
			text, _ := os.ReadFile(path)
			return bytes.Count(text, []byte(": disconnected: client")) >= 5
		})
		once(t, p, notWritten)
		if status := p.terminate(); status != 0 {
			t.Errorf("exit status %d", status)
		}
	})
	t.Run("and nobody reads standard error any more", func(t *testing.T) {
		t.Parallel()
		port := freePort(t)
		dir := writeConfig(t, port, "log_level = debug")
		read, written, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		read.Close()
		cmd := exec.Command(buildBinary(t), "-c", dir, "-l", "/dev/full")
		cmd.Stderr = written
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		written.Close()
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		waitFor(t, "the server answers", func() bool { return pings("127.0.0.1:" + port) })
		serves(t, "127.0.0.1:"+port)
	})
	t.Run("its directory is gone", func(t *testing.T) {
		t.Parallel()
		port := freePort(t)
		dir := writeConfig(t, port, "log_level = debug")
		logs := filepath.Join(t.TempDir(), "logs")
		if err := os.Mkdir(logs, 0o755); err != nil {
			t.Fatal(err)
		}
		p := startBinary(t, port, nil, "-c", dir, "-l", filepath.Join(logs, "notification-server.log"))
		serves(t, "127.0.0.1:"+port)
		if err := os.RemoveAll(logs); err != nil {
			t.Fatal(err)
		}
		serves(t, "127.0.0.1:"+port)
		p.Process.Signal(syscall.SIGUSR1)
		p.says(notOpened)
		serves(t, "127.0.0.1:"+port)
		once(t, p, notOpened)
		os.Mkdir(logs, 0o755)
		p.Process.Signal(syscall.SIGUSR1)
		waitFor(t, "the log goes on", func() bool {
			serves(t, "127.0.0.1:"+port)
			text, _ := os.ReadFile(filepath.Join(logs, "notification-server.log"))
			return bytes.Contains(text, []byte("disconnected"))
		})
		once(t, p, notOpened)
	})
	t.Run("its directory was never there", func(t *testing.T) {
		t.Parallel()
		port := freePort(t)
		dir := writeConfig(t, port)
		p := startBinary(t, port, nil, "-c", dir, "-l", filepath.Join(dir, "none/notification-server.log"))
		serves(t, "127.0.0.1:"+port)
		once(t, p, notOpened)
		once(t, p, "[INFO] started on ") // the log goes where it can
	})
}

// An hour forth, and an hour back: connections stay, and tokens hold by the time of day.
func TestClockJumps(t *testing.T) {
	t.Parallel()
	port, fault := freePort(t), filepath.Join(t.TempDir(), "clock")
	setFault(t, fault, "0s")
	startSelf(t, fault, port, "-c", writeConfig(t, port))
	addr := "127.0.0.1:" + port
	soon := clientToken(repoA, "soon@example.com", time.Now().Add(30*time.Minute))
	short := connect(t, addr, asDesktop)
	short.subscribe(repoA, soon)
	short.sync()
	long := connect(t, addr, asBrowser).subscribed(repoA, "long@example.com")
	deliver := func(commit string, to ...*client) {
		t.Helper()
		post(t, addr, update(repoA, commit), len(to))
		for _, c := range to {
			c.expect(opText, update(repoA, commit))
		}
	}
	deliver("1", short, long)

	setFault(t, fault, "1h")
	short.expect(opText, expiredText(repoA)) // within a second or so, not in an hour
	deliver("2", long)
	short.subscribe(repoA, soon)
	short.expect(opText, expiredText(repoA))

	setFault(t, fault, "-1h")
	old := clientToken(repoA, "old@example.com", time.Now().Add(-30*time.Minute)) // by that clock it still holds
	short.subscribe(repoA, old)
	short.sync()
	deliver("3", short, long)
	setFault(t, fault, "0s")
	short.expect(opText, expiredText(repoA))
	deliver("4", long)
	long.sync()
	short.sync()
}

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
	want := "[ERROR] " + unlucky.nc.LocalAddr().String() + `: closed, since its handler panicked: "the clock is broken"; please report this:`
	p.says(want)
	waitFor(t, "its subscription is gone", func() bool { return subscribers(t, addr, numbered(repoB, 1, 0)) == 0 })
	post(t, addr, update(repoA, "1"), 1)
	neighbour.expect(opText, update(repoA, "1"))
	connect(t, addr, asDesktop).subscribed(repoB, "mallory@example.com")
	post(t, addr, update(repoB, "2"), 1)

	// The same for a request.
	setFault(t, fault, "panic")
	c := http.Client{Transport: &http.Transport{}}
	r, _ := http.NewRequest("POST", "http://"+addr+"/events", strings.NewReader(update(repoA, "3")))
	r.Header.Set("Authorization", "Token "+eventToken(later()))
	if answer, err := c.Do(r); err == nil {
		t.Errorf("a request that panicked is answered %s", answer.Status)
	}
	post(t, addr, update(repoA, "4"), 1)
	neighbour.expect(opText, update(repoA, "4"))
	if status := p.terminate(); status != 0 {
		t.Errorf("exit status %d", status)
	}
}

// ---- Metrics ----

func TestMetrics(t *testing.T) {
	t.Parallel()
	s := startMetered(t, 0)
	socket := filepath.Join(s.dir, "../seafile-data/seafile.sock")
	if err := os.Mkdir(filepath.Dir(socket), 0o755); err != nil {
		t.Fatal(err)
	}
	seaf := startSeafServer(t, socket, rpcReply(`{"ret":[{"group-id":7,"user-name":"alice@example.com","is-staff":0}]}`))

	lint := func() {
		t.Helper()
		need(t, "promtool")
		_, text := request(t, "GET", "http://"+s.metrics+"/metrics", "")
		promtool := exec.Command("promtool", "check", "metrics")
		promtool.Stdin = strings.NewReader(text)
		if out, err := promtool.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("promtool check metrics: %v: %s", err, out)
		}
	}
	begin := scrape(t, s.metrics)
	for name, most := range map[string]float64{"connections": 0, "subscriptions": 0, "libraries": 0, "deliveries_total": 0, "outbox_full_total": 0,
		"delivery_seconds_count": 0, "delivery_seconds_sum": 0, `delivery_seconds_bucket{le="+Inf"}`: 0, "go_goroutines": 30, "process_resident_memory_bytes": 100 << 20, "process_start_time_seconds": 1e12} {
		if value, ok := begin[name]; !ok || value > most {
			t.Errorf("at start, %s is %v (there: %v)", name, value, ok)
		}
	}
	if started := time.Unix(int64(begin["process_start_time_seconds"]), 0); time.Since(started).Abs() > time.Minute || begin["go_goroutines"] < 1 || begin["process_resident_memory_bytes"] < 1<<20 {
		t.Errorf("at start: %v", begin)
	}

	desktop := connect(t, s.addr, asDesktop).subscribed(repoA, "alice@example.com").subscribed(repoB, "alice@example.com")
	browser := connect(t, s.addr, asBrowser).subscribed(repoA, "bob@example.com")
	post(t, s.addr, update(repoA, "1"), 2)
	post(t, s.addr, numbered(repoB, 1, 0), 1)
	post(t, s.addr, fmt.Sprintf(`{"type":"comment-update","content":{"repo_id":%q}}`, repoA), 2)
	group := fmt.Sprintf(`{"type":"folder-perm-changed","content":{"repo_id":%q,"type":"group","group":7,"user":""}}`, repoA)
	post(t, s.addr, group, 1)
	for n, c := range []*client{desktop, desktop, desktop, desktop, browser, browser} {
		if opcode, _, err := c.read(); opcode != opText {
			t.Fatalf("frame %d: opcode %d, %v", n, opcode, err)
		}
	}
	desktop.subscribe(repoA, "x.y.z")
	desktop.expect(opText, expiredText(repoA))
	for body, token := range map[string]string{update(repoA, "2"): clientToken(repoA, "alice@example.com", later()), `{}`: eventToken(later())} {
		request(t, "POST", "http://"+s.addr+"/events", body, "Authorization: Token "+token)
	}
	request(t, "POST", "http://"+s.addr+"/events", update(repoA, "2"))
	want := map[string]float64{
		"connections": 2, "subscriptions": 3, "libraries": 2, "deliveries_total": 6, "delivery_seconds_count": 6, `delivery_seconds_bucket{le="+Inf"}`: 6,
		`events_total{type="repo-update"}`: 1, `events_total{type="file-lock-changed"}`: 1, `events_total{type="comment-update"}`: 1, `events_total{type="folder-perm-changed"}`: 1,
		`refused_total{reason="malformed"}`: 1, `refused_total{reason="client-token"}`: 1, `refused_total{reason="bad-event"}`: 1, `refused_total{reason="no-token"}`: 1,
		`group_lookups_total{result="ok"}`: 1,
	}
	check := func() {
		t.Helper()
		have := map[string]float64{}
		waitFor(t, fmt.Sprintf("the metrics become %v, having been %v", want, have), func() bool {
			have = scrape(t, s.metrics)
			for name, value := range want {
				if have[name] != value {
					return false
				}
			}
			return true
		})
		if have["delivery_seconds_sum"] <= 0 || have["delivery_seconds_sum"] > 60 {
			t.Errorf("%v seconds for all deliveries", have["delivery_seconds_sum"])
		}
		for last, bounds := 0.0, []string{"0.001", "0.005", "0.01", "0.05", "0.1", "0.5", "1", "5", "30", "+Inf"}; len(bounds) > 0; bounds = bounds[1:] {
			count, ok := have[`delivery_seconds_bucket{le="`+bounds[0]+`"}`]
			if !ok || count < last {
				t.Errorf("bucket %s has %v (there: %v), the one before %v", bounds[0], count, ok, last)
			}
			last = count
		}
	}
	check()
	lint()

	seaf.ln.Close()
	request(t, "POST", "http://"+s.addr+"/events", group, "Authorization: Token "+eventToken(later()))
	desktop.expectClose(statusRestart)
	browser.expectClose(statusRestart)
	leaves := connect(t, s.addr, asBrowser).subscribed(repoB, "bob@example.com")
	leaves.write(maskedFrame(0x80|opClose, nil))
	leaves.expectClose(statusNo)
	vanishes := connect(t, s.addr, asBrowser)
	vanishes.nc.Close()
	for name, value := range map[string]float64{
		"connections": 0, "subscriptions": 0, "libraries": 0, `group_lookups_total{result="failed"}`: 1, `events_total{type="folder-perm-changed"}`: 2,
		`closed_total{reason="resync"}`: 2, `closed_total{reason="client"}`: 1, `closed_total{reason="gone"}`: 1,
	} {
		want[name] = value
	}
	check()
	lint()

	// SIGUSR2 writes the same to the log, in one line.
	have := scrape(t, s.metrics)
	s.Process.Signal(syscall.SIGUSR2)
	line := ""
	waitFor(t, "the line in the log", func() bool {
		_, after, _ := strings.Cut(s.out.String(), "[INFO] metrics: ")
		var whole bool
		line, _, whole = strings.Cut(after, "\n")
		return whole
	})
	logged := map[string]string{}
	for _, figure := range strings.Split(line, " seafile_notification_") {
		name, rest, _ := strings.Cut(figure, " ")
		logged[strings.TrimPrefix(name, "seafile_notification_")], _, _ = strings.Cut(rest, " ")
	}
	for name := range have {
		short, _, _ := strings.Cut(name, " ")
		if !strings.Contains(line, short+" ") {
			t.Errorf("the line lacks %s: %s", name, line)
		}
	}
	for name, value := range want {
		if number, err := strconv.ParseFloat(logged[name], 64); err != nil || number != value {
			t.Errorf("the line says %s %q, want %v: %s", name, logged[name], value, line)
		}
	}

	// Never on the public port, and nothing else on its own.
	for url, status := range map[string]int{"http://" + s.addr + "/metrics": 404, "http://" + s.addr + "/notification/metrics": 404,
		"http://" + s.metrics + "/": 404, "http://" + s.metrics + "/ping": 404, "http://" + s.metrics + "/events": 404} {
		if answer, _ := request(t, "GET", url, ""); answer.StatusCode != status {
			t.Errorf("%s answers %s, want %d", url, answer.Status, status)
		}
	}
}

func TestMetricsAddress(t *testing.T) {
	t.Parallel()
	listens := func(addr string) bool {
		nc, err := net.DialTimeout("tcp", addr, patient)
		if err == nil {
			nc.Close()
		}
		return err == nil
	}
	t.Run("off by default", func(t *testing.T) {
		t.Parallel()
		port := freePort(t)
		p := startBinary(t, port, nil, "-c", writeConfig(t, port))
		sockets, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		tcp, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp", p.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		listening := 0
		for _, path := range sockets {
			target, _ := os.Readlink(path)
			inode := strings.Trim(target, "socket:[]")
			for line := range strings.Lines(string(tcp)) {
				if f := strings.Fields(line); len(f) > 9 && f[3] == "0A" && f[9] == inode {
					listening++
				}
			}
		}
		if listening != 1 {
			t.Errorf("it listens on %d addresses, want the public one only", listening)
		}
		if answer, _ := request(t, "GET", "http://127.0.0.1:"+port+"/metrics", ""); answer.StatusCode != 404 {
			t.Errorf("/metrics on the public port answers %s", answer.Status)
		}
	})
	t.Run("the environment comes first", func(t *testing.T) {
		t.Parallel()
		port, file, env := freePort(t), "127.0.0.1:"+freePort(t), "127.0.0.1:"+freePort(t)
		startBinary(t, port, []string{"NOTIFICATION_SERVER_METRICS=" + env}, "-c", writeConfig(t, port, "metrics = "+file))
		if _, ok := scrape(t, env)["connections"]; !ok || listens(file) {
			t.Error("the metrics are not where NOTIFICATION_SERVER_METRICS says, or not only there")
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
			p := start(t, nil, buildBinary(t), "-c", writeConfig(t, port, "metrics = "+tc.metrics))
			if status := p.wait(); status != 1 || !strings.Contains(p.out.String(), tc.says) {
				t.Errorf("exit status %d, and it says %q; want 1 and %q", status, p.out, tc.says)
			}
		})
	}
}

// ---- Behind the real proxies, in a real browser, and the self-check ----

// ---- Behind the real proxies ----

// readmeRule returns a rule as README.md prints it, so that what is tested and
// what administrators copy are the same.
func readmeRule(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, marked := strings.Cut(string(text), "<!-- rule: "+name+" -->\n```")
	_, rest, _ = strings.Cut(rest, "\n") // the language
	rule, _, fenced := strings.Cut(rest, "\n```")
	if !marked || !fenced {
		t.Fatalf("README.md has no block marked as the rule %s", name)
	}
	return rule + "\n"
}

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
events {}
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
		short: "proxy_read_timeout 1s;", cuts: true, events: true, forwarded: "203.0.113.9"}
	nginxCurrent = realProxy{rule: "nginx-current", program: "nginx", args: []string{"-e", "stderr", "-c", "FILE"},
		config: strings.Replace(nginxConfig, "RULE", "server {\nRULE\n}", 1),
		short:  "proxy_read_timeout 1s;", cuts: true, events: true, forwarded: "203.0.113.9"}
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
`, usual: "Timeout 300", short: "Timeout 1", cuts: true, events: true, forwarded: "203.0.113.9, 127.0.0.1"},
		{rule: "haproxy", program: "haproxy", args: []string{"-db", "-f", "FILE"}, config: `
defaults
    mode http
    timeout connect 5s
    IDLE
RULE
`, usual: "timeout client 50s\n    timeout server 50s", short: "timeout client 1s\n    timeout server 1s", cuts: true,
			forwarded: "203.0.113.9, 127.0.0.1"}, // in a line of its own behind the client's
		{rule: "caddy", program: "caddy", args: []string{"run", "--adapter", "caddyfile", "--config", "FILE"}, config: `{
	admin off
	auto_https off
	IDLE
}
RULE`, short: "servers {\ntimeouts {\nread_body 1s\nread_header 1s\nwrite 1s\nidle 1s\n}\n}", events: true, forwarded: "127.0.0.1"},
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

// waitSubscriptions waits until the server has so many.
func waitSubscriptions(t testing.TB, s *testServer, n int) {
	t.Helper()
	figure := fmt.Sprintf("seafile_notification_subscriptions %d", n)
	waitFor(t, figure, func() bool { return slices.Contains(s.figures(), figure) })
}

// waitForFigure waits until the counter name has counted its label.
func waitForFigure(t testing.TB, s *testServer, name, label string) {
	t.Helper()
	waitFor(t, name+" counts "+label, func() bool {
		return slices.ContainsFunc(s.figures(), func(line string) bool {
			return strings.HasPrefix(line, "seafile_notification_"+name+"{") && strings.Contains(line, `="`+label+`"}`)
		})
	})
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

func TestProxySession(t *testing.T) {
	eachProxy(t, func(t *testing.T, p realProxy) {
		s := startServer(t)
		px := startProxy(t, p, s.addr, p.usual)
		base := "http://" + px.addr + "/notification"

		if answer, text := request(t, "GET", base+"/ping", ""); answer.StatusCode != 200 || strings.TrimSpace(text) != `{"ret": "pong"}` {
			t.Errorf("ping answered %s %q", answer.Status, text)
		}
		for _, path := range []string{"", "/", "/ping", "/ping/", "/events"} {
			if answer, _ := request(t, "GET", base+path, ""); answer.StatusCode >= 300 && answer.StatusCode < 400 {
				t.Errorf("GET /notification%s is redirected to %s", path, answer.Header.Get("Location"))
			}
		}

		var clients []*client
		for _, path := range []string{"/notification", "/notification/"} {
			for _, lines := range []string{asDesktop + "Origin: http://127.0.0.1\r\n", asBrowser} {
				clients = append(clients, connectTo(t, px.addr, path, lines+"X-Forwarded-For: 203.0.113.9\r\n").subscribed(repoA, "alice@example.com"))
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

		comment := fmt.Sprintf(`{"type":"comment-update","content":{"repo_id":%q,"type":"comment_updated","file_uuid":"u","file_path":"/a.md"}}`, repoA)
		answer, text := request(t, "POST", base+"/events", comment, "Authorization: Token "+eventToken(later()))
		switch {
		case p.events && answer.StatusCode == 200 && strings.Contains(text, "subscribers"):
			all(comment)
			answer, _ = request(t, "POST", base+"/events", comment, "Authorization: Token "+clientToken(repoA, "alice@example.com", later()))
			if answer.StatusCode != http.StatusForbidden {
				t.Errorf("an event posted with a client's token answered %s", answer.Status)
			}
		case p.events || !strings.Contains(text, "Private Seafile"):
			t.Errorf("Seahub's event answered %s %q", answer.Status, text)
		}
		for _, c := range clients {
			c.sync() // nothing else came: not the forged event
		}

		if want := fmt.Sprintf("for %q: connected", p.forwarded); !strings.Contains(s.out.String(), want) {
			t.Errorf("the debug log does not say %s: %s", want, s.out)
		}
	})
}

// The further lines that README.md offers do what it says.
func TestProxyFurtherLines(t *testing.T) {
	t.Parallel()
	t.Run("nginx-forwarded", func(t *testing.T) {
		t.Parallel()
		s := startServer(t)
		p := nginxCurrent
		p.edit = func(rule string) string { return strings.Replace(rule, "}", readmeRule(t, "nginx-forwarded")+"}", 1) }
		px := startProxy(t, p, s.addr, p.usual)
		connectTo(t, px.addr, "/notification", asDesktop)
		waitFor(t, "X-Forwarded-For in the log", func() bool { return strings.Contains(s.out.String(), `for "127.0.0.1": connected`) })
	})
	t.Run("haproxy-events", func(t *testing.T) {
		t.Parallel()
		s := startServer(t)
		p := realProxies[slices.IndexFunc(realProxies, func(p realProxy) bool { return p.rule == "haproxy" })]
		p.edit = func(rule string) string {
			return strings.Replace(rule, "use_backend", readmeRule(t, "haproxy-events")+"use_backend", 1)
		}
		px := startProxy(t, p, s.addr, p.usual)
		answer, text := request(t, "POST", "http://"+px.addr+"/notification/events", update(repoA, "1"), "Authorization: Token "+eventToken(later()))
		if answer.StatusCode != 200 || !strings.Contains(text, "subscribers") {
			t.Errorf("answered %s %q", answer.Status, text)
		}
	})
}

// Each proxy cuts a connection that is silent for a second, here. Our pings keep
// it open; without them it is cut, which shows that the second is in force.
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
			if d := time.Since(start); d < 900*time.Millisecond {
				t.Fatalf("cut after %v already", d)
			}
			waitSubscriptions(t, s, 0)
		}
		browser := connectTo(t, px.addr, "/notification", asBrowser).subscribed(repoA, "bob@example.com")
		for end := time.Now().Add(2500 * time.Millisecond); time.Now().Before(end); {
			time.Sleep(300 * time.Millisecond) // the proxy's time-out runs in real time
			s.advance(pingAfter)
			browser.expect(opPing, "")
			browser.write(maskedFrame(0x80|opPong, nil))
		}
		post(t, s.addr, update(repoA, "1"), 1)
		browser.expect(opText, update(repoA, "1"))
	})
}

// Once with nginx's real 60 s and the real binary: the browser, which never
// pings, stays. Behind a server that does not ping it would be cut.
func TestProxyIdleMinute(t *testing.T) {
	if testing.Short() && os.Getenv("CI") != "true" {
		t.Skip("takes more than a minute")
	}
	t.Parallel()
	port := freePort(t)
	need(t, "nginx")
	startBinary(t, port, nil, "-c", writeConfig(t, port, "log_level = debug"))
	px := startProxy(t, nginxManual, "127.0.0.1:"+port, "")
	mute := startProxy(t, nginxManual, startServer(t).addr, "") // nobody calls this server's sweep

	cut := make(chan time.Duration, 1)
	idle := func(px *runningProxy) *client {
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

// The proxy is restarted under live clients: they all see the end, so that they
// know to come back, and each that does gets the next event.
func TestProxyRestart(t *testing.T) {
	eachProxy(t, func(t *testing.T, p realProxy) {
		s := startServer(t)
		px := startProxy(t, p, s.addr, p.usual)
		var clients []*client
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
		waitSubscriptions(t, s, 0)
		px.start(t)
		come()
		post(t, s.addr, update(repoA, "after"), len(clients))
		for _, c := range clients {
			c.expect(opText, update(repoA, "after"))
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

// ---- In a real browser ----

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

func TestBrowser(t *testing.T) {
	t.Parallel()
	need(t, "chromium", "nginx")
	s := startServer(t)

	var mu sync.Mutex
	var dom string
	expires := s.time.now.Add(25 * time.Second) // of the first token
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
	p.config = strings.Replace(p.config, "server {\n", "server {\nlocation ~ ^/(library|token|report|leave)$ { proxy_pass http://"+hub.Listener.Addr().String()+"; proxy_read_timeout 60s; }\n", 1)
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
	dir := t.TempDir()
	chromium := start(t, []string{"HOME=" + dir, "TMPDIR=" + dir}, "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
		"--no-first-run", "--disable-background-networking", "--user-data-dir="+dir, "--remote-debugging-port=0", "http://"+px.addr+"/library")
	t.Cleanup(func() { stopWhole(chromium) })
	waitSubscriptions(t, s, 1)

	want := []string{"opened_1"}
	for _, ev := range [][2]string{
		{`{"type":"repo-update","content":{"repo_id":"` + repoA + `","commit_id":"c1"}}`, "repo-update_c1"},
		{`{"type":"file-lock-changed","content":{"repo_id":"` + repoA + `","path":"/Grüße/日本語-😀.txt","change_event":"locked","lock_user":"bob@example.com"}}`, "file-lock-changed_/Grüße/日本語-😀.txt"},
		{`{"type":"comment-update","content":{"repo_id":"` + repoA + `","type":"comment_updated","file_uuid":"u","file_path":"/a.md"}}`, "comment-update_/a.md"},
	} {
		post(t, s.addr, ev[0], 1)
		want = append(want, ev[1])
		shows(want...)
	}

	// The token runs out; the page gets a new one, over the same connection.
	s.advance(25 * time.Second)
	want = append(want, "jwt-expired_"+repoA)
	shows(want...)
	waitSubscriptions(t, s, 1)
	post(t, s.addr, update(repoA, "c2"), 1)
	want = append(want, "repo-update_c2")
	shows(want...)

	// The page idles for longer than nginx bears without our pings.
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Second) {
		s.advance(pingAfter)
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
	waitSubscriptions(t, s, 1)
	post(t, s.addr, update(repoA, "c4"), 1)
	waitFor(t, "the page gets events again", func() bool { return slices.Contains(lines(), "repo-update_c4") })
	if got := lines(); !slices.Equal(got[:len(want)], want) || !slices.Contains(got, "opened_2") || slices.Contains(got, "opened_3") {
		t.Errorf("the page shows %q, want %q and opened_2", got, want)
	}

	// The page goes.
	close(leave)
	waitSubscriptions(t, s, 0)
	waitFor(t, "the page's own close is answered", func() bool { return lines()[len(lines())-1] == "closed_1005" })
	if log := s.out.String(); !strings.Contains(log, "unsubscribed") {
		t.Error("the page did not unsubscribe")
	}
}

// ---- The self-check ----

// A checkRun is what a run of -check said.
type checkRun struct {
	t      testing.TB
	text   string
	status int
	took   time.Duration
}

var checkSteps = []string{"configuration", "ping", "upgrade", "subscription", "event", "forgery", "group members", "connection"}

// selfCheck runs the real binary with -check. Of each run: one line a step, in
// order, and the key nowhere.
func selfCheck(t testing.TB, env []string, dir string, urls ...string) *checkRun {
	t.Helper()
	begin := time.Now()
	p := start(t, env, buildBinary(t), append([]string{"-c", dir, "-check"}, urls...)...)
	select {
	case <-p.done:
	case <-time.After(30 * time.Second):
		t.Fatalf("-check does not end; it said: %s", p.out)
	}
	run := &checkRun{t, p.out.String(), p.ProcessState.ExitCode(), time.Since(begin)}
	lines := strings.Split(strings.TrimSuffix(run.text, "\n"), "\n")
	if len(lines) != len(checkSteps)+1 {
		t.Fatalf("-check printed %d lines, want one for each of %d steps and one for the end: %s", len(lines), len(checkSteps), run.text)
	}
	crosses := strings.Count(run.text, "✗ ")
	for i, step := range checkSteps {
		if mark, rest, _ := strings.Cut(lines[i], " "); !strings.Contains("✓✗-", mark) || !strings.HasPrefix(rest, step+": ") {
			t.Errorf("line %d is %q, not of the step %q", i+1, lines[i], step)
		} else if mark == "-" && (crosses == 0 || !strings.Contains(rest, "not tried")) {
			t.Errorf("%q does not say that it was not tried, or nothing failed before", lines[i])
		}
	}
	if (run.status == 0) != (crosses == 0) || run.status > 1 {
		t.Errorf("exit status %d with %d crosses: %s", run.status, crosses, run.text)
	}
	for _, key := range []string{testKey, strings.Repeat("k", 40)} {
		if strings.Contains(run.text, key) {
			t.Errorf("-check printed the key: %s", run.text)
		}
	}
	return run
}

// says checks that the line of a step begins with mark and holds the phrases.
func (run *checkRun) says(mark, step string, phrases ...string) {
	run.t.Helper()
	for line := range strings.Lines(run.text) {
		if rest, found := strings.CutPrefix(line, mark+" "+step+": "); found {
			for _, phrase := range phrases {
				if !strings.Contains(rest, phrase) {
					run.t.Errorf("the step %s does not say %q: %s", step, phrase, line)
				}
			}
			return
		}
	}
	run.t.Errorf("no line %q for the step %s: %s", mark, step, run.text)
}

// good checks that all steps hold and that it ends in how long a notification took.
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

// startChecked starts the real binary with a seaf-server beside it, and returns
// the directory of its configuration and its URL.
func startChecked(t testing.TB) (dir, address string) {
	t.Helper()
	port := freePort(t)
	dir = writeConfig(t, port)
	data := filepath.Join(dir, "../seafile-data")
	if err := os.Mkdir(data, 0o755); err != nil {
		t.Fatal(err)
	}
	startSeafServer(t, filepath.Join(data, "seafile.sock"), rpcReply(`{"ret":null}`)) // as for a group that is not known
	startBinary(t, port, nil, "-c", dir)
	return dir, "http://127.0.0.1:" + port
}

// front is a proxy of this process before the server at address. instead may
// answer a request in its place: then it returns true.
func front(t testing.TB, address string, instead func(http.ResponseWriter, *http.Request) bool) *httptest.Server {
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

func TestCheckGood(t *testing.T) {
	t.Parallel()
	dir, address := startChecked(t)
	t.Run("direct", func(t *testing.T) {
		t.Parallel()
		run := selfCheck(t, nil, dir)
		run.good()
		run.says("✓", "configuration", filepath.Join(dir, "seafile.conf"))
		run.says("✓", "group members", "seafile.sock")
	})
	t.Run("environment", func(t *testing.T) {
		t.Parallel()
		run := selfCheck(t, []string{"JWT_PRIVATE_KEY=" + testKey, "NOTIFICATION_SERVER_HOST=0.0.0.0"}, dir)
		run.good()
		run.says("✓", "configuration", "JWT_PRIVATE_KEY", "NOTIFICATION_SERVER_HOST")
	})
	for _, p := range realProxies {
		t.Run(p.rule, func(t *testing.T) {
			t.Parallel()
			px := startProxy(t, p, strings.TrimPrefix(address, "http://"), p.usual)
			selfCheck(t, nil, dir, "http://"+px.addr+"/notification").good()
			selfCheck(t, nil, dir, "http://"+px.addr+"/notification/").good()
		})
	}
	t.Run("tls", func(t *testing.T) { // nginx with a certificate that is trusted
		t.Parallel()
		cert := makeCertificate(t, "127.0.0.1", time.Now().Add(time.Hour))
		p := nginxCurrent
		p.config = strings.Replace(p.config, "RULE", "ssl_certificate "+cert.file+";\nssl_certificate_key "+cert.file+";\nlisten 127.0.0.1:TLS ssl;\nRULE", 1)
		port := freePort(t)
		p.config = strings.Replace(p.config, "TLS", port, 1)
		startProxy(t, p, strings.TrimPrefix(address, "http://"), p.usual)
		selfCheck(t, []string{"SSL_CERT_FILE=" + cert.file}, dir, "https://127.0.0.1:"+port+"/notification").good()
	})
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
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: host}, NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: expires,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
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
	both := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})...)
	file := filepath.Join(t.TempDir(), "certificate.pem")
	if err := os.WriteFile(file, both, 0o600); err != nil {
		t.Fatal(err)
	}
	return testCertificate{tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, file}
}

// Each cause shows as itself. What a row looks for, README.md's table explains.
func TestCheckCauses(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	dir, address := startChecked(t)
	answers := func(path string, status int, text string, lines ...string) func(http.ResponseWriter, *http.Request) bool {
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
	const page = "<!DOCTYPE html>\n<html lang=\"en\"><title>Log In - Private Seafile</title></html>\n"
	for _, row := range []struct {
		name    string
		instead func(http.ResponseWriter, *http.Request) bool // of the proxy
		step    string                                        // that gets the cross
		explain string                                        // is in README.md, too
		phrases []string
	}{
		{"404", answers("", 404, "404 page not found"), "ping", "answers 404", []string{"rule"}},
		{"404-page", answers("", 404, page), "ping", "answers 404", []string{"rule"}},
		{"200-upgrade", answers("/notification", 200, "ok"), "upgrade", "headers Upgrade and Connection", []string{"answers 200"}},
		{"400-upgrade", answers("/notification", 400, "bad request"), "upgrade", "headers Upgrade and Connection", []string{"answers 400"}},
		{"headers-lost", func(_ http.ResponseWriter, r *http.Request) bool {
			r.Header.Del("Upgrade")
			r.Header.Del("Connection")
			return false
		}, "upgrade", "headers Upgrade and Connection", []string{"answers 426"}},
		{"502", answers("", 502, "bad gateway"), "ping", "cannot reach the notification server", []string{"502", address}},
		{"503", answers("", 503, "unavailable"), "ping", "cannot reach the notification server", []string{"503", address}},
		{"504", answers("", 504, "time-out"), "ping", "cannot reach the notification server", []string{"504", address}},
		{"502-upgrade", answers("/notification", 502, "bad gateway"), "upgrade", "cannot reach the notification server", []string{"502", address}},
		{"web-page", answers("", 200, page), "ping", "web page", []string{"Seahub", "rule"}},
		{"https", answers("", 301, "", "Location: https://cloud.example.com/notification/ping"), "ping", "redirects to", []string{"https://cloud.example.com/notification"}},
		{"slash", answers("/notification", 301, "", "Location: /notification/"), "upgrade", "redirects to", []string{"/notification/", "slash"}},
		{"login", answers("", 302, "", "Location: /accounts/login/?next=/notification/ping"), "ping", "web page", []string{"Seahub", "rule"}},
		{"password", answers("", 401, page), "ping", "asks for a password", []string{"answers 401"}},
		{"another-service", answers("", 200, `{"status":"ok"}`), "ping", "another service", []string{"port"}},
		{"another-websocket", func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != "/notification" {
				return false
			}
			websocket.Server{Handler: func(ws *websocket.Conn) { io.WriteString(ws, "welcome"); io.Copy(io.Discard, ws) }}.ServeHTTP(w, r)
			return true
		}, "subscription", "another service", nil},
		{"clock-behind", answers("/notification/ping", 200, `{"ret": "pong"}`, "Date: "+time.Now().Add(-10*time.Minute).UTC().Format(http.TimeFormat)), "ping", "clock differs", []string{"10m", "NTP"}},
		{"clock-ahead", answers("/notification/ping", 200, `{"ret": "pong"}`, "Date: "+time.Now().Add(3*time.Hour).UTC().Format(http.TimeFormat)), "ping", "clock differs", []string{"NTP"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			f := front(t, address, row.instead)
			f.Start()
			run := selfCheck(t, nil, dir, f.URL+"/notification")
			run.says("✓", "configuration")
			run.says("✗", row.step, append(row.phrases, row.explain)...)
			run.says("✓", "group members") // does not need the URL
			run.says("-", "connection", "not tried")
			if strings.Count(run.text, "✗") != 1 {
				t.Errorf("more than the one cause: %s", run.text)
			}
			if !strings.Contains(string(readme), "`"+row.explain+"`") {
				t.Errorf("README.md does not explain %q", row.explain)
			}
		})
	}

	// Causes that show before there is an answer.
	expired, unknown, other := makeCertificate(t, "127.0.0.1", time.Now().Add(-time.Hour)), makeCertificate(t, "127.0.0.1", later()), makeCertificate(t, "other.example.com", later())
	overTLS := func(cert testCertificate) string {
		f := front(t, address, nil)
		f.TLS = &tls.Config{Certificates: []tls.Certificate{cert.Certificate}}
		f.Config.ErrorLog = nil
		f.StartTLS()
		return f.URL
	}
	greets := startGreeter(t, "SSH-2.0-OpenSSH_9.2\r\n")
	for _, row := range []struct{ name, url, trusted, explain, phrase string }{
		{"refused", "http://127.0.0.1:" + freePort(t), "", "connection refused", "start"},
		{"dns", "http://no-such-host.invalid", "", "DNS", "spelling"},
		{"untrusted", overTLS(unknown), "", "certificate is not trusted", "chain"},
		{"wrong-name", overTLS(other), other.file, "certificate is not trusted", "name"},
		{"expired", overTLS(expired), expired.file, "renew the proxy's certificate", "clock"},
		{"ssh", "http://" + greets, "", "another service", ""},
		{"https-as-http", strings.Replace(overTLS(unknown), "https", "http", 1), "", "speaks TLS", "https://"},
		{"http-as-https", "https://" + strings.TrimPrefix(address, "http://"), "", "https for http", ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			var env []string
			if row.trusted != "" {
				env = []string{"SSL_CERT_FILE=" + row.trusted}
			}
			run := selfCheck(t, env, dir, row.url+"/notification")
			run.says("✗", "ping", row.explain, row.phrase)
			for _, step := range []string{"upgrade", "subscription", "event", "forgery", "connection"} {
				run.says("-", step, "not tried")
			}
			run.says("✓", "group members")
			if !strings.Contains(string(readme), "`"+row.explain+"`") {
				t.Errorf("README.md does not explain %q", row.explain)
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

// The real nginx with what goes wrong in its rules.
func TestCheckNginx(t *testing.T) {
	t.Parallel()
	need(t, "nginx")
	dir, address := startChecked(t)
	server := strings.TrimPrefix(address, "http://")
	for _, row := range []struct {
		name, from, to string // what is changed in the configuration
		step           string
		phrases        []string
	}{
		{"no-upgrade", "proxy_set_header", "#", "upgrade", []string{"Upgrade", "426"}},
		{"http-1.0", "proxy_http_version", "#", "upgrade", []string{"Upgrade", "1.1"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			p := nginxCurrent
			p.edit = func(rule string) string { return strings.ReplaceAll(rule, row.from, row.to) }
			px := startProxy(t, p, server, "")
			run := selfCheck(t, nil, dir, "http://"+px.addr+"/notification")
			run.says("✗", row.step, row.phrases...)
		})
	}
}

func TestCheckKey(t *testing.T) {
	t.Parallel()
	dir, _ := startChecked(t)
	run := selfCheck(t, []string{"JWT_PRIVATE_KEY=" + strings.Repeat("k", 40)}, dir)
	run.says("✗", "subscription", "jwt_private_key", "restart")
	run.says("-", "event", "not tried")
	run.says("✗", "forgery", "jwt_private_key")
}

// A proxy answers with its own Date, as nginx does: then a clock that is ahead shows in what the server refuses.
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

func TestCheckEventTwice(t *testing.T) {
	t.Parallel()
	dir, address := startChecked(t)
	twice := front(t, address, func(_ http.ResponseWriter, r *http.Request) bool {
		body, _ := io.ReadAll(r.Body)
		request(t, "POST", address+"/events", string(body), "Authorization: "+r.Header.Get("Authorization"))
		r.Body = io.NopCloser(bytes.NewReader(body))
		return false
	})
	twice.Start()
	selfCheck(t, []string{"INNER_NOTIFICATION_SERVER_URL=" + twice.URL}, dir).says("✗", "connection", "came twice")
}

func TestCheckNoGroups(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	dir := writeConfig(t, port)
	startBinary(t, port, nil, "-c", dir)
	run := selfCheck(t, nil, dir)
	run.good()
	run.says("✓", "group members", "note", "SEAFILE_RPC_PIPE_PATH")
}

func TestCheckConfiguration(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, text, mark string
		phrases          []string
	}{
		{"no-key", "[notification]\nport = 8083\n", "✗", []string{"jwt_private_key", "openssl"}},
		{"bad-port", "[notification]\nport = x\njwt_private_key = " + testKey, "✗", []string{"seafile.conf:2", "port"}},
		{"disabled", "[notification]\nenabled = false\njwt_private_key = " + testKey, "✗", []string{"enabled = false"}},
		{"short-key", "[notification]\nport = 1\njwt_private_key = short", "✓", []string{"WARNING", "32 bytes"}},
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

// -h and README.md show what a good run looks like, with its steps, and a bad one.
func TestCheckShown(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	help := start(t, nil, buildBinary(t), "-h")
	if status := help.wait(); status != 0 {
		t.Errorf("-h exits with %d", status)
	}
	for where, text := range map[string]string{"-h": help.out.String(), "README.md": string(readme)} {
		for _, step := range checkSteps {
			if !strings.Contains(text, "✓ "+step+": ") {
				t.Errorf("%s does not show the step %q", where, step)
			}
		}
		if !strings.Contains(text, "✗ ping: ") || !strings.Contains(text, "- upgrade: not tried") {
			t.Errorf("%s shows no bad run", where)
		}
	}
	if !strings.Contains(help.out.String(), "\n  ✓ ping: http://127.0.0.1:8083/ping answers pong\n") || regexp.MustCompile(`(?m)^ \S|//[\t ]`).MatchString(help.out.String()) {
		t.Errorf("-h shows the manual with the marks of a comment, or without what belongs to it: %s", help.out)
	}
}

// In a cluster an event posted once must reach every server.
func TestCheckSeveral(t *testing.T) {
	t.Parallel()
	dir, first := startChecked(t)
	_, second := startChecked(t)
	mirror := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		for _, server := range []string{second, first} {
			answer, text := request(t, r.Method, server+r.URL.Path, string(body), "Authorization: "+r.Header.Get("Authorization"))
			if server == first {
				w.WriteHeader(answer.StatusCode)
				io.WriteString(w, text)
			}
		}
	}))
	t.Cleanup(mirror.Close)

	run := selfCheck(t, []string{"INNER_NOTIFICATION_SERVER_URL=" + mirror.URL}, dir, first, second)
	run.good()
	run.says("✓", "ping", first, second)
	run.says("✓", "event", mirror.URL)

	run = selfCheck(t, nil, dir, first, second)
	run.says("✗", "event", second, "different servers")
	run.says("-", "connection", "not tried") // an event that came late would look like one that came twice
}

// However slow the answers are, 15 s are enough for all steps.
func TestCheckTime(t *testing.T) {
	t.Parallel()
	dir, address := startChecked(t)
	t.Run("silent", func(t *testing.T) { // accepts and never answers
		t.Parallel()
		run := selfCheck(t, nil, dir, "http://"+startGreeter(t, "")+"/notification")
		run.says("✗", "ping", "no answer in")
		if run.took > 15*time.Second {
			t.Errorf("took %v", run.took)
		}
	})
	t.Run("slow", func(t *testing.T) { // each answer comes late, and at last none
		t.Parallel()
		f := front(t, address, func(w http.ResponseWriter, r *http.Request) bool {
			time.Sleep(3400 * time.Millisecond) // the time is the point
			if r.Header.Get("Upgrade") == "" {
				return false
			}
			websocket.Server{Handler: func(ws *websocket.Conn) { io.Copy(io.Discard, ws) }}.ServeHTTP(w, r)
			return true
		})
		f.Start()
		run := selfCheck(t, nil, dir, f.URL+"/notification")
		run.says("✗", "subscription")
		if run.took > 15*time.Second {
			t.Errorf("took %v: %s", run.took, run.text)
		}
	})
}

// ---- Restarts, systemd and clusters ----

// ---- Restarts ----

// startHanded starts the real binary with a listening socket handed over as
// systemd does: descriptor 3, and LISTEN_PID is the server's own.
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

func lockEvent(repoID string, n int) string {
	return fmt.Sprintf(`{"type":"file-lock-changed","content":{"repo_id":%q,"path":"/%d","change_event":"locked","lock_user":"alice@example.com"}}`, repoID, n)
}

// A restartLoad asks for /ping and posts events without pause, over a fresh
// connection each, and counts what came of it.
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
				l.longest = max(l.longest, time.Since(start))
				if text != "" {
					l.others = append(l.others, text)
				}
				l.mu.Unlock()
			}
		})
	}
	l.stop = sync.OnceFunc(func() { close(done); all.Wait() })
	return l
}

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
				var conns []*client
				for i := range waiting {
					nc, err := net.Dial("tcp", addr)
					if err != nil {
						t.Fatalf("refused while no process serves: %v", err)
					}
					defer nc.Close()
					fmt.Fprintf(nc, "POST /events HTTP/1.1\r\nHost: x\r\nAuthorization: Token %s\r\nContent-Length: %d\r\n\r\n%s",
						eventToken(later()), len(lockEvent(repoA, i)), lockEvent(repoA, i))
					nc.SetDeadline(time.Now().Add(patient))
					conns = append(conns, &client{t: t, nc: nc, br: bufio.NewReader(nc)})
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

// A post waits for seaf-server's answer while the server is stopped: the sender
// still gets its 200.
func TestStopAnswersPostsInFlight(t *testing.T) {
	t.Parallel()
	rpc := t.TempDir()
	release := make(chan bool)
	ss := startSeafServer(t, filepath.Join(rpc, "seafile.sock"), func(nc net.Conn) {
		<-release
		rpcReply(`{"ret":[{"group-id":1,"user-name":"carol@example.com"}]}`)(nc)
	})
	port := freePort(t)
	p := startBinary(t, port, []string{"SEAFILE_RPC_PIPE_PATH=" + rpc}, "-c", writeConfig(t, port))
	answered := make(chan bool)
	go func() {
		defer close(answered)
		post(t, "127.0.0.1:"+port, fmt.Sprintf(`{"type":"folder-perm-changed","content":{"repo_id":%q,"type":"group","group":1}}`, repoA), 0)
	}()
	<-ss.requests
	p.Process.Signal(syscall.SIGTERM)
	waitFor(t, "the port is free", func() bool { return !pings("127.0.0.1:" + port) })
	close(release)
	<-answered
	if code := p.wait(); code != 0 {
		t.Errorf("exit status %d; output: %s", code, p.out)
	}
}

// A stop frees the port before the clients are closed, so that the next server
// can start meanwhile; and closes them one after the other, since all come back
// at the same distance.
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
		all.Go(func() {
			for {
				opcode, payload, err := c.read()
				if err != nil || opcode == opClose && (len(payload) < 2 || payload[0] != 1001>>8 || payload[1] != 1001&0xff) {
					t.Errorf("not closed with 1001 but %q (%v)", payload, err)
					return
				}
				if opcode == opClose {
					mu.Lock()
					closed = append(closed, time.Now())
					mu.Unlock()
					c.write(maskedFrame(0x80|opClose, payload))
					c.nc.Close()
					return
				}
			}
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
	if took := time.Since(stopped); took > patient {
		t.Errorf("the stop took %v", took)
	}
	all.Wait()
	slices.SortFunc(closed, time.Time.Compare)
	if len(closed) > 0 {
		if spread := closed[len(closed)-1].Sub(closed[0]); spread < 700*time.Millisecond || spread > 5*time.Second {
			t.Errorf("%d clients were closed within %v, want about 1 s", len(closed), spread)
		}
	}
	t.Logf("the next server answered %v after SIGTERM, when %d of %d clients were closed", blind, gone, clients)
}

func TestSecondServerOnThePort(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	dir := writeConfig(t, port)
	first := startBinary(t, port, nil, "-c", dir)
	second := start(t, nil, buildBinary(t), "-c", dir)
	if code := second.wait(); code != 1 || !strings.Contains(second.out.String(), port+": bind: address already in use: another server, an earlier start of this one, or systemd holds the port") || !strings.Contains(second.out.String(), "change port in "+dir+"/seafile.conf:") {
		t.Errorf("the second server ended with %d and said: %s", code, second.out)
	}
	if !pings("127.0.0.1:" + port) {
		t.Error("the first server does not answer any more")
	}
	if code := first.terminate(); code != 0 {
		t.Errorf("exit status of the first: %d", code)
	}
}

// listenNotify opens a socket as systemd does for sd_notify(3).
func listenNotify(t *testing.T, path string) <-chan string {
	t.Helper()
	nc, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	states := make(chan string, 100)
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
			p := start(t, []string{"NOTIFY_SOCKET=" + tc.socket, "WATCHDOG_USEC=" + tc.watchdog}, buildBinary(t), "-c", writeConfig(t, port))
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
			for range len(tc.watchdog) / 3 { // twice; half of 2 s, and 0.4 s for a busy machine
				if state := nextState(t, states, 1400*time.Millisecond); state != "WATCHDOG=1" {
					t.Errorf("told %q, want WATCHDOG=1 after 1 s", state)
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

// The log goes to a pipe that nobody reads. At level debug an event is logged
// while the lock is held: the server is stuck, and must not tell that it lives.
func TestWatchdogOfAStuckServer(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "notify")
	states := listenNotify(t, socket)
	unread, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer unread.Close()
	port := freePort(t)
	cmd := exec.Command(buildBinary(t), "-c", writeConfig(t, port, "log_level = debug"))
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+socket, "WATCHDOG_USEC=1000000")
	cmd.Stderr = out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out.Close()
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for _, want := range []string{"READY=1", "WATCHDOG=1"} {
		if state := nextState(t, states, patient); state != want {
			t.Fatalf("told %q, want %s", state, want)
		}
	}
	addr := "127.0.0.1:" + port
	connect(t, addr, asBrowser).subscribed(repoA, "alice@example.com")
	long := strings.Repeat("x", 100<<10) // more than a pipe holds
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	fmt.Fprintf(nc, "POST /events HTTP/1.1\r\nHost: x\r\nAuthorization: Token %s\r\nContent-Length: %d\r\n\r\n%s",
		eventToken(later()), len(update(repoA, long)), update(repoA, long))
	for nextState(t, states, 200*time.Millisecond) != "nothing" { // what was told before
	}
	if state := nextState(t, states, 1800*time.Millisecond); state != "nothing" {
		t.Errorf("a stuck server told %q", state)
	}
	io.CopyN(io.Discard, unread, 50<<10) // it goes on when the log does
	go io.Copy(io.Discard, unread)
	if state := nextState(t, states, patient); state != "WATCHDOG=1" {
		t.Errorf("told %q, want WATCHDOG=1", state)
	}
}

// A refused request whose line in the log cannot be written keeps nobody else's waiting.
func TestLogThatNobodyReads(t *testing.T) {
	t.Parallel()
	unread, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	port, metrics := freePort(t), "127.0.0.1:"+freePort(t)
	cmd := exec.Command(buildBinary(t), "-c", writeConfig(t, port, "metrics = "+metrics))
	cmd.Stderr = out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait(); unread.Close(); out.Close() })
	addr := "127.0.0.1:" + port
	waitFor(t, "the server answers", func() bool { return pings(addr) })
	c := connect(t, addr, asBrowser).subscribed(repoA, "alice@example.com")
	full, err := syscall.Open(fmt.Sprintf("/proc/self/fd/%d", out.Fd()), syscall.O_WRONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	for size := 4096; size > 0; size /= 4096 { // by pages, then the rest
		for err = nil; err == nil; _, err = syscall.Write(full, make([]byte, size)) {
		}
	}
	syscall.Close(full)
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	io.WriteString(nc, "GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
	waitFor(t, "it is refused", func() bool { return scrape(t, metrics)[`refused_total{reason="not-found"}`] == 1 })
	nc.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := nc.Read(make([]byte, 1)); n > 0 || !os.IsTimeout(err) {
		t.Errorf("the line was logged: the pipe is not full (%v)", err)
	}
	post(t, addr, update(repoA, "1"), 1)
	c.expect(opText, update(repoA, "1"))
	slow := connect(t, addr, asBrowser) // is closed for being too slow, of which a line cannot be written either
	go slow.write(bytes.Repeat(maskedFrame(0x80|opPing, bytes.Repeat([]byte("x"), 125)), 200000))
	waitFor(t, "it is closed", func() bool { return scrape(t, metrics)[`closed_total{reason="outbox-full"}`] == 1 })
	post(t, addr, update(repoA, "2"), 1)
	c.expect(opText, update(repoA, "2"))
}

// ---- The rules and units of README.md ----

// readmeBlock returns the fenced block of README.md that follows the marker <!-- name -->.
func readmeBlock(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(text), "<!-- "+name+" -->\n```")
	_, rest, _ = strings.Cut(rest, "\n")
	block, _, ended := strings.Cut(rest, "\n```\n")
	if !found || !ended {
		t.Fatalf("README.md has no fenced block right behind <!-- %s -->", name)
	}
	return block + "\n"
}

func TestUnitsOfReadme(t *testing.T) {
	t.Parallel()
	need(t, "systemd-analyze")
	dir := t.TempDir()
	for _, name := range []string{"notification-server.socket", "notification-server.service", "notification-server.service.d/user.conf"} {
		text := strings.ReplaceAll(readmeBlock(t, "unit: "+name), "/usr/local/bin/notification-server", buildBinary(t))
		text = strings.ReplaceAll(text, "User=seafile", "User=root") // there is no such user here
		path := filepath.Join(dir, name)
		os.MkdirAll(filepath.Dir(path), 0o755)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, ".socket") { // both units, without the drop-in and with it
			continue
		}
		p := start(t, []string{"SYSTEMD_UNIT_PATH=" + dir + ":"}, "systemd-analyze", "verify",
			filepath.Join(dir, "notification-server.socket"), filepath.Join(dir, "notification-server.service"))
		if code := p.wait(); code != 0 || strings.Contains(p.out.String(), "notification-server.") {
			t.Errorf("systemd-analyze verify, with %s, ends with %d: %s", name, code, p.out)
		}
	}
}

// ---- Cluster ----

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
	conn   *client
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
	waitFor(t, fmt.Sprintf("a member of %s gets %v; it got %v", m.repoID, want, got()), func() bool { return len(got()) >= len(want) })
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
		answer, text := request(s.t, "POST", "http://"+s.addr+"/events", lockEvent(clusterRepo(k), k), "Authorization: Token "+eventToken(later()))
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

// What the sender is told, and that nobody outside can post past the rules.
func TestClusterAnswers(t *testing.T) {
	t.Parallel()
	cl := startCluster(t)
	cl.startNginx("")
	good := "Authorization: Token " + eventToken(later())
	var members []*client
	for _, port := range cl.ports {
		members = append(members, connect(t, "127.0.0.1:"+port, asBrowser).subscribed(repoA, "alice@example.com"))
	}
	comment := fmt.Sprintf(`{"type":"comment-update","content":{"repo_id":%q,"type":"comment_updated"}}`, repoA)
	long := lockEvent(strings.Repeat("x", maxMessageBytes-200), 1)
	for _, tc := range []struct {
		name, url, body, token string
		want                   int
	}{
		{"an event of seaf-server", cl.events + "/events", update(repoA, "1"), good, 200},
		{"with a slash too many", cl.events + "//events", update(repoA, "2"), good, 200},
		{"a comment, which Seahub posts to its public URL", cl.public + "/notification/events", comment, good, 200},
		{"the longest", cl.events + "/events", long, good, 200},
		{"the longest, in public", cl.public + "/notification/events", long, good, 200},
		{"too long", cl.events + "/events", lockEvent(strings.Repeat("x", maxMessageBytes), 1), good, 413},
		{"a bad token", cl.events + "/events", update(repoA, "1"), "Authorization: Token x.y.z", 401},
		{"a client's token", cl.public + "/notification/events", update(repoA, "1"), "Authorization: Token " + clientToken(repoA, "alice@example.com", later()), 403},
		{"no event", cl.events + "/events", "{}", good, 400},
		{"one server's own rule", cl.events + "/node2", update(repoA, "1"), good, 404},
	} {
		answer, text := request(t, "POST", "http://"+tc.url, tc.body, tc.token)
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
		if answer, _ := request(t, "POST", "http://"+cl.events+"/events", update(repoA, "3"), good); answer.StatusCode != 200 {
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

func TestCheckOfACluster(t *testing.T) {
	t.Parallel()
	cl := startCluster(t)
	cl.startNginx("")
	var urls []string
	for _, port := range cl.ports {
		urls = append(urls, "http://127.0.0.1:"+port)
	}
	check := func(t *testing.T, events string, urls ...string) *process {
		return start(t, []string{"INNER_NOTIFICATION_SERVER_URL=" + events}, buildBinary(t), append([]string{"-c", cl.dirs[0], "-check"}, urls...)...)
	}
	t.Cleanup(func() { // behind the others
		cl.nodes[0].Process.Kill()
		cl.nodes[0].wait()
		p := check(t, "http://"+cl.events, "http://"+cl.public+"/notification")
		if code := p.wait(); code != 1 || strings.Count(p.out.String(), "✗") != 1 || !strings.Contains(p.out.String(), "first server of the cluster") {
			t.Errorf("exit status %d with the first server down: %s", code, p.out)
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
	text := "global\n\tmaxconn 4000\ndefaults\n\tlog stdout format raw daemon\n\ttimeout connect 5s\n\ttimeout client 60s\n\ttimeout server 60s\n" + readmeBlock(t, "haproxy: haproxy.cfg")
	for from, to := range map[string]string{"0.0.0.0:80": public, "192.168.0.137:80": "127.0.0.1:" + freePort(t), "127.0.0.1:8084": cl.events} {
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

// ---- Figures ----

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
				request(b, "POST", "http://"+addr+"/events", lockEvent(repoA, 1), "Authorization: Token "+eventToken(later()))
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
					c := connect(b, addr, asDesktop)
					go func() {
						for {
							opcode, payload, err := c.read()
							if err == nil && opcode == opClose {
								c.write(maskedFrame(0x80|opClose, payload))
							}
							if err != nil || opcode == opClose {
								c.nc.Close()
								return
							}
						}
					}()
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

// ---- Benchmarks: go test -bench . -run '^$' ----

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
	s.log.level = slog.LevelError
	start := time.Now()
	s.clock.uptime = func() time.Duration { return time.Since(start) + time.Hour }
	return s
}

// BenchmarkFanout is one event to n subscribers: from publishing it to the last one's having it.
func BenchmarkFanout(b *testing.B) {
	for _, n := range []int{1, 100, 1000, 5000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := startQuiet(b)
			ev := parseEvent([]byte(update(repoA, "7920509ee42fa792aec26c44588b6f65371084fa")))
			got := countedSubscribers(b, s.addr, n, len(ev.frame))
			b.ReportAllocs()
			for b.Loop() {
				again := *ev.message
				s.publish(&event{message: &again, kind: ev.kind, repoID: ev.repoID}, nil)
				<-got
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/delivery")
		})
	}
}

// BenchmarkEvent is one event end to end: posted by HTTP, checked, and at its subscriber.
func BenchmarkEvent(b *testing.B) {
	s := startQuiet(b)
	body := update(repoA, "7920509ee42fa792aec26c44588b6f65371084fa")
	ev := parseEvent([]byte(body))
	got := countedSubscribers(b, s.addr, 1, len(ev.frame))
	nc, err := net.Dial("tcp", s.addr)
	if err != nil {
		b.Fatal(err)
	}
	defer nc.Close()
	br := bufio.NewReader(nc)
	post := fmt.Appendf(nil, "POST /events HTTP/1.1\r\nHost: x\r\nAuthorization: Token %s\r\nContent-Length: %d\r\n\r\n%s", eventToken(later()), len(body), body)
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
	message := maskedFrame(0x80|opText, fmt.Appendf(nil, `{"type":"subscribe","content":{"repos":[{"id":%q,"jwt_token":%q}]}}`, repoA, clientToken(repoA, "alice@example.com", later())))
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
		if _, err := s.verify(token); err != nil {
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
		clients := make([]*client, n)
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
