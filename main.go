// Notification-server tells Seafile's clients and web pages at once what changed.
//
// seaf-server posts every change to it, and it pushes the change over WebSocket
// to whoever has subscribed to that library: the library was updated, a file
// lock changed, a folder's permission changed, a file was commented. It takes
// the place of the server of the same name that Seafile ships, without a database.
//
// Usage:
//
//	notification-server -c DIR [-l FILE]          serve
//	notification-server -c DIR -check [URL ...]   test a running server
//	notification-server -version
//	notification-server -h
//
// DIR holds seafile.conf; it may also name that file itself. The log is appended
// to FILE; without -l, or with -l -, it goes to standard error.
//
// With -check it does all that seaf-server and a client do, at the URL by which
// clients come (https://cloud.example.com/notification), or without one at the
// host and port of the configuration, and exits 0 only if every step holds. With
// a URL for each server of a cluster, an event posted once must reach them all.
// It posts to INNER_NOTIFICATION_SERVER_URL if set, else to host and port.
//
// The section [notification] of seafile.conf configures it; the environment,
// where not empty, comes before the file:
//
//	enabled          false: do not run (default true)
//	host             address to listen on (0.0.0.0)     NOTIFICATION_SERVER_HOST
//	port             port to listen on (8083)           NOTIFICATION_SERVER_PORT
//	log_level        debug, info, warning, error (info) NOTIFICATION_SERVER_LOG_LEVEL
//	jwt_private_key  the key shared with seaf-server    JWT_PRIVATE_KEY
//	metrics          HOST:PORT for /metrics (off)       NOTIFICATION_SERVER_METRICS
//
// A value is everything behind the first "=", verbatim. With JWT_PRIVATE_KEY set,
// the file may be missing. SEAFILE_RPC_PIPE_PATH names the directory of
// seafile.sock, where seaf-server is asked for the members of groups;
// SEAFILE_LOG_TO_STDOUT=true logs to standard output.
//
// It answers GET /ping, POST /events, and the clients' WebSocket on /, below
// /notification too. An event is delivered, or the connection is closed so that
// its client asks Seafile for everything anew; it is never dropped in silence.
//
// SIGTERM and SIGINT end the server, SIGUSR1 opens the log file anew (for log
// rotation), SIGUSR2 writes the metrics to the log. Under systemd it serves the
// socket that it is handed, and tells when it is ready and that it is alive.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"log"
	"maps"
	"math"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/net/websocket"
)

// ---- Flags and main ----

const usage = `Usage:
  notification-server -c DIR [-l FILE]          serve
  notification-server -c DIR -check [URL ...]   test a running server
  notification-server -version

  -c DIR     directory of seafile.conf, or that file itself
  -l FILE    append the log to FILE (default: standard error)
  -check     test the server of this configuration, or the one behind URL, as
             its clients reach it: https://cloud.example.com/notification

Section [notification] of seafile.conf: enabled, host, port, log_level,
jwt_private_key, metrics. The environment comes first: JWT_PRIVATE_KEY,
NOTIFICATION_SERVER_HOST, _PORT, _LOG_LEVEL, _METRICS, SEAFILE_RPC_PIPE_PATH,
SEAFILE_LOG_TO_STDOUT. The whole manual is at the top of main.go.

A good check, and a bad one:
  ✓ configuration: conf/seafile.conf
  ✓ ping: http://127.0.0.1:8083/ping answers pong
  ✓ upgrade: goes through, for the desktop client and for a browser
  ✓ subscription: a good token is accepted, a broken one is answered jwt-expired
  ✓ event: posted to http://127.0.0.1:8083/events, it arrived after 1.2ms
  ✓ forgery: an event posted with a client's token is refused
  ✓ group members: seaf-server answers on runtime/seafile.sock
  ✓ connection: still there after a ping
  It works: a notification takes 1.2ms.

  ✓ configuration: conf/seafile.conf
  ✗ ping: https://cloud.example.com/notification/ping answers 502: the proxy cannot
    reach the notification server, which it must find at http://127.0.0.1:8083
  - upgrade: not tried, since a step before it failed
`

// A clock tells the two times that the server needs.
type clock struct {
	wall   func() time.Time     // time of day: tokens expire by it, also after it was set anew
	uptime func() time.Duration // since the start: silence and delays are measured by it, it never jumps
}

func main() {
	debug.SetGCPercent(200) // 8 % less CPU for a new client, for 1.3 KiB more memory each
	start := time.Now()
	uptime := func() time.Duration { return time.Since(start) }
	os.Exit(run(os.Args[1:], os.Getenv, os.Stdout, os.Stderr, clock{time.Now, uptime}))
}

// run is main with its surroundings as arguments. It returns the exit status:
// 0 after a stop or if disabled, 1 if the server cannot run, 2 for wrong flags.
func run(args []string, getenv func(string) string, stdout, stderr io.Writer, clk clock) int {
	flags := flag.NewFlagSet("notification-server", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() { fmt.Fprint(stderr, usage) }
	dir := flags.String("c", "", "")
	logFile := flags.String("l", "-", "")
	check := flags.Bool("check", false, "")
	version := flags.Bool("version", false, "")
	help := flags.Bool("h", false, "")
	if flags.Parse(args) != nil {
		return 2 // flags has said why
	}
	wrong := ""
	switch {
	case *help:
		fmt.Fprint(stdout, usage)
		return 0
	case *version:
		info, _ := debug.ReadBuildInfo()
		fmt.Fprintln(stdout, "notification-server", info.Main.Version, info.GoVersion)
		return 0
	case flags.NArg() > 0 && !*check:
		wrong = fmt.Sprintf("unexpected argument %q", flags.Arg(0))
	case *dir == "":
		wrong = "-c DIR is missing: the directory that holds seafile.conf"
	}
	if wrong != "" {
		fmt.Fprintf(stderr, "notification-server: %s\n%s", wrong, usage)
		return 2
	}
	if *check {
		return runCheck(*dir, flags.Args(), getenv, stdout)
	}

	lg := openLog(*logFile, getenv("SEAFILE_LOG_TO_STDOUT") == "true", stdout, stderr)
	fail := func(err error) int { // says it where an administrator looks: in the log, and where it was started
		lg.errorf("%v", err)
		if lg.path != "" {
			fmt.Fprintf(stderr, "notification-server: %v\n", err)
		}
		return 1
	}
	cfg, err := loadConfig(*dir, getenv)
	if err != nil {
		return fail(err)
	}
	lg.level = cfg.level
	for _, w := range cfg.warnings {
		lg.warnf("%s", w)
	}
	if !cfg.enabled {
		lg.infof("the notification server is disabled in %s: enabled = false", cfg.file)
		return 0
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGUSR1, syscall.SIGUSR2)
	defer signal.Stop(signals)
	ln, err := listen(cfg, getenv)
	if err != nil {
		return fail(err)
	}
	s := newServer(cfg, lg, clk)
	if cfg.metrics != "" {
		mln, err := net.Listen("tcp", cfg.metrics)
		if err != nil {
			return fail(fmt.Errorf("cannot serve metrics: %w", err))
		}
		ms := s.httpServer(http.HandlerFunc(s.serveMetrics))
		defer ms.Close()
		go ms.Serve(mln)
	}
	socket := cmp.Or(cfg.socket(), "seafile.sock, which is not there yet: "+strings.Join(cfg.sockets, ", "))
	lg.infof("started on %s; configuration: %s; group members are asked of %s; at most %d clients, by the limit of open files", ln.Addr(), cfg.source, socket, s.maxClients)

	served := make(chan error, 1)
	go func() { served <- s.http.Serve(ln) }()
	sdNotify(getenv, "READY=1")
	watchdog, _ := strconv.Atoi(getenv("WATCHDOG_USEC"))
	alive := time.Now()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			s.sweep()
			if half := time.Duration(watchdog) * time.Microsecond / 2; half > 0 && time.Since(alive) >= half-time.Second {
				s.publish(&event{kind: "repo-update", repoID: "watchdog"}, nil) // takes the locks that each event takes: a stuck one ends this
				alive = time.Now()
				sdNotify(getenv, "WATCHDOG=1")
			}
		case err := <-served:
			return fail(fmt.Errorf("cannot accept connections on %s any more: %w", ln.Addr(), err))
		case sig := <-signals:
			switch sig {
			case syscall.SIGUSR1:
				lg.reopen()
			case syscall.SIGUSR2:
				lg.infof("metrics: %s", strings.Join(s.figures(false), " "))
			default:
				lg.infof("stopping on signal %q", sig)
				sdNotify(getenv, "STOPPING=1")
				s.shutdown()
				lg.infof("stopped")
				return 0
			}
		}
	}
}

// listen takes the socket that systemd hands over (sd_listen_fds(3)), or opens
// the host and port of the configuration.
func listen(cfg *config, getenv func(string) string) (net.Listener, error) {
	if getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) && getenv("LISTEN_FDS") != "0" {
		file := os.NewFile(3, "socket from systemd") // SD_LISTEN_FDS_START
		defer file.Close()                           // FileListener has its own copy
		ln, err := net.FileListener(file)
		if err != nil {
			err = fmt.Errorf("cannot serve the socket that systemd handed over: %w: the .socket unit needs a ListenStream=", err)
		}
		return ln, err
	}
	lc := net.ListenConfig{KeepAlive: -1} // no probes of the kernel's: the server pings those who are silent
	ln, err := lc.Listen(context.Background(), "tcp", net.JoinHostPort(cfg.host, cfg.port))
	if err != nil {
		remedy := "check host and port, and that this user may use them"
		switch {
		case errors.Is(err, syscall.EADDRINUSE):
			remedy = "another server, or an earlier start of this one, holds port " + cfg.port + ": stop it first (pkill -f notification-server), or change port"
		case errors.Is(err, syscall.EADDRNOTAVAIL):
			remedy = "this machine has no address " + cfg.host + ": set host to one of its own or to 0.0.0.0; in a cluster, start the server on that node only"
		}
		err = fmt.Errorf("cannot listen: %w: %s", err, remedy)
	}
	return ln, err
}

