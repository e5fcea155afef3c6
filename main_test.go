package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"html/template"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

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

// move moves the two times.
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
	if testing.Short() {
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
	chromium := start(t, []string{"HOME=" + dir}, "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
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
	run.says("✓", "connection")
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
	p := &process{t: t, out: &syncBuffer{}, done: make(chan error, 1)}
	p.Cmd = exec.Command("sh", append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`, buildBinary(t)}, args...)...)
	p.ExtraFiles = []*os.File{socket}
	p.Env = append(append(os.Environ(), "LISTEN_FDS=1"), env...)
	p.Stdout, p.Stderr = p.out, p.out
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.done <- p.Wait() }()
	t.Cleanup(func() { p.Process.Kill() })
	return p
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
	addr, dir := "127.0.0.1:"+port, writeConfig(t, port)
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
	if took := time.Since(stopped); took > 5*time.Second {
		t.Errorf("the stop took %v", took)
	}
	all.Wait()
	slices.SortFunc(closed, time.Time.Compare)
	if len(closed) > 0 {
		if spread := closed[len(closed)-1].Sub(closed[0]); spread < 700*time.Millisecond || spread > 3500*time.Millisecond {
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
	if code := second.wait(); code != 1 || !strings.Contains(second.out.String(), port+": bind: address already in use: another server, or an earlier start of this one, holds the port") {
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

// A sender posts events, one after the other, as seaf-server does.
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
		if answer.StatusCode != http.StatusOK || took > time.Second {
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

			if good, bad := pinged(); bad != 0 || good < 100 {
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

// A server that hangs, or a machine without power, takes no longer than 1 s of a
// sender's time for an event, and costs the clients of the others nothing.
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
			p := start(t, []string{"INNER_NOTIFICATION_SERVER_URL=" + tc.events}, buildBinary(t), append([]string{"-c", cl.dirs[0], "-check"}, tc.urls...)...)
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
			if good, bad := pinged(); tc.signal == syscall.SIGKILL && bad != 0 || good < 100 {
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

// subscribers connects n browsers to a server, each subscribed to repoA, whose
// frames are read and counted without allocation: got receives each total of n.
func subscribers(b *testing.B, addr string, n, frameBytes int) (got chan struct{}) {
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
			ev, err := parseEvent([]byte(update(repoA, "7920509ee42fa792aec26c44588b6f65371084fa")))
			if err != nil {
				b.Fatal(err)
			}
			got := subscribers(b, s.addr, n, len(ev.frame))
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
	ev, _ := parseEvent([]byte(body))
	got := subscribers(b, s.addr, 1, len(ev.frame))
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