// sdNotify tells systemd the state of the service (sd_notify(3)), if it asks.
func sdNotify(getenv func(string) string, state string) {
	if socket := getenv("NOTIFY_SOCKET"); socket != "" { // a leading @ means the abstract name space here, too
		if conn, err := net.Dial("unixgram", socket); err == nil {
			conn.Write([]byte(state))
			conn.Close()
		}
	}
}

// ---- Configuration ----

// manualKey is printed in Seafile's manual, and so known to everybody.
const manualKey = "M@O8VWUb81YvmtWLHGB2I_V7di5-@0p(MF*GrE!sIws23F"

type config struct {
	file       string // of the settings, whether it is there or not
	source     string // which file and variables they come from, for the log
	enabled    bool
	host, port string
	level      level
	key        []byte
	metrics    string   // HOST:PORT, or "" for none
	sockets    []string // where seafile.sock may be; the first that exists is asked
	warnings   []string // for the log, at each start
}

// loadConfig reads seafile.conf in the directory path, or path itself, and what
// the environment says in its place. Its errors name file, line and remedy.
func loadConfig(path string, getenv func(string) string) (*config, error) {
	dir, cfg := path, &config{file: filepath.Join(path, "seafile.conf"), enabled: true}
	if info, err := os.Stat(path); err == nil && !info.IsDir() || err != nil && strings.HasSuffix(path, ".conf") {
		dir, cfg.file = filepath.Dir(path), path
	}
	if _, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("cannot read the configuration: %w: give the directory that holds seafile.conf with -c", err)
	}
	data, err := os.ReadFile(cfg.file)
	cfg.source = cfg.file
	switch {
	case errors.Is(err, fs.ErrNotExist) && getenv("JWT_PRIVATE_KEY") != "":
		cfg.source = "no file (there is no " + cfg.file + ")"
	case err != nil:
		return nil, fmt.Errorf("cannot read the configuration: %w: it must be readable to this user, or missing and JWT_PRIVATE_KEY set in the environment", err)
	}
	settings, err := parseConfig(cfg.file, string(data))
	if err != nil {
		return nil, err
	}
	for _, v := range [][2]string{
		{"host", "NOTIFICATION_SERVER_HOST"}, {"port", "NOTIFICATION_SERVER_PORT"}, {"log_level", "NOTIFICATION_SERVER_LOG_LEVEL"},
		{"metrics", "NOTIFICATION_SERVER_METRICS"}, {"jwt_private_key", "JWT_PRIVATE_KEY"},
	} {
		if value := getenv(v[1]); value != "" {
			settings[v[0]] = setting{value, "environment variable " + v[1]}
			cfg.source += ", " + v[1]
		}
	}

	if v := settings["enabled"]; v.value != "" {
		if cfg.enabled, err = strconv.ParseBool(strings.ToLower(v.value)); err != nil {
			return nil, fmt.Errorf("%s: enabled must be true or false", v.where)
		}
	}
	cfg.host, cfg.port, cfg.metrics = cmp.Or(settings["host"].value, "0.0.0.0"), "8083", settings["metrics"].value
	if v, ok := settings["port"]; ok {
		if n, err := strconv.ParseUint(v.value, 10, 16); err != nil || n == 0 {
			return nil, fmt.Errorf("%s: port must be a number from 1 to 65535, not %q", v.where, v.value)
		}
		cfg.port = v.value
	}
	if _, _, err := net.SplitHostPort(cfg.metrics); err != nil && cfg.metrics != "" {
		return nil, fmt.Errorf("%s: metrics must be HOST:PORT, as in 127.0.0.1:9083, not %q", settings["metrics"].where, cfg.metrics)
	}
	if v, ok := settings["log_level"]; ok {
		if cfg.level, ok = levels[strings.ToLower(v.value)]; !ok {
			cfg.warnings = append(cfg.warnings, fmt.Sprintf("%s: log_level %q is not known and means info; use debug, info, warning or error", v.where, v.value))
		}
	}
	key := settings["jwt_private_key"]
	cfg.key = []byte(key.value)
	const remedy = ": make one with \"openssl rand -base64 32\", the same for seaf-server, and restart Seafile"
	switch {
	case !cfg.enabled:
	case key.value == "":
		return nil, fmt.Errorf("%s: section [notification] has no jwt_private_key, nor has the environment JWT_PRIVATE_KEY%s", cfg.file, remedy)
	case key.value == manualKey:
		cfg.warnings = append(cfg.warnings, key.where+": jwt_private_key is the one printed in Seafile's manual, with which anyone can forge events and read them"+remedy)
	case len(key.value) < 32:
		cfg.warnings = append(cfg.warnings, key.where+": jwt_private_key is shorter than 32 bytes and may be guessed"+remedy)
	}
	if rpc := getenv("SEAFILE_RPC_PIPE_PATH"); rpc != "" {
		cfg.sockets = []string{filepath.Join(rpc, "seafile.sock")}
	}
	cfg.sockets = append(cfg.sockets, filepath.Join(dir, "../seafile-server-latest/runtime/seafile.sock"), filepath.Join(dir, "../seafile-data/seafile.sock"))
	return cfg, nil
}

// A setting is a value and where it stands: file:line, or the name of a variable.
type setting struct{ value, where string }

// parseConfig returns the settings of section [notification]; other sections
// are Seafile's. No error shows the text of a line: it may be the key.
func parseConfig(file, data string) (map[string]setting, error) {
	settings, ours, number := map[string]setting{}, false, 0
	for line := range strings.Lines(strings.TrimPrefix(data, "\ufeff")) {
		number++
		line = strings.TrimSpace(line)
		where := fmt.Sprintf("%s:%d", file, number)
		switch key, value, found := strings.Cut(line, "="); {
		case line == "" || line[0] == '#' || line[0] == ';':
		case line[0] == '[' && line[len(line)-1] == ']':
			ours = strings.TrimSpace(line[1:len(line)-1]) == "notification"
		case line[0] == '[' && (ours || strings.HasPrefix(line, "[notification")):
			return nil, fmt.Errorf("%s: a section header must end with its bracket, as in [notification], and nothing behind it", where)
		case !ours:
		case !found || line[0] == '=':
			return nil, fmt.Errorf("%s: neither \"key = value\" nor a comment (a line that begins with # or ;): correct or remove it", where)
		default:
			settings[strings.TrimSpace(key)] = setting{strings.TrimSpace(value), where}
		}
	}
	return settings, nil
}

// socket returns the first of the sockets that exists now, or "".
func (cfg *config) socket() string {
	for _, path := range cfg.sockets {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return ""
}

// ---- Tokens ----

// claims are what a token says of its bearer.
type claims struct {
	Expires   *float64 `json:"exp"` // Unix time in seconds
	NotBefore *float64 `json:"nbf"`
	RepoID    string   `json:"repo_id"`
	Username  string   `json:"username"`
}

// A refusal tells why a token, an event or a client is not accepted.
type refusal struct {
	status int    // of HTTP
	reason string // a word for the metrics
	text   string // a sentence for whoever sent it and for the log
}

// unixSeconds is the time of day as the claims of tokens give it.
func (s *server) unixSeconds() float64 { return float64(s.clock.wall().UnixMicro()) / 1e6 }

// verify checks a JSON Web Token signed with HS256 (RFC 7515 and 7519) by our
// key, and returns its claims. Whatever its header says, no other algorithm is
// ever tried, and no claim is looked at before the signature.
func (s *server) verify(token string) (claims, *refusal) {
	refuse := func(reason, text string, args ...any) (claims, *refusal) {
		return claims{}, &refusal{http.StatusUnauthorized, reason, fmt.Sprintf(text, args...)}
	}
	parts := strings.Split(token, ".")
	var raw [3][]byte
	for i, part := range parts {
		decoded, err := base64.RawURLEncoding.Strict().DecodeString(part)
		if err != nil || len(parts) != len(raw) || strings.ContainsAny(part, "\r\n") { // which the decoder skips
			return refuse("malformed", "the token is not three parts of unpadded base64url")
		}
		raw[i] = decoded
	}
	var header struct{ Alg string }
	if json.Unmarshal(raw[0], &header) != nil || header.Alg != "HS256" {
		return refuse("algorithm", "the token's header does not name HS256")
	}
	mac := s.macs.Get().(hash.Hash)
	mac.Reset()
	mac.Write([]byte(token[:strings.LastIndexByte(token, '.')]))
	good := hmac.Equal(raw[2], mac.Sum(nil))
	s.macs.Put(mac)
	if !good {
		return refuse("signature", "the token's signature does not match: jwt_private_key differs between here and seaf-server or Seahub, or one of them was not restarted since it changed")
	}
	var c claims
	err := json.Unmarshal(raw[1], &c)
	switch now := s.unixSeconds(); {
	case err != nil:
		return refuse("malformed", "the token's claims are not as they should be: %v", err)
	case c.Expires == nil:
		return refuse("malformed", "the token has no exp")
	case *c.Expires <= now-3600:
		return refuse("expired", "the token expired more than an hour ago")
	case *c.Expires <= now:
		return refuse("expired", "the token expired %.0f s ago: if this goes on, the clocks of this machine and of seaf-server's differ", now-*c.Expires)
	case c.NotBefore != nil && *c.NotBefore > now:
		return refuse("not-yet", "the token is valid only in %.0f s: the clocks of this machine and of its maker's differ", *c.NotBefore-now)
	}
	return c, nil
}

// ---- The map of subscriptions ----

const (
	reservedFiles = 64               // descriptors kept from clients, for events, /ping and the log
	repeatDelay   = 4 * time.Second  // a desktop client forgets an update 1.0–1.6 s after its download, and heeds it again after 3–6 s
	repeatWindow  = 30 * time.Second // between two updates, within which the newer one may be forgotten
	pingAfter     = 20 * time.Second // of silence; proxies cut at 50–60 s, browsers do not ping
	deadAfter     = 60 * time.Second // without a frame
	idleLimit     = 2 * time.Minute  // without a subscription
	expiryBatch   = maxOutbox / 2    // subscriptions of one connection ended in one sweep: all at once could fill its outbox
	drainTime     = 3 * time.Second  // over which clients are closed at the end, since all come back together
)

// A server holds everything. Its map from library to subscriptions is guarded by
// mu, which is held to look up and to queue, never to write: 10,000 subscribers
// take about 1 ms. A connection's own lock may be taken under it, not the reverse.
type server struct {
	log        *logger
	cfg        *config
	clock      clock
	http       *http.Server
	macs       sync.Pool // of hash.Hash: HMAC-SHA256 with the key
	ping, pong *message  // empty ones
	work       chan func()
	maxClients int64
	clients    atomic.Int64 // WebSocket connections, and those about to be
	metrics

	mu            sync.Mutex // guards all below, and the fields of conn and library that say so
	libraries     map[string]*library
	repeats       map[*library]bool // those with an update to be repeated
	conns         map[*conn]bool
	subscriptions int
	stopping      bool
}

// A library is a Seafile library (repo) with at least one subscription. Guarded by server.mu.
type library struct {
	id      string
	subs    map[*conn]subscription
	updated time.Duration // uptime at the newest update
	repeat  *message      // that update, if it is to be repeated
}

// A subscription of a connection to a library has its own user, since one
// desktop client can carry several accounts over one connection.
type subscription struct {
	user    string
	expires float64 // Unix time in seconds
}

func newServer(cfg *config, lg *logger, clk clock) *server {
	var limit syscall.Rlimit // Go has raised the soft limit to the hard one before main
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit)
	s := &server{
		log: lg, cfg: cfg, clock: clk, maxClients: max(int64(min(limit.Cur, 1<<30))-reservedFiles, 1),
		ping: &message{frame: frame(opPing, nil)}, pong: &message{frame: frame(opPong, nil), replaces: "pong"},
		work: make(chan func()), libraries: map[string]*library{}, repeats: map[*library]bool{}, conns: map[*conn]bool{},
		metrics: metrics{started: clk.wall(), counts: map[series]int64{}},
	}
	s.macs.New = func() any { return hmac.New(sha256.New, cfg.key) }
	s.http = s.httpServer(s)
	return s
}

// subscribe adds a subscription of c, or renews the one it has.
func (s *server) subscribe(c *conn, cl claims) {
	s.mu.Lock()
	defer s.mu.Unlock()
	lib := s.libraries[cl.RepoID]
	if lib == nil {
		lib = &library{id: cl.RepoID, subs: map[*conn]subscription{}, updated: -repeatWindow}
		s.libraries[lib.id] = lib
	}
	if _, renewed := lib.subs[c]; !renewed {
		c.libraries = append(c.libraries, lib)
		s.subscriptions++
	}
	lib.subs[c] = subscription{cl.Username, *cl.Expires}
	c.expires = min(c.expires, *cl.Expires)
}

// unsubscribe ends the subscriptions of c that are chosen. mu must be held.
func (s *server) unsubscribe(c *conn, chosen func(*library) bool) {
	had := len(c.libraries)
	c.expires = math.Inf(1)
	c.libraries = slices.DeleteFunc(c.libraries, func(lib *library) bool {
		if !chosen(lib) {
			c.expires = min(c.expires, lib.subs[c].expires)
			return false
		}
		if delete(lib.subs, c); len(lib.subs) == 0 {
			delete(s.libraries, lib.id)
			delete(s.repeats, lib)
		}
		s.subscriptions--
		return true
	})
	if had > 0 && len(c.libraries) == 0 {
		c.bare = s.clock.uptime()
	}
}

// publish queues ev for the subscribers that it is for, and returns how many
// they are. Events queued one after the other arrive in that order everywhere.
// members are the users it is for, where it is for a group.
func (s *server) publish(ev *event, members map[string]bool) int {
	m := textMessage(ev.text)
	m.event, m.accepted = true, s.clock.uptime()
	s.mu.Lock()
	lib := s.libraries[ev.repoID]
	if lib != nil && ev.kind == "repo-update" {
		m.replaces = ev.repoID
		lib.repeat = nil
		if m.accepted-lib.updated < repeatWindow {
			lib.repeat = m
			s.repeats[lib] = true
		}
		lib.updated = m.accepted
	}
	n, ready := s.deliver(lib, m, func(c *conn, user string) bool {
		return (ev.user == "" || ev.user == user) && (members == nil || members[user])
	})
	s.mu.Unlock()
	flush(ready)
	return n
}

// resync closes the subscribers of a library, so that they ask Seafile for
// everything anew, and returns how many they are.
func (s *server) resync(repoID, why string) int {
	s.mu.Lock()
	n, ready := s.deliver(s.libraries[repoID], closing(statusRestart, "resync", why), func(*conn, string) bool { return true })
	s.mu.Unlock()
	flush(ready)
	return n
}

// deliver queues m for each live subscription of lib that is wanted. It returns
// how many took it, and whom the caller must flush without mu, which must be held.
func (s *server) deliver(lib *library, m *message, wanted func(c *conn, user string) bool) (n int, ready []*conn) {
	if lib == nil {
		return 0, nil
	}
	now := s.unixSeconds()
	for c, sub := range lib.subs {
		if sub.expires > now && wanted(c, sub.user) && c.queue(m, &ready) {
			n++
			s.log.sent(c, sub.user, m)
		}
	}
	return n, ready
}

// flush writes what the connections have waiting. A write never waits, so a
// few are made at once, and many in the background, on all cores.
func flush(ready []*conn) {
	write := func(part []*conn) {
		for _, c := range part {
			c.write()
		}
	}
	if len(ready) < 16 {
		write(ready)
		return
	}
	for part := range slices.Chunk(ready, len(ready)/runtime.GOMAXPROCS(0)+1) {
		go write(part)
	}
}

// sweep does what time brings about; it is called each second. It repeats
// updates, ends subscriptions whose token has run out, pings those who are
// silent, and closes the stuck, the dead and those who want nothing. For 100,000
// connections it holds mu for some milliseconds.
func (s *server) sweep() {
	uptime, now := s.clock.uptime(), s.unixSeconds()
	var ready []*conn
	s.mu.Lock()
	for lib := range s.repeats {
		if m := lib.repeat; m == nil {
			delete(s.repeats, lib)
		} else if uptime-lib.updated >= repeatDelay {
			again := *m
			again.accepted = uptime
			_, more := s.deliver(lib, &again, func(c *conn, _ string) bool { return c.desktop })
			ready = append(ready, more...)
			lib.repeat = nil
		}
	}
	for c := range s.conns {
		heard, writing := time.Duration(c.heard.Load()), time.Duration(c.writing.Load())
		switch {
		case writing > 0 && uptime-writing >= writeWait:
			s.log.warnf("%s: closed, since nothing could be written for %v: the client, or the network to it, is stuck", c, writeWait)
			c.abort("stalled")
		case uptime-heard >= deadAfter:
			c.queue(closing(statusPolicy, "silent", "no frame for 60 s"), &ready)
		case len(c.libraries) == 0 && uptime-c.bare >= idleLimit:
			c.queue(closing(statusPolicy, "idle", "no subscription for 2 minutes"), &ready)
		case uptime-max(heard, c.pinged) >= pingAfter:
			c.pinged = uptime
			c.queue(s.ping, &ready)
		}
		if c.expires <= now {
			ended := 0
			s.unsubscribe(c, func(lib *library) bool {
				sub := lib.subs[c]
				if sub.expires > now || ended == expiryBatch {
					return false
				}
				ended++
				m := expired(lib.id)
				c.queue(m, &ready)
				s.log.sent(c, sub.user, m)
				return true
			})
		}
	}
	s.mu.Unlock()
	flush(ready)
}

// shutdown frees the port, then closes the clients, spread over drainTime, and
// waits for them; in all it takes less than 5 s.
func (s *server) shutdown() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second) // a question for group members takes 800 ms at most
	defer cancel()
	stopped := make(chan error, 1)
	go func() { stopped <- s.http.Shutdown(ctx) }() // closes the listener, then waits for requests
	s.mu.Lock()
	s.stopping = true
	conns := slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	start, gap := time.Now(), min(time.Millisecond, drainTime/time.Duration(len(conns)+1))
	for i, c := range conns {
		time.Sleep(time.Until(start.Add(time.Duration(i) * gap)))
		c.send(closing(statusGoingAway, "shutdown", "the server is restarted"))
	}
	<-stopped
	for end := time.Now().Add(closeWait); s.clients.Load() > 0 && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond)
	}
}

// ---- A client's connection ----

const (
	subprotocol     = "notification.seafile.com" // offered by the desktop client, which fails on any other
	desktopBytes    = 4096                       // of a message, at most, are parsed by the desktop client
	maxMessageBytes = 1 << 20                    // of a client's message and of an event
	maxOutboxBytes  = maxMessageBytes + 10       // the largest event with its frame header always fits
	maxOutbox       = 1024                       // messages
	maxRefused      = 1000                       // subscriptions in a row, until the client is closed
	readBufferBytes = 512                        // per connection; a desktop client's subscribe takes 323 bytes
	writeWait       = 20 * time.Second           // without one byte written, until a slow client is closed
	closeWait       = time.Second                // for the client's half of the closing handshake
)

// Opcodes and close statuses of RFC 6455, sections 5.2 and 7.4.1, and of the IANA registry.
const (
	opContinuation, opText, opBinary, opClose, opPing, opPong = 0, 1, 2, 8, 9, 10

	statusNo, statusGoingAway, statusProtocol, statusInvalid, statusPolicy = 0, 1001, 1002, 1007, 1008
	statusTooBig, statusInternal, statusRestart, statusTryLater            = 1009, 1011, 1012, 1013
)

// A message is a frame on its way to one or many clients. It is never changed.
type message struct {
	frame    []byte
	text     []byte        // of a text frame, for the log
	replaces string        // older messages with the same, still waiting in an outbox, are dropped for this one; "" none
	closes   string        // of a close frame: why, for the metrics
	event    bool          // counted as a delivery
	accepted time.Duration // uptime, of an event
}

// frame makes one whole unmasked frame (RFC 6455, section 5.2).
func frame(opcode byte, payload []byte) []byte {
	f := append(make([]byte, 0, len(payload)+10), 0x80|opcode)
	switch n := len(payload); {
	case n < 126:
		f = append(f, byte(n))
	case n < 1<<16:
		f = binary.BigEndian.AppendUint16(append(f, 126), uint16(n))
	default:
		f = binary.BigEndian.AppendUint64(append(f, 127), uint64(n))
	}
	return append(f, payload...)
}

func textMessage(text []byte) *message { return &message{frame: frame(opText, text), text: text} }

// expired tells a client that its token for a library does not hold (any more).
func expired(repoID string) *message {
	id, _ := json.Marshal(repoID)
	return textMessage(fmt.Appendf(nil, `{"type":"jwt-expired","content":{"repo_id":%s}}`, id))
}

// closing ends a connection: why is for the metrics, text for the client. A
// control frame holds 125 bytes.
func closing(status int, why, text string) *message {
	var payload []byte
	if status != statusNo {
		payload = append(binary.BigEndian.AppendUint16(nil, uint16(status)), text[:min(len(text), 123)]...)
	}
	return &message{frame: frame(opClose, payload), text: payload, closes: why}
}

// A conn is a client's WebSocket connection. One goroutine reads from it. Who
// finds the outbox empty and queues a message must see to it that it is written.
type conn struct {
	server    *server
	nc        net.Conn
	raw       syscall.RawConn
	forwarded string       // X-Forwarded-For
	desktop   bool         // speaks the subprotocol
	refused   int          // subscriptions in a row; the reader's
	heard     atomic.Int64 // uptime at the last frame
	writing   atomic.Int64 // uptime since which a write waits, 0 if none does

	libraries []*library    // subscribed to; this and the next three are guarded by server.mu
	expires   float64       // of the first subscription to expire
	bare      time.Duration // uptime since which there is no subscription
	pinged    time.Duration // uptime of our last ping

	mu      sync.Mutex // guards all below; not held while writing
	outbox  []*message // the first is being written
	one     [1]*message
	bytes   int    // in outbox
	written int    // of the first
	closed  string // why it is being closed
}

// String gives the client's address for the log, and what a proxy says of it.
func (c *conn) String() string { return peer(c.nc.RemoteAddr().String(), c.forwarded) }

func peer(address, forwarded string) string {
	if forwarded == "" {
		return address
	}
	return fmt.Sprintf("%s for %.100q", address, forwarded)
}

// queue puts m into the outbox and reports whether it was taken. If the outbox
// was empty, c is appended to ready, which the caller must flush. A client that
// is too slow, or that cannot take m, is closed: it must not miss m unknowingly.
// Behind a close frame comes nothing; the client has closeWait to answer it.
func (c *conn) queue(m *message, ready *[]*conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed != "" {
		return false
	}
	for i := len(c.outbox) - 1; i > 0 && m.replaces != ""; i-- { // the first is on its way
		if c.outbox[i].replaces == m.replaces {
			c.bytes -= len(c.outbox[i].frame)
			c.outbox = slices.Delete(c.outbox, i, i+1)
		}
	}
	taken := false
	switch {
	case m.closes != "":
	case c.desktop && len(m.frame) > desktopBytes+4: // 4 bytes of frame header
		m = closing(statusRestart, "too-long", "an event is too long for this client")
	case len(c.outbox) >= maxOutbox || c.bytes+len(m.frame) > maxOutboxBytes:
		c.outbox, c.bytes = slices.Delete(c.outbox, 1, len(c.outbox)), len(c.outbox[0].frame)
		m = closing(statusTryLater, "outbox-full", "too slow")
		c.server.log.warnf("%s: closed, since its outbox is full: the client, or the network to it, is too slow", c)
	default:
		taken = true
	}
	if m.closes != "" {
		c.closed = m.closes
		c.nc.SetReadDeadline(time.Now().Add(closeWait))
	}
	if len(c.outbox) == 0 {
		c.outbox = c.one[:0] // an outbox of one, the common case, needs no memory of its own
		*ready = append(*ready, c)
	}
	c.outbox = append(c.outbox, m)
	c.bytes += len(m.frame)
	return taken
}

// send queues and writes m.
func (c *conn) send(m *message) {
	var ready []*conn
	c.queue(m, &ready)
	flush(ready)
}

// write writes what the kernel has room for and never waits, so that a few
// goroutines serve all clients, and a slow one keeps nobody.
func (c *conn) write() {
	for data := c.next(0); data != nil; {
		n := 0
		c.raw.Write(func(fd uintptr) bool {
			n, _ = syscall.Write(int(fd), data)
			return true // do not wait for room
		})
		if n < len(data) { // full, or an error, which drain will see, too
			go c.drain(c.next(max(n, 0)))
			return
		}
		data = c.next(n)
	}
}

// drain is write for a slow client, for whom it waits, though not for ever: see sweep.
func (c *conn) drain(data []byte) {
	for data != nil {
		n, err := c.nc.Write(data[:min(len(data), 16<<10)])
		if err != nil {
			c.abort("gone")
		}
		data = c.next(n)
	}
}

// next counts n more bytes of the outbox as written and returns what comes next, or nil.
func (c *conn) next(n int) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.written += n; len(c.outbox) > 0 && c.written == len(c.outbox[0].frame) {
		m := c.outbox[0]
		c.written = 0
		c.bytes -= len(m.frame)
		c.outbox = slices.Delete(c.outbox, 0, 1)
		if m.event {
			c.server.delivered(c.server.clock.uptime() - m.accepted)
		}
		if half, ok := c.nc.(interface{ CloseWrite() error }); ok && m.closes != "" {
			half.CloseWrite() // the client sees the end; closing both ways, while it still sends, would reset and lose the frame
		}
	}
	if len(c.outbox) == 0 {
		c.outbox = nil
		c.writing.Store(0)
		return nil
	}
	c.writing.Store(int64(c.server.clock.uptime()))
	return c.outbox[0].frame[c.written:]
}

// abort ends the connection at once.
func (c *conn) abort(why string) {
	c.mu.Lock()
	c.closed = cmp.Or(c.closed, why)
	c.outbox, c.bytes = nil, 0
	c.mu.Unlock()
	c.nc.Close()
}

// add enters c into the list of connections, and reports whether the server goes on.
func (s *server) add(c *conn) bool {
	c.bare, c.expires = s.clock.uptime(), math.Inf(1)
	c.heard.Store(int64(c.bare))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns[c] = true
	return !s.stopping
}

// remove ends all that the server holds for c.
func (s *server) remove(c *conn) {
	c.abort("gone")
	s.mu.Lock()
	s.unsubscribe(c, func(*library) bool { return true })
	delete(s.conns, c)
	s.mu.Unlock()
	s.clients.Add(-1)
	s.count("closed_total", c.closed)
	s.log.debugf("%s: disconnected: %s", c, c.closed)
}

// serve is the goroutine of c. It waits for frames, and answers the empty pings
// that a desktop client sends each second. All else is done apart: a stack that
// has grown once does not shrink again, and so an idle connection keeps 2 KiB
// of it, not 8.
func (c *conn) serve(r *frames) {
	done := make(chan *message)
	for c.idle(r.br) {
		c.server.apart(func() { done <- c.guard(func() *message { return c.readFrame(r) }) })
		if m := <-done; m != nil {
			if m.closes != "" {
				c.send(m)
				io.Copy(io.Discard, c.nc) // until the client ends it, or closeWait
			}
			break
		}
	}
	c.server.remove(c)
}

// apart runs f on a goroutine that has run one before, if there is one: growing
// a stack anew was a tenth of the CPU for a new client. It ends when idle for 1 s.
func (s *server) apart(f func()) {
	select {
	case s.work <- f:
	default:
		go func() {
			for ok := true; ok; {
				f()
				select {
				case f = <-s.work:
				case <-time.After(time.Second):
					ok = false
				}
			}
		}()
	}
}

// idle returns true when there is something else to read than empty pings, and
// false when the client is gone.
func (c *conn) idle(br *bufio.Reader) bool {
	for {
		head, err := br.Peek(2)
		if err != nil || head[0] != 0x80|opPing || head[1] != 0x80 {
			return err == nil
		}
		if _, err := br.Discard(6); err != nil {
			return false
		}
		c.heard.Store(int64(c.server.clock.uptime()))
		c.send(c.server.pong)
	}
}

// guard keeps a panic in what c asked for from ending more than c.
func (c *conn) guard(f func() *message) (m *message) {
	defer func() {
		if p := recover(); p != nil {
			c.server.log.errorf("%s: closed, since its handler panicked: %q; please report this: %q", c, fmt.Sprint(p), debug.Stack())
			m = closing(statusInternal, "panic", "internal error")
		}
	}()
	return f()
}

// frames are what comes from a client.
type frames struct {
	br   *bufio.Reader
	next func() (frameReader, error)
	kind byte         // the opcode of the message of which data is a part, or 0 between messages
	data bytes.Buffer // of the fragments so far
}

// A frameReader is a frame as x/net/websocket reads and unmasks it.
type frameReader interface {
	io.Reader                // of the payload
	HeaderReader() io.Reader // of the header, as it came
	Len() int                // of both
}

var gone = &message{} // stands for a client that is not there any more

// readFrame reads a frame and handles what it completes. It returns the message
// with which to close the connection, or nil. x/net/websocket parses a frame and
// unmasks its payload, but checks nothing: so what RFC 6455, section 5, forbids
// is looked for here, in the header as it came.
func (c *conn) readFrame(r *frames) *message {
	violation := func(text string) *message { return closing(statusProtocol, "protocol", text) }
	f, err := r.next()
	if err != nil {
		return gone
	}
	h, _ := io.ReadAll(f.HeaderReader())
	fin, opcode, size := h[0]&0x80 != 0, h[0]&0x0f, f.Len()-len(h)
	control := opcode >= opClose
	var payload bytes.Buffer
	to := &r.data
	if control {
		to = &payload
	}
	switch {
	case h[0]&0x70 != 0:
		return violation("reserved bits are set, but no extension was agreed on")
	case opcode > opBinary && !control || opcode > opPong:
		return violation("unknown opcode")
	case h[1]&0x80 == 0:
		return violation("a client must mask its frames")
	case control && (!fin || size > 125):
		return violation("a control frame is fragmented or longer than 125 bytes")
	case !control && (opcode == opContinuation) != (r.kind != 0):
		return violation("a fragment is out of place")
	case size > maxMessageBytes-to.Len() || len(h) == 14 && h[2]&0x80 != 0: // the first of 64 bits, which x/net/websocket drops
		return closing(statusTooBig, "too-big", "a message is longer than 1 MiB")
	}
	if _, err := io.CopyN(to, f, int64(size)); err != nil { // memory as the bytes come, not as the header promises
		return gone
	}
	c.heard.Store(int64(c.server.clock.uptime()))
	switch opcode {
	case opPing:
		c.send(&message{frame: frame(opPong, payload.Bytes()), replaces: "pong"})
	case opClose:
		return closeAnswer(payload.Bytes())
	case opText, opBinary:
		r.kind = opcode
	}
	if control || !fin {
		return nil
	}
	data := r.data.Bytes()
	if r.kind == opText && !utf8.Valid(data) {
		return closing(statusInvalid, "protocol", "a text message is not UTF-8")
	}
	r.data, r.kind = bytes.Buffer{}, 0
	return c.handle(data)
}

// closeAnswer checks a client's close frame and answers with its own status.
func closeAnswer(payload []byte) *message {
	status := statusNo
	if len(payload) >= 2 {
		status = int(binary.BigEndian.Uint16(payload))
	}
	switch {
	case len(payload) == 1, len(payload) > 1 && (status < 1000 || status >= 1004 && status <= 1006 || status > 1014 && status < 3000 || status > 4999):
		return closing(statusProtocol, "protocol", "a close status that must not be sent")
	case len(payload) > 2 && !utf8.Valid(payload[2:]):
		return closing(statusInvalid, "protocol", "the reason of a close frame is not UTF-8")
	}
	return closing(status, "client", "")
}

// handle carries out a client's message: subscribe or unsubscribe.
func (c *conn) handle(data []byte) *message {
	var m struct {
		Type    string
		Content struct {
			Repos []struct {
				ID    string
				Token string `json:"jwt_token"`
			}
		}
	}
	wrong := ""
	if err := json.Unmarshal(data, &m); err != nil {
		wrong = fmt.Sprintf("not a message: %+.60q", err)
	} else if m.Type != "subscribe" && m.Type != "unsubscribe" {
		wrong = fmt.Sprintf("unknown type %+.60q: subscribe or unsubscribe", m.Type)
	} else if m.Content.Repos == nil {
		wrong = `no "repos" in "content"`
	}
	for _, repo := range m.Content.Repos {
		if repo.ID == "" {
			wrong = `a repo without "id"`
		}
	}
	if wrong != "" {
		return closing(statusPolicy, "bad-message", wrong)
	}
	for _, repo := range m.Content.Repos {
		if m.Type == "unsubscribe" {
			c.server.mu.Lock()
			gone := c.server.libraries[repo.ID]
			c.server.unsubscribe(c, func(lib *library) bool { return lib == gone })
			c.server.mu.Unlock()
			c.server.log.debugf("%s: unsubscribed from %q", c, repo.ID)
			continue
		}
		cl, refused := c.server.verify(repo.Token)
		if refused == nil && cl.RepoID != repo.ID {
			refused = &refusal{http.StatusForbidden, "other-library", "the token is for another library"}
		}
		if refused == nil {
			c.refused = 0
			c.server.subscribe(c, cl)
			c.server.log.debugf("%s: subscribed to %q, user %q", c, repo.ID, cl.Username)
			continue
		}
		c.server.refuse("a subscription", c.String(), refused)
		if c.refused++; c.refused >= maxRefused {
			c.server.log.warnf("%s: closed after %d refused subscriptions in a row; the last one: %s", c, c.refused, refused.text)
			return closing(statusPolicy, "refused", "too many refused subscriptions")
		}
		c.send(expired(repo.ID))
	}
	return nil
}

// ---- The HTTP handlers ----

// httpServer serves handler with deadlines: who sends a request or takes an
// answer slowly is cut off. Idle connections stay for longer than those of the
// senders, whose pools keep them for 90 s (Go) and 118 s (libcurl).
func (s *server) httpServer(handler http.Handler) *http.Server {
	return &http.Server{
		Handler: handler, MaxHeaderBytes: 16 << 10, ErrorLog: log.New(s.log, "", 0),
		ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 20 * time.Second, WriteTimeout: 20 * time.Second, IdleTimeout: 3 * time.Minute,
	}
}

// ServeHTTP routes by path. Repeated and trailing slashes and a leading
// /notification mean nothing: each proxy rule in use leaves others of them.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	parts := strings.FieldsFunc(r.URL.Path, func(c rune) bool { return c == '/' })
	if len(parts) > 0 && parts[0] == "notification" {
		parts = parts[1:]
	}
	var handle http.HandlerFunc
	methods := []string{"GET", "HEAD"}
	switch strings.Join(parts, "/") {
	case "":
		handle = s.serveWebSocket
	case "ping":
		handle = func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, `{"ret": "pong"}`) }
	case "events":
		handle, methods = s.serveEvents, []string{"POST"}
	default:
		http.Error(w, "not found: the notification server answers /, /ping and /events", http.StatusNotFound)
		return
	}
	if !slices.Contains(methods, r.Method) {
		w.Header().Set("Allow", strings.Join(methods, ", "))
		http.Error(w, "use "+strings.Join(methods, " or "), http.StatusMethodNotAllowed)
		return
	}
	handle(w, r)
}

func writeJSON(w http.ResponseWriter, text string) {
	w.Header().Set("Content-Type", "application/json")
	io.WriteString(w, text+"\n")
}

// refuse counts what is refused, and logs it once a minute for each reason.
func (s *server) refuse(what, from string, r *refusal) {
	s.count("refused_total", r.reason)
	if s.log.due(r.reason, s.clock.uptime()) {
		s.log.warnf("%s from %s refused: %s (said once a minute)", what, from, r.text)
	}
}

// serveEvents takes an event: 200 as soon as it is queued for everyone it is
// for, since the Go file server makes a user's upload wait for the answer.
func (s *server) serveEvents(w http.ResponseWriter, r *http.Request) {
	ev, refused := s.acceptEvent(w, r)
	if refused != nil {
		s.refuse("an event", peer(r.RemoteAddr, r.Header.Get("X-Forwarded-For")), refused)
		if refused.status == http.StatusUnauthorized {
			w.Header().Set("WWW-Authenticate", "Token")
		}
		http.Error(w, refused.text, refused.status)
		return
	}
	s.count("events_total", ev.kind)
	var members map[string]bool
	if ev.group != nil {
		var err error
		if members, err = s.cfg.askMembers(*ev.group); err != nil {
			s.count("group_lookups_total", "failed")
			n := s.resync(ev.repoID, "group members are not known")
			text := fmt.Sprintf("the members of group %d are not known, so nobody gets this event and %d subscribers resync: %v", *ev.group, n, err)
			s.log.warnf("library %q: %s", ev.repoID, text)
			http.Error(w, text, http.StatusServiceUnavailable)
			return
		}
		s.count("group_lookups_total", "ok")
	}
	writeJSON(w, fmt.Sprintf(`{"subscribers":%d}`, s.publish(ev, members)))
}

// acceptEvent checks a posted event and its token, which is seaf-server's: it
// names no user, and no library or the event's own.
func (s *server) acceptEvent(w http.ResponseWriter, r *http.Request) (*event, *refusal) {
	token, found := strings.CutPrefix(r.Header.Get("Authorization"), "Token ")
	if !found {
		token = r.Header.Get("Seafile-Repo-Token") // of Seafile 10
	}
	if token == "" {
		return nil, &refusal{http.StatusUnauthorized, "no-token", "there is no token in Authorization: Token or in Seafile-Repo-Token"}
	}
	cl, refused := s.verify(strings.TrimSpace(token))
	if refused != nil {
		return nil, refused
	}
	if cl.Username != "" {
		return nil, &refusal{http.StatusForbidden, "client-token", "a client's token is good for subscriptions, not for events"}
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxMessageBytes))
	if errors.As(err, new(*http.MaxBytesError)) {
		return nil, &refusal{http.StatusRequestEntityTooLarge, "too-big", "the event is longer than 1 MiB"}
	}
	var ev *event
	if err == nil {
		ev, err = parseEvent(body)
	}
	if err != nil {
		return nil, &refusal{http.StatusBadRequest, "bad-event", err.Error()}
	}
	if cl.RepoID != "" && cl.RepoID != ev.repoID {
		return nil, &refusal{http.StatusForbidden, "other-library", "the token is for another library"}
	}
	return ev, nil
}

// An event is what seaf-server, its Go file server or Seahub post.
type event struct {
	kind, repoID string
	user         string // the only one it is for, or "" for all
	group        *int64 // the only one it is for
	text         []byte // {"type","content"} in compact JSON
}

// parseEvent returns the event in body; an error says what is wrong with it.
func parseEvent(body []byte) (*event, error) {
	var outer struct {
		Type    string
		Content json.RawMessage
	}
	var content struct {
		RepoID string `json:"repo_id"`
	}
	if err := json.Unmarshal(body, &outer); err != nil {
		return nil, fmt.Errorf("the event is not one JSON object: %w", err)
	}
	if !slices.Contains([]string{"repo-update", "file-lock-changed", "folder-perm-changed", "comment-update"}, outer.Type) {
		return nil, fmt.Errorf("unknown type %.100q", outer.Type)
	}
	if json.Unmarshal(outer.Content, &content) != nil || content.RepoID == "" {
		return nil, errors.New("the content is not an object with a repo_id that is a string and not empty")
	}
	if !utf8.Valid(body) {
		return nil, errors.New("the event is not UTF-8")
	}
	var text bytes.Buffer
	fmt.Fprintf(&text, `{"type":%q,"content":`, outer.Type)
	json.Compact(&text, outer.Content)
	text.WriteByte('}')
	ev := &event{kind: outer.Type, repoID: content.RepoID, text: text.Bytes()}
	if ev.kind == "folder-perm-changed" {
		var of struct {
			Type, User string
			Group      *int64
		}
		err := json.Unmarshal(outer.Content, &of)
		grouped := of.Group != nil && *of.Group != -1 // -1 is seaf-server's way of saying none
		switch {
		case err != nil:
		case of.User != "" && (of.Type == "user" || of.Type == "" && !grouped):
			ev.user = of.User
			return ev, nil
		case grouped && (of.Type == "group" || of.Type == "" && of.User == ""):
			ev.group = of.Group
			return ev, nil
		}
		return nil, errors.New("a folder-perm-changed needs the type user and a user, or the type group and the number of a group")
	}
	return ev, nil
}

// serveWebSocket turns a request into a client's connection (RFC 6455, section 4.2).
// There is no check of the Origin: behind a proxy each real client's differs
// from the Host, and what protects a library is the token.
func (s *server) serveWebSocket(w http.ResponseWriter, r *http.Request) {
	has := func(field, word string) bool {
		return slices.ContainsFunc(strings.Split(strings.Join(r.Header.Values(field), ","), ","), func(v string) bool {
			return strings.EqualFold(strings.TrimSpace(v), word)
		})
	}
	c := &conn{server: s, forwarded: strings.Clone(r.Header.Get("X-Forwarded-For")), desktop: has("Sec-WebSocket-Protocol", subprotocol)}
	key, err := base64.StdEncoding.DecodeString(r.Header.Get("Sec-WebSocket-Key"))
	status, text := http.StatusUpgradeRequired, ""
	switch {
	case !has("Connection", "upgrade") || !has("Upgrade", "websocket"):
		text = "This is Seafile's notification server. Its clients connect here by WebSocket; this request does not. To check that it works, ask for /ping, or run notification-server -c DIR -check URL. If a client got this, its proxy does not pass on the headers Upgrade and Connection."
	case !r.ProtoAtLeast(1, 1):
		text = "A WebSocket needs HTTP/1.1, but this request came by " + r.Proto + ": set proxy_http_version 1.1 in nginx."
	case r.Header.Get("Sec-WebSocket-Version") != "13":
		text = "Sec-WebSocket-Version must be 13"
	case err != nil || len(key) != 16:
		status, text = http.StatusBadRequest, "Sec-WebSocket-Key must be 16 bytes in base64"
	case s.clients.Add(1) > s.maxClients:
		s.clients.Add(-1)
		status, text = http.StatusServiceUnavailable, fmt.Sprintf("%d clients are connected; the limit of open files allows no more: raise it (ulimit -n, LimitNOFILE=)", s.maxClients)
		s.refuse("a client", peer(r.RemoteAddr, c.forwarded), &refusal{status, "full", text})
		w.Header().Set("Retry-After", "60")
	default:
		s.upgrade(w, r, c)
		return
	}
	if status == http.StatusUpgradeRequired {
		w.Header().Set("Upgrade", "websocket")
		w.Header().Set("Connection", "Upgrade")
		w.Header().Set("Sec-WebSocket-Version", "13")
	}
	http.Error(w, text, status)
}

// upgrade lets x/net/websocket answer the handshake, and starts the connection.
func (s *server) upgrade(w http.ResponseWriter, r *http.Request, c *conn) {
	h, started := &hijacker{ResponseWriter: w, c: c}, false
	defer func() {
		if !started {
			s.clients.Add(-1)
			if c.nc != nil {
				c.nc.Close()
			}
		}
	}()
	r.Header.Set("Connection", "upgrade") // x/net/websocket looks at one line of each only
	r.Header.Set("Upgrade", "websocket")
	websocket.Server{
		Handshake: func(config *websocket.Config, _ *http.Request) error {
			config.Protocol = nil
			if c.desktop {
				config.Protocol = []string{subprotocol}
			}
			return nil
		},
		Handler: func(ws *websocket.Conn) {
			started = true
			next := ws.NewFrameReader // all that is kept of ws: the request and the buffer for writing are free now
			*h.rw.Writer = bufio.Writer{}
			c.nc.SetWriteDeadline(time.Time{})
			s.log.debugf("%s: connected", c)
			if !s.add(c) {
				c.send(closing(statusGoingAway, "shutdown", "the server is restarted"))
			}
			go c.serve(&frames{br: h.rw.Reader, next: func() (frameReader, error) { return next() }})
		},
	}.ServeHTTP(h, r)
}

// A hijacker gives x/net/websocket the connection with a small buffer of our own
// in place of net/http's two of 4 KiB, and keeps it open when the handler of the
// upgrade, and with it net/http's goroutine, has ended.
type hijacker struct {
	http.ResponseWriter
	c  *conn
	rw *bufio.ReadWriter
}

type unclosed struct{ net.Conn }

func (unclosed) Close() error { return nil }

func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	nc, rw, err := h.ResponseWriter.(http.Hijacker).Hijack()
	if err != nil {
		return nil, nil, err
	}
	h.c.nc = nc
	if h.c.raw, err = nc.(syscall.Conn).SyscallConn(); err != nil {
		return nil, nil, err
	}
	var r io.Reader = nc
	if early, _ := rw.Peek(rw.Reader.Buffered()); len(early) > 0 { // came right behind the handshake
		r = io.MultiReader(bytes.NewReader(bytes.Clone(early)), nc)
	}
	h.rw = bufio.NewReadWriter(bufio.NewReaderSize(r, readBufferBytes), rw.Writer)
	nc.SetWriteDeadline(time.Now().Add(writeWait)) // for the answer to the upgrade
	return unclosed{nc}, h.rw, nil
}

// ---- Group members ----

const (
	rpcWait       = 800 * time.Millisecond // seaf-server, when it posts an event, waits 1 s
	maxReplyBytes = 8 << 20                // some 80,000 members
)

var errUnknownGroup = errors.New("seaf-server does not know them: the group is gone or empty, or seaf-server's database is down")

// askMembers asks seaf-server for the users in a group, by the RPC of Seafile's
// own programs over its Unix socket. An error means that they are not known.
func (cfg *config) askMembers(group int64) (map[string]bool, error) {
	socket := cfg.socket()
	if socket == "" {
		return nil, fmt.Errorf("there is no %s: start seaf-server, or set SEAFILE_RPC_PIPE_PATH to the directory of its seafile.sock", strings.Join(cfg.sockets, ", nor "))
	}
	deadline := time.Now().Add(rpcWait)
	nc, err := net.DialTimeout("unix", socket, rpcWait)
	if err != nil {
		return nil, fmt.Errorf("cannot ask seaf-server: %w: is it running, and may this user open its socket?", err)
	}
	defer nc.Close()
	nc.SetDeadline(deadline)
	request := fmt.Appendf(make([]byte, 4), `{"service":"seafserv-threaded-rpcserver","request":"[\"get_group_members\", %d, -1, -1]"}`, group)
	binary.LittleEndian.PutUint32(request, uint32(len(request)-4))
	nc.Write(request) // an error shows in reading
	members, err := readMembers(nc)
	if err != nil {
		err = fmt.Errorf("asked on %s: %w", socket, err)
	}
	return members, err
}

// readMembers reads the reply: a little-endian length of 4 bytes, then JSON.
func readMembers(r io.Reader) (map[string]bool, error) {
	var size uint32
	var data bytes.Buffer
	err := binary.Read(r, binary.LittleEndian, &size)
	if err == nil && size > maxReplyBytes {
		return nil, fmt.Errorf("a reply of %d bytes cannot be true", size)
	}
	if err == nil {
		_, err = io.CopyN(&data, r, int64(size))
	}
	var reply struct {
		Ret []struct {
			Name string `json:"user-name"`
		}
		Code int    `json:"err_code"`
		Text string `json:"err_msg"`
	}
	if err == nil {
		err = json.Unmarshal(data.Bytes(), &reply)
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("seaf-server does not answer as it should: %w", err)
	case reply.Code != 0 || reply.Text != "":
		return nil, fmt.Errorf("seaf-server answers with error %d, %q", reply.Code, reply.Text)
	case reply.Ret == nil: // null means not known, never nobody
		return nil, errUnknownGroup
	}
	members := make(map[string]bool, len(reply.Ret))
	for _, user := range reply.Ret {
		if user.Name == "" {
			return nil, errors.New("seaf-server names a member without a user-name")
		}
		members[user.Name] = true
	}
	return members, nil
}

// ---- Self-check ----

const (
	checkTime  = 15 * time.Second // for all steps
	answerTime = 4 * time.Second  // for one answer
	maxSkew    = time.Minute      // between the clocks of two machines
)

// A checker goes through what seaf-server and a client do.
type checker struct {
	ctx      context.Context
	out      io.Writer
	cfg      *config
	own      string   // the URL of the server that the configuration describes
	events   string   // the URL to which seaf-server posts
	urls     []string // the URLs by which clients come
	http     *http.Client
	id       string // of a library; random, so that no real client is disturbed
	sessions []*websocket.Conn
	failed   bool
}

// runCheck prints a line for each step, and returns the exit status.
func runCheck(dir string, urls []string, getenv func(string) string, stdout io.Writer) int {
	ctx, cancel := context.WithTimeout(context.Background(), checkTime)
	defer cancel()
	ck := &checker{ctx: ctx, out: stdout, urls: urls, id: rand.Text(), http: &http.Client{
		Timeout:       answerTime,
		Transport:     &http.Transport{TLSClientConfig: &tls.Config{}}, // no proxy of the environment's, and HTTP/1.1
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	var took time.Duration
	configured := ck.step("configuration", true, func() (text string, err error) {
		if ck.cfg, err = loadConfig(dir, getenv); err != nil {
			return "", err
		}
		if !ck.cfg.enabled {
			return "", fmt.Errorf("%s says enabled = false: the server does not run", ck.cfg.file)
		}
		host := ck.cfg.host
		if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
			host = "127.0.0.1"
		}
		ck.own = "http://" + net.JoinHostPort(host, ck.cfg.port)
		ck.events = strings.TrimRight(cmp.Or(getenv("INNER_NOTIFICATION_SERVER_URL"), ck.own), "/") + "/events"
		if len(urls) == 0 {
			ck.urls = []string{ck.own}
		}
		return strings.Join(append([]string{ck.cfg.source}, ck.cfg.warnings...), "; WARNING: "), nil
	})
	pinged := ck.step("ping", configured, ck.ping)
	upgraded := ck.step("upgrade", pinged, ck.upgrade)
	subscribed := ck.step("subscription", upgraded, ck.subscribe)
	ck.step("event", subscribed, func() (string, error) {
		start := time.Now()
		if err := ck.post("", http.StatusOK); err != nil {
			return "", err
		}
		for i, ws := range ck.sessions {
			if text, err := receive(ws); err != nil || !strings.Contains(text, ck.id) {
				return "", fmt.Errorf("posted to %s and answered 200, but it did not come back over %s: they lead to different servers (in a cluster: nginx does not mirror events to it)", ck.events, ck.urls[i])
			}
		}
		took = time.Since(start).Round(100 * time.Microsecond)
		return fmt.Sprintf("posted to %s, it arrived after %v", ck.events, took), nil
	})
	ck.step("forgery", pinged, func() (string, error) {
		return "an event posted with a client's token is refused", ck.post("check@example.com", http.StatusForbidden)
	})
	ck.step("group members", configured, func() (string, error) {
		if _, err := ck.cfg.askMembers(1); err != nil && !errors.Is(err, errUnknownGroup) {
			return fmt.Sprintf("note: %v. Until then, when a folder's permission changes for a group, the library's clients reconnect and ask for everything anew", err), nil
		}
		return "seaf-server answers on " + ck.cfg.socket(), nil
	})
	ck.step("connection", subscribed, func() (string, error) {
		for i, ws := range ck.sessions {
			if w, err := ws.NewFrameWriter(websocket.PingFrame); err == nil {
				w.Write([]byte("check"))
			}
			if _, err := receive(ws); err != nil {
				return "", fmt.Errorf("%s: a ping is not answered: %w: the proxy closes connections early", ck.urls[i], err)
			}
			ws.Close()
		}
		return "still there after a ping", nil
	})
	if ck.failed {
		fmt.Fprintln(stdout, "It does not work for all clients.")
		return 1
	}
	fmt.Fprintf(stdout, "It works: a notification takes %v.\n", took)
	return 0
}

// step prints how a step went. It is not tried where it cannot be.
func (ck *checker) step(name string, ready bool, try func() (string, error)) bool {
	if !ready {
		fmt.Fprintf(ck.out, "- %s: not tried, since a step before it failed\n", name)
		return false
	}
	text, err := try()
	if err != nil {
		ck.failed = true
		fmt.Fprintf(ck.out, "✗ %s: %v\n", name, err)
		return false
	}
	fmt.Fprintf(ck.out, "✓ %s: %s\n", name, text)
	return true
}

// A cause of a failure, where it holds, and what to do.
type cause struct {
	holds bool
	text  string
}

// do sends a request. Its error puts into words why there is no answer, or why
// it can only be a proxy's own.
func (ck *checker) do(method, url, body string, header http.Header) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ck.ctx, method, url, strings.NewReader(body))
	if err != nil || r.URL.Host == "" || !strings.HasPrefix(r.URL.Scheme, "http") {
		return nil, fmt.Errorf("%q is no URL as https://cloud.example.com/notification", url)
	}
	r.Header = header
	answer, err := ck.http.Do(r)
	var causes []cause
	if err != nil {
		var invalid x509.CertificateInvalidError
		causes = []cause{
			{errors.As(err, new(*net.DNSError)), "the name has no address: check its spelling, and DNS"},
			{errors.Is(err, syscall.ECONNREFUSED), "nothing listens there: start the notification server (or the proxy), or correct host and port"},
			{errors.As(err, &invalid) && invalid.Reason == x509.Expired, "renew the proxy's certificate, and check this machine's clock"},
			{errors.As(err, new(*tls.CertificateVerificationError)), "the certificate is not trusted: let the proxy send the whole chain, for this name, of an authority that clients know"},
			{os.IsTimeout(err), fmt.Sprintf("no answer in %v: look for a firewall between", answerTime)},
			{true, "does another service listen there, or is it https for http?"},
		}
	} else {
		status := answer.StatusCode
		err = fmt.Errorf("%s answers %d", url, status)
		causes = []cause{
			{status >= 301 && status <= 308 && status != 304, "it redirects to " + answer.Header.Get("Location") + ", but clients do not follow: give that URL (without /ping)"},
			{status == 404, "the proxy's rule for /notification is missing or does not match, or another service listens there"},
			{status >= 502 && status <= 504, "the proxy cannot reach the notification server, which it must find at " + ck.own + ", or that has no room for more clients (see its log)"},
		}
	}
	for _, cause := range causes {
		if cause.holds {
			return nil, fmt.Errorf("%w: %s", err, cause.text)
		}
	}
	return answer, nil
}

func (ck *checker) ping() (string, error) {
	for _, url := range ck.urls {
		url = strings.TrimRight(url, "/") + "/ping"
		answer, err := ck.do("GET", url, "", http.Header{})
		if err != nil {
			return "", err
		}
		text, _ := io.ReadAll(io.LimitReader(answer.Body, 64<<10))
		answer.Body.Close()
		var pong struct{ Ret string }
		json.Unmarshal(text, &pong)
		date, err := http.ParseTime(answer.Header.Get("Date"))
		skew := time.Since(date).Round(time.Second)
		for _, cause := range []cause{
			{bytes.Contains(text, []byte("<html")), "with a web page: Seahub or another service answers: the proxy's rule for /notification is missing, or stands behind the one for /"},
			{pong.Ret != "pong", "but not pong: another service listens there: correct host and port, here or in the proxy's rule"},
			{err == nil && skew.Abs() >= maxSkew, fmt.Sprintf("but its clock differs from this machine's by %v, and tokens run out by it: set both by NTP", skew)},
		} {
			if cause.holds {
				return "", fmt.Errorf("%s answers %d, %s", url, answer.StatusCode, cause.text)
			}
		}
	}
	return strings.Join(ck.urls, "/ping, ") + "/ping answers pong", nil
}

func (ck *checker) upgrade() (string, error) {
	for _, url := range ck.urls {
		for who, header := range map[string]http.Header{
			"the desktop client": {"Sec-Websocket-Protocol": {subprotocol}},
			"a browser":          {"Origin": {"https://cloud.example.com"}, "Sec-Websocket-Extensions": {"permessage-deflate"}},
		} {
			maps.Copy(header, http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"},
				"Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {base64.StdEncoding.EncodeToString([]byte(ck.id[:16]))}})
			answer, err := ck.do("GET", url, "", header)
			if err != nil {
				return "", fmt.Errorf("as %s: %w", who, err)
			}
			answer.Body.Close()
			if answer.StatusCode != http.StatusSwitchingProtocols {
				return "", fmt.Errorf("as %s, %s answers %d, not 101: the proxy must pass on the headers Upgrade and Connection, by HTTP/1.1", who, url, answer.StatusCode)
			}
		}
	}
	return "goes through, for the desktop client and for a browser", nil
}

// token signs a token as seaf-server does.
func (ck *checker) token(repoID, username string) string {
	enc := base64.RawURLEncoding
	text := enc.EncodeToString([]byte(`{"alg":"HS256","typ":"JWT"}`)) + "." +
		enc.EncodeToString(fmt.Appendf(nil, `{"exp":%d,"repo_id":%q,"username":%q}`, time.Now().Add(5*time.Minute).Unix(), repoID, username))
	mac := hmac.New(sha256.New, ck.cfg.key)
	mac.Write([]byte(text))
	return text + "." + enc.EncodeToString(mac.Sum(nil))
}

const otherKey = "refuses a token signed with this key: the running server has another jwt_private_key: restart Seafile, so that all its programs read the same one"

// subscribe opens a session at each URL. A good subscription has no answer: so
// a broken one follows it, whose answer must be the first to come.
func (ck *checker) subscribe() (string, error) {
	for _, url := range ck.urls {
		config, err := websocket.NewConfig("ws"+strings.TrimPrefix(url, "http"), url)
		if err != nil {
			return "", err
		}
		ws, err := config.DialContext(ck.ctx)
		if err != nil {
			return "", fmt.Errorf("%s: %w", url, err)
		}
		ck.sessions = append(ck.sessions, ws)
		fmt.Fprintf(ws, `{"type":"subscribe","content":{"repos":[{"id":%q,"jwt_token":%q},{"id":"broken","jwt_token":"x.y.z"}]}}`, ck.id, ck.token(ck.id, "check@example.com"))
		switch text, err := receive(ws); {
		case err != nil:
			return "", fmt.Errorf("%s: no answer to a subscription with a broken token: %w", url, err)
		case strings.Contains(text, ck.id):
			return "", fmt.Errorf("%s %s", url, otherKey)
		}
	}
	return "a good token is accepted, a broken one is answered jwt-expired", nil
}

// receive returns the payload of the next frame.
func receive(ws *websocket.Conn) (string, error) {
	ws.SetReadDeadline(time.Now().Add(answerTime))
	f, err := ws.NewFrameReader()
	if err != nil {
		return "", err
	}
	data, err := io.ReadAll(f)
	return string(data), err
}

// post posts an event as seaf-server does, or as a client would that forges one.
func (ck *checker) post(username string, want int) error {
	body := fmt.Sprintf(`{"type":"repo-update","content":{"repo_id":%q,"commit_id":"check"}}`, ck.id)
	answer, err := ck.do("POST", ck.events, body, http.Header{"Authorization": {"Token " + ck.token(ck.id, username)}})
	if err != nil {
		return err
	}
	answer.Body.Close()
	switch {
	case answer.StatusCode == want:
		return nil
	case answer.StatusCode == http.StatusUnauthorized:
		return fmt.Errorf("%s %s", ck.events, otherKey)
	}
	return fmt.Errorf("%s answers %d to this event, not %d: another service, or the server that Seafile ships, listens there", ck.events, answer.StatusCode, want)
}

// ---- Logging ----

type level int8

const (
	levelDebug level = iota - 1
	levelInfo
	levelWarning
	levelError
)

var levels = map[string]level{"debug": levelDebug, "info": levelInfo, "warning": levelWarning, "warn": levelWarning, "error": levelError}

// A logger writes lines that Seafile's own log tools read. What comes from
// outside is quoted by the caller. A log that cannot be written stops nothing.
type logger struct {
	path   string // "" for none
	level  level
	prefix string
	stderr io.Writer

	mu     sync.Mutex
	out    io.Writer
	broken bool                     // and said so
	said   map[string]time.Duration // uptime at the last warning of a kind
}

// openLog opens the log file path, or standard error for "-".
func openLog(path string, toStdout bool, stdout, stderr io.Writer) *logger {
	lg := &logger{out: stderr, stderr: stderr, said: map[string]time.Duration{}}
	if toStdout {
		lg.out, lg.prefix = stdout, "[notification-server] "
	} else if path != "-" {
		lg.path = path
		lg.reopen()
	}
	return lg
}

// reopen opens the log file anew. Where that fails the log goes where it went.
func (lg *logger) reopen() {
	if lg.path == "" {
		return
	}
	file, err := os.OpenFile(lg.path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o640)
	lg.mu.Lock()
	defer lg.mu.Unlock()
	if err != nil {
		fmt.Fprintf(lg.stderr, "notification-server: cannot open the log: %v: serving goes on; correct it, then send SIGUSR1\n", err)
		return
	}
	if old, ok := lg.out.(*os.File); ok && lg.out != lg.stderr {
		old.Close()
	}
	lg.out = file
}

func (lg *logger) debugf(format string, args ...any) { lg.printf(levelDebug, format, args...) }
func (lg *logger) infof(format string, args ...any)  { lg.printf(levelInfo, format, args...) }
func (lg *logger) warnf(format string, args ...any)  { lg.printf(levelWarning, format, args...) }
func (lg *logger) errorf(format string, args ...any) { lg.printf(levelError, format, args...) }

func (lg *logger) printf(l level, format string, args ...any) {
	if l < lg.level {
		return
	}
	name := [...]string{"DEBUG", "INFO", "WARNING", "ERROR"}[l-levelDebug]
	text := fmt.Sprintf("%s[%s] [%s] %s\n", lg.prefix, time.Now().Format(time.DateTime), name, fmt.Sprintf(format, args...))
	lg.mu.Lock()
	defer lg.mu.Unlock()
	_, err := io.WriteString(lg.out, text)
	if err != nil && !lg.broken {
		fmt.Fprintf(lg.stderr, "notification-server: cannot write the log: %v: serving goes on; make room, or correct it and send SIGUSR1\n", err)
	}
	lg.broken = err != nil
}

// sent logs a message to a client.
func (lg *logger) sent(c *conn, user string, m *message) {
	if lg.level <= levelDebug {
		lg.debugf("to %s, user %q: %s", c, user, m.text)
	}
}

// Write takes what net/http has to say.
func (lg *logger) Write(p []byte) (int, error) {
	lg.warnf("%q", bytes.TrimSpace(p))
	return len(p), nil
}

// due reports whether a warning of this kind was not given in the last minute.
func (lg *logger) due(kind string, uptime time.Duration) bool {
	lg.mu.Lock()
	defer lg.mu.Unlock()
	last, ok := lg.said[kind]
	if ok && uptime-last < time.Minute {
		return false
	}
	lg.said[kind] = uptime
	return true
}

// A series is a counter by its name and the value of its label.
type series struct{ name, label string }

// bounds are the upper ends of the buckets of delivery_seconds.
var bounds = [...]float64{.001, .005, .01, .05, .1, .5, 1, 5, 30, math.MaxFloat64}

// metrics are the server's figures for its operator.
type metrics struct {
	started     time.Time
	countsMu    sync.Mutex
	counts      map[series]int64
	buckets     [len(bounds)]atomic.Int64 // deliveries by the time they took
	nanoseconds atomic.Int64              // of all deliveries
}

func (m *metrics) count(name, label string) {
	m.countsMu.Lock()
	m.counts[series{name, label}]++
	m.countsMu.Unlock()
}

// delivered counts an event written to a client, d after it was accepted.
func (m *metrics) delivered(d time.Duration) {
	m.buckets[sort.SearchFloat64s(bounds[:], d.Seconds())].Add(1)
	m.nanoseconds.Add(int64(d))
}

func (s *server) serveMetrics(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/metrics" {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4")
	fmt.Fprintln(w, strings.Join(s.figures(true), "\n"))
}

// figures returns the metrics, one a string, in Prometheus' text format.
func (s *server) figures(comments bool) (lines []string) {
	family := func(name, kind, help string, samples ...any) { // suffix and value of each
		if comments {
			lines = append(lines, "# HELP "+name+" "+help, "# TYPE "+name+" "+kind)
		}
		for i := 0; i < len(samples); i += 2 {
			lines = append(lines, fmt.Sprintf("%s%v %v", name, samples[i], samples[i+1]))
		}
	}
	s.mu.Lock()
	conns, subscriptions, libraries := len(s.conns), s.subscriptions, len(s.libraries)
	s.mu.Unlock()
	family("seafile_notification_connections", "gauge", "Clients connected by WebSocket.", "", conns)
	family("seafile_notification_subscriptions", "gauge", "Subscriptions of clients to libraries.", "", subscriptions)
	family("seafile_notification_libraries", "gauge", "Libraries with at least one subscription.", "", libraries)
	s.countsMu.Lock()
	counts := maps.Clone(s.counts)
	s.countsMu.Unlock()
	for _, c := range [][3]string{
		{"events_total", "type", "Events accepted."},
		{"refused_total", "reason", "Events, subscriptions and clients refused."},
		{"closed_total", "reason", "Connections ended."},
		{"group_lookups_total", "result", "Questions for the members of a group."},
	} {
		var samples []any
		for key, n := range counts {
			if key.name == c[0] {
				samples = append(samples, fmt.Sprintf("{%s=%q}", c[1], key.label), n)
			}
		}
		family("seafile_notification_"+c[0], "counter", c[2], samples...)
	}
	family("seafile_notification_outbox_full_total", "counter", "Clients that were too slow.", "", counts[series{"closed_total", "outbox-full"}])
	var samples []any
	total := int64(0)
	for i, bound := range bounds {
		total += s.buckets[i].Load()
		if le := fmt.Sprint(bound); bound < math.MaxFloat64 {
			samples = append(samples, fmt.Sprintf("_bucket{le=%q}", le), total)
		}
	}
	samples = append(samples, `_bucket{le="+Inf"}`, total, "_sum", float64(s.nanoseconds.Load())/1e9, "_count", total)
	family("seafile_notification_delivery_seconds", "histogram", "Time from accepting an event to having written it to a client.", samples...)
	family("seafile_notification_deliveries_total", "counter", "Events written to clients.", "", total)
	family("process_start_time_seconds", "gauge", "Start of the process, in Unix time.", "", s.started.Unix())
	var pages, resident int
	statm, _ := os.ReadFile("/proc/self/statm")
	fmt.Sscan(string(statm), &pages, &resident)
	family("process_resident_memory_bytes", "gauge", "Resident memory.", "", resident*os.Getpagesize())
	family("go_goroutines", "gauge", "Goroutines.", "", runtime.NumGoroutine())
	return lines
}
